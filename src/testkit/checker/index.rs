//! The history, arranged for looking things up: which append sent a value, where it is found, what stands at an offset.
//!
//! Owns nothing but what it derives from the history; every step is linear in it. Judges only whether the history can be judged.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::values::Values;
use crate::testkit::history::{AckLevel, Call, FinalLog, History, Operation, Outcome};

/// Stands for "nowhere".
const NOWHERE: u64 = u64::MAX;

/// A value that was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Send {
    pub(super) value: u64,
    found: u64,
    /// The operation that sent it.
    pub(super) operation: u32,
}

impl Send {
    /// Its offset in the log.
    pub(super) fn found(&self) -> Option<u64> {
        (self.found != NOWHERE).then_some(self.found)
    }
}

/// A partition's log.
#[derive(Debug, Default)]
pub(super) struct Log<'a> {
    pub(super) number: u32,
    /// The last whole reading.
    pub(super) last: Option<&'a FinalLog>,
    /// The readings before it, in order.
    pub(super) earlier: Vec<&'a FinalLog>,
    /// Its records in order, when they were not read in order.
    sorted: Option<Vec<(u64, u64)>>,
}

impl Log<'_> {
    /// The value at `offset`.
    pub(super) fn at(&self, offset: u64) -> Option<u64> {
        let last = self.last?;
        let records = self.sorted.as_deref().unwrap_or(&last.records);
        let first = records.first()?.0;
        let place = usize::try_from(offset.checked_sub(first)?).ok()?;
        match records.get(place) {
            Some((at, value)) if *at == offset => Some(*value),
            _ => {
                let found = records.binary_search_by_key(&offset, |(at, _)| *at).ok()?;
                records.get(found).map(|(_, value)| *value)
            }
        }
    }

    /// Whether the log must hold what was known of `offset` at `known_ns`: not when it was trimmed, nor when it may have come after the
    /// reading.
    pub(super) fn covers(&self, offset: u64, known_ns: u64) -> bool {
        self.last.is_some_and(|last| {
            offset >= last.log_start && (offset < last.end || known_ns < last.began_ns)
        })
    }

    /// What stands at `offset`, for a person.
    pub(super) fn show(&self, offset: u64) -> String {
        match (self.at(offset), self.last) {
            (Some(value), _) => format!("log: offset {offset} holds value {value}"),
            (None, Some(last)) => format!(
                "log: nothing at offset {offset}; it was read from {} to {}",
                last.log_start, last.end
            ),
            (None, None) => "log: it was not read".to_owned(),
        }
    }
}

/// The history, arranged.
#[derive(Debug)]
pub(super) struct Index<'a> {
    pub(super) operations: &'a [Operation],
    pub(super) logs: Vec<Log<'a>>,
    by_number: BTreeMap<u32, usize>,
    sends: Vec<Send>,
    /// Where an operation's values begin among the sends.
    first_send: Vec<u32>,
    values: Values,
    /// Why the history cannot be judged.
    pub(super) gaps: Vec<String>,
}

pub(super) fn narrow(wide: usize) -> u32 {
    u32::try_from(wide).unwrap_or(u32::MAX)
}

pub(super) fn wide(narrow: u32) -> usize {
    usize::try_from(narrow).unwrap_or(usize::MAX)
}

pub(super) fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// No offset is this high, so that the few added to one do not overflow.
const OFFSET_MAX: u64 = 1 << 62;

fn offsets(records: &[(u64, u64)], others: [u64; 2]) -> bool {
    let read = records.iter().map(|(offset, _)| *offset);
    read.chain(others).all(|offset| offset < OFFSET_MAX)
}

