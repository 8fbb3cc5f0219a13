//! P040-P063: parsing of EndpointSlices.

use serde_json::{Value, json};

use super::Case;
use super::objects::{Object, case, s, slice, web};

/// Returns the cases of this group.
pub(super) fn cases() -> Vec<Case> {
    let fqdn = web("").edit(|slice| {
        slice["metadata"]["name"] = "names".into();
        slice["addressType"] = "FQDN".into();
        slice["endpoints"] = json!([{ "addresses": ["db.example"] }]);
    });
    vec![
        case("P040", "conditions that are not set count as ready")
            .step([s(), without("/endpoints/0", "conditions")], "P>CIP = L1")
            .done(),
        case("P041", "an endpoint that is not ready").step([s(), web("L1/nr, R1")], "P>CIP = R1").done(),
        case("P042", "two slices are one set")
            .step([s(), web("L1, R1"), s2("R2")], "P>CIP = L1, R1, R2; set CIP = 3")
            .done(),
        case("P043", "an endpoint in two slices has no double weight")
            .step([s(), web("L1, R1"), s2("R1, R2")], "P>CIP = L1, R1, R2; set CIP = 3")
            .done(),
        case("P044", "one address three times in a slice")
            .step([s(), web("L1/st, L1, L1/t")], "P>CIP = L1; set CIP = 1")
            // If L1 were not ready, R1, which is terminating, would serve, too.
            .step([s(), web("L1/st, L1, L1/t, R1/st")], "P>CIP = L1; set CIP = 1")
            .done(),
        case("P045", "a slice port without a name")
            .step([s(), without("/ports/0", "name")], "P>CIP = REJECT")
            .done(),
        case("P046", "a slice port without a number")
            .step([s(), without("/ports/0", "port")], "P>CIP = REJECT")
            .done(),
        case("P047", "an unnamed port")
            .step([s().ports("- 80"), slice("s1", "=8080", "L1")], "P>CIP = L1")
            .done(),
        case("P048", "port names that differ")
            .step([s(), slice("s1", "http=8080", "L1")], "P>CIP = REJECT")
            .done(),
        case("P049", "protocols that differ")
            .step([s(), slice("s1", "web=8080/udp", "L1")], "P>CIP = REJECT")
            .done(),
        case("P050", "one port name, two numbers")
            .step([s(), web("L1"), slice("s2", "web=9090", "L2")], "P>CIP = L1:8080, L2:9090")
            .done(),
        case("P051", "one endpoint on two numbers")
            .step([s(), web("L1"), slice("s2", "web=9090", "L1")], "P>CIP = L1:8080, L1:9090; set CIP = 2")
            .done(),
        case("P052", "only the first address of an endpoint")
            .step(
                [
                    s(),
                    web("L1").edit(|slice| {
                        slice["endpoints"][0]["addresses"] = json!(["10.64.1.11", "10.64.1.99"]);
                    }),
                ],
                "P>CIP = L1; set CIP = 1",
            )
            .done(),
        case("P053", "an endpoint without an address")
            .step(
                [s(), web("L1, R1").edit(|slice| slice["endpoints"][0]["addresses"] = json!([]))],
                "P>CIP = R1",
            )
            .done(),
        case("P054", "a slice of host names").step([s(), fqdn, web("L1")], "P>CIP = L1; set CIP = 1").done(),
        case("P055", "a slice that belongs to no Service")
            .step([s(), without("/metadata/labels", "kubernetes.io/service-name")], "P>CIP = REJECT")
            .done(),
        case("P056", "a slice becomes headless")
            .step([s(), web("L1")], "P>CIP = L1")
            .step([s(), web("L1").label("service.kubernetes.io/headless", "")], "P>CIP = REJECT")
            .done(),
        case("P057", "the slice comes before the Service")
            .step([web("L1")], "P>CIP = DROP")
            .step([s(), web("L1")], "P>CIP = L1")
            .done(),
        case("P058", "an endpoint moves to another slice")
            .step([s(), web("L1")], "P>CIP = L1")
            .step([s(), web("L1"), s2("L1")], "P>CIP = L1; set CIP = 1")
            .step([s(), s2("L1")], "P>CIP = L1")
            .done(),
        case("P059", "a slice is updated in place")
            .step([s(), web("L1, R1")], "P>CIP = L1, R1")
            .step([s(), web("R1, R2")], "P>CIP = R1, R2")
            .done(),
        case("P060", "one of two slices is deleted")
            .step([s(), web("L1"), s2("R1")], "P>CIP = L1, R1")
            .step([s(), s2("R1")], "P>CIP = R1")
            .done(),
        case("P061", "slices of other Services and namespaces")
            .step([s(), web("L1"), owned(s2("R1"), "a", "t"), owned(s2("R2"), "b", "s")], "P>CIP = L1")
            .done(),
        case("P062", "an endpoint without a node is nowhere near")
            .step([s().internal_local(), without("/endpoints/0", "nodeName")], "P>CIP = DROP")
            .done(),
        case("P063", "ready and terminating at once, as published")
            .step(
                [
                    s(),
                    web("L1").edit(|slice| {
                        slice["endpoints"][0]["conditions"] =
                            json!({ "ready": true, "serving": false, "terminating": true });
                    }),
                ],
                "P>CIP = L1",
            )
            .done(),
    ]
}

fn without(pointer: &'static str, field: &'static str) -> Object {
    web("L1").edit(move |slice| remove(slice, pointer, field))
}

fn s2(endpoints: &str) -> Object {
    slice("s2", "web=8080", endpoints)
}

fn owned(slice: Object, namespace: &str, service: &str) -> Object {
    slice.label("kubernetes.io/service-name", service).edit(|slice| {
        slice["metadata"]["namespace"] = namespace.into();
    })
}

fn remove(object: &mut Value, pointer: &str, field: &str) {
    let parent = object.pointer_mut(pointer).and_then(Value::as_object_mut);
    parent.expect("an object to remove a field from").remove(field).expect("the field to remove");
}
