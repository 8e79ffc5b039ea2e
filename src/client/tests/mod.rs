//! Client, producer and consumer against a cluster in memory that misbehaves.

mod fake;

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use rand::{Rng, SeedableRng, rngs::StdRng};

use self::fake::{Fake, Fault, TOPIC};
use super::*;
use crate::types::{Acks, Offset, Outcome, PartitionId, TopicPartition};

fn fast() -> ClientConfig {
    ClientConfig {
        backoff_min: Duration::from_millis(1),
        backoff_max: Duration::from_millis(4),
        request_timeout: Duration::from_millis(100),
        deadline: Duration::from_secs(20),
        unknown_topic_grace: Duration::from_millis(20),
        ..ClientConfig::default()
    }
}

fn small_batches() -> ProducerConfig {
    ProducerConfig {
        batch_bytes: 300,
        delivery_timeout: Duration::from_secs(20),
        ..ProducerConfig::default()
    }
}

fn refused() -> Error {
    Error::Refused {
        reason: "scripted".to_owned(),
    }
}

fn no_leader() -> Error {
    let topic = TopicName::new(TOPIC).unwrap();
    Error::LeaderUnavailable {
        partition: TopicPartition {
            topic,
            partition: PartitionId(0),
        },
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .expect("no end within 30 s")
}

/// Goal: whatever is lost, repeated, moved or refused for now, every record is in its log once, in order, and where its ack says.
/// Method: random faults from many seeds on half of the requests; then the log is compared with what was sent.
#[tokio::test]
async fn faults_neither_lose_nor_repeat_nor_reorder() {
    for seed in 0..30 {
        let mut random = StdRng::seed_from_u64(seed);
        let fake = Fake::new(2);
        fake.script((0..60).map(|_| match random.random_range(0..12) {
            0 => Fault::LoseAnswer,
            1 => Fault::LoseRequest,
            2 => Fault::Repeat,
            3 => Fault::Refuse(no_leader()),
            4 => Fault::Move,
            5 if seed % 10 == 0 => Fault::Silence,
            _ => Fault::Pass,
        }));
        let client = fake.client(fast());
        let producer = Producer::new(&client, TOPIC, small_batches()).unwrap();
        let mut deliveries = Vec::new();
        let mut sent = [Vec::new(), Vec::new()];
        for number in 0..300_u32 {
            let partition = random.random_range(0..2_u32);
            let value = format!("record {number}");
            let delivery = producer
                .send_to(partition, Record::new(value.clone()))
                .await
                .unwrap();
            let at = usize::try_from(partition).unwrap();
            deliveries.push((at, value.clone(), delivery));
            sent[at].push(value);
            if random.random_bool(0.05) {
                tokio::task::yield_now().await;
            }
        }
        within(producer.close()).await.unwrap();
        for (at, value, delivery) in deliveries {
            let ack = within(delivery).await.unwrap();
            assert_eq!(fake.value_at(at, ack.offset), value, "seed {seed}");
        }
        for (at, sent) in sent.iter().enumerate() {
            assert_eq!(&fake.values(at), sent, "seed {seed}, partition {at}");
        }
    }
}

/// Goal: without sequences nothing is repeated after an unknown attempt, and the caller is told. Method: lose an answer, count
/// the log.
#[tokio::test]
async fn a_plain_append_is_not_repeated_after_a_lost_answer() {
    for (fault, outcome, appended) in [
        (Fault::LoseAnswer, Outcome::Unknown, 1),
        (Fault::LoseRequest, Outcome::Unknown, 0),
        (Fault::Refuse(refused()), Outcome::NotDone, 0),
    ] {
        let fake = Fake::new(1);
        fake.script([fault]);
        let client = fake.client(fast());
        let partition = client.topic(TOPIC).unwrap().partition(0);
        let error = within(partition.append([Record::new("x")], Acks::All))
            .await
            .unwrap_err();
        assert_eq!(error.outcome(), outcome, "{error}");
        assert_eq!(fake.lock().produce_calls, 1);
        assert_eq!(fake.values(0).len(), appended);

        let ack = within(partition.append([Record::new("y")], Acks::All))
            .await
            .unwrap();
        assert_eq!(fake.value_at(0, ack.offset), "y");
    }
}

/// Goal: definite refusals are repeated until they pass, unknown is reported for what it is when time is over. Method: a leader that
/// is missing for a while; one that never answers.
#[tokio::test]
async fn outcomes_stay_honest_until_the_deadline() {
    let fake = Fake::new(1);
    fake.script(vec![Fault::Refuse(no_leader()); 5]);
    let client = fake.client(fast());
    let partition = client.topic(TOPIC).unwrap().partition(0);
    within(partition.append([Record::new("x")], Acks::All))
        .await
        .unwrap();
    assert_eq!(fake.values(0), ["x"]);

    let hasty = ClientConfig {
        deadline: Duration::from_millis(50),
        ..fast()
    };
    let client = fake.client(hasty);
    let partition = client.topic(TOPIC).unwrap().partition(0);
    fake.script([Fault::Silence]);
    let error = within(partition.append([Record::new("y")], Acks::All))
        .await
        .unwrap_err();
    assert_eq!(error.outcome(), Outcome::Unknown);

    fake.script(vec![Fault::Refuse(no_leader()); 1_000]);
    let error = within(partition.append([Record::new("z")], Acks::All))
        .await
        .unwrap_err();
    assert_eq!((error.outcome(), error), (Outcome::NotDone, no_leader()));
    assert_eq!(fake.values(0), ["x", "y"]);
}

/// Goal: an idempotent batch whose answer was lost stays unknown when it can only be refused afterwards. Method: lose the answer, then
/// refuse for good.
#[tokio::test]
async fn a_producer_does_not_call_an_unknown_batch_not_done() {
    let fake = Fake::new(1);
    fake.script([Fault::LoseAnswer, Fault::Refuse(refused())]);
    let client = fake.client(fast());
    let producer = Producer::new(&client, TOPIC, small_batches()).unwrap();
    let delivery = producer.send(Record::new("x")).await.unwrap();
    let error = within(delivery).await.unwrap_err();
    assert_eq!(error.outcome(), Outcome::Unknown, "{error}");
    assert_eq!(fake.values(0), ["x"]);
}

/// Goal: a batch that is given up takes the numbered ones behind it along, nothing is appended behind a gap, and what comes later is
/// appended. Method: hold the answers until five batches are out, refuse the first.
#[tokio::test]
async fn a_batch_given_up_leaves_no_gap() {
    let fake = Fake::new(1);
    fake.script([Fault::Refuse(refused())]);
    fake.hold.send_replace(true);
    let client = fake.client(fast());
    let config = ProducerConfig {
        batch_bytes: 1,
        ..small_batches()
    };
    let producer = Producer::new(&client, TOPIC, config).unwrap();
    let mut deliveries = Vec::new();
    for number in 0..8 {
        deliveries.push(
            producer
                .send(Record::new(format!("{number}")))
                .await
                .unwrap(),
        );
    }
    within(async {
        while fake.lock().produce_calls < 5 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    fake.hold.send_replace(false);
    let mut failed = 0;
    for (number, delivery) in deliveries.into_iter().enumerate() {
        match within(delivery).await {
            Ok(ack) => assert_eq!(fake.value_at(0, ack.offset), number.to_string()),
            Err(error) => {
                assert_eq!(error.outcome(), Outcome::NotDone, "{error}");
                failed += 1;
            }
        }
    }
    assert_eq!(failed, 5);
    assert_eq!(fake.values(0), ["5", "6", "7"]);
    assert_eq!(producer.flush().await, Err(refused()));
    assert_eq!(producer.flush().await, Ok(()));
}

/// Goal: a record too large is refused by itself, at once; the largest one that fits is not. Method: between two others.
#[tokio::test]
async fn a_record_too_large_takes_nothing_with_it() {
    let fake = Fake::new(1);
    let producer = Producer::new(&fake.client(fast()), TOPIC, small_batches()).unwrap();
    let first = producer.send(Record::new("a")).await.unwrap();
    let refused = producer.send(Record::new("x".repeat(2 << 20))).await;
    assert!(
        matches!(refused, Err(Error::RecordTooLarge { size, max: 1_048_588 }) if size > 2 << 20),
        "{refused:?}"
    );
    let around = batch::encode(&[Record::new("x".repeat(1 << 19))], None).unwrap();
    let largest = "x".repeat(1_048_588 - (around.len() - (1 << 19)));
    let fits = producer.send(Record::new(largest.clone())).await.unwrap();
    let refused = producer.send(Record::new(format!("{largest}x"))).await;
    assert!(
        matches!(
            refused,
            Err(Error::RecordTooLarge {
                size: 1_048_589,
                ..
            })
        ),
        "{refused:?}"
    );
    for delivery in [first, fits] {
        within(delivery).await.unwrap();
    }
    assert_eq!(fake.values(0), ["a".to_owned(), largest]);
}

/// Goal: the buffer's bound holds `send` back, and an acknowledgement lets it go on. Method: no answers, then answers.
#[tokio::test]
async fn send_waits_when_the_buffer_is_full() {
    let fake = Fake::new(1);
    fake.hold.send_replace(true);
    let config = ProducerConfig {
        buffer_bytes_max: 2_000,
        ..small_batches()
    };
    let producer = Producer::new(&fake.client(fast()), TOPIC, config).unwrap();
    let record = || Record::new("x".repeat(500));
    let mut deliveries = Vec::new();
    let refused = loop {
        let send = producer.send(record());
        match tokio::time::timeout(Duration::from_millis(30), send).await {
            Ok(delivery) => deliveries.push(delivery.unwrap()),
            Err(_) => break deliveries.len(),
        }
    };
    assert_eq!(refused, 3);
    fake.hold.send_replace(false);
    deliveries.push(within(producer.send(record())).await.unwrap());
    within(producer.flush()).await.unwrap();
    assert_eq!(fake.values(0).len(), 4);
    let too_large = producer.send(Record::new("x".repeat(2_000))).await;
    assert!(matches!(too_large, Err(Error::RecordTooLarge { .. })));
}

/// Goal: no more batches are out than allowed, small ones gather company, and linger is ended by a flush. Method: hold the answers
/// and count requests.
#[tokio::test]
async fn batches_form_while_others_are_in_flight() {
    let fake = Fake::new(1);
    fake.hold.send_replace(true);
    let producer = Producer::new(&fake.client(fast()), TOPIC, ProducerConfig::default()).unwrap();
    for number in 0..1_000 {
        drop(
            producer
                .send(Record::new(format!("{number}")))
                .await
                .unwrap(),
        );
        tokio::task::yield_now().await;
    }
    assert!(fake.lock().in_flight_peak <= 2);
    fake.hold.send_replace(false);
    within(producer.flush()).await.unwrap();
    assert!(
        fake.lock().produce_calls <= 4,
        "{} requests",
        fake.lock().produce_calls
    );
    assert_eq!(fake.values(0).len(), 1_000);

    let config = ProducerConfig {
        linger: Duration::from_secs(3_600),
        ..ProducerConfig::default()
    };
    let patient = Producer::new(&fake.client(fast()), TOPIC, config).unwrap();
    let mut delivery = patient.send(Record::new("late")).await.unwrap();
    assert!((&mut delivery).now_or_never().is_none());
    within(patient.flush()).await.unwrap();
    within(delivery).await.unwrap();
}

/// Goal: a dropped or closed producer leaves nobody waiting. Method: hold the answers, drop; send after close.
#[tokio::test]
async fn nobody_waits_for_a_producer_that_is_gone() {
    let fake = Fake::new(1);
    fake.hold.send_replace(true);
    let producer = Producer::new(&fake.client(fast()), TOPIC, small_batches()).unwrap();
    let delivery = producer.send(Record::new("x")).await.unwrap();
    within(async {
        while fake.lock().produce_calls == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(producer);
    let error = within(delivery).await.unwrap_err();
    assert_eq!(error.outcome(), Outcome::Unknown);

    fake.hold.send_replace(false);
    let producer = Producer::new(&fake.client(fast()), TOPIC, small_batches()).unwrap();
    within(producer.close()).await.unwrap();
    assert!(producer.send(Record::new("x")).await.is_err());
}

/// Goal: keyed records go where Kafka puts them. Method: a key with a known hash.
#[tokio::test]
async fn keys_choose_the_partition() {
    let fake = Fake::new(10);
    let producer = Producer::new(&fake.client(fast()), TOPIC, small_batches()).unwrap();
    let delivery = producer
        .send(Record::new("x").with_key("abc"))
        .await
        .unwrap();
    assert_eq!(within(delivery).await.unwrap().partition, PartitionId(7));
}

async fn fill(fake: &Fake, count: u32) {
    let producer = Producer::new(&fake.client(fast()), TOPIC, small_batches()).unwrap();
    for number in 0..count {
        let record = Record::new(format!("{number}"));
        drop(producer.send_to(number % 2, record).await.unwrap());
    }
    within(producer.close()).await.unwrap();
}

/// Goal: a consumer returns each partition's records once and in order through failovers, and ends where it was told to.
/// Method: faults on the requests; compare with the log.
#[tokio::test]
async fn a_consumer_survives_failover() {
    let fake = Fake::new(2);
    fill(&fake, 400).await;
    fake.script((0..40).map(|number| match number % 5 {
        0 => Fault::LoseAnswer,
        1 => Fault::Move,
        2 => Fault::Refuse(no_leader()),
        _ => Fault::Pass,
    }));
    let config = ConsumerConfig {
        fetch_bytes_max: 1,
        ..ConsumerConfig::default()
    };
    let client = fake.client(fast());
    let consumer = Consumer::new(&client, TOPIC, Partitions::All, From::Earliest);
    let mut stream = consumer.config(config).until(Until::End).stream();
    let mut read = [Vec::new(), Vec::new()];
    while let Some(record) = within(stream.next()).await {
        let record = record.unwrap();
        let at = usize::try_from(record.partition.0).unwrap();
        assert_eq!(
            record.offset,
            Offset(u64::try_from(read[at].len()).unwrap())
        );
        read[at].push(String::from_utf8(record.value.unwrap().to_vec()).unwrap());
    }
    assert_eq!(read, [fake.values(0), fake.values(1)]);
}

/// Goal: an offset inside a batch begins there, and new records are waited for. Method: read from the middle, then append.
#[tokio::test]
async fn a_consumer_begins_inside_a_batch_and_goes_on() {
    let fake = Fake::new(2);
    fill(&fake, 100).await;
    let client = fake.client(fast());
    let only_first = Partitions::List(vec![0]);
    let consumer = Consumer::new(&client, TOPIC, only_first, From::Offset(Offset(47)));
    let mut stream = consumer.stream();
    for offset in 47..50 {
        assert_eq!(
            within(stream.next()).await.unwrap().unwrap().offset,
            Offset(offset)
        );
    }
    let partition = client.topic(TOPIC).unwrap().partition(0);
    within(partition.append([Record::new("new")], Acks::All))
        .await
        .unwrap();
    let record = within(stream.next()).await.unwrap().unwrap();
    assert_eq!(
        (record.offset, record.value.as_deref()),
        (Offset(50), Some(b"new".as_slice()))
    );

    let beyond = Consumer::new(&client, TOPIC, Partitions::All, From::Offset(Offset(1_000)));
    let error = within(beyond.until(Until::End).stream().next())
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, Error::OffsetOutOfRange { .. }), "{error}");

    let missing = Partitions::List(vec![9]);
    let mut stream = Consumer::new(&client, TOPIC, missing, From::Earliest).stream();
    let error = within(stream.next()).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::UnknownPartition { .. }), "{error}");
    assert!(within(stream.next()).await.is_none());
}

/// Goal: one connection per broker, hints followed, a dead leader gone round, a wrong topic reported. Method: count dials
/// while the leader moves and dies.
#[tokio::test]
async fn requests_find_the_leader() {
    let fake = Fake::new(1);
    let client = fake.client(fast());
    let partition = client.topic(TOPIC).unwrap().partition(0);
    for _ in 0..10 {
        within(partition.append([Record::new("x")], Acks::All))
            .await
            .unwrap();
    }
    fake.script([Fault::Move]);
    within(partition.append([Record::new("x")], Acks::All))
        .await
        .unwrap();
    assert_eq!(fake.lock().leaders, [2]);
    assert!(
        fake.lock().dials.values().all(|dials| *dials == 1),
        "{:?}",
        fake.lock().dials
    );

    {
        let mut state = fake.lock();
        state.dead = vec![2];
        state.leaders = vec![3];
    }
    assert_eq!(
        within(partition.end_offset(true)).await.unwrap(),
        Offset(11)
    );
    within(partition.append([Record::new("x")], Acks::All))
        .await
        .unwrap();
    assert_eq!(fake.values(0).len(), 12);

    let wrong = client.topic("wrong").unwrap().partition(0);
    let error = within(wrong.end_offset(false)).await.unwrap_err();
    assert!(matches!(error, Error::UnknownTopic { .. }), "{error}");
}

/// Goal: a wrong address is named before anything is tried. Method: a table.
#[tokio::test]
async fn bootstrap_addresses_are_checked() {
    for bad in [&[][..], &["localhost"], &["a:b"], &[":1"], &["a:0"]] {
        let bootstrap: Vec<String> = bad.iter().map(|text| (*text).to_owned()).collect();
        let error = Client::connect(&bootstrap, fast()).await.unwrap_err();
        assert!(
            matches!(error, Error::InvalidConfig { .. }),
            "{bad:?} {error}"
        );
    }
}
