//! The reading half of a connection: answers to the one who asked, requests to the handler, within their budget.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::AsyncReadExt;

use super::{End, Link};
use crate::net::frame::{Decoder, Frame, Kind};
use crate::net::socket::OwnedReadHalf;
use crate::net::{Channel, Handler, Message, Origin, Reply};

/// What an unanswered request counts besides its own bytes: the bookkeeping it causes.
const REQUEST_OVERHEAD_BYTES: usize = 256;

impl Link {
    /// Reads answers: the side that connected. Ends with the connection.
    pub(in crate::net) async fn read_answers(&self, half: OwnedReadHalf, frame_bytes_max: usize) {
        let mut reader = Reader {
            half,
            decoder: Decoder::new(frame_bytes_max),
            link: self,
        };
        let read = async {
            loop {
                let frame = match reader.frame().await {
                    Ok(frame) => frame,
                    Err(end) => return end,
                };
                match frame.kind {
                    Kind::Response => self.answered(frame.correlation, Ok(frame.into_message())),
                    Kind::Alive => {}
                    Kind::Refusal => return End::Refused(frame.refusal_text()),
                    Kind::Request | Kind::Hello | Kind::Goodbye => {
                        return End::Violation("it asks on a connection that it should answer on");
                    }
                }
            }
        };
        let end = tokio::select! {
            biased;
            () = self.ended.cancelled() => End::Dropped,
            end = read => end,
        };
        self.finish(end);
    }

    /// Reads requests and hands them over in order: the side that accepted. Ends with the connection, and with it `closed`
    /// has been called, after the last message.
    pub(in crate::net) async fn read_requests(
        self: &Arc<Self>,
        half: OwnedReadHalf,
        frame_bytes_max: usize,
        handler: Arc<dyn Handler>,
        goodbye: impl Fn() + Send,
    ) {
        // Also when the handler panics: nothing more comes, and the connection must not stay open unread.
        let guard = Closing {
            link: self,
            origin: self.origin(),
            handler,
        };
        let mut reader = Reader {
            half,
            decoder: Decoder::new(frame_bytes_max),
            link: self,
        };
        let read = async {
            loop {
                let frame = match reader.frame().await {
                    Ok(frame) => frame,
                    Err(end) => return end,
                };
                let correlation = frame.correlation;
                match frame.kind {
                    Kind::Request => {
                        let Some(channel) = Channel::from_byte(frame.channel) else {
                            return End::Violation("it asks on an unknown channel");
                        };
                        if channel == Channel::Raft && self.identity.is_none() {
                            return End::Violation("a client sends what only a broker may");
                        }
                        let charge = REQUEST_OVERHEAD_BYTES + frame.content_bytes();
                        self.admit(charge).await;
                        let reply = Reply {
                            link: self.clone(),
                            channel: frame.channel,
                            correlation,
                            charge,
                        };
                        guard
                            .handler
                            .handle(&guard.origin, channel, frame.into_message(), reply);
                    }
                    Kind::Goodbye if self.identity.is_some() => {
                        goodbye();
                        self.answer(0, correlation, Message::default());
                    }
                    Kind::Alive => {}
                    Kind::Refusal => return End::Refused(frame.refusal_text()),
                    Kind::Response | Kind::Hello | Kind::Goodbye => {
                        return End::Violation(
                            "it sends what only the other side of a connection may",
                        );
                    }
                }
            }
        };
        let end = tokio::select! {
            biased;
            () = self.ended.cancelled() => End::Dropped,
            end = read => end,
        };
        self.finish(end);
        drop(guard);
    }

    fn finish(&self, end: End) {
        if matches!(end, End::Garbage(_) | End::Violation(_)) {
            tracing::warn!(connection = self.id, remote = %self.remote, %end, "closing connection");
        }
        self.fail(end);
    }

    /// Waits until a request of `charge` bytes fits: unanswered bytes below their limit (or none: a request alone always
    /// fits), and answers being read by the other side.
    async fn admit(&self, charge: usize) {
        loop {
            {
                let mut state = self.lock();
                let fits = state.unanswered == 0 || state.unanswered + charge <= self.receive_bytes;
                if fits && state.queue.bytes() <= self.send_queue_bytes / 2 {
                    state.unanswered += charge;
                    state.reader_waits = false;
                    return;
                }
                state.reader_waits = true;
            }
            self.room.notified().await;
        }
    }
}

struct Closing<'a> {
    link: &'a Link,
    origin: Origin,
    handler: Arc<dyn Handler>,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.link.fail(End::Dropped);
        self.handler.closed(&self.origin);
    }
}

struct Reader<'a> {
    half: OwnedReadHalf,
    decoder: Decoder,
    link: &'a Link,
}

impl Reader<'_> {
    async fn frame(&mut self) -> Result<Frame, End> {
        loop {
            if let Some(frame) = self.decoder.next()? {
                return Ok(frame);
            }
            if self.half.read_buf(self.decoder.buffer()).await? == 0 {
                let unfinished = self.decoder.unfinished();
                return Err(if unfinished == 0 {
                    End::Closed
                } else {
                    End::Truncated(unfinished)
                });
            }
            self.link.reads.fetch_add(1, Ordering::Relaxed);
        }
    }
}
