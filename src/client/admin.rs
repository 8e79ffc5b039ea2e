//! What an operator asks of a cluster.
//!
//! Owns nothing: every method is one request, except that a created topic is waited for until it can be used.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::{Client, unexpected};
use crate::api::{
    BrokerFigures, ClusterView, DrainView, Request, Response, Stale, TopicRoute, TopicView,
};
use crate::types::{BrokerId, Error, Offset, TopicName, TopicPartition};

/// A topic to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTopic {
    /// Its name, 1 to 249 of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// Partitions, at least 1.
    pub partitions: u32,
    /// Copies of each partition, each on another broker, at least 1.
    pub replication_factor: u32,
    /// Configuration, with Kafka's keys.
    pub config: BTreeMap<String, String>,
    /// Per partition the brokers in order of preference; empty: the controller chooses.
    pub assignment: Vec<Vec<BrokerId>>,
}

impl NewTopic {
    /// A topic with the default configuration, placed by the controller.
    pub fn new(name: &str, partitions: u32, replication_factor: u32) -> Self {
        Self {
            name: name.to_owned(),
            partitions,
            replication_factor,
            config: BTreeMap::new(),
            assignment: Vec::new(),
        }
    }

    /// Adds one configuration key.
    #[must_use]
    pub fn with_config(mut self, key: &str, value: &str) -> Self {
        self.config.insert(key.to_owned(), value.to_owned());
        self
    }
}

/// A topic was created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// What the operator should know, one line each.
    pub warnings: Vec<String>,
}

/// Topics as one broker knows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known<T> {
    /// The topics, by name.
    pub topics: Vec<T>,
    /// That they may be out of date: the broker reaches no controller.
    pub stale: Option<Stale>,
}

/// See [`Client::admin`]. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Admin {
    client: Client,
}

/// How long [`Admin::create_topic`] waits for the leaders of what it created.
const LEADERS_WITHIN: Duration = Duration::from_secs(10);

impl Admin {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Creates a topic and waits, up to ten seconds and never longer than [`ClientConfig::deadline`](super::ClientConfig::deadline), until each partition has a leader; one that has none by then is named in the
    /// warnings. An unknown outcome is reported and not repeated. Cancel: the topic may be created or not.
    pub async fn create_topic(&self, topic: NewTopic) -> Result<Created, Error> {
        let name = TopicName::new(&topic.name)?;
        let request = Request::CreateTopic {
            name: name.clone(),
            partitions: topic.partitions,
            replication_factor: topic.replication_factor,
            config: topic.config,
            assignment: topic.assignment,
        };
        let mut warnings = match self.client.request(request).await? {
            Response::Created { warnings } => warnings,
            other => return Err(unexpected(&other)),
        };
        let leaderless = self.wait_for_leaders(&name, topic.partitions).await;
        if leaderless > 0 {
            warnings.push(format!(
                "{leaderless} of {} partitions have no leader yet; see `logboom topic describe {name}`",
                topic.partitions
            ));
        }
        Ok(Created { warnings })
    }

