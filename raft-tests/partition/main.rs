//! Partitions over real raft groups, sockets and stores, in one process.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs
)]

#[allow(dead_code, unreachable_pub, clippy::match_wild_err_arm)] // shared with the raft suite, which uses all of it
#[path = "../raft/support.rs"]
mod raft_support;
mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use logboom::api::{Appended, OffsetSpec, Response};
use logboom::config::TopicConfig;
use logboom::record::{ProducerStamp, batches};
use logboom::types::{Acks, BrokerId, Error, LogIndex, Offset, Outcome};
use tokio::time::Instant;

use raft_support::{PATIENCE, data, set, soon, until, witness};
use support::{World, batch, deadline, offsets, records, values};

fn stamp(base_sequence: i32) -> ProducerStamp {
    ProducerStamp {
        id: 5,
        epoch: 0,
        base_sequence,
    }
}

/// Goal: what is appended is read back, at its place, in whole batches from the one that holds the offset on, and no more than asked for
/// but for the first batch. Method: three batches in three entries, fetched from several offsets and with several limits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_are_read_back_at_their_place() {
    let world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let mut sizes = Vec::new();
    for (n, texts) in [&["a", "b", "c"][..], &["d"], &["e", "f"]]
        .into_iter()
        .enumerate()
    {
        let sent = batch(texts, None);
        sizes.push(u32::try_from(sent.len()).unwrap());
        let appended = world.append(sent, Acks::All).await.unwrap();
        let [
            Appended {
                base_offset,
                count,
                leader_epoch,
                durable_on,
                duplicate,
            },
        ] = &appended[..]
        else {
            panic!("{appended:?}");
        };
        assert_eq!(*base_offset, Offset([0, 3, 4][n]));
        assert_eq!((*count as usize, *duplicate), (texts.len(), false));
        assert_eq!(*leader_epoch, world.leader().view().epoch);
        assert!(durable_on.len() >= 2, "{durable_on:?}");
    }
    let epoch = i32::try_from(world.leader().view().epoch.0).unwrap();
    let cases = [
        (0, u32::MAX, vec![0, 1, 2, 3, 4, 5]),
        (1, u32::MAX, vec![0, 1, 2, 3, 4, 5]),
        (3, u32::MAX, vec![3, 4, 5]),
        (5, u32::MAX, vec![4, 5]),
        (6, u32::MAX, vec![]),
        (0, 1, vec![0, 1, 2]),
        (0, sizes[0] + sizes[1], vec![0, 1, 2, 3]),
        (0, sizes[0] + sizes[1] + sizes[2] - 1, vec![0, 1, 2, 3]),
    ];
    for (from, max_bytes, expected) in cases {
        let found = world
            .fetch_with(from, max_bytes, 0, Duration::ZERO)
            .await
            .unwrap();
        assert_eq!(
            offsets(&found),
            expected,
            "from {from}, at most {max_bytes} bytes"
        );
        let Response::Fetched {
            start_offset,
            high_watermark,
            ..
        } = &found
        else {
            panic!("{found:?}")
        };
        assert_eq!((*start_offset, *high_watermark), (Offset(0), Offset(6)));
        for found in batches(&records(&found)) {
            assert_eq!(found.unwrap().header().leader_epoch, epoch);
        }
    }
    assert_eq!(
        values(&world.fetch(0).await.unwrap()),
        ["a", "b", "c", "d", "e", "f"]
    );
    let beyond = world.fetch(7).await;
    assert!(
        matches!(beyond, Err(Error::OffsetOutOfRange { end: Offset(6), .. })),
        "{beyond:?}"
    );
    world.stop().await;
}

/// Goal: a reader waits for what is not there yet, no longer than it said, and sees it as soon as it is. Method: fetch at the end,
/// alone; then append while one waits, and while one waits for more bytes than come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_waits_for_records() {
    let world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let empty = world
        .fetch_with(0, 1 << 20, 1, Duration::from_millis(20))
        .await
        .unwrap();
    assert_eq!(offsets(&empty), Vec::<u64>::new());
    let waits = world.fetch_with(0, 1 << 20, 1, PATIENCE);
    let appends = world.append(batch(&["a"], None), Acks::Leader);
    let (found, appended) = soon("both", async { tokio::join!(waits, appends) }).await;
    assert_eq!(appended.unwrap()[0].base_offset, Offset(0));
    assert_eq!(values(&found.unwrap()), ["a"]);
    let waits = world.fetch_with(1, 1 << 20, 1 << 19, Duration::from_millis(300));
    let appends = world.append(batch(&["b"], None), Acks::Leader);
    let (found, _) = soon("both", async { tokio::join!(waits, appends) }).await;
    assert_eq!(values(&found.unwrap()), ["b"]);
    world.stop().await;
}

