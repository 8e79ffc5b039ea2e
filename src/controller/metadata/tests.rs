//! The metadata, command by command; and a small cluster for other tests of the controller.

use super::*;
use crate::controller::placement::{Candidate, Loads, TopicShape, plan_topic};
use crate::net::Identity;
use crate::types::{Endpoint, Incarnation, ReplicaKind};
use proptest::prelude::*;

/// A metadata image with shorthand for the commands that tests need.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    pub(crate) image: ClusterMetadata,
    index: u64,
}

fn register_command(broker: u32, incarnation: u128, boot: u64, position: u64) -> Command {
    let incarnation = Incarnation(incarnation);
    let epoch = incarnation.controller_epoch();
    Command::RegisterBroker {
        endpoint: Endpoint {
            broker: BrokerId(broker),
            address: format!("h{broker}:1"),
        },
        rack: None,
        incarnation,
        boot,
        position,
        controller_replica: ReplicaId::new(BrokerId(broker), ReplicaKind::Data, epoch),
    }
}

pub(crate) fn replica_on(record: &PartitionRecord, broker: u32) -> ReplicaId {
    record.assignment.on(BrokerId(broker)).unwrap()
}

impl Cluster {
    /// Brokers 1 to `brokers`, each in directory 10 × its id, boot 1, at position 100.
    pub(crate) fn of(brokers: u32) -> Self {
        let mut cluster = Self {
            image: ClusterMetadata::default(),
            index: 0,
        };
        cluster
            .apply(Command::InitCluster {
                cluster: ClusterId(1),
            })
            .unwrap();
        for broker in 1..=brokers {
            cluster
                .register(broker, u128::from(broker) * 10, 1, 100)
                .unwrap();
        }
        cluster
    }

    #[allow(clippy::needless_pass_by_value)] // reads as the real one does
    pub(crate) fn apply(&mut self, command: Command) -> Result<Answer, Error> {
        self.index += 1;
        let before = self.image.clone();
        let command = Command::from_bytes(&command.to_bytes()).unwrap();
        let answer = self.image.apply(LogIndex(self.index), command);
        if answer.is_err() {
            assert_eq!(self.image, before, "a refused command changed something");
        }
        answer
    }

    pub(crate) fn register(
        &mut self,
        broker: u32,
        incarnation: u128,
        boot: u64,
        position: u64,
    ) -> Result<Answer, Error> {
        self.apply(register_command(broker, incarnation, boot, position))
    }

    pub(crate) fn set_alive(&mut self, broker: u32, alive: bool) {
        self.apply(Command::SetAlive {
            broker: BrokerId(broker),
            alive,
        })
        .unwrap();
    }

    pub(crate) fn try_create(
        &mut self,
        name: &str,
        partitions: &[(&[u32], Option<u32>)],
    ) -> Result<Answer, Error> {
        let planned = partitions
            .iter()
            .map(|(replicas, witness)| PlannedPartition {
                replicas: replicas.iter().copied().map(BrokerId).collect(),
                witness: witness.map(BrokerId),
            });
        self.apply(Command::CreateTopic {
            name: TopicName::new(name).unwrap(),
            config: BTreeMap::new(),
            settings: TopicConfig::default(),
            partitions: planned.collect(),
        })
    }

    pub(crate) fn create(&mut self, name: &str, partitions: &[(&[u32], Option<u32>)]) {
        self.try_create(name, partitions).unwrap();
    }

    #[allow(clippy::unused_self)] // reads better at the call
    pub(crate) fn name(&self, topic: &str, partition: u32) -> TopicPartition {
        TopicPartition {
            topic: TopicName::new(topic).unwrap(),
            partition: PartitionId(partition),
        }
    }

    pub(crate) fn record(&self, topic: &str, partition: u32) -> PartitionRecord {
        (**self.image.partition(&self.name(topic, partition)).unwrap()).clone()
    }

    pub(crate) fn report(
        &mut self,
        broker: u32,
        topic: &str,
        partition: u32,
        epoch: u64,
        isr: &[u32],
    ) {
        let report = PartitionReport {
            partition: self.name(topic, partition),
            epoch: LeaderEpoch(epoch),
            isr: isr.iter().copied().map(BrokerId).collect(),
            voters: Vec::new(),
            change: 0,
        };
        self.send(broker, report);
    }

