//! Which partitions leave a broker next, and for where. Pure: the image in, moves out.
//!
//! Owns no state: what is under way is in the image, so that asking again goes on from there.

use crate::types::{BrokerId, Error, TopicPartition};

use super::metadata::{ClusterMetadata, PartitionRecord, PlannedPartition};
use super::placement::{Loads, choose_replica};
use super::reassignment::{candidates, place_witness};

/// Partitions that are named as stuck, at most.
const STUCK_MAX: usize = 100;

/// What to do next to empty a broker.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DrainPlan {
    /// Moves to begin.
    pub moves: Vec<(TopicPartition, PlannedPartition)>,
    /// Partitions of which the broker holds something, or will, those that are leaving included.
    pub remaining: u32,
    /// Of these, the ones that have nowhere to go, with the reason; a hundred of them at most.
    pub stuck: Vec<(TopicPartition, String)>,
}

/// Plans the next moves off `broker`, so that at most `most` partitions of the cluster are being moved at once. Each copy goes to a
/// live broker without one, in another rack than the others where that can be, with few copies; order and number stay.
///
/// # Errors
/// `InvalidRequest` for an unknown broker.
pub fn plan_drain(
    image: &ClusterMetadata,
    broker: BrokerId,
    most: usize,
) -> Result<DrainPlan, Error> {
    if image.broker(broker).is_none() {
        return Err(Error::InvalidRequest {
            reason: format!("broker {broker} is not registered; see `logboom cluster status`"),
        });
    }
    let moving = image
        .partitions()
        .filter(|(_, record)| record.reassignment.is_some());
    let mut room = most.saturating_sub(moving.count());
    let mut loads = Loads::of(image);
    let mut plan = DrainPlan::default();
    for (partition, record) in image.partitions() {
        let is_destined = record.destination().brokers().any(|id| id == broker);
        if !is_destined && record.held_by(broker).is_none() {
            continue;
        }
        plan.remaining += 1;
        // One that died after it was chosen would hold up the move until it returns.
        let dead = record.adding_brokers();
        let dead = dead.into_iter().filter(|id| !image.is_alive(*id));
        let dead: Vec<BrokerId> = dead.filter(|_| record.reassignment.is_some()).collect();
        let destined = record.destination();
        let is_witness_dead =
            record.reassignment.is_some() && destined.witness.is_some_and(|id| !image.is_alive(id));
        if !is_destined && dead.is_empty() && !is_witness_dead {
            continue; // on its way
        }
        let is_moving = usize::from(record.reassignment.is_some());
        match without(image, &loads, record, broker, &dead) {
            Ok(target) if target == destined => {} // nowhere better to go
            Ok(target) if room + is_moving > 0 => {
                room = (room + is_moving).saturating_sub(1);
                loads.add(&target);
                plan.moves.push((partition, target));
            }
            Err(reason) if plan.stuck.len() < STUCK_MAX => plan.stuck.push((partition, reason)),
            Ok(_) | Err(_) => {} // another time; not named
        }
    }
    Ok(plan)
}

