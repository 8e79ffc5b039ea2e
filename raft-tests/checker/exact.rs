//! Small histories made by hand: exact figures, and the edges of time and offset.

use logboom::testkit::checker::{AnomalyKind as Kind, Coverage, Report, check};
use logboom::testkit::history::{
    AckLevel, Call, FinalLog, History, LeaderSeen, Operation, Outcome, ReplicaDump,
};

fn operation(session: u32, from: u64, to: u64, call: Call, outcome: Outcome) -> Operation {
    Operation {
        session,
        invoked_ns: from,
        completed_ns: Some(to),
        partition: 0,
        call,
        outcome,
    }
}

fn append(values: &[u64]) -> Call {
    Call::Append {
        values: values.to_vec(),
        producer: None,
        acks: AckLevel::All,
    }
}

fn at(base: u64) -> Outcome {
    Outcome::Appended {
        base,
        epoch: 1,
        copies: 1,
    }
}

fn end(end: u64) -> Outcome {
    Outcome::End {
        end,
        epoch: Some(1),
    }
}

fn read(records: &[(u64, u64)], high_watermark: u64) -> Outcome {
    Outcome::Fetched {
        log_start: 0,
        high_watermark,
        epoch: Some(1),
        records: records.to_vec(),
    }
}

fn log(began_ns: u64, values: &[u64]) -> FinalLog {
    FinalLog {
        partition: 0,
        began_ns,
        log_start: 0,
        end: values.len() as u64,
        records: (0..).zip(values.iter().copied()).collect(),
    }
}

fn judged(operations: Vec<Operation>, logs: Vec<FinalLog>) -> Report {
    let history = History {
        operations,
        logs,
        ..History::default()
    };
    check(&history, &Coverage::default())
}

fn unknown() -> Outcome {
    Outcome::Unknown {
        reason: "?".to_owned(),
    }
}

fn failed() -> Outcome {
    Outcome::Failed {
        reason: "!".to_owned(),
    }
}

/// Goal: the figures are those of the history. Method: a few operations of each kind, counted by hand.
#[test]
fn figures_are_exact() {
    let mut history = History {
        operations: vec![
            operation(0, 0, 1_000_000, append(&[1, 2]), at(0)),
            operation(1, 0, 2, append(&[3]), failed()),
            operation(2, 0, 2, append(&[4, 5]), unknown()),
            operation(3, 0, 2, append(&[6]), unknown()),
            operation(0, 2_000_000, 5_000_000, append(&[7]), at(4)),
            operation(
                4,
                1_500_000,
                1_500_000,
                Call::Fetch { from: 0 },
                read(&[(0, 1), (1, 2)], 2),
            ),
            operation(4, 6_000_000, 6_000_000, Call::LinearizableEnd, end(5)),
            operation(4, 6_000_000, 6_000_000, Call::End, end(5)),
        ],
        logs: vec![log(7_000_000, &[1, 2, 4, 5, 7])],
        ..History::default()
    };
    history.leaders = [(1, 1), (2, 2), (2, 2), (4, 1)]
        .map(|(epoch, broker)| LeaderSeen {
            at_ns: 0,
            partition: 0,
            epoch,
            broker,
        })
        .to_vec();
    let report = check(&history, &Coverage::default());
    assert!(report.passed(), "{report}");
    let figures = report.figures;
    assert_eq!(
        [
            figures.operations,
            figures.ok,
            figures.failed,
            figures.unknown
        ],
        [8, 5, 1, 2]
    );
    assert_eq!(
        [
            figures.sent,
            figures.acknowledged,
            figures.found,
            figures.unknown_found
        ],
        [7, 3, 5, 2]
    );
    assert_eq!([figures.read, figures.linearizable_ends], [2, 1]);
    assert_eq!(figures.leader_changes, 2);
    assert_eq!(figures.silence_max_ns, 4_000_000);
}

/// Goal: what happens at one time has no order. Method: everything at time 5, in an order that would be wrong one ns apart; then that.
#[test]
fn one_time_has_no_order() {
    let at_once = |asked: u64| {
        judged(
            vec![
                operation(0, 5, 5, append(&[2]), at(1)),
                operation(1, asked, asked, append(&[1]), at(0)),
                operation(2, 5, 5, Call::LinearizableEnd, end(2)),
                operation(3, asked, asked, Call::LinearizableEnd, end(0)),
                operation(4, 5, 5, Call::Fetch { from: 0 }, read(&[(0, 1)], 1)),
            ],
            vec![log(9, &[1, 2])],
        )
    };
    assert!(at_once(5).passed(), "{}", at_once(5));
    let later = at_once(6);
    for kind in [Kind::RealTimeInversion, Kind::StaleEnd, Kind::FromTheFuture] {
        assert!(later.has(kind), "{kind}\n{later}");
    }
    assert!(!later.has(Kind::LateUnknown), "{later}");
}

