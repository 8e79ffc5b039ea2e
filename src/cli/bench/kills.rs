//! W4: the leader's process is killed under load, again and again.
//!
//! Owns the kills and the time from each of them to the next acknowledgement of every partition that the killed broker led: the first
//! one of a leader with a newer epoch, as the clients see it. What is lost is found when everything is read back (`verify`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use logboom::api::PartitionView;
use logboom::client::Client;
use logboom::types::{BrokerId, LeaderEpoch};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::figures::{Figures, Latencies};
use super::stage::{Stage, is_whole, look};

/// Between two requests to hand leadership back.
const ELECT_EVERY: Duration = Duration::from_millis(500);

/// Waits for acknowledgements of new leaders; told of every acknowledgement.
#[derive(Debug, Default)]
pub(super) struct Lookout {
    is_armed: AtomicBool,
    watched: Mutex<Watched>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Watched {
    /// By partition: the epoch of the leader that is gone.
    waiting: BTreeMap<u32, LeaderEpoch>,
    seen: Vec<Instant>,
}

impl Lookout {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn acknowledged(&self, partition: u32, epoch: LeaderEpoch, at: Instant) {
        if !self.is_armed.load(Ordering::Acquire) {
            return;
        }
        let mut watched = self.lock();
        // An answer of the dead leader may still have been under way.
        if watched
            .waiting
            .get(&partition)
            .is_none_or(|old| epoch <= *old)
        {
            return;
        }
        watched.waiting.remove(&partition);
        watched.seen.push(at);
        if watched.waiting.is_empty() {
            self.is_armed.store(false, Ordering::Release);
            self.news.notify_one();
        }
    }

    fn arm(&self, epochs: BTreeMap<u32, LeaderEpoch>) {
        let mut watched = self.lock();
        watched.waiting = epochs;
        watched.seen.clear();
        self.is_armed.store(true, Ordering::Release);
    }

    /// When each partition was acknowledged again, waiting for the last one; and those that were not.
    async fn wait(&self, within: Duration) -> (Vec<Instant>, Vec<u32>) {
        // Whoever is late is in the list of those that were not.
        tokio::time::timeout(within, self.news.notified())
            .await
            .ok();
        self.is_armed.store(false, Ordering::Release);
        let mut watched = self.lock();
        let silent = std::mem::take(&mut watched.waiting);
        (
            std::mem::take(&mut watched.seen),
            silent.into_keys().collect(),
        )
    }
}

/// What is done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kills {
    pub(super) count: u32,
    /// Load between two kills, with the cluster whole.
    pub(super) pause: Duration,
    /// Every kill is of this broker, which leads all partitions again before it; without it, of the leader of partition 0.
    pub(super) victim: Option<BrokerId>,
}

/// How long it took.
#[derive(Debug, Default)]
pub(super) struct Failovers {
    kills: u32,
    /// From a kill to the next acknowledgement, for each partition.
    pub(super) times: Latencies,
    /// The same, of each kill the partition that took longest.
    slowest: Latencies,
    /// From a restart until all replicas are in sync.
    in_sync_again: Latencies,
}

impl Failovers {
    pub(super) fn put(&self, figures: &mut Figures) {
        let times = &self.times;
        figures.put("kills", self.kills.into());
        figures.put("time_to_next_ack_p50_ms", times.at_us(0.5) / 1e3);
        figures.put("time_to_next_ack_p99_ms", times.at_us(0.99) / 1e3);
        figures.put("time_to_next_ack_max_ms", times.max_us() / 1e3);
        if times.count() > u64::from(self.kills) {
            let slowest = self.slowest.at_us(0.5) / 1e3;
            figures.put("slowest_partition_of_a_kill_p50_ms", slowest);
        }
        let again = self.in_sync_again.at_us(0.5) / 1e3;
        figures.put("in_sync_again_p50_ms", again);
    }
}

