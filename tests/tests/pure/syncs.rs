//! Syncs: the objects that each of them touches.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use proxy_agent::reconcile::cluster::{Change, Cluster, ObjectKey, Scope};
use proxy_agent::reconcile::store::{Contents, Op};
use proxy_agent::sources::convert::Converter;
use proxy_common::abi::{BackendId, ServiceId};
use proxy_common::addr::Addr;
use proxy_tests::cases::{Config, Dest, Proto, Sender};
use serde_json::{Value, json};

use crate::simulated::agent::Agent;
use crate::simulated::clients::{self, Fate, Way};

/// Returns a Service with one port, and its slice.
fn service(name: &str, address: &str, endpoints: &[&str]) -> [Value; 2] {
    let endpoints =
        endpoints.iter().map(|address| json!({"addresses": [address], "conditions": {"ready": true}}));
    let endpoints: Vec<_> = endpoints.collect();
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "a", "name": name},
            "spec": {
                "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
                "ports": [{"name": "web", "port": 80, "protocol": "TCP"}],
            },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "a", "name": name, "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints,
        }),
    ]
}

fn node(labels: &Value) -> Value {
    let addresses = json!([{"type": "InternalIP", "address": "192.0.2.10"}]);
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": labels},
        "status": {"addresses": addresses},
    })
}

/// Returns the id of the Service port behind port 80 of `address`.
fn id(contents: &Contents, address: &str) -> Option<ServiceId> {
    let address: Addr = address.parse::<std::net::IpAddr>().ok()?.into();
    let web = contents.frontends.iter().find(|(key, _)| key.addr == address && key.port.get() == 80);
    web.map(|(_, value)| value.service)
}

/// Returns the Service port whose objects `op` writes, in maps with these contents before it.
fn owner(contents: &Contents, op: &Op) -> Option<ServiceId> {
    let backend = |id: BackendId| contents.backends.get(id.0 as usize).map(|backend| backend.service);
    match op {
        Op::Name(service, _) | Op::Service(service, _) | Op::SourceRange(service, ..) => Some(*service),
        Op::Backend(_, element) => Some(element.service),
        Op::BackendState(id, _) => backend(*id),
        Op::Slots(_, ids) => backend(*ids.first()?),
        Op::Frontend(key, _) => id(contents, &key.addr.to_string()),
        Op::LocalAddress(..)
        | Op::ServiceCidr(..)
        | Op::PodSource(..)
        | Op::OptOut(..)
        | Op::Sandbox(..)
        | Op::NodeFlags(..) => None,
    }
}

/// Checks that `ops` write objects of the Service port `only` and nothing else.
fn concern(ops: &[Op], before: &Contents, after: &Contents, only: ServiceId) {
    let owners: BTreeSet<Option<ServiceId>> = ops.iter().map(|op| owner(before, op)).collect();
    assert_eq!(owners, [Some(only)].into(), "{ops:?}");
    assert_eq!(others(after, only), others(before, only));
}

fn others(contents: &Contents, only: ServiceId) -> String {
    let services = (0..).map(ServiceId).zip(contents.services.clone()).filter(|(id, _)| *id != only);
    let services: Vec<_> = services.collect();
    let slots: Vec<&[BackendId]> = services
        .iter()
        .flat_map(|(_, service)| [service.cluster, service.local])
        .filter_map(|range| contents.slots.get(range.base as usize..(range.base + range.len) as usize))
        .collect();
    format!("{services:?} {slots:?}")
}

fn fate(agent: &Agent, address: &str) -> Result<Fate> {
    let dest = Dest { proto: Proto::Tcp, addr: format!("{address}:80").parse()? };
    let client = clients::of(Sender::P, agent).into_iter().next().context("a client")?;
    client.connect(agent, &dest, Way::Connect)
}

