//! The rules of a cluster's network: what becomes of the bytes from one party to another.
//!
//! Owns the rules and counts what was carried; a [`Proxy`](super::Proxy) in front of each broker obeys them. A link is
//! directed: the bytes from 1 to 2 are what 1 sends on the connections it opened to 2, and what it answers on those that 2
//! opened. Touches no socket.
//!
//! What is cut is bytes of a stream, not packets: while a link is cut, what was sent is held back (in the sender's buffers, so
//! it is not lost and takes no memory), ends of connections are held back too, and no new connection comes about. Both sides see
//! silence, never a close. When the link heals, what was held flows on, late, or the connections that met the cut are reset:
//! see [`AfterCut`]. Both are what a real network does.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::runtime::random_seed;
use crate::types::BrokerId;

/// One end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Party {
    /// A broker.
    Broker(BrokerId),
    /// Everybody who is no broker. Also a broker that is not admitted yet: it registers as a client.
    Clients,
}

impl From<BrokerId> for Party {
    fn from(broker: BrokerId) -> Self {
        Self::Broker(broker)
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broker(broker) => write!(f, "broker {broker}"),
            Self::Clients => f.write_str("clients"),
        }
    }
}

/// What becomes of the connections that met a cut, once it heals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AfterCut {
    /// What was held flows on: it arrives late.
    #[default]
    Deliver,
    /// They are reset.
    Reset,
    /// One or the other, drawn for each cut from the seed.
    Either,
}

/// What holds for one link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rule {
    /// Nothing passes.
    pub(super) cut: bool,
    /// New connections are accepted, and then nothing happens.
    pub(super) half_open: bool,
    pub(super) delay: Duration,
    /// Up to this much more, drawn for each piece.
    pub(super) jitter: Duration,
    pub(super) bytes_per_s: Option<NonZeroU64>,
}

/// What the caller asked of one link.
#[derive(Debug, Clone, Copy, Default)]
struct Wanted {
    rule: Rule,
    reset_after: bool,
}

/// A broker that nobody reaches.
#[derive(Debug, Clone, Copy)]
struct Isolation {
    from_clients: bool,
    reset_after: bool,
}

type Pair = (Party, Party);

#[derive(Debug)]
struct State {
    wanted: BTreeMap<Pair, Wanted>,
    isolated: BTreeMap<BrokerId, Isolation>,
    after_cut: AfterCut,
    random: StdRng,
    /// How often the connections between two parties were reset; the smaller party first.
    resets: BTreeMap<Pair, u64>,
    /// How often those of one broker were: with brokers, with clients.
    resets_of: BTreeMap<BrokerId, (u64, u64)>,
    /// Until when a throttled link is busy with what it carried.
    busy: BTreeMap<Pair, Instant>,
    carried: BTreeMap<Pair, u64>,
    connections: u64,
}

fn unordered(one: Party, other: Party) -> Pair {
    (one.min(other), one.max(other))
}

impl State {
    fn draw_reset(&mut self) -> bool {
        match self.after_cut {
            AfterCut::Deliver => false,
            AfterCut::Reset => true,
            AfterCut::Either => self.random.random(),
        }
    }

    fn isolates(&self, party: Party, from: Party) -> bool {
        let Party::Broker(broker) = party else {
            return false;
        };
        let isolation = self.isolated.get(&broker);
        isolation.is_some_and(|isolation| isolation.from_clients || from != Party::Clients)
    }

    fn rule(&self, from: Party, to: Party) -> Rule {
        let wanted = self.wanted.get(&(from, to)).copied().unwrap_or_default();
        let mut rule = wanted.rule;
        rule.cut |= self.isolates(from, to) || self.isolates(to, from);
        rule
    }

    fn resets(&self, one: Party, other: Party) -> u64 {
        let of = |party, other| {
            let Party::Broker(broker) = party else {
                return 0;
            };
            let (by_brokers, by_clients) = self.resets_of.get(&broker).copied().unwrap_or_default();
            if other == Party::Clients {
                by_clients
            } else {
                by_brokers
            }
        };
        let pair = self.resets.get(&unordered(one, other)).copied();
        pair.unwrap_or_default() + of(one, other) + of(other, one)
    }

    fn reset(&mut self, one: Party, other: Party) {
        *self.resets.entry(unordered(one, other)).or_default() += 1;
    }

    fn heal(&mut self, from: Party, to: Party) {
        if let Some(wanted) = self.wanted.remove(&(from, to))
            && wanted.rule.cut
            && wanted.reset_after
        {
            self.reset(from, to);
        }
    }

    fn rejoin(&mut self, broker: BrokerId) {
        if let Some(isolation) = self.isolated.remove(&broker)
            && isolation.reset_after
        {
            let (by_brokers, by_clients) = self.resets_of.entry(broker).or_default();
            *by_brokers += 1;
            *by_clients += u64::from(isolation.from_clients);
        }
    }
}