/// Goal: what may have come behind the end of the log's reading is not missed, what cannot is. Method: answers before, at and after
/// the time when the reading began, at and below its end.
#[test]
fn what_came_after_the_reading_is_not_missed() {
    for (completed, is_wrong) in [(6, true), (7, false), (8, false)] {
        let behind = judged(
            vec![
                operation(0, 0, 1, append(&[1]), at(0)),
                operation(0, 5, completed, append(&[2]), at(1)),
                operation(1, 5, completed, Call::Fetch { from: 1 }, read(&[(1, 2)], 2)),
            ],
            vec![log(7, &[1])],
        );
        assert_eq!(!behind.passed(), is_wrong, "{completed}\n{behind}");
        for kind in [
            Kind::Lost,
            Kind::DirtyRead,
            Kind::WatermarkRegress,
            Kind::StaleEnd,
        ] {
            assert_eq!(behind.has(kind), is_wrong, "{kind}, {completed}\n{behind}");
        }
        let below = judged(
            vec![
                operation(0, 0, completed, append(&[1]), at(0)),
                operation(1, 0, completed, append(&[2]), at(1)),
            ],
            vec![log(7, &[2])],
        );
        assert!(below.has(Kind::Lost), "{completed}\n{below}");
    }
}

/// Goal: what was trimmed is not missed, not even half of a batch. Method: a log that begins inside a batch, found and lost.
#[test]
fn what_was_trimmed_is_not_missed() {
    let trimmed = |first: u64, values: &[u64]| FinalLog {
        log_start: first,
        end: first + values.len() as u64,
        records: (first..).zip(values.iter().copied()).collect(),
        ..log(9, &[])
    };
    let sent = || {
        vec![
            operation(0, 0, 1, append(&[1, 2, 3]), at(0)),
            operation(0, 2, 3, append(&[4, 5]), unknown()),
            operation(0, 4, 5, append(&[6]), at(5)),
        ]
    };
    for (start, values) in [
        (0, &[1, 2, 3, 4, 5, 6][..]),
        (2, &[3, 4, 5, 6]),
        (4, &[5, 6]),
        (6, &[]),
    ] {
        let report = judged(sent(), vec![trimmed(start, values)]);
        assert!(report.passed(), "{start}\n{report}");
    }
    let lost = judged(sent(), vec![trimmed(3, &[4, 5])]);
    assert!(lost.has(Kind::Lost), "{lost}");
    let torn = judged(sent(), vec![trimmed(3, &[4, 6])]);
    assert!(torn.has(Kind::TornBatch), "{torn}");
    let gone = judged(sent(), vec![trimmed(2, &[4, 5, 6])]);
    assert!(gone.has(Kind::Lost) && gone.has(Kind::Moved), "{gone}");
}

/// Goal: an earlier reading must be a part of the log, where both reach, and nowhere else. Method: readings that overlap in every way.
#[test]
fn an_earlier_reading_is_a_part_of_the_log() {
    let sent = || {
        vec![
            operation(0, 0, 1, append(&[1]), at(0)),
            operation(1, 2, 3, append(&[2]), unknown()),
            operation(2, 2, 3, append(&[3]), unknown()),
            operation(3, 0, 1, append(&[4]), at(1)),
        ]
    };
    let last = || log(9, &[1, 4, 2]);
    for (earlier, wrong) in [
        (log(5, &[1, 4]), None),
        (log(5, &[1, 4, 2]), None),
        (log(5, &[1, 4, 3]), Some(Kind::LateUnknown)),
        (log(5, &[1, 4, 3]), Some(Kind::OffsetCollision)),
        (log(5, &[1, 4, 3]), Some(Kind::DirtyRead)),
        (log(5, &[1, 4, 2, 3]), Some(Kind::WatermarkRegress)),
        (log(5, &[1]), Some(Kind::StaleEnd)),
    ] {
        let report = judged(sent(), vec![last(), earlier]);
        match wrong {
            None => assert!(report.passed(), "{report}"),
            Some(kind) => assert!(report.has(kind), "{kind}\n{report}"),
        }
    }
    // At the first offset that both have, whichever begins further above; and nothing is missed below.
    let first = || {
        vec![
            operation(0, 0, 1, append(&[1]), unknown()),
            operation(1, 0, 1, append(&[2]), unknown()),
            operation(2, 0, 1, append(&[3]), unknown()),
            operation(3, 20, 21, Call::End, end(0)),
        ]
    };
    let from = |start: u64, began_ns: u64, values: &[u64]| FinalLog {
        log_start: start,
        end: start + values.len() as u64,
        records: (start..).zip(values.iter().copied()).collect(),
        ..log(began_ns, &[])
    };
    for (earlier, last, is_late) in [
        (from(0, 5, &[3]), from(0, 9, &[1]), true),
        (from(1, 5, &[3]), from(1, 9, &[2]), true),
        (from(0, 5, &[1, 3]), from(1, 9, &[2]), true),
        (from(0, 5, &[1, 2]), from(1, 9, &[2]), false),
        (from(0, 5, &[1, 2]), from(0, 9, &[1, 2, 3]), false),
    ] {
        let report = judged(first(), vec![earlier, last]);
        assert_eq!(report.has(Kind::LateUnknown), is_late, "{report}");
        assert_eq!(report.passed(), !is_late, "{report}");
    }
    // The earlier one is the one that began earlier, wherever it stands.
    let report = judged(sent(), vec![log(5, &[1, 4]), last()]);
    assert!(report.passed(), "{report}");
}

