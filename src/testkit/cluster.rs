//! A whole cluster in one process, for an embedder's own tests.
//!
//! Owns the brokers it started. Real brokers, real sockets on loopback, real files in a directory of the caller's; only the
//! processes are missing. A killed broker's tasks, sockets and store are gone without a goodbye; what it had not made
//! durable stays in its files as after a SIGKILL, so power loss is not covered by this.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;

use crate::broker::Broker;
use crate::client::Client;
use crate::config::BrokerConfig;
use crate::types::{BrokerId, Error};

/// Several brokers of one cluster in this process.
#[derive(Debug)]
pub struct LocalCluster {
    configs: BTreeMap<BrokerId, BrokerConfig>,
    running: BTreeMap<BrokerId, Broker>,
}

impl LocalCluster {
    /// Starts brokers 1 to `brokers` with their data below `directory`, and waits until the cluster has admitted all of them.
    /// `adjust` may change each configuration before its broker starts.
    pub async fn start(
        brokers: u32,
        directory: impl Into<PathBuf>,
        adjust: impl Fn(&mut BrokerConfig),
    ) -> Result<Self, Error> {
        let directory = directory.into();
        let addresses = free_addresses(brokers)?;
        let bootstrap: Vec<String> = addresses
            .iter()
            .map(|(broker, address)| format!("{broker}@{address}"))
            .take(5)
            .collect();
        let configs = addresses.into_iter().map(|(broker, listen)| {
            let mut config = BrokerConfig {
                broker_id: broker.0,
                listen,
                data_dir: directory.join(format!("broker-{broker}")),
                bootstrap: bootstrap.clone(),
                ..BrokerConfig::default()
            };
            adjust(&mut config);
            (broker, config)
        });
        let mut cluster = Self {
            configs: configs.collect(),
            running: BTreeMap::new(),
        };
        let ids: Vec<BrokerId> = cluster.configs.keys().copied().collect();
        for id in ids {
            cluster.restart(id).await?;
        }
        for broker in cluster.running.values() {
            broker.wait_ready().await;
        }
        Ok(cluster)
    }

    /// The running broker `id`.
    pub fn broker(&self, id: BrokerId) -> Option<&Broker> {
        self.running.get(&id)
    }

    /// The addresses of all brokers, running or not.
    pub fn bootstrap(&self) -> Vec<String> {
        self.configs
            .values()
            .map(|config| config.listen.clone())
            .collect()
    }

    /// A client that reaches the cluster over its sockets, whichever brokers run.
    pub async fn client(&self) -> Result<Client, Error> {
        Client::connect(&self.bootstrap(), crate::client::ClientConfig::default()).await
    }

    /// Stops broker `id` without a goodbye. Nothing happens when it does not run.
    pub async fn kill(&mut self, id: BrokerId) {
        if let Some(broker) = self.running.remove(&id) {
            broker.crash().await;
        }
    }

    /// Stops broker `id` in order. Nothing happens when it does not run.
    pub async fn stop(&mut self, id: BrokerId) {
        if let Some(broker) = self.running.remove(&id) {
            broker.shutdown().await;
        }
    }

    /// Starts broker `id` on its data. Nothing happens when it runs.
    pub async fn restart(&mut self, id: BrokerId) -> Result<(), Error> {
        if self.running.contains_key(&id) {
            return Ok(());
        }
        let config = self.configs.get(&id).ok_or_else(|| Error::InvalidRequest {
            reason: format!("the cluster has no broker {id}"),
        })?;
        let broker = Broker::builder(config.clone()).start().await?;
        self.running.insert(id, broker);
        Ok(())
    }

    /// Stops every broker in order.
    pub async fn shutdown(mut self) {
        for broker in std::mem::take(&mut self.running).into_values() {
            broker.shutdown().await;
        }
    }
}

fn free_addresses(brokers: u32) -> Result<Vec<(BrokerId, String)>, Error> {
    let unreachable = |error: std::io::Error| Error::Unreachable {
        address: "127.0.0.1:0".to_owned(),
        reason: error.to_string(),
    };
    // all are held until each is known, so that none is given twice
    let listeners: Result<Vec<TcpListener>, _> = (0..brokers)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect();
    let listeners = listeners.map_err(unreachable)?;
    (1..)
        .zip(&listeners)
        .map(|(id, listener)| {
            let address = listener.local_addr().map_err(unreachable)?;
            Ok((BrokerId(id), address.to_string()))
        })
        .collect()
}
