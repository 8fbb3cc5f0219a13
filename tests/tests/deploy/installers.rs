//! Installers: the way that each runs kube-proxy, and what the image, the patch in `deploy/in-place` and
//! `deploy/from-kube-proxy.md` make of it.
//!
//! The pods are short forms, in our own words, of an installer's manifests: how kube-proxy is started, what is
//! mounted and what the container may do. The comment beside each pod gives its source.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::PodSpec;
use proxy_agent::config::args::kube_proxy_flags;
use proxy_tests::deployment::{directory, patched, strictly};
use serde_json::{Value, json};

/// Ways in which Vipr takes the place of kube-proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By the patch of its DaemonSet.
    Patch,
    /// By settings of the installer, which mounts more into its pod.
    Settings,
    /// kube-proxy is switched off, and `deploy/base` takes its place.
    Off,
    /// kube-proxy cannot be switched off: `deploy/beside-kube-proxy`.
    Beside,
}

struct Installer {
    /// Heading in from-kube-proxy.md.
    name: &'static str,
    way: Way,
    /// kube-proxy's container and the pod's volumes.
    pod: &'static str,
    /// Configuration that kube-proxy is given: its file, or the pods' addresses by flag. `None` if a shell starts it.
    takes: Option<&'static str>,
    /// Text that from-kube-proxy.md must contain below the heading.
    said: &'static [&'static str],
}

const KUBEADM: &str = "
containers:
- name: kube-proxy
  image: registry.k8s.io/kube-proxy:v1.36.0
  command: [/usr/local/bin/kube-proxy, --config=/var/lib/kube-proxy/config.conf, --hostname-override=$(NODE_NAME)]
  securityContext: { privileged: true }
  volumeMounts:
  - { name: kube-proxy, mountPath: /var/lib/kube-proxy }
  - { name: xtables-lock, mountPath: /run/xtables.lock }
  - { name: lib-modules, mountPath: /lib/modules, readOnly: true }
volumes:
- { name: kube-proxy, configMap: { name: kube-proxy } }
- { name: xtables-lock, hostPath: { path: /run/xtables.lock, type: FileOrCreate } }
- { name: lib-modules, hostPath: { path: /lib/modules } }
";

