//! The simulated cluster: hosts with a broker each, their disks, and one host of clients.
//!
//! Owns what runs, on which disk, and the network between. Decides nothing: what breaks is the nemesis's choice, whether it may be is
//! judged by `watch` and `finish`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use logboom::broker::Broker;
use logboom::config::BrokerConfig;
use logboom::runtime::sim;
use logboom::storage::MemDisk;
use logboom::testkit::recorder::Recorder;
use logboom::types::{ReplicaKind, TopicName};
use tokio::sync::Notify;
use turmoil::Sim;

use crate::clients::{self, Control};
use crate::plan::Plan;

/// The host of the clients.
pub const CLIENTS: &str = "clients";
/// The host of a process that says it is another.
const TWIN: &str = "twin";
const PORT: u16 = 9092;
/// An operator, or a supervisor, starts again what has ended.
const RESTART_AFTER: Duration = Duration::from_millis(400);

/// What runs on a host.
#[derive(Debug, Default)]
pub enum Life {
    /// The process is starting.
    #[default]
    Starting,
    Running(Box<Broker>),
    /// It ended by itself, for this reason.
    Failed(String),
    /// It was told to stop, and did.
    Stopped,
    /// Killed, or without power.
    Down,
}

/// What host and driver share.
#[derive(Debug)]
pub struct Cell {
    pub config: BrokerConfig,
    pub disk: MemDisk,
    pub life: Life,
    told: Rc<Notify>,
    order: Option<Order>,
}

impl Cell {
    fn new(config: BrokerConfig, disk: MemDisk, life: Life) -> Self {
        Self {
            config,
            disk,
            life,
            told: Rc::default(),
            order: None,
        }
    }

    /// As a process that starts finds it.
    fn begin(&mut self) {
        self.life = Life::Starting;
        self.told = Rc::default();
        self.order = None;
    }
}

/// What a running process is told to do.
#[derive(Debug, Clone, Copy)]
pub enum Order {
    Stop,
    /// Its clock jumps ahead.
    Jump(Duration),
    /// It hands over every leadership that somebody else can have.
    HandOver,
}

/// One broker's host.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub cell: Rc<RefCell<Cell>>,
    /// No network: the machine is off.
    pub off: bool,
    /// When it is to be started again.
    pub restart_at: Option<Duration>,
    /// Its disk is going to lose power by itself: how often it had by then.
    pub armed: Option<u64>,
}

impl Node {
    pub fn is_running(&self) -> bool {
        matches!(self.cell.borrow().life, Life::Running(_))
    }

    pub fn broker(&self) -> Option<Broker> {
        match &self.cell.borrow().life {
            Life::Running(broker) => Some((**broker).clone()),
            _ => None,
        }
    }

    pub fn disk(&self) -> MemDisk {
        self.cell.borrow().disk.clone()
    }

    pub fn tell(&self, order: Order) {
        let mut cell = self.cell.borrow_mut();
        cell.order = Some(order);
        cell.told.notify_one();
    }
}

/// How a link is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cut {
    /// What is sent from the first to the second is dropped.
    OneWay(usize, usize),
    /// Both ways.
    Both(usize, usize),
    /// Nothing is lost, everything waits.
    Held(usize, usize),
}

pub struct World {
    pub plan: Plan,
    pub sim: Sim<'static>,
    pub nodes: Vec<Node>,
    /// Where a copy of a broker's directory is started beside the original.
    pub twin: Node,
    pub control: Rc<RefCell<Control>>,
    /// One record for each topic of the plan.
    pub recorders: Vec<Recorder>,
    /// Cut links; the host behind the last broker's is the clients'.
    pub cuts: BTreeSet<Cut>,
    /// Processes that ended by themselves, and why; to be taken by the nemesis.
    pub failures: Vec<(usize, String)>,
    clock: Arc<AtomicU64>,
}

/// The simulated time, for who is in a host's turn: outside of it turmoil would ask the machine's clock.
pub fn since() -> Option<Duration> {
    tokio::runtime::Handle::try_current().ok()?;
    turmoil::sim_elapsed()
}

