//! The witness protocol as a state machine: two data replicas, a witness, and everything that may still be on its way.
//!
//! Owns the rules and nothing else: what a step is, when it may be taken, and what it does. Which steps are taken, and what
//! must hold afterwards, is the checker's and [`crate::claims`]' business.
//!
//! Messages are not kept one by one. What a leader has sent in a term is a prefix of that leader's log, so a [`Reign`] keeps
//! the log and how much of it was sent; any prefix of that may arrive, at any time, any number of times, or never. The same
//! goes for confirmations ([`Reign::confirmed`]) and votes ([`Call`]). What can have no effect any more is forgotten, so
//! that states which behave alike are one state.

use crate::parts::{
    BLANK, Breach, Call, Id, Mutation, NODES, Node, Reign, Role, Rules, State, Step, WITNESS, peer,
};

impl State {
    pub(crate) fn node(&self, id: Id) -> &Node {
        &self.nodes[usize::from(id)]
    }

    fn node_mut(&mut self, id: Id) -> &mut Node {
        &mut self.nodes[usize::from(id)]
    }

    /// What `node` does as the leader that it is.
    pub(crate) fn reign(&self, node: Id) -> Option<&Reign> {
        let leader = self.node(node);
        self.reigns.iter().find(|reign| reign.is(node, leader))
    }

    fn reign_mut(&mut self, node: Id) -> Option<&mut Reign> {
        let leader = *self.node(node);
        self.reigns.iter_mut().find(|reign| reign.is(node, &leader))
    }

    /// The leader of the newest term, when it still leads.
    pub(crate) fn newest(&self) -> Option<&Reign> {
        self.reigns
            .iter()
            .find(|reign| reign.term == self.led && reign.is(reign.leader, self.node(reign.leader)))
    }

    /// Entries that are committed as far as the leader of `reign` can tell.
    pub(crate) fn commit(&self, rules: &Rules, reign: &Reign) -> u8 {
        let leader = self.node(reign.leader);
        let own = if rules.broken(Mutation::CountUnsynced) {
            leader.log.len()
        } else {
            leader.synced
        };
        let mut copies = reign.matched;
        copies[usize::from(reign.leader)] = own;
        copies.sort_unstable();
        let majority = copies[1].min(reign.log.len());
        let is_own = majority
            .checked_sub(1)
            .is_some_and(|last| reign.log.term_at(last) == reign.term);
        if is_own { majority } else { 0 }
    }

    /// Entries that the witness may have.
    fn limit(&self, rules: &Rules, reign: &Reign) -> u8 {
        let all = reign.log.len();
        let ahead = u8::from(rules.broken(Mutation::WitnessOneAhead));
        let matched = reign.matched[usize::from(peer(reign.leader))] + ahead;
        let own = if rules.broken(Mutation::FeedUnsynced) {
            all
        } else {
            self.node(reign.leader).synced
        };
        if reign.lifted || rules.broken(Mutation::NoGate) {
            own
        } else {
            matched.min(own)
        }
    }

