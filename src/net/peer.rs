//! The way to one peer: two connections that are kept up, and what their fate says about the peer's process.
//!
//! Owns a peer's state and its news. The judgement itself ([`decide`]) is a pure function of what is known. Decides nothing
//! about leadership.
//!
//! One task per lane. News must be fast and must not be wrong: a broken connection is tried again at once, and only a
//! refusal by every address, with no other connection of that peer alive, counts as its end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::frame::{Hello, Role};
use super::handshake::{self, Evidence, Failure};
use super::link::{Asking, End, Link, Patience};
use super::{Lane, Message, NetError, PeerEvent, PeerState, Shared};
use crate::runtime::random_seed;
use crate::types::Endpoint;

/// A broken connection that is not back within this time is reported as lost.
const LOST_GRACE: Duration = Duration::from_millis(50);
/// Waits between attempts while the handshake breaks: a dying process may still listen for a moment.
const QUICK: [Duration; 3] = [
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(20),
];
/// A connection that lived this long was a good one: the next attempt comes at once.
const GOOD_LIFE: Duration = Duration::from_secs(1);
/// Connections that may end early, one after another, before attempts are slowed down.
const FLAPS_FREE: u32 = 2;

/// What is known of one lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LaneView {
    /// Not tried yet, or just broken and being tried again.
    Trying,
    Up,
    Failed(Evidence),
}

/// The state that follows from what is known.
fn decide(before: PeerState, goodbye: bool, lanes: [LaneView; 2], inbound: bool) -> PeerState {
    if goodbye {
        return PeerState::Gone;
    }
    if lanes == [LaneView::Up; 2] {
        return PeerState::Up;
    }
    let any = |view: LaneView| lanes.contains(&view);
    let lives = inbound
        || any(LaneView::Up)
        || any(LaneView::Failed(Evidence::Alive))
        || any(LaneView::Failed(Evidence::Broke));
    let failed = lanes.iter().any(|lane| matches!(lane, LaneView::Failed(_)));
    match before {
        _ if any(LaneView::Failed(Evidence::NobodyListens)) && !lives => PeerState::Gone,
        // Silence is no sign of life.
        PeerState::Gone if !lives => PeerState::Gone,
        _ if failed => PeerState::Lost,
        before => before,
    }
}

#[derive(Debug)]
struct LaneStatus {
    view: LaneView,
    link: Option<Arc<Link>>,
    /// Why there is no connection.
    error: Option<NetError>,
}

#[derive(Debug)]
struct Status {
    state: PeerState,
    lanes: [LaneStatus; 2],
    goodbye: bool,
    stopped: bool,
}

impl Status {
    fn lane(&mut self, lane: Lane) -> &mut LaneStatus {
        let [control, data] = &mut self.lanes;
        match lane {
            Lane::Control => control,
            Lane::Data => data,
        }
    }
}

/// A peer.
#[derive(Debug)]
pub(super) struct Peer {
    endpoint: Endpoint,
    stop: CancellationToken,
    kicks: [Notify; 2],
    status: Mutex<Status>,
}

