//! Numbers that name something, and times: no number of one kind is taken for one of another.
//!
//! Each type lies in maps exactly as its integer does.

use bytemuck::{Pod, Zeroable};

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident($integer:ty);)*) => {$(
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
        pub struct $name(pub $integer);

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

numbers! {
    /// Index of a Service port, in one family, in `SERVICES`.
    ServiceId(u32);
    /// Index of an endpoint of one Service port in `BACKENDS`.
    BackendId(u32);
    /// Index of an element of `SLOTS`.
    Slot(u32);
    /// Index of an element of `STREAMS`.
    StreamSlot(u32);
    /// Cookie of a network namespace (`bpf_get_netns_cookie`).
    NetnsCookie(u64);
    /// Id of a cgroup: its inode number.
    CgroupId(u64);
    /// Time of the monotonic clock, in nanoseconds. The clock begins when the machine boots.
    Nanos(u64);
    /// Index of a network device in its network namespace.
    IfIndex(u32);
}

impl ServiceId {
    /// No Service port.
    pub const NONE: Self = Self(0);
}

impl BackendId {
    /// No backend.
    pub const NONE: Self = Self(0);
}

impl NetnsCookie {
    /// No network namespace, or one that is not known.
    pub const NONE: Self = Self(0);
}

impl CgroupId {
    /// No cgroup.
    pub const NONE: Self = Self(0);
}

impl IfIndex {
    /// No device.
    pub const NONE: Self = Self(0);
}
