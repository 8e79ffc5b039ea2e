//! Bad days: brokers stopped, paused and gone while others want to write; and the only other copy gone.

use std::time::Duration;

use anyhow::ensure;
use logboom::api::{OffsetSpec, PartitionView, Request, Response};
use logboom::client::{Client, NewTopic, Record};
use logboom::record::ProducerStamp;
use logboom::types::{Acks, BrokerId, Error, Offset, Outcome};
use tokio::time::Instant;

use super::raw::{Raw, batch, partition, produce};
use crate::cluster::{HEAL, create, describe, healed};
use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify, wait_for};

/// Two election timeouts and the leader's lease before them, with room for a busy machine.
const TAKEOVER: Duration = Duration::from_secs(5);

/// How long a client waits for a sign of life on its connection, and then some.
const SILENCE: Duration = Duration::from_secs(5);

async fn view(client: &Client, topic: &str) -> PartitionView {
    let view = describe(client, topic)
        .await
        .unwrap_or_else(|error| panic!("{topic}: {error:#}"));
    view.partitions
        .into_iter()
        .next()
        .unwrap_or_else(|| panic!("{topic} has no partition"))
}

async fn append(client: &Client, topic: &str, acks: Acks) -> Result<Offset, Error> {
    let ack = client
        .topic(topic)?
        .partition(0)
        .append([Record::new("x")], acks)
        .await?;
    Ok(ack.offset)
}

/// Goal: a stopped leader hands over first, a silent one is replaced and comes back without harm, a minimum that is not met
/// refuses before it appends, and a leader that returns knows the producers' numbers. Method: one cluster, one bad day after the
/// other, a numbered workload over the first two, read back and judged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_days_cost_time_and_nothing_else() {
    let builder = ProcessCluster::builder(3).key("preferred_leader_delay_ms", 100);
    let mut cluster = builder.start().await;
    let client = cluster.client().await;
    create(&client, "days", 1, 3, &[]).await;
    create(&client, "strict", 1, 2, &[("min.insync.replicas", "2")]).await;
    healed(&client, "days").await;
    let workload = Workload::start(&client, WorkloadConfig::new("days", 1));
    workload.wait_acked(200, HEAL).await;
    stopped_leader_hands_over(&mut cluster, &client, &workload).await;
    silent_leader_is_replaced(&mut cluster, &client, &workload).await;
    let history = workload.stop().await;
    let verdict = verify(&client, "days", 1, &history).await;
    println!("{verdict}");
    verdict.assert_good(600);
    minimum_is_kept(&mut cluster, &client).await;
    returning_leader_knows_the_numbers(&mut cluster, &client).await;
    let errors = cluster.errors(&[]);
    assert!(errors.is_empty(), "{errors:#?}");
}

async fn stopped_leader_hands_over(
    cluster: &mut ProcessCluster,
    client: &Client,
    workload: &Workload,
) {
    let leader = view(client, "days").await.leader.expect("a leader");
    let began = Instant::now();
    let before = workload.acked();
    cluster.signal(leader.0, rustix::process::Signal::TERM);
    // The longest time in which nothing more was acknowledged, until well after the process has ended.
    let (mut last, mut seen, mut silence) = (began, before, Duration::ZERO);
    let mut ended = None;
    while ended.is_none_or(|at: Instant| at.elapsed() < Duration::from_millis(1_500)) {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let acked = workload.acked();
        if acked > seen {
            silence = silence.max(last.elapsed());
            (last, seen) = (Instant::now(), acked);
        }
        if ended.is_none() && !cluster.is_process_there(leader.0) {
            ended = Some(Instant::now());
        }
        assert!(began.elapsed() < HEAL, "it does not end");
    }
    silence = silence.max(last.elapsed());
    let status = cluster.ended(leader.0).await;
    assert_eq!(status.code(), Some(0), "{}", cluster.log(leader.0));
    println!("stopped leader: longest silence {silence:?}");
    assert!(
        silence < Duration::from_secs(2),
        "{silence:?} without an acknowledgement"
    );
    // By a transfer, while it was there; not by an election when it had gone.
    let log = cluster.log(leader.0);
    assert!(log.contains("leaderships are handed over stay=0"), "{log}");
    cluster.restart(leader.0).await;
    healed(client, "days").await;
}

