//! Wrong requests and wrong bytes, each with its definite answer; what was refused left no trace.

use std::time::Duration;

use anyhow::{Context, ensure};
use logboom::api::{OffsetSpec, Request, Response};
use logboom::client::{Client, NewTopic};
use logboom::record::ProducerStamp;
use logboom::types::{Acks, BrokerId, Error, LeaderEpoch, Offset, Outcome, PartitionId};
use serde_json::Value;

use super::raw::{
    Raw, batch, garbage, partition, produce, send_and_listen, send_until_closed,
    unreadable_requests,
};
use crate::cluster::{HEAL, create, healed};
use crate::support::command::run;
use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify, wait_for};

/// Memory that a broker may take on while it is shouted at, in KiB: far below what any of the claimed lengths would be.
const GROWTH_KIB: u64 = 64 << 10;

/// Goal: every wrong request has one definite answer, wrong bytes harm nobody, and all brokers tell the same. Method: one
/// cluster, one kind of mistake after the other, and a look at what they left behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_requests_and_wrong_bytes_have_definite_answers() {
    let cluster = ProcessCluster::builder(3)
        .key("partitions_max", 20)
        .start()
        .await;
    let client = cluster.client().await;
    create(&client, "faces", 2, 2, &[("max.message.bytes", "1024")]).await;
    healed(&client, "faces").await;
    topics_that_cannot_be(&client).await;
    requests_that_cannot_be(&cluster, &client).await;
    everybody_tells_the_same(&cluster, &client).await;
    noise_while_the_cluster_serves(&cluster, &client).await;
    deleted_and_made_anew(&cluster, &client).await;
    let errors = cluster.errors(&[]);
    assert!(errors.is_empty(), "{errors:#?}");
}

/// Partitions, replication factor, configuration, and a part of the refusal.
type WrongTopic<'a> = (u32, u32, &'a [(&'a str, &'a str)], &'a str);

async fn topics_that_cannot_be(client: &Client) {
    let wrong: [WrongTopic<'_>; 9] = [
        (0, 1, &[], "invalid number of partitions 0: use 1 to 20"),
        (21, 1, &[], "invalid number of partitions 21: use 1 to 20"),
        (u32::MAX, 1, &[], "use 1 to 20"),
        (
            1,
            0,
            &[],
            "invalid replication factor 0: the cluster has 3 usable brokers, use 1 to 3",
        ),
        (
            1,
            4,
            &[],
            "invalid replication factor 4: the cluster has 3 usable brokers, use 1 to 3",
        ),
        (
            1,
            3,
            &[("retention.ms", "5")],
            "retention.ms: unknown key, known are min.insync.replicas and max.message.bytes",
        ),
        (
            1,
            2,
            &[("min.insync.replicas", "3")],
            "\"3\" is not 1 to the replication factor, 2",
        ),
        (
            1,
            2,
            &[("max.message.bytes", "much")],
            "max.message.bytes: \"much\" is not 1024 to 16777216",
        ),
        (
            1,
            2,
            &[("max.message.bytes", "-1")],
            "is not 1024 to 16777216",
        ),
    ];
    for (partitions, factor, config, text) in wrong {
        let mut topic = NewTopic::new("never", partitions, factor);
        for (key, value) in config {
            topic = topic.with_config(key, value);
        }
        let error = client.admin().create_topic(topic).await.expect_err(text);
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(
            (error.outcome(), error.is_retriable()),
            (Outcome::NotDone, false),
            "{error}"
        );
    }
    let long = "x".repeat(250);
    for name in [
        "",
        ".",
        "..",
        "../../etc/passwd",
        "a/b",
        "a b",
        "a\0",
        "ü",
        long.as_str(),
    ] {
        let error = client.admin().create_topic(NewTopic::new(name, 1, 1)).await;
        assert!(
            matches!(error, Err(Error::InvalidTopicName { .. })),
            "{name:?}: {error:?}"
        );
    }
    let again = client
        .admin()
        .create_topic(NewTopic::new("faces", 1, 1))
        .await;
    assert!(matches!(again, Err(Error::TopicExists { .. })), "{again:?}");
    let gone = client.admin().delete_topic("never").await;
    assert!(matches!(gone, Err(Error::UnknownTopic { .. })), "{gone:?}");
    let named: Vec<String> = client
        .admin()
        .list()
        .await
        .unwrap_or_else(|error| panic!("{error}"))
        .into_iter()
        .map(|topic| topic.name.to_string())
        .collect();
    assert_eq!(named, ["faces"], "a topic that was refused is there");
}

