//! The judge is judged: right histories pass, every kind of damage is found and named, a slow and simple judge agrees.
//!
//! - `reference`: an executable reference that records right histories; `clean`: they pass.
//! - `mutant`, `log_mutators`, `order_mutators`, `damaged`: at least three ways to damage a history for every kind of anomaly, each found and named.
//! - `oracle`: small histories, judged also by trying every order.
//! - `exact`: figures, and the edges of time and offset.
//! - `verdicts`: what proves nothing is invalid. `wild`: any file is read or refused.
//! - `live`: a cluster in this process, hurt while the workload runs.

// Offsets are small here, counts are printed, and a helper that cannot go on ends the test.
#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    unreachable_pub
)]

mod clean;
mod damaged;
mod exact;
mod live;
mod log_mutators;
mod mutant;
mod oracle;
mod order_mutators;
mod reference;
mod verdicts;
mod wild;
