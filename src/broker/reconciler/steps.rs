//! The steps that change a group's members or its leader: asks the group, takes one step, looks what it came to.
//!
//! Owns nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::controller::metadata::PartitionRecord;
use crate::raft::{Group, GroupStatus, RaftError, Role};
use crate::types::{Error, LeaderEpoch, LogIndex, ReplicaId};

use super::plan::{Desired, MemberStep, copies_to_confirm, member_step};
use super::work::{Outcome, failed};

/// How recently a follower that lags by a little must have had everything to count as level.
const LEVEL_WITHIN: Duration = Duration::from_secs(1);
/// Longest wait for a membership to be committed and durable.
const COMMIT_PATIENCE: Duration = Duration::from_secs(2);
/// Replicas that are asked to take a leadership over before it stays where it is.
const HEIRS_MAX: usize = 3;

/// The members that a leader found committed in its epoch, and durable where they have to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Members {
    pub(super) epoch: LeaderEpoch,
    pub(super) voters: BTreeSet<ReplicaId>,
    /// The number of the replacement that they were held against; 0 when there was none.
    pub(super) change: u32,
}

/// The replicas that are connected and have everything that is committed, or had everything a moment ago.
fn level_replicas(group: &Group) -> BTreeSet<ReplicaId> {
    let (epoch, committed) = {
        let status = group.status();
        let status = status.borrow();
        (status.epoch, status.committed.map(|id| id.index))
    };
    let progress = group.progress();
    if progress.epoch != epoch {
        return BTreeSet::new();
    }
    let now = Instant::now();
    let followers = progress.followers.into_iter();
    let level = followers.filter(|(_, follower)| {
        let recent = |at: Instant| now.saturating_duration_since(at) <= LEVEL_WITHIN;
        let is_level = follower.matched >= committed || follower.caught_up_at.is_some_and(recent);
        follower.connected && !follower.lost_data && is_level
    });
    level.map(|(replica, _)| replica).collect()
}

/// Takes the next step towards the assignment in `record`; to be called again until it is [`Outcome::Settled`].
pub(super) async fn settle_members(
    group: &Group,
    record: &PartitionRecord,
    knows: impl Fn(ReplicaId) -> bool,
) -> Result<Outcome, Error> {
    let me = group.me();
    let status = group.status().borrow().clone();
    if !status.is_serving() {
        return Ok(Outcome::Waits);
    }
    let level = level_replicas(group);
    let desired = Desired {
        assignment: &record.assignment,
        is_current: record.leader == Some(me.broker()) && record.epoch == status.epoch,
    };
    let is_level = |replica| replica == me || level.contains(&replica);
    let step = member_step(me, desired, &status, knows, is_level);
    if !matches!(step, MemberStep::Settled | MemberStep::Wait) {
        tracing::info!(group = %group.id(), ?step, "changing the members of a group");
    }
    let result = match step {
        MemberStep::Wait => return Ok(Outcome::Waits),
        MemberStep::Settled => return Ok(confirm(group, record, status, &level).await),
        MemberStep::AddLearner(replica) => group.add_learner(replica).await,
        MemberStep::RemoveLearner(replica) => group.remove_learner(replica).await,
        MemberStep::ChangeVoters(voters) => group.change_voters(voters).await,
        MemberStep::HandOver(replica) => group.transfer_leader(replica).await,
    };
    match result {
        Ok(()) => Ok(Outcome::Stepped),
        Err(RaftError::NotLeader { .. } | RaftError::Lost) => Ok(Outcome::Waits),
        Err(error) => Err(failed(&error)),
    }
}

/// Waits until the membership seen in `seen` is committed, for a later leader might undo it before; and, when the replicas
/// are being replaced, until every new copy and every other one that keeps up has all of the log up to it: what was
/// acknowledged under the members before may have its other copies on the replicas that are deleted next.
async fn confirm(
    group: &Group,
    record: &PartitionRecord,
    seen: GroupStatus,
    level: &BTreeSet<ReplicaId>,
) -> Outcome {
    let last = seen.last.map(|id| id.index);
    let change = record.replacement.as_ref();
    let copies = copies_to_confirm(group.me(), record, level);
    let are_durable = || {
        let progress = group.progress();
        let has_it = |replica: &ReplicaId| {
            let follower = progress.followers.get(replica);
            follower.is_some_and(|follower| !follower.lost_data && follower.matched >= last)
        };
        progress.epoch == seen.epoch && progress.flushed >= last && copies.iter().all(has_it)
    };
    let mut changed = group.progress_changed();
    let confirmed = async {
        if change.is_none() {
            let is_seen = |now: &GroupStatus| {
                now.epoch != seen.epoch || now.committed.map(|id| id.index) >= last
            };
            return group.status().wait_for(is_seen).await.is_ok();
        }
        // A quorum answers, and every change of members asked for before has been taken up.
        if group.linearize(COMMIT_PATIENCE).await.is_err() {
            return false;
        }
        while !are_durable() {
            if changed.changed().await.is_err() {
                return false;
            }
        }
        true
    };
    if !matches!(
        tokio::time::timeout(COMMIT_PATIENCE, confirmed).await,
        Ok(true)
    ) {
        return Outcome::Waits;
    }
    let now = group.status().borrow().clone();
    let is_over = now.epoch != seen.epoch || now.role != Role::Leader;
    let is_committed = now.committed.map(|id| id.index) >= last;
    if is_over || !is_committed || now.is_joint || now.voters != seen.voters {
        return Outcome::Waits;
    }
    Outcome::Settled(Members {
        epoch: seen.epoch,
        voters: seen.voters,
        change: change.map_or(0, |change| change.number),
    })
}

/// Hands leadership of a group that is led here to the replica that has most, and is connected. Whether it is led here no longer.
pub(super) async fn hand_over(group: &Group) -> bool {
    let status = group.status().borrow().clone();
    if status.role != Role::Leader {
        return true;
    }
    let progress = group.progress();
    let mut heirs: Vec<(Option<LogIndex>, ReplicaId)> = status
        .voters
        .iter()
        .filter(|voter| !voter.is_witness() && **voter != group.me())
        .filter_map(|voter| {
            let follower = progress.followers.get(voter)?;
            let is_fit = follower.connected && !follower.lost_data;
            is_fit.then_some((follower.matched, *voter))
        })
        .collect();
    heirs.sort_unstable_by(|one, other| other.cmp(one));
    for (_, heir) in heirs.into_iter().take(HEIRS_MAX) {
        match group.transfer_leader(heir).await {
            Ok(()) | Err(RaftError::NotLeader { .. }) => return true,
            Err(error) => {
                tracing::info!(group = %group.id(), %heir, %error, "leadership was not taken over");
            }
        }
    }
    false
}
