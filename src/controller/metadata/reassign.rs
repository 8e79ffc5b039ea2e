//! Moving the replicas of a partition: from where they are to where they should be, in steps that are each safe by itself.
//!
//! Owns the steps. A step names the replicas that should be there after it; the ones that it adds catch up first, the ones
//! that it removes are kept, and vote, until the leader reports its end. A step has to be one that a broker can take, and a
//! broker holds one replica of a partition: where a witness stands in the way of a data replica it goes first, and comes
//! back elsewhere last. Does not choose brokers (`reassignment`) and does not change members (the reconciler does).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::types::{Assignment, BrokerId, Error, ReplicaId, ReplicaKind, TopicPartition};

use super::command::{Answer, PlannedPartition};
use super::records::{PartitionRecord, Replacement};
use super::{ClusterMetadata, TOPICS_WEIGHT_MAX, unknown_broker};

/// A move of a partition's replicas under way: begun by an operator, ended when they are there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reassignment {
    /// Where the replicas go.
    pub target: PlannedPartition,
    /// Where they were when nothing was under way: where a cancelled move goes back to.
    pub origin: PlannedPartition,
}

impl PartitionRecord {
    /// The brokers of the assigned replicas.
    pub fn placement(&self) -> PlannedPartition {
        PlannedPartition {
            replicas: self.replica_brokers(),
            witness: self.assignment.witness.map(ReplicaId::broker),
        }
    }

    /// Where the replicas are, or are on their way to.
    pub fn destination(&self) -> PlannedPartition {
        let target = self.reassignment.as_ref().map(|moving| &moving.target);
        target.cloned().unwrap_or_else(|| self.placement())
    }

    /// The data replicas that are being removed, on brokers that are not known to have lost them.
    pub fn leaving(&self) -> BTreeSet<ReplicaId> {
        let removing = self.replacement.iter().flat_map(|change| &change.removing);
        removing
            .copied()
            .filter(|replica| !replica.is_witness())
            .collect()
    }

    /// The brokers that get a data replica and do not have it in full yet, in the order of preference.
    pub fn adding_brokers(&self) -> Vec<BrokerId> {
        let is_new = |replica: ReplicaId| {
            let change = self.replacement.as_ref();
            change.is_some_and(|change| change.adding.contains(&replica))
        };
        let has_it = |broker: &BrokerId| {
            self.held_by(*broker)
                .is_some_and(|replica| !replica.is_witness() && !is_new(replica))
        };
        let target = self.destination().replicas.into_iter();
        target.filter(|broker| !has_it(broker)).collect()
    }

    /// The brokers whose data replicas go away.
    pub fn removing_brokers(&self) -> Vec<BrokerId> {
        let target = self.destination().replicas;
        let assigned = self.assignment.replicas.iter().copied();
        let brokers = assigned.chain(self.leaving()).map(ReplicaId::broker);
        brokers.filter(|broker| !target.contains(broker)).collect()
    }

    /// Most replicas that it has, or had, or gets.
    fn slots(&self) -> usize {
        let moving = self.reassignment.iter();
        let planned = moving.flat_map(|moving| [&moving.target, &moving.origin]);
        planned
            .map(|planned| planned.brokers().count())
            .chain([self.founding.voters().count()])
            .fold(self.assignment.voters().count(), usize::max)
    }

    /// Bytes that it may come to in a checkpoint, whatever its state: founding and assigned replicas, those being added and
    /// twice as many being removed; target, origin, and three in sync for each.
    pub(super) fn weight(&self) -> u64 {
        let slots = u64::try_from(self.slots()).unwrap_or(u64::MAX);
        32 + slots.saturating_mul(5 * 9 + 5 * 5)
    }

    /// The data replicas that the present step does not add, with those that it removes; as many as are assigned.
    fn replicas_before_the_step(&self) -> Vec<ReplicaId> {
        let leaving = self.leaving();
        let change = self.replacement.as_ref();
        let is_new = |replica: &ReplicaId| {
            !leaving.is_empty() && change.is_some_and(|change| change.adding.contains(replica))
        };
        let assigned = &self.assignment.replicas;
        let (new, old): (Vec<ReplicaId>, Vec<ReplicaId>) =
            assigned.iter().copied().partition(is_new);
        let missing = assigned.len().saturating_sub(old.len() + leaving.len());
        let new = new.into_iter().take(missing);
        old.into_iter().chain(leaving).chain(new).collect()
    }

    /// The replicas of the next step towards `target`; new ones are created at `epoch`.
    fn next_assignment(&self, target: &PlannedPartition, epoch: u32) -> Assignment {
        let holds = |broker: BrokerId, kind: ReplicaKind| {
            let held = self.held_by(broker);
            held.filter(|replica| replica.kind() == kind)
        };
        let replica = |broker: BrokerId, kind: ReplicaKind| {
            holds(broker, kind).unwrap_or_else(|| ReplicaId::new(broker, kind, epoch))
        };
        let has_data = |broker: BrokerId| holds(broker, ReplicaKind::Data).is_some();
        let has_witness = |broker: &BrokerId| holds(*broker, ReplicaKind::Witness).is_some();
        let room = target.witness.filter(|broker| !has_data(*broker));
        if target.replicas.iter().any(has_witness) {
            return Assignment {
                replicas: self.replicas_before_the_step(),
                witness: room.map(|broker| replica(broker, ReplicaKind::Witness)),
            };
        }
        let data = |broker: &BrokerId| replica(*broker, ReplicaKind::Data);
        let witness = match (target.witness, room) {
            (Some(_), Some(broker)) => Some(replica(broker, ReplicaKind::Witness)),
            // A data replica has to go from there first.
            (Some(_), None) => self.assignment.witness,
            (None, _) => None,
        };
        Assignment {
            replicas: target.replicas.iter().map(data).collect(),
            witness,
        }
    }

