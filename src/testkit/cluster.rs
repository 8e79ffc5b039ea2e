//! A whole cluster in one process, for an embedder's own tests.
//!
//! Owns the brokers it started and the network between them. Real brokers, real sockets on loopback, real files in a directory of
//! the caller's; only the processes are missing: each broker has a thread of its own instead, see `host`. Each is reached through
//! a proxy, see `rim`, so that the network can be hurt.
//!
//! A killed broker is gone without a goodbye; what it had not made durable stays in its files as after a SIGKILL. Loss of power
//! is not covered by this.

mod faults;
mod host;
mod rim;
mod wait;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};

use self::faults::Faults;
use self::host::Host;
use self::rim::Rim;
pub use self::wait::{NotReached, wait_until};
use super::Links;
use super::checker::{Coverage, Report, check};
use super::recorder::Recorder;
use super::workload::read_final_logs;
use crate::broker::Broker;
use crate::client::{Client, ClientConfig};
use crate::config::BrokerConfig;
use crate::types::{BrokerId, Error};

/// How long the waits of a cluster take at most, unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the brokers of a new cluster take to come together at most.
const ADMITTED_WITHIN: Duration = Duration::from_secs(60);
/// Brokers that are named to every other one.
const BOOTSTRAP_MAX: usize = 5;

/// Several brokers of one cluster in this process, and the network between them.
///
/// Everything a broker does runs on a thread of its own, whatever runtime the test has. When it is dropped, all brokers crash and
/// their threads are waited for, for some ms; [`LocalCluster::shutdown`] stops them in order.
///
/// ```
/// use logboom::testkit::LocalCluster;
/// use logboom::client::{NewTopic, Record};
/// use logboom::types::{Acks, Offset};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let directory = tempfile::tempdir()?;
/// let mut cluster = LocalCluster::start(3, directory.path(), |_| {}).await?;
/// let client = cluster.client().await?;
/// client.admin().create_topic(NewTopic::new("orders", 1, 3)).await?;
/// let orders = client.topic("orders")?.partition(0);
/// orders.append([Record::new("first")], Acks::All).await?;
///
/// let old = cluster.wait_for_leader("orders", 0).await?;
/// cluster.isolate(old);
/// let new = cluster.wait_for_leader("orders", 0).await?;
/// assert_ne!(new, old);
///
/// cluster.heal();
/// cluster.wait_until_in_sync("orders").await?;
/// assert_eq!(orders.end_offset(true).await?, Offset(1)); // nothing acknowledged was lost
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct LocalCluster {
    // In the order in which they are to be dropped.
    running: BTreeMap<BrokerId, Host>,
    rim: Rim,
    configs: BTreeMap<BrokerId, BrokerConfig>,
    links: Links,
    faults: Faults,
    patience: Duration,
}

impl LocalCluster {
    /// Starts brokers 1 to `brokers` with their data below `directory`, and waits until the cluster has admitted all of them, a
    /// minute at most. `adjust` may change each configuration before its broker starts, but not who it is and where it is reached.
    pub async fn start(
        brokers: u32,
        directory: impl Into<PathBuf>,
        adjust: impl Fn(&mut BrokerConfig),
    ) -> Result<Self, Error> {
        Self::start_with(brokers, directory, Links::new(), adjust).await
    }

    /// As [`LocalCluster::start`], over a network of the caller's: with a seed of its own, or with rules that hold from the
    /// beginning.
    pub async fn start_with(
        brokers: u32,
        directory: impl Into<PathBuf>,
        links: Links,
        adjust: impl Fn(&mut BrokerConfig),
    ) -> Result<Self, Error> {
        let directory = directory.into();
        let rim = Rim::start(brokers, &links).await?;
        let addresses: Vec<(BrokerId, String)> = rim.addresses().collect();
        let bootstrap: Vec<String> = addresses
            .iter()
            .map(|(broker, address)| format!("{broker}@{address}"))
            .take(BOOTSTRAP_MAX)
            .collect();
        let configs = addresses.into_iter().map(|(broker, advertise)| {
            let mut config = BrokerConfig {
                broker_id: broker.0,
                // Nobody is told this port: a broker that returns need not find it free.
                listen: "127.0.0.1:0".to_owned(),
                advertise,
                data_dir: directory.join(format!("broker-{broker}")),
                bootstrap: bootstrap.clone(),
                ..BrokerConfig::default()
            };
            adjust(&mut config);
            (broker, config)
        });
        let mut cluster = Self {
            configs: configs.collect(),
            running: BTreeMap::new(),
            rim,
            links,
            faults: Faults::default(),
            patience: PATIENCE,
        };
        for id in cluster.brokers() {
            cluster.restart(id).await?;
        }
        cluster.all_ready().await?;
        Ok(cluster)
    }