const INSTALLERS: [Installer; 10] = [
    // kubernetes/kubernetes, cmd/kubeadm/app/phases/addons/proxy/manifests.go at abd60651f20b.
    Installer {
        name: "kubeadm, and kind",
        way: Way::Patch,
        pod: KUBEADM,
        takes: Some("/var/lib/kube-proxy/config.conf"),
        said: &["kubectl apply -k deploy/kubeadm", "--skip-phases=addon/kube-proxy", "kubeProxyMode: none"],
    },
    // As `kubectl describe` shows v1.34.3-eksbuild.5.
    Installer {
        name: "EKS",
        way: Way::Patch,
        pod: "
containers:
- name: kube-proxy
  image: eks/kube-proxy:v1.34.3-minimal-eksbuild.5
  command: [kube-proxy, --v=2, --config=/var/lib/kube-proxy-config/config, --hostname-override=$(NODE_NAME)]
  securityContext: { privileged: true }
  volumeMounts:
  - { name: varlog, mountPath: /var/log }
  - { name: xtables-lock, mountPath: /run/xtables.lock }
  - { name: lib-modules, mountPath: /lib/modules, readOnly: true }
  - { name: kubeconfig, mountPath: /var/lib/kube-proxy/ }
  - { name: config, mountPath: /var/lib/kube-proxy-config/ }
volumes:
- { name: varlog, hostPath: { path: /var/log } }
- { name: xtables-lock, hostPath: { path: /run/xtables.lock, type: FileOrCreate } }
- { name: lib-modules, hostPath: { path: /lib/modules } }
- { name: kubeconfig, configMap: { name: kube-proxy } }
- { name: config, configMap: { name: kube-proxy-config } }
",
        takes: Some("/var/lib/kube-proxy-config/config"),
        said: &["aws eks delete-addon --cluster-name NAME --addon-name kube-proxy --preserve"],
    },
    // k3s-io/k3s, pkg/daemons/agent/agent_linux.go at 82394d7d3642: in the process of k3s, there is no pod.
    Installer {
        name: "k3s",
        way: Way::Off,
        pod: "
containers:
- name: kube-proxy
  command: [kube-proxy]
  args:
  - --cluster-cidr=10.42.0.0/16
  - --conntrack-max-per-core=0
  - --conntrack-tcp-timeout-close-wait=0s
  - --conntrack-tcp-timeout-established=0s
  - --healthz-bind-address=127.0.0.1
  - --hostname-override=n1
  - --kubeconfig=/var/lib/rancher/k3s/agent/kubeproxy.kubeconfig
  - --proxy-mode=iptables
",
        takes: Some("10.42.0.0/16"),
        said: &["disable-kube-proxy: true", "/etc/rancher/k3s/config.yaml"],
    },
    // rancher/rke2, pkg/podtemplate/{spec,podtemplate}.go and pkg/executor/staticpod at 6ce1a8019e9d.
    // The arguments are k3s'.
    Installer {
        name: "RKE2",
        way: Way::Settings,
        pod: "
containers:
- name: kube-proxy
  command: [kube-proxy]
  args:
  - --cluster-cidr=10.42.0.0/16
  - --conntrack-max-per-core=0
  - --conntrack-tcp-timeout-close-wait=0s
  - --conntrack-tcp-timeout-established=0s
  - --healthz-bind-address=127.0.0.1
  - --hostname-override=n1
  - --kubeconfig=/var/lib/rancher/rke2/agent/kubeproxy.kubeconfig
  - --proxy-mode=iptables
  ports:
  - { name: metrics, containerPort: 10256 }
  securityContext: { privileged: true }
  volumeMounts: []
volumes: []
",
        takes: Some("10.42.0.0/16"),
        said: &["disable-kube-proxy: true", "/etc/rancher/rke2/config.yaml", "kube-proxy-image:", "kube-proxy-extra-mount:"],
    },
    // An AKS node of v1.29.7, as `kubectl describe` shows it.
    Installer {
        name: "AKS",
        way: Way::Off,
        pod: "
containers:
- name: kube-proxy
  command:
  - kube-proxy
  - --conntrack-max-per-core=0
  - --metrics-bind-address=0.0.0.0:10249
  - --cluster-cidr=10.251.0.0/16
  - --detect-local-mode=InterfaceNamePrefix
  - --pod-interface-name-prefix=azv
  - --v=3
",
        takes: Some("10.251.0.0/16"),
        said: &["az aks update", "--kube-proxy-config", "KubeProxyConfigurationPreview", "\"enabled\": false"],
    },
    // kubernetes/kubernetes, cluster/gce/manifests/kube-proxy.manifest at 78fc8e44052f.
    Installer {
        name: "GKE",
        way: Way::Beside,
        pod: "
containers:
- name: kube-proxy
  command:
  - /bin/sh
  - -c
  - exec kube-proxy --kubeconfig=/var/lib/kube-proxy/kubeconfig --cluster-cidr=10.4.0.0/14 1>>/var/log/kube-proxy.log 2>&1
",
        takes: None,
        said: &["components: [../beside-kube-proxy]", "Dataplane V2"],
    },
    // kubernetes/kops, nodeup/pkg/model/kube_proxy.go at 268927e26409.
    Installer {
        name: "kops",
        way: Way::Off,
        pod: "
containers:
- name: kube-proxy
  command: [/go-runner]
  args:
  - --log-file=/var/log/kube-proxy.log
  - --also-stdout
  - /usr/local/bin/kube-proxy
  - --cluster-cidr=100.96.0.0/11
  - --conntrack-max-per-core=131072
  - --kubeconfig=/var/lib/kube-proxy/kubeconfig
  - --master=https://127.0.0.1
  - --oom-score-adj=-998
  - --v=2
",
        takes: Some("100.96.0.0/11"),
        said: &["kops edit cluster", "enabled: false", "kops rolling-update cluster --yes"],
    },
    // siderolabs/talos, internal/app/machined/pkg/controllers/k8s/internal/k8stemplates at ad8823176e75.
    Installer {
        name: "Talos",
        way: Way::Off,
        pod: "
containers:
- name: kube-proxy
  command: [/usr/local/bin/kube-proxy, --config=/var/lib/kube-proxy/config.conf, --hostname-override=$(NODE_NAME)]
",
        takes: Some("/var/lib/kube-proxy/config.conf"),
        said: &["disabled: true", "kind: KubeProxyConfig", "https://127.0.0.1:7445", "delete daemonset kube-proxy"],
    },
    // openshift/cluster-network-operator, bindata/kube-proxy/kube-proxy.yaml at 2a6a57fef3ac.
    Installer {
        name: "OpenShift",
        way: Way::Off,
        pod: "
containers:
- name: kube-proxy
  command:
  - /bin/bash
  - -c
  - exec /usr/bin/kube-proxy --config=/config/kube-proxy-config.yaml --hostname-override \"${K8S_NODE_NAME}\"
",
        takes: None,
        said: &["\"deployKubeProxy\":false", "adm policy add-scc-to-user privileged"],
    },
    // kubernetes/kubernetes, component-base/logs/kube-log-runner: a manifest that names it as its README does.
    Installer {
        name: "Others",
        way: Way::Off,
        pod: "
containers:
- name: kube-proxy
  command: [/go-runner, -log-file, /var/log/kube-proxy.log, --also-stdout=true, --redirect-stderr=true, --]
  args: [/usr/local/bin/kube-proxy, --hostname-override=$(NODE_NAME), --config=/var/lib/kube-proxy/config.conf]
",
        takes: Some("/var/lib/kube-proxy/config.conf"),
        said: &["deploy/base"],
    },
];

