//! Addresses of this host that serve nodePorts: `--nodeport-addresses`, pure.
//!
//! The rules are kube-proxy's (its nftables mode). Each family is judged by itself, which has a surprising
//! consequence: a list without any prefix of a family opens *every* address of that family.
//! [`NodePortAddresses::warnings`] tells the user.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_common::abi::local_address::{HOST, NODEPORT};
use proxy_common::addr::{Addr, Family, Prefix};

use crate::config::kube_proxy::Invalid;
use crate::config::lenient;

/// The only word that may stand in place of prefixes.
const PRIMARY: &str = "primary";

/// `--nodeport-addresses`, parsed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The node's own IP of each family. An unset option means the same.
    #[default]
    Primary,
    /// Addresses inside these prefixes, and every address of a family that has no prefix here.
    Prefixes(Vec<Prefix>),
}

impl NodePortAddresses {
    /// Parses the values of the option. An empty list means `primary`.
    ///
    /// # Errors
    ///
    /// `primary` beside another value, or a value that is not a CIDR.
    pub fn parse<S: AsRef<str>>(values: &[S]) -> Result<Self, Invalid> {
        let values: Vec<&str> = values.iter().map(AsRef::as_ref).collect();
        if values.is_empty() || values == [PRIMARY] {
            return Ok(Self::Primary);
        }
        if values.contains(&PRIMARY) {
            let other = values.iter().find(|value| **value != PRIMARY).unwrap_or(&PRIMARY);
            let reason = format!("cannot be combined with `{other}`; give `{PRIMARY}` alone or only CIDRs");
            return Err(Invalid::new("nodePortAddresses", PRIMARY, reason));
        }
        let must = format!("is not a CIDR (such as 192.0.2.0/24) and not the word `{PRIMARY}`");
        let prefixes = values.iter().map(|value| {
            lenient::prefix(value)
                .map_err(|_what: &str| Invalid::new("nodePortAddresses", value, must.as_str()))
        });
        Ok(Self::Prefixes(prefixes.collect::<Result<_, _>>()?))
    }

    /// Returns whether nodePorts are served on every address of `family` (loopback excepted). `node_ips` are the
    /// node's own IPs, indexed by [`Family::index`].
    pub(crate) fn matches_all(&self, family: Family, node_ips: &[Option<Addr>; 2]) -> bool {
        match self {
            Self::Primary => known(family, node_ips).is_none(),
            Self::Prefixes(prefixes) => {
                let mut of_family = prefixes.iter().filter(|prefix| prefix.family() == family).peekable();
                of_family.peek().is_none() || of_family.any(Prefix::matches_all)
            }
        }
    }

    /// Returns whether nodePorts are served on `addr`, if it is an address of this host.
    pub(crate) fn serves(&self, addr: Addr, node_ips: &[Option<Addr>; 2]) -> bool {
        let family = addr.family();
        !addr.is_loopback()
            && (self.matches_all(family, node_ips)
                || match self {
                    Self::Primary => known(family, node_ips) == Some(addr),
                    Self::Prefixes(prefixes) => prefixes.iter().any(|prefix| prefix.contains(addr)),
                })
    }

    /// Returns the addresses to listen on for a server that must be reachable on every address of `family` that
    /// serves nodePorts. `host` are the addresses of this host. If all addresses serve nodePorts, the result is the
    /// unspecified address. The node's own IP is returned even if this host does not have it: listening there then
    /// fails, and the failure is reported. Link-local addresses are left out, because they mean nothing without an
    /// interface.
    pub(crate) fn listen_on(
        &self,
        family: Family,
        node_ips: &[Option<Addr>; 2],
        host: &BTreeSet<Addr>,
    ) -> Vec<IpAddr> {
        if self.matches_all(family, node_ips) {
            return vec![match family {
                Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
            }];
        }
        match self {
            Self::Primary => known(family, node_ips).into_iter().map(Addr::to_ip).collect(),
            Self::Prefixes(_) => host
                .iter()
                .copied()
                .filter(|&addr| {
                    addr.family() == family && self.serves(addr, node_ips) && !is_link_local(addr)
                })
                .map(Addr::to_ip)
                .collect(),
        }
    }

    /// Returns one sentence for each effect of the setting that its author may not expect. A family in which the host
    /// has no address that others could reach is skipped.
    pub(crate) fn warnings(&self, node_ips: &[Option<Addr>; 2], host: &BTreeSet<Addr>) -> Vec<String> {
        let mut warnings = Vec::new();
        for family in Family::ALL {
            let mut reachable = host.iter().filter(|addr| !addr.is_loopback() && !is_link_local(**addr));
            if !reachable.any(|addr| addr.family() == family) {
                continue;
            }
            let every =
                format!("nodePorts are served on every {family} address of this host except loopback");
            match self {
                Self::Primary if self.matches_all(family, node_ips) => {
                    warnings.push(format!("the node's {family} address is not known: {every}"));
                }
                Self::Prefixes(prefixes) if !prefixes.iter().any(|prefix| prefix.family() == family) => {
                    warnings.push(format!(
                        "--nodeport-addresses has no {family} CIDR: {every}; add a CIDR to narrow it"
                    ));
                }
                Self::Primary | Self::Prefixes(_) => {}
            }
        }
        if let Self::Prefixes(prefixes) = self {
            for prefix in prefixes.iter().filter(|prefix| prefix.addr().is_loopback()) {
                warnings.push(format!(
                    "--nodeport-addresses: `{prefix}` has no effect: nodePorts are never served on loopback"
                ));
            }
        }
        warnings
    }
}

