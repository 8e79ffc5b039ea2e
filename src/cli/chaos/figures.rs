//! What a history says in numbers: acknowledged and lost records, and how long partitions went without an acknowledgement.
//!
//! Owns the counting. Whether anything is wrong is the checker's to say; the count of lost records is made again here in the
//! plainest way, so that the number printed does not rest on the checker alone.

use std::collections::{BTreeMap, BTreeSet};

use logboom::testkit::history::{AckLevel, Call, FaultEvent, History, Operation, Outcome};
use serde::Serialize;

/// A distribution of times, in ms.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Times {
    pub(super) count: usize,
    pub(super) p50_ms: u64,
    pub(super) p99_ms: u64,
    pub(super) max_ms: u64,
}

impl Times {
    pub(super) fn of(mut times_ns: Vec<u64>) -> Self {
        times_ns.sort_unstable();
        // Of few, the highest are the 99th percentile.
        let at = |percent: usize| {
            let rank = (times_ns.len() * percent).div_ceil(100).max(1) - 1;
            times_ns.get(rank).map_or(0, |time| time / 1_000_000)
        };
        Self {
            count: times_ns.len(),
            p50_ms: at(50),
            p99_ms: at(99),
            max_ms: at(100),
        }
    }
}

/// When appends with acks=all were acknowledged, per partition, in order of time.
pub(super) fn acknowledgements(history: &History) -> BTreeMap<u32, Vec<u64>> {
    let mut found: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    for operation in &history.operations {
        if let (true, Some(at)) = (is_acknowledged(operation), operation.completed_ns) {
            found.entry(operation.partition).or_default().push(at);
        }
    }
    for times in found.values_mut() {
        times.sort_unstable();
    }
    found
}

/// The longest time within a fault (and until the first acknowledgement behind it) without an acknowledgement of one partition.
/// `None` when none follows: the run ended, or nobody wrote.
pub(super) fn silence(acknowledged: &[u64], fault: &FaultEvent) -> Option<u64> {
    let end = fault.ended_ns.unwrap_or(fault.began_ns);
    let from = acknowledged.partition_point(|at| *at <= fault.began_ns);
    let behind = acknowledged.partition_point(|at| *at <= end);
    let until = *acknowledged.get(behind)?;
    let during = acknowledged.get(from..behind).unwrap_or_default();
    // From the beginning of the fault: what was silent before is not its doing.
    let mut last = fault.began_ns;
    let mut longest = 0;
    for at in during.iter().copied().chain([until]) {
        longest = longest.max(at.saturating_sub(last));
        last = at;
    }
    Some(longest)
}

/// The silences of all partitions in all faults, per kind; of each fault, that of the partition that was silent longest.
pub(super) fn silences<'a>(
    histories: impl IntoIterator<Item = &'a History>,
) -> BTreeMap<String, Times> {
    // The same faults are in all histories, in the same order.
    let mut longest: BTreeMap<(String, usize), u64> = BTreeMap::new();
    for history in histories {
        let acknowledged = acknowledgements(history);
        for (number, fault) in history.faults.iter().enumerate() {
            for times in acknowledged.values() {
                if let Some(time) = silence(times, fault) {
                    let key = (fault.kind.clone(), number);
                    let known = longest.entry(key).or_default();
                    *known = time.max(*known);
                }
            }
        }
    }
    let mut kinds: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for ((kind, _), time) in longest {
        kinds.entry(kind).or_default().push(time);
    }
    let times = kinds.into_iter();
    times
        .map(|(kind, times)| (kind, Times::of(times)))
        .collect()
}

/// From each of `moments` (a partition and a time) to the first acknowledgement of an append to that partition that was asked for after it. One that
/// never came is not counted.
pub(super) fn failovers(history: &History, moments: &[(u32, u64)]) -> Vec<u64> {
    let mut asked: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
    for operation in &history.operations {
        if let (true, Some(at)) = (is_acknowledged(operation), operation.completed_ns) {
            let of_partition = asked.entry(operation.partition).or_default();
            of_partition.push((operation.invoked_ns, at));
        }
    }
    for times in asked.values_mut() {
        times.sort_unstable();
    }
    let first = |(partition, moment): &(u32, u64)| {
        let times = asked.get(partition)?;
        let from = times.partition_point(|(invoked, _)| invoked < moment);
        let mut best = u64::MAX;
        for (invoked, completed) in times.get(from..)? {
            if *invoked > best {
                break;
            }
            best = best.min(*completed);
        }
        (best != u64::MAX).then(|| best - moment)
    };
    moments.iter().filter_map(first).collect()
}

fn is_acknowledged(operation: &Operation) -> bool {
    let all = matches!(
        operation.call,
        Call::Append {
            acks: AckLevel::All,
            ..
        }
    );
    all && matches!(operation.outcome, Outcome::Appended { .. })
}

