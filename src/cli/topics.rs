//! `logboom topic`: create, list, describe, reassign, delete.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use logboom::api::{PartitionView, Stale, TopicRoute, TopicView};
use logboom::client::NewTopic;
use logboom::types::TopicName;
use serde_json::{Value, json};

use super::reassign::{self, ReassignArgs};
use super::{ClusterAddress, Usage, output, waiting, warn_of_stale};

#[derive(Debug, Args)]
pub(super) struct TopicArgs {
    #[command(subcommand)]
    command: TopicCommand,
}

#[derive(Debug, Subcommand)]
enum TopicCommand {
    /// Create a topic and wait for its leaders
    Create(CreateArgs),
    /// List all topics
    List(ListArgs),
    /// Show leader, epoch, replicas, ISR, witness, offsets and lag of each partition
    Describe(DescribeArgs),
    /// Move the replicas of a partition to other brokers, while it is used
    Reassign(ReassignArgs),
    /// Delete a topic and its records
    Delete(DeleteArgs),
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// 1 to 249 of A-Z a-z 0-9 . _ -
    name: String,
    /// How many partitions
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    partitions: u32,
    /// How many copies of each, each on another broker
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    replication_factor: u32,
    /// Configuration as min.insync.replicas=2; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    config: Vec<(String, String)>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// One JSON array instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

#[derive(Debug, Args)]
struct DescribeArgs {
    /// One topic; all of them without it
    name: Option<String>,
    /// One JSON array instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    /// The topic
    name: String,
    /// One JSON object instead of nothing
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("use KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

/// The pairs by key. Two values for one key are a mistake, and which one was meant cannot be known.
fn once_each(pairs: Vec<(String, String)>) -> Result<BTreeMap<String, String>, Usage> {
    let mut config = BTreeMap::new();
    for (key, value) in pairs {
        if let Some(first) = config.get(&key) {
            return Err(Usage(format!(
                "--config {key} is given twice, as {first:?} and as {value:?}; give it once"
            )));
        }
        config.insert(key, value);
    }
    Ok(config)
}

fn check_name(name: &str) -> anyhow::Result<()> {
    TopicName::new(name).map_err(|error| Usage(error.to_string()))?;
    Ok(())
}

pub(super) async fn run(args: TopicArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        TopicCommand::Create(args) => create(args).await?,
        TopicCommand::List(args) => {
            let client = args.cluster.connect().await?;
            let admin = client.admin();
            let known = waiting::reading(&client, "the list of topics", admin.list_known()).await?;
            if args.json {
                let one = |topic| with_stale(route_json(topic), known.stale);
                output::json(&known.topics.iter().map(one).collect::<Vec<_>>())?;
            } else {
                output::text(&list_table(&known.topics))?;
            }
            if let Some(stale) = known.stale {
                warn_of_stale(stale);
            }
        }
        TopicCommand::Describe(args) => {
            if let Some(name) = &args.name {
                check_name(name)?;
            }
            let names = args.name.map(|name| vec![name]);
            let client = args.cluster.connect().await?;
            let admin = client.admin();
            let asked = admin.describe_known(names.as_deref());
            let known = waiting::reading(&client, "the description", asked).await?;
            if args.json {
                let one = |topic| with_stale(topic_json(topic), known.stale);
                output::json(&known.topics.iter().map(one).collect::<Vec<_>>())?;
            } else {
                output::text(&describe_table(&known.topics))?;
            }
            if let Some(stale) = known.stale {
                warn_of_stale(stale);
            }
        }
        TopicCommand::Reassign(args) => reassign::run(args).await?,
        TopicCommand::Delete(args) => {
            check_name(&args.name)?;
            let client = args.cluster.connect().await?;
            let admin = client.admin();
            let what = format!("topic {} to be deleted", args.name);
            waiting::change(&client, &what, admin.delete_topic(&args.name)).await?;
            if args.json {
                output::json(&json!({ "name": args.name, "deleted": true }))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(args: CreateArgs) -> anyhow::Result<()> {
    check_name(&args.name)?;
    let mut topic = NewTopic::new(&args.name, args.partitions, args.replication_factor);
    topic.config = once_each(args.config)?;
    let client = args.cluster.connect().await?;
    let admin = client.admin();
    let what = format!("topic {} to be created and led", args.name);
    let created = waiting::change(&client, &what, admin.create_topic(topic)).await?;
    if args.json {
        let (name, partitions) = (&args.name, args.partitions);
        return output::json(&json!({
            "name": name,
            "partitions": partitions,
            "replication_factor": args.replication_factor,
            "warnings": created.warnings,
        }));
    }
    let told = created
        .warnings
        .iter()
        .map(|warning| format!("warning: {warning}"));
    let lines: Vec<String> = std::iter::once(format!("created {}", args.name))
        .chain(told)
        .collect();
    output::line(&lines.join("\n"))
}

/// A topic's JSON, which says whether it may be out of date.
fn with_stale(mut topic: Value, stale: Option<Stale>) -> Value {
    if let Value::Object(fields) = &mut topic {
        fields.insert("stale".to_owned(), output::stale(stale));
    }
    topic
}

fn list_table(topics: &[TopicRoute]) -> String {
    let row = |topic: &TopicRoute| {
        let leaderless = topic
            .partitions
            .iter()
            .filter(|route| route.leader.is_none())
            .count();
        let short = topic
            .partitions
            .iter()
            .filter(|route| route.isr.len() < route.replicas.len());
        vec![
            topic.name.to_string(),
            topic.partitions.len().to_string(),
            range(spread(
                topic.partitions.iter().map(|route| route.replicas.len()),
            )),
            short.count().to_string(),
            leaderless.to_string(),
        ]
    };
    let heading = [
        "TOPIC",
        "PARTITIONS",
        "REPLICAS",
        "UNDER-REPLICATED",
        "LEADERLESS",
    ];
    output::table(&heading, &topics.iter().map(row).collect::<Vec<_>>())
}

/// Copies of the partition with the fewest, and of the one with the most: a reassignment may make them differ.
fn spread(copies: impl Iterator<Item = usize> + Clone) -> (usize, usize) {
    (copies.clone().min().unwrap_or(0), copies.max().unwrap_or(0))
}

fn range((fewest, most): (usize, usize)) -> String {
    if fewest == most {
        most.to_string()
    } else {
        format!("{fewest}-{most}")
    }
}

/// The replication factors of a described topic's partitions: a copy that is on its way out does not count.
fn replication_factors(topic: &TopicView) -> (usize, usize) {
    spread(topic.partitions.iter().map(|view| {
        let stays = |broker| !view.removing.contains(broker);
        let brokers = view.replicas.iter().map(|replica| &replica.broker);
        brokers.filter(|broker| stays(broker)).count()
    }))
}

fn route_json(topic: &TopicRoute) -> Value {
    let partition = |route: &logboom::api::PartitionRoute| {
        json!({
            "id": route.partition,
            "leader": route.leader,
            "epoch": route.epoch,
            "replicas": route.replicas,
            "isr": route.isr,
        })
    };
    json!({
        "name": topic.name,
        "partitions": topic.partitions.iter().map(partition).collect::<Vec<_>>(),
        "config": topic.config,
    })
}

pub(super) fn topic_json(topic: &TopicView) -> Value {
    let partition = |view: &PartitionView| {
        let replica = |replica: &logboom::api::ReplicaView| json!({ "broker": replica.broker, "in_sync": replica.in_sync, "lag": replica.lag });
        json!({
            "id": view.partition,
            "leader": view.leader,
            "epoch": view.epoch,
            "replicas": view.replicas.iter().map(replica).collect::<Vec<_>>(),
            "adding": view.adding,
            "removing": view.removing,
            "reassigning": view.reassigning,
            "isr": view.isr,
            "witness": view.witness,
            "start_offset": view.start_offset,
            "high_watermark": view.high_watermark,
            "end_offset": view.end_offset,
        })
    };
    let (fewest, most) = replication_factors(topic);
    json!({
        "name": topic.name,
        "replication_factor": fewest,
        "replication_factor_max": most,
        "config": topic.config,
        "partitions": topic.partitions.iter().map(partition).collect::<Vec<_>>(),
    })
}

fn describe_table(topics: &[TopicView]) -> String {
    let section = |topic: &TopicView| {
        let config = topic
            .config
            .iter()
            .map(|(key, value)| format!("{key}={value}"));
        format!(
            "{}  {} partitions  replication factor {}  {}\n{}",
            topic.name,
            topic.partitions.len(),
            range(replication_factors(topic)),
            output::list(config),
            partitions_table(&topic.partitions)
        )
    };
    topics.iter().map(section).collect::<Vec<_>>().join("\n")
}

/// What there is to say about partitions, one line each; that replicas come and go only when some do.
pub(super) fn partitions_table(partitions: &[PartitionView]) -> String {
    let moves = |view: &PartitionView| {
        let adding = view.adding.iter().map(|broker| format!("+{broker}"));
        let removing = view.removing.iter().map(|broker| format!("-{broker}"));
        output::list(adding.chain(removing))
    };
    let some_move = partitions.iter().any(|view| moves(view) != "-");
    let row = |view: &PartitionView| {
        let lags = view.replicas.iter().map(|one| {
            format!(
                "{}:{}",
                one.broker,
                one.lag
                    .map_or_else(|| "?".to_owned(), |lag| lag.to_string())
            )
        });
        let mut cells = vec![
            view.partition.to_string(),
            output::or_dash(view.leader),
            view.epoch.to_string(),
            output::list(view.replicas.iter().map(|one| one.broker)),
            output::list(&view.isr),
            output::or_dash(view.witness),
            output::or_dash(view.start_offset),
            output::or_dash(view.high_watermark),
            output::list(lags),
        ];
        cells.extend(some_move.then(|| moves(view)));
        cells
    };
    let mut heading = vec![
        "PARTITION",
        "LEADER",
        "EPOCH",
        "REPLICAS",
        "ISR",
        "WITNESS",
        "START",
        "HIGH-WATERMARK",
        "LAG",
    ];
    heading.extend(some_move.then_some("MOVING"));
    output::table(&heading, &partitions.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use logboom::api::{PartitionRoute, ReplicaView};
    use logboom::types::{BrokerId, LeaderEpoch, PartitionId};

    fn brokers(ids: &[u32]) -> Vec<BrokerId> {
        ids.iter().copied().map(BrokerId).collect()
    }

    /// A topic of partitions on these brokers, some of which are on their way out.
    fn topic(partitions: &[(&[u32], &[u32])]) -> TopicView {
        let partition = |(number, (on, removing)): (u32, &(&[u32], &[u32]))| PartitionView {
            partition: PartitionId(number),
            leader: None,
            epoch: LeaderEpoch(1),
            replicas: brokers(on)
                .into_iter()
                .map(|broker| ReplicaView {
                    broker,
                    lag: None,
                    in_sync: true,
                })
                .collect(),
            adding: Vec::new(),
            removing: brokers(removing),
            reassigning: false,
            isr: Vec::new(),
            witness: None,
            start_offset: None,
            high_watermark: None,
            end_offset: None,
        };
        TopicView {
            name: TopicName::new("t").unwrap(),
            replication_factor: 0,
            partitions: (0..).zip(partitions).map(partition).collect(),
            config: BTreeMap::new(),
        }
    }

    /// Goal: partitions with different numbers of copies are told as such, and a move is not taken for one. Method: topics before,
    /// during and after a move, as people and programs see them.
    #[test]
    fn replication_factors_that_differ_are_shown() {
        type Case<'a> = (&'a [(&'a [u32], &'a [u32])], &'a str, [u32; 2]);
        let cases: [Case<'_>; 3] = [
            (&[(&[1, 2], &[]), (&[2, 3], &[])], "2", [2, 2]),
            (&[(&[1, 2], &[]), (&[2, 3, 1], &[1])], "2", [2, 2]),
            (&[(&[1, 2, 3], &[]), (&[2, 3], &[])], "2-3", [2, 3]),
        ];
        for (partitions, shown, [fewest, most]) in cases {
            let topic = topic(partitions);
            let table = describe_table(std::slice::from_ref(&topic));
            let heading = format!("  replication factor {shown}  ");
            assert!(table.contains(&heading), "{table}");
            let json = topic_json(&topic);
            assert_eq!(json["replication_factor"], fewest);
            assert_eq!(json["replication_factor_max"], most);
        }
        let route = |(number, on): (u32, &[u32])| PartitionRoute {
            partition: PartitionId(number),
            leader: Some(BrokerId(2)),
            epoch: LeaderEpoch(1),
            replicas: brokers(on),
            isr: brokers(on),
        };
        let listed = list_table(&[TopicRoute {
            name: TopicName::new("t").unwrap(),
            partitions: [(0, &[1, 2, 3][..]), (1, &[2, 3])].map(route).to_vec(),
            config: BTreeMap::new(),
        }]);
        let cells: Vec<&str> = listed.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(cells, ["t", "2", "2-3", "0", "0"]);
    }

    /// Goal: which of two values was meant is not guessed. Method: one key twice, and two keys.
    #[test]
    fn a_key_is_given_once() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let config = once_each(vec![pair("a", "1"), pair("b", "1")]).unwrap();
        assert_eq!(config.len(), 2);
        let twice = once_each(vec![pair("a", "1"), pair("b", "1"), pair("a", "1")]);
        let said = twice.unwrap_err().0;
        assert!(said.starts_with("--config a is given twice"), "{said}");
    }
}
