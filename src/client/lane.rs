//! One partition's way from a producer to its leader: batches, sequences, the window in flight, and recovery.
//!
//! Owns the partition's queue, its sequence numbers and its unanswered batches; one task per lane does all sending.
//! Does not choose partitions and does not bound memory: the producer does both.
//!
//! Order: batches leave in the order of their records. While all goes well up to `in_flight_max` are unanswered. After
//! any failure nothing new is sent; the answers still out are waited for, and what was not acknowledged is sent again,
//! one batch at a time, in order, as the identical bytes with the identical sequence: the broker knows what it has.
//!
//! When a batch is given up (its error cannot be retried, or its time is over), the batches that were numbered behind it
//! are given up too, since the broker rightly refuses a gap; the lane then takes a new producer id, and later records
//! go on under it. A batch refused before it was numbered leaves no gap and takes nothing with it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, Shared};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::producer::ProducerConfig;
use super::retry::{Repeat, Retry, Verdict};
use super::router::{Route, Target};
use super::{Ack, Client, batch, jitter, unexpected};
use crate::api::{Request, Response};
use crate::record::{ProducerStamp, Record};
use crate::runtime::Tasks;
use crate::types::{Error, Outcome, TopicPartition};

/// What became of a batch.
pub(super) type BatchResult = Result<Ack, Error>;
/// Where a batch's result will be seen by everyone who waits for one of its records.
pub(super) type Seen = Shared<oneshot::Receiver<BatchResult>>;

/// The first failure of any batch of a producer, until a flush reports it.
pub(super) type FirstFailure = Arc<Mutex<Option<Error>>>;

/// Where a batch's result goes.
struct Done {
    sender: oneshot::Sender<BatchResult>,
    failure: FirstFailure,
}

impl Done {
    fn send(self, result: BatchResult) {
        if let Err(error) = &result {
            let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert_with(|| error.clone());
        }
        // Nobody may want to know.
        self.sender.send(result).ok();
    }
}

/// A producer's id: number and epoch.
pub(super) type ProducerId = (i64, i16);

/// Most records of one batch: far below the 2³¹ that the format allows.
const BATCH_RECORDS_MAX: usize = 100_000;

struct Batch {
    records: Vec<Record>,
    bytes: usize,
    since: Instant,
    /// Memory of the producer's bound, given back when the batch is done with.
    permit: Option<OwnedSemaphorePermit>,
    full: bool,
    done: Done,
    seen: Seen,
}

#[derive(Default)]
struct Queue {
    batches: VecDeque<Batch>,
    /// Results of batches that have left the queue and are not done.
    sent: Vec<Seen>,
    /// Do not wait for company: someone flushes.
    hurry: bool,
    closed: bool,
}

/// The queue of one partition, shared by the producer and the lane's task.
pub(super) struct Lane {
    pub(super) partition: TopicPartition,
    queue: Mutex<Queue>,
    wake: Notify,
    failure: FirstFailure,
}

