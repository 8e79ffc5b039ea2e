//! What an openraft instance says about itself, as a group's status.
//!
//! Owns nothing but the task that looks. It wakes when something has changed, not with every tick of the instance, and reads
//! only what openraft has published when it wakes, or the store's own state.

use std::sync::Weak;

use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;

use super::group::Inner;
use super::replica::Replica;
use super::type_config::{LogId, Raft, entry_id, learners, voters};
use super::{GroupStatus, Role};
use crate::types::{LeaderEpoch, ReplicaId};

/// Publishes what an instance says about itself, until it ends or is replaced.
pub(crate) async fn observe(raft: Raft, generation: u64, group: Weak<Inner>) {
    let mut server = raft.server_metrics();
    let mut flushed = raft.watch_log_progress();
    let mut committed = raft.watch_commit_progress();
    loop {
        let Some(inner) = group.upgrade() else { return };
        if !inner.runs(generation) {
            return;
        }
        publish(&raft, &inner.replica, committed.get());
        drop(inner);
        let alive = tokio::select! {
            biased;
            changed = server.changed() => changed.is_ok(),
            changed = committed.changed() => changed.is_ok(),
            changed = flushed.changed() => changed.is_ok(),
        };
        if !alive {
            break;
        }
    }
    let ended = raft.metrics().borrow_watched().running_state.clone();
    if let Some(inner) = group.upgrade()
        && let Err(error) = ended
        && inner.runs(generation)
    {
        let (group, replica) = (inner.replica.group, inner.replica.me);
        tracing::error!(%group, %replica, %error, "replica stopped");
        inner.replica.stop(&error.to_string());
    }
}

/// Copies what the instance says into the status.
fn publish(raft: &Raft, replica: &Replica, committed: Option<LogId>) {
    let server = raft.server_metrics().borrow_watched().clone();
    let membership = server.membership_config.membership();
    let leads = server.state == ServerState::Leader;
    let vote = server.vote.leader_id();
    let epoch = LeaderEpoch(vote.term);
    let voted_for = ReplicaId::from_u64(vote.voted_for);
    let leader = if leads {
        Some(replica.me)
    } else {
        // A vote for oneself is not won yet, or left over from an earlier leadership.
        Some(voted_for).filter(|id| server.vote.is_committed() && *id != replica.me)
    };
    replica.add_members(membership);
    if leads {
        replica.begin_epoch(epoch);
    }
    let log = replica.store.state();
    let (voters, learners) = (voters(membership), learners(membership));
    let mut begins_to_lead = false;
    replica.status.send_if_modified(|status| {
        if status.role == Role::Stopped {
            return false;
        }
        begins_to_lead = leads && status.role != Role::Leader;
        let next = GroupStatus {
            role: if leads { Role::Leader } else { Role::Follower },
            epoch,
            leader,
            last: log.last,
            committed: committed.map(entry_id).max(status.applied),
            // Known here before the instance knows.
            applied: status.applied,
            purged: log.purged,
            voters,
            learners,
            is_joint: membership.get_joint_config().len() > 1,
        };
        let changed = next != *status;
        *status = next;
        changed
    });
    // Behind the status: whoever counts by its voters finds all of them.
    replica.set_members(membership);
    if begins_to_lead {
        // What became durable before the role was known told nobody.
        replica.progress_changed();
    }
}
