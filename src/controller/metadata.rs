//! The cluster's metadata: what there should be, as a deterministic state machine.
//!
//! Owns brokers, topics, assignments, the identities of replicas, and the commands that change them. A command is a
//! function of the state and the command alone: no clock, no chance, no I/O; a refusal is a value and changes nothing.
//! Leaders and in-sync replicas are kept here as last reported, for everyone to see; they decide nothing.
//! Does not place replicas (`placement`) and does not talk to Raft (`machine`).

mod command;
mod damage;
mod reassign;
mod records;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::api::PartitionReport;
use crate::config::TopicConfig;
use crate::types::{
    BrokerId, ClusterId, DecodeError, Error, GroupId, LeaderEpoch, LogIndex, PartitionId,
    ReplicaId, TopicName, TopicPartition, decode, encode,
};

pub use command::{Answer, Command, PlannedPartition};
pub use reassign::Reassignment;
pub use records::{BrokerRecord, PartitionRecord, Replacement, TopicRecord};

use command::{FORMAT, check_format};
use records::{check_registration, weight};

/// Most brokers of a cluster.
pub const BROKERS_MAX: usize = 1_000;
/// Most bytes that the encoded topics may come to by [`weight`]'s estimate, which is never too low: the whole state must fit
/// into one checkpoint.
const TOPICS_WEIGHT_MAX: u64 = 12 << 20;

/// Numbers that are drawn one by one never come near this: a state that has is none.
const GROUPS_MAX: u64 = u64::MAX / 2;

/// The metadata after some command: an image. Cloning is cheap, topics are shared.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClusterMetadata {
    pub(super) cluster: Option<ClusterId>,
    pub(super) brokers: BTreeMap<BrokerId, BrokerRecord>,
    pub(super) topics: Arc<BTreeMap<TopicName, Arc<TopicRecord>>>,
    /// Derived from `topics`.
    #[serde(skip)]
    pub(super) groups: Arc<BTreeMap<GroupId, TopicPartition>>,
    /// The group id drawn last; 0 is the controller's own.
    last_group: GroupId,
    /// The replica epoch drawn last: one per command that creates replicas, so that no two replicas of one group on one
    /// broker share it.
    last_replica_epoch: u32,
    next_producer_id: i64,
    topics_weight: u64,
}

