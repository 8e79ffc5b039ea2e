//! openraft's network over [`Net`]: appends in a pipeline, votes, transfers, snapshots; one client per target replica.
//!
//! Owns the outbound side of a group: what is in flight, what is held back from a witness, and the deadline of every call.
//! A client connects to nothing itself. Requests of one stream leave in order on the data lane; votes, transfers and
//! heartbeats take the control lane and never wait behind bulk.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use tokio::sync::watch;
use tokio::time::Instant;

use super::context::Context;
use super::replica::Replica;
use super::type_config::{
    AppendError, AppendRequest, AppendResult, LogId, RpcError, Snapshot, TypeConfig, Vote,
    encode_stored_membership, entry_id, log_id,
};
use super::wire::{
    AppendAnswer, Heartbeat, Request, Response, Route, SnapshotPiece, append_message,
};
use crate::net::{Channel, Lane, Message, NetError, Pending};
use crate::types::{GroupId, LeaderEpoch, LogIndex, ReplicaId};

/// How long to wait before a message is tried again that found the queue to its peer full.
const QUEUE_RETRY: Duration = Duration::from_millis(2);
/// Waits between two attempts at a peer that does not answer: doubled from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));
/// The last piece of a snapshot is answered when all of it is installed durably: it may take this many times as long as
/// another message.
const INSTALL_PATIENCE: u32 = 4;

/// Makes the clients of one group.
#[derive(Debug)]
pub(crate) struct Factory {
    pub(crate) context: Arc<Context>,
    pub(crate) replica: Arc<Replica>,
}

impl Factory {
    fn client(&self, to: u64, heartbeat: bool) -> Client {
        let to = ReplicaId::from_u64(to);
        let route = Route {
            group: self.replica.group,
            from: self.replica.me,
            to,
        };
        Client {
            context: Arc::clone(&self.context),
            replica: Arc::clone(&self.replica),
            route,
            heartbeat,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _node: &()) -> Client {
        self.client(target, false)
    }

    async fn new_heartbeat_client(&mut self, target: u64, _node: &()) -> Client {
        self.client(target, true)
    }
}

/// The way from a group's local replica to another one.
#[derive(Clone)]
pub(crate) struct Client {
    context: Arc<Context>,
    replica: Arc<Replica>,
    route: Route,
    heartbeat: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("route", &self.route)
            .finish_non_exhaustive()
    }
}

fn unreachable(reason: impl fmt::Display) -> RpcError {
    RpcError::Unreachable(Unreachable::from_string(reason))
}

/// A request that is on its way.
struct InFlight {
    answer: Pending,
    sent: Sent,
    /// The ends of the logs of requests without entries that went along with it, see [`Held`].
    carried: Vec<Option<LogId>>,
}

/// A request that waits to be sent.
///
/// One without entries tells the follower how far the log is committed. Nobody waits for that, and the next entries, or the next
/// heartbeat, tell it as well: so it waits for entries to go along with, and costs no message of its own while there are some. It
/// is answered when they are: what holds for a follower that has them holds for what stands in front of them.
struct Held {
    request: AppendRequest,
    /// A request without entries goes alone then.
    until: Instant,
}

/// What must be known of a request when its answer comes.
#[derive(Debug, Clone, Copy)]
struct Sent {
    epoch: LeaderEpoch,
    prev: Option<LogId>,
    last: Option<LogId>,
    at: Instant,
    last_at_send: Option<LogIndex>,
}

impl Client {
    fn note(&self, request: &AppendRequest) -> Sent {
        Sent {
            epoch: LeaderEpoch(request.vote.leader_id().term),
            prev: request.prev_log_id,
            last: request
                .entries
                .last()
                .map(|entry| entry.log_id)
                .or(request.prev_log_id),
            at: Instant::now(),
            last_at_send: self.replica.last(),
        }
    }

    fn call(&self, lane: Lane, message: Message, deadline: Duration) -> Result<Pending, NetError> {
        let broker = self.route.to.broker();
        self.context
            .net
            .call(broker, lane, Channel::Raft, message, deadline)
    }

