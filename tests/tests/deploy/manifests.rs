//! The manifests in `deploy/`: every field and flag in them is one that Kubernetes, kustomize or the agent knows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proxy_agent::config::kube_proxy::ConfigFile;
use proxy_tests::deployment::{Deployment, directory, documents, patched, strictly};
use serde_json::{Value, json};

fn strings(value: &Value) -> BTreeSet<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn kustomization(dir: &str) -> Result<Value> {
    let documents = documents(&directory().join(dir).join("kustomization.yaml"))?;
    documents.into_iter().next().with_context(|| format!("{dir}: an empty kustomization"))
}

fn files(dir: &Path) -> Result<BTreeSet<String>> {
    let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

#[test]
fn every_file_is_in_the_kustomization() -> Result<()> {
    let base = kustomization("base")?;
    let mut listed = strings(&base["resources"]);
    for generator in base["configMapGenerator"].as_array().context("a generator")? {
        listed.extend(strings(&generator["files"]));
    }
    listed.insert("kustomization.yaml".to_owned());
    assert_eq!(files(&directory().join("base"))?, listed);
    assert_eq!(base["configMapGenerator"][0]["name"], "vipr");
    // The image that the DaemonSet names is the one that gets a place and a version.
    let deployment = Deployment::read()?;
    let pod = deployment.pod()?;
    for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
        assert_eq!(container.image.as_deref(), base["images"][0]["name"].as_str());
    }
    assert_eq!(base["images"][0]["newTag"], env!("CARGO_PKG_VERSION"));
    Ok(())
}

#[test]
fn unknown_fields_are_found() -> Result<()> {
    let objects = documents(&directory().join("base/daemonset.yaml"))?;
    let object = objects.first().context("a DaemonSet")?;
    strictly::<DaemonSet>(object)?;
    let mut misspelt = object.clone();
    misspelt["spec"]["template"]["spec"]["hostNetwrk"] = json!(true);
    let error = strictly::<DaemonSet>(&misspelt).err().context("not found")?;
    ensure!(error.to_string().contains("hostNetwrk"), "{error:#}");
    Ok(())
}

#[test]
fn the_daemon_set_runs_everywhere_and_is_asked_how_it_is() -> Result<()> {
    let deployment = Deployment::read()?;
    let pod = deployment.pod()?;
    assert_eq!((pod.host_network, pod.host_pid), (Some(true), Some(true)));
    assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"));
    let tolerations = pod.tolerations.as_deref().unwrap_or_default();
    assert!(tolerations.iter().any(|one| {
        one.operator.as_deref() == Some("Exists") && one.key.is_none() && one.effect.is_none()
    }));
    let agent = deployment.agent()?;
    let healthz = IntOrString::Int(i32::from(proxy_agent::config::servers::HEALTH_PORT));
    assert_eq!(asked(&agent.liveness_probe), Some(("/livez".to_owned(), healthz.clone())));
    assert_eq!(asked(&agent.readiness_probe), Some(("/readyz".to_owned(), healthz)));
    // With ports listed here, the scheduler would keep the pod from every node whose kube-proxy lists the same ports.
    assert!(agent.ports.is_none(), "{:?}", agent.ports);

    // The selector matches the pods of the template; they have this account, and the account has this role.
    let spec = &deployment.daemon_set.spec;
    let labels = spec.template.metadata.clone().unwrap_or_default().labels.unwrap_or_default();
    let selected = spec.selector.match_labels.clone().unwrap_or_default();
    assert!(!selected.is_empty() && selected.iter().all(|(key, value)| labels.get(key) == Some(value)));
    let (account, binding) = (&deployment.account.metadata, &deployment.binding);
    assert_eq!(pod.service_account_name, account.name);
    assert_eq!(Some(&binding.role_ref.name), deployment.cluster_role.metadata.name.as_ref());
    let subjects = binding.subjects.as_deref().unwrap_or_default();
    assert_eq!(subjects.len(), 1);
    assert_eq!(Some(&subjects[0].name), account.name.as_ref());
    assert_eq!(subjects[0].namespace.as_deref(), kustomization("base")?["namespace"].as_str());
    // kustomize takes the subject for this account, and changes the namespace of both, only if the subject names the
    // account's namespace.
    assert_eq!(subjects[0].namespace, account.namespace);
    Ok(())
}

fn asked(probe: &Option<Probe>) -> Option<(String, IntOrString)> {
    let get = probe.as_ref().and_then(|probe| probe.http_get.clone());
    get.map(|get| (get.path.unwrap_or_default(), get.port))
}

