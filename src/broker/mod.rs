//! One broker: wires store, network, groups, controller, partitions and doors together, and takes them down in order.
//!
//! Owns the broker's tasks and the latch that says why it stopped. Decides nothing about replication: what runs here
//! is the reconciler's business, who leads is Raft's, what is answered is the service's.
//!
//! Order of start: port, store, listener, controller group, door, cluster id, registration with the controller, replicas. A
//! broker that the controller does not admit never starts a replica, so an old or copied data directory takes no part.

mod founding;
mod peers;
pub mod reconciler;
mod service;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::api::{Call, Request, Response, answer_from_message, answer_to_message};
use crate::client::Client;
use crate::config::BrokerConfig;
use crate::controller::{self, ClusterMetadata, Controller, ControllerConfig};
use crate::net::{
    Channel, Handler, Identity, Lane, Message, Net, NetConfig, Origin, PeerState, Port, Reply,
};
use crate::raft::{Group, Groups, RaftConfig, Role};
use crate::runtime::{Tasks, spawn_blocking};
#[cfg(any(test, feature = "testkit"))]
use crate::storage::MemDisk;
use crate::storage::{Store, StoreConfig};
use crate::types::{BrokerId, Endpoint, Error, GroupId, Incarnation, ReplicaId, ReplicaKind};

use peers::PeerAddresses;
use reconciler::Reconciler;
use service::BrokerService;

/// Longest a stopping broker waits for others to take over its leaderships.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the durable position of the journal is reported while it moves: an old copy of the data directory is told
/// apart from the original by it.
const POSITION_REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// How long a peer is looked for at one address before its other one gets a turn, when the metadata and the bootstrap list name
/// different ones.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(1);
/// Longest one request between brokers may take.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);

/// The member of the controller's group in the data directory `incarnation` of `broker`.
pub(crate) fn controller_replica(broker: BrokerId, incarnation: Incarnation) -> ReplicaId {
    ReplicaId::new(broker, ReplicaKind::Data, incarnation.controller_epoch())
}

/// What the parts of a broker share. Cheap to clone.
#[derive(Clone)]
struct BrokerContext {
    id: BrokerId,
    endpoint: Endpoint,
    config: Arc<BrokerConfig>,
    net_config: NetConfig,
    store: Store,
    net: Net,
    groups: Groups,
    controller_group: Group,
    controller: Controller,
    tasks: Tasks,
    failed: watch::Sender<Option<Error>>,
}

impl BrokerContext {
    /// Stops acknowledging for good, for `error`'s reason: the first one counts.
    fn fail(&self, error: Error) {
        self.failed.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                tracing::error!("{error}");
                *known = Some(error);
            }
            first
        });
    }

    /// Asks `broker` over the connections between brokers; enqueued at once, so that the order of calls is kept.
    fn ask_peer(
        &self,
        broker: BrokerId,
        request: Request,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Response, Error>> {
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let message = Call {
            timeout_ms,
            forward: false,
            request,
        }
        .into_message();
        let pending = self
            .net
            .call(broker, Lane::Data, Channel::Api, message, timeout);
        Box::pin(async move {
            let answer = answer_from_message(pending?.await?);
            answer.map_err(|error| Error::Failed {
                reason: error.to_string(),
            })?
        })
    }

    /// Has the controller's leader answer `request`, wherever it is.
    async fn ask_controller(&self, request: Request, timeout: Duration) -> Result<Response, Error> {
        match self.controller.leader_broker() {
            Some(leader) if leader == self.id => service::answer_as_controller(self, request).await,
            Some(leader) => match self.ask_peer(leader, request, timeout).await {
                // It led when it was last heard of: whoever asks wants to know about the controller, not about that broker.
                Err(Error::Unreachable { .. }) => Err(Error::ControllerUnavailable),
                answer => answer,
            },
            None => Err(Error::ControllerUnavailable),
        }
    }
}

/// A running broker. Cheap to clone; it runs until [`Broker::shutdown`], or until it fails.
#[derive(Clone)]
pub struct Broker {
    context: BrokerContext,
    reconciler: Reconciler,
    service: Arc<BrokerService>,
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker")
            .field("endpoint", &self.context.endpoint)
            .finish_non_exhaustive()
    }
}

/// Starts a broker, see [`Broker::builder`].
#[derive(Debug)]
pub struct BrokerBuilder {
    config: BrokerConfig,
    #[cfg(any(test, feature = "testkit"))]
    disk: Option<MemDisk>,
}

