//! A model of two copies and a witness, explored exhaustively: every order of elections, messages, syncs, crashes, and moves
//! of the gate, up to a bound. [`protocol`] has the rules, [`claims`] what must hold; here is what is explored, and
//! the proof that the model can fail: rules left out one by one, each with the shortest way to the harm.
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test, and three replicas in arrays of three"
)]

mod claims;
mod parts;
mod protocol;

use std::fmt::Write as _;

use stateright::{Checker, HasDiscoveries, Model, Path, Property};
use tokio::time::Instant;

use claims::Memory;
use parts::{Mutation, Rules, State, Step};

/// Threads that explore.
const THREADS: usize = 2;

struct Witnessed {
    rules: Rules,
    /// Whether states that differ in the names of the data replicas only are one.
    symmetric: bool,
    memory: Memory,
}

impl Witnessed {
    fn new(rules: Rules, symmetric: bool) -> Self {
        Self {
            rules,
            symmetric,
            memory: Memory::default(),
        }
    }
}

impl Model for Witnessed {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::default()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        state.steps(&self.rules, [true; 3], actions);
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut next = last.clone();
        next.take(&self.rules, step);
        let next = if self.symmetric {
            next.representative()
        } else {
            next
        };
        (next != *last).then_some(next)
    }

    /// Terms bound the logs, unless terms are forgotten.
    fn within_boundary(&self, state: &State) -> bool {
        state.nodes.iter().all(|node| node.log.len() <= 8)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one leader in a term, one history committed", |_, state| {
                claims::nothing_is_broken(state)
            }),
            Property::always("logs match", |_, state| claims::logs_match(state)),
            Property::always("leaders have all that was committed", |_, state| {
                claims::leaders_are_complete(state)
            }),
            Property::always("the witness only votes", |_, state| {
                claims::witness_only_votes(state)
            }),
            Property::always(
                "what is acknowledged is on the leader's disk, and on the other one's while that is in sync",
                |_, state| claims::acknowledged_is_durable(state),
            ),
            Property::always("an in-sync follower takes over", |model: &Self, state| {
                model.memory.survives_the_leader(&model.rules, state)
            }),
            Property::always(
                "the leader goes on alone with the witness, even after a crash",
                |model: &Self, state| model.memory.survives_the_follower(&model.rules, state),
            ),
            Property::always(
                "the data replicas go on without the witness",
                |model: &Self, state| model.memory.survives_the_witness(&model.rules, state),
            ),
            Property::always(
                "all come back from a crash of all",
                |model: &Self, state| model.memory.survives_a_crash_of_all(&model.rules, state),
            ),
            Property::always(
                "a follower that lacks something acknowledged never takes over",
                |model: &Self, state| model.memory.refuses(&model.rules, state),
            ),
            Property::sometimes(REFUSAL, |model: &Self, state| {
                claims::lacks_acknowledged(state) && model.memory.refuses(&model.rules, state)
            }),
            Property::sometimes(HEALTH, |_, state| claims::is_in_health(state)),
            Property::sometimes(DIVERGENCE, |_, state| claims::logs_differ(state)),
        ]
    }
}

/// What must be reached, or the exploration has not seen what it is for.
const REFUSAL: &str = "the only complete copy is away, and the rest refuses";
const HEALTH: &str = "a record is acknowledged and both copies are in sync";
const DIVERGENCE: &str = "the data replicas' logs have parted";

/// Explores everything within `rules`; fails with the way to the first claim that does not hold.
fn explore(name: &str, rules: Rules) {
    let began = Instant::now();
    let bounds = format!("{} terms, {} records", rules.terms, rules.records);
    let checker = Witnessed::new(rules, true)
        .checker()
        .threads(THREADS)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!(
        "{name}, {bounds}: {} states, {} steps, at most {} deep, {} recoveries searched, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        checker.model().memory.searches(),
        began.elapsed().as_secs_f64(),
    );
    let mut discoveries = checker.discoveries();
    for wanted in [REFUSAL, HEALTH, DIVERGENCE] {
        assert!(discoveries.remove(wanted).is_some(), "never seen: {wanted}");
    }
    if let Some((claim, path)) = discoveries.into_iter().next() {
        panic!("does not hold: {claim}\n{}", told(path));
    }
}

