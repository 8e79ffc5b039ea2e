//! The wire between processes: framed, multiplexed connections.
//!
//! Owns the listener, the connections to peers and their keeping up, the handshake, and every limit of what comes from a
//! socket. A frame's content is bytes here: this module knows no Raft, no storage and no topic.
//!
//! - `frame`: the byte layout, the decoder, the queue of bytes to send.
//! - `handshake`: connecting, and who is at the other end.
//! - `link`: one established connection.
//! - `peer`: keeping connections to a peer up, and what is known about its process.
//! - `accept`: the listening side.
//! - `connection`: a client's connection.
//!
//! Peers: each broker keeps two connections to each other one, a control and a data [`Lane`], and asks on them; the other
//! broker answers on them, and asks on its own two. The bytes are described in `docs/protocol.md`.

mod accept;
mod connection;
mod frame;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod handshake;
mod link;
mod peer;
#[cfg(test)]
mod tests;

/// The one place where socket types are named, so that others can take their place.
#[cfg(not(feature = "sim"))]
mod socket {
    use std::io;
    use std::net::SocketAddr;

    use tokio::net::TcpSocket;
    pub(super) use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
    pub(super) use tokio::net::{TcpListener, TcpStream, lookup_host};

    /// Connections that wait to be accepted, at most.
    const BACKLOG: u32 = 1_024;

    /// An address that is taken; whoever connects to it is refused until it is listened on.
    pub(super) struct Bound(TcpSocket);

    impl Bound {
        pub(super) async fn bind(listen: &str) -> io::Result<Self> {
            let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
            for address in lookup_host(listen).await? {
                match bind(address) {
                    Ok(socket) => return Ok(Self(socket)),
                    Err(error) => failed = error,
                }
            }
            Err(failed)
        }

        pub(super) fn listen(self) -> io::Result<TcpListener> {
            self.0.listen(BACKLOG)
        }
    }

    fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // Connections of a process that has ended do not keep its port.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(socket)
    }

    pub(super) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(address).await
    }
}

/// The same of the simulation, where a host name is that of a simulated host.
#[cfg(feature = "sim")]
mod socket {
    pub(super) use turmoil::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
    pub(super) use turmoil::net::{TcpListener, TcpStream};

    /// Taken by listening on it: nobody gets a turn in between.
    pub(super) struct Bound(TcpListener);

    impl Bound {
        pub(super) async fn bind(listen: &str) -> std::io::Result<Self> {
            TcpListener::bind(listen).await.map(Self)
        }

        #[allow(clippy::unnecessary_wraps)] // as of a real socket
        pub(super) fn listen(self) -> std::io::Result<TcpListener> {
            Ok(self.0)
        }
    }

    /// turmoil answers for a host that cannot be reached as if it refused; a real network does not answer.
    pub(super) async fn connect(address: std::net::SocketAddr) -> std::io::Result<TcpStream> {
        match TcpStream::connect(address).await {
            Err(error)
                if error.kind() == std::io::ErrorKind::ConnectionRefused
                    && !crate::runtime::sim::refuses(address.ip()) =>
            {
                std::future::pending().await
            }
            other => other,
        }
    }

    pub(super) async fn lookup_host(
        address: &str,
    ) -> std::io::Result<std::iter::Once<std::net::SocketAddr>> {
        let bad = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
        let port: u16 = port.parse().map_err(|_| bad())?;
        Ok(std::iter::once((turmoil::lookup(host), port).into()))
    }
}

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

pub use self::connection::Connection;
use self::frame::Kind;
#[cfg(any(test, feature = "testkit"))]
pub(crate) use self::handshake::{Introduction, introduction};
use self::link::{Asking, Link};
use self::peer::Peer;
use crate::runtime::Tasks;
use crate::types::{BrokerId, ClusterId, Endpoint, Error, Incarnation};

/// News that a slow listener may be behind before it misses some.
const EVENTS_MAX: usize = 1024;
/// How long a goodbye may take.
const GOODBYE_TIME: Duration = Duration::from_secs(1);

/// Which of the two connections to a peer a message takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Lane {
    /// Votes, heartbeats, transfers: small, never behind bulk.
    Control,
    /// Appends, snapshots, forwarded requests.
    Data,
}

