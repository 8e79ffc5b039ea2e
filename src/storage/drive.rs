//! What drives the committer and the cataloger: a thread each, or in the simulation a task each.
//!
//! Owns their running and the waiting for their end. Both are the same code either way: on a thread the waits block, so that
//! what the thread runs is never pending; a task awaits, and lets simulated time pass before each thing it does to the disk.

use std::io;

use super::cataloger::Cataloger;
use super::committer::Committer;
use super::disk::Disk;

#[cfg(feature = "sim")]
pub(super) use self::tasks::{Running, Wake, wait, wake};
#[cfg(not(feature = "sim"))]
pub(super) use self::threads::{Running, Wake, wait, wake};

/// Starts both.
pub(super) fn start(committer: Committer, cataloger: Cataloger) -> io::Result<Running> {
    let running = Running::default();
    running.spawn("logboom-commit", committer.run())?;
    running.spawn("logboom-catalog", cataloger.run())?;
    Ok(running)
}

/// Lets the time pass that the disk takes for its next operation; outside of the simulation the operation itself takes it.
#[cfg(not(feature = "sim"))]
#[allow(clippy::unused_async)] // awaited as in the simulation
pub(super) async fn pace(_: &dyn Disk) {}

#[cfg(feature = "sim")]
pub(super) async fn pace(disk: &dyn Disk) {
    let time = disk.pace();
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

#[cfg(not(feature = "sim"))]
mod threads {
    use std::io;
    use std::sync::{Mutex, PoisonError};
    use std::thread::{Builder, JoinHandle};

    use futures_util::FutureExt;

    use crate::storage::lock;

    pub(in crate::storage) type Wake = std::sync::Condvar;

    /// Lets the one who waits look again.
    pub(in crate::storage) fn wake(who: &Wake) {
        who.notify_all();
    }

    /// Waits, blocking, until `look` finds something.
    #[allow(clippy::unused_async)] // awaited as in the simulation
    pub(in crate::storage) async fn wait<S, T>(
        wake: &Wake,
        state: &Mutex<S>,
        mut look: impl FnMut(&mut S) -> Option<T>,
    ) -> T {
        let mut held = lock(state);
        loop {
            if let Some(found) = look(&mut held) {
                return found;
            }
            held = wake.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }

    #[derive(Debug, Default)]
    pub(in crate::storage) struct Running(Mutex<Vec<JoinHandle<()>>>);

    impl Running {
        pub(super) fn spawn(
            &self,
            name: &str,
            work: impl Future<Output = ()> + Send + 'static,
        ) -> io::Result<()> {
            let run = move || {
                let ended = work.now_or_never();
                debug_assert!(ended.is_some(), "the store's threads wait by blocking");
            };
            let thread = Builder::new().name(name.to_owned()).spawn(run)?;
            lock(&self.0).push(thread);
            Ok(())
        }

        /// Waits for the end of both. Blocking.
        pub(in crate::storage) fn join(&self) {
            for thread in std::mem::take(&mut *lock(&self.0)) {
                // A panic has been caught and reported inside.
                thread.join().ok();
            }
        }
    }
}

#[cfg(feature = "sim")]
mod tasks {
    use std::io;
    use std::sync::Mutex;

    use tokio::task::JoinHandle;

    use crate::storage::lock;

    pub(in crate::storage) type Wake = tokio::sync::Notify;

    /// Lets the one who waits look again.
    pub(in crate::storage) fn wake(who: &Wake) {
        who.notify_one();
    }

    /// Waits until `look` finds something.
    pub(in crate::storage) async fn wait<S, T>(
        wake: &Wake,
        state: &Mutex<S>,
        mut look: impl FnMut(&mut S) -> Option<T>,
    ) -> T {
        loop {
            let found = look(&mut lock(state));
            if let Some(found) = found {
                return found;
            }
            wake.notified().await;
        }
    }

    #[derive(Debug, Default)]
    pub(in crate::storage) struct Running(Mutex<Vec<JoinHandle<()>>>);

    impl Running {
        #[allow(clippy::disallowed_methods, clippy::unnecessary_wraps)] // in the place of threads, which can fail to start
        pub(super) fn spawn(
            &self,
            _name: &str,
            work: impl Future<Output = ()> + Send + 'static,
        ) -> io::Result<()> {
            lock(&self.0).push(tokio::spawn(work));
            Ok(())
        }

        /// Waits for the end of both.
        pub(in crate::storage) async fn ended(&self) {
            let tasks = std::mem::take(&mut *lock(&self.0));
            for task in tasks {
                // A panic has been caught and reported inside.
                task.await.ok();
            }
        }

        /// Ends both where they are.
        pub(in crate::storage) fn join(&self) {
            for task in std::mem::take(&mut *lock(&self.0)) {
                task.abort();
            }
        }
    }
}
