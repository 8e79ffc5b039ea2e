//! A TCP proxy in front of one broker, so that a test can hurt the network between real brokers.
//!
//! Owns the address that everybody else is told (the broker listens somewhere else and advertises this one) and the connections
//! through it. Who may send what to whom is [`Links`]' business; how the bytes of one connection pass is `pump`'s. It learns from
//! the first frame of a connection which broker opened it; whoever is no broker is a client.
//!
//! It adds no sign of life and hides none: while the broker's port refuses connections, so does the proxy's, and how a connection
//! ended (in order, or by a reset) is passed on, as far as the link is open. One thing a proxy cannot do: a refusal comes before
//! the first frame, so that a process is gone is seen through a cut as well.

mod pump;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::sync::{Notify, Semaphore};

use self::pump::Sides;
use super::links::{Link, Links, Party};
use crate::net::{Introduction, introduction};
use crate::runtime::Tasks;
use crate::types::BrokerId;

/// Connections at once; above it they are closed at once.
const CONNECTIONS_MAX: usize = 8_192;
/// How long the first frame is waited for; who sends none by then is taken for a client.
const FIRST_FRAME_WITHIN: Duration = Duration::from_secs(3);
/// Bytes kept of a connection that hangs before it reaches the broker.
const FIRST_BYTES_MAX: usize = 64 << 10;
/// While the broker's port refuses connections, it is tried this often.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Longest look at whether the broker's port still takes connections.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);
/// After an error of `accept`, as when file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Connections the kernel keeps for the proxy to accept.
const BACKLOG: u32 = 1_024;

/// A proxy in front of one broker. Ends, with its connections, when it is dropped.
pub struct Proxy {
    gate: Arc<Gate>,
    tasks: Tasks,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("broker", &self.gate.broker)
            .field("address", &self.gate.address)
            .finish_non_exhaustive()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

impl Proxy {
    /// Takes connections at `listen` (port 0: one of the kernel's choice) for `broker`, which listens at `upstream`, or nowhere
    /// yet. While nobody listens there, connections are refused, but the port stays taken.
    pub async fn start(
        broker: BrokerId,
        listen: &str,
        upstream: Option<&str>,
        links: &Links,
    ) -> io::Result<Self> {
        let listen = resolve(listen).await?;
        let upstream = match upstream {
            Some(upstream) => Some(resolve(upstream).await?),
            None => None,
        };
        let holder = socket(listen)?;
        holder.bind(listen)?;
        let address = holder.local_addr()?;
        let gate = Arc::new(Gate {
            broker,
            address,
            _holder: holder,
            upstream: Mutex::new(upstream),
            listener: Mutex::new(None),
            changed: Notify::new(),
        });
        let tasks = Tasks::new();
        gate.look().await;
        tasks.spawn(accept(gate.clone(), links.clone(), tasks.clone()));
        Ok(Self { gate, tasks })
    }

    /// Where it takes connections: what the broker must advertise.
    pub fn address(&self) -> SocketAddr {
        self.gate.address
    }

    /// The broker listens at `upstream` from now on; `None`: nowhere, and connections are refused. Connections that exist go on.
    pub async fn set_upstream(&self, upstream: Option<SocketAddr>) {
        *lock(&self.gate.upstream) = upstream;
        self.gate.look().await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn resolve(address: &str) -> io::Result<SocketAddr> {
    let unknown = || io::Error::new(io::ErrorKind::NotFound, format!("{address} has no address"));
    lookup_host(address).await?.next().ok_or_else(unknown)
}

/// A socket whose port others of this user may share: so that it stays taken while nobody listens on it.
fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    Ok(socket)
}

/// The listening side: open while the broker's port takes connections.
struct Gate {
    broker: BrokerId,
    address: SocketAddr,
    /// Bound, never listening: keeps the port.
    _holder: TcpSocket,
    upstream: Mutex<Option<SocketAddr>>,
    listener: Mutex<Option<TcpListener>>,
    changed: Notify,
}

impl Gate {
    fn upstream(&self) -> Option<SocketAddr> {
        *lock(&self.upstream)
    }

    fn is_open(&self) -> bool {
        lock(&self.listener).is_some()
    }

    fn close(&self) {
        let closed = lock(&self.listener).take();
        if closed.is_some() {
            self.changed.notify_one();
        }
    }

    fn open(&self) {
        let mut listener = lock(&self.listener);
        if listener.is_none() {
            let opened = socket(self.address).and_then(|socket| {
                socket.bind(self.address)?;
                socket.listen(BACKLOG)
            });
            match opened {
                Ok(opened) => *listener = Some(opened),
                Err(error) => tracing::debug!(%error, "proxy cannot listen, trying again"),
            }
            drop(listener);
            self.changed.notify_one();
        }
    }

