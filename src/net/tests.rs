//! Tests of the whole over real loopback sockets.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::frame::{Hello, Role, SendQueue, Welcome, one_frame, preamble};
use super::socket::{TcpListener, TcpStream};
use super::*;
use crate::types::encode;

const LONG: Duration = Duration::from_secs(20);

fn identity(broker: u32) -> Identity {
    Identity {
        broker: BrokerId(broker),
        incarnation: Incarnation(u128::from(broker)),
        cluster: None,
        boot: 1,
        position: 0,
    }
}

fn config() -> NetConfig {
    NetConfig {
        reconnect_min: Duration::from_millis(10),
        reconnect_max: Duration::from_millis(100),
        handshake_timeout: Duration::from_secs(2),
        ..NetConfig::default()
    }
}

fn text(header: &str) -> Message {
    Message {
        header: Bytes::copy_from_slice(header.as_bytes()),
        body: Vec::new(),
    }
}

type Got = (Origin, Channel, Message, Reply);

/// Passes every message on to the test; counts what was closed.
struct Collect {
    messages: mpsc::Sender<Got>,
    closed: mpsc::Sender<Origin>,
}

impl Handler for Collect {
    fn handle(&self, origin: &Origin, channel: Channel, message: Message, reply: Reply) {
        self.messages
            .try_send((origin.clone(), channel, message, reply))
            .expect("the test takes them");
    }
    fn closed(&self, origin: &Origin) {
        self.closed
            .try_send(origin.clone())
            .expect("the test takes them");
    }
}

/// Answers with the message itself.
struct Echo;

impl Handler for Echo {
    fn handle(&self, _: &Origin, _: Channel, message: Message, reply: Reply) {
        reply.send(message);
    }
    fn closed(&self, _: &Origin) {}
}

struct Node {
    net: Net,
    tasks: Tasks,
}

impl Node {
    async fn start_at(
        listen: &str,
        identity: Identity,
        config: NetConfig,
        handler: Arc<dyn Handler>,
    ) -> Self {
        let tasks = Tasks::new();
        let deadline = Instant::now() + LONG;
        loop {
            match Net::bind(listen, identity, config.clone(), tasks.clone()).await {
                Ok(net) => {
                    net.serve(handler);
                    return Self { net, tasks };
                }
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::task::yield_now().await;
        }
    }

    async fn start(broker: u32, handler: Arc<dyn Handler>) -> Self {
        Self::start_at("127.0.0.1:0", identity(broker), config(), handler).await
    }

    async fn collecting(
        broker: u32,
        config: NetConfig,
    ) -> (Self, mpsc::Receiver<Got>, mpsc::Receiver<Origin>) {
        let (messages, got) = mpsc::channel(100_000);
        let (closed, gone) = mpsc::channel(1000);
        let handler = Arc::new(Collect { messages, closed });
        (
            Self::start_at("127.0.0.1:0", identity(broker), config, handler).await,
            got,
            gone,
        )
    }

    fn address(&self) -> String {
        self.net.local_addr().to_string()
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint {
            broker: self.net.shared.identity().broker,
            address: self.address(),
        }
    }

    async fn client(&self) -> Connection {
        Connection::open(&self.address(), &config(), &self.tasks)
            .await
            .unwrap()
    }

    /// What the end of its process does.
    async fn kill(self) {
        self.tasks.shutdown().await;
    }
}

async fn state(net: &Net, broker: u32, wanted: PeerState) {
    let mut events = net.events();
    let broker = BrokerId(broker);
    let wait = async {
        while net.peer_state(broker) != wanted {
            events.recv().await.ok();
        }
    };
    let found = timeout(LONG, wait).await;
    assert!(
        found.is_ok(),
        "wanted {wanted:?}, is {:?}",
        net.peer_state(broker)
    );
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(LONG, future).await.expect("in time")
}

/// A stranger who speaks the handshake and then what it likes.
async fn raw_client(address: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let hello = Hello {
        role: Role::Client,
        frame_bytes_max: 1 << 20,
    };
    stream.write_all(&preamble()).await.unwrap();
    stream
        .write_all(&one_frame(Kind::Hello, encode(&hello).into()))
        .await
        .unwrap();
    let mut start = [0; 8];
    stream.read_exact(&mut start).await.unwrap();
    stream
}

/// A broker of which the test plays the other side by hand: accepts one connection and greets.
async fn raw_broker(listener: &TcpListener, broker: u32) -> TcpStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut start = [0; 8];
    stream.read_exact(&mut start).await.unwrap();
    stream.write_all(&preamble()).await.unwrap();
    let welcome = Welcome {
        identity: identity(broker),
        frame_bytes_max: 1 << 20,
    };
    stream
        .write_all(&one_frame(Kind::Hello, encode(&welcome).into()))
        .await
        .unwrap();
    stream
}

async fn reads_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    // A reset is an end as well.
    soon(stream.read_to_end(&mut rest)).await.ok();
    rest
}

