//! What must hold in every state, and what must be possible.
//!
//! Owns the search that answers "can these replicas, alone, elect a leader and commit a record?", and remembers its answers.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use crate::parts::{
    Id, Log, Mutation, Node, PROBE, Reign, Role, Rules, State, Step, WITNESS, peer,
};

/// Terms beyond those in use that a search for a recovery may go.
const MORE_TERMS: u8 = 2;

/// No two replicas that agree about an entry's id disagree about what comes before it.
pub(crate) fn logs_match(state: &State) -> bool {
    let [a, b, witness] = state.nodes;
    let agree = |one: Node, other: Node| {
        let same = one.log.common(other.log);
        let shorter = one.log.len().min(other.log.len());
        // Equal ids behind a difference.
        let later = (same..shorter).any(|index| one.log.term_at(index) == other.log.term_at(index));
        !later
    };
    let same = a.log.common(b.log);
    agree(a, b)
        && agree(a, witness)
        && agree(b, witness)
        && a.log.prefix(same) == b.log.prefix(same)
}

/// Whoever leads a later term has everything that was ever committed.
pub(crate) fn leaders_are_complete(state: &State) -> bool {
    state.nodes.iter().all(|node| {
        node.role != Role::Leader
            || node.term < state.committed_in
            || node.log.starts_with(state.committed)
    })
}

/// Whether the first `synced` entries of a replica have everything acknowledged.
fn has_acknowledged(state: &State, id: Id) -> bool {
    let node = state.node(id);
    node.log.prefix(node.synced).starts_with(state.acked)
}

/// The newest leader has everything acknowledged on its disk, and so has the other data replica while it is published as in
/// sync.
pub(crate) fn acknowledged_is_durable(state: &State) -> bool {
    state.newest().is_none_or(|reign| {
        has_acknowledged(state, reign.leader)
            && (!reign.in_sync || has_acknowledged(state, peer(reign.leader)))
    })
}

/// Whether a record is acknowledged and both data replicas are in sync.
pub(crate) fn is_in_health(state: &State) -> bool {
    state.newest().is_some_and(|reign| reign.in_sync) && state.acked.holds_value(1)
}

/// Whether the data replicas hold different entries at the same place.
pub(crate) fn logs_differ(state: &State) -> bool {
    let [a, b, _] = state.nodes;
    a.log.common(b.log) < a.log.len().min(b.log.len())
}

/// The witness follows, and keeps no record.
pub(crate) fn witness_only_votes(state: &State) -> bool {
    state.node(WITNESS).role == Role::Follower
        && state.node(WITNESS).log == state.node(WITNESS).log.ids()
}

fn alone(first: Id, second: Id) -> [bool; 3] {
    let mut alive = [false; 3];
    alive[usize::from(first)] = true;
    alive[usize::from(second)] = true;
    alive
}

/// Answers of [`recovers`], which depend on little of a state.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    answers: Mutex<HashMap<(State, [bool; 3]), bool>>,
}