    /// Begins the next step towards `target`, from whatever is under way. What is held stays held: it is removed when the
    /// step ends, by which time it is no member any more.
    fn begin_step(&mut self, target: &PlannedPartition, epoch: u32) {
        let next = self.next_assignment(target, epoch);
        let change = self.replacement.take().unwrap_or_default();
        let before: BTreeSet<ReplicaId> = self.assignment.voters().collect();
        let wanted: BTreeSet<ReplicaId> = next.voters().collect();
        let at_rest: BTreeSet<ReplicaId> = before.difference(&change.adding).copied().collect();
        let held: BTreeSet<ReplicaId> = before.union(&change.removing).copied().collect();
        let begun = Replacement {
            number: epoch,
            adding: wanted.difference(&at_rest).copied().collect(),
            removing: held.difference(&wanted).copied().collect(),
        };
        self.assignment = next;
        let is_change = !begun.adding.is_empty() || !begun.removing.is_empty();
        self.replacement = is_change.then_some(begun);
        self.note_arrival();
    }

    /// A move that has come to its target, with nothing left to do, is over.
    fn note_arrival(&mut self) {
        let target = self.reassignment.as_ref().map(|moving| &moving.target);
        if self.replacement.is_none() && target.is_some_and(|target| *target == self.placement()) {
            self.reassignment = None;
        }
    }

    /// The present step has ended: begins the next one, if there is one, with the replica epoch `epoch`. Returns it when it
    /// was used.
    pub(super) fn end_step(&mut self, epoch: Option<u32>) -> Option<u32> {
        self.replacement = None;
        self.note_arrival();
        let target = self.reassignment.as_ref()?.target.clone();
        let epoch = epoch?;
        self.begin_step(&target, epoch);
        Some(epoch)
    }
}

impl ClusterMetadata {
    pub(super) fn reassign(
        &mut self,
        partition: &TopicPartition,
        target: PlannedPartition,
    ) -> Result<Answer, Error> {
        self.check_partition(partition)?;
        self.check_target(partition, &target)?;
        let known = self.partition(partition).map(|record| {
            let moving = record.reassignment.as_ref();
            let origin = moving.map_or_else(|| record.placement(), |moving| moving.origin.clone());
            (record.destination() == target, origin)
        });
        match known {
            Some((false, origin)) => self.redirect(partition, Reassignment { target, origin }),
            _ => Ok(Answer::Done),
        }
    }

    pub(super) fn cancel_reassignment(
        &mut self,
        partition: &TopicPartition,
    ) -> Result<Answer, Error> {
        self.check_partition(partition)?;
        let moving = self.partition(partition);
        let moving = moving.and_then(|record| record.reassignment.clone());
        match moving {
            Some(moving) if moving.target != moving.origin => {
                let target = moving.origin.clone();
                self.redirect(partition, Reassignment { target, ..moving })
            }
            _ => Ok(Answer::Done),
        }
    }

    /// Sends the replicas elsewhere, from wherever they are.
    fn redirect(&mut self, partition: &TopicPartition, to: Reassignment) -> Result<Answer, Error> {
        let refuse = |reason: String| Err(Error::Refused { reason });
        let epoch = self.next_replica_epoch()?;
        let Some(known) = self.partition(partition) else {
            return Ok(Answer::Done);
        };
        let mut record = (**known).clone();
        let before = record.weight();
        let target = to.target.clone();
        record.reassignment = Some(to);
        record.begin_step(&target, epoch);
        let removing = record.replacement.as_ref().map(|step| step.removing.len());
        if removing.unwrap_or(0) > 2 * record.slots() {
            return refuse(format!(
                "the replicas of {partition} have been sent to too many places at once; wait until the move under way has \
                 ended, see `logboom topic describe {}`",
                partition.topic
            ));
        }
        // What it weighs until it has arrived, which may be at once.
        let after = record.weight();
        let weight = self.topics_weight - before + after;
        if weight > TOPICS_WEIGHT_MAX && after > before {
            return refuse(
                "the cluster has as many replicas as it can keep track of; delete a topic"
                    .to_owned(),
            );
        }
        if let Some(known) = self.partition_mut(partition) {
            *known = record;
        }
        self.topics_weight = weight;
        self.last_replica_epoch = epoch;
        Ok(Answer::Done)
    }

    fn check_target(
        &self,
        partition: &TopicPartition,
        target: &PlannedPartition,
    ) -> Result<(), Error> {
        let invalid = |reason: String| Err(Error::InvalidRequest { reason });
        let brokers: BTreeSet<BrokerId> = target.brokers().collect();
        let copies = target.replicas.len();
        if copies == 0 {
            return invalid("a partition has at least one replica: name its brokers".to_owned());
        }
        if brokers.len() != target.brokers().count() {
            return invalid(
                "a broker holds at most one replica of a partition: name each once".to_owned(),
            );
        }
        if let Some(stranger) = brokers.iter().find(|id| !self.brokers.contains_key(id)) {
            return Err(unknown_broker(*stranger));
        }
        if target.witness.is_some() && !copies.is_multiple_of(2) {
            return invalid(format!("{copies} copies need no witness"));
        }
        let topic = self.topic(&partition.topic);
        let min = topic.map_or(1, |topic| topic.settings.min_insync_replicas);
        if u32::try_from(copies).is_ok_and(|copies| copies < min) {
            return invalid(format!(
                "{} has min.insync.replicas {min}: {copies} copies could take no writes; name at least {min} brokers",
                partition.topic
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
