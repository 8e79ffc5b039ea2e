//! What is kept of one directory: an undo log per inode, and the names that were taken.
//!
//! Owns the logs, in memory and in the side directory, and the numbers of the control page. One lock is held from the note of a change to its
//! deed, so that the logs have the order of what was done.

use std::collections::HashMap;
use std::ffi::c_int;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::format::{self, kind, word};
use crate::real::*;

/// An undo log under way.
pub(crate) struct Log {
    fd: c_int,
    /// The sequence numbers not known to be durable, and whether each has a saved file.
    pending: Vec<(u64, u64)>,
}

pub(crate) struct Shared {
    pub(crate) root: PathBuf,
    side: PathBuf,
    pub(crate) control: &'static [AtomicU64],
    logs: Mutex<HashMap<u64, Log>>,
}

pub(crate) fn shared() -> Option<&'static Shared> {
    static SHARED: OnceLock<Option<Shared>> = OnceLock::new();
    SHARED.get_or_init(set_up).as_ref()
}

/// Calls none of the functions this library stands in for: they would come back here.
pub(crate) fn set_up() -> Option<Shared> {
    let root = PathBuf::from(std::env::var_os(format::ROOT_VARIABLE)?);
    let side = PathBuf::from(std::env::var_os(format::SIDE_VARIABLE)?);
    let fd = open_plain(&side.join(format::CONTROL), O_RDWR);
    if fd < 0 {
        die("the control page cannot be opened");
    }
    // SAFETY: a new mapping (read and write, shared) of a file that its creator gave this length; never unmapped
    let page = unsafe { mmap64(std::ptr::null_mut(), format::CONTROL_BYTES, 3, 1, fd, 0) };
    if page as isize == -1 {
        die("the control page cannot be mapped");
    }
    // SAFETY: as above; the page is aligned, and is read and written as atomic numbers only
    let control = unsafe { std::slice::from_raw_parts(page.cast::<AtomicU64>(), word::COUNT) };
    if control[word::MAGIC].load(Ordering::Relaxed) != format::MAGIC {
        die("the control page is not one");
    }
    Some(Shared {
        root,
        side,
        control,
        logs: Mutex::default(),
    })
}

impl Shared {
    pub(crate) fn has(&self, path: &Path) -> bool {
        path.starts_with(&self.root)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, HashMap<u64, Log>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count(&self, word: usize) {
        self.control[word].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn relative<'a>(&self, path: &'a Path) -> &'a [u8] {
        path.strip_prefix(&self.root)
            .unwrap_or(path)
            .as_os_str()
            .as_bytes()
    }

    pub(crate) fn saved(&self, sequence: u64) -> PathBuf {
        self.side.join(format::SAVED).join(sequence.to_string())
    }

