//! Failover from news: when a broker's process is known to be gone, the survivors of the groups it led elect at once.
//!
//! Owns the order of steps and their bounds; openraft decides who may lead. Works for many groups in one message per peer.
//! Acts on hard evidence only: lifting the lease of a leader that lives would cost its group a second.
//!
//! The steps, per batch of groups: work off what the dead leader had sent; ask the survivors where they stand, which makes
//! those that know the same lift the lease; lift the own lease; whoever holds the longest log stands, with pre-vote; look
//! again after a moment.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::group::Group;
use super::wire::{Request, Response, Survivor};
use super::{Groups, Role};
use crate::net::{Channel, Lane, PeerState, Reply};
use crate::types::{BrokerId, EntryId, GroupId, ReplicaId};

/// Times that a group is looked at again before it is left to its election timeout.
const ROUNDS: u32 = 20;

/// What one replica of a group can offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Candidate {
    replica: ReplicaId,
    last: Option<EntryId>,
    lifted: bool,
}

/// Who should stand: the data replica with the longest log, the lowest id among equals, once a majority of the voters can be
/// expected to grant it. Pure.
fn successor(voters: &BTreeSet<ReplicaId>, candidates: &[Candidate]) -> Option<ReplicaId> {
    let willing = candidates
        .iter()
        .filter(|c| c.lifted && voters.contains(&c.replica));
    if willing.clone().count() * 2 <= voters.len() {
        return None;
    }
    let data = willing.filter(|c| !c.replica.is_witness());
    let best = data.max_by(|a, b| a.last.cmp(&b.last).then(b.replica.cmp(&a.replica)))?;
    Some(best.replica)
}

/// Fails over every group here that `gone` led.
pub(crate) async fn run(groups: Groups, gone: BrokerId) {
    let config = groups.config();
    let mut waiting: VecDeque<(Group, u32)> = groups
        .all()
        .into_iter()
        .filter(|g| led_by(g, gone))
        .map(|g| (g, 0))
        .collect();
    if waiting.is_empty() {
        return;
    }
    tracing::info!(broker = %gone, groups = waiting.len(), "the broker is gone; electing new leaders");
    // Its connections may end a moment after the news.
    groups
        .inbound()
        .drained(gone, config.failover_recheck)
        .await;
    while !waiting.is_empty() && groups.peer_state(gone) == PeerState::Gone {
        let size = config.failover_concurrency.max(1).min(waiting.len());
        let batch: Vec<(Group, u32)> = waiting.drain(..size).collect();
        attempt(&groups, gone, &batch).await;
        let recheck = tokio::time::sleep(config.failover_recheck);
        tokio::pin!(recheck);
        for (group, round) in batch {
            let settled = group.status_when(|status| {
                status.role != Role::Follower
                    || status.leader.is_some_and(|leader| leader.broker() != gone)
            });
            let in_time = tokio::select! {
                biased;
                _ = settled => true,
                () = &mut recheck => false,
            };
            if !in_time && led_by(&group, gone) && round < ROUNDS {
                waiting.push_back((group, round + 1));
            }
        }
    }
}

/// Whether the last leader heard of is on `gone`, or none is known any more.
fn led_by(group: &Group, gone: BrokerId) -> bool {
    let status = group.replica().status.borrow();
    let concerns = status.voters.iter().any(|id| id.broker() == gone);
    status.role == Role::Follower
        && concerns
        && status.voters.contains(&group.me())
        && status.leader.is_none_or(|leader| leader.broker() == gone)
}

/// One attempt at a batch of groups.
async fn attempt(groups: &Groups, gone: BrokerId, batch: &[(Group, u32)]) {
    let mut candidates: BTreeMap<GroupId, Vec<Candidate>> = BTreeMap::new();
    let mut questions: BTreeMap<BrokerId, Vec<GroupId>> = BTreeMap::new();
    for (group, _) in batch {
        let voters = group.replica().status.borrow().voters.clone();
        for other in voters {
            if other != group.me() && other.broker() != gone {
                questions
                    .entry(other.broker())
                    .or_default()
                    .push(group.id());
            }
        }
    }
    let patience = groups.config().failover_recheck;
    let own = futures_util::future::join_all(batch.iter().map(|(group, _)| lift(group, patience)));
    let asked = futures_util::future::join_all(
        questions
            .into_iter()
            .map(|(broker, asked)| ask(groups, broker, gone, asked)),
    );
    let (own, answers) = futures_util::join!(own, asked);
    for survivor in own.into_iter().chain(answers.into_iter().flatten()) {
        // A survivor that knows of a leader needs none; that news reaches this replica as well.
        let lifted = survivor.lifted && survivor.leader.is_none();
        candidates
            .entry(survivor.group)
            .or_default()
            .push(Candidate {
                replica: survivor.replica,
                last: survivor.last,
                lifted,
            });
    }
    for (group, _) in batch {
        let voters = group.replica().status.borrow().voters.clone();
        let offered = candidates.remove(&group.id()).unwrap_or_default();
        if successor(&voters, &offered) == Some(group.me()) && led_by(group, gone) {
            // A group that has stopped cannot stand; it is looked at again like the others.
            tokio::time::timeout(patience, group.elect()).await.ok();
        }
    }
}