    /// Opens or closes, as the broker's port does.
    async fn look(&self) {
        let Some(upstream) = self.upstream() else {
            return self.close();
        };
        let found = tokio::time::timeout(LOOK_TIMEOUT, TcpStream::connect(upstream)).await;
        match found {
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => self.close(),
            // A paused process may be slow to take connections, and is not gone.
            _ if self.upstream() == Some(upstream) => self.open(),
            _ => {}
        }
    }

    async fn dial(&self) -> io::Result<TcpStream> {
        let Some(upstream) = self.upstream() else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let stream = TcpStream::connect(upstream).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn accepted(&self) -> io::Result<TcpStream> {
        poll_fn(|context| match lock(&self.listener).as_ref() {
            Some(listener) => listener.poll_accept(context),
            None => Poll::Pending, // `changed` tells
        })
        .await
        .map(|(stream, _)| stream)
    }
}

/// Accepts until it is dropped.
async fn accept(gate: Arc<Gate>, links: Links, tasks: Tasks) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let wanted = !gate.is_open() && gate.upstream().is_some();
        let accepted = tokio::select! {
            biased;
            () = gate.changed.notified() => continue,
            accepted = gate.accepted() => accepted,
            () = tokio::time::sleep(LOOK_AGAIN), if wanted => {
                gate.look().await;
                continue;
            }
        };
        match accepted {
            Ok(near) => {
                if let Ok(place) = places.clone().try_acquire_owned() {
                    let (gate, links) = (gate.clone(), links.clone());
                    tasks.spawn(async move {
                        carry(&gate, &links, near).await;
                        drop(place);
                    });
                }
            }
            Err(error) => {
                tracing::debug!(%error, "proxy cannot accept a connection, going on");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection, from its first byte to its end.
async fn carry(gate: &Gate, links: &Links, mut near: TcpStream) {
    if near.set_nodelay(true).is_err() {
        return; // it has ended
    }
    let mut first = BytesMut::new();
    let Some(opener) = identify(&mut near, &mut first).await else {
        return;
    };
    let (mut forward, mut back, mut resets) = links.follow(opener, Party::Broker(gate.broker));
    let may = tokio::select! {
        biased;
        () = resets.wait() => false,
        may = admitted(&mut near, &mut first, &mut forward, &mut back) => may,
    };
    if !may {
        return abort(near);
    }
    let mut dial = std::pin::pin!(gate.dial());
    let dialed = match tokio::time::timeout(LOOK_TIMEOUT, &mut dial).await {
        Ok(dialed) => dialed,
        Err(_) => tokio::select! {
            biased;
            () = hung_up(&mut near, &mut first) => return,
            dialed = &mut dial => dialed,
        },
    };
    match dialed {
        Ok(far) => {
            let sides = Sides { near, far };
            sides.converse(gate, [forward, back], resets, first).await;
        }
        Err(error) => {
            if error.kind() == io::ErrorKind::ConnectionRefused {
                gate.look().await;
            }
            abort(near);
        }
    }
}

/// Reads until it is known who opened the connection; `None` when nothing but its end came.
async fn identify(near: &mut TcpStream, first: &mut BytesMut) -> Option<Party> {
    let read = async {
        loop {
            match introduction(first) {
                Introduction::Broker(broker) => return Some(Party::Broker(broker)),
                Introduction::Other => return Some(Party::Clients),
                Introduction::Unfinished => {}
            }
            match near.read_buf(first).await {
                Ok(1..) => {}
                Ok(0) if !first.is_empty() => return Some(Party::Clients),
                Ok(0) | Err(_) => return None,
            }
        }
    };
    let read = tokio::time::timeout(FIRST_FRAME_WITHIN, read).await;
    read.unwrap_or(Some(Party::Clients))
}

/// Waits until a new connection may come about: that takes both directions. False when its opener has given up.
async fn admitted(
    near: &mut TcpStream,
    first: &mut BytesMut,
    forward: &mut Link,
    back: &mut Link,
) -> bool {
    loop {
        let (there, here) = (forward.rule(), back.rule());
        if !there.cut && !there.half_open && !here.cut {
            return true;
        }
        tokio::select! {
            biased;
            () = forward.changed() => {}
            () = back.changed() => {}
            () = hung_up(near, first) => return false,
        }
    }
}

/// Resolves when the opener closes a connection that has not reached the broker; keeps what it sends until then, within bounds.
/// Cancel safe.
async fn hung_up(near: &mut TcpStream, first: &mut BytesMut) {
    loop {
        if first.len() >= FIRST_BYTES_MAX {
            std::future::pending::<()>().await; // its opener will not wait for ever, and its end is seen when it may go on
        }
        if !matches!(near.read_buf(first).await, Ok(1..)) {
            return;
        }
    }
}

/// Closes with a reset.
fn abort(stream: TcpStream) {
    stream.set_zero_linger().ok(); // it is closed either way
    drop(stream);
}
