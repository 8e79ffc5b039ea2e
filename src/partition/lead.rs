//! Watches the partition's group: opens and closes the role gate, keeps the ISR and the high watermark, feeds the witness gate.
//!
//! Owns the leader's observations of an epoch; decides with [`super::isr`]. Wakes on the group's status, on the replicas' progress
//! and on new settings, and by time only while a follower is in sync without being level.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::time::Instant;

use super::index::Lookup;
use super::isr::{InSync, View, high_watermark};
use super::{Gate, Inner, Standing, propose};
use crate::raft::{GroupStatus, Role};
use crate::types::{LeaderEpoch, LogIndex, Offset, ReplicaId};

/// What the watcher needs of the group's status.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    role: Role,
    epoch: LeaderEpoch,
    leader: Option<ReplicaId>,
    last: Option<LogIndex>,
    committed: Option<LogIndex>,
    applied: Option<LogIndex>,
    serves: bool,
}

impl From<&GroupStatus> for Seen {
    fn from(status: &GroupStatus) -> Self {
        Self {
            role: status.role,
            epoch: status.epoch,
            leader: status.leader,
            last: status.last.map(|entry| entry.index),
            committed: status.committed.map(|entry| entry.index),
            applied: status.applied.map(|entry| entry.index),
            #[cfg(feature = "sim")]
            serves: status.is_serving()
                || crate::runtime::sim::makes(crate::runtime::sim::Bug::ReadIndexNotAwaited)
                    && status.role == Role::Leader,
            #[cfg(not(feature = "sim"))]
            serves: status.is_serving(),
        }
    }
}

/// What a leader keeps for its epoch.
#[derive(Debug)]
struct Leading {
    in_sync: InSync,
    /// The last entry applied when it began to serve.
    opened: Option<LogIndex>,
    /// The last entry readers may see, once it serves.
    watermark: Option<LogIndex>,
    /// The offset behind that entry.
    high_watermark: Offset,
}

