//! The messages between replicas: headers with a bounded encoding, entry payloads raw behind them.
//!
//! Owns the wire form and nothing else. Every request names group, sender and receiver, so that a broker can refuse what is
//! not for a replica it runs. Nothing read here is trusted: lengths are checked against the body before it is cut.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::type_config::{
    AppendError, AppendRequest, AppendResult, Command, Entry, Payload, Vote, VoteRecord,
    decode_membership, encode_membership, entry_id, log_id,
};
use crate::net::Message;
use crate::types::{BrokerId, DecodeError, EntryId, GroupId, LeaderEpoch, LogIndex, ReplicaId};
use crate::types::{decode, encode};

/// From which replica to which, of what group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Route {
    pub(crate) group: GroupId,
    pub(crate) from: ReplicaId,
    pub(crate) to: ReplicaId,
}

/// An entry without its payload. Its index follows from its place in the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EntryHead {
    epoch: LeaderEpoch,
    kind: WireKind,
    bytes: u32,
}

/// What an entry is, on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum WireKind {
    Blank,
    Command,
    Membership,
}

/// An append message's header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AppendHead {
    vote: VoteRecord,
    prev: Option<EntryId>,
    commit: Option<EntryId>,
    entries: Vec<EntryHead>,
}

/// One group's heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Heartbeat {
    pub(crate) route: Route,
    vote: VoteRecord,
    prev: Option<EntryId>,
    commit: Option<EntryId>,
}

/// A piece of a snapshot; the state's bytes are the body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotPiece {
    pub(crate) vote: VoteRecord,
    pub(crate) last: EntryId,
    pub(crate) membership: Bytes,
    /// Where in the state this piece stands, in bytes.
    pub(crate) offset: u64,
    /// The whole state, in bytes.
    pub(crate) total: u64,
}

/// What one broker asks another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    Append(Route, AppendHead),
    Vote {
        route: Route,
        vote: VoteRecord,
        last: Option<EntryId>,
        transfer: bool,
        pre: bool,
    },
    Transfer {
        route: Route,
        leader: VoteRecord,
        successor: ReplicaId,
        last: Option<EntryId>,
    },
    Snapshot(Route, SnapshotPiece),
    Heartbeats(Vec<Heartbeat>),
    /// Where do your replicas of these groups stand, whose leader was on `gone`? Lift the leader's lease if you know as well
    /// that its process is gone.
    Survivors {
        gone: BrokerId,
        groups: Vec<GroupId>,
    },
}

/// Why a request was not for this broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("it does not run a replica of this group")]
    NoSuchGroup,
    #[error("its replica of this group is another one")]
    OtherReplica,
    #[error("its replica has stopped")]
    Stopped,
    #[error("too much waits for its replica")]
    Busy,
    #[error("an earlier message of the stream was rejected")]
    StreamEnded,
    #[error("it does not understand the message")]
    Malformed,
    #[error("a witness never leads")]
    Witness,
}

/// An answer to an append or a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AppendAnswer {
    Matched(Option<EntryId>),
    Conflict(EntryId),
    HigherVote(VoteRecord),
    Refused(Refusal),
}

/// Where a survivor stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Survivor {
    pub(crate) group: GroupId,
    pub(crate) replica: ReplicaId,
    pub(crate) last: Option<EntryId>,
    pub(crate) epoch: LeaderEpoch,
    /// Who leads now, when that is not on the broker that is gone.
    pub(crate) leader: Option<ReplicaId>,
    /// Whether it knows as well that the leader's process is gone, and has lifted the leader's lease.
    pub(crate) lifted: bool,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Response {
    Append(AppendAnswer),
    Vote {
        vote: VoteRecord,
        granted: bool,
        last: Option<EntryId>,
    },
    Transfer(Result<(), String>),
    Snapshot {
        vote: VoteRecord,
    },
    /// A piece that was not the last has been kept.
    SnapshotKept,
    /// In the order asked; `None` when the replica did not answer in time.
    Heartbeats(Vec<Option<AppendAnswer>>),
    Survivors(Vec<Survivor>),
    Refused(Refusal),
}

impl Request {
    /// Whether every replica that speaks in it is on `broker`.
    pub(crate) fn comes_from(&self, broker: Option<BrokerId>) -> bool {
        let ours = |route: &Route| Some(route.from.broker()) == broker;
        match self {
            Self::Append(route, _)
            | Self::Vote { route, .. }
            | Self::Transfer { route, .. }
            | Self::Snapshot(route, _) => ours(route),
            Self::Heartbeats(beats) => beats.iter().all(|beat| ours(&beat.route)),
            Self::Survivors { .. } => true,
        }
    }

