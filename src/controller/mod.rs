//! The controller: what the cluster should be. Its state is group 0's state machine; the leader of group 0 decides.
//!
//! Owns this broker's handle to group 0 and the loop that is active while its local replica leads: it notes which brokers are
//! heard, keeps group 0's members in step with the registered brokers, and hands leaderships back to preferred leaders. What
//! is decided is planned by pure functions ([`placement`], [`balancer`], [`members`], [`liveness`]). Runs no replica: that is
//! the reconciler's business on every broker.
//!
//! Tasks: the leader's loop, and the purge of the local log. Lock: topics being created, for a moment, never across an await.

pub mod balancer;
pub mod drain;
mod image;
mod lead;
pub mod liveness;
mod machine;
pub mod members;
pub mod metadata;
pub mod placement;
pub mod reassignment;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::TopicConfig;
use crate::raft::{Group, RaftError};
use crate::runtime::Tasks;
use crate::types::{
    BrokerId, Error, LeaderEpoch, LogIndex, ReplicaId, TopicName, TopicPartition, decode,
};

pub use machine::{MetadataMachine, machine};
pub use metadata::{Answer, ClusterMetadata, Command};

use balancer::LeaderMove;
use drain::{DrainPlan, plan_drain};
use metadata::PlannedPartition;
use placement::{Loads, TopicShape, plan_topic};
use reassignment::{candidates, plan_move};

/// Hands leadership of a partition to a replica: asks the broker that leads, given second, wherever it is.
pub type LeaderMover = Arc<
    dyn Fn(TopicPartition, BrokerId, ReplicaId) -> BoxFuture<'static, Result<(), Error>>
        + Send
        + Sync,
>;

/// Timing and limits of the controller.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// Brokers preferred as voters of group 0.
    pub bootstrap: Vec<BrokerId>,
    /// Most voters of group 0.
    pub voters_max: usize,
    /// Longest election timeout; a broker not heard for three of them counts as dead.
    pub election_timeout_max: Duration,
    /// How long a preferred leader must have been alive and in sync before it gets its leadership back.
    pub preferred_leader_delay: Duration,
    /// Leaderships handed over at once; also partitions that are moved at once off a broker that is being emptied.
    pub moves_max: usize,
    /// How long a partition is left alone after a failed handover; longer after each further one, up to thirty times as long.
    pub move_mute: Duration,
    /// Longest wait for a command to be applied.
    pub submit_timeout: Duration,
    /// Between two looks of the leader at the cluster.
    pub tick: Duration,
    /// Log entries kept behind the last applied one, for members that are a little behind.
    pub entries_kept: u64,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            bootstrap: Vec::new(),
            voters_max: 5,
            election_timeout_max: Duration::from_secs(1),
            preferred_leader_delay: Duration::from_secs(1),
            moves_max: 8,
            move_mute: Duration::from_secs(10),
            submit_timeout: Duration::from_secs(10),
            tick: Duration::from_millis(100),
            entries_kept: 2_000,
        }
    }
}

/// Topics that are planned but not in the image yet: their replicas count when the next one is placed.
#[derive(Debug, Default)]
struct Creations {
    last: u64,
    planned: BTreeMap<u64, Vec<PlannedPartition>>,
}

struct Inner {
    group: Group,
    images: watch::Receiver<Arc<ClusterMetadata>>,
    config: ControllerConfig,
    mover: OnceLock<LeaderMover>,
    creations: Mutex<Creations>,
}

impl Inner {
    fn creations(&self) -> MutexGuard<'_, Creations> {
        self.creations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// This broker's handle to the controller. Cheap to clone.
#[derive(Clone)]
pub struct Controller(Arc<Inner>);

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("me", &self.0.group.me())
            .finish_non_exhaustive()
    }
}

/// Takes a planned topic out of [`Creations`] when it is applied, refused, or given up.
struct Creation<'a> {
    inner: &'a Inner,
    number: u64,
}

impl Drop for Creation<'_> {
    fn drop(&mut self) {
        self.inner.creations().planned.remove(&self.number);
    }
}

impl Controller {
    /// The controller over the local replica of group 0, started with [`machine`]'s state machine, and its image.
    pub fn new(
        group: Group,
        images: watch::Receiver<Arc<ClusterMetadata>>,
        config: ControllerConfig,
    ) -> Self {
        let (mover, creations) = (OnceLock::new(), Mutex::default());
        Self(Arc::new(Inner {
            group,
            images,
            config,
            mover,
            creations,
        }))
    }

    /// Starts deciding whenever the local replica leads, and purging its log. Call it once; `mover` is called while leading.
    pub fn run(&self, mover: LeaderMover, tasks: &Tasks) {
        if self.0.mover.set(mover).is_err() {
            tracing::warn!("the controller runs already");
            return;
        }
        tasks.spawn(lead::run(self.clone()));
        tasks.spawn(purge(self.clone()));
    }

