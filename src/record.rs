//! Record batches: Kafka's `RecordBatch` v2, byte for byte, from the producer to the disk and back.
//!
//! Owns the 61-byte header as a view over [`Bytes`], the checks a batch must pass before it is appended, the two fields a
//! broker sets on the way out (base offset, leader epoch: the CRC begins behind them), and the building and reading of
//! batches for the Rust API. A broker reads headers only; it never looks at the records of a batch it passes on.
//!
//! Records are read here and not with a protocol crate: the counts inside a batch come from a stranger, so no memory is
//! taken for a count before the bytes for it are seen, and header keys may repeat.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::types::{Error, LeaderEpoch, Offset};

/// Bytes of a batch's header: everything in front of its first record.
pub const HEADER_BYTES: usize = 61;
/// Bytes in front of those that the length field counts: base offset and the length itself.
const LENGTH_FROM: usize = 12;
/// Where the bytes under the CRC begin: at the attributes.
const CRC_FROM: usize = 21;
/// Fewest bytes of a record: six one-byte fields behind its one-byte length.
const RECORD_BYTES_MIN: usize = 7;
/// Fewest bytes of a record's header: two one-byte lengths.
const RECORD_HEADER_BYTES_MIN: usize = 2;

/// No producer id: the batch does not come from an idempotent producer.
pub const NO_PRODUCER: i64 = -1;

const COMPRESSION_MASK: i16 = 0x07;
const COMPRESSION_NAMES: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];
const LOG_APPEND_TIME: i16 = 1 << 3;
const TRANSACTIONAL: i16 = 1 << 4;
const CONTROL: i16 = 1 << 5;
const DELETE_HORIZON: i16 = 1 << 6;

/// Who sent a batch, so that a retry is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerStamp {
    /// The producer id, at least 0.
    pub id: i64,
    /// Its epoch, at least 0.
    pub epoch: i16,
    /// The sequence number of the batch's first record: counts records per partition, from 0, and begins again at 0
    /// behind 2³¹ − 1.
    pub base_sequence: i32,
}

/// The header of one batch, read but not checked beyond its length and its format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Offset of the first record; whatever the producer wrote until the broker sets it.
    pub base_offset: i64,
    /// Bytes of the whole batch, header included; at least [`HEADER_BYTES`].
    pub size: usize,
    /// Epoch of the leader that appended it, as far as 31 bits hold it.
    pub leader_epoch: i32,
    /// CRC-32C over everything from the attributes on.
    pub crc: u32,
    /// Compression, kind of timestamps, transactional, control.
    pub attributes: i16,
    /// Offset of the last record less that of the first.
    pub last_offset_delta: i32,
    /// Timestamp of the first record, in ms since 1970.
    pub base_timestamp: i64,
    /// The latest timestamp in the batch, in ms since 1970.
    pub max_timestamp: i64,
    /// The producer, or [`NO_PRODUCER`].
    pub producer_id: i64,
    /// The producer's epoch.
    pub producer_epoch: i16,
    /// Sequence number of the first record.
    pub base_sequence: i32,
    /// Records in the batch.
    pub count: i32,
}