impl BrokerBuilder {
    /// Takes the port, opens the data directory, listens, and sets the broker going; it joins its cluster in the background.
    /// Returns when requests are accepted; see [`Broker::wait_ready`] for when the cluster has admitted it.
    ///
    /// # Errors
    /// The configuration is invalid, the data directory is in use, damaged or somebody else's, or the port is taken.
    pub async fn start(self) -> Result<Broker, Error> {
        self.config.validate()?;
        // Before the directory is made: one that has a broker's number in it is no other broker's any more.
        let port = Port::take(&self.config.listen).await?;
        let store = self.open_store().await?;
        Broker::start(self.config, store, port).await
    }

    /// Keeps the data on `disk` in the place of the data directory, whose path then only shows in messages.
    #[cfg(any(test, feature = "testkit"))]
    #[must_use]
    pub fn memory_disk(mut self, disk: &MemDisk) -> Self {
        self.disk = Some(disk.clone());
        self
    }

    async fn open_store(&self) -> Result<Store, Error> {
        let config = &self.config;
        let store_config = StoreConfig {
            directory: config.data_dir.clone(),
            segment_bytes: config.segment_bytes,
            cache_bytes: config.cache_bytes,
            catalog_cache_bytes: config.catalog_cache_bytes,
            catalog_sync_bytes: config.segment_bytes / 2,
            commit_bytes_max: 8 << 20,
            reserve_bytes: config.disk_reserve_bytes,
        };
        let id = BrokerId(config.broker_id);
        #[cfg(any(test, feature = "testkit"))]
        let disk = self.disk.clone();
        let open = move || {
            #[cfg(any(test, feature = "testkit"))]
            if let Some(disk) = disk {
                return Store::open_in_memory(&disk, &store_config, id);
            }
            Store::open(&store_config, id)
        };
        match spawn_blocking(open).await {
            Ok(Ok(store)) => Ok(store),
            Ok(Err(error)) => Err(Error::Refused {
                reason: error.to_string(),
            }),
            Err(error) => Err(Error::Failed {
                reason: error.to_string(),
            }),
        }
    }
}

impl Broker {
    /// A broker with this configuration.
    pub fn builder(config: BrokerConfig) -> BrokerBuilder {
        BrokerBuilder {
            config,
            #[cfg(any(test, feature = "testkit"))]
            disk: None,
        }
    }

    async fn start(config: BrokerConfig, store: Store, port: Port) -> Result<Self, Error> {
        let mut bootstrap = config.bootstrap_endpoints()?;
        let id = BrokerId(config.broker_id);
        let tasks = Tasks::new();
        let directory = store.identity();
        let identity = Identity {
            broker: id,
            incarnation: directory.incarnation,
            cluster: directory.cluster,
            boot: directory.boot,
            position: directory.position,
        };
        let net_config = net_config(&config);
        let net = match Net::listen(port, identity, net_config.clone(), tasks.clone()) {
            Ok(net) => net,
            Err(error) => {
                store.close().await.ok(); // the port is the error to report
                return Err(error.into());
            }
        };
        let address = if config.advertise.is_empty() {
            net.local_addr().to_string()
        } else {
            config.advertise.clone()
        };
        let endpoint = Endpoint {
            broker: id,
            address,
        };
        if bootstrap.is_empty() {
            bootstrap.push(endpoint.clone());
        }
        net.set_peers(
            bootstrap
                .iter()
                .filter(|peer| peer.broker != id)
                .cloned()
                .collect(),
        );
        let groups = Groups::new(
            id,
            store.clone(),
            net.clone(),
            raft_config(&config),
            tasks.clone(),
        );
        let (machine, images) = controller::machine();
        let me = controller_replica(id, directory.incarnation);
        let controller_group = groups
            .start(GroupId::CONTROLLER, me, Box::new(machine))
            .await?;
        let (failed, _) = watch::channel(None);
        let controller = Controller::new(
            controller_group.clone(),
            images,
            controller_config(&config, &bootstrap),
        );
        let context = BrokerContext {
            id,
            endpoint,
            config: Arc::new(config),
            net_config,
            store,
            net,
            groups,
            controller_group,
            controller,
            tasks,
            failed,
        };
        let reconciler = Reconciler::new(service::reconciler_ports(&context));
        let service = Arc::new(BrokerService::new(context.clone(), reconciler.clone()));
        context.net.serve(Arc::new(Door {
            service: service.clone(),
            groups: context.groups.clone(),
            tasks: context.tasks.clone(),
        }));
        let broker = Self {
            context,
            reconciler,
            service,
        };
        broker.spawn_tasks(bootstrap);
        Ok(broker)
    }

