//! Conversion of watch events into changes. Keeps the known objects of each kind, and finds those that a new list
//! lacks.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;

use super::follow::Event;
use super::kind::{Kind, KindEvent};
use super::received::Received;
use super::tenants::Tenants;
use super::unusable::{ListNumber, Unusable};
use super::watch::Fetched;
use crate::config::opt_out::Rules;
use crate::reconcile::cluster::{Change, ObjectKey};
use crate::reconcile::desired::Budgets;
use crate::sources::convert::{Converter, key_of};
use crate::sources::update::{Problem, outcome};

/// Maximum length of an object's name.
const NAME_MAX: usize = 253;

/// The state of all watches.
pub(super) struct Intake {
    converter: Converter,
    services: Known<ObjectKey>,
    slices: Known<ObjectKey>,
    node: Known<()>,
    service_cidrs: Known<Arc<str>>,
    pods: Known<ObjectKey>,
    /// Objects that are kept, by namespace.
    pub(super) tenants: Tenants,
    /// Objects that cannot be used.
    pub(super) unusable: Unusable,
}

impl Intake {
    pub(super) fn new(node_name: &str, opt_out: &Rules, budgets: Budgets) -> Self {
        let mut pods = Known::new(|key| Some(Change::PodGone(key)));
        pods.complete = opt_out.is_empty();
        Self {
            converter: Converter::new(node_name).with_opt_out(opt_out.clone()),
            pods,
            services: Known::new(|key| Some(Change::ServiceGone(key))),
            slices: Known::new(|key| Some(Change::SliceGone(key))),
            node: Known::new(|()| {
                tracing::warn!("this Node is gone; what was known of it stays in force");
                None
            }),
            service_cidrs: Known::new(|name| Some(Change::ServiceCidrGone(name))),
            tenants: Tenants::new(budgets),
            unusable: Unusable::default(),
        }
    }

    /// Processes one event and appends the resulting changes, within the budget of the namespace.
    pub(super) fn take(&mut self, event: KindEvent, changes: &mut Vec<Change>) {
        let created = event.created();
        let mut said = Vec::new();
        self.convert(event, &mut said);
        for change in said {
            self.tenants.pass(change, created, changes);
        }
    }

    /// Processes a fetched object that was missing, unless the watch has reported the object meanwhile.
    pub(super) fn take_fetched(&mut self, (kind, key, event): Fetched, changes: &mut Vec<Change>) {
        match event {
            _ if !self.tenants.is_asked_for(kind, &key) => {}
            Ok(Some(event)) => self.take(event, changes),
            // The object is gone, and the watch is about to report that, or the server has a problem.
            Ok(None) => self.tenants.not_fetched(kind, &key),
            Err(error) => {
                tracing::debug!(%key, %error, "an object cannot be fetched");
                self.tenants.not_fetched(kind, &key);
            }
        }
    }

    fn convert(&mut self, event: KindEvent, changes: &mut Vec<Change>) {
        let Self { converter, unusable, .. } = self;
        match event {
            KindEvent::Service(event) => {
                self.services.take(event, changes, unusable, key_of, |object| {
                    Ok(converter.service(object)?.map(Change::Service))
                });
            }
            KindEvent::Slice(event) => {
                self.slices.take(event, changes, unusable, key_of, |object| {
                    Ok(converter.slice(object)?.map(Change::Slice))
                });
            }
            KindEvent::Node(event) => {
                self.node.take(
                    event,
                    changes,
                    unusable,
                    |_| (),
                    |object| Ok(converter.node(object).map(Change::Node)),
                );
            }
            KindEvent::ServiceCidr(event) => {
                self.service_cidrs.take(
                    event,
                    changes,
                    unusable,
                    |meta| meta.name.as_deref().unwrap_or_default().into(),
                    |object| {
                        let cidr = converter.service_cidr(object)?;
                        for problem in cidr.problems {
                            tracing::warn!(service_cidr = &*cidr.name, problem);
                        }
                        Ok(Some(Change::ServiceCidr(cidr.name, cidr.prefixes)))
                    },
                );
            }
            KindEvent::Pod(event) => {
                self.pods.take(event, changes, unusable, key_of, |object| {
                    Ok(converter.pod(object)?.map(Change::Pod))
                });
            }
        }
    }

