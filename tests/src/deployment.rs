//! The manifests in `deploy/`, parsed strictly, and their pod run in the lab: the agent with the DaemonSet's arguments,
//! mounts and capabilities, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container as ContainerSpec, PodSpec, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::lab::{Container, Exec, Node, binary, container};

/// Returns `deploy/` of the repository.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The objects of `deploy/base`.
#[derive(Debug)]
pub struct Deployment {
    /// The agent on every node.
    pub daemon_set: DaemonSet,
    /// Permissions of the agent.
    pub cluster_role: ClusterRole,
    /// Binding of the permissions to the account.
    pub binding: ClusterRoleBinding,
    /// ServiceAccount of the agent.
    pub account: ServiceAccount,
}

impl Deployment {
    /// Reads the files.
    ///
    /// # Errors
    /// With the file and the field that no Kubernetes type has.
    pub fn read() -> Result<Self> {
        let base = directory().join("base");
        let rbac = documents(&base.join("rbac.yaml"))?;
        let [account, cluster_role, binding] = rbac.as_slice() else {
            anyhow::bail!("rbac.yaml has {} objects", rbac.len());
        };
        let daemon_set = documents(&base.join("daemonset.yaml"))?;
        let [daemon_set] = daemon_set.as_slice() else {
            anyhow::bail!("daemonset.yaml has {} objects", daemon_set.len());
        };
        Ok(Self {
            daemon_set: strictly(daemon_set)?,
            cluster_role: strictly(cluster_role)?,
            binding: strictly(binding)?,
            account: strictly(account)?,
        })
    }

    /// Returns the pod that the DaemonSet creates on each node.
    ///
    /// # Errors
    /// If it has no specification.
    pub fn pod(&self) -> Result<&PodSpec> {
        self.daemon_set.spec.template.spec.as_ref().context("the DaemonSet has no pod")
    }

    /// Returns the agent's container.
    ///
    /// # Errors
    /// If there is not exactly one.
    pub fn agent(&self) -> Result<&ContainerSpec> {
        let containers = &self.pod()?.containers;
        ensure!(containers.len() == 1, "{} containers", containers.len());
        containers.first().context("no container")
    }

    /// Returns the capabilities of the agent's container.
    ///
    /// # Errors
    /// If the container does not drop all others.
    pub fn capabilities(&self) -> Result<BTreeSet<String>> {
        let context = self.agent()?.security_context.clone().unwrap_or_default();
        let capabilities = context.capabilities.unwrap_or_default();
        ensure!(capabilities.drop.is_some_and(|drop| drop == ["ALL"]), "not all capabilities are dropped");
        Ok(capabilities.add.into_iter().flatten().collect())
    }

    /// Returns the command that the container runtime would start on `node`, with `capabilities`. `sources` are the
    /// directories and files to mount, by the names of volumes.
    ///
    /// # Errors
    /// If a volume has no source, or the container needs something that the lab does not support.
    pub fn command(
        &self,
        node: &Node,
        sources: &BTreeMap<&str, PathBuf>,
        capabilities: &BTreeSet<String>,
    ) -> Result<Exec> {
        let spec = self.agent()?;
        let context = spec.security_context.clone().unwrap_or_default();
        ensure!(context.read_only_root_filesystem == Some(true), "the root file system is writable");
        ensure!(context.allow_privilege_escalation == Some(false), "privileges can be gained");
        ensure!(context.privileged.is_none() && context.run_as_user == Some(0), "not what the lab does");

        let mut container = Container::new(binary::proxy_agent()?)?;
        for mount in spec.volume_mounts.iter().flatten() {
            let source =
                sources.get(mount.name.as_str()).with_context(|| format!("volume {}", mount.name))?;
            container.mount(source, &mount.mount_path, mount.read_only == Some(true))?;
        }
        let account = sources.get(SERVICE_ACCOUNT).context("no service account")?;
        container.mount(account, SERVICE_ACCOUNT, true)?;
        for capability in capabilities {
            container.capability(capability)?;
        }
        let seccomp =
            context.seccomp_profile.context("the container does not say which system calls it may make")?;
        ensure!(seccomp.type_ == "RuntimeDefault", "seccomp: {}", seccomp.type_);
        container.seccomp_by_default()?;
        let mut command = node.host().command(container::PROGRAM);
        command.contained(container);
        for arg in spec.args.iter().flatten() {
            command.arg(arg.replace("$(NODE_NAME)", node.name()));
        }
        Ok(command)
    }
}

/// Path of the credentials of its ServiceAccount in every pod; also the name of their volume here.
pub const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Applies a JSON patch (RFC 6902), written in YAML, to a copy of `object`.
///
/// # Errors
/// If `patch` is not a patch, or does not fit the object.
pub fn patched(object: &Value, patch: &str) -> Result<Value> {
    let patch: json_patch::Patch = serde_saphyr::from_str(patch)?;
    let mut object = object.clone();
    json_patch::patch(&mut object, &patch).with_context(|| format!("{patch} on {object}"))?;
    Ok(object)
}

/// Parses the YAML documents of a file.
///
/// # Errors
/// If the file cannot be read, or is not YAML.
pub fn documents(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_saphyr::from_multiple(&text).with_context(|| path.display().to_string())
}

/// Parses an object as a `T` and checks that no field is lost.
///
/// # Errors
/// With both, if a field is missing in `T`.
pub fn strictly<T: DeserializeOwned + Serialize>(object: &Value) -> Result<T> {
    let read: T = serde_json::from_value(object.clone()).with_context(|| object.to_string())?;
    let written = serde_json::to_value(&read)?;
    ensure!(written == *object, "{object} has fields that Kubernetes does not know; it knows {written}");
    Ok(read)
}
