//! Keeps what happens in a run while it happens: who asked what, what came of it, what was broken, who was seen to lead.
//!
//! Owns the growing [`History`], its bound, and the numbers that records carry as their values. Asks nothing itself: the
//! workload does, or a test that records its own calls. Knows no clock but the one it is given, so that it serves a simulation.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::history::{Call, FaultEvent, History, LeaderSeen, Operation, Outcome};
use crate::types::{self, Error};

/// Nanoseconds since the run began; never goes back.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Names an operation that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OperationId(usize);

/// Names a fault that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultId(usize);

/// How many operations came to which end so far. Those still open are in none of the three.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Done, as the answer says.
    pub ok: u64,
    /// Without effect, as the error says.
    pub failed: u64,
    /// Perhaps done.
    pub unknown: u64,
}

/// Keeps a run's history. Cheap to clone; all clones write the same one, from any thread.
#[derive(Clone)]
pub struct Recorder {
    clock: Clock,
    operations_max: usize,
    records_max: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    history: History,
    counts: Counts,
    /// Values drawn so far; the next one.
    values: u64,
    /// Records that the operations carry, sent or read.
    records: usize,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder")
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

impl Recorder {
    /// Most operations kept when nothing else is said: some 200 bytes each, and 16 for each record they carry; 1.3 GiB at most.
    pub const OPERATIONS_MAX: usize = 4_000_000;
    /// Records kept for each permitted operation, on average: 16 bytes each.
    const RECORDS_EACH: usize = 8;

    /// An empty record of a run whose time is `clock`'s.
    pub fn new(clock: Clock) -> Self {
        Self::bounded(clock, Self::OPERATIONS_MAX)
    }

    /// As [`Recorder::new`], for a run on tokio's clock that begins now.
    pub fn real() -> Self {
        let began = tokio::time::Instant::now();
        Self::new(Arc::new(move || {
            u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
        }))
    }

    /// As [`Recorder::new`], for at most `operations_max` operations that carry at most eight times as many records, sent or read:
    /// then [`Recorder::operation`] takes no more.
    pub fn bounded(clock: Clock, operations_max: usize) -> Self {
        Self {
            clock,
            operations_max,
            records_max: operations_max.saturating_mul(Self::RECORDS_EACH),
            state: Arc::default(),
        }
    }

