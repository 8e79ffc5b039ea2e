//! Where replicas go. Pure: a plan is a function of the brokers, what they hold already, and what is asked for.
//!
//! Owns no state. Rules, the first one first: a broker holds at most one replica of a partition; replicas are spread over racks
//! where racks are known; preferred leaders are balanced; replicas are balanced; the followers of one leader are spread, so
//! that its load does not fall on one broker when it dies. Ties go round the ring of broker ids.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::types::{BrokerId, Error};

use super::metadata::{ClusterMetadata, PlannedPartition};

/// Leaders tried for one partition before the best so far is taken: bounds the work in a large cluster that is out of balance.
const LEADERS_TRIED_MAX: usize = 16;

/// A broker that can get replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The broker.
    pub broker: BrokerId,
    /// Its rack; one without a rack counts as standing alone.
    pub rack: Option<String>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct TopicShape<'a> {
    /// Number of partitions, at least 1.
    pub partitions: u32,
    /// Data replicas per partition.
    pub replication_factor: u32,
    /// Per partition the brokers that the operator chose, the preferred leader first; empty: the planner chooses.
    pub pinned: &'a [Vec<BrokerId>],
}

/// Where the partitions of a topic go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicPlan {
    /// The partitions, in order.
    pub partitions: Vec<PlannedPartition>,
    /// What the operator should know, one line each.
    pub warnings: Vec<String>,
}

/// What one broker holds already.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Load {
    /// Partitions that prefer it as their leader.
    leaders: u32,
    /// Data replicas.
    replicas: u32,
    witnesses: u32,
    /// How often each other broker follows it.
    followers: BTreeMap<BrokerId, u32>,
}

/// What the brokers hold already.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Loads(BTreeMap<BrokerId, Load>);

impl Loads {
    /// What the brokers hold by `image`, or will when what is under way has ended.
    pub fn of(image: &ClusterMetadata) -> Self {
        let mut loads = Self::default();
        for record in image.topics().flat_map(|(_, topic)| &topic.partitions) {
            loads.add(&record.destination());
        }
        loads
    }

    /// Adds a partition.
    pub fn add(&mut self, planned: &PlannedPartition) {
        for broker in &planned.replicas {
            self.0.entry(*broker).or_default().replicas += 1;
        }
        if let Some(witness) = planned.witness {
            self.0.entry(witness).or_default().witnesses += 1;
        }
        if let Some((leader, followers)) = planned.replicas.split_first() {
            let load = self.0.entry(*leader).or_default();
            load.leaders += 1;
            for follower in followers {
                *load.followers.entry(*follower).or_default() += 1;
            }
        }
    }
}

/// Plans a topic on `brokers`, the ones that are alive.
///
/// # Errors
/// `InvalidReplicationFactor` when there are fewer brokers than replicas, or no replica is asked for; `InvalidPartitions` for
/// none; `InvalidRequest` for a pinned assignment that does not fit.
pub fn plan_topic(
    brokers: &[Candidate],
    loads: &Loads,
    shape: TopicShape<'_>,
) -> Result<TopicPlan, Error> {
    let TopicShape {
        partitions,
        replication_factor,
        pinned,
    } = shape;
    let usable = u32::try_from(brokers.len()).unwrap_or(u32::MAX);
    if replication_factor == 0 || replication_factor > usable {
        let requested = replication_factor;
        return Err(Error::InvalidReplicationFactor {
            requested,
            brokers: usable,
        });
    }
    if partitions == 0 {
        return Err(Error::InvalidPartitions {
            requested: 0,
            max: u32::MAX,
        });
    }
    check_pinned(brokers, shape)?;
    let mut ring = Ring::new(brokers, loads);
    let mut planned = Vec::new();
    for number in 0..partitions {
        let pinned = usize::try_from(number)
            .ok()
            .and_then(|number| pinned.get(number));
        let replicas = match pinned {
            Some(replicas) => replicas.clone(),
            None => ring.choose_replicas(replication_factor),
        };
        let needs_witness = replication_factor.is_multiple_of(2);
        let witness = if needs_witness {
            ring.choose_witness(&replicas)
        } else {
            None
        };
        let partition = PlannedPartition { replicas, witness };
        ring.place(&partition);
        planned.push(partition);
    }
    let warnings = warnings(replication_factor, &planned);
    Ok(TopicPlan {
        partitions: planned,
        warnings,
    })
}