impl ClusterMetadata {
    /// The state as bytes, for a checkpoint.
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(&(FORMAT, self))
    }

    /// Reads [`ClusterMetadata::to_bytes`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        check_format(bytes)?;
        let (_, mut state) = decode::<(u8, Self)>(bytes)?;
        let mut groups = BTreeMap::new();
        for (name, topic) in state.topics.iter() {
            for (partition, record) in topic.numbered() {
                groups.insert(
                    record.group,
                    TopicPartition {
                        topic: name.clone(),
                        partition,
                    },
                );
            }
        }
        let drawn = groups.keys().all(|group| *group <= state.last_group);
        if !drawn || state.last_group.0 > GROUPS_MAX {
            return Err(DecodeError(format!(
                "metadata whose groups are numbered up to {}, or beyond that",
                state.last_group
            )));
        }
        state.groups = Arc::new(groups);
        Ok(state)
    }

    /// Applies the command at `index` of the controller's log. An error changes nothing.
    pub fn apply(&mut self, index: LogIndex, command: Command) -> Result<Answer, Error> {
        match command {
            Command::InitCluster { cluster } => {
                Ok(Answer::Cluster(*self.cluster.get_or_insert(cluster)))
            }
            _ if self.cluster.is_none() => Err(Error::ControllerUnavailable),
            Command::RegisterBroker {
                endpoint,
                rack,
                incarnation,
                boot,
                position,
                controller_replica,
            } => {
                let record = BrokerRecord {
                    endpoint,
                    rack,
                    incarnation,
                    boot,
                    registered_position: position,
                    position,
                    controller_replica,
                    alive: true,
                    retired: BTreeMap::new(),
                };
                self.register(record)
            }
            Command::SetAlive { broker, alive } => {
                let Some(record) = self.brokers.get_mut(&broker) else {
                    return Err(unknown_broker(broker));
                };
                record.alive = alive;
                Ok(Answer::Done)
            }
            Command::ReportPartitions {
                broker,
                reports,
                position,
            } => self.report(broker, reports, position),
            Command::CreateTopic {
                name,
                config,
                settings,
                partitions,
            } => self.create_topic(index, name, config, settings, partitions),
            Command::DeleteTopic { name } => self.delete_topic(name),
            Command::ReassignPartition { partition, target } => self.reassign(&partition, target),
            Command::CancelReassignment { partition } => self.cancel_reassignment(&partition),
            Command::AllocateProducerId => {
                let id = self.next_producer_id;
                let Some(next) = id.checked_add(1) else {
                    return Err(Error::Refused {
                        reason: "producer ids are used up".to_owned(),
                    });
                };
                self.next_producer_id = next;
                Ok(Answer::ProducerId(id))
            }
            Command::ReplaceDamaged {
                partition,
                replica,
                epoch,
            } => self.replace_damaged(&partition, replica, epoch),
        }
    }

    fn register(&mut self, mut new: BrokerRecord) -> Result<Answer, Error> {
        let broker = new.endpoint.broker;
        check_registration(&new)?;
        let Some(known) = self.brokers.get(&broker) else {
            if self.brokers.len() >= BROKERS_MAX {
                let reason = format!("the cluster has {BROKERS_MAX} brokers, more are not allowed");
                return Err(Error::Refused { reason });
            }
            self.brokers.insert(broker, new);
            return Ok(Answer::Done);
        };
        new.retired.clone_from(&known.retired);
        if known.incarnation == new.incarnation {
            // A process that moves elsewhere has opened its directory again.
            let retried = new.boot == known.boot
                && new.position == known.registered_position
                && new.endpoint == known.endpoint;
            if !retried {
                let (boot, position) = (new.boot, new.position);
                known
                    .check_not_older(boot, position)
                    .map_err(|reason| Error::Refused { reason })?;
                if boot == known.boot {
                    return Err(Error::Refused {
                        reason: known.old_copy_text(),
                    });
                }
            }
            new.position = new.position.max(known.position);
            self.brokers.insert(broker, new);
            return Ok(Answer::Done);
        }
        if known.alive {
            let address = known.endpoint.address.clone();
            return Err(Error::BrokerRunning { broker, address });
        }
        new.retired
            .insert(known.incarnation, known.controller_replica);
        let was_retired = new.retired.iter().any(|(incarnation, replica)| {
            *incarnation == new.incarnation || *replica == new.controller_replica
        });
        if was_retired {
            return Err(Error::Refused {
                reason: known.retired_text(),
            });
        }
        let epoch = self.next_replica_epoch()?;
        new.retired
            .insert(known.incarnation, known.controller_replica);
        self.brokers.insert(broker, new);
        self.last_replica_epoch = epoch;
        for topic in Arc::make_mut(&mut self.topics).values_mut() {
            let is_affected = |record: &Arc<PartitionRecord>| record.held_by(broker).is_some();
            if !topic.partitions.iter().any(is_affected) {
                continue;
            }
            let records = &mut Arc::make_mut(topic).partitions;
            for record in records.iter_mut().filter(|record| is_affected(record)) {
                Arc::make_mut(record).replace_lost(broker, epoch);
            }
        }
        Ok(Answer::Done)
    }

    fn report(
        &mut self,
        broker: BrokerId,
        reports: Vec<PartitionReport>,
        position: u64,
    ) -> Result<Answer, Error> {
        let Some(record) = self.brokers.get_mut(&broker) else {
            return Err(unknown_broker(broker));
        };
        record.position = record.position.max(position);
        for report in reports {
            let epoch = self.next_replica_epoch().ok();
            let accepted = self
                .partition(&report.partition)
                .is_some_and(|known| known.accepts(broker, &report));
            let Some(known) = self.partition_mut(&report.partition).filter(|_| accepted) else {
                continue;
            };
            let before = known.weight();
            let drawn = if known.is_finished_by(&report) {
                known.end_step(epoch)
            } else {
                None
            };
            known.leader = Some(broker);
            known.epoch = report.epoch;
            known.isr = report.isr;
            let after = known.weight();
            self.topics_weight = self.topics_weight - before + after;
            self.last_replica_epoch = drawn.unwrap_or(self.last_replica_epoch);
        }
        Ok(Answer::Done)
    }

    fn create_topic(
        &mut self,
        index: LogIndex,
        name: TopicName,
        config: BTreeMap<String, String>,
        settings: TopicConfig,
        partitions: Vec<PlannedPartition>,
    ) -> Result<Answer, Error> {
        if self.topics.contains_key(&name) {
            return Err(Error::TopicExists { topic: name });
        }
        self.check_plan(&partitions)?;
        let epoch = self.next_replica_epoch()?;
        let mut group = self.last_group;
        let mut numbers = 0_u32..;
        let mut groups = Vec::with_capacity(partitions.len());
        let records = partitions.into_iter().map(|planned| {
            group = GroupId(group.0 + 1);
            let partition = PartitionId(numbers.next().unwrap_or(u32::MAX));
            groups.push((
                group,
                TopicPartition {
                    topic: name.clone(),
                    partition,
                },
            ));
            let assignment = planned.assignment(epoch);
            Arc::new(PartitionRecord {
                group,
                founding: assignment.clone(),
                assignment,
                replacement: None,
                reassignment: None,
                leader: None,
                epoch: LeaderEpoch(0),
                isr: Vec::new(),
            })
        });
        let topic = TopicRecord {
            id: index,
            config,
            settings,
            partitions: records.collect(),
        };
        let topic_weight = weight(&name, &topic);
        if self.topics_weight.saturating_add(topic_weight) > TOPICS_WEIGHT_MAX {
            let reason =
                "the cluster has as many partitions as it can keep track of; delete a topic";
            return Err(Error::Refused {
                reason: reason.to_owned(),
            });
        }
        self.topics_weight += topic_weight;
        self.last_replica_epoch = epoch;
        self.last_group = group;
        Arc::make_mut(&mut self.groups).extend(groups);
        Arc::make_mut(&mut self.topics).insert(name, Arc::new(topic));
        Ok(Answer::Done)
    }

    fn check_plan(&self, partitions: &[PlannedPartition]) -> Result<(), Error> {
        let invalid = |reason: String| Err(Error::InvalidRequest { reason });
        let Some(first) = partitions.first() else {
            return invalid("a topic has at least one partition".to_owned());
        };
        if first.replicas.is_empty() {
            return invalid("a partition has at least one replica".to_owned());
        }
        for planned in partitions {
            let brokers: BTreeSet<BrokerId> = planned.brokers().collect();
            if planned.replicas.len() != first.replicas.len() {
                return invalid("all partitions of a topic have as many replicas".to_owned());
            }
            if brokers.len() != planned.brokers().count() {
                return invalid("a broker holds at most one replica of a partition".to_owned());
            }
            if let Some(stranger) = brokers.iter().find(|id| !self.brokers.contains_key(id)) {
                return Err(unknown_broker(*stranger));
            }
        }
        Ok(())
    }

    fn delete_topic(&mut self, name: TopicName) -> Result<Answer, Error> {
        let Some(topic) = Arc::make_mut(&mut self.topics).remove(&name) else {
            return Err(Error::UnknownTopic { topic: name });
        };
        self.topics_weight = self.topics_weight.saturating_sub(weight(&name, &topic));
        let groups = Arc::make_mut(&mut self.groups);
        for record in &topic.partitions {
            groups.remove(&record.group);
        }
        Ok(Answer::Done)
    }

    fn next_replica_epoch(&self) -> Result<u32, Error> {
        self.last_replica_epoch
            .checked_add(1)
            .ok_or_else(|| Error::Refused {
                reason: "replica epochs are used up".to_owned(),
            })
    }

    /// Whether `replica` had been created when this image was made. An image that does not know a replica is older than
    /// the replica, and says nothing about it.
    pub fn knows(&self, replica: ReplicaId) -> bool {
        replica.epoch() <= self.last_replica_epoch
    }

    fn partition_mut(&mut self, name: &TopicPartition) -> Option<&mut PartitionRecord> {
        let place = usize::try_from(name.partition.0).ok()?;
        let topic = Arc::make_mut(&mut self.topics).get_mut(&name.topic)?;
        Arc::make_mut(topic)
            .partitions
            .get_mut(place)
            .map(Arc::make_mut)
    }
}

fn unknown_broker(broker: BrokerId) -> Error {
    Error::InvalidRequest {
        reason: format!("broker {broker} is not registered"),
    }
}

#[cfg(test)]
pub(crate) mod tests;
