//! What all groups of a broker share: the network, the settings of their openraft instances, the heartbeats.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use openraft::{Config, SnapshotPolicy, StepDownPolicy};

use super::RaftConfig;
use super::heartbeat::Heartbeats;
use crate::net::Net;
use crate::runtime::Tasks;

/// Messages that may wait for one group's core.
const API_QUEUE: u64 = 1_024;

/// What all groups of a broker share.
pub(crate) struct Context {
    pub(crate) net: Net,
    pub(crate) config: RaftConfig,
    pub(crate) tasks: Tasks,
    pub(crate) heartbeats: Heartbeats,
    /// For a data replica.
    pub(crate) data: Arc<Config>,
    /// For a witness, which never asks for votes.
    pub(crate) witness: Arc<Config>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Context {
    pub(crate) fn new(net: Net, config: RaftConfig, tasks: Tasks) -> Self {
        let heartbeats = Heartbeats::new(net.clone(), tasks.clone(), &config);
        let data = Arc::new(openraft_config(&config, true));
        let witness = Arc::new(openraft_config(&config, false));
        Self {
            net,
            config,
            tasks,
            heartbeats,
            data,
            witness,
        }
    }
}

/// The settings of an openraft instance.
///
/// # Panics
/// When the timing contradicts itself: the shortest election timeout must be longer than a heartbeat and shorter than the longest.
fn openraft_config(config: &RaftConfig, elects: bool) -> Config {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let settings = Config {
        cluster_name: "logboom".to_owned(),
        heartbeat_interval: ms(config.heartbeat_interval),
        election_timeout_min: ms(config.election_timeout_min),
        election_timeout_max: ms(config.election_timeout_max),
        enable_elect: elects,
        enable_pre_vote: Some(true),
        // A restarted leader asks for votes like any other replica.
        enable_leader_restore: Some(false),
        allow_log_reversion: Some(false),
        // The log is purged to a checkpoint when its owner says so, and to nothing else.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: 0,
        purge_batch_size: 1,
        // Stepping down by itself could hand leadership to a witness.
        removed_leader_step_down: StepDownPolicy::Never,
        broadcast_submitted_on_append: Some(true),
        // Memory per group: statistics nobody reads, and queues larger than what may be in flight.
        log_stage_capacity: Some(1),
        api_channel_size: Some(API_QUEUE),
        ..Config::default()
    };
    match settings.validate() {
        Ok(settings) => settings,
        #[allow(clippy::panic)] // the broker's configuration has been validated: a broken invariant
        Err(error) => panic!("raft timing {config:?} is impossible: {error}"),
    }
}
