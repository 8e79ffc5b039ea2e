//! What `logboom bench` is asked for: its words, checked, and what each workload makes of them.
//!
//! Owns the defaults. A workload is defined by its defaults; every bound of it can be named.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use logboom::client::NewTopic;
use logboom::types::Acks;
use serde_json::{Value, json};

use super::super::records::AcksArg;
use super::super::{ClusterAddress, Usage};
use super::load::How;
use super::verify::STAMP_BYTES;

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// W1 batches of 1 KiB records; W2 64 clients that wait for each acknowledgement; W3 one such client; W4 the leader killed under load; W5 partitions at rest; W6 reading back
    #[arg(
        value_name = "W1|W2|W3|W4|W5|W6|all",
        value_enum,
        ignore_case = true,
        required = true,
        hide_possible_values = true
    )]
    workloads: Vec<Workload>,
    /// A cluster that is up (the environment is not looked at); brokers of its own without it
    #[arg(long, value_name = "HOST:PORT[,…]")]
    bootstrap: Option<String>,
    /// How many brokers of its own
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=9))]
    brokers: u32,
    /// Seconds that are measured, in each run
    #[arg(long, value_name = "S", default_value_t = 15, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=600))]
    duration: u32,
    /// Seconds of load before that, which are not measured
    #[arg(long, value_name = "S", default_value_t = 3, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(0..=600))]
    warmup: u32,
    /// Runs of each workload; told are their median, least and greatest
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Bytes of a record's value [default: 1024 in W1 and W6, else 100]
    #[arg(long, value_name = "B", allow_negative_numbers = true)]
    record_size: Option<u32>,
    /// Bytes of the records of one batch, in W1 and W6
    #[arg(long, value_name = "B", default_value_t = 64 << 10, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=15 << 20))]
    batch_bytes: u32,
    /// Clients at the same time [default: 1; in W2 64, in W4 8 and at least one for each partition]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: Option<u32>,
    /// Connections that the clients share [default: one each, at most 64]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connections: Option<u32>,
    /// Partitions of the topic
    #[arg(long, value_name = "P", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    partitions: u32,
    /// Copies of each partition [default: 3, or as many as there are brokers]
    #[arg(long, value_name = "R", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=9))]
    replication_factor: Option<u32>,
    /// Data replicas that must have a record before acks=all [default: 2, or 1 with two copies or one]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=9))]
    min_insync_replicas: Option<u32>,
    /// What an acknowledgement means: committed and on min.insync.replicas, committed, nothing
    #[arg(long, value_enum, default_value = "all")]
    acks: AcksArg,
    /// Batches of one client without an answer, in W1 and W6
    #[arg(long, value_name = "N", default_value_t = 32, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    in_flight: u32,
    /// In W1 and W6 send records one by one through the producer that makes the batches
    #[arg(long)]
    single_records: bool,
    /// How long that producer waits for a batch to become full, in ms
    #[arg(long, value_name = "MS", default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(0..=60_000))]
    linger_ms: u32,
    /// Bytes that it takes before it makes senders wait
    #[arg(long, value_name = "B", default_value_t = 32 << 20, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    buffer_bytes: u32,
    /// Records a second, by a timetable that does not wait for answers; as fast as answers come without it
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    rate: Option<f64>,
    /// Kills in each run of W4
    #[arg(long, value_name = "N", default_value_t = 20, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    kills: u32,
    /// Load between two kills, with all replicas in sync, in ms
    #[arg(long, value_name = "MS", default_value_t = 1_000, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(0..=60_000))]
    kill_pause_ms: u32,
    /// Numbers of partitions in W5, each on a new cluster
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [100, 500, 1_000], allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    idle_partitions: Vec<u32>,
    /// Longest wait for what the cluster does by itself, in seconds
    #[arg(long, value_name = "S", default_value_t = 120, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    patience: u32,
    /// Seconds for each of the machine's own limits, measured before each workload; 0: not measured
    #[arg(long, value_name = "S", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(0..=60))]
    limits_seconds: u32,
    /// A new or empty directory for the brokers' data, on the disk that is meant; a temporary one without it
    #[arg(long, value_name = "DIR")]
    pub(super) data: Option<PathBuf>,
    /// The result as one JSON object on the last line
    #[arg(long)]
    pub(super) json: bool,
    /// Draw the result
    #[arg(long, value_name = "FILE.svg")]
    pub(super) plot: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Workload {
    #[value(name = "W1")]
    W1,
    #[value(name = "W2")]
    W2,
    #[value(name = "W3")]
    W3,
    #[value(name = "W4")]
    W4,
    #[value(name = "W5")]
    W5,
    #[value(name = "W6")]
    W6,
    #[value(name = "all")]
    All,
}

