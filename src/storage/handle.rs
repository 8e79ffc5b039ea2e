//! The handles through which everybody else uses the store.
//!
//! Owns the life of an open store (what drives it is in `drive.rs`), and turns calls into changes of a group and tickets in the
//! queue. Reads that memory can serve never wait; the others go to the blocking pool.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::catalog::{Catalog, VALUE_MAX};
use super::committer::Done;
use super::core::Core;
use super::disk::{Disk, RealDisk};
use super::drive::{self, Running};
use super::frame::{FRAME_HEADER, Frame, Kind, PAYLOAD_MAX, entry_code};
use super::group::{Group, Kept, Log, Source, id};
use super::ledger::{self, Place};
use super::{
    Checkpoint, Damage, DirectoryIdentity, Flushed, Flushes, LogEntry, LogState, StorageError,
    StoreConfig, identity, lock,
};
use crate::runtime::spawn_blocking;
use crate::types::{BrokerId, ClusterId, EntryId, GroupId, LogIndex, ReplicaId};

/// How long a figure of the disk's free space is used again.
const ROOM_AGE: Duration = Duration::from_secs(1);
/// Longest vote, in bytes.
const VOTE_MAX: usize = 1024;
/// What the system says of a sector that cannot be read.
const EIO: i32 = 5;
/// How often a read starts over because the log moved under it.
const READ_ATTEMPTS: u32 = 4;

/// The threads of an open store; they end when the last handle is gone.
struct Threads {
    core: Arc<Core>,
    running: Running,
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Like a crash, but for what the operating system writes: nothing more is queued, nobody is told.
        self.core.queue.stop();
    }
}

impl Threads {
    /// Waits for both threads, then lets go of the directory. Blocking.
    fn join(&self) {
        self.running.join();
        let catalog = self.core.catalog.write();
        *catalog.unwrap_or_else(std::sync::PoisonError::into_inner) = None;
        *lock(&self.core.lock) = None;
    }
}

