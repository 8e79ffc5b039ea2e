//! Rotten bits in the directory of a real broker: refused or harmless, never served, never spread.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use bytes::Bytes;
use logboom::record::Record;
use logboom::storage::{Checkpoint, LogEntry, LogState, StorageError, Store, StoreConfig};
use logboom::types::{Acks, BrokerId, GroupId, LogIndex, Offset, ReplicaId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use logboom::client::{Client, NewTopic, ProducerConfig};

use crate::durability::{HEAL, create, in_sync};
use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify, wait_for};

/// A shared memory directory, when there is one: a thousand opens sync a lot, and here only content matters.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// `SEED` of the environment or a new one, printed for the replay.
fn random_or_given_seed() -> u64 {
    let seed = std::env::var("SEED").map_or_else(
        |_| logboom::runtime::random_seed(),
        |text| text.parse().unwrap(),
    );
    println!("replay: SEED={seed}");
    seed
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// As a broker with the keys of [`brokers`] opens it.
fn open(directory: &Path, broker: u32) -> Result<Store, StorageError> {
    let config = StoreConfig {
        directory: directory.to_owned(),
        segment_bytes: 1 << 20,
        cache_bytes: 128 << 20,
        catalog_cache_bytes: 16 << 20,
        catalog_sync_bytes: 1 << 19,
        commit_bytes_max: 8 << 20,
        reserve_bytes: 0,
    };
    Store::open(&config, BrokerId(broker))
}

fn brokers() -> crate::support::Builder {
    ProcessCluster::builder(3)
        .key("segment_bytes", 1 << 20)
        .key("preferred_leader_delay_ms", 100)
}

/// All there is to know of a group.
#[derive(Debug, PartialEq)]
struct Content {
    state: LogState,
    entries: Vec<LogEntry>,
    base: Option<Checkpoint>,
    newest: Option<Checkpoint>,
    blocks: Vec<(u64, Bytes)>,
}

async fn contents(store: &Store) -> Result<BTreeMap<u64, Content>, StorageError> {
    let mut found = BTreeMap::new();
    for (id, owner) in store.groups() {
        let log = store.group(id, owner)?;
        let state = log.state();
        let mut entries = Vec::new();
        let mut from = state.purged.map_or(0, |purged| purged.index.0 + 1);
        loop {
            let more = log.read(LogIndex(from), usize::MAX, 1 << 20).await?;
            let Some(last) = more.last() else { break };
            from = last.id.index.0 + 1;
            entries.extend(more);
        }
        let mut blocks = Vec::new();
        let mut key = u64::MAX;
        while let Some((at, block)) = log.block_at_or_below(key)? {
            blocks.push((at, block));
            let Some(below) = at.checked_sub(1) else {
                break;
            };
            key = below;
        }
        let content = Content {
            state,
            entries,
            base: log.base(),
            newest: log.newest_checkpoint(),
            blocks,
        };
        found.insert(id.0, content);
    }
    Ok(found)
}

/// A file that `which` accepts and a bit of it, uniform over all bytes of these files, or over those up to each file's last byte that is not zero:
/// space prepared ahead says nothing.
fn pick(
    random: &mut StdRng,
    root: &Path,
    used_only: bool,
    which: impl Fn(&Path) -> bool,
) -> (PathBuf, u64) {
    let sized: Vec<(PathBuf, u64)> = files(root)
        .into_iter()
        .filter(|path| !path.ends_with("LOCK") && which(path.strip_prefix(root).unwrap()))
        .map(|path| {
            let bytes = fs::read(&path).unwrap();
            let used = bytes
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |at| at + 1);
            let count = if used_only { used } else { bytes.len() };
            (
                path.strip_prefix(root).unwrap().to_owned(),
                count as u64 * 8,
            )
        })
        .filter(|(_, bits)| *bits > 0)
        .collect();
    let total: u64 = sized.iter().map(|(_, bits)| bits).sum();
    let mut at = random.random_range(0..total);
    for (path, bits) in sized {
        if at < bits {
            return (path, at);
        }
        at -= bits;
    }
    unreachable!("{at} is behind {total}")
}

