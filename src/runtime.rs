//! The one door to tasks, wall-clock time and chance.
//!
//! Owns the set of a broker's tasks and the token that stops them. Monotonic time is `tokio::time`, which a
//! test can pause; wall-clock time is used for record timestamps only, never for a decision about safety.

#[cfg(feature = "sim")]
pub mod sim;

use std::future::Future;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The tasks of one broker or client: they are told to stop together, and can be waited for.
///
/// Cheap to clone; all clones share the set.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Tasks {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// A set with its own stop signal that also stops when this one does.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            tracker: TaskTracker::new(),
            stop: self.stop.child_token(),
        }
    }

    /// Runs `future` until it ends or the set is stopped, whichever comes first.
    pub fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let stop = self.stop.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = future => {}
            }
        })
    }

    /// Runs `future` to its own end: it watches [`Tasks::stopped`] itself and tidies up.
    pub fn spawn_graceful<F>(&self, future: F) -> tokio::task::JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(future)
    }

    /// Runs blocking work on the pool for it.
    pub fn spawn_blocking<F, T>(&self, work: F) -> tokio::task::JoinHandle<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let token = self.tracker.token();
        spawn_blocking(move || {
            let done = work();
            drop(token);
            done
        })
    }

    /// Resolves when the set has been told to stop.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }

    /// Whether the set has been told to stop.
    pub fn is_stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Tells every task to stop, without waiting.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Tells every task to stop and waits until the last one has ended.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// Runs blocking work on the pool for it, as nobody's task. In the simulation, which has one thread, it is done in a task's turn.
#[allow(clippy::disallowed_methods)] // in the simulation: as unowned as work on the pool
pub fn spawn_blocking<F, T>(work: F) -> tokio::task::JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    #[cfg(feature = "sim")]
    return tokio::spawn(async move { work() });
    #[cfg(not(feature = "sim"))]
    tokio::task::spawn_blocking(work)
}

/// Milliseconds since 1970 by the wall clock; for record timestamps only.
#[allow(clippy::disallowed_methods)] // the one place that asks the wall clock
#[cfg(not(feature = "sim"))]
pub fn wall_clock_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

/// Milliseconds since 1970 by the wall clock of the simulation, right or wrong.
#[cfg(feature = "sim")]
pub fn wall_clock_ms() -> i64 {
    sim::wall_clock_ms()
}

/// A random number from the operating system's generator, for identities.
#[cfg(not(feature = "sim"))]
#[allow(clippy::disallowed_methods)] // the one place that draws
pub fn random_u128() -> u128 {
    rand::Rng::random(&mut rand::rng())
}

/// A random number, from the simulation's seed.
#[cfg(feature = "sim")]
pub fn random_u128() -> u128 {
    sim::draw()
}

/// A seed for a generator that is then used locally, as for jitter.
pub fn random_seed() -> u64 {
    u64::try_from(random_u128() & u128::from(u64::MAX)).unwrap_or(0)
}
