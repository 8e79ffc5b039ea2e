//! Lines of bytes from something that is read in the background, in bounded memory.

use std::io::{BufRead, BufReader, Read};

use anyhow::Context;
use bytes::Bytes;
use tokio::sync::mpsc;

/// Lines go from the reader to the command in packets of about this many bytes …
const PACKET_BYTES: usize = 256 << 10;
/// … of at most this many lines …
const PACKET_LINES: usize = 4_096;
/// … of which a few are ready.
const PACKETS_READY: usize = 4;

/// Lines to come.
pub(super) struct Lines {
    packets: mpsc::Receiver<anyhow::Result<Vec<Bytes>>>,
    packet: std::vec::IntoIter<Bytes>,
}

impl Lines {
    /// Reads `source` to its end on a thread for blocking work. A line longer than `line_bytes_max` is an error, named by its number.
    pub(super) fn read(source: impl Read + Send + 'static, line_bytes_max: usize) -> Self {
        let (sender, packets) = mpsc::channel(PACKETS_READY);
        tokio::task::spawn_blocking(move || {
            let mut reader = LineReader::new(source, line_bytes_max);
            loop {
                let packet = reader.packet();
                let last = !matches!(&packet, Ok(lines) if !lines.is_empty());
                let told = matches!(&packet, Ok(lines) if lines.is_empty())
                    || sender.blocking_send(packet).is_ok();
                // Nobody listens any more, or there is nothing more to say.
                if last || !told {
                    return;
                }
            }
        });
        Self {
            packets,
            packet: Vec::new().into_iter(),
        }
    }

    /// The next line, without its newline. A last line without newline counts; an end after a newline is no line.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Bytes>> {
        loop {
            if let Some(line) = self.packet.next() {
                return Ok(Some(line));
            }
            match self.packets.recv().await {
                Some(packet) => self.packet = packet?.into_iter(),
                None => return Ok(None),
            }
        }
    }
}

/// Splits what it reads into lines.
pub(super) struct LineReader<R> {
    source: BufReader<R>,
    line_bytes_max: usize,
    read: u64,
    /// What is wrong behind the lines given out.
    error: Option<anyhow::Error>,
}

impl<R: Read> LineReader<R> {
    pub(super) fn new(source: R, line_bytes_max: usize) -> Self {
        let source = BufReader::with_capacity(64 << 10, source);
        Self {
            source,
            line_bytes_max,
            read: 0,
            error: None,
        }
    }

    /// The next line, without its newline.
    pub(super) fn line(&mut self) -> anyhow::Result<Option<Bytes>> {
        let mut line = Vec::new();
        let number = self.read + 1;
        let limit = u64::try_from(self.line_bytes_max)
            .unwrap_or(u64::MAX)
            .saturating_add(1);
        let mut limited = (&mut self.source).take(limit);
        limited
            .read_until(b'\n', &mut line)
            .with_context(|| format!("cannot read line {number}"))?;
        if line.is_empty() {
            return Ok(None);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() > self.line_bytes_max {
            anyhow::bail!(
                "line {number} is longer than {} bytes, the most that one record takes; split it",
                self.line_bytes_max
            );
        }
        self.read = number;
        Ok(Some(line.into()))
    }

    /// Some lines; none at the end. What is here is not held back for what has not arrived yet.
    fn packet(&mut self) -> anyhow::Result<Vec<Bytes>> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let mut lines = Vec::new();
        let mut bytes = 0;
        while bytes < PACKET_BYTES && lines.len() < PACKET_LINES {
            match self.line() {
                Ok(Some(line)) => {
                    bytes += line.len() + 1;
                    lines.push(line);
                }
                Ok(None) => break,
                Err(error) if lines.is_empty() => return Err(error),
                Err(error) => {
                    self.error = Some(error);
                    break;
                }
            }
            if !self.source.buffer().contains(&b'\n') {
                break;
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &[u8], max: usize) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut reader = LineReader::new(text, max);
        let mut lines = Vec::new();
        while let Some(line) = reader.line()? {
            lines.push(line.to_vec());
        }
        Ok(lines)
    }

    /// Goal: every byte between newlines arrives, whatever it is. Method: the edges, as a table.
    #[test]
    fn lines_are_bytes() {
        let cases: [(&[u8], &[&[u8]]); 6] = [
            (b"", &[]),
            (b"a", &[b"a"]),
            (b"a\n", &[b"a"]),
            (b"\n\n", &[b"", b""]),
            (b"a\r\n\xff\0b", &[b"a\r", b"\xff\0b"]),
            (b"abcde\nabcde", &[b"abcde", b"abcde"]),
        ];
        for (text, lines) in cases {
            assert_eq!(split(text, 5).unwrap(), lines, "{text:?}");
        }
    }

    /// Goal: a line without end cannot fill the memory; it is named. Method: one byte too many.
    #[test]
    fn a_line_too_long_is_named() {
        let error = split(b"a\nabcdef", 5).unwrap_err().to_string();
        assert!(
            error.starts_with("line 2 is longer than 5 bytes"),
            "{error}"
        );
    }

    /// Goal: lines cross from the reader to the command in order and to the last one. Method: more than one packet.
    #[tokio::test]
    async fn packets_arrive_in_order() {
        let text = (0..20_000)
            .map(|number| number.to_string())
            .collect::<Vec<_>>()
            .join("\n");
        let mut lines = Lines::read(std::io::Cursor::new(text), 100);
        let mut read = 0;
        while let Some(line) = lines.next().await.unwrap() {
            assert_eq!(line, read.to_string());
            read += 1;
        }
        assert_eq!(read, 20_000);
    }
}
