//! `logboom produce` and `logboom consume`: lines in, lines out.

use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use futures_util::{FutureExt, StreamExt};
use logboom::client::{
    Consumer, ConsumerRecord, From, Partitions, Producer, ProducerConfig, Record, Until,
};
use logboom::types::{Acks, Error, Offset, TopicName};

use super::lines::Lines;
use super::{ClusterAddress, Usage, waiting};

/// Longest line that is read: what the largest `max.message.bytes` takes.
const LINE_BYTES_MAX: usize = 16 << 20;

#[derive(Debug, Args)]
pub(super) struct ProduceArgs {
    /// The topic
    topic: String,
    /// Splits each line at the first S into key and value
    #[arg(long, value_name = "S")]
    key_separator: Option<String>,
    /// What an acknowledgement means: committed and on min.insync.replicas, committed, nothing
    #[arg(long, value_enum, default_value = "all")]
    acks: AcksArg,
    /// All lines to this partition
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    partition: Option<u32>,
    #[command(flatten)]
    cluster: ClusterAddress,
}

/// What `--acks` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum AcksArg {
    All,
    Leader,
    None,
}

impl AcksArg {
    pub(super) fn acks(self) -> Acks {
        match self {
            Self::All => Acks::All,
            Self::Leader => Acks::Leader,
            Self::None => Acks::None,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct ConsumeArgs {
    /// The topic
    topic: String,
    /// Only this partition
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    partition: Option<u32>,
    /// Where to begin
    #[arg(long, value_name = "earliest|latest|OFFSET", value_parser = parse_from, default_value = "earliest", allow_negative_numbers = true)]
    from: From,
    /// Stop after N records
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max: Option<u64>,
    /// Go on at the end and wait for more
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    cluster: ClusterAddress,
}

fn parse_from(text: &str) -> Result<From, String> {
    match text {
        "earliest" => Ok(From::Earliest),
        "latest" => Ok(From::Latest),
        number => {
            let offset = number
                .parse()
                .map_err(|_| "use earliest, latest or an offset")?;
            Ok(From::Offset(Offset(offset)))
        }
    }
}

fn check_topic(name: &str) -> anyhow::Result<()> {
    TopicName::new(name).map_err(|error| Usage(error.to_string()))?;
    Ok(())
}

pub(super) async fn produce(args: ProduceArgs) -> anyhow::Result<ExitCode> {
    check_topic(&args.topic)?;
    if args.key_separator.as_deref() == Some("") {
        return Err(
            Usage("--key-separator is empty; use at least one character".to_owned()).into(),
        );
    }
    let client = args.cluster.connect().await?;
    let default = ProducerConfig::default();
    let config = ProducerConfig {
        acks: args.acks.acks(),
        delivery_timeout: args.cluster.patience(default.delivery_timeout),
        ..default
    };
    let within = config.delivery_timeout;
    let producer = Producer::new(&client, &args.topic, config)?;
    let mut lines = Lines::read(io::stdin(), LINE_BYTES_MAX);
    let work = async {
        let sent = send_all(&producer, &args, &mut lines).await;
        // What was sent is seen to its end, whatever went wrong behind it.
        (sent, producer.close().await)
    };
    let what = format!("records to be appended to {}", args.topic);
    let (sent, acknowledged) = waiting::progress(&client, &what, within, work).await;
    sent?;
    acknowledged.map_err(|error| anyhow::anyhow!("not every record was acknowledged: {error}"))?;
    Ok(ExitCode::SUCCESS)
}

async fn send_all(
    producer: &Producer,
    args: &ProduceArgs,
    lines: &mut Lines,
) -> anyhow::Result<()> {
    let mut number = 0_u64;
    // A topic that does not exist is reported even when there is nothing to send.
    producer.ready().await?;
    while let Some(line) = lines.next().await? {
        number += 1;
        let length = line.len();
        let record = match args.key_separator.as_deref() {
            None => Record::new(line),
            Some(separator) => split(&line, separator.as_bytes()).ok_or_else(|| {
                anyhow::anyhow!("line {number} does not contain the key separator {separator:?}")
            })?,
        };
        let delivery = match args.partition {
            Some(partition) => producer.send_to(partition, record).await,
            None => producer.send(record).await,
        };
        // Failures are seen by the flush; nothing more is sent behind the first one.
        drop(delivery.map_err(|error| refused(number, length, &args.topic, &error))?);
        if producer.has_failed() {
            return Ok(());
        }
    }
    Ok(())
}

/// Why a line of `length` bytes was not sent.
fn refused(number: u64, length: usize, topic: &str, error: &Error) -> anyhow::Error {
    let Error::RecordTooLarge { size, max } = error else {
        return anyhow::anyhow!("line {number}: {error}");
    };
    let larger = usize::try_from(*size).is_ok_and(|size| size <= LINE_BYTES_MAX);
    let larger = larger.then(|| {
        format!(", or use a topic that was created with --config max.message.bytes={size} or more")
    });
    anyhow::anyhow!(
        "line {number} has {length} bytes, {size} as a batch, and max.message.bytes of {topic} is {max}: split the line{}",
        larger.unwrap_or_default()
    )
}

/// Key and value of a line.
fn split(line: &Bytes, separator: &[u8]) -> Option<Record> {
    let at = line
        .windows(separator.len())
        .position(|window| window == separator)?;
    let value = line.slice(at + separator.len()..);
    Some(Record::new(value).with_key(line.slice(..at)))
}

pub(super) async fn consume(args: ConsumeArgs) -> anyhow::Result<ExitCode> {
    check_topic(&args.topic)?;
    let client = args.cluster.connect().await?;
    let partitions = args
        .partition
        .map_or(Partitions::All, |one| Partitions::List(vec![one]));
    let until = if args.follow {
        Until::Forever
    } else {
        Until::End
    };
    let consumer = Consumer::new(&client, &args.topic, partitions, args.from).until(until);
    let mut stream = consumer.stream();
    let mut out = BufWriter::with_capacity(64 << 10, io::stdout());
    let mut left = args.max.unwrap_or(u64::MAX);
    let what = format!("records of {}", args.topic);
    while left > 0 {
        // Before waiting, what is here is shown.
        let next = if let Some(next) = stream.next().now_or_never() {
            next
        } else {
            out.flush()?;
            waiting::reading(&client, &what, stream.next()).await
        };
        match next {
            Some(Ok(record)) => write_value(&mut out, &record)?,
            Some(Err(error)) if args.follow && error.is_retriable() => {
                tracing::warn!("{error}; going on");
                continue;
            }
            Some(Err(error)) => {
                out.flush()?;
                return Err(advice(error));
            }
            None => break,
        }
        left -= 1;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

fn write_value(out: &mut impl Write, record: &ConsumerRecord) -> io::Result<()> {
    out.write_all(record.value.as_deref().unwrap_or_default())?;
    out.write_all(b"\n")
}

fn advice(error: Error) -> anyhow::Error {
    match error {
        Error::OffsetOutOfRange { .. } => anyhow::anyhow!("{error}; use --from earliest or latest"),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a line that is refused is named, with the limit and what can be done, if anything can. Method: what a producer may say.
    #[test]
    fn refused_lines_are_named() {
        let too_large = |size| Error::RecordTooLarge { size, max: 1_024 };
        for (error, said) in [
            (
                too_large(2_072),
                "line 2 has 2000 bytes, 2072 as a batch, and max.message.bytes of t is 1024: split the line, or use a topic that \
                 was created with --config max.message.bytes=2072 or more",
            ),
            (
                too_large(17 << 20),
                "line 2 has 2000 bytes, 17825792 as a batch, and max.message.bytes of t is 1024: split the line",
            ),
            (
                Error::ShuttingDown,
                "line 2: the broker is shutting down; use another one",
            ),
        ] {
            assert_eq!(refused(2, 2_000, "t", &error).to_string(), said);
        }
    }

    /// Goal: keys are split off at the first separator, byte for byte. Method: a table.
    #[test]
    fn keys_are_split_off() {
        for (line, separator, key, value) in [
            ("k:v", ":", "k", "v"),
            ("k::v", ":", "k", ":v"),
            ("k::v", "::", "k", "v"),
            (":", ":", "", ""),
        ] {
            let record = split(&Bytes::from(line), separator.as_bytes()).unwrap();
            assert_eq!(record.key.unwrap(), key, "{line}");
            assert_eq!(record.value.unwrap(), value, "{line}");
        }
        assert!(split(&Bytes::from_static(b"\xff no"), b":").is_none());
    }
}
