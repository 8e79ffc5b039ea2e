//! The bytes of the journal: segment headers and frames. See `docs/storage-format.md` for the tables.
//!
//! Owns layout, checksums and their checks; knows no file. Everything is big-endian. A frame says which group it
//! belongs to, where in the journal it stands, and (by `chain`) which frame of its group came before it, so that
//! torn, rotten, missing and misplaced bytes are all seen.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Checkpoint, EntryKind};
use crate::types::{EntryId, GroupId, Incarnation, LeaderEpoch, LogIndex, ReplicaId};

/// Version of everything in the data directory but the catalog.
pub(super) const FORMAT: u32 = 1;
/// Bytes of a segment's header.
pub(super) const SEGMENT_HEADER: u64 = 64;
/// Bytes of a frame before its payload.
pub(super) const FRAME_HEADER: usize = 60;
/// Largest payload, in bytes; a length beyond it is damage.
pub(super) const PAYLOAD_MAX: usize = 256 << 20;
/// The group of frames that belong to the journal itself.
pub(super) const JOURNAL: GroupId = GroupId(u64::MAX);

const FRAME_MAGIC: u32 = 0x4c42_6672; // "LBfr"
const FRAME_VERSION: u8 = 1;
const SEGMENT_MAGIC: u64 = 0x4c42_5345_474d_4e54; // "LBSEGMNT"

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An entry appended; every entry of the group from this index on was dropped before.
    Entry,
    /// The group's vote.
    Vote,
    /// Entries from `index` on are dropped.
    Truncate,
    /// Entries up to and with (`index`, `term`) are dropped.
    Purge,
    /// The base checkpoint at (`index`, `term`).
    Base,
    /// The group begins, empty.
    Created,
    /// The group ends.
    Removed,
    /// Of the journal: segments before position `index` are deleted.
    Drop,
    /// An entry written again so that its old segment can go.
    CarriedEntry,
    /// The group's replica, written again.
    CarriedGroup,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Entry => 1,
            Self::Vote => 2,
            Self::Truncate => 3,
            Self::Purge => 4,
            Self::Base => 5,
            Self::Created => 6,
            Self::Removed => 7,
            Self::Drop => 8,
            Self::CarriedEntry => 9,
            Self::CarriedGroup => 10,
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Entry,
            2 => Self::Vote,
            3 => Self::Truncate,
            4 => Self::Purge,
            5 => Self::Base,
            6 => Self::Created,
            7 => Self::Removed,
            8 => Self::Drop,
            9 => Self::CarriedEntry,
            10 => Self::CarriedGroup,
            _ => return None,
        })
    }

    /// Whether the frame is an entry's.
    pub(super) fn is_entry(self) -> bool {
        matches!(self, Self::Entry | Self::CarriedEntry)
    }
}

/// The byte of an entry kind.
pub(super) fn entry_code(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::Blank => 1,
        EntryKind::Command => 2,
        EntryKind::Membership => 3,
    }
}

/// The entry kind of a byte.
pub(super) fn entry_kind(code: u8) -> Option<EntryKind> {
    Some(match code {
        1 => EntryKind::Blank,
        2 => EntryKind::Command,
        3 => EntryKind::Membership,
        _ => return None,
    })
}

/// A frame before it has a place.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    /// Kind of the entry, 0 for other frames.
    pub(super) entry: u8,
    pub(super) group: GroupId,
    pub(super) index: u64,
    pub(super) term: u64,
    pub(super) payload: Bytes,
}

impl Frame {
    /// Its bytes in the journal.
    pub(super) fn size(&self) -> u64 {
        (FRAME_HEADER + self.payload.len()) as u64
    }

    /// A frame that is no entry.
    pub(super) fn plain(kind: Kind, group: GroupId, at: EntryId, payload: Bytes) -> Self {
        Self {
            kind,
            entry: 0,
            group,
            index: at.index.0,
            term: at.epoch.0,
            payload,
        }
    }

    /// The replica of a group, for `Created` and `CarriedGroup`.
    pub(super) fn replica(kind: Kind, group: GroupId, replica: ReplicaId) -> Self {
        let payload = Bytes::copy_from_slice(&replica.as_u64().to_be_bytes());
        Self::plain(kind, group, EntryId::default(), payload)
    }