/// The broker for a witness beside `replicas`: one of `brokers` that is not among them.
pub(super) fn choose_witness(
    brokers: &[Candidate],
    loads: &Loads,
    replicas: &[BrokerId],
) -> Option<BrokerId> {
    Ring::new(brokers, loads).choose_witness(replicas)
}

/// The broker for one more copy beside those on `others`: of `brokers` one that is not among them, in another rack where that
/// can be, with the fewest copies.
pub(super) fn choose_replica(
    brokers: &[Candidate],
    loads: &Loads,
    others: &[BrokerId],
) -> Option<BrokerId> {
    let ring = Ring::new(brokers, loads);
    let free = ring
        .slots
        .iter()
        .filter(|(broker, _)| !others.contains(broker));
    let best = free
        .min_by_key(|(broker, slot)| (ring.in_rack_of(slot, others), slot.load.replicas, **broker));
    best.map(|(broker, _)| *broker)
}

fn check_pinned(brokers: &[Candidate], shape: TopicShape<'_>) -> Result<(), Error> {
    let invalid = |reason: String| Err(Error::InvalidRequest { reason });
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    if shape.pinned.is_empty() {
        return Ok(());
    }
    if count(shape.pinned.len()) != shape.partitions {
        let (named, asked) = (shape.pinned.len(), shape.partitions);
        return invalid(format!(
            "the assignment names {named} partitions, the topic has {asked}"
        ));
    }
    for (number, replicas) in shape.pinned.iter().enumerate() {
        if count(replicas.len()) != shape.replication_factor {
            let (named, asked) = (replicas.len(), shape.replication_factor);
            return invalid(format!(
                "partition {number} is assigned to {named} brokers, the replication factor is {asked}"
            ));
        }
        if replicas.iter().collect::<BTreeSet<_>>().len() != replicas.len() {
            return invalid(format!("partition {number} is assigned to a broker twice"));
        }
        let is_usable = |id: &BrokerId| brokers.iter().any(|candidate| candidate.broker == *id);
        if let Some(stranger) = replicas.iter().find(|id| !is_usable(id)) {
            return invalid(format!(
                "partition {number} is assigned to broker {stranger}, which is unknown or not alive"
            ));
        }
    }
    Ok(())
}

fn warnings(replication_factor: u32, planned: &[PlannedPartition]) -> Vec<String> {
    let without_witness = planned.iter().any(|partition| partition.witness.is_none());
    if !replication_factor.is_multiple_of(2) || !without_witness {
        return Vec::new();
    }
    let text = if replication_factor == 2 {
        "replication factor 2 on two brokers cannot fail over: while one of the two is down the partition is unavailable \
         (nothing is lost); add a third broker before you create the topic, it will hold a witness"
            .to_owned()
    } else {
        let tolerated = replication_factor / 2 - 1;
        format!(
            "replication factor {replication_factor} without a broker for a witness fails over for {tolerated} lost \
             replicas only, as many as with {}; add a broker before you create the topic",
            replication_factor - 1
        )
    };
    vec![text]
}

/// A broker's place in the ring, and what it holds.
struct Slot {
    order: usize,
    rack: Option<String>,
    load: Load,
}

/// The brokers in the order of their ids, the first after the last.
struct Ring {
    slots: BTreeMap<BrokerId, Slot>,
    /// The order of the broker whose turn it is to lead when all else is equal.
    next: usize,
}

impl Ring {
    fn new(brokers: &[Candidate], loads: &Loads) -> Self {
        let sorted: BTreeMap<BrokerId, &Candidate> = brokers
            .iter()
            .map(|candidate| (candidate.broker, candidate))
            .collect();
        let slot = |(order, (broker, candidate)): (usize, (BrokerId, &Candidate))| {
            let load = loads.0.get(&broker).cloned().unwrap_or_default();
            (
                broker,
                Slot {
                    order,
                    rack: candidate.rack.clone(),
                    load,
                },
            )
        };
        Self {
            slots: sorted.into_iter().enumerate().map(slot).collect(),
            next: 0,
        }
    }

