//! Which leaderships go back to their preferred replica, and when. Pure: image and time in, moves out.
//!
//! Owns since when each partition has been ready for its move, which moves are under way, and which partitions are left
//! alone for a while because a move failed. Moves nothing itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::types::{BrokerId, GroupId, ReplicaId, TopicPartition};

use super::metadata::{ClusterMetadata, PartitionRecord};

/// A leadership to hand over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderMove {
    /// The partition.
    pub partition: TopicPartition,
    /// Its group.
    pub group: GroupId,
    /// Who leads now.
    pub leader: BrokerId,
    /// Who should.
    pub to: ReplicaId,
}

/// The move that would give the partition its preferred leader, when it has another one and the preferred replica is alive,
/// in sync, and not just being added.
fn wanted_move(
    image: &ClusterMetadata,
    partition: &TopicPartition,
    record: &PartitionRecord,
) -> Option<LeaderMove> {
    let to = record.assignment.preferred_leader()?;
    let leader = record.leader?;
    let is_new = record
        .replacement
        .as_ref()
        .is_some_and(|change| change.adding.contains(&to));
    let possible = leader != to.broker()
        && image.is_alive(leader)
        && image.is_alive(to.broker())
        && record.isr.contains(&to.broker())
        && !is_new;
    let partition = partition.clone();
    possible.then_some(LeaderMove {
        partition,
        group: record.group,
        leader,
        to,
    })
}

/// Every move that can be made now, whatever was tried before: for an operator who asks for it.
pub fn all_moves(image: &ClusterMetadata) -> Vec<LeaderMove> {
    let partitions = image.partitions();
    partitions
        .filter_map(|(name, record)| wanted_move(image, &name, record))
        .collect()
}

/// Limits of the balancer.
#[derive(Debug, Clone, Copy)]
pub struct BalancerConfig {
    /// How long a partition must have been ready.
    pub delay: Duration,
    /// Moves under way at once.
    pub moves_max: usize,
    /// How long a partition is left alone after its first failed move; twice as long after each further one.
    pub mute: Duration,
    /// Longest time it is left alone.
    pub mute_max: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Muted {
    until: Instant,
    failures: u32,
}

/// Plans moves, a few at a time.
#[derive(Debug)]
pub struct Balancer {
    config: BalancerConfig,
    ready_since: BTreeMap<GroupId, (ReplicaId, Instant)>,
    muted: BTreeMap<GroupId, Muted>,
    moving: BTreeSet<GroupId>,
}

impl Balancer {
    /// Nothing seen yet.
    pub fn new(config: BalancerConfig) -> Self {
        Self {
            config,
            ready_since: BTreeMap::new(),
            muted: BTreeMap::new(),
            moving: BTreeSet::new(),
        }
    }

    /// Whether a later call of [`Balancer::plan`] with the same image could have another result.
    pub fn is_waiting(&self) -> bool {
        !self.ready_since.is_empty()
    }

    /// The moves to begin now; each must be answered with [`Balancer::done`].
    pub fn plan(&mut self, image: &ClusterMetadata, now: Instant) -> Vec<LeaderMove> {
        let mut ready = BTreeMap::new();
        let mut begun = Vec::new();
        for wanted in all_moves(image) {
            let group = wanted.group;
            let known = self
                .ready_since
                .get(&group)
                .filter(|(to, _)| *to == wanted.to);
            let since = known.map_or(now, |(_, since)| *since);
            ready.insert(group, (wanted.to, since));
            let settled = now.saturating_duration_since(since) >= self.config.delay;
            let muted = self
                .muted
                .get(&group)
                .is_some_and(|muted| now < muted.until);
            let room = self.moving.len() < self.config.moves_max;
            if settled && !muted && room && self.moving.insert(group) {
                begun.push(wanted);
            }
        }
        self.ready_since = ready;
        // A partition that is at rest for as long as it was muted starts afresh.
        let longest = self.config.mute_max;
        self.muted.retain(|_, muted| now < muted.until + longest);
        begun
    }

