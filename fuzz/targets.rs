//! What is fuzzed: every place where bytes from outside are read, one function each. The fuzzer's targets and the replay of
//! the corpus call the same functions. A function returns, or panics when something is wrong.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use logboom::api::{self, Call};
use logboom::config::{BrokerConfig, TopicConfig};
use logboom::controller::{ClusterMetadata, Command};
use logboom::net::Message;
use logboom::record::{self, BatchHeader, Record};
use logboom::testkit::history::History;
use logboom::types::{
    DecodeError, Endpoint, LeaderEpoch, LogIndex, Offset, TopicName, decode, encode,
};

/// A target: its name, and what it does.
pub(crate) type Target = (&'static str, fn(&[u8]));

/// All targets.
pub(crate) const TARGETS: [Target; 14] = [
    ("frames", frames),
    ("raft", raft),
    ("api", api),
    ("records", records),
    ("batch", batch),
    ("directory", directory),
    ("journal", journal),
    ("pieces", pieces),
    ("partition_commands", partition_commands),
    ("partition_snapshot", partition_snapshot),
    ("controller", controller),
    ("config", config),
    ("names", names),
    ("history", history),
];

/// Frames and the handshake, as they come from a socket.
pub(crate) fn frames(data: &[u8]) {
    logboom::net::fuzzing::frames(data);
}

/// Another broker's messages.
pub(crate) fn raft(data: &[u8]) {
    logboom::raft::fuzzing::message(data);
}

/// A client's requests and a broker's answers: two bytes with the header's length, the header, the body.
pub(crate) fn api(data: &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
    let (header, body) = rest.split_at(length);
    let message = || Message {
        header: Bytes::copy_from_slice(header),
        body: vec![Bytes::copy_from_slice(body)],
    };
    if let Ok(call) = Call::from_message(message()) {
        let request = call.request.clone();
        let again = Call::from_message(call.into_message());
        assert_eq!(
            again.map(|call| call.request),
            Ok(request),
            "a request changed"
        );
    }
    if let Ok(answer) = api::answer_from_message(message()) {
        if let Err(error) = &answer {
            // Whatever a broker says, its error can be shown and judged.
            let _judged = (error.to_string(), error.outcome(), error.is_retriable());
        }
        let shown = format!("{answer:?}");
        let again = api::answer_from_message(api::answer_to_message(answer));
        assert_eq!(
            again.map(|again| format!("{again:?}")),
            Ok(shown),
            "an answer changed"
        );
    }
}

/// Record batches from a producer, or from a broker.
pub(crate) fn records(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    read_all(&bytes);
    if let Ok(headers) = record::validate(&bytes, 1 << 20) {
        let total: usize = headers.iter().map(|header| header.size).sum();
        assert_eq!(total, bytes.len(), "valid, and not all of it");
        for (batch, header) in record::batches(&bytes).zip(&headers) {
            let batch = batch.expect("what is valid can be cut");
            assert_eq!(batch.header(), header, "two readings of a header");
            let mut placed = BytesMut::new();
            record::put_placed(&mut placed, batch.bytes(), Offset(77), LeaderEpoch(5));
            let found = BatchHeader::parse(&placed).expect("a placed batch can be read");
            assert_eq!(
                (found.base_offset, found.leader_epoch),
                (77, 5),
                "placed elsewhere"
            );
            assert_eq!(
                (found.count, found.crc),
                (header.count, header.crc),
                "a placed batch changed"
            );
        }
    }
}

fn read_all(bytes: &Bytes) {
    for batch in record::batches(bytes).flatten() {
        if let Ok(read) = batch.decode() {
            assert_eq!(
                i32::try_from(read.len()),
                Ok(batch.header().count),
                "some were left out"
            );
            let again: Vec<Record> = read
                .into_iter()
                .map(|one| Record {
                    timestamp_ms: one.timestamp_ms,
                    key: one.key,
                    value: one.value,
                    headers: one.headers,
                })
                .collect();
            // Times too far apart for the format are refused.
            if let Ok(encoded) = record::encode_batch(&again, batch.header().producer()) {
                let decoded =
                    record::decode_batch(&encoded).expect("what was encoded can be decoded");
                let same = decoded.len() == again.len()
                    && decoded.iter().zip(&again).all(|(now, before)| {
                        now.timestamp_ms == before.timestamp_ms
                            && now.key == before.key
                            && now.value == before.value
                            && now.headers == before.headers
                    });
                assert!(same, "records changed");
            }
        }
    }
    let _read = record::decode_batch(bytes);
}

/// The same with a length and a checksum that are right, so that what is behind them is reached.
pub(crate) fn batch(data: &[u8]) {
    let mut bytes = data.to_vec();
    if bytes.len() < record::HEADER_BYTES {
        bytes.resize(record::HEADER_BYTES, 0);
    }
    let length = i32::try_from(bytes.len() - 12).unwrap_or(0);
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes[16] = 2;
    let crc = crc32c::crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    records(&bytes);
}

/// A data directory, file by file.
pub(crate) fn directory(data: &[u8]) {
    logboom::storage::fuzzing::directory(data);
}

/// A journal with right checksums that says anything.
pub(crate) fn journal(data: &[u8]) {
    logboom::storage::fuzzing::journal(data);
}

/// Headers, checkpoints, identity and watermark.
pub(crate) fn pieces(data: &[u8]) {
    logboom::storage::fuzzing::pieces(data);
}

/// Committed commands of a partition.
pub(crate) fn partition_commands(data: &[u8]) {
    logboom::partition::fuzzing::commands(data);
}

/// A partition's state from a snapshot.
pub(crate) fn partition_snapshot(data: &[u8]) {
    logboom::partition::fuzzing::snapshot(data);
}

/// The controller's state and commands: pieces of two bytes of length each; the first piece is a state, empty for a new one.
pub(crate) fn controller(data: &[u8]) {
    let mut pieces = Vec::new();
    let mut rest = data;
    while let Some((length, more)) = rest.split_first_chunk::<2>() {
        let (piece, behind) =
            more.split_at(usize::from(u16::from_be_bytes(*length)).min(more.len()));
        pieces.push(piece);
        rest = behind;
    }
    let Some((state, commands)) = pieces.split_first() else {
        return;
    };
    let Ok(mut image) = (if state.is_empty() {
        Ok::<_, DecodeError>(ClusterMetadata::default())
    } else {
        ClusterMetadata::from_bytes(state)
    }) else {
        return;
    };
    for (index, command) in (1..).zip(commands.iter().take(64)) {
        let Ok(command) = Command::from_bytes(command) else {
            continue;
        };
        assert_eq!(
            Command::from_bytes(&command.to_bytes()).as_ref(),
            Ok(&command),
            "a command changed"
        );
        let before = image.clone();
        if image.apply(LogIndex(index), command).is_err() {
            assert_eq!(image, before, "a refusal changed something");
        }
    }
    let again = ClusterMetadata::from_bytes(&image.to_bytes());
    assert_eq!(again, Ok(image), "the state changed");
}

/// A broker's configuration file.
pub(crate) fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(config) = toml::from_str::<BrokerConfig>(text) {
        if config.validate().is_ok() {
            let _intervals = (config.heartbeat_interval(), config.election_timeout_max());
        }
        if let Ok(endpoints) = config.bootstrap_endpoints() {
            let sorted = endpoints
                .windows(2)
                .all(|pair| pair[0].broker < pair[1].broker);
            assert!(sorted, "a broker is named twice");
        }
    }
}