/// The watcher's task.
pub(super) async fn run(inner: Arc<Inner>) {
    let mut status = inner.group.status();
    let mut progress = inner.group.progress_changed();
    let mut settings = inner.settings_changed.subscribe();
    let mut leading = None;
    loop {
        let seen = Seen::from(&*status.borrow_and_update());
        progress.borrow_and_update();
        settings.borrow_and_update();
        observe(&inner, seen, &mut leading).await;
        propose::acknowledge(&inner);
        let next_check = leading
            .as_ref()
            .and_then(|leading| leading.in_sync.next_check);
        let due = async {
            match next_check {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let goes_on = tokio::select! {
            biased;
            changed = status.changed() => changed.is_ok(),
            changed = progress.changed() => changed.is_ok(),
            changed = settings.changed() => changed.is_ok(),
            () = due => true,
        };
        if !goes_on {
            close(&inner, Standing::Stopped, None);
            propose::acknowledge(&inner);
            return;
        }
    }
}

async fn observe(inner: &Arc<Inner>, seen: Seen, leading: &mut Option<Leading>) {
    if seen.role != Role::Leader || inner.me.is_witness() {
        *leading = None;
        let standing = if seen.role == Role::Stopped {
            Standing::Stopped
        } else {
            Standing::Follows
        };
        return close(inner, standing, Some(seen));
    }
    let progress = inner.group.progress();
    if progress.epoch != seen.epoch {
        // Nothing is known of this epoch yet; its progress comes with a change of its own.
        *leading = None;
        return close(inner, Standing::Opening, Some(seen));
    }
    let (assignment, leaving, min_in_sync) = {
        let settings = inner.settings();
        (
            settings.assignment.clone(),
            settings.leaving.clone(),
            settings.config.min_insync_replicas,
        )
    };
    let (voters, is_joint) = {
        let status = inner.group.status();
        let status = status.borrow();
        (status.voters.clone(), status.is_joint)
    };
    let view = View {
        voters: &voters,
        is_joint,
        me: inner.me,
        epoch: seen.epoch,
        assignment: &assignment,
        leaving: &leaving,
        last: seen.last,
        progress: &progress,
    };
    let before = leading
        .take()
        .filter(|leading| leading.in_sync.epoch() == seen.epoch);
    let known = before.as_ref().map(|before| &before.in_sync);
    let mut in_sync = InSync::observe(known, &view, inner.limits.lag_time_max, Instant::now());
    // The gate is closed before the ISR grows and lifted after it has shrunk: whoever is seen to be in sync has all that the
    // witness has. An epoch begins with the gate closed around everybody.
    let gate = in_sync.gate.clone();
    let closed: BTreeSet<ReplicaId> = match known {
        Some(known) => known.gate.union(&gate).copied().collect(),
        None => voters
            .iter()
            .filter(|voter| !voter.is_witness() && **voter != inner.me)
            .chain(&gate)
            .copied()
            .collect(),
    };
    let lifts = closed != gate;
    inner.group.set_in_sync(seen.epoch, closed);
    in_sync.closed(inner.group.store().state().last.map(|id| id.index));
    let (opened, watermark, high_watermark) = match before {
        Some(before) => (before.opened, before.watermark, before.high_watermark),
        None => (None, None, Offset::default()),
    };
    let mut now = Leading {
        in_sync,
        opened,
        watermark,
        high_watermark,
    };
    if seen.serves {
        now.opened = now.opened.or(seen.applied);
        let durable = view.durable_on_at_least(min_in_sync);
        let watermark = self::high_watermark(now.watermark, now.opened, seen.committed, durable);
        now.watermark = watermark;
        if let Some(index) = watermark {
            now.high_watermark = now.high_watermark.max(offset_behind(inner, index).await);
        }
    }
    let standing = if seen.serves {
        Standing::Serves
    } else {
        Standing::Opening
    };
    let shown = Gate {
        standing,
        epoch: seen.epoch,
        leader: Some(inner.me),
        high_watermark: now.high_watermark,
        isr: now.in_sync.brokers(),
        short: view.reach().filter(|reach| reach.voters < reach.needed),
    };
    publish(inner, shown);
    if lifts {
        inner.group.set_in_sync(seen.epoch, gate);
    }
    *leading = Some(now);
}

/// The offset behind the applied records of all entries up to `index`.
async fn offset_behind(inner: &Arc<Inner>, index: LogIndex) -> Offset {
    let (log_start, next_offset) = {
        let state = inner.log.lock();
        if state.applied.is_none_or(|applied| applied.index <= index) {
            return state.next_offset;
        }
        if let Some(found) = state.index.behind(index, state.next_offset) {
            return found.max(state.log_start);
        }
        (state.log_start, state.next_offset)
    };
    // So far behind only while copies are missing for long; the store may have to read its disk.
    let owner = Arc::clone(inner);
    let search = inner.tasks.spawn_blocking(move || {
        let memory = |offset| owner.log.lock().index.block(offset);
        Lookup {
            memory,
            older: owner.group.store(),
        }
        .behind(index, log_start, next_offset)
    });
    match search.await {
        Ok(Ok(offset)) => offset,
        // Too low is safe: the next look goes on from here.
        Ok(Err(error)) => {
            tracing::warn!(partition = %inner.partition, %error, "cannot place the high watermark");
            log_start
        }
        Err(_) => log_start,
    }
}

/// Closes the gate.
pub(super) fn close(inner: &Inner, standing: Standing, seen: Option<Seen>) {
    let (epoch, leader, high_watermark) = {
        let gate = inner.gate.borrow();
        let (epoch, leader) = seen.map_or((gate.epoch, None), |seen| (seen.epoch, seen.leader));
        (epoch, leader, gate.high_watermark)
    };
    publish(
        inner,
        Gate {
            standing,
            epoch,
            leader,
            high_watermark,
            isr: Vec::new(),
            short: None,
        },
    );
}

/// Lets readers see up to `offset`, when this replica serves: committed, and held durably by enough data replicas.
pub(super) fn raise_high_watermark(inner: &Inner, offset: Offset) {
    #[cfg(feature = "sim")]
    let offset = if crate::runtime::sim::makes(crate::runtime::sim::Bug::WatermarkOffByOne) {
        Offset(offset.0 + 1)
    } else {
        offset
    };
    inner.gate.send_if_modified(|gate| {
        let raises = gate.standing == Standing::Serves && gate.high_watermark < offset;
        if raises {
            gate.high_watermark = offset;
        }
        raises
    });
}

/// Makes `gate` the gate. A replica that has stopped stays so, and in one epoch the high watermark never falls.
fn publish(inner: &Inner, mut gate: Gate) {
    let mut is_new_report = false;
    inner.gate.send_if_modified(|known| {
        if known.epoch == gate.epoch {
            gate.high_watermark = gate.high_watermark.max(known.high_watermark);
        }
        if known.standing == Standing::Stopped || *known == gate {
            return false;
        }
        let serves = |gate: &Gate| gate.standing == Standing::Serves;
        is_new_report = serves(known) != serves(&gate)
            || (serves(&gate) && (known.epoch != gate.epoch || known.isr != gate.isr));
        if serves(known) != serves(&gate) {
            let partition = &inner.partition;
            tracing::info!(%partition, me = %inner.me, epoch = %gate.epoch, serves = serves(&gate));
        }
        *known = std::mem::take(&mut gate);
        true
    });
    if is_new_report {
        inner.reports.send_modify(|version| *version += 1);
    }
}
