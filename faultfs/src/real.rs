//! The C library as it is, behind what stands in for it.
//!
//! Owns the lookup of the real functions, and this library's own calls of them: those that do not come back to it.

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

unsafe extern "C" {
    pub(crate) fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    pub(crate) fn __errno_location() -> *mut c_int;
    pub(crate) fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64;
    pub(crate) fn mmap64(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        from: i64,
    ) -> *mut c_void;
    pub(crate) fn linkat(
        from_dir: c_int,
        from: *const c_char,
        to_dir: c_int,
        to: *const c_char,
        flags: c_int,
    ) -> c_int;
    pub(crate) fn dirfd(dir: *mut c_void) -> c_int;
    pub(crate) fn abort() -> !;
}

/// `RTLD_NEXT`
pub(crate) const NEXT: *mut c_void = -1_isize as *mut c_void;
pub(crate) const AT_FDCWD: c_int = -100;
pub(crate) const AT_REMOVEDIR: c_int = 0x200;
pub(crate) const O_WRONLY: c_int = 1;
pub(crate) const O_RDWR: c_int = 2;
pub(crate) const O_CREAT: c_int = 0o100;
pub(crate) const O_TRUNC: c_int = 0o1000;
pub(crate) const O_APPEND: c_int = 0o2000;
pub(crate) const O_CLOEXEC: c_int = 0o2_000_000;
pub(crate) const F_DUPFD: c_int = 0;
pub(crate) const F_GETFL: c_int = 3;
pub(crate) const F_DUPFD_CLOEXEC: c_int = 1030;
pub(crate) const EIO: c_int = 5;
pub(crate) const EINVAL: c_int = 22;
pub(crate) const ENOSPC: c_int = 28;

/// The address of the C library's own function, looked up once.
pub(crate) fn find(found: &AtomicUsize, name: &CStr) -> usize {
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
        static FOUND: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let name = const { $crate::real::name_in(concat!(stringify!($name), "\0")) };
        std::mem::transmute::<usize, unsafe extern "C" fn($($arg),*) -> $out>($crate::real::find(&FOUND, name))
    }};
}

pub(crate) const fn name_in(text: &str) -> &CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(name) => name,
        Err(_) => c"",
    }
}

/// The end of a process whose faults could not be injected: it must not look as if it had stood them.
pub(crate) fn die(why: &str) -> ! {
    let text = format!("faultfs: {why}\n");
    // SAFETY: standard error, a valid buffer; abort does not return
    unsafe {
        real!(write(c_int, *const c_void, usize) -> isize)(2, text.as_ptr().cast(), text.len());
        abort()
    }
}

pub(crate) fn fail(code: c_int) -> c_int {
    // SAFETY: the calling thread's own errno
    unsafe { *__errno_location() = code };
    -1
}

pub(crate) fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap_or_else(|_| die("a path with a zero byte"))
}

/// Opens a file of this library's own.
pub(crate) fn open_plain(path: &Path, flags: c_int) -> c_int {
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

pub(crate) fn remove_plain(path: &Path) {
    let path = c_path(path);
    // SAFETY: a valid string
    unsafe { real!(unlink(*const c_char) -> c_int)(path.as_ptr()) };
}

/// A borrowed descriptor, for what `std` does without a function of this library.
pub(crate) fn borrowed(fd: c_int) -> ManuallyDrop<File> {
    // SAFETY: open during the call it is borrowed for, and not closed by its owner's drop
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

pub(crate) fn name_of(fd: c_int) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()
}

/// The absolute path of a call's path; `None` for what cannot be below the root.
///
/// # Safety
/// `path` is a valid string or null.
pub(crate) unsafe fn absolute(dir: c_int, path: *const c_char) -> Option<PathBuf> {
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

pub(crate) fn cut(fd: c_int, len: u64) -> c_int {
    // SAFETY: numbers only
    unsafe { real!(ftruncate64(c_int, i64) -> c_int)(fd, len as i64) }
}

pub(crate) fn put(fd: c_int, mut bytes: &[u8], mut offset: u64) {
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

pub(crate) fn append(fd: c_int, head: &[u8], payload: &[u8]) {
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
pub(crate) fn position(fd: c_int) -> u64 {
    // SAFETY: numbers only
    let flags = unsafe { real!(fcntl(c_int, c_int, usize) -> c_int)(fd, F_GETFL, 0) };
    if flags >= 0 && flags & O_APPEND != 0 {
        return borrowed(fd).metadata().map_or(0, |meta| meta.size());
    }
    // SAFETY: numbers only
    u64::try_from(unsafe { lseek64(fd, 0, 1) }).unwrap_or(0)
}

pub(crate) use real;
