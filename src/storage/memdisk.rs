//! A disk in memory that can lose power: what has been written and what is durable are kept apart.
//!
//! Owns the two images of every file and of the directory, and the faults asked for. A crash drops what was not
//! synced, or keeps a random part of it, sector by sector; a failed sync marks the data clean although it is
//! not durable, as a real disk does. Handles opened before a crash fail afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::catalog::memory::MemCatalog;
use super::catalog::{Catalog, CatalogError};
use super::disk::{Disk, DiskFile, Lock};

const SECTOR: usize = 512;

#[derive(Debug, Default, Clone)]
struct Inode {
    written: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors written since the last sync.
    dirty: BTreeSet<usize>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Set(String, u64),
    Gone(String),
}

#[derive(Debug, Default)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    dirs: BTreeSet<String>,
    /// Changes of names not yet synced, in order.
    changes: Vec<NameChange>,
    next: u64,
    life: u64,
    locked: Option<Arc<AtomicBool>>,
    catalog: MemCatalog,
    free: u64,
    writes: u64,
    syncs: u64,
    fail_write: Option<(u64, bool)>,
    fail_sync: Option<(u64, bool)>,
    /// Power goes when so many writes and syncs have been done: with this seed, torn or not.
    power_ends: Option<(u64, u64, bool)>,
    #[cfg(feature = "sim")]
    pace: Option<Pace>,
    hold: Option<Arc<Hold>>,
}

/// How long operations take in simulated time.
#[cfg(feature = "sim")]
#[derive(Debug)]
struct Pace {
    rng: SmallRng,
    longest: std::time::Duration,
}

/// Whether syncs wait, and who tells them to go on.
#[derive(Debug, Default)]
struct Hold {
    released: Mutex<bool>,
    changed: Condvar,
}

/// A disk in memory. Clones share it, so it survives the store that uses it.
#[derive(Debug, Clone)]
pub struct MemDisk(Arc<Mutex<State>>);

impl Default for MemDisk {
    fn default() -> Self {
        Self::new()
    }
}

fn dead() -> io::Error {
    io::Error::other("the machine has crashed")
}

fn hit(fault: Option<(u64, bool)>, count: u64) -> bool {
    fault.is_some_and(|(n, from_then_on)| count == n || (from_then_on && count > n))
}

impl State {
    /// Before each write and sync: is there still power?
    fn power(&mut self) -> io::Result<()> {
        let done = self.writes + self.syncs;
        if let Some((_, seed, tear)) = self.power_ends.take_if(|(at, ..)| done >= *at) {
            self.crash(seed, tear);
            return Err(dead());
        }
        Ok(())
    }

    fn count_write(&mut self) -> io::Result<()> {
        self.power()?;
        self.writes += 1;
        if hit(self.fail_write, self.writes) {
            return Err(io::Error::other(format!(
                "injected: write {} failed",
                self.writes
            )));
        }
        Ok(())
    }

    fn count_sync(&mut self) -> Result<(), io::Error> {
        self.power()?;
        self.syncs += 1;
        if hit(self.fail_sync, self.syncs) {
            return Err(io::Error::other(format!(
                "injected: sync {} failed",
                self.syncs
            )));
        }
        Ok(())
    }

    fn crash(&mut self, seed: u64, tear: bool) {
        let mut rng = SmallRng::seed_from_u64(seed);
        self.life += 1;
        self.locked = None;
        self.power_ends = None;
        let keep = if tear {
            rng.random_range(0..=self.changes.len())
        } else {
            0
        };
        let mut names = self.durable_names.clone();
        for change in self.changes.drain(..).take(keep) {
            match change {
                NameChange::Set(name, inode) => drop(names.insert(name, inode)),
                NameChange::Gone(name) => drop(names.remove(&name)),
            }
        }
        self.names.clone_from(&names);
        self.durable_names = names;
        let live: BTreeSet<u64> = self.names.values().copied().collect();
        self.inodes.retain(|id, _| live.contains(id));
        for inode in self.inodes.values_mut() {
            inode.crash(tear.then_some(&mut rng));
        }
        let lost = tear && rng.random_bool(0.2);
        let applied = tear && rng.random_bool(0.5);
        let crashed = self.catalog.crashed(applied);
        self.catalog = if lost { MemCatalog::default() } else { crashed };
    }

    fn set(&mut self, name: &str, inode: u64) {
        self.names.insert(name.to_owned(), inode);
        self.changes.push(NameChange::Set(name.to_owned(), inode));
    }
}

fn resize(image: &mut Vec<u8>, len: usize) {
    image.resize(len, 0);
}

