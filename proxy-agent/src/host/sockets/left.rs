//! Elements of `STREAMS` that closed sockets have left.
//!
//! The hook on close() frees an element, but it does not run for sockets that no process has opened: subflows of MPTCP,
//! and the kernel's own (NFS, for example). Elements that nobody frees fill the map, so that records of other sockets
//! go into socket storage, which costs more.
//!
//! An element is freed if it was already there at the last look and no TCP socket of any network namespace has its
//! cookie. (A socket is not seen if its namespace has neither a process nor a name. It loses its record, and
//! getpeername() shows its backend.)

use std::collections::BTreeMap;
use std::sync::Mutex;

use aya::maps::{Array, MapData, MapError};
use proxy_common::abi::socket::STREAM_SLOTS;
use proxy_common::abi::{SocketRecord, StreamRecord};
use rustix::thread::{CapabilitySet, capabilities};

use super::diag::{Diag, cookie};
use super::maps::{SocketMaps, map};
use super::namespaces::{self, Places};
use crate::host::sockets::error::SocketsError;

/// Elements at the last look: cookies, by slot.
#[derive(Debug, Default)]
pub(super) struct Left(Mutex<BTreeMap<u32, u64>>);

impl Left {
    /// Frees the elements as [`super::SocketSweeper::free_streams`] says, and returns their number.
    pub(super) fn free(
        &self,
        places: &Places,
        maps: &SocketMaps,
        may_be_judged: impl Fn(&SocketRecord) -> bool,
    ) -> Result<usize, SocketsError> {
        // If the agent does not see the host's processes, or has no right to examine them, it cannot see most
        // namespaces of pods.
        if std::process::id() == 1
            || !capabilities(None).is_ok_and(|have| have.effective.contains(CapabilitySet::SYS_PTRACE))
        {
            return Ok(0);
        }
        let mut streams = streams(maps).map_err(SocketsError::Storage)?;
        let mut before = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
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
            look_for(places, &mut gone)?;
        }
        let mut freed = 0;
        for (cookie, slot) in gone {
            // Another socket may have taken the element meanwhile.
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

/// Removes the cookies of open sockets from `gone`.
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
