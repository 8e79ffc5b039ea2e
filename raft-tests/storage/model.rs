//! The store against an executable model: any sequence of calls and crashes, over both disks.
//!
//! The model keeps the state after every frame the store may write. After a crash the store must equal one of those
//! states, all groups at the same one, and not an older one than the newest acknowledged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::FutureExt;
use logboom::storage::{Checkpoint, LogEntry, Store};
use logboom::types::{EntryId, GroupId, LogIndex};
use proptest::prelude::*;

use crate::support::*;

#[derive(Debug, Clone, PartialEq, Default)]
struct GroupModel {
    replica: u32,
    purged: Option<EntryId>,
    entries: BTreeMap<u64, LogEntry>,
    vote: Option<Bytes>,
    base: Option<Checkpoint>,
}

impl GroupModel {
    fn last(&self) -> Option<EntryId> {
        self.entries
            .values()
            .next_back()
            .map(|entry| entry.id)
            .or(self.purged)
    }

    fn next(&self) -> u64 {
        self.last().map_or(0, |last| last.index.0 + 1)
    }

    fn epoch(&self) -> u64 {
        self.last().map_or(1, |last| last.epoch.0)
    }
}

type Model = BTreeMap<u64, GroupModel>;

#[derive(Debug, Clone)]
enum Op {
    Append {
        group: u64,
        count: u64,
        size: usize,
        newer: bool,
    },
    Truncate {
        group: u64,
        back: u64,
    },
    Purge {
        group: u64,
        ahead: u64,
    },
    Vote {
        group: u64,
        wait: bool,
    },
    Checkpoint {
        group: u64,
        back: u64,
    },
    Base {
        group: u64,
        ahead: u64,
        replace: bool,
    },
    Remove {
        group: u64,
    },
    Check {
        group: u64,
    },
    Crash {
        seed: u64,
        tear: bool,
        sudden: bool,
        lose_catalog: bool,
    },
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let group = 0..4_u64;
    prop_oneof![
        8 => (group.clone(), 1..40_u64, prop_oneof![0..100_usize, 500..3000_usize], any::<bool>())
            .prop_map(|(group, count, size, newer)| Op::Append { group, count, size, newer }),
        2 => (group.clone(), 0..80_u64).prop_map(|(group, back)| Op::Truncate { group, back }),
        3 => (group.clone(), 0..60_u64).prop_map(|(group, ahead)| Op::Purge { group, ahead }),
        3 => (group.clone(), any::<bool>()).prop_map(|(group, wait)| Op::Vote { group, wait }),
        2 => (group.clone(), 0..5_u64).prop_map(|(group, back)| Op::Checkpoint { group, back }),
        1 => (group.clone(), 0..60_u64, any::<bool>())
            .prop_map(|(group, ahead, replace)| Op::Base { group, ahead, replace }),
        1 => group.clone().prop_map(|group| Op::Remove { group }),
        3 => group.prop_map(|group| Op::Check { group }),
        3 => (any::<u64>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.2)).prop_map(
            |(seed, tear, sudden, lose_catalog)| Op::Crash { seed, tear, sudden, lose_catalog }
        ),
        1 => Just(Op::Reopen),
    ]
}

struct Run<'a> {
    place: &'a Place,
    store: Store,
    /// The state after each frame, oldest first.
    history: Vec<Model>,
    /// The newest state known durable.
    acked: Arc<AtomicUsize>,
    /// Checkpoints that may be found, newest last, per group.
    checkpoints: BTreeMap<u64, Vec<(Checkpoint, u64)>>,
    replicas: u32,
    payloads: u64,
}

