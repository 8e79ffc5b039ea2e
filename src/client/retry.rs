//! Whether a failed attempt is made again, when, and what the caller is told in the end.
//!
//! Owns the rules only: plain values in, a verdict out. Neither waits nor sends.

use std::time::Duration;

use tokio::time::Instant;

use crate::api::Request;
use crate::types::{Error, Outcome};

/// What a second attempt would do if the first one had worked after all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// Nothing: it changes nothing.
    Read,
    /// The same again: done twice is as done once.
    Idempotent,
    /// It would be done twice.
    Once,
}

impl Repeat {
    /// The kind of `request`. A produce request is `Once` here: only the producer knows that its batch is stamped.
    pub(crate) fn of(request: &Request) -> Self {
        match request {
            Request::Fetch { .. }
            | Request::FindOffset { .. }
            | Request::Metadata { .. }
            | Request::DescribeTopics { .. }
            | Request::ClusterStatus
            | Request::DescribeLed { .. }
            | Request::BrokerFigures { .. }
            | Request::ConfirmController => Self::Read,
            Request::Trim { .. }
            | Request::ElectLeaders
            | Request::InitProducer
            | Request::AdoptCluster { .. }
            | Request::Reassign { .. }
            | Request::Drain { .. }
            | Request::ReportDamage { .. }
            | Request::MoveLeader { .. } => Self::Idempotent,
            Request::Produce { .. }
            | Request::CreateTopic { .. }
            | Request::DeleteTopic { .. }
            | Request::RegisterBroker { .. }
            | Request::ReportPartitions { .. } => Self::Once,
        }
    }
}

/// How long to wait between attempts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backoff {
    /// After the first failure.
    pub(crate) min: Duration,
    /// At most.
    pub(crate) max: Duration,
    /// For how long "no such topic" may be a broker's old picture and not the truth.
    pub(crate) unknown_topic_grace: Duration,
}

/// What to do after a failed attempt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Try again after this long.
    Again(Duration),
    /// Give up; this is what the caller is told.
    Final(Error),
}

/// The history of one request's attempts.
#[derive(Debug)]
pub(crate) struct Retry {
    repeat: Repeat,
    backoff: Backoff,
    deadline: Instant,
    /// The first attempt whose outcome is unknown: nothing that fails later can take that back.
    unknown: Option<Error>,
    /// The last reason that a broker gave: it tells more than that another broker cannot be reached.
    answered: Option<Error>,
    /// What failed last.
    last: Option<Error>,
    failures: u32,
    hinted: bool,
    topic_unknown_since: Option<Instant>,
}

impl Retry {
    pub(crate) fn new(repeat: Repeat, backoff: Backoff, deadline: Instant) -> Self {
        Self {
            repeat,
            backoff,
            deadline,
            unknown: None,
            answered: None,
            last: None,
            failures: 0,
            hinted: false,
            topic_unknown_since: None,
        }
    }

    /// When the caller wants to know.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Takes note of a failed attempt. `jitter` is 0 to 255, drawn by the caller.
    pub(crate) fn failed(&mut self, error: Error, now: Instant, jitter: u8) -> Verdict {
        let unknown = error.outcome() == Outcome::Unknown;
        #[cfg(feature = "sim")]
        let unknown =
            unknown && !crate::runtime::sim::makes(crate::runtime::sim::Bug::UnknownCalledFailed);
        if unknown && self.repeat == Repeat::Once {
            return Verdict::Final(error);
        }
        let again = self.may_try_again(&error, now);
        let hinted = matches!(
            error,
            Error::NotLeader {
                leader: Some(_),
                ..
            }
        );
        let wait = if hinted && !self.hinted {
            Duration::ZERO
        } else {
            self.wait(jitter)
        };
        self.hinted = hinted && !self.hinted;
        if unknown && self.repeat == Repeat::Idempotent {
            self.unknown.get_or_insert_with(|| error.clone());
        }
        if !unknown && !matches!(error, Error::Unreachable { .. }) {
            self.answered = Some(error.clone());
        }
        self.last = Some(error.clone());
        self.failures = self.failures.saturating_add(1);
        // An attempt that is cut off too early to be answered would turn a definite failure into an unknown one.
        let needed = match self.repeat {
            Repeat::Once => self.backoff.max,
            _ => Duration::ZERO,
        };
        if again && now + wait + needed < self.deadline {
            Verdict::Again(wait)
        } else {
            Verdict::Final(self.give_up(error))
        }
    }

