//! Waiting for a cluster to get somewhere, and saying what was seen last when it does not.
//!
//! Owns nothing. Asks brokers as a client does, through the proxies: what a paused or cut-off broker believes does not count.

use std::fmt::Display;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::LocalCluster;
use crate::api::{Call, OffsetSpec, PartitionView, Request, Response, answer_from_message};
use crate::net::{Connection, NetConfig};
use crate::runtime::Tasks;
use crate::types::{BrokerId, Error, LeaderEpoch, PartitionId, TopicName, TopicPartition};

/// Between two looks at a condition.
const LOOK: Duration = Duration::from_millis(10);
/// Longest one broker is waited for when all are asked.
const ASK_TIMEOUT: Duration = Duration::from_millis(1_000);

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

/// The broker that answers a linearizable question about the partition itself, without passing it on. Others that believe that
/// they lead do not get a quorum's answer.
pub(super) async fn leader(
    cluster: &LocalCluster,
    topic: &str,
    partition: u32,
) -> Result<Leader, String> {
    let topic = TopicName::new(topic).map_err(|error| error.to_string())?;
    let partition = TopicPartition {
        topic,
        partition: PartitionId(partition),
    };
    let tasks = Tasks::new();
    let asked = cluster.addresses().map(|(broker, address)| {
        let (partition, tasks) = (partition.clone(), &tasks);
        async move { (broker, ask(&address, partition, tasks).await) }
    });
    let answers = join_all(asked).await;
    tasks.shutdown().await;
    let mut newest: Option<Leader> = None;
    let mut refusals = Vec::new();
    for (broker, answer) in answers {
        match answer {
            Ok(epoch) if newest.is_none_or(|known| known.epoch < epoch) => {
                newest = Some(Leader { broker, epoch });
            }
            Ok(_) => {}
            Err(error) => refusals.push(format!("broker {broker}: {error}")),
        }
    }
    newest.ok_or_else(|| refusals.join("; "))
}

async fn ask(
    address: &str,
    partition: TopicPartition,
    tasks: &Tasks,
) -> Result<LeaderEpoch, Error> {
    let config = NetConfig {
        handshake_timeout: ASK_TIMEOUT,
        ..NetConfig::default()
    };
    let connection = Connection::open(address, &config, tasks).await?;
    let call = Call {
        timeout_ms: u32::try_from(ASK_TIMEOUT.as_millis()).unwrap_or(u32::MAX),
        forward: false,
        request: Request::FindOffset {
            partition,
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
        match leader(cluster, topic, number).await {
            Err(reason) => wrong.push(format!("partition {number} is not led: {reason}")),
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
