//! What the parts of one group's local replica share: its store, its status, its progress board, its state machine.
//!
//! Owns the locks around them; each is held for a few instructions and never across an await. It outlives the openraft
//! instance, which may be rebuilt.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

use super::machine::MachineState;
use super::progress::{Acknowledged, Board};
use super::type_config::Members;
use super::{FollowerProgress, GroupStatus, Progress, Role, StateMachine};
use crate::net::{Net, PeerState};
use crate::storage::GroupStore;
use crate::types::{EntryId, GroupId, LeaderEpoch, LogIndex, ReplicaId};

/// One group's local replica, as its adapters see it.
pub(crate) struct Replica {
    pub(crate) group: GroupId,
    pub(crate) me: ReplicaId,
    pub(crate) store: GroupStore,
    pub(crate) machine: Mutex<MachineState>,
    pub(crate) status: watch::Sender<GroupStatus>,
    board: Mutex<Board>,
    changed: watch::Sender<u64>,
    /// Index of the last entry, plus one; 0 for none.
    next: AtomicU64,
    /// When a leader was last followed.
    heard: Mutex<Option<Instant>>,
    stopped: Mutex<Option<String>>,
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Replica({} of group {})", self.me, self.group)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Replica {
    pub(crate) fn new(
        group: GroupId,
        me: ReplicaId,
        store: GroupStore,
        machine: Box<dyn StateMachine>,
    ) -> Arc<Self> {
        let next = store.state().last.map_or(0, |id| id.index.0 + 1);
        Arc::new(Self {
            group,
            me,
            store,
            machine: Mutex::new(MachineState::new(machine)),
            status: watch::Sender::new(GroupStatus::default()),
            board: Mutex::new(Board::new(me)),
            changed: watch::Sender::new(0),
            next: AtomicU64::new(next),
            heard: Mutex::new(None),
            stopped: Mutex::new(None),
        })
    }

    /// The last entry of the local log, durable or not.
    pub(crate) fn last(&self) -> Option<LogIndex> {
        self.next
            .load(Ordering::Acquire)
            .checked_sub(1)
            .map(LogIndex)
    }

    pub(crate) fn set_last(&self, last: Option<LogIndex>) {
        self.next
            .store(last.map_or(0, |index| index.0 + 1), Ordering::Release);
    }

    /// More of the local log is durable.
    pub(crate) fn flushed(&self) {
        if self.status.borrow().role == Role::Leader {
            self.progress_changed();
        }
    }

    pub(crate) fn progress_changed(&self) {
        self.changed
            .send_modify(|version| *version = version.wrapping_add(1));
    }

    pub(crate) fn watch_progress(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Notes who belongs to the group by a membership that the status does not show yet.
    pub(crate) fn add_members(&self, members: &Members) {
        if lock(&self.board).add_members(&members.voters, &members.learners) {
            self.progress_changed();
        }
    }

    /// Notes who belongs to the group, as the status shows.
    pub(crate) fn set_members(&self, members: &Members) {
        if lock(&self.board).set_members(&members.voters, &members.learners) {
            self.progress_changed();
        }
    }

    /// Notes that this replica leads `epoch`.
    pub(crate) fn begin_epoch(&self, epoch: LeaderEpoch) {
        if lock(&self.board).begin(epoch) {
            self.progress_changed();
        }
    }

    /// Notes that `from` confirmed its log up to `matched` as an answer to a request of `sent_at`, when this replica's last
    /// entry was `last_at_send`.
    pub(crate) fn acknowledged(
        &self,
        epoch: LeaderEpoch,
        from: ReplicaId,
        matched: Option<LogIndex>,
        sent_at: Instant,
        last_at_send: Option<LogIndex>,
    ) {
        let answer = Acknowledged {
            matched,
            sent_at,
            last_at_send,
            last_now: self.last(),
            now: Instant::now(),
        };
        if lock(&self.board).acknowledged(epoch, from, answer) {
            self.progress_changed();
        }
    }

    /// Notes that a heartbeat of the leader was taken now.
    pub(crate) fn heard_leader(&self) {
        *lock(&self.heard) = Some(Instant::now());
    }

    /// When a heartbeat of the leader was last taken.
    pub(crate) fn heard_at(&self) -> Option<Instant> {
        *lock(&self.heard)
    }

    /// Whether `from`, which does not have the entry at `index`, had confirmed it in this epoch.
    pub(crate) fn has_reverted(
        &self,
        epoch: LeaderEpoch,
        from: ReplicaId,
        index: LogIndex,
    ) -> bool {
        let (reverted, known) = {
            let mut board = lock(&self.board);
            let before = board.has_lost_data(epoch, from);
            (board.conflicted(epoch, from, index), before)
        };
        if reverted && !known {
            tracing::error!(
                group = %self.group, replica = %from, index = %index, epoch = %epoch,
                "replica lost entries that it had acknowledged; it is not fed any more in this epoch, replace it"
            );
            self.progress_changed();
        }
        reverted
    }

    /// Whether `replica` was found in `epoch` to have lost entries that it had acknowledged.
    pub(crate) fn has_lost_data(&self, epoch: LeaderEpoch, replica: ReplicaId) -> bool {
        lock(&self.board).has_lost_data(epoch, replica)
    }

    /// The first index that a witness may not have yet in `epoch`.
    pub(crate) fn witness_limit(&self, epoch: LeaderEpoch) -> LogIndex {
        let flushed = self.store.flushed().map(|id| id.index);
        let mut board = lock(&self.board);
        board.begin(epoch);
        board.witness_limit(epoch, flushed)
    }

    pub(crate) fn set_in_sync(
        &self,
        epoch: LeaderEpoch,
        in_sync: std::collections::BTreeSet<ReplicaId>,
    ) {
        if lock(&self.board).set_in_sync(epoch, in_sync) {
            self.progress_changed();
        }
    }

    /// How far the replicas have come.
    pub(crate) fn progress(&self, net: &Net) -> Progress {
        let (epoch, others) = {
            let board = lock(&self.board);
            (board.epoch(), board.others().clone())
        };
        let mut followers = BTreeMap::new();
        for (replica, known) in others {
            let progress = FollowerProgress {
                matched: known.matched,
                caught_up_at: known.caught_up_at,
                connected: net.peer_state(replica.broker()) == PeerState::Up,
                lost_data: known.lost_data,
            };
            followers.insert(replica, progress);
        }
        Progress {
            epoch,
            flushed: self.store.flushed().map(|id| id.index),
            followers,
        }
    }

    /// Publishes that everything up to `id` is applied. Before any proposer is answered.
    pub(crate) fn applied(&self, id: EntryId) {
        self.status.send_if_modified(|status| {
            if status.applied == Some(id) {
                return false;
            }
            status.applied = Some(id);
            status.committed = status.committed.max(Some(id));
            true
        });
    }

    /// Publishes that everything up to `id` is purged.
    pub(crate) fn purged(&self, id: EntryId) {
        self.status
            .send_if_modified(|status| status.purged.replace(id) != Some(id));
    }

    /// Why the replica has stopped, when it has.
    pub(crate) fn stop_reason(&self) -> Option<String> {
        lock(&self.stopped).clone()
    }

    /// Notes that the replica has stopped for good; the first reason stays.
    pub(crate) fn stop(&self, reason: &str) {
        lock(&self.stopped).get_or_insert_with(|| reason.to_owned());
        self.status.send_if_modified(|status| {
            let changed = status.role != Role::Stopped;
            status.role = Role::Stopped;
            status.leader = None;
            changed
        });
    }
}
