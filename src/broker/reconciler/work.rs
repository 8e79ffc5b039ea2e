//! The reconciler's loop: compares what there should be with what there is, and takes steps until they agree.
//!
//! Owns which replicas run and which steps are under way; all of it is found again after a restart. Plans nothing itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use crate::config::TopicConfig;
use crate::controller::ClusterMetadata;
use crate::controller::metadata::PartitionRecord;
use crate::partition::{Partition, PartitionSpec};
use crate::raft::{GroupStatus, RaftError, Role};
use crate::types::{Error, GroupId, LeaderEpoch, ReplicaId, TopicPartition};

use super::plan::{Condition, LocalStep, founding_delay, local_step};
use super::reports::{Reported, Reports};
use super::steps::{Members, settle_members};
use super::{Inner, STEPS_MAX};

/// Between two looks at the partitions; also the longest that a report waits for company.
const TICK: Duration = Duration::from_millis(50);
/// Shortest time between two comparisons of everything with the metadata; longer when one takes long.
const COMPARE_PAUSE: Duration = Duration::from_millis(10);
/// How many times longer than a comparison the pause after it is at least.
const COMPARE_SHARE: u32 = 9;
/// How long a group may show no life before the next founder creates it.
const FOUNDING_PATIENCE: Duration = Duration::from_secs(3);
/// Changes of members under way at once: without a quorum they get stuck, and must leave room for other steps.
const SETTLES_MAX: usize = STEPS_MAX / 2;
/// Longest time a change of members may take before it is tried again.
const SETTLE_PATIENCE: Duration = Duration::from_secs(10);
/// Shortest and longest pause before a failed step is tried again.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// See [`RETRY_MIN`].
const RETRY_MAX: Duration = Duration::from_secs(10);
/// How long a step that has to wait for a replica rests before the next look.
const WAIT_PAUSE: Duration = Duration::from_millis(200);
/// How long a replica that has stopped by itself rests before it is started again.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// Looks between two searches for replicas that have stopped by themselves.
const LOOKS_PER_CHECKUP: u32 = 20;

/// What the metadata wants of one group on this broker.
#[derive(Clone)]
pub(super) struct Wanted {
    name: TopicPartition,
    me: ReplicaId,
    record: Arc<PartitionRecord>,
    settings: TopicConfig,
}

/// A replica that runs here.
pub(super) struct Hosted {
    pub(super) partition: Partition,
    reports: watch::Receiver<u64>,
    started: Instant,
    /// The assignment and settings given to the partition last.
    pub(super) record: Arc<PartitionRecord>,
    settings: TopicConfig,
    /// The epoch whose leadership here was looked at last.
    led_epoch: Option<LeaderEpoch>,
    /// The members that were found committed while this replica led.
    pub(super) members: Option<Members>,
    /// The report sent last, and when.
    pub(super) reported: Option<Reported>,
}

/// When a group's next step may be tried.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retry {
    pub(super) failures: u32,
    pub(super) at: Instant,
}

/// What a step came to.
pub(super) enum Outcome {
    Started(Box<(Partition, Wanted)>),
    Deleted,
    Stopped,
    /// The controller has decided on a new replica in the place of a damaged one.
    Replaced,
    Founded,
    /// The members are settled and committed.
    Settled(Members),
    /// A step was taken; there may be another one.
    Stepped,
    /// Nothing could be done yet.
    Waits,
}

struct Done {
    group: GroupId,
    result: Result<Outcome, Error>,
}

/// The loop's own state.
pub(super) struct State {
    inner: Arc<Inner>,
    image: Arc<ClusterMetadata>,
    wanted: BTreeMap<GroupId, Wanted>,
    /// What the store holds, as far as this loop knows: it is the only one that creates and deletes partitions' groups.
    stored: BTreeMap<GroupId, ReplicaId>,
    hosted: BTreeMap<GroupId, Hosted>,
    /// Groups whose next step should be looked for.
    due: BTreeSet<GroupId>,
    /// Hosted groups that may have to be created by this broker.
    unfounded: BTreeSet<GroupId>,
    /// Groups led here whose members may have to change.
    unsettled: BTreeSet<GroupId>,
    reports: Reports,
    busy: BTreeSet<GroupId>,
    /// The busy ones whose members are being changed.
    settling: BTreeSet<GroupId>,
    retries: BTreeMap<GroupId, Retry>,
    /// Why the last steps of groups were refused, as it was logged.
    refusals: BTreeMap<GroupId, String>,
    steps: FuturesUnordered<BoxFuture<'static, Done>>,
}

