//! What of a cluster is broken at the moment, told to the record of the run.
//!
//! Owns which faults are open. Breaks nothing itself.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::testkit::recorder::{FaultId, Recorder};

#[derive(Debug, Default)]
struct State {
    recorder: Option<Recorder>,
    open: BTreeMap<(&'static str, String), FaultId>,
}

/// The open faults of a cluster, by kind and target.
#[derive(Debug, Default)]
pub(super) struct Faults {
    state: Mutex<State>,
}

impl Faults {
    fn with(&self, act: impl FnOnce(&Recorder, &mut BTreeMap<(&'static str, String), FaultId>)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { recorder, open } = &mut *state;
        if let Some(recorder) = recorder {
            act(recorder, open);
        }
    }

    /// Tells `recorder` of the faults that begin from now on.
    pub(super) fn record(&self, recorder: Recorder) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.recorder = Some(recorder);
        state.open.clear();
    }

    pub(super) fn began(&self, kind: &'static str, target: String) {
        self.with(|recorder, open| {
            let id = recorder.fault_began(kind, &target);
            if let Some(earlier) = open.insert((kind, target), id) {
                recorder.fault_ended(earlier);
            }
        });
    }

    pub(super) fn ended(&self, kind: &'static str, target: &str) {
        self.with(|recorder, open| {
            if let Some(id) = open.remove(&(kind, target.to_owned())) {
                recorder.fault_ended(id);
            }
        });
    }

    /// Ends all of one kind.
    pub(super) fn all_ended(&self, kind: &'static str) {
        self.with(|recorder, open| {
            open.retain(|(known, _), id| {
                let ends = *known == kind;
                if ends {
                    recorder.fault_ended(*id);
                }
                !ends
            });
        });
    }

    pub(super) fn leader_seen(&self, partition: u32, epoch: u64, broker: u32) {
        self.with(|recorder, _| recorder.leader_seen(partition, epoch, broker));
    }
}
