//! The `logboom` command.
//!
//! Owns the process: its runtime, its log, its exit code. What the commands do is in `cli`, and there only through the library's
//! public API.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
