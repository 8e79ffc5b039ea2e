//! What an openraft instance says about itself, as a group's status.
//!
//! Owns nothing but the task that looks. It wakes when something has changed, not with every tick of the instance, and reads
//! only what openraft has published when it wakes, or the store's own state.

use std::sync::{Arc, Weak};

use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;

use super::Role;
use super::group::Inner;
use super::replica::Replica;
use super::type_config::{LogId, Members, Raft, StoredMembership, entry_id};
use crate::types::{LeaderEpoch, ReplicaId};

/// Publishes what an instance says about itself, until it ends or is replaced.
pub(crate) async fn observe(raft: Raft, generation: u64, group: Weak<Inner>) {
    let mut server = raft.server_metrics();
    let mut flushed = raft.watch_log_progress();
    let mut committed = raft.watch_commit_progress();
    let mut effective = Effective::of(server.borrow_watched().membership_config.clone());
    loop {
        let Some(inner) = group.upgrade() else { return };
        if !inner.runs(generation) {
            return;
        }
        publish(&raft, &inner.replica, committed.get(), &mut effective);
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

/// The newest membership, and who belongs to the group by it: worked out when it changes, not with every entry.
struct Effective {
    membership: Arc<StoredMembership>,
    members: Members,
}

impl Effective {
    fn of(membership: Arc<StoredMembership>) -> Self {
        let members = Members::of(membership.membership());
        Self {
            membership,
            members,
        }
    }
}

/// Sets a field. Returns whether that changed it.
fn set<T: PartialEq + Clone>(field: &mut T, value: &T) -> bool {
    let changed = field != value;
    if changed {
        field.clone_from(value);
    }
    changed
}

/// Copies what the instance says into the status.
fn publish(raft: &Raft, replica: &Replica, committed: Option<LogId>, effective: &mut Effective) {
    let server = raft.server_metrics().borrow_watched().clone();
    if !Arc::ptr_eq(&effective.membership, &server.membership_config) {
        *effective = Effective::of(server.membership_config);
    }
    let members = &effective.members;
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
    replica.add_members(members);
    if leads {
        replica.begin_epoch(epoch);
    }
    let log = replica.store.state();
    let mut begins_to_lead = false;
    replica.status.send_if_modified(|status| {
        if status.role == Role::Stopped {
            return false;
        }
        begins_to_lead = leads && status.role != Role::Leader;
        let role = if leads { Role::Leader } else { Role::Follower };
        // Applied is known here before the instance knows.
        let committed = committed.map(entry_id).max(status.applied);
        let mut changed = set(&mut status.role, &role);
        changed |= set(&mut status.epoch, &epoch);
        changed |= set(&mut status.leader, &leader);
        changed |= set(&mut status.last, &log.last);
        changed |= set(&mut status.committed, &committed);
        changed |= set(&mut status.purged, &log.purged);
        changed |= set(&mut status.voters, &members.voters);
        changed |= set(&mut status.learners, &members.learners);
        changed |= set(&mut status.is_joint, &members.is_joint);
        changed
    });
    // Behind the status: whoever counts by its voters finds all of them.
    replica.set_members(members);
    if begins_to_lead {
        // What became durable before the role was known told nobody.
        replica.progress_changed();
    }
}
