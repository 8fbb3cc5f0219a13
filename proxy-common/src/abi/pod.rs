//! Marks the ABI types as plain old data for aya's userspace maps. The crate's only `unsafe`.

#![allow(unsafe_code, reason = "aya::Pod is an unsafe marker; bytemuck has checked the same property")]

use super::{
    AffinityKey, AffinityValue, Backend, CgroupId, Device, Flow, FlowKey, FlowRef, FragmentKey,
    FragmentPorts, FrontendKey, FrontendValue, IfIndex, NetnsCookie, Node, Order, PrefixKey, Service,
    ServiceCounters, ServiceId, ServiceName, SocketRecord, SourceRangeKey, StreamRecord, Trace, UdpFlow,
    UdpFlowKey,
};
use crate::addr::Addr;

macro_rules! pod {
    ($($t:ty),* $(,)?) => {$(
        // SAFETY: the bound of `checked` shows that bytemuck's derive proved: no padding, any bits valid.
        unsafe impl aya::Pod for $t {}
        const _: () = { const fn checked<T: bytemuck::Pod>() {} checked::<$t>() };
    )*};
}

pod!(
    Addr,
    AffinityKey,
    AffinityValue,
    Backend,
    CgroupId,
    Device,
    Flow,
    FlowKey,
    FlowRef,
    FragmentKey,
    FragmentPorts,
    FrontendKey,
    FrontendValue,
    IfIndex,
    NetnsCookie,
    Node,
    Order,
    PrefixKey,
    Service,
    ServiceCounters,
    ServiceId,
    ServiceName,
    SourceRangeKey,
    SocketRecord,
    StreamRecord,
    Trace,
    UdpFlow,
    UdpFlowKey,
);
