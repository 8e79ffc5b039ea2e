//! What was written against what is read back: lost, repeated, out of order.
//!
//! Owns the counts. Line `i` of the input is record `i / partitions` of partition `i % partitions` and carries its number, so that
//! equal lines are told apart. Pure: the caller reads both sides.

use std::collections::BTreeMap;

/// What a comparison came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    /// Records read.
    pub(super) read_back: u64,
    /// Lines that are not there, or not as they were.
    pub(super) lost: u64,
    /// Records that are there once more, or belong to no line.
    pub(super) duplicated: u64,
    /// Records that are there, but behind one that should follow them.
    pub(super) out_of_order: u64,
}

/// What to do with a record that was held against a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// It is that line: on with the next line and the next record.
    Matched,
    /// It belongs to an earlier line: on with the next record.
    NextRecord,
    /// It belongs to a later line: on with the partition's next line, and the same record.
    NextLine,
}

/// A record as it was read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Read<'a> {
    /// The line's number that it carries, from 0.
    pub(super) line: Option<u64>,
    /// Its value.
    pub(super) value: &'a [u8],
}

/// A comparison under way.
#[derive(Debug, Default)]
pub(super) struct Compare {
    counts: Counts,
    /// Lines passed by without their record, with the CRC of what they should be.
    missing: BTreeMap<u64, u32>,
}

impl Compare {
    /// Holds a record against line `number` of the same partition.
    pub(super) fn hold(&mut self, number: u64, line: &[u8], record: Read<'_>) -> Step {
        match record.line {
            Some(found) if found == number => {
                self.counts.read_back += 1;
                if record.value != line {
                    self.counts.lost += 1;
                }
                Step::Matched
            }
            Some(found) if found > number => {
                self.miss(number, line);
                Step::NextLine
            }
            _ => {
                self.stray(record);
                Step::NextRecord
            }
        }
    }

    /// The partition ended before line `number`.
    pub(super) fn miss(&mut self, number: u64, line: &[u8]) {
        self.missing.insert(number, crc32c::crc32c(line));
    }

    /// A record that is not where it should be: late, repeated, or of no line at all.
    pub(super) fn stray(&mut self, record: Read<'_>) {
        self.counts.read_back += 1;
        let late = record.line.filter(|line| {
            self.missing
                .get(line)
                .is_some_and(|crc| *crc == crc32c::crc32c(record.value))
        });
        match late {
            Some(line) => {
                self.missing.remove(&line);
                self.counts.out_of_order += 1;
            }
            None => self.counts.duplicated += 1,
        }
    }

    /// The result, when both sides are read to their ends.
    pub(super) fn finish(self) -> Counts {
        let missing = u64::try_from(self.missing.len()).unwrap_or(u64::MAX);
        Counts {
            lost: self.counts.lost + missing,
            ..self.counts
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Row = (Option<u64>, &'static str);

    /// Compares one partition whose lines are 0, 1, 2 … as text.
    fn compare(lines: u64, records: &[Row]) -> Counts {
        let mut compare = Compare::default();
        let mut records = records.iter().map(|(line, value)| Read {
            line: *line,
            value: value.as_bytes(),
        });
        let mut record = records.next();
        for number in 0..lines {
            let line = number.to_string();
            loop {
                let Some(read) = record else {
                    compare.miss(number, line.as_bytes());
                    break;
                };
                match compare.hold(number, line.as_bytes(), read) {
                    Step::NextLine => break,
                    Step::NextRecord => record = records.next(),
                    Step::Matched => {
                        record = records.next();
                        break;
                    }
                }
            }
        }
        while let Some(read) = record {
            compare.stray(read);
            record = records.next();
        }
        compare.finish()
    }

    /// Goal: every kind of fault is counted as what it is, and nothing else is. Method: a table.
    #[test]
    fn faults_are_told_apart() {
        let (zero, one, two): (Row, Row, Row) = ((Some(0), "0"), (Some(1), "1"), (Some(2), "2"));
        let cases: [(&[Row], [u64; 4]); 9] = [
            (&[zero, one, two], [3, 0, 0, 0]),
            (&[zero, two], [2, 1, 0, 0]),
            (&[], [0, 3, 0, 0]),
            (&[zero, one, one, two], [4, 0, 1, 0]),
            (&[zero, one, two, zero], [4, 0, 1, 0]),
            (&[zero, two, one], [3, 0, 0, 1]),
            (&[zero, (Some(1), "x"), two], [3, 1, 0, 0]),
            (&[zero, one, two, (None, "?"), (Some(9), "9")], [5, 0, 2, 0]),
            (&[two, (Some(1), "x"), zero], [3, 1, 1, 1]),
        ];
        for (records, [read_back, lost, duplicated, out_of_order]) in cases {
            let expected = Counts {
                read_back,
                lost,
                duplicated,
                out_of_order,
            };
            assert_eq!(compare(3, records), expected, "{records:?}");
        }
    }
}
