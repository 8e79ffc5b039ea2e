//! Where every accepted batch of a partition is: from an offset, a time or a log index to a place in the Raft log.
//!
//! Owns the newest part of the index in memory, and the packed form of its older blocks, which live in the group's store.
//! A block covers [`BLOCK_BATCHES`] batches without a gap. Memory is bounded by the distance between two checkpoints: a block
//! handed out with one is dropped when the next one is made, but for a short tail.
//!
//! Searches are pure over [`Blocks`]; whoever calls them knows whether they may block.

use std::collections::VecDeque;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::storage::{GroupStore, StorageError};
use crate::types::{DecodeError, EntryId, LeaderEpoch, LogIndex, Offset, decode, encode};

/// Batches in a block: so many that a packed block is never above 4 KiB (42 bytes a batch at most, and 20 in front).
pub(super) const BLOCK_BATCHES: usize = 96;
/// Blocks that stay in memory although the store has them.
const TAIL_BLOCKS: usize = 8;
const BLOCK_VERSION: u8 = 1;

/// An accepted batch and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatchRef {
    /// Offset of its first record.
    pub(super) base_offset: Offset,
    /// Its records.
    pub(super) count: u32,
    /// The entry that holds it.
    pub(super) entry: EntryId,
    /// Where it begins in the entry's payload, in bytes.
    pub(super) position: u32,
    /// Its size, in bytes.
    pub(super) size: u32,
    /// Its latest timestamp, in ms since 1970.
    pub(super) max_timestamp: i64,
}

impl BatchRef {
    /// The offset behind its last record.
    pub(super) fn end(&self) -> Offset {
        self.base_offset.plus(u64::from(self.count))
    }
}

/// A run of batches without a gap, and the latest timestamps in front of it and in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    /// The latest timestamp of all batches in front of the block; never falls from one block to the next.
    pub(super) max_before: i64,
    /// The latest timestamp in the block.
    pub(super) max_within: i64,
    /// The batches, in order.
    pub(super) batches: Vec<BatchRef>,
}

impl Default for Block {
    fn default() -> Self {
        Self {
            max_before: i64::MIN,
            max_within: i64::MIN,
            batches: Vec::new(),
        }
    }
}

/// A batch relative to the one in front of it: small numbers pack well.
#[derive(Serialize, Deserialize)]
struct Packed {
    count: u32,
    index_delta: u64,
    epoch_delta: u64,
    position: u32,
    size: u32,
    timestamp_delta: i64,
}

#[derive(Serialize, Deserialize)]
struct PackedBlock {
    version: u8,
    max_before: i64,
    max_within: i64,
    batches: Vec<Packed>,
}

impl Block {
    /// Offset of the first record, when there is a batch.
    fn first(&self) -> Option<Offset> {
        self.batches.first().map(|batch| batch.base_offset)
    }

    /// The offset behind the last record.
    fn end(&self) -> Option<Offset> {
        self.batches.last().map(BatchRef::end)
    }

    fn holds(&self, offset: Offset) -> bool {
        self.first().is_some_and(|first| first <= offset)
            && self.end().is_some_and(|end| offset < end)
    }

    /// The batches from the one that holds `offset` on.
    fn from(&self, offset: Offset) -> &[BatchRef] {
        let at = self.batches.partition_point(|batch| batch.end() <= offset);
        self.batches.get(at..).unwrap_or_default()
    }

    fn push(&mut self, batch: BatchRef) {
        self.max_within = self.max_within.max(batch.max_timestamp);
        self.batches.push(batch);
    }

    /// The block as bytes; its first offset stands beside it.
    pub(super) fn pack(&self) -> Bytes {
        let (mut index, mut epoch, mut timestamp) = (0, 0, 0_i64);
        let mut batches = Vec::with_capacity(self.batches.len());
        for batch in &self.batches {
            batches.push(Packed {
                count: batch.count,
                index_delta: batch.entry.index.0.wrapping_sub(index),
                epoch_delta: batch.entry.epoch.0.wrapping_sub(epoch),
                position: batch.position,
                size: batch.size,
                timestamp_delta: batch.max_timestamp.wrapping_sub(timestamp),
            });
            (index, epoch, timestamp) = (
                batch.entry.index.0,
                batch.entry.epoch.0,
                batch.max_timestamp,
            );
        }
        let (max_before, max_within) = (self.max_before, self.max_within);
        encode(&PackedBlock {
            version: BLOCK_VERSION,
            max_before,
            max_within,
            batches,
        })
        .into()
    }