/// Who answers a message: the first byte behind the frame's length and kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Channel {
    /// Raft messages between replicas.
    Raft = 1,
    /// Requests of `api`.
    Api = 2,
}

/// A message: a small structured header, and bytes that are passed on untouched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// Encoded with `types::encode`.
    pub header: Bytes,
    /// Raw bytes, concatenated on the wire.
    pub body: Vec<Bytes>,
}

impl Message {
    /// The body as one piece; copies only when it is in several.
    pub fn single_body(mut self) -> Bytes {
        match self.body.len() {
            0 => Bytes::new(),
            1 => self.body.swap_remove(0),
            _ => self.body.concat().into(),
        }
    }
}

/// Who a connection comes from, as its handshake said.
#[derive(Debug, Clone)]
pub struct Origin {
    /// `None` for a client.
    pub broker: Option<(BrokerId, Incarnation)>,
    /// Unique in this process: tells one connection from the next.
    pub connection: u64,
    /// The other end.
    pub remote: SocketAddr,
}

/// The answer's way back. Dropping it unanswered leaves the caller to its deadline.
#[derive(Debug)]
pub struct Reply {
    link: Arc<Link>,
    channel: u8,
    correlation: u64,
    charge: usize,
}

impl Reply {
    /// Sends the answer; it is dropped when the connection is gone. Never waits.
    pub fn send(self, answer: Message) {
        self.link.answer(self.channel, self.correlation, answer);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.link.release(self.charge);
    }
}

/// What a broker does with the messages that reach it.
pub trait Handler: Send + Sync + 'static {
    /// Takes one message. Called in order of arrival per connection, on the connection's reader: must not block or wait.
    /// Bytes of unanswered messages count against the connection's budget until `reply` is sent or dropped.
    fn handle(&self, origin: &Origin, channel: Channel, message: Message, reply: Reply);
    /// The connection ended; nothing more will come from it.
    fn closed(&self, origin: &Origin);
}

/// What is known about the way to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    /// Not tried yet.
    Unknown,
    /// Connected.
    Up,
    /// The connection was lost or cannot be made; the process may be alive. Also said when the other side refuses.
    Lost,
    /// Hard evidence that the process is gone: there is no connection either way and a new one was refused by its host, or it
    /// said goodbye. Until it connects again.
    Gone,
}

/// News about a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerEvent {
    /// The peer.
    pub broker: BrokerId,
    /// Its new state.
    pub state: PeerState,
}

/// Why a message was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum NetError {
    #[error("cannot reach {address}: {reason}")]
    Unreachable { address: String, reason: String }, // definitely not sent
    #[error("connection to {address} lost")]
    Lost { address: String }, // sent, answer unknown
    #[error("no answer from {address} within {after:?}")]
    Timeout { address: String, after: Duration }, // sent, answer unknown
    #[error("{address} refused the connection: {reason}")]
    Refused { address: String, reason: String }, // by handshake: wrong cluster, identity, version
    #[error("cannot listen on {address}: {reason}; use another address, or stop who uses it")]
    Listen { address: String, reason: String },
    #[error("too many bytes wait for {address}")]
    Full { address: String }, // definitely not sent
    #[error("a message of {bytes} bytes for {address}, which takes at most {max}")]
    TooLarge {
        address: String,
        bytes: usize,
        max: usize,
    }, // definitely not sent
}

impl From<NetError> for Error {
    fn from(error: NetError) -> Self {
        match error {
            NetError::Unreachable { address, reason } => Self::Unreachable { address, reason },
            NetError::Lost { address } => Self::ConnectionLost { address },
            NetError::Timeout { after, .. } => Self::Timeout {
                after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
            },
            NetError::Full { .. } => Self::Overloaded { bytes: 0 },
            NetError::TooLarge { bytes, max, .. } => Self::RecordTooLarge {
                size: bytes as u64,
                max: max as u64,
            },
            // Whoever refused may be about to leave, or not know this process yet: the next one, or the same one later, may
            // not refuse. Nothing was sent.
            NetError::Refused { address, reason } => {
                let reason = format!("it refused the connection: {reason}");
                Self::Unreachable { address, reason }
            }
            NetError::Listen { .. } => Self::Refused {
                reason: error.to_string(),
            },
        }
    }
}