    /// As [`Cluster::report`], with the voters seen after the change under way.
    pub(crate) fn report_voters(
        &mut self,
        broker: u32,
        topic: &str,
        partition: u32,
        epoch: u64,
        isr: &[u32],
        voters: Vec<ReplicaId>,
    ) {
        let change = self.record(topic, partition).replacement;
        let change = change.filter(|_| !voters.is_empty());
        let report = PartitionReport {
            partition: self.name(topic, partition),
            epoch: LeaderEpoch(epoch),
            isr: isr.iter().copied().map(BrokerId).collect(),
            voters,
            change: change.map_or(0, |change| change.number),
        };
        self.send(broker, report);
    }

    pub(crate) fn send(&mut self, broker: u32, report: PartitionReport) {
        let (broker, reports) = (BrokerId(broker), vec![report]);
        self.apply(Command::ReportPartitions {
            broker,
            reports,
            position: 0,
        })
        .unwrap();
    }
}

fn identity(broker: u32, incarnation: u128, boot: u64, position: u64) -> Identity {
    let incarnation = Incarnation(incarnation);
    Identity {
        broker: BrokerId(broker),
        incarnation,
        cluster: Some(ClusterId(1)),
        boot,
        position,
    }
}

/// Goal: the first cluster id stays, and nothing else is done before there is one. Method: commands out of order.
#[test]
fn a_cluster_is_named_once_and_first() {
    let mut cluster = Cluster {
        image: ClusterMetadata::default(),
        index: 0,
    };
    assert_eq!(
        cluster.register(1, 10, 1, 0),
        Err(Error::ControllerUnavailable)
    );
    for id in [5, 6] {
        let init = Command::InitCluster {
            cluster: ClusterId(id),
        };
        assert_eq!(cluster.apply(init), Ok(Answer::Cluster(ClusterId(5))));
    }
    assert_eq!(cluster.register(1, 10, 1, 0), Ok(Answer::Done));
}

/// Goal: a broker restarts and retries freely, but an old copy of its directory is refused, at registration and at the door.
/// Method: a table of (boot, position, registered, admitted) against boot 3 that began at 500 and has reported 900.
#[test]
fn old_copies_of_a_directory_are_refused() {
    let table = [
        ("restart", 4, 900, true, true),
        ("restart, later", 9, 2_000, true, true),
        ("retry of the same registration", 3, 500, true, true),
        ("a copy from before this boot", 3, 400, false, true),
        ("another process of the same boot", 3, 900, false, true),
        ("an older boot", 2, 5_000, false, false),
        ("a copy, opened again", 4, 899, false, false),
        ("a copy, opened often", 99, 0, false, false),
    ];
    for (name, boot, position, registered, admitted) in table {
        let mut cluster = Cluster::of(3);
        cluster.register(1, 10, 3, 500).unwrap();
        let (broker, reports) = (BrokerId(1), Vec::new());
        cluster
            .apply(Command::ReportPartitions {
                broker,
                reports,
                position: 900,
            })
            .unwrap();
        let late = Command::ReportPartitions {
            broker,
            reports: Vec::new(),
            position: 600,
        };
        cluster.apply(late).unwrap(); // out of order: does not lower it
        let answer = cluster.image.admits(&identity(1, 10, boot, position));
        assert_eq!(answer.is_ok(), admitted, "{name}: {answer:?}");
        let answer = cluster.register(1, 10, boot, position);
        assert_eq!(answer.is_ok(), registered, "{name}: {answer:?}");
        if let Err(error) = answer {
            assert!(
                matches!(&error, Error::Refused { reason } if reason.contains("old copy")),
                "{error}"
            );
        } else {
            assert!(cluster.image.broker(BrokerId(1)).unwrap().position >= 900);
        }
    }
}

/// Goal: nobody moves a running broker to another address by repeating its registration, which every handshake shows. Method:
/// the same registration with another address.
#[test]
fn a_repeated_registration_moves_nobody() {
    let mut cluster = Cluster::of(1);
    let before = cluster.image.endpoint(BrokerId(1));
    let mut command = register_command(1, 10, 1, 100);
    assert_eq!(cluster.apply(command.clone()), Ok(Answer::Done));
    if let Command::RegisterBroker { endpoint, .. } = &mut command {
        "elsewhere:1".clone_into(&mut endpoint.address);
    }
    assert!(matches!(cluster.apply(command), Err(Error::Refused { .. })));
    assert_eq!(cluster.image.endpoint(BrokerId(1)), before);
}

