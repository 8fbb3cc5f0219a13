//! Pods and cgroups that opt out of the socket edge: which of them can, and which are told that they cannot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_common::abi::CgroupId;

use crate::host::cgroups::{Follower, Found, PODS_MAX, Place};
use crate::reconcile::cluster::Pod;
use crate::reconcile::plan::Sandbox;

/// Beginning of the problem of a pod whose sockets are served all the same, and the reason why no pod can opt out.
const CANNOT: &str = "cannot opt out of the socket edge";
const NOBODY_JUDGES: &str =
    "no interface of a pod is attached (--pod-interfaces), so nobody would serve its packets";

/// The pods that opt out, the cgroups that have been found, and what is in force.
#[derive(Debug)]
pub(super) struct OptOut {
    /// Finds the cgroups of pods, and those that opt out by their paths.
    follower: Follower,
    /// Findings of `follower`; `None` until it has looked.
    found: Option<Found>,
    /// The cgroups that have opted out; `None` until the pods are known.
    in_force: Option<BTreeSet<CgroupId>>,
}

/// Cgroups that opt out, and the problems of those that cannot.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Judgement {
    cgroups: BTreeSet<CgroupId>,
    /// Names of the pods and cgroups that opt out.
    pub(super) names: Vec<String>,
    /// Problems by object.
    pub(super) problems: BTreeMap<String, Vec<String>>,
}

impl OptOut {
    /// Makes the state in which nothing is known.
    pub(super) fn new(follower: Follower) -> Self {
        Self { follower, found: None, in_force: None }
    }

    /// Waits until the findings differ.
    pub(super) async fn changed(&mut self) -> Found {
        self.follower.changed().await
    }

    /// Takes in findings. Returns whether the sandboxes differ.
    pub(super) fn take(&mut self, found: Found) -> bool {
        let differ = self.found.as_ref().is_none_or(|before| before.sandboxes != found.sandboxes);
        self.found = Some(found);
        differ
    }

    /// Combines the pods that opt out with the cgroups that have been found. Returns the judgement, and whether it has
    /// changed what is in force. Until all pods and all their cgroups are known, there is none, and the entries of an
    /// earlier agent stay.
    pub(super) fn judge<'a>(
        &mut self,
        pods: impl Iterator<Item = &'a Pod> + Clone,
        all_listed: bool,
        pods_in_packets: bool,
    ) -> Option<(Judgement, bool)> {
        let own_network = pods.clone().filter(|pod| !pod.host_network);
        self.follower.want(own_network.clone().map(|pod| Arc::clone(&pod.uid)).collect());
        let found = self.found.as_ref().filter(|_| all_listed)?;
        if !own_network.into_iter().all(|pod| found.pods.contains_key(&pod.uid)) {
            return None;
        }
        let judgement = judge(pods, found, pods_in_packets);
        let differs = self.in_force.as_ref() != Some(&judgement.cgroups);
        self.in_force = Some(judgement.cgroups.clone());
        Some((judgement, differs))
    }

    /// Returns the cgroups that have opted out; `None` until the pods are known.
    pub(super) fn cgroups(&self) -> Option<&BTreeSet<CgroupId>> {
        self.in_force.as_ref()
    }

    /// Returns the sandboxes of pods; `None` until somebody has looked.
    pub(super) fn sandboxes(&self) -> Option<&BTreeMap<CgroupId, Sandbox>> {
        self.found.as_ref().map(|found| &found.sandboxes)
    }

    /// Returns the uids of the pods that have opted out.
    pub(super) fn pods(&self) -> BTreeSet<Arc<str>> {
        let (Some(found), Some(in_force)) = (&self.found, &self.in_force) else { return BTreeSet::new() };
        let pods = found
            .pods
            .iter()
            .filter(|(_, place)| matches!(place, Place::Cgroup(cgroup) if in_force.contains(cgroup)));
        pods.map(|(uid, _)| Arc::clone(uid)).collect()
    }
}

/// Decides which of the pods and cgroups opt out. None can unless the packet edge serves packets of pods.
fn judge<'a>(pods: impl Iterator<Item = &'a Pod>, found: &Found, pods_in_packets: bool) -> Judgement {
    let mut judgement = Judgement::default();
    for (path, cgroup) in &found.cgroups {
        let name = format!("cgroup {path}");
        if !pods_in_packets {
            judgement.refuse(name, NOBODY_JUDGES);
        } else if judgement.cgroups.len() >= PODS_MAX {
            judgement.refuse(name, "too many opt out");
        } else {
            judgement.cgroups.insert(*cgroup);
            judgement.names.push(name);
        }
    }
    for pod in pods {
        let problem = match found.pods.get(&pod.uid) {
            _ if pod.host_network => "it uses the host's network, whose packets nobody judges",
            _ if !pods_in_packets => NOBODY_JUDGES,
            Some(Place::Cgroup(_)) if judgement.cgroups.len() >= PODS_MAX => "too many pods opt out",
            Some(Place::Cgroup(cgroup)) => {
                judgement.cgroups.insert(*cgroup);
                judgement.names.push(pod.key.to_string());
                continue;
            }
            Some(Place::Missing) => "its cgroup is not there (--cgroup-path)",
            Some(Place::NotYet) | None => continue,
        };
        judgement.refuse(format!("Pod {}", pod.key), problem);
    }
    judgement
}

