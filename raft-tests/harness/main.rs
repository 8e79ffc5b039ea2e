//! The harness proves itself: its judge finds every kind of anomaly, and its processes obey.

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use logboom::types::{Error, Offset};
use support::{
    Fate, Found, History, ProcessCluster, Sent, Verdict, judge, label, parse_label, wait_for,
};
use tokio::time::Instant;

/// Two writers, two partitions, eight records each; one unknown that is there, one that is not, one refused.
fn good_run() -> (History, BTreeMap<u32, Found>) {
    let mut history = History::default();
    let mut found: BTreeMap<u32, Found> = BTreeMap::new();
    for number in 0..8 {
        for writer in 1..3 {
            let partition = u32::from(number % 2 == 1);
            let place = found.entry(partition).or_default();
            let timeout = || Error::Timeout { after_ms: 1 };
            let fate = match (writer, number) {
                (1, 3) => Fate::NotDone(Error::Overloaded { bytes: 1 }),
                (1, 4) | (2, 2) => Fate::Unknown(timeout()),
                (1, 5) => Fate::Invoked,
                _ => Fate::Acked(place.end),
            };
            if !matches!((writer, number), (1, 3 | 4)) {
                place.records.push((place.end, Some((writer, number))));
                place.end = place.end.plus(1);
            }
            let now = Instant::now();
            history.sent.push(Sent {
                writer,
                number,
                partition,
                invoked: now,
                completed: Some(now),
                fate,
            });
        }
    }
    (history, found)
}

/// Goal: a run in which every promise was kept is called good, unknown fates either way. Method: such a run.
#[test]
fn a_good_run_is_good() {
    let (history, found) = good_run();
    let verdict = judge(&history, &found);
    verdict.assert_good(12);
    let counts = (
        verdict.sent,
        verdict.acked,
        verdict.unknown,
        verdict.unknown_found,
        verdict.read_back,
    );
    assert_eq!(counts, (16, 12, 3, 2, 14));
}

/// Goal: each kind of anomaly is found and called by its name. Method: one damage each to a good run.
#[test]
fn every_anomaly_is_named() {
    type Damage = fn(&mut History, &mut BTreeMap<u32, Found>);
    type Count = fn(&Verdict) -> usize;
    fn records(found: &mut BTreeMap<u32, Found>) -> &mut Vec<(Offset, Option<(u32, u64)>)> {
        &mut found.get_mut(&0).unwrap().records
    }
    let cases: [(&str, Damage, Count); 11] = [
        (
            "an acknowledged record vanished from the end",
            |_, found| assert!(records(found).pop().is_some()),
            |v| v.lost,
        ),
        (
            "the end is not reached",
            |_, found| assert!(records(found).pop().is_some()),
            |v| v.gaps,
        ),
        (
            "one vanished from the middle",
            |_, found| assert!(records(found).remove(2).1.is_some()),
            |v| v.gaps,
        ),
        (
            "one is there twice",
            |_, found| {
                let first = records(found)[0].1;
                let end = Offset(u64::try_from(records(found).len()).unwrap());
                records(found).push((end, first));
            },
            |v| v.duplicated,
        ),
        (
            "two changed places",
            |_, found| {
                let (one, two) = (records(found)[1].1, records(found)[3].1);
                (records(found)[1].1, records(found)[3].1) = (two, one);
            },
            |v| v.out_of_order,
        ),
        (
            "acknowledged at another offset",
            |history, _| history.sent[0].fate = Fate::Acked(Offset(3)),
            |v| v.moved,
        ),
        (
            "refused and there",
            |history, _| {
                history.sent[0].fate = Fate::NotDone(Error::Overloaded { bytes: 1 });
            },
            |v| v.undead,
        ),
        (
            "nobody sent it",
            |_, found| records(found)[0].1 = Some((9, 9)),
            |v| v.strange,
        ),
        (
            "a damaged value",
            |_, found| records(found)[0].1 = None,
            |v| v.strange,
        ),
        (
            "in the wrong partition",
            |history, _| history.sent[0].partition = 1,
            |v| v.misplaced,
        ),
        (
            "an offset went back",
            |_, found| records(found)[2].0 = Offset(1),
            |v| v.gaps,
        ),
    ];
    for (what, damage, count) in cases {
        let (mut history, mut found) = good_run();
        damage(&mut history, &mut found);
        let verdict = judge(&history, &found);
        assert!(count(&verdict) > 0, "{what}: {verdict}");
        assert!(!verdict.is_good(), "{what}");
    }
}

/// Goal: a value says whose it is, and a damaged one says nothing. Method: labels with and without damage.
#[test]
fn labels_survive_only_whole() {
    let whole = format!("{}{}", label(3, 27), "b".repeat(40));
    assert_eq!(parse_label(whole.as_bytes()), Some((3, 27)));
    for broken in ["", "3:27", "x:27;", "3:27;bbbxbb", "03:27;b", "3:28;b", ";"] {
        assert_eq!(parse_label(broken.as_bytes()), None, "{broken}");
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
