//! One group as its owner sees it: the log's bounds, its recent entries, vote, checkpoints and blocks.
//!
//! Owns the part of the state that is ahead of the disk. It changes when a frame is queued, under the group's lock,
//! so the order of the queue is the order of the changes. Entries whose place the catalog knows may leave memory;
//! an entry that is not durable may not. Checkpoints and blocks wait here until the catalog takes them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::frame::FRAME_HEADER;
use super::ledger::Place;
use super::{Checkpoint, LogEntry};
use crate::types::{EntryId, GroupId, LeaderEpoch, LogIndex, ReplicaId};

/// Entries whose place is kept in memory although the catalog knows it.
const TAIL_MIN: usize = 256;

/// An entry in memory.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) place: Place,
    /// Its bytes, while they are cached or not yet durable.
    pub(super) payload: Option<Bytes>,
    /// Durable journal bytes from which on the entry is durable: the end of its first frame.
    durable_at: u64,
}

impl Slot {
    fn end(&self) -> u64 {
        self.place.position + FRAME_HEADER as u64 + u64::from(self.place.length)
    }
}

/// A checkpoint: in memory until the catalog has it, and as long as it is the newest.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) id: EntryId,
    pub(super) content: Option<Checkpoint>,
    pub(super) stored: bool,
}

#[derive(Debug)]
pub(super) struct Log {
    pub(super) removed: bool,
    /// What was found to be missing or wrong below the durable watermark: the log takes and gives nothing any more.
    pub(super) damaged: Option<String>,
    pub(super) replica: ReplicaId,
    pub(super) vote: Option<Bytes>,
    pub(super) purged: Option<EntryId>,
    /// First and one behind the last index; equal when there is no entry.
    pub(super) first: u64,
    pub(super) next: u64,
    /// The last entry, or the purged one.
    pub(super) last: Option<EntryId>,
    /// Index of the first entry in `tail`; older ones are in the catalog.
    pub(super) tail_start: u64,
    pub(super) tail: VecDeque<Slot>,
    /// The entry before the tail, or the purged one.
    pub(super) before_tail: Option<EntryId>,
    pub(super) base: Option<Checkpoint>,
    pub(super) checkpoints: BTreeMap<u64, Kept>,
    /// Blocks the catalog does not have yet, with the index of the checkpoint they belong to.
    pub(super) blocks: BTreeMap<u64, (Bytes, u64)>,
    /// Blocks below this key have been dropped.
    pub(super) dropped_below: u64,
    /// The catalog has not yet dropped what is below that key.
    pub(super) drop_pending: bool,
    /// Blocks in the catalog are void until the journal up to here is part of it.
    pub(super) masked_until: Option<u64>,
}

/// A group. Shared between its owner, the committer and the cataloger.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) id: GroupId,
    log: Mutex<Log>,
}

/// An entry to be read: from memory, or from its place in the journal.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Memory(LogEntry),
    Journal(u64, Place),
}