impl Workload {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::W1 => "W1",
            Self::W2 => "W2",
            Self::W3 => "W3",
            Self::W4 => "W4",
            Self::W5 => "W5",
            Self::W6 => "W6",
            Self::All => "all",
        }
    }

    /// Whether it hurts or watches the brokers' processes.
    fn needs_own_brokers(self) -> bool {
        matches!(self, Self::W4 | Self::W5)
    }

    /// Whether it writes batches and not single operations.
    fn writes_batches(self) -> bool {
        matches!(self, Self::W1 | Self::W6)
    }
}

/// Times and numbers that are the same for all workloads.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) jobs: Vec<Job>,
    pub(super) named: Option<Vec<String>>,
    pub(super) brokers: u32,
    pub(super) runs: u32,
    pub(super) warmup: Duration,
    pub(super) duration: Duration,
    pub(super) patience: Duration,
    pub(super) limits: Duration,
}

/// One workload to be run.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) workload: Workload,
    pub(super) title: String,
    pub(super) clients: u32,
    pub(super) connections: u32,
    pub(super) partitions: u32,
    pub(super) copies: u32,
    pub(super) min_insync_replicas: u32,
    pub(super) record_bytes: usize,
    pub(super) how: How,
    pub(super) acks: Acks,
    /// Operations a second.
    pub(super) rate: Option<f64>,
    pub(super) kills: u32,
    pub(super) kill_pause: Duration,
    /// `max.message.bytes` that the batches need.
    message_bytes_max: u32,
    pub(super) settings: Value,
}

impl Job {
    /// The topic that the workload needs.
    pub(super) fn topic(&self, name: &str) -> NewTopic {
        let topic = NewTopic::new(name, self.partitions, self.copies);
        topic
            .with_config("min.insync.replicas", &self.min_insync_replicas.to_string())
            .with_config("max.message.bytes", &self.message_bytes_max.to_string())
    }

    /// How latency is measured.
    pub(super) fn latency(&self) -> Option<String> {
        let of = match self.how {
            How::Producer { .. } => "of a record, from its send to its acknowledgement",
            How::Batches { records: 1, .. } => "of a record and its acknowledgement",
            How::Batches { .. } => "of a batch and its acknowledgement",
        };
        let how = match self.rate {
            Some(_) => {
                "from the moment it was to begin by the timetable: what waits behind a slow one counts (corrected for coordinated omission)"
            }
            None => {
                "from when it began; a client that waits begins nothing, so stalls are met by few (closed loop; --rate corrects for that)"
            }
        };
        let measured = !matches!(self.workload, Workload::W4 | Workload::W5 | Workload::W6);
        measured.then(|| format!("{of}, {how}"))
    }
}

