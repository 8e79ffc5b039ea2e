//! What a run came to, for people, for scripts and for a browser.
//!
//! Owns the verdict's last word: anomalies of any history and problems of the cluster make one, gaps in coverage make the run worth nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use logboom::testkit::checker::{self, Verdict};
use logboom::testkit::history::History;
use serde::Serialize;

use super::super::output;
use super::super::svg::escaped;
use super::acts::Deed;
use super::figures::{self, Times};
use super::schedule::Kind;

/// Entries of the timeline that are printed; a report in HTML has all.
const PRINTED: usize = 60;
/// Anomalies and problems of a kind that are printed.
const SHOWN: usize = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    Passed,
    Anomaly,
    Invalid,
}

/// How often a fault was injected, and how often something came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Fired {
    pub(super) injected: u64,
    pub(super) effective: u64,
}

/// See the module. Serialized, it is what scripts get.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) outcome: Outcome,
    pub(super) seed: u64,
    pub(super) brokers: u32,
    pub(super) replication_factor: u32,
    pub(super) seconds: u64,
    /// Operations with an answer that says done, with one that says not done, with an unknown outcome.
    pub(super) done: u64,
    pub(super) refused: u64,
    pub(super) unknown: u64,
    /// Records acknowledged with acks=all, and how many of them are missing.
    pub(super) acknowledged: u64,
    pub(super) lost: u64,
    pub(super) leader_changes: u64,
    pub(super) faults: BTreeMap<&'static str, Fired>,
    pub(super) election_timeout_ms: [u64; 2],
    /// Per kind of fault, the longest time without an acknowledgement of the partition that was silent longest.
    pub(super) silences: BTreeMap<String, Times>,
    /// Kills of a leader in a whole cluster: until its partition acknowledged what was asked for afterwards.
    pub(super) failovers: Times,
    pub(super) anomalies: Vec<String>,
    pub(super) problems: Vec<String>,
    pub(super) gaps: Vec<String>,
    #[serde(skip)]
    pub(super) deeds: Vec<Deed>,
}

impl Report {
    pub(super) fn new(deeds: Vec<Deed>) -> Self {
        let mut faults: BTreeMap<&'static str, Fired> = BTreeMap::new();
        for deed in &deeds {
            let fired = faults.entry(deed.kind).or_default();
            fired.injected += 1;
            fired.effective += u64::from(deed.effect);
        }
        Self {
            outcome: Outcome::Invalid,
            seed: 0,
            brokers: 0,
            replication_factor: 0,
            seconds: 0,
            done: 0,
            refused: 0,
            unknown: 0,
            acknowledged: 0,
            lost: 0,
            leader_changes: 0,
            faults,
            election_timeout_ms: [0; 2],
            silences: BTreeMap::new(),
            failovers: Times::of(Vec::new()),
            anomalies: Vec::new(),
            problems: Vec::new(),
            gaps: Vec::new(),
            deeds,
        }
    }

    /// Adds what is known of one topic.
    pub(super) fn add(&mut self, name: &str, history: &History, judged: checker::Report) {
        self.done += judged.figures.ok;
        self.refused += judged.figures.failed;
        self.unknown += judged.figures.unknown;
        let (acknowledged, lost) = figures::acknowledged_and_lost(history);
        self.acknowledged += acknowledged;
        self.lost += lost;
        self.leader_changes += figures::leader_changes(history);
        for anomaly in judged.anomalies {
            let (kind, partition, text) = (anomaly.kind, anomaly.partition, anomaly.text);
            let mut line = format!("{name}/{partition}: {kind}: {text}");
            for witness in anomaly.witness {
                write!(line, "\n    {witness}").ok();
            }
            self.anomalies.push(line);
        }
        if lost > 0 && judged.verdict != Verdict::Anomalies {
            let text = format!("{name}: {lost} acknowledged records are missing by a plain count");
            self.anomalies.push(text);
        }
        let gaps = judged.gaps.into_iter();
        self.gaps.extend(gaps.map(|gap| format!("{name}: {gap}")));
        if judged.verdict == Verdict::Invalid && self.gaps.is_empty() {
            self.gaps.push(format!("{name}: the checker cannot say"));
        }
    }

