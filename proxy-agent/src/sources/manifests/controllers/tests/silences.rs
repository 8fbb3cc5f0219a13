//! Tests of the problems of slices that do not fit their Service.

use super::super::silences::of_slices;
use super::*;

fn slice(name: &str, family: &str, ports: &Value, addresses: &[&str]) -> Value {
    let endpoints: Vec<_> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": family, "ports": ports, "endpoints": endpoints,
        "metadata": {"name": name, "namespace": "a", "labels": {"kubernetes.io/service-name": "s"}},
    })
}

#[test]
fn slices_that_do_not_fit_their_service() {
    let web = json!([{"name": "web", "port": 8080}]);
    let both = json!([{"name": "web", "port": 8080}, {"name": "adm", "port": 8081}]);
    let unnamed = json!([{"name": "", "port": 8080}]);
    let udp = json!([{"name": "web", "port": 8080, "protocol": "UDP"}]);
    let v4 = &["10.64.1.11"][..];
    for (id, ports, slices, want) in [
        ("all fits", &both, vec![slice("1", "IPv4", &both, v4)], vec![]),
        (
            "together they do",
            &both,
            vec![slice("1", "IPv4", &web, v4), slice("2", "IPv4", &both, v4)],
            vec![],
        ),
        ("one port more", &web, vec![slice("1", "IPv4", &both, v4)], vec![extra(1, "\"adm\" (TCP)")]),
        ("one port less", &both, vec![slice("1", "IPv4", &web, v4)], vec![lacks("\"adm\" (TCP)")]),
        (
            "a name is missing",
            &web,
            vec![slice("1", "IPv4", &unnamed, v4)],
            vec![lacks("\"web\" (TCP)"), extra(1, "the one without a name (TCP)")],
        ),
        (
            "another protocol",
            &web,
            vec![slice("1", "IPv4", &udp, v4), slice("2", "IPv4", &web, v4)],
            vec![extra(1, "\"web\" (UDP)")],
        ),
        ("a slice without endpoints", &web, vec![slice("1", "IPv4", &json!([]), &[])], vec![]),
        (
            "the other family",
            &web,
            vec![slice("1", "IPv4", &web, v4), slice("2", "IPv6", &web, &["fd00::11"])],
            vec![(
                2,
                "it has IPv6 endpoints, but Service a/s has no clusterIP of that family: they are not served"
                    .to_owned(),
            )],
        ),
    ] {
        let spec_ports: Vec<_> = ports
            .as_array()
            .unwrap()
            .iter()
            .map(|port| json!({"name": port["name"], "port": port["port"]}))
            .collect();
        let service = object(service("s", &json!({"clusterIP": "10.96.0.10", "ports": spec_ports}))).0;
        let slices: Vec<_> = slices.into_iter().map(|value| object(value).0).collect();
        let places = ["0", "1", "2"];
        let written: Vec<_> = slices
            .iter()
            .zip(&places[1..])
            .map(|(object, place)| (*place, object.slices().next().unwrap()))
            .collect();
        let got = of_slices(service.service().unwrap(), places[0], &written);
        let want: Vec<_> = want
            .into_iter()
            .map(|(place, reason): (usize, String)| Problem { object: places[place].to_owned(), reason })
            .collect();
        assert_eq!(got, want, "{id}");
    }
}

fn extra(place: usize, what: &str) -> (usize, String) {
    (place, format!("ports: {what} is no port of Service a/s by name and protocol: it is not served"))
}

fn lacks(what: &str) -> (usize, String) {
    (0, format!("spec.ports: {what} is in none of its slices by name and protocol: it has no endpoints"))
}
