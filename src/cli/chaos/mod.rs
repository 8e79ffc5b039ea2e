//! `logboom chaos`: real brokers, hurt in every way that needs no root, and judged by what their clients saw.
//!
//! Owns the run from its directory to its exit code: 0 passed, 1 could not run, 2 wrong usage, 3 an anomaly, 4 too little happened
//! to prove anything. What is done when is the schedule's; how it is done, `acts`'; what is wrong, the checker's and `acts`'.

mod acts;
mod field;
mod figures;
mod ground;
mod picture;
mod report;
mod schedule;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use logboom::config::BrokerConfig;
use logboom::runtime::{Tasks, random_seed};
use logboom::testkit::FaultDisk;
use logboom::testkit::checker::{self, Coverage};
use logboom::testkit::history::History;
use logboom::testkit::recorder::Recorder;
use logboom::testkit::workload::{Workload, WorkloadConfig, read_final_logs};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::acts::Run;
use self::field::Field;
use self::figures::Times;
use self::ground::{Ground, PARTITIONS};
use self::report::{Outcome, Report};
use self::schedule::{Kind, Plan, Schedule, Scope, Wanted};
use super::directory::Directory;
use super::{Usage, asked_to_stop, output};

#[derive(Debug, Args)]
pub(super) struct ChaosArgs {
    /// How long faults are injected
    #[arg(
        long,
        value_name = "M",
        default_value_t = 3.0,
        allow_negative_numbers = true
    )]
    minutes: f64,
    /// End after this many faults instead
    #[arg(long, value_name = "N", conflicts_with = "minutes", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// Where the schedule of faults comes from; a new one without it
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// How many brokers
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=9))]
    brokers: u32,
    /// Copies of the topic; three, or as many as there are brokers. With three brokers or more there is also a topic with two copies and a witness
    #[arg(long, value_name = "R", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=9))]
    replication_factor: Option<u32>,
    /// Which faults, of kill, pause, partition, slow, powerloss, diskfull, fsyncfail, bitrot, transfer, reassign; all that can be without it. `kill-one`, `kill-all`, `powerloss-one`, `powerloss-all` narrow theirs
    #[arg(long, value_name = "FAULT,…")]
    faults: Option<String>,
    /// The result as one JSON object on the last line
    #[arg(long)]
    json: bool,
    /// The brokers' disks forget what they said was synced: shows that a loss is noticed
    #[arg(long, hide = true)]
    disks_lie: bool,
    /// A new or empty directory for the history, the brokers' logs, timeline.svg and report.html
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

const ANOMALY: u8 = 3;
const INVALID: u8 = 4;

/// Longest run, in minutes.
const MINUTES_MAX: f64 = 7.0 * 24.0 * 60.0;
/// Bytes of each value that is written.
const RECORD_BYTES: usize = 200;
/// Operations that a history holds at most; a long run asks less often.
const OPERATIONS_MAX: u32 = 4_000_000;
/// About so many seconds pass from one fault to the next: only to guess how long a run with a count will be.
const SECONDS_A_FAULT: f64 = 6.0;
/// How long an answer is waited for.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How long the final reading may take.
const READ_WITHIN: Duration = Duration::from_secs(120);
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(5);
/// Operations a second that must have succeeded, or the cluster was hardly used.
const OPERATIONS_A_SECOND: f64 = 2.0;

/// What is to be done, checked.
#[derive(Debug)]
struct Settings {
    seed: u64,
    brokers: u32,
    replication_factor: u32,
    faults: Vec<Wanted>,
    time: Option<Duration>,
    count: Option<u32>,
    fault_disks: bool,
    disks_lie: bool,
}

