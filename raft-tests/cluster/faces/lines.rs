//! Records through the command line: byte for byte, in order, from where the user says.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use crate::support::ProcessCluster;
use crate::support::command::{run, spawn};

/// Goal: what is produced is what is consumed, and every mistake is one line with its exit code. Method: one cluster; round
/// trips with awkward bytes, every way to say where to begin and end; then a table of mistakes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_go_through_the_command_line_unchanged() {
    let cluster = ProcessCluster::start_brokers(3).await;
    let at = cluster.bootstrap();
    let made = run(
        &at,
        &[
            "topic",
            "create",
            "lines",
            "--partitions",
            "2",
            "--replication-factor",
            "3",
        ],
        b"",
    )
    .await;
    assert_eq!(made.good(), b"created lines\n");
    awkward_lines(&at).await;
    where_to_begin_and_end(&at).await;
    mistakes(&at).await;
    answers_as_json(&at).await;
    follows_and_survives_a_closed_pipe(&at).await;
    let errors = cluster.errors(&[]);
    assert!(errors.is_empty(), "{errors:#?}");
}

async fn awkward_lines(at: &[String]) {
    let text = b"first\n\n\xff\x00\xfe bytes\r\n  spaces \n\nlast without newline";
    let sent = run(at, &["produce", "lines", "--partition", "0"], text).await;
    assert_eq!(sent.good(), b"", "prints nothing");
    let read = run(at, &["consume", "lines", "--partition", "0"], b"")
        .await
        .good();
    assert_eq!(read, [&text[..], b"\n"].concat());
    // Keys are split off at the first separator; equal keys stay together, in order.
    let keyed = b"k:1\nother:x\nk:2\nk::3\n";
    run(
        at,
        &[
            "topic",
            "create",
            "keyed",
            "--partitions",
            "8",
            "--replication-factor",
            "2",
        ],
        b"",
    )
    .await
    .good();
    run(at, &["produce", "keyed", "--key-separator", ":"], keyed)
        .await
        .good();
    let all = run(at, &["consume", "keyed"], b"").await.good();
    let mut all: Vec<&[u8]> = all
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .collect();
    let of_k: Vec<&[u8]> = all.iter().copied().filter(|line| *line != b"x").collect();
    assert_eq!(of_k, [&b"1"[..], b"2", b":3"], "the order of one key");
    all.sort_unstable();
    assert_eq!(all.len(), 4);
    // Each kind of acknowledgement.
    for acks in ["none", "leader", "all"] {
        let line = format!("acks {acks}\n");
        run(
            at,
            &["produce", "keyed", "--acks", acks, "--partition", "7"],
            line.as_bytes(),
        )
        .await
        .good();
    }
    let all = run(at, &["consume", "keyed", "--partition", "7"], b"")
        .await
        .good();
    let all = String::from_utf8_lossy(&all);
    assert!(all.ends_with("acks leader\nacks all\n"), "{all}");
    // Nothing in, nothing out.
    run(
        at,
        &[
            "topic",
            "create",
            "empty",
            "--partitions",
            "1",
            "--replication-factor",
            "1",
        ],
        b"",
    )
    .await
    .good();
    assert_eq!(run(at, &["produce", "empty"], b"").await.good(), b"");
    assert_eq!(run(at, &["consume", "empty"], b"").await.good(), b"");
    assert_eq!(
        run(at, &["consume", "empty", "--from", "latest"], b"")
            .await
            .good(),
        b""
    );
}

async fn where_to_begin_and_end(at: &[String]) {
    let lines = |range: std::ops::Range<u32>| {
        let lines: Vec<String> = range.map(|number| format!("{number}\n")).collect();
        lines.concat()
    };
    let numbers = lines(0..1_000);
    run(
        at,
        &["produce", "lines", "--partition", "1"],
        numbers.as_bytes(),
    )
    .await
    .good();
    let cases: [(&[&str], String); 7] = [
        (&[], lines(0..1_000)),
        (&["--from", "earliest", "--max", "3"], lines(0..3)),
        (&["--from", "998"], lines(998..1_000)),
        (&["--from", "517", "--max", "2"], lines(517..519)),
        (&["--from", "1000"], String::new()),
        (&["--from", "latest"], String::new()),
        (&["--max", "0"], String::new()),
    ];
    for (arguments, expected) in cases {
        let words = [&["consume", "lines", "--partition", "1"], arguments].concat();
        let read = run(at, &words, b"").await.good();
        assert_eq!(String::from_utf8_lossy(&read), expected, "{arguments:?}");
    }
}