    fn spawn_tasks(&self, bootstrap: Vec<Endpoint>) {
        let context = self.context.clone();
        let store_failed = context.store.failed();
        context.tasks.clone().spawn({
            let context = context.clone();
            async move {
                let error = store_failed.await;
                context.fail(Error::Failed {
                    reason: error.to_string(),
                });
            }
        });
        let founders = bootstrap.len();
        context.tasks.spawn({
            let context = context.clone();
            async move {
                let mut status = context.controller_group.status();
                let stopped = status.wait_for(|status| status.role == Role::Stopped);
                let stopped = stopped.await.is_ok();
                // Without it this broker would go by metadata that never changes again.
                if stopped && let Some(damage) = context.groups.damage(GroupId::CONTROLLER) {
                    let known = context.controller.metadata().borrow().endpoints().count();
                    let brokers = known.max(founders);
                    let reason = controller_damaged(&damage.what, brokers);
                    context.fail(Error::Failed { reason });
                }
            }
        });
        context
            .tasks
            .spawn(follow_metadata(context.clone(), bootstrap.clone()));
        context.tasks.spawn({
            let (context, bootstrap) = (context.clone(), bootstrap.clone());
            async move {
                let group = context.controller_group.clone();
                founding::found_if_first(&context, &bootstrap, &group).await;
                founding::note_cluster(&context).await;
            }
        });
        let mover = service::leader_mover(&context, &self.reconciler);
        context.controller.run(mover, &context.tasks);
        let broker = self.clone();
        context.tasks.spawn(async move {
            let context = &broker.context;
            if let Err(error) = founding::register(context, &bootstrap).await {
                context.fail(error);
                return;
            }
            await_admission(context).await;
            broker.reconciler.run();
            report_position(context).await;
        });
    }

    /// The broker's number.
    pub fn id(&self) -> BrokerId {
        self.context.id
    }

    /// Where it is reached.
    pub fn endpoint(&self) -> &Endpoint {
        &self.context.endpoint
    }

    /// The address it listens on.
    pub fn local_addr(&self) -> std::net::SocketAddr {
        self.context.net.local_addr()
    }

    /// A client that asks this broker in process, without a socket; requests for other leaders are passed on.
    pub fn client(&self) -> Client {
        Client::from_service(self.service.clone())
    }

    /// Resolves when the cluster has admitted this broker and every replica assigned to it was started once.
    pub async fn wait_ready(&self) {
        self.reconciler.wait_ready().await;
    }

    /// Resolves with the reason when the broker has failed: it acknowledges nothing any more and must be shut down.
    pub async fn wait_failed(&self) -> Error {
        let mut failed = self.context.failed.subscribe();
        let found = failed
            .wait_for(Option::is_some)
            .await
            .map(|error| error.clone());
        match found {
            Ok(Some(error)) => error,
            _ => Error::ShuttingDown,
        }
    }

    /// Stops in order: refuses new requests, hands its leaderships over, stops the replicas, says goodbye, and closes the
    /// store. Takes at most some seconds when nobody can take over.
    pub async fn shutdown(&self) {
        self.service.refuse();
        if self.context.failed.borrow().is_none() {
            let handover = self.reconciler.hand_over(&self.context.controller_group);
            if let Ok(stay) = tokio::time::timeout(HANDOVER_TIMEOUT, handover).await {
                tracing::info!(stay, "leaderships are handed over");
            } else {
                tracing::warn!("not every leadership was taken over in time");
            }
        }
        self.reconciler.stop().await;
        self.context.groups.shutdown().await;
        // Others act on a goodbye at once: it must be true by then that nothing leads here.
        self.context.net.goodbye().await;
        self.context.tasks.shutdown().await;
        if let Err(error) = self.context.store.close().await {
            tracing::error!("{error}");
        }
    }

    /// The replicas that run here.
    #[cfg(any(test, feature = "testkit"))]
    pub fn replicas(&self) -> Vec<crate::partition::Partition> {
        self.reconciler.partitions()
    }

    /// What a crash leaves: nothing that is queued becomes durable any more, the directory is free, and no request is answered.
    /// Blocking. The caller drops the runtime that the broker runs in, without polling anything of it again.
    #[cfg(any(test, feature = "testkit"))]
    pub(crate) fn abandon(&self) {
        self.context.store.abandon();
        self.service.refuse();
    }
}

/// Keeps peers and their admission in step with the metadata, and notices when another process has taken this identity.
async fn follow_metadata(context: BrokerContext, bootstrap: Vec<Endpoint>) {
    let mine = context.store.identity();
    let mut metadata = context.controller.metadata();
    let mut addresses = PeerAddresses::new(bootstrap);
    let mut again = false;
    loop {
        let image = metadata.borrow_and_update().clone();
        let up = |broker| context.net.peer_state(broker) == PeerState::Up;
        let mut peers = addresses.choose(image.endpoints(), up, again);
        peers.retain(|peer| peer.broker != context.id);
        context.net.set_peers(peers);
        if let Some(known) = image.broker(context.id)
            && known.supersedes(mine.incarnation, mine.boot)
        {
            let reason = format!(
                "another process has registered as broker {} from {}; this one stops",
                context.id, known.endpoint.address
            );
            context.fail(Error::Refused { reason });
        }
        if !again {
            let is_current = shows(&image, context.id, mine.incarnation, mine.boot);
            context.net.set_admission(Arc::new(move |identity| {
                if is_current {
                    image.admits(identity)
                } else {
                    image.admits_while_old(identity)
                }
            }));
        }
        let changed = tokio::time::timeout(ADDRESS_PATIENCE, metadata.changed()).await;
        if matches!(changed, Ok(Err(_))) {
            return;
        }
        again = changed.is_err();
    }
}