    /// Waits until the cluster has admitted every broker.
    async fn all_ready(&self) -> Result<(), Error> {
        let ready = self.running.iter().map(|(id, host)| async move {
            tokio::select! {
                biased;
                error = host.broker().wait_failed() => Err(error),
                () = host.broker().wait_ready() => Ok(()),
                () = tokio::time::sleep(ADMITTED_WITHIN) => Err(Error::Failed {
                    reason: format!("the cluster has not admitted broker {id} within {ADMITTED_WITHIN:?}"),
                }),
            }
        });
        try_join_all(ready).await.map(|_| ())
    }

    /// Sets how long `wait_for_leader` and `wait_until_in_sync` wait at most; 30 s unless set.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// All brokers, running or not.
    pub fn brokers(&self) -> Vec<BrokerId> {
        self.configs.keys().copied().collect()
    }

    /// The running broker `id`, for what only an embedder can ask of it. A paused one answers nothing that takes more than a look
    /// at its memory.
    pub fn broker(&self, id: BrokerId) -> Option<&Broker> {
        self.running.get(&id).map(Host::broker)
    }

    /// Whether broker `id` runs and is not paused.
    pub fn runs(&self, id: BrokerId) -> bool {
        self.running.get(&id).is_some_and(|host| !host.is_paused())
    }

    /// The addresses of all brokers, running or not: those of their proxies.
    pub fn bootstrap(&self) -> Vec<String> {
        self.addresses().map(|(_, address)| address).collect()
    }

    fn addresses(&self) -> impl Iterator<Item = (BrokerId, String)> {
        self.rim.addresses()
    }

    /// A client that reaches the cluster over its sockets, whichever brokers run.
    pub async fn client(&self) -> Result<Client, Error> {
        Client::connect(&self.bootstrap(), ClientConfig::default()).await
    }

    /// A record of what happens from now on: give it to a [`Workload`](super::workload::Workload). What the methods here break is
    /// noted in it by itself, as kind `kill`, `stop`, `pause` or `partition`; what is done by [`LocalCluster::links`] is not.
    /// Calling this again begins another one.
    pub fn record(&self) -> Recorder {
        let recorder = Recorder::real();
        self.faults.record(recorder.clone());
        recorder
    }

    /// Reads the whole topic, with its healed leaders, and judges what `recorder` holds: that nothing acknowledged is missing,
    /// nothing is there twice, and all the rest of [`check`]. The workload must have been stopped. An error when the topic
    /// cannot be read in the cluster's patience.
    pub async fn judge(
        &self,
        recorder: Recorder,
        topic: &str,
        coverage: &Coverage,
    ) -> Result<Report, Error> {
        let client = self.client().await?;
        let partitions = client.topic(topic)?.partitions().await?.len();
        let partitions = u32::try_from(partitions).unwrap_or(u32::MAX);
        let logs = read_final_logs(&client, &recorder, topic, partitions, self.patience).await?;
        let mut history = recorder.finish();
        history.logs = logs;
        Ok(check(&history, coverage))
    }

    /// Stops broker `id` without a goodbye, at once: nothing that it had under way becomes durable or is answered after this
    /// began. Nothing happens when it does not run.
    pub async fn kill(&mut self, id: BrokerId) {
        if let Some(host) = self.running.remove(&id) {
            // Whoever may get its port next is nobody the cluster should meet.
            self.faults.ended("pause", &name(id));
            self.faults.began("kill", name(id));
            self.rim.point(id, None).await;
            host.crash().await;
        }
    }