/// The rules of all links of a cluster: shared by the proxies that obey them and by who sets them. Cheap to clone. A rule holds
/// from when its call returns: at most what a proxy was just handing to the kernel still passes.
#[derive(Clone)]
pub struct Links {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<()>,
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Links")
            .field("wanted", &state.wanted)
            .field("isolated", &state.isolated)
            .finish_non_exhaustive()
    }
}

impl Default for Links {
    fn default() -> Self {
        Self::new()
    }
}

impl Links {
    /// Everything passes; chance, where it is asked for, is the operating system's.
    pub fn new() -> Self {
        Self::seeded(random_seed())
    }

    /// Everything passes; jitter and [`AfterCut::Either`] are drawn from `seed`.
    pub fn seeded(seed: u64) -> Self {
        let state = State {
            wanted: BTreeMap::new(),
            isolated: BTreeMap::new(),
            after_cut: AfterCut::default(),
            random: StdRng::seed_from_u64(seed),
            resets: BTreeMap::new(),
            resets_of: BTreeMap::new(),
            busy: BTreeMap::new(),
            carried: BTreeMap::new(),
            connections: 0,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            changed: watch::channel(()).0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.send_replace(());
    }

    /// Sets what becomes of connections that meet a cut made from now on.
    pub fn after_cut(&self, after: AfterCut) {
        self.lock().after_cut = after;
    }

    /// Nothing sent by `from` reaches `to` any more, and no connection between the two comes about.
    pub fn cut(&self, from: impl Into<Party>, to: impl Into<Party>) {
        let pair = (from.into(), to.into());
        self.change(|state| {
            let reset_after = state.draw_reset();
            let wanted = state.wanted.entry(pair).or_default();
            if !wanted.rule.cut {
                wanted.rule.cut = true;
                wanted.reset_after = reset_after;
            }
        });
    }

    /// [`Links::cut`], both ways.
    pub fn cut_both(&self, one: impl Into<Party>, other: impl Into<Party>) {
        let (one, other) = (one.into(), other.into());
        self.cut(one, other);
        self.cut(other, one);
    }

    /// Cuts `broker` off from all brokers, both ways; clients still reach it.
    pub fn isolate(&self, broker: BrokerId) {
        self.isolated(broker, false);
    }

    /// Cuts `broker` off from all brokers and all clients, both ways.
    pub fn isolate_from_all(&self, broker: BrokerId) {
        self.isolated(broker, true);
    }

    fn isolated(&self, broker: BrokerId, from_clients: bool) {
        self.change(|state| {
            let reset_after = state.draw_reset();
            let isolation = state.isolated.entry(broker).or_insert(Isolation {
                from_clients,
                reset_after,
            });
            isolation.from_clients |= from_clients;
        });
    }

    /// What `from` sends reaches `to` after `delay` and up to `jitter` more, still in order. A megabyte per connection may be
    /// under way.
    pub fn delay(
        &self,
        from: impl Into<Party>,
        to: impl Into<Party>,
        delay: Duration,
        jitter: Duration,
    ) {
        self.set(from.into(), to.into(), |rule| {
            rule.delay = delay;
            rule.jitter = jitter;
        });
    }

    /// What `from` sends to `to`, on all connections together, passes at `bytes_per_s` (at least 1).
    pub fn throttle(&self, from: impl Into<Party>, to: impl Into<Party>, bytes_per_s: u64) {
        let bytes_per_s = NonZeroU64::new(bytes_per_s.max(1));
        self.set(from.into(), to.into(), |rule| {
            rule.bytes_per_s = bytes_per_s;
        });
    }

    /// Connections that `from` opens to `to` from now on are accepted, and nothing more happens on them. Those that exist go on.
    pub fn half_open(&self, from: impl Into<Party>, to: impl Into<Party>) {
        self.set(from.into(), to.into(), |rule| rule.half_open = true);
    }

    fn set(&self, from: Party, to: Party, set: impl FnOnce(&mut Rule)) {
        self.change(|state| set(&mut state.wanted.entry((from, to)).or_default().rule));
    }

    /// Breaks the connections that exist between the two, whoever opened them, wherever in a frame they are. New ones come
    /// about as the rules allow.
    pub fn reset(&self, one: impl Into<Party>, other: impl Into<Party>) {
        let (one, other) = (one.into(), other.into());
        self.change(|state| state.reset(one, other));
    }

    /// Lifts every rule for what `from` sends to `to`, but not an isolation.
    pub fn heal_one_way(&self, from: impl Into<Party>, to: impl Into<Party>) {
        let (from, to) = (from.into(), to.into());
        self.change(|state| state.heal(from, to));
    }

    /// [`Links::heal_one_way`], both ways.
    pub fn heal(&self, one: impl Into<Party>, other: impl Into<Party>) {
        let (one, other) = (one.into(), other.into());
        self.change(|state| {
            state.heal(one, other);
            state.heal(other, one);
        });
    }

    /// Ends the isolation of `broker`.
    pub fn rejoin(&self, broker: BrokerId) {
        self.change(|state| state.rejoin(broker));
    }

    /// Lifts every rule.
    pub fn heal_all(&self) {
        self.change(|state| {
            let pairs: Vec<Pair> = state.wanted.keys().copied().collect();
            for (from, to) in pairs {
                state.heal(from, to);
            }
            let brokers: Vec<BrokerId> = state.isolated.keys().copied().collect();
            for broker in brokers {
                state.rejoin(broker);
            }
            state.busy.clear();
        });
    }

    /// Bytes that have reached `to` from `from` in all.
    pub fn carried(&self, from: impl Into<Party>, to: impl Into<Party>) -> u64 {
        let pair = (from.into(), to.into());
        self.lock().carried.get(&pair).copied().unwrap_or_default()
    }

    /// Follows the rules of both directions of a connection that `opener` opened to `to`.
    pub(super) fn follow(&self, opener: Party, to: Party) -> (Link, Link, Resets) {
        let mut state = self.lock();
        state.connections += 1;
        let link = |state: &mut State, from: Party, to: Party| Link {
            links: self.clone(),
            changed: self.changed.subscribe(),
            from,
            to,
            rule: state.rule(from, to),
            random: StdRng::seed_from_u64(state.random.random()),
        };
        let forward = link(&mut state, opener, to);
        let back = link(&mut state, to, opener);
        let resets = Resets {
            links: self.clone(),
            changed: self.changed.subscribe(),
            one: opener,
            other: to,
            known: state.resets(opener, to),
        };
        (forward, back, resets)
    }
}

/// One direction of one connection, as it sees its rule.
#[derive(Debug)]
pub(super) struct Link {
    links: Links,
    changed: watch::Receiver<()>,
    from: Party,
    to: Party,
    rule: Rule,
    random: StdRng,
}

impl Link {
    pub(super) fn rule(&self) -> Rule {
        self.rule
    }

