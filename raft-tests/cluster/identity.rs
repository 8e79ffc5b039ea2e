//! Data directories that are not what they claim to be: copied, restored from an old copy, deleted.

use std::fs;
use std::path::Path;
use std::time::Duration;

use logboom::client::NewTopic;
use logboom::types::BrokerId;

use crate::cluster::{HEAL, create, healed};
use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify};

const TOPIC: &str = "identity";

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
    for entry in fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display())) {
        let entry = entry.unwrap_or_else(|error| panic!("{error}"));
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

async fn with_load(cluster: &ProcessCluster) -> (logboom::client::Client, Workload) {
    let client = cluster.client().await;
    create(&client, TOPIC, 2, 3, &[]).await;
    healed(&client, TOPIC).await;
    let workload = Workload::start(&client, WorkloadConfig::new(TOPIC, 2));
    workload.wait_acked(200, HEAL).await;
    (client, workload)
}

async fn finish(
    cluster: &ProcessCluster,
    client: &logboom::client::Client,
    workload: Workload,
    expected: &[&str],
) {
    workload.wait_acked(200, HEAL).await;
    let history = workload.stop().await;
    let verdict = verify(client, TOPIC, 2, &history).await;
    println!("{verdict}");
    verdict.assert_good(400);
    let errors = cluster.errors(expected);
    assert!(errors.is_empty(), "{errors:#?}");
}

/// Goal: one broker's directory is never taken for another's. Method: broker 3 is started on a copy of broker 2's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directory_of_another_broker_is_refused() {
    let mut cluster = ProcessCluster::start_brokers(3).await;
    let (client, workload) = with_load(&cluster).await;
    cluster.stop(3).await;
    cluster.stop(2).await;
    let own = cluster.data_dir(3).with_file_name("own");
    fs::rename(cluster.data_dir(3), &own).unwrap_or_else(|error| panic!("{error}"));
    copy(cluster.data_dir(2), cluster.data_dir(3));
    cluster.restart(2).await;
    cluster.start(3);
    let status = cluster.ended(3).await;
    assert_eq!(status.code(), Some(1), "{}", cluster.log(3));
    assert!(
        cluster.log(3).contains("belongs to broker 2"),
        "{}",
        cluster.log(3)
    );
    cluster.wipe(3);
    fs::rename(&own, cluster.data_dir(3)).unwrap_or_else(|error| panic!("{error}"));
    cluster.restart(3).await;
    healed(&client, TOPIC).await;
    finish(&cluster, &client, workload, &["belongs to broker 2"]).await;
}

/// Goal: a directory of another cluster takes no part, and costs the broker that it is taken for nothing. Method: broker 3, which has
/// the only copy of a record, is started on the directory of another cluster's broker 3, and then on its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directory_of_another_cluster_is_refused() {
    let mut other = ProcessCluster::start_brokers(3).await;
    let there = other.client().await;
    create(&there, TOPIC, 1, 3, &[]).await;
    let mut cluster = ProcessCluster::start_brokers(3).await;
    let client = cluster.client().await;
    let mut single = NewTopic::new("single", 1, 1);
    single.assignment = vec![vec![BrokerId(3)]];
    let created = client.admin().create_topic(single).await;
    created.unwrap_or_else(|error| panic!("{error}"));
    let workload = Workload::start(
        &client,
        WorkloadConfig {
            records_max: 200,
            ..WorkloadConfig::new("single", 1)
        },
    );
    workload.wait_acked(200, HEAL).await;
    let history = workload.stop().await;
    cluster.stop(3).await;
    other.stop(3).await;
    let own = cluster.data_dir(3).with_file_name("own");
    fs::rename(cluster.data_dir(3), &own).unwrap_or_else(|error| panic!("{error}"));
    copy(other.data_dir(3), cluster.data_dir(3));
    cluster.start(3);
    let status = cluster.ended(3).await;
    assert_eq!(status.code(), Some(1), "{}", cluster.log(3));
    let refusal = "belongs to cluster";
    assert!(cluster.log(3).contains(refusal), "{}", cluster.log(3));
    cluster.wipe(3);
    fs::rename(&own, cluster.data_dir(3)).unwrap_or_else(|error| panic!("{error}"));
    cluster.restart(3).await;
    healed(&client, "single").await;
    let verdict = verify(&client, "single", 1, &history).await;
    verdict.assert_good(200);
    let errors = cluster.errors(&[refusal]);
    assert!(errors.is_empty(), "{errors:#?}");
}

/// Goal: an old copy of a directory, restored, takes no part. Method: copy broker 3's directory, write on, put the copy in
/// its place: refused. With the directory deleted the broker comes back with new replicas.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_copy_is_refused_and_a_deleted_directory_comes_back_as_new_replicas() {
    let mut cluster = ProcessCluster::start_brokers(3).await;
    let (client, workload) = with_load(&cluster).await;
    cluster.kill_9(3).await;
    let old = cluster.data_dir(3).with_file_name("old");
    copy(cluster.data_dir(3), &old);
    cluster.restart(3).await;
    healed(&client, TOPIC).await;
    workload.wait_acked(2_000, HEAL).await;
    cluster.kill_9(3).await;
    cluster.wipe(3);
    fs::rename(&old, cluster.data_dir(3)).unwrap_or_else(|error| panic!("{error}"));
    cluster.start(3);
    let status = cluster.ended(3).await;
    assert_eq!(status.code(), Some(1), "{}", cluster.log(3));
    assert!(cluster.log(3).contains("old copy"), "{}", cluster.log(3));
    workload.wait_acked(100, HEAL).await;
    // the way out that the message names
    cluster.wipe(3);
    cluster.restart(3).await;
    healed(&client, TOPIC).await;
    // the new replicas hold everything: they go on when another broker is gone
    cluster.kill_9(1).await;
    workload.wait_acked(200, HEAL).await;
    cluster.restart(1).await;
    healed(&client, TOPIC).await;
    finish(&cluster, &client, workload, &["old copy"]).await;
}

/// Goal: two processes never run on one directory, nor as one broker. Method: a second process with the same
/// configuration on another port, then one on a copy of the directory while the original runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_process_with_one_identity_is_refused() {
    let cluster = ProcessCluster::start_brokers(3).await;
    let (client, workload) = with_load(&cluster).await;
    let binary = env!("CARGO_BIN_EXE_logboom");
    let run = |directory: &Path| {
        let output = std::process::Command::new(binary)
            .args(["serve", "--config"])
            .arg(cluster.config_file(2))
            .args(["--listen", "127.0.0.1:0"])
            .args(["--advertise", cluster.address(2), "--data-dir"])
            .arg(directory)
            .output();
        output.unwrap_or_else(|error| panic!("{error}"))
    };
    let same = run(cluster.data_dir(2));
    let text = String::from_utf8_lossy(&same.stderr).into_owned();
    assert_eq!(same.status.code(), Some(1), "{text}");
    assert!(text.contains("in use by another process"), "{text}");
    let twin = cluster.data_dir(2).with_file_name("twin");
    copy(cluster.data_dir(2), &twin);
    let began = tokio::time::Instant::now();
    let clone = run(&twin);
    let text = String::from_utf8_lossy(&clone.stderr).into_owned();
    assert_eq!(clone.status.code(), Some(1), "{text}");
    let known = ["is running already", "old copy", "damaged"];
    assert!(known.iter().any(|phrase| text.contains(phrase)), "{text}");
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "it took {:?} to refuse",
        began.elapsed()
    );
    finish(&cluster, &client, workload, &[]).await;
}
