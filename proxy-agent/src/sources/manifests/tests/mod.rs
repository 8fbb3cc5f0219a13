//! Tests with real directories and real inotify.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::*;
use crate::config::opt_out::{ANNOTATION, Rules};
use crate::reconcile::cluster::{Change, Cluster, ObjectKey};
use crate::sources::Problem;

mod hostile;
mod kubectl;
mod selectors;

/// Deadline that is longer than any step takes on a busy machine, and shorter than the interval of scans, because a
/// scan would hide a missed event.
const SOON: Duration = Duration::from_secs(5);
/// Deadline for one message of any size on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory, the source that follows it, and the state that the source has sent so far.
struct Followed {
    // Dropped first: the source ends before its directory goes.
    source: JoinHandle<Result<(), SourceError>>,
    directory: TempDir,
    updates: Receiver<Update>,
    cluster: Cluster,
    problems: Vec<Problem>,
    /// Changes of the last message with changes.
    last: Vec<Change>,
}

fn rules() -> Rules {
    Rules::parse(&["annotation".to_owned()]).unwrap()
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.source.abort();
    }
}

impl Followed {
    /// Follows a directory of these files; returns after the first full state.
    async fn of(files: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        Self::existing(directory, "").await
    }

    /// Follows `below` in an existing directory.
    async fn existing(directory: TempDir, below: &str) -> Self {
        let (sender, updates) = channel(16);
        let path = directory.path().join(below);
        let source = tokio::spawn(async move { run(path, "n1", &rules(), sender).await });
        let (cluster, problems, last) = Default::default();
        let mut followed = Self { source, directory, updates, cluster, problems, last };
        while !followed.take_next().await {}
        followed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Processes one message; returns whether it was the end of the first state.
    async fn take_next(&mut self) -> bool {
        match timeout(PATIENCE, self.updates.recv()).await.expect("no message").expect("the source has ended")
        {
            Update::Synced => return true,
            Update::Problems(problems) => self.problems = problems,
            Update::Changes(changes) => {
                self.last.clone_from(&changes);
                for change in changes {
                    self.cluster.apply(change);
                }
            }
        }
        false
    }

    /// Waits until the ports of the Services are these (`name:port`).
    async fn expect(&mut self, want: &[&str]) {
        let deadline = Instant::now() + SOON;
        while self.ports() != want {
            assert!(Instant::now() < deadline, "{:?} instead of {want:?}", self.ports());
            self.take_next().await;
        }
    }

    /// Waits for a problem whose parts contain these words.
    async fn expect_problem(&mut self, object: &str, reason: &str) {
        let deadline = Instant::now() + SOON;
        while !self
            .problems
            .iter()
            .any(|problem| problem.object.contains(object) && problem.reason.contains(reason))
        {
            let next = timeout(deadline - Instant::now(), self.take_next()).await;
            assert_eq!(next, Ok(false), "{object} {reason} in {:?}", self.problems);
        }
    }

    async fn expect_no_problem(&mut self) {
        while !self.problems.is_empty() {
            assert!(!self.take_next().await);
        }
    }

    fn ports(&self) -> Vec<String> {
        self.cluster
            .services()
            .map(|service| {
                format!("{}:{}", service.key.name, service.ports.first().map_or(0, |port| port.port))
            })
            .collect()
    }
}

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: a}}\nspec:\n  clusterIP: 10.96.0.10\n  \
         ports:\n  - port: {port}\n"
    )
}

