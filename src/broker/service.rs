//! Answers requests: each goes to a local partition, to the controller, or one hop to the broker that is responsible.
//!
//! Owns no state but the switch that refuses new requests. A forwarded request is never forwarded again.

mod confirm;
mod describe;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::api::{Call, DrainView, PartitionReport, Request, Response, Service};
use crate::controller::{Answer, Command, LeaderMover};
use crate::partition::Partition;
use crate::raft::RaftError;
use crate::types::{
    BrokerId, ClusterId, Endpoint, Error, Incarnation, ReplicaId, TopicName, TopicPartition,
};

use confirm::{confirm, staleness};
use describe::{describe, figures, status};

use super::reconciler::{Reconciler, ReconcilerPorts};
use super::{BrokerContext, PEER_TIMEOUT, controller_replica, founding};

/// How long a request waits for this broker's metadata to show a topic that the controller already has.
const METADATA_WAIT: Duration = Duration::from_secs(2);

/// What an answer has at most beside its records, in bytes.
const ANSWER_HEADER_BYTES: usize = 64 << 10;
/// Bytes waiting for the disk above which produce is refused: it does not keep up, and the store gives up at four times as
/// many.
const BACKLOG_BYTES_MAX: u64 = 128 << 20;

/// The broker's answers. One per broker.
pub(super) struct BrokerService {
    context: BrokerContext,
    reconciler: Reconciler,
    refusing: AtomicBool,
}

impl Service for BrokerService {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Response, Error>> {
        self.answer(call, None)
    }
}

impl BrokerService {
    pub(super) fn new(context: BrokerContext, reconciler: Reconciler) -> Self {
        Self {
            context,
            reconciler,
            refusing: AtomicBool::new(false),
        }
    }

    /// Refuses every request from now on.
    pub(super) fn refuse(&self) {
        self.refusing.store(true, Ordering::Release);
    }

