//! A judge that is slow and simple: it tries every order.

use logboom::testkit::checker::{AnomalyKind as Kind, Coverage, check};
use logboom::testkit::history::{AckLevel, Call, FinalLog, History, Operation, Outcome};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Small histories.
const HISTORIES: u64 = 40_000;
/// Operations of one, at most.
const OPERATIONS: usize = 8;

/// What an order must explain: one of the operations, or the reading of the whole log.
#[derive(Debug, Clone)]
enum Event {
    /// Values, and the offset that was acknowledged.
    Append(Vec<u64>, Option<u64>),
    End(u64),
    Whole(Vec<u64>),
}

#[derive(Debug, Clone)]
struct Timed {
    event: Event,
    asked: u64,
    /// Never, for what has no answer: nothing need come after it.
    answered: u64,
    /// It may have had no effect.
    optional: bool,
}

/// Whether some order of the events keeps the order of time and is what a log would do. The reading of the whole log comes last
/// among those that it must see: it ends the history, and what has an effect has it before.
fn is_linearizable(events: &[Timed]) -> bool {
    let mut used = vec![false; events.len()];
    search(events, &mut used, &mut Vec::new())
}

fn search(events: &[Timed], used: &mut [bool], log: &mut Vec<u64>) -> bool {
    let done = |(at, one): (usize, &Timed)| used[at] || one.optional;
    if events.iter().enumerate().all(done) {
        return true;
    }
    for at in 0..events.len() {
        // Nothing that is left may have been answered before this one was asked.
        let too_early = |(other, one): (usize, &Timed)| {
            other != at && !used[other] && !one.optional && one.answered < events[at].asked
        };
        if used[at] || events.iter().enumerate().any(too_early) {
            continue;
        }
        let before = log.len();
        let fits = match &events[at].event {
            Event::Append(values, base) => {
                let fits = base.is_none_or(|base| base == before as u64);
                log.extend(values);
                fits
            }
            Event::End(end) => *end == before as u64,
            Event::Whole(records) => records == log,
        };
        used[at] = true;
        let found = fits && search(events, used, log);
        used[at] = false;
        log.truncate(before);
        if found {
            return true;
        }
    }
    false
}

/// A history of one partition, small enough to try every order. Some are right, some nearly, some not at all.
fn small(rng: &mut StdRng) -> History {
    let mut history = History::default();
    let (mut log, mut value, mut now) = (Vec::new(), 0, 1_u64);
    let count = rng.random_range(1..=OPERATIONS);
    for session in 0..count {
        // Where in time it has its effect, and how far it reaches to both sides.
        now += rng.random_range(0..3) * 2;
        let asked = now.saturating_sub(rng.random_range(0..5));
        let answered = now + rng.random_range(0..5);
        let (call, outcome, completed) = if rng.random_bool(0.35) {
            let end = log.len() as u64;
            (
                Call::LinearizableEnd,
                Outcome::End { end, epoch: None },
                Some(answered),
            )
        } else {
            let values: Vec<u64> = (value..value + rng.random_range(1..3)).collect();
            value += values.len() as u64;
            let base = log.len() as u64;
            let call = Call::Append {
                values: values.clone(),
                producer: None,
                acks: AckLevel::All,
            };
            let unknown = Outcome::Unknown {
                reason: String::new(),
            };
            let failed = Outcome::Failed {
                reason: String::new(),
            };
            let has_effect = rng.random_bool(0.8);
            if has_effect {
                log.extend(values);
            }
            match (has_effect, rng.random_bool(0.7)) {
                (true, true) => {
                    let outcome = Outcome::Appended {
                        base,
                        epoch: 1,
                        copies: 1,
                    };
                    (call, outcome, Some(answered))
                }
                (false, true) => (call, failed, Some(answered)),
                (_, false) => (call, unknown, rng.random_bool(0.5).then_some(answered)),
            }
        };
        history.operations.push(Operation {
            session: session as u32,
            invoked_ns: asked,
            completed_ns: completed,
            partition: 0,
            call,
            outcome,
        });
    }
    for _ in 0..[0, 1, 1, 2, 4][rng.random_range(0..5)] {
        spoil(rng, &mut history.operations, &mut log, value);
    }
    // The log is read when every answer that comes has come.
    let answered = history.operations.iter().filter_map(|one| one.completed_ns);
    let last = answered.max().unwrap_or(0);
    history.logs.push(FinalLog {
        partition: 0,
        began_ns: last + rng.random_range(1..4),
        log_start: 0,
        end: log.len() as u64,
        records: (0..).zip(log).collect(),
    });
    history
}

