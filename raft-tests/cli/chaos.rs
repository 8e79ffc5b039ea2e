//! `chaos`: wrong usage, runs short enough for a test, a loss that it notices, and its end by a signal.

use std::fs;
use std::time::Duration;

use anyhow::ensure;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::command::{command, finish, processes_with, signal};
use crate::support::wait_for;

/// Longer than any of the runs below takes on a machine with much else to do.
const WITHIN: Duration = Duration::from_secs(240);

fn directory() -> TempDir {
    TempDir::with_prefix("logboom-chaos-").unwrap_or_else(|error| panic!("{error}"))
}

/// Exit code, output and errors of a run that keeps its files in `keep`.
async fn run(keep: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut words = vec!["chaos", "--keep", keep];
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

async fn none_is_left(text: &str) {
    wait_for("all processes to be gone", WITHIN, async || {
        let left = processes_with(text);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await;
}

/// Goal: what cannot be done is refused in one line before anything is started. Method: a table.
#[tokio::test]
async fn chaos_refuses_what_cannot_be() {
    let cases: [(&[&str], &[&str]); 11] = [
        (&["--minutes", "0"], &["--minutes: use more than 0"]),
        (&["--minutes", "x"], &["--minutes"]),
        (&["--minutes", "NaN"], &["--minutes"]),
        (
            &["--minutes", "1", "--count", "1"],
            &["--minutes", "--count"],
        ),
        (&["--count", "0"], &["--count"]),
        (&["--brokers", "10"], &["--brokers", "1..=9"]),
        (
            &["--brokers", "2", "--replication-factor", "3"],
            &["3 copies need as many brokers, and there are 2"],
        ),
        (
            &["--faults", "kill,flood"],
            &["no fault \"flood\"", "powerloss,diskfull", "kill-one"],
        ),
        (&["--faults", ""], &["no fault \"\""]),
        (
            &["--brokers", "1", "--faults", "partition"],
            &["partition needs at least 2 brokers"],
        ),
        (
            &["--replication-factor", "1", "--faults", "bitrot"],
            &["bitrot needs 2 copies"],
        ),
    ];
    for (arguments, parts) in cases {
        let mut words = vec!["chaos"];
        words.extend(arguments);
        let child = command(&words).spawn();
        let said = finish(child.unwrap_or_else(|error| panic!("{error}")), b"").await;
        said.refused(2, parts);
    }
}

/// Goal: a run ends with its verdict, its JSON and its files, and leaves no process behind. Method: one fault of five kinds each, which
/// are recoverable and quick.
#[tokio::test]
async fn chaos_passes_and_tells() {
    let home = directory();
    let keep = home.path().join("kept");
    let keep = keep.to_str().expect("a path");
    let arguments = ["--json", "--seed", "1", "--count", "5"];
    let faults = ["--faults", "kill-one,pause,powerloss-all,fsyncfail,slow"];
    let (code, out, err) = run(keep, &[&arguments[..], &faults[..]].concat()).await;
    assert_eq!(code, Some(0), "{out}{err}");
    let last = out.lines().last().unwrap_or_default();
    let report: Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {out}"));
    assert_eq!(report["outcome"], "passed", "{last}");
    assert_eq!(
        (&report["seed"], &report["lost"]),
        (&1.into(), &0.into()),
        "{last}"
    );
    assert!(report["acknowledged"].as_u64() > Some(0), "{last}");
    for kind in ["kill", "pause", "powerloss", "fsyncfail", "slow"] {
        assert_eq!(report["faults"][kind]["effective"], 1, "{kind}: {last}");
        assert!(out.contains(kind), "{kind} in the timeline: {out}");
    }
    assert!(
        out.contains("replay: logboom chaos --seed 1 --count 5"),
        "{out}"
    );
    for (file, part) in [
        ("history-chaos-3.jsonl", "\"fault\""),
        ("history-chaos-2.jsonl", "\"log\""),
        ("timeline.svg", "leaders of chaos-2"),
        ("report.html", "<svg"),
        ("broker-3.log", "serving"),
    ] {
        let path = home.path().join("kept").join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(text.contains(part), "{file} lacks {part:?}");
    }
    none_is_left(keep).await;
}

/// Goal: a run that could not see a loss would prove nothing: this one is seen. Method: disks that forget what they said was synced, and
/// a loss of power of all brokers.
#[tokio::test]
async fn chaos_notices_disks_that_lie() {
    let home = directory();
    let keep = home.path().join("kept");
    let keep = keep.to_str().expect("a path");
    let arguments = ["--disks-lie", "--count", "1", "--seed", "2"];
    let faults = ["--faults", "powerloss-all"];
    let (code, out, err) = run(keep, &[&arguments[..], &faults[..]].concat()).await;
    assert_eq!(code, Some(3), "{out}{err}");
    assert!(out.contains("verdict: ANOMALY"), "{out}");
    assert!(
        out.contains("--faults powerloss-all --disks-lie\n"),
        "it can be replayed: {out}"
    );
    none_is_left(keep).await;
}

/// Goal: whatever ends a run, no broker stays behind, not even a paused one; an interrupted run is judged, and proves nothing. Method: SIGINT
/// and SIGKILL while a broker is paused.
#[tokio::test]
async fn chaos_that_is_interrupted_leaves_no_broker_behind() {
    let home = directory();
    for (name, how) in [("interrupted", Signal::INT), ("killed", Signal::KILL)] {
        let keep = home.path().join(name);
        let keep = keep.to_str().expect("a path");
        let words = [
            "chaos",
            "--keep",
            keep,
            "--faults",
            "pause,kill",
            "--minutes",
            "30",
        ];
        let mut chaos = command(&words)
            .spawn()
            .unwrap_or_else(|error| panic!("{error}"));
        let mut lines = BufReader::new(chaos.stderr.take().expect("its errors")).lines();
        let paused = tokio::time::timeout(WITHIN, async {
            loop {
                match lines.next_line().await {
                    Ok(Some(line)) if line.contains("; pause ") => return,
                    Ok(Some(_)) => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        paused
            .await
            .unwrap_or_else(|_| panic!("nobody was paused within {WITHIN:?}"));
        assert_eq!(processes_with(keep).len(), 4, "the run and its brokers");
        signal(&chaos, how);
        // Somebody goes on reading, or the run would find its errors closed.
        let read_on = async { while let Ok(Some(_)) = lines.next_line().await {} };
        let (output, ()) = tokio::join!(chaos.wait_with_output(), read_on);
        let output = output.unwrap_or_else(|error| panic!("{error}"));
        if how == Signal::INT {
            let out = String::from_utf8_lossy(&output.stdout);
            // Enough may have happened by chance, but no more than that.
            assert!(matches!(output.status.code(), Some(0 | 4)), "{output:?}");
            assert!(out.contains("verdict: "), "{out}");
        }
        none_is_left(keep).await;
    }
}
