//! The workload, the recorder and the checker over a real cluster.

use std::collections::BTreeMap;
use std::time::Duration;

use logboom::client::NewTopic;
use logboom::testkit::checker::{Coverage, check};
use logboom::testkit::history::{Call, History, Outcome};
use logboom::testkit::recorder::Recorder;
use logboom::testkit::workload::{Workload, WorkloadConfig, read_final_logs};
use logboom::testkit::{LocalCluster, eventually};
use logboom::types::BrokerId;

const HEAL: Duration = Duration::from_secs(30);
const PARTITIONS: u32 = 3;

/// Kills of a broker, one after the other; `ROUNDS=20` asks for more than one.
fn rounds() -> u32 {
    let asked = std::env::var("ROUNDS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Goal: what the workload records of a cluster that loses and regains leaders is enough to judge, and is judged clean. Method:
/// three brokers that lead a partition of each of two topics, one with three copies and one with two and a witness; brokers are killed under load and come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_under_load_is_recorded_and_judged_clean() {
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = LocalCluster::start(3, directory.path(), |_| ())
        .await
        .unwrap();
    let client = cluster.client().await.unwrap();
    let recorders = ["three", "two"].map(|topic| (topic, Recorder::real()));
    let mut workloads = Vec::new();
    for (copies, (topic, recorder)) in [3, 2].into_iter().zip(&recorders) {
        let new = NewTopic::new(topic, PARTITIONS, copies);
        client.admin().create_topic(new).await.unwrap();
        let config = WorkloadConfig::new(topic, PARTITIONS);
        workloads.push(Workload::start(&client, recorder, config).unwrap());
    }
    let done = async |more: u64| {
        for (topic, recorder) in &recorders {
            let goal = recorder.counts().ok + more;
            let is_there = eventually(HEAL, async || recorder.counts().ok >= goal).await;
            assert!(is_there, "{topic}: {:?}", recorder.counts());
        }
    };
    done(2_000).await;
    for round in 0..rounds() {
        let victim = BrokerId(1 + round % 3);
        let target = format!("broker {victim}");
        let faults = recorders
            .each_ref()
            .map(|(_, recorder)| recorder.fault_began("kill", &target));
        cluster.kill(victim).await;
        done(1_000).await;
        cluster.restart(victim).await.unwrap();
        for ((_, recorder), fault) in recorders.iter().zip(faults) {
            recorder.fault_ended(fault);
        }
        done(1_000).await;
    }
    for workload in workloads {
        workload.stop().await;
    }
    for (topic, recorder) in recorders {
        let logs = read_final_logs(&client, &recorder, topic, PARTITIONS, HEAL).await;
        let mut history = recorder.finish();
        history.logs = logs.unwrap();
        judge(&history);
    }
    cluster.shutdown().await;
}

fn judge(history: &History) {
    let coverage = Coverage {
        operations_min: 1_000,
        leader_changes_min: 1,
        faults: BTreeMap::from([("kill".to_owned(), 1)]),
        ..Coverage::default()
    };
    let report = check(history, &coverage);
    println!("{report}");
    assert!(report.passed(), "{report}");
    let each = |wanted: &dyn Fn(&Call, &Outcome) -> bool| {
        let operations = history.operations.iter();
        operations
            .filter(|one| wanted(&one.call, &one.outcome))
            .count()
    };
    let is_done = |outcome: &Outcome| matches!(outcome, Outcome::Appended { .. });
    let is_end = |outcome: &Outcome| matches!(outcome, Outcome::End { .. });
    // A fencer's producer; the late batches are those that are refused.
    let is_fencer = |call: &Call| matches!(call, Call::Append { producer: Some(position), .. } if position.epoch > 0);
    let is_fenced = |outcome: &Outcome| matches!(outcome, Outcome::Failed { reason } if reason.contains("fenced"));
    let kinds = [
        each(&|call, outcome| {
            matches!(
                call,
                Call::Append {
                    producer: Some(_),
                    ..
                }
            ) && matches!(outcome, Outcome::Appended { copies, .. } if *copies > 1)
        }),
        each(&|call, outcome| {
            matches!(call, Call::Append { producer: None, values, .. } if values.len() > 1)
                && is_done(outcome)
        }),
        each(&|call, outcome| is_fencer(call) && is_fenced(outcome)),
        each(&|call, outcome| is_fencer(call) && is_done(outcome)),
        each(
            &|_, outcome| matches!(outcome, Outcome::Fetched { records, epoch: Some(_), .. } if !records.is_empty()),
        ),
        each(&|call, outcome| *call == Call::End && is_end(outcome)),
        each(&|call, outcome| *call == Call::LinearizableEnd && is_end(outcome)),
    ];
    println!("producers, plain, fenced, fencing, fetches, ends, linearizable ends: {kinds:?}");
    assert!(kinds.iter().all(|count| *count > 10), "{kinds:?}");
}
