//! What breaks, and when: faults drawn one after the other, each with its end.
//!
//! Owns when the next fault begins and how each ends. Everything that is broken is said to the history.
//!
//! - `kinds`: which faults there are, and how many of each a campaign must have seen.
//! - `data`: faults of data directories, in an order in which they can be recovered from.

mod data;
mod kinds;

use std::collections::BTreeMap;
use std::time::Duration;

use logboom::runtime::sim;
use logboom::storage::MemDisk;
use logboom::testkit::recorder::FaultId;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use self::kinds::{KINDS, Kind};
use crate::clients::Errand;
use crate::world::{Cut, Life, Order, World};

pub use self::kinds::coverage;

enum Undo {
    Nothing,
    Mend(Vec<Cut>),
    Flap(Cut, bool),
    Latency,
    Disk(usize),
    WallClock,
    Repeat,
    Twin,
}

struct Active {
    until: Duration,
    undo: Undo,
    ids: Vec<FaultId>,
}

/// The one who breaks things.
pub struct Nemesis {
    rng: SmallRng,
    next: Duration,
    end: Duration,
    active: Vec<Active>,
    pub counts: BTreeMap<&'static str, u64>,
    pub log: Vec<String>,
    /// The broker whose data was taken; no other's is in this run.
    victim: Option<usize>,
    /// A copy of a directory, to be put back later.
    copy: Option<data::Copy>,
    /// A broker's own directory, while it stands on a copy of another's.
    own: BTreeMap<usize, MemDisk>,
    waiting: Option<data::Waiting>,
    /// Only these are drawn, when there are any.
    only: Vec<Kind>,
}

impl Nemesis {
    pub fn new(world: &World) -> Self {
        let only = std::env::var("FAULTS").unwrap_or_default();
        let only = only.split(',').filter_map(|name| {
            let found = KINDS.iter().find(|(kind, _)| kind.name() == name.trim());
            found.map(|(kind, _)| *kind)
        });
        Self {
            rng: SmallRng::seed_from_u64(world.plan.seed ^ 0x6e65_6d65),
            next: world.now() + Duration::from_millis(300),
            end: world.now() + world.plan.faults_for,
            active: Vec::new(),
            counts: BTreeMap::new(),
            log: Vec::new(),
            victim: None,
            copy: None,
            own: BTreeMap::new(),
            waiting: None,
            only: only.collect(),
        }
    }

    pub fn is_over(&self, world: &World) -> bool {
        world.now() >= self.end
    }

    fn note(&mut self, world: &World, kind: &'static str, target: &str) -> Vec<FaultId> {
        *self.counts.entry(kind).or_default() += 1;
        self.log.push(format!(
            "{:>8.3} s  {kind} {target}",
            world.now().as_secs_f64()
        ));
        tracing::info!(kind, target, "fault");
        let recorders = world.recorders.iter();
        recorders
            .map(|recorder| recorder.fault_began(kind, target))
            .collect()
    }

    fn within(&mut self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_millis(self.rng.random_range(from_ms..to_ms))
    }

    /// Ends what is due, answers failures, and begins the next fault when its time has come.
    pub fn tick(&mut self, world: &mut World) -> Vec<String> {
        let wrong = self.operate(world);
        let now = world.now();
        let mut still = Vec::new();
        for mut active in std::mem::take(&mut self.active) {
            if active.until > now && !matches!(active.undo, Undo::Flap(..)) {
                still.push(active);
                continue;
            }
            if let Undo::Flap(cut, is_cut) = &mut active.undo
                && active.until > now
            {
                if self.rng.random_bool(0.01) {
                    if *is_cut {
                        world.mend(*cut);
                    } else {
                        world.cut(*cut);
                    }
                    *is_cut = !*is_cut;
                }
                still.push(active);
                continue;
            }
            Self::undo(world, &active.undo);
            for (recorder, id) in world.recorders.iter().zip(active.ids) {
                recorder.fault_ended(id);
            }
        }
        self.active.extend(still);
        let waits = self.waits(world);
        if now >= self.next && now < self.end && !waits {
            let every = u64::try_from(world.plan.fault_every.as_millis()).unwrap_or(u64::MAX);
            self.next = now + self.within(every / 4, every * 2);
            // A copy that was kept is there to be put back.
            let again = self.copy.is_some() && self.rng.random_bool(0.5);
            let kind = if again { Kind::TakeData } else { self.draw() };
            self.begin(world, kind);
        }
        wrong
    }

