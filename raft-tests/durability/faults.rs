//! A real disk that fails: every n-th write or sync made to fail by strace.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use logboom::storage::{EntryKind, LogEntry, Store, StoreConfig};
use logboom::types::{BrokerId, EntryId, GroupId, LeaderEpoch, LogIndex, ReplicaId, ReplicaKind};
use tokio::time::Instant;

use crate::durability::audit::audit;
use crate::durability::order::{CALLS, finished_trace};
use crate::durability::trace::parse;
use crate::durability::{HEAL, create, in_sync, strace, strace_is_there};
use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify};

/// Tells the child which directory to work on.
const DIRECTORY: &str = "LOGBOOM_TEST_STORE";
const GROUPS: u64 = 3;
const ROUNDS: u64 = 18;
const ENTRIES: u64 = 4;

fn store_config(directory: &Path) -> StoreConfig {
    StoreConfig {
        directory: directory.to_owned(),
        segment_bytes: 16 << 10,
        cache_bytes: 4 << 10,
        catalog_cache_bytes: 1 << 20,
        catalog_sync_bytes: 8 << 10,
        commit_bytes_max: 1 << 20,
        reserve_bytes: 0,
    }
}

fn replica() -> ReplicaId {
    ReplicaId::new(BrokerId(1), ReplicaKind::Data, 1)
}

fn entry(group: u64, index: u64) -> LogEntry {
    LogEntry {
        id: EntryId {
            epoch: LeaderEpoch(1),
            index: LogIndex(index),
        },
        kind: EntryKind::Command,
        payload: Bytes::from(format!("{group}/{index}/{}", "x".repeat(60))),
    }
}

/// One write call for one line: the trace then shows it in its place.
fn say(line: &str) {
    let mut out = std::io::stdout();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// The child: votes and appends in three groups, each acknowledgement said as it comes. Does nothing in an ordinary run.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn scripted_store() {
    let Ok(directory) = std::env::var(DIRECTORY) else {
        return;
    };
    let stopped = |error: &dyn std::fmt::Display| -> ! {
        eprintln!("stopped: {error}");
        std::process::exit(1)
    };
    let store = Store::open(&store_config(Path::new(&directory)), BrokerId(1))
        .unwrap_or_else(|error| stopped(&error));
    for round in 0..ROUNDS {
        for id in 0..GROUPS {
            let log = store
                .group(GroupId(id), replica())
                .unwrap_or_else(|error| stopped(&error));
            let vote = Bytes::from(format!("vote {round}"));
            log.save_vote(vote)
                .await
                .unwrap_or_else(|error| stopped(&error));
            say(&format!("said vote {id} {round}"));
            let to = (round + 1) * ENTRIES;
            let entries = (round * ENTRIES..to)
                .map(|index| entry(id, index))
                .collect();
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let flushed = move || {
                say(&format!("said entries {id} {to}"));
                sender.send(()).unwrap_or(());
            };
            log.append(entries, Box::new(flushed))
                .unwrap_or_else(|error| stopped(&error));
            if receiver.await.is_err() {
                stopped(&store.failed().await);
            }
        }
    }
    store.close().await.unwrap_or_else(|error| stopped(&error));
    say("finished");
    std::process::exit(0);
}

/// What the child said, by kind and group.
fn acked(output: &str, kind: &str) -> BTreeMap<u64, u64> {
    let mut found = BTreeMap::new();
    for line in output.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let said = words.iter().position(|word| *word == "said");
        let Some([_, what, group, value]) = said.and_then(|at| words.get(at..at + 4)) else {
            continue;
        };
        if *what == kind {
            found.insert(group.parse().unwrap(), value.parse().unwrap());
        }
    }
    found
}

#[derive(Debug, Default)]
struct Counts {
    values: usize,
    of_the_log: usize,
    of_the_catalog: usize,
    never_reached: usize,
    acked: u64,
}