/// Who this process is, sent first on every connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The broker.
    pub broker: BrokerId,
    /// Its data directory.
    pub incarnation: Incarnation,
    /// Its cluster, once known.
    pub cluster: Option<ClusterId>,
    /// The number of this opening of the data directory: grows by a random step each time.
    pub boot: u64,
    /// Journal bytes the directory held when it was opened: an old copy holds fewer than are known of.
    pub position: u64,
}

/// Decides whether a peer's process is let in; the text of a refusal reaches its log.
pub type Admission = Arc<dyn Fn(&Identity) -> Result<(), String> + Send + Sync>;

/// Limits of the network, all bounded.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Largest frame, checked before memory is taken, in bytes. Each side tells the other; the smaller one holds.
    pub frame_bytes_max: usize,
    /// Bytes that may wait to be sent on one connection. A single message may exceed it when nothing else waits.
    pub send_queue_bytes: usize,
    /// Bytes of unanswered requests accepted from one connection; above it nothing is read from that connection. A single
    /// request may exceed it when no other is unanswered. Each counts 256 bytes more than it has.
    pub receive_bytes: usize,
    /// Connections accepted at once. One in eight, at most 64, is kept for brokers.
    pub connections_max: usize,
    /// Longest handshake, and longest attempt to connect.
    pub handshake_timeout: Duration,
    /// Shortest and longest wait between two attempts to reach a peer.
    pub reconnect_min: Duration,
    /// See `reconnect_min`.
    pub reconnect_max: Duration,
    /// Each side of a connection sends something at least this often.
    pub keepalive_interval: Duration,
    /// Intervals of silence, at least 2, after which a connection to or from a broker is given up.
    pub keepalive_misses: u32,
    /// The same for a client's connection as the broker sees it; and intervals in which nothing of what waits could be sent,
    /// after which any connection is given up.
    pub client_misses: u32,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            frame_bytes_max: 32 << 20,
            send_queue_bytes: 64 << 20,
            receive_bytes: 64 << 20,
            connections_max: 4_096,
            handshake_timeout: Duration::from_secs(3),
            reconnect_min: Duration::from_millis(50),
            reconnect_max: Duration::from_secs(1),
            keepalive_interval: Duration::from_secs(1),
            keepalive_misses: 3,
            client_misses: 60,
        }
    }
}

/// What the tasks of one broker's network share.
struct Shared {
    identity: Mutex<Identity>,
    admission: RwLock<Option<Admission>>,
    config: NetConfig,
    tasks: Tasks,
    stop: CancellationToken,
    peers: RwLock<BTreeMap<BrokerId, Arc<Peer>>>,
    inbound: accept::Register,
    events: broadcast::Sender<PeerEvent>,
    connections: AtomicUsize,
    leaving: AtomicBool,
}

impl Shared {
    fn identity(&self) -> Identity {
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn peer(&self, broker: BrokerId) -> Option<Arc<Peer>> {
        self.peers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&broker)
            .cloned()
    }

    fn has_inbound(&self, broker: BrokerId) -> bool {
        self.inbound.has(broker)
    }

    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// Returns, unless goodbye has been said: then never.
    async fn until_not_leaving(&self) {
        if self.is_leaving() {
            std::future::pending::<()>().await;
        }
    }

