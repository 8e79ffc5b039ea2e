//! What the durable part of the journal says: per group the replica, vote, bounds and where each entry is.
//!
//! Owns the meaning of a frame ([`Ledger::apply`]), the layout of the catalog, and the digest that tells whether
//! the catalog can be trusted. The same code runs at open, over the frames found, and later, over the frames
//! the committer has made durable. Changes gather in memory and go to the catalog together with the journal
//! position they stand for. Knows no thread and no file.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use serde::{Deserialize, Serialize};

use super::catalog::{Catalog, CatalogError, Change, VALUE_MAX};
use super::frame::{FORMAT, Head, JOURNAL, Kind};
use crate::types::{EntryId, GroupId, Incarnation, LeaderEpoch, LogIndex, decode, encode};

/// Entries of one block.
pub(super) const BLOCK: u64 = 64;
/// Bytes of a checkpoint in one catalog value.
const CHUNK: usize = VALUE_MAX - 64;

/// Where an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) term: u64,
    pub(super) position: u64,
    pub(super) length: u32,
    pub(super) entry: u8,
}

/// The places of up to [`BLOCK`] consecutive entries, by index modulo [`BLOCK`].
pub(super) type Block = BTreeMap<u8, Place>;

/// A group as the catalog keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Meta {
    /// Unknown only while a scan has not reached the frame that carries it.
    pub(super) replica: Option<u64>,
    pub(super) vote: Option<Vec<u8>>,
    pub(super) purged: Option<EntryId>,
    /// First and one behind the last index; equal when there is no entry.
    pub(super) first: u64,
    pub(super) next: u64,
    /// Entries between the two; equal to their distance once a scan is complete.
    pub(super) count: u64,
    /// The last entry, or the purged one.
    pub(super) last: Option<EntryId>,
    /// Checksum of the group's last frame.
    pub(super) chain: u32,
    /// Where the base is: id, position and payload length.
    pub(super) base: Option<(EntryId, u64, u32)>,
    group_at: u64,
    vote_at: Option<u64>,
    purge_at: Option<u64>,
}

