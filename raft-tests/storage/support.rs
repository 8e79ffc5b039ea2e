//! What the storage tests share: a store on either disk, entries, and waiting for callbacks.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use bytes::Bytes;
use logboom::storage::{
    Checkpoint, EntryKind, GroupStore, LogEntry, MemDisk, StorageError, Store, StoreConfig,
};
use logboom::types::{BrokerId, EntryId, GroupId, LeaderEpoch, LogIndex, ReplicaId, ReplicaKind};

/// Longest wait for a fact.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A configuration with small segments.
pub(crate) fn config(directory: &Path) -> StoreConfig {
    StoreConfig {
        directory: directory.to_owned(),
        segment_bytes: 16 << 10,
        cache_bytes: 4 << 10,
        catalog_cache_bytes: 1 << 20,
        catalog_sync_bytes: 8 << 10,
        commit_bytes_max: 1 << 20,
        reserve_bytes: 1 << 20,
    }
}

/// A disk of either kind.
pub(crate) enum Place {
    Real(tempfile::TempDir),
    Memory(MemDisk),
}

impl Place {
    pub(crate) fn both() -> Vec<Place> {
        vec![Self::real(), Self::Memory(MemDisk::new())]
    }

    pub(crate) fn real() -> Place {
        Self::Real(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Real(directory) => directory.path().join("data"),
            Self::Memory(_) => PathBuf::from("(memory)"),
        }
    }

    pub(crate) fn open(&self) -> Result<Store, StorageError> {
        self.open_with(&config(&self.path()))
    }

    pub(crate) fn open_with(&self, config: &StoreConfig) -> Result<Store, StorageError> {
        match self {
            Self::Real(_) => Store::open(config, BrokerId(1)),
            Self::Memory(disk) => Store::open_in_memory(disk, config, BrokerId(1)),
        }
    }
}

pub(crate) fn replica(epoch: u32) -> ReplicaId {
    ReplicaId::new(BrokerId(1), ReplicaKind::Data, epoch)
}

pub(crate) fn group(store: &Store, id: u64) -> GroupStore {
    store.group(GroupId(id), replica(1)).unwrap()
}

pub(crate) fn id(epoch: u64, index: u64) -> EntryId {
    EntryId {
        epoch: LeaderEpoch(epoch),
        index: LogIndex(index),
    }
}

pub(crate) fn entry(epoch: u64, index: u64, payload: impl Into<Bytes>) -> LogEntry {
    LogEntry {
        id: id(epoch, index),
        kind: EntryKind::Command,
        payload: payload.into(),
    }
}

/// Entries `[from, to)` whose bytes say who they are.
pub(crate) fn entries(group: u64, epoch: u64, from: u64, to: u64, size: usize) -> Vec<LogEntry> {
    (from..to)
        .map(|index| entry(epoch, index, payload(group, epoch, index, size)))
        .collect()
}

pub(crate) fn payload(group: u64, epoch: u64, index: u64, size: usize) -> Bytes {
    let mut text = format!("{group}/{epoch}/{index}/").into_bytes();
    while text.len() < size {
        text.push(b'a' + u8::try_from((index + text.len() as u64) % 26).unwrap());
    }
    text.into()
}

pub(crate) fn checkpoint(epoch: u64, index: u64, state: &str) -> Checkpoint {
    let membership = Bytes::from_static(b"members");
    Checkpoint {
        id: id(epoch, index),
        membership,
        state: Bytes::copy_from_slice(state.as_bytes()),
    }
}

/// Appends, and hands back what the callback will fire.
pub(crate) fn append(log: &GroupStore, entries: Vec<LogEntry>) -> Receiver<()> {
    let (sender, receiver) = channel();
    log.append(entries, Box::new(move || sender.send(()).unwrap_or(())))
        .unwrap();
    receiver
}

/// Appends and waits until it is durable.
pub(crate) fn append_durable(log: &GroupStore, entries: Vec<LogEntry>) {
    append(log, entries).recv_timeout(DEADLINE).unwrap();
}

/// Everything in the log.
pub(crate) async fn read_all(log: &GroupStore) -> Result<Vec<LogEntry>, StorageError> {
    let state = log.state();
    let first = state.purged.map_or(0, |purged| purged.index.0 + 1);
    log.read(LogIndex(first), usize::MAX, usize::MAX).await
}

/// Waits until `fact` holds.
pub(crate) async fn eventually(what: &str, mut fact: impl FnMut() -> bool) {
    let start = tokio::time::Instant::now();
    while !fact() {
        assert!(start.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
