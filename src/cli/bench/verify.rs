//! What a record says of itself, what was acknowledged, and whether the log holds it.
//!
//! Owns the stamp in every record (checksum, client, sequence number), the ledger of what became of every one that was sent, and the judge.
//! An acknowledged record must be at its offset, whole and once; one whose outcome is unknown may be there once; one that was
//! refused must not be there. That a client's records are in order is seen when they are acknowledged (`load`), and holds for the
//! log because they are found where they were acknowledged.

use std::collections::BTreeSet;

use anyhow::Context;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};
use logboom::client::{Client, Consumer, From, Partitions, Until};
use logboom::types::Offset;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use serde::Serialize;

/// Bytes of a record that say which one it is: CRC-32C over the rest, client, sequence number.
pub(super) const STAMP_BYTES: usize = 16;
/// Random bytes that records are filled from.
const FILLER_BYTES: usize = 4 << 20;
/// Between the places two successive records are filled from; shares no factor with the size of the filler.
const FILLER_STEP: u64 = 7_919;
/// Questions that are under way at once when partitions are asked for their ends.
const ASKED_AT_ONCE: usize = 16;
/// Bytes of one further read of a partition whose end the stream did not reach.
const READ_BYTES: u32 = 4 << 20;

/// Which record it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) client: u32,
    pub(super) sequence: u64,
}

impl Stamp {
    /// Reads a record; `None` when its bytes are not those that were sent.
    pub(super) fn read(value: &[u8]) -> Option<Self> {
        let (mut checksum, rest) = value.split_at_checked(4)?;
        let mut stamp = rest.get(..STAMP_BYTES - 4)?;
        (checksum.get_u32() == crc32c::crc32c(rest)).then(|| Self {
            client: stamp.get_u32(),
            sequence: stamp.get_u64(),
        })
    }
}

/// Makes records that no compression makes smaller.
#[derive(Debug, Clone)]
pub(super) struct Filler(Bytes);

impl Filler {
    pub(super) fn new(seed: u64, record_bytes: usize) -> Self {
        let mut bytes = vec![0; FILLER_BYTES.max(2 * record_bytes)];
        StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        Self(bytes.into())
    }

    /// The record of `stamp`, `bytes` long, and at least as long as its stamp.
    pub(super) fn record(&self, stamp: Stamp, bytes: usize) -> Bytes {
        let mut value = BytesMut::with_capacity(bytes.max(STAMP_BYTES));
        value.put_u32(0);
        value.put_u32(stamp.client);
        value.put_u64(stamp.sequence);
        let wanted = bytes.saturating_sub(STAMP_BYTES);
        let room = u64::try_from(self.0.len() - wanted).unwrap_or(1).max(1);
        let step = stamp.sequence.wrapping_mul(FILLER_STEP);
        let at = step.wrapping_add(u64::from(stamp.client)) % room;
        let at = usize::try_from(at).unwrap_or(0);
        value.put_slice(self.0.get(at..at + wanted).unwrap_or_default());
        let checksum = value.get(4..).map_or(0, crc32c::crc32c);
        if let Some(mut place) = value.get_mut(..4) {
            place.put_u32(checksum);
        }
        value.freeze()
    }
}

/// Records of one client that were acknowledged side by side: sequence numbers and offsets both rise by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Acked {
    pub(super) partition: u32,
    pub(super) client: u32,
    pub(super) sequence: u64,
    pub(super) offset: u64,
    pub(super) count: u64,
}

/// Adds to `runs`, as a part of the last run where it goes on.
pub(super) fn push_acked(runs: &mut Vec<Acked>, next: Acked) {
    if let Some(last) = runs.last_mut() {
        let same = last.client == next.client && last.partition == next.partition;
        let sequence = last.sequence + last.count == next.sequence;
        if same && sequence && last.offset + last.count == next.offset {
            last.count += next.count;
            return;
        }
    }
    runs.push(next);
}

/// What became of everything that was sent.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger {
    /// Records that each client has made: their sequence numbers are below.
    pub(super) sent: Vec<u64>,
    pub(super) acked: Vec<Acked>,
    /// Their outcome is unknown.
    pub(super) unknown: BTreeSet<(u32, u64)>,
    /// Definitely not appended, as the answer said.
    pub(super) refused: BTreeSet<(u32, u64)>,
    /// Acknowledged below an offset that an earlier record of the same client had.
    pub(super) out_of_order: u64,
    /// Nothing was promised (acks=none): what is missing is not lost.
    pub(super) without_promise: bool,
}