fn repository(path: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

impl Installer {
    fn pod(&self) -> Result<Value> {
        serde_saphyr::from_str(self.pod).context(self.name)
    }

    /// Returns the command line that the container runtime starts.
    fn line(&self) -> Result<Vec<OsString>> {
        let pod = self.pod()?;
        let words =
            ["command", "args"].into_iter().filter_map(|field| pod["containers"][0][field].as_array());
        words
            .flatten()
            .map(|word| Ok(word.as_str().context("a word")?.replace("$(NODE_NAME)", "n1").into()))
            .collect()
    }

    /// Returns the part of from-kube-proxy.md below the heading.
    fn section(&self) -> Result<String> {
        let text = fs::read_to_string(directory().join("from-kube-proxy.md"))?;
        let (_, rest) = text.split_once(&format!("\n### {}\n", self.name)).context(self.name)?;
        let end = ["\n### ", "\n## "].iter().filter_map(|heading| rest.find(heading)).min();
        Ok(rest[..end.unwrap_or(rest.len())].to_owned())
    }
}

#[test]
fn each_command_line_is_taken_as_it_is() -> Result<()> {
    for installer in &INSTALLERS {
        let Some(want) = installer.takes else { continue };
        let parsed = kube_proxy_flags(installer.line()?).with_context(|| installer.name)?;
        let Some(flags) = parsed else { anyhow::bail!("{}: not run", installer.name) };
        let file = flags.config().map(|path| path.display().to_string());
        assert_eq!(file.or_else(|| flags.cluster_cidr.clone()).as_deref(), Some(want), "{}", installer.name);
        // Name of the node, if the manifest gives it.
        if installer.pod.contains("hostname-override") {
            assert_eq!(flags.hostname_override.as_deref(), Some("n1"), "{}", installer.name);
        }
    }
    Ok(())
}

#[test]
fn the_image_has_every_program_that_is_named_and_no_shell() -> Result<()> {
    let containerfile = repository("Containerfile")?;
    let (_, image) = containerfile.split_once("mkdir -p /image").context("the image's files")?;
    let files: BTreeSet<&str> = image
        .split([' ', '\n'])
        .filter_map(|word| word.strip_prefix("/image"))
        .filter(|file| file.len() > 1)
        .collect();
    let path = image.split_once("ENV PATH=").and_then(|(_, rest)| rest.lines().next()).context("a PATH")?;
    for installer in &INSTALLERS {
        let program = installer.line()?.remove(0).into_string().ok().context("a name")?;
        let there = match program.starts_with('/') {
            true => files.contains(program.as_str()),
            false => path.split(':').any(|dir| files.contains(format!("{dir}/{program}").as_str())),
        };
        assert_eq!(there, installer.takes.is_some(), "{}: {program} in {files:?}", installer.name);
    }
    assert!(image.contains("COPY --from=build /image/ /\n"), "{image}");
    Ok(())
}

fn daemon_set(pod: Value) -> Value {
    let labels = json!({ "k8s-app": "kube-proxy" });
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": { "name": "kube-proxy", "namespace": "kube-system" },
        "spec": { "selector": { "matchLabels": labels }, "template": { "metadata": { "labels": labels }, "spec": pod } },
    })
}

/// Returns the path in the container of a directory of the host, and whether mounts made there reach the host.
fn mounted(pod: &PodSpec, host: &str) -> Option<(String, bool)> {
    let volume = pod
        .volumes
        .iter()
        .flatten()
        .find(|volume| volume.host_path.as_ref().is_some_and(|source| source.path == host))?;
    let mount = pod.containers[0].volume_mounts.iter().flatten().find(|mount| mount.name == volume.name)?;
    Some((mount.mount_path.clone(), mount.mount_propagation.as_deref() == Some("Bidirectional")))
}