async fn requests_that_cannot_be(cluster: &ProcessCluster, client: &Client) {
    let target = partition("faces", 0);
    let view = healed(client, "faces")
        .await
        .remove(&0)
        .expect("partition 0");
    let leader = view.leader.expect("a leader");
    let witness = view.witness.expect("a witness");
    let epoch = view.epoch;
    let at_leader = Raw::open(cluster.address(leader.0)).await;

    // Everyone but the leader names the leader, with its address.
    for broker in cluster
        .ids()
        .into_iter()
        .map(BrokerId)
        .filter(|id| *id != leader)
    {
        let other = Raw::open(cluster.address(broker.0)).await;
        for request in [
            produce(&target, Acks::All, batch(&[b"x"], None)),
            fetch("faces", 0, 0),
            Request::FindOffset {
                partition: target.clone(),
                spec: OffsetSpec::LinearizableEnd,
            },
            Request::Trim {
                partition: target.clone(),
                offset: Offset(0),
            },
        ] {
            let answer = other.ask(request.clone()).await;
            let role = if broker == witness {
                "witness"
            } else {
                "follower"
            };
            match &answer {
                Err(
                    error @ Error::NotLeader {
                        broker: by,
                        leader: Some(named),
                        ..
                    },
                ) => {
                    assert_eq!((*by, named.broker), (broker, leader), "{role}: {answer:?}");
                    assert_eq!(
                        named.address,
                        cluster.address(leader.0),
                        "{role}: {answer:?}"
                    );
                    assert_eq!(error.outcome(), Outcome::NotDone);
                    let text = format!("the leader is broker {leader} at {}", named.address);
                    assert!(error.to_string().contains(&text), "{error}");
                }
                _ => panic!("{role}, {request:?}: {answer:?}"),
            }
        }
    }

    let stamp = |id, epoch, base_sequence| {
        Some(ProducerStamp {
            id,
            epoch,
            base_sequence,
        })
    };
    let damaged = |at: usize| {
        let mut bytes = batch(&[b"precious"], None).to_vec();
        *bytes.get_mut(at).expect("inside the batch") ^= 1;
        bytes.into()
    };
    let cut = batch(&[b"precious"], None).slice(..70);
    let large = vec![b'x'; 1_024];
    let produced = |records| produce(&target, Acks::All, records);
    let cases: Vec<(&str, Request, &str)> = vec![
        (
            "no topic",
            produce(&partition("never", 0), Acks::All, batch(&[b"x"], None)),
            "no topic never; create it, as with `logboom topic create never --partitions 1 --replication-factor 1`",
        ),
        ("no topic to read", fetch("never", 0, 0), "no topic never"),
        (
            "no partition",
            produce(&partition("faces", 2), Acks::All, batch(&[b"x"], None)),
            "faces has 2 partitions, numbered from 0; there is no partition 2",
        ),
        (
            "no partition to read",
            fetch("faces", u32::MAX, 0),
            "there is no partition 4294967295",
        ),
        (
            "too large",
            produced(batch(&[&large], None)),
            "max.message.bytes is 1024; send less at a time, or use a topic that was created with more",
        ),
        (
            "a flipped bit",
            produced(damaged(75)),
            "corrupt record batch",
        ),
        (
            "a flipped length",
            produced(damaged(8)),
            "corrupt record batch",
        ),
        ("a cut batch", produced(cut), "corrupt record batch"),
        (
            "nothing",
            produced(Vec::new().into()),
            "there is no record to append",
        ),
        (
            "noise",
            produced(vec![0x5a; 300].into()),
            "corrupt record batch",
        ),
        (
            "a gap",
            produced(batch(&[b"x"], stamp(9_001, 0, 7))),
            "producer 9001: expected 0, found 7",
        ),
        (
            "behind the end",
            fetch("faces", 0, 1),
            "offset 1 of faces-0 is out of range: 0 to 0 can be read",
        ),
        (
            "far behind the end",
            fetch("faces", 0, u64::MAX),
            "is out of range",
        ),
        (
            "trim behind the end",
            Request::Trim {
                partition: target.clone(),
                offset: Offset(1),
            },
            "out of range",
        ),
    ];
    for (what, request, text) in cases {
        let answer = at_leader.ask(request).await;
        let Err(error) = answer else {
            panic!("{what}: {answer:?}")
        };
        assert!(error.to_string().contains(text), "{what}: {error}");
        assert!(!error.to_string().contains('\n'), "{what}: {error}");
        assert_eq!(error.outcome(), Outcome::NotDone, "{what}: {error}");
    }
    assert_eq!(
        end(&at_leader, "faces", 0).await,
        Offset(0),
        "something refused was appended"
    );

    // A producer's numbers: appended once, repeated without harm, a gap and an older epoch refused.
    let first = batch(&[b"one", b"two"], stamp(77, 3, 0));
    for duplicate in [false, true, true] {
        match at_leader.ask(produced(first.clone())).await {
            Ok(Response::Produced(appended)) => {
                let [one] = appended.as_slice() else {
                    panic!("{appended:?}")
                };
                assert_eq!(
                    (one.base_offset, one.count, one.duplicate),
                    (Offset(0), 2, duplicate)
                );
                assert_eq!(one.leader_epoch, epoch);
            }
            other => panic!("{other:?}"),
        }
    }
    let gap = at_leader
        .ask(produced(batch(&[b"x"], stamp(77, 3, 3))))
        .await;
    assert_eq!(
        gap,
        Err(Error::OutOfOrderSequence {
            producer_id: 77,
            expected: 2,
            found: 3
        })
    );
    let fenced = at_leader
        .ask(produced(batch(&[b"x"], stamp(77, 2, 2))))
        .await;
    assert_eq!(
        fenced,
        Err(Error::ProducerFenced {
            producer_id: 77,
            current: 3,
            found: 2
        })
    );
    assert_eq!(end(&at_leader, "faces", 0).await, Offset(2));
}

