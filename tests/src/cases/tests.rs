//! Tests of the table itself.

use std::fs;
use std::path::Path;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::*;

#[test]
fn every_row_is_there_once_and_in_order() {
    let ids: Vec<&str> = all().iter().map(|case| case.id).collect();
    let groups: [(u16, u16); 10] = [
        (1, 17),
        (20, 36),
        (40, 63),
        (70, 95),
        (100, 114),
        (120, 130),
        (140, 149),
        (150, 158),
        (160, 169),
        (170, 180),
    ];
    let want: Vec<String> =
        groups.into_iter().flat_map(|(first, last)| first..=last).map(|n| format!("P{n:03}")).collect();
    assert_eq!(ids, want);
}

/// Rows about probes, syncs, metrics and configuration rather than connections: the first and last of each group.
const NO_CONNECTIONS: [(u16, u16); 3] = [(190, 204), (210, 221), (230, 244)];
/// Rows of these groups without a test on values: the loop itself decides them.
const NOT_ON_VALUES: [u16; 2] = [212, 213];
/// Rows of these groups without a test of the running agent: it programs both families together, so that none is stuck
/// alone.
const NOT_RUNNING: [u16; 1] = [203];

#[test]
fn rows_that_are_no_connections_have_tests_of_their_own() {
    assert_eq!(lacking(&["../proxy-agent/src", "tests/api/source", "tests/pure/syncs.rs"]), NOT_ON_VALUES);
    assert_eq!(lacking(&["tests/lab/health", "tests/lab/config"]), NOT_RUNNING);
}

fn lacking(paths: &[&str]) -> Vec<u16> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut tested = BTreeSet::new();
    for path in paths {
        rows_tested(&here.join(path), &mut tested);
    }
    let rows = NO_CONNECTIONS.into_iter().flat_map(|(first, last)| first..=last);
    rows.filter(|row| !tested.contains(row)).collect()
}

/// Adds the rows in the names of functions in `path`: `fn p190_p191_who_has_endpoints_says_so`.
fn rows_tested(path: &Path, tested: &mut BTreeSet<u16>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            rows_tested(&entry.unwrap().path(), tested);
        }
        return;
    }
    for line in
        fs::read_to_string(path).unwrap().lines().map(|line| line.trim_start().trim_start_matches("async "))
    {
        let words = line.strip_prefix("fn ").into_iter().flat_map(|name| name.split('_'));
        tested.extend(words.map_while(|word| word.strip_prefix('p')?.parse::<u16>().ok()));
    }
}

/// A misspelt field would be lost in the conversion to the real types and back.
#[test]
fn objects_have_no_field_that_kubernetes_does_not_know() {
    fn through<T: DeserializeOwned + Serialize>(object: &Value) -> Value {
        let typed: T = serde_json::from_value(object.clone()).unwrap();
        serde_json::to_value(typed).unwrap()
    }
    for case in all() {
        for object in case.steps.iter().flat_map(|step| &step.objects) {
            let back = match object["kind"].as_str().unwrap() {
                "Service" => through::<Service>(object),
                "EndpointSlice" => through::<EndpointSlice>(object),
                "Node" => through::<Node>(object),
                "ServiceCIDR" => through::<ServiceCIDR>(object),
                other => panic!("{}: no runner knows kind {other}", case.id),
            };
            assert_eq!(&back, object, "{}", case.id);
        }
    }
}

#[test]
fn every_expected_endpoint_is_in_a_slice_of_its_step() {
    for case in all() {
        let listening = case.listening();
        for step in &case.steps {
            assert!(!step.checks.is_empty(), "{}", case.id);
            let slices: String =
                step.objects.iter().filter(|o| o["kind"] == "EndpointSlice").map(Value::to_string).collect();
            for check in &step.checks {
                let Check::Connect(Connect {
                    dest,
                    expect: Expect::Spread(targets, _) | Expect::Sticky(targets, _),
                    ..
                }) = check
                else {
                    continue;
                };
                for target in targets {
                    let ip = target.endpoint.ip.to_string();
                    let there = slices.contains(&ip) || case.id == "P015";
                    assert!(
                        there && listening.contains(&(dest.proto, target.port)),
                        "{}: {check:?}",
                        case.id
                    );
                }
            }
        }
    }
}

