//! What a partition remembers of its idempotent producers: a function of the committed log alone.
//!
//! Owns the decision whether a batch is the next one, a retry, out of order or fenced. It is the same on every replica, so
//! its limits are constants and not configuration.
//!
//! At most once: a batch of an unknown producer is accepted only with sequence 0. Kafka accepts any sequence from a producer
//! it has forgotten, and may so append a retry twice; here such a producer is told that it is out of order, and takes a new
//! epoch or id, as every Kafka client does. What remains: a retry of sequence 0 of a producer that has been forgotten is
//! appended again, which takes [`PRODUCERS_MAX`] other producers between the send and its retry.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::record::ProducerStamp;
use crate::types::{LeaderEpoch, LogIndex, Offset};

/// Producers remembered in one partition; the one not heard of for longest is forgotten first. Part of the format: all
/// replicas must agree.
pub(super) const PRODUCERS_MAX: usize = 10_000;
/// Batches remembered of each producer, and so retries recognised: as many as a Kafka client has in flight. Part of the format.
const BATCHES_MAX: usize = 5;

/// An accepted batch of a producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Accepted {
    base_sequence: i32,
    last_sequence: i32,
    base_offset: Offset,
    epoch: LeaderEpoch,
}

/// What is known of one producer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Producer {
    epoch: i16,
    last_used: LogIndex,
    /// The newest batches of `epoch`, oldest first; never empty.
    batches: VecDeque<Accepted>,
}

/// What is to be done with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// It is the next one.
    Next,
    /// It was appended before, at this offset by the leader of this epoch.
    Duplicate {
        base_offset: Offset,
        epoch: LeaderEpoch,
    },
    /// One before it is missing, or it is older than all that is remembered.
    OutOfOrder { expected: i32, found: i32 },
    /// The producer has been replaced by one with a higher epoch.
    Fenced { current: i16, found: i16 },
}

/// All producers of one partition.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ProducerTable {
    producers: BTreeMap<i64, Producer>,
    /// The same producers, the one not heard of for longest first.
    by_use: BTreeSet<(LogIndex, i64)>,
}

/// The sequence number `count` records behind `sequence`: they begin again at 0 behind 2³¹ − 1.
fn sequence_plus(sequence: i32, count: i32) -> i32 {
    sequence.wrapping_add(count) & i32::MAX
}

impl ProducerTable {
    /// What is to be done with a batch of `count` records.
    pub(super) fn admit(&self, stamp: ProducerStamp, count: i32) -> Admission {
        let out_of_order = |expected: i32| match stamp.base_sequence {
            found if found == expected => Admission::Next,
            found => Admission::OutOfOrder { expected, found },
        };
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::NoDeduplication) {
            return Admission::Next;
        }
        let Some(producer) = self.producers.get(&stamp.id) else {
            return out_of_order(0);
        };
        if stamp.epoch < producer.epoch {
            return Admission::Fenced {
                current: producer.epoch,
                found: stamp.epoch,
            };
        }
        if stamp.epoch > producer.epoch {
            return out_of_order(0);
        }
        let last_sequence = sequence_plus(stamp.base_sequence, count - 1);
        let retry = producer.batches.iter().rev().find(|batch| {
            batch.base_sequence == stamp.base_sequence && batch.last_sequence == last_sequence
        });
        match (retry, producer.batches.back()) {
            (Some(batch), _) => Admission::Duplicate {
                base_offset: batch.base_offset,
                epoch: batch.epoch,
            },
            (None, Some(newest)) => out_of_order(sequence_plus(newest.last_sequence, 1)),
            (None, None) => out_of_order(0),
        }
    }

    /// Notes that a batch of `count` records, admitted as the next one, was appended.
    pub(super) fn accept(
        &mut self,
        stamp: ProducerStamp,
        count: i32,
        base_offset: Offset,
        epoch: LeaderEpoch,
        index: LogIndex,
    ) {
        let last_sequence = sequence_plus(stamp.base_sequence, count - 1);
        let batch = Accepted {
            base_sequence: stamp.base_sequence,
            last_sequence,
            base_offset,
            epoch,
        };
        let producer = self.producers.entry(stamp.id).or_insert_with(|| Producer {
            epoch: stamp.epoch,
            last_used: index,
            batches: VecDeque::new(),
        });
        if producer.epoch != stamp.epoch {
            producer.epoch = stamp.epoch;
            producer.batches.clear();
        }
        if producer.batches.len() >= BATCHES_MAX {
            producer.batches.pop_front();
        }
        producer.batches.push_back(batch);
        self.touch(stamp.id, index);
        while self.producers.len() > PRODUCERS_MAX {
            let Some((_, forgotten)) = self.by_use.pop_first() else {
                break;
            };
            self.producers.remove(&forgotten);
        }
    }

    /// Notes that the producer was heard of in the entry at `index`.
    pub(super) fn touch(&mut self, id: i64, index: LogIndex) {
        if let Some(producer) = self.producers.get_mut(&id) {
            self.by_use.remove(&(producer.last_used, id));
            producer.last_used = index;
            self.by_use.insert((index, id));
        }
    }

    /// The table as it is kept in a checkpoint.
    pub(super) fn to_saved(&self) -> Saved {
        Saved(self.producers.clone())
    }

    /// The table from a checkpoint.
    pub(super) fn from_saved(saved: Saved) -> Self {
        let by_use = saved
            .0
            .iter()
            .map(|(id, producer)| (producer.last_used, *id))
            .collect();
        Self {
            producers: saved.0,
            by_use,
        }
    }
}

