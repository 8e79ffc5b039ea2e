//! Where a request goes: the picture of who leads what, and one connection per broker.
//!
//! Owns the metadata cache, the connections, and the memory of which brokers did not answer lately. Neither retries
//! nor waits between attempts: each call finds one destination, and is told afterwards how it went. One lock, never
//! held across an await; dials and metadata requests are shared by all who need them at the same moment.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::time::Instant;

use crate::api::{Call, PartitionRoute, Request, Response, Service, TopicRoute};
use crate::config::TopicConfig;
use crate::types::{BrokerId, Endpoint, Error, PartitionId, TopicName, TopicPartition};

/// Opens the way to one address.
pub(crate) type Dial = Arc<dyn Fn(String) -> Dialled + Send + Sync>;
/// A connection in the making.
pub(crate) type Dialled = BoxFuture<'static, Result<Arc<dyn Service>, Error>>;

/// How brokers are reached.
pub(crate) enum Way {
    /// Through a broker of this process, which forwards.
    Local(Arc<dyn Service>),
    /// Over the network, beginning with these addresses.
    Remote {
        /// Opens connections.
        dial: Dial,
        /// `host:port`, at least one.
        bootstrap: Vec<String>,
    },
}

/// Which broker a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// Any of them.
    Any,
    /// The leader of a partition.
    Leader(TopicPartition),
}

impl Route {
    pub(crate) fn of(request: &Request) -> Self {
        match request {
            Request::Produce { partition, .. }
            | Request::Fetch { partition, .. }
            | Request::FindOffset { partition, .. }
            | Request::Trim { partition, .. } => Self::Leader(partition.clone()),
            _ => Self::Any,
        }
    }
}

/// A destination, good for any number of requests while they succeed.
#[derive(Clone)]
pub(crate) struct Target {
    service: Arc<dyn Service>,
    forward: bool,
    link: Option<(String, u64)>,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Target");
        shown
            .field("forward", &self.forward)
            .field("link", &self.link);
        shown.finish_non_exhaustive()
    }
}

impl Target {
    /// Sends `request` at once: calls on one target are taken in the order of the calls. The answer's future gives up after
    /// `limit`; the broker is told to answer a little earlier, since its answer says more than silence.
    pub(crate) fn send(
        &self,
        request: Request,
        limit: Duration,
    ) -> BoxFuture<'static, Result<Response, Error>> {
        let told = limit.saturating_sub((limit / 10).min(Duration::from_millis(500)));
        let timeout_ms = u32::try_from(told.as_millis()).unwrap_or(u32::MAX);
        let answer = self.service.call(Call {
            timeout_ms,
            forward: self.forward,
            request,
        });
        let after_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        // The clock starts now, not when the future is first polled.
        let until = Instant::now() + limit;
        async move {
            let answer = tokio::time::timeout_at(until, answer).await;
            answer.unwrap_or(Err(Error::Timeout { after_ms }))
        }
        .boxed()
    }
}

type SharedDial = Shared<Dialled>;
type SharedRefresh = Shared<BoxFuture<'static, Result<(), Error>>>;

struct Link {
    number: u64,
    dial: SharedDial,
}

#[derive(Default)]
struct State {
    brokers: BTreeMap<BrokerId, String>,
    topics: BTreeMap<TopicName, TopicRoute>,
    /// Topics whose routes have proved wrong; asked for again before they are used.
    stale: HashSet<TopicName>,
    links: BTreeMap<String, Link>,
    /// Addresses that did not answer, and until when others are preferred.
    avoided: BTreeMap<String, Instant>,
    refreshes: BTreeMap<TopicName, SharedRefresh>,
    /// Where the next request to any broker begins to look.
    turn: usize,
    links_opened: u64,
}

/// How long a broker that did not answer comes last.
const AVOIDED_FOR: Duration = Duration::from_millis(500);

/// See the module.
pub(crate) struct Router {
    way: Way,
    request_timeout: Duration,
    state: Mutex<State>,
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Router")
            .field("brokers", &state.brokers)
            .finish_non_exhaustive()
    }
}

