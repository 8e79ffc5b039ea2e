//! The cluster that is measured, for one run: brokers of its own as child processes, or one that was named.
//!
//! Owns the brokers and the directory of the run; own brokers are new for every run, so that no run finds what another one left. What they
//! have used and flushed is read here, as far as it can be known.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use futures_util::future::try_join_all;
use logboom::api::PartitionView;
use logboom::client::{Client, ClientConfig, NewTopic};
use tokio::time::Instant;

use super::super::children::{BrokerProcess, Brokers, Ports};
use super::figures::{Figures, Usage, as_figure};

/// Between two looks at the cluster while something is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// See the module.
pub(super) struct Stage {
    /// Brokers of the cluster.
    pub(super) count: u32,
    /// Of brokers of its own.
    pub(super) brokers: Option<Brokers>,
    named: Option<Vec<String>>,
    directory: PathBuf,
    pub(super) patience: Duration,
}

impl Stage {
    /// Own brokers below `directory`, or those at `named`.
    pub(super) fn new(
        count: u32,
        named: Option<Vec<String>>,
        directory: &Path,
        patience: Duration,
    ) -> Self {
        Self {
            count,
            brokers: None,
            named,
            directory: directory.to_owned(),
            patience,
        }
    }

    /// Makes a cluster for the run `name`, and a client of it.
    pub(super) async fn open(&mut self, name: &str) -> anyhow::Result<Client> {
        if let Some(addresses) = &self.named {
            let client = Client::connect(addresses, ClientConfig::default()).await;
            let client = client.context("is the cluster up? Name its brokers with --bootstrap")?;
            let status = client.admin().cluster_status().await?;
            self.count = u32::try_from(status.brokers.len()).unwrap_or(u32::MAX);
            return Ok(client);
        }
        let brokers = Brokers::prepare(self.count, &self.directory.join(name), Ports::Free)?;
        let brokers = self.brokers.insert(brokers);
        brokers.start()?;
        brokers.client().await
    }

    /// Ends the run's cluster and removes its data; the logs of the brokers stay.
    pub(super) async fn close(&mut self) {
        if let Some(mut brokers) = self.brokers.take() {
            brokers.stop().await;
            for broker in &brokers.brokers {
                // What cannot be removed is seen in the directory that is left.
                fs::remove_dir_all(&broker.directory).ok();
            }
        }
    }

    /// Ends whatever runs, at once.
    pub(super) async fn kill(&mut self) {
        if let Some(brokers) = &mut self.brokers {
            brokers.kill().await;
        }
    }

