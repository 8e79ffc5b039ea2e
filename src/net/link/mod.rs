//! One established connection: what waits to be sent, what waits for an answer, and the tasks that read, write and watch it.
//!
//! Owns the bounds of a connection: bytes queued, bytes of unanswered requests, silence. Does not know how the connection
//! came about nor who wants it again: see `peer` for that.
//!
//! Two tasks per connection: one reads (`read`); one writes (`write`), sends signs of life, watches for silence and runs the deadlines.
//! One lock, held for moments, never across an await and never while foreign code runs.

mod read;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(super) use self::write::Patience;
use super::frame::{FrameError, Kind, SendQueue, frame_length};
use super::handshake::Greeted;
use super::{Identity, Message, NetConfig, NetError, Origin};

/// How long a refusal may take to get out before the connection is closed anyway.
const FINISH_TIME: Duration = Duration::from_secs(1);

static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum End {
    #[error("closed by the other side")]
    Closed,
    #[error("closed by the other side in the middle of a frame, {0} bytes into it")]
    Truncated(usize),
    #[error("{0}")]
    Failed(String),
    #[error("nothing was heard for {0:?}")]
    Silent(Duration),
    #[error("nothing could be sent for {0:?}")]
    Stalled(Duration),
    #[error("{0}")]
    Garbage(#[from] FrameError),
    #[error("{0}")]
    Violation(&'static str),
    #[error("the other side refused: {0}")]
    Refused(String),
    #[error("refused by this side: {0}")]
    Dismissed(String),
    #[error("given up by this side")]
    Dropped,
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

type Answer = oneshot::Sender<Result<Message, NetError>>;

#[derive(Debug)]
struct Asked {
    answer: Answer,
    deadline: Instant,
    after: Duration,
}

#[derive(Debug, Default)]
struct State {
    queue: SendQueue,
    asked: BTreeMap<u64, Asked>,
    deadlines: BTreeSet<(Instant, u64)>,
    /// When the watcher will look at the deadlines next; `None`: not before it is told.
    armed: Option<Instant>,
    next_correlation: u64,
    /// Bytes of requests from the other side that were not answered yet.
    unanswered: usize,
    /// The reader waits for `unanswered` or the queue to shrink.
    reader_waits: bool,
    /// Write what is queued until then, and close.
    finish_by: Option<Instant>,
    end: Option<End>,
    /// A message that is to be sent once more.
    #[cfg(feature = "sim")]
    repeated: Option<(Kind, u8, u64, Message)>,
}

#[cfg(feature = "sim")]
impl State {
    /// A message between replicas may arrive once more, behind a later one. Its second answer finds nobody who waits for it.
    fn repeat(&mut self, kind: Kind, channel: u8, correlation: u64, message: Message) {
        if channel != super::Channel::Raft.to_byte() || !crate::runtime::sim::repeats() {
            return;
        }
        let later = self.repeated.replace((kind, channel, correlation, message));
        if let Some((kind, channel, correlation, message)) = later {
            self.queue.push(kind, channel, correlation, message);
        }
    }
}

/// An established connection.
#[derive(Debug)]
pub(super) struct Link {
    id: u64,
    address: String,
    remote: SocketAddr,
    identity: Option<Identity>,
    /// Largest frame the other side takes, in bytes.
    frame_bytes_max: usize,
    send_queue_bytes: usize,
    receive_bytes: usize,
    state: Mutex<State>,
    /// Something to write.
    wake: Notify,
    /// An earlier deadline than the watcher is armed for.
    rearm: Notify,
    /// The reader may go on.
    room: Notify,
    ended: CancellationToken,
    /// Counts reads and writes that moved bytes; compared by the watcher.
    reads: AtomicU64,
    writes: AtomicU64,
}

impl Link {
    pub(super) fn new(address: String, greeted: &Greeted, config: &NetConfig) -> Arc<Self> {
        Arc::new(Self {
            id: NEXT_CONNECTION.fetch_add(1, Ordering::Relaxed),
            address,
            remote: greeted.remote,
            identity: greeted.identity,
            frame_bytes_max: greeted.frame_bytes_max.min(config.frame_bytes_max),
            send_queue_bytes: config.send_queue_bytes,
            receive_bytes: config.receive_bytes,
            state: Mutex::default(),
            wake: Notify::new(),
            rearm: Notify::new(),
            room: Notify::new(),
            ended: CancellationToken::new(),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Who is at the other end; `None` for a client.
    pub(super) fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    pub(super) fn origin(&self) -> Origin {
        let broker = self
            .identity
            .map(|identity| (identity.broker, identity.incarnation));
        Origin {
            broker,
            connection: self.id,
            remote: self.remote,
        }
    }

    /// Resolves when the connection is over and every request on it has its result.
    pub(super) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    pub(super) fn is_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Why it ended, once it has.
    pub(super) fn end(&self) -> Option<End> {
        self.lock().end.clone()
    }

    /// Requests that wait for their answer.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        let state = self.lock();
        assert_eq!(state.asked.len(), state.deadlines.len());
        state.asked.len()
    }

    /// Writes so far.
    #[cfg(test)]
    pub(super) fn signs_of_life(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Queues a request at once.
    pub(super) fn call(
        self: &Arc<Self>,
        kind: Kind,
        channel: u8,
        message: Message,
        after: Duration,
    ) -> Result<Asking, NetError> {
        let bytes = frame_length(&message);
        if bytes > self.frame_bytes_max {
            let (address, max) = (self.address.clone(), self.frame_bytes_max);
            return Err(NetError::TooLarge {
                address,
                bytes,
                max,
            });
        }
        let now = Instant::now();
        // A deadline beyond what the clock can say never comes.
        let deadline = now
            .checked_add(after)
            .unwrap_or(now + Duration::from_secs(1 << 30));
        let (sender, answer) = oneshot::channel();
        let mut state = self.lock();
        if state.end.is_some() || state.finish_by.is_some() {
            let reason = state
                .end
                .as_ref()
                .map_or("it is being closed".to_owned(), End::to_string);
            return Err(NetError::Unreachable {
                address: self.address.clone(),
                reason,
            });
        }
        if state.queue.bytes() > 0 && state.queue.bytes() + bytes > self.send_queue_bytes {
            return Err(NetError::Full {
                address: self.address.clone(),
            });
        }
        state.next_correlation += 1;
        let correlation = state.next_correlation;
        state.asked.insert(
            correlation,
            Asked {
                answer: sender,
                deadline,
                after,
            },
        );
        state.deadlines.insert((deadline, correlation));
        let earlier = state.armed.is_none_or(|armed| deadline < armed);
        if earlier {
            // Armed for it now: the next call with the same deadline or a later one wakes nobody.
            state.armed = Some(deadline);
        }
        #[cfg(feature = "sim")]
        let copy = message.clone();
        state.queue.push(kind, channel, correlation, message);
        #[cfg(feature = "sim")]
        state.repeat(kind, channel, correlation, copy);
        drop(state);
        self.wake.notify_one();
        if earlier {
            self.rearm.notify_one();
        }
        Ok(Asking {
            answer,
            link: self.clone(),
            correlation: Some(correlation),
        })
    }

    /// Gives the answer to the one who asked; nobody waits for it when it comes after the deadline.
    fn answered(&self, correlation: u64, answer: Result<Message, NetError>) {
        let mut state = self.lock();
        if let Some(asked) = state.asked.remove(&correlation) {
            state.deadlines.remove(&(asked.deadline, correlation));
            drop(state);
            asked.answer.send(answer).ok(); // the asking side may have gone meanwhile
        }
    }

    fn forget(&self, correlation: u64) {
        let mut state = self.lock();
        if let Some(asked) = state.asked.remove(&correlation) {
            state.deadlines.remove(&(asked.deadline, correlation));
        }
    }

    /// Queues an answer to the other side and gives back what its request counted.
    pub(super) fn answer(&self, channel: u8, correlation: u64, message: Message) {
        let bytes = frame_length(&message);
        if bytes > self.frame_bytes_max {
            let (to, max) = (&self.address, self.frame_bytes_max);
            tracing::warn!(%to, bytes, max, "answer is larger than the receiver takes, dropped");
            return;
        }
        let mut state = self.lock();
        if state.end.is_some() {
            return;
        }
        if state.queue.bytes() > 0 && state.queue.bytes() + bytes > self.send_queue_bytes {
            drop(state);
            // The reader stopped taking requests long before; this one asks for more than it reads.
            self.fail(End::Violation("it does not read the answers it asked for"));
            return;
        }
        state
            .queue
            .push(Kind::Response, channel, correlation, message);
        drop(state);
        self.wake.notify_one();
    }

    pub(super) fn release(&self, charge: usize) {
        let mut state = self.lock();
        assert!(
            charge <= state.unanswered,
            "{charge} bytes released of {}",
            state.unanswered
        );
        state.unanswered -= charge;
        let waits = state.reader_waits;
        drop(state);
        if waits {
            self.room.notify_one();
        }
    }

    /// Ends the connection at once; requests in flight are lost.
    pub(super) fn fail(&self, end: End) {
        let mut state = self.lock();
        if state.end.is_some() {
            return;
        }
        tracing::debug!(connection = self.id, to = %self.address, %end, "connection ended");
        state.end = Some(end);
        state.queue.clear();
        state.deadlines.clear();
        let asked = std::mem::take(&mut state.asked);
        drop(state);
        // Dropped senders are what the callers see as `Lost`; before `ended`, so that who waits for that finds them done.
        drop(asked);
        self.ended.cancel();
    }

    /// Tells the other side why, then ends the connection.
    pub(super) fn dismiss(&self, reason: &str) {
        let mut state = self.lock();
        if state.end.is_some() || state.finish_by.is_some() {
            return;
        }
        let header = Bytes::copy_from_slice(reason.as_bytes());
        state.queue.push(
            Kind::Refusal,
            0,
            0,
            Message {
                header,
                body: Vec::new(),
            },
        );
        state.finish_by = Some(Instant::now() + FINISH_TIME);
        drop(state);
        tracing::debug!(connection = self.id, to = %self.address, reason, "connection refused");
        self.wake.notify_one();
        self.rearm.notify_one();
    }
}

/// A request on its way; forgotten when dropped.
#[derive(Debug)]
pub(super) struct Asking {
    answer: oneshot::Receiver<Result<Message, NetError>>,
    link: Arc<Link>,
    correlation: Option<u64>,
}

impl Future for Asking {
    type Output = Result<Message, NetError>;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        let answer = std::task::ready!(std::pin::Pin::new(&mut self.answer).poll(context));
        self.correlation = None;
        let lost = |_| {
            Err(NetError::Lost {
                address: self.link.address.clone(),
            })
        };
        std::task::Poll::Ready(answer.unwrap_or_else(lost))
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        if let Some(correlation) = self.correlation {
            self.link.forget(correlation);
        }
    }
}
