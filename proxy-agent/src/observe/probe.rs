//! Questions of probes, which the health server answers and metrics count.

/// Question of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// May load balancers send traffic here?
    Healthz,
    /// Does the agent make progress?
    Livez,
    /// Has the agent done its first work?
    Readyz,
}
