//! Reads a journal from its files and judges it; changes nothing.
//!
//! Owns the distinction on which everything rests: bytes that were never known durable may be torn and are dropped;
//! anything missing or wrong below the durable watermark is damage. The watermark is the highest of the marks in
//! its file, the positions that valid frames carry, and the catalog's position. Used by open and by fsck.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::core::{JOURNAL_DIR, segment_path};
use super::disk::{Disk, DiskFile};
use super::frame::{
    FRAME_HEADER, Head, SEGMENT_HEADER, SegmentHead, find_magic, get_head, seed, verify,
};
use super::ledger::{Ledger, LedgerError};
use crate::types::Incarnation;

/// Changed blocks kept in memory during a scan.
const PENDING_MAX: usize = 16384;
/// Bytes read in one go.
const WINDOW: usize = 1 << 20;

/// Why a journal cannot be used.
#[derive(Debug)]
pub(super) enum ScanError {
    Io(io::Error),
    /// Bytes that were durable are missing or wrong.
    Damaged(String),
    /// The frames are whole but do not fit the state they were applied to: the catalog may be at fault.
    Ledger(LedgerError),
}

impl From<io::Error> for ScanError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<LedgerError> for ScanError {
    fn from(error: LedgerError) -> Self {
        Self::Ledger(error)
    }
}

fn damaged<T>(what: String) -> Result<T, ScanError> {
    Err(ScanError::Damaged(what))
}

/// The files of a journal, in order.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) bases: Vec<u64>,
    /// Length of the last file.
    pub(super) last_len: u64,
    /// The newest file is a segment that was about to begin when the process died: nothing in it counts.
    pub(super) unborn: Option<u64>,
    /// The lowest first segment there may be.
    pub(super) first: u64,
    pub(super) bytes: u64,
}

/// The names in the journal's directory, parsed; `None` when there is no directory.
pub(super) fn list(disk: &dyn Disk) -> Result<Option<Vec<u64>>, ScanError> {
    let Some(names) = disk.list(JOURNAL_DIR)? else {
        return Ok(None);
    };
    let mut bases = Vec::with_capacity(names.len());
    for name in names {
        let base = name
            .strip_suffix(".log")
            .and_then(|hex| u64::from_str_radix(hex, 16).ok());
        match base.filter(|base| segment_path(*base).ends_with(&name)) {
            Some(base) => bases.push(base),
            None => return damaged(format!("{JOURNAL_DIR}/{name} is no segment")),
        }
    }
    bases.sort_unstable();
    Ok(Some(bases))
}

/// Looks at every file's length and header.
pub(super) fn survey(
    disk: &dyn Disk,
    incarnation: Incarnation,
    mark: u64,
) -> Result<Survey, ScanError> {
    let bases = list(disk)?.unwrap_or_default();
    if bases.is_empty() {
        return damaged("the journal is gone".to_owned());
    }
    let mut survey = Survey {
        bases: Vec::new(),
        last_len: 0,
        unborn: None,
        first: 0,
        bytes: 0,
    };
    let mut files = bases.iter().peekable();
    while let Some(base) = files.next() {
        let path = segment_path(*base);
        let file = disk.open(&path)?;
        let len = file.len()?;
        survey.bytes += len;
        let mut bytes = [0; 64];
        let got = file.read_at(&mut bytes, 0)?;
        let head = SegmentHead::decode(bytes.get(..got).unwrap_or_default());
        let last = files.peek().is_none();
        match head {
            Some(head) if head.base == *base && head.incarnation == incarnation => {
                survey.first = survey.first.max(head.first);
            }
            Some(_) => return damaged(format!("{path} is a segment of another place")),
            None if last && !survey.bases.is_empty() && mark <= *base => {
                let mut scan = Scan::new(incarnation, *base, mark);
                scan.nothing_durable(&file, *base, 0, len)?;
                survey.unborn = Some(*base);
                return Ok(survey);
            }
            None => return damaged(format!("the header of {path} is wrong")),
        }
        if let Some(next) = files.peek()
            && *base + len != **next
        {
            return damaged(format!(
                "{path} has {len} bytes, but the next segment begins {} bytes after it",
                **next - *base
            ));
        }
        survey.bases.push(*base);
        survey.last_len = len;
    }
    Ok(survey)
}

/// A reader over one file that reads ahead.
struct Reader<'a> {
    file: &'a Arc<dyn DiskFile>,
    window: Vec<u8>,
    start: u64,
}

impl<'a> Reader<'a> {
    fn new(file: &'a Arc<dyn DiskFile>) -> Self {
        Self {
            file,
            window: Vec::new(),
            start: 0,
        }
    }

    /// Up to `len` bytes at `offset`; fewer at the file's end.
    fn get(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let held = self.start + self.window.len() as u64;
        if offset < self.start || offset + len as u64 > held {
            self.window.resize(len.max(WINDOW), 0);
            let got = self.file.read_at(&mut self.window, offset)?;
            self.window.truncate(got);
            self.start = offset;
        }
        let from = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        let to = (from + len).min(self.window.len());
        Ok(self.window.get(from..to).unwrap_or_default())
    }

