//! The store from outside: what it promises, over the real disk and over the one in memory that loses power.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods
)]

mod basics;
mod faults;
mod model;
mod space;
mod support;
