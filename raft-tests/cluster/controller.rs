//! Brokers gone that the controller needs and the data does not.

use std::time::Duration;

use serde_json::Value;

use logboom::client::{Client, ClientConfig, NewTopic};
use logboom::types::{BrokerId, Error, Offset};

use crate::cluster::{HEAL, create, describe, healed};
use crate::support::command::{Said, run};
use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify};

const TOPIC: &str = "without-controller";

/// Goal: produce, failover and fetch need no controller; changes of metadata are refused without its majority, and nothing of
/// a refused change appears later. Method: five brokers, all voters of the controller; under load SIGKILL to the two that hold no
/// replica of the partition and to the one that leads it, so that two of five are left, and two of three copies. The commands that
/// show the cluster say meanwhile that this is what was last known, and afterwards no more.
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

    what_is_shown_is_called_old(&cluster.bootstrap()).await;

    for victim in victims {
        cluster.restart(victim).await;
    }
    cluster.wait_alive(HEAL).await;
    healed(&client, TOPIC).await;
    let status = run(&cluster.bootstrap(), &["cluster", "status", "--json"], b"").await;
    assert_eq!(json(&status.good())["stale"], Value::Null);
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

fn json(out: &[u8]) -> Value {
    let text = String::from_utf8_lossy(out);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Without its majority the controller is not shown as if all were well, and who wants a change knows why it is not made.
async fn what_is_shown_is_called_old(at: &[String]) {
    let ask = async |words: &'static [&'static str]| run(at, words, b"").await;
    let (created, status, list, described) = tokio::join!(
        ask(&[
            "topic",
            "create",
            "refused",
            "--partitions",
            "1",
            "--replication-factor",
            "1",
            "--json",
            "--timeout",
            "3"
        ]),
        ask(&["cluster", "status", "--json"]),
        ask(&["topic", "list"]),
        ask(&["topic", "describe", TOPIC, "--json"]),
    );
    // Nothing is done, in the time given, and the user knows meanwhile why.
    assert_eq!(created.code, Some(1), "{created:?}");
    assert!(created.out.is_empty(), "{created:?}");
    let lines: Vec<&str> = created.err.lines().collect();
    let [waits, refused] = lines.as_slice() else {
        panic!("{created:?}")
    };
    let waiting = "logboom: waiting for topic refused to be created and led, because the controller has no leader now";
    assert!(waits.starts_with(waiting), "{created:?}");
    assert!(
        waits.ends_with("gives up after 3 s (--timeout)"),
        "{created:?}"
    );
    assert!(
        refused.starts_with("logboom: the controller has no leader now"),
        "{created:?}"
    );
    let warned = |said: &Said| {
        // It may have said before that it waits.
        let last = said.err.lines().last().unwrap_or_default();
        let is_told = last.contains("the controller has no leader that broker ")
            && last.contains(" last knew, ");
        assert!(is_told, "{said:?}");
    };
    for (said, code) in [(&status, 1), (&list, 0), (&described, 0)] {
        assert_eq!(said.code, Some(code), "{said:?}");
        warned(said);
    }
    assert!(
        String::from_utf8_lossy(&list.out).contains(TOPIC),
        "{list:?}"
    );
    let status = json(&status.out);
    assert_eq!(status["controller"], Value::Null, "{status:#}");
    let alive = status["brokers"].as_array().expect("a list").iter();
    let alive = alive.filter(|broker| broker["alive"] == true).count();
    assert_eq!(alive, 2, "{status:#}");
    for stale in [&status["stale"], &json(&described.out)[0]["stale"]] {
        assert!(stale["broker"].is_u64(), "{stale}");
        let age_ms = stale["age_ms"].as_u64().expect("an age");
        assert!((1..60_000).contains(&age_ms), "{stale}");
    }
}