/// Goal: only the registered process takes part. Method: the door's table for other cases than old copies.
#[test]
fn strangers_are_not_admitted() {
    let cluster = Cluster::of(2);
    let admits = |identity| cluster.image.admits(&identity);
    assert_eq!(admits(identity(1, 10, 1, 100)), Ok(()));
    assert_eq!(admits(identity(9, 90, 1, 0)), Ok(()), "not registered yet");
    assert!(
        admits(identity(1, 11, 1, 100)).is_err(),
        "another directory"
    );
    let foreign = Identity {
        cluster: Some(ClusterId(2)),
        ..identity(1, 10, 1, 100)
    };
    assert!(admits(foreign).is_err());
    let unnamed = Identity {
        cluster: None,
        ..identity(1, 10, 1, 100)
    };
    assert_eq!(admits(unnamed), Ok(()));
}

/// Goal: a broker that comes back with an empty directory reads the log of its own and others' earlier directories without
/// taking itself for replaced, or the others for strangers. Method: the images before and after each registration.
#[test]
fn images_from_before_a_registration_are_not_held_against_anyone() {
    let (first, second) = (Incarnation(10), Incarnation(11));
    let mut cluster = Cluster::of(2);
    let before = cluster.image.clone();
    cluster.set_alive(1, false);
    cluster.register(1, second.0, 1, 0).unwrap();
    let record = |image: &ClusterMetadata| image.broker(BrokerId(1)).unwrap().clone();
    assert!(!record(&before).supersedes(second, 1), "not registered yet");
    assert!(!record(&before).supersedes(first, 1));
    assert!(record(&before).supersedes(first, 0), "opened again since");
    assert!(record(&cluster.image).supersedes(first, 1), "given up");
    assert!(!record(&cluster.image).supersedes(second, 1));
    // the same seen from another broker, which was away meanwhile
    let (old, new) = (identity(1, first.0, 1, 100), identity(1, second.0, 1, 0));
    assert!(
        before.admits(&new).is_err(),
        "one that is up to date knows better"
    );
    assert_eq!(before.admits_while_old(&new), Ok(()));
    assert_eq!(before.admits_while_old(&old), Ok(()));
    assert!(
        before
            .admits_while_old(&identity(1, first.0, 1, 99))
            .is_ok()
    );
    assert!(
        before
            .admits_while_old(&identity(1, first.0, 2, 99))
            .is_err(),
        "an old copy"
    );
    assert!(cluster.image.admits_while_old(&old).is_err(), "given up");
    let foreign = Identity {
        cluster: Some(ClusterId(2)),
        ..new
    };
    assert!(before.admits_while_old(&foreign).is_err());
}

/// Goal: a broker that lost its disk comes back as new replicas, in every partition, and no identity comes back. Method:
/// register another directory after the broker was given up; look at assignments, founders, ISR and retired directories.
#[test]
fn a_lost_disk_gets_new_replicas() {
    let mut cluster = Cluster::of(3);
    cluster.create(
        "t",
        &[(&[1, 2], Some(3)), (&[2, 3], Some(1)), (&[3, 2], None)],
    );
    cluster.report(1, "t", 0, 2, &[1, 2]);
    let before: Vec<PartitionRecord> = (0..3).map(|number| cluster.record("t", number)).collect();
    let running = cluster.register(1, 11, 1, 0);
    assert!(
        matches!(running, Err(Error::BrokerRunning { .. })),
        "{running:?}"
    );
    cluster.set_alive(1, false);
    cluster.register(1, 11, 1, 0).unwrap();
    for (number, old) in before.iter().enumerate().take(2) {
        let new = cluster.record("t", u32::try_from(number).unwrap());
        let (old_id, new_id) = (replica_on(old, 1), replica_on(&new, 1));
        assert!(new_id.epoch() > old_id.epoch());
        assert_eq!(new_id.kind(), old_id.kind());
        assert_eq!(new.founding, old.assignment);
        let change = new.replacement.unwrap();
        assert_eq!(change.adding, BTreeSet::from([new_id]));
        assert_eq!(
            change.removing,
            BTreeSet::new(),
            "there is nothing left to keep"
        );
        assert!(!new.isr.contains(&BrokerId(1)));
        assert_eq!(new.leader, None);
    }
    assert_eq!(
        cluster.record("t", 2),
        before[2],
        "a partition elsewhere is untouched"
    );
    let record = cluster.image.broker(BrokerId(1)).unwrap();
    assert_eq!(record.controller_replica.epoch(), 11);
    cluster.set_alive(1, false);
    let old = cluster.register(1, 10, 7, 9_999);
    assert!(
        matches!(&old, Err(Error::Refused { reason }) if reason.contains("given up")),
        "{old:?}"
    );
    // same low bits: it would be the same member of group 0
    let twin = cluster.register(1, 10 + (1 << 64), 1, 0);
    assert!(matches!(twin, Err(Error::Refused { .. })), "{twin:?}");
}

