//! What closed sockets have left in `STREAMS`.
//!
//! The hook on close() frees an element, but it does not run for sockets that no process has opened: subflows of MPTCP, and the kernel's own
//! (NFS, for example). Elements that nobody frees fill the map, so that records of others go into socket storage, which costs more.
//!
//! An element is freed if it has been there since the last look, and no TCP socket of any network namespace has its cookie. (A socket in a
//! namespace that no process and no name leads to is not seen. It loses its record, and getpeername() shows its backend.)

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use aya::maps::{Array, MapData, MapError};
use proxy_common::abi::socket::STREAM_SLOTS;
use proxy_common::abi::{SocketRecord, StreamRecord};
use rustix::thread::{CapabilitySet, capabilities};

use super::diag::{Diag, cookie};
use super::{Places, SocketMaps, SocketSweeper, SocketsError, apart, map, namespaces};

/// The elements of the last look: cookies, by slot.
#[derive(Debug, Default)]
pub(super) struct Left(Mutex<BTreeMap<u32, u64>>);

impl SocketSweeper {
    /// Frees the elements of `STREAMS` whose record may be judged and whose sockets are gone. Returns how many, and the CPU time that it
    /// took. Blocking.
    ///
    /// # Errors
    ///
    /// When a namespace cannot be looked into. Then nothing is freed.
    pub fn free_streams(
        &self,
        maps: &SocketMaps,
        may_be_judged: impl Fn(&SocketRecord) -> bool + Send,
    ) -> Result<(usize, Duration), SocketsError> {
        let (freed, cpu) = apart(|| self.free_here(maps, may_be_judged))?;
        Ok((freed?, cpu))
    }

    fn free_here(
        &self,
        maps: &SocketMaps,
        may_be_judged: impl Fn(&SocketRecord) -> bool,
    ) -> Result<usize, SocketsError> {
        // Without the host's processes most namespaces of pods cannot be seen, nor without the right to look.
        if std::process::id() == 1
            || !capabilities(None).is_ok_and(|have| have.effective.contains(CapabilitySet::SYS_PTRACE))
        {
            return Ok(0);
        }
        let mut streams = streams(maps).map_err(SocketsError::Storage)?;
        let mut before = self.left.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut now = BTreeMap::new();
        for slot in 0..STREAM_SLOTS {
            let StreamRecord { cookie, record, .. } = streams.get(&slot, 0).map_err(SocketsError::Storage)?;
            if cookie != 0 && may_be_judged(&record) {
                now.insert(slot, cookie);
            }
        }
        let stayed = now.iter().filter(|(slot, cookie)| before.get(slot) == Some(cookie));
        let mut gone: BTreeMap<u64, u32> = stayed.map(|(slot, cookie)| (*cookie, *slot)).collect();
        *before = now;
        if !gone.is_empty() {
            look_for(&self.places, &mut gone)?;
        }
        let mut freed = 0;
        for (cookie, slot) in gone {
            // Another socket may have taken it meanwhile.
            if streams.get(&slot, 0).map_err(SocketsError::Storage)?.cookie == cookie {
                streams.set(slot, StreamRecord::default(), 0).map_err(SocketsError::Storage)?;
                freed += 1;
            }
        }
        Ok(freed)
    }
}

fn streams(maps: &SocketMaps) -> Result<Array<MapData, StreamRecord>, MapError> {
    map(&maps.streams)?.try_into()
}

/// Takes the cookies of open sockets out of `gone`.
fn look_for(places: &Places, gone: &mut BTreeMap<u64, u32>) -> Result<(), SocketsError> {
    let found = namespaces::find(places)?;
    for namespace in &found.namespaces {
        namespace.enter()?;
        Diag::open()?.list_tcp(|socket| {
            gone.remove(&cookie(&socket.socket_id));
        })?;
    }
    Ok(())
}