/// What the log turned out to hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    pub(super) acknowledged: u64,
    pub(super) read_back: u64,
    /// Acknowledged and not at its offset.
    pub(super) lost: u64,
    pub(super) duplicated: u64,
    pub(super) out_of_order: u64,
    /// Not as it was sent.
    pub(super) corrupt: u64,
    /// Refused, or never sent.
    pub(super) foreign: u64,
}

impl Verdict {
    /// What is wrong, if anything is.
    pub(super) fn problem(&self) -> Option<String> {
        let counts = [
            (self.lost, "lost"),
            (self.duplicated, "duplicated"),
            (self.out_of_order, "out of order"),
            (self.corrupt, "corrupt"),
            (self.foreign, "there that should not be"),
        ];
        let found = counts.iter().filter(|(count, _)| *count > 0);
        let said: Vec<String> = found
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        (!said.is_empty()).then(|| {
            format!(
                "of {} acknowledged records, {}",
                self.acknowledged,
                said.join(", ")
            )
        })
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.acknowledged += other.acknowledged;
        self.read_back += other.read_back;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.out_of_order += other.out_of_order;
        self.corrupt += other.corrupt;
        self.foreign += other.foreign;
    }
}

/// What is still to come of one partition, by offset.
struct Expected {
    runs: std::vec::IntoIter<Acked>,
    run: Option<Acked>,
}

impl Expected {
    fn first(&self) -> Option<(u64, Stamp)> {
        let run = self.run?;
        let stamp = Stamp {
            client: run.client,
            sequence: run.sequence,
        };
        Some((run.offset, stamp))
    }

    fn advance(&mut self) {
        self.run = match self.run {
            Some(run) if run.count > 1 => Some(Acked {
                sequence: run.sequence + 1,
                offset: run.offset + 1,
                count: run.count - 1,
                ..run
            }),
            _ => self.runs.next(),
        };
    }
}

/// Holds what is read, each partition in order, against the ledger.
pub(super) struct Judge {
    ledger: Ledger,
    partitions: Vec<Expected>,
    /// A bit for each record of each client.
    seen: Vec<Vec<u64>>,
    verdict: Verdict,
}

impl Judge {
    pub(super) fn new(mut ledger: Ledger, partitions: u32) -> Self {
        let mut acked = std::mem::take(&mut ledger.acked);
        acked.sort_unstable_by_key(|run| (run.partition, run.offset, run.client, run.sequence));
        let verdict = Verdict {
            acknowledged: acked.iter().map(|run| run.count).sum(),
            out_of_order: ledger.out_of_order,
            ..Verdict::default()
        };
        let expected = |partition: u32| {
            let from = acked.partition_point(|run| run.partition < partition);
            let until = acked.partition_point(|run| run.partition <= partition);
            let runs = acked.get(from..until).unwrap_or_default().to_vec();
            let mut runs = runs.into_iter();
            Expected {
                run: runs.next(),
                runs,
            }
        };
        let words = |sent: &u64| vec![0; usize::try_from(sent.div_ceil(64)).unwrap_or(0)];
        Self {
            partitions: (0..partitions).map(expected).collect(),
            seen: ledger.sent.iter().map(words).collect(),
            ledger,
            verdict,
        }
    }

    /// Marks a record as read; `None` when it was never sent, else whether it is the first time.
    fn see(&mut self, stamp: Stamp) -> Option<bool> {
        let client = usize::try_from(stamp.client).ok()?;
        if stamp.sequence >= *self.ledger.sent.get(client)? {
            return None;
        }
        let word = usize::try_from(stamp.sequence / 64).ok()?;
        let word = self.seen.get_mut(client)?.get_mut(word)?;
        let bit = 1 << (stamp.sequence % 64);
        let first = *word & bit == 0;
        *word |= bit;
        Some(first)
    }