    /// All steps that may be taken by the replicas of `alive`.
    pub(crate) fn steps(&self, rules: &Rules, alive: [bool; 3], steps: &mut Vec<Step>) {
        let is_up = |node: Id| alive[usize::from(node)];
        let stands = |node: Id| node != WITNESS || rules.broken(Mutation::WitnessStands);
        let newest = self.nodes.iter().map(|node| node.term).max().unwrap_or(0);
        for reign in &self.reigns {
            let (term, leader) = (reign.term, reign.leader);
            for to in NODES {
                let target = self.node(to);
                if to == leader
                    || !is_up(to)
                    || target.term > term
                    || (target.term == term && target.role == Role::Leader)
                {
                    continue;
                }
                let has = target.log.common(reign.log);
                let most = if to == WITNESS {
                    has.max(reign.fed)
                } else {
                    reign.log.len()
                };
                // What it already has is still news of the term, and worth a confirmation.
                let least = if (rules.exact && target.term < term)
                    || reign.confirmed[usize::from(to)] < has
                {
                    has
                } else {
                    has + 1
                };
                steps.extend((least..=most).rev().map(|upto| Step::Arrive {
                    term,
                    leader,
                    to,
                    upto,
                }));
            }
        }
        for node in NODES.into_iter().filter(|node| is_up(*node)) {
            let own = self.node(node);
            if let Some(reign) = self.reign(node) {
                let other = usize::from(peer(node));
                for from in NODES {
                    if reign.confirmed[usize::from(from)] > reign.matched[usize::from(from)] {
                        steps.push(Step::Hear { node, from });
                    }
                }
                if own.synced < own.log.len() {
                    steps.push(Step::Sync { node });
                }
                if reign.in_sync {
                    steps.push(Step::LeaveIsr { node });
                }
                if reign.lifted {
                    steps.push(Step::Close { node });
                } else if !reign.in_sync || rules.broken(Mutation::LiftBeforeLeaving) {
                    steps.push(Step::Lift { node });
                }
                if rules.broken(Mutation::RejoinByAnOldLook) {
                    if !reign.was_level && reign.matched[other] == reign.log.len() {
                        steps.push(Step::Look { node });
                    }
                    if !reign.lifted && !reign.in_sync && reign.was_level {
                        steps.push(Step::JoinIsr { node });
                    }
                } else {
                    let needed = reign.fed.max(reign.beginning());
                    if !reign.lifted && !reign.in_sync && reign.matched[other] >= needed {
                        steps.push(Step::JoinIsr { node });
                    }
                }
                if self.proposed < rules.records {
                    steps.push(Step::Propose { node });
                }
            } else if rules.exact {
                let call = self
                    .calls
                    .iter()
                    .find(|call| call.candidate == node && call.term == own.term);
                let votes = call.map_or(0, |call| {
                    call.granted.iter().filter(|granted| **granted).count()
                });
                if own.role == Role::Candidate && votes >= 2 {
                    steps.push(Step::Lead { node });
                }
                if stands(node) {
                    let terms = [own.term + 1, newest + 1];
                    let distinct = if terms[0] == terms[1] { 1 } else { 2 };
                    let within = terms
                        .into_iter()
                        .take(distinct)
                        .filter(|term| *term <= rules.terms);
                    steps.extend(within.map(|term| Step::Stand { node, term }));
                }
            } else if stands(node) && newest < rules.terms {
                let grants = |voter: &Id| {
                    *voter != node
                        && is_up(*voter)
                        && (own.log.last() >= self.node(*voter).log.last()
                            || rules.broken(Mutation::VoteBlindly))
                };
                steps.extend(
                    NODES
                        .into_iter()
                        .filter(grants)
                        .map(|voter| Step::Elect { node, voter }),
                );
            }
            for call in &self.calls {
                let can = match own.term.cmp(&call.term) {
                    std::cmp::Ordering::Less => true,
                    std::cmp::Ordering::Equal => {
                        own.voted_for.is_none_or(|id| id == call.candidate)
                    }
                    std::cmp::Ordering::Greater => false,
                };
                let is_new = !call.granted[usize::from(node)];
                let has_log = call.last >= own.log.last() || rules.broken(Mutation::VoteBlindly);
                if can && is_new && has_log {
                    steps.push(Step::Grant {
                        term: call.term,
                        candidate: call.candidate,
                        voter: node,
                    });
                }
            }
            steps.push(Step::Restart { node });
        }
    }