/// Goal: only the leader serves, and a follower says who that is and where. Method: ask both followers for everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_refuse_and_name_the_leader() {
    let world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let leader = world.leader().me().broker();
    for (broker, follower) in world.partitions.iter().filter(|(id, _)| **id != leader.0) {
        until("the follower knows its leader", || {
            follower.leader_broker() == Some(leader)
        })
        .await;
        let errors = [
            follower
                .produce(batch(&["x"], None), Acks::All, deadline())
                .await
                .unwrap_err(),
            follower
                .fetch(Offset(0), 1, 0, Duration::ZERO)
                .await
                .unwrap_err(),
            follower
                .find_offset(OffsetSpec::Earliest, deadline())
                .await
                .unwrap_err(),
            follower.trim(Offset(0), deadline()).await.unwrap_err(),
        ];
        for error in errors {
            let Error::NotLeader {
                broker: asked,
                leader: Some(hint),
                ..
            } = error
            else {
                panic!("{error:?}");
            };
            assert_eq!((asked, hint.broker), (BrokerId(*broker), leader));
        }
        assert_eq!(follower.report(), None);
    }
    let report = world.leader().report().unwrap();
    until("all are in sync", || {
        world
            .leader()
            .report()
            .is_some_and(|report| report.isr.len() == 3)
    })
    .await;
    assert_eq!(report.epoch, world.leader().view().epoch);
    world.stop().await;
}

/// Goal: calls that follow one another keep their order, however they are put together. Method: many calls before the first answer;
/// their offsets ascend, each record can be
/// seen once it is acknowledged, and all are read in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn successive_appends_keep_their_order() {
    let world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let leader = world.leader();
    let texts: Vec<String> = (0..500).map(|n| n.to_string()).collect();
    let calls: Vec<_> = texts
        .iter()
        .map(|text| leader.produce(batch(&[text], None), Acks::All, deadline()))
        .collect();
    for (n, call) in calls.into_iter().enumerate() {
        assert_eq!(call.await.unwrap()[0].base_offset, Offset(n as u64));
        let visible = leader.view().high_watermark;
        assert!(
            visible > Some(Offset(n as u64)),
            "record {n} acknowledged, visible to {visible:?}"
        );
    }
    assert_eq!(values(&world.fetch(0).await.unwrap()), texts);
    world.stop().await;
}

/// Goal: a retry is appended once, also under the next leader, and what is out of order is refused with its reason. Method: a stamped
/// batch, again; hand leadership over, again; then a gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_is_appended_once_across_leaders() {
    let mut world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let send = || batch(&["a", "b"], Some(stamp(0)));
    let first = world.append(send(), Acks::All).await.unwrap().remove(0);
    let again = world.append(send(), Acks::All).await.unwrap().remove(0);
    assert_eq!(
        (again.base_offset, again.duplicate),
        (first.base_offset, true)
    );
    let old = world.leader().me().broker();
    let to = if old == BrokerId(2) { 3 } else { 2 };
    world.hand_over(to).await;
    let again = world.append(send(), Acks::All).await.unwrap().remove(0);
    assert_eq!(
        (again.base_offset, again.duplicate),
        (first.base_offset, true)
    );
    assert_eq!(again.leader_epoch, first.leader_epoch);
    let gap = world.append(batch(&["c"], Some(stamp(7))), Acks::All).await;
    assert_eq!(
        gap,
        Err(Error::OutOfOrderSequence {
            producer_id: 5,
            expected: 2,
            found: 7
        })
    );
    world
        .append(batch(&["c"], Some(stamp(2))), Acks::All)
        .await
        .unwrap();
    assert_eq!(values(&world.fetch(0).await.unwrap()), ["a", "b", "c"]);
    world.stop().await;
}