fn fetch(topic: &str, number: u32, offset: u64) -> Request {
    Request::Fetch {
        partition: partition(topic, number),
        offset: Offset(offset),
        max_bytes: 1 << 20,
        min_bytes: 0,
        max_wait_ms: 0,
    }
}

async fn end(at: &Raw, topic: &str, number: u32) -> Offset {
    let spec = OffsetSpec::LinearizableEnd;
    match at
        .ask(Request::FindOffset {
            partition: partition(topic, number),
            spec,
        })
        .await
    {
        Ok(Response::FoundOffset {
            offset: Some(offset),
            ..
        }) => offset,
        other => panic!("{other:?}"),
    }
}

/// `topic describe` and `cluster status`, asked of each broker, agree with each other.
async fn everybody_tells_the_same(cluster: &ProcessCluster, client: &Client) {
    create(client, "other", 3, 3, &[]).await;
    healed(client, "other").await;
    let told = wait_for("all brokers to tell the same", HEAL, async || {
        let mut told: Option<(Value, Value)> = None;
        for id in cluster.ids() {
            let broker = [cluster.address(id).to_owned()];
            let topics = run(&broker, &["topic", "describe", "--json"], b"")
                .await
                .good();
            let status = run(&broker, &["cluster", "status", "--json"], b"")
                .await
                .good();
            let here: (Value, Value) = (
                serde_json::from_slice(&topics)?,
                serde_json::from_slice(&status)?,
            );
            if let Some(before) = &told {
                ensure!(
                    *before == here,
                    "broker {id}: {here:#?} instead of {before:#?}"
                );
            }
            told = Some(here);
        }
        let told = told.context("no brokers")?;
        let short = told.1["under_replicated"].as_array().context("a list")?;
        ensure!(short.is_empty(), "{short:?}");
        Ok(told)
    })
    .await;
    let (topics, status) = told;
    let names: Vec<&Value> = topics
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| &one["name"])
        .collect();
    assert_eq!(names, ["faces", "other"]);
    assert_eq!(
        (&status["topics"], &status["partitions"]),
        (&2.into(), &5.into())
    );
    assert_eq!(status["leaderless"], Value::Array(Vec::new()));
    let mut leads = [0_u64; 3];
    let mut holds = [0_u64; 3];
    for topic in topics.as_array().expect("a list") {
        for view in topic["partitions"].as_array().expect("a list") {
            let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{view:#}"));
            let replicas = view["replicas"].as_array().expect("a list");
            let brokers: Vec<u64> = replicas.iter().map(|one| number(&one["broker"])).collect();
            let isr: Vec<u64> = view["isr"]
                .as_array()
                .expect("a list")
                .iter()
                .map(number)
                .collect();
            assert_eq!(
                brokers, isr,
                "all are in sync, in the order of the assignment: {view:#}"
            );
            assert_eq!(Some(&number(&view["leader"])), brokers.first(), "{view:#}");
            assert!(number(&view["epoch"]) >= 1, "{view:#}");
            for replica in replicas {
                assert_eq!(
                    (&replica["lag"], &replica["in_sync"]),
                    (&0.into(), &true.into()),
                    "{view:#}"
                );
            }
            let even = topic["replication_factor"] == 2;
            assert_eq!(view["witness"].is_u64(), even, "{view:#}");
            let records = u64::from(topic["name"] == "faces" && view["id"] == 0) * 2;
            let offsets =
                ["start_offset", "high_watermark", "end_offset"].map(|key| number(&view[key]));
            assert_eq!(offsets, [0, records, records], "{view:#}");
            let count = |counts: &mut [u64; 3], broker: u64| {
                let at = usize::try_from(broker - 1).expect("a broker");
                *counts.get_mut(at).expect("one of three") += 1;
            };
            count(&mut leads, number(&view["leader"]));
            for broker in brokers {
                count(&mut holds, broker);
            }
        }
    }
    for (at, broker) in status["brokers"]
        .as_array()
        .expect("a list")
        .iter()
        .enumerate()
    {
        let expected = (
            &leads[at].into(),
            &holds[at].into(),
            &true.into(),
            &true.into(),
        );
        let found = (
            &broker["leads"],
            &broker["replicas"],
            &broker["alive"],
            &broker["controller_voter"],
        );
        assert_eq!(found, expected, "{status:#}");
    }
}

