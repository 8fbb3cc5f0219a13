//! Effective configuration of the flags.

use clap::CommandFactory as _;
use serde_json::{Value, json};

use super::*;
use crate::config::kube_proxy::fields::{FIELDS, values};

/// Flags that set no field of the file: about the invocation itself, or older names for a part of a field.
const WITHOUT_FIELD: [&str; 13] = [
    "config",
    "write-config-to",
    "cleanup",
    "init-only",
    "master",
    "healthz-port",
    "metrics-port",
    "log-text-split-stream",
    "log-text-info-buffer-size",
    "log-json-split-stream",
    "log-json-info-buffer-size",
    "boot-id-file",
    "machine-id-file",
];
/// Flags that kube-proxy does not have.
const OWN: [&str; 16] = [
    "manifests",
    "devices",
    "pod-interfaces",
    "flow-table-size",
    "socket-opt-out",
    "no-tcx",
    "max-namespace-endpoints",
    "max-namespace-frontends",
    "max-namespace-source-ranges",
    "max-service-endpoints",
    "max-service-frontends",
    "max-service-source-ranges",
    "protect-node-addresses",
    "cgroup-path",
    "pin-dir",
    "run-dir",
];

fn given(args: &[&str]) -> KubeProxyConfiguration {
    run_args(args).kube_proxy.to_configuration()
}

#[test]
fn every_flag_of_kube_proxy_sets_its_fields() {
    let nothing = values(&KubeProxyConfiguration::default());
    assert_eq!(values(&given(&["run"])), nothing);
    let defaults = values(&KubeProxyConfiguration::default().with_defaults());
    for field in FIELDS.iter().filter(|field| !field.flag.is_empty()) {
        let (_, default) = defaults.iter().find(|(known, _)| known.path == field.path).unwrap();
        let (text, want) = match (field.flag, default) {
            ("feature-gates", _) => ("A=true,B=0".to_owned(), json!({"A": true, "B": false})),
            ("nodeport-addresses" | "ipvs-exclude-cidrs", _) => ("a,b".to_owned(), json!(["a", "b"])),
            (_, Value::Bool(default)) => ((!default).to_string(), json!(!default)),
            (_, Value::Number(_)) => ("7".to_owned(), json!(7)),
            (_, Value::String(text)) if text.parse::<GoDuration>().is_ok() => {
                ("1m".to_owned(), json!("1m0s"))
            }
            (_, _) => ("some,text".to_owned(), json!("some,text")),
        };
        let argument = format!("--{}={text}", field.flag);
        for (got, value) in values(&given(&["run", &argument])) {
            let same = value == want || value.as_f64().is_some_and(|number| Some(number) == want.as_f64());
            assert_eq!(value.is_null(), got.flag != field.flag, "{argument}: {} is {value}", got.path);
            assert!(value.is_null() || same, "{argument}: {} is {value}", got.path);
        }
    }
}

#[test]
fn the_flags_are_those_of_kube_proxy_and_ours() {
    let cli = Cli::command();
    let run = cli.find_subcommand("run").unwrap();
    let mut flags: Vec<&str> =
        run.get_arguments().filter_map(clap::Arg::get_long).filter(|flag| !["help"].contains(flag)).collect();
    let mut known: Vec<&str> =
        FIELDS.iter().map(|field| field.flag).filter(|flag| !flag.is_empty()).collect();
    known.extend(WITHOUT_FIELD);
    known.extend(OWN);
    for names in [&mut flags, &mut known] {
        names.sort_unstable();
        names.dedup();
    }
    assert_eq!(flags, known);
    cli.debug_assert();
}

