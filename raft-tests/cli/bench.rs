//! `bench`: wrong usage, short runs with their JSON and picture, and its end by a signal.

use std::fs;
use std::time::Duration;

use anyhow::{Context, ensure};
use logboom::types::Offset;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::command::{command, finish, processes_with, run, signal};
use crate::support::{ProcessCluster, wait_for};

/// Longer than any of the runs below takes on a machine with much else to do.
const WITHIN: Duration = Duration::from_secs(240);

fn directory() -> TempDir {
    TempDir::with_prefix("logboom-bench-").unwrap_or_else(|error| panic!("{error}"))
}

/// Exit code, output and errors of a run.
async fn bench(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut words = vec!["bench"];
    words.extend(arguments);
    let output = tokio::time::timeout(WITHIN, command(&words).output());
    let output = output
        .await
        .unwrap_or_else(|_| panic!("{words:?} takes too long"));
    let output = output.unwrap_or_else(|error| panic!("{error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// The JSON on the last line of a run that was good.
fn report((code, out, err): &(Option<i32>, String, String)) -> Value {
    assert_eq!(*code, Some(0), "{out}{err}");
    let last = out.lines().last().unwrap_or_default();
    let report: Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {out}"));
    assert_eq!(report["passed"], true, "{last}");
    for what in ["lost", "duplicated", "out_of_order", "corrupt", "foreign"] {
        assert_eq!(report[what], 0, "{what}: {last}");
    }
    report
}

fn positive(object: &Value, names: &[&str]) {
    for name in names {
        let value = object[*name].as_f64();
        assert!(value.is_some_and(|value| value > 0.0), "{name}: {object}");
    }
}

/// Goal: what cannot be done is refused in one line before anything is started. Method: a table.
#[tokio::test]
async fn bench_refuses_what_cannot_be() {
    let cases: [(&[&str], &[&str]); 15] = [
        (&[], &["W1|W2|W3|W4|W5|W6|all"]),
        (&["W9"], &["W9"]),
        (&["W1", "--duration", "0"], &["--duration", "1..=600"]),
        (
            &["W1", "--record-size", "15"],
            &["--record-size: use 16 bytes", "65536"],
        ),
        (&["W1", "--record-size", "70000"], &["--record-size"]),
        (
            &["W1", "--batch-bytes", "15728640", "--record-size", "16"],
            &["--batch-bytes"],
        ),
        (&["W2", "--clients", "0"], &["--clients"]),
        (&["W2", "--rate", "0"], &["--rate: use 1 to"]),
        (&["W2", "--rate", "NaN"], &["--rate"]),
        (
            &["W2", "--brokers", "2", "--replication-factor", "3"],
            &["3 copies need as many brokers"],
        ),
        (
            &[
                "W2",
                "--replication-factor",
                "1",
                "--min-insync-replicas",
                "2",
            ],
            &["--min-insync-replicas"],
        ),
        (&["W4", "--acks", "none"], &["--acks none"]),
        (
            &["W4", "--min-insync-replicas", "3"],
            &["--min-insync-replicas: with 3 of 3", "use at most 2"],
        ),
        (
            &["W4", "--bootstrap", "127.0.0.1:1"],
            &["W4 needs brokers of its own", "leave out --bootstrap"],
        ),
        (
            &["W1", "--plot", "/nonexistent/a.svg"],
            &["--plot /nonexistent/a.svg"],
        ),
    ];
    for (arguments, parts) in cases {
        let mut words = vec!["bench"];
        words.extend(arguments);
        let child = command(&words).spawn();
        let said = finish(child.unwrap_or_else(|error| panic!("{error}")), b"").await;
        said.refused(2, parts);
    }
    let said = run(&[], &["bench", "W3", "--bootstrap", "127.0.0.1:1"], b"").await;
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.err.contains("is the cluster up?"), "{said:?}");
}

/// Goal: a run measures, reads everything back, tells it as a table, as JSON and as a picture, and leaves nothing running and no data. Method:
/// two short runs of W2.
#[tokio::test]
async fn bench_measures_and_tells() {
    let home = directory();
    let (data, plot) = (home.path().join("data"), home.path().join("w2.svg"));
    let (data, plot) = (
        data.to_str().expect("a path"),
        plot.to_str().expect("a path"),
    );
    let arguments = [
        "W2",
        "--duration",
        "2",
        "--warmup",
        "1",
        "--runs",
        "2",
        "--clients",
        "8",
    ];
    let files = ["--json", "--data", data, "--plot", plot];
    let told = bench(&[&arguments[..], &files[..]].concat()).await;
    let report = report(&told);
    let workload = &report["workloads"][0];
    assert_eq!(workload["workload"], "W2");
    assert_eq!(workload["settings"]["clients"], 8);
    assert_eq!(workload["settings"]["record_bytes"], 100);
    assert_eq!(workload["runs"].as_array().map(Vec::len), Some(2));
    assert_eq!(report["acknowledged"], report["read_back"], "{report}");
    positive(&report, &["acknowledged"]);
    for figures in ["median", "min", "max"] {
        let names = [
            "records_per_second",
            "megabytes_per_second",
            "latency_p50_us",
            "latency_p99_us",
            "latency_p99_9_us",
            "latency_max_us",
            "broker_cpu_seconds_per_megabyte",
            "broker_cpu_seconds_per_million_records",
            "brokers_resident_megabytes",
            "fsyncs_per_second_per_broker",
            "records_per_fsync",
        ];
        positive(&workload[figures], &names);
    }
    let median = &workload["median"];
    let ordered = [
        "latency_p50_us",
        "latency_p99_us",
        "latency_p99_9_us",
        "latency_max_us",
    ];
    for pair in ordered.windows(2) {
        assert!(
            median[pair[0]].as_f64() <= median[pair[1]].as_f64(),
            "{median}"
        );
    }
    let limits = &workload["machine"]["limits"];
    let names = [
        "fdatasync_4kib_p50_us",
        "write_and_sync_megabytes_per_second",
    ];
    positive(limits, &names);
    positive(
        limits,
        &["fdatasync_4kib_p99_us", "loopback_round_trip_p50_us"],
    );
    let promise = workload["acknowledgement"].as_str().unwrap_or_default();
    assert!(
        promise.contains("fdatasync has returned on 2 of 3 voters"),
        "{promise}"
    );
    for part in [
        "FIGURE",
        "records per second",
        "an acknowledgement meant: acks=all",
        "in order",
    ] {
        assert!(told.1.contains(part), "{part}: {}", told.1);
    }
    assert!(told.2.contains("W2: run 2 of 2"), "{}", told.2);
    let svg = fs::read_to_string(plot).unwrap_or_else(|error| panic!("{error}"));
    assert!(
        svg.contains("records a second") && svg.contains("p99"),
        "{svg}"
    );
    let run = home.path().join("data").join("w2-1-1");
    assert!(run.join("broker-1.log").exists() && !run.join("broker-1").exists());
    assert!(processes_with(data).is_empty());
}

/// Goal: the other workloads run and lose nothing: batches and single records, by a timetable, with kills, at rest, and reading back. Method: each as short as
/// can be.
#[tokio::test]
async fn every_workload_runs() {
    let short = [
        "--json",
        "--duration",
        "1",
        "--warmup",
        "0",
        "--runs",
        "1",
        "--limits-seconds",
        "0",
    ];
    let told = bench(&[&["W1", "W6", "--partitions", "2"], &short[..]].concat()).await;
    let batches = report(&told);
    assert_eq!(batches["workloads"].as_array().map(Vec::len), Some(2));
    for at in [0, 1] {
        positive(
            &batches["workloads"][at]["median"],
            &["megabytes_per_second"],
        );
    }
    let words = [
        "W1",
        "--single-records",
        "--rate",
        "2000",
        "--acks",
        "leader",
    ];
    let single = report(&bench(&[&words, &short[..]].concat()).await);
    let median = &single["workloads"][0]["median"];
    positive(median, &["latency_p50_us"]);
    let rate = median["records_per_second"].as_f64().unwrap_or_default();
    assert!(rate < 2_001.0, "{rate} records a second, asked for 2000");
    let words = [
        "W4",
        "--kills",
        "2",
        "--partitions",
        "3",
        "--replication-factor",
        "2",
    ];
    let kills = report(&bench(&[&words, &short[..]].concat()).await);
    let median = &kills["workloads"][0]["median"];
    assert_eq!(median["kills"], 2.0, "{median}");
    positive(
        median,
        &["time_to_next_ack_p50_ms", "time_to_next_ack_max_ms"],
    );
    let idle = report(&bench(&[&["W5", "--idle-partitions", "4,8"], &short[..]].concat()).await);
    for (at, title) in [(0, "4 partitions at rest"), (1, "8 partitions at rest")] {
        let workload = &idle["workloads"][at];
        assert_eq!(workload["title"], title);
        positive(
            &workload["median"],
            &["created_and_in_sync_seconds", "brokers_resident_megabytes"],
        );
    }
}

/// Goal: a cluster that is named is loaded and left as it was, and what cannot be known of it is left out. Method: W3 with acks=none on
/// processes of this test.
#[tokio::test]
async fn a_named_cluster_is_left_as_it_was() {
    let cluster = ProcessCluster::start_brokers(3).await;
    let bootstrap = cluster.bootstrap().join(",");
    let words = [
        "W3",
        "--bootstrap",
        &bootstrap,
        "--acks",
        "none",
        "--json",
        "--limits-seconds",
        "0",
    ];
    let short = ["--duration", "1", "--warmup", "0", "--runs", "1"];
    let report = report(&bench(&[&words[..], &short[..]].concat()).await);
    let workload = &report["workloads"][0];
    positive(
        &workload["median"],
        &["records_per_second", "fsyncs_per_second_per_broker"],
    );
    assert!(
        workload["median"]["broker_cpu_cores"].is_null(),
        "{workload}"
    );
    assert!(
        workload["notes"][0]
            .as_str()
            .is_some_and(|note| note.contains("not known"))
    );
    let listed = run(&cluster.bootstrap(), &["topic", "list"], b"")
        .await
        .good();
    let listed = String::from_utf8_lossy(&listed).into_owned();
    assert!(!listed.contains("bench-"), "{listed}");
}

/// Goal: whoever interrupts a bench finds no broker and no data behind it. Method: SIGINT while it warms up.
#[tokio::test]
async fn an_interrupted_bench_leaves_nothing_behind() {
    let home = directory();
    let words = ["bench", "W2", "--warmup", "600", "--limits-seconds", "0"];
    let mut child = command(&words);
    child.env("TMPDIR", home.path());
    let mut child = child.spawn().unwrap_or_else(|error| panic!("{error}"));
    let mut lines = BufReader::new(child.stderr.take().expect("its errors")).lines();
    let warming = tokio::time::timeout(WITHIN, async {
        loop {
            match lines.next_line().await {
                Ok(Some(line)) if line.contains("warming up") => return,
                Ok(Some(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    });
    warming
        .await
        .unwrap_or_else(|_| panic!("it does not begin"));
    signal(&child, Signal::INT);
    let status = tokio::time::timeout(WITHIN, child.wait()).await;
    let status = status.unwrap_or_else(|_| panic!("it does not end"));
    assert_eq!(status.ok().and_then(|status| status.code()), Some(1));
    let path = home.path().to_str().expect("a path").to_owned();
    wait_for("all processes to be gone", WITHIN, async || {
        let left = processes_with(&path);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await;
    let left = fs::read_dir(home.path()).expect("the directory").count();
    assert_eq!(left, 0);
}

/// Goal: a bench of which an acknowledged record is gone says so and ends with 1. Method: while it loads a cluster of this test, the first five records are
/// trimmed, which its check cannot tell from a loss.
#[tokio::test]
async fn a_missing_record_is_noticed() {
    let cluster = ProcessCluster::start_brokers(1).await;
    let bootstrap = cluster.bootstrap().join(",");
    let words = [
        "bench",
        "W3",
        "--bootstrap",
        &bootstrap,
        "--replication-factor",
        "1",
        "--json",
    ];
    let short = [
        "--duration",
        "4",
        "--warmup",
        "0",
        "--runs",
        "1",
        "--limits-seconds",
        "0",
    ];
    let child = command(&[&words[..], &short[..]].concat()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{error}"));
    let client = cluster.client().await;
    wait_for("records to trim", WITHIN, async || {
        let topics = client.admin().list().await?;
        let topic = topics
            .into_iter()
            .find(|topic| topic.name.as_str().starts_with("bench-w3"));
        let partition = client
            .topic(topic.context("no topic")?.name.as_str())?
            .partition(0);
        let end = partition.end_offset(false).await?;
        ensure!(end >= Offset(20), "{end}");
        Ok(partition.trim(Offset(5)).await?)
    })
    .await;
    let said = finish(child, b"").await;
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        said.err.contains("W3: of ") && said.err.contains(" 5 lost"),
        "{said:?}"
    );
    let out = String::from_utf8_lossy(&said.out).into_owned();
    assert!(out.contains("READ BACK: "), "{out}");
    let report: Value = serde_json::from_str(out.lines().last().unwrap_or_default())
        .unwrap_or_else(|error| panic!("{error}: {out}"));
    assert_eq!(
        (&report["passed"], &report["lost"]),
        (&false.into(), &5.into())
    );
}
