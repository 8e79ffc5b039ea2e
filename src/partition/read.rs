//! Reading: from an offset, a wish and a watermark to whole batches, and from a question to an offset.
//!
//! Owns no state. Batches are read from the group's log where the index says, checked against it, and given their place on the
//! way out. Nothing above the high watermark is looked at.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;
use tokio::time::Instant;

use super::index::{BatchRef, IndexError, Lookup};
use super::{Gate, Inner};
use crate::api::{OffsetSpec, Response};
use crate::raft::RaftError;
use crate::record::{BatchHeader, batches, put_placed};
use crate::storage::LogEntry;
use crate::types::{Error, LeaderEpoch, Offset};

/// Entries asked for in one read of the log.
const READ_ENTRIES_MAX: usize = 4_096;

/// See [`super::Partition::fetch`].
pub(super) async fn fetch(
    inner: &Arc<Inner>,
    offset: Offset,
    max_bytes: u32,
    min_bytes: u32,
    max_wait: Duration,
) -> Result<Response, Error> {
    let deadline = Instant::now() + max_wait;
    let max_bytes = usize::try_from(max_bytes).unwrap_or(usize::MAX);
    let min_bytes = usize::try_from(min_bytes)
        .unwrap_or(usize::MAX)
        .min(max_bytes);
    let mut gate = inner.gate.subscribe();
    loop {
        let (epoch, high_watermark) = look(inner, &mut gate)?;
        let start_offset = check_range(inner, offset)?;
        let found = find_batches(inner, offset, high_watermark, max_bytes).await?;
        let bytes: usize = found.iter().map(|batch| to_usize(batch.size)).sum();
        let is_enough = bytes >= min_bytes.max(1) || max_bytes == 0;
        if is_enough || Instant::now() >= deadline {
            let records = read_batches(inner, offset, &found).await?;
            return Ok(Response::Fetched {
                records,
                start_offset,
                high_watermark,
                epoch,
            });
        }
        // A gate that closes or moves ends the wait, and so does the deadline: both are looked at again above.
        match tokio::time::timeout_at(deadline, gate.changed()).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(_)) => return Err(Error::ShuttingDown),
        }
    }
}

/// See [`super::Partition::find_offset`].
pub(super) async fn find_offset(
    inner: &Arc<Inner>,
    spec: OffsetSpec,
    deadline: Instant,
) -> Result<Response, Error> {
    let mut gate = inner.gate.subscribe();
    let (epoch, high_watermark) = look(inner, &mut gate)?;
    let offset = match spec {
        OffsetSpec::Earliest => Some(inner.log.lock().log_start),
        OffsetSpec::Latest => Some(high_watermark),
        OffsetSpec::LinearizableEnd => {
            let end = linearizable_end(inner, &mut gate, deadline).await?;
            let epoch = gate.borrow().epoch;
            return Ok(Response::FoundOffset {
                offset: Some(end),
                epoch,
            });
        }
        OffsetSpec::AtTime(time) => {
            let found = tokio::time::timeout_at(deadline, at_time(inner, time, high_watermark));
            found
                .await
                .unwrap_or_else(|_| Err(timed_out(Duration::ZERO)))?
        }
    };
    Ok(Response::FoundOffset { offset, epoch })
}

fn timed_out(after: Duration) -> Error {
    Error::Timeout {
        after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
    }
}

fn to_usize(size: u32) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}

/// The gate's epoch and high watermark, while this replica serves.
fn look(inner: &Inner, gate: &mut watch::Receiver<Gate>) -> Result<(LeaderEpoch, Offset), Error> {
    let gate = gate.borrow_and_update();
    Ok((inner.serving(&gate)?, gate.high_watermark))
}

/// The log start, when `offset` is at or behind it and not behind the log's end. An offset between the high watermark and the end
/// is no error: its record is on its way, or was seen by the reader under the leader before.
fn check_range(inner: &Inner, offset: Offset) -> Result<Offset, Error> {
    let (start, end) = {
        let state = inner.log.lock();
        (state.log_start, state.next_offset)
    };
    if (start..=end).contains(&offset) {
        return Ok(start);
    }
    let partition = inner.partition.clone();
    Err(Error::OffsetOutOfRange {
        partition,
        requested: offset,
        start,
        end,
    })
}

fn index_error(inner: &Inner, error: &IndexError) -> Error {
    // Lost a race with a trim, when there was one: the caller's offset is checked again first.
    Error::Failed {
        reason: format!("{}: {error}", inner.partition),
    }
}

/// Answers with `search`, on the blocking pool when memory does not reach down to `from`.
async fn search<T, F>(inner: &Arc<Inner>, from: Offset, search: F) -> Result<T, Error>
where
    T: Send + 'static,
    F: FnOnce(&Inner) -> Result<T, IndexError> + Send + 'static,
{
    let is_in_memory = inner
        .log
        .lock()
        .index
        .first()
        .is_none_or(|first| first <= from);
    let found = if is_in_memory {
        search(inner)
    } else {
        let owner = Arc::clone(inner);
        let joined = inner.tasks.spawn_blocking(move || search(&owner)).await;
        joined.map_err(|error| Error::Failed {
            reason: error.to_string(),
        })?
    };
    found.map_err(|error| index_error(inner, &error))
}

