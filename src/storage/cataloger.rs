//! The thread that keeps the catalog: it follows the committer, and nobody waits for it.
//!
//! Owns the ledger while the store is open, the moment of a catalog sync, and the deletion of segments: first what
//! is still needed of them is written again, then a frame says that they go, and only when both are durable are
//! the files removed. It runs beside the committer so that sled never holds up a sync of the journal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::FutureExt;

use super::StorageError;
use super::catalog::{CatalogError, Change};
use super::cleaner::Cleaner;
use super::committer::{Done, Fact};
use super::core::{Core, JOURNAL_DIR, segment_path};
use super::drive::{self, Wake, pace};
use super::frame::{Frame, JOURNAL, Kind};
use super::group::{Group, Log};
use super::ledger::{self, Ledger, LedgerError};
use crate::types::{EntryId, GroupId, LogIndex};

/// Frames that may wait for the cataloger; beyond it the committer waits.
const FACTS_MAX: usize = 1 << 19;
/// The cataloger is woken for so many entries: nobody waits for it, and a wakeup for each commit would cost more than its work. It is
/// woken at once for any other frame, which may let a segment go.
const FACTS_WORTH_WAKING: usize = 64;
/// Changed blocks kept in memory before they are written.
const PENDING_MAX: usize = 8192;

#[derive(Debug, Default)]
struct State {
    facts: Vec<Fact>,
    nudged: bool,
    closed: bool,
    watermark_sync: bool,
}

/// What the committer hands over.
#[derive(Debug, Default)]
pub(super) struct CatalogQueue {
    state: Mutex<State>,
    wake: Wake,
    room: Condvar,
}

impl CatalogQueue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over what has become durable; waits while too much is waiting.
    pub(super) fn push(&self, facts: Vec<Fact>) {
        let mut state = self.lock();
        while state.facts.len() > FACTS_MAX && !state.closed {
            state = self
                .room
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let is_entry = |fact: &Fact| matches!(fact, Fact::Frame(head, _) if head.kind.is_entry());
        state.nudged |= !facts.iter().all(is_entry);
        state.facts.extend(facts);
        let wakes = state.nudged || state.facts.len() >= FACTS_WORTH_WAKING;
        drop(state);
        if wakes {
            drive::wake(&self.wake);
        }
    }

    /// Nothing more will come.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        drive::wake(&self.wake);
        self.room.notify_all();
    }

    /// Lets the cataloger look again although nothing new is durable.
    pub(super) fn nudge(&self) {
        self.lock().nudged = true;
        drive::wake(&self.wake);
    }

    /// Whether the watermark should be synced now; asked once.
    pub(super) fn take_watermark_sync(&self) -> bool {
        std::mem::take(&mut self.lock().watermark_sync)
    }

    /// Waits for something to do; `None` at the end.
    async fn next(&self) -> Option<Vec<Fact>> {
        let work = |state: &mut State| {
            let over = state.facts.is_empty() && state.closed;
            let enough = state.facts.len() >= FACTS_WORTH_WAKING;
            (enough || state.nudged || state.closed).then_some(!over)
        };
        let more = drive::wait(&self.wake, &self.state, work).await;
        more.then(|| self.drain())
    }

    /// What is there now.
    fn drain(&self) -> Vec<Fact> {
        let mut state = self.lock();
        state.nudged = false;
        let facts = std::mem::take(&mut state.facts);
        drop(state);
        self.room.notify_all();
        facts
    }
}

/// What of a group the catalog does not have yet.
struct Overlay {
    group: Arc<Group>,
    checkpoints: Vec<super::Checkpoint>,
    blocks: Vec<(u64, Bytes, u64)>,
    drop_below: Option<u64>,
    masked_until: Option<u64>,
    replica: u64,
}

impl Overlay {
    fn of(group: &Arc<Group>, log: &Log) -> Option<Self> {
        let waiting = log.checkpoints.values().filter(|kept| !kept.stored);
        let overlay = Self {
            group: group.clone(),
            checkpoints: waiting.filter_map(|kept| kept.content.clone()).collect(),
            blocks: log
                .blocks
                .iter()
                .map(|(key, (bytes, at))| (*key, bytes.clone(), *at))
                .collect(),
            drop_below: log.drop_pending.then_some(log.dropped_below),
            masked_until: log.masked_until,
            replica: log.replica.as_u64(),
        };
        let nothing = overlay.checkpoints.is_empty()
            && overlay.blocks.is_empty()
            && overlay.drop_below.is_none()
            && overlay.masked_until.is_none();
        (!nothing && !log.removed).then_some(overlay)
    }
}

enum Trouble {
    Catalog(CatalogError),
    Io(std::io::Error),
    Other(StorageError),
}