async fn silent_leader_is_replaced(
    cluster: &mut ProcessCluster,
    client: &Client,
    workload: &Workload,
) {
    let leader = view(client, "days").await.leader.expect("a leader");
    let silent = Raw::open(cluster.address(leader.0)).await;
    let others: Vec<u32> = cluster
        .ids()
        .into_iter()
        .filter(|id| *id != leader.0)
        .collect();
    let target = partition("days", 0);
    cluster.pause(leader.0).await;
    let began = Instant::now();
    // Whoever waits for the silent one is told so by the deadline.
    let asked = silent.ask_within(
        Request::FindOffset {
            partition: target.clone(),
            spec: OffsetSpec::Latest,
        },
        Duration::from_secs(1),
    );
    let (told, elsewhere) = tokio::join!(asked, async {
        let mut slowest = Duration::ZERO;
        for id in &others {
            let raw = Raw::open(cluster.address(*id)).await;
            let asked = Instant::now();
            // Not yet replaced, it may only say so; but it says it.
            let spec = OffsetSpec::LinearizableEnd;
            let request = Request::FindOffset {
                partition: target.clone(),
                spec,
            };
            drop(raw.ask_within(request, Duration::from_secs(1)).await);
            drop(
                raw.ask_within(
                    Request::DescribeTopics { topics: None },
                    Duration::from_secs(1),
                )
                .await,
            );
            slowest = slowest.max(asked.elapsed());
        }
        slowest
    });
    assert!(
        matches!(
            told,
            Err(Error::Timeout { .. } | Error::ConnectionLost { .. })
        ),
        "{told:?}"
    );
    assert!(
        elsewhere < Duration::from_secs(3),
        "answered after {elsewhere:?}"
    );
    // A new leader answers for everything acknowledged.
    let took = wait_for("a new leader", HEAL, async || {
        for id in &others {
            let raw = Raw::open(cluster.address(*id)).await;
            let spec = OffsetSpec::LinearizableEnd;
            let request = Request::FindOffset {
                partition: target.clone(),
                spec,
            };
            if raw
                .ask_within(request, Duration::from_secs(1))
                .await
                .is_ok()
            {
                return Ok(began.elapsed());
            }
        }
        anyhow::bail!("none yet")
    })
    .await;
    let acked = workload.acked();
    wait_for(
        "acknowledgements without the silent broker",
        HEAL,
        async || {
            ensure!(workload.acked() > acked + 200, "{}", workload.acked());
            Ok(())
        },
    )
    .await;
    let clients = began.elapsed();
    println!(
        "silent leader: a new one after {took:?}, clients that wrote to it go on after {clients:?}, \
         others answered within {elsewhere:?}"
    );
    assert!(took < TAKEOVER, "{took:?}");
    assert!(clients < TAKEOVER + SILENCE, "{clients:?}");
    let now = wait_for("a new leader in the descriptions", HEAL, async || {
        let view = describe(client, "days").await?;
        let view = view.partitions.into_iter().next();
        view.filter(|view| view.leader.is_some_and(|now| now != leader))
            .ok_or_else(|| anyhow::anyhow!("still the old one"))
    })
    .await;
    assert!(!now.isr.contains(&leader), "{now:?}");
    cluster.cont(leader.0);
    workload.wait_acked(200, HEAL).await;
    healed(client, "days").await;
}