impl Settings {
    pub(super) fn of(args: &BenchArgs) -> Result<Self, Usage> {
        let wrong = |text: String| Err(Usage(text));
        let named = args.bootstrap.as_ref().map(|bootstrap| {
            let address = ClusterAddress {
                bootstrap: bootstrap.clone(),
                timeout: None,
            };
            address.addresses()
        });
        let mut workloads = Vec::new();
        for workload in &args.workloads {
            let these: &[Workload] = match workload {
                Workload::All => &[
                    Workload::W1,
                    Workload::W2,
                    Workload::W3,
                    Workload::W4,
                    Workload::W5,
                    Workload::W6,
                ],
                one => std::slice::from_ref(one),
            };
            for one in these {
                let fits = named.is_none() || !one.needs_own_brokers();
                if !fits && *workload != Workload::All {
                    return wrong(format!(
                        "{} needs brokers of its own, whose processes it sees; leave out --bootstrap",
                        one.name()
                    ));
                }
                if fits && !workloads.contains(one) {
                    workloads.push(*one);
                }
            }
        }
        let copies = args.replication_factor.unwrap_or(args.brokers.min(3));
        if named.is_none() && copies > args.brokers {
            return wrong(format!(
                "--replication-factor: {copies} copies need as many brokers, and there are {}",
                args.brokers
            ));
        }
        let least = args
            .min_insync_replicas
            .unwrap_or(if copies > 2 { 2 } else { 1 });
        if least > copies {
            return wrong(format!(
                "--min-insync-replicas: {least} of {copies} copies cannot be; use at most {copies}"
            ));
        }
        if args.rate.is_some_and(|rate| !(1.0..=1e8).contains(&rate)) {
            return wrong("--rate: use 1 to 100000000 records a second".to_owned());
        }
        if workloads.contains(&Workload::W4) && args.acks == AcksArg::None {
            return wrong(
                "--acks none: nothing says when W4 is acknowledged again; use all or leader"
                    .to_owned(),
            );
        }
        if workloads.contains(&Workload::W4) && (copies < 2 || args.brokers < 3) {
            return wrong("W4 needs 2 copies and 3 brokers to go on without one of them; see --brokers and --replication-factor".to_owned());
        }
        if workloads.contains(&Workload::W4) && args.acks == AcksArg::All && least >= copies {
            return wrong(format!(
                "--min-insync-replicas: with {least} of {copies} nothing is acknowledged while a broker is dead, and W4 never ends; use at most {}",
                copies - 1
            ));
        }
        if let Some(plot) = &args.plot {
            let parent = plot
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            if parent.is_some_and(|parent| !parent.is_dir()) {
                return wrong(format!(
                    "--plot {}: there is no such directory",
                    plot.display()
                ));
            }
        }
        let mut jobs = Vec::new();
        for workload in workloads {
            let sizes: &[u32] = match workload {
                Workload::W5 => &args.idle_partitions,
                _ => std::slice::from_ref(&args.partitions),
            };
            for partitions in sizes {
                jobs.push(job(args, workload, *partitions, copies, least)?);
            }
        }
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Ok(Self {
            jobs,
            named,
            brokers: args.brokers,
            runs: args.runs,
            warmup: seconds(args.warmup),
            duration: seconds(args.duration),
            patience: seconds(args.patience),
            limits: seconds(args.limits_seconds),
        })
    }
}