/// Goal: requests arrive in the order of the calls, and answers find their callers in whatever order they come.
/// Method: 500 pipelined calls, answered backwards.
#[tokio::test]
async fn pipelined_calls_keep_order_and_answers_need_not() {
    let (server, mut got, _) = Node::collecting(1, config()).await;
    let client = Node::start(2, Arc::new(Echo)).await;
    client.net.set_peers(vec![server.endpoint()]);
    state(&client.net, 1, PeerState::Up).await;
    let calls: Vec<_> = (0..500_u32)
        .map(|i| {
            client
                .net
                .call(
                    BrokerId(1),
                    Lane::Data,
                    Channel::Raft,
                    text(&i.to_string()),
                    LONG,
                )
                .unwrap()
        })
        .collect();
    let mut held = Vec::new();
    for i in 0..500_u32 {
        let (origin, channel, message, reply) = soon(got.recv()).await.unwrap();
        assert_eq!(message, text(&i.to_string()));
        assert_eq!(channel, Channel::Raft);
        assert_eq!(origin.broker, Some((BrokerId(2), Incarnation(2))));
        held.push((message, reply));
    }
    while let Some((message, reply)) = held.pop() {
        reply.send(message);
    }
    for (i, call) in calls.into_iter().enumerate() {
        assert_eq!(soon(call).await, Ok(text(&i.to_string())));
    }
}

/// Goal: a large body of several pieces arrives as one piece with the same bytes. Method: 5 MiB there and back.
#[tokio::test]
async fn large_bodies_pass_untouched() {
    let server = Node::start(1, Arc::new(Echo)).await;
    let client = server.client().await;
    assert_eq!(client.identity(), identity(1));
    let pattern = |n: usize| -> Bytes { (0..n).map(|i| u8::try_from(i % 251).unwrap()).collect() };
    let body = vec![
        pattern(10),
        pattern(5 << 20),
        pattern(3000),
        Bytes::new(),
        pattern(1),
    ];
    let sent = Message {
        header: Bytes::from_static(b"head"),
        body,
    };
    let answer = soon(client.call(sent.clone(), LONG).unwrap())
        .await
        .unwrap();
    assert_eq!(answer.header, sent.header);
    assert_eq!(answer.body.len(), 1);
    assert!(answer.single_body() == sent.single_body());
}