    /// Asks on the control lane and waits for the answer.
    async fn ask(&self, request: &Request, option: &RPCOption) -> Result<Response, RpcError> {
        let deadline = self.context.config.rpc_timeout.min(option.hard_ttl());
        let pending = self
            .call(Lane::Control, request.message(), deadline)
            .map_err(unreachable)?;
        let answer = pending.await.map_err(unreachable)?;
        match Response::decode(&answer).map_err(unreachable)? {
            Response::Refused(refusal) => Err(unreachable(refusal)),
            response => Ok(response),
        }
    }

    /// Turns an answer to an append into openraft's terms, and notes what it says about the follower.
    fn conclude(&self, sent: &Sent, answer: AppendAnswer) -> Result<AppendResult, RpcError> {
        let result = answer.result().map_err(unreachable)?;
        match &result {
            Ok(matched) if *matched == sent.last => {
                let matched = matched.map(|id| LogIndex(id.index));
                let to = self.route.to;
                self.replica
                    .acknowledged(sent.epoch, to, matched, sent.at, sent.last_at_send);
            }
            Err(AppendError::Conflict(id)) if Some(*id) == sent.prev => {
                // openraft takes a follower that forgets for impossible. Such a follower is not fed any more.
                if self
                    .replica
                    .has_reverted(sent.epoch, self.route.to, LogIndex(id.index))
                {
                    return Err(self.lost_data());
                }
            }
            Err(AppendError::HigherVote(_)) => {}
            Ok(_) | Err(AppendError::Conflict(_)) => {
                return Err(unreachable(format!(
                    "{} gave an answer to another question",
                    self.route.to
                )));
            }
        }
        Ok(result)
    }

    fn lost_data(&self) -> RpcError {
        unreachable(format!(
            "{} lost entries that it had acknowledged",
            self.route.to
        ))
    }

    /// Sends a heartbeat together with those of other groups.
    async fn beat(&self, request: &AppendRequest) -> Result<AppendResult, RpcError> {
        let sent = self.note(request);
        if self.replica.has_lost_data(sent.epoch, self.route.to) {
            return Err(self.lost_data());
        }
        let heartbeat = Heartbeat::new(self.route, request);
        match self
            .context
            .heartbeats
            .send(self.route.to.broker(), heartbeat)
            .await
        {
            Some(answer) => self.conclude(&sent, answer),
            None => Err(unreachable(format!("no answer from {}", self.route.to))),
        }
    }
}

/// How far an append stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// No request has been taken from openraft yet.
    New,
    Running,
    Done,
}

/// An append stream to one follower: at most `append_inflight_max` requests sent and unanswered, answers in order.
struct Pipe<S> {
    client: Client,
    input: S,
    input_ended: bool,
    stage: Stage,
    inflight: VecDeque<InFlight>,
    /// Requests that wait: for the in-sync followers, when this is the way to a witness, for room in the queue, or for company.
    held: VecDeque<Held>,
    /// What goes along with the next request.
    carried: Vec<Option<LogId>>,
    /// Answers to what went along, in front of the next one.
    ready: VecDeque<Item>,
    /// Whether the queue to the peer was full at the last attempt.
    full: bool,
    progress: watch::Receiver<u64>,
}

type Item = Result<AppendResult, RpcError>;

impl<S: Stream<Item = AppendRequest> + Unpin> Pipe<S> {
    fn new(client: Client, input: S) -> Self {
        let progress = client.replica.watch_progress();
        Self {
            client,
            input,
            input_ended: false,
            stage: Stage::New,
            inflight: VecDeque::new(),
            held: VecDeque::new(),
            carried: Vec::new(),
            ready: VecDeque::new(),
            full: false,
            progress,
        }
    }

    fn is_gated(&self) -> bool {
        self.client.route.to.is_witness()
    }

