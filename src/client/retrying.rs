//! Which requests are being repeated now, and why: for whoever waits and wants to know.
//!
//! Owns only that; a request that is dropped while it is repeated is forgotten with it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::types::Error;

/// A request failed, and is made again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retrying {
    /// Why: what a broker said last, or else why none could be asked.
    pub reason: Error,
    /// When it failed for the first time.
    pub since: Instant,
}

/// The requests of one client that are being repeated, in the order in which they began to fail.
#[derive(Debug, Default)]
pub(super) struct Retries(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: u64,
    known: BTreeMap<u64, Retrying>,
}

impl Retries {
    /// The one that has failed for the longest time.
    pub(super) fn oldest(&self) -> Option<Retrying> {
        self.lock().known.values().next().cloned()
    }

    /// A place for a request that may fail.
    pub(super) fn place(&self) -> Place<'_> {
        Place {
            retries: self,
            number: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shows one request once it has failed, for as long as this lives.
#[derive(Debug)]
pub(super) struct Place<'a> {
    retries: &'a Retries,
    number: Option<u64>,
}

impl Place<'_> {
    /// It failed for this reason, if there is one to tell, and is made again.
    pub(super) fn failed(&mut self, reason: Option<Error>) {
        let Some(reason) = reason else { return };
        let mut state = self.retries.lock();
        let number = *self.number.get_or_insert_with(|| {
            state.last += 1;
            state.last
        });
        let since = state.known.get(&number).map(|known| known.since);
        let since = since.unwrap_or_else(Instant::now);
        state.known.insert(number, Retrying { reason, since });
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.retries.lock().known.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: who waits is told of the request that has failed for the longest time, with its last reason, and of none that has ended.
    /// Method: two requests that begin to fail one after the other, and end.
    #[test]
    fn the_oldest_is_told() {
        let lost = |address: &str| {
            let address = address.to_owned();
            Some(Error::ConnectionLost { address })
        };
        let reason = |retries: &Retries| retries.oldest().map(|oldest| oldest.reason);
        let retries = Retries::default();
        let (mut second, mut first) = (retries.place(), retries.place());
        assert_eq!(reason(&retries), None);
        first.failed(lost("a"));
        let since = retries.oldest().map(|oldest| oldest.since);
        second.failed(lost("b"));
        first.failed(lost("c"));
        assert_eq!(reason(&retries), lost("c"));
        assert_eq!(retries.oldest().map(|oldest| oldest.since), since);
        drop(first);
        assert_eq!(reason(&retries), lost("b"));
        drop(second);
        assert_eq!(reason(&retries), None);
    }
}
