//! The brokers of a run, the network between them, and their disks.
//!
//! Owns the processes, the proxies and the side files of the disks: what can be broken, and how it is mended. When and why is
//! decided elsewhere. None of the processes outlives this one, not even a paused one.

use std::ffi::OsString;
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use logboom::testkit::{AfterCut, FaultDisk, Links, Lost, Proxy};
use logboom::types::BrokerId;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use super::super::children::{BrokerProcess, Brokers, Ports};

/// Below it a broker refuses to append, in bytes.
pub(super) const RESERVE_BYTES: u64 = 64 << 20;
/// Small, so that a short run makes and removes segments.
const SEGMENT_BYTES: u64 = 2 << 20;
/// Leaders stay where they were moved for so long, in ms, so that a transfer has something to give back.
const LEADER_DELAY_MS: u64 = 10_000;
/// Longest wait for a connection on loopback.
const CONNECT: Duration = Duration::from_millis(100);
/// How often a process is looked at while its end is waited for.
const LOOK: Duration = Duration::from_millis(10);

/// See the module. Brokers are named by their numbers, 1 to N.
pub(super) struct Field {
    pub(super) brokers: Brokers,
    pub(super) links: Links,
    /// Taking connections as long as it lives.
    _proxies: Vec<Proxy>,
    disks: Vec<FaultDisk>,
    rotten: PathBuf,
    thrown_away: u32,
}

impl Field {
    /// Everything but the processes. Without `fault_disks` only the network can be hurt.
    pub(super) async fn prepare(
        count: u32,
        directory: &Path,
        seed: u64,
        fault_disks: bool,
    ) -> anyhow::Result<Self> {
        // The library compares paths as they are.
        let directory = directory.canonicalize()?;
        let mut brokers = Brokers::prepare(count, &directory, Ports::Free)?;
        let links = Links::seeded(seed);
        links.after_cut(AfterCut::Either);
        let (mut proxies, mut disks) = (Vec::new(), Vec::new());
        for broker in &mut brokers.brokers {
            let upstream = Some(broker.listen.as_str());
            let proxy = Proxy::start(BrokerId(broker.id), "127.0.0.1:0", upstream, &links).await;
            let proxy = proxy.context("cannot start a proxy")?;
            broker.address = proxy.address().to_string();
            proxies.push(proxy);
            for (key, value) in [
                ("--segment-bytes", SEGMENT_BYTES),
                ("--disk-reserve-bytes", RESERVE_BYTES),
                ("--preferred-leader-delay-ms", LEADER_DELAY_MS),
            ] {
                broker.arguments.push(key.into());
                broker.arguments.push(value.to_string().into());
            }
            broker.arguments.push("--die-with-parent".into());
            if fault_disks {
                let side = directory.join("disks").join(broker.id.to_string());
                let disk = FaultDisk::create(&broker.directory, &side);
                let disk = disk.context("cannot prepare the disk faults")?;
                let variables = disk.environment().into_iter();
                let variables = variables.map(|(name, value)| (OsString::from(name), value));
                broker.environment.extend(variables);
                disks.push(disk);
            }
        }
        brokers.introduce();
        Ok(Self {
            brokers,
            links,
            _proxies: proxies,
            disks,
            rotten: directory.join("rotten"),
            thrown_away: 0,
        })
    }

    /// All brokers' numbers.
    pub(super) fn ids(&self) -> Vec<u32> {
        self.brokers.brokers.iter().map(|one| one.id).collect()
    }

    fn index(id: u32) -> usize {
        usize::try_from(id).unwrap_or(usize::MAX).wrapping_sub(1)
    }

    pub(super) fn broker(&mut self, id: u32) -> anyhow::Result<&mut BrokerProcess> {
        let broker = self.brokers.brokers.get_mut(Self::index(id));
        broker.with_context(|| format!("there is no broker {id}"))
    }

    pub(super) fn disk(&self, id: u32) -> anyhow::Result<&FaultDisk> {
        let disk = self.disks.get(Self::index(id));
        disk.with_context(|| format!("broker {id} has no disk that can be hurt"))
    }

    /// `kill -9`, all at once; returns when they are dead.
    pub(super) async fn kill(&mut self, ids: &[u32]) -> anyhow::Result<()> {
        for id in ids {
            let broker = self.broker(*id)?;
            if broker.process().is_some() {
                broker.kill()?;
            }
        }
        for id in ids {
            self.broker(*id)?.wait().await;
        }
        Ok(())
    }

    /// Starts those that do not run.
    pub(super) fn start(&mut self, ids: &[u32]) -> anyhow::Result<()> {
        for id in ids {
            let broker = self.broker(*id)?;
            if broker.process().is_none() {
                broker.start()?;
            }
        }
        Ok(())
    }