#[test]
fn every_container_says_what_it_asks_for_and_which_system_calls_it_may_make() -> Result<()> {
    let deployment = Deployment::read()?;
    let pod = deployment.pod()?;
    let agent = deployment.agent()?;
    let requests =
        |container: &Container| container.resources.clone().unwrap_or_default().requests.unwrap_or_default();
    for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
        let context = container.security_context.clone().unwrap_or_default();
        let profile = context.seccomp_profile.with_context(|| format!("{}: no profile", container.name))?;
        let want = if context.privileged == Some(true) { "Unconfined" } else { "RuntimeDefault" };
        assert_eq!(profile.type_, want, "{}", container.name);
        assert_eq!(requests(container).keys().collect::<Vec<_>>(), ["cpu", "memory"], "{}", container.name);
    }
    // The scheduler counts the largest container's requests: the init container must not make the pod larger.
    let init = pod.init_containers.as_ref().and_then(|all| all.first()).context("an init container")?;
    assert_eq!(requests(init)["cpu"], requests(agent)["cpu"]);
    Ok(())
}

/// Returns the DaemonSet with the patches of a component, and checks that Kubernetes knows every field.
fn with_component(name: &str) -> Result<DaemonSet> {
    let component = kustomization(name)?;
    assert_eq!(component["kind"], "Component", "{name}");
    let mut object = documents(&directory().join("base/daemonset.yaml"))?.remove(0);
    for patch in component["patches"].as_array().into_iter().flatten() {
        assert_eq!(patch["target"], json!({ "kind": "DaemonSet", "name": object["metadata"]["name"] }));
        object = patched(&object, patch["patch"].as_str().context("a patch")?)?;
    }
    strictly(&object)
}

#[test]
fn clusters_before_1_30_get_an_annotation_for_what_newer_ones_have_a_field_for() -> Result<()> {
    let annotation = "container.apparmor.security.beta.kubernetes.io/vipr";
    for (daemon_set, has_field) in
        [(Deployment::read()?.daemon_set, true), (with_component("before-1.30")?, false)]
    {
        let template = daemon_set.spec.template;
        let agent = template.spec.context("a pod")?.containers.remove(0);
        let profile = agent.security_context.unwrap_or_default().app_armor_profile;
        let annotated = template.metadata.and_then(|metadata| metadata.annotations?.remove(annotation));
        assert_eq!(profile.map(|profile| profile.type_), has_field.then(|| "Unconfined".to_owned()));
        assert_eq!(annotated, (!has_field).then(|| "unconfined".to_owned()));
    }
    Ok(())
}

#[test]
fn kernel_5_10_gets_one_more_capability() -> Result<()> {
    let base = Deployment::read()?;
    let patched = Deployment { daemon_set: with_component("kernel-5.10")?, ..Deployment::read()? };
    let mut want = base.capabilities()?;
    want.insert("SYS_RESOURCE".to_owned());
    assert_eq!(patched.capabilities()?, want);
    Ok(())
}

#[test]
fn beside_kube_proxy_the_probes_ask_at_the_port_that_the_configuration_can_name() -> Result<()> {
    let daemon_set = with_component("beside-kube-proxy")?;
    let agent = daemon_set.spec.template.spec.context("a pod")?.containers.remove(0);
    let text = fs::read_to_string(directory().join("base/config.conf"))?;
    let (_, lines) = text.split_once("../beside-kube-proxy").context("what goes with it")?;
    let set = lines.lines().skip(1).filter_map(|line| line.strip_prefix("# "));
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("config.conf");
    fs::write(&file, set.fold(text.clone(), |text, line| format!("{text}\n{line}")))?;
    let (configuration, ignored) = ConfigFile::read(&file)?.decode()?;
    assert_eq!(ignored, Vec::<String>::new());
    let effective: Value = serde_saphyr::from_str(&configuration.to_yaml()?)?;
    let (healthz, metrics) =
        (port(&effective, "healthzBindAddress")?, port(&effective, "metricsBindAddress")?);
    for probe in [agent.readiness_probe, agent.liveness_probe] {
        let asked = probe.and_then(|probe| probe.http_get).map(|get| get.port);
        assert_eq!(asked, Some(IntOrString::Int(i32::from(healthz))));
    }
    let taken = [proxy_agent::config::servers::HEALTH_PORT, proxy_agent::config::servers::METRICS_PORT];
    assert!(!taken.contains(&healthz) && !taken.contains(&metrics) && healthz != metrics);
    Ok(())
}

fn port(effective: &Value, field: &str) -> Result<u16> {
    let address = effective[field].as_str().and_then(|address| address.rsplit_once(':'));
    Ok(address.with_context(|| field.to_owned())?.1.parse()?)
}

/// Returns the target that Prometheus makes of a pod's container by the monitor's rules, as relabelling is
/// documented.
fn relabelled(monitor: &Value, labels: &[(&str, &str)]) -> Result<Option<BTreeMap<String, String>>> {
    let mut labels: BTreeMap<String, String> =
        labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    for rule in monitor["spec"]["podMetricsEndpoints"][0]["relabelings"].as_array().context("rules")? {
        let source =
            rule["sourceLabels"][0].as_str().map_or("", |name| labels.get(name).map_or("", String::as_str));
        // Each pattern of the rules, and its meaning.
        let matches = match rule["regex"].as_str() {
            None => true,
            Some("false") => source == "false",
            Some("([0-9.]+)") => source.chars().all(|c| c.is_ascii_digit() || c == '.'),
            Some("(.*:.*)") => source.contains(':'),
            Some(other) => anyhow::bail!("{other}: what is this?"),
        };
        match (rule["action"].as_str(), matches) {
            (Some("keep"), false) => return Ok(None),
            (Some("keep"), true) | (None, false) => {}
            (None, true) => {
                let value = rule["replacement"].as_str().unwrap_or("$1").replace("$1", source);
                labels.insert(rule["targetLabel"].as_str().context("a label")?.to_owned(), value);
            }
            (Some(other), _) => anyhow::bail!("{other}: what is this?"),
        }
    }
    labels.retain(|name, _| !name.starts_with("__meta_"));
    Ok(Some(labels))
}