    /// A frame of the base checkpoint.
    pub(super) fn base(group: GroupId, checkpoint: &Checkpoint, replace: bool) -> Self {
        let mut payload =
            BytesMut::with_capacity(5 + checkpoint.membership.len() + checkpoint.state.len());
        payload.put_u8(u8::from(replace));
        put_checkpoint(&mut payload, checkpoint);
        Self::plain(Kind::Base, group, checkpoint.id, payload.freeze())
    }
}

/// Writes membership and state of a checkpoint.
pub(super) fn put_checkpoint(out: &mut BytesMut, checkpoint: &Checkpoint) {
    out.put_u32(u32::try_from(checkpoint.membership.len()).unwrap_or(u32::MAX));
    out.put_slice(&checkpoint.membership);
    out.put_slice(&checkpoint.state);
}

/// Reads what [`put_checkpoint`] wrote.
pub(super) fn get_checkpoint(id: EntryId, bytes: &[u8]) -> Option<Checkpoint> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (membership, state) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    let (membership, state) = (
        Bytes::copy_from_slice(membership),
        Bytes::copy_from_slice(state),
    );
    Some(Checkpoint {
        id,
        membership,
        state,
    })
}

/// A frame's header, as it stands in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: Kind,
    pub(super) entry: u8,
    pub(super) group: GroupId,
    pub(super) index: u64,
    pub(super) term: u64,
    /// Where the frame begins, in journal bytes since the directory was created.
    pub(super) position: u64,
    /// Journal bytes known durable when the frame was written.
    pub(super) durable: u64,
    /// Checksum of the group's previous frame; 0 for `Created`.
    pub(super) chain: u32,
    pub(super) length: u32,
    pub(super) crc: u32,
}

impl Head {
    /// Where the next frame begins.
    pub(super) fn end(&self) -> u64 {
        self.position + FRAME_HEADER as u64 + u64::from(self.length)
    }

    /// The entry's id.
    pub(super) fn id(&self) -> EntryId {
        EntryId {
            epoch: LeaderEpoch(self.term),
            index: LogIndex(self.index),
        }
    }
}

/// Where a checksum starts: frames of another directory never match.
pub(super) fn seed(incarnation: Incarnation) -> u32 {
    crc32c::crc32c(&incarnation.0.to_be_bytes())
}

/// Appends the frame's bytes to `out`; gives back its header.
pub(super) fn put_frame(
    out: &mut Vec<u8>,
    frame: &Frame,
    seed: u32,
    position: u64,
    durable: u64,
    chain: u32,
) -> Head {
    let length = u32::try_from(frame.payload.len()).unwrap_or(u32::MAX);
    assert!(
        frame.payload.len() <= PAYLOAD_MAX,
        "frame payload of {length} bytes"
    );
    let mut head = [0_u8; FRAME_HEADER];
    let mut cursor = head.as_mut_slice();
    cursor.put_u32(FRAME_MAGIC);
    cursor.put_u8(FRAME_VERSION);
    cursor.put_u8(frame.kind.code());
    cursor.put_u8(frame.entry);
    cursor.put_u8(0);
    cursor.put_u64(frame.group.0);
    cursor.put_u64(frame.index);
    cursor.put_u64(frame.term);
    cursor.put_u64(position);
    cursor.put_u64(durable);
    cursor.put_u32(chain);
    cursor.put_u32(length);
    let (body, _) = head.split_at(FRAME_HEADER - 4);
    let crc = crc32c::crc32c_append(crc32c::crc32c_append(seed, body), &frame.payload);
    out.extend_from_slice(body);
    out.extend_from_slice(&crc.to_be_bytes());
    out.extend_from_slice(&frame.payload);
    Head {
        kind: frame.kind,
        entry: frame.entry,
        group: frame.group,
        index: frame.index,
        term: frame.term,
        position,
        durable,
        chain,
        length,
        crc,
    }
}

struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }
}

/// The header at the start of `bytes`, not yet checked against its checksum; `None` when it cannot be one.
pub(super) fn get_head(bytes: &[u8]) -> Option<Head> {
    let mut cursor = Cursor(bytes);
    if cursor.u32()? != FRAME_MAGIC || cursor.u8()? != FRAME_VERSION {
        return None;
    }
    let kind = Kind::from_code(cursor.u8()?)?;
    let entry = cursor.u8()?;
    let zero = cursor.u8()?;
    let head = Head {
        kind,
        entry,
        group: GroupId(cursor.u64()?),
        index: cursor.u64()?,
        term: cursor.u64()?,
        position: cursor.u64()?,
        durable: cursor.u64()?,
        chain: cursor.u32()?,
        length: cursor.u32()?,
        crc: cursor.u32()?,
    };
    let entry_fits = kind.is_entry() == entry_kind(entry).is_some();
    let sane = zero == 0 && entry_fits && head.length as usize <= PAYLOAD_MAX;
    sane.then_some(head)
}

