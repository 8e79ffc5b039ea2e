//! The local replica of one group: its handle, and the openraft instance behind it.
//!
//! Owns the instance and replaces it when it must (a transfer that cannot be taken back); handles stay valid. Decides which
//! errors are definite: what openraft refuses before it appends never happened, everything later may have.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{
    ClientWriteError, Fatal, ForwardReason, ForwardToLeader, InitializeError,
    LinearizableReadError, RaftError as OpenraftError,
};
use openraft::raft::{ClientWriteResult, TransferLeaderRequest};
use openraft::{ChangeMembers, LinearizerOption};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::context::Context;
use super::log_store::LogStore;
use super::machine::Machine;
use super::network::Factory;
use super::observe::observe;
use super::replica::{Replica, lock};
use super::type_config::{Command, LogId, Raft, Responder, TypeConfig, Vote, entry_id};
use super::{GroupStatus, Progress, RaftError, Role};
use crate::net::PeerState;
use crate::runtime::Tasks;
use crate::storage::{GroupStore, LogEntry, StorageError};
use crate::types::{EntryId, GroupId, LeaderEpoch, LogIndex, ReplicaId};

/// A membership change that another one cuts across is taken up again this often.
const MEMBERSHIP_ATTEMPTS: usize = 4;

/// The local replica of one group. Cheap to clone.
#[derive(Clone)]
pub struct Group {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    context: Arc<Context>,
    pub(crate) replica: Arc<Replica>,
    /// `None` while it is rebuilt and when the replica has been stopped.
    instance: Mutex<Option<Raft>>,
    /// Counts the instances started and stopped.
    generation: AtomicU64,
    tasks: Tasks,
    transferring: AtomicBool,
}

impl Inner {
    /// Whether the instance of `generation` is the one that runs.
    pub(crate) fn runs(&self, generation: u64) -> bool {
        self.generation.load(Ordering::Acquire) == generation
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("replica", &self.inner.replica)
            .finish_non_exhaustive()
    }
}

/// A proposal under way.
#[derive(Debug)]
pub struct Proposal {
    answer: oneshot::Receiver<ClientWriteResult<TypeConfig>>,
    replica: Arc<Replica>,
}

impl Proposal {
    /// Waits until the command is applied: its place in the log and the state machine's answer. Without a deadline of its
    /// own. Dropping it forgets the answer; the command may still be applied.
    pub async fn applied(self) -> Result<(EntryId, Bytes), RaftError> {
        match self.answer.await {
            Ok(Ok(response)) => Ok((entry_id(response.log_id), response.data.0)),
            Ok(Err(error)) => Err(write_error(error)),
            Err(_dropped) => Err(stopped(&self.replica)),
        }
    }
}

fn stopped(replica: &Replica) -> RaftError {
    let reason = replica
        .stop_reason()
        .unwrap_or_else(|| "it is being restarted".to_owned());
    RaftError::Stopped { reason }
}

fn forward(forward: &ForwardToLeader<TypeConfig>) -> RaftError {
    match forward.reason {
        ForwardReason::LeaseExpired => RaftError::NoQuorum,
        ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => RaftError::NotLeader {
            leader: forward.leader_id.map(ReplicaId::from_u64),
        },
    }
}

fn write_error(error: ClientWriteError<TypeConfig>) -> RaftError {
    match error {
        // Only ever said before anything is appended.
        ClientWriteError::ForwardToLeader(to) => forward(&to),
        ClientWriteError::LogEntryDiscarded(_) => RaftError::Lost,
        ClientWriteError::ChangeMembershipError(error) => RaftError::Membership {
            reason: error.to_string(),
        },
        ClientWriteError::PreconditionFailed(error) => RaftError::Membership {
            reason: error.to_string(),
        },
    }
}

impl Group {
    /// Restores the replica and starts its instance.
    pub(crate) async fn start(
        context: Arc<Context>,
        replica: Arc<Replica>,
    ) -> Result<Self, RaftError> {
        Machine::restore(&replica).map_err(|error| RaftError::Stopped {
            reason: error.to_string(),
        })?;
        let inner = Inner {
            tasks: context.tasks.child(),
            context,
            replica,
            instance: Mutex::new(None),
            generation: AtomicU64::new(0),
            transferring: AtomicBool::new(false),
        };
        let group = Self {
            inner: Arc::new(inner),
        };
        group.start_instance().await?;
        Ok(group)
    }