/// Runs the child with the `n`-th call of `name` of each of its threads failing, and judges what it said and left.
async fn fail_nth(name: &str, n: usize, counts: &mut Counts) {
    let what = format!("{name} {n}");
    let place = tempfile::tempdir().unwrap();
    let (data, output) = (place.path().join("data"), place.path().join("trace"));
    let inject = format!("inject={name}:error=EIO:when={n}");
    let words = strace(
        &output,
        &["-e", "trace=pwrite64,fdatasync,write", "-e", &inject],
    );
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .arg(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "durability::faults::scripted_store",
        "--nocapture",
        "--test-threads=1",
    ]);
    command
        .env(DIRECTORY, &data)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .output();
    let ended = tokio::time::timeout(Duration::from_secs(60), child).await;
    let ended = ended
        .unwrap_or_else(|_| panic!("{what}: the child hangs"))
        .unwrap();
    let (said, told) = (
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr),
    );
    let calls = parse(&finished_trace(&output).await);
    let of_the_store = |file: &str| file.starts_with(&*data.to_string_lossy());
    let failed: Vec<_> = calls
        .iter()
        .filter(|call| call.injected && of_the_store(&call.file))
        .collect();
    let final_one = failed.iter().find(|call| !call.file.contains("/catalog/"));
    counts.values += 1;
    match (final_one, failed.is_empty()) {
        (Some(call), _) => {
            counts.of_the_log += 1;
            assert_eq!(ended.status.code(), Some(1), "{what}: {said}{told}");
            assert!(told.contains("stopped: "), "{what}: no message: {told}");
            let later = calls
                .iter()
                .find(|later| later.start > call.end && later.bytes.starts_with(b"said"));
            assert!(
                later.is_none(),
                "{what}: acknowledged after the failure: {later:?}"
            );
        }
        (None, false) => counts.of_the_catalog += 1,
        (None, true) => {
            counts.never_reached += 1;
            assert_eq!(ended.status.code(), Some(0), "{what}: {said}{told}");
        }
    }
    let store = Store::open(&store_config(&data), BrokerId(1))
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    for (group, next) in acked(&said, "entries") {
        let log = store.group(GroupId(group), replica()).unwrap();
        let found = log.read(LogIndex(0), usize::MAX, usize::MAX).await.unwrap();
        let count = found.len() as u64;
        assert!(
            count >= next,
            "{what}: group {group} has {count} entries, {next} were acknowledged"
        );
        assert!(
            found
                .into_iter()
                .eq((0..count).map(|index| entry(group, index))),
            "{what}: group {group}"
        );
        counts.acked += next;
    }
    for (group, round) in acked(&said, "vote") {
        let vote = store
            .group(GroupId(group), replica())
            .unwrap()
            .state()
            .vote
            .unwrap_or_default();
        let text = String::from_utf8_lossy(&vote).into_owned();
        let found: u64 = text.trim_start_matches("vote ").parse().unwrap();
        assert!(
            found >= round,
            "{what}: group {group} has vote {found}, {round} was saved"
        );
    }
    store.close().await.unwrap();
}

/// Goal: on a real disk, whichever write or sync fails, nothing is acknowledged afterwards, the process stops with a message and
/// exit code 1, and what was acknowledged is there. Method: a scripted store workload as a child process, under strace, which makes
/// the n-th sync or the n-th write of each thread fail, for more than 200 values of n.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nth_failing_write_or_sync_is_final() {
    if !strace_is_there() {
        return;
    }
    let begun = Instant::now();
    let half = |name: &'static str| async move {
        let mut counts = Counts::default();
        for n in 1..=105 {
            // Twice as many writes as syncs: the watermark's and the journal's.
            let n = if name == "pwrite64" { n * 2 - n % 2 } else { n };
            fail_nth(name, n, &mut counts).await;
        }
        counts
    };
    let (syncs, writes) = futures_util::future::join(half("fdatasync"), half("pwrite64")).await;
    println!("failing syncs: {syncs:?}");
    println!("failing writes: {writes:?}");
    println!(
        "{} values of n in {:?}",
        syncs.values + writes.values,
        begun.elapsed()
    );
    assert!(syncs.values + writes.values >= 200);
    assert!(
        syncs.of_the_log + writes.of_the_log >= 150,
        "too few failures hit the log: {syncs:?} {writes:?}"
    );
}

