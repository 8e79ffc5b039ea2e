//! What time demands: one walk over everything in the order in which it was asked and answered.
//!
//! Owns, per partition, how far the log was known to reach at each moment; per leader, what it had told; per producer, how far its
//! acknowledged records had come.

use std::collections::HashMap;

use super::index::{Index, Log, count, narrow};
use super::logs::acknowledged;
use super::report::{AnomalyKind as Kind, Figures, Notes};
use crate::testkit::history::{AckLevel, Call, Operation, Outcome};

/// Something known, and the operation whose answer told it.
#[derive(Debug, Clone, Copy)]
struct Known {
    upto: u64,
    by: u32,
}

/// The higher of the two.
fn raise(known: &mut Option<Known>, upto: u64, by: u32) {
    if known.is_none_or(|known| known.upto < upto) {
        *known = Some(Known { upto, by });
    }
}

/// What one leader told in its epoch.
#[derive(Debug, Clone, Copy, Default)]
struct Leader {
    watermark: Option<Known>,
    /// The end of the plain appends that it acknowledged with acks=all. (The answer to a producer's retry gives the epoch of the
    /// leader that appended it, and comes from another one perhaps.)
    acknowledged: Option<Known>,
    start: Option<Known>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Partition {
    /// The log was known to have everything below.
    reached: Option<Known>,
    acknowledged_ns: Option<u64>,
}

/// What a read told of the partition: end, log start if told, epoch.
fn told(operation: &Operation) -> Option<(u64, Option<u64>, Option<u64>)> {
    match &operation.outcome {
        Outcome::End { end, epoch } => Some((*end, None, *epoch)),
        Outcome::Fetched {
            log_start,
            high_watermark,
            epoch,
            ..
        } => Some((*high_watermark, Some(*log_start), *epoch)),
        _ => None,
    }
}

const ASKED: u64 = 0;
const ANSWERED: u64 = 1 << 63;

struct Sweep<'a, 'h> {
    index: &'a Index<'h>,
    notes: &'a mut Notes,
    figures: &'a mut Figures,
    partitions: Vec<Partition>,
    leaders: HashMap<(u32, u64), Leader>,
    producers: HashMap<(u32, u32), Known>,
}

/// Walks over the history in the order of time.
pub(super) fn check_times(index: &Index<'_>, notes: &mut Notes, figures: &mut Figures) {
    // Time, then questions before answers: two things at the same time have no order. The rest names the operation, or behind
    // them the reading.
    let mut events: Vec<(u64, u64)> = Vec::with_capacity(index.operations.len() * 2);
    for (number, operation) in (0_u64..).zip(index.operations) {
        events.push((operation.invoked_ns, ASKED | number));
        if let Some(completed) = operation.completed_ns {
            events.push((completed, ANSWERED | number));
        }
    }
    let readings = index.logs.iter().flat_map(|log| {
        let readings = log.earlier.iter().copied().chain(log.last);
        readings.map(move |reading| (log, reading))
    });
    let readings: Vec<_> = readings.collect();
    for (number, (_, reading)) in (count(index.operations.len())..).zip(&readings) {
        events.push((reading.began_ns, ASKED | number));
    }
    events.sort_unstable();
    let mut sweep = Sweep {
        index,
        notes,
        figures,
        partitions: vec![Partition::default(); index.logs.len()],
        leaders: HashMap::new(),
        producers: HashMap::new(),
    };
    // What was known when a linearizable question was asked, or what its leader had told when a read was: kept until the answer is
    // looked at, which is at once, since the history knows it already.
    for (_, event) in events {
        let number = usize::try_from(event & !ANSWERED).unwrap_or(usize::MAX);
        if let Some(operation) = index.operations.get(number) {
            if event & ANSWERED == ASKED {
                sweep.asked(narrow(number), operation);
            } else {
                sweep.answered(narrow(number), operation);
            }
        } else if let Some((log, reading)) = readings.get(number - index.operations.len()) {
            let reached = sweep.partitions.get(index.place(log.number));
            if let Some(known) = reached
                .and_then(|one| one.reached)
                .filter(|known| known.upto > reading.end)
            {
                sweep.notes.add(Kind::StaleEnd, log.number, || {
                    let text = format!(
                        "a whole reading ends at {}, {} was known",
                        reading.end, known.upto
                    );
                    let began = super::index::millis(reading.began_ns);
                    (
                        text,
                        [index.show(known.by), format!("reading of {began} ms")],
                    )
                });
            }
        }
    }
    check_told(index, notes);
}

impl Sweep<'_, '_> {
    fn reached(&self, partition: u32) -> Option<Known> {
        self.partitions.get(self.index.place(partition))?.reached
    }

