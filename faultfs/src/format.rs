//! What the preloaded library and those who use it agree on: the environment, the control page, the undo log.
//!
//! Owns the layout alone. Compiled into the library and, as a module, into `testkit`.
//!
//! An undo log belongs to one inode and lies in `undo/INODE` of the side directory. It is a row of records: six numbers of eight bytes,
//! little-endian (kind, sequence, `a`, `b`, `c`, length of the payload), then the payload. A record is written before what it
//! undoes is done, so that nothing a killed process did is without one; a torn last record undoes nothing, since nothing was done.

use std::ops::Range;

/// The directory whose files are watched: absolute, without symbolic links.
pub const ROOT_VARIABLE: &str = "LOGBOOM_FAULTFS_ROOT";
/// The directory for the control page and the undo logs: on the same file system, not below the root.
pub const SIDE_VARIABLE: &str = "LOGBOOM_FAULTFS_SIDE";

/// The control page's file in the side directory.
pub const CONTROL: &str = "control";
/// Its bytes.
pub const CONTROL_BYTES: usize = 4_096;
/// What its first number is.
pub const MAGIC: u64 = 0x3153_4654_4c55_4146;
/// The undo logs' directory in the side directory.
pub const UNDO: &str = "undo";
/// The directory for files whose names were removed, or taken by another file, and whose directory has not been synced since.
pub const SAVED: &str = "saved";

/// The numbers of the control page, by place.
pub mod word {
    /// [`super::MAGIC`].
    pub const MAGIC: usize = 0;
    /// The sequence number given out last.
    pub const SEQUENCE: usize = 1;
    /// Bytes that may still be written beyond what files have; `u64::MAX`: as the disk has it.
    pub const FREE: usize = 2;
    /// The how-manieth sync from now fails; 0: none.
    pub const FAIL_SYNC: usize = 3;
    /// Microseconds by which every sync is delayed.
    pub const SYNC_DELAY: usize = 4;
    /// Calls that wrote.
    pub const WRITES: usize = 5;
    /// Syncs that succeeded.
    pub const SYNCS: usize = 6;
    /// Syncs that were made to fail.
    pub const SYNCS_FAILED: usize = 7;
    /// Writes that were refused for want of space.
    pub const REFUSED: usize = 8;
    /// The inode of the sync that was made to fail last.
    pub const FAILED_INODE: usize = 9;
    /// Not 0: syncs succeed and make nothing durable.
    pub const LIE: usize = 10;
    /// How many there are.
    pub const COUNT: usize = 11;
}

/// What was done, in the log of a file or, for names, of a directory. Paths are relative to the root.
pub mod kind {
    /// `b` bytes were written at `a` to a file that had `c` bytes; the payload is what was there.
    pub const WRITE: u64 = 1;
    /// A file of `c` bytes got the length `a`; the payload is what was cut off.
    pub const LENGTH: u64 = 2;
    /// Everything up to the sequence number `a` is durable.
    pub const SYNCED: u64 = 3;
    /// A file got the name in the payload.
    pub const CREATE: u64 = 4;
    /// A directory got the name in the payload.
    pub const MKDIR: u64 = 5;
    /// The name in the payload was taken from the inode `a`, which is kept as `saved/SEQUENCE`.
    pub const UNLINK: u64 = 6;
    /// The directory in the payload was removed.
    pub const RMDIR: u64 = 7;
    /// The payload is the old name, a zero byte, the new name. The inode `a` had the new one and is kept as `saved/SEQUENCE`; 0: none.
    pub const RENAME: u64 = 8;
}

const HEAD: usize = 48;

/// One record of an undo log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// One of [`kind`].
    pub kind: u64,
    /// Its place among all records of the root.
    pub sequence: u64,
    /// See [`kind`].
    pub a: u64,
    /// See [`kind`].
    pub b: u64,
    /// See [`kind`].
    pub c: u64,
    /// Where its payload lies in the log.
    pub payload: Range<usize>,
}

/// A record's bytes before its payload.
pub fn head(kind: u64, sequence: u64, abc: [u64; 3], payload: usize) -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    let numbers = [kind, sequence, abc[0], abc[1], abc[2], payload as u64];
    for (to, number) in bytes.chunks_exact_mut(8).zip(numbers) {
        to.copy_from_slice(&u64_bytes(number));
    }
    bytes
}

/// A number as it stands in the control page and in the logs.
pub fn u64_bytes(number: u64) -> [u8; 8] {
    std::array::from_fn(|place| (number >> (8 * place)) as u8)
}

/// The number in up to eight bytes.
pub fn u64_from(bytes: &[u8]) -> u64 {
    (bytes.iter().rev()).fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

/// The whole records at a log's beginning that are not known to be durable, and the length of all whole ones.
pub fn pending(log: &[u8]) -> (Vec<Entry>, usize) {
    let mut entries: Vec<Entry> = Vec::new();
    let mut at = 0;
    while let Some(head) = log.get(at..at + HEAD) {
        let mut numbers = head.chunks_exact(8).map(u64_from);
        let mut next = || numbers.next().unwrap_or_default();
        let (kind, sequence, a, b, c) = (next(), next(), next(), next(), next());
        let payload = usize::try_from(next())
            .ok()
            .and_then(|len| (at + HEAD).checked_add(len));
        let Some(end) = payload.filter(|end| *end <= log.len()) else {
            break;
        };
        if kind == kind::SYNCED {
            entries.retain(|entry| entry.sequence > a);
        } else {
            let payload = at + HEAD..end;
            entries.push(Entry {
                kind,
                sequence,
                a,
                b,
                c,
                payload,
            });
        }
        at = end;
    }
    (entries, at)
}