    async fn stopped(&self) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            () = self.tasks.stopped() => {}
        }
    }

    /// Whether the broker may be connected with, either way.
    fn check(&self, other: &Identity) -> Result<(), String> {
        let own = self.identity();
        if other.broker == own.broker {
            return Err(format!(
                "both sides are broker {}; every broker needs its own id",
                own.broker
            ));
        }
        if let (Some(ours), Some(theirs)) = (own.cluster, other.cluster)
            && ours != theirs
        {
            return Err(format!(
                "broker {} belongs to cluster {ours}, broker {} to cluster {theirs}",
                own.broker, other.broker
            ));
        }
        // Cloned, so that no lock is held while foreign code runs.
        let admission = self
            .admission
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        admission.map_or(Ok(()), |admission| admission(other))
    }

    fn check_link(&self, link: &Link) -> Result<(), String> {
        link.identity()
            .map_or(Ok(()), |identity| self.check(identity))
    }

    /// Looks again at who is connected, after what is admitted has changed.
    fn check_all(&self) {
        let peers: Vec<_> = {
            let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
            peers.values().cloned().collect()
        };
        let outbound = peers.iter().flat_map(|peer| peer.links());
        for link in outbound.chain(self.inbound.links()) {
            if let Err(reason) = self.check_link(&link) {
                tracing::warn!(
                    peer = link.address(),
                    reason,
                    "connection is no longer admitted"
                );
                link.dismiss(&reason);
            }
        }
    }
}

/// Ends the network's tasks and connections with its last handle.
struct Owner(CancellationToken);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// An address that nobody else can listen on any more: a broker takes it before it does anything that would be left behind when
/// the address is in use.
pub struct Port {
    address: String,
    bound: socket::Bound,
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Port({})", self.address)
    }
}

impl Port {
    /// Takes `listen`. Connections are refused until [`Net::listen`].
    pub async fn take(listen: &str) -> Result<Self, NetError> {
        let bound = socket::Bound::bind(listen).await;
        Ok(Self {
            address: listen.to_owned(),
            bound: bound.map_err(|error| listen_error(listen, &error))?,
        })
    }
}

fn listen_error(address: &str, error: &std::io::Error) -> NetError {
    NetError::Listen {
        address: address.to_owned(),
        reason: error.to_string(),
    }
}

/// The network of one broker: its listener and its connections to peers. Cheap to clone; ends with its last clone or with
/// the tasks it was given.
#[derive(Clone)]
pub struct Net {
    shared: Arc<Shared>,
    listener: Arc<Mutex<Option<socket::TcpListener>>>,
    local_addr: SocketAddr,
    _owner: Arc<Owner>,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("local_addr", &self.local_addr)
            .finish_non_exhaustive()
    }
}

impl Net {
    /// Takes `listen` and listens there, see [`Net::listen`].
    pub async fn bind(
        listen: &str,
        identity: Identity,
        config: NetConfig,
        tasks: Tasks,
    ) -> Result<Self, NetError> {
        Self::listen(Port::take(listen).await?, identity, config, tasks)
    }

    /// Listens on `port`. Connections are accepted, and answered by the handler, from [`Net::serve`] on.
    pub fn listen(
        port: Port,
        identity: Identity,
        config: NetConfig,
        tasks: Tasks,
    ) -> Result<Self, NetError> {
        let Port { address, bound } = port;
        let failed = |error| listen_error(&address, &error);
        let listener = bound.listen().map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        let stop = CancellationToken::new();
        let shared = Shared {
            identity: Mutex::new(identity),
            admission: RwLock::default(),
            config,
            tasks,
            stop: stop.clone(),
            peers: RwLock::default(),
            inbound: accept::Register::default(),
            events: broadcast::channel(EVENTS_MAX).0,
            connections: AtomicUsize::new(0),
            leaving: AtomicBool::new(false),
        };
        Ok(Self {
            shared: Arc::new(shared),
            listener: Arc::new(Mutex::new(Some(listener))),
            local_addr,
            _owner: Arc::new(Owner(stop)),
        })
    }

    /// Starts accepting. To be called once.
    pub fn serve(&self, handler: Arc<dyn Handler>) {
        let listener = self
            .listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        assert!(
            listener.is_some(),
            "serve() was called before, on {}",
            self.local_addr
        );
        if let Some(listener) = listener {
            let accept = accept::accept(self.shared.clone(), listener, handler);
            let stop = self.shared.stop.clone();
            self.shared.tasks.spawn(async move {
                stop.run_until_cancelled(accept).await;
            });
        }
    }

    /// The address bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Sets the cluster id, once known; brokers of another cluster are refused from then on, connected ones too.
    pub fn set_cluster(&self, cluster: ClusterId) {
        self.shared
            .identity
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .cluster = Some(cluster);
        self.shared.check_all();
    }

