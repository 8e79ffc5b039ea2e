//! The steps of a move: by tables of whole moves, and through random redirections and lost disks.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::api::PartitionReport;
use crate::config::TopicConfig;
use crate::controller::metadata::tests::{Cluster, replica_on};
use crate::controller::metadata::{Command, weight};
use crate::types::{LeaderEpoch, TopicName};

/// Data brokers and the witness's, as in `12w3`.
fn placement(text: &str) -> PlannedPartition {
    let (replicas, witness) = text.split_once('w').unwrap_or((text, ""));
    let brokers = |text: &str| -> Vec<BrokerId> {
        text.chars()
            .map(|digit| BrokerId(digit.to_digit(10).unwrap()))
            .collect()
    };
    PlannedPartition {
        replicas: brokers(replicas),
        witness: brokers(witness).first().copied(),
    }
}

fn text(placement: &PlannedPartition) -> String {
    let replicas: String = placement.replicas.iter().map(ToString::to_string).collect();
    match placement.witness {
        Some(witness) => format!("{replicas}w{witness}"),
        None => replicas,
    }
}

fn cluster_with(brokers: u32, placed: &str) -> Cluster {
    let mut cluster = Cluster::of(brokers);
    let placed = placement(placed);
    let replicas: Vec<u32> = placed.replicas.iter().map(|broker| broker.0).collect();
    let witness = placed.witness.map(|broker| broker.0);
    cluster.create("t", &[(&replicas, witness)]);
    cluster
}

fn reassign(cluster: &mut Cluster, target: &str) -> Result<Answer, Error> {
    let partition = cluster.name("t", 0);
    cluster.apply(Command::ReassignPartition {
        partition,
        target: placement(target),
    })
}

fn cancel(cluster: &mut Cluster) {
    let partition = cluster.name("t", 0);
    cluster
        .apply(Command::CancelReassignment { partition })
        .unwrap();
}

/// Reports the present step as ended, by the first assigned broker.
fn end_step(cluster: &mut Cluster) {
    let record = cluster.record("t", 0);
    let isr: Vec<u32> = record.replica_brokers().iter().map(|id| id.0).collect();
    let voters = record.assignment.voters().collect();
    cluster.report_voters(isr[0], "t", 0, record.epoch.0 + 1, &isr, voters);
}

/// Ends all steps; what was assigned in each, the last one being where it stays.
fn all_steps(cluster: &mut Cluster) -> Vec<String> {
    let mut steps = vec![text(&cluster.record("t", 0).placement())];
    while cluster.record("t", 0).replacement.is_some() {
        assert!(steps.len() < 9, "no end: {steps:?}");
        end_step(cluster);
        let next = text(&cluster.record("t", 0).placement());
        if Some(&next) != steps.last() {
            steps.push(next);
        }
    }
    assert_eq!(cluster.record("t", 0).reassignment, None, "{steps:?}");
    steps
}

/// Goal: the replication factor of a topic is what each of its partitions has at least. Method: reassign the second one to fewer.
#[test]
fn a_topic_has_the_replication_factor_of_its_smallest_partition() {
    let mut cluster = Cluster::of(3);
    cluster.create("t", &[(&[1, 2, 3], None), (&[2, 3, 1], None)]);
    let topic = TopicName::new("t").unwrap();
    let factor = |cluster: &Cluster| cluster.image.replication_factor(&topic);
    assert_eq!(factor(&cluster), 3);
    let command = Command::ReassignPartition {
        partition: cluster.name("t", 1),
        target: placement("2"),
    };
    cluster.apply(command).unwrap();
    assert_eq!(factor(&cluster), 1);
}

