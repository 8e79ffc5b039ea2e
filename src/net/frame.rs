//! Frames: how messages become bytes and bytes become messages. Pure; no socket is touched here.
//!
//! Owns the byte layout, mirrored in `docs/protocol.md`, the decoder with its bounds, and the queue in which frames wait
//! to be written. Does not know what a message means.
//!
//! ```text
//! u32 length | u8 kind | u8 channel | u64 correlation | u32 header length | header | body
//! ```
//!
//! All integers are big-endian; `length` counts what follows it.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::{Channel, Identity, Lane, Message};

/// First bytes of every connection, both ways. Read as a length they are above any limit, so no other length-delimited
/// protocol is mistaken for this one.
pub(super) const MAGIC: [u8; 6] = *b"LGBOOM";
/// Sent behind the magic. Magic, version and the refusal frame keep their form in all versions.
pub(super) const VERSION: u16 = 1;
/// Magic and version.
pub(super) const PREAMBLE_BYTES: usize = 8;
/// The length field.
pub(super) const LENGTH_BYTES: usize = 4;
/// Kind, channel, correlation id and header length.
pub(super) const FIXED_BYTES: usize = 14;
/// Largest frame before the handshake is done, in bytes.
pub(super) const HANDSHAKE_BYTES_MAX: usize = 16 << 10;

/// What is read at once when nothing is known about what comes.
pub(super) const CHUNK_BYTES: usize = 64 << 10;
/// Smaller frames are copied out of the read buffer: a kept message then never pins more than a few times its size.
const COPY_BELOW_BYTES: usize = 4 << 10;
/// Smaller pieces are copied into the send buffer: one system call for many frames, few pieces.
const GATHER_BELOW_BYTES: usize = 2 << 10;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// The handshake: [`Hello`] from the one who connects, [`Welcome`] from the one who accepts.
    Hello = 1,
    /// The connection is refused; the header is the reason as UTF-8. The last frame.
    Refusal = 2,
    /// A request; answered by a response with the same correlation id.
    Request = 3,
    /// An answer.
    Response = 4,
    /// The sending broker is leaving; answered by an empty response.
    Goodbye = 5,
    /// A sign of life.
    Alive = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Refusal,
            3 => Self::Request,
            4 => Self::Response,
            5 => Self::Goodbye,
            6 => Self::Alive,
            _ => return None,
        })
    }
}

impl Channel {
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Raft,
            2 => Self::Api,
            _ => return None,
        })
    }

    pub(super) fn to_byte(self) -> u8 {
        match self {
            Self::Raft => 1,
            Self::Api => 2,
        }
    }
}

/// Who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Role {
    /// A client: may send on [`Channel::Api`] only.
    Client,
    /// A broker.
    Peer {
        /// What the connection is for.
        lane: Lane,
        /// Who it is.
        identity: Identity,
    },
}

/// The first frame of the one who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) role: Role,
    /// Largest frame it takes, in bytes.
    pub(super) frame_bytes_max: u32,
}

/// The answer to [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Welcome {
    pub(super) identity: Identity,
    /// Largest frame it takes, in bytes.
    pub(super) frame_bytes_max: u32,
}

/// A received frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) channel: u8,
    pub(super) correlation: u64,
    pub(super) header: Bytes,
    pub(super) body: Bytes,
}

impl Frame {
    /// Bytes of header and body.
    pub(super) fn content_bytes(&self) -> usize {
        self.header.len() + self.body.len()
    }

    pub(super) fn into_message(self) -> Message {
        let body = if self.body.is_empty() {
            Vec::new()
        } else {
            vec![self.body]
        };
        Message {
            header: self.header,
            body,
        }
    }

    /// A refusal's reason: the other side's words, cut to a line's length.
    pub(super) fn refusal_text(&self) -> String {
        let text = String::from_utf8_lossy(&self.header);
        text.chars().filter(|c| !c.is_control()).take(400).collect()
    }
}

