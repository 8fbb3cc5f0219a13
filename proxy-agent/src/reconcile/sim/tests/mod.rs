//! The datapath against the maps: the verdicts for sockets of pods and of the host, connection by connection and
//! datagram by datagram.
//!
//! All tests share one world: Service 1 (TCP and UDP port 80 of 10.96.0.10) with the backends 1 to 3 at 10.64.0.1 to
//! 10.64.0.3, of which 1 is on this node; Service 2 without endpoints; 10.96.0.0/16 is the ServiceCIDR.

use proxy_common::abi::backend::flags::{IN_CLUSTER, IN_LOCAL, SERVING};
use proxy_common::abi::frontend::flags::{DENY_HOST, DENY_POD, NEAR_LOCAL, POD_LOCAL, PROBE};
use proxy_common::abi::local_address::{HOST, NODEPORT};
use proxy_common::abi::node::{HOST_IN_PACKETS, OPTED_OUT, PODS_IN_PACKETS, SANDBOXES_KNOWN};
use proxy_common::abi::opt_out::{EVERYTHING, INSIDE};
use proxy_common::abi::proto::{SCTP, TCP, UDP};
use proxy_common::abi::{
    Affinity, BackendId, BackendState, FlowDirection, NetnsCookie, ServiceId, SlotRange, socket::STREAM_SLOTS,
};
use proxy_common::datapath::socket::Verdict::{self, Drop, Fail, Pass, Reject, Translated};
use proxy_common::datapath::socket::{connect, peername, recvmsg, release, sendmsg};

use super::*;

mod affinity;
mod connecting;
mod datagrams;
mod left;
mod orders;
mod peers;

const HOST_NETNS: NetnsCookie = NetnsCookie(1);
const POD_NETNS: NetnsCookie = NetnsCookie(77);
const SECOND: u64 = 1_000_000_000;

fn vip(number: u8) -> Addr {
    Addr::v4([10, 96, 0, number])
}

fn pod(number: u32) -> Addr {
    Addr::v4([10, 64, 0, number.to_be_bytes()[3]])
}

fn world() -> Simulator {
    let mut sim = Simulator::default();
    sim.host_netns.set(HOST_NETNS);
    for id in 1..=3 {
        let local = if id == 1 { IN_LOCAL } else { 0 };
        set_backend(&mut sim, BackendId(id), IN_CLUSTER | SERVING | local, 5);
    }
    let service = Service {
        cluster: SlotRange { base: 10, len: 3 },
        local: SlotRange { base: 20, len: 1 },
        affinity: Affinity { seconds: 0, epoch: 1 },
    };
    let nobody =
        Service { cluster: SlotRange::REJECT, local: SlotRange::DROP, affinity: Affinity::default() };
    let cidr = Prefix::new(Addr::v4([10, 96, 0, 0]), 16).unwrap();
    let ops = [
        Op::Slots(10, [1, 2, 3].map(BackendId).to_vec()),
        Op::Slots(20, vec![BackendId(1)]),
        Op::Service(ServiceId(1), service),
        Op::Service(ServiceId(2), nobody),
        Op::ServiceCidr(cidr, true),
        Op::LocalAddress(Addr::v4([192, 0, 2, 10]), Some(HOST | NODEPORT)),
        Op::LocalAddress(Addr::v4([198, 51, 100, 10]), Some(HOST)),
    ];
    for op in ops {
        sim.apply(&op).unwrap();
    }
    let address = FrontendKey::address(vip(10));
    sim.apply(&Op::Frontend(address, Some(FrontendValue::new(&address, ServiceId::NONE, 0)))).unwrap();
    for proto in [TCP, UDP] {
        frontend(&mut sim, exact(vip(10), 80, proto), ServiceId(1), 0);
        frontend(&mut sim, exact(vip(20), 80, proto), ServiceId(2), 0);
    }
    sim
}

fn set_backend(sim: &mut Simulator, id: BackendId, flags: u32, generation: u32) {
    let state = BackendState { flags, generation };
    let backend =
        Backend { addr: pod(id.0), port: Be16::new(8080), pad: [0; 2], service: ServiceId(1), state };
    sim.apply(&Op::Backend(id, backend)).unwrap();
}

fn set_service(sim: &mut Simulator, change: impl FnOnce(&mut Service)) {
    let mut service = sim.service(ServiceId(1)).unwrap();
    change(&mut service);
    sim.apply(&Op::Service(ServiceId(1), service)).unwrap();
}

fn exact(addr: Addr, port: u16, proto: u8) -> FrontendKey {
    FrontendKey::exact(addr, Be16::new(port), proto)
}

fn frontend(sim: &mut Simulator, key: FrontendKey, service: ServiceId, flags: u16) {
    sim.apply(&Op::Frontend(key, Some(FrontendValue::new(&key, service, flags)))).unwrap();
}

/// Returns a pod's socket that is about to talk to `addr`.
fn socket(addr: Addr, port: u16, proto: u8) -> SimSocket<'static> {
    SimSocket {
        addr,
        port: Be16::new(port),
        peer: (Addr::ZERO, Be16::new(0)),
        protocol: proto.into(),
        cookie: 500,
        netns: POD_NETNS,
        cgroups: &[],
        record: None,
        order: None,
        storage_fails: false,
    }
}

/// Returns the backend that the socket leads to after a translation.
#[track_caller]
fn backend_of(socket: &SimSocket<'_>) -> BackendId {
    assert_eq!(socket.port, Be16::new(8080));
    let id = BackendId(u32::from(socket.addr.v4_octets()[3]));
    assert_eq!(socket.addr, pod(id.0));
    id
}

/// Returns the record of a socket, from the stream records or from the socket storage.
fn record_of(sim: &Simulator, socket: &SimSocket<'_>) -> Option<SocketRecord> {
    sim.stream(StreamRecord::slot(socket.cookie))?.of(socket.cookie).or(socket.record)
}

/// Returns every counter that is not zero.
fn counts(sim: &Simulator) -> Vec<(Counter, u64)> {
    Counter::ALL.into_iter().map(|counter| (counter, sim.counted(counter))).filter(|(_, n)| *n > 0).collect()
}

/// Checks verdict and counter of connect(). The socket stays unchanged unless the verdict is `Translated`.
#[track_caller]
fn check<'a>(
    sim: &Simulator,
    mut socket: SimSocket<'a>,
    verdict: Verdict,
    counted: Option<Counter>,
) -> SimSocket<'a> {
    let before = (socket.clone(), counts(sim));
    assert_eq!(connect(&mut socket, sim), verdict, "{before:?}");
    let more: Vec<_> = Counter::ALL
        .into_iter()
        .filter(|counter| {
            sim.counted(*counter) != before.1.iter().find(|(c, _)| c == counter).map_or(0, |(_, n)| *n)
        })
        .collect();
    assert_eq!(more, counted.into_iter().collect::<Vec<_>>(), "{before:?}");
    if verdict != Translated {
        assert_eq!(socket, before.0);
    }
    socket
}
