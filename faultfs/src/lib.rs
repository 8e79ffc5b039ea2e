//! A library for `LD_PRELOAD` that makes the files below one directory lose power, fill up, fail and slow down, without root.
//!
//! Owns what stands between a process and the C library's calls on files: [`format`] says how it is told what to do and what it leaves
//! behind. It keeps what a power failure would take: before a file is changed, what was there goes to the file's undo log, and before a name
//! is changed, the name. A sync of that file, or of that directory, makes what came before it durable. The logs outlive SIGKILL; whoever
//! killed the process then takes back from them what was not synced (`testkit::FaultDisk::lose_power`).
//!
//! `sync_file_range` makes nothing durable, and neither does `sync`: the one by its own manual, the other because nobody should rely on it.
//! Not seen: memory maps, io_uring, hard and symbolic links, system calls made without the C library.
//!
//! This is the one place with `unsafe` code: to stand in for C functions is to be called by C's rules. Everything unsafe is a call of
//! the real function with the caller's own arguments, or the mapped control page. No dependencies; compiled by `build.rs`.

mod format;

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use format::{kind, word};

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn __errno_location() -> *mut c_int;
    fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64;
    fn mmap64(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        from: i64,
    ) -> *mut c_void;
    fn linkat(
        from_dir: c_int,
        from: *const c_char,
        to_dir: c_int,
        to: *const c_char,
        flags: c_int,
    ) -> c_int;
    fn dirfd(dir: *mut c_void) -> c_int;
    fn abort() -> !;
}

/// `RTLD_NEXT`
const NEXT: *mut c_void = -1_isize as *mut c_void;
const AT_FDCWD: c_int = -100;
const AT_REMOVEDIR: c_int = 0x200;
const O_WRONLY: c_int = 1;
const O_RDWR: c_int = 2;
const O_CREAT: c_int = 0o100;
const O_TRUNC: c_int = 0o1000;
const O_APPEND: c_int = 0o2000;
const O_CLOEXEC: c_int = 0o2_000_000;
const F_DUPFD: c_int = 0;
const F_GETFL: c_int = 3;
const F_DUPFD_CLOEXEC: c_int = 1030;
const EIO: c_int = 5;
const EINVAL: c_int = 22;
const ENOSPC: c_int = 28;

/// Part of a vectored write.
#[repr(C)]
pub struct Part {
    base: *const c_void,
    len: usize,
}

/// The address of the C library's own function, looked up once.
fn find(found: &AtomicUsize, name: &CStr) -> usize {
    let known = found.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    // SAFETY: a valid string
    let address = unsafe { dlsym(NEXT, name.as_ptr()) } as usize;
    if address == 0 {
        // SAFETY: it does not return
        unsafe { abort() };
    }
    found.store(address, Ordering::Relaxed);
    address
}

/// The C library's own function of a name. To be used in an unsafe block: the type is the user's word.
macro_rules! real {
    ($name:ident($($arg:ty),*) -> $out:ty) => {{
        static FOUND: AtomicUsize = AtomicUsize::new(0);
        let name = const { name_in(concat!(stringify!($name), "\0")) };
        std::mem::transmute::<usize, unsafe extern "C" fn($($arg),*) -> $out>(find(&FOUND, name))
    }};
}

const fn name_in(text: &str) -> &CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(name) => name,
        Err(_) => c"",
    }
}

/// The end of a process whose faults could not be injected: it must not look as if it had stood them.
fn die(why: &str) -> ! {
    let text = format!("faultfs: {why}\n");
    // SAFETY: standard error, a valid buffer; abort does not return
    unsafe {
        real!(write(c_int, *const c_void, usize) -> isize)(2, text.as_ptr().cast(), text.len());
        abort()
    }
}

fn fail(code: c_int) -> c_int {
    // SAFETY: the calling thread's own errno
    unsafe { *__errno_location() = code };
    -1
}

/// Which descriptors are files or directories below the root.
static WATCHED: [AtomicBool; 1 << 16] = [const { AtomicBool::new(false) }; 1 << 16];

fn watch(fd: c_int, watched: bool) {
    match usize::try_from(fd).ok().and_then(|fd| WATCHED.get(fd)) {
        Some(flag) => flag.store(watched, Ordering::Release),
        None if watched => die("a descriptor above 65535"),
        None => {}
    }
}

fn is_watched(fd: c_int) -> bool {
    let flag = usize::try_from(fd).ok().and_then(|fd| WATCHED.get(fd));
    flag.is_some_and(|flag| flag.load(Ordering::Acquire))
}

