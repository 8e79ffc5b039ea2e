//! Commands that wait for the cluster say for what, and why, on standard error.
//!
//! Owns only what it has said already.

use std::future::Future;
use std::time::Duration;

use logboom::client::Client;
use tokio::time::Instant;

use super::complain;

/// How long a command is silent.
const SILENT: Duration = Duration::from_secs(2);
/// Between two looks at what is waited for.
const LOOK: Duration = Duration::from_millis(500);
/// Between two lines, when the reason changes.
const SAID_EVERY: Duration = Duration::from_secs(5);

/// Awaits a change that was asked for, `what` as in "waiting for what".
pub(super) async fn change<T>(client: &Client, what: &str, work: impl Future<Output = T>) -> T {
    let because = || {
        let reason = reason(client, Duration::ZERO);
        Some(reason.unwrap_or_else(|| ", neither done nor refused so far".to_owned()))
    };
    let gives_up = gives_up(client.config().deadline);
    told(what, &gives_up, because, work).await
}

/// Awaits what is read: a broker that takes its time to answer, as while a new controller is elected, is nothing to tell.
pub(super) async fn reading<T>(client: &Client, what: &str, work: impl Future<Output = T>) -> T {
    progress(client, what, client.config().deadline, work).await
}

/// Awaits the first answer of the brokers at `addresses`.
pub(super) async fn first_answer<T>(
    addresses: &str,
    within: Duration,
    work: impl Future<Output = T>,
) -> T {
    let because = || {
        Some(format!(
            ", because none of {addresses} answers for a cluster yet"
        ))
    };
    told("a broker", &gives_up(within), because, work).await
}

/// Awaits something that may take long of its own: it is waited for only while a request fails again and again.
pub(super) async fn progress<T>(
    client: &Client,
    what: &str,
    within: Duration,
    work: impl Future<Output = T>,
) -> T {
    let because = || reason(client, SILENT);
    told(what, &gives_up(within), because, work).await
}

fn gives_up(within: Duration) -> String {
    format!("gives up after {} s (--timeout)", within.as_secs_f64())
}

/// Why a request has been repeated for at least `time`.
fn reason(client: &Client, time: Duration) -> Option<String> {
    let retrying = client.retrying()?;
    let is_told = retrying.since.elapsed() >= time;
    is_told.then(|| format!(", because {}", retrying.reason))
}

async fn told<T>(
    what: &str,
    gives_up: &str,
    because: impl Fn() -> Option<String>,
    work: impl Future<Output = T>,
) -> T {
    let began = Instant::now();
    let mut said: Option<(String, Instant)> = None;
    let mut work = std::pin::pin!(work);
    loop {
        if let Ok(done) = tokio::time::timeout(LOOK, &mut work).await {
            return done;
        }
        let Some(reason) = because().filter(|_| began.elapsed() >= SILENT) else {
            continue;
        };
        let is_news = said
            .as_ref()
            .is_none_or(|(known, at)| *known != reason && at.elapsed() >= SAID_EVERY);
        if is_news {
            complain(&format!("waiting for {what}{reason}; {gives_up}"));
            said = Some((reason, Instant::now()));
        }
    }
}