    /// The next record of a partition.
    pub(super) fn read(&mut self, partition: u32, offset: u64, value: &[u8]) {
        self.verdict.read_back += 1;
        let stamp = Stamp::read(value);
        let at = usize::try_from(partition).unwrap_or(usize::MAX);
        let mut wanted = None;
        if let Some(expected) = self.partitions.get_mut(at) {
            while let Some((place, found)) = expected.first() {
                if place > offset {
                    break;
                }
                expected.advance();
                // Two cannot be at one offset: the second is as lost as one whose offset was passed over.
                if place == offset && wanted.is_none() {
                    wanted = Some(found);
                } else {
                    self.verdict.lost += 1;
                }
            }
        }
        if wanted.is_some() && wanted != stamp {
            self.verdict.lost += 1;
        }
        let Some(stamp) = stamp else {
            self.verdict.corrupt += 1;
            return;
        };
        let refused = self
            .ledger
            .refused
            .contains(&(stamp.client, stamp.sequence));
        match self.see(stamp) {
            None => self.verdict.foreign += 1,
            Some(false) => self.verdict.duplicated += 1,
            Some(true) if refused => self.verdict.foreign += 1,
            // Acknowledged elsewhere: it is missed there.
            Some(true) => {}
        }
    }

    /// Everything has been read.
    pub(super) fn finish(mut self) -> Verdict {
        for expected in &mut self.partitions {
            while expected.first().is_some() {
                expected.advance();
                self.verdict.lost += 1;
            }
        }
        self.verdict
    }
}

