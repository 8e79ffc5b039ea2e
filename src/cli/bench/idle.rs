//! W5: what partitions cost while nothing happens, and how long they take to be created.
//!
//! Owns the measurement of one number of partitions on a new cluster: at rest without them, their creation, at rest with them.

use std::time::Duration;

use anyhow::Context;
use logboom::client::{Client, NewTopic};
use tokio::time::Instant;

use super::figures::{Figures, Usage};
use super::stage::Stage;

/// Times of one measurement.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// Left alone before anything is measured.
    pub(super) settle: Duration,
    pub(super) measure: Duration,
}

/// Measures a topic of `partitions` with `copies` each. `tell` hears how far it is.
pub(super) async fn measure(
    stage: &mut Stage,
    client: &Client,
    topic: NewTopic,
    times: Times,
    mut tell: impl FnMut(&str),
) -> anyhow::Result<Figures> {
    let (partitions, copies) = (topic.partitions, topic.replication_factor);
    tell("at rest, without partitions");
    let empty = rest(stage, times).await?;
    tell(&format!("creating {partitions} partitions"));
    let (led, in_sync) = stage.create(client, topic).await?;
    tell(&format!("at rest, with {partitions} partitions"));
    let full = rest(stage, times).await?;
    let each = f64::from(partitions.max(1));
    let kilobytes = (full.resident_megabytes - empty.resident_megabytes) * 1e3;
    let mut figures = Figures::default();
    figures.put("created_and_led_seconds", led.as_secs_f64());
    figures.put("created_and_in_sync_seconds", in_sync.as_secs_f64());
    figures.put("idle_cpu_percent_of_a_core", full.cpu_percent);
    figures.put("idle_cpu_percent_of_a_core_without", empty.cpu_percent);
    figures.put("brokers_resident_megabytes", full.resident_megabytes);
    figures.put(
        "brokers_resident_megabytes_without",
        empty.resident_megabytes,
    );
    figures.put("resident_kilobytes_per_partition", kilobytes / each);
    let replicas = each * f64::from(copies);
    figures.put("resident_kilobytes_per_replica", kilobytes / replicas);
    Ok(figures)
}

/// All brokers together at rest.
struct Rest {
    cpu_percent: f64,
    resident_megabytes: f64,
}

async fn rest(stage: &mut Stage, times: Times) -> anyhow::Result<Rest> {
    tokio::time::sleep(times.settle).await;
    let usage = |stage: &Stage| -> anyhow::Result<Usage> {
        stage.usage()?.context("the brokers are not its own")
    };
    let (before, began) = (usage(stage)?, Instant::now());
    tokio::time::sleep(times.measure).await;
    stage.check()?;
    let (after, seconds) = (usage(stage)?, began.elapsed().as_secs_f64());
    let cpu = after.cpu_seconds - before.cpu_seconds;
    Ok(Rest {
        cpu_percent: 100.0 * cpu / seconds,
        resident_megabytes: after.resident_megabytes,
    })
}