impl Meta {
    /// The oldest position of a frame, not an entry's, that the group cannot do without.
    pub(super) fn oldest(&self) -> u64 {
        let base = self.base.map(|(_, position, _)| position);
        let others = [self.vote_at, self.purge_at, base];
        others.into_iter().flatten().fold(self.group_at, u64::min)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: u32,
    incarnation: Incarnation,
    position: u64,
    first_segment: u64,
    journal_chain: u32,
    count: u64,
    digest: u128,
}

const HEADER: &[u8] = b"h";

fn key(kind: u8, group: GroupId, number: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(17);
    key.push(kind);
    key.extend_from_slice(&group.0.to_be_bytes());
    key.extend_from_slice(&number.to_be_bytes());
    key
}

fn meta_key(group: GroupId) -> Vec<u8> {
    key(b'g', group, 0)
}

fn block_key(group: GroupId, block: u64) -> Vec<u8> {
    key(b'e', group, block)
}

/// The key of a state machine's index block.
pub(super) fn index_key(group: GroupId, number: u64) -> Vec<u8> {
    key(b'i', group, number)
}

fn checkpoint_key(group: GroupId, index: u64, chunk: u32) -> Vec<u8> {
    let mut key = key(b'c', group, index);
    key.extend_from_slice(&chunk.to_be_bytes());
    key
}

fn split(key: &[u8]) -> Option<(u8, GroupId, u64)> {
    let (kind, rest) = key.split_first()?;
    let (group, rest) = rest.split_first_chunk::<8>()?;
    let number = rest.first_chunk::<8>()?;
    Some((
        *kind,
        GroupId(u64::from_be_bytes(*group)),
        u64::from_be_bytes(*number),
    ))
}

/// A hash of one pair; the digest is the sum over all pairs, so order does not matter and a pair can be taken out.
fn hash(key: &[u8], value: &[u8]) -> u128 {
    const K1: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
    const K2: u128 = 0xd6e8_feb8_6659_fd93_a5a3_564e_27f8_8643;
    let mut state = (key.len() as u128) << 64 | value.len() as u128;
    for part in [key, value] {
        for chunk in part.chunks(8) {
            let mut word = [0_u8; 8];
            for (to, from) in word.iter_mut().zip(chunk) {
                *to = *from;
            }
            state = (state ^ u128::from(u64::from_be_bytes(word))).wrapping_mul(K1);
            state ^= state >> 61;
        }
    }
    state = (state ^ (state >> 67)).wrapping_mul(K2);
    state ^ (state >> 59)
}

fn put_block(block: &Block) -> Vec<u8> {
    use bytes::BufMut;
    let mut out = Vec::with_capacity(block.len() * 22);
    for (slot, place) in block {
        out.put_u8(*slot);
        out.put_u8(place.entry);
        out.put_u32(place.length);
        out.put_u64(place.term);
        out.put_u64(place.position);
    }
    out
}

fn get_block(mut bytes: &[u8]) -> Block {
    let mut block = Block::new();
    while bytes.len() >= 22 {
        let slot = bytes.get_u8();
        let entry = bytes.get_u8();
        let length = bytes.get_u32();
        let place = Place {
            entry,
            length,
            term: bytes.get_u64(),
            position: bytes.get_u64(),
        };
        block.insert(slot, place);
    }
    block
}

fn slot(index: u64) -> u8 {
    u8::try_from(index % BLOCK).unwrap_or(0)
}

/// The places of the entries `[from, to]` that the catalog knows, by index.
pub(super) fn places(
    catalog: &dyn Catalog,
    group: GroupId,
    from: u64,
    to: u64,
) -> Result<BTreeMap<u64, Place>, CatalogError> {
    let mut found = BTreeMap::new();
    for number in from / BLOCK..=to / BLOCK {
        let Some(bytes) = catalog.get(&block_key(group, number))? else {
            continue;
        };
        let block = get_block(&bytes);
        let entries = block
            .into_iter()
            .map(|(slot, place)| (number * BLOCK + u64::from(slot), place));
        found.extend(entries.filter(|(index, _)| (from..=to).contains(index)));
    }
    Ok(found)
}

/// The changes that store a checkpoint.
pub(super) fn checkpoint_changes(group: GroupId, checkpoint: &super::Checkpoint) -> Vec<Change> {
    let mut bytes = bytes::BytesMut::new();
    super::frame::put_checkpoint(&mut bytes, checkpoint);
    let index = checkpoint.id.index.0;
    let mut changes = Vec::new();
    for (chunk, part) in bytes.chunks(CHUNK).enumerate() {
        let mut value = Vec::with_capacity(part.len() + 12);
        value.extend_from_slice(&checkpoint.id.epoch.0.to_be_bytes());
        value.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        value.extend_from_slice(part);
        let chunk = u32::try_from(chunk).unwrap_or(u32::MAX);
        changes.push((checkpoint_key(group, index, chunk), Some(value)));
    }
    changes
}

/// A checkpoint in the catalog.
pub(super) fn checkpoint(
    catalog: &dyn Catalog,
    group: GroupId,
    id: EntryId,
) -> Result<Option<super::Checkpoint>, CatalogError> {
    let mut bytes = Vec::new();
    let mut total = None;
    let mut chunk = 0;
    while total.is_none_or(|total| bytes.len() < total) {
        let Some(value) = catalog.get(&checkpoint_key(group, id.index.0, chunk))? else {
            return Ok(None);
        };
        let Some((head, part)) = value.split_first_chunk::<12>() else {
            return Ok(None);
        };
        let mut head = head.as_slice();
        if head.get_u64() != id.epoch.0 {
            return Ok(None);
        }
        total = Some(head.get_u32() as usize);
        bytes.extend_from_slice(part);
        chunk += 1;
    }
    Ok(super::frame::get_checkpoint(id, &bytes))
}

/// The changes that remove the checkpoints of a group with an index in `[from, to]`.
pub(super) fn drop_checkpoints(
    catalog: &dyn Catalog,
    group: GroupId,
    from: u64,
    to: u64,
) -> Result<Vec<Change>, CatalogError> {
    let (low, high) = (
        checkpoint_key(group, from, 0),
        checkpoint_key(group, to, u32::MAX),
    );
    Ok(catalog
        .keys(&low, &high)?
        .into_iter()
        .map(|key| (key, None))
        .collect())
}

/// The changes that remove the index blocks of a group with a number in `[from, to]`.
pub(super) fn drop_index(
    catalog: &dyn Catalog,
    group: GroupId,
    from: u64,
    to: u64,
) -> Result<Vec<Change>, CatalogError> {
    let keys = catalog.keys(&index_key(group, from), &index_key(group, to))?;
    Ok(keys.into_iter().map(|key| (key, None)).collect())
}

/// Largest index of an entry.
const INDEX_MAX: u64 = u64::MAX / 2;

/// Why frames do not make sense together.
#[derive(Debug)]
pub(super) enum LedgerError {
    Catalog(CatalogError),
    Damaged(String),
}

impl From<CatalogError> for LedgerError {
    fn from(error: CatalogError) -> Self {
        Self::Catalog(error)
    }
}

/// The state of the durable journal up to `position`.
#[derive(Debug)]
pub(super) struct Ledger {
    catalog: Arc<dyn Catalog>,
    incarnation: Incarnation,
    /// Everything before this is part of the state.
    pub(super) position: u64,
    /// Where the journal's first segment begins.
    pub(super) first_segment: u64,
    pub(super) groups: BTreeMap<GroupId, Meta>,
    /// Ids of the checkpoints in the catalog, per group.
    pub(super) checkpoints: BTreeMap<GroupId, BTreeMap<u64, EntryId>>,
    /// Bytes of live entries per segment, by the segment's base.
    pub(super) live: BTreeMap<u64, u64>,
    journal_chain: Option<u32>,
    /// The scan began behind frames that are gone: a group may show up before what carries its state.
    suffix: bool,
    count: u64,
    digest: u128,
    blocks: BTreeMap<(GroupId, u64), Block>,
    changed: BTreeSet<GroupId>,
    gone: Vec<Vec<u8>>,
}

/// Refuses an index that no log can have come to: sums go over, and looking at every entry in between would take for ever.
fn check_index(meta: &Meta, head: &Head) -> Result<(), LedgerError> {
    // Each entry on the way to another one has had a frame in front of this one.
    let frames = head.position / super::frame::FRAME_HEADER as u64;
    let near = |from: u64, to: u64| to.saturating_sub(from) <= frames;
    let is_empty = meta.first == meta.next;
    let fits = !head.kind.is_entry()
        || is_empty
        || (near(meta.next, head.index) && near(head.index, meta.first));
    if fits && head.index <= INDEX_MAX {
        return Ok(());
    }
    Err(LedgerError::Damaged(format!(
        "group {}: entry {} in a log from {} to {}",
        head.group, head.index, meta.first, meta.next
    )))
}

impl Ledger {
    /// Nothing known yet.
    pub(super) fn empty(
        catalog: Arc<dyn Catalog>,
        incarnation: Incarnation,
        bases: &[u64],
    ) -> Self {
        let first = bases.first().copied().unwrap_or(0);
        Self {
            catalog,
            incarnation,
            position: first,
            first_segment: 0,
            groups: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            live: bases.iter().map(|base| (*base, 0)).collect(),
            // A journal that begins at 0 has no earlier frame that could be missing.
            journal_chain: (first == 0).then_some(0),
            suffix: first != 0,
            count: 0,
            digest: 0,
            blocks: BTreeMap::new(),
            changed: BTreeSet::new(),
            gone: Vec::new(),
        }
    }

