//! Waiting for a cluster to get somewhere, and saying what was seen last when it does not.
//!
//! Owns nothing. Asks brokers as a client does, through the proxies: what a paused or cut-off broker believes does not count.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use super::LocalCluster;
use crate::api::{Call, OffsetSpec, PartitionView, Request, Response, answer_from_message};
use crate::net::{Connection, NetConfig};
use crate::runtime::Tasks;
use crate::types::{BrokerId, Error, LeaderEpoch, PartitionId, TopicName, TopicPartition};

/// Between two looks at a condition.
const LOOK: Duration = Duration::from_millis(10);
/// Longest that one answer of one broker is waited for.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// Something did not come about in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("waited {within:?} for {what}; last seen: {last}")]
pub struct NotReached {
    /// What was waited for.
    pub what: String,
    /// How long.
    pub within: Duration,
    /// What was there instead, at the last look.
    pub last: String,
}

/// Looks at `condition` every 10 ms until it gives a value, for `within` at most. What it gives until then says what is there
/// instead, for the error's text. One look may take as long as it needs, but not beyond `within`.
///
/// ```
/// # use std::time::Duration;
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let mut seen = 0;
/// let third = logboom::testkit::wait_until(Duration::from_secs(5), "the third look", async || {
///     seen += 1;
///     if seen == 3 { Ok(seen) } else { Err(format!("look {seen}")) }
/// });
/// assert_eq!(third.await.unwrap(), 3);
/// # }
/// ```
pub async fn wait_until<T, E: Display>(
    within: Duration,
    what: &str,
    mut condition: impl AsyncFnMut() -> Result<T, E>,
) -> Result<T, NotReached> {
    let deadline = Instant::now() + within;
    let mut last = "nothing: the first look took too long".to_owned();
    loop {
        match tokio::time::timeout_at(deadline, condition()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(seen)) => last = seen.to_string(),
            Err(_) => {}
        }
        if Instant::now() + LOOK >= deadline {
            return Err(NotReached {
                what: what.to_owned(),
                within,
                last,
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Who leads a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leader {
    pub(super) broker: BrokerId,
    pub(super) epoch: LeaderEpoch,
}

/// Waits for a broker that answers a linearizable question about the partition itself, without passing it on. Others that believe
/// that they lead do not get a quorum's answer. Each broker is asked in a row of its own: one that hangs holds up nobody.
pub(super) async fn leader(
    cluster: &LocalCluster,
    topic: &str,
    partition: u32,
    within: Duration,
) -> Result<Leader, NotReached> {
    let what = format!("a leader of {topic}-{partition}");
    let not_reached = |last: String| NotReached {
        what: what.clone(),
        within,
        last,
    };
    let topic = TopicName::new(topic).map_err(|error| not_reached(error.to_string()))?;
    let partition = TopicPartition {
        topic,
        partition: PartitionId(partition),
    };
    let tasks = Tasks::new();
    let refusals: Mutex<BTreeMap<BrokerId, String>> = Mutex::default();
    let mut rows: FuturesUnordered<_> = cluster
        .addresses()
        .map(|(broker, address)| {
            let refusals = &refusals;
            let note = move |seen: String| {
                let mut refusals = refusals.lock().unwrap_or_else(PoisonError::into_inner);
                refusals.insert(broker, seen);
            };
            ask_until_led(broker, address, &partition, &tasks, note)
        })
        .collect();
    let found = tokio::time::timeout(within, rows.next()).await;
    drop(rows);
    tasks.shutdown().await;
    if let Ok(Some(leader)) = found {
        return Ok(leader);
    }
    let refusals = refusals
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let said = refusals
        .iter()
        .map(|(broker, seen)| format!("broker {broker}: {seen}"));
    Err(not_reached(said.collect::<Vec<_>>().join("; ")))
}

async fn ask_until_led(
    broker: BrokerId,
    address: String,
    partition: &TopicPartition,
    tasks: &Tasks,
    note: impl Fn(String),
) -> Leader {
    let config = NetConfig {
        handshake_timeout: ASK_TIMEOUT,
        ..NetConfig::default()
    };
    let mut open = None;
    loop {
        let connection = match open.take() {
            Some(connection) => Ok(connection),
            None => Connection::open(&address, &config, tasks).await,
        };
        match connection {
            Ok(connection) => match ask(&connection, partition).await {
                Ok(epoch) => return Leader { broker, epoch },
                Err(error) => {
                    note(error.to_string());
                    open = Some(connection).filter(|open| !open.is_closed());
                }
            },
            Err(error) => note(Error::from(error).to_string()),
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn ask(connection: &Connection, partition: &TopicPartition) -> Result<LeaderEpoch, Error> {
    let call = Call {
        timeout_ms: u32::try_from(ASK_TIMEOUT.as_millis()).unwrap_or(u32::MAX),
        forward: false,
        request: Request::FindOffset {
            partition: partition.clone(),
            spec: OffsetSpec::LinearizableEnd,
        },
    };
    let answer = connection.call(call.into_message(), ASK_TIMEOUT)?.await?;
    let answer = answer_from_message(answer).map_err(|error| Error::Failed {
        reason: error.to_string(),
    })?;
    match answer? {
        Response::FoundOffset { epoch, .. } => Ok(epoch),
        other => Err(Error::Failed {
            reason: format!("an answer to another question: {other:?}"),
        }),
    }
}

/// Whether every partition of the topic is led, and its leader counts every data replica as in sync.
pub(super) async fn in_sync(cluster: &LocalCluster, topic: &str) -> Result<(), String> {
    let client = cluster.client().await.map_err(|error| error.to_string())?;
    let names = [topic.to_owned()];
    let views = client.admin().describe(Some(&names)).await;
    let views = views.map_err(|error| error.to_string())?;
    let partitions = views.into_iter().flat_map(|view| view.partitions);
    let mut wrong = Vec::new();
    for view in partitions {
        let number = view.partition.0;
        match leader(cluster, topic, number, ASK_TIMEOUT).await {
            Err(error) => wrong.push(error.to_string()),
            Ok(leader) => wrong.extend(missing(cluster, &view, leader)),
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("; "))
    }
}

/// What a partition lacks to be in sync.
fn missing(cluster: &LocalCluster, view: &PartitionView, leader: Leader) -> Option<String> {
    let number = view.partition.0;
    let replicas: Vec<BrokerId> = view.replicas.iter().map(|replica| replica.broker).collect();
    if let Some(broker) = replicas.iter().find(|broker| !cluster.runs(**broker)) {
        return Some(format!(
            "partition {number}: broker {broker} does not run, or is paused"
        ));
    }
    // Its own figures, not those in everybody's metadata, which may be older.
    let told = view.leader == Some(leader.broker)
        && view.epoch == leader.epoch
        && view.high_watermark.is_some();
    if !told {
        return Some(format!(
            "partition {number}: broker {} leads in epoch {}, which is not shown yet",
            leader.broker, leader.epoch
        ));
    }
    let absent: Vec<&BrokerId> = replicas
        .iter()
        .filter(|broker| !view.isr.contains(broker))
        .collect();
    (!absent.is_empty()).then(|| {
        format!(
            "partition {number}: led by broker {}, not in sync: {absent:?}",
            leader.broker
        )
    })
}
