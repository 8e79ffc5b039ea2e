//! Handles of topics and partitions: append, read and end offset, from wherever the leader is.
//!
//! Owns no state: a handle is a name and a client.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::retry::{Repeat, Verdict};
use super::{Client, Producer, ProducerConfig, batch, jitter, unexpected};
use crate::api::{OffsetSpec, Request, Response, TopicRoute};
use crate::record::Record;
use crate::types::{
    Acks, BrokerId, Error, LeaderEpoch, Offset, PartitionId, TopicName, TopicPartition,
};

/// Records were appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// The partition.
    pub partition: PartitionId,
    /// Offset of the first record; [`Ack::NO_OFFSET`] for [`Acks::None`].
    pub offset: Offset,
    /// Epoch of the leader that appended it.
    pub leader_epoch: LeaderEpoch,
    /// Brokers whose durable storage is known to hold it.
    pub durable_on: Arc<[BrokerId]>,
}

impl Ack {
    /// Stands for an offset that nobody knows: the answer came before anything was stored. Kafka's −1.
    pub const NO_OFFSET: Offset = Offset(u64::MAX);
}

/// A record that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerRecord {
    /// The partition.
    pub partition: PartitionId,
    /// Its offset.
    pub offset: Offset,
    /// Its timestamp, in ms since 1970.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value.
    pub value: Option<Bytes>,
    /// Its headers, in order.
    pub headers: Vec<(String, Option<Bytes>)>,
}

/// What one read found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRecords {
    /// The records, from the wanted offset on.
    pub records: Vec<ConsumerRecord>,
    /// Where the next read begins.
    pub next_offset: Offset,
    /// First offset that can be read.
    pub start_offset: Offset,
    /// Offset behind the last record that can be read.
    pub high_watermark: Offset,
    /// Epoch of the leader that answered.
    pub leader_epoch: LeaderEpoch,
    /// Bytes of the batches that were sent.
    pub bytes: usize,
}

/// A topic. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Topic {
    client: Client,
    name: TopicName,
}

impl Topic {
    pub(super) fn new(client: Client, name: TopicName) -> Self {
        Self { client, name }
    }

    /// Its name.
    pub fn name(&self) -> &TopicName {
        &self.name
    }

    /// A handle of one partition; whether it exists shows when it is used.
    pub fn partition(&self, partition: u32) -> Partition {
        let partition = PartitionId(partition);
        let id = TopicPartition {
            topic: self.name.clone(),
            partition,
        };
        Partition {
            client: self.client.clone(),
            id,
        }
    }

    /// Handles of all its partitions, in order.
    pub async fn partitions(&self) -> Result<Vec<Partition>, Error> {
        let route = self.client.topic_route(&self.name).await?;
        Ok(route
            .partitions
            .iter()
            .map(|known| self.partition(known.partition.0))
            .collect())
    }

    /// A producer for this topic.
    pub fn producer(&self, config: ProducerConfig) -> Result<Producer, Error> {
        Producer::new(&self.client, self.name.as_str(), config)
    }
}

/// One partition. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Partition {
    client: Client,
    id: TopicPartition,
}

impl Partition {
    /// Which one.
    pub fn id(&self) -> &TopicPartition {
        &self.id
    }

    /// Appends `records` as one batch: all of them or none, contiguous. Not repeated when its outcome is unknown (a
    /// [`Producer`] does that, safely); the error says so. Dropping the future does not undo it.
    pub async fn append(
        &self,
        records: impl IntoIterator<Item = Record>,
        acks: Acks,
    ) -> Result<Ack, Error> {
        let records: Vec<Record> = records.into_iter().collect();
        let records = batch::encode(&records, None)?;
        let partition = self.id.clone();
        let request = Request::Produce {
            partition,
            acks,
            records,
        };
        let response = self.client.request(request).await?;
        batch::ack(self.id.partition, &response)
    }

    /// Offset behind the last record that can be read. `linearizable`: at or above every record acknowledged before the
    /// call, which asks a quorum; without it, as far as the leader knows.
    pub async fn end_offset(&self, linearizable: bool) -> Result<Offset, Error> {
        let spec = if linearizable {
            OffsetSpec::LinearizableEnd
        } else {
            OffsetSpec::Latest
        };
        let found = self.find_offset(spec).await?;
        found.ok_or_else(|| Error::Failed {
            reason: format!("{} has no end offset", self.id),
        })
    }

    /// The first offset that can be read.
    pub async fn start_offset(&self) -> Result<Offset, Error> {
        let found = self.find_offset(OffsetSpec::Earliest).await?;
        found.ok_or_else(|| Error::Failed {
            reason: format!("{} has no start offset", self.id),
        })
    }

    /// Finds an offset; `None` when no record is that young.
    pub async fn find_offset(&self, spec: OffsetSpec) -> Result<Option<Offset>, Error> {
        let request = Request::FindOffset {
            partition: self.id.clone(),
            spec,
        };
        match self.client.request(request).await? {
            Response::FoundOffset { offset, .. } => Ok(offset),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads records from `from` on: about `max_bytes`, but at least one batch if there is one. Does not wait for more.
    pub async fn read(&self, from: Offset, max_bytes: u32) -> Result<ReadRecords, Error> {
        self.read_within(from, max_bytes, Duration::ZERO).await
    }

    /// As [`Partition::read`], waiting up to `max_wait` for the first record.
    pub async fn read_within(
        &self,
        from: Offset,
        max_bytes: u32,
        max_wait: Duration,
    ) -> Result<ReadRecords, Error> {
        let request = Request::Fetch {
            partition: self.id.clone(),
            offset: from,
            max_bytes,
            min_bytes: 1,
            max_wait_ms: u32::try_from(max_wait.as_millis()).unwrap_or(u32::MAX),
        };
        let deadline = Instant::now() + self.client.config().deadline + max_wait;
        match self.client.call_until(request, deadline).await? {
            Response::Fetched {
                records,
                start_offset,
                high_watermark,
                epoch,
            } => {
                let bytes = records.len();
                let (records, next_offset) = batch::decode(self.id.partition, &records, from)?;
                Ok(ReadRecords {
                    records,
                    next_offset,
                    start_offset,
                    high_watermark,
                    leader_epoch: epoch,
                    bytes,
                })
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Drops the records below `offset`; answers with the log start offset.
    pub async fn trim(&self, offset: Offset) -> Result<Offset, Error> {
        self.client.admin().trim(self.id.clone(), offset).await
    }
}

impl Client {
    /// The routes of a topic, looked for until the deadline.
    pub(super) async fn topic_route(&self, name: &TopicName) -> Result<TopicRoute, Error> {
        let mut retry = self.retry(Repeat::Read, Instant::now() + self.config().deadline);
        let mut shown = self.retry_place();
        loop {
            let error = match self.router().topic(name).await {
                Ok(route) => return Ok(route),
                Err(error) => error,
            };
            match retry.failed(error, Instant::now(), jitter()) {
                Verdict::Again(wait) => {
                    shown.failed(retry.reason());
                    tokio::time::sleep(wait).await;
                }
                Verdict::Final(error) => return Err(error),
            }
        }
    }
}