/// Goal: what is larger than the receiver takes is refused to the caller, and the connection goes on.
/// Method: a server with a small limit.
#[tokio::test]
async fn too_large_messages_are_refused_before_sending() {
    let small = NetConfig {
        frame_bytes_max: 10_000,
        ..config()
    };
    let server = Node::start_at("127.0.0.1:0", identity(1), small, Arc::new(Echo)).await;
    let client = server.client().await;
    let large = Message {
        header: Bytes::from(vec![0; 10_000]),
        body: Vec::new(),
    };
    let error = client.call(large, LONG).unwrap_err();
    assert!(
        matches!(
            error,
            NetError::TooLarge {
                bytes: 10_014,
                max: 10_000,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(
        soon(client.call(text("x"), LONG).unwrap()).await,
        Ok(text("x"))
    );
}

/// Goal: garbage closes the connection it came on and nothing else, before and after the handshake.
/// Method: several kinds of it beside a good connection; the server's side is seen to close.
#[tokio::test]
async fn garbage_closes_only_its_connection() {
    let server = Node::start(1, Arc::new(Echo)).await;
    let good = server.client().await;
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        b"\0\0\0\x10\0\x03\0\0\0\0\0\0",
        b"LGBOOM\0\x02\0\0\0\x0e\x01\0\0\0\0\0\0\0\0\0\0\0\0\0",
        b"LGBOOM\0\x01\xff\xff\xff\xff\x01\0\0\0\0\0\0\0\0\0\0\0\0\0",
        b"LGBOOM\0\x01\0\0\0\x0e\x03\0\0\0\0\0\0\0\0\0\0\0\0\0",
    ] {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let answer = reads_to_end(&mut stream).await;
        assert!(
            answer.starts_with(b"LGBOOM"),
            "refused in words: {answer:?}"
        );
    }
    let mut oversize = (33_u32 << 20).to_be_bytes().to_vec();
    oversize.extend([3; 14]);
    let raft = {
        let mut queue = SendQueue::default();
        queue.push(
            Kind::Request,
            Channel::Raft.to_byte(),
            1,
            text("vote for me"),
        );
        let mut pieces = std::collections::VecDeque::new();
        queue.take(&mut pieces);
        pieces.into_iter().flatten().collect::<Vec<u8>>()
    };
    let goodbye = one_frame(Kind::Goodbye, Bytes::new()).to_vec();
    for garbage in [oversize, vec![0xff; 100], raft, goodbye] {
        let mut stream = raw_client(&server.address()).await;
        stream.write_all(&garbage).await.unwrap();
        reads_to_end(&mut stream).await;
    }
    assert_eq!(
        soon(good.call(text("still here"), LONG).unwrap()).await,
        Ok(text("still here"))
    );
}

/// Goal: an announced length costs the receiver nothing. Method: an allowed, large length, few bytes; the reader's buffer
/// is what the decoder's own test measures, here the connection simply waits and is given up when cut.
#[tokio::test]
async fn a_frame_cut_short_is_dropped_and_closed_is_told() {
    let (server, mut got, mut gone) = Node::collecting(1, config()).await;
    let mut stream = raw_client(&server.address()).await;
    let mut begun = (30_u32 << 20).to_be_bytes().to_vec();
    begun.extend([3, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]);
    stream.write_all(&begun).await.unwrap();
    drop(stream);
    assert!(soon(gone.recv()).await.unwrap().broker.is_none());
    assert!(got.try_recv().is_err());
}

/// Goal: a broker of another cluster is refused, and the one who calls learns why. Method: two clusters.
#[tokio::test]
async fn another_cluster_is_refused_in_words() {
    let server = Node::start(1, Arc::new(Echo)).await;
    let other = Node::start(2, Arc::new(Echo)).await;
    server.net.set_cluster(ClusterId(0xa));
    other.net.set_cluster(ClusterId(0xb));
    other.net.set_peers(vec![server.endpoint()]);
    state(&other.net, 1, PeerState::Lost).await;
    let error = other
        .net
        .call(BrokerId(1), Lane::Control, Channel::Raft, text("x"), LONG)
        .unwrap_err();
    let NetError::Refused { reason, .. } = error else {
        panic!("{error:?}")
    };
    assert!(
        reason.contains("cluster 0000000000000000000000000000000a"),
        "{reason}"
    );
    // A client has no cluster and is let in.
    assert_eq!(
        server.client().await.identity().cluster,
        Some(ClusterId(0xa))
    );
}

/// Goal: a broker that joins a cluster later than its connection is then refused. Method: set the clusters after both are up.
#[tokio::test]
async fn a_cluster_set_later_counts_for_live_connections() {
    let (one, two) = (
        Node::start(1, Arc::new(Echo)).await,
        Node::start(2, Arc::new(Echo)).await,
    );
    let mut other = identity(3);
    other.cluster = Some(ClusterId(7));
    let three = Node::start_at("127.0.0.1:0", other, config(), Arc::new(Echo)).await;
    one.net.set_peers(vec![two.endpoint(), three.endpoint()]);
    state(&one.net, 2, PeerState::Up).await;
    state(&one.net, 3, PeerState::Up).await;
    one.net.set_cluster(ClusterId(8));
    state(&one.net, 3, PeerState::Lost).await;
    assert_eq!(one.net.peer_state(BrokerId(2)), PeerState::Up);
}

/// Goal: who is not admitted is refused both ways, also when it was admitted before. Method: change the closure on a live
/// pair, and back.
#[tokio::test]
async fn admission_is_looked_at_again_when_it_changes() {
    let (one, two) = (
        Node::start(1, Arc::new(Echo)).await,
        Node::start(2, Arc::new(Echo)).await,
    );
    one.net.set_peers(vec![two.endpoint()]);
    two.net.set_peers(vec![one.endpoint()]);
    state(&one.net, 2, PeerState::Up).await;
    state(&two.net, 1, PeerState::Up).await;
    one.net.set_admission(Arc::new(|who| match who.incarnation {
        Incarnation(2) => Err("this directory was replaced".to_owned()),
        _ => Ok(()),
    }));
    for (net, other) in [(&one.net, 2), (&two.net, 1)] {
        state(net, other, PeerState::Lost).await;
        let error = net
            .call(
                BrokerId(other),
                Lane::Control,
                Channel::Raft,
                text("x"),
                LONG,
            )
            .unwrap_err();
        assert!(
            matches!(&error, NetError::Refused { reason, .. } if reason.contains("was replaced")),
            "{error:?}"
        );
    }
    one.net.set_admission(Arc::new(|_| Ok(())));
    state(&one.net, 2, PeerState::Up).await;
    state(&two.net, 1, PeerState::Up).await;
}

/// Goal: whoever answers at a peer's address must be that peer. Method: an address with another broker behind it.
#[tokio::test]
async fn the_wrong_broker_at_an_address_is_not_taken_for_the_right_one() {
    let (one, two) = (
        Node::start(1, Arc::new(Echo)).await,
        Node::start(2, Arc::new(Echo)).await,
    );
    one.net.set_peers(vec![Endpoint {
        broker: BrokerId(9),
        address: two.address(),
    }]);
    state(&one.net, 9, PeerState::Lost).await;
    let error = one
        .net
        .call(BrokerId(9), Lane::Data, Channel::Raft, text("x"), LONG)
        .unwrap_err();
    assert!(
        matches!(&error, NetError::Refused { reason, .. } if reason.contains("found broker 2")),
        "{error:?}"
    );
}

/// Goal: the end of a peer's process is known in a moment, its calls in flight are lost, later ones are refused at once, and
/// its return is known. Method: end one of two connected brokers and start it again at the same address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_peer_is_gone_at_once_and_up_again_when_it_returns() {
    let (server, mut got, _closed) = Node::collecting(1, config()).await;
    let client = Node::start(2, Arc::new(Echo)).await;
    server.net.set_peers(vec![client.endpoint()]);
    client.net.set_peers(vec![server.endpoint()]);
    state(&client.net, 1, PeerState::Up).await;
    state(&server.net, 2, PeerState::Up).await;
    let call = client
        .net
        .call(BrokerId(1), Lane::Data, Channel::Raft, text("x"), LONG)
        .unwrap();
    let held = soon(got.recv()).await.unwrap();
    let address = server.address();
    let before = Instant::now();
    server.kill().await;
    state(&client.net, 1, PeerState::Gone).await;
    let took = before.elapsed();
    assert!(took < Duration::from_millis(500), "{took:?}");
    assert!(matches!(soon(call).await, Err(NetError::Lost { .. })));
    drop(held);
    let error = client
        .net
        .call(BrokerId(1), Lane::Data, Channel::Raft, text("x"), LONG)
        .unwrap_err();
    assert!(matches!(error, NetError::Unreachable { .. }), "{error:?}");
    let server = Node::start_at(&address, identity(1), config(), Arc::new(Echo)).await;
    server.net.set_peers(vec![client.endpoint()]);
    state(&client.net, 1, PeerState::Up).await;
    let call = client
        .net
        .call(BrokerId(1), Lane::Data, Channel::Raft, text("x"), LONG)
        .unwrap();
    assert_eq!(soon(call).await, Ok(text("x")));
}

/// Goal: a handler that does not answer holds back its own connection only, in bytes, and goes on when it answers.
/// Method: a small budget; one client floods, another asks.
#[tokio::test]
async fn a_stalled_handler_holds_back_only_its_connection() {
    let limits = NetConfig {
        receive_bytes: 100_000,
        send_queue_bytes: 1 << 20,
        ..config()
    };
    let (server, mut got, _) = Node::collecting(1, limits).await;
    let (flood, quiet) = (server.client().await, server.client().await);
    let body = Bytes::from(vec![7; 10_000]);
    let message = || Message {
        header: Bytes::new(),
        body: vec![body.clone()],
    };
    let calls: Vec<_> = (0..50)
        .map(|_| flood.call(message(), LONG).unwrap())
        .collect();
    // Nine fit into the budget with what each counts besides.
    let mut held = Vec::new();
    for _ in 0..9 {
        held.push(soon(got.recv()).await.unwrap().3);
    }
    let answer = quiet.call(text("quiet"), LONG).unwrap();
    let (_, _, message, reply) = soon(got.recv()).await.unwrap();
    assert_eq!(message, text("quiet"));
    reply.send(text("answer"));
    assert_eq!(soon(answer).await, Ok(text("answer")));
    assert!(
        got.try_recv().is_err(),
        "above the budget nothing is handed over"
    );
    // Dropping a reply frees its bytes as well as sending one does.
    drop(held.pop());
    held.push(soon(got.recv()).await.unwrap().3);
    let mut sent = held.len();
    for reply in held {
        reply.send(Message::default());
    }
    // One of the 50 was dropped unanswered.
    while sent < 49 {
        soon(got.recv()).await.unwrap().3.send(Message::default());
        sent += 1;
    }
    let mut calls = futures_util::future::select_all(calls);
    for _ in 0..49 {
        let (answer, _, left) = soon(calls).await;
        assert_eq!(answer, Ok(Message::default()));
        calls = futures_util::future::select_all(left);
    }
}

/// Goal: votes and heartbeats pass bulk that is stuck. Method: a peer takes a little of what is sent in bulk, and answers none of
/// it; a message on the control lane is handed over and answered meanwhile.
#[tokio::test]
async fn control_is_never_behind_bulk() {
    let limits = NetConfig {
        receive_bytes: 100_000,
        ..config()
    };
    let (server, mut got, _) = Node::collecting(1, limits).await;
    let client = Node::start(2, Arc::new(Echo)).await;
    client.net.set_peers(vec![server.endpoint()]);
    state(&client.net, 1, PeerState::Up).await;
    let call = |lane, message| {
        let call = client
            .net
            .call(BrokerId(1), lane, Channel::Raft, message, LONG);
        call.unwrap()
    };
    let bulk = Message {
        header: Bytes::new(),
        body: vec![vec![7; 1 << 20].into()],
    };
    let mut calls: Vec<_> = (0..30).map(|_| call(Lane::Data, bulk.clone())).collect();
    let stuck = soon(got.recv()).await.unwrap();
    let vote = call(Lane::Control, text("vote"));
    let (_, _, message, reply) = soon(got.recv()).await.unwrap();
    assert_eq!(message, text("vote"));
    reply.send(text("granted"));
    assert_eq!(soon(vote).await, Ok(text("granted")));
    assert!(got.try_recv().is_err(), "bulk is stuck");
    stuck.3.send(Message::default());
    assert_eq!(soon(calls.remove(0)).await, Ok(Message::default()));
    soon(got.recv()).await.expect("bulk goes on");
}

/// Goal: a queue that does not drain refuses at its bound, at once. Method: a peer that reads nothing.
#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let limits = NetConfig {
        send_queue_bytes: 1 << 20,
        ..config()
    };
    let tasks = Tasks::new();
    let (open, _stream) = tokio::join!(
        Connection::open(&address, &limits, &tasks),
        raw_broker(&listener, 1)
    );
    let client = open.unwrap();
    let body = Bytes::from(vec![1; 100_000]);
    let mut calls = Vec::new();
    let full = async {
        loop {
            let message = Message {
                header: Bytes::new(),
                body: vec![body.clone()],
            };
            match client.call(message, LONG) {
                Ok(call) => calls.push(call),
                Err(error) => return error,
            }
            tokio::task::yield_now().await;
        }
    };
    assert!(matches!(soon(full).await, NetError::Full { .. }));
    assert!(!client.is_closed());
}

