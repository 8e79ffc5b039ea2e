//! Whom a data directory belongs to, and how much of its journal is durable: two tiny files.
//!
//! Owns `identity` (replaced as a whole, durable at once) and `watermark` (two slots written in turn after every
//! sync of the journal, so that after a kill it is exact; it is synced itself only now and then, so after a loss
//! of power it may lag, but it never leads).

use std::io;
use std::sync::Arc;

use bytes::BufMut;
use serde::{Deserialize, Serialize};

use super::disk::{Disk, DiskFile, read_small, replace_small};
use super::frame::FORMAT;
use crate::types::{BrokerId, ClusterId, Incarnation, decode, encode};

const IDENTITY: &str = "identity";
const WATERMARK: &str = "watermark";
const IDENTITY_MAGIC: u64 = 0x4c42_4944_454e_5449; // "LBIDENTI"
const WATERMARK_MAGIC: u64 = 0x4c42_5741_5445_524d; // "LBWATERM"
const SLOT: usize = 512;

/// What `identity` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) broker: BrokerId,
    pub(super) incarnation: Incarnation,
    pub(super) cluster: Option<ClusterId>,
    pub(super) boot: u64,
}

/// What was found in place of an identity.
#[derive(Debug)]
pub(super) enum Found {
    None,
    Identity(Identity),
    Damaged(String),
    Newer(u32),
}

/// Reads `identity`.
pub(super) fn read(disk: &dyn Disk) -> io::Result<Found> {
    let Some(bytes) = read_small(disk, IDENTITY, 4096)? else {
        return Ok(Found::None);
    };
    let damaged = |what: &str| Ok(Found::Damaged(format!("file {IDENTITY}: {what}")));
    let Some((body, crc)) = bytes.split_last_chunk::<4>() else {
        return damaged("it is cut short");
    };
    if crc32c::crc32c(body) != u32::from_be_bytes(*crc) {
        return damaged("its checksum is wrong");
    }
    let Some((magic, rest)) = body.split_first_chunk::<8>() else {
        return damaged("it is cut short");
    };
    let Some((format, rest)) = rest.split_first_chunk::<4>() else {
        return damaged("it is cut short");
    };
    if u64::from_be_bytes(*magic) != IDENTITY_MAGIC {
        return damaged("it is no identity");
    }
    let format = u32::from_be_bytes(*format);
    if format != FORMAT {
        return Ok(Found::Newer(format));
    }
    match decode(rest) {
        Ok(identity) => Ok(Found::Identity(identity)),
        Err(error) => damaged(&error.to_string()),
    }
}

/// Writes `identity`, durably.
pub(super) fn write(disk: &dyn Disk, identity: &Identity) -> io::Result<()> {
    replace_small(disk, IDENTITY, &encode_identity(identity, FORMAT))
}

/// The bytes of an identity in a directory of `format`.
pub(super) fn encode_identity(identity: &Identity, format: u32) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u64(IDENTITY_MAGIC);
    out.put_u32(format);
    out.put_slice(&encode(identity));
    let crc = crc32c::crc32c(&out);
    out.put_u32(crc);
    out
}

/// The open `watermark`.
#[derive(Debug)]
pub(super) struct Watermark {
    file: Arc<dyn DiskFile>,
    incarnation: Incarnation,
    sequence: u64,
}

/// What `watermark` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) sequence: u64,
    /// Journal bytes known durable.
    pub(super) position: u64,
}

fn encode_slot(incarnation: Incarnation, mark: Mark) -> Vec<u8> {
    let mut out = Vec::with_capacity(SLOT);
    out.put_u64(WATERMARK_MAGIC);
    out.put_u128(incarnation.0);
    out.put_u64(mark.sequence);
    out.put_u64(mark.position);
    let crc = crc32c::crc32c(&out);
    out.put_u32(crc);
    out.resize(SLOT, 0);
    out
}

fn decode_slot(bytes: &[u8], incarnation: Incarnation) -> Option<Mark> {
    let sequence = u64::from_be_bytes(*bytes.get(24..)?.first_chunk()?);
    let position = u64::from_be_bytes(*bytes.get(32..)?.first_chunk()?);
    let mark = Mark { sequence, position };
    (bytes == encode_slot(incarnation, mark)).then_some(mark)
}

/// The newest valid slot of `watermark`, or what is wrong with the file.
pub(super) fn read_watermark(
    disk: &dyn Disk,
    incarnation: Incarnation,
) -> io::Result<Result<Mark, String>> {
    let Some(bytes) = read_small(disk, WATERMARK, 4096)? else {
        return Ok(Err(format!("file {WATERMARK} is missing")));
    };
    let slots = bytes
        .chunks(SLOT)
        .filter_map(|slot| decode_slot(slot, incarnation));
    Ok(slots
        .max_by_key(|mark| mark.sequence)
        .ok_or(format!("file {WATERMARK}: both slots are wrong")))
}

impl Watermark {
    /// Opens the file, creating it when the directory is new, and writes both slots durably.
    pub(super) fn open(
        disk: &dyn Disk,
        incarnation: Incarnation,
        mark: Mark,
        create: bool,
    ) -> io::Result<Self> {
        let file = if create {
            disk.create(WATERMARK)?
        } else {
            disk.open(WATERMARK)?
        };
        let mut watermark = Self {
            file,
            incarnation,
            sequence: mark.sequence,
        };
        // One slot at a time: the other one stays valid whatever happens to this write.
        for _ in 0..2 {
            watermark.write(mark.position)?;
            watermark.sync()?;
        }
        Ok(watermark)
    }

    /// Notes that the journal is durable up to `position`; does not sync.
    pub(super) fn write(&mut self, position: u64) -> io::Result<()> {
        self.sequence += 1;
        let slot = encode_slot(
            self.incarnation,
            Mark {
                sequence: self.sequence,
                position,
            },
        );
        self.file.write_at(&slot, (self.sequence % 2) * SLOT as u64)
    }

    /// Makes what has been written durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}