    /// The cluster's metadata as this broker knows it; a little old on a broker that does not lead group 0.
    pub fn metadata(&self) -> watch::Receiver<Arc<ClusterMetadata>> {
        self.0.images.clone()
    }

    /// The broker that leads group 0, when known.
    pub fn leader_broker(&self) -> Option<BrokerId> {
        self.0.group.status().borrow().leader.map(ReplicaId::broker)
    }

    /// When this broker last knew group 0 to be led, and so its image to be no older than a moment; `None`: not since it was started.
    pub fn led_at(&self) -> Option<Instant> {
        self.0.group.led_at()
    }

    /// Waits until the leader of group 0 is known, and is not on `broker`, as far as this broker knows.
    pub async fn led_elsewhere(&self, broker: Option<BrokerId>) {
        let mut status = self.0.group.status();
        let led = status.wait_for(|status| {
            let leader = status.leader.map(ReplicaId::broker);
            leader.is_some() && leader != broker
        });
        led.await.ok(); // the sender lives as long as the group's handle
    }

    /// Waits until the local image has everything that was applied anywhere before the question. On the leader only.
    pub async fn linearize(&self, timeout: Duration) -> Result<(), Error> {
        let asked = Instant::now();
        self.0
            .group
            .linearize(timeout)
            .await
            .map_err(|error| question_error(&error, asked))
    }

    /// Has `command` applied. On the leader only; elsewhere [`Error::ControllerUnavailable`], and nothing is done. Dropping the
    /// future may leave it done or undone.
    pub async fn submit(&self, command: Command) -> Result<Answer, Error> {
        let asked = Instant::now();
        let work = async {
            let bytes = command.to_bytes().into();
            let proposal = self.0.group.propose(bytes).await;
            let proposal = proposal.map_err(|error| proposal_error(&error, asked))?;
            let applied = proposal.applied().await;
            let (_, answer) = applied.map_err(|error| proposal_error(&error, asked))?;
            let answer = decode::<Result<Answer, Error>>(&answer);
            answer.map_err(|error| Error::Failed {
                reason: error.to_string(),
            })?
        };
        let applied = tokio::time::timeout(self.0.config.submit_timeout, work).await;
        applied.unwrap_or_else(|_| Err(timeout_error(asked)))
    }

    /// Plans and creates a topic; answers with what the operator should know. `assignment`, when not empty, names the brokers
    /// of each partition. On the leader only, as [`Controller::submit`].
    pub async fn create_topic(
        &self,
        name: TopicName,
        partitions: u32,
        replication_factor: u32,
        config: BTreeMap<String, String>,
        assignment: Vec<Vec<BrokerId>>,
    ) -> Result<Vec<String>, Error> {
        if !self.0.group.status().borrow().is_serving() {
            return Err(Error::ControllerUnavailable);
        }
        let image = self.0.images.borrow().clone();
        if image.has_topic(&name) {
            return Err(Error::TopicExists { topic: name });
        }
        let pinned = assignment.as_slice();
        let shape = TopicShape {
            partitions,
            replication_factor,
            pinned,
        };
        let (creation, planned, warnings) = self.plan(&image, shape)?;
        let settings = TopicConfig::parse(&config, replication_factor)?;
        let created = self
            .submit(Command::CreateTopic {
                name,
                config,
                settings,
                partitions: planned,
            })
            .await;
        drop(creation);
        created.map(|_| warnings)
    }

    /// Begins to move the replicas of `partition` to `replicas`, the preferred leader first, in the place of a move that is
    /// under way; or, with `None`, sends them back to where they were before it. Answers when that is decided, with what the
    /// operator should know. On the leader only, as [`Controller::submit`].
    pub async fn reassign(
        &self,
        partition: TopicPartition,
        replicas: Option<Vec<BrokerId>>,
    ) -> Result<Vec<String>, Error> {
        if !self.0.group.status().borrow().is_serving() {
            return Err(Error::ControllerUnavailable);
        }
        let Some(replicas) = replicas else {
            let cancelled = self.submit(Command::CancelReassignment { partition });
            return cancelled.await.map(|_| Vec::new());
        };
        let image = self.0.images.borrow().clone();
        let plan = plan_move(&image, &partition, &replicas)?;
        let target = plan.target;
        let begun = self.submit(Command::ReassignPartition { partition, target });
        begun.await.map(|_| plan.warnings)
    }