    /// The move of `group` ended. After a success the partition is left alone only until its new leader has reported.
    pub fn done(&mut self, group: GroupId, moved: bool, now: Instant) {
        self.moving.remove(&group);
        let failed_before = self.muted.get(&group).map_or(0, |muted| muted.failures);
        let (failures, pause) = if moved {
            (0, self.config.mute.min(Duration::from_secs(1)))
        } else {
            let pause = self.config.mute.saturating_mul(1 << failed_before.min(16));
            (failed_before + 1, pause.min(self.config.mute_max))
        };
        self.muted.insert(
            group,
            Muted {
                until: now + pause,
                failures,
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::metadata::tests::{Cluster, replica_on};

    const CONFIG: BalancerConfig = BalancerConfig {
        delay: Duration::from_secs(1),
        moves_max: 2,
        mute: Duration::from_secs(10),
        mute_max: Duration::from_secs(60),
    };

    /// A topic of `partitions` on brokers 1 and 2, all preferring 1, led by 2 with both in sync.
    fn led_by_the_other(partitions: u32) -> Cluster {
        let mut cluster = Cluster::of(3);
        cluster.create("t", &vec![(&[1, 2][..], Some(3)); partitions as usize]);
        for partition in 0..partitions {
            cluster.report(2, "t", partition, 3, &[1, 2]);
        }
        cluster
    }

    /// Goal: a preferred leader gets its leadership back after the delay, not before. Method: plan along a timeline.
    #[test]
    fn the_move_waits_for_the_delay() {
        let cluster = led_by_the_other(1);
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut balancer = Balancer::new(CONFIG);
        assert_eq!(balancer.plan(&cluster.image, at(0)), []);
        assert!(balancer.is_waiting());
        assert_eq!(balancer.plan(&cluster.image, at(999)), []);
        let moves = balancer.plan(&cluster.image, at(1_000));
        let record = &cluster.image.partitions().next().unwrap().1.clone();
        assert_eq!(moves.len(), 1);
        assert_eq!(
            (moves[0].leader, moves[0].to),
            (BrokerId(2), replica_on(record, 1))
        );
        assert_eq!(
            balancer.plan(&cluster.image, at(2_000)),
            [],
            "one move at a time"
        );
    }

    /// Goal: leaving the ISR, dying, or a new epoch's loss of it starts the while anew. Method: break each condition half way.
    #[test]
    fn an_interruption_starts_the_while_anew() {
        type Change = fn(&mut Cluster);
        let breaks: [(Change, Change); 2] = [
            (
                |c| c.report(2, "t", 0, 3, &[2]),
                |c| c.report(2, "t", 0, 3, &[1, 2]),
            ),
            (|c| c.set_alive(1, false), |c| c.set_alive(1, true)),
        ];
        for (break_it, mend_it) in breaks {
            let mut cluster = led_by_the_other(1);
            let begin = Instant::now();
            let at = |ms| begin + Duration::from_millis(ms);
            let mut balancer = Balancer::new(CONFIG);
            balancer.plan(&cluster.image, at(0));
            break_it(&mut cluster);
            assert_eq!(balancer.plan(&cluster.image, at(900)), []);
            assert!(!balancer.is_waiting());
            mend_it(&mut cluster);
            assert_eq!(balancer.plan(&cluster.image, at(1_000)), []);
            assert_eq!(balancer.plan(&cluster.image, at(1_900)), []);
            assert_eq!(balancer.plan(&cluster.image, at(2_000)).len(), 1);
        }
    }

    /// Goal: a few at a time, and a failed one is left alone, longer each time, while others go on. Method: five partitions,
    /// room for two.
    #[test]
    fn moves_are_few_and_failures_are_muted() {
        let cluster = led_by_the_other(5);
        let begin = Instant::now();
        let at = |s| begin + Duration::from_secs(s);
        let mut balancer = Balancer::new(CONFIG);
        balancer.plan(&cluster.image, at(0));
        let first = balancer.plan(&cluster.image, at(1));
        assert_eq!(first.len(), 2);
        assert_eq!(balancer.plan(&cluster.image, at(1)), []);
        balancer.done(first[0].group, false, at(1));
        let next = balancer.plan(&cluster.image, at(1));
        assert_eq!(next.len(), 1);
        assert_ne!(next[0].group, first[0].group);
    }

    /// Goal: each further failure mutes for longer, up to a bound; a success forgets them. Method: one partition that fails
    /// again and again, along a timeline in seconds.
    #[test]
    fn repeated_failures_mute_for_longer() {
        let cluster = led_by_the_other(1);
        let begin = Instant::now();
        let at = |s| begin + Duration::from_secs(s);
        let mut balancer = Balancer::new(CONFIG);
        balancer.plan(&cluster.image, at(0));
        let mut begun = 1;
        for pause in [10, 20, 40, 60, 60] {
            let moves = balancer.plan(&cluster.image, at(begun));
            assert_eq!(moves.len(), 1, "at {begun} s");
            balancer.done(moves[0].group, false, at(begun));
            assert_eq!(
                balancer.plan(&cluster.image, at(begun + pause - 1)),
                [],
                "{pause} s"
            );
            begun += pause;
        }
        let moves = balancer.plan(&cluster.image, at(begun));
        balancer.done(moves[0].group, true, at(begun));
        let moves = balancer.plan(&cluster.image, at(begun + 1));
        balancer.done(moves[0].group, false, at(begun + 1));
        assert_eq!(balancer.plan(&cluster.image, at(begun + 11)).len(), 1);
    }

    /// Goal: nothing is moved to where it cannot go. Method: a table of situations without a move.
    #[test]
    fn impossible_moves_are_not_planned() {
        type Change = fn(&mut Cluster);
        let situations: [(&str, Change); 5] = [
            ("preferred leads", |c| c.report(1, "t", 0, 4, &[1, 2])),
            ("preferred out of sync", |c| c.report(2, "t", 0, 4, &[2])),
            ("preferred dead", |c| c.set_alive(1, false)),
            ("leader dead", |c| c.set_alive(2, false)),
            ("preferred lost its disk", |c| {
                c.set_alive(1, false);
                c.register(1, 77, 1, 0).unwrap();
                c.report(2, "t", 0, 4, &[1, 2]);
            }),
        ];
        for (name, change) in situations {
            let mut cluster = led_by_the_other(1);
            assert_eq!(all_moves(&cluster.image).len(), 1);
            change(&mut cluster);
            assert_eq!(all_moves(&cluster.image), [], "{name}");
        }
        let mut cluster = Cluster::of(3);
        cluster.create("t", &[(&[1, 2], Some(3))]);
        assert_eq!(all_moves(&cluster.image), [], "no leader yet");
    }
}
