//! A group's state machine as openraft sees it: `RaftStateMachine` over [`StateMachine`], checkpoints and snapshots.
//!
//! Owns what is applied and the membership as of it. A snapshot is the base checkpoint of the store, the state at the point
//! the log is purged to, which lies at or below what is applied; the retained log follows by ordinary replication.
//! Runs on openraft's worker, one command at a time.

use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::OptionalSend;
use openraft::RaftSnapshotBuilder;
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};

use super::StateMachine;
use super::replica::{Replica, lock};
use super::type_config::{
    Answer, Command, LogId, Members, Payload, Snapshot, SnapshotMeta, StoredMembership, TypeConfig,
    decode_stored_membership, encode_stored_membership, entry_id, io_error, log_id,
};
use crate::storage::Checkpoint;

/// Entries applied before their proposers are answered together.
const ANSWER_BATCH: usize = 128;
/// Entries after which a witness, which has no state, notes a checkpoint.
const WITNESS_CHECKPOINT_ENTRIES: u64 = 1024;

/// The state machine with what it has applied. It survives a rebuild of the openraft instance.
pub(crate) struct MachineState {
    machine: Box<dyn StateMachine>,
    applied: Option<LogId>,
    membership: StoredMembership,
    /// Which openraft instance may apply: a worker of an older one is refused.
    instance: u64,
    /// The last entry of the newest checkpoint of a witness.
    witness_checkpoint: u64,
}

impl fmt::Debug for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineState")
            .field("applied", &self.applied)
            .finish_non_exhaustive()
    }
}

impl MachineState {
    pub(crate) fn new(machine: Box<dyn StateMachine>) -> Self {
        Self {
            machine,
            applied: None,
            membership: StoredMembership::default(),
            instance: 0,
            witness_checkpoint: 0,
        }
    }

    /// Shuts out the worker of every earlier instance; returns the new instance's number.
    pub(crate) fn next_instance(&mut self) -> u64 {
        self.instance += 1;
        self.instance
    }
}

/// The adapter that one openraft instance drives.
#[derive(Debug)]
pub(crate) struct Machine {
    replica: Arc<Replica>,
    instance: u64,
}

impl Machine {
    /// Restores the state machine from the newest checkpoint in the store.
    pub(crate) fn restore(replica: &Arc<Replica>) -> io::Result<()> {
        let newest = replica.store.newest_checkpoint();
        let mut state = lock(&replica.machine);
        match newest {
            Some(checkpoint) => load(replica, &mut state, &checkpoint)?,
            None if replica.me.is_witness() => {}
            None => state.machine.restore(None).map_err(io_error)?,
        }
        Ok(())
    }

    /// The adapter for a new openraft instance; earlier ones are shut out.
    pub(crate) fn attach(replica: Arc<Replica>) -> Self {
        let instance = lock(&replica.machine).next_instance();
        Self { replica, instance }
    }

    /// Runs `with` on the state, unless a newer instance has taken over.
    fn with<T>(&self, with: impl FnOnce(&mut MachineState) -> io::Result<T>) -> io::Result<T> {
        let mut state = lock(&self.replica.machine);
        if state.instance != self.instance {
            return Err(io_error(format!(
                "group {}: instance {} was replaced by {}",
                self.replica.group, self.instance, state.instance
            )));
        }
        with(&mut state)
    }

    fn apply_one(&self, log_id: LogId, payload: Payload) -> io::Result<Answer> {
        let is_witness = self.replica.me.is_witness();
        self.with(|state| {
            if let Some(applied) = state.applied
                && log_id.index != applied.index + 1
            {
                return Err(io_error(format!(
                    "group {}: entry {} to apply does not follow {}",
                    self.replica.group,
                    entry_id(log_id),
                    entry_id(applied)
                )));
            }
            let answer = match payload {
                Payload::Blank => Answer::default(),
                // A witness has no commands to apply, only their places.
                Payload::Normal(_) if is_witness => Answer::default(),
                Payload::Normal(Command(bytes)) => {
                    Answer(state.machine.apply(entry_id(log_id), &bytes))
                }
                Payload::Membership(membership) => {
                    state.membership = StoredMembership::new(Some(log_id), membership);
                    Answer::default()
                }
            };
            state.applied = Some(log_id);
            Ok(answer)
        })
    }