/// Goal: with too few replicas in sync acks=all is refused before anything is appended, and what acks=leader appends is not seen until
/// enough copies exist. Method: minimum 3 of 3; one broker dies and comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_few_in_sync_replicas_refuse_and_hide() {
    let config = TopicConfig {
        min_insync_replicas: 3,
        ..TopicConfig::default()
    };
    let mut world = World::start(&[data(1), data(2), data(3)], None, config).await;
    let in_sync = |world: &World, count| world.leader().view().isr.len() == count;
    until("all are in sync", || in_sync(&world, 3)).await;
    let ack = world
        .append(batch(&["a"], None), Acks::All)
        .await
        .unwrap()
        .remove(0);
    assert_eq!(ack.durable_on.len(), 3);
    let leader = world.leader().me().broker().0;
    let victim = if leader == 3 { 2 } else { 3 };
    world.down(victim).await;
    until("the lost one has left the ISR", || in_sync(&world, 2)).await;
    let refused = world.append(batch(&["b"], None), Acks::All).await;
    assert!(
        matches!(
            refused,
            Err(Error::NotEnoughReplicas {
                in_sync: 2,
                min: 3,
                ..
            })
        ),
        "{refused:?}"
    );
    let hidden = world
        .append(batch(&["c"], None), Acks::Leader)
        .await
        .unwrap()
        .remove(0);
    assert_eq!(hidden.base_offset, Offset(1));
    assert_eq!(values(&world.fetch(0).await.unwrap()), ["a"]);
    assert_eq!(values(&world.fetch(1).await.unwrap()), Vec::<String>::new());
    world.up(victim).await;
    let found = world.fetch_with(1, 1 << 20, 1, PATIENCE).await.unwrap();
    assert_eq!(values(&found), ["c"]);
    until("it is back in the ISR", || in_sync(&world, 3)).await;
    world.append(batch(&["d"], None), Acks::All).await.unwrap();
    world.stop().await;
}

/// Goal: copies that are missing only behind the append leave its outcome unknown, say so, and hide the record; its repetition is
/// acknowledged once the copies are there, and appends nothing. Method: one of three copies that are all wanted stops hearing; an
/// idempotent batch is appended before it has left the ISR, and sent again when it hears.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_that_fall_out_behind_an_append_leave_it_unknown() {
    let config = TopicConfig {
        min_insync_replicas: 3,
        ..TopicConfig::default()
    };
    let world = World::start(&[data(1), data(2), data(3)], None, config).await;
    let in_sync = |count| world.leader().view().isr.len() == count;
    until("all are in sync", || in_sync(3)).await;
    let victim = world.followers()[0];
    world.set_deaf(victim, true);
    let send = |deadline| {
        let records = batch(&["a"], Some(stamp(0)));
        world.leader().produce(records, Acks::All, deadline)
    };
    let unknown = send(Instant::now() + Duration::from_secs(1)).await;
    let unknown = unknown.unwrap_err();
    assert!(
        matches!(unknown, Error::NotEnoughReplicasAfterAppend { min: 3, .. }),
        "{unknown}"
    );
    assert_eq!(
        (unknown.outcome(), unknown.is_retriable()),
        (Outcome::Unknown, true)
    );
    assert_eq!(values(&world.fetch(0).await.unwrap()), Vec::<String>::new());
    world.set_deaf(victim, false);
    until("it has caught up", || {
        world.leader().view().high_watermark == Some(Offset(1))
    })
    .await;
    until("all are in sync", || in_sync(3)).await;
    let again = send(deadline()).await.unwrap().remove(0);
    assert_eq!((again.base_offset, again.duplicate), (Offset(0), true));
    assert_eq!(again.durable_on.len(), 3);
    assert_eq!(values(&world.fetch(0).await.unwrap()), ["a"]);
    world.stop().await;
}