/// What brokers of a cluster under load did whose disks failed, each in turn started under strace with its n-th sync failing: how
/// many served by then, and how many claims were held against their sync.
async fn failing_disks(name: &str, syncs: &[u32]) -> (usize, usize) {
    let mut cluster = ProcessCluster::builder(3)
        .key("preferred_leader_delay_ms", 100)
        .start()
        .await;
    let client = cluster.client().await;
    create(&client, name, 3, 3).await;
    let config = WorkloadConfig {
        pause: Duration::from_millis(1),
        ..WorkloadConfig::new(name, 3)
    };
    let workload = Workload::start(&client, config);
    workload.wait_acked(100, HEAL).await;
    let (mut claims, mut running) = (0, 0);
    // Four in a row on one broker, then a clean start and the next one.
    for (in_a_row, victim) in syncs.chunks(4).zip([1, 2, 3].into_iter().cycle()) {
        for n in in_a_row {
            if cluster.is_running(victim) {
                cluster.kill_9(victim).await;
            }
            let output = cluster
                .data_dir(victim)
                .with_file_name(format!("trace-{n}"));
            let log_before = cluster.log(victim).len();
            let inject = format!("inject=fdatasync:error=EIO:when={n}");
            cluster.start_under(victim, &strace(&output, &["-e", CALLS, "-e", &inject]));
            let status = cluster.ended(victim).await;
            workload.wait_acked(20, HEAL).await;
            let log = cluster.log(victim);
            let log = &log[log_before..];
            assert_eq!(status.code(), Some(1), "sync {n} of broker {victim}: {log}");
            assert!(
                log.contains("logboom: the broker on "),
                "sync {n} of broker {victim}: no message: {log}"
            );
            assert!(
                !log.contains("panicked"),
                "sync {n} of broker {victim}: {log}"
            );
            running += usize::from(log.contains("serving"));
            let calls = parse(&finished_trace(&output).await);
            let failed = calls
                .iter()
                .find(|call| call.injected)
                .unwrap_or_else(|| panic!("sync {n} was not made to fail"));
            assert!(failed.file.contains("/data/"), "{failed:?}");
            let result = audit(&calls, false);
            assert!(
                result.bad.is_empty(),
                "sync {n} of broker {victim}: {:#?}",
                result.bad
            );
            claims += result.votes + result.matches + result.produced;
            fs::remove_file(&output).unwrap();
        }
        cluster.restart(victim).await;
        in_sync(&client, name).await;
    }
    workload.wait_acked(100, HEAL).await;
    let verdict = verify(&client, name, 3, &workload.stop().await).await;
    println!("{verdict}");
    verdict.assert_good(250);
    (running, claims)
}

/// Goal: a broker whose disk fails stops by itself with its message and exit code 1 and acknowledges nothing more; the
/// others serve on; it comes back when the disk is well; nothing is lost. Method: brokers of two clusters under load, each in turn
/// started under strace with its n-th sync failing, 25 values of n; every claim in the traces is held against its sync.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_with_a_failing_disk_stops_and_the_cluster_serves_on() {
    const VALUES: u32 = 25;
    if !strace_is_there() {
        return;
    }
    let (even, odd): (Vec<u32>, Vec<u32>) = (0..VALUES)
        .map(|value| 4 + value * 3)
        .partition(|n| n % 2 == 0);
    let (even, odd) = tokio::join!(failing_disks("even", &even), failing_disks("odd", &odd));
    let (running, claims) = (even.0 + odd.0, even.1 + odd.1);
    println!(
        "{VALUES} values of n, {running} of them while serving, {claims} claims of the failing brokers, each after its sync"
    );
    assert!(
        running >= 10,
        "only {running} failures hit a broker that served"
    );
}
