//! A group's log as openraft sees it: `RaftLogStorage` and `RaftLogReader` over [`GroupStore`].
//!
//! Owns no state but the group's `last` mark, which the network adapter reads. Everything durable, and the order in which it
//! becomes durable, is the store's business: an append, a vote and a truncation go into the same journal in the order of
//! these calls. A storage error is fatal to the group, openraft stops on the first one.

use std::fmt;
use std::io;
use std::ops::{Bound, RangeBounds, RangeInclusive};
use std::sync::Arc;

use futures_util::{Stream, stream};
use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};

use super::replica::Replica;
use super::type_config::{
    Entry, LogId, Members, Payload, TypeConfig, Vote, VoteRecord, entry_id, from_stored, io_error,
    log_id, to_stored,
};
use crate::storage::GroupStore;
use crate::types::{EntryId, LogIndex, decode, encode};

/// Entries read from the store in one go when a whole range is asked for.
const READ_ENTRIES: usize = 512;

/// The log of one group, and a reader of it. Cheap to clone; only openraft's core writes.
#[derive(Clone)]
pub(crate) struct LogStore {
    replica: Arc<Replica>,
    /// Most bytes of entries in one append message.
    append_bytes_max: usize,
}

impl fmt::Debug for LogStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogStore")
            .field("replica", &self.replica)
            .finish_non_exhaustive()
    }
}

impl LogStore {
    pub(crate) fn new(replica: Arc<Replica>, append_bytes_max: usize) -> Self {
        Self {
            replica,
            append_bytes_max,
        }
    }

    fn store(&self) -> &GroupStore {
        &self.replica.store
    }

