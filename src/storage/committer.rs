//! The one thread that writes the journal, for all groups, and the queue it works from.
//!
//! Owns the queue of tickets (their places in the journal are fixed when they are queued), the open segment, and
//! the order: write, sync, mark, hand over to the catalog, then tell the owners, newest ticket of a group only.
//! An error of a write or a sync is final: nothing is told to anybody afterwards. Takes the queue's lock alone, and
//! a group's lock only to let go of cached bytes.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::FutureExt;

use super::core::Core;
use super::disk::DiskFile;
use super::drive::{self, Wake, pace};
use super::frame::{Frame, Head, Kind, SEGMENT_HEADER, SegmentHead, put_frame, seed};
use super::group::Group;
use super::identity::Watermark;
use super::{Flushed, StorageError};
use crate::types::GroupId;

/// Bytes that may wait in the queue. Owners bound what they have in flight far below it; beyond it the disk
/// cannot be believed to come back.
pub(super) const QUEUE_BYTES_MAX: u64 = 512 << 20;
/// What an entry in memory costs beside its bytes.
const SLOT_BYTES: u64 = 96;
/// A batch up to this size is written into space prepared ahead, where a sync need not change the file's size.
const AHEAD_BATCH_MAX: u64 = 64 << 10;
/// Bytes prepared ahead.
const AHEAD: u64 = 1 << 20;

/// Whom to tell that a ticket is durable.
pub(super) enum Done {
    Nobody,
    /// The owner of a group's log; a newer one of the same group stands for all before it.
    Owner(Flushed),
    /// Somebody who waits for this very ticket.
    Waiter(Box<dyn FnOnce() + Send>),
}

pub(super) enum Work {
    Frames(Vec<Frame>),
    /// A new segment begins.
    Segment,
}

pub(super) struct Ticket {
    position: u64,
    bytes: u64,
    group: GroupId,
    work: Work,
    done: Done,
}

/// Whom to tell, in the order of the journal.
type Told = Vec<(GroupId, Done)>;

/// Entries whose bytes are in memory, oldest first.
struct Cached {
    group: Arc<Group>,
    index: u64,
    count: u64,
    bytes: u64,
    from: u64,
    to: u64,
}

pub(super) struct State {
    tickets: VecDeque<Ticket>,
    queued: u64,
    /// Where the next ticket begins, and the segment it is in.
    position: u64,
    segment: u64,
    cached: VecDeque<Cached>,
    cached_bytes: u64,
    closing: bool,
    stopped: bool,
}

/// The queue of the committer.
pub(super) struct Queue {
    state: Mutex<State>,
    wake: Wake,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Queue")
    }
}

impl Queue {
    pub(super) fn new(position: u64, segment: u64) -> Self {
        Self {
            state: Mutex::new(State {
                tickets: VecDeque::new(),
                queued: 0,
                position,
                segment,
                cached: VecDeque::new(),
                cached_bytes: 0,
                closing: false,
                stopped: false,
            }),
            wake: Wake::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `frames` of `group` as one; gives back where the first one begins. Entries are kept in memory.
    pub(super) fn push(
        &self,
        core: &Core,
        group: Option<&Arc<Group>>,
        frames: Vec<Frame>,
        done: Done,
    ) -> Result<u64, StorageError> {
        core.check()?;
        let bytes: u64 = frames.iter().map(Frame::size).sum();
        let mut state = self.lock();
        if state.closing || state.stopped {
            return Err(StorageError::Failed {
                what: "the store is closed".to_owned(),
            });
        }
        if state.queued + bytes > QUEUE_BYTES_MAX {
            let what = format!(
                "{} bytes wait to be written, the disk does not keep up",
                state.queued
            );
            drop(state);
            return Err(core.fail(what));
        }
        let wake = state.tickets.is_empty();
        let offset = state.position - state.segment;
        if offset > SEGMENT_HEADER && offset + bytes > core.config.segment_bytes {
            let position = state.position;
            state.tickets.push_back(Ticket {
                position,
                bytes: SEGMENT_HEADER,
                group: super::frame::JOURNAL,
                work: Work::Segment,
                done: Done::Nobody,
            });
            state.segment = position;
            state.position += SEGMENT_HEADER;
        }
        let position = state.position;
        if let (Some(group), Some(first)) = (group, frames.first()) {
            let count = frames.len() as u64;
            let payloads: u64 = frames.iter().map(|frame| frame.payload.len() as u64).sum();
            let cached = Cached {
                group: group.clone(),
                index: first.index,
                count,
                bytes: payloads + count * SLOT_BYTES,
                from: position,
                to: position + bytes,
            };
            state.cached_bytes += cached.bytes;
            state.cached.push_back(cached);
        }
        let group = frames
            .first()
            .map_or(super::frame::JOURNAL, |frame| frame.group);
        state.position += bytes;
        state.queued += bytes;
        state.tickets.push_back(Ticket {
            position,
            bytes,
            group,
            work: Work::Frames(frames),
            done,
        });
        drop(state);
        if wake {
            drive::wake(&self.wake);
        }
        Ok(position)
    }

    /// Bytes that wait.
    pub(super) fn queued(&self) -> u64 {
        self.lock().queued
    }

    /// Lets the committer end once everything queued is durable.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        drive::wake(&self.wake);
    }

    /// Whether the store was left behind without being closed.
    pub(super) fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Lets the committer end as soon as it looks; what is queued is lost.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        let lost = std::mem::take(&mut state.tickets);
        let cached = std::mem::take(&mut state.cached);
        drop(state);
        drive::wake(&self.wake);
        // Outside the lock: dropping a callback may run its owner's code.
        drop((lost, cached));
    }

