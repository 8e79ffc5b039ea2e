//! The handshake: from a fresh socket to a known counterpart, or a refusal in words.
//!
//! Owns connecting and its failures (was the process there at all?), and the first frames both ways. Keeps no connection.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[cfg(any(test, feature = "testkit"))]
use super::frame::Role;
use super::frame::{
    Decoder, FIXED_BYTES, Frame, FrameError, HANDSHAKE_BYTES_MAX, Hello, Kind, LENGTH_BYTES,
    PREAMBLE_BYTES, Welcome, check_preamble, one_frame, preamble,
};
use super::socket::{TcpStream, connect as connect_to, lookup_host};
use super::{Identity, NetConfig, NetError};
#[cfg(any(test, feature = "testkit"))]
use crate::types::BrokerId;
use crate::types::{decode, encode};

/// How long a refusal's reader is waited for, so that the refusal is not lost to a reset.
const LINGER: Duration = Duration::from_millis(200);

/// Who the other side turned out to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Greeted {
    pub(super) remote: SocketAddr,
    /// `None` for a client.
    pub(super) identity: Option<Identity>,
    /// Largest frame it takes, in bytes.
    pub(super) frame_bytes_max: usize,
}

/// What a failed attempt says about the process at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Evidence {
    /// Every address of it refused the connection: no process listens there.
    NobodyListens,
    /// Nothing: no answer, no route, no name.
    None,
    /// The connection was made and broke in the handshake: the process is starting, stopping or alive.
    Broke,
    /// The process answered.
    Alive,
}

/// A failed attempt to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) evidence: Evidence,
    pub(super) error: NetError,
}

fn unreachable(address: &str, evidence: Evidence, reason: &dyn ToString) -> Failure {
    let (address, reason) = (address.to_owned(), reason.to_string());
    Failure {
        evidence,
        error: NetError::Unreachable { address, reason },
    }
}

fn refused(address: &str, reason: String) -> Failure {
    let error = NetError::Refused {
        address: address.to_owned(),
        reason,
    };
    Failure {
        evidence: Evidence::Alive,
        error,
    }
}

/// Connects to any of the addresses `address` stands for.
async fn dial(address: &str) -> Result<TcpStream, Failure> {
    let found = match lookup_host(address).await {
        Ok(found) => found,
        Err(error) => return Err(unreachable(address, Evidence::None, &error)),
    };
    let mut evidence = Evidence::NobodyListens;
    let mut last = None;
    for one in found {
        match connect_to(one).await {
            Ok(stream) => {
                stream.set_nodelay(true).ok(); // slower without, not wrong
                return Ok(stream);
            }
            Err(error) => {
                if error.kind() != ErrorKind::ConnectionRefused {
                    evidence = Evidence::None;
                }
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) => Err(unreachable(address, evidence, &error)),
        None => Err(unreachable(
            address,
            Evidence::None,
            &"the name has no address",
        )),
    }
}

/// Whether anything listens at `address`: connects and hangs up.
pub(super) async fn probe(address: &str, timeout: Duration) -> Evidence {
    match tokio::time::timeout(timeout, dial(address)).await {
        Ok(Ok(_)) => Evidence::Broke,
        Ok(Err(failure)) => failure.evidence,
        Err(_) => Evidence::None,
    }
}

/// Connects and introduces this side. `check` looks at who answers; its refusal is sent back and becomes the error.
pub(super) async fn connect(
    address: &str,
    hello: &Hello,
    check: impl Fn(&Identity) -> Result<(), String>,
    config: &NetConfig,
) -> Result<(TcpStream, Greeted, Identity), Failure> {
    let started = tokio::time::Instant::now();
    let timeout = config.handshake_timeout;
    let late = |what: &str| {
        unreachable(
            address,
            Evidence::None,
            &format!("{what} within {timeout:?}"),
        )
    };
    let mut stream = tokio::time::timeout(timeout, dial(address))
        .await
        .map_err(|_| late("no connection"))??;
    let greet = async {
        let broke = |error: io::Error| unreachable(address, Evidence::Broke, &error);
        let mut first = preamble().to_vec();
        first.extend(one_frame(Kind::Hello, encode(hello).into()));
        stream.write_all(&first).await.map_err(broke)?;
        let mut start = [0; PREAMBLE_BYTES];
        stream.read_exact(&mut start).await.map_err(broke)?;
        // A refusal has the same form in every version: read it before the version is judged.
        let version = check_preamble(start);
        let frame = read_frame(&mut stream).await;
        if let Ok(Frame {
            kind: Kind::Refusal,
            ..
        }) = &frame
        {
            return Err(refused(
                address,
                frame.map(|f| f.refusal_text()).unwrap_or_default(),
            ));
        }
        version.map_err(|reason| refused(address, reason))?;
        let frame = frame.map_err(|error| match error {
            FirstFrame::Io(error) => broke(error),
            FirstFrame::Garbage(error) => refused(address, format!("its handshake is {error}")),
        })?;
        let welcome: Welcome = match frame.kind {
            Kind::Hello => decode(&frame.header).map_err(|error| {
                refused(address, format!("its handshake is unreadable: {error}"))
            })?,
            _ => return Err(refused(address, "it sends no handshake".to_owned())),
        };
        if let Err(reason) = check(&welcome.identity) {
            send_refusal(&mut stream, &reason).await;
            return Err(refused(address, reason));
        }
        let remote = stream.peer_addr().map_err(broke)?;
        let frame_bytes_max = usize::try_from(welcome.frame_bytes_max).unwrap_or(usize::MAX);
        let identity = welcome.identity;
        Ok((
            Greeted {
                remote,
                identity: Some(identity),
                frame_bytes_max,
            },
            identity,
        ))
    };
    let left = timeout.saturating_sub(started.elapsed());
    match tokio::time::timeout(left, greet).await {
        Ok(greeted) => greeted.map(|(greeted, identity)| (stream, greeted, identity)),
        Err(_) => Err(late("no handshake")),
    }
}

/// What the first bytes of a connection say about who opened it: for who passes connections on.
#[cfg(any(test, feature = "testkit"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Introduction {
    /// Too few bytes to tell.
    Unfinished,
    /// A broker.
    Broker(BrokerId),
    /// Anybody else: a client, or somebody who does not speak the protocol.
    Other,
}

