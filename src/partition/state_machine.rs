//! A partition's state machine: offsets, retries and the log start, as a function of the committed commands alone.
//!
//! Owns the commands and the verdicts of a partition's group, and the small state behind them. Reads the 61-byte headers of the
//! batches it applies and never a record. The records themselves stay in the Raft log; the index says where.
//!
//! The state is shared with readers under one lock, held for a few lookups at a time and never across an await. Everything a
//! reader may rely on is set while the command is applied.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::index::{BatchRef, Block, OffsetIndex};
use super::producer_table::{Admission, ProducerTable, Saved};
use crate::raft::StateMachine;
use crate::record::BatchHeader;
use crate::types::{DecodeError, EntryId, LeaderEpoch, Offset, decode, encode};

/// Record bytes applied between two checkpoints.
const CHECKPOINT_BYTES: usize = 8 << 20;
/// Commands applied between two checkpoints.
const CHECKPOINT_COMMANDS: usize = 4_096;
/// Complete index blocks between two checkpoints.
const CHECKPOINT_BLOCKS: usize = 64;

const STATE_VERSION: u8 = 1;
const KIND_RECORDS: u8 = 1;
const KIND_TRIM: u8 = 2;

/// The command that appends the batches in `parts`, which lie back to back.
pub(super) fn records_command<'a>(parts: impl Iterator<Item = &'a Bytes> + Clone) -> Bytes {
    let bytes = 1 + parts.clone().map(Bytes::len).sum::<usize>();
    let mut command = BytesMut::with_capacity(bytes);
    command.put_u8(KIND_RECORDS);
    parts.for_each(|part| command.extend_from_slice(part));
    command.freeze()
}

/// The command that moves the log start to `offset`.
pub(super) fn trim_command(offset: Offset) -> Bytes {
    let mut command = BytesMut::with_capacity(9);
    command.put_u8(KIND_TRIM);
    command.put_u64(offset.0);
    command.freeze()
}

/// What became of one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Verdict {
    /// It was appended here.
    Appended { base_offset: Offset },
    /// It had been appended here, by the leader of this epoch.
    Duplicate {
        base_offset: Offset,
        epoch: LeaderEpoch,
    },
    /// It was not appended: its sequence number is not the next one.
    OutOfOrder { expected: i32, found: i32 },
    /// It was not appended: its producer has been replaced.
    Fenced { current: i16, found: i16 },
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Outcome {
    /// To records: one verdict for each batch, in order.
    Records(Vec<Verdict>),
    /// To a trim: the log start now.
    Trimmed(Offset),
}

/// The state: what a checkpoint holds, and the part of the index in memory.
#[derive(Debug, Default)]
pub(super) struct LogState {
    /// The offset the next record gets.
    pub(super) next_offset: Offset,
    /// The first offset that can be read.
    pub(super) log_start: Offset,
    /// The last command applied.
    pub(super) applied: Option<EntryId>,
    /// Where the batches are.
    pub(super) index: OffsetIndex,
    producers: ProducerTable,
}

/// The state as a checkpoint keeps it.
#[derive(Serialize, Deserialize)]
struct SavedState {
    version: u8,
    next_offset: Offset,
    log_start: Offset,
    applied: Option<EntryId>,
    /// The index block that grows: its first offset and its packed form.
    open_first: Offset,
    open: Vec<u8>,
    producers: Saved,
}

impl LogState {
    fn append(&mut self, id: EntryId, position: usize, header: &BatchHeader) -> Verdict {
        let base_offset = self.next_offset;
        if let Some(stamp) = header.producer() {
            match self.producers.admit(stamp, header.count) {
                Admission::Next => {
                    self.producers
                        .accept(stamp, header.count, base_offset, id.epoch, id.index);
                }
                Admission::Duplicate { base_offset, epoch } => {
                    self.producers.touch(stamp.id, id.index);
                    return Verdict::Duplicate { base_offset, epoch };
                }
                Admission::OutOfOrder { expected, found } => {
                    return Verdict::OutOfOrder { expected, found };
                }
                Admission::Fenced { current, found } => return Verdict::Fenced { current, found },
            }
        }
        let batch = BatchRef {
            base_offset,
            count: header.count.unsigned_abs(),
            entry: id,
            position: u32::try_from(position).unwrap_or(u32::MAX),
            size: u32::try_from(header.size).unwrap_or(u32::MAX),
            max_timestamp: header.max_timestamp,
        };
        self.next_offset = batch.end();
        self.index.push(batch);
        Verdict::Appended { base_offset }
    }

    fn apply_records(&mut self, id: EntryId, command: &Bytes) -> Vec<Verdict> {
        let mut verdicts = Vec::with_capacity(1);
        let mut position = 1;
        while position < command.len() {
            match command.get(position..).map(BatchHeader::parse) {
                Some(Ok(header)) if header.count > 0 => {
                    verdicts.push(self.append(id, position, &header));
                    position += header.size;
                }
                _ => cannot_apply(
                    id,
                    &format!("no batch at byte {position} of {}", command.len()),
                ),
            }
        }
        verdicts
    }

    fn trim(&mut self, offset: Offset) -> Offset {
        self.log_start = self.log_start.max(offset.min(self.next_offset));
        self.index.trim(self.log_start);
        self.log_start
    }

