//! An executable reference: partitions as plain vectors, clients that overlap, leaders that are replaced and do not know it yet,
//! answers that get lost, effects that come late. What it records is right by construction.
//!
//! Every choice comes from the seed.

use logboom::testkit::history::{
    AckLevel, Call, FaultEvent, FinalLog, History, LeaderSeen, Operation, Outcome,
    ProducerPosition, ReplicaDump,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What a run looks like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub partitions: u32,
    pub steps: u32,
    /// One in so many steps replaces a leader; 0: never.
    pub change_every: u32,
    /// One in so many steps trims; 0: never.
    pub trim_every: u32,
    /// Percent of appends that fail, have an unknown outcome or are never answered.
    pub trouble: u32,
    /// Clients go on while the log is read at the end.
    pub goes_on: bool,
}

impl Shape {
    pub fn drawn(rng: &mut StdRng) -> Self {
        Self {
            partitions: rng.random_range(1..4),
            steps: rng.random_range(50..500),
            change_every: [0, 20, 60][rng.random_range(0..3)],
            trim_every: [0, 0, 40][rng.random_range(0..3)],
            trouble: [0, 10, 50][rng.random_range(0..3)],
            goes_on: rng.random_bool(0.2),
        }
    }
}

/// What one leader shows.
#[derive(Debug, Clone, Copy)]
struct View {
    epoch: u64,
    watermark: u64,
    start: u64,
}

#[derive(Debug, Default)]
struct Partition {
    /// Value, epoch, and whether a batch begins here.
    log: Vec<(u64, u64, bool)>,
    views: Vec<View>,
    start: u64,
}

impl Partition {
    fn end(&self) -> u64 {
        self.log.len() as u64
    }

    fn leader(&mut self) -> &mut View {
        self.views.last_mut().unwrap()
    }

    /// The start of a batch, or the end, in the range.
    fn boundary(&self, from: u64, to: u64, rng: &mut StdRng) -> u64 {
        let is_boundary = |at: &u64| self.log.get(*at as usize).is_none_or(|one| one.2);
        let found: Vec<u64> = (from..=to).filter(is_boundary).collect();
        found[rng.random_range(0..found.len())]
    }

    fn records(&self, from: u64, to: u64) -> Vec<(u64, u64)> {
        (from..to).map(|at| (at, self.log[at as usize].0)).collect()
    }
}

/// What is still to happen to an operation.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    /// It takes effect, then the answer comes.
    Done,
    /// It takes effect, the answer is lost.
    DoneUnseen,
    /// No effect.
    Failed,
    /// No effect, and nobody knows.
    Nothing,
    /// The client gives up first, and then it takes effect.
    Late,
}

#[derive(Debug)]
struct Pending {
    operation: usize,
    fate: Fate,
    /// Base and epoch, once it has taken effect.
    effect: Option<(u64, u64)>,
    /// The answer to a question, once it was answered by somebody.
    answer: Option<Outcome>,
    given_up: bool,
}

/// Sessions: producers, then plain appenders, then readers and askers.
const PRODUCERS: u32 = 3;
const PLAIN: u32 = 2;
const READERS: u32 = 3;

pub struct Reference {
    rng: StdRng,
    shape: Shape,
    now: u64,
    values: u64,
    partitions: Vec<Partition>,
    pending: Vec<Pending>,
    epochs: Vec<u16>,
    positions: Vec<Vec<u64>>,
    history: History,
}

/// A clean history.
pub fn clean(seed: u64) -> History {
    let mut rng = StdRng::seed_from_u64(seed);
    let shape = Shape::drawn(&mut rng);
    with_shape(rng, shape)
}

/// A clean history of this shape.
pub fn with_shape(rng: StdRng, shape: Shape) -> History {
    let first = View {
        epoch: 1,
        watermark: 0,
        start: 0,
    };
    let partition = |_| Partition {
        views: vec![first],
        ..Partition::default()
    };
    let mut reference = Reference {
        rng,
        shape,
        now: 0,
        values: 0,
        partitions: (0..shape.partitions).map(partition).collect(),
        pending: Vec::new(),
        epochs: vec![0; PRODUCERS as usize],
        positions: vec![vec![0; shape.partitions as usize]; READERS as usize],
        history: History::default(),
    };
    reference.run();
    reference.history
}

