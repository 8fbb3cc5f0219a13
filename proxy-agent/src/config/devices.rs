//! Flags that select the devices for Service traffic: `--devices`, `--pod-interfaces` and detect-local.

use crate::bpf::pins::PinDir;
use crate::config::kube_proxy::Invalid;

/// Value of `--devices` or `--pod-interfaces`: selection by the state of the network, or by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Selection {
    /// Chosen from links, addresses and routes.
    #[default]
    Auto,
    /// Interfaces that match one of these patterns; no interface if there are no patterns.
    Named(Vec<Pattern>),
}

/// An interface name, or a prefix of interface names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    text: String,
    prefix: bool,
}

/// Settings of the packet edge.
#[derive(Clone, Debug)]
pub(crate) struct Devices {
    /// Settings from the flags.
    pub(crate) settings: Settings,
    /// Whether clsact filters are attached even if the kernel has TCX.
    pub(crate) no_tcx: bool,
    /// Directory in which links and `DEVICES` are pinned.
    pub(crate) pins: PinDir,
}

/// A flag that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SettingsError {
    /// `auto` or `none` beside other words.
    #[error("{flag}: `{word}` cannot be combined with names; give it alone")]
    NotAlone {
        /// The flag.
        flag: &'static str,
        /// The word.
        word: &'static str,
    },
    /// A name that no interface can have.
    #[error("{flag}: `{name}` is no interface name (1 to 15 characters, neither `/` nor white space)")]
    Name {
        /// The flag.
        flag: &'static str,
        /// The given name.
        name: String,
    },
}

/// `--detect-local-mode`: definition of the traffic of local pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum DetectLocal {
    /// Traffic from `--cluster-cidr`.
    #[default]
    ClusterCidr,
    /// Traffic from the Node's podCIDRs.
    NodeCidr,
    /// Traffic that enters through the interface of this name.
    Bridge(String),
    /// Traffic that enters through an interface whose name has this prefix.
    NamePrefix(String),
}

/// Settings of the three flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// `--devices`: devices that lead to clients and to other nodes.
    pub(crate) devices: Selection,
    /// `--pod-interfaces`: the host's side of pods.
    pub(crate) pods: Selection,
    /// Detect-local.
    pub(crate) detect_local: DetectLocal,
}

impl Selection {
    /// Parses the values of `flag`. With `prefixes`, every name is a prefix of interface names.
    ///
    /// # Errors
    ///
    /// [`SettingsError`] names the flag and the value.
    pub(crate) fn parse(
        flag: &'static str,
        values: &[String],
        prefixes: bool,
    ) -> Result<Self, SettingsError> {
        let values: Vec<&str> = values.iter().map(|value| value.trim()).filter(|v| !v.is_empty()).collect();
        for word in ["auto", "none"] {
            if values.contains(&word) && values.len() > 1 {
                return Err(SettingsError::NotAlone { flag, word });
            }
        }
        match values.as_slice() {
            [] | ["auto"] => Ok(Self::Auto),
            ["none"] => Ok(Self::Named(Vec::new())),
            names => {
                let patterns = names.iter().map(|name| Pattern::parse(flag, name, prefixes));
                Ok(Self::Named(patterns.collect::<Result<_, _>>()?))
            }
        }
    }

    /// Returns whether the selection is `none`.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::Named(Vec::new())
    }

    /// Returns whether a pattern matches `name`.
    pub(crate) fn names(&self, name: &str) -> bool {
        self.patterns().iter().any(|pattern| pattern.matches(name))
    }

    /// Returns the selected names, without prefixes, that no interface in `names` has.
    pub(crate) fn missing<'a>(
        &'a self,
        names: impl Iterator<Item = &'a str> + Clone,
    ) -> impl Iterator<Item = &'a str> {
        let patterns = self.patterns().iter().filter(|pattern| !pattern.prefix);
        let missing = patterns.filter(move |pattern| !names.clone().any(|name| pattern.matches(name)));
        missing.map(|pattern| pattern.text.as_str())
    }

    fn patterns(&self) -> &[Pattern] {
        match self {
            Self::Auto => &[],
            Self::Named(patterns) => patterns,
        }
    }
}

impl Pattern {
    fn parse(flag: &'static str, name: &str, prefix: bool) -> Result<Self, SettingsError> {
        let text = name.strip_suffix(['+', '*']);
        let prefix = prefix || text.is_some();
        let text = text.unwrap_or(name);
        // IFNAMSIZ of linux/if.h includes the terminating NUL.
        let valid = (1..=15).contains(&text.len()) && !text.contains(|c: char| c == '/' || c.is_whitespace());
        if !valid {
            return Err(SettingsError::Name { flag, name: name.to_owned() });
        }
        Ok(Self { text: text.to_owned(), prefix })
    }