    fn signal(&mut self, id: u32, signal: Signal) -> anyhow::Result<()> {
        let process = self.broker(id)?.process();
        let process = process.and_then(|number| i32::try_from(number).ok());
        let process = process.and_then(Pid::from_raw);
        let process = process.with_context(|| format!("broker {id} does not run"))?;
        kill_process(process, signal).with_context(|| format!("cannot signal broker {id}"))
    }

    /// Stops all its threads; its connections stay.
    pub(super) fn pause(&mut self, id: u32) -> anyhow::Result<()> {
        self.signal(id, Signal::STOP)
    }

    pub(super) fn go_on(&mut self, id: u32) -> anyhow::Result<()> {
        self.signal(id, Signal::CONT)
    }

    /// Whether somebody takes connections where the broker listens; it does so once its store is open.
    pub(super) fn serves(&mut self, id: u32) -> anyhow::Result<bool> {
        let address = self.broker(id)?.listen.parse()?;
        Ok(TcpStream::connect_timeout(&address, CONNECT).is_ok())
    }

    /// Why a broker that should run has ended; `None` while it runs, or when it was not to run.
    pub(super) fn ended(&mut self, id: u32) -> anyhow::Result<Option<String>> {
        let error = self.broker(id)?.check().err();
        Ok(error.map(|error| format!("{error:#}")))
    }

    /// Waits for a broker to end by itself; `None` when it does not within the time.
    pub(super) async fn wait_ended(
        &mut self,
        id: u32,
        within: Duration,
    ) -> anyhow::Result<Option<String>> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(why) = self.ended(id)? {
                return Ok(Some(why));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Takes from a dead broker's disk what was not synced.
    pub(super) fn lose_power(&self, id: u32, seed: u64) -> anyhow::Result<Lost> {
        let lost = self.disk(id)?.lose_power(seed.wrapping_add(u64::from(id)));
        lost.with_context(|| format!("cannot take back what broker {id} had not synced"))
    }

    /// Gives a broker that does not run an empty disk; what was on the old one is kept aside.
    pub(super) fn replace_disk(&mut self, id: u32) -> anyhow::Result<()> {
        self.thrown_away += 1;
        fs::create_dir_all(&self.rotten)?;
        let aside = self
            .rotten
            .join(format!("{}-broker-{id}", self.thrown_away));
        let directory = self.broker(id)?.directory.clone();
        fs::rename(&directory, aside)?;
        fs::create_dir(&directory)?;
        if let Some(disk) = self.disks.get(Self::index(id)) {
            disk.forget()?;
        }
        Ok(())
    }

    /// Whether the disks make nothing durable from now on.
    pub(super) fn disks_lie(&self, lie: bool) -> anyhow::Result<()> {
        let mut disks = self.disks.iter();
        Ok(disks.try_for_each(|disk| disk.ignore_syncs(lie))?)
    }

    /// Mends the network and all disks.
    pub(super) fn heal(&mut self) -> anyhow::Result<()> {
        self.links.heal_all();
        for disk in &self.disks {
            disk.limit_free(None)?;
            disk.fail_sync(0)?;
            disk.delay_syncs(Duration::ZERO)?;
        }
        for id in self.ids() {
            if self.broker(id)?.process().is_some() {
                self.go_on(id)?;
            }
        }
        Ok(())
    }

    /// Panics in the brokers' logs.
    pub(super) fn panics(&self) -> Vec<String> {
        let mut found = Vec::new();
        for broker in &self.brokers.brokers {
            let log = fs::read(&broker.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let panics = log.lines().filter(|line| line.contains("panicked at"));
            found.extend(panics.map(|line| format!("broker {}: {line}", broker.id)));
        }
        found
    }
}

/// Flips bits in the files of a directory, chosen by `chance`; names what was hit. Nothing when there is nothing.
pub(super) fn flip_bits(
    directory: &Path,
    flips: u32,
    chance: &mut rand::rngs::StdRng,
) -> anyhow::Result<Vec<String>> {
    use rand::Rng;
    use std::os::unix::fs::FileExt;
    let mut files = Vec::new();
    let mut left = vec![directory.to_owned()];
    while let Some(path) = left.pop() {
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            let len = entry.metadata()?.len();
            if entry.file_type()?.is_dir() {
                left.push(entry.path());
            } else if len > 0 {
                files.push((entry.path(), len));
            }
        }
    }
    files.sort();
    let mut hit = Vec::new();
    for _ in 0..flips {
        if files.is_empty() {
            break;
        }
        let chosen = chance.random_range(0..files.len());
        let Some((path, len)) = files.get(chosen) else {
            break;
        };
        let at = chance.random_range(0..*len);
        let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        let flipped = byte.map(|byte| byte ^ (1 << chance.random_range(0..8)));
        file.write_all_at(&flipped, at)?;
        let name = path.strip_prefix(directory).unwrap_or(path);
        hit.push(format!("{}+{at}", name.display()));
    }
    Ok(hit)
}
