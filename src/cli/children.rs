//! Brokers as child processes of this one: they run this executable's `serve`.
//!
//! Owns the children. None outlives this process: they are killed when dropped, and when this process is killed itself the end of
//! their standard input tells them to stop.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use logboom::client::{Client, ClientConfig};
use tokio::process::{Child, Command};
use tokio::time::Instant;

/// How long a broker may take to stop when told to.
const STOP_WITHIN: Duration = Duration::from_secs(15);
/// How long a cluster may take to come up.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// One broker's process.
pub(super) struct BrokerProcess {
    pub(super) id: u32,
    /// Where others reach it.
    pub(super) address: String,
    /// Where it listens: the same, unless something stands in between.
    pub(super) listen: String,
    pub(super) directory: PathBuf,
    pub(super) log: PathBuf,
    /// Its share of the machine's cores: more threads would only wake each other.
    worker_threads: usize,
    /// Further words of its command line.
    pub(super) arguments: Vec<OsString>,
    /// Further variables of its environment.
    pub(super) environment: Vec<(OsString, OsString)>,
    bootstrap: String,
    child: Option<Child>,
}

/// A cluster of them, on loopback.
pub(super) struct Brokers {
    pub(super) brokers: Vec<BrokerProcess>,
}

/// Where brokers listen.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ports {
    /// From this one on.
    From(u16),
    /// Any that are free, and that the kernel does not give to outgoing connections: a broker that is down keeps its port.
    Free,
}

impl Brokers {
    /// Brokers 1 to `count` with their data below `directory`, not yet running.
    pub(super) fn prepare(count: u32, directory: &Path, ports: Ports) -> anyhow::Result<Self> {
        let addresses = addresses(count, ports)?;
        // As many as this process computes on: one for each core.
        let runtime = tokio::runtime::Handle::try_current();
        let cores = runtime.map_or(1, |runtime| runtime.metrics().num_workers());
        let share = (cores / addresses.len().max(1)).max(1);
        let broker = |(id, address): (u32, String)| BrokerProcess {
            id,
            listen: address.clone(),
            address,
            directory: directory.join(format!("broker-{id}")),
            log: directory.join(format!("broker-{id}.log")),
            worker_threads: share,
            arguments: Vec::new(),
            environment: Vec::new(),
            bootstrap: String::new(),
            child: None,
        };
        let mut brokers = Self {
            brokers: addresses.into_iter().map(broker).collect(),
        };
        brokers.introduce();
        Ok(brokers)
    }

    /// Tells all of them where the first five are reached.
    pub(super) fn introduce(&mut self) {
        let first = self.brokers.iter().take(5);
        let listed = first.map(|broker| format!("{}@{}", broker.id, broker.address));
        let bootstrap = listed.collect::<Vec<_>>().join(",");
        for broker in &mut self.brokers {
            broker.bootstrap.clone_from(&bootstrap);
        }
    }

