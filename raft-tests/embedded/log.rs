//! The brokers' log: shown with a test that fails, and kept for tests that look into it.
//!
//! Owns the lines of all tests of this process.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

static LINES: Mutex<String> = Mutex::new(String::new());

struct Keep;

impl Write for Keep {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        print!("{text}");
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push_str(&text);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Logs from now on; once for all tests of the process.
pub(crate) fn start() {
    tracing_subscriber::fmt()
        .with_writer(|| Keep)
        .with_env_filter("warn,openraft=error")
        .with_ansi(false)
        .try_init()
        .ok();
}

/// How many lines so far have all of `parts`.
pub(crate) fn count(parts: &[&str]) -> usize {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    let has_all = |line: &&str| parts.iter().all(|part| line.contains(part));
    lines.lines().filter(has_all).count()
}
