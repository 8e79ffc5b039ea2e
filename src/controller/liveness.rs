//! Which brokers the controller hears. Pure: observations in, changes of mind out.
//!
//! Owns how long each broker has been heard or not, as seen by the present leader of group 0. A change of mind needs a
//! while of agreeing observations, so a broker that flaps is not moved about.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::types::{BrokerId, Incarnation};

/// Which start of which data directory an observation is about.
type Start = (Incarnation, u64);

#[derive(Debug, Clone, Copy)]
struct Track {
    start: Start,
    heard: bool,
    since: Instant,
}

/// What the leader of group 0 has seen of the brokers since it leads.
#[derive(Debug)]
pub struct Liveness {
    dead_after: Duration,
    alive_after: Duration,
    tracks: BTreeMap<BrokerId, Track>,
}

impl Liveness {
    /// Nothing seen yet: a broker counts as dead when not heard for `dead_after`, and as alive again when heard for
    /// `alive_after`.
    pub fn new(dead_after: Duration, alive_after: Duration) -> Self {
        Self {
            dead_after,
            alive_after,
            tracks: BTreeMap::new(),
        }
    }

    /// Notes whether `broker`, registered by `start`, is heard now; answers with what it should be recorded as when that
    /// differs from `recorded`. A registration is a sign of life: a new start begins a new while.
    pub fn observe(
        &mut self,
        now: Instant,
        broker: BrokerId,
        start: Start,
        heard: bool,
        recorded: bool,
    ) -> Option<bool> {
        let fresh = Track {
            start,
            heard,
            since: now,
        };
        let track = self.tracks.entry(broker).or_insert(fresh);
        if track.start != start || track.heard != heard {
            *track = fresh;
        }
        let patience = if heard {
            self.alive_after
        } else {
            self.dead_after
        };
        let settled = now.saturating_duration_since(track.since) >= patience;
        (settled && heard != recorded).then_some(heard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: only a settled change is told, and a new start of the broker gets a new while. Method: a timeline in ms of
    /// (time, boot, heard, recorded, answer).
    #[test]
    fn changes_of_mind_take_a_while() {
        let timeline = [
            (0, 1, true, true, None),
            (100, 1, false, true, None),
            (2_000, 1, false, true, None),
            (2_100, 1, true, true, None), // heard again in time
            (2_200, 1, false, true, None),
            (5_199, 1, false, true, None),
            (5_200, 1, false, true, Some(false)),
            (5_300, 1, false, false, None),
            (6_000, 1, true, false, None),
            (6_400, 1, false, false, None), // flaps
            (6_500, 1, true, false, None),
            (7_500, 1, true, false, Some(true)),
            (8_000, 1, false, true, None),
            (10_900, 2, false, true, None), // registered anew, not yet connected
            (13_800, 2, false, true, None),
            (13_900, 2, false, true, Some(false)),
        ];
        let begin = Instant::now();
        let mut liveness = Liveness::new(Duration::from_secs(3), Duration::from_secs(1));
        for (at, boot, heard, recorded, answer) in timeline {
            let now = begin + Duration::from_millis(at);
            let start = (Incarnation(1), boot);
            let told = liveness.observe(now, BrokerId(1), start, heard, recorded);
            assert_eq!(told, answer, "at {at} ms");
        }
    }
}
