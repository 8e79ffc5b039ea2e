//! The steps that change a group's members or its leader: asks the group, takes one step, looks what it came to.
//!
//! Owns nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::raft::{Group, GroupStatus, RaftError, Role};
use crate::types::{Assignment, Error, LeaderEpoch, LogIndex, ReplicaId};

use super::plan::{MemberStep, member_step};
use super::work::{Outcome, failed};

/// How recently a follower that lags by a little must have had everything to count as level.
const LEVEL_WITHIN: Duration = Duration::from_secs(1);
/// Longest wait for a membership to be committed.
const COMMIT_PATIENCE: Duration = Duration::from_secs(2);
/// Replicas that are asked to take a leadership over before it stays where it is.
const HEIRS_MAX: usize = 3;

/// The members that a leader found committed in its epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Members {
    pub(super) epoch: LeaderEpoch,
    pub(super) voters: BTreeSet<ReplicaId>,
}

/// The replicas that are connected and have everything that is committed, or had everything a moment ago.
pub(super) fn level_replicas(group: &Group) -> BTreeSet<ReplicaId> {
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

/// Takes the next step towards the assignment; to be called again until it is [`Outcome::Settled`].
pub(super) async fn settle_members(
    group: &Group,
    assignment: &Assignment,
    knows: impl Fn(ReplicaId) -> bool,
    level: &BTreeSet<ReplicaId>,
) -> Result<Outcome, Error> {
    let status = group.status().borrow().clone();
    if !status.is_serving() {
        return Ok(Outcome::Waits);
    }
    let is_level = |replica| replica == group.me() || level.contains(&replica);
    let step = member_step(group.me(), assignment, &status, knows, is_level);
    if !matches!(step, MemberStep::Settled | MemberStep::Wait) {
        tracing::info!(group = %group.id(), ?step, "changing the members of a group");
    }
    let result = match step {
        MemberStep::Wait => return Ok(Outcome::Waits),
        MemberStep::Settled => return Ok(confirm(group, status).await),
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

/// Waits until the membership seen in `seen` is committed: a later leader might undo it before.
async fn confirm(group: &Group, seen: GroupStatus) -> Outcome {
    let last = seen.last.map(|id| id.index);
    let mut status = group.status();
    let is_over = |now: &GroupStatus| now.epoch != seen.epoch || now.role != Role::Leader;
    let is_committed = |now: &GroupStatus| now.committed.map(|id| id.index) >= last;
    let waited = status.wait_for(|now| is_over(now) || is_committed(now));
    match tokio::time::timeout(COMMIT_PATIENCE, waited).await {
        Ok(Ok(now)) if !is_over(&now) && now.voters == seen.voters && !now.is_joint => {
            Outcome::Settled(Members {
                epoch: seen.epoch,
                voters: seen.voters,
            })
        }
        _ => Outcome::Waits,
    }
}

/// Hands leadership of a group that is led here to the replica that has most, and is connected.
pub(super) async fn hand_over(group: &Group) {
    let status = group.status().borrow().clone();
    if status.role != Role::Leader {
        return;
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
            Ok(()) | Err(RaftError::NotLeader { .. }) => return,
            Err(error) => {
                tracing::info!(group = %group.id(), %heir, %error, "leadership was not taken over");
            }
        }
    }
}