    async fn start_instance(&self) -> Result<(), RaftError> {
        let Inner {
            context, replica, ..
        } = &*self.inner;
        let config = if replica.me.is_witness() {
            &context.witness
        } else {
            &context.data
        };
        let factory = Factory {
            context: Arc::clone(context),
            replica: Arc::clone(replica),
        };
        // openraft takes the log and the vote it finds for durable, and would confirm them to others at once. An earlier
        // instance in this process may have left some that are not.
        replica.store.settle().await?;
        let log = LogStore::new(Arc::clone(replica), context.config.append_bytes_max);
        let machine = Machine::attach(Arc::clone(replica));
        let me = replica.me.as_u64();
        let started = Raft::new(me, Arc::clone(config), factory, log, machine).await;
        let raft = started.map_err(|error| RaftError::Stopped {
            reason: error.to_string(),
        })?;
        *lock(&self.inner.instance) = Some(raft.clone());
        let generation = self.inner.generation.fetch_add(1, Ordering::AcqRel) + 1;
        let observed = Arc::downgrade(&self.inner);
        self.inner.tasks.spawn(observe(raft, generation, observed));
        Ok(())
    }

    /// Stops the instance and waits for it; it is out of `instance` first, so that its end is not taken for a failure.
    async fn stop_instance(&self) {
        self.inner.generation.fetch_add(1, Ordering::AcqRel);
        let instance = lock(&self.inner.instance).take();
        if let Some(raft) = instance {
            // The only error is that the core panicked, and then it has stopped as well.
            raft.shutdown().await.ok();
        }
        // The worker of the state machine may still be busy: it finds itself replaced.
        lock(&self.inner.replica.machine).next_instance();
    }

    /// Stops the replica for good.
    pub(crate) async fn stop(&self, reason: &str) {
        self.inner.replica.stop(reason);
        self.stop_instance().await;
        self.inner.tasks.shutdown().await;
        // A transfer that failed just now may have started another one meanwhile.
        self.stop_instance().await;
    }

    /// Notes that the store, or this group's part of it, has failed: nothing is voted, acknowledged or answered any more.
    pub(crate) async fn store_failed(&self, reason: &str) {
        self.inner.replica.stop(reason);
        self.stop_instance().await;
    }

    /// The instance that runs now.
    pub(crate) fn raft(&self) -> Option<Raft> {
        lock(&self.inner.instance).clone()
    }

    fn running(&self) -> Result<Raft, RaftError> {
        self.raft().ok_or_else(|| stopped(&self.inner.replica))
    }

    fn fatal(&self, error: &Fatal<TypeConfig>) -> RaftError {
        let reason = self
            .inner
            .replica
            .stop_reason()
            .unwrap_or_else(|| error.to_string());
        RaftError::Stopped { reason }
    }

