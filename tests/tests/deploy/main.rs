//! The suite `deploy`: the manifests of `deploy/` as texts, and the installers that they must fit. It sees files and
//! the agent's own parser for them, and needs no privileges. (The pod of the manifests runs in the suite `lab`.)

mod installers;
mod manifests;
