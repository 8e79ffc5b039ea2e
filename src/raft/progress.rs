//! What a leader knows about the other replicas: how far each has come, when it was last level, and how far the witness
//! may be fed. Pure: values in, decisions out; no time of its own, no lock, no I/O.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use crate::types::{LeaderEpoch, LogIndex, ReplicaId};

/// What is known about one other replica in the board's epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Known {
    pub(crate) matched: Option<LogIndex>,
    pub(crate) caught_up_at: Option<Instant>,
    pub(crate) lost_data: bool,
}

/// An answer that confirmed a follower's log up to an entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Acknowledged {
    /// The last entry confirmed.
    pub(crate) matched: Option<LogIndex>,
    /// When the request was sent.
    pub(crate) sent_at: Instant,
    /// The leader's last entry when the request was sent.
    pub(crate) last_at_send: Option<LogIndex>,
    /// The leader's last entry when the answer came.
    pub(crate) last_now: Option<LogIndex>,
    /// When the answer came.
    pub(crate) now: Instant,
}

/// What the leader of one epoch knows about the other replicas.
#[derive(Debug, Clone)]
pub(crate) struct Board {
    me: ReplicaId,
    epoch: LeaderEpoch,
    /// The other members, voters and learners.
    others: BTreeMap<ReplicaId, Known>,
    /// The other data replicas that vote.
    data_voters: BTreeSet<ReplicaId>,
    /// The in-sync data followers, when told in this epoch.
    in_sync: Option<BTreeSet<ReplicaId>>,
}

impl Board {
    pub(crate) fn new(me: ReplicaId) -> Self {
        Self {
            me,
            epoch: LeaderEpoch::default(),
            others: BTreeMap::new(),
            data_voters: BTreeSet::new(),
            in_sync: None,
        }
    }

    pub(crate) fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    pub(crate) fn others(&self) -> &BTreeMap<ReplicaId, Known> {
        &self.others
    }

    /// Forgets everything about the followers when `epoch` is newer. Returns whether it was.
    pub(crate) fn begin(&mut self, epoch: LeaderEpoch) -> bool {
        if epoch <= self.epoch {
            return false;
        }
        self.epoch = epoch;
        self.in_sync = None;
        for known in self.others.values_mut() {
            *known = Known::default();
        }
        true
    }

    /// Adds who belongs to the group by a membership that is in the log and not yet seen by those who decide by the voters: nobody
    /// is forgotten before they do. Returns whether anything changed.
    pub(crate) fn add_members(
        &mut self,
        voters: &BTreeSet<ReplicaId>,
        learners: &BTreeSet<ReplicaId>,
    ) -> bool {
        let me = self.me;
        let known = (self.others.len(), self.data_voters.len());
        for id in voters.union(learners).filter(|id| **id != me) {
            self.others.entry(*id).or_default();
        }
        let data_voters = voters.iter().filter(|id| **id != me && !id.is_witness());
        self.data_voters.extend(data_voters);
        known != (self.others.len(), self.data_voters.len())
    }

    /// Sets who belongs to the group. Returns whether that changed.
    pub(crate) fn set_members(
        &mut self,
        voters: &BTreeSet<ReplicaId>,
        learners: &BTreeSet<ReplicaId>,
    ) -> bool {
        let added = self.add_members(voters, learners);
        let known = (self.others.len(), self.data_voters.len());
        self.others
            .retain(|id, _| voters.contains(id) || learners.contains(id));
        self.data_voters.retain(|id| voters.contains(id));
        added || known != (self.others.len(), self.data_voters.len())
    }

    /// Takes a follower's confirmation. Returns whether anything changed.
    ///
    /// A follower has caught up, Kafka's way, when it has everything the leader had at some moment: the moment the request
    /// was sent if it now has what the leader had then, this moment if it has what the leader has now.
    pub(crate) fn acknowledged(
        &mut self,
        epoch: LeaderEpoch,
        replica: ReplicaId,
        answer: Acknowledged,
    ) -> bool {
        self.begin(epoch);
        if epoch != self.epoch {
            return false;
        }
        // A stream may be ahead of the news that its target is a member.
        let known = self.others.entry(replica).or_default();
        let before = *known;
        known.matched = known.matched.max(answer.matched);
        if answer.matched >= answer.last_now {
            known.caught_up_at = known.caught_up_at.max(Some(answer.now));
        } else if answer.matched >= answer.last_at_send {
            known.caught_up_at = known.caught_up_at.max(Some(answer.sent_at));
        }
        before != *known
    }

    /// Takes a follower's answer that it does not have the entry at `index`. When it had confirmed that entry in this epoch,
    /// it has lost data: returns true, and the replica must not be fed any more.
    pub(crate) fn conflicted(
        &mut self,
        epoch: LeaderEpoch,
        replica: ReplicaId,
        index: LogIndex,
    ) -> bool {
        if epoch != self.epoch {
            return false;
        }
        match self.others.get_mut(&replica) {
            Some(known) if known.matched >= Some(index) => {
                known.lost_data = true;
                true
            }
            _ => false,
        }
    }