/// Bytes that are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("a frame of {length} bytes, at most {max} are allowed")]
    TooLarge { length: usize, max: usize },
    #[error("a frame of {length} bytes, less than the {FIXED_BYTES} of its fixed part")]
    TooShort { length: usize },
    #[error("unknown kind of frame {0}")]
    UnknownKind(u8),
    #[error("a header of {header} bytes in a frame with {left} left for it")]
    Header { header: usize, left: usize },
}

struct Head {
    length: usize,
    kind: Kind,
    channel: u8,
    correlation: u64,
    header: usize,
}

/// Cuts a stream of bytes into frames. Holds less than one frame plus one read.
#[derive(Debug)]
pub(super) struct Decoder {
    buffer: BytesMut,
    frame_bytes_max: usize,
}

impl Decoder {
    pub(super) fn new(frame_bytes_max: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            frame_bytes_max,
        }
    }

    /// Where to read to. There is room for some bytes, in proportion to what has arrived rather than to what was
    /// announced: an announced length costs no memory.
    pub(super) fn buffer(&mut self) -> &mut BytesMut {
        let held = self.buffer.len();
        let wanted = match self.peek_length() {
            Some(length) => (LENGTH_BYTES + length)
                .saturating_sub(held)
                .min(held.max(CHUNK_BYTES)),
            None => CHUNK_BYTES,
        };
        // A little less room than a whole chunk is fine; the buffer is then used up before another is taken.
        if self.buffer.capacity() - held < wanted.min(CHUNK_BYTES / 8) {
            self.buffer.reserve(wanted.max(CHUNK_BYTES / 8));
        }
        &mut self.buffer
    }

    /// Bytes of an unfinished frame.
    pub(super) fn unfinished(&self) -> usize {
        self.buffer.len()
    }

    /// Bytes that the frame begun still lacks, once its length is known.
    pub(super) fn missing(&self) -> usize {
        let total = self
            .peek_length()
            .map_or(LENGTH_BYTES, |length| LENGTH_BYTES + length);
        total.saturating_sub(self.buffer.len())
    }

    fn peek_length(&self) -> Option<usize> {
        let prefix = self.buffer.first_chunk::<LENGTH_BYTES>()?;
        Some(usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX))
    }

    fn head(&self) -> Result<Option<Head>, FrameError> {
        let Some(length) = self.peek_length() else {
            return Ok(None);
        };
        if length > self.frame_bytes_max {
            return Err(FrameError::TooLarge {
                length,
                max: self.frame_bytes_max,
            });
        }
        if length < FIXED_BYTES {
            return Err(FrameError::TooShort { length });
        }
        let Some(fixed) = self.buffer.get(LENGTH_BYTES..LENGTH_BYTES + FIXED_BYTES) else {
            return Ok(None);
        };
        let mut fixed: &[u8] = fixed;
        let kind = fixed.get_u8();
        let kind = Kind::from_byte(kind).ok_or(FrameError::UnknownKind(kind))?;
        let channel = fixed.get_u8();
        let correlation = fixed.get_u64();
        let header = usize::try_from(fixed.get_u32()).unwrap_or(usize::MAX);
        let left = length - FIXED_BYTES;
        if header > left {
            return Err(FrameError::Header { header, left });
        }
        Ok(Some(Head {
            length,
            kind,
            channel,
            correlation,
            header,
        }))
    }

    /// The next whole frame. After an error the stream cannot be used any more.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(head) = self.head()? else {
            return Ok(None);
        };
        let total = LENGTH_BYTES + head.length;
        let Some(bytes) = self.buffer.get(..total) else {
            return Ok(None);
        };
        let mut content = if total < COPY_BELOW_BYTES {
            let copy = Bytes::copy_from_slice(bytes);
            self.buffer.advance(total);
            copy
        } else {
            self.buffer.split_to(total).freeze()
        };
        content.advance(LENGTH_BYTES + FIXED_BYTES);
        let header = content.split_to(head.header);
        let Head {
            kind,
            channel,
            correlation,
            ..
        } = head;
        Ok(Some(Frame {
            kind,
            channel,
            correlation,
            header,
            body: content,
        }))
    }
}

/// The value of a frame's length field.
pub(super) fn frame_length(message: &Message) -> usize {
    let body: usize = message.body.iter().map(Bytes::len).sum();
    FIXED_BYTES + message.header.len() + body
}

