//! The suite `lab`: the agent itself in nodes, pods and clients made of network namespaces. It sees what users of a cluster
//! see, which is the fate of real connections, and what operators see: the agent's answers, its files and its log. It needs
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
