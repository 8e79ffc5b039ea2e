//! `logboom cluster`: its state, and leaders moved to where they should be.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use logboom::api::{BrokerView, ClusterView};
use serde_json::{Value, json};

use super::{ClusterAddress, output};

#[derive(Debug, Args)]
pub(super) struct ClusterArgs {
    #[command(subcommand)]
    command: ClusterCommand,
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Brokers, controller, under-replicated and leaderless partitions
    Status(StatusArgs),
    /// Hand leadership back to preferred leaders now
    ElectLeaders(ElectArgs),
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
            let status = args
                .cluster
                .connect()
                .await?
                .admin()
                .cluster_status()
                .await?;
            if args.json {
                output::json(&status_json(&status))?;
            } else {
                output::text(&status_text(&status))?;
            }
        }
        ClusterCommand::ElectLeaders(args) => {
            let moved = args
                .cluster
                .connect()
                .await?
                .admin()
                .elect_leaders()
                .await?;
            for partition in &moved {
                output::line(&format!("{partition} moved to its preferred leader"))?;
            }
            if moved.is_empty() {
                output::line("nothing to move")?;
            }
        }
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
    let partitions = |list: &[logboom::types::TopicPartition]| -> Vec<Value> {
        list.iter()
            .map(|one| json!({ "topic": one.topic, "partition": one.partition }))
            .collect()
    };
    json!({
        "cluster": status.cluster.map(|cluster| cluster.to_string()),
        "controller": status.controller,
        "brokers": status.brokers.iter().map(broker).collect::<Vec<_>>(),
        "topics": status.topics,
        "partitions": status.partitions,
        "under_replicated": partitions(&status.under_replicated),
        "leaderless": partitions(&status.leaderless),
    })
}
