//! What a state of the model is made of: replicas, what was sent, what may be left out of the rules.
//!
//! Owns the data and its notation; the rules are in [`crate::protocol`].

use std::fmt;

/// A replica: 0 and 1 hold records, 2 is the witness.
pub(crate) type Id = u8;

pub(crate) const WITNESS: Id = 2;
pub(crate) const NODES: [Id; 3] = [0, 1, 2];
/// The value of the entry that a new leader appends.
pub(crate) const BLANK: u8 = 0;
/// The value of entries that only [`crate::claims::Memory::recovers`] appends.
pub(crate) const PROBE: u8 = 15;

/// The other data replica.
pub(crate) fn peer(node: Id) -> Id {
    u8::from(node == 0)
}

/// A log: one byte per entry, the term above the value. An entry's id is its term and its place.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) struct Log(u128);

impl Log {
    pub(crate) fn len(self) -> u8 {
        u8::try_from((135 - self.0.leading_zeros()) / 8).unwrap_or(16)
    }

    fn entry(self, index: u8) -> u8 {
        u8::try_from(self.0 >> (8 * u32::from(index)) & 0xff).unwrap_or(0)
    }

    pub(crate) fn push(&mut self, term: u8, value: u8) {
        assert!(self.len() < 15, "the bounds keep logs short");
        self.0 |= u128::from(term << 4 | value) << (8 * u32::from(self.len()));
    }

    pub(crate) fn prefix(self, len: u8) -> Self {
        Self(self.0 & ((1 << (8 * u32::from(len))) - 1))
    }

    pub(crate) fn starts_with(self, other: Self) -> bool {
        self.prefix(other.len()) == other
    }

    /// Without the records: what a witness keeps.
    pub(crate) fn ids(self) -> Self {
        Self(self.0 & 0xf0f0_f0f0_f0f0_f0f0_f0f0_f0f0_f0f0_f0f0)
    }

    pub(crate) fn term_at(self, index: u8) -> u8 {
        self.entry(index) >> 4
    }

    /// The id of the last entry, as votes compare it.
    pub(crate) fn last(self) -> (u8, u8) {
        let len = self.len();
        (len.checked_sub(1).map_or(0, |last| self.term_at(last)), len)
    }

    /// Entries that both have with the same id, from the beginning.
    pub(crate) fn common(self, other: Self) -> u8 {
        let differ = self.ids().0 ^ other.ids().0;
        let same = u8::try_from(differ.trailing_zeros() / 8).unwrap_or(16);
        same.min(self.len()).min(other.len())
    }

    pub(crate) fn holds_value(self, value: u8) -> bool {
        (0..self.len()).any(|index| self.entry(index) & 0xf == value)
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for index in 0..self.len() {
            let gap = if index == 0 { "" } else { " " };
            match self.entry(index) & 0xf {
                BLANK => write!(f, "{gap}t{}", self.term_at(index))?,
                PROBE => write!(f, "{gap}t{}:probe", self.term_at(index))?,
                value => write!(f, "{gap}t{}:{value}", self.term_at(index))?,
            }
        }
        f.write_str("]")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) enum Role {
    #[default]
    Follower,
    Candidate,
    Leader,
}

/// One replica. Term, vote and the first `synced` entries survive a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) struct Node {
    pub(crate) term: u8,
    pub(crate) voted_for: Option<Id>,
    pub(crate) role: Role,
    pub(crate) log: Log,
    pub(crate) synced: u8,
}

/// What somebody sent as the leader of a term; while it still leads, also what it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Reign {
    pub(crate) term: u8,
    pub(crate) leader: Id,
    /// The leader's log; once it does not lead any more, the part that may still arrive somewhere.
    pub(crate) log: Log,
    /// Entries at the beginning of `log` that were sent to the witness.
    pub(crate) fed: u8,
    /// Entries that each replica confirmed, whether or not the leader heard it.
    pub(crate) confirmed: [u8; 3],
    /// Entries that the leader knows each replica to have.
    pub(crate) matched: [u8; 3],
    /// Whether the witness is fed without regard to the other data replica.
    pub(crate) lifted: bool,
    /// Whether the other data replica is in the published ISR.
    pub(crate) in_sync: bool,
    /// Only for [`Mutation::RejoinByAnOldLook`]: the other data replica was level at some earlier look.
    pub(crate) was_level: bool,
}

/// A candidate's request for votes and who has granted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Call {
    pub(crate) term: u8,
    pub(crate) candidate: Id,
    pub(crate) last: (u8, u8),
    pub(crate) granted: [bool; 3],
}

/// What the rules were broken by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Breach {
    TwoLeadersInATerm,
    CommittedTwice,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) struct State {
    pub(crate) nodes: [Node; 3],
    pub(crate) reigns: Vec<Reign>,
    pub(crate) calls: Vec<Call>,
    /// What any leader has committed; the checker's memory, no replica reads it.
    pub(crate) committed: Log,
    /// The newest term in which something was committed.
    pub(crate) committed_in: u8,
    /// The beginning of `committed` that clients were told is done.
    pub(crate) acked: Log,
    /// The newest term that had a leader.
    pub(crate) led: u8,
    /// Records proposed.
    pub(crate) proposed: u8,
    pub(crate) breach: Option<Breach>,
}