    fn asked(&mut self, number: u32, operation: &Operation) {
        match &operation.call {
            Call::Append { producer, .. } => {
                self.append_asked(number, operation);
                if producer.is_some() {
                    self.in_turn(number, operation);
                }
            }
            Call::LinearizableEnd => {
                let end = told(operation).map(|(end, _, _)| end);
                let known = self.reached(operation.partition);
                if let Some((end, known)) = end.zip(known).filter(|(end, known)| *end < known.upto)
                {
                    let index = self.index;
                    self.notes.add(Kind::StaleEnd, operation.partition, || {
                        let text = format!("{end} was answered, {} was known", known.upto);
                        (text, [index.show(known.by), index.show(number)])
                    });
                }
                self.read_asked(number, operation);
            }
            Call::End | Call::Fetch { .. } => self.read_asked(number, operation),
        }
    }

    /// An append stands behind everything that was known when it was asked for.
    fn append_asked(&mut self, number: u32, operation: &Operation) {
        let Some(known) = self.reached(operation.partition) else {
            return;
        };
        let index = self.index;
        let ack = acknowledged(operation);
        if let Some((base, _, _)) = ack.filter(|(base, _, _)| *base < known.upto) {
            self.notes
                .add(Kind::RealTimeInversion, operation.partition, || {
                    let text = format!("appended at {base}, when {} was known", known.upto);
                    (text, [index.show(known.by), index.show(number)])
                });
        }
        if ack.is_some() || matches!(operation.outcome, Outcome::Failed { .. }) {
            return;
        }
        let found = index.sends(number).iter().find_map(|send| {
            let found = send.found()?;
            (found < known.upto).then_some((send.value, found))
        });
        if let Some((value, found)) = found {
            self.notes.add(Kind::LateUnknown, operation.partition, || {
                let text = format!(
                    "value {value} is found at offset {found}, and was sent when {} was known",
                    known.upto
                );
                (text, [index.show(known.by), index.show(number)])
            });
        }
    }

    /// A producer's records stand in the order of sending, as far as those before are acknowledged.
    fn in_turn(&mut self, number: u32, operation: &Operation) {
        let index = self.index;
        let sends = index.sends(number);
        let ack = acknowledged(operation);
        let first = sends.first().and_then(super::index::Send::found);
        let Some(first) = first.or(ack.map(|(base, _, _)| base)) else {
            return;
        };
        let key = (operation.session, operation.partition);
        if let Some(before) = self
            .producers
            .get(&key)
            .filter(|before| before.upto > first)
        {
            self.notes.add(Kind::Reordered, operation.partition, || {
                let text = format!("at offset {first}, behind it one that was sent earlier");
                (text, [index.show(before.by), index.show(number)])
            });
        }
        if ack.is_some() {
            let known = Known {
                upto: first + count(sends.len()),
                by: number,
            };
            let before = self.producers.entry(key).or_insert(known);
            if before.upto < known.upto {
                *before = known;
            }
        }
    }

