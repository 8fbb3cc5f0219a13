//! The agent's own process: its rank among the processes that the kernel may kill, and its memory.

const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

/// Sets how readily the kernel kills this process when memory runs out, -1000 (never) to 1000. A failure is logged:
/// lowering the score takes CAP_SYS_RESOURCE, and Services work without it.
pub(crate) fn set_oom_score_adj(score: i32) {
    if let Err(error) = std::fs::write(OOM_SCORE_ADJ, score.to_string()) {
        tracing::warn!(score, %error, file = OOM_SCORE_ADJ, "oomScoreAdj cannot be set");
    }
}

/// Makes all threads take memory from one heap. By default glibc gives each thread a heap of its own, and the memory
/// that the threads for loading programs have used and freed would stay there unused.
pub(crate) fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers and touches nothing but the allocator's settings, under its own lock.
    let done = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    #[cfg(target_env = "gnu")]
    tracing::debug!(done = done == 1, "one heap");
}

/// Returns free memory inside the heap to the kernel. Called after work that needs much memory once, such as the first
/// full plan. Takes about a millisecond for ten megabytes.
pub(crate) fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number and gives back only pages that no allocation is in.
    let given_back = unsafe { libc::malloc_trim(0) };
    #[cfg(target_env = "gnu")]
    tracing::debug!(given_back = given_back == 1, "memory given back");
}
