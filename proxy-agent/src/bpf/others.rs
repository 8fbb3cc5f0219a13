//! Programs of others on a device, and whether packets meet them ahead of our programs or behind.
//!
//! In each direction the kernel runs all TCX programs of a device and then all its clsact filters. Our programs have to
//! be first on the way in and last on the way out, so that all others see pods where clients see Services. But a filter
//! cannot be ahead of a TCX program.

use std::collections::BTreeSet;
use std::fmt;
use std::io;

use proxy_common::abi::IfIndex;
use proxy_common::datapath::edge::Role;
use serde::{Deserialize, Serialize};

use super::clsact::{TrafficControl, own_filter};
use super::pins::PinDir;
use super::sys;
use super::tc::{device_link, link_pin, program};
use crate::bpf::device::Direction;

/// Side of our program on which packets meet another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    /// Before our program.
    Ahead,
    /// After our program.
    Behind,
}

/// A program or filter of others that packets meet on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Other {
    /// Direction in which packets meet it.
    pub(crate) direction: Direction,
    /// Side of our program.
    pub(crate) side: Side,
    /// Name of the program or filter: `TCX program 12`, or `u32 filter, pref 10`.
    pub(crate) what: String,
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = match self.side {
            Side::Ahead => "ahead",
            Side::Behind => "behind",
        };
        let direction = match self.direction {
            Direction::Egress => "egress",
            Direction::Ingress => "ingress",
        };
        write!(f, "{} {side} on {direction}", self.what)
    }
}

/// Search for programs and filters of others on devices.
pub(crate) struct Looking {
    control: TrafficControl,
    /// Devices that can have filters.
    filtered: BTreeSet<IfIndex>,
}

impl Looking {
    /// Begins a search.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub(crate) fn begin() -> io::Result<Self> {
        let control = TrafficControl::open()?;
        let filtered = control.devices()?;
        Ok(Self { control, filtered })
    }

    /// Returns the programs and filters of others that packets meet on a device, except those behind our program on the
    /// way in, where they belong. Empty for a direction in which our program is not attached.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub(crate) fn others(&self, pins: &PinDir, device: IfIndex, role: Role) -> io::Result<Vec<Other>> {
        let mut others = Vec::new();
        for direction in Direction::ALL {
            let mut met = self.met(pins, device, role, direction)?;
            met.dedup();
            let Some(ours) = met.iter().position(Option::is_none) else { continue };
            let all = met.into_iter().enumerate().filter_map(|(place, what)| Some((place, what?)));
            let all = all.map(|(place, what)| {
                let side = if place < ours { Side::Ahead } else { Side::Behind };
                Other { direction, side, what }
            });
            others.extend(all.filter(|other| (direction, other.side) != (Direction::Ingress, Side::Behind)));
        }
        Ok(others)
    }

    /// Returns the programs and filters in the order in which packets meet them; `None` stands for ours.
    fn met(
        &self,
        pins: &PinDir,
        device: IfIndex,
        role: Role,
        direction: Direction,
    ) -> io::Result<Vec<Option<String>>> {
        let link = device_link(&link_pin(pins, program(role, direction), device)).ok().flatten();
        let own = link.map(|(_, info)| info.program_id);
        // A kernel without TCX refuses the query, and has no TCX programs.
        let programs = sys::tcx_programs(device, direction == Direction::Ingress).unwrap_or_default();
        let programs = programs.into_iter().map(|id| (own != Some(id)).then(|| format!("TCX program {id}")));
        let mut met: Vec<_> = programs.collect();
        if self.filtered.contains(&device) {
            let own = own_filter(direction);
            let filters = self.control.filters(device, direction)?;
            // An entry with the handle 0 describes a priority, not a filter.
            let filters =
                filters.into_iter().filter(|filter| filter.chain == 0 && u32::from(filter.id.handle) != 0);
            met.extend(filters.map(|filter| {
                (filter.id != own).then(|| format!("{} filter, pref {}", filter.kind, filter.id.priority))
            }));
        }
        Ok(met)
    }
}