    /// Says the last word, for a run that was to have these faults.
    pub(super) fn conclude(&mut self, wanted: impl IntoIterator<Item = Kind>) {
        let mut moves_leaders = false;
        for kind in wanted {
            let fired = self.faults.get(kind.name()).copied().unwrap_or_default();
            if fired.effective == 0 {
                let times = fired.injected;
                self.gaps.push(format!(
                    "{kind} was injected {times} times and never had its effect"
                ));
            }
            moves_leaders |= matches!(
                kind,
                Kind::Kill | Kind::Pause | Kind::Powerloss | Kind::Partition | Kind::Transfer
            );
        }
        if moves_leaders && self.replication_factor > 1 && self.leader_changes == 0 {
            self.gaps
                .push("no partition ever got another leader".to_owned());
        }
        self.outcome = if !self.anomalies.is_empty() || !self.problems.is_empty() {
            Outcome::Anomaly
        } else if !self.gaps.is_empty() {
            Outcome::Invalid
        } else {
            Outcome::Passed
        };
    }

    fn verdict(&self) -> &'static str {
        match self.outcome {
            Outcome::Passed => "PASSED: nothing is wrong, and everything asked for has happened",
            Outcome::Anomaly => "ANOMALY: something is wrong",
            Outcome::Invalid => {
                "INVALID: nothing wrong was seen, but too little happened to prove anything"
            }
        }
    }

    fn lines(&self) -> Vec<String> {
        let injected: Vec<String> = (self.faults.iter())
            .map(|(kind, fired)| format!("{kind} {}", fired.effective))
            .collect();
        let [from, to] = self.election_timeout_ms;
        let failovers = &self.failovers;
        vec![
            format!(
                "{} brokers, {} copies, {} s, seed {}",
                self.brokers, self.replication_factor, self.seconds, self.seed
            ),
            format!(
                "operations: {} done, {} refused, {} unknown; leaders changed {} times",
                self.done, self.refused, self.unknown, self.leader_changes
            ),
            format!(
                "records acknowledged with acks=all: {}, of these lost: {}",
                self.acknowledged, self.lost
            ),
            format!("faults that had their effect: {}", injected.join(", ")),
            format!(
                "failovers after the kill of a leader: {}, p50 {} ms, p99 {} ms, max {} ms; election timeout {from} to {to} ms",
                failovers.count, failovers.p50_ms, failovers.p99_ms, failovers.max_ms
            ),
        ]
    }

    fn silence_rows(&self) -> Vec<Vec<String>> {
        let rows = self.silences.iter().map(|(kind, times)| {
            vec![
                kind.clone(),
                times.count.to_string(),
                times.p50_ms.to_string(),
                times.p99_ms.to_string(),
                times.max_ms.to_string(),
            ]
        });
        rows.collect()
    }

    fn timeline_rows(&self) -> Vec<Vec<String>> {
        #[allow(clippy::cast_precision_loss)] // shown with one digit
        let seconds = |ns: u64| format!("{:.1} s", ns as f64 / 1e9);
        let rows = self.deeds.iter().map(|deed| {
            vec![
                seconds(deed.began_ns),
                seconds(deed.ended_ns.saturating_sub(deed.began_ns)),
                deed.kind.to_owned(),
                deed.target.clone(),
                if deed.effect {
                    deed.note.clone()
                } else {
                    format!("no effect: {}", deed.note)
                },
            ]
        });
        rows.collect()
    }

    /// What people read in a terminal.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        let mut rows = self.timeline_rows();
        if rows.len() > PRINTED {
            let left = rows.len() - PRINTED;
            rows.drain(..left);
            writeln!(text, "the last {PRINTED} faults of {}:", PRINTED + left).ok();
        }
        text.push_str(&output::table(TIMELINE, &rows));
        if !self.silences.is_empty() {
            text.push_str("\nlongest time without an acknowledgement, per fault:\n");
            text.push_str(&output::table(SILENCES, &self.silence_rows()));
        }
        text.push('\n');
        for (what, lines) in self.wrong() {
            for line in lines.iter().take(SHOWN) {
                writeln!(text, "{what}: {line}").ok();
            }
            if let Some(more) = lines.len().checked_sub(SHOWN).filter(|more| *more > 0) {
                writeln!(text, "{what}: and {more} more").ok();
            }
        }
        for line in self.lines() {
            writeln!(text, "{line}").ok();
        }
        writeln!(text, "verdict: {}", self.verdict()).ok();
        text
    }

    fn wrong(&self) -> [(&'static str, &Vec<String>); 3] {
        [
            ("anomaly", &self.anomalies),
            ("problem", &self.problems),
            ("gap", &self.gaps),
        ]
    }

    /// A page that needs nothing beside it.
    pub(super) fn html(&self, svg: &str, replay: &str) -> String {
        let table = |heading: &[&str], rows: Vec<Vec<String>>| {
            let cell = |tag: &str, text: &str| format!("<{tag}>{}</{tag}>", escaped(text));
            let head: String = heading.iter().map(|text| cell("th", text)).collect();
            let row = |row: &Vec<String>| {
                let cells: String = row.iter().map(|text| cell("td", text)).collect();
                format!("<tr>{cells}</tr>\n")
            };
            let rows: String = rows.iter().map(row).collect();
            format!("<table><tr>{head}</tr>\n{rows}</table>\n")
        };
        let colour = match self.outcome {
            Outcome::Passed => "#1a7f37",
            Outcome::Anomaly => "#c1121f",
            Outcome::Invalid => "#9a6700",
        };
        let mut body = format!(
            "<h1 style=\"color:{colour}\">{}</h1>\n",
            escaped(self.verdict())
        );
        for line in self.lines() {
            writeln!(body, "<p>{}</p>", escaped(&line)).ok();
        }
        for (what, lines) in self.wrong() {
            for line in lines {
                let line = escaped(line);
                writeln!(body, "<pre>{what}: {line}</pre>").ok();
            }
        }
        body.push_str(svg);
        body.push_str("<h2>Longest time without an acknowledgement, per fault</h2>\n");
        body.push_str(&table(SILENCES, self.silence_rows()));
        body.push_str("<h2>Faults</h2>\n");
        body.push_str(&table(TIMELINE, self.timeline_rows()));
        writeln!(body, "<h2>Replay</h2>\n<pre>{}</pre>", escaped(replay)).ok();
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>logboom chaos</title>\n<style>{STYLE}</style></head><body>\n{body}</body></html>\n"
        )
    }
}

