//! Raft groups over real sockets and real directories, several brokers in one process.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs
)]

mod support;

use std::time::Duration;

use bytes::Bytes;
use logboom::raft::{RaftError, Role};
use logboom::storage::{MemDisk, Store};
use logboom::types::{BrokerId, GroupId, LogIndex};
use support::*;
use tokio::time::Instant;

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}{n}")).collect()
}

async fn write_all(cluster: &Cluster, commands: &[String]) {
    for command in commands {
        cluster.write(GROUP, command).await;
    }
}

/// Goal: what three replicas have acknowledged is there after all of them have stopped and started. Method: write, stop
/// every broker, start them again, compare, write again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_all_keeps_everything() {
    let replicas = [data(1), data(2), data(3)];
    let mut cluster = Cluster::new(&[1, 2, 3], quick()).await;
    cluster.create(GROUP, &replicas, 10).await;
    let first = names("a", 35);
    write_all(&cluster, &first).await;
    cluster.agree(GROUP, &[1, 2, 3], &first).await;
    for broker in [1, 2, 3] {
        cluster.down(broker).await;
    }
    for broker in [1, 2, 3] {
        cluster.up(broker).await;
        cluster.nodes[&broker].start(GROUP, data(broker), 10).await;
        assert!(
            cluster.nodes[&broker].restores(GROUP) > 0,
            "no checkpoint was there"
        );
    }
    cluster.write(GROUP, "b").await;
    cluster
        .agree(GROUP, &[1, 2, 3], &[first, vec!["b".to_owned()]].concat())
        .await;
}

/// Goal: the death of a leader's process is answered by an election at once. Method: timeouts of ten minutes; end the
/// leader's broker; the survivors must commit again long before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn news_of_a_dead_leader_elects_another_without_waiting() {
    let mut cluster = Cluster::new(&[1, 2, 3], never_by_timeout()).await;
    let replicas = [data(1), data(2), data(3)];
    cluster.create(GROUP, &replicas, 100).await;
    let before = names("a", 20);
    write_all(&cluster, &before).await;
    assert_eq!(cluster.leader(GROUP), Some(1));
    until("all connected", || {
        cluster.nodes[&1]
            .group(GROUP)
            .progress()
            .followers
            .values()
            .all(|f| f.connected)
    })
    .await;
    cluster.down(1).await;
    let start = Instant::now();
    cluster.write(GROUP, "b").await;
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    cluster
        .agree(GROUP, &[2, 3], &[before, vec!["b".to_owned()]].concat())
        .await;
}

/// Goal: many groups that lose their leader at once all get another one. Method: sixty groups, one message per peer, a
/// concurrency of 16.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_groups_fail_over_together() {
    let config = logboom::raft::RaftConfig {
        failover_concurrency: 16,
        ..never_by_timeout()
    };
    let mut cluster = Cluster::new(&[1, 2, 3], config).await;
    let groups: Vec<GroupId> = (1..=60).map(GroupId).collect();
    for group in &groups {
        cluster
            .create(*group, &[data(1), data(2), data(3)], 100)
            .await;
        cluster.write(*group, "a").await;
    }
    cluster.down(1).await;
    let start = Instant::now();
    for group in &groups {
        cluster.write(*group, "b").await;
    }
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
}