    /// Reads [`Block::pack`]'s bytes.
    pub(super) fn unpack(first: Offset, bytes: &[u8]) -> Result<Self, DecodeError> {
        let packed: PackedBlock = decode(bytes)?;
        if packed.version != BLOCK_VERSION {
            return Err(DecodeError(format!(
                "index block of version {}",
                packed.version
            )));
        }
        if packed.batches.len() > BLOCK_BATCHES {
            return Err(DecodeError(format!(
                "index block of {} batches",
                packed.batches.len()
            )));
        }
        let (mut index, mut epoch, mut max_timestamp) = (0_u64, 0_u64, 0_i64);
        let mut base_offset = first;
        let mut batches = Vec::with_capacity(packed.batches.len());
        for batch in packed.batches {
            index = index.wrapping_add(batch.index_delta);
            epoch = epoch.wrapping_add(batch.epoch_delta);
            max_timestamp = max_timestamp.wrapping_add(batch.timestamp_delta);
            let end = base_offset.0.checked_add(u64::from(batch.count));
            let Some(end) = end.filter(|end| *end > base_offset.0) else {
                let (at, count) = (base_offset, batch.count);
                return Err(DecodeError(format!(
                    "{count} records at offset {at} in an index block"
                )));
            };
            batches.push(BatchRef {
                base_offset,
                count: batch.count,
                entry: EntryId {
                    epoch: LeaderEpoch(epoch),
                    index: LogIndex(index),
                },
                position: batch.position,
                size: batch.size,
                max_timestamp,
            });
            base_offset = Offset(end);
        }
        Ok(Self {
            max_before: packed.max_before,
            max_within: packed.max_within,
            batches,
        })
    }
}

/// A complete block in memory.
#[derive(Debug, Clone)]
struct Complete {
    first: Offset,
    end: Offset,
    last_index: LogIndex,
    bytes: Bytes,
    /// Whether it was handed out with a checkpoint.
    is_saved: bool,
}

/// A block as memory has it.
#[derive(Debug)]
pub(super) enum Held {
    /// Complete.
    Packed(Offset, Bytes),
    /// The one that grows.
    Open(Block),
}

impl Held {
    fn open(self) -> Result<Block, DecodeError> {
        match self {
            Self::Packed(first, bytes) => Block::unpack(first, &bytes),
            Self::Open(block) => Ok(block),
        }
    }
}

/// The part of the index in memory: complete blocks without a gap, then the one that grows.
#[derive(Debug, Default)]
pub(super) struct OffsetIndex {
    complete: VecDeque<Complete>,
    open: Block,
}

impl OffsetIndex {
    /// An index whose growing block is `open`; everything older is in the store.
    pub(super) fn new(open: Block) -> Self {
        Self {
            complete: VecDeque::new(),
            open,
        }
    }

    /// The block that grows.
    pub(super) fn open(&self) -> &Block {
        &self.open
    }

    /// Adds the next batch.
    pub(super) fn push(&mut self, batch: BatchRef) {
        if let Some(end) = self.open.end() {
            assert!(
                end == batch.base_offset,
                "a batch at {} behind {end}",
                batch.base_offset
            );
        }
        self.open.push(batch);
        if self.open.batches.len() >= BLOCK_BATCHES {
            let max_before = self.open.max_before.max(self.open.max_within);
            let next = Block {
                max_before,
                ..Block::default()
            };
            let full = std::mem::replace(&mut self.open, next);
            if let (Some(first), Some(last)) = (full.first(), full.batches.last()) {
                self.complete.push_back(Complete {
                    first,
                    end: last.end(),
                    last_index: last.entry.index,
                    bytes: full.pack(),
                    is_saved: false,
                });
            }
        }
    }

    /// Blocks that the next checkpoint hands out.
    pub(super) fn unsaved(&self) -> usize {
        self.complete
            .iter()
            .rev()
            .take_while(|block| !block.is_saved)
            .count()
    }

    /// Hands out the blocks completed since the last call. Those of the last call are in the store by now, and are dropped but
    /// for a tail; the new ones stay until the next call, as they are not in the store yet.
    pub(super) fn hand_out(&mut self) -> Vec<(u64, Bytes)> {
        let unsaved = self.unsaved();
        while self.complete.len() > unsaved + TAIL_BLOCKS {
            self.complete.pop_front();
        }
        let mut blocks = Vec::with_capacity(unsaved);
        for block in self.complete.iter_mut().filter(|block| !block.is_saved) {
            block.is_saved = true;
            blocks.push((block.first.0, block.bytes.clone()));
        }
        blocks
    }

