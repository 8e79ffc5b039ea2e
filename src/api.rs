//! The waist: everything a client can ask of a broker, as one request and one response type.
//!
//! Owns no behaviour. Record bytes travel beside the structured header, untouched (see [`Call::into_message`]).

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::net::Message;
use crate::types::{
    Acks, BrokerId, ClusterId, DecodeError, Endpoint, Error, Incarnation, LeaderEpoch, Offset,
    PartitionId, ReplicaId, TopicName, TopicPartition, decode, encode,
};

/// How a reader wants offsets found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OffsetSpec {
    /// The first offset that can be read.
    Earliest,
    /// The high watermark: the offset behind the last record that can be read.
    Latest,
    /// As `Latest`, and at or above every record acknowledged before the question (asks a quorum).
    LinearizableEnd,
    /// The first offset whose batch has a record with this timestamp or a later one, in ms since 1970.
    AtTime(i64),
}

/// What a client can ask.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Append record batches (Kafka's `RecordBatch` v2, one or more back to back) to one partition.
    Produce {
        /// Where to.
        partition: TopicPartition,
        /// What the answer must mean.
        acks: Acks,
        /// The batches, as they are.
        #[serde(skip)]
        records: Bytes,
    },
    /// Read whole record batches from the one that holds `offset` on.
    Fetch {
        /// Where from.
        partition: TopicPartition,
        /// The first offset wanted; the answer may begin earlier in the same batch.
        offset: Offset,
        /// At most this many bytes, but at least one batch.
        max_bytes: u32,
        /// Wait until at least this many bytes can be read …
        min_bytes: u32,
        /// … or this long.
        max_wait_ms: u32,
    },
    /// Find an offset.
    FindOffset {
        /// In which partition.
        partition: TopicPartition,
        /// Which one.
        spec: OffsetSpec,
    },
    /// Drop the records below `offset` (on all replicas; the same decision everywhere).
    Trim {
        /// In which partition.
        partition: TopicPartition,
        /// The new log start offset, at most the high watermark.
        offset: Offset,
    },
    /// Who leads what: for routing. All topics when `topics` is `None`.
    Metadata {
        /// Which topics.
        topics: Option<Vec<TopicName>>,
    },
    /// Create a topic.
    CreateTopic {
        /// Its name.
        name: TopicName,
        /// How many partitions.
        partitions: u32,
        /// How many data replicas of each.
        replication_factor: u32,
        /// Topic configuration.
        config: BTreeMap<String, String>,
        /// An assignment chosen by the operator: per partition the brokers in order of preference. Empty: the
        /// controller chooses.
        assignment: Vec<Vec<BrokerId>>,
    },
    /// Delete a topic and its records.
    DeleteTopic {
        /// Its name.
        name: TopicName,
    },
    /// Move the replicas of a partition to other brokers, or cancel such a move. Answered when it is decided, not when the
    /// records are there.
    Reassign {
        /// The partition.
        partition: TopicPartition,
        /// The brokers that should hold its data replicas, the preferred leader first; `None` cancels the move under way.
        replicas: Option<Vec<BrokerId>>,
    },
    /// Move what a broker holds to other brokers, a few partitions at a time: begins what can be begun now.
    Drain {
        /// The broker to empty.
        broker: BrokerId,
    },
    /// Everything known about topics, replica by replica. All topics when `topics` is `None`.
    DescribeTopics {
        /// Which topics.
        topics: Option<Vec<TopicName>>,
    },
    /// Brokers, controller, under-replicated and leaderless partitions.
    ClusterStatus,
    /// Hand leadership back to preferred leaders that are alive and caught up, now.
    ElectLeaders,
    /// Draw a producer id that was never used before.
    InitProducer,
    /// Between brokers: a broker introduces itself to the controller.
    RegisterBroker {
        /// Who, and where it is reached.
        endpoint: Endpoint,
        /// Its data directory.
        incarnation: Incarnation,
        /// Its rack, if the operator named one.
        rack: Option<String>,
        /// The number of this opening of the directory; it grows each time, by a random step.
        boot: u64,
        /// Durable journal bytes it held when it was opened: an older copy holds fewer.
        position: u64,
        /// The cluster that the directory belongs to, if it was in one.
        cluster: Option<ClusterId>,
    },
    /// Between brokers: what a leader saw, for everyone to see.
    ReportPartitions {
        /// The reporting broker.
        broker: BrokerId,
        /// Its partitions.
        reports: Vec<PartitionReport>,
        /// Durable journal bytes of its data directory: an older copy of it will show fewer.
        position: u64,
    },
    /// Between brokers, before a cluster exists: take this cluster id as yours.
    AdoptCluster {
        /// The id drawn by the founding broker.
        cluster: ClusterId,
    },
    /// Between brokers, from the controller to a partition's leader: hand leadership to `to`.
    MoveLeader {
        /// The partition.
        partition: TopicPartition,
        /// The replica that should lead: a live data voter that has the whole log.
        to: ReplicaId,
    },
    /// Between brokers: the live figures of the partitions of `topics` led by the asked broker.
    DescribeLed {
        /// Which topics; all when `None`.
        topics: Option<Vec<TopicName>>,
    },
    /// What brokers have counted since they were started.
    BrokerFigures {
        /// Of every broker that can be reached, or of the asked one alone.
        everywhere: bool,
    },
    /// Between brokers: a broker found the log of its own replica damaged, and asks the controller for a new replica in its
    /// place.
    ReportDamage {
        /// The partition.
        partition: TopicPartition,
        /// The damaged replica.
        replica: ReplicaId,
        /// The epoch of its last entry: only a leader of this epoch or a later one is known to have all that it had.
        epoch: LeaderEpoch,
    },
    /// Between brokers, to the controller's leader: does a majority of the voters still follow it?
    ConfirmController,
}