/// Arguments, standard input, exit code, and parts of the line on standard error.
type Mistake<'a> = (&'a [&'a str], &'a [u8], i32, &'a [&'a str]);

async fn mistakes(at: &[String]) {
    // Exit code 1: understood, and not possible. Exit code 2: not understood.
    let cases: [Mistake<'_>; 18] = [
        (
            &["produce", "nowhere"],
            b"x\n",
            1,
            &[
                "no topic nowhere; create it, as with `logboom topic create nowhere --partitions 1 --replication-factor 1`",
            ],
        ),
        (
            &["consume", "nowhere"],
            b"",
            1,
            &["no topic nowhere; create it"],
        ),
        (
            &["topic", "describe", "nowhere"],
            b"",
            1,
            &["no topic nowhere; create it"],
        ),
        (
            &["topic", "delete", "nowhere"],
            b"",
            1,
            &["no topic nowhere"],
        ),
        (
            &["produce", "lines", "--partition", "2"],
            b"x\n",
            1,
            &["lines has 2 partitions, numbered from 0; there is no partition 2"],
        ),
        (
            &["consume", "lines", "--partition", "2"],
            b"",
            1,
            &["there is no partition 2"],
        ),
        (
            &["consume", "lines", "--partition", "1", "--from", "1001"],
            b"",
            1,
            &[
                "offset 1001 of lines-1 is out of range: 0 to 1000",
                "use --from earliest or latest",
            ],
        ),
        (
            &[
                "topic",
                "create",
                "lines",
                "--partitions",
                "1",
                "--replication-factor",
                "1",
            ],
            b"",
            1,
            &["topic lines exists already"],
        ),
        (
            &[
                "topic",
                "create",
                "t",
                "--partitions",
                "0",
                "--replication-factor",
                "1",
            ],
            b"",
            1,
            &["number of partitions 0: use 1 to"],
        ),
        (
            &[
                "topic",
                "create",
                "t",
                "--partitions",
                "1",
                "--replication-factor",
                "4",
            ],
            b"",
            1,
            &["replication factor 4: the cluster has 3 usable brokers, use 1 to 3"],
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
                "color=blue",
            ],
            b"",
            1,
            &["color: unknown key, known are"],
        ),
        (
            &[
                "topic",
                "create",
                "../t",
                "--partitions",
                "1",
                "--replication-factor",
                "1",
            ],
            b"",
            2,
            &["illegal topic name \"../t\""],
        ),
        (
            &[
                "topic",
                "create",
                "t",
                "--partitions",
                "-1",
                "--replication-factor",
                "1",
            ],
            b"",
            2,
            &["--partitions"],
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
                "color",
            ],
            b"",
            2,
            &["use KEY=VALUE"],
        ),
        (&["produce", "a/b"], b"", 2, &["illegal topic name \"a/b\""]),
        (
            &["consume", "lines", "--from", "yesterday"],
            b"",
            2,
            &["use earliest, latest or an offset"],
        ),
        (
            &["produce", "lines", "--acks", "two"],
            b"",
            2,
            &["'two'", "all, leader, none"],
        ),
        (
            &[
                "produce",
                "lines",
                "--key-separator",
                ":",
                "--partition",
                "0",
            ],
            b"a:b\nc\n",
            1,
            &["line 2 does not contain the key separator \":\""],
        ),
    ];
    for (arguments, input, code, parts) in cases {
        run(at, arguments, input).await.refused(code, parts);
    }
    // A record above max.message.bytes: the line is named, nothing of it is stored, what came before it is.
    run(
        at,
        &[
            "topic",
            "create",
            "small",
            "--partitions",
            "1",
            "--replication-factor",
            "3",
            "--config",
            "max.message.bytes=1024",
        ],
        b"",
    )
    .await
    .good();
    let large = [b"fits\n".to_vec(), vec![b'x'; 2_000], b"\n".to_vec()].concat();
    run(at, &["produce", "small"], &large).await.refused(
        1,
        &[
            "line 2 has 2000 bytes, ",
            "max.message.bytes of small is 1024: split the line, or use a topic",
        ],
    );
    let read = run(at, &["consume", "small"], b"").await.good();
    assert_eq!(String::from_utf8_lossy(&read), "fits\n");
    // Nobody there.
    let nobody = ["127.0.0.1:1".to_owned()];
    run(&nobody, &["topic", "list"], b"").await.refused(
        1,
        &[
            "127.0.0.1:1",
            "is the cluster up? Name its brokers with --bootstrap",
        ],
    );
    for wrong in ["nonsense", "127.0.0.1:port", ","] {
        run(&[wrong.to_owned()], &["topic", "list"], b"")
            .await
            .refused(2, &["host:port"]);
    }
}