/// Returns the wanted contents of `LOCAL_ADDRESSES`: each address of the host with its bits. `node_ips` are the
/// node's own IPs, indexed by [`Family::index`]; a loopback address among them counts as unknown.
pub fn local_addresses(
    setting: &NodePortAddresses,
    node_ips: &[Option<Addr>; 2],
    host: &BTreeSet<Addr>,
) -> BTreeMap<Addr, u32> {
    host.iter()
        .map(|&addr| (addr, if setting.serves(addr, node_ips) { HOST | NODEPORT } else { HOST }))
        .collect()
}

fn is_link_local(addr: Addr) -> bool {
    match addr.to_ip() {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn known(family: Family, node_ips: &[Option<Addr>; 2]) -> Option<Addr> {
    node_ips.iter().flatten().copied().find(|addr| addr.family() == family && !addr.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETH0: &str = "192.0.2.10";
    const ETH0_V6: &str = "2001:db8:1::10";
    const ETH1: &str = "198.51.100.10";
    const ETH1_V6: &str = "2001:db8:2::10";
    const OF_N1: [&str; 6] = [ETH0, ETH0_V6, ETH1, ETH1_V6, "127.0.0.1", "::1"];

    fn addr(s: &str) -> Addr {
        s.parse::<IpAddr>().unwrap().into()
    }

    fn node_ips(v4: Option<&str>, v6: Option<&str>) -> [Option<Addr>; 2] {
        [v4.map(addr), v6.map(addr)]
    }

    /// Checks the addresses of node n1 that serve nodePorts under `setting`.
    fn check_with(setting: &[&str], node_ips: [Option<Addr>; 2], want: &[&str]) {
        let setting = NodePortAddresses::parse(setting).unwrap();
        let host = OF_N1.iter().copied().map(addr).collect();
        let got = local_addresses(&setting, &node_ips, &host);
        let want: BTreeMap<Addr, u32> = OF_N1
            .iter()
            .map(|name| (addr(name), if want.contains(name) { HOST | NODEPORT } else { HOST }))
            .collect();
        assert_eq!(got, want, "{setting:?} {node_ips:?}");
    }

    fn check(setting: &[&str], want: &[&str]) {
        check_with(setting, node_ips(Some(ETH0), Some(ETH0_V6)), want);
    }

    #[test]
    fn p026_p034_primary_is_the_node_ip_of_each_family() {
        check(&["primary"], &[ETH0, ETH0_V6]);
        check(&[], &[ETH0, ETH0_V6]);
    }

    #[test]
    fn p027_another_address_of_the_host_is_not_primary() {
        let setting = NodePortAddresses::Primary;
        let ips = node_ips(Some(ETH0), Some(ETH0_V6));
        assert!(!setting.serves(addr(ETH1), &ips));
        assert!(!setting.serves(addr(ETH1_V6), &ips));
    }

    #[test]
    fn p028_listed_prefixes() {
        // The list has no IPv6 prefix, so every IPv6 address serves nodePorts (as in p030).
        check(&["192.0.2.0/24", "198.51.100.0/24"], &[ETH0, ETH1, ETH0_V6, ETH1_V6]);
        check(&["198.51.100.0/24", "2001:db8:2::/64"], &[ETH1, ETH1_V6]);
        // Host bits and leading zeros do not matter.
        check(&["198.51.100.077/24", "2001:db8:2::77/64"], &[ETH1, ETH1_V6]);
    }

    #[test]
    fn p029_a_zero_prefix_is_every_address_but_loopback() {
        check(&["0.0.0.0/0", "2001:db8:1::/64"], &[ETH0, ETH1, ETH0_V6]);
        check(&["0.0.0.0/0", "::/0"], &[ETH0, ETH1, ETH0_V6, ETH1_V6]);
        check(&["192.0.2.0/24", "0.0.0.0/0", "::/0"], &[ETH0, ETH1, ETH0_V6, ETH1_V6]);
    }

    #[test]
    fn p030_a_family_without_a_prefix_is_wide_open() {
        check(&["192.0.2.0/24"], &[ETH0, ETH0_V6, ETH1_V6]);
        check(&["2001:db8:1::/64"], &[ETH0, ETH1, ETH0_V6]);
    }

    #[test]
    fn p031_never_on_loopback() {
        check(&["127.0.0.0/8", "::1/128"], &[]);
    }

    #[test]
    fn p033_an_address_of_another_node_is_not_listed() {
        let host = OF_N1.iter().copied().map(addr).collect();
        let all = NodePortAddresses::parse(&["0.0.0.0/0"]).unwrap();
        let got = local_addresses(&all, &node_ips(Some(ETH0), None), &host);
        assert_eq!(got.get(&addr("192.0.2.20")), None);
        // A node IP that this host does not have (yet) does not count, either.
        let got = local_addresses(&NodePortAddresses::Primary, &node_ips(Some("192.0.2.20"), None), &host);
        assert_eq!(got.get(&addr("192.0.2.20")), None);
        assert_eq!(got.get(&addr(ETH0)), Some(&HOST));
    }

    #[test]
    fn an_unknown_or_loopback_node_ip_opens_its_family() {
        check_with(&["primary"], node_ips(Some(ETH0), None), &[ETH0, ETH0_V6, ETH1_V6]);
        check_with(&["primary"], node_ips(Some(ETH0), Some("::1")), &[ETH0, ETH0_V6, ETH1_V6]);
        check_with(&[], node_ips(Some("127.0.0.1"), Some(ETH0_V6)), &[ETH0, ETH1, ETH0_V6]);
        check_with(&[], node_ips(None, None), &[ETH0, ETH1, ETH0_V6, ETH1_V6]);
    }

    #[test]
    fn p190_servers_listen_where_node_ports_are_served() {
        let host: BTreeSet<Addr> = OF_N1.into_iter().chain(["fe80::1"]).map(addr).collect();
        let both = node_ips(Some(ETH0), Some(ETH0_V6));
        for (setting, ips, want) in [
            (&["primary"][..], both, [&[ETH0][..], &[ETH0_V6]]),
            (&[], node_ips(Some("192.0.2.20"), None), [&["192.0.2.20"], &["::"]]),
            (&["0.0.0.0/0", "2001:db8::/32"], both, [&["0.0.0.0"], &[ETH0_V6, ETH1_V6]]),
            (&["198.51.100.0/24", "fe80::/10"], both, [&[ETH1], &[]]),
        ] {
            let setting = NodePortAddresses::parse(setting).unwrap();
            for (family, want) in Family::ALL.into_iter().zip(want) {
                let got: Vec<String> =
                    setting.listen_on(family, &ips, &host).iter().map(IpAddr::to_string).collect();
                assert_eq!(got, want, "{setting:?} {family}");
            }
        }
    }

    #[test]
    fn p237_settings_that_are_refused_name_the_value() {
        for (values, want) in [
            (&["primary", "192.0.2.0/24"][..], "`192.0.2.0/24`"),
            (&["primary", "primary"], "`primary`"),
            (&["192.0.2.0/24", "198.51.100.0"], "`198.51.100.0`"),
            (&["192.0.2.0/33"], "`192.0.2.0/33`"),
            (&["192.0.2.0/+8"], "`192.0.2.0/+8`"),
            (&["Primary"], "`Primary`"),
            (&[""], "``"),
        ] {
            let error = NodePortAddresses::parse(values).unwrap_err().to_string();
            assert!(
                error.starts_with("nodePortAddresses (--nodeport-addresses): ") && error.contains(want),
                "{values:?}: {error}"
            );
        }
    }

    #[test]
    fn surprises_are_told() {
        let both = node_ips(Some(ETH0), Some(ETH0_V6));
        for (values, ips, want) in [
            (&["primary"][..], both, &[][..]),
            (&["192.0.2.0/24", "2001:db8:1::/64"], both, &[]),
            (&["primary"], node_ips(Some(ETH0), None), &["IPv6 address is not known"]),
            (&["192.0.2.0/24"], both, &["no IPv6 CIDR"]),
            (&["127.0.0.0/8", "::/0"], both, &["`127.0.0.0/8` has no effect"]),
        ] {
            let host = OF_N1.into_iter().map(addr).collect();
            let got = NodePortAddresses::parse(values).unwrap().warnings(&ips, &host);
            assert_eq!(got.len(), want.len(), "{values:?}: {got:?}");
            assert!(got.iter().zip(want).all(|(got, want)| got.contains(want)), "{values:?}: {got:?}");
        }
    }

    #[test]
    fn a_family_that_is_not_in_use_is_no_surprise() {
        let host = ["192.0.2.10", "127.0.0.1", "::1", "fe80::1"].into_iter().map(addr).collect();
        let ips = node_ips(Some(ETH0), None);
        assert_eq!(NodePortAddresses::Primary.warnings(&ips, &host), [""; 0]);
        let listed = NodePortAddresses::parse(&["192.0.2.0/24"]).unwrap();
        assert_eq!(listed.warnings(&ips, &host), [""; 0]);
    }
}