/// Whether `head` and `payload`, read at `position`, are what was written there. `header` are the bytes `head` was
/// read from.
pub(super) fn verify(head: &Head, header: &[u8], payload: &[u8], seed: u32, position: u64) -> bool {
    let Some(body) = header.get(..FRAME_HEADER - 4) else {
        return false;
    };
    head.position == position
        && head.length as usize == payload.len()
        && crc32c::crc32c_append(crc32c::crc32c_append(seed, body), payload) == head.crc
}

/// Where in `bytes` a frame could begin, looking from `from`.
pub(super) fn find_magic(bytes: &[u8], from: usize) -> Option<usize> {
    let rest = bytes.get(from..)?;
    rest.windows(4)
        .position(|window| window == FRAME_MAGIC.to_be_bytes())
        .map(|at| at + from)
}

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SegmentHead {
    pub(super) incarnation: Incarnation,
    /// Journal position of the header's first byte; also the file's name.
    pub(super) base: u64,
    /// Where the journal's first segment began when this one was created.
    pub(super) first: u64,
}

impl SegmentHead {
    /// Its bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.put_u64(SEGMENT_MAGIC);
        out.put_u32(FORMAT);
        out.put_u32(0);
        out.put_u128(self.incarnation.0);
        out.put_u64(self.base);
        out.put_u64(self.first);
        out.put_bytes(0, 12);
        let crc = crc32c::crc32c(&out);
        out.put_u32(crc);
        out
    }

    /// The header in `bytes`, checked.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut cursor = Cursor(bytes);
        let magic = cursor.u64()?;
        let format = cursor.u32()?;
        let zero = cursor.u32()?;
        let incarnation = Incarnation(u128::from_be_bytes(cursor.take()?));
        let head = Self {
            incarnation,
            base: cursor.u64()?,
            first: cursor.u64()?,
        };
        let pad: [u8; 12] = cursor.take()?;
        let crc = cursor.u32()?;
        let sane = magic == SEGMENT_MAGIC && format == FORMAT && zero == 0 && pad == [0; 12];
        (sane && crc32c::crc32c(bytes.get(..60)?) == crc).then_some(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: any changed bit of a frame or a segment header is seen. Method: flip every bit of one of each.
    #[test]
    fn every_flipped_bit_is_seen() {
        let frame = Frame {
            kind: Kind::Entry,
            entry: entry_code(EntryKind::Command),
            group: GroupId(7),
            index: 3,
            term: 2,
            payload: Bytes::from_static(b"payload"),
        };
        let mut bytes = Vec::new();
        let head = put_frame(&mut bytes, &frame, 9, 100, 50, 77);
        let check = |bytes: &[u8]| {
            let found = get_head(bytes)?;
            let (header, payload) = bytes.split_at(FRAME_HEADER);
            verify(&found, header, payload, 9, 100).then_some(found)
        };
        assert_eq!(check(&bytes), Some(head));
        for bit in 0..bytes.len() * 8 {
            let mut other = bytes.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(check(&other), None, "bit {bit}");
        }

        let segment = SegmentHead {
            incarnation: Incarnation(5),
            base: 6,
            first: 4,
        };
        let bytes = segment.encode();
        assert_eq!(bytes.len() as u64, SEGMENT_HEADER);
        assert_eq!(SegmentHead::decode(&bytes), Some(segment));
        for bit in 0..bytes.len() * 8 {
            let mut other = bytes.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHead::decode(&other), None, "bit {bit}");
        }
    }

    /// Goal: a frame is valid only in its own directory and place. Method: check it under another seed and position.
    #[test]
    fn a_misplaced_frame_is_seen() {
        let frame = Frame::replica(Kind::Created, GroupId(1), ReplicaId::from_u64(5));
        let mut bytes = Vec::new();
        let head = put_frame(&mut bytes, &frame, 9, 100, 50, 0);
        let (header, payload) = bytes.split_at(FRAME_HEADER);
        assert!(verify(&head, header, payload, 9, 100));
        assert!(!verify(&head, header, payload, 8, 100));
        assert!(!verify(&head, header, payload, 9, 101));
    }
}
