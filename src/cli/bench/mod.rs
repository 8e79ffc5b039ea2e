//! `logboom bench`: loads a cluster, measures it, and reads back what was acknowledged.
//!
//! Owns the runs from their directory to the exit code: 0 done, 1 something could not be done or an acknowledged record is not as it
//! should be, 2 wrong usage. What is asked for is `settings`', what clients do `load`'s, whether the log holds it `verify`'s.

mod figures;
mod idle;
mod kills;
mod load;
mod machine;
mod pace;
mod plot;
mod report;
mod settings;
mod stage;
mod verify;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::StreamExt;
use logboom::client::{Client, Consumer, From, NewTopic, Partitions, Until};
use logboom::runtime::random_seed;
use logboom::types::BrokerId;
use tokio::time::Instant;

use self::figures::{Figures, Latencies, as_figure};
use self::kills::{Kills, Lookout};
use self::load::{Plan, Recording, STEP, Window};
use self::machine::Machine;
use self::pace::Timetable;
use self::report::{Outcome, Report};
pub(super) use self::settings::BenchArgs;
use self::settings::{Job, Settings, Workload};
use self::stage::Stage;
use self::verify::Filler;
use super::directory::Directory;
use super::progress::Line;
use super::{asked_to_stop, output};

/// Between two looks at a run.
const LOOK: Duration = Duration::from_millis(100);
/// The longest that a run without a fixed length is measured.
const NO_END: Duration = Duration::from_secs(24 * 60 * 60);
/// Of own brokers, the one that leads everything when several partitions lose their leader at once.
const FIRST: BrokerId = BrokerId(1);

