//! The store of one broker: the Raft logs, votes and checkpoints of all its groups.
//!
//! Owns the data directory. The journal (`frame.rs`, `scan.rs`, `committer.rs`) is the truth; the catalog
//! (`catalog.rs`, `ledger.rs`, `cataloger.rs`) is a cache of it that can be rebuilt; a group's recent state is in
//! memory (`group.rs`). Two threads: the committer writes and syncs for all groups, the cataloger follows it.
//! Nobody outside this module names sled or a file. Knows no topic, no record and no Raft but its log.

use std::any::Any;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::types::{BrokerId, ClusterId, EntryId, Incarnation};

mod catalog;
mod cataloger;
mod claim;
mod cleaner;
mod committer;
mod core;
mod disk;
mod drive;
mod frame;
mod fsck;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod group;
mod handle;
mod identity;
mod ledger;
#[cfg(any(test, feature = "testkit"))]
mod memdisk;
mod open;
mod scan;

pub use catalog::is_panic_guarded;
pub use claim::check_directory;
pub use fsck::{Finding, FsckReport, Verdict, fsck};
pub use handle::{GroupStore, Store};
#[cfg(any(test, feature = "testkit"))]
pub use memdisk::MemDisk;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a panic said.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default()
}

/// What an entry is to Raft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A new leader's empty entry.
    Blank,
    /// A command of the group's state machine.
    Command,
    /// A membership change, encoded by `raft`.
    Membership,
}

/// One entry of a group's Raft log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Where it stands and who wrote it.
    pub id: EntryId,
    /// What it is.
    pub kind: EntryKind,
    /// Its bytes; empty for a blank entry and for a command on a witness.
    pub payload: Bytes,
}

/// A state machine's state at a log index, with the blocks of its index completed since the previous checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The last entry that is part of the state.
    pub id: EntryId,
    /// The membership as of that entry, encoded by `raft`.
    pub membership: Bytes,
    /// The state machine's state.
    pub state: Bytes,
}

/// What is wrong with a group's log that takes and gives nothing any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// What was found, where.
    pub what: String,
    /// The last entry that it had.
    pub last: Option<EntryId>,
}

/// What a group's log holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogState {
    /// The last entry dropped from the front by [`GroupStore::purge`].
    pub purged: Option<EntryId>,
    /// The last entry, or the purged one when there is none behind it.
    pub last: Option<EntryId>,
    /// The last vote saved.
    pub vote: Option<Bytes>,
}

/// What was flushed to the journal: shows how many entries of all groups share one flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flushes {
    /// How often the journal was flushed, each time with one `fdatasync`.
    pub flushes: u64,
    /// Entries in these flushes.
    pub entries: u64,
    /// Bytes in these flushes.
    pub bytes: u64,
}

/// Called once, from the committer's thread, when the entries it was given with are durable. Dropped uncalled
/// when a newer callback of the same group covers it, or when the store has failed.
pub type Flushed = Box<dyn FnOnce() + Send + 'static>;

/// Where a store keeps its files.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The data directory.
    pub directory: PathBuf,
    /// Size at which a journal segment is closed, in bytes.
    pub segment_bytes: u64,
    /// Memory for recent entries of all groups, in bytes.
    pub cache_bytes: u64,
    /// Memory for sled's cache, in bytes.
    pub catalog_cache_bytes: u64,
    /// Journal bytes between two catalog syncs.
    pub catalog_sync_bytes: u64,
    /// Most bytes written and synced in one go.
    pub commit_bytes_max: usize,
    /// Free space below which the store says it is full, in bytes.
    pub reserve_bytes: u64,
}

/// Why the store cannot do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The directory is in use by another process.
    #[error(
        "data directory {directory} is in use by another process; stop it, or use another directory"
    )]
    InUse {
        /// The directory.
        directory: PathBuf,
    },
    /// The operating system does not let this process use it, or it is no directory.
    #[error(
        "data directory {directory} cannot be used: {reason}; name a directory that this process may read and write"
    )]
    Unusable {
        /// The directory.
        directory: PathBuf,
        /// What the operating system says.
        reason: String,
    },
    /// The directory has something else in it and no data of a broker.
    #[error(
        "data directory {directory} is not empty and not a broker's: {name} is in it; name a new or an empty directory"
    )]
    Occupied {
        /// The directory.
        directory: PathBuf,
        /// The first thing in it that no broker makes.
        name: String,
    },
    /// Bytes that were durable are missing or wrong.
    #[error(
        "data directory {directory} is damaged: {what}; move it away and start the broker again: in a cluster with other brokers it rejoins with new replicas, which it copies from them"
    )]
    Damaged {
        /// The directory.
        directory: PathBuf,
        /// What was found, where.
        what: String,
    },
    /// The directory belongs to another broker or cluster.
    #[error(
        "data directory {directory} belongs to {owner}, not to {asked}; use its own directory for each broker"
    )]
    Foreign {
        /// The directory.
        directory: PathBuf,
        /// Whom it belongs to.
        owner: String,
        /// Who asked.
        asked: String,
    },
    /// A format this version does not know.
    #[error(
        "data directory {directory} has format {found}, this version reads {known}; use a newer version (nothing was changed)"
    )]
    UnknownFormat {
        /// The directory.
        directory: PathBuf,
        /// The format found.
        found: u32,
        /// The newest format known.
        known: u32,
    },
    /// A write or a flush failed; the store does nothing any more.
    #[error(
        "the store failed: {what}; nothing is acknowledged any more, restart the broker when the disk is well"
    )]
    Failed {
        /// What failed, and how.
        what: String,
    },
}

/// Who a data directory belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryIdentity {
    /// The broker.
    pub broker: BrokerId,
    /// Drawn when the directory was created.
    pub incarnation: Incarnation,
    /// The cluster, once known.
    pub cluster: Option<ClusterId>,
    /// Grows by a random step with every opening: no two processes share it, not even on copies of one directory.
    pub boot: u64,
    /// Journal bytes it held when it was opened, see [`Store::position`].
    pub position: u64,
}
