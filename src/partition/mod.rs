//! One replica of one partition: serves while it leads, and says who does while it follows.
//!
//! Owns the role gate, and hands what it admits to the parts: `propose` orders and appends, `read` finds and fetches,
//! `lead` watches the group and decides what may be seen and acknowledged. Knows no other partition, no controller and no
//! client protocol.
//!
//! Tasks of a data replica: watcher, proposer, retention; of a witness: watcher and retention. Locks: the state machine's state, the
//! settings, the parked acknowledgements; each for a moment, never across an await, never two at once.

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod isr;
mod lead;
#[cfg(any(test, feature = "testkit"))]
mod local;
mod producer_table;
mod propose;
mod read;
mod retain;
mod state_machine;

#[cfg(any(test, feature = "testkit"))]
pub use local::LocalReplica;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::api::{Appended, OffsetSpec, PartitionReport, PartitionView, ReplicaView, Response};
use crate::config::TopicConfig;
use crate::raft::{Group, Groups, RaftError, StateMachine};
use crate::runtime::Tasks;
use crate::types::{
    Acks, Assignment, BrokerId, Endpoint, Error, GroupId, LeaderEpoch, Offset, ReplicaId,
    ReplicaKind, TopicPartition, decode,
};

use isr::View;
use propose::Queued;
use state_machine::{Outcome, PartitionMachine, SharedLog, WitnessMachine, trim_command};

/// Requests that may wait in one partition to be proposed, beside the bound on their bytes.
const QUEUE_REQUESTS_MAX: usize = 8_192;

/// Limits of one partition.
#[derive(Debug, Clone, Copy)]
pub struct PartitionLimits {
    /// Bytes of produce requests that wait or are being appended.
    pub inflight_bytes_max: usize,
    /// A follower that has not been level with the leader for this long leaves the ISR.
    pub lag_time_max: Duration,
    /// Bytes of record batches in one Raft entry, and so in one produce request; at least the largest legal batch.
    pub entry_bytes_max: usize,
    /// Raft entries of this partition between proposal and commit.
    pub inflight_entries_max: usize,
    /// An entry below so many bytes is a small one.
    pub small_entry_bytes: usize,
    /// Raft entries between proposal and commit behind which a small one may follow.
    pub inflight_small_entries_max: usize,
}

impl Default for PartitionLimits {
    fn default() -> Self {
        Self {
            inflight_bytes_max: 32 << 20,
            lag_time_max: Duration::from_secs(10),
            // A mebibyte beside the largest batch that a topic can allow.
            entry_bytes_max: (1 << 20) + (16 << 20),
            inflight_entries_max: 8,
            small_entry_bytes: 32 << 10,
            inflight_small_entries_max: 1,
        }
    }
}

/// Where a broker is reached, when known.
pub type Endpoints = Arc<dyn Fn(BrokerId) -> Option<Endpoint> + Send + Sync>;
/// Whether the disk has room for more records.
pub type Room = Arc<dyn Fn() -> Result<(), Error> + Send + Sync>;

/// What a partition's replica is started with.
#[derive(Clone)]
pub struct PartitionSpec {
    /// The partition.
    pub partition: TopicPartition,
    /// Its group.
    pub group: GroupId,
    /// The local replica.
    pub me: ReplicaId,
    /// All replicas.
    pub assignment: Assignment,
    /// Data replicas that are not assigned any more but count as long as they vote: they are being moved away.
    pub leaving: BTreeSet<ReplicaId>,
    /// The topic's configuration.
    pub config: TopicConfig,
    /// Limits.
    pub limits: PartitionLimits,
    /// Where brokers are reached, for the hint in [`Error::NotLeader`]. Called often; must not block.
    pub endpoints: Endpoints,
    /// Asked before every append; its error is the answer. Called often; must not block.
    pub room: Room,
}

impl fmt::Debug for PartitionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PartitionSpec")
            .field("partition", &self.partition)
            .field("group", &self.group)
            .field("me", &self.me)
            .finish_non_exhaustive()
    }
}

/// What the local replica may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Standing {
    /// Follows, or waits for a leader.
    #[default]
    Follows,
    /// Leads, but has not applied everything acknowledged before.
    Opening,
    /// Leads and serves.
    Serves,
    /// Has stopped.
    Stopped,
}

