//! One run: a seed, a cluster, faults, healing, the judgement.
//!
//! Owns the order of the phases and their bounds in simulated time. Runs in a process of its own, see `main`.

use std::fmt::Write;
use std::sync::Mutex;
use std::time::Duration;

use logboom::runtime::sim::{self, Bug};
use logboom::testkit::checker::{Coverage, Verdict, check};

use crate::clients::Phase;
use crate::nemesis::Nemesis;
use crate::plan::Plan;
use crate::watch::Watch;
use crate::world::World;

/// How long a cluster may take to form and create its topics.
const SETUP_WITHIN: Duration = Duration::from_secs(60);
/// How long the clients may take from healing to the end.
const FINISH_WITHIN: Duration = Duration::from_secs(200);

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// What came of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    pub wrong: Vec<String>,
    /// What was broken and when, for a person.
    pub story: Vec<String>,
    /// Figures by name, to be added up over runs.
    pub figures: Vec<(String, u64)>,
}

/// The mistake that this run is to find.
fn bug() -> Option<Bug> {
    let name = std::env::var("BUG").ok()?;
    let found = Bug::ALL.into_iter().find(|bug| format!("{bug:?}") == name);
    assert!(found.is_some(), "no bug is called {name}");
    found
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Keeps every panic, wherever it is caught.
pub fn watch_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .push(panic.to_string());
        before(panic);
    }));
}

/// Runs `seed`.
pub fn run(seed: u64) -> Outcome {
    sim::seed(seed);
    sim::make(bug());
    let plan = Plan::of(seed);
    let mut outcome = Outcome::default();
    outcome.story.push(plan.to_string());
    let mut world = World::new(&plan);
    let mut watch = Watch::default();
    let mut nemesis = Nemesis::new(&world);
    let ended = drive(&mut world, &mut watch, &mut nemesis, &mut outcome);
    if let Err(error) = ended {
        outcome.wrong.push(error);
    }
    outcome.story.append(&mut nemesis.log);
    outcome.wrong.append(&mut world.control.borrow_mut().late);
    let panics = std::mem::take(
        &mut *PANICS
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner),
    );
    outcome
        .wrong
        .extend(panics.into_iter().map(|panic| format!("panic: {panic}")));
    judge(&world, &mut outcome);
    let mut figure = |name: &str, value: u64| outcome.figures.push((name.to_owned(), value));
    figure("leader_changes", watch.leader_changes);
    figure("simulated_ms", millis(world.now()));
    figure("settled_ms", millis(world.control.borrow().settled_after));
    for (kind, count) in &nemesis.counts {
        figure(&format!("fault.{kind}"), *count);
    }
    outcome
}

fn drive(
    world: &mut World,
    watch: &mut Watch,
    nemesis: &mut Nemesis,
    outcome: &mut Outcome,
) -> Result<(), String> {
    while world.control.borrow().phase == Phase::Setup {
        if world.now() > SETUP_WITHIN {
            return Err(format!("no topics {SETUP_WITHIN:?} after the start"));
        }
        world.step()?;
        outcome.wrong.extend(nemesis.operate(world));
    }
    *nemesis = Nemesis::new(world);
    while !nemesis.is_over(world) {
        world.step()?;
        let recorders = world.recorders.clone();
        outcome.wrong.extend(watch.look(world, &recorders));
        outcome.wrong.extend(nemesis.tick(world));
        if !outcome.wrong.is_empty() {
            return Ok(());
        }
    }
    nemesis.heal(world);
    let now = world.now();
    nemesis
        .log
        .push(format!("{:>8.3} s  healed", now.as_secs_f64()));
    world.control.borrow_mut().phase = Phase::Healed;
    loop {
        let over = world.step()?;
        let recorders = world.recorders.clone();
        outcome.wrong.extend(watch.look(world, &recorders));
        outcome.wrong.extend(nemesis.operate(world));
        if over || !outcome.wrong.is_empty() {
            return Ok(());
        }
        if world.now() > now + FINISH_WITHIN {
            return Err(format!(
                "the clients did not end {FINISH_WITHIN:?} after healing"
            ));
        }
    }
}

fn judge(world: &World, outcome: &mut Outcome) {
    let mut control = world.control.borrow_mut();
    let done = control.phase == Phase::Done;
    let mut logs = std::mem::take(&mut control.logs).into_iter();
    let mut dumps = std::mem::take(&mut control.dumps).into_iter();
    let mut totals = [("ok", 0), ("failed", 0), ("unknown", 0), ("found", 0)];
    for (topic, recorder) in world.plan.topics.iter().zip(&world.recorders) {
        let mut history = recorder.clone().finish();
        history.logs = logs.next().unwrap_or_default();
        history.dumps = dumps.next().unwrap_or_default();
        if let Ok(directory) = std::env::var("KEEP") {
            let path = format!("{directory}/seed-{}-{}.jsonl", world.plan.seed, topic.name);
            if let Ok(mut file) = std::fs::File::create(path) {
                history.write(&mut file).ok(); // for a person; the run is judged without it
            }
        }
        if !done {
            continue;
        }
        let coverage = Coverage {
            operations_min: 20,
            ..Coverage::default()
        };
        let report = check(&history, &coverage);
        let records: usize = history.logs.iter().map(|log| log.records.len()).sum();
        let found = [
            report.figures.ok,
            report.figures.failed,
            report.figures.unknown,
            records as u64,
        ];
        for ((_, total), more) in totals.iter_mut().zip(found) {
            *total += more;
        }
        if report.verdict != Verdict::Passed {
            let mut text = String::new();
            for anomaly in report.anomalies.iter().take(20) {
                write!(
                    text,
                    "\n    {:?} {}: {}",
                    anomaly.kind, anomaly.partition, anomaly.text
                )
                .ok();
                for line in &anomaly.witness {
                    write!(text, "\n        {line}").ok();
                }
            }
            let gaps = report.gaps.join("; ");
            let verdict = report.verdict;
            outcome
                .wrong
                .push(format!("topic {}: {verdict:?} {gaps}{text}", topic.name));
        }
    }
    for (name, total) in totals {
        outcome.figures.push((name.to_owned(), total));
    }
}
