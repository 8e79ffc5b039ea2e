//! `logboom check`: judges the kept history of a run.
//!
//! Owns the reading of the file and the exit codes 3 and 4; the judgement is the testkit's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use logboom::testkit::checker::{Coverage, Verdict, check};
use logboom::testkit::history::History;

use super::{Usage, output};

/// Something is wrong.
const ANOMALIES: u8 = 3;
/// The run proves nothing.
const INVALID: u8 = 4;

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The history: one JSON object a line, as a fault run keeps it
    file: PathBuf,
    /// Fewer operations that were done than this prove nothing
    #[arg(long, value_name = "N", default_value_t = 1)]
    operations: u64,
    /// Fewer operations with an unknown outcome than this prove nothing
    #[arg(long, value_name = "N", default_value_t = 0)]
    unknown: u64,
    /// Fewer changes of a leader than this prove nothing
    #[arg(long, value_name = "N", default_value_t = 0)]
    leader_changes: u64,
    /// Fewer faults of a kind than this prove nothing, as `kill=10`; may be given for several kinds
    #[arg(long, value_name = "KIND=N")]
    fault: Vec<String>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let coverage = Coverage {
        operations_min: args.operations,
        unknown_min: args.unknown,
        leader_changes_min: args.leader_changes,
        faults: args
            .fault
            .iter()
            .map(|text| fault(text))
            .collect::<Result<BTreeMap<_, _>, _>>()?,
    };
    let name = args.file.display();
    let file = File::open(&args.file).with_context(|| format!("cannot read {name}"))?;
    let history =
        History::read(BufReader::new(file)).with_context(|| format!("cannot read {name}"))?;
    let report = check(&history, &coverage);
    if args.json {
        output::json(&report)?;
    } else {
        output::text(&report.to_string())?;
    }
    Ok(match report.verdict {
        Verdict::Passed => ExitCode::SUCCESS,
        Verdict::Anomalies => ExitCode::from(ANOMALIES),
        Verdict::Invalid => ExitCode::from(INVALID),
    })
}

fn fault(text: &str) -> Result<(String, u64), Usage> {
    let parsed = text.split_once('=').and_then(|(kind, count)| {
        let count = count.parse().ok()?;
        (!kind.is_empty()).then(|| (kind.to_owned(), count))
    });
    parsed.ok_or_else(|| {
        Usage(format!(
            "--fault {text:?} is not a kind and a number, as kill=10"
        ))
    })
}
