//! The face of the store, call by call, over both disks.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use logboom::storage::{StorageError, Store, Verdict, check_directory, fsck};
use logboom::types::{BrokerId, ClusterId, GroupId, LogIndex};

use crate::support::*;

/// Goal: what was appended, voted and checkpointed is there after a clean close. Method: write, close, reopen, compare.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_survives_a_clean_close() {
    for place in Place::both() {
        let store = place.open().unwrap();
        let log = group(&store, 7);
        append_durable(&log, entries(7, 1, 0, 500, 300));
        log.save_vote(Bytes::from_static(b"vote")).await.unwrap();
        log.save_checkpoint(
            checkpoint(1, 400, "state"),
            vec![(10, Bytes::from_static(b"ten"))],
        )
        .unwrap();
        assert_eq!(log.newest_checkpoint().unwrap().state, "state");
        assert_eq!(read_all(&log).await.unwrap(), entries(7, 1, 0, 500, 300));
        assert_eq!(log.flushed(), Some(id(1, 499)));
        store.close().await.unwrap();
        assert!(matches!(
            log.append(Vec::new(), Box::new(|| ())),
            Err(StorageError::Failed { .. })
        ));
        if let Place::Real(_) = place {
            let report = fsck(&place.path());
            assert_eq!(report.verdict, Verdict::Ok, "{report:?}");
            assert_eq!((report.groups, report.entries), (1, 500));
        }
        let boot = store.identity().boot;

        let store = place.open().unwrap();
        assert!(store.identity().boot > boot);
        assert_eq!(store.groups(), vec![(GroupId(7), replica(1))]);
        let log = group(&store, 7);
        let state = log.state();
        assert_eq!((state.last, state.purged), (Some(id(1, 499)), None));
        assert_eq!(state.vote.as_deref(), Some(b"vote".as_slice()));
        assert_eq!(log.flushed(), Some(id(1, 499)));
        assert_eq!(read_all(&log).await.unwrap(), entries(7, 1, 0, 500, 300));
        assert_eq!(log.newest_checkpoint(), Some(checkpoint(1, 400, "state")));
        assert_eq!(
            log.block_at_or_below(11).unwrap(),
            Some((10, Bytes::from_static(b"ten")))
        );
        assert_eq!(
            log.block_above(9).unwrap(),
            Some((10, Bytes::from_static(b"ten")))
        );
        assert_eq!(log.block_above(10).unwrap(), None);
        append_durable(&log, entries(7, 2, 500, 510, 10));
        store.close().await.unwrap();
    }
}

/// Goal: limits of a read, and epochs found in the log. Method: a log of three epochs, asked in several ways.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_keep_their_limits() {
    for place in Place::both() {
        let store = place.open().unwrap();
        let log = group(&store, 1);
        append_durable(&log, entries(1, 1, 0, 700, 20));
        append_durable(&log, entries(1, 3, 700, 900, 20));
        append_durable(&log, entries(1, 4, 900, 1000, 20));
        let from = |index| LogIndex(index);
        assert_eq!(log.read(from(5), 3, usize::MAX).await.unwrap().len(), 3);
        assert_eq!(log.read(from(5), 100, 45).await.unwrap().len(), 2);
        assert_eq!(log.read(from(5), 100, 0).await.unwrap().len(), 1);
        assert_eq!(log.read(from(995), 100, 1 << 20).await.unwrap().len(), 5);
        assert_eq!(log.read(from(1000), 100, 1 << 20).await.unwrap(), vec![]);
        let ids = log.key_entry_ids(from(0), from(999)).await.unwrap();
        assert_eq!(ids, vec![id(1, 0), id(3, 700), id(4, 900), id(4, 999)]);
        let ids = log.key_entry_ids(from(650), from(700)).await.unwrap();
        assert_eq!(ids, vec![id(1, 650), id(3, 700)]);
        log.purge(id(1, 649)).unwrap();
        assert_eq!(log.read(from(649), 100, 1 << 20).await.unwrap(), vec![]);
        assert_eq!(
            log.read(from(650), 1, 1 << 20).await.unwrap(),
            entries(1, 1, 650, 651, 20)
        );
        store.close().await.unwrap();
    }
}

