//! `logboom serve`: one broker in this process.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use logboom::broker::Broker;

use super::settings::{self, Flags};
use super::{Usage, asked_to_stop};

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// TOML file; flags and LOGBOOM_… variables come before it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Stop when standard input ends: set by commands that start brokers of their own
    #[arg(long, hide = true)]
    exit_with_parent: bool,
    /// Die at once when the process that started this one does, whatever this one is doing: set by `chaos`
    #[arg(long, hide = true)]
    die_with_parent: bool,
    /// Threads that the broker computes on; one for each core without it. Brokers that share a machine do better with their share
    #[arg(long, value_name = "N", env = "LOGBOOM_WORKER_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) worker_threads: Option<u16>,
    #[command(flatten)]
    flags: Flags,
}

/// A broker that was told to stop is ended after this long, whatever it is still doing.
const STOP_WITHIN: Duration = Duration::from_secs(30);

pub(super) async fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    #[cfg(target_os = "linux")]
    if args.die_with_parent {
        // A paused process would never see the end of its input.
        let signal = Some(rustix::process::Signal::KILL);
        rustix::process::set_parent_process_death_signal(signal)?;
    }
    let text = match &args.config {
        None => None,
        Some(path) => Some(
            std::fs::read_to_string(path)
                .map_err(|error| Usage(format!("cannot read {}: {error}", path.display())))?,
        ),
    };
    let file = args.config.as_deref().zip(text.as_deref());
    let config = settings::merge(&args.flags, |name| std::env::var(name).ok(), file)?;
    let directory = config.data_dir.clone();
    let broker = Broker::builder(config)
        .start()
        .await
        .with_context(|| format!("the broker on {} cannot start", directory.display()))?;
    tracing::info!(address = %broker.local_addr(), data = %directory.display(), "serving");
    let failure = tokio::select! {
        biased;
        stop = asked_to_stop() => {
            stop?;
            None
        }
        () = parent_ended(args.exit_with_parent) => None,
        error = broker.wait_failed() => Some(error),
    };
    tracing::info!("stopping");
    let stopped = async {
        tokio::select! {
            biased;
            // A second signal means now.
            stop = asked_to_stop() => stop.is_err(),
            () = broker.shutdown() => true,
        }
    };
    let in_order = tokio::time::timeout(STOP_WITHIN, stopped)
        .await
        .unwrap_or(false);
    match failure {
        Some(error) => Err(anyhow::anyhow!(
            "the broker on {} failed and stopped: {error}; see its log, then `logboom fsck {}`",
            directory.display(),
            directory.display()
        )),
        None if in_order => Ok(ExitCode::SUCCESS),
        None => anyhow::bail!(
            "the broker was stopped before it had finished; nothing acknowledged is lost"
        ),
    }
}

/// Resolves when the other end of standard input is gone, which no kill of the parent can prevent.
async fn parent_ended(watch: bool) {
    if !watch {
        return std::future::pending().await;
    }
    let read_to_end = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    // An input that cannot be read has no parent behind it either.
    tokio::task::spawn_blocking(read_to_end).await.ok();
}