async fn run_broker(cell: Rc<RefCell<Cell>>) -> turmoil::Result {
    let (config, disk, told) = {
        let mut cell = cell.borrow_mut();
        cell.life = Life::Starting;
        (cell.config.clone(), cell.disk.clone(), cell.told.clone())
    };
    let started = Broker::builder(config).memory_disk(&disk).start().await;
    let broker = match started {
        Ok(broker) => broker,
        Err(error) => {
            cell.borrow_mut().life = Life::Failed(error.to_string());
            return std::future::pending().await;
        }
    };
    cell.borrow_mut().life = Life::Running(Box::new(broker.clone()));
    let end = loop {
        tokio::select! {
            biased;
            error = broker.wait_failed() => break Life::Failed(error.to_string()),
            () = told.notified() => {
                let order = cell.borrow_mut().order.take();
                match order {
                    Some(Order::Jump(jump)) => tokio::time::advance(jump).await,
                    Some(Order::HandOver) => hand_over(&broker),
                    Some(Order::Stop) | None => {
                        broker.shutdown().await;
                        break Life::Stopped;
                    }
                }
            }
        }
    };
    cell.borrow_mut().life = end;
    std::future::pending().await
}

/// A host that runs what its cell says.
fn host(sim: &mut Sim<'_>, name: &str, cell: Cell) -> Node {
    let cell = Rc::new(RefCell::new(cell));
    let shared = cell.clone();
    sim.host(name, move || run_broker(shared.clone()));
    Node {
        name: name.to_owned(),
        cell,
        off: false,
        restart_at: None,
        armed: None,
    }
}

/// Every partition that `broker` leads goes to another replica in sync, where there is one.
fn hand_over(broker: &Broker) {
    for partition in broker.replicas() {
        if !partition.is_leader() {
            continue;
        }
        let isr = partition.view().isr;
        let voters = partition.group().status().borrow().voters.clone();
        let other = voters.into_iter().find(|replica| {
            *replica != partition.me()
                && replica.kind() == ReplicaKind::Data
                && isr.contains(&replica.broker())
        });
        if let Some(other) = other {
            let group = partition.group().clone();
            // It is seen through by the group, and may be refused.
            tokio::task::spawn_local(async move { group.transfer_leader(other).await.ok() });
        }
    }
}

impl World {
    pub fn new(plan: &Plan) -> Self {
        let mut builder = turmoil::Builder::new();
        builder
            .rng_seed(plan.seed)
            .epoch(SystemTime::UNIX_EPOCH)
            .simulation_duration(Duration::from_secs(3600))
            .tick_duration(plan.tick)
            .min_message_latency(Duration::ZERO)
            .max_message_latency(plan.latency_max)
            .tcp_capacity(256);
        if plan.shuffled {
            builder.enable_random_order();
        }
        let mut sim = builder.build();
        let clock = Arc::new(AtomicU64::new(0));
        let recorders = plan.topics.iter().map(|_| {
            let clock = clock.clone();
            Recorder::bounded(
                Arc::new(move || {
                    let here = since().map(|since| u64::try_from(since.as_nanos()));
                    here.and_then(Result::ok)
                        .unwrap_or_else(|| clock.load(Ordering::Relaxed))
                }),
                200_000,
            )
        });
        let recorders: Vec<Recorder> = recorders.collect();
        let names: Vec<String> = (1..=plan.brokers)
            .map(|id| format!("broker-{id}"))
            .collect();
        let bootstrap: Vec<String> = (1..)
            .zip(&names)
            .map(|(id, name)| format!("{id}@{name}:{PORT}"))
            .collect();
        let mut nodes = Vec::new();
        for (id, name) in (1..).zip(&names) {
            let disk = MemDisk::new();
            disk.set_pace(plan.seed ^ u64::from(id), plan.disk_max);
            let config = BrokerConfig {
                broker_id: id,
                listen: format!("0.0.0.0:{PORT}"),
                advertise: format!("{name}:{PORT}"),
                data_dir: format!("/{name}").into(),
                bootstrap: bootstrap.iter().take(5).cloned().collect(),
                heartbeat_interval_ms: plan.heartbeat_ms,
                election_timeout_min_ms: plan.election_min_ms,
                election_timeout_max_ms: plan.election_min_ms * 3 / 2,
                replica_lag_time_max_ms: 2_000,
                segment_bytes: plan.segment_bytes,
                cache_bytes: plan.cache_bytes,
                disk_reserve_bytes: 1 << 20,
                ..BrokerConfig::default()
            };
            nodes.push(host(
                &mut sim,
                name,
                Cell::new(config, disk, Life::Starting),
            ));
        }
        let spare = Cell::new(BrokerConfig::default(), MemDisk::new(), Life::Down);
        let twin = host(&mut sim, TWIN, spare);
        sim.crash(TWIN);
        let control = Rc::new(RefCell::new(Control::default()));
        let brokers = nodes.iter().map(|node| node.cell.clone()).collect();
        let bootstrap = names.iter().map(|name| format!("{name}:{PORT}")).collect();
        sim.client(
            CLIENTS,
            clients::run(
                plan.clone(),
                bootstrap,
                brokers,
                recorders.clone(),
                control.clone(),
            ),
        );
        Self {
            plan: plan.clone(),
            sim,
            nodes,
            twin,
            control,
            recorders,
            cuts: BTreeSet::new(),
            failures: Vec::new(),
            clock,
        }
    }

