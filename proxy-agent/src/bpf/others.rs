//! What others run on a device, and where packets meet it: ahead of our programs, or behind.
//!
//! In each direction the kernel runs all TCX programs of a device and then all its clsact filters. Ours are to be the first
//! on the way in and the last on the way out, so that everybody else sees pods where clients see Services. But a filter
//! cannot be ahead of a TCX program.

use std::collections::BTreeSet;
use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use super::clsact::{TrafficControl, own_filter};
use super::pins::PinDir;
use super::sys;
use super::tc::{Direction, Pair, device_link, link_pin};

/// Where packets meet something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Before our program.
    Ahead,
    /// After our program.
    Behind,
}

/// Something of others that packets meet on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Other {
    /// On which way.
    pub direction: Direction,
    /// On which side of our program.
    pub side: Side,
    /// What it is: `TCX program 12`, or `u32 filter, pref 10`.
    pub what: String,
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

/// Looks for what is not ours on devices.
pub struct Looking {
    control: TrafficControl,
    /// The devices that can have filters.
    filtered: BTreeSet<u32>,
}

impl Looking {
    /// Begins.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn begin() -> io::Result<Self> {
        let control = TrafficControl::open()?;
        let filtered = control.devices()?;
        Ok(Self { control, filtered })
    }

    /// Returns what packets meet on a device beside our programs, except what is behind ours on the way in, as it should be.
    /// Empty for a direction in which ours is not attached.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn others(&self, pins: &PinDir, device: u32, pair: Pair) -> io::Result<Vec<Other>> {
        let mut others = Vec::new();
        for direction in Direction::ALL {
            let mut met = self.met(pins, device, pair, direction)?;
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

    /// Returns what packets meet, in this order; `None` is ours.
    fn met(
        &self,
        pins: &PinDir,
        device: u32,
        pair: Pair,
        direction: Direction,
    ) -> io::Result<Vec<Option<String>>> {
        let link = device_link(&link_pin(pins, pair.program(direction), device)).ok().flatten();
        let own = link.map(|(_, info)| info.program_id);
        // A kernel without TCX refuses to tell, and has none.
        let programs = sys::tcx_programs(device, direction == Direction::Ingress).unwrap_or_default();
        let programs = programs.into_iter().map(|id| (own != Some(id)).then(|| format!("TCX program {id}")));
        let mut met: Vec<_> = programs.collect();
        if self.filtered.contains(&device) {
            let own = own_filter(direction);
            let filters = self.control.filters(device, direction)?;
            // With the handle 0 the kernel tells of a priority, not of a filter.
            let filters =
                filters.into_iter().filter(|filter| filter.chain == 0 && u32::from(filter.id.handle) != 0);
            met.extend(filters.map(|filter| {
                (filter.id != own).then(|| format!("{} filter, pref {}", filter.kind, filter.id.priority))
            }));
        }
        Ok(met)
    }
}
