//! Tests of the controllers, followed live.

use super::*;
use crate::reconcile::cluster::Slice;

const WEB: &str = "kind: Service\napiVersion: v1\nmetadata: {name: web, namespace: a}\nspec:\n  selector: {app: web}\n  \
                   clusterIP: 10.96.0.10\n  ports: [{port: 80, targetPort: http}]\n";
const CIDR: &str = "kind: ServiceCIDR\napiVersion: networking.k8s.io/v1\nmetadata: {name: kubernetes}\n\
                    spec: {cidrs: [10.96.0.0/16]}\n";

/// Returns Pod a/`name` that listens on 8080.
fn pod(name: &str, address: &str, more: &str) -> String {
    format!(
        "kind: Pod\napiVersion: v1\nmetadata: {{name: {name}, namespace: a, labels: {{app: web}}}}\nspec:\n  nodeName: n1\n  \
         containers: [{{name: c, ports: [{{name: http, containerPort: 8080}}]}}]\nstatus: {{podIP: '{address}'{more}}}\n"
    )
}

fn slice_of_web(address: &str) -> String {
    format!(
        "kind: EndpointSlice\napiVersion: discovery.k8s.io/v1\nmetadata:\n  name: web-1\n  namespace: a\n  \
         labels: {{kubernetes.io/service-name: web}}\naddressType: IPv4\nports: [{{name: '', port: 9090}}]\n\
         endpoints: [{{addresses: [{address}]}}]\n"
    )
}

/// Returns the slices of Service a/`name`.
fn slices(followed: &Followed, name: &str) -> Vec<Slice> {
    followed.cluster.slices(&ObjectKey::new("a", name)).cloned().collect()
}

/// Returns the endpoints of Service a/web, such as `10.64.1.11:8080`; a `!` follows if the endpoint is not ready.
fn endpoints(followed: &Followed) -> Vec<String> {
    let slices = slices(followed, "web");
    let all =
        slices.iter().flat_map(|slice| slice.endpoints.iter().zip(std::iter::repeat(slice.ports[0].port)));
    let mut all: Vec<_> =
        all.map(|(e, port)| format!("{}:{port}{}", e.addr, if e.ready { "" } else { "!" })).collect();
    all.sort();
    all
}

impl Followed {
    async fn expect_endpoints(&mut self, want: &[&str]) {
        let deadline = Instant::now() + SOON;
        while endpoints(self) != want {
            let next = timeout(deadline - Instant::now(), self.take_next()).await;
            assert_eq!(next, Ok(false), "{:?} instead of {want:?}", endpoints(self));
        }
    }

    fn service_address(&self) -> Option<String> {
        let service = self.cluster.service(&ObjectKey::new("a", "web"))?;
        service.cluster_ips[0].map(|ip| ip.to_string())
    }

    async fn expect_address(&mut self, want: Option<&str>) {
        let deadline = Instant::now() + SOON;
        while self.service_address().as_deref() != want {
            let next = timeout(deadline - Instant::now(), self.take_next()).await;
            assert_eq!(next, Ok(false), "{:?} instead of {want:?}", self.service_address());
        }
    }
}

#[tokio::test]
async fn pods_come_change_and_go() {
    let mut followed = Followed::of(&[("web.yaml", WEB), ("p1.yaml", &pod("p1", "10.64.1.11", ""))]).await;
    followed.expect_endpoints(&["10.64.1.11:8080"]).await;
    followed.expect_no_problem().await;
    followed.write("p2.yaml", &pod("p2", "10.64.1.12", ""));
    followed.expect_endpoints(&["10.64.1.11:8080", "10.64.1.12:8080"]).await;
    followed.write("p1.yaml", &pod("p1", "10.64.1.11", ", conditions: [{type: Ready, status: 'False'}]"));
    followed.expect_endpoints(&["10.64.1.11:8080!", "10.64.1.12:8080"]).await;
    fs::remove_file(followed.path("p1.yaml")).unwrap();
    followed.expect_endpoints(&["10.64.1.12:8080"]).await;
    // A Pod of another namespace is no endpoint of this Service, and its slices are not sent again.
    followed.write("other.yaml", &pod("p3", "10.64.1.13", "").replace("namespace: a", "namespace: b"));
    followed.write("mark.yaml", &service("z", 80));
    followed.expect(&["web:80", "z:80"]).await;
    assert_eq!(followed.last.len(), 1, "{:?}", followed.last);
    followed.expect_endpoints(&["10.64.1.12:8080"]).await;
    fs::remove_file(followed.path("web.yaml")).unwrap();
    followed.expect_endpoints(&[]).await;
}

