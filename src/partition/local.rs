//! One replica as it stands, leader or not: for tests that compare replicas and watch over them.
//!
//! Owns nothing, and asks nobody: what is seen here is what this broker knows.

use std::sync::Arc;

use bytes::Bytes;

use super::{Inner, Partition, Standing, read};
use crate::types::{Error, LeaderEpoch, Offset, ReplicaId, TopicPartition};

/// What one replica knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalReplica {
    /// The partition.
    pub partition: TopicPartition,
    /// The replica.
    pub replica: ReplicaId,
    /// The newest epoch it has seen.
    pub epoch: LeaderEpoch,
    /// Whether it serves as the leader of that epoch.
    pub serves: bool,
    /// Up to where it lets records be read, while it serves.
    pub high_watermark: Option<Offset>,
    /// Its first offset.
    pub log_start: Offset,
    /// The offset behind the last record it knows to be committed.
    pub committed: Offset,
}

impl Partition {
    /// What this replica knows now.
    pub fn local(&self) -> LocalReplica {
        let inner = &self.0;
        let gate = inner.gate.borrow().clone();
        let serves = gate.standing == Standing::Serves;
        let log = inner.log.lock();
        LocalReplica {
            partition: inner.partition.clone(),
            replica: inner.me,
            epoch: gate.epoch,
            serves,
            high_watermark: serves.then_some(gate.high_watermark),
            log_start: log.log_start,
            committed: log.next_offset,
        }
    }

    /// Committed batches from `offset` on as this replica has them, at most `max_bytes` but at least one when there is one.
    pub async fn read_local(&self, offset: Offset, max_bytes: usize) -> Result<Bytes, Error> {
        let inner: &Arc<Inner> = &self.0;
        let committed = inner.log.lock().next_offset;
        let found = read::find_batches(inner, offset, committed, max_bytes).await?;
        read::read_batches(inner, offset, &found).await
    }
}
