//! A cluster of brokers in one process, reduced to store, network and raft groups.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use logboom::net::{Channel, Handler, Identity, Message, Net, NetConfig, Origin, Reply};
use logboom::raft::{Group, GroupStatus, Groups, RaftConfig, RaftError, Role, StateMachine};
use logboom::runtime::Tasks;
use logboom::storage::{Store, StoreConfig};
use logboom::types::{
    BrokerId, DecodeError, Endpoint, EntryId, GroupId, ReplicaId, ReplicaKind, decode, encode,
};
use tokio::time::Instant;

/// Longest wait for a condition that must come true.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const GROUP: GroupId = GroupId(7);

pub(crate) fn data(broker: u32) -> ReplicaId {
    ReplicaId::new(BrokerId(broker), ReplicaKind::Data, 1)
}

pub(crate) fn witness(broker: u32) -> ReplicaId {
    ReplicaId::new(BrokerId(broker), ReplicaKind::Witness, 1)
}

pub(crate) fn set(replicas: &[ReplicaId]) -> BTreeSet<ReplicaId> {
    replicas.iter().copied().collect()
}

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits for `future`.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(late) => panic!("not in time: {what}: {late}"),
    }
}

pub(crate) fn store_config(directory: PathBuf) -> StoreConfig {
    StoreConfig {
        directory,
        segment_bytes: 4 << 20,
        cache_bytes: 8 << 20,
        catalog_cache_bytes: 4 << 20,
        catalog_sync_bytes: 4 << 20,
        commit_bytes_max: 4 << 20,
        reserve_bytes: 0,
    }
}

pub(crate) fn quick() -> RaftConfig {
    RaftConfig {
        heartbeat_interval: Duration::from_millis(50),
        election_timeout_min: Duration::from_millis(400),
        election_timeout_max: Duration::from_millis(700),
        append_bytes_max: 64 << 10,
        append_inflight_max: 16,
        rpc_timeout: Duration::from_secs(1),
        heartbeat_linger: Duration::from_millis(2),
        failover_concurrency: 64,
        failover_recheck: Duration::from_millis(100),
    }
}

/// Timeouts so long that no election can come from them within a test.
pub(crate) fn never_by_timeout() -> RaftConfig {
    RaftConfig {
        election_timeout_min: Duration::from_secs(600),
        election_timeout_max: Duration::from_secs(700),
        ..quick()
    }
}

type Log = Arc<Mutex<Vec<(EntryId, Bytes)>>>;

/// A state machine that remembers every command.
pub(crate) struct Recorder {
    log: Log,
    restores: Arc<AtomicU64>,
    since: u64,
    every: u64,
}

impl StateMachine for Recorder {
    fn apply(&mut self, id: EntryId, command: &Bytes) -> Bytes {
        let mut log = self.log.lock().unwrap();
        log.push((id, command.clone()));
        self.since += 1;
        encode(&(log.len() as u64)).into()
    }

    fn wants_checkpoint(&self) -> bool {
        self.since >= self.every
    }

    fn checkpoint(&mut self) -> (Bytes, Vec<(u64, Bytes)>) {
        self.since = 0;
        let log = self.log.lock().unwrap();
        let state: Vec<(EntryId, Vec<u8>)> = log
            .iter()
            .map(|(id, bytes)| (*id, bytes.to_vec()))
            .collect();
        (encode(&state).into(), Vec::new())
    }

    fn restore(&mut self, state: Option<&Bytes>) -> Result<(), DecodeError> {
        let restored: Vec<(EntryId, Vec<u8>)> = match state {
            Some(bytes) => decode(bytes)?,
            None => Vec::new(),
        };
        self.restores
            .fetch_add(u64::from(state.is_some()), Ordering::Relaxed);
        *self.log.lock().unwrap() = restored
            .into_iter()
            .map(|(id, bytes)| (id, bytes.into()))
            .collect();
        self.since = 0;
        Ok(())
    }
}

/// Hands messages to the groups, unless told to keep them.
struct Door {
    groups: Groups,
    deaf: Arc<AtomicBool>,
    deaf_group: Arc<AtomicU64>,
    kept: Mutex<Vec<Reply>>,
}

impl Handler for Door {
    fn handle(&self, origin: &Origin, channel: Channel, message: Message, reply: Reply) {
        assert_eq!(channel, Channel::Raft);
        // An append's header starts with a zero and the number of its group, which is below 251 in these tests.
        let group = self.deaf_group.load(Ordering::Relaxed);
        let stalled = message.header.first() == Some(&0)
            && message.header.get(1).map(|id| u64::from(*id)) == Some(group);
        if stalled || self.deaf.load(Ordering::Relaxed) {
            self.kept.lock().unwrap().push(reply);
            return;
        }
        self.groups.handle(origin, message, reply);
    }

