//! The preloaded disk faults, each shown on a child process that does a few steps on files and is killed.
//!
//! Owns the script language of that child, which is this test binary again, with `std` and sled for what it does to its files.

// A test that cannot go on ends with a text that says why.
#![allow(clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use logboom::testkit::{FaultDisk, Loss, Lost};
use tempfile::TempDir;

/// The child's steps, and where it says what came of each.
const SCRIPT: &str = "FAULTDISK_SCRIPT";
const ANSWERS: &str = "FAULTDISK_ANSWERS";
const HOME: &str = "FAULTDISK_HOME";

struct Bench {
    home: TempDir,
    disk: FaultDisk,
}

impl Bench {
    fn new() -> Self {
        let home = TempDir::with_prefix("logboom-faultdisk-").expect("a temporary directory");
        let disk = FaultDisk::create(&home.path().join("root"), &home.path().join("side"));
        Self {
            disk: disk.expect("the library, on the systems this is tested on"),
            home,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join("root").join(name)
    }

    /// Runs the steps in a process with this disk, which then dies by SIGKILL; gives what came of each step.
    fn run(&self, script: &str) -> Vec<String> {
        let answers = self.home.path().join("answers");
        let mut child = Command::new(std::env::current_exe().expect("this test"));
        child.args(["--exact", "child", "--ignored", "--test-threads", "1"]);
        child
            .env(SCRIPT, script)
            .env(ANSWERS, &answers)
            .env(HOME, self.path(""));
        let said = child
            .envs(self.disk.environment())
            .output()
            .expect("a child");
        assert_eq!(said.status.signal(), Some(9), "{said:?}");
        let text = fs::read_to_string(answers).expect("its answers");
        text.lines().map(str::to_owned).collect()
    }

    /// The same, where every step is to succeed.
    fn done(&self, script: &str) {
        let answers = self.run(script);
        assert!(
            answers.iter().all(|answer| answer == "ok"),
            "{script}: {answers:?}"
        );
    }

    fn lose(&self, loss: Loss, seed: u64) -> Lost {
        self.disk.lose_power_as(loss, seed).expect("what was lost")
    }

    /// The files below the root with their contents, as text.
    fn tree(&self) -> String {
        let mut text = String::new();
        let mut left = vec![self.path("")];
        let mut found = BTreeSet::new();
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(directory).expect("a directory") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    left.push(path.clone());
                }
                found.insert(path);
            }
        }
        for path in found {
            let name = path.strip_prefix(self.path("")).expect("below").display();
            match fs::read(&path) {
                Ok(bytes) => write!(text, "{name}={} ", String::from_utf8_lossy(&bytes)),
                Err(_) => write!(text, "{name}/ "),
            }
            .expect("a string");
        }
        text.trim_end().to_owned()
    }
}

/// The child of the tests of this file: does the steps of its environment and dies.
#[test]
#[ignore = "started by the other tests, with its steps in the environment"]
fn child() {
    let home = PathBuf::from(std::env::var_os(HOME).expect("its directory"));
    let script = std::env::var(SCRIPT).expect("its steps");
    let answers = File::create(std::env::var_os(ANSWERS).expect("a file")).expect("a file");
    let mut at = 0;
    for step in script.split(';').map(str::trim) {
        let words: Vec<&str> = step.split_whitespace().collect();
        let answer = match act(&home, &words) {
            Ok(said) if said.is_empty() => "ok\n".to_owned(),
            Ok(said) => format!("{said}\n"),
            Err(error) => format!("{error}\n"),
        };
        answers.write_all_at(answer.as_bytes(), at).expect("told");
        at += answer.len() as u64;
    }
    let me = rustix::process::getpid();
    rustix::process::kill_process(me, rustix::process::Signal::KILL).expect("its end");
}

