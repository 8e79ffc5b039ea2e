//! The workload, the recorder and the checker over a real cluster.

use std::collections::BTreeMap;
use std::time::Duration;

use logboom::client::NewTopic;
use logboom::testkit::checker::{Coverage, check};
use logboom::testkit::history::{Call, Outcome};
use logboom::testkit::recorder::Recorder;
use logboom::testkit::workload::{Workload, WorkloadConfig, read_final_logs};
use logboom::testkit::{LocalCluster, eventually};
use logboom::types::BrokerId;

const HEAL: Duration = Duration::from_secs(30);

/// Goal: what the workload records of a cluster that loses and regains a leader is enough to judge, and is judged clean. Method:
/// three brokers, two partitions with three copies; broker 1 is killed under load and comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_under_load_is_recorded_and_judged_clean() {
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = LocalCluster::start(3, directory.path(), |_| ())
        .await
        .unwrap();
    let client = cluster.client().await.unwrap();
    let topic = NewTopic::new("t", 2, 3);
    client.admin().create_topic(topic).await.unwrap();

    let recorder = Recorder::real();
    let workload = Workload::start(&client, &recorder, WorkloadConfig::new("t", 2)).unwrap();
    let done = async |more: u64| {
        let goal = recorder.counts().ok + more;
        assert!(eventually(HEAL, async || recorder.counts().ok >= goal).await);
    };
    done(500).await;
    let fault = recorder.fault_began("kill", "broker 1");
    cluster.kill(BrokerId(1)).await;
    done(500).await;
    cluster.restart(BrokerId(1)).await.unwrap();
    recorder.fault_ended(fault);
    done(500).await;
    workload.stop().await;
    let logs = read_final_logs(&client, &recorder, "t", 2, HEAL).await;
    let mut history = recorder.finish();
    history.logs = logs.unwrap();
    cluster.shutdown().await;

    let coverage = Coverage {
        operations_min: 1_500,
        leader_changes_min: 1,
        faults: BTreeMap::from([("kill".to_owned(), 1)]),
        ..Coverage::default()
    };
    let report = check(&history, &coverage);
    println!("{report}");
    assert!(report.passed(), "{report}");
    let each = |wanted: fn(&Call, &Outcome) -> bool| {
        let operations = history.operations.iter();
        operations
            .filter(|one| wanted(&one.call, &one.outcome))
            .count()
    };
    let is_end = |outcome: &Outcome| matches!(outcome, Outcome::End { .. });
    let kinds = [
        each(|call, outcome| {
            matches!(
                call,
                Call::Append {
                    producer: Some(_),
                    ..
                }
            ) && matches!(outcome, Outcome::Appended { copies, .. } if *copies > 1)
        }),
        each(|call, outcome| {
            matches!(call, Call::Append { producer: None, values, .. } if values.len() > 1)
                && matches!(outcome, Outcome::Appended { .. })
        }),
        each(
            |_, outcome| matches!(outcome, Outcome::Fetched { records, epoch: Some(_), .. } if !records.is_empty()),
        ),
        each(|call, outcome| *call == Call::End && matches!(outcome, Outcome::End { .. })),
        history
            .operations
            .iter()
            .filter(|one| one.call == Call::LinearizableEnd && is_end(&one.outcome))
            .count(),
    ];
    println!("producers, plain, fetches, ends, linearizable ends: {kinds:?}");
    assert!(kinds.iter().all(|count| *count > 10), "{kinds:?}");
}