    /// Drops the complete blocks of which every record is below `log_start`.
    pub(super) fn trim(&mut self, log_start: Offset) {
        while self
            .complete
            .front()
            .is_some_and(|block| block.end <= log_start)
        {
            self.complete.pop_front();
        }
    }

    /// The first offset that memory covers; everything below is in the store, or gone.
    pub(super) fn first(&self) -> Option<Offset> {
        self.complete
            .front()
            .map(|block| block.first)
            .or_else(|| self.open.first())
    }

    /// The block that holds `offset`, when memory has it.
    pub(super) fn block(&self, offset: Offset) -> Option<Held> {
        if self.open.holds(offset) {
            return Some(Held::Open(self.open.clone()));
        }
        let at = self.complete.partition_point(|block| block.end <= offset);
        let block = self
            .complete
            .get(at)
            .filter(|block| block.first <= offset)?;
        Some(Held::Packed(block.first, block.bytes.clone()))
    }

    /// The offset behind all records of entries up to `index`: that of the first batch in a later one, or `next_offset`. `None`
    /// when memory cannot tell: no batch in it stands at or before `index`.
    pub(super) fn behind(&self, index: LogIndex, next_offset: Offset) -> Option<Offset> {
        let is_before = |batch: &BatchRef| batch.entry.index <= index;
        if self.open.batches.first().is_some_and(is_before) {
            let at = self.open.batches.partition_point(is_before);
            let found = self.open.batches.get(at);
            return Some(found.map_or(next_offset, |batch| batch.base_offset));
        }
        let at = self
            .complete
            .partition_point(|block| block.last_index <= index);
        let Some(block) = self.complete.get(at) else {
            // Every complete block is at or before it, the growing one wholly behind.
            let found = self.open.first().unwrap_or(next_offset);
            return (!self.complete.is_empty()).then_some(found);
        };
        let unpacked = Block::unpack(block.first, &block.bytes).ok()?;
        match unpacked.batches.partition_point(is_before) {
            0 if at == 0 => None,
            found => unpacked.batches.get(found).map(|batch| batch.base_offset),
        }
    }
}

/// Why the index could not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum IndexError {
    /// The store failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A block cannot be read.
    #[error("index block: {0}")]
    Block(#[from] DecodeError),
    /// No block holds an offset that was not trimmed when the question began; it may be by now.
    #[error("offset {0} is in no index block")]
    Missing(Offset),
}

/// Older blocks.
pub(super) trait Blocks {
    /// The block with the greatest first offset at or below `offset`.
    fn at_or_below(&self, offset: Offset) -> Result<Option<(u64, Bytes)>, StorageError>;
}

impl Blocks for GroupStore {
    fn at_or_below(&self, offset: Offset) -> Result<Option<(u64, Bytes)>, StorageError> {
        self.block_at_or_below(offset.0)
    }
}

/// The whole index: what memory has, asked through a function that holds the lock for a moment, and the older blocks.
pub(super) struct Lookup<'a, M, B> {
    /// [`OffsetIndex::block`] of the partition.
    pub(super) memory: M,
    /// Older blocks.
    pub(super) older: &'a B,
}

