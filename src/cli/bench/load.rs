//! The clients that load a cluster, and what each of them writes down.
//!
//! Owns the loops that send and wait, and the recordings. An operation counts when it ends within the window that is measured (with
//! a timetable: when it was to begin there); what became of every record is written down at all times, for `verify`. Each client
//! works and writes alone; nothing is shared but the timetable, the stop and a count for who watches.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use logboom::client::{Ack, Client, Delivery, Producer, ProducerConfig, Record};
use logboom::runtime::Tasks;
use logboom::types::{Acks, Error, Outcome};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::figures::Latencies;
use super::kills::Lookout;
use super::pace::{Alarm, Timetable};
use super::verify::{Acked, Filler, Ledger, Stamp, push_acked};

/// Width of a step of the throughput over time.
pub(super) const STEP: Duration = Duration::from_millis(250);
/// Failures one after the other after which a client gives up.
const FAILURES_MAX: u32 = 20;
/// Wait after a failure, so that a cluster that refuses everything is not asked a million times.
const AFTER_FAILURE: Duration = Duration::from_millis(5);
/// Records of one partition that a producer has sent and that wait to be looked at.
const DELIVERIES_WAITING: usize = 65_536;

/// How records are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Each operation is one batch of so many records, and so many operations of one client are unanswered at most.
    Batches { records: u32, in_flight: usize },
    /// One record at a time through a `Producer`, which makes batches of them.
    Producer {
        batch_bytes: usize,
        linger: Duration,
        buffer_bytes: usize,
    },
}

/// What all clients do.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) topic: String,
    pub(super) partitions: u32,
    pub(super) clients: u32,
    pub(super) record_bytes: usize,
    pub(super) how: How,
    pub(super) acks: Acks,
    pub(super) filler: Filler,
    pub(super) window: Window,
    pub(super) timetable: Option<Arc<Timetable>>,
    pub(super) lookout: Option<Arc<Lookout>>,
}

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) from: Instant,
    pub(super) until: Instant,
}

impl Window {
    fn has(&self, moment: Instant) -> bool {
        (self.from..self.until).contains(&moment)
    }
}

/// What clients share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    stop: AtomicBool,
    acknowledged: AtomicU64,
}

impl Shared {
    /// Lets the clients end when what they have sent is answered.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Records acknowledged so far.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }
}

/// How often clients were answered with each kind of error, and how one of them read.
#[derive(Debug, Clone, Default)]
pub(super) struct Errors(pub(super) BTreeMap<String, (u64, String)>);

impl Errors {
    fn count(&mut self, error: &Error) {
        // The name of the variant: texts name partitions and addresses.
        let shown = format!("{error:?}");
        let name = shown.split(|character: char| !character.is_alphanumeric());
        let name = name.take(1).collect::<String>();
        let first = || (0, error.to_string());
        self.0.entry(name).or_insert_with(first).0 += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (name, (count, text)) in &other.0 {
            let first = || (0, text.clone());
            self.0.entry(name.clone()).or_insert_with(first).0 += count;
        }
    }
}

/// What a client has seen.
#[derive(Debug)]
pub(super) struct Recording {
    client: u32,
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    pub(super) latencies: Latencies,
    pub(super) operations: u64,
    pub(super) records: u64,
    /// Records by when they were acknowledged, in steps from the beginning of the window.
    pub(super) steps: Vec<u64>,
    pub(super) errors: Errors,
    sent: u64,
    acked: Vec<Acked>,
    unknown: BTreeSet<u64>,
    refused: BTreeSet<u64>,
    out_of_order: u64,
    /// Offset of the last record acknowledged, by partition.
    last: BTreeMap<u32, u64>,
    failures_in_a_row: u32,
    last_error: Option<Error>,
}

/// An operation that has begun.
#[derive(Debug, Clone, Copy)]
struct Begun {
    /// When it did, or was to.
    at: Instant,
    partition: u32,
    sequence: u64,
    count: u32,
    /// Offset of the last record of this client and partition that was acknowledged before.
    behind: Option<u64>,
}

