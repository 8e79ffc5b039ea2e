//! Single replicas and leaders: what replicas hold against the log and each other, who led when, how many copies an
//! acknowledgement may name.

use std::collections::{BTreeMap, HashMap};

use super::index::{Index, count};
use super::logs::{acknowledged, known};
use super::report::{AnomalyKind as Kind, Notes};
use crate::testkit::history::{AckLevel, Call, History, ReplicaDump};

/// Faults after which a copy that was counted may be gone, or elsewhere: the number of copies is then not judged.
pub const COPY_LOSING_FAULTS: &[&str] = &["wipe", "reassign", "bitrot", "clone", "olddir"];

fn held(dump: &ReplicaDump, offset: u64, value: u64) -> String {
    format!(
        "replica on broker {}: offset {offset} holds value {value}",
        dump.broker
    )
}

fn range(dump: &ReplicaDump) -> String {
    format!(
        "replica on broker {}: from {} to {}",
        dump.broker, dump.log_start, dump.high_watermark
    )
}

/// Each replica against the log, and against the others where the log does not reach.
pub(super) fn check_dumps(index: &Index<'_>, history: &History, notes: &mut Notes) {
    let mut outside: HashMap<(u32, u64), (u64, &ReplicaDump)> = HashMap::new();
    for dump in &history.dumps {
        let log = index.log(dump.partition);
        let mut next = dump.log_start;
        let wrong = |notes: &mut Notes, text: String, other: String| {
            notes.add(Kind::ReplicaDivergence, dump.partition, || {
                (text, [range(dump), other])
            });
        };
        for (offset, value) in &dump.records {
            if *offset != next {
                let text = format!("offset {next} was next, {offset} came");
                wrong(notes, text, held(dump, *offset, *value));
            }
            next = offset.saturating_add(1);
            // A value that nobody could have written diverges from the log too.
            known(index, notes, dump.partition, *value, || {
                held(dump, *offset, *value)
            });
            match log.and_then(|log| log.at(*offset)) {
                Some(found) if found == *value => {}
                Some(found) => {
                    let text =
                        format!("value {value} at offset {offset}, where the log has {found}");
                    let shown = log.map_or(String::new(), |log| log.show(*offset));
                    wrong(notes, text, shown);
                }
                None => {
                    let first = outside
                        .entry((dump.partition, *offset))
                        .or_insert((*value, dump));
                    if first.0 != *value {
                        let text = format!("values {} and {value} at offset {offset}", first.0);
                        wrong(notes, text, held(first.1, *offset, first.0));
                    }
                }
            }
        }
        if next < dump.high_watermark {
            let text = format!("nothing at offset {next}");
            wrong(
                notes,
                text,
                "the replica knows it to be committed".to_owned(),
            );
        }
    }
}

/// An acknowledgement names as many copies as there can be.
pub(super) fn check_copies(index: &Index<'_>, history: &History, notes: &mut Notes) {
    let mut dumps: BTreeMap<u32, Vec<&ReplicaDump>> = BTreeMap::new();
    let losing = |kind: &str| COPY_LOSING_FAULTS.contains(&kind);
    if !history.faults.iter().any(|fault| losing(&fault.kind)) {
        for dump in &history.dumps {
            dumps.entry(dump.partition).or_default().push(dump);
        }
    }
    for (number, operation) in (0_u32..).zip(index.operations) {
        let Some((base, _, copies)) = acknowledged(operation) else {
            continue;
        };
        let all = matches!(
            operation.call,
            Call::Append {
                acks: AckLevel::All,
                ..
            }
        );
        if all && copies == 0 {
            notes.add(Kind::AckContract, operation.partition, || {
                (
                    "acknowledged with acks=all without a copy".to_owned(),
                    [index.show(number)],
                )
            });
        }
        let Some(dumps) = dumps.get(&operation.partition) else {
            continue;
        };
        // The last record has as few copies as any.
        let last = base + count(index.sends(number).len()).saturating_sub(1);
        let can_hold = |dump: &&&ReplicaDump| {
            // Trimmed, or not known to be committed there yet.
            if last < dump.log_start || last >= dump.high_watermark {
                return true;
            }
            // Out of order it is found or not; that it is out of order was found before.
            let found = dump.records.binary_search_by_key(&last, |(at, _)| *at);
            found.is_ok()
        };
        let holders = dumps.iter().filter(can_hold).count();
        if holders < usize::try_from(copies).unwrap_or(usize::MAX) {
            notes.add(Kind::AckContract, operation.partition, || {
                let text = format!("{copies} copies, {holders} replicas can hold it");
                let replicas: Vec<String> = dumps.iter().map(|dump| range(dump)).collect();
                (text, [index.show(number), replicas.join("; ")])
            });
        }
    }
}

/// One broker in one epoch.
pub(super) fn check_leaders(history: &History, notes: &mut Notes) {
    let mut leaders: HashMap<(u32, u64), u32> = HashMap::new();
    for seen in &history.leaders {
        let first = *leaders
            .entry((seen.partition, seen.epoch))
            .or_insert(seen.broker);
        if first != seen.broker {
            notes.add(Kind::EpochConflict, seen.partition, || {
                let text = format!(
                    "brokers {first} and {} led in epoch {}",
                    seen.broker, seen.epoch
                );
                let at = super::index::millis(seen.at_ns);
                (
                    text,
                    [format!("broker {} was seen at {at} ms", seen.broker)],
                )
            });
        }
    }
}
