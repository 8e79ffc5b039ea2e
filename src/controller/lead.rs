//! What the controller does while its local replica leads group 0.
//!
//! Owns what one leadership has seen and has under way; all of it is forgotten with the leadership, and everything decided is
//! in the log or can be decided again. Looks at the cluster on a tick; waits for what it has begun without stopping to look.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, MissedTickBehavior};

use crate::raft::{FollowerProgress, GroupStatus, Progress, RaftError};
use crate::types::{BrokerId, Endpoint, Error, GroupId, ReplicaId};

use super::balancer::{Balancer, BalancerConfig};
use super::liveness::Liveness;
use super::members::{MemberStep, next_step};
use super::metadata::{ClusterMetadata, Command};
use super::{Controller, Inner};

/// Looks between two that search all partitions for leaderships to hand back although the metadata has not changed.
const IDLE_LOOKS: u32 = 10;

/// What was begun, and has ended.
enum Done {
    Alive { broker: BrokerId },
    Member,
    Move { group: GroupId, moved: bool },
}

/// Leads whenever the local replica of group 0 does, until the group is gone.
pub(super) async fn run(controller: Controller) {
    let mut status = controller.0.group.status();
    while status.wait_for(GroupStatus::is_serving).await.is_ok() {
        let epoch = status.borrow().epoch;
        tracing::info!(%epoch, "this broker is the controller");
        Leadership::new(&controller).lead().await;
        tracing::info!(%epoch, "this broker is the controller no longer");
    }
}

struct Leadership<'a> {
    controller: &'a Controller,
    inner: &'a Inner,
    liveness: Liveness,
    balancer: Balancer,
    /// Brokers about which a command is under way.
    deciding: BTreeSet<BrokerId>,
    is_changing_members: bool,
    jobs: FuturesUnordered<BoxFuture<'static, Done>>,
}

impl<'a> Leadership<'a> {
    fn new(controller: &'a Controller) -> Self {
        let config = &controller.0.config;
        let balancer = BalancerConfig {
            delay: config.preferred_leader_delay,
            moves_max: config.moves_max,
            mute: config.move_mute,
            mute_max: config.move_mute.saturating_mul(30),
        };
        Self {
            controller,
            inner: &controller.0,
            liveness: Liveness::new(
                config.election_timeout_max * 3,
                config.election_timeout_max / 2,
            ),
            balancer: Balancer::new(balancer),
            deciding: BTreeSet::new(),
            is_changing_members: false,
            jobs: FuturesUnordered::new(),
        }
    }