/// Goal: a follower that the purge has passed catches up by snapshot and log, and every replica restarts behind a purge.
/// Method: write with one broker down, purge on the others, bring it back; then restart all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_behind_the_purge_gets_the_snapshot_and_then_the_log() {
    let replicas = [data(1), data(2), data(3)];
    let mut cluster = Cluster::new(&[1, 2, 3], quick()).await;
    cluster.create(GROUP, &replicas, 10).await;
    let mut all = names("a", 5);
    write_all(&cluster, &all).await;
    cluster.agree(GROUP, &[1, 2, 3], &all).await;
    cluster.down(3).await;
    let more = names("b", 60);
    write_all(&cluster, &more).await;
    all.extend(more);
    cluster.agree(GROUP, &[1, 2], &all).await;
    for broker in [1, 2] {
        let group = cluster.nodes[&broker].group(GROUP);
        soon("purge", group.purge_to(LogIndex(50))).await.unwrap();
        until("purged", || {
            let purged = group.status().borrow().purged;
            purged.is_some_and(|id| id.index.0 > 35 && id.index.0 <= 50)
        })
        .await;
        assert!(group.read(LogIndex(60), 10, 1 << 20).await.is_ok());
    }
    cluster.up(3).await;
    cluster.nodes[&3].start(GROUP, data(3), 1_000).await;
    cluster.agree(GROUP, &[1, 2, 3], &all).await;
    assert!(
        cluster.nodes[&3].restores(GROUP) > 0,
        "it came without a snapshot"
    );
    let purged = cluster.nodes[&3].status(GROUP).purged;
    assert!(purged.is_some(), "the snapshot is the base of the log");
    for broker in [1, 2, 3] {
        cluster.down(broker).await;
    }
    for broker in [1, 2, 3] {
        cluster.up(broker).await;
        cluster.nodes[&broker].start(GROUP, data(broker), 10).await;
    }
    cluster.write(GROUP, "c").await;
    all.push("c".to_owned());
    cluster.agree(GROUP, &[1, 2, 3], &all).await;
}

/// Goal: with two data replicas and a witness either data replica may die and nothing acknowledged is lost; the witness
/// never leads and holds no command. Method: kill the leader by turns under load, compare after each return.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_group_survives_either_data_replica() {
    let replicas = [data(1), data(2), witness(3)];
    let mut cluster = Cluster::new(&[1, 2, 3], quick()).await;
    cluster.create(GROUP, &replicas, 10).await;
    for broker in [1, 2] {
        cluster.nodes[&broker].keep_isr(&cluster.nodes[&broker].group(GROUP));
    }
    let mut all = Vec::new();
    for round in 0..4 {
        let acked = names(&format!("r{round}-"), 20);
        write_all(&cluster, &acked).await;
        all.extend(acked);
        let leader = cluster.serving(GROUP).await;
        assert_ne!(leader, 3);
        cluster.down(leader).await;
        let survivor = 3 - leader;
        until("the other data replica leads", || {
            is_leader(&cluster.nodes[&survivor], GROUP)
        })
        .await;
        let alone = format!("alone{round}");
        cluster.write(GROUP, &alone).await;
        all.push(alone);
        assert_ne!(cluster.nodes[&3].status(GROUP).role, Role::Leader);
        cluster.up(leader).await;
        let returned = cluster.nodes[&leader].start(GROUP, data(leader), 10).await;
        cluster.nodes[&leader].keep_isr(&returned);
        cluster.agree(GROUP, &[1, 2], &all).await;
    }
    assert!(cluster.nodes[&3].commands(GROUP).is_empty());
    let held = cluster.nodes[&3]
        .group(GROUP)
        .read(LogIndex(0), 1_000, 1 << 20)
        .await
        .unwrap();
    assert!(held.len() > 20, "{} entries", held.len());
    let commands = held
        .iter()
        .filter(|e| e.kind == logboom::storage::EntryKind::Command);
    assert!(commands.clone().count() > 0 && commands.clone().all(|e| e.payload.is_empty()));
}

