//! What the configuration asks of the agent's own process.

const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

/// Sets how soon the kernel ends this process when memory runs out, -1000 (never) to 1000. A failure is logged:
/// lowering it takes CAP_SYS_RESOURCE, and Services work without.
pub fn set_oom_score_adj(score: i32) {
    if let Err(error) = std::fs::write(OOM_SCORE_ADJ, score.to_string()) {
        tracing::warn!(score, %error, file = OOM_SCORE_ADJ, "oomScoreAdj cannot be set");
    }
}