impl Run<'_> {
    fn now(&self) -> Model {
        self.history.last().unwrap().clone()
    }

    fn step(&mut self, change: impl FnOnce(&mut Model)) {
        let mut model = self.now();
        change(&mut model);
        self.history.push(model);
    }

    /// Everything so far is known durable.
    fn ack(&self) {
        self.acked
            .fetch_max(self.history.len() - 1, Ordering::AcqRel);
    }

    fn log(&mut self, id: u64) -> logboom::storage::GroupStore {
        let known = self.now().get(&id).map(|group| group.replica);
        let epoch = known.unwrap_or_else(|| {
            self.replicas += 1;
            let epoch = self.replicas;
            self.step(|model| {
                drop(model.insert(
                    id,
                    GroupModel {
                        replica: epoch,
                        ..GroupModel::default()
                    },
                ));
            });
            epoch
        });
        self.store.group(GroupId(id), replica(epoch)).unwrap()
    }

    async fn apply(&mut self, op: Op) {
        match op {
            Op::Append {
                group,
                count,
                size,
                newer,
            } => {
                let log = self.log(group);
                let model = self.now()[&group].clone();
                let epoch = model.epoch() + u64::from(newer);
                let mut entries = Vec::new();
                for index in model.next()..model.next() + count {
                    self.payloads += 1;
                    let entry = entry(epoch, index, payload(group, self.payloads, index, size));
                    entries.push(entry.clone());
                    self.step(|model| {
                        drop(model.get_mut(&group).unwrap().entries.insert(index, entry));
                    });
                }
                let (acked, at) = (self.acked.clone(), self.history.len() - 1);
                let flushed = move || {
                    acked.fetch_max(at, Ordering::AcqRel);
                };
                log.append(entries, Box::new(flushed)).unwrap();
            }
            Op::Truncate { group, back } => {
                let log = self.log(group);
                let next = self.now()[&group].next().saturating_sub(back);
                log.truncate_after(next.checked_sub(1).map(LogIndex))
                    .unwrap();
                self.step(|model| drop(model.get_mut(&group).unwrap().entries.split_off(&next)));
                // A checkpoint dropped with its entries may be back after a crash, when they are.
            }
            Op::Purge { group, ahead } => {
                let log = self.log(group);
                let model = self.now()[&group].clone();
                let first = model.purged.map_or(0, |purged| purged.index.0 + 1);
                let index = first + ahead;
                let epoch = model
                    .entries
                    .get(&index)
                    .map_or(model.epoch(), |entry| entry.id.epoch.0);
                log.purge(id(epoch, index)).unwrap();
                self.step(|model| {
                    let group = model.get_mut(&group).unwrap();
                    group.purged = Some(id(epoch, index));
                    group.entries = group.entries.split_off(&(index + 1));
                });
            }
            Op::Vote { group, wait } => {
                let log = self.log(group);
                let vote = Bytes::from(format!("vote {}", self.history.len()));
                self.step(|model| model.get_mut(&group).unwrap().vote = Some(vote.clone()));
                if wait {
                    log.save_vote(vote).await.unwrap();
                    self.ack();
                } else if log.save_vote(vote).now_or_never().is_some() {
                    self.ack();
                }
            }
            Op::Checkpoint { group, back } => {
                let log = self.log(group);
                let model = self.now()[&group].clone();
                let Some((_, entry)) = model
                    .entries
                    .iter()
                    .rev()
                    .nth(usize::try_from(back).unwrap())
                else {
                    return;
                };
                let number = self.history.len() as u64;
                let state =
                    format!("state {number} ").repeat(usize::try_from(number % 700).unwrap());
                let checkpoint = checkpoint(entry.id.epoch.0, entry.id.index.0, &state);
                if log
                    .newest_checkpoint()
                    .is_some_and(|known| known.id.index >= checkpoint.id.index)
                {
                    return;
                }
                let blocks = vec![(entry.id.index.0, Bytes::from(format!("block {number}")))];
                log.save_checkpoint(checkpoint.clone(), blocks).unwrap();
                assert_eq!(log.newest_checkpoint(), Some(checkpoint.clone()));
                self.checkpoints
                    .entry(group)
                    .or_default()
                    .push((checkpoint, number));
            }
            Op::Base {
                group,
                ahead,
                replace,
            } => {
                let log = self.log(group);
                let model = self.now()[&group].clone();
                let first = model.purged.map_or(0, |purged| purged.index.0 + 1);
                let base = checkpoint(
                    model.epoch(),
                    first + ahead,
                    &format!("base {}", self.history.len()),
                );
                if model
                    .base
                    .is_some_and(|known| known.id.index >= base.id.index)
                {
                    return;
                }
                self.step(|model| model.get_mut(&group).unwrap().base = Some(base.clone()));
                log.save_base(base.clone(), replace).await.unwrap();
                self.ack();
                let kept = self.checkpoints.entry(group).or_default();
                kept.retain(|(checkpoint, _)| !replace && checkpoint.id.index > base.id.index);
            }
            Op::Remove { group } => {
                if !self.now().contains_key(&group) {
                    self.store.remove_group(GroupId(group)).await.unwrap();
                    return;
                }
                self.step(|model| drop(model.remove(&group)));
                self.store.remove_group(GroupId(group)).await.unwrap();
                self.ack();
                self.checkpoints.remove(&group);
            }
            Op::Check { group } => {
                let log = self.log(group);
                let model = self.now()[&group].clone();
                assert_eq!(observe(&log, model.replica).await, model);
                self.check_checkpoint(group, &log);
            }
            Op::Crash {
                seed,
                tear,
                sudden,
                lose_catalog,
            } => {
                if let Place::Memory(disk) = self.place {
                    if sudden {
                        disk.crash(seed, tear);
                        self.store.abandon();
                    } else {
                        self.store.abandon();
                        disk.crash(seed, tear);
                    }
                    if lose_catalog {
                        disk.lose_catalog();
                    }
                } else {
                    self.store.abandon();
                    if lose_catalog {
                        std::fs::remove_dir_all(self.place.path().join("catalog")).unwrap();
                    }
                }
                self.store = reopen(self.place);
                self.compare(self.acked.load(Ordering::Acquire)).await;
            }
            Op::Reopen => {
                self.store.close().await.unwrap();
                self.store = reopen(self.place);
                self.compare(self.history.len() - 1).await;
            }
        }
    }

    /// The store equals a state not older than `least`; go on from there.
    async fn compare(&mut self, least: usize) {
        let mut found = Model::new();
        for (id, owner) in self.store.groups() {
            let log = self.store.group(id, owner).unwrap();
            found.insert(id.0, observe(&log, owner.epoch()).await);
        }
        let at = self.history.iter().rposition(|model| *model == found);
        let at = at.unwrap_or_else(|| panic!("found a state that never was: {found:?}"));
        assert!(
            at >= least,
            "state {at} found, but {least} was acknowledged"
        );
        self.history = vec![found];
        self.acked = Arc::new(AtomicUsize::new(0));
        let ids: Vec<u64> = self.now().keys().copied().collect();
        for id in ids {
            let log = self.log(id);
            self.check_checkpoint(id, &log);
            let newest = log
                .newest_checkpoint()
                .map_or(0, |newest| newest.id.index.0 + 1);
            let kept = self.checkpoints.entry(id).or_default();
            kept.retain(|(checkpoint, _)| checkpoint.id.index.0 < newest);
        }
    }

    /// The newest checkpoint is the base or one that was saved, with its block, and not ahead of the log.
    fn check_checkpoint(&self, group: u64, log: &logboom::storage::GroupStore) {
        let model = &self.history.last().unwrap()[&group];
        let Some(newest) = log.newest_checkpoint() else {
            assert_eq!(model.base, None);
            return;
        };
        if model.base.as_ref() == Some(&newest) {
            return;
        }
        let saved = self
            .checkpoints
            .get(&group)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let (_, number) = saved
            .iter()
            .rev()
            .find(|(saved, _)| *saved == newest)
            .expect("a saved checkpoint");
        assert!(
            model
                .last()
                .is_some_and(|last| last.index >= newest.id.index),
            "ahead of the log"
        );
        let key = newest.id.index.0;
        let block = Bytes::from(format!("block {number}"));
        assert_eq!(
            log.block_at_or_below(key).unwrap(),
            Some((key, block.clone()))
        );
        if let Some(before) = key.checked_sub(1) {
            assert_eq!(log.block_above(before).unwrap(), Some((key, block)));
        }
    }
}

