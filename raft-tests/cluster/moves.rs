//! Replicas moved to other brokers under load: what was acknowledged stays, and what was moved away is gone.

use std::time::Duration;

use anyhow::ensure;
use logboom::api::PartitionView;
use logboom::client::{Client, NewTopic};
use logboom::types::{BrokerId, Error, PartitionId, TopicName, TopicPartition};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::cluster::{HEAL, create, describe, healed, seed};
use crate::support::command::{run, spawn};
use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify, wait_for};

const TOPIC: &str = "moves";

fn partition() -> TopicPartition {
    TopicPartition {
        topic: TopicName::new(TOPIC).unwrap_or_else(|error| panic!("{error}")),
        partition: PartitionId(0),
    }
}

fn ids(brokers: &[u32]) -> Vec<BrokerId> {
    brokers.iter().copied().map(BrokerId).collect()
}

/// A topic of one partition on `brokers`, led by the first.
async fn create_on(client: &Client, brokers: &[u32], config: &[(&str, &str)]) {
    let factor = u32::try_from(brokers.len()).unwrap_or(0);
    let mut topic = NewTopic::new(TOPIC, 1, factor);
    topic.assignment = vec![ids(brokers)];
    for (key, value) in config {
        topic = topic.with_config(key, value);
    }
    let created = client.admin().create_topic(topic).await;
    created.unwrap_or_else(|error| panic!("{error}"));
    at_rest(client, brokers).await;
}

async fn view(client: &Client) -> anyhow::Result<PartitionView> {
    Ok(describe(client, TOPIC).await?.partitions.remove(0))
}

/// Begins a move, as often as it takes: the controller may be on its way to another broker.
async fn reassign(client: &Client, to: &[u32]) {
    wait_for("the move to be decided", HEAL, async || {
        Ok(client.admin().reassign(partition(), ids(to)).await?)
    })
    .await;
}

/// Waits until exactly `brokers` have the partition, all of them in sync, the first one leading, and nothing is under way.
async fn at_rest(client: &Client, brokers: &[u32]) -> PartitionView {
    wait_for(&format!("{TOPIC} to be on {brokers:?}"), HEAL, async || {
        let view = view(client).await?;
        let there: Vec<BrokerId> = view.replicas.iter().map(|one| one.broker).collect();
        ensure!(there == ids(brokers), "{view:?}");
        ensure!(!view.reassigning, "{view:?}");
        ensure!(
            view.adding.is_empty() && view.removing.is_empty(),
            "{view:?}"
        );
        ensure!(view.isr.len() == brokers.len(), "{view:?}");
        ensure!(view.leader == there.first().copied(), "{view:?}");
        Ok(view)
    })
    .await
}

/// Begins a move that cannot end: broker `held` stands still from before it. Returns when the move is seen under way.
async fn begin_held(
    cluster: &mut ProcessCluster,
    client: &Client,
    held: u32,
    to: &[u32],
) -> PartitionView {
    for _ in 0..5 {
        cluster.pause(held).await;
        match client.admin().reassign(partition(), ids(to)).await {
            Ok(_) => return adding(client, held).await,
            Err(error) => println!("again: {error}"), // it was missed already
        }
        cluster.cont(held);
        cluster.wait_alive(HEAL).await;
    }
    panic!("broker {held} is missed before a move to it can begin");
}

/// Waits until a move is seen under way that adds a replica on `broker`.
async fn adding(client: &Client, broker: u32) -> PartitionView {
    wait_for(
        &format!("a replica on {broker} to be added"),
        HEAL,
        async || {
            let view = view(client).await?;
            ensure!(
                view.reassigning && view.adding.contains(&BrokerId(broker)),
                "{view:?}"
            );
            Ok(view)
        },
    )
    .await
}

async fn controller(client: &Client) -> u32 {
    wait_for("a controller", HEAL, async || {
        let status = client.admin().cluster_status().await?;
        status
            .controller
            .map(|broker| broker.0)
            .ok_or_else(|| anyhow::anyhow!("none"))
    })
    .await
}