    /// The entries from `start` to before `end` that are there, at least one when there is one, at most `max_bytes`.
    async fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let count = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
        if count == 0 {
            return Ok(Vec::new());
        }
        let count = count.min(READ_ENTRIES);
        let read = self
            .store()
            .read(LogIndex(start), count, max_bytes)
            .await
            .map_err(io_error)?;
        let mut entries = Vec::with_capacity(read.len());
        for (entry, expected) in read.into_iter().zip(start..) {
            if entry.id.index.0 != expected {
                return Err(io_error(format!(
                    "group {}: the store returned entry {} where {expected} was asked for",
                    self.replica.group, entry.id
                )));
            }
            entries.push(from_stored(entry).map_err(io_error)?);
        }
        Ok(entries)
    }

    /// The part of `range` that the log holds, as `start..end`.
    fn clip<R: RangeBounds<u64>>(&self, range: &R) -> (u64, u64) {
        let state = self.store().state();
        let first = state.purged.map_or(0, |id| id.index.0 + 1);
        let next = state.last.map_or(0, |id| id.index.0 + 1);
        let start = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => *index,
            Bound::Unbounded => u64::MAX,
        };
        (start.max(first), end.min(next))
    }

    fn short(&self, at: u64, end: u64) -> io::Error {
        io_error(format!(
            "group {}: entry {at} of a range up to {end} is missing from the store",
            self.replica.group
        ))
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn entries_stream<R>(
        &mut self,
        range: R,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        R: RangeBounds<u64> + Clone + fmt::Debug + OptionalSend,
    {
        // Read in pieces: what is applied after a restart may be far larger than memory. Recent entries come from the
        // store's memory, so applying what was just appended reads nothing back from disk.
        let (start, end) = self.clip(&range);
        let reader = self.clone();
        let pieces = stream::unfold((start, reader), move |(at, reader)| async move {
            if at >= end {
                return None;
            }
            let piece = match reader.read(at, end, reader.append_bytes_max).await {
                Ok(piece) if piece.is_empty() => Err(reader.short(at, end)),
                other => other,
            };
            match piece {
                Ok(entries) => {
                    let next = at + u64::try_from(entries.len()).unwrap_or(u64::MAX);
                    let items: Vec<_> = entries.into_iter().map(Ok).collect();
                    Some((stream::iter(items), (next, reader)))
                }
                Err(error) => Some((stream::iter(vec![Err(error)]), (end, reader))),
            }
        });
        Box::pin(futures_util::StreamExt::flatten(pieces))
    }

    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + fmt::Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, io::Error> {
        let (mut at, end) = self.clip(&range);
        let mut entries = Vec::new();
        while at < end {
            let piece = self.read(at, end, self.append_bytes_max).await?;
            if let Some(last) = piece.last() {
                at = last.log_id.index + 1;
                entries.extend(piece);
                continue;
            }
            // Entries may be absent before the first one, and nowhere else.
            let first = self
                .store()
                .key_entry_ids(LogIndex(0), LogIndex(end - 1))
                .await;
            match first.map_err(io_error)?.first() {
                Some(first) if first.index.0 > at => at = first.index.0,
                _ => return Err(self.short(at, end)),
            }
        }
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        match self.store().state().vote {
            Some(bytes) => {
                let record: VoteRecord = decode(&bytes).map_err(io_error)?;
                Ok(Some(record.into()))
            }
            None => Ok(None),
        }
    }

    /// Only a leader that replicates calls this.
    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        if self.replica.me.is_witness() {
            // A witness holds no commands: were it ever to lead, it must fail and not spread its stubs.
            return Err(io_error(format!(
                "group {}: witness {} was asked to replicate; a witness never leads",
                self.replica.group, self.replica.me
            )));
        }
        let entries = self.read(start, end, self.append_bytes_max).await?;
        if entries.is_empty() && start < end {
            return Err(self.short(start, end));
        }
        Ok(entries)
    }

    /// The last entry of each epoch in `range`. openraft's documentation of this method asks for the first of each, but
    /// its own implementation gives the last, and that is what its list of log ids is built on.
    async fn get_key_log_ids(
        &mut self,
        range: RangeInclusive<LogId>,
    ) -> Result<Vec<LogId>, io::Error> {
        let (from, to) = (LogIndex(range.start().index), LogIndex(range.end().index));
        let firsts = self
            .store()
            .key_entry_ids(from, to)
            .await
            .map_err(io_error)?;
        let mut lasts: Vec<EntryId> = Vec::with_capacity(firsts.len());
        let mut epoch = None;
        for first in firsts {
            if epoch == Some(first.epoch) {
                // The entry at the end of the range.
                continue;
            }
            if let Some(last) = lasts.last_mut() {
                last.index = LogIndex(first.index.0.saturating_sub(1));
            }
            epoch = Some(first.epoch);
            lasts.push(EntryId {
                epoch: first.epoch,
                index: to,
            });
        }
        Ok(lasts.into_iter().map(log_id).collect())
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let state = self.store().state();
        Ok(LogState {
            last_purged_log_id: state.purged.map(log_id),
            last_log_id: state.last.map(log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::VoteNotPersisted) {
            return Ok(());
        }
        let bytes = encode(&VoteRecord::from(*vote)).into();
        self.store().save_vote(bytes).await.map_err(io_error)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let is_witness = self.replica.me.is_witness();
        let mut stored = Vec::new();
        for entry in entries {
            if let Payload::Membership(membership) = &entry.payload {
                // A membership counts from the moment it is in the log; who is in it no more is forgotten when the status shows it.
                self.replica.add_members(&Members::of(membership));
            }
            stored.push(to_stored(entry, is_witness));
        }
        let Some(last) = stored.last().map(|entry| entry.id.index) else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        // Before the entries can be seen, so that no one can match more than the leader is known to have.
        self.replica.set_last(Some(last));
        let replica = Arc::clone(&self.replica);
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::AppendFromMemory) {
            self.store()
                .append(stored, Box::new(|| {}))
                .map_err(io_error)?;
            callback.io_completed(Ok(()));
            replica.flushed();
            return Ok(());
        }
        let flushed = Box::new(move || {
            callback.io_completed(Ok(()));
            replica.flushed();
        });
        self.store().append(stored, flushed).map_err(io_error)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let last = last.map(|id| LogIndex(id.index));
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::ConflictKept) {
            return Ok(());
        }
        self.store().truncate_after(last).map_err(io_error)?;
        self.replica.set_last(last);
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.store().purge(entry_id(upto)).map_err(io_error)?;
        self.replica.purged(entry_id(upto));
        self.replica
            .set_last(self.store().state().last.map(|id| id.index));
        Ok(())
    }
}
