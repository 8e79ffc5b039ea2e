//! Whole logs against what was sent and acknowledged.
//!
//! Owns the rules that need no order in time: what must be found, what must not, and where.

use std::collections::HashMap;

use super::index::{Index, Send, count, millis};
use super::report::{AnomalyKind as Kind, Figures, Notes};
use crate::testkit::history::{AckLevel, Call, FinalLog, Operation, Outcome, STRANGE_VALUE};

/// The send of `value`, seen in partition `partition` where `seen` says, when it is one that may be there.
pub(super) fn known(
    index: &Index<'_>,
    notes: &mut Notes,
    partition: u32,
    value: u64,
    seen: impl Fn() -> String,
) -> Option<Send> {
    if value == STRANGE_VALUE {
        notes.add(Kind::Strange, partition, || {
            ("a damaged value".to_owned(), [seen()])
        });
        return None;
    }
    let sent = index.send(value).copied();
    let Some((send, operation)) =
        sent.and_then(|send| Some((send, index.operation(send.operation)?)))
    else {
        notes.add(Kind::Phantom, partition, || {
            (format!("nobody sent value {value}"), [seen()])
        });
        return None;
    };
    if operation.partition != partition {
        notes.add(Kind::Misplaced, partition, || {
            let text = format!(
                "value {value} was sent to partition {}",
                operation.partition
            );
            (text, [index.show(send.operation), seen()])
        });
        return None;
    }
    if matches!(operation.outcome, Outcome::Failed { .. }) {
        notes.add(Kind::Aborted, partition, || {
            let text = format!("value {value} is there, and its append had failed");
            (text, [index.show(send.operation), seen()])
        });
    }
    Some(send)
}

/// What the acknowledgement of an append gave away, when it promises something: base offset, epoch, copies.
pub(super) fn acknowledged(operation: &Operation) -> Option<(u64, u64, u32)> {
    match (&operation.call, &operation.outcome) {
        (
            Call::Append { acks, .. },
            Outcome::Appended {
                base,
                epoch,
                copies,
            },
        ) if *acks != AckLevel::None => Some((*base, *epoch, *copies)),
        _ => None,
    }
}

fn line(log: &FinalLog, offset: u64, value: u64) -> String {
    let from = millis(log.began_ns);
    format!("reading of {from} ms: offset {offset} holds value {value}")
}

/// The logs by themselves: dense, and of known values, each once. Finds every value.
pub(super) fn read_logs(index: &mut Index<'_>, notes: &mut Notes, figures: &mut Figures) {
    for at in 0..index.logs.len() {
        let Some(log) = index.logs.get(at) else {
            continue;
        };
        let (number, last) = (log.number, log.last);
        for reading in log.earlier.iter().copied().chain(last) {
            is_dense(reading, notes);
        }
        let Some(last) = last else { continue };
        for (offset, value) in &last.records {
            figures.found += 1;
            let seen = || line(last, *offset, *value);
            let Some(send) = known(index, notes, number, *value, seen) else {
                continue;
            };
            match index.set_found(*value, *offset) {
                Some(before) if before != *offset => notes.add(Kind::Duplicate, number, || {
                    let text = format!("value {value} is found at offsets {before} and {offset}");
                    (
                        text,
                        [
                            index.show(send.operation),
                            line(last, before, *value),
                            seen(),
                        ],
                    )
                }),
                _ => {}
            }
        }
    }
}

fn is_dense(log: &FinalLog, notes: &mut Notes) {
    let mut next = log.log_start;
    let mut wrong = |text: String, at: String| {
        notes.add(Kind::Gap, log.partition, || {
            let from = millis(log.began_ns);
            let range = format!("reading of {from} ms: {} to {}", log.log_start, log.end);
            (text, [range, at])
        });
    };
    for (offset, value) in &log.records {
        if *offset > next {
            wrong(
                format!("nothing at offsets {next} to {}", offset - 1),
                line(log, *offset, *value),
            );
        } else if *offset < next {
            wrong(
                format!("offset {offset} after offset {}", next.saturating_sub(1)),
                line(log, *offset, *value),
            );
        }
        next = offset.saturating_add(1);
    }
    if next < log.end {
        wrong(
            format!("nothing at offsets {next} to {}", log.end - 1),
            "the reading ended there".to_owned(),
        );
    } else if next > log.end {
        wrong(
            format!("records up to offset {}", next - 1),
            "they are behind the end".to_owned(),
        );
    }
}