    /// Publishes what is applied, then answers the proposers: whoever has an answer finds it in the status.
    fn answer(&self, answers: &mut Vec<(ApplyResponder<TypeConfig>, Answer)>, applied: LogId) {
        self.replica.applied(entry_id(applied));
        for (responder, answer) in answers.drain(..) {
            responder.send(answer);
        }
    }

    /// Notes a checkpoint when the state machine wants one.
    fn checkpoint_if_due(&self) -> io::Result<()> {
        let is_witness = self.replica.me.is_witness();
        self.with(|state| {
            let Some(applied) = state.applied else {
                return Ok(());
            };
            let due = if is_witness {
                applied.index >= state.witness_checkpoint + WITNESS_CHECKPOINT_ENTRIES
            } else {
                state.machine.wants_checkpoint()
            };
            if !due {
                return Ok(());
            }
            let (bytes, blocks) = if is_witness {
                (Bytes::new(), Vec::new())
            } else {
                state.machine.checkpoint()
            };
            state.witness_checkpoint = applied.index;
            let checkpoint = Checkpoint {
                id: entry_id(applied),
                membership: encode_stored_membership(&state.membership),
                state: bytes,
            };
            self.replica
                .store
                .save_checkpoint(checkpoint, blocks)
                .map_err(io_error)
        })
    }
}

/// Replaces the state by a checkpoint's.
fn load(replica: &Replica, state: &mut MachineState, checkpoint: &Checkpoint) -> io::Result<()> {
    let membership = decode_stored_membership(&checkpoint.membership).map_err(io_error)?;
    if !replica.me.is_witness() {
        state
            .machine
            .restore(Some(&checkpoint.state))
            .map_err(io_error)?;
    }
    state.applied = Some(log_id(checkpoint.id));
    state.membership = membership;
    state.witness_checkpoint = checkpoint.id.index.0;
    replica.applied(checkpoint.id);
    Ok(())
}

fn snapshot_of(checkpoint: Checkpoint) -> io::Result<Snapshot> {
    let last_membership = decode_stored_membership(&checkpoint.membership).map_err(io_error)?;
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(checkpoint.id)),
        last_membership,
    };
    Ok(Snapshot {
        meta,
        snapshot: checkpoint.state,
    })
}

/// Hands out the base checkpoint, or makes one of the state as it was when the builder was asked for.
#[derive(Debug)]
pub(crate) struct Builder {
    replica: Arc<Replica>,
    /// Only when openraft must have a snapshot and the store has no base.
    made: Option<Checkpoint>,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        if let Some(made) = self.made.take() {
            self.replica
                .store
                .save_base(made.clone(), false)
                .await
                .map_err(io_error)?;
            return snapshot_of(made);
        }
        match self.replica.store.base() {
            Some(base) => snapshot_of(base),
            None => Ok(Snapshot {
                meta: SnapshotMeta::default(),
                snapshot: Bytes::new(),
            }),
        }
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = Bytes;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        self.with(|state| Ok((state.applied, state.membership.clone())))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut answers = Vec::new();
        let mut unpublished = 0_usize;
        let mut last = None;
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let id = entry.log_id;
            let answer = self.apply_one(id, entry.payload)?;
            if let Some(responder) = responder {
                answers.push((responder, answer));
            }
            last = Some(id);
            unpublished += 1;
            if unpublished >= ANSWER_BATCH {
                self.answer(&mut answers, id);
                unpublished = 0;
            }
        }
        if let Some(id) = last {
            self.answer(&mut answers, id);
        }
        self.checkpoint_if_due()
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
        let replica = Arc::clone(&self.replica);
        if !force {
            // A snapshot is built only after a purge point has been noted as the base.
            return replica.store.base().map(|_| Builder {
                replica,
                made: None,
            });
        }
        // openraft must have one: its log is purged, and the base is gone.
        let is_witness = replica.me.is_witness();
        let made = self.with(|state| {
            let Some(applied) = state.applied else {
                return Ok(None);
            };
            let (bytes, blocks) = if is_witness {
                (Bytes::new(), Vec::new())
            } else {
                state.machine.checkpoint()
            };
            let checkpoint = Checkpoint {
                id: entry_id(applied),
                membership: encode_stored_membership(&state.membership),
                state: bytes,
            };
            // The blocks are handed out once: keep them with the state they belong to.
            replica
                .store
                .save_checkpoint(checkpoint.clone(), blocks)
                .map_err(io_error)?;
            Ok(Some(checkpoint))
        });
        match made {
            Ok(made) => Some(Builder {
                replica: Arc::clone(&self.replica),
                made,
            }),
            Err(error) => {
                tracing::error!(group = %self.replica.group, %error, "cannot make a checkpoint");
                None
            }
        }
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            replica: Arc::clone(&self.replica),
            made: None,
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Bytes,
    ) -> Result<(), io::Error> {
        let Some(id) = meta.last_log_id else {
            return Err(io_error("a snapshot of nothing"));
        };
        self.with(|_| Ok(()))?;
        let state = if self.replica.me.is_witness() {
            Bytes::new()
        } else {
            snapshot
        };
        let membership = encode_stored_membership(&meta.last_membership);
        let checkpoint = Checkpoint {
            id: entry_id(id),
            membership,
            state,
        };
        // Durable first: the log in front of it is purged as soon as this returns.
        self.replica
            .store
            .save_base(checkpoint.clone(), true)
            .await
            .map_err(io_error)?;
        self.with(|state| load(&self.replica, state, &checkpoint))?;
        self.replica
            .set_members(&Members::of(meta.last_membership.membership()));
        tracing::info!(group = %self.replica.group, at = %checkpoint.id.index, "installed a snapshot");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        self.replica.store.base().map(snapshot_of).transpose()
    }
}