fn flip(path: &Path, bit: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).unwrap();
}

/// Flips a bit at a time and judges. Of the journal and of the catalog: how often intact, refused, or refused when read.
async fn flip_many(
    seed: u64,
    count: u32,
    pristine: &Path,
    broker: u32,
    expected: &BTreeMap<u64, Content>,
) -> BTreeMap<(String, &'static str), u32> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut verdicts = BTreeMap::new();
    for n in 0..count {
        let place = scratch();
        copy(pristine, place.path());
        // A quarter anywhere, a quarter in the small files beside the journal, the others where bytes mean something.
        let beside = |path: &Path| n % 4 != 1 || !path.starts_with("journal");
        let (file, bit) = pick(&mut random, place.path(), n % 4 != 0, beside);
        let what = format!("bit {bit} of {}", file.display());
        flip(&place.path().join(&file), bit);
        let verdict = match open(place.path(), broker) {
            Err(StorageError::Damaged { .. }) => "refused",
            Err(error) => panic!("{what}: {error}"),
            Ok(store) => {
                let verdict = match contents(&store).await {
                    Ok(found) => {
                        assert!(found == *expected, "{what}: other contents");
                        "intact"
                    }
                    Err(StorageError::Damaged { .. }) => "refused when read",
                    Err(error) => panic!("{what}: {error}"),
                };
                store.abandon();
                verdict
            }
        };
        let part = file
            .iter()
            .next()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        *verdicts.entry((part, verdict)).or_default() += 1;
    }
    verdicts
}

/// Goal: one flipped bit anywhere in the directory of a stopped broker is detected or harmless: never other content, never less.
/// Method: 1,000 random flips, each alone, in directories of brokers that served a workload on several topics over several segments,
/// one stopped in order and one killed; the store is opened as a broker does, and everything of every group compared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_a_brokers_directory_is_seen_or_harmless() {
    const FLIPS: u32 = 500;
    let seed = random_or_given_seed();
    let mut cluster = brokers().start().await;
    let client = cluster.client().await;
    create(&client, "rot-three", 2, 3).await;
    create(&client, "rot-two", 2, 2).await;
    for topic in ["rot-three", "rot-two"] {
        let config = WorkloadConfig {
            value_bytes: 1 << 10,
            pause: Duration::ZERO,
            records_max: 600,
            producer: ProducerConfig {
                batch_bytes: 4 << 10,
                ..ProducerConfig::default()
            },
            ..WorkloadConfig::new(topic, 2)
        };
        let workload = Workload::start(&client, config);
        workload.wait_acked(600, HEAL).await;
        workload.stop().await;
    }
    // Leaders change, so there is more than one epoch.
    cluster.kill_9(1).await;
    cluster.restart(1).await;
    in_sync(&client, "rot-three").await;
    cluster.kill_9(3).await;
    assert!(cluster.stop(2).await.success());
    let begun = Instant::now();
    let mut halves = Vec::new();
    for broker in [2, 3] {
        let pristine = scratch();
        copy(cluster.data_dir(broker), pristine.path());
        let other = scratch();
        copy(pristine.path(), other.path());
        let store = open(other.path(), broker).unwrap();
        let expected = contents(&store).await.unwrap();
        store.abandon();
        let entries: usize = expected.values().map(|content| content.entries.len()).sum();
        println!(
            "broker {broker}: {} groups, {entries} entries, {} files",
            expected.len(),
            files(pristine.path()).len()
        );
        assert!(
            expected.len() >= 4 && entries > 50,
            "{} groups, {entries} entries",
            expected.len()
        );
        halves.push((broker, pristine, expected));
    }
    let runs = halves.iter().map(|(broker, pristine, expected)| {
        flip_many(
            seed ^ u64::from(*broker),
            FLIPS,
            pristine.path(),
            *broker,
            expected,
        )
    });
    let mut total = 0;
    let mut seen = 0;
    for (verdicts, (broker, ..)) in futures_util::future::join_all(runs)
        .await
        .into_iter()
        .zip(&halves)
    {
        println!("broker {broker}: {verdicts:?}");
        for ((part, verdict), count) in verdicts {
            total += count;
            seen += if verdict == "intact" { 0 } else { count };
            assert!(
                part != "catalog" || verdict == "intact",
                "damage of the catalog, a cache, was not healed"
            );
        }
    }
    println!(
        "{total} flips, {seen} refused, the others harmless, in {:?}",
        begun.elapsed()
    );
    assert!(
        total == 2 * FLIPS && seen > 100,
        "{total} flips, {seen} seen"
    );
}