/// Records acknowledged with acks=all, and those of them that the final log does not hold at the offset they were acknowledged at.
/// Of a partition that could not be read in the end nothing is known to be lost.
pub(super) fn acknowledged_and_lost(history: &History) -> (u64, u64) {
    let mut held: BTreeSet<(u32, u64, u64)> = BTreeSet::new();
    let mut starts: BTreeMap<u32, u64> = BTreeMap::new();
    for log in &history.logs {
        starts.insert(log.partition, log.log_start);
        for (offset, value) in &log.records {
            held.insert((log.partition, *offset, *value));
        }
    }
    let (mut acknowledged, mut lost) = (0, 0);
    for operation in &history.operations {
        let (Call::Append { values, acks, .. }, Outcome::Appended { base, .. }) =
            (&operation.call, &operation.outcome)
        else {
            continue;
        };
        if *acks != AckLevel::All {
            continue;
        }
        let start = starts.get(&operation.partition).copied();
        for (offset, value) in (*base..).zip(values) {
            acknowledged += 1;
            let expected = start.is_some_and(|start| offset >= start);
            if expected && !held.contains(&(operation.partition, offset, *value)) {
                lost += 1;
            }
        }
    }
    (acknowledged, lost)
}

/// How often a partition got another leader than the one before.
pub(super) fn leader_changes(history: &History) -> u64 {
    let mut seen = history.leaders.clone();
    seen.sort_by_key(|one| (one.partition, one.epoch));
    let pairs = seen.iter().zip(seen.iter().skip(1));
    let changed =
        pairs.filter(|(one, next)| one.partition == next.partition && one.broker != next.broker);
    changed.count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use logboom::testkit::history::{FinalLog, LeaderSeen};

    fn appended(partition: u32, at: u64, base: u64, value: u64) -> Operation {
        Operation {
            session: 0,
            invoked_ns: at.saturating_sub(1),
            completed_ns: Some(at),
            partition,
            call: Call::Append {
                values: vec![value],
                producer: None,
                acks: AckLevel::All,
            },
            outcome: Outcome::Appended {
                base,
                epoch: 1,
                copies: 2,
            },
        }
    }

    fn fault(began: u64, ended: u64) -> FaultEvent {
        FaultEvent {
            kind: "kill".to_owned(),
            target: String::new(),
            began_ns: began,
            ended_ns: Some(ended),
        }
    }

    /// Goal: a silence is what the fault caused: from its beginning to the next acknowledgement, or between two within it. Method: a table.
    #[test]
    fn silence_is_measured_within_the_fault() {
        let times = [10, 20, 30, 70, 80, 200];
        for (began, ended, longest) in [
            (25, 35, Some(40)),
            (32, 75, Some(38)),
            (79, 90, Some(120)),
            (5, 12, Some(10)),
            (201, 300, None),
        ] {
            assert_eq!(
                silence(&times, &fault(began, ended)),
                longest,
                "{began} to {ended}"
            );
        }
    }

    /// Goal: one number per fault, the worst partition's. Method: two partitions in two histories.
    #[test]
    fn the_worst_partition_counts() {
        let second = 1_000_000_000;
        let mut one = History {
            operations: vec![appended(0, second, 0, 1), appended(0, 3 * second, 1, 2)],
            faults: vec![fault(2 * second, 2 * second + 5)],
            ..History::default()
        };
        let other = History {
            operations: vec![appended(0, 6 * second, 0, 1)],
            ..one.clone()
        };
        one.operations.push(appended(1, 4 * second, 0, 1));
        let found = silences([&one, &other]);
        let expected = Times {
            count: 1,
            p50_ms: 4_000,
            p99_ms: 4_000,
            max_ms: 4_000,
        };
        assert_eq!(found, BTreeMap::from([("kill".to_owned(), expected)]));
    }

    /// Goal: a failover ends with the first acknowledgement of what was asked for after the kill: an answer that was under way is none. Method:
    /// one such answer, and two later appends of which the second is faster.
    #[test]
    fn a_failover_ends_with_a_new_append() {
        let asked = |invoked_ns, at| Operation {
            invoked_ns,
            ..appended(0, at, 0, 1)
        };
        let history = History {
            operations: vec![
                asked(90, 101),
                asked(102, 190),
                asked(110, 150),
                asked(160, 170),
            ],
            ..History::default()
        };
        assert_eq!(failovers(&history, &[(0, 100), (0, 300), (1, 100)]), [50]);
    }

    /// Goal: percentiles are those of the sorted times. Method: 1 to 200 ms.
    #[test]
    fn percentiles() {
        let times = Times::of((1..=200).rev().map(|ms| ms * 1_000_000).collect());
        assert_eq!((times.p50_ms, times.p99_ms, times.max_ms), (100, 198, 200));
        assert_eq!(Times::of(Vec::new()).max_ms, 0);
    }

    /// Goal: a record that is missing, elsewhere or another one is lost; a trimmed one is not, nor one of a log nobody read. Method: one of
    /// each.
    #[test]
    fn lost_records_are_counted() {
        let mut operations: Vec<_> = (0..5).map(|at| appended(0, at, at, 100 + at)).collect();
        operations.push(appended(1, 9, 0, 7));
        let history = History {
            operations,
            logs: vec![FinalLog {
                log_start: 1,
                records: vec![(1, 101), (2, 999), (4, 103)],
                ..FinalLog::default()
            }],
            ..History::default()
        };
        assert_eq!(acknowledged_and_lost(&history), (6, 3));
    }

    /// Goal: another leader is a change, the same one in a new epoch is none. Method: three epochs.
    #[test]
    fn leader_changes_are_counted() {
        let seen = |partition, epoch, broker| LeaderSeen {
            at_ns: 0,
            partition,
            epoch,
            broker,
        };
        let history = History {
            leaders: vec![seen(0, 3, 2), seen(0, 1, 1), seen(0, 2, 1), seen(1, 4, 3)],
            ..History::default()
        };
        assert_eq!(leader_changes(&history), 1);
    }
}
