//! What must hold at every moment, looked at after every turn, from what each broker knows itself.
//!
//! Owns what was seen so far. Says what is wrong; does not stop the run.

use std::collections::{BTreeMap, BTreeSet};

use logboom::testkit::recorder::Recorder;
use logboom::types::{EntryId, ReplicaId, ReplicaKind};

use crate::world::World;

type Place = (String, u32);

#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    /// The start of the process that was seen: a new one begins at its checkpoint.
    run: u64,
    replica: u64,
    epoch: u64,
    log_start: u64,
    committed: u64,
}

/// The watcher.
#[derive(Debug, Default)]
pub struct Watch {
    /// Who served in which epoch.
    leaders: BTreeMap<(Place, u64), ReplicaId>,
    /// How far the leader of an epoch let records be read.
    watermarks: BTreeMap<(Place, u64), u64>,
    seen: BTreeMap<(usize, Place), Seen>,
    /// Highest epoch in which somebody served.
    newest: BTreeMap<Place, u64>,
    pub leader_changes: u64,
}

impl Watch {
    /// A witness has no entry of a leader's epoch that this leader does not have durably, or that a follower lacks which it calls in sync.
    fn look_at_witnesses(world: &World) -> Vec<String> {
        let mut wrong = Vec::new();
        // By partition: epoch and last entry of every replica, and whom a leader calls in sync.
        let mut lasts: BTreeMap<Place, Vec<(ReplicaId, EntryId)>> = BTreeMap::new();
        let mut leaders: Vec<(Place, u64, BTreeSet<ReplicaId>, u64)> = Vec::new();
        for node in &world.nodes {
            let Some(broker) = node.broker() else {
                continue;
            };
            for partition in broker.replicas() {
                let name = partition.id();
                let place = (name.topic.as_str().to_owned(), name.partition.0);
                let last = partition.group().status().borrow().last;
                lasts
                    .entry(place.clone())
                    .or_default()
                    .push((partition.me(), last.unwrap_or_default()));
                if partition.is_leader() {
                    let view = partition.view();
                    let mut followers = partition.group().status().borrow().voters.clone();
                    followers.retain(|replica| {
                        *replica != partition.me() && view.isr.contains(&replica.broker())
                    });
                    let flushed = partition.group().progress().flushed;
                    let flushed = flushed.map_or(0, |index| index.0);
                    leaders.push((place, view.epoch.0, followers, flushed));
                }
            }
        }
        for (place, epoch, followers, flushed) in leaders {
            let lasts = lasts.get(&place).map(Vec::as_slice).unwrap_or_default();
            let witness = lasts.iter().find(|(replica, last)| {
                replica.kind() == ReplicaKind::Witness && last.epoch.0 == epoch
            });
            let Some((witness, has)) = witness else {
                continue;
            };
            if has.index.0 > flushed {
                wrong.push(format!(
                    "{}-{}: witness {witness} has {has}, its leader durably {flushed}",
                    place.0, place.1
                ));
            }
            for (follower, last) in lasts {
                let counts = follower.kind() == ReplicaKind::Data && followers.contains(follower);
                if counts && (last.epoch, last.index) < (has.epoch, has.index) {
                    wrong.push(format!(
                        "{}-{}: witness {witness} has {has}, {follower} in sync has {last}",
                        place.0, place.1
                    ));
                }
            }
        }
        wrong
    }

    /// Looks at every replica; returns what is wrong.
    pub fn look(&mut self, world: &World, recorders: &[Recorder]) -> Vec<String> {
        let mut wrong = Self::look_at_witnesses(world);
        if let Some(twin) = world.twin.broker()
            && !twin.replicas().is_empty()
        {
            let name = twin.id();
            wrong.push(format!(
                "a copy of the directory of broker {name} takes part"
            ));
        }
        for (at, node) in world.nodes.iter().enumerate() {
            let Some(broker) = node.broker() else {
                continue;
            };
            let run = node.disk().lives();
            for partition in broker.replicas() {
                let local = partition.local();
                let place = (
                    local.partition.topic.as_str().to_owned(),
                    local.partition.partition.0,
                );
                let mut say = |what: String| {
                    wrong.push(format!("{}-{} on {}: {what}", place.0, place.1, node.name));
                };
                let replica = local.replica.as_u64();
                let now = Seen {
                    run,
                    replica,
                    epoch: local.epoch.0,
                    log_start: local.log_start.0,
                    committed: local.committed.0,
                };
                if now.log_start > now.committed {
                    say(format!("starts behind its end: {now:?}"));
                }
                let before = self.seen.insert((at, place.clone()), now);
                if let Some(before) = before.filter(|was| (was.run, was.replica) == (run, replica))
                {
                    let fell = before.epoch > now.epoch
                        || before.log_start > now.log_start
                        || before.committed > now.committed;
                    if fell {
                        say(format!("went back from {before:?} to {now:?}"));
                    }
                }
                if !local.serves {
                    continue;
                }
                let key = (place.clone(), now.epoch);
                if let Some(other) = self.leaders.get(&key) {
                    if *other != local.replica {
                        say(format!(
                            "two leaders in epoch {}: {other} and {}",
                            now.epoch, local.replica
                        ));
                    }
                } else {
                    self.leaders.insert(key.clone(), local.replica);
                    let newest = self.newest.entry(place.clone()).or_default();
                    self.leader_changes += u64::from(*newest > 0 && now.epoch > *newest);
                    *newest = (*newest).max(now.epoch);
                    let topic = world
                        .plan
                        .topics
                        .iter()
                        .position(|topic| topic.name == place.0);
                    if let Some(recorder) = topic.and_then(|at| recorders.get(at)) {
                        recorder.leader_seen(place.1, now.epoch, broker.id().0);
                    }
                }
                let Some(high) = local.high_watermark.map(|offset| offset.0) else {
                    continue;
                };
                if high > now.committed {
                    say(format!(
                        "lets read up to {high}, beyond what is committed: {now:?}"
                    ));
                }
                let known = self.watermarks.entry(key).or_default();
                if high < *known {
                    say(format!(
                        "the watermark fell from {known} to {high} in epoch {}",
                        now.epoch
                    ));
                }
                *known = (*known).max(high);
            }
        }
        wrong
    }
}