#[test]
fn p220_one_of_many_services() -> Result<()> {
    let mut agent = Agent::new(&Config::default(), true)?;
    let both = ["10.64.1.11", "10.64.2.21"];
    let mut objects = vec![node(&Value::Null)];
    for number in 0..500 {
        objects.extend(service(&format!("s{number}"), &address(number), &both));
    }
    let all = agent.take_in(&objects)?.len();
    assert!(all > 500 * 5, "{all}");

    let before = agent.maps().contents();
    objects.splice(1 + 77 * 2..1 + 78 * 2, service("s77", &address(77), &both[..1]));
    let ops = agent.take_in(&objects)?;
    assert!((1..10).contains(&ops.len()), "{ops:?}");
    let s77 = id(&before, &address(77)).context("s77")?;
    concern(&ops, &before, &agent.maps().contents(), s77);
    for _ in 0..20 {
        assert_eq!(fate(&agent, &address(77))?, Fate::To("10.64.1.11:8080".parse()?));
    }
    Ok(())
}

fn address(number: u32) -> String {
    format!("10.96.{}.{}", 10 + number / 256, number % 256)
}

#[test]
fn p221_leftovers_of_another_run() -> Result<()> {
    let config = Config::default();
    let (s, gone) = ("10.96.0.10", "10.96.0.20");
    let kept: Vec<Value> =
        [node(&Value::Null)].into_iter().chain(service("s", s, &["10.64.1.11", "10.64.2.21"])).collect();
    let mut another = Agent::new(&config, true)?;
    let old = service("gone", gone, &["10.64.1.11"]);
    another.take_in(&[&kept[..], &old].concat())?;
    let found = another.maps().contents();
    let left_over = id(&found, gone).context("what is left over")?;

    let mut agent = Agent::over(&found, &config, true)?;
    assert!(matches!(fate(&agent, gone)?, Fate::To(_)), "until the first full list is there");
    let ops = agent.take_in(&kept)?;
    let after = agent.maps().contents();
    concern(&ops, &found, &after, left_over);
    assert_eq!((id(&after, s), id(&after, gone)), (id(&found, s), None));
    assert!(after.names.iter().all(|(id, _)| *id != left_over), "its name is forgotten");
    assert!(after.backends.iter().all(|b| b.service != left_over || b.state.flags == 0), "its endpoint goes");
    assert!(matches!(fate(&agent, s)?, Fate::To(_)));
    assert_eq!(fate(&agent, gone)?, Fate::Pass, "no ServiceCIDR is known");
    Ok(())
}

#[test]
fn p243_of_the_labels_only_the_zone_counts() -> Result<()> {
    let mut converter = Converter::new("n1");
    let mut cluster = Cluster::default();
    for name in ["s", "t"] {
        let [object, _] = service(name, "10.96.0.10", &[]);
        let converted = converter.service(&serde_json::from_value(object)?);
        cluster.apply(Change::Service(converted.ok().flatten().context("a Service")?));
    }
    let mut take = |labels: Value| -> Result<(Scope, usize)> {
        let converted = converter.node(&serde_json::from_value(node(&labels))?).context("this Node")?;
        let scope = cluster.apply(Change::Node(converted));
        Ok((scope, cluster.take_dirty().len()))
    };
    let zone = "topology.kubernetes.io/zone";
    let (region, host) = ("topology.kubernetes.io/region", "kubernetes.io/hostname");
    for (labels, want) in [
        (json!({zone: "za"}), (Scope::Node, 2)),
        (json!({zone: "za", region: "elsewhere", host: "renamed"}), (Scope::Nothing, 0)),
        (json!({zone: "zb", region: "elsewhere"}), (Scope::Node, 2)),
        (json!({}), (Scope::Node, 2)),
        (json!({zone: ""}), (Scope::Nothing, 0)),
    ] {
        assert_eq!(take(labels.clone())?, want, "{labels}");
    }
    assert!(cluster.service(&ObjectKey::new("a", "s")).is_some());
    Ok(())
}