/// Goal: a move takes the steps that a broker can take, the fewest of them, and ends where it should. Method: a table of
/// placements, targets, and the assignments between them.
#[test]
fn a_move_takes_safe_steps() {
    let table: [(&str, &str, &[&str]); 13] = [
        ("123", "234", &["234"]),
        ("123", "456", &["456"]),
        ("123", "321", &["321"]),
        ("1", "2", &["2"]),
        ("1", "123", &["123"]),
        ("123", "1", &["1"]),
        ("12w3", "14w3", &["14w3"]),
        // the witness is in the way, and has somewhere to go
        ("12w3", "31w4", &["12w4", "31w4"]),
        // it has nowhere to go before a copy has left
        ("12w3", "31w2", &["12", "31", "31w2"]),
        ("12w3", "123", &["12", "123"]),
        ("123", "12w4", &["12w4"]),
        ("123", "12w3", &["12", "12w3"]),
        ("12", "12w3", &["12w3"]),
    ];
    for (from, to, steps) in table {
        let mut cluster = cluster_with(6, from);
        let before = cluster.record("t", 0);
        reassign(&mut cluster, to).unwrap();
        assert_eq!(all_steps(&mut cluster), steps, "{from} to {to}");
        let after = cluster.record("t", 0);
        assert_eq!(text(&after.placement()), to, "{from} to {to}");
        for kept in before.assignment.voters() {
            let same_kind = after.assignment.on(kept.broker());
            let same_kind = same_kind.filter(|replica| replica.kind() == kept.kind());
            assert!(
                same_kind.is_none_or(|replica| replica == kept),
                "{from} to {to}: {kept} was given up without need"
            );
        }
    }
}

/// Goal: what leaves is held, and shown, until the leader has reported the end of this very step by the newest epoch; reports of
/// an earlier step, of too few voters, and without the new copy in sync end nothing. Method: one of each.
#[test]
fn a_moved_replica_is_kept_until_the_move_is_finished() {
    let mut cluster = cluster_with(4, "123");
    cluster.report(1, "t", 0, 3, &[1, 2, 3]);
    let old = replica_on(&cluster.record("t", 0), 2);
    reassign(&mut cluster, "143").unwrap();
    let moving = cluster.record("t", 0);
    let number = moving.replacement.as_ref().unwrap().number;
    assert_eq!(moving.held_by(BrokerId(2)), Some(old));
    assert_eq!(moving.leaving(), BTreeSet::from([old]));
    assert_eq!(moving.adding_brokers(), [BrokerId(4)]);
    assert_eq!(moving.removing_brokers(), [BrokerId(2)]);
    let wanted: Vec<ReplicaId> = moving.assignment.voters().collect();
    let mut with_old = wanted.clone();
    with_old.push(old);
    let partition = cluster.name("t", 0);
    let report = |epoch, isr: &[u32], voters: &[ReplicaId], change| PartitionReport {
        partition: partition.clone(),
        epoch: LeaderEpoch(epoch),
        isr: isr.iter().copied().map(BrokerId).collect(),
        voters: voters.to_vec(),
        change,
    };
    for (name, epoch, isr, voters, change) in [
        ("not in sync", 3, &[1, 3][..], &wanted, number),
        ("the old one votes", 3, &[1, 3, 4], &with_old, number),
        ("an earlier step", 3, &[1, 3, 4], &wanted, number - 1),
        ("no step", 3, &[1, 3, 4], &wanted, 0),
        ("an earlier leader", 2, &[1, 3, 4], &wanted, number),
    ] {
        cluster.send(1, report(epoch, isr, voters, change));
        assert!(cluster.record("t", 0).replacement.is_some(), "{name}");
    }
    cluster.send(1, report(3, &[1, 3, 4], &wanted, number));
    let done = cluster.record("t", 0);
    assert_eq!((&done.replacement, &done.reassignment), (&None, &None));
    assert_eq!(done.held_by(BrokerId(2)), None);
    assert!(done.adding_brokers().is_empty() && done.removing_brokers().is_empty());
}