pub(super) async fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    let settings = Settings::of(&args)?;
    let directory = Directory::make("bench", args.data.as_deref())?;
    let mut stage = Stage::new(
        settings.brokers,
        settings.named.clone(),
        &directory.path,
        settings.patience,
    );
    let result = tokio::select! {
        biased;
        stop = asked_to_stop() => stop.and_then(|()| anyhow::bail!("interrupted")),
        result = Box::pin(all(&settings, &mut stage, &directory.path)) => result.map_err(|error| {
            if settings.named.is_some() {
                return error;
            }
            error.context(format!("the bench failed ({})", directory.keep()))
        }),
    };
    stage.kill().await;
    let reports = result?;
    if let Some(path) = &args.plot {
        let picture = plot::draw(&reports);
        fs::write(path, picture).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        match output::json(&report::json(&reports)) {
            // The verdict does not depend on who reads it.
            Err(error) if !output::is_closed(&error) => return Err(error),
            _ => {}
        }
    }
    for report in &reports {
        if let Some(problem) = report.verdict().problem() {
            let workload = report.workload;
            let kept = if settings.named.is_some() {
                "the topic is kept".to_owned()
            } else {
                directory.keep()
            };
            anyhow::bail!("{workload}: {problem} ({kept})");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Every workload, one after the other; ends early when one has lost something.
async fn all(
    settings: &Settings,
    stage: &mut Stage,
    directory: &Path,
) -> anyhow::Result<Vec<Report>> {
    let mut line = Line::new();
    let mut reports = Vec::new();
    for job in &settings.jobs {
        let name = job.workload.name();
        line.say(&format!("{name}: measuring the machine"));
        let machine = Machine::measure(directory, settings.limits).await?;
        let mut runs = Vec::new();
        for run in 1..=settings.runs {
            let outcome = one(settings, job, run, stage, &mut line).await;
            let outcome = outcome.with_context(|| format!("{name}, run {run}"))?;
            let is_bad = outcome.verdict.is_some_and(|one| one.problem().is_some());
            runs.push(outcome);
            if is_bad {
                break;
            }
        }
        let report = finished(settings, job, stage.count, machine, runs);
        line.clear();
        match output::text(&report.text()) {
            Err(error) if !output::is_closed(&error) => return Err(error),
            _ => {}
        }
        let is_bad = report.verdict().problem().is_some();
        reports.push(report);
        if is_bad {
            break;
        }
    }
    Ok(reports)
}

fn finished(
    settings: &Settings,
    job: &Job,
    brokers: u32,
    machine: Machine,
    runs: Vec<Outcome>,
) -> Report {
    let mut notes = Vec::new();
    if settings.named.is_some() {
        notes.push("CPU and memory of the brokers are not known: they are not this program's children; the limits are those of the client's machine".to_owned());
    } else {
        notes.push(format!(
            "{brokers} brokers and the clients share this machine and its disk"
        ));
    }
    if cfg!(debug_assertions) {
        notes.push("this is a debug build: its figures say nothing".to_owned());
    }
    if job.workload == Workload::W6 {
        notes.push("what is read was written and read once just before, so it comes from memory as far as it fits there".to_owned());
    }
    let (acks, copies, least) = (job.acks, job.copies, job.min_insync_replicas);
    let promise = report::promise(acks, copies, least, brokers);
    Report {
        workload: job.workload.name(),
        title: job.title.clone(),
        promise: (job.workload != Workload::W5).then_some(promise),
        latency: job.latency(),
        settings: job.settings.clone(),
        machine,
        notes,
        runs,
    }
}

/// One run of a workload, on a cluster of its own unless one was named.
async fn one(
    settings: &Settings,
    job: &Job,
    run: u32,
    stage: &mut Stage,
    line: &mut Line,
) -> anyhow::Result<Outcome> {
    let name = job.workload.name().to_lowercase();
    let head = format!("{}: run {run} of {}", job.workload.name(), settings.runs);
    line.say(&format!("{head}: starting"));
    let run_name = format!("{name}-{}-{run}", job.partitions);
    let client = stage.open(&run_name).await?;
    let topic = if settings.named.is_some() {
        format!("bench-{name}-{:016x}", random_seed())
    } else {
        "bench".to_owned()
    };
    let mut bench = Bench {
        settings,
        job,
        stage,
        client,
        topic,
        head,
        line,
    };
    let outcome = if job.workload == Workload::W5 {
        bench.idle().await?
    } else {
        bench.load().await?
    };
    let is_good = outcome.verdict.is_none_or(|one| one.problem().is_none());
    if is_good {
        if settings.named.is_some() {
            bench.client.admin().delete_topic(&bench.topic).await?;
        }
        bench.stage.close().await;
    }
    Ok(outcome)
}

/// A run under way.
struct Bench<'a> {
    settings: &'a Settings,
    job: &'a Job,
    stage: &'a mut Stage,
    client: Client,
    topic: String,
    head: String,
    line: &'a mut Line,
}

impl Bench<'_> {
    async fn idle(&mut self) -> anyhow::Result<Outcome> {
        let topic = NewTopic::new(&self.topic, self.job.partitions, self.job.copies);
        let times = idle::Times {
            settle: self.settings.warmup,
            measure: self.settings.duration,
        };
        let (head, line) = (&self.head, &mut *self.line);
        let tell = |text: &str| line.say(&format!("{head}: {text}"));
        let figures = idle::measure(self.stage, &self.client, topic, times, tell).await?;
        Ok(Outcome {
            figures,
            ..Outcome::default()
        })
    }

    /// The topic, with every partition led by one broker where that one is to be killed.
    fn new_topic(&self) -> (NewTopic, Option<BrokerId>) {
        let topic = self.job.topic(&self.topic);
        if self.job.workload != Workload::W4 || self.job.partitions == 1 {
            return (topic, None);
        }
        let brokers: Vec<BrokerId> = (FIRST.0..=self.job.copies).map(BrokerId).collect();
        let assignment = (0..self.job.partitions).map(|_| brokers.clone()).collect();
        (
            NewTopic {
                assignment,
                ..topic
            },
            Some(FIRST),
        )
    }

    /// Load, and what came of it.
    async fn load(&mut self) -> anyhow::Result<Outcome> {
        let (topic, victim) = self.new_topic();
        self.stage.create(&self.client, topic).await?;
        let connections = self.stage.connections(self.job.connections).await?;
        let is_timed = self.job.workload != Workload::W4;
        let began = Instant::now();
        let from = began + self.settings.warmup;
        let length = if is_timed {
            self.settings.duration
        } else {
            NO_END
        };
        let window = Window {
            from,
            until: from + length,
        };
        let timetable = self.job.rate.map(|rate| Timetable::new(began, rate));
        let timetable = timetable.map(Arc::new);
        let lookout = (!is_timed).then(Arc::<Lookout>::default);
        let plan = Plan {
            topic: self.topic.clone(),
            partitions: self.job.partitions,
            clients: self.job.clients,
            record_bytes: self.job.record_bytes,
            how: self.job.how,
            acks: self.job.acks,
            filler: Filler::new(random_seed(), self.job.record_bytes),
            window,
            timetable: timetable.clone(),
            lookout: lookout.clone(),
        };
        let running = load::start(plan, &connections)?;
        let mut figures = Figures::default();
        let mut times = None;
        let shared = running.shared.clone();
        let mut costs = Figures::default();
        self.pass(window.from, &shared, "warming up").await?;
        if let Some(lookout) = &lookout {
            let kills = Kills {
                count: self.job.kills,
                pause: self.job.kill_pause,
                victim,
            };
            let (head, line) = (&self.head, &mut *self.line);
            let tell = |text: &str| line.say(&format!("{head}: {text}"));
            let (stage, client) = (&mut *self.stage, &self.client);
            let failovers =
                kills::kill_leaders(stage, client, &self.topic, kills, lookout, tell).await?;
            failovers.put(&mut figures);
            times = Some(failovers.times);
        } else {
            let before = self.snapshot(&shared).await?;
            self.pass(window.until, &shared, "measuring").await?;
            let after = self.snapshot(&shared).await?;
            costs = after.costs(&before, self.job.record_bytes, self.job.copies);
        }
        let mut recordings = running.finish(self.settings.patience).await?;
        let measured = if is_timed {
            length
        } else {
            window.from.elapsed()
        };
        let mut outcome = Outcome::default();
        let own_times = self.put_load(&mut figures, &recordings, measured, &mut outcome);
        figures.extend(costs);
        if let Some(timetable) = timetable.filter(|_| is_timed) {
            let behind = timetable.left_behind(window.until);
            figures.put("operations_never_begun", as_figure(behind));
        }
        if !is_timed {
            // It is still under way.
            outcome.over_time.pop();
        }
        outcome.times = times.unwrap_or(own_times);
        let ledger = load::ledger(&mut recordings, self.job.acks, self.job.clients);
        drop(recordings);
        self.line.say(&format!("{}: reading back", self.head));
        let (client, topic) = (&self.client, &self.topic);
        let verdict = verify::read_back(client, topic, self.job.partitions, ledger, || {}).await?;
        outcome.verdict = Some(verdict);
        outcome.figures = figures;
        if self.job.workload == Workload::W6 && verdict.problem().is_none() {
            outcome.figures = self.read(verdict.read_back).await?;
            outcome.times = Latencies::default();
            outcome.over_time.clear();
        }
        Ok(outcome)
    }

    /// What the clients have measured.
    fn put_load(
        &self,
        figures: &mut Figures,
        recordings: &[Recording],
        measured: Duration,
        outcome: &mut Outcome,
    ) -> Latencies {
        let (mut records, mut operations) = (0, 0);
        let mut times = Latencies::default();
        let mut steps: Vec<u64> = Vec::new();
        for recording in recordings {
            records += recording.records;
            operations += recording.operations;
            times.add(&recording.latencies);
            if steps.len() < recording.steps.len() {
                steps.resize(recording.steps.len(), 0);
            }
            for (sum, count) in steps.iter_mut().zip(&recording.steps) {
                *sum += count;
            }
            outcome.errors.add(&recording.errors);
        }
        let seconds = measured.as_secs_f64();
        let bytes = as_figure(u64::try_from(self.job.record_bytes).unwrap_or(0));
        let a_second = as_figure(records) / seconds;
        figures.put("records_per_second", a_second);
        figures.put("megabytes_per_second", a_second * bytes / 1e6);
        if operations < records {
            figures.put("batches_per_second", as_figure(operations) / seconds);
        }
        figures.put_latencies(&times);
        let step = STEP.as_secs_f64();
        let a_step = steps.iter().map(|count| as_figure(*count) / step);
        outcome.over_time = a_step.collect();
        times
    }

    /// Lets time pass, and says how far it is.
    async fn pass(
        &mut self,
        until: Instant,
        shared: &load::Shared,
        what: &str,
    ) -> anyhow::Result<()> {
        let (began, known) = (Instant::now(), shared.acknowledged());
        loop {
            self.stage.check()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let records = shared.acknowledged() - known;
            let seconds = began.elapsed().as_secs_f64().max(0.001);
            self.line.show(&format!(
                "{}: {what}, {:.0} s left, {:.0} records/s",
                self.head,
                left.as_secs_f64().ceil(),
                as_figure(records) / seconds
            ));
            tokio::time::sleep(left.min(LOOK)).await;
        }
    }

    async fn snapshot(&self, shared: &load::Shared) -> anyhow::Result<stage::Snapshot> {
        self.stage
            .snapshot(&self.client, shared.acknowledged())
            .await
    }

    /// One consumer reads everything, and nothing else happens.
    async fn read(&mut self, expected: u64) -> anyhow::Result<Figures> {
        self.line.say(&format!("{}: measuring", self.head));
        let before = self.stage.snapshot(&self.client, 0).await?;
        let consumer = Consumer::new(&self.client, &self.topic, Partitions::All, From::Earliest);
        let began = Instant::now();
        let mut stream = consumer.until(Until::End).stream();
        let (mut records, mut bytes) = (0_u64, 0_u64);
        while let Some(record) = stream.next().await {
            let value = record?.value.unwrap_or_default();
            records += 1;
            bytes += u64::try_from(value.len()).unwrap_or(0);
        }
        let seconds = began.elapsed().as_secs_f64();
        anyhow::ensure!(
            records == expected,
            "the consumer found {records} of {expected} records"
        );
        let after = self.stage.snapshot(&self.client, records).await?;
        let after = after.without_flushes();
        let mut figures = Figures::default();
        figures.put("records_per_second", as_figure(records) / seconds);
        figures.put("megabytes_per_second", as_figure(bytes) / 1e6 / seconds);
        figures.put("records", as_figure(records));
        figures.put("seconds", seconds);
        figures.extend(after.costs(&before, self.job.record_bytes, self.job.copies));
        Ok(figures)
    }
}