fn act(home: &Path, words: &[&str]) -> io::Result<String> {
    let path = |at: usize| home.join(words[at].trim_matches('.'));
    let number = |at: usize| words[at].parse::<u64>().expect("a number");
    let open = |at: usize| OpenOptions::new().read(true).write(true).open(path(at));
    match words[0] {
        "create" => File::create(path(1)).map(drop)?,
        "put" => open(1)?.write_all_at(words[3].as_bytes(), number(2))?,
        "fill" => {
            let count = usize::try_from(number(4)).expect("a size");
            open(1)?.write_all_at(&vec![words[3].as_bytes()[0]; count], number(2))?;
        }
        "append" => {
            let mut file = OpenOptions::new().append(true).open(path(1))?;
            io::Write::write_all(&mut file, words[2].as_bytes())?;
        }
        "length" => open(1)?.set_len(number(2))?,
        "sync" => open(1)?.sync_data()?,
        "syncdir" => File::open(path(1))?.sync_all()?,
        "rename" => fs::rename(path(1), path(2))?,
        "unlink" => fs::remove_file(path(1))?,
        "mkdir" => fs::create_dir(path(1))?,
        "rmdir" => fs::remove_dir_all(path(1))?,
        "read" => return fs::read_to_string(path(1)),
        "copy" => fs::copy(path(1), path(2)).map(drop)?,
        "free" => {
            let stat = rustix::fs::statvfs(home)?;
            return Ok((stat.f_bavail * stat.f_frsize).to_string());
        }
        "timed" => {
            let file = open(1)?;
            let began = tokio::time::Instant::now();
            file.sync_all()?;
            return Ok(began.elapsed().as_millis().to_string());
        }
        "sled" => {
            // Its thread that flushes now and then ends that with a true sync.
            let config = sled::Config::new().path(path(1)).flush_every_ms(None);
            let db = config.open().map_err(io::Error::other)?;
            db.insert("key", words[2]).map_err(io::Error::other)?;
            db.flush().map_err(io::Error::other)?;
            // Its threads go on until the process dies.
            std::mem::forget(db);
        }
        other => panic!("no step {other}"),
    }
    Ok(String::new())
}

const FILE: &str = "create f; put f 0 synced; sync f; syncdir .";

/// Goal: a power failure takes the contents that were not synced, and nothing else. Method: scripts over one file that is durable,
/// each with what it leaves when everything that may be lost is lost.
#[test]
fn only_synced_contents_survive() {
    for (script, left) in [
        ("put f 0 SYN", "f=synced"),
        ("put f 0 SYN; sync f", "f=SYNced"),
        (
            "put f 6 more; sync f; put f 8 XY; put f 12 Z",
            "f=syncedmore",
        ),
        ("append f 1; append f 2", "f=synced"),
        ("length f 3", "f=synced"),
        ("length f 3; sync f", "f=syn"),
        ("length f 3; put f 3 ...", "f=synced"),
        ("create f; put f 0 new", "f=synced"),
        ("create f; put f 0 new; sync f", "f=new"),
        (
            "put f 0 SYN; create g; put g 0 x; sync g; syncdir .",
            "f=synced g=x",
        ),
        ("create g; copy f g; syncdir .", "f=synced g="),
    ] {
        let bench = Bench::new();
        bench.done(&format!("{FILE}; {script}"));
        bench.lose(Loss::Everything, 0);
        assert_eq!(bench.tree(), left, "{script}");
    }
}

