//! The reconciler over real stores and sockets: several brokers in one process with their controllers, without clients.

use super::work::failed;
use super::*;

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::Instant;

use crate::controller::metadata::PlannedPartition;
use crate::controller::{self, Command, Controller, ControllerConfig};
use crate::net::{Channel, Handler, Identity, Message, Net, NetConfig, Origin, Reply};
use crate::raft::RaftConfig;
use crate::storage::{Store, StoreConfig};
use crate::types::{ClusterId, Endpoint, GroupId, PartitionId, ReplicaId, ReplicaKind};

const PATIENCE: Duration = Duration::from_secs(30);

/// What takes the place of requests between brokers: the controllers and reconcilers of all brokers that are up.
type Peers = Arc<Mutex<BTreeMap<BrokerId, (Controller, Reconciler)>>>;

struct Node {
    store: Store,
    net: Net,
    groups: Groups,
    controller: Controller,
    reconciler: Reconciler,
    tasks: Tasks,
    address: String,
}

struct Door(Groups);

impl Handler for Door {
    fn handle(&self, origin: &Origin, channel: Channel, message: Message, reply: Reply) {
        if channel == Channel::Raft {
            self.0.handle(origin, message, reply);
        }
    }

    fn closed(&self, origin: &Origin) {
        self.0.connection_closed(origin);
    }
}

struct Cluster {
    directory: TempDir,
    nodes: BTreeMap<u32, Node>,
    addresses: BTreeMap<u32, String>,
    peers: Peers,
}

