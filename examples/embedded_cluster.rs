//! Three brokers in one program: a replicated log as a part of your own process.
//!
//! `cargo run --example embedded_cluster`

// An example talks to whoever runs it.
#![allow(clippy::print_stdout)]

use std::net::TcpListener;

use futures_util::StreamExt;
use logboom::broker::Broker;
use logboom::client::{
    Consumer, From, NewTopic, Partitions, Producer, ProducerConfig, Record, Until,
};
use logboom::config::BrokerConfig;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;

    // Every broker is told the same list of brokers; together they found the cluster.
    let ports = free_ports(3)?;
    let bootstrap: Vec<String> = (1..)
        .zip(&ports)
        .map(|(id, port)| format!("{id}@127.0.0.1:{port}"))
        .collect();
    let mut brokers = Vec::new();
    for (id, port) in (1..).zip(&ports) {
        let config = BrokerConfig {
            broker_id: id,
            listen: format!("127.0.0.1:{port}"),
            data_dir: directory.path().join(format!("broker-{id}")),
            bootstrap: bootstrap.clone(),
            ..BrokerConfig::default()
        };
        brokers.push(Broker::builder(config).start().await?);
    }
    for broker in &brokers {
        broker.wait_ready().await;
    }

    // A client of any broker reaches the whole cluster, without a socket of its own.
    let first = brokers
        .first()
        .ok_or_else(|| anyhow::anyhow!("no broker was started"))?;
    let client = first.client();
    let topic = NewTopic::new("greetings", 2, 3).with_config("min.insync.replicas", "2");
    client.admin().create_topic(topic).await?;

    let producer = Producer::new(&client, "greetings", ProducerConfig::default())?;
    for word in ["hello", "world"] {
        // The first await is the place in the order, the second one the acknowledgement.
        let ack = producer.send(Record::new(word)).await?.await?;
        println!(
            "{word} is record {} of partition {}",
            ack.offset, ack.partition
        );
    }
    producer.close().await?;

    let all = Consumer::new(&client, "greetings", Partitions::All, From::Earliest);
    let mut records = all.until(Until::End).stream();
    while let Some(record) = records.next().await {
        let value = record?.value.unwrap_or_default();
        println!("read {}", String::from_utf8_lossy(&value));
    }

    for topic in client.admin().describe(None).await? {
        for partition in topic.partitions {
            let leader = partition
                .leader
                .map_or_else(|| "none".to_owned(), |id| id.to_string());
            println!(
                "partition {}: leader {leader}, ISR {:?}",
                partition.partition, partition.isr
            );
        }
    }
    drop(records);
    futures_util::future::join_all(brokers.iter().map(Broker::shutdown)).await;
    Ok(())
}

/// Ports nobody listens on now; all are held until the last one is known, so that they differ.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let held: Result<Vec<TcpListener>, _> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect();
    let ports: Result<Vec<u16>, _> = held?
        .iter()
        .map(|listener| listener.local_addr().map(|address| address.port()))
        .collect();
    Ok(ports?)
}