/// What appends demand of the log: acknowledged values at their place, batches whole.
pub(super) fn check_appends(index: &Index<'_>, notes: &mut Notes, figures: &mut Figures) {
    for (number, operation) in (0_u32..).zip(index.operations) {
        let sends = index.sends(number);
        let Some(log) = index.log(operation.partition).filter(|_| !sends.is_empty()) else {
            continue;
        };
        let partition = operation.partition;
        let ack = acknowledged(operation);
        if ack.is_none() && matches!(operation.outcome, Outcome::Unknown { .. }) {
            figures.unknown_found +=
                count(sends.iter().filter(|send| send.found().is_some()).count());
        }
        if let Some((base, _, _)) = ack {
            figures.acknowledged += count(sends.len());
            let known = operation.completed_ns.unwrap_or(u64::MAX);
            for (offset, send) in (base..).zip(sends) {
                match send.found() {
                    None if log.covers(offset, known) => notes.add(Kind::Lost, partition, || {
                        let text = format!(
                            "value {} was acknowledged at offset {offset}, and is not found",
                            send.value
                        );
                        (text, [index.show(number), log.show(offset)])
                    }),
                    Some(found) if found != offset => {
                        moved(index, notes, partition, send.value, (offset, found), number);
                    }
                    _ => {}
                }
            }
        }
        is_whole(index, notes, number, operation);
    }
}

/// `value` was reported at the first offset by `reporter`, and is found at the second.
pub(super) fn moved(
    index: &Index<'_>,
    notes: &mut Notes,
    partition: u32,
    value: u64,
    (reported, found): (u64, u64),
    reporter: u32,
) {
    notes.add(Kind::Moved, partition, || {
        let text =
            format!("value {value} was reported at offset {reported}, and is found at {found}");
        let log = index
            .log(partition)
            .map_or(String::new(), |log| log.show(found));
        (text, [index.show(reporter), log])
    });
}

/// All of a batch or nothing, in a row. What was trimmed is taken as found where it would be.
fn is_whole(index: &Index<'_>, notes: &mut Notes, number: u32, operation: &Operation) {
    let sends = index.sends(number);
    let Some((place, first)) = (0_u64..)
        .zip(sends)
        .find_map(|(place, send)| Some((place, send.found()?)))
    else {
        return;
    };
    let start = index
        .log(operation.partition)
        .and_then(|log| log.last)
        .map_or(0, |last| last.log_start);
    let base = first.checked_sub(place);
    let torn = base.is_none_or(|base| {
        (base..).zip(sends).any(|(offset, send)| {
            let is_trimmed = offset < start;
            send.found() != (!is_trimmed).then_some(offset)
        })
    });
    if torn {
        notes.add(Kind::TornBatch, operation.partition, || {
            let places: Vec<String> = sends
                .iter()
                .map(|send| {
                    send.found()
                        .map_or("nowhere".to_owned(), |offset| offset.to_string())
                })
                .take(16)
                .collect();
            let text = format!("the records of a batch are found at {}", places.join(", "));
            (text, [index.show(number)])
        });
    }
}

/// What may only rise along the offsets: a producer's epoch, the leaders' epochs.
pub(super) fn check_epochs(index: &Index<'_>, notes: &mut Notes) {
    for log in &index.logs {
        let Some(last) = log.last else { continue };
        // Highest epoch so far, with the operation that showed it.
        let mut producers: HashMap<u64, (u16, u32)> = HashMap::new();
        let mut leader: Option<(u64, u32)> = None;
        for (offset, value) in &last.records {
            let Some(send) = index
                .send(*value)
                .filter(|send| send.found() == Some(*offset))
            else {
                continue;
            };
            let number = send.operation;
            let Some(operation) = index.operation(number) else {
                continue;
            };
            if let Call::Append {
                producer: Some(position),
                ..
            } = &operation.call
            {
                let highest = producers
                    .entry(position.id)
                    .or_insert((position.epoch, number));
                if position.epoch < highest.0 {
                    notes.add(Kind::Zombie, log.number, || {
                        let text = format!(
                            "producer {}: epoch {} at offset {offset}, behind epoch {}",
                            position.id, position.epoch, highest.0
                        );
                        (
                            text,
                            [index.show(highest.1), index.show(number), log.show(*offset)],
                        )
                    });
                } else {
                    *highest = (position.epoch, number);
                }
            }
            let Some((_, epoch, _)) = acknowledged(operation) else {
                continue;
            };
            match leader {
                Some((highest, by)) if epoch < highest => {
                    notes.add(Kind::EpochConflict, log.number, || {
                        let text =
                            format!("epoch {epoch} at offset {offset}, behind epoch {highest}");
                        (
                            text,
                            [index.show(by), index.show(number), log.show(*offset)],
                        )
                    });
                }
                _ => leader = Some((epoch, number)),
            }
        }
    }
}