/// Whether the answer can be one to the call.
fn fits(operation: &Operation) -> bool {
    let fits = match (&operation.call, &operation.outcome) {
        (_, Outcome::Failed { .. } | Outcome::Unknown { .. }) => true,
        (
            Call::Fetch { from },
            Outcome::Fetched {
                log_start,
                high_watermark,
                records,
                ..
            },
        ) => *from < OFFSET_MAX && offsets(records, [*log_start, *high_watermark]),
        (Call::LinearizableEnd | Call::End, Outcome::End { end, .. }) => *end < OFFSET_MAX,
        (Call::Append { .. }, Outcome::Appended { base, .. }) => *base < OFFSET_MAX,
        _ => false,
    };
    let answered = match operation.completed_ns {
        Some(completed) => completed >= operation.invoked_ns,
        None => matches!(operation.outcome, Outcome::Unknown { .. }),
    };
    let empty = matches!(&operation.call, Call::Append { values, .. } if values.is_empty());
    fits && answered && !empty
}

impl<'a> Index<'a> {
    pub(super) fn new(history: &'a History) -> Self {
        let mut index = Self {
            operations: &history.operations,
            logs: Vec::new(),
            by_number: BTreeMap::new(),
            sends: Vec::new(),
            first_send: Vec::with_capacity(history.operations.len()),
            values: Values::new(std::iter::empty()).0,
            gaps: Vec::new(),
        };
        let mut readings: Vec<&FinalLog> = history.logs.iter().collect();
        readings.sort_by_key(|log| log.began_ns);
        for reading in readings {
            let log = index.log_of(reading.partition);
            log.earlier.extend(log.last.replace(reading));
        }
        for (number, operation) in (0_u32..).zip(&history.operations) {
            index.take(number, operation);
        }
        let (values, twice) = Values::new(index.sends.iter().map(|send| send.value));
        index.values = values;
        for value in twice {
            index.unusable(format!("value {value} was sent twice"));
        }
        let logs = history.logs.iter();
        let logs = logs.map(|log| (log.partition, &log.records, [log.log_start, log.end]));
        let dumps = history.dumps.iter();
        let dumps = dumps.map(|dump| {
            let range = [dump.log_start, dump.high_watermark];
            (dump.partition, &dump.records, range)
        });
        for (number, records, range) in logs.chain(dumps) {
            if !offsets(records, range) {
                index.unusable(format!("an offset of partition {number} is beyond any log"));
            }
        }
        for log in &mut index.logs {
            let Some(last) = log.last else { continue };
            if !last.records.is_sorted() {
                let mut sorted = last.records.clone();
                sorted.sort_unstable();
                log.sorted = Some(sorted);
            }
        }
        if history.operations.len() >= wide(u32::MAX) || index.sends.len() >= wide(u32::MAX) {
            index
                .gaps
                .push("more operations or values than can be judged".to_owned());
        }
        index
    }

