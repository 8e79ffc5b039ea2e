//! The deciders of sync, watermark and acknowledgement, by tables and along timelines.

use super::*;
use crate::raft::FollowerProgress;
use crate::types::ReplicaKind;

const LAG: Duration = Duration::from_secs(10);

fn data(broker: u32) -> ReplicaId {
    ReplicaId::new(BrokerId(broker), ReplicaKind::Data, 1)
}

fn witness(broker: u32) -> ReplicaId {
    ReplicaId::new(BrokerId(broker), ReplicaKind::Witness, 1)
}

fn assignment(replicas: &[u32], witness_on: Option<u32>) -> Assignment {
    Assignment {
        replicas: replicas.iter().copied().map(data).collect(),
        witness: witness_on.map(witness),
    }
}

/// A follower's progress: matched, seconds since the start at which it was caught up, connected.
type Seen = (Option<u64>, Option<u64>, bool);

struct World {
    start: Instant,
    assignment: Assignment,
    leaving: BTreeSet<ReplicaId>,
    voters: BTreeSet<ReplicaId>,
    is_joint: bool,
}

impl World {
    fn new(assignment: Assignment) -> Self {
        Self {
            start: Instant::now(),
            voters: assignment.voters().collect(),
            is_joint: false,
            leaving: BTreeSet::new(),
            assignment,
        }
    }

    fn progress(&self, flushed: Option<u64>, followers: &[(u32, Seen)]) -> Progress {
        let follower = |(broker, (matched, caught_up, connected)): &(u32, Seen)| {
            let progress = FollowerProgress {
                matched: matched.map(LogIndex),
                caught_up_at: caught_up.map(|s| self.start + Duration::from_secs(s)),
                connected: *connected,
                lost_data: false,
            };
            (data(*broker), progress)
        };
        let followers = followers.iter().map(follower).collect();
        Progress {
            epoch: LeaderEpoch(1),
            flushed: flushed.map(LogIndex),
            followers,
        }
    }

    fn view<'a>(&'a self, progress: &'a Progress, last: u64) -> View<'a> {
        View {
            me: data(1),
            epoch: progress.epoch,
            assignment: &self.assignment,
            leaving: &self.leaving,
            voters: &self.voters,
            is_joint: self.is_joint,
            last: Some(LogIndex(last)),
            progress,
        }
    }

    /// What the leader sees at `at` seconds, with broker 2 as the only follower.
    fn step(&self, previous: Option<&InSync>, at: u64, last: u64, seen: Seen) -> InSync {
        let progress = self.progress(Some(last), &[(2, seen)]);
        let now = self.start + Duration::from_secs(at);
        InSync::observe(previous, &self.view(&progress, last), LAG, now)
    }
}

fn isr(in_sync: &InSync) -> Vec<u32> {
    in_sync.brokers().iter().map(|broker| broker.0).collect()
}