    pub fn now(&self) -> Duration {
        self.sim.elapsed()
    }

    /// One turn of every host. True when the clients have ended.
    pub fn step(&mut self) -> Result<bool, String> {
        let now = u64::try_from(self.now().as_nanos()).unwrap_or(u64::MAX);
        self.clock.store(now, Ordering::Relaxed);
        let over = self.sim.step().map_err(|error| error.to_string())?;
        // What is over by itself is taken away, as its process would be.
        for at in 0..self.nodes.len() {
            let ended = {
                let cell = self.nodes[at].cell.borrow();
                match &cell.life {
                    Life::Failed(reason) => Some(Some(reason.clone())),
                    Life::Stopped => Some(None),
                    _ => None,
                }
            };
            let lost_power = self.nodes[at]
                .armed
                .is_some_and(|lives| self.nodes[at].disk().lives() > lives);
            if lost_power {
                self.nodes[at].armed = None;
                self.switch_off(at);
                self.nodes[at].restart_at = Some(self.now() + RESTART_AFTER);
            } else if let Some(reason) = ended {
                self.failures.extend(reason.map(|reason| (at, reason)));
                self.kill(at, true);
                self.nodes[at].restart_at = Some(self.now() + RESTART_AFTER);
            }
        }
        for at in 0..self.nodes.len() {
            if self.nodes[at]
                .restart_at
                .is_some_and(|when| when <= self.now())
            {
                self.start(at);
            }
        }
        Ok(over)
    }

    /// SIGKILL.
    pub fn kill(&mut self, at: usize, catalog_survives: bool) {
        self.nodes[at].disk().kill(catalog_survives);
        self.down(at);
    }

    /// The machine loses power; nobody hears of it.
    pub fn power_off(&mut self, at: usize, seed: u64, tear: bool) {
        self.nodes[at].disk().crash(seed, tear);
        self.switch_off(at);
    }

    /// As [`World::power_off`], the disk having gone already.
    pub fn switch_off(&mut self, at: usize) {
        self.nodes[at].off = true;
        self.apply_cuts();
        self.down(at);
    }

    fn down(&mut self, at: usize) {
        self.nodes[at].armed = None;
        self.sim.crash(self.nodes[at].name.as_str());
        self.nodes[at].cell.borrow_mut().life = Life::Down;
        self.settle_refusing();
    }

    /// Starts the host's process.
    pub fn start(&mut self, at: usize) {
        self.nodes[at].restart_at = None;
        if self.nodes[at].off {
            self.nodes[at].off = false;
            self.apply_cuts();
        }
        self.nodes[at].cell.borrow_mut().begin();
        self.sim.bounce(self.nodes[at].name.as_str());
        self.settle_refusing();
    }

    pub fn twin_runs(&self) -> bool {
        !matches!(self.twin.cell.borrow().life, Life::Down)
    }

    /// Starts a process in the name of the broker `of`, on `disk`, at an address of its own.
    pub fn start_twin(&mut self, of: usize, disk: MemDisk) {
        let mut config = self.nodes[of].cell.borrow().config.clone();
        config.advertise = format!("{TWIN}:{PORT}");
        disk.set_pace(self.plan.seed ^ 0x7477_696e, self.plan.disk_max);
        {
            let mut cell = self.twin.cell.borrow_mut();
            (cell.config, cell.disk) = (config, disk);
            cell.begin();
        }
        self.sim.bounce(TWIN);
    }

    /// Kills that process, if there is one.
    pub fn stop_twin(&mut self) {
        if self.twin_runs() {
            self.twin.disk().kill(true);
            self.sim.crash(TWIN);
            self.twin.cell.borrow_mut().life = Life::Down;
        }
    }

    /// Gives the host another disk.
    pub fn set_disk(&mut self, at: usize, disk: MemDisk) {
        let id = self.nodes[at].cell.borrow().config.broker_id;
        disk.set_pace(
            self.plan.seed ^ u64::from(id) ^ 0x6469_736b,
            self.plan.disk_max,
        );
        self.nodes[at].cell.borrow_mut().disk = disk;
    }

