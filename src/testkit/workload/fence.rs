//! The session that takes its own place: each batch has a higher producer epoch than the one before, and fences it, while a late
//! batch of the epoch before is on its way.
//!
//! Owns the epochs. The late batch is allowed in front of its successor and nowhere behind it.

use std::collections::BTreeMap;

use super::Session;
use super::value::encode_value;
use crate::api::{Request, Response};
use crate::record::{self, ProducerStamp, Record};
use crate::testkit::history::{AckLevel, Call, Outcome, ProducerPosition};
use crate::types::{Acks, Error};

/// Tells the producers of these sessions from those of the others, which are known by their session.
const PRODUCER_IDS: u64 = 1 << 32;

struct Fencer {
    session: Session,
    /// The producer id that the cluster gave out.
    id: i64,
}

/// Batches under rising epochs, with late ones of the epoch before. The late ones are recorded as the session behind this one, since
/// nothing is promised of their order among the others.
pub(super) async fn fence(session: Session) {
    let Some(id) = draw(&session).await else {
        return;
    };
    let mut fencer = Fencer { session, id };
    let mut epochs: BTreeMap<u32, i16> = BTreeMap::new();
    for _ in 0..fencer.session.config.records_max {
        if fencer.session.is_over() {
            return;
        }
        let partition = fencer.session.partition();
        let epoch = epochs.entry(partition).or_insert(-1);
        let Some(next) = epoch.checked_add(1) else {
            return;
        };
        let late = std::mem::replace(epoch, next);
        if late < 0 {
            fencer.send(partition, next, 0).await;
        } else if fencer.session.chance(2) {
            // What was asked first is not always there first.
            futures_util::join!(
                fencer.send(partition, late, 1),
                fencer.send(partition, next, 0)
            );
        } else {
            fencer.send(partition, next, 0).await;
            fencer.send(partition, late, 1).await;
        }
        fencer.session.pause().await;
    }
}

/// A producer id, asked for until there is one.
async fn draw(session: &Session) -> Option<i64> {
    while !session.is_over() {
        if let Ok(Response::Producer { id, .. }) =
            session.client.request(Request::InitProducer).await
        {
            return Some(id);
        }
        tokio::select! {
            biased;
            () = session.tasks.stopped() => {}
            () = tokio::time::sleep(session.config.pause) => {}
        }
    }
    None
}

impl Fencer {
    /// A batch of one record, the first (0) of its epoch or the one behind (1), which is the late one.
    async fn send(&self, partition: u32, epoch: i16, base_sequence: i32) {
        let session = &self.session;
        let number = session.number.wrapping_add(u32::from(base_sequence > 0));
        let value = session.recorder.value();
        let call = Call::Append {
            values: vec![value],
            producer: Some(ProducerPosition {
                id: PRODUCER_IDS | u64::from(session.number),
                epoch: epoch.unsigned_abs(),
            }),
            acks: AckLevel::All,
        };
        let record = Record {
            value: Some(encode_value(value, partition, session.config.record_bytes)),
            ..Record::default()
        };
        let stamp = ProducerStamp {
            id: self.id,
            epoch,
            base_sequence,
        };
        let (Ok(topic), Ok(records)) = (
            session.client.topic(&session.config.topic),
            record::encode_batch(&[record], Some(stamp)),
        ) else {
            return;
        };
        let Some(id) = session.recorder.operation(number, partition, call) else {
            return;
        };
        let asked = session.client.request(Request::Produce {
            partition: topic.partition(partition).id().clone(),
            acks: Acks::All,
            records,
        });
        let Some(answer) = session.answer(id, asked).await else {
            return;
        };
        let appended = match &answer {
            Response::Produced(appended) => appended.first(),
            _ => None,
        };
        match appended {
            Some(appended) => session.recorder.completed(
                id,
                Outcome::Appended {
                    base: appended.base_offset.0,
                    epoch: appended.leader_epoch.0,
                    copies: u32::try_from(appended.durable_on.len()).unwrap_or(u32::MAX),
                },
            ),
            None => session.recorder.failed(
                id,
                &Error::Failed {
                    reason: format!("another question was answered: {answer:?}"),
                },
            ),
        }
    }
}
