//! Clients that write, read and ask, and record everything they asked and were told.
//!
//! Owns the sessions' tasks and what a record's value looks like on the wire. Judges nothing: that is the checker's business.
//! Runs in a simulation as it is: time and tasks are tokio's, and every choice comes from the seed.
//!
//! The sessions of a workload are numbered from `first_session` on: first the producers, then the plain appenders, the readers, the
//! askers of end offsets, and the fencers, which have two numbers each.
//!
//! ```no_run
//! use std::time::Duration;
//! use logboom::client::Client;
//! use logboom::testkit::checker::{Coverage, check};
//! use logboom::testkit::recorder::Recorder;
//! use logboom::testkit::workload::{Workload, WorkloadConfig, read_final_logs};
//!
//! # async fn run(client: Client) -> Result<(), Box<dyn std::error::Error>> {
//! let recorder = Recorder::real();
//! let workload = Workload::start(&client, &recorder, WorkloadConfig::new("orders", 3))?;
//! let fault = recorder.fault_began("kill", "broker 1");
//! // … hurt the cluster, and heal it
//! recorder.fault_ended(fault);
//! workload.stop().await;
//! let logs = read_final_logs(&client, &recorder, "orders", 3, Duration::from_secs(60)).await?;
//! let mut history = recorder.finish();
//! history.logs = logs;
//! let report = check(&history, &Coverage { operations_min: 1_000, ..Coverage::default() });
//! assert!(report.passed(), "{report}");
//! # Ok(())
//! # }
//! ```

mod fence;
mod read;
mod value;
mod write;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::recorder::{OperationId, Recorder};
use crate::client::Client;
use crate::runtime::Tasks;
use crate::types::Error;

pub use self::read::read_final_logs;
pub use self::value::{VALUE_BYTES_MIN, decode_value, encode_value};

/// What a workload does.
#[derive(Debug, Clone)]
pub struct WorkloadConfig {
    /// The topic; it exists.
    pub topic: String,
    /// Its partitions: 0 to this number are used.
    pub partitions: u32,
    /// The number of the first session; a session's number must be used once in a run.
    pub first_session: u32,
    /// Idempotent producers, a session each, with several batches in flight.
    pub producers: u32,
    /// Clients that append batches one after the other, without repeating what has an unknown outcome.
    pub plain_appenders: u32,
    /// Clients that follow all partitions, and sometimes go back.
    pub readers: u32,
    /// Clients that ask for end offsets, linearizable and plain ones.
    pub end_askers: u32,
    /// Clients that go on under higher and higher producer epochs, while late batches of the epoch before arrive; two sessions each.
    pub fencers: u32,
    /// Bytes of each value; at least [`VALUE_BYTES_MIN`] are used.
    pub record_bytes: usize,
    /// Each session's wait between two calls, on average.
    pub pause: Duration,
    /// Most records that each writing session sends.
    pub records_max: u64,
    /// Records that a producer has unacknowledged at once.
    pub in_flight: usize,
    /// How long an answer is waited for; then the session goes on, and the operation stays unanswered.
    pub answer_within: Duration,
    /// Where every choice comes from.
    pub seed: u64,
}

impl WorkloadConfig {
    /// Two producers, a plain appender, two readers, an asker, a fencer; values of 100 bytes, about one call per session every 2 ms.
    pub fn new(topic: &str, partitions: u32) -> Self {
        Self {
            topic: topic.to_owned(),
            partitions,
            first_session: 0,
            producers: 2,
            plain_appenders: 1,
            readers: 2,
            end_askers: 1,
            fencers: 1,
            record_bytes: 100,
            pause: Duration::from_millis(2),
            records_max: 1_000_000,
            in_flight: 64,
            answer_within: Duration::from_secs(30),
            seed: 0,
        }
    }
}

/// Clients at work. Dropping it stops them at once; what they had asked stays unanswered in the history.
#[derive(Debug)]
pub struct Workload {
    tasks: Tasks,
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

impl Workload {
    /// Starts the clients. An error when the configuration or the name of the topic is wrong; whether the topic exists shows in the
    /// history.
    pub fn start(
        client: &Client,
        recorder: &Recorder,
        config: WorkloadConfig,
    ) -> Result<Self, Error> {
        if config.partitions == 0 || config.in_flight == 0 {
            return Err(Error::InvalidRequest {
                reason: "a workload needs a partition, and room for one record in flight"
                    .to_owned(),
            });
        }
        client.topic(&config.topic)?;
        let tasks = Tasks::new();
        let config = Arc::new(config);
        let mut seeds = StdRng::seed_from_u64(config.seed);
        let mut number = config.first_session;
        let mut session = || {
            let session = Session {
                number,
                client: client.clone(),
                recorder: recorder.clone(),
                config: config.clone(),
                tasks: tasks.clone(),
                rng: StdRng::from_rng(&mut seeds),
            };
            number = number.wrapping_add(1);
            session
        };
        for _ in 0..config.producers {
            tasks.spawn_graceful(write::produce(session())?);
        }
        for _ in 0..config.plain_appenders {
            tasks.spawn_graceful(write::append(session()));
        }
        for _ in 0..config.readers {
            tasks.spawn_graceful(read::follow(session()));
        }
        for _ in 0..config.end_askers {
            tasks.spawn_graceful(read::ask(session()));
        }
        for _ in 0..config.fencers {
            tasks.spawn_graceful(fence::fence(session()));
            // The late batches' number.
            session();
        }
        Ok(Self { tasks })
    }

    /// Asks nothing more, waits for the answers that are out, twice [`WorkloadConfig::answer_within`] at most, and ends. What has no answer
    /// then stays unanswered in the history. Cancel safe: the clients stop either way.
    pub async fn stop(self) {
        self.tasks.shutdown().await;
    }
}

/// What one client works with.
struct Session {
    number: u32,
    client: Client,
    recorder: Recorder,
    config: Arc<WorkloadConfig>,
    tasks: Tasks,
    rng: StdRng,
}

impl Session {
    fn is_over(&self) -> bool {
        self.tasks.is_stopped()
    }

    fn partition(&mut self) -> u32 {
        rand::Rng::random_range(&mut self.rng, 0..self.config.partitions)
    }

    /// True once in about `every` calls.
    fn chance(&mut self, every: u32) -> bool {
        rand::Rng::random_ratio(&mut self.rng, 1, every.max(1))
    }

    /// Half of the pause to one and a half, so that sessions do not march in step.
    fn pause_now(&mut self) -> Duration {
        self.config.pause / 2
            + self
                .config
                .pause
                .mul_f64(rand::Rng::random::<f64>(&mut self.rng))
    }

    /// Waits between two calls, or until the workload is stopped.
    async fn pause(&mut self) {
        let pause = self.pause_now();
        tokio::select! {
            biased;
            () = self.tasks.stopped() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    /// What `asked` answers, if it does in time; an error and a missing answer are recorded for `id`.
    async fn answer<T>(
        &self,
        id: OperationId,
        asked: impl Future<Output = Result<T, Error>>,
    ) -> Option<T> {
        match tokio::time::timeout(self.config.answer_within, asked).await {
            Ok(Ok(answer)) => Some(answer),
            Ok(Err(error)) => {
                self.recorder.failed(id, &error);
                None
            }
            Err(_) => None,
        }
    }
}