/// Goal: asking again changes nothing, on the way and after it; another target and a cancellation take over at any step, and
/// bring back the same replicas where they are still held. Method: series of wishes with steps between them.
#[test]
fn a_move_can_be_repeated_redirected_and_cancelled() {
    let mut cluster = cluster_with(5, "123");
    let first = cluster.record("t", 0);
    reassign(&mut cluster, "123").unwrap();
    cancel(&mut cluster);
    assert_eq!(cluster.record("t", 0), first);
    reassign(&mut cluster, "234").unwrap();
    let moving = cluster.record("t", 0);
    reassign(&mut cluster, "234").unwrap();
    assert_eq!(cluster.record("t", 0), moving);
    // elsewhere: broker 1 keeps its replica, and so does 4, until the end
    reassign(&mut cluster, "235").unwrap();
    let redirected = cluster.record("t", 0);
    let leaving = [replica_on(&first, 1), replica_on(&moving, 4)];
    assert_eq!(redirected.leaving(), BTreeSet::from(leaving));
    cancel(&mut cluster);
    let cancelled = cluster.record("t", 0);
    assert_eq!(cancelled.assignment, first.assignment);
    let step = cancelled.replacement.clone().unwrap();
    assert_eq!(step.adding, BTreeSet::from([replica_on(&first, 1)]));
    assert_eq!(cancelled.removing_brokers(), [4, 5].map(BrokerId));
    cancel(&mut cluster);
    assert_eq!(cluster.record("t", 0), cancelled);
    end_step(&mut cluster);
    let rested = cluster.record("t", 0);
    assert_eq!(rested.assignment, first.assignment);
    assert_eq!((rested.replacement, rested.reassignment), (None, None));

    // at each step of a move with a witness in the way
    for ended in 0..3 {
        let mut cluster = cluster_with(3, "12w3");
        reassign(&mut cluster, "31w2").unwrap();
        for _ in 0..ended {
            end_step(&mut cluster);
        }
        cancel(&mut cluster);
        let steps = all_steps(&mut cluster);
        assert_eq!(
            steps.last().unwrap(),
            "12w3",
            "after {ended} steps: {steps:?}"
        );
    }
}

/// Goal: what cannot be is refused, with nothing changed. Method: a table; the text says what is wrong.
#[test]
fn impossible_targets_are_refused() {
    for (target, text) in [
        ("", "at least one replica"),
        ("1", "min.insync.replicas 2"),
        ("11", "once"),
        ("12w2", "once"),
        ("129", "broker 9 is not registered"),
        ("123w4", "no witness"),
    ] {
        let mut cluster = cluster_with(4, "12w3");
        let name = TopicName::new("t2").unwrap();
        let config = BTreeMap::from([("min.insync.replicas".to_owned(), "2".to_owned())]);
        let settings = TopicConfig::parse(&config, 2).unwrap();
        let partitions = vec![placement("12w3")];
        let create = Command::CreateTopic {
            name: name.clone(),
            config,
            settings,
            partitions,
        };
        cluster.apply(create).unwrap();
        let partition = cluster.name("t2", 0);
        let refused = cluster.apply(Command::ReassignPartition {
            partition,
            target: placement(target),
        });
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(text), "{target}: {refused}");
    }
    let mut cluster = cluster_with(4, "12w3");
    let mut partition = cluster.name("t", 7);
    let target = placement("13w2");
    let command = |partition: &TopicPartition| Command::ReassignPartition {
        partition: partition.clone(),
        target: target.clone(),
    };
    let refused = cluster.apply(command(&partition));
    assert!(matches!(refused, Err(Error::UnknownPartition { .. })));
    partition = cluster.name("gone", 0);
    let refused = cluster.apply(command(&partition));
    assert!(matches!(refused, Err(Error::UnknownTopic { .. })));
    let refused = cluster.apply(Command::CancelReassignment { partition });
    assert!(matches!(refused, Err(Error::UnknownTopic { .. })));
}