    /// Waits until some rule has changed, and knows the own one from then on. Cancel safe.
    pub(super) async fn changed(&mut self) {
        if self.changed.changed().await.is_err() {
            std::future::pending::<()>().await; // it holds a sender itself
        }
        self.rule = self.links.lock().rule(self.from, self.to);
    }

    /// When a piece read now may be written.
    pub(super) fn due(&mut self, now: Instant) -> Instant {
        let Rule { delay, jitter, .. } = self.rule;
        if jitter.is_zero() {
            return now + delay;
        }
        now + delay + jitter.mul_f64(self.random.random())
    }

    /// When the link is done with what it has carried.
    pub(super) fn free_at(&self, now: Instant) -> Instant {
        if self.rule.bytes_per_s.is_none() {
            return now;
        }
        let busy = self.links.lock().busy.get(&(self.from, self.to)).copied();
        busy.unwrap_or(now)
    }

    /// Counts what was handed on.
    pub(super) fn carried(&self, bytes: usize, now: Instant) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let pair = (self.from, self.to);
        let mut state = self.links.lock();
        *state.carried.entry(pair).or_default() += bytes;
        if let Some(rate) = self.rule.bytes_per_s {
            let takes = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate);
            let busy = state.busy.entry(pair).or_insert(now);
            *busy = (*busy).max(now) + takes;
        }
    }
}

/// Whether the connections between two parties are to be broken.
#[derive(Debug)]
pub(super) struct Resets {
    links: Links,
    changed: watch::Receiver<()>,
    one: Party,
    other: Party,
    known: u64,
}

impl Resets {
    /// Resolves when they are. Cancel safe.
    pub(super) async fn wait(&mut self) {
        while self.links.lock().resets(self.one, self.other) == self.known {
            if self.changed.changed().await.is_err() {
                std::future::pending::<()>().await; // it holds a sender itself
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: BrokerId = BrokerId(1);
    const TWO: BrokerId = BrokerId(2);

    /// Goal: with a seed, the same cuts meet the same end; without one, both ends occur. Method: the drawn ends of 40 cuts, twice.
    #[test]
    fn a_seed_decides_what_comes_after_a_cut() {
        let drawn = |seed| {
            let links = Links::seeded(seed);
            links.after_cut(AfterCut::Either);
            let reset = |_| {
                let before = links.lock().resets(ONE.into(), TWO.into());
                links.cut(ONE, TWO);
                links.heal(ONE, TWO);
                links.lock().resets(ONE.into(), TWO.into()) > before
            };
            (0..40).map(reset).collect::<Vec<bool>>()
        };
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(8));
        assert!(drawn(7).contains(&true) && drawn(7).contains(&false));
    }
}
