//! An offline check of a data directory: reads everything, changes nothing.
//!
//! Owns the report. The judgement is that of `scan.rs`, over the whole journal and without the catalog, which is
//! only a cache and not looked at.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::catalog::{Catalog, CatalogError, Change, Pair};
use super::disk::{Disk, RealDisk};
use super::frame::FORMAT;
use super::identity::{self, Found};
use super::ledger::{Ledger, LedgerError};
use super::scan::{Scan, ScanError, survey};

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything that was durable is there and whole.
    Ok,
    /// Bytes that were durable are missing or wrong.
    Damaged,
    /// The directory cannot be judged: not there, in use, unreadable, or of a newer format.
    CannotCheck,
}

impl Verdict {
    /// The exit code of `logboom fsck`: 0, 1 or 2.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Damaged => 1,
            Self::CannotCheck => 2,
        }
    }
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Whether it is damage, or only worth knowing.
    pub damage: bool,
    /// What was found, where.
    pub what: String,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsckReport {
    /// What it came to.
    pub verdict: Verdict,
    /// Everything found.
    pub findings: Vec<Finding>,
    /// The directory's broker, once known.
    pub broker: Option<u32>,
    /// The directory's incarnation in hexadecimal, once known.
    pub incarnation: Option<String>,
    /// The boot number of the last process that opened the directory.
    pub boot: u64,
    /// Segment files.
    pub segments: usize,
    /// Bytes of all segment files.
    pub journal_bytes: u64,
    /// Valid frames.
    pub frames: u64,
    /// Groups with a log.
    pub groups: usize,
    /// Entries retained in all groups.
    pub entries: u64,
    /// Journal bytes written since the directory was created.
    pub position: u64,
}

impl FsckReport {
    fn end(mut self, verdict: Verdict, what: String) -> Self {
        self.verdict = verdict;
        self.findings.push(Finding {
            damage: verdict == Verdict::Damaged,
            what,
        });
        self
    }

    fn note(&mut self, what: String) {
        self.findings.push(Finding {
            damage: false,
            what,
        });
    }
}

/// A catalog that holds nothing: the ledger then keeps everything in memory.
#[derive(Debug)]
struct Nothing;

impl Catalog for Nothing {
    fn get(&self, _key: &[u8]) -> Result<Option<Bytes>, CatalogError> {
        Ok(None)
    }
    fn floor(&self, _low: &[u8], _high: &[u8]) -> Result<Option<Pair>, CatalogError> {
        Ok(None)
    }
    fn ceiling(&self, _low: &[u8], _high: &[u8]) -> Result<Option<Pair>, CatalogError> {
        Ok(None)
    }
    fn keys(&self, _low: &[u8], _high: &[u8]) -> Result<Vec<Vec<u8>>, CatalogError> {
        Ok(Vec::new())
    }
    fn scan(&self, _see: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), CatalogError> {
        Ok(())
    }
    fn apply(&self, _changes: Vec<Change>) -> Result<(), CatalogError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), CatalogError> {
        Ok(())
    }
}

/// Checks the data directory `directory`, which no broker may be using. Blocking; reads the whole journal, and keeps
/// about 100 bytes per retained entry in memory.
pub fn fsck(directory: &Path) -> FsckReport {
    check(&RealDisk::new(directory))
}

pub(super) fn check(disk: &dyn Disk) -> FsckReport {
    let mut report = FsckReport {
        verdict: Verdict::Ok,
        findings: Vec::new(),
        broker: None,
        incarnation: None,
        boot: 0,
        segments: 0,
        journal_bytes: 0,
        frames: 0,
        groups: 0,
        entries: 0,
        position: 0,
    };
    let cannot = Verdict::CannotCheck;
    match disk.list("") {
        Ok(Some(names)) if names.iter().any(|name| name == "LOCK") => {}
        Ok(Some(_)) => return report.end(cannot, "it is no data directory".to_owned()),
        Ok(None) => return report.end(cannot, "there is no such directory".to_owned()),
        Err(error) => return report.end(cannot, format!("it cannot be read: {error}")),
    }
    let _lock = match disk.lock() {
        Ok(Some(lock)) => Some(lock),
        Ok(None) => return report.end(cannot, "a broker is using it; stop it first".to_owned()),
        Err(error) => {
            report.note(format!(
                "it cannot be locked, so it must not be in use: {error}"
            ));
            None
        }
    };
    let identity = match identity::read(disk) {
        Ok(Found::Identity(identity)) => identity,
        Ok(Found::None) => {
            return report.end(Verdict::Damaged, "file identity is missing".to_owned());
        }
        Ok(Found::Damaged(what)) => return report.end(Verdict::Damaged, what),
        Ok(Found::Newer(found)) => {
            let what = format!("it has format {found}, this version reads {FORMAT}");
            return report.end(cannot, what);
        }
        Err(error) => return report.end(cannot, format!("file identity: {error}")),
    };
    report.broker = Some(identity.broker.0);
    report.incarnation = Some(identity.incarnation.to_string());
    report.boot = identity.boot;
    let mark = match identity::read_watermark(disk, identity.incarnation) {
        Ok(Ok(mark)) => mark,
        Ok(Err(what)) => return report.end(Verdict::Damaged, what),
        Err(error) => return report.end(cannot, format!("file watermark: {error}")),
    };
    let files = match survey(disk, identity.incarnation, mark.position) {
        Ok(files) => files,
        Err(error) => return fail(report, error),
    };
    report.segments = files.bases.len();
    report.journal_bytes = files.bytes;
    let mut ledger = Ledger::empty(Arc::new(Nothing), identity.incarnation, &files.bases);
    let mut scan = Scan::new(identity.incarnation, 0, mark.position);
    let run = scan.run(disk, &files, &mut ledger, false);
    report.frames = scan.frames;
    report.position = scan.end;
    report.groups = ledger.groups.len();
    report.entries = ledger.groups.values().map(|meta| meta.count).sum();
    if let Err(error) = run.and_then(|()| Ok(ledger.complete()?)) {
        return fail(report, error);
    }
    let lowest = files.bases.first().copied().unwrap_or(0);
    let first = ledger.first_segment.max(files.first);
    if lowest > first {
        let what = format!("the journal should begin at {first}, but begins at {lowest}");
        return report.end(Verdict::Damaged, what);
    }
    if lowest < first {
        report.note(format!(
            "segments before {first} are left over and will be removed at open"
        ));
    }
    if scan.torn > 0 {
        let torn = scan.torn;
        report.note(format!(
            "{torn} bytes that were never durable will be dropped at open"
        ));
    }
    report
}

fn fail(report: FsckReport, error: ScanError) -> FsckReport {
    match error {
        ScanError::Io(error) => {
            report.end(Verdict::CannotCheck, format!("it cannot be read: {error}"))
        }
        ScanError::Damaged(what) | ScanError::Ledger(LedgerError::Damaged(what)) => {
            report.end(Verdict::Damaged, what)
        }
        ScanError::Ledger(LedgerError::Catalog(error)) => {
            report.end(Verdict::CannotCheck, error.to_string())
        }
    }
}