/// Goal: whatever queues up at a leader, however much, is refused as soon as it knows that it has no majority. Method: no follower
/// hears any more, and far more is sent than is taken into entries; then the followers die. One comes back, and what was not refused is
/// in the log or said to be unknown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_that_queues_up_without_a_majority_is_refused() {
    const REQUESTS: usize = 40;
    let mut world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    until("all are in sync", || world.leader().view().isr.len() == 3).await;
    let (leader, followers) = (world.leader().clone(), world.followers());
    for follower in &followers {
        world.set_deaf(*follower, true);
    }
    let value = "x".repeat(400_000);
    let produce = |_| leader.produce(batch(&[&value], None), Acks::All, deadline());
    let mut requests: FuturesUnordered<_> = (0..REQUESTS).map(produce).collect();
    assert!(requests.next().now_or_never().is_none(), "all are sent");
    for follower in &followers {
        world.down(*follower).await;
    }
    let mut refused = 0;
    while refused < REQUESTS * 2 / 3 {
        let answer = soon("a refusal", requests.next()).await.unwrap();
        assert!(
            matches!(answer, Err(Error::NoMajority { .. })),
            "{answer:?}"
        );
        refused += 1;
    }
    world.up(followers[0]).await;
    let (mut appended, mut unknown) = (0, 0);
    while let Some(answer) = soon("the rest", requests.next()).await {
        match answer {
            Ok(_) => appended += 1,
            Err(error) if error.outcome() == Outcome::Unknown => unknown += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(appended + unknown > 0, "some were in entries");
    world.serving().await;
    let end = world.find(OffsetSpec::LinearizableEnd).await.unwrap();
    let possible = appended..=appended + unknown;
    assert!(
        possible.contains(&end.0),
        "{end:?}, not in {possible:?}; {refused} refused"
    );
    world.stop().await;
}

/// Goal: a leader that reaches too few voters refuses before it appends, so the writer knows that nothing happened, and goes on serving
/// what is committed. Method: two of three brokers die, each acknowledgement is asked for; one comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_appended_and_the_writer_knows() {
    let mut world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let in_sync = |world: &World, count| world.leader().view().isr.len() == count;
    until("all are in sync", || in_sync(&world, 3)).await;
    world.append(batch(&["a"], None), Acks::All).await.unwrap();
    let leader = world.leader().me().broker().0;
    let followers: Vec<u32> = (1..=3).filter(|broker| *broker != leader).collect();
    for follower in &followers {
        world.down(*follower).await;
    }
    until("the leader is alone", || in_sync(&world, 1)).await;
    for acks in [Acks::All, Acks::Leader] {
        let refused = world.append(batch(&["b"], None), acks).await.unwrap_err();
        let (reached, needed) = match &refused {
            Error::NoMajority {
                reached, needed, ..
            } => (*reached, *needed),
            other => panic!("{acks:?}: {other}"),
        };
        assert_eq!((reached, needed), (1, 2));
        assert_eq!(
            (refused.outcome(), refused.is_retriable()),
            (Outcome::NotDone, true)
        );
    }
    assert_eq!(values(&world.fetch(0).await.unwrap()), ["a"]);
    world.up(followers[0]).await;
    until("one is back", || in_sync(&world, 2)).await;
    let ack = world.append(batch(&["c"], None), Acks::All).await.unwrap();
    assert_eq!(
        ack[0].base_offset,
        Offset(1),
        "nothing was appended meanwhile"
    );
    assert_eq!(values(&world.fetch(0).await.unwrap()), ["a", "c"]);
    world.stop().await;
}

/// Goal: offsets are found by place, by time and linearizably. Method: records a hundred ms apart, in batches; a table of questions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn offsets_are_found() {
    let world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    for texts in [&["100", "200", "300"][..], &["50"], &["400", "250", "500"]] {
        world.append(batch(texts, None), Acks::All).await.unwrap();
    }
    let cases = [
        (OffsetSpec::Earliest, Some(0)),
        (OffsetSpec::Latest, Some(7)),
        (OffsetSpec::LinearizableEnd, Some(7)),
        (OffsetSpec::AtTime(0), Some(0)),
        (OffsetSpec::AtTime(200), Some(1)),
        (OffsetSpec::AtTime(201), Some(2)),
        (OffsetSpec::AtTime(301), Some(4)),
        (OffsetSpec::AtTime(401), Some(6)),
        (OffsetSpec::AtTime(501), None),
    ];
    for (spec, expected) in cases {
        assert_eq!(world.find(spec).await, expected.map(Offset), "{spec:?}");
    }
    world.leader().trim(Offset(5), deadline()).await.unwrap();
    let cases = [
        (OffsetSpec::Earliest, Some(5)),
        (OffsetSpec::AtTime(100), Some(4)),
    ];
    for (spec, expected) in cases {
        assert_eq!(
            world.find(spec).await,
            expected.map(Offset),
            "{spec:?} behind a trim"
        );
    }
    world.stop().await;
}

