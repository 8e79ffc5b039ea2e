//! Mistakes that are seen before there is a cluster, and the check of a data directory.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::command::{Said, command, finish, run, signal};
use crate::support::wait_for;

const WITHIN: Duration = Duration::from_secs(30);

type Pairs<'a> = &'a [(&'a str, &'a str)];

fn directory() -> TempDir {
    TempDir::with_prefix("logboom-cli-").unwrap_or_else(|error| panic!("{error}"))
}

/// Goal: what is not understood is one line that says what to do, and exit code 2; help is no mistake. Method: a table.
#[tokio::test]
async fn wrong_usage_is_one_line_and_exit_code_2() {
    let cases: [(&[&str], &[&str]); 21] = [
        (
            &[],
            &[
                "say what to do: demo, dev, serve, topic",
                "see `logboom --help`",
            ],
        ),
        (
            &["prodcue"],
            &["unrecognized subcommand 'prodcue'", "'produce'"],
        ),
        (
            &["topic"],
            &[
                "say what to do: create, list, describe, reassign, delete",
                "see `logboom topic --help`",
            ],
        ),
        (
            &["topic", "create", "t"],
            &[
                "--partitions <P>",
                "--replication-factor <R>",
                "see `logboom topic create --help`",
            ],
        ),
        (
            &[
                "topic",
                "create",
                "t",
                "--partitions",
                "1",
                "--replication-factor",
                "1",
                "--config",
                "min.insync.replicas=1",
                "--config",
                "min.insync.replicas=2",
            ],
            &["--config min.insync.replicas is given twice, as \"1\" and as \"2\""],
        ),
        (&["topic", "create"], &["<NAME>"]),
        (&["produce"], &["<TOPIC>"]),
        (
            &["produce", "t", "--key-separator", ""],
            &["--key-separator is empty"],
        ),
        (&["consume", "t", "--max", "-1"], &["--max"]),
        (
            &["consume", "t", "--from", "18446744073709551616"],
            &["use earliest, latest or an offset"],
        ),
        (&["consume", ".."], &["illegal topic name \"..\""]),
        (&["dev", "--brokers", "0"], &["--brokers", "1..=32"]),
        (&["dev", "--port", "70000"], &["--port"]),
        (
            &["demo", "--input", "/nonexistent"],
            &["--input /nonexistent"],
        ),
        (&["fsck"], &["<DIRECTORY>"]),
        (
            &["fsck", "/nonexistent"],
            &["/nonexistent cannot be checked", "no such directory"],
        ),
        (
            &["--log", "loudly=very", "topic", "list"],
            &["--log \"loudly=very\" is not a filter; use error, warn"],
        ),
        (
            &["--log", "bogus", "topic", "list"],
            &["--log \"bogus\" is not a filter; use error, warn"],
        ),
        (
            &["dev", "--data", "/dev/null"],
            &["--data /dev/null cannot be used: Not a directory"],
        ),
        (
            &["topic", "list", "--colour"],
            &["'--colour'", "see `logboom topic list --help`"],
        ),
        (
            &["produce", "t", "--timeout", "soon"],
            &["--timeout", "use seconds, 0.001 to 86400"],
        ),
    ];
    for (arguments, parts) in cases {
        let said = run(&[], arguments, b"").await;
        // `fsck` tells on standard output what it looked at before it gives up.
        let said = if arguments.first() == Some(&"fsck") {
            Said {
                out: Vec::new(),
                ..said
            }
        } else {
            said
        };
        said.refused(2, parts);
    }
    for arguments in [
        &["--help"][..],
        &["topic", "create", "--help"],
        &["serve", "--help"],
        &["--version"],
    ] {
        let out = run(&[], arguments, b"").await.good();
        assert!(
            String::from_utf8_lossy(&out).contains("logboom"),
            "{arguments:?}"
        );
    }
}

