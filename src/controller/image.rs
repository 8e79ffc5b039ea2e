//! Questions to an image of the metadata. Owns nothing and changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::api::{BrokerView, PartitionRoute, TopicRoute};
use crate::net::Identity;
use crate::types::{
    BrokerId, ClusterId, Endpoint, Error, GroupId, ReplicaId, TopicName, TopicPartition,
};

use super::metadata::{BrokerRecord, ClusterMetadata, PartitionRecord, TopicRecord};

impl ClusterMetadata {
    /// The cluster's id, once it has one.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// The registered brokers, in order.
    pub fn brokers(&self) -> impl Iterator<Item = (BrokerId, &BrokerRecord)> {
        self.brokers.iter().map(|(id, record)| (*id, record))
    }

    /// A registered broker.
    pub fn broker(&self, broker: BrokerId) -> Option<&BrokerRecord> {
        self.brokers.get(&broker)
    }

    /// Whether `broker` is registered and the controller hears it.
    pub fn is_alive(&self, broker: BrokerId) -> bool {
        self.broker(broker).is_some_and(|record| record.alive)
    }

    /// Where the registered brokers are reached.
    pub fn endpoints(&self) -> impl Iterator<Item = Endpoint> {
        self.brokers.values().map(|record| record.endpoint.clone())
    }

    /// Where `broker` is reached.
    pub fn endpoint(&self, broker: BrokerId) -> Option<Endpoint> {
        self.broker(broker).map(|record| record.endpoint.clone())
    }

    /// Whether a process with this identity may take part. Refused: another cluster's, a known broker with another data
    /// directory than the registered one, and an older copy of that directory. A broker that is not known yet may, so that
    /// the controller's group can be founded.
    pub fn admits(&self, identity: &Identity) -> Result<(), String> {
        if let (Some(ours), Some(theirs)) = (self.cluster, identity.cluster)
            && ours != theirs
        {
            return Err(format!(
                "it belongs to cluster {theirs}, this is cluster {ours}"
            ));
        }
        let Some(known) = self.broker(identity.broker) else {
            return Ok(());
        };
        if known.incarnation != identity.incarnation {
            return Err(format!(
                "broker {} is registered with another data directory; start it with that one, or register this one when \
                 that one is lost",
                identity.broker
            ));
        }
        known.check_not_older(identity.boot, identity.position)
    }

    /// As [`ClusterMetadata::admits`], on a broker whose own registration this image does not show yet: it may be as old as
    /// that broker's last run, and another broker may have come back with a new data directory since. Refusing that one
    /// could cut this broker off from the leader that has the news; only a directory known to be given up is refused.
    pub fn admits_while_old(&self, identity: &Identity) -> Result<(), String> {
        let is_unheard_of = self.broker(identity.broker).is_some_and(|known| {
            known.incarnation != identity.incarnation
                && !known.retired.contains_key(&identity.incarnation)
        });
        match self.cluster {
            Some(ours) if identity.cluster.is_some_and(|theirs| theirs != ours) => {
                self.admits(identity)
            }
            _ if is_unheard_of => Ok(()),
            _ => self.admits(identity),
        }
    }

    /// The topics, in order of their names.
    pub fn topics(&self) -> impl Iterator<Item = (&TopicName, &Arc<TopicRecord>)> {
        self.topics.iter()
    }

    /// A topic.
    pub fn topic(&self, name: &TopicName) -> Option<&Arc<TopicRecord>> {
        self.topics.get(name)
    }

    /// Whether the topic exists.
    pub fn has_topic(&self, name: &TopicName) -> bool {
        self.topics.contains_key(name)
    }

    /// All partitions, by topic and number.
    pub fn partitions(&self) -> impl Iterator<Item = (TopicPartition, &Arc<PartitionRecord>)> {
        self.topics.iter().flat_map(|(name, topic)| {
            topic.numbered().map(|(partition, record)| {
                (
                    TopicPartition {
                        topic: name.clone(),
                        partition,
                    },
                    record,
                )
            })
        })
    }

    /// A partition.
    pub fn partition(&self, name: &TopicPartition) -> Option<&Arc<PartitionRecord>> {
        let place = usize::try_from(name.partition.0).ok()?;
        self.topics.get(&name.topic)?.partitions.get(place)
    }

