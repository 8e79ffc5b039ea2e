//! What the machine itself can do, measured beside every workload: no log is faster than the disk and the network below it.
//!
//! Owns the three raw measurements and the description of the machine. They run on blocking threads, one after the other, while
//! no broker works.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use logboom::runtime::spawn_blocking;
use rustix::fs::statfs;
use serde::Serialize;
use tokio::time::Instant;

use super::figures::{Latencies, proc_field};

/// One append of the measurement of `fdatasync`.
const APPEND_BYTES: usize = 4 << 10;
/// One write of the sequential measurement, how many of them are synced together, and after how many the file begins anew.
const WRITE_BYTES: usize = 1 << 20;
const WRITES_A_SYNC: u32 = 16;
const WRITES_A_FILE: u32 = 512;
/// What goes there and back over loopback.
const MESSAGE_BYTES: usize = 100;
/// What `statfs` says of file systems in memory: tmpfs, ramfs.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// The limits and the machine they belong to.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) cores: usize,
    pub(super) memory_megabytes: u64,
    pub(super) kernel: String,
    /// Processes that wanted to run in the last minute, before anything was measured.
    pub(super) load_average: f64,
    /// The data is on a file system in memory: an `fdatasync` costs nothing there and keeps nothing.
    pub(super) data_in_memory: bool,
    pub(super) limits: Option<Limits>,
}

/// The raw figures.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Limits {
    pub(super) fdatasync_4kib_p50_us: f64,
    pub(super) fdatasync_4kib_p99_us: f64,
    pub(super) write_and_sync_megabytes_per_second: f64,
    pub(super) loopback_round_trip_p50_us: f64,
}

impl Machine {
    /// Looks at the machine and measures for `each` per figure, in `directory`; nothing is measured when that is zero.
    pub(super) async fn measure(directory: &Path, each: Duration) -> anyhow::Result<Self> {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpus = read("/proc/cpuinfo");
        let model = cpus
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        let model = model.map_or("unknown", |text| text.trim_start_matches([' ', '\t', ':']));
        let load = read("/proc/loadavg");
        let load = load.split(' ').next().and_then(|text| text.parse().ok());
        let kind = statfs(directory).map(|found| u64::try_from(found.f_type).unwrap_or(0));
        let limits = if each.is_zero() {
            None
        } else {
            let path = directory.to_owned();
            let measured = spawn_blocking(move || Limits::measure(&path, each)).await;
            let measured = measured.context("the measurement of the machine ended early")?;
            Some(measured.context("the machine's limits cannot be measured")?)
        };
        Ok(Self {
            cpu: model.to_owned(),
            cores: cpus
                .lines()
                .filter(|line| line.starts_with("processor"))
                .count(),
            memory_megabytes: proc_field(&read("/proc/meminfo"), "MemTotal:") / 1_000,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_average: load.unwrap_or(0.0),
            data_in_memory: kind.is_ok_and(|kind| IN_MEMORY.contains(&kind)),
            limits,
        })
    }

    /// For people, a line or two.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![format!(
            "machine: {} × {}, {} MB, Linux {}, load {:.2}",
            self.cores, self.cpu, self.memory_megabytes, self.kernel, self.load_average
        )];
        if let Some(limits) = &self.limits {
            lines.push(format!(
                "its limits: append 4 KiB and fdatasync p50 {:.0} µs, p99 {:.0} µs; write and sync {:.0} MB/s; loopback round trip p50 {:.0} µs",
                limits.fdatasync_4kib_p50_us,
                limits.fdatasync_4kib_p99_us,
                limits.write_and_sync_megabytes_per_second,
                limits.loopback_round_trip_p50_us
            ));
        }
        if self.data_in_memory {
            lines.push("THE DATA IS ON A FILE SYSTEM IN MEMORY: syncs cost nothing; name a directory on a disk with --data".to_owned());
        }
        lines.push(String::new());
        lines.join("\n")
    }
}

impl Limits {
    fn measure(directory: &Path, each: Duration) -> io::Result<Self> {
        let path = directory.join("limits");
        let appends = appends(&path, each);
        let written = writes(&path, each);
        fs::remove_file(&path)?;
        let (appends, written) = (appends?, written?);
        let trips = round_trips(each)?;
        Ok(Self {
            fdatasync_4kib_p50_us: appends.at_us(0.5),
            fdatasync_4kib_p99_us: appends.at_us(0.99),
            write_and_sync_megabytes_per_second: written,
            loopback_round_trip_p50_us: trips.at_us(0.5),
        })
    }
}

fn appends(path: &Path, each: Duration) -> io::Result<Latencies> {
    let mut file = File::create(path)?;
    let bytes = [0x5a; APPEND_BYTES];
    let mut times = Latencies::default();
    let end = Instant::now() + each;
    loop {
        let began = Instant::now();
        if began >= end {
            return Ok(times);
        }
        file.write_all(&bytes)?;
        file.sync_data()?;
        times.record(began.elapsed());
    }
}

/// MB a second, in a file that grows.
fn writes(path: &Path, each: Duration) -> io::Result<f64> {
    let bytes = vec![0xa5; WRITE_BYTES];
    let mut file = File::create(path)?;
    let (mut written, began) = (0_u32, Instant::now());
    while began.elapsed() < each || written == 0 {
        if written > 0 && written % WRITES_A_FILE == 0 {
            file = File::create(path)?;
        }
        for _ in 0..WRITES_A_SYNC {
            file.write_all(&bytes)?;
            written += 1;
        }
        file.sync_data()?;
    }
    let megabyte = f64::from(u32::try_from(WRITE_BYTES).unwrap_or(u32::MAX)) / 1e6;
    Ok(f64::from(written) * megabyte / began.elapsed().as_secs_f64())
}

fn round_trips(each: Duration) -> io::Result<Latencies> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    // It ends when the other side has hung up.
    drop(spawn_blocking(move || -> io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut message = [0; MESSAGE_BYTES];
        loop {
            stream.read_exact(&mut message)?;
            stream.write_all(&message)?;
        }
    }));
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE_BYTES];
    let mut times = Latencies::default();
    let end = Instant::now() + each;
    loop {
        let began = Instant::now();
        if began >= end {
            return Ok(times);
        }
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        times.record(began.elapsed());
    }
}