/// Goal: the witness is not fed what the in-sync follower does not have, and is fed as soon as that follower has left the
/// ISR. Method: a follower that hears nothing; the leader's proposal stays open until the leader is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gate_holds_the_witness_back_until_told() {
    let cluster = Cluster::new(&[1, 2, 3], quick()).await;
    cluster
        .create(GROUP, &[data(1), data(2), witness(3)], 100)
        .await;
    let last = cluster.write(GROUP, "a").await;
    until("the witness has it", || {
        cluster.nodes[&3].status(GROUP).last >= Some(last)
    })
    .await;
    assert_eq!(cluster.leader(GROUP), Some(1));
    cluster.nodes[&2].set_deaf(true);
    let group = cluster.nodes[&1].group(GROUP);
    let before = cluster.nodes[&3].status(GROUP).last;
    let result = propose(&group, "held").await;
    assert!(
        matches!(result, Err(RaftError::Timeout { .. })),
        "{result:?}"
    );
    assert_eq!(
        cluster.nodes[&3].status(GROUP).last,
        before,
        "the witness got ahead"
    );
    let status = group.status().borrow().clone();
    assert_eq!(status.role, Role::Leader, "heartbeats to the witness pass");
    group.set_in_sync(status.epoch, set(&[]));
    soon("commit with the witness", async {
        while propose(&group, "open").await.is_err() {}
    })
    .await;
    assert!(
        cluster.nodes[&1]
            .commands(GROUP)
            .contains(&Bytes::from_static(b"held"))
    );
    cluster.nodes[&2].set_deaf(false);
    cluster
        .agree(GROUP, &[1, 2], &["held".to_owned(), "open".to_owned()])
        .await;
}

/// Goal: the witness is not fed what the leader itself may still lose: a leader that comes back without its last entries,
/// alone with a witness that has them, could never be elected. Method: the gate is lifted, the leader's disk does not
/// finish its sync; the proposal reaches the witness when it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_witness_waits_for_the_leaders_own_disk() {
    let mut cluster = Cluster::new(&[2, 3], quick()).await;
    let disk = MemDisk::new();
    let config = store_config("memory".into());
    let store = Store::open_in_memory(&disk, &config, BrokerId(1)).unwrap();
    cluster.attach(1, store).await;
    cluster
        .create(GROUP, &[data(1), data(2), witness(3)], 100)
        .await;
    cluster.write(GROUP, "a").await;
    assert_eq!(cluster.leader(GROUP), Some(1));
    let group = cluster.nodes[&1].group(GROUP);
    let epoch = group.status().borrow().epoch;
    cluster.nodes[&2].set_deaf(true);
    group.set_in_sync(epoch, set(&[]));
    let last = soon("commit with the witness", async {
        loop {
            if let Ok(id) = propose(&group, "open").await {
                break id;
            }
        }
    })
    .await;
    disk.hold_sync();
    let result = propose(&group, "held").await;
    assert!(
        matches!(result, Err(RaftError::Timeout { .. })),
        "{result:?}"
    );
    assert_eq!(
        cluster.nodes[&3].status(GROUP).last,
        Some(last),
        "the witness has what the leader may lose"
    );
    disk.heal();
    soon("commit once synced", async {
        while propose(&group, "synced").await.is_err() {}
    })
    .await;
    cluster.nodes[&2].set_deaf(false);
    cluster
        .agree(GROUP, &[1, 2], &["held".to_owned(), "synced".to_owned()])
        .await;
}

/// Goal: leadership goes where it is told, at once, and back; never to a witness. Method: transfer under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_there_and_back() {
    let cluster = Cluster::new(&[1, 2, 3], never_by_timeout()).await;
    cluster
        .create(GROUP, &[data(1), data(2), witness(3)], 100)
        .await;
    for (from, to) in [(1, 2), (2, 1), (1, 2)] {
        cluster.write(GROUP, "a").await;
        let group = cluster.nodes[&from].group(GROUP);
        let refused = group.transfer_leader(witness(3)).await;
        assert!(
            matches!(refused, Err(RaftError::Membership { .. })),
            "{refused:?}"
        );
        let mut result = group.transfer_leader(data(to)).await;
        let deadline = Instant::now() + PATIENCE;
        // It may not be known to be level yet.
        while matches!(result, Err(RaftError::Membership { .. })) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
            result = group.transfer_leader(data(to)).await;
        }
        assert_eq!(result, Ok(()));
        assert_eq!(cluster.serving(GROUP).await, to);
    }
    let follower = cluster.nodes[&1].group(GROUP);
    let refused = propose(&follower, "x").await;
    assert_eq!(
        refused,
        Err(RaftError::NotLeader {
            leader: Some(data(2))
        })
    );
    let refused = follower.linearize(Duration::from_secs(1)).await;
    assert_eq!(
        refused,
        Err(RaftError::NotLeader {
            leader: Some(data(2))
        })
    );
}