/// Goal: a call ends by its own deadline, long and short ones mixed, and a late answer disturbs nothing.
/// Method: a server that answers late.
#[tokio::test]
async fn deadlines_fire_as_timeouts() {
    let (server, mut got, _) = Node::collecting(1, config()).await;
    // Nothing but the deadline itself wakes the watcher in time.
    let quiet = NetConfig {
        keepalive_interval: Duration::from_secs(600),
        ..config()
    };
    let client = Connection::open(&server.address(), &quiet, &server.tasks)
        .await
        .unwrap();
    let first = client.call(text("first"), LONG).unwrap();
    soon(got.recv()).await.unwrap().3.send(text("first"));
    assert_eq!(soon(first).await, Ok(text("first")));
    let long = client.call(text("long"), LONG).unwrap();
    let short = client
        .call(text("short"), Duration::from_millis(30))
        .unwrap();
    let before = Instant::now();
    let error = soon(short).await.unwrap_err();
    assert!(
        matches!(error, NetError::Timeout { after, .. } if after == Duration::from_millis(30)),
        "{error:?}"
    );
    assert!((Duration::from_millis(30)..Duration::from_secs(5)).contains(&before.elapsed()));
    for _ in 0..2 {
        let (_, _, message, reply) = soon(got.recv()).await.unwrap();
        reply.send(message);
    }
    assert_eq!(soon(long).await, Ok(text("long")));
    assert_eq!(client.0.link.waiting(), 0);
    drop(client.call(text("forgotten"), LONG).unwrap());
    assert_eq!(client.0.link.waiting(), 0);
}

