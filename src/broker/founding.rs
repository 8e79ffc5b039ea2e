//! How a cluster comes to be, and how a broker gets into it: the cluster id, the first members of the controller's
//! group, and registration.
//!
//! A cluster is founded once, by the bootstrap broker with the lowest id, and only when it reached *every* bootstrap
//! broker and found each of them without a past. The steps are ordered so that a crash between any two leaves a state
//! from which the same broker goes on: cluster id durable here, then on the others, then the controller's group.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::api::{Call, Request, Response, answer_from_message};
use crate::controller::Command;
use crate::net::{Connection, Identity, NetConfig};
use crate::raft::Group;
use crate::runtime::{Tasks, random_u128};
use crate::storage::Store;
use crate::types::{ClusterId, Endpoint, Error};

use super::{BrokerContext, controller_replica};

/// Between two attempts to found or to register.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Longest one question to another broker may take.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a broker waits for another process with its identity to go away.
const TWIN_PATIENCE: Duration = Duration::from_secs(10);
/// Most voters of the controller's group; further brokers learn.
pub(super) const CONTROLLER_VOTERS_MAX: usize = 5;

/// Founds the controller's group when that is this broker's part, else returns at once. Ends when the group has members.
pub(super) async fn found_if_first(context: &BrokerContext, bootstrap: &[Endpoint], group: &Group) {
    let me = context.id;
    if bootstrap.first().is_none_or(|first| first.broker != me) {
        return;
    }
    let mut said: Option<String> = None;
    loop {
        if !group.status().borrow().voters.is_empty() {
            return;
        }
        match found(context, bootstrap, group).await {
            Ok(Founding::Done) => return,
            Ok(Founding::Elsewhere) => {
                tracing::info!("the bootstrap brokers have a cluster already, joining it");
                return;
            }
            Err(reason) => {
                if said.as_ref() != Some(&reason) {
                    tracing::info!("waiting to found the cluster: {reason}");
                    said = Some(reason);
                }
            }
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

enum Founding {
    Done,
    Elsewhere,
}

async fn found(
    context: &BrokerContext,
    bootstrap: &[Endpoint],
    group: &Group,
) -> Result<Founding, String> {
    let mine = context.store.identity();
    let mut others: Vec<(Endpoint, Connection, Identity)> = Vec::new();
    for endpoint in bootstrap
        .iter()
        .filter(|endpoint| endpoint.broker != context.id)
    {
        let connection = Connection::open(&endpoint.address, &context.net_config, &context.tasks)
            .await
            .map_err(|error| format!("{endpoint}: {error}"))?;
        let identity = connection.identity();
        if identity.broker != endpoint.broker {
            return Err(format!("{} answers at {}", identity.broker, endpoint));
        }
        if identity.cluster.is_some() && identity.cluster != mine.cluster {
            return if mine.cluster.is_none() {
                Ok(Founding::Elsewhere)
            } else {
                Err(format!("{endpoint} belongs to another cluster"))
            };
        }
        others.push((endpoint.clone(), connection, identity));
    }
    let cluster = match mine.cluster {
        Some(cluster) => cluster,
        None => draw_cluster(context)?,
    };
    for (endpoint, connection, _) in &others {
        let answer = ask(connection, Request::AdoptCluster { cluster }).await;
        answer.map_err(|error| format!("{endpoint}: {error}"))?;
    }
    let own = controller_replica(context.id, mine.incarnation);
    let voters: BTreeSet<_> = bootstrap
        .iter()
        .filter_map(|endpoint| {
            let other = others
                .iter()
                .find(|(known, ..)| known.broker == endpoint.broker);
            match other {
                Some((_, _, identity)) => {
                    Some(controller_replica(identity.broker, identity.incarnation))
                }
                None => (endpoint.broker == context.id).then_some(own),
            }
        })
        .take(CONTROLLER_VOTERS_MAX)
        .collect();
    group
        .initialize(voters)
        .await
        .map_err(|error| error.to_string())?;
    tracing::info!(%cluster, "founded the cluster");
    Ok(Founding::Done)
}

fn draw_cluster(context: &BrokerContext) -> Result<ClusterId, String> {
    let cluster = ClusterId(random_u128());
    context
        .store
        .set_cluster(cluster)
        .map_err(|error| error.to_string())?;
    context.net.set_cluster(cluster);
    Ok(cluster)
}

/// Takes the founder's cluster id, unless this directory has a past.
pub(super) fn adopt_cluster(
    store: &Store,
    net: &crate::net::Net,
    controller_group: &Group,
    cluster: ClusterId,
) -> Result<Response, Error> {
    let known = store.identity().cluster;
    let refuse = |reason: String| Err(Error::Refused { reason });
    if !controller_group.status().borrow().voters.is_empty() {
        return refuse("this broker is a member of a controller group already".to_owned());
    }
    if let Some(known) = known
        && known != cluster
    {
        return refuse(format!("this broker belongs to cluster {known}"));
    }
    store.set_cluster(cluster).map_err(|error| Error::Failed {
        reason: error.to_string(),
    })?;
    net.set_cluster(cluster);
    Ok(Response::Adopted)
}

/// Notes the cluster id in the metadata as soon as this broker leads a controller group that has none.
pub(super) async fn note_cluster(context: &BrokerContext) {
    let mut status = context.controller_group.status();
    let metadata = context.controller.metadata();
    loop {
        let serving = status.borrow_and_update().is_serving();
        if metadata.borrow().cluster().is_some() {
            return;
        }
        if serving && let Some(cluster) = context.store.identity().cluster {
            match context
                .controller
                .submit(Command::InitCluster { cluster })
                .await
            {
                Ok(_) => return,
                Err(error) => tracing::debug!(%error, "cluster id not noted yet"),
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        } else if status.changed().await.is_err() {
            return;
        }
    }
}

/// Introduces this broker to the controller until it is admitted; an error is final.
pub(super) async fn register(context: &BrokerContext, bootstrap: &[Endpoint]) -> Result<(), Error> {
    let identity = context.store.identity();
    let request = Request::RegisterBroker {
        endpoint: context.endpoint.clone(),
        incarnation: identity.incarnation,
        rack: context.config.rack.clone(),
        boot: identity.boot,
        position: identity.position,
        cluster: identity.cluster,
    };
    let began = tokio::time::Instant::now();
    let mut said = String::new();
    loop {
        let answer = match context
            .ask_controller(request.clone(), QUESTION_TIMEOUT)
            .await
        {
            Ok(response) => Ok(response),
            Err(Error::Refused { reason }) => Err(Error::Refused { reason }),
            Err(_) => ask_around(context, bootstrap, &request).await,
        };
        match answer {
            Ok(Response::Registered { cluster, .. }) => {
                let noted = context.store.set_cluster(cluster);
                noted.map_err(|error| Error::Refused {
                    reason: error.to_string(),
                })?;
                context.net.set_cluster(cluster);
                return Ok(());
            }
            Ok(_) => {
                return Err(Error::Failed {
                    reason: "not an answer to a registration".into(),
                });
            }
            Err(error @ Error::Refused { .. }) => return Err(error),
            Err(error @ Error::BrokerRunning { .. }) if began.elapsed() > TWIN_PATIENCE => {
                return Err(error);
            }
            Err(error) => {
                let text = error.to_string();
                if text != said {
                    tracing::info!("waiting to register with the controller: {text}");
                    said = text;
                }
            }
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// Asks the bootstrap brokers in turn: before a broker is admitted its peers do not talk to it, but answer it as a client.
async fn ask_around(
    context: &BrokerContext,
    bootstrap: &[Endpoint],
    request: &Request,
) -> Result<Response, Error> {
    let mut last = Error::ControllerUnavailable;
    for endpoint in bootstrap
        .iter()
        .filter(|endpoint| endpoint.broker != context.id)
    {
        match open_and_ask(
            endpoint,
            &context.net_config,
            &context.tasks,
            request.clone(),
        )
        .await
        {
            Ok(response) => return Ok(response),
            Err(error @ (Error::Refused { .. } | Error::BrokerRunning { .. })) => {
                return Err(error);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn open_and_ask(
    endpoint: &Endpoint,
    config: &NetConfig,
    tasks: &Tasks,
    request: Request,
) -> Result<Response, Error> {
    let connection = Connection::open(&endpoint.address, config, tasks).await?;
    ask(&connection, request).await
}

async fn ask(connection: &Connection, request: Request) -> Result<Response, Error> {
    let timeout_ms = u32::try_from(QUESTION_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    let call = Call {
        timeout_ms,
        forward: true,
        request,
    };
    let answer = connection
        .call(call.into_message(), QUESTION_TIMEOUT)?
        .await?;
    answer_from_message(answer).map_err(|error| Error::Failed {
        reason: error.to_string(),
    })?
}