impl BatchHeader {
    /// Reads the header at the start of `bytes`, and checks that the whole batch is there and is of version 2.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() < HEADER_BYTES {
            return Err(corrupt(format!(
                "{} bytes are no batch header",
                bytes.len()
            )));
        }
        let mut header = bytes;
        let base_offset = header.get_i64();
        let length = header.get_i32();
        let size = usize::try_from(length)
            .ok()
            .and_then(|length| length.checked_add(LENGTH_FROM));
        let size = match size {
            Some(size) if (HEADER_BYTES..=bytes.len()).contains(&size) => size,
            _ => {
                let left = bytes.len() - LENGTH_FROM;
                return Err(corrupt(format!(
                    "length {length} does not fit the {left} bytes behind it"
                )));
            }
        };
        let leader_epoch = header.get_i32();
        let magic = header.get_i8();
        if magic != 2 {
            return Err(corrupt(format!(
                "record format {magic} is not supported, use 2"
            )));
        }
        Ok(Self {
            base_offset,
            size,
            leader_epoch,
            crc: header.get_u32(),
            attributes: header.get_i16(),
            last_offset_delta: header.get_i32(),
            base_timestamp: header.get_i64(),
            max_timestamp: header.get_i64(),
            producer_id: header.get_i64(),
            producer_epoch: header.get_i16(),
            base_sequence: header.get_i32(),
            count: header.get_i32(),
        })
    }

    /// Who sent it, when an idempotent producer did.
    pub fn producer(&self) -> Option<ProducerStamp> {
        (self.producer_id >= 0).then_some(ProducerStamp {
            id: self.producer_id,
            epoch: self.producer_epoch,
            base_sequence: self.base_sequence,
        })
    }

    /// Whether its records are compressed.
    pub fn is_compressed(&self) -> bool {
        self.attributes & COMPRESSION_MASK != 0
    }

    /// What a batch from a producer must be, beyond its CRC.
    fn check_fields(&self) -> Result<(), Error> {
        let refused = |reason: &str| {
            Err(Error::InvalidRequest {
                reason: reason.to_owned(),
            })
        };
        let expected = self.last_offset_delta.checked_add(1);
        if self.count <= 0 || expected != Some(self.count) {
            let (count, last) = (self.count, self.last_offset_delta);
            return Err(corrupt(format!(
                "{count} records, but the last one is number {last} from 0"
            )));
        }
        let codec = self.attributes & COMPRESSION_MASK;
        if usize::from(codec.unsigned_abs()) >= COMPRESSION_NAMES.len() {
            return Err(corrupt(format!("unknown compression {codec}")));
        }
        let records = self.size - HEADER_BYTES;
        let count = usize::try_from(self.count).unwrap_or(usize::MAX);
        if !self.is_compressed() && count > records / RECORD_BYTES_MIN {
            return Err(corrupt(format!(
                "{count} records do not fit into {records} bytes"
            )));
        }
        if self.attributes & CONTROL != 0 {
            return refused("control batches are the broker's own");
        }
        if self.attributes & TRANSACTIONAL != 0 {
            return refused("transactions are not supported");
        }
        if self.attributes & (LOG_APPEND_TIME | DELETE_HORIZON) != 0 {
            return refused(
                "only the broker may mark a batch with append time or a delete horizon",
            );
        }
        let stamped = self.producer_id >= 0 && self.producer_epoch >= 0 && self.base_sequence >= 0;
        if !stamped && self.producer_id != NO_PRODUCER {
            return refused("producer id, epoch and sequence must all be 0 or above, or the id -1");
        }
        Ok(())
    }
}

/// One batch: its bytes, and its header as read from them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordBatch {
    header: BatchHeader,
    bytes: Bytes,
}

impl RecordBatch {
    /// The header.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The whole batch.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Checks that the bytes under the CRC are what the producer sent.
    pub fn check_crc(&self) -> Result<(), Error> {
        let found = self.bytes.get(CRC_FROM..).map_or(0, crc32c::crc32c);
        if found == self.header.crc {
            return Ok(());
        }
        Err(corrupt(format!(
            "its CRC-32C is {:08x}, its bytes have {found:08x}",
            self.header.crc
        )))
    }