fn raft_config() -> RaftConfig {
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

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn controller_of(peers: &Peers) -> Option<Controller> {
    let peers = peers.lock().unwrap();
    let leader = peers
        .values()
        .find_map(|(controller, _)| controller.leader_broker())?;
    peers.get(&leader).map(|(controller, _)| controller.clone())
}

async fn submit(peers: &Peers, command: Command) -> Result<controller::Answer, Error> {
    let controller = controller_of(peers).ok_or(Error::ControllerUnavailable)?;
    controller.submit(command).await
}

impl Cluster {
    /// Brokers 1, 2 and 3, registered and ready.
    async fn new() -> Self {
        let mut cluster = Self {
            directory: tempfile::tempdir().unwrap(),
            nodes: BTreeMap::new(),
            addresses: BTreeMap::new(),
            peers: Peers::default(),
        };
        for broker in 1..=3 {
            cluster.open(broker).await;
        }
        let voters = cluster
            .nodes
            .values()
            .map(|node| node.controller_group().me())
            .collect();
        cluster.nodes[&1]
            .controller_group()
            .initialize(voters)
            .await
            .unwrap();
        cluster
            .submit(Command::InitCluster {
                cluster: ClusterId(1),
            })
            .await;
        for broker in 1..=3 {
            cluster.admit(broker).await;
        }
        cluster
    }

    fn path(&self, broker: u32) -> PathBuf {
        self.directory.path().join(broker.to_string())
    }

    /// Opens the directory, listens, and joins group 0.
    async fn open(&mut self, broker: u32) {
        let id = BrokerId(broker);
        let store_config = StoreConfig {
            directory: self.path(broker),
            segment_bytes: 4 << 20,
            cache_bytes: 8 << 20,
            catalog_cache_bytes: 4 << 20,
            catalog_sync_bytes: 4 << 20,
            commit_bytes_max: 4 << 20,
            reserve_bytes: 0,
        };
        let opened = tokio::task::spawn_blocking(move || Store::open(&store_config, id)).await;
        let store = opened.unwrap().unwrap();
        let directory = store.identity();
        let identity = Identity {
            broker: id,
            incarnation: directory.incarnation,
            cluster: None,
            boot: directory.boot,
            position: directory.position,
        };
        let tasks = Tasks::new();
        let net_config = NetConfig {
            reconnect_min: Duration::from_millis(10),
            reconnect_max: Duration::from_millis(50),
            ..NetConfig::default()
        };
        let listen = self.addresses.get(&broker).cloned();
        let listen = listen.unwrap_or_else(|| "127.0.0.1:0".to_owned());
        let net = Net::bind(&listen, identity, net_config, tasks.clone())
            .await
            .unwrap();
        let address = net.local_addr().to_string();
        self.addresses.insert(broker, address.clone());
        let raft_config = raft_config();
        let election_timeout_max = raft_config.election_timeout_max;
        let groups = Groups::new(id, store.clone(), net.clone(), raft_config, tasks.clone());
        let (machine, images) = controller::machine();
        let epoch = directory.incarnation.controller_epoch();
        let me = ReplicaId::new(id, ReplicaKind::Data, epoch);
        let group = groups
            .start(GroupId::CONTROLLER, me, Box::new(machine))
            .await
            .unwrap();
        let config = ControllerConfig {
            bootstrap: vec![BrokerId(1), BrokerId(2), BrokerId(3)],
            election_timeout_max,
            ..ControllerConfig::default()
        };
        let controller = Controller::new(group, images, config);
        let reconciler = Reconciler::new(self.ports(id, &groups, &tasks, &controller));
        let node = Node {
            store,
            net,
            groups,
            controller,
            reconciler,
            tasks,
            address,
        };
        node.net.serve(Arc::new(Door(node.groups.clone())));
        let known = (node.controller.clone(), node.reconciler.clone());
        self.peers.lock().unwrap().insert(id, known);
        node.controller.run(self.mover(), &node.tasks);
        node.tasks.spawn(follow_metadata(
            node.net.clone(),
            node.controller.metadata(),
        ));
        self.nodes.insert(broker, node);
        let endpoint = |(id, address): (&u32, &String)| Endpoint {
            broker: BrokerId(*id),
            address: address.clone(),
        };
        let endpoints: Vec<Endpoint> = self.addresses.iter().map(endpoint).collect();
        for node in self.nodes.values() {
            node.net.set_peers(endpoints.clone());
        }
    }

    fn ports(
        &self,
        broker: BrokerId,
        groups: &Groups,
        tasks: &Tasks,
        controller: &Controller,
    ) -> ReconcilerPorts {
        let (peers, images) = (self.peers.clone(), controller.metadata());
        let damage_peers = peers.clone();
        ReconcilerPorts {
            broker,
            groups: groups.clone(),
            tasks: tasks.clone(),
            metadata: controller.metadata(),
            limits: PartitionLimits::default(),
            endpoints: Arc::new(move |broker| images.borrow().endpoint(broker)),
            room: Arc::new(|| Ok(())),
            report: Arc::new(move |reports| {
                let peers = peers.clone();
                let command = Command::ReportPartitions {
                    broker,
                    reports,
                    position: 0,
                };
                Box::pin(async move { submit(&peers, command).await.map(|_| ()) })
            }),
            report_damage: Arc::new(move |partition, replica, epoch| {
                let controller = controller_of(&damage_peers);
                Box::pin(async move {
                    let controller = controller.ok_or(Error::ControllerUnavailable)?;
                    controller.replace_damaged(partition, replica, epoch).await
                })
            }),
        }
    }

    fn mover(&self) -> controller::LeaderMover {
        let peers = self.peers.clone();
        Arc::new(move |name, leader, to| {
            let partition = peers
                .lock()
                .unwrap()
                .get(&leader)
                .and_then(|(_, reconciler)| reconciler.partition(&name));
            Box::pin(async move {
                let partition = partition.ok_or(Error::LeaderUnavailable { partition: name })?;
                partition
                    .group()
                    .transfer_leader(to)
                    .await
                    .map_err(|error| failed(&error))
            })
        })
    }

    /// Registers the broker's present directory, as often as it takes, and lets its replicas start.
    async fn admit(&self, broker: u32) {
        let node = &self.nodes[&broker];
        let directory = node.store.identity();
        let endpoint = Endpoint {
            broker: BrokerId(broker),
            address: node.address.clone(),
        };
        self.submit(Command::RegisterBroker {
            endpoint,
            rack: None,
            incarnation: directory.incarnation,
            boot: directory.boot,
            position: directory.position,
            controller_replica: node.controller_group().me(),
        })
        .await;
        let mut images = node.controller.metadata();
        let shown = images.wait_for(|image| {
            let known = image.broker(BrokerId(broker));
            known.is_some_and(|known| {
                (known.incarnation, known.boot) == (directory.incarnation, directory.boot)
            })
        });
        tokio::time::timeout(PATIENCE, shown)
            .await
            .unwrap()
            .unwrap();
        node.reconciler.run();
        tokio::time::timeout(PATIENCE, node.reconciler.wait_ready())
            .await
            .unwrap();
    }

    async fn up(&mut self, broker: u32) {
        self.open(broker).await;
        self.admit(broker).await;
    }

    /// Ends a broker without a goodbye.
    async fn down(&mut self, broker: u32) {
        let node = self.nodes.remove(&broker).unwrap();
        self.peers.lock().unwrap().remove(&BrokerId(broker));
        node.tasks.shutdown().await;
        node.groups.shutdown().await;
        node.reconciler.stop().await;
        node.store.close().await.unwrap();
    }

    async fn submit(&self, command: Command) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = submit(&self.peers, command.clone()).await {
            assert!(error.is_retriable(), "{error}");
            assert!(
                Instant::now() < deadline,
                "not in time: {command:?}: {error}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn create(&self, name: &str, partitions: u32, replication_factor: u32) -> TopicName {
        let name = TopicName::new(name).unwrap();
        let controller = controller_of(&self.peers).unwrap();
        let config = BTreeMap::new();
        let created = controller
            .create_topic(
                name.clone(),
                partitions,
                replication_factor,
                config,
                Vec::new(),
            )
            .await;
        assert_eq!(created, Ok(Vec::new()));
        self.until_image("every partition is led", |image| image.all_led(&name))
            .await;
        name
    }

    fn image(&self) -> Option<Arc<ClusterMetadata>> {
        let controller = controller_of(&self.peers)?;
        let image = controller.metadata().borrow().clone();
        Some(image)
    }

    async fn until_image(&self, what: &str, condition: impl Fn(&ClusterMetadata) -> bool) {
        until(what, || self.image().is_some_and(|image| condition(&image))).await;
    }

    /// Waits until the partitions of the topic have these leaders and in-sync replicas.
    async fn until_seen(&self, topic: &TopicName, expected: &[(u32, &[u32])]) {
        let seen = |image: &ClusterMetadata| {
            let routes = image.routes(Some(std::slice::from_ref(topic)));
            let partitions = &routes.first().unwrap().partitions;
            partitions.len() == expected.len()
                && partitions
                    .iter()
                    .zip(expected)
                    .all(|(found, (leader, isr))| {
                        let isr: Vec<BrokerId> = isr.iter().copied().map(BrokerId).collect();
                        found.leader == Some(BrokerId(*leader)) && found.isr == isr
                    })
        };
        self.until_image(&format!("{expected:?}"), seen).await;
    }
}

async fn follow_metadata(net: Net, mut metadata: watch::Receiver<Arc<ClusterMetadata>>) {
    loop {
        let image = metadata.borrow_and_update().clone();
        net.set_admission(Arc::new(move |identity| image.admits(identity)));
        if metadata.changed().await.is_err() {
            return;
        }
    }
}

impl Node {
    fn controller_group(&self) -> Group {
        self.groups.get(GroupId::CONTROLLER).unwrap()
    }

    fn stored_partitions(&self) -> usize {
        self.groups.stored().len() - 1
    }
}

/// Goal: the founding example: placed as documented, the follower leads when its leader's broker dies, the leader leads
/// again when it is back. Method: three brokers over sockets and directories; take broker 1 down and up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_on_and_comes_back() {
    let mut cluster = Cluster::new().await;
    let topic = cluster.create("topic-x", 2, 2).await;
    cluster
        .until_seen(&topic, &[(1, &[1, 2]), (2, &[2, 3])])
        .await;
    cluster.down(1).await;
    cluster.until_seen(&topic, &[(2, &[2]), (2, &[2, 3])]).await;
    cluster
        .until_image("1 is dead", |image| !image.is_alive(BrokerId(1)))
        .await;
    cluster.up(1).await;
    cluster
        .until_seen(&topic, &[(1, &[1, 2]), (2, &[2, 3])])
        .await;
    for broker in [1, 2, 3] {
        cluster.down(broker).await;
    }
}

/// Goal: a broker that lost its disk comes back as new replicas, of its partitions and of group 0, and is preferred again.
/// Method: delete broker 1's directory while it is down; wait for every replacement to finish.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_disk_is_rebuilt() {
    let mut cluster = Cluster::new().await;
    let topic = cluster.create("t", 3, 2).await;
    let old = cluster.nodes[&1].controller_group().me();
    cluster.down(1).await;
    std::fs::remove_dir_all(cluster.path(1)).unwrap();
    cluster.open(1).await;
    // Not a member of group 0 yet, so its image shows nothing until the controller lets it learn.
    cluster.admit(1).await;
    let new = cluster.nodes[&1].controller_group().me();
    assert_ne!(old, new);
    let settled = |image: &ClusterMetadata| {
        image
            .partitions()
            .all(|(_, record)| record.replacement.is_none())
    };
    cluster
        .until_image("replacements are finished", settled)
        .await;
    cluster
        .until_seen(&topic, &[(1, &[1, 2]), (2, &[2, 3]), (3, &[3, 1])])
        .await;
    until("group 0 has the new member only", || {
        let leader =
            controller_of(&cluster.peers).and_then(|controller| controller.leader_broker());
        let Some(leader) = leader else { return false };
        let status = cluster.nodes[&leader.0]
            .controller_group()
            .status()
            .borrow()
            .clone();
        status.voters.contains(&new) && status.voters.len() == 3 && status.learners.is_empty()
    })
    .await;
    for (name, record) in cluster.image().unwrap().partitions() {
        let wanted: BTreeSet<ReplicaId> = record.assignment.voters().collect();
        for replica in &wanted {
            let node = &cluster.nodes[&replica.broker().0];
            let group = node.groups.get(record.group).unwrap();
            assert_eq!(group.me(), *replica, "{name}");
            until("the replica knows its group", || {
                group.status().borrow().voters == wanted
            })
            .await;
        }
    }
}