    /// Answers `call`, which comes from the admitted broker `from` or, when `None`, from a client; what it appends is queued
    /// before this returns, so that successive calls keep their order.
    pub(super) fn answer(
        &self,
        call: Call,
        from: Option<BrokerId>,
    ) -> BoxFuture<'static, Result<Response, Error>> {
        if self.refusing.load(Ordering::Acquire) {
            return ready(Err(Error::ShuttingDown));
        }
        if self.context.failed.borrow().is_some() {
            // Nothing was done, and another broker can do it: no reason for the caller to give up.
            return ready(Err(Error::ShuttingDown));
        }
        if from.is_none() && !self.has_joined() && !is_before_joining(&call.request) {
            let broker = self.context.id;
            return ready(Err(Error::NotJoined { broker }));
        }
        let longest = Duration::from_millis(self.context.config.request_timeout_max_ms);
        let timeout = call.timeout().min(longest);
        let Call {
            request, forward, ..
        } = call;
        let answer = match partition_of(&request) {
            Some(partition) => self.ask_partition(partition.clone(), request, forward, timeout),
            None => self.ask_cluster(request, forward, from, timeout),
        };
        let after_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        Box::pin(async move {
            // the partition's own deadline fires first; this one bounds what has none
            let bound = timeout + Duration::from_millis(250);
            tokio::time::timeout(bound, answer)
                .await
                .unwrap_or(Err(Error::Timeout { after_ms }))
        })
    }

    /// Whether the metadata shows this broker. A broker that was just started has none, which looks like an empty cluster.
    fn has_joined(&self) -> bool {
        let metadata = self.context.controller.metadata();
        metadata.borrow().broker(self.context.id).is_some()
    }

    /// Most bytes of records in one answer: with its header it must fit into a frame, or it would never arrive.
    fn fetch_bytes_max(&self) -> u32 {
        let most = self
            .context
            .config
            .frame_bytes_max
            .saturating_sub(ANSWER_HEADER_BYTES);
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    fn ask_partition(
        &self,
        name: TopicPartition,
        request: Request,
        forward: bool,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Response, Error>> {
        let local = self.reconciler.partition(&name);
        if let Some(partition) = &local
            && (partition.is_leader() || !forward)
        {
            return ask_local(partition, request, timeout, self.fetch_bytes_max());
        }
        let image = self.context.controller.metadata().borrow().clone();
        let leader = local
            .as_ref()
            .and_then(Partition::leader_broker)
            .or_else(|| image.leader_of(&name))
            .filter(|leader| *leader != self.context.id);
        match (image.check_partition(&name), leader) {
            (Ok(()), Some(leader)) if forward => {
                let answer = self.context.ask_peer(leader, request, timeout);
                Box::pin(async move { reached(answer.await, name) })
            }
            (Ok(()), leader) => ready(Err(Error::NotLeader {
                partition: name,
                broker: self.context.id,
                leader: leader.and_then(|leader| image.endpoint(leader)),
            })),
            (Err(error), _) => {
                let (context, reconciler) = (self.context.clone(), self.reconciler.clone());
                let fetch_bytes_max = self.fetch_bytes_max();
                Box::pin(async move {
                    if !forward || !await_topic(&context, &name.topic).await? {
                        return Err(error);
                    }
                    let leader = await_leader(&context, &name).await;
                    match (leader, reconciler.partition(&name)) {
                        (Some(leader), _) if leader != context.id => {
                            reached(context.ask_peer(leader, request, timeout).await, name)
                        }
                        (_, Some(partition)) => {
                            ask_local(&partition, request, timeout, fetch_bytes_max).await
                        }
                        _ => Err(Error::LeaderUnavailable { partition: name }),
                    }
                })
            }
        }
    }

    fn ask_cluster(
        &self,
        request: Request,
        forward: bool,
        from: Option<BrokerId>,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Response, Error>> {
        if let Err(error) = check_sender(&request, from) {
            return ready(Err(error));
        }
        let (context, reconciler) = (self.context.clone(), self.reconciler.clone());
        Box::pin(async move {
            match request {
                Request::Metadata { topics } => metadata(&context, topics).await,
                Request::DescribeTopics { topics } => describe(&context, &reconciler, topics).await,
                Request::ClusterStatus => Ok(Response::Status(status(&context, &reconciler).await)),
                Request::DescribeLed { topics } => {
                    Ok(Response::Led(reconciler.views(topics.as_deref())))
                }
                Request::BrokerFigures { everywhere } => {
                    Ok(Response::Figures(figures(&context, everywhere).await))
                }
                Request::ConfirmController => {
                    let age_ms = confirm(&context).await;
                    Ok(Response::Confirmed { age_ms })
                }
                Request::AdoptCluster { cluster } => founding::adopt_cluster(
                    &context.store,
                    &context.net,
                    &context.controller_group,
                    cluster,
                ),
                Request::MoveLeader { partition, to } => {
                    let moved = move_leader(&context, &reconciler, partition, to).await;
                    moved.map(|()| Response::Moved)
                }
                Request::CreateTopic { ref name, .. } => {
                    let name = name.clone();
                    let created = to_controller(&context, request, forward, timeout).await?;
                    if from.is_none() {
                        await_leaders(&context, &name, timeout).await;
                    }
                    Ok(created)
                }
                other => to_controller(&context, other, forward, timeout).await,
            }
        })
    }
}

fn ready(answer: Result<Response, Error>) -> BoxFuture<'static, Result<Response, Error>> {
    Box::pin(std::future::ready(answer))
}

/// Whether `from` may ask this. What a broker reports of itself can lock its data directory out for good, and a leader's
/// epoch hide every later one: brokers speak for themselves, over their own connections, and clients not at all.
fn check_sender(request: &Request, from: Option<BrokerId>) -> Result<(), Error> {
    let may = match request {
        Request::ReportPartitions { broker, .. } => from == Some(*broker),
        Request::ReportDamage { replica, .. } => from == Some(replica.broker()),
        Request::MoveLeader { .. } | Request::DescribeLed { .. } | Request::ConfirmController => {
            from.is_some()
        }
        // Also `RegisterBroker` and `AdoptCluster`: a broker that is not admitted yet comes as a client.
        _ => true,
    };
    if may {
        return Ok(());
    }
    Err(Error::Refused {
        reason: "only a broker of the cluster may ask this, for itself".to_owned(),
    })
}

/// What makes a cluster out of brokers that have none yet.
fn is_before_joining(request: &Request) -> bool {
    matches!(
        request,
        Request::RegisterBroker { .. } | Request::AdoptCluster { .. }
    )
}

fn partition_of(request: &Request) -> Option<&TopicPartition> {
    match request {
        Request::Produce { partition, .. }
        | Request::Fetch { partition, .. }
        | Request::FindOffset { partition, .. }
        | Request::Trim { partition, .. } => Some(partition),
        _ => None,
    }
}

fn ask_local(
    partition: &Partition,
    request: Request,
    timeout: Duration,
    fetch_bytes_max: u32,
) -> BoxFuture<'static, Result<Response, Error>> {
    let deadline = Instant::now() + timeout;
    match request {
        Request::Produce { acks, records, .. } => {
            let appended = partition.produce(records, acks, deadline);
            Box::pin(async move { appended.await.map(Response::Produced) })
        }
        Request::Fetch {
            offset,
            max_bytes,
            min_bytes,
            max_wait_ms,
            ..
        } => {
            let partition = partition.clone();
            let wait = Duration::from_millis(max_wait_ms.into()).min(timeout);
            let max_bytes = max_bytes.min(fetch_bytes_max);
            Box::pin(async move { partition.fetch(offset, max_bytes, min_bytes, wait).await })
        }
        Request::FindOffset { spec, .. } => {
            let partition = partition.clone();
            Box::pin(async move { partition.find_offset(spec, deadline).await })
        }
        Request::Trim { offset, .. } => {
            let partition = partition.clone();
            Box::pin(async move {
                partition
                    .trim(offset, deadline)
                    .await
                    .map(Response::Trimmed)
            })
        }
        _ => ready(Err(Error::InvalidRequest {
            reason: "not a partition's request".to_owned(),
        })),
    }
}

