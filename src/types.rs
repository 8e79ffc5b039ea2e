//! The vocabulary: identities, positions, assignments, and the closed set of errors a caller can act on.
//!
//! Owns the two codec functions ([`encode`], [`decode`]) through which every structured header, command and
//! catalog value passes. Knows nothing asynchronous, no disk and no network.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

number!(
    /// One broker of the cluster, as the operator numbers it: 0 to 2³¹ − 1.
    BrokerId, u32
);
number!(
    /// One Raft group; [`GroupId::CONTROLLER`] holds the cluster's metadata, every other one is a partition.
    GroupId, u64
);
number!(
    /// The number of a partition inside its topic, from 0.
    PartitionId, u32
);
number!(
    /// A record's position in its partition as clients see it: dense, from 0.
    Offset, u64
);
number!(
    /// An entry's position in a group's Raft log. Never shown to clients.
    LogIndex, u64
);
number!(
    /// The Raft term of the leader that wrote an entry; what Kafka calls the leader epoch.
    LeaderEpoch, u64
);

impl GroupId {
    /// The group of the controller.
    pub const CONTROLLER: GroupId = GroupId(0);
}

impl LogIndex {
    /// The index after this one.
    #[must_use]
    pub fn next(self) -> LogIndex {
        LogIndex(self.0 + 1)
    }
}

impl Offset {
    /// The offset `count` records further on.
    #[must_use]
    pub fn plus(self, count: u64) -> Offset {
        Offset(self.0 + count)
    }
}

/// Raft's log id: who wrote an entry, and where it stands. Ordered by epoch first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct EntryId {
    /// Epoch of the leader that appended the entry.
    pub epoch: LeaderEpoch,
    /// Position in the group's log.
    pub index: LogIndex,
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.index, self.epoch)
    }
}

/// What a replica stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ReplicaKind {
    /// Stores records, votes, may lead.
    Data,
    /// Votes and stores entry ids only; never leads, never serves.
    Witness,
}

/// The identity of one copy of a group on one broker: broker, kind and replica epoch packed in 64 bits.
///
/// It is Raft's node id, and is never used again after its log is gone: a broker that comes back empty gets
/// a new replica epoch. The kind is part of the identity because a witness may never become a data replica
/// in place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ReplicaId(u64);

impl ReplicaId {
    const WITNESS: u64 = 1 << 32;

    /// The identity of the replica of `kind` on `broker` created at `epoch` (drawn from a counter in the
    /// cluster's metadata; for group 0 the low 32 bits of the data directory's incarnation).
    pub fn new(broker: BrokerId, kind: ReplicaKind, epoch: u32) -> Self {
        let witness = if kind == ReplicaKind::Witness {
            Self::WITNESS
        } else {
            0
        };
        Self((u64::from(broker.0) << 33) | witness | u64::from(epoch))
    }

    /// The identity with this packed form.
    pub fn from_u64(packed: u64) -> Self {
        Self(packed)
    }

    /// The packed form.
    pub fn as_u64(self) -> u64 {
        self.0
    }

    /// The broker that holds the replica.
    pub fn broker(self) -> BrokerId {
        BrokerId(u32::try_from(self.0 >> 33).unwrap_or(u32::MAX))
    }

    /// What the replica stores.
    pub fn kind(self) -> ReplicaKind {
        if self.0 & Self::WITNESS == 0 {
            ReplicaKind::Data
        } else {
            ReplicaKind::Witness
        }
    }

    /// Whether the replica is a witness.
    pub fn is_witness(self) -> bool {
        self.kind() == ReplicaKind::Witness
    }

    /// The number that tells two replicas on the same broker apart.
    pub fn epoch(self) -> u32 {
        u32::try_from(self.0 & u64::from(u32::MAX)).unwrap_or(u32::MAX)
    }
}

impl fmt::Debug for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_witness() { "w" } else { "" };
        write!(f, "{}{kind}.{}", self.broker(), self.epoch())
    }
}

macro_rules! random_identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u128);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
    };
}

random_identity!(
    /// The identity of a cluster, drawn when its controller group is created.
    ClusterId
);
random_identity!(
    /// The identity of one data directory, drawn when it is created.
    Incarnation
);

