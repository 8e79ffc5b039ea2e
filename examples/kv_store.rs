//! A small linearizable key-value store on one partition: the log is the database, a map in memory is the view.
//!
//! A write is an append. A read asks for the end of the log, linearizably, and waits until the view has applied everything
//! below it: so it sees every write that was acknowledged before it began, on whichever broker it runs.
//!
//! `cargo run --example kv_store`

// An example talks to whoever runs it.
#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::StreamExt;
use logboom::broker::Broker;
use logboom::client::{Client, Consumer, From, NewTopic, Partition, Partitions, Record};
use logboom::config::BrokerConfig;
use logboom::runtime::Tasks;
use logboom::types::{Acks, Error, Offset};
use tokio::sync::watch;

/// The store. Any number of them, on any brokers, show the same.
struct KvStore {
    log: Partition,
    view: Arc<Mutex<HashMap<Bytes, Bytes>>>,
    applied: watch::Receiver<Offset>,
    tasks: Tasks,
}

impl KvStore {
    /// Opens the store in `topic`, which has one partition, and begins to apply its log.
    async fn open(client: &Client, topic: &str) -> Result<Self, Error> {
        let log = client.topic(topic)?.partition(0);
        let start = log.start_offset().await?;
        let view: Arc<Mutex<HashMap<Bytes, Bytes>>> = Arc::default();
        let (progress, applied) = watch::channel(start);
        let tasks = Tasks::new();
        let only = Partitions::List(vec![0]);
        let mut records = Consumer::new(client, topic, only, From::Offset(start)).stream();
        tasks.spawn({
            let view = view.clone();
            async move {
                while let Some(record) = records.next().await {
                    let record = match record {
                        Ok(record) => record,
                        // The stream goes on from the same place; anything else ends it.
                        Err(error) if error.is_retriable() => continue,
                        Err(error) => {
                            println!("the view has ended: {error}");
                            return;
                        }
                    };
                    let mut view = view.lock().unwrap_or_else(PoisonError::into_inner);
                    match (record.key, record.value) {
                        (Some(key), Some(value)) => view.insert(key, value),
                        (Some(key), None) => view.remove(&key),
                        (None, _) => None,
                    };
                    drop(view);
                    progress.send_replace(record.offset.plus(1));
                }
            }
        });
        Ok(Self {
            log,
            view,
            applied,
            tasks,
        })
    }

    /// Sets a key. When the error's `outcome()` is unknown, it may have been set.
    async fn put(&self, key: &str, value: &str) -> Result<(), Error> {
        let record = Record::new(value.to_owned()).with_key(key.to_owned());
        self.log.append([record], Acks::All).await.map(|_| ())
    }

    /// Removes a key.
    async fn delete(&self, key: &str) -> Result<(), Error> {
        let record = Record {
            value: None,
            ..Record::new("").with_key(key.to_owned())
        };
        self.log.append([record], Acks::All).await.map(|_| ())
    }

    /// The key's value now: at some moment between the call and its return.
    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        let end = self.log.end_offset(true).await?;
        let mut applied = self.applied.clone();
        let seen = applied.wait_for(|applied| *applied >= end).await.is_ok();
        if !seen {
            return Err(Error::Refused {
                reason: "the view has ended".to_owned(),
            });
        }
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(view.get(key.as_bytes()).cloned())
    }

    async fn close(self) {
        self.tasks.shutdown().await;
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = BrokerConfig {
        listen: "127.0.0.1:0".to_owned(),
        data_dir: directory.path().to_owned(),
        ..BrokerConfig::default()
    };
    let broker = Broker::builder(config).start().await?;
    broker.wait_ready().await;
    let client = broker.client();
    client
        .admin()
        .create_topic(NewTopic::new("settings", 1, 1))
        .await?;

    let writer = KvStore::open(&client, "settings").await?;
    let reader = KvStore::open(&client, "settings").await?;
    writer.put("colour", "red").await?;
    writer.put("colour", "blue").await?;
    println!("colour is {:?}", reader.get("colour").await?);
    writer.delete("colour").await?;
    println!("colour is {:?}", reader.get("colour").await?);

    writer.close().await;
    reader.close().await;
    broker.shutdown().await;
    Ok(())
}