/// Goal: a replacement ends when exactly the assigned replicas vote and the new one is in sync, not before. Method: reports
/// that show one condition each, then all.
#[test]
fn a_replacement_ends_when_it_is_complete() {
    let mut cluster = Cluster::of(3);
    cluster.create("t", &[(&[1, 2], Some(3))]);
    let old = cluster.record("t", 0).assignment;
    cluster.report(2, "t", 0, 2, &[2]);
    cluster.set_alive(1, false);
    cluster.register(1, 11, 1, 0).unwrap();
    let new: Vec<ReplicaId> = cluster.record("t", 0).assignment.voters().collect();
    let old: Vec<ReplicaId> = old.voters().collect();
    let mut with_extra = new.clone();
    with_extra.push(old[0]);
    for (isr, voters) in [
        (&[1, 2][..], Vec::new()),
        (&[1, 2], old),
        (&[1, 2], with_extra),
        (&[2], new.clone()),
    ] {
        cluster.report_voters(2, "t", 0, 2, isr, voters);
        assert!(cluster.record("t", 0).replacement.is_some());
    }
    cluster.report_voters(2, "t", 0, 2, &[2, 1], new);
    assert_eq!(cluster.record("t", 0).replacement, None);
}

/// A broker as leader, its epoch, and who is in sync.
type Seen<'a> = (u32, u64, &'a [u32]);

/// Goal: reports never turn time back, and only possible leaders are believed. Method: a series of reports, each with what
/// must be known after it.
#[test]
fn older_and_impossible_reports_are_ignored() {
    let mut cluster = Cluster::of(4);
    cluster.create("t", &[(&[1, 2], Some(3))]);
    let series: [(Seen<'_>, Seen<'_>); 8] = [
        ((1, 5, &[1]), (1, 5, &[1])),
        ((1, 5, &[1, 2]), (1, 5, &[1, 2])),
        ((2, 4, &[2]), (1, 5, &[1, 2])),    // older
        ((2, 5, &[2]), (1, 5, &[1, 2])),    // one leader per epoch
        ((3, 9, &[3]), (1, 5, &[1, 2])),    // a witness
        ((4, 9, &[4]), (1, 5, &[1, 2])),    // no replica
        ((2, 9, &[2, 4]), (1, 5, &[1, 2])), // a stranger in sync
        ((2, 6, &[2]), (2, 6, &[2])),
    ];
    for (number, ((broker, epoch, isr), (leader, known, in_sync))) in series.into_iter().enumerate()
    {
        cluster.report(broker, "t", 0, epoch, isr);
        let record = cluster.record("t", 0);
        assert_eq!(record.leader, Some(BrokerId(leader)), "{number}");
        assert_eq!(record.epoch, LeaderEpoch(known), "{number}");
        assert_eq!(
            record.isr,
            in_sync.iter().copied().map(BrokerId).collect::<Vec<_>>(),
            "{number}"
        );
    }
    cluster.report(1, "gone", 0, 9, &[1]); // a topic deleted meanwhile
    cluster.report(1, "t", 7, 9, &[1]);
}

/// Goal: a topic's identities are new each time, and bad plans are refused. Method: create, delete, create again; a table.
#[test]
fn topics_come_and_go_with_new_identities() {
    let mut cluster = Cluster::of(3);
    cluster.create("t", &[(&[1, 2], Some(3)), (&[2, 3], Some(1))]);
    let first = cluster.record("t", 1);
    assert!(matches!(
        cluster.try_create("t", &[(&[1], None)]),
        Err(Error::TopicExists { .. })
    ));
    let delete = Command::DeleteTopic {
        name: TopicName::new("t").unwrap(),
    };
    cluster.apply(delete.clone()).unwrap();
    assert!(matches!(
        cluster.apply(delete),
        Err(Error::UnknownTopic { .. })
    ));
    assert_eq!(cluster.image.partition_of(first.group), None);
    cluster.create("t", &[(&[1, 2], Some(3)), (&[2, 3], Some(1))]);
    let second = cluster.record("t", 1);
    assert!(second.group > first.group);
    assert!(replica_on(&second, 2).epoch() > replica_on(&first, 2).epoch());
    assert_eq!(
        cluster.image.partition_of(second.group),
        Some(&cluster.name("t", 1))
    );
    let bad: [&[(&[u32], Option<u32>)]; 6] = [
        &[],
        &[(&[], None)],
        &[(&[1, 1], None)],
        &[(&[1, 2], Some(2))],
        &[(&[1, 9], None)],
        &[(&[1, 2], None), (&[1], None)],
    ];
    for plan in bad {
        assert!(
            matches!(
                cluster.try_create("bad", plan),
                Err(Error::InvalidRequest { .. })
            ),
            "{plan:?}"
        );
    }
}