/// Goal: a follower is in the ISR and in the witness gate exactly as said, through its life. Method: one history per case: time in s,
/// last entry, matched, caught up at, connected; expected: in the ISR, in the gate, whether time alone will change it.
#[test]
fn a_follower_joins_and_leaves_the_isr() {
    type Step = (u64, u64, Seen, (bool, bool, bool));
    let cases: [(&str, &[Step]); 8] = [
        (
            "not heard of yet, connected: gate only, until the lag time is over",
            &[
                (0, 5, (None, None, true), (false, true, true)),
                (9, 5, (None, None, true), (false, true, true)),
                (10, 5, (None, None, true), (false, false, false)),
                (11, 5, (Some(5), Some(11), true), (true, true, false)),
            ],
        ),
        (
            "not connected at the beginning: neither, until it is level",
            &[
                (0, 5, (None, None, false), (false, false, false)),
                (1, 5, (Some(3), None, true), (false, false, false)),
                (2, 5, (Some(5), Some(2), true), (true, true, false)),
            ],
        ),
        (
            "a lost connection counts at once",
            &[
                (0, 5, (Some(5), Some(0), true), (true, true, false)),
                (1, 5, (Some(5), Some(0), false), (false, false, false)),
                (2, 5, (Some(5), Some(0), true), (true, true, false)),
            ],
        ),
        (
            "after a lost connection being nearly level is not enough",
            &[
                (0, 5, (Some(5), Some(0), true), (true, true, false)),
                (1, 6, (Some(5), Some(0), false), (false, false, false)),
                (2, 6, (Some(5), Some(0), true), (false, false, false)),
                (3, 7, (Some(6), Some(3), true), (true, true, true)),
            ],
        ),
        (
            "a slow follower leaves after the lag time",
            &[
                (0, 5, (Some(5), Some(0), true), (true, true, false)),
                (1, 9, (Some(6), Some(1), true), (true, true, true)),
                (10, 20, (Some(8), Some(1), true), (true, true, true)),
                (11, 20, (Some(9), Some(1), true), (false, false, false)),
                (12, 20, (Some(20), Some(12), true), (true, true, false)),
            ],
        ),
        (
            "a busy follower that is never level at a glance stays",
            &[
                (0, 5, (Some(5), Some(0), true), (true, true, false)),
                (20, 90, (Some(80), Some(19), true), (true, true, true)),
                (40, 190, (Some(180), Some(39), true), (true, true, true)),
            ],
        ),
        (
            "an idle hour does not count against it",
            &[
                (0, 5, (Some(5), Some(0), true), (true, true, false)),
                (3_600, 6, (Some(5), Some(0), true), (true, true, true)),
                (3_601, 6, (Some(6), Some(3_601), true), (true, true, false)),
            ],
        ),
        (
            "nothing known of it at all",
            &[
                (0, 5, (None, None, false), (false, false, false)),
                (60, 5, (None, None, false), (false, false, false)),
            ],
        ),
    ];
    for (name, steps) in cases {
        let world = World::new(assignment(&[1, 2], Some(3)));
        let mut known: Option<InSync> = None;
        for (at, last, seen, (in_isr, in_gate, is_timed)) in steps {
            let now = world.step(known.as_ref(), *at, *last, *seen);
            assert_eq!(
                isr(&now) == [1, 2],
                *in_isr,
                "{name}, at {at} s: ISR {now:?}"
            );
            assert!(isr(&now).contains(&1), "{name}, at {at} s: the leader");
            assert_eq!(
                now.gate.contains(&data(2)),
                *in_gate,
                "{name}, at {at} s: gate {now:?}"
            );
            assert_eq!(
                now.next_check.is_some(),
                *is_timed,
                "{name}, at {at} s: timer {now:?}"
            );
            if let Some(check) = now.next_check {
                assert!(
                    check > world.start + Duration::from_secs(*at),
                    "{name}: timer in the past"
                );
            }
            known = Some(now);
        }
    }
}

/// Goal: what was seen in one epoch does not count in the next. Method: a level follower, then a new epoch without news.
#[test]
fn a_new_epoch_begins_without_memory() {
    let world = World::new(assignment(&[1, 2], None));
    let before = world.step(None, 0, 5, (Some(5), Some(0), true));
    assert_eq!(isr(&before), [1, 2]);
    let mut progress = world.progress(Some(5), &[(2, (None, None, true))]);
    progress.epoch = LeaderEpoch(2);
    let now = InSync::observe(Some(&before), &world.view(&progress, 5), LAG, world.start);
    assert_eq!(isr(&now), [1]);
    assert!(now.gate.contains(&data(2)));
}