/// An undo log under way.
struct Log {
    fd: c_int,
    /// The sequence numbers not known to be durable, and whether each has a saved file.
    pending: Vec<(u64, u64)>,
}

struct Shared {
    root: PathBuf,
    side: PathBuf,
    control: &'static [AtomicU64],
    logs: Mutex<HashMap<u64, Log>>,
}

fn shared() -> Option<&'static Shared> {
    static SHARED: OnceLock<Option<Shared>> = OnceLock::new();
    SHARED.get_or_init(set_up).as_ref()
}

/// Calls none of the functions this library stands in for: they would come back here.
fn set_up() -> Option<Shared> {
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

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap_or_else(|_| die("a path with a zero byte"))
}

/// Opens a file of this library's own.
fn open_plain(path: &Path, flags: c_int) -> c_int {
    let path = c_path(path);
    // SAFETY: a valid string
    unsafe {
        real!(openat64(c_int, *const c_char, c_int, c_uint) -> c_int)(
            AT_FDCWD,
            path.as_ptr(),
            flags | O_CLOEXEC,
            0o644,
        )
    }
}

fn remove_plain(path: &Path) {
    let path = c_path(path);
    // SAFETY: a valid string
    unsafe { real!(unlink(*const c_char) -> c_int)(path.as_ptr()) };
}

/// A borrowed descriptor, for what `std` does without a function of this library.
fn borrowed(fd: c_int) -> ManuallyDrop<File> {
    // SAFETY: open during the call it is borrowed for, and not closed by its owner's drop
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

fn name_of(fd: c_int) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()
}

/// The absolute path of a call's path; `None` for what cannot be below the root.
///
/// # Safety
/// `path` is a valid string or null.
unsafe fn absolute(dir: c_int, path: *const c_char) -> Option<PathBuf> {
    if path.is_null() {
        return None;
    }
    // SAFETY: by this function's own condition
    let path = Path::new(OsStr::from_bytes(
        unsafe { CStr::from_ptr(path) }.to_bytes(),
    ));
    if path.is_absolute() {
        return Some(path.to_owned());
    }
    let base = if dir == AT_FDCWD {
        std::fs::read_link("/proc/self/cwd").ok()
    } else {
        name_of(dir)
    };
    Some(base?.join(path))
}

impl Shared {
    fn has(&self, path: &Path) -> bool {
        path.starts_with(&self.root)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Log>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, word: usize) {
        self.control[word].fetch_add(1, Ordering::Relaxed);
    }

