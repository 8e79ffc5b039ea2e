//! Damage to order, time, answers, replicas and leaders.
//!
//! One damage each: a right history goes in, and comes out with one thing that must not be.

use logboom::testkit::checker::AnomalyKind as Kind;
use logboom::testkit::history::{AckLevel, Call, FinalLog, LeaderSeen, Outcome, ReplicaDump};
use rand::Rng;

use super::mutant::{
    Mutator, end, failed, fetched, one_dump, one_read, one_slot, plain, told_before_the_end,
};

#[rustfmt::skip]
pub const MUTATORS: &[Mutator] = &[
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