    /// Waits for tickets and takes up to `max` bytes of them; `None` at the end.
    async fn take(&self, max: u64) -> Option<Vec<Ticket>> {
        drive::wait(&self.wake, &self.state, |state| {
            if state.stopped || (state.tickets.is_empty() && state.closing) {
                Some(None)
            } else if state.tickets.is_empty() {
                None
            } else {
                Some(Some(Self::batch(state, max)))
            }
        })
        .await
    }

    fn batch(state: &mut State, max: u64) -> Vec<Ticket> {
        let mut batch = Vec::with_capacity(state.tickets.len().min(1024));
        let mut bytes = 0;
        while let Some(ticket) = state.tickets.front() {
            if bytes > 0 && bytes + ticket.bytes > max {
                break;
            }
            bytes += ticket.bytes;
            batch.extend(state.tickets.pop_front());
        }
        let framed = batch
            .iter()
            .filter(|ticket| matches!(ticket.work, Work::Frames(_)));
        state.queued -= framed.map(|ticket| ticket.bytes).sum::<u64>();
        batch
    }

    /// Durable entries whose bytes do not fit into `budget` any more, oldest first.
    fn to_evict(&self, budget: u64, durable: u64) -> Vec<Cached> {
        let mut state = self.lock();
        let mut gone = Vec::new();
        while state.cached_bytes > budget
            && state.cached.front().is_some_and(|run| run.to <= durable)
        {
            let Some(run) = state.cached.pop_front() else {
                break;
            };
            state.cached_bytes -= run.bytes;
            gone.push(run);
        }
        gone
    }
}

/// What the cataloger is told: a frame that is durable, or a segment that has begun.
#[derive(Debug)]
pub(super) enum Fact {
    Frame(Head, Bytes),
    Segment { base: u64, position: u64 },
}

/// The state of the thread.
pub(super) struct Committer {
    pub(super) core: Arc<Core>,
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) segment: u64,
    /// The file's length, which may reach beyond what has been written.
    pub(super) allocated: u64,
    pub(super) watermark: Watermark,
    pub(super) chains: HashMap<GroupId, u32>,
}