/// Names and single values: lines of a topic's name, or of `key=value` of its configuration.
pub(crate) fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut pairs = BTreeMap::new();
    for line in text.lines() {
        if let Ok(name) = TopicName::new(line) {
            assert!(
                !line.contains(['/', '\\', '\0']) && line != "..",
                "a name that is a path"
            );
            assert_eq!(name.as_str(), line);
            let encoded = encode(&name);
            assert_eq!(decode::<TopicName>(&encoded), Ok(name), "a name changed");
        }
        if let Some((key, value)) = line.split_once('=') {
            pairs.insert(key.to_owned(), value.to_owned());
        }
        let config = BrokerConfig {
            listen: line.to_owned(),
            advertise: line.to_owned(),
            bootstrap: vec![line.to_owned()],
            ..BrokerConfig::default()
        };
        let _judged = (config.validate(), config.bootstrap_endpoints());
    }
    for copies in [0, 1, 3, u32::MAX] {
        let _config = TopicConfig::parse(&pairs, copies);
    }
}

/// A kept history of a run.
pub(crate) fn history(data: &[u8]) {
    if let Ok(history) = History::read(data) {
        let mut written = Vec::new();
        history.write(&mut written).expect("memory takes it");
        let again = History::read(written.as_slice()).expect("what was written can be read");
        assert_eq!(again, history, "a history changed");
    }
}

