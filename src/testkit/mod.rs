//! What a test of a replicated log needs (feature `testkit`): a cluster that can be hurt, and a record of what happened.
//!
//! - [`LocalCluster`]: several brokers in this process.
//! - [`workload`]: clients that write, read and ask, and [`recorder`], which keeps what they asked and were told.
//! - [`history`]: what was asked, answered and broken in a run, and what the log held in the end.
//! - [`checker`]: whether that may be.

pub mod checker;
mod cluster;
pub mod history;
pub mod recorder;
pub mod workload;

pub use cluster::LocalCluster;

use std::time::Duration;

use tokio::time::Instant;

/// Waits until `condition` holds, looking again every few ms; false when it does not within `deadline`.
pub async fn eventually<F, C>(deadline: Duration, mut condition: C) -> bool
where
    F: Future<Output = bool>,
    C: FnMut() -> F,
{
    let end = Instant::now() + deadline;
    loop {
        if condition().await {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