    /// The records, after a check of the CRC. Keys and values share the batch's memory.
    pub fn decode(&self) -> Result<Vec<DecodedRecord>, Error> {
        self.check_crc()?;
        let header = &self.header;
        if header.is_compressed() {
            let codec = usize::from((header.attributes & COMPRESSION_MASK).unsigned_abs());
            let name = COMPRESSION_NAMES
                .get(codec)
                .copied()
                .unwrap_or("an unknown codec");
            let reason =
                format!("the batch is compressed with {name}, which this client cannot read");
            return Err(Error::InvalidRequest { reason });
        }
        let mut rest = Reader(self.bytes.slice(HEADER_BYTES..));
        let count = usize::try_from(header.count)
            .map_err(|_| corrupt(format!("{} records", header.count)))?;
        if count > rest.0.len() / RECORD_BYTES_MIN {
            return Err(corrupt(format!(
                "{count} records do not fit into {} bytes",
                rest.0.len()
            )));
        }
        let base = u64::try_from(header.base_offset)
            .map_err(|_| corrupt(format!("base offset {}", header.base_offset)))?;
        let mut records = Vec::with_capacity(count);
        for _ in 0..count {
            let size = rest.length("record")?;
            let mut record = Reader(rest.take(size, "record")?);
            records.push(record.record(header, base)?);
            record.end("record")?;
        }
        rest.end("batch")?;
        Ok(records)
    }
}

/// The batches that lie back to back in some bytes; ends behind the first one that cannot be read.
#[derive(Debug, Clone)]
pub struct Batches(Bytes);

impl Iterator for Batches {
    type Item = Result<RecordBatch, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match BatchHeader::parse(&self.0) {
            Ok(header) => Some(Ok(RecordBatch {
                header,
                bytes: self.0.split_to(header.size),
            })),
            Err(error) => {
                self.0.clear();
                Some(Err(error))
            }
        }
    }
}

/// The batches in `records`.
pub fn batches(records: &Bytes) -> Batches {
    Batches(records.clone())
}

/// Checks what a producer sent: whole batches of version 2, none larger than `batch_bytes_max`, each with a right CRC, dense
/// offsets, and nothing in it that only a broker may say. Returns their headers, at least one.
pub fn validate(records: &Bytes, batch_bytes_max: u32) -> Result<Vec<BatchHeader>, Error> {
    let mut headers = Vec::with_capacity(1);
    for batch in batches(records) {
        let batch = batch?;
        let size = u64::try_from(batch.header.size).unwrap_or(u64::MAX);
        if size > u64::from(batch_bytes_max) {
            return Err(Error::RecordTooLarge {
                size,
                max: u64::from(batch_bytes_max),
            });
        }
        batch.check_crc()?;
        batch.header.check_fields()?;
        headers.push(batch.header);
    }
    if headers.is_empty() {
        return Err(Error::InvalidRequest {
            reason: "there is no record to append".to_owned(),
        });
    }
    Ok(headers)
}

/// Adds `batch` to `out` with its place in the log set: the rest, and so its CRC, stays as it is.
///
/// # Panics
/// When `batch` is shorter than a header: it comes from [`BatchHeader::parse`].
pub fn put_placed(out: &mut BytesMut, batch: &[u8], base_offset: Offset, epoch: LeaderEpoch) {
    assert!(
        batch.len() >= HEADER_BYTES,
        "a batch of {} bytes",
        batch.len()
    );
    out.put_i64(i64::try_from(base_offset.0).unwrap_or(i64::MAX));
    out.extend_from_slice(batch.get(8..LENGTH_FROM).unwrap_or_default());
    out.put_i32(i32::try_from(epoch.0).unwrap_or(i32::MAX));
    out.extend_from_slice(batch.get(LENGTH_FROM + 4..).unwrap_or_default());
}

/// The name and the value of one header of a record; names may repeat.
pub type RecordHeader = (String, Option<Bytes>);

/// A record to be appended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// When it was made, in ms since 1970.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value.
    pub value: Option<Bytes>,
    /// Its headers, in order.
    pub headers: Vec<RecordHeader>,
}

impl Record {
    /// Upper bound of the bytes it takes in a batch.
    pub fn encoded_bytes_max(&self) -> usize {
        let length = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
        let headers = self
            .headers
            .iter()
            .map(|(key, value)| key.len() + length(value) + 10);
        // Length, attributes, timestamp, offset, two lengths, the number of headers: at most 5 bytes each, the timestamp 10.
        36 + length(&self.key) + length(&self.value) + headers.sum::<usize>()
    }
}

