//! Who is a member of group 0. Pure: the next step from the members there are towards the members there should be.
//!
//! Owns no state: every step is computed anew from the image and the group's status, so that any leader can go on where
//! another one stopped. Every registered broker learns; an odd number of them, five at most, vote.

use std::collections::{BTreeMap, BTreeSet};

use crate::raft::GroupStatus;
use crate::types::{BrokerId, ReplicaId};

use super::metadata::ClusterMetadata;

/// One change of group 0's membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberStep {
    /// Let this replica learn.
    AddLearner(ReplicaId),
    /// Let exactly these vote.
    ChangeVoters(BTreeSet<ReplicaId>),
    /// Drop the learner of a data directory that its broker no longer has.
    RemoveLearner(ReplicaId),
}

/// The next step, if one is due. `bootstrap` brokers are preferred as voters; `is_ready` tells whether a learner is alive and
/// has caught up.
///
/// A broker that came back with an empty data directory has a new replica: its old one is taken out of the voters in the
/// same change that brings a replacement in, so the number of voters does not fall meanwhile.
pub fn next_step(
    image: &ClusterMetadata,
    status: &GroupStatus,
    bootstrap: &[BrokerId],
    voters_max: usize,
    is_ready: impl Fn(ReplicaId) -> bool,
) -> Option<MemberStep> {
    let registered: BTreeMap<BrokerId, ReplicaId> = image
        .brokers()
        .map(|(id, record)| (id, record.controller_replica))
        .collect();
    let is_member = |replica| status.voters.contains(replica) || status.learners.contains(replica);
    if let Some(missing) = registered.values().find(|replica| !is_member(replica)) {
        return Some(MemberStep::AddLearner(*missing));
    }
    // A voter whose broker has not registered is a founder that is still starting.
    let is_current = |member: &&ReplicaId| {
        registered
            .get(&member.broker())
            .is_none_or(|now| now == *member)
    };
    let valid: BTreeSet<ReplicaId> = status.voters.iter().filter(is_current).copied().collect();
    let brokers: BTreeSet<BrokerId> = registered
        .keys()
        .copied()
        .chain(valid.iter().map(|voter| voter.broker()))
        .collect();
    let target = largest_odd(brokers.len().min(voters_max));
    let mut wanted = valid.clone();
    let mut candidates: Vec<ReplicaId> = registered
        .values()
        .copied()
        .filter(|replica| !valid.contains(replica) && is_ready(*replica))
        .collect();
    candidates.sort_by_key(|replica| (!bootstrap.contains(&replica.broker()), *replica));
    let room = target.saturating_sub(wanted.len());
    wanted.extend(candidates.into_iter().take(room));
    let has_stale = valid.len() < status.voters.len();
    let grows = wanted.len() > valid.len();
    // An even number of voters survives no more failures than the odd number below it: do not stop there on the way up.
    if !has_stale && grows && wanted.len() < target && wanted.len().is_multiple_of(2) {
        wanted.pop_last();
    }
    let changes = wanted != status.voters || status.is_joint;
    let shrinks_too_far = has_stale && wanted.len() < target.min(status.voters.len());
    let due = !wanted.is_empty() && changes && (!shrinks_too_far || status.is_joint);
    if due {
        return Some(MemberStep::ChangeVoters(wanted));
    }
    let stale = status.learners.iter().find(|learner| !is_current(learner));
    stale.map(|learner| MemberStep::RemoveLearner(*learner))
}