impl<M: Fn(Offset) -> Option<Held>, B: Blocks> Lookup<'_, M, B> {
    fn block(&self, offset: Offset) -> Result<Block, IndexError> {
        if let Some(held) = (self.memory)(offset) {
            return Ok(held.open()?);
        }
        let Some((first, bytes)) = self.older.at_or_below(offset)? else {
            return Err(IndexError::Missing(offset));
        };
        let block = Block::unpack(Offset(first), &bytes)?;
        if block.holds(offset) {
            Ok(block)
        } else {
            Err(IndexError::Missing(offset))
        }
    }

    /// The batches from the one that holds `from` on, all below `below`, at most `bytes_max` bytes but at least one when there
    /// is one.
    pub(super) fn batches(
        &self,
        from: Offset,
        below: Offset,
        bytes_max: usize,
    ) -> Result<Vec<BatchRef>, IndexError> {
        let mut found = Vec::new();
        let mut bytes = 0_usize;
        let mut at = from;
        while at < below {
            for batch in self.block(at)?.from(at) {
                bytes = bytes.saturating_add(usize::try_from(batch.size).unwrap_or(usize::MAX));
                if batch.end() > below || (bytes > bytes_max && !found.is_empty()) {
                    return Ok(found);
                }
                at = batch.end();
                found.push(*batch);
            }
        }
        Ok(found)
    }

    /// The first block in `[from, below)` for which `wanted` holds: it must hold for all behind it too.
    fn first_block(
        &self,
        from: Offset,
        below: Offset,
        wanted: impl Fn(&Block) -> bool,
    ) -> Result<Option<Block>, IndexError> {
        let (mut low, mut high) = (from, below);
        let mut best = None;
        while low < high {
            let middle = Offset(low.0 + (high.0 - low.0) / 2);
            let block = self.block(middle)?;
            let (Some(first), Some(end)) = (block.first(), block.end()) else {
                break;
            };
            if wanted(&block) {
                high = first;
                best = Some(block);
            } else {
                low = end;
            }
        }
        Ok(best)
    }

    /// The first batch in `[from, below)` with a record of `time` or later, by the timestamps of the batches.
    pub(super) fn at_time(
        &self,
        time: i64,
        from: Offset,
        below: Offset,
    ) -> Result<Option<BatchRef>, IndexError> {
        let reached = |block: &Block| block.max_before.max(block.max_within) >= time;
        let mut block = self.first_block(from, below, reached)?;
        // One step, unless a record that has been trimmed is younger than those behind it.
        while let Some(here) = block.take() {
            let found = here
                .from(from)
                .iter()
                .find(|batch| batch.max_timestamp >= time);
            if let Some(batch) = found.filter(|_| here.max_within >= time) {
                return Ok(Some(*batch).filter(|batch| batch.base_offset < below));
            }
            block = match here.end().filter(|end| *end < below) {
                Some(end) => Some(self.block(end)?),
                None => None,
            };
        }
        Ok(None)
    }

    /// The offset of the first batch in `[from, below)` that stands in an entry behind `index`; `below` when none does.
    pub(super) fn behind(
        &self,
        index: LogIndex,
        from: Offset,
        below: Offset,
    ) -> Result<Offset, IndexError> {
        let ends_behind = |block: &Block| {
            block
                .batches
                .last()
                .is_some_and(|batch| batch.entry.index > index)
        };
        let block = self.first_block(from, below, ends_behind)?;
        let batch = block.and_then(|block| {
            block
                .from(from)
                .iter()
                .find(|batch| batch.entry.index > index)
                .copied()
        });
        Ok(batch.map_or(below, |batch| batch.base_offset.max(from)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Older blocks in a map.
    #[derive(Debug, Default)]
    pub(in crate::partition) struct Kept(pub(in crate::partition) BTreeMap<u64, Bytes>);

    impl Blocks for Kept {
        fn at_or_below(&self, offset: Offset) -> Result<Option<(u64, Bytes)>, StorageError> {
            let found = self.0.range(..=offset.0).next_back();
            Ok(found.map(|(key, bytes)| (*key, bytes.clone())))
        }
    }

    fn batch() -> impl Strategy<Value = (u32, u64, u64, u32, i64)> {
        // Rarely a late one, so that blocks differ in their latest timestamps.
        let time = prop_oneof![300 => 0..10_i64, 1 => 0..1_000_i64];
        (1..4_u32, 0..3_u64, 0..2_u64, 1..500_u32, time)
    }

    /// The batches, and an index of them with checkpoints made every `every` batches.
    fn build(
        shapes: Vec<(u32, u64, u64, u32, i64)>,
        every: usize,
    ) -> (Vec<BatchRef>, OffsetIndex, Kept) {
        let (mut all, mut index, mut kept) = (Vec::new(), OffsetIndex::default(), Kept::default());
        let (mut next, mut entry) = (Offset(0), EntryId::default());
        for (n, (count, more_index, more_epoch, size, max_timestamp)) in
            shapes.into_iter().enumerate()
        {
            entry.index.0 += more_index;
            entry.epoch.0 += more_epoch;
            let batch = BatchRef {
                base_offset: next,
                count,
                entry,
                position: 1,
                size,
                max_timestamp,
            };
            next = batch.end();
            all.push(batch);
            index.push(batch);
            if n % every == 0 {
                kept.0.extend(index.hand_out());
            }
        }
        (all, index, kept)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Goal: every search finds what a walk over all batches finds, wherever the blocks lie. Method: random batches and
        /// checkpoints, one random question of each kind, and a random log start.
        #[test]
        fn searches_agree_with_a_walk(
            shapes in proptest::collection::vec(batch(), 1..3_000),
            every in 1..2_000_usize,
            (at, start, to) in any::<(prop::sample::Index, prop::sample::Index, prop::sample::Index)>(),
            time in 0..1_010_i64,
            bytes_max in 0..20_000_usize,
        ) {
            let (all, mut index, kept) = build(shapes, every);
            let end = all.last().unwrap().end();
            let start = all[start.index(all.len())].base_offset;
            let below = all[to.index(all.len())].end().max(start);
            index.trim(start);
            let lookup = Lookup { memory: |offset| index.block(offset), older: &kept };

            let from = Offset(at.index(usize::try_from(end.0).unwrap()) as u64).max(start);
            let mut bytes = 0;
            let walk: Vec<BatchRef> = all.iter().copied()
                .filter(|batch| batch.end() > from && batch.end() <= below)
                .enumerate()
                .take_while(|(n, batch)| { bytes += batch.size as usize; *n == 0 || bytes <= bytes_max })
                .map(|(_, batch)| batch)
                .collect();
            prop_assert_eq!(lookup.batches(from, below, bytes_max).unwrap(), walk);

            let walk = all.iter().copied()
                .find(|batch| batch.base_offset >= start && batch.max_timestamp >= time)
                .filter(|batch| batch.base_offset < below);
            prop_assert_eq!(lookup.at_time(time, start, below).unwrap(), walk);

            let probe = all[at.index(all.len())].entry.index;
            let walk = all.iter().find(|batch| batch.base_offset >= start && batch.entry.index > probe);
            let walk = walk.map_or(end, |batch| batch.base_offset);
            prop_assert_eq!(lookup.behind(probe, start, end).unwrap(), walk);
            if let Some(known) = index.behind(probe, end) {
                let anywhere = all.iter().find(|batch| batch.entry.index > probe).map_or(end, |batch| batch.base_offset);
                prop_assert_eq!(known, anywhere);
            }
        }

        /// Goal: blocks survive packing within 4 KiB, whatever they hold. Method: full blocks of extreme numbers; damaged bytes.
        #[test]
        fn blocks_are_packed_within_their_bound(
            shapes in proptest::collection::vec(any::<(u32, u64, u64, u32, u32, i64)>(), 1..=BLOCK_BATCHES),
            first in 0..u64::from(u32::MAX),
            (cut, flip) in any::<(prop::sample::Index, u8)>(),
        ) {
            let mut block = Block { max_before: i64::MIN, ..Block::default() };
            let mut base_offset = Offset(first);
            for (count, index, epoch, position, size, max_timestamp) in shapes {
                let entry = EntryId { epoch: LeaderEpoch(epoch), index: LogIndex(index) };
                let batch = BatchRef { base_offset, count: count.max(1), entry, position, size, max_timestamp };
                base_offset = batch.end();
                block.push(batch);
            }
            let bytes = block.pack();
            prop_assert!(bytes.len() <= 4_096, "{} bytes", bytes.len());
            prop_assert_eq!(Block::unpack(Offset(first), &bytes).unwrap(), block);
            let mut damaged = bytes.to_vec();
            let at = cut.index(damaged.len());
            damaged[at] ^= flip;
            Block::unpack(Offset(first), &damaged).ok();
            Block::unpack(Offset(u64::MAX - 1), &damaged).ok();
            Block::unpack(Offset(first), &damaged[..at]).ok();
        }
    }

    /// Goal: memory stays bounded, and a block is not dropped before a checkpoint that holds it is over. Method: many blocks,
    /// few checkpoints.
    #[test]
    fn blocks_leave_memory_one_checkpoint_later() {
        let shapes = vec![(1, 1, 0, 10, 0); BLOCK_BATCHES * 40];
        let (_, mut index, _) = build(shapes, usize::MAX);
        assert_eq!(index.unsaved(), 40);
        assert_eq!(index.hand_out().len(), 40);
        assert_eq!((index.unsaved(), index.first()), (0, Some(Offset(0))));
        assert!(index.hand_out().is_empty());
        assert_eq!(index.complete.len(), TAIL_BLOCKS);
    }
}