/// Reads the topic from its beginning to its end and judges it. `seen` is told of each record.
pub(super) async fn read_back(
    client: &Client,
    topic: &str,
    partitions: u32,
    ledger: Ledger,
    seen: impl Fn(),
) -> anyhow::Result<Verdict> {
    let handle = client.topic(topic)?;
    // Asks a quorum: at or above everything that was acknowledged.
    let ends = stream::iter(0..partitions).map(|partition| {
        let partition = handle.partition(partition);
        async move { partition.end_offset(true).await }
    });
    let ends: Vec<Offset> = ends
        .buffered(ASKED_AT_ONCE)
        .try_collect()
        .await
        .context("the topic cannot be asked for its end")?;
    let mut judge = Judge::new(ledger, partitions);
    let mut next = vec![Offset(0); ends.len()];
    let consumer = Consumer::new(client, topic, Partitions::All, From::Earliest);
    let mut stream = consumer.until(Until::End).stream();
    while let Some(record) = stream.next().await {
        let record = record.context("the topic cannot be read back")?;
        if let Ok(at) = usize::try_from(record.partition.0)
            && let Some(next) = next.get_mut(at)
        {
            *next = record.offset.plus(1);
        }
        let value = record.value.as_deref().unwrap_or_default();
        judge.read(record.partition.0, record.offset.0, value);
        seen();
    }
    // The stream ends where it saw the end when it began, which may be before the quorum's.
    for ((partition, end), mut from) in (0..).zip(ends).zip(next) {
        while from < end {
            let read = handle.partition(partition).read(from, READ_BYTES).await;
            let read = read.context("the topic cannot be read to its end")?;
            if read.next_offset <= from {
                break;
            }
            for record in &read.records {
                let value = record.value.as_deref().unwrap_or_default();
                judge.read(partition, record.offset.0, value);
                seen();
            }
            from = read.next_offset;
        }
    }
    let without_promise = judge.ledger.without_promise;
    let mut verdict = judge.finish();
    if without_promise {
        verdict.lost = 0;
    }
    Ok(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDS: u64 = 6;

    fn filler() -> Filler {
        Filler::new(1, 100)
    }

    fn stamp(client: u32, sequence: u64) -> Stamp {
        Stamp { client, sequence }
    }

    fn acked(client: u32, sequence: u64, offset: u64, count: u64) -> Acked {
        Acked {
            partition: 0,
            client,
            sequence,
            offset,
            count,
        }
    }

    /// Two clients by turns: client 0 at even offsets, client 1 at odd ones; of client 1 the last record's outcome is unknown.
    fn ledger() -> Ledger {
        let mut acked_runs = Vec::new();
        for sequence in 0..RECORDS {
            push_acked(&mut acked_runs, acked(0, sequence, 2 * sequence, 1));
            if sequence + 1 < RECORDS {
                push_acked(&mut acked_runs, acked(1, sequence, 2 * sequence + 1, 1));
            }
        }
        Ledger {
            sent: vec![RECORDS, RECORDS],
            acked: acked_runs,
            unknown: BTreeSet::from([(1, RECORDS - 1)]),
            ..Ledger::default()
        }
    }

    fn log() -> Vec<(u64, Stamp)> {
        let stamps = (0..RECORDS).flat_map(|sequence| [stamp(0, sequence), stamp(1, sequence)]);
        (0..).zip(stamps).collect()
    }

    fn judged(ledger: Ledger, log: &[(u64, Stamp)]) -> Verdict {
        let mut judge = Judge::new(ledger, 1);
        for (offset, stamp) in log {
            judge.read(0, *offset, &filler().record(*stamp, 100));
        }
        judge.finish()
    }

    /// Goal: a log that holds what it should passes, with and without the record whose outcome is unknown. Method: both.
    #[test]
    fn a_whole_log_passes() {
        for count in [11, 12] {
            let log: Vec<_> = log().into_iter().take(count).collect();
            let verdict = judged(ledger(), &log);
            assert_eq!(verdict.problem(), None, "{count}: {verdict:?}");
            assert_eq!(verdict.acknowledged, 11);
        }
    }

    /// Goal: no kind of damage passes. Method: the same log, broken in every way that the verdict has a word for.
    #[test]
    fn whatever_is_wrong_is_found() {
        for missing in 0..11 {
            let mut log = log();
            log.remove(missing);
            let verdict = judged(ledger(), &log);
            assert_eq!(verdict.lost, 1, "without {missing}: {verdict:?}");
            assert!(verdict.problem().is_some());
        }
        // Cut off, empty, or every record one place further on.
        assert_eq!(judged(ledger(), &log()[..4]).lost, 7);
        assert_eq!(judged(ledger(), &[]).lost, 11);
        let moved: Vec<_> = log().into_iter().map(|(at, one)| (at + 1, one)).collect();
        assert_eq!(judged(ledger(), &moved).lost, 11);

        let mut twice = log();
        twice.push((12, stamp(0, 3)));
        assert_eq!(judged(ledger(), &twice).duplicated, 1);
        let mut exchanged = log();
        exchanged[2].1 = stamp(0, 2);
        exchanged[4].1 = stamp(0, 1);
        assert_eq!(judged(ledger(), &exchanged).lost, 2);
        let mut foreign = log();
        foreign.push((12, stamp(0, RECORDS)));
        foreign.push((13, stamp(7, 0)));
        assert_eq!(judged(ledger(), &foreign).foreign, 2);

        let mut refusing = ledger();
        refusing.unknown.clear();
        refusing.refused.insert((1, RECORDS - 1));
        assert_eq!(judged(refusing, &log()).foreign, 1);
        // Two acknowledgements cannot be true at once.
        let mut claimed = ledger();
        claimed.acked.push(acked(1, RECORDS - 1, 4, 1));
        assert_eq!(judged(claimed, &log()).lost, 1);
        let mut unordered = ledger();
        unordered.out_of_order = 2;
        assert_eq!(judged(unordered, &log()).out_of_order, 2);
    }

    /// Goal: one changed bit anywhere in a record is found. Method: each byte of one.
    #[test]
    fn a_changed_record_is_corrupt() {
        let good = filler().record(stamp(0, 0), 40);
        assert_eq!(Stamp::read(&good), Some(stamp(0, 0)));
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 1;
            let mut judge = Judge::new(
                Ledger {
                    sent: vec![1],
                    acked: vec![acked(0, 0, 0, 1)],
                    ..Ledger::default()
                },
                1,
            );
            judge.read(0, 0, &bad);
            let verdict = judge.finish();
            assert_eq!((verdict.corrupt, verdict.lost), (1, 1), "byte {at}");
        }
        assert_eq!(Stamp::read(&good[..10]), None);
        assert_eq!(filler().record(stamp(0, 1), 3).len(), STAMP_BYTES);
    }

    /// Goal: what goes on is one run, whatever else is another. Method: one of each.
    #[test]
    fn runs_are_joined() {
        let mut runs = Vec::new();
        for next in [
            acked(0, 0, 5, 2),
            acked(0, 2, 7, 1),
            acked(0, 3, 9, 1),
            acked(1, 4, 10, 1),
        ] {
            push_acked(&mut runs, next);
        }
        let expected = [acked(0, 0, 5, 3), acked(0, 3, 9, 1), acked(1, 4, 10, 1)];
        assert_eq!(runs, expected);
    }
}