/// The answer of the leader that a request was passed on to. Whoever asks has reached this broker: to him that the leader cannot be
/// reached means that there is none now.
fn reached(answer: Result<Response, Error>, partition: TopicPartition) -> Result<Response, Error> {
    match answer {
        Err(Error::Unreachable { .. }) => Err(Error::LeaderUnavailable { partition }),
        answer => answer,
    }
}

async fn to_controller(
    context: &BrokerContext,
    request: Request,
    forward: bool,
    timeout: Duration,
) -> Result<Response, Error> {
    if forward {
        context.ask_controller(request, timeout).await
    } else if context.controller.leader_broker() == Some(context.id) {
        answer_as_controller(context, request).await
    } else {
        Err(Error::ControllerUnavailable)
    }
}

/// Answers what only the controller's leader can answer; fails when leadership has just gone.
pub(super) async fn answer_as_controller(
    context: &BrokerContext,
    request: Request,
) -> Result<Response, Error> {
    let controller = &context.controller;
    match request {
        Request::CreateTopic {
            name,
            partitions,
            replication_factor,
            config,
            assignment,
        } => {
            let most = context.config.partitions_max;
            if partitions == 0 || partitions > most {
                return Err(Error::InvalidPartitions {
                    requested: partitions,
                    max: most,
                });
            }
            let warnings = controller
                .create_topic(name, partitions, replication_factor, config, assignment)
                .await?;
            Ok(Response::Created { warnings })
        }
        Request::DeleteTopic { name } => controller
            .submit(Command::DeleteTopic { name })
            .await
            .map(|_| Response::Deleted),
        Request::Reassign {
            partition,
            replicas,
        } => {
            let warnings = controller.reassign(partition, replicas).await?;
            Ok(Response::Reassigning { warnings })
        }
        Request::Drain { broker } => {
            let plan = controller.drain(broker).await?;
            Ok(Response::Draining(DrainView {
                begun: plan.moves.into_iter().map(|(name, _)| name).collect(),
                remaining: plan.remaining,
                stuck: plan.stuck,
            }))
        }
        Request::InitProducer => match controller.submit(Command::AllocateProducerId).await? {
            Answer::ProducerId(id) => Ok(Response::Producer { id, epoch: 0 }),
            _ => Err(Error::Failed {
                reason: "not a producer id".to_owned(),
            }),
        },
        Request::RegisterBroker {
            endpoint,
            incarnation,
            rack,
            boot,
            position,
            cluster,
        } => {
            // First of all: to admit another directory retires the one that the broker had.
            refuse_foreigner(context, &endpoint, cluster)?;
            refuse_twin(context, &endpoint, incarnation, boot)?;
            let controller_replica = controller_replica(endpoint.broker, incarnation);
            let command = Command::RegisterBroker {
                endpoint,
                rack,
                incarnation,
                boot,
                position,
                controller_replica,
            };
            controller.submit(command).await?;
            let cluster = controller.metadata().borrow().cluster();
            let cluster = cluster.ok_or(Error::ControllerUnavailable)?;
            Ok(Response::Registered {
                cluster,
                controller: context.id,
            })
        }
        Request::ReportPartitions {
            broker,
            reports,
            position,
        } => {
            let command = Command::ReportPartitions {
                broker,
                reports,
                position,
            };
            controller.submit(command).await.map(|_| Response::Reported)
        }
        Request::ReportDamage {
            partition,
            replica,
            epoch,
        } => {
            let replaced = controller.replace_damaged(partition, replica, epoch);
            replaced.await.map(|()| Response::Reported)
        }
        Request::ElectLeaders => controller.elect_leaders().await.map(Response::Elected),
        _ => Err(Error::InvalidRequest {
            reason: "not a request for the controller".to_owned(),
        }),
    }
}

