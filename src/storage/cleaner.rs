//! Keeps the journal within its bound: entries that stay long are written again so that old segments can go.
//!
//! Owns the progress through the segment being cleaned. The journal is cleaned from its old end, a piece at a time,
//! when it holds more than twice what is live and four segments; so each byte written costs at most about one more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::StorageError;
use super::committer::Done;
use super::core::{Core, segment_path};
use super::frame::{FRAME_HEADER, Frame, Head, Kind, SEGMENT_HEADER, get_head, seed, verify};
use super::ledger::Ledger;

/// Bytes of a segment looked at in one step.
const PIECE: usize = 1 << 20;

/// What the cleaner is doing.
#[derive(Debug, Default)]
pub(super) struct Cleaner {
    /// The segment being cleaned, and how far.
    at: Option<(u64, u64)>,
    /// Everything live in segments before this has been written again.
    done: u64,
    /// Raised when the last piece is durable.
    waiting: Option<Arc<AtomicBool>>,
    /// A segment could not be read: its readers will be told, the cleaner leaves it alone.
    given_up: bool,
}

impl Cleaner {
    /// Does one piece of work, if there is any.
    pub(super) fn step(&mut self, core: &Arc<Core>, ledger: &Ledger) -> Result<(), StorageError> {
        if self.given_up
            || self
                .waiting
                .as_ref()
                .is_some_and(|flag| !flag.load(Ordering::Acquire))
        {
            return Ok(());
        }
        self.waiting = None;
        loop {
            let Some((base, offset)) = self.at.or_else(|| self.choose(core, ledger)) else {
                return Ok(());
            };
            let end = ledger
                .live
                .range(base + 1..)
                .next()
                .map_or(base, |(next, _)| *next);
            let (frames, next) = match live(core, ledger, base, offset, end - base) {
                Ok(found) => found,
                Err(Trouble::Catalog(error)) => return Err(core.fail_catalog(&error)),
                Err(Trouble::Read(error)) => {
                    tracing::error!(segment = base, offset, %error, "a segment cannot be read");
                    self.given_up = true;
                    return Ok(());
                }
            };
            self.at = (next < end - base).then_some((base, next));
            if self.at.is_none() {
                self.done = end;
            }
            if !frames.is_empty() && self.carry(core, frames)? {
                return Ok(());
            }
        }
    }

    /// The oldest segment, when the journal holds too much that is dead.
    fn choose(&self, core: &Core, ledger: &Ledger) -> Option<(u64, u64)> {
        let first = *ledger.live.keys().next()?;
        let live: u64 = ledger.live.values().sum();
        let room = 2 * live + 4 * core.config.segment_bytes;
        // Bytes already on their way to the new end are dead here, though the ledger has yet to hear of it.
        let (base, _) = ledger
            .live
            .range(self.done..)
            .find(|(_, live)| **live > 0)?;
        let newest = ledger.live.keys().next_back() == Some(base);
        let total = ledger.position.saturating_sub(first.max(self.done));
        (total > room && !newest).then_some((*base, SEGMENT_HEADER))
    }

    /// Queues `found` again; whether anything was still live and has been queued.
    fn carry(&mut self, core: &Arc<Core>, found: Vec<(Head, Frame)>) -> Result<bool, StorageError> {
        let mut last = None;
        for (head, frame) in found {
            let Some(group) = core.group(frame.group) else {
                continue;
            };
            let mut log = group.lock();
            if !log.holds(head.index, head.position) {
                continue;
            }
            // Under the group's lock: whatever drops the entry later is queued later.
            let payload = frame.payload.clone();
            let position = core
                .queue
                .push(core, Some(&group), vec![frame], Done::Nobody)?;
            log.moved(head.index, position, payload);
            last = Some(());
        }
        if last.is_none() {
            return Ok(false);
        }
        let ready = Arc::new(AtomicBool::new(false));
        let (flag, weak) = (ready.clone(), Arc::downgrade(core));
        let done = Done::Waiter(Box::new(move || {
            flag.store(true, Ordering::Release);
            if let Some(core) = weak.upgrade() {
                core.catalog_queue.nudge();
            }
        }));
        core.queue.push(core, None, Vec::new(), done)?;
        self.waiting = Some(ready);
        Ok(true)
    }
}

enum Trouble {
    Catalog(super::catalog::CatalogError),
    Read(io::Error),
}

/// The live entries among the frames of a segment from `offset` on, and where to go on; `len` is the segment's length.
#[allow(clippy::type_complexity)] // one caller
fn live(
    core: &Core,
    ledger: &Ledger,
    base: u64,
    offset: u64,
    len: u64,
) -> Result<(Vec<(Head, Frame)>, u64), Trouble> {
    let wrong = || Trouble::Read(io::Error::other("a frame is not what was written"));
    let file = core.disk.open(&segment_path(base)).map_err(Trouble::Read)?;
    let size = usize::try_from(len - offset)
        .unwrap_or(usize::MAX)
        .min(PIECE);
    let mut bytes = vec![0; size];
    let got = file.read_at(&mut bytes, offset).map_err(Trouble::Read)?;
    bytes.truncate(got);
    let mut rest = bytes::Bytes::from(bytes);
    let mut at = offset;
    let mut found = Vec::new();
    while at < len {
        let Some(head) = get_head(&rest) else {
            // A header cut by the end of the piece is looked at again, at the start of the next one.
            let cut = rest.len() < FRAME_HEADER && at > offset;
            return if cut { Ok((found, at)) } else { Err(wrong()) };
        };
        let size = FRAME_HEADER + head.length as usize;
        if rest.len() < size {
            if at > offset {
                break;
            }
            // One frame larger than a piece.
            let mut bytes = vec![0; size];
            let got = file.read_at(&mut bytes, offset).map_err(Trouble::Read)?;
            bytes.truncate(got);
            rest = bytes::Bytes::from(bytes);
        }
        if rest.len() < size {
            return Err(wrong());
        }
        let payload = rest.slice(FRAME_HEADER..size);
        if !verify(&head, &rest, &payload, seed(core.incarnation), base + at) {
            return Err(wrong());
        }
        if head.kind.is_entry() {
            let place = ledger
                .place(head.group, head.index)
                .map_err(Trouble::Catalog)?;
            if place.is_some_and(|place| place.position == head.position) {
                found.push((
                    head,
                    Frame {
                        kind: Kind::CarriedEntry,
                        entry: head.entry,
                        group: head.group,
                        index: head.index,
                        term: head.term,
                        payload,
                    },
                ));
            }
        }
        rest = rest.slice(size..);
        at += size as u64;
    }
    Ok((found, at))
}