impl Reference {
    fn chance(&mut self, every: u32) -> bool {
        every > 0 && self.rng.random_ratio(1, every)
    }

    fn run(&mut self) {
        for _ in 0..self.shape.steps {
            self.step();
        }
        if !self.shape.goes_on {
            self.settle();
            self.now += 1;
        }
        self.read_all();
        if self.shape.goes_on {
            for _ in 0..40 {
                self.step();
            }
        }
        self.dump();
        if self.rng.random_bool(0.5) {
            // The order in the list means nothing between sessions.
            self.history.operations.sort_by_key(|one| one.session);
        }
    }

    fn step(&mut self) {
        self.now += self.rng.random_range(0..3);
        match self.rng.random_range(0..100) {
            0..40 => self.ask(),
            40..70 => self.take_effect(),
            70..98 => self.answer(),
            _ => {
                if self.chance(4) {
                    self.read_all();
                }
            }
        }
        if self.chance(self.shape.change_every) {
            self.change_leader();
        }
        if self.chance(self.shape.trim_every) {
            let which = self.rng.random_range(0..self.partitions.len());
            let partition = &mut self.partitions[which];
            let top = partition.leader().watermark.max(partition.start);
            partition.start = self.rng.random_range(partition.start..=top);
            partition.leader().start = partition.start;
        }
        if self.rng.random_bool(0.1) {
            let which = self.rng.random_range(0..self.partitions.len());
            let partition = &mut self.partitions[which];
            let (from, to) = (partition.leader().watermark, partition.end());
            let boundary = partition.boundary(from, to, &mut self.rng);
            partition.leader().watermark = boundary;
        }
    }

    /// Everything that can still happen happens, or never will.
    fn settle(&mut self) {
        for _ in 0..2_000 {
            if self.pending.is_empty() {
                break;
            }
            self.now += 1;
            self.take_effect();
            self.answer();
        }
    }

    fn change_leader(&mut self) {
        let which = self.rng.random_range(0..self.partitions.len());
        let partition = &mut self.partitions[which];
        let old = *partition.leader();
        let start = partition.start;
        // The next one may know less of what may be shown.
        let watermark = partition.boundary(old.watermark / 2, partition.end(), &mut self.rng);
        let watermark = watermark.max(start);
        let watermark = partition.boundary(watermark, partition.end(), &mut self.rng);
        let epoch = old.epoch + self.rng.random_range(1..3);
        partition.views.push(View {
            epoch,
            watermark,
            start,
        });
        self.history.leaders.push(LeaderSeen {
            at_ns: self.now,
            partition: which as u32,
            epoch,
            broker: (epoch % 3) as u32,
        });
        self.history.faults.push(FaultEvent {
            kind: "kill".to_owned(),
            target: "a leader".to_owned(),
            began_ns: self.now,
            ended_ns: None,
        });
    }