/// Goal: a truncated and a purged log go on correctly. Method: truncate deep, append, purge beyond the end, reopen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncation_and_purge_are_ordered_with_appends() {
    for place in Place::both() {
        let store = place.open().unwrap();
        let log = group(&store, 1);
        append_durable(&log, entries(1, 1, 0, 2000, 100));
        log.truncate_after(Some(LogIndex(99))).unwrap();
        assert_eq!(log.state().last, Some(id(1, 99)));
        append_durable(&log, entries(1, 2, 100, 150, 100));
        let other = group(&store, 2);
        append_durable(&other, entries(2, 1, 0, 10, 10));
        other.truncate_after(None).unwrap();
        append_durable(&other, entries(2, 2, 0, 3, 10));
        other.purge(id(9, 50)).unwrap();
        assert_eq!(other.state().last, Some(id(9, 50)));
        append_durable(&other, entries(2, 9, 51, 53, 10));
        store.close().await.unwrap();

        let store = place.open().unwrap();
        let mut expected = entries(1, 1, 0, 100, 100);
        expected.extend(entries(1, 2, 100, 150, 100));
        assert_eq!(read_all(&group(&store, 1)).await.unwrap(), expected);
        let other = group(&store, 2);
        assert_eq!(read_all(&other).await.unwrap(), entries(2, 9, 51, 53, 10));
        assert_eq!(other.state().purged, Some(id(9, 50)));
        store.close().await.unwrap();
    }
}

/// Goal: a directory is used by its own broker, once, in its own cluster. Method: try the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_has_one_owner() {
    for place in Place::both() {
        let store = place.open().unwrap();
        assert!(matches!(place.open(), Err(StorageError::InUse { .. })));
        store.set_cluster(ClusterId(5)).unwrap();
        store.set_cluster(ClusterId(5)).unwrap();
        assert!(matches!(
            store.set_cluster(ClusterId(6)),
            Err(StorageError::Foreign { .. })
        ));
        let log = group(&store, 1);
        let other = store.group(GroupId(1), replica(2));
        assert!(matches!(other, Err(StorageError::Foreign { .. })));
        store.remove_group(GroupId(1)).await.unwrap();
        assert!(matches!(
            log.save_vote(Bytes::new()).await,
            Err(StorageError::Failed { .. })
        ));
        store.group(GroupId(1), replica(2)).unwrap();
        let incarnation = store.identity().incarnation;
        store.close().await.unwrap();
        let config = config(&place.path());
        let other = match &place {
            Place::Real(_) => Store::open(&config, BrokerId(2)),
            Place::Memory(disk) => Store::open_in_memory(disk, &config, BrokerId(2)),
        };
        assert!(matches!(other, Err(StorageError::Foreign { .. })));
        let store = place.open().unwrap();
        assert_eq!(store.identity().cluster, Some(ClusterId(5)));
        assert_eq!(store.identity().incarnation, incarnation);
        assert_eq!(store.groups(), vec![(GroupId(1), replica(2))]);
        store.close().await.unwrap();
    }
}

/// Goal: a directory is taken that is new, empty, or begun and never finished, and no other; who only asks changes nothing. Method: a
/// table of what is in it, asked and then opened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_with_something_else_in_it_is_left_alone() {
    let entries = |path: &Path| {
        let entries = fs::read_dir(path).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let cases: [(&[&str], Option<&str>); 6] = [
        (&[], None),
        (&["lost+found"], None),
        (&["LOCK", "watermark", "identity.new"], None),
        (&["notes.txt"], Some("notes.txt")),
        (&["LOCK", "broker-1", "journal.txt"], Some("broker-1")),
        (&["identity.txt", "lost+found"], Some("identity.txt")),
    ];
    for (before, foreign) in cases {
        let place = Place::real();
        let path = place.path();
        fs::create_dir(&path).unwrap();
        for name in before {
            fs::write(path.join(name), "").unwrap();
        }
        let asked = check_directory(&path, BrokerId(1));
        match foreign {
            None => {
                asked.unwrap();
                let store = place.open().unwrap();
                let used = check_directory(&path, BrokerId(1));
                assert!(matches!(used, Err(StorageError::InUse { .. })), "{used:?}");
                store.close().await.unwrap();
                check_directory(&path, BrokerId(1)).unwrap();
                // It is ours now, whatever is put beside.
                fs::write(path.join("notes.txt"), "").unwrap();
                place.open().unwrap().close().await.unwrap();
                let other = check_directory(&path, BrokerId(2)).unwrap_err().to_string();
                let owner = "belongs to broker 1 (but holds nothing of any cluster yet";
                assert!(other.contains(owner), "{other}");
            }
            Some(foreign) => {
                for refused in [asked, place.open().map(drop)] {
                    let Err(StorageError::Occupied { name, .. }) = refused else {
                        panic!("{before:?}: {refused:?}");
                    };
                    assert_eq!(name, foreign);
                }
                let mut before = before.to_vec();
                before.sort_unstable();
                assert_eq!(entries(&path), before);
            }
        }
    }
    let place = Place::real();
    check_directory(&place.path(), BrokerId(1)).unwrap();
    assert!(!place.path().exists());
    fs::write(place.path(), "").unwrap();
    for refused in [
        check_directory(&place.path(), BrokerId(1)),
        place.open().map(drop),
    ] {
        assert!(
            matches!(refused, Err(StorageError::Unusable { .. })),
            "{refused:?}"
        );
    }
}