    /// Takes a request from openraft.
    fn hold(&mut self, request: AppendRequest) {
        // The metadata is to be known everywhere at once.
        let linger = if self.client.route.group == GroupId::CONTROLLER {
            Duration::ZERO
        } else {
            self.client.context.config.heartbeat_interval
        };
        let until = Instant::now() + linger;
        self.held.push_back(Held { request, until });
    }

    /// When the first waiting request goes, if it waits for company.
    fn alone_at(&self) -> Option<Instant> {
        let front = self.held.front()?;
        (front.request.entries.is_empty() && !self.input_ended).then_some(front.until)
    }

    /// The part of the first waiting request that may be sent now.
    fn next_sendable(&mut self) -> Option<AppendRequest> {
        while self.held.len() > 1
            && let Some(front) = self.held.front()
            && front.request.entries.is_empty()
        {
            self.carried.push(front.request.prev_log_id);
            self.held.pop_front();
        }
        if self.alone_at().is_some_and(|at| at > Instant::now()) {
            return None;
        }
        let gated = self.is_gated();
        let front = &mut self.held.front_mut()?.request;
        let Some(first) = front.entries.first() else {
            return self.held.pop_front().map(|held| held.request);
        };
        if gated {
            let epoch = LeaderEpoch(front.vote.leader_id().term);
            let limit = self.client.replica.witness_limit(epoch).0;
            let allowed = usize::try_from(limit.saturating_sub(first.log_id.index));
            let allowed = allowed.unwrap_or(usize::MAX);
            if allowed == 0 {
                return None;
            }
            if allowed < front.entries.len() {
                // Two requests for one, and two answers: the stream goes on without a new session.
                let rest = front.entries.split_off(allowed);
                let entries = std::mem::replace(&mut front.entries, rest);
                let prev_log_id = front.prev_log_id;
                front.prev_log_id = entries.last().map(|entry| entry.log_id);
                let (vote, leader_commit) = (front.vote, front.leader_commit);
                return Some(AppendRequest {
                    vote,
                    prev_log_id,
                    entries,
                    leader_commit,
                });
            }
        }
        self.held.pop_front().map(|held| held.request)
    }

    /// Sends what may be sent.
    fn pump(&mut self) -> Result<(), RpcError> {
        self.full = false;
        while self.inflight.len() < self.client.context.config.append_inflight_max {
            let Some(request) = self.next_sendable() else {
                return Ok(());
            };
            let sent = self.client.note(&request);
            let kept = request.clone();
            let message = append_message(self.client.route, request, self.is_gated());
            let deadline = self.client.context.config.rpc_timeout;
            match self.client.call(Lane::Data, message, deadline) {
                Ok(pending) => {
                    self.inflight.push_back(InFlight {
                        answer: pending,
                        sent,
                        carried: std::mem::take(&mut self.carried),
                    });
                }
                Err(NetError::Full { .. }) => {
                    let (request, until) = (kept, Instant::now());
                    self.held.push_front(Held { request, until });
                    self.full = true;
                    return Ok(());
                }
                Err(error) => return Err(unreachable(error)),
            }
        }
        Ok(())
    }

    fn answered(&mut self, answer: Result<Message, NetError>) -> Item {
        let Some(inflight) = self.inflight.pop_front() else {
            return Err(unreachable("an answer without a question"));
        };
        let answer = answer.map_err(unreachable)?;
        let item = match Response::decode(&answer).map_err(unreachable)? {
            Response::Append(answer) => self.client.conclude(&inflight.sent, answer),
            Response::Refused(refusal) => Err(unreachable(refusal)),
            _ => Err(unreachable(format!(
                "{} gave an answer of another kind",
                self.client.route.to
            ))),
        };
        if inflight.carried.is_empty() || !matches!(item, Ok(Ok(_))) {
            return item;
        }
        let mut items = inflight.carried.into_iter().map(|end| Ok(Ok(end)));
        let first = items.next();
        self.ready.extend(items);
        match first {
            Some(first) => {
                self.ready.push_back(item);
                first
            }
            None => item,
        }
    }