    /// Takes a step that [`State::steps`] offered.
    pub(crate) fn take(&mut self, rules: &Rules, step: Step) {
        match step {
            Step::Stand { node, term } => {
                let own = self.node_mut(node);
                own.term = term;
                own.voted_for = Some(node);
                own.role = Role::Candidate;
                // A vote goes through the same journal as the entries before it.
                own.synced = own.log.len();
                let last = own.log.last();
                let mut granted = [false; 3];
                granted[usize::from(node)] = true;
                self.calls
                    .retain(|call| call.term != term || call.candidate != node);
                self.calls.push(Call {
                    term,
                    candidate: node,
                    last,
                    granted,
                });
            }
            Step::Grant {
                term,
                candidate,
                voter,
            } => {
                let own = self.node_mut(voter);
                own.term = term;
                own.voted_for = Some(candidate);
                own.role = Role::Follower;
                own.synced = own.log.len();
                for call in &mut self.calls {
                    if call.term == term && call.candidate == candidate {
                        call.granted[usize::from(voter)] = true;
                    }
                }
            }
            Step::Lead { node } => self.lead(node),
            Step::Elect { node, voter } => {
                let term = self.nodes.iter().map(|node| node.term).max().unwrap_or(0) + 1;
                for id in [node, voter] {
                    let own = self.node_mut(id);
                    own.term = term;
                    own.voted_for = Some(node);
                    own.role = Role::Follower;
                    own.synced = own.log.len();
                }
                self.lead(node);
            }
            Step::Propose { node } => {
                self.proposed += 1;
                let value = self.proposed;
                self.append(node, value);
            }
            Step::Sync { node } => {
                let own = self.node_mut(node);
                own.synced = own.log.len();
            }
            Step::Arrive {
                term,
                leader,
                to,
                upto,
            } => self.arrive(term, leader, to, upto),
            Step::Hear { node, from } => {
                if let Some(reign) = self.reign_mut(node) {
                    reign.matched[usize::from(from)] = reign.confirmed[usize::from(from)];
                }
            }
            Step::Restart { node } => {
                let forgets = rules.broken(Mutation::VoteNotPersisted);
                let wiped = node == WITNESS && rules.broken(Mutation::WitnessWiped);
                let own = self.node_mut(node);
                own.role = Role::Follower;
                own.log = own.log.prefix(own.synced);
                if forgets {
                    own.term = 0;
                    own.voted_for = None;
                }
                if wiped {
                    *own = Node::default();
                }
            }
            Step::LeaveIsr { node }
            | Step::Lift { node }
            | Step::Close { node }
            | Step::JoinIsr { node }
            | Step::Look { node } => {
                if let Some(reign) = self.reign_mut(node) {
                    match step {
                        Step::LeaveIsr { .. } => reign.in_sync = false,
                        Step::Lift { .. } => reign.lifted = true,
                        Step::Close { .. } => reign.lifted = false,
                        Step::Look { .. } => reign.was_level = true,
                        _ => {
                            reign.in_sync = true;
                            reign.was_level = false;
                        }
                    }
                }
            }
        }
        if !rules.exact {
            self.hurry();
        }
        self.settle(rules);
    }

    /// Takes the steps that may as well be taken at once.
    fn hurry(&mut self) {
        for reign in &mut self.reigns {
            reign.matched = reign.confirmed;
        }
    }

    fn lead(&mut self, node: Id) {
        let own = self.node_mut(node);
        own.role = Role::Leader;
        let term = own.term;
        own.log.push(term, BLANK);
        let reign = Reign::new(term, node, own.log);
        self.led = self.led.max(term);
        if self
            .reigns
            .iter()
            .any(|other| other.term == term && other.leader != node)
        {
            self.breach = Some(Breach::TwoLeadersInATerm);
        }
        self.reigns
            .retain(|other| other.term != term || other.leader != node);
        self.reigns.push(reign);
    }

    /// Appends a record at the leader `node`.
    pub(crate) fn append(&mut self, node: Id, value: u8) {
        let own = self.node_mut(node);
        let term = own.term;
        own.log.push(term, value);
        let log = own.log;
        if let Some(reign) = self.reign_mut(node) {
            reign.log = log;
        }
    }

    fn arrive(&mut self, term: u8, leader: Id, to: Id, upto: u8) {
        let Some(reign) = self
            .reigns
            .iter()
            .find(|reign| reign.term == term && reign.leader == leader)
        else {
            return;
        };
        let sent = if to == WITNESS {
            reign.log.ids()
        } else {
            reign.log
        };
        let own = self.node_mut(to);
        own.term = term;
        // Whoever has heard of a term's leader gives nobody else a vote in it.
        own.voted_for = Some(leader);
        own.role = Role::Follower;
        // The first entry that differs, and all behind it, give way; what came earlier and is longer stays.
        if own.log.common(sent) < upto {
            own.log = sent.prefix(upto);
        }
        own.synced = own.log.len();
        for reign in &mut self.reigns {
            if reign.term == term && reign.leader == leader {
                let confirmed = &mut reign.confirmed[usize::from(to)];
                *confirmed = upto.max(*confirmed);
            }
        }
    }

