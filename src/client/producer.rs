//! Many records to one topic: batches, back-pressure, an acknowledgement for each record.
//!
//! Owns the bound on memory, the choice of the partition and the lanes; all sending is `lane`'s.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::{OnceCell, Semaphore};

use super::lane::{self, FirstFailure, Lane, ProducerId, Seen, Sender};
use super::partitioner::{Sticky, partition_of};
use super::{Ack, Client, batch};
use crate::record::Record;
use crate::runtime::{self, Tasks};
use crate::types::{Acks, Error, PartitionId, TopicName, TopicPartition};

/// How a producer behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProducerConfig {
    /// What an acknowledgement must mean.
    pub acks: Acks,
    /// Whether batches are numbered, so that one is appended at most once however often it is sent. Without it an unknown outcome is
    /// reported and not repeated, and one batch per partition is in flight.
    pub idempotent: bool,
    /// A batch is full at about this many bytes; never above the topic's `max.message.bytes`.
    pub batch_bytes: usize,
    /// How long a batch waits for more records although it could be sent. At zero batches form by themselves while others are in flight.
    pub linger: Duration,
    /// Unanswered batches per partition, 1 to 5: a broker remembers five per producer.
    pub in_flight_max: usize,
    /// Bytes of records accepted and not acknowledged; `send` waits at this bound.
    pub buffer_bytes_max: usize,
    /// From `send` to the acknowledgement, with all attempts; then the record is given up.
    pub delivery_timeout: Duration,
}

impl Default for ProducerConfig {
    fn default() -> Self {
        Self {
            acks: Acks::All,
            idempotent: true,
            batch_bytes: 64 << 10,
            linger: Duration::ZERO,
            in_flight_max: 5,
            buffer_bytes_max: 32 << 20,
            delivery_timeout: Duration::from_secs(60),
        }
    }
}

impl ProducerConfig {
    fn validate(&self) -> Result<(), Error> {
        let bad = |key: &str, reason: &str| {
            Err(Error::InvalidConfig {
                key: key.to_owned(),
                reason: reason.to_owned(),
            })
        };
        if !(1..=5).contains(&self.in_flight_max) {
            return bad("in_flight_max", "use 1 to 5");
        }
        if self.batch_bytes == 0 {
            return bad("batch_bytes", "use at least 1");
        }
        if !(1..=1 << 30).contains(&self.buffer_bytes_max) {
            return bad("buffer_bytes_max", "use 1 to 1073741824");
        }
        if self.delivery_timeout.is_zero() {
            return bad("delivery_timeout", "use more than zero");
        }
        Ok(())
    }
}

/// A producer for one topic. Cheap to clone; clones share buffer, batches and numbering.
///
/// Records sent to one partition by one caller, one `send` after the other, are appended in that order, across retries and
/// failovers, each once. When a batch is given up, the batches already numbered behind it fail too (definitely not
/// appended, or unknown if an attempt's answer was lost); records that were not numbered yet go on under a new producer id.
///
/// Dropping the last clone without [`Producer::flush`] or [`Producer::close`] gives up what is not acknowledged.
#[derive(Clone)]
pub struct Producer {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    topic: TopicName,
    config: Arc<ProducerConfig>,
    buffer: Arc<Semaphore>,
    layout: OnceCell<Layout>,
    id: Arc<OnceCell<ProducerId>>,
    failure: FirstFailure,
    lanes: Mutex<Lanes>,
    tasks: Tasks,
}

/// What is known of the topic; it does not change while the topic exists.
#[derive(Clone, Copy)]
struct Layout {
    partitions: u32,
    batch_bytes: usize,
    message_bytes_max: u32,
}

struct Lanes {
    by_partition: BTreeMap<PartitionId, Arc<Lane>>,
    sticky: Sticky,
    closed: bool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Producer");
        shown
            .field("topic", &self.inner.topic)
            .field("config", &self.inner.config);
        shown.finish_non_exhaustive()
    }
}

