//! The listening side: accepting, the handshake's answer, and the register of connections that came in.
//!
//! Owns how many connections there are. Does not interpret messages: they go to the handler.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::frame::{Hello, Role, Welcome};
use super::handshake::{self, Greeted};
use super::link::{End, Link, Patience};
use super::socket::{TcpListener, TcpStream};
use super::{Handler, Lane, Shared};
use crate::types::BrokerId;

/// After an error of `accept`, as when file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// By connection number; the lane of a broker's connection, `None` for a client's.
type Links = BTreeMap<u64, (Arc<Link>, Option<Lane>)>;

/// Connections that came in and passed the handshake.
#[derive(Debug, Default)]
pub(super) struct Register {
    links: Mutex<Links>,
}

impl Register {
    fn lock(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a connection; returns the ones it replaces: a broker has one per lane.
    fn add(&self, link: &Arc<Link>, lane: Option<Lane>) -> Vec<Arc<Link>> {
        let mut links = self.lock();
        let broker = link.identity().map(|identity| identity.broker);
        let same = |other: &Link| other.identity().map(|identity| identity.broker) == broker;
        let replaced = match lane {
            Some(_) => links
                .values()
                .filter(|(other, theirs)| *theirs == lane && same(other))
                .map(|(other, _)| other.clone())
                .collect(),
            None => Vec::new(),
        };
        for old in &replaced {
            links.remove(&old.id());
        }
        links.insert(link.id(), (link.clone(), lane));
        replaced
    }

    /// Whether it was still there: not replaced by a newer one.
    fn remove(&self, link: &Link) -> bool {
        self.lock().remove(&link.id()).is_some()
    }

    pub(super) fn has(&self, broker: BrokerId) -> bool {
        self.lock()
            .values()
            .any(|(link, _)| link.identity().is_some_and(|who| who.broker == broker))
    }

    pub(super) fn links(&self) -> Vec<Arc<Link>> {
        self.lock().values().map(|(link, _)| link.clone()).collect()
    }
}

/// Takes part in the count of connections while it lives.
struct Slot(Arc<Shared>);

impl Slot {
    /// A place for one more, with the count it makes; `None` when all are taken.
    fn take(shared: &Arc<Shared>) -> Option<(Self, usize)> {
        let before = shared.connections.fetch_add(1, Ordering::AcqRel);
        let slot = Self(shared.clone());
        (before < shared.config.connections_max).then_some((slot, before + 1))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Accepts until it is dropped; errors never end it.
pub(super) async fn accept(shared: Arc<Shared>, listener: TcpListener, handler: Arc<dyn Handler>) {
    let mut full = false;
    loop {
        match listener.accept().await {
            Ok((stream, remote)) => {
                let slot = Slot::take(&shared);
                if slot.is_none() && !full {
                    let max = shared.config.connections_max;
                    tracing::warn!(max, "all connections are taken, closing new ones at once");
                }
                full = slot.is_none();
                if let Some((slot, count)) = slot {
                    let (shared, handler) = (shared.clone(), handler.clone());
                    let tasks = shared.tasks.clone();
                    tasks.spawn_graceful(serve(shared, stream, remote, handler, slot, count));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection, going on");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(
    shared: Arc<Shared>,
    mut stream: TcpStream,
    remote: SocketAddr,
    handler: Arc<dyn Handler>,
    slot: Slot,
    count: usize,
) {
    let greet = greet(&shared, &mut stream, count);
    let greeted = tokio::select! {
        biased;
        () = shared.stopped() => return,
        greeted = tokio::time::timeout(shared.config.handshake_timeout, greet) => greeted,
    };
    let hello = match greeted {
        Ok(Ok(hello)) => hello,
        Ok(Err(reason)) => {
            tracing::debug!(%remote, reason, "connection refused");
            return;
        }
        Err(_) => {
            tracing::debug!(%remote, "no handshake in time, connection closed");
            return;
        }
    };
    let (lane, identity) = match hello.role {
        Role::Client => (None, None),
        Role::Peer { lane, identity } => (Some(lane), Some(identity)),
    };
    let frame_bytes_max = usize::try_from(hello.frame_bytes_max).unwrap_or(usize::MAX);
    let link = Link::new(
        remote.to_string(),
        &Greeted {
            remote,
            identity,
            frame_bytes_max,
        },
        &shared.config,
    );
    let (read, write) = stream.into_split();
    let config = &shared.config;
    let patience = Patience {
        interval: config.keepalive_interval,
        silent: if lane.is_some() {
            config.keepalive_misses
        } else {
            config.client_misses
        },
        stalled: config.client_misses.max(config.keepalive_misses),
    };
    link.start_writer(write, patience, &shared.tasks, shared.stop.clone());
    for old in shared.inbound.add(&link, lane) {
        old.fail(End::Failed(
            "replaced by a newer connection of the same broker".to_owned(),
        ));
    }
    // Who is admitted may have changed since the handshake.
    if let Err(reason) = shared.check_link(&link) {
        link.dismiss(&reason);
    }
    let peer = || identity.and_then(|identity| shared.peer(identity.broker));
    if let Some(peer) = peer() {
        peer.came(&shared);
    }
    let goodbye = || {
        if let Some(peer) = peer() {
            peer.goodbye(&shared);
        }
    };
    link.read_requests(read, config.frame_bytes_max, handler, goodbye)
        .await;
    if shared.inbound.remove(&link)
        && let Some(peer) = peer()
    {
        peer.went();
    }
    drop(slot);
}

/// The accepting half of the handshake; an error has been told to the other side as far as that was possible.
async fn greet(shared: &Shared, stream: &mut TcpStream, count: usize) -> Result<Hello, String> {
    let hello = handshake::receive(stream).await?;
    if let Err(reason) = judge(shared, &hello, count) {
        handshake::refuse(stream, &reason).await;
        return Err(reason);
    }
    let frame_bytes_max = u32::try_from(shared.config.frame_bytes_max).unwrap_or(u32::MAX);
    let welcome = Welcome {
        identity: shared.identity(),
        frame_bytes_max,
    };
    handshake::welcome(stream, &welcome)
        .await
        .map_err(|error| error.to_string())?;
    Ok(hello)
}

fn judge(shared: &Shared, hello: &Hello, count: usize) -> Result<(), String> {
    let own = shared.identity().broker;
    if shared.is_leaving() {
        return Err(format!("broker {own} is shutting down"));
    }
    match &hello.role {
        Role::Peer { identity, .. } => shared.check(identity),
        Role::Client => {
            // The last places are kept for brokers: clients cannot lock the cluster out.
            let max = shared.config.connections_max;
            let for_clients = max - (max / 8).clamp(1, 64).min(max);
            if count > for_clients {
                return Err(format!(
                    "broker {own} has all {for_clients} connections for clients taken"
                ));
            }
            Ok(())
        }
    }
}
