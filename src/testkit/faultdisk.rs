//! A directory of another process whose disk can lose power, fill up, fail and slow down, without root (Linux with glibc).
//!
//! Owns one directory's side files: the library that the process must be started with, the control page it reads, and the undo logs it
//! writes. What the library does is in `faultfs/`; the layout of what the two share is [`format`].
//!
//! ```text
//! let disk = FaultDisk::create(&data, &side)?;       // `side`: beside `data`, on the same file system
//! command.envs(disk.environment());                  // any program that uses the C library for its files
//! … child.kill() …                                    // SIGKILL
//! disk.lose_power(seed)?;                            // what it had not synced is gone, or torn
//! ```

#[allow(dead_code, unreachable_pub)] // shared with the library, which uses the other half of it
#[allow(clippy::cast_possible_truncation)] // byte by byte
#[path = "../../faultfs/src/format.rs"]
mod format;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use format::{Entry, kind, word};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

/// Empty where it cannot be built.
const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/faultfs.so"));

/// Bytes that a disk writes as one.
const SECTOR: u64 = 512;

/// The disk below one directory.
#[derive(Debug)]
pub struct FaultDisk {
    root: PathBuf,
    side: PathBuf,
    control: File,
}

/// What the library has seen and done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DiskCounts {
    /// Calls that wrote.
    pub writes: u64,
    /// Syncs that succeeded.
    pub syncs: u64,
    /// Syncs that were made to fail.
    pub syncs_failed: u64,
    /// Writes that were refused, wholly or in part, for want of space.
    pub writes_refused: u64,
}

/// How much of what was not synced a loss of power takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// All of it.
    Everything,
    /// What came after some moment.
    Tail,
    /// Of the files' contents, some sectors and lengths, each by itself; of the names, what came after some moment.
    Torn,
}

/// What a loss of power took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// How it was chosen.
    pub loss: Loss,
    /// Writes, and changes of length, that were not synced.
    pub writes_pending: usize,
    /// Those of them that were taken back, wholly or in part.
    pub writes_lost: usize,
    /// Names created, changed and removed in directories that were not synced.
    pub names_pending: usize,
    /// Those of them that were taken back.
    pub names_lost: usize,
}

/// One file's pending changes, oldest first, and the log their payloads lie in.
struct Pending {
    log: Vec<u8>,
    entries: Vec<Entry>,
}

impl Pending {
    fn payload(&self, entry: &Entry) -> &[u8] {
        self.log.get(entry.payload.clone()).unwrap_or_default()
    }
}

impl FaultDisk {
    /// Whether this build has the library.
    pub fn is_available() -> bool {
        !LIBRARY.is_empty()
    }

    /// The disk below `root`, with its side files in `side`; both are created. `side` is not below `root`, on the same file system, and
    /// no other disk's. What is below `root` already counts as durable.
    ///
    /// # Errors
    /// `Unsupported` where there is no library; what the file system says.
    pub fn create(root: &Path, side: &Path) -> io::Result<Self> {
        if !Self::is_available() {
            let why = "this program was built without the library for disk faults, which needs Linux with glibc on 64 bits";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        fs::create_dir_all(root)?;
        fs::create_dir_all(side)?;
        let (root, side) = (root.canonicalize()?, side.canonicalize()?);
        if side.starts_with(&root) {
            let why = "the side files cannot lie below the directory they are about";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        fs::create_dir_all(side.join(format::UNDO))?;
        fs::create_dir_all(side.join(format::SAVED))?;
        fs::write(side.join("faultfs.so"), LIBRARY)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let control = options.open(side.join(format::CONTROL))?;
        control.set_len(format::CONTROL_BYTES as u64)?;
        let disk = Self {
            root,
            side,
            control,
        };
        disk.set(word::FREE, u64::MAX)?;
        disk.set(word::MAGIC, format::MAGIC)?;
        Ok(disk)
    }

    /// The environment of the process whose disk this is.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        vec![
            ("LD_PRELOAD", self.side.join("faultfs.so").into()),
            (format::ROOT_VARIABLE, self.root.clone().into()),
            (format::SIDE_VARIABLE, self.side.clone().into()),
        ]
    }

    fn set(&self, word: usize, number: u64) -> io::Result<()> {
        let at = u64::try_from(word * 8).unwrap_or(u64::MAX);
        self.control.write_all_at(&format::u64_bytes(number), at)
    }

    fn get(&self, word: usize) -> io::Result<u64> {
        let mut bytes = [0; 8];
        let at = u64::try_from(word * 8).unwrap_or(u64::MAX);
        self.control.read_exact_at(&mut bytes, at)?;
        Ok(format::u64_from(&bytes))
    }

    /// Leaves room for `bytes` more; `None`: as much as the real disk has. What is asked for the free space is told the same.
    pub fn limit_free(&self, bytes: Option<u64>) -> io::Result<()> {
        self.set(word::FREE, bytes.unwrap_or(u64::MAX))
    }