impl Inode {
    fn touch(&mut self, from: usize, to: usize) {
        self.dirty
            .extend(from / SECTOR..to.div_ceil(SECTOR).max(from / SECTOR + 1));
    }

    /// Makes durable what was written since the last sync, and nothing that an earlier sync failed to.
    fn sync(&mut self) {
        resize(&mut self.durable, self.written.len());
        for sector in &self.dirty {
            let from = sector * SECTOR;
            let to = (from + SECTOR).min(self.written.len());
            if let (Some(bytes), Some(target)) =
                (self.written.get(from..to), self.durable.get_mut(from..to))
            {
                target.copy_from_slice(bytes);
            }
        }
    }

    fn crash(&mut self, mut tear: Option<&mut SmallRng>) {
        if let Some(rng) = tear.as_mut() {
            // A prefix, or any subset, of the sectors not synced reached the platter.
            let prefix = rng
                .random_bool(0.5)
                .then(|| rng.random_range(0..=self.dirty.len()));
            for (n, sector) in std::mem::take(&mut self.dirty).into_iter().enumerate() {
                let kept = prefix.map_or_else(|| rng.random_bool(0.5), |count| n < count);
                let from = sector * SECTOR;
                let to = (from + SECTOR).min(self.written.len());
                if let (true, Some(bytes)) = (kept, self.written.get(from..to)) {
                    if self.durable.len() < to {
                        resize(&mut self.durable, to);
                    }
                    if let Some(target) = self.durable.get_mut(from..to) {
                        target.copy_from_slice(bytes);
                    }
                }
            }
        }
        self.dirty.clear();
        self.written.clone_from(&self.durable);
    }
}

impl MemDisk {
    /// An empty disk with plenty of room.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(State {
            free: 1 << 40,
            ..State::default()
        })))
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Loses power: what was not synced is gone, or (with `tear`) a random part of it is kept. Whoever has the
    /// directory open can do nothing any more.
    pub fn crash(&self, seed: u64, tear: bool) {
        self.with(|state| state.crash(seed, tear));
    }

    /// Loses power, as [`MemDisk::crash`], in place of the first write or sync after `operations` more of them.
    pub fn crash_after(&self, operations: u64, seed: u64, tear: bool) {
        self.with(|state| {
            let at = state.writes + state.syncs + operations;
            state.power_ends = Some((at, seed, tear));
        });
    }

    /// The process that has the directory open dies: it can do nothing any more, but what it had written is there, though not
    /// durable before the next owner syncs it. Of the catalog only what was flushed is left, or (with `catalog`) all of it.
    pub fn kill(&self, catalog: bool) {
        self.with(|state| {
            state.life += 1;
            state.locked = None;
            state.power_ends = None;
            state.catalog = state.catalog.crashed(catalog);
        });
    }

    /// How often it was lost or left by its owner: see [`MemDisk::crash`] and [`MemDisk::kill`].
    pub fn lives(&self) -> u64 {
        self.with(|state| state.life)
    }

    /// From now on every operation takes up to `longest` of simulated time, drawn with `seed`.
    #[cfg(feature = "sim")]
    pub fn set_pace(&self, seed: u64, longest: std::time::Duration) {
        let rng = SmallRng::seed_from_u64(seed);
        self.with(|state| state.pace = Some(Pace { rng, longest }));
    }

    /// Fails the `n`-th write (creations, renames and removals count) from the disk's beginning, 1 the first;
    /// with `from_then_on` every later one too.
    pub fn fail_write(&self, n: u64, from_then_on: bool) {
        self.with(|state| state.fail_write = Some((n, from_then_on)));
    }

    /// Fails the `n`-th sync from the disk's beginning, 1 the first; with `from_then_on` every later one too.
    pub fn fail_sync(&self, n: u64, from_then_on: bool) {
        self.with(|state| state.fail_sync = Some((n, from_then_on)));
    }

    /// Makes every sync of a file wait until [`MemDisk::heal`], as a disk that has stopped answering.
    pub fn hold_sync(&self) {
        self.with(|state| state.hold = Some(Arc::default()));
    }

    /// No fault any more.
    pub fn heal(&self) {
        let hold = self.with(|state| {
            (state.fail_write, state.fail_sync, state.power_ends) = (None, None, None);
            state.hold.take()
        });
        if let Some(hold) = hold {
            *super::lock(&hold.released) = true;
            hold.changed.notify_all();
        }
    }

    /// Sets the free space that is reported, in bytes.
    pub fn set_free(&self, bytes: u64) {
        self.with(|state| state.free = bytes);
    }

    /// Writes (with creations, renames and removals) and syncs so far.
    pub fn counts(&self) -> (u64, u64) {
        self.with(|state| (state.writes, state.syncs))
    }

    /// The files with their lengths in bytes, sorted.
    pub fn files(&self) -> Vec<(String, usize)> {
        self.with(|state| {
            let length = |inode| {
                state
                    .inodes
                    .get(inode)
                    .map_or(0, |inode| inode.written.len())
            };
            state
                .names
                .iter()
                .map(|(name, inode)| (name.clone(), length(inode)))
                .collect()
        })
    }

    /// Flips one bit of a file, as rot does: in the durable image and in what is read. False when there is none.
    pub fn flip(&self, path: &str, bit: usize) -> bool {
        self.with(|state| {
            let Some(inode) = state
                .names
                .get(path)
                .and_then(|id| state.inodes.get_mut(id))
            else {
                return false;
            };
            let mut done = false;
            for image in [&mut inode.written, &mut inode.durable] {
                if let Some(byte) = image.get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                    done = true;
                }
            }
            done
        })
    }

    /// Flips one bit of the `n`-th value of the catalog.
    pub fn flip_catalog(&self, n: usize, bit: usize) {
        self.with(|state| state.catalog.flip(n, bit));
    }

    /// Removes a file durably, as a careless hand does. False when there is none.
    pub fn lose(&self, path: &str) -> bool {
        self.with(|state| {
            state.durable_names.remove(path);
            state.names.remove(path).is_some()
        })
    }

    /// Throws the catalog away.
    pub fn lose_catalog(&self) {
        self.with(|state| state.catalog = MemCatalog::default());
    }

    /// What puts the catalog of a disk back to what it is now.
    pub fn save_catalog(&self) -> impl Fn(&MemDisk) + 'static {
        let copy = self.with(|state| state.catalog.crashed(true));
        move |disk| disk.with(|state| state.catalog = copy.crashed(true))
    }

    /// A copy of the whole disk as it is now.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        self.with(|state| {
            Self(Arc::new(Mutex::new(State {
                inodes: state.inodes.clone(),
                names: state.names.clone(),
                durable_names: state.durable_names.clone(),
                dirs: state.dirs.clone(),
                changes: state.changes.clone(),
                next: state.next,
                catalog: state.catalog.crashed(true),
                free: state.free,
                ..State::default()
            })))
        })
    }

    fn file(&self, inode: u64) -> Arc<dyn DiskFile> {
        let life = self.with(|state| state.life);
        Arc::new(MemFile {
            disk: self.clone(),
            inode,
            life,
        })
    }
}

