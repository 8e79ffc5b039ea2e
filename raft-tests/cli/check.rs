//! `logboom check`: a kept history is judged, with an exit code for each verdict.

use std::path::Path;

use logboom::testkit::checker::{AnomalyKind, Report, Verdict};
use logboom::testkit::history::{
    AckLevel, Call, FaultEvent, FinalLog, History, Operation, Outcome,
};

use crate::support::command::{Said, run};

/// One record, acknowledged and found, and one fault.
fn history() -> History {
    History {
        operations: vec![Operation {
            session: 0,
            invoked_ns: 1,
            completed_ns: Some(2),
            partition: 0,
            call: Call::Append {
                values: vec![7],
                producer: None,
                acks: AckLevel::All,
            },
            outcome: Outcome::Appended {
                base: 0,
                epoch: 1,
                copies: 2,
            },
        }],
        faults: vec![FaultEvent {
            kind: "kill".to_owned(),
            target: "broker 1".to_owned(),
            began_ns: 1,
            ended_ns: None,
        }],
        logs: vec![FinalLog {
            partition: 0,
            began_ns: 3,
            log_start: 0,
            end: 1,
            records: vec![(0, 7)],
        }],
        ..History::default()
    }
}

fn keep(history: &History, directory: &Path, name: &str) -> String {
    let mut bytes = Vec::new();
    history.write(&mut bytes).expect("bytes");
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{error}"));
    path.to_str().expect("a path").to_owned()
}

/// Goal: a script can tell passed (0), anomalies (3), proves nothing (4), unreadable (1) and wrong usage (2) apart, and a person and a
/// program can read what is wrong. Method: one kept history of each kind.
#[tokio::test]
async fn a_kept_history_is_judged_with_an_exit_code_for_each_verdict() {
    let directory = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    let good = keep(&history(), directory.path(), "good.jsonl");
    let mut lost = history();
    lost.logs[0].records.clear();
    lost.logs[0].end = 0;
    let lost = keep(&lost, directory.path(), "lost.jsonl");
    let said = async |arguments: &[&str]| run(&[], arguments, b"").await;
    let text = |said: &Said| String::from_utf8_lossy(&said.out).into_owned();
    let ends = |said: &Said, code: i32, part: &str| {
        assert_eq!((said.code, said.err.as_str()), (Some(code), ""), "{said:?}");
        assert!(text(said).contains(part), "{said:?} lacks {part:?}");
    };

    ends(&said(&["check", &good]).await, 0, "passed");
    ends(
        &said(&["check", &good, "--fault", "kill=1"]).await,
        0,
        "kill 1",
    );
    for (arguments, part) in [
        (["--operations", "2"], "operations done: 1, at least 2"),
        (["--unknown", "1"], "unknown outcomes: 0, at least 1"),
        (
            ["--leader-changes", "1"],
            "changes of leader: 0, at least 1",
        ),
        (
            ["--fault", "pause=1"],
            "faults of kind pause: 0, at least 1",
        ),
    ] {
        let [flag, value] = arguments;
        ends(&said(&["check", &good, flag, value]).await, 4, part);
    }
    let wrong = said(&["check", &lost]).await;
    ends(
        &wrong,
        3,
        "value 7 was acknowledged at offset 0, and is not found",
    );
    assert!(text(&wrong).contains("operation 0, session 0"), "{wrong:?}");
    let json = said(&["check", &lost, "--json"]).await;
    let report: Report =
        serde_json::from_slice(&json.out).unwrap_or_else(|error| panic!("{error}: {json:?}"));
    assert_eq!((json.code, report.verdict), (Some(3), Verdict::Anomalies));
    assert_eq!(report.figures.anomalies[&AnomalyKind::Lost], 1);

    let bad = directory.path().join("bad.jsonl");
    std::fs::write(&bad, "\n{\"operation\":{}}\n").unwrap_or_else(|error| panic!("{error}"));
    let bad = bad.to_str().expect("a path");
    said(&["check", bad])
        .await
        .refused(1, &[bad, "line 2 of the history"]);
    said(&["check", "/nonexistent"])
        .await
        .refused(1, &["cannot read /nonexistent"]);
    said(&["check", &good, "--fault", "kill"])
        .await
        .refused(2, &["--fault \"kill\"", "kill=10"]);
    said(&["check"]).await.refused(2, &["<FILE>"]);
}
