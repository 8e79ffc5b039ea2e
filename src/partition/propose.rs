//! The way of a produce request: checked, queued in order, put into a Raft entry with its neighbours, and answered.
//!
//! Owns the queue, the entries in flight, and the requests that are committed but wait for more copies. One task per partition
//! orders everything; when nothing is in flight it adds no wait, and what queues up while something is goes into the next entry.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;

use super::state_machine::{Outcome, Verdict, records_command};
use super::{Gate, Inner, PartitionLimits, Standing, lead};
use crate::api::Appended;
use crate::raft::{RaftError, Role};
use crate::record::{self, BatchHeader};
use crate::types::{Acks, EntryId, Error, LogIndex, Offset, decode};

/// How far a request has come; it only goes on.
#[derive(Debug, Default)]
struct Stage(AtomicU8);

impl Stage {
    const QUEUED: u8 = 0;
    const DROPPED: u8 = 1;
    const PROPOSED: u8 = 2;
    const APPLIED: u8 = 3;

    /// Leaves the queue, one way or the other; whether this call decided it.
    fn leave_queue(&self, to: u8) -> bool {
        self.0
            .compare_exchange(Self::QUEUED, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

type Answer = oneshot::Sender<Result<Vec<Appended>, Error>>;

/// What the answer needs to know of a batch.
#[derive(Debug, Clone, Copy)]
struct BatchMark {
    count: u32,
    producer_id: i64,
}

/// A request in the queue.
#[derive(Debug)]
pub(super) struct Queued {
    records: Bytes,
    waiter: Waiter,
}

/// A request without its bytes.
#[derive(Debug)]
struct Waiter {
    batches: Vec<BatchMark>,
    acks: Acks,
    stage: Arc<Stage>,
    /// `None` when nobody waits.
    answer: Option<Answer>,
    /// Its bytes in flight, given back when it is applied.
    permit: OwnedSemaphorePermit,
}

impl Waiter {
    fn refuse(self, error: Error) {
        if let Some(answer) = self.answer {
            // A caller that went away does not want it.
            answer.send(Err(error)).ok();
        }
    }
}

fn refuse_all(waiters: Vec<Waiter>, error: &Error) {
    for waiter in waiters {
        waiter.refuse(error.clone());
    }
}

/// The caller's side of a queued request.
pub(super) struct Ticket {
    inner: Arc<Inner>,
    bytes: u64,
    stage: Arc<Stage>,
    answer: oneshot::Receiver<Result<Vec<Appended>, Error>>,
}

impl Ticket {
    /// Waits for the answer until `deadline`.
    pub(super) async fn wait(self, deadline: Instant) -> Result<Vec<Appended>, Error> {
        let after = deadline.saturating_duration_since(Instant::now());
        let partition = self.inner.partition.clone();
        match tokio::time::timeout_at(deadline, self.answer).await {
            Ok(Ok(answer)) => answer,
            // The proposer has been stopped.
            Ok(Err(_)) if self.stage.leave_queue(Stage::DROPPED) => Err(Error::ShuttingDown),
            Ok(Err(_)) => Err(Error::LeadershipLost { partition }),
            Err(_) if self.stage.leave_queue(Stage::DROPPED) => {
                Err(Error::Overloaded { bytes: self.bytes })
            }
            Err(_) if self.stage.0.load(Ordering::Acquire) == Stage::APPLIED => {
                let min = self.inner.min_in_sync();
                Err(Error::NotEnoughReplicasAfterAppend { partition, min })
            }
            Err(_) => Err(self.inner.error_of(&RaftError::Timeout { after }, true)),
        }
    }
}

/// Whether what is proposed now can be committed: the answer would be unknown where it can be a refusal.
fn takes_appends(inner: &Inner, gate: &Gate) -> Result<(), Error> {
    inner.serving(gate)?;
    match gate.short {
        Some(short) => Err(Error::NoMajority {
            partition: inner.partition.clone(),
            reached: u32::try_from(short.voters).unwrap_or(u32::MAX),
            needed: u32::try_from(short.needed).unwrap_or(u32::MAX),
        }),
        None => Ok(()),
    }
}

/// Checks a request and puts it into the queue: all that can be refused without knowing the log is refused here. `None` when
/// nobody is to wait for it.
pub(super) fn enqueue(
    inner: &Arc<Inner>,
    records: Bytes,
    acks: Acks,
) -> Result<Option<Ticket>, Error> {
    let (min_in_sync, batch_bytes_max) = {
        let config = &inner.settings().config;
        (config.min_insync_replicas, config.max_message_bytes)
    };
    {
        let gate = inner.gate.borrow();
        takes_appends(inner, &gate)?;
        let in_sync = u32::try_from(gate.isr.len()).unwrap_or(u32::MAX);
        if acks == Acks::All && in_sync < min_in_sync {
            let partition = inner.partition.clone();
            return Err(Error::NotEnoughReplicas {
                partition,
                in_sync,
                min: min_in_sync,
            });
        }
    }
    let size = records.len();
    let bytes = u64::try_from(size).unwrap_or(u64::MAX);
    if size > inner.limits.entry_bytes_max {
        let max = u64::try_from(inner.limits.entry_bytes_max).unwrap_or(u64::MAX);
        return Err(Error::RecordTooLarge { size: bytes, max });
    }
    let headers = record::validate(&records, batch_bytes_max)?;
    (inner.room)()?;
    let permits = u32::try_from(size).unwrap_or(u32::MAX);
    let overloaded = || Error::Overloaded { bytes };
    let permit = Arc::clone(&inner.permits).try_acquire_many_owned(permits);
    let permit = permit.map_err(|_| overloaded())?;
    let mark = |header: &BatchHeader| BatchMark {
        count: header.count.unsigned_abs(),
        producer_id: header.producer_id,
    };
    let stage = Arc::new(Stage::default());
    let (answer, waiting) = oneshot::channel();
    let is_awaited = acks != Acks::None;
    let waiter = Waiter {
        batches: headers.iter().map(mark).collect(),
        acks,
        stage: Arc::clone(&stage),
        answer: is_awaited.then_some(answer),
        permit,
    };
    inner
        .queue
        .try_send(Queued { records, waiter })
        .map_err(|_| overloaded())?;
    let inner = Arc::clone(inner);
    Ok(is_awaited.then(|| Ticket {
        inner,
        bytes,
        stage,
        answer: waiting,
    }))
}

/// An entry's requests, and what became of it.
type Settled = (Vec<Waiter>, Result<(EntryId, Bytes), RaftError>);

/// Requests that wait for the next entry, in order.
#[derive(Default)]
struct Waiting {
    requests: VecDeque<Queued>,
    bytes: usize,
}

impl Waiting {
    /// Takes `first`, and what has queued up behind it, until there is enough for an entry.
    fn take(&mut self, first: Queued, queue: &mut mpsc::Receiver<Queued>, bytes_max: usize) {
        let mut request = Some(first);
        while let Some(queued) = request {
            self.bytes += queued.records.len();
            self.requests.push_back(queued);
            request = (self.bytes < bytes_max)
                .then(|| queue.try_recv().ok())
                .flatten();
        }
    }

    /// The requests of one entry: as many as fit, at least one.
    fn entry(&mut self, bytes_max: usize) -> (Vec<Bytes>, Vec<Waiter>) {
        let (mut parts, mut waiters, mut bytes) = (Vec::new(), Vec::new(), 0_usize);
        while let Some(next) = self.requests.front() {
            let size = next.records.len();
            if !parts.is_empty() && bytes + size > bytes_max {
                break;
            }
            let Some(Queued { records, waiter }) = self.requests.pop_front() else {
                break;
            };
            self.bytes -= size;
            // Its caller may have given up meanwhile, and was told that nothing happened.
            if waiter.stage.leave_queue(Stage::PROPOSED) {
                bytes += size;
                parts.push(records);
                waiters.push(waiter);
            }
        }
        (parts, waiters)
    }

    /// Whether an entry may follow `in_flight` others. An entry costs every replica the same few wakeups whatever is in it: a
    /// small one waits for its predecessors, and gets company meanwhile.
    fn may_leave(&self, in_flight: usize, limits: &PartitionLimits) -> bool {
        let most = if self.bytes < limits.small_entry_bytes {
            limits.inflight_small_entries_max
        } else {
            limits.inflight_entries_max
        };
        !self.requests.is_empty() && in_flight < most.max(1)
    }
}

/// The proposer's task.
pub(super) async fn run(inner: Arc<Inner>, mut queue: mpsc::Receiver<Queued>) {
    let bytes_max = inner.limits.entry_bytes_max;
    let mut in_flight = FuturesOrdered::new();
    let mut waiting = Waiting::default();
    let mut gate = inner.gate.subscribe();
    loop {
        // What is in flight may stay so for long without a majority, or leadership; what waits behind it is told at once.
        let takes = takes_appends(&inner, &gate.borrow_and_update());
        if let Err(error) = takes {
            let (_, waiters) = waiting.entry(usize::MAX);
            refuse_all(waiters, &error);
        }
        while waiting.may_leave(in_flight.len(), &inner.limits) {
            let (parts, waiters) = waiting.entry(bytes_max);
            if waiters.is_empty() {
                continue;
            }
            let refused = {
                let gate = inner.gate.borrow();
                // Asked again: much may have queued up since, and none of it has been proposed.
                takes_appends(&inner, &gate)
                    .and_then(|()| (inner.room)())
                    .err()
            };
            if let Some(error) = refused {
                refuse_all(waiters, &error);
                continue;
            }
            match inner.group.propose(records_command(parts.iter())).await {
                Ok(proposal) => in_flight.push_back(async move {
                    let applied = proposal.applied().await;
                    (waiters, applied)
                }),
                Err(error) => settle(&inner, (waiters, Err(error))),
            }
        }
        tokio::select! {
            biased;
            Some(settled) = in_flight.next() => settle(&inner, settled),
            changed = gate.changed(), if !waiting.requests.is_empty() => {
                if changed.is_err() {
                    return;
                }
            }
            first = queue.recv(), if waiting.bytes < bytes_max => {
                let Some(first) = first else { return };
                waiting.take(first, &mut queue, bytes_max);
            }
        }
    }
}

/// Answers the requests of an entry, or parks those that wait for more copies.
fn settle(inner: &Arc<Inner>, (waiters, applied): Settled) {
    let batches: usize = waiters.iter().map(|waiter| waiter.batches.len()).sum();
    let applied = applied.map_err(|error| inner.error_of(&error, true));
    let decided = applied.and_then(|(id, answer)| match decode::<Outcome>(&answer) {
        Ok(Outcome::Records(verdicts)) if verdicts.len() == batches => Ok((id, verdicts)),
        other => Err(Error::Failed {
            reason: format!("records were answered with {other:?}"),
        }),
    });
    let (id, verdicts) = match decided {
        Ok(decided) => decided,
        Err(error) => return refuse_all(waiters, &error),
    };
    let mut verdicts = verdicts.into_iter();
    let mut waiting = Vec::new();
    for waiter in waiters {
        let verdicts = verdicts.by_ref().take(waiter.batches.len());
        let batches = waiter.batches.iter().zip(verdicts);
        let appended: Result<Vec<Appended>, Error> = batches
            .map(|(batch, verdict)| appended(id, *batch, verdict))
            .collect();
        waiter.stage.0.store(Stage::APPLIED, Ordering::Release);
        drop(waiter.permit);
        match (waiter.answer, appended) {
            (Some(answer), Ok(appended)) => waiting.push((answer, waiter.acks, appended)),
            // A caller that went away does not want it.
            (Some(answer), Err(error)) => drop(answer.send(Err(error))),
            (None, _) => {}
        }
    }
    if waiting.is_empty() {
        return;
    }
    inner.parked().entries.push_back(ParkedEntry {
        index: id.index,
        waiting,
    });
    // Behind the push: whatever changes from here on is seen either here or by the watcher.
    acknowledge(inner);
}

fn appended(id: EntryId, batch: BatchMark, verdict: Verdict) -> Result<Appended, Error> {
    let (base_offset, leader_epoch, duplicate) = match verdict {
        Verdict::Appended { base_offset } => (base_offset, id.epoch, false),
        Verdict::Duplicate { base_offset, epoch } => (base_offset, epoch, true),
        Verdict::OutOfOrder { expected, found } => {
            let producer_id = batch.producer_id;
            return Err(Error::OutOfOrderSequence {
                producer_id,
                expected,
                found,
            });
        }
        Verdict::Fenced { current, found } => {
            let producer_id = batch.producer_id;
            return Err(Error::ProducerFenced {
                producer_id,
                current,
                found,
            });
        }
    };
    let (count, durable_on) = (batch.count, Vec::new());
    Ok(Appended {
        base_offset,
        count,
        leader_epoch,
        durable_on,
        duplicate,
    })
}

/// A committed entry with requests that are not answered yet.
#[derive(Debug)]
struct ParkedEntry {
    index: LogIndex,
    waiting: Vec<(Answer, Acks, Vec<Appended>)>,
}

/// Committed entries whose requests wait for more copies, in the order of the log.
#[derive(Debug, Default)]
pub(super) struct Parked {
    entries: VecDeque<ParkedEntry>,
}

impl Inner {
    fn parked(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers the parked requests that may be answered now. Called by the proposer behind each entry, and by the watcher whenever the
/// group or its replicas have moved.
pub(super) fn acknowledge(inner: &Arc<Inner>) {
    if inner.parked().entries.is_empty() {
        return;
    }
    let leads = inner.group.status().borrow().role == Role::Leader
        && inner.gate.borrow().standing != Standing::Stopped;
    let min_in_sync = inner.min_in_sync();
    let mut visible = Offset::default();
    let mut ready = Vec::new();
    inner.with_view(|view| {
        let upto = view.acknowledgeable(min_in_sync);
        let mut parked = inner.parked();
        for entry in &mut parked.entries {
            let is_durable = upto.is_some_and(|upto| entry.index <= upto);
            let is_ready = |acks: Acks| is_durable || acks != Acks::All || !leads;
            let durable_on = view.durable_brokers(entry.index);
            let waiting = entry.waiting.extract_if(.., |(_, acks, _)| is_ready(*acks));
            for (answer, acks, mut appended) in waiting {
                if is_durable {
                    let end = |batch: &Appended| batch.base_offset.plus(u64::from(batch.count));
                    visible = visible.max(appended.iter().map(end).max().unwrap_or_default());
                }
                let result = if leads || acks != Acks::All {
                    for batch in &mut appended {
                        batch.durable_on.clone_from(&durable_on);
                    }
                    Ok(appended)
                } else {
                    Err(Error::LeadershipLost {
                        partition: inner.partition.clone(),
                    })
                };
                ready.push((answer, result));
            }
        }
        parked.entries.retain(|entry| !entry.waiting.is_empty());
    });
    // What is acknowledged is visible first: whoever has the answer can read the record.
    lead::raise_high_watermark(inner, visible);
    for (answer, result) in ready {
        // A caller that went away does not want it.
        answer.send(result).ok();
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    fn queued(bytes: usize) -> Queued {
        let permit = Arc::new(Semaphore::new(1)).try_acquire_many_owned(1);
        Queued {
            records: vec![0; bytes].into(),
            waiter: Waiter {
                batches: Vec::new(),
                acks: Acks::All,
                stage: Arc::default(),
                answer: None,
                permit: permit.unwrap(),
            },
        }
    }

    /// Goal: nothing waits when nothing is in flight; small requests wait for their predecessors and share an entry, large ones do
    /// not wait; an entry is bounded, and order kept. Method: a table over what waits and what is in flight; entries taken out.
    #[tokio::test]
    async fn small_requests_share_an_entry() {
        let limits = PartitionLimits {
            entry_bytes_max: 1_000,
            inflight_entries_max: 3,
            small_entry_bytes: 100,
            inflight_small_entries_max: 1,
            ..PartitionLimits::default()
        };
        let (sender, mut queue) = mpsc::channel(16);
        let table = [
            (&[][..], 0, false),
            (&[10], 0, true),
            (&[10], 1, false),
            (&[60, 39], 1, false),
            (&[60, 40], 1, true),
            (&[900], 2, true),
            (&[900], 3, false),
        ];
        for (sizes, in_flight, expected) in table {
            let mut waiting = Waiting::default();
            for size in sizes {
                waiting.take(queued(*size), &mut queue, 0);
            }
            let leaves = waiting.may_leave(in_flight, &limits);
            assert_eq!(leaves, expected, "{sizes:?} behind {in_flight}");
        }
        for size in [20, 30, 700, 400, 2_000] {
            sender.try_send(queued(size)).unwrap();
        }
        let mut waiting = Waiting::default();
        let first = queue.try_recv().unwrap();
        waiting.take(first, &mut queue, limits.entry_bytes_max);
        assert_eq!(waiting.bytes, 20 + 30 + 700 + 400, "enough for an entry");
        let mut entry = || -> Vec<usize> {
            let (parts, waiters) = waiting.entry(limits.entry_bytes_max);
            assert_eq!(parts.len(), waiters.len());
            parts.iter().map(Bytes::len).collect()
        };
        assert_eq!(entry(), [20, 30, 700]);
        assert_eq!(entry(), [400]);
        let large = queue.try_recv().unwrap();
        let dropped = queued(5);
        assert!(dropped.waiter.stage.leave_queue(Stage::DROPPED));
        waiting.take(dropped, &mut queue, 0);
        waiting.take(large, &mut queue, 0);
        let (parts, _) = waiting.entry(limits.entry_bytes_max);
        assert_eq!(parts.len(), 1, "who gave up is left out");
        assert_eq!((waiting.bytes, parts[0].len()), (0, 2_000));
    }
}