    /// Whether `replica` has been found to have lost data in `epoch`.
    pub(crate) fn has_lost_data(&self, epoch: LeaderEpoch, replica: ReplicaId) -> bool {
        epoch == self.epoch
            && self
                .others
                .get(&replica)
                .is_some_and(|known| known.lost_data)
    }

    /// Sets which data followers are in sync in `epoch`. Returns whether that changed.
    pub(crate) fn set_in_sync(&mut self, epoch: LeaderEpoch, in_sync: BTreeSet<ReplicaId>) -> bool {
        self.begin(epoch);
        if epoch != self.epoch || self.in_sync.as_ref() == Some(&in_sync) {
            return false;
        }
        self.in_sync = Some(in_sync);
        true
    }

    /// The first index that a witness may not have yet in `epoch`: one past the least that the leader (`flushed`) and the
    /// in-sync data followers have durably. So none of them can come back from a crash with less than the witness, which
    /// would refuse to elect it.
    pub(crate) fn witness_limit(&self, epoch: LeaderEpoch, flushed: Option<LogIndex>) -> LogIndex {
        // Who belongs to the group is not known before the first look at the restored membership.
        if epoch != self.epoch || self.others.is_empty() {
            return LogIndex(0);
        }
        #[cfg(feature = "sim")]
        if crate::runtime::sim::makes(crate::runtime::sim::Bug::WitnessAhead) {
            return LogIndex(u64::MAX);
        }
        let counted = self.data_voters.iter().filter(|id| {
            self.in_sync
                .as_ref()
                .is_none_or(|in_sync| in_sync.contains(id))
        });
        let mut limit = flushed.map_or(LogIndex(0), LogIndex::next);
        for id in counted {
            let matched = self.others.get(id).and_then(|known| known.matched);
            limit = limit.min(matched.map_or(LogIndex(0), LogIndex::next));
        }
        limit
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::types::{BrokerId, ReplicaKind};

    /// What the leader has durably.
    const FLUSHED: Option<LogIndex> = Some(LogIndex(9));

    fn data(broker: u32) -> ReplicaId {
        ReplicaId::new(BrokerId(broker), ReplicaKind::Data, 1)
    }

    fn witness(broker: u32) -> ReplicaId {
        ReplicaId::new(BrokerId(broker), ReplicaKind::Witness, 1)
    }

    fn board(epoch: u64) -> Board {
        let mut board = Board::new(data(1));
        board.set_members(
            &BTreeSet::from([data(1), data(2), witness(3)]),
            &BTreeSet::new(),
        );
        board.begin(LeaderEpoch(epoch));
        board
    }

    fn answer(matched: u64, last_at_send: u64, last_now: u64, start: Instant) -> Acknowledged {
        Acknowledged {
            matched: Some(LogIndex(matched)),
            sent_at: start,
            last_at_send: Some(LogIndex(last_at_send)),
            last_now: Some(LogIndex(last_now)),
            now: start + Duration::from_millis(5),
        }
    }

    /// Goal: a follower counts as level at the moment whose entries it has. Method: a table of confirmed, last at the
    /// request, last at the answer.
    #[tokio::test]
    async fn a_follower_is_level_with_the_moment_whose_entries_it_has() {
        let start = Instant::now();
        let (sent, now) = (Some(start), Some(start + Duration::from_millis(5)));
        for (matched, last_at_send, last_now, expected) in [
            (9, 10, 12, None),
            (10, 10, 12, sent),
            (11, 10, 12, sent),
            (12, 10, 12, now),
        ] {
            let mut board = board(1);
            let answer = answer(matched, last_at_send, last_now, start);
            assert!(board.acknowledged(LeaderEpoch(1), data(2), answer));
            let known = board.others().get(&data(2)).copied().unwrap();
            assert_eq!(
                known.caught_up_at, expected,
                "{matched} {last_at_send} {last_now}"
            );
            assert_eq!(known.matched, Some(LogIndex(matched)));
        }
    }

    /// Goal: neither progress nor the caught-up moment ever goes back within an epoch. Method: an older answer after a newer one.
    #[tokio::test]
    async fn an_older_answer_takes_nothing_back() {
        let start = Instant::now();
        let mut board = board(1);
        board.acknowledged(LeaderEpoch(1), data(2), answer(12, 12, 12, start));
        let newest = board.others().get(&data(2)).copied();
        let old = answer(
            8,
            8,
            12,
            start.checked_sub(Duration::from_secs(1)).unwrap_or(start),
        );
        assert!(!board.acknowledged(LeaderEpoch(1), data(2), old));
        assert_eq!(board.others().get(&data(2)).copied(), newest);
    }

    /// Goal: a new epoch forgets, an old epoch is not heard. Method: answers of epochs around the current one.
    #[tokio::test]
    async fn a_new_epoch_starts_from_nothing() {
        let start = Instant::now();
        let mut board = board(3);
        board.acknowledged(LeaderEpoch(3), data(2), answer(5, 5, 5, start));
        board.set_in_sync(LeaderEpoch(3), BTreeSet::new());
        assert!(!board.acknowledged(LeaderEpoch(2), data(2), answer(9, 9, 9, start)));
        assert!(!board.set_in_sync(LeaderEpoch(2), BTreeSet::from([data(2)])));
        assert!(board.begin(LeaderEpoch(4)));
        assert_eq!(
            board.others().get(&data(2)).copied(),
            Some(Known::default())
        );
        assert_eq!(
            board.witness_limit(LeaderEpoch(4), FLUSHED),
            LogIndex(0),
            "in sync until told otherwise"
        );
    }

    /// Goal: a membership that is in the log adds members and forgets nobody; who was told of it forgets who is gone. Method: a
    /// follower and a witness give place to a new follower.
    #[tokio::test]
    async fn nobody_is_forgotten_before_the_new_members_are_seen() {
        let mut board = board(1);
        board.acknowledged(LeaderEpoch(1), data(2), answer(5, 5, 5, Instant::now()));
        let known = board.others().get(&data(2)).copied().unwrap();
        let voters = BTreeSet::from([data(1), data(4)]);
        let none = BTreeSet::new();
        let members = |board: &Board| board.others().keys().copied().collect::<Vec<_>>();
        assert!(board.add_members(&voters, &none));
        assert_eq!(members(&board).len(), 3);
        assert_eq!(board.others().get(&data(2)), Some(&known));
        assert_eq!(
            board.witness_limit(LeaderEpoch(1), FLUSHED),
            LogIndex(0),
            "the new one counts at once, and has nothing"
        );
        assert!(!board.add_members(&voters, &none));
        assert!(board.set_members(&voters, &none));
        assert_eq!(members(&board), [data(4)]);
        assert!(!board.set_members(&voters, &none));
    }

    /// Goal: the witness gets exactly what the leader and all in-sync data followers have durably. Method: a table over who is
    /// in sync, and over what the leader has.
    #[tokio::test]
    async fn the_witness_is_fed_what_all_in_sync_followers_have() {
        let start = Instant::now();
        let epoch = LeaderEpoch(1);
        let mut board = board(1);
        let voters = BTreeSet::from([data(1), data(2), data(4), witness(3)]);
        board.set_members(&voters, &BTreeSet::from([data(5)]));
        assert_eq!(board.witness_limit(epoch, FLUSHED), LogIndex(0));
        board.acknowledged(epoch, data(2), answer(7, 9, 9, start));
        assert_eq!(
            board.witness_limit(epoch, FLUSHED),
            LogIndex(0),
            "one of two has nothing"
        );
        board.acknowledged(epoch, data(4), answer(5, 9, 9, start));
        assert_eq!(
            board.witness_limit(epoch, FLUSHED),
            LogIndex(6),
            "the least of both; a learner does not count"
        );
        for (in_sync, limit) in [
            (vec![data(2)], 8),
            (vec![data(4)], 6),
            (vec![data(2), data(4)], 6),
            (vec![data(1)], 10),
            (vec![], 10),
        ] {
            board.set_in_sync(epoch, in_sync.iter().copied().collect());
            assert_eq!(
                board.witness_limit(epoch, FLUSHED),
                LogIndex(limit),
                "{in_sync:?}"
            );
        }
        for (flushed, limit) in [(None, 0), (Some(LogIndex(6)), 7)] {
            assert_eq!(
                board.witness_limit(epoch, flushed),
                LogIndex(limit),
                "the leader itself has {flushed:?} durably"
            );
        }
        assert_eq!(
            board.witness_limit(LeaderEpoch(2), FLUSHED),
            LogIndex(0),
            "an epoch not begun gives nothing"
        );
    }

    /// Goal: a leader that does not know its group's members yet gives the witness nothing. Method: a new board.
    #[tokio::test]
    async fn the_witness_is_fed_nothing_before_the_members_are_known() {
        let mut board = Board::new(data(1));
        board.begin(LeaderEpoch(1));
        assert_eq!(board.witness_limit(LeaderEpoch(1), FLUSHED), LogIndex(0));
    }

    /// Goal: losing what had been confirmed is told from an ordinary search for the common entry. Method: conflicts around
    /// the confirmed index, in this and another epoch.
    #[tokio::test]
    async fn lost_data_is_a_conflict_at_or_below_what_was_confirmed() {
        let start = Instant::now();
        for (epoch, index, lost) in [(1, 6, false), (1, 5, true), (1, 2, true), (2, 2, false)] {
            let mut board = board(1);
            assert!(
                !board.conflicted(LeaderEpoch(1), data(2), LogIndex(0)),
                "nothing confirmed yet"
            );
            board.acknowledged(LeaderEpoch(1), data(2), answer(5, 5, 5, start));
            assert_eq!(
                board.conflicted(LeaderEpoch(epoch), data(2), LogIndex(index)),
                lost
            );
            assert_eq!(
                board.has_lost_data(LeaderEpoch(1), data(2)),
                lost,
                "{epoch} {index}"
            );
        }
    }
}
