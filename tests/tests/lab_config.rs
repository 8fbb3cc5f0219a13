//! kube-proxy's configuration, by file and by flags, and the Node, as the running agent takes them.

mod config;