    /// What the catalog says, when it is whole and of this directory; `None` when it cannot be trusted.
    pub(super) fn load(
        catalog: &Arc<dyn Catalog>,
        incarnation: Incarnation,
        bases: &[u64],
    ) -> Result<Option<Self>, CatalogError> {
        let Some(bytes) = catalog.get(HEADER)? else {
            return Ok(None);
        };
        let Ok(header) = decode::<Header>(&bytes) else {
            return Ok(None);
        };
        if header.format != FORMAT || header.incarnation != incarnation {
            return Ok(None);
        }
        let mut ledger = Self::empty(catalog.clone(), incarnation, bases);
        let mut sound = true;
        catalog.scan(&mut |key, value| {
            if key == HEADER {
                // It carries the digest, so the digest cannot cover it; its own checks are its fields' meaning.
                return;
            }
            ledger.count += 1;
            ledger.digest = ledger.digest.wrapping_add(hash(key, value));
            sound &= ledger.learn(key, value);
        })?;
        ledger.position = header.position;
        ledger.first_segment = header.first_segment;
        ledger.journal_chain = Some(header.journal_chain);
        ledger.suffix = false;
        ledger.digest = ledger.digest.wrapping_add(header_hash(&header));
        let whole = ledger.count == header.count && ledger.digest == header.digest;
        ledger.digest = ledger.digest.wrapping_sub(header_hash(&header));
        Ok((sound && whole).then_some(ledger))
    }