/// Goal: a transfer that cannot succeed does not leave the group without a leader. Method: nobody hears anything while
/// leadership is handed over; the handle must survive the rebuild, and the group work again when they hear.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stuck_transfer_ends_with_a_leader() {
    let cluster = Cluster::new(&[1, 2, 3], quick()).await;
    cluster
        .create(GROUP, &[data(1), data(2), data(3)], 100)
        .await;
    cluster.write(GROUP, "a").await;
    assert_eq!(cluster.leader(GROUP), Some(1));
    let group = cluster.nodes[&1].group(GROUP);
    until("level", || {
        let progress = group.progress();
        progress.followers[&data(2)].matched == group.status().borrow().last.map(|id| id.index)
    })
    .await;
    for node in cluster.nodes.values() {
        node.set_deaf(true);
    }
    let result = soon("transfer", group.transfer_leader(data(2))).await;
    assert!(
        matches!(result, Err(RaftError::Timeout { .. })),
        "{result:?}"
    );
    for node in cluster.nodes.values() {
        node.set_deaf(false);
    }
    cluster.write(GROUP, "b").await;
    cluster
        .agree(GROUP, &[1, 2, 3], &["a".to_owned(), "b".to_owned()])
        .await;
    let leader = group.status().borrow().leader;
    assert!(leader.is_some(), "the handle has lost its replica");
}

/// Goal: members are added and replaced while the group works. Method: add a learner, make it a voter in place of another,
/// kill a remaining one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_added_and_replaced() {
    let mut cluster = Cluster::new(&[1, 2, 3, 4], quick()).await;
    cluster
        .create(GROUP, &[data(1), data(2), data(3)], 10)
        .await;
    let mut all = names("a", 30);
    write_all(&cluster, &all).await;
    let leader = cluster.serving(GROUP).await;
    let group = cluster.nodes[&leader].group(GROUP);
    let unknown = group.change_voters(set(&[data(leader), data(4)])).await;
    assert!(
        matches!(unknown, Err(RaftError::Membership { .. })),
        "{unknown:?}"
    );
    cluster.nodes[&4].start(GROUP, data(4), 10).await;
    soon("learner", group.add_learner(data(4))).await.unwrap();
    soon("again", group.add_learner(data(4))).await.unwrap();
    cluster.agree(GROUP, &[1, 2, 3, 4], &all).await;
    assert!(group.progress().followers.contains_key(&data(4)));
    let dropped = if leader == 3 { 2 } else { 3 };
    let kept = 6 - leader - dropped;
    let voters = set(&[data(leader), data(kept), data(4)]);
    soon("voters", group.change_voters(voters.clone()))
        .await
        .unwrap();
    soon("again", group.change_voters(voters.clone()))
        .await
        .unwrap();
    until("the new voters are known everywhere", || {
        [leader, kept, 4].iter().all(|broker| {
            let status = cluster.nodes[broker].status(GROUP);
            status.voters == voters && !status.is_joint && status.learners.is_empty()
        })
    })
    .await;
    soon("delete", cluster.nodes[&dropped].groups.delete(GROUP))
        .await
        .unwrap();
    assert!(cluster.nodes[&dropped].groups.stored().is_empty());
    cluster.down(kept).await;
    cluster.write(GROUP, "b").await;
    all.push("b".to_owned());
    cluster.agree(GROUP, &[leader, 4], &all).await;
}

