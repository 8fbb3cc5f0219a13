//! Refused configurations.

use super::*;

/// Returns the errors of a file with these fields.
fn refused(fields: &str) -> Vec<String> {
    validate(&effective(fields)).iter().map(Invalid::to_string).collect()
}

#[test]
fn p238_a_pause_longer_than_the_period() {
    assert_eq!(
        refused("iptables: {minSyncPeriod: 40s, syncPeriod: 30s}\n"),
        [
            "iptables.minSyncPeriod (--iptables-min-sync-period): `40s` must not be more than iptables.syncPeriod, \
             which is 30s"
        ]
    );
    // The section of another mode does not count.
    for mode in ["nftables", "ipvs"] {
        let other = format!("mode: {mode}\niptables: {{minSyncPeriod: 40s, syncPeriod: 30s}}\n");
        assert_eq!(refused(&other), [""; 0]);
        let own = format!("mode: {mode}\n{mode}: {{minSyncPeriod: 40s}}\n");
        assert_eq!(refused(&own).len(), 1, "{own}");
    }
    assert_eq!(refused("iptables: {minSyncPeriod: 30s, syncPeriod: 30s}\n"), [""; 0]);
}

#[test]
fn p239_a_bit_that_a_mark_does_not_have() {
    for (bit, good) in [(0, true), (31, true), (32, false), (-1, false)] {
        for section in ["iptables", "nftables"] {
            let refused = refused(&format!("{section}: {{masqueradeBit: {bit}}}\n"));
            assert_eq!(refused.is_empty(), good, "{refused:?}");
        }
    }
    assert_eq!(
        refused("iptables: {masqueradeBit: 32}\n"),
        ["iptables.masqueradeBit (--iptables-masquerade-bit): `32` must be 0 to 31"]
    );
    assert_eq!(refused("nftables: {masqueradeBit: 32}\n"), ["nftables.masqueradeBit: `32` must be 0 to 31"]);
}

#[test]
fn each_field_has_its_limits() {
    for (fields, field) in [
        ("mode: kernelspace\n", "mode (--proxy-mode): `kernelspace`"),
        ("mode: userspace\n", "mode (--proxy-mode): `userspace`"),
        ("logging: {format: xml}\n", "logging.format (--logging-format): `xml`"),
        (
            "iptables: {syncPeriod: -1s}\n",
            "iptables.syncPeriod (--iptables-sync-period): `-1s` must be more than 0",
        ),
        ("iptables: {minSyncPeriod: -1s}\n", "iptables.minSyncPeriod (--iptables-min-sync-period): `-1s`"),
        ("configSyncPeriod: -15m\n", "configSyncPeriod (--config-sync-period): `-15m0s`"),
        ("oomScoreAdj: 1001\n", "oomScoreAdj (--oom-score-adj): `1001` must be -1000 to 1000"),
        ("oomScoreAdj: -1001\n", "oomScoreAdj (--oom-score-adj): `-1001`"),
        (
            "clientConnection: {qps: 1e39}\n",
            "clientConnection.qps (--kube-api-qps): `inf` must be a number of 32 bits",
        ),
        (
            "clientConnection: {burst: -1}\n",
            "clientConnection.burst (--kube-api-burst): `-1` must be 0 or more",
        ),
        ("conntrack: {maxPerCore: -1}\n", "conntrack.maxPerCore (--conntrack-max-per-core): `-1`"),
        ("conntrack: {min: -1}\n", "conntrack.min (--conntrack-min): `-1`"),
        ("conntrack: {tcpEstablishedTimeout: -1s}\n", "conntrack.tcpEstablishedTimeout"),
        ("conntrack: {tcpCloseWaitTimeout: -1s}\n", "conntrack.tcpCloseWaitTimeout"),
        ("conntrack: {udpTimeout: -1s}\n", "conntrack.udpTimeout"),
        ("conntrack: {udpStreamTimeout: -1s}\n", "conntrack.udpStreamTimeout"),
        ("showHiddenMetricsForVersion: new\n", "showHiddenMetricsForVersion"),
        (
            "mode: ipvs\nipvs: {excludeCIDRs: [10.0.0.0/8, x]}\n",
            "ipvs.excludeCIDRs (--ipvs-exclude-cidrs): `x`",
        ),
        ("mode: ipvs\nipvs: {tcpTimeout: -1s}\n", "ipvs.tcpTimeout"),
        ("mode: ipvs\nipvs: {tcpFinTimeout: -1s}\n", "ipvs.tcpFinTimeout"),
        ("mode: ipvs\nipvs: {udpTimeout: -1s}\n", "ipvs.udpTimeout"),
    ] {
        let refused = refused(fields);
        assert!(matches!(&refused[..], [one] if one.starts_with(field)), "{fields}: {refused:?}");
    }
    for good in [
        "mode: iptables\n",
        "mode: ipvs\nipvs: {scheduler: best, excludeCIDRs: [10.0.0.0/8], minSyncPeriod: 0s}\n",
        "ipvs: {scheduler: best, tcpTimeout: -1s}\n",
        "conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s}\n",
        "oomScoreAdj: -1000\n",
        "clientConnection: {burst: 1, qps: -1}\n",
        "showHiddenMetricsForVersion: '1.35'\n",
    ] {
        assert_eq!(refused(good), [""; 0], "{good}");
    }
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let refused = refused("mode: fast\niptables: {masqueradeBit: 99}\noomScoreAdj: 5000\n");
    assert_eq!(refused.len(), 3, "{refused:?}");
}
