//! A pair of tun devices, joined by two threads: their packets begin with the IP header, on kernels of every
//! configuration.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result};
use proxy_tests::lab::Netns;

use super::sys;

/// Makes a device `name` in each of two namespaces. They live as long as this process.
pub(super) fn join(name: &str, nets: [&Netns; 2]) -> Result<()> {
    let [one, other] = nets.map(|net| -> Result<Arc<File>> {
        Ok(Arc::new(net.enter(|| sys::tun(name))?.context("TUNSETIFF on /dev/net/tun")?))
    });
    let (one, other) = (one?, other?);
    for (from, to) in [(Arc::clone(&one), Arc::clone(&other)), (other, one)] {
        thread::spawn(move || {
            let mut packet = vec![0; 65_536];
            // A device that is down accepts nothing, and the packet is lost. A device that is gone ends its thread.
            while let Ok(length) = (&*from).read(&mut packet) {
                let _ = (&*to).write(&packet[..length]);
            }
        });
    }
    Ok(())
}