    fn closed(&self, origin: &Origin) {
        self.groups.connection_closed(origin);
    }
}

/// One broker.
pub(crate) struct Node {
    pub(crate) store: Store,
    pub(crate) net: Net,
    pub(crate) groups: Groups,
    net_tasks: Tasks,
    group_tasks: Tasks,
    deaf: Arc<AtomicBool>,
    deaf_group: Arc<AtomicU64>,
    logs: Mutex<BTreeMap<GroupId, (Log, Arc<AtomicU64>)>>,
}

impl Node {
    /// Starts a replica here with a machine that wants a checkpoint every `every` commands.
    pub(crate) async fn start(&self, group: GroupId, me: ReplicaId, every: u64) -> Group {
        let log = Log::default();
        let restores = Arc::new(AtomicU64::new(0));
        let machine = Recorder {
            log: log.clone(),
            restores: restores.clone(),
            since: 0,
            every,
        };
        self.logs.lock().unwrap().insert(group, (log, restores));
        soon("start", self.groups.start(group, me, Box::new(machine)))
            .await
            .unwrap()
    }

    /// From now on, whenever this replica leads, the data followers whose connections are up are in sync.
    pub(crate) fn keep_isr(&self, group: &Group) {
        let group = group.clone();
        self.group_tasks.spawn(async move {
            let (mut status, mut progress) = (group.status(), group.progress_changed());
            loop {
                let known = group.progress();
                let in_sync = known
                    .followers
                    .iter()
                    .filter(|(_, f)| f.connected && !f.lost_data);
                let in_sync = in_sync
                    .map(|(id, _)| *id)
                    .filter(|id| !id.is_witness())
                    .collect();
                group.set_in_sync(status.borrow_and_update().epoch, in_sync);
                tokio::select! {
                    biased;
                    changed = status.changed() => if changed.is_err() { return },
                    changed = progress.changed() => if changed.is_err() { return },
                }
            }
        });
    }

    pub(crate) fn group(&self, group: GroupId) -> Group {
        self.groups.get(group).unwrap()
    }

    pub(crate) fn status(&self, group: GroupId) -> GroupStatus {
        self.group(group).status().borrow().clone()
    }

    /// The commands applied here.
    pub(crate) fn commands(&self, group: GroupId) -> Vec<Bytes> {
        let log = self.logs.lock().unwrap()[&group].0.clone();
        let log = log.lock().unwrap();
        log.iter().map(|(_, bytes)| bytes.clone()).collect()
    }

    /// Times the machine was restored from a checkpoint.
    pub(crate) fn restores(&self, group: GroupId) -> u64 {
        self.logs.lock().unwrap()[&group].1.load(Ordering::Relaxed)
    }

    /// Hears nothing any more, though its connections stay.
    pub(crate) fn set_deaf(&self, deaf: bool) {
        self.deaf.store(deaf, Ordering::Relaxed);
    }

    /// Hears no appends of one group any more; `u64::MAX` for none.
    pub(crate) fn set_deaf_group(&self, group: u64) {
        self.deaf_group.store(group, Ordering::Relaxed);
    }
}

/// Brokers 1, 2, 3 … over loopback, each with its own directory.
pub(crate) struct Cluster {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) nodes: BTreeMap<u32, Node>,
    config: RaftConfig,
}

impl Cluster {
    pub(crate) async fn new(brokers: &[u32], config: RaftConfig) -> Self {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        // Only the first test of the process can set it.
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_test_writer()
            .try_init()
            .ok();
        let directory = tempfile::tempdir().unwrap();
        let mut cluster = Self {
            directory,
            nodes: BTreeMap::new(),
            config,
        };
        for broker in brokers {
            cluster.up(*broker).await;
        }
        cluster
    }

    pub(crate) fn path(&self, broker: u32) -> PathBuf {
        self.directory.path().join(broker.to_string())
    }

    /// Starts a broker, without groups.
    pub(crate) async fn up(&mut self, broker: u32) {
        let id = BrokerId(broker);
        let config = store_config(self.path(broker));
        let opened = tokio::task::spawn_blocking(move || Store::open(&config, id)).await;
        self.attach(broker, opened.unwrap().unwrap()).await;
    }

