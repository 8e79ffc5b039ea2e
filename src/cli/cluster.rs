//! `logboom cluster`: its state, leaders moved to where they should be, and brokers emptied.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use logboom::api::{BrokerView, ClusterView};
use serde_json::{Value, json};

use super::drain::{self, DrainArgs};
use super::{ClusterAddress, FAILED, output, waiting, warn_of_stale};

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
struct StatusArgs {
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

#[derive(Debug, Args)]
struct ElectArgs {
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
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
            if args.json {
                output::json(&json!({ "moved": output::partitions(&moved) }))?;
                return Ok(ExitCode::SUCCESS);
            }
            for partition in &moved {
                output::line(&format!("{partition} moved to its preferred leader"))?;
            }
            if moved.is_empty() {
                output::line("nothing to move")?;
            }
        }
        ClusterCommand::Drain(args) => drain::run(args).await?,
    }
    Ok(ExitCode::SUCCESS)
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
    json!({
        "cluster": status.cluster.map(|cluster| cluster.to_string()),
        "controller": status.controller,
        "stale": output::stale(status.stale),
        "brokers": status.brokers.iter().map(broker).collect::<Vec<_>>(),
        "topics": status.topics,
        "partitions": status.partitions,
        "under_replicated": output::partitions(&status.under_replicated),
        "leaderless": output::partitions(&status.leaderless),
    })
}