impl Recording {
    fn new(client: u32, plan: &Arc<Plan>, shared: &Arc<Shared>) -> Self {
        Self {
            client,
            plan: plan.clone(),
            shared: shared.clone(),
            latencies: Latencies::default(),
            operations: 0,
            records: 0,
            steps: Vec::new(),
            errors: Errors::default(),
            sent: 0,
            acked: Vec::new(),
            unknown: BTreeSet::new(),
            refused: BTreeSet::new(),
            out_of_order: 0,
            last: BTreeMap::new(),
            failures_in_a_row: 0,
            last_error: None,
        }
    }

    fn ended(&mut self, begun: &Begun, at: Instant, result: Result<Ack, Error>) {
        match result {
            Ok(ack) => self.acknowledged(begun, at, &ack),
            Err(error) => self.failed(begun, error),
        }
    }

    fn acknowledged(&mut self, begun: &Begun, at: Instant, ack: &Ack) {
        self.failures_in_a_row = 0;
        let count = u64::from(begun.count);
        self.shared.acknowledged.fetch_add(count, Ordering::Relaxed);
        if let Some(lookout) = &self.plan.lookout {
            lookout.acknowledged(begun.partition, ack.leader_epoch, at);
        }
        let window = self.plan.window;
        let counts_from = if self.plan.timetable.is_some() {
            begun.at
        } else {
            at
        };
        if window.has(counts_from) {
            self.operations += 1;
            self.records += count;
            self.latencies.record(at - begun.at);
        }
        if window.has(at) {
            let step = (at - window.from).as_nanos() / STEP.as_nanos();
            let step = usize::try_from(step).unwrap_or(0);
            if step >= self.steps.len() {
                self.steps.resize(step + 1, 0);
            }
            if let Some(records) = self.steps.get_mut(step) {
                *records += count;
            }
        }
        if ack.offset == Ack::NO_OFFSET {
            return;
        }
        if begun.behind.is_some_and(|behind| ack.offset.0 <= behind) {
            self.out_of_order += 1;
        }
        let last = ack.offset.0.saturating_add(count).saturating_sub(1);
        let known = self.last.entry(begun.partition).or_default();
        *known = last.max(*known);
        let next = Acked {
            partition: begun.partition,
            client: self.client,
            sequence: begun.sequence,
            offset: ack.offset.0,
            count,
        };
        push_acked(&mut self.acked, next);
    }

    fn failed(&mut self, begun: &Begun, error: Error) {
        let records = begun.sequence..begun.sequence + u64::from(begun.count);
        match error.outcome() {
            Outcome::NotDone => self.refused.extend(records),
            Outcome::Unknown => self.unknown.extend(records),
        }
        self.failures_in_a_row += 1;
        self.errors.count(&error);
        self.last_error = Some(error);
    }

    /// Whether there is no use in going on.
    fn gives_up(&self) -> bool {
        // While brokers are killed failures are what is measured.
        self.plan.lookout.is_none() && self.failures_in_a_row >= FAILURES_MAX
    }

    /// The next records of this client, and where they go.
    fn next(&mut self, count: u32, partition: u32) -> (Begun, Vec<Record>) {
        let sequence = self.sent;
        self.sent += u64::from(count);
        let begun = Begun {
            at: Instant::now(),
            partition,
            sequence,
            count,
            behind: self.last.get(&partition).copied(),
        };
        let stamps = (sequence..self.sent).map(|sequence| Stamp {
            client: self.client,
            sequence,
        });
        let (filler, bytes) = (&self.plan.filler, self.plan.record_bytes);
        let records = stamps.map(|stamp| Record::new(filler.record(stamp, bytes)));
        (begun, records.collect())
    }
}