    /// Whether both are handles of the same run of the replica.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub(crate) fn replica(&self) -> &Arc<Replica> {
        &self.inner.replica
    }

    /// The group.
    pub fn id(&self) -> GroupId {
        self.inner.replica.group
    }

    /// This replica.
    pub fn me(&self) -> ReplicaId {
        self.inner.replica.me
    }

    /// The group as this replica sees it; changes with every step.
    pub fn status(&self) -> watch::Receiver<GroupStatus> {
        self.inner.replica.status.subscribe()
    }

    /// The status as soon as `condition` holds for it.
    pub(crate) async fn status_when(
        &self,
        condition: impl FnMut(&GroupStatus) -> bool,
    ) -> GroupStatus {
        let mut receiver = self.status();
        let status = receiver
            .wait_for(condition)
            .await
            .map(|status| status.clone());
        // The sender lives as long as this handle.
        status.unwrap_or_else(|_closed| GroupStatus {
            role: Role::Stopped,
            ..GroupStatus::default()
        })
    }

    /// Why the replica has stopped, once its role is [`Role::Stopped`].
    pub fn stop_reason(&self) -> Option<String> {
        self.inner.replica.stop_reason()
    }

    /// Creates the group with these voters, from one of them; harmless when it exists already. Refused on a witness.
    pub async fn initialize(&self, voters: BTreeSet<ReplicaId>) -> Result<(), RaftError> {
        let me = self.me();
        if me.is_witness() || !voters.contains(&me) {
            let reason = format!("{me} cannot create a group of {voters:?}");
            return Err(RaftError::Membership { reason });
        }
        let members: BTreeSet<u64> = voters.iter().map(|id| id.as_u64()).collect();
        match self.running()?.initialize(members).await {
            Ok(()) | Err(OpenraftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(OpenraftError::APIError(InitializeError::NotInMembers(error))) => {
                Err(RaftError::Membership {
                    reason: error.to_string(),
                })
            }
            Err(OpenraftError::Fatal(error)) => Err(self.fatal(&error)),
        }
    }

    /// Hands a command to Raft; commands of successive calls keep their order. Returns when it is queued. Dropping the future
    /// before that may leave the command queued or not.
    pub async fn propose(&self, command: Bytes) -> Result<Proposal, RaftError> {
        let (sender, answer) = oneshot::channel();
        let raft = self.running()?;
        match raft
            .client_write_ff(Command(command), Some(Responder(sender)))
            .await
        {
            Ok(()) => Ok(Proposal {
                answer,
                replica: Arc::clone(&self.inner.replica),
            }),
            Err(error) => Err(self.fatal(&error)),
        }
    }

    /// Asks a quorum whether this replica still leads, and waits until everything committed before the question is applied:
    /// the state read afterwards is linearizable. Cancel safe.
    pub async fn linearize(&self, timeout: Duration) -> Result<(), RaftError> {
        let deadline = Instant::now() + timeout;
        let raft = self.running()?;
        // A fresh round of heartbeats: failover lifts leases, so none may be relied on.
        let option = LinearizerOption::new(Some(Duration::ZERO), true).with_wait_timeout(timeout);
        let asked = tokio::time::timeout_at(deadline, raft.get_read_linearizer(option)).await;
        let late = || RaftError::Timeout { after: timeout };
        let read_index = match asked.map_err(|_| late())? {
            Ok(linearizer) => linearizer.read_log_id().index(),
            Err(OpenraftError::APIError(LinearizableReadError::ForwardToLeader(to))) => {
                return Err(forward(&to));
            }
            Err(OpenraftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                return Err(RaftError::NoQuorum);
            }
            Err(OpenraftError::Fatal(error)) => return Err(self.fatal(&error)),
        };
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::ReadIndexNotAwaited) {
            return Ok(());
        }
        let reached = self.status_when(|status| {
            status.role == Role::Stopped
                || status
                    .applied
                    .is_some_and(|applied| applied.index.0 >= read_index)
        });
        match tokio::time::timeout_at(deadline, reached).await {
            Ok(status) if status.role != Role::Stopped => Ok(()),
            Ok(_) => Err(stopped(&self.inner.replica)),
            Err(_) => Err(late()),
        }
    }

    /// When this replica last knew the group to be led, without asking anybody: when it heard its leader, or, leading, when a majority was level
    /// with it. `None`: not since it was started.
    pub fn led_at(&self) -> Option<Instant> {
        let voters = self.inner.replica.status.borrow().voters.clone();
        let level = self.progress().level_at(&voters);
        self.inner.replica.heard_at().max(level)
    }

    /// The entries from `from` (see [`GroupStore::read`]). Damage stops the replica: it must not lead with a log it cannot show.
    pub async fn read(
        &self,
        from: LogIndex,
        max_entries: usize,
        max_bytes: usize,
    ) -> Result<Vec<LogEntry>, RaftError> {
        let read = self.store().read(from, max_entries, max_bytes).await;
        if let Err(error @ StorageError::Damaged { .. }) = &read {
            self.store_failed(&error.to_string()).await;
        }
        Ok(read?)
    }

    /// The group's store, for its state machine's index blocks.
    pub fn store(&self) -> &GroupStore {
        &self.inner.replica.store
    }

    /// How far the replicas have come; meaningful while this replica leads `progress().epoch`.
    pub fn progress(&self) -> Progress {
        self.inner.replica.progress(&self.inner.context.net)
    }

    /// Changes whenever [`Group::progress`] does, and when a connection to a replica's broker comes or goes.
    pub fn progress_changed(&self) -> watch::Receiver<u64> {
        self.inner.replica.watch_progress()
    }

    /// Tells which data followers are in sync in `epoch`. The witness is fed only what all of them and this replica have
    /// durably; with none of them in sync, what this replica has. Until told, all data followers count as in sync.
    pub fn set_in_sync(&self, epoch: LeaderEpoch, in_sync: BTreeSet<ReplicaId>) {
        self.inner.replica.set_in_sync(epoch, in_sync);
    }

    /// Drops entries up to the newest checkpoint at or below `index`; a follower behind it gets the checkpoint as a snapshot.
    /// Returns when the checkpoint is durable as the base of the log; the entries go soon after, or when no follower needs
    /// them for what is on its way to it.
    pub async fn purge_to(&self, index: LogIndex) -> Result<(), RaftError> {
        let raft = self.running()?;
        let store = self.store();
        let applied = self.inner.replica.status.borrow().applied;
        // openraft's snapshot may lie below what is applied, never above.
        let Some(upto) = applied.map(|applied| index.min(applied.index)) else {
            return Ok(());
        };
        let Some(checkpoint) = store.checkpoint_at_or_below(upto) else {
            return Ok(());
        };
        let target = checkpoint.id;
        if store
            .state()
            .purged
            .is_some_and(|purged| purged.index >= target.index)
        {
            return Ok(());
        }
        if store.base().is_none_or(|base| base.id.index < target.index) {
            store.save_base(checkpoint, false).await?;
        }
        let known = raft.metrics().borrow_watched().snapshot;
        let result = if known.is_some_and(|known| known.index >= target.index.0) {
            raft.trigger().purge_log(target.index.0).await
        } else {
            raft.trigger().snapshot().await
        };
        result.map_err(|error| self.fatal(&error))
    }

    /// Adds replicas that receive the log but do not vote. Returns when that is committed, not when it has caught up.
    /// Harmless when it is a member already.
    pub async fn add_learner(&self, replica: ReplicaId) -> Result<(), RaftError> {
        let id = replica.as_u64();
        let raft = self.running()?;
        if is_member(&raft, replica) {
            return Ok(());
        }
        let result = raft.add_learner(id, (), false).await;
        self.membership_result(result.map(|_| ()))
    }

    /// Drops a replica that does not vote. Harmless when it is no member.
    pub async fn remove_learner(&self, replica: ReplicaId) -> Result<(), RaftError> {
        let raft = self.running()?;
        if !is_member(&raft, replica) {
            return Ok(());
        }
        let change = ChangeMembers::RemoveNodes(BTreeSet::from([replica.as_u64()]));
        let result = raft.change_membership(change, false).await;
        self.membership_result(result.map(|_| ()))
    }

    /// Makes `voters` the voters, through a joint membership; replicas that voted and no longer do are dropped, learners
    /// stay. A change that an earlier leader left half done is finished first. Harmless when they are the voters already.
    /// Not done when dropped half way, and safe to call again.
    pub async fn change_voters(&self, voters: BTreeSet<ReplicaId>) -> Result<(), RaftError> {
        let refuse = |reason: String| Err(RaftError::Membership { reason });
        if !voters.iter().any(|id| !id.is_witness()) {
            return refuse(format!("{voters:?} has no data replica"));
        }
        if !voters.contains(&self.me()) {
            return refuse(format!(
                "{} leads: transfer leadership before it is removed",
                self.me()
            ));
        }
        let target: BTreeSet<u64> = voters.iter().map(|id| id.as_u64()).collect();
        for _ in 0..MEMBERSHIP_ATTEMPTS {
            let raft = self.running()?;
            let sides = {
                let metrics = raft.metrics();
                let metrics = metrics.borrow_watched();
                metrics.membership_config.get_joint_config().clone()
            };
            if sides.len() == 1 && sides.first() == Some(&target) {
                return Ok(());
            }
            let change = ChangeMembers::ReplaceAllVoters(target.clone());
            let result = raft.change_membership(change, false).await;
            self.membership_result(result.map(|_| ()))?;
        }
        refuse(format!(
            "other changes came between {MEMBERSHIP_ATTEMPTS} times"
        ))
    }

    fn membership_result(
        &self,
        result: Result<(), OpenraftError<TypeConfig, ClientWriteError<TypeConfig>>>,
    ) -> Result<(), RaftError> {
        match result {
            Ok(()) => Ok(()),
            Err(OpenraftError::APIError(error)) => Err(write_error(error)),
            Err(OpenraftError::Fatal(error)) => Err(self.fatal(&error)),
        }
    }

    /// Hands leadership to `to`, when it is a live data voter that has the whole log; watches it, and rebuilds the local
    /// instance when no leader appears within two election timeouts. Goes on when the future is dropped.
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), RaftError> {
        let raft = self.running()?;
        let epoch = self.may_transfer(to)?;
        if to == self.me() {
            return Ok(());
        }
        if self.inner.transferring.swap(true, Ordering::AcqRel) {
            return Err(RaftError::Membership {
                reason: "a transfer is under way".to_owned(),
            });
        }
        let (sender, receiver) = oneshot::channel();
        let group = self.clone();
        // openraft cannot take a transfer back: someone must see it through.
        self.inner.tasks.spawn(async move {
            let result = group.transfer(&raft, to, epoch).await;
            group.inner.transferring.store(false, Ordering::Release);
            sender.send(result).ok();
        });
        receiver
            .await
            .unwrap_or_else(|_| Err(stopped(&self.inner.replica)))
    }

    /// Checks whether leadership may go to `to` now; the epoch that this replica leads.
    fn may_transfer(&self, to: ReplicaId) -> Result<LeaderEpoch, RaftError> {
        let refuse = |reason: String| Err(RaftError::Membership { reason });
        let status = self.inner.replica.status.borrow().clone();
        if status.role != Role::Leader {
            return Err(RaftError::NotLeader {
                leader: status.leader,
            });
        }
        if to.is_witness() || !status.voters.contains(&to) {
            return refuse(format!("{to} is not a data voter"));
        }
        if to == self.me() {
            return Ok(status.epoch);
        }
        let progress = self.progress();
        let Some(follower) = progress
            .followers
            .get(&to)
            .filter(|_| progress.epoch == status.epoch)
        else {
            return refuse(format!("nothing is known about {to} yet"));
        };
        // Under load nobody ever has the very last entry: level a moment ago will do, the successor waits for the rest.
        let recent = self.inner.context.config.heartbeat_interval * 2;
        let level = follower.matched >= self.inner.replica.last()
            || follower
                .caught_up_at
                .is_some_and(|at| at.elapsed() <= recent);
        if !follower.connected || follower.lost_data || !level {
            let why = if follower.lost_data {
                "it has lost data"
            } else if !follower.connected {
                "it is not connected"
            } else {
                "it lacks entries"
            };
            return refuse(format!("{to} cannot lead now: {why}"));
        }
        Ok(status.epoch)
    }

    async fn transfer(
        &self,
        raft: &Raft,
        to: ReplicaId,
        epoch: LeaderEpoch,
    ) -> Result<(), RaftError> {
        let patience = self.inner.context.config.election_timeout_max * 2;
        raft.trigger()
            .transfer_leader(to.as_u64())
            .await
            .map_err(|error| self.fatal(&error))?;
        let new_leader = self.status_when(|status| {
            status.role == Role::Stopped || (status.epoch > epoch && status.leader.is_some())
        });
        match tokio::time::timeout(patience, new_leader).await {
            Ok(status) if status.leader == Some(to) => Ok(()),
            Ok(status) if status.role != Role::Stopped => Err(RaftError::NotLeader {
                leader: status.leader,
            }),
            Ok(_) => Err(stopped(&self.inner.replica)),
            Err(_) => {
                tracing::warn!(group = %self.id(), %to, "nobody took leadership over; starting anew");
                self.stop_instance().await;
                if let Err(error) = self.start_instance().await {
                    self.inner.replica.stop(&error.to_string());
                    return Err(error);
                }
                Err(RaftError::Timeout { after: patience })
            }
        }
    }

    /// Lifts the lease of the leader that this replica follows, so that another one may be elected at once. Only on hard
    /// evidence that the leader's process is gone.
    pub(crate) async fn lift_lease(&self) -> Result<(), RaftError> {
        let raft = self.running()?;
        let vote = raft.with_raft_state(|state| *state.vote_ref()).await;
        let vote: Vote = vote.map_err(|error| self.fatal(&error))?;
        // Naming nobody as the successor only lifts the lease.
        let request = TransferLeaderRequest::new(vote, u64::MAX, None::<LogId>);
        raft.handle_transfer_leader(request)
            .await
            .map_err(|error| self.fatal(&error))?
            .ok();
        Ok(())
    }

    /// Stands for election now. A witness never does.
    pub(crate) async fn elect(&self) -> Result<(), RaftError> {
        if self.me().is_witness() {
            return Ok(());
        }
        self.running()?
            .trigger()
            .elect(true)
            .await
            .map_err(|error| self.fatal(&error))
    }

    /// A connection to `replica`'s broker has come or gone.
    pub(crate) async fn peer_changed(&self, broker: crate::types::BrokerId, state: PeerState) {
        let (is_leader, theirs) = {
            let status = self.inner.replica.status.borrow();
            let theirs: Vec<u64> = status
                .voters
                .union(&status.learners)
                .filter(|id| id.broker() == broker)
                .map(|id| id.as_u64())
                .collect();
            (status.role == Role::Leader, theirs)
        };
        if !is_leader || theirs.is_empty() {
            return;
        }
        self.inner.replica.progress_changed();
        if state == PeerState::Up
            && let Some(raft) = self.raft()
        {
            // An instance that has stopped has nothing to resume.
            raft.trigger().reset_backoff(theirs).await.ok();
        }
    }
}

fn is_member(raft: &Raft, replica: ReplicaId) -> bool {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    metrics
        .membership_config
        .get_node(&replica.as_u64())
        .is_some()
}
