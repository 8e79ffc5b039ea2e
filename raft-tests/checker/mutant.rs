//! A history that can be damaged: what the mutators need to find their way in it.

use logboom::testkit::checker::AnomalyKind;
use logboom::testkit::history::{
    AckLevel, Call, FinalLog, History, Operation, Outcome, ProducerPosition,
};
use rand::Rng;
use rand::rngs::StdRng;

/// A value that no reference run sends.
pub const UNSENT: u64 = 1 << 40;

pub struct Mutant {
    pub history: History,
    pub rng: StdRng,
}

/// An append, with what is known of it.
#[derive(Debug, Clone)]
pub struct Append {
    pub number: usize,
    pub partition: u32,
    pub session: u32,
    pub values: Vec<u64>,
    pub producer: Option<ProducerPosition>,
    pub acks: AckLevel,
    /// Base and epoch of its acknowledgement.
    pub ack: Option<(u64, u64)>,
    pub failed: bool,
    /// Where its first value is found.
    pub found: Option<u64>,
    pub invoked: u64,
    pub completed: Option<u64>,
}

impl Append {
    pub fn len(&self) -> u64 {
        self.values.len() as u64
    }

    pub fn unknown(&self) -> bool {
        self.ack.is_none() && !self.failed
    }
}

/// A read: the offset asked for, the log start, the records.
pub type Read = (u64, u64, Vec<(u64, u64)>);

/// A read or a question, with its answer.
#[derive(Debug, Clone)]
pub struct Told {
    pub number: usize,
    pub partition: u32,
    pub linearizable: bool,
    /// Of a fetch.
    pub fetch: Option<Read>,
    pub end: u64,
    pub epoch: u64,
    pub invoked: u64,
    pub completed: u64,
}

impl Mutant {
    pub fn pick<T>(&mut self, from: Vec<T>) -> Option<T> {
        let mut from = from;
        if from.is_empty() {
            return None;
        }
        let which = self.rng.random_range(0..from.len());
        Some(from.swap_remove(which))
    }

    pub fn last_at(&self, partition: u32) -> usize {
        let logs = self.history.logs.iter().enumerate();
        let of = logs.filter(|(_, log)| log.partition == partition);
        of.max_by_key(|(at, log)| (log.began_ns, *at)).unwrap().0
    }

    pub fn log(&mut self, partition: u32) -> &mut FinalLog {
        let at = self.last_at(partition);
        &mut self.history.logs[at]
    }

    /// The last reading of the partition alone is left.
    pub fn only_last(&mut self, partition: u32) {
        let log = self.log(partition).clone();
        self.history.logs.retain(|one| one.partition != partition);
        self.history.logs.push(log);
    }

    pub fn found(&self, partition: u32, value: u64) -> Option<u64> {
        let log = &self.history.logs[self.last_at(partition)];
        let found = log.records.iter().find(|(_, one)| *one == value);
        found.map(|(offset, _)| *offset)
    }

    pub fn appends(&self, wanted: impl Fn(&Append) -> bool) -> Vec<Append> {
        let appends = self.history.operations.iter().enumerate();
        let appends = appends.filter_map(|(number, operation)| {
            let Call::Append {
                values,
                producer,
                acks,
            } = &operation.call
            else {
                return None;
            };
            let ack = match operation.outcome {
                Outcome::Appended { base, epoch, .. } if *acks != AckLevel::None => {
                    Some((base, epoch))
                }
                _ => None,
            };
            Some(Append {
                number,
                partition: operation.partition,
                session: operation.session,
                values: values.clone(),
                producer: *producer,
                acks: *acks,
                ack,
                failed: matches!(operation.outcome, Outcome::Failed { .. }),
                found: self.found(operation.partition, values[0]),
                invoked: operation.invoked_ns,
                completed: operation.completed_ns,
            })
        });
        appends.filter(|one| wanted(one)).collect()
    }

    /// An acknowledged append that is found.
    pub fn acked(&mut self) -> Option<Append> {
        let all = self.appends(|one| one.ack.is_some() && one.found.is_some());
        self.pick(all)
    }