impl Incarnation {
    /// The replica epoch of this directory's member of group 0.
    pub fn controller_epoch(self) -> u32 {
        u32::try_from(self.0 & u128::from(u32::MAX)).unwrap_or(u32::MAX)
    }
}

/// A topic's name, checked against Kafka's rules: 1 to 249 of `A-Z a-z 0-9 . _ -`, and neither `.` nor `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TopicName(Arc<str>);

impl TopicName {
    /// Longest legal name, in bytes.
    pub const MAX_LEN: usize = 249;

    /// Checks `name` and takes it.
    pub fn new(name: &str) -> Result<Self, Error> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let reason = if name.is_empty() {
            "it is empty".to_owned()
        } else if name.len() > Self::MAX_LEN {
            format!(
                "it has {} bytes, at most {} are allowed",
                name.len(),
                Self::MAX_LEN
            )
        } else if name == "." || name == ".." {
            "'.' and '..' are reserved".to_owned()
        } else if let Some(bad) = name.chars().find(|c| !legal(*c)) {
            format!("character {bad:?} is not allowed, use letters, digits, '.', '_' and '-'")
        } else {
            return Ok(Self(name.into()));
        };
        let shown: String = name.chars().take(64).collect();
        Err(Error::InvalidTopicName {
            name: shown,
            reason,
        })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for TopicName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        Self::new(&name)
    }
}

impl From<TopicName> for String {
    fn from(name: TopicName) -> String {
        name.0.as_ref().to_owned()
    }
}

/// One partition of one topic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TopicPartition {
    /// The topic.
    pub topic: TopicName,
    /// The partition's number.
    pub partition: PartitionId,
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic, self.partition)
    }
}

/// The replicas of a partition: data replicas in order of preference, and the witness if there is one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Assignment {
    /// Data replicas, the preferred leader first.
    pub replicas: Vec<ReplicaId>,
    /// The witness of an even replication factor.
    pub witness: Option<ReplicaId>,
}

impl Assignment {
    /// The replica that should lead when it is alive and caught up.
    pub fn preferred_leader(&self) -> Option<ReplicaId> {
        self.replicas.first().copied()
    }

    /// All voters: data replicas, then the witness.
    pub fn voters(&self) -> impl Iterator<Item = ReplicaId> + '_ {
        self.replicas.iter().copied().chain(self.witness)
    }

    /// The voter on `broker`, if there is one.
    pub fn on(&self, broker: BrokerId) -> Option<ReplicaId> {
        self.voters().find(|replica| replica.broker() == broker)
    }
}

/// How much an acknowledgement must mean before it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Acks {
    /// Answer before anything is stored. Promises nothing.
    None,
    /// Answer after Raft's commit: a majority of the voters has it on durable storage.
    Leader,
    /// As [`Acks::Leader`], and at least `min.insync.replicas` data replicas have it.
    All,
}

/// Where to reach a broker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// The broker.
    pub broker: BrokerId,
    /// `host:port`.
    pub address: String,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broker {} at {}", self.broker, self.address)
    }
}

/// What is known about a request that did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It definitely had no effect, and never will.
    NotDone,
    /// It may have taken effect, or may yet.
    Unknown,
}

