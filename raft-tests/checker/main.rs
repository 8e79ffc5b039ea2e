//! The judge is judged: right histories pass, every kind of damage is found and named, a slow and simple judge agrees.
//!
//! - `reference`: an executable reference that records right histories; `clean`: they pass.
//! - `live`: a cluster in this process, hurt while the workload runs.

// Offsets are small here, and a helper that cannot go on ends the test.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    clippy::indexing_slicing
)]
#![allow(unreachable_pub)]

mod clean;
mod live;
mod reference;