    /// The message of a request that has no body.
    pub(crate) fn message(&self) -> Message {
        Message {
            header: encode(self).into(),
            body: Vec::new(),
        }
    }
}

impl Response {
    pub(crate) fn message(&self) -> Message {
        Message {
            header: encode(self).into(),
            body: Vec::new(),
        }
    }

    pub(crate) fn decode(message: &Message) -> Result<Self, DecodeError> {
        decode(&message.header)
    }
}

/// The message of an append request. `strip` leaves the bytes of commands out, for a witness.
pub(crate) fn append_message(route: Route, request: AppendRequest, strip: bool) -> Message {
    let mut heads = Vec::with_capacity(request.entries.len());
    let mut body = Vec::with_capacity(request.entries.len());
    for entry in request.entries {
        let (kind, payload) = match entry.payload {
            Payload::Blank => (WireKind::Blank, Bytes::new()),
            Payload::Normal(_) if strip => (WireKind::Command, Bytes::new()),
            Payload::Normal(Command(bytes)) => (WireKind::Command, bytes),
            Payload::Membership(membership) => {
                (WireKind::Membership, encode_membership(&membership))
            }
        };
        let bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        assert!(
            usize::try_from(bytes).is_ok_and(|bytes| bytes == payload.len()),
            "entry {} of group {} has {} bytes, a frame cannot hold it",
            entry.log_id.index,
            route.group,
            payload.len()
        );
        heads.push(EntryHead {
            epoch: LeaderEpoch(entry.log_id.leader_id.term),
            kind,
            bytes,
        });
        if !payload.is_empty() {
            body.push(payload);
        }
    }
    let head = AppendHead {
        vote: request.vote.into(),
        prev: request.prev_log_id.map(entry_id),
        commit: request.leader_commit.map(entry_id),
        entries: heads,
    };
    Message {
        header: encode(&Request::Append(route, head)).into(),
        body,
    }
}

impl AppendHead {
    /// The request, its entries cut out of `body`.
    pub(crate) fn request(self, mut body: Bytes) -> Result<AppendRequest, DecodeError> {
        let first = self.prev.map_or(0, |prev| prev.index.0.saturating_add(1));
        if first > u64::MAX / 2 {
            return Err(DecodeError(format!("no log is {first} entries long")));
        }
        let mut entries = Vec::with_capacity(self.entries.len());
        for (head, index) in self.entries.into_iter().zip(first..) {
            let bytes = usize::try_from(head.bytes).unwrap_or(usize::MAX);
            if bytes > body.len() {
                return Err(DecodeError(format!(
                    "entry {index} has {bytes} bytes, {} are left",
                    body.len()
                )));
            }
            let payload = body.split_to(bytes);
            let payload = match head.kind {
                WireKind::Blank => Payload::Blank,
                WireKind::Command => Payload::Normal(Command(payload)),
                WireKind::Membership => Payload::Membership(decode_membership(&payload)?),
            };
            let id = EntryId {
                epoch: head.epoch,
                index: LogIndex(index),
            };
            entries.push(Entry {
                log_id: log_id(id),
                payload,
            });
        }
        if !body.is_empty() {
            return Err(DecodeError(format!(
                "{} bytes left over behind the entries",
                body.len()
            )));
        }
        if !self
            .vote
            .is_leader_of(entries.last().map(|entry| entry_id(entry.log_id)))
        {
            return Err(DecodeError(
                "the sender leads no epoch that has these entries".to_owned(),
            ));
        }
        let ascending = entries.windows(2).all(|pair| match pair {
            [a, b] => a.log_id.leader_id <= b.log_id.leader_id,
            _ => true,
        });
        let follows = match (self.prev, entries.first()) {
            (Some(prev), Some(first)) => log_id(prev).leader_id <= first.log_id.leader_id,
            _ => true,
        };
        if !ascending || !follows {
            return Err(DecodeError("the epochs of the entries descend".to_owned()));
        }
        Ok(AppendRequest {
            vote: self.vote.into(),
            prev_log_id: self.prev.map(log_id),
            entries,
            leader_commit: self.commit.map(log_id),
        })
    }
}

impl Heartbeat {
    pub(crate) fn new(route: Route, request: &AppendRequest) -> Self {
        Self {
            route,
            vote: request.vote.into(),
            prev: request.prev_log_id.map(entry_id),
            commit: request.leader_commit.map(entry_id),
        }
    }