fn job(
    args: &BenchArgs,
    workload: Workload,
    partitions: u32,
    copies: u32,
    least: u32,
) -> Result<Job, Usage> {
    let batches = workload.writes_batches();
    let default = if batches { 1_024 } else { 100 };
    let record_bytes = args.record_size.unwrap_or(default);
    let largest = if batches { args.batch_bytes } else { 15 << 20 };
    let stamp = u32::try_from(STAMP_BYTES).unwrap_or(u32::MAX);
    if !(stamp..=largest).contains(&record_bytes) {
        return Err(Usage(format!(
            "--record-size: use {stamp} bytes, which say what the record is, to {largest}{}",
            if batches {
                ", the bytes of a batch"
            } else {
                ""
            }
        )));
    }
    let mut clients = args.clients.unwrap_or(match workload {
        Workload::W2 => 64,
        Workload::W4 => 8,
        _ => 1,
    });
    if workload == Workload::W4 {
        // Every partition has its clients, so that each is asked all the time.
        clients = clients.div_ceil(partitions).max(1) * partitions;
    }
    let wide = |bytes: u32| usize::try_from(bytes).unwrap_or(usize::MAX);
    let in_a_batch = if batches {
        args.batch_bytes / record_bytes
    } else {
        1
    };
    let how = if batches && args.single_records {
        How::Producer {
            batch_bytes: wide(args.batch_bytes),
            linger: Duration::from_millis(args.linger_ms.into()),
            buffer_bytes: wide(args.buffer_bytes),
        }
    } else {
        How::Batches {
            records: in_a_batch,
            in_flight: if batches { wide(args.in_flight) } else { 1 },
        }
    };
    let s = |count: u32| if count == 1 { "" } else { "s" };
    let (p, c) = (s(partitions), s(clients));
    let w = if clients == 1 { "s" } else { "" };
    let title = match (workload, how) {
        (Workload::W5, _) => format!("{partitions} partition{p} at rest"),
        (Workload::W4, _) => format!(
            "{} kills of the leader's process, {clients} client{c} that wait{w} for each acknowledgement, records of {record_bytes} B, {partitions} partition{p}",
            args.kills
        ),
        (_, How::Producer { .. }) => format!(
            "{}{clients} producer{c}, records of {record_bytes} B sent one by one, batches of up to {} B, {partitions} partition{p}",
            reading(workload),
            args.batch_bytes
        ),
        (Workload::W1 | Workload::W6, _) => format!(
            "{}{clients} producer{c}, batches of {in_a_batch} records of {record_bytes} B, {} in flight, {partitions} partition{p}",
            reading(workload),
            args.in_flight
        ),
        _ => format!(
            "{clients} client{c} that wait{w} for each acknowledgement, records of {record_bytes} B, {partitions} partition{p}"
        ),
    };
    let rate = args.rate.map(|rate| match how {
        How::Producer { .. } => rate,
        How::Batches { records, .. } => rate / f64::from(records.max(1)),
    });
    // What a record and a batch have beside the values; see the limits of `max.message.bytes`.
    let in_bytes = in_a_batch
        .max(1)
        .saturating_mul(record_bytes.saturating_add(48));
    let message_bytes_max = in_bytes.saturating_add(1_024).clamp(1 << 20, 16 << 20);
    if in_bytes > message_bytes_max {
        return Err(Usage(
            "--batch-bytes: so many small records do not fit into a message of 16 MiB; use fewer bytes".to_owned(),
        ));
    }
    let connections = args.connections.unwrap_or(clients.min(64)).min(clients);
    let acks = args.acks.acks();
    let settings = json!({
        "clients": clients,
        "connections": connections,
        "partitions": partitions,
        "replication_factor": copies,
        "min_insync_replicas": least,
        "acks": format!("{acks:?}").to_lowercase(),
        "record_bytes": record_bytes,
        "batch_bytes": batches.then_some(args.batch_bytes),
        "single_records": batches && args.single_records,
        "in_flight": (batches && !args.single_records).then_some(args.in_flight),
        "rate_records_per_second": args.rate,
        "warmup_seconds": args.warmup,
        "duration_seconds": args.duration,
        "kills": (workload == Workload::W4).then_some(args.kills),
        "brokers": args.bootstrap.is_none().then_some(args.brokers),
    });
    Ok(Job {
        workload,
        title,
        clients,
        connections,
        partitions,
        copies,
        min_insync_replicas: least,
        record_bytes: wide(record_bytes),
        how,
        acks,
        rate,
        kills: args.kills,
        kill_pause: Duration::from_millis(args.kill_pause_ms.into()),
        message_bytes_max,
        settings,
    })
}

fn reading(workload: Workload) -> &'static str {
    match workload {
        Workload::W6 => "one consumer reads what was written by ",
        _ => "",
    }
}
