//! The manifests in `deploy/`: nothing in them that Kubernetes, kustomize or the agent does not know.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proxy_agent::kube_proxy::ConfigFile;
use proxy_tests::deployment::{Deployment, directory, documents, strictly};
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
    let probe = |probe: &Option<k8s_openapi::api::core::v1::Probe>| {
        let get = probe.as_ref().and_then(|probe| probe.http_get.clone());
        get.map(|get| (get.path.unwrap_or_default(), get.port))
    };
    let healthz = IntOrString::String("healthz".to_owned());
    assert_eq!(probe(&agent.liveness_probe), Some(("/livez".to_owned(), healthz.clone())));
    assert_eq!(probe(&agent.readiness_probe), Some(("/readyz".to_owned(), healthz)));
    let port = agent.ports.iter().flatten().find(|port| port.name.as_deref() == Some("healthz"));
    assert_eq!(port.map(|port| port.container_port), Some(i32::from(proxy_agent::health::DEFAULT_PORT)));

    // Selected are the pods of its template; they are this account, which has this role.
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
    Ok(())
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
    let text = |patch: &Value| patch["patch"].as_str().unwrap_or_default().to_owned();
    let daemon_set: Value = serde_saphyr::from_str(&text(&patches[0]))?;
    let deployment = Deployment::read()?;
    assert_eq!(daemon_set["kind"], "DaemonSet");
    assert_eq!(daemon_set["metadata"]["name"].as_str(), deployment.daemon_set.metadata.name.as_deref());
    let volumes = &daemon_set["spec"]["template"]["spec"]["volumes"];
    assert_eq!(*volumes, json!([{ "name": "config", "configMap": { "name": "kube-proxy" } }]));
    let of_base = deployment.pod()?.volumes.iter().flatten().find(|volume| volume.name == "config");
    assert!(of_base.is_some_and(|volume| volume.config_map.is_some()), "the volume that is replaced");
    Ok(())
}
