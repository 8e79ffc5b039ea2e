//! The command line as its user sees it: what goes in, what comes out, and with which exit code.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

/// How long one command may take.
const WITHIN: Duration = Duration::from_secs(60);

/// What a command answered.
#[derive(Debug, Clone)]
pub struct Said {
    pub code: Option<i32>,
    pub out: Vec<u8>,
    pub err: String,
    /// The command line.
    #[allow(dead_code, reason = "shown, with the rest, where a test fails")]
    pub asked: String,
}

impl Said {
    /// The output of a command that succeeded in silence.
    pub fn good(self) -> Vec<u8> {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{self:?}");
        self.out
    }

    /// Asserts the exit code, and that there is exactly one line on standard error, with every one of `parts` in it.
    pub fn refused(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.out.is_empty(), "{self:?}");
        let line = self
            .err
            .strip_suffix('\n')
            .unwrap_or_else(|| panic!("no line: {self:?}"));
        assert!(
            line.starts_with("logboom: ") && !line.contains('\n'),
            "not one line: {self:?}"
        );
        for part in parts {
            assert!(line.contains(part), "{line:?} lacks {part:?}");
        }
    }
}

/// A `logboom` command: its standard streams are pipes, and it is killed with its handle.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_logboom"));
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Starts a command for the cluster at `bootstrap`.
pub fn spawn(bootstrap: &[String], arguments: &[&str]) -> Child {
    let mut command = command(arguments);
    command.env("LOGBOOM_BOOTSTRAP", bootstrap.join(","));
    command
        .spawn()
        .unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
}

/// Runs a command for the cluster at `bootstrap`, with `input` as its standard input, to its end.
pub async fn run(bootstrap: &[String], arguments: &[&str], input: &[u8]) -> Said {
    let said = finish(spawn(bootstrap, arguments), input).await;
    Said {
        asked: arguments.join(" "),
        ..said
    }
}

/// Gives `input` to a command that runs, and waits for its end.
pub async fn finish(mut child: Child, input: &[u8]) -> Said {
    let stdin = child.stdin.take();
    let talk = async {
        if let Some(mut stdin) = stdin {
            // A command that does not want it may have ended already.
            stdin.write_all(input).await.ok();
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(WITHIN, talk)
        .await
        .context("it does not end");
    let output = output.and_then(|output| Ok(output?));
    let output = output.unwrap_or_else(|error| panic!("a command: {error:#}"));
    Said {
        code: output.status.code(),
        out: output.stdout,
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
        asked: String::new(),
    }
}

/// Sends a signal to a command that runs.
pub fn signal(child: &Child, signal: Signal) {
    let id = child.id().and_then(|id| i32::try_from(id).ok());
    let pid = id.and_then(Pid::from_raw).expect("it runs");
    kill_process(pid, signal).unwrap_or_else(|error| panic!("{signal:?}: {error}"));
}

/// Processes with `text` in their command line.
pub fn processes_with(text: &str) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").expect("the processes").flatten();
    let ids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id: &u32| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    })
    .collect()
}
