//! The proxy between plain sockets, and between two real networks with their handshake.

use std::collections::BTreeSet;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use super::*;
use crate::net::{
    Channel, Connection, Handler, Identity, Lane, Message, Net, NetConfig, Origin, PeerState, Reply,
};
use crate::testkit::links::AfterCut;
use crate::types::{Endpoint, Incarnation};

const LONG: Duration = Duration::from_secs(20);
/// How long silence is listened to.
const SILENCE: Duration = Duration::from_millis(150);
const ONE: BrokerId = BrokerId(1);
const TWO: BrokerId = BrokerId(2);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(LONG, future).await.expect("in time")
}

/// A listener in the place of a broker, a proxy in front of it.
struct Front {
    listener: TcpListener,
    proxy: Proxy,
    links: Links,
}

impl Front {
    async fn start(links: Links) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = listener.local_addr().unwrap().to_string();
        let proxy = Proxy::start(ONE, "127.0.0.1:0", Some(&upstream), &links)
            .await
            .unwrap();
        Self {
            listener,
            proxy,
            links,
        }
    }

    async fn dial(&self) -> TcpStream {
        let stream = soon(TcpStream::connect(self.proxy.address()))
            .await
            .unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Both ends of a connection over which something has passed both ways.
    async fn pair(&self) -> (TcpStream, TcpStream) {
        let mut near = self.dial().await;
        near.write_all(b"not the handshake").await.unwrap();
        let mut far = accept(&self.listener).await;
        assert_eq!(read(&mut far, 17).await, b"not the handshake");
        far.write_all(b"!").await.unwrap();
        assert_eq!(read(&mut near, 1).await, b"!");
        (near, far)
    }
}

/// The next connection that says something: looks of the proxy hang up at once.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        let (far, _) = soon(listener.accept()).await.unwrap();
        if matches!(soon(far.peek(&mut [0])).await, Ok(1..)) {
            return far;
        }
    }
}

async fn read(stream: &mut TcpStream, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    soon(stream.read_exact(&mut buffer)).await.unwrap();
    buffer
}

/// Neither bytes nor an end come.
async fn assert_silent(stream: &mut TcpStream) {
    let mut byte = [0];
    let heard = timeout(SILENCE, stream.read(&mut byte)).await;
    assert!(heard.is_err(), "{heard:?}");
}

async fn assert_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let end = soon(stream.read_to_end(&mut rest)).await;
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

async fn assert_refused(address: SocketAddr) {
    let error = soon(TcpStream::connect(address)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

fn pattern(bytes: usize) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at.wrapping_mul(31) ^ (at >> 9)) & 0xff).unwrap_or(0);
    (0..bytes).map(byte).collect()
}

/// Goal: without a rule the proxy changes nothing: bytes, their order, small pieces, ends in order. Method: 3 MB one way, ten
/// thousand single bytes answered one by one the other way, then both halves closed in turn.
#[tokio::test]
async fn without_rules_bytes_and_ends_pass() {
    let front = Front::start(Links::new()).await;
    let (mut near, mut far) = front.pair().await;
    let sent = pattern(3_000_000);
    let (mut near_read, mut near_write) = near.split();
    let mut got = vec![0; sent.len()];
    let (written, found) =
        soon(async { tokio::join!(near_write.write_all(&sent), far.read_exact(&mut got)) }).await;
    written.unwrap();
    found.unwrap();
    assert!(got == sent, "other bytes came out than went in");
    for at in 0..10_000_u32 {
        let byte = [u8::try_from(at % 251).unwrap()];
        far.write_all(&byte).await.unwrap();
        let mut back = [0];
        soon(near_read.read_exact(&mut back)).await.unwrap();
        assert_eq!(back, byte);
        near_write.write_all(&back).await.unwrap();
        soon(far.read_exact(&mut back)).await.unwrap();
    }
    near.shutdown().await.unwrap();
    let mut rest = Vec::new();
    assert_eq!(soon(far.read_to_end(&mut rest)).await.unwrap(), 0);
    far.write_all(b"after").await.unwrap();
    drop(far);
    assert_eq!(soon(near.read_to_end(&mut rest)).await.unwrap(), 5);
    let carried = front.links.carried(Party::Clients, ONE);
    assert_eq!(carried, 17 + 3_000_000 + 10_000);
    assert_eq!(front.links.carried(ONE, Party::Clients), 1 + 10_000 + 5);
}

