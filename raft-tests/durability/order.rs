//! An acknowledgement follows its sync, on the leader and on the follower that made the majority; so does a vote.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::time::Duration;

use anyhow::ensure;
use logboom::client::Record;
use logboom::types::Acks;

use crate::durability::audit::{Audit, audit};
use crate::durability::trace::{Call, parse};
use crate::durability::{HEAL, create, strace, strace_is_there};
use crate::support::{ProcessCluster, wait_for};

/// The calls by which bytes reach the disk or a socket, or come from there.
pub(crate) const CALLS: &str = "trace=pwrite64,pwritev,pwritev2,write,writev,sendto,sendmsg,recvfrom,recvmsg,read,readv,pread64,preadv,fdatasync";

/// Reads a broker's trace, complete once the tracer has seen the process end.
pub(crate) async fn finished_trace(path: &std::path::Path) -> String {
    wait_for(
        "the end of the trace",
        Duration::from_secs(30),
        async || {
            let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
            let process = text
                .split_whitespace()
                .next()
                .unwrap_or_default()
                .to_owned();
            let last = text.lines().rev().take(50);
            let ended = last
                .filter(|line| line.trim_start().starts_with(&process))
                .any(|line| line.contains("+++"));
            ensure!(ended, "it is still being written");
            Ok(text)
        },
    )
    .await
}

/// How often journal files are read behind the write of these bytes to one.
fn reads_behind(calls: &[Call], written: &[u8]) -> usize {
    let of_journal = calls.iter().filter(|call| call.file.contains("/journal/"));
    let behind = of_journal.skip_while(|call| {
        let mut windows = call.bytes.windows(written.len());
        !call.name.starts_with("pwrite") || !windows.any(|window| window == written)
    });
    behind.filter(|call| call.name.starts_with("pread")).count()
}

/// Goal: between the journal write of an acknowledged record and the answer's send there is a successful sync, on the
/// leader and on the follower without which there is no majority; a vote is synced before it is answered. Method: three brokers
/// under strace, one killed so that the other two are the only majority, records acknowledged one by one; every granted vote,
/// matched position and acknowledgement in the traces is held against the journal's syncs. The same traces without
/// their syncs must be judged bad. Goal besides: to be applied and sent to a follower that keeps up, nothing is read back. Method: no
/// broker reads its journal behind the write of the first record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledgements_and_votes_follow_their_sync() {
    const RECORDS: usize = 40;
    if !strace_is_there() {
        return;
    }
    let mut cluster = ProcessCluster::builder(3).prepare();
    for id in 1..=3 {
        let output = cluster.data_dir(id).with_file_name("trace");
        cluster.start_under(id, &strace(&output, &["-e", CALLS]));
    }
    cluster.wait_alive(HEAL).await;
    let client = cluster.client().await;
    create(&client, "order", 1, 3).await;
    cluster.kill_9(3).await;
    let partition = client.topic("order").unwrap().partition(0);
    // One more than are counted: the kill may come before the send of the last answer is in the trace.
    for n in 0..=RECORDS {
        wait_for("an acknowledgement", HEAL, async || {
            let record = Record::new(format!("marker-{n};"));
            Ok(partition.append([record], Acks::All).await?)
        })
        .await;
    }
    let mut audits: BTreeMap<u32, Audit> = BTreeMap::new();
    for id in 1..=3 {
        let path = cluster.data_dir(id).with_file_name("trace");
        if id != 3 {
            cluster.kill_9(id).await;
        }
        let calls = parse(&finished_trace(&path).await);
        let result = audit(&calls, true);
        assert!(result.bad.is_empty(), "broker {id}: {:#?}", result.bad);
        let read_back = reads_behind(&calls, b"marker-0;");
        assert_eq!(read_back, 0, "broker {id} reads records back");
        let without: Vec<Call> = calls
            .into_iter()
            .filter(|call| call.name != "fdatasync")
            .collect();
        let blind = audit(&without, true);
        let claims = result.votes + result.matches + result.produced;
        assert_eq!(
            blind.bad.len(),
            claims,
            "broker {id}: claims without a sync pass"
        );
        let Audit {
            votes,
            matches,
            produced,
            syncs,
            ..
        } = &result;
        println!(
            "broker {id}: {votes} granted votes, {matches} matched positions, {produced} acknowledgements, each after its sync; {syncs} syncs"
        );
        audits.insert(id, result);
    }
    let votes: usize = audits.values().map(|audit| audit.votes).sum();
    assert!(votes >= 2, "{votes} votes prove nothing");
    let mut acked = 0;
    for (leader, follower) in [(1, 2), (2, 1)] {
        for (marker, sent) in &audits[&leader].acked {
            for id in [leader, follower] {
                let durable = audits[&id].durable.get(marker).copied().unwrap_or(f64::MAX);
                assert!(
                    durable < *sent,
                    "record {marker}: acknowledged at {sent}, on broker {id} at {durable}"
                );
            }
            acked += 1;
        }
    }
    assert!(
        acked >= RECORDS,
        "{acked} acknowledgements of {RECORDS} were found"
    );
    println!("{acked} acknowledgements followed the syncs of both brokers of the majority");
}

fn quote(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "\\{byte:03o}").unwrap();
        text
    })
}