/// Goal: silence ends a connection, so that a call on it is lost rather than waited for. Method: another side that greets
/// and then neither answers nor closes.
#[tokio::test]
async fn a_half_open_connection_is_found_by_its_silence() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let config = NetConfig {
        keepalive_interval: Duration::from_millis(30),
        ..config()
    };
    let node = Node::start_at("127.0.0.1:0", identity(2), config, Arc::new(Echo)).await;
    node.net.set_peers(vec![Endpoint {
        broker: BrokerId(1),
        address,
    }]);
    let _control = raw_broker(&listener, 1).await;
    let _data = raw_broker(&listener, 1).await;
    state(&node.net, 1, PeerState::Up).await;
    let call = node
        .net
        .call(BrokerId(1), Lane::Control, Channel::Raft, text("x"), LONG)
        .unwrap();
    assert!(matches!(soon(call).await, Err(NetError::Lost { .. })));
    state(&node.net, 1, PeerState::Lost).await;
}

/// Goal: a socket that accepts and never speaks counts as lost, never as up. Method: a bare listener.
#[tokio::test]
async fn a_listener_that_never_speaks_is_lost() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let config = NetConfig {
        handshake_timeout: Duration::from_millis(100),
        ..config()
    };
    let node = Node::start_at("127.0.0.1:0", identity(2), config.clone(), Arc::new(Echo)).await;
    node.net.set_peers(vec![Endpoint {
        broker: BrokerId(1),
        address: address.clone(),
    }]);
    state(&node.net, 1, PeerState::Lost).await;
    let error = soon(Connection::open(&address, &config, &node.tasks))
        .await
        .unwrap_err();
    assert!(matches!(error, NetError::Unreachable { .. }), "{error:?}");
}

