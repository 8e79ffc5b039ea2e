//! What the checker says: kinds of anomalies, the verdict, the figures, and how they are shown.
//!
//! Owns the definition of every kind, and the bound on how many of a kind are shown. Finds nothing itself.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What can be wrong with a history. "Found" means: in the final log, the last whole reading of the partition. "Acknowledged" leaves
/// out [`AckLevel::None`](crate::testkit::history::AckLevel::None), whose answer promises nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AnomalyKind {
    /// A value was acknowledged, at or above the log's start, and is not found.
    Lost,
    /// A value is found at two offsets or more of one partition.
    Duplicate,
    /// A value is found whose append had definitely failed.
    Aborted,
    /// The log lacks an offset between its start and its end, repeats one, or goes back.
    Gap,
}

impl AnomalyKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lost, Self::Duplicate, Self::Aborted, Self::Gap];
}

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anomaly {
    /// What it is.
    pub kind: AnomalyKind,
    /// In which partition.
    pub partition: u32,
    /// The contradiction in one line.
    pub text: String,
    /// The few things in the history that contradict each other, a line each.
    pub witness: Vec<String>,
}

/// The judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Enough happened, and nothing is wrong.
    Passed,
    /// Something is wrong.
    Anomalies,
    /// Nothing is wrong in what can be judged, but too little happened, or the history is not whole: it proves nothing.
    Invalid,
}

/// What a history holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Operations of every kind and outcome.
    pub operations: u64,
    /// Of these, with an answer that says done.
    pub ok: u64,
    /// Of these, that definitely had no effect.
    pub failed: u64,
    /// Of these, with an unknown outcome, unanswered ones included.
    pub unknown: u64,
    /// Appends with an unknown outcome that are found.
    pub unknown_found: u64,
    /// Values that were acknowledged.
    pub acknowledged: u64,
    /// Records that were found.
    pub found: u64,
    /// Leaders that followed another one, over all partitions, as far as they showed.
    pub leader_changes: u64,
    /// Faults by kind.
    pub faults: BTreeMap<String, u64>,
    /// Anomalies by kind: all of them, however few are shown.
    pub anomalies: BTreeMap<AnomalyKind, u64>,
}

/// The judgement with its reasons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// It.
    pub verdict: Verdict,
    /// What is wrong, with witnesses; at most [`Report::EXAMPLES_MAX`] of a kind.
    pub anomalies: Vec<Anomaly>,
    /// Why the history proves too little.
    pub gaps: Vec<String>,
    /// What it holds.
    pub figures: Figures,
}

impl Report {
    /// Anomalies of one kind that are kept with their witness.
    pub const EXAMPLES_MAX: u64 = 5;

    /// Whether the run passed.
    pub fn passed(&self) -> bool {
        self.verdict == Verdict::Passed
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#?}")
    }
}
