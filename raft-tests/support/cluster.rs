//! Brokers as child processes: started, killed, paused, stopped; their directories and logs.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use logboom::client::{Client, ClientConfig};
use logboom::types::BrokerId;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::wait_for;

/// How long a start, a stop, or the death of a killed process may take.
const PROCESS_TIME: Duration = Duration::from_secs(60);
/// Ports below those that the kernel gives to outgoing connections: while a broker is down, nobody takes its port.
const PORTS: std::ops::Range<u16> = 10_000..32_000;
/// Lines of each log that are shown when a test fails.
const TAIL_LINES: usize = 30;

/// What a cluster is made of, before it starts.
#[derive(Debug)]
pub struct Builder {
    brokers: Vec<u32>,
    keys: toml::Table,
    wrapper: Vec<String>,
}

impl Builder {
    /// Sets a key of every broker's configuration file.
    #[must_use]
    pub fn key(mut self, key: &str, value: impl Into<toml::Value>) -> Self {
        self.keys.insert(key.to_owned(), value.into());
        self
    }

    /// Runs every broker under another program, as a tracer: its words come before the broker's own command line.
    #[must_use]
    pub fn under(mut self, program: &[&str]) -> Self {
        self.wrapper = program.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Starts all brokers and waits until each of them is alive for the controller.
    pub async fn start(self) -> ProcessCluster {
        let mut cluster = self.prepare();
        for id in cluster.ids() {
            cluster.start(id);
        }
        cluster.wait_alive(PROCESS_TIME).await;
        cluster
    }

    /// Directories, ports and configuration files; no process yet.
    pub fn prepare(self) -> ProcessCluster {
        let dir = TempDir::with_prefix("logboom-test-").expect("a temporary directory");
        // All are held until the last one is known, or two brokers would be given the same.
        let reserved: Vec<(u32, TcpListener)> = self
            .brokers
            .iter()
            .map(|id| (*id, reserve_port()))
            .collect();
        let addresses: BTreeMap<u32, String> = reserved
            .iter()
            .map(|(id, port)| (*id, port.local_addr().expect("bound").to_string()))
            .collect();
        let bootstrap: Vec<String> = addresses
            .iter()
            .map(|(id, address)| format!("{id}@{address}"))
            .collect();
        let mut processes = BTreeMap::new();
        for (id, address) in addresses {
            let home = dir.path().join(format!("broker-{id}"));
            fs::create_dir(&home).expect("the broker's directory");
            let data = home.join("data");
            let mut keys = self.keys.clone();
            keys.insert("broker_id".to_owned(), i64::from(id).into());
            keys.insert("listen".to_owned(), address.clone().into());
            keys.insert("data_dir".to_owned(), data.display().to_string().into());
            keys.insert("bootstrap".to_owned(), bootstrap.clone().into());
            let config = home.join("logboom.toml");
            fs::write(&config, toml::to_string(&keys).expect("a table"))
                .expect("the configuration");
            let log = home.join("log.txt");
            let process = Process {
                address,
                config,
                log,
                data,
                child: None,
                paused: false,
                starts: 0,
            };
            processes.insert(id, process);
        }
        ProcessCluster {
            dir: Some(dir),
            processes,
            wrapper: self.wrapper,
        }
    }
}

fn reserve_port() -> TcpListener {
    let span = u64::from(PORTS.end - PORTS.start);
    // Where the search begins differs from test to test, so that tests side by side rarely meet.
    let mut at = logboom::runtime::random_seed() % span;
    for _ in 0..1_000 {
        let port = PORTS.start + u16::try_from(at).expect("below the span");
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return listener;
        }
        at = (at + 7) % span;
    }
    panic!("no free port between {} and {}", PORTS.start, PORTS.end);
}

#[derive(Debug)]
struct Process {
    address: String,
    config: PathBuf,
    log: PathBuf,
    data: PathBuf,
    child: Option<Child>,
    paused: bool,
    starts: u32,
}

impl Process {
    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let child = self.child.as_ref().context("it does not run")?;
        let id = i32::try_from(child.id().context("it has ended")?)?;
        let pid = Pid::from_raw(id).context("no process has the id 0")?;
        kill_process(pid, signal)?;
        Ok(())
    }
}

/// Brokers as child processes of the test. Dropped, it kills them; after a failure the directories stay and are named.
#[derive(Debug)]
pub struct ProcessCluster {
    dir: Option<TempDir>,
    processes: BTreeMap<u32, Process>,
    wrapper: Vec<String>,
}

impl ProcessCluster {
    /// A cluster of the brokers 1 to `brokers`.
    pub fn builder(brokers: u32) -> Builder {
        Builder {
            brokers: (1..=brokers).collect(),
            keys: toml::Table::new(),
            wrapper: Vec::new(),
        }
    }

    /// Starts a cluster of the brokers 1 to `brokers` with the default configuration.
    pub async fn start_brokers(brokers: u32) -> Self {
        Self::builder(brokers).start().await
    }

    fn process(&self, id: u32) -> &Process {
        self.processes
            .get(&id)
            .unwrap_or_else(|| panic!("there is no broker {id}"))
    }

