//! The Rust door: a client of a cluster, over the network or over a broker of this process.
//!
//! Owns the retry loop around every request. Where a request goes is `router`'s, when it is repeated is `retry`'s.
//! Knows no broker, no storage and no Raft: only [`Service`] and the network's connections.
//!
//! Errors stay honest: [`Error::outcome`] of what a method returns says whether the request had no effect, or may have had one,
//! over all attempts that were made. A request that would be done twice is repeated only after errors that say it was not done.

mod admin;
mod batch;
mod consumer;
mod lane;
mod partitioner;
mod producer;
mod retry;
mod retrying;
mod router;
mod topic;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

pub use self::admin::{Admin, Created, Known, NewTopic};
pub use self::consumer::{Consumer, ConsumerConfig, From, Partitions, Until};
pub use self::partitioner::murmur2;
pub use self::producer::{Delivery, Producer, ProducerConfig};
pub use self::retrying::Retrying;
pub use self::topic::{Ack, ConsumerRecord, Partition, ReadRecords, Topic};
pub use crate::record::Record;

use self::retry::{Backoff, Repeat, Retry, Verdict};
use self::retrying::{Place, Retries};
use self::router::{Dial, Route, Router, Way};
use crate::api::{Call, Request, Response, Service, answer_from_message};
use crate::net::{Connection, NetConfig, NetError};
use crate::runtime::{self, Tasks};
use crate::types::{Error, TopicName};

/// How a client behaves: times and bounds.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Longest time to make one connection, handshake included.
    pub connect_timeout: Duration,
    /// Longest time that [`Client::connect`] looks for a broker that answers.
    pub connect_deadline: Duration,
    /// Longest time for one attempt at one broker; then another attempt is made if that is harmless.
    pub request_timeout: Duration,
    /// Longest time for a request with all its attempts.
    pub deadline: Duration,
    /// Wait after the first failed attempt; it doubles.
    pub backoff_min: Duration,
    /// Longest wait between two attempts.
    pub backoff_max: Duration,
    /// For how long a topic that a broker does not know is asked for again: it may just have been created.
    pub unknown_topic_grace: Duration,
    /// Largest frame sent or accepted, in bytes.
    pub frame_bytes_max: usize,
    /// Bytes that may wait to be sent on one connection.
    pub send_queue_bytes: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            connect_deadline: Duration::from_secs(5),
            request_timeout: Duration::from_secs(5),
            deadline: Duration::from_secs(30),
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_millis(250),
            unknown_topic_grace: Duration::from_secs(1),
            frame_bytes_max: 32 << 20,
            send_queue_bytes: 64 << 20,
        }
    }
}