/// Frames that wait to be written: small pieces gathered into buffers, large ones as they came.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    segments: VecDeque<Bytes>,
    tail: BytesMut,
    bytes: usize,
}

impl SendQueue {
    /// Bytes not written yet, those taken by the writer included.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a frame whose length the caller has checked to fit in 32 bits.
    pub(super) fn push(&mut self, kind: Kind, channel: u8, correlation: u64, message: Message) {
        let length = frame_length(&message);
        self.bytes += LENGTH_BYTES + length;
        self.tail.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        self.tail.put_u8(kind as u8);
        self.tail.put_u8(channel);
        self.tail.put_u64(correlation);
        self.tail
            .put_u32(u32::try_from(message.header.len()).unwrap_or(u32::MAX));
        self.put(message.header);
        for piece in message.body {
            self.put(piece);
        }
    }

    fn put(&mut self, piece: Bytes) {
        if piece.len() < GATHER_BELOW_BYTES {
            self.tail.put_slice(&piece);
            // Many small frames make several buffers rather than one that is copied over and over to grow.
            if self.tail.len() >= CHUNK_BYTES {
                self.close_tail();
            }
        } else {
            self.close_tail();
            self.segments.push_back(piece);
        }
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.segments.push_back(self.tail.split().freeze());
        }
    }

    /// Hands everything queued to the writer.
    pub(super) fn take(&mut self, into: &mut VecDeque<Bytes>) {
        self.close_tail();
        into.append(&mut self.segments);
    }

    /// The writer wrote `bytes` of what it took.
    pub(super) fn written(&mut self, bytes: usize) {
        assert!(
            bytes <= self.bytes,
            "{bytes} bytes written, {} were queued",
            self.bytes
        );
        self.bytes -= bytes;
    }

    /// Drops what is queued; the connection is over.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// The bytes of a single frame: for the handshake.
pub(super) fn one_frame(kind: Kind, header: Bytes) -> Bytes {
    let mut queue = SendQueue::default();
    queue.push(
        kind,
        0,
        0,
        Message {
            header,
            body: Vec::new(),
        },
    );
    let mut segments = VecDeque::new();
    queue.take(&mut segments);
    segments.into_iter().flatten().collect()
}

/// Magic and version.
pub(super) fn preamble() -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    let (magic, version) = bytes.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    version.copy_from_slice(&VERSION.to_be_bytes());
    bytes
}

