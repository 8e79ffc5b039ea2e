//! Where the other brokers are reached, when the metadata and the operator's bootstrap list disagree.
//!
//! Owns the choice between the two, nothing else. Either may be out of date: the metadata when brokers have moved while this one,
//! or the whole cluster, was down; the list when a broker has moved since it was written. Metadata alone would lock a moved
//! cluster out for ever, since it is the controller that has to learn the new addresses.

use std::collections::BTreeMap;

use crate::types::{BrokerId, Endpoint};

/// The choice so far.
#[derive(Debug)]
pub(super) struct PeerAddresses {
    bootstrap: Vec<Endpoint>,
    chosen: BTreeMap<BrokerId, Chosen>,
}

#[derive(Debug, Clone)]
struct Chosen {
    /// What the metadata said at the last choice.
    noted: Option<String>,
    used: String,
}

impl PeerAddresses {
    pub(super) fn new(bootstrap: Vec<Endpoint>) -> Self {
        Self {
            bootstrap,
            chosen: BTreeMap::new(),
        }
    }

    /// An address for every broker that either source names. A peer that is `up` stays where it is; news in the metadata wins
    /// over what was used; with `again`, a peer that is not up is looked for at its other address.
    pub(super) fn choose(
        &mut self,
        noted: impl Iterator<Item = Endpoint>,
        up: impl Fn(BrokerId) -> bool,
        again: bool,
    ) -> Vec<Endpoint> {
        let noted: BTreeMap<BrokerId, String> = noted
            .map(|endpoint| (endpoint.broker, endpoint.address))
            .collect();
        let listed = self.bootstrap.iter().map(|endpoint| endpoint.broker);
        let brokers: Vec<BrokerId> = noted.keys().copied().chain(listed).collect();
        let mut chosen = BTreeMap::new();
        for broker in brokers {
            let given = self
                .bootstrap
                .iter()
                .find(|endpoint| endpoint.broker == broker);
            let given = given.map(|endpoint| &endpoint.address);
            let now = noted.get(&broker);
            let used = match (self.chosen.get(&broker), now, given) {
                (None, Some(only), None) => only,
                (None, _, Some(first)) => first,
                (Some(before), Some(now), _)
                    if before.noted.is_some() && before.noted.as_ref() != Some(now) =>
                {
                    now
                }
                (Some(before), Some(now), Some(given)) if again && !up(broker) => {
                    if before.used == *now { given } else { now }
                }
                (Some(before), Some(now), None) if before.used != *now => now,
                (Some(before), _, _) => &before.used,
                (None, None, None) => continue,
            };
            let choice = Chosen {
                noted: now.cloned(),
                used: used.clone(),
            };
            chosen.insert(broker, choice);
        }
        self.chosen = chosen;
        let endpoint = |(broker, choice): (&BrokerId, &Chosen)| Endpoint {
            broker: *broker,
            address: choice.used.clone(),
        };
        self.chosen.iter().map(endpoint).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(broker: u32, address: &str) -> Endpoint {
        Endpoint {
            broker: BrokerId(broker),
            address: address.to_owned(),
        }
    }

    fn shown(peers: &[Endpoint]) -> Vec<String> {
        peers
            .iter()
            .map(|peer| format!("{}@{}", peer.broker, peer.address))
            .collect()
    }

    /// Goal: a cluster whose brokers have all moved finds together, and so does one whose list is old. Method: the metadata
    /// of before against a list of now, and the other way round, step by step.
    #[test]
    fn moved_brokers_are_found() {
        let mut peers = PeerAddresses::new(vec![at(2, "new:2"), at(3, "new:3")]);
        let nobody = |_: BrokerId| false;
        let start = peers.choose([].into_iter(), nobody, false);
        assert_eq!(shown(&start), ["2@new:2", "3@new:3"]);
        // The old metadata is read from the log: what the operator says now is tried first.
        let old = || [at(2, "old:2"), at(3, "old:3"), at(4, "old:4")].into_iter();
        assert_eq!(
            shown(&peers.choose(old(), nobody, false)),
            ["2@new:2", "3@new:3", "4@old:4"]
        );
        // Who answers is kept; for who does not the other address gets its turn.
        let two = |broker: BrokerId| broker.0 == 2;
        assert_eq!(
            shown(&peers.choose(old(), two, true)),
            ["2@new:2", "3@old:3", "4@old:4"]
        );
        assert_eq!(
            shown(&peers.choose(old(), two, true)),
            ["2@new:2", "3@new:3", "4@old:4"]
        );
        // News in the metadata is followed at once, wherever the list points.
        let moved = || [at(2, "old:2"), at(3, "moved:3"), at(4, "moved:4")].into_iter();
        assert_eq!(
            shown(&peers.choose(moved(), two, false)),
            ["2@new:2", "3@moved:3", "4@moved:4"]
        );
        // A broker that was removed is looked for only where the operator names it.
        assert_eq!(
            shown(&peers.choose([at(2, "new:2")].into_iter(), two, false)),
            ["2@new:2", "3@moved:3"]
        );
    }
}
