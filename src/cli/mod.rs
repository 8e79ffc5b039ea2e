//! The commands: what is parsed, what is run, what the process answers with.
//!
//! Owns the exit codes (0 done, 1 failed, 2 wrong usage; a judgement has more) and the one line on standard error. Nothing but a command's result goes to
//! standard output.

mod bench;
mod chaos;
mod check;
mod children;
mod cluster;
mod compare;
mod demo;
mod dev;
mod directory;
mod drain;
mod lines;
mod output;
mod progress;
mod reassign;
mod records;
mod serve;
mod settings;
mod svg;
mod topics;
mod waiting;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use logboom::api::Stale;
use logboom::client::{Client, ClientConfig};
use logboom::types::Error;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// A replicated, partitioned log: Kafka's model, one Raft group per partition.
#[derive(Debug, Parser)]
#[command(name = "logboom", version, about, max_term_width = 100)]
struct Cli {
    /// What is logged to standard error: error, warn, info, debug, trace, or a filter as `logboom::client=debug`
    #[arg(long, value_name = "LEVEL", global = true, env = "LOGBOOM_LOG")]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch three brokers survive a kill -9: nothing lost, leadership given back
    Demo(demo::DemoArgs),
    /// Run a cluster on this machine until Ctrl-C
    Dev(dev::DevArgs),
    /// Run one broker
    Serve(Box<serve::ServeArgs>),
    /// Create, list, describe, move and delete topics
    Topic(topics::TopicArgs),
    /// Append the lines of standard input to a topic
    Produce(records::ProduceArgs),
    /// Print the records of a topic
    Consume(records::ConsumeArgs),
    /// Look at the cluster, move leaders, empty a broker
    Cluster(cluster::ClusterArgs),
    /// Load a cluster, measure it, and read back what it acknowledged
    Bench(Box<bench::BenchArgs>),
    /// Hurt brokers of its own in every way, and judge what their clients saw: 0 passed, 3 an anomaly, 4 proves nothing
    Chaos(Box<chaos::ChaosArgs>),
    /// Check the data directory of a broker that is not running
    Fsck(FsckArgs),
    /// Judge the kept history of a fault run: 0 passed, 3 anomalies, 4 proves nothing
    Check(check::CheckArgs),
}

/// Which cluster a client command talks to.
#[derive(Debug, Args)]
struct ClusterAddress {
    /// Brokers of the cluster, any of them will do
    #[arg(
        long,
        env = "LOGBOOM_BOOTSTRAP",
        value_name = "HOST:PORT[,…]",
        default_value = "127.0.0.1:9092"
    )]
    bootstrap: String,
    /// How long the cluster may take for one answer before the command gives up; 30 without it, 60 for records to be acknowledged
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    timeout: Option<Duration>,
}

/// Longest `--timeout`.
const TIMEOUT_MAX: f64 = 86_400.0;

fn seconds(text: &str) -> Result<Duration, String> {
    let number: Option<f64> = text.parse().ok();
    let within = number.filter(|seconds| *seconds >= 0.001 && *seconds <= TIMEOUT_MAX);
    let wrong = || format!("use seconds, 0.001 to {TIMEOUT_MAX}");
    within.map(Duration::from_secs_f64).ok_or_else(wrong)
}

impl ClusterAddress {
    fn addresses(&self) -> Vec<String> {
        let named = self
            .bootstrap
            .split(',')
            .map(str::trim)
            .filter(|address| !address.is_empty());
        // A broker's own list has the form id@host:port; it will do here too.
        named
            .map(|one| {
                one.split_once('@')
                    .map_or(one, |(_, address)| address)
                    .to_owned()
            })
            .collect()
    }

