//! The text on its way into the topic and back: sent, acknowledged, read and compared, in bounded memory.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use bytes::Bytes;
use futures_util::StreamExt;
use logboom::client::{
    Client, Consumer, ConsumerRecord, Delivery, From, Partitions, Producer, ProducerConfig, Record,
    Until,
};
use logboom::runtime;
use logboom::types::LeaderEpoch;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::TOPIC;
use super::text::{LINE_BYTES_MAX, Text, open};
use crate::cli::compare::{Compare, Counts, Read, Step};
use crate::cli::lines::Lines;

const PARTITIONS: u64 = 2;
/// Name of the record header with a line's number.
const LINE_HEADER: &str = "line";
/// Acknowledgements that may wait to be looked at, per partition.
const DELIVERIES_WAITING: usize = 4_096;

/// When broker 1 was killed, and the epoch in which it led partition 0.
pub(super) type Killed = Option<(Instant, LeaderEpoch)>;

/// How far the stream is; shared by those who look and those who move it.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress(Arc<(AtomicU64, AtomicU64)>);

impl Progress {
    pub(super) fn sent(&self) -> u64 {
        self.0.0.load(Ordering::Relaxed)
    }

    pub(super) fn acked(&self) -> u64 {
        self.0.1.load(Ordering::Relaxed)
    }
}

/// How the stream and the acts talk to each other.
pub(super) struct Signals {
    pub(super) half: watch::Sender<bool>,
    pub(super) kill_seen: watch::Receiver<Killed>,
    pub(super) failover: watch::Sender<Option<Instant>>,
}

/// Sends the text; waits for the kill at its middle. Answers with the number of records sent when all are acknowledged.
pub(super) async fn stream_in(
    client: &Client,
    path: &Path,
    text: Text,
    progress: &Progress,
    signals: Signals,
) -> anyhow::Result<u64> {
    let Signals {
        half,
        kill_seen,
        failover,
    } = signals;
    // Little is unacknowledged at any time, so that half way is half way for the log too.
    let share = usize::try_from(text.bytes / 16).unwrap_or(usize::MAX);
    let config = ProducerConfig {
        buffer_bytes_max: share.clamp(64 << 10, 4 << 20).max(text.longest + 1_024),
        ..ProducerConfig::default()
    };
    let producer = Producer::new(client, TOPIC, config)?;
    let tasks = runtime::Tasks::new();
    let mut watchers = Vec::new();
    let mut ends = Vec::new();
    for partition in 0..PARTITIONS {
        let (sender, receiver) = mpsc::channel(DELIVERIES_WAITING);
        let (ended, end) = tokio::sync::oneshot::channel();
        let watcher = Watcher {
            partition,
            progress: progress.clone(),
            kill_seen: kill_seen.clone(),
            failover: failover.clone(),
        };
        tasks.spawn(async move {
            // The other side is gone only when the demo is given up.
            ended.send(watcher.watch(receiver).await).ok();
        });
        watchers.push(sender);
        ends.push(end);
    }
    let sending = async {
        let mut lines = Lines::read(open(path)?, LINE_BYTES_MAX);
        let mut number = 0;
        let middle = text.lines / 2;
        while number < text.lines || text.lines == 0 {
            if number == middle {
                half.send_replace(true);
                let mut kill_seen = kill_seen.clone();
                kill_seen
                    .wait_for(Option::is_some)
                    .await
                    .context("the demo was given up")?;
            }
            let Some(line) = lines.next().await? else {
                break;
            };
            let partition = number % PARTITIONS;
            let record = Record::new(line).with_header(LINE_HEADER, number.to_string());
            let delivery = producer.send_to(u32::try_from(partition)?, record).await?;
            let watcher = watchers.get(usize::try_from(partition)?);
            let watcher = watcher.context("a partition without a watcher")?;
            if watcher.send((number, delivery)).await.is_err() {
                // It ended over a failure, which it reports below.
                break;
            }
            number += 1;
            progress.0.0.store(number, Ordering::Relaxed);
        }
        drop(watchers);
        for end in ends {
            end.await.context("a watcher vanished")??;
        }
        anyhow::Ok(number)
    };
    let sent = sending.await;
    let closed = producer.close().await;
    tasks.shutdown().await;
    let sent = sent?;
    closed?;
    if failover.borrow().is_none() {
        // The text was too short for another record on partition 0: a read that asks a quorum shows that it is led.
        client.topic(TOPIC)?.partition(0).end_offset(true).await?;
        failover.send_replace(Some(Instant::now()));
    }
    Ok(sent)
}

/// Looks at the acknowledgements of one partition, in order.
struct Watcher {
    partition: u64,
    progress: Progress,
    kill_seen: watch::Receiver<Killed>,
    failover: watch::Sender<Option<Instant>>,
}

impl Watcher {
    async fn watch(self, mut deliveries: mpsc::Receiver<(u64, Delivery)>) -> anyhow::Result<()> {
        let mut waiting = self.partition == 0;
        while let Some((number, delivery)) = deliveries.recv().await {
            let ack = delivery
                .await
                .with_context(|| format!("line {} was not acknowledged", number + 1))?;
            self.progress.0.1.fetch_add(1, Ordering::Relaxed);
            if waiting {
                // An acknowledgement of the dead leader may still have been on its way; a new leader's is meant.
                let killed = *self.kill_seen.borrow();
                if killed.is_some_and(|(_, epoch)| ack.leader_epoch > epoch) {
                    self.failover.send_replace(Some(Instant::now()));
                    waiting = false;
                }
            }
        }
        Ok(())
    }
}

/// Reads both partitions and the text side by side.
pub(super) async fn read_back(client: &Client, path: &Path, lines: u64) -> anyhow::Result<Counts> {
    let mut streams = Vec::new();
    for partition in 0..u32::try_from(PARTITIONS)? {
        let only = Partitions::List(vec![partition]);
        let consumer = Consumer::new(client, TOPIC, only, From::Earliest).until(Until::End);
        let mut stream = consumer.stream();
        let first = stream.next().await.transpose()?;
        streams.push((stream, first));
    }
    let mut compare = Compare::default();
    let mut text = Lines::read(open(path)?, LINE_BYTES_MAX);
    for number in 0..lines {
        let line: Bytes = text
            .next()
            .await?
            .context("the text became shorter while it was streamed")?;
        let at = usize::try_from(number % PARTITIONS)?;
        let (stream, record) = streams
            .get_mut(at)
            .context("a partition without a reader")?;
        loop {
            let Some(found) = &record else {
                compare.miss(number, &line);
                break;
            };
            let step = compare.hold(number, &line, as_read(found));
            if step != Step::NextLine {
                *record = stream.next().await.transpose()?;
            }
            if step != Step::NextRecord {
                break;
            }
        }
    }
    for (mut stream, mut record) in streams {
        while let Some(found) = record {
            compare.stray(as_read(&found));
            record = stream.next().await.transpose()?;
        }
    }
    Ok(compare.finish())
}

fn as_read(record: &ConsumerRecord) -> Read<'_> {
    let number = record.headers.iter().find(|(name, _)| name == LINE_HEADER);
    let number = number.and_then(|(_, value)| std::str::from_utf8(value.as_deref()?).ok());
    Read {
        line: number.and_then(|number| number.parse().ok()),
        value: record.value.as_deref().unwrap_or_default(),
    }
}