/// Stops the workload, reads everything back, and judges.
async fn judge(cluster: &ProcessCluster, client: &Client, workload: Workload, acked: usize) {
    workload.wait_acked(100, HEAL).await;
    let history = workload.stop().await;
    let verdict = verify(client, TOPIC, 1, &history).await;
    println!("{verdict}longest silence {:?}", history.longest_silence(0));
    verdict.assert_good(acked);
    let errors = cluster.errors(&[]);
    assert!(errors.is_empty(), "{errors:#?}");
}

/// How many groups have a log in a broker's directory; the broker does not run.
fn groups(cluster: &ProcessCluster, broker: u32) -> usize {
    let report = logboom::storage::fsck(cluster.data_dir(broker));
    assert_eq!(report.verdict, logboom::storage::Verdict::Ok, "{report:?}");
    report.groups
}

/// Goal: three copies go from brokers 1, 2, 3 to 2, 3, 4, and on to 4, 5, 1, while they are written to with all three copies asked
/// for: no acknowledged record is missing, the old copies go on alone as long as a new one is missing, the ISR never shrinks,
/// the leader moves to the first new one, and who was left has nothing left. Method: a numbered workload with
/// `min.insync.replicas=3`; in each move one of the new brokers stands still at first; the ISR is watched until the move has
/// ended; the directories are searched after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_copies_move_under_load() {
    // No preferred leader is put in place meanwhile: the move itself takes the leadership away from the old one.
    let mut cluster = ProcessCluster::builder(5)
        .key("preferred_leader_delay_ms", 60_000)
        .start()
        .await;
    let client = cluster.client().await;
    create_on(&client, &[1, 2, 3], &[("min.insync.replicas", "3")]).await;
    let workload = Workload::start(&client, WorkloadConfig::new(TOPIC, 1));
    for (to, held, leaving) in [([2, 3, 4], 4, &[1][..]), ([4, 5, 1], 5, &[2, 3])] {
        workload.wait_acked(1_000, HEAL).await;
        let before = view(&client)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        let moving = begin_held(&mut cluster, &client, held, &to).await;
        assert_eq!(moving.removing, ids(leaving), "{moving:?}");
        workload.wait_acked(500, HEAL).await;
        let still = view(&client)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            (still.epoch, still.isr.len()),
            (before.epoch, 3),
            "{still:?}"
        );
        cluster.cont(held);
        wait_for("the move to end", HEAL, async || {
            let view = view(&client).await?;
            if view.epoch == before.epoch {
                assert!(view.isr.len() >= 3, "fewer copies in sync: {view:?}");
            }
            ensure!(!view.reassigning, "{view:?}");
            Ok(())
        })
        .await;
        let moved = at_rest(&client, &to).await;
        assert!(moved.epoch > before.epoch, "{moved:?}");
        // asking again changes nothing
        reassign(&client, &to).await;
        assert_eq!(at_rest(&client, &to).await.epoch, moved.epoch);
    }
    for left in [2, 3] {
        cluster.stop(left).await;
        assert_eq!(
            groups(&cluster, left),
            1,
            "only the controller's group is left"
        );
        cluster.restart(left).await;
    }
    judge(&cluster, &client, workload, 3_000).await;
}

