//! Where the replicas of a partition may be moved, and where its witness goes. Pure: the image and an operator's wish in, a
//! target or a refusal out.
//!
//! Owns no state. The steps from here to there are planned when they are due (`metadata`).

use std::collections::BTreeSet;

use crate::types::{BrokerId, Error, ReplicaId, TopicPartition};

use super::metadata::{BrokerRecord, ClusterMetadata, PartitionRecord, PlannedPartition};
use super::placement::{Candidate, Loads, choose_witness};

/// Where a partition goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MovePlan {
    /// Its replicas in the end.
    pub target: PlannedPartition,
    /// What the operator should know, one line each.
    pub warnings: Vec<String>,
}

/// Plans to move the data replicas of `partition` to `replicas`, the preferred leader first. The witness of an even number
/// stays where it is when it can; else it goes to a broker that holds nothing of the partition, or to one that will not.
///
/// # Errors
/// `UnknownTopic`, `UnknownPartition`; `InvalidReplicationFactor` for more replicas than brokers; `InvalidRequest` for none, for
/// a broker named twice, for one that is unknown, and for one that is not alive and has no copy yet.
pub fn plan_move(
    image: &ClusterMetadata,
    partition: &TopicPartition,
    replicas: &[BrokerId],
) -> Result<MovePlan, Error> {
    image.check_partition(partition)?;
    let Some(record) = image.partition(partition) else {
        return Err(Error::UnknownTopic {
            topic: partition.topic.clone(),
        });
    };
    check_brokers(image, record, replicas)?;
    let needs_witness = replicas.len().is_multiple_of(2);
    let witness = if needs_witness {
        place_witness(image, record, replicas, None)
    } else {
        None
    };
    let target = PlannedPartition {
        replicas: replicas.to_vec(),
        witness,
    };
    let warnings = warnings(record, &target);
    Ok(MovePlan { target, warnings })
}

fn check_brokers(
    image: &ClusterMetadata,
    record: &PartitionRecord,
    replicas: &[BrokerId],
) -> Result<(), Error> {
    let invalid = |reason: String| Err(Error::InvalidRequest { reason });
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let known = image.brokers().count();
    if replicas.is_empty() {
        return invalid("name the brokers that should hold the partition".to_owned());
    }
    if replicas.len() > known {
        return Err(Error::InvalidReplicationFactor {
            requested: count(replicas.len()),
            brokers: count(known),
        });
    }
    let mut named = BTreeSet::new();
    for broker in replicas {
        if !named.insert(*broker) {
            return invalid(format!("broker {broker} is named twice"));
        }
        if image.broker(*broker).is_none() {
            return invalid(format!(
                "broker {broker} is not registered; start it, or see `logboom cluster status`"
            ));
        }
        if !holds_data(record, *broker) && !image.is_alive(*broker) {
            return invalid(format!(
                "broker {broker} is not alive and has no copy yet; start it, or name another one"
            ));
        }
    }
    Ok(())
}

fn holds_data(record: &PartitionRecord, broker: BrokerId) -> bool {
    let held = record.held_by(broker);
    held.is_some_and(|replica| !replica.is_witness())
}

/// The brokers that can get replicas.
pub(super) fn candidates(image: &ClusterMetadata) -> Vec<Candidate> {
    let alive = image.brokers().filter(|(_, broker)| broker.alive);
    let candidate = |(broker, record): (BrokerId, &BrokerRecord)| Candidate {
        broker,
        rack: record.rack.clone(),
    };
    alive.map(candidate).collect()
}

/// Where the witness goes beside `replicas`, but not on `avoid`; `None` when there is no broker for it.
pub(super) fn place_witness(
    image: &ClusterMetadata,
    record: &PartitionRecord,
    replicas: &[BrokerId],
    avoid: Option<BrokerId>,
) -> Option<BrokerId> {
    let may_stay = |broker: &BrokerId| !replicas.contains(broker) && Some(*broker) != avoid;
    let known = record.destination().witness.filter(may_stay);
    let now = record.assignment.witness.map(ReplicaId::broker);
    let known = known.or(now.filter(may_stay));
    if known.is_some_and(|broker| image.is_alive(broker)) {
        return known;
    }
    let loads = Loads::of(image);
    let mut candidates = candidates(image);
    candidates.retain(|candidate| Some(candidate.broker) != avoid);
    let (has_copy, empty): (Vec<Candidate>, Vec<Candidate>) =
        candidates.into_iter().partition(|candidate| {
            holds_data(record, candidate.broker) && !replicas.contains(&candidate.broker)
        });
    choose_witness(&empty, &loads, replicas)
        .or_else(|| choose_witness(&has_copy, &loads, replicas))
        .or(known)
}