    /// The partition of a group.
    pub fn partition_of(&self, group: GroupId) -> Option<&TopicPartition> {
        self.groups.get(&group)
    }

    /// What `broker` should hold: partition, its record, and the replica.
    pub fn replicas_on(
        &self,
        broker: BrokerId,
    ) -> impl Iterator<Item = (TopicPartition, &Arc<PartitionRecord>, ReplicaId)> {
        self.partitions().filter_map(move |(name, record)| {
            record
                .held_by(broker)
                .map(|replica| (name, record, replica))
        })
    }

    /// Whether the partition exists; the error names what does not.
    pub fn check_partition(&self, name: &TopicPartition) -> Result<(), Error> {
        let Some(topic) = self.topic(&name.topic) else {
            return Err(Error::UnknownTopic {
                topic: name.topic.clone(),
            });
        };
        if self.partition(name).is_none() {
            return Err(Error::UnknownPartition {
                topic: name.topic.clone(),
                partition: name.partition,
                partitions: u32::try_from(topic.partitions.len()).unwrap_or(u32::MAX),
            });
        }
        Ok(())
    }

    /// Who led the partition as last reported, alive or not: a hint.
    pub fn leader_of(&self, name: &TopicPartition) -> Option<BrokerId> {
        self.partition(name)?.leader
    }

    /// Whether every partition of the topic has a leader that is alive; not when there is no such topic.
    pub fn all_led(&self, name: &TopicName) -> bool {
        self.topic(name).is_some_and(|topic| {
            topic
                .partitions
                .iter()
                .all(|record| self.live_leader(record).is_some())
        })
    }

    fn live_leader(&self, record: &PartitionRecord) -> Option<BrokerId> {
        record.leader.filter(|leader| self.is_alive(*leader))
    }

    /// The witness's broker.
    pub fn witness_of(&self, name: &TopicPartition) -> Option<BrokerId> {
        self.partition(name)?
            .assignment
            .witness
            .map(ReplicaId::broker)
    }

    /// Data replicas per partition of the topic, see [`TopicRecord::replication_factor`]; 0 when there is no such topic.
    pub fn replication_factor(&self, name: &TopicName) -> u32 {
        self.topic(name)
            .map_or(0, |topic| topic.replication_factor())
    }

    /// The topics asked for, for routing; all when `names` is `None`. Unknown ones are left out. A leader that the
    /// controller does not hear is not named.
    pub fn routes(&self, names: Option<&[TopicName]>) -> Vec<TopicRoute> {
        let route = |(name, topic): (&TopicName, &Arc<TopicRecord>)| TopicRoute {
            name: name.clone(),
            partitions: topic
                .numbered()
                .map(|(partition, record)| PartitionRoute {
                    partition,
                    leader: self.live_leader(record),
                    epoch: record.epoch,
                    replicas: record.replica_brokers(),
                    isr: record.isr.clone(),
                })
                .collect(),
            config: topic.config.clone(),
        };
        match names {
            None => self.topics.iter().map(route).collect(),
            Some(names) => {
                let unique: BTreeSet<&TopicName> = names.iter().collect();
                unique
                    .into_iter()
                    .filter_map(|name| self.topics.get_key_value(name))
                    .map(route)
                    .collect()
            }
        }
    }

    /// The registered brokers with what they lead and hold. Who votes in group 0 is not known here: none, until filled in.
    pub fn broker_views(&self) -> Vec<BrokerView> {
        let mut leads: BTreeMap<BrokerId, u32> = BTreeMap::new();
        let mut replicas: BTreeMap<BrokerId, u32> = BTreeMap::new();
        for record in self.topics.values().flat_map(|topic| &topic.partitions) {
            if let Some(leader) = self.live_leader(record) {
                *leads.entry(leader).or_default() += 1;
            }
            for replica in &record.assignment.replicas {
                *replicas.entry(replica.broker()).or_default() += 1;
            }
        }
        let view = |(id, record): (&BrokerId, &BrokerRecord)| BrokerView {
            broker: *id,
            address: record.endpoint.address.clone(),
            rack: record.rack.clone(),
            alive: record.alive,
            controller_voter: false,
            leads: leads.get(id).copied().unwrap_or(0),
            replicas: replicas.get(id).copied().unwrap_or(0),
        };
        self.brokers.iter().map(view).collect()
    }
}
