//! The sessions that write.
//!
//! Owns what they have in flight, and the mapping from the client's acknowledgement to the history's.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use super::Session;
use super::value::encode_value;
use crate::client::{Ack, Delivery, Producer, ProducerConfig, Record};
use crate::testkit::history::{AckLevel, Call, Outcome, ProducerPosition};
use crate::testkit::recorder::OperationId;
use crate::types::{Acks, Error};

/// Records that fit a producer's batch: few, so that several batches are in flight.
const BATCH_RECORDS: usize = 8;
/// Most records of a plain append.
const PLAIN_RECORDS_MAX: u32 = 4;

/// What the acknowledgement says.
fn appended(ack: &Ack) -> Outcome {
    if ack.offset == Ack::NO_OFFSET {
        return Outcome::Unknown {
            reason: "no acknowledgement was asked for".to_owned(),
        };
    }
    Outcome::Appended {
        base: ack.offset.0,
        epoch: ack.leader_epoch.0,
        copies: u32::try_from(ack.durable_on.len()).unwrap_or(u32::MAX),
    }
}

impl Session {
    fn record(&self, value: u64, partition: u32) -> Record {
        Record {
            // No clock: the wall's would differ between two runs of one seed.
            timestamp_ms: i64::try_from(self.recorder.now_ns() / 1_000_000).unwrap_or(i64::MAX),
            value: Some(encode_value(value, partition, self.config.record_bytes)),
            ..Record::default()
        }
    }
}

/// An idempotent producer: record after record to a partition of its choice, many unacknowledged. Each record is an operation.
pub(super) fn produce(mut session: Session) -> Result<impl Future<Output = ()> + Send, Error> {
    let config = &session.config;
    let producer = Producer::new(
        &session.client,
        &config.topic,
        ProducerConfig {
            batch_bytes: config.record_bytes.saturating_mul(BATCH_RECORDS).max(256),
            delivery_timeout: config.answer_within.max(Duration::from_millis(1)),
            ..ProducerConfig::default()
        },
    )?;
    let position = ProducerPosition {
        id: u64::from(session.number),
        epoch: 0,
    };
    Ok(async move {
        let mut flying = VecDeque::new();
        for _ in 0..session.config.records_max {
            if session.is_over() {
                break;
            }
            let partition = session.partition();
            let value = session.recorder.value();
            let call = Call::Append {
                values: vec![value],
                producer: Some(position),
                acks: AckLevel::All,
            };
            let record = session.record(value, partition);
            let Some(id) = session.recorder.operation(session.number, partition, call) else {
                break;
            };
            if let Some(delivery) = session
                .answer(id, producer.send_to(partition, record))
                .await
            {
                flying.push_back((id, delivery));
            }
            let pause = session.pause_now();
            let stopped = session.tasks.stopped();
            settle(&session, &mut flying, session.config.in_flight, async {
                tokio::select! {
                    biased;
                    () = stopped => {}
                    () = tokio::time::sleep(pause) => {}
                }
            })
            .await;
        }
        // A producer gives every record up in the end, but a broker that answers nothing may take its time.
        let rest = settle(&session, &mut flying, 1, std::future::ready(()));
        tokio::time::timeout(session.config.answer_within, rest)
            .await
            .ok();
    })
}

/// Takes the answers there are; waits while `in_flight` or more are open, and for `pause`. Partitions answer in their own
/// order, and one without a leader must not keep the acknowledgements of the others from being recorded.
async fn settle(
    session: &Session,
    flying: &mut VecDeque<(OperationId, Delivery)>,
    in_flight: usize,
    pause: impl Future<Output = ()>,
) {
    let mut pause = pin!(pause);
    let mut pausing = true;
    std::future::poll_fn(|context| {
        flying.retain_mut(|(id, delivery)| match Pin::new(delivery).poll(context) {
            Poll::Ready(Ok(ack)) => {
                session.recorder.completed(*id, appended(&ack));
                false
            }
            Poll::Ready(Err(error)) => {
                session.recorder.failed(*id, &error);
                false
            }
            Poll::Pending => true,
        });
        pausing = pausing && pause.as_mut().poll(context).is_pending();
        if pausing || flying.len() >= in_flight {
            return Poll::Pending;
        }
        Poll::Ready(())
    })
    .await;
}

/// A client that appends batch after batch and waits for each; never repeats one.
pub(super) async fn append(mut session: Session) {
    let mut sent = 0;
    while sent < session.config.records_max && !session.is_over() {
        let partition = session.partition();
        let count = rand::Rng::random_range(&mut session.rng, 1..=PLAIN_RECORDS_MAX);
        let (acks, level) = if session.chance(4) {
            (Acks::Leader, AckLevel::Leader)
        } else {
            (Acks::All, AckLevel::All)
        };
        let values: Vec<u64> = (0..count).map(|_| session.recorder.value()).collect();
        let records: Vec<Record> = values
            .iter()
            .map(|value| session.record(*value, partition))
            .collect();
        sent += u64::from(count);
        let call = Call::Append {
            values,
            producer: None,
            acks: level,
        };
        let Some(id) = session.recorder.operation(session.number, partition, call) else {
            break;
        };
        let Ok(topic) = session.client.topic(&session.config.topic) else {
            break;
        };
        let asked = topic.partition(partition);
        if let Some(ack) = session.answer(id, asked.append(records, acks)).await {
            session.recorder.completed(id, appended(&ack));
        }
        session.pause().await;
    }
}