    fn process_mut(&mut self, id: u32) -> &mut Process {
        self.processes
            .get_mut(&id)
            .unwrap_or_else(|| panic!("there is no broker {id}"))
    }

    /// All brokers, running or not.
    pub fn ids(&self) -> Vec<u32> {
        self.processes.keys().copied().collect()
    }

    /// The brokers that run and are not paused.
    pub fn running(&mut self) -> Vec<u32> {
        let ids = self.ids();
        ids.into_iter()
            .filter(|id| self.is_running(*id) && !self.process(*id).paused)
            .collect()
    }

    /// Where a broker is reached, running or not.
    pub fn address(&self, id: u32) -> &str {
        &self.process(id).address
    }

    /// The addresses of all brokers, for a client.
    pub fn bootstrap(&self) -> Vec<String> {
        self.processes
            .values()
            .map(|process| process.address.clone())
            .collect()
    }

    /// A broker's data directory.
    pub fn data_dir(&self, id: u32) -> &Path {
        &self.process(id).data
    }

    /// A broker's configuration file, for a change before a restart.
    pub fn config_file(&self, id: u32) -> &Path {
        &self.process(id).config
    }

    /// The process's id, while it runs.
    pub fn pid(&self, id: u32) -> Option<u32> {
        self.process(id).child.as_ref().and_then(Child::id)
    }

