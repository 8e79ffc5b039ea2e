//! What the cluster looks like: the live figures of the leaders, laid over the metadata.
//!
//! Owns nothing. The same picture comes from whichever broker is asked.

use std::collections::BTreeMap;

use futures_util::future::{join, join_all};

use super::await_topic;
use super::confirm::staleness;
use crate::api::{
    BrokerFigures, BrokerView, ClusterView, PartitionView, ReplicaView, Request, Response,
    TopicView,
};
use crate::broker::reconciler::Reconciler;
use crate::broker::{BrokerContext, PEER_TIMEOUT};
use crate::controller::ClusterMetadata;
use crate::net::PeerState;
use crate::types::{BrokerId, Error, Offset, TopicName, TopicPartition};

/// Live figures from every leader, laid over the metadata; the same picture from whichever broker is asked.
pub(super) async fn describe(
    context: &BrokerContext,
    reconciler: &Reconciler,
    topics: Option<Vec<TopicName>>,
) -> Result<Response, Error> {
    if let Some(names) = &topics {
        for name in names {
            let known = context.controller.metadata().borrow().has_topic(name);
            if !known && !await_topic(context, name).await? {
                return Err(Error::UnknownTopic {
                    topic: name.clone(),
                });
            }
        }
    }
    let image = context.controller.metadata().borrow().clone();
    let live = live_views(context, reconciler, &image, topics.as_ref());
    let (live, stale) = join(live, staleness(context)).await;
    // A new controller may have been waited for, with news.
    let image = context.controller.metadata().borrow().clone();
    Ok(Response::Described {
        topics: described(&image, topics.as_deref(), &live),
        stale,
    })
}

/// What the leaders say of their partitions, each asked on its own broker; the newest epoch counts.
async fn live_views(
    context: &BrokerContext,
    reconciler: &Reconciler,
    image: &ClusterMetadata,
    topics: Option<&Vec<TopicName>>,
) -> BTreeMap<TopicPartition, PartitionView> {
    let asked = peers_up(context, image).into_iter().map(|peer| {
        context.ask_peer(
            peer,
            Request::DescribeLed {
                topics: topics.cloned(),
            },
            PEER_TIMEOUT,
        )
    });
    let mut live: BTreeMap<TopicPartition, PartitionView> = BTreeMap::new();
    let mut note = |led: Vec<(TopicPartition, PartitionView)>| {
        for (name, view) in led {
            let newer = live.get(&name).is_none_or(|known| known.epoch < view.epoch);
            if newer {
                live.insert(name, view);
            }
        }
    };
    note(reconciler.views(topics.map(Vec::as_slice)));
    for answer in join_all(asked).await {
        if let Ok(Response::Led(led)) = answer {
            note(led);
        }
    }
    live
}

fn peers_up(context: &BrokerContext, image: &ClusterMetadata) -> Vec<BrokerId> {
    let known = image.endpoints().map(|endpoint| endpoint.broker);
    known
        .filter(|broker| context.net.peer_state(*broker) == PeerState::Up)
        .collect()
}

/// What this broker has counted, and, `everywhere`, the others that answer.
pub(super) async fn figures(context: &BrokerContext, everywhere: bool) -> Vec<BrokerFigures> {
    let flushed = context.store.flushes();
    let mut found = vec![BrokerFigures {
        broker: context.id,
        flushes: flushed.flushes,
        flushed_entries: flushed.entries,
        flushed_bytes: flushed.bytes,
    }];
    if everywhere {
        let image = context.controller.metadata().borrow().clone();
        let request = || Request::BrokerFigures { everywhere: false };
        let peers = peers_up(context, &image).into_iter();
        let asked = peers.map(|peer| context.ask_peer(peer, request(), PEER_TIMEOUT));
        for answer in join_all(asked).await {
            if let Ok(Response::Figures(figures)) = answer {
                found.extend(figures);
            }
        }
        found.sort_by_key(|figures| figures.broker);
    }
    found
}