    /// Fails when a broker that should run has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.brokers.as_mut().map_or(Ok(()), Brokers::check)
    }

    /// So many clients with connections of their own.
    pub(super) async fn connections(&self, count: u32) -> anyhow::Result<Vec<Client>> {
        let own = || self.brokers.as_ref().map(Brokers::addresses);
        let addresses = self.named.clone().or_else(own).unwrap_or_default();
        let connect = (0..count).map(|_| Client::connect(&addresses, ClientConfig::default()));
        Ok(try_join_all(connect).await?)
    }

    /// Creates a topic and waits until all its replicas are in sync; answers when all partitions were led, and when that was.
    pub(super) async fn create(
        &mut self,
        client: &Client,
        topic: NewTopic,
    ) -> anyhow::Result<(Duration, Duration)> {
        let began = Instant::now();
        let name = topic.name.clone();
        client.admin().create_topic(topic).await?;
        let led = |views: &[PartitionView]| views.iter().all(|view| view.leader.is_some());
        self.wait(client, &name, "are led", led).await?;
        let led = began.elapsed();
        self.wait(client, &name, "are in sync", is_whole).await?;
        Ok((led, began.elapsed()))
    }

    /// Waits until what is seen of a topic is good.
    pub(super) async fn wait(
        &mut self,
        client: &Client,
        topic: &str,
        what: &str,
        good: impl Fn(&[PartitionView]) -> bool,
    ) -> anyhow::Result<Vec<PartitionView>> {
        let deadline = Instant::now() + self.patience;
        loop {
            self.check()?;
            let views = look(client, topic).await.unwrap_or_default();
            if !views.is_empty() && good(&views) {
                return Ok(views);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "not all partitions of {topic} {what} after {:?}; is the machine too busy? More time: --patience",
                self.patience
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What the brokers' processes have used; `None` when they are not this program's children.
    pub(super) fn usage(&self) -> anyhow::Result<Option<Usage>> {
        let Some(brokers) = &self.brokers else {
            return Ok(None);
        };
        let processes = brokers.brokers.iter().filter_map(BrokerProcess::process);
        let processes: Vec<u32> = processes.collect();
        Ok(Some(Usage::sum(&processes)?))
    }

    /// Everything that is counted, now.
    pub(super) async fn snapshot(&self, client: &Client, records: u64) -> anyhow::Result<Snapshot> {
        let counted = client.admin().broker_figures().await.ok();
        let counted = counted.map(|all| {
            let brokers = all.iter();
            let flushes = brokers.map(|one| (one.broker.0, (one.flushes, one.flushed_entries)));
            flushes.collect()
        });
        Ok(Snapshot {
            at: Instant::now(),
            records,
            brokers: self.usage()?,
            own: Usage::of(std::process::id())?,
            flushes: counted.unwrap_or_default(),
        })
    }
}

/// The partitions of a topic, if anybody answers.
pub(super) async fn look(client: &Client, topic: &str) -> Option<Vec<PartitionView>> {
    let views = client.admin().describe(Some(&[topic.to_owned()])).await;
    Some(views.ok()?.into_iter().next()?.partitions)
}

/// Every partition is led and all its replicas are in sync.
pub(super) fn is_whole(views: &[PartitionView]) -> bool {
    let whole = |view: &PartitionView| {
        view.leader.is_some() && view.isr.len() == view.replicas.len() && !view.reassigning
    };
    views.iter().all(whole)
}

/// What was counted until one moment.
#[derive(Debug)]
pub(super) struct Snapshot {
    at: Instant,
    records: u64,
    brokers: Option<Usage>,
    own: Usage,
    /// By broker: flushes of its journal and the entries in them.
    flushes: BTreeMap<u32, (u64, u64)>,
}

impl Snapshot {
    /// The same where nothing was written.
    pub(super) fn without_flushes(self) -> Self {
        Self {
            flushes: BTreeMap::new(),
            ..self
        }
    }

    /// What the time from `before` to this moment has cost. Every record is stored `copies` times.
    pub(super) fn costs(&self, before: &Self, record_bytes: usize, copies: u32) -> Figures {
        let mut figures = Figures::default();
        let seconds = (self.at - before.at).as_secs_f64();
        let records = as_figure(self.records.saturating_sub(before.records));
        let megabytes = records * as_figure(u64::try_from(record_bytes).unwrap_or(0)) / 1e6;
        if let (Some(after), Some(before)) = (self.brokers, before.brokers) {
            let cpu = after.cpu_seconds - before.cpu_seconds;
            figures.put("broker_cpu_seconds_per_megabyte", cpu / megabytes);
            figures.put(
                "broker_cpu_seconds_per_million_records",
                cpu * 1e6 / records,
            );
            figures.put("broker_cpu_cores", cpu / seconds);
            figures.put("brokers_resident_megabytes", after.resident_megabytes);
        }
        let own = self.own.cpu_seconds - before.own.cpu_seconds;
        figures.put("bench_cpu_cores", own / seconds);
        let (mut flushes, mut entries, mut brokers) = (0, 0, 0_u32);
        for (broker, (after, inside)) in &self.flushes {
            if let Some((known, known_inside)) = before.flushes.get(broker) {
                flushes += after.saturating_sub(*known);
                entries += inside.saturating_sub(*known_inside);
                brokers += 1;
            }
        }
        if flushes > 0 {
            let each = as_figure(flushes) / f64::from(brokers);
            figures.put("fsyncs_per_second_per_broker", each / seconds);
            let stored = records * f64::from(copies);
            figures.put("records_per_fsync", stored / as_figure(flushes));
            figures.put("entries_per_fsync", as_figure(entries) / as_figure(flushes));
        }
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: costs are those of the time between, per record acknowledged in it; what is not known is left out. Method: two
    /// snapshots ten seconds apart, with and without processes.
    #[test]
    fn costs_are_differences() {
        let at = Instant::now();
        let snapshot = |seconds: u64, records: u64| {
            let used = as_figure(seconds);
            let usage = Usage {
                cpu_seconds: used,
                resident_megabytes: 50.0,
            };
            Snapshot {
                at: at + Duration::from_secs(seconds),
                records,
                brokers: Some(usage),
                own: usage,
                flushes: (1..=3).map(|one| (one, (seconds * 100, records))).collect(),
            }
        };
        let (before, mut after) = (snapshot(5, 1_000), snapshot(15, 101_000));
        let costs = after.costs(&before, 1_000, 3);
        for (name, value) in [
            ("broker_cpu_seconds_per_megabyte", 0.1),
            ("broker_cpu_seconds_per_million_records", 100.0),
            ("broker_cpu_cores", 1.0),
            ("brokers_resident_megabytes", 50.0),
            ("fsyncs_per_second_per_broker", 100.0),
            ("records_per_fsync", 100.0),
            ("entries_per_fsync", 100.0),
        ] {
            let found = costs.get(name).unwrap();
            assert!((found - value).abs() < 1e-6, "{name}: {found}");
        }
        after.brokers = None;
        after.flushes.clear();
        let costs = after.costs(&before, 1_000, 3);
        assert_eq!(costs.get("broker_cpu_cores"), None);
        assert_eq!(costs.get("fsyncs_per_second_per_broker"), None);
        assert!(costs.get("bench_cpu_cores").is_some());
    }
}
