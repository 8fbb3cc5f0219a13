//! Maps about sockets that the socket edge and the agent share.

use std::os::fd::OwnedFd;

use aya::maps::{Map, MapData, MapError};

/// Maps about sockets that the socket edge and the agent share.
#[derive(Debug)]
pub(crate) struct SocketMaps {
    /// `SOCKETS`.
    pub(crate) records: OwnedFd,
    /// `ORDERS`.
    pub(crate) orders: OwnedFd,
    /// `STREAMS`.
    pub(crate) streams: OwnedFd,
}

pub(super) fn map(fd: &OwnedFd) -> Result<Map, MapError> {
    Map::from_map_data(MapData::from_fd(fd.try_clone()?)?)
}