impl Judgement {
    fn refuse(&mut self, object: String, problem: &str) {
        self.problems.insert(object, vec![format!("{CANNOT}: {problem}; its sockets are served")]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::cluster::ObjectKey;

    fn pod(name: &str, host_network: bool) -> Pod {
        Pod { key: ObjectKey::new("a", name), uid: name.into(), host_network }
    }

    fn found(pods: &[(&str, Place)], cgroups: &[(&str, CgroupId)]) -> Found {
        Found {
            pods: pods.iter().map(|(uid, place)| ((*uid).into(), *place)).collect(),
            cgroups: cgroups.iter().map(|(path, id)| ((*path).to_owned(), *id)).collect(),
            ..Found::default()
        }
    }

    fn problem(object: &str, problem: &str) -> (String, Vec<String>) {
        let sentence = format!("cannot opt out of the socket edge: {problem}; its sockets are served");
        (object.to_owned(), vec![sentence])
    }

    #[test]
    fn pods_and_cgroups_opt_out_unless_nobody_would_serve_their_packets() {
        let pods = [pod("here", false), pod("host", true), pod("gone", false), pod("new", false)];
        let found = found(
            &[("here", Place::Cgroup(CgroupId(1))), ("gone", Place::Missing), ("new", Place::NotYet)],
            &[("system.slice", CgroupId(2))],
        );
        let judgement = judge(pods.iter(), &found, true);
        assert_eq!(judgement.cgroups, [1, 2].map(CgroupId).into());
        assert_eq!(judgement.names, ["cgroup system.slice", "a/here"]);
        let host = problem("Pod a/host", "it uses the host's network, whose packets nobody judges");
        let gone = problem("Pod a/gone", "its cgroup is not there (--cgroup-path)");
        assert_eq!(judgement.problems, [host.clone(), gone].into());

        let judgement = judge(pods.iter(), &found, false);
        assert_eq!((judgement.cgroups.len(), judgement.names.len()), (0, 0));
        let nobody = ["cgroup system.slice", "Pod a/here", "Pod a/gone", "Pod a/new"];
        let nobody = nobody.map(|object| problem(object, NOBODY_JUDGES));
        assert_eq!(judgement.problems, nobody.into_iter().chain([host]).collect());
    }

    #[test]
    fn no_more_opt_out_than_there_is_room_for() {
        let cgroups: Vec<(String, CgroupId)> =
            (0..=PODS_MAX).map(|n| (format!("{n:05}"), CgroupId(n as u64))).collect();
        let cgroups: Vec<_> = cgroups.iter().map(|(path, id)| (path.as_str(), *id)).collect();
        let found = found(&[("x", Place::Cgroup(CgroupId(1 << 32)))], &cgroups);
        let judgement = judge([pod("x", false)].iter(), &found, true);
        assert_eq!((judgement.cgroups.len(), judgement.names.len()), (PODS_MAX, PODS_MAX));
        let expected = [
            problem(&format!("cgroup {PODS_MAX:05}"), "too many opt out"),
            problem("Pod a/x", "too many pods opt out"),
        ];
        assert_eq!(judgement.problems, expected.into());
    }

    #[tokio::test]
    async fn nothing_is_in_force_before_all_pods_and_their_cgroups_are_known() {
        let mut opt_out = OptOut::new(Follower::start("/nonexistent".into(), BTreeSet::new()));
        let pods = [pod("x", false), pod("host", true)];
        assert!(opt_out.judge(pods.iter(), true, true).is_none(), "nobody has looked");
        assert!(opt_out.take(found(&[], &[])), "sandboxes are known now");
        assert!(opt_out.judge(pods.iter(), true, true).is_none(), "x has not been looked for");
        let x = found(&[("x", Place::Cgroup(CgroupId(7)))], &[]);
        assert!(!opt_out.take(x.clone()));
        assert!(opt_out.judge(pods.iter(), false, true).is_none(), "there may be more pods");
        assert_eq!((opt_out.cgroups(), opt_out.pods()), (None, BTreeSet::new()));
        let (_, differs) = opt_out.judge(pods.iter(), true, true).unwrap();
        assert!(differs);
        assert_eq!((opt_out.cgroups(), opt_out.pods()), (Some(&[CgroupId(7)].into()), ["x".into()].into()));
        assert!(!opt_out.judge(pods.iter(), true, true).unwrap().1, "the same");
        assert!(opt_out.judge(pods.iter(), true, false).unwrap().1, "nobody serves packets of pods");
        assert_eq!((opt_out.cgroups(), opt_out.pods()), (Some(&BTreeSet::new()), BTreeSet::new()));
        let sandboxes = [(CgroupId(7), Sandbox::default())].into();
        assert!(opt_out.take(Found { sandboxes, ..x }));
    }
}
