//! The faults, done: what begins, what heals, and whether anything came of it.
//!
//! Owns the sequence of a step and what is an offence against the guarantees by itself: a broker that ends without a reason, one that
//! goes on after its disk failed, a cluster that does not come back. What was read and written is judged later.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use logboom::storage::{Verdict, fsck};
use logboom::testkit::recorder::{FaultId, Recorder};
use logboom::types::BrokerId;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::field::{Field, RESERVE_BYTES, flip_bits};
use super::ground::{Ground, Look};
use super::schedule::{Cut, Fault, Step, Target};

/// How long the cluster may take to be whole again when everything is healed.
pub(super) const WHOLE_WITHIN: Duration = Duration::from_secs(90);
/// How long a broker may take to end after its disk has failed.
const ENDS_WITHIN: Duration = Duration::from_secs(20);
/// How long a fault that waits for a sync or a write is armed.
const ARMED_FOR: Duration = Duration::from_secs(10);
/// How often a broker that ended by itself is started again in a run.
const HELPED_MAX: u32 = 2;
/// Places that are drawn until one is not where the replicas are.
const DRAWS: u32 = 20;
/// Between two looks at the cluster.
const LOOK: Duration = Duration::from_millis(100);
/// How long what a fault has left in a broker may take to show.
const AFTERMATH: Duration = Duration::from_millis(1_500);
/// sled's directory: nothing depends on it, so its failures need not end a broker.
const CACHE: &str = "catalog";
/// Free space is asked for once a second by a broker.
const SPACE_SEEN: Duration = Duration::from_millis(1_200);

/// What came of a step, for the timeline.
#[derive(Debug, Clone)]
pub(super) struct Deed {
    pub(super) kind: &'static str,
    pub(super) target: String,
    pub(super) began_ns: u64,
    pub(super) ended_ns: u64,
    /// Whether it did what it is meant to do.
    pub(super) effect: bool,
    pub(super) note: String,
    /// The partition, among all of the run, whose leader was killed in a whole cluster.
    pub(super) failover_of: Option<u32>,
}

/// A run under way.
pub(super) struct Run<'a> {
    pub(super) field: &'a mut Field,
    pub(super) ground: &'a Ground,
    pub(super) stop: CancellationToken,
    pub(super) deeds: Vec<Deed>,
    /// What is wrong whatever the history says.
    pub(super) problems: Vec<String>,
    /// How often each broker that had ended was started again, and those that are not any more.
    helped: BTreeMap<u32, u32>,
    given_up: BTreeSet<u32>,
    /// What is done now, for the progress line.
    pub(super) now: tokio::sync::watch::Sender<String>,
    looks: Vec<Look>,
}

/// What a fault came to: whether it had its effect, and what there is to say.
type Came = anyhow::Result<(bool, String)>;

impl<'a> Run<'a> {
    pub(super) fn new(
        field: &'a mut Field,
        ground: &'a Ground,
        stop: CancellationToken,
        now: tokio::sync::watch::Sender<String>,
    ) -> Self {
        Self {
            field,
            ground,
            stop,
            deeds: Vec::new(),
            problems: Vec::new(),
            helped: BTreeMap::new(),
            given_up: BTreeSet::new(),
            now,
            looks: Vec::new(),
        }
    }