fn described(
    image: &ClusterMetadata,
    topics: Option<&[TopicName]>,
    live: &BTreeMap<TopicPartition, PartitionView>,
) -> Vec<TopicView> {
    let routes = image.routes(topics);
    let view = |topic: &TopicName, route: crate::api::PartitionRoute| {
        let name = TopicPartition {
            topic: topic.clone(),
            partition: route.partition,
        };
        let record = image.partition(&name);
        let mut view = live.get(&name).cloned().unwrap_or_else(|| PartitionView {
            partition: route.partition,
            leader: None,
            epoch: route.epoch,
            replicas: route
                .replicas
                .iter()
                .map(|broker| ReplicaView {
                    broker: *broker,
                    lag: None,
                    in_sync: false,
                })
                .collect(),
            adding: Vec::new(),
            removing: Vec::new(),
            reassigning: false,
            isr: route.isr.clone(),
            witness: image.witness_of(&name),
            start_offset: None::<Offset>,
            high_watermark: None,
            end_offset: None,
        });
        view.adding = record.map_or_else(Vec::new, |record| record.adding_brokers());
        view.removing = record.map_or_else(Vec::new, |record| record.removing_brokers());
        view.reassigning = record.is_some_and(|record| record.reassignment.is_some());
        view
    };
    routes
        .into_iter()
        .map(|route| TopicView {
            replication_factor: image.replication_factor(&route.name),
            partitions: route
                .partitions
                .into_iter()
                .map(|partition| view(&route.name, partition))
                .collect(),
            name: route.name,
            config: route.config,
        })
        .collect()
}

/// The same picture as [`describe`] gives: who leads is what the leaders say, not what was last reported of them.
pub(super) async fn status(context: &BrokerContext, reconciler: &Reconciler) -> ClusterView {
    let image = context.controller.metadata().borrow().clone();
    let live = live_views(context, reconciler, &image, None);
    let (live, stale) = join(live, staleness(context)).await;
    // A new controller may have been waited for, with news.
    let image = context.controller.metadata().borrow().clone();
    let topics = described(&image, None, &live);
    let voters = context.controller_group.status().borrow().voters.clone();
    let mut brokers: Vec<BrokerView> = image.broker_views();
    let partitions = || {
        topics.iter().flat_map(|topic| {
            topic.partitions.iter().map(|view| {
                let name = TopicPartition {
                    topic: topic.name.clone(),
                    partition: view.partition,
                };
                (name, view)
            })
        })
    };
    for broker in &mut brokers {
        if stale.is_some() {
            // Whom the controller heard when it was last heard itself says nothing about now.
            let is_up = context.net.peer_state(broker.broker) == PeerState::Up;
            broker.alive = broker.broker == context.id || is_up;
        }
        broker.controller_voter = voters.iter().any(|voter| voter.broker() == broker.broker);
        let led = partitions().filter(|(_, view)| view.leader == Some(broker.broker));
        broker.leads = u32::try_from(led.count()).unwrap_or(u32::MAX);
    }
    ClusterView {
        cluster: image.cluster(),
        controller: context
            .controller
            .leader_broker()
            .filter(|_| stale.is_none()),
        stale,
        brokers,
        topics: u32::try_from(topics.len()).unwrap_or(u32::MAX),
        partitions: u32::try_from(partitions().count()).unwrap_or(u32::MAX),
        under_replicated: partitions()
            .filter(|(_, view)| {
                // While replicas are moved there are more of them than copies asked for.
                let wanted = view.replicas.iter().map(|replica| replica.broker);
                let wanted = wanted.filter(|broker| !view.removing.contains(broker));
                view.isr.len() < wanted.count()
            })
            .map(|(name, _)| name)
            .collect(),
        leaderless: partitions()
            .filter(|(_, view)| view.leader.is_none())
            .map(|(name, _)| name)
            .collect(),
    }
}