/// Goal: an old image does not speak about replicas younger than itself. Method: ask the images before and after a creation.
#[test]
fn an_image_knows_which_replicas_are_older_than_itself() {
    let mut cluster = Cluster::of(2);
    let before = cluster.image.clone();
    cluster.create("t", &[(&[1, 2], None)]);
    let replica = replica_on(&cluster.record("t", 0), 1);
    assert!(!before.knows(replica));
    assert!(cluster.image.knows(replica));
    cluster
        .apply(Command::DeleteTopic {
            name: TopicName::new("t").unwrap(),
        })
        .unwrap();
    assert!(cluster.image.knows(replica));
}

/// Goal: the state always fits into a checkpoint. Method: create the largest topics until refused; encode; delete one, and
/// there is room again.
#[test]
fn the_state_fits_into_a_checkpoint() {
    let mut cluster = Cluster::of(5);
    let all: Vec<(&[u32], Option<u32>)> = vec![(&[1, 2, 3, 4], Some(5)); 10_000];
    let mut created = 0;
    let refused = loop {
        match cluster.try_create(&format!("t{created}"), &all) {
            Ok(_) => created += 1,
            Err(error) => break error,
        }
        assert!(created < 1_000);
    };
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    assert!(created >= 2);
    for broker in 1..=5 {
        cluster.set_alive(broker, false);
        cluster.register(broker, 1_000, 1, 0).unwrap();
    }
    let bytes = cluster.image.to_bytes();
    assert!(bytes.len() < crate::types::CODEC_LIMIT, "{}", bytes.len());
    assert_eq!(
        ClusterMetadata::from_bytes(&bytes),
        Ok(cluster.image.clone())
    );
    cluster
        .apply(Command::DeleteTopic {
            name: TopicName::new("t0").unwrap(),
        })
        .unwrap();
    cluster.create("again", &all);
}

/// Goal: what clients and operators see is what was reported, and a dead leader is not named. Method: read every view.
#[test]
fn views_show_what_was_reported() {
    let mut cluster = Cluster::of(3);
    cluster.create("t", &[(&[1, 2], Some(3)), (&[2, 3], Some(1))]);
    cluster.create("u", &[(&[3], None)]);
    let (t, unknown) = (TopicName::new("t").unwrap(), TopicName::new("x").unwrap());
    assert!(!cluster.image.all_led(&t));
    cluster.report(1, "t", 0, 1, &[1, 2]);
    cluster.report(2, "t", 1, 1, &[2]);
    assert!(cluster.image.all_led(&t));
    assert!(!cluster.image.all_led(&unknown));
    let routes = cluster
        .image
        .routes(Some(&[t.clone(), unknown.clone(), t.clone()]));
    assert_eq!(routes.len(), 1);
    assert_eq!(routes[0].partitions[1].leader, Some(BrokerId(2)));
    assert_eq!(routes[0].partitions[1].replicas, [2, 3].map(BrokerId));
    assert_eq!(cluster.image.routes(None).len(), 2);
    let views = cluster.image.broker_views();
    let figures: Vec<_> = views
        .iter()
        .map(|view| (view.leads, view.replicas, view.alive))
        .collect();
    assert_eq!(figures, [(1, 1, true), (1, 2, true), (0, 2, true)]);
    assert_eq!(
        cluster.image.witness_of(&cluster.name("t", 0)),
        Some(BrokerId(3))
    );
    assert_eq!(cluster.image.replication_factor(&t), 2);
    cluster.set_alive(1, false);
    assert_eq!(cluster.image.routes(None)[0].partitions[0].leader, None);
    assert_eq!(
        cluster.image.leader_of(&cluster.name("t", 0)),
        Some(BrokerId(1))
    );
    assert!(!cluster.image.all_led(&t));
    assert_eq!(cluster.image.check_partition(&cluster.name("t", 1)), Ok(()));
    let missing = cluster.image.check_partition(&cluster.name("t", 2));
    assert!(matches!(
        missing,
        Err(Error::UnknownPartition { partitions: 2, .. })
    ));
    let held: Vec<_> = cluster
        .image
        .replicas_on(BrokerId(3))
        .map(|(name, ..)| name)
        .collect();
    assert_eq!(
        held,
        [
            cluster.name("t", 0),
            cluster.name("t", 1),
            cluster.name("u", 0)
        ]
    );
}