/// The store of a broker. Cheap to clone. When the last handle (of the store or of a group) is dropped without
/// [`Store::close`], what is still queued is lost, as in a crash.
#[derive(Clone)]
pub struct Store {
    core: Arc<Core>,
    threads: Arc<Threads>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("core", &self.core)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the store in `config.directory` for `broker`, creating it when it is not there, and counts the boot.
    /// Blocking.
    pub fn open(config: &StoreConfig, broker: BrokerId) -> Result<Self, StorageError> {
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(&config.directory));
        Self::start(&disk, config, broker)
    }

    /// Opens the store on a disk in memory; `config.directory` only shows in messages. Blocking.
    #[cfg(any(test, feature = "testkit"))]
    pub fn open_in_memory(
        disk: &super::MemDisk,
        config: &StoreConfig,
        broker: BrokerId,
    ) -> Result<Self, StorageError> {
        let disk: Arc<dyn Disk> = Arc::new(super::memdisk::Powered::new(disk));
        Self::start(&disk, config, broker)
    }

    fn start(
        disk: &Arc<dyn Disk>,
        config: &StoreConfig,
        broker: BrokerId,
    ) -> Result<Self, StorageError> {
        let opened = super::open::open(disk, config, broker)?;
        let core = opened.core;
        let (committer, cataloger) = (opened.committer, opened.cataloger);
        let running = drive::start(committer, cataloger).map_err(|error| {
            // The one that was started ends.
            core.queue.stop();
            StorageError::Failed {
                what: format!("cannot start a thread: {error}"),
            }
        })?;
        let threads = Threads {
            core: core.clone(),
            running,
        };
        Ok(Self {
            core,
            threads: Arc::new(threads),
        })
    }

    /// Who the directory belongs to.
    pub fn identity(&self) -> DirectoryIdentity {
        *lock(&self.core.identity)
    }

    /// Notes the cluster durably, once; refused when another one is noted already. Blocking.
    pub fn set_cluster(&self, cluster: ClusterId) -> Result<(), StorageError> {
        self.core.check()?;
        let mut known = lock(&self.core.identity);
        match known.cluster {
            Some(owner) if owner == cluster => return Ok(()),
            Some(owner) => {
                return Err(StorageError::Foreign {
                    directory: self.core.config.directory.clone(),
                    owner: format!("cluster {owner}"),
                    asked: format!("cluster {cluster}"),
                });
            }
            None => {}
        }
        let DirectoryIdentity {
            broker,
            incarnation,
            boot,
            ..
        } = *known;
        let new = identity::Identity {
            broker,
            incarnation,
            cluster: Some(cluster),
            boot,
        };
        identity::write(&*self.core.disk, &new).map_err(|error| {
            self.core
                .fail(format!("cannot write the identity: {error}"))
        })?;
        known.cluster = Some(cluster);
        Ok(())
    }

    /// Durable journal bytes written since the directory was created (never falls, whatever has been deleted).
    pub fn position(&self) -> u64 {
        self.core.durable.load(Ordering::Acquire)
    }

    /// What has been flushed to the journal since the store was opened.
    pub fn flushes(&self) -> Flushes {
        Flushes {
            flushes: self.core.flushes.load(Ordering::Relaxed),
            entries: self.core.flushed_entries.load(Ordering::Relaxed),
            bytes: self.core.flushed_bytes.load(Ordering::Relaxed),
        }
    }

    /// Bytes queued and not yet taken to be written. The store fails when they come to 512 MiB: whoever brings more in should
    /// stop long before.
    pub fn backlog(&self) -> u64 {
        self.core.queue.queued()
    }

    /// The groups with a log and the replica each belongs to, in order.
    pub fn groups(&self) -> Vec<(GroupId, ReplicaId)> {
        let groups: Vec<Arc<Group>> = lock(&self.core.groups).values().cloned().collect();
        let replica = |group: Arc<Group>| (group.id, group.lock().replica);
        groups.into_iter().map(replica).collect()
    }

    /// The damage of `group`'s log, found since the store was opened.
    pub fn damage(&self, group: GroupId) -> Option<Damage> {
        let group = self.core.group(group)?;
        let log = group.lock();
        let what = log.damaged.clone()?;
        Some(Damage {
            what,
            last: log.last,
        })
    }

    /// The log of `replica` of `group`, created when it is not there; refused when the group's log belongs to
    /// another replica. The creation is durable with the first thing that is.
    pub fn group(&self, group: GroupId, replica: ReplicaId) -> Result<GroupStore, StorageError> {
        self.core.check()?;
        assert!(group != super::frame::JOURNAL, "group {group} is reserved");
        let mut groups = lock(&self.core.groups);
        let found = if let Some(found) = groups.get(&group) {
            found.clone()
        } else {
            let frame = Frame::replica(Kind::Created, group, replica);
            let new = Arc::new(Group::new(group, Log::new(replica)));
            self.core
                .queue
                .push(&self.core, None, vec![frame], Done::Nobody)?;
            groups.insert(group, new.clone());
            new
        };
        drop(groups);
        let (owner, damaged) = {
            let log = found.lock();
            (log.replica, log.damaged.clone())
        };
        if let Some(what) = damaged {
            return Err(self.core.damaged(what));
        }
        if owner != replica {
            return Err(StorageError::Foreign {
                directory: self.core.config.directory.clone(),
                owner: format!("replica {owner} of group {group}"),
                asked: format!("replica {replica}"),
            });
        }
        let (core, threads) = (self.core.clone(), self.threads.clone());
        Ok(GroupStore {
            core,
            group: found,
            _threads: threads,
        })
    }

    /// Forgets `group` durably: log, vote and checkpoints. Handles to it fail afterwards. Once begun it is done even
    /// when the future is dropped.
    pub async fn remove_group(&self, group: GroupId) -> Result<(), StorageError> {
        let done = {
            let mut groups = lock(&self.core.groups);
            let Some(found) = groups.get(&group).cloned() else {
                return Ok(());
            };
            let mut log = found.lock();
            let frame = Frame::plain(Kind::Removed, group, EntryId::default(), Bytes::new());
            let (done, waiter) = waiter();
            self.core.queue.push(&self.core, None, vec![frame], done)?;
            log.removed = true;
            log.tail.clear();
            groups.remove(&group);
            waiter
        };
        wait(&self.core, done).await
    }

    /// Free space of the disk in bytes, and the reserve; `Err(Failed)` once the store has failed.
    pub fn room(&self) -> Result<(u64, u64), StorageError> {
        self.core.check()?;
        let now = tokio::time::Instant::now();
        let mut room = lock(&self.core.room);
        let fresh = room.filter(|(asked, _)| now.saturating_duration_since(*asked) < ROOM_AGE);
        let free = match fresh {
            Some((_, free)) => free,
            None => match self.core.disk.free() {
                Ok(free) => {
                    *room = Some((now, free));
                    free
                }
                Err(error) => {
                    return Err(self
                        .core
                        .fail(format!("cannot ask for free space: {error}")));
                }
            },
        };
        Ok((free, self.core.config.reserve_bytes))
    }

    /// Resolves with the reason when the store has failed; never when it has not.
    pub fn failed(&self) -> impl Future<Output = StorageError> + Send + 'static {
        let mut failure = self.core.failure.subscribe();
        async move {
            loop {
                if let Some(what) = failure.borrow_and_update().clone() {
                    return StorageError::Failed { what };
                }
                if failure.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        }
    }

    /// Makes everything durable, brings the catalog up to date, stops the threads and lets go of the directory.
    /// Calls made later fail. Once begun it is done even when the future is dropped.
    pub async fn close(&self) -> Result<(), StorageError> {
        self.core.queue.close();
        let threads = self.threads.clone();
        #[cfg(feature = "sim")]
        threads.running.ended().await;
        // Not a task of the broker: it must outlive them all.
        let joined = spawn_blocking(move || threads.join()).await;
        if joined.is_err() {
            return Err(self.core.fail("closing was interrupted".to_owned()));
        }
        self.core.check()
    }

    /// Stops at once, as when the process dies: what is queued is lost, nobody is told, the directory is free.
    /// Blocking.
    #[cfg(any(test, feature = "testkit"))]
    pub fn abandon(&self) {
        self.core.queue.stop();
        self.threads.join();
    }
}