impl Settings {
    fn of(args: &ChaosArgs) -> Result<Self, Usage> {
        let wrong = |text: String| Err(Usage(text));
        if args.count.is_none() && !(args.minutes > 0.0 && args.minutes <= MINUTES_MAX) {
            return wrong(format!(
                "--minutes: use more than 0 and at most {MINUTES_MAX}"
            ));
        }
        let brokers = args.brokers;
        let replication_factor = args.replication_factor.unwrap_or(brokers.min(3));
        if replication_factor > brokers {
            return wrong(format!(
                "--replication-factor: {replication_factor} copies need as many brokers, and there are {brokers}"
            ));
        }
        let fault_disks = FaultDisk::is_available();
        let cannot = |kind: Kind| {
            if kind.needs_fault_disk() && !fault_disks {
                return Some("needs Linux with glibc on 64 bits".to_owned());
            }
            if brokers < kind.brokers_min() {
                return Some(format!("needs at least {} brokers", kind.brokers_min()));
            }
            // Nobody else would have a copy.
            let copies = if kind == Kind::Bitrot || kind == Kind::Transfer {
                2
            } else {
                1
            };
            (replication_factor < copies).then(|| format!("needs {copies} copies"))
        };
        let faults = match &args.faults {
            None => {
                let possible = Kind::ALL.into_iter().filter(|kind| cannot(*kind).is_none());
                let either = |kind| Wanted {
                    kind,
                    scope: Scope::Either,
                };
                possible.map(either).collect()
            }
            Some(text) => {
                let mut faults: Vec<Wanted> = Vec::new();
                for name in text.split(',').map(str::trim) {
                    let wanted =
                        Wanted::parse(name).map_err(|error| Usage(format!("--faults: {error}")))?;
                    if let Some(why) = cannot(wanted.kind) {
                        return wrong(format!("--faults: {} {why}", wanted.kind));
                    }
                    if !faults.contains(&wanted) {
                        faults.push(wanted);
                    }
                }
                faults
            }
        };
        Ok(Self {
            seed: args.seed.unwrap_or_else(random_seed),
            brokers,
            replication_factor,
            faults,
            time: (args.count.is_none()).then(|| Duration::from_secs_f64(args.minutes * 60.0)),
            count: args.count,
            fault_disks,
            disks_lie: args.disks_lie,
        })
    }

    /// The command that makes the same schedule again.
    fn replay(&self) -> String {
        let names: Vec<String> = self.faults.iter().map(|wanted| wanted.name()).collect();
        let length = match (self.count, self.time) {
            (Some(count), _) => format!("--count {count}"),
            (None, time) => {
                let minutes = time.unwrap_or_default().as_secs_f64() / 60.0;
                format!("--minutes {minutes}")
            }
        };
        format!(
            "logboom chaos --seed {} {length} --brokers {} --replication-factor {} --faults {}{}",
            self.seed,
            self.brokers,
            self.replication_factor,
            names.join(","),
            if self.disks_lie { " --disks-lie" } else { "" }
        )
    }

    fn seconds(&self) -> f64 {
        let counted = self.count.map(|count| f64::from(count) * SECONDS_A_FAULT);
        counted.unwrap_or_else(|| self.time.unwrap_or_default().as_secs_f64())
    }
}

pub(super) async fn run(args: ChaosArgs) -> anyhow::Result<ExitCode> {
    let settings = Settings::of(&args)?;
    let directory = Directory::make("chaos", args.keep.as_deref())?;
    if !settings.fault_disks && args.faults.is_none() {
        tell("without powerloss, diskfull and fsyncfail, which need Linux with glibc on 64 bits");
    }
    let stop = CancellationToken::new();
    let now = CancellationToken::new();
    let tasks = Tasks::new();
    let (gently, at_once) = (stop.clone(), now.clone());
    tasks.spawn(async move {
        for signal in [gently, at_once] {
            if asked_to_stop().await.is_ok() {
                tell("interrupted: healing and judging what there is; once more to stop at once");
            }
            signal.cancel();
        }
    });
    let field = Field::prepare(
        settings.brokers,
        &directory.path,
        settings.seed,
        settings.fault_disks,
    );
    let mut field = field.await?;
    let result = tokio::select! {
        biased;
        () = now.cancelled() => Err(anyhow::anyhow!("interrupted")),
        result = Box::pin(story(&settings, &directory.path, &mut field, stop)) => result,
    };
    field.brokers.kill().await;
    tasks.stop();
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            return Err(error.context(format!("the run failed ({})", directory.keep())));
        }
    };
    finish(&args, &settings, &directory, &report)
}