/// A step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A replica stands for `term`.
    Stand { node: Id, term: u8 },
    /// A vote request arrives and is granted.
    Grant { term: u8, candidate: Id, voter: Id },
    /// A candidate has heard of enough votes.
    Lead { node: Id },
    /// Stand, grant and lead in one, where [`Rules::exact`] does not hold.
    Elect { node: Id, voter: Id },
    /// The leader appends a client's record.
    Propose { node: Id },
    /// The leader's log reaches its disk.
    Sync { node: Id },
    /// Entries arrive, and are durable before they are confirmed.
    Arrive {
        term: u8,
        leader: Id,
        to: Id,
        upto: u8,
    },
    /// The leader hears a confirmation.
    Hear { node: Id, from: Id },
    /// The leader publishes that the other data replica is not in sync.
    LeaveIsr { node: Id },
    /// The leader lifts the gate: the witness is fed without the other data replica.
    Lift { node: Id },
    /// The leader closes the gate.
    Close { node: Id },
    /// The leader publishes that the other data replica is in sync.
    JoinIsr { node: Id },
    /// Only for [`Mutation::RejoinByAnOldLook`].
    Look { node: Id },
    /// A replica crashes, loses what is not synced, and starts again.
    Restart { node: Id },
}

/// A rule left out or turned round, to see that its absence is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// The witness is fed whatever the leader has, always.
    NoGate,
    /// The gate is lifted while the other data replica still is in the published ISR.
    LiftBeforeLeaving,
    /// The witness gets one entry more than the other data replica is known to have.
    WitnessOneAhead,
    /// The witness is fed entries that the leader itself has not synced.
    FeedUnsynced,
    /// A client is told before the leader's own disk has the record.
    AckWithoutOwnSync,
    /// The leader counts its own copy before it is synced.
    CountUnsynced,
    /// The other data replica is in sync again because it was level before the gate closed.
    RejoinByAnOldLook,
    /// The witness stands for election.
    WitnessStands,
    /// Term and vote are forgotten in a crash.
    VoteNotPersisted,
    /// Votes are granted without regard to the logs.
    VoteBlindly,
    /// The witness comes back with an empty directory under its old id.
    WitnessWiped,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |id: Id| ["A", "B", "the witness"][usize::from(id)];
        match *self {
            Self::Stand { node, term } => write!(f, "{} stands for term {term}", name(node)),
            Self::Grant {
                term,
                candidate,
                voter,
            } => {
                write!(
                    f,
                    "{} votes for {} in term {term}",
                    name(voter),
                    name(candidate)
                )
            }
            Self::Lead { node } => write!(f, "{} leads", name(node)),
            Self::Elect { node, voter } => {
                write!(f, "{} leads, elected by {}", name(node), name(voter))
            }
            Self::Propose { node } => write!(f, "{} appends a record", name(node)),
            Self::Sync { node } => write!(f, "{}'s disk has it all", name(node)),
            Self::Arrive {
                term,
                leader,
                to,
                upto,
            } => write!(
                f,
                "{} has the first {upto} entries from {}, leader of term {term}",
                name(to),
                name(leader)
            ),
            Self::Hear { node, from } => {
                write!(f, "{} hears what {} has", name(node), name(from))
            }
            Self::LeaveIsr { node } => {
                write!(f, "{} publishes itself as alone in sync", name(node))
            }
            Self::Lift { node } => write!(f, "{} lifts the gate", name(node)),
            Self::Close { node } => write!(f, "{} closes the gate", name(node)),
            Self::JoinIsr { node } => write!(f, "{} publishes both as in sync", name(node)),
            Self::Look { node } => write!(f, "{} sees the other one level", name(node)),
            Self::Restart { node } => write!(f, "{} crashes and comes back", name(node)),
        }
    }
}

/// What bounds the exploration, and which rules are broken in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules {
    pub(crate) terms: u8,
    pub(crate) records: u8,
    pub(crate) mutations: Vec<Mutation>,
    /// Every order of steps, those as well that cannot matter. Where it does not hold:
    /// - an election is one step. A candidate's log does not change before it leads, and a vote given to one that never leads
    ///   only makes its giver refuse more, as lost messages do;
    /// - what a leader of the past has sent has arrived before its end or never does, since in between its target
    ///   does nothing that the arrival could see;
    /// - a leader hears confirmations at once: it commits and sends more, of which any part may get lost, so it has more to
    ///   answer for.
    pub(crate) exact: bool,
}

impl Rules {
    pub(crate) fn broken(&self, mutation: Mutation) -> bool {
        self.mutations.contains(&mutation)
    }
}

impl Reign {
    pub(crate) fn new(term: u8, leader: Id, log: Log) -> Self {
        Self {
            term,
            leader,
            log,
            fed: 0,
            confirmed: [0; 3],
            matched: [0; 3],
            lifted: false,
            in_sync: false,
            was_level: false,
        }
    }

    /// The place behind the entry with which the reign began.
    pub(crate) fn beginning(&self) -> u8 {
        let own = |index: &u8| self.log.term_at(*index) == self.term;
        (0..self.log.len()).find(own).map_or(0, |first| first + 1)
    }

    pub(crate) fn is(&self, node: Id, state: &Node) -> bool {
        self.leader == node && state.role == Role::Leader && state.term == self.term
    }
}
