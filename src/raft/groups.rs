//! All groups of one broker: started, stopped, found, and handed their messages.
//!
//! Owns the map of running groups and the tasks that serve them all: news of peers, failover, the store's failure.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use openraft::raft::{TransferLeaderRequest, VoteRequest};
use tokio::sync::broadcast::error::RecvError;

use super::context::Context;
use super::group::Group;
use super::inbound::{self, Inbound, refuse};
use super::replica::{Replica, lock};
use super::type_config::{Raft, Vote, log_id};
use super::wire::{AppendAnswer, Refusal, Request, Response, Route};
use super::{RaftConfig, RaftError, StateMachine, failover, heartbeat};
use crate::net::{Message, Net, Origin, PeerState, Reply};
use crate::runtime::Tasks;
use crate::storage::{Damage, Store};
use crate::types::{BrokerId, GroupId, ReplicaId, decode};

/// Starts, stops and deletions of different groups that can go on at the same time.
const LIFECYCLES: usize = 64;

/// Bytes waiting for the disk above which appends of other replicas are refused until it keeps up: the store fails at twice
/// as many.
const BACKLOG_BYTES_MAX: u64 = 256 << 20;

/// All groups of one broker: start, stop, find, and hand them their messages. Cheap to clone.
#[derive(Clone)]
pub struct Groups {
    inner: Arc<Inner>,
}

struct Inner {
    broker: BrokerId,
    store: Store,
    context: Arc<Context>,
    tasks: Tasks,
    inbound: Inbound,
    running: Mutex<BTreeMap<GroupId, Group>>,
    /// Starting, stopping and deleting a group exclude each other.
    lifecycles: Vec<tokio::sync::Mutex<()>>,
}

impl fmt::Debug for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Groups")
            .field("broker", &self.inner.broker)
            .finish_non_exhaustive()
    }
}

impl Groups {
    /// No group yet. Spawns the shared tasks: heartbeat batching, failover on news of `net.events()`.
    ///
    /// # Panics
    /// When the timing of `config` contradicts itself: an election timeout must be longer than a heartbeat, the longest
    /// longer than the shortest.
    #[allow(clippy::needless_pass_by_value)] // handles are given away, as everywhere
    pub fn new(broker: BrokerId, store: Store, net: Net, config: RaftConfig, tasks: Tasks) -> Self {
        let tasks = tasks.child();
        let inflight = config.append_inflight_max;
        let inner = Inner {
            broker,
            store,
            context: Arc::new(Context::new(net, config, tasks.clone())),
            inbound: Inbound::new(tasks.clone(), inflight),
            tasks,
            running: Mutex::new(BTreeMap::new()),
            lifecycles: (0..LIFECYCLES)
                .map(|_| tokio::sync::Mutex::new(()))
                .collect(),
        };
        let groups = Self {
            inner: Arc::new(inner),
        };
        groups.inner.tasks.spawn(groups.clone().follow_peers());
        groups.inner.tasks.spawn(groups.clone().follow_store());
        groups
    }

    pub(crate) fn config(&self) -> &RaftConfig {
        &self.inner.context.config
    }

    pub(crate) fn net(&self) -> &Net {
        &self.inner.context.net
    }

    pub(crate) fn inbound(&self) -> &Inbound {
        &self.inner.inbound
    }

    pub(crate) fn peer_state(&self, broker: BrokerId) -> PeerState {
        self.net().peer_state(broker)
    }

    pub(crate) fn all(&self) -> Vec<Group> {
        lock(&self.inner.running).values().cloned().collect()
    }

    /// Brings news of peers to the groups.
    async fn follow_peers(self) {
        let mut events = self.net().events();
        loop {
            let changed = match events.recv().await {
                Ok(event) => vec![event.broker],
                // The state of every peer is known besides the news; look at all of them.
                Err(RecvError::Lagged(_)) => self.peers(),
                Err(RecvError::Closed) => return,
            };
            for broker in changed {
                let state = self.peer_state(broker);
                if state == PeerState::Gone {
                    self.inner.tasks.spawn(failover::run(self.clone(), broker));
                }
                let (groups, patience) = (self.all(), self.config().rpc_timeout);
                self.inner.tasks.spawn(async move {
                    for group in groups {
                        // One that is stuck keeps the news from no other.
                        let told = group.peer_changed(broker, state);
                        tokio::time::timeout(patience, told).await.ok();
                    }
                });
            }
        }
    }

