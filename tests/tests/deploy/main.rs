//! The suite `deploy`: the manifests of `deploy/` as texts, and the installers that they have to fit. It sees files and the
//! agent's own reading of them, and needs no privileges. (The pod that they make runs in the suite `lab`.)

mod installers;
mod manifests;