fn frame(kind: u8, group: u64, index: u64, term: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = b"LBfr\x01".to_vec();
    out.extend([kind, 1, 0]);
    for value in [group, index, term, 0, 0] {
        out.extend(value.to_be_bytes());
    }
    out.extend([0; 4]);
    out.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    out.extend([0; 4]);
    out.extend(payload);
    out
}

fn message(kind: u8, channel: u8, correlation: u64, header: &[u8], body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind, channel];
    out.extend(correlation.to_be_bytes());
    out.extend(u32::try_from(header.len()).unwrap().to_be_bytes());
    out.extend(header);
    out.extend(body);
    let mut framed = u32::try_from(out.len()).unwrap().to_be_bytes().to_vec();
    framed.extend(out);
    framed
}

/// Goal: the checker sees a missing, failed, early, late or misdirected sync, for each kind of claim, and what is read back. Method: a small trace that is
/// good, and the same with one line changed.
#[test]
fn a_claim_without_its_sync_is_judged_bad() {
    // A vote of group 7 for epoch 3; entry 4 of epoch 3 with a marker; a produce request with the same.
    let writes = [
        frame(2, 7, 0, 0, &[3, 9, 0]),
        frame(1, 7, 4, 3, b"marker-1;"),
    ];
    let asked = [
        message(3, 1, 1, &[1, 7, 8, 9, 3, 8, 0, 0, 0, 0], b""),
        message(3, 1, 2, &[0, 7, 8, 9], b"marker-1;"),
        message(3, 2, 3, &[251, 1, 0, 1, 0], b"marker-1;"),
        message(3, 1, 4, &[4, 1, 7, 8, 9, 3, 8, 1, 1, 3, 4, 0], b""),
    ];
    let said = [
        message(4, 1, 1, &[1, 3, 8, 0, 1, 0], b""),
        message(4, 1, 2, &[0, 0, 1, 3, 4], b""),
        message(4, 2, 3, &[0, 0], b""),
        message(4, 1, 4, &[5, 1, 1, 0, 1, 3, 4], b""),
    ];
    let call = |at: usize, name: &str, file: &str, bytes: &[u8]| {
        format!(
            "1 1.{at:06} {name}(5<{file}>, \"{}\", 1) = {} <0.000001>",
            quote(bytes),
            bytes.len()
        )
    };
    let sync = |at: usize, file: &str, result: &str| {
        format!("2 1.{at:06} fdatasync(5<{file}>) = {result} <0.000001>")
    };
    let good: Vec<String> = vec![
        call(
            1,
            "recvfrom",
            "socket:[1]",
            &[b"LGBOOM\0\x01".to_vec(), asked.concat()].concat(),
        ),
        call(2, "sendto", "socket:[1]", b"LGBOOM\0\x01"),
        call(3, "pwrite64", "/d/journal/0.log", &writes.concat()),
        sync(4, "/d/journal/0.log", "0"),
        call(5, "writev", "socket:[1]", &said.concat()),
    ];
    let bad_of = |lines: &[String]| audit(&parse(&lines.join("\n")), true).bad.len();
    let result = audit(&parse(&good.join("\n")), true);
    assert!(result.bad.is_empty(), "{result:?}");
    assert_eq!(
        (result.votes, result.matches, result.produced),
        (1, 2, 1),
        "{result:?}"
    );
    let change = |way: &dyn Fn(&mut Vec<String>)| {
        let mut lines = good.clone();
        way(&mut lines);
        bad_of(&lines)
    };
    assert_eq!(change(&|lines| drop(lines.remove(3))), 4, "no sync");
    assert_eq!(
        change(&|lines| lines[3] = sync(4, "/d/journal/0.log", "-1 EIO (x) (INJECTED)")),
        4,
        "a failed sync"
    );
    assert_eq!(
        change(&|lines| lines[3] = sync(4, "/d/watermark", "0")),
        4,
        "a sync of another file"
    );
    assert_eq!(
        change(&|lines| lines.swap(2, 3)),
        4,
        "a sync before the write"
    );
    assert_eq!(
        change(&|lines| lines.swap(3, 4)),
        4,
        "a sync after the answer"
    );
    assert_eq!(change(&|lines| drop(lines.remove(2))), 4, "no write at all");
    let begun_before = change(&|lines| {
        lines[3] = "2 1.1 <... fdatasync resumed>) = 0 <0.1>".to_owned();
        lines.insert(
            2,
            "2 1.000002 fdatasync(5</d/journal/0.log> <unfinished ...>".to_owned(),
        );
    });
    assert_eq!(begun_before, 4, "a sync that began before the write");
    let other_vote = change(&|lines| {
        lines[2] = call(
            3,
            "pwrite64",
            "/d/journal/0.log",
            &frame(2, 7, 0, 0, &[2, 9, 0]),
        );
    });
    assert_eq!(other_vote, 4, "a vote for another epoch");
    let read = |at| call(at, "pread64", "/d/journal/0.log", b"marker-1;");
    for (place, expected) in [(0, 0), (2, 0), (3, 1), (5, 1)] {
        let mut lines = good.clone();
        lines.insert(place, read(place));
        let found = reads_behind(&parse(&lines.join("\n")), b"marker-1;");
        assert_eq!(found, expected, "a read in line {place}");
    }
}
