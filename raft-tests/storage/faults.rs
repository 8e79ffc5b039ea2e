//! Failing disks, rotten bits, missing files and catalogs that lie.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::FutureExt;
use logboom::storage::{LogEntry, LogState, MemDisk, StorageError, Store, Verdict, fsck};
use logboom::types::{BrokerId, GroupId, LogIndex};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::support::*;

/// What was acknowledged of a workload before its disk failed.
#[derive(Debug, Default)]
struct Acked {
    next: BTreeMap<u64, u64>,
    votes: BTreeMap<u64, Bytes>,
}

/// Votes, appends and purges in three groups; stops at the first failure and says what was acknowledged.
async fn workload(store: &Store) -> Acked {
    let mut acked = Acked::default();
    for round in 0..12_u64 {
        for id in 0..3_u64 {
            let Ok(log) = store.group(GroupId(id), replica(1)) else {
                return acked;
            };
            let vote = Bytes::from(format!("vote {round}"));
            if log.save_vote(vote.clone()).await.is_err() {
                return acked;
            }
            acked.votes.insert(id, vote);
            let (from, to) = (round * 10, round * 10 + 10);
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let flushed = Box::new(move || sender.send(()).unwrap_or(()));
            if log.append(entries(id, 1, from, to, 200), flushed).is_err()
                || receiver.await.is_err()
            {
                return acked;
            }
            acked.next.insert(id, to);
            if round % 4 == 3 && log.purge(idx(round * 10 - 20)).is_err() {
                return acked;
            }
        }
    }
    acked
}

fn idx(index: u64) -> logboom::types::EntryId {
    id(1, index)
}

async fn check_acked(store: &Store, acked: &Acked, what: &str) {
    for (id, next) in &acked.next {
        let log = group(store, *id);
        let state = log.state();
        let last = state.last.map_or(0, |last| last.index.0 + 1);
        assert!(
            last >= *next,
            "{what}: group {id} ends before {last}, {next} was acknowledged"
        );
        let first = state.purged.map_or(0, |purged| purged.index.0 + 1);
        assert_eq!(
            read_all(&log).await.unwrap(),
            entries(*id, 1, first, last, 200),
            "{what}"
        );
    }
    for (id, vote) in &acked.votes {
        let found = group(store, *id).state().vote.unwrap_or_default();
        let round = |vote: &Bytes| -> u64 {
            String::from_utf8_lossy(vote)
                .trim_start_matches("vote ")
                .parse()
                .unwrap_or(0)
        };
        assert!(round(&found) >= round(vote), "{what}: vote of group {id}");
    }
}

/// Goal: a log in which a read has found damage takes, votes and shows nothing any more, also for whoever opens it anew, and the other logs of
/// the store go on. Method: two groups, closed in order, a flipped bit in the payload of the first, found by a read after the next open.
#[tokio::test]
async fn a_log_with_damage_takes_part_in_nothing() {
    let disk = MemDisk::new();
    let directory = Path::new("memory");
    let open = || Store::open_in_memory(&disk, &config(directory), BrokerId(1)).unwrap();
    let store = open();
    for id in [1, 2] {
        append_durable(&group(&store, id), entries(id, 1, 1, 21, 1000));
    }
    store.close().await.unwrap();
    let (segment, _) = disk
        .files()
        .into_iter()
        .find(|(path, size)| path.starts_with("journal/") && *size > 10_000)
        .unwrap();
    assert!(disk.flip(&segment, 10_000 * 8));
    let store = open();
    let (rotten, sound) = (group(&store, 1), group(&store, 2));
    let is_damaged = |error: StorageError| matches!(error, StorageError::Damaged { .. });
    let all = (LogIndex(1), usize::MAX, usize::MAX);
    assert!(is_damaged(
        rotten.read(all.0, all.1, all.2).await.unwrap_err()
    ));
    let more = || entries(1, 1, 21, 22, 10);
    assert!(is_damaged(
        rotten.append(more(), Box::new(|| {})).unwrap_err()
    ));
    let vote = Bytes::from_static(b"vote");
    assert!(is_damaged(
        rotten.save_vote(vote.clone()).await.unwrap_err()
    ));
    assert!(is_damaged(store.group(GroupId(1), replica(1)).unwrap_err()));
    assert_eq!(sound.read(all.0, all.1, all.2).await.unwrap().len(), 20);
    append_durable(&sound, entries(2, 1, 21, 22, 10));
    sound.save_vote(vote).await.unwrap();
    store.remove_group(GroupId(1)).await.unwrap();
    store.close().await.unwrap();
}

