//! What it takes to make entries durable, beside a file that is written and synced in a loop.
//!
//! Owns the measurement of one store on a real directory, below `TMPDIR`. An iteration appends one entry to each group and
//! waits until all of them are durable; the loop beside it appends as many bytes to a file and calls `fdatasync` once, which no
//! store can do without.
//!
//! `cargo bench --bench store`

// A measurement ends when it cannot go on.
#![allow(clippy::expect_used, clippy::disallowed_methods, missing_docs)]

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::channel;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use logboom::storage::{EntryKind, GroupStore, LogEntry, Store, StoreConfig};
use logboom::types::{BrokerId, EntryId, GroupId, LeaderEpoch, LogIndex, ReplicaId, ReplicaKind};
use tempfile::TempDir;

/// Groups that append at once, and bytes of the entry of each.
const CASES: [(u64, usize); 8] = [
    (1, 100),
    (1, 4 << 10),
    (1, 64 << 10),
    (1, 1 << 20),
    (16, 100),
    (16, 4 << 10),
    (256, 100),
    (256, 4 << 10),
];

struct Stage {
    store: Store,
    groups: Vec<GroupStore>,
    next: u64,
    _directory: TempDir,
}

impl Stage {
    fn new(groups: u64) -> Self {
        let directory = TempDir::with_prefix("logboom-bench-").expect("a temporary directory");
        let config = StoreConfig {
            directory: directory.path().join("data"),
            segment_bytes: 64 << 20,
            cache_bytes: 16 << 20,
            catalog_cache_bytes: 8 << 20,
            catalog_sync_bytes: 64 << 20,
            commit_bytes_max: 4 << 20,
            reserve_bytes: 1 << 20,
        };
        let store = Store::open(&config, BrokerId(1)).expect("an empty directory");
        let replica = ReplicaId::new(BrokerId(1), ReplicaKind::Data, 1);
        let groups = (1..=groups).map(|id| store.group(GroupId(id), replica).expect("a group"));
        Self {
            groups: groups.collect(),
            store,
            next: 0,
            _directory: directory,
        }
    }

    /// An entry to each group; returns when the last one is durable.
    fn append(&mut self, payload: &Bytes) {
        let (sender, durable) = channel();
        for group in &self.groups {
            let entry = LogEntry {
                id: EntryId {
                    epoch: LeaderEpoch(1),
                    index: LogIndex(self.next),
                },
                kind: EntryKind::Command,
                payload: payload.clone(),
            };
            let sender = sender.clone();
            let told = Box::new(move || sender.send(()).expect("somebody waits"));
            group.append(vec![entry], told).expect("an open store");
        }
        self.next += 1;
        for _ in &self.groups {
            durable.recv().expect("an answer");
        }
    }
}

fn append(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut bench = criterion.benchmark_group("store");
    bench
        .measurement_time(Duration::from_secs(3))
        .sample_size(30);
    for (groups, size) in CASES {
        let bytes = groups * size as u64;
        bench.throughput(Throughput::Bytes(bytes));
        let name = format!("{groups} x {size} B");
        let payload = Bytes::from(vec![7; size]);
        bench.bench_function(BenchmarkId::new("append", &name), |bencher| {
            let mut stage = Stage::new(groups);
            bencher.iter(|| stage.append(&payload));
            runtime
                .block_on(stage.store.close())
                .expect("a close in order");
        });
        bench.bench_function(BenchmarkId::new("fdatasync", &name), |bencher| {
            let directory = TempDir::with_prefix("logboom-bench-").expect("a temporary directory");
            let mut file = File::create(directory.path().join("file")).expect("a file");
            let all = payload.repeat(usize::try_from(groups).expect("a small number"));
            bencher.iter(|| {
                file.write_all(&all).expect("room");
                file.sync_data().expect("a disk");
            });
        });
    }
    bench.finish();
}

criterion_group!(benches, append);
criterion_main!(benches);
