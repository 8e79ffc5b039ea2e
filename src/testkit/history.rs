//! What happened in a run: operations with their outcomes, faults, leaders seen, and what the log held in the end.
//!
//! Owns the format, which is also that of the files a fault run keeps: one JSON object a line, see [`History::write`].
//! Judges nothing: that is the checker's business.
//!
//! Every record written in a run has a value of its own, a number: so a value found in the log names the append it came from.
//! Times are nanoseconds since the run began, by one monotonic clock for all sessions.

use std::io::{self, BufRead, Read, Write};

use serde::{Deserialize, Serialize};

/// Everything that is known of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// What clients asked and what came of it, in any order; those that one session asked at the same time in the order of asking.
    pub operations: Vec<Operation>,
    /// What was broken, and when.
    pub faults: Vec<FaultEvent>,
    /// Who was seen to lead, in any order.
    pub leaders: Vec<LeaderSeen>,
    /// What a reader found at the end, after everything was healed, for each partition; earlier whole readings may be there too.
    pub logs: Vec<FinalLog>,
    /// What single replicas held at the end: of a partition, all its data replicas or none.
    pub dumps: Vec<ReplicaDump>,
}

/// One call of a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// The client's thread of work: what it is promised in order is promised within a session.
    pub session: u32,
    /// When it was asked.
    pub invoked_ns: u64,
    /// When the answer was there; `None` when it never came.
    pub completed_ns: Option<u64>,
    /// Which partition, by a number of the run's own.
    pub partition: u32,
    /// What was asked.
    pub call: Call,
    /// What came of it.
    pub outcome: Outcome,
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// Append a batch: all of it or nothing, contiguous.
    Append {
        /// The values, one a record, in order; never empty.
        values: Vec<u64>,
        /// The idempotent producer; `None`: a plain append, which is sent once.
        producer: Option<ProducerPosition>,
        /// Which acknowledgement was asked for.
        acks: AckLevel,
    },
    /// Read records from an offset on.
    Fetch {
        /// The first offset wanted. Where the session's previous fetch of the partition ended, or somewhere else: a seek.
        from: u64,
    },
    /// The end offset, at or above everything acknowledged before the question.
    LinearizableEnd,
    /// The end offset as far as the leader knows.
    End,
}

/// Where a batch stands among those of its producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerPosition {
    /// The producer.
    pub id: u64,
    /// Its epoch; a higher one fences the lower ones.
    pub epoch: u16,
}

/// Which acknowledgement was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AckLevel {
    /// Committed, and on the minimum of in-sync replicas.
    All,
    /// Committed.
    Leader,
    /// None: the answer promises nothing.
    None,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Appended, from this offset on.
    Appended {
        /// Offset of the first record.
        base: u64,
        /// Epoch of the leader that appended it.
        epoch: u64,
        /// Data replicas whose durable storage is known to hold it.
        copies: u32,
    },
    /// What was read.
    Fetched {
        /// First offset that could be read.
        log_start: u64,
        /// Offset behind the last record that could be read.
        high_watermark: u64,
        /// Epoch of the leader that answered; `None` when the answer does not say.
        #[serde(default)]
        epoch: Option<u64>,
        /// Offset and value of each record; [`STRANGE_VALUE`] for a value no run wrote.
        records: Vec<(u64, u64)>,
    },
    /// The end offset.
    End {
        /// It.
        end: u64,
        /// Epoch of the leader that answered; `None` when the answer does not say.
        #[serde(default)]
        epoch: Option<u64>,
    },
    /// It had no effect and never will.
    Failed {
        /// The error.
        reason: String,
    },
    /// It may have had its effect, or may yet have it.
    Unknown {
        /// The error.
        reason: String,
    },
}

/// Stands for a value that is damaged or that nobody wrote.
pub const STRANGE_VALUE: u64 = u64::MAX;

/// Something was broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultEvent {
    /// What kind: `kill`, `pause`, `partition`, … The checker knows those after which a copy may be gone or elsewhere, see
    /// [`COPY_LOSING_FAULTS`](super::checker::COPY_LOSING_FAULTS); the others are only counted.
    pub kind: String,
    /// What was hit, for a person.
    pub target: String,
    /// When it began.
    pub began_ns: u64,
    /// When it was healed; `None` when it healed by itself or never.
    pub ended_ns: Option<u64>,
}

/// Somebody was seen to lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderSeen {
    /// When.
    pub at_ns: u64,
    /// Of which partition.
    pub partition: u32,
    /// In which epoch.
    pub epoch: u64,
    /// Which broker.
    pub broker: u32,
}

/// What the log of a partition held at the end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalLog {
    /// Which partition.
    pub partition: u32,
    /// When the reading began.
    pub began_ns: u64,
    /// First offset that could be read.
    pub log_start: u64,
    /// Offset behind the last record, by a linearizable question.
    pub end: u64,
    /// Offset and value of every record, as read; [`STRANGE_VALUE`] for a value no run wrote.
    pub records: Vec<(u64, u64)>,
}

/// What one replica held at the end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaDump {
    /// Which partition.
    pub partition: u32,
    /// The broker of the replica.
    pub broker: u32,
    /// Its first offset.
    pub log_start: u64,
    /// Offset up to which it knew its records to be committed.
    pub high_watermark: u64,
    /// Offset and value of every record below the high watermark.
    pub records: Vec<(u64, u64)>,
}

/// One line of a history's file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Operation(Operation),
    Fault(FaultEvent),
    Leader(LeaderSeen),
    Log(FinalLog),
    Dump(ReplicaDump),
}