    /// What a broker logged, over all its starts.
    pub fn log(&self, id: u32) -> String {
        fs::read(&self.process(id).log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Lines of the level ERROR, or that speak of a panic, in all logs, except those with one of the texts in `expected`.
    pub fn errors(&self, expected: &[&str]) -> Vec<String> {
        let mut found = Vec::new();
        for id in self.ids() {
            for line in self.log(id).lines() {
                let bad = line.contains("ERROR") || line.contains("panicked at");
                if bad && !expected.iter().any(|text| line.contains(text)) {
                    found.push(format!("broker {id}: {line}"));
                }
            }
        }
        found
    }

    /// Starts a broker that does not run, on the directory it has. Returns when the process exists, not when it serves.
    pub fn start(&mut self, id: u32) {
        let wrapper = self.wrapper.clone();
        self.start_under(id, &wrapper);
    }

    /// The same, under another program: its words come before the broker's own command line.
    pub fn start_under(&mut self, id: u32, wrapper: &[String]) {
        assert!(!self.is_running(id), "broker {id} runs already");
        let process = self.process_mut(id);
        process.starts += 1;
        let mut log = open_log(&process.log);
        writeln!(log, "--- start {} of broker {id}", process.starts).expect("the log");
        let mut words = wrapper
            .iter()
            .cloned()
            .chain([env!("CARGO_BIN_EXE_logboom").to_owned()]);
        let mut command = Command::new(words.next().expect("the binary"));
        command
            .args(words)
            .arg("serve")
            .arg("--config")
            .arg(&process.config);
        command
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
            .stdout(log.try_clone().expect("the log"))
            .stderr(log);
        process.child = Some(command.spawn().expect("the broker's process"));
        process.paused = false;
    }

    /// Starts a broker again and waits until the controller hears it.
    pub async fn restart(&mut self, id: u32) {
        self.start(id);
        self.wait_broker_alive(id, PROCESS_TIME).await;
    }

    /// Whether the process exists; a paused one does.
    pub fn is_running(&mut self, id: u32) -> bool {
        let process = self.process_mut(id);
        match process.child.as_mut().map(Child::try_wait) {
            None => false,
            Some(Ok(None)) => true,
            Some(Ok(Some(_)) | Err(_)) => {
                process.child = None;
                false
            }
        }
    }

    /// Whether the process has not ended yet; other than [`Self::is_running`] it leaves the exit status to [`Self::ended`].
    pub fn is_process_there(&self, id: u32) -> bool {
        let pid = self.pid(id).and_then(|pid| i32::try_from(pid).ok());
        pid.is_some_and(|pid| ended_state(pid).is_none())
    }

    /// SIGKILL. Returns when the process has ended, and with it its connections.
    pub async fn kill_9(&mut self, id: u32) {
        self.signal(id, Signal::KILL);
        self.ended(id).await;
    }

    /// Kills several at the same moment, as a power failure of their common host would (what the kernel has not written yet
    /// survives, other than with a real one).
    pub async fn kill_9_all(&mut self, ids: &[u32]) {
        for id in ids {
            self.signal(*id, Signal::KILL);
        }
        for id in ids {
            self.ended(*id).await;
        }
    }

    /// SIGSTOP: it keeps its connections and answers nothing. Returns when all its threads stand still.
    pub async fn pause(&mut self, id: u32) {
        self.signal(id, Signal::STOP);
        let pid = self.pid(id);
        wait_for("all threads to stand still", PROCESS_TIME, async || {
            let threads = fs::read_dir(format!("/proc/{}/task", pid.context("it has ended")?))?;
            for thread in threads {
                let stat = fs::read_to_string(thread?.path().join("stat"))?;
                let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
                ensure!(state.is_some_and(|state| state.starts_with('T')), "{stat}");
            }
            Ok(())
        })
        .await;
        self.process_mut(id).paused = true;
    }

    /// SIGCONT.
    pub fn cont(&mut self, id: u32) {
        self.signal(id, Signal::CONT);
        self.process_mut(id).paused = false;
    }

    /// SIGTERM, and waits for the end: the ordinary way to stop a broker.
    pub async fn stop(&mut self, id: u32) -> ExitStatus {
        self.signal(id, Signal::TERM);
        self.ended(id).await
    }

    /// Sends a signal to a running broker.
    pub fn signal(&self, id: u32, signal: Signal) {
        if let Err(error) = self.process(id).signal(signal) {
            panic!("cannot send {signal:?} to broker {id}: {error:#}");
        }
    }

    /// Waits until a broker's process has ended, by itself or because it was told to.
    pub async fn ended(&mut self, id: u32) -> ExitStatus {
        let mut child = self
            .process_mut(id)
            .child
            .take()
            .unwrap_or_else(|| panic!("broker {id} does not run"));
        let ended = tokio::time::timeout(PROCESS_TIME, child.wait()).await;
        assert!(
            ended.is_ok(),
            "broker {id} did not end within {PROCESS_TIME:?}; its log:\n{}",
            self.tail(id)
        );
        match ended.unwrap_or_else(|late| Err(late.into())) {
            Ok(status) => status,
            Err(error) => panic!("cannot wait for broker {id}: {error}"),
        }
    }

    /// Deletes what a broker that does not run has stored: a lost disk.
    pub fn wipe(&mut self, id: u32) {
        assert!(!self.is_running(id), "broker {id} runs");
        match fs::remove_dir_all(self.data_dir(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                panic!("cannot delete {}: {error}", self.data_dir(id).display())
            }
            _ => {}
        }
    }

    /// A client of the cluster, with short patience for one attempt: tests kill brokers.
    pub async fn client(&self) -> Client {
        let bootstrap = self.bootstrap();
        wait_for("a broker that answers", PROCESS_TIME, async || {
            Ok(Client::connect(&bootstrap, ClientConfig::default()).await?)
        })
        .await
    }

    /// Waits until the controller hears exactly the brokers that run.
    pub async fn wait_alive(&mut self, within: Duration) {
        let running: Vec<BrokerId> = self.running().into_iter().map(BrokerId).collect();
        let bootstrap = self.bootstrap();
        let cluster = &*self;
        wait_for("all running brokers to be alive", within, async || {
            cluster.check_processes(&running)?;
            let client = Client::connect(&bootstrap, ClientConfig::default()).await?;
            let status = client.admin().cluster_status().await?;
            let mut alive: Vec<BrokerId> = status
                .brokers
                .iter()
                .filter(|one| one.alive)
                .map(|one| one.broker)
                .collect();
            alive.sort_unstable();
            ensure!(status.controller.is_some(), "no controller");
            ensure!(alive == running, "alive are {alive:?}, running {running:?}");
            Ok(())
        })
        .await;
    }

    async fn wait_broker_alive(&self, id: u32, within: Duration) {
        let bootstrap = self.bootstrap();
        wait_for(&format!("broker {id} to be alive"), within, async || {
            self.check_processes(&[BrokerId(id)])?;
            let client = Client::connect(&bootstrap, ClientConfig::default()).await?;
            let status = client.admin().cluster_status().await?;
            let alive = status
                .brokers
                .iter()
                .any(|one| one.broker == BrokerId(id) && one.alive);
            ensure!(alive, "the controller does not hear it");
            Ok(())
        })
        .await;
    }

    /// A process that has ended explains more than the wait for it.
    fn check_processes(&self, ids: &[BrokerId]) -> anyhow::Result<()> {
        for BrokerId(id) in ids {
            let process = self.process(*id);
            let pid = process
                .child
                .as_ref()
                .and_then(Child::id)
                .and_then(|pid| i32::try_from(pid).ok());
            let exists = pid.is_some_and(|pid| ended_state(pid).is_none());
            ensure!(
                exists,
                "broker {id} has ended; its log:\n{}",
                self.tail(*id)
            );
        }
        Ok(())
    }

    fn tail(&self, id: u32) -> String {
        let log = self.log(id);
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        lines.get(from..).unwrap_or_default().join("\n")
    }
}

/// The state letter of a process that has ended without having been waited for, or is not there.
fn ended_state(pid: i32) -> Option<char> {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return Some('-');
    };
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    state.filter(|state| matches!(state, 'Z' | 'X'))
}

fn open_log(path: &Path) -> File {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .expect("the log")
}

impl Drop for ProcessCluster {
    fn drop(&mut self) {
        for process in self.processes.values() {
            process.signal(Signal::KILL).ok(); // it may have ended
        }
        if std::thread::panicking() {
            if let Some(dir) = self.dir.take() {
                eprintln!(
                    "the cluster's directories are kept: {}",
                    dir.keep().display()
                );
            }
            for id in self.ids() {
                eprintln!("--- end of the log of broker {id}:\n{}", self.tail(id));
            }
        }
    }
}