    /// How long an answer may take.
    fn patience(&self, default: Duration) -> Duration {
        self.timeout.unwrap_or(default)
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        let default = ClientConfig::default();
        let config = ClientConfig {
            connect_deadline: self.patience(default.connect_deadline),
            deadline: self.patience(default.deadline),
            ..default
        };
        let (addresses, within) = (self.addresses(), config.connect_deadline);
        let connecting = Client::connect(&addresses, config);
        let connected = if within > ClientConfig::default().connect_deadline {
            waiting::first_answer(&self.bootstrap, within, connecting).await
        } else {
            connecting.await
        };
        match connected {
            Ok(client) => Ok(client),
            Err(error @ Error::InvalidConfig { .. }) => Err(Usage(error.to_string()).into()),
            // It was found, and says itself what to do.
            Err(error @ Error::NotJoined { .. }) => Err(error.into()),
            Err(error) => anyhow::bail!(
                "{error}; is the cluster up? Name its brokers with --bootstrap or LOGBOOM_BOOTSTRAP"
            ),
        }
    }
}

#[derive(Debug, Args)]
struct FsckArgs {
    /// The broker's data directory
    directory: PathBuf,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Wrong usage: exit code 2.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// That what is shown may be out of date.
fn warn_of_stale(stale: Stale) {
    complain(&stale_text(stale));
}

fn stale_text(stale: Stale) -> String {
    let broker = stale.broker;
    let since = stale.age_ms.map_or_else(
        || "before it was started".to_owned(),
        |age_ms| format!("{} s ago", age_ms / 1000),
    );
    format!(
        "the controller has no leader that broker {broker} can reach: this is what broker {broker} last knew, {since}; start brokers until \
         a majority of the controller's voters is up"
    )
}

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;

/// How long the process waits for what still runs in the background when its command is done.
const LEFTOVERS: Duration = Duration::from_millis(100);

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // What sled says of a damaged catalog is logged by whoever repairs it.
        if !logboom::storage::is_panic_guarded() {
            print(panic);
        }
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if let Err(error) = start_log(cli.log.as_deref(), default_level(&cli.command)) {
        return fail(&error);
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Command::Serve(args) = &cli.command
        && let Some(threads) = args.worker_threads
    {
        runtime.worker_threads(usize::from(threads));
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::anyhow!("cannot start: {error}")),
    };
    let result = runtime.block_on(run(cli.command));
    // A read of standard input cannot be cancelled, so nobody waits for it.
    runtime.shutdown_timeout(LEFTOVERS);
    match result {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(args) => Box::pin(demo::run(args)).await,
        Command::Dev(args) => dev::run(args).await,
        Command::Serve(args) => Box::pin(serve::run(*args)).await,
        Command::Topic(args) => topics::run(args).await,
        Command::Produce(args) => records::produce(args).await,
        Command::Consume(args) => records::consume(args).await,
        Command::Cluster(args) => cluster::run(args).await,
        Command::Bench(args) => Box::pin(bench::run(*args)).await,
        Command::Chaos(args) => Box::pin(chaos::run(*args)).await,
        Command::Fsck(args) => fsck(&args),
        Command::Check(args) => check::run(&args),
    }
}

fn fsck(args: &FsckArgs) -> anyhow::Result<ExitCode> {
    let report = logboom::storage::fsck(&args.directory);
    if args.json {
        output::json(&report)?;
    } else {
        for finding in &report.findings {
            let kind = if finding.damage { "damage" } else { "note" };
            output::line(&format!("{kind}: {}", finding.what))?;
        }
        if report.verdict != logboom::storage::Verdict::CannotCheck {
            output::line(&format!(
                "{} groups, {} entries in {} frames, {} segments of {} bytes",
                report.groups, report.entries, report.frames, report.segments, report.journal_bytes
            ))?;
        }
    }
    let directory = args.directory.display();
    match report.verdict.exit_code() {
        0 => Ok(ExitCode::SUCCESS),
        1 => anyhow::bail!(
            "{directory} is damaged: keep it as it is. When its cluster has other brokers, start this one on an empty directory, and it \
             copies its replicas from them; what no other broker has is in this directory alone"
        ),
        _ => Err(Usage(format!(
            "{directory} cannot be checked; {}",
            last_finding(&report)
        ))
        .into()),
    }
}

fn last_finding(report: &logboom::storage::FsckReport) -> &str {
    report
        .findings
        .last()
        .map_or("no reason is known", |finding| finding.what.as_str())
}

