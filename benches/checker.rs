//! How long the checker takes for a long run, and how much memory.
//!
//! Owns the making of a right history of the wanted length: four partitions, appends of one to four records, reads, ends. Linux
//! only: the figures of memory come from `/proc`.
//!
//! `cargo bench --bench checker -- 1000000` (operations; a million when nothing is given; five runs, or RUNS=…)

// A measurement talks to whoever runs it, and ends when it cannot go on.
#![allow(
    clippy::print_stdout,
    clippy::panic,
    clippy::expect_used,
    clippy::indexing_slicing
)]
// A duration or a number of bytes as a figure in a table.
#![allow(clippy::cast_precision_loss)]

use std::fs;
use std::time::Duration;

use logboom::testkit::checker::{Coverage, check};
use logboom::testkit::history::{
    AckLevel, Call, FinalLog, History, Operation, Outcome, ProducerPosition,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

const PARTITIONS: u32 = 4;
/// Of these, the first half are idempotent producers.
const WRITERS: u32 = 16;

/// A right history of so many operations.
fn history(operations: usize) -> History {
    let mut rng = StdRng::seed_from_u64(1);
    let mut logs: Vec<FinalLog> = (0..PARTITIONS)
        .map(|partition| FinalLog {
            partition,
            ..FinalLog::default()
        })
        .collect();
    let mut history = History::default();
    let (mut now, mut value) = (10_000, 0);
    let mut batches = vec![vec![0_u64]; logs.len()];
    for _ in 0..operations {
        now += rng.random_range(1..1_000);
        let partition = rng.random_range(0..PARTITIONS);
        let which = usize::try_from(partition).expect("a small number");
        let log = &mut logs[which];
        let (call, outcome) = match rng.random_range(0..10) {
            0..6 => {
                let count = rng.random_range(1..5);
                let values: Vec<u64> = (value..value + count).collect();
                value += count;
                let base = log.end;
                let is_lost = rng.random_ratio(1, 50);
                if !is_lost {
                    log.records.extend((base..).zip(values.iter().copied()));
                    log.end += count;
                    batches[which].push(log.end);
                }
                let session = rng.random_range(0..WRITERS);
                let producer = (session < WRITERS / 2).then_some(ProducerPosition {
                    id: session.into(),
                    epoch: 0,
                });
                let call = Call::Append {
                    values,
                    producer,
                    acks: AckLevel::All,
                };
                let outcome = if is_lost {
                    Outcome::Unknown {
                        reason: "no answer".to_owned(),
                    }
                } else {
                    Outcome::Appended {
                        base,
                        epoch: now / 1_000_000_000,
                        copies: 2,
                    }
                };
                (call, outcome)
            }
            6..9 => {
                let ends = &batches[which];
                let from = ends[ends.len().saturating_sub(4)];
                let place = usize::try_from(from).expect("an offset in memory");
                let outcome = Outcome::Fetched {
                    log_start: 0,
                    high_watermark: log.end,
                    epoch: Some(now / 1_000_000_000),
                    records: log.records[place..].to_vec(),
                };
                (Call::Fetch { from }, outcome)
            }
            _ => {
                let end = log.end;
                let epoch = Some(now / 1_000_000_000);
                (Call::LinearizableEnd, Outcome::End { end, epoch })
            }
        };
        history.operations.push(Operation {
            session: rng.random_range(0..WRITERS),
            // Many overlap, as many as there are clients.
            invoked_ns: now - rng.random_range(0..8_000),
            completed_ns: Some(now + rng.random_range(0..8_000)),
            partition,
            call,
            outcome,
        });
    }
    // Sessions were drawn, so that a producer's order would be chance: each append is a producer of its own.
    for (number, operation) in (WRITERS..).zip(&mut history.operations) {
        operation.session = number;
    }
    for log in &mut logs {
        log.began_ns = now + 100_000;
    }
    history.logs = logs;
    history
}

fn kilobytes(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// CPU time of this process until now, in ticks of 10 ms.
fn cpu_ticks() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name, in parentheses, may hold anything.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let used = fields.split(' ').skip(11).take(2);
    used.filter_map(|field| field.parse::<u64>().ok()).sum()
}

fn main() {
    let wanted = std::env::args().skip(1).find_map(|word| word.parse().ok());
    let operations: usize = wanted.unwrap_or(1_000_000);
    let runs = std::env::var("RUNS")
        .ok()
        .and_then(|text| text.parse().ok());
    let history = history(operations);
    let before = kilobytes("VmRSS:");
    // From now on the peak is the checker's.
    fs::write("/proc/self/clear_refs", "5").ok();
    let ticks = cpu_ticks();
    let mut times: Vec<Duration> = (0..runs.unwrap_or(5))
        .map(|_| {
            let began = Instant::now();
            let report = check(&history, &Coverage::default());
            let took = began.elapsed();
            assert!(report.passed(), "{report}");
            took
        })
        .collect();
    let runs = u64::try_from(times.len().max(1)).unwrap_or(u64::MAX);
    let cpu = (cpu_ticks() - ticks) as f64 / 100.0 / runs as f64;
    times.sort_unstable();
    let peak = kilobytes("VmHWM:").saturating_sub(before);
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    let records: usize = history.logs.iter().map(|log| log.records.len()).sum();
    println!(
        "{operations} operations, {records} records found: median of {runs} runs {:.2} s ({:.2} to {:.2} s; CPU {cpu:.2} s), {:.0} operations/s, {} bytes of memory per operation beside the history",
        median.as_secs_f64(),
        times.first().copied().unwrap_or_default().as_secs_f64(),
        times.last().copied().unwrap_or_default().as_secs_f64(),
        operations as f64 / median.as_secs_f64(),
        peak * 1024 / u64::try_from(operations.max(1)).unwrap_or(u64::MAX)
    );
}
