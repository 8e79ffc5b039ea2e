//! `logboom topic reassign`: moves the replicas of a partition, and shows how far that is.
//!
//! Owns nothing: the move is the cluster's, and goes on without this command.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use logboom::api::PartitionView;
use logboom::client::Admin;
use logboom::types::{BrokerId, PartitionId, TopicName, TopicPartition};
use serde_json::json;
use tokio::time::Instant;

use super::{ClusterAddress, Usage, output, waiting};

/// Between two looks at a move.
const LOOK: Duration = Duration::from_millis(200);
/// How long the cluster may give no answer before a waiting command gives up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct ReassignArgs {
    /// The topic
    name: String,
    /// Which of its partitions
    #[arg(long, value_name = "P")]
    partition: u32,
    /// The brokers that should hold it, the preferred leader first
    #[arg(
        long,
        value_name = "ID,…",
        value_delimiter = ',',
        required_unless_present = "cancel",
        conflicts_with = "cancel"
    )]
    replicas: Vec<u32>,
    /// Send the replicas back to where they were before the move that is under way
    #[arg(long)]
    cancel: bool,
    /// Stay until the replicas are there, and show how far they are; the move goes on when this is interrupted
    #[arg(long)]
    wait: bool,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

pub(super) async fn run(args: ReassignArgs) -> anyhow::Result<()> {
    let topic = TopicName::new(&args.name).map_err(|error| Usage(error.to_string()))?;
    let partition = TopicPartition {
        topic,
        partition: PartitionId(args.partition),
    };
    let replicas: Vec<BrokerId> = args.replicas.iter().copied().map(BrokerId).collect();
    let client = args.cluster.connect().await?;
    let admin = client.admin();
    let what = format!("the controller, to move {partition}");
    let warnings = if args.cancel {
        let asked = admin.cancel_reassignment(partition.clone());
        waiting::change(&client, &what, asked).await?;
        Vec::new()
    } else {
        let asked = admin.reassign(partition.clone(), replicas.clone());
        waiting::change(&client, &what, asked).await?
    };
    if !args.json {
        for warning in &warnings {
            output::line(&format!("warning: {warning}"))?;
        }
    }
    let wanted = Some(replicas).filter(|_| !args.cancel);
    let view = if args.wait {
        let silence_max = args.cluster.patience(SILENCE_MAX);
        let arriving = arrival(
            &admin,
            &partition,
            wanted.as_deref(),
            args.json,
            silence_max,
        );
        waiting::progress(&client, "the move to end", silence_max, arriving).await?
    } else {
        look(&admin, &partition).await?
    };
    if args.json {
        return output::json(&json!({
            "topic": partition.topic,
            "partition": partition.partition,
            "replicas": view.replicas.iter().map(|one| one.broker).collect::<Vec<_>>(),
            "isr": view.isr,
            "witness": view.witness,
            "adding": view.adding,
            "removing": view.removing,
            "reassigning": !has_arrived(&view, wanted.as_deref()),
            "warnings": warnings,
        }));
    }
    // Also when nothing had to be done.
    if args.wait || has_arrived(&view, wanted.as_deref()) {
        output::line(&format!("{partition} is on {}", brokers(&view)))
    } else if args.cancel {
        output::line(&format!("{partition} goes back to where it was"))
    } else {
        output::line(&format!(
            "{partition} moves to {}",
            output::list(&args.replicas)
        ))
    }
}

fn brokers(view: &PartitionView) -> String {
    output::list(view.replicas.iter().map(|one| one.broker))
}

async fn look(admin: &Admin, partition: &TopicPartition) -> anyhow::Result<PartitionView> {
    let topics = admin.describe(Some(&[partition.topic.to_string()])).await?;
    let views = topics.into_iter().flat_map(|topic| topic.partitions);
    views
        .into_iter()
        .find(|view| view.partition == partition.partition)
        .with_context(|| format!("{partition} is gone"))
}

/// Whether nothing is under way any more, and the replicas are `wanted`: the broker that answers may not have heard of the
/// move yet.
fn has_arrived(view: &PartitionView, wanted: Option<&[BrokerId]>) -> bool {
    let there = view.replicas.iter().map(|one| one.broker);
    !view.reassigning && wanted.is_none_or(|wanted| there.eq(wanted.iter().copied()))
}

/// Waits for the end of the move, and tells what changes on the way.
async fn arrival(
    admin: &Admin,
    partition: &TopicPartition,
    wanted: Option<&[BrokerId]>,
    is_silent: bool,
    silence_max: Duration,
) -> anyhow::Result<PartitionView> {
    let mut told = String::new();
    let mut answered = Instant::now();
    loop {
        match look(admin, partition).await {
            Ok(view) if has_arrived(&view, wanted) => return Ok(view),
            Ok(view) => {
                answered = Instant::now();
                let text = progress(&view);
                if !is_silent && text != told {
                    output::line(&text)?;
                    told = text;
                }
            }
            Err(error) if answered.elapsed() >= silence_max => {
                bail!("{error:#}; the move goes on, ask again for the same to see it")
            }
            Err(_) => {} // the brokers may be restarting: the move goes on meanwhile
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// One line on how far a move is.
fn progress(view: &PartitionView) -> String {
    let lag = |broker: &BrokerId| {
        let replica = view.replicas.iter().find(|one| one.broker == *broker);
        let lag = replica.and_then(|one| one.lag);
        lag.map_or_else(
            || format!("{broker} not begun"),
            |lag| format!("{broker} {lag} entries behind"),
        )
    };
    format!(
        "leader {}  in sync {}  adding {}  removing {}",
        output::or_dash(view.leader),
        output::list(&view.isr),
        output::list(view.adding.iter().map(lag)),
        output::list(&view.removing),
    )
}
