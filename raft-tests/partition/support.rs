//! One partition on a few brokers in one process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use logboom::api::{Appended, OffsetSpec, Response};
use logboom::config::TopicConfig;
use logboom::partition::{Partition, PartitionLimits, PartitionSpec};
use logboom::record::{ProducerStamp, Record, decode_batch, encode_batch};
use logboom::runtime::Tasks;
use logboom::types::{
    Acks, Assignment, Endpoint, Error, Offset, PartitionId, ReplicaId, TopicName, TopicPartition,
};
use tokio::time::Instant;

use crate::raft_support::{Cluster, GROUP, PATIENCE, quick, set, soon, until};

/// A batch of these values; a value that is a number is also its record's timestamp.
pub(crate) fn batch(values: &[impl AsRef<str>], stamp: Option<ProducerStamp>) -> Bytes {
    let record = |value: &str| Record {
        timestamp_ms: value.parse().unwrap_or(0),
        value: Some(Bytes::from(value.to_owned())),
        ..Record::default()
    };
    let records: Vec<Record> = values.iter().map(|value| record(value.as_ref())).collect();
    encode_batch(&records, stamp).unwrap()
}

/// The record bytes of a fetch's answer.
pub(crate) fn records(fetched: &Response) -> Bytes {
    match fetched {
        Response::Fetched { records, .. } => records.clone(),
        other => panic!("{other:?}"),
    }
}

/// The offsets of a fetch's answer.
pub(crate) fn offsets(fetched: &Response) -> Vec<u64> {
    decode_batch(&records(fetched))
        .unwrap()
        .iter()
        .map(|record| record.offset.0)
        .collect()
}

/// The values of a fetch's answer.
pub(crate) fn values(fetched: &Response) -> Vec<String> {
    let text = |value: Option<Bytes>| String::from_utf8(value.unwrap().to_vec()).unwrap();
    decode_batch(&records(fetched))
        .unwrap()
        .into_iter()
        .map(|record| text(record.value))
        .collect()
}

/// The end of patience.
pub(crate) fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// One partition, its first replica preferred.
pub(crate) struct World {
    cluster: Cluster,
    pub(crate) partitions: BTreeMap<u32, Partition>,
    assignment: Assignment,
    config: TopicConfig,
    is_full: Arc<AtomicBool>,
}

impl World {
    /// Starts brokers, replicas and the group, and waits until it serves.
    pub(crate) async fn start(
        replicas: &[ReplicaId],
        witness: Option<ReplicaId>,
        config: TopicConfig,
    ) -> Self {
        let assignment = Assignment {
            replicas: replicas.to_vec(),
            witness,
        };
        let brokers: Vec<u32> = assignment
            .voters()
            .map(|replica| replica.broker().0)
            .collect();
        let cluster = Cluster::new(&brokers, quick()).await;
        let is_full = Arc::new(AtomicBool::new(false));
        let mut world = Self {
            cluster,
            partitions: BTreeMap::new(),
            assignment,
            config,
            is_full,
        };
        for broker in brokers {
            world.open(broker).await;
        }
        let voters: Vec<ReplicaId> = world.assignment.voters().collect();
        let first = &world.partitions[&voters[0].broker().0];
        soon("initialize", first.group().initialize(set(&voters)))
            .await
            .unwrap();
        world.serving().await;
        world
    }

    async fn open(&mut self, broker: u32) {
        let is_full = Arc::clone(&self.is_full);
        let spec = PartitionSpec {
            partition: TopicPartition {
                topic: TopicName::new("topic-x").unwrap(),
                partition: PartitionId(0),
            },
            group: GROUP,
            me: self.assignment.on(broker.into()).unwrap(),
            assignment: self.assignment.clone(),
            leaving: BTreeSet::new(),
            config: self.config.clone(),
            limits: PartitionLimits {
                inflight_bytes_max: 100_000
                    + (usize::from(self.assignment.replicas.len() > 1) << 24),
                entry_bytes_max: 100_000 + (usize::from(self.assignment.replicas.len() > 1) << 20),
                lag_time_max: Duration::from_secs(5),
                ..PartitionLimits::default()
            },
            endpoints: Arc::new(|broker| {
                Some(Endpoint {
                    broker,
                    address: format!("broker-{broker}:1"),
                })
            }),
            room: Arc::new(move || {
                let full = Error::StorageFull {
                    free: 1,
                    reserve: 2,
                };
                if is_full.load(Ordering::Relaxed) {
                    Err(full)
                } else {
                    Ok(())
                }
            }),
        };
        let groups = &self.cluster.nodes[&broker].groups;
        let tasks = Tasks::new();
        let started = Partition::start(spec, groups, &tasks);
        self.partitions
            .insert(broker, soon("start", started).await.unwrap());
    }