    /// Starts a broker over `store`, without groups.
    pub(crate) async fn attach(&mut self, broker: u32, store: Store) {
        let id = BrokerId(broker);
        let identity = store.identity();
        let identity = Identity {
            broker: id,
            incarnation: identity.incarnation,
            cluster: None,
            boot: identity.boot,
            position: identity.position,
        };
        let (net_tasks, group_tasks) = (Tasks::new(), Tasks::new());
        let net_config = NetConfig {
            reconnect_min: Duration::from_millis(10),
            reconnect_max: Duration::from_millis(50),
            ..NetConfig::default()
        };
        let net = Net::bind("127.0.0.1:0", identity, net_config, net_tasks.clone())
            .await
            .unwrap();
        let config = self.config.clone();
        let groups = Groups::new(id, store.clone(), net.clone(), config, group_tasks.clone());
        let deaf = Arc::new(AtomicBool::new(false));
        let deaf_group = Arc::new(AtomicU64::new(u64::MAX));
        net.serve(Arc::new(Door {
            groups: groups.clone(),
            deaf: deaf.clone(),
            deaf_group: deaf_group.clone(),
            kept: Mutex::default(),
        }));
        let logs = Mutex::default();
        let node = Node {
            store,
            net,
            groups,
            net_tasks,
            group_tasks,
            deaf,
            deaf_group,
            logs,
        };
        self.nodes.insert(broker, node);
        let endpoints: Vec<Endpoint> = self
            .nodes
            .iter()
            .map(|(id, node)| Endpoint {
                broker: BrokerId(*id),
                address: node.net.local_addr().to_string(),
            })
            .collect();
        for node in self.nodes.values() {
            node.net.set_peers(endpoints.clone());
        }
    }

    /// Ends a broker's connections without a goodbye, as the death of its process does, and releases its directory. The
    /// others keep trying its address.
    pub(crate) async fn down(&mut self, broker: u32) {
        let node = self.nodes.remove(&broker).unwrap();
        node.net_tasks.shutdown().await;
        soon("groups stop", node.groups.shutdown()).await;
        node.group_tasks.shutdown().await;
        node.store.close().await.unwrap();
    }

    /// Starts `replicas` of `group` where they belong, and creates the group from the first one.
    pub(crate) async fn create(&self, group: GroupId, replicas: &[ReplicaId], every: u64) {
        for replica in replicas {
            self.nodes[&replica.broker().0]
                .start(group, *replica, every)
                .await;
        }
        let first = self.nodes[&replicas[0].broker().0].group(group);
        soon("initialize", first.initialize(set(replicas)))
            .await
            .unwrap();
        self.serving(group).await;
    }

    /// Waits until some replica serves, and returns its broker.
    pub(crate) async fn serving(&self, group: GroupId) -> u32 {
        let mut found = 0;
        until("a serving leader", || {
            found = self.leader(group).unwrap_or(0);
            found != 0
        })
        .await;
        found
    }

    pub(crate) fn leader(&self, group: GroupId) -> Option<u32> {
        let mut serving: Vec<_> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.groups.get(group).is_some())
            .map(|(id, node)| (node.status(group), *id))
            .filter(|(status, _)| status.is_serving())
            .collect();
        serving.sort_by_key(|(status, _)| status.epoch);
        serving.last().map(|(_, id)| *id)
    }

    /// Proposes until it is applied, at whoever leads. Only for commands that may be applied twice.
    pub(crate) async fn write(&self, group: GroupId, command: &str) -> EntryId {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "not in time: write {command}");
            let broker = self.serving(group).await;
            match propose(&self.nodes[&broker].group(group), command).await {
                Ok(id) => return id,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    /// Waits until all running data replicas have applied the same commands, those of `expected` among them in this order.
    pub(crate) async fn agree(&self, group: GroupId, brokers: &[u32], expected: &[String]) {
        until("all replicas agree", || {
            let logs: Vec<_> = brokers
                .iter()
                .map(|broker| self.nodes[broker].commands(group))
                .collect();
            logs.iter().all(|log| {
                let mut rest = log.iter();
                expected
                    .iter()
                    .all(|wanted| rest.any(|found| found == wanted.as_bytes()))
            }) && logs.windows(2).all(|pair| pair[0] == pair[1])
        })
        .await;
    }
}

/// Proposes one command and waits a second for it.
pub(crate) async fn propose(group: &Group, command: &str) -> Result<EntryId, RaftError> {
    let after = Duration::from_secs(1);
    let work = async {
        let proposal = group
            .propose(Bytes::copy_from_slice(command.as_bytes()))
            .await?;
        proposal.applied().await.map(|(id, _)| id)
    };
    tokio::time::timeout(after, work)
        .await
        .unwrap_or(Err(RaftError::Timeout { after }))
}

pub(crate) fn is_leader(node: &Node, group: GroupId) -> bool {
    node.status(group).role == Role::Leader
}
