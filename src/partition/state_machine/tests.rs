//! The state machine against a model of it, and at its bounds.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::partition::index::Lookup;
use crate::partition::index::tests::Kept;
use crate::partition::producer_table::PRODUCERS_MAX;
use crate::record::{ProducerStamp, Record, encode_batch};
use crate::types::LogIndex;

/// A batch of `count` records of a producer.
fn batch(count: u64, stamp: Option<ProducerStamp>, timestamp_ms: i64) -> Bytes {
    let record = Record {
        timestamp_ms,
        ..Record::default()
    };
    encode_batch(&vec![record; usize::try_from(count).unwrap()], stamp).unwrap()
}

fn stamp(id: i64, epoch: i16, base_sequence: i32) -> ProducerStamp {
    ProducerStamp {
        id,
        epoch,
        base_sequence,
    }
}

/// What a client may do; several make up an entry.
#[derive(Debug, Clone)]
enum Step {
    /// A batch without a producer.
    Plain(u64),
    /// Producer `.0` sends its next batch, of `.1` records.
    Next(usize, u64),
    /// Producer `.0` sends the batch that it sent `.1` batches ago again.
    Again(usize, usize),
    /// Producer `.0` leaves out a batch.
    Gap(usize),
    /// Producer `.0` takes a new epoch.
    NewEpoch(usize),
    /// An instance of producer `.0` with an older epoch sends.
    Zombie(usize),
    /// The log start moves on by this many records, in an entry of its own.
    Trim(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let id = 0..3_usize;
    prop_oneof![
        1 => (1..5_u64).prop_map(Step::Plain),
        4 => (id.clone(), 1..5_u64).prop_map(|(id, count)| Step::Next(id, count)),
        3 => (id.clone(), 0..8_usize).prop_map(|(id, ago)| Step::Again(id, ago)),
        1 => id.clone().prop_map(Step::Gap),
        1 => id.clone().prop_map(Step::NewEpoch),
        1 => id.prop_map(Step::Zombie),
        1 => (0..20_u64).prop_map(Step::Trim),
    ]
}

/// A producer as the test knows it: everything it ever sent and what became of it.
#[derive(Debug, Default)]
struct Client {
    epoch: i16,
    /// Sequence numbers used in this epoch; they begin near their end so that they wrap.
    next: i32,
    /// Batches of this epoch: sequence, records, where they were appended.
    sent: Vec<(i32, u64, Offset)>,
}

/// A plain model of the partition: what each batch must be answered.
#[derive(Debug, Default)]
struct Model {
    next_offset: u64,
    log_start: u64,
    clients: BTreeMap<usize, Client>,
}

impl Model {
    fn append(&mut self, count: u64) -> Offset {
        let base = self.next_offset;
        self.next_offset += count;
        Offset(base)
    }

    /// The batch that `step` sends and the verdict expected; none for a trim.
    fn batch(&mut self, step: &Step, at: i64) -> Option<(Bytes, Verdict)> {
        match step {
            Step::Trim(_) => None,
            Step::Plain(count) => {
                let base_offset = self.append(*count);
                Some((batch(*count, None, at), Verdict::Appended { base_offset }))
            }
            _ => Some(self.producer_batch(step, at)),
        }
    }

    fn producer_batch(&mut self, step: &Step, at: i64) -> (Bytes, Verdict) {
        let (id, count) = match step {
            Step::Next(id, count) => (*id, *count),
            Step::Again(id, _) | Step::Gap(id) | Step::NewEpoch(id) | Step::Zombie(id) => (*id, 2),
            Step::Plain(_) | Step::Trim(_) => (0, 1),
        };
        let base = Offset(self.next_offset);
        let client = self.clients.entry(id).or_default();
        let id = i64::try_from(id).unwrap();
        let is_known = client.next != 0 || client.epoch != 0;
        match step {
            Step::Again(_, ago) if client.sent.len() > *ago => {
                let (sequence, count, base_offset) = client.sent[client.sent.len() - 1 - ago];
                let verdict = if *ago < 5 {
                    Verdict::Duplicate {
                        base_offset,
                        epoch: LeaderEpoch(1),
                    }
                } else {
                    Verdict::OutOfOrder {
                        expected: client.next,
                        found: sequence,
                    }
                };
                return (
                    batch(count, Some(stamp(id, client.epoch, sequence)), at),
                    verdict,
                );
            }
            Step::Gap(_) => {
                let (expected, found) = (client.next, client.next + 1);
                let verdict = Verdict::OutOfOrder { expected, found };
                return (
                    batch(count, Some(stamp(id, client.epoch, found)), at),
                    verdict,
                );
            }
            Step::Zombie(_) if client.epoch > 0 => {
                let (current, found) = (client.epoch, client.epoch - 1);
                let verdict = Verdict::Fenced { current, found };
                return (
                    batch(count, Some(stamp(id, found, client.next)), at),
                    verdict,
                );
            }
            Step::NewEpoch(_) if is_known => {
                client.epoch += 1;
                client.next = 0;
                client.sent.clear();
            }
            _ => {}
        }
        let sent = stamp(id, client.epoch, client.next);
        client.sent.push((client.next, count, base));
        client.next += i32::try_from(count).unwrap();
        let base_offset = self.append(count);
        (
            batch(count, Some(sent), at),
            Verdict::Appended { base_offset },
        )
    }
}

/// A machine with the blocks it has handed out.
#[derive(Debug, Default)]
struct Replica {
    machine: PartitionMachine,
    kept: Kept,
}

impl Replica {
    fn apply(&mut self, index: u64, command: &Bytes) -> Outcome {
        let id = EntryId {
            epoch: LeaderEpoch(1),
            index: LogIndex(index),
        };
        decode(&self.machine.apply(id, command)).unwrap()
    }