/// Goal: a broker with a rotten bit refuses with exit code 1 and one clear line, or keeps the damaged replica out and says so, or serves
/// right; it never spreads it, and the other replicas keep everything. Method: under load, a broker killed, a bit of its journal or
/// catalog flipped, started, and after a while stopped and the bit put right; in the end everything is read back. `FLIPS` sets the rounds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_with_a_flipped_bit_refuses_or_serves_right() {
    let rounds: u32 = std::env::var("FLIPS").map_or(7, |text| text.parse().unwrap());
    let seed = random_or_given_seed();
    let mut random = StdRng::seed_from_u64(seed);
    let mut cluster = brokers().start().await;
    let client = cluster.client().await;
    create(&client, "rot", 3, 3).await;
    let config = WorkloadConfig {
        pause: Duration::from_millis(2),
        ..WorkloadConfig::new("rot", 3)
    };
    let workload = Workload::start(&client, config);
    workload.wait_acked(300, HEAL).await;
    let (mut refused, mut kept_out, mut harmless) = (0, 0, 0);
    for round in 0..rounds {
        let victim = round % 3 + 1;
        cluster.kill_9(victim).await;
        let part = if round % 4 == 3 { "catalog" } else { "journal" };
        let root = cluster.data_dir(victim).join(part);
        let (file, bit) = pick(&mut random, &root, round % 8 != 0, |_| true);
        let what = format!("bit {bit} of {part}/{} of broker {victim}", file.display());
        flip(&root.join(&file), bit);
        let before = cluster.log(victim).len();
        let since = |cluster: &ProcessCluster| cluster.log(victim).split_off(before);
        cluster.start(victim);
        wait_for("the broker to serve or to refuse", HEAL, async || {
            let log = since(&cluster);
            let serves = log.contains("serving") && is_alive(&client, victim).await?;
            ensure!(serves || log.contains("logboom: "), "neither: {log}");
            Ok(())
        })
        .await;
        workload.wait_acked(100, HEAL).await;
        if since(&cluster).contains("logboom: ") {
            let status = cluster.ended(victim).await;
            assert_eq!(status.code(), Some(1), "{what}");
            refused += 1;
        } else {
            cluster.kill_9(victim).await;
        }
        let log = since(&cluster);
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.starts_with("logboom: "))
            .collect();
        assert!(
            lines.len() <= 1 && lines.iter().all(|line| line.contains("is damaged")),
            "{what}: {lines:?}"
        );
        assert!(!log.contains("panicked"), "{what}: {log}");
        if lines.is_empty() {
            let count = if log.contains("is damaged") {
                &mut kept_out
            } else {
                &mut harmless
            };
            *count += 1;
        }
        if part == "journal" {
            // Put right in its place, or a second broker would be damaged while the first one still is.
            if root.join(&file).exists() {
                flip(&root.join(&file), bit);
            }
        }
        cluster.restart(victim).await;
        in_sync(&client, "rot").await;
    }
    let history = workload.stop().await;
    let verdict = verify(&client, "rot", 3, &history).await;
    println!(
        "{rounds} flips: {refused} refused to start, {kept_out} kept a replica out, {harmless} harmless: {verdict}"
    );
    verdict.assert_good(500);
}