/// Kills, waits, restarts; the load goes on meanwhile. `tell` hears how far it is.
pub(super) async fn kill_leaders(
    stage: &mut Stage,
    client: &Client,
    topic: &str,
    kills: Kills,
    lookout: &Lookout,
    mut tell: impl FnMut(&str),
) -> anyhow::Result<Failovers> {
    let mut failovers = Failovers::default();
    let mut number = 1;
    while number <= kills.count {
        let views = ready(stage, client, topic, kills.victim).await?;
        tokio::time::sleep(kills.pause).await;
        // Leadership may have moved since; the last look counts.
        let views = look(client, topic).await.unwrap_or(views);
        let leader = views.first().and_then(|view| view.leader);
        let victim = kills
            .victim
            .or(leader)
            .context("partition 0 has no leader")?;
        let led = views.iter().filter(|view| view.leader == Some(victim));
        let epochs: BTreeMap<u32, LeaderEpoch> =
            led.map(|view| (view.partition.0, view.epoch)).collect();
        let partitions = epochs.len();
        if partitions == 0 {
            continue; // leadership has just moved away: its death would tell nothing
        }
        tell(&format!(
            "kill {number} of {}: broker {victim}",
            kills.count
        ));
        let brokers = stage.brokers.as_mut().context("no brokers of its own")?;
        let mut brokers = brokers.brokers.iter_mut();
        let process = brokers.find(|broker| broker.id == victim.0);
        let process = process.with_context(|| format!("there is no broker {victim}"))?;
        process.kill()?;
        let killed = Instant::now();
        lookout.arm(epochs);
        process.wait().await;
        let (seen, silent) = lookout.wait(stage.patience).await;
        anyhow::ensure!(
            silent.is_empty(),
            "{} of {partitions} partitions acknowledged nothing within {:?} after kill {number}",
            silent.len(),
            stage.patience
        );
        let mut slowest = Duration::ZERO;
        for at in seen {
            let time = at.saturating_duration_since(killed);
            failovers.times.record(time);
            slowest = slowest.max(time);
        }
        failovers.slowest.record(slowest);
        failovers.kills += 1;
        number += 1;
        let process = stage.brokers.as_mut();
        let mut brokers = process.into_iter().flat_map(|all| all.brokers.iter_mut());
        if let Some(process) = brokers.find(|broker| broker.id == victim.0) {
            process.start()?;
        }
        let restarted = Instant::now();
        stage
            .wait(client, topic, "are in sync again", is_whole)
            .await?;
        failovers.in_sync_again.record(restarted.elapsed());
    }
    Ok(failovers)
}

/// Waits until the cluster is whole, and led by the victim where there is one.
async fn ready(
    stage: &mut Stage,
    client: &Client,
    topic: &str,
    victim: Option<BrokerId>,
) -> anyhow::Result<Vec<PartitionView>> {
    let leads = |views: &[PartitionView]| {
        let wanted = |view: &PartitionView| victim.is_none() || view.leader == victim;
        is_whole(views) && views.iter().all(wanted)
    };
    let asking = async {
        loop {
            if victim.is_some() {
                // The balancer does it too, a few at a time.
                client.admin().elect_leaders().await.ok();
            }
            tokio::time::sleep(ELECT_EVERY).await;
        }
    };
    tokio::select! {
        biased;
        views = stage.wait(client, topic, "are led as before", leads) => views,
        () = asking => anyhow::bail!("nobody asks any more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: only a new leader's acknowledgement ends the wait, for each partition the first one; a partition without one is named. Method: old
    /// and new epochs by turns.
    #[tokio::test]
    async fn only_new_leaders_count() {
        let (lookout, began) = (Lookout::default(), Instant::now());
        let at = |ms| began + Duration::from_millis(ms);
        lookout.acknowledged(0, LeaderEpoch(9), at(0));
        lookout.arm((0..3).map(|one| (one, LeaderEpoch(5))).collect());
        for (partition, epoch, ms) in [(0, 5, 1), (0, 6, 2), (0, 6, 3), (1, 4, 4), (1, 7, 5)] {
            lookout.acknowledged(partition, LeaderEpoch(epoch), at(ms));
        }
        let (seen, silent) = lookout.wait(Duration::from_millis(1)).await;
        assert_eq!((seen, silent), (vec![at(2), at(5)], vec![2]));
        lookout.arm([(0, LeaderEpoch(6))].into());
        lookout.acknowledged(0, LeaderEpoch(7), at(8));
        let (seen, silent) = lookout.wait(Duration::from_secs(60)).await;
        assert_eq!((seen, silent), (vec![at(8)], vec![]));
    }
}
