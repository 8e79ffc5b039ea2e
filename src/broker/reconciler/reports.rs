//! What leaders here see and the metadata does not show yet, on its way to the controller.
//!
//! Owns which groups have news, and the one message under way. Whatever is lost is sent again: news is what differs from the
//! metadata, not what was not sent.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::api::PartitionReport;
use crate::types::{BrokerId, Error, GroupId, ReplicaId};

use super::ReconcilerPorts;
use super::work::{Hosted, Retry, pause_after};

/// Partitions in one message.
const REPORTS_MAX: usize = 4_096;
/// How long an accepted report may take to show in the metadata before it is sent again.
const REPORT_PATIENCE: Duration = Duration::from_secs(2);

/// A report that was sent, and when.
pub(super) type Reported = (PartitionReport, Instant);

/// The reports of this broker's leaders.
#[derive(Default)]
pub(super) struct Reports {
    /// Groups whose report differs, or may differ, from the metadata.
    marked: BTreeSet<GroupId>,
    under_way: Option<BoxFuture<'static, Result<(), Error>>>,
    /// The groups in the message under way.
    sent: Vec<GroupId>,
    retry: Option<Retry>,
}

impl Reports {
    /// Something has changed in `group`, or in what the metadata shows of it.
    pub(super) fn mark(&mut self, group: GroupId) {
        self.marked.insert(group);
    }

    /// The group is no longer here.
    pub(super) fn forget(&mut self, group: GroupId) {
        self.marked.remove(&group);
    }

    /// Sends what the metadata does not show yet, all of it in one message, unless one is under way.
    pub(super) fn send(&mut self, hosted: &mut BTreeMap<GroupId, Hosted>, ports: &ReconcilerPorts) {
        let now = Instant::now();
        if self.under_way.is_some() || self.retry.is_some_and(|retry| now < retry.at) {
            return;
        }
        let mut reports = Vec::new();
        for group in std::mem::take(&mut self.marked) {
            let Some(hosted) = hosted.get_mut(&group) else {
                continue;
            };
            let Some(report) = hosted.news(ports.broker) else {
                continue;
            };
            self.marked.insert(group);
            let is_sent = hosted.reported.as_ref().is_some_and(|(known, at)| {
                *known == report && now.saturating_duration_since(*at) < REPORT_PATIENCE
            });
            if !is_sent && reports.len() < REPORTS_MAX {
                hosted.reported = Some((report.clone(), now));
                reports.push(report);
                self.sent.push(group);
            }
        }
        if !reports.is_empty() {
            self.under_way = Some((ports.report)(reports));
        }
    }

    /// The answer to the message under way; never, when there is none. Cancel safe.
    pub(super) async fn answered(&mut self) -> Result<(), Error> {
        match &mut self.under_way {
            Some(answer) => answer.await,
            None => std::future::pending().await,
        }
    }

    /// Takes note of that answer.
    pub(super) fn note(
        &mut self,
        answer: Result<(), Error>,
        hosted: &mut BTreeMap<GroupId, Hosted>,
    ) {
        self.under_way = None;
        let sent = std::mem::take(&mut self.sent);
        let Err(error) = answer else {
            self.retry = None;
            return;
        };
        tracing::debug!(%error, "a report was not recorded, sending it again");
        let failures = self.retry.map_or(0, |retry| retry.failures);
        let at = Instant::now() + pause_after(failures).min(REPORT_PATIENCE);
        self.retry = Some(Retry {
            failures: failures + 1,
            at,
        });
        for group in sent {
            if let Some(hosted) = hosted.get_mut(&group) {
                hosted.reported = None;
            }
        }
    }
}

impl Hosted {
    /// What the metadata does not show of what this replica sees while it leads.
    fn news(&self, broker: BrokerId) -> Option<PartitionReport> {
        let mut report = self.partition.report()?;
        if let Some(change) = &self.record.replacement
            && let Some(members) = &self.members
            && members.epoch == report.epoch
            && members.change == change.number
        {
            let assigned: BTreeSet<ReplicaId> = self.record.assignment.voters().collect();
            if members.voters == assigned {
                report.voters = members.voters.iter().copied().collect();
                report.change = change.number;
            }
        }
        let known = &self.record;
        let is_known = known.leader == Some(broker)
            && known.epoch == report.epoch
            && known.isr == report.isr
            && report.voters.is_empty();
        // A newer leader has reported already: this one has not heard of it yet.
        let is_outdated = known.epoch > report.epoch;
        (!is_known && !is_outdated).then_some(report)
    }
}
