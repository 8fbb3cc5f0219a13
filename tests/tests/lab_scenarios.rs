//! Every example does what its comments say: the real agent on the manifests of `examples/`, real servers, and real
//! clients in a pod, on the node and outside. Live changes are changes of the files.

mod scenarios;