    /// Stops broker `id` in order. Nothing happens when it does not run.
    pub async fn stop(&mut self, id: BrokerId) {
        if let Some(host) = self.running.remove(&id) {
            self.faults.ended("pause", &name(id));
            self.faults.began("stop", name(id));
            host.stop().await;
            self.rim.point(id, None).await;
        }
    }

    /// Starts broker `id` on its data. Nothing happens when it runs. When the future is dropped, the broker does not run.
    pub async fn restart(&mut self, id: BrokerId) -> Result<(), Error> {
        if self.running.contains_key(&id) {
            return Ok(());
        }
        let config = self.configs.get(&id).ok_or_else(|| Error::InvalidRequest {
            reason: format!("the cluster has no broker {id}"),
        })?;
        let host = Host::start(config.clone()).await?;
        self.rim.point(id, Some(host.broker().local_addr())).await;
        self.running.insert(id, host);
        for kind in ["kill", "stop"] {
            self.faults.ended(kind, &name(id));
        }
        Ok(())
    }

    /// Stops the clock of broker `id`, as SIGSTOP does: nothing of it runs, its connections stay, until
    /// [`LocalCluster::resume`]. Only what was handed to the disk before may still become durable. Returns when it holds.
    pub async fn pause(&mut self, id: BrokerId) {
        if let Some(host) = self.running.get_mut(&id) {
            self.faults.began("pause", name(id));
            host.pause().await;
        }
    }

    /// Lets a paused broker go on where it was.
    pub fn resume(&mut self, id: BrokerId) {
        if let Some(host) = self.running.get_mut(&id) {
            host.resume();
            self.faults.ended("pause", &name(id));
        }
    }

    /// The network, for whatever the methods here do not do: delays, throttles, resets, what concerns clients.
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// Cuts the link between two brokers, both ways: silence, no connection is closed.
    pub fn cut(&self, one: BrokerId, other: BrokerId) {
        self.faults
            .began("partition", format!("between {one} and {other}"));
        self.links.cut_both(one, other);
    }

    /// Nothing sent by `from` reaches `to` any more; the other way goes on.
    pub fn cut_one_way(&self, from: BrokerId, to: BrokerId) {
        self.faults
            .began("partition", format!("from {from} to {to}"));
        self.links.cut(from, to);
    }

    /// Cuts broker `id` off from all other brokers. Clients still reach it; see [`Links::isolate_from_all`].
    pub fn isolate(&self, id: BrokerId) {
        self.faults.began("partition", format!("around {id}"));
        self.links.isolate(id);
    }

    /// Heals the whole network. Paused brokers stay paused.
    pub fn heal(&self) {
        self.links.heal_all();
        self.faults.all_ended("partition");
    }

    /// Waits until a broker leads the partition and says who: one that clients reach and that a majority follows now, so a leader
    /// that was killed, paused or cut off is never the answer.
    pub async fn wait_for_leader(
        &self,
        topic: &str,
        partition: u32,
    ) -> Result<BrokerId, NotReached> {
        let leader = wait::leader(self, topic, partition, self.patience).await?;
        let (epoch, broker) = (leader.epoch.0, leader.broker);
        self.faults.leader_seen(partition, epoch, broker.0);
        Ok(broker)
    }

    /// Waits until every partition of `topic` has a leader that has all replicas in sync.
    pub async fn wait_until_in_sync(&self, topic: &str) -> Result<(), NotReached> {
        let what = format!("all replicas of {topic} in sync");
        wait_until(self.patience, &what, async || {
            wait::in_sync(self, topic).await
        })
        .await
    }

    /// Stops every broker in order, paused ones too.
    pub async fn shutdown(mut self) {
        let running = std::mem::take(&mut self.running);
        join_all(running.into_values().map(Host::stop)).await;
    }
}

fn name(id: BrokerId) -> String {
    format!("broker {id}")
}