    /// Sets who is admitted as a peer (both ways); connections that are no longer admitted are closed. All, until set.
    /// The closure is called with no lock held; it must not block.
    pub fn set_admission(&self, admission: Admission) {
        let mut slot = self
            .shared
            .admission
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let before = slot.replace(admission);
        drop(slot);
        drop(before);
        self.shared.check_all();
    }

    /// Sets the peers to keep connections to, with their addresses; those not named are dropped, those with a new address
    /// connected anew. This broker itself is left out.
    pub fn set_peers(&self, peers: Vec<Endpoint>) {
        let own = self.shared.identity().broker;
        let (mut stopped, mut started) = (Vec::new(), Vec::new());
        {
            let mut known = self
                .shared
                .peers
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            let named: BTreeSet<BrokerId> = peers.iter().map(|peer| peer.broker).collect();
            known.retain(|broker, peer| {
                let stays = named.contains(broker);
                stopped.extend((!stays).then(|| peer.clone()));
                stays
            });
            for endpoint in peers.into_iter().filter(|peer| peer.broker != own) {
                let old = known.get(&endpoint.broker);
                if old.is_some_and(|old| *old.endpoint() == endpoint) {
                    continue;
                }
                let state = old.map_or(PeerState::Unknown, |old| old.state());
                let broker = endpoint.broker;
                let peer = Peer::new(endpoint, state, self.shared.stop.child_token());
                stopped.extend(known.insert(broker, peer.clone()));
                started.push(peer);
            }
        }
        for peer in stopped {
            peer.stop();
        }
        for peer in started {
            peer.start(&self.shared);
        }
    }

    /// News about peers, from now on. A listener that falls behind by more than 1024 is told that it missed some: then
    /// look at [`Net::peer_state`].
    pub fn events(&self) -> broadcast::Receiver<PeerEvent> {
        self.shared.events.subscribe()
    }

    /// What is known about the way to `broker`.
    pub fn peer_state(&self, broker: BrokerId) -> PeerState {
        self.shared
            .peer(broker)
            .map_or(PeerState::Unknown, |peer| peer.state())
    }

    /// Who answered at the other end of the connection to `broker`, while there is one.
    pub fn peer_identity(&self, broker: BrokerId) -> Option<Identity> {
        let link = self.shared.peer(broker)?.link(Lane::Control).ok()?;
        link.identity().copied()
    }

    /// Puts a request into the queue to `broker`, at once and in order, and returns its answer's future. Cancel safe:
    /// dropping the future forgets the answer, the request is still sent.
    ///
    /// An error here says that the request was not sent and will not be; one from the future, that it may have been.
    pub fn call(
        &self,
        broker: BrokerId,
        lane: Lane,
        channel: Channel,
        message: Message,
        deadline: Duration,
    ) -> Result<Pending, NetError> {
        let Some(peer) = self.shared.peer(broker) else {
            let (address, reason) = (
                format!("broker {broker}"),
                "it is not a known peer".to_owned(),
            );
            return Err(NetError::Unreachable { address, reason });
        };
        peer.call(lane, Kind::Request, channel.to_byte(), message, deadline)
            .map(Pending)
    }

    /// Tells the peers that this broker is leaving, and waits until they know, for a second at most. From then on new
    /// connections are refused and none are made; those that exist go on. Cancel safe.
    pub async fn goodbye(&self) {
        self.shared.leaving.store(true, Ordering::Release);
        let peers: Vec<_> = {
            let peers = self
                .shared
                .peers
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            peers.values().cloned().collect()
        };
        let said: Vec<_> = peers
            .iter()
            .filter_map(|peer| {
                let message = Message::default();
                peer.call(Lane::Control, Kind::Goodbye, 0, message, GOODBYE_TIME)
                    .ok()
            })
            .collect();
        for heard in said {
            heard.await.ok(); // one that does not hear it finds out itself
        }
    }
}

/// An answer to come. Resolves by its deadline at the latest.
#[derive(Debug)]
pub struct Pending(Asking);

impl Future for Pending {
    type Output = Result<Message, NetError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context)
    }
}
