//! A writer that numbers every record and keeps, for each, what it knows of its fate.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use logboom::client::{Ack, Client, Delivery, Producer, ProducerConfig, Record};
use logboom::runtime::Tasks;
use logboom::testkit::workload::encode_value;
use logboom::types::{Error, Offset, Outcome};
use tokio::time::Instant;

/// What is written.
#[derive(Debug, Clone)]
pub struct WorkloadConfig {
    /// Tells the records of several writers apart.
    pub writer: u32,
    /// The topic; it exists.
    pub topic: String,
    /// Its partitions, written to in turn.
    pub partitions: u32,
    /// Bytes of each value, at least those that its number takes.
    pub value_bytes: usize,
    /// Unacknowledged records at once.
    pub in_flight: usize,
    /// Between two records; zero: as fast as it goes.
    pub pause: Duration,
    /// At most so many records.
    pub records_max: u64,
    /// How they are sent.
    pub producer: ProducerConfig,
}

impl WorkloadConfig {
    /// Records of 100 bytes, up to 200 in flight, one every 200 µs.
    pub fn new(topic: &str, partitions: u32) -> Self {
        Self {
            writer: 1,
            topic: topic.to_owned(),
            partitions,
            value_bytes: 100,
            in_flight: 200,
            pause: Duration::from_micros(200),
            records_max: 10_000_000,
            producer: ProducerConfig::default(),
        }
    }
}

/// What is known of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Sent, no answer yet; counts as unknown in the end.
    Invoked,
    /// Acknowledged, at this offset.
    Acked(Offset),
    /// It had no effect and never will, said the error.
    NotDone(Error),
    /// It may have been appended, or may yet.
    Unknown(Error),
}

/// A record that was sent.
#[derive(Debug, Clone)]
pub struct Sent {
    /// Its writer.
    pub writer: u32,
    /// Its number with that writer, from 0 in the order of sending.
    pub number: u64,
    /// Where to.
    pub partition: u32,
    /// When.
    pub invoked: Instant,
    /// When its fate was known.
    pub completed: Option<Instant>,
    /// What is known of it.
    pub fate: Fate,
}

/// Everything that was sent, in the order of sending per writer.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// The records.
    pub sent: Vec<Sent>,
}

impl History {
    /// The longest time without an acknowledgement in the partition, between its first and its last one.
    pub fn longest_silence(&self, partition: u32) -> Duration {
        let mut times: Vec<Instant> = self
            .sent
            .iter()
            .filter(|one| one.partition == partition && matches!(one.fate, Fate::Acked(_)))
            .filter_map(|one| one.completed)
            .collect();
        times.sort_unstable();
        let gaps = times
            .iter()
            .zip(times.iter().skip(1))
            .map(|(one, next)| *next - *one);
        gaps.max().unwrap_or_default()
    }

    /// From `when` to the first acknowledgement after it of a record of the partition that was sent after it.
    pub fn first_ack_after(&self, partition: u32, when: Instant) -> Option<Duration> {
        self.sent
            .iter()
            .filter(|one| one.partition == partition && one.invoked >= when)
            .filter(|one| matches!(one.fate, Fate::Acked(_)))
            .filter_map(|one| one.completed)
            .min()
            .map(|at| at - when)
    }
}

/// The value that stands for a writer's record.
pub fn value_of(writer: u32, number: u64) -> u64 {
    u64::from(writer) << 40 | number
}

#[derive(Debug, Default)]
struct Shared {
    history: Mutex<History>,
    acked: AtomicU64,
    stop: AtomicBool,
}

/// A running writer.
#[derive(Debug)]
pub struct Workload {
    shared: Arc<Shared>,
    tasks: Tasks,
    writer: tokio::task::JoinHandle<()>,
}

impl Workload {
    /// Starts writing.
    pub fn start(client: &Client, config: WorkloadConfig) -> Self {
        assert!(config.in_flight > 0 && config.partitions > 0, "{config:?}");
        let producer = Producer::new(client, &config.topic, config.producer.clone())
            .unwrap_or_else(|error| panic!("cannot write to {}: {error}", config.topic));
        let shared = Arc::new(Shared::default());
        let tasks = Tasks::new();
        let writer = tasks.spawn_graceful(write(shared.clone(), producer, config));
        Self {
            shared,
            tasks,
            writer,
        }
    }

