//! Raft groups over the store and the network: opaque commands, no topic and no record.
//!
//! Owns the groups running on this broker: starts and stops them, finds them, hands them their messages, and brings news of
//! peers to them. The only module that names openraft's types, and they do not leave it.

mod context;
mod failover;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod group;
mod groups;
mod heartbeat;
mod inbound;
mod log_store;
mod machine;
mod network;
mod observe;
mod progress;
mod replica;
#[cfg(feature = "sim")]
mod sim_runtime;
mod type_config;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

pub use group::{Group, Proposal};
pub use groups::Groups;

use crate::storage::StorageError;
use crate::types::{EntryId, Error, LeaderEpoch, LogIndex, ReplicaId};

/// A group's state machine: a function of the committed commands alone.
pub trait StateMachine: Send + 'static {
    /// Applies one committed command, in order, and returns the answer for its proposer. Must not fail or block.
    fn apply(&mut self, id: EntryId, command: &Bytes) -> Bytes;
    /// Whether enough has been applied since the last checkpoint to make one now.
    fn wants_checkpoint(&self) -> bool;
    /// The state after the last applied command, and the index blocks completed since the last call.
    fn checkpoint(&mut self) -> (Bytes, Vec<(u64, Bytes)>);
    /// Replaces the state by a checkpoint's, at start and when a snapshot is installed. `None` is the empty state.
    fn restore(&mut self, state: Option<&Bytes>) -> Result<(), crate::types::DecodeError>;
}

/// Timing and limits of all groups of a broker.
#[derive(Debug, Clone)]
pub struct RaftConfig {
    /// Between two heartbeats of a leader.
    pub heartbeat_interval: Duration,
    /// Shortest election timeout.
    pub election_timeout_min: Duration,
    /// Longest election timeout, equal on all brokers.
    pub election_timeout_max: Duration,
    /// Most bytes of entries in one append message.
    pub append_bytes_max: usize,
    /// Append messages in flight to one follower of one group.
    pub append_inflight_max: usize,
    /// Longest wait for an answer to an append, a vote, a transfer.
    pub rpc_timeout: Duration,
    /// How long heartbeats to one peer are collected into one message.
    pub heartbeat_linger: Duration,
    /// Groups that fail over at the same time.
    pub failover_concurrency: usize,
    /// How long a failover waits for a leader before it looks again.
    pub failover_recheck: Duration,
}

impl Default for RaftConfig {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(150),
            election_timeout_min: Duration::from_millis(700),
            election_timeout_max: Duration::from_secs(1),
            append_bytes_max: 2 << 20,
            append_inflight_max: 16,
            rpc_timeout: Duration::from_secs(2),
            heartbeat_linger: Duration::from_millis(2),
            failover_concurrency: 64,
            failover_recheck: Duration::from_millis(100),
        }
    }
}

/// What a replica is in its group now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// Follows, or waits for a leader.
    #[default]
    Follower,
    /// Leads. The group's own entry of its epoch may not be applied yet, see [`GroupStatus::is_serving`].
    Leader,
    /// Stopped by an error of its store or by itself.
    Stopped,
}

/// A group as its local replica sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupStatus {
    /// This replica's role.
    pub role: Role,
    /// The current epoch.
    pub epoch: LeaderEpoch,
    /// Who leads in that epoch, when known.
    pub leader: Option<ReplicaId>,
    /// The last entry of the local log.
    pub last: Option<EntryId>,
    /// The last entry known committed.
    pub committed: Option<EntryId>,
    /// The last entry applied.
    pub applied: Option<EntryId>,
    /// The last entry purged.
    pub purged: Option<EntryId>,
    /// Voters of the newest membership in the log (both sides of a joint one).
    pub voters: BTreeSet<ReplicaId>,
    /// Learners of that membership.
    pub learners: BTreeSet<ReplicaId>,
    /// Whether that membership is joint, that is, a change is under way.
    pub is_joint: bool,
}

impl GroupStatus {
    /// Whether this replica leads and has applied an entry of its own epoch, so that its state includes everything acknowledged before.
    pub fn is_serving(&self) -> bool {
        self.role == Role::Leader && self.applied.is_some_and(|id| id.epoch == self.epoch)
    }
}