#[tokio::test]
async fn every_kind_and_form_is_read() {
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s-1\n  namespace: a\n  \
                 labels: {kubernetes.io/service-name: s}\naddressType: IPv4\nports: [{name: '', port: 8080}]\n\
                 endpoints:\n- addresses: [10.64.1.11]\n  nodeName: n1\n";
    let several = format!(
        "# comment\n---\n---\n{}---\n{slice}---\nkind: Deployment\napiVersion: apps/v1\n",
        service("s", 80)
    );
    let list = r#"{"kind": "ServiceList", "apiVersion": "v1", "metadata": {}, "items": [
        {"metadata": {"name": "l"}, "spec": {"clusterIP": "10.96.0.11", "ports": [{"port": 81}]}}]}
        {"kind": "List", "apiVersion": "v1", "items": [
        {"kind": "Endpoints", "apiVersion": "v1", "metadata": {"name": "l"}, "subsets": [
            {"addresses": [{"ip": "10.64.1.12"}], "ports": [{"port": 8081}]}]},
        {"kind": "ServiceCIDR", "apiVersion": "networking.k8s.io/v1", "metadata": {"name": "c"},
            "spec": {"cidrs": ["10.96.0.0/16", "nonsense"]}}]}"#;
    let nodes = "{kind: Node, apiVersion: v1, metadata: {name: n2, labels: {topology.kubernetes.io/zone: zb}}}\n---\n\
                 {kind: Node, apiVersion: v1, metadata: {name: n1, labels: {topology.kubernetes.io/zone: za}}}\n---\n\
                 {kind: Service, apiVersion: serving.knative.dev/v1, metadata: {name: k}}\n";
    let mut followed = Followed::of(&[
        ("several.yaml", &several),
        ("list.json", list),
        ("nodes.yml", nodes),
        ("notes.txt", "not: [yaml"),
        (".hidden.yaml", "not: [yaml"),
        ("empty.yaml", ""),
    ])
    .await;
    assert_eq!(followed.ports(), ["s:80", "l:81"]);
    let cluster = &followed.cluster;
    assert_eq!(cluster.node().zone.as_deref(), Some("za"));
    assert_eq!(cluster.service_cidrs().map(|cidr| cidr.to_string()).collect::<Vec<_>>(), ["10.96.0.0/16"]);
    assert_eq!(endpoints(cluster, "a", "s"), [("10.64.1.11".to_owned(), true)]);
    assert_eq!(endpoints(cluster, "default", "l"), [("10.64.1.12".to_owned(), false)]);
    followed
        .expect_problem("list.json, document 2, items[1], ServiceCIDR c", "spec.cidrs[1] \"nonsense\"")
        .await;
    assert_eq!(followed.problems.len(), 1);
}

fn endpoints(cluster: &Cluster, namespace: &str, name: &str) -> Vec<(String, bool)> {
    let key = ObjectKey::new(namespace, name);
    cluster
        .slices(&key)
        .flat_map(|slice| &slice.endpoints)
        .map(|e| (e.addr.to_string(), e.local))
        .collect::<Vec<_>>()
}

#[tokio::test]
async fn pods_opt_out_and_in() {
    let mut followed = Followed::of(&[("pod.yaml", &pod_with("off"))]).await;
    assert_eq!(pods(&followed), ["default/p"]);
    followed.write("pod.yaml", &pod_with("on"));
    while !pods(&followed).is_empty() {
        followed.take_next().await;
    }
    followed.write("pod.yaml", &pod_with("off"));
    while pods(&followed).is_empty() {
        followed.take_next().await;
    }
    fs::remove_file(followed.path("pod.yaml")).unwrap();
    while !pods(&followed).is_empty() {
        followed.take_next().await;
    }
}

fn pods(followed: &Followed) -> Vec<String> {
    followed.cluster.pods().map(|pod_with| pod_with.key.to_string()).collect::<Vec<_>>()
}

fn pod_with(annotation: &str) -> String {
    format!(
        "{{kind: Pod, apiVersion: v1, metadata: {{name: p, uid: u-1, annotations: {{{ANNOTATION}: '{annotation}'}}}}, \
             spec: {{nodeName: n1}}}}"
    )
}

#[tokio::test]
async fn files_come_change_and_go() {
    let mut followed = Followed::of(&[]).await;
    assert_eq!(followed.ports(), [""; 0]);
    followed.write("a.yaml", &service("s", 80));
    followed.expect(&["s:80"]).await;
    // Writes of the same size in quick succession: time stamps alone might not show them.
    for port in 81..90 {
        followed.write("a.yaml", &service("s", port));
        followed.expect(&[&format!("s:{port}")]).await;
    }
    followed.write("b.yaml.tmp", &service("t", 90));
    fs::rename(followed.path("b.yaml.tmp"), followed.path("b.yaml")).unwrap();
    followed.expect(&["s:89", "t:90"]).await;
    assert_eq!(followed.last.len(), 1, "{:?}", followed.last);
    fs::remove_file(followed.path("a.yaml")).unwrap();
    followed.expect(&["t:90"]).await;
    fs::rename(followed.path("b.yaml"), followed.path("b.off")).unwrap();
    followed.expect(&[]).await;
    fs::hard_link(followed.path("b.off"), followed.path("b.yaml")).unwrap();
    followed.expect(&["t:90"]).await;
}

#[tokio::test]
async fn an_object_that_moves_between_files_does_not_change() {
    let both = format!("{}---\n{}", service("s", 80), service("t", 81));
    let mut followed = Followed::of(&[("b.yaml", &both)]).await;
    followed.write("a.yaml", &service("s", 80));
    followed.expect_problem("b.yaml (Service a/s)", "is in a.yaml too").await;
    followed.write("b.yaml", &service("t", 82));
    followed.expect(&["s:80", "t:82"]).await;
    let [Change::Service(only)] = &followed.last[..] else { panic!("{:?}", followed.last) };
    assert_eq!(&*only.key.name, "t");
    followed.expect_no_problem().await;
}