    /// Ends the stream with `error`.
    fn fail(&mut self, error: RpcError) -> Item {
        self.stage = Stage::Done;
        Err(error)
    }

    async fn next(&mut self) -> Option<Item> {
        if self.stage == Stage::Done {
            return None;
        }
        if self.stage == Stage::New {
            // openraft waits out its backoff inside `input`: an error before the first request is taken from it would be
            // retried without any pause.
            let Some(first) = self.input.next().await else {
                self.stage = Stage::Done;
                return None;
            };
            self.stage = Stage::Running;
            let epoch = LeaderEpoch(first.vote.leader_id().term);
            // The first one asks where the follower stands.
            self.held.push_back(Held {
                request: first,
                until: Instant::now(),
            });
            if self
                .client
                .replica
                .has_lost_data(epoch, self.client.route.to)
            {
                let error = self.client.lost_data();
                return Some(self.fail(error));
            }
        }
        if let Some(item) = self.ready.pop_front() {
            return Some(item);
        }
        loop {
            // Seen before the gate is looked at, so that a change in between is not missed.
            self.progress.borrow_and_update();
            if let Err(error) = self.pump() {
                return Some(self.fail(error));
            }
            if self.input_ended && self.inflight.is_empty() && self.held.is_empty() {
                self.stage = Stage::Done;
                return None;
            }
            let limit = self.client.context.config.append_inflight_max;
            // Room for two: what waits for company must not keep it away.
            let waiting = self.inflight.len() + self.held.len();
            let can_pull = !self.input_ended && waiting < limit.max(2);
            let gate_waits = self.is_gated() && !self.held.is_empty();
            let full = self.full;
            // Only when it could go then.
            let may_go = !full && self.inflight.len() < limit;
            let alone_at = self.alone_at().filter(|_| may_go);
            let front = self
                .inflight
                .front_mut()
                .map(|inflight| &mut inflight.answer);
            tokio::select! {
                biased;
                answer = poll_front(front) => {
                    let item = self.answered(answer);
                    if !matches!(item, Ok(Ok(_))) {
                        self.stage = Stage::Done;
                    }
                    return Some(item);
                }
                next = self.input.next(), if can_pull => match next {
                    Some(request) => self.hold(request),
                    None => self.input_ended = true,
                },
                changed = self.progress.changed(), if gate_waits => {
                    if changed.is_err() {
                        return Some(self.fail(unreachable("the replica is gone")));
                    }
                }
                () = tokio::time::sleep(QUEUE_RETRY), if full => {}
                () = tokio::time::sleep_until(alone_at.unwrap_or_else(Instant::now)), if alone_at.is_some() => {}
            }
        }
    }
}

/// Waits for the oldest request's answer; forever when nothing is in flight.
async fn poll_front(front: Option<&mut Pending>) -> Result<Message, NetError> {
    match front {
        Some(pending) => pending.await,
        None => std::future::pending().await,
    }
}

impl RaftNetworkV2<TypeConfig> for Client {
    type SnapshotData = Bytes;