async fn is_alive(client: &Client, broker: u32) -> anyhow::Result<bool> {
    let status = client.admin().cluster_status().await?;
    Ok(status
        .brokers
        .iter()
        .any(|one| one.broker == BrokerId(broker) && one.alive))
}

/// Records of the topics below, and how many of them make a batch: enough bytes for a checkpoint, behind which a start reads nothing.
const MARKED: u32 = 10_000;
const MARKED_BATCH: u32 = 50;

/// The value of a record, which nothing else in a directory looks like.
fn marked(topic: &str, number: u32) -> Bytes {
    let mut value = format!("<{topic} {number:06}>").into_bytes();
    value.resize(1 << 10, b'.');
    value.into()
}

/// Creates a topic of one partition on these brokers, the preferred leader first, and fills it.
async fn create_marked(client: &Client, topic: &str, brokers: &[u32]) {
    let factor = u32::try_from(brokers.len()).unwrap();
    let mut new = NewTopic::new(topic, 1, factor);
    new.assignment = vec![brokers.iter().copied().map(BrokerId).collect()];
    client.admin().create_topic(new).await.unwrap();
    in_sync(client, topic).await;
    let partition = client.topic(topic).unwrap().partition(0);
    for first in (0..MARKED).step_by(MARKED_BATCH as usize) {
        let records = (first..first + MARKED_BATCH).map(|number| Record {
            value: Some(marked(topic, number)),
            ..Record::default()
        });
        let ack = partition.append(records, Acks::All).await.unwrap();
        assert_eq!(ack.offset, Offset(first.into()));
    }
}

/// Every record of the topic is there, at its offset.
async fn read_marked(client: &Client, topic: &str) -> anyhow::Result<()> {
    let partition = client.topic(topic)?.partition(0);
    let mut number = 0;
    while number < MARKED {
        let read = partition.read(Offset(number.into()), 1 << 20).await?;
        ensure!(!read.records.is_empty(), "nothing at {number}");
        for record in read.records {
            ensure!(
                record.offset == Offset(number.into())
                    && record.value == Some(marked(topic, number)),
                "another record at {number}: {record:?}"
            );
            number += 1;
        }
    }
    Ok(())
}

/// Where in the journal under `data` a record was written last: the file, and a bit of its value.
fn find_marked(data: &Path, topic: &str, number: u32) -> (PathBuf, u64) {
    let value = marked(topic, number);
    // A replica that was replaced left its own in the segments before.
    files(&data.join("journal"))
        .into_iter()
        .rev()
        .find_map(|file| {
            let bytes = fs::read(&file).unwrap();
            let at = bytes.windows(value.len()).rposition(|part| part == value)?;
            Some((file, (at as u64 + 500) * 8 + 3))
        })
        .unwrap_or_else(|| panic!("record {number} of {topic} is not in {}", data.display()))
}

/// The replicas in the directory of a broker that does not run.
fn replicas_in(data: &Path, broker: u32) -> BTreeMap<GroupId, ReplicaId> {
    let place = scratch();
    copy(data, place.path());
    let store = open(place.path(), broker).unwrap();
    let found = store.groups().into_iter().collect();
    store.abandon();
    found
}

