//! Judges a history: what it must not show, and whether enough happened.
//!
//! Owns the order of the passes. Asks nobody: everything comes from the [`History`].

mod report;

use std::collections::{BTreeMap, BTreeSet};

use super::history::{Call, History, Outcome};
pub use report::{Anomaly, AnomalyKind, Figures, Report, Verdict};

/// What must have happened, or the run proves nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Operations with an answer that says done, at least.
    pub operations_min: u64,
    /// Operations with an unknown outcome, at least.
    pub unknown_min: u64,
    /// Leaders that followed another one, at least.
    pub leader_changes_min: u64,
    /// Faults by kind, at least so many of each.
    pub faults: BTreeMap<String, u64>,
}

/// Judges `history`.
pub fn check(history: &History, coverage: &Coverage) -> Report {
    let mut anomalies = Vec::new();
    let mut figures = Figures::default();
    let mut note = |kind, partition, text: String| {
        anomalies.push(Anomaly {
            kind,
            partition,
            text,
            witness: Vec::new(),
        });
    };
    let mut places: BTreeMap<(u32, u64), u64> = BTreeMap::new();
    for log in &history.logs {
        let mut next = log.log_start;
        for (offset, value) in &log.records {
            if *offset != next {
                note(AnomalyKind::Gap, log.partition, format!("offset {next}"));
            }
            next = offset + 1;
            if let Some(other) = places.insert((log.partition, *value), *offset) {
                let text = format!("value {value} at offsets {other} and {offset}");
                note(AnomalyKind::Duplicate, log.partition, text);
            }
        }
        if next != log.end {
            note(AnomalyKind::Gap, log.partition, format!("offset {next}"));
        }
    }
    let mut epochs: BTreeSet<(u32, u64)> = BTreeSet::new();
    for operation in &history.operations {
        figures.operations += 1;
        match &operation.outcome {
            Outcome::Failed { .. } => figures.failed += 1,
            Outcome::Unknown { .. } => figures.unknown += 1,
            _ => figures.ok += 1,
        }
        let Call::Append { values, .. } = &operation.call else {
            continue;
        };
        for value in values {
            let found = places.contains_key(&(operation.partition, *value));
            match &operation.outcome {
                Outcome::Appended { epoch, .. } => {
                    epochs.insert((operation.partition, *epoch));
                    if !found {
                        let text = format!("value {value} was acknowledged and is not there");
                        note(AnomalyKind::Lost, operation.partition, text);
                    }
                }
                Outcome::Failed { reason } if found => {
                    let text = format!("value {value} is there: {reason}");
                    note(AnomalyKind::Aborted, operation.partition, text);
                }
                _ => {}
            }
        }
    }
    let partitions: BTreeSet<u32> = epochs.iter().map(|(partition, _)| *partition).collect();
    let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    figures.leader_changes = count(epochs.len() - partitions.len());
    for fault in &history.faults {
        *figures.faults.entry(fault.kind.clone()).or_default() += 1;
    }
    let mut gaps = Vec::new();
    let mut demand = |what: &str, have: u64, min: u64| {
        if have < min {
            gaps.push(format!("{what}: {have}, at least {min} are wanted"));
        }
    };
    demand("operations done", figures.ok, coverage.operations_min);
    demand("unknown outcomes", figures.unknown, coverage.unknown_min);
    demand(
        "changes of leader",
        figures.leader_changes,
        coverage.leader_changes_min,
    );
    for (kind, min) in &coverage.faults {
        let have = figures.faults.get(kind).copied().unwrap_or(0);
        demand(&format!("faults of kind {kind}"), have, *min);
    }
    let verdict = if !anomalies.is_empty() {
        Verdict::Anomalies
    } else if !gaps.is_empty() {
        Verdict::Invalid
    } else {
        Verdict::Passed
    };
    Report {
        verdict,
        anomalies,
        gaps,
        figures,
    }
}
