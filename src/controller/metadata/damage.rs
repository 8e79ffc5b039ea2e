//! A new replica in the place of one whose log is damaged, and when that costs nothing.
//!
//! Owns the rule. A damaged log is the last trace of whatever only it has, so it is given up, and deleted by its broker, only
//! when the others are known to have everything without it, and are enough to take a new replica in. Until then it stays where
//! it is, in quarantine, and its broker asks again.

use std::collections::BTreeSet;

use crate::types::{Error, LeaderEpoch, ReplicaId, TopicPartition};

use super::ClusterMetadata;
use super::command::Answer;
use super::records::PartitionRecord;

impl PartitionRecord {
    /// The replicas that vote before the present step of a change, as far as they are known; all when none is under way.
    fn voters_before_the_step(&self) -> BTreeSet<ReplicaId> {
        let mut voters: BTreeSet<ReplicaId> = self.assignment.voters().collect();
        if let Some(change) = &self.replacement {
            voters.retain(|replica| !change.adding.contains(replica));
            voters.extend(&change.removing);
        }
        voters
    }
}

impl ClusterMetadata {
    /// Whether the damaged `replica`, whose last entry is of `epoch`, is still held and has to be replaced; refused while it
    /// must stay.
    pub(in crate::controller) fn check_damaged(
        &self,
        partition: &TopicPartition,
        replica: ReplicaId,
        epoch: LeaderEpoch,
    ) -> Result<bool, Error> {
        let broker = replica.broker();
        let held = self.partition(partition);
        let Some(record) = held.filter(|record| record.held_by(broker) == Some(replica)) else {
            return Ok(false);
        };
        let refuse = |what: &str| {
            let reason =
                format!("the damaged replica {replica} of {partition} is not replaced now: {what}");
            Err(Error::Refused { reason })
        };
        let (before, after) = (
            record.voters_before_the_step(),
            record.assignment.voters().collect::<BTreeSet<_>>(),
        );
        let mut others = before.union(&after).filter(|other| **other != replica);
        if !others.any(|other| !other.is_witness()) {
            return refuse("there is no other copy; it stays as it is, see the manual");
        }
        let is_new = |replica: &ReplicaId| {
            let change = record.replacement.as_ref();
            change.is_some_and(|change| change.adding.contains(replica))
        };
        if !is_new(&replica) && after.iter().any(is_new) {
            return refuse("another replica is being made, and may need it");
        }
        match record.leader {
            Some(leader) if leader != broker && self.is_alive(leader) => {}
            _ => return refuse("no other broker that is alive leads"),
        }
        // It may have led later, and have committed what that leader has not.
        if record.epoch < epoch {
            return refuse("the leader has not been heard since it wrote its last entry");
        }
        if record.isr.contains(&broker) {
            return refuse("it still counts as in sync");
        }
        // A copy that is not in sync may be damaged as well, or lack what only this one and the leader have.
        let is_there = |voter: &&ReplicaId| {
            let whole = voter.is_witness() || record.isr.contains(&voter.broker());
            whole && self.is_alive(voter.broker())
        };
        let can_decide = |voters: &BTreeSet<ReplicaId>| {
            let others = voters.iter().filter(|voter| voter.broker() != broker);
            others.filter(is_there).count() * 2 > voters.len()
        };
        if !can_decide(&before) || !can_decide(&after) {
            return refuse("too few of the others are alive and in sync to take a new one in");
        }
        Ok(true)
    }

    pub(super) fn replace_damaged(
        &mut self,
        partition: &TopicPartition,
        replica: ReplicaId,
        epoch: LeaderEpoch,
    ) -> Result<Answer, Error> {
        if !self.check_damaged(partition, replica, epoch)? {
            return Ok(Answer::Done);
        }
        let number = self.next_replica_epoch()?;
        if let Some(record) = self.partition_mut(partition) {
            let before = record.weight();
            record.replace_lost(replica.broker(), number);
            let after = record.weight();
            self.topics_weight = self.topics_weight - before + after;
            self.last_replica_epoch = number;
        }
        Ok(Answer::Done)
    }
}