fn largest_odd(count: usize) -> usize {
    if count.is_multiple_of(2) {
        count.saturating_sub(1)
    } else {
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::metadata::Command;
    use crate::types::{ClusterId, Endpoint, Incarnation, LogIndex, ReplicaKind};

    fn replica(broker: u32, incarnation: u32) -> ReplicaId {
        ReplicaId::new(BrokerId(broker), ReplicaKind::Data, incarnation)
    }

    fn image(brokers: &[(u32, u32)]) -> ClusterMetadata {
        let mut image = ClusterMetadata::default();
        let init = Command::InitCluster {
            cluster: ClusterId(1),
        };
        image.apply(LogIndex(1), init).unwrap();
        for (broker, incarnation) in brokers {
            let register = Command::RegisterBroker {
                endpoint: Endpoint {
                    broker: BrokerId(*broker),
                    address: "h:1".to_owned(),
                },
                rack: None,
                incarnation: Incarnation((*incarnation).into()),
                boot: 1,
                position: 0,
                controller_replica: replica(*broker, *incarnation),
            };
            image.apply(LogIndex(2), register).unwrap();
        }
        image
    }

    fn set(replicas: &[(u32, u32)]) -> BTreeSet<ReplicaId> {
        replicas
            .iter()
            .map(|(broker, incarnation)| replica(*broker, *incarnation))
            .collect()
    }

    type Members<'a> = &'a [(u32, u32)];
    type Row<'a> = (
        &'a str,
        Members<'a>,
        Members<'a>,
        Members<'a>,
        bool,
        &'a [u32],
        Option<MemberStep>,
    );

    /// Goal: group 0 grows, replaces and rests as it should. Method: a table of (registered, voters, learners, joint, ready,
    /// next step); bootstrap brokers are 1, 2 and 5.
    #[test]
    fn steps_follow_the_table() {
        let add = |broker, incarnation| Some(MemberStep::AddLearner(replica(broker, incarnation)));
        let vote = |members: Members<'_>| Some(MemberStep::ChangeVoters(set(members)));
        let table: &[Row<'_>] = &[
            (
                "at rest",
                &[(1, 1), (2, 2), (3, 3)],
                &[(1, 1), (2, 2), (3, 3)],
                &[],
                false,
                &[],
                None,
            ),
            (
                "founders still start",
                &[(1, 1)],
                &[(1, 1), (2, 2), (3, 3)],
                &[],
                false,
                &[],
                None,
            ),
            (
                "a new broker learns",
                &[(1, 1), (2, 2)],
                &[(1, 1)],
                &[],
                false,
                &[],
                add(2, 2),
            ),
            (
                "two do not vote",
                &[(1, 1), (2, 2)],
                &[(1, 1)],
                &[(2, 2)],
                false,
                &[2],
                None,
            ),
            (
                "from one to three",
                &[(1, 1), (2, 2), (3, 3)],
                &[(1, 1)],
                &[(2, 2), (3, 3)],
                false,
                &[2, 3],
                vote(&[(1, 1), (2, 2), (3, 3)]),
            ),
            (
                "not from one to two",
                &[(1, 1), (2, 2), (3, 3)],
                &[(1, 1)],
                &[(2, 2), (3, 3)],
                false,
                &[2],
                None,
            ),
            (
                "from two to three",
                &[(1, 1), (2, 2), (3, 3)],
                &[(1, 1), (2, 2)],
                &[(3, 3)],
                false,
                &[3],
                vote(&[(1, 1), (2, 2), (3, 3)]),
            ),
            (
                "a fourth only learns",
                &[(1, 1), (2, 2), (3, 3), (4, 4)],
                &[(1, 1), (2, 2), (3, 3)],
                &[(4, 4)],
                false,
                &[4],
                None,
            ),
            (
                "bootstrap brokers first",
                &[(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)],
                &[(1, 1), (3, 3), (4, 4)],
                &[(2, 2), (5, 5)],
                false,
                &[2, 5],
                vote(&[(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]),
            ),
            (
                "six brokers, five vote",
                &[(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6)],
                &[(1, 1), (2, 2), (3, 3)],
                &[(4, 4), (5, 5), (6, 6)],
                false,
                &[4, 5, 6],
                vote(&[(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]),
            ),
            (
                "a lost disk learns first",
                &[(1, 9), (2, 2), (3, 3)],
                &[(1, 1), (2, 2), (3, 3)],
                &[],
                false,
                &[],
                add(1, 9),
            ),
            (
                "then waits",
                &[(1, 9), (2, 2), (3, 3)],
                &[(1, 1), (2, 2), (3, 3)],
                &[(1, 9)],
                false,
                &[],
                None,
            ),
            (
                "then votes",
                &[(1, 9), (2, 2), (3, 3)],
                &[(1, 1), (2, 2), (3, 3)],
                &[(1, 9)],
                false,
                &[1],
                vote(&[(1, 9), (2, 2), (3, 3)]),
            ),
            (
                "another one steps in",
                &[(1, 9), (2, 2), (3, 3), (4, 4)],
                &[(1, 1), (2, 2), (3, 3)],
                &[(1, 9), (4, 4)],
                false,
                &[4],
                vote(&[(2, 2), (3, 3), (4, 4)]),
            ),
            (
                "a change half done is finished",
                &[(1, 9), (2, 2), (3, 3)],
                &[(1, 1), (1, 9), (2, 2), (3, 3)],
                &[],
                true,
                &[],
                vote(&[(1, 9), (2, 2), (3, 3)]),
            ),
            (
                "a joint membership is left",
                &[(1, 1), (2, 2), (3, 3)],
                &[(1, 1), (2, 2), (3, 3)],
                &[],
                true,
                &[],
                vote(&[(1, 1), (2, 2), (3, 3)]),
            ),
        ];
        for (name, registered, voters, learners, is_joint, ready, step) in table {
            let status = GroupStatus {
                voters: set(voters),
                learners: set(learners),
                is_joint: *is_joint,
                ..GroupStatus::default()
            };
            let bootstrap = [BrokerId(1), BrokerId(2), BrokerId(5)];
            let is_ready = |replica: ReplicaId| ready.contains(&replica.broker().0);
            let next = next_step(&image(registered), &status, &bootstrap, 5, is_ready);
            assert_eq!(next, *step, "{name}");
        }
    }
}
