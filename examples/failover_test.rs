//! A failover test: a cluster in this process, clients at work, the leader is lost twice, and the history is judged.
//!
//! `cargo run --example failover_test`; what it does line by line is in `docs/testing-your-service.md`.

// An example talks to whoever runs it.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use logboom::client::NewTopic;
use logboom::testkit::checker::{Coverage, Report};
use logboom::testkit::workload::{Workload, WorkloadConfig};
use logboom::testkit::{LocalCluster, wait_until};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let report = run().await?;
    println!("{report}");
    assert!(report.passed());
    Ok(())
}

pub(crate) async fn run() -> Result<Report, Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let mut cluster = LocalCluster::start(3, directory.path(), |_| {}).await?;
    let client = cluster.client().await?;
    let topic = NewTopic::new("orders", 1, 3).with_config("min.insync.replicas", "2");
    client.admin().create_topic(topic).await?;

    let recorder = cluster.record();
    let workload = Workload::start(&client, &recorder, WorkloadConfig::new("orders", 1))?;
    let answers = async |more: u64| {
        let goal = recorder.counts().ok + more;
        wait_until(Duration::from_secs(30), "answers", async || {
            let counts = recorder.counts();
            if counts.ok < goal {
                Err(format!("{counts:?}"))
            } else {
                Ok(())
            }
        })
        .await
    };

    // The leader dies, and comes back.
    answers(100).await?;
    let dead = cluster.wait_for_leader("orders", 0).await?;
    cluster.kill(dead).await;
    cluster.wait_for_leader("orders", 0).await?;
    answers(100).await?;
    cluster.restart(dead).await?;
    cluster.wait_until_in_sync("orders").await?;

    // The leader is cut off, and does not know it.
    let alone = cluster.wait_for_leader("orders", 0).await?;
    cluster.isolate(alone);
    assert_ne!(cluster.wait_for_leader("orders", 0).await?, alone);
    answers(100).await?;
    cluster.heal();
    cluster.wait_until_in_sync("orders").await?;

    workload.stop().await;
    let enough = Coverage {
        operations_min: 300,
        leader_changes_min: 2,
        faults: [("kill".to_owned(), 1), ("partition".to_owned(), 1)].into(),
        ..Coverage::default()
    };
    let report = cluster.judge(recorder, "orders", &enough).await?;
    cluster.shutdown().await;
    Ok(report)
}