/// Goal: what a failed sync left behind in memory only, and a new process found there, is durable once it counts. Method: fail a
/// sync, open the directory again on what the operating system shows, and then take the power.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_survived_a_failed_sync_is_made_durable_before_it_counts() {
    let disk = MemDisk::new();
    let place = Place::Memory(disk.clone());
    let store = place.open().unwrap();
    append_durable(&group(&store, 1), entries(1, 1, 0, 3, 700));
    disk.fail_sync(disk.counts().1 + 1, false);
    let told = append(&group(&store, 1), entries(1, 1, 3, 6, 700));
    assert!(told.recv_timeout(DEADLINE).is_err(), "told after a failure");
    store.abandon();
    let store = place.open().unwrap();
    let last = group(&store, 1).flushed();
    assert_eq!(
        last,
        Some(id(1, 5)),
        "the process was killed, not the machine"
    );
    store.abandon();
    disk.crash(1, false);
    let store = place.open().unwrap();
    let log = group(&store, 1);
    assert_eq!(log.flushed(), last);
    assert_eq!(read_all(&log).await.unwrap(), entries(1, 1, 0, 6, 700));
}

/// Goal: a write or sync that fails, once or from then on, ends the store: nothing is acknowledged afterwards, and what
/// was before is there after a loss of power. Method: fail every single write and sync of a workload in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_write_or_sync_is_final() {
    let clean = MemDisk::new();
    let place = Place::Memory(clean.clone());
    let store = place.open().unwrap();
    workload(&store).await;
    store.close().await.unwrap();
    let (writes, syncs) = clean.counts();
    for (n, sync, sticky) in (1..=writes)
        .map(|n| (n, false, n % 2 == 0))
        .chain((1..=syncs).map(|n| (n, true, n % 2 == 0)))
    {
        let what = format!("failing {} {n}", if sync { "sync" } else { "write" });
        let disk = MemDisk::new();
        if sync {
            disk.fail_sync(n, sticky);
        } else {
            disk.fail_write(n, sticky);
        }
        let place = Place::Memory(disk.clone());
        let acked = match place.open() {
            Err(error) => {
                assert!(
                    matches!(error, StorageError::Failed { .. }),
                    "{what}: {error}"
                );
                Acked::default()
            }
            Ok(store) => {
                let failed = store.failed();
                let acked = workload(&store).await;
                if store.room().is_err() {
                    let late = Arc::new(AtomicBool::new(false));
                    let flag = late.clone();
                    let error = store.group(GroupId(0), replica(1)).and_then(|log| {
                        let next = log.state().last.map_or(0, |last| last.index.0 + 1);
                        let flushed = Box::new(move || flag.store(true, Ordering::Release));
                        log.append(entries(0, 1, next, next + 1, 10), flushed)
                    });
                    assert!(matches!(error, Err(StorageError::Failed { .. })), "{what}");
                    assert!(failed.now_or_never().is_some(), "{what}");
                    assert!(store.close().await.is_err(), "{what}");
                    assert!(
                        !late.load(Ordering::Acquire),
                        "{what}: told after the failure"
                    );
                }
                store.abandon();
                acked
            }
        };
        disk.heal();
        disk.crash(n, n % 3 != 0);
        let store = place
            .open()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        check_acked(&store, &acked, &what).await;
        store.close().await.unwrap();
    }
}

