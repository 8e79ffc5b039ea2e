//! Rotten bits in the directory of a real broker: refused or harmless, never served, never spread.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use bytes::Bytes;
use logboom::storage::{Checkpoint, LogEntry, LogState, StorageError, Store, StoreConfig};
use logboom::types::{BrokerId, LogIndex};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use logboom::client::{Client, ProducerConfig};

use crate::support::{ProcessCluster, Workload, WorkloadConfig, verify, wait_for};
use crate::{HEAL, create, in_sync};

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
            flip(&root.join(&file), bit);
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
