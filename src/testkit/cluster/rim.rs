//! The proxies of a cluster, on a thread of their own: they go on whatever the test does with its runtime.
//!
//! Owns the thread. What the proxies do is [`Links`]' business.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::thread::{Builder, JoinHandle};

use tokio::sync::oneshot;

use crate::testkit::{Links, Proxy};
use crate::types::{BrokerId, Error};

type Proxies = BTreeMap<BrokerId, Proxy>;

/// A proxy for each broker. When dropped, they end and the thread is waited for.
#[derive(Debug)]
pub(super) struct Rim {
    proxies: Proxies,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Rim {
    /// Starts a proxy for each of brokers 1 to `brokers`, with nobody behind it yet.
    pub(super) async fn start(brokers: u32, links: &Links) -> Result<Self, Error> {
        let (started, proxies) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let links = links.clone();
        let thread = Builder::new()
            .name("links".to_owned())
            .spawn(move || run(brokers, &links, started, stopped))
            .map_err(|error| failed(&error))?;
        let proxies = proxies.await.map_err(|error| failed(&error))?;
        Ok(Self {
            proxies: proxies.map_err(|error| failed(&error))?,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where each broker is reached.
    pub(super) fn addresses(&self) -> impl Iterator<Item = (BrokerId, String)> {
        let at = |(broker, proxy): (&BrokerId, &Proxy)| (*broker, proxy.address().to_string());
        self.proxies.iter().map(at)
    }

    /// Where `broker` listens from now on.
    pub(super) async fn point(&self, broker: BrokerId, upstream: Option<SocketAddr>) {
        if let Some(proxy) = self.proxies.get(&broker) {
            proxy.set_upstream(upstream).await;
        }
    }
}

impl Drop for Rim {
    fn drop(&mut self) {
        self.proxies.clear();
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok(); // its panic has been printed
        }
    }
}

fn failed(error: &dyn std::error::Error) -> Error {
    Error::Failed {
        reason: format!("the proxies of the cluster: {error}"),
    }
}

fn run(
    brokers: u32,
    links: &Links,
    started: oneshot::Sender<io::Result<Proxies>>,
    stopped: oneshot::Receiver<()>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            started.send(Err(error)).ok(); // nobody waits any more
            return;
        }
    };
    runtime.block_on(async {
        let proxies = start_all(brokers, links).await;
        if started.send(proxies).is_ok() {
            stopped.await.ok(); // dropped, which means the same
        }
    });
}

async fn start_all(brokers: u32, links: &Links) -> io::Result<Proxies> {
    let mut proxies = Proxies::new();
    for broker in (1..=brokers).map(BrokerId) {
        let proxy = Proxy::start(broker, "127.0.0.1:0", None, links).await?;
        proxies.insert(broker, proxy);
    }
    Ok(proxies)
}