/// The placement of a partition with others in the place of `broker` and of those that are `dead`; or why there is none.
fn without(
    image: &ClusterMetadata,
    loads: &Loads,
    record: &PartitionRecord,
    broker: BrokerId,
    dead: &[BrokerId],
) -> Result<PlannedPartition, String> {
    let now = record.destination();
    let mut replicas = now.replicas.clone();
    for unwanted in now
        .replicas
        .iter()
        .filter(|id| **id == broker || dead.contains(id))
    {
        let free = |but: Option<BrokerId>| {
            let mut free = candidates(image);
            free.retain(|one| one.broker != broker && Some(one.broker) != but);
            choose_replica(&free, loads, &replicas)
        };
        // rather beside the witness than in its place
        let heir = free(now.witness).or_else(|| free(None));
        let heir = heir.ok_or("no other live broker is without a copy of it; add one")?;
        if let Some(place) = replicas.iter_mut().find(|id| *id == unwanted) {
            *place = heir;
        }
    }
    let witness = match now.witness {
        Some(_) => {
            let witness = place_witness(image, record, &replicas, Some(broker));
            Some(witness.ok_or("no other live broker is left for its witness; add one")?)
        }
        None => None,
    };
    Ok(PlannedPartition { replicas, witness })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::controller::Command;
    use crate::controller::metadata::tests::Cluster;

    /// Ends every step under way.
    fn end_all(cluster: &mut Cluster) {
        let moving = |cluster: &Cluster| {
            let mut partitions = cluster.image.partitions();
            partitions
                .find_map(|(name, record)| record.replacement.is_some().then_some(name.partition.0))
        };
        while let Some(number) = moving(cluster) {
            let record = cluster.record("t", number);
            let isr: Vec<u32> = record.replica_brokers().iter().map(|id| id.0).collect();
            let voters = record.assignment.voters().collect();
            cluster.report_voters(isr[0], "t", number, record.epoch.0 + 1, &isr, voters);
        }
    }

    /// Goal: rounds of moves, a few at a time, empty a broker of copies and witnesses, evenly, and then there is nothing to
    /// do. Method: eight partitions on four brokers, two at a time; every record is looked at after each round.
    #[test]
    fn a_broker_is_emptied_a_few_partitions_at_a_time() {
        let mut cluster = Cluster::of(4);
        let placed: Vec<(&[u32], Option<u32>)> = (0..4)
            .flat_map(|_| [(&[1, 2][..], Some(3)), (&[2, 3], Some(1))])
            .collect();
        cluster.create("t", &placed);
        let mut rounds = 0;
        loop {
            let plan = plan_drain(&cluster.image, BrokerId(1), 2).unwrap();
            assert_eq!(plan.stuck, []);
            if plan.remaining == 0 {
                break;
            }
            assert!((1..=2).contains(&plan.moves.len()), "{plan:?}");
            rounds += 1;
            assert!(rounds < 9, "{plan:?}");
            for (partition, target) in plan.moves {
                assert!(target.brokers().all(|id| id != BrokerId(1)), "{target:?}");
                assert!(target.witness.is_some());
                cluster
                    .apply(Command::ReassignPartition { partition, target })
                    .unwrap();
            }
            let under_way = plan_drain(&cluster.image, BrokerId(1), 2).unwrap();
            assert_eq!(under_way.moves, [], "two at once");
            end_all(&mut cluster);
        }
        assert_eq!(rounds, 4, "eight partitions, two at a time");
        for (_, record) in cluster.image.partitions() {
            let brokers: BTreeSet<BrokerId> = record.placement().brokers().collect();
            assert_eq!(brokers.len(), 3, "{record:?}");
        }
        assert_eq!(
            plan_drain(&cluster.image, BrokerId(1), 2).unwrap(),
            DrainPlan::default()
        );
    }

    /// Goal: a move to a broker that has died since goes elsewhere, without waiting for room. Method: one partition, one move at
    /// once, the chosen broker dies.
    #[test]
    fn a_dead_heir_is_replaced() {
        let mut cluster = Cluster::of(5);
        cluster.create("t", &[(&[1, 2, 3], None)]);
        let mut next = || {
            let plan = plan_drain(&cluster.image, BrokerId(1), 1).unwrap();
            assert_eq!((plan.remaining, plan.stuck.len()), (1, 0));
            let (partition, target) = plan.moves.first().cloned()?;
            let heir = target.replicas[0];
            cluster
                .apply(Command::ReassignPartition { partition, target })
                .unwrap();
            cluster.set_alive(heir.0, false);
            Some(heir)
        };
        assert_eq!(next(), Some(BrokerId(4)));
        assert_eq!(next(), Some(BrokerId(5)));
        let plan = plan_drain(&cluster.image, BrokerId(1), 1).unwrap();
        assert_eq!((plan.moves.len(), plan.stuck.len()), (0, 1));
    }

    /// Goal: a witness on its way to a broker that has died since goes elsewhere, and stays where it is planned when there is no
    /// other place. Method: the witness's broker is emptied, the ones chosen die one after the other.
    #[test]
    fn a_dead_heir_of_a_witness_is_replaced() {
        let mut cluster = Cluster::of(5);
        cluster.create("t", &[(&[1, 2], Some(3))]);
        let mut chosen = Vec::new();
        for _ in 0..2 {
            let plan = plan_drain(&cluster.image, BrokerId(3), 1).unwrap();
            let (partition, target) = plan.moves.first().cloned().unwrap();
            let heir = target.witness.unwrap();
            chosen.push(heir.0);
            cluster
                .apply(Command::ReassignPartition { partition, target })
                .unwrap();
            cluster.set_alive(heir.0, false);
        }
        chosen.sort_unstable();
        assert_eq!(chosen, [4, 5]);
        let plan = plan_drain(&cluster.image, BrokerId(3), 1).unwrap();
        assert_eq!((plan.moves.len(), plan.remaining), (0, 1), "{plan:?}");
    }

    /// Goal: what has nowhere to go stays, and is named with the reason; a dead broker gets nothing; an unknown one cannot be
    /// emptied. Method: too few brokers, in three ways.
    #[test]
    fn what_has_nowhere_to_go_is_named() {
        let drained = |cluster: &Cluster| plan_drain(&cluster.image, BrokerId(1), 8).unwrap();
        let mut cluster = Cluster::of(3);
        cluster.create("t", &[(&[1, 2, 3], None)]);
        let plan = drained(&cluster);
        assert_eq!((plan.moves.len(), plan.remaining), (0, 1));
        assert!(plan.stuck[0].1.contains("without a copy"), "{plan:?}");
        let mut cluster = Cluster::of(4);
        cluster.create("t", &[(&[1, 2, 3], None)]);
        cluster.set_alive(4, false);
        assert_eq!(drained(&cluster).stuck.len(), 1);
        let mut cluster = Cluster::of(3);
        cluster.create("t", &[(&[1, 2], Some(3))]);
        assert!(drained(&cluster).stuck[0].1.contains("witness"));
        assert!(plan_drain(&cluster.image, BrokerId(9), 8).is_err());
    }
}