    /// Begins the next moves off `broker`, a few partitions at a time; answers with those begun, and with what is left. To be asked
    /// again until nothing is. On the leader only, as [`Controller::submit`].
    pub async fn drain(&self, broker: BrokerId) -> Result<DrainPlan, Error> {
        if !self.0.group.status().borrow().is_serving() {
            return Err(Error::ControllerUnavailable);
        }
        let image = self.0.images.borrow().clone();
        let plan = plan_drain(&image, broker, self.0.config.moves_max)?;
        for (partition, target) in plan.moves.iter().cloned() {
            self.submit(Command::ReassignPartition { partition, target })
                .await?;
        }
        Ok(plan)
    }

    /// Has a new replica made in the place of the damaged `replica`, whose last entry is of `epoch`; see
    /// [`Command::ReplaceDamaged`]. On the leader only, as [`Controller::submit`].
    pub async fn replace_damaged(
        &self,
        partition: TopicPartition,
        replica: ReplicaId,
        epoch: LeaderEpoch,
    ) -> Result<(), Error> {
        if !self.0.group.status().borrow().is_serving() {
            return Err(Error::ControllerUnavailable);
        }
        // What is refused is asked again and again: the log does not grow by it.
        let image = self.0.images.borrow().clone();
        image.check_damaged(&partition, replica, epoch)?;
        self.submit(Command::ReplaceDamaged {
            partition,
            replica,
            epoch,
        })
        .await
        .map(|_| ())
    }

    /// A plan that takes account of the topics being created, and is itself taken account of until the ticket is dropped.
    fn plan(
        &self,
        image: &ClusterMetadata,
        shape: TopicShape<'_>,
    ) -> Result<(Creation<'_>, Vec<PlannedPartition>, Vec<String>), Error> {
        let candidates = candidates(image);
        let mut loads = Loads::of(image);
        let mut creations = self.0.creations();
        creations
            .planned
            .values()
            .flatten()
            .for_each(|planned| loads.add(planned));
        let plan = plan_topic(&candidates, &loads, shape)?;
        creations.last += 1;
        let number = creations.last;
        creations.planned.insert(number, plan.partitions.clone());
        Ok((
            Creation {
                inner: &self.0,
                number,
            },
            plan.partitions,
            plan.warnings,
        ))
    }

    /// Hands every leadership back that can go back now, a few at a time; answers with the partitions that moved. On the
    /// leader only.
    pub async fn elect_leaders(&self) -> Result<Vec<TopicPartition>, Error> {
        let serving = self.0.group.status().borrow().is_serving();
        let Some(mover) = self.0.mover.get().filter(|_| serving) else {
            return Err(Error::ControllerUnavailable);
        };
        let moves = balancer::all_moves(&self.0.images.borrow().clone());
        let moves = moves.into_iter().map(
            |LeaderMove {
                 partition,
                 leader,
                 to,
                 ..
             }| async move {
                match mover(partition.clone(), leader, to).await {
                    Ok(()) => Some(partition),
                    Err(error) => {
                        tracing::info!(%partition, %to, %error, "leadership was not handed over");
                        None
                    }
                }
            },
        );
        let moved = stream::iter(moves).buffer_unordered(self.0.config.moves_max.max(1));
        let mut moved: Vec<TopicPartition> = moved.filter_map(std::future::ready).collect().await;
        moved.sort_unstable();
        Ok(moved)
    }
}

/// Keeps the local log of group 0 short, on every broker.
async fn purge(controller: Controller) {
    let Inner { group, config, .. } = &*controller.0;
    let mut status = group.status();
    let mut purged = 0;
    loop {
        let due = status.wait_for(|status| {
            let applied = status.applied.map_or(0, |id| id.index.0);
            applied >= purged + 2 * config.entries_kept
        });
        let applied = match due.await {
            Ok(status) => status.applied.map_or(0, |id| id.index.0),
            Err(_closed) => return,
        };
        purged = applied - config.entries_kept;
        if let Err(error) = group.purge_to(LogIndex(purged)).await {
            tracing::warn!(%error, "the controller's log was not purged");
        }
    }
}

fn timeout_error(asked: Instant) -> Error {
    let after_ms = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
    Error::Timeout { after_ms }
}

/// The caller's error for a proposal that was not answered: whatever may still be applied is a timeout, that is, unknown.
fn proposal_error(error: &RaftError, asked: Instant) -> Error {
    match error {
        RaftError::NotLeader { .. } | RaftError::NoQuorum | RaftError::NoSuchGroup => {
            Error::ControllerUnavailable
        }
        RaftError::Lost | RaftError::Timeout { .. } => timeout_error(asked),
        other => Error::Failed {
            reason: other.to_string(),
        },
    }
}

/// The caller's error for a question that was not answered: nothing was done.
fn question_error(error: &RaftError, asked: Instant) -> Error {
    match error {
        RaftError::Timeout { .. } => timeout_error(asked),
        _ => Error::ControllerUnavailable,
    }
}