/// What changes something has an answer for scripts as well.
async fn answers_as_json(at: &[String]) {
    for (words, answer) in [
        (
            &["topic", "delete", "small", "--json"][..],
            json!({ "name": "small", "deleted": true }),
        ),
        (
            &["cluster", "elect-leaders", "--json"],
            json!({ "moved": [] }),
        ),
    ] {
        let out = run(at, words, b"").await.good();
        let out: Value = serde_json::from_slice(&out).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(out, answer, "{words:?}");
    }
}

async fn follows_and_survives_a_closed_pipe(at: &[String]) {
    // `--follow` shows what comes later, from the end on.
    let mut follower = spawn(
        at,
        &[
            "consume",
            "lines",
            "--partition",
            "0",
            "--from",
            "latest",
            "--follow",
        ],
    );
    let mut shown = BufReader::new(follower.stdout.take().expect("its output")).lines();
    let mut written = 0;
    let line = loop {
        // It begins at the end that it finds, whenever that is.
        written += 1;
        run(
            at,
            &["produce", "lines", "--partition", "0"],
            format!("later {written}\n").as_bytes(),
        )
        .await
        .good();
        match tokio::time::timeout(Duration::from_millis(500), shown.next_line()).await {
            Ok(line) => break line.expect("a line").expect("not the end"),
            Err(_) => assert!(written < 60, "nothing is shown"),
        }
    };
    assert!(line.starts_with("later "), "{line}");
    run(at, &["produce", "lines", "--partition", "0"], b"and on\n")
        .await
        .good();
    let next = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            match shown.next_line().await {
                Ok(Some(line)) if line.starts_with("later ") => {}
                other => break other,
            }
        }
    });
    assert_eq!(
        next.await.expect("in time").expect("a line").as_deref(),
        Some("and on")
    );
    // The reader leaves: as with `| head -1`, that is the end and no failure.
    drop(shown);
    run(
        at,
        &["produce", "lines", "--partition", "0"],
        b"nobody reads this\n",
    )
    .await
    .good();
    let mut said = String::new();
    let mut err = follower.stderr.take().expect("its errors");
    let ended = tokio::time::timeout(Duration::from_secs(10), follower.wait()).await;
    err.read_to_string(&mut said).await.expect("its errors");
    let code = ended.expect("it ends").expect("an end").code();
    assert_eq!((code, said.as_str()), (Some(0), ""));
    // The same for a long output that is cut short.
    let mut long = spawn(at, &["consume", "lines", "--partition", "1", "--follow"]);
    let mut first = [0; 2];
    let mut out = long.stdout.take().expect("its output");
    out.read_exact(&mut first).await.expect("a line");
    assert_eq!(&first, b"0\n");
    drop(out);
    let mut more = spawn(at, &["produce", "lines", "--partition", "1"]);
    let mut input = more.stdin.take().expect("its input");
    input.write_all(b"1000\n").await.expect("taken");
    drop(input);
    assert_eq!(more.wait().await.expect("an end").code(), Some(0));
    let output = tokio::time::timeout(Duration::from_secs(10), long.wait_with_output()).await;
    let output = output.expect("it ends").expect("an end");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
