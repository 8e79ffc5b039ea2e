//! A full disk: refused before anything is appended, read on, accepted again when there is room.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use anyhow::ensure;
use logboom::client::{Client, ClientConfig, Partition, Record};
use logboom::types::{Acks, Error, Offset, Outcome};

use crate::durability::{HEAL, create};
use crate::support::{ProcessCluster, wait_for};

const GIB: u64 = 1 << 30;

fn free(path: &std::path::Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_bavail * stat.f_frsize
}

/// The values of the partition, from its start to its end.
async fn read(partition: &Partition) -> Vec<String> {
    let mut found = Vec::new();
    let mut from = Offset(0);
    loop {
        let read = partition.read(from, 1 << 20).await.unwrap();
        let values = read
            .records
            .iter()
            .map(|one| one.value.clone().unwrap_or_default());
        found.extend(values.map(|value| String::from_utf8_lossy(&value).into_owned()));
        if read.records.is_empty() {
            return found;
        }
        from = read.next_offset;
    }
}

/// Goal: a broker with less free space than its reserve refuses produce requests before it appends, with an error that says so and
/// means not done; it serves reads; it accepts again by itself when there is room. Method: a reserve 1 GiB below what is free, and a
/// file of 2 GiB that comes and goes beside the data directory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_reads_on_and_recovers() {
    let room = tempfile::tempdir().unwrap();
    let now = free(room.path());
    if now < 4 * GIB {
        println!(
            "SKIPPED: {} has only {now} bytes free, 4 GiB are needed",
            room.path().display()
        );
        return;
    }
    let reserve = i64::try_from(now - GIB).unwrap();
    let cluster = ProcessCluster::builder(1)
        .key("disk_reserve_bytes", reserve)
        .start()
        .await;
    // Patience for two seconds of repetitions: the error is then the last refusal.
    let config = ClientConfig {
        deadline: Duration::from_secs(2),
        ..ClientConfig::default()
    };
    let client = Client::connect(&cluster.bootstrap(), config).await.unwrap();
    create(&client, "full", 1, 1).await;
    let partition = client.topic("full").unwrap().partition(0);
    let append = async |text: String| partition.append([Record::new(text)], Acks::All).await;
    let kept = RefCell::new(Vec::new());
    let mut refused = 0;
    for round in 0..2 {
        let text = format!("before {round}");
        append(text.clone()).await.unwrap();
        kept.borrow_mut().push(text);
        let ballast = tempfile::NamedTempFile::new_in(room.path()).unwrap();
        if let Err(error) =
            rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), 0, 2 * GIB)
        {
            println!(
                "SKIPPED: {} cannot hold a file of 2 GiB: {error}",
                room.path().display()
            );
            return;
        }
        // Records that still get in before the broker looks at its disk again are kept like any others.
        let n = Cell::new(0);
        wait_for(
            "the broker to see that its disk is full",
            HEAL,
            async || {
                n.set(n.get() + 1);
                let text = format!("while {round} {}", n.get());
                match append(text.clone()).await {
                    Ok(_) => {
                        kept.borrow_mut().push(text);
                        anyhow::bail!("accepted")
                    }
                    Err(Error::StorageFull { free, reserve }) => {
                        ensure!(free < reserve, "{free} free, reserve {reserve}");
                        Ok(())
                    }
                    Err(error) => panic!("{error}"),
                }
            },
        )
        .await;
        let attempts = (0..8).map(|n| append(format!("never {round} {n}")));
        for error in futures_util::future::join_all(attempts).await {
            let error = error.unwrap_err();
            assert!(matches!(error, Error::StorageFull { .. }), "{error}");
            assert_eq!(error.outcome(), Outcome::NotDone);
            refused += 1;
        }
        assert_eq!(read(&partition).await, *kept.borrow(), "read while full");
        drop(ballast);
        wait_for("the broker to accept again", HEAL, async || {
            let text = format!("after {round}");
            append(text.clone()).await?;
            kept.borrow_mut().push(text);
            Ok(())
        })
        .await;
    }
    assert_eq!(read(&partition).await, *kept.borrow(), "read in the end");
    println!(
        "{refused} requests refused with StorageFull, none of them appended; {} records kept",
        kept.borrow().len()
    );
}
