//! Gives back the log space that trimmed records took.
//!
//! Owns no decision: the log start is one of the committed log, and each replica purges for itself up to it. What is purged is
//! bounded by the newest checkpoint in front of the first record still needed.

use std::sync::Arc;

use super::Inner;
use super::index::Lookup;
use crate::types::{EntryId, LogIndex};

/// Entries that a witness keeps before it purges what its newest checkpoint covers.
const WITNESS_ENTRIES: u64 = 4_096;

/// Purges whenever the log start has moved, and once at the beginning: it may have moved just before a crash.
pub(super) async fn run(inner: Arc<Inner>) {
    let mut log_start = inner.log.log_start();
    log_start.mark_changed();
    while log_start.changed().await.is_ok() {
        if let Err(reason) = purge(&inner).await {
            tracing::warn!(partition = %inner.partition, reason, "cannot give back trimmed records");
        }
    }
}

async fn purge(inner: &Arc<Inner>) -> Result<(), String> {
    let (start, next_offset, applied) = {
        let state = inner.log.lock();
        (state.log_start, state.next_offset, state.applied)
    };
    if start.0 == 0 {
        return Ok(());
    }
    let owner = Arc::clone(inner);
    let search = inner.tasks.spawn_blocking(move || {
        let store = owner.group.store();
        let first = if start < next_offset {
            let memory = |offset| owner.log.lock().index.block(offset);
            let found = Lookup {
                memory,
                older: store,
            }
            .batches(start, next_offset, 0)
            .map_err(|error| error.to_string())?;
            found.first().map(|batch| batch.entry.index)
        } else {
            // Nothing is left: everything applied may go.
            applied.map(|entry| entry.index.next())
        };
        // The block that holds the log start stays.
        let kept = store
            .block_at_or_below(start.0)
            .map_err(|error| error.to_string())?;
        if let Some((key, _)) = kept {
            store
                .drop_blocks_below(key)
                .map_err(|error| error.to_string())?;
        }
        Ok::<_, String>(first)
    });
    let first = search.await.map_err(|error| error.to_string())??;
    let Some(upto) = first.and_then(|first| first.0.checked_sub(1)) else {
        return Ok(());
    };
    inner
        .group
        .purge_to(LogIndex(upto))
        .await
        .map_err(|error| error.to_string())
}

/// Purges a witness behind what it has applied: it never leads, so nobody reads its log.
pub(super) async fn run_witness(inner: Arc<Inner>) {
    let mut status = inner.group.status();
    let mut tried = 0;
    loop {
        let (applied, purged) = {
            let status = status.borrow_and_update();
            let index = |entry: Option<EntryId>| entry.map_or(0, |entry| entry.index.0);
            (index(status.applied), index(status.purged))
        };
        if applied >= purged.max(tried) + WITNESS_ENTRIES {
            tried = applied;
            if let Err(error) = inner.group.purge_to(LogIndex(applied)).await {
                let partition = &inner.partition;
                tracing::warn!(%partition, %error, "cannot purge the witness");
            }
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}
