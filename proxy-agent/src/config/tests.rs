use std::ffi::OsString;

use super::*;
use crate::config::args::{Cli, Command};

fn host() -> Host {
    Host { name: "n1".to_owned(), ipv6: true, cgroup: PathBuf::from("/sys/fs/cgroup") }
}

fn run_args(args: &[&str]) -> RunArgs {
    let line = ["proxy-agent", "run"].iter().chain(args).map(OsString::from);
    match Cli::from_command_line(line).map(|cli| cli.command) {
        Ok(Command::Run(args)) => *args,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn resolve_on(host: &Host, args: &[&str]) -> Result<Config, ConfigError> {
    let args = run_args(args);
    let raw = Raw::load(&args).unwrap();
    Config::resolve(&args, raw, host)
}

fn resolve(args: &[&str]) -> Result<Config, ConfigError> {
    resolve_on(&host(), args)
}

/// Returns the error of a command line.
fn wrong(args: &[&str]) -> String {
    resolve(args).unwrap_err().to_string()
}

/// Writes a configuration file with these fields. Returns its directory and the flag that names the file.
fn file(fields: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.conf");
    let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    std::fs::write(&path, format!("{head}{fields}")).unwrap();
    let flag = format!("--config={}", path.display());
    (dir, flag)
}

#[test]
fn p234_the_node_name_is_trimmed_and_lower_cased() {
    assert_eq!(node_name(&["--hostname-override=  Node-A "]).unwrap(), "node-a");
    assert_eq!(node_name(&[]).unwrap(), "n1");
    assert_eq!(node_name(&["--hostname-override="]).unwrap(), "n1");
    assert!(matches!(node_name(&["--hostname-override=  "]), Err(ConfigError::NoName)));
    let nameless = Host { name: String::new(), ..host() };
    assert!(matches!(resolve_on(&nameless, &[]), Err(ConfigError::NoName)));
    let (_dir, config) = file("hostnameOverride: Node-B\n");
    assert_eq!(node_name(&[&config]).unwrap(), "node-b");
    assert_eq!(node_name(&[&config, "--hostname-override=Node-A"]).unwrap(), "node-a");
    assert_eq!(node_name(&[&config, "--hostname-override="]).unwrap(), "node-b");
}

fn node_name(args: &[&str]) -> Result<String, ConfigError> {
    resolve(args).map(|config| config.node_name.to_string())
}

#[test]
fn p235_p236_servers() {
    let (_dir, empty) = file("");
    assert_eq!(servers(&[&empty]), ["0.0.0.0:10256", "127.0.0.1:10249"]);
    assert_eq!(servers(&["--bind-address=::"]), ["[::]:10256", "[::1]:10249"]);
    assert_eq!(servers(&["--healthz-port=0", "--metrics-bind-address="]), ["", ""]);
    let notes = resolve(&["--metrics-port=1"]).unwrap().notes;
    assert_eq!(notes, ["--metrics-port is deprecated; use --metrics-bind-address"]);
    assert_eq!(resolve(&[]).unwrap().on_bind_failure, OnBindFailure::Retry(BIND_RETRY));
    assert_eq!(resolve(&["--bind-address-hard-fail"]).unwrap().on_bind_failure, OnBindFailure::Fail);
    let error = wrong(&["--metrics-bind-address=localhost:1", "--healthz-bind-address=0.0.0.0:0"]);
    assert!(
        error.contains("healthzBindAddress (--healthz-bind-address): `0.0.0.0:0` must be IP:port"),
        "{error}"
    );
    assert!(error.contains("metricsBindAddress (--metrics-bind-address): `localhost:1`"), "{error}");
}

fn servers(args: &[&str]) -> [String; 2] {
    let config = resolve(args).unwrap();
    [config.healthz, config.metrics].map(|address| address.map_or(String::new(), |a| a.to_string()))
}

#[test]
fn p237_p240_what_cannot_be_used_names_field_and_flag() {
    assert_eq!(
        wrong(&["--nodeport-addresses=primary,192.0.2.0/24"]),
        "nodePortAddresses (--nodeport-addresses): `primary` cannot be combined with `192.0.2.0/24`; give `primary` \
         alone or only CIDRs"
    );
    assert_eq!(
        wrong(&["--detect-local-mode=InterfaceNamePrefix"]),
        "detectLocal.interfaceNamePrefix (--pod-interface-name-prefix): `` must be a name with detectLocalMode \
         InterfaceNamePrefix"
    );
    assert_eq!(
        wrong(&["--bind-address=node", "--iptables-masquerade-bit=32"]),
        "iptables.masqueradeBit (--iptables-masquerade-bit): `32` must be 0 to 31; bindAddress (--bind-address): `node` \
         is not an IP address"
    );
    assert_eq!(wrong(&["--master=here"]), "--master `here`: must be a URL such as https://192.0.2.1:6443");
    assert!(wrong(&["--devices=eth0,none"]).starts_with("--devices: "));
}

#[test]
fn p241_cluster_cidrs_are_one_or_a_dual_stack_pair() {
    assert_eq!(cluster_cidr("").unwrap(), [None, None]);
    let pair = cluster_cidr("fd00:64::/48, 10.64.0.0/12").unwrap();
    assert_eq!(pair.map(|cidr| cidr.unwrap().to_string()), ["10.64.0.0/12", "fd00:64::/48"]);
    for text in ["10.64.0.0/12,10.80.0.0/12", "10.64.0.0/33", "pods", "10.0.0.0/8,fd00::/8,fe00::/8"] {
        let error = cluster_cidr(text).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("clusterCIDR (--cluster-cidr): `{text}` must be one CIDR")),
            "{error}"
        );
    }
}