    /// How many of the partitions have no leader in the end.
    async fn wait_for_leaders(&self, name: &TopicName, partitions: u32) -> usize {
        let patience = LEADERS_WITHIN.min(self.client.config().deadline);
        let deadline = Instant::now() + patience;
        let all = usize::try_from(partitions).unwrap_or(usize::MAX);
        loop {
            let request = Request::Metadata {
                topics: Some(vec![name.clone()]),
            };
            let mut led = 0;
            if let Ok(Response::Metadata {
                brokers, topics, ..
            }) = self.client.call_until(request, deadline).await
            {
                let routes = topics.iter().flat_map(|topic| &topic.partitions);
                led = routes.filter(|route| route.leader.is_some()).count();
                self.client.router().learn(brokers, topics);
            }
            if led >= all || Instant::now() >= deadline {
                return all.saturating_sub(led);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Deletes a topic and its records.
    pub async fn delete_topic(&self, name: &str) -> Result<(), Error> {
        let name = TopicName::new(name)?;
        match self.client.request(Request::DeleteTopic { name }).await? {
            Response::Deleted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// All topics, by name, with their routes.
    pub async fn list(&self) -> Result<Vec<TopicRoute>, Error> {
        Ok(self.list_known().await?.topics)
    }

    /// As [`Admin::list`], and whether that may be out of date.
    pub async fn list_known(&self) -> Result<Known<TopicRoute>, Error> {
        match self
            .client
            .request(Request::Metadata { topics: None })
            .await?
        {
            Response::Metadata {
                mut topics, stale, ..
            } => {
                topics.sort_by(|one, other| one.name.cmp(&other.name));
                Ok(Known { topics, stale })
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Everything known about the topics named, or about all, by name. A name that does not exist is an error.
    pub async fn describe(&self, names: Option<&[String]>) -> Result<Vec<TopicView>, Error> {
        Ok(self.describe_known(names).await?.topics)
    }

    /// As [`Admin::describe`], and whether that may be out of date.
    pub async fn describe_known(
        &self,
        names: Option<&[String]>,
    ) -> Result<Known<TopicView>, Error> {
        let names: Option<Vec<TopicName>> = match names {
            Some(names) => Some(
                names
                    .iter()
                    .map(|name| TopicName::new(name))
                    .collect::<Result<_, _>>()?,
            ),
            None => None,
        };
        let request = Request::DescribeTopics {
            topics: names.clone(),
        };
        let (mut topics, stale) = match self.client.request(request).await? {
            Response::Described { topics, stale } => (topics, stale),
            other => return Err(unexpected(&other)),
        };
        topics.sort_by(|one, other| one.name.cmp(&other.name));
        for topic in names.into_iter().flatten() {
            if !topics.iter().any(|view| view.name == topic) {
                return Err(Error::UnknownTopic { topic });
            }
        }
        Ok(Known { topics, stale })
    }

    /// The state of the cluster.
    pub async fn cluster_status(&self) -> Result<ClusterView, Error> {
        match self.client.request(Request::ClusterStatus).await? {
            Response::Status(view) => Ok(view),
            other => Err(unexpected(&other)),
        }
    }

    /// What the brokers that can be reached have counted since they were started, in the order of the brokers.
    pub async fn broker_figures(&self) -> Result<Vec<BrokerFigures>, Error> {
        let request = Request::BrokerFigures { everywhere: true };
        match self.client.request(request).await? {
            Response::Figures(figures) => Ok(figures),
            other => Err(unexpected(&other)),
        }
    }

    /// Hands leadership back to preferred leaders that are alive and caught up; answers with the partitions moved.
    pub async fn elect_leaders(&self) -> Result<Vec<TopicPartition>, Error> {
        match self.client.request(Request::ElectLeaders).await? {
            Response::Elected(moved) => Ok(moved),
            other => Err(unexpected(&other)),
        }
    }

    /// Moves the replicas of a partition to `replicas`, the preferred leader first, in the place of a move that is under way;
    /// answers with what the operator should know, one line each. Returns when the move is decided: it ends by itself, as
    /// [`PartitionView::reassigning`](crate::api::PartitionView) shows, and goes on through the death of any broker. Asking
    /// again for the same changes nothing.
    ///
    /// # Errors
    /// `InvalidRequest`, `InvalidReplicationFactor`, `UnknownTopic` and `UnknownPartition` for a move that cannot be.
    pub async fn reassign(
        &self,
        partition: TopicPartition,
        replicas: Vec<BrokerId>,
    ) -> Result<Vec<String>, Error> {
        self.ask_to_reassign(partition, Some(replicas)).await
    }

    /// Sends the replicas of a partition back to where they were before the move that is under way; harmless when none is.
    pub async fn cancel_reassignment(&self, partition: TopicPartition) -> Result<(), Error> {
        self.ask_to_reassign(partition, None).await.map(|_| ())
    }

    /// Begins to move what `broker` holds to other brokers, a few partitions at a time; answers with what has been begun and what
    /// is left. To be asked again until [`DrainView::remaining`] is 0, from time to time: the moves end by themselves. Topics
    /// that are created meanwhile may still get replicas there.
    ///
    /// # Errors
    /// `InvalidRequest` for an unknown broker.
    pub async fn drain(&self, broker: BrokerId) -> Result<DrainView, Error> {
        match self.client.request(Request::Drain { broker }).await? {
            Response::Draining(view) => Ok(view),
            other => Err(unexpected(&other)),
        }
    }

    async fn ask_to_reassign(
        &self,
        partition: TopicPartition,
        replicas: Option<Vec<BrokerId>>,
    ) -> Result<Vec<String>, Error> {
        let request = Request::Reassign {
            partition,
            replicas,
        };
        match self.client.request(request).await? {
            Response::Reassigning { warnings } => Ok(warnings),
            other => Err(unexpected(&other)),
        }
    }

    /// Drops the records of a partition below `offset`; answers with the log start offset.
    pub async fn trim(&self, partition: TopicPartition, offset: Offset) -> Result<Offset, Error> {
        match self
            .client
            .request(Request::Trim { partition, offset })
            .await?
        {
            Response::Trimmed(start) => Ok(start),
            other => Err(unexpected(&other)),
        }
    }
}