    /// Makes the `nth` sync from now fail, counted from 1, with an input/output error; what it should have made durable is gone
    /// from its file. 0: none.
    pub fn fail_sync(&self, nth: u64) -> io::Result<()> {
        self.set(word::FAIL_SYNC, nth)
    }

    /// Which file's sync was made to fail last, below the root; `None` when none was, or it is gone.
    pub fn failed_sync(&self) -> io::Result<Option<PathBuf>> {
        let inode = self.get(word::FAILED_INODE)?;
        let path = self.paths()?.remove(&inode);
        let path = path.and_then(|path| path.strip_prefix(&self.root).map(Path::to_owned).ok());
        Ok(path)
    }

    /// Makes every sync last longer by `time`.
    pub fn delay_syncs(&self, time: Duration) -> io::Result<()> {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.set(word::SYNC_DELAY, micros)
    }

    /// A disk that lies: from now on syncs succeed and make nothing durable. No store survives that with a loss of power, so it shows
    /// whether a test would notice.
    pub fn ignore_syncs(&self, ignore: bool) -> io::Result<()> {
        self.set(word::LIE, u64::from(ignore))
    }

    /// What the library has seen and done since the disk was created.
    pub fn counts(&self) -> io::Result<DiskCounts> {
        Ok(DiskCounts {
            writes: self.get(word::WRITES)?,
            syncs: self.get(word::SYNCS)?,
            syncs_failed: self.get(word::SYNCS_FAILED)?,
            writes_refused: self.get(word::REFUSED)?,
        })
    }

    /// Takes back what was not synced, as chosen by `seed`; what is left is durable. The process must have been killed before: one that
    /// lives would go on with what it remembers.
    pub fn lose_power(&self, seed: u64) -> io::Result<Lost> {
        let mut chance = StdRng::seed_from_u64(seed);
        let loss = match chance.random_range(0..4) {
            0 => Loss::Everything,
            1 => Loss::Tail,
            _ => Loss::Torn,
        };
        self.lose(loss, &mut chance)
    }

    /// The same with the loss chosen, and the seed for what is left to chance in it.
    pub fn lose_power_as(&self, loss: Loss, seed: u64) -> io::Result<Lost> {
        self.lose(loss, &mut StdRng::seed_from_u64(seed))
    }

    fn lose(&self, loss: Loss, chance: &mut StdRng) -> io::Result<Lost> {
        let mut files = BTreeMap::new();
        let mut names = BTreeMap::new();
        for (inode, pending) in self.undo_logs()? {
            let of_names = |entry: &Entry| !matches!(entry.kind, kind::WRITE | kind::LENGTH);
            if pending.entries.iter().any(of_names) {
                for entry in &pending.entries {
                    let payload = pending.payload(entry).to_vec();
                    names.insert(entry.sequence, (entry.clone(), payload));
                }
            } else if !pending.entries.is_empty() {
                files.insert(inode, pending);
            }
        }
        let writes = files.values().flat_map(|one| &one.entries);
        let mut moments: Vec<u64> = writes.map(|entry| entry.sequence).collect();
        let writes_pending = moments.len();
        moments.extend(names.keys());
        moments.sort_unstable();
        // The last moment that is kept.
        let cut = match loss {
            Loss::Everything => 0,
            Loss::Tail | Loss::Torn => {
                let kept = chance.random_range(0..=moments.len());
                kept.checked_sub(1)
                    .and_then(|last| moments.get(last).copied())
                    .unwrap_or(0)
            }
        };
        // Contents first, wherever the files lie now; then the names, backwards.
        let paths = self.paths()?;
        let mut writes_lost = 0;
        for (inode, pending) in &files {
            if let Some(path) = paths.get(inode) {
                let file = OpenOptions::new().read(true).write(true).open(path)?;
                writes_lost += match loss {
                    Loss::Torn => tear(&file, pending, chance)?,
                    Loss::Everything | Loss::Tail => take_back(&file, pending, cut)?,
                };
            }
        }
        let mut names_lost = 0;
        for (sequence, (entry, payload)) in names.iter().rev().filter(|(at, _)| **at > cut) {
            self.undo_name(*sequence, entry, payload)?;
            names_lost += 1;
        }
        self.clear()?;
        Ok(Lost {
            loss,
            writes_pending,
            writes_lost,
            names_pending: names.len(),
            names_lost,
        })
    }