/// A directory in which everything occurs, closed; what it holds.
async fn furnished(place: &Place) -> BTreeMap<u64, (LogState, Vec<LogEntry>)> {
    let store = place.open().unwrap();
    for id in 1..4 {
        let log = group(&store, id);
        log.save_vote(Bytes::from(format!("vote {id}")))
            .await
            .unwrap();
        append_durable(&log, entries(id, 1, 0, 60, 150));
        log.truncate_after(Some(LogIndex(49))).unwrap();
        append_durable(&log, entries(id, 2, 50, 90, 150));
        log.save_checkpoint(
            checkpoint(2, 80, "state"),
            vec![(5, Bytes::from_static(b"five"))],
        )
        .unwrap();
        log.save_base(checkpoint(1, 9, "base"), false)
            .await
            .unwrap();
        log.purge(idx(9)).unwrap();
    }
    let found = contents(&store).await.unwrap();
    store.close().await.unwrap();
    found
}

async fn contents(store: &Store) -> Result<BTreeMap<u64, (LogState, Vec<LogEntry>)>, StorageError> {
    let mut found = BTreeMap::new();
    for (id, owner) in store.groups() {
        let log = store.group(id, owner)?;
        assert_eq!(log.base(), Some(checkpoint(1, 9, "base")));
        found.insert(id.0, (log.state(), read_all(&log).await?));
    }
    Ok(found)
}

/// Refused as damaged, or everything is there, or a read says damaged: never wrong, never less.
async fn judge(
    opened: Result<Store, StorageError>,
    expected: &BTreeMap<u64, (LogState, Vec<LogEntry>)>,
    what: &str,
) -> &'static str {
    let store = match opened {
        Err(StorageError::Damaged { .. }) => return "refused",
        Err(StorageError::Foreign { .. } | StorageError::UnknownFormat { .. }) => {
            panic!("{what}: a wrong reason")
        }
        Err(error) => panic!("{what}: {error}"),
        Ok(store) => store,
    };
    let verdict = match contents(&store).await {
        Ok(found) => {
            assert!(found == *expected, "{what}: other contents");
            "intact"
        }
        Err(StorageError::Damaged { .. }) => "read refused",
        Err(error) => panic!("{what}: {error}"),
    };
    store.abandon();
    verdict
}

/// Goal: a rotten bit in any file is never served and never loses anything silently. Method: flip several thousand
/// bits of a small closed store, each alone, on the memory disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_is_seen_or_harmless() {
    let disk = MemDisk::new();
    let expected = furnished(&Place::Memory(disk.clone())).await;
    let mut rng = SmallRng::seed_from_u64(7);
    let mut verdicts: BTreeMap<&str, u32> = BTreeMap::new();
    for (path, len) in disk.files() {
        for _ in 0..300 {
            let copy = disk.duplicate();
            let bit = rng.random_range(0..len.max(1) * 8);
            if !copy.flip(&path, bit) {
                continue;
            }
            let lost = rng.random_bool(0.3);
            if lost {
                copy.lose_catalog();
            }
            let what = format!("bit {bit} of {path}, catalog lost: {lost}");
            let opened = Place::Memory(copy).open();
            let verdict = judge(opened, &expected, &what).await;
            if lost && path.starts_with("journal") {
                assert_eq!(verdict, "refused", "{what}");
            }
            *verdicts.entry(verdict).or_default() += 1;
        }
    }
    for n in 0..600 {
        let copy = disk.duplicate();
        copy.flip_catalog(n, rng.random_range(0..4096 * 8));
        let verdict = judge(
            Place::Memory(copy).open(),
            &expected,
            &format!("catalog value {n}"),
        )
        .await;
        assert_eq!(verdict, "intact", "catalog value {n}");
    }
    assert!(
        verdicts["refused"] > 100 && verdicts["read refused"] > 100,
        "{verdicts:?}"
    );
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn files(directory: &Path) -> Vec<std::path::PathBuf> {
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

/// Goal: the same on real files, sled's own among them; and fsck sees all damage of the journal. Method: several
/// hundred random single flips, each on a fresh copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_a_real_file_is_seen_or_harmless() {
    let place = Place::real();
    let expected = furnished(&place).await;
    assert!(
        !place
            .path()
            .join("catalog/blobs")
            .read_dir()
            .is_ok_and(|mut dir| dir.next().is_some())
    );
    let mut rng = SmallRng::seed_from_u64(11);
    let names = files(&place.path());
    for n in 0..300 {
        let scratch = Place::real();
        let file = &names[n % names.len()];
        let name = file.strip_prefix(place.path()).unwrap();
        copy_dir(&place.path(), &scratch.path());
        let mut bytes = fs::read(file).unwrap();
        if bytes.is_empty() {
            continue;
        }
        // Most of sled's file is empty space: prefer bytes that mean something.
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) + 1;
        let bit = rng.random_range(0..used * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(scratch.path().join(name), bytes).unwrap();
        let what = format!("bit {bit} of {}", name.display());
        let report = fsck(&scratch.path());
        if name.starts_with("journal") || name.starts_with("identity") {
            assert_eq!(report.verdict, Verdict::Damaged, "{what}: {report:?}");
        } else {
            assert_eq!(report.verdict, Verdict::Ok, "{what}: {report:?}");
        }
        let verdict = judge(scratch.open(), &expected, &what).await;
        if name.starts_with("catalog") {
            assert_eq!(verdict, "intact", "{what}");
        }
    }
}