/// Inputs made by the real encoders, for each target: what a corpus begins with.
pub(crate) async fn seeds() -> BTreeMap<&'static str, Vec<Vec<u8>>> {
    let mut seeds = BTreeMap::new();
    seeds.insert("frames", logboom::net::fuzzing::frames_seeds());
    seeds.insert("raft", logboom::raft::fuzzing::message_seeds());
    let directories = logboom::storage::fuzzing::directory_seeds().await;
    seeds.insert("pieces", directories.clone());
    seeds.insert("directory", directories);
    seeds.insert("journal", logboom::storage::fuzzing::journal_seeds());
    let (states, commands) = logboom::partition::fuzzing::seeds();
    seeds.insert("partition_snapshot", states);
    seeds.insert("partition_commands", commands);
    seeds.insert("api", api_seeds());
    let batches = batch_seeds();
    seeds.insert("batch", batches.clone());
    seeds.insert("records", batches);
    seeds.insert("controller", controller_seeds());
    seeds.insert("config", config_seeds());
    let names = [
        "topic-x",
        ".",
        "..",
        "a/b",
        "x=y\nmin.insync.replicas=2\nretention.ms=-1",
        "[::1]:9092\n1@host:9092\nhost:0",
    ];
    seeds.insert("names", names.map(|text| text.as_bytes().to_vec()).to_vec());
    seeds.insert("history", history_seeds());
    seeds
}

fn message_seed(message: &Message) -> Vec<u8> {
    let mut seed = u16::try_from(message.header.len())
        .unwrap_or(u16::MAX)
        .to_be_bytes()
        .to_vec();
    seed.extend_from_slice(&message.header);
    message
        .body
        .iter()
        .for_each(|piece| seed.extend_from_slice(piece));
    seed
}

fn api_seeds() -> Vec<Vec<u8>> {
    use logboom::api::{OffsetSpec, Request, Response};
    use logboom::types::{Acks, Error, PartitionId, TopicPartition};
    let topic = TopicName::new("topic-x").expect("a legal name");
    let partition = TopicPartition {
        topic: topic.clone(),
        partition: PartitionId(1),
    };
    let records = Bytes::from_static(b"records");
    let requests = [
        Request::Produce {
            partition: partition.clone(),
            acks: Acks::All,
            records: records.clone(),
        },
        Request::Fetch {
            partition: partition.clone(),
            offset: Offset(7),
            max_bytes: 1 << 20,
            min_bytes: 1,
            max_wait_ms: 500,
        },
        Request::FindOffset {
            partition: partition.clone(),
            spec: OffsetSpec::AtTime(-5),
        },
        Request::Trim {
            partition: partition.clone(),
            offset: Offset(3),
        },
        Request::Metadata {
            topics: Some(vec![topic.clone()]),
        },
        Request::DeleteTopic { name: topic },
        Request::ClusterStatus,
        Request::ElectLeaders,
        Request::InitProducer,
    ];
    let calls = requests.map(|request| {
        Call {
            timeout_ms: 30_000,
            forward: true,
            request,
        }
        .into_message()
    });
    let answers = [
        Ok(Response::Fetched {
            records,
            start_offset: Offset(1),
            epoch: LeaderEpoch(2),
            high_watermark: Offset(9),
        }),
        Err(Error::NotLeader {
            partition: partition.clone(),
            broker: logboom::types::BrokerId(1),
            leader: None,
        }),
        Err(Error::LeadershipLost { partition }),
    ];
    let answers = answers.map(api::answer_to_message);
    calls.iter().chain(&answers).map(message_seed).collect()
}

fn batch_seeds() -> Vec<Vec<u8>> {
    let record = |timestamp_ms, key: Option<&'static [u8]>, value: Option<&'static [u8]>| Record {
        timestamp_ms,
        key: key.map(Bytes::from_static),
        value: value.map(Bytes::from_static),
        headers: Vec::new(),
    };
    let mut with_headers = record(5, Some(b"key"), None);
    with_headers
        .headers
        .push(("name".to_owned(), Some(Bytes::from_static(b"x"))));
    with_headers.headers.push((String::new(), None));
    let stamp = record::ProducerStamp {
        id: 4,
        epoch: 1,
        base_sequence: 9,
    };
    let one = record::encode_batch(&[record(1, None, Some(b"value"))], None);
    let many = record::encode_batch(
        &[
            record(-3, Some(b""), Some(b"")),
            with_headers,
            record(1 << 40, None, None),
        ],
        Some(stamp),
    );
    let (Ok(one), Ok(many)) = (one, many) else {
        return Vec::new();
    };
    vec![
        one.to_vec(),
        many.to_vec(),
        [one.clone(), many].concat(),
        one[..40].to_vec(),
    ]
}