/// What is printed in the end, and the exit code.
fn finish(
    args: &ChaosArgs,
    settings: &Settings,
    directory: &Directory,
    report: &Report,
) -> anyhow::Result<ExitCode> {
    let mut text = report.text();
    writeln!(text, "replay: {}\n        (the faults and their order come from the seed; how the processes interleave does not, so a failure may need several runs)",
        settings.replay()).ok();
    let passed = report.outcome == Outcome::Passed;
    if !passed || !directory.is_temporary() {
        writeln!(text, "{}", directory.keep()).ok();
    }
    let shown = output::text(&text).and_then(|()| {
        if args.json {
            output::json(report)
        } else {
            Ok(())
        }
    });
    match shown {
        Err(error) if !output::is_closed(&error) => return Err(error),
        // The verdict does not depend on who reads it.
        _ => {}
    }
    Ok(match report.outcome {
        Outcome::Passed => ExitCode::SUCCESS,
        Outcome::Anomaly => ExitCode::from(ANOMALY),
        Outcome::Invalid => ExitCode::from(INVALID),
    })
}

/// A line on standard error.
fn tell(line: &str) {
    // Nobody is left to be told when standard error is gone.
    writeln!(std::io::stderr(), "chaos: {line}").ok();
}

/// The whole run; the brokers may still be running at its end.
async fn story(
    settings: &Settings,
    directory: &Path,
    field: &mut Field,
    stop: CancellationToken,
) -> anyhow::Result<Report> {
    field.brokers.start()?;
    let client = field.brokers.client().await?;
    let began = Instant::now();
    let recorder = || {
        let since = move || u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Recorder::new(std::sync::Arc::new(since))
    };
    let ids = field.ids();
    let (addresses, copies) = (field.brokers.addresses(), settings.replication_factor);
    let ground = Ground::create(client, &addresses, ids, copies, recorder).await?;
    let workloads = start_workloads(settings, &ground)?;
    let plan = Plan {
        brokers: settings.brokers,
        partitions: ground.partitions(),
        faults: settings.faults.clone(),
        fault_disks: settings.fault_disks,
    };
    let (now, doing) = watch::channel("starting".to_owned());
    let mut run = Run::new(field, &ground, stop.clone(), now);
    let faults = async {
        if !run.whole("at the beginning").await? {
            return Ok(false);
        }
        run.field.disks_lie(settings.disks_lie)?;
        let mut left = settings.count.unwrap_or(u32::MAX);
        for step in Schedule::new(settings.seed, plan) {
            let over = settings.time.is_some_and(|time| began.elapsed() >= time);
            if over || left == 0 || stop.is_cancelled() {
                break;
            }
            if !run.step(&step).await? {
                break;
            }
            left -= 1;
        }
        run.heal().await
    };
    let whole = tokio::select! {
        biased;
        whole = faults => whole,
        () = watch_over(&ground, &doing, began) => Ok(false),
    };
    // Without a cluster that works there is little to wait for.
    let patience = if whole? { READ_WITHIN } else { ANSWER_WITHIN };
    tell("reading everything back");
    let mut problems = std::mem::take(&mut run.problems);
    let deeds = std::mem::take(&mut run.deeds);
    for workload in workloads {
        workload.stop().await;
    }
    let mut histories = Vec::new();
    for topic in &ground.topics {
        let read = read_final_logs(
            &ground.client,
            &topic.recorder,
            &topic.name,
            PARTITIONS,
            patience,
        );
        let logs = match read.await {
            Ok(logs) => logs,
            Err(error) => {
                let name = &topic.name;
                problems.push(format!("{name} cannot be read to its end: {error}"));
                Vec::new()
            }
        };
        let mut history = topic.recorder.clone().finish();
        history.logs = logs;
        histories.push((topic.name.clone(), history));
    }
    field.brokers.stop().await;
    problems.extend(field.panics());
    for broker in &field.brokers.brokers {
        let found = logboom::storage::fsck(&broker.directory);
        if found.verdict != logboom::storage::Verdict::Ok {
            let last = found.findings.last().map_or("", |finding| &finding.what);
            problems.push(format!(
                "the disk of broker {} is damaged: {last}",
                broker.id
            ));
        }
    }
    tell("judging");
    let mut report = Report {
        seed: settings.seed,
        brokers: settings.brokers,
        replication_factor: settings.replication_factor,
        seconds: began.elapsed().as_secs(),
        election_timeout_ms: {
            let config = BrokerConfig::default();
            [
                config.election_timeout_min_ms,
                config.election_timeout_max_ms,
            ]
        },
        problems,
        ..Report::new(deeds)
    };
    for (name, history) in &histories {
        let judged = checker::check(history, &coverage(settings, began.elapsed()));
        report.add(name, history, judged);
    }
    let mut failovers = Vec::new();
    for ((_, history), first) in histories.iter().zip((0..).step_by(PARTITIONS as usize)) {
        let of_topic = |deed: &acts::Deed| {
            let partition = deed.failover_of?.checked_sub(first)?;
            (partition < PARTITIONS).then_some((partition, deed.began_ns))
        };
        let moments: Vec<(u32, u64)> = report.deeds.iter().filter_map(of_topic).collect();
        failovers.extend(figures::failovers(history, &moments));
    }
    report.failovers = Times::of(failovers);
    report.silences = figures::silences(histories.iter().map(|(_, history)| history));
    if let Some(count) = settings.count {
        let done = report.deeds.len();
        if usize::try_from(count).is_ok_and(|count| done < count) {
            report
                .gaps
                .push(format!("{done} of {count} faults were injected"));
        }
    }
    report.conclude(settings.faults.iter().map(|wanted| wanted.kind));
    write_files(directory, &histories, &report, &settings.replay())?;
    Ok(report)
}