const TIMELINE: &[&str] = &["AT", "FOR", "FAULT", "WHAT", "CAME OF IT"];
const SILENCES: &[&str] = &["FAULT", "TIMES", "P50 MS", "P99 MS", "MAX MS"];
const STYLE: &str = "body{font:14px/1.5 system-ui,sans-serif;max-width:1240px;margin:24px auto;padding:0 16px;color:#1f2328}
h1{font-size:20px}h2{font-size:16px;margin-top:28px}p{margin:2px 0}
table{border-collapse:collapse;margin:8px 0}td,th{border-bottom:1px solid #d0d7de;padding:3px 12px 3px 0;text-align:left;vertical-align:top}
th{font-size:12px;color:#57606a}pre{background:#f6f8fa;padding:8px;white-space:pre-wrap}svg{max-width:100%;height:auto}";

#[cfg(test)]
mod tests {
    use super::*;

    fn deed(kind: &'static str, effect: bool) -> Deed {
        Deed {
            kind,
            target: "broker 1 <leader>".to_owned(),
            began_ns: 1_500_000_000,
            ended_ns: 2_000_000_000,
            effect,
            note: String::new(),
            failover_of: None,
        }
    }

    /// Goal: a run in which a fault never had its effect is worth nothing, and an anomaly outweighs that. Method: one of each.
    #[test]
    fn the_verdict_has_three_values() {
        let mut report = Report::new(vec![deed("slow", true), deed("diskfull", false)]);
        report.conclude([Kind::Slow]);
        assert_eq!(report.outcome, Outcome::Passed);
        report.conclude([Kind::Slow, Kind::Diskfull]);
        assert_eq!(report.outcome, Outcome::Invalid);
        assert!(
            report.text().contains("gap: diskfull was injected 1 times"),
            "{}",
            report.text()
        );
        report.problems.push("broken".to_owned());
        report.conclude([Kind::Slow]);
        assert_eq!(report.outcome, Outcome::Anomaly);
    }

    /// Goal: leaders that never moved prove nothing, where they should. Method: a kill with one copy and with two.
    #[test]
    fn unmoved_leaders_are_a_gap() {
        let mut report = Report::new(vec![deed("kill", true)]);
        report.replication_factor = 1;
        report.conclude([Kind::Kill]);
        assert_eq!(report.outcome, Outcome::Passed);
        report.replication_factor = 2;
        report.conclude([Kind::Kill]);
        assert_eq!(report.outcome, Outcome::Invalid);
    }

    /// Goal: the page shows what was told, as text. Method: a target that would be markup.
    #[test]
    fn the_page_is_escaped() {
        let report = Report::new(vec![deed("kill", true)]);
        let page = report.html("<svg></svg>", "logboom chaos --seed 1");
        assert!(page.contains("broker 1 &lt;leader&gt;"), "{page}");
        assert!(page.contains("<svg></svg>") && page.contains("--seed 1"));
    }
}