/// Goal: a deleted topic's replicas go, also on a broker that was away, and the controller's own group stays. Method: delete
/// while broker 3 is down; look into all stores.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_topics_leave_nothing_behind() {
    let mut cluster = Cluster::new().await;
    let gone = cluster.create("gone", 4, 3).await;
    cluster.create("stays", 1, 3).await;
    for node in cluster.nodes.values() {
        assert_eq!(node.stored_partitions(), 5);
    }
    cluster.down(3).await;
    cluster
        .submit(Command::DeleteTopic { name: gone.clone() })
        .await;
    cluster.up(3).await;
    until("only one partition is left", || {
        cluster
            .nodes
            .values()
            .all(|node| node.stored_partitions() == 1)
    })
    .await;
    let name = TopicPartition {
        topic: gone,
        partition: PartitionId(0),
    };
    assert!(
        cluster
            .nodes
            .values()
            .all(|node| node.reconciler.partition(&name).is_none())
    );
    assert!(
        cluster
            .nodes
            .values()
            .all(|node| node.reconciler.partitions().len() == 1)
    );
}

/// Goal: many partitions are brought up side by side, and a broker that leaves in good order is no longer leader of any.
/// Method: 60 partitions at once; hand over broker 2's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_partitions_start_and_are_handed_over() {
    let cluster = Cluster::new().await;
    let topic = cluster.create("many", 60, 3).await;
    let led = |broker: u32| cluster.nodes[&broker].reconciler.views(None).len();
    until("all are led", || (1..=3).map(led).sum::<usize>() == 60).await;
    assert!(cluster.nodes[&1].reconciler.views(Some(&[])).is_empty());
    assert_eq!(cluster.image().unwrap().replication_factor(&topic), 3);
    let node = &cluster.nodes[&2];
    let stay = node.reconciler.hand_over(&node.controller_group()).await;
    assert_eq!((stay, led(2)), (0, 0));
    assert_ne!(node.controller.leader_broker(), Some(BrokerId(2)));
}

/// Goal: a replica moves to another broker, its leader included, and the old copy goes only with the end of the move. Method:
/// RF 1 from broker 1 to broker 2; the group must be led there, and nothing be stored on 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_moves_to_another_broker() {
    let cluster = Cluster::new().await;
    let topic = cluster.create("t", 1, 1).await;
    cluster.until_seen(&topic, &[(1, &[1])]).await;
    let partition = TopicPartition {
        topic: topic.clone(),
        partition: PartitionId(0),
    };
    let target = PlannedPartition {
        replicas: vec![BrokerId(2)],
        witness: None,
    };
    cluster
        .submit(Command::ReassignPartition { partition, target })
        .await;
    cluster.until_seen(&topic, &[(2, &[2])]).await;
    until("the old copy is gone", || {
        cluster.nodes[&1].stored_partitions() == 0
    })
    .await;
    let at_rest = |image: &ClusterMetadata| {
        image
            .partitions()
            .all(|(_, record)| record.replacement.is_none() && record.reassignment.is_none())
    };
    cluster.until_image("the move has ended", at_rest).await;
    assert_eq!(cluster.nodes[&2].stored_partitions(), 1);
}