/// The role gate, as published by the watcher.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Gate {
    standing: Standing,
    epoch: LeaderEpoch,
    leader: Option<ReplicaId>,
    /// The offset behind the last record that can be read; meaningful while it serves.
    high_watermark: Offset,
    /// Brokers in sync, the leader included; meaningful while it leads.
    isr: Vec<BrokerId>,
    /// What is left of the voters when that is too few to commit anything; meaningful while it serves.
    short: Option<isr::Reach>,
}

/// What may change while a partition runs.
#[derive(Debug, Clone)]
struct Settings {
    assignment: Assignment,
    leaving: BTreeSet<ReplicaId>,
    config: TopicConfig,
}

struct Inner {
    partition: TopicPartition,
    me: ReplicaId,
    limits: PartitionLimits,
    endpoints: Endpoints,
    room: Room,
    settings: Mutex<Settings>,
    settings_changed: watch::Sender<()>,
    groups: Groups,
    group: Group,
    log: SharedLog,
    gate: watch::Sender<Gate>,
    queue: mpsc::Sender<Queued>,
    permits: Arc<Semaphore>,
    parked: Mutex<propose::Parked>,
    reports: watch::Sender<u64>,
    tasks: Tasks,
}

impl Inner {
    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn min_in_sync(&self) -> u32 {
        self.settings().config.min_insync_replicas
    }

    /// The epoch in which this replica serves, or why it does not.
    fn serving(&self, gate: &Gate) -> Result<LeaderEpoch, Error> {
        let partition = self.partition.clone();
        match gate.standing {
            Standing::Serves => Ok(gate.epoch),
            Standing::Stopped => Err(Error::ShuttingDown),
            Standing::Opening => Err(Error::LeaderUnavailable { partition }),
            Standing::Follows => match gate.leader.filter(|leader| *leader != self.me) {
                Some(leader) => {
                    let leader = (self.endpoints)(leader.broker());
                    Err(Error::NotLeader {
                        partition,
                        broker: self.me.broker(),
                        leader,
                    })
                }
                None => Err(Error::LeaderUnavailable { partition }),
            },
        }
    }

    /// What the leader knows now, for the deciders of [`isr`].
    fn with_view<T>(&self, decide: impl FnOnce(&View<'_>) -> T) -> T {
        let (epoch, last, voters, is_joint) = {
            let status = self.group.status();
            let status = status.borrow();
            let last = status.last.map(|entry| entry.index);
            (status.epoch, last, status.voters.clone(), status.is_joint)
        };
        let (assignment, leaving) = {
            let settings = self.settings();
            (settings.assignment.clone(), settings.leaving.clone())
        };
        let progress = self.group.progress();
        decide(&View {
            me: self.me,
            epoch,
            assignment: &assignment,
            leaving: &leaving,
            voters: &voters,
            is_joint,
            last,
            progress: &progress,
        })
    }

    /// The caller's error for a failed proposal (`was_proposed`) or question.
    fn error_of(&self, error: &RaftError, was_proposed: bool) -> Error {
        let partition = self.partition.clone();
        match error {
            RaftError::NotLeader { leader } => Error::NotLeader {
                partition,
                broker: self.me.broker(),
                leader: leader.and_then(|leader| (self.endpoints)(leader.broker())),
            },
            RaftError::NoSuchGroup => Error::NotLeader {
                partition,
                broker: self.me.broker(),
                leader: None,
            },
            RaftError::NoQuorum => Error::LeaderUnavailable { partition },
            RaftError::Timeout { after } => Error::Timeout {
                after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
            },
            RaftError::Stopped { .. } if !was_proposed => Error::ShuttingDown,
            RaftError::Lost | RaftError::Stopped { .. } => Error::LeadershipLost { partition },
            other => Error::Failed {
                reason: other.to_string(),
            },
        }
    }
}

/// The local replica of one partition. Cheap to clone. Its tasks run until [`Partition::stop`], or until the tasks it was started
/// with are stopped.
#[derive(Clone)]
pub struct Partition(Arc<Inner>);

impl fmt::Debug for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Partition")
            .field("partition", &self.0.partition)
            .field("me", &self.0.me)
            .field("gate", &*self.0.gate.borrow())
            .finish_non_exhaustive()
    }
}

