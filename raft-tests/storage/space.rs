//! Disk space, memory and the number of syncs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use logboom::storage::MemDisk;
use logboom::types::LogIndex;

use crate::support::*;

fn journal_bytes(disk: &MemDisk) -> usize {
    disk.files()
        .iter()
        .filter(|(name, _)| name.starts_with("journal/"))
        .map(|(_, len)| len)
        .sum()
}

/// Goal: a purge gives space back although nothing else happens. Method: a few entries over several segments, one purge.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_of_few_entries_gives_space_back() {
    let disk = MemDisk::new();
    let store = Place::Memory(disk.clone()).open().unwrap();
    let log = group(&store, 1);
    for at in 0..20 {
        append_durable(&log, entries(1, 1, at, at + 1, 20_000));
    }
    let full = journal_bytes(&disk);
    assert!(full > 400_000, "{full}");
    log.purge(id(1, 18)).unwrap();
    eventually("the journal shrinks", || journal_bytes(&disk) < full / 2).await;
}

/// Goal: purged bytes leave the disk, and nothing else does. Method: fill many segments, purge nearly all, wait until the
/// disk shrinks; the votes, bases and purge markers of idle groups must survive it, and a loss of power.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn purged_segments_are_deleted() {
    let disk = MemDisk::new();
    let place = Place::Memory(disk.clone());
    let store = place.open().unwrap();
    let idle = group(&store, 9);
    idle.save_vote(Bytes::from_static(b"old vote"))
        .await
        .unwrap();
    idle.save_base(checkpoint(3, 41, "old base"), true)
        .await
        .unwrap();
    idle.purge(id(3, 41)).unwrap();
    let log = group(&store, 1);
    for round in 0..20 {
        append_durable(&log, entries(1, 1, round * 50, round * 50 + 50, 400));
    }
    let full = journal_bytes(&disk);
    assert!(full > 400_000, "{full}");
    let position = store.position();
    log.purge(id(1, 989)).unwrap();
    eventually("the journal shrinks", || journal_bytes(&disk) < full / 8).await;
    assert!(store.position() >= position);
    for crash in [true, false] {
        if crash {
            store.abandon();
            disk.crash(3, true);
        } else {
            disk.lose_catalog();
        }
        let store = place.open().unwrap();
        let idle = group(&store, 9);
        let state = idle.state();
        assert_eq!(state.vote.as_deref(), Some(b"old vote".as_slice()));
        assert_eq!(
            (state.purged, state.last),
            (Some(id(3, 41)), Some(id(3, 41)))
        );
        assert_eq!(idle.base(), Some(checkpoint(3, 41, "old base")));
        assert_eq!(
            read_all(&group(&store, 1)).await.unwrap(),
            entries(1, 1, 990, 1000, 400)
        );
        store.close().await.unwrap();
    }
}

/// Goal: one entry that stays does not keep the whole journal. Method: one small old log beside one that is written and
/// purged for long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_entry_does_not_pin_the_journal() {
    let disk = MemDisk::new();
    let place = Place::Memory(disk.clone());
    let store = place.open().unwrap();
    let old = group(&store, 5);
    append_durable(&old, entries(5, 1, 0, 20, 100));
    let log = group(&store, 1);
    for round in 0..60 {
        append_durable(&log, entries(1, 1, round * 50, round * 50 + 50, 400));
        if let Some(index) = (round * 50).checked_sub(1) {
            log.purge(id(1, index)).unwrap();
        }
    }
    eventually("the journal shrinks", || journal_bytes(&disk) < 300_000).await;
    append_durable(&old, entries(5, 2, 20, 30, 100));
    let mut expected = entries(5, 1, 0, 20, 100);
    expected.extend(entries(5, 2, 20, 30, 100));
    assert_eq!(read_all(&old).await.unwrap(), expected);
    store.abandon();
    disk.crash(1, true);
    disk.lose_catalog();
    let store = place.open().unwrap();
    let old = group(&store, 5);
    assert_eq!(read_all(&old).await.unwrap(), expected);
    old.truncate_after(Some(LogIndex(4))).unwrap();
    append_durable(&old, entries(5, 3, 5, 6, 100));
    store.close().await.unwrap();
    disk.lose_catalog();
    let store = place.open().unwrap();
    let mut expected = entries(5, 1, 0, 5, 100);
    expected.extend(entries(5, 3, 5, 6, 100));
    assert_eq!(read_all(&group(&store, 5)).await.unwrap(), expected);
    store.close().await.unwrap();
}

/// Goal: appends of many groups share syncs, and only the newest callback of a group is called, in order. Method: count
/// syncs of the memory disk under a load of 64 groups.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_share_syncs() {
    let disk = MemDisk::new();
    let place = Place::Memory(disk.clone());
    let mut config = config(&place.path());
    config.segment_bytes = 64 << 20;
    config.catalog_sync_bytes = 64 << 20;
    let store = place.open_with(&config).unwrap();
    let logs: Vec<_> = (0..64).map(|id| group(&store, id)).collect();
    let newest: Vec<Arc<AtomicU64>> = logs.iter().map(|_| Arc::default()).collect();
    let (_, before) = disk.counts();
    for index in 0..100 {
        for (id, log) in logs.iter().enumerate() {
            let newest = newest[id].clone();
            let flushed = move || {
                let old = newest.swap(index + 1, Ordering::AcqRel);
                assert!(old < index + 1, "out of order");
            };
            log.append(
                entries(id as u64, 1, index, index + 1, 100),
                Box::new(flushed),
            )
            .unwrap();
        }
    }
    eventually("all is durable", || {
        newest.iter().all(|at| at.load(Ordering::Acquire) == 100)
    })
    .await;
    let (_, after) = disk.counts();
    assert!(
        after - before < 6400 / 4,
        "{} syncs for 6400 appends",
        after - before
    );
    assert!(logs.iter().all(|log| log.flushed() == Some(id(1, 99))));
    store.close().await.unwrap();
}

/// Goal: free space is reported with the reserve. Method: set it on the memory disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn room_is_reported() {
    let disk = MemDisk::new();
    disk.set_free(12345);
    let store = Place::Memory(disk).open().unwrap();
    assert_eq!(store.room().unwrap(), (12345, 1 << 20));
    store.close().await.unwrap();
    assert!(Place::real().open().unwrap().room().unwrap().0 > 0);
}