/// A record read from the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodedRecord {
    /// Its position in the partition.
    pub offset: Offset,
    /// When it was made, in ms since 1970.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its value.
    pub value: Option<Bytes>,
    /// Its headers, in order.
    pub headers: Vec<RecordHeader>,
}

/// Builds one uncompressed batch of `records`, at least one. Base offset 0 and no leader epoch: the broker sets them.
pub fn encode_batch(records: &[Record], producer: Option<ProducerStamp>) -> Result<Bytes, Error> {
    let (Some(first), Ok(count)) = (records.first(), i32::try_from(records.len())) else {
        let reason = format!(
            "a batch holds 1 to {} records, not {}",
            i32::MAX,
            records.len()
        );
        return Err(Error::InvalidRequest { reason });
    };
    let estimate = records.iter().map(Record::encoded_bytes_max).sum::<usize>();
    let limit = usize::try_from(i32::MAX).unwrap_or(usize::MAX) - HEADER_BYTES;
    if estimate > limit {
        let size = u64::try_from(estimate).unwrap_or(u64::MAX);
        return Err(Error::RecordTooLarge {
            size,
            max: u64::try_from(limit).unwrap_or(u64::MAX),
        });
    }
    let base_timestamp = first.timestamp_ms;
    let max_timestamp = records
        .iter()
        .map(|record| record.timestamp_ms)
        .max()
        .unwrap_or(base_timestamp);

    // From the attributes on: what the CRC covers.
    let mut covered = BytesMut::with_capacity(HEADER_BYTES - CRC_FROM + estimate);
    covered.put_i16(0);
    covered.put_i32(count - 1);
    covered.put_i64(base_timestamp);
    covered.put_i64(max_timestamp);
    covered.put_i64(producer.map_or(NO_PRODUCER, |stamp| stamp.id));
    covered.put_i16(producer.map_or(-1, |stamp| stamp.epoch));
    covered.put_i32(producer.map_or(-1, |stamp| stamp.base_sequence));
    covered.put_i32(count);
    let mut body = BytesMut::new();
    for (delta, record) in (0_i64..).zip(records) {
        body.clear();
        body.put_i8(0);
        put_varint(&mut body, record.timestamp_ms.wrapping_sub(base_timestamp));
        put_varint(&mut body, delta);
        put_nullable(&mut body, record.key.as_deref());
        put_nullable(&mut body, record.value.as_deref());
        put_length(&mut body, record.headers.len());
        for (key, value) in &record.headers {
            put_nullable(&mut body, Some(key.as_bytes()));
            put_nullable(&mut body, value.as_deref());
        }
        put_length(&mut covered, body.len());
        covered.extend_from_slice(&body);
    }

    let mut batch = BytesMut::with_capacity(CRC_FROM + covered.len());
    batch.put_i64(0);
    batch.put_i32(i32::try_from(covered.len() + CRC_FROM - LENGTH_FROM).unwrap_or(i32::MAX));
    batch.put_i32(-1);
    batch.put_i8(2);
    batch.put_u32(crc32c::crc32c(&covered));
    batch.extend_from_slice(&covered);
    Ok(batch.freeze())
}

/// The records of all batches in `bytes`, as a fetch returns them.
pub fn decode_batch(bytes: &Bytes) -> Result<Vec<DecodedRecord>, Error> {
    let mut records = Vec::new();
    for batch in batches(bytes) {
        records.append(&mut batch?.decode()?);
    }
    Ok(records)
}

fn corrupt(reason: String) -> Error {
    Error::CorruptBatch { reason }
}