    /// A value of unknown outcome that is not found: it can be put anywhere without having been refused.
    pub fn loose(&mut self, partition: u32) -> Option<Append> {
        let all = self.appends(|one| {
            one.partition == partition && one.unknown() && one.found.is_none() && one.len() == 1
        });
        self.pick(all)
    }

    /// Two appends of one partition.
    pub fn pair(&mut self, wanted: impl Fn(&Append, &Append) -> bool) -> Option<(Append, Append)> {
        let all = self.appends(|_| true);
        let mut pairs = Vec::new();
        for one in &all {
            for two in all.iter().filter(|two| two.partition == one.partition) {
                if one.number != two.number && wanted(one, two) {
                    pairs.push((one.clone(), two.clone()));
                }
            }
        }
        self.pick(pairs)
    }

    pub fn told(&self, wanted: impl Fn(&Told) -> bool) -> Vec<Told> {
        let operations = self.history.operations.iter().enumerate();
        let told = operations.filter_map(|(number, operation)| {
            let (fetch, end, epoch) = match (&operation.call, &operation.outcome) {
                (
                    Call::Fetch { from },
                    Outcome::Fetched {
                        log_start,
                        high_watermark,
                        epoch,
                        records,
                    },
                ) => (
                    Some((*from, *log_start, records.clone())),
                    *high_watermark,
                    *epoch,
                ),
                (_, Outcome::End { end, epoch }) => (None, *end, *epoch),
                _ => return None,
            };
            Some(Told {
                number,
                partition: operation.partition,
                linearizable: operation.call == Call::LinearizableEnd,
                fetch,
                end,
                epoch: epoch.unwrap(),
                invoked: operation.invoked_ns,
                completed: operation.completed_ns.unwrap(),
            })
        });
        told.filter(|one| wanted(one)).collect()
    }

    /// A read with at least so many records.
    pub fn fetched(&mut self, records: usize) -> Option<Told> {
        let all = self.told(|one| {
            one.fetch
                .as_ref()
                .is_some_and(|(_, _, read)| read.len() >= records)
        });
        self.pick(all)
    }

    pub fn operation(&mut self, number: usize) -> &mut Operation {
        &mut self.history.operations[number]
    }

    pub fn set_ack(&mut self, number: usize, base: u64) {
        if let Outcome::Appended { base: told, .. } = &mut self.operation(number).outcome {
            *told = base;
        }
    }

    pub fn set_end(&mut self, number: usize, to: u64) {
        match &mut self.operation(number).outcome {
            Outcome::End { end, .. } => *end = to,
            Outcome::Fetched { high_watermark, .. } => *high_watermark = to,
            _ => {}
        }
    }

    pub fn records(&mut self, number: usize) -> &mut Vec<(u64, u64)> {
        match &mut self.operation(number).outcome {
            Outcome::Fetched { records, .. } => records,
            other => panic!("not a read: {other:?}"),
        }
    }

    pub fn at_time(&mut self, number: usize, invoked: u64, completed: Option<u64>) {
        let operation = self.operation(number);
        operation.invoked_ns = invoked;
        operation.completed_ns = completed;
    }

    /// After everything else, and before the log was read at the end, which moves on.
    pub fn late(&mut self) -> u64 {
        let operations = self.history.operations.iter();
        let times = operations.map(|one| one.completed_ns.unwrap_or(0).max(one.invoked_ns));
        let last = times.max().unwrap_or(0);
        for log in &mut self.history.logs {
            if log.began_ns >= last {
                log.began_ns += 10;
            }
        }
        last + 2
    }

    /// A question that was asked and answered then.
    pub fn ask(&mut self, partition: u32, call: Call, at: u64, outcome: Outcome) {
        self.history.operations.push(Operation {
            session: 99,
            invoked_ns: at,
            completed_ns: Some(at),
            partition,
            call,
            outcome,
        });
    }

    /// Puts `value` into the log at `offset`; what follows moves up.
    pub fn insert(&mut self, partition: u32, offset: u64, value: u64) {
        let log = self.log(partition);
        let place = (offset - log.log_start) as usize;
        log.records.insert(place, (offset, value));
        self.renumber(partition);
    }