    /// A leader does not take back what it told before the question.
    fn read_asked(&mut self, number: u32, operation: &Operation) {
        let Some((end, start, Some(epoch))) = told(operation) else {
            return;
        };
        let Some(leader) = self.leaders.get(&(operation.partition, epoch)) else {
            return;
        };
        let index = self.index;
        let mut wrong = |kind, known: Known, text: String| {
            self.notes.add(kind, operation.partition, || {
                (text, [index.show(known.by), index.show(number)])
            });
        };
        if let Some(known) = leader.watermark.filter(|known| known.upto > end) {
            let text = format!(
                "the leader of epoch {epoch} gave {}, then {end}",
                known.upto
            );
            wrong(Kind::WatermarkRegress, known, text);
        }
        if let Some(known) = leader.acknowledged.filter(|known| known.upto > end) {
            let text = format!(
                "the leader of epoch {epoch} acknowledged up to {}, then showed up to {end}",
                known.upto
            );
            wrong(Kind::SessionViolation, known, text);
        }
        if let Some((start, known)) = start
            .zip(leader.start)
            .filter(|(start, known)| known.upto > *start)
        {
            let text = format!(
                "the leader of epoch {epoch} gave {}, then {start}",
                known.upto
            );
            wrong(Kind::LogStartRegress, known, text);
        }
    }

    fn answered(&mut self, number: u32, operation: &Operation) {
        let place = self.index.place(operation.partition);
        let Some(partition) = self.partitions.get_mut(place) else {
            return;
        };
        if let Some((base, epoch, _)) = acknowledged(operation) {
            let end = base + count(self.index.sends(number).len());
            raise(&mut partition.reached, end, number);
            if let Some(completed) = operation.completed_ns {
                let before = partition
                    .acknowledged_ns
                    .replace(completed)
                    .unwrap_or(completed);
                let silence = &mut self.figures.silence_max_ns;
                *silence = (*silence).max(completed.saturating_sub(before));
            }
            if let Call::Append {
                producer: None,
                acks: AckLevel::All,
                ..
            } = &operation.call
            {
                let leader = self
                    .leaders
                    .entry((operation.partition, epoch))
                    .or_default();
                raise(&mut leader.acknowledged, end, number);
            }
        }
        if let Some((end, start, epoch)) = told(operation) {
            raise(&mut partition.reached, end, number);
            if let Some(epoch) = epoch {
                let leader = self
                    .leaders
                    .entry((operation.partition, epoch))
                    .or_default();
                raise(&mut leader.watermark, end, number);
                if let Some(start) = start {
                    raise(&mut leader.start, start, number);
                }
            }
        }
    }
}

/// Whatever was told before the log was read holds for the log.
fn check_told(index: &Index<'_>, notes: &mut Notes) {
    for (number, operation) in (0_u32..).zip(index.operations) {
        let Some((end, start, _)) = told(operation) else {
            continue;
        };
        let log = index.log(operation.partition);
        let Some(last) = log.and_then(|log| log.last) else {
            continue;
        };
        if operation
            .completed_ns
            .is_none_or(|completed| completed >= last.began_ns)
        {
            continue;
        }
        let range = || format!("log: from {} to {}", last.log_start, last.end);
        if end > last.end {
            notes.add(Kind::WatermarkRegress, last.partition, || {
                let text = format!("{end} was given, the log ends at {}", last.end);
                (text, [index.show(number), range()])
            });
        }
        if start.is_some_and(|start| start > last.log_start) {
            notes.add(Kind::LogStartRegress, last.partition, || {
                let text = format!("the log begins at {} again", last.log_start);
                (text, [index.show(number), range()])
            });
        }
    }
    for log in &index.logs {
        for reading in &log.earlier {
            ends(log, reading, notes);
        }
    }
}

fn ends(log: &Log<'_>, reading: &crate::testkit::history::FinalLog, notes: &mut Notes) {
    let Some(last) = log.last else { return };
    let show = |what: &str, of: &crate::testkit::history::FinalLog| {
        format!("{what}: from {} to {}", of.log_start, of.end)
    };
    if reading.end > last.end {
        notes.add(Kind::WatermarkRegress, log.number, || {
            let text = format!(
                "the log was read to {}, it ends at {}",
                reading.end, last.end
            );
            (text, [show("reading", reading), show("log", last)])
        });
    }
    if reading.log_start > last.log_start {
        notes.add(Kind::LogStartRegress, log.number, || {
            let text = format!("the log begins at {} again", last.log_start);
            (text, [show("reading", reading), show("log", last)])
        });
    }
}