/// Goal: copies are counted where they can be, and not when disks were lost. Method: an acknowledgement of two copies, and replicas that
/// hold it, do not, have trimmed it or do not reach it; then a lost disk.
#[test]
fn copies_are_counted_where_they_can_be() {
    let dump = |broker, from: u64, to: u64| ReplicaDump {
        partition: 0,
        broker,
        log_start: from,
        high_watermark: to,
        records: (from..to).map(|offset| (offset, offset + 1)).collect(),
    };
    for (dumps, wrong) in [
        (vec![dump(1, 0, 2), dump(2, 0, 2)], false),
        (vec![dump(1, 0, 2), dump(2, 0, 1)], false),
        (vec![dump(1, 0, 2), dump(2, 2, 2)], false),
        (vec![dump(1, 0, 2)], true),
        (vec![], false),
    ] {
        let mut history = History {
            operations: vec![operation(
                0,
                0,
                1,
                append(&[1, 2]),
                Outcome::Appended {
                    base: 0,
                    epoch: 1,
                    copies: 2,
                },
            )],
            logs: vec![log(9, &[1, 2])],
            dumps,
            ..History::default()
        };
        let report = check(&history, &Coverage::default());
        assert_eq!(report.has(Kind::AckContract), wrong, "{report}");
        assert_eq!(report.passed(), !wrong, "{report}");
        history.faults.push(logboom::testkit::history::FaultEvent {
            kind: "wipe".to_owned(),
            target: "broker 2".to_owned(),
            began_ns: 2,
            ended_ns: None,
        });
        assert!(check(&history, &Coverage::default()).passed());
    }
}

/// Goal: a log that is not whole is still looked up right: what it has is not taken for what it lacks. Method: a hole, and records out of
/// order; nothing may be found but that.
#[test]
fn a_log_that_is_not_whole_is_looked_up_right() {
    let sent = || {
        vec![
            operation(0, 0, 1, append(&[1]), at(0)),
            operation(0, 2, 3, append(&[2]), at(1)),
            operation(0, 4, 5, append(&[3]), at(2)),
            operation(
                1,
                6,
                7,
                Call::Fetch { from: 0 },
                read(&[(0, 1), (1, 2), (2, 3)], 3),
            ),
        ]
    };
    let only = |report: &Report, kinds: &[Kind]| {
        let found: Vec<Kind> = report.figures.anomalies.keys().copied().collect();
        assert_eq!(found, kinds, "{report}");
    };
    let mut hole = log(9, &[1, 2, 3]);
    hole.records.remove(1);
    only(
        &judged(sent(), vec![hole]),
        &[Kind::Lost, Kind::Gap, Kind::DirtyRead],
    );
    let mut turned = log(9, &[1, 2, 3]);
    turned.records.swap(0, 2);
    only(&judged(sent(), vec![turned]), &[Kind::Gap]);
}

/// Goal: a replica that reaches an offset and lacks it does not count as a copy. Method: the first, a middle and the last offset of a
/// replica.
#[test]
fn a_replica_that_lacks_a_record_is_no_copy() {
    for lacked in 0..3 {
        let dump = |broker| ReplicaDump {
            partition: 0,
            broker,
            log_start: 0,
            high_watermark: 3,
            records: (0..3).map(|offset| (offset, offset + 1)).collect(),
        };
        let mut lacking = dump(2);
        lacking.records.retain(|(offset, _)| *offset != lacked);
        let two = |base: u64| Outcome::Appended {
            base,
            epoch: 1,
            copies: 2,
        };
        let history = History {
            operations: (0..3)
                .map(|offset| operation(0, offset, offset, append(&[offset + 1]), two(offset)))
                .collect(),
            logs: vec![log(9, &[1, 2, 3])],
            dumps: vec![dump(1), lacking],
            ..History::default()
        };
        let report = check(&history, &Coverage::default());
        assert_eq!(report.figures.anomalies[&Kind::AckContract], 1, "{report}");
        assert_eq!(
            report.figures.anomalies[&Kind::ReplicaDivergence],
            1,
            "{report}"
        );
    }
}
