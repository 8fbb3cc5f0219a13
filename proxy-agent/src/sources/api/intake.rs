//! From watch events to changes: what is known of each kind, and what a new list lacks.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;

use super::follow::Event;
use super::received::Received;
use super::{Kind, KindEvent};
use crate::cluster::{Change, ObjectKey};
use crate::opt_out::Rules;
use crate::sources::Problem;
use crate::sources::convert::{Converter, key_of};

/// The state of all watches.
pub(super) struct Intake {
    converter: Converter,
    services: Known<ObjectKey>,
    slices: Known<ObjectKey>,
    node: Known<()>,
    service_cidrs: Known<Arc<str>>,
    pods: Known<ObjectKey>,
}

impl Intake {
    pub(super) fn new(node_name: &str, opt_out: &Rules) -> Self {
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
        }
    }

    /// Takes one event in and appends what it changes.
    pub(super) fn take(&mut self, event: KindEvent, changes: &mut Vec<Change>) {
        let converter = &mut self.converter;
        match event {
            KindEvent::Service(event) => {
                let convert = |object: &_| Ok(converter.service(object)?.map(Change::Service));
                self.services.take(event, key_of, convert, changes);
            }
            KindEvent::Slice(event) => {
                let convert = |object: &_| Ok(converter.slice(object)?.map(Change::Slice));
                self.slices.take(event, key_of, convert, changes);
            }
            KindEvent::Node(event) => {
                let convert = |object: &_| Ok(converter.node(object).map(Change::Node));
                self.node.take(event, |_| (), convert, changes);
            }
            KindEvent::ServiceCidr(event) => {
                let convert = |object: &_| {
                    let cidr = converter.service_cidr(object)?;
                    for problem in cidr.problems {
                        tracing::warn!(service_cidr = &*cidr.name, problem);
                    }
                    Ok(Some(Change::ServiceCidr(cidr.name, cidr.prefixes)))
                };
                self.service_cidrs.take(
                    event,
                    |meta| meta.name.as_deref().unwrap_or_default().into(),
                    convert,
                    changes,
                );
            }
            KindEvent::Pod(event) => {
                let convert = |object: &_| Ok(converter.pod(object)?.map(Change::Pod));
                self.pods.take(event, key_of, convert, changes);
            }
        }
    }

    /// Takes the list of an optional kind as complete, and empty unless some are known.
    pub(super) fn go_without(&mut self, kind: Kind) {
        match kind {
            Kind::ServiceCidrs => self.service_cidrs.complete = true,
            Kind::Pods => self.pods.complete = true,
            Kind::Services | Kind::EndpointSlices | Kind::Node => {}
        }
    }

    /// Whether the first list of this kind has come, and no other is coming in.
    pub(super) fn has_list(&self, kind: Kind) -> bool {
        match kind {
            Kind::Services => self.services.has_list(),
            Kind::EndpointSlices => self.slices.has_list(),
            Kind::Node => self.node.has_list(),
            Kind::ServiceCidrs => self.service_cidrs.has_list(),
            Kind::Pods => self.pods.has_list(),
        }
    }

    /// Whether every kind has delivered its first list.
    pub(super) fn is_complete(&self) -> bool {
        self.services.complete
            && self.slices.complete
            && self.node.complete
            && self.service_cidrs.complete
            && self.pods.complete
    }
}

/// The objects of one kind that were passed on.
struct Known<K> {
    all: BTreeSet<K>,
    /// Those of them that the list which is coming in has.
    listed: Option<BTreeSet<K>>,
    /// The first list has come to its end.
    complete: bool,
    gone: fn(K) -> Option<Change>,
}

impl<K: Ord + Clone> Known<K> {
    fn new(gone: fn(K) -> Option<Change>) -> Self {
        Self { all: BTreeSet::new(), listed: None, complete: false, gone }
    }

    fn has_list(&self) -> bool {
        self.complete && self.listed.is_none()
    }

    fn take<O: Resource<DynamicType = ()>>(
        &mut self,
        event: Event<Received<O>>,
        key: impl FnOnce(&ObjectMeta) -> K,
        convert: impl FnOnce(&O) -> Result<Option<Change>, Problem>,
        changes: &mut Vec<Change>,
    ) {
        match event {
            Event::ListBegins => self.listed = Some(BTreeSet::new()),
            Event::Applied(received) => {
                let key = key(received.meta());
                let converted = match &received {
                    Received::Object(object) => convert(object),
                    Received::Nonsense(nonsense) => Err(Problem {
                        object: format!("{} {}", O::kind(&()), key_of(received.meta())),
                        reason: format!("{}; the object is ignored", nonsense.reason),
                    }),
                };
                match converted {
                    Ok(Some(change)) => {
                        changes.push(change);
                        if let Some(listed) = &mut self.listed {
                            listed.insert(key.clone());
                        }
                        self.all.insert(key);
                    }
                    // An object that stopped being ours goes at once, in a list too: the server has it.
                    Ok(None) => self.remove(key, changes),
                    // As if the server had not sent it: what was known of it stays.
                    Err(problem) => {
                        tracing::warn!(object = problem.object, reason = problem.reason, "unusable object");
                        if let Some(listed) = &mut self.listed {
                            listed.insert(key);
                        }
                    }
                }
            }
            Event::Deleted(received) => self.remove(key(received.meta()), changes),
            Event::ListEnds => {
                let listed = self.listed.take().unwrap_or_default();
                let lacking: Vec<K> = self.all.difference(&listed).cloned().collect();
                for key in lacking {
                    self.remove(key, changes);
                }
                self.complete = true;
            }
        }
    }

    fn remove(&mut self, key: K, changes: &mut Vec<Change>) {
        if self.all.remove(&key) {
            changes.extend((self.gone)(key));
        }
    }
}
