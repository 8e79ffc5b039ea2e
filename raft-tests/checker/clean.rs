//! Right histories pass.

use logboom::testkit::checker::{Coverage, Figures, check};

use super::reference;

/// Seeds of right histories.
const SEEDS: u64 = 3_000;

/// Goal: no false alarm, whatever overlaps, fails, is lost or comes late. Method: histories of the reference log.
#[test]
fn right_histories_pass() {
    let mut sum = Figures::default();
    let mut silent = 0;
    for seed in 0..SEEDS {
        let history = reference::clean(seed);
        let report = check(&history, &Coverage::default());
        assert!(report.passed(), "replay: seed {seed}\n{report}");
        let figures = &report.figures;
        sum.operations += figures.operations;
        sum.unknown += figures.unknown;
        sum.unknown_found += figures.unknown_found;
        sum.failed += figures.failed;
        sum.acknowledged += figures.acknowledged;
        sum.ok += figures.ok;
        sum.sent += figures.sent;
        sum.found += figures.found;
        sum.read += figures.read;
        sum.linearizable_ends += figures.linearizable_ends;
        sum.leader_changes += figures.leader_changes;
        silent += u64::from(figures.silence_max_ns == 0);
    }
    println!("{SEEDS} right histories, 0 false alarms: {sum:?}");
    assert!(sum.unknown_found > SEEDS && sum.failed > SEEDS && sum.leader_changes > SEEDS);
    assert!(sum.read > 10 * SEEDS && sum.linearizable_ends > SEEDS);
    assert!(silent < SEEDS / 10);
}