    /// The addresses, as a client wants them.
    pub(super) fn addresses(&self) -> Vec<String> {
        self.brokers
            .iter()
            .map(|broker| broker.address.clone())
            .collect()
    }

    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        self.brokers.iter_mut().try_for_each(BrokerProcess::start)
    }

    /// Fails when a broker that should run has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.brokers.iter_mut().try_for_each(BrokerProcess::check)
    }

    /// A client of the cluster, once all its brokers are in it.
    pub(super) async fn client(&mut self) -> anyhow::Result<Client> {
        let addresses = self.addresses();
        let config = ClientConfig {
            connect_deadline: READY_WITHIN,
            ..ClientConfig::default()
        };
        let deadline = Instant::now() + READY_WITHIN;
        let client = tokio::select! {
            biased;
            client = Client::connect(&addresses, config) => client?,
            ended = self.one_ended() => return Err(ended),
        };
        let wanted = self.brokers.len();
        loop {
            self.check()?;
            let status = client.admin().cluster_status().await;
            // Brokers that went on from older data may still know each other by addresses of that time.
            let alive = status.map_or(0, |status| {
                let here = status.brokers.iter().filter(|one| one.alive);
                here.filter(|one| addresses.contains(&one.address)).count()
            });
            if alive >= wanted {
                return Ok(client);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "only {alive} of {wanted} brokers are in the cluster after {READY_WITHIN:?}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Resolves with the reason when a broker that should run has ended.
    pub(super) async fn one_ended(&mut self) -> anyhow::Error {
        loop {
            if let Err(error) = self.check() {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Whether none is running.
    pub(super) fn all_ended(&self) -> bool {
        self.brokers.iter().all(|broker| broker.child.is_none())
    }

    /// Stops all of them in order, and kills what does not stop.
    pub(super) async fn stop(&mut self) {
        futures_util::future::join_all(self.brokers.iter_mut().map(BrokerProcess::stop)).await;
    }

    /// Kills all of them.
    pub(super) async fn kill(&mut self) {
        for broker in &mut self.brokers {
            if let Some(mut child) = broker.child.take() {
                // It may have ended by itself.
                child.kill().await.ok();
            }
        }
    }
}

impl BrokerProcess {
    /// Starts the process; it continues on the data that is there.
    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        fs::create_dir_all(&self.directory)
            .with_context(|| format!("cannot create {}", self.directory.display()))?;
        let mut options = File::options();
        let log = options.create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("cannot write {}", self.log.display()))?;
        let executable = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(executable);
        for (name, _) in std::env::vars_os() {
            // What configures this process is not meant for the brokers.
            if name.as_encoded_bytes().starts_with(b"LOGBOOM_") {
                command.env_remove(name);
            }
        }
        let child = command
            .args(["serve", "--exit-with-parent"])
            .args(["--worker-threads", &self.worker_threads.to_string()])
            .args(["--broker-id", &self.id.to_string()])
            .args(["--listen", &self.listen])
            .args(["--advertise", &self.address])
            .args(["--bootstrap", &self.bootstrap])
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .args([OsStr::new("--data-dir"), self.directory.as_os_str()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C is for the parent, which stops its children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start broker {}", self.id))?;
        self.child = Some(child);
        Ok(())
    }

    /// `kill -9`.
    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        let id = self.id;
        let child = self.child.as_mut();
        let child = child.with_context(|| format!("broker {id} is not running"))?;
        child
            .start_kill()
            .with_context(|| format!("cannot kill broker {id}"))
    }

    /// The process's number, while there is one.
    pub(super) fn process(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Waits for a process that was killed.
    pub(super) async fn wait(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It is gone either way.
            child.wait().await.ok();
        }
    }

    /// Stops it in order, and kills it when it does not stop.
    pub(super) async fn stop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        // The end of its input is its signal.
        drop(child.stdin.take());
        if tokio::time::timeout(STOP_WITHIN, child.wait())
            .await
            .is_err()
        {
            // It may have ended by itself.
            child.kill().await.ok();
        }
    }

    /// Fails when it should run and has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        let Some(child) = &mut self.child else {
            return Ok(());
        };
        match child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.ended(status)),
            Err(error) => Err(error).context("cannot watch a broker"),
        }
    }

    fn ended(&mut self, status: ExitStatus) -> anyhow::Error {
        self.child = None;
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let last = said
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or_default();
        let (id, log) = (self.id, self.log.display());
        anyhow::anyhow!("broker {id} ended ({status}): {last}; its log is {log}")
    }
}

fn addresses(count: u32, ports: Ports) -> anyhow::Result<Vec<(u32, String)>> {
    let mut held = Vec::new();
    let mut addresses = Vec::new();
    for id in 1..=count {
        // Held until all are known, so that no two are the same; a port in use is found before anything is started.
        let listener = match ports {
            Ports::Free => free_port()?,
            Ports::From(first) => {
                let port = u16::try_from(id - 1)
                    .ok()
                    .and_then(|step| first.checked_add(step))
                    .context("the ports would go beyond 65535; use a lower --port")?;
                TcpListener::bind(("127.0.0.1", port)).with_context(|| {
                    format!("port {port} of 127.0.0.1 cannot be used; use another --port")
                })?
            }
        };
        addresses.push((id, listener.local_addr()?.to_string()));
        held.push(listener);
    }
    Ok(addresses)
}

/// Below those that Linux gives to outgoing connections.
const PORTS: std::ops::Range<u16> = 10_000..32_000;
/// Free ones that are looked for before the search is given up.
const PORTS_TRIED: u32 = 1_000;

fn free_port() -> anyhow::Result<TcpListener> {
    let span = u64::from(PORTS.end - PORTS.start);
    for _ in 0..PORTS_TRIED {
        // By chance, so that commands started side by side rarely meet.
        let step = u16::try_from(logboom::runtime::random_seed() % span)?;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", PORTS.start + step)) {
            return Ok(listener);
        }
    }
    anyhow::bail!("found no free port from {} to {}", PORTS.start, PORTS.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: brokers get different ports, a taken one is named. Method: ask for some, hold one.
    #[test]
    fn ports_are_free_and_different() {
        let found = addresses(3, Ports::Free).unwrap();
        let different: std::collections::BTreeSet<_> = found.iter().collect();
        assert_eq!(different.len(), 3);
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        let error = format!("{:#}", addresses(1, Ports::From(port)).unwrap_err());
        assert!(error.contains(&format!("port {port}")), "{error}");
    }
}
