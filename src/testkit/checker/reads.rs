//! What was told about single offsets, by acknowledgements, reads and earlier whole readings, against the log and each other.
//!
//! Owns what is known of offsets that are not in the log: trimmed ones, and those behind its end.

use std::collections::HashMap;

use super::index::{Index, Log, Send, count, millis};
use super::logs::{acknowledged, known, moved};
use super::report::{AnomalyKind as Kind, Figures, Notes};
use crate::testkit::history::{Call, FinalLog, Operation, Outcome};

/// Who told of an offset.
#[derive(Clone, Copy)]
enum Teller<'a> {
    Operation(u32),
    Reading(&'a FinalLog),
}

impl Teller<'_> {
    fn show(self, index: &Index<'_>, offset: u64, value: u64) -> String {
        let told = format!("offset {offset} holds value {value}");
        match self {
            Self::Operation(number) => format!("{}; {told}", index.show(number)),
            Self::Reading(log) => format!("reading of {} ms: {told}", millis(log.began_ns)),
        }
    }
}

/// Offsets outside the logs, with the first value told and who told it.
type Outside<'a> = HashMap<(u32, u64), (u64, Teller<'a>)>;

/// Holds everything that was told of single offsets against the log.
pub(super) fn check_reads(index: &Index<'_>, notes: &mut Notes, figures: &mut Figures) {
    let mut outside = Outside::new();
    for (number, operation) in (0_u32..).zip(index.operations) {
        let Some(log) = index.log(operation.partition) else {
            continue;
        };
        let teller = Teller::Operation(number);
        if let Some((base, _, _)) = acknowledged(operation) {
            for (offset, send) in (base..).zip(index.sends(number)) {
                told(
                    index,
                    notes,
                    &mut outside,
                    log,
                    teller,
                    (offset, send.value),
                );
            }
        }
        match &operation.outcome {
            Outcome::Fetched { records, .. } => {
                figures.read += count(records.len());
                in_order(index, notes, number, operation);
                for (offset, value) in records {
                    let seen = || teller.show(index, *offset, *value);
                    let Some(send) = known(index, notes, log.number, *value, seen) else {
                        continue;
                    };
                    is_past(index, notes, number, operation, &send);
                    told(index, notes, &mut outside, log, teller, (*offset, *value));
                    is_committed(index, notes, log, (number, operation), *offset, &send);
                }
                ends_beside_batches(index, notes, log, number);
            }
            Outcome::End { .. } => {
                if operation.call == Call::LinearizableEnd {
                    figures.linearizable_ends += 1;
                }
                ends_beside_batches(index, notes, log, number);
            }
            _ => {}
        }
    }
    for log in &index.logs {
        for reading in &log.earlier {
            earlier_reading(index, notes, &mut outside, log, reading);
        }
    }
}

/// Two values for one offset.
fn told<'a>(
    index: &Index<'_>,
    notes: &mut Notes,
    outside: &mut Outside<'a>,
    log: &Log<'_>,
    teller: Teller<'a>,
    (offset, value): (u64, u64),
) {
    let here = || teller.show(index, offset, value);
    match log.at(offset) {
        Some(found) if found == value => {}
        Some(found) => notes.add(Kind::OffsetCollision, log.number, || {
            let text = format!("values {value} and {found} at offset {offset}");
            (text, [here(), log.show(offset)])
        }),
        None => {
            let first = *outside
                .entry((log.number, offset))
                .or_insert((value, teller));
            if first.0 != value {
                notes.add(Kind::OffsetCollision, log.number, || {
                    let text = format!("values {} and {value} at offset {offset}", first.0);
                    (text, [first.1.show(index, offset, first.0), here()])
                });
            }
        }
    }
}

/// What was read is found, where it was read.
fn is_committed(
    index: &Index<'_>,
    notes: &mut Notes,
    log: &Log<'_>,
    (number, read): (u32, &Operation),
    offset: u64,
    send: &Send,
) {
    let value = send.value;
    match send.found() {
        Some(found) if found == offset => {}
        Some(found) => moved(index, notes, log.number, value, (offset, found), number),
        None if log.covers(offset, read.completed_ns.unwrap_or(u64::MAX)) => {
            notes.add(Kind::DirtyRead, log.number, || {
                let text = format!("value {value} was read at offset {offset}, and is not found");
                let seen = Teller::Operation(number).show(index, offset, value);
                (text, [seen, log.show(offset)])
            });
        }
        None => {}
    }
}