/// A broker says what it does; a client speaks only when something is wrong.
fn default_level(command: &Command) -> &'static str {
    match command {
        Command::Serve(_) => "info",
        _ => "error",
    }
}

fn start_log(filter: Option<&str>, default: &str) -> anyhow::Result<()> {
    let text = filter.unwrap_or(default);
    let filter = log_filter(text)?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .init();
    Ok(())
}

fn log_filter(text: &str) -> Result<EnvFilter, Usage> {
    let wrong = |part: &str| {
        Usage(format!(
            "--log {part:?} is not a filter; use error, warn, info, debug, trace or off, or a part of the program with one of \
             them, as logboom::client=debug"
        ))
    };
    // To the library a word that is no level is a part of the program, and everything of it is logged: nothing, for a slip of the pen.
    let is_level = |part: &str| part.parse::<LevelFilter>().is_ok();
    let names_no_level =
        |part: &&str| !part.is_empty() && !part.contains(['=', '[', ']']) && !is_level(part);
    if let Some(part) = text.split(',').find(names_no_level) {
        return Err(wrong(part));
    }
    // A plain level is about Logboom: the Raft library reports every heartbeat that is not answered, and an error when it is
    // told to stop. What stops a replica is reported by `raft` itself.
    let quiet =
        matches!(text, "error" | "warn" | "info").then(|| format!("{text},openraft=off,sled=warn"));
    let filter = EnvFilter::builder().parse(quiet.as_deref().unwrap_or(text));
    filter.map_err(|_| wrong(text))
}

/// Help and version go to standard output; anything else is one line.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match output::text(&error.render().to_string()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        };
    }
    let (command, words) = named_command(std::env::args_os());
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        complain(&format!(
            "say what to do: {}; see `{words} --help`",
            subcommands(&command)
        ));
        return ExitCode::from(WRONG_USAGE);
    }
    let text = error.render().to_string();
    let told = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:"));
    let line = told
        .filter(|line| !line.is_empty() && !line.starts_with("For more information"))
        .collect::<Vec<_>>()
        .join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    complain(&format!("{line}; see `{words} --help`"));
    ExitCode::from(WRONG_USAGE)
}

/// The command that a command line names, and the words that name it.
fn named_command(line: impl Iterator<Item = OsString>) -> (clap::Command, String) {
    let (mut command, mut words) = (Cli::command(), "logboom".to_owned());
    for word in line.skip(1) {
        if let Some(found) = word.to_str().and_then(|word| command.find_subcommand(word)) {
            words = format!("{words} {}", found.get_name());
            command = found.clone();
        }
    }
    (command, words)
}

/// What may follow the words that name `command`.
fn subcommands(command: &clap::Command) -> String {
    let names: Vec<&str> = command
        .get_subcommands()
        .map(clap::Command::get_name)
        .collect();
    names.join(", ")
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // Who closed our output has seen enough: `logboom consume … | head`.
    if output::is_closed(error) {
        return ExitCode::SUCCESS;
    }
    complain(&format!("{error:#}").replace('\n', " "));
    let wrong = error.downcast_ref::<Usage>().is_some();
    ExitCode::from(if wrong { WRONG_USAGE } else { FAILED })
}

fn complain(line: &str) {
    use io::Write;
    // Nobody is left to be told when standard error is gone.
    writeln!(io::stderr(), "logboom: {line}").ok();
}