/// Goal: files that are missing, empty, renamed or too many are seen. Method: every segment and every single file, each
/// way, with and without the catalog.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_and_strange_files_are_seen() {
    let place = Place::real();
    let expected = furnished(&place).await;
    let names = files(&place.path());
    let important: Vec<_> = names
        .iter()
        .map(|path| path.strip_prefix(place.path()).unwrap())
        .filter(|name| !name.starts_with("catalog") && !name.starts_with("LOCK"))
        .collect();
    assert!(
        important.len() > 4,
        "several segments are needed: {important:?}"
    );
    for name in important {
        for way in ["removed", "emptied", "renamed", "cut", "doubled"] {
            for lost in [false, true] {
                let scratch = Place::real();
                copy_dir(&place.path(), &scratch.path());
                if lost {
                    fs::remove_dir_all(scratch.path().join("catalog")).unwrap();
                }
                let path = scratch.path().join(name);
                let strange = path.with_file_name("00000000deadbeef.log");
                match way {
                    "removed" => fs::remove_file(&path).unwrap(),
                    "emptied" => fs::write(&path, b"").unwrap(),
                    "renamed" => fs::rename(&path, strange).unwrap(),
                    "doubled" if name.starts_with("journal") => {
                        assert!(fs::copy(&path, strange).unwrap() > 0);
                    }
                    "doubled" => continue,
                    _ => {
                        let len = fs::metadata(&path).unwrap().len();
                        fs::OpenOptions::new()
                            .write(true)
                            .open(&path)
                            .unwrap()
                            .set_len(len - 1)
                            .unwrap();
                    }
                }
                let what = format!("{} {way}, catalog lost: {lost}", name.display());
                let report = fsck(&scratch.path());
                let verdict = judge(scratch.open(), &expected, &what).await;
                if name.starts_with("watermark") && way == "cut" {
                    // Its second slot is gone, the first one still says nearly as much.
                    assert_eq!(verdict, "intact", "{what}");
                } else {
                    assert_eq!(
                        (verdict, report.verdict),
                        ("refused", Verdict::Damaged),
                        "{what}"
                    );
                }
            }
        }
    }
}

