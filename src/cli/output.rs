//! Standard output: results only, and never a panic when it is closed.

use std::io::{self, Write};

use logboom::api::Stale;
use logboom::types::TopicPartition;
use serde_json::{Value, json};

/// Writes `text` and sees it off.
pub(super) fn text(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Whether `error` says that whoever read our output has closed it.
pub(super) fn is_closed(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// Writes one line.
pub(super) fn line(line: &str) -> anyhow::Result<()> {
    text(&format!("{line}\n"))
}

/// Writes one JSON value on one line.
pub(super) fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    line(&serde_json::to_string(value)?)
}

/// What JSON says of an answer that may be out of date; null when it is not.
pub(super) fn stale(stale: Option<Stale>) -> Value {
    stale.map_or(
        Value::Null,
        |stale| json!({ "broker": stale.broker, "age_ms": stale.age_ms }),
    )
}

/// Partitions in JSON.
pub(super) fn partitions<'a>(list: impl IntoIterator<Item = &'a TopicPartition>) -> Vec<Value> {
    list.into_iter()
        .map(|one| json!({ "topic": one.topic, "partition": one.partition }))
        .collect()
}

/// Rows under a heading, in columns as wide as they need.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let title = heading.get(column).map_or(0, |title| title.chars().count());
        cells
            .map(|cell| cell.chars().count())
            .fold(title, usize::max)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let mut text = String::new();
    let mut write = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells.zip(&widths).map(|(cell, width)| {
            let missing = width.saturating_sub(cell.chars().count());
            format!("{cell}{}", " ".repeat(missing))
        });
        let row = padded.collect::<Vec<_>>().join("  ");
        text.push_str(row.trim_end());
        text.push('\n');
    };
    write(&mut heading.iter().copied());
    for row in rows {
        write(&mut row.iter().map(String::as_str));
    }
    text
}

/// Numbers as people list them: `1,2,3`.
pub(super) fn list(items: impl IntoIterator<Item = impl ToString>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() {
        "-".to_owned()
    } else {
        items.join(",")
    }
}

/// A value that may be missing.
pub(super) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: columns line up, nothing trails. Method: one table, letter by letter.
    #[test]
    fn columns_line_up() {
        let rows = vec![
            vec!["a".to_owned(), list([1, 2])],
            vec!["long name".to_owned(), or_dash(None::<u32>)],
        ];
        assert_eq!(
            table(&["NAME", "ISR"], &rows),
            "NAME       ISR\na          1,2\nlong name  -\n"
        );
    }
}