/// What the leader of a partition reports to the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionReport {
    /// The partition.
    pub partition: TopicPartition,
    /// The reporting leader's epoch; an older one is ignored.
    pub epoch: LeaderEpoch,
    /// Brokers in sync, the leader included, in the order of the assignment.
    pub isr: Vec<BrokerId>,
    /// The group's voters when their membership is known committed and no change is under way; else empty. Ends a
    /// replacement of replicas, so only the reconciler, which changes the membership, fills it in.
    pub voters: Vec<ReplicaId>,
    /// The number of the replacement that `voters` speak of; 0 without them.
    pub change: u32,
}

/// An appended batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appended {
    /// Offset of the first record.
    pub base_offset: Offset,
    /// Records in the batch.
    pub count: u32,
    /// Epoch of the leader that appended it.
    pub leader_epoch: LeaderEpoch,
    /// Brokers whose durable storage is known to hold it.
    pub durable_on: Vec<BrokerId>,
    /// Whether it had been appended before (an idempotent producer's retry).
    pub duplicate: bool,
}

/// One partition, for routing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionRoute {
    /// Its number.
    pub partition: PartitionId,
    /// Who leads, when known.
    pub leader: Option<BrokerId>,
    /// In which epoch.
    pub epoch: LeaderEpoch,
    /// Brokers with a data replica, the preferred leader first.
    pub replicas: Vec<BrokerId>,
    /// Those in sync.
    pub isr: Vec<BrokerId>,
}

/// One topic, for routing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicRoute {
    /// Its name.
    pub name: TopicName,
    /// Its partitions, in order.
    pub partitions: Vec<PartitionRoute>,
    /// Its configuration where it differs from the default.
    pub config: BTreeMap<String, String>,
}

/// One data replica of a described partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaView {
    /// The broker.
    pub broker: BrokerId,
    /// Entries that the leader has and this replica is not known to have durably; `None` when unknown.
    pub lag: Option<u64>,
    /// Whether it is in sync.
    pub in_sync: bool,
}