/// Goal: proposals of successive calls are applied in their order, however many are under way. Method: two thousand at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proposals_keep_their_order() {
    let cluster = Cluster::new(&[1, 2, 3], quick()).await;
    cluster
        .create(GROUP, &[data(1), data(2), data(3)], 500)
        .await;
    let group = cluster.nodes[&cluster.serving(GROUP).await].group(GROUP);
    let expected = names("p", 2_000);
    let mut proposals = Vec::new();
    for command in &expected {
        proposals.push(
            group
                .propose(Bytes::copy_from_slice(command.as_bytes()))
                .await
                .unwrap(),
        );
    }
    let mut last = None;
    for proposal in proposals {
        let (id, _) = soon("applied", proposal.applied()).await.unwrap();
        assert!(Some(id) > last);
        assert!(
            group.status().borrow().applied >= Some(id),
            "applied is behind an answer"
        );
        last = Some(id);
    }
    soon("linearize", group.linearize(PATIENCE)).await.unwrap();
    cluster.agree(GROUP, &[1, 2, 3], &expected).await;
    assert_eq!(cluster.nodes[&1].commands(GROUP).len(), expected.len());
}

/// Goal: a group whose follower takes nothing does not delay another on the same connection. Method: keep every append of one
/// group unanswered at both followers; the other commits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_group_does_not_delay_another() {
    let cluster = Cluster::new(&[1, 2, 3], quick()).await;
    let stalled = GroupId(9);
    for group in [GROUP, stalled] {
        cluster
            .create(group, &[data(1), data(2), data(3)], 100)
            .await;
    }
    for broker in [2, 3] {
        cluster.nodes[&broker].set_deaf_group(stalled.0);
    }
    let group = cluster.nodes[&1].group(stalled);
    let mut proposals = Vec::new();
    for n in 0..100 {
        proposals.push(group.propose(vec![n; 32 << 10].into()).await.unwrap());
    }
    let start = Instant::now();
    for n in 0..50 {
        cluster.write(GROUP, &format!("a{n}")).await;
    }
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    for broker in [2, 3] {
        cluster.nodes[&broker].set_deaf_group(u64::MAX);
    }
    for proposal in proposals {
        soon("the stalled group goes on", proposal.applied())
            .await
            .unwrap();
    }
}

/// Goal: a follower that lost what it had acknowledged is told apart, shown, and harms nobody. Method: bring a follower back
/// with an older copy of its directory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_lost_its_log_is_not_fed_and_is_shown() {
    let mut cluster = Cluster::new(&[1, 2, 3], never_by_timeout()).await;
    cluster
        .create(GROUP, &[data(1), data(2), data(3)], 1_000)
        .await;
    assert_eq!(cluster.leader(GROUP), Some(1));
    let early = names("a", 5);
    write_all(&cluster, &early).await;
    cluster.agree(GROUP, &[1, 2, 3], &early).await;
    cluster.down(3).await;
    let (place, copy) = (cluster.path(3), cluster.directory.path().join("copy"));
    copy_directory(&place, &copy);
    cluster.up(3).await;
    cluster.nodes[&3].start(GROUP, data(3), 1_000).await;
    let late = names("b", 20);
    write_all(&cluster, &late).await;
    let all = [early, late].concat();
    cluster.agree(GROUP, &[1, 2, 3], &all).await;
    let leader = cluster.nodes[&1].group(GROUP);
    until("matched", || {
        leader.progress().followers[&data(3)].matched
            == leader.status().borrow().last.map(|id| id.index)
    })
    .await;
    cluster.down(3).await;
    std::fs::remove_dir_all(&place).unwrap();
    copy_directory(&copy, &place);
    cluster.up(3).await;
    cluster.nodes[&3].start(GROUP, data(3), 1_000).await;
    cluster.write(GROUP, "c").await;
    until("shown", || leader.progress().followers[&data(3)].lost_data).await;
    assert!(!leader.progress().followers[&data(2)].lost_data);
    cluster.write(GROUP, "d").await;
    assert_eq!(leader.status().borrow().role, Role::Leader);
    assert_eq!(cluster.leader(GROUP), Some(1));
}