/// One change that may or may not make the history wrong.
fn spoil(rng: &mut StdRng, operations: &mut [Operation], log: &mut Vec<u64>, values: u64) {
    let which = rng.random_range(0..operations.len());
    let operation = &mut operations[which];
    let near = |rng: &mut StdRng, number: u64| (number + rng.random_range(0..4)).saturating_sub(2);
    match rng.random_range(0..6) {
        0 => {
            let length = operation.completed_ns.map(|at| at - operation.invoked_ns);
            operation.invoked_ns = rng.random_range(0..20);
            operation.completed_ns = length.map(|length| operation.invoked_ns + length);
        }
        1 => match &mut operation.outcome {
            Outcome::End { end, .. } => *end = near(rng, *end),
            Outcome::Appended { base, .. } => *base = near(rng, *base),
            _ => {}
        },
        2 if log.len() > 1 => {
            let one = rng.random_range(0..log.len());
            let two = rng.random_range(0..log.len());
            log.swap(one, two);
        }
        3 if !log.is_empty() => {
            log.remove(rng.random_range(0..log.len()));
        }
        4 if values > 0 => log.push(rng.random_range(0..values)),
        _ => {
            let other = rng.random_range(0..operations.len());
            let times = (operations[other].invoked_ns, operations[other].completed_ns);
            let operation = &mut operations[which];
            if operation.completed_ns.is_some() && times.1.is_some() {
                (operation.invoked_ns, operation.completed_ns) = times;
            }
        }
    }
}

/// The history as events to be ordered.
fn events(history: &History) -> Vec<Timed> {
    let operations = history.operations.iter().filter_map(|operation| {
        let event = match (&operation.call, &operation.outcome) {
            (_, Outcome::Failed { .. }) => return None,
            (Call::Append { values, .. }, Outcome::Appended { base, .. }) => {
                Event::Append(values.clone(), Some(*base))
            }
            (Call::Append { values, .. }, _) => Event::Append(values.clone(), None),
            (_, Outcome::End { end, .. }) => Event::End(*end),
            _ => return None,
        };
        let is_unknown = matches!(operation.outcome, Outcome::Unknown { .. });
        Some(Timed {
            event,
            asked: operation.invoked_ns,
            // An unknown outcome may be an effect that comes later.
            answered: if is_unknown {
                u64::MAX
            } else {
                operation.completed_ns.unwrap_or(u64::MAX)
            },
            optional: is_unknown,
        })
    });
    let log = &history.logs[0];
    let whole = Timed {
        event: Event::Whole(log.records.iter().map(|(_, value)| *value).collect()),
        asked: log.began_ns,
        answered: u64::MAX,
        optional: false,
    };
    operations.chain([whole]).collect()
}

/// Goal: the fast judge says "not linearizable" exactly when no order explains a history. Method: random small histories, right, nearly
/// right and wrong; a judge that tries every order must agree on each, both ways.
#[test]
fn a_judge_that_tries_every_order_agrees() {
    let (mut right, mut wrong) = (0, 0);
    for seed in 0..HISTORIES {
        let history = small(&mut StdRng::seed_from_u64(seed));
        let report = check(&history, &Coverage::default());
        let expected = is_linearizable(&events(&history));
        // Promises beyond linearizability, which an order alone does not know of.
        let beyond = [Kind::EpochConflict, Kind::AckContract];
        let found = report
            .anomalies
            .iter()
            .any(|one| !beyond.contains(&one.kind));
        assert_eq!(
            !found, expected,
            "replay: seed {seed}\n{history:#?}\n{report}"
        );
        if expected {
            right += 1;
        } else {
            wrong += 1;
        }
    }
    println!("{HISTORIES} small histories: {right} right, {wrong} wrong, the judges agree on all");
    assert!(right > HISTORIES / 5 && wrong > HISTORIES / 5);
}