impl Memory {
    pub(crate) fn searches(&self) -> usize {
        self.answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Whether the replicas of `alive`, after those of `restarted` have crashed and come back, can elect a leader and commit
    /// a record by themselves, while the others are gone for good and nothing that they have sent arrives any more.
    pub(crate) fn recovers(
        &self,
        rules: &Rules,
        state: &State,
        alive: [bool; 3],
        restarted: [bool; 3],
    ) -> bool {
        let mut start = state.clone();
        for node in 0..3 {
            if alive[usize::from(node)] && restarted[usize::from(node)] {
                start.take(rules, Step::Restart { node });
            }
        }
        reduce(&mut start, alive);
        let key = (start, alive);
        let known = self
            .answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .copied();
        known.unwrap_or_else(|| {
            let answer = search(rules, &key.0, alive);
            self.answers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(key, answer);
            answer
        })
    }
}

/// Leaves of `state` what a recovery by the replicas of `alive` depends on.
fn reduce(state: &mut State, alive: [bool; 3]) {
    let is_up = |id: Id| alive[usize::from(id)];
    for id in 0..3 {
        let node = &mut state.nodes[usize::from(id)];
        if is_up(id) {
            // What a record says does not matter.
            node.log = node.log.ids();
            if node.role == Role::Candidate {
                node.role = Role::Follower;
            }
            node.voted_for = None;
        } else {
            *node = Node::default();
        }
    }
    state.reigns.retain(|reign| is_up(reign.leader));
    state.calls.clear();
    for reign in &mut state.reigns {
        reign.log = reign.log.ids();
        for id in 0..3 {
            if !is_up(id) {
                reign.confirmed[usize::from(id)] = 0;
            }
        }
    }
    state.proposed = 0;
    reduce_memory(state);
}

/// Searches depth first, the promising steps first.
fn search(rules: &Rules, start: &State, alive: [bool; 3]) -> bool {
    let newest = start.nodes.iter().map(|node| node.term).max().unwrap_or(0);
    let mut mutations = rules.mutations.clone();
    // What a crash destroys it has destroyed before the search.
    mutations.retain(|mutation| {
        !matches!(
            mutation,
            Mutation::VoteNotPersisted | Mutation::WitnessWiped
        )
    });
    let rules = Rules {
        terms: newest + MORE_TERMS,
        records: 0,
        mutations,
        exact: false,
    };
    let mut seen = HashSet::from([start.clone()]);
    let mut open = vec![start.clone()];
    let mut steps = Vec::new();
    while let Some(state) = open.pop() {
        let leaders = (0..2).filter_map(|node| state.reign(node));
        let committed = |reign: &Reign| {
            reign
                .log
                .prefix(state.commit(&rules, reign))
                .holds_value(PROBE)
        };
        if leaders.clone().any(committed) {
            return true;
        }
        let without = |reign: &&Reign| !reign.log.holds_value(PROBE);
        let proposers: Vec<Id> = leaders.filter(without).map(|reign| reign.leader).collect();
        steps.clear();
        state.steps(&rules, alive, &mut steps);
        steps.retain(|step| promise(*step) > 0);
        steps.sort_by_key(|step| promise(*step));
        let mut next: Vec<State> = Vec::new();
        for step in &steps {
            let mut after = state.clone();
            after.take(&rules, *step);
            next.push(after);
        }
        for node in proposers {
            let mut after = state.clone();
            after.append(node, PROBE);
            next.push(after);
        }
        for mut after in next {
            reduce_memory(&mut after);
            if seen.insert(after.clone()) {
                open.push(after);
            }
        }
    }
    false
}

/// Leaves out what only the claims read.
fn reduce_memory(state: &mut State) {
    state.committed = Log::default();
    state.committed_in = 0;
    state.led = 0;
    state.acked = Log::default();
    state.breach = None;
}

/// How soon a step should be tried; 0 for one that no recovery needs.
fn promise(step: Step) -> u8 {
    match step {
        Step::Close { .. } | Step::JoinIsr { .. } | Step::Look { .. } | Step::Propose { .. } => 0,
        Step::Restart { .. } => 1,
        Step::Stand { .. } | Step::Elect { .. } => 2,
        Step::Arrive { .. } => 3,
        Step::Lift { .. } | Step::LeaveIsr { .. } => 4,
        Step::Grant { .. } => 5,
        Step::Sync { .. } => 6,
        Step::Hear { .. } | Step::Lead { .. } => 7,
    }
}

/// One replica of two dies and the rest goes on: the claims about who can.
impl Memory {
    /// The newest leader dies while the other data replica is in sync: that one and the witness go on, crashes or not.
    pub(crate) fn survives_the_leader(&self, rules: &Rules, state: &State) -> bool {
        state
            .newest()
            .filter(|reign| reign.in_sync)
            .is_none_or(|reign| {
                let follower = peer(reign.leader);
                let rest = alone(follower, WITNESS);
                self.recovers(rules, state, rest, [false; 3])
                    && self.recovers(rules, state, rest, [true; 3])
            })
    }

    /// The other data replica dies: the newest leader and the witness go on, and do so as well when the leader crashes and
    /// comes back.
    pub(crate) fn survives_the_follower(&self, rules: &Rules, state: &State) -> bool {
        state.newest().is_none_or(|reign| {
            let rest = alone(reign.leader, WITNESS);
            self.recovers(rules, state, rest, [false; 3])
                && self.recovers(rules, state, rest, [true; 3])
        })
    }

    /// The witness dies: two data replicas go on.
    pub(crate) fn survives_the_witness(&self, rules: &Rules, state: &State) -> bool {
        self.recovers(rules, state, alone(0, 1), [true; 3])
    }

    /// All crash at once and all come back.
    pub(crate) fn survives_a_crash_of_all(&self, rules: &Rules, state: &State) -> bool {
        self.recovers(rules, state, [true; 3], [true; 3])
    }

    /// The newest leader is away, the other data replica lacks something acknowledged: it and the witness refuse.
    pub(crate) fn refuses(&self, rules: &Rules, state: &State) -> bool {
        !lacks_acknowledged(state)
            || state.newest().is_none_or(|reign| {
                !self.recovers(rules, state, alone(peer(reign.leader), WITNESS), [false; 3])
            })
    }
}

/// Whether the data replica that does not lead lacks something acknowledged.
pub(crate) fn lacks_acknowledged(state: &State) -> bool {
    state.newest().is_some_and(|reign| {
        let follower = state.node(peer(reign.leader));
        !follower.log.starts_with(state.acked)
    })
}

/// No term had two leaders, and no two histories were committed.
pub(crate) fn nothing_is_broken(state: &State) -> bool {
    state.breach.is_none()
}