    /// Ends a broker as the death of its process does.
    pub(crate) async fn down(&mut self, broker: u32) {
        let partition = self.partitions.remove(&broker).unwrap();
        self.cluster.down(broker).await;
        soon("stop", partition.stop()).await;
    }

    /// Starts a broker and its replica again.
    pub(crate) async fn up(&mut self, broker: u32) {
        self.cluster.up(broker).await;
        self.open(broker).await;
    }

    /// From now on a broker hears nothing, or hears again; its connections stay.
    pub(crate) fn set_deaf(&self, broker: u32, deaf: bool) {
        self.cluster.nodes[&broker].set_deaf(deaf);
    }

    /// The brokers of the replicas that do not serve.
    pub(crate) fn followers(&self) -> Vec<u32> {
        let leader = self.leader().me().broker().0;
        let brokers = self.partitions.keys().copied();
        brokers.filter(|broker| *broker != leader).collect()
    }

    /// Waits until some replica serves.
    pub(crate) async fn serving(&self) {
        let end = deadline();
        while self.find_leader().is_none() {
            let statuses: Vec<_> = self
                .partitions
                .values()
                .map(|partition| {
                    (
                        partition.clone(),
                        partition.group().status().borrow().clone(),
                    )
                })
                .collect();
            assert!(Instant::now() < end, "nobody serves: {statuses:#?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn find_leader(&self) -> Option<&Partition> {
        let leaders = self
            .partitions
            .values()
            .filter(|partition| partition.is_leader());
        leaders.max_by_key(|partition| partition.view().epoch)
    }

    /// The replica that serves.
    pub(crate) fn leader(&self) -> &Partition {
        self.find_leader().unwrap()
    }

    /// Hands leadership to the replica on `broker`.
    pub(crate) async fn hand_over(&mut self, broker: u32) {
        let to = self.partitions[&broker].me();
        let group = self.leader().group().clone();
        let end = Instant::now() + PATIENCE;
        while !self.partitions[&broker].is_leader() {
            assert!(
                Instant::now() < end,
                "not in time: leadership of broker {broker}"
            );
            // Refused while the replica lacks an entry, and then asked again.
            if group.transfer_leader(to).await.is_ok() {
                until("the new leader serves", || {
                    self.partitions[&broker].is_leader()
                })
                .await;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Appends at the leader.
    pub(crate) async fn append(&self, batch: Bytes, acks: Acks) -> Result<Vec<Appended>, Error> {
        soon("an append", self.leader().produce(batch, acks, deadline())).await
    }

    /// Reads what is there, up to 1 MiB.
    pub(crate) async fn fetch(&self, from: u64) -> Result<Response, Error> {
        self.fetch_with(from, 1 << 20, 0, Duration::ZERO).await
    }

    /// Reads at the leader.
    pub(crate) async fn fetch_with(
        &self,
        from: u64,
        max_bytes: u32,
        min_bytes: u32,
        max_wait: Duration,
    ) -> Result<Response, Error> {
        let leader = self.leader();
        soon(
            "a fetch",
            leader.fetch(Offset(from), max_bytes, min_bytes, max_wait),
        )
        .await
    }

    /// Finds an offset at the leader.
    pub(crate) async fn find(&self, spec: OffsetSpec) -> Option<Offset> {
        let found = soon("an offset", self.leader().find_offset(spec, deadline())).await;
        match found.unwrap() {
            Response::FoundOffset { offset, .. } => offset,
            other => panic!("{other:?}"),
        }
    }

    /// From now on the disk has no room.
    pub(crate) fn fill_disk(&mut self) {
        self.is_full.store(true, Ordering::Relaxed);
    }

    /// Stops everything.
    pub(crate) async fn stop(mut self) {
        let brokers: Vec<u32> = self.partitions.keys().copied().collect();
        for broker in brokers {
            self.down(broker).await;
        }
    }
}
