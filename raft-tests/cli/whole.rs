//! Commands that bring their own cluster: `demo` and `dev`. None of their brokers outlives them.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::ensure;
use logboom::runtime::Tasks;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::support::command::{command, finish, processes_with, run, signal};
use crate::support::wait_for;

const WITHIN: Duration = Duration::from_secs(60);

fn directory() -> TempDir {
    TempDir::with_prefix("logboom-cli-").unwrap_or_else(|error| panic!("{error}"))
}

/// Waits for a line of standard output with `text` in it.
async fn line_with(child: &mut Child, text: &str) -> String {
    let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let found = tokio::time::timeout(WITHIN, async {
        loop {
            match lines.next_line().await {
                Ok(Some(line)) if line.contains(text) => return line,
                Ok(Some(_)) => {}
                other => panic!("no line with {text:?}: {other:?}"),
            }
        }
    });
    let line = found
        .await
        .unwrap_or_else(|_| panic!("no line with {text:?} within {WITHIN:?}"));
    // Somebody goes on reading, or the command would find its output closed.
    Tasks::new().spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    line
}

async fn none_is_left(text: &str) {
    wait_for("all processes to be gone", WITHIN, async || {
        let left = processes_with(text);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await;
}

/// Goal: the demo tells its story, and its JSON has the form that scripts rely on. Method: run it as a script would, on a text
/// with awkward lines.
#[tokio::test]
async fn demo_ends_with_its_json() {
    let home = directory();
    let input = home.path().join("input.txt");
    let mut text = Vec::new();
    for number in 0..4_000_u32 {
        text.extend(match number % 4 {
            0 => Vec::new(),
            1 => vec![0xff, 0xfe, b'\r'],
            2 => b"the same".to_vec(),
            _ => vec![b'x'; 500],
        });
        text.push(b'\n');
    }
    text.extend(b"no newline at the end");
    fs::write(&input, &text).unwrap_or_else(|error| panic!("{error}"));
    let child = command(&["demo", "--json", "--input", input.to_str().expect("a path")])
        .stdin(Stdio::null())
        .spawn();
    let said = finish(child.unwrap_or_else(|error| panic!("{error}")), b"").await;
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""), "{said:?}");
    let out = String::from_utf8_lossy(&said.out).into_owned();
    let last = out.lines().last().unwrap_or_default();
    let mut report: Value =
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {out}"));
    println!("{last}");
    let fields = report.as_object_mut().expect("an object");
    for times in ["failover_ms", "preferred_return_ms"] {
        let time = fields.remove(times).unwrap_or_default();
        assert!(
            time.as_u64().is_some_and(|time| time < 30_000),
            "{times}: {time}"
        );
    }
    let expected = json!({
        "produced": 4_001, "acked": 4_001, "read_back": 4_001, "lost": 0, "duplicated": 0, "out_of_order": 0,
        "partitions": [
            {"id": 0, "replicas": [1, 2], "leader_before": 1, "leader_after_kill": 2, "leader_after_return": 1,
             "isr_before": [1, 2], "isr_after_kill": [2], "isr_after_return": [1, 2]},
            {"id": 1, "replicas": [2, 3], "leader_before": 2, "leader_after_kill": 2, "leader_after_return": 2,
             "isr_before": [2, 3], "isr_after_kill": [2, 3], "isr_after_return": [2, 3]},
        ],
    });
    assert_eq!(report, expected);
}

/// Goal: whatever ends the demo, no broker stays behind. Method: SIGINT and SIGKILL when its brokers are up.
#[tokio::test]
async fn demo_that_is_interrupted_leaves_no_broker_behind() {
    let home = directory();
    for (name, how) in [("interrupted", Signal::INT), ("killed", Signal::KILL)] {
        let data = home.path().join(name);
        let data = data.to_str().expect("a path");
        let mut demo = command(&["demo", "--data", data])
            .spawn()
            .unwrap_or_else(|error| panic!("{error}"));
        line_with(&mut demo, "brokers 1, 2 and 3 are up").await;
        assert_eq!(processes_with(data).len(), 4, "the demo and its brokers");
        signal(&demo, how);
        let said = finish(demo, b"").await;
        if how == Signal::INT {
            said.refused(1, &["interrupted", data]);
            assert_eq!(processes_with(data), Vec::<u32>::new(), "gone with it");
        }
        none_is_left(data).await;
        // Its directory is not taken for a new one.
        run(&[], &["demo", "--data", data], b"")
            .await
            .refused(2, &[data, "not empty"]);
    }
}

