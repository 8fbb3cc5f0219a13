//! A copy of the example manifests that can be changed while agents read it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::lab::NodeSpec;

/// File that all others need.
const CLUSTER: &str = "00-cluster.yaml";

/// Returns the directory of the examples in the source tree.
pub fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

/// Returns an endpoint of an EndpointSlice: one address of a pod.
pub fn endpoint(pod: &str, node: &str, address: &str) -> Value {
    json!({
        "addresses": [address],
        "nodeName": node,
        "conditions": { "ready": true },
        "targetRef": { "kind": "Pod", "name": pod },
    })
}

/// A server on one address.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) address: IpAddr,
    /// Name of the pod, if the server is a pod.
    pub(super) pod: Option<String>,
    /// Name of the server's node.
    pub(super) node: Option<String>,
    /// Kind of each server (a word of `lab-pod serve --help`), and its port.
    pub(super) ports: BTreeSet<(&'static str, u16)>,
}

/// A directory of manifests.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    /// Copies files of `examples/` (by default all of them), and the file that all of them need, into a new directory.
    ///
    /// # Errors
    /// If a file is missing.
    pub fn copy(dir: &Path, files: &[&str]) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let manifests = Self { dir: dir.to_path_buf() };
        let mut names: Vec<String> = files.iter().map(|&name| name.to_owned()).collect();
        if names.is_empty() {
            names = names_in(&examples())?;
        }
        names.push(CLUSTER.to_owned());
        names.iter().try_for_each(|name| manifests.restore(name))?;
        Ok(manifests)
    }

    /// Returns the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Replaces a file by the one of `examples/`.
    ///
    /// # Errors
    /// If `examples/` has no such file.
    pub fn restore(&self, file: &str) -> Result<()> {
        let original = examples().join(file);
        let text = fs::read_to_string(&original).with_context(|| original.display().to_string())?;
        self.write(file, &text)
    }

    /// Writes a file under another name and renames it into place, as editors do.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let beside = self.dir.join(format!(".{file}.new"));
        fs::write(&beside, text).with_context(|| beside.display().to_string())?;
        fs::rename(&beside, self.dir.join(file)).with_context(|| file.to_owned())
    }

    /// Removes a file.
    ///
    /// # Errors
    /// If the file does not exist.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.dir.join(file)).with_context(|| file.to_owned())
    }

    /// Returns the objects of a file.
    ///
    /// # Errors
    /// If the file cannot be read or is not YAML.
    pub fn objects(&self, file: &str) -> Result<Vec<Value>> {
        let path = self.dir.join(file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        serde_saphyr::from_multiple(&text).with_context(|| path.display().to_string())
    }

    /// Returns the objects of all files, in their order.
    ///
    /// # Errors
    /// As [`Manifests::objects`].
    pub fn all(&self) -> Result<Vec<Value>> {
        let mut all = Vec::new();
        for file in names_in(&self.dir)? {
            all.extend(self.objects(&file)?);
        }
        Ok(all)
    }

    /// Replaces the objects of a file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn put(&self, file: &str, objects: &[Value]) -> Result<()> {
        self.write(file, &serde_saphyr::to_string_multiple(objects)?)
    }

    /// Changes the objects of a file.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn change(&self, file: &str, change: impl FnOnce(&mut Vec<Value>)) -> Result<()> {
        let mut objects = self.objects(file)?;
        change(&mut objects);
        self.put(file, &objects)
    }

    /// Changes the only object of a kind in a file.
    ///
    /// # Errors
    /// If the file has no such object, or cannot be read or written.
    pub fn change_one(&self, file: &str, kind: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut objects = self.objects(file)?;
        let object = objects.iter_mut().find(|object| object["kind"] == kind);
        change(object.with_context(|| format!("no {kind} in {file}"))?);
        self.put(file, &objects)
    }

    /// Changes `spec` of the Service in a file; `null` removes a field.
    ///
    /// # Errors
    /// As [`Manifests::change_one`].
    pub fn patch_service(&self, file: &str, patch: &Value) -> Result<()> {
        self.change_one(file, "Service", |service| merge(&mut service["spec"], patch))
    }

    /// Replaces the endpoints of the EndpointSlice in a file.
    ///
    /// # Errors
    /// As [`Manifests::change_one`].
    pub fn set_endpoints(&self, file: &str, endpoints: Vec<Value>) -> Result<()> {
        self.change_one(file, "EndpointSlice", |slice| slice["endpoints"] = endpoints.into())
    }

    /// Sets whether the endpoint with this address is ready, in the EndpointSlice of a file.
    ///
    /// # Errors
    /// As [`Manifests::change_one`].
    pub fn set_ready(&self, file: &str, address: &str, ready: bool) -> Result<()> {
        self.change_one(file, "EndpointSlice", |slice| {
            let endpoints = slice["endpoints"].as_array_mut().into_iter().flatten();
            for endpoint in endpoints.filter(|endpoint| endpoint["addresses"][0] == address) {
                endpoint["conditions"]["ready"] = ready.into();
            }
        })
    }

    /// Returns the nodes.
    pub(super) fn nodes(&self) -> Result<Vec<NodeSpec>> {
        let objects = self.objects(CLUSTER)?;
        let nodes = objects.iter().filter(|object| object["kind"] == "Node");
        nodes
            .map(|node| {
                let name = node["metadata"]["name"].as_str().unwrap_or_default();
                let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
                let internal: Vec<&str> = addresses
                    .filter(|address| address["type"] == "InternalIP")
                    .filter_map(|address| address["address"].as_str())
                    .collect();
                let cidrs = node["spec"]["podCIDRs"].as_array().into_iter().flatten();
                NodeSpec::new(name, &internal, &cidrs.filter_map(Value::as_str).collect::<Vec<_>>())
            })
            .collect()
    }

    /// Returns a member for each address in EndpointSlices, Pods and Endpoints.
    pub(super) fn members(&self) -> Result<Vec<Member>> {
        let mut members = BTreeMap::new();
        for object in self.all()? {
            match object["kind"].as_str() {
                Some("EndpointSlice") => {
                    for endpoint in list(&object["endpoints"]) {
                        add(&mut members, &endpoint["addresses"][0], endpoint, list(&object["ports"]))?;
                    }
                }
                Some("Pod") => add_pod(&mut members, &object)?,
                Some("Endpoints") => {
                    for subset in list(&object["subsets"]) {
                        for address in list(&subset["addresses"]) {
                            add(&mut members, &address["ip"], address, list(&subset["ports"]))?;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(members.into_values().collect())
    }
}

fn add(
    members: &mut BTreeMap<IpAddr, Member>,
    address: &Value,
    endpoint: &Value,
    ports: &[Value],
) -> Result<()> {
    let address: IpAddr = address.as_str().unwrap_or_default().parse().context("an endpoint's address")?;
    let member = members.entry(address).or_insert_with(|| Member {
        address,
        pod: text(&endpoint["targetRef"]["name"]),
        node: text(&endpoint["nodeName"]),
        ports: BTreeSet::new(),
    });
    for port in ports {
        let kind = match (port["protocol"].as_str(), port["name"].as_str()) {
            (Some("UDP"), _) => "udp",
            (_, Some("redis")) => "redis",
            (_, Some("dns-tcp")) => "tcp",
            _ => "http",
        };
        let number = port["port"].as_u64().and_then(|number| u16::try_from(number).ok());
        member.ports.insert((kind, number.with_context(|| format!("the port of {address}"))?));
    }
    Ok(())
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// Adds a Pod with the ports of its containers.
fn add_pod(members: &mut BTreeMap<IpAddr, Member>, pod: &Value) -> Result<()> {
    let containers = list(&pod["spec"]["containers"]).iter();
    let ports = containers.flat_map(|container| list(&container["ports"])).map(
        |port| json!({ "name": port["name"], "protocol": port["protocol"], "port": port["containerPort"] }),
    );
    let ports: Vec<Value> = ports.collect();
    let endpoint = json!({
        "nodeName": pod["spec"]["nodeName"],
        "targetRef": { "name": pod["metadata"]["name"] },
    });
    add(members, &pod["status"]["podIP"], &endpoint, &ports)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Applies a JSON Merge Patch (RFC 7386) for objects.
fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    for (field, value) in fields {
        if value.is_null() {
            if let Some(object) = target.as_object_mut() {
                object.remove(field);
            }
        } else {
            merge(&mut target[field.as_str()], value);
        }
    }
}

/// Returns the names of the manifests in a directory, sorted.
fn names_in(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".yaml") && !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_can_be_read_and_its_pods_have_one_address_each() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let manifests = Manifests::copy(dir.path(), &[])?;
        let readme = fs::read_to_string(examples().join("README.md"))?;
        for name in names_in(dir.path())? {
            assert!(readme.contains(&format!("]({name})")), "README.md does not mention {name}");
        }
        let mut pods = BTreeSet::new();
        for member in manifests.members()? {
            if let Some(pod) = member.pod {
                assert!(pods.insert(pod.clone()), "{pod} has two addresses");
            }
        }
        assert!(pods.contains("kubia-7nog1"), "{pods:?}");
        assert_eq!(manifests.nodes()?.len(), 2);
        Ok(())
    }

    #[test]
    fn a_change_is_written_as_yaml_that_says_the_same() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let file = "s01-clusterip.yaml";
        let manifests = Manifests::copy(dir.path(), &[file])?;
        let before = manifests.objects(file)?;
        manifests.change(file, |_| {})?;
        assert_eq!(manifests.objects(file)?, before);
        manifests.patch_service(file, &json!({ "clusterIP": "10.96.1.1", "selector": null }))?;
        let spec = &manifests.objects(file)?[0]["spec"];
        assert_eq!((&spec["clusterIP"], &spec["selector"]), (&json!("10.96.1.1"), &Value::Null));
        Ok(())
    }
}