/// Goal: a trim moves the log start on every replica, its log space is given back, and a replica that missed it all comes back and can
/// lead. Method: many records while one broker is down, trim, purge; it returns by snapshot and is handed the leadership.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trimmed_records_are_given_back_everywhere() {
    let mut world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let leader = world.leader().me().broker().0;
    let victim = if leader == 3 { 2 } else { 3 };
    world.down(victim).await;
    let large = "x".repeat(700 << 10);
    let mut end = 0;
    // Past two checkpoints, each a few MiB of records behind the one before.
    while end < 30 {
        end = world
            .append(batch(&[&large], None), Acks::All)
            .await
            .unwrap()[0]
            .base_offset
            .0
            + 1;
    }
    let start = world.leader().trim(Offset(25), deadline()).await.unwrap();
    assert_eq!(start, Offset(25));
    assert_eq!(
        world.leader().trim(Offset(3), deadline()).await,
        Ok(Offset(25))
    );
    let below = world.fetch(24).await;
    assert!(
        matches!(
            below,
            Err(Error::OffsetOutOfRange {
                start: Offset(25),
                ..
            })
        ),
        "{below:?}"
    );
    let beyond = world.leader().trim(Offset(31), deadline()).await;
    assert!(
        matches!(beyond, Err(Error::OffsetOutOfRange { .. })),
        "{beyond:?}"
    );
    for partition in world.partitions.values() {
        let status = partition.group().status();
        until("the log is purged", || {
            status
                .borrow()
                .purged
                .is_some_and(|purged| purged.index > LogIndex(10))
        })
        .await;
    }
    world.up(victim).await;
    until("the lost one is level", || {
        world.leader().view().isr.len() == 3
    })
    .await;
    world.hand_over(victim).await;
    assert_eq!(world.find(OffsetSpec::Earliest).await, Some(Offset(25)));
    let found = world
        .fetch_with(25, 64 << 20, 0, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(offsets(&found), [25, 26, 27, 28, 29]);
    world.append(batch(&["y"], None), Acks::All).await.unwrap();
    assert_eq!(values(&world.fetch(30).await.unwrap()), ["y"]);
    world.stop().await;
}

/// Goal: what does not fit the limits is refused before it is appended. Method: small limits; a batch too large, a request too large,
/// more in flight than allowed, a full disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_refuse_before_anything_is_appended() {
    let config = TopicConfig {
        max_message_bytes: 2_000,
        ..TopicConfig::default()
    };
    let mut world = World::start(&[data(1)], None, config).await;
    let text = "x".repeat(1_500);
    let large = batch(&[&text, &text], None);
    let refused = world.append(large.clone(), Acks::All).await;
    assert!(
        matches!(refused, Err(Error::RecordTooLarge { max: 2_000, .. })),
        "{refused:?}"
    );
    world.leader().set_config(TopicConfig::default());
    world.append(large, Acks::All).await.unwrap();
    let many: Vec<_> = (0..200).map(|_| batch(&[&text], None)).collect();
    let refused = world.append(many.concat().into(), Acks::All).await;
    assert!(
        matches!(refused, Err(Error::RecordTooLarge { .. })),
        "{refused:?}"
    );
    let leader = world.leader();
    let calls: Vec<_> = many
        .into_iter()
        .map(|one| leader.produce(one, Acks::All, deadline()))
        .collect();
    let (mut done, mut overloaded) = (0, 0);
    for call in calls {
        match call.await {
            Ok(_) => done += 1,
            Err(Error::Overloaded { .. }) => overloaded += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(
        done > 0 && overloaded > 0,
        "{done} done, {overloaded} refused"
    );
    assert_eq!(world.find(OffsetSpec::Latest).await, Some(Offset(2 + done)));
    world.fill_disk();
    let refused = world.append(batch(&["y"], None), Acks::All).await;
    assert!(
        matches!(refused, Err(Error::StorageFull { .. })),
        "{refused:?}"
    );
    assert_eq!(world.find(OffsetSpec::Latest).await, Some(Offset(2 + done)));
    world.stop().await;
}

/// Goal: two copies and a witness survive the leader's death without losing an acknowledged record. Method: append with both up, end
/// the leader's broker, read and append at the other; the dead one returns and is in sync again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_copies_and_a_witness_survive_the_leader() {
    let mut world = World::start(
        &[data(1), data(2)],
        Some(witness(3)),
        TopicConfig::default(),
    )
    .await;
    let texts: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    until("both are in sync", || world.leader().view().isr.len() == 2).await;
    for text in &texts {
        let ack = world
            .append(batch(&[text], None), Acks::All)
            .await
            .unwrap()
            .remove(0);
        assert!(
            ack.durable_on.contains(&world.leader().me().broker()),
            "{ack:?}"
        );
    }
    assert!(!world.partitions[&3].is_leader());
    let old = world.leader().me().broker().0;
    world.down(old).await;
    world.serving().await;
    assert_eq!(world.leader().me().broker().0, 3 - old);
    assert_eq!(values(&world.fetch(0).await.unwrap()), texts);
    let end = world.find(OffsetSpec::LinearizableEnd).await;
    assert_eq!(end, Some(Offset(20)));
    world.append(batch(&["z"], None), Acks::All).await.unwrap();
    world.up(old).await;
    until("both are in sync again", || {
        world.leader().view().isr.len() == 2
    })
    .await;
    world.stop().await;
}