/// Goal: a wrong configuration is named with its place, whatever place that is; the broker does not start and leaves nothing.
/// Method: a table of files, flags and variables.
#[tokio::test]
async fn wrong_configuration_is_named_with_its_place() {
    let home = directory();
    let data = home.path().join("data");
    let data = data.to_str().expect("a path");
    let file = home.path().join("broker.toml");
    let file = file.to_str().expect("a path");
    let cases: [(&str, &[&str], Pairs<'_>, &[&str]); 24] = [
        (
            "",
            &["--rack", ""],
            &[],
            &["--rack: a rack's name has 1 to 512 bytes, this one 0; leave it out"],
        ),
        (
            "bootstrap = [\"1@a:1\", \"2@a:1\"]",
            &[],
            &[],
            &[
                "broker.toml:1: bootstrap: broker 1 at a:1 and broker 2 at a:1 have the same address",
            ],
        ),
        (
            "listen = \"10.0.0.1:9092\"\nbootstrap = [\"1@10.0.0.1:9093\", \"2@10.0.0.2:9092\"]",
            &[],
            &[],
            &[
                "broker.toml:2: bootstrap: broker 1 is to be found at 10.0.0.1:9093, but says it is at 10.0.0.1:9092",
            ],
        ),
        (
            "bootstrap = [\"1@127.0.0.1:9092\", \"2@127.0.0.1:9093\"]",
            &["--broker-id", "2"],
            &[],
            &[
                "bootstrap: broker 1 at 127.0.0.1:9092 has the address of this broker, which is broker 2",
            ],
        ),
        (
            "bootstrap = [\"1@127.0.0.1:9092\", \"2@127.0.0.1:9093\"]",
            &["--listen", "127.0.0.1:0"],
            &[],
            &[
                "broker 1 is to be found at 127.0.0.1:9092, but listens on any free port; listen on 127.0.0.1:9092",
            ],
        ),
        (
            "listen_on = \"127.0.0.1:1\"",
            &[],
            &[],
            &["broker.toml:1: unknown field 'listen_on'", "'listen'"],
        ),
        (
            "\n[raft]\nx = 1",
            &[],
            &[],
            &["broker.toml:2: unknown field 'raft'"],
        ),
        (
            "broker_id = \"one\"",
            &[],
            &[],
            &["broker.toml:1: invalid type"],
        ),
        ("broker_id = -1", &[], &[], &["broker.toml:1: "]),
        (
            "broker_id = 1\nbroker_id = 2",
            &[],
            &[],
            &["broker.toml:2: duplicate key broker_id"],
        ),
        ("broker_id =", &[], &[], &["broker.toml:1: "]),
        (
            "frame_bytes_max = 5",
            &[],
            &[],
            &["broker.toml:1: frame_bytes_max: use 20971520 to"],
        ),
        (
            "heartbeat_interval_ms = 9223372036854775807",
            &[],
            &[],
            &["election_timeout_min_ms: use at least three heartbeats"],
        ),
        (
            "connections_max = 0",
            &[],
            &[],
            &["broker.toml:1: connections_max: use at least"],
        ),
        (
            "receive_bytes = 0",
            &[],
            &[],
            &["broker.toml:1: receive_bytes: use at least"],
        ),
        (
            "request_timeout_max_ms = 0",
            &[],
            &[],
            &["broker.toml:1: request_timeout_max_ms: use at least"],
        ),
        (
            "listen = \"nowhere\"",
            &[],
            &[],
            &["broker.toml:1: listen: \"nowhere\" is not of the form host:port"],
        ),
        (
            "",
            &["--listen", "127.0.0.1:65536"],
            &[],
            &["--listen: \"127.0.0.1:65536\" is not of the form host:port"],
        ),
        (
            "",
            &["--advertise", "me"],
            &[],
            &["--advertise: \"me\" is not of the form host:port"],
        ),
        (
            "",
            &["--listen", "0.0.0.0:0", "--advertise", ""],
            &[],
            &["advertise: ", "0.0.0.0"],
        ),
        (
            "",
            &["--bootstrap", "127.0.0.1:9092"],
            &[],
            &["--bootstrap: \"127.0.0.1:9092\" is not of the form id@host:port"],
        ),
        (
            "",
            &["--cache-bytes", "lots"],
            &[],
            &["--cache-bytes: \"lots\" is not a whole number"],
        ),
        (
            "",
            &[],
            &[("LOGBOOM_SEGMENT_BYTES", "5")],
            &["LOGBOOM_SEGMENT_BYTES: use at least 1048576"],
        ),
        (
            "",
            &[],
            &[("LOGBOOM_BROKER_ID", "4294967296")],
            &["LOGBOOM_BROKER_ID"],
        ),
    ];
    for (text, flags, variables, parts) in cases {
        fs::write(file, text).unwrap_or_else(|error| panic!("{error}"));
        let arguments = [&["serve", "--config", file, "--data-dir", data], flags].concat();
        let child = command(&arguments).envs(variables.iter().copied()).spawn();
        let said = finish(child.unwrap_or_else(|error| panic!("{error}")), b"").await;
        said.refused(2, parts);
        assert!(
            !Path::new(data).exists(),
            "{text:?} {flags:?}: something was made"
        );
    }
    run(&[], &["serve", "--config", "/nonexistent.toml"], b"")
        .await
        .refused(2, &["cannot read /nonexistent.toml"]);
}

/// Goal: what cannot be started says why and what to do, with exit code 1, and `fsck` tells a good directory (0), a damaged
/// one (1) and one that it cannot check (2) apart. Method: one broker's directory, through all of it.
#[tokio::test]
async fn broker_that_cannot_start_says_why_and_fsck_tells_directories_apart() {
    let home = directory();
    let data = home.path().join("data");
    let data = data.to_str().expect("a path");
    let port = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr());
    let address = port.unwrap_or_else(|error| panic!("{error}")).to_string();
    let serve = async |broker: &str, listen: &str, data: &str| {
        let words = [
            "serve",
            "--log",
            "off",
            "--broker-id",
            broker,
            "--listen",
            listen,
            "--data-dir",
            data,
        ];
        run(&[], &words, b"").await
    };
    let words = [
        "serve",
        "--log",
        "off",
        "--listen",
        &address,
        "--data-dir",
        data,
    ];
    let broker = command(&words)
        .spawn()
        .unwrap_or_else(|error| panic!("{error}"));
    let at = [address.clone()];
    wait_for("the broker to answer", WITHIN, async || {
        let said = run(
            &at,
            &[
                "topic",
                "create",
                "t",
                "--partitions",
                "1",
                "--replication-factor",
                "1",
            ],
            b"",
        )
        .await;
        ensure!(said.code == Some(0), "{said:?}");
        Ok(())
    })
    .await;
    let lines: Vec<String> = (0..2_000)
        .map(|number| format!("line {number}\n"))
        .collect();
    let lines = lines.concat();
    run(&at, &["produce", "t"], lines.as_bytes()).await.good();

    let other = home.path().join("other");
    let other = other.to_str().expect("a path");
    serve("1", &address, other)
        .await
        .refused(1, &[&address, "in use", "use another address"]);
    assert!(!Path::new(other).exists(), "something was made");
    serve("1", "127.0.0.1:0", data)
        .await
        .refused(1, &[data, "in use by another process"]);
    let file = home.path().join("file");
    fs::write(&file, "x").unwrap_or_else(|error| panic!("{error}"));
    let file = file.to_str().expect("a path");
    serve("1", "127.0.0.1:0", file)
        .await
        .refused(1, &[file, "cannot be used: not a directory"]);
    let home = home.path().to_str().expect("a path");
    serve("1", "127.0.0.1:0", home).await.refused(
        1,
        &["is not empty and not a broker's: data is in it; name a new or an empty"],
    );
    let fsck = async |directory: &str| {
        let said = run(&[], &["fsck", directory], b"").await;
        Said {
            out: Vec::new(),
            ..said
        }
    };
    fsck(data).await.refused(
        2,
        &[
            data,
            "cannot be checked",
            "a broker is using it; stop it first",
        ],
    );
    fsck(file).await.refused(2, &[file, "cannot be checked"]);
    fsck(home).await.refused(2, &["it is no data directory"]);

    signal(&broker, Signal::TERM);
    assert_eq!(finish(broker, b"").await.code, Some(0), "after SIGTERM");
    let good = run(&[], &["fsck", data, "--json"], b"").await.good();
    let good: serde_json::Value =
        serde_json::from_slice(&good).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        (&good["verdict"], &good["broker"]),
        (&"ok".into(), &1.into()),
        "{good}"
    );
    assert!(good["entries"].as_u64() > Some(0), "{good}");
    serve("2", "127.0.0.1:0", data)
        .await
        .refused(1, &["belongs to broker 1"]);

    // One bit in the middle of what was written.
    let mut journal: Vec<_> = walk(Path::new(data))
        .into_iter()
        .filter(|path| path.to_string_lossy().contains("journal"))
        .collect();
    journal.sort();
    let segment = journal
        .first()
        .unwrap_or_else(|| panic!("no journal below {data}"));
    let mut bytes = fs::read(segment).unwrap_or_else(|error| panic!("{error}"));
    let middle = bytes
        .windows(9)
        .position(|window| window == b"line 1000")
        .expect("the record");
    bytes[middle] ^= 4;
    fs::write(segment, bytes).unwrap_or_else(|error| panic!("{error}"));
    fsck(data).await.refused(
        1,
        &[
            data,
            "is damaged: keep it as it is. When its cluster has other brokers, start this one on an empty directory",
            "what no other broker has is in this directory alone",
        ],
    );
    // A broker on it says so, and does not lead what it cannot read.
    let words = [
        "serve",
        "--log",
        "warn",
        "--listen",
        &address,
        "--data-dir",
        data,
    ];
    let mut broker = command(&words)
        .spawn()
        .unwrap_or_else(|error| panic!("{error}"));
    let mut told = BufReader::new(broker.stderr.take().expect("its log")).lines();
    let damage = tokio::time::timeout(WITHIN, async {
        loop {
            let line = told
                .next_line()
                .await
                .expect("a line")
                .expect("not the end");
            // The line that says which directory, and what to do; another one names the entry.
            if line.contains("is damaged") && line.contains(data) {
                return line;
            }
        }
    });
    let damage = damage.await.expect("the damage is told");
    for part in [
        data,
        "is not what was written; move it away and start the broker again",
    ] {
        assert!(damage.contains(part), "{damage}");
    }
    let topics = run(&at, &["topic", "describe", "--json"], b"").await.good();
    let topics: serde_json::Value =
        serde_json::from_slice(&topics).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        topics[0]["partitions"][0]["leader"],
        serde_json::Value::Null,
        "{topics:#}"
    );
    let status = run(&at, &["cluster", "status", "--json"], b"").await.good();
    let status: serde_json::Value =
        serde_json::from_slice(&status).unwrap_or_else(|error| panic!("{error}"));
    let leaderless = serde_json::json!([{ "topic": "t", "partition": 0 }]);
    assert_eq!(status["leaderless"], leaderless, "{status:#}");
    assert_eq!(status["brokers"][0]["leads"], 0, "{status:#}");
    // Who writes all the same is told why he waits, and then what has become of it.
    let said = run(&at, &["produce", "t", "--timeout", "3"], b"x\n").await;
    let lines: Vec<&str> = said.err.lines().collect();
    let [waits, refused] = lines.as_slice() else {
        panic!("{said:?}")
    };
    let waiting = "logboom: waiting for records to be appended to t, because ";
    assert!(
        waits.starts_with(waiting) && waits.contains("leader"),
        "{said:?}"
    );
    assert!(
        refused.contains("not every record was acknowledged"),
        "{said:?}"
    );
    assert_eq!((said.code, said.out.len()), (Some(1), 0), "{said:?}");
    broker
        .start_kill()
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Goal: a broker that waits for its cluster is not shown as an empty one, and a command waits for it only as long as it is told to, and says
/// so. Method: one of two brokers that found a cluster, without the other, and an address where nobody is.
#[tokio::test]
async fn a_broker_without_its_cluster_is_no_empty_cluster() {
    let home = directory();
    let port = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr());
    let address = port.unwrap_or_else(|error| panic!("{error}")).to_string();
    let bootstrap = format!("1@{address},2@127.0.0.1:1");
    let words = [
        "serve",
        "--log",
        "off",
        "--listen",
        &address,
        "--bootstrap",
        &bootstrap,
        "--data-dir",
        home.path().to_str().expect("a path"),
    ];
    let _broker = command(&words)
        .spawn()
        .unwrap_or_else(|error| panic!("{error}"));
    let (at, nobody) = ([address.clone()], ["127.0.0.1:1".to_owned()]);
    wait_for("the broker to answer", WITHIN, async || {
        let said = run(&at, &["topic", "list", "--timeout", "0.5"], b"").await;
        ensure!(said.err.contains("has not joined"), "{said:?}");
        said.refused(1, &["broker 1 has not joined its cluster yet", "bootstrap"]);
        Ok(())
    })
    .await;
    let said = run(&nobody, &["cluster", "status", "--timeout", "5.5"], b"").await;
    assert_eq!((said.code, said.out.len()), (Some(1), 0), "{said:?}");
    let waits = "waiting for a broker, because none of 127.0.0.1:1 answers for a cluster yet; gives up after 5.5 s (--timeout)";
    assert!(said.err.contains(waits), "{said:?}");
    let last = said.err.lines().last().unwrap_or_default();
    assert!(last.contains("is the cluster up?"), "{said:?}");
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("{error}"))
        .flatten();
    entries
        .flat_map(|entry| {
            let path = entry.path();
            if path.is_dir() {
                walk(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}