    fn checkpoint(&mut self) -> Bytes {
        let (state, blocks) = self.machine.checkpoint();
        self.kept.0.extend(blocks);
        state
    }

    fn batches(&self) -> Vec<BatchRef> {
        let (from, to) = {
            let state = self.machine.log.lock();
            (state.log_start, state.next_offset)
        };
        let memory = |offset| self.machine.log.lock().index.block(offset);
        Lookup {
            memory,
            older: &self.kept,
        }
        .batches(from, to, usize::MAX)
        .unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Goal: every answer is a function of the committed log: right by a plain model, and the same on a replica that starts anew at
    /// any checkpoint and applies the rest again. Method: random clients with retries, gaps, zombies and trims; a checkpoint at a
    /// random place; compare answers, state and index.
    #[test]
    fn answers_follow_the_log_alone(
        entries in proptest::collection::vec(proptest::collection::vec(step(), 1..4), 1..120),
        stop in any::<prop::sample::Index>(),
        often in 1..40_u64,
    ) {
        let (mut model, mut first) = (Model::default(), Replica::default());
        let mut log: Vec<(u64, Bytes, Outcome)> = Vec::new();
        let stop = u64::try_from(stop.index(entries.len())).unwrap();
        let mut saved = None;
        for (at, steps) in (0..).zip(&entries) {
            let sent: Vec<_> = steps.iter().filter_map(|step| model.batch(step, at)).collect();
            let at = u64::try_from(at).unwrap();
            let trim = steps.iter().find_map(|step| match step { Step::Trim(by) => Some(*by), _ => None });
            let (command, expected) = match trim {
                Some(by) if sent.is_empty() => {
                    let wanted = model.log_start + by;
                    model.log_start = wanted.min(model.next_offset);
                    (trim_command(Offset(wanted)), Outcome::Trimmed(Offset(model.log_start)))
                }
                _ => {
                    let batches: Vec<Bytes> = sent.iter().map(|(batch, _)| batch.clone()).collect();
                    let verdicts = sent.iter().map(|(_, verdict)| *verdict).collect();
                    (records_command(batches.iter()), Outcome::Records(verdicts))
                }
            };
            let answer = first.apply(at, &command);
            prop_assert_eq!(&answer, &expected, "entry {}: {:?}", at, steps);
            log.push((at, command, answer));
            if at % often == 0 || at == stop {
                let state = first.checkpoint();
                if at <= stop {
                    saved = Some((at, state, first.kept.0.clone()));
                }
            }
        }
        let Some((upto, state, blocks)) = saved else { return Ok(()) };
        let mut second = Replica { kept: Kept(blocks), ..Replica::default() };
        second.machine.restore(Some(&state)).unwrap();
        for (at, command, answer) in &log {
            if *at > upto {
                prop_assert_eq!(&second.apply(*at, command), answer, "entry {} again", at);
            }
        }
        prop_assert_eq!(second.checkpoint(), first.checkpoint());
        prop_assert_eq!(second.batches(), first.batches());
        prop_assert_eq!(first.batches().last().map_or(first.machine.log.lock().log_start, BatchRef::end), Offset(model.next_offset));
    }

    /// Goal: a damaged checkpoint is an error, never a panic. Method: flip and cut the bytes of one.
    #[test]
    fn a_damaged_checkpoint_is_refused_or_read(at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
        let mut replica = Replica::default();
        for n in 0..3 {
            replica.apply(n, &records_command([batch(2, Some(stamp(1, 0, i32::try_from(n).unwrap() * 2)), 5)].iter()));
        }
        let state = replica.checkpoint();
        let at = at.index(state.len());
        let mut damaged = state.to_vec();
        damaged[at] ^= flip;
        replica.machine.restore(Some(&damaged.into())).ok();
        prop_assert!(replica.machine.restore(Some(&state.slice(..at))).is_err());
        prop_assert!(replica.machine.restore(Some(&state)).is_ok());
    }
}

/// Goal: the index places each accepted batch at its own bytes, and no refused one. Method: an entry with a refused batch in the
/// middle; look at the bytes.
#[test]
fn accepted_batches_are_found_at_their_bytes() {
    let mut replica = Replica::default();
    let parts = [
        batch(2, None, 5),
        batch(3, Some(stamp(1, 0, 9)), 6),
        batch(1, None, 4),
    ];
    let command = records_command(parts.iter());
    replica.apply(4, &command);
    let found = replica.batches();
    let places: Vec<_> = found
        .iter()
        .map(|found| (found.base_offset.0, found.count, found.max_timestamp))
        .collect();
    assert_eq!(places, [(0, 2, 5), (2, 1, 4)]);
    for (found, part) in found.iter().zip([&parts[0], &parts[2]]) {
        let from = usize::try_from(found.position).unwrap();
        assert_eq!(
            command[from..from + usize::try_from(found.size).unwrap()],
            part[..]
        );
    }
}

/// Goal: checkpoints are asked for by bytes, by commands and by blocks. Method: apply up to each bound and look.
#[test]
fn checkpoints_come_at_their_bounds() {
    let many: Vec<Bytes> =
        vec![batch(1, None, 0); CHECKPOINT_BLOCKS * super::super::index::BLOCK_BATCHES];
    let value = Record {
        value: Some(vec![0; CHECKPOINT_BYTES / 2].into()),
        ..Record::default()
    };
    let large = [encode_batch(&[value], None).unwrap()];
    let small = [batch(1, None, 0)];
    let cases = [
        (records_command(many.iter()), 1),
        (records_command(large.iter()), 2),
        (records_command(small.iter()), CHECKPOINT_COMMANDS),
    ];
    for (command, times) in cases {
        let mut replica = Replica::default();
        for n in 0..times {
            assert!(!replica.machine.wants_checkpoint(), "after {n} of {times}");
            replica.apply(u64::try_from(n).unwrap(), &command);
        }
        assert!(replica.machine.wants_checkpoint(), "after {times}");
        replica.checkpoint();
        assert!(!replica.machine.wants_checkpoint());
    }
}

/// Goal: a replica stops at a committed command that it cannot apply. Method: an unknown kind, a cut batch.
#[test]
fn what_cannot_be_applied_stops_the_replica() {
    let whole = records_command([batch(1, None, 0)].iter());
    for command in [
        Bytes::from_static(&[9, 9]),
        Bytes::new(),
        whole.slice(..whole.len() - 1),
    ] {
        let applied = std::panic::catch_unwind(|| Replica::default().apply(1, &command));
        assert!(applied.is_err(), "{command:?}");
    }
}

/// Goal: whoever waits for the log start hears of it, from a trim and from a snapshot. Method: watch both.
#[test]
fn the_log_start_is_published() {
    let mut replica = Replica::default();
    let mut log_start = replica.machine.log.log_start();
    replica.apply(1, &records_command([batch(5, None, 0)].iter()));
    assert!(!log_start.has_changed().unwrap());
    assert_eq!(
        replica.apply(2, &trim_command(Offset(3))),
        Outcome::Trimmed(Offset(3))
    );
    assert_eq!(*log_start.borrow_and_update(), Offset(3));
    let state = replica.checkpoint();
    assert_eq!(
        replica.apply(3, &trim_command(Offset(1))),
        Outcome::Trimmed(Offset(3))
    );
    assert_eq!(
        replica.apply(4, &trim_command(Offset(9))),
        Outcome::Trimmed(Offset(5))
    );
    replica.machine.restore(Some(&state)).unwrap();
    assert_eq!(*log_start.borrow_and_update(), Offset(3));
}

/// Goal: a producer that only retries is not forgotten before one that is silent. Method: as many producers as fit; the first one
/// retries; one more comes.
#[test]
fn a_retry_keeps_its_producer_remembered() {
    let mut replica = Replica::default();
    let max = i64::try_from(PRODUCERS_MAX).unwrap();
    let mut send = |index: i64, id: i64, sequence: i32| {
        let command = records_command([batch(1, Some(stamp(id, 0, sequence)), 0)].iter());
        match replica.apply(u64::try_from(index).unwrap(), &command) {
            Outcome::Records(verdicts) => verdicts[0],
            other @ Outcome::Trimmed(_) => panic!("{other:?}"),
        }
    };
    for id in 0..max {
        send(id, id, 0);
    }
    let retried = send(max, 0, 0);
    assert!(matches!(retried, Verdict::Duplicate { .. }), "{retried:?}");
    send(max + 1, max, 0);
    assert_eq!(send(max + 2, 0, 0), retried);
    assert_eq!(
        send(max + 3, 1, 1),
        Verdict::OutOfOrder {
            expected: 0,
            found: 1
        }
    );
}