impl History {
    /// Writes it as JSON, one object a line.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let operations = self.operations.iter().cloned().map(Line::Operation);
        let faults = self.faults.iter().cloned().map(Line::Fault);
        let leaders = self.leaders.iter().copied().map(Line::Leader);
        let logs = self.logs.iter().cloned().map(Line::Log);
        let dumps = self.dumps.iter().cloned().map(Line::Dump);
        let lines = operations.chain(faults).chain(leaders);
        for line in lines.chain(logs).chain(dumps) {
            serde_json::to_writer(&mut *to, &line)?;
            to.write_all(b"\n")?;
        }
        Ok(())
    }

    /// Longest line of a history's file, in bytes: a whole reading of some ten million records.
    pub const LINE_BYTES_MAX: u64 = 256 << 20;
    /// Largest file, in bytes.
    pub const FILE_BYTES_MAX: u64 = 8 << 30;

    /// Reads what [`History::write`] wrote; an error names the line. Empty lines are passed over. A line or a file above the bounds is
    /// refused before it is taken into memory.
    pub fn read(from: impl BufRead) -> io::Result<Self> {
        Self::read_within(from, Self::LINE_BYTES_MAX, Self::FILE_BYTES_MAX)
    }

    fn read_within(mut from: impl BufRead, line_max: u64, file_max: u64) -> io::Result<Self> {
        let mut history = Self::default();
        let (mut line, mut bytes) = (Vec::new(), 0_u64);
        for number in 1_u64.. {
            let wrong = |what: String| {
                let what = format!("line {number} of the history: {what}");
                io::Error::new(io::ErrorKind::InvalidData, what)
            };
            line.clear();
            // One byte more than allowed tells a line that is too long from one that just fits.
            let mut limited = from.by_ref().take(line_max + 1);
            let read = limited.read_until(b'\n', &mut line)?;
            let read = u64::try_from(read).unwrap_or(u64::MAX);
            if read == 0 {
                break;
            }
            if read > line_max {
                return Err(wrong(format!("it has more than {line_max} bytes")));
            }
            bytes = bytes.saturating_add(read);
            if bytes > file_max {
                return Err(wrong(format!("the file has more than {file_max} bytes")));
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let parsed = serde_json::from_slice(&line).map_err(|error| wrong(error.to_string()))?;
            match parsed {
                Line::Operation(one) => history.operations.push(one),
                Line::Fault(one) => history.faults.push(one),
                Line::Leader(one) => history.leaders.push(one),
                Line::Log(one) => history.logs.push(one),
                Line::Dump(one) => history.dumps.push(one),
            }
        }
        Ok(history)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a kept history can be read again, and a bad line is named. Method: one of everything, written and read; then a
    /// line that is none.
    #[test]
    fn what_was_written_can_be_read_again() {
        let history = History {
            operations: vec![Operation {
                session: 1,
                invoked_ns: 2,
                completed_ns: Some(3),
                partition: 4,
                call: Call::Append {
                    values: vec![5, 6],
                    producer: Some(ProducerPosition { id: 7, epoch: 8 }),
                    acks: AckLevel::All,
                },
                outcome: Outcome::Appended {
                    base: 9,
                    epoch: 10,
                    copies: 2,
                },
            }],
            faults: vec![FaultEvent {
                kind: "kill".to_owned(),
                target: "broker 1".to_owned(),
                began_ns: 11,
                ended_ns: None,
            }],
            leaders: vec![LeaderSeen {
                at_ns: 12,
                partition: 4,
                epoch: 10,
                broker: 1,
            }],
            logs: vec![FinalLog {
                partition: 4,
                records: vec![(9, 5), (10, STRANGE_VALUE)],
                ..FinalLog::default()
            }],
            dumps: vec![ReplicaDump::default()],
        };
        let mut bytes = Vec::new();
        history.write(&mut bytes).unwrap();
        assert_eq!(History::read(&bytes[..]).unwrap(), history);
        bytes.extend_from_slice(b"\n{\"operation\":{}}\n");
        let error = History::read(&bytes[..]).unwrap_err().to_string();
        assert!(error.starts_with("line 7 of the history"), "{error}");
    }

    /// Goal: neither a line nor a file takes more memory than it may, and what is no text is an error with its line. Method: bounds of
    /// a few bytes, just fitting and one too small; bytes that are no UTF-8.
    #[test]
    fn what_is_too_large_or_no_text_is_refused() {
        let history = History {
            leaders: vec![
                LeaderSeen {
                    at_ns: 1,
                    partition: 2,
                    epoch: 3,
                    broker: 4
                };
                2
            ],
            ..History::default()
        };
        let mut bytes = Vec::new();
        history.write(&mut bytes).unwrap();
        let (file, line) = (bytes.len() as u64, bytes.len() as u64 / 2);
        let read = |line, file| History::read_within(&bytes[..], line, file);
        assert_eq!(read(line, file).unwrap(), history);
        let long = read(line - 1, file).unwrap_err().to_string();
        assert!(
            long.starts_with("line 1 ") && long.contains("more than"),
            "{long}"
        );
        let large = read(line, file - 1).unwrap_err().to_string();
        assert!(
            large.starts_with("line 2 ") && large.contains("file"),
            "{large}"
        );
        let error = History::read(&b"\n\xff\xfe\n"[..]).unwrap_err().to_string();
        assert!(error.starts_with("line 2 "), "{error}");
        // The last line may lack its end.
        let whole = History::read(&bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(whole, history);
        assert!(History::read(&bytes[..bytes.len() - 2]).is_err());
    }
}
