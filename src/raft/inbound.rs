//! What other replicas send here: found its group, put in order, answered.
//!
//! Owns one bounded inbox and one task per (connection, group, sender) for appends, which must be taken in order and never
//! make another group wait; everything else runs in a task of its own. When a connection ends, its inboxes are worked off
//! before they end: what a dead leader had sent is in the log before its successor is chosen.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::{Stream, StreamExt};
use openraft::errors::Fatal;
use openraft::raft::{TransferLeaderRequest, VoteRequest};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::group::Group;
use super::replica::lock;
use super::type_config::{
    AppendRequest, AppendResult, Raft, Snapshot, SnapshotMeta, TypeConfig, Vote,
    decode_stored_membership, entry_id, log_id,
};
use super::wire::{AppendAnswer, Refusal, Response, Route, SnapshotPiece};
use crate::net::Reply;
use crate::runtime::Tasks;
use crate::types::{BrokerId, GroupId, ReplicaId};

/// Largest snapshot accepted, in bytes.
const SNAPSHOT_BYTES_MAX: u64 = 1 << 30;

/// Which stream of appends a message belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Source {
    connection: u64,
    group: GroupId,
    from: ReplicaId,
}

struct Work {
    request: AppendRequest,
    reply: Reply,
}

struct Inbox {
    /// The run of the replica that it feeds.
    group: Group,
    sender: mpsc::Sender<Work>,
    stop: CancellationToken,
}

/// A snapshot of which not all pieces have come.
struct Partial {
    piece: SnapshotPiece,
    state: BytesMut,
}

/// The inboxes of a broker.
pub(crate) struct Inbound {
    tasks: Tasks,
    /// Messages that may wait in one inbox.
    limit: usize,
    inboxes: Mutex<BTreeMap<Source, Inbox>>,
    partials: Mutex<BTreeMap<Source, Partial>>,
    /// Inboxes per sending broker that have not ended.
    open: Mutex<BTreeMap<BrokerId, watch::Sender<usize>>>,
}

impl Inbound {
    pub(crate) fn new(tasks: Tasks, append_inflight_max: usize) -> Self {
        Self {
            tasks,
            // A sender that starts over leaves what it had in flight behind.
            limit: append_inflight_max.saturating_mul(4),
            inboxes: Mutex::new(BTreeMap::new()),
            partials: Mutex::new(BTreeMap::new()),
            open: Mutex::new(BTreeMap::new()),
        }
    }