    /// Waits, but not when the run is to stop.
    async fn sleep(&self, time: Duration) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(time) => {}
        }
    }

    /// Sees to brokers that ended though nobody made them.
    pub(super) fn tend(&mut self) -> anyhow::Result<()> {
        for id in self.field.ids() {
            let Some(why) = self.field.ended(id)? else {
                continue;
            };
            self.problems.push(format!("nobody had touched it: {why}"));
            let helped = self.helped.entry(id).or_default();
            *helped += 1;
            if *helped <= HELPED_MAX {
                self.field.start(&[id])?;
            } else {
                self.given_up.insert(id);
            }
        }
        Ok(())
    }

    /// Waits until all brokers are heard, all partitions led and all copies in sync; whether they are in the end.
    pub(super) async fn whole(&mut self, when: &str) -> anyhow::Result<bool> {
        let deadline = Instant::now() + WHOLE_WITHIN;
        loop {
            self.tend()?;
            let Some(missing) = self.ground.missing().await else {
                return Ok(true);
            };
            if Instant::now() >= deadline || !self.given_up.is_empty() {
                let within = WHOLE_WITHIN.as_secs();
                let text = format!("{when}: not whole within {within} s: {missing}");
                self.problems.push(text);
                return Ok(false);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until all brokers serve and the controller hears them.
    async fn heard(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + WHOLE_WITHIN;
        loop {
            self.tend()?;
            let alive = self.ground.alive().await.unwrap_or_default();
            let mut left = Vec::new();
            for id in self.field.ids() {
                // The controller may not have missed one that was away for a moment.
                if !alive.contains(&id) || !self.field.serves(id)? {
                    left.push(id);
                }
            }
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline || !self.given_up.is_empty() {
                let within = WHOLE_WITHIN.as_secs();
                self.problems.push(format!(
                    "brokers {left:?} were not heard within {within} s of their start"
                ));
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until a broker that was started serves, and a moment longer; why it ended, if it did.
    async fn serves_or_ends(&mut self, id: u32) -> anyhow::Result<Option<String>> {
        let deadline = Instant::now() + WHOLE_WITHIN;
        while !self.field.serves(id)? {
            if let Some(why) = self.field.ended(id)? {
                return Ok(Some(why));
            }
            if Instant::now() >= deadline {
                let within = WHOLE_WITHIN.as_secs();
                let text = format!("broker {id} neither serves nor ends within {within} s");
                self.problems.push(text);
                return Ok(None);
            }
            tokio::time::sleep(LOOK).await;
        }
        self.sleep(AFTERMATH).await;
        self.field.ended(id)
    }

    /// Starts them, and waits until they are heard.
    async fn back(&mut self, ids: &[u32]) -> anyhow::Result<()> {
        self.field.start(ids)?;
        self.heard().await
    }

    /// Who that is now.
    fn who(&self, target: Target) -> Vec<u32> {
        match target {
            Target::All => self.field.ids(),
            Target::Broker(broker) => vec![broker],
            Target::LeaderOf(number) => {
                let look = self.looks.iter().find(|look| look.number == number);
                // Without a leader, its preferred one.
                let leader = look.and_then(|look| look.leader.or(look.replicas.first().copied()));
                vec![leader.unwrap_or(1)]
            }
        }
    }

    fn name(&self, target: Target) -> String {
        match target {
            Target::All => "all brokers".to_owned(),
            Target::Broker(broker) => format!("broker {broker}"),
            Target::LeaderOf(number) => {
                let broker = self.who(target).first().copied().unwrap_or(1);
                let partition = self.ground.name_of(number);
                format!("broker {broker}, leader of {partition}")
            }
        }
    }

    fn describe(&self, fault: &Fault) -> String {
        match *fault {
            Fault::Kill(target) | Fault::Pause(target) | Fault::Powerloss { target, .. } => {
                self.name(target)
            }
            Fault::Partition(Cut::Pair(one, other)) => format!("broker {one} | broker {other}"),
            Fault::Partition(Cut::OneWay(from, to)) => format!("broker {from} -/-> broker {to}"),
            Fault::Partition(Cut::Isolate(target)) => {
                format!("{} from the other brokers", self.name(target))
            }
            Fault::Partition(Cut::IsolateFromAll(target)) => {
                format!("{} from everybody", self.name(target))
            }
            Fault::SlowLinks { target, delay, .. } => {
                format!("links of {}, {} ms", self.name(target), delay.as_millis())
            }
            Fault::SlowDisk { target, delay } => {
                format!("syncs of {}, {} ms", self.name(target), delay.as_millis())
            }
            Fault::Diskfull { target, room } => {
                let how = room.map_or("below its reserve".to_owned(), |room| {
                    format!("{room} bytes left")
                });
                format!("{}, {how}", self.name(target))
            }
            Fault::Fsyncfail { target, nth } => format!("sync {nth} of {}", self.name(target)),
            Fault::Bitrot { broker, flips, .. } => format!("{flips} bits of broker {broker}"),
            Fault::Transfer { partition } | Fault::Reassign { partition, .. } => {
                self.ground.name_of(partition)
            }
        }
    }

    /// Does one step, to its healing; whether the run can go on.
    pub(super) async fn step(&mut self, step: &Step) -> anyhow::Result<bool> {
        self.now.send_replace("waiting".to_owned());
        if step.settled && !self.whole("before the next fault").await? {
            return Ok(false);
        }
        self.sleep(step.calm).await;
        if self.stop.is_cancelled() {
            return Ok(true);
        }
        self.tend()?;
        self.look().await;
        if let Fault::Transfer { partition } = step.fault {
            self.unbalance(partition).await?;
        }
        let kind = step.fault.kind().name();
        let target = self.describe(&step.fault);
        self.now.send_replace(format!("{kind} {target}"));
        let began = self.begin(kind, &target);
        let failover_of = match step.fault {
            Fault::Kill(Target::LeaderOf(partition)) if step.settled => Some(partition),
            _ => None,
        };
        let problems = self.problems.len();
        let (effect, note) = match step.fault {
            Fault::Kill(target) => self.kill(target, step.lasts).await?,
            Fault::Powerloss { target, seed } => self.powerloss(target, seed, step.lasts).await?,
            Fault::Pause(target) => self.pause(target, step.lasts).await?,
            Fault::Partition(cut) => self.partition(cut, step.lasts).await?,
            Fault::SlowLinks {
                target,
                delay,
                jitter,
            } => {
                self.slow_links(target, delay, jitter);
                self.sleep(step.lasts).await;
                self.field.links.heal_all();
                (true, String::new())
            }
            Fault::SlowDisk { target, delay } => self.slow_disk(target, delay, step.lasts).await?,
            Fault::Diskfull { target, room } => self.diskfull(target, room, step.lasts).await?,
            Fault::Fsyncfail { target, nth } => self.fsyncfail(target, nth).await?,
            Fault::Bitrot {
                broker,
                flips,
                seed,
            } => self.bitrot(broker, flips, seed).await?,
            Fault::Transfer { .. } => self.transfer().await?,
            Fault::Reassign { partition, seed } => self.reassign(partition, seed).await?,
        };
        let (began_ns, ids) = began;
        let mut ended_ns = began_ns;
        for (topic, id) in self.ground.topics.iter().zip(ids) {
            topic.recorder.fault_ended(id);
            ended_ns = topic.recorder.now_ns();
        }
        self.deeds.push(Deed {
            kind,
            target,
            began_ns,
            ended_ns,
            effect,
            note,
            failover_of,
        });
        Ok(self.problems.len() == problems)
    }

    async fn look(&mut self) {
        if let Some(looks) = self.ground.look().await {
            self.looks = looks;
        }
    }

    fn begin(&self, kind: &str, target: &str) -> (u64, Vec<FaultId>) {
        let recorders = self.ground.topics.iter().map(|topic| &topic.recorder);
        let began = recorders.clone().next().map_or(0, Recorder::now_ns);
        (
            began,
            recorders.map(|one| one.fault_began(kind, target)).collect(),
        )
    }

    async fn kill(&mut self, target: Target, lasts: Duration) -> Came {
        let ids = self.who(target);
        self.field.kill(&ids).await?;
        self.sleep(lasts).await;
        self.back(&ids).await?;
        Ok((true, String::new()))
    }

    async fn powerloss(&mut self, target: Target, seed: u64, lasts: Duration) -> Came {
        let ids = self.who(target);
        self.field.kill(&ids).await?;
        let mut notes = Vec::new();
        for id in &ids {
            let lost = self.field.lose_power(*id, seed)?;
            notes.push(format!(
                "{id}: {} of {} writes, {} of {} names",
                lost.writes_lost, lost.writes_pending, lost.names_lost, lost.names_pending
            ));
        }
        self.sleep(lasts).await;
        self.back(&ids).await?;
        Ok((true, format!("lost {}", notes.join("; "))))
    }

    async fn pause(&mut self, target: Target, lasts: Duration) -> Came {
        let ids = self.who(target);
        for id in &ids {
            self.field.pause(*id)?;
        }
        self.sleep(lasts).await;
        for id in &ids {
            self.field.go_on(*id)?;
        }
        Ok((true, String::new()))
    }

    async fn partition(&mut self, cut: Cut, lasts: Duration) -> Came {
        let links = self.field.links.clone();
        match cut {
            Cut::Pair(one, other) => links.cut_both(BrokerId(one), BrokerId(other)),
            Cut::OneWay(from, to) => links.cut(BrokerId(from), BrokerId(to)),
            Cut::Isolate(target) => {
                for id in self.who(target) {
                    links.isolate(BrokerId(id));
                }
            }
            Cut::IsolateFromAll(target) => {
                for id in self.who(target) {
                    links.isolate_from_all(BrokerId(id));
                }
            }
        }
        self.sleep(lasts).await;
        links.heal_all();
        Ok((true, String::new()))
    }

    fn slow_links(&mut self, target: Target, delay: Duration, jitter: Duration) {
        let hit = self.who(target);
        let links = &self.field.links;
        for one in &hit {
            for other in self.field.ids().iter().filter(|other| *other != one) {
                links.delay(BrokerId(*one), BrokerId(*other), delay, jitter);
                links.delay(BrokerId(*other), BrokerId(*one), delay, jitter);
            }
        }
    }

    async fn slow_disk(&mut self, target: Target, delay: Duration, lasts: Duration) -> Came {
        let ids = self.who(target);
        for id in &ids {
            self.field.disk(*id)?.delay_syncs(delay)?;
        }
        self.sleep(lasts).await;
        for id in &ids {
            self.field.disk(*id)?.delay_syncs(Duration::ZERO)?;
        }
        Ok((true, String::new()))
    }

    /// Waits until a count of a disk has risen, or the broker has ended.
    async fn risen(&mut self, id: u32, before: u64, failed_syncs: bool) -> anyhow::Result<bool> {
        let deadline = Instant::now() + ARMED_FOR;
        loop {
            let counts = self.field.disk(id)?.counts()?;
            let now = if failed_syncs {
                counts.syncs_failed
            } else {
                counts.writes_refused
            };
            if now > before {
                return Ok(true);
            }
            if Instant::now() >= deadline || self.stop.is_cancelled() {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn diskfull(&mut self, target: Target, room: Option<u64>, lasts: Duration) -> Came {
        let Some(id) = self.who(target).first().copied() else {
            return Ok((false, String::new()));
        };
        let before = self.field.disk(id)?.counts()?.writes_refused;
        let Some(room) = room else {
            self.field.disk(id)?.limit_free(Some(RESERVE_BYTES / 2))?;
            self.sleep(SPACE_SEEN).await;
            self.look().await;
            let before: Vec<Look> = self.led_by(id).cloned().collect();
            self.sleep(lasts).await;
            self.look().await;
            self.field.disk(id)?.limit_free(None)?;
            // Clients repeat what is refused: that nothing was appended is what shows.
            let still = self
                .led_by(id)
                .filter(|look| look.end.is_some() && before.contains(look))
                .count();
            let note = format!("{still} partitions took nothing");
            return Ok((still > 0, note));
        };
        self.field.disk(id)?.limit_free(Some(room))?;
        let hit = self.risen(id, before, false).await?;
        let ended = self.field.wait_ended(id, lasts).await?;
        self.field.disk(id)?.limit_free(None)?;
        // What could not be written to its cache may trouble it later: now is the time.
        self.field.kill(&[id]).await?;
        self.back(&[id]).await?;
        let note = match ended {
            Some(_) => "the broker stopped".to_owned(),
            None if hit => "the broker went on and was restarted".to_owned(),
            None => "nothing was written".to_owned(),
        };
        Ok((hit, note))
    }

    async fn fsyncfail(&mut self, target: Target, nth: u64) -> Came {
        let Some(id) = self.who(target).first().copied() else {
            return Ok((false, String::new()));
        };
        let before = self.field.disk(id)?.counts()?.syncs_failed;
        self.field.disk(id)?.fail_sync(nth)?;
        let hit = self.risen(id, before, true).await?;
        self.field.disk(id)?.fail_sync(0)?;
        if !hit {
            return Ok((false, "it synced too little".to_owned()));
        }
        let file = self.field.disk(id)?.failed_sync()?.unwrap_or_default();
        let of_cache = file.starts_with(CACHE);
        let within = if of_cache { AFTERMATH } else { ENDS_WITHIN };
        let ended = self.field.wait_ended(id, within).await?;
        if ended.is_none() && !of_cache {
            let (within, file) = (within.as_secs(), file.display());
            self.problems.push(format!(
                "broker {id} still runs {within} s after the sync of {file} failed"
            ));
        }
        self.field.kill(&[id]).await?;
        self.back(&[id]).await?;
        let end = if ended.is_some() {
            "stopped"
        } else {
            "went on and was restarted"
        };
        Ok((true, format!("{}: the broker {end}", file.display())))
    }

    async fn bitrot(&mut self, id: u32, flips: u32, seed: u64) -> Came {
        self.field.broker(id)?.stop().await;
        let directory = self.field.broker(id)?.directory.clone();
        let mut chance = StdRng::seed_from_u64(seed);
        let hit = flip_bits(&directory, flips, &mut chance)?;
        let damaged = fsck(&directory).verdict != Verdict::Ok;
        self.field.start(&[id])?;
        let refused = self.serves_or_ends(id).await?.is_some();
        let note = match (refused, damaged) {
            (true, _) => "the broker refused its disk and got a new one",
            (false, true) => "the broker went on; its disk was replaced",
            (false, false) => "no harm by fsck",
        };
        // What it may still hold of rotten bytes must not meet the next rot elsewhere.
        if refused || damaged {
            self.field.kill(&[id]).await?;
            self.field.replace_disk(id)?;
            self.back(&[id]).await?;
        }
        self.whole("after rotten bits").await?;
        Ok((!hit.is_empty(), format!("{note} ({})", hit.join(", "))))
    }

    /// The partitions that a broker led when they were last looked at.
    fn led_by(&self, id: u32) -> impl Iterator<Item = &Look> {
        self.looks
            .iter()
            .filter(move |look| look.leader == Some(id))
    }

    /// Sees to it that a partition is not led by its preferred leader, so that there is something to hand back.
    async fn unbalance(&mut self, partition: u32) -> anyhow::Result<()> {
        let look = self.looks.iter().find(|look| look.number == partition);
        let home = look.and_then(|look| look.replicas.first().copied());
        let Some(leader) = look
            .and_then(|look| look.leader)
            .filter(|id| Some(*id) == home)
        else {
            return Ok(());
        };
        self.field.kill(&[leader]).await?;
        self.looks_until(|looks| {
            let now = looks.iter().find(|look| look.number == partition);
            now.is_some_and(|look| look.leader.is_some_and(|now| now != leader))
        })
        .await;
        self.back(&[leader]).await?;
        self.whole("before a transfer").await?;
        Ok(())
    }

    /// Hands leadership back to preferred leaders.
    async fn transfer(&mut self) -> Came {
        let deadline = Instant::now() + ARMED_FOR;
        while Instant::now() < deadline && !self.stop.is_cancelled() {
            let admin = self.ground.onlooker.admin();
            // An answer that does not come is asked for again: to hand back twice does no harm.
            if let Ok(moved) = admin.elect_leaders().await
                && !moved.is_empty()
            {
                return Ok((true, format!("{} partitions handed back", moved.len())));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok((false, "there was nothing to hand back".to_owned()))
    }

    /// Moves a partition to other brokers, or to the same ones with another preferred leader where there are no others.
    async fn reassign(&mut self, partition: u32, seed: u64) -> Came {
        let look = self.looks.iter().find(|look| look.number == partition);
        let Some(before) = look.map(|look| look.replicas.clone()) else {
            return Ok((false, "nobody answers for the partition".to_owned()));
        };
        let mut chance = StdRng::seed_from_u64(seed);
        let mut wanted = before.clone();
        for _ in 0..DRAWS {
            wanted = self.field.ids();
            wanted.shuffle(&mut chance);
            wanted.truncate(before.len());
            if wanted != before {
                break;
            }
        }
        let note = format!("from {before:?} to {wanted:?}");
        let deadline = Instant::now() + WHOLE_WITHIN;
        loop {
            self.tend()?;
            // Asked for again, it changes nothing; so an answer that got lost does no harm.
            let asked = self.ground.reassign(partition, &wanted).await;
            let moved = self.looks_until(|looks| {
                let now = looks.iter().find(|look| look.number == partition);
                now.is_some_and(|look| look.is_whole() && look.replicas == wanted)
            });
            if moved.await {
                return Ok((wanted != before, note));
            }
            if self.stop.is_cancelled() {
                return Ok((false, format!("{note}: interrupted")));
            }
            if Instant::now() >= deadline {
                let within = WHOLE_WITHIN.as_secs();
                let said = asked.map_or_else(|error| format!(": {error:#}"), |()| String::new());
                let name = self.ground.name_of(partition);
                let text = format!("{name} was not moved {note} within {within} s{said}");
                self.problems.push(text);
                return Ok((false, note));
            }
        }
    }

    async fn looks_until(&self, is_so: impl Fn(&[Look]) -> bool) -> bool {
        let deadline = Instant::now() + ARMED_FOR;
        while Instant::now() < deadline && !self.stop.is_cancelled() {
            if let Some(looks) = self.ground.look().await
                && is_so(&looks)
            {
                return true;
            }
            tokio::time::sleep(LOOK).await;
        }
        false
    }

    /// Mends everything, and waits until the cluster is whole.
    pub(super) async fn heal(&mut self) -> anyhow::Result<bool> {
        self.now.send_replace("healing".to_owned());
        self.field.heal()?;
        let ids = self.field.ids();
        self.field.start(&ids)?;
        self.whole("after all faults").await
    }
}