    fn ask(&mut self) {
        let session = self.rng.random_range(0..PRODUCERS + PLAIN + READERS);
        let open = self.pending.iter().filter(|one| {
            !one.given_up && self.history.operations[one.operation].session == session
        });
        let room = if session < PRODUCERS { 4 } else { 1 };
        if open.count() >= room {
            return;
        }
        let partition = self.rng.random_range(0..self.shape.partitions);
        let fate = if self.rng.random_range(0..100) < self.shape.trouble {
            let fates = [Fate::DoneUnseen, Fate::Failed, Fate::Nothing, Fate::Late];
            fates[self.rng.random_range(0..4)]
        } else {
            Fate::Done
        };
        let call = if session < PRODUCERS + PLAIN {
            let producer = (session < PRODUCERS).then(|| {
                if self.rng.random_bool(0.03) {
                    self.epochs[session as usize] += 1;
                }
                ProducerPosition {
                    id: u64::from(session) + 100,
                    epoch: self.epochs[session as usize],
                }
            });
            let count = self.rng.random_range(1..4);
            self.values += count;
            Call::Append {
                values: (self.values - count..self.values).collect(),
                producer,
                acks: match self.rng.random_range(0..10) {
                    0 => AckLevel::None,
                    1 => AckLevel::Leader,
                    _ => AckLevel::All,
                },
            }
        } else {
            let reader = (session - PRODUCERS - PLAIN) as usize;
            match self.rng.random_range(0..6) {
                0 | 1 => Call::LinearizableEnd,
                2 => Call::End,
                _ => {
                    let at = &mut self.positions[reader][partition as usize];
                    if self.rng.random_bool(0.1) {
                        *at = self.rng.random_range(0..=*at);
                    }
                    Call::Fetch { from: *at }
                }
            }
        };
        self.pending.push(Pending {
            operation: self.history.operations.len(),
            fate,
            effect: None,
            answer: None,
            given_up: false,
        });
        self.history.operations.push(Operation {
            session,
            invoked_ns: self.now,
            completed_ns: None,
            partition,
            call,
            outcome: Outcome::Unknown {
                reason: "no answer".to_owned(),
            },
        });
    }

    fn take_effect(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let which = self.rng.random_range(0..self.pending.len());
        let pending = &self.pending[which];
        let operation = self.history.operations[pending.operation].clone();
        if pending.effect.is_some()
            || pending.answer.is_some()
            || matches!(pending.fate, Fate::Failed | Fate::Nothing)
            || (pending.fate == Fate::Late && !pending.given_up)
        {
            return;
        }
        let partition = &mut self.partitions[operation.partition as usize];
        match &operation.call {
            Call::Append {
                values, producer, ..
            } => {
                if let Some(position) = producer {
                    // In the order of sending, unless it was given up meanwhile.
                    let before = self.pending[..which].iter().any(|one| {
                        let other = &self.history.operations[one.operation];
                        other.session == operation.session
                            && other.partition == operation.partition
                            && one.effect.is_none()
                            && matches!(one.fate, Fate::Done | Fate::DoneUnseen)
                    });
                    if before {
                        return;
                    }
                    let fenced = partition.log.iter().any(|(value, _, _)| {
                        self.history.operations.iter().any(|other| {
                            matches!(&other.call, Call::Append { values, producer: Some(of), .. }
                                if values.contains(value) && of.id == position.id && of.epoch > position.epoch)
                        })
                    });
                    if fenced {
                        self.pending[which].fate = if self.pending[which].given_up {
                            Fate::Nothing
                        } else {
                            Fate::Failed
                        };
                        return;
                    }
                }
                let epoch = partition.leader().epoch;
                let base = partition.end();
                for (place, value) in values.iter().enumerate() {
                    partition.log.push((*value, epoch, place == 0));
                }
                self.pending[which].effect = Some((base, epoch));
            }
            Call::LinearizableEnd => {
                let end = partition.end();
                partition.leader().watermark = end;
                let epoch = Some(partition.leader().epoch);
                self.pending[which].answer = Some(Outcome::End { end, epoch });
            }
            Call::End => {
                let view = Self::somebody(partition, &mut self.rng);
                self.pending[which].answer = Some(Outcome::End {
                    end: view.watermark,
                    epoch: Some(view.epoch),
                });
            }
            Call::Fetch { from } => {
                let view = Self::somebody(partition, &mut self.rng);
                let answer = if *from < view.start || *from > partition.end() {
                    Outcome::Failed {
                        reason: "out of range".to_owned(),
                    }
                } else {
                    let top = view.watermark;
                    let to = if *from < top {
                        self.rng.random_range(from + 1..=top)
                    } else {
                        *from
                    };
                    Outcome::Fetched {
                        log_start: view.start,
                        high_watermark: top,
                        epoch: Some(view.epoch),
                        records: partition.records(*from, to),
                    }
                };
                self.pending[which].answer = Some(answer);
            }
        }
    }

    /// The leader, or one that was and does not know it yet.
    fn somebody(partition: &mut Partition, rng: &mut StdRng) -> View {
        let views = partition.views.len();
        if views > 1 && rng.random_bool(0.2) {
            return partition.views[views - 2];
        }
        *partition.leader()
    }

