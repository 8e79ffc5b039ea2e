//! The promises, shown on real broker processes: killed with SIGKILL, restarted, given wrong or old data directories.

// A test that cannot go on ends with a text that says why, and a kill test says what it measured.
#![allow(clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod controller;
mod faces;
mod identity;
mod kills;
mod moves;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::ensure;
use logboom::api::{PartitionView, TopicView};
use logboom::client::{Client, NewTopic};

use crate::support::wait_for;

/// How long a cluster may take to heal.
const HEAL: Duration = Duration::from_secs(60);

/// What a random run is replayed with: `SEED` of the environment, else a new one.
fn seed() -> u64 {
    let given = std::env::var("SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    given.unwrap_or_else(logboom::runtime::random_seed)
}

/// Creates a topic, with configuration pairs.
async fn create(
    client: &Client,
    name: &str,
    partitions: u32,
    factor: u32,
    config: &[(&str, &str)],
) {
    let mut topic = NewTopic::new(name, partitions, factor);
    for (key, value) in config {
        topic = topic.with_config(key, value);
    }
    client
        .admin()
        .create_topic(topic)
        .await
        .unwrap_or_else(|error| panic!("{name}: {error}"));
}

async fn describe(client: &Client, topic: &str) -> anyhow::Result<TopicView> {
    let mut topics = client.admin().describe(Some(&[topic.to_owned()])).await?;
    ensure!(topics.len() == 1, "{} topics", topics.len());
    Ok(topics.remove(0))
}

/// Waits until every replica of the topic is in sync, and the preferred one leads.
async fn healed(client: &Client, topic: &str) -> BTreeMap<u32, PartitionView> {
    wait_for(&format!("{topic} to heal"), HEAL, async || {
        let view = describe(client, topic).await?;
        for partition in &view.partitions {
            let preferred = partition.replicas.first().map(|replica| replica.broker);
            ensure!(
                partition.isr.len() == partition.replicas.len(),
                "{partition:?}"
            );
            ensure!(partition.leader == preferred, "{partition:?}");
        }
        Ok(view
            .partitions
            .into_iter()
            .map(|view| (view.partition.0, view))
            .collect())
    })
    .await
}