#[tokio::test]
async fn the_first_file_wins_and_the_second_takes_over() {
    let mut followed = Followed::of(&[("b.yaml", &service("s", 82)), ("a.yaml", &service("s", 81))]).await;
    followed.expect(&["s:81"]).await;
    followed.expect_problem("b.yaml (Service a/s)", "a.yaml").await;
    fs::remove_file(followed.path("a.yaml")).unwrap();
    followed.expect(&["s:82"]).await;
    followed.expect_no_problem().await;
    let twice = format!("{}---\n{}", service("s", 83), service("s", 84));
    followed.write("b.yaml", &twice);
    followed.expect(&["s:83"]).await;
    followed.expect_problem("b.yaml, document 2 (line 9), Service a/s", "already").await;
}

#[tokio::test]
async fn a_broken_file_keeps_its_last_good_state() {
    let mut followed = Followed::of(&[("a.yaml", &service("s", 80)), ("b.yaml", "spec: [1\nport: 2")]).await;
    followed.expect(&["s:80"]).await;
    followed.expect_problem("b.yaml", "document 1").await;
    followed.expect_problem("b.yaml", "line 2").await;
    followed.write("a.yaml", &format!("{}---\nkind: [", service("s", 81)));
    followed.expect(&["s:81"]).await;
    followed.expect_problem("a.yaml", "document 2: ").await;
    // Objects of a document that cannot be read any more stay; another document takes effect at once.
    let both = format!("{}---\n{}", service("s", 80), service("t", 80));
    followed.write("a.yaml", &both);
    followed.expect(&["s:80", "t:80"]).await;
    followed.write("a.yaml", &format!("kind: [\n---\n{}", service("s", 82)));
    followed
        .expect_problem("a.yaml", "the last good state of what it may hold (1 objects) stays in force")
        .await;
    followed.expect(&["s:82", "t:80"]).await;
    followed.write("b.yaml", "");
    followed.write("a.yaml", &service("s", 83));
    followed.expect(&["s:83"]).await;
    followed.expect_no_problem().await;
}

#[tokio::test]
async fn a_broken_object_costs_only_itself() {
    let broken = service("s", 80).replace("port: 80", "port: http");
    let mut followed = Followed::of(&[("a.yaml", &format!("{broken}---\n{}", service("t", 81)))]).await;
    followed.expect(&["t:81"]).await;
    followed.expect_problem("a.yaml, document 1 (line 1), Service a/s", "spec.ports[0].port: ").await;
    followed.write("a.yaml", &format!("{}---\n{}", service("s", 80), service("t", 82)));
    followed.expect(&["s:80", "t:82"]).await;
    followed.expect_no_problem().await;
    followed.write("a.yaml", &format!("{broken}---\n{}", service("t", 83)));
    followed.expect(&["s:80", "t:83"]).await;
    followed.expect_problem("a.yaml", "its last good state stays in force").await;
    for (text, reason) in [
        ("metadata: {name: s}", "kind is missing"),
        ("kind: Service\nmetadata: {name: s}", "apiVersion is missing"),
        ("- a\n- b", "kind is missing"),
        ("kind: EndpointSlice\napiVersion: discovery.k8s.io/v1beta1", "use discovery.k8s.io/v1"),
        ("kind: Service\napiVersion: v1\nspec: {}", "metadata.name is missing"),
        ("kind: ServiceList\napiVersion: v1\nitems: 7", "items is not a list"),
        ("kind: Service\nkind: Service", "\"kind\" is there twice at line 2"),
    ] {
        followed.write("c.yaml", text);
        followed.expect_problem("c.yaml", reason).await;
    }
}

#[tokio::test]
async fn a_mounted_config_map_is_swapped_at_once() {
    let directory = TempDir::new().unwrap();
    let root = directory.path().to_owned();
    swap(&root, "..2026_1", 80);
    symlink("..data/s.yaml", root.join("s.yaml")).unwrap();
    let mut followed = Followed::existing(directory, "").await;
    followed.expect(&["s:80"]).await;
    swap(&root, "..2026_2", 81);
    followed.expect(&["s:81"]).await;
    fs::remove_dir_all(root.join("..2026_1")).unwrap();
    swap(&root, "..2026_3", 82);
    followed.expect(&["s:82"]).await;
    fs::remove_file(root.join("s.yaml")).unwrap();
    followed.expect(&[]).await;
}