#[derive(Debug)]
struct MemLock(Arc<AtomicBool>);

impl Drop for MemLock {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// One power-on of a disk: operations through it fail after a crash.
#[derive(Debug)]
pub(super) struct Powered {
    disk: MemDisk,
    life: u64,
}

impl Powered {
    pub(super) fn new(disk: &MemDisk) -> Self {
        Self {
            disk: disk.clone(),
            life: disk.with(|state| state.life),
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        self.disk.with(|state| {
            if state.life == self.life {
                work(state)
            } else {
                Err(dead())
            }
        })
    }
}

impl Disk for Powered {
    fn create_root(&self) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self) -> io::Result<Option<Lock>> {
        self.with(|state| {
            if state
                .locked
                .as_ref()
                .is_some_and(|held| held.load(Ordering::Acquire))
            {
                return Ok(None);
            }
            let held = Arc::new(AtomicBool::new(true));
            state.locked = Some(held.clone());
            Ok(Some(Box::new(MemLock(held)) as Lock))
        })
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        // Directories are durable at once: only their entries are interesting.
        self.with(|state| {
            state.count_write()?;
            state.dirs.insert(path.to_owned());
            Ok(())
        })
    }

    fn list(&self, path: &str) -> io::Result<Option<Vec<String>>> {
        self.with(|state| {
            if !path.is_empty() && !state.dirs.contains(path) {
                return Ok(None);
            }
            let prefix = if path.is_empty() {
                String::new()
            } else {
                format!("{path}/")
            };
            let inside = state
                .names
                .keys()
                .filter_map(|name| name.strip_prefix(&prefix));
            Ok(Some(
                inside
                    .filter(|name| !name.contains('/'))
                    .map(str::to_owned)
                    .collect(),
            ))
        })
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        let inode = self.with(|state| {
            state
                .names
                .get(path)
                .copied()
                .ok_or_else(|| io::ErrorKind::NotFound.into())
        })?;
        Ok(self.disk.file(inode))
    }