/// Resolves when the user or the system wants the process to end.
async fn asked_to_stop() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        biased;
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    /// Goal: the forms that scripts rely on are understood. Method: every form, parsed.
    #[test]
    fn the_fixed_forms_parse() {
        Cli::command().debug_assert();
        for line in [
            "logboom demo",
            "logboom demo --input f --json --data d",
            "logboom dev --brokers 5 --data d",
            "logboom serve --config f",
            "logboom serve --config f --broker-id 7 --listen 127.0.0.1:1",
            "logboom topic create t --partitions 2 --replication-factor 2 --config min.insync.replicas=2 --config a=b",
            "logboom topic list --json",
            "logboom topic describe",
            "logboom topic describe t --json",
            "logboom topic delete t",
            "logboom produce t --key-separator : --acks all",
            "logboom produce t --acks leader --bootstrap a:1,b:2",
            "logboom consume t --partition 1 --from earliest --max 3 --follow",
            "logboom consume t --from 17",
            "logboom cluster status --json",
            "logboom cluster elect-leaders",
            "logboom cluster elect-leaders --json",
            "logboom cluster drain 1 --json",
            "logboom topic delete t --json",
            "logboom fsck d --json",
            "logboom bench all",
            "logboom bench W1 --bootstrap a:1,b:2 --duration 5 --record-size 100 --batch-bytes 1000 --single-records --plot f.svg --json",
            "logboom bench W2 w3 --brokers 5 --clients 9 --partitions 4 --replication-factor 3 --acks leader --rate 1000 --runs 1 --warmup 0",
            "logboom bench W4 --kills 20 --data d",
            "logboom bench W5 --idle-partitions 100,500",
            "logboom check f --json",
            "logboom check f --operations 5 --unknown 1 --leader-changes 1 --fault kill=2 --fault pause=1",
            "logboom --log debug topic list",
            "logboom topic list --log debug",
            "logboom topic list --timeout 5",
            "logboom produce t --timeout 0.5",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}: {error}");
            }
        }
        for line in [
            "logboom",
            "logboom produce",
            "logboom topic create t",
            "logboom consume t --from x",
            "logboom bench",
            "logboom bench W7",
            "logboom topic list --timeout 0",
            "logboom topic list --timeout -1",
            "logboom topic list --timeout nan",
            "logboom topic list --timeout 1e9",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    /// Goal: what may be out of date is called so, with its age. Method: known for a while, and not since the start.
    #[test]
    fn a_stale_answer_tells_its_age() {
        for (age_ms, part) in [
            (Some(12_900), "what broker 7 last knew, 12 s ago; start"),
            (
                None,
                "what broker 7 last knew, before it was started; start",
            ),
        ] {
            let broker = logboom::types::BrokerId(7);
            let text = stale_text(Stale { broker, age_ms });
            assert!(text.contains(part), "{text}");
        }
    }

    /// Goal: a filter that would silently log nothing is refused, naming the part that is wrong. Method: good and bad ones.
    #[test]
    fn filters_that_log_nothing_are_refused() {
        for good in [
            "",
            "info",
            "OFF",
            "3",
            "logboom=debug",
            "warn,logboom::client=trace,sled=off",
            "[request]=debug",
        ] {
            if let Err(error) = log_filter(good) {
                panic!("{good:?}: {error}");
            }
        }
        for (bad, part) in [
            ("bogus", "\"bogus\""),
            ("info,verbose", "\"verbose\""),
            ("logboom", "\"logboom\""),
            ("logboom=loud", "\"logboom=loud\""),
        ] {
            let error = log_filter(bad).map(drop).unwrap_err().0;
            assert!(
                error.contains(&format!("{part} is not a filter")),
                "{error}"
            );
        }
    }

    /// Goal: whoever is wrong is sent to the help of the command at hand. Method: lines, and the words that name their commands.
    #[test]
    fn command_lines_name_their_command() {
        for (line, words) in [
            ("logboom", "logboom"),
            ("logboom prodcue t", "logboom"),
            ("logboom topic", "logboom topic"),
            (
                "logboom --log info topic create list",
                "logboom topic create",
            ),
            ("logboom serve --config", "logboom serve"),
        ] {
            let found = named_command(line.split(' ').map(OsString::from));
            assert_eq!(found.1, words, "{line}");
        }
    }

    /// Goal: a broker's bootstrap list serves a client too. Method: both forms.
    #[test]
    fn bootstrap_takes_both_forms() {
        let address = ClusterAddress {
            bootstrap: "a:1, 2@b:2,,".to_owned(),
            timeout: None,
        };
        assert_eq!(address.addresses(), ["a:1", "b:2"]);
    }
}
