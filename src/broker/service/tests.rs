//! Requests to whole brokers of one process.

use tokio::time::timeout;

use super::*;
use crate::api::{PartitionReport, answer_from_message};
use crate::broker::Broker;
use crate::config::BrokerConfig;
use crate::net::{Connection, NetConfig};
use crate::runtime::Tasks;
use crate::testkit::LocalCluster;
use crate::types::{LeaderEpoch, Outcome, PartitionId, ReplicaKind};

const PATIENCE: Duration = Duration::from_secs(30);

async fn ask(connection: &Connection, request: Request) -> Result<Response, Error> {
    let call = Call {
        timeout_ms: 10_000,
        forward: true,
        request,
    };
    let pending = connection.call(call.into_message(), PATIENCE).unwrap();
    answer_from_message(pending.await.unwrap()).unwrap()
}

/// Goal: a directory of another cluster is refused before anything is written down, under a number that is free as well. Method: the
/// same request to register, from another cluster and from none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_of_another_cluster_is_not_registered() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = LocalCluster::start(1, directory.path(), |_| {})
        .await
        .unwrap();
    let admin = cluster.client().await.unwrap().admin();
    let tasks = Tasks::new();
    let address = cluster.bootstrap().remove(0);
    let connection = Connection::open(&address, &NetConfig::default(), &tasks)
        .await
        .unwrap();
    for (theirs, brokers) in [(Some(ClusterId(1)), 1), (None, 2)] {
        let register = Request::RegisterBroker {
            endpoint: Endpoint {
                broker: BrokerId(8),
                address: "127.0.0.1:1".to_owned(),
            },
            incarnation: Incarnation(8),
            rack: None,
            boot: 1,
            position: 0,
            cluster: theirs,
        };
        let answer = ask(&connection, register).await;
        let is_refused = matches!(answer, Err(Error::Refused { .. }));
        assert_eq!(is_refused, theirs.is_some(), "{answer:?}");
        let known = admin.cluster_status().await.unwrap().brokers.len();
        assert_eq!(known, brokers, "{theirs:?}");
    }
}

/// Goal: a client cannot speak for a broker; a report in its name could lock its data directory out for good. Method: each
/// request between brokers over a client's connection; then the broker starts again on its directory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_cannot_speak_for_a_broker() {
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = LocalCluster::start(1, directory.path(), |_| {})
        .await
        .unwrap();
    let broker = BrokerId(1);
    let tasks = Tasks::new();
    let address = cluster.bootstrap().remove(0);
    let connection = Connection::open(&address, &NetConfig::default(), &tasks)
        .await
        .unwrap();
    let partition = TopicPartition {
        topic: TopicName::new("t").unwrap(),
        partition: PartitionId(0),
    };
    let report = PartitionReport {
        partition: partition.clone(),
        epoch: LeaderEpoch(u64::MAX),
        isr: vec![broker],
        voters: Vec::new(),
        change: 0,
    };
    let position = u64::MAX;
    let damage = Request::ReportDamage {
        partition: partition.clone(),
        replica: ReplicaId::new(broker, ReplicaKind::Data, 1),
        epoch: LeaderEpoch(0),
    };
    for request in [
        Request::ReportPartitions {
            broker,
            reports: vec![report],
            position,
        },
        Request::MoveLeader {
            partition,
            to: ReplicaId::new(broker, ReplicaKind::Data, 1),
        },
        Request::DescribeLed { topics: None },
        damage,
    ] {
        let shown = format!("{request:?}");
        let answer = ask(&connection, request).await;
        assert!(
            matches!(answer, Err(Error::Refused { .. })),
            "{shown}: {answer:?}"
        );
    }
    drop(connection);
    // a broker that has failed sends its callers elsewhere
    let running = cluster.broker(broker).unwrap().clone();
    running.context.fail(Error::Failed {
        reason: "by this test".to_owned(),
    });
    let call = Call {
        timeout_ms: 1_000,
        forward: true,
        request: Request::ClusterStatus,
    };
    let answer = running.service.answer(call, None).await;
    assert!(
        answer.as_ref().is_err_and(Error::is_retriable),
        "{answer:?}"
    );
    cluster.kill(broker).await;
    cluster.restart(broker).await.unwrap();
    let running = cluster.broker(broker).unwrap().clone();
    timeout(PATIENCE, running.wait_ready()).await.unwrap();
    cluster.shutdown().await;
    tasks.shutdown().await;
}

/// Goal: what brokers have flushed is told by any of them, for all of them, and grows with what is appended. Method: three brokers with a copy each,
/// asked before and after twenty appends of two records, one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushes_are_counted_on_every_broker() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = LocalCluster::start(3, directory.path(), |_| {})
        .await
        .unwrap();
    let client = cluster.client().await.unwrap();
    let topic = crate::client::NewTopic::new("t", 1, 3).with_config("min.insync.replicas", "3");
    client.admin().create_topic(topic).await.unwrap();
    cluster.wait_until_in_sync("t").await.unwrap();
    let before = client.admin().broker_figures().await.unwrap();
    let partition = client.topic("t").unwrap().partition(0);
    for _ in 0..20 {
        let records = [
            crate::client::Record::new("a"),
            crate::client::Record::new("b"),
        ];
        let appended = partition.append(records, crate::types::Acks::All).await;
        appended.unwrap();
    }
    let after = client.admin().broker_figures().await.unwrap();
    let brokers: Vec<u32> = after.iter().map(|one| one.broker.0).collect();
    assert_eq!(brokers, [1, 2, 3]);
    for (before, after) in before.iter().zip(&after) {
        // Each waits for the one before, and an entry holds both records of an append.
        assert!(after.flushes >= before.flushes + 20, "{before:?} {after:?}");
        assert!(
            after.flushed_entries >= before.flushed_entries + 20,
            "{before:?} {after:?}"
        );
        assert!(
            after.flushed_bytes > before.flushed_bytes,
            "{before:?} {after:?}"
        );
    }
    cluster.shutdown().await;
}

/// Goal: a broker that waits for its cluster is not taken for an empty one. Method: one of two that found a cluster, without the other:
/// every question of a client is refused for now; what founds a cluster is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_without_a_cluster_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let config = BrokerConfig {
        listen: "127.0.0.1:0".to_owned(),
        data_dir: directory.path().to_owned(),
        // nobody listens on port 1
        bootstrap: vec!["1@localhost:1".to_owned(), "2@127.0.0.1:1".to_owned()],
        ..BrokerConfig::default()
    };
    let broker = Broker::builder(config).start().await.unwrap();
    let name = TopicName::new("t").unwrap();
    let partition = TopicPartition {
        topic: name.clone(),
        partition: PartitionId(0),
    };
    let ask = async |request| {
        let call = Call {
            timeout_ms: 5_000,
            forward: true,
            request,
        };
        broker.service.answer(call, None).await
    };
    for request in [
        Request::Metadata { topics: None },
        Request::ClusterStatus,
        Request::DescribeTopics { topics: None },
        Request::DeleteTopic { name },
        Request::Trim {
            partition,
            offset: crate::types::Offset(0),
        },
    ] {
        let shown = format!("{request:?}");
        let error = ask(request).await.expect_err(&shown);
        let expected = Error::NotJoined {
            broker: BrokerId(1),
        };
        assert_eq!(error, expected, "{shown}");
        assert!(error.is_retriable() && error.outcome() == Outcome::NotDone);
    }
    let cluster = ClusterId(7);
    let adopted = ask(Request::AdoptCluster { cluster }).await;
    assert_eq!(adopted, Ok(Response::Adopted));
    broker.shutdown().await;
}
