//! The process-level harness: brokers as child processes on loopback, killed, paused and restarted, with numbered records
//! written to them and read back.
//!
//! - `cluster`: [`ProcessCluster`], the processes.
//! - [`command`]: the command line, run to its end and judged.
//! - `workload`: [`Workload`], a writer that numbers every record and keeps what it knows of each.
//! - `verdict`: [`verify`], what the answers permit and forbid, by the testkit's checker.

#![allow(unreachable_pub)]
// A harness that cannot go on ends the test, with a text that says why.
#![allow(clippy::panic, clippy::missing_panics_doc)]

mod cluster;
pub mod command;
mod verdict;
mod workload;

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

pub use self::cluster::{Builder, ProcessCluster};
pub use self::verdict::{Verdict, recorded, verify};
pub use self::workload::{Fate, History, Sent, Workload, WorkloadConfig, value_of};

/// Between two looks at a condition.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until `condition` gives a value. While it gives an error it is asked again; at `within` the test ends with `what` and
/// the last error. One look may take as long as it needs, but not beyond `within`.
pub async fn wait_for<T, F, Looking>(what: &str, within: Duration, mut condition: F) -> T
where
    F: FnMut() -> Looking,
    Looking: Future<Output = anyhow::Result<T>>,
{
    let deadline = Instant::now() + within;
    let mut last = None;
    loop {
        match tokio::time::timeout_at(deadline, condition()).await {
            Ok(Ok(value)) => return value,
            // A condition that never waits is never timed out either.
            Ok(Err(error)) if Instant::now() < deadline => last = Some(error),
            late => {
                let last = late.ok().and_then(Result::err).or(last);
                let last = last.map_or("the look itself took too long".to_owned(), |e| {
                    format!("{e:#}")
                });
                panic!("waited {within:?} for {what}: {last}");
            }
        }
        tokio::time::sleep_until(deadline.min(Instant::now() + LOOK)).await;
    }
}
