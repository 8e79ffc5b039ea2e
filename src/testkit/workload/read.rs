//! The sessions that read, and the reading of whole logs at the end.
//!
//! Owns where each reader is.

use std::time::Duration;

use tokio::time::Instant;

use super::Session;
use super::value::decode_value;
use crate::api::{OffsetSpec, Request, Response};
use crate::client::{Client, Partition, ReadRecords};
use crate::testkit::history::{Call, FinalLog, Outcome, STRANGE_VALUE};
use crate::testkit::recorder::Recorder;
use crate::types::{Error, Offset};

/// Bytes that a reader asks for: a few dozen small records.
const READ_BYTES: u32 = 16 << 10;
/// Bytes of one read of a whole log.
const WHOLE_READ_BYTES: u32 = 1 << 20;
/// How long a reader at the end waits for the next record.
const READ_WAIT: Duration = Duration::from_millis(20);
/// A reader goes back once in so many reads.
const SEEK_EVERY: u32 = 64;
/// Wait before a whole reading is begun again after an error.
const READ_AGAIN: Duration = Duration::from_millis(50);

fn values(read: &ReadRecords) -> Vec<(u64, u64)> {
    let one =
        |value: Option<&bytes::Bytes>| value.map_or(STRANGE_VALUE, |bytes| decode_value(bytes));
    let records = read.records.iter();
    records
        .map(|record| (record.offset.0, one(record.value.as_ref())))
        .collect()
}

/// A client that follows every partition, one after the other, and sometimes begins again somewhere behind it.
pub(super) async fn follow(mut session: Session) {
    let mut next = vec![0_u64; usize::try_from(session.config.partitions).unwrap_or(0)];
    while !session.is_over() {
        for partition in 0..session.config.partitions {
            if session.is_over() {
                return;
            }
            let Ok(topic) = session.client.topic(&session.config.topic) else {
                return;
            };
            let seek = session.chance(SEEK_EVERY);
            let Some(at) = next.get_mut(usize::try_from(partition).unwrap_or(usize::MAX)) else {
                return;
            };
            if seek {
                *at = rand::Rng::random_range(&mut session.rng, 0..=*at);
            }
            let from = *at;
            let call = Call::Fetch { from };
            let Some(id) = session.recorder.operation(session.number, partition, call) else {
                return;
            };
            let handle = topic.partition(partition);
            let asked = handle.read_within(Offset(from), READ_BYTES, READ_WAIT);
            match tokio::time::timeout(session.config.answer_within, asked).await {
                Ok(Ok(read)) => {
                    *at = read.next_offset.0;
                    let outcome = Outcome::Fetched {
                        log_start: read.start_offset.0,
                        high_watermark: read.high_watermark.0,
                        epoch: Some(read.leader_epoch.0),
                        records: values(&read),
                    };
                    session.recorder.completed(id, outcome);
                }
                Ok(Err(error)) => {
                    if let Error::OffsetOutOfRange { start, end, .. } = &error {
                        *at = from.clamp(start.0, end.0.max(start.0));
                    }
                    session.recorder.failed(id, &error);
                }
                Err(_) => {}
            }
            session.pause().await;
        }
    }
}

/// A client that asks for end offsets, linearizable and plain ones.
pub(super) async fn ask(mut session: Session) {
    while !session.is_over() {
        let partition = session.partition();
        let Ok(topic) = session.client.topic(&session.config.topic) else {
            return;
        };
        let (call, spec) = if session.chance(2) {
            (Call::LinearizableEnd, OffsetSpec::LinearizableEnd)
        } else {
            (Call::End, OffsetSpec::Latest)
        };
        let Some(id) = session.recorder.operation(session.number, partition, call) else {
            return;
        };
        let partition = topic.partition(partition).id().clone();
        // The request itself: its answer says who answered.
        let asked = session
            .client
            .request(Request::FindOffset { partition, spec });
        match session.answer(id, asked).await {
            Some(Response::FoundOffset {
                offset: Some(end),
                epoch,
            }) => {
                let (end, epoch) = (end.0, Some(epoch.0));
                session.recorder.completed(id, Outcome::End { end, epoch });
            }
            Some(other) => {
                let reason = format!("another question was answered: {other:?}");
                session.recorder.completed(id, Outcome::Unknown { reason });
            }
            None => {}
        }
        session.pause().await;
    }
}

/// Reads every partition of `topic` from its first offset to its linearizable end, again after errors, for `within` at most in all: call it
/// when everything is healed and the workload has stopped. The answers belong into [`History::logs`](crate::testkit::history::History::logs).
/// The error is the last one when time is over.
pub async fn read_final_logs(
    client: &Client,
    recorder: &Recorder,
    topic: &str,
    partitions: u32,
    within: Duration,
) -> Result<Vec<FinalLog>, Error> {
    let deadline = Instant::now() + within;
    let topic = client.topic(topic)?;
    let mut logs = Vec::new();
    for number in 0..partitions {
        let partition = topic.partition(number);
        logs.push(read_whole(recorder, &partition, number, deadline).await?);
    }
    Ok(logs)
}

async fn read_whole(
    recorder: &Recorder,
    partition: &Partition,
    number: u32,
    deadline: Instant,
) -> Result<FinalLog, Error> {
    let mut last = Error::Timeout { after_ms: 0 };
    loop {
        let reading = try_whole(recorder, partition, number);
        match tokio::time::timeout_at(deadline, reading).await {
            Ok(Ok(log)) => return Ok(log),
            Ok(Err(error)) => last = error,
            Err(_) => return Err(last),
        }
        tokio::time::sleep_until((Instant::now() + READ_AGAIN).min(deadline)).await;
    }
}

/// One attempt. It ends early, with what it has, when a read brings nothing: the checker then says what is missing.
async fn try_whole(
    recorder: &Recorder,
    partition: &Partition,
    number: u32,
) -> Result<FinalLog, Error> {
    let began_ns = recorder.now_ns();
    let end = partition.end_offset(true).await?;
    let log_start = partition.start_offset().await?;
    let mut records = Vec::new();
    let mut next = log_start;
    while next < end {
        let read = partition.read(next, WHOLE_READ_BYTES).await?;
        if read.next_offset <= next {
            if read.high_watermark < end {
                // Another leader, which does not show it yet.
                let reason = format!(
                    "the high watermark is {}, the end {end}",
                    read.high_watermark
                );
                return Err(Error::Failed { reason });
            }
            break;
        }
        records.extend(
            values(&read)
                .into_iter()
                .filter(|(offset, _)| *offset < end.0),
        );
        next = read.next_offset;
    }
    Ok(FinalLog {
        partition: number,
        began_ns,
        log_start: log_start.0,
        end: end.0,
        records,
    })
}