/// Goal: entries are acknowledged exactly when enough data replicas have them durably. Method: a table over replicas, minimum, the
/// leader's own flush and what followers have; expected: what acks=all may acknowledge.
#[test]
fn acknowledgement_needs_enough_durable_copies() {
    type Case<'a> = (
        &'a [u32],
        Option<u32>,
        u32,
        Option<u64>,
        &'a [(u32, Seen)],
        Option<u64>,
    );
    let up = |matched| (Some(matched), None, true);
    let none = (None, None, true);
    let cases: [Case<'_>; 10] = [
        (&[1], None, 1, Some(7), &[], Some(7)),
        (
            &[1, 2, 3],
            None,
            1,
            Some(7),
            &[(2, up(5)), (3, up(3))],
            Some(7),
        ),
        (
            &[1, 2, 3],
            None,
            2,
            Some(7),
            &[(2, up(5)), (3, up(3))],
            Some(5),
        ),
        (
            &[1, 2, 3],
            None,
            3,
            Some(7),
            &[(2, up(5)), (3, up(3))],
            Some(3),
        ),
        (
            &[1, 2, 3],
            None,
            2,
            Some(2),
            &[(2, up(5)), (3, up(3))],
            Some(3),
        ),
        (&[1, 2, 3], None, 3, Some(7), &[(2, up(5)), (3, none)], None),
        (
            &[1, 2, 3],
            None,
            4,
            Some(7),
            &[(2, up(5)), (3, up(3))],
            None,
        ),
        // Beside a witness the leader's own flush is needed too, although one copy would do.
        (&[1, 2], Some(3), 1, Some(4), &[(2, up(9))], Some(4)),
        (&[1, 2], Some(3), 1, None, &[(2, up(9))], None),
        // A replica that is not in the assignment does not count.
        (
            &[1, 2],
            None,
            2,
            Some(7),
            &[(2, up(5)), (3, up(7))],
            Some(5),
        ),
    ];
    for (replicas, witness_on, min, flushed, followers, expected) in cases {
        let world = World::new(assignment(replicas, witness_on));
        let progress = world.progress(flushed, followers);
        let found = world.view(&progress, 9).acknowledgeable(min);
        assert_eq!(
            found,
            expected.map(LogIndex),
            "{replicas:?} {witness_on:?} min {min} {followers:?}"
        );
    }
}

/// Goal: the ack names the brokers that have it, and lag is counted in entries. Method: one view, several entries.
#[test]
fn durable_brokers_and_lag_are_named() {
    let world = World::new(assignment(&[2, 1, 3], None));
    let progress = world.progress(
        Some(7),
        &[(2, (Some(5), None, true)), (3, (None, None, true))],
    );
    let view = world.view(&progress, 9);
    let brokers = |index| {
        view.durable_brokers(LogIndex(index))
            .iter()
            .map(|b| b.0)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        (brokers(5), brokers(6), brokers(8)),
        (vec![2, 1], vec![1], vec![])
    );
    assert_eq!(
        (view.lag(data(2)), view.lag(data(3)), view.lag(data(1))),
        (Some(4), None, Some(2))
    );
}

/// Goal: the watermark never falls in an epoch, never passes what is committed or missing copies, and does not begin below what was
/// committed before. Method: a table of previous, opened, committed, durable.
#[test]
fn the_watermark_only_rises_to_what_is_safe() {
    let cases = [
        (None, None, Some(5), None, None),
        (None, Some(3), Some(5), None, Some(3)),
        (Some(3), Some(3), Some(5), Some(4), Some(4)),
        (Some(4), Some(3), Some(5), Some(2), Some(4)),
        (Some(4), Some(3), Some(5), Some(9), Some(5)),
    ];
    for (previous, opened, committed, durable, expected) in cases {
        let index = |at: Option<u64>| at.map(LogIndex);
        let found = high_watermark(
            index(previous),
            index(opened),
            index(committed),
            index(durable),
        );
        assert_eq!(
            found,
            index(expected),
            "{previous:?} {opened:?} {committed:?} {durable:?}"
        );
    }
}

/// Goal: a follower that has lost what it acknowledged counts for nothing. Method: level and connected, then found out.
#[test]
fn a_follower_that_lost_data_counts_for_nothing() {
    let world = World::new(assignment(&[1, 2], None));
    let mut progress = world.progress(Some(5), &[(2, (Some(5), Some(0), true))]);
    let before = InSync::observe(None, &world.view(&progress, 5), LAG, world.start);
    assert_eq!(isr(&before), [1, 2]);
    for known in progress.followers.values_mut() {
        known.lost_data = true;
    }
    let view = world.view(&progress, 5);
    let now = InSync::observe(Some(&before), &view, LAG, world.start);
    assert_eq!((isr(&now), now.gate.len()), (vec![1], 0));
    assert_eq!((view.acknowledgeable(2), view.lag(data(2))), (None, None));
    assert_eq!(view.durable_brokers(LogIndex(1)), [BrokerId(1)]);
}

