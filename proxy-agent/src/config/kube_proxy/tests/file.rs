//! Effective configuration of a file.

use serde_json::{Value, json};

use super::*;
use crate::config::kube_proxy::fields::{FIELDS, values};

/// Fields that kubeadm writes into its ConfigMap: every field, most of them zero.
const KUBEADM: &str = "\
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: '', burst: 0, contentType: '', kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null,
  udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: '', interfaceNamePrefix: ''}
detectLocalMode: ''
enableProfiling: false
healthzBindAddress: ''
hostnameOverride: ''
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: '', strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s,
  tcpTimeout: 0s, udpTimeout: 0s}
logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}, text: {infoBufferSize: '0'}}, verbosity: 0}
metricsBindAddress: ''
mode: ''
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ''
showHiddenMetricsForVersion: ''
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: '', rootHnsEndpointName: '', sourceVip: ''}
";

#[test]
fn p235_an_empty_file_has_kube_proxys_defaults() {
    let effective = effective("");
    assert_eq!(validate(&effective), []);
    let values: std::collections::BTreeMap<_, _> =
        values(&effective).into_iter().map(|(field, value)| (field.path, value)).collect();
    for (path, want) in [
        ("healthzBindAddress", json!("0.0.0.0:10256")),
        ("metricsBindAddress", json!("127.0.0.1:10249")),
        ("iptables.masqueradeBit", json!(14)),
        ("nftables.masqueradeBit", json!(14)),
        ("iptables.syncPeriod", json!("30s")),
        ("nftables.syncPeriod", json!("30s")),
        ("ipvs.syncPeriod", json!("30s")),
        ("iptables.minSyncPeriod", json!("1s")),
        ("nftables.minSyncPeriod", json!("1s")),
        ("ipvs.minSyncPeriod", json!("0s")),
        ("configSyncPeriod", json!("15m0s")),
        ("clientConnection.qps", json!(5.0)),
        ("clientConnection.burst", json!(10)),
        ("oomScoreAdj", json!(-999)),
        ("conntrack.maxPerCore", json!(32768)),
        ("conntrack.min", json!(131_072)),
        ("conntrack.tcpEstablishedTimeout", json!("24h0m0s")),
        ("conntrack.tcpCloseWaitTimeout", json!("1h0m0s")),
        ("iptables.localhostNodePorts", json!(true)),
        ("detectLocalMode", json!("ClusterCIDR")),
        ("nodePortAddresses", Value::Null),
    ] {
        assert_eq!(values[path], want, "{path}");
    }
}

#[test]
fn p236_an_ipv6_bind_address_makes_the_servers_ipv6() {
    for (bind, healthz, metrics) in [
        ("'::'", "[::]:10256", "[::1]:10249"),
        ("2001:db8::1", "[::]:10256", "[::1]:10249"),
        ("192.0.2.10", "0.0.0.0:10256", "127.0.0.1:10249"),
    ] {
        let effective = effective(&format!("bindAddress: {bind}\n"));
        assert_eq!(effective.healthz_bind_address.as_deref(), Some(healthz), "{bind}");
        assert_eq!(effective.metrics_bind_address.as_deref(), Some(metrics), "{bind}");
    }
    let given =
        effective("bindAddress: '::'\nhealthzBindAddress: 192.0.2.10\nmetricsBindAddress: '[::]:1'\n");
    assert_eq!(given.healthz_bind_address.as_deref(), Some("192.0.2.10:10256"));
    assert_eq!(given.metrics_bind_address.as_deref(), Some("[::]:1"));
}

#[test]
fn kubeadms_file_is_the_defaults() {
    let kubeadm = effective(KUBEADM);
    assert_eq!(validate(&kubeadm), []);
    assert_eq!(fields::without_effect(&kubeadm), [""; 0]);
    let mut want = effective("clusterCIDR: 10.244.0.0/16\n");
    want.client_connection.kubeconfig = Some("/var/lib/kube-proxy/kubeconfig.conf".to_owned());
    want.logging = kubeadm.logging.clone();
    assert_eq!(kubeadm, want);
}

#[test]
fn every_field_is_listed_once() {
    let whole = serde_json::to_value(KubeProxyConfiguration::default().with_defaults()).unwrap();
    let mut paths = Vec::new();
    fn leaves(value: &Value, path: String, paths: &mut Vec<String>) {
        match value.as_object() {
            Some(fields) if !fields.is_empty() => {
                for (name, value) in fields {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    leaves(value, path, paths);
                }
            }
            _ => paths.push(path),
        }
    }
    leaves(&whole, String::new(), &mut paths);
    let mut listed: Vec<&str> = FIELDS.iter().map(|field| field.path).collect();
    listed.sort_unstable();
    paths.sort_unstable();
    assert_eq!(listed, paths);
}