/// Goal: the catalog is only a cache. Method: lose it, or put an older copy in its place, and compare everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_or_older_catalog_changes_nothing() {
    let place = Place::real();
    let _ = furnished(&place).await;
    let older = tempfile::tempdir().unwrap();
    copy_dir(&place.path().join("catalog"), older.path());
    let store = place.open().unwrap();
    let log = group(&store, 2);
    append_durable(&log, entries(2, 3, 90, 400, 150));
    log.save_vote(Bytes::from_static(b"newer")).await.unwrap();
    log.purge(id(2, 69)).unwrap();
    store.remove_group(GroupId(3)).await.unwrap();
    let expected = contents(&store).await.unwrap();
    store.close().await.unwrap();
    for way in ["lost", "older", "garbage"] {
        let catalog = place.path().join("catalog");
        fs::remove_dir_all(&catalog).unwrap();
        match way {
            "older" => copy_dir(older.path(), &catalog),
            "garbage" => {
                fs::create_dir(&catalog).unwrap();
                fs::write(catalog.join("conf"), b"garbage").unwrap();
                fs::write(catalog.join("db"), vec![0xa5; 100_000]).unwrap();
            }
            _ => {}
        }
        let store = place.open().unwrap();
        assert_eq!(contents(&store).await.unwrap(), expected, "{way}");
        store.close().await.unwrap();
    }
}

/// Goal: a newer format is refused, and nothing is changed. Method: write such an identity, compare all files.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_format_is_left_alone() {
    let place = Place::real();
    furnished(&place).await;
    let path = place.path().join("identity");
    let mut bytes = fs::read(&path).unwrap();
    let body = bytes.len() - 4;
    bytes[11] = 9;
    let crc = crc32c::crc32c(&bytes[..body]);
    bytes[body..].copy_from_slice(&crc.to_be_bytes());
    fs::write(&path, bytes).unwrap();
    let read = || {
        files(&place.path())
            .iter()
            .map(|path| fs::read(path).unwrap())
            .collect::<Vec<_>>()
    };
    let before = read();
    let opened = place.open();
    assert!(
        matches!(opened, Err(StorageError::UnknownFormat { found: 9, .. })),
        "{opened:?}"
    );
    assert!(read() == before);
    assert_eq!(fsck(&place.path()).verdict, Verdict::CannotCheck);
}

/// Goal: a watermark that lags, as after a loss of power, hides no rot in frames that were durable. Method: put an older
/// watermark back, lose the catalog, and flip a bit of each frame.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rot_behind_a_lagging_watermark_is_seen() {
    let place = Place::real();
    let mut config = config(&place.path());
    config.segment_bytes = 1 << 20;
    let store = place.open_with(&config).unwrap();
    store.close().await.unwrap();
    let older = fs::read(place.path().join("watermark")).unwrap();
    let store = place.open_with(&config).unwrap();
    let log = group(&store, 1);
    // The frame of the group's creation, 68 bytes, is the first one.
    let start = 64 + 68;
    for index in 0..20 {
        append_durable(&log, entries(1, 1, index, index + 1, 100));
    }
    let expected = BTreeMap::from([(1, (log.state(), read_all(&log).await.unwrap()))]);
    store.abandon();
    let journal = "journal/0000000000000000.log";
    for at in 0..20 {
        let scratch = Place::real();
        copy_dir(&place.path(), &scratch.path());
        fs::remove_dir_all(scratch.path().join("catalog")).unwrap();
        fs::write(scratch.path().join("watermark"), &older).unwrap();
        let mut bytes = fs::read(scratch.path().join(journal)).unwrap();
        bytes[start + at * 160 + 90] ^= 4;
        fs::write(scratch.path().join(journal), bytes).unwrap();
        config.directory = scratch.path();
        let opened = scratch.open_with(&config);
        if at < 19 {
            assert!(
                matches!(opened, Err(StorageError::Damaged { .. })),
                "frame {at}: {opened:?}"
            );
        } else {
            // Nothing tells the last batch from one that was never synced.
            let store = opened.unwrap();
            let found = read_all(&group(&store, 1)).await.unwrap();
            assert_eq!(found, expected[&1].1[..found.len()], "frame {at}");
            store.abandon();
        }
    }
}