/// A described partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionView {
    /// Its number.
    pub partition: PartitionId,
    /// Who leads, when one does.
    pub leader: Option<BrokerId>,
    /// In which epoch.
    pub epoch: LeaderEpoch,
    /// Data replicas, the preferred leader first; those that are being removed last.
    pub replicas: Vec<ReplicaView>,
    /// Of these brokers, and of those still to come, the ones that do not have their replica in full yet: it is being moved
    /// there, or made anew.
    pub adding: Vec<BrokerId>,
    /// The brokers whose replicas go away when the ones being added are in sync.
    pub removing: Vec<BrokerId>,
    /// Whether its replicas are being moved at an operator's request.
    pub reassigning: bool,
    /// Brokers in sync.
    pub isr: Vec<BrokerId>,
    /// The witness's broker.
    pub witness: Option<BrokerId>,
    /// First offset that can be read; `None` without a leader.
    pub start_offset: Option<Offset>,
    /// Offset behind the last record that can be read.
    pub high_watermark: Option<Offset>,
    /// Offset the next record gets.
    pub end_offset: Option<Offset>,
}

/// A described topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicView {
    /// Its name.
    pub name: TopicName,
    /// Data replicas per partition; of the partition with the fewest when reassignments have made them differ.
    pub replication_factor: u32,
    /// Its partitions, in order.
    pub partitions: Vec<PartitionView>,
    /// Its configuration where it differs from the default.
    pub config: BTreeMap<String, String>,
}

/// An answer comes from a copy of the metadata that may be out of date: the broker that gave it reaches no leader of the controller that a
/// majority of the voters follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stale {
    /// The broker that answered.
    pub broker: BrokerId,
    /// How long before the answer, in ms, it last knew that the controller was led; `None`: not since it was started.
    pub age_ms: Option<u64>,
}

/// A broker of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerView {
    /// Its id.
    pub broker: BrokerId,
    /// Where it is reached.
    pub address: String,
    /// Its rack.
    pub rack: Option<String>,
    /// Whether the controller hears it; in a stale view, whether the answering broker does.
    pub alive: bool,
    /// Whether it votes in the controller's group.
    pub controller_voter: bool,
    /// Partitions it leads.
    pub leads: u32,
    /// Data replicas it holds.
    pub replicas: u32,
}

/// What a broker has counted since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerFigures {
    /// The broker.
    pub broker: BrokerId,
    /// How often its journal was flushed, each time with one `fdatasync`.
    pub flushes: u64,
    /// Log entries of all its replicas in these flushes.
    pub flushed_entries: u64,
    /// Bytes in these flushes.
    pub flushed_bytes: u64,
}

/// How far a broker is emptied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainView {
    /// Partitions whose move has just begun.
    pub begun: Vec<TopicPartition>,
    /// Partitions of which the broker still holds something; 0: it can be stopped.
    pub remaining: u32,
    /// Of these, the ones that have nowhere to go, with the reason; a hundred of them at most.
    pub stuck: Vec<(TopicPartition, String)>,
}

/// The state of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterView {
    /// The cluster.
    pub cluster: Option<ClusterId>,
    /// The controller's leader; `None` in a stale view.
    pub controller: Option<BrokerId>,
    /// That this view may be out of date.
    pub stale: Option<Stale>,
    /// All registered brokers.
    pub brokers: Vec<BrokerView>,
    /// Topics.
    pub topics: u32,
    /// Partitions.
    pub partitions: u32,
    /// Partitions whose ISR is smaller than their replica set.
    pub under_replicated: Vec<TopicPartition>,
    /// Partitions without a leader.
    pub leaderless: Vec<TopicPartition>,
}