/// Goal: the command line moves a partition, shows how far it is, and says what is wrong. Method: look at a move that stands
/// still, wait for it as a person does, ask again as a script.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_moves_a_partition() {
    let mut cluster = ProcessCluster::start_brokers(4).await;
    let client = cluster.client().await;
    create_on(&client, &[1, 2, 3], &[]).await;
    begin_held(&mut cluster, &client, 4, &[2, 3, 4]).await;
    let bootstrap = cluster.bootstrap();
    let reassign = async |more: &[&str]| {
        let mut words = vec!["topic", "reassign", TOPIC, "--partition", "0"];
        words.extend(more);
        run(&bootstrap, &words, b"").await
    };
    let text = |out: Vec<u8>| String::from_utf8_lossy(&out).into_owned();
    let describe = ["topic", "describe", TOPIC];
    let shown = text(run(&bootstrap, &describe, b"").await.good());
    assert!(
        shown.contains("MOVING") && shown.contains("+4,-1"),
        "{shown}"
    );
    cluster.cont(4);
    let said = text(reassign(&["--replicas", "2,3,4", "--wait"]).await.good());
    assert_eq!(said.lines().last(), Some("moves-0 is on 2,3,4"), "{said}");
    at_rest(&client, &[2, 3, 4]).await;
    let shown = text(run(&bootstrap, &describe, b"").await.good());
    assert!(!shown.contains("MOVING"), "{shown}");
    let said = text(reassign(&["--cancel", "--wait", "--json"]).await.good());
    let said: Value = serde_json::from_str(&said).unwrap_or_default();
    assert_eq!(said["replicas"], serde_json::json!([2, 3, 4]), "{said}");
    assert_eq!(said["reassigning"], false, "{said}");
    let said = reassign(&["--replicas", "2,2"]).await;
    said.refused(1, &["broker 2 is named twice"]);
    let said = text(reassign(&["--replicas", "1,3,4"]).await.good());
    assert_eq!(said, "moves-0 moves to 1,3,4\n");
    at_rest(&client, &[1, 3, 4]).await;
    // Nothing to do is not called a move, nor the end of one.
    for nothing in [&["--cancel"] as &[&str], &["--replicas", "1,3,4"]] {
        let said = text(reassign(nothing).await.good());
        assert_eq!(said, "moves-0 is on 1,3,4\n", "{nothing:?}");
    }
}

/// Goal: two copies and a witness go from 1, 2 (and 3) to 3, 1 (and 2) on three brokers, where the witness is in the way, with
/// nothing lost; then any one of the new copies may die. Method: the move under load, kill each of the two after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_copies_and_a_witness_change_places_under_load() {
    let mut cluster = ProcessCluster::start_brokers(3).await;
    let client = cluster.client().await;
    create_on(&client, &[1, 2], &[]).await;
    // As fast as it goes: the witness, fed what the others have confirmed, is always behind.
    let load = WorkloadConfig {
        pause: Duration::ZERO,
        in_flight: 2_000,
        ..WorkloadConfig::new(TOPIC, 1)
    };
    let workload = Workload::start(&client, load);
    workload.wait_acked(1_000, HEAL).await;
    let warnings = client.admin().reassign(partition(), ids(&[3, 1])).await;
    let warnings = warnings.unwrap_or_else(|error| panic!("{error}"));
    assert!(
        matches!(warnings.as_slice(), [one] if one.contains("the witness on broker 3 has to go")),
        "{warnings:?}"
    );
    let moved = at_rest(&client, &[3, 1]).await;
    assert_eq!(moved.witness, Some(BrokerId(2)), "{moved:?}");
    for victim in [3, 1] {
        workload.wait_acked(200, HEAL).await;
        cluster.kill_9(victim).await;
        workload.wait_acked(200, HEAL).await;
        cluster.restart(victim).await;
        at_rest(&client, &[3, 1]).await;
    }
    judge(&cluster, &client, workload, 1_500).await;
}

