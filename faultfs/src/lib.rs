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
mod real;
mod undo;

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use format::{kind, word};
use real::*;
use undo::{Log, Shared, shared};

/// Part of a vectored write.
#[repr(C)]
pub struct Part {
    base: *const c_void,
    len: usize,
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
        if shared.control[word::LIE].load(Ordering::Relaxed) == 0 {
            shared.synced(&mut shared.lock(), meta.ino(), sequence);
        }
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
