//! One damage each: a right history goes in, and comes out with one thing that must not be. `None` when there is no occasion.

use logboom::testkit::checker::AnomalyKind as Kind;
use logboom::testkit::history::{
    AckLevel, Call, FinalLog, LeaderSeen, Outcome, ReplicaDump, STRANGE_VALUE,
};
use rand::Rng;

use super::mutant::{Mutant, UNSENT};

pub type Mutator = (Kind, &'static str, fn(&mut Mutant) -> Option<()>);

fn failed() -> Outcome {
    Outcome::Failed {
        reason: "refused".to_owned(),
    }
}

fn end(end: u64, epoch: u64) -> Outcome {
    Outcome::End {
        end,
        epoch: Some(epoch),
    }
}

fn fetched(log_start: u64, high_watermark: u64, epoch: u64, records: &[(u64, u64)]) -> Outcome {
    Outcome::Fetched {
        log_start,
        high_watermark,
        epoch: Some(epoch),
        records: records.to_vec(),
    }
}

/// One record of a read, and the read's number and partition.
fn one_read(m: &mut Mutant) -> Option<(usize, u32, usize)> {
    let read = m.fetched(1)?;
    let place = m.rng.random_range(0..read.fetch?.2.len());
    Some((read.number, read.partition, place))
}

/// A place in the log that holds something.
fn one_slot(m: &mut Mutant) -> Option<(u32, u64)> {
    let logs = 0..m.history.logs.len();
    let which = m.pick(logs.collect())?;
    let partition = m.history.logs[which].partition;
    let records = m.log(partition).records.clone();
    let (offset, _) = m.pick(records)?;
    Some((partition, offset))
}

fn one_dump(m: &mut Mutant, records: usize) -> Option<usize> {
    let dumps = m.history.dumps.iter().enumerate();
    let found = dumps.filter(|(_, dump)| dump.records.len() >= records);
    let found = found.map(|(at, _)| at).collect();
    m.pick(found)
}

/// A value that was sent to another partition.
fn foreign(m: &mut Mutant, partition: u32) -> Option<u64> {
    let all = m.appends(|one| one.partition != partition && !one.failed);
    Some(m.pick(all)?.values[0])
}

fn told_before_the_end(m: &mut Mutant, partition: u32) -> Option<super::mutant::Told> {
    let began = m.log(partition).began_ns;
    let all = m.told(|one| one.partition == partition && one.completed < began);
    m.pick(all)
}

/// A plain append that its leader acknowledged with acks=all.
fn plain(m: &mut Mutant) -> Option<(super::mutant::Append, u64, u64)> {
    let all =
        m.appends(|one| one.ack.is_some() && one.producer.is_none() && one.acks == AckLevel::All);
    let append = m.pick(all)?;
    let (base, epoch) = append.ack?;
    Some((append, base, epoch))
}

#[rustfmt::skip]
pub const MUTATORS: &[Mutator] = &[
    (Kind::Lost, "the log ends before an acknowledged value", |m| {
        let append = m.acked()?;
        m.only_last(append.partition);
        m.cut(append.partition, append.found?);
        Some(())
    }),
    (Kind::Lost, "an acknowledged batch is left out, the rest moves down", |m| {
        let append = m.acked()?;
        for _ in 0..append.len() { m.take_out(append.partition, append.found?); }
        Some(())
    }),
    (Kind::Lost, "another value stands where an acknowledged one stood", |m| {
        let append = m.acked()?;
        let other = m.loose(append.partition)?;
        m.overwrite(append.partition, append.found?, other.values[0]);
        Some(())
    }),
    (Kind::Lost, "an unknown append that is not there was acknowledged", |m| {
        let (_, offset) = one_slot(m)?;
        let all = m.appends(|one| one.unknown() && one.found.is_none() && one.completed.is_some() && one.acks != AckLevel::None);
        let append = m.pick(all)?;
        let base = offset.clamp(m.log(append.partition).log_start, m.log(append.partition).end);
        m.operation(append.number).outcome = Outcome::Appended { base, epoch: 1, copies: 1 };
        Some(())
    }),

    (Kind::Duplicate, "a value again at the end", |m| {
        let (partition, offset) = one_slot(m)?;
        let log = m.log(partition);
        let value = log.records[(offset - log.log_start) as usize].1;
        let to = log.end;
        m.insert(partition, to, value);
        Some(())
    }),
    (Kind::Duplicate, "a value again in the place of another", |m| {
        let (one, two) = m.pair(|one, two| one.found.is_some() && two.found.is_some())?;
        m.overwrite(one.partition, one.found?, two.values[0]);
        Some(())
    }),
    (Kind::Duplicate, "a value twice in a row", |m| {
        let append = m.acked()?;
        m.insert(append.partition, append.found?, append.values[0]);
        Some(())
    }),
    (Kind::Duplicate, "a retried batch appended again", |m| {
        let all = m.appends(|one| one.found.is_some() && one.producer.is_some());
        let append = m.pick(all)?;
        for value in append.values { let to = m.log(append.partition).end; m.insert(append.partition, to, value); }
        Some(())
    }),

    (Kind::Reordered, "two batches of a producer changed places, as told", |m| {
        let (one, two) = m.pair(|one, two| one.session == two.session && one.producer.is_some() && one.number < two.number
            && one.len() == two.len() && one.ack.is_some() && two.ack.is_some() && one.found.is_some() && two.found.is_some())?;
        m.swap(&one, &two);
        m.set_ack(one.number, two.found?);
        m.set_ack(two.number, one.found?);
        Some(())
    }),
    (Kind::Reordered, "two batches of a producer changed places in the log", |m| {
        let (one, two) = m.pair(|one, two| one.session == two.session && one.producer.is_some() && one.number < two.number
            && one.len() == two.len() && one.ack.is_some() && one.found.is_some() && two.found.is_some())?;
        m.swap(&one, &two);
        Some(())
    }),
    (Kind::Reordered, "an unknown batch in front of an acknowledged one sent earlier", |m| {
        let (one, two) = m.pair(|one, two| one.session == two.session && one.producer.is_some() && one.number < two.number
            && one.ack.is_some() && one.found.is_some() && two.found.is_some() && two.unknown())?;
        for value in two.values.iter().rev() {
            let at = m.found(two.partition, *value)?;
            m.take_out(two.partition, at);
            m.insert(two.partition, one.found?, *value);
        }
        Some(())
    }),
    (Kind::Reordered, "an earlier place was acknowledged for a trimmed or found batch", |m| {
        let (one, two) = m.pair(|one, two| one.session == two.session && one.producer.is_some() && one.number < two.number
            && one.ack.is_some() && two.ack.is_some() && one.found.is_some() && two.found.is_some())?;
        m.operation(one.number).invoked_ns = m.operation(two.number).invoked_ns;
        m.operation(two.number).invoked_ns = one.invoked;
        let (invoked, other) = (m.operation(one.number).invoked_ns, m.operation(two.number).invoked_ns);
        if invoked == other { return None; }
        let one = m.operation(one.number);
        one.completed_ns = one.completed_ns.map(|at| at.max(invoked));
        Some(())
    }),

    (Kind::Gap, "a record is left out", |m| {
        let (partition, offset) = one_slot(m)?;
        m.log(partition).records.retain(|(at, _)| *at != offset);
        Some(())
    }),
    (Kind::Gap, "a record is there twice", |m| {
        let (partition, offset) = one_slot(m)?;
        let log = m.log(partition);
        let place = (offset - log.log_start) as usize;
        log.records.insert(place, log.records[place]);
        Some(())
    }),
    (Kind::Gap, "the end is behind the last record", |m| {
        let (partition, _) = one_slot(m)?;
        m.log(partition).end += 1;
        Some(())
    }),
    (Kind::Gap, "records behind the end", |m| {
        let (partition, _) = one_slot(m)?;
        m.log(partition).end -= 1;
        Some(())
    }),
    (Kind::Gap, "two records in the wrong order", |m| {
        let (partition, _) = one_slot(m)?;
        let records = &mut m.log(partition).records;
        (records.len() > 1).then(|| records.swap(0, 1))
    }),
    (Kind::Gap, "an earlier reading lacks a record", |m| {
        let which = m.rng.random_range(0..m.history.logs.len());
        let records = &mut m.history.logs[which].records;
        (!records.is_empty()).then(|| { records.remove(0); })
    }),

    (Kind::Phantom, "a value nobody sent was read", |m| {
        let (read, _, place) = one_read(m)?;
        m.records(read)[place].1 = UNSENT;
        Some(())
    }),
    (Kind::Phantom, "a value nobody sent is in the log", |m| {
        let (partition, offset) = one_slot(m)?;
        m.overwrite(partition, offset, UNSENT);
        Some(())
    }),
    (Kind::Phantom, "a value nobody sent is at the log's end", |m| {
        let (partition, _) = one_slot(m)?;
        let to = m.log(partition).end;
        m.insert(partition, to, UNSENT);
        Some(())
    }),
    (Kind::Phantom, "a replica holds a value nobody sent", |m| {
        let dump = one_dump(m, 1)?;
        m.history.dumps[dump].records[0].1 = UNSENT;
        Some(())
    }),

    (Kind::Strange, "a damaged value was read", |m| {
        let (read, _, place) = one_read(m)?;
        m.records(read)[place].1 = STRANGE_VALUE;
        Some(())
    }),
    (Kind::Strange, "a damaged value is in the log", |m| {
        let (partition, offset) = one_slot(m)?;
        m.overwrite(partition, offset, STRANGE_VALUE);
        Some(())
    }),
    (Kind::Strange, "a replica holds a damaged value", |m| {
        let dump = one_dump(m, 1)?;
        m.history.dumps[dump].records[0].1 = STRANGE_VALUE;
        Some(())
    }),

    (Kind::Misplaced, "a value of another partition was read", |m| {
        let (read, partition, place) = one_read(m)?;
        m.records(read)[place].1 = foreign(m, partition)?;
        Some(())
    }),
    (Kind::Misplaced, "a value of another partition is in the log", |m| {
        let (partition, offset) = one_slot(m)?;
        let value = foreign(m, partition)?;
        m.overwrite(partition, offset, value);
        Some(())
    }),
    (Kind::Misplaced, "an append went to another partition", |m| {
        let append = m.acked()?;
        let partitions = m.history.logs.iter().map(|log| log.partition).max()? + 1;
        if partitions < 2 { return None; }
        m.operation(append.number).partition = (append.partition + 1) % partitions;
        Some(())
    }),

    (Kind::OffsetCollision, "another value was read at an offset", |m| {
        let (read, partition, place) = one_read(m)?;
        let other = m.pair(|_, two| two.partition == partition && two.found.is_some())?.1;
        let start = m.log(partition).log_start;
        let record = &mut m.records(read)[place];
        if record.1 == other.values[0] || record.0 < start { return None; }
        record.1 = other.values[0];
        Some(())
    }),
    (Kind::OffsetCollision, "two appends were given one offset", |m| {
        let (one, two) = m.pair(|one, two| one.ack.is_some() && two.ack.is_some())?;
        m.set_ack(one.number, two.ack?.0);
        Some(())
    }),
    (Kind::OffsetCollision, "the log holds something else than was acknowledged", |m| {
        let append = m.acked()?;
        let other = m.loose(append.partition)?;
        m.overwrite(append.partition, append.found?, other.values[0]);
        Some(())
    }),
    (Kind::OffsetCollision, "an earlier reading had something else", |m| {
        let (partition, offset) = one_slot(m)?;
        let mut earlier = m.log(partition).clone();
        let other = m.loose(partition)?;
        earlier.began_ns = 0;
        let at = (offset - earlier.log_start) as usize;
        earlier.records[at].1 = other.values[0];
        m.history.logs.insert(0, earlier);
        Some(())
    }),
    (Kind::OffsetCollision, "two reads differ below the log's start", |m| {
        let all = m.told(|one| one.fetch.as_ref().is_some_and(|(_, _, records)| !records.is_empty()));
        let read = m.pick(all)?;
        let (from, start, records) = read.fetch?;
        let (offset, _) = records[0];
        if offset >= m.log(read.partition).log_start { return None; }
        let mut other = records.clone();
        let values = m.appends(|one| one.partition == read.partition && one.found.is_none() && !one.failed && one.values[0] != records[0].1);
        other[0].1 = m.pick(values)?.values[0];
        m.ask(read.partition, Call::Fetch { from }, read.completed, fetched(start, read.end, read.epoch, &other));
        Some(())
    }),

    (Kind::Moved, "an acknowledgement gives the next offset", |m| {
        let append = m.acked()?;
        m.set_ack(append.number, append.found? + 1);
        Some(())
    }),
    (Kind::Moved, "two values of a read changed places", |m| {
        let read = m.fetched(2)?;
        let start = m.log(read.partition).log_start;
        let records = m.records(read.number);
        let (one, two) = (records[0].1, records[1].1);
        if records[0].0 < start { return None; }
        (records[0].1, records[1].1) = (two, one);
        Some(())
    }),
    (Kind::Moved, "a value was put in front of an acknowledged one", |m| {
        let append = m.acked()?;
        let other = m.loose(append.partition)?;
        m.insert(append.partition, append.found?, other.values[0]);
        Some(())
    }),

    (Kind::DirtyRead, "an unknown value that is not there was read", |m| {
        let (read, partition, place) = one_read(m)?;
        let other = m.loose(partition)?;
        let start = m.log(partition).log_start;
        let record = &mut m.records(read)[place];
        if record.0 < start { return None; }
        record.1 = other.values[0];
        Some(())
    }),
    (Kind::DirtyRead, "the log ends before a value that was read", |m| {
        let (read, partition, place) = one_read(m)?;
        let offset = m.records(read)[place].0;
        if offset < m.log(partition).log_start { return None; }
        m.only_last(partition);
        m.cut(partition, offset);
        Some(())
    }),
    (Kind::DirtyRead, "an earlier reading had a value more", |m| {
        let (partition, _) = one_slot(m)?;
        let other = m.loose(partition)?;
        let mut earlier = m.log(partition).clone();
        earlier.began_ns -= 1;
        earlier.records.push((earlier.end, other.values[0]));
        earlier.end += 1;
        m.history.logs.insert(0, earlier);
        Some(())
    }),
    (Kind::DirtyRead, "a value that was read is left out", |m| {
        let (read, partition, place) = one_read(m)?;
        let offset = m.records(read)[place].0;
        let log = m.log(partition);
        if offset < log.log_start { return None; }
        m.take_out(partition, offset);
        Some(())
    }),

    (Kind::BeyondWatermark, "the watermark is at the last record", |m| {
        let read = m.fetched(1)?;
        m.set_end(read.number, read.fetch?.2.last()?.0);
        Some(())
    }),
    (Kind::BeyondWatermark, "the watermark is at the first record", |m| {
        let read = m.fetched(1)?;
        m.set_end(read.number, read.fetch?.2[0].0);
        Some(())
    }),
    (Kind::BeyondWatermark, "one record more than the watermark allows", |m| {
        let all = m.told(|one| one.fetch.is_some());
        let read = m.pick(all)?;
        let log = m.log(read.partition);
        let record = *log.records.get(read.end.checked_sub(log.log_start)? as usize)?;
        m.records(read.number).push(record);
        Some(())
    }),

    (Kind::Aborted, "an acknowledged append had failed", |m| {
        let append = m.acked()?;
        m.operation(append.number).outcome = failed();
        Some(())
    }),
    (Kind::Aborted, "an unknown append that is there had failed", |m| {
        let all = m.appends(|one| one.unknown() && one.found.is_some() && one.completed.is_some());
        let append = m.pick(all)?;
        m.operation(append.number).outcome = failed();
        Some(())
    }),
    (Kind::Aborted, "a failed append is in the log after all", |m| {
        let all = m.appends(|one| one.failed);
        let append = m.pick(all)?;
        let to = m.log(append.partition).end;
        m.insert(append.partition, to, append.values[0]);
        Some(())
    }),
    (Kind::Aborted, "a failed append was read", |m| {
        let (read, partition, place) = one_read(m)?;
        let all = m.appends(|one| one.failed && one.partition == partition);
        m.records(read)[place].1 = m.pick(all)?.values[0];
        Some(())
    }),

    (Kind::RealTimeInversion, "an append was asked for after everything", |m| {
        let append = m.acked()?;
        let (base, _) = append.ack?;
        if m.told(|one| one.partition == append.partition && one.end > base).is_empty() { return None; }
        let late = m.late();
        m.at_time(append.number, late, Some(late));
        Some(())
    }),
    (Kind::RealTimeInversion, "a later append was answered before an earlier one was asked for", |m| {
        let (one, two) = m.pair(|one, two| one.ack.is_some() && two.ack.is_some() && one.ack < two.ack && one.invoked > 0)?;
        m.at_time(two.number, one.invoked - 1, Some(one.invoked - 1));
        Some(())
    }),
    (Kind::RealTimeInversion, "an end behind an append was given before it was asked for", |m| {
        let append = m.acked()?;
        let (base, _) = append.ack?;
        let all = m.told(|one| one.partition == append.partition && one.end > base);
        let told = m.pick(all)?;
        let at = append.invoked.checked_sub(1)?;
        m.at_time(told.number, at, Some(at));
        Some(())
    }),
    (Kind::RealTimeInversion, "two appends changed places, one having been answered first", |m| {
        let (one, two) = m.pair(|one, two| one.ack.is_some() && two.ack.is_some() && one.found.is_some() && two.found.is_some()
            && one.len() == two.len() && one.completed.is_some_and(|at| at < two.invoked))?;
        m.swap(&one, &two);
        m.set_ack(one.number, two.found?);
        m.set_ack(two.number, one.found?);
        Some(())
    }),

    (Kind::StaleEnd, "a linearizable end below what was acknowledged", |m| {
        let append = m.acked()?;
        let (base, _) = append.ack?;
        let all = m.told(|one| one.linearizable && one.partition == append.partition && Some(one.invoked) > append.completed);
        let told = m.pick(all)?;
        m.set_end(told.number, base);
        Some(())
    }),
    (Kind::StaleEnd, "a linearizable end was asked for late", |m| {
        let all = m.told(|one| one.linearizable);
        let told = m.pick(all)?;
        if m.told(|one| one.partition == told.partition && one.end > told.end).is_empty() { return None; }
        let late = m.late();
        m.at_time(told.number, late, Some(late));
        Some(())
    }),
    (Kind::StaleEnd, "the log was not read to the known end", |m| {
        let append = m.acked()?;
        m.only_last(append.partition);
        m.cut(append.partition, append.found?);
        Some(())
    }),
    (Kind::StaleEnd, "an end was given by a leader of old", |m| {
        let append = m.acked()?;
        let (base, _) = append.ack?;
        let late = m.late();
        m.ask(append.partition, Call::LinearizableEnd, late, end(base, 0));
        Some(())
    }),

    (Kind::FetchSkip, "a record was left out of a read", |m| {
        let read = m.fetched(3)?;
        m.records(read.number).remove(1);
        Some(())
    }),
    (Kind::FetchSkip, "the first record was left out of a read", |m| {
        let read = m.fetched(2)?;
        m.records(read.number).remove(0);
        Some(())
    }),
    (Kind::FetchSkip, "a read was asked from further below", |m| {
        let all = m.told(|one| one.fetch.as_ref().is_some_and(|(from, start, records)| from > start && !records.is_empty()));
        let read = m.pick(all)?;
        let (from, start, _) = read.fetch?;
        let from = m.rng.random_range(start..from);
        m.operation(read.number).call = Call::Fetch { from };
        Some(())
    }),

    (Kind::FetchBack, "a record was read twice", |m| {
        let read = m.fetched(1)?;
        let records = m.records(read.number);
        records.push(*records.last()?);
        Some(())
    }),
    (Kind::FetchBack, "two records were read in the wrong order", |m| {
        let read = m.fetched(2)?;
        m.records(read.number).swap(0, 1);
        Some(())
    }),
    (Kind::FetchBack, "a read was asked from further above", |m| {
        let read = m.fetched(1)?;
        let from = read.fetch?.2[0].0 + 1;
        m.operation(read.number).call = Call::Fetch { from };
        Some(())
    }),

    (Kind::Withheld, "a read returned nothing", |m| {
        let read = m.fetched(1)?;
        m.records(read.number).clear();
        Some(())
    }),
    (Kind::Withheld, "the watermark of a read that returned nothing is higher", |m| {
        let all = m.told(|one| one.fetch.as_ref().is_some_and(|(from, start, records)| from >= start && records.is_empty()));
        let read = m.pick(all)?;
        m.set_end(read.number, read.fetch?.0 + 1);
        Some(())
    }),
    (Kind::Withheld, "a leader returns nothing of what it says is there", |m| {
        let all = m.told(|one| one.end > 0);
        let told = m.pick(all)?;
        let late = m.late();
        m.ask(told.partition, Call::Fetch { from: told.end - 1 }, late, fetched(0, told.end, told.epoch, &[]));
        Some(())
    }),

    (Kind::LateUnknown, "an unknown append was asked for late", |m| {
        let all = m.appends(|one| one.unknown() && one.found.is_some());
        let append = m.pick(all)?;
        let found = append.found?;
        if m.told(|one| one.partition == append.partition && one.end > found).is_empty() { return None; }
        let late = m.late();
        m.at_time(append.number, late, None);
        Some(())
    }),
    (Kind::LateUnknown, "an end behind an unknown append was given before it was asked for", |m| {
        let all = m.appends(|one| one.unknown() && one.found.is_some() && one.invoked > 0);
        let append = m.pick(all)?;
        m.ask(append.partition, Call::LinearizableEnd, append.invoked - 1, end(append.found? + 1, 0));
        Some(())
    }),
    (Kind::LateUnknown, "an earlier reading had something else in the place of an unknown value", |m| {
        let all = m.appends(|one| one.unknown() && one.found.is_some());
        let append = m.pick(all)?;
        let other = m.loose(append.partition)?;
        let mut earlier = m.log(append.partition).clone();
        earlier.began_ns = 0;
        earlier.records.iter_mut().find(|(at, _)| Some(*at) == append.found)?.1 = other.values[0];
        m.history.logs.insert(0, earlier);
        Some(())
    }),
    (Kind::LateUnknown, "an unknown value came into the middle of a log that was read before", |m| {
        let (partition, offset) = one_slot(m)?;
        let other = m.loose(partition)?;
        let mut earlier = m.log(partition).clone();
        earlier.began_ns -= 1;
        m.insert(partition, offset, other.values[0]);
        m.history.logs.insert(0, earlier);
        Some(())
    }),

    (Kind::SessionViolation, "the leader that acknowledged does not show the end", |m| {
        let (append, base, epoch) = plain(m)?;
        m.ask(append.partition, Call::End, append.completed? + 1, end(base, epoch));
        Some(())
    }),
    (Kind::SessionViolation, "the leader that acknowledged does not show the record", |m| {
        let (append, base, epoch) = plain(m)?;
        m.ask(append.partition, Call::Fetch { from: base }, append.completed? + 1, fetched(0, base, epoch, &[]));
        Some(())
    }),
    (Kind::SessionViolation, "a read of the same leader was asked for later", |m| {
        let (append, base, epoch) = plain(m)?;
        let all = m.told(|one| one.partition == append.partition && one.epoch == epoch && one.end <= base);
        let told = m.pick(all)?;
        let late = m.late();
        m.at_time(told.number, late, Some(late));
        Some(())
    }),

    (Kind::TornBatch, "a record of a batch is missing", |m| {
        let all = m.appends(|one| one.found.is_some() && one.len() > 1);
        let append = m.pick(all)?;
        let at = append.found? + m.rng.random_range(0..append.len());
        m.take_out(append.partition, at);
        Some(())
    }),
    (Kind::TornBatch, "two records of a batch changed places", |m| {
        let all = m.appends(|one| one.found.is_some() && one.len() > 1);
        let append = m.pick(all)?;
        m.overwrite(append.partition, append.found?, append.values[1]);
        m.overwrite(append.partition, append.found? + 1, append.values[0]);
        Some(())
    }),
    (Kind::TornBatch, "something came between the records of a batch", |m| {
        let all = m.appends(|one| one.found.is_some() && one.len() > 1);
        let append = m.pick(all)?;
        let other = m.loose(append.partition)?;
        m.insert(append.partition, append.found? + 1, other.values[0]);
        Some(())
    }),
    (Kind::TornBatch, "the log ends in a batch", |m| {
        let all = m.appends(|one| one.found.is_some() && one.len() > 1);
        let append = m.pick(all)?;
        m.only_last(append.partition);
        m.cut(append.partition, append.found? + 1);
        Some(())
    }),
    (Kind::TornBatch, "an end inside a batch was given", |m| {
        let all = m.appends(|one| one.found.is_some() && one.len() > 1);
        let append = m.pick(all)?;
        let told = told_before_the_end(m, append.partition)?;
        m.set_end(told.number, append.found? + 1);
        Some(())
    }),

    (Kind::WatermarkRegress, "an end behind the log's was given", |m| {
        let (partition, _) = one_slot(m)?;
        let told = told_before_the_end(m, partition)?;
        let to = m.log(partition).end + 1;
        m.set_end(told.number, to);
        Some(())
    }),
    (Kind::WatermarkRegress, "a leader gave less than before", |m| {
        let all = m.told(|one| one.end > 0);
        let told = m.pick(all)?;
        m.ask(told.partition, Call::End, told.completed + 1, end(told.end - 1, told.epoch));
        Some(())
    }),
    (Kind::WatermarkRegress, "a leader's read gave less than before", |m| {
        let all = m.told(|one| one.end > 0);
        let told = m.pick(all)?;
        m.ask(told.partition, Call::Fetch { from: 0 }, told.completed + 1, fetched(0, 0, told.epoch, &[]));
        Some(())
    }),
    (Kind::WatermarkRegress, "the log had been read further", |m| {
        let (partition, offset) = one_slot(m)?;
        let mut earlier = m.log(partition).clone();
        earlier.began_ns = 0;
        m.cut(partition, offset);
        m.history.logs.insert(0, earlier);
        Some(())
    }),

    (Kind::LogStartRegress, "a log start above the log's was given", |m| {
        let (partition, _) = one_slot(m)?;
        let log = m.log(partition).clone();
        let (at, end) = (log.began_ns.checked_sub(1)?, log.end);
        m.ask(partition, Call::Fetch { from: end }, at, fetched(log.log_start + 1, end, 0, &[]));
        Some(())
    }),
    (Kind::LogStartRegress, "a leader gave less than before", |m| {
        let all = m.told(|one| one.fetch.is_some());
        let told = m.pick(all)?;
        let (from, start, records) = told.fetch?;
        m.ask(told.partition, Call::Fetch { from }, told.invoked.checked_sub(1)?, fetched(start + 1, 0, told.epoch, &records));
        Some(())
    }),
    (Kind::LogStartRegress, "the log had been read from further above", |m| {
        let (partition, _) = one_slot(m)?;
        let log = m.log(partition).clone();
        let earlier = FinalLog { began_ns: 0, log_start: log.log_start + 1, records: log.records[1..].to_vec(), ..log };
        m.history.logs.insert(0, earlier);
        Some(())
    }),

    (Kind::Zombie, "an earlier batch had a higher epoch", |m| {
        let (one, two) = m.pair(|one, two| one.session == two.session && one.producer.is_some() && one.found.is_some() && one.found < two.found)?;
        let epoch = two.producer?.epoch + 1;
        if let Call::Append { producer: Some(position), .. } = &mut m.operation(one.number).call { position.epoch = epoch; }
        Some(())
    }),
    (Kind::Zombie, "a fenced epoch is found behind its successor", |m| {
        let (one, two) = m.pair(|one, two| one.session == two.session && one.producer.is_some() && one.found.is_some() && one.found < two.found
            && one.producer.unwrap().epoch > 0)?;
        let epoch = one.producer?.epoch - 1;
        if let Call::Append { producer: Some(position), .. } = &mut m.operation(two.number).call { position.epoch = epoch; }
        Some(())
    }),
    (Kind::Zombie, "a batch of a fenced epoch was found again at the end", |m| {
        let (one, two) = m.pair(|one, two| one.session == two.session && one.producer.is_some() && two.found.is_some() && two.len() == 1
            && one.producer.unwrap().epoch < two.producer.unwrap().epoch && one.found.is_none() && one.unknown())?;
        let to = m.log(two.partition).end;
        m.insert(two.partition, to, one.values[0]);
        Some(())
    }),

    (Kind::ReplicaDivergence, "a replica holds another value", |m| {
        let dump = one_dump(m, 2)?;
        let partition = m.history.dumps[dump].partition;
        let start = m.log(partition).log_start;
        let records = &mut m.history.dumps[dump].records;
        let (other, last) = (records[0].1, records.last_mut()?);
        last.1 = other;
        (last.0 >= start).then_some(())
    }),
    (Kind::ReplicaDivergence, "a replica lacks a record", |m| {
        let dump = one_dump(m, 2)?;
        let place = m.rng.random_range(0..m.history.dumps[dump].records.len());
        m.history.dumps[dump].records.remove(place);
        Some(())
    }),
    (Kind::ReplicaDivergence, "a replica lacks its last record", |m| {
        let dump = one_dump(m, 1)?;
        m.history.dumps[dump].records.pop();
        Some(())
    }),
    (Kind::ReplicaDivergence, "two replicas differ behind the log", |m| {
        let (partition, _) = one_slot(m)?;
        let values = m.appends(|one| one.partition == partition && !one.failed);
        let (one, two) = (m.pick(values.clone())?.values[0], m.pick(values)?.values[0]);
        let offset = m.log(partition).end;
        for (broker, value) in [(7, one), (8, two)] {
            m.history.dumps.push(ReplicaDump { partition, broker, log_start: offset, high_watermark: offset + 1, records: vec![(offset, value)] });
        }
        (one != two).then_some(())
    }),

    (Kind::EpochConflict, "two brokers lead in one epoch", |m| {
        let leaders = m.history.leaders.clone();
        let seen = m.pick(leaders)?;
        m.history.leaders.push(LeaderSeen { broker: seen.broker + 1, ..seen });
        Some(())
    }),
    (Kind::EpochConflict, "two brokers lead at one time in one epoch", |m| {
        for broker in [1, 2] {
            m.history.leaders.push(LeaderSeen { at_ns: 5, partition: 0, epoch: 1_000, broker });
        }
        Some(())
    }),
    (Kind::EpochConflict, "an earlier record has a later epoch", |m| {
        let (one, two) = m.pair(|one, two| one.ack.is_some() && two.ack.is_some() && one.found.is_some() && one.found < two.found)?;
        let later = two.ack?.1 + 1;
        if let Outcome::Appended { epoch, .. } = &mut m.operation(one.number).outcome { *epoch = later; }
        Some(())
    }),
    (Kind::EpochConflict, "a later record has an earlier epoch", |m| {
        let (one, two) = m.pair(|one, two| one.ack.is_some() && two.ack.is_some() && one.found.is_some() && one.found < two.found)?;
        let earlier = one.ack?.1 - 1;
        if let Outcome::Appended { epoch, .. } = &mut m.operation(two.number).outcome { *epoch = earlier; }
        Some(())
    }),

    (Kind::AckContract, "more copies than replicas", |m| {
        let append = m.acked()?;
        if let Outcome::Appended { copies, .. } = &mut m.operation(append.number).outcome { *copies = 4; }
        Some(())
    }),
    (Kind::AckContract, "no copy at all", |m| {
        let all = m.appends(|one| one.ack.is_some() && one.acks == AckLevel::All);
        let append = m.pick(all)?;
        if let Outcome::Appended { copies, .. } = &mut m.operation(append.number).outcome { *copies = 0; }
        Some(())
    }),
    (Kind::AckContract, "replicas that do not hold it", |m| {
        let append = m.acked()?;
        let last = append.found? + append.len() - 1;
        let holds = |dump: &ReplicaDump| dump.partition == append.partition && (dump.log_start..dump.high_watermark).contains(&last);
        if !m.history.dumps.iter().any(holds) { return None; }
        for dump in m.history.dumps.iter_mut().filter(|dump| holds(dump)) {
            dump.records.retain(|(offset, _)| *offset != last);
        }
        if let Outcome::Appended { copies, .. } = &mut m.operation(append.number).outcome { *copies = 3; }
        Some(())
    }),

    (Kind::FromTheFuture, "a value was sent after it was read", |m| {
        let (read, _, place) = one_read(m)?;
        let value = m.records(read)[place].1;
        let all = m.appends(|one| one.values.contains(&value));
        let append = m.pick(all)?;
        let late = m.late();
        m.at_time(append.number, late, append.completed.map(|_| late));
        Some(())
    }),
    (Kind::FromTheFuture, "a value was read before it was sent", |m| {
        let (read, _, place) = one_read(m)?;
        let value = m.records(read)[place].1;
        let all = m.appends(|one| one.values.contains(&value) && one.invoked > 0);
        let at = m.pick(all)?.invoked - 1;
        m.at_time(read, at, Some(at));
        Some(())
    }),
    (Kind::FromTheFuture, "somebody knew a value before it was sent", |m| {
        let all = m.appends(|one| one.found.is_some() && one.invoked > 0);
        let append = m.pick(all)?;
        let (from, value) = (append.found?, append.values[0]);
        m.ask(append.partition, Call::Fetch { from }, append.invoked - 1, fetched(0, from + append.len(), 0, &[(from, value)]));
        Some(())
    }),
];