/// Goal: a process that is gone is found out as without a proxy: connections are refused by the time its end is heard, and the
/// port stays the proxy's own. Method: a listener that closes with and without unread bytes, comes back, and moves.
#[tokio::test]
async fn a_port_that_refuses_is_refused() {
    for unread in [false, true] {
        let front = Front::start(Links::new()).await;
        let (mut near, far) = front.pair().await;
        if unread {
            near.write_all(b"unread").await.unwrap();
            soon(far.peek(&mut [0])).await.unwrap();
        }
        let upstream = front.listener.local_addr().unwrap();
        drop(front.listener);
        drop(far);
        let mut rest = Vec::new();
        let end = soon(near.read_to_end(&mut rest)).await;
        assert_eq!(end.is_err(), unread, "a reset where one was: {end:?}");
        assert_refused(front.proxy.address()).await;
        // back at the same place: found without being told
        let back = TcpListener::bind(upstream).await.unwrap();
        let again = async {
            loop {
                match TcpStream::connect(front.proxy.address()).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        let mut near = soon(again).await;
        near.write_all(b"once again").await.unwrap();
        let mut far = accept(&back).await;
        assert_eq!(read(&mut far, 10).await, b"once again");
        front.proxy.set_upstream(None).await;
        assert_refused(front.proxy.address()).await;
        let moved = TcpListener::bind("127.0.0.1:0").await.unwrap();
        front
            .proxy
            .set_upstream(Some(moved.local_addr().unwrap()))
            .await;
        soon(TcpStream::connect(front.proxy.address()))
            .await
            .unwrap();
    }
}

/// Goal: the proxies of a cluster do not get each other's ports, whether they listen or not. Method: many at once.
#[tokio::test]
async fn ports_are_not_shared() {
    let (links, mut proxies) = (Links::new(), Vec::new());
    for _ in 0..200 {
        let started = Proxy::start(ONE, "127.0.0.1:0", None, &links);
        proxies.push(started.await.unwrap());
    }
    let addresses: BTreeSet<_> = proxies.iter().map(Proxy::address).collect();
    assert_eq!(addresses.len(), proxies.len());
}

/// Goal: what is cut one way is silent that way only, takes bounded memory, hides ends, and is delivered late and whole. Method:
/// a sender that is cut off writes until it is held up, then closes; the other way goes on; then the link heals.
#[tokio::test]
async fn a_cut_holds_back_and_delivers_late() {
    let front = Front::start(Links::new()).await;
    let (mut near, mut far) = front.pair().await;
    front.links.cut(Party::Clients, ONE);
    let before = front.links.carried(Party::Clients, ONE);
    let chunk = pattern(100_000);
    let mut written = 0;
    while let Ok(wrote) = timeout(SILENCE, near.write(&chunk[written % chunk.len()..])).await {
        written += wrote.unwrap();
        assert!(written < 64 << 20, "nothing holds the sender up");
    }
    assert_silent(&mut far).await;
    far.write_all(b"the other way").await.unwrap();
    assert_eq!(read(&mut near, 13).await, b"the other way");
    near.shutdown().await.unwrap();
    assert_silent(&mut far).await;
    assert_eq!(front.links.carried(Party::Clients, ONE), before);

    front.links.heal(Party::Clients, ONE);
    let mut got = Vec::new();
    soon(far.read_to_end(&mut got)).await.unwrap();
    let same = got.chunks(chunk.len()).all(|part| chunk.starts_with(part));
    assert!(
        got.len() == written && same,
        "{} of {written} bytes",
        got.len()
    );
}

/// Goal: while either way is cut, no connection comes about, and none that was given up reaches the broker later. Method: two
/// dial into each cut, one gives up; the link heals.
#[tokio::test]
async fn no_connection_comes_about_through_a_cut() {
    for (from, to) in [
        (Party::Clients, ONE.into()),
        (Party::Broker(ONE), Party::Clients),
    ] {
        let front = Front::start(Links::new()).await;
        front.pair().await;
        front.links.cut(from, to);
        let mut given_up = front.dial().await;
        given_up.write_all(b"given up in between").await.unwrap();
        let mut waits = front.dial().await;
        waits.write_all(b"waits for its turn.").await.unwrap();
        assert_silent(&mut given_up).await;
        let accepted = timeout(SILENCE, accept(&front.listener)).await;
        assert!(accepted.is_err(), "{accepted:?}");
        drop(given_up);
        // its end has been seen when a later one's has: they are taken in turn
        assert_silent(&mut waits).await;
        front.links.heal(from, to);
        let mut far = accept(&front.listener).await;
        assert_eq!(read(&mut far, 19).await, b"waits for its turn.");
        let more = timeout(SILENCE, accept(&front.listener)).await;
        assert!(more.is_err(), "{more:?}");
    }
}

/// Goal: connections that met a cut are reset when the rule says so; those that come later are not. Method: both kinds of cut,
/// healed by each way there is.
#[tokio::test]
async fn a_healed_cut_can_reset() {
    type Act = fn(&Links);
    let ways: [(Act, Act); 4] = [
        (
            |links| links.cut(Party::Clients, ONE),
            |links| links.heal(ONE, Party::Clients),
        ),
        (
            |links| links.cut_both(Party::Clients, ONE),
            |links| links.heal_one_way(ONE, Party::Clients),
        ),
        (
            |links| links.isolate_from_all(ONE),
            |links| links.rejoin(ONE),
        ),
        (|links| links.isolate_from_all(ONE), Links::heal_all),
    ];
    for (cut, heal) in ways {
        let front = Front::start(Links::new()).await;
        front.links.after_cut(AfterCut::Reset);
        let (mut near, mut far) = front.pair().await;
        cut(&front.links);
        near.write_all(b"held").await.unwrap();
        assert_silent(&mut far).await;
        heal(&front.links);
        assert_reset(&mut near).await;
        assert_reset(&mut far).await;
        front.links.heal_all();
        front.pair().await;
    }
}

/// Goal: a delayed link is late and in order, and still carries more than one piece per delay. Method: 200 pieces with 30 ms
/// and jitter each; in all they take less than half of what they would one after another.
#[tokio::test]
async fn a_delayed_link_is_late_and_in_order() {
    let front = Front::start(Links::seeded(3)).await;
    let (mut near, mut far) = front.pair().await;
    let delay = Duration::from_millis(30);
    front.links.delay(Party::Clients, ONE, delay, delay);
    let began = Instant::now();
    let mut first = None;
    let sent = pattern(200 * 50);
    for piece in sent.chunks(50) {
        near.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut got = Vec::new();
    while got.len() < sent.len() {
        soon(far.read_buf(&mut got)).await.unwrap();
        first.get_or_insert(began.elapsed());
    }
    assert!(first >= Some(delay), "{first:?}");
    assert!(began.elapsed() < 100 * delay, "{:?}", began.elapsed());
    assert!(got == sent, "out of order");
}

/// Goal: a throttled link carries what it should over all its connections together, and comes to itself when it heals. Method:
/// 60 kB over three connections at 100 kB/s, then at no limit.
#[tokio::test]
async fn a_throttled_link_carries_no_more() {
    let front = Front::start(Links::new()).await;
    let mut pairs = Vec::new();
    for _ in 0..3 {
        pairs.push(front.pair().await);
    }
    front.links.throttle(Party::Clients, ONE, 100_000);
    let began = Instant::now();
    for (near, _) in &mut pairs {
        near.write_all(&pattern(20_000)).await.unwrap();
    }
    for (_, far) in &mut pairs {
        assert!(read(far, 20_000).await == pattern(20_000));
    }
    let took = began.elapsed();
    assert!(took > Duration::from_millis(500), "{took:?}");
    front.links.throttle(Party::Clients, ONE, 1_000);
    for (near, _) in &mut pairs {
        near.write_all(&pattern(20_000)).await.unwrap();
    }
    assert_silent(&mut pairs[0].0).await;
    front.links.heal_all();
    let began = Instant::now();
    for (_, far) in &mut pairs {
        assert!(read(far, 20_000).await == pattern(20_000));
    }
    let took = began.elapsed();
    assert!(
        took < Duration::from_secs(10),
        "a minute's worth took {took:?}"
    );
}

/// Goal: a reset breaks what exists, in the middle of anything, and nothing else. Method: one with bytes under way; another one
/// dialed after it.
#[tokio::test]
async fn a_reset_breaks_existing_connections() {
    let front = Front::start(Links::new()).await;
    let (mut near, mut far) = front.pair().await;
    front.links.reset(Party::Clients, TWO); // somebody else's
    near.write_all(b"still").await.unwrap();
    assert_eq!(read(&mut far, 5).await, b"still");
    front.links.reset(ONE, Party::Clients);
    assert_reset(&mut near).await;
    assert_reset(&mut far).await;
    front.pair().await;
}

/// Goal: half-open: new connections are taken and nothing more happens; existing ones go on. Method: one of each.
#[tokio::test]
async fn a_half_open_link_takes_connections_and_hangs() {
    let front = Front::start(Links::new()).await;
    let (mut near, mut far) = front.pair().await;
    front.links.half_open(Party::Clients, ONE);
    let mut hangs = front.dial().await;
    hangs.write_all(b"anybody there?").await.unwrap();
    let accepted = timeout(SILENCE, accept(&front.listener)).await;
    assert!(accepted.is_err(), "{accepted:?}");
    assert_silent(&mut hangs).await;
    near.write_all(b"goes on").await.unwrap();
    assert_eq!(read(&mut far, 7).await, b"goes on");
    front.links.heal_all();
    let mut far = accept(&front.listener).await;
    assert_eq!(read(&mut far, 14).await, b"anybody there?");
}

/// Goal: the end of one side is news to the other only over an open link, whichever side notices it. Method: the far side ends
/// while what it says is cut, and the near side goes on sending; then the link heals.
#[tokio::test]
async fn an_end_is_not_heard_through_a_cut() {
    let front = Front::start(Links::new()).await;
    let (mut near, far) = front.pair().await;
    front.links.cut(ONE, Party::Clients);
    drop(far);
    for _ in 0..10 {
        near.write_all(&pattern(10_000)).await.unwrap();
        assert_silent(&mut near).await;
    }
    front.links.heal_all();
    let mut rest = Vec::new();
    let end = soon(near.read_to_end(&mut rest)).await;
    assert!(matches!(end, Err(_) | Ok(0)), "{end:?}");
}

struct Echo;

impl Handler for Echo {
    fn handle(&self, _: &Origin, _: Channel, message: Message, reply: Reply) {
        reply.send(message);
    }
    fn closed(&self, _: &Origin) {}
}

async fn network(broker: BrokerId, links: &Links, tasks: &Tasks) -> (Net, Proxy) {
    let identity = Identity {
        broker,
        incarnation: Incarnation(broker.0.into()),
        cluster: None,
        boot: 1,
        position: 0,
    };
    let net = Net::bind("127.0.0.1:0", identity, NetConfig::default(), tasks.clone())
        .await
        .unwrap();
    net.serve(Arc::new(Echo));
    let upstream = net.local_addr().to_string();
    let proxy = Proxy::start(broker, "127.0.0.1:0", Some(&upstream), links)
        .await
        .unwrap();
    (net, proxy)
}

async fn until(net: &Net, broker: BrokerId, state: PeerState) {
    let mut events = net.events();
    let wait = async {
        while net.peer_state(broker) != state {
            events.recv().await.ok();
        }
    };
    let found = timeout(LONG, wait).await;
    assert!(found.is_ok(), "{broker} is {:?}", net.peer_state(broker));
}

fn hello() -> Message {
    Message {
        header: Bytes::from_static(b"hello"),
        body: Vec::new(),
    }
}

/// Goal: rules are by the broker that opened a connection, and by direction over all connections. Method: two networks and a
/// client behind proxies: a cut from 1 to 2 leaves neither of them an answer of the other, as a question or its answer is lost,
/// while 1 hears the keepalives of 2, and the client is answered; an isolation leaves the client alone too; all heal.
#[tokio::test]
async fn brokers_are_told_from_clients() {
    let (links, tasks) = (Links::new(), Tasks::new());
    let (one, before_one) = network(ONE, &links, &tasks).await;
    let (two, before_two) = network(TWO, &links, &tasks).await;
    let at = |broker, proxy: &Proxy| Endpoint {
        broker,
        address: proxy.address().to_string(),
    };
    one.set_peers(vec![at(TWO, &before_two)]);
    two.set_peers(vec![at(ONE, &before_one)]);
    let address = before_two.address().to_string();
    let client = Connection::open(&address, &NetConfig::default(), &tasks)
        .await
        .unwrap();
    let ask = async |net: &Net, broker, within| {
        net.call(broker, Lane::Control, Channel::Api, hello(), within)
            .ok()?
            .await
            .ok()
    };
    let healed = async || {
        until(&one, TWO, PeerState::Up).await;
        until(&two, ONE, PeerState::Up).await;
        assert!(ask(&one, TWO, LONG).await.is_some());
        assert!(ask(&two, ONE, LONG).await.is_some());
    };
    healed().await;

    links.cut(ONE, TWO);
    let silent = (links.carried(ONE, TWO), links.carried(TWO, ONE));
    let asked = tokio::join!(ask(&one, TWO, SILENCE), ask(&two, ONE, SILENCE));
    assert_eq!(asked, (None, None));
    until(&two, ONE, PeerState::Lost).await;
    assert_eq!(links.carried(ONE, TWO), silent.0);
    assert!(links.carried(TWO, ONE) > silent.1);
    let answer = client.call(hello(), LONG).unwrap();
    assert_eq!(soon(answer).await.unwrap(), hello());
    links.heal(ONE, TWO);
    healed().await;

    links.isolate(TWO);
    until(&one, TWO, PeerState::Lost).await;
    let answer = client.call(hello(), LONG).unwrap();
    assert_eq!(soon(answer).await.unwrap(), hello());
    links.rejoin(TWO);
    healed().await;
    tasks.shutdown().await;
}

/// Goal: news of a process that is gone is as fast and as hard through a proxy. Method: a network ends without a goodbye; its
/// peer, which reaches it by proxy, calls it gone.
#[tokio::test]
async fn a_broker_behind_a_proxy_is_found_gone() {
    let links = Links::new();
    let (tasks, tasks_two) = (Tasks::new(), Tasks::new());
    let (one, _before_one) = network(ONE, &links, &tasks).await;
    let (two, before_two) = network(TWO, &links, &tasks_two).await;
    one.set_peers(vec![Endpoint {
        broker: TWO,
        address: before_two.address().to_string(),
    }]);
    until(&one, TWO, PeerState::Up).await;
    tasks_two.shutdown().await;
    drop(two);
    until(&one, TWO, PeerState::Gone).await;
    tasks.shutdown().await;
}