    fn answer(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let which = self.rng.random_range(0..self.pending.len());
        let Pending {
            operation,
            fate,
            effect,
            given_up,
            ..
        } = self.pending[which];
        let unknown = Outcome::Unknown {
            reason: "connection lost".to_owned(),
        };
        let is_question = !matches!(self.history.operations[operation].call, Call::Append { .. });
        if given_up {
            // An effect may be on its way; it may also never arrive.
            if effect.is_some() || fate == Fate::Nothing || self.rng.random_bool(0.2) {
                self.pending.remove(which);
            }
            return;
        }
        let outcome = match fate {
            Fate::Failed => Outcome::Failed {
                reason: "refused".to_owned(),
            },
            Fate::Nothing => unknown,
            Fate::Late if is_question => unknown,
            Fate::Late => {
                self.pending[which].given_up = true;
                if self.rng.random_bool(0.5) {
                    self.complete(operation, unknown);
                }
                return;
            }
            _ if is_question => {
                let Some(answer) = self.pending[which].answer.take() else {
                    return;
                };
                self.moved_on(operation, &answer);
                answer
            }
            _ => {
                let Some((base, epoch)) = effect else { return };
                self.acknowledge(operation, fate, base, epoch)
            }
        };
        self.pending.remove(which);
        if !matches!(outcome, Outcome::Unknown { .. }) || self.rng.random_bool(0.5) {
            self.complete(operation, outcome);
        }
    }

    fn acknowledge(&mut self, operation: usize, fate: Fate, base: u64, epoch: u64) -> Outcome {
        let unknown = Outcome::Unknown {
            reason: "leadership lost".to_owned(),
        };
        let asked = &self.history.operations[operation];
        let partition = &mut self.partitions[asked.partition as usize];
        let Call::Append {
            values,
            producer,
            acks,
        } = &asked.call
        else {
            return unknown;
        };
        // A plain append is not answered by the next leader.
        let led = partition.leader().epoch == epoch;
        if fate == Fate::DoneUnseen || *acks == AckLevel::None || (producer.is_none() && !led) {
            return unknown;
        }
        if *acks == AckLevel::All {
            let end = base + values.len() as u64;
            let leader = partition.leader();
            leader.watermark = leader.watermark.max(end);
        }
        Outcome::Appended {
            base,
            epoch,
            copies: self.rng.random_range(1..4),
        }
    }

    fn moved_on(&mut self, operation: usize, answer: &Outcome) {
        let asked = &self.history.operations[operation];
        let Some(reader) = asked.session.checked_sub(PRODUCERS + PLAIN) else {
            return;
        };
        let at = &mut self.positions[reader as usize][asked.partition as usize];
        match answer {
            Outcome::Fetched { records, .. } => {
                if let Some((last, _)) = records.last() {
                    *at = last + 1;
                }
            }
            Outcome::Failed { .. } => {
                *at = self.partitions[asked.partition as usize].start;
            }
            _ => {}
        }
    }

    fn complete(&mut self, operation: usize, outcome: Outcome) {
        let operation = &mut self.history.operations[operation];
        operation.completed_ns = Some(self.now);
        operation.outcome = outcome;
    }

    fn read_all(&mut self) {
        for (number, partition) in (0..).zip(&mut self.partitions) {
            let (start, end) = (partition.start, partition.end());
            partition.leader().watermark = end;
            self.history.logs.push(FinalLog {
                partition: number,
                began_ns: self.now,
                log_start: start,
                end,
                records: partition.records(start, end),
            });
        }
    }

    fn dump(&mut self) {
        for (number, partition) in (0..).zip(&self.partitions) {
            for broker in 1..4 {
                let log_start = self.rng.random_range(0..=partition.start);
                let to = partition.end();
                let high_watermark =
                    partition.boundary(to.saturating_sub(5).max(log_start), to, &mut self.rng);
                self.history.dumps.push(ReplicaDump {
                    partition: number,
                    broker,
                    log_start,
                    high_watermark,
                    records: partition.records(log_start, high_watermark),
                });
            }
        }
    }
}
