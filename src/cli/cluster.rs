//! `logboom cluster`: its state, leaders moved to where they should be, and brokers emptied.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use logboom::api::{BrokerView, ClusterView};
use logboom::types::BrokerId;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{ClusterAddress, FAILED, output, waiting, warn_of_stale};

/// Between two looks at a broker that is being emptied.
const LOOK: Duration = Duration::from_millis(200);
/// How long the cluster may give no answer before a waiting command gives up.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Partitions of which it is told why they cannot leave; the others are only named.
const STUCK_SHOWN: usize = 3;

#[derive(Debug, Args)]
pub(super) struct ClusterArgs {
    #[command(subcommand)]
    command: ClusterCommand,
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Brokers, controller, under-replicated and leaderless partitions; exit code 1 when the controller cannot be reached
    Status(StatusArgs),
    /// Hand leadership back to preferred leaders now
    ElectLeaders(ElectArgs),
    /// Move everything off a broker, a few partitions at a time, and stay until it is empty
    Drain(DrainArgs),
}

#[derive(Debug, Args)]
struct DrainArgs {
    /// The broker's number
    broker: u32,
    #[command(flatten)]
    cluster: ClusterAddress,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

#[derive(Debug, Args)]
struct ElectArgs {
    #[command(flatten)]
    cluster: ClusterAddress,
}

pub(super) async fn run(args: ClusterArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        ClusterCommand::Status(args) => {
            let client = args.cluster.connect().await?;
            let admin = client.admin();
            let asked = admin.cluster_status();
            let status = waiting::reading(&client, "the state of the cluster", asked).await?;
            if args.json {
                output::json(&status_json(&status))?;
            } else {
                output::text(&status_text(&status))?;
            }
            if let Some(stale) = status.stale {
                warn_of_stale(stale);
                return Ok(ExitCode::from(FAILED));
            }
        }
        ClusterCommand::ElectLeaders(args) => {
            let client = args.cluster.connect().await?;
            let admin = client.admin();
            let what = "leaderships to be handed back";
            let moved = waiting::change(&client, what, admin.elect_leaders()).await?;
            for partition in &moved {
                output::line(&format!("{partition} moved to its preferred leader"))?;
            }
            if moved.is_empty() {
                output::line("nothing to move")?;
            }
        }
        ClusterCommand::Drain(args) => drain(args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks again and again until the broker is empty. Interrupted, it leaves the moves that it has begun; begun anew, it goes on.
async fn drain(args: DrainArgs) -> anyhow::Result<()> {
    let client = args.cluster.connect().await?;
    let (admin, silence_max) = (client.admin(), args.cluster.patience(SILENCE_MAX));
    let broker = BrokerId(args.broker);
    let what = format!("the controller, to move what is on broker {broker}");
    let mut told = None;
    let mut answered = Instant::now();
    loop {
        let view = match waiting::change(&client, &what, admin.drain(broker)).await {
            Ok(view) => view,
            // Asked again: the controller may be on its way to another broker.
            Err(error) if error.is_retriable() && answered.elapsed() < silence_max => {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        answered = Instant::now();
        for partition in &view.begun {
            output::line(&format!("{partition} moves off broker {broker}"))?;
        }
        if view.remaining == 0 {
            return output::line(&format!(
                "broker {broker} holds no partition any more and can be stopped"
            ));
        }
        let stuck = u32::try_from(view.stuck.len()).unwrap_or(u32::MAX);
        if view.begun.is_empty() && stuck == view.remaining {
            let named = view
                .stuck
                .iter()
                .map(|(name, why)| format!("{name}: {why}"));
            let named: Vec<String> = named.take(STUCK_SHOWN).collect();
            let others = view.stuck.iter().skip(STUCK_SHOWN);
            let others: Vec<String> = others.map(|(name, _)| name.to_string()).collect();
            bail!(
                "{stuck} partitions cannot leave broker {broker}; {}{}{}",
                named.join("; "),
                if others.is_empty() { "" } else { "; nor can " },
                others.join(", ")
            );
        }
        if told != Some(view.remaining) {
            output::line(&format!("{} partitions left", view.remaining))?;
            told = Some(view.remaining);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn status_text(status: &ClusterView) -> String {
    let row = |broker: &BrokerView| {
        let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        vec![
            broker.broker.to_string(),
            broker.address.clone(),
            output::or_dash(broker.rack.as_deref()),
            yes_no(broker.alive),
            yes_no(broker.controller_voter),
            broker.leads.to_string(),
            broker.replicas.to_string(),
        ]
    };
    let heading = [
        "BROKER",
        "ADDRESS",
        "RACK",
        "ALIVE",
        "CONTROLLER-VOTER",
        "LEADS",
        "REPLICAS",
    ];
    let rows: Vec<Vec<String>> = status.brokers.iter().map(row).collect();
    format!(
        "cluster {}  controller {}  {} topics  {} partitions\n{}under-replicated: {}\nleaderless: {}\n",
        output::or_dash(status.cluster),
        output::or_dash(status.controller),
        status.topics,
        status.partitions,
        output::table(&heading, &rows),
        output::list(&status.under_replicated),
        output::list(&status.leaderless),
    )
}

fn status_json(status: &ClusterView) -> Value {
    let broker = |broker: &BrokerView| {
        json!({
            "id": broker.broker,
            "address": broker.address,
            "rack": broker.rack,
            "alive": broker.alive,
            "controller_voter": broker.controller_voter,
            "leads": broker.leads,
            "replicas": broker.replicas,
        })
    };
    let partitions = |list: &[logboom::types::TopicPartition]| -> Vec<Value> {
        list.iter()
            .map(|one| json!({ "topic": one.topic, "partition": one.partition }))
            .collect()
    };
    json!({
        "cluster": status.cluster.map(|cluster| cluster.to_string()),
        "controller": status.controller,
        "stale": output::stale(status.stale),
        "brokers": status.brokers.iter().map(broker).collect::<Vec<_>>(),
        "topics": status.topics,
        "partitions": status.partitions,
        "under_replicated": partitions(&status.under_replicated),
        "leaderless": partitions(&status.leaderless),
    })
}