/// Goal: `dev` stays up, stops in order on Ctrl-C, and goes on with its data, which no second `dev` and no other number of brokers
/// touches. Method: write, try the others, stop, start again on other ports, read.
#[tokio::test]
async fn dev_keeps_its_data() {
    let home = directory();
    let data = home.path().join("dev");
    let data = data.to_str().expect("a path");
    for round in 0..2 {
        let dev = command(&["dev", "--port", "0", "--data", data]).spawn();
        let mut dev = dev.unwrap_or_else(|error| panic!("{error}"));
        let ready = line_with(&mut dev, "ready: export LOGBOOM_BOOTSTRAP=").await;
        let (_, rest) = ready.split_once('=').expect("addresses");
        let at: Vec<String> = rest
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .split(',')
            .map(str::to_owned)
            .collect();
        assert_eq!(at.len(), 3, "{ready}");
        refused_by_dev(data, "3", 1, &["broker-1 is in use by another process"]).await;
        refused_by_dev(data, "5", 1, &["broker-1 is in use by another process"]).await;
        if round == 0 {
            run(
                &at,
                &[
                    "topic",
                    "create",
                    "kept",
                    "--partitions",
                    "2",
                    "--replication-factor",
                    "2",
                ],
                b"",
            )
            .await
            .good();
            run(&at, &["produce", "kept", "--partition", "1"], b"one\ntwo\n")
                .await
                .good();
        }
        let read = run(&at, &["consume", "kept"], b"").await.good();
        assert_eq!(
            String::from_utf8_lossy(&read),
            "one\ntwo\n",
            "round {round}"
        );
        signal(&dev, Signal::INT);
        let said = finish(dev, b"").await;
        assert_eq!((said.code, said.err.as_str()), (Some(0), ""), "{said:?}");
        none_is_left(data).await;
        let other = &["a cluster of 3 brokers: go on with --brokers 3", "--data"];
        refused_by_dev(data, "5", 2, other).await;
    }
}

/// `dev` with so many brokers is refused, and has written nothing.
async fn refused_by_dev(data: &str, brokers: &str, code: i32, parts: &[&str]) {
    let words = ["dev", "--port", "0", "--data", data, "--brokers", brokers];
    run(&[], &words, b"").await.refused(code, parts);
    let names = fs::read_dir(data).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(names.count(), 6, "three directories and three logs");
    for id in 1..=3 {
        let log = Path::new(data).join(format!("broker-{id}.log"));
        let log = fs::read_to_string(log).unwrap_or_else(|error| panic!("{error}"));
        assert!(!log.contains("in use"), "{log}");
    }
}

/// Goal: the examples that show embedding do what they say. Method: run them to their end.
#[tokio::test]
async fn examples_run_to_their_end() {
    let binary = Path::new(env!("CARGO_BIN_EXE_logboom"));
    let folder = binary
        .parent()
        .expect("the folder of binaries")
        .join("examples");
    let cases: [(&str, &[&str]); 2] = [
        (
            "embedded_cluster",
            &["read hello", "read world", "partition 1: leader"],
        ),
        ("kv_store", &[]),
    ];
    for (name, parts) in cases {
        // `cargo test` builds them; a run of this target alone may not have.
        let mut example = if folder.join(name).exists() {
            Command::new(folder.join(name))
        } else {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["run", "--quiet", "--example", name]);
            cargo
        };
        let output = tokio::time::timeout(5 * WITHIN, example.kill_on_drop(true).output()).await;
        let output = output
            .expect("in time")
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{name}: {output:?}");
        assert!(
            !text.is_empty() && parts.iter().all(|part| text.contains(part)),
            "{name}: {text}"
        );
    }
}