/// Goal: names come and go only with a sync of their directory; a file whose name was taken comes back with what it had. Method: as above.
#[test]
fn only_names_of_synced_directories_survive() {
    for (script, left) in [
        ("create g; put g 0 x; sync g", "f=synced"),
        ("create g; put g 0 x; sync g; syncdir .", "f=synced g=x"),
        ("rename f g", "f=synced"),
        ("rename f g; syncdir .", "g=synced"),
        ("create g; put g 0 new; sync g; rename g f", "f=synced"),
        (
            "create g; put g 0 new; sync g; rename g f; syncdir .",
            "f=new",
        ),
        ("create g; put g 0 new; rename g f; syncdir .", "f="),
        ("unlink f", "f=synced"),
        ("unlink f; syncdir .", ""),
        ("unlink f; create f; put f 0 other; sync f", "f=synced"),
        ("put f 0 XX; unlink f", "f=synced"),
        (
            "mkdir d; create d/g; put d/g 0 x; sync d/g; syncdir d",
            "f=synced",
        ),
        (
            "mkdir d; syncdir .; create d/g; syncdir d; rmdir d",
            "d/ d/g= f=synced",
        ),
        (
            "mkdir d; syncdir .; create d/g; syncdir d; rmdir d; syncdir .",
            "f=synced",
        ),
    ] {
        let bench = Bench::new();
        bench.done(&format!("{FILE}; {script}"));
        bench.lose(Loss::Everything, 0);
        assert_eq!(bench.tree(), left, "{script}");
    }
}

/// Goal: `sync_file_range`, which sled calls its flush, makes nothing durable. Method: a database whose file is synced, then a value
/// inserted and flushed; with and without a loss of power.
#[test]
fn a_range_written_back_is_not_synced() {
    for (lost, value) in [(false, "second"), (true, "first")] {
        let bench = Bench::new();
        bench.done("sled s first; sync s/db; syncdir s; syncdir .");
        bench.done("sled s second");
        if lost {
            bench.lose(Loss::Everything, 0);
        }
        let found = sled::open(bench.path("s")).and_then(|db| db.get("key"));
        let found = found.expect("a database").expect("a value");
        assert_eq!(String::from_utf8_lossy(&found), value, "lost: {lost}");
    }
}

/// Goal: what a killed process had written without a sync stays at risk in the next one, until that one syncs it. Method: two processes,
/// with and without the sync.
#[test]
fn writes_of_a_killed_process_stay_at_risk() {
    for (second, left) in [("create g", "f=synced"), ("sync f", "f=SYNced")] {
        let bench = Bench::new();
        bench.done(&format!("{FILE}; put f 0 SYN"));
        bench.done(second);
        bench.lose(Loss::Everything, 0);
        assert_eq!(bench.tree(), left, "{second}");
        let again = bench.lose(Loss::Everything, 0);
        assert_eq!(
            (again.writes_pending, again.names_pending),
            (0, 0),
            "{again:?}"
        );
    }
}

/// Goal: a loss of the tail keeps what came before some moment, over all files. Method: numbered writes to two files; whatever the seed, the
/// lost ones are the last ones, and different seeds lose differently.
#[test]
fn the_tail_is_lost_in_order() {
    let mut seen = BTreeSet::new();
    for seed in 0..12 {
        let bench = Bench::new();
        bench.done("create a; create b; put a 0 ....; put b 0 ....; sync a; sync b; syncdir .");
        bench.done("put a 0 1; put b 0 2; put a 1 3; put b 1 4; put a 2 5; put b 2 6");
        let lost = bench.lose(Loss::Tail, seed);
        let tree = bench.tree();
        let kept: BTreeSet<u32> = tree.chars().filter_map(|one| one.to_digit(10)).collect();
        let count = u32::try_from(kept.len()).expect("few");
        assert_eq!(kept, (1..=count).collect(), "{tree}");
        assert_eq!(
            (lost.writes_pending, lost.writes_lost),
            (6, 6 - kept.len()),
            "{tree}"
        );
        seen.insert(count);
    }
    assert!(seen.len() > 3, "{seen:?}");
}