    fn undo(world: &mut World, undo: &Undo) {
        match undo {
            Undo::Nothing => {}
            Undo::Mend(cuts) => cuts.iter().for_each(|cut| world.mend(*cut)),
            Undo::Flap(cut, _) => world.mend(*cut),
            Undo::Latency => world.sim.set_max_message_latency(world.plan.latency_max),
            Undo::Disk(at) => {
                let disk = world.nodes[*at].disk();
                disk.heal();
                disk.set_free(1 << 40);
                disk.set_pace(world.plan.seed, world.plan.disk_max);
            }
            Undo::WallClock => sim::set_wall_clock_error(0),
            Undo::Repeat => sim::set_repeats(0),
            Undo::Twin => world.stop_twin(),
        }
    }

    /// Everything is whole again.
    pub fn heal(&mut self, world: &mut World) {
        for active in std::mem::take(&mut self.active) {
            Self::undo(world, &active.undo);
            for (recorder, id) in world.recorders.iter().zip(active.ids) {
                recorder.fault_ended(id);
            }
        }
        self.waiting = None;
        world.heal();
    }

    /// What an operator does about processes that ended by themselves: starts them again when the disk is well, and with an empty
    /// directory when that is damaged or refused, or its own when it stood on another's.
    pub fn operate(&mut self, world: &mut World) -> Vec<String> {
        let mut wrong = Vec::new();
        for (at, reason) in std::mem::take(&mut world.failures) {
            self.log.push(format!(
                "{:>8.3} s  {} ended: {reason}",
                world.now().as_secs_f64(),
                world.nodes[at].name
            ));
            tracing::info!(node = world.nodes[at].name, reason, "ended by itself");
            world.nodes[at].disk().heal();
            if reason.contains("belongs to broker")
                && let Some(own) = self.own.remove(&at)
            {
                own.heal();
                own.set_free(1 << 40);
                world.set_disk(at, own);
                continue;
            }
            let unusable =
                !reason.contains("injected") && !reason.contains("the machine has crashed");
            if unusable {
                if self.victim != Some(at) {
                    wrong.push(format!(
                        "{} ended although nobody had touched its data: {reason}",
                        world.nodes[at].name
                    ));
                }
                world.set_disk(at, MemDisk::new());
            }
        }
        wrong
    }

    fn draw(&mut self) -> Kind {
        if !self.only.is_empty() {
            return self.only[self.rng.random_range(0..self.only.len())];
        }
        let total: u32 = KINDS.iter().map(|(_, weight)| weight).sum();
        let mut left = self.rng.random_range(0..total);
        for (kind, weight) in KINDS {
            if left < weight {
                return kind;
            }
            left -= weight;
        }
        Kind::Kill
    }

    fn running(&mut self, world: &World) -> Option<usize> {
        let running: Vec<usize> = (0..world.nodes.len())
            .filter(|at| world.nodes[*at].is_running())
            .collect();
        (!running.is_empty()).then(|| running[self.rng.random_range(0..running.len())])
    }

    fn pair(&mut self, world: &World) -> (usize, usize) {
        let count = world.nodes.len();
        let a = self.rng.random_range(0..count);
        let b = (a + self.rng.random_range(1..count)) % count;
        (a, b)
    }

    fn restart_later(&mut self, world: &mut World, at: usize) {
        let wait = if self.rng.random_bool(0.3) {
            self.within(1, 50)
        } else {
            self.within(100, 4_000)
        };
        world.nodes[at].restart_at = Some(world.now() + wait);
    }

