//! What users see: descriptions that agree, requests that are refused with one clear answer, the command line, and what happens
//! on bad days.
//!
//! - `answers`: wrong requests and wrong bytes, each with its definite answer; what was refused left no trace.
//! - `lines`: records through the command line.
//! - `days`: brokers stopped, paused and gone while others want to write.
//! - `raw`: requests and bytes past the client.

mod answers;
mod days;
mod lines;
mod raw;