fn cluster_cidr(text: &str) -> Result<[Option<Prefix>; 2], ConfigError> {
    resolve(&[&format!("--cluster-cidr={text}")]).map(|config| config.cluster_cidr)
}

#[test]
fn p022_feature_gates_are_names_with_a_truth_value() {
    assert!(resolve(&[]).unwrap().allow_external_ips);
    assert!(!resolve(&["--feature-gates=AllowServiceExternalIPs=false"]).unwrap().allow_external_ips);
    let gates = "--feature-gates=Other=false,AllowServiceExternalIPs=false,AllowServiceExternalIPs=true";
    let last = resolve(&[gates]).unwrap();
    assert!(last.allow_external_ips);
    assert_eq!(last.notes, ["settings of kube-proxy without effect here: featureGates.Other=false"]);
    let (_dir, config) = file("featureGates: {AllowServiceExternalIPs: false}\n");
    assert!(!resolve(&[&config]).unwrap().allow_external_ips);
}

#[test]
fn what_tenants_may_take() {
    let config = resolve(&[]).unwrap();
    assert_eq!((config.budgets, config.protect_node_addresses), (Budgets::default(), false));
    let flags = ["--max-service-endpoints=8", "--max-namespace-endpoints=80", "--protect-node-addresses"];
    let config = resolve(&flags).unwrap();
    let Budgets { service, namespace } = config.budgets;
    assert_eq!((service.endpoints, namespace.endpoints), (8, 80));
    assert!(config.protect_node_addresses);
    let none = Cli::from_command_line(["proxy-agent", "--max-service-frontends=0"].map(OsString::from));
    assert!(none.is_err());
    // The limit of a namespace is at least the limit of one Service.
    assert_eq!(resolve(&["--max-namespace-frontends=1"]).unwrap().budgets.namespace.frontends, 65_536);
}