impl Plan {
    /// Where a client's operation goes: to all partitions by turns, and always to the same one when their number divides that of the
    /// clients.
    fn partition(&self, client: u32, number: u64) -> u32 {
        let turn = number.wrapping_mul(u64::from(self.clients));
        let place = turn.wrapping_add(u64::from(client)) % u64::from(self.partitions.max(1));
        u32::try_from(place).unwrap_or(0)
    }
}

/// Clients at work.
pub(super) struct Running {
    tasks: Tasks,
    recordings: Vec<oneshot::Receiver<anyhow::Result<Vec<Recording>>>>,
    pub(super) shared: Arc<Shared>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

/// Starts the clients of `plan` over `connections`, by turns.
pub(super) fn start(plan: Plan, connections: &[Client]) -> anyhow::Result<Running> {
    let (tasks, shared) = (Tasks::new(), Arc::<Shared>::default());
    let plan = Arc::new(plan);
    let mut recordings = Vec::new();
    for (client, connection) in (0..plan.clients).zip(connections.iter().cycle()) {
        let (sender, receiver) = oneshot::channel();
        let recording = Recording::new(client, &plan, &shared);
        let (connection, inner) = (connection.clone(), tasks.clone());
        let alarm = Alarm::new().context("cannot get a timer")?;
        tasks.spawn(async move {
            let done = match recording.plan.how {
                How::Batches { in_flight, .. } => {
                    let done = in_batches(recording, &connection, in_flight, &alarm).await;
                    done.map(|recording| vec![recording])
                }
                How::Producer { .. } => one_by_one(recording, &connection, &inner, &alarm).await,
            };
            // Nobody waits any more when the run was given up.
            sender.send(done).ok();
        });
        recordings.push(receiver);
    }
    Ok(Running {
        tasks,
        recordings,
        shared,
    })
}

impl Running {
    /// Lets the clients end, and gives what they have written down.
    pub(super) async fn finish(mut self, within: Duration) -> anyhow::Result<Vec<Recording>> {
        self.shared.stop();
        let deadline = Instant::now() + within;
        let mut all = Vec::new();
        for receiver in std::mem::take(&mut self.recordings) {
            let done = tokio::time::timeout_at(deadline, receiver).await;
            let done = done.with_context(|| {
                format!("clients have no answer {within:?} after the end; is the cluster alive?")
            })?;
            all.extend(done.context("a client vanished")??);
        }
        for recording in &all {
            if let (true, Some(error)) = (recording.gives_up(), &recording.last_error) {
                anyhow::bail!("a client gave up after {FAILURES_MAX} failures: {error}");
            }
        }
        Ok(all)
    }
}

/// What all clients together have sent and seen.
pub(super) fn ledger(recordings: &mut [Recording], acks: Acks, clients: u32) -> Ledger {
    let mut ledger = Ledger {
        sent: vec![0; usize::try_from(clients).unwrap_or(0)],
        without_promise: acks == Acks::None,
        ..Ledger::default()
    };
    for recording in recordings {
        let client = recording.client;
        let sent = usize::try_from(client).ok();
        if let Some(sent) = sent.and_then(|client| ledger.sent.get_mut(client)) {
            *sent = recording.sent.max(*sent);
        }
        ledger.acked.append(&mut recording.acked);
        let of_client = |sequence: &u64| (client, *sequence);
        ledger
            .unknown
            .extend(recording.unknown.iter().map(of_client));
        ledger
            .refused
            .extend(recording.refused.iter().map(of_client));
        ledger.out_of_order += recording.out_of_order;
    }
    ledger
}

/// A client whose operations are batches.
async fn in_batches(
    mut recording: Recording,
    client: &Client,
    in_flight: usize,
    alarm: &Alarm,
) -> anyhow::Result<Recording> {
    let plan = recording.plan.clone();
    let topic = client.topic(&plan.topic)?;
    let How::Batches { records, .. } = plan.how else {
        anyhow::bail!("a client without batches");
    };
    let mut flights = FuturesUnordered::new();
    let mut number = 0_u64;
    let mut due = None;
    loop {
        let mut open = !recording.shared.is_stopped() && !recording.gives_up();
        if open && flights.len() < in_flight && due.is_none() {
            due = match &plan.timetable {
                Some(timetable) => Some(timetable.take()).filter(|at| *at < plan.window.until),
                None => Some(Instant::now()),
            };
            open = due.is_some();
        }
        if !open && flights.is_empty() {
            return Ok(recording);
        }
        let begin = due.filter(|_| open && flights.len() < in_flight);
        let wait = async {
            match begin {
                Some(at) => alarm.until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some((begun, at, result)) = flights.next(), if !flights.is_empty() => {
                let failed = Result::is_err(&result);
                recording.ended(&begun, at, result);
                if failed {
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
            waited = wait, if begin.is_some() => {
                waited.context("the timer failed")?;
                let partition = plan.partition(recording.client, number);
                number += 1;
                let (mut begun, batch) = recording.next(records, partition);
                if plan.timetable.is_some() {
                    begun.at = due.unwrap_or(begun.at);
                }
                due = None;
                let (partition, acks) = (topic.partition(partition), plan.acks);
                flights.push(async move {
                    let result = partition.append(batch, acks).await;
                    (begun, Instant::now(), result)
                });
            }
        }
    }
}

/// A client that sends records one by one through a producer; answers with a recording for each partition.
async fn one_by_one(
    mut recording: Recording,
    client: &Client,
    tasks: &Tasks,
    alarm: &Alarm,
) -> anyhow::Result<Vec<Recording>> {
    let plan = recording.plan.clone();
    let How::Producer {
        batch_bytes,
        linger,
        buffer_bytes,
    } = plan.how
    else {
        anyhow::bail!("a client without a producer");
    };
    let config = ProducerConfig {
        acks: plan.acks,
        batch_bytes,
        linger,
        buffer_bytes_max: buffer_bytes,
        ..ProducerConfig::default()
    };
    let producer = Producer::new(client, &plan.topic, config)?;
    producer.ready().await?;
    let (mut watchers, mut ends) = (Vec::new(), Vec::new());
    for _ in 0..plan.partitions {
        let (sender, receiver) = mpsc::channel(DELIVERIES_WAITING);
        let (ended, end) = oneshot::channel();
        let of_partition = Recording::new(recording.client, &plan, &recording.shared);
        tasks.spawn(async move {
            ended.send(watch(of_partition, receiver).await).ok();
        });
        watchers.push(sender);
        ends.push(end);
    }
    let in_a_batch = u64::try_from(batch_bytes / plan.record_bytes.max(1)).unwrap_or(1);
    while !recording.shared.is_stopped() && !producer.has_failed() {
        let due = plan.timetable.as_ref().map(|timetable| timetable.take());
        if let Some(due) = due {
            if due >= plan.window.until {
                break;
            }
            alarm.until(due).await.context("the timer failed")?;
        }
        let number = recording.sent / in_a_batch.max(1);
        let partition = plan.partition(recording.client, number);
        let (mut begun, records) = recording.next(1, partition);
        begun.at = due.unwrap_or(begun.at);
        for record in records {
            match producer.send_to(partition, record).await {
                Err(error) => recording.failed(&begun, error),
                Ok(delivery) => {
                    let watcher = usize::try_from(partition).ok();
                    let watcher = watcher.and_then(|at| watchers.get(at));
                    let watcher = watcher.context("a partition without a watcher")?;
                    let passed = watcher.send((begun, delivery)).await;
                    passed.ok().context("a watcher vanished")?;
                }
            }
        }
    }
    drop(watchers);
    // Whatever failed is in the recordings.
    producer.close().await.ok();
    let mut all = vec![recording];
    for end in ends {
        all.push(end.await.context("a watcher vanished")?);
    }
    Ok(all)
}

/// Looks at the acknowledgements of one partition, in order.
async fn watch(mut recording: Recording, mut sent: mpsc::Receiver<(Begun, Delivery)>) -> Recording {
    while let Some((mut begun, delivery)) = sent.recv().await {
        let result = delivery.await;
        // A producer keeps the order of what it was given, answered or not.
        begun.behind = recording.last.get(&begun.partition).copied();
        recording.ended(&begun, Instant::now(), result);
    }
    recording
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(clients: u32, partitions: u32) -> Plan {
        let from = Instant::now();
        Plan {
            topic: "t".to_owned(),
            partitions,
            clients,
            record_bytes: 100,
            how: How::Batches {
                records: 1,
                in_flight: 1,
            },
            acks: Acks::All,
            filler: Filler::new(1, 100),
            window: Window {
                from,
                until: from + Duration::from_secs(1),
            },
            timetable: None,
            lookout: None,
        }
    }

    /// Goal: partitions are written to evenly, and each by the same clients when that comes out even. Method: counts.
    #[test]
    fn partitions_get_their_turns() {
        for (clients, partitions) in [(1, 3), (64, 3), (4, 10), (6, 3)] {
            let plan = plan(clients, partitions);
            let mut counts = BTreeMap::new();
            let mut by_client = BTreeMap::new();
            for client in 0..clients {
                for number in 0..30 {
                    let partition = plan.partition(client, number);
                    *counts.entry(partition).or_insert(0) += 1;
                    by_client
                        .entry(client)
                        .or_insert_with(BTreeSet::new)
                        .insert(partition);
                }
            }
            assert_eq!(counts.len(), partitions as usize);
            let (least, most) = (counts.values().min(), counts.values().max());
            assert!(most.unwrap() - least.unwrap() <= clients, "{counts:?}");
            if clients % partitions == 0 {
                assert!(by_client.values().all(|all| all.len() == 1));
            }
        }
    }

    /// Goal: only what ends in the window is measured, everything is remembered, and an offset that goes back is noticed. Method:
    /// acknowledgements before, in and behind the window; the last one at an old offset.
    #[test]
    fn recordings_keep_apart_what_counts() {
        let plan = Arc::new(plan(1, 1));
        let mut recording = Recording::new(0, &plan, &Arc::default());
        let ms = Duration::from_millis;
        let early = plan.window.from.checked_sub(ms(10)).unwrap();
        for (end, offset) in [
            (early, 0),
            (plan.window.from + ms(600), 1),
            (plan.window.until, 2),
            (plan.window.until, 1),
        ] {
            let (mut begun, _) = recording.next(1, 0);
            begun.at = end.checked_sub(ms(5)).unwrap();
            let ack = Ack {
                partition: logboom::types::PartitionId(0),
                offset: logboom::types::Offset(offset),
                leader_epoch: logboom::types::LeaderEpoch(1),
                durable_on: Arc::new([]),
            };
            recording.ended(&begun, end, Ok(ack));
        }
        let (begun, _) = recording.next(1, 0);
        recording.failed(&begun, Error::Timeout { after_ms: 1 });
        assert_eq!((recording.operations, recording.records), (1, 1));
        let mut errors = recording.errors.clone();
        errors.add(&recording.errors);
        let kinds: Vec<_> = errors
            .0
            .iter()
            .map(|(name, (count, _))| (name.as_str(), *count))
            .collect();
        assert_eq!(kinds, [("Timeout", 2)]);
        assert_eq!(recording.steps, [0, 0, 1]);
        assert!((recording.latencies.at_us(0.5) - 5_000.0).abs() < 50.0);
        let ledger = ledger(&mut [recording], Acks::All, 1);
        assert_eq!((ledger.sent, ledger.out_of_order), (vec![5], 1));
        assert_eq!(ledger.acked.iter().map(|run| run.count).sum::<u64>(), 4);
        assert_eq!(ledger.unknown, BTreeSet::from([(0, 4)]));
    }
}