/// Goal: a move that is redirected again and again while nothing ends is refused at some point, so that the state stays small;
/// the way out that the message names works. Method: thirty brokers in turn.
#[test]
fn endless_redirection_is_refused() {
    let mut cluster = Cluster::of(30);
    cluster.create("t", &[(&[1, 2, 3], None)]);
    let mut refused = None;
    for broker in 4..=30 {
        let partition = cluster.name("t", 0);
        let target = PlannedPartition {
            replicas: [broker, 1, 2].map(BrokerId).to_vec(),
            witness: None,
        };
        if let Err(error) = cluster.apply(Command::ReassignPartition { partition, target }) {
            refused = Some(error);
            break;
        }
    }
    assert!(
        matches!(refused, Some(Error::Refused { .. })),
        "{refused:?}"
    );
    assert!(cluster.record("t", 0).leaving().len() <= 6);
    end_step(&mut cluster);
    assert!(cluster.record("t", 0).leaving().is_empty());
    reassign(&mut cluster, "456").unwrap();
}

/// What Raft and the brokers make of the steps: who votes, and which replicas exist.
#[derive(Debug)]
struct Group {
    voters: BTreeSet<ReplicaId>,
    /// The replicas that a broker has started and not deleted.
    alive: BTreeSet<ReplicaId>,
    /// Replicas with every acknowledged record.
    whole: BTreeSet<ReplicaId>,
    /// The step whose end the leader saw last, and who voted then.
    settled: Option<(u32, Vec<ReplicaId>)>,
}

impl Group {
    /// Every broker starts and deletes what the image asks for.
    fn reconcile(&mut self, cluster: &Cluster) {
        let record = cluster.record("t", 0);
        let held: BTreeSet<ReplicaId> = (1..=6)
            .filter_map(|broker| record.held_by(BrokerId(broker)))
            .collect();
        for broker in 1..=6 {
            let here = |replica: &ReplicaId| replica.broker() == BrokerId(broker);
            let kept: Vec<ReplicaId> = held.iter().copied().filter(here).collect();
            assert!(kept.len() <= 1, "broker {broker} should hold {kept:?}");
        }
        self.alive.retain(|replica| held.contains(replica));
        self.whole.retain(|replica| held.contains(replica));
        self.alive.extend(held);
    }
}

