//! The library as an embedder uses it: several brokers in one process, killed, paused, cut off and restarted.

// Figures are printed, and a helper that cannot go on ends the test.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used
)]

// Only `run` is called; its `main` is the example's.
#[allow(dead_code)]
#[path = "../../examples/failover_test.rs"]
mod failover_test;
mod faults;
mod log;

use std::time::Duration;

use logboom::client::{NewTopic, Record};
use logboom::testkit::{LocalCluster, eventually};
use logboom::types::{Acks, BrokerId, Offset};

const HEAL: Duration = Duration::from_secs(30);

fn record(text: &str) -> Record {
    Record {
        value: Some(text.to_owned().into()),
        ..Record::default()
    }
}

/// Goal: the document's example. Method: brokers 1, 2, 3; `topic-x` with 2 partitions and two copies: partition 0 on brokers
/// 1 and 2 led by 1, partition 1 on brokers 2 and 3 led by 2; broker 1 is killed and broker 2 leads partition 0 with
/// everything acknowledged; broker 1 returns and leads again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn example_of_the_document_holds() {
    log::start();
    let directory = tempfile::tempdir().unwrap();
    let adjust = |config: &mut logboom::config::BrokerConfig| {
        config.preferred_leader_delay_ms = 100;
    };
    let mut cluster = LocalCluster::start(3, directory.path(), adjust)
        .await
        .unwrap();
    let client = cluster.client().await.unwrap();
    client
        .admin()
        .create_topic(NewTopic::new("topic-x", 2, 2))
        .await
        .unwrap();
    let led = async |partition: usize| {
        let views = client
            .admin()
            .describe(Some(&["topic-x".to_owned()]))
            .await
            .ok()?;
        let view = views.first()?.partitions.get(partition)?.clone();
        let replicas: Vec<u32> = view
            .replicas
            .iter()
            .map(|replica| replica.broker.0)
            .collect();
        let isr: Vec<u32> = view.isr.iter().map(|broker| broker.0).collect();
        Some((view.leader?.0, replicas, isr))
    };
    assert!(
        eventually(HEAL, async || led(0).await
            == Some((1, vec![1, 2], vec![1, 2])))
        .await
    );
    assert!(
        eventually(HEAL, async || led(1).await
            == Some((2, vec![2, 3], vec![2, 3])))
        .await
    );

    let partition = client.topic("topic-x").unwrap().partition(0);
    for number in 0..20 {
        let text = format!("before {number}");
        partition.append([record(&text)], Acks::All).await.unwrap();
    }
    cluster.kill(BrokerId(1)).await;
    assert!(
        eventually(HEAL, async || led(0).await
            == Some((2, vec![1, 2], vec![2])))
        .await
    );
    let ack = partition
        .append([record("after")], Acks::All)
        .await
        .unwrap();
    assert_eq!(ack.offset, Offset(20));
    cluster.restart(BrokerId(1)).await.unwrap();
    assert!(
        eventually(HEAL, async || led(0).await
            == Some((1, vec![1, 2], vec![1, 2])))
        .await
    );
    assert_eq!(partition.end_offset(true).await.unwrap(), Offset(21));
    let read = partition.read(Offset(0), 1 << 20).await.unwrap();
    assert_eq!(read.records.len(), 21);
    cluster.shutdown().await;
}

/// Goal: the example that embedders copy does what it says. Method: it is run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn example_of_a_failover_test_passes() {
    let report = failover_test::run().await.unwrap();
    println!("{report}");
    assert!(report.passed(), "{report}");
}

/// Goal: a cluster that goes out of scope leaves nothing running, whatever state its brokers are in. Method: one broker is paused, one
/// killed, the cluster dropped; another cluster starts in the same directories, which only one store can have at a time, under
/// new addresses, and has what was acknowledged.
#[tokio::test]
async fn a_dropped_cluster_lets_go_of_everything() {
    log::start();
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = LocalCluster::start(3, directory.path(), |_| {})
        .await
        .unwrap();
    let client = cluster.client().await.unwrap();
    let topic = NewTopic::new("t", 1, 3);
    client.admin().create_topic(topic).await.unwrap();
    let partition = client.topic("t").unwrap().partition(0);
    partition.append([record("kept")], Acks::All).await.unwrap();
    cluster.pause(BrokerId(2)).await;
    cluster.kill(BrokerId(3)).await;
    let addresses = cluster.bootstrap();
    drop(cluster);
    for address in &addresses {
        let refused = tokio::net::TcpStream::connect(address).await;
        assert!(refused.is_err(), "somebody still listens at {address}");
    }
    let cluster = LocalCluster::start(3, directory.path(), |_| {})
        .await
        .unwrap();
    cluster.wait_until_in_sync("t").await.unwrap();
    let client = cluster.client().await.unwrap();
    let partition = client.topic("t").unwrap().partition(0);
    let read = partition.read(Offset(0), 1 << 20).await.unwrap();
    assert_eq!(read.records.len(), 1);
}

/// Goal: a wait that is in vain ends in time and says what was seen. Method: a topic whose only leader is gone, and one that is
/// not there.
#[tokio::test]
async fn a_wait_in_vain_says_what_was_seen() {
    log::start();
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = LocalCluster::start(1, directory.path(), |_| {})
        .await
        .unwrap();
    cluster.set_patience(Duration::from_millis(300));
    let error = cluster.wait_for_leader("nowhere", 0).await.unwrap_err();
    let said = error.to_string();
    assert!(
        said.starts_with("waited 300ms for a leader of nowhere-0") && said.contains("broker 1: "),
        "{said}"
    );
    cluster.kill(BrokerId(1)).await;
    let error = cluster.wait_for_leader("nowhere", 0).await.unwrap_err();
    println!("{error}");
    assert!(error.last.contains("broker 1: "), "{error}");
    let error = cluster.wait_until_in_sync("nowhere").await.unwrap_err();
    println!("{error}");
}