/// The table as it is kept in a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved(BTreeMap<i64, Producer>);

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(id: i64, epoch: i16, base_sequence: i32) -> ProducerStamp {
        ProducerStamp {
            id,
            epoch,
            base_sequence,
        }
    }

    fn accept(table: &mut ProducerTable, stamp: ProducerStamp, count: i32, at: u64) {
        assert_eq!(table.admit(stamp, count), Admission::Next, "{stamp:?}");
        table.accept(stamp, count, Offset(at), LeaderEpoch(1), LogIndex(at));
    }

    /// Goal: any of the last five retries is answered with its first offset, an older one is not taken for new. Method: seven
    /// batches of two, then each again.
    #[test]
    fn the_last_five_retries_are_recognised() {
        let mut table = ProducerTable::default();
        for n in 0..7 {
            accept(
                &mut table,
                stamp(1, 0, n * 2),
                2,
                u64::try_from(n).unwrap() * 10,
            );
        }
        for n in 0..7 {
            let found = table.admit(stamp(1, 0, n * 2), 2);
            let expected = if n < 2 {
                Admission::OutOfOrder {
                    expected: 14,
                    found: n * 2,
                }
            } else {
                let base_offset = Offset(u64::try_from(n).unwrap() * 10);
                Admission::Duplicate {
                    base_offset,
                    epoch: LeaderEpoch(1),
                }
            };
            assert_eq!(found, expected, "batch {n}");
        }
        let other_length = Admission::OutOfOrder {
            expected: 14,
            found: 12,
        };
        assert_eq!(table.admit(stamp(1, 0, 12), 1), other_length);
    }

    /// Goal: gaps, old epochs and unknown producers are told apart. Method: a table on one state.
    #[test]
    fn every_other_batch_is_refused_with_its_reason() {
        let mut table = ProducerTable::default();
        accept(&mut table, stamp(1, 3, 0), 5, 0);
        let cases = [
            (stamp(1, 3, 5), Admission::Next),
            (
                stamp(1, 3, 6),
                Admission::OutOfOrder {
                    expected: 5,
                    found: 6,
                },
            ),
            (
                stamp(1, 2, 5),
                Admission::Fenced {
                    current: 3,
                    found: 2,
                },
            ),
            (stamp(1, 4, 0), Admission::Next),
            (
                stamp(1, 4, 5),
                Admission::OutOfOrder {
                    expected: 0,
                    found: 5,
                },
            ),
            (stamp(2, 0, 0), Admission::Next),
            (
                stamp(2, 0, 7),
                Admission::OutOfOrder {
                    expected: 0,
                    found: 7,
                },
            ),
        ];
        for (stamp, expected) in cases {
            assert_eq!(table.admit(stamp, 1), expected, "{stamp:?}");
        }
        accept(&mut table, stamp(1, 4, 0), 1, 5);
        assert_eq!(
            table.admit(stamp(1, 3, 5), 1),
            Admission::Fenced {
                current: 4,
                found: 3
            }
        );
    }

    /// Goal: sequences go on from 0 behind 2³¹ − 1, inside a batch and between two. Method: a producer at the end.
    #[test]
    fn sequences_begin_again_at_zero() {
        assert_eq!(sequence_plus(i32::MAX, 1), 0);
        assert_eq!(sequence_plus(i32::MAX - 1, 4), 2);
        let mut table = ProducerTable::default();
        accept(&mut table, stamp(1, 0, 0), i32::MAX, 0);
        accept(&mut table, stamp(1, 0, i32::MAX), 3, 1);
        let again = Admission::Duplicate {
            base_offset: Offset(1),
            epoch: LeaderEpoch(1),
        };
        assert_eq!(table.admit(stamp(1, 0, i32::MAX), 3), again);
        accept(&mut table, stamp(1, 0, 2), 1, 2);
    }

    /// Goal: the table is bounded and forgets the one not heard of for longest. Method: one more than fit, the first touched.
    #[test]
    fn the_oldest_producer_is_forgotten() {
        let mut table = ProducerTable::default();
        let max = i64::try_from(PRODUCERS_MAX).unwrap();
        for id in 0..max {
            accept(&mut table, stamp(id, 0, 0), 1, u64::try_from(id).unwrap());
        }
        table.touch(0, LogIndex(u64::try_from(max).unwrap()));
        accept(
            &mut table,
            stamp(max, 0, 0),
            1,
            u64::try_from(max).unwrap() + 1,
        );
        assert_eq!(table.producers.len(), PRODUCERS_MAX);
        assert_eq!(table.admit(stamp(0, 0, 1), 1), Admission::Next);
        assert_eq!(
            table.admit(stamp(1, 0, 1), 1),
            Admission::OutOfOrder {
                expected: 0,
                found: 1
            }
        );
        assert_eq!(ProducerTable::from_saved(table.to_saved()), table);
    }
}