/// A directory of another cluster is not let in.
fn refuse_foreigner(
    context: &BrokerContext,
    endpoint: &Endpoint,
    cluster: Option<ClusterId>,
) -> Result<(), Error> {
    let ours = context.store.identity().cluster;
    match (cluster, ours) {
        (Some(theirs), Some(ours)) if theirs != ours => Err(Error::Refused {
            reason: format!(
                "the data directory of broker {} belongs to cluster {theirs}, not to cluster {ours}; start it with its own directory, \
                 or name the brokers of its own cluster in bootstrap",
                endpoint.broker
            ),
        }),
        _ => Ok(()),
    }
}

/// A second process with the identity of one that is alive must not take its place.
fn refuse_twin(
    context: &BrokerContext,
    endpoint: &Endpoint,
    incarnation: Incarnation,
    boot: u64,
) -> Result<(), Error> {
    let image = context.controller.metadata().borrow().clone();
    let Some(known) = image.broker(endpoint.broker) else {
        return Ok(());
    };
    let registered = (known.incarnation, known.boot);
    let heard = if endpoint.broker == context.id {
        let mine = context.store.identity();
        Some((mine.incarnation, mine.boot))
    } else {
        let identity = context.net.peer_identity(endpoint.broker);
        identity.map(|identity| (identity.incarnation, identity.boot))
    };
    let alive = heard == Some(registered);
    let itself = registered == (incarnation, boot);
    if alive && !itself {
        let address = known.endpoint.address.clone();
        return Err(Error::BrokerRunning {
            broker: endpoint.broker,
            address,
        });
    }
    Ok(())
}

/// Reports what this broker's leaders saw, and how long its journal is.
pub(super) async fn report(
    context: &BrokerContext,
    reports: Vec<PartitionReport>,
    position: u64,
) -> Result<(), Error> {
    let request = Request::ReportPartitions {
        broker: context.id,
        reports,
        position,
    };
    context
        .ask_controller(request, PEER_TIMEOUT)
        .await
        .map(|_| ())
}

/// How the controller moves a leadership: asks the broker that leads, wherever it is.
pub(super) fn leader_mover(context: &BrokerContext, reconciler: &Reconciler) -> LeaderMover {
    let (context, reconciler) = (context.clone(), reconciler.clone());
    Arc::new(move |partition, leader, to| {
        let (context, reconciler) = (context.clone(), reconciler.clone());
        Box::pin(async move {
            if leader == context.id {
                return move_leader(&context, &reconciler, partition, to).await;
            }
            let request = Request::MoveLeader { partition, to };
            context
                .ask_peer(leader, request, PEER_TIMEOUT)
                .await
                .map(|_| ())
        })
    })
}

async fn move_leader(
    context: &BrokerContext,
    reconciler: &Reconciler,
    partition: TopicPartition,
    to: ReplicaId,
) -> Result<(), Error> {
    let not_leader = Error::NotLeader {
        partition: partition.clone(),
        broker: context.id,
        leader: None,
    };
    let Some(replica) = reconciler.partition(&partition) else {
        return Err(not_leader);
    };
    match replica.group().transfer_leader(to).await {
        Ok(()) => Ok(()),
        Err(RaftError::NotLeader { .. }) => Err(not_leader),
        Err(error) => Err(error.into()),
    }
}