impl Partition {
    /// Starts the local replica: its state machine begins at the newest checkpoint in the store. A witness is started by the same
    /// call and serves nothing. Whoever creates the partition initializes its group, see [`Partition::group`].
    pub async fn start(spec: PartitionSpec, groups: &Groups, tasks: &Tasks) -> Result<Self, Error> {
        let log = SharedLog::default();
        let machine: Box<dyn StateMachine> = match spec.me.kind() {
            ReplicaKind::Witness => Box::new(WitnessMachine),
            ReplicaKind::Data => Box::new(PartitionMachine::new(log.clone())),
        };
        let failed = |error: RaftError| Error::Failed {
            reason: error.to_string(),
        };
        let group = groups
            .start(spec.group, spec.me, machine)
            .await
            .map_err(failed)?;
        let (queue, requests) = mpsc::channel(QUEUE_REQUESTS_MAX);
        let inner = Arc::new(Inner {
            partition: spec.partition,
            me: spec.me,
            limits: spec.limits,
            endpoints: spec.endpoints,
            room: spec.room,
            settings: Mutex::new(Settings {
                assignment: spec.assignment,
                leaving: spec.leaving,
                config: spec.config,
            }),
            settings_changed: watch::Sender::default(),
            groups: groups.clone(),
            group,
            log,
            gate: watch::Sender::default(),
            queue,
            permits: Arc::new(Semaphore::new(
                spec.limits.inflight_bytes_max.min(Semaphore::MAX_PERMITS),
            )),
            parked: Mutex::default(),
            reports: watch::Sender::default(),
            tasks: tasks.child(),
        });
        inner.tasks.spawn(lead::run(Arc::clone(&inner)));
        match spec.me.kind() {
            ReplicaKind::Witness => {
                inner.tasks.spawn(retain::run_witness(Arc::clone(&inner)));
            }
            ReplicaKind::Data => {
                inner
                    .tasks
                    .spawn(propose::run(Arc::clone(&inner), requests));
                inner.tasks.spawn(retain::run(Arc::clone(&inner)));
            }
        }
        Ok(Self(inner))
    }

    /// The partition.
    pub fn id(&self) -> &TopicPartition {
        &self.0.partition
    }

    /// The local replica.
    pub fn me(&self) -> ReplicaId {
        self.0.me
    }

    /// Whether this replica leads and serves.
    pub fn is_leader(&self) -> bool {
        self.0.gate.borrow().standing == Standing::Serves
    }

    /// The broker that leads, when known.
    pub fn leader_broker(&self) -> Option<BrokerId> {
        self.0.gate.borrow().leader.map(ReplicaId::broker)
    }

    /// The partition's group: for membership, leader transfer and initialization.
    pub fn group(&self) -> &Group {
        &self.0.group
    }