fn resident_kib(cluster: &ProcessCluster, id: u32) -> u64 {
    let pid = cluster.pid(id).expect("it runs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("its memory");
    let number = line
        .split_whitespace()
        .nth(1)
        .and_then(|text| text.parse().ok());
    number.unwrap_or_else(|| panic!("{line}"))
}

/// Garbage, claimed lengths, connections that say nothing: hung up on, while the cluster serves.
async fn noise_while_the_cluster_serves(cluster: &ProcessCluster, client: &Client) {
    let workload = Workload::start(client, WorkloadConfig::new("other", 3));
    workload.wait_acked(200, HEAL).await;
    let address = cluster.address(1);
    let before = resident_kib(cluster, 1);
    let silent = (0..100).map(|_| send_until_closed(address, b""));
    let loud = async {
        for (what, bytes) in garbage() {
            let closed = send_until_closed(address, &bytes).await;
            let (_, after) = closed.unwrap_or_else(|error| panic!("{what}: {error:#}"));
            assert!(
                after < Duration::from_secs(6),
                "{what}: hung up after {after:?}"
            );
        }
        for (what, bytes) in unreadable_requests() {
            let said = send_and_listen(address, &bytes, "cannot decode").await;
            said.unwrap_or_else(|error| panic!("{what}: {error:#}"));
        }
    };
    let (silent, ()) = tokio::join!(futures_util::future::join_all(silent), loud);
    for closed in silent {
        let (_, after) = closed.unwrap_or_else(|error| panic!("{error:#}"));
        assert!(after < Duration::from_secs(8), "hung up after {after:?}");
    }
    workload.wait_acked(200, HEAL).await;
    let grown = resident_kib(cluster, 1).saturating_sub(before);
    assert!(grown < GROWTH_KIB, "{grown} KiB more");
    let history = workload.stop().await;
    let verdict = verify(client, "other", 3, &history).await;
    verdict.assert_good(400);
    let silence = (0..3)
        .map(|one| history.longest_silence(one))
        .max()
        .unwrap_or_default();
    println!("longest silence while shouted at: {silence:?}, {grown} KiB more");
    assert!(silence < Duration::from_secs(2), "{silence:?}");
}

/// A topic deleted and created again under its name is empty, and nobody's old offsets or numbers count in it.
async fn deleted_and_made_anew(cluster: &ProcessCluster, client: &Client) {
    create(client, "again", 1, 3, &[]).await;
    let old = healed(client, "again")
        .await
        .remove(&0)
        .expect("partition 0");
    let topic = client
        .topic("again")
        .unwrap_or_else(|error| panic!("{error}"));
    let record = |text: &'static str| [logboom::client::Record::new(text)];
    let appended = topic.partition(0).append(record("old"), Acks::All).await;
    assert_eq!(appended.map(|ack| ack.offset), Ok(Offset(0)));
    let producer = topic
        .producer(logboom::client::ProducerConfig::default())
        .expect("a producer");
    let sent = producer
        .send(logboom::client::Record::new("old too"))
        .await
        .expect("sent");
    assert_eq!(sent.await.map(|ack| ack.offset), Ok(Offset(1)));
    client
        .admin()
        .delete_topic("again")
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    let leader = Raw::open(cluster.address(old.leader.expect("a leader").0)).await;
    wait_for("the old leader to forget", HEAL, async || {
        let answer = leader.ask(fetch("again", 0, 0)).await;
        ensure!(
            matches!(answer, Err(Error::UnknownTopic { .. })),
            "{answer:?}"
        );
        Ok(())
    })
    .await;
    let refused = topic.partition(0).append(record("lost"), Acks::All).await;
    assert!(
        matches!(refused, Err(Error::UnknownTopic { .. })),
        "{refused:?}"
    );
    let refused = match producer
        .send(logboom::client::Record::new("lost too"))
        .await
    {
        Ok(delivery) => delivery.await,
        Err(error) => Err(error),
    };
    assert!(
        matches!(refused, Err(Error::UnknownTopic { .. })),
        "{refused:?}"
    );

    create(client, "again", 1, 3, &[]).await;
    let view = healed(client, "again")
        .await
        .remove(&0)
        .expect("partition 0");
    assert_eq!(
        (view.start_offset, view.end_offset),
        (Some(Offset(0)), Some(Offset(0)))
    );
    assert!(view.epoch >= LeaderEpoch(1) && view.partition == PartitionId(0));
    // The old producer goes on, in the new topic.
    let sent = producer
        .send(logboom::client::Record::new("new"))
        .await
        .expect("sent");
    let ack = sent.await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(ack.offset, Offset(0));
    let read = topic.partition(0).read(Offset(0), 1 << 20).await;
    let values: Vec<_> = read
        .unwrap_or_else(|error| panic!("{error}"))
        .records
        .into_iter()
        .map(|record| record.value.unwrap_or_default())
        .collect();
    assert_eq!(values, ["new"]);
}
