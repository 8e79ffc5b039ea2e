//! What batches cost to encode, to check and to decode, per byte.
//!
//! Owns the making of batches: records of one size, with random values, as no compression is wanted.
//!
//! `cargo bench --bench codecs`

// A measurement ends when it cannot go on.
#![allow(clippy::expect_used, missing_docs)]

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use logboom::record::{Record, batches, decode_batch, encode_batch, put_placed, validate};
use logboom::types::{LeaderEpoch, Offset};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

/// Records in a batch, and bytes of the value of each.
const CASES: [(usize, usize); 3] = [(1, 100), (600, 100), (64, 1 << 10)];
const BATCH_BYTES_MAX: u32 = 1 << 20;

fn records(count: usize, size: usize) -> Vec<Record> {
    let mut rng = StdRng::seed_from_u64(1);
    (0..count)
        .map(|_| {
            let mut value = vec![0; size];
            rng.fill_bytes(&mut value);
            Record {
                value: Some(value.into()),
                ..Record::default()
            }
        })
        .collect()
}

fn batch(criterion: &mut Criterion) {
    let mut bench = criterion.benchmark_group("batch");
    for (count, size) in CASES {
        let records = records(count, size);
        let encoded = encode_batch(&records, None).expect("good records");
        bench.throughput(Throughput::Bytes(encoded.len() as u64));
        let name = format!("{count} x {size} B");
        bench.bench_function(BenchmarkId::new("encode", &name), |bencher| {
            bencher.iter(|| encode_batch(black_box(&records), None));
        });
        // What a leader does with it: lengths, limits and checksum, no record.
        bench.bench_function(BenchmarkId::new("validate", &name), |bencher| {
            bencher.iter(|| validate(black_box(&encoded), BATCH_BYTES_MAX));
        });
        // What a fetch does with it: the offset and the epoch are put in front of what is stored.
        bench.bench_function(BenchmarkId::new("place", &name), |bencher| {
            let mut out = BytesMut::with_capacity(encoded.len());
            bencher.iter(|| {
                out.clear();
                put_placed(&mut out, black_box(&encoded), Offset(77), LeaderEpoch(3));
            });
        });
        bench.bench_function(BenchmarkId::new("decode", &name), |bencher| {
            bencher.iter(|| decode_batch(black_box(&encoded)));
        });
    }
    // A fetch's answer is cut into its batches by their headers.
    let one: Bytes = encode_batch(&records(64, 1 << 10), None).expect("good records");
    let many = Bytes::from(one.repeat(16));
    bench.throughput(Throughput::Bytes(many.len() as u64));
    bench.bench_function("cut 16 of 64 x 1024 B", |bencher| {
        bencher.iter(|| batches(black_box(&many)).count());
    });
    bench.finish();
}

criterion_group!(benches, batch);
criterion_main!(benches);
