//! What a person sees while something runs: events, and below them a table that is drawn in place on a terminal; or one line on standard
//! error.
//!
//! Owns the part of the screen that is drawn over. Piped, there are only the events, one per line, and of the line on standard error one
//! every few seconds.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

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

/// How often a line is drawn over, and how often it is written where it cannot be.
const DRAWN_EVERY: Duration = Duration::from_millis(200);
const WRITTEN_EVERY: Duration = Duration::from_secs(5);

/// How far something is, in one line on standard error.
pub(super) struct Line {
    live: bool,
    shown: Option<Instant>,
}

impl Line {
    pub(super) fn new() -> Self {
        Self {
            live: io::stderr().is_terminal(),
            shown: None,
        }
    }

    /// Says it, unless it was said just now.
    pub(super) fn show(&mut self, text: &str) {
        let every = if self.live {
            DRAWN_EVERY
        } else {
            WRITTEN_EVERY
        };
        if self.shown.is_none_or(|shown| shown.elapsed() >= every) {
            self.say(text);
        }
    }

    /// Says it in any case.
    pub(super) fn say(&mut self, text: &str) {
        self.shown = Some(Instant::now());
        let mut errors = io::stderr();
        // Nobody is left to be told when standard error is gone.
        if self.live {
            write!(errors, "\r\x1b[K{text}").ok();
        } else {
            writeln!(errors, "{text}").ok();
        }
        errors.flush().ok();
    }

    /// Takes it from the screen.
    pub(super) fn clear(&mut self) {
        if self.live && self.shown.take().is_some() {
            write!(io::stderr(), "\r\x1b[K").ok();
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.clear();
    }
}