    /// Puts an append into the inbox of its stream. Never waits.
    pub(crate) fn append(
        &self,
        connection: u64,
        route: Route,
        group: &Group,
        request: AppendRequest,
        reply: Reply,
    ) {
        let source = Source {
            connection,
            group: route.group,
            from: route.from,
        };
        let mut work = Work { request, reply };
        let mut inboxes = lock(&self.inboxes);
        // One that feeds an earlier run of the replica, made just when that run stopped, would refuse everything.
        if let Some(inbox) = inboxes.get(&source).filter(|inbox| inbox.group.is(group)) {
            match inbox.sender.try_send(work) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(refused)) => {
                    refuse(refused.reply, Refusal::Busy);
                    return;
                }
                Err(mpsc::error::TrySendError::Closed(returned)) => work = returned,
            }
        }
        let (sender, queue) = mpsc::channel(self.limit);
        let stop = CancellationToken::new();
        // A new queue has room for its first message.
        sender.try_send(work).ok();
        inboxes.insert(
            source,
            Inbox {
                group: group.clone(),
                sender,
                stop: stop.clone(),
            },
        );
        let guard = self.opened(route.from.broker());
        let (group, limit) = (group.clone(), self.limit);
        self.tasks.spawn(async move {
            let _guard = guard;
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = work_off(queue, group, limit) => {}
            }
        });
    }

    /// A connection ended: its inboxes are worked off and end.
    pub(crate) fn connection_closed(&self, connection: u64) {
        lock(&self.inboxes).retain(|source, _| source.connection != connection);
        lock(&self.partials).retain(|source, _| source.connection != connection);
    }

    /// A group stopped here: its inboxes end at once.
    pub(crate) fn group_stopped(&self, group: GroupId) {
        lock(&self.inboxes).retain(|source, inbox| {
            if source.group == group {
                inbox.stop.cancel();
            }
            source.group != group
        });
        lock(&self.partials).retain(|source, _| source.group != group);
    }

    /// Waits until everything that `broker` sent before its connections ended is in the logs, at most `patience`.
    pub(crate) async fn drained(&self, broker: BrokerId, patience: Duration) {
        let receiver = lock(&self.open).get(&broker).map(watch::Sender::subscribe);
        if let Some(mut receiver) = receiver {
            // Whether it came in time is not decisive: the survivors are asked again.
            tokio::time::timeout(patience, receiver.wait_for(|open| *open == 0))
                .await
                .ok();
        }
    }

    fn opened(&self, broker: BrokerId) -> OpenInbox {
        let mut open = lock(&self.open);
        let count = open
            .entry(broker)
            .or_insert_with(|| watch::Sender::new(0))
            .clone();
        count.send_modify(|open| *open += 1);
        OpenInbox(count)
    }

    /// Takes a piece of a snapshot; the snapshot, when this was its last piece.
    pub(crate) fn snapshot_piece(
        &self,
        connection: u64,
        route: Route,
        piece: &SnapshotPiece,
        bytes: &[u8],
    ) -> Result<Option<(Vote, Snapshot)>, Refusal> {
        // openraft takes a snapshot that its sender cannot have for a broken invariant.
        if piece.total > SNAPSHOT_BYTES_MAX || !piece.vote.is_leader_of(Some(piece.last)) {
            return Err(Refusal::Malformed);
        }
        let source = Source {
            connection,
            group: route.group,
            from: route.from,
        };
        let mut partials = lock(&self.partials);
        let mut partial = match partials.remove(&source) {
            Some(partial) if piece.offset != 0 => partial,
            _ => Partial {
                piece: piece.clone(),
                state: BytesMut::new(),
            },
        };
        let have = u64::try_from(partial.state.len()).unwrap_or(u64::MAX);
        let more = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let expected = SnapshotPiece {
            offset: have,
            ..partial.piece.clone()
        };
        if *piece != expected || have.saturating_add(more) > piece.total {
            return Err(Refusal::Malformed);
        }
        partial.state.extend_from_slice(bytes);
        if have + more < piece.total {
            partials.insert(source, partial);
            return Ok(None);
        }
        drop(partials);
        let membership = decode_stored_membership(&piece.membership);
        let last_membership = membership.map_err(|_| Refusal::Malformed)?;
        let meta = SnapshotMeta {
            last_log_id: Some(log_id(piece.last)),
            last_membership,
        };
        let snapshot = Snapshot {
            meta,
            snapshot: partial.state.freeze(),
        };
        Ok(Some((piece.vote.into(), snapshot)))
    }
}

/// Counts an inbox while it lives.
struct OpenInbox(watch::Sender<usize>);

impl Drop for OpenInbox {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open = open.saturating_sub(1));
    }
}

pub(crate) fn refuse(reply: Reply, refusal: Refusal) {
    reply.send(Response::Refused(refusal).message());
}

type Answers = Pin<Box<dyn Stream<Item = Result<AppendResult, Fatal<TypeConfig>>> + Send>>;

/// One stream of appends into openraft, up to its first rejection.
struct Session {
    requests: mpsc::Sender<AppendRequest>,
    answers: Answers,
    replies: VecDeque<Reply>,
}

impl Session {
    fn start(raft: &Raft, limit: usize) -> Self {
        let (requests, queue) = mpsc::channel(limit);
        let input = futures_util::stream::unfold(queue, |mut queue| async move {
            let request = queue.recv().await?;
            Some((request, queue))
        });
        Self {
            requests,
            answers: Box::pin(raft.stream_append(input)),
            replies: VecDeque::new(),
        }
    }

