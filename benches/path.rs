//! The way of a record through three brokers in this process: produced, fetched, and produced again when its leader has died.
//!
//! Owns the measurement of a `LocalCluster` on real directories below `TMPDIR`, over real sockets. `logboom bench` measures brokers as
//! processes, and is what figures are quoted from; this is for comparing a change with the code before it.
//!
//! `cargo bench --bench path`

// A measurement ends when it cannot go on.
#![allow(clippy::expect_used, missing_docs)]

use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use logboom::client::{Client, NewTopic, Partition, Record};
use logboom::testkit::LocalCluster;
use logboom::types::{Acks, BrokerId, Offset};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::time::Instant;

const TOPIC: &str = "path";
/// Records of one append, and bytes of the value of each.
const CASES: [(usize, usize); 3] = [(1, 100), (64, 1 << 10), (600, 100)];
/// Longest time without an acknowledgement.
const FAILOVER_MAX: Duration = Duration::from_secs(30);

struct Stage {
    runtime: Runtime,
    cluster: LocalCluster,
    client: Client,
    partition: Partition,
    _directory: TempDir,
}

impl Stage {
    fn new() -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let directory = TempDir::with_prefix("logboom-bench-").expect("a temporary directory");
        let (cluster, client, partition) = runtime.block_on(async {
            let quick = |config: &mut logboom::config::BrokerConfig| {
                config.preferred_leader_delay_ms = 100;
            };
            let cluster = LocalCluster::start(3, directory.path(), quick)
                .await
                .expect("a cluster");
            let client = cluster.client().await.expect("a client");
            let topic = NewTopic::new(TOPIC, 1, 3).with_config("min.insync.replicas", "2");
            client.admin().create_topic(topic).await.expect("a topic");
            cluster.wait_until_in_sync(TOPIC).await.expect("copies");
            let partition = client.topic(TOPIC).expect("its name").partition(0);
            (cluster, client, partition)
        });
        Self {
            runtime,
            cluster,
            client,
            partition,
            _directory: directory,
        }
    }

    fn leader(&self) -> BrokerId {
        let found = self.cluster.wait_for_leader(TOPIC, 0);
        self.runtime.block_on(found).expect("a leader")
    }

    fn end(self) {
        drop(self.client);
        self.runtime.block_on(self.cluster.shutdown());
    }
}

fn records(count: usize, size: usize) -> Vec<Record> {
    let record = Record {
        value: Some(Bytes::from(vec![7; size])),
        ..Record::default()
    };
    vec![record; count]
}

async fn append(partition: &Partition, records: &[Record]) -> Offset {
    let ack = partition.append(records.iter().cloned(), Acks::All).await;
    ack.expect("a healthy cluster").offset
}

/// The same until one is acknowledged: of what was on its way when a connection broke nobody knows what came of it.
async fn acknowledged(partition: &Partition, records: &[Record]) {
    while partition
        .append(records.iter().cloned(), Acks::All)
        .await
        .is_err()
    {}
}

/// One append after the other: each is durable on two of three brokers before the next begins.
fn produce(criterion: &mut Criterion) {
    let stage = Stage::new();
    let mut bench = criterion.benchmark_group("produce");
    bench
        .measurement_time(Duration::from_secs(5))
        .sample_size(30);
    for (count, size) in CASES {
        let records = records(count, size);
        bench.throughput(Throughput::Bytes((count * size) as u64));
        bench.bench_function(
            BenchmarkId::from_parameter(format!("{count} x {size} B")),
            |bencher| {
                bencher
                    .to_async(&stage.runtime)
                    .iter(|| append(&stage.partition, &records));
            },
        );
    }
    bench.finish();
    stage.end();
}

/// A megabyte of a log, from the memory of its leader.
fn fetch(criterion: &mut Criterion) {
    const BYTES: u32 = 1 << 20;
    let stage = Stage::new();
    let records = records(64, 1 << 10);
    stage.runtime.block_on(async {
        for _ in 0..32 {
            append(&stage.partition, &records).await;
        }
    });
    let read = async || {
        let read = stage.partition.read(Offset(0), BYTES).await;
        read.expect("a healthy cluster").records.len()
    };
    let count = stage.runtime.block_on(read());
    let mut bench = criterion.benchmark_group("fetch");
    bench.throughput(Throughput::Bytes((count as u64) << 10));
    bench.bench_function("1 MiB of 1 KiB records", |bencher| {
        bencher.to_async(&stage.runtime).iter(&read);
    });
    bench.finish();
    stage.end();
}

/// From the death of the leader's broker to the next acknowledgement, as a client sees it.
fn failover(criterion: &mut Criterion) {
    let mut stage = Stage::new();
    let one = records(1, 100);
    let mut bench = criterion.benchmark_group("failover");
    bench
        .measurement_time(Duration::from_secs(30))
        .sample_size(10);
    bench.bench_function("next acknowledgement", |bencher| {
        bencher.iter_custom(|rounds| {
            let mut silence = Duration::ZERO;
            for _ in 0..rounds {
                let leader = stage.leader();
                stage.runtime.block_on(async {
                    append(&stage.partition, &one).await;
                    let killed = Instant::now();
                    stage.cluster.kill(leader).await;
                    let next = acknowledged(&stage.partition, &one);
                    tokio::time::timeout(FAILOVER_MAX, next)
                        .await
                        .expect("another leader");
                    silence += killed.elapsed();
                    stage.cluster.restart(leader).await.expect("its directory");
                    let whole = stage.cluster.wait_until_in_sync(TOPIC).await;
                    whole.expect("copies");
                });
            }
            silence
        });
    });
    bench.finish();
    stage.end();
}

criterion_group!(benches, produce, fetch, failover);
criterion_main!(benches);
