//! Short rounds of each side in turn, so that other work of the machine affects all sides alike.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Result, bail};

use super::pair::Pair;
use super::wire::{Answer, Job, Workload};
use crate::stats::{Estimate, median_of};

/// Time that is not counted at the beginning of a round, because caches and socket buffers are still filled by others.
const WARM_UP_US: u64 = 4_000;

/// Operations per second, by side, of every round of each workload.
pub(crate) struct Rounds<S> {
    rates: BTreeMap<Workload, Vec<BTreeMap<S, f64>>>,
    lost: BTreeMap<Workload, u64>,
}

impl<S: Copy + Ord> Rounds<S> {
    /// Returns an empty set of rounds.
    pub(crate) fn new() -> Self {
        Self { rates: BTreeMap::new(), lost: BTreeMap::new() }
    }

    /// Runs `rounds` rounds of a workload; `target` returns the address that the client of a side connects to.
    ///
    /// # Errors
    /// If a client fails.
    pub(crate) fn run(
        &mut self,
        pairs: &mut BTreeMap<S, Pair>,
        workload: Workload,
        target: impl Fn(S) -> SocketAddr,
        round_ms: u64,
        rounds: usize,
    ) -> Result<()> {
        let sides: Vec<S> = pairs.keys().copied().collect();
        for round in 0..rounds {
            let mut rates = BTreeMap::new();
            for side in order(&sides, round) {
                let Some(pair) = pairs.get_mut(&side) else { continue };
                let server = target(side);
                let measure_us = round_ms * 1000;
                let job = Job::Run { workload, server, warm_up_us: WARM_UP_US, measure_us };
                let Answer::Ran { operations, nanos, lost } = pair.ask(&job)? else {
                    bail!("not an answer to {job:?}")
                };
                rates.insert(side, operations as f64 * 1e9 / nanos as f64);
                *self.lost.entry(workload).or_default() += lost;
            }
            self.rates.entry(workload).or_default().push(rates);
        }
        Ok(())
    }

    /// Returns the rate of one side over that of another, round by round; `None` if no round has both.
    pub(crate) fn ratio(&self, workload: Workload, over: S, under: S) -> Option<Estimate> {
        let rounds = self.rates.get(&workload)?.iter();
        let estimate = Estimate::of(rounds.filter_map(|r| Some(r.get(&over)? / r.get(&under)?)));
        (estimate.samples > 0).then_some(estimate)
    }

    /// Returns the median of a side's rates: operations per second, or for a stream bytes per second.
    pub(crate) fn rate(&self, workload: Workload, side: S) -> f64 {
        median_of(self.rates.get(&workload).into_iter().flatten().filter_map(|r| r.get(&side).copied()))
    }

    /// Returns the number of datagrams that were not answered.
    pub(crate) fn lost(&self, workload: Workload) -> u64 {
        self.lost.get(&workload).copied().unwrap_or(0)
    }
}

/// Returns the order of the sides in one round. Every order occurs about equally often, so that no side always follows
/// the same other one.
fn order<S: Copy>(sides: &[S], mut round: usize) -> Vec<S> {
    let mut left = sides.to_vec();
    let mut order = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let (next, rest) = (round % left.len(), round / left.len());
        order.push(left.remove(next));
        round = rest;
    }
    order
}

/// Returns block `block`'s part of `rounds`.
pub(crate) fn share(rounds: usize, blocks: usize, block: usize) -> usize {
    rounds * (block + 1) / blocks - rounds * block / blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_share_all_rounds() {
        for (rounds, blocks) in [(120, 6), (7, 3), (2, 5), (0, 2)] {
            let sum: usize = (0..blocks).map(|block| share(rounds, blocks, block)).sum();
            assert_eq!(sum, rounds);
        }
    }

    #[test]
    fn every_order_comes_once() {
        let sides = ['a', 'b', 'c', 'd'];
        let orders: std::collections::BTreeSet<Vec<char>> =
            (0..24).map(|round| order(&sides, round)).collect();
        assert_eq!(orders.len(), 24);
        assert_eq!(order(&sides, 24), order(&sides, 0));
    }
}
