//! Who is in sync, how far readers may see, and what may be acknowledged: decided purely, from what the leader observes.
//!
//! Owns nothing that lasts beyond the leader's epoch, does no I/O and asks no clock: the watcher hands in the time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::raft::{FollowerProgress, Progress};
use crate::types::{Assignment, BrokerId, LeaderEpoch, LogIndex, ReplicaId};

/// What a leader knows at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    /// The leader.
    pub(super) me: ReplicaId,
    /// Its epoch.
    pub(super) epoch: LeaderEpoch,
    /// The partition's replicas.
    pub(super) assignment: &'a Assignment,
    /// Data replicas that are being moved away: not assigned any more, and counted like the others as long as they vote.
    pub(super) leaving: &'a BTreeSet<ReplicaId>,
    /// The group's voters, of both sides while they change.
    pub(super) voters: &'a BTreeSet<ReplicaId>,
    /// Whether a change of the voters is under way.
    pub(super) is_joint: bool,
    /// The last entry of the leader's log.
    pub(super) last: Option<LogIndex>,
    /// How far the replicas have come.
    pub(super) progress: &'a Progress,
}

impl View<'_> {
    /// The data replicas: those of the assignment, those that vote although they are about to leave, and the leader, whether
    /// it is one or the other.
    fn data_replicas(&self) -> impl Iterator<Item = ReplicaId> + '_ {
        let me = Some(self.me).filter(|me| !self.assignment.replicas.contains(me));
        let leaving = self.leaving.intersection(self.voters).copied();
        let leaving = leaving.filter(|replica| *replica != self.me && !replica.is_witness());
        me.into_iter()
            .chain(self.assignment.replicas.iter().copied())
            .chain(leaving)
    }

    fn followers(&self) -> impl Iterator<Item = ReplicaId> + '_ {
        self.data_replicas().filter(|replica| *replica != self.me)
    }

    /// The last entry that `replica` is known to have durably.
    fn durable(&self, replica: ReplicaId) -> Option<LogIndex> {
        if replica == self.me {
            return self.progress.flushed;
        }
        self.follower(replica)?.matched
    }

    /// What is known of a follower; nothing of one that has lost what it acknowledged, as after a restored copy of its disk.
    fn follower(&self, replica: ReplicaId) -> Option<&FollowerProgress> {
        self.progress
            .followers
            .get(&replica)
            .filter(|known| !known.lost_data)
    }

    /// The last entry that at least `copies` data replicas have durably. Only voters count: what learns may be dropped again,
    /// and what has been removed is about to be deleted.
    pub(super) fn durable_on_at_least(&self, copies: u32) -> Option<LogIndex> {
        let voting = self
            .data_replicas()
            .filter(|replica| self.voters.contains(replica));
        let mut durable: Vec<_> = voting.filter_map(|replica| self.durable(replica)).collect();
        durable.sort_unstable_by(|a, b| b.cmp(a));
        let nth = usize::try_from(copies.max(1) - 1).unwrap_or(usize::MAX);
        durable.get(nth).copied()
    }

    /// The last entry that may be acknowledged with acks=all, once it is applied: at least `min_in_sync` data replicas have it
    /// durably; beside a witness, which holds no records, the leader must be one of them.
    pub(super) fn acknowledgeable(&self, min_in_sync: u32) -> Option<LogIndex> {
        let durable = self.durable_on_at_least(min_in_sync)?;
        // By who votes: a witness may come or go, or be renewed, beside an assignment that has one or none.
        if self.voters.iter().any(|voter| voter.is_witness()) {
            self.progress.flushed.map(|flushed| flushed.min(durable))
        } else {
            Some(durable)
        }
    }

    /// The brokers of the data replicas that are known to have the entry at `index` durably, in the order of the assignment.
    pub(super) fn durable_brokers(&self, index: LogIndex) -> Vec<BrokerId> {
        let has_it = |replica: &ReplicaId| self.durable(*replica).is_some_and(|last| last >= index);
        self.data_replicas()
            .filter(has_it)
            .map(ReplicaId::broker)
            .collect()
    }

    /// How many voters can be reached, the leader included, and how many a commit takes; `None` while the voters change, when
    /// two majorities count and the change itself tells which.
    pub(super) fn reach(&self) -> Option<Reach> {
        if self.is_joint || self.voters.is_empty() {
            return None;
        }
        let is_reached = |replica: &&ReplicaId| {
            let known = self.progress.followers.get(*replica);
            **replica == self.me || known.is_some_and(|known| known.connected)
        };
        Some(Reach {
            voters: self.voters.iter().filter(is_reached).count(),
            needed: self.voters.len() / 2 + 1,
        })
    }

    /// Entries that the leader has and `replica` is not known to have durably; `None` when nothing is known of it.
    pub(super) fn lag(&self, replica: ReplicaId) -> Option<u64> {
        let last = self.last.map_or(0, |index| index.0);
        self.durable(replica)
            .map(|durable| last.saturating_sub(durable.0))
    }
}