    fn host(&self, at: usize) -> &str {
        self.nodes
            .get(at)
            .map_or(CLIENTS, |node| node.name.as_str())
    }

    pub fn cut(&mut self, cut: Cut) {
        if let Cut::Held(a, b) = cut {
            self.sim.hold(self.host(a), self.host(b));
            self.cuts.insert(cut);
        } else {
            self.cuts.insert(cut);
            self.apply_cuts();
        }
        self.settle_refusing();
    }

    pub fn mend(&mut self, cut: Cut) {
        if !self.cuts.remove(&cut) {
            return;
        }
        if let Cut::Held(a, b) = cut {
            self.sim.release(self.host(a), self.host(b));
        }
        self.apply_cuts();
        self.settle_refusing();
    }

    /// Puts every link into the state that cuts and machines without power leave it in.
    fn apply_cuts(&mut self) {
        let hosts = self.nodes.len() + 1;
        for a in 0..hosts {
            for b in 0..a {
                if self.cuts.contains(&Cut::Held(a, b)) || self.cuts.contains(&Cut::Held(b, a)) {
                    continue;
                }
                let off = [a, b]
                    .into_iter()
                    .any(|at| self.nodes.get(at).is_some_and(|node| node.off));
                let both = off
                    || self.cuts.contains(&Cut::Both(a, b))
                    || self.cuts.contains(&Cut::Both(b, a));
                for (from, to) in [(a, b), (b, a)] {
                    let (from_host, to_host) = (self.host(from), self.host(to));
                    if both || self.cuts.contains(&Cut::OneWay(from, to)) {
                        self.sim.partition_oneway(from_host, to_host);
                    } else {
                        self.sim.repair_oneway(from_host, to_host);
                    }
                }
            }
        }
    }

    fn settle_refusing(&self) {
        let is_cut = |at: usize| {
            self.cuts.iter().any(|cut| match cut {
                Cut::OneWay(a, b) | Cut::Both(a, b) | Cut::Held(a, b) => *a == at || *b == at,
            })
        };
        let refusing = self.nodes.iter().enumerate().filter(|(at, node)| {
            // A process that starts or has failed to listens nowhere either.
            !node.off && !node.is_running() && !is_cut(*at)
        });
        sim::set_refusing(
            refusing
                .map(|(_, node)| self.sim.lookup(node.name.as_str()))
                .collect(),
        );
    }

    /// Whether every broker runs, every link is whole, every replica is in sync by what its leader knows, and has its vote, and so has
    /// the witness: one that moves has none for a while, and a partition of two copies cannot lose one of them then.
    pub fn is_whole(&self) -> bool {
        let topics = &self.plan.topics;
        let wanted: u32 = topics.iter().map(|topic| topic.partitions).sum();
        let voters = |name: &TopicName| {
            let topic = topics.iter().find(|topic| topic.name == name.as_str());
            topic.map_or(0, |topic| match topic.replication_factor {
                2 => 3,
                copies => copies as usize,
            })
        };
        let mut whole = 0;
        for node in &self.nodes {
            let Some(broker) = node.broker() else {
                return false;
            };
            for partition in broker.replicas() {
                let view = partition.view();
                let level = view.replicas.iter().all(|replica| replica.in_sync);
                let status = partition.group().status().borrow().clone();
                let vote = !status.is_joint && status.voters.len() == voters(&partition.id().topic);
                whole += u32::from(partition.is_leader() && level && vote);
            }
        }
        self.cuts.is_empty() && whole == wanted
    }

    /// No fault any more: every link whole, every machine on, every process started.
    pub fn heal(&mut self) {
        for cut in self.cuts.clone() {
            self.mend(cut);
        }
        for at in 0..self.nodes.len() {
            let disk = self.nodes[at].disk();
            disk.heal();
            disk.set_free(1 << 40);
            let id = self.nodes[at].cell.borrow().config.broker_id;
            disk.set_pace(
                self.plan.seed ^ u64::from(id) ^ 0x6865_616c,
                self.plan.disk_max,
            );
            if matches!(self.nodes[at].cell.borrow().life, Life::Down) {
                self.nodes[at].restart_at.get_or_insert(self.sim.elapsed());
            }
        }
        self.sim.set_max_message_latency(self.plan.latency_max);
        sim::set_wall_clock_error(0);
        sim::set_repeats(0);
        self.stop_twin();
    }
}
