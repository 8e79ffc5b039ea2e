//! What a workload came to: for people, as JSON, and as the verdict over everything that was read back.
//!
//! Owns the words. Figures name themselves (`figures`).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use logboom::types::Acks;
use serde_json::{Map, Value, json};

use super::figures::{Figures, Latencies, Spread};
use super::load::Errors;
use super::machine::Machine;
use super::verify::Verdict;

/// One run of a workload.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) figures: Figures,
    /// Of what was written, when something was.
    pub(super) verdict: Option<Verdict>,
    /// Of operations, or from a kill to the next acknowledgement.
    pub(super) times: Latencies,
    /// Records a second over time.
    pub(super) over_time: Vec<f64>,
    pub(super) errors: Errors,
}

/// A workload with all its runs.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) workload: &'static str,
    /// What was done, in words.
    pub(super) title: String,
    /// What an acknowledgement meant, where there were any.
    pub(super) promise: Option<String>,
    /// How latency was measured, where it was.
    pub(super) latency: Option<String>,
    pub(super) settings: Value,
    pub(super) machine: Machine,
    /// What is not known, and why.
    pub(super) notes: Vec<String>,
    pub(super) runs: Vec<Outcome>,
}

impl Report {
    fn spread(&self) -> Spread {
        let figures: Vec<Figures> = self.runs.iter().map(|run| run.figures.clone()).collect();
        Spread::of(&figures)
    }

    pub(super) fn verdict(&self) -> Verdict {
        let mut sum = Verdict::default();
        for verdict in self.runs.iter().filter_map(|run| run.verdict.as_ref()) {
            sum.add(verdict);
        }
        sum
    }

    /// The figure in the middle.
    pub(super) fn median(&self, name: &str) -> Option<f64> {
        self.spread().median(name)
    }

    /// All times of all runs.
    pub(super) fn times(&self) -> Latencies {
        let mut all = Latencies::default();
        for run in &self.runs {
            all.add(&run.times);
        }
        all
    }

    fn errors(&self) -> Errors {
        let mut sum = Errors::default();
        for run in &self.runs {
            sum.add(&run.errors);
        }
        sum
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "\n{} {}\n{}",
            self.workload,
            self.title,
            self.machine.text()
        );
        let mut line = |line: &str| writeln!(text, "{line}").unwrap_or_default();
        if let Some(promise) = &self.promise {
            line(&format!("an acknowledgement meant: {promise}"));
        }
        if let Some(latency) = &self.latency {
            line(&format!("latency: {latency}"));
        }
        for note in &self.notes {
            line(&format!("note: {note}"));
        }
        let runs = self.runs.len();
        line(&format!("{runs} run{}", if runs == 1 { "" } else { "s" }));
        text.push_str(&self.spread().table());
        for (name, (count, example)) in self.errors().0 {
            writeln!(text, "answered {count} times with {name}, as: {example}").unwrap_or_default();
        }
        let verdict = self.verdict();
        if self.runs.iter().any(|run| run.verdict.is_some()) {
            let said = match verdict.problem() {
                None => format!(
                    "read back {} records: all {} acknowledged ones are there once, whole, at their offset and in order",
                    verdict.read_back, verdict.acknowledged
                ),
                Some(problem) => format!("READ BACK: {problem}"),
            };
            writeln!(text, "{said}").unwrap_or_default();
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let run = |run: &Outcome| {
            let mut figures = run.figures.json();
            if let (Some(object), Some(verdict)) = (figures.as_object_mut(), &run.verdict) {
                object.insert("verdict".to_owned(), json!(verdict));
            }
            figures
        };
        let mut object = Map::new();
        for (name, value) in [
            ("workload", json!(self.workload)),
            ("title", json!(self.title)),
            ("acknowledgement", json!(self.promise)),
            ("latency", json!(self.latency)),
            ("settings", self.settings.clone()),
            ("machine", json!(self.machine)),
            ("notes", json!(self.notes)),
        ] {
            object.insert(name.to_owned(), value);
        }
        object.extend(self.spread().json());
        let runs: Vec<Value> = self.runs.iter().map(run).collect();
        object.insert("runs".to_owned(), json!(runs));
        let errors = self.errors().0.into_iter();
        let errors: BTreeMap<String, u64> =
            errors.map(|(name, (count, _))| (name, count)).collect();
        object.insert("errors".to_owned(), json!(errors));
        object.insert("verdict".to_owned(), json!(self.verdict()));
        Value::Object(object)
    }
}

/// Everything as one JSON object.
pub(super) fn json(reports: &[Report]) -> Value {
    let mut sum = Verdict::default();
    for report in reports {
        sum.add(&report.verdict());
    }
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "passed": sum.problem().is_none(),
        "acknowledged": sum.acknowledged,
        "read_back": sum.read_back,
        "lost": sum.lost,
        "duplicated": sum.duplicated,
        "out_of_order": sum.out_of_order,
        "corrupt": sum.corrupt,
        "foreign": sum.foreign,
        "workloads": reports.iter().map(Report::json).collect::<Vec<_>>(),
    })
}

/// What an acknowledgement means.
pub(super) fn promise(acks: Acks, copies: u32, minimum: u32, brokers: u32) -> String {
    let has_witness = copies.is_multiple_of(2) && brokers > copies;
    let voters = copies + u32::from(has_witness);
    let majority = voters / 2 + 1;
    let witness = if has_witness {
        ", one of them a witness without records"
    } else {
        ""
    };
    let committed = format!(
        "replication factor {copies}: fdatasync has returned on {majority} of {voters} voters{witness}"
    );
    match acks {
        Acks::All => {
            format!(
                "acks=all, {committed}, and on at least {minimum} data replicas (min.insync.replicas)"
            )
        }
        Acks::Leader => format!("acks=leader, {committed}"),
        Acks::None => format!(
            "acks=none, replication factor {copies}: nothing, it was answered before anything was stored"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: an acknowledgement is told as what it is. Method: a table.
    #[test]
    fn promises_are_told() {
        for (acks, copies, brokers, parts) in [
            (Acks::All, 3, 3, ["2 of 3 voters, and", "least 2 data"]),
            (
                Acks::All,
                2,
                3,
                ["2 of 3 voters, one of them a witness", "acks=all"],
            ),
            (Acks::All, 2, 2, ["2 of 2 voters, and", "acks=all"]),
            (Acks::Leader, 1, 3, ["1 of 1 voters", "acks=leader"]),
            (Acks::None, 3, 3, ["nothing", "acks=none"]),
        ] {
            let said = promise(acks, copies, 2, brokers);
            for part in parts {
                assert!(said.contains(part), "{said:?} lacks {part:?}");
            }
        }
    }
}