    /// Records acknowledged so far.
    pub fn acked(&self) -> u64 {
        self.shared.acked.load(Ordering::Acquire)
    }

    /// Waits until `more` further records are acknowledged.
    pub async fn wait_acked(&self, more: u64, within: Duration) {
        let goal = self.acked() + more;
        super::wait_for(
            &format!("{more} more acknowledgements"),
            within,
            async || {
                let acked = self.acked();
                anyhow::ensure!(
                    acked >= goal,
                    "{acked} of {goal}, last failure: {:?}",
                    self.last_failure()
                );
                Ok(())
            },
        )
        .await;
    }

    fn last_failure(&self) -> Option<Error> {
        let history = self
            .shared
            .history
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        history.sent.iter().rev().find_map(|one| match &one.fate {
            Fate::NotDone(error) | Fate::Unknown(error) => Some(error.clone()),
            _ => None,
        })
    }

    /// Stops sending, waits until the fate of everything sent is known, and returns it all.
    pub async fn stop(self) -> History {
        self.shared.stop.store(true, Ordering::Release);
        self.writer.await.expect("the writer's task");
        self.tasks.shutdown().await;
        std::mem::take(
            &mut *self
                .shared
                .history
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}

impl Shared {
    fn sent(&self, sent: Sent) {
        self.history
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .sent
            .push(sent);
    }

    fn completed(&self, number: u64, result: Result<Ack, Error>) {
        let fate = match result {
            Ok(ack) => Fate::Acked(ack.offset),
            Err(error) if error.outcome() == Outcome::NotDone => Fate::NotDone(error),
            Err(error) => Fate::Unknown(error),
        };
        let acked = matches!(fate, Fate::Acked(_));
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(number).expect("a number of a record");
        if let Some(sent) = history.sent.get_mut(index) {
            sent.completed = Some(Instant::now());
            sent.fate = fate;
        }
        drop(history);
        if acked {
            self.acked.fetch_add(1, Ordering::AcqRel);
        }
    }
}

async fn write(shared: Arc<Shared>, producer: Producer, config: WorkloadConfig) {
    let mut flying: VecDeque<(u64, Delivery)> = VecDeque::new();
    for number in 0..config.records_max {
        if shared.stop.load(Ordering::Acquire) {
            break;
        }
        let partition = u32::try_from(number % u64::from(config.partitions)).unwrap_or(0);
        let record = Record {
            timestamp_ms: logboom::runtime::wall_clock_ms(),
            value: Some(encode_value(
                value_of(config.writer, number),
                partition,
                config.value_bytes,
            )),
            ..Record::default()
        };
        shared.sent(Sent {
            writer: config.writer,
            number,
            partition,
            invoked: Instant::now(),
            completed: None,
            fate: Fate::Invoked,
        });
        match producer.send_to(partition, record).await {
            Ok(delivery) => flying.push_back((number, delivery)),
            Err(error) => shared.completed(number, Err(error)),
        }
        settle(&shared, &mut flying, config.in_flight, config.pause).await;
    }
    settle(&shared, &mut flying, 1, Duration::ZERO).await;
}

/// Takes the answers there are; waits while `in_flight` or more are open, and for `pause`. Partitions answer in their own
/// order, and one without a leader must not keep the acknowledgements of the others from being seen.
async fn settle(
    shared: &Shared,
    flying: &mut VecDeque<(u64, Delivery)>,
    in_flight: usize,
    pause: Duration,
) {
    let until = Instant::now() + pause;
    let mut pausing = !pause.is_zero();
    let mut timer = std::pin::pin!(tokio::time::sleep_until(until));
    std::future::poll_fn(|context| {
        flying.retain_mut(
            |(number, delivery)| match std::pin::Pin::new(delivery).poll(context) {
                std::task::Poll::Ready(result) => {
                    shared.completed(*number, result);
                    false
                }
                std::task::Poll::Pending => true,
            },
        );
        pausing = pausing && timer.as_mut().poll(context).is_pending();
        if pausing || flying.len() >= in_flight {
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(())
    })
    .await;
}
