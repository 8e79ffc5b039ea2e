//! Whether this broker's metadata is current: asked of the controller's leader, who asks a majority.
//!
//! Owns nothing. A copy of the metadata does not show that it has become old; without this, a broker that is cut off describes the cluster
//! of before, and looks healthy.

use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use crate::api::{Request, Response, Stale};
use crate::broker::BrokerContext;
use crate::types::BrokerId;

/// Longest the leader may take to hear a majority.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// How long another leader is waited for, in longest election timeouts: while one takes over nothing is wrong.
const LED_WITHIN_TIMEOUTS: u32 = 2;

/// How long ago, in ms, this broker was known to lead the controller; 0 when a majority confirms just now that it does. `None`: not since it was
/// started.
pub(super) async fn confirm(context: &BrokerContext) -> Option<u64> {
    if context.controller.linearize(HEARD_WITHIN).await.is_ok() {
        return Some(0);
    }
    age_ms(context)
}

/// Asks whether this broker's metadata is current. When the controller is being taken over, that is waited for.
pub(super) async fn staleness(context: &BrokerContext) -> Option<Stale> {
    let election_timeout = Duration::from_millis(context.config.election_timeout_max_ms);
    let deadline = Instant::now() + LED_WITHIN_TIMEOUTS * election_timeout;
    let mut led = context.controller.leader_broker();
    let mut age_ms = age_of(context, led).await;
    if age_ms != Some(0) {
        let elsewhere = context.controller.led_elsewhere(led);
        timeout_at(deadline, elsewhere).await.ok(); // it is asked again either way
        led = context.controller.leader_broker();
        age_ms = age_of(context, led).await;
    }
    (age_ms != Some(0)).then_some(Stale {
        broker: context.id,
        age_ms,
    })
}

/// The age of this broker's metadata when `leader` is asked.
async fn age_of(context: &BrokerContext, leader: Option<BrokerId>) -> Option<u64> {
    match leader {
        Some(leader) if leader == context.id => return confirm(context).await,
        Some(leader) => {
            let asked = context.ask_peer(leader, Request::ConfirmController, 2 * HEARD_WITHIN);
            // What it knows of itself is later, and more to the point, than what was heard of it here.
            if let Ok(Ok(Response::Confirmed { age_ms })) = timeout(2 * HEARD_WITHIN, asked).await {
                return age_ms;
            }
        }
        None => {}
    }
    age_ms(context)
}

/// As this broker knows without asking anybody; at least 1, since 0 says that it was asked.
fn age_ms(context: &BrokerContext) -> Option<u64> {
    let age = context.controller.led_at()?.elapsed();
    Some(u64::try_from(age.as_millis()).unwrap_or(u64::MAX).max(1))
}