#[test]
fn the_patch_makes_pods_whose_pins_last() -> Result<()> {
    let patch = fs::read_to_string(directory().join("in-place/kube-proxy.yaml"))?;
    let with_patch: Vec<&Installer> = INSTALLERS.iter().filter(|one| one.way == Way::Patch).collect();
    assert_eq!(with_patch.len(), 2);
    for installer in with_patch {
        let before = daemon_set(installer.pod()?);
        let after: DaemonSet = strictly(&patched(&before, &patch)?).context(installer.name)?;
        let before: DaemonSet = strictly(&before)?;
        let [before, after] = [before, after].map(|set| set.spec.template.spec.unwrap_or_default());
        let image = format!("localhost/vipr:{}", env!("CARGO_PKG_VERSION"));
        assert_eq!(after.containers[0].image, Some(image), "{}", installer.name);
        assert_eq!(after.containers[0].command, before.containers[0].command, "{}", installer.name);
        assert_eq!(after.host_pid, Some(true), "{}", installer.name);
        for (dir, is_shared) in [("/sys/fs/bpf", true), ("/sys/fs/cgroup", false), ("/run/vipr", false)] {
            assert_eq!(mounted(&after, dir), Some((dir.to_owned(), is_shared)), "{}", installer.name);
        }
        // The mounts of before are still there, and none is there twice.
        let mounts: Vec<String> = after.containers[0]
            .volume_mounts
            .iter()
            .flatten()
            .map(|mount| mount.mount_path.clone())
            .collect();
        let own = before.containers[0].volume_mounts.iter().flatten();
        assert!(own.clone().all(|mount| mounts.contains(&mount.mount_path)), "{}", installer.name);
        assert_eq!(mounts.len(), own.count() + 3, "{}", installer.name);
        assert_eq!(mounts.iter().collect::<BTreeSet<_>>().len(), mounts.len(), "{}", installer.name);
        let probe = after.containers[0].readiness_probe.clone().and_then(|probe| probe.http_get);
        assert_eq!(probe.and_then(|get| get.path).as_deref(), Some("/readyz"), "{}", installer.name);
        let section = installer.section()?;
        assert!(section.contains("--patch-file deploy/in-place/kube-proxy.yaml"), "{section}");
    }
    Ok(())
}

#[test]
fn the_patch_refuses_a_container_that_may_mount_nothing() -> Result<()> {
    let patch = fs::read_to_string(directory().join("in-place/kube-proxy.yaml"))?;
    let mut pod: Value = serde_saphyr::from_str(KUBEADM)?;
    pod["containers"][0]["securityContext"] =
        json!({ "capabilities": { "add": ["NET_ADMIN", "SYS_MODULE"] } });
    let error = patched(&daemon_set(pod), &patch).err().context("it fits")?;
    ensure!(format!("{error:#}").contains("test"), "{error:#}");
    let mut pod: Value = serde_saphyr::from_str(KUBEADM)?;
    pod["containers"][0]["name"] = json!("istio");
    assert!(patched(&daemon_set(pod), &patch).is_err());
    Ok(())
}

#[test]
fn rke2_mounts_what_its_settings_say() -> Result<()> {
    let rke2 = INSTALLERS.iter().find(|one| one.way == Way::Settings).context("RKE2")?;
    let section = rke2.section()?;
    let (_, rest) = section.split_once("kube-proxy-image:").context("the settings")?;
    let (settings, _) = rest.split_once("```").context("their end")?;
    let settings: Value = serde_saphyr::from_str(&format!("kube-proxy-image:{settings}"))?;
    let mut pod = rke2.pod()?;
    for (number, mount) in settings["kube-proxy-extra-mount"].as_array().context("mounts")?.iter().enumerate()
    {
        let (host, inside) = mount.as_str().and_then(|mount| mount.split_once(':')).context("two paths")?;
        let name = format!("extra-mount-{number}");
        let lists = [
            ("/containers/0/volumeMounts", json!({ "name": name, "mountPath": inside })),
            ("/volumes", json!({ "name": name, "hostPath": { "path": host } })),
        ];
        for (list, item) in lists {
            pod.pointer_mut(list).and_then(Value::as_array_mut).context("a list")?.push(item);
        }
    }
    let pod: PodSpec = strictly(&pod)?;
    for dir in ["/sys/fs/bpf", "/run/vipr"] {
        assert_eq!(mounted(&pod, dir), Some((dir.to_owned(), false)));
    }
    // There is no mount propagation, so the host must have mounted the file system itself.
    assert!(section.contains("stat -fc %T /sys/fs/bpf"), "{section}");
    Ok(())
}

#[test]
fn the_guide_says_what_to_do_for_each() -> Result<()> {
    for installer in &INSTALLERS {
        let section = installer.section()?;
        for words in installer.said {
            assert!(section.contains(words), "{}: {words} is not in {section}", installer.name);
        }
    }
    Ok(())
}

#[test]
fn no_document_promises_that_an_image_is_enough() -> Result<()> {
    for file in [
        "README.md",
        "Containerfile",
        "docs/configuration.md",
        "docs/operations.md",
        "deploy/from-kube-proxy.md",
    ] {
        let text = repository(file)?.replace('\n', " ").to_lowercase();
        for promise in ["enough to replace the image", "when its image is replaced", "replace only the image"]
        {
            assert!(!text.contains(promise), "{file}: {promise}");
        }
    }
    Ok(())
}