    fn save(&self) -> Bytes {
        let open = self.index.open();
        let open_first = open
            .batches
            .first()
            .map_or(self.next_offset, |batch| batch.base_offset);
        let saved = SavedState {
            version: STATE_VERSION,
            next_offset: self.next_offset,
            log_start: self.log_start,
            applied: self.applied,
            open_first,
            open: open.pack().to_vec(),
            producers: self.producers.to_saved(),
        };
        encode(&saved).into()
    }

    fn load(state: &Bytes) -> Result<Self, DecodeError> {
        let saved: SavedState = decode(state)?;
        if saved.version != STATE_VERSION {
            return Err(DecodeError(format!(
                "partition state of version {}",
                saved.version
            )));
        }
        let open = Block::unpack(saved.open_first, &saved.open)?;
        let end = open.batches.last().map_or(saved.open_first, BatchRef::end);
        if end != saved.next_offset || saved.log_start > saved.next_offset {
            let (start, next) = (saved.log_start, saved.next_offset);
            return Err(DecodeError(format!(
                "partition state from {start} to {next}, indexed to {end}"
            )));
        }
        #[cfg(feature = "sim")]
        let saved = if crate::runtime::sim::makes(crate::runtime::sim::Bug::DuplicatesForgotten) {
            SavedState {
                producers: ProducerTable::default().to_saved(),
                ..saved
            }
        } else {
            saved
        };
        Ok(Self {
            next_offset: saved.next_offset,
            log_start: saved.log_start,
            applied: saved.applied,
            index: OffsetIndex::new(open),
            producers: ProducerTable::from_saved(saved.producers),
        })
    }
}

/// The state of one partition's replica, shared between the state machine, which alone changes it, and readers.
#[derive(Debug, Clone, Default)]
pub(super) struct SharedLog {
    state: Arc<Mutex<LogState>>,
    log_start: watch::Sender<Offset>,
}

impl SharedLog {
    /// The state, for a moment.
    pub(super) fn lock(&self) -> MutexGuard<'_, LogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log start, whenever it moves.
    pub(super) fn log_start(&self) -> watch::Receiver<Offset> {
        self.log_start.subscribe()
    }
}

/// Stops the replica at a committed command that it cannot apply: one that went on would differ from the others without
/// anyone seeing it. Commands are checked before they are proposed, and checksummed from then on.
#[allow(clippy::panic)]
fn cannot_apply(id: EntryId, what: &str) -> ! {
    panic!("entry {id} cannot be applied: {what}; a newer version may have written it");
}

/// The state machine of a data replica.
#[derive(Debug, Default)]
pub(super) struct PartitionMachine {
    log: SharedLog,
    bytes: usize,
    commands: usize,
}

impl PartitionMachine {
    /// The machine that changes `log`.
    pub(super) fn new(log: SharedLog) -> Self {
        Self {
            log,
            bytes: 0,
            commands: 0,
        }
    }

    fn publish_log_start(&self, log_start: Offset) {
        self.log.log_start.send_if_modified(|known| {
            let moved = *known != log_start;
            *known = log_start;
            moved
        });
    }
}

impl StateMachine for PartitionMachine {
    fn apply(&mut self, id: EntryId, command: &Bytes) -> Bytes {
        let mut state = self.log.lock();
        self.commands += 1;
        self.bytes = self.bytes.saturating_add(command.len());
        let kind = command.first().copied();
        let outcome = match kind {
            Some(KIND_RECORDS) => Outcome::Records(state.apply_records(id, command)),
            Some(KIND_TRIM) if command.len() == 9 => {
                let offset = command.get(1..).map_or(0, |mut bytes| bytes.get_u64());
                Outcome::Trimmed(state.trim(Offset(offset)))
            }
            _ => cannot_apply(id, &format!("command {kind:?} of {} bytes", command.len())),
        };
        state.applied = Some(id);
        drop(state);
        if let Outcome::Trimmed(log_start) = &outcome {
            self.publish_log_start(*log_start);
        }
        encode(&outcome).into()
    }

    fn wants_checkpoint(&self) -> bool {
        self.bytes >= CHECKPOINT_BYTES
            || self.commands >= CHECKPOINT_COMMANDS
            || self.log.lock().index.unsaved() >= CHECKPOINT_BLOCKS
    }

    fn checkpoint(&mut self) -> (Bytes, Vec<(u64, Bytes)>) {
        let mut state = self.log.lock();
        (self.bytes, self.commands) = (0, 0);
        let blocks = state.index.hand_out();
        (state.save(), blocks)
    }

    fn restore(&mut self, state: Option<&Bytes>) -> Result<(), DecodeError> {
        let restored = state.map_or_else(|| Ok(LogState::default()), LogState::load)?;
        let log_start = restored.log_start;
        (self.bytes, self.commands) = (0, 0);
        *self.log.lock() = restored;
        self.publish_log_start(log_start);
        Ok(())
    }
}

/// The state machine of a witness, which gets no commands: it keeps nothing.
#[derive(Debug)]
pub(super) struct WitnessMachine;

impl StateMachine for WitnessMachine {
    fn apply(&mut self, _id: EntryId, _command: &Bytes) -> Bytes {
        Bytes::new()
    }

    fn wants_checkpoint(&self) -> bool {
        false
    }

    fn checkpoint(&mut self) -> (Bytes, Vec<(u64, Bytes)>) {
        (Bytes::new(), Vec::new())
    }

    fn restore(&mut self, _state: Option<&Bytes>) -> Result<(), DecodeError> {
        // What a snapshot holds is the data replicas' state; a witness has no use for it.
        Ok(())
    }
}

#[cfg(test)]
mod tests;
