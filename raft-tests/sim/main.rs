//! Whole clusters in simulation: the shipped code, in one thread, from one seed.
//!
//! Owns the running of many seeds, each in a process of its own: so nothing is left over from the one before, and what a seed does it
//! does again. `cargo sim` runs the suite; see `docs/testing.md` for what can be asked of it.
//!
//! - `plan`: what a seed stands for.
//! - `world`: hosts, disks, links. `clients`: who writes and reads.
//! - `nemesis`: faults. `watch`: what must hold after every turn. `run`: the phases and the judgement.
// A run that cannot go on ends with a text that says why.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::disallowed_methods,
    unreachable_pub
)]

mod clients;
mod nemesis;
mod plan;
mod run;
mod watch;
mod world;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use logboom::runtime::sim::Bug;
use tokio::process::Command;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// Longest wall-clock time of one seed: it hangs.
const SEED_WITHIN: Duration = Duration::from_secs(120);
/// Seeds when nothing is said.
const SEEDS: u64 = 400;
/// Seeds that are run twice, with traces that must be equal.
const TWICE: u64 = 5;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

struct Since;

impl FormatTime for Since {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        match world::since() {
            Some(since) => write!(writer, "{:>10.6}", since.as_secs_f64()),
            None => writer.write_str("    driver"),
        }
    }
}

/// Longest line of a trace, in characters: of a longer one, a frame with its payload, the rest is there as a checksum.
const LINE_MAX: usize = 400;

/// A trace that is whole or not at all: what cannot be written, on a full disk, ends the run and says so.
#[derive(Clone)]
struct Trace(Arc<Mutex<BufWriter<File>>>);

impl Trace {
    fn written<T>(result: std::io::Result<T>) -> std::io::Result<T> {
        if let Err(error) = &result {
            println!("WRONG cannot write the trace: {error}");
            std::process::exit(2);
        }
        result
    }
}

/// A line without the points in time of the machine's clock, where the paused clocks of a run began: some lines show them.
fn without_clock(line: &str) -> String {
    let mut parts = line.split("Instant { ");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push_str(part.split_once(" }").map_or(part, |(_, rest)| rest));
    }
    text
}

impl Write for Trace {
    /// One event, as the subscriber hands them over.
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        let line = without_clock(&String::from_utf8_lossy(event));
        let mut out = self.0.lock().unwrap();
        Self::written(match line.char_indices().nth(LINE_MAX) {
            None => out.write_all(line.as_bytes()),
            Some((at, _)) => {
                let checksum = crc32c::crc32c(line.as_bytes());
                let bytes = line.len();
                writeln!(
                    out,
                    "{}... {bytes} bytes, checksum {checksum:08x}",
                    &line[..at]
                )
            }
        })?;
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Self::written(self.0.lock().unwrap().flush())
    }
}

fn trace_to(path: &Path) -> Trace {
    let trace = Trace(Arc::new(Mutex::new(BufWriter::new(
        File::create(path).unwrap(),
    ))));
    let filter = std::env::var("TRACE_FILTER")
        .unwrap_or_else(|_| "info,logboom=debug,turmoil=trace,openraft=warn".to_owned());
    let writer = trace.clone();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_timer(Since)
        .with_writer(move || writer.clone())
        .init();
    trace
}

/// One seed, here.
fn child(seed: u64) -> ExitCode {
    run::watch_panics();
    let trace = std::env::var("TRACE").map(|path| trace_to(Path::new(&path)));
    let outcome = run::run(seed);
    if let Ok(mut trace) = trace {
        trace.flush().unwrap();
    }
    for (name, value) in &outcome.figures {
        println!("figure {name} {value}");
    }
    for line in &outcome.story {
        println!("{line}");
    }
    for line in &outcome.wrong {
        println!("WRONG {line}");
    }
    // Without the destructors of a simulated world, which would run outside of it.
    std::process::exit(i32::from(!outcome.wrong.is_empty()));
}

struct Ended {
    seed: u64,
    passed: bool,
    text: String,
    took: Duration,
}

async fn start(seed: u64, trace: Option<PathBuf>, bug: Option<Bug>) -> Ended {
    let began = Instant::now();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .env("SIM_CHILD", seed.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    match bug {
        Some(bug) => {
            command.env("BUG", format!("{bug:?}"));
        }
        // There it says which are tried, not which is made.
        None if number("ZOO").is_some() => {
            command.env_remove("BUG");
        }
        None => {}
    }
    if let Some(trace) = trace {
        command.env("TRACE", trace);
    }
    let ran = tokio::time::timeout(SEED_WITHIN, command.output()).await;
    let (passed, text) = match ran {
        Ok(Ok(output)) => {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            (output.status.success(), text)
        }
        Ok(Err(error)) => (false, format!("WRONG cannot run it: {error}")),
        Err(_) => (
            false,
            format!("WRONG it hangs: no end within {SEED_WITHIN:?}"),
        ),
    };
    Ended {
        seed,
        passed,
        text,
        took: began.elapsed(),
    }
}

fn tell(ended: &Ended) {
    println!(
        "--- seed {} failed; replay: SEED={} cargo sim",
        ended.seed, ended.seed
    );
    let lines: Vec<&str> = ended
        .text
        .lines()
        .filter(|line| !line.starts_with("figure "))
        .collect();
    let skipped = lines.len().saturating_sub(120);
    for line in lines.iter().skip(skipped) {
        println!("{line}");
    }
}

/// The same seed gives the same trace, byte for byte, in a fresh process.
async fn twice(seeds: impl Iterator<Item = u64>, jobs: usize) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let runs = seeds.map(|seed| {
        let paths = ["a", "b"].map(|turn| directory.path().join(format!("{seed}-{turn}")));
        async move {
            let first = start(seed, Some(paths[0].clone()), None).await;
            let second = start(seed, Some(paths[1].clone()), None).await;
            if let Some(failed) = [&first, &second].into_iter().find(|ended| !ended.passed) {
                tell(failed);
                return (false, 0);
            }
            let traces = paths.map(|path| {
                let trace = std::fs::read_to_string(&path).unwrap();
                std::fs::remove_file(&path).unwrap();
                trace
            });
            let same = traces[0] == traces[1] && first.text == second.text && !traces[0].is_empty();
            if !same {
                let pairs = traces[0].lines().zip(traces[1].lines());
                let at = pairs.clone().position(|(one, other)| one != other);
                println!("--- seed {seed} ran in two ways; first difference in line {at:?}:");
                if let Some((one, other)) = at.and_then(|at| pairs.clone().nth(at)) {
                    println!("{one}\n{other}");
                }
            }
            (same, traces[0].lines().count())
        }
    });
    let done: Vec<(bool, usize)> = futures_util::stream::iter(runs)
        .buffer_unordered(jobs)
        .collect()
        .await;
    let lines: usize = done.iter().map(|(_, lines)| lines).sum();
    let same = done.iter().filter(|(same, _)| *same).count();
    println!(
        "{same} of {} seeds ran twice with equal traces, {lines} lines",
        done.len()
    );
    same == done.len()
}