impl Peer {
    pub(super) fn new(endpoint: Endpoint, state: PeerState, stop: CancellationToken) -> Arc<Self> {
        let lane = || LaneStatus {
            view: LaneView::Trying,
            link: None,
            error: None,
        };
        let status = Status {
            state,
            lanes: [lane(), lane()],
            goodbye: false,
            stopped: false,
        };
        Arc::new(Self {
            endpoint,
            stop,
            kicks: Default::default(),
            status: Mutex::new(status),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(super) fn state(&self) -> PeerState {
        self.lock().state
    }

    fn kick(&self, lane: Lane) -> &Notify {
        let [control, data] = &self.kicks;
        match lane {
            Lane::Control => control,
            Lane::Data => data,
        }
    }

    /// The connection of `lane`, or why there is none.
    pub(super) fn link(&self, lane: Lane) -> Result<Arc<Link>, NetError> {
        let mut status = self.lock();
        let lane = status.lane(lane);
        if let Some(link) = &lane.link {
            return Ok(link.clone());
        }
        Err(lane.error.clone().unwrap_or_else(|| {
            let reason = "not connected yet".to_owned();
            NetError::Unreachable {
                address: self.endpoint.address.clone(),
                reason,
            }
        }))
    }

    /// All its connections, for a look at whether they are still admitted.
    pub(super) fn links(&self) -> Vec<Arc<Link>> {
        self.lock()
            .lanes
            .iter()
            .filter_map(|lane| lane.link.clone())
            .collect()
    }

    pub(super) fn call(
        &self,
        lane: Lane,
        kind: super::frame::Kind,
        channel: u8,
        message: Message,
        deadline: Duration,
    ) -> Result<Asking, NetError> {
        self.link(lane)?.call(kind, channel, message, deadline)
    }

    /// Starts keeping its connections up.
    pub(super) fn start(self: &Arc<Self>, shared: &Arc<Shared>) {
        for lane in [Lane::Control, Lane::Data] {
            let (stop, work) = (
                self.stop.clone(),
                keep_up(shared.clone(), self.clone(), lane),
            );
            shared.tasks.spawn(async move {
                stop.run_until_cancelled(work).await;
            });
        }
    }

    /// Ends its connections and tasks.
    pub(super) fn stop(&self) {
        self.stop.cancel();
        let mut status = self.lock();
        status.stopped = true;
        let links: Vec<_> = status
            .lanes
            .iter_mut()
            .filter_map(|lane| lane.link.take())
            .collect();
        drop(status);
        for link in links {
            link.fail(End::Dropped);
        }
    }

    /// It said goodbye: gone, until it connects again.
    pub(super) fn goodbye(&self, shared: &Shared) {
        let mut status = self.lock();
        status.goodbye = true;
        self.judge(shared, &mut status);
    }

    /// A connection from it was made: so it can be reached again, try at once.
    pub(super) fn came(&self, shared: &Shared) {
        let mut status = self.lock();
        status.goodbye = false;
        self.judge(shared, &mut status);
        for lane in [Lane::Control, Lane::Data] {
            if status.lane(lane).view != LaneView::Up {
                self.kick(lane).notify_one();
            }
        }
    }

    /// A connection from it ended: look at once.
    pub(super) fn went(&self) {
        self.kick(Lane::Control).notify_one();
    }

    fn judge(&self, shared: &Shared, status: &mut Status) {
        let broker = self.endpoint.broker;
        let [control, data] = &status.lanes;
        let lanes = [control.view, data.view];
        let inbound = shared.has_inbound(broker);
        let state = decide(status.state, status.goodbye, lanes, inbound);
        if state == status.state || status.stopped {
            return;
        }
        tracing::info!(peer = %self.endpoint, from = ?status.state, to = ?state, "peer");
        status.state = state;
        // Under the lock, so that news come in the order of the facts. Nobody may listen.
        shared.events.send(PeerEvent { broker, state }).ok();
    }

    fn set(&self, shared: &Shared, lane: Lane, view: LaneView, error: Option<NetError>) {
        let mut status = self.lock();
        let slot = status.lane(lane);
        slot.view = view;
        if error.is_some() {
            if matches!(error, Some(NetError::Refused { .. })) && slot.error != error {
                let reason = error.as_ref().map(ToString::to_string).unwrap_or_default();
                tracing::warn!(peer = %self.endpoint, ?lane, reason, "peer connection refused");
            }
            slot.error = error;
        }
        if view != LaneView::Up {
            slot.link = None;
        }
        self.judge(shared, &mut status);
    }

    /// Whether the connection is wanted.
    fn up(&self, shared: &Shared, lane: Lane, link: &Arc<Link>) -> bool {
        let mut status = self.lock();
        if status.stopped {
            return false;
        }
        status.goodbye = false;
        let slot = status.lane(lane);
        *slot = LaneStatus {
            view: LaneView::Up,
            link: Some(link.clone()),
            error: None,
        };
        self.judge(shared, &mut status);
        true
    }
}

/// Keeps one lane to one peer up, until it is dropped.
async fn keep_up(shared: Arc<Shared>, peer: Arc<Peer>, lane: Lane) {
    let mut backoff = Backoff::new(shared.config.reconnect_min, shared.config.reconnect_max);
    loop {
        shared.until_not_leaving().await;
        match attempt(&shared, &peer, lane).await {
            Ok(link) => {
                let born = Instant::now();
                let end = stay(&peer, lane, &link, shared.config.handshake_timeout).await;
                let error = match &end {
                    Some(End::Refused(reason) | End::Dismissed(reason)) => {
                        let (address, reason) = (link.address().to_owned(), reason.clone());
                        NetError::Refused { address, reason }
                    }
                    _ => NetError::Unreachable {
                        address: link.address().to_owned(),
                        reason: end.as_ref().map(ToString::to_string).unwrap_or_default(),
                    },
                };
                let wait = backoff.ended(born.elapsed());
                // Silence has lasted long enough; what was closed may be back in a moment.
                let view = match end {
                    Some(End::Silent(_) | End::Stalled(_)) => LaneView::Failed(Evidence::None),
                    _ if wait.is_zero() => LaneView::Trying,
                    _ => LaneView::Failed(Evidence::None),
                };
                peer.set(&shared, lane, view, Some(error));
                pause(&peer, lane, wait).await;
            }
            Err(failure) => {
                tracing::debug!(peer = %peer.endpoint, ?lane, error = %failure.error, "no connection");
                let evidence = failure.evidence;
                peer.set(
                    &shared,
                    lane,
                    LaneView::Failed(evidence),
                    Some(failure.error),
                );
                pause(&peer, lane, backoff.failed(evidence)).await;
            }
        }
    }
}

/// Waits before the next attempt, or until there is a reason to try at once.
async fn pause(peer: &Peer, lane: Lane, wait: Duration) {
    if wait.is_zero() {
        return;
    }
    tokio::select! {
        biased;
        () = peer.kick(lane).notified() => {}
        () = tokio::time::sleep(wait) => {}
    }
}

async fn attempt(shared: &Arc<Shared>, peer: &Arc<Peer>, lane: Lane) -> Result<Arc<Link>, Failure> {
    let identity = shared.identity();
    let hello = Hello {
        role: Role::Peer { lane, identity },
        frame_bytes_max: u32::try_from(shared.config.frame_bytes_max).unwrap_or(u32::MAX),
    };
    let Endpoint { broker, address } = &peer.endpoint;
    let check = |found: &super::Identity| {
        if found.broker != *broker {
            return Err(format!(
                "expected broker {broker}, found broker {}",
                found.broker
            ));
        }
        shared.check(found)
    };
    let mut connect = Box::pin(handshake::connect(address, &hello, check, &shared.config));
    let soon = tokio::time::timeout(LOST_GRACE, &mut connect).await;
    let (stream, greeted, _) = if let Ok(connected) = soon {
        connected?
    } else {
        // No news is bad news by now; what was known better stays.
        peer.overdue(shared, lane);
        connect.as_mut().await?
    };
    drop(connect);
    let link = Link::new(address.clone(), &greeted, &shared.config);
    let (read, write) = stream.into_split();
    let misses = shared.config.keepalive_misses;
    let patience = Patience {
        interval: shared.config.keepalive_interval,
        silent: misses,
        stalled: shared.config.client_misses.max(misses),
    };
    link.start_writer(write, patience, &shared.tasks, shared.stop.clone());
    let (reader, frame_bytes_max) = (link.clone(), shared.config.frame_bytes_max);
    shared
        .tasks
        .spawn_graceful(async move { reader.read_answers(read, frame_bytes_max).await });
    if !peer.up(shared, lane, &link) {
        link.fail(End::Dropped);
    }
    // Who is admitted may have changed since the handshake.
    if let Err(reason) = shared.check_link(&link) {
        link.dismiss(&reason);
    }
    Ok(link)
}

impl Peer {
    fn overdue(&self, shared: &Shared, lane: Lane) {
        let mut status = self.lock();
        let slot = status.lane(lane);
        if slot.view == LaneView::Trying {
            slot.view = LaneView::Failed(Evidence::None);
            self.judge(shared, &mut status);
        }
    }
}

/// Waits for the connection's end. A hint that the process is gone is followed at once.
async fn stay(peer: &Peer, lane: Lane, link: &Link, timeout: Duration) -> Option<End> {
    loop {
        tokio::select! {
            biased;
            () = link.ended() => return link.end(),
            () = peer.kick(lane).notified() => {}
        }
        let evidence = tokio::select! {
            biased;
            () = link.ended() => return link.end(),
            evidence = handshake::probe(&peer.endpoint.address, timeout) => evidence,
        };
        if evidence == Evidence::NobodyListens {
            link.fail(End::Failed("nobody listens there any more".to_owned()));
        }
    }
}

/// When to try again.
struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
    broken: usize,
    flaps: u32,
    random: StdRng,
}

impl Backoff {
    fn new(min: Duration, max: Duration) -> Self {
        let random = StdRng::seed_from_u64(random_seed());
        Self {
            min,
            max,
            failures: 0,
            broken: 0,
            flaps: 0,
            random,
        }
    }

    /// A connection ended.
    fn ended(&mut self, lived: Duration) -> Duration {
        (self.failures, self.broken) = (0, 0);
        self.flaps = if lived < GOOD_LIFE { self.flaps + 1 } else { 0 };
        match self.flaps.checked_sub(FLAPS_FREE) {
            None | Some(0) => Duration::ZERO,
            Some(flaps) => self.step(flaps - 1),
        }
    }

    /// An attempt failed.
    fn failed(&mut self, evidence: Evidence) -> Duration {
        if evidence == Evidence::Broke
            && let Some(wait) = QUICK.get(self.broken)
        {
            self.broken += 1;
            return *wait;
        }
        self.failures = self.failures.saturating_add(1);
        self.step(self.failures - 1)
    }

    fn step(&mut self, doublings: u32) -> Duration {
        let wait = self
            .min
            .saturating_mul(1 << doublings.min(16))
            .min(self.max);
        // Jitter, so that brokers that lost each other together do not come back in step.
        wait.mul_f64(self.random.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a peer is called gone on hard evidence only. Method: what may be known, as a table.
    #[test]
    fn only_hard_evidence_makes_a_peer_gone() {
        use LaneView::{Failed, Trying, Up};
        use PeerState::{Gone, Lost, Unknown};
        let refused = Failed(Evidence::NobodyListens);
        let silent = Failed(Evidence::None);
        let broke = Failed(Evidence::Broke);
        let alive = Failed(Evidence::Alive);
        let cases = [
            // before, lanes, connections from it, after
            (Unknown, [Trying, Trying], false, Unknown),
            (Unknown, [Up, Trying], false, Unknown),
            (Unknown, [Up, Up], false, PeerState::Up),
            (PeerState::Up, [Trying, Up], true, PeerState::Up),
            (PeerState::Up, [refused, Trying], false, Gone),
            (PeerState::Up, [refused, refused], false, Gone),
            (PeerState::Up, [refused, refused], true, Lost),
            (PeerState::Up, [refused, Up], false, Lost),
            (PeerState::Up, [refused, alive], false, Lost),
            (PeerState::Up, [refused, broke], false, Lost),
            (PeerState::Up, [silent, Trying], false, Lost),
            (PeerState::Up, [alive, alive], false, Lost),
            (Lost, [Up, Trying], true, Lost),
            (Lost, [refused, silent], false, Gone),
            (Gone, [silent, silent], false, Gone),
            (Gone, [Trying, silent], false, Gone),
            (Gone, [broke, silent], false, Lost),
            (Gone, [alive, refused], false, Lost),
            (Gone, [Up, Trying], false, Gone),
            (Gone, [Up, Up], true, PeerState::Up),
        ];
        for (before, lanes, inbound, after) in cases {
            assert_eq!(
                decide(before, false, lanes, inbound),
                after,
                "{before:?} {lanes:?} {inbound}"
            );
            assert_eq!(decide(before, true, lanes, inbound), Gone);
        }
    }

    /// Goal: the first attempt after a good connection comes at once, and nothing makes attempts follow without a wait for
    /// ever. Method: the waits of long rows of failures.
    #[test]
    fn attempts_slow_down_within_their_bounds() {
        let (min, max) = (Duration::from_millis(50), Duration::from_secs(1));
        let mut backoff = Backoff::new(min, max);
        assert_eq!(backoff.ended(GOOD_LIFE), Duration::ZERO);
        let waits: Vec<_> = (0..40)
            .map(|_| backoff.failed(Evidence::NobodyListens))
            .collect();
        assert!(
            waits.iter().all(|wait| (min / 2..=max).contains(wait)),
            "{waits:?}"
        );
        assert!(
            waits.iter().skip(8).all(|wait| *wait >= max / 2),
            "{waits:?}"
        );
        let waits: Vec<_> = (0..40).map(|_| backoff.failed(Evidence::Broke)).collect();
        assert!(
            waits.iter().skip(QUICK.len()).all(|wait| *wait >= max / 2),
            "{waits:?}"
        );
        assert_eq!(backoff.ended(GOOD_LIFE), Duration::ZERO);
        let waits: Vec<_> = (0..40).map(|_| backoff.ended(Duration::ZERO)).collect();
        assert!(waits.iter().take(2).all(Duration::is_zero), "{waits:?}");
        assert!(
            waits.iter().skip(10).all(|wait| *wait >= max / 2),
            "{waits:?}"
        );
    }
}