/// Goal: idle connections stay. Method: many intervals of silence from the callers' side, then a call on the same one.
#[tokio::test]
async fn idle_connections_stay() {
    let config = NetConfig {
        keepalive_interval: Duration::from_millis(10),
        client_misses: 4,
        ..config()
    };
    let server = Node::start_at("127.0.0.1:0", identity(1), config.clone(), Arc::new(Echo)).await;
    let client = Connection::open(&server.address(), &config, &server.tasks)
        .await
        .unwrap();
    let ticks = || client.0.link.signs_of_life();
    let begin = ticks();
    let wait = async {
        while ticks() < begin + 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(wait).await;
    assert_eq!(
        soon(client.call(text("x"), LONG).unwrap()).await,
        Ok(text("x"))
    );
}

/// Goal: a broker that says goodbye is gone for its peers although its connections live, takes no new ones, and is up again
/// when it comes back. Method: as said.
#[tokio::test]
async fn goodbye_is_believed() {
    let (one, two) = (
        Node::start(1, Arc::new(Echo)).await,
        Node::start(2, Arc::new(Echo)).await,
    );
    one.net.set_peers(vec![two.endpoint()]);
    two.net.set_peers(vec![one.endpoint()]);
    state(&one.net, 2, PeerState::Up).await;
    state(&two.net, 1, PeerState::Up).await;
    soon(one.net.goodbye()).await;
    assert_eq!(
        two.net.peer_state(BrokerId(1)),
        PeerState::Gone,
        "known when goodbye() returns"
    );
    let call = two
        .net
        .call(BrokerId(1), Lane::Data, Channel::Raft, text("x"), LONG)
        .unwrap();
    assert_eq!(soon(call).await, Ok(text("x")));
    let refused = Connection::open(&one.address(), &config(), &two.tasks)
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, NetError::Refused { reason, .. } if reason.contains("shutting down")),
        "{refused:?}"
    );
    let address = one.address();
    one.kill().await;
    let one = Node::start_at(&address, identity(1), config(), Arc::new(Echo)).await;
    one.net.set_peers(vec![two.endpoint()]);
    state(&two.net, 1, PeerState::Up).await;
}

/// Goal: a peer with a new address is connected there; one no longer named is dropped. Method: move it, then name nobody.
#[tokio::test]
async fn peers_follow_their_addresses() {
    let (old, _, _) = Node::collecting(1, config()).await;
    let (new, mut got, mut closed) = Node::collecting(1, config()).await;
    let client = Node::start(2, Arc::new(Echo)).await;
    client
        .net
        .set_peers(vec![old.endpoint(), client.endpoint()]);
    state(&client.net, 1, PeerState::Up).await;
    assert_eq!(
        client.net.peer_state(BrokerId(2)),
        PeerState::Unknown,
        "a broker is not its own peer"
    );
    client.net.set_peers(vec![new.endpoint()]);
    let ask = || {
        let net = &client.net;
        net.call(BrokerId(1), Lane::Data, Channel::Raft, text("x"), LONG)
    };
    let connected = async {
        while ask().is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon(connected).await;
    soon(got.recv()).await.unwrap();
    let call = ask().unwrap();
    soon(got.recv()).await.unwrap().3.send(text("new"));
    assert_eq!(soon(call).await, Ok(text("new")));
    client.net.set_peers(Vec::new());
    for _ in 0..2 {
        soon(closed.recv()).await.unwrap();
    }
    let error = client
        .net
        .call(BrokerId(1), Lane::Data, Channel::Raft, text("x"), LONG)
        .unwrap_err();
    assert!(matches!(error, NetError::Unreachable { .. }), "{error:?}");
}

/// Goal: connections are bounded; clients cannot take the brokers' places; a freed place is used again.
/// Method: eight places.
#[tokio::test]
async fn connections_are_bounded_and_some_are_kept_for_brokers() {
    let limits = NetConfig {
        connections_max: 8,
        ..config()
    };
    let server = Node::start_at("127.0.0.1:0", identity(1), limits, Arc::new(Echo)).await;
    let mut clients = Vec::new();
    for _ in 0..7 {
        clients.push(server.client().await);
    }
    let (address, config) = (server.address(), config());
    let open = || Connection::open(&address, &config, &server.tasks);
    let refused = async {
        loop {
            match open().await {
                Err(NetError::Refused { reason, .. }) => return reason,
                other => drop(other),
            }
        }
    };
    assert!(soon(refused).await.contains("7 connections"));
    let peer = Node::start(2, Arc::new(Echo)).await;
    peer.net.set_peers(vec![server.endpoint()]);
    clients.pop();
    state(&peer.net, 1, PeerState::Up).await;
    clients.clear();
    let again = async { while open().await.is_err() {} };
    soon(again).await;
}

/// Goal: with the tasks stopped, or the last handle dropped, listener and connections are closed and the callers told.
/// Method: both ways of ending.
#[tokio::test]
async fn everything_ends_with_the_tasks_or_the_last_handle() {
    for by_drop in [false, true] {
        let server = Node::start(1, Arc::new(Echo)).await;
        let tasks = Tasks::new();
        let client = Connection::open(&server.address(), &config(), &tasks)
            .await
            .unwrap();
        let address = server.address();
        let Node {
            net,
            tasks: server_tasks,
        } = server;
        if by_drop {
            drop(net);
            assert!(!server_tasks.is_stopped());
        } else {
            soon(server_tasks.shutdown()).await;
        }
        soon(client.0.link.ended()).await;
        assert!(client.is_closed());
        assert!(client.call(text("x"), LONG).is_err());
        let closed = async { while TcpStream::connect(&address).await.is_ok() {} };
        soon(closed).await;
        soon(server_tasks.shutdown()).await;
    }
}

/// Where the other process of a test writes its address; unset in an ordinary run.
const OTHER_PROCESS: &str = "LOGBOOM_NET_TEST_OTHER_PROCESS";
/// How many file descriptors it may have open.
const OTHER_PROCESS_FILES: &str = "LOGBOOM_NET_TEST_FILES";

/// Goal: none of its own; it is the other process of the tests below. Method: serves as broker 1 until it is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_process() {
    let Ok(file) = std::env::var(OTHER_PROCESS) else {
        return;
    };
    let node = Node::start(1, Arc::new(Echo)).await;
    if let Ok(files) = std::env::var(OTHER_PROCESS_FILES) {
        use rustix::process::{Resource, Rlimit, setrlimit};
        let files: u64 = files.parse().unwrap();
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(files),
                maximum: Some(files),
            },
        )
        .unwrap();
    }
    std::fs::write(format!("{file}.new"), node.address()).unwrap();
    std::fs::rename(format!("{file}.new"), file).unwrap();
    std::future::pending::<()>().await;
}