/// Goal: a replica with a rotten log is replaced by a new one on the same broker without a command, nothing lost, and said in few
/// words; the only copy of a partition is not given up, and serves again when its directory is put right. Method: a bit of a
/// record of two partitions is flipped on the stopped broker 1, which leads both: one with copies on 2 and 3, one without. An
/// old record, which only a reader finds while the replica runs; then a late one of the new replica, which its start finds.
/// Wait until all are in sync again; look at the replicas in the directory; in the end put the bit of the only copy right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_replica_is_replaced_by_a_new_one_and_the_only_copy_is_kept() {
    const VICTIM: u32 = 1;
    let (three, lone) = (GroupId(1), GroupId(2));
    let builder = brokers().key("replica_lag_time_max_ms", 1_000);
    let mut cluster = builder.start().await;
    let client = cluster.client().await;
    create_marked(&client, "three", &[VICTIM, 2, 3]).await;
    create_marked(&client, "lone", &[VICTIM]).await;
    let data = cluster.data_dir(VICTIM).to_owned();
    let count = |cluster: &ProcessCluster, text: &str| cluster.log(VICTIM).matches(text).count();
    assert!(cluster.stop(VICTIM).await.success());
    let mut replicas = replicas_in(&data, VICTIM);
    let only = replicas[&lone];
    let (lone_file, lone_bit) = find_marked(&data, "lone", 60);
    flip(&lone_file, lone_bit);
    for (round, number) in [(1, 60), (2, MARKED - 10)] {
        let (file, bit) = find_marked(&data, "three", number);
        flip(&file, bit);
        let before = cluster.log(VICTIM).len();
        cluster.restart(VICTIM).await;
        if round == 1 {
            for topic in ["three", "lone"] {
                leads(&client, topic, VICTIM).await;
            }
            let starts = cluster.log(VICTIM).split_off(before);
            assert!(
                !starts.contains("is damaged"),
                "before it was read: {starts}"
            );
            assert!(read_marked(&client, "lone").await.is_err());
        }
        // The read that meets the damage may fail, the next one finds another leader.
        wait_for("all of it to be read", HEAL, async || {
            read_marked(&client, "three").await
        })
        .await;
        wait_for("the replica to be replaced", HEAL, async || {
            let said = count(&cluster, "a damaged replica is replaced by a new one");
            ensure!(said == round, "said {said} times");
            Ok(())
        })
        .await;
        in_sync(&client, "three").await;
        // The new copy is whole: its broker leads again, and serves all of it.
        leads(&client, "three", VICTIM).await;
        read_marked(&client, "three").await.unwrap();
        if round == 1 {
            wait_for("the only copy to be kept", HEAL, async || {
                let said = count(&cluster, "there is no other copy");
                ensure!(said == 1, "said {said} times");
                Ok(())
            })
            .await;
            // Asked again meanwhile, and not said again.
            tokio::time::sleep(Duration::from_secs(3)).await;
            assert_eq!(count(&cluster, "there is no other copy"), 1);
            assert_eq!(count(&cluster, "the log of a replica is damaged"), 2);
        }
        assert!(cluster.stop(VICTIM).await.success());
        let now = replicas_in(&data, VICTIM);
        assert!(now[&three] > replicas[&three], "{now:?}, was {replicas:?}");
        assert_eq!(now[&lone], only);
        replicas = now;
    }
    assert_eq!(count(&cluster, "starting it again"), 0);
    flip(&lone_file, lone_bit);
    cluster.restart(VICTIM).await;
    for topic in ["lone", "three"] {
        leads(&client, topic, VICTIM).await;
        read_marked(&client, topic).await.unwrap();
    }
    in_sync(&client, "three").await;
    // The rotten bytes are still there, and the cleaner stops at them.
    let errors = cluster.errors(&["is damaged", "a segment cannot be read"]);
    assert!(errors.is_empty(), "{errors:#?}");
}

async fn leads(client: &Client, topic: &str, broker: u32) {
    wait_for(
        &format!("broker {broker} to lead {topic}"),
        HEAL,
        async || {
            let topics = client.admin().describe(Some(&[topic.to_owned()])).await?;
            let leader = topics[0].partitions[0].leader;
            ensure!(leader == Some(BrokerId(broker)), "{leader:?}");
            Ok(())
        },
    )
    .await;
}
