//! The topics of a run and what is asked of the cluster about them.
//!
//! Owns the numbering: a partition has a number among those of its topic, which its history uses, and one among all of the run.

use std::time::Duration;

use anyhow::Context;
use logboom::client::{Client, ClientConfig, NewTopic};
use logboom::testkit::recorder::Recorder;
use logboom::types::{BrokerId, PartitionId, TopicName, TopicPartition};

/// Partitions of each topic.
pub(super) const PARTITIONS: u32 = 2;
/// Longest wait for one answer; then it is asked again.
const ANSWER: Duration = Duration::from_secs(3);

/// One topic, and the record of what happens to it.
pub(super) struct Topic {
    pub(super) name: String,
    pub(super) recorder: Recorder,
}

/// All of them.
pub(super) struct Ground {
    /// The workloads'.
    pub(super) client: Client,
    /// One with less patience, for looking on.
    pub(super) onlooker: Client,
    pub(super) topics: Vec<Topic>,
    brokers: Vec<u32>,
}

/// What is seen of one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Look {
    /// Among all of the run.
    pub(super) number: u32,
    pub(super) leader: Option<u32>,
    pub(super) epoch: u64,
    /// The preferred leader first.
    pub(super) replicas: Vec<u32>,
    pub(super) isr: Vec<u32>,
    /// Replicas are being moved.
    pub(super) moving: bool,
    /// Offset the next record gets, as far as anybody answers for it.
    pub(super) end: Option<u64>,
}

impl Look {
    pub(super) fn is_whole(&self) -> bool {
        self.leader.is_some() && self.isr.len() == self.replicas.len() && !self.moving
    }
}

fn ids(brokers: impl IntoIterator<Item = BrokerId>) -> Vec<u32> {
    brokers.into_iter().map(|broker| broker.0).collect()
}

impl Ground {
    /// Creates the topics: one with `replication_factor` copies, and, where it is another one, one with two copies and a witness.
    pub(super) async fn create(
        client: Client,
        addresses: &[String],
        brokers: Vec<u32>,
        replication_factor: u32,
        recorder: impl Fn() -> Recorder,
    ) -> anyhow::Result<Self> {
        let patience = ClientConfig {
            request_timeout: ANSWER / 3,
            deadline: ANSWER,
            ..ClientConfig::default()
        };
        let onlooker = Client::connect(addresses, patience).await?;
        let mut factors = vec![replication_factor];
        if brokers.len() >= 3 && replication_factor != 2 {
            factors.push(2);
        }
        let mut topics = Vec::new();
        for factor in factors {
            let name = format!("chaos-{factor}");
            let least = if factor >= 3 { "2" } else { "1" };
            let topic =
                NewTopic::new(&name, PARTITIONS, factor).with_config("min.insync.replicas", least);
            let created = client.admin().create_topic(topic).await;
            created.with_context(|| format!("cannot create the topic {name}"))?;
            topics.push(Topic {
                name,
                recorder: recorder(),
            });
        }
        Ok(Self {
            client,
            onlooker,
            topics,
            brokers,
        })
    }

    /// Partitions of all topics.
    pub(super) fn partitions(&self) -> u32 {
        PARTITIONS.saturating_mul(u32::try_from(self.topics.len()).unwrap_or(u32::MAX))
    }

    /// How many operations came to which end so far: done, refused, unknown.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        let counts = self.topics.iter().map(|topic| topic.recorder.counts());
        counts.fold((0, 0, 0), |sum, one| {
            (sum.0 + one.ok, sum.1 + one.failed, sum.2 + one.unknown)
        })
    }

    /// What the cluster says of the partitions, if it answers; leaders are recorded.
    pub(super) async fn look(&self) -> Option<Vec<Look>> {
        let names: Vec<String> = self.topics.iter().map(|topic| topic.name.clone()).collect();
        let admin = self.onlooker.admin();
        let asked = tokio::time::timeout(ANSWER, admin.describe(Some(&names)));
        let views = asked.await.ok()?.ok()?;
        let mut looks = Vec::new();
        for (topic, first) in self.topics.iter().zip((0..).step_by(PARTITIONS as usize)) {
            let view = views.iter().find(|view| view.name.as_str() == topic.name)?;
            for partition in &view.partitions {
                let look = Look {
                    number: first + partition.partition.0,
                    leader: partition.leader.map(|broker| broker.0),
                    epoch: partition.epoch.0,
                    replicas: ids(partition.replicas.iter().map(|replica| replica.broker)),
                    isr: ids(partition.isr.iter().copied()),
                    moving: partition.reassigning,
                    end: partition.end_offset.map(|offset| offset.0),
                };
                if let Some(leader) = look.leader {
                    let number = partition.partition.0;
                    topic.recorder.leader_seen(number, look.epoch, leader);
                }
                looks.push(look);
            }
        }
        Some(looks)
    }

    /// The brokers that the controller hears, if anybody answers.
    pub(super) async fn alive(&self) -> Option<Vec<u32>> {
        let admin = self.onlooker.admin();
        let asked = tokio::time::timeout(ANSWER, admin.cluster_status());
        let status = asked.await.ok()?.ok()?;
        let alive = status.brokers.into_iter().filter(|broker| broker.alive);
        Some(ids(alive.map(|broker| broker.broker)))
    }

    /// Why the cluster is not whole: brokers, leaders or copies that are missing. `None`: it is.
    pub(super) async fn missing(&self) -> Option<String> {
        let Some(alive) = self.alive().await else {
            return Some("nobody answers for the cluster".to_owned());
        };
        let dead = self.brokers.iter().find(|broker| !alive.contains(broker));
        if let Some(broker) = dead {
            return Some(format!("the controller does not hear broker {broker}"));
        }
        let Some(looks) = self.look().await else {
            return Some("nobody answers for the topics".to_owned());
        };
        let broken = looks.iter().find(|look| !look.is_whole())?;
        Some(format!(
            "partition {} has leader {:?}, replicas {:?}, in sync {:?}",
            self.name_of(broken.number),
            broken.leader,
            broken.replicas,
            broken.isr
        ))
    }

    /// Moves the replicas of a partition to these brokers; an error is the cluster's refusal, or nobody answers.
    pub(super) async fn reassign(&self, number: u32, replicas: &[u32]) -> anyhow::Result<()> {
        let topic = usize::try_from(number / PARTITIONS).ok();
        let topic = topic.and_then(|at| self.topics.get(at));
        let name = topic.with_context(|| format!("there is no partition {number}"))?;
        let partition = TopicPartition {
            topic: TopicName::new(&name.name)?,
            partition: PartitionId(number % PARTITIONS),
        };
        let replicas = replicas.iter().copied().map(BrokerId).collect();
        self.onlooker.admin().reassign(partition, replicas).await?;
        Ok(())
    }

    /// A partition's name for people.
    pub(super) fn name_of(&self, number: u32) -> String {
        let at = usize::try_from(number / PARTITIONS).unwrap_or(usize::MAX);
        let topic = self.topics.get(at).map_or("?", |topic| &topic.name);
        format!("{topic}/{}", number % PARTITIONS)
    }
}
