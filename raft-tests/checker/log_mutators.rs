//! Damage to what is in the log, and to what was said of single offsets.
//!
//! One damage each: a right history goes in, and comes out with one thing that must not be.

use logboom::testkit::checker::AnomalyKind as Kind;
use logboom::testkit::history::{AckLevel, Call, Outcome, STRANGE_VALUE};
use rand::Rng;

use super::mutant::{Mutator, UNSENT, fetched, foreign, one_dump, one_read, one_slot};

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
];
