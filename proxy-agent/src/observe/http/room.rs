//! Places for connections to servers that anybody may connect to. A new connection always gets a place; when none is
//! left, another connection loses its place.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Places for connections. Servers may share them. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Room(Arc<Mutex<Guests>>);

/// Number of a guest, in the order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct GuestId(u64);

#[derive(Debug)]
struct Guests {
    places: usize,
    next: GuestId,
    /// Guests by arrival.
    here: BTreeMap<GuestId, Guest>,
    /// The same guests, by port and source.
    ports: BTreeMap<u16, Port>,
}

#[derive(Debug, Default)]
struct Port {
    guests: usize,
    sources: BTreeMap<IpAddr, BTreeSet<GuestId>>,
}

#[derive(Debug)]
struct Guest {
    port: u16,
    source: IpAddr,
    /// Dropped to make the guest leave.
    _stay: oneshot::Sender<()>,
}

/// A place, held until this is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    room: Room,
    id: GuestId,
    /// Ready when the place has been given to another connection.
    pub(crate) gone: oneshot::Receiver<()>,
}

impl Room {
    /// Makes a room with this many places, and at least one.
    pub(crate) fn new(places: usize) -> Self {
        let places = places.max(1);
        Self(Arc::new(Mutex::new(Guests {
            places,
            next: GuestId(0),
            here: BTreeMap::new(),
            ports: BTreeMap::new(),
        })))
    }

    /// Returns a place for a connection from `source` to a server on `port`. When all places are taken, the port with
    /// the most connections gives one up: the oldest connection of the source that has the most there. A request takes
    /// milliseconds, so that connection has sent none, or does not read the answer.
    pub(crate) fn enter(&self, port: u16, source: IpAddr) -> Seat {
        let mut guests = self.guests();
        if guests.here.len() >= guests.places
            && let Some(id) = guests.most_dispensable()
        {
            guests.remove(id);
        }
        let (stay, gone) = oneshot::channel();
        let id = guests.add(Guest { port, source: network(source), _stay: stay });
        drop(guests);
        Seat { room: self.clone(), id, gone }
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        // Every method leaves the guests consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guests {
    fn add(&mut self, guest: Guest) -> GuestId {
        let id = self.next;
        self.next.0 += 1;
        let port = self.ports.entry(guest.port).or_default();
        port.guests += 1;
        port.sources.entry(guest.source).or_default().insert(id);
        self.here.insert(id, guest);
        id
    }

    fn remove(&mut self, id: GuestId) {
        let Some(guest) = self.here.remove(&id) else { return };
        let Some(port) = self.ports.get_mut(&guest.port) else { return };
        port.guests -= 1;
        if let Some(source) = port.sources.get_mut(&guest.source) {
            source.remove(&id);
            if source.is_empty() {
                port.sources.remove(&guest.source);
            }
        }
        if port.guests == 0 {
            self.ports.remove(&guest.port);
        }
    }

    fn most_dispensable(&self) -> Option<GuestId> {
        let port = self.ports.values().max_by_key(|port| port.guests)?;
        // Of two sources with equally many connections, the one with the oldest connection.
        let most = port.sources.values().max_by_key(|guests| (guests.len(), Reverse(guests.first())))?;
        most.first().copied()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.room.guests().remove(self.id);
    }
}

/// Returns the network that counts as one source: the holder of an IPv6 address has all of its /64.
fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(ip) => ip.into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_left(seat: &mut Seat) -> bool {
        !matches!(seat.gone.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }

    fn enter(room: &Room, port: u16, source: &str) -> Seat {
        room.enter(port, source.parse().unwrap())
    }

    #[test]
    fn who_comes_gets_a_place_of_whoever_has_most() {
        let room = Room::new(4);
        let mut many: Vec<Seat> = (0..3).map(|_| enter(&room, 1, "192.0.2.1")).collect();
        let mut one = enter(&room, 1, "192.0.2.2");
        let mut newcomer = enter(&room, 1, "192.0.2.3");
        assert_eq!(many.iter_mut().map(has_left).collect::<Vec<_>>(), [true, false, false]);
        assert!(!has_left(&mut one) && !has_left(&mut newcomer));
        // Of sources with equally many connections, the one with the oldest connection.
        drop(many.pop());
        let mut next = enter(&room, 1, "192.0.2.4");
        assert!(![&mut one, &mut newcomer, &mut next].map(has_left).contains(&true));
        let _last = enter(&room, 1, "192.0.2.5");
        assert_eq!(many.iter_mut().map(has_left).collect::<Vec<_>>(), [true, true]);
        assert!(![&mut one, &mut newcomer, &mut next].map(has_left).contains(&true));
    }

    #[test]
    fn a_port_takes_nothing_from_another_one() {
        let room = Room::new(4);
        let mut quiet = enter(&room, 2, "192.0.2.1");
        // Each connection comes from another source.
        let mut crowd: Vec<Seat> =
            (2..20).map(|source| enter(&room, 1, &format!("192.0.2.{source}"))).collect();
        assert!(!has_left(&mut quiet));
        assert_eq!(crowd.iter_mut().map(has_left).filter(|left| !left).count(), 3);
        let mut other = enter(&room, 2, "192.0.2.200");
        assert!(!has_left(&mut other) && !has_left(&mut quiet));
    }

    #[test]
    fn an_ipv6_network_is_one_source() {
        let room = Room::new(3);
        let mut own = enter(&room, 1, "2001:db8:1::1");
        let mut crowd = ["2001:db8:2::1", "2001:db8:2::ffff:2"].map(|source| enter(&room, 1, source));
        let _next = enter(&room, 1, "2001:db8:2::3");
        assert_eq!(crowd.each_mut().map(has_left), [true, false]);
        assert!(!has_left(&mut own));
        assert_eq!(network("::ffff:192.0.2.1".parse().unwrap()), IpAddr::from([192, 0, 2, 1]));
    }

    #[test]
    fn a_place_is_free_when_it_is_dropped() {
        let room = Room::new(1);
        drop(enter(&room, 1, "192.0.2.1"));
        let mut seat = enter(&room, 1, "192.0.2.1");
        assert!(!has_left(&mut seat));
        let mut next = enter(&room, 1, "192.0.2.1");
        // The seat has lost its place already, and its drop frees no other place.
        assert!(has_left(&mut seat));
        drop(seat);
        assert!(!has_left(&mut next));
    }
}
