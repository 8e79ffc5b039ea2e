//! Doors for fuzzing: what this module makes of bytes from a socket.
//!
//! Owns nothing. Called by the targets in `fuzz/` and by the replay of their corpus; each door panics when a property that it
//! checks does not hold.

use std::collections::VecDeque;

use bytes::Bytes;

use super::Channel;
use super::frame::{
    CHUNK_BYTES, Decoder, Frame, HANDSHAKE_BYTES_MAX, Hello, Kind, LENGTH_BYTES, PREAMBLE_BYTES,
    SendQueue, Welcome, check_preamble, one_frame, preamble,
};
use crate::types::{decode, encode};

/// Largest frame that is accepted here, in bytes.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// A stream of frames, its preamble included, as it comes from a socket: the first byte says in how large pieces.
///
/// What is cut out and framed again is what came; the buffer grows with what has arrived, not with what was announced.
#[allow(clippy::panic, clippy::missing_panics_doc)]
pub fn frames(data: &[u8]) {
    let Some((step, stream)) = data.split_first() else {
        return;
    };
    let stream = match stream.split_first_chunk::<PREAMBLE_BYTES>() {
        Some((first, rest)) if check_preamble(*first).is_ok() => {
            assert_eq!(*first, preamble(), "another preamble was taken");
            rest
        }
        _ => stream,
    };
    let limit = if step % 2 == 0 {
        HANDSHAKE_BYTES_MAX
    } else {
        FRAME_BYTES_MAX
    };
    let mut decoder = Decoder::new(limit);
    let mut taken = 0;
    for piece in stream.chunks(usize::from(*step) * 7 + 1) {
        decoder.buffer().extend_from_slice(piece);
        assert!(
            decoder.buffer().capacity() <= 2 * stream.len() + 3 * CHUNK_BYTES,
            "an announced length cost memory"
        );
        loop {
            match decoder.next() {
                Ok(Some(frame)) => {
                    let again = framed(&frame);
                    assert_eq!(
                        stream.get(taken..taken + again.len()),
                        Some(&*again),
                        "a frame changed"
                    );
                    taken += again.len();
                    greeting(&frame);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    assert_eq!(
        stream.len() - taken,
        decoder.unfinished(),
        "bytes went missing"
    );
    assert!(
        decoder.missing() <= LENGTH_BYTES + limit,
        "it waits for too much"
    );
}

fn framed(frame: &Frame) -> Vec<u8> {
    let mut queue = SendQueue::default();
    let message = frame.clone().into_message();
    queue.push(frame.kind, frame.channel, frame.correlation, message);
    let mut pieces = VecDeque::new();
    queue.take(&mut pieces);
    pieces.into_iter().flatten().collect()
}

/// What the handshake makes of a frame.
fn greeting(frame: &Frame) {
    if let Some(channel) = Channel::from_byte(frame.channel) {
        assert_eq!(channel.to_byte(), frame.channel, "a channel changed");
    }
    let text = frame.refusal_text();
    assert!(text.chars().count() <= 400, "a refusal of any length");
    if let Ok(hello) = decode::<Hello>(&frame.header) {
        assert_eq!(decode(&encode(&hello)), Ok(hello), "a hello changed");
    }
    if let Ok(welcome) = decode::<Welcome>(&frame.header) {
        assert_eq!(decode(&encode(&welcome)), Ok(welcome), "a welcome changed");
    }
}

/// Streams to begin with.
pub fn frames_seeds() -> Vec<Vec<u8>> {
    use super::frame::Role;
    use super::{Identity, Lane};
    use crate::types::{BrokerId, ClusterId, Incarnation};
    let identity = Identity {
        broker: BrokerId(2),
        incarnation: Incarnation(7),
        cluster: Some(ClusterId(9)),
        boot: 3,
        position: 4096,
    };
    let lanes = [Lane::Control, Lane::Data].map(|lane| Role::Peer { lane, identity });
    let mut seeds = Vec::new();
    for role in lanes.into_iter().chain([Role::Client]) {
        let hello = Hello {
            role,
            frame_bytes_max: 1 << 20,
        };
        seeds.push(one_frame(Kind::Hello, encode(&hello).into()));
    }
    let welcome = Welcome {
        identity,
        frame_bytes_max: 16 << 20,
    };
    seeds.push(one_frame(Kind::Hello, encode(&welcome).into()));
    seeds.push(one_frame(Kind::Refusal, Bytes::from_static(b"no\nroom")));
    let mut queue = SendQueue::default();
    for (correlation, kind) in
        (1..).zip([Kind::Request, Kind::Response, Kind::Goodbye, Kind::Alive])
    {
        let message = super::Message {
            header: Bytes::from_static(b"header"),
            body: vec![Bytes::from(vec![7; 300])],
        };
        let channel = if correlation % 2 == 0 { 1 } else { 2 };
        queue.push(kind, channel, correlation, message);
    }
    let mut pieces = VecDeque::new();
    queue.take(&mut pieces);
    seeds.push(pieces.into_iter().flatten().collect());
    let with_preamble = |frames: &Bytes| [&[3], preamble().as_slice(), frames].concat();
    let bare = |frames: &Bytes| [&[0], frames.as_ref()].concat();
    seeds
        .iter()
        .flat_map(|frames| [with_preamble(frames), bare(frames)])
        .collect()
}