    async fn append_entries(
        &mut self,
        request: AppendRequest,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RpcError> {
        if self.heartbeat {
            return self.beat(&request).await.map(Into::into);
        }
        let mut pipe = Pipe::new(self.clone(), stream::iter([request]));
        match pipe.next().await {
            Some(result) => result.map(Into::into),
            None => Err(unreachable("no answer")),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Item>, RpcError>>
    where
        S: Stream<Item = AppendRequest> + OptionalSend + Unpin + 'static,
    {
        let client = self.clone();
        Box::pin(async move {
            if client.heartbeat {
                let beats = stream::unfold((client, input), |(client, mut input)| async move {
                    let request = input.next().await?;
                    Some((client.beat(&request).await, (client, input)))
                });
                return Ok(Box::pin(beats) as BoxStream<'s, Item>);
            }
            let answers = stream::unfold(Pipe::new(client, input), |mut pipe| async move {
                let item = pipe.next().await?;
                Some((item, pipe))
            });
            Ok(Box::pin(answers) as BoxStream<'s, Item>)
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        self.ask_vote(request, option, false).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        self.ask_vote(request, option, true).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        tokio::select! {
            biased;
            closed = cancel => Err(StreamingError::Closed(closed)),
            result = self.send_snapshot(vote, snapshot) => result.map_err(StreamingError::from),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RpcError> {
        let question = Request::Transfer {
            route: self.route,
            leader: (*request.from_leader()).into(),
            successor: ReplicaId::from_u64(*request.to_node_id()),
            last: request.last_log_id().copied().map(entry_id),
        };
        match self.ask(&question, &option).await? {
            Response::Transfer(Ok(())) => Ok(Ok(())),
            Response::Transfer(Err(reason)) => Err(unreachable(reason)),
            _ => Err(self.odd_answer()),
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        let (first, most) = BACKOFF;
        let waits = std::iter::successors(Some(first), move |wait| Some((*wait * 2).min(most)));
        Some(Backoff::new(waits))
    }
}

impl Client {
    fn odd_answer(&self) -> RpcError {
        unreachable(format!("{} gave an answer of another kind", self.route.to))
    }

    async fn ask_vote(
        &self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
        pre: bool,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        let question = Request::Vote {
            route: self.route,
            vote: request.vote.into(),
            last: request.last_log_id.map(entry_id),
            transfer: request.leadership_transfer,
            pre,
        };
        match self.ask(&question, &option).await? {
            Response::Vote {
                vote,
                granted,
                last,
            } => Ok(VoteResponse::new(
                Vote::from(vote),
                last.map(log_id),
                granted,
            )),
            _ => Err(self.odd_answer()),
        }
    }

    /// Sends a snapshot in pieces, each within the limit of an append message and with a deadline of its own.
    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<SnapshotResponse<TypeConfig>, RpcError> {
        let Some(last) = snapshot.meta.last_log_id else {
            return Err(unreachable("there is no snapshot"));
        };
        let (sent_at, last_at_send) = (Instant::now(), self.replica.last());
        let mut rest = if self.route.to.is_witness() {
            Bytes::new()
        } else {
            snapshot.snapshot
        };
        let total = u64::try_from(rest.len()).unwrap_or(u64::MAX);
        let membership = encode_stored_membership(&snapshot.meta.last_membership);
        let mut offset = 0_u64;
        loop {
            let piece = rest.split_to(rest.len().min(self.context.config.append_bytes_max));
            let is_last = rest.is_empty();
            let head = SnapshotPiece {
                vote: vote.into(),
                last: entry_id(last),
                membership: membership.clone(),
                offset,
                total,
            };
            offset += u64::try_from(piece.len()).unwrap_or(u64::MAX);
            let mut message = Request::Snapshot(self.route, head).message();
            message.body.push(piece);
            let timeout = self.context.config.rpc_timeout;
            let deadline = if is_last {
                timeout * INSTALL_PATIENCE
            } else {
                timeout
            };
            let pending = self
                .call(Lane::Data, message, deadline)
                .map_err(unreachable)?;
            let answer = pending.await.map_err(unreachable)?;
            match Response::decode(&answer).map_err(unreachable)? {
                Response::SnapshotKept if !is_last => {}
                Response::Snapshot { vote: theirs } => {
                    let theirs = Vote::from(theirs);
                    if theirs == vote {
                        let epoch = LeaderEpoch(vote.leader_id().term);
                        let matched = Some(LogIndex(last.index));
                        let to = self.route.to;
                        self.replica
                            .acknowledged(epoch, to, matched, sent_at, last_at_send);
                    }
                    return Ok(SnapshotResponse::new(theirs));
                }
                Response::Refused(refusal) => return Err(unreachable(refusal)),
                _ => return Err(self.odd_answer()),
            }
        }
    }
}