/// Voters that can be reached, the leader included, beside the number that a commit takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reach {
    pub(super) voters: usize,
    pub(super) needed: usize,
}

/// What the leader has seen of one follower in its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Follower {
    /// Since when its connection has been up.
    connected_since: Option<Instant>,
    /// Whether it had the leader's whole log when last looked at.
    is_level: bool,
    /// When it last had the leader's whole log: now, when it still has; or when the entry it lacks was first seen.
    level_until: Option<Instant>,
    /// Whether its connection has been down in this epoch.
    was_lost: bool,
}

/// The in-sync replicas as the leader of an epoch sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InSync {
    epoch: LeaderEpoch,
    began: Instant,
    followers: BTreeMap<ReplicaId, Follower>,
    /// The in-sync replicas, the leader included, in the order of the assignment.
    pub(super) replicas: Vec<ReplicaId>,
    /// The followers without which the witness is not fed: those in sync, and at the beginning of an epoch those not heard of
    /// yet, as long as their connection is up.
    pub(super) gate: BTreeSet<ReplicaId>,
    /// When time alone will change this; `None` when it will not.
    pub(super) next_check: Option<Instant>,
}

impl InSync {
    /// What the leader sees `now`, given what it saw before. A follower is in sync while its connection is up and it has been
    /// level with the leader within `lag_max`; after a lost connection it must become level again first.
    pub(super) fn observe(
        previous: Option<&Self>,
        view: &View<'_>,
        lag_max: Duration,
        now: Instant,
    ) -> Self {
        let previous = previous.filter(|previous| previous.epoch == view.epoch);
        let began = previous.map_or(now, |previous| previous.began);
        let mut next = Self {
            epoch: view.epoch,
            began,
            followers: BTreeMap::new(),
            replicas: Vec::new(),
            gate: BTreeSet::new(),
            next_check: None,
        };
        for replica in view.followers() {
            let before = previous
                .and_then(|previous| previous.followers.get(&replica))
                .copied();
            let mut follower = before.unwrap_or_default();
            let progress = view.follower(replica);
            let is_connected = progress.is_some_and(|progress| progress.connected);
            let is_level = progress
                .and_then(|progress| progress.matched)
                .is_some_and(|matched| view.last.is_some_and(|last| matched >= last));
            follower.was_lost |= !is_connected;
            follower.connected_since = if is_connected {
                follower.connected_since.or(Some(now))
            } else {
                None
            };
            if is_level || follower.is_level {
                follower.level_until = Some(now);
            }
            follower.is_level = is_level;
            next.followers.insert(replica, follower);

            let Some(connected_since) = follower.connected_since else {
                continue;
            };
            let caught_up_at = progress.and_then(|progress| progress.caught_up_at);
            let current = caught_up_at.max(follower.level_until);
            let current = current.filter(|at| !follower.was_lost || *at >= connected_since);
            let until = match current {
                Some(at) => at + lag_max,
                None if follower.was_lost => continue,
                None => began + lag_max,
            };
            if !is_level && until <= now {
                continue;
            }
            next.gate.insert(replica);
            if !is_level {
                next.next_check = next
                    .next_check
                    .map_or(Some(until), |known| Some(known.min(until)));
            }
        }
        // In sync is who can take over: not one that learns, nor one whose vote may yet be undone.
        let was_in = |replica: &ReplicaId| {
            previous.is_some_and(|previous| previous.replicas.contains(replica))
        };
        let votes = |replica: &ReplicaId| {
            view.voters.contains(replica) && (!view.is_joint || was_in(replica))
        };
        let heard = |replica: &ReplicaId| {
            let follower = next.followers.get(replica);
            let caught_up = view
                .follower(*replica)
                .is_some_and(|known| known.caught_up_at.is_some());
            next.gate.contains(replica)
                && votes(replica)
                && (caught_up || follower.is_some_and(|known| known.level_until.is_some()))
        };
        next.replicas = view
            .data_replicas()
            .filter(|replica| *replica == view.me || heard(replica))
            .collect();
        next
    }

    /// The epoch in which this was seen.
    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// The brokers in sync, the leader's included, in the order of the assignment.
    pub(super) fn brokers(&self) -> Vec<BrokerId> {
        self.replicas
            .iter()
            .map(|replica| replica.broker())
            .collect()
    }
}

/// The last entry that readers may see: committed, and held durably by enough data replicas (`durable`); never less than
/// before in the epoch.
///
/// `opened` is the last entry applied when the leader began to serve: all of it is committed. It may have been visible under the
/// leader before, who knew more about the followers, so it is visible from the beginning and readers are never sent back.
pub(super) fn high_watermark(
    previous: Option<LogIndex>,
    opened: Option<LogIndex>,
    committed: Option<LogIndex>,
    durable: Option<LogIndex>,
) -> Option<LogIndex> {
    previous.max(opened).max(committed.min(durable))
}

#[cfg(test)]
mod tests;
