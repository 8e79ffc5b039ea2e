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
        let found = group.and_then(|group| Ok((group.raft().ok_or(Refusal::Stopped)?, group)));
        waiting.push(async move {
            let (raft, group) = match found {
                Ok(found) => found,
                Err(refusal) => return (place, AppendAnswer::Refused(refusal)),
            };
            let request = heartbeat.request();
            let prev = request.prev_log_id;
            let answer = match raft.append_entries(request).await {
                Ok(response) => AppendAnswer::of(&response.into_stream_result(prev, prev)),
                Err(_stopped) => AppendAnswer::Refused(Refusal::Stopped),
            };
            if matches!(answer, AppendAnswer::Matched(..)) {
                group.replica().heard_leader();
            }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::future::join_all;

    use super::*;
    use crate::net::{Handler, Identity, Message, NetConfig, Origin, PeerState};
    use crate::raft::type_config::{AppendRequest, LogId, Vote};
    use crate::raft::wire::Route;
    use crate::types::{
        Endpoint, EntryId, GroupId, Incarnation, LeaderEpoch, LogIndex, ReplicaId, ReplicaKind,
        decode,
    };

    /// A peer that counts the heartbeats of each frame, and says to each group that it has the entry of the group's number. It has no
    /// answer for group 3.
    #[derive(Default)]
    struct Follower {
        frames: Mutex<Vec<usize>>,
    }

    fn matched(group: GroupId) -> AppendAnswer {
        AppendAnswer::Matched(Some(EntryId {
            epoch: LeaderEpoch(1),
            index: LogIndex(group.0),
        }))
    }

    impl Handler for Follower {
        fn handle(&self, _: &Origin, _: Channel, message: Message, reply: Reply) {
            let Ok(Request::Heartbeats(heartbeats)) = decode(&message.header) else {
                panic!("{message:?}");
            };
            lock(&self.frames).push(heartbeats.len());
            let groups = heartbeats.iter().map(|heartbeat| heartbeat.route.group);
            let answers = groups.map(|group| (group.0 != 3).then(|| matched(group)));
            reply.send(Response::Heartbeats(answers.collect()).message());
        }

        fn closed(&self, _: &Origin) {}
    }

    async fn bind(broker: BrokerId, tasks: &Tasks) -> Net {
        let identity = Identity {
            broker,
            incarnation: Incarnation(u128::from(broker.0)),
            cluster: None,
            boot: 1,
            position: 0,
        };
        let bound = Net::bind("127.0.0.1:0", identity, NetConfig::default(), tasks.clone());
        bound.await.unwrap()
    }

    /// Goal: whatever number of groups have a heartbeat for a peer, it costs a frame, and each group gets its own answer or none.
    /// Method: 1,500 groups, more than a frame holds, send to a real peer at the same moment.
    #[tokio::test]
    async fn heartbeats_of_all_groups_share_a_frame() {
        let tasks = Tasks::new();
        let follower = Arc::new(Follower::default());
        let (one, two) = (BrokerId(1), BrokerId(2));
        let net = bind(one, &tasks).await;
        let peer = bind(two, &tasks).await;
        peer.serve(follower.clone());
        let mut events = net.events();
        let address = peer.local_addr().to_string();
        net.set_peers(vec![Endpoint {
            broker: two,
            address,
        }]);
        while net.peer_state(two) != PeerState::Up {
            events.recv().await.unwrap();
        }
        let config = RaftConfig {
            heartbeat_interval: Duration::from_secs(20), // how long an answer is waited for
            ..RaftConfig::default()
        };
        let heartbeats = Heartbeats::new(net, tasks.clone(), &config);
        let request = AppendRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: Some(LogId::new_term_index(1, 4)),
            entries: Vec::new(),
            leader_commit: None,
        };
        let replica = |broker| ReplicaId::new(broker, ReplicaKind::Data, 1);
        let groups = || (0..1_500).map(GroupId);
        let sent = groups().map(|group| {
            let (from, to) = (replica(one), replica(two));
            let heartbeat = Heartbeat::new(Route { group, from, to }, &request);
            heartbeats.send(two, heartbeat)
        });
        let answers = join_all(sent).await;
        assert_eq!(*lock(&follower.frames), [FRAME, 1_500 - FRAME]);
        for (group, answer) in groups().zip(answers) {
            assert_eq!(answer, (group.0 != 3).then(|| matched(group)));
        }
        tasks.shutdown().await;
    }
}