    /// The log of the partition, which is there from now on.
    fn log_of(&mut self, number: u32) -> &mut Log<'a> {
        let next = self.logs.len();
        let at = *self.by_number.entry(number).or_insert(next);
        if at == next {
            self.logs.push(Log {
                number,
                ..Log::default()
            });
        }
        // It was just put there, if it was not there before.
        #[allow(clippy::indexing_slicing)]
        &mut self.logs[at]
    }

    fn take(&mut self, number: u32, operation: &Operation) {
        if !fits(operation) {
            let shown = self.show(number);
            self.unusable(format!("an operation contradicts itself: {shown}"));
        }
        self.first_send.push(narrow(self.sends.len()));
        self.log_of(operation.partition);
        let Call::Append { values, .. } = &operation.call else {
            return;
        };
        self.sends.extend(values.iter().map(|value| Send {
            value: *value,
            found: NOWHERE,
            operation: number,
        }));
    }

    /// The first few reasons will do.
    fn unusable(&mut self, reason: String) {
        if self.gaps.len() < 5 {
            self.gaps.push(reason);
        }
    }

    pub(super) fn log(&self, number: u32) -> Option<&Log<'a>> {
        self.logs.get(*self.by_number.get(&number)?)
    }

    /// Which of the logs is that of the partition.
    pub(super) fn place(&self, number: u32) -> usize {
        self.by_number.get(&number).copied().unwrap_or(usize::MAX)
    }

    pub(super) fn operation(&self, number: u32) -> Option<&'a Operation> {
        self.operations.get(wide(number))
    }

    /// The append that sent `value`.
    pub(super) fn send(&self, value: u64) -> Option<&Send> {
        self.sends.get(self.values.place(value)?)
    }

    /// The values that an append sent.
    pub(super) fn sends(&self, operation: u32) -> &[Send] {
        let Some(Call::Append { values, .. }) = self.operation(operation).map(|one| &one.call)
        else {
            return &[];
        };
        let first = self
            .first_send
            .get(wide(operation))
            .copied()
            .map_or(0, wide);
        self.sends
            .get(first..first + values.len())
            .unwrap_or_default()
    }

    /// Notes that `value` is found at `offset`; where it was found before, when it was.
    pub(super) fn set_found(&mut self, value: u64, offset: u64) -> Option<u64> {
        let place = self.values.place(value)?;
        let send = self.sends.get_mut(place)?;
        let before = send.found();
        if before.is_none() {
            send.found = offset;
        }
        before
    }

    /// Number of sent values.
    pub(super) fn sent(&self) -> usize {
        self.sends.len()
    }

    /// An operation in one line, for a person.
    pub(super) fn show(&self, number: u32) -> String {
        let Some(operation) = self.operation(number) else {
            return format!("operation {number}: not there");
        };
        let mut line = format!(
            "operation {number}, session {}, {} ms: ",
            operation.session,
            millis(operation.invoked_ns)
        );
        // Writing to a string does not fail.
        match &operation.call {
            Call::Append {
                values,
                producer,
                acks,
            } => {
                let level = match acks {
                    AckLevel::All => "all",
                    AckLevel::Leader => "leader",
                    AckLevel::None => "none",
                };
                write!(line, "append {} acks={level}", list(values)).ok();
                if let Some(producer) = producer {
                    write!(line, " producer {} epoch {}", producer.id, producer.epoch).ok();
                }
            }
            Call::Fetch { from } => {
                write!(line, "read from {from}").ok();
            }
            Call::LinearizableEnd => line.push_str("linearizable end"),
            Call::End => line.push_str("end"),
        }
        match operation.completed_ns {
            Some(completed) => write!(line, " → {} ms: ", millis(completed)).ok(),
            None => write!(line, " → never: ").ok(),
        };
        let epoch =
            |epoch: &Option<u64>| epoch.map_or(String::new(), |epoch| format!(", epoch {epoch}"));
        match &operation.outcome {
            Outcome::Appended {
                base,
                epoch,
                copies,
            } => write!(line, "at {base}, epoch {epoch}, {copies} copies"),
            Outcome::Fetched {
                log_start,
                high_watermark,
                epoch: led,
                records,
            } => {
                let offsets: Vec<u64> = records.iter().map(|(offset, _)| *offset).collect();
                write!(
                    line,
                    "offsets {}, start {log_start}, watermark {high_watermark}{}",
                    list(&offsets),
                    epoch(led)
                )
            }
            Outcome::End { end, epoch: led } => write!(line, "{end}{}", epoch(led)),
            Outcome::Failed { reason } => write!(line, "failed: {reason}"),
            Outcome::Unknown { reason } => write!(line, "unknown: {reason}"),
        }
        .ok();
        line
    }
}

/// The first numbers and the last one.
fn list(numbers: &[u64]) -> String {
    match numbers {
        [first, _, _, _, .., last] => {
            format!("[{first} … {last}: {} of them]", numbers.len())
        }
        few => format!("{few:?}"),
    }
}

/// Milliseconds with their fraction.
pub(super) fn millis(ns: u64) -> String {
    format!("{}.{:06}", ns / 1_000_000, ns % 1_000_000)
}
