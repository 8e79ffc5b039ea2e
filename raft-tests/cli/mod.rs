//! The command line where no cluster is needed, or where it brings its own: wrong usage, configuration, `fsck`,
//! `check`, `dev`, `demo`, `bench`.

// A test that cannot go on ends with a text that says why.
#![allow(clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod alone;
mod bench;
mod chaos;
mod check;
mod whole;