    fn relative<'a>(&self, path: &'a Path) -> &'a [u8] {
        path.strip_prefix(&self.root)
            .unwrap_or(path)
            .as_os_str()
            .as_bytes()
    }

    fn saved(&self, sequence: u64) -> PathBuf {
        self.side.join(format::SAVED).join(sequence.to_string())
    }

    /// The log of an inode, with what an earlier process left in it.
    fn log<'a>(&self, logs: &'a mut HashMap<u64, Log>, inode: u64) -> &'a mut Log {
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
    fn note(
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

    fn next(&self) -> u64 {
        self.control[word::SEQUENCE].fetch_add(1, Ordering::Relaxed) + 1
    }

    fn note_as(
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
    fn synced(&self, logs: &mut HashMap<u64, Log>, inode: u64, sequence: u64) {
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

    fn forget(&self, logs: &mut HashMap<u64, Log>, inode: u64) {
        if let Some(log) = logs.remove(&inode) {
            // SAFETY: this library's own descriptor
            unsafe { real!(close(c_int) -> c_int)(log.fd) };
        }
        remove_plain(&self.side.join(format::UNDO).join(inode.to_string()));
    }

    /// Keeps the file at `path` under a name of its own; gives its inode, 0 when there is none.
    fn save(&self, path: &Path, sequence: u64) -> u64 {
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

    fn parent(&self, path: &Path) -> Option<u64> {
        std::fs::metadata(path.parent()?)
            .ok()
            .map(|meta| meta.ino())
    }

    /// Takes `bytes` from the free space that is left; gives those that could not be had.
    fn take_space(&self, bytes: u64) -> u64 {
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

    fn give_space(&self, bytes: u64) {
        let give =
            |free: u64| (free != u64::MAX).then(|| free.saturating_add(bytes).min(u64::MAX - 1));
        self.control[word::FREE]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, give)
            .ok();
    }

    /// Whether this is the sync that is to fail.
    fn sync_fails(&self) -> bool {
        let count = |left: u64| left.checked_sub(1);
        let before =
            self.control[word::FAIL_SYNC].fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        before == Ok(1)
    }

    /// Takes back everything of a file that is not durable, as a kernel that drops the pages it could not write.
    fn drop_pending(&self, logs: &mut HashMap<u64, Log>, inode: u64, fd: c_int) {
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
    fn before_write(
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
    fn read_back(&self, fd: c_int, to: &mut [u8], offset: u64) -> std::io::Result<()> {
        if borrowed(fd).read_exact_at(to, offset).is_ok() {
            return Ok(());
        }
        let again = open_plain(Path::new(&format!("/proc/self/fd/{fd}")), 0);
        let result = borrowed(again).read_exact_at(to, offset);
        // SAFETY: opened above
        unsafe { real!(close(c_int) -> c_int)(again) };
        result
    }

    fn set_length(&self, logs: &mut HashMap<u64, Log>, fd: c_int, len: u64) -> c_int {
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

fn cut(fd: c_int, len: u64) -> c_int {
    // SAFETY: numbers only
    unsafe { real!(ftruncate64(c_int, i64) -> c_int)(fd, len as i64) }
}

fn put(fd: c_int, mut bytes: &[u8], mut offset: u64) {
    while !bytes.is_empty() {
        // SAFETY: a valid buffer
        let done = unsafe {
            real!(pwrite64(c_int, *const c_void, usize, i64) -> isize)(
                fd,
                bytes.as_ptr().cast(),
                bytes.len(),
                offset as i64,
            )
        };
        let Some(done) = usize::try_from(done).ok().filter(|done| *done > 0) else {
            die("what was not synced cannot be taken back");
        };
        bytes = &bytes[done..];
        offset += done as u64;
    }
}

fn append(fd: c_int, head: &[u8], payload: &[u8]) {
    let record = [head, payload].concat();
    let mut left = record.as_slice();
    while !left.is_empty() {
        // SAFETY: a valid buffer
        let done = unsafe {
            real!(write(c_int, *const c_void, usize) -> isize)(fd, left.as_ptr().cast(), left.len())
        };
        let Some(done) = usize::try_from(done).ok().filter(|done| *done > 0) else {
            die("an undo log cannot be written");
        };
        left = &left[done..];
    }
}

/// Where a write without a position goes.
fn position(fd: c_int) -> u64 {
    // SAFETY: numbers only
    let flags = unsafe { real!(fcntl(c_int, c_int, usize) -> c_int)(fd, F_GETFL, 0) };
    if flags >= 0 && flags & O_APPEND != 0 {
        return borrowed(fd).metadata().map_or(0, |meta| meta.size());
    }
    // SAFETY: numbers only
    u64::try_from(unsafe { lseek64(fd, 0, 1) }).unwrap_or(0)
}

/// One write, with its undo record before it. `work` gets the bytes that are allowed.
fn write_through(
    fd: c_int,
    offset: Option<i64>,
    len: usize,
    whole_only: bool,
    work: impl FnOnce(usize) -> isize,
) -> isize {
    let Some(shared) = shared().filter(|_| is_watched(fd)) else {
        return work(len);
    };
    let mut logs = shared.lock();
    let offset = offset.map_or_else(|| position(fd), |offset| u64::try_from(offset).unwrap_or(0));
    match shared.before_write(&mut logs, fd, offset, len) {
        Ok(allowed) if allowed == len || !whole_only => work(allowed),
        Ok(_) => fail(ENOSPC) as isize,
        Err(code) => fail(code) as isize,
    }
}

/// # Safety
/// As of the C function of the same name; so for all below.
unsafe fn open_any(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    let open = |flags| unsafe {
        real!(openat64(c_int, *const c_char, c_int, c_uint) -> c_int)(dir, path, flags, mode)
    };
    // SAFETY: the caller's own path
    let place = shared().and_then(|shared| Some((shared, unsafe { absolute(dir, path) }?)));
    let Some((shared, path)) = place.filter(|(shared, path)| shared.has(path)) else {
        return open(flags);
    };
    if flags & (O_CREAT | O_TRUNC) == 0 {
        let fd = open(flags);
        if fd >= 0 {
            watch(fd, true);
        }
        return fd;
    }
    let mut logs = shared.lock();
    let existed = std::fs::symlink_metadata(&path).is_ok();
    let fd = open(flags & !O_TRUNC);
    if fd < 0 {
        return fd;
    }
    watch(fd, true);
    if existed && flags & O_TRUNC != 0 {
        shared.set_length(&mut logs, fd, 0);
    }
    if !existed {
        if let Ok(meta) = borrowed(fd).metadata() {
            shared.forget(&mut logs, meta.ino());
        }
        if let Some(parent) = shared.parent(&path) {
            shared.note(
                &mut logs,
                parent,
                kind::CREATE,
                [0; 3],
                shared.relative(&path),
            );
        }
    }
    fd
}

unsafe fn sync_any(fd: c_int, work: impl FnOnce() -> c_int) -> c_int {
    let Some(shared) = shared().filter(|_| is_watched(fd)) else {
        return work();
    };
    let Ok(meta) = borrowed(fd).metadata() else {
        return fail(EIO);
    };
    let sequence = {
        let mut logs = shared.lock();
        if shared.sync_fails() {
            if meta.is_file() {
                shared.drop_pending(&mut logs, meta.ino(), fd);
            }
            shared.control[word::FAILED_INODE].store(meta.ino(), Ordering::Relaxed);
            shared.count(word::SYNCS_FAILED);
            return fail(EIO);
        }
        // What is written from here on may be too late for this sync.
        shared.control[word::SEQUENCE].load(Ordering::Relaxed)
    };
    let delay = shared.control[word::SYNC_DELAY].load(Ordering::Relaxed);
    if delay > 0 {
        std::thread::sleep(Duration::from_micros(delay));
    }
    let result = work();
    if result == 0 {
        shared.synced(&mut shared.lock(), meta.ino(), sequence);
        shared.count(word::SYNCS);
    }
    result
}

/// A change of a name: `note` says what undoes it, before `work` does it.
unsafe fn named(
    dir: c_int,
    path: *const c_char,
    note: impl FnOnce(&Shared, &mut HashMap<u64, Log>, &Path, u64),
    work: impl FnOnce() -> c_int,
) -> c_int {
    // SAFETY: the caller's own path
    let place = shared().and_then(|shared| Some((shared, unsafe { absolute(dir, path) }?)));
    let Some((shared, path)) = place.filter(|(shared, path)| shared.has(path)) else {
        return work();
    };
    let mut logs = shared.lock();
    let Some(parent) = shared.parent(&path) else {
        return work();
    };
    note(shared, &mut logs, &path, parent);
    work()
}

unsafe fn unlink_any(dir: c_int, path: *const c_char, work: impl FnOnce() -> c_int) -> c_int {
    let note = |shared: &Shared, logs: &mut HashMap<u64, Log>, path: &Path, parent: u64| {
        let sequence = shared.next();
        let size =
            std::fs::symlink_metadata(path).map_or(0, |meta| meta.blocks().saturating_mul(512));
        let inode = shared.save(path, sequence);
        if inode != 0 {
            shared.note_as(
                logs,
                parent,
                sequence,
                kind::UNLINK,
                [inode, 0, 0],
                shared.relative(path),
            );
            shared.give_space(size);
        }
    };
    // SAFETY: the caller's own path
    unsafe { named(dir, path, note, work) }
}

unsafe fn rename_any(
    from_dir: c_int,
    from: *const c_char,
    to_dir: c_int,
    to: *const c_char,
    work: impl FnOnce() -> c_int,
) -> c_int {
    // SAFETY: the caller's own path
    let from = unsafe { absolute(from_dir, from) };
    let note = |shared: &Shared, logs: &mut HashMap<u64, Log>, to: &Path, parent: u64| {
        let Some(from) = from.filter(|from| shared.has(from)) else {
            die("a file is renamed into the watched directory");
        };
        let sequence = shared.next();
        let inode = shared.save(to, sequence);
        let names = [shared.relative(&from), b"\0", shared.relative(to)].concat();
        shared.note_as(logs, parent, sequence, kind::RENAME, [inode, 0, 0], &names);
    };
    // SAFETY: the caller's own path
    unsafe { named(to_dir, to, note, work) }
}

unsafe fn space_any(path: Option<PathBuf>, result: c_int, into: *mut c_void) -> c_int {
    let Some(shared) = shared().filter(|shared| path.is_some_and(|path| shared.has(&path))) else {
        return result;
    };
    let free = shared.control[word::FREE].load(Ordering::Relaxed);
    if result == 0 && free != u64::MAX {
        // SAFETY: a filled structure of eight-byte numbers: block size, fragment size, blocks, free blocks, available blocks
        let numbers = unsafe { std::slice::from_raw_parts_mut(into.cast::<u64>(), 5) };
        let left = free / numbers[1].max(1);
        numbers[3] = numbers[3].min(left);
        numbers[4] = numbers[4].min(left);
    }
    result
}

/// Stands in for functions of the C library.
macro_rules! stand_in {
    ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty = |$real:ident| $body:expr;)*) => {$(
        /// # Safety
        /// As of the C function.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $out {
            // SAFETY: a function of this type, called with the caller's own arguments
            unsafe {
                let $real = real!($name($($type),*) -> $out);
                $body
            }
        }
    )*};
}

type Path8 = *const c_char;
type Bytes = *const c_void;

stand_in! {
    open(path: Path8, flags: c_int, mode: c_uint) -> c_int = |_real| open_any(AT_FDCWD, path, flags, mode);
    open64(path: Path8, flags: c_int, mode: c_uint) -> c_int = |_real| open_any(AT_FDCWD, path, flags, mode);
    openat(dir: c_int, path: Path8, flags: c_int, mode: c_uint) -> c_int = |_real| open_any(dir, path, flags, mode);
    openat64(dir: c_int, path: Path8, flags: c_int, mode: c_uint) -> c_int = |_real| open_any(dir, path, flags, mode);
    creat(path: Path8, mode: c_uint) -> c_int = |_real| open_any(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
    creat64(path: Path8, mode: c_uint) -> c_int = |_real| open_any(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
    close(fd: c_int) -> c_int = |real| { watch(fd, false); real(fd) };
    // Closes its descriptor without a call of `close` that could be seen.
    closedir(dir: *mut c_void) -> c_int = |real| { watch(dirfd(dir), false); real(dir) };
    dup(fd: c_int) -> c_int = |real| again(fd, real(fd));
    dup2(fd: c_int, to: c_int) -> c_int = |real| again(fd, real(fd, to));
    dup3(fd: c_int, to: c_int, flags: c_int) -> c_int = |real| again(fd, real(fd, to, flags));
    fcntl(fd: c_int, what: c_int, with: usize) -> c_int = |real| control_any(fd, what, real(fd, what, with));
    fcntl64(fd: c_int, what: c_int, with: usize) -> c_int = |real| control_any(fd, what, real(fd, what, with));

    write(fd: c_int, bytes: Bytes, len: usize) -> isize = |real| write_through(fd, None, len, false, |len| real(fd, bytes, len));
    pwrite(fd: c_int, bytes: Bytes, len: usize, at: i64) -> isize =
        |real| write_through(fd, Some(at), len, false, |len| real(fd, bytes, len, at));
    pwrite64(fd: c_int, bytes: Bytes, len: usize, at: i64) -> isize =
        |real| write_through(fd, Some(at), len, false, |len| real(fd, bytes, len, at));
    writev(fd: c_int, parts: *const Part, count: c_int) -> isize =
        |real| write_through(fd, None, total(parts, count), true, |_| real(fd, parts, count));
    pwritev(fd: c_int, parts: *const Part, count: c_int, at: i64) -> isize =
        |real| write_through(fd, Some(at), total(parts, count), true, |_| real(fd, parts, count, at));
    pwritev64(fd: c_int, parts: *const Part, count: c_int, at: i64) -> isize =
        |real| write_through(fd, Some(at), total(parts, count), true, |_| real(fd, parts, count, at));
    ftruncate(fd: c_int, len: i64) -> c_int = |real| length_any(fd, len, || real(fd, len));
    ftruncate64(fd: c_int, len: i64) -> c_int = |real| length_any(fd, len, || real(fd, len));
    // The callers of these do without them when told that they do not exist for this file.
    fallocate(fd: c_int, mode: c_int, at: i64, len: i64) -> c_int =
        |real| if is_watched(fd) { fail(EINVAL) } else { real(fd, mode, at, len) };
    fallocate64(fd: c_int, mode: c_int, at: i64, len: i64) -> c_int =
        |real| if is_watched(fd) { fail(EINVAL) } else { real(fd, mode, at, len) };
    copy_file_range(from: c_int, from_at: *mut i64, to: c_int, to_at: *mut i64, len: usize, flags: c_uint) -> isize =
        |real| if is_watched(to) { fail(EINVAL) as isize } else { real(from, from_at, to, to_at, len, flags) };
    sendfile(to: c_int, from: c_int, at: *mut i64, len: usize) -> isize =
        |real| if is_watched(to) { fail(EINVAL) as isize } else { real(to, from, at, len) };
    sendfile64(to: c_int, from: c_int, at: *mut i64, len: usize) -> isize =
        |real| if is_watched(to) { fail(EINVAL) as isize } else { real(to, from, at, len) };

    fsync(fd: c_int) -> c_int = |real| sync_any(fd, || real(fd));
    fdatasync(fd: c_int) -> c_int = |real| sync_any(fd, || real(fd));

    unlink(path: Path8) -> c_int = |real| unlink_any(AT_FDCWD, path, || real(path));
    unlinkat(dir: c_int, path: Path8, flags: c_int) -> c_int = |real| if flags & AT_REMOVEDIR == 0 {
        unlink_any(dir, path, || real(dir, path, flags))
    } else {
        named(dir, path, |shared, logs, path, parent| note_name(shared, logs, path, parent, kind::RMDIR), || real(dir, path, flags))
    };
    rmdir(path: Path8) -> c_int =
        |real| named(AT_FDCWD, path, |shared, logs, path, parent| note_name(shared, logs, path, parent, kind::RMDIR), || real(path));
    mkdir(path: Path8, mode: c_uint) -> c_int = |real| make_directory(AT_FDCWD, path, || real(path, mode));
    mkdirat(dir: c_int, path: Path8, mode: c_uint) -> c_int = |real| make_directory(dir, path, || real(dir, path, mode));
    rename(from: Path8, to: Path8) -> c_int = |real| rename_any(AT_FDCWD, from, AT_FDCWD, to, || real(from, to));
    renameat(from_dir: c_int, from: Path8, to_dir: c_int, to: Path8) -> c_int =
        |real| rename_any(from_dir, from, to_dir, to, || real(from_dir, from, to_dir, to));
    renameat2(from_dir: c_int, from: Path8, to_dir: c_int, to: Path8, flags: c_uint) -> c_int =
        |real| rename_any(from_dir, from, to_dir, to, || real(from_dir, from, to_dir, to, flags));

    statvfs(path: Path8, into: *mut c_void) -> c_int = |real| space_any(absolute(AT_FDCWD, path), real(path, into), into);
    statvfs64(path: Path8, into: *mut c_void) -> c_int = |real| space_any(absolute(AT_FDCWD, path), real(path, into), into);
    fstatvfs(fd: c_int, into: *mut c_void) -> c_int = |real| space_any(name_of(fd), real(fd, into), into);
    fstatvfs64(fd: c_int, into: *mut c_void) -> c_int = |real| space_any(name_of(fd), real(fd, into), into);
}

fn again(fd: c_int, result: c_int) -> c_int {
    if result >= 0 {
        watch(result, is_watched(fd));
    }
    result
}

fn control_any(fd: c_int, what: c_int, result: c_int) -> c_int {
    if matches!(what, F_DUPFD | F_DUPFD_CLOEXEC) {
        again(fd, result)
    } else {
        result
    }
}

unsafe fn total(parts: *const Part, count: c_int) -> usize {
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: the caller's own parts
    (0..count).map(|at| unsafe { (*parts.add(at)).len }).sum()
}

fn length_any(fd: c_int, len: i64, work: impl FnOnce() -> c_int) -> c_int {
    match (shared().filter(|_| is_watched(fd)), u64::try_from(len)) {
        (Some(shared), Ok(len)) => shared.set_length(&mut shared.lock(), fd, len),
        _ => work(),
    }
}

fn note_name(shared: &Shared, logs: &mut HashMap<u64, Log>, path: &Path, parent: u64, kind: u64) {
    if std::fs::symlink_metadata(path).is_ok() {
        shared.note(logs, parent, kind, [0; 3], shared.relative(path));
    }
}

unsafe fn make_directory(dir: c_int, path: *const c_char, work: impl FnOnce() -> c_int) -> c_int {
    let note = |shared: &Shared, logs: &mut HashMap<u64, Log>, path: &Path, parent: u64| {
        if std::fs::symlink_metadata(path).is_err() {
            shared.note(logs, parent, kind::MKDIR, [0; 3], shared.relative(path));
        }
    };
    // SAFETY: the caller's own path
    let result = unsafe { named(dir, path, note, work) };
    // SAFETY: as above
    let place = shared().and_then(|shared| Some((shared, unsafe { absolute(dir, path) }?)));
    if let Some((shared, path)) = place.filter(|(shared, path)| result == 0 && shared.has(path)) {
        // What is left under its number was another directory's, which is gone.
        if let Ok(meta) = std::fs::metadata(path) {
            shared.forget(&mut shared.lock(), meta.ino());
        }
    }
    result
}