    /// Hands one answer to the oldest reply. Returns whether the session goes on.
    fn answered(&mut self, answer: Option<Result<AppendResult, Fatal<TypeConfig>>>) -> bool {
        let (answer, goes_on) = match answer {
            Some(Ok(result)) => (Response::Append(AppendAnswer::of(&result)), result.is_ok()),
            Some(Err(_)) | None => (Response::Refused(Refusal::Stopped), false),
        };
        if let Some(reply) = self.replies.pop_front() {
            reply.send(answer.message());
        }
        goes_on
    }

    /// What came after a rejected request has not been looked at.
    fn end(self) {
        for reply in self.replies {
            refuse(reply, Refusal::StreamEnded);
        }
    }
}

/// Takes the appends of one stream, in order, until the queue is closed and everything in it is answered.
async fn work_off(mut queue: mpsc::Receiver<Work>, group: Group, limit: usize) {
    let mut session: Option<Session> = None;
    let mut closed = false;
    loop {
        let unanswered = session.as_ref().map_or(0, |session| session.replies.len());
        if closed && unanswered == 0 {
            return;
        }
        let answers = session.as_mut().map(|session| &mut session.answers);
        tokio::select! {
            biased;
            answer = next_answer(answers), if unanswered > 0 => {
                if let Some(mut current) = session.take() {
                    if current.answered(answer) {
                        session = Some(current);
                    } else {
                        // A new session must not share the input of this one, which may still take requests from it.
                        current.end();
                    }
                }
            }
            work = queue.recv(), if !closed && unanswered < limit => {
                let Some(Work { request, reply }) = work else {
                    closed = true;
                    continue;
                };
                let mut current = if let Some(current) = session.take() {
                    current
                } else {
                    let Some(raft) = group.raft() else {
                        refuse(reply, Refusal::Stopped);
                        continue;
                    };
                    Session::start(&raft, limit)
                };
                // There is room: as many requests are queued as replies wait, fewer than `limit`.
                if current.requests.try_send(request).is_ok() {
                    current.replies.push_back(reply);
                    session = Some(current);
                } else {
                    current.replies.push_back(reply);
                    current.end();
                }
            }
        }
    }
}

async fn next_answer(
    answers: Option<&mut Answers>,
) -> Option<Result<AppendResult, Fatal<TypeConfig>>> {
    match answers {
        Some(answers) => answers.next().await,
        None => std::future::pending().await,
    }
}

/// Answers a vote or pre-vote request.
pub(crate) async fn vote(raft: Raft, request: VoteRequest<TypeConfig>, pre: bool, reply: Reply) {
    let result = if pre {
        raft.pre_vote(request).await
    } else {
        raft.vote(request).await
    };
    let response = match result {
        Ok(answer) => Response::Vote {
            vote: answer.vote.into(),
            granted: answer.vote_granted,
            last: answer.last_log_id.map(entry_id),
        },
        Err(_stopped) => Response::Refused(Refusal::Stopped),
    };
    reply.send(response.message());
}

/// Answers a leader that hands over.
pub(crate) async fn transfer(raft: Raft, request: TransferLeaderRequest<TypeConfig>, reply: Reply) {
    let response = match raft.handle_transfer_leader(request).await {
        Ok(result) => Response::Transfer(result.map_err(|error| error.to_string())),
        Err(_stopped) => Response::Refused(Refusal::Stopped),
    };
    reply.send(response.message());
}

/// Installs a snapshot and answers when it is durable.
pub(crate) async fn install(raft: Raft, vote: Vote, snapshot: Snapshot, reply: Reply) {
    let response = match raft.install_full_snapshot(vote, snapshot).await {
        Ok(answer) => Response::Snapshot {
            vote: answer.vote.into(),
        },
        Err(_stopped) => Response::Refused(Refusal::Stopped),
    };
    reply.send(response.message());
}