    /// The log of an inode, with what an earlier process left in it.
    pub(crate) fn log<'a>(&self, logs: &'a mut HashMap<u64, Log>, inode: u64) -> &'a mut Log {
        logs.entry(inode).or_insert_with(|| {
            let path = self.side.join(format::UNDO).join(inode.to_string());
            let fd = open_plain(&path, O_RDWR | O_CREAT | O_APPEND);
            let file = borrowed(fd);
            let len = file.metadata().map_or(0, |meta| meta.len());
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            if fd < 0 || file.read_exact_at(&mut bytes, 0).is_err() {
                die("an undo log cannot be read");
            }
            let (entries, whole) = format::pending(&bytes);
            cut(fd, whole as u64);
            let saved = |entry: &format::Entry| {
                matches!(entry.kind, kind::UNLINK | kind::RENAME)
                    .then_some(entry.a)
                    .unwrap_or(0)
            };
            Log {
                fd,
                pending: entries
                    .iter()
                    .map(|entry| (entry.sequence, saved(entry)))
                    .collect(),
            }
        })
    }

    /// Notes what undoes the next change, before it is made; gives its sequence number.
    pub(crate) fn note(
        &self,
        logs: &mut HashMap<u64, Log>,
        inode: u64,
        kind: u64,
        abc: [u64; 3],
        payload: &[u8],
    ) -> u64 {
        let sequence = self.next();
        self.note_as(logs, inode, sequence, kind, abc, payload);
        sequence
    }

    pub(crate) fn next(&self) -> u64 {
        self.control[word::SEQUENCE].fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn note_as(
        &self,
        logs: &mut HashMap<u64, Log>,
        inode: u64,
        sequence: u64,
        kind: u64,
        abc: [u64; 3],
        payload: &[u8],
    ) {
        let log = self.log(logs, inode);
        append(
            log.fd,
            &format::head(kind, sequence, abc, payload.len()),
            payload,
        );
        let saved = if matches!(kind, kind::UNLINK | kind::RENAME) {
            abc[0]
        } else {
            0
        };
        log.pending.push((sequence, saved));
    }

    /// What was done to an inode up to `sequence` is durable.
    pub(crate) fn synced(&self, logs: &mut HashMap<u64, Log>, inode: u64, sequence: u64) {
        let log = self.log(logs, inode);
        let (durable, left): (Vec<_>, Vec<_>) =
            log.pending.iter().partition(|(one, _)| *one <= sequence);
        log.pending = left;
        if log.pending.is_empty() {
            cut(log.fd, 0);
        } else {
            append(
                log.fd,
                &format::head(kind::SYNCED, 0, [sequence, 0, 0], 0),
                &[],
            );
        }
        for (sequence, inode) in durable.into_iter().filter(|(_, inode)| *inode != 0) {
            let path = self.saved(sequence);
            // The last name of the file is about to go, and its number may be given to another one.
            if std::fs::metadata(&path).is_ok_and(|meta| meta.nlink() == 1) {
                self.forget(logs, inode);
            }
            remove_plain(&path);
        }
    }

    pub(crate) fn forget(&self, logs: &mut HashMap<u64, Log>, inode: u64) {
        if let Some(log) = logs.remove(&inode) {
            // SAFETY: this library's own descriptor
            unsafe { real!(close(c_int) -> c_int)(log.fd) };
        }
        remove_plain(&self.side.join(format::UNDO).join(inode.to_string()));
    }

    /// Keeps the file at `path` under a name of its own; gives its inode, 0 when there is none.
    pub(crate) fn save(&self, path: &Path, sequence: u64) -> u64 {
        let Ok(meta) = std::fs::symlink_metadata(path) else {
            return 0;
        };
        let (from, to) = (c_path(path), c_path(&self.saved(sequence)));
        // SAFETY: valid strings
        if meta.is_dir()
            || unsafe { linkat(AT_FDCWD, from.as_ptr(), AT_FDCWD, to.as_ptr(), 0) } != 0
        {
            return 0;
        }
        meta.ino()
    }

    pub(crate) fn parent(&self, path: &Path) -> Option<u64> {
        std::fs::metadata(path.parent()?)
            .ok()
            .map(|meta| meta.ino())
    }

    /// Takes `bytes` from the free space that is left; gives those that could not be had.
    pub(crate) fn take_space(&self, bytes: u64) -> u64 {
        let mut short = 0;
        let take = |free: u64| {
            short = if free == u64::MAX {
                0
            } else {
                bytes.saturating_sub(free)
            };
            (free != u64::MAX).then(|| free.saturating_sub(bytes))
        };
        // `Err` says that there is no limit.
        self.control[word::FREE]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .ok();
        short
    }

    pub(crate) fn give_space(&self, bytes: u64) {
        let give =
            |free: u64| (free != u64::MAX).then(|| free.saturating_add(bytes).min(u64::MAX - 1));
        self.control[word::FREE]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, give)
            .ok();
    }

    /// Whether this is the sync that is to fail.
    pub(crate) fn sync_fails(&self) -> bool {
        let count = |left: u64| left.checked_sub(1);
        let before =
            self.control[word::FAIL_SYNC].fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        before == Ok(1)
    }

    /// Takes back everything of a file that is not durable, as a kernel that drops the pages it could not write.
    pub(crate) fn drop_pending(&self, logs: &mut HashMap<u64, Log>, inode: u64, fd: c_int) {
        let log = self.log(logs, inode);
        let file = borrowed(log.fd);
        let len = file.metadata().map_or(0, |meta| meta.len());
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        // Opened again: what was synced may be open for appending or reading alone.
        let again = open_plain(Path::new(&format!("/proc/self/fd/{fd}")), O_WRONLY);
        if again < 0 || file.read_exact_at(&mut bytes, 0).is_err() {
            die("what was not synced cannot be taken back");
        }
        for entry in format::pending(&bytes).0.iter().rev() {
            let old = &bytes[entry.payload.clone()];
            if entry.kind == kind::WRITE || entry.kind == kind::LENGTH {
                put(again, old, entry.a);
                cut(again, entry.c);
            }
        }
        let log = self.log(logs, inode);
        log.pending.clear();
        cut(log.fd, 0);
        // SAFETY: opened above
        unsafe { real!(close(c_int) -> c_int)(again) };
    }

    /// Notes what a write of `len` bytes at `offset` will overwrite; gives how many bytes of it the disk still takes.
    pub(crate) fn before_write(
        &self,
        logs: &mut HashMap<u64, Log>,
        fd: c_int,
        offset: u64,
        len: usize,
    ) -> Result<usize, c_int> {
        let file = borrowed(fd);
        let meta = file.metadata().map_err(|_| EIO)?;
        if !meta.is_file() {
            die("what is taken for a file below the root is none");
        }
        self.count(word::WRITES);
        let size = meta.size();
        let end = offset.saturating_add(len as u64);
        let grows = end.saturating_sub(size.min(meta.blocks().saturating_mul(512)).max(offset));
        let short = self.take_space(grows);
        let allowed = len.saturating_sub(usize::try_from(short).unwrap_or(len));
        if short > 0 {
            self.count(word::REFUSED);
        }
        if len > 0 && allowed == 0 {
            return Err(ENOSPC);
        }
        let kept = usize::try_from(end.min(size).saturating_sub(offset)).unwrap_or(0);
        let mut old = vec![0; kept];
        if kept > 0 && self.read_back(fd, &mut old, offset).is_err() {
            return Err(EIO);
        }
        self.note(
            logs,
            meta.ino(),
            kind::WRITE,
            [offset, allowed as u64, size],
            &old,
        );
        Ok(allowed)
    }

    /// Reads through a descriptor that may be open for writing alone.
    pub(crate) fn read_back(&self, fd: c_int, to: &mut [u8], offset: u64) -> std::io::Result<()> {
        if borrowed(fd).read_exact_at(to, offset).is_ok() {
            return Ok(());
        }
        let again = open_plain(Path::new(&format!("/proc/self/fd/{fd}")), 0);
        let result = borrowed(again).read_exact_at(to, offset);
        // SAFETY: opened above
        unsafe { real!(close(c_int) -> c_int)(again) };
        result
    }

    pub(crate) fn set_length(&self, logs: &mut HashMap<u64, Log>, fd: c_int, len: u64) -> c_int {
        let Ok(meta) = borrowed(fd).metadata() else {
            return fail(EIO);
        };
        let mut old = vec![0; usize::try_from(meta.size().saturating_sub(len)).unwrap_or(0)];
        if !old.is_empty() && self.read_back(fd, &mut old, len).is_err() {
            return fail(EIO);
        }
        self.give_space(old.len() as u64);
        self.note(logs, meta.ino(), kind::LENGTH, [len, 0, meta.size()], &old);
        cut(fd, len)
    }
}
