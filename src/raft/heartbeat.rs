//! Heartbeats of all groups to one peer in one frame, and their answers likewise.
//!
//! Owns one queue and one task per peer. The first heartbeat after a quiet moment leaves at once; those that follow within
//! `heartbeat_linger` leave together. A group that is slow to answer does not delay the others: its place stays empty.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::RaftConfig;
use super::group::Group;
use super::replica::lock;
use super::wire::{AppendAnswer, Heartbeat, Refusal, Request, Response};
use crate::net::{Channel, Lane, Net, Reply};
use crate::runtime::Tasks;
use crate::types::BrokerId;

/// Heartbeats that may wait for one peer; as many groups may share it.
const QUEUE: usize = 16_384;
/// Most heartbeats in one frame.
const FRAME: usize = 1_024;

struct Queued {
    heartbeat: Heartbeat,
    answer: oneshot::Sender<AppendAnswer>,
}

/// The outbound side: collects heartbeats per peer.
pub(crate) struct Heartbeats {
    net: Net,
    tasks: Tasks,
    linger: Duration,
    timeout: Duration,
    peers: Mutex<BTreeMap<BrokerId, mpsc::Sender<Queued>>>,
}

impl Heartbeats {
    pub(crate) fn new(net: Net, tasks: Tasks, config: &RaftConfig) -> Self {
        Self {
            net,
            tasks,
            linger: config.heartbeat_linger,
            timeout: config.heartbeat_interval,
            peers: Mutex::new(BTreeMap::new()),
        }
    }

    /// Sends one heartbeat with the others to `broker`. `None` when no answer came.
    pub(crate) async fn send(
        &self,
        broker: BrokerId,
        heartbeat: Heartbeat,
    ) -> Option<AppendAnswer> {
        let (answer, answered) = oneshot::channel();
        let queue = lock(&self.peers)
            .entry(broker)
            .or_insert_with(|| self.start(broker))
            .clone();
        queue.try_send(Queued { heartbeat, answer }).ok()?;
        answered.await.ok()
    }

    fn start(&self, broker: BrokerId) -> mpsc::Sender<Queued> {
        let (sender, queue) = mpsc::channel(QUEUE);
        let (net, tasks) = (self.net.clone(), self.tasks.clone());
        let (linger, timeout) = (self.linger, self.timeout);
        self.tasks
            .spawn(async move { collect(broker, queue, &net, &tasks, linger, timeout).await });
        sender
    }
}

/// Sends what has been queued for one peer, frame by frame.
async fn collect(
    broker: BrokerId,
    mut queue: mpsc::Receiver<Queued>,
    net: &Net,
    tasks: &Tasks,
    linger: Duration,
    timeout: Duration,
) {
    let mut next_frame = Instant::now();
    while let Some(first) = queue.recv().await {
        if next_frame > Instant::now() {
            tokio::time::sleep_until(next_frame).await;
        }
        next_frame = Instant::now() + linger;
        let mut heartbeats = vec![first.heartbeat];
        let mut answers = vec![first.answer];
        while heartbeats.len() < FRAME
            && let Ok(next) = queue.try_recv()
        {
            heartbeats.push(next.heartbeat);
            answers.push(next.answer);
        }
        let message = Request::Heartbeats(heartbeats).message();
        let Ok(pending) = net.call(broker, Lane::Control, Channel::Raft, message, timeout) else {
            // Dropping the senders tells the groups that nobody answered.
            continue;
        };
        tasks.spawn(async move {
            let Ok(message) = pending.await else { return };
            let Ok(Response::Heartbeats(given)) = Response::decode(&message) else {
                return;
            };
            for (sender, answer) in answers.into_iter().zip(given) {
                if let Some(answer) = answer {
                    // The worker may have given up waiting.
                    sender.send(answer).ok();
                }
            }
        });
    }
}

/// Answers a frame of heartbeats: all groups at the same time, and without those that take longer than `patience`.
pub(crate) async fn answer(
    heartbeats: Vec<Heartbeat>,
    groups: Vec<Result<Group, Refusal>>,
    reply: Reply,
    patience: Duration,
) {
    let mut answers: Vec<Option<AppendAnswer>> = vec![None; heartbeats.len()];
    let mut waiting = FuturesUnordered::new();
    for (place, (heartbeat, group)) in heartbeats.into_iter().zip(groups).enumerate() {
        let raft = group.and_then(|group| group.raft().ok_or(Refusal::Stopped));
        waiting.push(async move {
            let raft = match raft {
                Ok(raft) => raft,
                Err(refusal) => return (place, AppendAnswer::Refused(refusal)),
            };
            let request = heartbeat.request();
            let prev = request.prev_log_id;
            let answer = match raft.append_entries(request).await {
                Ok(response) => AppendAnswer::of(&response.into_stream_result(prev, prev)),
                Err(_stopped) => AppendAnswer::Refused(Refusal::Stopped),
            };
            (place, answer)
        });
    }
    let deadline = tokio::time::sleep(patience);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            biased;
            next = waiting.next() => match next {
                Some((place, answer)) => {
                    if let Some(slot) = answers.get_mut(place) {
                        *slot = Some(answer);
                    }
                }
                None => break,
            },
            () = &mut deadline => break,
        }
    }
    reply.send(Response::Heartbeats(answers).message());
}