/// How far one other replica has come, kept by the leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FollowerProgress {
    /// The last entry it is known to have durably, in this epoch.
    pub matched: Option<LogIndex>,
    /// When it last had everything the leader had at that moment.
    pub caught_up_at: Option<Instant>,
    /// Whether a connection to its broker is up.
    pub connected: bool,
    /// Whether it was found not to have entries that it had acknowledged in this epoch, as after a restored copy of its
    /// disk. It is not fed any more; it must be replaced.
    pub lost_data: bool,
}

/// How far the replicas have come, kept by the leader of `epoch`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Progress {
    /// The leader's epoch; what is known about followers is forgotten with it.
    pub epoch: LeaderEpoch,
    /// The last entry durable on this replica's own disk.
    pub flushed: Option<LogIndex>,
    /// The other replicas, learners included.
    pub followers: BTreeMap<ReplicaId, FollowerProgress>,
}

impl Progress {
    /// When a majority of `voters`, of which the leader is one, last was level with it; `None` when it was not in this epoch, or
    /// when the leader is alone.
    pub(crate) fn level_at(&self, voters: &BTreeSet<ReplicaId>) -> Option<Instant> {
        let voting = self.followers.iter().filter(|(id, _)| voters.contains(*id));
        let mut level: Vec<Instant> = voting.filter_map(|(_, one)| one.caught_up_at).collect();
        level.sort_unstable_by(|one, other| other.cmp(one));
        let others_needed = voters.len() / 2;
        level.get(others_needed.checked_sub(1)?).copied()
    }
}

/// Why a proposal or a question was not answered with success.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum RaftError {
    #[error("not the leader")]
    NotLeader { leader: Option<ReplicaId> }, // definite
    #[error("no quorum answers")]
    NoQuorum, // definite: nothing was proposed
    #[error("leadership lost after the proposal")]
    Lost, // unknown
    #[error("timed out after {after:?}")]
    Timeout { after: Duration }, // unknown for a proposal
    #[error("the group has stopped: {reason}")]
    Stopped { reason: String }, // unknown for a proposal
    #[error("no such group here")]
    NoSuchGroup, // definite
    #[error("membership change refused: {reason}")]
    Membership { reason: String }, // definite
    #[error(transparent)]
    Storage(#[from] StorageErrorText),
}

/// A storage error as text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StorageErrorText(pub String);

impl From<RaftError> for Error {
    fn from(error: RaftError) -> Self {
        Self::Failed {
            reason: error.to_string(),
        }
    }
}

impl From<StorageError> for RaftError {
    fn from(error: StorageError) -> Self {
        Self::Storage(StorageErrorText(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{BrokerId, ReplicaKind};

    /// Voters, when each follower was level, and what is known by it.
    type Case<'a> = (u32, &'a [(u32, Option<u64>)], Option<u64>);

    /// Goal: the leader is known to have been followed when a majority was last level with it, and not when one eager follower was, or
    /// one that does not vote. Method: a table of voters and of when each follower was level, in seconds.
    #[test]
    fn a_majority_is_level_when_enough_voters_are() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let replica = |broker| ReplicaId::new(BrokerId(broker), ReplicaKind::Data, 1);
        let cases: [Case<'_>; 6] = [
            (1, &[], None),
            (2, &[(2, Some(4))], Some(4)),
            (3, &[(2, Some(4)), (3, Some(9))], Some(9)),
            (3, &[(2, None), (3, None), (4, Some(9))], None),
            (5, &[(2, Some(9)), (3, Some(1)), (4, Some(4))], Some(4)),
            (5, &[(2, Some(9))], None),
        ];
        for (voters, level, expected) in cases {
            let followers = level.iter().map(|(broker, level)| {
                let follower = FollowerProgress {
                    matched: None,
                    caught_up_at: level.map(at),
                    connected: true,
                    lost_data: false,
                };
                (replica(*broker), follower)
            });
            let progress = Progress {
                followers: followers.collect(),
                ..Progress::default()
            };
            let voters: BTreeSet<ReplicaId> = (1..=voters).map(replica).collect();
            assert_eq!(progress.level_at(&voters), expected.map(at), "{level:?}");
        }
    }
}