/// Why a request did not succeed: everything a caller can act on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
#[allow(missing_docs)] // the text of each variant says what its fields are
pub enum Error {
    #[error("broker {broker} is not the leader of {partition}; {}", match leader {
        Some(leader) => format!("the leader is {leader}"),
        None => "no leader is known, try again shortly".to_owned(),
    })]
    NotLeader {
        partition: TopicPartition,
        broker: BrokerId,
        leader: Option<Endpoint>,
    },
    #[error("{partition} has no leader now; try again shortly")]
    LeaderUnavailable { partition: TopicPartition },
    #[error("the controller has no leader now; try again when a majority of its voters is up")]
    ControllerUnavailable,
    #[error(
        "no topic {topic}; create it, as with `logboom topic create {topic} --partitions 1 --replication-factor 1`"
    )]
    UnknownTopic { topic: TopicName },
    #[error(
        "{topic} has {partitions} partitions, numbered from 0; there is no partition {partition}"
    )]
    UnknownPartition {
        topic: TopicName,
        partition: PartitionId,
        partitions: u32,
    },
    #[error("topic {topic} exists already")]
    TopicExists { topic: TopicName },
    #[error("illegal topic name {name:?}: {reason}")]
    InvalidTopicName { name: String, reason: String },
    #[error("invalid number of partitions {requested}: use 1 to {max}")]
    InvalidPartitions { requested: u32, max: u32 },
    #[error(
        "invalid replication factor {requested}: the cluster has {brokers} usable brokers, use 1 to {brokers}"
    )]
    InvalidReplicationFactor { requested: u32, brokers: u32 },
    #[error("invalid configuration {key}: {reason}")]
    InvalidConfig { key: String, reason: String },
    #[error("invalid request: {reason}")]
    InvalidRequest { reason: String },
    #[error(
        "the batch has {size} bytes, max.message.bytes is {max}; send less at a time, or use a topic that was created with more"
    )]
    RecordTooLarge { size: u64, max: u64 },
    #[error("corrupt record batch: {reason}; nothing was appended")]
    CorruptBatch { reason: String },
    #[error("out-of-order sequence of producer {producer_id}: expected {expected}, found {found}")]
    OutOfOrderSequence {
        producer_id: i64,
        expected: i32,
        found: i32,
    },
    #[error(
        "producer {producer_id} with epoch {found} is fenced by epoch {current}; take a new producer id"
    )]
    ProducerFenced {
        producer_id: i64,
        current: i16,
        found: i16,
    },
    #[error("offset {requested} of {partition} is out of range: {start} to {end} can be read")]
    OffsetOutOfRange {
        partition: TopicPartition,
        requested: Offset,
        start: Offset,
        end: Offset,
    },
    #[error(
        "{partition} has {in_sync} in-sync replicas, min.insync.replicas is {min}; nothing was appended"
    )]
    NotEnoughReplicas {
        partition: TopicPartition,
        in_sync: u32,
        min: u32,
    },
    #[error(
        "{partition}: appended, but fewer than {min} replicas confirmed it in time; it may be lost or kept"
    )]
    NotEnoughReplicasAfterAppend { partition: TopicPartition, min: u32 },
    #[error("the broker has no room for {bytes} more bytes in flight; slow down and send it again")]
    Overloaded { bytes: u64 },
    #[error(
        "the broker's disk has {free} bytes free, below its reserve of {reserve}; free some space and send it again"
    )]
    StorageFull { free: u64, reserve: u64 },
    #[error("refused: {reason}")]
    Refused { reason: String },
    #[error(
        "broker {broker} is running already at {address}; stop that process, or use another broker id and data directory"
    )]
    BrokerRunning { broker: BrokerId, address: String },
    #[error("the broker is shutting down; use another one")]
    ShuttingDown,
    #[error("no answer within {after_ms} ms; it may or may not have been done")]
    Timeout { after_ms: u64 },
    #[error(
        "leadership of {partition} was lost after the request was accepted; it may or may not have been done"
    )]
    LeadershipLost { partition: TopicPartition },
    #[error(
        "the connection to {address} was lost after the request was sent; it may or may not have been done"
    )]
    ConnectionLost { address: String },
    #[error("cannot reach {address}: {reason}")]
    Unreachable { address: String, reason: String },
    #[error("the broker failed: {reason}")]
    Failed { reason: String },
    #[error(
        "the leader of {partition} reaches {reached} of its voters and a commit takes {needed}; nothing was appended, try again when more brokers are up"
    )]
    NoMajority {
        partition: TopicPartition,
        reached: u32,
        needed: u32,
    },
    #[error(
        "broker {broker} has not joined its cluster yet, it waits for the others of its bootstrap list; ask another broker, or try again when they are up"
    )]
    NotJoined { broker: BrokerId },
}