impl Committer {
    /// Works until the queue is closed or stopped, or something fails. On its thread it blocks and is never pending.
    pub(super) async fn run(mut self) {
        let core = self.core.clone();
        let work = std::panic::AssertUnwindSafe(self.work());
        match work.catch_unwind().await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => drop(core.fail(format!("cannot write the journal: {error}"))),
            Err(panic) => {
                drop(core.fail(format!(
                    "the committer panicked: {}",
                    super::panic_text(&*panic)
                )));
            }
        }
        core.catalog_queue.close();
    }

    async fn work(&mut self) -> io::Result<()> {
        let max = self.core.config.commit_bytes_max as u64;
        let mut buffer = Vec::new();
        while let Some(batch) = self.core.queue.take(max.max(1)).await {
            if self.core.check().is_err() {
                return Ok(());
            }
            let (facts, done) = self.write(batch, &mut buffer).await?;
            pace(&*self.core.disk).await;
            let end = self.segment + self.end_of(&facts);
            self.core.durable.store(end, Ordering::Release);
            self.watermark.write(end)?;
            if self.core.catalog_queue.take_watermark_sync() {
                self.watermark.sync()?;
            }
            self.core.catalog_queue.push(facts);
            // A failure elsewhere silences this thread too.
            if self.core.check().is_err() {
                return Ok(());
            }
            tell(done);
            for run in self.core.queue.to_evict(self.core.config.cache_bytes, end) {
                let mut log = run.group.lock();
                log.evict(run.index, run.count, run.from, run.to);
                log.trim(self.core.cataloged.load(Ordering::Acquire));
            }
            if buffer.capacity() > 2 * self.core.config.commit_bytes_max {
                buffer = Vec::new();
            }
        }
        if self.core.check().is_ok() && !self.core.queue.is_stopped() {
            // Nothing is queued any more and the file ends with its last frame.
            let end = self.core.durable.load(Ordering::Acquire);
            if self.allocated > end - self.segment {
                self.file.set_len(end - self.segment)?;
                self.file.sync()?;
            }
            self.watermark.write(end)?;
            self.watermark.sync()?;
        }
        Ok(())
    }

    fn end_of(&self, facts: &[Fact]) -> u64 {
        match facts.last() {
            Some(Fact::Frame(head, _)) => head.end() - self.segment,
            Some(Fact::Segment { position, .. }) => position - self.segment,
            None => self.core.durable.load(Ordering::Acquire) - self.segment,
        }
    }

    /// Writes a batch and syncs it.
    async fn write(
        &mut self,
        batch: Vec<Ticket>,
        buffer: &mut Vec<u8>,
    ) -> io::Result<(Vec<Fact>, Told)> {
        let seed = seed(self.core.incarnation);
        let mut facts = Vec::with_capacity(batch.len());
        let mut done = Vec::with_capacity(batch.len());
        buffer.clear();
        let mut start = batch.first().map_or(0, |ticket| ticket.position);
        let mut entries = 0;
        for ticket in batch {
            let here = start + buffer.len() as u64;
            assert!(
                ticket.position == here,
                "ticket for {} written at {here}",
                ticket.position
            );
            match ticket.work {
                Work::Segment => {
                    self.flush(buffer, start).await?;
                    buffer.clear();
                    self.begin_segment(ticket.position)?;
                    let head = SegmentHead {
                        incarnation: self.core.incarnation,
                        base: ticket.position,
                        first: self.core.first_segment.load(Ordering::Acquire),
                    };
                    buffer.extend_from_slice(&head.encode());
                    start = ticket.position;
                    let position = ticket.position + SEGMENT_HEADER;
                    facts.push(Fact::Segment {
                        base: ticket.position,
                        position,
                    });
                }
                Work::Frames(frames) => {
                    let durable = self.core.durable.load(Ordering::Acquire);
                    for frame in frames {
                        let position = start + buffer.len() as u64;
                        let chain = match frame.kind {
                            Kind::Created => 0,
                            _ => self.chains.get(&frame.group).copied().unwrap_or(0),
                        };
                        let head = put_frame(buffer, &frame, seed, position, durable, chain);
                        if frame.kind == Kind::Removed {
                            self.chains.remove(&frame.group);
                        } else {
                            self.chains.insert(frame.group, head.crc);
                        }
                        let entry = frame.kind.is_entry();
                        entries += u64::from(entry);
                        let payload = if entry { Bytes::new() } else { frame.payload };
                        facts.push(Fact::Frame(head, payload));
                    }
                }
            }
            done.push((ticket.group, ticket.done));
        }
        self.flush(buffer, start).await?;
        self.core
            .flushed_entries
            .fetch_add(entries, Ordering::Relaxed);
        Ok((facts, done))
    }

    /// Writes `bytes` at journal position `start` and makes them durable.
    async fn flush(&mut self, bytes: &[u8], start: u64) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.core.flushes.fetch_add(1, Ordering::Relaxed);
        self.core
            .flushed_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let offset = start - self.segment;
        let end = offset + bytes.len() as u64;
        if end > self.allocated {
            self.allocated = end;
            if bytes.len() as u64 <= AHEAD_BATCH_MAX && self.core.ahead() {
                // One write of zeroes spares many later syncs the change of the file's size. Bytes behind the last
                // frame mean nothing, whatever a crash makes of them.
                let limit = self.core.config.segment_bytes.max(end);
                let ahead = (end + AHEAD).min(limit);
                if ahead > end {
                    let zeroes = vec![0; usize::try_from(ahead - end).unwrap_or(0)];
                    self.file.write_at(&zeroes, end)?;
                    self.allocated = ahead;
                }
            }
        }
        pace(&*self.core.disk).await;
        self.file.write_at(bytes, offset)?;
        pace(&*self.core.disk).await;
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::AckBeforeSync) {
            return Ok(());
        }
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::SyncRetried) {
            return self.file.sync().or_else(|_| self.file.sync());
        }
        self.file.sync()
    }

    /// Ends the segment at `position`, where the next one begins.
    fn begin_segment(&mut self, position: u64) -> io::Result<()> {
        let len = position - self.segment;
        if self.allocated > len {
            self.file.set_len(len)?;
            self.file.sync()?;
        }
        // The old segment is durable as a whole before the new one exists: so a newer segment proves the older
        // ones, and only the newest may be torn.
        self.file = self
            .core
            .disk
            .create(&super::core::segment_path(position))?;
        #[cfg(feature = "sim")]
        let is_synced = !crate::runtime::sim::makes(crate::runtime::sim::Bug::DirectoryNotSynced);
        #[cfg(not(feature = "sim"))]
        let is_synced = true;
        if is_synced {
            self.core.disk.sync_dir(super::core::JOURNAL_DIR)?;
        }
        self.core
            .segments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(position);
        self.segment = position;
        self.allocated = 0;
        Ok(())
    }
}

/// Tells owners and waiters, in order; of several callbacks of one group only the last.
fn tell(done: Told) {
    let mut last = HashMap::new();
    for (at, (group, done)) in done.iter().enumerate() {
        if matches!(done, Done::Owner(_)) {
            last.insert(*group, at);
        }
    }
    for (at, (group, done)) in done.into_iter().enumerate() {
        match done {
            Done::Owner(flushed) if last.get(&group) == Some(&at) => flushed(),
            Done::Owner(_) | Done::Nobody => {}
            Done::Waiter(wake) => wake(),
        }
    }
}