    fn cuts(&mut self, world: &mut World, kind: Kind, target: &str, cuts: Vec<Cut>) {
        let until = world.now() + self.within(200, 4_000);
        let cuts: Vec<Cut> = cuts
            .into_iter()
            .filter(|cut| !world.cuts.contains(cut))
            .collect();
        for cut in &cuts {
            world.cut(*cut);
        }
        let ids = self.note(world, kind.name(), target);
        self.active.push(Active {
            until,
            undo: Undo::Mend(cuts),
            ids,
        });
    }

    fn instant(&mut self, world: &World, name: &'static str, target: &str) {
        let ids = self.note(world, name, target);
        self.active.push(Active {
            until: world.now(),
            undo: Undo::Nothing,
            ids,
        });
    }

    #[allow(clippy::too_many_lines)] // one arm for each kind
    fn begin(&mut self, world: &mut World, kind: Kind) {
        let count = world.nodes.len();
        match kind {
            Kind::Kill | Kind::PowerLoss | Kind::PowerLossTorn | Kind::CrashAtOperation => {
                let Some(at) = self.running(world) else {
                    return;
                };
                let name = world.nodes[at].name.clone();
                let (seed, flip) = (self.rng.random(), self.rng.random_bool(0.5));
                match kind {
                    Kind::Kill => world.kill(at, flip),
                    Kind::PowerLoss => world.power_off(at, seed, false),
                    Kind::PowerLossTorn => world.power_off(at, seed, true),
                    _ => {
                        let disk = world.nodes[at].disk();
                        disk.crash_after(self.rng.random_range(0..60), seed, flip);
                        world.nodes[at].armed = Some(disk.lives());
                    }
                }
                self.instant(world, kind.name(), &name);
                if kind != Kind::CrashAtOperation {
                    self.restart_later(world, at);
                }
            }
            Kind::KillAll | Kind::PowerLossAll => {
                for at in 0..count {
                    let seed = self.rng.random();
                    if matches!(world.nodes[at].cell.borrow().life, Life::Down) {
                        continue;
                    }
                    if kind == Kind::KillAll {
                        world.kill(at, true);
                    } else {
                        let tear = self.rng.random_bool(0.5);
                        world.power_off(at, seed, tear);
                    }
                    self.restart_later(world, at);
                }
                self.instant(world, kind.name(), "all");
            }
            Kind::Partition | Kind::OneWay | Kind::HoldLink => {
                let (a, b) = self.pair(world);
                let cut = match kind {
                    Kind::Partition => Cut::Both(a, b),
                    Kind::OneWay => Cut::OneWay(a, b),
                    _ => Cut::Held(a, b),
                };
                self.cuts(world, kind, &format!("{cut:?}"), vec![cut]);
            }
            Kind::Isolate | Kind::IsolateOneWay | Kind::HoldHost => {
                let at = self.rng.random_range(0..count);
                let inward = self.rng.random_bool(0.5);
                let others = (0..count).filter(|other| *other != at);
                let cuts = others.map(|other| match kind {
                    Kind::Isolate => Cut::Both(at, other),
                    Kind::IsolateOneWay if inward => Cut::OneWay(other, at),
                    Kind::IsolateOneWay => Cut::OneWay(at, other),
                    _ => Cut::Held(at, other),
                });
                let cuts = cuts.collect();
                let name = world.nodes[at].name.clone();
                self.cuts(world, kind, &name, cuts);
            }
            Kind::Bridge => {
                let bridge = self.rng.random_range(0..count);
                let mut cuts = Vec::new();
                for a in 0..count {
                    for b in 0..a {
                        if a != bridge && b != bridge {
                            cuts.push(Cut::Both(a, b));
                        }
                    }
                }
                let name = world.nodes[bridge].name.clone();
                self.cuts(world, kind, &name, cuts);
            }
            Kind::Flapping => {
                let (a, b) = self.pair(world);
                let cut = Cut::Both(a, b);
                if world.cuts.contains(&cut) {
                    return;
                }
                world.cut(cut);
                let until = world.now() + self.within(500, 3_000);
                let ids = self.note(world, kind.name(), &format!("{a} {b}"));
                self.active.push(Active {
                    until,
                    undo: Undo::Flap(cut, true),
                    ids,
                });
            }
            Kind::CutFromClients => {
                let at = self.rng.random_range(0..count);
                let cut = match self.rng.random_range(0..3) {
                    0 => Cut::Both(at, count),
                    1 => Cut::OneWay(at, count),
                    _ => Cut::Held(at, count),
                };
                self.cuts(world, kind, &format!("{cut:?}"), vec![cut]);
            }
            Kind::Latency => {
                let most = self.within(20, 300);
                world.sim.set_max_message_latency(most);
                let until = world.now() + self.within(500, 3_000);
                let ids = self.note(world, kind.name(), &format!("{most:?}"));
                self.active.push(Active {
                    until,
                    undo: Undo::Latency,
                    ids,
                });
            }
            Kind::SlowDisk | Kind::FailSync | Kind::FailWrite | Kind::DiskFull => {
                let at = self.rng.random_range(0..count);
                let disk = world.nodes[at].disk();
                let (writes, syncs) = disk.counts();
                let after = self.rng.random_range(1..40);
                let always = self.rng.random_bool(0.5);
                match kind {
                    Kind::SlowDisk => {
                        let pace = self.within(50, 2_000);
                        disk.set_pace(self.rng.random(), pace);
                    }
                    Kind::FailSync => disk.fail_sync(syncs + after, always),
                    Kind::FailWrite => disk.fail_write(writes + after, always),
                    _ => disk.set_free(self.rng.random_range(0..1 << 20)),
                }
                let until = world.now() + self.within(500, 4_000);
                let name = world.nodes[at].name.clone();
                let ids = self.note(world, kind.name(), &name);
                self.active.push(Active {
                    until,
                    undo: Undo::Disk(at),
                    ids,
                });
            }
            Kind::WallClock => {
                let error = self.rng.random_range(-3_600_000..3_600_000);
                sim::set_wall_clock_error(error);
                let until = world.now() + self.within(100, 3_000);
                let ids = self.note(world, kind.name(), &format!("{error} ms"));
                self.active.push(Active {
                    until,
                    undo: Undo::WallClock,
                    ids,
                });
            }
            Kind::ClockJump | Kind::Stop | Kind::Transfer => {
                let Some(at) = self.running(world) else {
                    return;
                };
                let order = match kind {
                    Kind::ClockJump => Order::Jump(self.within(100, 5_000)),
                    Kind::Transfer => Order::HandOver,
                    _ => Order::Stop,
                };
                let target = format!("{} {order:?}", world.nodes[at].name);
                world.nodes[at].tell(order);
                self.instant(world, kind.name(), &target);
            }
            Kind::Repeat => {
                let per_mille = self.rng.random_range(20..300);
                sim::set_repeats(per_mille);
                let until = world.now() + self.within(500, 4_000);
                let ids = self.note(world, kind.name(), &format!("{per_mille} of 1000"));
                self.active.push(Active {
                    until,
                    undo: Undo::Repeat,
                    ids,
                });
            }
            Kind::Reassign => {
                let topic = &world.plan.topics[self.rng.random_range(0..world.plan.topics.len())];
                let mut brokers: Vec<u32> = (1..=world.plan.brokers).collect();
                brokers.shuffle(&mut self.rng);
                brokers.truncate(topic.replication_factor as usize);
                let errand = Errand {
                    topic: topic.name.clone(),
                    partition: self.rng.random_range(0..topic.partitions),
                    replicas: brokers,
                };
                let target = format!("{errand:?}");
                if world.control.borrow_mut().send(errand) {
                    self.instant(world, kind.name(), &target);
                }
            }
            Kind::OtherDirectory => self.exchange_directory(world),
            Kind::Twin => self.plan_twin(world),
            Kind::TakeData => self.plan_taking(world),
        }
    }
}