#[cfg(test)]
mod tests {
    use openraft::testing::log::{StoreBuilder, Suite};
    use openraft::{RaftLogReader, StorageError};

    use super::*;
    use crate::raft::log_store::LogStore;
    use crate::raft::type_config::{Entry, Vote};
    use crate::storage::{MemDisk, Store, StoreConfig};
    use crate::types::{BrokerId, DecodeError, EntryId, GroupId, ReplicaId, ReplicaKind};

    struct Nothing;

    impl StateMachine for Nothing {
        fn apply(&mut self, _id: EntryId, _command: &Bytes) -> Bytes {
            Bytes::new()
        }
        fn wants_checkpoint(&self) -> bool {
            false
        }
        fn checkpoint(&mut self) -> (Bytes, Vec<(u64, Bytes)>) {
            (Bytes::new(), Vec::new())
        }
        fn restore(&mut self, _state: Option<&Bytes>) -> Result<(), DecodeError> {
            Ok(())
        }
    }

    /// The suite leaves gaps between the entries it applies, which the adapter takes for a broken store.
    struct WithGaps(Machine);

    impl RaftStateMachine<TypeConfig> for WithGaps {
        type SnapshotData = Bytes;
        type SnapshotBuilder = Builder;

        async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
            self.0.applied_state().await
        }
        async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
        where
            S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
        {
            while let Some(entry) = entries.next().await {
                let (entry, responder) = entry?;
                lock(&self.0.replica.machine).applied = None;
                let one = futures_util::stream::iter([Ok((entry, responder))]);
                self.0.apply(one).await?;
            }
            Ok(())
        }
        async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
            self.0.try_create_snapshot_builder(force).await
        }
        async fn get_snapshot_builder(&mut self) -> Builder {
            self.0.get_snapshot_builder().await
        }
        async fn install_snapshot(
            &mut self,
            meta: &SnapshotMeta,
            snapshot: Bytes,
        ) -> Result<(), io::Error> {
            self.0.install_snapshot(meta, snapshot).await
        }
        async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
            self.0.get_current_snapshot().await
        }
    }

    fn config(directory: &std::path::Path) -> StoreConfig {
        StoreConfig {
            directory: directory.to_owned(),
            segment_bytes: 1 << 20,
            cache_bytes: 1 << 20,
            catalog_cache_bytes: 1 << 20,
            catalog_sync_bytes: 1 << 20,
            commit_bytes_max: 1 << 20,
            reserve_bytes: 0,
        }
    }

    fn replica(store: &Store) -> Arc<Replica> {
        let me = ReplicaId::new(BrokerId(1), ReplicaKind::Data, 1);
        let log = store.group(GroupId(1), me).unwrap();
        Replica::new(GroupId(1), me, log, Box::new(Nothing))
    }

    fn adapters(store: &Store) -> (LogStore, WithGaps) {
        let replica = replica(store);
        Machine::restore(&replica).unwrap();
        let machine = WithGaps(Machine::attach(replica.clone()));
        (LogStore::new(replica, 1 << 20), machine)
    }

    type Built<G> = Result<(G, LogStore, WithGaps), StorageError<TypeConfig>>;

    struct OnDisk;

    impl StoreBuilder<TypeConfig, LogStore, WithGaps, (tempfile::TempDir, Store)> for OnDisk {
        async fn build(&self) -> Built<(tempfile::TempDir, Store)> {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(&config(directory.path()), BrokerId(1)).unwrap();
            let (log, machine) = adapters(&store);
            Ok(((directory, store), log, machine))
        }
    }

    struct InMemory;

    impl StoreBuilder<TypeConfig, LogStore, WithGaps, Store> for InMemory {
        async fn build(&self) -> Built<Store> {
            let directory = std::path::Path::new("memory");
            let store =
                Store::open_in_memory(&MemDisk::new(), &config(directory), BrokerId(1)).unwrap();
            let (log, machine) = adapters(&store);
            Ok((store, log, machine))
        }
    }

    /// Goal: the adapters keep openraft's contract of log and state machine. Method: openraft's own suite, on a directory.
    #[test]
    fn openrafts_suite_passes_on_disk() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(Suite::test_all(OnDisk)).unwrap();
    }

    /// Goal: as above, for the disk that simulations use. Method: the same suite in memory.
    #[test]
    fn openrafts_suite_passes_in_memory() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(Suite::test_all(InMemory)).unwrap();
    }

    /// Reads like the adapter, and finds key entries as openraft does by itself.
    struct Plain(LogStore);

    impl RaftLogReader<TypeConfig> for Plain {
        async fn try_get_log_entries<
            R: std::ops::RangeBounds<u64> + Clone + fmt::Debug + OptionalSend,
        >(
            &mut self,
            range: R,
        ) -> Result<Vec<Entry>, io::Error> {
            self.0.try_get_log_entries(range).await
        }
        async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
            self.0.read_vote().await
        }
    }

    /// Goal: the key entries of a log are those that openraft would find by itself; wrong ones make a restarted replica
    /// believe in another log. Method: logs of many shapes of epochs, every range, both ways.
    #[tokio::test]
    async fn key_entries_are_those_that_openraft_finds() {
        use openraft::storage::{IOFlushed, RaftLogStorage};
        for epochs in [
            vec![1],
            vec![1, 1, 1, 1],
            vec![1, 2, 3, 4, 5],
            vec![0, 1, 1, 1, 1, 1, 1, 3, 3, 3, 4],
            vec![1, 1, 1, 2, 5, 5, 5, 5, 5, 5, 5, 5, 5, 9],
            vec![2, 2, 7, 7, 7, 8, 8, 8, 8, 9, 9],
        ] {
            let directory = std::path::Path::new("memory");
            let store =
                Store::open_in_memory(&MemDisk::new(), &config(directory), BrokerId(1)).unwrap();
            let mut log = LogStore::new(replica(&store), 1 << 20);
            let ids: Vec<LogId> = (0..)
                .zip(&epochs)
                .map(|(at, epoch)| LogId::new_term_index(*epoch, at))
                .collect();
            let entries = ids.iter().map(|id| Entry {
                log_id: *id,
                payload: Payload::Blank,
            });
            log.append(entries.collect::<Vec<_>>(), IOFlushed::noop())
                .await
                .unwrap();
            for (at, from) in ids.iter().enumerate() {
                for to in &ids[at..] {
                    let expected = Plain(log.clone())
                        .get_key_log_ids(*from..=*to)
                        .await
                        .unwrap();
                    let found = log.get_key_log_ids(*from..=*to).await.unwrap();
                    assert_eq!(found, expected, "{epochs:?} {from} {to}");
                }
            }
        }
    }
}
