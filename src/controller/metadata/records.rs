//! What the metadata keeps of brokers, topics and partitions, and what one record can tell by itself.
//!
//! Owns no rule that needs a second record.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::reassign::Reassignment;
use crate::api::PartitionReport;
use crate::config::{TEXT_BYTES_MAX, TopicConfig};
use crate::types::{
    Assignment, BrokerId, Endpoint, Error, GroupId, Incarnation, LeaderEpoch, LogIndex,
    PartitionId, ReplicaId, ReplicaKind, TopicName,
};

/// A broker as the cluster knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerRecord {
    /// Where it is reached.
    pub endpoint: Endpoint,
    /// Its rack, if the operator named one.
    pub rack: Option<String>,
    /// Its data directory.
    pub incarnation: Incarnation,
    /// How often the directory had been opened when it registered last.
    pub boot: u64,
    /// Journal bytes the directory held at that registration.
    pub registered_position: u64,
    /// The most journal bytes it has ever reported as durable.
    pub position: u64,
    /// Its member of group 0.
    pub controller_replica: ReplicaId,
    /// Whether the controller hears it: else it gets no placements and no preferred leadership.
    pub alive: bool,
    /// Directories that this broker had before: their replicas were given up, so they must never come back.
    pub retired: BTreeMap<Incarnation, ReplicaId>,
}

/// A change of a partition's replicas under way.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Replacement {
    /// Tells it from every other change of this partition: the replica epoch drawn for it.
    pub number: u32,
    /// New replicas, in the assignment already, and those taken back into it.
    pub adding: BTreeSet<ReplicaId>,
    /// Old replicas on brokers that they move away from; each is kept until the change is finished. A copy that is lost or
    /// damaged is not among them.
    pub removing: BTreeSet<ReplicaId>,
}

/// A partition as the cluster knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionRecord {
    /// Its Raft group; never used for another partition.
    pub group: GroupId,
    /// The replicas it should have.
    pub assignment: Assignment,
    /// The replicas its group is created with; never changes, so that creating it twice is harmless.
    pub founding: Assignment,
    /// A change of replicas under way.
    pub replacement: Option<Replacement>,
    /// Where the replicas are being moved, when they are; `replacement` is the present step of it.
    pub reassignment: Option<Reassignment>,
    /// Who leads, as last reported.
    pub leader: Option<BrokerId>,
    /// In which epoch; 0 until a leader has reported.
    pub epoch: LeaderEpoch,
    /// Brokers in sync, as last reported.
    pub isr: Vec<BrokerId>,
}

impl PartitionRecord {
    /// The replica that `broker` should hold now: an assigned one, else one that is being removed.
    pub fn held_by(&self, broker: BrokerId) -> Option<ReplicaId> {
        self.assignment.on(broker).or_else(|| {
            let removing = self.replacement.iter().flat_map(|change| &change.removing);
            removing
                .copied()
                .filter(|replica| replica.broker() == broker)
                .max()
        })
    }

    /// The brokers with a data replica, the preferred leader first.
    pub fn replica_brokers(&self) -> Vec<BrokerId> {
        self.assignment
            .replicas
            .iter()
            .map(|replica| replica.broker())
            .collect()
    }

    /// Whether `broker` has, or still has, a data replica, and so may lead.
    pub(super) fn may_lead(&self, broker: BrokerId) -> bool {
        let removing = self
            .replacement
            .iter()
            .flat_map(|change| change.removing.iter().copied());
        let mut known = self.assignment.replicas.iter().copied().chain(removing);
        known.any(|replica| replica.broker() == broker && !replica.is_witness())
    }

    /// Puts `new` in the place of `old`.
    pub(super) fn replace(&mut self, old: ReplicaId, new: ReplicaId) {
        let places = self
            .assignment
            .replicas
            .iter_mut()
            .chain(&mut self.assignment.witness);
        for place in places.filter(|place| **place == old) {
            *place = new;
        }
        let change = self.replacement.get_or_insert_default();
        change.number = new.epoch();
        change.adding.remove(&old);
        change.adding.insert(new);
        if old.broker() != new.broker() {
            change.removing.insert(old);
        }
    }

    /// Gives `broker`, which came back with an empty data directory or found its log damaged, a new replica in the place of
    /// the one it lost.
    pub(super) fn replace_lost(&mut self, broker: BrokerId, epoch: u32) {
        if let Some(change) = &mut self.replacement {
            change.removing.retain(|replica| replica.broker() != broker);
        }
        if let Some(old) = self.assignment.on(broker) {
            self.replace(old, ReplicaId::new(broker, old.kind(), epoch));
        }
        self.leader = self.leader.filter(|leader| *leader != broker);
        self.isr.retain(|in_sync| *in_sync != broker);
    }

    /// Whether `report` shows that the change of replicas is complete: exactly the assigned replicas vote, and the new ones
    /// that hold data are in sync.
    pub(super) fn is_finished_by(&self, report: &PartitionReport) -> bool {
        let Some(change) = &self.replacement else {
            return false;
        };
        if change.number != report.change {
            return false; // it speaks of an earlier one
        }
        let wanted: BTreeSet<ReplicaId> = self.assignment.voters().collect();
        let voters: BTreeSet<ReplicaId> = report.voters.iter().copied().collect();
        let mut new_data = change.adding.iter().filter(|replica| !replica.is_witness());
        voters == wanted && new_data.all(|replica| report.isr.contains(&replica.broker()))
    }
}

