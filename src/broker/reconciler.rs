//! Brings the replicas on this broker in line with the cluster's metadata, from whatever it finds.
//!
//! Owns the partitions that run here, and publishes them by name. Starts, creates and deletes local replicas; on the leader of
//! a group drives its members towards the assignment; tells the controller what the leaders here see, and which replicas here
//! have to be replaced because their logs are damaged. Decides nothing itself:
//! the steps are planned in `plan`. Steps of one group follow one another, steps of different groups run side by side, a
//! bounded number of them; a failed one is tried again later, ever less often.
//!
//! Starts nothing before [`Reconciler::run`], which is called when the controller has admitted this start of the broker: its
//! metadata then shows everything that earlier starts had seen, so that no replica whose log was deleted is created again.
//!
//! Task: the loop, and one per step under way. Lock: the published partitions, for a moment, never across an await.

mod plan;
mod reports;
mod steps;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream;
use tokio::sync::watch;

use crate::api::{PartitionReport, PartitionView};
use crate::controller::ClusterMetadata;
use crate::partition::{Endpoints, Partition, PartitionLimits, Room};
use crate::raft::{Group, Groups, Role};
use crate::runtime::Tasks;
use crate::types::{BrokerId, Error, LeaderEpoch, ReplicaId, TopicName, TopicPartition};

use steps::hand_over;
use work::State;

/// Steps under way at once.
const STEPS_MAX: usize = 64;

/// Sends reports to the controller; `Ok` when they are recorded.
pub type Reporter =
    Arc<dyn Fn(Vec<PartitionReport>) -> BoxFuture<'static, Result<(), Error>> + Send + Sync>;

/// Asks the controller for a new replica in the place of one of this broker whose log is damaged, given with the epoch of its last
/// entry; `Ok` when that is decided, [`Error::Refused`] while it must stay.
pub type DamageReporter = Arc<
    dyn Fn(TopicPartition, ReplicaId, LeaderEpoch) -> BoxFuture<'static, Result<(), Error>>
        + Send
        + Sync,
>;

/// What the reconciler needs of the broker around it.
#[derive(Clone)]
pub struct ReconcilerPorts {
    /// This broker.
    pub broker: BrokerId,
    /// The groups of this broker.
    pub groups: Groups,
    /// Where the partitions' tasks and the reconciler's own run.
    pub tasks: Tasks,
    /// The cluster's metadata.
    pub metadata: watch::Receiver<Arc<ClusterMetadata>>,
    /// Limits of each partition.
    pub limits: PartitionLimits,
    /// Where brokers are reached.
    pub endpoints: Endpoints,
    /// Whether the disk has room for more records.
    pub room: Room,
    /// How the controller is told what leaders see.
    pub report: Reporter,
    /// How the controller is told of a damaged replica.
    pub report_damage: DamageReporter,
}

impl fmt::Debug for ReconcilerPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReconcilerPorts")
            .field("broker", &self.broker)
            .finish_non_exhaustive()
    }
}

struct Inner {
    ports: ReconcilerPorts,
    /// The loop and its steps; the partitions' tasks are children of the ports'.
    tasks: Tasks,
    published: RwLock<BTreeMap<TopicPartition, Partition>>,
    ready: watch::Sender<bool>,
}

/// The replicas of this broker. Cheap to clone.
#[derive(Clone)]
pub struct Reconciler(Arc<Inner>);

impl fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconciler")
            .field("ports", &self.0.ports)
            .finish_non_exhaustive()
    }
}

impl Reconciler {
    /// Nothing runs yet.
    pub fn new(ports: ReconcilerPorts) -> Self {
        let tasks = ports.tasks.child();
        let (published, ready) = (RwLock::default(), watch::Sender::new(false));
        Self(Arc::new(Inner {
            ports,
            tasks,
            published,
            ready,
        }))
    }

    /// Begins. Call it once, when the metadata shows this start of the broker as registered.
    pub fn run(&self) {
        let state = State::new(Arc::clone(&self.0));
        self.0.tasks.spawn(state.run());
    }

    /// The local replica of a partition, when it runs.
    pub fn partition(&self, name: &TopicPartition) -> Option<Partition> {
        self.0
            .published
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// All partitions with a replica that runs here, by name.
    pub fn partitions(&self) -> Vec<Partition> {
        self.0
            .published
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// The live figures of the partitions of `topics` (all when `None`) that are led here.
    pub fn views(&self, topics: Option<&[TopicName]>) -> Vec<(TopicPartition, PartitionView)> {
        let asked: Option<BTreeSet<&TopicName>> = topics.map(|names| names.iter().collect());
        let me = self.0.ports.broker;
        self.partitions()
            .into_iter()
            .filter(|partition| {
                asked
                    .as_ref()
                    .is_none_or(|asked| asked.contains(&partition.id().topic))
            })
            .filter(|partition| partition.group().status().borrow().role == Role::Leader)
            .map(|partition| (partition.id().clone(), partition.view()))
            .filter(|(_, view)| view.leader == Some(me))
            .collect()
    }

    /// Resolves when every replica assigned to this broker was started once, or failed to.
    pub async fn wait_ready(&self) {
        // the sender lives as long as this handle
        self.0.ready.subscribe().wait_for(|ready| *ready).await.ok();
    }

    /// Hands the leaderships of this broker over to replicas that have everything, and the controller's with them. What nobody
    /// can take stays; returns how many groups that are.
    pub async fn hand_over(&self, controller_group: &Group) -> usize {
        let led = self
            .partitions()
            .into_iter()
            .map(|partition| partition.group().clone());
        let groups = led.chain([controller_group.clone()]);
        let handed_over = stream::iter(groups).map(|group| async move { hand_over(&group).await });
        let stay = handed_over
            .buffer_unordered(STEPS_MAX)
            .filter(|handed_over| std::future::ready(!handed_over));
        stay.count().await
    }

    /// Stops the loop, then all partitions. Nothing is started afterwards; harmless when repeated.
    pub async fn stop(&self) {
        self.0.tasks.shutdown().await;
        let stopping = std::mem::take(
            &mut *self
                .0
                .published
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
        stream::iter(stopping.into_values())
            .for_each_concurrent(STEPS_MAX, |partition| async move { partition.stop().await })
            .await;
    }
}

impl Inner {
    fn publish(&self, partition: &Partition) {
        let name = partition.id().clone();
        let mut published = self
            .published
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        published.insert(name, partition.clone());
    }

    /// Takes `partition` out of sight, unless a newer one of the same name is in its place.
    fn withdraw(&self, partition: &Partition) {
        let mut published = self
            .published
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let group = partition.group().id();
        if published
            .get(partition.id())
            .is_some_and(|known| known.group().id() == group)
        {
            published.remove(partition.id());
        }
    }
}

#[cfg(test)]
mod tests;
