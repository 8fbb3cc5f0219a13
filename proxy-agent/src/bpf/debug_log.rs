//! Prints the log of BPF programs built with `debug-log`. For debugging only: it costs every connection.

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Follows the programs' log on the current runtime. Warns once if the object was built without a log.
pub(super) fn follow(programs: &mut Ebpf) {
    let logger = match EbpfLogger::init(programs) {
        Ok(logger) => logger,
        Err(error) => return tracing::warn!(%error, "the BPF object has no log; build it with --debug-log"),
    };
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the logger keeps its descriptor as long as it lives"
    )]
    let registered = AsyncFd::with_interest(logger, Interest::READABLE);
    let mut logger = match registered {
        Ok(logger) => logger,
        Err(error) => return tracing::warn!(%error, "the log of the BPF programs cannot be followed"),
    };
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
}
