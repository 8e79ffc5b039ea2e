//! Judges a history: what it must not show, and whether enough happened.
//!
//! Owns the order of the passes, the coverage, and the verdict. Asks nobody: everything comes from the [`History`]. Each pass is
//! linear; only the times are sorted, once. [`AnomalyKind`] has the definition of everything that is looked for.
//!
//! # What a passed history implies
//!
//! Values are unique and the log gives each its offset, so that no search is needed. Let a history have none of `Lost`, `Duplicate`, `Gap`,
//! `Phantom`, `Strange`, `Misplaced`, `Moved`, `Aborted`, `TornBatch`, `RealTimeInversion`, `LateUnknown`, `StaleEnd`, `WatermarkRegress`. Then each
//! partition, seen through its appends, its linearizable ends and its last whole reading, is **linearizable**:
//! order the appends that are found by their offset, and put each linearizable end `e` behind the append that ends at `e` (there is one:
//! the log is dense, and an end inside a batch is a `TornBatch`), those with the same end in the order of their questions.
//! By itself this order is what a log does: dense offsets, each batch whole at the place it was told, each end right. It also
//! keeps the order of time. Suppose `x` stands before `y`, and `y` was answered before `x` was asked. Two appends: `y`'s end was
//! known when `x` was asked, and `x` is below it: `RealTimeInversion`, or `LateUnknown`. An append `x` and an end `y`: the same, since `y`'s end is behind
//! `x`. An end `x` and an append `y`, or two ends: `y` reaches further than `x`'s answer and was known: `StaleEnd`. So no such pair exists.
//! Appends with an unknown outcome that are not found had no effect in this order, which is one of the two things they may have done.
//! The other direction holds as well: offsets are visible, so any linearization has this order, and each of these kinds contradicts it.
//!
//! Partitions are independent, so the whole is linearizable if each is. Plain reads and plain ends are not meant to be linearizable: a
//! leader that was replaced and does not know it may answer from an older prefix. What is checked of them is that they are
//! a prefix of the log that is never undone (`DirtyRead`, `Moved`, `OffsetCollision`, `WatermarkRegress`), in order and without holes (`FetchSkip`, `FetchBack`,
//! `BeyondWatermark`, `Withheld`), and that one leader's answers go together (`SessionViolation`, `WatermarkRegress`, `LogStartRegress`).
//!
//! # What it does not imply
//!
//! - Anything about a kind of operation that did not happen often: that is what [`Coverage`] is for.
//! - That a value with an unknown outcome was right to be there, or not to be there.
//! - Anything about offsets below the log's start but that nobody was told two values for one offset.
//! - Availability. [`Figures::silence_max_ns`] is a figure, not a judgement.

mod index;
mod logs;
mod reads;
mod replicas;
mod report;
mod sweep;
mod values;

use std::collections::{BTreeMap, BTreeSet};

use self::index::{Index, count};
use self::report::Notes;
use super::history::{History, Outcome};

pub use self::replicas::COPY_LOSING_FAULTS;
pub use self::report::{Anomaly, AnomalyKind, Figures, Report, Verdict};

/// What must have happened, or the run proves nothing. The default asks for one operation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Operations with an answer that says done, at least; never less than one.
    pub operations_min: u64,
    /// Operations with an unknown outcome, at least.
    pub unknown_min: u64,
    /// Leaders that followed another one, at least.
    pub leader_changes_min: u64,
    /// Faults by kind, at least so many of each.
    pub faults: BTreeMap<String, u64>,
}

/// Judges `history`. Three verdicts: [`Verdict::Invalid`] when the history contradicts itself, as by a value that was sent twice or an answer before
/// its question: whoever recorded it is wrong, and nothing else is said. Else [`Verdict::Anomalies`] when anything is wrong; else
/// [`Verdict::Invalid`] when a partition was not read at the end or less was shown than `coverage`; else [`Verdict::Passed`].
///
/// Needs, beside the history, about 100 bytes of memory per operation.
pub fn check(history: &History, coverage: &Coverage) -> Report {
    let mut notes = Notes::default();
    let mut index = Index::new(history);
    let mut figures = figures(history, &index);
    let mut gaps = std::mem::take(&mut index.gaps);
    if !gaps.is_empty() {
        return Report {
            verdict: Verdict::Invalid,
            anomalies: Vec::new(),
            gaps,
            figures,
        };
    }
    logs::read_logs(&mut index, &mut notes, &mut figures);
    logs::check_appends(&index, &mut notes, &mut figures);
    logs::check_epochs(&index, &mut notes);
    reads::check_reads(&index, &mut notes, &mut figures);
    sweep::check_times(&index, &mut notes, &mut figures);
    replicas::check_dumps(&index, history, &mut notes);
    replicas::check_copies(&index, history, &mut notes);
    replicas::check_leaders(history, &mut notes);
    figures.anomalies = notes.counts;
    for log in index.logs.iter().filter(|log| log.last.is_none()) {
        gaps.push(format!("partition {} was not read at the end", log.number));
    }
    coverage.judge(&figures, &mut gaps);
    let verdict = if !notes.anomalies.is_empty() {
        Verdict::Anomalies
    } else if !gaps.is_empty() {
        Verdict::Invalid
    } else {
        Verdict::Passed
    };
    Report {
        verdict,
        anomalies: notes.anomalies,
        gaps,
        figures,
    }
}

fn figures(history: &History, index: &Index<'_>) -> Figures {
    let mut figures = Figures {
        operations: count(history.operations.len()),
        sent: count(index.sent()),
        ..Figures::default()
    };
    let mut epochs: BTreeSet<(u32, u64)> = BTreeSet::new();
    let seen = history.leaders.iter();
    epochs.extend(seen.map(|seen| (seen.partition, seen.epoch)));
    let mut last = None;
    for operation in &history.operations {
        let epoch = match &operation.outcome {
            Outcome::Failed { .. } => {
                figures.failed += 1;
                None
            }
            Outcome::Unknown { .. } => {
                figures.unknown += 1;
                None
            }
            Outcome::Appended { epoch, .. } => {
                figures.ok += 1;
                Some(*epoch)
            }
            Outcome::Fetched { epoch, .. } | Outcome::End { epoch, .. } => {
                figures.ok += 1;
                *epoch
            }
        };
        let epoch = epoch.map(|epoch| (operation.partition, epoch));
        // Mostly the same as before.
        if epoch != last {
            epochs.extend(epoch);
            last = epoch;
        }
    }
    let partitions: BTreeSet<u32> = epochs.iter().map(|(partition, _)| *partition).collect();
    figures.leader_changes = count(epochs.len() - partitions.len());
    for fault in &history.faults {
        *figures.faults.entry(fault.kind.clone()).or_default() += 1;
    }
    figures
}

impl Coverage {
    fn judge(&self, figures: &Figures, gaps: &mut Vec<String>) {
        let mut demand = |what: &str, have: u64, min: u64| {
            if have < min {
                gaps.push(format!("{what}: {have}, at least {min} are wanted"));
            }
        };
        demand("operations done", figures.ok, self.operations_min.max(1));
        demand("unknown outcomes", figures.unknown, self.unknown_min);
        demand(
            "changes of leader",
            figures.leader_changes,
            self.leader_changes_min,
        );
        for (kind, min) in &self.faults {
            let have = figures.faults.get(kind).copied().unwrap_or(0);
            demand(&format!("faults of kind {kind}"), have, *min);
        }
    }
}