#[test]
fn unknown_and_repeated_fields_are_named_and_ignored() {
    let (configuration, ignored) =
        file_with("iptables: {masqueradeBits: 3}\nnodeportAddresses: [primary]\nmode: nftables\n")
            .decode()
            .unwrap();
    assert_eq!(configuration.mode.as_deref(), Some("nftables"));
    assert_eq!(
        ignored,
        ["there is no field `iptables.masqueradeBits`", "there is no field `nodeportAddresses`"]
    );

    let (configuration, ignored) =
        file_with("mode: nftables\nclusterCIDR: 10.0.0.0/8\nmode: ipvs\nextra: {}\n").decode().unwrap();
    assert_eq!(configuration.mode.as_deref(), Some("ipvs"));
    assert_eq!(
        ignored,
        ["`mode` is given again in line 5: the last one counts", "there is no field `extra`"]
    );
}

#[test]
fn what_cannot_be_read_is_named() {
    for (fields, words) in [
        ("oomScoreAdj: high\n", &["config.conf", "oomScoreAdj", "high"][..]),
        ("iptables: {syncPeriod: 1d}\n", &["iptables.syncPeriod", "`1d`", "30s"]),
        ("iptables: {syncPeriod: 30}\n", &["iptables.syncPeriod", "30"]),
        ("conntrack: 5\n", &["conntrack", "5"]),
        ("nodePortAddresses: primary\n", &["nodePortAddresses", "primary"]),
        ("mode: [\n", &["config.conf", "line"]),
        ("kind: KubeletConfiguration\n", &["`kind`", "`KubeletConfiguration`", "`KubeProxyConfiguration`"]),
    ] {
        let error = file_with(fields).decode().unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{fields}: {error}");
    }
    let json = r#"{"kind": "KubeProxyConfiguration", "apiVersion": "kubeproxy.config.k8s.io/v1alpha2"}"#;
    let file = ConfigFile { path: PathBuf::from("f"), content: json.into() };
    let error = file.decode().unwrap_err().to_string();
    assert!(error.contains("`kubeproxy.config.k8s.io/v1alpha2`"), "{error}");
    for nothing in ["", "- a\n", "\u{0}"] {
        let file = ConfigFile { path: PathBuf::from("f"), content: nothing.into() };
        assert!(file.decode().is_err(), "{nothing:?}");
    }
    let missing = ConfigFile::read(std::path::Path::new("/nowhere/config.conf")).unwrap_err().to_string();
    assert!(missing.contains("/nowhere/config.conf") && missing.contains("No such file"), "{missing}");
}

#[test]
fn what_is_written_is_read_back() {
    let given = effective(
        "mode: ipvs\nbindAddress: '::'\nfeatureGates: {A: true}\nnodePortAddresses: [192.0.2.0/24, '::/0']\nhostnameOverride: \
         'yes'\nipvs: {tcpTimeout: 1.5s}\n",
    );
    let file = ConfigFile { path: PathBuf::from("f"), content: given.to_yaml().unwrap().into_bytes() };
    let (read, ignored) = file.decode().unwrap();
    assert_eq!(ignored, [""; 0]);
    assert_eq!(read.with_defaults(), given);
}

#[test]
fn as_kube_proxy_takes_it() {
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    for (text, bit) in [
        (format!("{head}iptables: {{masqueradeBit: 13.0}}\n"), 13),
        (
            format!(
                "---\n{head}iptables: {{masqueradeBit: 12}}\n---\n{head}iptables: {{masqueradeBit: 11}}\n"
            ),
            12,
        ),
        (format!("{head}iptables: {{masqueradeBit: 12}}\n---\nkind: KubeletConfiguration\n"), 12),
    ] {
        let (read, ignored) =
            ConfigFile { path: PathBuf::from("f"), content: text.clone().into() }.decode().unwrap();
        assert_eq!((read.iptables.masquerade_bit, ignored.len()), (Some(bit), 0), "{text}");
    }
    let half = file_with("iptables: {masqueradeBit: 13.5}\n").decode().unwrap_err().to_string();
    assert!(half.contains("iptables.masqueradeBit"), "{half}");
}

#[test]
fn aliases_of_aliases_are_refused() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..5 {
        let before = vec![format!("*a{}", level - 1); 9].join(", ");
        text += &format!("a{level}: &a{level} [{before}]\n");
    }
    let error = file_with(&text).decode().unwrap_err().to_string();
    assert!(error.contains("config.conf") && error.contains("alias"), "{error}");
    let (_, ignored) = file_with("a: &a [x, x]\nb: [*a, *a]\n").decode().unwrap();
    assert_eq!(ignored, ["there is no field `a`", "there is no field `b`"]);
}