impl Router {
    pub(crate) fn new(way: Way, request_timeout: Duration) -> Self {
        Self {
            way,
            request_timeout,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The destination for `route` as far as is known now. An error is definite: nothing was sent. Cancel safe.
    pub(crate) async fn target(self: &Arc<Self>, route: &Route) -> Result<Target, Error> {
        let (Route::Leader(partition), Way::Remote { dial, bootstrap }) = (route, &self.way) else {
            return self.any_target().await;
        };
        self.topic(&partition.topic).await?;
        let found = self
            .first_of(dial, self.leader_candidates(partition, bootstrap)?)
            .await;
        if !matches!(&found, Ok((_, 0))) {
            // Whoever was believed to lead cannot be reached: someone else will lead soon.
            self.lock().stale.insert(partition.topic.clone());
        }
        found.map(|(target, _)| target)
    }

    /// Any broker that can be reached.
    async fn any_target(&self) -> Result<Target, Error> {
        match &self.way {
            Way::Local(service) => Ok(Target {
                service: service.clone(),
                forward: true,
                link: None,
            }),
            Way::Remote { dial, bootstrap } => {
                let found = self.first_of(dial, self.any_candidates(bootstrap)).await;
                found.map(|(target, _)| target)
            }
        }
    }

    /// The first candidate that can be reached, and how many were tried in vain before it.
    async fn first_of(
        &self,
        dial: &Dial,
        candidates: Vec<(String, bool)>,
    ) -> Result<(Target, usize), Error> {
        let mut last = Error::Unreachable {
            address: "the cluster".to_owned(),
            reason: "no broker is known".to_owned(),
        };
        for (tried, (address, forward)) in candidates.into_iter().enumerate() {
            match self.link(dial, &address).await {
                Ok((service, number)) => {
                    let link = Some((address, number));
                    return Ok((
                        Target {
                            service,
                            forward,
                            link,
                        },
                        tried,
                    ));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// All addresses known, the ones that lately failed last, beginning at another one each time.
    fn any_candidates(&self, bootstrap: &[String]) -> Vec<(String, bool)> {
        let mut state = self.lock();
        state.turn = state.turn.wrapping_add(1);
        let mut addresses: Vec<String> = state.brokers.values().cloned().collect();
        for address in bootstrap {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        let turn = state.turn % addresses.len().max(1);
        addresses.rotate_left(turn);
        let now = Instant::now();
        // A stable sort: connected first, untried next, failed last.
        addresses.sort_by_key(|address| (state.is_avoided(address, now), !state.is_up(address)));
        addresses
            .into_iter()
            .map(|address| (address, true))
            .collect()
    }

    /// The leader; without one that answers, the other replicas (in sync first), which know best who leads now.
    fn leader_candidates(
        &self,
        partition: &TopicPartition,
        bootstrap: &[String],
    ) -> Result<Vec<(String, bool)>, Error> {
        let mut candidates = Vec::new();
        {
            let state = self.lock();
            let now = Instant::now();
            let route = state.route(partition)?;
            let leader = route.leader;
            let others = route.isr.iter().chain(&route.replicas).copied();
            for broker in leader.into_iter().chain(others) {
                let Some(address) = state.brokers.get(&broker) else {
                    continue;
                };
                if !state.is_avoided(address, now) {
                    candidates.push((address.clone(), leader != Some(broker)));
                }
            }
        }
        candidates.extend(self.any_candidates(bootstrap));
        let mut seen = HashSet::new();
        candidates.retain(|(address, _)| seen.insert(address.clone()));
        // Three are enough for one attempt: the next one begins with a fresher picture.
        candidates.truncate(3);
        Ok(candidates)
    }

    /// The connection to `address`, made now if there is none.
    async fn link(&self, dial: &Dial, address: &str) -> Result<(Arc<dyn Service>, u64), Error> {
        let (number, shared) = {
            let mut state = self.lock();
            let number = state.links_opened;
            let link = state
                .links
                .entry(address.to_owned())
                .or_insert_with(|| Link {
                    number,
                    dial: dial(address.to_owned()).shared(),
                });
            let found = (link.number, link.dial.clone());
            state.links_opened = number + 1;
            found
        };
        match shared.await {
            Ok(service) => {
                self.lock().avoided.remove(address);
                Ok((service, number))
            }
            Err(error) => {
                self.drop_link(address, number);
                Err(error)
            }
        }
    }

    fn drop_link(&self, address: &str, number: u64) {
        let mut state = self.lock();
        if state
            .links
            .get(address)
            .is_some_and(|link| link.number == number)
        {
            state.links.remove(address);
            state
                .avoided
                .insert(address.to_owned(), Instant::now() + AVOIDED_FOR);
        }
    }

    /// Learns from a failed attempt at `target`.
    pub(crate) fn failed(&self, route: &Route, target: Option<&Target>, error: &Error) {
        if let Some((address, number)) = target.and_then(|target| target.link.as_ref()) {
            match error {
                Error::ConnectionLost { .. } | Error::Unreachable { .. } => {
                    self.drop_link(address, *number);
                }
                Error::Timeout { .. }
                | Error::ShuttingDown
                | Error::NotJoined { .. }
                | Error::Failed { .. } => {
                    let until = Instant::now() + AVOIDED_FOR;
                    self.lock().avoided.insert(address.clone(), until);
                }
                _ => {}
            }
        }
        let Route::Leader(partition) = route else {
            return;
        };
        let mut state = self.lock();
        match error {
            Error::NotLeader {
                partition,
                leader: Some(leader),
                ..
            } => {
                state.brokers.insert(leader.broker, leader.address.clone());
                state.avoided.remove(&leader.address);
                if let Some(route) = state.route_mut(partition) {
                    route.leader = Some(leader.broker);
                }
            }
            Error::UnknownTopic { topic } | Error::UnknownPartition { topic, .. } => {
                state.topics.remove(topic);
            }
            error if error.needs_metadata() || matches!(error, Error::Timeout { .. }) => {
                let none = matches!(
                    error,
                    Error::NotLeader { .. } | Error::LeaderUnavailable { .. }
                );
                if let (true, Some(route)) = (none, state.route_mut(partition)) {
                    route.leader = None;
                }
                state.stale.insert(partition.topic.clone());
            }
            _ => {}
        }
    }

    /// The routes of one topic, asked for when they are not known or have proved wrong. Cancel safe.
    pub(crate) async fn topic(self: &Arc<Self>, name: &TopicName) -> Result<TopicRoute, Error> {
        let known = {
            let state = self.lock();
            let fresh = !state.stale.contains(name);
            state.topics.get(name).map(|topic| (topic.clone(), fresh))
        };
        if let Some((topic, true)) = known {
            return Ok(topic);
        }
        let asked = self.refresh(name).await;
        match (asked, self.lock().topics.get(name), known) {
            (_, Some(topic), _) => Ok(topic.clone()),
            // Old news is better than none: the old leader may still be the one.
            (Err(Error::UnknownTopic { topic }), ..) => Err(Error::UnknownTopic { topic }),
            (Err(_), None, Some((old, _))) => Ok(old),
            (Err(error), None, None) => Err(error),
            (Ok(()), None, _) => Err(Error::UnknownTopic {
                topic: name.clone(),
            }),
        }
    }

    /// The leader that is believed in, if any.
    pub(crate) fn known_leader(
        &self,
        topic: &TopicName,
        partition: PartitionId,
    ) -> Option<BrokerId> {
        let partition = TopicPartition {
            topic: topic.clone(),
            partition,
        };
        self.lock()
            .route(&partition)
            .ok()
            .and_then(|route| route.leader)
    }

    /// The largest batch that `topic` takes, in bytes, as far as its configuration is known.
    pub(crate) fn max_message_bytes(&self, topic: &TopicName) -> u32 {
        let state = self.lock();
        let pairs = state.topics.get(topic).map(|known| &known.config);
        let config = pairs.and_then(|pairs| TopicConfig::parse(pairs, u32::MAX).ok());
        config.unwrap_or_default().max_message_bytes
    }

    /// Asks a broker about `name`; all who ask at the same moment share one request.
    async fn refresh(self: &Arc<Self>, name: &TopicName) -> Result<(), Error> {
        let shared = {
            let mut state = self.lock();
            let refresh = state.refreshes.entry(name.clone()).or_insert_with(|| {
                let (router, name) = (self.clone(), name.clone());
                async move { router.ask(name).await }.boxed().shared()
            });
            refresh.clone()
        };
        shared.await
    }

    async fn ask(self: Arc<Self>, name: TopicName) -> Result<(), Error> {
        let mut answer = self.ask_once(&name).await;
        if matches!(&answer, Err(error) if error.is_retriable()) {
            // Any broker can answer: a second one is asked before the caller is told.
            answer = self.ask_once(&name).await;
        }
        let mut state = self.lock();
        state.refreshes.remove(&name);
        if matches!(answer, Ok(()) | Err(Error::UnknownTopic { .. })) {
            state.stale.remove(&name);
        }
        if matches!(answer, Err(Error::UnknownTopic { .. })) {
            state.topics.remove(&name);
        }
        answer
    }

    async fn ask_once(self: &Arc<Self>, name: &TopicName) -> Result<(), Error> {
        let target = self.any_target().await?;
        let request = Request::Metadata {
            topics: Some(vec![name.clone()]),
        };
        let limit = self.request_timeout.min(Duration::from_secs(3));
        match target.send(request, limit).await {
            Ok(Response::Metadata {
                brokers, topics, ..
            }) => {
                let found = topics.iter().any(|topic| topic.name == *name);
                self.learn(brokers, topics);
                if found {
                    Ok(())
                } else {
                    Err(Error::UnknownTopic {
                        topic: name.clone(),
                    })
                }
            }
            Ok(other) => Err(super::unexpected(&other)),
            Err(error) => {
                self.failed(&Route::Any, Some(&target), &error);
                Err(error)
            }
        }
    }

    /// Takes in what a broker said about brokers and topics.
    pub(crate) fn learn(&self, brokers: Vec<Endpoint>, topics: Vec<TopicRoute>) {
        let mut state = self.lock();
        if !brokers.is_empty() {
            state.brokers = brokers
                .into_iter()
                .map(|known| (known.broker, known.address))
                .collect();
        }
        for mut topic in topics {
            if let Some(old) = state.topics.get(&topic.name) {
                topic
                    .partitions
                    .iter_mut()
                    .for_each(|route| keep_newer(route, old));
            }
            state.topics.insert(topic.name.clone(), topic);
        }
    }
}

/// A broker's picture may be older than ours: a leader of a later epoch stays.
fn keep_newer(route: &mut PartitionRoute, old: &TopicRoute) {
    let mut same = old
        .partitions
        .iter()
        .filter(|known| known.partition == route.partition);
    if let Some(known) = same.find(|known| known.leader.is_some() && known.epoch > route.epoch) {
        route.leader = known.leader;
        route.epoch = known.epoch;
    }
}

impl State {
    fn is_avoided(&self, address: &str, now: Instant) -> bool {
        self.avoided.get(address).is_some_and(|until| *until > now)
    }

    fn is_up(&self, address: &str) -> bool {
        self.links
            .get(address)
            .is_some_and(|link| link.dial.peek().is_some_and(Result::is_ok))
    }

    fn route(&self, partition: &TopicPartition) -> Result<&PartitionRoute, Error> {
        let unknown = || Error::UnknownTopic {
            topic: partition.topic.clone(),
        };
        let topic = self.topics.get(&partition.topic).ok_or_else(unknown)?;
        let route = topic
            .partitions
            .iter()
            .find(|route| route.partition == partition.partition);
        route.ok_or_else(|| Error::UnknownPartition {
            topic: partition.topic.clone(),
            partition: partition.partition,
            partitions: u32::try_from(topic.partitions.len()).unwrap_or(u32::MAX),
        })
    }

    fn route_mut(&mut self, partition: &TopicPartition) -> Option<&mut PartitionRoute> {
        let topic = self.topics.get_mut(&partition.topic)?;
        topic
            .partitions
            .iter_mut()
            .find(|route| route.partition == partition.partition)
    }
}