fn start_workloads(settings: &Settings, ground: &Ground) -> anyhow::Result<Vec<Workload>> {
    let mut workloads = Vec::new();
    for (number, topic) in (0..).zip(&ground.topics) {
        let mut config = WorkloadConfig::new(&topic.name, PARTITIONS);
        config.record_bytes = RECORD_BYTES;
        config.answer_within = ANSWER_WITHIN;
        config.seed = settings.seed.wrapping_add(number);
        let sessions =
            config.producers + config.plain_appenders + config.readers + config.end_askers;
        // What fits into the history, spread over the run.
        let operations = f64::from(OPERATIONS_MAX) / f64::from(sessions);
        let least = Duration::from_secs_f64(settings.seconds() / operations);
        config.pause = least.max(Duration::from_millis(8));
        workloads.push(Workload::start(&ground.client, &topic.recorder, config)?);
    }
    Ok(workloads)
}

/// Looks at the leaders all the time, and says how the run goes.
async fn watch_over(ground: &Ground, doing: &watch::Receiver<String>, began: Instant) {
    let mut told = began;
    loop {
        ground.look().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            let (ok, failed, unknown) = ground.counts();
            let seconds = began.elapsed().as_secs();
            let now = doing.borrow().clone();
            tell(&format!(
                "{:02}:{:02}  {ok} done, {failed} refused, {unknown} unknown; {now}",
                seconds / 60,
                seconds % 60
            ));
        }
    }
}

/// What each topic's history must have; leaders and effects are counted over all of them.
fn coverage(settings: &Settings, time: Duration) -> Coverage {
    let least = (time.as_secs_f64() * OPERATIONS_A_SECOND).min(1e9);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // bounded above
    let operations_min = least as u64;
    let names = settings
        .faults
        .iter()
        .map(|wanted| wanted.kind.name().to_owned());
    Coverage {
        operations_min,
        unknown_min: 0,
        leader_changes_min: 0,
        faults: names.map(|name| (name, 1)).collect::<BTreeMap<_, _>>(),
    }
}

fn write_files(
    directory: &Path,
    histories: &[(String, History)],
    report: &Report,
    replay: &str,
) -> anyhow::Result<()> {
    for (name, history) in histories {
        let path = directory.join(format!("history-{name}.jsonl"));
        let file =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut file = BufWriter::new(file);
        history.write(&mut file)?;
        file.flush()?;
    }
    let svg = picture::draw(histories, &report.deeds);
    let html = report.html(&svg, replay);
    for (name, text) in [("timeline.svg", &svg), ("report.html", &html)] {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