impl ClientConfig {
    fn net(&self) -> NetConfig {
        NetConfig {
            frame_bytes_max: self.frame_bytes_max,
            send_queue_bytes: self.send_queue_bytes,
            handshake_timeout: self.connect_timeout,
            ..NetConfig::default()
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff {
            min: self.backoff_min,
            max: self.backoff_max,
            unknown_topic_grace: self.unknown_topic_grace,
        }
    }
}

/// A client of a cluster. Cheap to clone; the connections are shared and close with the last clone.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ClientConfig,
    router: Arc<Router>,
    retries: Retries,
    tasks: Tasks,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

impl Client {
    /// Connects to the cluster that the brokers at `bootstrap` (`host:port`) belong to: one of them must answer within
    /// [`ClientConfig::connect_deadline`]; the others are learnt from it.
    pub async fn connect(bootstrap: &[String], config: ClientConfig) -> Result<Self, Error> {
        for address in bootstrap {
            check_address(address)?;
        }
        if bootstrap.is_empty() {
            let reason = "no broker is named, use host:port[,host:port…]".to_owned();
            return Err(Error::InvalidConfig {
                key: "bootstrap".to_owned(),
                reason,
            });
        }
        let tasks = Tasks::new();
        let dial = dial_over_network(config.net(), config.connect_timeout, tasks.clone());
        let way = Way::Remote {
            dial,
            bootstrap: bootstrap.to_vec(),
        };
        let client = Self::over(way, config, tasks);
        let deadline = Instant::now() + client.inner.config.connect_deadline;
        let request = Request::Metadata {
            topics: Some(Vec::new()),
        };
        match client.call_until(request, deadline).await? {
            Response::Metadata {
                brokers, topics, ..
            } => {
                client.inner.router.learn(brokers, topics);
                Ok(client)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// A client over something that answers requests, as a broker in this process, with the default configuration.
    pub fn from_service(service: Arc<dyn Service>) -> Self {
        Self::from_service_with(service, ClientConfig::default())
    }

    /// As [`Client::from_service`], with a configuration.
    pub fn from_service_with(service: Arc<dyn Service>, config: ClientConfig) -> Self {
        Self::over(Way::Local(service), config, Tasks::new())
    }

    fn over(way: Way, config: ClientConfig, tasks: Tasks) -> Self {
        let router = Arc::new(Router::new(way, config.request_timeout));
        Self {
            inner: Arc::new(Inner {
                config,
                router,
                retries: Retries::default(),
                tasks,
            }),
        }
    }

    /// A client whose connections a test makes.
    #[cfg(test)]
    fn over_dial(dial: Dial, bootstrap: &[&str], config: ClientConfig) -> Self {
        let bootstrap = bootstrap
            .iter()
            .map(|address| (*address).to_owned())
            .collect();
        Self::over(Way::Remote { dial, bootstrap }, config, Tasks::new())
    }

    /// The client's configuration.
    pub fn config(&self) -> &ClientConfig {
        &self.inner.config
    }

    /// What an operator does: topics, state of the cluster.
    pub fn admin(&self) -> Admin {
        Admin::new(self.clone())
    }

    /// A handle of the topic `name`; whether it exists shows when it is used.
    pub fn topic(&self, name: &str) -> Result<Topic, Error> {
        Ok(Topic::new(self.clone(), TopicName::new(name)?))
    }

    /// The request, of this client or one of its clones, that has been failing for the longest time and is being made again: what one who
    /// waits for an answer waits for.
    pub fn retrying(&self) -> Option<Retrying> {
        self.inner.retries.oldest()
    }

    /// Where a request shows that it is repeated.
    fn retry_place(&self) -> Place<'_> {
        self.inner.retries.place()
    }

    fn router(&self) -> &Arc<Router> {
        &self.inner.router
    }

    fn retry(&self, repeat: Repeat, deadline: Instant) -> Retry {
        Retry::new(repeat, self.inner.config.backoff(), deadline)
    }

    /// Makes `request` and repeats it while that is harmless and may help, for [`ClientConfig::deadline`] at most. Dropping
    /// the future does not undo what was begun.
    pub async fn request(&self, request: Request) -> Result<Response, Error> {
        self.call_until(request, Instant::now() + self.inner.config.deadline)
            .await
    }

    /// As [`Client::request`], until `deadline`.
    async fn call_until(&self, request: Request, deadline: Instant) -> Result<Response, Error> {
        let repeat = Repeat::of(&request);
        let route = Route::of(&request);
        let mut retry = self.retry(repeat, deadline);
        let mut shown = self.retry_place();
        loop {
            let error = match self.attempt(&route, &request, &retry, repeat).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            tracing::trace!(%error, "attempt failed");
            match retry.failed(error, Instant::now(), jitter()) {
                Verdict::Again(wait) => {
                    shown.failed(retry.reason());
                    tokio::time::sleep(wait).await;
                }
                Verdict::Final(error) => return Err(error),
            }
        }
    }

    async fn attempt(
        &self,
        route: &Route,
        request: &Request,
        retry: &Retry,
        repeat: Repeat,
    ) -> Result<Response, Error> {
        let router = self.router();
        let found = tokio::time::timeout_at(retry.deadline(), router.target(route)).await;
        let target = match found {
            Ok(Ok(target)) => target,
            Ok(Err(error)) => {
                router.failed(route, None, &error);
                return Err(error);
            }
            // Nothing was sent.
            Err(_) => {
                let address = "the cluster".to_owned();
                let reason = "no broker answered in time".to_owned();
                return Err(Error::Unreachable { address, reason });
            }
        };
        let left = retry.deadline().saturating_duration_since(Instant::now());
        let limit = match repeat {
            // There is no second attempt after silence, so the first one gets all the time.
            Repeat::Once => left,
            _ => left.min(self.inner.config.request_timeout + patience(request)),
        };
        let answer = target.send(request.clone(), limit).await;
        if let Err(error) = &answer {
            router.failed(route, Some(&target), error);
        }
        answer
    }
}

impl Service for Client {
    /// A client can stand in for a broker: requests are routed and repeated as by [`Client::request`]. Two requests of one caller may
    /// overtake each other when the first one is repeated.
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response, Error>> {
        let client = self.clone();
        let deadline = Instant::now() + call.timeout();
        async move { client.call_until(call.request, deadline).await }.boxed()
    }
}

/// How long a broker may take of its own will.
fn patience(request: &Request) -> Duration {
    match request {
        Request::Fetch { max_wait_ms, .. } => Duration::from_millis((*max_wait_ms).into()),
        _ => Duration::ZERO,
    }
}

fn jitter() -> u8 {
    u8::try_from(runtime::random_seed() & 0xff).unwrap_or(0)
}

/// An answer to another question: the broker is of another mind, or of another version.
fn unexpected(response: &Response) -> Error {
    let shown: String = format!("{response:?}").chars().take(40).collect();
    Error::Failed {
        reason: format!("it gave an answer that does not fit the request: {shown}"),
    }
}

fn check_address(address: &str) -> Result<(), Error> {
    let good = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if good {
        return Ok(());
    }
    let reason = format!("{address:?} is not of the form host:port, as 127.0.0.1:9092");
    Err(Error::InvalidConfig {
        key: "bootstrap".to_owned(),
        reason,
    })
}

fn dial_over_network(net: NetConfig, limit: Duration, tasks: Tasks) -> Dial {
    Arc::new(move |address| {
        let (net, tasks) = (net.clone(), tasks.clone());
        async move {
            let opened =
                tokio::time::timeout(limit, Connection::open(&address, &net, &tasks)).await;
            let Ok(opened) = opened else {
                let reason = format!("no connection within {} ms", limit.as_millis());
                return Err(Error::Unreachable { address, reason });
            };
            let connection = opened.map_err(|error| not_sent(error, &address, 0))?;
            let link: Arc<dyn Service> = Arc::new(Link {
                connection,
                address,
            });
            Ok(link)
        }
        .boxed()
    })
}

/// One connection as something that answers requests, in the order of the calls.
struct Link {
    connection: Connection,
    address: String,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Service for Link {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response, Error>> {
        // The caller gives up first; this bound only keeps the connection's table clean.
        let deadline = call.timeout() + Duration::from_secs(1);
        let address = self.address.clone();
        let message = call.into_message();
        let bytes = message.header.len() + message.body.iter().map(Bytes::len).sum::<usize>();
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        match self.connection.call(message, deadline) {
            Err(error) => {
                futures_util::future::ready(Err(not_sent(error, &address, bytes))).boxed()
            }
            Ok(pending) => async move {
                match pending.await {
                    Ok(message) => answer_from_message(message).unwrap_or_else(|error| {
                        let reason = format!("{address} sent an unreadable answer: {error}");
                        Err(Error::Failed { reason })
                    }),
                    Err(error) => Err(unanswered(error)),
                }
            }
            .boxed(),
        }
    }
}

/// A failure before anything was sent.
fn not_sent(error: NetError, address: &str, request_bytes: u64) -> Error {
    match error {
        NetError::Unreachable { address, reason } => Error::Unreachable { address, reason },
        NetError::Full { .. } => Error::Overloaded {
            bytes: request_bytes,
        },
        NetError::TooLarge { bytes, max, .. } => {
            let wide = |bytes| u64::try_from(bytes).unwrap_or(u64::MAX);
            Error::RecordTooLarge {
                size: wide(bytes),
                max: wide(max),
            }
        }
        other => Error::Unreachable {
            address: address.to_owned(),
            reason: other.to_string(),
        },
    }
}

/// A failure after the request may have been sent.
fn unanswered(error: NetError) -> Error {
    match error {
        NetError::Unreachable { address, reason } => Error::Unreachable { address, reason },
        NetError::Timeout { after, .. } => {
            let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
            Error::Timeout { after_ms }
        }
        NetError::Lost { address }
        | NetError::Refused { address, .. }
        | NetError::Listen { address, .. }
        | NetError::TooLarge { address, .. }
        | NetError::Full { address } => Error::ConnectionLost { address },
    }
}

#[cfg(test)]
mod tests;