proptest! {
    /// Goal: whatever is asked for in whatever state, no voter that holds records is ever given up but by its own disk, the
    /// last whole copy stays, one broker is never asked to hold two replicas, the weight kept is the true one, and the last
    /// wish is fulfilled in the end. Method: random wishes, cancellations, lost disks, changes of members and reports, late
    /// ones too, against a small picture of what Raft does; then only changes and reports.
    #[test]
    fn copies_survive_any_series_of_wishes(
        deeds in prop::collection::vec((0_u8..8, prop::sample::subsequence(vec![1_u32, 2, 3, 4, 5, 6], 1..5), any::<bool>()), 1..40),
    ) {
        let mut cluster = cluster_with(6, "12w3");
        let mut directories = 1_000;
        let mut late: Vec<(u64, PartitionReport)> = Vec::new();
        let mut epoch = 1;
        let founders: BTreeSet<ReplicaId> = cluster.record("t", 0).assignment.voters().collect();
        let mut group = Group { voters: founders.clone(), alive: founders.clone(), whole: founders, settled: None };
        let quiet = [(7, vec![1], false), (6, vec![1], false)].into_iter().cycle().take(16);
        for (deed, brokers, flag) in deeds.into_iter().chain(quiet) {
            let record = cluster.record("t", 0);
            match deed {
                0 | 1 => {
                    let spare = (1..=6).find(|broker| !brokers.contains(broker));
                    let mut replicas: Vec<BrokerId> = brokers.iter().copied().map(BrokerId).collect();
                    if flag {
                        replicas.reverse();
                    }
                    let witness = spare.map(BrokerId).filter(|_| replicas.len().is_multiple_of(2));
                    let partition = cluster.name("t", 0);
                    let target = PlannedPartition { replicas, witness };
                    // may be refused: too many places
                    cluster.apply(Command::ReassignPartition { partition, target }).ok();
                }
                2 => cancel(&mut cluster),
                3 => {
                    // a disk is lost, when enough whole copies vote to go on without it
                    let victim = BrokerId(brokers[0]);
                    let others = group.voters.intersection(&group.whole);
                    let others = others.filter(|replica| replica.broker() != victim && !replica.is_witness());
                    let standing = group.voters.iter().filter(|replica| group.alive.contains(replica) && replica.broker() != victim);
                    if others.count() > 0 && standing.count() * 2 > group.voters.len() {
                        directories += 1;
                        cluster.set_alive(victim.0, false);
                        cluster.register(victim.0, directories, 1, 0).unwrap();
                        group.alive.retain(|replica| replica.broker() != victim);
                        group.whole.retain(|replica| replica.broker() != victim);
                    }
                }
                4 => {
                    // somebody hears old news once more
                    if let Some((_, report)) = late.first().cloned() {
                        let broker = report.isr[0].0;
                        cluster.send(broker, report);
                    }
                }
                5 => epoch += 1,
                6 => {
                    // the leader reports what it saw, in the image that it has now
                    let change = record.replacement.as_ref().map_or(0, |step| step.number);
                    let voters = match &group.settled {
                        Some((seen, voters)) if *seen == change => voters.clone(),
                        _ => Vec::new(),
                    };
                    let in_sync = group.voters.intersection(&group.whole);
                    let in_sync = in_sync.filter(|replica| !replica.is_witness());
                    let isr: BTreeSet<BrokerId> = in_sync.map(|replica| replica.broker()).collect();
                    let leader = isr.first().copied();
                    if let Some(leader) = leader {
                        let change = if voters.is_empty() { 0 } else { change };
                        let report = PartitionReport {
                            partition: cluster.name("t", 0),
                            epoch: LeaderEpoch(epoch * 10 + u64::from(leader.0)),
                            isr: std::iter::once(leader).chain(isr.iter().copied().filter(|id| *id != leader)).collect(),
                            voters,
                            change,
                        };
                        late.insert(0, (epoch, report.clone()));
                        late.truncate(3);
                        late.reverse();
                        cluster.send(leader.0, report);
                    }
                    epoch += 1;
                }
                _ => {
                    // the members follow the assignment: what is added catches up, then votes
                    group.reconcile(&cluster);
                    let wanted: BTreeSet<ReplicaId> = record.assignment.voters().collect();
                    let new: Vec<ReplicaId> = wanted.intersection(&group.alive).copied().collect();
                    group.whole.extend(new.iter().filter(|replica| !replica.is_witness()));
                    if new.len() == wanted.len() {
                        group.voters.clone_from(&wanted);
                        let change = record.replacement.as_ref().map_or(0, |step| step.number);
                        group.settled = Some((change, wanted.into_iter().collect()));
                    }
                }
            }
            let before = group.alive.clone();
            group.reconcile(&cluster);
            for given_up in before.difference(&group.alive) {
                prop_assert!(!group.voters.contains(given_up), "{given_up} votes and was deleted");
            }
            prop_assert!(group.voters.iter().any(|replica| group.whole.contains(replica)), "no whole copy votes");
            let (name, topic) = cluster.image.topics().next().unwrap();
            prop_assert_eq!(cluster.image.topics_weight, weight(name, topic));
            let bytes = crate::types::encode(&cluster.record("t", 0)).len();
            prop_assert!(u64::try_from(bytes).unwrap() <= cluster.record("t", 0).weight());
        }
        let record = cluster.record("t", 0);
        prop_assert_eq!(&record.replacement, &None);
        prop_assert_eq!(&record.reassignment, &None);
        let wanted: BTreeSet<ReplicaId> = record.assignment.voters().collect();
        prop_assert_eq!(&group.voters, &wanted);
    }
}