    /// Marks the list of an optional kind as complete; objects known so far stay known.
    pub(super) fn go_without(&mut self, kind: Kind) {
        match kind {
            Kind::ServiceCidrs => self.service_cidrs.complete = true,
            Kind::Pods => self.pods.complete = true,
            Kind::Services | Kind::EndpointSlices | Kind::Node => {}
        }
    }

    /// Returns whether the first list of this kind is complete and no other list is coming in.
    pub(super) fn has_list(&self, kind: Kind) -> bool {
        match kind {
            Kind::Services => self.services.has_list(),
            Kind::EndpointSlices => self.slices.has_list(),
            Kind::Node => self.node.has_list(),
            Kind::ServiceCidrs => self.service_cidrs.has_list(),
            Kind::Pods => self.pods.has_list(),
        }
    }

    /// Returns whether every kind has delivered its first list.
    pub(super) fn is_complete(&self) -> bool {
        self.services.complete
            && self.slices.complete
            && self.node.complete
            && self.service_cidrs.complete
            && self.pods.complete
    }
}

/// Objects of one kind that have been passed on.
struct Known<K> {
    all: BTreeSet<K>,
    /// Keys of the incoming list so far, if a list is coming in.
    listed: Option<BTreeSet<K>>,
    /// Number of the latest list that has begun.
    list: ListNumber,
    /// Whether a first list has come to its end, or is done without.
    complete: bool,
    gone: fn(K) -> Option<Change>,
}

impl<K: Ord + Clone> Known<K> {
    fn new(gone: fn(K) -> Option<Change>) -> Self {
        Self { all: BTreeSet::new(), listed: None, list: ListNumber::default(), complete: false, gone }
    }

    fn has_list(&self) -> bool {
        self.complete && self.listed.is_none()
    }

    fn take<O: Resource<DynamicType = ()>>(
        &mut self,
        event: Event<Received<O>>,
        changes: &mut Vec<Change>,
        unusable: &mut Unusable,
        key: impl FnOnce(&ObjectMeta) -> K,
        convert: impl FnOnce(&O) -> Result<Option<Change>, Problem>,
    ) {
        match event {
            Event::ListBegins => {
                self.listed = Some(BTreeSet::new());
                self.list = self.list.next();
            }
            Event::Applied(received) => {
                let (object, key) = (named::<O>(received.meta()), key(received.meta()));
                let converted = match &received {
                    Received::Object(object) => convert(object),
                    Received::Nonsense(nonsense) => {
                        Err(Problem { object: object.clone(), reason: nonsense.reason.clone() })
                    }
                };
                if converted.is_ok() {
                    unusable.mended(&object);
                }
                match converted {
                    Ok(Some(change)) => {
                        changes.push(change);
                        if let Some(listed) = &mut self.listed {
                            listed.insert(key.clone());
                        }
                        self.all.insert(key);
                    }
                    // An object that this proxy no longer serves is removed at once, also within a list: the list shows
                    // its new state.
                    Ok(None) => self.remove(key, changes),
                    // An object that cannot be converted keeps its last known state.
                    Err(problem) => {
                        let outcome = outcome(self.all.contains(&key));
                        let reason = format!("{}; {outcome}", problem.reason);
                        unusable.note(Problem { object, reason }, self.list);
                        if let Some(listed) = &mut self.listed {
                            listed.insert(key);
                        }
                    }
                }
            }
            Event::Deleted(received) => {
                unusable.mended(&named::<O>(received.meta()));
                self.remove(key(received.meta()), changes);
            }
            Event::UpToDate => {}
            Event::ListEnds => {
                let listed = self.listed.take().unwrap_or_default();
                let lacking: Vec<K> = self.all.difference(&listed).cloned().collect();
                for key in lacking {
                    self.remove(key, changes);
                }
                self.complete = true;
                unusable.list_ends(&O::kind(&()), self.list);
            }
        }
    }

    fn remove(&mut self, key: K, changes: &mut Vec<Change>) {
        if self.all.remove(&key) {
            changes.extend((self.gone)(key));
        }
    }
}

/// Returns the name of an object in problems.
fn named<O: Resource<DynamicType = ()>>(meta: &ObjectMeta) -> String {
    // The name of an invalid object may be too long.
    let [namespace, name] = [&meta.namespace, &meta.name]
        .map(|name| name.iter().flat_map(|name| name.chars().take(NAME_MAX)).collect::<String>());
    let kind = O::kind(&());
    match &meta.namespace {
        _ if name.is_empty() => format!("{kind} without a name"),
        Some(_) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}