    /// What follows from a step at once: the witness is sent what it may have, leaders commit and acknowledge.
    fn settle(&mut self, rules: &Rules) {
        for index in 0..self.reigns.len() {
            let reign = self.reigns[index];
            let leader = *self.node(reign.leader);
            if !reign.is(reign.leader, &leader) {
                continue;
            }
            // What is sent and lost is the same as what is not sent: so everything is sent at once.
            self.reigns[index].fed = reign.fed.max(self.limit(rules, &reign));
            let commit = self.commit(rules, &reign);
            let committed = reign.log.prefix(commit);
            if commit > self.committed.len() {
                if !committed.starts_with(self.committed) {
                    self.breach = Some(Breach::CommittedTwice);
                }
                self.committed = committed;
                self.committed_in = self.committed_in.max(reign.term);
            } else if !self.committed.starts_with(committed) {
                self.breach = Some(Breach::CommittedTwice);
            }
            let ready = if rules.broken(Mutation::AckWithoutOwnSync)
                || rules.broken(Mutation::CountUnsynced)
            {
                commit
            } else {
                commit.min(leader.synced)
            };
            if ready > self.acked.len() {
                self.acked = reign.log.prefix(ready);
            }
        }
        self.forget(rules);
    }

    /// Forgets what can have no effect any more.
    fn forget(&mut self, rules: &Rules) {
        let nodes = self.nodes;
        let forgetful =
            rules.broken(Mutation::VoteNotPersisted) || rules.broken(Mutation::WitnessWiped);
        let can_reach = |leader: Id, to: Id, term: u8| {
            to != leader && (forgetful || nodes[usize::from(to)].term <= term)
        };
        let reaches_data = |leader, term| can_reach(leader, 0, term) || can_reach(leader, 1, term);
        let led = self.led;
        self.reigns.retain_mut(|reign| {
            let (leader, term) = (reign.leader, reign.term);
            if !rules.exact && term < led {
                reign.lifted = false;
                reign.in_sync = false;
                reign.fed = 0;
            }
            let leads = reign.is(leader, &nodes[usize::from(leader)]);
            let reaches_witness = can_reach(leader, WITNESS, term);
            let reaches_peer = reaches_data(leader, term);
            if !leads {
                if !rules.exact || (!reaches_witness && !reaches_peer) {
                    return false;
                }
                reign.confirmed = [0; 3];
                reign.matched = [0; 3];
                reign.lifted = false;
                reign.in_sync = false;
                reign.was_level = false;
                reign.fed = if reaches_witness { reign.fed } else { 0 };
                if !reaches_peer {
                    reign.log = reign.log.prefix(reign.fed);
                }
            }
            true
        });
        self.calls.retain_mut(|call| {
            let (candidate, term) = (call.candidate, call.term);
            let stands = nodes[usize::from(candidate)].role == Role::Candidate
                && nodes[usize::from(candidate)].term == term;
            let may_grant = |to: Id| {
                let node = &nodes[usize::from(to)];
                to != candidate
                    && (forgetful
                        || node.term < term
                        || (node.term == term && node.voted_for.is_none()))
            };
            if !stands {
                let pending = NODES.into_iter().any(may_grant);
                // Granting is all that is left of it, and who has granted is read by nobody.
                for to in NODES {
                    call.granted[usize::from(to)] = !may_grant(to);
                }
                return pending;
            }
            true
        });
        self.reigns.sort_unstable();
        self.calls.sort_unstable();
    }

    /// The same with the names of the two data replicas exchanged.
    pub(crate) fn mirrored(&self) -> Self {
        let name = |id: Id| if id == WITNESS { id } else { peer(id) };
        let mut other = self.clone();
        other.nodes.swap(0, 1);
        for node in &mut other.nodes {
            node.voted_for = node.voted_for.map(name);
        }
        for reign in &mut other.reigns {
            reign.leader = name(reign.leader);
            reign.confirmed.swap(0, 1);
            reign.matched.swap(0, 1);
        }
        for call in &mut other.calls {
            call.candidate = name(call.candidate);
            call.granted.swap(0, 1);
        }
        other.reigns.sort_unstable();
        other.calls.sort_unstable();
        other
    }

    /// The one of the two that stands for both.
    pub(crate) fn representative(self) -> Self {
        let other = self.mirrored();
        self.min(other)
    }
}
