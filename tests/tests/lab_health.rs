//! What probes, load balancers, scrapes and readers of Events get to see of the running agent.

mod health;