async fn start_other_process(files: Option<u32>) -> (tokio::process::Child, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("address");
    let mut command = tokio::process::Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "net::tests::other_process"])
        .env(OTHER_PROCESS, &file);
    command
        .stdout(std::process::Stdio::null())
        .kill_on_drop(true);
    if let Some(files) = files {
        command.env(OTHER_PROCESS_FILES, files.to_string());
    }
    let child = command.spawn().unwrap();
    let address = async {
        loop {
            match std::fs::read_to_string(&file) {
                Ok(address) => return address,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let address = soon(address).await;
    (child, address)
}

/// Goal: `kill -9` of a process is known as its end within milliseconds, with connections both ways.
/// Method: a real process, killed; the best of five, because the machine may be busy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_is_news_within_milliseconds() {
    let mut best = LONG;
    for _ in 0..5 {
        let (mut child, address) = start_other_process(None).await;
        let node = Node::start(2, Arc::new(Echo)).await;
        node.net.set_peers(vec![Endpoint {
            broker: BrokerId(1),
            address,
        }]);
        state(&node.net, 1, PeerState::Up).await;
        let mut events = node.net.events();
        let before = Instant::now();
        child.start_kill().unwrap();
        let gone = async {
            loop {
                let event = events.recv().await.unwrap();
                assert_eq!(event.broker, BrokerId(1));
                if event.state == PeerState::Gone {
                    return before.elapsed();
                }
            }
        };
        best = best.min(soon(gone).await);
        child.wait().await.unwrap();
    }
    assert!(best < Duration::from_millis(20), "{best:?}");
}

/// Goal: a broker that has run out of file descriptors serves again once it has some. Method: a process with few, more
/// connections than that, then none.
#[tokio::test]
async fn accepting_goes_on_after_file_descriptors_ran_out() {
    let (mut child, address) = start_other_process(Some(30)).await;
    let mut strangers = Vec::new();
    for _ in 0..60 {
        strangers.push(TcpStream::connect(&address).await.unwrap());
    }
    let short = NetConfig {
        handshake_timeout: Duration::from_millis(100),
        ..config()
    };
    let tasks = Tasks::new();
    let starved = Connection::open(&address, &short, &tasks).await;
    assert!(
        matches!(starved, Err(NetError::Unreachable { .. })),
        "{starved:?}"
    );
    strangers.clear();
    let again = async {
        loop {
            if let Ok(client) = Connection::open(&address, &config(), &tasks).await {
                return client;
            }
        }
    };
    let client = soon(again).await;
    assert_eq!(
        soon(client.call(text("x"), LONG).unwrap()).await,
        Ok(text("x"))
    );
    child.start_kill().unwrap();
    child.wait().await.unwrap();
}

/// Goal: a paused process is lost, not gone, and up again when it goes on. Method: SIGSTOP and SIGCONT to a real one.
#[tokio::test]
async fn a_paused_process_is_lost_and_returns() {
    let (mut child, address) = start_other_process(None).await;
    let config = NetConfig {
        keepalive_interval: Duration::from_millis(400),
        handshake_timeout: Duration::from_millis(300),
        ..config()
    };
    let node = Node::start_at("127.0.0.1:0", identity(2), config, Arc::new(Echo)).await;
    node.net.set_peers(vec![Endpoint {
        broker: BrokerId(1),
        address,
    }]);
    state(&node.net, 1, PeerState::Up).await;
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    let signal = |signal| {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    };
    let mut events = node.net.events();
    signal(rustix::process::Signal::STOP);
    assert_eq!(soon(events.recv()).await.unwrap().state, PeerState::Lost);
    signal(rustix::process::Signal::CONT);
    assert_eq!(soon(events.recv()).await.unwrap().state, PeerState::Up);
    child.start_kill().unwrap();
    child.wait().await.unwrap();
}

/// Goal: a peer that returns is connected when it shows itself, however long the next attempt is off.
/// Method: long waits between attempts; the peer connects from its side.
#[tokio::test]
async fn a_returning_peer_is_met_half_way() {
    let patient = NetConfig {
        reconnect_min: Duration::from_secs(600),
        reconnect_max: Duration::from_secs(600),
        ..config()
    };
    let node = Node::start_at("127.0.0.1:0", identity(2), patient, Arc::new(Echo)).await;
    let server = Node::start(1, Arc::new(Echo)).await;
    let address = server.address();
    node.net.set_peers(vec![server.endpoint()]);
    state(&node.net, 1, PeerState::Up).await;
    server.kill().await;
    state(&node.net, 1, PeerState::Gone).await;
    let server = Node::start_at(&address, identity(1), config(), Arc::new(Echo)).await;
    server.net.set_peers(vec![node.endpoint()]);
    state(&node.net, 1, PeerState::Up).await;
}

/// Goal: a peer that is connected to this broker is not called gone because its address is wrong; when it ends, it is.
/// Method: an address that nobody listens on.
#[tokio::test]
async fn a_wrong_address_is_no_evidence_while_the_peer_is_connected() {
    // Long waits between attempts: only the end of the peer's own connection makes this broker look.
    let patient = NetConfig {
        reconnect_min: Duration::from_secs(600),
        reconnect_max: Duration::from_secs(600),
        ..config()
    };
    let one = Node::start_at("127.0.0.1:0", identity(1), patient, Arc::new(Echo)).await;
    let two = Node::start(2, Arc::new(Echo)).await;
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = unused.local_addr().unwrap().to_string();
    drop(unused);
    two.net.set_peers(vec![one.endpoint()]);
    state(&two.net, 1, PeerState::Up).await;
    one.net.set_peers(vec![Endpoint {
        broker: BrokerId(2),
        address,
    }]);
    state(&one.net, 2, PeerState::Lost).await;
    two.kill().await;
    state(&one.net, 2, PeerState::Gone).await;
}

/// Goal: one that asks and does not read costs no more than the send queue: its requests are not taken any more, and answers
/// above the bound close the connection. Method: a stranger that only writes, before a server that answers at once and
/// before one that answers all at the end.
#[tokio::test]
async fn answers_that_nobody_reads_are_bounded() {
    let limits = NetConfig {
        send_queue_bytes: 2 << 20,
        ..config()
    };
    let request = |queue: &mut SendQueue, correlation| {
        let body = vec![Bytes::from(vec![9; 500_000])];
        let message = Message {
            header: Bytes::new(),
            body,
        };
        queue.push(Kind::Request, Channel::Api.to_byte(), correlation, message);
    };
    let mut wire = std::collections::VecDeque::new();
    let mut queue = SendQueue::default();
    for correlation in 0..60 {
        request(&mut queue, correlation);
    }
    queue.take(&mut wire);
    let wire: Vec<u8> = wire.into_iter().flatten().collect();
    let server = Node::start_at("127.0.0.1:0", identity(1), limits.clone(), Arc::new(Echo)).await;
    let mut stranger = raw_client(&server.address()).await;
    let all = timeout(Duration::from_millis(500), stranger.write_all(&wire)).await;
    assert!(all.is_err(), "30 MB were taken from one that reads nothing");
    let (slow, mut got, mut gone) = Node::collecting(1, limits).await;
    let mut stranger = raw_client(&slow.address()).await;
    soon(stranger.write_all(&wire)).await.unwrap();
    let mut replies = Vec::new();
    for _ in 0..60 {
        let (_, _, message, reply) = soon(got.recv()).await.unwrap();
        replies.push((message, reply));
    }
    for (message, reply) in replies {
        reply.send(message);
    }
    soon(gone.recv()).await.unwrap();
}

/// Goal: a connection that was refused is tried again and elsewhere: the other side may only be leaving. Method: the error a
/// caller sees.
#[test]
fn a_refused_connection_is_no_final_answer() {
    let refused = NetError::Refused {
        address: "a:1".to_owned(),
        reason: "broker 1 is shutting down".to_owned(),
    };
    let error = Error::from(refused);
    assert_eq!(error.outcome(), crate::types::Outcome::NotDone);
    assert!(error.is_retriable(), "{error}");
    assert!(error.to_string().contains("shutting down"), "{error}");
}
