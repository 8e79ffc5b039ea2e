//! A client's connection to one broker. It is not kept up: whoever needs another one opens it.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::frame::{Hello, Kind, Role};
use super::link::{End, Link, Patience};
use super::{Channel, Identity, Message, NetConfig, NetError, Pending, handshake};
use crate::runtime::Tasks;

/// A client's connection to one broker (channel [`Channel::Api`]). Cheap to clone, pipelined; ends for good when it is
/// lost, or with its last clone.
#[derive(Debug, Clone)]
pub struct Connection(pub(super) Arc<Client>);

#[derive(Debug)]
pub(super) struct Client {
    pub(super) link: Arc<Link>,
    identity: Identity,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.link.fail(End::Dropped);
    }
}

impl Connection {
    /// Connects to `address`, within the handshake's timeout. Cancel safe: no connection is left behind.
    pub async fn open(address: &str, config: &NetConfig, tasks: &Tasks) -> Result<Self, NetError> {
        let frame_bytes_max = u32::try_from(config.frame_bytes_max).unwrap_or(u32::MAX);
        let hello = Hello {
            role: Role::Client,
            frame_bytes_max,
        };
        let (stream, greeted, identity) = handshake::connect(address, &hello, |_| Ok(()), config)
            .await
            .map_err(|failure| failure.error)?;
        let link = Link::new(address.to_owned(), &greeted, config);
        let (read, write) = stream.into_split();
        let patience = Patience {
            interval: config.keepalive_interval,
            silent: config.keepalive_misses,
            stalled: config.client_misses.max(config.keepalive_misses),
        };
        link.start_writer(write, patience, tasks, CancellationToken::new());
        let (reader, frame_bytes_max) = (link.clone(), config.frame_bytes_max);
        tasks.spawn_graceful(async move { reader.read_answers(read, frame_bytes_max).await });
        Ok(Self(Arc::new(Client { link, identity })))
    }

    /// As [`super::Net::call`].
    pub fn call(&self, message: Message, deadline: Duration) -> Result<Pending, NetError> {
        self.0
            .link
            .call(Kind::Request, Channel::Api.to_byte(), message, deadline)
            .map(Pending)
    }

    /// Whether it has ended.
    pub fn is_closed(&self) -> bool {
        self.0.link.is_ended()
    }

    /// The identity the broker gave in its handshake.
    pub fn identity(&self) -> Identity {
        self.0.identity
    }
}