    pub(crate) fn request(&self) -> AppendRequest {
        AppendRequest {
            vote: self.vote.into(),
            prev_log_id: self.prev.map(log_id),
            entries: Vec::new(),
            leader_commit: self.commit.map(log_id),
        }
    }
}

impl AppendAnswer {
    pub(crate) fn of(result: &AppendResult) -> Self {
        match result {
            Ok(matched) => Self::Matched(matched.map(entry_id)),
            Err(AppendError::Conflict(id)) => Self::Conflict(entry_id(*id)),
            Err(AppendError::HigherVote(vote)) => Self::HigherVote((*vote).into()),
        }
    }

    pub(crate) fn result(self) -> Result<AppendResult, Refusal> {
        match self {
            Self::Matched(matched) => Ok(Ok(matched.map(log_id))),
            Self::Conflict(id) => Ok(Err(AppendError::Conflict(log_id(id)))),
            Self::HigherVote(vote) => Ok(Err(AppendError::HigherVote(Vote::from(vote)))),
            Self::Refused(refusal) => Err(refusal),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::raft::type_config::{LogId, Membership};
    use crate::types::ReplicaKind;

    fn route() -> Route {
        let replica = |broker| ReplicaId::new(BrokerId(broker), ReplicaKind::Data, 1);
        Route {
            group: GroupId(7),
            from: replica(1),
            to: replica(2),
        }
    }

    fn request() -> AppendRequest {
        let entry = |term, index, payload| Entry {
            log_id: LogId::new_term_index(term, index),
            payload,
        };
        let membership =
            Membership::new(vec![BTreeSet::from([1])], BTreeSet::from([1, 2])).unwrap();
        let command = |bytes: &'static [u8]| Payload::Normal(Command(Bytes::from_static(bytes)));
        AppendRequest {
            vote: Vote::new_committed(3, 1),
            prev_log_id: Some(LogId::new_term_index(1, 4)),
            entries: vec![
                entry(1, 5, command(b"one")),
                entry(2, 6, Payload::Blank),
                entry(2, 7, Payload::Membership(membership)),
                entry(3, 8, command(b"")),
                entry(3, 9, command(b"two")),
            ],
            leader_commit: Some(LogId::new_term_index(1, 3)),
        }
    }

    fn head_of(message: &Message) -> AppendHead {
        match decode(&message.header).unwrap() {
            Request::Append(to, head) => {
                assert_eq!(to, route());
                head
            }
            other => panic!("{other:?}"),
        }
    }

    /// Goal: an append arrives as it was sent, and reaches a witness without commands. Method: all kinds of entry there and back.
    #[test]
    fn an_append_round_trips_and_is_stripped_for_a_witness() {
        let message = append_message(route(), request(), false);
        let back = head_of(&message).request(message.single_body()).unwrap();
        assert_eq!(format!("{back:?}"), format!("{:?}", request()));
        assert_eq!(back.entries, request().entries);

        let message = append_message(route(), request(), true);
        let stripped = head_of(&message).request(message.single_body()).unwrap();
        assert_eq!(stripped.entries.len(), 5);
        for (entry, original) in stripped.entries.iter().zip(request().entries) {
            assert_eq!(entry.log_id, original.log_id);
            match (&entry.payload, original.payload) {
                (Payload::Normal(Command(bytes)), Payload::Normal(_)) => assert!(bytes.is_empty()),
                (payload, original) => assert_eq!(*payload, original),
            }
        }
    }

    /// Goal: a malformed append is an error, not a panic. Method: a body too short, one too long, epochs that descend.
    #[test]
    fn malformed_appends_are_errors() {
        let message = append_message(route(), request(), false);
        let head = head_of(&message);
        let body = message.single_body();
        assert!(head.clone().request(body.slice(..body.len() - 1)).is_err());
        assert!(
            head.clone()
                .request([&body[..], b"x"].concat().into())
                .is_err()
        );
        let mut descending = head.clone();
        descending.entries[1].epoch = LeaderEpoch(9);
        assert!(descending.request(body.clone()).is_err());
        let mut before_prev = head;
        before_prev.prev = Some(EntryId {
            epoch: LeaderEpoch(2),
            index: LogIndex(4),
        });
        assert!(before_prev.request(body).is_err());
    }

    /// Goal: what others may send that is not a message is refused. Method: decode every prefix of a message and garbage.
    #[test]
    fn garbage_is_refused() {
        let header = append_message(route(), request(), false).header;
        for end in 0..header.len() {
            assert!(decode::<Request>(&header[..end]).is_err(), "{end}");
        }
        assert!(decode::<Request>(&[0xff; 40]).is_err());
    }
}