    fn create(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        let inode = self.with(|state| {
            state.count_write()?;
            if let Some(id) = state.names.get(path).copied() {
                if let Some(inode) = state.inodes.get_mut(&id) {
                    let len = inode.written.len();
                    inode.written.clear();
                    inode.touch(0, len);
                }
                return Ok(id);
            }
            state.next += 1;
            let inode = state.next;
            state.inodes.insert(inode, Inode::default());
            state.set(path, inode);
            Ok(inode)
        })?;
        Ok(self.disk.file(inode))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.with(|state| {
            state.count_write()?;
            let inode = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            // Both halves of a rename are one change to the directory; keeping the old name too loses nothing.
            state.set(to, inode);
            state.changes.push(NameChange::Gone(from.to_owned()));
            Ok(())
        })
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.with(|state| {
            state.count_write()?;
            state.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
            state.changes.push(NameChange::Gone(path.to_owned()));
            Ok(())
        })
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.with(|state| {
            state.count_sync()?;
            let prefix = if path.is_empty() {
                String::new()
            } else {
                format!("{path}/")
            };
            let inside = |name: &str| {
                name.strip_prefix(&prefix)
                    .is_some_and(|rest| !rest.contains('/'))
            };
            let (now, later): (Vec<_>, Vec<_>) = state.changes.drain(..).partition(|change| {
                let (NameChange::Set(name, _) | NameChange::Gone(name)) = change;
                inside(name)
            });
            for change in now {
                match change {
                    NameChange::Set(name, inode) => drop(state.durable_names.insert(name, inode)),
                    NameChange::Gone(name) => drop(state.durable_names.remove(&name)),
                }
            }
            state.changes = later;
            Ok(())
        })
    }

    fn free(&self) -> io::Result<u64> {
        self.with(|state| Ok(state.free))
    }

    fn open_catalog(&self, _cache_bytes: u64) -> Result<Arc<dyn Catalog>, CatalogError> {
        let catalog = self.with(|state| Ok(state.catalog.clone()));
        Ok(Arc::new(
            catalog.map_err(|error| CatalogError(error.to_string()))?,
        ))
    }

    fn remove_catalog(&self) -> io::Result<()> {
        self.with(|state| {
            state.catalog = MemCatalog::default();
            Ok(())
        })
    }

    #[cfg(feature = "sim")]
    fn pace(&self) -> std::time::Duration {
        self.disk.with(|state| {
            state.pace.as_mut().map_or_else(Default::default, |pace| {
                pace.longest.mul_f64(pace.rng.random_range(0.0..1.0))
            })
        })
    }
}

#[derive(Debug)]
struct MemFile {
    disk: MemDisk,
    inode: u64,
    life: u64,
}

impl MemFile {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        self.disk.with(|state| {
            if state.life == self.life {
                work(state)
            } else {
                Err(dead())
            }
        })
    }

    fn inode<T>(&self, work: impl FnOnce(&mut Inode) -> T) -> io::Result<T> {
        self.with(|state| Ok(work(state.inodes.get_mut(&self.inode).ok_or_else(dead)?)))
    }
}

impl DiskFile for MemFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inode(|inode| {
            let from = usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .min(inode.written.len());
            let bytes = inode.written.get(from..).unwrap_or_default();
            let count = bytes.len().min(buffer.len());
            if let (Some(to), Some(from)) = (buffer.get_mut(..count), bytes.get(..count)) {
                to.copy_from_slice(from);
            }
            count
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(State::count_write)?;
        self.inode(|inode| {
            let from = usize::try_from(offset).unwrap_or(usize::MAX);
            let to = from + bytes.len();
            let old = inode.written.len();
            if old < to {
                resize(&mut inode.written, to);
            }
            if let Some(target) = inode.written.get_mut(from..to) {
                target.copy_from_slice(bytes);
            }
            inode.touch(from.min(old), to);
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(State::count_write)?;
        self.inode(|inode| {
            let old = inode.written.len();
            let new = usize::try_from(len).unwrap_or(usize::MAX);
            resize(&mut inode.written, new);
            inode.touch(old.min(new), old.max(new));
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.inode(|inode| inode.written.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let failed = self.with(State::count_sync);
        let hold = self.disk.with(|state| state.hold.clone());
        if let Some(hold) = hold {
            let released = super::lock(&hold.released);
            let waited = hold.changed.wait_while(released, |released| !*released);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
        self.inode(|inode| {
            if failed.is_ok() {
                inode.sync();
            }
            // After a failure too: the pages count as clean, and no later sync will write them.
            inode.dirty.clear();
        })?;
        failed
    }
}