    /// The brokers that hold other replicas of the groups here.
    fn peers(&self) -> Vec<BrokerId> {
        let mut peers = std::collections::BTreeSet::new();
        for group in self.all() {
            let status = group.replica().status.borrow();
            peers.extend(status.voters.union(&status.learners).map(|id| id.broker()));
        }
        peers.remove(&self.inner.broker);
        peers.into_iter().collect()
    }

    /// Stops every group when the store has failed.
    async fn follow_store(self) {
        let reason = self.inner.store.failed().await.to_string();
        for group in self.all() {
            group.store_failed(&reason).await;
        }
    }

    async fn lifecycle(&self, id: GroupId) -> tokio::sync::MutexGuard<'_, ()> {
        let place = usize::try_from(id.0).unwrap_or(usize::MAX) % LIFECYCLES;
        match self.inner.lifecycles.get(place) {
            Some(lifecycle) => lifecycle.lock().await,
            #[allow(clippy::unreachable)] // `place` is below the number of them
            None => unreachable!("{place} of {LIFECYCLES} lifecycles"),
        }
    }

    /// Starts replica `me` of `id`: restores `machine` from the newest checkpoint and joins the group when others call on
    /// it. Returns the running group when it is this replica already. Fails when the store holds this group under another
    /// replica id: it must be deleted first.
    pub async fn start(
        &self,
        id: GroupId,
        me: ReplicaId,
        machine: Box<dyn StateMachine>,
    ) -> Result<Group, RaftError> {
        let _lifecycle = self.lifecycle(id).await;
        if let Some(group) = self.get(id) {
            if group.me() == me {
                return Ok(group);
            }
            let reason = format!("group {id} runs here as {}", group.me());
            return Err(RaftError::Membership { reason });
        }
        if self.inner.tasks.is_stopped() {
            return Err(RaftError::Stopped {
                reason: "the broker is shutting down".to_owned(),
            });
        }
        let store = self.inner.store.group(id, me)?;
        let replica = Replica::new(id, me, store, machine);
        let group = Group::start(Arc::clone(&self.inner.context), replica).await?;
        lock(&self.inner.running).insert(id, group.clone());
        Ok(group)
    }

    /// The running group `id`.
    pub fn get(&self, id: GroupId) -> Option<Group> {
        lock(&self.inner.running).get(&id).cloned()
    }

    /// The groups running here.
    pub fn running(&self) -> Vec<GroupId> {
        lock(&self.inner.running).keys().copied().collect()
    }

    /// The groups in the store with the replica each belongs to, running or not.
    pub fn stored(&self) -> Vec<(GroupId, ReplicaId)> {
        self.inner.store.groups()
    }

    /// The damage found in the log of `id`, which cannot be started any more.
    pub fn damage(&self, id: GroupId) -> Option<Damage> {
        self.inner.store.damage(id)
    }

    /// Stops a group's local replica; its data stays.
    pub async fn stop(&self, id: GroupId) {
        let _lifecycle = self.lifecycle(id).await;
        self.take_down(id, "it was stopped").await;
    }

    /// Stops a group's local replica and deletes its data durably; late messages to it are refused.
    pub async fn delete(&self, id: GroupId) -> Result<(), RaftError> {
        let _lifecycle = self.lifecycle(id).await;
        self.take_down(id, "it was deleted").await;
        Ok(self.inner.store.remove_group(id).await?)
    }

    async fn take_down(&self, id: GroupId, reason: &str) {
        let group = lock(&self.inner.running).remove(&id);
        if let Some(group) = group {
            self.inner.inbound.group_stopped(id);
            group.stop(reason).await;
        }
    }

    /// Stops all groups.
    pub async fn shutdown(&self) {
        // No new group from here on.
        self.inner.tasks.stop();
        let stops = self.running().into_iter().map(|id| self.stop(id));
        futures_util::future::join_all(stops).await;
        self.inner.tasks.shutdown().await;
    }

    /// A connection ended: what it brought is still processed, then its streams end.
    pub fn connection_closed(&self, origin: &Origin) {
        self.inner.inbound.connection_closed(origin.connection);
    }

    /// The group that a message is for, when the replica that it names runs here.
    fn find(&self, route: Route) -> Result<Group, Refusal> {
        let group = self.get(route.group).ok_or(Refusal::NoSuchGroup)?;
        if group.me() == route.to {
            Ok(group)
        } else {
            Err(Refusal::OtherReplica)
        }
    }

    fn find_raft(&self, route: Route) -> Result<Raft, Refusal> {
        self.find(route)?.raft().ok_or(Refusal::Stopped)
    }

    /// Takes a message of another replica, in order of arrival; never waits.
    pub fn handle(&self, origin: &Origin, message: Message, reply: Reply) {
        let Ok(request) = decode::<Request>(&message.header) else {
            tracing::warn!(remote = %origin.remote, "a raft message that cannot be read");
            refuse(reply, Refusal::Malformed);
            return;
        };
        let from = origin.broker.map(|(broker, _)| broker);
        // A replica speaks through its own broker only.
        if from.is_none() || !request.comes_from(from) {
            refuse(reply, Refusal::Malformed);
            return;
        }
        if let Err((reply, refusal)) = self.dispatch(origin, request, message, reply) {
            refuse(reply, refusal);
        }
    }

    fn dispatch(
        &self,
        origin: &Origin,
        request: Request,
        message: Message,
        reply: Reply,
    ) -> Result<(), (Reply, Refusal)> {
        let tasks = &self.inner.tasks;
        match request {
            Request::Append(..) if self.inner.store.backlog() > BACKLOG_BYTES_MAX => {
                Err((reply, Refusal::Busy))
            }
            Request::Append(route, head) => {
                let group = match self.find(route) {
                    Ok(group) => group,
                    Err(refusal) => {
                        let answer = Response::Append(AppendAnswer::Refused(refusal));
                        reply.send(answer.message());
                        return Ok(());
                    }
                };
                match head.request(message.single_body()) {
                    Ok(request) => {
                        let inbound = &self.inner.inbound;
                        inbound.append(origin.connection, route, &group, request, reply);
                        Ok(())
                    }
                    Err(error) => {
                        tracing::warn!(remote = %origin.remote, %error, "a malformed append");
                        Err((reply, Refusal::Malformed))
                    }
                }
            }
            Request::Vote {
                route,
                vote,
                last,
                transfer,
                pre,
            } => {
                let raft = match self.find_raft(route) {
                    Ok(raft) => raft,
                    Err(refusal) => return Err((reply, refusal)),
                };
                let mut request = VoteRequest::new(Vote::from(vote), last.map(log_id));
                request.leadership_transfer = transfer;
                tasks.spawn(inbound::vote(raft, request, pre, reply));
                Ok(())
            }
            Request::Transfer {
                route,
                leader,
                successor,
                last,
            } => {
                if successor == route.to && successor.is_witness() {
                    return Err((reply, Refusal::Witness));
                }
                let raft = match self.find_raft(route) {
                    Ok(raft) => raft,
                    Err(refusal) => return Err((reply, refusal)),
                };
                let leader = Vote::from(leader);
                let request =
                    TransferLeaderRequest::new(leader, successor.as_u64(), last.map(log_id));
                tasks.spawn(inbound::transfer(raft, request, reply));
                Ok(())
            }
            Request::Snapshot(route, piece) => {
                let raft = match self.find_raft(route) {
                    Ok(raft) => raft,
                    Err(refusal) => return Err((reply, refusal)),
                };
                let body = message.single_body();
                match self
                    .inner
                    .inbound
                    .snapshot_piece(origin.connection, route, &piece, &body)
                {
                    Ok(Some((vote, snapshot))) => {
                        tasks.spawn(inbound::install(raft, vote, snapshot, reply));
                        Ok(())
                    }
                    Ok(None) => {
                        reply.send(Response::SnapshotKept.message());
                        Ok(())
                    }
                    Err(refusal) => Err((reply, refusal)),
                }
            }
            Request::Heartbeats(heartbeats) => {
                let groups = heartbeats
                    .iter()
                    .map(|beat| self.find(beat.route))
                    .collect();
                // Soon enough for the others in the frame, whose workers give up after an interval.
                let patience = self.config().heartbeat_interval / 2;
                tasks.spawn(heartbeat::answer(heartbeats, groups, reply, patience));
                Ok(())
            }
            Request::Survivors { gone, groups } => {
                tasks.spawn(failover::answer(self.clone(), gone, groups, reply));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::time::timeout;

    use super::*;
    use crate::net::{Identity, NetConfig};
    use crate::storage::{EntryKind, LogEntry, MemDisk, StoreConfig};
    use crate::testkit::eventually;
    use crate::types::{DecodeError, EntryId, LeaderEpoch, LogIndex, ReplicaKind};

    const PATIENCE: Duration = Duration::from_secs(30);

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

    fn blank(index: u64) -> LogEntry {
        LogEntry {
            id: EntryId {
                epoch: LeaderEpoch(0),
                index: LogIndex(index),
            },
            kind: EntryKind::Blank,
            payload: Bytes::new(),
        }
    }

    /// Goal: a replica that is started or rebuilt in a running process does not take for durable what its earlier instance
    /// only queued: it would confirm it to a leader, and lose it with the power. Method: an entry queued behind syncs that
    /// do not come back; the replica starts when they do, and not before. Meanwhile the backlog is seen.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_replica_does_not_start_on_entries_that_are_not_durable() {
        let disk = MemDisk::new();
        let config = StoreConfig {
            directory: "memory".into(),
            segment_bytes: 1 << 20,
            cache_bytes: 1 << 20,
            catalog_cache_bytes: 1 << 20,
            catalog_sync_bytes: 1 << 20,
            commit_bytes_max: 1 << 20,
            reserve_bytes: 0,
        };
        let store = Store::open_in_memory(&disk, &config, BrokerId(1)).unwrap();
        let directory = store.identity();
        let identity = Identity {
            broker: BrokerId(1),
            incarnation: directory.incarnation,
            cluster: None,
            boot: directory.boot,
            position: directory.position,
        };
        let tasks = Tasks::new();
        let net = Net::bind("127.0.0.1:0", identity, NetConfig::default(), tasks.clone());
        let net = net.await.unwrap();
        let (broker, raft) = (BrokerId(1), RaftConfig::default());
        let groups = Groups::new(broker, store.clone(), net, raft, tasks.clone());
        let me = ReplicaId::new(broker, ReplicaKind::Data, 1);
        let log = store.group(GroupId(1), me).unwrap();
        disk.hold_sync();
        log.append(vec![blank(0)], Box::new(|| {})).unwrap();
        assert!(
            eventually(PATIENCE, async || store.backlog() == 0).await,
            "not taken"
        );
        log.append(vec![blank(1)], Box::new(|| {})).unwrap();
        assert!(store.backlog() > 0, "one is being written, one waits");
        let start = groups.start(GroupId(1), me, Box::new(Nothing));
        tokio::pin!(start);
        let early = timeout(Duration::from_millis(300), &mut start).await;
        assert!(
            early.is_err(),
            "started, and durable is {:?}",
            log.flushed()
        );
        assert_eq!(log.flushed(), None);
        disk.heal();
        timeout(PATIENCE, start).await.unwrap().unwrap();
        assert_eq!(log.flushed(), Some(blank(1).id));
        assert_eq!(store.backlog(), 0);
        groups.shutdown().await;
        tasks.shutdown().await;
    }
}
