//! The library as an embedder uses it: several brokers in one process, killed, paused, cut off and restarted.

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