impl Error {
    /// Whether the request had no effect, or may have had one.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::NotEnoughReplicasAfterAppend { .. }
            | Self::Timeout { .. }
            | Self::LeadershipLost { .. }
            | Self::ConnectionLost { .. }
            | Self::Failed { .. } => Outcome::Unknown,
            _ => Outcome::NotDone,
        }
    }

    /// Whether the same request may succeed later. An [`Outcome::Unknown`] one may then be done twice, unless
    /// it comes from an idempotent producer.
    pub fn is_retriable(&self) -> bool {
        matches!(
            self,
            Self::NotLeader { .. }
                | Self::LeaderUnavailable { .. }
                | Self::ControllerUnavailable
                | Self::NotEnoughReplicas { .. }
                | Self::NoMajority { .. }
                | Self::NotEnoughReplicasAfterAppend { .. }
                | Self::Overloaded { .. }
                | Self::StorageFull { .. }
                | Self::BrokerRunning { .. }
                | Self::NotJoined { .. }
                | Self::ShuttingDown
                | Self::Timeout { .. }
                | Self::LeadershipLost { .. }
                | Self::ConnectionLost { .. }
                | Self::Unreachable { .. }
        )
    }

    /// Whether the caller's picture of who leads what is out of date.
    pub fn needs_metadata(&self) -> bool {
        matches!(
            self,
            Self::NotLeader { .. }
                | Self::LeaderUnavailable { .. }
                | Self::LeadershipLost { .. }
                | Self::UnknownTopic { .. }
                | Self::UnknownPartition { .. }
                | Self::ConnectionLost { .. }
                | Self::Unreachable { .. }
                | Self::NotJoined { .. }
                | Self::ShuttingDown
        )
    }
}

/// Largest structured value that is encoded or decoded, in bytes. Record bytes travel beside it, not in it.
pub const CODEC_LIMIT: usize = 16 << 20;

fn codec() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_big_endian()
        .with_limit::<CODEC_LIMIT>()
}

/// The bytes of a structured value: a wire header, a command, a catalog value.
///
/// # Panics
/// When the value is larger than [`CODEC_LIMIT`]: a caller bounds what it encodes.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    match bincode::serde::encode_to_vec(value, codec()) {
        Ok(bytes) => bytes,
        #[allow(clippy::panic)] // our own values always encode; a larger one is a broken invariant
        Err(error) => panic!("cannot encode {}: {error}", std::any::type_name::<T>()),
    }
}

/// The value in `bytes`, all of which must be used.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    match bincode::serde::decode_from_slice(bytes, codec()) {
        Ok((value, used)) if used == bytes.len() => Ok(value),
        Ok((_, used)) => Err(DecodeError(format!(
            "{} bytes left over",
            bytes.len() - used
        ))),
        Err(error) => Err(DecodeError(error.to_string())),
    }
}

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot decode: {0}")]
pub struct DecodeError(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a replica id keeps its parts apart. Method: pack and unpack the extremes.
    #[test]
    fn replica_id_round_trips() {
        for broker in [0, 1, 7, (1 << 31) - 1] {
            for kind in [ReplicaKind::Data, ReplicaKind::Witness] {
                for epoch in [0, 1, u32::MAX] {
                    let id = ReplicaId::new(BrokerId(broker), kind, epoch);
                    assert_eq!(
                        (id.broker(), id.kind(), id.epoch()),
                        (BrokerId(broker), kind, epoch)
                    );
                    assert_eq!(ReplicaId::from_u64(id.as_u64()), id);
                }
            }
        }
    }

    /// Goal: a topic name can never become a path or upset another system. Method: Kafka's rules as a table.
    #[test]
    fn topic_names_follow_kafkas_rules() {
        let long = "x".repeat(249);
        for good in ["a", "topic-x", "A.b_c-9", "...", long.as_str()] {
            assert!(TopicName::new(good).is_ok(), "{good}");
        }
        let too_long = "x".repeat(250);
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "a b",
            "ü",
            "a\0",
            too_long.as_str(),
        ] {
            assert!(TopicName::new(bad).is_err(), "{bad}");
        }
        assert!(decode::<TopicName>(&encode(&"a/b".to_owned())).is_err());
    }

    /// Goal: bytes left over are an error, not ignored. Method: append one byte to a good encoding.
    #[test]
    fn decode_uses_all_bytes() {
        let mut bytes = encode(&EntryId::default());
        assert_eq!(decode::<EntryId>(&bytes), Ok(EntryId::default()));
        bytes.push(0);
        assert!(decode::<EntryId>(&bytes).is_err());
    }
}