    /// The valid frame at `offset`, which is journal position `position` and must end at `limit` at the latest.
    fn frame(
        &mut self,
        offset: u64,
        limit: u64,
        seed: u32,
        position: u64,
    ) -> io::Result<Option<(Head, Bytes)>> {
        let Some(head) = get_head(self.get(offset, FRAME_HEADER)?) else {
            return Ok(None);
        };
        let size = FRAME_HEADER + head.length as usize;
        if head.position != position || offset + size as u64 > limit {
            return Ok(None);
        }
        let bytes = self.get(offset, size)?;
        let Some((header, payload)) = bytes.split_at_checked(FRAME_HEADER) else {
            return Ok(None);
        };
        if !verify(&head, header, payload, seed, position) {
            return Ok(None);
        }
        let payload = if head.kind.is_entry() {
            Bytes::new()
        } else {
            Bytes::copy_from_slice(payload)
        };
        Ok(Some((head, payload)))
    }
}

/// One pass over a journal.
#[derive(Debug)]
pub(super) struct Scan {
    seed: u32,
    /// Where the valid frames end.
    pub(super) end: u64,
    /// Journal bytes known to have been durable.
    mark: u64,
    pub(super) frames: u64,
    /// Bytes behind the end that are not zero, and not durable.
    pub(super) torn: u64,
}

impl Scan {
    pub(super) fn new(incarnation: Incarnation, end: u64, mark: u64) -> Self {
        Self {
            seed: seed(incarnation),
            end,
            mark,
            frames: 0,
            torn: 0,
        }
    }

    /// Applies every frame from the ledger's position on.
    pub(super) fn run(
        &mut self,
        disk: &dyn Disk,
        survey: &Survey,
        ledger: &mut Ledger,
        keep: bool,
    ) -> Result<(), ScanError> {
        let from = ledger.position;
        self.mark = self.mark.max(from);
        self.end = from;
        let last = survey.bases.last().copied().unwrap_or(0);
        let written = survey.unborn.unwrap_or(last + survey.last_len);
        if from > written {
            return damaged(format!(
                "the journal ends at {written}, but was durable up to {from}"
            ));
        }
        let mut bases = survey.bases.iter().peekable();
        while let Some(base) = bases.next() {
            let next = bases.peek().copied().copied().or(survey.unborn);
            if next.is_some_and(|next| next <= from) {
                continue;
            }
            let file = disk.open(&segment_path(*base))?;
            let len = next.map_or(survey.last_len, |next| next - *base);
            let mut reader = Reader::new(&file);
            let mut offset = from.saturating_sub(*base).max(SEGMENT_HEADER);
            if *base + offset > ledger.position {
                ledger.segment(*base, *base + offset);
            }
            while offset < len {
                let position = *base + offset;
                let Some((head, payload)) = reader.frame(offset, len, self.seed, position)? else {
                    if next.is_some() || position < self.mark {
                        let path = segment_path(*base);
                        return damaged(format!("{path} is wrong at {offset}, and was durable"));
                    }
                    self.end = position;
                    return self.nothing_durable(&file, *base, offset, len);
                };
                self.mark = self.mark.max(head.durable);
                self.frames += 1;
                ledger.apply(&head, &payload)?;
                if keep && ledger.pending() >= PENDING_MAX {
                    ledger.sync(Vec::new()).map_err(LedgerError::Catalog)?;
                }
                offset += FRAME_HEADER as u64 + u64::from(head.length);
            }
            self.end = *base + offset;
        }
        if self.end < self.mark {
            return damaged(format!(
                "the journal ends at {}, but was durable up to {}",
                self.end, self.mark
            ));
        }
        Ok(())
    }

    /// Behind a bad frame at `offset`: a valid frame that knew of more durable bytes than those before it proves
    /// that the bad one was durable.
    fn nothing_durable(
        &mut self,
        file: &Arc<dyn DiskFile>,
        base: u64,
        offset: u64,
        len: u64,
    ) -> Result<(), ScanError> {
        let mut reader = Reader::new(file);
        let mut at = offset;
        while at < len {
            // Windows overlap by three bytes, so that no magic hides between two.
            let (found, step, noise) = {
                let window = reader.get(at, WINDOW)?;
                if window.is_empty() {
                    break;
                }
                let noise = window.iter().any(|byte| *byte != 0);
                let step = window.len().saturating_sub(3).max(1) as u64;
                (find_magic(window, 0), step, noise)
            };
            if noise {
                self.torn = len - offset;
            }
            let Some(found) = found else {
                at += step;
                continue;
            };
            at += found as u64;
            if let Some((head, _)) = reader.frame(at, len, self.seed, base + at)?
                && head.durable > base + offset
            {
                return damaged(format!(
                    "{} is wrong at {offset}, and a later frame knew it to be durable",
                    segment_path(base)
                ));
            }
            at += 1;
        }
        Ok(())
    }
}
