//! What a person sees while something runs: events, and below them a table that is drawn in place on a terminal; or one line on standard
//! error.
//!
//! Owns the part of the screen that is drawn over. Piped, there are only the events, one per line, and of the line on standard error one
//! every few seconds.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use tokio::time::Instant;

use super::output;

/// See the module.
pub(super) struct Board {
    started: Instant,
    screen: Screen,
}

impl Board {
    /// A board on standard output; `plain` when no terminal tricks are wanted.
    pub(super) fn new(plain: bool) -> Self {
        Self {
            started: Instant::now(),
            screen: Screen {
                live: !plain && io::stdout().is_terminal(),
                ..Screen::default()
            },
        }
    }

    /// Whether a table is shown.
    pub(super) fn is_live(&self) -> bool {
        self.screen.live
    }

    /// Something happened.
    pub(super) fn event(&mut self, text: &str) -> anyhow::Result<()> {
        let seconds = self.started.elapsed().as_secs_f64();
        show(&self.screen.event(&format!("{seconds:7.2} s  {text}")))
    }

    /// The table has changed.
    pub(super) fn draw(&mut self, table: String) -> anyhow::Result<()> {
        show(&self.screen.draw(table))
    }
}

fn show(text: &str) -> anyhow::Result<()> {
    match output::text(text) {
        // The verdict does not depend on who watches.
        Err(error) if output::is_closed(&error) => Ok(()),
        shown => shown,
    }
}

/// Events above, the table below them: what has to be written for it.
#[derive(Debug, Default)]
struct Screen {
    live: bool,
    drawn: usize,
    table: String,
}

impl Screen {
    fn event(&mut self, text: &str) -> String {
        let mut written = self.erase();
        written.push_str(text);
        written.push('\n');
        written + &self.drawn_table()
    }

    fn draw(&mut self, table: String) -> String {
        if !self.live || self.table == table {
            return String::new();
        }
        let written = self.erase();
        self.table = table;
        written + &self.drawn_table()
    }

    /// What takes the cursor back to where the table begins, and clears it.
    fn erase(&self) -> String {
        if self.drawn == 0 {
            String::new()
        } else {
            format!("\x1b[{}A\x1b[J", self.drawn)
        }
    }

    fn drawn_table(&mut self) -> String {
        if !self.live {
            return String::new();
        }
        self.drawn = self.table.lines().count();
        self.table.clone()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a terminal shows of this: it knows line ends, cursor up, and clearing to the end.
    fn shown(written: &str) -> Vec<String> {
        let mut lines = vec![String::new()];
        let mut rest = written;
        while let Some(next) = rest.chars().next() {
            rest = &rest[next.len_utf8()..];
            match next {
                '\n' => lines.push(String::new()),
                '\x1b' => {
                    let (code, behind) = rest.split_once(['A', 'J']).unwrap();
                    if let Some(up) = code.strip_prefix('[').filter(|up| !up.is_empty()) {
                        let up: usize = up.parse().unwrap();
                        assert_eq!(lines.last().unwrap(), "", "not at the start of a line");
                        lines.truncate(lines.len() - up);
                        lines.last_mut().unwrap().clear(); // the next code clears it
                    }
                    rest = behind;
                }
                text => lines.last_mut().unwrap().push(text),
            }
        }
        lines
    }

    /// Goal: on a terminal all events stay, in order, with the last table below them, whatever size the ones before had; elsewhere
    /// there are the events alone. Method: what is written goes through a small terminal.
    #[test]
    fn events_stay_above_the_table_that_is_drawn_over() {
        for live in [true, false] {
            let mut screen = Screen {
                live,
                ..Screen::default()
            };
            let mut written = screen.event("started");
            written += &screen.draw("\nLEADER\n1\n2\n".to_owned());
            written += &screen.draw("\nLEADER\n1\n".to_owned());
            written += &screen.event("broker 1 is killed");
            assert_eq!(screen.draw("\nLEADER\n1\n".to_owned()), "", "as before");
            written += &screen.draw("\nLEADER\n2\n3\n4\n".to_owned());
            written += &screen.event("broker 2 leads");
            let events = ["started", "broker 1 is killed", "broker 2 leads"];
            let table: &[&str] = if live {
                &["", "LEADER", "2", "3", "4"]
            } else {
                &[]
            };
            let expected = [&events[..], table, &[""]].concat();
            assert_eq!(shown(&written), expected, "{written:?}");
        }
    }
}
