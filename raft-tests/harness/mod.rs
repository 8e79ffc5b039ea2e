//! The harness proves itself: the checker is told what it knows, and its processes obey.

use std::time::Duration;

use logboom::testkit::checker::{AnomalyKind, Coverage, check};
use logboom::testkit::history::FinalLog;
use logboom::types::{Error, Offset};
use tokio::time::Instant;

use crate::support::{Fate, History, ProcessCluster, Sent, Verdict, recorded, value_of, wait_for};

/// Goal: the checker is told what the workload knows of each record: acknowledged where, definitely not done, unknown, unanswered.
/// Method: one of each, held against logs that permit them, and against logs that each contradict one.
#[test]
fn the_checker_is_told_every_fate() {
    let start = Instant::now();
    let fates = [
        Fate::Acked(Offset(0)),
        Fate::NotDone(Error::Overloaded { bytes: 1 }),
        Fate::Unknown(Error::Timeout { after_ms: 1 }),
        Fate::Invoked,
        Fate::Acked(Offset(2)),
    ];
    let sent = fates.into_iter().zip(0..).map(|(fate, number)| Sent {
        writer: 3,
        number,
        partition: 0,
        invoked: start + Duration::from_millis(number),
        completed: (fate != Fate::Invoked).then_some(start + Duration::from_millis(number + 1)),
        fate,
    });
    let mut history = recorded(&History {
        sent: sent.collect(),
    });
    for (numbers, wrong) in [
        (&[0, 2, 4][..], None),
        (&[0, 3, 4], None),
        (&[0, 2, 4, 3], None),
        (&[0, 2], Some(AnomalyKind::Lost)),
        (&[0, 2, 4, 0], Some(AnomalyKind::Duplicate)),
        (&[0, 1, 4], Some(AnomalyKind::Aborted)),
        (&[0, 4, 2], Some(AnomalyKind::Moved)),
        (&[2, 0, 4], Some(AnomalyKind::Reordered)),
        (&[0, 2, 4, 9], Some(AnomalyKind::Phantom)),
    ] {
        let values = numbers.iter().map(|number| value_of(3, *number));
        history.logs = vec![FinalLog {
            partition: 0,
            began_ns: 1_000_000_000,
            log_start: 0,
            end: numbers.len() as u64,
            records: (0..).zip(values).collect(),
        }];
        let verdict = Verdict(check(&history, &Coverage::default()));
        match wrong {
            None => verdict.assert_good(2),
            Some(kind) => assert!(verdict.0.has(kind), "{kind}: {verdict}"),
        }
    }
}

/// Goal: the time to recover is read from the history as defined. Method: a history with one known gap.
#[tokio::test]
async fn silence_is_measured_between_acknowledgements() {
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let sent = [(0, 1), (10, 12), (20, 500), (450, 510), (520, 521)];
    let sent = sent
        .iter()
        .zip(0..)
        .map(|((invoked, completed), number)| Sent {
            writer: 1,
            number,
            partition: 0,
            invoked: at(*invoked),
            completed: Some(at(*completed)),
            fate: Fate::Acked(Offset(number)),
        });
    let history = History {
        sent: sent.collect(),
    };
    assert_eq!(history.longest_silence(0), Duration::from_millis(488));
    assert_eq!(history.longest_silence(1), Duration::ZERO);
    assert_eq!(
        history.first_ack_after(0, at(15)),
        Some(Duration::from_millis(485))
    );
    assert_eq!(history.first_ack_after(0, at(600)), None);
}

/// Goal: a wait ends with the first value and not before. Method: a condition that holds at the third look.
#[tokio::test]
async fn waiting_ends_with_the_fact() {
    let mut looks = 0;
    let found = wait_for("the third look", Duration::from_secs(1), || {
        looks += 1;
        let now = looks;
        async move {
            anyhow::ensure!(now == 3, "look {now}");
            Ok(now)
        }
    })
    .await;
    assert_eq!(found, 3);
}

/// Goal: processes are started with their configuration, paused, killed and started again, and their log is kept over the
/// starts. Method: a program in the broker's place that shows what it was given and waits.
#[tokio::test]
async fn processes_obey() {
    let script = r#"for word; do last="$word"; done; cat "$last"; while :; do sleep 0.05; done"#;
    let mut cluster = ProcessCluster::builder(2)
        .key("segment_bytes", 1 << 20)
        .under(&["sh", "-c", script, "sh"])
        .prepare();
    assert_eq!(cluster.ids(), [1, 2]);
    assert_ne!(cluster.address(1), cluster.address(2));
    let within = Duration::from_secs(20);
    for start in 1..3 {
        cluster.start(1);
        wait_for("the configuration in the log", within, async || {
            let log = cluster.log(1);
            for part in [
                format!("listen = \"{}\"", cluster.address(1)),
                "segment_bytes = 1048576".to_owned(),
                format!("2@{}", cluster.address(2)),
            ] {
                anyhow::ensure!(log.matches(&part).count() == start, "{part} in {log}");
            }
            Ok(())
        })
        .await;
        assert_eq!(cluster.running(), [1]);
        cluster.pause(1).await;
        assert!(cluster.running().is_empty());
        assert!(cluster.is_running(1));
        cluster.cont(1);
        assert_eq!(cluster.running(), [1]);
        cluster.kill_9(1).await;
        assert!(!cluster.is_running(1));
    }
    assert!(cluster.errors(&[]).is_empty());
    cluster.start(2);
    let status = cluster.stop(2).await;
    assert!(!status.success(), "a shell dies of SIGTERM");
}