fn copy_directory(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Goal: a broker answers nothing for replicas that are not its own. Method: a group whose replica was replaced on one
/// broker is started there under another id; the old id stays unreachable, the group keeps working.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_id_that_is_not_here_is_refused() {
    let cluster = Cluster::new(&[1, 2, 3], quick()).await;
    cluster
        .create(GROUP, &[data(1), data(2), data(3)], 100)
        .await;
    cluster.write(GROUP, "a").await;
    let follower = if cluster.serving(GROUP).await == 3 {
        2
    } else {
        3
    };
    soon("delete", cluster.nodes[&follower].groups.delete(GROUP))
        .await
        .unwrap();
    let other =
        logboom::types::ReplicaId::new(BrokerId(follower), logboom::types::ReplicaKind::Data, 2);
    let node = &cluster.nodes[&follower];
    node.start(GROUP, other, 100).await;
    for n in 0..20 {
        cluster.write(GROUP, &format!("b{n}")).await;
    }
    assert_eq!(
        node.status(GROUP).last,
        None,
        "it took what was for another replica"
    );
    assert!(node.commands(GROUP).is_empty());
}

/// Goal: a replica whose disk has failed acknowledges nothing any more and says why. Method: the next sync of a disk in
/// memory fails while a proposal is under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_disk_stops_the_replica_and_says_why() {
    let mut cluster = Cluster::new(&[], quick()).await;
    let disk = MemDisk::new();
    let config = store_config("memory".into());
    let store = Store::open_in_memory(&disk, &config, BrokerId(1)).unwrap();
    cluster.attach(1, store).await;
    cluster.create(GROUP, &[data(1)], 100).await;
    cluster.write(GROUP, "a").await;
    disk.fail_sync(1, true);
    let group = cluster.nodes[&1].group(GROUP);
    let result = soon("an answer", async {
        match group.propose(Bytes::from_static(b"b")).await {
            Ok(proposal) => proposal.applied().await.map(|_| ()),
            Err(error) => Err(error),
        }
    })
    .await;
    assert!(
        matches!(result, Err(RaftError::Stopped { .. })),
        "{result:?}"
    );
    until("stopped", || group.status().borrow().role == Role::Stopped).await;
    let reason = group.stop_reason().unwrap_or_default();
    assert!(reason.contains("store failed"), "{reason}");
}

/// Goal: a witness that the purge has passed catches up without the state, and either data replica may die afterwards.
/// Method: write and purge while the witness is down; bring it back, kill the leader, write on the other one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_behind_the_purge_catches_up() {
    let mut cluster = Cluster::new(&[1, 2, 3], quick()).await;
    cluster
        .create(GROUP, &[data(1), data(2), witness(3)], 10)
        .await;
    for broker in [1, 2] {
        cluster.nodes[&broker].keep_isr(&cluster.nodes[&broker].group(GROUP));
    }
    cluster.down(3).await;
    let mut all = names("a", 60);
    write_all(&cluster, &all).await;
    cluster.agree(GROUP, &[1, 2], &all).await;
    for broker in [1, 2] {
        let group = cluster.nodes[&broker].group(GROUP);
        soon("purge", group.purge_to(LogIndex(40))).await.unwrap();
        until("purged", || group.status().borrow().purged.is_some()).await;
    }
    cluster.up(3).await;
    let returned = cluster.nodes[&3].start(GROUP, witness(3), 10).await;
    let leader = cluster.serving(GROUP).await;
    let last = cluster.write(GROUP, "b").await;
    all.push("b".to_owned());
    until("the witness has it", || {
        returned.status().borrow().last >= Some(last)
    })
    .await;
    assert!(
        returned.status().borrow().purged.is_some(),
        "it came without a snapshot"
    );
    assert_eq!(
        cluster.nodes[&3].restores(GROUP),
        0,
        "a witness has no state"
    );
    cluster.down(leader).await;
    cluster.write(GROUP, "c").await;
    all.push("c".to_owned());
    cluster.agree(GROUP, &[3 - leader], &all).await;
}