#[test]
fn truth_values_and_repeated_flags() {
    for (args, want) in [
        (&["run"][..], None),
        (&["run", "--masquerade-all"], Some(true)),
        (&["run", "--masquerade-all=true"], Some(true)),
        (&["run", "--masquerade-all=F"], Some(false)),
        (&["run", "--masquerade-all", "--masquerade-all=false"], Some(false)),
        (&["run", "--masquerade-all", "-v", "--profiling"], Some(true)),
    ] {
        assert_eq!(given(args).iptables.masquerade_all, want, "{args:?}");
    }
    let lists = given(&[
        "run",
        "--nodeport-addresses=a",
        "--nodeport-addresses",
        "b,c",
        "--cluster-cidr=x",
        "--cluster-cidr=y",
    ]);
    assert_eq!(lists.node_port_addresses.unwrap(), ["a", "b", "c"]);
    assert_eq!(lists.cluster_cidr.unwrap(), "y");
    assert_eq!(given(&["run", "--nodeport-addresses="]).node_port_addresses, None);
    assert_eq!(given(&["run", "--oom-score-adj", "-5"]).oom_score_adj, Some(-5));
    for (args, want) in [(["run", "-v"], 4), (["run", "-v6"], 6), (["run", "--v=2"], 2)] {
        assert_eq!(given(&args).logging.verbosity, Some(want));
    }
    for wrong in [
        &["run", "--masquerade-all=maybe"][..],
        &["run", "--masquerade-all", "false"],
        &["run", "--iptables-sync-period=1d"],
        &["run", "--iptables-sync-period=30"],
        &["run", "--feature-gates=A"],
        &["run", "--feature-gates=A=maybe"],
        &["run", "--healthz-port=65536"],
        &["run", "--kubeconfig=a", "--manifests=b"],
        &["run", "--nonsense"],
        &["run", "argument"],
        &["--proxy-mode=nftables", "argument"],
        &["-v", "4", "status"],
    ] {
        assert!(command(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn without_a_command_flags_are_those_of_run() {
    let args = run_args(&["--config=/var/lib/kube-proxy/config.conf", "--hostname-override=n1"]);
    assert_eq!(args.kube_proxy.config(), Some(std::path::Path::new("/var/lib/kube-proxy/config.conf")));
    assert_eq!(args.kube_proxy.hostname_override.as_deref(), Some("n1"));
    assert_eq!(run_args(&["--cleanup", "--pin-dir=/x"]).kube_proxy.cleanup, Some(true));
    assert_eq!(run_args(&["-v"]).kube_proxy.verbosity, Some(4));
    assert!(run_args(&["--config="]).kube_proxy.config().is_none());
    assert!(matches!(command(&["status"]), Ok(Command::Status(_))));
    assert!(matches!(command(&["completion", "bash"]), Ok(Command::Completion { .. })));
    for (about, kind) in [
        (&["--help"][..], clap::error::ErrorKind::DisplayHelp),
        (&["--version"], clap::error::ErrorKind::DisplayVersion),
        (&["--proxy-mode=ipvs", "--help"], clap::error::ErrorKind::DisplayHelp),
        (&[], clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
    ] {
        assert_eq!(command(about).unwrap_err().kind(), kind, "{about:?}");
    }
}

#[test]
fn p236_addresses_of_servers_by_flag() {
    for (args, healthz, metrics) in [
        (&["run"][..], "0.0.0.0:10256", "127.0.0.1:10249"),
        (&["run", "--bind-address=::"], "[::]:10256", "[::1]:10249"),
        (&["run", "--healthz-bind-address=192.0.2.10"], "192.0.2.10:10256", "127.0.0.1:10249"),
        (&["run", "--healthz-bind-address=", "--metrics-bind-address="], "", ""),
        (&["run", "--healthz-port=0", "--metrics-port=0"], "", ""),
        (&["run", "--healthz-port=0", "--healthz-bind-address=192.0.2.10:1"], "", "127.0.0.1:10249"),
        (&["run", "--healthz-port=1", "--metrics-port=2"], "0.0.0.0:1", "127.0.0.1:2"),
        (&["run", "--healthz-port=1", "--bind-address=fd00::1"], "[::]:1", "[::1]:10249"),
        (&["run", "--healthz-port=1", "--healthz-bind-address=::1"], "[::1]:1", "127.0.0.1:10249"),
        (&["run", "--metrics-port=1", "--metrics-bind-address=0.0.0.0:2"], "0.0.0.0:10256", "0.0.0.0:2"),
    ] {
        let effective = given(args).with_defaults();
        assert_eq!(effective.healthz_bind_address.as_deref(), Some(healthz), "{args:?}");
        assert_eq!(effective.metrics_bind_address.as_deref(), Some(metrics), "{args:?}");
    }
}

#[test]
fn zero_by_flag_is_zero() {
    let effective = given(&["run", "--iptables-min-sync-period=0", "--kube-api-qps=0"]).with_defaults();
    assert_eq!(effective.sync_periods().min, GoDuration::ZERO);
    assert_eq!(effective.client_connection.qps, Some(0.0));
    assert_eq!(fields::without_effect(&effective), [""; 0]);
}

#[test]
fn flags_in_other_spellings() {
    let got =
        given(&["run", "--proxy_mode=ipvs", "--hostname_override", "node_1", "--feature-gates=A_B=true"]);
    assert_eq!(got.mode.as_deref(), Some("ipvs"));
    assert_eq!(got.hostname_override.as_deref(), Some("node_1"), "a value stays as it is");
    assert_eq!(got.feature_gates.unwrap().keys().collect::<Vec<_>>(), ["A_B"]);
    for version in ["--version", "--version=raw", "--version=true"] {
        let error = Cli::from_command_line(["proxy-agent", version].map(Into::into)).unwrap_err();
        assert_eq!(error.kind(), clap::error::ErrorKind::DisplayVersion, "{version}");
    }
}

#[test]
fn what_has_no_effect_is_named_once() {
    let effective = given(&[
        "run",
        "--proxy-mode=ipvs",
        "--ipvs-scheduler=rr",
        "--masquerade-all",
        "--conntrack-min=7",
        "--cluster-cidr=10.0.0.0/8",
        "--kube-api-burst=10",
    ]);
    assert_eq!(
        fields::without_effect(&effective.with_defaults()),
        [
            "mode=ipvs",
            "iptables.masqueradeAll=true",
            "nftables.masqueradeAll=true",
            "ipvs.scheduler=rr",
            "conntrack.min=7"
        ]
    );
}
