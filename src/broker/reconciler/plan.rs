//! What to do next for one replica. Pure: what there should be and what there is in, one step out.
//!
//! Owns nothing. Every step is planned from what is found, never from what was done before, so a crash between two steps
//! loses nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::controller::metadata::PartitionRecord;
use crate::raft::GroupStatus;
use crate::types::{Assignment, ReplicaId};

/// What to do about the local replica of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LocalStep {
    /// It is as it should be, or the image is too old to say.
    Rest,
    /// Start it, creating it when it is not stored.
    Start,
    /// Its log is damaged: ask the controller for a new replica in its place.
    AskForNew,
    /// Stop it, and delete what is stored.
    Delete,
}

/// How the replica that is stored here is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    /// It could run.
    Idle,
    /// It runs, or has stopped by itself and not been taken down yet.
    Running,
    /// Its log is damaged: it will never run again.
    Damaged,
}

/// The next step for a group of which `found` is stored here in this `condition`; `wanted` is the replica that this
/// broker should hold by the image, and `knows` tells whether the image is younger than a replica.
///
/// Nothing is deleted because an image does not show it yet: only an image that knows the replica can have dropped it. A
/// replica that moves away stays wanted until its replacement is finished.
pub(super) fn local_step(
    wanted: Option<ReplicaId>,
    found: Option<ReplicaId>,
    condition: Condition,
    knows: impl Fn(ReplicaId) -> bool,
) -> LocalStep {
    match (wanted, found) {
        (Some(wanted), Some(found)) if wanted == found => match condition {
            Condition::Idle => LocalStep::Start,
            Condition::Running => LocalStep::Rest,
            Condition::Damaged => LocalStep::AskForNew,
        },
        (_, Some(found)) if knows(found) => LocalStep::Delete,
        (_, Some(_)) | (None, None) => LocalStep::Rest,
        (Some(_), None) => LocalStep::Start,
    }
}

/// How long after its start `me` creates its group when the group shows no life; `None` when that is not its part.
///
/// Every data replica that the group is founded with may create it, with the same voters, so that doing it twice is harmless;
/// the preferred one does it at once, the others only when it does not.
pub(super) fn founding_delay(
    founding: &Assignment,
    me: ReplicaId,
    patience: Duration,
) -> Option<Duration> {
    let rank = founding
        .replicas
        .iter()
        .position(|replica| *replica == me)?;
    Some(patience * u32::try_from(rank).unwrap_or(u32::MAX))
}

/// What the leader of a group does next about its members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum MemberStep {
    /// The members are the assigned replicas.
    Settled,
    /// Somebody has to catch up first, or the image is older than the members.
    Wait,
    /// Let this replica receive the log.
    AddLearner(ReplicaId),
    /// Drop this replica, which does not vote.
    RemoveLearner(ReplicaId),
    /// Let exactly these vote.
    ChangeVoters(BTreeSet<ReplicaId>),
    /// Hand leadership to this replica: the leader itself is not assigned any more.
    HandOver(ReplicaId),
}

/// What the leader's image says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Desired<'a> {
    /// The replicas that the group should have.
    pub(super) assignment: &'a Assignment,
    /// Whether the image shows the leader as such in its epoch. An older one may ask for replicas that have been given up
    /// since: the controller ends a change by the word of the newest leader that it has heard, so that what a leader sees in
    /// an image that has its own report is not overtaken by the word of an earlier one.
    pub(super) is_current: bool,
}

/// The leader `me`'s next step from the members in `status` towards what is desired. `knows` tells whether the image that
/// this comes from is younger than a replica; `is_level` whether a replica is connected and has caught up.
pub(super) fn member_step(
    me: ReplicaId,
    desired: Desired<'_>,
    status: &GroupStatus,
    knows: impl Fn(ReplicaId) -> bool,
    is_level: impl Fn(ReplicaId) -> bool,
) -> MemberStep {
    let step = step_towards(me, desired.assignment, status, knows, is_level);
    if desired.is_current || step == MemberStep::Settled {
        step
    } else {
        MemberStep::Wait
    }
}

