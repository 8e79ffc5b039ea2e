//! The changes of the metadata, their answers, and their bytes. Owns no state.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::api::PartitionReport;
use crate::config::TopicConfig;
use crate::types::{
    Assignment, BrokerId, ClusterId, DecodeError, Endpoint, Incarnation, LeaderEpoch, ReplicaId,
    ReplicaKind, TopicName, TopicPartition, decode, encode,
};

/// Version of the encoded commands and of the encoded state; another one is not read.
pub(super) const FORMAT: u8 = 2;

/// Where a new partition goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedPartition {
    /// Brokers of its data replicas, the preferred leader first.
    pub replicas: Vec<BrokerId>,
    /// Broker of its witness.
    pub witness: Option<BrokerId>,
}

/// A change of the metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Names the cluster; the first name stays.
    InitCluster {
        /// Its id.
        cluster: ClusterId,
    },
    /// A broker introduces itself, once per start.
    RegisterBroker {
        /// Who, and where it is reached.
        endpoint: Endpoint,
        /// Its rack, if the operator named one.
        rack: Option<String>,
        /// Its data directory.
        incarnation: Incarnation,
        /// How often that has been opened, this time included.
        boot: u64,
        /// Journal bytes it held when it was opened.
        position: u64,
        /// Its member of group 0.
        controller_replica: ReplicaId,
    },
    /// The controller hears a broker again, or no longer.
    SetAlive {
        /// The broker.
        broker: BrokerId,
        /// Whether it is heard.
        alive: bool,
    },
    /// What leaders saw.
    ReportPartitions {
        /// The reporting broker.
        broker: BrokerId,
        /// Its partitions.
        reports: Vec<PartitionReport>,
        /// Durable journal bytes of its data directory.
        position: u64,
    },
    /// Creates a topic where the planner put it.
    CreateTopic {
        /// Its name.
        name: TopicName,
        /// Its configuration as given.
        config: BTreeMap<String, String>,
        /// Its configuration as read by the proposer, so that every version of the program agrees on it.
        settings: TopicConfig,
        /// Its partitions, in order.
        partitions: Vec<PlannedPartition>,
    },
    /// Deletes a topic.
    DeleteTopic {
        /// Its name.
        name: TopicName,
    },
    /// Moves the replicas of a partition, in as many steps as it takes; in the place of a move that is under way. Ends by
    /// itself, see [`Reassignment`](super::Reassignment). Changes nothing when it is there, or on its way there.
    ReassignPartition {
        /// The partition.
        partition: TopicPartition,
        /// Where its replicas go.
        target: PlannedPartition,
    },
    /// Moves the replicas back to where they were before the move that is under way. Changes nothing when none is.
    CancelReassignment {
        /// The partition.
        partition: TopicPartition,
    },
    /// Draws a producer id.
    AllocateProducerId,
    /// Puts a new replica in the place of one whose log is damaged, on the same broker; refused while the rest of the
    /// partition is not known to have everything without it. Changes nothing when the broker does not hold it any more.
    ReplaceDamaged {
        /// The partition.
        partition: TopicPartition,
        /// The damaged replica.
        replica: ReplicaId,
        /// The epoch of its last entry.
        epoch: LeaderEpoch,
    },
}

impl Command {
    /// The bytes proposed to Raft.
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(&(FORMAT, self))
    }

    /// Reads [`Command::to_bytes`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        check_format(bytes)?;
        decode::<(u8, Self)>(bytes).map(|(_, command)| command)
    }
}

/// The answer to a command that was not refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// To [`Command::InitCluster`]: the cluster's id, which may be an earlier one.
    Cluster(ClusterId),
    /// To [`Command::AllocateProducerId`].
    ProducerId(i64),
}

impl PlannedPartition {
    /// All brokers with a replica, the witness's last.
    pub fn brokers(&self) -> impl Iterator<Item = BrokerId> + '_ {
        self.replicas.iter().copied().chain(self.witness)
    }

    /// The replicas of the new partition, created at `epoch`.
    pub(super) fn assignment(&self, epoch: u32) -> Assignment {
        let data = |broker: &BrokerId| ReplicaId::new(*broker, ReplicaKind::Data, epoch);
        let witness = |broker: BrokerId| ReplicaId::new(broker, ReplicaKind::Witness, epoch);
        Assignment {
            replicas: self.replicas.iter().map(data).collect(),
            witness: self.witness.map(witness),
        }
    }
}

/// Refuses bytes of another version.
pub(super) fn check_format(bytes: &[u8]) -> Result<(), DecodeError> {
    match bytes.first() {
        Some(&FORMAT) => Ok(()),
        found => Err(DecodeError(format!(
            "metadata format {found:?} is not the known one, {FORMAT}; use a newer version"
        ))),
    }
}
