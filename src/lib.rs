//! Logboom: a replicated, partitioned log. Kafka's replication model, with a Raft group in the place of every partition's
//! replica set.
//!
//! An embedder needs four modules: [`config`] for a broker's settings, [`broker`] to run one, [`client`] to write, read and
//! administer, [`types`] for names, positions and errors. The others are the layers below them, from the wire and the disk
//! up: [`net`] and [`storage`], then [`raft`], then [`partition`] and [`controller`], with [`api`] as the waist between
//! clients and brokers. `docs/architecture.md` is the map; who imports whom is checked by a test.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod api;
pub mod broker;
pub mod client;
pub mod config;
pub mod controller;
pub mod net;
pub mod partition;
pub mod raft;
pub mod record;
pub mod runtime;
pub mod storage;
#[cfg(any(test, feature = "testkit"))]
pub mod testkit;
pub mod types;

/// The README's Rust, compiled with the examples of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

/// The page for embedders, likewise.
#[cfg(doctest)]
#[doc = include_str!("../docs/testing-your-service.md")]
mod testing_your_service {}
