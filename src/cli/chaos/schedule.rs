//! Which faults come when: a pure function of the seed and of what was asked for.
//!
//! Owns the choice and its limits: nobody loses more copies than the guarantees allow for. What one broker loses for good (flipped
//! bits) waits until all copies are in sync. What takes something from all of them takes only what was not durable.
//! Faults come one after the other; each is healed before the next one begins.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// What can be asked for with `--faults`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Kill,
    Pause,
    Partition,
    Slow,
    Powerloss,
    Diskfull,
    Fsyncfail,
    Bitrot,
    Transfer,
    Reassign,
}

impl Kind {
    pub(super) const ALL: [Self; 10] = [
        Self::Kill,
        Self::Pause,
        Self::Partition,
        Self::Slow,
        Self::Powerloss,
        Self::Diskfull,
        Self::Fsyncfail,
        Self::Bitrot,
        Self::Transfer,
        Self::Reassign,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Partition => "partition",
            Self::Slow => "slow",
            Self::Powerloss => "powerloss",
            Self::Diskfull => "diskfull",
            Self::Fsyncfail => "fsyncfail",
            Self::Bitrot => "bitrot",
            Self::Transfer => "transfer",
            Self::Reassign => "reassign",
        }
    }

    /// Whether it is done by the library for disk faults.
    pub(super) fn needs_fault_disk(self) -> bool {
        matches!(self, Self::Powerloss | Self::Diskfull | Self::Fsyncfail)
    }

    /// With fewer brokers there is nobody to be cut off from, to lead instead, or to copy from.
    pub(super) fn brokers_min(self) -> u32 {
        match self {
            Self::Partition | Self::Transfer | Self::Reassign => 2,
            Self::Bitrot => 3,
            _ => 1,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How many brokers a kill or a loss of power hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Mostly one, now and then all.
    Either,
    /// Always a leader, of a whole cluster.
    One,
    All,
}

/// A kind as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) kind: Kind,
    pub(super) scope: Scope,
}

impl Wanted {
    /// As on the command line.
    pub(super) fn name(self) -> String {
        let kind = self.kind;
        match self.scope {
            Scope::Either => kind.to_string(),
            Scope::One => format!("{kind}-one"),
            Scope::All => format!("{kind}-all"),
        }
    }

    /// A name of the command line: a kind, and for `kill` and `powerloss` also `kill-one`, `kill-all`, ….
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (name, scope) = match text.split_once('-') {
            Some((name, "one")) => (name, Scope::One),
            Some((name, "all")) => (name, Scope::All),
            _ => (text, Scope::Either),
        };
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        match kind {
            Some(kind)
                if scope == Scope::Either || matches!(kind, Kind::Kill | Kind::Powerloss) =>
            {
                Ok(Self { kind, scope })
            }
            _ => {
                let names: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
                Err(format!(
                    "there is no fault {text:?}; use some of {}, or kill-one, kill-all, powerloss-one, powerloss-all",
                    names.join(",")
                ))
            }
        }
    }
}

/// Who is hit. Who leads is known only when the time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Broker(u32),
    /// The leader of a partition, by its number among all partitions of the run.
    LeaderOf(u32),
    All,
}

/// What is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// Between one and another, both ways.
    Pair(u32, u32),
    /// From one to another.
    OneWay(u32, u32),
    /// Between one and all other brokers; clients still reach it.
    Isolate(Target),
    /// Between one and everybody.
    IsolateFromAll(Target),
}

/// One fault with all its choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Kill(Target),
    Pause(Target),
    Partition(Cut),
    SlowLinks {
        target: Target,
        delay: Duration,
        jitter: Duration,
    },
    SlowDisk {
        target: Target,
        delay: Duration,
    },
    Powerloss {
        target: Target,
        seed: u64,
    },
    /// `room`: what is left, in bytes; `None`: as little as makes a broker refuse, but no write fail.
    Diskfull {
        target: Target,
        room: Option<u64>,
    },
    /// The how-manieth sync fails.
    Fsyncfail {
        target: Target,
        nth: u64,
    },
    Bitrot {
        broker: u32,
        flips: u32,
        seed: u64,
    },
    Transfer {
        partition: u32,
    },
    Reassign {
        partition: u32,
        seed: u64,
    },
}

impl Fault {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Kill(_) => Kind::Kill,
            Self::Pause(_) => Kind::Pause,
            Self::Partition(_) => Kind::Partition,
            Self::SlowLinks { .. } | Self::SlowDisk { .. } => Kind::Slow,
            Self::Powerloss { .. } => Kind::Powerloss,
            Self::Diskfull { .. } => Kind::Diskfull,
            Self::Fsyncfail { .. } => Kind::Fsyncfail,
            Self::Bitrot { .. } => Kind::Bitrot,
            Self::Transfer { .. } => Kind::Transfer,
            Self::Reassign { .. } => Kind::Reassign,
        }
    }
}