/// A topic as the cluster knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicRecord {
    /// Tells it from an earlier or later topic of the same name: the log index of the command that created it.
    pub id: LogIndex,
    /// Its configuration where it differs from the default, as it was given.
    pub config: BTreeMap<String, String>,
    /// Its configuration, read.
    pub settings: TopicConfig,
    /// Its partitions, in order.
    pub partitions: Vec<Arc<PartitionRecord>>,
}

impl PartitionRecord {
    /// Whether a report of `broker` is news: not of an older epoch, and from a broker that can be the leader.
    pub(super) fn accepts(&self, broker: BrokerId, report: &PartitionReport) -> bool {
        let same_leader = self.leader.is_none_or(|leader| leader == broker);
        let newer = report.epoch > self.epoch || (report.epoch == self.epoch && same_leader);
        let in_sync: BTreeSet<BrokerId> = report.isr.iter().copied().collect();
        newer
            && self.may_lead(broker)
            && in_sync.len() == report.isr.len()
            && in_sync.iter().all(|broker| self.may_lead(*broker))
    }
}

impl BrokerRecord {
    /// Whether a data directory of this incarnation, opened for the `boot`th time with `position` journal bytes, can be the
    /// one that is known, and not an older copy of it. `Err` says what to do.
    pub(in crate::controller) fn check_not_older(
        &self,
        boot: u64,
        position: u64,
    ) -> Result<(), String> {
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::OldCopyAdmitted) {
            return Ok(());
        }
        let older = boot < self.boot || (boot > self.boot && position < self.position);
        if older {
            Err(self.old_copy_text())
        } else {
            Ok(())
        }
    }

    /// Whether this record shows that the process which opened directory `incarnation` for the `boot`th time was replaced by
    /// a later one. A record of *another* directory alone does not show it: an image from before the registration of this
    /// directory still has the one before, and a broker that comes back empty sees such images while it catches up.
    pub fn supersedes(&self, incarnation: Incarnation, boot: u64) -> bool {
        if self.incarnation == incarnation {
            self.boot > boot
        } else {
            self.retired.contains_key(&incarnation)
        }
    }

    pub(super) fn old_copy_text(&self) -> String {
        format!(
            "this is an old copy of the data directory of broker {0}: what it acknowledged since is missing; start broker \
             {0} from its newest data directory, or move this one away and start it empty: it will rejoin with new replicas",
            self.endpoint.broker
        )
    }

    pub(super) fn retired_text(&self) -> String {
        format!(
            "broker {} has another data directory now, and the replicas of this one were given up; move it away and start \
             the broker with its present directory, or empty",
            self.endpoint.broker
        )
    }
}

impl TopicRecord {
    /// The partitions with their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (PartitionId, &Arc<PartitionRecord>)> {
        (0_u32..).map(PartitionId).zip(&self.partitions)
    }

    /// Data replicas per partition; of the partition with the fewest when reassignments have made them differ.
    pub fn replication_factor(&self) -> u32 {
        let replicas = |record: &Arc<PartitionRecord>| record.assignment.replicas.len();
        let fewest = self.partitions.iter().map(replicas).min().unwrap_or(0);
        u32::try_from(fewest).unwrap_or(u32::MAX)
    }
}

/// Whether the parts of a registration are within bounds and fit together.
pub(super) fn check_registration(new: &BrokerRecord) -> Result<(), Error> {
    let invalid = |reason: String| Err(Error::InvalidRequest { reason });
    let address = &new.endpoint.address;
    let broker = new.endpoint.broker;
    if broker.0 > i32::MAX.unsigned_abs() {
        return invalid(format!(
            "broker id {broker} is too large, use 0 to {}",
            i32::MAX
        ));
    }
    if address.is_empty() || address.len() > TEXT_BYTES_MAX {
        return invalid(format!("an address has 1 to {TEXT_BYTES_MAX} bytes"));
    }
    if new
        .rack
        .as_ref()
        .is_some_and(|rack| rack.is_empty() || rack.len() > TEXT_BYTES_MAX)
    {
        return invalid(format!("a rack's name has 1 to {TEXT_BYTES_MAX} bytes"));
    }
    let epoch = new.incarnation.controller_epoch();
    if new.controller_replica != ReplicaId::new(broker, ReplicaKind::Data, epoch) {
        return invalid(format!(
            "{} is not of this data directory",
            new.controller_replica
        ));
    }
    Ok(())
}

/// Bytes that `topic` may come to in a checkpoint: never less, whatever happens to its partitions but another reassignment.
pub(super) fn weight(name: &TopicName, topic: &TopicRecord) -> u64 {
    let count = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
    let pairs: u64 = topic
        .config
        .iter()
        .map(|(k, v)| count(k.len() + v.len()) + 10)
        .sum();
    let partitions: u64 = topic.partitions.iter().map(|record| record.weight()).sum();
    count(name.as_str().len()) + 64 + pairs + partitions
}
