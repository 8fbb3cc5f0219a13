//! A flow's record in its map: read and written in place, while the kernel may give the element to another flow.

use core::ptr::{addr_of, addr_of_mut};

use proxy_common::abi::{Flow, IfIndex, Nanos};
use proxy_common::addr::Addr;
use proxy_common::be::Be16;
use proxy_common::datapath::edge::tables::FlowCell;

/// A record in its map.
#[derive(Clone, Copy)]
pub(crate) struct Cell(pub(crate) *mut Flow);

macro_rules! set_field {
    ($self:ident, $check:ident, $($field:ident = $value:expr),+) => {
        // SAFETY: the kernel's lookup returned a pointer to a whole element, which stays readable and writable while
        // the program runs, even if another flow takes the element: its check differs then.
        unsafe {
            if addr_of!((*$self.0).check).read_volatile() == $check {
                $(addr_of_mut!((*$self.0).$field).write_volatile($value);)+
            }
        }
    };
}

impl FlowCell for Cell {
    #[inline(always)]
    fn get(&self) -> Flow {
        // SAFETY: the kernel's lookup returned a pointer to a whole element; the copied check shows whether the element
        // is another flow's.
        unsafe { *self.0 }
    }

    #[inline(always)]
    fn set_state(&self, check: u32, state: u32) {
        set_field!(self, check, state = state);
    }

    #[inline(always)]
    fn set_expected(&self, check: u32, number: u32) {
        set_field!(self, check, expected = number);
    }

    #[inline(always)]
    fn set_syn(&self, check: u32, syn: u16) {
        set_field!(self, check, syn = syn);
    }

    #[inline(always)]
    fn set_answered_by(&self, check: u32, ifindex: IfIndex) {
        set_field!(self, check, answered_by = ifindex);
    }

    #[inline(always)]
    fn set_asked_by(&self, check: u32, ifindex: IfIndex) {
        set_field!(self, check, asked_by = ifindex);
    }

    #[inline(always)]
    fn set_last_seen(&self, check: u32, now: Nanos) {
        set_field!(self, check, last_seen = now);
    }

    #[inline(always)]
    fn set_snat(&self, check: u32, addr: Addr, port: Be16) {
        set_field!(self, check, snat = addr, snat_port = port);
    }
}