/// A path as lines that a person can follow.
fn told(path: Path<State, Step>) -> String {
    let mut text = String::new();
    let steps = path.into_vec();
    for (state, step) in &steps {
        if let Some(step) = step {
            writeln!(text, "  {step}").ok();
        } else {
            writeln!(text, "  ends with {state:#?}").ok();
        }
    }
    text
}

/// Goal: safety and availability as promised, for every order of everything up to the bounds. Method: breadth first over all
/// states; steps whose order cannot matter are taken at once, and the two data replicas are interchangeable.
/// `MODEL_TERMS` and `MODEL_RECORDS` move the bounds.
#[test]
fn two_copies_and_a_witness_keep_every_promise() {
    let bound = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let bounds = match (bound("MODEL_TERMS"), bound("MODEL_RECORDS")) {
        (None, None) => vec![(4, 1), (3, 2)],
        (terms, records) => vec![(terms.unwrap_or(4), records.unwrap_or(2))],
    };
    for (terms, records) in bounds {
        let rules = Rules {
            terms,
            records,
            ..Rules::default()
        };
        explore("in short", rules);
    }
}

/// Goal: nothing is missed by taking steps at once. Method: smaller bounds, every vote request, late message and confirmation
/// a step of its own.
#[test]
fn the_same_holds_with_every_message_on_its_own() {
    let rules = Rules {
        terms: 2,
        records: 2,
        exact: true,
        ..Rules::default()
    };
    explore("every message", rules);
}

/// Goal: each rule is needed, and the claims see its absence. Method: the rules left out one by one; for each the claims that
/// may fail first, and the shortest way there, which is printed.
#[test]
fn every_rule_left_out_does_harm() {
    use Mutation as M;
    let takes_over = "an in-sync follower takes over";
    let goes_on = "the leader goes on alone with the witness, even after a crash";
    let durable = "what is acknowledged is on the leader's disk, and on the other one's while that is in sync";
    let complete = "leaders have all that was committed";
    let once = "one leader in a term, one history committed";
    let refuses = "a follower that lacks something acknowledged never takes over";
    let cases: [(&[Mutation], &[&str]); 11] = [
        (&[M::NoGate], &[takes_over, durable]),
        (&[M::LiftBeforeLeaving], &[takes_over, durable]),
        (&[M::WitnessOneAhead], &[takes_over, durable]),
        (&[M::RejoinByAnOldLook], &[takes_over, durable]),
        (&[M::FeedUnsynced], &[goes_on]),
        (
            &[M::FeedUnsynced, M::AckWithoutOwnSync],
            &[durable, goes_on],
        ),
        (&[M::CountUnsynced], &[durable, once, complete]),
        (&[M::WitnessStands], &["the witness only votes", goes_on]),
        (&[M::VoteNotPersisted], &[once, complete]),
        (&[M::VoteBlindly], &[refuses, complete, once]),
        (&[M::WitnessWiped], &[refuses, complete, once, takes_over]),
    ];
    for (mutations, expected) in cases {
        let rules = Rules {
            terms: 2,
            records: 2,
            mutations: mutations.to_vec(),
            exact: true,
        };
        // One thread, so that the way found is a shortest one.
        let checker = Witnessed::new(rules, false)
            .checker()
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let mut discoveries = checker.discoveries();
        for wanted in [REFUSAL, HEALTH, DIVERGENCE] {
            discoveries.remove(wanted);
        }
        let found = discoveries.into_iter().next();
        let (claim, path) = found.unwrap_or_else(|| panic!("{mutations:?} does no harm"));
        println!(
            "{mutations:?}: \"{claim}\" fails after {} states\n{}",
            checker.unique_state_count(),
            told(path)
        );
        assert!(expected.contains(&claim), "{mutations:?}: {claim}");
    }
}

/// Goal: with the witness fed only what the leader has synced, nothing is committed without the leader's own disk. Method: the
/// rule that an acknowledgement waits for that disk is left out, and all holds.
#[test]
fn the_gate_alone_makes_commits_wait_for_the_leaders_disk() {
    let rules = Rules {
        terms: 2,
        records: 2,
        mutations: vec![Mutation::AckWithoutOwnSync],
        exact: false,
    };
    explore("acknowledged as soon as committed", rules);
}