impl From<CatalogError> for Trouble {
    fn from(error: CatalogError) -> Self {
        Self::Catalog(error)
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// The state of the thread.
pub(super) struct Cataloger {
    pub(super) core: Arc<Core>,
    pub(super) ledger: Ledger,
    /// Position at the last sync of the catalog.
    pub(super) synced: u64,
    /// Segments before this position go when the flag is up.
    pub(super) leaving: Option<(u64, Arc<AtomicBool>)>,
    pub(super) cleaner: Cleaner,
}

impl Cataloger {
    /// Works until the committer has ended. On its thread it blocks and is never pending.
    pub(super) async fn run(mut self) {
        let core = self.core.clone();
        let work = std::panic::AssertUnwindSafe(self.work());
        match work.catch_unwind().await {
            Ok(Ok(())) => {}
            Ok(Err(Trouble::Catalog(error))) => drop(core.fail_catalog(&error)),
            Ok(Err(Trouble::Io(error))) => {
                drop(core.fail(format!("cannot delete a segment: {error}")));
            }
            Ok(Err(Trouble::Other(error))) => drop(core.fail(error.to_string())),
            Err(panic) => {
                drop(core.fail(format!(
                    "the cataloger panicked: {}",
                    super::panic_text(&*panic)
                )));
            }
        }
        core.catalog_queue.close();
    }

    async fn work(&mut self) -> Result<(), Trouble> {
        while let Some(facts) = self.core.catalog_queue.next().await {
            pace(&*self.core.disk).await;
            if self.core.check().is_err() {
                return Ok(());
            }
            self.apply(facts)?;
            let behind = self.ledger.position - self.synced;
            if behind >= self.core.config.catalog_sync_bytes || self.ledger.pending() >= PENDING_MAX
            {
                self.sync()?;
            }
            self.delete_segments()?;
            match self.cleaner.step(&self.core, &self.ledger) {
                // The store is being closed: cleaning goes on after the next open.
                Err(_) if self.core.check().is_ok() => {}
                other => other.map_err(Trouble::Other)?,
            }
        }
        if self.core.check().is_ok() && !self.core.queue.is_stopped() {
            self.sync()?;
        }
        Ok(())
    }

    fn apply(&mut self, facts: Vec<Fact>) -> Result<(), Trouble> {
        for fact in facts {
            match fact {
                Fact::Segment { base, position } => self.ledger.segment(base, position),
                Fact::Frame(head, payload) => match self.ledger.apply(&head, &payload) {
                    Ok(()) => {}
                    Err(LedgerError::Catalog(error)) => return Err(error.into()),
                    Err(LedgerError::Damaged(what)) => {
                        // Our own frames, just written: this is a defect, and not to be built upon.
                        let what = format!("the journal contradicts itself: {what}");
                        return Err(Trouble::Other(StorageError::Failed { what }));
                    }
                },
            }
        }
        Ok(())
    }

    fn groups(&self) -> Vec<Arc<Group>> {
        let groups = self
            .core
            .groups
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        groups.values().cloned().collect()
    }

    /// Brings the catalog up to what is durable.
    fn sync(&mut self) -> Result<(), Trouble> {
        // First what waits in the groups, then the facts: so a block saved after a base was durable is never taken
        // together with a ledger that has yet to drop all blocks for that base.
        let groups = self.groups();
        let overlays: Vec<Overlay> = groups
            .iter()
            .filter_map(|group| Overlay::of(group, &group.lock()))
            .collect();
        let facts = self.core.catalog_queue.drain();
        self.apply(facts)?;
        let catalog = match self.core.catalog() {
            Ok(catalog) => catalog,
            Err(error) => return Err(Trouble::Other(error)),
        };
        let mut more: Vec<Change> = Vec::new();
        let mut taken = Vec::new();
        for overlay in overlays {
            let id = overlay.group.id;
            let Some(meta) = self.ledger.groups.get(&id) else {
                continue;
            };
            let visible = overlay
                .masked_until
                .is_none_or(|until| self.ledger.position >= until);
            if meta.replica != Some(overlay.replica) || !visible {
                continue;
            }
            // Never ahead of the durable log.
            let last = meta.last.map(|last| last.index.0);
            let durable = |index: u64| last.is_some_and(|last| index <= last);
            if let Some(below) = overlay.drop_below.and_then(|key| key.checked_sub(1)) {
                more.extend(ledger::drop_index(&*catalog, id, 0, below)?);
            }
            for (key, bytes, at) in &overlay.blocks {
                if durable(*at) {
                    more.push((ledger::index_key(id, *key), Some(bytes.to_vec())));
                }
            }
            for checkpoint in &overlay.checkpoints {
                if durable(checkpoint.id.index.0) {
                    more.extend(ledger::checkpoint_changes(id, checkpoint));
                    let known = self.ledger.checkpoints.entry(id).or_default();
                    known.insert(checkpoint.id.index.0, checkpoint.id);
                }
            }
            taken.push((overlay, last));
        }
        self.ledger.sync(more)?;
        self.synced = self.ledger.position;
        self.core.cataloged.store(self.synced, Ordering::Release);
        self.core.catalog_queue.lock().watermark_sync = true;
        for (overlay, last) in taken {
            settle(&overlay, last);
        }
        for group in groups {
            group.lock().trim(self.synced);
        }
        Ok(())
    }

    fn delete_segments(&mut self) -> Result<(), Trouble> {
        if let Some((first, ready)) = &self.leaving {
            if !ready.load(Ordering::Acquire) {
                return Ok(());
            }
            let first = *first;
            self.leaving = None;
            self.core.first_segment.fetch_max(first, Ordering::AcqRel);
            remove_segments(&self.core, first)?;
            self.ledger.forget_segments(first);
        }
        let Some(first) = self.dead_until() else {
            return Ok(());
        };
        // The catalog first: it must not stand on segments that are gone.
        self.sync()?;
        let holders = self
            .ledger
            .groups
            .iter()
            .filter(|(_, meta)| meta.oldest() < first);
        let holders: Vec<GroupId> = holders.map(|(group, _)| *group).collect();
        let ready = Arc::new(AtomicBool::new(false));
        match self.announce(first, &holders, &ready) {
            Ok(()) => self.leaving = Some((first, ready)),
            // The store is being closed; the next open finds the same segments dead.
            Err(_) if self.core.check().is_ok() => {}
            Err(error) => return Err(Trouble::Other(error)),
        }
        Ok(())
    }

    /// Queues what `holders` still need of the segments before `first`, and then the frame that gives those up;
    /// raises `ready` when all of it is durable.
    fn announce(
        &self,
        first: u64,
        holders: &[GroupId],
        ready: &Arc<AtomicBool>,
    ) -> Result<(), StorageError> {
        for group in holders {
            if let Some(group) = self.core.group(*group) {
                carry(&self.core, &group)?;
            }
        }
        let (flag, core) = (ready.clone(), Arc::downgrade(&self.core));
        let done = Done::Waiter(Box::new(move || {
            flag.store(true, Ordering::Release);
            if let Some(core) = core.upgrade() {
                core.catalog_queue.nudge();
            }
        }));
        let at = EntryId {
            index: LogIndex(first),
            ..EntryId::default()
        };
        let frame = Frame::plain(Kind::Drop, JOURNAL, at, Bytes::new());
        // Behind everything carried, in the same queue: durable only when all of that is.
        self.core
            .queue
            .push(&self.core, None, vec![frame], done)
            .map(drop)
    }

    /// Where the first segment begins that is still needed, when there are others before it.
    fn dead_until(&self) -> Option<u64> {
        let mut segments = self.ledger.live.iter().peekable();
        let mut first = None;
        while let Some((_, live)) = segments.next() {
            let Some((next, _)) = segments.peek() else {
                break;
            };
            if *live > 0 || self.leaving.is_some() {
                break;
            }
            first = Some(**next);
        }
        first
    }
}

/// The catalog has what `overlay` held, as far as the log was durable up to `last`.
fn settle(overlay: &Overlay, last: Option<u64>) {
    let mut log = overlay.group.lock();
    let durable = |index: u64| last.is_some_and(|last| index <= last);
    for (key, bytes, at) in &overlay.blocks {
        let same = |(kept, _): &(Bytes, u64)| kept == bytes;
        if durable(*at) && log.blocks.get(key).is_some_and(same) {
            log.blocks.remove(key);
        }
    }
    let newest = log.checkpoints.keys().next_back().copied();
    for checkpoint in &overlay.checkpoints {
        let index = checkpoint.id.index.0;
        let Some(kept) = log.checkpoints.get_mut(&index).filter(|_| durable(index)) else {
            continue;
        };
        if kept.id == checkpoint.id {
            kept.stored = true;
        }
    }
    for (index, kept) in &mut log.checkpoints {
        if kept.stored && Some(*index) != newest {
            kept.content = None;
        }
    }
    if overlay.drop_below == Some(log.dropped_below) {
        log.drop_pending = false;
    }
    if log.masked_until == overlay.masked_until {
        log.masked_until = None;
    }
}

/// Writes again what `group` cannot do without and is no entry.
fn carry(core: &Core, group: &Arc<Group>) -> Result<(), StorageError> {
    // Under the group's lock: what is written is the newest in the queue, and stays it until it is queued.
    let log = group.lock();
    if log.removed {
        return Ok(());
    }
    let mut frames = vec![Frame::replica(Kind::CarriedGroup, group.id, log.replica)];
    if let Some(vote) = &log.vote {
        frames.push(Frame::plain(
            Kind::Vote,
            group.id,
            EntryId::default(),
            vote.clone(),
        ));
    }
    if let Some(purged) = log.purged {
        frames.push(Frame::plain(Kind::Purge, group.id, purged, Bytes::new()));
    }
    if let Some(base) = &log.base {
        frames.push(Frame::base(group.id, base, false));
    }
    core.queue.push(core, None, frames, Done::Nobody).map(drop)
}

/// Removes the files of the segments before `first`, oldest first, each durably: what a crash leaves is contiguous.
pub(super) fn remove_segments(core: &Core, first: u64) -> std::io::Result<()> {
    loop {
        let oldest = {
            let segments = core.segments.lock().unwrap_or_else(PoisonError::into_inner);
            segments.range(..first).next().copied()
        };
        let Some(base) = oldest else { return Ok(()) };
        core.disk.remove(&segment_path(base))?;
        core.disk.sync_dir(JOURNAL_DIR)?;
        core.segments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base);
    }
}