/// With two copies and a witness, one copy gone, `min.insync.replicas=2`: refused before anything is appended; `acks=leader`
/// goes on, because a majority is there.
async fn minimum_is_kept(cluster: &mut ProcessCluster, client: &Client) {
    let before = healed(client, "strict")
        .await
        .remove(&0)
        .expect("partition 0");
    let leader = before.leader.expect("a leader");
    let follower = before.replicas.get(1).expect("a follower").broker;
    assert_eq!(append(client, "strict", Acks::All).await, Ok(Offset(0)));
    cluster.kill_9(follower.0).await;
    wait_for("the dead follower to leave the ISR", HEAL, async || {
        let view = describe(client, "strict").await?;
        let isr = view
            .partitions
            .first()
            .map(|view| view.isr.clone())
            .unwrap_or_default();
        ensure!(isr == [leader], "{isr:?}");
        Ok(())
    })
    .await;
    let raw = Raw::open(cluster.address(leader.0)).await;
    let target = partition("strict", 0);
    let refused = raw
        .ask(produce(&target, Acks::All, batch(&[b"x"], None)))
        .await;
    let Err(error) = refused else {
        panic!("{refused:?}")
    };
    assert!(
        matches!(
            error,
            Error::NotEnoughReplicas {
                in_sync: 1,
                min: 2,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(
        (error.outcome(), error.is_retriable()),
        (Outcome::NotDone, true)
    );
    assert_eq!(append(client, "strict", Acks::Leader).await, Ok(Offset(1)));
    let words = ["produce", "strict", "--acks", "leader"];
    crate::support::command::run(&cluster.bootstrap(), &words, b"from the command line\n")
        .await
        .good();
    cluster.restart(follower.0).await;
    healed(client, "strict").await;
    assert_eq!(append(client, "strict", Acks::All).await, Ok(Offset(3)));
}

/// A replica that comes back after a trim, by log or by snapshot, knows which batches the producers have sent: it leads, and an old batch sent again
/// is not appended twice.
async fn returning_leader_knows_the_numbers(cluster: &mut ProcessCluster, client: &Client) {
    create(client, "numbers", 1, 3, &[]).await;
    let before = healed(client, "numbers")
        .await
        .remove(&0)
        .expect("partition 0");
    let leader = before.leader.expect("a leader");
    let target = partition("numbers", 0);
    let stamped = |sequence| {
        let stamp = ProducerStamp {
            id: 4_711,
            epoch: 0,
            base_sequence: sequence,
        };
        produce(&target, Acks::All, batch(&[b"once"], Some(stamp)))
    };
    cluster.kill_9(leader.0).await;
    let other = wait_for("another leader", HEAL, async || {
        let view = describe(client, "numbers").await?;
        let now = view.partitions.first().and_then(|view| view.leader);
        now.filter(|now| *now != leader)
            .ok_or_else(|| anyhow::anyhow!("none yet"))
    })
    .await;
    let raw = Raw::open(cluster.address(other.0)).await;
    wait_for("the new leader to serve", HEAL, async || {
        match raw.ask(stamped(0)).await {
            Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    })
    .await;
    for sequence in 1..50 {
        let answer = raw.ask(stamped(sequence)).await;
        assert!(
            matches!(answer, Ok(Response::Produced(_))),
            "{sequence}: {answer:?}"
        );
    }
    let trimmed = raw
        .ask(Request::Trim {
            partition: target.clone(),
            offset: Offset(48),
        })
        .await;
    assert_eq!(trimmed, Ok(Response::Trimmed(Offset(48))));
    cluster.restart(leader.0).await;
    let after = healed(client, "numbers")
        .await
        .remove(&0)
        .expect("partition 0");
    assert_eq!(after.leader, Some(leader));
    assert_eq!(
        (after.start_offset, after.end_offset),
        (Some(Offset(48)), Some(Offset(50)))
    );
    let by = cluster.log(leader.0).contains("installed a snapshot");
    println!("came back by {}", if by { "a snapshot" } else { "the log" });
    let back = Raw::open(cluster.address(leader.0)).await;
    for (sequence, offset) in [(49, 49), (48, 48), (46, 46)] {
        match back.ask(stamped(sequence)).await {
            Ok(Response::Produced(appended)) => {
                let [one] = appended.as_slice() else {
                    panic!("{appended:?}")
                };
                assert_eq!((one.base_offset, one.duplicate), (Offset(offset), true));
            }
            other => panic!("{sequence}: {other:?}"),
        }
    }
    // One so old that nobody knows its offset any more is refused, not appended.
    let old = back.ask(stamped(0)).await;
    assert!(
        matches!(old, Err(Error::OutOfOrderSequence { .. })),
        "{old:?}"
    );
    assert_eq!(view(client, "numbers").await.end_offset, Some(Offset(50)));
    let fetched = Request::Fetch {
        partition: target.clone(),
        offset: Offset(0),
        max_bytes: 1 << 20,
        min_bytes: 0,
        max_wait_ms: 0,
    };
    let below = back.ask(fetched).await;
    let range = Error::OffsetOutOfRange {
        partition: target.clone(),
        requested: Offset(0),
        start: Offset(48),
        end: Offset(50),
    };
    assert_eq!(below, Err(range));
}

/// Goal: two copies on two brokers cannot fail over; the user is told when the topic is made, it refuses when one is gone and
/// comes back with it. Method: two brokers, one killed, restarted, then the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_brokers_refuse_when_one_is_gone_and_come_back() {
    let builder = ProcessCluster::builder(2).key("preferred_leader_delay_ms", 100);
    let mut cluster = builder.start().await;
    let client = cluster.client().await;
    let created = client
        .admin()
        .create_topic(NewTopic::new("pair", 1, 2))
        .await;
    let warnings = created.unwrap_or_else(|error| panic!("{error}")).warnings;
    let [warning] = warnings.as_slice() else {
        panic!("{warnings:?}")
    };
    assert!(
        warning.contains("witness") || warning.contains("fail over"),
        "{warning}"
    );
    let made = crate::support::command::run(
        &cluster.bootstrap(),
        &[
            "topic",
            "create",
            "told",
            "--partitions",
            "1",
            "--replication-factor",
            "2",
        ],
        b"",
    )
    .await
    .good();
    let made = String::from_utf8_lossy(&made).into_owned();
    assert!(made.starts_with("created told\nwarning: "), "{made}");
    let view = healed(&client, "pair")
        .await
        .remove(&0)
        .expect("partition 0");
    assert_eq!(view.witness, None);
    assert_eq!(append(&client, "pair", Acks::All).await, Ok(Offset(0)));
    let mut expected = 1;
    let [first, second]: [BrokerId; 2] = [view.replicas[0].broker, view.replicas[1].broker];
    for (victim, survivor) in [(second, first), (first, second)] {
        cluster.kill_9(victim.0).await;
        let raw = Raw::open(cluster.address(survivor.0)).await;
        let target = partition("pair", 0);
        let asked = Instant::now();
        let deadline = Duration::from_secs(2);
        for acks in [Acks::All, Acks::Leader] {
            let answer = raw
                .ask_within(produce(&target, acks, batch(&[b"y"], None)), deadline)
                .await;
            let Err(error) = answer else {
                panic!("acknowledged by one of two: {answer:?}")
            };
            println!("{acks:?} with one of two: {error}");
        }
        assert!(asked.elapsed() < 3 * deadline, "{:?}", asked.elapsed());
        cluster.restart(victim.0).await;
        healed(&client, "pair").await;
        // What was refused as unknown may be there or not; what comes now is behind it.
        let offset = append(&client, "pair", Acks::All)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        assert!((expected..=expected + 2).contains(&offset.0), "{offset}");
        expected = offset.0 + 1;
    }
    let read = client
        .topic("pair")
        .expect("a topic")
        .partition(0)
        .read(Offset(0), 1 << 20)
        .await;
    let read = read.unwrap_or_else(|error| panic!("{error}")).records;
    assert_eq!(u64::try_from(read.len()), Ok(expected), "dense from 0");
    let errors = cluster.errors(&[]);
    assert!(errors.is_empty(), "{errors:#?}");
}
