//! Three verdicts: what proves nothing never passes.

use std::collections::BTreeMap;

use logboom::testkit::checker::{AnomalyKind, Coverage, Verdict, check};
use logboom::testkit::history::{Call, History, Outcome};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::reference::{Shape, with_shape};

/// What a change makes the report say, and the change.
type Change<T> = (&'static str, fn(&mut T));

fn lively() -> History {
    let shape = Shape {
        partitions: 2,
        steps: 400,
        change_every: 40,
        trim_every: 0,
        trouble: 20,
        goes_on: false,
    };
    with_shape(StdRng::seed_from_u64(1), shape)
}

/// Goal: a run in which too little happened is invalid, whatever it lacks. Method: what a right history holds is demanded and passes;
/// then one more of each.
#[test]
fn too_little_is_invalid() {
    let history = lively();
    let has = check(&history, &Coverage::default());
    assert!(has.passed(), "{has}");
    let enough = Coverage {
        operations_min: has.figures.ok,
        unknown_min: has.figures.unknown,
        leader_changes_min: has.figures.leader_changes,
        faults: has.figures.faults.clone(),
    };
    assert!(enough.unknown_min > 0 && enough.leader_changes_min > 0 && !enough.faults.is_empty());
    assert_eq!(check(&history, &enough).verdict, Verdict::Passed);
    let more: [Change<Coverage>; 5] = [
        ("operations", |coverage| coverage.operations_min += 1),
        ("unknown", |coverage| coverage.unknown_min += 1),
        ("leader", |coverage| coverage.leader_changes_min += 1),
        ("kill", |coverage| {
            *coverage.faults.get_mut("kill").unwrap() += 1;
        }),
        ("pause", |coverage| {
            coverage.faults = BTreeMap::from([("pause".to_owned(), 1)]);
        }),
    ];
    for (what, raise) in more {
        let mut coverage = enough.clone();
        raise(&mut coverage);
        let report = check(&history, &coverage);
        assert_eq!(report.verdict, Verdict::Invalid, "{what}\n{report}");
        assert_eq!(report.gaps.len(), 1, "{what}\n{report}");
        assert!(report.gaps[0].contains(what), "{what}\n{report}");
    }
    let nothing = check(&History::default(), &Coverage::default());
    assert_eq!(nothing.verdict, Verdict::Invalid);
}

/// Goal: a history that is not whole, or contradicts itself, is invalid. Method: one defect at a time.
#[test]
fn what_cannot_be_judged_is_invalid() {
    let defects: [Change<History>; 10] = [
        ("not read at the end", |history| {
            history.logs.retain(|log| log.partition != 1);
            // Replicas of a log that nobody read have nothing to be held against.
            history.dumps.clear();
        }),
        ("sent twice", |history| {
            let mut again = history.operations.iter().find(|one| {
                matches!(
                    (&one.call, &one.outcome),
                    (Call::Append { .. }, Outcome::Failed { .. })
                )
            });
            let again = again.take().unwrap().clone();
            history.operations.push(again);
        }),
        ("contradicts itself", |history| {
            let done = history
                .operations
                .iter_mut()
                .find(|one| one.completed_ns.is_some_and(|at| at > 0));
            let done = done.unwrap();
            done.invoked_ns = done.completed_ns.unwrap() + 1;
        }),
        ("contradicts itself", |history| {
            let ends = history.operations.iter_mut();
            let mut ends = ends.filter(|one| matches!(one.outcome, Outcome::End { .. }));
            ends.next().unwrap().call = Call::Fetch { from: 0 };
        }),
        ("contradicts itself", |history| {
            let ends = history.operations.iter_mut();
            let mut ends = ends.filter(|one| matches!(one.outcome, Outcome::End { .. }));
            ends.next().unwrap().completed_ns = None;
        }),
        ("contradicts itself", |history| {
            let mut empty = history.operations[0].clone();
            empty.completed_ns = None;
            empty.call = Call::Append {
                values: Vec::new(),
                producer: None,
                acks: logboom::testkit::history::AckLevel::All,
            };
            empty.outcome = Outcome::Unknown {
                reason: String::new(),
            };
            history.operations.push(empty);
        }),
        ("contradicts itself", |history| {
            for operation in &mut history.operations {
                if let Outcome::Appended { base, .. } = &mut operation.outcome {
                    *base = u64::MAX;
                    break;
                }
            }
        }),
        ("beyond any log", |history| {
            history.logs[0].records[0].0 = u64::MAX;
        }),
        ("beyond any log", |history| history.logs[0].end = u64::MAX),
        ("beyond any log", |history| {
            history.dumps[0].high_watermark = u64::MAX;
        }),
    ];
    for (what, spoil) in defects {
        let mut history = lively();
        spoil(&mut history);
        let report = check(&history, &Coverage::default());
        assert_eq!(report.verdict, Verdict::Invalid, "{what}\n{report}");
        assert!(
            report.gaps.iter().any(|gap| gap.contains(what)),
            "{what}\n{report}"
        );
    }
}

/// Goal: what is wrong is said even of a run that shows too little, and is counted in full while few examples are kept. Method: a history
/// that demands much and has lost everything.
#[test]
fn anomalies_come_before_too_little() {
    let mut history = lively();
    for log in &mut history.logs {
        log.records.clear();
    }
    let coverage = Coverage {
        operations_min: 1_000_000,
        ..Coverage::default()
    };
    let report = check(&history, &coverage);
    assert_eq!(report.verdict, Verdict::Anomalies);
    assert_eq!(report.gaps.len(), 1);
    assert!(
        report.figures.anomalies[&AnomalyKind::Lost] > 20,
        "{report}"
    );
    let shown = report
        .anomalies
        .iter()
        .filter(|one| one.kind == AnomalyKind::Lost);
    assert_eq!(shown.count(), 5);
}
