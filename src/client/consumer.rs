//! Reading a topic as a stream of records.
//!
//! Owns the position in each partition. No task of its own: the stream keeps one request per partition on its way while
//! the records of the one before are taken, and ends with everything it holds when it is dropped. No committed positions: who wants
//! to go on later remembers an offset.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, Stream, StreamExt, stream};

use super::{Client, ConsumerRecord, Partition, ReadRecords};
use crate::api::OffsetSpec;
use crate::types::{Error, Offset, PartitionId};

/// Which partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Partitions {
    /// All of the topic.
    All,
    /// These.
    List(Vec<u32>),
}

/// Where reading begins, in each partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// At the first record that can be read.
    Earliest,
    /// Behind the last record that can be read at the start.
    Latest,
    /// At this offset.
    Offset(Offset),
}

/// Where reading ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Never: the stream waits for more.
    Forever,
    /// In each partition at the high watermark found at the start.
    End,
}

/// How a consumer behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerConfig {
    /// Bytes held ready, over all partitions: half of it on its way, half of it being taken. Below 32 KiB per partition, or two batches, it
    /// cannot go.
    pub prefetch_bytes: usize,
    /// Most bytes of one request.
    pub fetch_bytes_max: usize,
    /// How long the leader waits for the first new record.
    pub max_wait: Duration,
}

impl Default for ConsumerConfig {
    fn default() -> Self {
        Self {
            prefetch_bytes: 16 << 20,
            fetch_bytes_max: 4 << 20,
            max_wait: Duration::from_millis(500),
        }
    }
}

const FETCH_BYTES_MIN: usize = 16 << 10;

/// Reads a topic; see [`Consumer::stream`].
#[derive(Debug, Clone)]
pub struct Consumer {
    client: Client,
    topic: String,
    partitions: Partitions,
    from: From,
    until: Until,
    config: ConsumerConfig,
}

impl Consumer {
    /// A consumer that goes on for ever.
    pub fn new(client: &Client, topic: &str, partitions: Partitions, from: From) -> Self {
        Self {
            client: client.clone(),
            topic: topic.to_owned(),
            partitions,
            from,
            until: Until::Forever,
            config: ConsumerConfig::default(),
        }
    }

    /// Sets where reading ends.
    #[must_use]
    pub fn until(mut self, until: Until) -> Self {
        self.until = until;
        self
    }

    /// Sets the configuration.
    #[must_use]
    pub fn config(mut self, config: ConsumerConfig) -> Self {
        self.config = config;
        self
    }

    /// The records: each partition's in order, without gap and without repetition, partitions in no order.
    ///
    /// Failovers are survived in silence. An error that can be retried is reported after [`super::ClientConfig::deadline`], and the next poll
    /// goes on from the same place; any other error ends its partition. The stream ends when all its partitions have.
    pub fn stream(self) -> impl Stream<Item = Result<ConsumerRecord, Error>> + Send + Unpin {
        let start = async move {
            match self.start().await {
                Ok(reading) => stream::unfold(reading, Reading::next).boxed(),
                Err(error) => stream::iter([Err(error)]).boxed(),
            }
        };
        start.flatten_stream().boxed()
    }

