//! The text that the demo streams: a file of the user's, or one made here.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::cli::Usage;
use crate::cli::lines::LineReader;

/// Largest `max.message.bytes`, less what a batch and a record need beside a line.
pub(super) const LINE_BYTES_MAX: usize = (16 << 20) - 256;
const BUILT_IN_LINES: u64 = 50_000;

/// What is known of the text before it is streamed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Text {
    pub(super) lines: u64,
    pub(super) bytes: u64,
    pub(super) longest: usize,
}

pub(super) fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The file to stream, and what is in it; the built-in text is written to a file, so that there is one way only.
pub(super) async fn prepare_text(
    input: Option<&Path>,
    directory: &Path,
) -> anyhow::Result<(PathBuf, Text)> {
    let path = if let Some(path) = input {
        let wrong = |why: String| Usage(format!("--input {}: {why}", path.display()));
        let found = fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
        if !found.is_file() {
            // It is read twice: once to stream it, once to compare.
            return Err(wrong("not a regular file".to_owned()).into());
        }
        path.to_owned()
    } else {
        let path = directory.join("input.txt");
        fs::write(&path, built_in_text()?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        path
    };
    let file = open(&path)?;
    let counted = tokio::task::spawn_blocking(move || {
        let mut reader = LineReader::new(file, LINE_BYTES_MAX);
        let mut text = Text {
            lines: 0,
            bytes: 0,
            longest: 0,
        };
        while let Some(line) = reader.line()? {
            text.lines += 1;
            text.bytes += u64::try_from(line.len())? + 1;
            text.longest = text.longest.max(line.len());
        }
        anyhow::Ok(text)
    });
    Ok((path, counted.await??))
}

fn built_in_text() -> anyhow::Result<String> {
    const SENTENCES: [&str; 5] = [
        "A log boom is a barrier on a river that holds floating logs together.",
        "Every partition is a log, and every log has one leader.",
        "What is acknowledged is on the disks of a majority.",
        "",
        "When the leader dies, a replica that is in sync takes over; when it returns, it leads again.",
    ];
    let mut text = String::new();
    for (number, sentence) in (1..=BUILT_IN_LINES).zip(SENTENCES.iter().cycle()) {
        writeln!(text, "{number:05} {sentence}")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the built-in text is what help says. Method: count.
    #[test]
    fn the_built_in_text_has_its_lines() {
        assert_eq!(built_in_text().unwrap().lines().count(), 50_000);
    }
}
