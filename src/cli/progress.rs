//! What a person sees while the demo runs: events, and below them a table that is drawn in place on a terminal.
//!
//! Owns the part of the screen that is drawn over. Piped, there are only the events, one per line.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};

use tokio::time::Instant;

use super::output;

/// See the module.
pub(super) struct Board {
    live: bool,
    started: Instant,
    drawn: usize,
    table: String,
}

impl Board {
    /// A board on standard output; `plain` when no terminal tricks are wanted.
    pub(super) fn new(plain: bool) -> Self {
        let live = !plain && io::stdout().is_terminal();
        Self {
            live,
            started: Instant::now(),
            drawn: 0,
            table: String::new(),
        }
    }

    /// Whether a table is shown.
    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    /// Something happened.
    pub(super) fn event(&mut self, text: &str) -> anyhow::Result<()> {
        let seconds = self.started.elapsed().as_secs_f64();
        let mut screen = self.erase();
        writeln!(screen, "{seconds:7.2} s  {text}")?;
        self.show(screen)
    }

    /// The table has changed.
    pub(super) fn draw(&mut self, table: String) -> anyhow::Result<()> {
        if !self.live || self.table == table {
            return Ok(());
        }
        let screen = self.erase();
        self.table = table;
        self.show(screen)
    }

    /// What takes the cursor back to where the table begins, and clears it.
    fn erase(&self) -> String {
        if self.drawn == 0 {
            String::new()
        } else {
            format!("\x1b[{}A\x1b[J", self.drawn)
        }
    }

    fn show(&mut self, mut screen: String) -> anyhow::Result<()> {
        if self.live {
            screen.push_str(&self.table);
            self.drawn = self.table.lines().count();
        }
        match output::text(&screen) {
            // The verdict does not depend on who watches.
            Err(error) if output::is_closed(&error) => Ok(()),
            shown => shown,
        }
    }
}
