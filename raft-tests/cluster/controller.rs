//! Brokers gone that the controller needs and the data does not.

use std::time::Duration;

use logboom::client::{Client, ClientConfig, NewTopic};
use logboom::types::{BrokerId, Error, Offset};

use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify};
use crate::{HEAL, create, describe, healed};

const TOPIC: &str = "without-controller";

/// Goal: produce, failover and fetch need no controller; changes of metadata are refused without its majority, and nothing of
/// a refused change appears later. Method: five brokers, all voters of the controller; under load SIGKILL to the two that hold no
/// replica of the partition and to the one that leads it, so that two of five are left, and two of three copies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn produce_and_fetch_go_on_without_the_controllers_majority() {
    let mut cluster = ProcessCluster::builder(5)
        .key("preferred_leader_delay_ms", 100)
        .start()
        .await;
    let mut client = cluster.client().await;
    create(&client, TOPIC, 1, 3, &[]).await;
    let view = healed(&client, TOPIC).await.remove(&0).unwrap();
    let holders: Vec<u32> = view.replicas.iter().map(|one| one.broker.0).collect();
    let leader = view.leader.unwrap().0;
    let mut victims: Vec<u32> = (1..=5).filter(|id| !holders.contains(id)).collect();
    victims.push(leader);
    let workload = Workload::start(&client, WorkloadConfig::new(TOPIC, 1));
    workload.wait_acked(100, HEAL).await;

    cluster.kill_9_all(&victims).await;

    workload.wait_acked(300, HEAL).await;
    let partition = client.topic(TOPIC).unwrap().partition(0);
    let end = partition.end_offset(true).await.unwrap();
    assert!(end >= Offset(300), "{end:?}");
    let read = partition.read(Offset(0), 1 << 20).await.unwrap();
    assert!(read.high_watermark >= end && !read.records.is_empty());
    let leader_now = describe(&client, TOPIC).await.unwrap().partitions[0].leader;
    assert!(
        leader_now.is_some_and(|now| now != BrokerId(leader)),
        "{leader_now:?}"
    );
    let impatient = ClientConfig {
        deadline: Duration::from_secs(2),
        ..ClientConfig::default()
    };
    let refused = Client::connect(&cluster.bootstrap(), impatient)
        .await
        .unwrap()
        .admin()
        .create_topic(NewTopic::new("refused", 1, 1))
        .await
        .expect_err("two of five voters cannot create a topic");
    assert_eq!(refused, Error::ControllerUnavailable);

    for victim in victims {
        cluster.restart(victim).await;
    }
    cluster.wait_alive(HEAL).await;
    healed(&client, TOPIC).await;
    let topics = client.admin().describe(None).await.unwrap();
    let names: Vec<&str> = topics.iter().map(|topic| topic.name.as_str()).collect();
    assert_eq!(names, [TOPIC], "a refused change has come about");
    let history = workload.stop().await;
    verify(&client, TOPIC, 1, &history).await.assert_good(400);
    // A client that knows nothing of the past sees what the cluster serves now.
    client = cluster.client().await;
    create(&client, "later", 1, 3, &[]).await;
    healed(&client, "later").await;
    let errors = cluster.errors(&[]);
    assert!(errors.is_empty(), "{errors:#?}");
}