/// Goal: a move outlives the death of the new replica's broker, of the old leader, and of the controller in the middle of it.
/// Method: broker 4 is held still, so that the move to it is under way when the victim is killed; each move ends after the
/// restart. The victim is killed under load, and so is broker 4 itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_outlives_the_death_of_those_it_needs() {
    let mut cluster = ProcessCluster::builder(5)
        .key("preferred_leader_delay_ms", 100)
        .start()
        .await;
    let client = cluster.client().await;
    create_on(&client, &[1, 2, 3], &[]).await;
    let workload = Workload::start(&client, WorkloadConfig::new(TOPIC, 1));
    for who in ["the new replica", "the old leader", "the controller"] {
        workload.wait_acked(300, HEAL).await;
        begin_held(&mut cluster, &client, 4, &[2, 3, 4]).await;
        let victim = match who {
            "the new replica" => 4,
            "the old leader" => 1,
            _ => controller(&client).await,
        };
        println!("{who}: broker {victim}");
        cluster.kill_9(victim).await;
        workload.wait_acked(300, HEAL).await;
        if victim != 4 {
            cluster.cont(4);
        }
        cluster.restart(victim).await;
        at_rest(&client, &[2, 3, 4]).await;
        workload.wait_acked(100, HEAL).await;
        reassign(&client, &[1, 2, 3]).await;
        at_rest(&client, &[1, 2, 3]).await;
    }
    judge(&cluster, &client, workload, 1_500).await;
}

/// Goal: a broker that was away while its replica was moved off it comes back, deletes its copy and disturbs nobody. Method:
/// kill broker 1, move its replica to broker 4 without it, restart it under load: same leader and epoch, nothing stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_broker_that_returns_disturbs_nobody() {
    let mut cluster = ProcessCluster::start_brokers(4).await;
    let client = cluster.client().await;
    create_on(&client, &[2, 1, 3], &[]).await;
    let workload = Workload::start(&client, WorkloadConfig::new(TOPIC, 1));
    workload.wait_acked(500, HEAL).await;
    cluster.kill_9(1).await;
    reassign(&client, &[2, 4, 3]).await;
    let moved = at_rest(&client, &[2, 4, 3]).await;
    workload.wait_acked(500, HEAL).await;
    cluster.restart(1).await;
    workload.wait_acked(2_000, HEAL).await;
    let after = at_rest(&client, &[2, 4, 3]).await;
    assert_eq!((after.leader, after.epoch), (moved.leader, moved.epoch));
    cluster.stop(1).await;
    assert_eq!(
        groups(&cluster, 1),
        1,
        "only the controller's group is left"
    );
    judge(&cluster, &client, workload, 3_000).await;
}

/// Goal: a move to a broker that does not answer can be taken back or sent elsewhere, and costs nothing. Method: broker 4 stands
/// still; cancel, then redirect to broker 5; impossible wishes are refused with the way out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_cannot_end_is_cancelled_or_redirected() {
    let mut cluster = ProcessCluster::start_brokers(5).await;
    let client = cluster.client().await;
    let admin = client.admin();
    create_on(&client, &[1, 2, 3], &[]).await;
    for (to, text) in [
        (&[][..], "name the brokers"),
        (&[1, 1], "named twice"),
        (&[1, 2, 9], "not registered; start it"),
        (&[1, 2, 3, 4, 5, 6], "use 1 to 5"),
    ] {
        let refused = admin.reassign(partition(), ids(to)).await;
        let refused = refused.expect_err("an impossible move").to_string();
        assert!(refused.contains(text), "{refused}");
    }
    let mut nowhere = partition();
    nowhere.partition = PartitionId(7);
    let refused = admin.reassign(nowhere, ids(&[1])).await;
    assert!(
        matches!(refused, Err(Error::UnknownPartition { .. })),
        "{refused:?}"
    );
    let workload = Workload::start(&client, WorkloadConfig::new(TOPIC, 1));
    workload.wait_acked(300, HEAL).await;
    begin_held(&mut cluster, &client, 4, &[4, 2, 3]).await;
    let cancelled = admin.cancel_reassignment(partition()).await;
    cancelled.unwrap_or_else(|error| panic!("{error}"));
    at_rest(&client, &[1, 2, 3]).await;
    cluster.cont(4);
    cluster.wait_alive(HEAL).await;
    begin_held(&mut cluster, &client, 4, &[4, 2, 3]).await;
    reassign(&client, &[5, 2, 3]).await;
    at_rest(&client, &[5, 2, 3]).await;
    cluster.cont(4);
    workload.wait_acked(300, HEAL).await;
    cluster.stop(1).await;
    cluster.stop(4).await;
    for broker in [1, 4] {
        assert_eq!(
            groups(&cluster, broker),
            1,
            "broker {broker} has nothing left"
        );
    }
    judge(&cluster, &client, workload, 900).await;
}

