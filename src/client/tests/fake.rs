//! A cluster in memory that loses answers, moves leaders and refuses, on a script; its log is the judge.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::api::{
    Appended, Call, OffsetSpec, PartitionRoute, Request, Response, Service, TopicRoute,
};
use crate::client::router::Dial;
use crate::client::{Client, ClientConfig};
use crate::record::{self, BatchHeader};
use crate::types::{
    BrokerId, Endpoint, Error, LeaderEpoch, Offset, PartitionId, TopicName, TopicPartition,
};

/// What happens to a request for a partition.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// Nothing.
    Pass,
    /// It is done, and the answer is lost with the connection.
    LoseAnswer,
    /// It is not done, and the connection is lost: to the client the same.
    LoseRequest,
    /// It is done twice; the second answer is given.
    Repeat,
    /// It is refused.
    Refuse(Error),
    /// The leadership moves to the next broker, and the request finds out.
    Move,
    /// It is done, and no answer ever comes.
    Silence,
}

#[derive(Default)]
pub(super) struct Log {
    /// Batches, with their base offsets.
    pub(super) batches: Vec<(u64, Bytes)>,
    pub(super) end: u64,
    /// Per producer: the next sequence, and the last five batches by sequence.
    producers: HashMap<i64, (i32, VecDeque<(i32, u64)>)>,
}

pub(super) struct State {
    pub(super) logs: Vec<Log>,
    pub(super) leaders: Vec<u32>,
    pub(super) faults: VecDeque<Fault>,
    pub(super) dead: Vec<u32>,
    pub(super) dials: BTreeMap<String, u32>,
    pub(super) produce_calls: u64,
    pub(super) in_flight: usize,
    pub(super) in_flight_peak: usize,
    next_id: i64,
    epoch: u64,
}

#[derive(Clone)]
pub(super) struct Fake {
    pub(super) state: Arc<Mutex<State>>,
    /// Answers wait while this is true.
    pub(super) hold: watch::Sender<bool>,
}

pub(super) const TOPIC: &str = "topic-x";
pub(super) const BROKERS: u32 = 3;

fn address(broker: u32) -> String {
    format!("broker{broker}:9092")
}

impl Fake {
    pub(super) fn new(partitions: usize) -> Self {
        let state = State {
            logs: (0..partitions).map(|_| Log::default()).collect(),
            leaders: (0_u32..)
                .take(partitions)
                .map(|p| 1 + p % BROKERS)
                .collect(),
            faults: VecDeque::new(),
            dead: Vec::new(),
            dials: BTreeMap::new(),
            produce_calls: 0,
            in_flight: 0,
            in_flight_peak: 0,
            next_id: 0,
            epoch: 1,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            hold: watch::Sender::new(false),
        }
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.lock().faults.extend(faults);
    }

    pub(super) fn client(&self, config: ClientConfig) -> Client {
        let fake = self.clone();
        let dial: Dial = Arc::new(move |to: String| {
            let fake = fake.clone();
            async move {
                let mut state = fake.lock();
                *state.dials.entry(to.clone()).or_default() += 1;
                let broker = (1..=BROKERS).find(|broker| address(*broker) == to);
                let alive = broker.filter(|broker| !state.dead.contains(broker));
                drop(state);
                match alive {
                    Some(broker) => Ok(Arc::new(Door { fake, broker }) as Arc<dyn Service>),
                    None => Err(Error::Unreachable {
                        address: to,
                        reason: "refused".to_owned(),
                    }),
                }
            }
            .boxed()
        });
        Client::over_dial(dial, &[&address(1), &address(2)], config)
    }

    /// The values in a partition's log, in order.
    pub(super) fn values(&self, partition: usize) -> Vec<String> {
        let state = self.lock();
        let mut values = Vec::new();
        for (_, batch) in &state.logs[partition].batches {
            for record in record::decode_batch(batch).unwrap() {
                values.push(String::from_utf8(record.value.unwrap().to_vec()).unwrap());
            }
        }
        values
    }

