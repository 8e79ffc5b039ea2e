//! The clients' host: topics are created, written to and read, and looked at when everything is healed.
//!
//! Owns what the clients do in which phase, and the bounds of the liveness phase. The driver moves the phases on.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use logboom::client::{Client, ClientConfig, NewTopic, Record};
use logboom::partition::Partition;
use logboom::record::batches;
use logboom::testkit::history::{AckLevel, Call, FinalLog, Outcome, ReplicaDump};
use logboom::testkit::recorder::Recorder;
use logboom::testkit::workload::{
    Workload, WorkloadConfig, decode_value, encode_value, read_final_logs,
};
use logboom::types::{
    Acks, BrokerId, Error, Offset, PartitionId, ReplicaKind, TopicName, TopicPartition,
};
use tokio::time::Instant;

use crate::plan::{Plan, TopicPlan};
use crate::world::{Cell, Life};

/// How long after healing every partition must take an append again.
const SERVES_WITHIN: Duration = Duration::from_secs(20);
/// How long after healing every replica must be in sync and every preferred leader lead.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
/// How long reading everything may take after that.
const READ_WITHIN: Duration = Duration::from_secs(30);

/// How long a replica may take after that to be there and to know that everything is committed.
const KNOWN_WITHIN: Duration = Duration::from_secs(20);

/// The session that asks whether everything serves again.
const PROBE_SESSION: u32 = 1_000;
/// The first of the sessions that read.
const READING_SESSIONS: u32 = 100;

/// Where the clients are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Creating topics.
    #[default]
    Setup,
    /// Writing and reading.
    Work,
    /// Asked to end the work: everything is healed.
    Healed,
    /// Done; the findings are there.
    Done,
}

/// A partition's copies are to be moved.
#[derive(Debug)]
pub struct Errand {
    pub topic: String,
    pub partition: u32,
    /// The preferred leader first.
    pub replicas: Vec<u32>,
}

/// Errands that wait to be run at most.
const ERRANDS_MAX: usize = 8;

/// What driver and clients share.
#[derive(Debug, Default)]
pub struct Control {
    pub phase: Phase,
    errands: VecDeque<Errand>,
    /// By topic of the plan.
    pub logs: Vec<Vec<FinalLog>>,
    pub dumps: Vec<Vec<ReplicaDump>>,
    /// What did not come about in time.
    pub late: Vec<String>,
    /// How long it took after healing until everything served, and until everything was in its place.
    pub served_after: Duration,
    pub settled_after: Duration,
}

impl Control {
    /// Has the clients run `errand`; false when too many wait already.
    pub fn send(&mut self, errand: Errand) -> bool {
        let takes = self.errands.len() < ERRANDS_MAX;
        if takes {
            self.errands.push_back(errand);
        }
        takes
    }
}

/// Runs errands one after the other; what comes of one is shown by the cluster in the end.
async fn run_errands(client: Client, control: Rc<RefCell<Control>>) {
    loop {
        let errand = control.borrow_mut().errands.pop_front();
        let Some(errand) = errand else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let partition = TopicName::new(&errand.topic).map(|topic| TopicPartition {
            topic,
            partition: PartitionId(errand.partition),
        });
        if let Ok(partition) = partition {
            let replicas = errand.replicas.into_iter().map(BrokerId).collect();
            let told = client.admin().reassign(partition, replicas).await;
            tracing::info!(?told, "a move was asked for");
        }
    }
}

