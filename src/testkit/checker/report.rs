//! What the checker says: kinds of anomalies, the verdict, the figures, and how they are shown.
//!
//! Owns the definition of every kind, and the bound on how many of a kind are shown. Finds nothing itself.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What can be wrong with a history.
        ///
        /// The log of a partition is its last whole reading. A value is *found* when it is in the log. It is *acknowledged* when
        /// its append was answered so, except at [`AckLevel::None`](crate::testkit::history::AckLevel::None), whose answer promises nothing. What was trimmed
        /// (below the log's start) and what may have come later (answered after the reading of the log began, and at or behind its
        /// end) is not missed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[non_exhaustive]
        pub enum AnomalyKind {
            $($(#[$doc])* $name,)*
        }

        impl AnomalyKind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name in words.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

kinds! {
    /// An acknowledged value is not found.
    Lost = "lost",
    /// A value is found at two offsets of one partition.
    Duplicate = "duplicate",
    /// A value is found before one that the same idempotent producer sent to the partition earlier, and that was acknowledged.
    Reordered = "reordered",
    /// A whole reading lacks an offset between its start and its end, repeats one, goes back, or goes beyond its end.
    Gap = "gap",
    /// A value was read, or is found, that nobody sent.
    Phantom = "phantom",
    /// A value was read, or is found, that is damaged.
    Strange = "strange",
    /// A value was read, or is found, in another partition than the one it was sent to.
    Misplaced = "misplaced",
    /// Two values were reported for one offset: by acknowledgements, reads or whole readings, any two of them.
    OffsetCollision = "offset collision",
    /// A value is found at another offset than an acknowledgement or a read gave it.
    Moved = "moved",
    /// A value was read and is not found: what was read was not committed.
    DirtyRead = "dirty read",
    /// A read returned a record at or behind the high watermark that it gave itself.
    BeyondWatermark = "beyond the watermark",
    /// A value was read, or is found, whose append had definitely failed.
    Aborted = "aborted append seen",
    /// An append was acknowledged at an offset below what the log was known to hold before the append was asked for.
    RealTimeInversion = "real-time inversion",
    /// The same for an append whose outcome is unknown: it is found where the log had already been; or it is absent from an
    /// earlier whole reading that covers its offset.
    LateUnknown = "late unknown",
    /// A linearizable end, or that of a whole reading, below what the log was known to hold before the question.
    StaleEnd = "stale linearizable end",
    /// A read left out records: between the offset asked for and its first record, or between two records.
    FetchSkip = "skip in a read",
    /// A read returned a record below the offset asked for, or went back, or repeated an offset.
    FetchBack = "step back in a read",
    /// A read returned nothing although the high watermark that it gave is above the offset asked for.
    Withheld = "withheld",
    /// A leader acknowledged a plain append with acks=all, and a read that was asked for after that and answered in the same epoch does not
    /// reach it: who has an acknowledgement can read the record at that leader.
    SessionViolation = "session violation",
    /// A part of a batch is found and another part is not, or its records are not in a row; or an end offset falls inside a batch.
    TornBatch = "torn batch",
    /// A high watermark was given that is above the log's end; or a leader gave a lower one than it had given in the same epoch before the
    /// question.
    WatermarkRegress = "watermark went back",
    /// The same for the log's start.
    LogStartRegress = "log start went back",
    /// A value of a producer is found behind a value of the same producer with a higher epoch.
    Zombie = "zombie",
    /// A replica holds another record than the log or another replica, or lacks one between its start and its high watermark.
    ReplicaDivergence = "replica divergence",
    /// Two brokers led a partition in one epoch; or the leaders' epochs that the acknowledgements give fall along the offsets.
    EpochConflict = "epoch conflict",
    /// An acknowledgement names more copies than there are replicas that can hold the record, though no disk was lost and no replica moved;
    /// or one with acks=all names none.
    AckContract = "acknowledgement without its copies",
    /// A value was read before its append was asked for.
    FromTheFuture = "from the future",
}

impl fmt::Display for AnomalyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
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
    /// Values that were sent.
    pub sent: u64,
    /// Of these, acknowledged.
    pub acknowledged: u64,
    /// Values with an unknown outcome that are found.
    pub unknown_found: u64,
    /// Records that were found.
    pub found: u64,
    /// Records that reads returned.
    pub read: u64,
    /// Linearizable ends that were answered.
    pub linearizable_ends: u64,
    /// Leaders that followed another one, over all partitions, as far as they showed.
    pub leader_changes: u64,
    /// The longest time in which no append to some partition was acknowledged, between two that were; in ns.
    pub silence_max_ns: u64,
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

    /// Whether an anomaly of this kind was found.
    pub fn has(&self, kind: AnomalyKind) -> bool {
        self.figures.anomalies.contains_key(&kind)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = &self.figures;
        match self.verdict {
            Verdict::Passed => writeln!(f, "passed: nothing is wrong")?,
            Verdict::Anomalies => {
                let total: u64 = figures.anomalies.values().sum();
                writeln!(f, "ANOMALIES: {total}")?;
            }
            Verdict::Invalid => writeln!(f, "INVALID: the run proves nothing")?,
        }
        writeln!(
            f,
            "  {} operations: {} done, {} failed, {} unknown; {} changes of leader; longest silence of a partition {} ms",
            figures.operations,
            figures.ok,
            figures.failed,
            figures.unknown,
            figures.leader_changes,
            figures.silence_max_ns / 1_000_000
        )?;
        writeln!(
            f,
            "  {} records sent, {} acknowledged, {} found ({} of unknown outcome); {} read meanwhile; {} linearizable ends",
            figures.sent,
            figures.acknowledged,
            figures.found,
            figures.unknown_found,
            figures.read,
            figures.linearizable_ends
        )?;
        if !figures.faults.is_empty() {
            let faults = figures.faults.iter();
            let faults: Vec<String> = faults
                .map(|(kind, count)| format!("{kind} {count}"))
                .collect();
            writeln!(f, "  faults: {}", faults.join(", "))?;
        }
        for gap in &self.gaps {
            writeln!(f, "  too little: {gap}")?;
        }
        for (kind, count) in &figures.anomalies {
            writeln!(f, "  {kind}: {count}")?;
            for anomaly in self.anomalies.iter().filter(|one| one.kind == *kind) {
                writeln!(f, "    partition {}: {}", anomaly.partition, anomaly.text)?;
                for line in &anomaly.witness {
                    writeln!(f, "      {line}")?;
                }
            }
        }
        Ok(())
    }
}

/// The anomalies found so far.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) anomalies: Vec<Anomaly>,
    pub(super) counts: BTreeMap<AnomalyKind, u64>,
}

impl Notes {
    /// Counts an anomaly, and keeps it with its witness while there are few of its kind.
    pub(super) fn add<const LINES: usize>(
        &mut self,
        kind: AnomalyKind,
        partition: u32,
        tell: impl FnOnce() -> (String, [String; LINES]),
    ) {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        if *count <= Report::EXAMPLES_MAX {
            let (text, witness) = tell();
            self.anomalies.push(Anomaly {
                kind,
                partition,
                text,
                witness: witness.into(),
            });
        }
    }
}
