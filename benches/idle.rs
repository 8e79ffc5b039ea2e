//! What partitions cost while nothing happens: CPU, memory, context switches, and the time to create them.
//!
//! Owns the measurement of three brokers as three processes. For each number of partitions (replication factor 3) it starts a
//! fresh cluster, measures it empty, creates one topic, waits until every replica is in sync, and measures again.
//! Linux only: the figures come from `/proc`.
//!
//! `cargo bench --bench idle -- 100 500` (numbers of partitions; 100 when none is given; 20 s each, or SECONDS=…)

// A measurement talks to whoever runs it, and ends when it cannot go on.
#![allow(
    clippy::print_stdout,
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used
)]
// A duration or a number of bytes as a figure in a table.
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]

// Starting brokers is the part of the harness that is needed here.
#[allow(dead_code, unused_imports)]
#[path = "../raft-tests/support/mod.rs"]
mod support;

use std::fs;
use std::time::Duration;

use anyhow::{Context, ensure};
use logboom::client::{Client, NewTopic};
use support::{ProcessCluster, wait_for};
use tokio::time::Instant;

const BROKERS: u32 = 3;
const TOPIC: &str = "idle";
/// Longest time for a topic to be created and in sync.
const CREATED_WITHIN: Duration = Duration::from_secs(300);
/// What is left over from the creation has calmed down after this.
const SETTLE: Duration = Duration::from_secs(5);
/// The unit of CPU time in `/proc`: `USER_HZ`, 100 on every usual Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used until now.
#[derive(Debug, Clone, Copy)]
struct Usage {
    cpu_ticks: u64,
    switches: u64,
    resident_bytes: u64,
    threads: u64,
}

impl Usage {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name, in parentheses, may hold anything.
        let (_, fields) = stat.rsplit_once(") ").context("the process's figures")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let number = |at: usize| -> anyhow::Result<u64> {
            Ok(fields.get(at).context("a figure is missing")?.parse()?)
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let mut switches = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            // A thread may end between two looks.
            let text = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
            switches += field(&text, "voluntary_ctxt_switches:")
                + field(&text, "nonvoluntary_ctxt_switches:");
        }
        Ok(Self {
            cpu_ticks: number(11)? + number(12)?,
            switches,
            resident_bytes: field(&status, "VmRSS:") * 1024,
            threads: field(&status, "Threads:"),
        })
    }
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// One broker at rest.
#[derive(Debug, Clone, Copy)]
struct Rest {
    /// Percent of one core.
    cpu: f64,
    switches_per_second: f64,
    resident_bytes: u64,
    threads: u64,
}

async fn measure(cluster: &ProcessCluster, time: Duration) -> anyhow::Result<Vec<Rest>> {
    let usage = || -> anyhow::Result<Vec<Usage>> {
        let pids = cluster.ids().into_iter().map(|id| cluster.pid(id));
        pids.map(|pid| Usage::of(pid.context("a broker has ended")?))
            .collect()
    };
    let (before, began) = (usage()?, Instant::now());
    tokio::time::sleep(time).await;
    let (after, seconds) = (usage()?, began.elapsed().as_secs_f64());
    let rest = before.iter().zip(&after).map(|(before, after)| Rest {
        cpu: (after.cpu_ticks - before.cpu_ticks) as f64 / TICKS_PER_SECOND / seconds * 100.0,
        switches_per_second: (after.switches.saturating_sub(before.switches)) as f64 / seconds,
        resident_bytes: after.resident_bytes,
        threads: after.threads,
    });
    Ok(rest.collect())
}

/// Creates the topic; when all partitions had a leader, and when all replicas were in sync.
async fn create(client: &Client, partitions: u32) -> anyhow::Result<(Duration, Duration)> {
    let began = Instant::now();
    client
        .admin()
        .create_topic(NewTopic::new(TOPIC, partitions, BROKERS))
        .await?;
    let in_sync = async |all: bool| {
        wait_for("the partitions", CREATED_WITHIN, async || {
            let views = client.admin().describe(Some(&[TOPIC.to_owned()])).await?;
            let topic = views.first().context("no topic")?;
            let wanted = |view: &logboom::api::PartitionView| {
                view.leader.is_some() && (!all || view.isr.len() == view.replicas.len())
            };
            let count = topic.partitions.iter().filter(|view| wanted(view)).count();
            ensure!(count == topic.partitions.len(), "{count} of {partitions}");
            Ok(began.elapsed())
        })
        .await
    };
    Ok((in_sync(false).await, in_sync(true).await))
}

fn show(what: &str, rest: &[Rest]) {
    for (broker, rest) in (1..).zip(rest) {
        println!(
            "| {what} | {broker} | {:.2} | {:.0} | {:.1} | {} |",
            rest.cpu,
            rest.switches_per_second,
            rest.resident_bytes as f64 / 1e6,
            rest.threads
        );
    }
}

fn mean(rest: &[Rest], figure: impl Fn(&Rest) -> f64) -> f64 {
    rest.iter().map(figure).sum::<f64>() / rest.len().max(1) as f64
}

async fn run(partitions: u32, time: Duration) -> anyhow::Result<()> {
    let cluster = ProcessCluster::start_brokers(BROKERS).await;
    let client = cluster.client().await;
    tokio::time::sleep(SETTLE).await;
    let empty = measure(&cluster, time).await?;
    let (led, in_sync) = create(&client, partitions).await?;
    tokio::time::sleep(SETTLE).await;
    let full = measure(&cluster, time).await?;
    println!(
        "\n{partitions} partitions, replication factor {BROKERS}, {} s at rest",
        time.as_secs()
    );
    println!("| partitions | broker | % of a core | context switches/s | resident MB | threads |");
    println!("|---|---|---|---|---|---|");
    show("0", &empty);
    show(&partitions.to_string(), &full);
    let replicas = f64::from(partitions);
    let cpu = mean(&full, |rest| rest.cpu) - mean(&empty, |rest| rest.cpu);
    let bytes = |rest: &Rest| rest.resident_bytes as f64;
    let memory = mean(&full, bytes) - mean(&empty, bytes);
    println!(
        "per replica: {:.4} % of a core, {:.0} KB; all led after {:.2} s, all in sync after {:.2} s",
        cpu / replicas,
        memory / replicas / 1e3,
        led.as_secs_f64(),
        in_sync.as_secs_f64()
    );
    Ok(())
}

fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("?", |text| text.trim_start_matches([' ', '\t', ':']));
    let count = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let memory = field(&read("/proc/meminfo"), "MemTotal:") / 1024;
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{count} × {model}, {memory} MiB, Linux {}", kernel.trim())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let given: Vec<u32> = std::env::args()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    let counts = if given.is_empty() { vec![100] } else { given };
    let seconds = std::env::var("SECONDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(20);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("{}; load before: {}", machine(), load.trim());
    for partitions in counts {
        run(partitions, Duration::from_secs(seconds)).await?;
    }
    Ok(())
}