impl Producer {
    /// A producer for `topic`; whether it exists shows at the first `send`.
    pub fn new(client: &Client, topic: &str, config: ProducerConfig) -> Result<Self, Error> {
        config.validate()?;
        let start = u32::try_from(runtime::random_seed() & 0xffff).unwrap_or(0);
        let lanes = Lanes {
            by_partition: BTreeMap::new(),
            sticky: Sticky::new(start),
            closed: false,
        };
        let inner = Inner {
            client: client.clone(),
            topic: TopicName::new(topic)?,
            buffer: Arc::new(Semaphore::new(config.buffer_bytes_max)),
            config: Arc::new(config),
            layout: OnceCell::new(),
            id: Arc::default(),
            failure: FirstFailure::default(),
            lanes: Mutex::new(lanes),
            tasks: client.inner.tasks.child(),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Sends a record to the partition of its key, or to a partition of the producer's choice without one.
    ///
    /// Waits while the buffer is full: that is the back-pressure. Then the record has its place in the order, and the
    /// future returned here is its acknowledgement; it need not be awaited for the record to be sent. Cancel safe: a `send` that is
    /// dropped before it returns sent nothing. A record that does not fit into `max.message.bytes` is refused here, and leaves no gap.
    pub async fn send(&self, record: Record) -> Result<Delivery, Error> {
        let layout = self.layout().await?;
        let size = record.encoded_bytes_max();
        let partition = match &record.key {
            Some(key) => partition_of(key, layout.partitions),
            None => self.choose(size, layout),
        };
        self.push(PartitionId(partition), record, size, layout)
            .await
    }

    /// As [`Producer::send`], to this partition.
    pub async fn send_to(&self, partition: u32, record: Record) -> Result<Delivery, Error> {
        let layout = self.layout().await?;
        let partition = PartitionId(partition);
        if partition.0 >= layout.partitions {
            let (topic, partitions) = (self.inner.topic.clone(), layout.partitions);
            return Err(Error::UnknownPartition {
                topic,
                partition,
                partitions,
            });
        }
        let size = record.encoded_bytes_max();
        self.push(partition, record, size, layout).await
    }

    /// Finds the topic, as the first `send` would: a name that does not exist is reported.
    pub async fn ready(&self) -> Result<(), Error> {
        self.layout().await.map(|_| ())
    }

    /// Whether a record was given up since the last flush.
    pub fn has_failed(&self) -> bool {
        self.inner
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Waits until everything sent before is acknowledged or given up. An error is the first failure since the last flush: `Ok` says
    /// that every record sent since then was acknowledged, whether or not its [`Delivery`] was kept.
    pub async fn flush(&self) -> Result<(), Error> {
        let lanes: Vec<Arc<Lane>> = self.lock().by_partition.values().cloned().collect();
        let waiting: Vec<Seen> = lanes.iter().flat_map(|lane| lane.flush()).collect();
        let mut vanished = Ok(());
        for seen in waiting {
            if seen.await.is_err() {
                vanished = Err(Error::Timeout { after_ms: 0 });
            }
        }
        let first = self
            .inner
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        first.map_or(vanished, Err)
    }

    /// Takes no more records, from any clone, and flushes.
    pub async fn close(&self) -> Result<(), Error> {
        let lanes: Vec<Arc<Lane>> = {
            let mut lanes = self.lock();
            lanes.closed = true;
            lanes.by_partition.values().cloned().collect()
        };
        for lane in &lanes {
            lane.close();
        }
        let flushed = self.flush().await;
        self.inner.tasks.shutdown().await;
        flushed
    }

    fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.inner
            .lanes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    async fn layout(&self) -> Result<Layout, Error> {
        let inner = &self.inner;
        let find = || async {
            let route = inner.client.topic_route(&inner.topic).await?;
            let message_bytes_max = inner.client.router().max_message_bytes(&inner.topic);
            let max = usize::try_from(message_bytes_max).unwrap_or(usize::MAX);
            Ok(Layout {
                message_bytes_max,
                partitions: u32::try_from(route.partitions.len()).unwrap_or(u32::MAX),
                batch_bytes: inner
                    .config
                    .batch_bytes
                    .min(max.saturating_sub(batch::HEADER_BYTES)),
            })
        };
        inner.layout.get_or_try_init(find).await.copied()
    }

    fn choose(&self, size: usize, layout: Layout) -> u32 {
        let router = self.inner.client.router();
        let has_leader = |number| {
            router
                .known_leader(&self.inner.topic, PartitionId(number))
                .is_some()
        };
        let mut lanes = self.lock();
        lanes
            .sticky
            .choose(size, layout.batch_bytes, layout.partitions, has_leader)
    }

    async fn push(
        &self,
        partition: PartitionId,
        record: Record,
        size: usize,
        layout: Layout,
    ) -> Result<Delivery, Error> {
        // What fits into no batch is refused alone, before it has a place in the order. `size` is an upper bound.
        let whole = size.saturating_add(batch::HEADER_BYTES);
        if whole > usize::try_from(layout.message_bytes_max).unwrap_or(usize::MAX) {
            let alone = batch::encode(std::slice::from_ref(&record), None)?;
            batch::check_size(&alone, layout.message_bytes_max)?;
        }
        let bound = self.inner.config.buffer_bytes_max;
        if size > bound {
            let wide = |bytes| u64::try_from(bytes).unwrap_or(u64::MAX);
            return Err(Error::RecordTooLarge {
                size: wide(size),
                max: wide(bound),
            });
        }
        let permits = u32::try_from(size).unwrap_or(u32::MAX);
        let permit = self.inner.buffer.clone().acquire_many_owned(permits).await;
        let permit = permit.map_err(|_| lane::closed())?;
        let lane = self.lane(partition)?;
        let (seen, place) = lane.push(record, size, permit, layout.batch_bytes)?;
        Ok(Delivery { seen, place })
    }

    fn lane(&self, partition: PartitionId) -> Result<Arc<Lane>, Error> {
        let mut lanes = self.lock();
        if lanes.closed {
            return Err(lane::closed());
        }
        if let Some(lane) = lanes.by_partition.get(&partition) {
            return Ok(lane.clone());
        }
        let inner = &self.inner;
        let id = TopicPartition {
            topic: inner.topic.clone(),
            partition,
        };
        let lane = Arc::new(Lane::new(id, inner.failure.clone()));
        let sender = Sender::new(
            lane.clone(),
            inner.client.clone(),
            inner.config.clone(),
            inner.tasks.clone(),
            inner.id.clone(),
        );
        inner.tasks.spawn_graceful(sender.run());
        lanes.by_partition.insert(partition, lane.clone());
        Ok(lane)
    }
}

/// A record's acknowledgement to come. Dropping it does not take the record back.
pub struct Delivery {
    seen: Seen,
    place: u64,
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Future for Delivery {
    type Output = Result<Ack, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = ready!(Pin::new(&mut self.seen).poll(cx));
        let mut ack = settled(result)?;
        if ack.offset != Ack::NO_OFFSET {
            ack.offset = ack.offset.plus(self.place);
        }
        Poll::Ready(Ok(ack))
    }
}

/// A lane that vanished with its runtime told nobody what became of the batch.
fn settled(
    result: Result<lane::BatchResult, tokio::sync::oneshot::error::RecvError>,
) -> Result<Ack, Error> {
    result.unwrap_or(Err(Error::Timeout { after_ms: 0 }))
}
