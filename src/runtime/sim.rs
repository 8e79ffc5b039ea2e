//! Chance and wall-clock time of the simulation: from one seed, for all hosts of the thread.
//!
//! Owns the generator, the wall clock's error, and what is known of hosts that refuse connections. Monotonic time needs nothing here: tokio's clock is paused and moved by turmoil.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::net::IpAddr;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Where the wall clock stands when the simulation begins, in ms since 1970.
const EPOCH_MS: i64 = 1_700_000_000_000;

thread_local! {
    static CHANCE: RefCell<SmallRng> = RefCell::new(SmallRng::seed_from_u64(0));
    static ERROR_MS: Cell<i64> = const { Cell::new(0) };
    static REFUSING: RefCell<BTreeSet<IpAddr>> = const { RefCell::new(BTreeSet::new()) };
}

/// Begins anew with `seed`: to be called before anything else is done in a simulation.
pub fn seed(seed: u64) {
    CHANCE.set(SmallRng::seed_from_u64(seed));
    ERROR_MS.set(0);
}

/// Sets the wall clock wrong by so much from now on, in ms.
pub fn set_wall_clock_error(ms: i64) {
    ERROR_MS.set(ms);
}

/// Sets which hosts refuse connections: they are on, everybody reaches them, and no process listens there.
pub fn set_refusing(hosts: BTreeSet<IpAddr>) {
    REFUSING.set(hosts);
}

/// Whether `host` was named by [`set_refusing`].
pub(crate) fn refuses(host: IpAddr) -> bool {
    REFUSING.with_borrow(|hosts| hosts.contains(&host))
}

pub(super) fn draw() -> u128 {
    CHANCE.with_borrow_mut(Rng::random)
}

pub(super) fn wall_clock_ms() -> i64 {
    let since = turmoil::sim_elapsed().unwrap_or_default();
    let since = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
    EPOCH_MS
        .saturating_add(since)
        .saturating_add(ERROR_MS.get())
}