/// Whether the group may go over from `now` to `wanted`: as many copies are in sync after it as before, or all that are
/// wanted, and a majority of those that will vote is there to decide.
fn may_change(
    now: &BTreeSet<ReplicaId>,
    wanted: &BTreeSet<ReplicaId>,
    is_level: impl Fn(ReplicaId) -> bool,
) -> bool {
    let data = |replicas: &BTreeSet<ReplicaId>| -> BTreeSet<ReplicaId> {
        replicas
            .iter()
            .copied()
            .filter(|replica| !replica.is_witness())
            .collect()
    };
    let level = |replicas: &BTreeSet<ReplicaId>| {
        replicas
            .iter()
            .filter(|replica| is_level(**replica))
            .count()
    };
    let (copies_now, copies_then) = (level(&data(now)), level(&data(wanted)));
    copies_then >= copies_now.min(data(wanted).len()) && level(wanted) * 2 > wanted.len()
}

fn step_towards(
    me: ReplicaId,
    assignment: &Assignment,
    status: &GroupStatus,
    knows: impl Fn(ReplicaId) -> bool,
    is_level: impl Fn(ReplicaId) -> bool,
) -> MemberStep {
    let wanted: BTreeSet<ReplicaId> = assignment.voters().collect();
    let members: BTreeSet<ReplicaId> = status.voters.union(&status.learners).copied().collect();
    if !members.iter().all(|replica| knows(*replica)) {
        return MemberStep::Wait;
    }
    // The leader keeps its vote until another one leads.
    let with_me = |voters: &BTreeSet<ReplicaId>| {
        let mut voters = voters.clone();
        voters.insert(me);
        voters
    };
    if status.is_joint {
        let reachable: BTreeSet<ReplicaId> = wanted.intersection(&status.voters).copied().collect();
        return MemberStep::ChangeVoters(with_me(&reachable));
    }
    if let Some(missing) = wanted.iter().find(|replica| !members.contains(replica)) {
        return MemberStep::AddLearner(*missing);
    }
    if status.voters == wanted {
        let stranger = status
            .learners
            .iter()
            .find(|replica| !wanted.contains(replica));
        return stranger.map_or(MemberStep::Settled, |learner| {
            MemberStep::RemoveLearner(*learner)
        });
    }
    let mut new = wanted.difference(&status.voters);
    if !new.all(|replica| is_level(*replica)) || !may_change(&status.voters, &wanted, &is_level) {
        return MemberStep::Wait;
    }
    if wanted.contains(&me) {
        return MemberStep::ChangeVoters(wanted);
    }
    if status.voters != with_me(&wanted) {
        return MemberStep::ChangeVoters(with_me(&wanted));
    }
    let heir = assignment
        .replicas
        .iter()
        .copied()
        .find(|replica| is_level(*replica));
    heir.map_or(MemberStep::Wait, MemberStep::HandOver)
}

