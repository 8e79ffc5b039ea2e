//! The promises at the disk, shown on real files: what is acknowledged was synced first, a failing disk stops its broker
//! and nobody else, rotten bits are never served, a full disk refuses.
//!
//! - `trace`: reads what `strace` wrote.
//! - `audit`: holds a broker's trace against the rule that a claim follows its sync.
//! - `order`, `faults`, `rot`, `full`: the tests.

// A test that cannot go on ends with a text that says why, figures are printed, and an absent value is told from an unreadable one.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::option_option
)]

mod audit;
mod faults;
mod full;
mod order;
mod rot;
mod trace;

use std::time::Duration;

use anyhow::ensure;
use logboom::client::{Client, NewTopic};

use crate::support::wait_for;

/// How long a cluster may take to heal.
const HEAL: Duration = Duration::from_secs(60);

/// Creates a topic and waits until every replica is in sync.
async fn create(client: &Client, name: &str, partitions: u32, factor: u32) {
    let topic = NewTopic::new(name, partitions, factor);
    client
        .admin()
        .create_topic(topic)
        .await
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    in_sync(client, name).await;
}

/// Waits until every replica of the topic is in sync.
async fn in_sync(client: &Client, topic: &str) {
    wait_for(&format!("{topic} to be in sync"), HEAL, async || {
        let topics = client.admin().describe(Some(&[topic.to_owned()])).await?;
        ensure!(topics.len() == 1, "{} topics", topics.len());
        for partition in topics.iter().flat_map(|view| &view.partitions) {
            ensure!(partition.leader.is_some(), "{partition:?}");
            ensure!(
                partition.isr.len() == partition.replicas.len(),
                "{partition:?}"
            );
        }
        Ok(())
    })
    .await;
}

/// Whether `strace` can be used here; says so when it cannot.
fn strace_is_there() -> bool {
    let ran = std::process::Command::new("strace")
        .args(["-f", "-D", "-o", "/dev/null", "true"])
        .status();
    let there = ran.is_ok_and(|status| status.success());
    if !there {
        println!("SKIPPED: strace is missing or may not trace here; install it, as .ci/run does");
        eprintln!("SKIPPED: strace is missing or may not trace here; install it, as .ci/run does");
    }
    there
}

/// The words that put a program under `strace`, which writes to `output`. The tracer is no parent of the program: signals
/// and exit codes are the program's own.
fn strace(output: &std::path::Path, more: &[&str]) -> Vec<String> {
    let path = output.display().to_string();
    let fixed = [
        "strace",
        "-f",
        "-D",
        "--seccomp-bpf",
        "-y",
        "-ttt",
        "-T",
        "-s",
        "65536",
        "-o",
    ];
    let words = fixed.iter().map(|word| (*word).to_owned()).chain([path]);
    words
        .chain(more.iter().map(|word| (*word).to_owned()))
        .collect()
}
