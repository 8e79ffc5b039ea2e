//! `logboom cluster drain`: empties a broker, and tells what it waits for.
//!
//! Owns nothing: the moves are the cluster's, and go on without this command.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use logboom::api::{DrainView, PartitionView, TopicView};
use logboom::client::Admin;
use logboom::types::{BrokerId, TopicPartition};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{ClusterAddress, complain, output, waiting};

/// Between two looks at a broker that is being emptied.
const LOOK: Duration = Duration::from_millis(200);
/// How long the cluster may give no answer before the command gives up.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// When no partition has left for so long, it is told why, and again after as long.
const STILL: Duration = Duration::from_secs(5);
/// Partitions of which it is told why they do not leave; the others are only counted, or named.
const SHOWN: usize = 3;

#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    /// The broker's number
    broker: u32,
    /// One JSON object at the end instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

/// Asks again and again until the broker is empty. Interrupted, it leaves the moves that it has begun; begun anew, it goes on.
pub(super) async fn run(args: DrainArgs) -> anyhow::Result<()> {
    let client = args.cluster.connect().await?;
    let (admin, silence_max) = (client.admin(), args.cluster.patience(SILENCE_MAX));
    let broker = BrokerId(args.broker);
    let what = format!("the controller, to move what is on broker {broker}");
    let mut begun = BTreeSet::new();
    let mut left = None;
    let (mut answered, mut still) = (Instant::now(), Instant::now());
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
        if !args.json {
            for partition in &view.begun {
                output::line(&format!("{partition} moves off broker {broker}"))?;
            }
        }
        begun.extend(view.begun.iter().cloned());
        let stuck = u32::try_from(view.stuck.len()).unwrap_or(u32::MAX);
        let is_over = view.remaining == 0 || view.begun.is_empty() && stuck == view.remaining;
        if is_over && args.json {
            output::json(&drain_json(broker, &begun, &view))?;
        }
        if is_over && view.remaining > 0 {
            bail!(stuck_text(broker, &view.stuck));
        }
        if is_over {
            return if args.json {
                Ok(())
            } else {
                output::line(&format!(
                    "broker {broker} holds no partition any more and can be stopped"
                ))
            };
        }
        if left != Some(view.remaining) {
            if !args.json {
                output::line(&format!("{} partitions left", view.remaining))?;
            }
            left = Some(view.remaining);
            still = Instant::now();
        } else if still.elapsed() >= STILL {
            tell_why(&admin, broker, &view).await;
            still = Instant::now();
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn drain_json(broker: BrokerId, begun: &BTreeSet<TopicPartition>, view: &DrainView) -> Value {
    let stuck = view.stuck.iter().map(
        |(name, why)| json!({ "topic": name.topic, "partition": name.partition, "reason": why }),
    );
    json!({
        "broker": broker,
        "begun": output::partitions(begun),
        "remaining": view.remaining,
        "stuck": stuck.collect::<Vec<_>>(),
    })
}

fn stuck_text(broker: BrokerId, stuck: &[(TopicPartition, String)]) -> String {
    let named = stuck.iter().map(|(name, why)| format!("{name}: {why}"));
    let named: Vec<String> = named.take(SHOWN).collect();
    let others = stuck.iter().skip(SHOWN);
    let others: Vec<String> = others.map(|(name, _)| name.to_string()).collect();
    format!(
        "{} partitions cannot leave broker {broker}; {}{}{}",
        stuck.len(),
        named.join("; "),
        if others.is_empty() { "" } else { "; nor can " },
        others.join(", ")
    )
}

/// Says what is still on `broker`, and why.
async fn tell_why(admin: &Admin, broker: BrokerId, view: &DrainView) {
    // Without an answer there is nothing to tell; the next question shows whether the cluster is well.
    let Ok(topics) = admin.describe(None).await else {
        return;
    };
    let reasons = reasons(&topics, broker, &view.stuck);
    let more = reasons.len().saturating_sub(SHOWN);
    let shown: Vec<String> = reasons.into_iter().take(SHOWN).collect();
    if !shown.is_empty() {
        let more = if more > 0 {
            format!("; and {more} more")
        } else {
            String::new()
        };
        complain(&format!(
            "waiting for {} partitions to leave broker {broker}, because {}{more}",
            view.remaining,
            shown.join("; ")
        ));
    }
}

/// Why each partition of which `broker` holds something is still there; those whose move is under way first, since the others wait for these.
fn reasons(
    topics: &[TopicView],
    broker: BrokerId,
    stuck: &[(TopicPartition, String)],
) -> Vec<String> {
    let (mut moving, mut waiting) = (Vec::new(), Vec::new());
    for topic in topics {
        for view in &topic.partitions {
            let holds = view.replicas.iter().any(|one| one.broker == broker)
                || view.removing.contains(&broker)
                || view.witness == Some(broker);
            if !holds {
                continue;
            }
            let name = TopicPartition {
                topic: topic.name.clone(),
                partition: view.partition,
            };
            let why = stuck.iter().find(|(known, _)| *known == name);
            if view.reassigning {
                moving.push(format!("{name} {}", why_not_there(view)));
            } else if let Some((_, why)) = why {
                waiting.push(format!("{name} cannot be moved: {why}"));
            } else {
                waiting.push(format!("{name} waits for other moves to end"));
            }
        }
    }
    moving.append(&mut waiting);
    moving
}

/// What a move under way still needs.
fn why_not_there(view: &PartitionView) -> String {
    if view.leader.is_none() {
        return "has no leader".to_owned();
    }
    let replica = |broker: &BrokerId| view.replicas.iter().find(|one| one.broker == *broker);
    let missing =
        view.adding
            .iter()
            .filter_map(|broker| match replica(broker).and_then(|one| one.lag) {
                None => Some(format!("has no copy on broker {broker} yet")),
                Some(_) if view.isr.contains(broker) => None,
                Some(lag) => Some(format!(
                    "has a copy on broker {broker} that is {lag} entries behind"
                )),
            });
    let missing: Vec<String> = missing.collect();
    if !missing.is_empty() {
        return missing.join(", ");
    }
    let stays =
        |broker: &BrokerId| !view.removing.contains(broker) && !view.adding.contains(broker);
    let stays = view.replicas.iter().map(|one| one.broker).filter(stays);
    let behind: Vec<BrokerId> = stays.filter(|one| !view.isr.contains(one)).collect();
    if behind.is_empty() {
        "has its copies and changes its members".to_owned()
    } else {
        format!(
            "stays on brokers that are not in sync: {}",
            output::list(behind)
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use logboom::api::ReplicaView;
    use logboom::types::{LeaderEpoch, PartitionId, TopicName};

    use super::*;

    fn ids(brokers: &[u32]) -> Vec<BrokerId> {
        brokers.iter().copied().map(BrokerId).collect()
    }

    /// Two copies on brokers 1 and 2, led by 2, in sync, that do not move.
    fn view(partition: u32) -> PartitionView {
        let replica = |broker: &u32| ReplicaView {
            broker: BrokerId(*broker),
            lag: Some(0),
            in_sync: true,
        };
        PartitionView {
            partition: PartitionId(partition),
            leader: Some(BrokerId(2)),
            epoch: LeaderEpoch(1),
            replicas: [1, 2].iter().map(replica).collect(),
            adding: Vec::new(),
            removing: Vec::new(),
            reassigning: false,
            isr: ids(&[1, 2]),
            witness: None,
            start_offset: None,
            high_watermark: None,
            end_offset: None,
        }
    }

    /// From broker 1 to broker 3, where the copy is `lag` entries behind.
    fn moving(partition: u32, lag: Option<u64>) -> PartitionView {
        let mut view = view(partition);
        view.replicas.push(ReplicaView {
            broker: BrokerId(3),
            lag,
            in_sync: false,
        });
        view.adding = ids(&[3]);
        view.removing = ids(&[1]);
        view.reassigning = true;
        view
    }

    /// Goal: who empties a broker is told what is still there and why, what moves first. Method: a partition for each reason, and two that are
    /// not there.
    #[test]
    fn what_has_not_left_has_a_reason() {
        let mut elsewhere = view(1);
        elsewhere.replicas.retain(|one| one.broker != BrokerId(1));
        let mut witness = elsewhere.clone();
        witness.partition = PartitionId(2);
        witness.witness = Some(BrokerId(1));
        let mut leaderless = moving(5, None);
        leaderless.leader = None;
        let mut behind = moving(6, Some(0));
        behind.isr = ids(&[1, 3]);
        let mut ready = behind.clone();
        ready.partition = PartitionId(7);
        ready.isr = ids(&[1, 2, 3]);
        let topic = TopicView {
            name: TopicName::new("t").unwrap(),
            replication_factor: 2,
            partitions: vec![
                view(0),
                elsewhere,
                witness,
                moving(3, None),
                moving(4, Some(17)),
                leaderless,
                behind,
                ready,
            ],
            config: BTreeMap::new(),
        };
        let stuck = TopicPartition {
            topic: topic.name.clone(),
            partition: PartitionId(2),
        };
        let stuck = [(stuck, "add one".to_owned())];
        assert_eq!(
            reasons(&[topic], BrokerId(1), &stuck),
            [
                "t-3 has no copy on broker 3 yet",
                "t-4 has a copy on broker 3 that is 17 entries behind",
                "t-5 has no leader",
                "t-6 stays on brokers that are not in sync: 2",
                "t-7 has its copies and changes its members",
                "t-0 waits for other moves to end",
                "t-2 cannot be moved: add one",
            ]
        );
    }
}