fn controller_seeds() -> Vec<Vec<u8>> {
    use logboom::controller::metadata::PlannedPartition;
    use logboom::types::{BrokerId, ClusterId, Incarnation, ReplicaId, ReplicaKind};
    let register = |broker: u32, incarnation: u128, boot| {
        let incarnation = Incarnation(incarnation);
        Command::RegisterBroker {
            endpoint: Endpoint {
                broker: BrokerId(broker),
                address: format!("h{broker}:1"),
            },
            rack: Some("r".to_owned()),
            incarnation,
            boot,
            position: 100,
            controller_replica: ReplicaId::new(
                BrokerId(broker),
                ReplicaKind::Data,
                incarnation.controller_epoch(),
            ),
        }
    };
    let name = TopicName::new("topic-x").expect("a legal name");
    let planned = |replicas: &[u32], witness| PlannedPartition {
        replicas: replicas.iter().copied().map(BrokerId).collect(),
        witness,
    };
    let commands = vec![
        Command::InitCluster {
            cluster: ClusterId(1),
        },
        register(1, 10, 1),
        register(2, 20, 1),
        register(3, 30, 1),
        Command::CreateTopic {
            name: name.clone(),
            config: BTreeMap::new(),
            settings: TopicConfig::default(),
            partitions: vec![
                planned(&[1, 2], Some(BrokerId(3))),
                planned(&[2, 3], Some(BrokerId(1))),
            ],
        },
        Command::SetAlive {
            broker: BrokerId(2),
            alive: false,
        },
        Command::AllocateProducerId,
        register(2, 21, 1),
        Command::DeleteTopic { name },
    ];
    let packed = |pieces: &[Vec<u8>]| {
        let mut seed = Vec::new();
        for piece in pieces {
            seed.extend(u16::try_from(piece.len()).unwrap_or(u16::MAX).to_be_bytes());
            seed.extend(piece);
        }
        seed
    };
    let mut image = ClusterMetadata::default();
    let mut seeds = Vec::new();
    let mut pieces = vec![Vec::new()];
    for (index, command) in (1..).zip(commands) {
        seeds.push(packed(&[image.to_bytes(), command.to_bytes()]));
        pieces.push(command.to_bytes());
        image.apply(LogIndex(index), command).ok();
    }
    seeds.push(packed(&pieces));
    seeds
}

fn config_seeds() -> Vec<Vec<u8>> {
    let default = toml::to_string(&BrokerConfig::default()).unwrap_or_default();
    let texts = [
        default.as_str(),
        "broker_id = 1\nlisten = \"[::1]:9092\"\nbootstrap = [\"1@a:1\", \"2@b:65535\"]\n",
        "broker_id = 4294967296\n",
        "listen = 5",
        "[[x]]\n",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

fn history_seeds() -> Vec<Vec<u8>> {
    use logboom::testkit::history::{AckLevel, Call, Operation, Outcome, ProducerPosition};
    let operation = |call, outcome, completed_ns| Operation {
        session: 1,
        invoked_ns: 5,
        completed_ns,
        partition: 0,
        call,
        outcome,
    };
    let producer = Some(ProducerPosition { id: 3, epoch: 0 });
    let append = Call::Append {
        values: vec![1, 2],
        producer,
        acks: AckLevel::All,
    };
    let history = History {
        operations: vec![
            operation(
                append.clone(),
                Outcome::Appended {
                    base: 0,
                    epoch: 1,
                    copies: 2,
                },
                Some(9),
            ),
            operation(
                Call::Fetch { from: 0 },
                Outcome::Fetched {
                    log_start: 0,
                    high_watermark: 2,
                    records: vec![(0, 1), (1, 2)],
                    epoch: Some(1),
                },
                Some(9),
            ),
            operation(
                Call::LinearizableEnd,
                Outcome::Appended {
                    base: u64::MAX,
                    epoch: 0,
                    copies: 0,
                },
                None,
            ),
        ],
        ..History::default()
    };
    let mut written = Vec::new();
    history.write(&mut written).expect("memory takes it");
    let lines = written
        .split_inclusive(|byte| *byte == b'\n')
        .map(<[u8]>::to_vec);
    let mut seeds: Vec<Vec<u8>> = lines.collect();
    seeds.push(written);
    seeds
}