/// Goal: a broker is emptied of copies, leaderships and witnesses under load, and can be stopped for good. Method: drain broker 1,
/// and then 2, of partitions with three copies and with two and a witness; on too few brokers it says so, and of what cannot leave because its only
/// copy is on a dead broker as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_is_drained_under_load() {
    let mut cluster = ProcessCluster::start_brokers(5).await;
    let client = cluster.client().await;
    create(&client, TOPIC, 5, 3, &[]).await;
    create(&client, "moves-two", 5, 2, &[]).await;
    let workload = Workload::start(&client, WorkloadConfig::new(TOPIC, 5));
    let second = WorkloadConfig {
        writer: 2,
        ..WorkloadConfig::new("moves-two", 5)
    };
    let second = Workload::start(&client, second);
    let bootstrap = cluster.bootstrap();
    for broker in [1, 2] {
        workload.wait_acked(500, HEAL).await;
        second.wait_acked(500, HEAL).await;
        let number = broker.to_string();
        let form = if broker == 1 { None } else { Some("--json") };
        let words: Vec<&str> = ["cluster", "drain", &number]
            .into_iter()
            .chain(form)
            .collect();
        let said = run(&bootstrap, &words, b"").await;
        assert_eq!(said.code, Some(0), "{said:?}");
        let said = String::from_utf8_lossy(&said.out).into_owned();
        if form.is_some() {
            let said: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}"));
            let begun = said["begun"].as_array().expect("a list");
            assert!(!begun.is_empty() && begun[0]["topic"].is_string(), "{said}");
            let end = json!({"broker": broker, "begun": begun, "remaining": 0, "stuck": []});
            assert_eq!(said, end);
        } else {
            let last = format!("broker {broker} holds no partition any more and can be stopped");
            assert_eq!(said.lines().last(), Some(last.as_str()), "{said}");
        }
        cluster.stop(broker).await;
        assert_eq!(
            groups(&cluster, broker),
            1,
            "only the controller's group is left"
        );
    }
    for topic in [TOPIC, "moves-two"] {
        healed(&client, topic).await;
    }
    // Three are left, and every topic needs three.
    cluster.wait_alive(HEAL).await;
    let said = run(&bootstrap, &["cluster", "drain", "3", "--json"], b"").await;
    assert_eq!(said.code, Some(1), "{said:?}");
    let told: Value = serde_json::from_slice(&said.out).unwrap_or_else(|error| panic!("{error}"));
    let stuck = told["stuck"].as_array().expect("a list");
    assert_eq!(
        (&told["remaining"], stuck.len()),
        (&10.into(), 10),
        "{told}"
    );
    assert!(
        stuck[0]["reason"]
            .as_str()
            .is_some_and(|why| why.contains("add one")),
        "{told}"
    );
    assert!(said.err.contains("cannot leave broker 3"), "{said:?}");
    for (topic, number) in [TOPIC, "moves-two"]
        .iter()
        .flat_map(|topic| (0..5).map(move |n| (topic, n)))
    {
        let name = format!("{topic}-{number}");
        assert!(said.err.contains(&name), "{name}: {said:?}");
    }
    let (history, two) = (workload.stop().await, second.stop().await);
    verify(&client, TOPIC, 5, &history).await.assert_good(1_000);
    verify(&client, "moves-two", 5, &two)
        .await
        .assert_good(1_000);
    what_does_not_leave_is_told(&mut cluster, &client).await;
    let errors = cluster.errors(&[]);
    assert!(errors.is_empty(), "{errors:#?}");
}