    /// Why another attempt is made: what a broker said last, or else why none could be asked.
    pub(crate) fn reason(&self) -> Option<Error> {
        match &self.last {
            Some(Error::Unreachable { .. }) => self.answered.clone().or_else(|| self.last.clone()),
            last => last.clone(),
        }
    }

    /// What the caller is told when `error` ends the matter.
    pub(crate) fn give_up(&mut self, error: Error) -> Error {
        if let Some(unknown) = self.unknown.take() {
            return unknown;
        }
        match error {
            Error::Unreachable { .. } => self.answered.take().unwrap_or(error),
            other => other,
        }
    }

    fn may_try_again(&mut self, error: &Error, now: Instant) -> bool {
        match error {
            Error::UnknownTopic { .. } | Error::UnknownPartition { .. } => {
                let since = *self.topic_unknown_since.get_or_insert(now);
                now.duration_since(since) < self.backoff.unknown_topic_grace
            }
            // A broker that fails stops; another one takes over.
            Error::Failed { .. } => true,
            other => other.is_retriable(),
        }
    }

    /// Doubles from the minimum to the maximum; half of it is chance, so that clients do not march in step.
    fn wait(&self, jitter: u8) -> Duration {
        let factor = 1_u32 << self.failures.min(16);
        let full = self
            .backoff
            .min
            .saturating_mul(factor)
            .min(self.backoff.max);
        full / 2 + full / 512 * u32::from(jitter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{BrokerId, Endpoint, PartitionId, TopicName, TopicPartition};

    const BACKOFF: Backoff = Backoff {
        min: Duration::from_millis(10),
        max: Duration::from_millis(80),
        unknown_topic_grace: Duration::from_secs(1),
    };

    fn partition() -> TopicPartition {
        TopicPartition {
            topic: TopicName::new("t").unwrap(),
            partition: PartitionId(0),
        }
    }

    fn retry(repeat: Repeat) -> (Retry, Instant) {
        let now = Instant::now();
        (
            Retry::new(repeat, BACKOFF, now + Duration::from_secs(10)),
            now,
        )
    }

    fn lost() -> Error {
        Error::ConnectionLost {
            address: "a".to_owned(),
        }
    }

    fn no_leader() -> Error {
        Error::LeaderUnavailable {
            partition: partition(),
        }
    }

    /// Goal: a request that must not be done twice ends with its definite failure, not with a last attempt that has no time to be
    /// answered. Method: a definite failure shortly before the deadline, and one earlier.
    #[test]
    fn no_attempt_is_begun_that_cannot_be_answered() {
        for (repeat, left_ms, again) in [
            (Repeat::Once, 60, false),
            (Repeat::Once, 200, true),
            (Repeat::Idempotent, 60, true),
        ] {
            let now = Instant::now();
            let mut retry = Retry::new(repeat, BACKOFF, now + Duration::from_millis(left_ms));
            match retry.failed(no_leader(), now, 0) {
                Verdict::Again(_) => assert!(again, "{repeat:?}, {left_ms} ms left"),
                Verdict::Final(error) => assert!(!again && error == no_leader(), "{error}"),
            }
        }
    }

    /// Goal: what may have been done is never done again unless that is harmless. Method: a table of kinds and errors.
    #[test]
    fn only_harmless_requests_are_repeated_after_an_unknown_attempt() {
        let refused = Error::Refused {
            reason: "x".to_owned(),
        };
        for (repeat, error, again) in [
            (Repeat::Once, lost(), false),
            (Repeat::Once, no_leader(), true),
            (Repeat::Idempotent, lost(), true),
            (Repeat::Read, lost(), true),
            (Repeat::Read, refused.clone(), false),
            (Repeat::Idempotent, refused, false),
        ] {
            let (mut retry, now) = retry(repeat);
            let verdict = retry.failed(error.clone(), now, 0);
            assert_eq!(
                matches!(verdict, Verdict::Again(_)),
                again,
                "{repeat:?} {error}"
            );
        }
    }

    /// Goal: an unknown attempt stays unknown, whatever fails afterwards; a read's last error is the true one.
    /// Method: lose an answer, then let the deadline pass with a definite error.
    #[test]
    fn an_unknown_attempt_is_not_forgotten() {
        let (mut idempotent, now) = retry(Repeat::Idempotent);
        assert!(matches!(
            idempotent.failed(lost(), now, 0),
            Verdict::Again(_)
        ));
        let late = now + Duration::from_secs(20);
        assert_eq!(
            idempotent.failed(no_leader(), late, 0),
            Verdict::Final(lost())
        );

        let (mut read, now) = retry(Repeat::Read);
        assert!(matches!(read.failed(lost(), now, 0), Verdict::Again(_)));
        let late = now + Duration::from_secs(20);
        assert_eq!(
            read.failed(no_leader(), late, 0),
            Verdict::Final(no_leader())
        );
    }

    /// Goal: the caller is told why the cluster refuses, not that one of its brokers is down. Method: a refusal by one broker, then
    /// no connection to another until the deadline; and nothing but broken connections.
    #[test]
    fn a_brokers_reason_outlives_a_broken_connection() {
        let unreachable = Error::Unreachable {
            address: "a:1".to_owned(),
            reason: "refused".to_owned(),
        };
        for (first, told) in [
            (Error::ControllerUnavailable, Error::ControllerUnavailable),
            (unreachable.clone(), unreachable.clone()),
        ] {
            let (mut retry, now) = retry(Repeat::Once);
            assert!(matches!(retry.failed(first, now, 0), Verdict::Again(_)));
            let again = retry.failed(unreachable.clone(), now, 0);
            assert!(matches!(again, Verdict::Again(_)));
            assert_eq!(retry.reason(), Some(told.clone()), "to one who waits");
            let late = now + Duration::from_secs(20);
            let verdict = retry.failed(unreachable.clone(), late, 0);
            assert_eq!(verdict, Verdict::Final(told));
        }
    }

    /// Goal: waits grow, stay bounded, and a hint is followed at once but not in circles. Method: fail again and again.
    #[test]
    fn waits_grow_and_hints_are_followed_at_once() {
        let (mut retry, now) = retry(Repeat::Read);
        let mut waits = Vec::new();
        for _ in 0..5 {
            let Verdict::Again(wait) = retry.failed(no_leader(), now, u8::MAX) else {
                panic!()
            };
            waits.push(wait.as_millis());
        }
        assert_eq!(waits, [9, 19, 39, 79, 79]);

        let endpoint = Endpoint {
            broker: BrokerId(2),
            address: "b:1".to_owned(),
        };
        let hint = Error::NotLeader {
            partition: partition(),
            broker: BrokerId(1),
            leader: Some(endpoint),
        };
        assert_eq!(
            retry.failed(hint.clone(), now, 0),
            Verdict::Again(Duration::ZERO)
        );
        let second = retry.failed(hint.clone(), now, 0);
        assert!(
            matches!(second, Verdict::Again(wait) if !wait.is_zero()),
            "{second:?}"
        );
        assert_eq!(retry.failed(hint, now, 0), Verdict::Again(Duration::ZERO));
    }

    /// Goal: a topic just created is found, a wrong name is reported soon. Method: the same error before and after the grace.
    #[test]
    fn an_unknown_topic_is_looked_for_a_moment() {
        let (mut retry, now) = retry(Repeat::Read);
        let unknown = Error::UnknownTopic {
            topic: TopicName::new("t").unwrap(),
        };
        assert!(matches!(
            retry.failed(unknown.clone(), now, 0),
            Verdict::Again(_)
        ));
        let later = now + Duration::from_secs(1);
        assert_eq!(
            retry.failed(unknown.clone(), later, 0),
            Verdict::Final(unknown)
        );
    }
}