#[test]
fn prometheus_finds_the_agent_of_each_node_once_as_kube_proxy() -> Result<()> {
    let monitor = documents(&directory().join("monitoring/podmonitor.yaml"))?.remove(0);
    let component = kustomization("monitoring")?;
    assert_eq!(strings(&component["resources"]), BTreeSet::from(["podmonitor.yaml".to_owned()]));
    assert_eq!(component["kind"], "Component");
    let template = Deployment::read()?.daemon_set.spec.template;
    let labels = serde_json::to_value(template.metadata.unwrap_or_default().labels)?;
    for (label, value) in monitor["spec"]["selector"]["matchLabels"].as_object().context("a selector")? {
        assert_eq!(labels[label], *value);
    }
    for (ip, address) in [("192.0.2.10", "192.0.2.10:10249"), ("fd00::10", "[fd00::10]:10249")] {
        assert_eq!(target(&monitor, ip, "true")?, None);
        let want = [("__address__", address), ("instance", "n1"), ("job", "kube-proxy")];
        assert_eq!(
            target(&monitor, ip, "false")?,
            Some(want.map(|(name, value)| (name.to_owned(), value.to_owned())).into())
        );
    }
    Ok(())
}

fn target(monitor: &Value, ip: &str, is_init: &str) -> Result<Option<BTreeMap<String, String>>> {
    relabelled(
        monitor,
        &[
            ("__address__", ip),
            ("__meta_kubernetes_pod_ip", ip),
            ("__meta_kubernetes_pod_container_init", is_init),
            ("__meta_kubernetes_pod_node_name", "n1"),
            ("job", "kube-system/vipr"),
        ],
    )
}

#[test]
fn every_mount_has_a_volume_and_every_volume_a_mount() -> Result<()> {
    let deployment = Deployment::read()?;
    let pod = deployment.pod()?;
    let containers = pod.containers.iter().chain(pod.init_containers.iter().flatten());
    let mounts = containers.flat_map(|container| container.volume_mounts.iter().flatten());
    let mounted: BTreeSet<&str> = mounts.map(|mount| mount.name.as_str()).collect();
    let volumes: BTreeSet<&str> = pod.volumes.iter().flatten().map(|volume| volume.name.as_str()).collect();
    assert_eq!(mounted, volumes);
    Ok(())
}

#[test]
fn the_agent_understands_the_configuration() -> Result<()> {
    let base = directory().join("base");
    let (configuration, ignored) = ConfigFile::read(&base.join("config.conf"))?.decode()?;
    assert_eq!(ignored, Vec::<String>::new());
    let effective: Value = serde_saphyr::from_str(&configuration.to_yaml()?)?;
    let kubeconfig = effective["clientConnection"]["kubeconfig"].as_str().context("a kubeconfig")?;
    let deployment = Deployment::read()?;
    let mount = deployment.agent()?.volume_mounts.iter().flatten().find(|mount| mount.name == "config");
    let dir = &mount.context("a mount")?.mount_path;
    assert_eq!(kubeconfig, format!("{dir}/kubeconfig.conf"));
    let config = format!("--config={dir}/config.conf");
    assert!(deployment.agent()?.args.iter().flatten().any(|arg| *arg == config), "{config}");
    let text = fs::read_to_string(base.join("kubeconfig.conf"))?;
    kube::config::Kubeconfig::from_yaml(&text)?;
    Ok(())
}

#[test]
fn the_kubeadm_variant_takes_the_configuration_of_kube_proxy() -> Result<()> {
    let kubeadm = kustomization("kubeadm")?;
    assert_eq!(strings(&kubeadm["resources"]), BTreeSet::from(["../base".to_owned()]));
    let patches = kubeadm["patches"].as_array().context("patches")?;
    let daemon_set: Value = serde_saphyr::from_str(patches[0]["patch"].as_str().unwrap_or_default())?;
    let deployment = Deployment::read()?;
    assert_eq!(daemon_set["kind"], "DaemonSet");
    assert_eq!(daemon_set["metadata"]["name"].as_str(), deployment.daemon_set.metadata.name.as_deref());
    let volumes = &daemon_set["spec"]["template"]["spec"]["volumes"];
    assert_eq!(*volumes, json!([{ "name": "config", "configMap": { "name": "kube-proxy" } }]));
    let of_base = deployment.pod()?.volumes.iter().flatten().find(|volume| volume.name == "config");
    assert!(of_base.is_some_and(|volume| volume.config_map.is_some()), "the volume that is replaced");
    Ok(())
}