    /// The run's time.
    pub fn now_ns(&self) -> u64 {
        (self.clock)()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws a value that no record of the run carries yet.
    pub fn value(&self) -> u64 {
        let mut state = self.lock();
        let value = state.values;
        state.values += 1;
        value
    }

    /// `session` asks `call` now. Until its answer is recorded it counts as never answered. `None`: the record is full, and the
    /// call must not be made.
    pub fn operation(&self, session: u32, partition: u32, call: Call) -> Option<OperationId> {
        let mut state = self.lock();
        let carried = match &call {
            Call::Append { values, .. } => values.len(),
            Call::Fetch { .. } | Call::LinearizableEnd | Call::End => 0,
        };
        let records = state.records.saturating_add(carried);
        let id = state.history.operations.len();
        if id >= self.operations_max || records > self.records_max {
            return None;
        }
        state.records = records;
        let operation = Operation {
            session,
            // Asked under the lock: the order of the list is that of the times.
            invoked_ns: self.now_ns(),
            completed_ns: None,
            partition,
            call,
            outcome: Outcome::Unknown {
                reason: "no answer".to_owned(),
            },
        };
        state.history.operations.push(operation);
        Some(OperationId(id))
    }

    /// The answer to `id` is there. Only the first answer counts. What is read beyond the bound on records is not kept: the
    /// operation then ends as unknown, which for a reading says nothing.
    pub fn completed(&self, id: OperationId, outcome: Outcome) {
        let now = self.now_ns();
        let mut state = self.lock();
        let carried = match &outcome {
            Outcome::Fetched { records, .. } => records.len(),
            _ => 0,
        };
        let outcome = if state.records.saturating_add(carried) > self.records_max {
            state.records = self.records_max;
            Outcome::Unknown {
                reason: "the record of the run is full".to_owned(),
            }
        } else {
            state.records += carried;
            outcome
        };
        let State {
            history, counts, ..
        } = &mut *state;
        let Some(operation) = history.operations.get_mut(id.0) else {
            return;
        };
        if operation.completed_ns.is_some() {
            return;
        }
        operation.completed_ns = Some(now);
        let count = match &outcome {
            Outcome::Appended { .. } | Outcome::Fetched { .. } | Outcome::End { .. } => {
                &mut counts.ok
            }
            Outcome::Failed { .. } => &mut counts.failed,
            Outcome::Unknown { .. } => &mut counts.unknown,
        };
        *count += 1;
        operation.outcome = outcome;
    }

    /// As [`Recorder::completed`], for an error of the client: what it says of the outcome is believed, and judged later.
    pub fn failed(&self, id: OperationId, error: &Error) {
        let reason = error.to_string();
        let outcome = match error.outcome() {
            types::Outcome::NotDone => Outcome::Failed { reason },
            types::Outcome::Unknown => Outcome::Unknown { reason },
        };
        self.completed(id, outcome);
    }

    /// Something is broken from now on.
    pub fn fault_began(&self, kind: &str, target: &str) -> FaultId {
        let began_ns = self.now_ns();
        let mut state = self.lock();
        let faults = &mut state.history.faults;
        faults.push(FaultEvent {
            kind: kind.to_owned(),
            target: target.to_owned(),
            began_ns,
            ended_ns: None,
        });
        FaultId(faults.len() - 1)
    }

    /// It is healed.
    pub fn fault_ended(&self, id: FaultId) {
        let now = self.now_ns();
        let mut state = self.lock();
        if let Some(fault) = state.history.faults.get_mut(id.0) {
            fault.ended_ns.get_or_insert(now);
        }
    }

    /// `broker` says that it leads `partition` in `epoch`. The same word again is not kept.
    pub fn leader_seen(&self, partition: u32, epoch: u64, broker: u32) {
        let at_ns = self.now_ns();
        let mut state = self.lock();
        let leaders = &mut state.history.leaders;
        let same = |seen: &&LeaderSeen| seen.partition == partition && seen.epoch == epoch;
        // Who asks again and again asks about the present: what it was told before stands near the end.
        if !leaders
            .iter()
            .rev()
            .filter(same)
            .any(|seen| seen.broker == broker)
        {
            leaders.push(LeaderSeen {
                at_ns,
                partition,
                epoch,
                broker,
            });
        }
    }

    /// How many operations came to which end so far.
    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// The history so far; the recorder and its clones begin again with an empty one, whose values go on where these ended.
    #[must_use]
    pub fn finish(self) -> History {
        let mut state = self.lock();
        let values = state.values;
        let taken = std::mem::take(&mut *state);
        state.values = values;
        taken.history
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::history::AckLevel;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn append(value: u64) -> Call {
        Call::Append {
            values: vec![value],
            producer: None,
            acks: AckLevel::All,
        }
    }

    fn ticking() -> Clock {
        let ticks = AtomicU64::new(0);
        Arc::new(move || ticks.fetch_add(1, Ordering::Relaxed))
    }

    /// Goal: what is recorded is what the errors say, and an operation without an answer stays open. Method: one of each kind, and
    /// a second answer to the first.
    #[test]
    fn outcomes_are_kept_as_the_errors_say() {
        let recorder = Recorder::new(ticking());
        let ids: Vec<OperationId> = (0..4)
            .map(|session| {
                let call = append(recorder.value());
                recorder.operation(session, 0, call).unwrap()
            })
            .collect();
        let done = Outcome::Appended {
            base: 0,
            epoch: 1,
            copies: 2,
        };
        recorder.completed(ids[0], done.clone());
        recorder.failed(ids[1], &Error::ShuttingDown);
        recorder.failed(ids[2], &Error::Timeout { after_ms: 1 });
        recorder.failed(ids[0], &Error::ShuttingDown);
        let counts = recorder.counts();
        assert_eq!((counts.ok, counts.failed, counts.unknown), (1, 1, 1));
        let operations = recorder.finish().operations;
        assert_eq!(operations[0].outcome, done);
        assert_eq!(operations[0].completed_ns, Some(4));
        assert!(matches!(operations[1].outcome, Outcome::Failed { .. }));
        assert!(matches!(operations[2].outcome, Outcome::Unknown { .. }));
        assert_eq!(operations[3].completed_ns, None);
        assert!(matches!(operations[3].outcome, Outcome::Unknown { .. }));
    }

    /// Goal: the bound holds, and nothing that is not recorded is asked. Method: two operations at most; a reading too large.
    #[test]
    fn nothing_is_recorded_beyond_the_bound() {
        let recorder = Recorder::bounded(ticking(), 2);
        let fetch = Call::Fetch { from: 0 };
        let first = recorder.operation(0, 0, fetch).unwrap();
        assert!(recorder.operation(0, 0, append(0)).is_some());
        assert!(recorder.operation(0, 0, append(1)).is_none());
        let records: Vec<(u64, u64)> = (0..17).map(|at| (at, at)).collect();
        recorder.completed(
            first,
            Outcome::Fetched {
                log_start: 0,
                high_watermark: 17,
                epoch: None,
                records,
            },
        );
        let operations = recorder.finish().operations;
        assert!(matches!(operations[0].outcome, Outcome::Unknown { .. }));
    }

    /// Goal: faults and leaders are kept once, with their times. Method: one fault that ends twice, one leader seen twice.
    #[test]
    fn faults_and_leaders_are_kept_once() {
        let recorder = Recorder::new(ticking());
        let fault = recorder.fault_began("kill", "broker 1");
        recorder.leader_seen(0, 1, 1);
        recorder.leader_seen(0, 1, 1);
        recorder.leader_seen(0, 1, 2);
        recorder.fault_ended(fault);
        recorder.fault_ended(fault);
        let history = recorder.clone().finish();
        assert_eq!(history.faults.len(), 1);
        assert_eq!(history.faults[0].ended_ns, Some(4));
        assert_eq!(history.leaders.len(), 2);
        assert_eq!(recorder.finish(), History::default());
    }
}