#[tokio::test]
async fn slices_count_alone() {
    let mut followed = Followed::of(&[("web.yaml", WEB), ("p1.yaml", &pod("p1", "10.64.1.11", ""))]).await;
    for text in [
        slice_of_web("10.64.1.99"),
        "kind: Endpoints\napiVersion: v1\nmetadata: {name: web, namespace: a}\nsubsets:\n\
         - {addresses: [{ip: 10.64.1.99}], ports: [{port: 9090}]}\n"
            .to_owned(),
    ] {
        followed.expect_endpoints(&["10.64.1.11:8080"]).await;
        followed.write("slice.yaml", &text);
        followed.expect_endpoints(&["10.64.1.99:9090"]).await;
        followed.expect_no_problem().await;
        fs::remove_file(followed.path("slice.yaml")).unwrap();
    }
    followed.expect_endpoints(&["10.64.1.11:8080"]).await;
}

#[tokio::test]
async fn zones_are_those_of_nodes_in_the_files() {
    let web = WEB.replace("spec:\n", "spec:\n  trafficDistribution: PreferSameZone\n");
    let mut followed = Followed::of(&[
        ("web.yaml", &web),
        ("p1.yaml", &pod("p1", "10.64.1.11", "")),
        ("n.yaml", &node("za")),
    ])
    .await;
    for zone in ["zb", "zc"] {
        followed.write("n.yaml", &node(zone));
        while slices(&followed, "web")[0].endpoints[0]
            .hints
            .as_ref()
            .is_none_or(|hints| *hints.zones[0] != *zone)
        {
            followed.take_next().await;
        }
    }
}

fn node(zone: &str) -> String {
    format!(
        "{{kind: Node, apiVersion: v1, metadata: {{name: n1, labels: {{topology.kubernetes.io/zone: {zone}}}}}}}"
    )
}

#[tokio::test]
async fn addresses_come_from_service_cidrs() {
    let web = WEB.replace("  clusterIP: 10.96.0.10\n", "  type: NodePort\n");
    let mut followed = Followed::of(&[("web.yaml", &web), ("p1.yaml", &pod("p1", "10.64.1.11", ""))]).await;
    let missing = "spec.clusterIP is not set, and there is no ServiceCIDR in the files to take one from: the Service is not served";
    followed.expect_problem("web.yaml, document 1 (line 1), Service a/web", missing).await;
    assert_eq!((followed.service_address(), endpoints(&followed)), (None, vec![]));
    followed.write("cidr.yaml", CIDR);
    followed.expect_address(Some("10.96.238.254")).await;
    followed.expect_no_problem().await;
    followed.expect_endpoints(&["10.64.1.11:8080"]).await;
    let given = node_port(&followed);
    assert!((30_086..32_768).contains(&given), "{given}");
    // Another Service names this address for a while.
    followed.write("z.yaml", &service("z", 80).replace("10.96.0.10", "10.96.238.254"));
    followed.expect_address(Some("10.96.238.255")).await;
    assert_eq!(node_port(&followed), given);
    fs::remove_file(followed.path("z.yaml")).unwrap();
    followed.expect_address(Some("10.96.238.254")).await;
    fs::remove_file(followed.path("cidr.yaml")).unwrap();
    followed.expect_address(None).await;
    followed.expect_endpoints(&[]).await;
    followed.expect_problem("web.yaml", missing).await;
}

fn node_port(followed: &Followed) -> u16 {
    followed.cluster.service(&ObjectKey::new("a", "web")).unwrap().ports[0].node_port
}

/// `kubectl get service,pod,node -o yaml`, abridged.
#[tokio::test]
async fn a_dump_of_a_cluster() {
    let dump = "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: ''}\nitems:\n\
        - apiVersion: v1\n  kind: Service\n  metadata: {name: web, namespace: a, uid: u}\n  \
          spec: {clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10], ipFamilies: [IPv4], ipFamilyPolicy: SingleStack, type: ClusterIP, \
          selector: {app: web}, sessionAffinity: None, ports: [{port: 80, protocol: TCP, targetPort: http}]}\n  \
          status: {loadBalancer: {}}\n\
        - apiVersion: v1\n  kind: Pod\n  metadata: {name: p1, namespace: a, labels: {app: web, pod-template-hash: 5d}}\n  \
          spec: {nodeName: n1, containers: [{name: c, ports: [{containerPort: 8080, name: http, protocol: TCP}]}]}\n  \
          status: {phase: Running, podIP: 10.64.1.11, podIPs: [{ip: 10.64.1.11}], conditions: [{type: Ready, status: 'True'}]}\n\
        - apiVersion: v1\n  kind: Pod\n  metadata: {name: job, namespace: a, labels: {app: web}}\n  \
          spec: {nodeName: n1, containers: [{name: c}]}\n  status: {phase: Succeeded, podIP: 10.64.1.12}\n";
    let mut followed = Followed::of(&[("dump.yaml", dump)]).await;
    followed.expect_endpoints(&["10.64.1.11:8080"]).await;
    followed.expect_no_problem().await;
}

