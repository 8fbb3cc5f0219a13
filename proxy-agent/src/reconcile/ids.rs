//! Ids and slot ranges: the free numbers of the kernel's arrays.
//!
//! Pure bookkeeping. The caller gives a number back only after a grace period: until then a BPF program may still
//! hold it.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::abi::SlotRange;

/// Numbers `1..capacity`, each with a stamp that survives its reuse (a backend's generation, a Service port's
/// affinity epoch). By the stamp, references to an earlier use of the number can be recognized. Number 0 belongs to
/// the self-test.
#[derive(Clone, Debug)]
pub struct IdPool<T> {
    /// Makes the type of a number.
    id: fn(u32) -> T,
    capacity: u32,
    next: u32,
    free: BTreeMap<T, u32>,
}

impl<T: Copy + Ord> IdPool<T> {
    /// Creates a pool in which all of `1..capacity` are free and were never used.
    #[cfg(test)]
    pub(crate) fn new(id: fn(u32) -> T, capacity: u32) -> Self {
        Self { id, capacity, next: 1, free: BTreeMap::new() }
    }

    /// Creates a pool in which `used` are taken; `id` makes the type of a number. `stamp` returns the stamp of a number's last use.
    pub(crate) fn restore(
        id: fn(u32) -> T,
        capacity: u32,
        used: &BTreeSet<T>,
        stamp: impl Fn(T) -> u32,
    ) -> Self {
        let was_used = |number: &u32| used.contains(&id(*number)) || stamp(id(*number)) != 0;
        let next = (1..capacity).rev().find(was_used).map_or(1, |last| last + 1);
        let free = (1..next).map(id).filter(|id| !used.contains(id)).map(|id| (id, stamp(id))).collect();
        Self { id, capacity, next, free }
    }

    /// Takes the lowest free number. Returns it with the stamp for this use, or `None` when all are taken.
    pub(crate) fn take(&mut self) -> Option<(T, u32)> {
        if let Some((id, stamp)) = self.free.pop_first() {
            return Some((id, stamp.wrapping_add(1)));
        }
        if self.next >= self.capacity {
            return None;
        }
        let id = (self.id)(self.next);
        self.next += 1;
        Some((id, 1))
    }

    /// Gives a number back with its last stamp.
    pub(crate) fn give_back(&mut self, id: T, stamp: u32) {
        self.free.insert(id, stamp);
    }

    /// Returns the number of free numbers.
    pub fn available(&self) -> u32 {
        self.capacity.saturating_sub(self.next) + u32::try_from(self.free.len()).unwrap_or(u32::MAX)
    }
}

/// Ranges of `SLOTS`: best fit first, neighbours merged. Slot 0 belongs to the self-test.
#[derive(Clone, Debug)]
pub struct SlotPool {
    by_base: BTreeMap<u32, u32>,
    by_len: BTreeSet<(u32, u32)>,
    available: u32,
}

impl SlotPool {
    /// Creates a pool in which all of `1..capacity` are free.
    #[cfg(test)]
    pub(crate) fn new(capacity: u32) -> Self {
        let mut pool = Self { by_base: BTreeMap::new(), by_len: BTreeSet::new(), available: 0 };
        pool.insert(SlotRange { base: 1, len: capacity.saturating_sub(1) });
        pool
    }

    /// Creates a pool in which the ranges of `used` are taken. Returns `Err` with the first range that overlaps
    /// another one or does not fit.
    pub(crate) fn restore(capacity: u32, mut used: Vec<SlotRange>) -> Result<Self, SlotRange> {
        let mut pool = Self { by_base: BTreeMap::new(), by_len: BTreeSet::new(), available: 0 };
        used.sort_by_key(|range| range.base);
        let mut next = 1;
        for range in used {
            let end = range.base.checked_add(range.len).filter(|end| *end <= capacity).ok_or(range)?;
            if range.base < next {
                return Err(range);
            }
            pool.insert(SlotRange { base: next, len: range.base - next });
            next = end;
        }
        pool.insert(SlotRange { base: next, len: capacity.saturating_sub(next) });
        Ok(pool)
    }