/// Whether `topic` exists, asked of the controller, since this broker's image does not show it; when it does, the image shows
/// it too in the end. An error when nobody can know now: a broker that has just started has an old image, or none.
async fn await_topic(context: &BrokerContext, topic: &TopicName) -> Result<bool, Error> {
    let mut metadata = context.controller.metadata();
    let known = match context.controller.leader_broker() {
        None => return Err(Error::ControllerUnavailable),
        Some(leader) if leader == context.id => {
            context.controller.linearize(METADATA_WAIT).await?;
            return Ok(metadata.borrow().has_topic(topic));
        }
        Some(leader) => {
            let request = Request::Metadata {
                topics: Some(vec![topic.clone()]),
            };
            match context.ask_peer(leader, request, METADATA_WAIT).await {
                Ok(Response::Metadata { topics, .. }) => !topics.is_empty(),
                _ => return Err(Error::ControllerUnavailable),
            }
        }
    };
    if !known {
        return Ok(false);
    }
    let shown = metadata.wait_for(|image| image.has_topic(topic));
    match tokio::time::timeout(METADATA_WAIT, shown).await {
        Ok(Ok(_)) => Ok(true),
        _ => Err(Error::ControllerUnavailable),
    }
}

async fn await_leader(context: &BrokerContext, name: &TopicPartition) -> Option<BrokerId> {
    let mut metadata = context.controller.metadata();
    let led = metadata.wait_for(|image| image.leader_of(name).is_some());
    let image = tokio::time::timeout(METADATA_WAIT, led).await.ok()?.ok()?;
    image.leader_of(name)
}

/// Waits until every partition of a new topic has a leader, so that the next request finds one.
async fn await_leaders(context: &BrokerContext, topic: &TopicName, timeout: Duration) {
    let mut metadata = context.controller.metadata();
    let all_led = metadata.wait_for(|image| image.all_led(topic));
    if tokio::time::timeout(timeout / 2, all_led).await.is_err() {
        tracing::warn!(%topic, "created, but not every partition has a leader yet");
    }
}

async fn metadata(
    context: &BrokerContext,
    topics: Option<Vec<TopicName>>,
) -> Result<Response, Error> {
    if let Some(names) = &topics {
        for name in names {
            let known = context.controller.metadata().borrow().has_topic(name);
            if !known {
                await_topic(context, name).await?;
            }
        }
    }
    let stale = match &topics {
        None => staleness(context).await,
        Some(_) => None,
    };
    let image = context.controller.metadata().borrow().clone();
    Ok(Response::Metadata {
        cluster: image.cluster(),
        controller: context.controller.leader_broker(),
        brokers: image.endpoints().collect(),
        topics: image.routes(topics.as_deref()),
        stale,
    })
}

/// What the reconciler needs of the broker around it.
pub(super) fn reconciler_ports(context: &BrokerContext) -> ReconcilerPorts {
    let (room_context, report_context) = (context.clone(), context.clone());
    let damage_context = context.clone();
    let images = context.controller.metadata();
    ReconcilerPorts {
        broker: context.id,
        groups: context.groups.clone(),
        tasks: context.tasks.clone(),
        metadata: context.controller.metadata(),
        limits: crate::partition::PartitionLimits {
            inflight_bytes_max: context.config.partition_inflight_bytes_max,
            lag_time_max: Duration::from_millis(context.config.replica_lag_time_max_ms),
            ..crate::partition::PartitionLimits::default()
        },
        endpoints: Arc::new(move |broker| images.borrow().endpoint(broker)),
        room: Arc::new(move || {
            let room = room_context.store.room();
            // The store has failed: this broker is about to stop, another one takes over.
            let (free, reserve) = room.map_err(|_failed| Error::ShuttingDown)?;
            let bytes = room_context.store.backlog();
            if free < reserve {
                Err(Error::StorageFull { free, reserve })
            } else if bytes > BACKLOG_BYTES_MAX {
                Err(Error::Overloaded { bytes })
            } else {
                Ok(())
            }
        }),
        report: Arc::new(move |reports| {
            let context = report_context.clone();
            Box::pin(async move {
                let position = context.store.position();
                report(&context, reports, position).await
            })
        }),
        report_damage: Arc::new(move |partition, replica, epoch| {
            let context = damage_context.clone();
            Box::pin(async move {
                let request = Request::ReportDamage {
                    partition,
                    replica,
                    epoch,
                };
                let answer = context.ask_controller(request, PEER_TIMEOUT).await;
                answer.map(|_| ())
            })
        }),
    }
}

#[cfg(test)]
mod tests;