    /// Appends record batches, one or more back to back, at most `entry_bytes_max` together. Successive calls keep their order:
    /// everything that can refuse a request without knowing the log is done before the future is returned.
    ///
    /// The answer has one [`Appended`] per batch; none with [`Acks::None`]. When one batch of several is refused (fenced or out of
    /// order), the first refusal is the answer although the others were appended: retries recognise them.
    ///
    /// A request that was not proposed by its deadline is dropped and answered [`Error::Overloaded`]; later, the answer is
    /// [`Error::Timeout`], or [`Error::NotEnoughReplicasAfterAppend`] when it is committed and only copies are missing. Dropping
    /// the future takes nothing back.
    pub fn produce(
        &self,
        records: Bytes,
        acks: Acks,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Vec<Appended>, Error>> {
        match propose::enqueue(&self.0, records, acks) {
            Err(error) => Box::pin(std::future::ready(Err(error))),
            Ok(None) => Box::pin(std::future::ready(Ok(Vec::new()))),
            Ok(Some(ticket)) => Box::pin(ticket.wait(deadline)),
        }
    }

    /// Reads whole batches from the one that holds `offset` on, up to the high watermark, at most `max_bytes` but at least one
    /// batch when there is one. Waits up to `max_wait` for `min_bytes`. Cancel safe. Answers [`Response::Fetched`].
    pub async fn fetch(
        &self,
        offset: Offset,
        max_bytes: u32,
        min_bytes: u32,
        max_wait: Duration,
    ) -> Result<Response, Error> {
        read::fetch(&self.0, offset, max_bytes, min_bytes, max_wait).await
    }

    /// Finds an offset, by `deadline`. Cancel safe. Answers [`Response::FoundOffset`].
    pub async fn find_offset(
        &self,
        spec: OffsetSpec,
        deadline: Instant,
    ) -> Result<Response, Error> {
        read::find_offset(&self.0, spec, deadline).await
    }

    /// Moves the log start to `offset` on all replicas; returns where it is then, which is further when it was already. Dropping
    /// the future may leave it done or undone.
    pub async fn trim(&self, offset: Offset, deadline: Instant) -> Result<Offset, Error> {
        let inner = &self.0;
        let gate = inner.gate.borrow().clone();
        inner.serving(&gate)?;
        if offset > gate.high_watermark {
            let start = inner.log.lock().log_start;
            let (partition, end) = (inner.partition.clone(), gate.high_watermark);
            return Err(Error::OffsetOutOfRange {
                partition,
                requested: offset,
                start,
                end,
            });
        }
        let after = deadline.saturating_duration_since(Instant::now());
        let applied = async {
            let proposal = inner.group.propose(trim_command(offset)).await;
            let proposal = proposal.map_err(|error| inner.error_of(&error, true))?;
            proposal
                .applied()
                .await
                .map_err(|error| inner.error_of(&error, true))
        };
        let Ok(applied) = tokio::time::timeout_at(deadline, applied).await else {
            return Err(inner.error_of(&RaftError::Timeout { after }, true));
        };
        match decode::<Outcome>(&applied?.1) {
            Ok(Outcome::Trimmed(log_start)) => Ok(log_start),
            other => Err(Error::Failed {
                reason: format!("a trim was answered with {other:?}"),
            }),
        }
    }

    /// What this replica knows of the partition. While it does not lead: who does, in which epoch, and the assignment.
    pub fn view(&self) -> PartitionView {
        let inner = &self.0;
        let gate = inner.gate.borrow().clone();
        let leads = matches!(gate.standing, Standing::Opening | Standing::Serves);
        let serves = gate.standing == Standing::Serves;
        let (log_start, next_offset) = {
            let state = inner.log.lock();
            (state.log_start, state.next_offset)
        };
        let replicas = inner.with_view(|view| {
            let replica = |replica: &ReplicaId| ReplicaView {
                broker: replica.broker(),
                lag: if leads { view.lag(*replica) } else { None },
                in_sync: leads && gate.isr.contains(&replica.broker()),
            };
            let replicas = view.assignment.replicas.iter().chain(view.leaving);
            replicas.map(replica).collect()
        });
        PartitionView {
            partition: inner.partition.partition,
            leader: gate.leader.map(ReplicaId::broker),
            epoch: gate.epoch,
            replicas,
            adding: Vec::new(), // the controller's to say
            removing: Vec::new(),
            reassigning: false,
            isr: if leads { gate.isr.clone() } else { Vec::new() },
            witness: inner.settings().assignment.witness.map(ReplicaId::broker),
            start_offset: serves.then_some(log_start),
            high_watermark: serves.then_some(gate.high_watermark),
            end_offset: serves.then_some(next_offset),
        }
    }

    /// What the controller is told; `None` while this replica does not serve.
    pub fn report(&self) -> Option<PartitionReport> {
        let gate = self.0.gate.borrow();
        (gate.standing == Standing::Serves).then(|| PartitionReport {
            partition: self.0.partition.clone(),
            epoch: gate.epoch,
            isr: gate.isr.clone(),
            voters: Vec::new(), // whoever changes the members fills them in
            change: 0,
        })
    }

    /// Changes whenever [`Partition::report`] does.
    pub fn report_changed(&self) -> watch::Receiver<u64> {
        self.0.reports.subscribe()
    }

    /// Takes a new assignment, and the data replicas that are being moved away.
    pub fn set_assignment(&self, assignment: Assignment, leaving: BTreeSet<ReplicaId>) {
        {
            let mut settings = self.0.settings();
            settings.assignment = assignment;
            settings.leaving = leaving;
        }
        self.0.settings_changed.send_replace(());
    }

    /// Takes a new configuration.
    pub fn set_config(&self, config: TopicConfig) {
        self.0.settings().config = config;
        self.0.settings_changed.send_replace(());
    }

    /// Stops serving, the tasks and the group's local replica; its data stays. Requests under way are answered.
    pub async fn stop(&self) {
        lead::close(&self.0, Standing::Stopped, None);
        self.0.tasks.shutdown().await;
        self.0.groups.stop(self.0.group.id()).await;
    }
}
