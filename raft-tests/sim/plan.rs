//! What a seed stands for: the cluster, its topics, the network, the disks and the length of the run.
//!
//! Owns the drawing of it all. Nothing is drawn elsewhere but by the nemesis, as it goes.

use std::fmt;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// One topic of a run.
#[derive(Debug, Clone)]
pub struct TopicPlan {
    pub name: String,
    pub partitions: u32,
    pub replication_factor: u32,
    pub min_in_sync: u32,
}

/// A run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub brokers: u32,
    pub topics: Vec<TopicPlan>,
    /// Simulated time of one turn of every host.
    pub tick: Duration,
    pub latency_max: Duration,
    /// Longest time that one operation of a disk takes.
    pub disk_max: Duration,
    pub heartbeat_ms: u64,
    pub election_min_ms: u64,
    pub segment_bytes: u64,
    pub cache_bytes: u64,
    pub record_bytes: usize,
    /// Wait of each session between two calls.
    pub pause: Duration,
    /// How long faults are injected.
    pub faults_for: Duration,
    /// Between the beginnings of two faults, on average.
    pub fault_every: Duration,
    /// Whether hosts take their turns in another order each time.
    pub shuffled: bool,
}

fn one_of<T: Copy>(rng: &mut SmallRng, choices: &[T]) -> T {
    choices[rng.random_range(0..choices.len())]
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed ^ 0x706c_616e);
        let brokers = one_of(&mut rng, &[3, 3, 3, 4, 5]);
        let mut topics = vec![
            TopicPlan {
                name: "three".to_owned(),
                partitions: rng.random_range(1..=2),
                replication_factor: 3,
                min_in_sync: one_of(&mut rng, &[1, 2, 2]),
            },
            TopicPlan {
                name: "two".to_owned(),
                partitions: rng.random_range(1..=2),
                replication_factor: 2,
                min_in_sync: 1,
            },
        ];
        if rng.random_bool(0.2) {
            topics.push(TopicPlan {
                name: "one".to_owned(),
                partitions: 1,
                replication_factor: 1,
                min_in_sync: 1,
            });
        }
        let heartbeat_ms = one_of(&mut rng, &[50, 100, 150]);
        Self {
            seed,
            brokers,
            topics,
            tick: Duration::from_millis(one_of(&mut rng, &[1, 2, 2, 5, 5])),
            latency_max: Duration::from_millis(one_of(&mut rng, &[2, 5, 15])),
            disk_max: Duration::from_millis(one_of(&mut rng, &[0, 2, 5, 15])),
            heartbeat_ms,
            election_min_ms: heartbeat_ms * one_of(&mut rng, &[4, 5, 7]),
            segment_bytes: 1 << 20,
            cache_bytes: one_of(&mut rng, &[64 << 10, 1 << 20, 16 << 20]),
            record_bytes: one_of(&mut rng, &[32, 200, 2000, 8000]),
            pause: Duration::from_millis(one_of(&mut rng, &[5, 10, 20])),
            faults_for: Duration::from_millis(rng.random_range(6_000..16_000)),
            fault_every: Duration::from_millis(one_of(&mut rng, &[400, 800, 1500])),
            shuffled: rng.random_bool(0.5),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let topics = self.topics.iter().map(|topic| {
            format!(
                "{}: {}x{}, min {}",
                topic.name, topic.partitions, topic.replication_factor, topic.min_in_sync
            )
        });
        write!(
            f,
            "seed {}: {} brokers; topics {}; tick {:?}, latency to {:?}, disk to {:?}; heartbeat {} ms, election from {} ms; cache {} KiB, \
             records of {} B every {:?}; faults for {:?} every {:?}{}",
            self.seed,
            self.brokers,
            topics.collect::<Vec<_>>().join(", "),
            self.tick,
            self.latency_max,
            self.disk_max,
            self.heartbeat_ms,
            self.election_min_ms,
            self.cache_bytes >> 10,
            self.record_bytes,
            self.pause,
            self.faults_for,
            self.fault_every,
            if self.shuffled { ", shuffled" } else { "" }
        )
    }
}