#[test]
fn checks_are_read_as_documented() {
    let got = checks::parse(
        "P>NP/udp = sticky L1, R1:8443 masq @ 20x15s; H>10.96.0.10/ping = REJECT
         open f X>CIP = L1; say f = DROP
         frontends4 = none; frontends6 = [fd00:96::10]:80, node:31080/udp; set CIP = 2; affinity CIP6 = 7",
    );
    let want = [
        Check::Connect(Connect {
            sender: Sender::P,
            dest: dest(Proto::Udp, "192.0.2.10:31080"),
            expect: Expect::Sticky(targets(&[(0, 8080), (2, 8443)]), Source::Masqueraded),
            pace: Some(Pace { connections: 20, pause: Duration::from_secs(15) }),
        }),
        Check::Connect(Connect {
            sender: Sender::H,
            dest: dest(Proto::Ping, "10.96.0.10:0"),
            expect: Expect::Reject,
            pace: None,
        }),
        Check::Open(
            "f".to_owned(),
            Connect {
                sender: Sender::X,
                dest: dest(Proto::Tcp, "10.96.0.10:80"),
                expect: Expect::Spread(targets(&[(0, 8080)]), Source::Unsaid),
                pace: None,
            },
        ),
        Check::Say("f".to_owned(), Expect::Drop),
        Check::Frontends(Family::V4, BTreeSet::new()),
        Check::Frontends(
            Family::V6,
            [
                Frontend::Address(Proto::Tcp, "[fd00:96::10]:80".parse().unwrap()),
                Frontend::NodePort(Proto::Udp, 31080),
            ]
            .into(),
        ),
        Check::ClusterSet(dest(Proto::Tcp, "10.96.0.10:80"), 2),
        Check::AffinitySeconds(dest(Proto::Tcp, "[fd00:96::10]:80"), 7),
    ];
    assert_eq!(got.unwrap(), want);
    for wrong in [
        "P>CIP",
        "open f = L1",
        "Z>CIP = L1",
        "P>CIP = L9",
        "P>CIP = L1 @ often",
        "P>10.96.0.10 = DROP",
        "set CIP = L1",
    ] {
        assert!(checks::parse(wrong).is_err(), "{wrong}");
    }
}

fn dest(proto: Proto, addr: &str) -> Dest {
    Dest { proto, addr: addr.parse().unwrap() }
}

fn targets(list: &[(usize, u16)]) -> BTreeSet<Target> {
    list.iter().map(|&(which, port)| Target { endpoint: ENDPOINTS[which], port }).collect()
}

#[test]
fn a_faster_case_keeps_its_proportions() {
    let case = all().into_iter().find(|case| case.id == "P163").unwrap().faster(5);
    let service = case.steps[0].objects.iter().find(|object| object["kind"] == "Service").unwrap();
    assert_eq!(service["spec"]["sessionAffinityConfig"], json!({ "clientIP": { "timeoutSeconds": 2 } }));
    let Check::Connect(Connect { pace: Some(pace), .. }) = &case.steps[0].checks[0] else {
        panic!("no pace")
    };
    assert_eq!(pace.pause, Duration::from_millis(1200));
    // The default timeout is tested as such, and is not divided.
    let case = all().into_iter().find(|case| case.id == "P160").unwrap();
    assert_eq!(case.clone().faster(5).steps[0].objects, case.steps[0].objects);
}

#[test]
fn names_of_tests_are_identifiers() {
    let names: BTreeSet<String> = all().iter().map(Case::test_name).collect();
    assert_eq!(names.len(), all().len());
    assert!(names.contains("p080_external_policy_local_far_clients"));
    let identifier =
        |name: &String| name.bytes().all(|b| b == b'_' || b.is_ascii_lowercase() || b.is_ascii_digit());
    assert_eq!(names.iter().find(|name| !identifier(name)), None);
}