    async fn lead(mut self) {
        let mut images = self.inner.images.clone();
        images.mark_changed();
        let mut ticks = tokio::time::interval(self.inner.config.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut idle_looks = 0;
        loop {
            tokio::select! {
                biased;
                Some(done) = self.jobs.next(), if !self.jobs.is_empty() => self.note(&done),
                _ = ticks.tick() => {
                    let status = self.inner.group.status().borrow().clone();
                    if !status.is_serving() {
                        return;
                    }
                    let changed = images.has_changed().unwrap_or(false);
                    let image = images.borrow_and_update().clone();
                    let now = Instant::now();
                    self.look_at_brokers(&image, &status, now);
                    self.look_at_members(&image, &status);
                    idle_looks = if changed { 0 } else { idle_looks + 1 };
                    if self.balancer.is_waiting() || idle_looks % IDLE_LOOKS == 0 {
                        self.look_at_leaders(&image, now);
                    }
                }
            }
        }
    }

    fn note(&mut self, done: &Done) {
        match *done {
            Done::Alive { broker } => {
                self.deciding.remove(&broker);
            }
            Done::Member => self.is_changing_members = false,
            Done::Move { group, moved } => self.balancer.done(group, moved, Instant::now()),
        }
    }

    /// Records which brokers are heard: connected, and with everything that group 0 has committed or had a moment ago.
    fn look_at_brokers(&mut self, image: &ClusterMetadata, status: &GroupStatus, now: Instant) {
        let progress = self.inner.group.progress();
        let me = self.inner.group.me();
        for (broker, record) in image.brokers() {
            let replica = record.controller_replica;
            let heard = replica == me || self.keeps_up(&progress, status, replica, now);
            let start = (record.incarnation, record.boot);
            let changed = self
                .liveness
                .observe(now, broker, start, heard, record.alive);
            if let Some(alive) = changed
                && self.deciding.insert(broker)
            {
                let (controller, endpoint) = (self.controller.clone(), record.endpoint.clone());
                let pause = self.inner.config.election_timeout_max;
                self.jobs.push(Box::pin(async move {
                    let command = Command::SetAlive { broker, alive };
                    // Said when it is so: what a leader that is itself cut off makes of the others is no news.
                    match controller.submit(command).await {
                        Ok(_) => log_liveness(&endpoint, alive),
                        Err(error) => {
                            tracing::info!(%broker, alive, %error, "not recorded yet");
                            tokio::time::sleep(pause).await;
                        }
                    }
                    Done::Alive { broker }
                }));
            }
        }
    }

    fn keeps_up(
        &self,
        progress: &Progress,
        status: &GroupStatus,
        replica: ReplicaId,
        now: Instant,
    ) -> bool {
        let patience = self.inner.config.election_timeout_max * 2;
        let is_level = |follower: &FollowerProgress| {
            let committed = status.committed.map(|id| id.index);
            let recent = |at: Instant| now.saturating_duration_since(at) <= patience;
            follower.matched >= committed || follower.caught_up_at.is_some_and(recent)
        };
        progress.epoch == status.epoch
            && progress
                .followers
                .get(&replica)
                .is_some_and(|follower| follower.connected && is_level(follower))
    }

    /// Takes the next step towards the members that group 0 should have, one at a time.
    fn look_at_members(&mut self, image: &ClusterMetadata, status: &GroupStatus) {
        if self.is_changing_members {
            return;
        }
        let progress = self.inner.group.progress();
        let now = Instant::now();
        let is_ready = |replica: ReplicaId| {
            image.is_alive(replica.broker()) && self.keeps_up(&progress, status, replica, now)
        };
        let config = &self.inner.config;
        let step = next_step(
            image,
            status,
            &config.bootstrap,
            config.voters_max,
            is_ready,
        );
        let Some(step) = step else { return };
        self.is_changing_members = true;
        tracing::info!(?step, "changing the members of the controller's group");
        let group = self.inner.group.clone();
        let (pause, patience) = (config.election_timeout_max, config.submit_timeout);
        self.jobs.push(Box::pin(async move {
            let change = async {
                match step {
                    MemberStep::AddLearner(replica) => group.add_learner(replica).await,
                    MemberStep::RemoveLearner(replica) => group.remove_learner(replica).await,
                    MemberStep::ChangeVoters(voters) => group.change_voters(voters).await,
                }
            };
            let timed = tokio::time::timeout(patience, change).await;
            let result = timed.unwrap_or(Err(RaftError::Timeout { after: patience }));
            if let Err(error) = result {
                tracing::warn!(%error, "the members of the controller's group were not changed");
                tokio::time::sleep(pause).await;
            }
            Done::Member
        }));
    }

    /// Hands leaderships back to preferred leaders, a few at a time.
    fn look_at_leaders(&mut self, image: &Arc<ClusterMetadata>, now: Instant) {
        let Some(mover) = self.inner.mover.get() else {
            return;
        };
        for planned in self.balancer.plan(image, now) {
            let moving = mover(planned.partition.clone(), planned.leader, planned.to);
            let patience = self.inner.config.submit_timeout;
            self.jobs.push(Box::pin(async move {
                let timed = tokio::time::timeout(patience, moving).await;
                let after_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
                let result = timed.unwrap_or(Err(Error::Timeout { after_ms }));
                let (partition, to) = (&planned.partition, planned.to);
                match &result {
                    Ok(()) => tracing::info!(%partition, %to, "preferred leader leads again"),
                    Err(error) => {
                        tracing::info!(%partition, %to, %error, "preferred leader not in place yet");
                    }
                }
                Done::Move { group: planned.group, moved: result.is_ok() }
            }));
        }
    }
}

fn log_liveness(endpoint: &Endpoint, alive: bool) {
    if alive {
        tracing::info!(%endpoint, "heard again");
    } else {
        tracing::warn!(%endpoint, "not heard any more: no placements and no preferred leadership");
    }
}