/// What a broker whose controller's log is damaged says, in a cluster of so many.
fn controller_damaged(what: &str, brokers: usize) -> String {
    let way_out = if brokers > 1 {
        "move the data directory away and start the broker empty, it will rejoin with new replicas"
    } else {
        "no other broker has what is in the data directory: keep a copy of it before anything is tried, and see `logboom fsck`"
    };
    format!("the controller's log is damaged: {what}; {way_out}")
}

/// Whether `image` shows the process that opened directory `incarnation` of `broker` for the `boot`th time.
fn shows(image: &ClusterMetadata, broker: BrokerId, incarnation: Incarnation, boot: u64) -> bool {
    image
        .broker(broker)
        .is_some_and(|known| known.incarnation == incarnation && known.boot == boot)
}

/// Waits until the metadata shows this very process.
async fn await_admission(context: &BrokerContext) {
    let mine = context.store.identity();
    let mut metadata = context.controller.metadata();
    let shown = metadata.wait_for(|image| shows(image, context.id, mine.incarnation, mine.boot));
    shown.await.ok(); // the sender lives as long as the controller's group
}

async fn report_position(context: &BrokerContext) {
    let mut reported = context.store.identity().position;
    let mut interval = tokio::time::interval(POSITION_REPORT_INTERVAL);
    loop {
        interval.tick().await;
        let position = context.store.position();
        if position == reported {
            continue;
        }
        match service::report(context, Vec::new(), position).await {
            Ok(()) => reported = position,
            Err(error) => tracing::debug!(%error, "position not reported yet"),
        }
    }
}

fn net_config(config: &BrokerConfig) -> NetConfig {
    NetConfig {
        frame_bytes_max: config.frame_bytes_max,
        send_queue_bytes: config.send_queue_bytes,
        receive_bytes: config.receive_bytes,
        connections_max: config.connections_max,
        ..NetConfig::default()
    }
}

fn raft_config(config: &BrokerConfig) -> RaftConfig {
    RaftConfig {
        heartbeat_interval: config.heartbeat_interval(),
        election_timeout_min: Duration::from_millis(config.election_timeout_min_ms),
        election_timeout_max: config.election_timeout_max(),
        ..RaftConfig::default()
    }
}

fn controller_config(config: &BrokerConfig, bootstrap: &[Endpoint]) -> ControllerConfig {
    ControllerConfig {
        bootstrap: bootstrap.iter().map(|endpoint| endpoint.broker).collect(),
        voters_max: founding::CONTROLLER_VOTERS_MAX,
        election_timeout_max: config.election_timeout_max(),
        preferred_leader_delay: Duration::from_millis(config.preferred_leader_delay_ms),
        ..ControllerConfig::default()
    }
}

/// Takes messages off the connections: Raft's go to the groups, requests to the service.
struct Door {
    service: Arc<BrokerService>,
    groups: Groups,
    tasks: Tasks,
}

impl Handler for Door {
    fn handle(&self, origin: &Origin, channel: Channel, message: Message, reply: Reply) {
        match channel {
            Channel::Raft => self.groups.handle(origin, message, reply),
            Channel::Api => {
                let answer = match Call::from_message(message) {
                    Ok(call) => self
                        .service
                        .answer(call, origin.broker.map(|(broker, _)| broker)),
                    Err(error) => {
                        let reason = error.to_string();
                        Box::pin(async move { Err(Error::InvalidRequest { reason }) })
                    }
                };
                self.tasks
                    .spawn(async move { reply.send(answer_to_message(answer.await)) });
            }
        }
    }

    fn closed(&self, origin: &Origin) {
        self.groups.connection_closed(origin);
    }
}

#[cfg(test)]
mod tests {
    use super::controller_damaged;

    /// Goal: nobody is told to throw away the only copy. Method: alone, and not.
    #[test]
    fn what_to_do_about_damage_depends_on_the_others() {
        let alone = controller_damaged("rot", 1);
        assert!(
            alone.contains("keep a copy") && !alone.contains("empty"),
            "{alone}"
        );
        let together = controller_damaged("rot", 3);
        assert!(together.contains("start the broker empty"), "{together}");
    }
}