/// One entry of the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// Before anything else all copies are in sync.
    pub(super) settled: bool,
    /// Then it is calm for so long.
    pub(super) calm: Duration,
    pub(super) fault: Fault,
    /// From its beginning to its healing, for faults that do not end by themselves.
    pub(super) lasts: Duration,
}

/// What the schedule depends on beside the seed.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) brokers: u32,
    /// Partitions of all topics together.
    pub(super) partitions: u32,
    pub(super) faults: Vec<Wanted>,
    /// Whether links and disks can be made slow at will, or the links alone.
    pub(super) fault_disks: bool,
}

/// Every kind as often as every other: they come in rounds, each in an order of its own.
pub(super) struct Schedule {
    plan: Plan,
    chance: StdRng,
    round: VecDeque<Wanted>,
}

impl Schedule {
    pub(super) fn new(seed: u64, plan: Plan) -> Self {
        Self {
            plan,
            chance: StdRng::seed_from_u64(seed),
            round: VecDeque::new(),
        }
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.chance.random_range(from..=to))
    }

    fn broker(&mut self) -> u32 {
        self.chance.random_range(1..=self.plan.brokers)
    }

    fn partition(&mut self) -> u32 {
        self.chance.random_range(0..self.plan.partitions.max(1))
    }

    /// One broker; a leader more often than not, since there it hurts.
    fn one(&mut self) -> Target {
        if self.chance.random_ratio(2, 3) {
            Target::LeaderOf(self.partition())
        } else {
            Target::Broker(self.broker())
        }
    }

    fn hit(&mut self, scope: Scope) -> Target {
        let all = match scope {
            // What is asked for is a failover.
            Scope::One => return Target::LeaderOf(self.partition()),
            Scope::All => true,
            Scope::Either => self.chance.random_ratio(1, 4),
        };
        if all { Target::All } else { self.one() }
    }

    fn cut(&mut self) -> Cut {
        let from = self.broker();
        // Any other broker, each as likely.
        let step = self.chance.random_range(1..self.plan.brokers.max(2));
        let to = (from - 1 + step) % self.plan.brokers + 1;
        match self.chance.random_range(0..4) {
            0 => Cut::Pair(from, to),
            1 => Cut::OneWay(from, to),
            2 => Cut::Isolate(self.one()),
            _ => Cut::IsolateFromAll(self.one()),
        }
    }

    fn fault(&mut self, wanted: Wanted) -> Fault {
        match wanted.kind {
            Kind::Kill => Fault::Kill(self.hit(wanted.scope)),
            Kind::Pause => Fault::Pause(self.one()),
            Kind::Partition => Fault::Partition(self.cut()),
            Kind::Slow if self.plan.fault_disks && self.chance.random_ratio(1, 2) => {
                let (target, delay) = (self.one(), self.millis(50, 400));
                Fault::SlowDisk { target, delay }
            }
            Kind::Slow => Fault::SlowLinks {
                target: self.one(),
                delay: self.millis(20, 150),
                jitter: self.millis(0, 100),
            },
            Kind::Powerloss => Fault::Powerloss {
                target: self.hit(wanted.scope),
                seed: self.chance.random(),
            },
            Kind::Diskfull => {
                let refuses = self.chance.random_ratio(1, 2);
                Fault::Diskfull {
                    // Only a leader is asked to append.
                    target: Target::LeaderOf(self.partition()),
                    room: (!refuses).then(|| self.chance.random_range(0..64 << 10)),
                }
            }
            Kind::Fsyncfail => Fault::Fsyncfail {
                target: self.one(),
                nth: self.chance.random_range(1..=20),
            },
            Kind::Bitrot => Fault::Bitrot {
                broker: self.broker(),
                flips: self.chance.random_range(1..=8),
                seed: self.chance.random(),
            },
            Kind::Transfer => Fault::Transfer {
                partition: self.partition(),
            },
            Kind::Reassign => Fault::Reassign {
                partition: self.partition(),
                seed: self.chance.random(),
            },
        }
    }
}

impl Iterator for Schedule {
    type Item = Step;

