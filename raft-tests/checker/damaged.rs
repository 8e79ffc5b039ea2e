//! Wrong histories are found, and named.

use std::collections::BTreeMap;

use logboom::testkit::checker::{AnomalyKind, Coverage, Report, Verdict, check};
use logboom::testkit::history::History;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::mutant::Mutant;
use super::reference::{self, Shape};
use super::{log_mutators, order_mutators};

/// Damaged histories of each mutator.
const EACH: u32 = 40;
/// Right histories that are looked through for an occasion.
const SEEDS: u64 = 1_500;

fn base(seed: u64) -> Mutant {
    let shape = Shape {
        partitions: 1 + u32::try_from(seed % 2).unwrap(),
        steps: 150 + u32::try_from(seed % 5).unwrap() * 50,
        change_every: 40,
        trim_every: [0, 50][usize::try_from(seed % 2).unwrap()],
        trouble: 25,
        goes_on: false,
    };
    Mutant {
        history: reference::with_shape(StdRng::seed_from_u64(seed), shape),
        rng: StdRng::seed_from_u64(!seed),
    }
}

fn judged(history: &History) -> Report {
    check(history, &Coverage::default())
}

/// Goal: every kind of damage is found, called by its name, and shown with a witness. Method: at least three mutators per kind, each on
/// many right histories; the damaged one must show the kind, its witness must name something.
#[test]
fn every_damage_is_found_and_named() {
    let mut mutators: BTreeMap<AnomalyKind, u32> = BTreeMap::new();
    let (mut damaged, mut wrong) = (0, Vec::new());
    let all = log_mutators::MUTATORS
        .iter()
        .chain(order_mutators::MUTATORS);
    for (kind, what, mutate) in all {
        *mutators.entry(*kind).or_default() += 1;
        let mut applied = 0;
        for seed in 0..SEEDS {
            let mut mutant = base(seed);
            if mutate(&mut mutant).is_none() {
                continue;
            }
            let report = judged(&mutant.history);
            let shown = report.anomalies.iter().find(|one| one.kind == *kind);
            let words = ["offset", "operation", "broker", "reading"];
            let named = |line: &String| words.iter().any(|word| line.contains(word));
            let is_shown = shown.is_some_and(|one| one.witness.iter().any(named));
            if report.verdict != Verdict::Anomalies || !is_shown {
                wrong.push(format!("{kind}: {what}; replay: seed {seed}\n{report}"));
                break;
            }
            applied += 1;
            if applied == EACH {
                break;
            }
        }
        if applied < EACH {
            wrong.push(format!("{kind}: {what}: {applied} damaged histories"));
        }
        damaged += applied;
    }
    assert!(
        wrong.is_empty(),
        "{} mutators:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    for kind in AnomalyKind::ALL {
        let count = mutators.get(kind).copied().unwrap_or(0);
        assert!(count >= 3, "{kind}: {count} mutators");
    }
    println!(
        "{} kinds, {} mutators, {damaged} damaged histories, all found and named",
        mutators.len(),
        mutators.values().sum::<u32>()
    );
}

/// Goal: what the mutators are applied to is right, or they would prove nothing. Method: the same histories, undamaged.
#[test]
fn undamaged_histories_pass() {
    for seed in 0..300 {
        let report = judged(&base(seed).history);
        assert!(report.passed(), "replay: seed {seed}\n{report}");
    }
}