impl Group {
    pub(super) fn new(id: GroupId, log: Log) -> Self {
        Self {
            id,
            log: Mutex::new(log),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log {
    /// An empty log.
    pub(super) fn new(replica: ReplicaId) -> Self {
        Self {
            removed: false,
            damaged: None,
            replica,
            vote: None,
            purged: None,
            first: 0,
            next: 0,
            last: None,
            tail_start: 0,
            tail: VecDeque::new(),
            before_tail: None,
            base: None,
            checkpoints: BTreeMap::new(),
            blocks: BTreeMap::new(),
            dropped_below: 0,
            drop_pending: false,
            masked_until: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first == self.next
    }

    /// The slot of an entry in memory.
    pub(super) fn slot(&self, index: u64) -> Option<&Slot> {
        self.tail
            .get(usize::try_from(index.checked_sub(self.tail_start)?).ok()?)
    }

    /// Prepares an append that starts at `index`; the caller queues the frames and pushes a slot for each.
    pub(super) fn begin_append(&mut self, index: u64) {
        if self.is_empty() && self.purged.is_none() {
            (self.first, self.next, self.tail_start) = (index, index, index);
        }
        let (group, next) = (self.replica, self.next);
        assert!(
            index == next,
            "replica {group}: append at {index}, the log ends before {next}"
        );
    }

    /// Takes in one entry that has been queued.
    pub(super) fn push(&mut self, id: EntryId, place: Place, payload: Bytes) {
        let durable_at = place.position + FRAME_HEADER as u64 + u64::from(place.length);
        self.tail.push_back(Slot {
            place,
            payload: Some(payload),
            durable_at,
        });
        self.next = id.index.0 + 1;
        self.last = Some(id);
    }

    /// Whether [`Log::truncate`] to `next` needs the id of an entry that only the catalog has; its index.
    pub(super) fn needs_place(&self, next: u64) -> Option<u64> {
        let index = next.checked_sub(1)?;
        (index >= self.first && index + 1 < self.tail_start).then_some(index)
    }

    /// Drops the entries from `next` on. `older` is the id of the entry before, where [`Log::needs_place`] asked for it.
    pub(super) fn truncate(&mut self, next: u64, older: Option<EntryId>) {
        if next >= self.next {
            return;
        }
        let next = next.max(self.first);
        if next >= self.tail_start {
            self.tail
                .truncate(usize::try_from(next - self.tail_start).unwrap_or(usize::MAX));
        } else {
            self.tail.clear();
            self.before_tail = if next == self.first {
                self.purged
            } else {
                older
            };
            self.tail_start = next;
        }
        self.next = next;
        self.last = match self.tail.back() {
            Some(slot) => Some(id(next - 1, &slot.place)),
            None => self.before_tail,
        };
        self.checkpoints.retain(|index, _| *index < next);
        self.blocks.retain(|_, (_, index)| *index < next);
    }

    /// Drops the entries up to and with `upto`.
    pub(super) fn purge(&mut self, upto: EntryId) {
        let first = upto.index.0 + 1;
        self.purged = Some(upto);
        self.first = first;
        if self.next <= first {
            self.tail.clear();
            (self.next, self.tail_start, self.last) = (first, first, Some(upto));
            self.before_tail = Some(upto);
        } else if self.tail_start <= first {
            let gone = usize::try_from(first - self.tail_start).unwrap_or(usize::MAX);
            self.tail.drain(..gone.min(self.tail.len()));
            self.tail_start = first;
            self.before_tail = Some(upto);
        }
    }

    /// The last entry within the durable part of the journal.
    pub(super) fn flushed(&self, durable: u64) -> Option<EntryId> {
        // First frames ascend with the index: what is not durable is a run at the end.
        let slots = self.tail.iter().rev();
        let count = slots.take_while(|slot| slot.durable_at > durable).count();
        match (self.tail.len() - count).checked_sub(1) {
            None => self.before_tail,
            Some(at) => self
                .tail
                .get(at)
                .map(|slot| id(self.tail_start + at as u64, &slot.place)),
        }
    }

    /// Whether the frame at `position` still is the entry at `index`, as far as memory can tell.
    pub(super) fn holds(&self, index: u64, position: u64) -> bool {
        !self.removed
            && (self.first..self.next).contains(&index)
            && (index < self.tail_start
                || self
                    .slot(index)
                    .is_some_and(|slot| slot.place.position == position))
    }

    /// The entry at `index` has been queued again, to stand at `position`.
    pub(super) fn moved(&mut self, index: u64, position: u64, payload: Bytes) {
        let at = index
            .checked_sub(self.tail_start)
            .and_then(|at| usize::try_from(at).ok());
        if let Some(slot) = at.and_then(|at| self.tail.get_mut(at)) {
            // In memory until it is durable in its new place; the old one is about to go.
            slot.place.position = position;
            slot.payload = Some(payload);
        }
    }

    /// Lets go of the bytes of entries written in `[from, to)`, which are durable.
    pub(super) fn evict(&mut self, index: u64, count: u64, from: u64, to: u64) {
        for index in index.max(self.tail_start)..index + count {
            let at = usize::try_from(index - self.tail_start).unwrap_or(usize::MAX);
            let Some(slot) = self.tail.get_mut(at) else {
                break;
            };
            if (from..to).contains(&slot.place.position) {
                slot.payload = None;
            }
        }
    }

    /// Lets go of the places of entries that the catalog knows, having seen the journal up to `cataloged`.
    pub(super) fn trim(&mut self, cataloged: u64) {
        while self.tail.len() > TAIL_MIN {
            match self.tail.front() {
                Some(slot) if slot.payload.is_none() && slot.end() <= cataloged => {
                    self.before_tail = Some(id(self.tail_start, &slot.place));
                    self.tail_start += 1;
                    self.tail.pop_front();
                }
                _ => break,
            }
        }
        if self.tail.capacity() > 4 * TAIL_MIN.max(self.tail.len()) {
            self.tail.shrink_to(2 * TAIL_MIN.max(self.tail.len()));
        }
    }

    /// The entries of the tail from `from` on, within the limits; `used` bytes and entries are taken already.
    pub(super) fn plan(&self, from: u64, used: (usize, usize), max: (usize, usize)) -> Vec<Source> {
        let (mut entries, mut bytes) = used;
        let mut found = Vec::new();
        let Some(skip) = from.checked_sub(self.tail_start) else {
            return found;
        };
        let skip = usize::try_from(skip).unwrap_or(usize::MAX);
        for (index, slot) in (from..).zip(self.tail.iter().skip(skip)) {
            bytes = bytes.saturating_add(slot.place.length as usize);
            if entries >= max.0 || (entries > 0 && bytes > max.1) {
                break;
            }
            entries += 1;
            found.push(match &slot.payload {
                Some(payload) => match super::frame::entry_kind(slot.place.entry) {
                    Some(kind) => {
                        let payload = payload.clone();
                        Source::Memory(LogEntry {
                            id: id(index, &slot.place),
                            kind,
                            payload,
                        })
                    }
                    None => Source::Journal(index, slot.place),
                },
                None => Source::Journal(index, slot.place),
            });
        }
        found
    }

    /// The base becomes `checkpoint`, with everything older than it gone; with `replace` everything else too.
    pub(super) fn set_base(&mut self, checkpoint: Checkpoint, replace: bool, end: u64) {
        let index = checkpoint.id.index.0;
        if replace {
            self.checkpoints.clear();
            self.blocks.clear();
            (self.dropped_below, self.drop_pending) = (0, false);
            self.masked_until = Some(end);
        } else {
            self.checkpoints.retain(|at, _| *at > index);
        }
        self.base = Some(checkpoint);
    }

    /// The id of the newest checkpoint, the base included.
    pub(super) fn newest(&self) -> Option<EntryId> {
        let newest = self.checkpoints.values().next_back().map(|kept| kept.id);
        let base = self.base.as_ref().map(|base| base.id);
        [newest, base]
            .into_iter()
            .flatten()
            .max_by_key(|id| id.index)
    }
}

/// The id of the entry at `index` in `place`.
pub(super) fn id(index: u64, place: &Place) -> EntryId {
    EntryId {
        epoch: LeaderEpoch(place.term),
        index: LogIndex(index),
    }
}