/// Each directory has an unserved part that only the expected problem shows.
#[tokio::test]
async fn what_is_said_of_selectors() {
    let deployment = "---\nkind: Deployment\napiVersion: apps/v1\nmetadata: {name: web, namespace: a}\nspec:\n  \
                      template: {metadata: {labels: {app: web}}}\n";
    let two_ports = WEB.replace(
        "[{port: 80, targetPort: http}]",
        "[{name: h, port: 80, targetPort: http}, {name: s, port: 443, targetPort: https}]",
    );
    for (text, reason) in [
        (
            WEB.to_owned(),
            "spec.selector matches no Pod in the files, and there is no EndpointSlice: it has no endpoints",
        ),
        (
            format!("{WEB}{deployment}"),
            "spec.selector matches what Deployment a/web would make, but no Pod in the files, and there is no EndpointSlice: it has \
             no endpoints. Add the Pods with their addresses (kubectl get pods -o yaml)",
        ),
        (
            format!("{WEB}---\n{}", pod("p1", "", "")),
            "spec.selector matches 1 Pods, none of which runs and has an IPv4 address (status.podIPs), and there is no EndpointSlice: \
             it has no endpoints",
        ),
        (
            format!("{WEB}---\n{}", pod("p1", "10.64.1.11", ", phase: Failed")),
            "spec.selector matches 1 Pods, none of which runs and has an IPv4 address (status.podIPs), and there is no EndpointSlice: \
             it has no endpoints",
        ),
        (
            format!("{two_ports}---\n{}", pod("p1", "10.64.1.11", "")),
            "spec.ports: \"s\" (TCP) has targetPort \"https\", which is no port of the Pods that spec.selector matches, by name and \
             protocol: it has no endpoints",
        ),
        (
            format!("{WEB}---\n{}", slice_of_web("10.64.1.11").replace("name: ''", "name: web")),
            "spec.ports: the one without a name (TCP) is in none of its slices by name and protocol: it has no endpoints",
        ),
    ] {
        let mut followed = Followed::of(&[("a.yaml", &text)]).await;
        let object = "a.yaml, document 1 (line 1), Service a/web";
        followed.expect_problem(object, reason).await;
        let of_service: Vec<_> =
            followed.problems.iter().filter(|problem| problem.object == object).collect();
        assert_eq!(of_service.iter().map(|problem| problem.reason.as_str()).collect::<Vec<_>>(), [reason]);
        followed.write("a.yaml", &format!("{WEB}---\n{}", pod("p1", "10.64.1.11", "")));
        followed.expect_no_problem().await;
    }
    // Services that are not served or not meant to have endpoints cause no problem: headless, an alias, another
    // proxy's, without a selector.
    for (from, to) in [
        ("clusterIP: 10.96.0.10", "clusterIP: None"),
        ("clusterIP: 10.96.0.10", "type: ExternalName"),
        ("namespace: a", "namespace: a, labels: {service.kubernetes.io/service-proxy-name: x}"),
        ("selector: {app: web}", "selector: null"),
    ] {
        let followed = Followed::of(&[("a.yaml", &WEB.replace(from, to))]).await;
        assert_eq!(followed.problems, [], "{to}");
    }
}

/// Problems with fields of a Service or slice name the file.
#[tokio::test]
async fn fields_are_named_with_their_file() {
    let web = WEB.replace("selector: {app: web}", "externalIPs: [x]");
    let slice = slice_of_web("10.64.1.11").replace("[10.64.1.11]", "[fd00::1]");
    let followed = Followed::of(&[("a.yaml", &format!("{web}---\n{slice}"))]).await;
    let of_service: Vec<_> =
        followed.cluster.services().flat_map(|service| service.problems.clone()).collect();
    assert_eq!(
        of_service,
        ["a.yaml, document 1 (line 1): spec.externalIPs[0] \"x\" is not an IP address; it is ignored"]
    );
    let of_slice: Vec<_> = slices(&followed, "web").into_iter().flat_map(|slice| slice.problems).collect();
    assert_eq!(
        of_slice,
        [
            "a.yaml, document 2 (line 9): endpoints[0].addresses[0] \"fd00::1\" is not IPv4, the addressType of the slice; it is \
             ignored"
        ]
    );
    // The agent reports these problems when it programs the Service.
    assert_eq!(followed.problems, []);
}
