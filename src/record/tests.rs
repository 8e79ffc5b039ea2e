//! Batches against an independent implementation, damaged batches, and what producers may not send.

use kafka_protocol::records as kafka;
use proptest::prelude::*;

use super::*;

fn record() -> impl Strategy<Value = Record> {
    let bytes = || proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40));
    let headers = proptest::collection::vec(("[a-c]{0,3}", bytes()), 0..4);
    (any::<i64>(), bytes(), bytes(), headers).prop_map(|(timestamp_ms, key, value, headers)| {
        Record {
            timestamp_ms,
            key: key.map(Bytes::from),
            value: value.map(Bytes::from),
            headers: headers
                .into_iter()
                .map(|(name, value)| (name, value.map(Bytes::from)))
                .collect(),
        }
    })
}

fn stamp() -> impl Strategy<Value = Option<ProducerStamp>> {
    let stamp = (0..i64::MAX, 0..i16::MAX, 0..i32::MAX);
    proptest::option::of(stamp.prop_map(|(id, epoch, base_sequence)| ProducerStamp {
        id,
        epoch,
        base_sequence,
    }))
}

fn one(value: &str) -> Record {
    Record {
        timestamp_ms: 7,
        value: Some(Bytes::from(value.to_owned())),
        ..Record::default()
    }
}

/// The batch with `change` made to its bytes and its CRC made right again.
fn resealed(batch: &Bytes, change: impl FnOnce(&mut [u8])) -> Bytes {
    let mut bytes = batch.to_vec();
    change(&mut bytes);
    let crc = crc32c::crc32c(&bytes[CRC_FROM..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes.into()
}

proptest! {
    /// Goal: what is built is accepted, and read back as it was. Method: random records and producers, a place set.
    #[test]
    fn records_round_trip(records in proptest::collection::vec(record(), 1..20), stamp in stamp(), base in 0..u64::from(u32::MAX)) {
        let batch = encode_batch(&records, stamp).unwrap();
        let headers = validate(&batch, u32::MAX).unwrap();
        prop_assert_eq!(headers.len(), 1);
        prop_assert_eq!(headers[0].producer(), stamp);
        prop_assert_eq!(headers[0].size, batch.len());
        let mut placed = BytesMut::new();
        put_placed(&mut placed, &batch, Offset(base), LeaderEpoch(9));
        let placed = placed.freeze();
        prop_assert_eq!(BatchHeader::parse(&placed).unwrap().leader_epoch, 9);
        let decoded = decode_batch(&placed).unwrap();
        prop_assert_eq!(decoded.len(), records.len());
        for ((at, found), sent) in (base..).zip(decoded).zip(records) {
            let found_record = Record { timestamp_ms: found.timestamp_ms, key: found.key, value: found.value, headers: found.headers };
            prop_assert_eq!((found.offset, found_record), (Offset(at), sent));
        }
    }

    /// Goal: damage under the CRC never passes. Method: flip one bit of it anywhere behind the CRC, or of the CRC.
    #[test]
    fn every_flipped_bit_is_found(records in proptest::collection::vec(record(), 1..5), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let batch = encode_batch(&records, None).unwrap();
        let at = 17 + at.index(batch.len() - 17);
        let mut bytes = batch.to_vec();
        bytes[at] ^= 1_u8 << bit;
        let bytes = Bytes::from(bytes);
        let refused = matches!(validate(&bytes, u32::MAX), Err(Error::CorruptBatch { .. }));
        prop_assert!(refused);
        prop_assert!(decode_batch(&bytes).is_err());
    }

    /// Goal: bytes of a stranger are an error at worst. Method: random bytes, alone and behind a right header with a right CRC.
    #[test]
    fn random_bytes_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..200), count in any::<i32>()) {
        let noise = Bytes::from(noise);
        validate(&noise, u32::MAX).ok();
        decode_batch(&noise).ok();
        let mut bytes = encode_batch(&[one("x")], None).unwrap()[..HEADER_BYTES].to_vec();
        bytes.extend_from_slice(&noise);
        let length = i32::try_from(bytes.len() - LENGTH_FROM).unwrap();
        let sealed = resealed(&bytes.into(), |bytes| {
            bytes[8..12].copy_from_slice(&length.to_be_bytes());
            bytes[23..27].copy_from_slice(&count.wrapping_sub(1).to_be_bytes());
            bytes[57..61].copy_from_slice(&count.to_be_bytes());
        });
        validate(&sealed, u32::MAX).ok();
        decode_batch(&sealed).ok();
    }

    /// Goal: the bytes are Kafka's. Method: an independent implementation reads what we write, and the other way round.
    #[test]
    fn an_independent_implementation_agrees(records in proptest::collection::vec(record(), 1..10), stamp in stamp()) {
        let records: Vec<Record> = records
            .into_iter()
            .map(|mut record| {
                // It keeps headers in a map, and subtracts timestamps without room to spare.
                record.timestamp_ms >>= 2;
                record.headers.sort();
                record.headers.dedup_by(|a, b| a.0 == b.0);
                record
            })
            .collect();
        let batch = encode_batch(&records, stamp).unwrap();
        let theirs = kafka::RecordBatchDecoder::decode(&mut batch.clone()).unwrap();
        prop_assert_eq!(theirs.records.len(), records.len());
        for (found, sent) in theirs.records.iter().zip(&records) {
            let headers: Vec<RecordHeader> = found.headers.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
            prop_assert_eq!(
                (found.timestamp, &found.key, &found.value, &headers),
                (sent.timestamp_ms, &sent.key, &sent.value, &sent.headers)
            );
        }
        let mut encoded = BytesMut::new();
        let options = kafka::RecordEncodeOptions { version: 2, compression: kafka::Compression::None };
        kafka::RecordBatchEncoder::encode(&mut encoded, &theirs.records, &options).unwrap();
        let encoded = encoded.freeze();
        if theirs.records.iter().all(|record| record.sequence >= 0) {
            prop_assert_eq!(decode_batch(&encoded).unwrap(), decode_batch(&batch).unwrap());
        }
    }
}