    /// Never ends, unless nothing was asked for.
    fn next(&mut self) -> Option<Step> {
        if self.round.is_empty() {
            let mut round = self.plan.faults.clone();
            round.shuffle(&mut self.chance);
            self.round = round.into();
        }
        let wanted = self.round.pop_front()?;
        let fault = self.fault(wanted);
        // Half of the others meet a cluster that has not recovered from the one before.
        let settled = self.chance.random_ratio(1, 2)
            || wanted.scope == Scope::One
            || matches!(fault.kind(), Kind::Bitrot | Kind::Transfer | Kind::Reassign);
        let calm = self.millis(100, 800);
        let lasts = match fault.kind() {
            Kind::Kill | Kind::Powerloss => self.millis(0, 1_500),
            Kind::Pause | Kind::Partition => self.millis(500, 4_000),
            _ => self.millis(1_000, 3_000),
        };
        Some(Step {
            settled,
            calm,
            fault,
            lasts,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn plan(brokers: u32) -> Plan {
        let wanted = |kind| Wanted {
            kind,
            scope: Scope::Either,
        };
        Plan {
            brokers,
            partitions: 4,
            faults: Kind::ALL.into_iter().map(wanted).collect(),
            fault_disks: true,
        }
    }

    /// Goal: a seed names its schedule. Method: the same one twice, and others.
    #[test]
    fn a_schedule_is_its_seed() {
        let of = |seed| Schedule::new(seed, plan(3)).take(200).collect::<Vec<_>>();
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
    }

    /// Goal: whatever is asked for comes equally often, and soon. Method: every round of many seeds.
    #[test]
    fn every_round_has_every_kind() {
        for seed in 0..50 {
            let steps: Vec<Step> = Schedule::new(seed, plan(3)).take(30).collect();
            for round in steps.chunks(10) {
                let kinds: BTreeSet<Kind> = round.iter().map(|step| step.fault.kind()).collect();
                assert_eq!(kinds.len(), 10, "seed {seed}");
            }
        }
        let mut nothing = plan(3);
        nothing.faults.clear();
        assert_eq!(Schedule::new(0, nothing).next(), None);
    }

    /// Goal: nobody is hit that is not there, nobody is cut off from itself, and what is lost for good waits for copies in sync. Method:
    /// many steps for several sizes.
    #[test]
    fn faults_stay_within_the_model() {
        let mut variants: BTreeMap<String, u32> = BTreeMap::new();
        for brokers in [2, 3, 5] {
            let there = |target: Target| match target {
                Target::Broker(broker) => (1..=brokers).contains(&broker),
                Target::LeaderOf(partition) => partition < 4,
                Target::All => true,
            };
            for step in Schedule::new(u64::from(brokers), plan(brokers)).take(2_000) {
                let text = format!("{:?}", step.fault);
                let variant = text
                    .split([' ', '(', ')'])
                    .take(2)
                    .collect::<Vec<_>>()
                    .join(" ");
                *variants.entry(variant).or_default() += 1;
                assert!(step.calm < Duration::from_secs(1), "{step:?}");
                assert!(step.lasts <= Duration::from_secs(4), "{step:?}");
                match step.fault {
                    Fault::Kill(target) | Fault::Powerloss { target, .. } => assert!(there(target)),
                    Fault::Partition(Cut::Pair(from, to) | Cut::OneWay(from, to)) => {
                        assert_ne!(from, to);
                        assert!(there(Target::Broker(from)) && there(Target::Broker(to)));
                    }
                    Fault::Partition(Cut::Isolate(target) | Cut::IsolateFromAll(target))
                    | Fault::Pause(target)
                    | Fault::SlowLinks { target, .. }
                    | Fault::SlowDisk { target, .. }
                    | Fault::Diskfull { target, .. }
                    | Fault::Fsyncfail { target, .. } => {
                        assert!(there(target) && target != Target::All, "{step:?}");
                    }
                    Fault::Bitrot { broker, .. } => {
                        assert!(step.settled && there(Target::Broker(broker)), "{step:?}");
                    }
                    Fault::Transfer { .. } | Fault::Reassign { .. } => assert!(step.settled),
                }
            }
        }
        for variant in [
            "Kill All",
            "Kill LeaderOf",
            "Partition Pair",
            "Partition OneWay",
            "Partition Isolate",
            "Partition IsolateFromAll",
            "SlowLinks {",
            "SlowDisk {",
        ] {
            assert!(variants.contains_key(variant), "{variant}: {variants:?}");
        }
    }

    /// Goal: whoever asks for kills of one broker gets failovers that can be measured. Method: many steps.
    #[test]
    fn one_is_the_leader_of_a_whole_cluster() {
        let mut plan = plan(3);
        plan.faults = vec![Wanted::parse("kill-one").unwrap()];
        for step in Schedule::new(9, plan).take(200) {
            assert!(step.settled, "{step:?}");
            assert!(
                matches!(step.fault, Fault::Kill(Target::LeaderOf(_))),
                "{step:?}"
            );
        }
    }

    /// Goal: the names of the command line are understood, and others are refused with those that exist. Method: a table.
    #[test]
    fn names_are_understood() {
        let all = Wanted {
            kind: Kind::Powerloss,
            scope: Scope::All,
        };
        assert_eq!(Wanted::parse("powerloss-all"), Ok(all));
        for kind in Kind::ALL {
            assert_eq!(Wanted::parse(kind.name()).map(|one| one.kind), Ok(kind));
        }
        for wrong in ["", "kills", "pause-all", "kill-two", "bitrot-one"] {
            let error = Wanted::parse(wrong).unwrap_err();
            assert!(error.contains("powerloss-all"), "{error}");
        }
    }
}