    fn undo_logs(&self) -> io::Result<Vec<(u64, Pending)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.side.join(format::UNDO))? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(inode) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let log = fs::read(entry.path())?;
            let (entries, _) = format::pending(&log);
            found.push((inode, Pending { log, entries }));
        }
        // Chance is drawn in this order, which must not depend on the directory's.
        found.sort_by_key(|(_, pending)| pending.entries.first().map(|entry| entry.sequence));
        Ok(found)
    }

    /// Where each inode lies, below the root or among the files that lost their names.
    fn paths(&self) -> io::Result<BTreeMap<u64, PathBuf>> {
        let mut found = BTreeMap::new();
        let mut left = vec![self.root.clone(), self.side.join(format::SAVED)];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                let meta = entry.metadata()?;
                if meta.is_dir() {
                    left.push(entry.path());
                } else if meta.is_file() {
                    found.insert(meta.ino(), entry.path());
                }
            }
        }
        Ok(found)
    }

    fn undo_name(&self, sequence: u64, entry: &Entry, payload: &[u8]) -> io::Result<()> {
        let place = |bytes: &[u8]| {
            let path = std::str::from_utf8(bytes).map_err(io::Error::other)?;
            io::Result::Ok(self.root.join(path))
        };
        let saved = self.side.join(format::SAVED).join(sequence.to_string());
        let gone = |result: io::Result<()>| match result {
            // A process that was killed between the note and the deed has not done it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        match entry.kind {
            kind::CREATE => gone(fs::remove_file(place(payload)?)),
            // What is in a directory is lost with it.
            kind::MKDIR => gone(fs::remove_dir_all(place(payload)?)),
            kind::RMDIR => fs::create_dir_all(place(payload)?),
            kind::UNLINK => {
                let path = place(payload)?;
                if path.exists() {
                    return Ok(());
                }
                // Its directory may be durably gone by now.
                gone(fs::rename(saved, path))
            }
            kind::RENAME => {
                let mut names = payload.splitn(2, |byte| *byte == 0);
                let from = place(names.next().unwrap_or_default())?;
                let to = place(names.next().unwrap_or_default())?;
                if from.exists() {
                    return Ok(());
                }
                gone(fs::rename(&to, from))?;
                if entry.a == 0 {
                    return Ok(());
                }
                gone(fs::rename(saved, to))
            }
            _ => Ok(()),
        }
    }

    /// Forgets what could be taken back: what is there now is durable. The process must not run: another disk was put in.
    pub fn forget(&self) -> io::Result<()> {
        self.clear()
    }

    fn clear(&self) -> io::Result<()> {
        for directory in [format::UNDO, format::SAVED] {
            let directory = self.side.join(directory);
            fs::remove_dir_all(&directory)?;
            fs::create_dir(&directory)?;
        }
        Ok(())
    }
}

/// Takes back what came after `cut`; how many changes.
fn take_back(file: &File, pending: &Pending, cut: u64) -> io::Result<usize> {
    let mut lost = 0;
    for entry in pending
        .entries
        .iter()
        .rev()
        .filter(|one| one.sequence > cut)
    {
        file.write_all_at(pending.payload(entry), entry.a)?;
        file.set_len(entry.c)?;
        lost += 1;
    }
    Ok(lost)
}

/// Takes back sectors: each keeps what it had at some moment of its own, and the file the length it had at some moment.
fn tear(file: &File, pending: &Pending, chance: &mut StdRng) -> io::Result<usize> {
    let count = pending.entries.len();
    let length_kept = chance.random_range(0..=count);
    let length = match pending.entries.get(length_kept) {
        // What a change found is what there was before it.
        Some(entry) => entry.c,
        None => file.metadata()?.len(),
    };
    // Half of all sectors keep everything, or a long row of them would hardly ever survive.
    let mut kept_of: BTreeMap<u64, usize> = BTreeMap::new();
    let mut lost = 0;
    for (at, entry) in pending.entries.iter().enumerate().rev() {
        let old = pending.payload(entry);
        let (from, to) = match entry.kind {
            kind::WRITE => (entry.a, entry.a.saturating_add(entry.b)),
            _ => (entry.a.min(entry.c), entry.a.max(entry.c)),
        };
        let mut any = false;
        let mut sector = from / SECTOR;
        // A hole that was made by a change of length has nothing to take back.
        let end = if entry.kind == kind::LENGTH {
            from + old.len() as u64
        } else {
            to
        };
        while sector * SECTOR < end {
            let kept = *kept_of.entry(sector).or_insert_with(|| {
                if chance.random_bool(0.5) {
                    count
                } else {
                    chance.random_range(0..=count)
                }
            });
            if at >= kept {
                any = true;
                let begin = (sector * SECTOR).max(from);
                let stop = ((sector + 1) * SECTOR).min(end);
                let bytes: Vec<u8> = (begin..stop)
                    .map(|place| {
                        let index = usize::try_from(place - from).unwrap_or(usize::MAX);
                        // Beyond the old end there was nothing, which reads as zeroes.
                        old.get(index).copied().unwrap_or(0)
                    })
                    .collect();
                file.write_all_at(&bytes, begin)?;
            }
            sector += 1;
        }
        lost += usize::from(any);
    }
    file.set_len(length)?;
    Ok(lost)
}