/// The followers that must have the whole log before the leader `me` may say that a change has ended: what was acknowledged
/// under the members before may have its other copies on the replicas that are deleted next. All new copies, and of the
/// others those that are `level`: one that is away was not counted on before.
pub(super) fn copies_to_confirm(
    me: ReplicaId,
    record: &PartitionRecord,
    level: &BTreeSet<ReplicaId>,
) -> BTreeSet<ReplicaId> {
    let Some(change) = &record.replacement else {
        return BTreeSet::new();
    };
    let assigned = record.assignment.replicas.iter().copied();
    assigned
        .filter(|replica| *replica != me)
        .filter(|replica| change.adding.contains(replica) || level.contains(replica))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::metadata::Replacement;
    use crate::types::{BrokerId, GroupId, LeaderEpoch, ReplicaKind};

    fn data(broker: u32, epoch: u32) -> ReplicaId {
        ReplicaId::new(BrokerId(broker), ReplicaKind::Data, epoch)
    }

    fn witness(broker: u32, epoch: u32) -> ReplicaId {
        ReplicaId::new(BrokerId(broker), ReplicaKind::Witness, epoch)
    }

    /// Goal: replicas are started and deleted only for the right reason, above all never deleted because the image is old.
    /// Method: a table over wanted, found, its condition, and the youngest replica that the image knows.
    #[test]
    fn a_replica_is_deleted_only_by_an_image_that_knows_it() {
        use Condition::{Damaged, Idle, Running};
        use LocalStep::{AskForNew, Delete, Rest, Start};
        let table = [
            ("nothing", None, None, Idle, 9, Rest),
            ("new", Some(5), None, Idle, 9, Start),
            ("after a restart", Some(5), Some(5), Idle, 9, Start),
            ("running", Some(5), Some(5), Running, 9, Rest),
            ("topic deleted", None, Some(5), Running, 9, Delete),
            ("topic deleted while away", None, Some(5), Idle, 5, Delete),
            (
                "image older than the topic",
                None,
                Some(5),
                Running,
                4,
                Rest,
            ),
            ("image empty", None, Some(5), Idle, 0, Rest),
            (
                "replaced on this broker",
                Some(7),
                Some(5),
                Running,
                7,
                Delete,
            ),
            ("damaged", Some(5), Some(5), Damaged, 5, AskForNew),
            ("damaged, replaced", Some(7), Some(5), Damaged, 7, Delete),
            ("damaged, topic deleted", None, Some(5), Damaged, 5, Delete),
            ("damaged, image old", None, Some(5), Damaged, 4, Rest),
            (
                "image older than the replacement",
                Some(5),
                Some(7),
                Running,
                6,
                Rest,
            ),
        ];
        for (name, wanted, found, condition, youngest, step) in table {
            let (wanted, found) = (wanted.map(|e| data(1, e)), found.map(|e| data(1, e)));
            let knows = |replica: ReplicaId| replica.epoch() <= youngest;
            assert_eq!(local_step(wanted, found, condition, knows), step, "{name}");
        }
    }

    /// Goal: one replica creates a group, others only stand in, strangers and witnesses never. Method: all of them.
    #[test]
    fn founders_take_turns() {
        let founding = Assignment {
            replicas: vec![data(2, 1), data(1, 1)],
            witness: Some(witness(3, 1)),
        };
        let delay = |me| founding_delay(&founding, me, Duration::from_secs(3));
        assert_eq!(delay(data(2, 1)), Some(Duration::ZERO));
        assert_eq!(delay(data(1, 1)), Some(Duration::from_secs(3)));
        assert_eq!(delay(witness(3, 1)), None);
        assert_eq!(delay(data(2, 2)), None, "came back empty: not a founder");
    }

    #[derive(Clone)]
    struct Case<'a> {
        name: &'a str,
        me: ReplicaId,
        wanted: &'a [ReplicaId],
        voters: &'a [ReplicaId],
        learners: &'a [ReplicaId],
        is_joint: bool,
        level: &'a [ReplicaId],
        step: MemberStep,
    }

    fn check(case: &Case<'_>, youngest: u32) {
        let (witnesses, replicas): (Vec<ReplicaId>, Vec<ReplicaId>) = case
            .wanted
            .iter()
            .copied()
            .partition(|replica| replica.is_witness());
        let assignment = Assignment {
            replicas,
            witness: witnesses.first().copied(),
        };
        let status = GroupStatus {
            voters: case.voters.iter().copied().collect(),
            learners: case.learners.iter().copied().collect(),
            is_joint: case.is_joint,
            ..GroupStatus::default()
        };
        let step = |is_current| {
            let desired = Desired {
                assignment: &assignment,
                is_current,
            };
            member_step(
                case.me,
                desired,
                &status,
                |replica| replica.epoch() <= youngest,
                |replica| replica == case.me || case.level.contains(&replica),
            )
        };
        assert_eq!(step(true), case.step, "{}", case.name);
        let by_an_old_image = match case.step {
            MemberStep::Settled => MemberStep::Settled,
            _ => MemberStep::Wait,
        };
        assert_eq!(step(false), by_an_old_image, "{} (old image)", case.name);
    }

    /// Goal: a lost replica is replaced in the right order: learn, catch up, vote, and only then the old one goes; a change
    /// left half done is finished; an old image changes nothing. Method: a table.
    #[test]
    fn members_follow_the_assignment() {
        let (a, lost, new, w) = (data(2, 1), data(1, 1), data(1, 5), witness(3, 1));
        let set = |replicas: &[ReplicaId]| replicas.iter().copied().collect::<BTreeSet<_>>();
        let case = Case {
            name: "at rest",
            me: a,
            wanted: &[lost, a, w],
            voters: &[lost, a, w],
            learners: &[],
            is_joint: false,
            level: &[],
            step: MemberStep::Settled,
        };
        check(&case, 9);
        let wanted = &[new, a, w][..];
        check(
            &Case {
                name: "learn",
                wanted,
                step: MemberStep::AddLearner(new),
                ..case
            },
            9,
        );
        let case = Case {
            wanted,
            learners: &[new],
            ..case
        };
        check(
            &Case {
                name: "catch up",
                step: MemberStep::Wait,
                ..case
            },
            9,
        );
        let change = MemberStep::ChangeVoters(set(&[new, a, w]));
        check(
            &Case {
                name: "vote",
                level: &[new],
                step: change.clone(),
                ..case
            },
            9,
        );
        let joint = &[lost, new, a, w][..];
        let half = Case {
            voters: joint,
            learners: &[],
            is_joint: true,
            step: change,
            ..case
        };
        check(
            &Case {
                name: "finish a change",
                ..half
            },
            9,
        );
        let case = Case {
            voters: &[new, a, w],
            learners: &[],
            ..case
        };
        check(
            &Case {
                name: "done",
                step: MemberStep::Settled,
                ..case
            },
            9,
        );
        let drop = MemberStep::RemoveLearner(lost);
        check(
            &Case {
                name: "drop the old one",
                learners: &[lost],
                step: drop,
                ..case
            },
            9,
        );
        let old = Case {
            name: "old image",
            wanted: &[lost, a, w],
            step: MemberStep::Wait,
            ..case
        };
        check(&old, 4);
    }

    /// Goal: a leader that moves away keeps its vote until another one leads. Method: RF 1 moves from broker 1 to 2.
    #[test]
    fn a_leader_that_is_not_assigned_hands_over_first() {
        let (me, heir) = (data(1, 1), data(2, 5));
        let both: BTreeSet<ReplicaId> = [me, heir].into();
        let case = Case {
            name: "both vote",
            me,
            wanted: &[heir],
            voters: &[me],
            learners: &[heir],
            is_joint: false,
            level: &[heir],
            step: MemberStep::ChangeVoters(both.clone()),
        };
        check(&case, 9);
        let case = Case {
            voters: &[me, heir],
            learners: &[],
            ..case
        };
        check(
            &Case {
                name: "hand over",
                step: MemberStep::HandOver(heir),
                ..case
            },
            9,
        );
        check(
            &Case {
                name: "not yet",
                level: &[],
                step: MemberStep::Wait,
                ..case
            },
            9,
        );
        let joint = Case {
            is_joint: true,
            step: MemberStep::ChangeVoters(both),
            ..case
        };
        check(
            &Case {
                name: "half done",
                ..joint
            },
            9,
        );
        let removal = MemberStep::ChangeVoters([heir].into());
        check(
            &Case {
                name: "the heir removes the old leader",
                me: heir,
                step: removal,
                ..case
            },
            9,
        );
    }

    /// Goal: members are changed only when as many copies are in sync after it as before, or all that are wanted, and when
    /// enough of those that will vote are there. Method: a table of moves by broker 1, which stays; who is in sync.
    #[test]
    fn no_change_costs_a_copy_or_the_majority() {
        type Row<'a> = (&'a str, &'a [u32], &'a [u32], &'a [u32], bool);
        let table: [Row<'_>; 10] = [
            ("one moves", &[1, 2, 3], &[1, 3, 4], &[2, 3, 4], true),
            ("a dead one moves", &[1, 2, 3], &[1, 3, 4], &[3, 4], true),
            (
                "one that stays was late before",
                &[1, 2, 3],
                &[1, 3, 4],
                &[2, 4],
                true,
            ),
            ("two move", &[1, 2, 3], &[1, 4, 5], &[2, 3, 4, 5], true),
            (
                "one of two is late",
                &[1, 2, 3],
                &[1, 4, 5],
                &[2, 3, 4],
                false,
            ),
            ("all that is wanted", &[1, 2, 3], &[1, 2], &[2, 3], true),
            ("the wrong one goes", &[1, 2, 3], &[1, 2], &[3], false),
            ("fewer, and one dead", &[1, 2, 3], &[1], &[2], true),
            ("more", &[1], &[1, 2, 3], &[2, 3], true),
            ("more, and one late", &[1], &[1, 2, 3], &[2], false),
        ];
        for (name, now, wanted, level, is_changed) in table {
            let set = |brokers: &[u32]| -> Vec<ReplicaId> {
                brokers.iter().map(|broker| data(*broker, 1)).collect()
            };
            let (now, wanted, level) = (set(now), set(wanted), set(level));
            let learners: Vec<ReplicaId> = wanted
                .iter()
                .copied()
                .filter(|replica| !now.contains(replica))
                .collect();
            let step = if is_changed {
                MemberStep::ChangeVoters(wanted.iter().copied().collect())
            } else {
                MemberStep::Wait
            };
            let case = Case {
                name,
                me: data(1, 1),
                wanted: &wanted,
                voters: &now,
                learners: &learners,
                is_joint: false,
                level: &level,
                step,
            };
            check(&case, 9);
        }
        // a witness is no copy, but it is one of those that decide
        let (one, two, w) = (data(1, 1), data(2, 1), witness(3, 1));
        let case = Case {
            name: "only the witness would be there",
            me: one,
            wanted: &[one, two, w],
            voters: &[one, two],
            learners: &[w],
            is_joint: false,
            level: &[w],
            step: MemberStep::ChangeVoters([one, two, w].into()),
        };
        check(&case, 9);
        let case = Case {
            name: "a vote of two, and one is away",
            wanted: &[one, two],
            voters: &[one, two, w],
            learners: &[],
            level: &[w],
            step: MemberStep::Wait,
            ..case
        };
        check(&case, 9);
    }

    /// Goal: no old copy is given up before every new one, and every kept one that is there, has all of the log; one that is
    /// away holds nothing up. Method: replicas 1 (leads), 2 and 3, of which 3 is new, by who is level.
    #[test]
    fn old_copies_are_needed_until_the_others_have_everything() {
        let (me, kept, new) = (data(1, 1), data(2, 1), data(3, 5));
        let assignment = Assignment {
            replicas: vec![new, kept, me],
            witness: Some(witness(4, 5)),
        };
        let mut record = PartitionRecord {
            group: GroupId(1),
            founding: assignment.clone(),
            assignment,
            replacement: Some(Replacement {
                number: 5,
                adding: [new, witness(4, 5)].into(),
                removing: [data(5, 1)].into(),
            }),
            reassignment: None,
            leader: None,
            epoch: LeaderEpoch(1),
            isr: Vec::new(),
        };
        for (level, needed) in [
            (&[][..], &[new][..]),
            (&[kept], &[kept, new]),
            (&[kept, new, data(5, 1)], &[kept, new]),
        ] {
            let level: BTreeSet<ReplicaId> = level.iter().copied().collect();
            let copies = copies_to_confirm(me, &record, &level);
            assert_eq!(copies, needed.iter().copied().collect(), "{level:?}");
        }
        record.replacement = None;
        assert!(copies_to_confirm(me, &record, &[kept].into()).is_empty());
    }
}
