//! `logboom dev`: a cluster on this machine that stays up until it is told to stop.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::children::{Brokers, Ports};
use super::{asked_to_stop, output};

#[derive(Debug, Args)]
pub(super) struct DevArgs {
    /// How many brokers
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=32))]
    brokers: u32,
    /// Where their data is kept; run again with the same directory and the same number of brokers to go on
    #[arg(long, value_name = "DIR", default_value = "logboom-data")]
    data: PathBuf,
    /// Port of the first broker; the others follow. 0: any free ports
    #[arg(
        long,
        value_name = "PORT",
        default_value_t = 9092,
        allow_negative_numbers = true
    )]
    port: u16,
}

pub(super) async fn run(args: DevArgs) -> anyhow::Result<ExitCode> {
    let ports = if args.port == 0 {
        Ports::Free
    } else {
        Ports::From(args.port)
    };
    let mut brokers = Brokers::prepare(args.brokers, &args.data, ports)?;
    brokers.start()?;
    for broker in &brokers.brokers {
        let (id, address, directory) = (broker.id, &broker.address, broker.directory.display());
        output::line(&format!("broker {id} at {address}, data in {directory}"))?;
    }
    let result = tokio::select! {
        biased;
        stop = asked_to_stop() => stop,
        result = stay_up(&mut brokers) => result,
    };
    // Said even when nobody reads it any more: the brokers are stopped in any case.
    output::line("stopping").ok();
    brokers.stop().await;
    result?;
    Ok(ExitCode::SUCCESS)
}

async fn stay_up(brokers: &mut Brokers) -> anyhow::Result<()> {
    // The client is dropped: it was only needed to see the cluster complete.
    drop(brokers.client().await?);
    output::line(&format!(
        "ready: export LOGBOOM_BOOTSTRAP={} (Ctrl-C stops the cluster, its data is kept)",
        brokers.addresses().join(",")
    ))?;
    while !brokers.all_ended() {
        let error = brokers.one_ended().await;
        // The others go on: this is a cluster.
        tracing::error!("{error:#}");
    }
    anyhow::bail!("all brokers have ended")
}