/// Goal: a replica that restarts answers as before: records, offsets and retries come from its own disk. Method: enough batches for
/// checkpoints and index blocks in the store, then all brokers down and up again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_a_restart() {
    let mut world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let leader = world.leader();
    let mut calls = Vec::new();
    for n in 0..60_i32 {
        // 200 batches in one request: one entry, or a part of one.
        let many: Vec<_> = (0..200)
            .map(|m| batch(&["v"], Some(stamp(n * 200 + m))))
            .collect();
        calls.push(leader.produce(many.concat().into(), Acks::All, deadline()));
    }
    for call in calls {
        call.await.unwrap();
    }
    for broker in [1, 2, 3] {
        world.down(broker).await;
    }
    for broker in [1, 2, 3] {
        world.up(broker).await;
    }
    world.serving().await;
    assert_eq!(
        world.find(OffsetSpec::LinearizableEnd).await,
        Some(Offset(12_000))
    );
    for from in [0, 4_999, 11_990] {
        let found = world
            .fetch_with(from, 200_000, 0, Duration::ZERO)
            .await
            .unwrap();
        let found = offsets(&found);
        let expected: Vec<u64> = (from..12_000).take(found.len()).collect();
        assert_eq!(found, expected);
        assert!(found.len() >= 10);
    }
    let again = world
        .append(batch(&["v"], Some(stamp(11_999))), Acks::All)
        .await
        .unwrap()
        .remove(0);
    assert_eq!((again.base_offset, again.duplicate), (Offset(11_999), true));
    world.stop().await;
}

/// Goal: a membership as raft has it and the assignment agree on who counts. Method: an assignment without broker 3 takes it out of the
/// ISR and of what is durable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_assignment_counts_at_once() {
    let world = World::start(&[data(1), data(2), data(3)], None, TopicConfig::default()).await;
    let leader = world.leader();
    let me = leader.me();
    let other = if me == data(2) { data(1) } else { data(2) };
    until("all are in sync", || leader.view().isr.len() == 3).await;
    let mut reports = leader.report_changed();
    reports.mark_unchanged();
    let assignment = logboom::types::Assignment {
        replicas: vec![me, other],
        witness: None,
    };
    leader.set_assignment(assignment, BTreeSet::new());
    soon("a new report", reports.changed()).await.unwrap();
    assert_eq!(leader.report().unwrap().isr, [me.broker(), other.broker()]);
    let ack = world
        .append(batch(&["a"], None), Acks::All)
        .await
        .unwrap()
        .remove(0);
    let durable = ack
        .durable_on
        .iter()
        .all(|broker| [me.broker(), other.broker()].contains(broker));
    assert!(durable, "{ack:?}");
    assert_eq!(
        leader.group().status().borrow().voters,
        set(&[data(1), data(2), data(3)])
    );
    world.stop().await;
}