    async fn start(self) -> Result<Reading, Error> {
        let topic = self.client.topic(&self.topic)?;
        let all = topic.partitions().await?;
        let chosen = match &self.partitions {
            Partitions::All => all,
            Partitions::List(numbers) => {
                let known = |number: &u32| all.iter().find(|one| one.id().partition.0 == *number);
                let find = |number: &u32| {
                    known(number)
                        .cloned()
                        .ok_or_else(|| Error::UnknownPartition {
                            topic: topic.name().clone(),
                            partition: PartitionId(*number),
                            partitions: u32::try_from(all.len()).unwrap_or(u32::MAX),
                        })
                };
                numbers.iter().map(find).collect::<Result<Vec<_>, _>>()?
            }
        };
        let share = self.config.prefetch_bytes / 2 / chosen.len().max(1);
        let fetch_bytes = share.clamp(
            FETCH_BYTES_MIN,
            self.config.fetch_bytes_max.max(FETCH_BYTES_MIN),
        );
        let mut reading = Reading {
            cursors: BTreeMap::new(),
            fetches: FuturesUnordered::new(),
            ready: VecDeque::new(),
            fetch_bytes: u32::try_from(fetch_bytes).unwrap_or(u32::MAX),
            max_wait: self.config.max_wait,
        };
        let (from, until) = (self.from, self.until);
        let places = chosen.into_iter().map(|partition| async move {
            let cursor = Cursor::find(partition, from, until).await?;
            Ok::<_, Error>((cursor.partition.id().partition, cursor))
        });
        let mut places = stream::iter(places).buffer_unordered(64);
        while let Some(place) = places.next().await {
            let (partition, cursor) = place?;
            reading.cursors.insert(partition, cursor);
        }
        let partitions: Vec<PartitionId> = reading.cursors.keys().copied().collect();
        for partition in partitions {
            reading.fetch(partition);
        }
        Ok(reading)
    }
}

struct Cursor {
    partition: Partition,
    /// The next record wanted.
    position: Offset,
    /// Where reading ends.
    end: Option<Offset>,
}

impl Cursor {
    async fn find(partition: Partition, from: From, until: Until) -> Result<Self, Error> {
        let position = match from {
            From::Offset(offset) => offset,
            From::Earliest => partition.start_offset().await?,
            From::Latest => partition.end_offset(false).await?,
        };
        let end = match until {
            Until::Forever => None,
            Until::End => partition.find_offset(OffsetSpec::Latest).await?,
        };
        if end.is_some_and(|end| position > end) {
            // Either it can be read by now, or the leader says what can.
            partition.read(position, 1).await?;
        }
        Ok(Self {
            partition,
            position,
            end,
        })
    }
}

type Fetched = (PartitionId, Result<ReadRecords, Error>);

struct Reading {
    cursors: BTreeMap<PartitionId, Cursor>,
    fetches: FuturesUnordered<BoxFuture<'static, Fetched>>,
    ready: VecDeque<std::vec::IntoIter<ConsumerRecord>>,
    fetch_bytes: u32,
    max_wait: Duration,
}

impl Reading {
    /// Begins the next request of a partition, or forgets the partition when it is read to its end.
    fn fetch(&mut self, partition: PartitionId) {
        let Some(cursor) = self.cursors.get(&partition) else {
            return;
        };
        if cursor.end.is_some_and(|end| cursor.position >= end) {
            self.cursors.remove(&partition);
            return;
        }
        let (handle, from) = (cursor.partition.clone(), cursor.position);
        let (fetch_bytes, max_wait) = (self.fetch_bytes, self.max_wait);
        let fetch = async move {
            (
                partition,
                handle.read_within(from, fetch_bytes, max_wait).await,
            )
        };
        self.fetches.push(fetch.boxed());
    }

    async fn next(mut self) -> Option<(Result<ConsumerRecord, Error>, Self)> {
        loop {
            while let Some(records) = self.ready.front_mut() {
                match records.next() {
                    Some(record) => return Some((Ok(record), self)),
                    None => self.ready.pop_front(),
                };
            }
            let (partition, result) = self.fetches.next().await?;
            let read = match result {
                Ok(read) => read,
                Err(error) => {
                    if error.is_retriable() {
                        self.fetch(partition);
                    } else {
                        self.cursors.remove(&partition);
                    }
                    return Some((Err(error), self));
                }
            };
            let Some(cursor) = self.cursors.get_mut(&partition) else {
                continue;
            };
            let mut records = read.records;
            cursor.position = read.next_offset;
            if let Some(end) = cursor.end {
                records.retain(|record| record.offset < end);
            }
            self.ready.push_back(records.into_iter());
            self.fetch(partition);
            // Sends the request that was just made; whatever is here already is taken at the next turn.
            if let Some(Some(early)) = self.fetches.next().now_or_never() {
                let ready = async move { early };
                self.fetches.push(ready.boxed());
            }
        }
    }
}
