//! Doors for fuzzing: what this module makes of another broker's messages.
//!
//! Owns nothing. Called by the targets in `fuzz/` and by the replay of their corpus; each door panics when a property that it
//! checks does not hold.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::type_config::{
    AppendRequest, Command, Entry, LogId, Membership, Payload, Vote, decode_stored_membership,
    encode_membership, encode_stored_membership,
};
use super::wire::{
    AppendAnswer, Heartbeat, Refusal, Request, Response, Route, SnapshotPiece, Survivor,
    append_message,
};
use crate::net::Message;
use crate::types::{
    BrokerId, EntryId, GroupId, LeaderEpoch, LogIndex, ReplicaId, ReplicaKind, decode, encode,
};

/// A message: two bytes with the header's length, the header, the body. Whatever is understood is said again in the same words.
#[allow(clippy::panic, clippy::missing_panics_doc)]
pub fn message(data: &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
    let (header, body) = rest.split_at(length);
    let body = Bytes::copy_from_slice(body);
    if let Ok(request) = decode::<Request>(header) {
        assert_eq!(
            decode::<Request>(&request.message().header).as_ref(),
            Ok(&request),
            "a request changed"
        );
        request.comes_from(Some(BrokerId(1)));
        match request {
            Request::Append(route, head) => {
                if let Ok(append) = head.request(body) {
                    said_again(route, &append);
                    // A witness gets the ids of the same entries.
                    let stripped = append_message(route, append.clone(), true);
                    assert!(
                        matches!(decode::<Request>(&stripped.header), Ok(Request::Append(..))),
                        "a stripped append cannot be read"
                    );
                }
            }
            Request::Snapshot(_, piece) => {
                if let Ok(membership) = decode_stored_membership(&piece.membership) {
                    let again = decode_stored_membership(&encode_stored_membership(&membership));
                    assert_eq!(again.as_ref(), Ok(&membership), "a membership changed");
                }
            }
            Request::Heartbeats(beats) => {
                for beat in beats {
                    let _request: AppendRequest = beat.request();
                }
            }
            Request::Vote { .. } | Request::Transfer { .. } | Request::Survivors { .. } => {}
        }
    }
    let answer = Message {
        header: Bytes::copy_from_slice(header),
        body: Vec::new(),
    };
    if let Ok(response) = Response::decode(&answer) {
        assert_eq!(
            Response::decode(&response.message()).as_ref(),
            Ok(&response),
            "a response changed"
        );
        if let Response::Append(answer) = response
            && let Ok(result) = answer.result()
        {
            assert_eq!(AppendAnswer::of(&result), answer, "an answer changed");
        }
    }
}

#[allow(clippy::panic)]
fn said_again(route: Route, append: &AppendRequest) {
    let message = append_message(route, append.clone(), false);
    let body: Vec<u8> = message.body.iter().flatten().copied().collect();
    let Ok(Request::Append(to, head)) = decode::<Request>(&message.header) else {
        panic!("an append cannot be read again");
    };
    assert_eq!(to, route, "the route changed");
    let again = head.request(body.into()).map(|again| format!("{again:?}"));
    assert_eq!(again, Ok(format!("{append:?}")), "an append changed");
}

/// Messages to begin with.
pub fn message_seeds() -> Vec<Vec<u8>> {
    let replica = |broker| ReplicaId::new(BrokerId(broker), ReplicaKind::Data, 1);
    let route = Route {
        group: GroupId(7),
        from: replica(1),
        to: replica(2),
    };
    let at = |epoch, index| EntryId {
        epoch: LeaderEpoch(epoch),
        index: LogIndex(index),
    };
    let entry = |term, index, payload| Entry {
        log_id: LogId::new_term_index(term, index),
        payload,
    };
    let command = |bytes: &'static [u8]| Payload::Normal(Command(Bytes::from_static(bytes)));
    let Ok(members) = Membership::new(vec![BTreeSet::from([1])], BTreeSet::from([1, 2])) else {
        return Vec::new();
    };
    let vote = Vote::new_committed(3, 1);
    let entries = vec![
        entry(1, 5, command(b"one")),
        entry(2, 6, Payload::Blank),
        entry(2, 7, Payload::Membership(members.clone())),
        entry(3, 8, command(b"")),
    ];
    let append = |entries| AppendRequest {
        vote,
        prev_log_id: Some(LogId::new_term_index(1, 4)),
        entries,
        leader_commit: Some(LogId::new_term_index(1, 3)),
    };
    let full = append(entries);
    let stored = super::type_config::StoredMembership::new(
        Some(LogId::new_term_index(1, 1)),
        members.clone(),
    );
    let mut messages = vec![
        append_message(route, full.clone(), false),
        append_message(route, full.clone(), true),
        append_message(route, append(Vec::new()), false),
    ];
    for (transfer, pre) in [(false, true), (true, false)] {
        let last = Some(at(2, 9));
        let vote = vote.into();
        let request = Request::Vote {
            route,
            vote,
            last,
            transfer,
            pre,
        };
        messages.push(request.message());
    }
    let beat = Heartbeat::new(route, &full);
    messages.push(Request::Heartbeats(vec![beat, beat]).message());
    let leader = vote.into();
    let (successor, last) = (replica(2), None);
    messages.push(
        Request::Transfer {
            route,
            leader,
            successor,
            last,
        }
        .message(),
    );
    let (gone, groups) = (BrokerId(3), vec![GroupId(1), GroupId(900)]);
    messages.push(Request::Survivors { gone, groups }.message());
    let piece = SnapshotPiece {
        vote: vote.into(),
        last: at(3, 80),
        membership: encode_stored_membership(&stored),
        offset: 0,
        total: 5,
    };
    let mut snapshot = Request::Snapshot(route, piece).message();
    snapshot.body.push(Bytes::from_static(b"state"));
    messages.push(snapshot);
    let survivor = Survivor {
        group: GroupId(7),
        replica: replica(2),
        last: Some(at(3, 8)),
        epoch: LeaderEpoch(3),
        leader: Some(replica(1)),
        lifted: true,
    };
    for response in [
        Response::Append(AppendAnswer::Matched(Some(at(3, 8)))),
        Response::Append(AppendAnswer::Conflict(at(1, 2))),
        Response::Append(AppendAnswer::HigherVote(vote.into())),
        Response::Vote {
            vote: vote.into(),
            granted: true,
            last: Some(at(2, 2)),
        },
        Response::Transfer(Err("no".to_owned())),
        Response::Snapshot { vote: vote.into() },
        Response::SnapshotKept,
        Response::Heartbeats(vec![None, Some(AppendAnswer::Matched(None))]),
        Response::Survivors(vec![survivor]),
        Response::Refused(Refusal::Witness),
    ] {
        messages.push(response.message());
    }
    let mut seeds: Vec<Vec<u8>> = messages
        .into_iter()
        .map(|message| {
            let length = u16::try_from(message.header.len()).unwrap_or(u16::MAX);
            let mut seed = length.to_be_bytes().to_vec();
            seed.extend_from_slice(&message.header);
            message
                .body
                .iter()
                .for_each(|piece| seed.extend_from_slice(piece));
            seed
        })
        .collect();
    seeds.push(encode(&encode_membership(&members).to_vec()));
    seeds
}