    /// Takes a free range of `len` slots (at least one). Returns `None` when no free range is that long.
    pub fn take(&mut self, len: u32) -> Option<SlotRange> {
        let &(free_len, base) = self.by_len.range((len, 0)..).next()?;
        self.remove(SlotRange { base, len: free_len });
        self.insert(SlotRange { base: base + len, len: free_len - len });
        Some(SlotRange { base, len })
    }

    /// Gives a range back.
    pub(crate) fn give_back(&mut self, range: SlotRange) {
        let SlotRange { mut base, mut len } = range;
        if let Some((&before, &before_len)) = self.by_base.range(..base).next_back()
            && before + before_len == base
        {
            self.remove(SlotRange { base: before, len: before_len });
            base = before;
            len += before_len;
        }
        if let Some(&after_len) = self.by_base.get(&(base + len)) {
            self.remove(SlotRange { base: base + len, len: after_len });
            len += after_len;
        }
        self.insert(SlotRange { base, len });
    }

    /// Returns the number of free slots.
    pub fn available(&self) -> u32 {
        self.available
    }

    fn insert(&mut self, range: SlotRange) {
        let SlotRange { base, len } = range;
        if len > 0 {
            self.by_base.insert(base, len);
            self.by_len.insert((len, base));
            self.available += len;
        }
    }

    fn remove(&mut self, range: SlotRange) {
        let SlotRange { base, len } = range;
        self.by_base.remove(&base);
        self.by_len.remove(&(len, base));
        self.available -= len;
    }
}

#[cfg(test)]
mod tests {
    use std::convert::identity;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_number_comes_back_with_a_higher_stamp() {
        let mut pool = IdPool::new(identity, 3);
        assert_eq!((pool.take(), pool.take(), pool.take()), (Some((1, 1)), Some((2, 1)), None));
        pool.give_back(1, 1);
        assert_eq!((pool.take(), pool.take()), (Some((1, 2)), None));
    }

    #[test]
    fn a_restored_pool_knows_what_is_taken_and_the_stamps_of_the_rest() {
        let stamps = [0, 4, 7, 2, 9, 0];
        let mut pool = IdPool::restore(identity, 6, &BTreeSet::from([2]), |id| stamps[id as usize]);
        assert_eq!(pool.take(), Some((1, 5)));
        assert_eq!(pool.take(), Some((3, 3)));
        assert_eq!(pool.take(), Some((4, 10)));
        assert_eq!(pool.take(), Some((5, 1)));
        assert_eq!(pool.take(), None);
    }

    #[test]
    fn overlapping_ranges_are_not_restored() {
        let overlap = vec![SlotRange { base: 5, len: 3 }, SlotRange { base: 7, len: 2 }];
        assert_eq!(SlotPool::restore(100, overlap).map(|_| ()), Err(SlotRange { base: 7, len: 2 }));
        assert!(SlotPool::restore(100, vec![SlotRange { base: 99, len: 2 }]).is_err());
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_all_come_back(lens in prop::collection::vec((1u32..20, any::<bool>()), 1..200)) {
            let mut pool = SlotPool::new(1000);
            let mut held: Vec<SlotRange> = Vec::new();
            for (len, release) in lens {
                if release && !held.is_empty() {
                    pool.give_back(held.swap_remove(len as usize % held.len()));
                } else if let Some(range) = pool.take(len) {
                    prop_assert_eq!(range.len, len);
                    prop_assert!(range.base >= 1 && range.base + len <= 1000);
                    held.push(range);
                }
                let restored = SlotPool::restore(1000, held.clone());
                prop_assert_eq!(pool.available(), pool.by_base.values().sum::<u32>());
                prop_assert_eq!(restored.map(|p| p.by_base), Ok(pool.by_base.clone()));
            }
            for range in held {
                pool.give_back(range);
            }
            prop_assert_eq!(pool.take(999), Some(SlotRange { base: 1, len: 999 }));
        }
    }
}
