//! Between records and the batches that travel: encoding, decoding, and what an answer to an append says.
//!
//! Owns no format: that is `record`'s.

use bytes::Bytes;

use super::{Ack, ConsumerRecord, unexpected};
use crate::api::Response;
use crate::record::{self, ProducerStamp, Record};
use crate::runtime;
use crate::types::{Error, LeaderEpoch, Offset, PartitionId};

/// Bytes of a batch without its records.
pub(super) use crate::record::HEADER_BYTES;

impl Record {
    /// A record with this value and without a key, made now.
    pub fn new(value: impl Into<Bytes>) -> Self {
        Self {
            timestamp_ms: runtime::wall_clock_ms(),
            value: Some(value.into()),
            ..Self::default()
        }
    }

    /// The same with this key.
    #[must_use]
    pub fn with_key(self, key: impl Into<Bytes>) -> Self {
        Self {
            key: Some(key.into()),
            ..self
        }
    }

    /// The same with one more header.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: impl Into<Bytes>) -> Self {
        self.headers.push((name.to_owned(), Some(value.into())));
        self
    }
}

/// One batch of `records`.
pub(super) fn encode(records: &[Record], stamp: Option<ProducerStamp>) -> Result<Bytes, Error> {
    record::encode_batch(records, stamp)
}

/// Whether a batch may be as large as it is.
pub(super) fn check_size(batch: &Bytes, max: u32) -> Result<(), Error> {
    let size = u64::try_from(batch.len()).unwrap_or(u64::MAX);
    if size <= u64::from(max) {
        return Ok(());
    }
    Err(Error::RecordTooLarge {
        size,
        max: u64::from(max),
    })
}

/// The records in whole batches from `from` on, and the offset behind the last one.
pub(super) fn decode(
    partition: PartitionId,
    bytes: &Bytes,
    from: Offset,
) -> Result<(Vec<ConsumerRecord>, Offset), Error> {
    let mut found = Vec::new();
    let mut next = from;
    for batch in record::batches(bytes) {
        for record in batch?.decode()? {
            // The first batch may begin below the wanted offset. What is not the next one in order is never passed on twice.
            if record.offset < next {
                continue;
            }
            next = record.offset.plus(1);
            found.push(ConsumerRecord {
                partition,
                offset: record.offset,
                timestamp_ms: record.timestamp_ms,
                key: record.key,
                value: record.value,
                headers: record.headers,
            });
        }
    }
    Ok((found, next))
}

/// What the answer to the append of one batch says.
pub(super) fn ack(partition: PartitionId, response: &Response) -> Result<Ack, Error> {
    let Response::Produced(appended) = response else {
        return Err(unexpected(response));
    };
    Ok(match appended.first() {
        Some(appended) => Ack {
            partition,
            offset: appended.base_offset,
            leader_epoch: appended.leader_epoch,
            durable_on: appended.durable_on.as_slice().into(),
        },
        // Answered before anything was stored.
        None => Ack {
            partition,
            offset: Ack::NO_OFFSET,
            leader_epoch: LeaderEpoch(0),
            durable_on: [].into(),
        },
    })
}