impl Cluster {
    /// Broker `broker` says that its replica of `t-0`, with a last entry of `epoch`, is damaged.
    fn damage(&mut self, broker: u32, epoch: u64) -> Result<Answer, Error> {
        let replica = self.record("t", 0).held_by(BrokerId(broker)).unwrap();
        self.damaged(replica, epoch)
    }

    fn damaged(&mut self, replica: ReplicaId, epoch: u64) -> Result<Answer, Error> {
        let (partition, epoch) = (self.name("t", 0), LeaderEpoch(epoch));
        self.apply(Command::ReplaceDamaged {
            partition,
            replica,
            epoch,
        })
    }
}

/// Goal: a damaged replica is given up only when nothing can be lost by it: another broker that is alive leads in an epoch that
/// is not older than its last entry, without it in sync, and enough of the others are there. Method: a table of what differs
/// from a partition of brokers 1, 2 and 3 in which 2 leads epoch 5 without broker 1, whose last entry is of epoch 5.
#[test]
fn a_damaged_replica_is_replaced_only_when_nothing_is_lost() {
    type Change = fn(&mut Cluster);
    let table: [(&str, Change, u64, Option<&str>); 10] = [
        ("safe", |_| {}, 5, None),
        (
            "led by a later one",
            |c| c.report(3, "t", 0, 6, &[2, 3]),
            5,
            None,
        ),
        (
            "the third is not in sync, and may be damaged as well",
            |c| c.report(2, "t", 0, 5, &[2]),
            5,
            Some("too few"),
        ),
        (
            "in sync",
            |c| c.report(2, "t", 0, 5, &[1, 2]),
            5,
            Some("in sync"),
        ),
        (
            "it leads",
            |c| c.report(1, "t", 0, 6, &[1, 2, 3]),
            6,
            Some("leads"),
        ),
        (
            "it led, and nobody has heard",
            |_| {},
            6,
            Some("not been heard"),
        ),
        (
            "the leader is dead",
            |c| c.set_alive(2, false),
            5,
            Some("leads"),
        ),
        (
            "the leader lost its disk",
            |c| {
                c.set_alive(2, false);
                c.register(2, 21, 1, 0).unwrap();
            },
            5,
            Some("another replica is being made"),
        ),
        (
            "the third is away",
            |c| c.set_alive(3, false),
            5,
            Some("too few"),
        ),
        ("it is not alive itself", |c| c.set_alive(1, false), 5, None),
    ];
    for (name, change, epoch, refusal) in table {
        let mut cluster = Cluster::of(4);
        cluster.create("t", &[(&[1, 2, 3], None)]);
        cluster.report(2, "t", 0, 5, &[2, 3]);
        change(&mut cluster);
        let before = cluster.record("t", 0);
        let old = replica_on(&before, 1);
        let answer = cluster.damage(1, epoch);
        match (answer, refusal) {
            (Ok(Answer::Done), None) => {}
            (Err(Error::Refused { reason }), Some(part)) if reason.contains(part) => continue,
            (answer, _) => panic!("{name}: {answer:?}"),
        }
        let after = cluster.record("t", 0);
        let new = replica_on(&after, 1);
        assert!(new.epoch() > old.epoch() && !new.is_witness(), "{name}");
        let change = after.replacement.clone().unwrap();
        assert_eq!(change.adding, [new].into(), "{name}");
        assert!(change.removing.is_empty(), "{name}: {change:?}");
        assert_eq!(
            after.replica_brokers(),
            before.replica_brokers(),
            "{name}: it keeps its rank"
        );
        assert_eq!((after.leader, after.isr), (before.leader, before.isr));
        // Asked again, about the one that is gone: nothing more happens.
        let image = cluster.image.clone();
        assert_eq!(cluster.damaged(old, epoch), Ok(Answer::Done), "{name}");
        assert_eq!(cluster.image, image, "{name}");
    }
}

/// Goal: the end of the change is the leader's word, and until then no second copy is given up; a new copy that is damaged as
/// well is replaced again. Method: broker 1's replica, then its successor, then broker 3's.
#[test]
fn damaged_replicas_are_replaced_one_after_the_other() {
    let mut cluster = Cluster::of(3);
    cluster.create("t", &[(&[1, 2, 3], None)]);
    cluster.report(2, "t", 0, 5, &[2, 3]);
    cluster.damage(1, 5).unwrap();
    let first = replica_on(&cluster.record("t", 0), 1);
    let answer = cluster.damage(3, 5);
    assert!(
        matches!(&answer, Err(Error::Refused { reason }) if reason.contains("being made")),
        "{answer:?}"
    );
    cluster.damage(1, 5).unwrap();
    let second = replica_on(&cluster.record("t", 0), 1);
    assert!(second.epoch() > first.epoch());
    let voters: Vec<ReplicaId> = cluster.record("t", 0).assignment.voters().collect();
    cluster.report_voters(2, "t", 0, 5, &[1, 2], voters);
    assert_eq!(cluster.record("t", 0).replacement, None);
    cluster.damage(3, 5).unwrap();
    let change = cluster.record("t", 0).replacement.unwrap();
    assert_eq!(
        change.adding,
        [replica_on(&cluster.record("t", 0), 3)].into()
    );
}