/// Goal: a new replica counts as in sync when it can take over, and not while it only learns or its vote may be undone: whoever
/// sees a full ISR may stop a broker. Method: one that has everything, as a learner, in a joint membership, and as a voter.
#[tokio::test]
async fn a_replica_that_does_not_vote_is_not_in_sync() {
    let mut world = World::new(assignment(&[1, 2, 3], None));
    let now = world.start;
    let followers = [(2, (Some(9), Some(0), true)), (3, (Some(9), Some(0), true))];
    let progress = world.progress(Some(9), &followers);
    let lag = Duration::from_secs(10);
    let mut known = None;
    for (voters, is_joint, expected) in [
        (vec![1, 2], false, vec![1, 2]),
        (vec![1, 2, 3], true, vec![1, 2]),
        (vec![1, 2, 3], false, vec![1, 2, 3]),
        (vec![1, 2, 3, 4], true, vec![1, 2, 3]),
    ] {
        world.voters = voters.iter().copied().map(data).collect();
        world.is_joint = is_joint;
        let seen = InSync::observe(known.as_ref(), &world.view(&progress, 9), lag, now);
        let brokers: Vec<u32> = seen.brokers().iter().map(|broker| broker.0).collect();
        assert_eq!(brokers, expected, "{voters:?} joint {is_joint}");
        known = Some(seen);
    }
}

/// Goal: while replicas are moved the copies that leave count as before as long as they vote, the new ones from when they do,
/// and a witness that votes binds the leader whatever is assigned. Method: the stages of a move from 1, 2, 3 to 2, 4 with
/// broker 1 leading: who is in sync, who feeds the witness, what two and three copies have.
#[test]
fn copies_that_leave_count_while_they_vote() {
    type Stage<'a> = (
        &'a str,
        &'a [u32],
        bool,
        &'a [u32],
        &'a [u32],
        [Option<u64>; 3],
    );
    let stages: [Stage<'_>; 4] = [
        (
            "learns",
            &[1, 2, 3],
            false,
            &[1, 2, 3],
            &[2, 3, 4],
            [Some(9), Some(7), Some(5)],
        ),
        // the new one may yet be undone, but what it has counts: both majorities decide
        (
            "joint",
            &[1, 2, 3, 4],
            true,
            &[1, 2, 3],
            &[2, 3, 4],
            [Some(9), Some(8), Some(7)],
        ),
        (
            "votes",
            &[1, 2, 4],
            false,
            &[1, 2, 4],
            &[2, 4],
            [Some(9), Some(8), Some(5)],
        ),
        (
            "old ones kept as well",
            &[1, 2, 3, 4],
            false,
            &[1, 2, 4, 3],
            &[2, 3, 4],
            [Some(9), Some(8), Some(7)],
        ),
    ];
    let mut world = World::new(assignment(&[2, 4], None));
    world.leaving = BTreeSet::from([data(1), data(3)]);
    let seen = |matched| (Some(matched), Some(1), true);
    let progress = world.progress(Some(9), &[(2, seen(5)), (3, seen(7)), (4, seen(8))]);
    let now = world.start + Duration::from_secs(1);
    let mut before = None;
    for (name, voters, is_joint, in_sync, gate, durable) in stages {
        world.voters = voters.iter().copied().map(data).collect();
        world.is_joint = is_joint;
        let view = world.view(&progress, 9);
        let observed = InSync::observe(before.as_ref(), &view, LAG, now);
        assert_eq!(isr(&observed), in_sync, "{name}");
        let fed: Vec<u32> = observed
            .gate
            .iter()
            .map(|replica| replica.broker().0)
            .collect();
        assert_eq!(fed, gate, "{name}");
        let copies = [1, 2, 3].map(|copies| view.durable_on_at_least(copies).map(|index| index.0));
        assert_eq!(copies, durable, "{name}");
        before = Some(observed);
    }
    let progress = world.progress(Some(4), &[(2, seen(5)), (3, seen(7)), (4, seen(8))]);
    let without = world.view(&progress, 9).acknowledgeable(2);
    assert_eq!(without, Some(LogIndex(7)));
    world.voters.insert(witness(5));
    let beside = world.view(&progress, 9).acknowledgeable(2);
    assert_eq!(
        beside,
        Some(LogIndex(4)),
        "what the leader lacks is not acknowledged"
    );
}
