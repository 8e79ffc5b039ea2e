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
    static MADE: Cell<Option<Bug>> = const { Cell::new(None) };
    static REPEATS_PER_MILLE: Cell<u32> = const { Cell::new(0) };
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

/// Of a thousand messages between replicas, so many arrive a second time from now on.
pub fn set_repeats(per_mille: u32) {
    REPEATS_PER_MILLE.set(per_mille);
}

/// Whether a message is to arrive a second time.
pub(crate) fn repeats() -> bool {
    let per_mille = REPEATS_PER_MILLE.get();
    per_mille > 0 && CHANCE.with_borrow_mut(|chance| chance.random_range(0..1000)) < per_mille
}

/// Sets which hosts refuse connections: they are on, everybody reaches them, and no process listens there.
pub fn set_refusing(hosts: BTreeSet<IpAddr>) {
    REFUSING.set(hosts);
}

/// Whether `host` was named by [`set_refusing`].
pub(crate) fn refuses(host: IpAddr) -> bool {
    REFUSING.with_borrow(|hosts| hosts.contains(&host))
}

/// Classic mistakes of replicated logs: one of them can be made in a run, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Writes count as durable before they are synced.
    AckBeforeSync,
    /// Appends are answered from memory.
    AppendFromMemory,
    /// Votes are not written.
    VoteNotPersisted,
    /// A follower keeps entries that contradict its leader.
    ConflictKept,
    /// A checkpoint does not hold what is known of producers.
    DuplicatesForgotten,
    /// A batch that is sent again is appended again.
    NoDeduplication,
    /// A leader answers for the end of the log without asking a quorum.
    StaleLocalRead,
    /// An old copy of a data directory is let in.
    OldCopyAdmitted,
    /// A sync that failed is tried again.
    SyncRetried,
    /// A new file's name is not synced.
    DirectoryNotSynced,
    /// The high watermark is one too high.
    WatermarkOffByOne,
    /// A witness gets entries that an in-sync replica lacks.
    WitnessAhead,
    /// A leader serves at once, and answers for the end of the log when a quorum has confirmed it, without waiting until what that
    /// quorum has is applied.
    ReadIndexNotAwaited,
    /// A client takes a request whose fate is unknown for one that was not done.
    UnknownCalledFailed,
    /// What a failed sync left in memory counts after a restart.
    TailTrusted,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::AckBeforeSync,
        Self::AppendFromMemory,
        Self::VoteNotPersisted,
        Self::ConflictKept,
        Self::DuplicatesForgotten,
        Self::NoDeduplication,
        Self::StaleLocalRead,
        Self::OldCopyAdmitted,
        Self::SyncRetried,
        Self::DirectoryNotSynced,
        Self::WatermarkOffByOne,
        Self::WitnessAhead,
        Self::ReadIndexNotAwaited,
        Self::UnknownCalledFailed,
        Self::TailTrusted,
    ];
}

/// Makes `bug` in everything that runs in this thread from now on.
pub fn make(bug: Option<Bug>) {
    MADE.set(bug);
}

/// Whether `bug` is to be made.
pub(crate) fn makes(bug: Bug) -> bool {
    MADE.get() == Some(bug)
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