/// Goal: a damaged witness is replaced like a copy; the only copy never is, nor one of two that decide alone together. Method:
/// partitions of one copy, of two with and without a witness.
#[test]
fn a_witness_is_replaced_and_the_only_copy_never() {
    let mut cluster = Cluster::of(3);
    cluster.create("t", &[(&[1, 2], Some(3))]);
    cluster.report(2, "t", 0, 5, &[1, 2]);
    let old = cluster.record("t", 0).assignment.witness;
    cluster.damage(3, 5).unwrap();
    let record = cluster.record("t", 0);
    let new = record.assignment.witness.unwrap();
    assert!(Some(new) != old && new.broker() == BrokerId(3) && new.is_witness());
    let voters: Vec<ReplicaId> = record.assignment.voters().collect();
    cluster.report_voters(2, "t", 0, 5, &[2], voters);
    assert_eq!(cluster.record("t", 0).replacement, None);
    cluster.damage(1, 5).unwrap();
    for (replicas, leader, reason) in [
        (&[1][..], 1, "no other copy"),
        (&[1, 2], 2, "too few of the others"),
    ] {
        let mut cluster = Cluster::of(3);
        cluster.create("t", &[(replicas, None)]);
        cluster.report(leader, "t", 0, 5, &[leader]);
        let answer = cluster.damage(1, 5);
        assert!(
            matches!(&answer, Err(Error::Refused { reason: found }) if found.contains(reason)),
            "{answer:?}"
        );
    }
}

/// Goal: damage during a move: the copy that moves away stays until the move has ended, the new one is replaced. Method: move
/// a replica from broker 3 to broker 4.
#[test]
fn damage_during_a_move_waits_for_it() {
    let mut cluster = Cluster::of(4);
    cluster.create("t", &[(&[1, 2, 3], None)]);
    cluster.report(2, "t", 0, 5, &[1, 2]);
    let (partition, replicas) = (cluster.name("t", 0), [1, 2, 4].map(BrokerId).to_vec());
    let target = PlannedPartition {
        replicas,
        witness: None,
    };
    cluster
        .apply(Command::ReassignPartition { partition, target })
        .unwrap();
    let answer = cluster.damage(3, 5);
    assert!(
        matches!(&answer, Err(Error::Refused { reason }) if reason.contains("being made")),
        "{answer:?}"
    );
    let moved = replica_on(&cluster.record("t", 0), 4);
    cluster.damage(4, 5).unwrap();
    let record = cluster.record("t", 0);
    let new = replica_on(&record, 4);
    assert!(new.epoch() > moved.epoch());
    let voters: Vec<ReplicaId> = record.assignment.voters().collect();
    cluster.report_voters(2, "t", 0, 5, &[1, 2, 4], voters);
    let record = cluster.record("t", 0);
    assert!(record.replacement.is_none() && record.reassignment.is_none());
    assert_eq!(record.held_by(BrokerId(3)), None);
}