    /// Takes the record at `offset` out of the log; what follows moves down.
    pub fn take_out(&mut self, partition: u32, offset: u64) {
        let log = self.log(partition);
        log.records.retain(|(at, _)| *at != offset);
        self.renumber(partition);
    }

    fn renumber(&mut self, partition: u32) {
        let log = self.log(partition);
        let start = log.log_start;
        for (offset, record) in (start..).zip(&mut log.records) {
            record.0 = offset;
        }
        log.end = start + log.records.len() as u64;
    }

    /// Puts `value` in the place of what the log holds at `offset`.
    pub fn overwrite(&mut self, partition: u32, offset: u64, value: u64) {
        let records = &mut self.log(partition).records;
        let record = records.iter_mut().find(|(at, _)| *at == offset);
        record.unwrap().1 = value;
    }

    /// Exchanges two batches of one length in the log.
    pub fn swap(&mut self, one: &Append, two: &Append) {
        let (first, second) = (one.found.unwrap(), two.found.unwrap());
        for place in 0..one.len() {
            let (a, b) = (one.values[place as usize], two.values[place as usize]);
            self.overwrite(one.partition, first + place, b);
            self.overwrite(one.partition, second + place, a);
        }
    }

    /// Cuts the log off behind `end`.
    pub fn cut(&mut self, partition: u32, end: u64) {
        let log = self.log(partition);
        log.records.retain(|(offset, _)| *offset < end);
        log.end = end.max(log.log_start);
    }
}

/// A kind, what is done, and what does it: `None` when there is no occasion.
pub type Mutator = (AnomalyKind, &'static str, fn(&mut Mutant) -> Option<()>);

pub fn failed() -> Outcome {
    Outcome::Failed {
        reason: "refused".to_owned(),
    }
}

pub fn end(end: u64, epoch: u64) -> Outcome {
    Outcome::End {
        end,
        epoch: Some(epoch),
    }
}

pub fn fetched(log_start: u64, high_watermark: u64, epoch: u64, records: &[(u64, u64)]) -> Outcome {
    Outcome::Fetched {
        log_start,
        high_watermark,
        epoch: Some(epoch),
        records: records.to_vec(),
    }
}

/// One record of a read, and the read's number and partition.
pub fn one_read(m: &mut Mutant) -> Option<(usize, u32, usize)> {
    let read = m.fetched(1)?;
    let place = m.rng.random_range(0..read.fetch?.2.len());
    Some((read.number, read.partition, place))
}

/// A place in the log that holds something.
pub fn one_slot(m: &mut Mutant) -> Option<(u32, u64)> {
    let logs = 0..m.history.logs.len();
    let which = m.pick(logs.collect())?;
    let partition = m.history.logs[which].partition;
    let records = m.log(partition).records.clone();
    let (offset, _) = m.pick(records)?;
    Some((partition, offset))
}

pub fn one_dump(m: &mut Mutant, records: usize) -> Option<usize> {
    let dumps = m.history.dumps.iter().enumerate();
    let found = dumps.filter(|(_, dump)| dump.records.len() >= records);
    let found = found.map(|(at, _)| at).collect();
    m.pick(found)
}

/// A value that was sent to another partition.
pub fn foreign(m: &mut Mutant, partition: u32) -> Option<u64> {
    let all = m.appends(|one| one.partition != partition && !one.failed);
    Some(m.pick(all)?.values[0])
}

pub fn told_before_the_end(m: &mut Mutant, partition: u32) -> Option<Told> {
    let began = m.log(partition).began_ns;
    let all = m.told(|one| one.partition == partition && one.completed < began);
    m.pick(all)
}

/// A plain append that its leader acknowledged with acks=all.
pub fn plain(m: &mut Mutant) -> Option<(Append, u64, u64)> {
    let all =
        m.appends(|one| one.ack.is_some() && one.producer.is_none() && one.acks == AckLevel::All);
    let append = m.pick(all)?;
    let (base, epoch) = append.ack?;
    Some((append, base, epoch))
}
