//! Connects a socket to a backend.

use super::caller::{Caller, target};
use super::record::remember;
use super::verdict::Verdict;
use crate::abi::{Counter, SocketRecord};
use crate::addr::Addr;
use crate::be::Be16;
use crate::datapath::select::Selection;
use crate::datapath::tables::{Socket, Tables};
use crate::datapath::trace;

/// Connects a socket of `proto` that asks for `vip` to a backend instead.
#[inline(always)]
pub(super) fn lead(
    socket: &mut impl Socket,
    tables: &impl Tables,
    proto: u8,
    vip: Addr,
    vip_port: Be16,
) -> Verdict {
    let (frontend, node) = match target(socket, tables, vip, vip_port, proto) {
        Ok(found) => found,
        Err(verdict) => return verdict,
    };
    let caller = Caller::of(socket, node);
    match caller.select(tables, frontend) {
        Selection::Backend(id, backend) => {
            let record = SocketRecord {
                vip,
                vip_port,
                backend_addr: backend.addr,
                backend_port: backend.port,
                service: frontend.service,
                backend: id,
            };
            if !remember(socket, tables, record) {
                tables.count(Counter::FailRecord);
                return Verdict::Fail;
            }
            let to = (backend.addr, backend.port);
            trace::called(tables, Counter::Connected, socket, frontend.service, Some(to), true);
            socket.rewrite(backend.addr, backend.port);
            Verdict::Translated
        }
        Selection::Reject(why) => caller
            .refused(tables, socket, Verdict::Reject, why, frontend.service)
            .unless(caller.waits(proto, why)),
        Selection::Drop(why) => caller
            .refused(tables, socket, Verdict::Drop, why, frontend.service)
            .unless(caller.waits(proto, why)),
    }
}