fn any_command() -> impl Strategy<Value = Command> {
    let broker = 1_u32..6;
    let topic = prop::sample::select(vec!["a", "b", "c"]);
    let name = |text: &str| TopicName::new(text).unwrap();
    prop_oneof![
        (broker.clone(), 0_u128..3, 1_u64..5, 0_u64..50).prop_map(
            |(broker, directory, boot, position)| register_command(
                broker,
                u128::from(broker) * 10 + directory,
                boot,
                position
            )
        ),
        (broker.clone(), any::<bool>()).prop_map(|(broker, alive)| Command::SetAlive {
            broker: BrokerId(broker),
            alive
        }),
        (
            broker.clone(),
            topic.clone(),
            0_u32..3,
            0_u64..6,
            prop::collection::vec(1_u32..6, 0..3),
            0_u64..60
        )
            .prop_map(move |(broker, topic, partition, epoch, isr, position)| {
                let report = PartitionReport {
                    partition: TopicPartition {
                        topic: name(topic),
                        partition: PartitionId(partition),
                    },
                    epoch: LeaderEpoch(epoch),
                    isr: isr.into_iter().map(BrokerId).collect(),
                    voters: Vec::new(),
                    change: 0,
                };
                Command::ReportPartitions {
                    broker: BrokerId(broker),
                    reports: vec![report],
                    position,
                }
            }),
        (topic.clone(), 1_u32..4, 1_u32..4, 1_u32..6).prop_map(
            move |(topic, partitions, rf, brokers)| {
                let candidates: Vec<Candidate> = (1..=brokers)
                    .map(|id| Candidate {
                        broker: BrokerId(id),
                        rack: None,
                    })
                    .collect();
                let shape = TopicShape {
                    partitions,
                    replication_factor: rf,
                    pinned: &[],
                };
                let planned = plan_topic(&candidates, &Loads::default(), shape);
                Command::CreateTopic {
                    name: name(topic),
                    config: BTreeMap::new(),
                    settings: TopicConfig::default(),
                    partitions: planned.map(|plan| plan.partitions).unwrap_or_default(),
                }
            }
        ),
        topic
            .clone()
            .prop_map(move |topic| Command::DeleteTopic { name: name(topic) }),
        (
            topic.clone(),
            0_u32..3,
            prop::collection::vec(1_u32..7, 0..4),
            prop::option::of(1_u32..7)
        )
            .prop_map(move |(topic, partition, replicas, witness)| {
                Command::ReassignPartition {
                    partition: TopicPartition {
                        topic: name(topic),
                        partition: PartitionId(partition),
                    },
                    target: PlannedPartition {
                        replicas: replicas.into_iter().map(BrokerId).collect(),
                        witness: witness.map(BrokerId),
                    },
                }
            }),
        (
            topic.clone(),
            0_u32..3,
            1_u32..6,
            any::<bool>(),
            1_u32..20,
            0_u64..3
        )
            .prop_map(
                move |(topic, partition, broker, is_witness, number, epoch)| {
                    let kind = if is_witness {
                        ReplicaKind::Witness
                    } else {
                        ReplicaKind::Data
                    };
                    Command::ReplaceDamaged {
                        partition: TopicPartition {
                            topic: name(topic),
                            partition: PartitionId(partition),
                        },
                        replica: ReplicaId::new(BrokerId(broker), kind, number),
                        epoch: LeaderEpoch(epoch),
                    }
                }
            ),
        (topic, 0_u32..3).prop_map(move |(topic, partition)| Command::CancelReassignment {
            partition: TopicPartition {
                topic: name(topic),
                partition: PartitionId(partition),
            },
        }),
        Just(Command::AllocateProducerId),
    ]
}

proptest! {
    /// Goal: two replicas that apply the same commands are equal, wherever one of them restarts from a checkpoint; no refused
    /// command changes anything; no replica id, group id or producer id is ever given out twice. Method: random commands
    /// over few names, so that they meet; identities collected along the way.
    #[test]
    fn the_same_commands_make_the_same_state(
        commands in prop::collection::vec(any_command(), 1..60),
        restart_at in 0_usize..60,
    ) {
        let (mut first, mut second) = (Cluster::of(3), Cluster::of(3));
        let mut owners: BTreeMap<(GroupId, ReplicaId), Incarnation> = BTreeMap::new();
        let mut names: BTreeMap<GroupId, (TopicPartition, LogIndex)> = BTreeMap::new();
        let mut producers = BTreeSet::new();
        for (number, command) in commands.into_iter().enumerate() {
            let answer = first.apply(command.clone());
            prop_assert_eq!(&answer, &second.apply(command));
            if number == restart_at {
                second.image = ClusterMetadata::from_bytes(&second.image.to_bytes()).unwrap();
            }
            prop_assert_eq!(&first.image, &second.image);
            if let Ok(Answer::ProducerId(id)) = answer {
                prop_assert!(producers.insert(id));
            }
            for (name, record) in first.image.partitions() {
                let topic = first.image.topic(&name.topic).unwrap().id;
                let known = names.entry(record.group).or_insert_with(|| (name.clone(), topic));
                prop_assert_eq!(&*known, &(name, topic));
                let brokers: BTreeSet<_> = record.assignment.voters().map(ReplicaId::broker).collect();
                prop_assert_eq!(brokers.len(), record.assignment.voters().count());
                for replica in record.assignment.voters() {
                    prop_assert!(first.image.knows(replica));
                    let directory = first.image.broker(replica.broker()).unwrap().incarnation;
                    let owner = owners.entry((record.group, replica)).or_insert(directory);
                    prop_assert_eq!(*owner, directory, "{} went to another directory", replica);
                }
            }
        }
    }
}