    /// Steps from `from` round the ring to `slot`.
    fn distance(&self, from: usize, slot: &Slot) -> usize {
        (slot.order + self.slots.len() - from % self.slots.len()) % self.slots.len()
    }

    /// The leader with the fewest partitions whose replica set keeps the brokers balanced, and its followers.
    fn choose_replicas(&self, replication_factor: u32) -> Vec<BrokerId> {
        let fewest = self
            .slots
            .values()
            .map(|slot| slot.load.leaders)
            .min()
            .unwrap_or(0);
        // Where all get a replica, those that have many lead first: the others get one more when they lead alone.
        let is_everywhere = usize::try_from(replication_factor) == Ok(self.slots.len());
        let mut leaders: Vec<(Reverse<u32>, usize, BrokerId)> = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.load.leaders == fewest)
            .map(|(broker, slot)| {
                let steps = self.distance(self.next, slot);
                let have = if is_everywhere { slot.load.replicas } else { 0 };
                (Reverse(have), steps, *broker)
            })
            .collect();
        leaders.sort_unstable();
        let mut best: Option<(u32, Vec<BrokerId>)> = None;
        for (_, _, leader) in leaders.into_iter().take(LEADERS_TRIED_MAX) {
            let replicas = self.with_followers(leader, replication_factor);
            let spread = self.spread_with(&replicas);
            if spread <= 1 {
                return replicas;
            }
            if best.as_ref().is_none_or(|(least, _)| spread < *least) {
                best = Some((spread, replicas));
            }
        }
        best.map_or_else(Vec::new, |(_, replicas)| replicas)
    }

    fn with_followers(&self, leader: BrokerId, replication_factor: u32) -> Vec<BrokerId> {
        let mut chosen = vec![leader];
        let Some(first) = self.slots.get(&leader) else {
            return chosen;
        };
        for _ in 1..replication_factor {
            let free = self
                .slots
                .iter()
                .filter(|(broker, _)| !chosen.contains(broker));
            let best = free.min_by_key(|(broker, slot)| {
                let pairs = first.load.followers.get(broker).copied().unwrap_or(0);
                let steps = self.distance(first.order, slot);
                (
                    self.in_rack_of(slot, &chosen),
                    slot.load.replicas,
                    // One whose turn to lead is still to come gets a replica by that.
                    Reverse(slot.load.leaders),
                    pairs,
                    steps,
                )
            });
            chosen.extend(best.map(|(broker, _)| *broker));
        }
        if let Some((_, followers)) = chosen.split_first_mut() {
            let order = |broker: &BrokerId| {
                self.slots
                    .get(broker)
                    .map(|slot| self.distance(first.order, slot))
            };
            followers.sort_by_key(order);
        }
        chosen
    }

    fn choose_witness(&self, replicas: &[BrokerId]) -> Option<BrokerId> {
        let leader = replicas.first().and_then(|leader| self.slots.get(leader));
        let from = leader.map_or(0, |leader| leader.order);
        let free = self
            .slots
            .iter()
            .filter(|(broker, _)| !replicas.contains(broker));
        let best = free.min_by_key(|(_, slot)| {
            let steps = self.distance(from, slot);
            (self.in_rack_of(slot, replicas), slot.load.witnesses, steps)
        });
        best.map(|(broker, _)| *broker)
    }

    /// How many of `chosen` stand in the rack of `slot`.
    fn in_rack_of(&self, slot: &Slot, chosen: &[BrokerId]) -> usize {
        let racks = chosen
            .iter()
            .filter_map(|broker| self.slots.get(broker)?.rack.as_ref());
        racks
            .filter(|rack| slot.rack.as_ref() == Some(rack))
            .count()
    }

    /// The difference between most and fewest replicas of a broker, with `replicas` placed.
    fn spread_with(&self, replicas: &[BrokerId]) -> u32 {
        let counts = self
            .slots
            .iter()
            .map(|(broker, slot)| slot.load.replicas + u32::from(replicas.contains(broker)));
        let (fewest, most) = counts.fold((u32::MAX, 0), |(least, most), count| {
            (least.min(count), most.max(count))
        });
        most.saturating_sub(fewest)
    }

    fn place(&mut self, planned: &PlannedPartition) {
        for broker in &planned.replicas {
            if let Some(slot) = self.slots.get_mut(broker) {
                slot.load.replicas += 1;
            }
        }
        if let Some(slot) = planned
            .witness
            .and_then(|witness| self.slots.get_mut(&witness))
        {
            slot.load.witnesses += 1;
        }
        let Some((leader, followers)) = planned.replicas.split_first() else {
            return;
        };
        let Some(slot) = self.slots.get_mut(leader) else {
            return;
        };
        slot.load.leaders += 1;
        for follower in followers {
            *slot.load.followers.entry(*follower).or_default() += 1;
        }
        self.next = slot.order + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn brokers(count: u32) -> Vec<Candidate> {
        (1..=count)
            .map(|id| Candidate {
                broker: BrokerId(id),
                rack: None,
            })
            .collect()
    }

    fn racked(racks: &[&str]) -> Vec<Candidate> {
        let named = racks.iter().zip(1_u32..);
        named
            .map(|(rack, id)| Candidate {
                broker: BrokerId(id),
                rack: Some((*rack).to_owned()),
            })
            .collect()
    }

    fn shape(partitions: u32, replication_factor: u32) -> TopicShape<'static> {
        TopicShape {
            partitions,
            replication_factor,
            pinned: &[],
        }
    }

    fn ids(plan: &TopicPlan) -> Vec<Vec<u32>> {
        let plain = |p: &PlannedPartition| p.replicas.iter().map(|broker| broker.0).collect();
        plan.partitions.iter().map(plain).collect()
    }

    fn witnesses(plan: &TopicPlan) -> Vec<Option<u32>> {
        plan.partitions
            .iter()
            .map(|p| p.witness.map(|broker| broker.0))
            .collect()
    }

    /// Goal: the founding example comes out as its document says. Method: three empty brokers, 2 partitions, RF 2.
    #[test]
    fn the_example_is_placed_as_documented() {
        let plan = plan_topic(&brokers(3), &Loads::default(), shape(2, 2)).unwrap();
        assert_eq!(ids(&plan), [[1, 2], [2, 3]]);
        assert_eq!(witnesses(&plan), [Some(3), Some(1)]);
        assert!(plan.warnings.is_empty());
    }

    /// Goal: leaders go round, and the second round pairs each with another follower. Method: a table of whole plans.
    #[test]
    fn leaders_go_round_and_followers_shift() {
        let plan = |brokers: &[Candidate], partitions, rf| {
            ids(&plan_topic(brokers, &Loads::default(), shape(partitions, rf)).unwrap())
        };
        let six = plan(&brokers(3), 6, 2);
        assert_eq!(six, [[1, 2], [2, 3], [3, 1], [1, 3], [2, 1], [3, 2]]);
        assert_eq!(plan(&brokers(3), 3, 3), [[1, 2, 3], [2, 3, 1], [3, 1, 2]]);
        assert_eq!(plan(&brokers(3), 4, 1), [[1], [2], [3], [1]]);
        assert_eq!(plan(&brokers(1), 2, 1), [[1], [1]]);
    }

    /// Goal: what cannot be placed is refused with the numbers. Method: a table.
    #[test]
    fn impossible_shapes_are_refused() {
        let plan = |count, partitions, rf| {
            plan_topic(&brokers(count), &Loads::default(), shape(partitions, rf))
        };
        for (count, rf) in [(3, 0), (3, 4), (0, 1), (2, 3)] {
            let refused = Error::InvalidReplicationFactor {
                requested: rf,
                brokers: count,
            };
            assert_eq!(plan(count, 1, rf), Err(refused));
        }
        assert!(matches!(
            plan(3, 0, 1),
            Err(Error::InvalidPartitions { .. })
        ));
        let pinned: [(&[&[u32]], &str); 5] = [
            (&[&[1, 2]], "names 1 partitions"),
            (&[&[1, 2], &[1]], "to 1 brokers"),
            (&[&[1, 2], &[2, 2]], "twice"),
            (&[&[1, 2], &[2, 9]], "broker 9"),
            (&[&[1, 2], &[]], "to 0 brokers"),
        ];
        for (lists, text) in pinned {
            let lists: Vec<Vec<BrokerId>> = lists
                .iter()
                .map(|list| list.iter().copied().map(BrokerId).collect())
                .collect();
            let asked = TopicShape {
                partitions: 2,
                replication_factor: 2,
                pinned: &lists,
            };
            let refused = plan_topic(&brokers(3), &Loads::default(), asked).unwrap_err();
            assert!(refused.to_string().contains(text), "{refused} / {text}");
        }
    }

    /// Goal: an operator's assignment is taken as it is, and gets witnesses. Method: pin the reverse of the usual order.
    #[test]
    fn a_pinned_assignment_is_kept() {
        let pinned = [
            vec![BrokerId(3), BrokerId(1)],
            vec![BrokerId(3), BrokerId(2)],
        ];
        let asked = TopicShape {
            partitions: 2,
            replication_factor: 2,
            pinned: &pinned,
        };
        let plan = plan_topic(&brokers(3), &Loads::default(), asked).unwrap();
        assert_eq!(ids(&plan), [[3, 1], [3, 2]]);
        assert_eq!(witnesses(&plan), [Some(2), Some(1)]);
    }

    /// Goal: who cannot fail over is told so. Method: even factors with and without a broker to spare, odd ones.
    #[test]
    fn a_missing_witness_is_said() {
        for (count, rf, warned) in [
            (2, 2, true),
            (3, 2, false),
            (4, 4, true),
            (5, 4, false),
            (3, 3, false),
            (1, 1, false),
        ] {
            let plan = plan_topic(&brokers(count), &Loads::default(), shape(2, rf)).unwrap();
            assert_eq!(
                !plan.warnings.is_empty(),
                warned,
                "{count} brokers, rf {rf}"
            );
            assert_eq!(
                plan.partitions.iter().all(|p| p.witness.is_none()),
                warned || rf % 2 == 1
            );
        }
    }

    /// Goal: replicas and witness stand in different racks where there are enough. Method: tables of racks.
    #[test]
    fn racks_are_spread() {
        let plan = plan_topic(
            &racked(&["a", "a", "b", "b"]),
            &Loads::default(),
            shape(4, 2),
        )
        .unwrap();
        for replicas in ids(&plan) {
            assert!(
                replicas.iter().any(|id| *id <= 2) && replicas.iter().any(|id| *id > 2),
                "{replicas:?}"
            );
        }
        let plan = plan_topic(
            &racked(&["a", "b", "c", "a"]),
            &Loads::default(),
            shape(3, 2),
        )
        .unwrap();
        let rack = |id: u32| if id == 4 { 1 } else { id };
        for (replicas, witness) in ids(&plan).into_iter().zip(witnesses(&plan)) {
            let all: BTreeSet<u32> = replicas.into_iter().chain(witness).map(rack).collect();
            assert_eq!(all.len(), 3);
        }
    }

    /// Goal: a new, empty broker gets the next leaderships. Method: fill three brokers, add a fourth.
    #[test]
    fn an_empty_broker_is_filled_first() {
        let mut loads = Loads::default();
        for planned in plan_topic(&brokers(3), &loads, shape(9, 3))
            .unwrap()
            .partitions
        {
            loads.add(&planned);
        }
        let plan = plan_topic(&brokers(4), &loads, shape(3, 3)).unwrap();
        assert!(
            ids(&plan).iter().all(|replicas| replicas[0] == 4),
            "{plan:?}"
        );
    }

    /// Goal: a topic alone is balanced within 1 in leaders and replicas. Method: every size up to 12 brokers, every factor,
    /// up to two rounds of partitions.
    #[test]
    fn one_topic_is_balanced_within_one() {
        let mut worst = Vec::new();
        for (count, rf, partitions) in (1..=12_u32)
            .flat_map(|count| (1..=count).map(move |rf| (count, rf)))
            .flat_map(|(count, rf)| (1..=2 * count).map(move |partitions| (count, rf, partitions)))
        {
            let plan =
                plan_topic(&brokers(count), &Loads::default(), shape(partitions, rf)).unwrap();
            let (mut leaders, mut replicas) =
                (vec![0_u32; count as usize], vec![0_u32; count as usize]);
            for ids in ids(&plan) {
                leaders[ids[0] as usize - 1] += 1;
                for id in ids {
                    replicas[id as usize - 1] += 1;
                }
            }
            let spread =
                |counts: &[u32]| counts.iter().max().unwrap() - counts.iter().min().unwrap();
            if spread(&leaders) > 1 || spread(&replicas) > 1 {
                worst.push((count, rf, partitions, leaders, replicas));
            }
        }
        assert!(worst.is_empty(), "{} of them: {worst:?}", worst.len());
    }

    proptest! {
        /// Goal: no plan ever puts two replicas on one broker, or the witness on a data replica's; leaders stay balanced
        /// within 1 over many topics of any shape, and replicas within 2 at every moment.
        /// Method: random series of topics on an empty cluster, counted independently of the planner.
        #[test]
        fn plans_are_valid_and_balanced(
            count in 1_u32..9,
            topics in prop::collection::vec((1_u32..12, 1_u32..6), 1..8),
        ) {
            let brokers = brokers(count);
            let (mut loads, mut leaders, mut replicas) = (Loads::default(), BTreeMap::new(), BTreeMap::new());
            for broker in &brokers {
                leaders.insert(broker.broker, 0_u32);
                replicas.insert(broker.broker, 0_u32);
            }
            for (partitions, rf) in topics {
                let rf = rf.min(count);
                let plan = plan_topic(&brokers, &loads, shape(partitions, rf)).unwrap();
                prop_assert_eq!(plan.partitions.len(), partitions as usize);
                for planned in plan.partitions {
                    let distinct: BTreeSet<_> = planned.brokers().collect();
                    prop_assert_eq!(distinct.len(), planned.brokers().count());
                    prop_assert_eq!(planned.replicas.len(), rf as usize);
                    prop_assert_eq!(planned.witness.is_some(), rf % 2 == 0 && count > rf);
                    *leaders.get_mut(&planned.replicas[0]).unwrap() += 1;
                    for broker in &planned.replicas {
                        *replicas.get_mut(broker).unwrap() += 1;
                    }
                    loads.add(&planned);
                    let spread = |counts: &BTreeMap<BrokerId, u32>| {
                        counts.values().max().unwrap() - counts.values().min().unwrap()
                    };
                    prop_assert!(spread(&leaders) <= 1, "leaders {:?}", leaders);
                    prop_assert!(spread(&replicas) <= 2, "replicas {:?}", replicas);
                }
            }
        }

        /// Goal: a partition spans as many racks as it can. Method: random racks, sizes and factors.
        #[test]
        fn partitions_span_as_many_racks_as_they_can(
            racks in prop::collection::vec(0_u8..4, 1..10),
            partitions in 1_u32..20,
            rf in 1_u32..6,
        ) {
            let names: Vec<String> = racks.iter().map(u8::to_string).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let candidates = racked(&names);
            let rf = rf.min(u32::try_from(candidates.len()).unwrap());
            let known: BTreeSet<&str> = names.iter().copied().collect();
            let plan = plan_topic(&candidates, &Loads::default(), shape(partitions, rf)).unwrap();
            for planned in plan.partitions {
                let spanned: BTreeSet<&str> =
                    planned.replicas.iter().map(|id| names[id.0 as usize - 1]).collect();
                prop_assert_eq!(spanned.len(), known.len().min(rf as usize));
            }
        }
    }
}