    fn learn(&mut self, key: &[u8], value: &[u8]) -> bool {
        let Some((kind, group, number)) = split(key) else {
            return false;
        };
        match kind {
            b'g' => {
                let Ok(meta) = decode(value) else {
                    return false;
                };
                self.groups.insert(group, meta);
            }
            b'e' => {
                for place in get_block(value).values() {
                    self.count_live(place, true);
                }
            }
            b'c' => {
                let Some(term) = value.first_chunk::<8>() else {
                    return false;
                };
                let epoch = LeaderEpoch(u64::from_be_bytes(*term));
                let id = EntryId {
                    epoch,
                    index: LogIndex(number),
                };
                self.checkpoints
                    .entry(group)
                    .or_default()
                    .insert(number, id);
            }
            b'i' => {}
            _ => return false,
        }
        true
    }

    fn count_live(&mut self, place: &Place, more: bool) {
        let Some((_, bytes)) = self.live.range_mut(..=place.position).next_back() else {
            return;
        };
        let size = u64::from(place.length) + super::frame::FRAME_HEADER as u64;
        *bytes = if more {
            *bytes + size
        } else {
            bytes.saturating_sub(size)
        };
    }

    fn block(&mut self, group: GroupId, number: u64) -> Result<&mut Block, CatalogError> {
        use std::collections::btree_map::Entry;
        match self.blocks.entry((group, number)) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let stored = self.catalog.get(&block_key(group, number))?;
                Ok(entry.insert(stored.map(|bytes| get_block(&bytes)).unwrap_or_default()))
            }
        }
    }

    /// Where the entry at `index` is.
    pub(super) fn place(&self, group: GroupId, index: u64) -> Result<Option<Place>, CatalogError> {
        // Not through `block`: looking must not make a block a changed one.
        if let Some(block) = self.blocks.get(&(group, index / BLOCK)) {
            return Ok(block.get(&slot(index)).copied());
        }
        let stored = self.catalog.get(&block_key(group, index / BLOCK))?;
        Ok(stored.and_then(|bytes| get_block(&bytes).get(&slot(index)).copied()))
    }

    fn drop_entries(&mut self, group: GroupId, from: u64, to: u64) -> Result<u64, CatalogError> {
        let mut dropped = 0;
        let mut index = from;
        while index < to {
            let number = index / BLOCK;
            let end = to.min((number + 1) * BLOCK);
            let block = self.block(group, number)?;
            let slots: Vec<u8> = (index..end).map(slot).collect();
            let gone: Vec<Place> = slots.iter().filter_map(|slot| block.remove(slot)).collect();
            dropped += gone.len() as u64;
            for place in &gone {
                self.count_live(place, false);
            }
            index = end;
        }
        Ok(dropped)
    }

    /// A new segment begins at `base`.
    pub(super) fn segment(&mut self, base: u64, position: u64) {
        self.live.entry(base).or_insert(0);
        self.position = position;
    }

    /// Takes in the next frame of the journal. `payload` is needed for frames other than entries.
    pub(super) fn apply(&mut self, head: &Head, payload: &Bytes) -> Result<(), LedgerError> {
        let damaged = |what: &str| {
            let at = head.position;
            Err(LedgerError::Damaged(format!(
                "group {} at journal position {at}: {what}",
                head.group
            )))
        };
        self.position = head.end();
        if head.group == JOURNAL {
            if head.kind != Kind::Drop {
                return damaged("a frame of the journal of an unknown kind");
            }
            if self.journal_chain.is_some_and(|chain| chain != head.chain) {
                return damaged("an earlier frame of the journal is missing");
            }
            self.journal_chain = Some(head.crc);
            self.first_segment = self.first_segment.max(head.index);
            return Ok(());
        }
        let group = head.group;
        self.changed.insert(group);
        if head.kind == Kind::Created {
            if self.groups.contains_key(&group) || head.chain != 0 {
                return damaged("created twice");
            }
        } else if let Some(meta) = self.groups.get(&group) {
            if meta.chain != head.chain {
                return damaged("an earlier frame of this group is missing");
            }
        } else if !self.suffix {
            return damaged("the group was never created");
        }
        if head.kind == Kind::Removed {
            return Ok(self.remove(group)?);
        }
        let mut meta = self.groups.remove(&group).unwrap_or_else(|| Meta {
            group_at: head.position,
            ..Meta::default()
        });
        meta.chain = head.crc;
        let done = self.apply_to(&mut meta, head, payload);
        self.groups.insert(group, meta);
        done
    }

    fn apply_to(
        &mut self,
        meta: &mut Meta,
        head: &Head,
        payload: &Bytes,
    ) -> Result<(), LedgerError> {
        let group = head.group;
        check_index(meta, head)?;
        match head.kind {
            Kind::Entry | Kind::CarriedEntry => {
                if head.kind == Kind::Entry && head.index < meta.next {
                    self.truncate(meta, group, head.index)?;
                }
                let place = Place {
                    term: head.term,
                    position: head.position,
                    length: head.length,
                    entry: head.entry,
                };
                let old = self
                    .block(group, head.index / BLOCK)?
                    .insert(slot(head.index), place);
                self.count_live(&place, true);
                match old {
                    Some(old) => self.count_live(&old, false),
                    None => meta.count += 1,
                }
                if meta.first == meta.next {
                    (meta.first, meta.next) = (head.index, head.index + 1);
                    meta.last = Some(head.id());
                }
                meta.first = meta.first.min(head.index);
                if head.index >= meta.next {
                    meta.next = head.index + 1;
                    meta.last = Some(head.id());
                }
            }
            Kind::Vote => {
                meta.vote = Some(payload.to_vec());
                meta.vote_at = Some(head.position);
            }
            Kind::Truncate => {
                self.truncate(meta, group, head.index)?;
                self.drop_checkpoints_from(group, head.index)?;
            }
            Kind::Purge => {
                if meta
                    .purged
                    .is_none_or(|purged| purged.index.0 <= head.index)
                {
                    let until = meta.next.min(head.index + 1);
                    meta.count -= self.drop_entries(group, meta.first, until)?;
                    meta.purged = Some(head.id());
                    meta.first = meta.first.max(head.index + 1);
                    if meta.next <= meta.first {
                        meta.next = meta.first;
                        meta.last = meta.purged;
                    }
                }
                meta.purge_at = Some(head.position);
            }
            Kind::Base => {
                meta.base = Some((head.id(), head.position, head.length));
                if payload.first() == Some(&1) {
                    self.drop_checkpoints_from(group, 0)?;
                    let gone = drop_index(&*self.catalog, group, 0, u64::MAX)?;
                    self.gone.extend(gone.into_iter().map(|(key, _)| key));
                } else {
                    self.drop_checkpoints_until(group, head.index)?;
                }
            }
            Kind::Created | Kind::CarriedGroup => {
                let Some(replica) = payload.first_chunk::<8>() else {
                    let what = format!("group {group}: a replica of {} bytes", payload.len());
                    return Err(LedgerError::Damaged(what));
                };
                meta.replica = Some(u64::from_be_bytes(*replica));
                meta.group_at = head.position;
            }
            Kind::Removed | Kind::Drop => {}
        }
        Ok(())
    }

    fn truncate(&mut self, meta: &mut Meta, group: GroupId, next: u64) -> Result<(), CatalogError> {
        if next >= meta.next {
            return Ok(());
        }
        meta.count -= self.drop_entries(group, next.max(meta.first), meta.next)?;
        meta.next = next.max(meta.first);
        meta.last = meta.purged;
        if meta.next > meta.first {
            let index = meta.next - 1;
            // While a scan is under way the entry may yet be carried; `complete` looks again.
            if let Some(place) = self.place(group, index)? {
                let epoch = LeaderEpoch(place.term);
                meta.last = Some(EntryId {
                    epoch,
                    index: LogIndex(index),
                });
            }
        }
        Ok(())
    }

    fn drop_checkpoints_from(&mut self, group: GroupId, index: u64) -> Result<(), CatalogError> {
        if let Some(known) = self.checkpoints.get_mut(&group) {
            known.retain(|at, _| *at < index);
            let gone = drop_checkpoints(&*self.catalog, group, index, u64::MAX)?;
            self.gone.extend(gone.into_iter().map(|(key, _)| key));
        }
        Ok(())
    }

    fn drop_checkpoints_until(&mut self, group: GroupId, index: u64) -> Result<(), CatalogError> {
        if let Some(known) = self.checkpoints.get_mut(&group) {
            known.retain(|at, _| *at > index);
            let gone = drop_checkpoints(&*self.catalog, group, 0, index)?;
            self.gone.extend(gone.into_iter().map(|(key, _)| key));
        }
        Ok(())
    }

    fn remove(&mut self, group: GroupId) -> Result<(), CatalogError> {
        if let Some(meta) = self.groups.remove(&group) {
            self.drop_entries(group, meta.first, meta.next)?;
        }
        self.checkpoints.remove(&group);
        for kind in [b'g', b'e', b'c', b'i'] {
            let mut high = key(kind, group, u64::MAX);
            high.extend_from_slice(&[u8::MAX; 4]);
            self.gone
                .extend(self.catalog.keys(&key(kind, group, 0), &high)?);
        }
        Ok(())
    }

    /// Whether every group makes sense, now that the whole journal has been seen.
    pub(super) fn complete(&mut self) -> Result<(), LedgerError> {
        let groups: Vec<GroupId> = self.groups.keys().copied().collect();
        for group in groups {
            let Some(mut meta) = self.groups.remove(&group) else {
                continue;
            };
            let damaged =
                |what: String| Err(LedgerError::Damaged(format!("group {group}: {what}")));
            if meta.replica.is_none() {
                return damaged("nothing says which replica it is".to_owned());
            }
            if meta.first == meta.next {
                // An empty log begins behind what was purged; a scan may have seen the two in another order.
                let first = meta.purged.map_or(0, |purged| purged.index.0 + 1);
                (meta.first, meta.next, meta.last) = (first, first, meta.purged);
            }
            let expected = meta.purged.map_or(meta.first, |purged| purged.index.0 + 1);
            if meta.count != meta.next - meta.first || meta.first != expected {
                let Meta {
                    first, next, count, ..
                } = meta;
                return damaged(format!(
                    "{count} entries found from index {first} to {next}, where {} are due from {expected}",
                    next - first
                ));
            }
            if meta.next > meta.first {
                let index = meta.next - 1;
                let Some(place) = self.place(group, index)? else {
                    return damaged(format!("entry {index} is missing"));
                };
                meta.last = Some(EntryId {
                    epoch: LeaderEpoch(place.term),
                    index: LogIndex(index),
                });
            }
            self.groups.insert(group, meta);
        }
        Ok(())
    }

    /// Checksum of the journal's own last frame.
    pub(super) fn journal_chain(&self) -> u32 {
        self.journal_chain.unwrap_or(0)
    }

    /// How many changed blocks wait to be written.
    pub(super) fn pending(&self) -> usize {
        self.blocks.len() + self.gone.len()
    }

    /// Forgets segments before `first`: their files are about to go.
    pub(super) fn forget_segments(&mut self, first: u64) {
        self.live = self.live.split_off(&first);
    }

    /// Brings the catalog to `position`, with `more` changes, in one step.
    pub(super) fn sync(&mut self, more: Vec<Change>) -> Result<(), CatalogError> {
        let mut changes: BTreeMap<Vec<u8>, Option<Vec<u8>>> = BTreeMap::new();
        changes.extend(
            std::mem::take(&mut self.gone)
                .into_iter()
                .map(|key| (key, None)),
        );
        for ((group, number), block) in std::mem::take(&mut self.blocks) {
            let value = (!block.is_empty()).then(|| put_block(&block));
            changes.insert(block_key(group, number), value);
        }
        for group in std::mem::take(&mut self.changed) {
            changes.insert(meta_key(group), self.groups.get(&group).map(encode));
        }
        changes.extend(more);
        for (key, value) in &changes {
            if let Some(old) = self.catalog.get(key)? {
                self.count -= 1;
                self.digest = self.digest.wrapping_sub(hash(key, &old));
            }
            if let Some(new) = value {
                self.count += 1;
                self.digest = self.digest.wrapping_add(hash(key, new));
            }
        }
        let mut header = Header {
            format: FORMAT,
            incarnation: self.incarnation,
            position: self.position,
            first_segment: self.first_segment,
            journal_chain: self.journal_chain.unwrap_or(0),
            count: self.count,
            digest: 0,
        };
        header.digest = self.digest.wrapping_add(header_hash(&header));
        changes.insert(HEADER.to_vec(), Some(encode(&header)));
        self.catalog.apply(changes.into_iter().collect())?;
        self.catalog.flush()
    }
}

/// The header's part of the digest: all of it but the digest.
fn header_hash(header: &Header) -> u128 {
    let bare = Header {
        digest: 0,
        ..*header
    };
    hash(HEADER, &encode(&bare))
}