fn jobs() -> usize {
    number("JOBS").map_or_else(
        || std::thread::available_parallelism().map_or(2, usize::from),
        |jobs| usize::try_from(jobs).unwrap_or(2),
    )
}

/// Every classic mistake is found: seeds are run with it, one after the other, until one fails.
async fn zoo(seeds_max: u64) -> bool {
    let only = std::env::var("BUG").ok();
    let wanted = |bug: &Bug| only.as_ref().is_none_or(|only| format!("{bug:?}") == *only);
    let mut found = 0;
    let mut count = 0;
    for bug in Bug::ALL.into_iter().filter(wanted) {
        count += 1;
        let from = number("FROM").unwrap_or(1);
        let runs = (from..from + seeds_max).map(|seed| start(seed, None, Some(bug)));
        let mut runs = futures_util::stream::iter(runs).buffered(jobs());
        let (mut tried, mut how) = (0, None);
        while let Some(ended) = runs.next().await {
            tried += 1;
            if !ended.passed {
                if !start(ended.seed, None, None).await.passed {
                    println!("{bug:?}: seed {} fails without it as well", ended.seed);
                    continue;
                }
                // A panic that nobody catches ends the run before it can say what is wrong.
                let said = |line: &&str| line.starts_with("WRONG ") || line.contains("panicked at");
                let why = ended.text.lines().find(said);
                how = Some((ended.seed, why.unwrap_or("no reason given").to_owned()));
                break;
            }
        }
        match how {
            Some((seed, why)) => {
                found += 1;
                let why: String = why.chars().take(150).collect();
                println!("{bug:?}: found by seed {seed}, try {tried}: {why}");
            }
            None => println!("{bug:?}: NOT FOUND in {tried} seeds"),
        }
    }
    println!("{found} of {count} mistakes are found");
    found == count
}

async fn suite() -> bool {
    if let Some(seeds_max) = number("ZOO") {
        return zoo(seeds_max).await;
    }
    let jobs = jobs();
    let from = number("FROM").unwrap_or(1);
    let count = number("SEEDS").unwrap_or(SEEDS);
    let again = number("TWICE").unwrap_or(TWICE);
    let mut good = true;
    if again > 0 {
        good &= twice(from..from + again, jobs).await;
    }
    let began = Instant::now();
    let runs = (from..from + count).map(|seed| start(seed, None, None));
    let mut runs = futures_util::stream::iter(runs).buffer_unordered(jobs);
    let mut figures: BTreeMap<String, u64> = BTreeMap::new();
    let (mut passed, mut failed, mut slowest) = (0_u64, Vec::new(), (Duration::ZERO, 0));
    while let Some(ended) = runs.next().await {
        slowest = slowest.max((ended.took, ended.seed));
        for line in ended.text.lines() {
            let mut words = line.split(' ');
            if let (Some("figure"), Some(name), Some(value)) =
                (words.next(), words.next(), words.next())
            {
                *figures.entry(name.to_owned()).or_default() += value.parse::<u64>().unwrap_or(0);
            }
        }
        if ended.passed {
            passed += 1;
        } else {
            tell(&ended);
            failed.push(ended.seed);
        }
    }
    println!(
        "{passed} of {count} seeds passed in {:?}; slowest {:?} (seed {})",
        began.elapsed(),
        slowest.0,
        slowest.1
    );
    for (name, value) in &figures {
        println!("  {name} {value}");
    }
    if std::env::var("FAULTS").is_err() {
        let missing = nemesis::coverage(&figures, count);
        for what in &missing {
            println!("too little: {what}");
        }
        good &= missing.is_empty();
    }
    if !failed.is_empty() {
        println!("failed: {failed:?}");
    }
    good && failed.is_empty()
}

fn main() -> ExitCode {
    if !cfg!(tokio_unstable) {
        println!("tokio takes no seed in this build: run it with `cargo sim`");
        return ExitCode::FAILURE;
    }
    if let Some(seed) = number("SIM_CHILD").or_else(|| number("SEED")) {
        return child(seed);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    if runtime.block_on(suite()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
