//! What the answers permit and forbid: everything is read back and held against the history.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use logboom::client::Client;
use logboom::types::Offset;

use super::wait_for;
use super::workload::{Fate, History, parse_label};

/// Examples of each kind of anomaly that are kept.
const EXAMPLES: usize = 5;
/// Bytes of one read.
const READ_BYTES: u32 = 4 << 20;

/// What was read from one partition, in the order of reading: the offset and the label, `None` for a value that is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The records.
    pub records: Vec<(Offset, Option<(u32, u64)>)>,
    /// The end offset that a linearizable question gave before the reading.
    pub end: Offset,
}

/// What a reading shows. All zero but the first five when the system kept its promises.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Records sent.
    pub sent: usize,
    /// Of these, acknowledged.
    pub acked: usize,
    /// Of these, with an unknown fate.
    pub unknown: usize,
    /// Records read.
    pub read_back: usize,
    /// Of these, whose fate was unknown.
    pub unknown_found: usize,
    /// Acknowledged and not there.
    pub lost: usize,
    /// There more than once (copies beyond the first).
    pub duplicated: usize,
    /// Before a record that the same writer had sent to the partition earlier.
    pub out_of_order: usize,
    /// There, although the answer said it would never be.
    pub undead: usize,
    /// Acknowledged at an offset other than the one it has.
    pub moved: usize,
    /// In a partition other than the one it was sent to.
    pub misplaced: usize,
    /// Values that no writer sent, or damaged ones.
    pub strange: usize,
    /// Offsets that are missing, repeated or go back, from offset 0 to the end.
    pub gaps: usize,
    /// Some of each, in words.
    pub examples: Vec<String>,
}

impl Verdict {
    /// Whether every promise was kept.
    pub fn is_good(&self) -> bool {
        let Self {
            lost,
            duplicated,
            out_of_order,
            undead,
            moved,
            misplaced,
            strange,
            gaps,
            ..
        } = self;
        [
            lost,
            duplicated,
            out_of_order,
            undead,
            moved,
            misplaced,
            strange,
            gaps,
        ]
        .iter()
        .all(|count| **count == 0)
    }

    /// Ends the test unless every promise was kept, for at least `acked` acknowledged records: a run in which nothing
    /// happened proves nothing.
    pub fn assert_good(&self, acked: usize) {
        assert!(self.is_good(), "{self}");
        assert!(
            self.acked >= acked,
            "only {} acknowledged, {acked} wanted: the run proves nothing",
            self.acked
        );
    }

    fn note(&mut self, count: fn(&mut Self) -> &mut usize, text: String) {
        let count = count(self);
        *count += 1;
        if *count <= EXAMPLES {
            self.examples.push(text);
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            sent,
            acked,
            unknown,
            read_back,
            unknown_found,
            ..
        } = self;
        writeln!(
            f,
            "{sent} sent, {acked} acked, {unknown} unknown ({unknown_found} found), {read_back} read back"
        )?;
        let Self {
            lost,
            duplicated,
            out_of_order,
            undead,
            moved,
            misplaced,
            strange,
            gaps,
            ..
        } = self;
        writeln!(
            f,
            "lost {lost}, duplicated {duplicated}, out of order {out_of_order}, undead {undead}, moved {moved}, misplaced {misplaced}, strange {strange}, gaps {gaps}"
        )?;
        self.examples
            .iter()
            .try_for_each(|example| writeln!(f, "  {example}"))
    }
}

/// Reads every partition back through the client and judges. Call it when the cluster has healed.
pub async fn verify(client: &Client, topic: &str, partitions: u32, history: &History) -> Verdict {
    judge(history, &read_back(client, topic, partitions).await)
}