fn put_varint(out: &mut BytesMut, value: i64) {
    // Zigzag: small numbers of either sign take few bytes.
    let mut rest = (value << 1).cast_unsigned() ^ (value >> 63).cast_unsigned();
    while rest >= 0x80 {
        out.put_u8(u8::try_from(rest & 0x7f).unwrap_or(0) | 0x80);
        rest >>= 7;
    }
    out.put_u8(u8::try_from(rest).unwrap_or(0));
}

fn put_length(out: &mut BytesMut, length: usize) {
    put_varint(out, i64::try_from(length).unwrap_or(i64::MAX));
}

fn put_nullable(out: &mut BytesMut, bytes: Option<&[u8]>) {
    match bytes {
        Some(bytes) => {
            put_length(out, bytes.len());
            out.extend_from_slice(bytes);
        }
        None => put_varint(out, -1),
    }
}

/// Reads fields from the front of some bytes.
struct Reader(Bytes);

impl Reader {
    fn take(&mut self, length: usize, what: &str) -> Result<Bytes, Error> {
        if length > self.0.len() {
            return Err(corrupt(format!(
                "{what} of {length} bytes, {} are left",
                self.0.len()
            )));
        }
        Ok(self.0.split_to(length))
    }

    fn varint(&mut self, what: &str) -> Result<i64, Error> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            if !self.0.has_remaining() {
                return Err(corrupt(format!("{what} is cut off")));
            }
            let byte = self.0.get_u8();
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
            }
        }
        Err(corrupt(format!("{what} is longer than ten bytes")))
    }

    fn length(&mut self, what: &str) -> Result<usize, Error> {
        let length = self.varint(what)?;
        usize::try_from(length).map_err(|_| corrupt(format!("{what} of {length} bytes")))
    }

    fn nullable(&mut self, what: &str) -> Result<Option<Bytes>, Error> {
        match self.varint(what)? {
            -1 => Ok(None),
            length => {
                let length = usize::try_from(length)
                    .map_err(|_| corrupt(format!("{what} of {length} bytes")))?;
                self.take(length, what).map(Some)
            }
        }
    }

    fn record(&mut self, batch: &BatchHeader, base: u64) -> Result<DecodedRecord, Error> {
        self.take(1, "record attributes")?;
        let timestamp_delta = self.varint("timestamp")?;
        let delta = self.varint("offset")?;
        let offset = u64::try_from(delta)
            .ok()
            .filter(|_| delta <= i64::from(batch.last_offset_delta))
            .and_then(|delta| base.checked_add(delta))
            .ok_or_else(|| corrupt(format!("record {delta} from 0 of {}", batch.count)))?;
        let key = self.nullable("key")?;
        let value = self.nullable("value")?;
        let count = self.length("number of headers")?;
        if count > self.0.len() / RECORD_HEADER_BYTES_MIN {
            return Err(corrupt(format!(
                "{count} headers do not fit into {} bytes",
                self.0.len()
            )));
        }
        let mut headers = Vec::with_capacity(count);
        for _ in 0..count {
            let name = self.nullable("header name")?;
            let name = name.ok_or_else(|| corrupt("a header without a name".to_owned()))?;
            let name = String::from_utf8(name.to_vec())
                .map_err(|_| corrupt("a header's name is not UTF-8".to_owned()))?;
            headers.push((name, self.nullable("header value")?));
        }
        let log_append_time = batch.attributes & LOG_APPEND_TIME != 0;
        let timestamp_ms = if log_append_time {
            batch.max_timestamp
        } else {
            // Wraps as the encoder does: any two timestamps can stand in one batch.
            batch.base_timestamp.wrapping_add(timestamp_delta)
        };
        Ok(DecodedRecord {
            offset: Offset(offset),
            timestamp_ms,
            key,
            value,
            headers,
        })
    }

    fn end(&self, what: &str) -> Result<(), Error> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(corrupt(format!(
            "{} bytes left over in a {what}",
            self.0.len()
        )))
    }
}

#[cfg(test)]
mod tests;
