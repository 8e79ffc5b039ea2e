//! The types that openraft is used with, and how they become the vocabulary of `types` and `storage`.
//!
//! Owns the one [`TypeConfig`] of all groups and the persisted form of votes and memberships. Decides nothing.

use std::collections::BTreeSet;
use std::fmt;
use std::io;

use bytes::Bytes;
use openraft::OptionalSend;
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf, StoredMembershipOf};
use openraft::vote::RaftLeaderId;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::storage::{EntryKind, LogEntry};
use crate::types::{DecodeError, EntryId, LeaderEpoch, LogIndex, ReplicaId, decode, encode};

/// A command of a group's state machine: bytes that mean nothing here.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Command(pub(crate) Bytes);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A state machine's answer to a command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer(pub(crate) Bytes);

/// Carries a proposal's answer to its proposer, who may have gone.
#[derive(Debug)]
pub(crate) struct Responder<T>(pub(crate) oneshot::Sender<T>);

impl<T: OptionalSend + 'static> openraft::raft::responder::Responder<TypeConfig, T>
    for Responder<T>
{
    fn on_complete(self, result: T) {
        // A proposer that no longer waits has given up its answer.
        self.0.send(result).ok();
    }
}

pub(crate) type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;
pub(crate) type CommittedLeaderId = <LeaderId as RaftLeaderId>::Committed;
pub(crate) type LogId = openraft::LogId<CommittedLeaderId>;
pub(crate) type Vote = openraft::Vote<LeaderId>;
pub(crate) type Payload = openraft::EntryPayload<Command, u64, ()>;
pub(crate) type Entry = openraft::Entry<CommittedLeaderId, Payload>;
pub(crate) type Membership = openraft::Membership<u64, ()>;
pub(crate) type StoredMembership = StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = SnapshotMetaOf<TypeConfig>;
pub(crate) type Snapshot = SnapshotOf<TypeConfig, Bytes>;
pub(crate) type AppendRequest = openraft::raft::AppendEntriesRequest<TypeConfig>;
pub(crate) type AppendResult = openraft::raft::StreamAppendResult<TypeConfig>;
pub(crate) type AppendError = openraft::raft::StreamAppendError<TypeConfig>;
pub(crate) type RpcError = openraft::errors::RPCError<TypeConfig>;
pub(crate) type Raft = openraft::Raft<TypeConfig, super::machine::Machine>;

/// One opaque type configuration for every group: the node id is a packed [`ReplicaId`], addresses are
/// the network's business, and there is one leader per term, so that a term is a leader epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TypeConfig;

impl openraft::RaftTypeConfig for TypeConfig {
    type D = Command;
    type R = Answer;
    type NodeId = u64;
    type Node = ();
    type Term = u64;
    type LeaderId = LeaderId;
    type Vote = Vote;
    type Payload = Payload;
    type Entry = Entry;
    type Responder<T>
        = Responder<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: OptionalSend + 'static;
    #[cfg(not(feature = "sim"))]
    type AsyncRuntime = openraft_rt_tokio::TokioRuntime;
    #[cfg(feature = "sim")]
    type AsyncRuntime = super::sim_runtime::SimRuntime;
    type ErrorSource = openraft::AnyError;
}

/// The entry id of an openraft log id.
pub(crate) fn entry_id(id: LogId) -> EntryId {
    EntryId {
        epoch: LeaderEpoch(id.leader_id.term),
        index: LogIndex(id.index),
    }
}

/// The openraft log id of an entry id.
pub(crate) fn log_id(id: EntryId) -> LogId {
    LogId::new_term_index(id.epoch.0, id.index.0)
}

/// A vote as it travels and is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VoteRecord {
    term: u64,
    voted_for: u64,
    committed: bool,
}

impl VoteRecord {
    /// Whether this is the vote of an elected leader whose log can hold `last`.
    pub(crate) fn is_leader_of(&self, last: Option<EntryId>) -> bool {
        self.committed && last.is_none_or(|last| last.epoch.0 <= self.term)
    }
}

impl From<Vote> for VoteRecord {
    fn from(vote: Vote) -> Self {
        let leader = vote.leader_id();
        Self {
            term: leader.term,
            voted_for: leader.voted_for,
            committed: vote.is_committed(),
        }
    }
}

impl From<VoteRecord> for Vote {
    fn from(record: VoteRecord) -> Self {
        if record.committed {
            Vote::new_committed(record.term, record.voted_for)
        } else {
            Vote::new(record.term, record.voted_for)
        }
    }
}

/// A membership as it travels and is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct MembershipRecord {
    /// One set of voters, two while a change is under way.
    voters: Vec<BTreeSet<u64>>,
    /// Voters and learners.
    members: BTreeSet<u64>,
}

impl MembershipRecord {
    fn of(membership: &Membership) -> Self {
        Self {
            voters: membership.get_joint_config().clone(),
            members: membership.nodes().map(|(id, ())| *id).collect(),
        }
    }

    fn membership(self) -> Result<Membership, DecodeError> {
        Membership::new(self.voters, self.members).map_err(|error| DecodeError(error.to_string()))
    }
}

/// The bytes of a membership.
pub(crate) fn encode_membership(membership: &Membership) -> Bytes {
    encode(&MembershipRecord::of(membership)).into()
}

