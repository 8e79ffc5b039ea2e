//! The bytes of one connection: how they pass in each direction while the rules of the two links change, and how its end does.
//!
//! Owns both sockets and what is under way between them: up to a piece per direction, or what a delay holds. Memory does not grow
//! while a link is cut: nothing is read then, so the sender's own buffers fill up.
//!
//! One task per connection; each direction is a future of its own, so that one being stuck does not hold up the other.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::super::links::{Link, Resets};
use super::{Gate, abort};

/// What is read at once.
const PIECE_BYTES: usize = 64 << 10;
/// What is read into when less room is left.
const ROOM_BYTES_MIN: usize = 4 << 10;
/// Bytes under way in one direction of a connection that is delayed.
const DELAYED_BYTES_MAX: usize = 1 << 20;
/// A throttled link passes pieces of this length in time, so that connections take turns.
const TURNS_PER_S: u64 = 50;
/// When one side has closed its half in order, the other half ends within this time.
const HALF_LIFE: Duration = Duration::from_secs(30);

/// The two sockets of a connection: towards the one who opened it, and towards the broker.
pub(super) struct Sides {
    pub(super) near: TcpStream,
    pub(super) far: TcpStream,
}

/// How a direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The source closed its half, and everything before that was handed on.
    Finished,
    /// Reading failed: the source is gone.
    SourceGone,
    /// Writing failed: the sink is gone.
    SinkGone,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Closed,
    Broken,
    NearGone,
    FarGone,
}

impl Sides {
    /// Passes bytes both ways until the connection ends. `first` has been read from the near side already.
    pub(super) async fn converse(
        mut self,
        gate: &Gate,
        [mut forward, mut back]: [Link; 2],
        mut resets: Resets,
        first: BytesMut,
    ) {
        let outcome = {
            let pass = self.pass(gate, &mut forward, &mut back, first);
            tokio::select! {
                biased;
                () = resets.wait() => Outcome::Broken,
                outcome = pass => outcome,
            }
        };
        // Whoever is left hears of the other's end as soon as anything may reach it. What it sends meanwhile is lost, as
        // what is sent to a host that is gone.
        let mut told = match outcome {
            Outcome::Closed => return,
            Outcome::Broken => None,
            Outcome::NearGone => Some((&mut self.far, &mut forward)),
            Outcome::FarGone => {
                gate.look().await;
                Some((&mut self.near, &mut back))
            }
        };
        if let Some((left, link)) = &mut told {
            tokio::select! {
                biased;
                () = resets.wait() => {}
                () = until_open(link) => {}
                () = discard(left) => {}
            }
        }
        abort(self.near);
        abort(self.far);
    }

    async fn pass(
        &mut self,
        gate: &Gate,
        forward: &mut Link,
        back: &mut Link,
        first: BytesMut,
    ) -> Outcome {
        let (near_read, near_write) = self.near.split();
        let (far_read, far_write) = self.far.split();
        let near_ended = AtomicBool::new(false);
        let note = async { near_ended.store(true, Ordering::Relaxed) };
        // The broker was the first to end: when its process is gone, others must find that out before they hear of this.
        let look = async {
            if !near_ended.load(Ordering::Relaxed) {
                gate.look().await;
            }
        };
        let mut there = std::pin::pin!(pump(near_read, far_write, forward, first, note));
        let mut here = std::pin::pin!(pump(far_read, near_write, back, BytesMut::new(), look));
        let (ended, rest) = tokio::select! {
            biased;
            end = &mut there => match end {
                End::SourceGone => return Outcome::NearGone,
                End::SinkGone => return Outcome::FarGone,
                End::Finished => (End::Finished, tokio::time::timeout(HALF_LIFE, here).await),
            },
            end = &mut here => match end {
                End::SourceGone => return Outcome::FarGone,
                End::SinkGone => return Outcome::NearGone,
                End::Finished => (End::Finished, tokio::time::timeout(HALF_LIFE, there).await),
            },
        };
        match (ended, rest) {
            (End::Finished, Ok(End::Finished)) => Outcome::Closed,
            _ => Outcome::Broken,
        }
    }
}

async fn until_open(link: &mut Link) {
    while link.rule().cut {
        link.changed().await;
    }
}

/// Reads until the stream ends.
async fn discard(stream: &mut TcpStream) {
    let mut rest = vec![0; 4 << 10];
    while matches!(stream.read(&mut rest).await, Ok(1..)) {}
}

/// Bytes that may be written from `due` on; the source's end when there are none.
struct Piece {
    due: Instant,
    bytes: BytesMut,
}

/// Passes bytes one way, as `link` allows, until either side ends. `before_end` is awaited before the sink is told that the
/// source has closed in order.
async fn pump(
    mut source: impl AsyncRead + Unpin,
    mut sink: impl AsyncWrite + Unpin,
    link: &mut Link,
    first: BytesMut,
    before_end: impl Future<Output = ()>,
) -> End {
    let mut queue = VecDeque::new();
    let mut queued = first.len();
    let mut ended = false;
    let mut latest = Instant::now();
    if !first.is_empty() {
        latest = link.due(latest);
        queue.push_back(Piece {
            due: latest,
            bytes: first,
        });
    }
    let mut room = BytesMut::new();
    loop {
        let rule = link.rule();
        if rule.cut {
            link.changed().await;
            continue;
        }
        let now = Instant::now();
        let next = match queue.front() {
            Some(piece) => Some(piece.due.max(link.free_at(now))),
            None => None,
        };
        if let Some(Piece { bytes, .. }) = queue.front()
            && bytes.is_empty()
            && next.is_some_and(|due| due <= now)
        {
            before_end.await;
            return match sink.shutdown().await {
                Ok(()) => End::Finished,
                Err(_) => End::SinkGone,
            };
        }
        let most = if rule.delay.is_zero() && rule.jitter.is_zero() {
            1
        } else {
            DELAYED_BYTES_MAX
        };
        let may_read = !ended && queued < most;
        let may_write = next.is_some_and(|due| due <= now);
        let turn = rule.bytes_per_s.map_or(usize::MAX, |rate| {
            usize::try_from((rate.get() / TURNS_PER_S).max(1)).unwrap_or(usize::MAX)
        });
        if may_read && room.capacity() < ROOM_BYTES_MIN {
            room.reserve(PIECE_BYTES);
        }
        let write = async {
            match queue.front_mut() {
                Some(piece) => {
                    let bytes = piece.bytes.get(..piece.bytes.len().min(turn));
                    sink.write(bytes.unwrap_or_default()).await
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = link.changed() => {}
            written = write, if may_write => {
                let Ok(written @ 1..) = written else {
                    return End::SinkGone;
                };
                queued -= written;
                link.carried(written, now);
                if let Some(piece) = queue.front_mut() {
                    piece.bytes.advance(written);
                    if piece.bytes.is_empty() {
                        queue.pop_front();
                    }
                }
            }
            () = tokio::time::sleep_until(next.unwrap_or(now)), if next.is_some() && !may_write => {}
            read = source.read_buf(&mut room), if may_read => {
                let Ok(read) = read else {
                    return End::SourceGone;
                };
                ended = read == 0;
                queued += read;
                latest = latest.max(link.due(Instant::now()));
                queue.push_back(Piece { due: latest, bytes: room.split() });
            }
        }
    }
}