/// Goal: batches back to back are taken apart exactly, and a bad one ends them. Method: two batches, then half of one.
#[test]
fn batches_lie_back_to_back() {
    let (a, b) = (
        encode_batch(&[one("a"), one("b")], None).unwrap(),
        encode_batch(&[one("c")], None).unwrap(),
    );
    let both = Bytes::from([a.clone(), b.clone()].concat());
    let counts: Vec<i32> = validate(&both, 1_000)
        .unwrap()
        .iter()
        .map(|header| header.count)
        .collect();
    assert_eq!(counts, [2, 1]);
    let found: Vec<Bytes> = batches(&both)
        .map(|batch| batch.unwrap().bytes().clone())
        .collect();
    assert_eq!(found, [a.clone(), b]);
    let cut = both.slice(..both.len() - 1);
    assert_eq!(
        batches(&cut).map(|batch| batch.is_ok()).collect::<Vec<_>>(),
        [true, false]
    );
    assert!(matches!(
        validate(&cut, 1_000),
        Err(Error::CorruptBatch { .. })
    ));
    assert!(matches!(
        validate(&Bytes::new(), 1_000),
        Err(Error::InvalidRequest { .. })
    ));
    let max = u32::try_from(a.len()).unwrap();
    assert!(validate(&a, max).is_ok());
    assert!(matches!(
        validate(&a, max - 1),
        Err(Error::RecordTooLarge { .. })
    ));
}

/// Goal: what only a broker may say, or what cannot be, is refused with the right error. Method: a table of changes to a good
/// batch, with the CRC made right again.
#[test]
fn what_a_producer_may_not_send_is_refused() {
    let batch = encode_batch(
        &[one("a")],
        Some(ProducerStamp {
            id: 1,
            epoch: 0,
            base_sequence: 0,
        }),
    )
    .unwrap();
    let invalid: [(&str, usize, u8); 6] = [
        ("append time", 22, 1 << 3),
        ("transactional", 22, 1 << 4),
        ("control", 22, 1 << 5),
        ("negative id", 43, 0xfe),
        ("negative epoch", 51, 0xff),
        ("negative sequence", 53, 0xff),
    ];
    for (name, at, value) in invalid {
        let found = validate(&resealed(&batch, |bytes| bytes[at] = value), 1_000);
        assert!(
            matches!(found, Err(Error::InvalidRequest { .. })),
            "{name}: {found:?}"
        );
    }
    let corrupt: [(&str, usize, u8); 5] = [
        ("magic", 16, 1),
        ("codec", 22, 5),
        ("last offset", 26, 1),
        ("count", 60, 2),
        ("length", 8, 0x7f),
    ];
    for (name, at, value) in corrupt {
        let found = validate(&resealed(&batch, |bytes| bytes[at] = value), 1_000);
        assert!(
            matches!(found, Err(Error::CorruptBatch { .. })),
            "{name}: {found:?}"
        );
    }
    let many = resealed(&batch, |bytes| {
        bytes[23..27].copy_from_slice(&i32::MAX.wrapping_sub(1).to_be_bytes());
        bytes[57..61].copy_from_slice(&i32::MAX.to_be_bytes());
    });
    assert!(matches!(
        validate(&many, 1_000),
        Err(Error::CorruptBatch { .. })
    ));
    assert!(matches!(
        encode_batch(&[], None),
        Err(Error::InvalidRequest { .. })
    ));
}