impl Lane {
    pub(super) fn new(partition: TopicPartition, failure: FirstFailure) -> Self {
        Self {
            partition,
            queue: Mutex::default(),
            wake: Notify::new(),
            failure,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a record of `size` bytes behind all others; answers with its batch's result to come, and its place in the batch.
    pub(super) fn push(
        &self,
        record: Record,
        size: usize,
        permit: OwnedSemaphorePermit,
        batch_bytes: usize,
    ) -> Result<(Seen, u64), Error> {
        let mut queue = self.lock();
        if queue.closed {
            return Err(closed());
        }
        let fits = |batch: &Batch| {
            !batch.full
                && batch.bytes.saturating_add(size) <= batch_bytes
                && batch.records.len() < BATCH_RECORDS_MAX
        };
        if let Some(last) = queue.batches.back_mut() {
            if fits(last) {
                let place = u64::try_from(last.records.len()).unwrap_or(u64::MAX);
                last.records.push(record);
                last.bytes += size;
                match &mut last.permit {
                    Some(held) => held.merge(permit),
                    none => *none = Some(permit),
                }
                return Ok((last.seen.clone(), place));
            }
            last.full = true;
        }
        let (sender, seen) = oneshot::channel();
        let seen = seen.shared();
        let done = Done {
            sender,
            failure: self.failure.clone(),
        };
        queue.batches.push_back(Batch {
            records: vec![record],
            bytes: size,
            since: Instant::now(),
            permit: Some(permit),
            full: size >= batch_bytes,
            done,
            seen: seen.clone(),
        });
        drop(queue);
        self.wake.notify_one();
        Ok((seen, 0))
    }

    /// Sends what waits for company; answers with the results of everything that is not done yet.
    pub(super) fn flush(&self) -> Vec<Seen> {
        let mut queue = self.lock();
        queue.hurry = !queue.batches.is_empty();
        let waiting = queue.batches.iter().map(|batch| batch.seen.clone());
        let all = queue.sent.iter().cloned().chain(waiting).collect();
        drop(queue);
        self.wake.notify_one();
        all
    }

    /// Takes no more records.
    pub(super) fn close(&self) {
        self.lock().closed = true;
    }
}

/// The producer takes no more records.
pub(super) fn closed() -> Error {
    Error::InvalidRequest {
        reason: "the producer is closed".to_owned(),
    }
}

/// A numbered batch that is not done.
struct Flight {
    number: u64,
    bytes: Bytes,
    retry: Retry,
    /// The answer, when it was an error.
    error: Option<Error>,
    resolved: bool,
    done: Option<Done>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Flight {
    fn finish(&mut self, result: BatchResult) {
        self.resolved = true;
        self.permit = None;
        if let Some(done) = self.done.take() {
            done.send(result);
        }
    }
}

type Answer = (u64, Result<Response, Error>);

/// The task of a lane.
pub(super) struct Sender {
    lane: Arc<Lane>,
    client: Client,
    config: Arc<ProducerConfig>,
    tasks: Tasks,
    route: Route,
    /// Drawn by the producer for all lanes; replaced by an own one after a batch was given up.
    id: Option<ProducerId>,
    shared_id: Arc<tokio::sync::OnceCell<ProducerId>>,
    id_lost: bool,
    sequence: i32,
    window: VecDeque<Flight>,
    answers: FuturesUnordered<BoxFuture<'static, Answer>>,
    target: Option<Target>,
    sent: u64,
    recovering: bool,
}

impl Sender {
    pub(super) fn new(
        lane: Arc<Lane>,
        client: Client,
        config: Arc<ProducerConfig>,
        tasks: Tasks,
        shared_id: Arc<tokio::sync::OnceCell<ProducerId>>,
    ) -> Self {
        let route = Route::Leader(lane.partition.clone());
        Self {
            lane,
            client,
            config,
            tasks,
            route,
            id: None,
            shared_id,
            id_lost: false,
            sequence: 0,
            window: VecDeque::new(),
            answers: FuturesUnordered::new(),
            target: None,
            sent: 0,
            recovering: false,
        }
    }

    /// Sends until the producer's tasks are stopped; what is not done by then is reported as such.
    pub(super) async fn run(mut self) {
        let tasks = self.tasks.clone();
        tokio::select! {
            biased;
            () = tasks.stopped() => {}
            () = self.work() => {}
        }
        self.abandon();
    }

    async fn work(&mut self) {
        loop {
            let until = if self.recovering {
                None
            } else {
                self.send_ready().await
            };
            if self.recovering && self.answers.is_empty() {
                self.recover().await;
                continue;
            }
            let linger = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(answer) = self.answers.next(), if !self.answers.is_empty() => self.take(answer),
                () = self.lane.wake.notified() => {}
                () = linger => {}
            }
        }
    }

    fn window_max(&self) -> usize {
        // Without sequences the broker cannot keep the order of two that are in flight.
        if self.config.idempotent {
            self.config.in_flight_max.max(1)
        } else {
            1
        }
    }

    /// Sends all batches that are ready; answers when the next one will be, if only time is missing.
    async fn send_ready(&mut self) -> Option<Instant> {
        loop {
            let batch = match self.next_ready() {
                Ok(batch) => batch,
                Err(until) => return until,
            };
            self.launch(batch).await;
            if self.recovering {
                return None;
            }
        }
    }

    /// A full batch goes while the window has room. A smaller one waits until its linger is over; without linger it goes while
    /// fewer than two are in flight: the broker commits one and has the next one ready, and the rest gathers company.
    fn next_ready(&mut self) -> Result<Batch, Option<Instant>> {
        let room = self.window_max().saturating_sub(self.window.len());
        let mut queue = self.lane.lock();
        let hurry = queue.hurry;
        let Some(first) = queue.batches.front() else {
            queue.hurry = false;
            return Err(None);
        };
        if room == 0 {
            return Err(None);
        }
        if !first.full && !hurry {
            let until = first.since + self.config.linger;
            if Instant::now() < until {
                return Err(Some(until));
            }
        }
        if !first.full && (hurry || self.config.linger.is_zero()) && self.window.len() >= 2 {
            return Err(None);
        }
        let Some(batch) = queue.batches.pop_front() else {
            return Err(None);
        };
        queue
            .sent
            .retain(|seen| seen.clone().now_or_never().is_none());
        queue.sent.push(batch.seen.clone());
        Ok(batch)
    }

    /// Numbers a batch and sends it. A batch that cannot be sent at all is refused here, and leaves no gap.
    async fn launch(&mut self, batch: Batch) {
        let deadline = batch.since + self.config.delivery_timeout;
        let Batch {
            records,
            permit,
            done,
            ..
        } = batch;
        let repeat = if self.config.idempotent {
            Repeat::Idempotent
        } else {
            Repeat::Once
        };
        let mut flight = Flight {
            number: self.sent,
            bytes: Bytes::new(),
            retry: self.client.retry(repeat, deadline),
            error: None,
            resolved: false,
            done: Some(done),
            permit,
        };
        self.sent += 1;
        let prepared = self.prepare(&records, deadline).await;
        let count = i32::try_from(records.len()).unwrap_or(i32::MAX);
        drop(records);
        let bytes = match prepared {
            Ok(bytes) => bytes,
            Err(error) => return flight.finish(Err(error)),
        };
        flight.bytes = bytes;
        self.sequence = after(self.sequence, count);
        match self.find_target(deadline).await {
            Ok(target) => {
                let answer = target.send(self.request(&flight.bytes), self.limit(&flight.retry));
                let number = flight.number;
                self.answers
                    .push(answer.map(move |answer| (number, answer)).boxed());
            }
            Err(error) => {
                flight.error = Some(error);
                self.recovering = true;
            }
        }
        self.window.push_back(flight);
    }

    /// The bytes of a batch with the next sequence, if it may be sent at all.
    async fn prepare(&mut self, records: &[Record], deadline: Instant) -> Result<Bytes, Error> {
        if Instant::now() >= deadline {
            return Err(Error::LeaderUnavailable {
                partition: self.lane.partition.clone(),
            });
        }
        let stamp = if self.config.idempotent {
            let (id, epoch) = self.producer_id(deadline).await?;
            Some(ProducerStamp {
                id,
                epoch,
                base_sequence: self.sequence,
            })
        } else {
            None
        };
        let bytes = batch::encode(records, stamp)?;
        batch::check_size(
            &bytes,
            self.client
                .router()
                .max_message_bytes(&self.lane.partition.topic),
        )?;
        Ok(bytes)
    }

    async fn producer_id(&mut self, deadline: Instant) -> Result<ProducerId, Error> {
        if let Some(id) = self.id {
            return Ok(id);
        }
        let drawn = if self.id_lost {
            draw(&self.client, deadline).await
        } else {
            self.shared_id
                .get_or_try_init(|| draw(&self.client, deadline))
                .await
                .copied()
        };
        let id = drawn.map_err(|error| match error.outcome() {
            Outcome::NotDone => error,
            // The id may have been drawn; the batch was not sent, and that is what was asked.
            Outcome::Unknown => Error::ControllerUnavailable,
        })?;
        self.id = Some(id);
        Ok(id)
    }

    fn request(&self, records: &Bytes) -> Request {
        let partition = self.lane.partition.clone();
        Request::Produce {
            partition,
            acks: self.config.acks,
            records: records.clone(),
        }
    }

    fn limit(&self, retry: &Retry) -> Duration {
        let left = retry.deadline().saturating_duration_since(Instant::now());
        if self.config.idempotent {
            left.min(self.client.config().request_timeout)
        } else {
            left
        }
    }

    async fn find_target(&mut self, deadline: Instant) -> Result<Target, Error> {
        if let Some(target) = &self.target {
            return Ok(target.clone());
        }
        let found =
            tokio::time::timeout_at(deadline, self.client.router().target(&self.route)).await;
        let unavailable = || Error::LeaderUnavailable {
            partition: self.lane.partition.clone(),
        };
        let target = found.unwrap_or_else(|_| Err(unavailable()))?;
        self.target = Some(target.clone());
        Ok(target)
    }

    /// Takes note that an attempt failed, for whoever finds the next target.
    fn note(&mut self, error: &Error) {
        let target = self.target.take();
        self.client
            .router()
            .failed(&self.route, target.as_ref(), error);
    }

    /// An answer that came while the window was open.
    fn take(&mut self, (number, answer): Answer) {
        let partition = self.lane.partition.partition;
        let result = answer.and_then(|response| batch::ack(partition, &response));
        if let Err(error) = &result {
            // The first failure drops the target; those behind it say no more about it.
            if !self.recovering {
                self.note(&error.clone());
            }
            self.recovering = true;
        }
        if let Some(flight) = self
            .window
            .iter_mut()
            .find(|flight| flight.number == number)
        {
            match result {
                Ok(ack) => flight.finish(Ok(ack)),
                Err(error) => flight.error = Some(error),
            }
        }
        // The place of a batch is free only when all before it are done: the broker remembers a few batches per producer.
        while self.window.front().is_some_and(|flight| flight.resolved) {
            self.window.pop_front();
        }
    }

    /// Brings every batch of the window to an end, in order, one at a time. No answer is out when this is called.
    async fn recover(&mut self) {
        while let Some(mut flight) = self.window.pop_front() {
            if flight.resolved {
                continue;
            }
            let given_up = self.bring_home(&mut flight).await;
            if let Err(error) = given_up {
                flight.finish(Err(error));
                self.give_up_window();
            }
        }
        self.recovering = false;
    }

    /// Sends one batch until it is acknowledged or given up.
    async fn bring_home(&mut self, flight: &mut Flight) -> Result<(), Error> {
        // What a broker said while earlier batches were missing says nothing about this one.
        let mut failed = match flight.error.take() {
            Some(Error::OutOfOrderSequence { .. }) | None => None,
            other => other,
        };
        let client = self.client.clone();
        let mut shown = client.retry_place();
        loop {
            if let Some(error) = failed.take() {
                match flight.retry.failed(error, Instant::now(), jitter()) {
                    Verdict::Again(wait) => {
                        shown.failed(flight.retry.reason());
                        tokio::time::sleep(wait).await;
                    }
                    Verdict::Final(error) => return Err(error),
                }
            }
            let target = match self.find_target(flight.retry.deadline()).await {
                Ok(target) => target,
                Err(error) => {
                    self.note(&error);
                    failed = Some(error);
                    continue;
                }
            };
            let answer = target
                .send(self.request(&flight.bytes), self.limit(&flight.retry))
                .await;
            match answer.and_then(|response| batch::ack(self.lane.partition.partition, &response)) {
                Ok(ack) => {
                    flight.finish(Ok(ack));
                    return Ok(());
                }
                Err(error) => {
                    self.note(&error);
                    failed = Some(error);
                }
            }
        }
    }

    /// Gives up what is numbered behind a batch that was given up, and the numbering with it.
    fn give_up_window(&mut self) {
        for mut flight in std::mem::take(&mut self.window) {
            if !flight.resolved {
                let unknown = flight
                    .error
                    .take()
                    .filter(|e| e.outcome() == Outcome::Unknown);
                let reason = "an earlier batch of the same producer and partition was given up";
                let refused = Error::Refused {
                    reason: reason.to_owned(),
                };
                let error = flight.retry.give_up(unknown.unwrap_or(refused));
                flight.finish(Err(error));
            }
        }
        if self.config.idempotent {
            self.id = None;
            self.id_lost = true;
            self.sequence = 0;
        }
    }

    /// The producer is gone: everyone who waits is told what is known.
    fn abandon(&mut self) {
        self.lane.close();
        for mut flight in std::mem::take(&mut self.window) {
            if !flight.resolved {
                // It was sent, and its answer will not be heard.
                flight.finish(Err(Error::Timeout { after_ms: 0 }));
            }
        }
        let waiting = std::mem::take(&mut self.lane.lock().batches);
        for batch in waiting {
            batch.done.send(Err(closed()));
        }
    }
}

async fn draw(client: &Client, deadline: Instant) -> Result<ProducerId, Error> {
    match client.call_until(Request::InitProducer, deadline).await? {
        Response::Producer { id, epoch } => Ok((id, epoch)),
        other => Err(unexpected(&other)),
    }
}

/// The sequence `count` records on: 31 bits, as in Kafka.
fn after(sequence: i32, count: i32) -> i32 {
    sequence.wrapping_add(count) & i32::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: sequences wrap as Kafka's do, from the largest to 0. Method: the edge.
    #[test]
    fn sequences_wrap_at_31_bits() {
        assert_eq!(after(0, 5), 5);
        assert_eq!(after(i32::MAX, 1), 0);
        assert_eq!(after(i32::MAX - 1, 4), 2);
    }
}
