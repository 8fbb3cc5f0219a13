//! The suite `api`: the test API server, seen through the client library that the agent uses, and the agent's watch
//! of it. It sees real connections on loopback, with TLS where that matters, and needs no privileges.

mod server;
mod source;
