//! The writing half of a connection, and its watch: deadlines, signs of life, silence.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{Asked, End, Link};
use crate::net::frame::Kind;
use crate::net::socket::OwnedWriteHalf;
use crate::net::{Message, NetError};
use crate::runtime::Tasks;

/// Pieces per system call.
const PIECES_MAX: usize = 64;

/// How long silence is borne, in intervals of signs of life.
#[derive(Debug, Clone, Copy)]
pub(in crate::net) struct Patience {
    pub(in crate::net) interval: Duration,
    pub(in crate::net) silent: u32,
    pub(in crate::net) stalled: u32,
}

impl Link {
    /// Starts the task that writes and watches. It ends with the connection or with `stop` and `tasks`.
    pub(in crate::net) fn start_writer(
        self: &Arc<Self>,
        half: OwnedWriteHalf,
        patience: Patience,
        tasks: &Tasks,
        stop: CancellationToken,
    ) {
        let link = self.clone();
        let tasks_ = tasks.clone();
        tasks.spawn_graceful(async move {
            let end = {
                let mut write = pin!(link.write(half));
                let mut watch = pin!(link.watch(patience));
                tokio::select! {
                    biased;
                    () = link.ended.cancelled() => End::Dropped,
                    () = tasks_.stopped() => End::Dropped,
                    () = stop.cancelled() => End::Dropped,
                    end = &mut write => end,
                    end = &mut watch => end,
                }
            };
            link.fail(end);
        });
    }

    async fn write(&self, mut half: OwnedWriteHalf) -> End {
        let mut batch = VecDeque::new();
        loop {
            let finish = {
                let mut state = self.lock();
                state.queue.take(&mut batch);
                state.finish_by.is_some()
            };
            if batch.is_empty() {
                if finish {
                    half.shutdown().await.ok(); // it ends anyway
                    return End::Dismissed("told so".to_owned());
                }
                self.wake.notified().await;
                if self.is_shared() {
                    // Whoever else is about to send goes first: what they all have to say leaves in one system call. tokio
                    // would otherwise run this task right behind the first of them.
                    tokio::task::yield_now().await;
                }
                continue;
            }
            while !batch.is_empty() {
                let written = match write_some(&mut half, &batch).await {
                    Ok(0) => return End::Closed,
                    Ok(written) => written,
                    Err(error) => return error.into(),
                };
                advance(&mut batch, written);
                self.writes.fetch_add(1, Ordering::Relaxed);
                let mut state = self.lock();
                if state.end.is_some() {
                    return End::Dropped;
                }
                state.queue.written(written);
                let reader = state.reader_waits;
                drop(state);
                if reader {
                    self.room.notify_one();
                }
            }
        }
    }

    /// Whether several requests are under way, in either direction.
    fn is_shared(&self) -> bool {
        let state = self.lock();
        state.asked.len() > 1 || state.unanswered > 0
    }

    /// Deadlines, signs of life, and silence. Silence is counted in ticks, not in time: after a pause of this whole process
    /// the reader gets its turn before the connection is given up.
    async fn watch(&self, patience: Patience) -> End {
        let mut tick = tokio::time::interval(patience.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.reset();
        let (mut reads, mut writes, mut silent, mut stalled) = (0, 0, 0_u32, 0_u32);
        loop {
            let next = {
                let mut state = self.lock();
                let first = state.deadlines.first().map(|(deadline, _)| *deadline);
                let next = first.into_iter().chain(state.finish_by).min();
                state.armed = next;
                next
            };
            tokio::select! {
                biased;
                () = self.rearm.notified() => {}
                () = until(next) => {
                    if self.expire() {
                        return End::Dropped;
                    }
                }
                _ = tick.tick() => {
                    let (reads_now, writes_now) =
                        (self.reads.load(Ordering::Relaxed), self.writes.load(Ordering::Relaxed));
                    let (reader_waits, queued) = {
                        let state = self.lock();
                        (state.reader_waits, state.queue.bytes())
                    };
                    silent = if reads_now != reads || reader_waits { 0 } else { silent + 1 };
                    stalled = if writes_now != writes || queued == 0 { 0 } else { stalled + 1 };
                    if silent >= patience.silent {
                        return End::Silent(patience.interval * silent);
                    }
                    if stalled >= patience.stalled {
                        return End::Stalled(patience.interval * stalled);
                    }
                    if writes_now == writes && queued == 0 {
                        self.lock().queue.push(Kind::Alive, 0, 0, Message::default());
                        self.wake.notify_one();
                    }
                    (reads, writes) = (reads_now, writes_now);
                }
            }
        }
    }

    /// Answers what is due; whether the connection is to end.
    fn expire(&self) -> bool {
        let now = Instant::now();
        let mut due = Vec::new();
        let mut state = self.lock();
        while let Some((deadline, correlation)) = state.deadlines.first().copied() {
            if deadline > now {
                break;
            }
            state.deadlines.pop_first();
            due.extend(state.asked.remove(&correlation));
        }
        let finished = state.finish_by.is_some_and(|by| by <= now);
        drop(state);
        for Asked { answer, after, .. } in due {
            let address = self.address.clone();
            answer.send(Err(NetError::Timeout { address, after })).ok(); // nobody may wait any more
        }
        finished
    }
}

async fn write_some(half: &mut OwnedWriteHalf, batch: &VecDeque<Bytes>) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); PIECES_MAX];
    let mut count = 0;
    for (slot, piece) in slices.iter_mut().zip(batch) {
        *slot = IoSlice::new(piece);
        count += 1;
    }
    half.write_vectored(slices.get(..count).unwrap_or_default())
        .await
}

fn advance(batch: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(front) = batch.front_mut() {
        if written < front.len() {
            front.advance(written);
            return;
        }
        written -= front.len();
        batch.pop_front();
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