/// Goal: a torn write keeps some sectors and not others, none that was synced is touched, and the seed decides. Method: new contents over old
/// ones, beyond their end too; every sector is wholly one or the other.
#[test]
fn a_torn_write_keeps_some_sectors() {
    let tear = |seed: u64| {
        let bench = Bench::new();
        bench.done("create f; fill f 0 o 8192; sync f; syncdir .; fill f 2048 n 8192");
        let lost = bench.lose(Loss::Torn, seed);
        assert_eq!(lost.writes_pending, 1);
        fs::read(bench.path("f")).expect("the file")
    };
    let mut different = BTreeSet::new();
    let mut lengths = BTreeSet::new();
    let (mut old, mut new) = (0, 0);
    for seed in 0..8 {
        let found = tear(seed);
        assert!(
            found.len() == 8_192 || found.len() == 10_240,
            "{}",
            found.len()
        );
        for (number, sector) in found.chunks(512).enumerate() {
            let all = |byte: u8| sector.iter().all(|one| *one == byte);
            let new = all(b'n') && number >= 4;
            assert!(
                new || all(b'o') && number < 16 || all(0) && number >= 16,
                "sector {number}"
            );
        }
        let sectors = |byte: u8| found.chunks(512).filter(|sector| sector[0] == byte).count();
        (old, new) = (old + sectors(b'o') - 4, new + sectors(b'n'));
        assert!(found == tear(seed), "seed {seed} again");
        lengths.insert(found.len());
        different.insert(found);
    }
    assert!(different.len() > 4 && lengths.len() == 2, "{lengths:?}");
    assert!(old > 8 && new > 8, "{old} sectors taken back, {new} kept");
}

/// Goal: the sync that is to fail fails, once, and what it should have made durable is gone. Method: the second of three syncs.
#[test]
fn a_failed_sync_drops_what_was_written() {
    let bench = Bench::new();
    bench.done(FILE);
    bench.disk.fail_sync(2).expect("told");
    let said = bench.run("put f 0 1; sync f; put f 0 2; sync f; read f; put f 1 3; sync f; read f");
    let error = io::Error::from_raw_os_error(5).to_string();
    assert_eq!(
        said,
        ["ok", "ok", "ok", &error, "1ynced", "ok", "ok", "13nced"]
    );
    bench.lose(Loss::Everything, 0);
    assert_eq!(bench.tree(), "f=13nced");
    assert_eq!(bench.disk.counts().expect("counts").syncs_failed, 1);
    let failed = bench.disk.failed_sync().expect("a file");
    assert_eq!(failed, Some(PathBuf::from("f")));
}

/// Goal: a full disk refuses what grows a file, tells its free space accordingly, and takes more when there is room. Method: a limit, a write
/// that fits, one that does not, one in place; then no limit.
#[test]
fn a_full_disk_refuses_and_says_so() {
    let bench = Bench::new();
    bench.done("create f; fill f 0 x 8192; sync f; syncdir .");
    bench.disk.limit_free(Some(64 << 10)).expect("told");
    let said =
        bench.run("free; fill f 8192 x 40960; free; fill f 49152 x 40960; free; fill f 0 y 8192");
    let full = io::Error::from_raw_os_error(28).to_string();
    assert_eq!(said, ["65536", "ok", "24576", &full, "0", "ok"]);
    assert!(bench.disk.counts().expect("counts").writes_refused > 0);
    bench.disk.limit_free(None).expect("told");
    let said = bench.run("fill f 49152 x 40960; free");
    assert_eq!(said[0], "ok");
    assert!(
        said[1].parse::<u64>().expect("a number") > 1 << 20,
        "{said:?}"
    );
}

/// Goal: with a disk that lies, what was synced is lost too, so that a test of a whole system can show that it would notice. Method: a
/// sync before the lie and one after it.
#[test]
fn a_lying_disk_keeps_nothing() {
    let bench = Bench::new();
    bench.done(FILE);
    bench.disk.ignore_syncs(true).expect("told");
    bench.done("put f 0 SYN; sync f; create g; syncdir .");
    bench.lose(Loss::Everything, 0);
    assert_eq!(bench.tree(), "f=synced");
}

/// Goal: a slow disk is slow at syncs. Method: one that is timed.
#[test]
fn a_slow_disk_delays_syncs() {
    let bench = Bench::new();
    bench
        .disk
        .delay_syncs(Duration::from_millis(300))
        .expect("told");
    let said = bench.run("create f; timed f");
    assert!(said[1].parse::<u64>().expect("ms") >= 300, "{said:?}");
}