/// Segments so small that cleaning and deletion are always at work.
fn reopen(place: &Place) -> Store {
    let mut config = config(&place.path());
    config.segment_bytes = 3 << 10;
    place.open_with(&config).unwrap()
}

async fn observe(log: &logboom::storage::GroupStore, replica: u32) -> GroupModel {
    let state = log.state();
    let entries = read_all(log).await.unwrap();
    let entries: BTreeMap<u64, LogEntry> = entries
        .into_iter()
        .map(|entry| (entry.id.index.0, entry))
        .collect();
    let model = GroupModel {
        replica,
        purged: state.purged,
        entries,
        vote: state.vote,
        base: log.base(),
    };
    assert_eq!(model.last(), state.last);
    model
}

fn run(place: &Place, ops: Vec<Op>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let mut run = Run {
            place,
            store: reopen(place),
            history: vec![Model::new()],
            acked: Arc::new(AtomicUsize::new(0)),
            checkpoints: BTreeMap::new(),
            replicas: 0,
            payloads: 0,
        };
        for op in ops {
            run.apply(op).await;
        }
        run.apply(Op::Reopen).await;
    });
}

fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|n| n.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(default),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(200))]

    /// Goal: after a loss of power at any point, torn or not, with or without the catalog, what was acknowledged is
    /// there and nothing that never was. Method: random calls and crashes against the model, on the memory disk.
    #[test]
    fn power_loss_keeps_what_was_acknowledged(ops in prop::collection::vec(op(), 1..60)) {
        run(&Place::Memory(logboom::storage::MemDisk::new()), ops);
    }
}

proptest! {
    #![proptest_config(cases(12))]

    /// Goal: the same calls on real files, where a crash is the death of the process. Method: as above.
    #[test]
    fn process_death_keeps_what_was_acknowledged(ops in prop::collection::vec(op(), 1..40)) {
        run(&Place::real(), ops);
    }
}
