//! `proxy-agent explain`: fate of a connection, and its reasons.
//!
//! [`explanation::explain`] is a pure function of the maps' contents: the datapath's own lookup and selection run on
//! copies of the maps ([`crate::reconcile::sim`]), once for each kind of client ([`clients`]). [`print()`] reads the
//! pinned maps and puts the result into words. The command works while no agent runs; an agent that runs adds the
//! reasons that the maps do not hold ([`crate::observe::reasons`]).

pub(crate) mod clients;

pub(crate) mod explanation;

pub(crate) mod pod;

pub(crate) mod print;

pub(crate) mod question;

#[cfg(test)]
mod tests;

pub(crate) use print::{ExplainError, client_pod, print};