/// Lifts the lease of `group`'s leader here, and says where this replica stands. A replica that takes longer than `patience`
/// does not hold up the others.
async fn lift(group: &Group, patience: Duration) -> Survivor {
    let lifted = tokio::time::timeout(patience, group.lift_lease()).await;
    Survivor {
        lifted: matches!(lifted, Ok(Ok(()))),
        ..stand(group)
    }
}

/// Where this replica of `group` stands.
fn stand(group: &Group) -> Survivor {
    let status = group.replica().status.borrow().clone();
    Survivor {
        group: group.id(),
        replica: group.me(),
        last: group.store().state().last,
        epoch: status.epoch,
        leader: None,
        lifted: false,
    }
}

/// Asks one broker about its replicas of `asked`. Empty when it does not answer.
async fn ask(
    groups: &Groups,
    broker: BrokerId,
    gone: BrokerId,
    asked: Vec<GroupId>,
) -> Vec<Survivor> {
    let message = Request::Survivors {
        gone,
        groups: asked,
    }
    .message();
    let patience = groups
        .config()
        .rpc_timeout
        .min(groups.config().failover_recheck * 2);
    let Ok(pending) = groups
        .net()
        .call(broker, Lane::Control, Channel::Raft, message, patience)
    else {
        return Vec::new();
    };
    let Ok(message) = pending.await else {
        return Vec::new();
    };
    match Response::decode(&message) {
        Ok(Response::Survivors(survivors)) => {
            // Nobody speaks for another broker's replicas.
            survivors
                .into_iter()
                .filter(|s| s.replica.broker() == broker)
                .collect()
        }
        _ => Vec::new(),
    }
}

/// Answers another survivor: where the replicas here stand, with the lease lifted if `gone` is known here to be gone.
pub(crate) async fn answer(groups: Groups, gone: BrokerId, asked: Vec<GroupId>, reply: Reply) {
    let patience = groups.config().failover_recheck;
    let is_gone = known_gone(&groups, gone, patience).await;
    if is_gone {
        groups.inbound().drained(gone, patience).await;
    }
    let here = asked.into_iter().filter_map(|id| groups.get(id));
    let survivors = futures_util::future::join_all(here.map(|group| async move {
        let leader = group.replica().status.borrow().leader;
        match leader.filter(|leader| leader.broker() != gone) {
            None if is_gone => lift(&group, patience).await,
            leader => Survivor {
                leader,
                ..stand(&group)
            },
        }
    }));
    let survivors = survivors.await;
    reply.send(Response::Survivors(survivors).message());
}

/// Whether `broker` is known here to be gone, or comes to be within `patience`: the same news takes a moment to reach all.
async fn known_gone(groups: &Groups, broker: BrokerId, patience: Duration) -> bool {
    let mut events = groups.net().events();
    if groups.peer_state(broker) == PeerState::Gone {
        return true;
    }
    let news = async {
        loop {
            // Missed news is in the state as well.
            let closed = matches!(
                events.recv().await,
                Err(tokio::sync::broadcast::error::RecvError::Closed)
            );
            if closed || groups.peer_state(broker) == PeerState::Gone {
                return;
            }
        }
    };
    tokio::time::timeout(patience, news).await.ok();
    groups.peer_state(broker) == PeerState::Gone
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LeaderEpoch, LogIndex, ReplicaKind};

    fn data(broker: u32) -> ReplicaId {
        ReplicaId::new(BrokerId(broker), ReplicaKind::Data, 1)
    }

    fn witness(broker: u32) -> ReplicaId {
        ReplicaId::new(BrokerId(broker), ReplicaKind::Witness, 1)
    }

    fn at(replica: ReplicaId, epoch: u64, index: u64, lifted: bool) -> Candidate {
        let id = EntryId {
            epoch: LeaderEpoch(epoch),
            index: LogIndex(index),
        };
        Candidate {
            replica,
            last: Some(id),
            lifted,
        }
    }

    /// Goal: the survivor that can win stands, and only one. Method: a table of logs and evidence.
    #[test]
    fn the_longest_log_of_a_data_replica_stands_when_a_majority_agrees() {
        let three = BTreeSet::from([data(1), data(2), data(3)]);
        let with_witness = BTreeSet::from([data(1), data(2), witness(3)]);
        let cases = [
            (
                &three,
                vec![at(data(2), 1, 5, true), at(data(3), 1, 6, true)],
                Some(data(3)),
            ),
            (
                &three,
                vec![at(data(2), 2, 4, true), at(data(3), 1, 6, true)],
                Some(data(2)),
            ),
            (
                &three,
                vec![at(data(2), 1, 6, true), at(data(3), 1, 6, true)],
                Some(data(2)),
            ),
            (
                &three,
                vec![at(data(2), 1, 6, true), at(data(3), 1, 6, false)],
                None,
            ),
            (&three, vec![at(data(2), 1, 6, true)], None),
            (
                &three,
                vec![at(data(2), 1, 6, true), at(data(4), 1, 9, true)],
                None,
            ),
            (
                &with_witness,
                vec![at(data(2), 1, 6, true), at(witness(3), 1, 7, true)],
                Some(data(2)),
            ),
            (&with_witness, vec![], None),
        ];
        for (voters, candidates, expected) in cases {
            assert_eq!(successor(voters, &candidates), expected, "{candidates:?}");
        }
    }
}