/// A partition whose only copy is on a dead broker cannot leave it, and the command says so while it waits.
async fn what_does_not_leave_is_told(cluster: &mut ProcessCluster, client: &Client) {
    cluster.restart(1).await;
    cluster.wait_alive(HEAL).await;
    let mut alone = NewTopic::new("alone", 1, 1);
    alone.assignment = vec![ids(&[1])];
    let created = client.admin().create_topic(alone).await;
    created.unwrap_or_else(|error| panic!("{error}"));
    cluster.kill_9(1).await;
    let bootstrap = cluster.bootstrap();
    let mut drain = spawn(&bootstrap, &["cluster", "drain", "1", "--json"]);
    let mut lines = BufReader::new(drain.stderr.take().expect("its errors")).lines();
    let expected =
        "logboom: waiting for 1 partitions to leave broker 1, because alone-0 has no leader";
    let told = tokio::time::timeout(HEAL, async {
        loop {
            let line = lines.next_line().await.expect("a line").expect("it waits");
            if line == expected {
                return;
            }
        }
    });
    told.await.expect("it says what it waits for");
    drain.kill().await.expect("it runs");
}

async fn random_moves(name: &str, brokers: u32, factor: usize, moves: usize) {
    let seed = seed();
    println!("replay: SEED={seed} cargo test --test system {name}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut cluster = ProcessCluster::builder(brokers)
        .key("preferred_leader_delay_ms", 100)
        .start()
        .await;
    let client = cluster.client().await;
    let mut all: Vec<u32> = (1..=brokers).collect();
    let mut to: Vec<u32> = all.iter().copied().take(factor).collect();
    create_on(&client, &to, &[]).await;
    let workload = Workload::start(&client, WorkloadConfig::new(TOPIC, 1));
    for number in 0..moves {
        workload
            .wait_acked(random.random_range(20..300), HEAL)
            .await;
        all.shuffle(&mut random);
        let from = std::mem::replace(&mut to, all.iter().copied().take(factor).collect());
        let victim = random.random_range(1..=brokers);
        let delay = Duration::from_millis(random.random_range(0..600));
        println!("{number}: {from:?} to {to:?}, broker {victim} killed after {delay:?}");
        reassign(&client, &to).await;
        tokio::time::sleep(delay).await; // a moment of the move, not a fact to wait for
        cluster.kill_9(victim).await;
        let is_cancelled: bool = random.random();
        if is_cancelled {
            wait_for("the move to be cancelled", HEAL, async || {
                Ok(client.admin().cancel_reassignment(partition()).await?)
            })
            .await;
        }
        cluster.restart(victim).await;
        if is_cancelled {
            to = wait_for("the move to end somewhere", HEAL, async || {
                let view = view(&client).await?;
                let there: Vec<u32> = view.replicas.iter().map(|one| one.broker.0).collect();
                ensure!(
                    !view.reassigning && (there == from || there == to),
                    "{view:?}"
                );
                Ok(there)
            })
            .await;
        }
        at_rest(&client, &to).await;
    }
    judge(&cluster, &client, workload, moves * 50).await;
}

/// Goal: any broker may die at any moment of any move of three copies. Method: 15 random moves on five brokers under load, some
/// of them cancelled, in each a random broker killed at a random moment and restarted; everything is read back and judged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acked_records_survive_random_kills_during_moves_of_three_copies() {
    let name = "acked_records_survive_random_kills_during_moves_of_three_copies";
    random_moves(name, 5, 3, 15).await;
}

/// Goal: the same with two copies and a witness, which is often in the way. Method: as with three copies, on four brokers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acked_records_survive_random_kills_during_moves_of_two_copies_and_a_witness() {
    let name = "acked_records_survive_random_kills_during_moves_of_two_copies_and_a_witness";
    random_moves(name, 4, 2, 15).await;
}