/// Checks the other side's preamble; the error is a refusal's text.
pub(super) fn check_preamble(bytes: [u8; PREAMBLE_BYTES]) -> Result<(), String> {
    let [magic @ .., high, low] = bytes;
    if magic != MAGIC {
        return Err("this is not the Logboom protocol".to_owned());
    }
    let version = u16::from_be_bytes([high, low]);
    if version != VERSION {
        return Err(format!(
            "protocol version {version} is not supported, this side speaks {VERSION}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(header: &[u8], body: &[&[u8]]) -> Message {
        let body = body
            .iter()
            .map(|piece| Bytes::copy_from_slice(piece))
            .collect();
        Message {
            header: Bytes::copy_from_slice(header),
            body,
        }
    }

    fn bytes_of(queue: &mut SendQueue) -> Vec<u8> {
        let mut segments = VecDeque::new();
        queue.take(&mut segments);
        segments.into_iter().flatten().collect()
    }

    /// Goal: the layout is the documented one. Method: one frame against its bytes, written out.
    #[test]
    fn layout_is_as_documented() {
        let mut queue = SendQueue::default();
        queue.push(Kind::Request, 2, 0x0102, message(b"hd", &[b"bo", b"dy"]));
        let expected = b"\0\0\0\x14\x03\x02\0\0\0\0\0\0\x01\x02\0\0\0\x02hdbody";
        assert_eq!(bytes_of(&mut queue), expected);
        assert_eq!(queue.bytes(), expected.len());
        assert_eq!(preamble(), *b"LGBOOM\0\x01");
    }

    /// Goal: an oversized, short or unknown frame is refused at once, without waiting for the rest or taking memory for it.
    /// Method: only the beginning of such frames.
    #[test]
    fn bad_beginnings_are_refused_without_memory() {
        let feed = |bytes: &[u8]| {
            let mut decoder = Decoder::new(1000);
            decoder.buffer().put_slice(bytes);
            let result = decoder.next();
            assert!(decoder.buffer.capacity() <= 2 * CHUNK_BYTES);
            result
        };
        let large = FrameError::TooLarge {
            length: 1001,
            max: 1000,
        };
        assert_eq!(feed(&1001_u32.to_be_bytes()), Err(large));
        assert_eq!(
            feed(&13_u32.to_be_bytes()),
            Err(FrameError::TooShort { length: 13 })
        );
        let unknown = b"\0\0\0\x0e\x63\0\0\0\0\0\0\0\0\0\0\0\0\0";
        assert_eq!(feed(unknown), Err(FrameError::UnknownKind(0x63)));
        let header = b"\0\0\0\x0f\x03\0\0\0\0\0\0\0\0\0\0\0\0\x02";
        assert_eq!(feed(header), Err(FrameError::Header { header: 2, left: 1 }));
        assert_eq!(feed(&1000_u32.to_be_bytes()), Ok(None));
    }

    proptest! {
        /// Goal: what is pushed comes out, whatever the sizes and however the bytes are cut.
        /// Method: random frames, random cuts.
        #[test]
        fn frames_round_trip(
            frames in prop::collection::vec((any::<u64>(), 0..3000_usize, prop::collection::vec(0..6000_usize, 0..4)), 0..12),
            cuts in prop::collection::vec(1..9000_usize, 1..20),
        ) {
            let mut queue = SendQueue::default();
            let mut expected = Vec::new();
            for (correlation, header, body) in frames {
                let header = vec![1_u8; header];
                let pieces: Vec<Bytes> = body.iter().map(|n| Bytes::from(vec![2_u8; *n])).collect();
                expected.push((correlation, header.len(), body.iter().sum::<usize>()));
                queue.push(Kind::Response, 1, correlation, Message { header: header.into(), body: pieces });
            }
            let wire = bytes_of(&mut queue);
            prop_assert_eq!(wire.len(), queue.bytes());
            let mut decoder = Decoder::new(1 << 20);
            let mut found = Vec::new();
            let mut rest = wire.as_slice();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.buffer().put_slice(now);
                rest = later;
                while let Some(frame) = decoder.next().unwrap() {
                    prop_assert!(frame.header.iter().all(|b| *b == 1));
                    prop_assert!(frame.body.iter().all(|b| *b == 2));
                    found.push((frame.correlation, frame.header.len(), frame.body.len()));
                }
                if rest.is_empty() { break; }
            }
            prop_assert_eq!(found, expected);
            prop_assert_eq!(decoder.unfinished(), 0);
        }

        /// Goal: no input makes the decoder panic or take memory out of proportion to what arrived.
        /// Method: random bytes, some behind a plausible beginning, in random cuts; the buffer is measured.
        #[test]
        fn random_bytes_never_panic_nor_take_memory(
            length in prop_oneof![0..40_u32, any::<u32>(), 900_000..1_048_576_u32],
            kind in 0..9_u8,
            noise in prop::collection::vec(any::<u8>(), 0..5000),
            cut in 1..3000_usize,
        ) {
            let mut wire = length.to_be_bytes().to_vec();
            wire.push(kind);
            wire.extend(noise);
            let mut decoder = Decoder::new(1 << 20);
            let mut fed = 0;
            'feed: for piece in wire.chunks(cut) {
                decoder.buffer().put_slice(piece);
                fed += piece.len();
                prop_assert!(decoder.buffer.capacity() <= 4 * fed + 2 * CHUNK_BYTES);
                loop {
                    match decoder.next() {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'feed,
                    }
                }
            }
        }

        /// Goal: a hostile handshake never panics. Method: random bytes as preamble and as its structured part.
        #[test]
        fn random_handshakes_never_panic(start in any::<[u8; 8]>(), noise in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(check_preamble(start).is_err() || start == preamble());
            crate::types::decode::<Hello>(&noise).ok();
            crate::types::decode::<Welcome>(&noise).ok();
        }
    }
}