/// The answer to a request that succeeded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// To [`Request::Produce`], one per batch, in order.
    Produced(Vec<Appended>),
    /// To [`Request::Fetch`].
    Fetched {
        /// Whole batches, base offset and leader epoch set; empty when there is nothing to read yet.
        #[serde(skip)]
        records: Bytes,
        /// First offset that can be read.
        start_offset: Offset,
        /// Offset behind the last record that can be read.
        high_watermark: Offset,
        /// The answering leader's epoch.
        epoch: LeaderEpoch,
    },
    /// To [`Request::FindOffset`]; `None` when no record is that young.
    FoundOffset {
        /// The offset.
        offset: Option<Offset>,
        /// The answering leader's epoch.
        epoch: LeaderEpoch,
    },
    /// To [`Request::Trim`]: the log start offset now.
    Trimmed(Offset),
    /// To [`Request::Metadata`].
    Metadata {
        /// The cluster.
        cluster: Option<ClusterId>,
        /// The controller's leader.
        controller: Option<BrokerId>,
        /// All brokers.
        brokers: Vec<Endpoint>,
        /// The topics asked for.
        topics: Vec<TopicRoute>,
        /// That this may be out of date. Looked at only when all topics are asked for: what a client needs to find a leader
        /// proves itself in use.
        stale: Option<Stale>,
    },
    /// To [`Request::CreateTopic`]: what the operator should know, one line each.
    Created {
        /// Warnings, as that an RF of 2 on two brokers cannot fail over.
        warnings: Vec<String>,
    },
    /// To [`Request::DeleteTopic`].
    Deleted,
    /// To [`Request::Reassign`].
    Reassigning {
        /// What the operator should know, one line each.
        warnings: Vec<String>,
    },
    /// To [`Request::Drain`].
    Draining(DrainView),
    /// To [`Request::DescribeTopics`].
    Described {
        /// The topics asked for.
        topics: Vec<TopicView>,
        /// That this may be out of date, the figures of the leaders excepted.
        stale: Option<Stale>,
    },
    /// To [`Request::ClusterStatus`].
    Status(ClusterView),
    /// To [`Request::ElectLeaders`]: partitions whose leadership was handed over.
    Elected(Vec<TopicPartition>),
    /// To [`Request::InitProducer`].
    Producer {
        /// The producer id.
        id: i64,
        /// Its epoch.
        epoch: i16,
    },
    /// To [`Request::RegisterBroker`].
    Registered {
        /// The cluster.
        cluster: ClusterId,
        /// The controller's leader.
        controller: BrokerId,
    },
    /// To [`Request::ReportPartitions`] and [`Request::ReportDamage`].
    Reported,
    /// To [`Request::AdoptCluster`].
    Adopted,
    /// To [`Request::MoveLeader`].
    Moved,
    /// To [`Request::DescribeLed`]: the asked broker's own partitions.
    Led(Vec<(TopicPartition, PartitionView)>),
    /// To [`Request::BrokerFigures`], in the order of the brokers.
    Figures(Vec<BrokerFigures>),
    /// To [`Request::ConfirmController`].
    Confirmed {
        /// How long before the answer, in ms, a majority followed the asked broker; 0: it does. `None`: not since it was started.
        age_ms: Option<u64>,
    },
}

/// A request on its way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    /// How long the caller waits, in ms from when it was sent.
    pub timeout_ms: u32,
    /// Whether a broker that is not responsible may pass it on to the one that is (once), or must answer `NotLeader`.
    pub forward: bool,
    /// The request.
    pub request: Request,
}

impl Call {
    /// The wire form: a header, and the record bytes beside it.
    pub fn into_message(self) -> Message {
        let header = encode(&self).into();
        let body = match self.request {
            Request::Produce { records, .. } => vec![records],
            _ => Vec::new(),
        };
        Message { header, body }
    }

    /// Reads the wire form.
    pub fn from_message(message: Message) -> Result<Self, DecodeError> {
        let mut call: Self = decode(&message.header)?;
        if let Request::Produce { records, .. } = &mut call.request {
            *records = message.single_body();
        }
        Ok(call)
    }

    /// How long the caller waits.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.into())
    }
}

/// The wire form of an answer.
pub fn answer_to_message(answer: Result<Response, Error>) -> Message {
    let header = encode(&answer).into();
    let body = match answer {
        Ok(Response::Fetched { records, .. }) => vec![records],
        _ => Vec::new(),
    };
    Message { header, body }
}

/// Reads the wire form of an answer.
pub fn answer_from_message(message: Message) -> Result<Result<Response, Error>, DecodeError> {
    let mut answer: Result<Response, Error> = decode(&message.header)?;
    if let Ok(Response::Fetched { records, .. }) = &mut answer {
        *records = message.single_body();
    }
    Ok(answer)
}

/// Something that answers requests: a broker in this process, or a client's connections to a cluster.
pub trait Service: Send + Sync + 'static {
    /// Answers one request. Requests of one caller are taken in the order of the calls, whatever the order of the answers.
    /// Dropping the future does not undo what was begun.
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response, Error>>;
}