impl State {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        let stored = inner.ports.groups.stored();
        Self {
            inner,
            image: Arc::default(),
            wanted: BTreeMap::new(),
            stored: stored
                .into_iter()
                .filter(|(group, _)| *group != GroupId::CONTROLLER)
                .collect(),
            hosted: BTreeMap::new(),
            due: BTreeSet::new(),
            unfounded: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            reports: Reports::default(),
            busy: BTreeSet::new(),
            settling: BTreeSet::new(),
            retries: BTreeMap::new(),
            refusals: BTreeMap::new(),
            steps: FuturesUnordered::new(),
        }
    }

    pub(super) async fn run(mut self) {
        let mut metadata = self.inner.ports.metadata.clone();
        metadata.mark_changed();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_stale = true;
        let mut next_comparison = Instant::now();
        let mut has_compared = false;
        let mut looks = 0_u32;
        loop {
            tokio::select! {
                biased;
                Some(done) = self.steps.next(), if !self.steps.is_empty() => self.finish(done),
                result = self.reports.answered() => self.reports.note(result, &mut self.hosted),
                _ = ticks.tick() => {
                    looks = looks.wrapping_add(1);
                    self.look(looks.is_multiple_of(LOOKS_PER_CHECKUP));
                    self.reports.send(&mut self.hosted, &self.inner.ports);
                }
                changed = metadata.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    is_stale = true;
                }
            }
            let now = Instant::now();
            if is_stale && now >= next_comparison {
                self.image = metadata.borrow_and_update().clone();
                self.compare();
                (is_stale, has_compared) = (false, true);
                next_comparison = now + COMPARE_PAUSE.max(now.elapsed() * COMPARE_SHARE);
            }
            self.take_steps();
            if has_compared && !*self.inner.ready.borrow() {
                self.check_ready();
            }
        }
    }

    /// Finds out what the metadata wants, and which groups that concerns.
    fn compare(&mut self) {
        let image = Arc::clone(&self.image);
        let broker = self.inner.ports.broker;
        let mut wanted = BTreeMap::new();
        for (name, topic) in image.topics() {
            for (number, record) in topic.numbered() {
                let Some(me) = record.held_by(broker) else {
                    continue;
                };
                let unchanged = self.wanted.remove(&record.group).filter(|known| {
                    Arc::ptr_eq(&known.record, record) && known.settings == topic.settings
                });
                let now = unchanged.unwrap_or_else(|| {
                    self.due.insert(record.group);
                    Wanted {
                        name: TopicPartition {
                            topic: name.clone(),
                            partition: number,
                        },
                        me,
                        record: Arc::clone(record),
                        settings: topic.settings.clone(),
                    }
                });
                wanted.insert(record.group, now);
            }
        }
        // what is left was wanted until now
        self.due.extend(self.wanted.keys());
        self.wanted = wanted;
        let found = self.stored.keys().chain(self.hosted.keys());
        self.due
            .extend(found.filter(|group| !self.wanted.contains_key(group)));
        for group in self.due.clone() {
            self.adapt(group);
        }
    }

    /// Hands what has changed to a running partition.
    fn adapt(&mut self, group: GroupId) {
        let (Some(wanted), Some(hosted)) = (self.wanted.get(&group), self.hosted.get_mut(&group))
        else {
            return;
        };
        let (known, now) = (&hosted.record, &wanted.record);
        if (&known.assignment, &known.replacement) != (&now.assignment, &now.replacement) {
            let (assignment, leaving) = (now.assignment.clone(), now.leaving());
            hosted.partition.set_assignment(assignment, leaving);
        }
        if hosted.settings != wanted.settings {
            hosted.partition.set_config(wanted.settings.clone());
        }
        if wanted.record.replacement.is_some() {
            self.unsettled.insert(group);
        }
        hosted.record = Arc::clone(&wanted.record);
        hosted.settings = wanted.settings.clone();
        self.reports.mark(group);
    }

    /// Notices what has changed in the running partitions; with `checkup`, also which have stopped by themselves.
    fn look(&mut self, checkup: bool) {
        for (group, hosted) in &mut self.hosted {
            if hosted.reports.has_changed().unwrap_or(false) {
                hosted.reports.borrow_and_update();
                self.reports.mark(*group);
                let epoch = hosted.partition.report().map(|report| report.epoch);
                if epoch.is_some() && epoch != hosted.led_epoch {
                    self.unsettled.insert(*group);
                }
                hosted.led_epoch = epoch;
            }
            if checkup && hosted.partition.group().status().borrow().role == Role::Stopped {
                self.due.insert(*group);
            }
        }
    }

    /// Begins as many steps as there is room for.
    fn take_steps(&mut self) {
        let now = Instant::now();
        let candidates: Vec<GroupId> = self
            .due
            .iter()
            .chain(&self.unfounded)
            .chain(&self.unsettled)
            .copied()
            .collect();
        for group in candidates {
            if self.steps.len() >= STEPS_MAX {
                return;
            }
            let muted = self.retries.get(&group).is_some_and(|retry| now < retry.at);
            if !muted && !self.busy.contains(&group) {
                self.take_step(group, now);
            }
        }
    }

    fn take_step(&mut self, group: GroupId, now: Instant) {
        let wanted = self.wanted.get(&group);
        let hosted = self.hosted.get(&group);
        let running = hosted.map(|hosted| hosted.partition.me());
        let found = running.or_else(|| self.stored.get(&group).copied());
        let image = Arc::clone(&self.image);
        let knows = |replica| image.knows(replica);
        let me = wanted.map(|wanted| wanted.me);
        let groups = &self.inner.ports.groups;
        let condition = match hosted {
            Some(_) => Condition::Running,
            None if groups.damage(group).is_some() => Condition::Damaged,
            None => Condition::Idle,
        };
        match local_step(me, found, condition, knows) {
            LocalStep::Delete => {
                let partition = hosted.map(|hosted| hosted.partition.clone());
                self.begin_delete(group, partition);
            }
            LocalStep::Start => {
                if let Some(wanted) = wanted.cloned() {
                    self.begin_start(group, wanted);
                }
            }
            LocalStep::AskForNew => {
                if let Some(wanted) = wanted.cloned() {
                    self.begin_ask(group, wanted);
                }
            }
            LocalStep::Rest => {
                self.due.remove(&group);
                match hosted.map(|hosted| hosted.partition.clone()) {
                    Some(partition) => self.tend(group, partition, now),
                    None => self.forget(group),
                }
            }
        }
    }

    /// Nothing of the group is here and nothing is wanted, or the image is too old to say.
    fn forget(&mut self, group: GroupId) {
        self.unfounded.remove(&group);
        self.unsettled.remove(&group);
        self.reports.forget(group);
        self.retries.remove(&group);
        self.refusals.remove(&group);
    }

    /// The next step for a replica that runs and should.
    fn tend(&mut self, group: GroupId, partition: Partition, now: Instant) {
        let status = partition.group().status().borrow().clone();
        if status.role == Role::Stopped {
            self.begin_stop(group, partition);
        } else if self.unfounded.contains(&group) {
            self.found_if_due(group, &partition, &status, now);
        } else if self.unsettled.contains(&group) {
            if status.is_serving() && self.settling.len() >= SETTLES_MAX {
                return; // looked at again when there is room
            }
            if status.is_serving() {
                self.begin_settle(group, &partition);
            } else {
                self.unsettled.remove(&group); // the next leadership is looked at again
            }
        }
    }

    fn found_if_due(
        &mut self,
        group: GroupId,
        partition: &Partition,
        status: &GroupStatus,
        now: Instant,
    ) {
        let Some(hosted) = self.hosted.get(&group) else {
            return;
        };
        let record = &hosted.record;
        let was_led = record.epoch > LeaderEpoch(0) || !status.voters.is_empty();
        let delay = founding_delay(&record.founding, partition.me(), FOUNDING_PATIENCE);
        let Some(delay) = delay.filter(|_| !was_led) else {
            self.unfounded.remove(&group);
            return;
        };
        if now < hosted.started + delay {
            self.retries.insert(
                group,
                Retry {
                    failures: 0,
                    at: now + WAIT_PAUSE,
                },
            );
            return;
        }
        let voters: BTreeSet<ReplicaId> = record.founding.voters().collect();
        let raft_group = partition.group().clone();
        self.begin(group, async move {
            let created = raft_group.initialize(voters).await;
            created
                .map(|()| Outcome::Founded)
                .map_err(|error| failed(&error))
        });
    }

    fn begin_start(&mut self, group: GroupId, wanted: Wanted) {
        let ports = self.inner.ports.clone();
        self.begin(group, async move {
            let spec = PartitionSpec {
                partition: wanted.name.clone(),
                group,
                me: wanted.me,
                assignment: wanted.record.assignment.clone(),
                leaving: wanted.record.leaving(),
                config: wanted.settings.clone(),
                limits: ports.limits,
                endpoints: ports.endpoints,
                room: ports.room,
            };
            let partition = Partition::start(spec, &ports.groups, &ports.tasks).await?;
            Ok(Outcome::Started(Box::new((partition, wanted))))
        });
    }

    fn begin_delete(&mut self, group: GroupId, partition: Option<Partition>) {
        if let Some(partition) = &partition {
            self.inner.withdraw(partition);
        }
        let groups = self.inner.ports.groups.clone();
        let was_damaged = groups.damage(group).is_some();
        self.begin(group, async move {
            if let Some(partition) = partition {
                partition.stop().await;
            }
            groups.delete(group).await.map_err(|error| failed(&error))?;
            tracing::info!(%group, was_damaged, "deleted a replica that is no longer assigned here");
            Ok(Outcome::Deleted)
        });
    }

    /// Takes down a replica that has stopped by itself, so that it is started again.
    fn begin_stop(&mut self, group: GroupId, partition: Partition) {
        let reason = partition.group().stop_reason().unwrap_or_default();
        // Damage was said where it was found.
        if self.inner.ports.groups.damage(group).is_none() {
            tracing::warn!(%group, partition = %partition.id(), %reason, "a replica has stopped, starting it again");
        }
        self.inner.withdraw(&partition);
        self.begin(group, async move {
            partition.stop().await;
            Ok(Outcome::Stopped)
        });
    }

    /// Asks the controller for a new replica in the place of the one found damaged.
    fn begin_ask(&mut self, group: GroupId, wanted: Wanted) {
        let Some(damage) = self.inner.ports.groups.damage(group) else {
            return;
        };
        let Wanted { name, me, .. } = wanted;
        let epoch = damage.last.map_or(LeaderEpoch(0), |last| last.epoch);
        let asked = (self.inner.ports.report_damage)(name.clone(), me, epoch);
        self.begin(group, async move {
            asked.await?;
            tracing::info!(partition = %name, replica = %me, "a damaged replica is replaced by a new one");
            Ok(Outcome::Replaced)
        });
    }

    fn begin_settle(&mut self, group: GroupId, partition: &Partition) {
        let Some(hosted) = self.hosted.get(&group) else {
            return;
        };
        let record = Arc::clone(&hosted.record);
        let (image, raft_group) = (Arc::clone(&self.image), partition.group().clone());
        self.settling.insert(group);
        self.begin(group, async move {
            let knows = |replica| image.knows(replica);
            let step = settle_members(&raft_group, &record, knows);
            let timed = tokio::time::timeout(SETTLE_PATIENCE, step).await;
            let after_ms = u64::try_from(SETTLE_PATIENCE.as_millis()).unwrap_or(u64::MAX);
            timed.unwrap_or(Err(Error::Timeout { after_ms }))
        });
    }

    /// Runs a step of `group` beside the others.
    fn begin<F>(&mut self, group: GroupId, step: F)
    where
        F: Future<Output = Result<Outcome, Error>> + Send + 'static,
    {
        self.busy.insert(group);
        let (sender, ended) = oneshot::channel();
        self.inner.tasks.spawn(async move {
            sender.send(step.await).ok(); // the loop has stopped
        });
        let ended = ended.map(move |result| {
            let result = result.unwrap_or_else(|_stopped| Err(Error::ShuttingDown));
            Done { group, result }
        });
        self.steps.push(Box::pin(ended));
    }

    fn finish(&mut self, done: Done) {
        let Done { group, result } = done;
        self.busy.remove(&group);
        self.settling.remove(&group);
        let now = Instant::now();
        match result {
            Ok(Outcome::Waits) => {
                self.retries.insert(
                    group,
                    Retry {
                        failures: 0,
                        at: now + WAIT_PAUSE,
                    },
                );
            }
            Ok(outcome) => {
                self.retries.remove(&group);
                self.note(group, outcome, now);
            }
            Err(error) => {
                let failures = self.retries.get(&group).map_or(0, |retry| retry.failures);
                let pause = pause_after(failures);
                self.retries.insert(
                    group,
                    Retry {
                        failures: failures + 1,
                        at: now + pause,
                    },
                );
                let name = self
                    .wanted
                    .get(&group)
                    .map(|wanted| wanted.name.to_string());
                let partition = name.unwrap_or_else(|| format!("group {group}"));
                if let Error::Refused { reason } = &error {
                    // Once, and again when the reason is another one.
                    if self.refusals.insert(group, reason.clone()).as_ref() != Some(reason) {
                        tracing::warn!(%partition, %error, "a step is refused, trying it again later");
                    }
                } else if failures.is_power_of_two() || failures == 0 {
                    tracing::warn!(%partition, %error, failures, "a step failed, trying it again");
                }
            }
        }
    }

    fn note(&mut self, group: GroupId, outcome: Outcome, now: Instant) {
        match outcome {
            Outcome::Started(started) => {
                let (partition, wanted) = *started;
                self.host(group, partition, wanted, now);
            }
            Outcome::Deleted => {
                self.hosted.remove(&group);
                self.stored.remove(&group);
                self.due.insert(group);
            }
            Outcome::Stopped => {
                self.hosted.remove(&group);
                self.due.insert(group);
                // not at once: what stopped it may do so again
                self.retries.insert(
                    group,
                    Retry {
                        failures: 0,
                        at: now + RESTART_PAUSE,
                    },
                );
            }
            Outcome::Replaced => {
                self.refusals.remove(&group);
                // The image will show it; if it does not, ask again.
                self.retries.insert(
                    group,
                    Retry {
                        failures: 1,
                        at: now + RESTART_PAUSE,
                    },
                );
            }
            Outcome::Founded => {
                self.unfounded.remove(&group);
            }
            Outcome::Settled(members) => {
                self.reports.mark(group);
                if let Some(hosted) = self.hosted.get_mut(&group) {
                    let change = hosted.record.replacement.as_ref();
                    if change.map_or(0, |change| change.number) == members.change {
                        self.unsettled.remove(&group);
                    } // else the next change has come meanwhile
                    hosted.members = Some(members);
                }
            }
            Outcome::Stepped | Outcome::Waits => {}
        }
    }

    fn host(&mut self, group: GroupId, partition: Partition, started_as: Wanted, now: Instant) {
        self.stored.insert(group, partition.me());
        let mut reports = partition.report_changed();
        reports.mark_changed();
        self.inner.publish(&partition);
        let hosted = Hosted {
            partition,
            reports,
            started: now,
            record: started_as.record,
            settings: started_as.settings,
            led_epoch: None,
            members: None,
            reported: None,
        };
        self.hosted.insert(group, hosted);
        self.unfounded.insert(group);
        self.due.insert(group);
        self.adapt(group); // to what changed while it was being started
    }

    /// Tells the waiters once every wanted replica was started, or failed to.
    fn check_ready(&self) {
        let was_tried = |group: &GroupId| {
            self.hosted.contains_key(group)
                || self
                    .retries
                    .get(group)
                    .is_some_and(|retry| retry.failures > 0)
        };
        if self.wanted.keys().all(was_tried) {
            self.inner.ready.send_replace(true);
        }
    }
}

/// The pause after this many failures in a row.
pub(super) fn pause_after(failures: u32) -> Duration {
    RETRY_MIN
        .saturating_mul(1 << failures.min(16))
        .min(RETRY_MAX)
}

pub(super) fn failed(error: &RaftError) -> Error {
    Error::Failed {
        reason: error.to_string(),
    }
}