/// All records of a topic, up to the end offset that a quorum vouches for.
pub async fn read_back(client: &Client, topic: &str, partitions: u32) -> BTreeMap<u32, Found> {
    let topic = client
        .topic(topic)
        .unwrap_or_else(|error| panic!("{error}"));
    let mut all = BTreeMap::new();
    for number in 0..partitions {
        let partition = topic.partition(number);
        let what = format!("the end offset of {}", partition.id());
        let end = wait_for(&what, Duration::from_secs(60), async || {
            Ok(partition.end_offset(true).await?)
        })
        .await;
        let mut found = Found {
            records: Vec::new(),
            end,
        };
        let mut next = Offset(0);
        while next < end {
            let what = format!("{} at offset {next}, the end being {end}", partition.id());
            let read = wait_for(&what, Duration::from_secs(60), async || {
                let read = partition.read(next, READ_BYTES).await?;
                anyhow::ensure!(
                    read.next_offset > next,
                    "nothing there, high watermark {}",
                    read.high_watermark
                );
                Ok(read)
            })
            .await;
            let labelled = read.records.iter().map(|record| {
                (
                    record.offset,
                    record.value.as_ref().and_then(|value| parse_label(value)),
                )
            });
            found.records.extend(labelled);
            next = read.next_offset;
        }
        all.insert(number, found);
    }
    all
}

/// Holds what was read against what was sent. Pure.
pub fn judge(history: &History, found: &BTreeMap<u32, Found>) -> Verdict {
    let mut verdict = Verdict {
        sent: history.sent.len(),
        ..Verdict::default()
    };
    let sent: HashMap<(u32, u64), (u32, &Fate)> = history
        .sent
        .iter()
        .map(|one| ((one.writer, one.number), (one.partition, &one.fate)))
        .collect();
    assert_eq!(
        sent.len(),
        history.sent.len(),
        "two writers with the same number"
    );
    let mut places: HashMap<(u32, u64), (u32, Offset)> = HashMap::new();
    for (partition, found) in found {
        let mut last: HashMap<u32, u64> = HashMap::new();
        let mut expected = Offset(0);
        for (offset, label) in &found.records {
            verdict.read_back += 1;
            if *offset != expected {
                let text =
                    format!("partition {partition}: offset {offset} where {expected} was due");
                verdict.note(|v| &mut v.gaps, text);
            }
            expected = offset.plus(1);
            let known = label.and_then(|label| sent.get(&label).map(|known| (label, known)));
            let Some(((writer, number), (home, fate))) = known else {
                let text = format!(
                    "partition {partition}, offset {offset}: not sent by any writer: {label:?}"
                );
                verdict.note(|v| &mut v.strange, text);
                continue;
            };
            let name = format!(
                "record {number} of writer {writer}, partition {partition}, offset {offset}"
            );
            if home != partition {
                verdict.note(
                    |v| &mut v.misplaced,
                    format!("{name}: was sent to partition {home}"),
                );
            }
            if let Some((other, at)) = places.get(&(writer, number)) {
                verdict.note(
                    |v| &mut v.duplicated,
                    format!("{name}: is at offset {at} of partition {other} as well"),
                );
                continue;
            }
            places.insert((writer, number), (*partition, *offset));
            let before = last.entry(writer).or_insert(number);
            if *before > number {
                verdict.note(
                    |v| &mut v.out_of_order,
                    format!("{name}: after record {before}"),
                );
            }
            *before = number.max(*before);
            match fate {
                Fate::Acked(acked) if acked != offset => {
                    verdict.note(
                        |v| &mut v.moved,
                        format!("{name}: was acknowledged at offset {acked}"),
                    );
                }
                Fate::Acked(_) => {}
                Fate::NotDone(error) => verdict.note(
                    |v| &mut v.undead,
                    format!("{name}: the answer was: {error}"),
                ),
                Fate::Unknown(_) | Fate::Invoked => verdict.unknown_found += 1,
            }
        }
        if expected < found.end {
            let text = format!(
                "partition {partition}: ends at {expected}, the end offset is {}",
                found.end
            );
            verdict.note(|v| &mut v.gaps, text);
        }
    }
    for one in &history.sent {
        match &one.fate {
            Fate::Acked(offset) => {
                verdict.acked += 1;
                if !places.contains_key(&(one.writer, one.number)) {
                    let text = format!(
                        "record {} of writer {}, acknowledged at offset {offset} of partition {}: lost",
                        one.number, one.writer, one.partition
                    );
                    verdict.note(|v| &mut v.lost, text);
                }
            }
            Fate::Unknown(_) | Fate::Invoked => verdict.unknown += 1,
            Fate::NotDone(_) => {}
        }
    }
    verdict
}
