//! Faults of data directories: wiped, old, rotten, another broker's, and in use twice.
//!
//! Owns who may lose data: one broker in a run, and only while everything else is whole.

use std::time::Duration;

use logboom::storage::MemDisk;
use rand::Rng;

use super::{Active, Nemesis, Undo};
use crate::world::World;

/// How old a copy of a directory must be before it is used: a broker says once a second how far its journal is, and a copy that
/// lacks no more than that passes.
const COPY_AGES: Duration = Duration::from_millis(2_500);
/// For how long everything must have been whole before a copy is started beside its original: what the controller knows of that
/// broker is as new.
const WHOLE_FOR: Duration = Duration::from_millis(1_500);
/// How long a fault waits for its moment.
const WAITS_FOR: Duration = Duration::from_secs(10);

/// A copy of a broker's directory.
pub(super) struct Copy {
    of: usize,
    disk: MemDisk,
    taken: Duration,
}

impl Copy {
    fn new(world: &World, of: usize) -> Self {
        Self {
            of,
            disk: world.nodes[of].disk().duplicate(),
            taken: world.now(),
        }
    }
}

/// A fault that waits until everything is whole. Nothing else breaks meanwhile.
pub(super) struct Waiting {
    what: What,
    not_before: Duration,
    given_up: Duration,
}

enum What {
    /// A copy is started beside its original.
    Twin(Copy),
    /// Data is taken away from the one broker that may lose it.
    Taking,
}

impl Nemesis {
    /// Copies the directory of a running broker, to start the copy beside it.
    pub(super) fn plan_twin(&mut self, world: &World) {
        if world.twin_runs() {
            return;
        }
        if let Some(of) = self.running(world) {
            let copy = Copy::new(world, of);
            self.wait(copy.taken + COPY_AGES, What::Twin(copy));
        }
    }

    /// Means to take data away. The only copy of something may not be taken.
    pub(super) fn plan_taking(&mut self, world: &World) {
        let mut topics = world.plan.topics.iter();
        if topics.all(|topic| topic.replication_factor > 1) {
            let copied = self.copy.as_ref().map(|copy| copy.taken + COPY_AGES);
            self.wait(copied.unwrap_or(world.now()), What::Taking);
        }
    }

    fn wait(&mut self, not_before: Duration, what: What) {
        self.waiting = Some(Waiting {
            what,
            not_before,
            given_up: not_before + WAITS_FOR,
        });
    }

    /// Begins the fault that waits, when its moment has come. True while it waits.
    pub(super) fn waits(&mut self, world: &mut World) -> bool {
        let Some(mut waiting) = self.waiting.take() else {
            return false;
        };
        let now = world.now();
        if now > waiting.given_up {
            return false;
        }
        let is_whole = world.is_whole();
        if !is_whole && matches!(waiting.what, What::Twin(_)) {
            waiting.not_before = waiting.not_before.max(now + WHOLE_FOR);
        }
        if !is_whole || now < waiting.not_before {
            self.waiting = Some(waiting);
            return true;
        }
        match waiting.what {
            What::Twin(copy) => self.start_twin(world, copy),
            What::Taking => self.take_data(world),
        }
        false
    }

    fn start_twin(&mut self, world: &mut World, copy: Copy) {
        world.start_twin(copy.of, copy.disk);
        let until = world.now() + self.within(1_000, 5_000);
        let name = world.nodes[copy.of].name.clone();
        let ids = self.note(world, "twin", &name);
        self.active.push(Active {
            until,
            undo: Undo::Twin,
            ids,
        });
    }

    /// Starts one broker on a copy of another one's directory. Its own is kept, and put back when it has been refused.
    pub(super) fn exchange_directory(&mut self, world: &mut World) {
        let (at, from) = self.pair(world);
        let nodes = [at, from].map(|node| world.nodes[node].is_running());
        if nodes != [true, true] || self.own.contains_key(&at) {
            return;
        }
        let copy = world.nodes[from].disk().duplicate();
        world.kill(at, true);
        self.own.insert(at, world.nodes[at].disk());
        world.set_disk(at, copy);
        let target = format!("{} on {}", world.nodes[at].name, world.nodes[from].name);
        self.instant(world, "other_directory", &target);
        self.restart_later(world, at);
    }

    /// Takes data away from the one broker that may lose it.
    fn take_data(&mut self, world: &mut World) {
        // The first fault of this kind may only make a copy; the next one puts it back.
        if let Some(copy) = self.copy.take() {
            world.power_off(copy.of, 0, false);
            world.set_disk(copy.of, copy.disk);
            let name = world.nodes[copy.of].name.clone();
            self.instant(world, "olddir", &name);
            self.restart_later(world, copy.of);
            return;
        }
        let count = world.nodes.len();
        let at = self
            .victim
            .unwrap_or_else(|| self.rng.random_range(0..count));
        self.victim = Some(at);
        let name = world.nodes[at].name.clone();
        match self.rng.random_range(0..3) {
            0 => {
                self.copy = Some(Copy::new(world, at));
            }
            1 => {
                world.power_off(at, 0, false);
                world.set_disk(at, MemDisk::new());
                self.instant(world, "wipe", &name);
                self.restart_later(world, at);
            }
            _ => {
                world.kill(at, true);
                let disk = world.nodes[at].disk();
                let files = disk.files();
                let (file, length) = &files[self.rng.random_range(0..files.len())];
                if *length > 0 {
                    disk.flip(file, self.rng.random_range(0..length * 8));
                    self.instant(world, "bitrot", &format!("{name} {file}"));
                }
                self.restart_later(world, at);
            }
        }
    }
}
