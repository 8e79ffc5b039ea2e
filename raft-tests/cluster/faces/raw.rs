//! Requests and bytes sent to one broker past the client: nothing is retried, routed or tidied up.

use std::time::Duration;

use bytes::Bytes;
use logboom::api::{Call, Request, Response, answer_from_message};
use logboom::net::{Connection, NetConfig};
use logboom::record::{ProducerStamp, Record, encode_batch};
use logboom::runtime::Tasks;
use logboom::types::{Acks, Error, PartitionId, TopicName, TopicPartition};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// How long a broker may take to hang up on someone who does not speak its language.
const HANG_UP: Duration = Duration::from_secs(10);

/// A connection to one broker.
pub(crate) struct Raw {
    connection: Connection,
    _tasks: Tasks,
}

impl Raw {
    pub(crate) async fn open(address: &str) -> Self {
        let tasks = Tasks::new();
        let connection = Connection::open(address, &NetConfig::default(), &tasks).await;
        let connection = connection.unwrap_or_else(|error| panic!("{address}: {error}"));
        Self {
            connection,
            _tasks: tasks,
        }
    }

    /// What this very broker says.
    pub(crate) async fn ask(&self, request: Request) -> Result<Response, Error> {
        self.ask_within(request, Duration::from_secs(10)).await
    }

    pub(crate) async fn ask_within(
        &self,
        request: Request,
        deadline: Duration,
    ) -> Result<Response, Error> {
        let timeout_ms = u32::try_from(deadline.as_millis()).expect("a short deadline");
        let message = Call {
            timeout_ms,
            forward: false,
            request,
        }
        .into_message();
        let answer = self.connection.call(message, deadline)?.await?;
        answer_from_message(answer).unwrap_or_else(|error| panic!("{error}"))
    }
}

pub(crate) fn partition(topic: &str, number: u32) -> TopicPartition {
    let topic = TopicName::new(topic).unwrap_or_else(|error| panic!("{error}"));
    TopicPartition {
        topic,
        partition: PartitionId(number),
    }
}

/// A batch of one record per value.
pub(crate) fn batch(values: &[&[u8]], producer: Option<ProducerStamp>) -> Bytes {
    let records: Vec<Record> = values
        .iter()
        .map(|value| Record {
            timestamp_ms: 1,
            value: Some(Bytes::copy_from_slice(value)),
            ..Record::default()
        })
        .collect();
    encode_batch(&records, producer).unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) fn produce(partition: &TopicPartition, acks: Acks, records: Bytes) -> Request {
    Request::Produce {
        partition: partition.clone(),
        acks,
        records,
    }
}

/// The first frames of a client as they are on the wire: magic, version, and a hello that takes frames up to 32 MiB.
fn greeting() -> Vec<u8> {
    let mut bytes = b"LGBOOM\x00\x01".to_vec();
    let hello = [0, 252, 2, 0, 0, 0];
    bytes.extend(frame(1, 0, 0, &hello, &[]));
    bytes
}

/// A frame; `claimed` bytes are added to its true header length.
fn frame(kind: u8, channel: u8, claimed: u32, header: &[u8], body: &[u8]) -> Vec<u8> {
    let short = |length: usize| u32::try_from(length).expect("a short frame");
    let mut bytes = short(14 + header.len() + body.len()).to_be_bytes().to_vec();
    bytes.extend([kind, channel]);
    bytes.extend(7_u64.to_be_bytes());
    bytes.extend((short(header.len()) + claimed).to_be_bytes());
    bytes.extend([header, body].concat());
    bytes
}

/// Byte streams that no client would send, each with its name; after the last byte the sender stays connected.
pub(crate) fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let after_greeting = |bytes: Vec<u8>| [greeting(), bytes].concat();
    let noise: Vec<u8> = (0_u32..64 << 10)
        .map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let endless = |length: u32| [length.to_be_bytes().to_vec(), noise.clone()].concat();
    vec![
        ("noise", noise.clone()),
        (
            "another protocol",
            b"GET / HTTP/1.1\r\nHost: logboom\r\n\r\n".to_vec(),
        ),
        (
            "another version",
            b"LGBOOM\xff\xff\x00\x00\x00\x10".to_vec(),
        ),
        (
            "a greeting of 4 GiB",
            [b"LGBOOM\x00\x01".to_vec(), endless(u32::MAX)].concat(),
        ),
        (
            "an unreadable hello",
            [b"LGBOOM\x00\x01".to_vec(), frame(1, 0, 0, &[9; 40], &[])].concat(),
        ),
        ("a frame of 4 GiB", after_greeting(endless(u32::MAX))),
        (
            "a frame just above the limit",
            after_greeting(endless((32 << 20) + 1)),
        ),
        ("a frame too short to be one", after_greeting(endless(3))),
        (
            "an unknown kind",
            after_greeting(frame(77, 2, 0, &[1], &[])),
        ),
        (
            "an unknown channel",
            after_greeting(frame(3, 77, 0, &[1], &[])),
        ),
        (
            "a header longer than its frame",
            after_greeting(frame(3, 2, 1_000, &[1], &[])),
        ),
        ("a second greeting", [greeting(), greeting()].concat()),
    ]
}

/// A request whose list claims 2⁶⁰ items, and one that is no request.
pub(crate) fn unreadable_requests() -> Vec<(&'static str, Vec<u8>)> {
    let endless = [10, 1, 4, 1, 253, 0x10, 0, 0, 0, 0, 0, 0, 0];
    vec![
        (
            "a list of 2^60 items",
            [greeting(), frame(3, 2, 0, &endless, &[])].concat(),
        ),
        (
            "no request",
            [greeting(), frame(3, 2, 0, &[0xff; 30], &[])].concat(),
        ),
    ]
}

/// Sends `bytes` and answers with what came back until the broker hung up, and how long that took.
pub(crate) async fn send_until_closed(
    address: &str,
    bytes: &[u8],
) -> anyhow::Result<(Vec<u8>, Duration)> {
    let began = Instant::now();
    let mut stream = TcpStream::connect(address).await?;
    // The broker may hang up while we are still sending.
    stream.write_all(bytes).await.ok();
    let mut said = Vec::new();
    let read = tokio::time::timeout(HANG_UP, stream.read_to_end(&mut said)).await;
    // A reset is a way of hanging up too.
    read.map_err(|_| anyhow::anyhow!("still connected after {HANG_UP:?}"))?
        .ok();
    Ok((said, began.elapsed()))
}

/// Sends `bytes` and answers with what came back before `enough` bytes or a second of silence.
pub(crate) async fn send_and_listen(
    address: &str,
    bytes: &[u8],
    marker: &str,
) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(bytes).await?;
    let mut said = Vec::new();
    let mut buffer = [0; 4_096];
    let deadline = Instant::now() + HANG_UP;
    while !String::from_utf8_lossy(&said).contains(marker) {
        let count = tokio::time::timeout_at(deadline, stream.read(&mut buffer)).await??;
        anyhow::ensure!(
            count > 0,
            "closed after {:?}",
            String::from_utf8_lossy(&said)
        );
        said.extend(buffer.get(..count).unwrap_or_default());
    }
    Ok(said)
}