/// The answer was there before the question for the append.
fn is_past(index: &Index<'_>, notes: &mut Notes, number: u32, read: &Operation, send: &Send) {
    let append = index.operation(send.operation);
    let times = append
        .map(|append| append.invoked_ns)
        .zip(read.completed_ns);
    if times.is_some_and(|(invoked, completed)| invoked > completed) {
        notes.add(Kind::FromTheFuture, read.partition, || {
            let text = format!("value {} was read before it was sent", send.value);
            (text, [index.show(number), index.show(send.operation)])
        });
    }
}

/// One answer by itself: records in a row from the offset asked for, below its watermark, and some if there are any.
fn in_order(index: &Index<'_>, notes: &mut Notes, number: u32, operation: &Operation) {
    let (
        Call::Fetch { from },
        Outcome::Fetched {
            log_start,
            high_watermark,
            records,
            ..
        },
    ) = (&operation.call, &operation.outcome)
    else {
        return;
    };
    let mut wrong = |kind, text: String| {
        notes.add(kind, operation.partition, || (text, [index.show(number)]));
    };
    let mut next = (*from).max(*log_start);
    for (offset, _) in records {
        if *offset > next {
            wrong(
                Kind::FetchSkip,
                format!("offset {next} was left out, {offset} came instead"),
            );
        } else if *offset < next {
            wrong(
                Kind::FetchBack,
                format!("offset {next} was next, {offset} came"),
            );
        }
        if *offset >= *high_watermark {
            wrong(
                Kind::BeyondWatermark,
                format!("offset {offset} with the watermark {high_watermark}"),
            );
        }
        next = offset.saturating_add(1);
    }
    if records.is_empty() && from >= log_start && from < high_watermark {
        wrong(
            Kind::Withheld,
            format!("nothing from offset {from} on with the watermark {high_watermark}"),
        );
    }
}

/// An end offset stands between two batches.
fn ends_beside_batches(index: &Index<'_>, notes: &mut Notes, log: &Log<'_>, number: u32) {
    let end = match index.operation(number).map(|operation| &operation.outcome) {
        Some(Outcome::End { end, .. }) => *end,
        Some(Outcome::Fetched { high_watermark, .. }) => *high_watermark,
        _ => return,
    };
    let append = |offset: u64| index.send(log.at(offset)?).map(|send| send.operation);
    let Some(before) = end.checked_sub(1).and_then(append) else {
        return;
    };
    if append(end) == Some(before) {
        notes.add(Kind::TornBatch, log.number, || {
            let text = format!("the end {end} is inside a batch");
            (text, [index.show(before), index.show(number)])
        });
    }
}

/// An earlier whole reading is a part of the log, and the log has nothing more where it had been.
fn earlier_reading<'a>(
    index: &Index<'_>,
    notes: &mut Notes,
    outside: &mut Outside<'a>,
    log: &Log<'_>,
    reading: &'a FinalLog,
) {
    let teller = Teller::Reading(reading);
    for (offset, value) in &reading.records {
        let seen = || teller.show(index, *offset, *value);
        let Some(send) = known(index, notes, log.number, *value, seen) else {
            continue;
        };
        told(index, notes, outside, log, teller, (*offset, *value));
        if send.found().is_none() && log.covers(*offset, reading.began_ns) {
            notes.add(Kind::DirtyRead, log.number, || {
                let text = format!("value {value} was read at offset {offset}, and is not found");
                (text, [seen(), log.show(*offset)])
            });
        }
    }
    let Some(last) = log.last else { return };
    // Both are walked once: the reading is in order, or a gap was found in it.
    let mut had = reading.records.iter().peekable();
    for (offset, value) in &last.records {
        if *offset < reading.log_start || *offset >= reading.end {
            continue;
        }
        while had.next_if(|(at, _)| at < offset).is_some() {}
        let same = had
            .peek()
            .is_some_and(|(at, was)| at == offset && was == value);
        let append = index.send(*value).map(|send| send.operation);
        let unknown = |number: &u32| {
            index
                .operation(*number)
                .is_some_and(|append| acknowledged(append).is_none())
        };
        if let Some(number) = append.filter(unknown).filter(|_| !same) {
            notes.add(Kind::LateUnknown, log.number, || {
                let text = format!(
                    "value {value} is found at offset {offset}, where a reading did not have it"
                );
                let range = format!(
                    "reading of {} ms: {} to {}",
                    millis(reading.began_ns),
                    reading.log_start,
                    reading.end
                );
                (text, [range, index.show(number), log.show(*offset)])
            });
        }
    }
}
