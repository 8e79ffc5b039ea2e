//! The demo's result and its judge: only the story as planned is a success.

use std::time::Duration;

use logboom::api::PartitionView;
use logboom::types::{BrokerId, LeaderEpoch};
use serde::Serialize;

use super::text::Text;
use crate::cli::output;

/// What is expected of partition 0 and partition 1.
pub(super) const REPLICAS: [[u32; 2]; 2] = [[1, 2], [2, 3]];
pub(super) const LEADERS: [u32; 2] = [1, 2];
pub(super) const LEADERS_AFTER_KILL: [u32; 2] = [2, 2];
pub(super) const ISR_AFTER_KILL: [&[u32]; 2] = [&[2], &[2, 3]];

/// The result; its form is fixed.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) produced: u64,
    pub(super) acked: u64,
    pub(super) read_back: u64,
    pub(super) lost: u64,
    pub(super) duplicated: u64,
    pub(super) out_of_order: u64,
    pub(super) failover_ms: u64,
    pub(super) preferred_return_ms: Option<u64>,
    pub(super) partitions: Vec<PartitionReport>,
}

#[derive(Debug, Serialize)]
pub(super) struct PartitionReport {
    pub(super) id: u32,
    pub(super) replicas: Vec<u32>,
    pub(super) leader_before: Option<u32>,
    pub(super) leader_after_kill: Option<u32>,
    pub(super) leader_after_return: Option<u32>,
    pub(super) isr_before: Vec<u32>,
    pub(super) isr_after_kill: Vec<u32>,
    pub(super) isr_after_return: Vec<u32>,
}

/// One look at a partition.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Look {
    pub(super) leader: Option<u32>,
    pub(super) isr: Vec<u32>,
    pub(super) replicas: Vec<u32>,
    pub(super) epoch: LeaderEpoch,
}

impl Look {
    pub(super) fn at(view: &PartitionView) -> Self {
        let replicas: Vec<u32> = view.replicas.iter().map(|one| one.broker.0).collect();
        Self {
            leader: view.leader.map(|leader| leader.0),
            isr: replicas
                .iter()
                .copied()
                .filter(|one| view.isr.contains(&BrokerId(*one)))
                .collect(),
            replicas,
            epoch: view.epoch,
        }
    }

    pub(super) fn is(&self, leader: u32, isr: &[u32]) -> bool {
        self.leader == Some(leader) && self.isr == isr
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn partition_reports(
    before: &[Look; 2],
    killed: &[Look; 2],
    after: &[Look; 2],
) -> Vec<PartitionReport> {
    let looks = before.iter().zip(killed).zip(after);
    let report =
        |(id, ((before, killed), after)): (u32, ((&Look, &Look), &Look))| PartitionReport {
            id,
            replicas: before.replicas.clone(),
            leader_before: before.leader,
            leader_after_kill: killed.leader,
            leader_after_return: after.leader,
            isr_before: before.isr.clone(),
            isr_after_kill: killed.isr.clone(),
            isr_after_return: after.isr.clone(),
        };
    (0_u32..).zip(looks).map(report).collect()
}

/// What is not as it should be, in words.
pub(super) fn judge(report: &Report, text: &Text) -> Vec<String> {
    let mut wrong = Vec::new();
    for (what, found, expected) in [
        ("produced", report.produced, text.lines),
        ("acknowledged", report.acked, text.lines),
        ("read back", report.read_back, text.lines),
        ("lost", report.lost, 0),
        ("duplicated", report.duplicated, 0),
        ("out of order", report.out_of_order, 0),
    ] {
        if found != expected {
            wrong.push(format!("{found} records {what} instead of {expected}"));
        }
    }
    if report.preferred_return_ms.is_none() {
        wrong.push("broker 1 did not get its leadership back".to_owned());
    }
    for (at, found) in report.partitions.iter().enumerate() {
        let at_of = |table: [u32; 2]| table.get(at).copied();
        let replicas = REPLICAS.get(at).map_or(&[][..], |replicas| replicas);
        let isr_after_kill = ISR_AFTER_KILL.get(at).copied().unwrap_or_default();
        let mut check =
            |when: &str, leader: Option<u32>, isr: &[u32], planned, planned_isr: &[u32]| {
                if leader != planned || isr != planned_isr {
                    wrong.push(format!(
                        "partition {at} {when}: leader {}, ISR {} instead of {} and {}",
                        output::or_dash(leader),
                        output::list(isr),
                        output::or_dash(planned),
                        output::list(planned_isr)
                    ));
                }
            };
        check(
            "at first",
            found.leader_before,
            &found.isr_before,
            at_of(LEADERS),
            replicas,
        );
        let planned = at_of(LEADERS_AFTER_KILL);
        check(
            "after the kill",
            found.leader_after_kill,
            &found.isr_after_kill,
            planned,
            isr_after_kill,
        );
        let planned = at_of(LEADERS);
        check(
            "after the return",
            found.leader_after_return,
            &found.isr_after_return,
            planned,
            replicas,
        );
        if found.replicas != replicas {
            let (found, planned) = (output::list(&found.replicas), output::list(replicas));
            wrong.push(format!(
                "partition {at} is on brokers {found} instead of {planned}"
            ));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        let look = |leader, isr: &[u32], replicas: [u32; 2]| Look {
            leader: Some(leader),
            isr: isr.to_vec(),
            replicas: replicas.to_vec(),
            epoch: LeaderEpoch(1),
        };
        let before = [look(1, &[1, 2], [1, 2]), look(2, &[2, 3], [2, 3])];
        let killed = [look(2, &[2], [1, 2]), look(2, &[2, 3], [2, 3])];
        Report {
            produced: 10,
            acked: 10,
            read_back: 10,
            lost: 0,
            duplicated: 0,
            out_of_order: 0,
            failover_ms: 5,
            preferred_return_ms: Some(7),
            partitions: partition_reports(&before, &killed, &before),
        }
    }

    const TEN: Text = Text {
        lines: 10,
        bytes: 20,
        longest: 1,
    };

    /// Goal: only the story as planned is a success. Method: one thing wrong at a time.
    #[test]
    fn every_deviation_is_seen() {
        assert_eq!(judge(&good(), &TEN), Vec::<String>::new());
        let changes: [fn(&mut Report); 10] = [
            |report| report.lost = 1,
            |report| report.duplicated = 1,
            |report| report.out_of_order = 1,
            |report| report.acked = 9,
            |report| report.preferred_return_ms = None,
            |report| report.partitions[0].leader_after_kill = Some(1),
            |report| report.partitions[0].isr_after_kill = vec![1, 2],
            |report| report.partitions[0].leader_after_return = None,
            |report| report.partitions[1].replicas = vec![3, 1],
            |report| report.partitions[1].isr_after_return = vec![2],
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut report = good();
            change(&mut report);
            assert_eq!(judge(&report, &TEN).len(), 1, "change {number}");
        }
    }

    /// Goal: the JSON has the form that scripts rely on. Method: letter by letter.
    #[test]
    fn the_report_has_its_fixed_form() {
        let text = serde_json::to_string(&good()).unwrap();
        let start = r#"{"produced":10,"acked":10,"read_back":10,"lost":0,"duplicated":0,"out_of_order":0,"failover_ms":5,"preferred_return_ms":7,"partitions":[{"id":0,"replicas":[1,2],"leader_before":1,"leader_after_kill":2,"leader_after_return":1,"isr_before":[1,2],"isr_after_kill":[2],"isr_after_return":[1,2]},"#;
        assert!(text.starts_with(start), "{text}");
    }
}
