//! What goes wrong on a node, and that nothing is lost by it: clients go on connecting while the agent is killed,
//! maps are replaced, files are broken and the API server is away, and not one of their connections fails.

mod faults;