#[test]
fn beside_a_file_few_flags_count() {
    let fields = "clusterCIDR: 10.0.0.0/8\nlogging: {verbosity: 2, format: json}\nmode: nftables\ntypo: 1\n";
    let (_dir, config) = file(fields);
    let flags = [
        &*config,
        "--cluster-cidr=10.1.0.0/16",
        "--healthz-port=0",
        "--masquerade-all",
        "-v=6",
        "--devices=eth0",
        "--master=https://192.0.2.1:6443",
        "--kubeconfig=other",
    ];
    let args = run_args(&flags);
    let raw = Raw::load(&args).unwrap();
    assert_eq!(raw.configuration.logging.verbosity, Some(6));
    assert_eq!(raw.configuration.logging.format.as_deref(), Some("json"));
    let config = Config::resolve(&args, raw, &host()).unwrap();
    assert_eq!(config.cluster_cidr[0].unwrap().to_string(), "10.0.0.0/8");
    assert!(config.healthz.is_some());
    assert_ne!(config.devices.settings.devices, Selection::Auto);
    let master = Some(Uri::from_static("https://192.0.2.1:6443"));
    assert_eq!(config.source, Source::Kubernetes { kubeconfig: None, master });
    let path = config.file.unwrap().path;
    assert_eq!(
        config.notes,
        [
            "--healthz-port is deprecated; use --healthz-bind-address".to_owned(),
            format!("--config {}: there is no field `typo`", path.display()),
            "--cluster-cidr, --healthz-bind-address, --kubeconfig, --masquerade-all: ignored because --config is given"
                .to_owned(),
            "settings of kube-proxy without effect here: mode=nftables".to_owned(),
        ]
    );
}

#[test]
fn sources() {
    let (_dir, config) = file("clientConnection: {kubeconfig: /k}\n");
    assert_eq!(source(&[&config]), "Kubernetes API (/k)");
    assert_eq!(source(&[&config, "--manifests=/m"]), "manifests in /m");
    assert_eq!(source(&[]), "Kubernetes API (in cluster)");
    assert_eq!(source(&["--master=http://192.0.2.1:8080"]), "Kubernetes API at http://192.0.2.1:8080/");
    assert_eq!(
        source(&["--master=https://a:6443", "--kubeconfig=/k"]),
        "Kubernetes API at https://a:6443/ (/k)"
    );
}

fn source(args: &[&str]) -> String {
    resolve(args).unwrap().source.to_string()
}

#[test]
fn a_host_without_ipv6() {
    let v4_only = Host { ipv6: false, ..host() };
    assert_eq!(families(&host(), &[]).unwrap(), Family::ALL);
    assert_eq!(families(&v4_only, &[]).unwrap(), [Family::V4]);
    for args in [&["--cluster-cidr=fd00::/8"][..], &["--bind-address=fd00::1"]] {
        assert!(families(&host(), args).is_ok());
        let error = families(&v4_only, args).unwrap_err().to_string();
        assert!(error.contains("is IPv6, which is switched off on this host"), "{error}");
    }
    // A setting is refused only if nothing of it is left.
    for (args, noted) in [
        (&["--cluster-cidr=fd00::/8,10.0.0.0/8"][..], "clusterCIDR (--cluster-cidr): `fd00::/8`"),
        (
            &["--cluster-cidr=fd00::/8", "--detect-local-mode=NodeCIDR"],
            "clusterCIDR (--cluster-cidr): `fd00::/8`",
        ),
        (
            &["--nodeport-addresses=fd00::/8,10.0.0.0/8"],
            "nodePortAddresses (--nodeport-addresses): `fd00::/8`",
        ),
        (&["--metrics-bind-address=[::1]:1"], "metricsBindAddress (--metrics-bind-address): `[::1]:1`"),
    ] {
        let notes = resolve_on(&v4_only, args).unwrap().notes;
        assert!(matches!(&notes[..], [note] if note.starts_with(noted)), "{args:?}: {notes:?}");
        assert_eq!(resolve(args).unwrap().notes, [""; 0]);
    }
}

fn families(host: &Host, args: &[&str]) -> Result<Vec<Family>, ConfigError> {
    resolve_on(host, args).map(|config| config.families)
}

#[test]
fn the_section_of_the_mode_counts() {
    let fields = "iptables: {syncPeriod: 1m, masqueradeAll: true}\nnftables: {syncPeriod: 2m}\nipvs: {syncPeriod: 3m}\n";
    for (mode, minutes) in [("", 1), ("iptables", 1), ("nftables", 2), ("ipvs", 3)] {
        let (_dir, config) = file(&format!("{fields}mode: '{mode}'\n"));
        let config = resolve(&[&config]).unwrap();
        assert_eq!(config.sync_period, Duration::from_secs(60 * minutes), "{mode}");
    }
}