    /// The value at an offset.
    pub(super) fn value_at(&self, partition: usize, offset: Offset) -> String {
        self.values(partition)[usize::try_from(offset.0).unwrap()].clone()
    }
}

impl State {
    fn next_fault(&mut self) -> Fault {
        self.faults.pop_front().unwrap_or(Fault::Pass)
    }

    fn append(&mut self, partition: usize, records: &Bytes) -> Result<Response, Error> {
        let header = BatchHeader::parse(records)?;
        let epoch = LeaderEpoch(self.epoch);
        let log = &mut self.logs[partition];
        let count = u32::try_from(header.count).unwrap();
        let mut base = log.end;
        let mut duplicate = false;
        if let Some(stamp) = header.producer() {
            let (expected, recent) = log.producers.entry(stamp.id).or_default();
            if let Some((_, known)) = recent.iter().find(|(at, _)| *at == stamp.base_sequence) {
                base = *known;
                duplicate = true;
            } else if *expected != stamp.base_sequence {
                return Err(Error::OutOfOrderSequence {
                    producer_id: stamp.id,
                    expected: *expected,
                    found: stamp.base_sequence,
                });
            } else {
                *expected += header.count;
                recent.push_back((stamp.base_sequence, base));
                if recent.len() > 5 {
                    recent.pop_front();
                }
            }
        }
        if !duplicate {
            let mut placed = BytesMut::new();
            record::put_placed(&mut placed, records, Offset(base), epoch);
            log.batches.push((base, placed.freeze()));
            log.end += u64::from(count);
        }
        Ok(Response::Produced(vec![Appended {
            base_offset: Offset(base),
            count,
            leader_epoch: epoch,
            durable_on: vec![BrokerId(1), BrokerId(2)],
            duplicate,
        }]))
    }

    fn fetch(&self, partition: usize, offset: Offset, max_bytes: u32) -> Response {
        let log = &self.logs[partition];
        let mut records = BytesMut::new();
        for (at, (base, batch)) in log.batches.iter().enumerate() {
            let next = log.batches.get(at + 1).map_or(log.end, |(base, _)| *base);
            let room = records.len() + batch.len() <= usize::try_from(max_bytes).unwrap();
            if next > offset.0 && *base < log.end && (records.is_empty() || room) {
                records.extend_from_slice(batch);
            } else if !records.is_empty() {
                break;
            }
        }
        Response::Fetched {
            records: records.freeze(),
            start_offset: Offset(0),
            high_watermark: Offset(log.end),
            epoch: LeaderEpoch(self.epoch),
        }
    }

    fn metadata(&self, asked: Option<Vec<TopicName>>) -> Response {
        let name = TopicName::new(TOPIC).unwrap();
        let partitions = (0_u32..)
            .zip(&self.leaders)
            .map(|(number, leader)| PartitionRoute {
                partition: PartitionId(number),
                leader: Some(BrokerId(*leader)),
                epoch: LeaderEpoch(self.epoch),
                replicas: (1..=BROKERS).map(BrokerId).collect(),
                isr: (1..=BROKERS).map(BrokerId).collect(),
            });
        let route = TopicRoute {
            name: name.clone(),
            partitions: partitions.collect(),
            config: BTreeMap::new(),
        };
        let known = asked.is_none_or(|asked| asked.contains(&name));
        Response::Metadata {
            cluster: None,
            controller: Some(BrokerId(1)),
            brokers: (1..=BROKERS)
                .map(|broker| Endpoint {
                    broker: BrokerId(broker),
                    address: address(broker),
                })
                .collect(),
            topics: if known { vec![route] } else { Vec::new() },
            stale: None,
        }
    }