async fn until_phase(control: &Rc<RefCell<Control>>, phase: Phase) {
    while control.borrow().phase != phase {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn client_config() -> ClientConfig {
    ClientConfig {
        connect_deadline: Duration::from_secs(60),
        request_timeout: Duration::from_secs(2),
        deadline: Duration::from_secs(8),
        ..ClientConfig::default()
    }
}

/// What the clients' host runs.
pub async fn run(
    plan: Plan,
    bootstrap: Vec<String>,
    brokers: Vec<Rc<RefCell<Cell>>>,
    recorders: Vec<Recorder>,
    control: Rc<RefCell<Control>>,
) -> turmoil::Result {
    let client = Client::connect(&bootstrap, client_config()).await?;
    for topic in &plan.topics {
        let new = NewTopic::new(&topic.name, topic.partitions, topic.replication_factor)
            .with_config("min.insync.replicas", &topic.min_in_sync.to_string());
        create(&client, &new).await?;
    }
    let reader = Client::connect(&bootstrap, client_config()).await?;
    tokio::task::spawn_local(run_errands(client.clone(), control.clone()));
    control.borrow_mut().phase = Phase::Work;
    let mut works = Vec::new();
    for (at, (topic, recorder)) in plan.topics.iter().zip(&recorders).enumerate() {
        let seed = plan.seed.wrapping_mul(31).wrapping_add(at as u64);
        let config = WorkloadConfig {
            producers: 2,
            plain_appenders: 1,
            readers: 0,
            end_askers: 0,
            record_bytes: plan.record_bytes,
            pause: plan.pause,
            in_flight: 16,
            answer_within: Duration::from_secs(10),
            seed,
            ..WorkloadConfig::new(&topic.name, topic.partitions)
        };
        // Who reads learns of a new leader on its own, and so perhaps later than who writes.
        let reading = WorkloadConfig {
            first_session: READING_SESSIONS,
            producers: 0,
            plain_appenders: 0,
            fencers: 0,
            readers: 1,
            end_askers: 1,
            seed: seed ^ 0x7265_6164,
            ..config.clone()
        };
        works.push(Workload::start(&client, recorder, config)?);
        works.push(Workload::start(&reader, recorder, reading)?);
    }
    until_phase(&control, Phase::Healed).await;
    let healed = Instant::now();
    let late = serve_again(&client, &plan, &recorders).await;
    control.borrow_mut().late.extend(late);
    control.borrow_mut().served_after = healed.elapsed();
    // Together: each may wait long for an answer that was lost on the way.
    let stops: Vec<_> = works.into_iter().map(Workload::stop).collect();
    futures_util::future::join_all(stops).await;
    let settled = settle(&client, &plan, healed + SETTLED_WITHIN).await;
    control.borrow_mut().late.extend(settled);
    control.borrow_mut().settled_after = healed.elapsed();
    for (topic, recorder) in plan.topics.iter().zip(&recorders) {
        let logs = read_final_logs(
            &client,
            recorder,
            &topic.name,
            topic.partitions,
            READ_WITHIN,
        )
        .await;
        match logs {
            Ok(logs) => {
                until_all_know(&logs, topic, &brokers).await;
                control.borrow_mut().logs.push(logs);
            }
            Err(error) => {
                let text = format!("topic {} cannot be read: {error}", topic.name);
                control.borrow_mut().late.push(text);
                control.borrow_mut().logs.push(Vec::new());
            }
        }
        let dumps = dumps(&topic.name, &brokers).await;
        control.borrow_mut().dumps.push(dumps);
    }
    control.borrow_mut().phase = Phase::Done;
    Ok(())
}

async fn create(client: &Client, topic: &NewTopic) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match client.admin().create_topic(topic.clone()).await {
            Ok(created) if created.warnings.is_empty() => return Ok(()),
            // Not all brokers were heard: it has no witness, and could lose too little.
            Ok(_) | Err(Error::TopicExists { .. }) => {
                client.admin().delete_topic(&topic.name).await.ok(); // asked for again
            }
            Err(error) if Instant::now() >= deadline => return Err(error),
            // Not all brokers have come yet.
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Every partition takes an append within the bound; what does not is told.
async fn serve_again(client: &Client, plan: &Plan, recorders: &[Recorder]) -> Vec<String> {
    let mut late = Vec::new();
    let deadline = Instant::now() + SERVES_WITHIN;
    for (topic, recorder) in plan.topics.iter().zip(recorders) {
        for partition in 0..topic.partitions {
            let mut last = String::new();
            let served = loop {
                let value = recorder.value();
                let call = Call::Append {
                    values: vec![value],
                    producer: None,
                    acks: AckLevel::All,
                };
                let Some(id) = recorder.operation(PROBE_SESSION, partition, call) else {
                    break false;
                };
                let record = Record::new(encode_value(value, partition, plan.record_bytes));
                let appended = async {
                    let topic = client.topic(&topic.name)?;
                    topic.partition(partition).append([record], Acks::All).await
                };
                match tokio::time::timeout_at(deadline, appended).await {
                    Ok(Ok(ack)) => {
                        let outcome = Outcome::Appended {
                            base: ack.offset.0,
                            epoch: ack.leader_epoch.0,
                            copies: u32::try_from(ack.durable_on.len()).unwrap_or(u32::MAX),
                        };
                        recorder.completed(id, outcome);
                        break true;
                    }
                    Ok(Err(error)) => {
                        recorder.failed(id, &error);
                        last = error.to_string();
                    }
                    Err(_) => break false,
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                if Instant::now() >= deadline {
                    break false;
                }
            };
            if !served {
                late.push(format!(
                    "{}-{partition} takes no append {SERVES_WITHIN:?} after healing: {last}",
                    topic.name
                ));
            }
        }
    }
    late
}

/// Every replica is in sync and every preferred leader leads by `deadline`; what is not so is told.
async fn settle(client: &Client, plan: &Plan, deadline: Instant) -> Vec<String> {
    let names: Vec<String> = plan.topics.iter().map(|topic| topic.name.clone()).collect();
    loop {
        let mut wrong = Vec::new();
        match client.admin().describe(Some(&names)).await {
            Ok(topics) => {
                for topic in topics {
                    for partition in &topic.partitions {
                        let preferred = partition.replicas.first().map(|replica| replica.broker);
                        let whole = partition.isr.len() == partition.replicas.len();
                        if !whole
                            || partition.reassigning
                            || partition.leader.is_none()
                            || partition.leader != preferred
                        {
                            wrong.push(format!(
                                "{}-{}: leader {:?} of {:?}, in sync {:?}, replicas {:?}",
                                topic.name,
                                partition.partition,
                                partition.leader,
                                preferred,
                                partition.isr,
                                partition.replicas
                            ));
                        }
                    }
                }
            }
            Err(error) => wrong.push(format!("topics cannot be described: {error}")),
        }
        if wrong.is_empty() || Instant::now() >= deadline {
            return wrong;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until every data replica of `topic` is there and knows that everything in `logs` is committed. A broker that has just lost its power
/// counts as in sync for a moment more, and a follower hears of a commit with the next entries or heartbeat. A replica that does
/// not come about is seen in what is shown.
async fn until_all_know(logs: &[FinalLog], topic: &TopicPlan, brokers: &[Rc<RefCell<Cell>>]) {
    let knows = |replica: &Partition| {
        let local = replica.local();
        let number = local.partition.partition.0;
        local.partition.topic.as_str() == topic.name
            && local.replica.kind() == ReplicaKind::Data
            && logs
                .iter()
                .any(|log| log.partition == number && local.committed.0 >= log.end)
    };
    let wanted = logs.len() * topic.replication_factor as usize;
    let deadline = Instant::now() + KNOWN_WITHIN;
    while Instant::now() < deadline {
        let known = brokers.iter().map(|cell| match &cell.borrow().life {
            Life::Running(broker) => broker.replicas().iter().filter(|one| knows(one)).count(),
            _ => 0,
        });
        if known.sum::<usize>() >= wanted {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What every data replica of `topic` holds.
async fn dumps(topic: &str, brokers: &[Rc<RefCell<Cell>>]) -> Vec<ReplicaDump> {
    let mut found = Vec::new();
    for cell in brokers {
        let broker = match &cell.borrow().life {
            Life::Running(broker) => (**broker).clone(),
            _ => continue,
        };
        'replicas: for replica in broker.replicas() {
            let local = replica.local();
            if local.partition.topic.as_str() != topic
                || local.replica.kind() == ReplicaKind::Witness
            {
                continue;
            }
            let mut records = Vec::new();
            let mut at = local.log_start;
            while at < local.committed {
                let bytes = match replica.read_local(at, 1 << 20).await {
                    Ok(bytes) => bytes,
                    // It has found the flipped bit just now, and says so instead of showing anything.
                    Err(error) if error.to_string().contains("is damaged") => continue 'replicas,
                    Err(_) => break,
                };
                let before = at;
                for batch in batches(&bytes).flatten() {
                    for record in batch.decode().unwrap_or_default() {
                        let value = record.value.as_deref().map_or(u64::MAX, decode_value);
                        if record.offset >= at {
                            records.push((record.offset.0, value));
                        }
                    }
                    at = at.max(Offset(
                        records.last().map_or(at.0, |(offset, _)| offset + 1),
                    ));
                }
                if at == before {
                    break;
                }
            }
            found.push(ReplicaDump {
                partition: local.partition.partition.0,
                broker: broker.id().0,
                log_start: local.log_start.0,
                high_watermark: local.committed.0,
                records,
            });
        }
    }
    found
}