/// Mounts another version of a ConfigMap, as the kubelet does.
fn swap(root: &Path, name: &str, port: u16) {
    fs::create_dir(root.join(name)).unwrap();
    fs::write(root.join(name).join("s.yaml"), service("s", port)).unwrap();
    symlink(name, root.join("..data_tmp")).unwrap();
    fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
}

#[tokio::test]
async fn a_directory_that_vanishes_keeps_its_state_until_it_is_back() {
    let directory = TempDir::new().unwrap();
    let below = directory.path().join("m");
    fs::create_dir(&below).unwrap();
    fs::write(below.join("s.yaml"), service("s", 80)).unwrap();
    let mut followed = Followed::existing(directory, "m").await;
    fs::rename(&below, followed.path("old")).unwrap();
    followed.expect_problem("/m", "stays in force").await;
    assert_eq!(followed.ports(), ["s:80"]);
    // Changes in the directory under its new name have no effect.
    fs::write(followed.path("old/s.yaml"), service("s", 99)).unwrap();
    let staged = followed.path("staged");
    fs::create_dir(&staged).unwrap();
    fs::write(staged.join("t.yaml"), service("t", 81)).unwrap();
    fs::rename(&staged, &below).unwrap();
    followed.expect(&["t:81"]).await;
    followed.expect_no_problem().await;
    // The new directory is watched, not only scanned.
    fs::write(below.join("t.yaml"), service("t", 82)).unwrap();
    followed.expect(&["t:82"]).await;
}

#[tokio::test]
async fn a_burst_is_one_message() {
    let mut followed = Followed::of(&[]).await;
    for i in 0..50 {
        followed.write(&format!("{i:02}.yaml"), &service(&format!("s{i:02}"), 80));
    }
    let mut messages = 0;
    while followed.ports().len() < 50 {
        followed.take_next().await;
        messages += 1;
    }
    assert!(messages < 10, "{messages}");
}

#[tokio::test]
async fn a_missing_directory_is_an_error_at_the_start() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [directory.path().join("none"), file] {
        let (sender, mut updates) = channel(1);
        let error = run(path.clone(), "n1", &rules(), sender).await.unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(updates.recv().await.is_none());
    }
}

#[tokio::test]
async fn ends_with_its_receiver() {
    let mut followed = Followed::of(&[]).await;
    followed.updates.close();
    timeout(SOON, &mut followed.source).await.unwrap().unwrap().unwrap();
}

#[test]
fn names() {
    for (name, want) in [
        ("a.yaml", true),
        ("a.yml", true),
        ("a.json", true),
        (".a.yaml", false),
        (".#a.yaml", false),
        ("a.yaml~", false),
        ("a.yaml.swp", false),
        ("4913", false),
        ("..data", false),
    ] {
        assert_eq!(is_manifest(OsStr::new(name)), want, "{name}");
    }
}

/// Twenty thousand objects in four files.
#[tokio::test]
async fn ten_thousand_services_load() {
    let directory = TempDir::new().unwrap();
    write_many(directory.path(), 10_000);
    let followed = Followed::existing(directory, "").await;
    assert_eq!(followed.last.len(), 20_000);
}

fn write_many(directory: &Path, services: u32) {
    let mut files = vec![String::new(); 4];
    for i in 0..services {
        let text = &mut files[i as usize % 4];
        let ip = std::net::Ipv4Addr::from(0x0a60_0000 + i);
        *text += &format!(
            "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: s{i}\n  namespace: a\n  labels:\n    app: s{i}\nspec:\n  \
             clusterIP: {ip}\n  clusterIPs:\n  - {ip}\n  ipFamilies:\n  - IPv4\n  ports:\n  - name: web\n    port: 80\n    \
             protocol: TCP\n    targetPort: 8080\n  selector:\n    app: s{i}\n  type: ClusterIP\n"
        );
        *text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s{i}-x\n  namespace: a\n  \
             labels:\n    kubernetes.io/service-name: s{i}\naddressType: IPv4\nports:\n- name: web\n  port: 8080\n  \
             protocol: TCP\nendpoints:\n"
        );
        for last in 1..=3 {
            *text += &format!(
                "- addresses:\n  - 10.64.{}.{last}\n  nodeName: n{last}\n  conditions:\n    ready: true\n    \
                 serving: true\n    terminating: false\n",
                i % 256
            );
        }
    }
    for (i, text) in files.iter().enumerate() {
        fs::write(directory.join(format!("{i}.yaml")), text).unwrap();
    }
}