/// The membership in `bytes`.
pub(crate) fn decode_membership(bytes: &[u8]) -> Result<Membership, DecodeError> {
    decode::<MembershipRecord>(bytes)?.membership()
}

/// The bytes of a membership and of the place where it was written.
pub(crate) fn encode_stored_membership(stored: &StoredMembership) -> Bytes {
    let id = stored.log_id().map(entry_id);
    encode(&(id, MembershipRecord::of(stored.membership()))).into()
}

/// The membership in `bytes`, with the place where it was written.
pub(crate) fn decode_stored_membership(bytes: &[u8]) -> Result<StoredMembership, DecodeError> {
    let (id, record) = decode::<(Option<EntryId>, MembershipRecord)>(bytes)?;
    // The membership before the first entry names nobody; openraft has a constructor of its own for it.
    if record.voters.iter().all(BTreeSet::is_empty) && record.members.is_empty() {
        return Ok(StoredMembership::default());
    }
    Ok(StoredMembership::new(id.map(log_id), record.membership()?))
}

/// Who belongs to a group by a membership.
#[derive(Debug)]
pub(crate) struct Members {
    /// Those who vote, on one side or both sides.
    pub(crate) voters: BTreeSet<ReplicaId>,
    pub(crate) learners: BTreeSet<ReplicaId>,
    /// Whether a change is under way.
    pub(crate) is_joint: bool,
}

impl Members {
    pub(crate) fn of(membership: &Membership) -> Self {
        Self {
            voters: membership.voter_ids().map(ReplicaId::from_u64).collect(),
            learners: membership.learner_ids().map(ReplicaId::from_u64).collect(),
            is_joint: membership.get_joint_config().len() > 1,
        }
    }
}

/// An openraft entry as the store keeps it. A witness keeps no command's bytes.
pub(crate) fn to_stored(entry: Entry, is_witness: bool) -> LogEntry {
    let id = entry_id(entry.log_id);
    match entry.payload {
        Payload::Blank => LogEntry {
            id,
            kind: EntryKind::Blank,
            payload: Bytes::new(),
        },
        Payload::Normal(Command(bytes)) => {
            let payload = if is_witness { Bytes::new() } else { bytes };
            LogEntry {
                id,
                kind: EntryKind::Command,
                payload,
            }
        }
        Payload::Membership(membership) => LogEntry {
            id,
            kind: EntryKind::Membership,
            payload: encode_membership(&membership),
        },
    }
}

/// A stored entry as openraft wants it.
pub(crate) fn from_stored(entry: LogEntry) -> Result<Entry, DecodeError> {
    let payload = match entry.kind {
        EntryKind::Blank => Payload::Blank,
        EntryKind::Command => Payload::Normal(Command(entry.payload)),
        EntryKind::Membership => Payload::Membership(decode_membership(&entry.payload)?),
    };
    Ok(Entry {
        log_id: log_id(entry.id),
        payload,
    })
}

/// An error as openraft's storage traits want it.
pub(crate) fn io_error(error: impl fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: votes and memberships survive their encoding. Method: round trips, joint and empty memberships included.
    #[test]
    fn votes_and_memberships_round_trip() {
        for vote in [
            Vote::new(0, 0),
            Vote::new(7, u64::MAX),
            Vote::new_committed(3, 1 << 33),
        ] {
            let bytes = encode(&VoteRecord::from(vote));
            assert_eq!(Vote::from(decode::<VoteRecord>(&bytes).unwrap()), vote);
        }
        let members = BTreeSet::from([1, 2, 3, 4]);
        let joint = vec![BTreeSet::from([1, 2]), BTreeSet::from([2, 3])];
        let membership = Membership::new(joint, members).unwrap();
        assert_eq!(
            decode_membership(&encode_membership(&membership)).unwrap(),
            membership
        );
        let is = |numbers: &[u64]| numbers.iter().copied().map(ReplicaId::from_u64).collect();
        let members = Members::of(&membership);
        assert_eq!(
            (members.voters, members.learners, members.is_joint),
            (is(&[1, 2, 3]), is(&[4]), true)
        );
        for stored in [
            StoredMembership::default(),
            StoredMembership::new(None, membership.clone()),
            StoredMembership::new(Some(LogId::new_term_index(3, 9)), membership.clone()),
        ] {
            let bytes = encode_stored_membership(&stored);
            assert_eq!(decode_stored_membership(&bytes).unwrap(), stored);
        }
    }

    /// Goal: a witness never stores a command's bytes, but keeps memberships. Method: convert one entry of each kind.
    #[test]
    fn a_witness_keeps_memberships_and_no_commands() {
        let at = |payload| Entry {
            log_id: LogId::new_term_index(2, 5),
            payload,
        };
        let command = at(Payload::Normal(Command(Bytes::from_static(b"x"))));
        assert!(to_stored(command.clone(), true).payload.is_empty());
        assert_eq!(to_stored(command, false).payload, Bytes::from_static(b"x"));
        let membership = Membership::new(vec![BTreeSet::from([1])], BTreeSet::from([1])).unwrap();
        let kept = to_stored(at(Payload::Membership(membership.clone())), true);
        assert_eq!(
            from_stored(kept).unwrap().payload,
            Payload::Membership(membership)
        );
    }
}