    fn matches(&self, name: &str) -> bool {
        if self.prefix { name.starts_with(&self.text) } else { name == self.text }
    }
}

impl DetectLocal {
    /// Parses the mode and the names that belong to it. An empty mode means ClusterCIDR.
    ///
    /// # Errors
    ///
    /// The mode is unknown, or the name that it needs is empty.
    pub(crate) fn parse(mode: &str, bridge: &str, prefix: &str) -> Result<Self, Invalid> {
        const MODES: &str = "must be ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix";
        let named = |field, name: &str| match name.trim() {
            "" => Err(Invalid::new(field, name, format!("must be a name with detectLocalMode {mode}"))),
            name => Ok(name.to_owned()),
        };
        match mode {
            "" | "ClusterCIDR" => Ok(Self::ClusterCidr),
            "NodeCIDR" => Ok(Self::NodeCidr),
            "BridgeInterface" => named("detectLocal.bridgeInterface", bridge).map(Self::Bridge),
            "InterfaceNamePrefix" => named("detectLocal.interfaceNamePrefix", prefix).map(Self::NamePrefix),
            other => Err(Invalid::new("detectLocalMode", other, MODES)),
        }
    }

    /// Returns whether pods are recognized by the interface that their packets enter through, not by their addresses.
    pub(crate) fn by_interface(&self) -> bool {
        match self {
            Self::ClusterCidr | Self::NodeCidr => false,
            Self::Bridge(_) | Self::NamePrefix(_) => true,
        }
    }

    /// Returns whether packets that the network stack sees entering through `name` are traffic of local pods.
    pub(crate) fn names(&self, name: &str) -> bool {
        match self {
            Self::ClusterCidr | Self::NodeCidr => false,
            Self::Bridge(bridge) => name == bridge,
            Self::NamePrefix(prefix) => name.starts_with(prefix.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flag: &'static str, text: &str, prefixes: bool) -> Result<Selection, SettingsError> {
        Selection::parse(flag, &text.split(',').map(str::to_owned).collect::<Vec<_>>(), prefixes)
    }

    #[test]
    fn names_and_beginnings_of_names() {
        let devices = parse("--devices", "eth0, bond+,wg*", false).unwrap();
        for (name, want) in [
            ("eth0", true),
            ("eth01", false),
            ("bond12", true),
            ("bond", true),
            ("wg0", true),
            ("xwg0", false),
        ] {
            assert_eq!(devices.names(name), want, "{name}");
        }
        assert_eq!(devices.missing(["eth1", "bond0"].into_iter()).collect::<Vec<_>>(), ["eth0"]);
        let pods = parse("--pod-interfaces", "cali,veth+", true).unwrap();
        assert!(pods.names("cali123") && pods.names("veth9") && !pods.names("eth0"));
        assert_eq!(pods.missing([].into_iter()).count(), 0);
    }

    #[test]
    fn auto_and_none_stand_alone() {
        assert_eq!(parse("--devices", "", false), Ok(Selection::Auto));
        assert_eq!(parse("--devices", "auto", false), Ok(Selection::Auto));
        let none = parse("--devices", "none", false).unwrap();
        assert!(none.is_none() && !none.names("eth0") && !none.names("none"));
        for wrong in ["auto,eth0", "eth0,none", "a/b", "+", "a name", "sixteen-letters-"] {
            let error = parse("--devices", wrong, false).unwrap_err().to_string();
            assert!(error.starts_with("--devices: "), "{wrong}: {error}");
        }
    }

    #[test]
    fn p240_detect_local_by_interface_needs_a_name() {
        let parse = DetectLocal::parse;
        assert_eq!(parse("", "", ""), Ok(DetectLocal::ClusterCidr));
        assert_eq!(parse("ClusterCIDR", "", ""), Ok(DetectLocal::ClusterCidr));
        assert_eq!(parse("NodeCIDR", "cni0", "veth"), Ok(DetectLocal::NodeCidr));
        assert_eq!(parse("BridgeInterface", "cni0", ""), Ok(DetectLocal::Bridge("cni0".to_owned())));
        assert_eq!(parse("InterfaceNamePrefix", "", "veth"), Ok(DetectLocal::NamePrefix("veth".to_owned())));
        for (mode, bridge, prefix, field) in [
            ("BridgeInterface", "", "veth", "detectLocal.bridgeInterface (--pod-bridge-interface): ``"),
            (
                "InterfaceNamePrefix",
                "cni0",
                " ",
                "detectLocal.interfaceNamePrefix (--pod-interface-name-prefix): ` `",
            ),
            ("nodecidr", "", "", "detectLocalMode (--detect-local-mode): `nodecidr`"),
        ] {
            let error = parse(mode, bridge, prefix).unwrap_err().to_string();
            assert!(error.starts_with(field), "{mode}: {error}");
        }
    }
}
