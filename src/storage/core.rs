//! What the parts of an open store share: disk, queues, positions, groups, and the latch of failure.
//!
//! Owns no behaviour of its own beyond failing once and for all, and finding the bytes of an entry. Locks are taken in
//! the order group, then queue; the map of groups and the catalog's handle are never held while taking either.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::watch;

use super::catalog::{Catalog, CatalogError};
use super::cataloger::CatalogQueue;
use super::committer::Queue;
use super::disk::{Disk, Lock};
use super::frame::{FRAME_HEADER, get_head, seed, verify};
use super::group::{Group, id};
use super::ledger::Place;
use super::{DirectoryIdentity, LogEntry, StorageError, StoreConfig};
use crate::types::{GroupId, Incarnation};

/// The journal's directory inside the data directory.
pub(super) const JOURNAL_DIR: &str = "journal";

/// The file of the segment that begins at `base`.
pub(super) fn segment_path(base: u64) -> String {
    format!("{JOURNAL_DIR}/{base:016x}.log")
}

pub(super) struct Core {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) config: StoreConfig,
    pub(super) incarnation: Incarnation,
    pub(super) identity: Mutex<DirectoryIdentity>,
    pub(super) queue: Queue,
    pub(super) catalog_queue: CatalogQueue,
    /// Journal bytes known durable.
    pub(super) durable: AtomicU64,
    /// Flushes of the journal since it was opened, and the entries and bytes that were in them.
    pub(super) flushes: AtomicU64,
    pub(super) flushed_entries: AtomicU64,
    pub(super) flushed_bytes: AtomicU64,
    /// Journal bytes that the catalog covers.
    pub(super) cataloged: AtomicU64,
    /// Where the first segment begins.
    pub(super) first_segment: AtomicU64,
    pub(super) groups: Mutex<BTreeMap<GroupId, Arc<Group>>>,
    /// Where each segment begins.
    pub(super) segments: Mutex<BTreeSet<u64>>,
    /// Gone once the store is closed.
    pub(super) catalog: RwLock<Option<Arc<dyn Catalog>>>,
    pub(super) lock: Mutex<Option<Lock>>,
    pub(super) failure: watch::Sender<Option<String>>,
    pub(super) has_failed: AtomicBool,
    /// Free bytes, and when that was asked.
    pub(super) room: Mutex<Option<(tokio::time::Instant, u64)>>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("directory", &self.config.directory)
            .finish_non_exhaustive()
    }
}

impl Core {
    /// `Err` once the store has failed.
    pub(super) fn check(&self) -> Result<(), StorageError> {
        if self.has_failed.load(Ordering::Acquire) {
            Err(self.failed())
        } else {
            Ok(())
        }
    }

    /// The reason of the failure.
    pub(super) fn failed(&self) -> StorageError {
        let reason = self.failure.borrow().clone();
        StorageError::Failed {
            what: reason.unwrap_or_else(|| "it was closed".to_owned()),
        }
    }

    /// Fails the store. The first reason stays.
    pub(super) fn fail(&self, what: String) -> StorageError {
        self.has_failed.store(true, Ordering::Release);
        self.failure.send_if_modified(|reason| {
            if reason.is_some() {
                return false;
            }
            tracing::error!(%what, "the store failed");
            *reason = Some(what);
            true
        });
        // Whoever waits for a ticket is let go by dropping it.
        self.queue.stop();
        self.failed()
    }

    pub(super) fn fail_catalog(&self, error: &CatalogError) -> StorageError {
        self.fail(error.to_string())
    }

    pub(super) fn damaged(&self, what: String) -> StorageError {
        StorageError::Damaged {
            directory: self.config.directory.clone(),
            what,
        }
    }

    /// The catalog, as long as the store is open.
    pub(super) fn catalog(&self) -> Result<Arc<dyn Catalog>, StorageError> {
        let catalog = self.catalog.read().unwrap_or_else(PoisonError::into_inner);
        catalog.clone().ok_or_else(|| self.failed())
    }

    pub(super) fn group(&self, group: GroupId) -> Option<Arc<Group>> {
        self.groups
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&group)
            .cloned()
    }

    /// Whether small batches are written into space prepared ahead.
    pub(super) fn ahead(&self) -> bool {
        self.config.segment_bytes >= 4 << 20
    }

    fn segment_of(&self, position: u64) -> Option<u64> {
        let segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        segments.range(..=position).next_back().copied()
    }

    /// Reads the entries at `wanted` (ascending indexes) from the journal, neighbours in one go. `Ok(Err(…))` says
    /// which bytes are wrong.
    pub(super) fn read_entries(
        &self,
        group: GroupId,
        wanted: &[(u64, Place)],
    ) -> io::Result<Result<Vec<LogEntry>, String>> {
        /// Most bytes read in one go, one entry apart.
        const RUN: u64 = 4 << 20;
        let seed = seed(self.incarnation);
        let size = |place: &Place| FRAME_HEADER as u64 + u64::from(place.length);
        let mut found = Vec::with_capacity(wanted.len());
        let mut rest = wanted;
        while let Some((_, first)) = rest.first() {
            let mut end = first.position + size(first);
            let mut count = 1;
            for (_, place) in rest.iter().skip(1) {
                let next = place.position + size(place);
                if place.position != end || next - first.position > RUN {
                    break;
                }
                (end, count) = (next, count + 1);
            }
            let Some(base) = self.segment_of(first.position) else {
                return Err(io::ErrorKind::NotFound.into());
            };
            let file = self.disk.open(&segment_path(base))?;
            let mut bytes = vec![0; usize::try_from(end - first.position).unwrap_or(0)];
            let got = file.read_at(&mut bytes, first.position - base)?;
            let bytes = bytes::Bytes::from(bytes).slice(..got);
            let (run, others) = rest.split_at(count);
            let mut at = 0;
            for (index, place) in run {
                let stop = at + usize::try_from(size(place)).unwrap_or(0);
                let entry = (stop <= bytes.len())
                    .then(|| check_entry(&bytes.slice(at..stop), group, *index, place, seed))
                    .flatten();
                let Some(entry) = entry else {
                    return Ok(Err(format!(
                        "entry {index} of group {group}, at {} of {}, is not what was written",
                        place.position - base,
                        segment_path(base)
                    )));
                };
                found.push(entry);
                at = stop;
            }
            rest = others;
        }
        Ok(Ok(found))
    }
}

/// The entry in `bytes`, when it is the one that was written there.
fn check_entry(
    bytes: &bytes::Bytes,
    group: GroupId,
    index: u64,
    place: &Place,
    seed: u32,
) -> Option<LogEntry> {
    let head = get_head(bytes)?;
    let payload = bytes.slice(FRAME_HEADER..);
    let same = head.kind.is_entry()
        && head.group == group
        && head.index == index
        && head.term == place.term
        && head.entry == place.entry
        && verify(&head, bytes, &payload, seed, place.position);
    let kind = super::frame::entry_kind(head.entry)?;
    same.then(|| LogEntry {
        id: id(index, place),
        kind,
        payload,
    })
}