/// Looks at the `first` bytes of a connection without taking them. At most the size of a handshake is looked at.
#[cfg(any(test, feature = "testkit"))]
pub(crate) fn introduction(first: &[u8]) -> Introduction {
    let Some((start, rest)) = first.split_first_chunk::<PREAMBLE_BYTES>() else {
        return Introduction::Unfinished;
    };
    if check_preamble(*start).is_err() {
        return Introduction::Other;
    }
    let mut decoder = Decoder::new(HANDSHAKE_BYTES_MAX);
    let most = rest.len().min(LENGTH_BYTES + HANDSHAKE_BYTES_MAX);
    let looked_at = rest.get(..most).unwrap_or_default();
    decoder.buffer().extend_from_slice(looked_at);
    let frame = match decoder.next() {
        Ok(None) => return Introduction::Unfinished,
        Ok(Some(frame)) if frame.kind == Kind::Hello => frame,
        Ok(Some(_)) | Err(_) => return Introduction::Other,
    };
    match decode::<Hello>(&frame.header).map(|hello| hello.role) {
        Ok(Role::Peer { identity, .. }) => Introduction::Broker(identity.broker),
        Ok(Role::Client) | Err(_) => Introduction::Other,
    }
}

/// Reads who connects. The error is a refusal that has been sent already, or what broke.
pub(super) async fn receive(stream: &mut TcpStream) -> Result<Hello, String> {
    stream.set_nodelay(true).ok(); // slower without, not wrong
    let mut start = [0; PREAMBLE_BYTES];
    stream
        .read_exact(&mut start)
        .await
        .map_err(|error| error.to_string())?;
    let read = async {
        check_preamble(start)?;
        let frame = match read_frame(stream).await {
            Ok(frame) => frame,
            Err(FirstFrame::Garbage(error)) => return Err(error.to_string()),
            Err(FirstFrame::Io(error)) => return Err(error.to_string()),
        };
        match frame.kind {
            Kind::Hello => decode(&frame.header).map_err(|error| error.to_string()),
            _ => Err("the first frame is no handshake".to_owned()),
        }
    };
    let hello = read.await;
    if let Err(reason) = &hello {
        refuse(stream, reason).await;
    }
    hello
}

/// Answers the one who connected.
pub(super) async fn welcome(stream: &mut TcpStream, welcome: &Welcome) -> io::Result<()> {
    let mut answer = preamble().to_vec();
    answer.extend(one_frame(Kind::Hello, encode(welcome).into()));
    stream.write_all(&answer).await
}

/// Refuses the one who connected, in words.
pub(super) async fn refuse(stream: &mut TcpStream, reason: &str) {
    if stream.write_all(&preamble()).await.is_ok() {
        send_refusal(stream, reason).await;
    }
}

async fn send_refusal(stream: &mut TcpStream, reason: &str) {
    let frame = one_frame(Kind::Refusal, Bytes::copy_from_slice(reason.as_bytes()));
    // Best effort: whoever does not listen any more need not hear it.
    if stream.write_all(&frame).await.is_ok() && stream.shutdown().await.is_ok() {
        let mut rest = [0; 1024];
        let drain = async { while matches!(stream.read(&mut rest).await, Ok(1..)) {} };
        tokio::time::timeout(LINGER, drain).await.ok();
    }
}

enum FirstFrame {
    Io(io::Error),
    Garbage(FrameError),
}

/// Reads exactly one frame, of the size a handshake may have.
async fn read_frame(stream: &mut TcpStream) -> Result<Frame, FirstFrame> {
    let mut decoder = Decoder::new(HANDSHAKE_BYTES_MAX);
    let mut wanted = LENGTH_BYTES + FIXED_BYTES;
    loop {
        let mut piece = vec![0; wanted];
        stream
            .read_exact(&mut piece)
            .await
            .map_err(FirstFrame::Io)?;
        decoder.buffer().extend_from_slice(&piece);
        if let Some(frame) = decoder.next().map_err(FirstFrame::Garbage)? {
            return Ok(frame);
        }
        wanted = decoder.missing();
    }
}
