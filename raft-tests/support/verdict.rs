//! What the answers permit and forbid: everything is read back and judged by the testkit's checker.

use std::time::Duration;

use logboom::client::{Ack, Client};
use logboom::testkit::checker::{Coverage, Report, check};
use logboom::testkit::history::{self, AckLevel, Call, Operation, Outcome, ProducerPosition};
use logboom::testkit::recorder::Recorder;
use logboom::testkit::workload::read_final_logs;

use super::workload::{Fate, History, value_of};

/// Longest time for reading everything back.
const READ_WITHIN: Duration = Duration::from_secs(60);

/// Reads every partition back through the client and judges. Call it when the cluster has healed.
pub async fn verify(client: &Client, topic: &str, partitions: u32, history: &History) -> Verdict {
    let recorder = Recorder::real();
    let logs = read_final_logs(client, &recorder, topic, partitions, READ_WITHIN).await;
    let mut whole = recorded(history);
    whole.logs = logs.unwrap_or_else(|error| panic!("{topic} cannot be read back: {error}"));
    // The reading began when the history had ended.
    let times = whole.operations.iter();
    let times = times.map(|one| one.completed_ns.unwrap_or(one.invoked_ns));
    let end = times.max().unwrap_or(0);
    for log in &mut whole.logs {
        log.began_ns += end + 1;
    }
    Verdict(check(&whole, &Coverage::default()))
}

/// The workload's history in the checker's form: an operation for each record.
pub fn recorded(history: &History) -> history::History {
    let first = history.sent.iter().map(|sent| sent.invoked).min();
    let operations = history.sent.iter().map(|sent| {
        let ns = |at: tokio::time::Instant| {
            let since = first.map_or(Duration::ZERO, |first| at - first);
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        };
        let (reason, is_done) = match &sent.fate {
            Fate::Acked(offset) if *offset != Ack::NO_OFFSET => (None, true),
            Fate::Acked(_) => (Some("no acknowledgement was asked for".to_owned()), false),
            Fate::Invoked => (Some("no answer".to_owned()), false),
            Fate::NotDone(error) | Fate::Unknown(error) => (Some(error.to_string()), false),
        };
        let outcome = match (&sent.fate, reason) {
            // The leader's epoch and the copies are not kept by the workload: the same for all, and the fewest.
            (Fate::Acked(offset), _) if is_done => Outcome::Appended {
                base: offset.0,
                epoch: 0,
                copies: 1,
            },
            (Fate::NotDone(_), Some(reason)) => Outcome::Failed { reason },
            (_, reason) => Outcome::Unknown {
                reason: reason.unwrap_or_default(),
            },
        };
        Operation {
            session: sent.writer,
            invoked_ns: ns(sent.invoked),
            completed_ns: sent.completed.map(ns),
            partition: sent.partition,
            call: Call::Append {
                values: vec![value_of(sent.writer, sent.number)],
                producer: Some(ProducerPosition {
                    id: sent.writer.into(),
                    epoch: 0,
                }),
                acks: AckLevel::All,
            },
            outcome,
        }
    });
    history::History {
        operations: operations.collect(),
        ..history::History::default()
    }
}

/// The checker's report of a workload.
#[derive(Debug, Clone)]
pub struct Verdict(pub Report);

impl Verdict {
    /// Ends the test unless every promise was kept, for at least `acked` acknowledged records: a run in which nothing
    /// happened proves nothing.
    pub fn assert_good(&self, acked: usize) {
        assert!(self.0.passed(), "{self}");
        let found = usize::try_from(self.0.figures.acknowledged).unwrap_or(usize::MAX);
        assert!(
            found >= acked,
            "only {found} acknowledged, {acked} wanted: the run proves nothing"
        );
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