fn warnings(record: &PartitionRecord, target: &PlannedPartition) -> Vec<String> {
    let copies = target.replicas.len();
    let mut warnings = Vec::new();
    if copies.is_multiple_of(2) && target.witness.is_none() {
        let tolerated = copies / 2 - 1;
        warnings.push(format!(
            "{copies} copies without a broker for a witness fail over for {tolerated} lost brokers only; add a broker and \
             reassign the partition again"
        ));
    }
    let held = |broker: BrokerId| {
        record
            .held_by(broker)
            .filter(|replica| replica.is_witness())
    };
    let in_the_way = target.replicas.iter().find_map(|broker| held(*broker));
    let goes_at_once = |broker: BrokerId| !holds_data(record, broker);
    if let Some(witness) = in_the_way
        && !target.witness.is_some_and(goes_at_once)
    {
        let broker = witness.broker();
        warnings.push(format!(
            "the witness on broker {broker} has to go before a copy can come there: until that one is in sync the partition \
             is served only while a majority of its present copies is up"
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::metadata::tests::Cluster;

    fn ids(brokers: &[u32]) -> Vec<BrokerId> {
        brokers.iter().copied().map(BrokerId).collect()
    }

    fn plan(cluster: &Cluster, replicas: &[u32]) -> Result<MovePlan, Error> {
        plan_move(&cluster.image, &cluster.name("t", 0), &ids(replicas))
    }

    /// Goal: an even number of copies gets a witness on a broker without one, which stays where it can; who cannot have one,
    /// or does without for a while, is told. Method: a table of placements, moves, witnesses and warnings.
    #[test]
    fn the_witness_goes_where_no_copy_is() {
        type Row<'a> = (u32, &'a [u32], Option<u32>, &'a [u32], Option<u32>, &'a str);
        let table: [Row<'_>; 10] = [
            (4, &[1, 2, 3], None, &[2, 3, 4], None, ""),
            (4, &[1, 2], Some(3), &[4, 2], Some(3), ""),
            (4, &[1, 2], Some(3), &[3, 1], Some(4), ""),
            (3, &[1, 2], Some(3), &[3, 1], Some(2), "has to go before"),
            (3, &[1, 2], Some(3), &[1, 2, 3], None, "has to go before"),
            (
                2,
                &[1, 2],
                None,
                &[2, 1],
                None,
                "without a broker for a witness",
            ),
            (3, &[1, 2], None, &[1, 2], Some(3), ""),
            (4, &[1, 2, 3], None, &[1, 2], Some(4), ""),
            (3, &[1, 2, 3], None, &[1, 2], Some(3), ""),
            (5, &[1, 2], Some(3), &[1, 2, 4, 5], Some(3), ""),
        ];
        for (brokers, from, witness, to, expected, warning) in table {
            let mut cluster = Cluster::of(brokers);
            cluster.create("t", &[(from, witness)]);
            let plan = plan(&cluster, to).unwrap();
            let name = format!("{from:?} {witness:?} to {to:?} on {brokers}");
            assert_eq!(plan.target.replicas, ids(to), "{name}");
            assert_eq!(plan.target.witness, expected.map(BrokerId), "{name}");
            let warnings = plan.warnings.join("; ");
            assert_eq!(
                warnings.is_empty(),
                warning.is_empty(),
                "{name}: {warnings}"
            );
            assert!(warnings.contains(warning), "{name}: {warnings}");
        }
    }

    /// Goal: a dead broker gets no copy and no witness, but may keep the copy it has; a witness on a dead broker is moved when
    /// somebody asks. Method: one of each.
    #[test]
    fn dead_brokers_get_nothing_new() {
        let mut cluster = Cluster::of(5);
        cluster.create("t", &[(&[1, 2], Some(3))]);
        cluster.set_alive(2, false);
        cluster.set_alive(4, false);
        assert_eq!(
            plan(&cluster, &[2, 1]).unwrap().target.witness,
            Some(BrokerId(3))
        );
        let refused = plan(&cluster, &[1, 4]).unwrap_err().to_string();
        assert!(refused.contains("broker 4 is not alive"), "{refused}");
        cluster.set_alive(3, false);
        assert_eq!(
            plan(&cluster, &[2, 1]).unwrap().target.witness,
            Some(BrokerId(5))
        );
        cluster.set_alive(5, false);
        assert_eq!(
            plan(&cluster, &[2, 1]).unwrap().target.witness,
            Some(BrokerId(3)),
            "rather a dead witness than none"
        );
    }

    /// Goal: what cannot be is refused with what to do. Method: a table.
    #[test]
    fn impossible_moves_are_refused() {
        let mut cluster = Cluster::of(3);
        cluster.create("t", &[(&[1, 2], Some(3))]);
        for (replicas, text) in [
            (&[][..], "name the brokers"),
            (&[1, 1], "named twice"),
            (&[1, 9], "broker 9 is not registered; start it"),
            (&[1, 2, 3, 4], "use 1 to 3"),
        ] {
            let refused = plan(&cluster, replicas).unwrap_err().to_string();
            assert!(refused.contains(text), "{refused}");
        }
        let refused = plan_move(&cluster.image, &cluster.name("t", 1), &ids(&[1]));
        assert!(matches!(refused, Err(Error::UnknownPartition { .. })));
        let refused = plan_move(&cluster.image, &cluster.name("x", 0), &ids(&[1]));
        assert!(matches!(refused, Err(Error::UnknownTopic { .. })));
    }

    /// Goal: the same wish, again, has the same target, so that repeating it changes nothing. Method: ask before and after each
    /// wish is decided, for moves with and without a choice for the witness.
    #[test]
    fn a_repeated_wish_has_the_same_target() {
        let mut cluster = Cluster::of(6);
        cluster.create("t", &[(&[1, 2], Some(3))]);
        for replicas in [&[3, 1][..], &[4, 5], &[1, 2, 3], &[2, 1]] {
            let target = plan(&cluster, replicas).unwrap().target;
            let partition = cluster.name("t", 0);
            let decided = target.clone();
            let command = crate::controller::Command::ReassignPartition { partition, target };
            cluster.apply(command).unwrap();
            assert_eq!(plan(&cluster, replicas).unwrap().target, decided);
        }
    }
}
