//! Maps about sockets that the socket edge and the agent share.

use std::os::fd::OwnedFd;

use aya::maps::{Map, MapData, MapError};

/// Maps about sockets that the socket edge and the agent share.
#[derive(Debug)]
pub struct SocketMaps {
    /// `SOCKETS`.
    pub records: OwnedFd,
    /// `ORDERS`.
    pub orders: OwnedFd,
    /// `STREAMS`.
    pub streams: OwnedFd,
}

pub(super) fn map(fd: &OwnedFd) -> Result<Map, MapError> {
    Map::from_map_data(MapData::from_fd(fd.try_clone()?)?)
}
