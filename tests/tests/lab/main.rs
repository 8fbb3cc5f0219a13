//! The suite `lab`: the agent itself in nodes, pods and clients made of network namespaces. It sees the outcomes of
//! real connections, as users of a cluster do, and the agent's answers, files and log, as operators do. It needs
//! root.

mod cases;
mod config;
mod datagrams;
mod deploy;
mod devices;
mod explain;
mod faults;
mod floods;
mod flows;
mod health;
mod hostile;
mod itself;
mod left;
mod live;
mod monitor;
mod networks;
mod scenarios;
mod swap;
mod topologies;
mod torn;