/// Whether a failed read of the journal means that bytes are gone.
fn is_lost(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(EIO)
}

fn waiter() -> (Done, oneshot::Receiver<()>) {
    let (sender, receiver) = oneshot::channel();
    // Who no longer waits has gone away; nothing to do about it.
    (
        Done::Waiter(Box::new(move || sender.send(()).unwrap_or(()))),
        receiver,
    )
}

async fn wait(core: &Core, done: oneshot::Receiver<()>) -> Result<(), StorageError> {
    // A ticket is dropped only when the store has failed or was stopped.
    done.await.map_err(|_| core.failed())
}

/// The log of one group. Cheap to clone; calls that change the log come from one owner, in order.
#[derive(Clone)]
pub struct GroupStore {
    core: Arc<Core>,
    group: Arc<Group>,
    /// Keeps the store running.
    _threads: Arc<Threads>,
}

impl fmt::Debug for GroupStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupStore")
            .field("group", &self.group.id)
            .finish_non_exhaustive()
    }
}

impl GroupStore {
    fn open(&self) -> Result<std::sync::MutexGuard<'_, Log>, StorageError> {
        self.core.check()?;
        let log = self.group.lock();
        if log.removed {
            let what = format!("group {} was removed", self.group.id);
            return Err(StorageError::Failed { what });
        }
        match &log.damaged {
            Some(what) => Err(self.core.damaged(what.clone())),
            None => Ok(log),
        }
    }

    /// Notes damage for good: who has lost something durable must not vote or acknowledge as if it had it.
    fn quarantine(&self, what: String) -> StorageError {
        let mut log = self.group.lock();
        let is_news = log.damaged.is_none();
        let first = log.damaged.get_or_insert(what).clone();
        let replica = log.replica;
        drop(log);
        if is_news {
            let group = self.group.id;
            tracing::error!(%group, %replica, what = %first, "the log of a replica is damaged, it takes no part any more");
        }
        self.core.damaged(first)
    }

    fn catalog(&self) -> Result<Arc<dyn Catalog>, StorageError> {
        self.core.catalog()
    }

    fn broken(&self, error: &super::catalog::CatalogError) -> StorageError {
        self.core.fail_catalog(error)
    }

    /// What the log holds.
    pub fn state(&self) -> LogState {
        let log = self.group.lock();
        LogState {
            purged: log.purged,
            last: log.last,
            vote: log.vote.clone(),
        }
    }

    /// Appends `entries`, contiguous with the log's end (an empty log may begin anywhere). Readable on return, durable
    /// when `flushed` is called. Does not block.
    ///
    /// # Panics
    /// When the entries are not contiguous, or a payload has more than 256 MiB.
    pub fn append(&self, entries: Vec<LogEntry>, flushed: Flushed) -> Result<(), StorageError> {
        let mut log = self.open()?;
        let Some(first) = entries.first().map(|entry| entry.id.index.0) else {
            // Nothing to write, but its turn comes after everything before it.
            drop(log);
            self.core
                .queue
                .push(&self.core, None, Vec::new(), Done::Waiter(flushed))?;
            return Ok(());
        };
        log.begin_append(first);
        let mut frames = Vec::with_capacity(entries.len());
        for (index, entry) in (first..).zip(&entries) {
            let (found, length) = (entry.id.index.0, entry.payload.len());
            assert!(
                found == index,
                "group {}: entry {found} in place of {index}",
                self.group.id
            );
            assert!(
                length <= PAYLOAD_MAX,
                "group {}: entry of {length} bytes",
                self.group.id
            );
            frames.push(Frame {
                kind: Kind::Entry,
                entry: entry_code(entry.kind),
                group: self.group.id,
                index,
                term: entry.id.epoch.0,
                payload: entry.payload.clone(),
            });
        }
        let done = Done::Owner(flushed);
        let mut position = self
            .core
            .queue
            .push(&self.core, Some(&self.group), frames, done)?;
        for entry in entries {
            let place = Place {
                term: entry.id.epoch.0,
                position,
                length: u32::try_from(entry.payload.len()).unwrap_or(u32::MAX),
                entry: entry_code(entry.kind),
            };
            position += FRAME_HEADER as u64 + u64::from(place.length);
            log.push(entry.id, place, entry.payload);
        }
        Ok(())
    }

    /// Resolves when everything that was queued for this log before the call is durable: entries, vote, truncations. Whoever
    /// takes the log over from an earlier owner in the same process must wait for it, as what [`GroupStore::state`] shows may
    /// not be durable yet. Cancel safe.
    pub async fn settle(&self) -> Result<(), StorageError> {
        let done = {
            let _log = self.open()?;
            let (done, waiter) = waiter();
            self.core.queue.push(&self.core, None, Vec::new(), done)?;
            waiter
        };
        wait(&self.core, done).await
    }

    /// Drops every entry behind `last` (all when `None`). Ordered before the next append; need not be durable on
    /// return. May look into the catalog when it reaches behind what memory holds.
    pub fn truncate_after(&self, last: Option<LogIndex>) -> Result<(), StorageError> {
        let next = last.map_or(0, |last| last.0 + 1);
        let mut log = self.open()?;
        if next >= log.next {
            return Ok(());
        }
        let mut older = None;
        if let Some(index) = log.needs_place(next) {
            let places = ledger::places(&*self.catalog()?, self.group.id, index, index);
            let places = places.map_err(|error| self.broken(&error))?;
            let Some(place) = places.get(&index) else {
                let what = format!(
                    "group {}: the place of entry {index} is lost",
                    self.group.id
                );
                return Err(self.core.fail(what));
            };
            older = Some(id(index, place));
        }
        let at = EntryId {
            index: LogIndex(next),
            ..EntryId::default()
        };
        let frame = Frame::plain(Kind::Truncate, self.group.id, at, Bytes::new());
        self.core
            .queue
            .push(&self.core, None, vec![frame], Done::Nobody)?;
        log.truncate(next, older);
        Ok(())
    }

    /// Drops every entry up to and with `upto`, a marker: bytes are removed in the background. `upto` may lie beyond the
    /// last entry (a snapshot was installed).
    pub fn purge(&self, upto: EntryId) -> Result<(), StorageError> {
        let mut log = self.open()?;
        if log.purged.is_some_and(|purged| purged.index >= upto.index) {
            return Ok(());
        }
        let frame = Frame::plain(Kind::Purge, self.group.id, upto, Bytes::new());
        self.core
            .queue
            .push(&self.core, None, vec![frame], Done::Nobody)?;
        log.purge(upto);
        Ok(())
    }

    /// Saves the vote; durable on return, with everything appended before it. Once begun it is done even when the
    /// future is dropped.
    ///
    /// # Panics
    /// When the vote has more than 1 KiB.
    pub async fn save_vote(&self, vote: Bytes) -> Result<(), StorageError> {
        assert!(
            vote.len() <= VOTE_MAX,
            "group {}: vote of {} bytes",
            self.group.id,
            vote.len()
        );
        let done = {
            let mut log = self.open()?;
            let (done, waiter) = waiter();
            let frame = Frame::plain(Kind::Vote, self.group.id, EntryId::default(), vote.clone());
            self.core.queue.push(&self.core, None, vec![frame], done)?;
            log.vote = Some(vote);
            waiter
        };
        wait(&self.core, done).await
    }

    /// The entries from `from`, at most `max_entries`, stopping before `max_bytes` of payload is exceeded but with at
    /// least one entry when there is one; none when `from` is purged or behind the end. Served from memory when
    /// recent, else read from disk on the blocking pool and verified.
    pub async fn read(
        &self,
        from: LogIndex,
        max_entries: usize,
        max_bytes: usize,
    ) -> Result<Vec<LogEntry>, StorageError> {
        let (from, max) = (from.0, (max_entries, max_bytes));
        {
            let log = self.open()?;
            if from < log.first || from >= log.next || max_entries == 0 {
                return Ok(Vec::new());
            }
            if from >= log.tail_start {
                let plan = log.plan(from, (0, 0), max);
                let count = plan.len();
                let memory = plan.into_iter().filter_map(|source| match source {
                    Source::Memory(entry) => Some(entry),
                    Source::Journal(..) => None,
                });
                let entries: Vec<LogEntry> = memory.collect();
                if entries.len() == count {
                    return Ok(entries);
                }
            }
        }
        let this = self.clone();
        let read = spawn_blocking(move || this.read_slowly(from, max));
        read.await.unwrap_or_else(|error| {
            Err(StorageError::Failed {
                what: format!("a read was interrupted: {error}"),
            })
        })
    }

    fn read_slowly(&self, from: u64, max: (usize, usize)) -> Result<Vec<LogEntry>, StorageError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let Some((plan, first, next)) = self.plan(from, max)? else {
                return Ok(Vec::new());
            };
            let wanted: Vec<(u64, Place)> = plan
                .iter()
                .filter_map(|source| match source {
                    Source::Journal(index, place) => Some((*index, *place)),
                    Source::Memory(_) => None,
                })
                .collect();
            let what = match self.core.read_entries(self.group.id, &wanted) {
                Ok(Ok(read)) if !plan.is_empty() => {
                    let mut read = read.into_iter();
                    let merged = plan.into_iter().filter_map(|source| match source {
                        Source::Memory(entry) => Some(entry),
                        Source::Journal(..) => read.next(),
                    });
                    return Ok(merged.collect());
                }
                Ok(Ok(_)) => {
                    format!(
                        "the place of entry {from} of group {} is lost",
                        self.group.id
                    )
                }
                Ok(Err(what)) => what,
                Err(error) => {
                    let what = format!("entry {from} of group {}: {error}", self.group.id);
                    // Want of file descriptors or memory says nothing about the bytes.
                    if !is_lost(&error) {
                        return Err(StorageError::Failed { what });
                    }
                    what
                }
            };
            // A purge, a truncation or a segment written anew may have moved the log under the read.
            let moved = {
                let log = self.open()?;
                log.first != first || log.next < next
            };
            if !moved && attempt > 1 {
                return Err(self.quarantine(what));
            }
            if attempt >= READ_ATTEMPTS {
                let what = format!("the log moved under every read: {what}");
                return Err(StorageError::Failed { what });
            }
        }
    }

    /// Where to read from, and the bounds of the log then.
    #[allow(clippy::type_complexity)] // one caller
    fn plan(
        &self,
        from: u64,
        max: (usize, usize),
    ) -> Result<Option<(Vec<Source>, u64, u64)>, StorageError> {
        let (older, tail_start, first, next) = {
            let log = self.open()?;
            if from < log.first || from >= log.next {
                return Ok(None);
            }
            (from < log.tail_start, log.tail_start, log.first, log.next)
        };
        let mut plan = Vec::new();
        let mut used = (0_usize, 0_usize);
        if older {
            let catalog = self.catalog()?;
            let mut index = from;
            'blocks: while index < tail_start {
                let end = ((index / ledger::BLOCK + 1) * ledger::BLOCK).min(tail_start) - 1;
                let places = ledger::places(&*catalog, self.group.id, index, end);
                let places = places.map_err(|error| self.broken(&error))?;
                for at in index..=end {
                    let Some(place) = places.get(&at) else {
                        return Ok(Some((plan, first, next)));
                    };
                    let bytes = used.1.saturating_add(place.length as usize);
                    if used.0 >= max.0 || (used.0 > 0 && bytes > max.1) {
                        break 'blocks;
                    }
                    used = (used.0 + 1, bytes);
                    plan.push(Source::Journal(at, *place));
                }
                index = end + 1;
            }
        }
        let reached = from + plan.len() as u64;
        let log = self.open()?;
        if reached >= log.tail_start && reached < log.next {
            plan.extend(log.plan(reached, used, max));
        }
        Ok(Some((plan, first, next)))
    }

    /// The first retained entry of each epoch in `[from, to]` plus the entry at `to`, ascending; indexes without an
    /// entry are left out.
    pub async fn key_entry_ids(
        &self,
        from: LogIndex,
        to: LogIndex,
    ) -> Result<Vec<EntryId>, StorageError> {
        let this = self.clone();
        let found = spawn_blocking(move || this.key_ids(from.0, to.0));
        found.await.unwrap_or_else(|error| {
            Err(StorageError::Failed {
                what: format!("a read was interrupted: {error}"),
            })
        })
    }

    fn key_ids(&self, from: u64, to: u64) -> Result<Vec<EntryId>, StorageError> {
        let catalog = self.catalog()?;
        let id_at = |index: u64| -> Result<Option<EntryId>, StorageError> {
            {
                let log = self.open()?;
                if index < log.first || index >= log.next {
                    return Ok(None);
                }
                if let Some(slot) = log.slot(index) {
                    return Ok(Some(id(index, &slot.place)));
                }
            }
            let places = ledger::places(&*catalog, self.group.id, index, index);
            let places = places.map_err(|error| self.broken(&error))?;
            match places.get(&index) {
                Some(place) => Ok(Some(id(index, place))),
                None => Err(self.quarantine(format!(
                    "the place of entry {index} of group {} is lost",
                    self.group.id
                ))),
            }
        };
        let (first, next) = {
            let log = self.open()?;
            (from.max(log.first), (to.saturating_add(1)).min(log.next))
        };
        let mut found: Vec<EntryId> = Vec::new();
        let mut index = first;
        // Epochs never fall along a log, so the next change is found by halving.
        while index < next {
            let Some(here) = id_at(index)? else { break };
            found.push(here);
            let (mut low, mut high) = (index + 1, next);
            while low < high {
                let middle = low + (high - low) / 2;
                let same = id_at(middle)?.is_none_or(|there| there.epoch == here.epoch);
                (low, high) = if same {
                    (middle + 1, high)
                } else {
                    (low, middle)
                };
            }
            index = low;
        }
        if let Some(last) = next.checked_sub(1).filter(|last| *last >= first)
            && found.last().is_some_and(|id| id.index.0 != last)
        {
            found.extend(id_at(last)?);
        }
        Ok(found)
    }

    /// The last entry known durable on this disk.
    pub fn flushed(&self) -> Option<EntryId> {
        let durable = self.core.durable.load(Ordering::Acquire);
        self.group.lock().flushed(durable)
    }

    /// Keeps `checkpoint` and `blocks` (key, value ≤ 4 KiB each) together. Not durable on return; never ahead of the
    /// durable log after a crash. Checkpoints come in ascending order; one that is not above the newest is ignored.
    ///
    /// # Panics
    /// When a block has more than 4 KiB.
    pub fn save_checkpoint(
        &self,
        checkpoint: Checkpoint,
        blocks: Vec<(u64, Bytes)>,
    ) -> Result<(), StorageError> {
        let mut log = self.open()?;
        let index = checkpoint.id.index.0;
        if log.newest().is_some_and(|newest| newest.index.0 >= index) {
            return Ok(());
        }
        for (key, value) in blocks {
            let length = value.len();
            assert!(
                length <= VALUE_MAX,
                "group {}: block of {length} bytes",
                self.group.id
            );
            log.blocks.insert(key, (value, index));
        }
        if let Some(mut newest) = log.checkpoints.last_entry() {
            // Only the newest stays in memory once the catalog has it.
            let kept = newest.get_mut();
            if kept.stored {
                kept.content = None;
            }
        }
        let id = checkpoint.id;
        log.checkpoints.insert(
            index,
            Kept {
                id,
                content: Some(checkpoint),
                stored: false,
            },
        );
        Ok(())
    }

    /// Keeps `checkpoint` durably as the base of the log (a snapshot received, or the point before a purge), on disk on
    /// return, and drops all blocks and other checkpoints when `replace` is true (a snapshot received). Once begun
    /// it is done even when the future is dropped.
    ///
    /// # Panics
    /// When the checkpoint has more than 256 MiB.
    pub async fn save_base(
        &self,
        checkpoint: Checkpoint,
        replace: bool,
    ) -> Result<(), StorageError> {
        let done = {
            let mut log = self.open()?;
            let (done, waiter) = waiter();
            let frame = Frame::base(self.group.id, &checkpoint, replace);
            let length = frame.payload.len();
            assert!(
                length <= PAYLOAD_MAX,
                "group {}: base of {length} bytes",
                self.group.id
            );
            let size = frame.size();
            let position = self.core.queue.push(&self.core, None, vec![frame], done)?;
            log.set_base(checkpoint, replace, position + size);
            waiter
        };
        wait(&self.core, done).await
    }

    /// The newest checkpoint: where a state machine starts. May look into the catalog.
    pub fn newest_checkpoint(&self) -> Option<Checkpoint> {
        self.checkpoint_at_or_below(LogIndex(u64::MAX))
    }

    /// The newest checkpoint at or below `index`: what the log can be purged to. May look into the catalog.
    pub fn checkpoint_at_or_below(&self, index: LogIndex) -> Option<Checkpoint> {
        let log = self.group.lock();
        let base = log.base.clone().filter(|base| base.id.index <= index);
        let kept = log
            .checkpoints
            .range(..=index.0)
            .next_back()
            .map(|(_, kept)| kept.clone());
        drop(log);
        let Some(kept) = kept else { return base };
        if base
            .as_ref()
            .is_some_and(|base| base.id.index >= kept.id.index)
        {
            return base;
        }
        if kept.content.is_some() {
            return kept.content;
        }
        let catalog = self.catalog().ok()?;
        match ledger::checkpoint(&*catalog, self.group.id, kept.id) {
            Ok(Some(found)) => Some(found),
            Ok(None) => base,
            Err(error) => {
                // The failure is latched: whoever works with the answer will not get far.
                drop(self.broken(&error));
                base
            }
        }
    }

    /// The base: the checkpoint last given to [`GroupStore::save_base`].
    pub fn base(&self) -> Option<Checkpoint> {
        self.group.lock().base.clone()
    }

    /// The block with the greatest key at or below `key`. May look into the catalog.
    pub fn block_at_or_below(&self, key: u64) -> Result<Option<(u64, Bytes)>, StorageError> {
        let log = self.open()?;
        let (low, masked) = (log.dropped_below, log.masked_until.is_some());
        if key < low {
            return Ok(None);
        }
        let newer = log.blocks.range(low..=key).next_back();
        let newer = newer.map(|(key, (value, _))| (*key, value.clone()));
        let catalog = self.catalog()?;
        // Under the group's lock: a block is in memory, or in the catalog, at any moment.
        let older = if masked {
            None
        } else {
            let (low, high) = (self.index_key(low), self.index_key(key));
            catalog
                .floor(&low, &high)
                .map_err(|error| self.broken(&error))?
        };
        let older = older.and_then(|(key, value)| Some((number(&key)?, value)));
        Ok(match (newer, older) {
            (Some(newer), Some(older)) => Some(if older.0 > newer.0 { older } else { newer }),
            (newer, older) => newer.or(older),
        })
    }

    /// The block with the smallest key above `key`. May look into the catalog.
    pub fn block_above(&self, key: u64) -> Result<Option<(u64, Bytes)>, StorageError> {
        let log = self.open()?;
        let Some(low) = key.checked_add(1) else {
            return Ok(None);
        };
        let (low, masked) = (low.max(log.dropped_below), log.masked_until.is_some());
        let newer = log.blocks.range(low..).next();
        let newer = newer.map(|(key, (value, _))| (*key, value.clone()));
        let catalog = self.catalog()?;
        let older = if masked {
            None
        } else {
            let (low, high) = (self.index_key(low), self.index_key(u64::MAX));
            catalog
                .ceiling(&low, &high)
                .map_err(|error| self.broken(&error))?
        };
        let older = older.and_then(|(key, value)| Some((number(&key)?, value)));
        Ok(match (newer, older) {
            (Some(newer), Some(older)) => Some(if older.0 < newer.0 { older } else { newer }),
            (newer, older) => newer.or(older),
        })
    }

    /// Drops blocks with a key below `key`.
    pub fn drop_blocks_below(&self, key: u64) -> Result<(), StorageError> {
        let mut log = self.open()?;
        if key > log.dropped_below {
            log.dropped_below = key;
            log.drop_pending = true;
            log.blocks = log.blocks.split_off(&key);
        }
        Ok(())
    }

    fn index_key(&self, number: u64) -> Vec<u8> {
        ledger::index_key(self.group.id, number)
    }
}

/// The number at the end of a block's key.
fn number(key: &[u8]) -> Option<u64> {
    key.last_chunk::<8>()
        .map(|bytes| u64::from_be_bytes(*bytes))
}