pub(super) async fn find_batches(
    inner: &Arc<Inner>,
    from: Offset,
    below: Offset,
    bytes_max: usize,
) -> Result<Vec<BatchRef>, Error> {
    if from >= below {
        return Ok(Vec::new());
    }
    let found = search(inner, from, move |inner| {
        let memory = |offset| inner.log.lock().index.block(offset);
        Lookup {
            memory,
            older: inner.group.store(),
        }
        .batches(from, below, bytes_max)
    });
    let found = found.await;
    if found.is_err() {
        check_range(inner, from)?;
    }
    found
}

/// Reads the batches at `found`, in order and with their place set.
pub(super) async fn read_batches(
    inner: &Arc<Inner>,
    offset: Offset,
    found: &[BatchRef],
) -> Result<Bytes, Error> {
    let bytes = found
        .iter()
        .map(|batch| to_usize(batch.size))
        .sum::<usize>();
    let mut records = BytesMut::with_capacity(bytes);
    let mut left = found;
    while let (Some(first), Some(last)) = (left.first(), left.last()) {
        let (from, to) = (first.entry.index, last.entry.index);
        let entries = usize::try_from(to.0.saturating_sub(from.0)).unwrap_or(usize::MAX);
        let entries = entries.saturating_add(1).min(READ_ENTRIES_MAX);
        let read = inner.group.read(from, entries, bytes).await;
        let before = left.len();
        if let Ok(entries) = &read {
            left = take_batches(&mut records, left, entries);
        }
        if left.len() == before {
            // Trimmed and purged meanwhile, or the log is not what the index says.
            check_range(inner, offset)?;
            let what = read.err().map_or_else(
                || "the entry is not as indexed".to_owned(),
                |error| error.to_string(),
            );
            let reason = format!(
                "{}: cannot read entry {}: {what}",
                inner.partition, first.entry
            );
            return Err(Error::Failed { reason });
        }
    }
    Ok(records.freeze())
}

/// Adds the batches of `wanted` that stand in `entries` to `records`, up to the first one that does not; returns the rest.
fn take_batches<'a>(
    records: &mut BytesMut,
    wanted: &'a [BatchRef],
    entries: &[LogEntry],
) -> &'a [BatchRef] {
    let mut left = wanted;
    let mut entries = entries.iter().peekable();
    while let Some((batch, rest)) = left.split_first() {
        while entries
            .next_if(|entry| entry.id.index < batch.entry.index)
            .is_some()
        {}
        let Some(entry) = entries.peek().filter(|entry| entry.id == batch.entry) else {
            break;
        };
        let from = to_usize(batch.position);
        let bytes = entry
            .payload
            .get(from..from.saturating_add(to_usize(batch.size)));
        let is_it = |bytes: &&[u8]| {
            BatchHeader::parse(bytes).is_ok_and(|header| header.size == bytes.len())
        };
        let Some(bytes) = bytes.filter(is_it) else {
            break;
        };
        put_placed(records, bytes, batch.base_offset, batch.entry.epoch);
        left = rest;
    }
    left
}

async fn linearizable_end(
    inner: &Arc<Inner>,
    gate: &mut watch::Receiver<Gate>,
    deadline: Instant,
) -> Result<Offset, Error> {
    #[cfg(feature = "sim")]
    if crate::runtime::sim::makes(crate::runtime::sim::Bug::StaleLocalRead) {
        return Ok(look(inner, gate)?.1);
    }
    let after = deadline.saturating_duration_since(Instant::now());
    let asked = inner.group.linearize(after).await;
    asked.map_err(|error| inner.error_of(&error, false))?;
    let end = inner.log.lock().next_offset;
    loop {
        if look(inner, gate)?.1 >= end {
            return Ok(end);
        }
        match tokio::time::timeout_at(deadline, gate.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Error::ShuttingDown),
            Err(_) => return Err(inner.error_of(&RaftError::Timeout { after }, false)),
        }
    }
}

async fn at_time(inner: &Arc<Inner>, time: i64, below: Offset) -> Result<Option<Offset>, Error> {
    let from = inner.log.lock().log_start;
    if from >= below {
        return Ok(None);
    }
    let found = search(inner, from, move |inner| {
        let memory = |offset| inner.log.lock().index.block(offset);
        Lookup {
            memory,
            older: inner.group.store(),
        }
        .at_time(time, from, below)
    });
    let Some(batch) = found.await? else {
        return Ok(None);
    };
    let records = read_batches(inner, batch.base_offset, &[batch]).await?;
    Ok(Some(first_at(&records, time).unwrap_or(batch.base_offset)))
}

/// The first record of `time` or later in one batch; `None` when the batch cannot be read here, as when it is compressed.
fn first_at(records: &Bytes, time: i64) -> Option<Offset> {
    let batch = batches(records).next()?.ok()?;
    let records = batch.decode().ok()?;
    records
        .iter()
        .find(|record| record.timestamp_ms >= time)
        .map(|record| record.offset)
}