    fn execute(&mut self, at: usize, request: &Request) -> Result<Response, Error> {
        match request {
            Request::Produce { records, .. } => self.append(at, records),
            Request::Fetch {
                partition,
                offset,
                max_bytes,
                ..
            } => {
                let end = Offset(self.logs[at].end);
                if *offset > end {
                    return Err(Error::OffsetOutOfRange {
                        partition: partition.clone(),
                        requested: *offset,
                        start: Offset(0),
                        end,
                    });
                }
                Ok(self.fetch(at, *offset, *max_bytes))
            }
            Request::FindOffset { spec, .. } => {
                let end = self.logs[at].end;
                let found = if *spec == OffsetSpec::Earliest {
                    0
                } else {
                    end
                };
                let epoch = LeaderEpoch(self.epoch);
                Ok(Response::FoundOffset {
                    offset: Some(Offset(found)),
                    epoch,
                })
            }
            other => Err(Error::InvalidRequest {
                reason: format!("{other:?}"),
            }),
        }
    }

    /// A request for a partition, at `broker`. `None`: no answer.
    fn handle(
        &mut self,
        broker: u32,
        forward: bool,
        partition: &TopicPartition,
        request: &Request,
    ) -> Option<Result<Response, Error>> {
        let at = usize::try_from(partition.partition.0).unwrap();
        if partition.topic.as_str() != TOPIC || at >= self.logs.len() {
            return Some(Err(Error::UnknownTopic {
                topic: partition.topic.clone(),
            }));
        }
        let fault = self.next_fault();
        if matches!(fault, Fault::Move) {
            self.epoch += 1;
            self.leaders[at] = 1 + self.leaders[at] % BROKERS;
        }
        let leader = self.leaders[at];
        if leader != broker && !forward {
            return Some(Err(Error::NotLeader {
                partition: partition.clone(),
                broker: BrokerId(broker),
                leader: Some(Endpoint {
                    broker: BrokerId(leader),
                    address: address(leader),
                }),
            }));
        }
        let lost = || Error::ConnectionLost {
            address: address(broker),
        };
        match fault {
            Fault::Refuse(error) => Some(Err(error)),
            Fault::LoseRequest => Some(Err(lost())),
            Fault::LoseAnswer => Some(self.execute(at, request).and(Err(lost()))),
            Fault::Silence => {
                self.execute(at, request).ok();
                None
            }
            Fault::Repeat => {
                self.execute(at, request).ok();
                Some(self.execute(at, request))
            }
            Fault::Pass | Fault::Move => Some(self.execute(at, request)),
        }
    }
}

/// One broker of it.
struct Door {
    fake: Fake,
    broker: u32,
}

impl Service for Door {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response, Error>> {
        let mut state = self.fake.lock();
        let (broker, forward) = (self.broker, call.forward);
        let produce = matches!(call.request, Request::Produce { .. });
        let empty_fetch = match &call.request {
            Request::Fetch {
                partition, offset, ..
            } => {
                let at = usize::try_from(partition.partition.0).unwrap();
                state.logs.get(at).is_some_and(|log| offset.0 == log.end)
            }
            _ => false,
        };
        let answer = if state.dead.contains(&broker) {
            Some(Err(Error::ConnectionLost {
                address: address(broker),
            }))
        } else {
            match &call.request {
                Request::Metadata { topics } => Some(Ok(state.metadata(topics.clone()))),
                Request::InitProducer => {
                    state.next_id += 1;
                    Some(Ok(Response::Producer {
                        id: state.next_id,
                        epoch: 0,
                    }))
                }
                Request::Produce { partition, .. }
                | Request::Fetch { partition, .. }
                | Request::FindOffset { partition, .. } => {
                    state.handle(broker, forward, partition, &call.request)
                }
                other => Some(Err(Error::InvalidRequest {
                    reason: format!("{other:?}"),
                })),
            }
        };
        if produce {
            state.produce_calls += 1;
            state.in_flight += 1;
            state.in_flight_peak = state.in_flight_peak.max(state.in_flight);
        }
        drop(state);
        let fake = self.fake.clone();
        async move {
            if produce {
                let mut hold = fake.hold.subscribe();
                hold.wait_for(|hold| !*hold).await.unwrap();
                tokio::task::yield_now().await;
                fake.lock().in_flight -= 1;
            }
            if empty_fetch {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            match answer {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        }
        .boxed()
    }
}
