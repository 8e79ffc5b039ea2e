//! Configuration: every number with its unit, its default, its bounds, and an error that says what to write instead.
//!
//! Owns the broker's and the topic's keys. Reads no file and no environment itself: `main` merges those and hands the values in.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::{BrokerId, Endpoint, Error};

/// Longest time that makes sense for anything here.
const HOUR_MS: u64 = 3_600_000;
/// Least that a frame must be able to hold: the largest Raft entry (16 MiB of the largest batch, one of others that share
/// the entry), and 3 MiB beside it.
const FRAME_BYTES_LEAST: usize = 20 << 20;

/// Longest address and longest rack name, in bytes.
pub(crate) const TEXT_BYTES_MAX: usize = 512;

/// One broker's configuration, as the TOML file has it: unknown keys are an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BrokerConfig {
    /// The broker's number, 0 to 2³¹ − 1, its own in the cluster.
    pub broker_id: u32,
    /// `host:port` to listen on.
    pub listen: String,
    /// `host:port` that others use to reach this broker; the listening address when empty, which must then name one host.
    pub advertise: String,
    /// The data directory.
    pub data_dir: PathBuf,
    /// The brokers that form the cluster when it is new, and where to find it later: `id@host:port`, up to five of them vote
    /// in the controller's group. The same list on every broker. Empty: a cluster of this broker alone.
    pub bootstrap: Vec<String>,
    /// The rack this broker stands in; replicas are spread over racks.
    pub rack: Option<String>,
    /// Between two heartbeats of a leader, in ms.
    pub heartbeat_interval_ms: u64,
    /// Shortest election timeout, in ms.
    pub election_timeout_min_ms: u64,
    /// Longest election timeout, in ms; the same on every broker.
    pub election_timeout_max_ms: u64,
    /// A follower that has not been level with its leader for this long leaves the ISR, in ms.
    pub replica_lag_time_max_ms: u64,
    /// How long a preferred leader must have been caught up before it gets its leadership back, in ms.
    pub preferred_leader_delay_ms: u64,
    /// Longest time a request may take, in ms.
    pub request_timeout_max_ms: u64,
    /// Largest frame on the wire, in bytes, 20 MiB to 1 GiB.
    pub frame_bytes_max: usize,
    /// Bytes of produce requests in flight in one partition.
    pub partition_inflight_bytes_max: usize,
    /// Bytes that may wait to be sent on one connection.
    pub send_queue_bytes: usize,
    /// Bytes of unanswered requests accepted from one connection.
    pub receive_bytes: usize,
    /// Connections accepted at once.
    pub connections_max: usize,
    /// Most partitions of one topic.
    pub partitions_max: u32,
    /// Journal segment size, in bytes.
    pub segment_bytes: u64,
    /// Memory for recent entries, in bytes.
    pub cache_bytes: u64,
    /// Memory for sled's cache, in bytes.
    pub catalog_cache_bytes: u64,
    /// Produce is refused below this much free disk space, in bytes.
    pub disk_reserve_bytes: u64,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            broker_id: 1,
            listen: "127.0.0.1:9092".to_owned(),
            advertise: String::new(),
            data_dir: PathBuf::from("logboom-data"),
            bootstrap: Vec::new(),
            rack: None,
            heartbeat_interval_ms: 150,
            election_timeout_min_ms: 700,
            election_timeout_max_ms: 1_000,
            replica_lag_time_max_ms: 10_000,
            preferred_leader_delay_ms: 1_000,
            request_timeout_max_ms: 60_000,
            frame_bytes_max: 32 << 20,
            partition_inflight_bytes_max: 32 << 20,
            send_queue_bytes: 64 << 20,
            receive_bytes: 64 << 20,
            connections_max: 4_096,
            partitions_max: 10_000,
            segment_bytes: 64 << 20,
            cache_bytes: 128 << 20,
            catalog_cache_bytes: 16 << 20,
            disk_reserve_bytes: 256 << 20,
        }
    }
}

impl BrokerConfig {
    /// Checks every value; the error names the key and says what to write.
    pub fn validate(&self) -> Result<(), Error> {
        let bad = |key: &str, reason: String| {
            Err(Error::InvalidConfig {
                key: key.to_owned(),
                reason,
            })
        };
        if self.broker_id > i32::MAX.unsigned_abs() {
            return bad(
                "broker_id",
                format!("{} is too large, use 0 to {}", self.broker_id, i32::MAX),
            );
        }
        if self.heartbeat_interval_ms < 10 {
            return bad("heartbeat_interval_ms", "use at least 10".to_owned());
        }
        let least = self.heartbeat_interval_ms.saturating_mul(3);
        if self.election_timeout_min_ms < least {
            return bad(
                "election_timeout_min_ms",
                format!("use at least three heartbeats, {least}"),
            );
        }
        if self.election_timeout_max_ms <= self.election_timeout_min_ms {
            let least = self.election_timeout_min_ms.saturating_add(1);
            return bad(
                "election_timeout_max_ms",
                format!("use more than the minimum, {least} or above"),
            );
        }
        // Below it the largest Raft entry could never be replicated, and its partition would stand still.
        if self.frame_bytes_max < FRAME_BYTES_LEAST || self.frame_bytes_max > 1 << 30 {
            return bad(
                "frame_bytes_max",
                format!("use {FRAME_BYTES_LEAST} to 1073741824"),
            );
        }
        if self.segment_bytes < 1 << 20 {
            return bad("segment_bytes", "use at least 1048576".to_owned());
        }
        if self.election_timeout_max_ms > HOUR_MS {
            return bad(
                "election_timeout_max_ms",
                format!("use at most {HOUR_MS}, an hour"),
            );
        }
        let times = [
            ("replica_lag_time_max_ms", self.replica_lag_time_max_ms),
            ("request_timeout_max_ms", self.request_timeout_max_ms),
        ];
        for (key, value) in times {
            if value == 0 || value > HOUR_MS {
                return bad(
                    key,
                    format!("use at least 1 and at most {HOUR_MS}, an hour"),
                );
            }
        }
        if self.preferred_leader_delay_ms > HOUR_MS {
            return bad(
                "preferred_leader_delay_ms",
                format!("use at most {HOUR_MS}, an hour"),
            );
        }
        if self.partitions_max == 0 {
            return bad("partitions_max", "use at least 1".to_owned());
        }
        // Fewer, and the brokers of a cluster take all there are.
        if self.connections_max < 16 {
            return bad("connections_max", "use at least 16".to_owned());
        }
        let room = [
            (
                "partition_inflight_bytes_max",
                self.partition_inflight_bytes_max,
            ),
            ("send_queue_bytes", self.send_queue_bytes),
            ("receive_bytes", self.receive_bytes),
        ];
        for (key, value) in room {
            if value < 1 << 20 {
                return bad(key, "use at least 1048576".to_owned());
            }
        }
        if let Some(rack) = &self.rack
            && !(1..=TEXT_BYTES_MAX).contains(&rack.len())
        {
            let reason = format!(
                "a rack's name has 1 to {TEXT_BYTES_MAX} bytes, this one {}; leave it out when there is none",
                rack.len()
            );
            return bad("rack", reason);
        }
        self.check_addresses()?;
        self.check_own_address(&self.bootstrap_endpoints()?)
    }

    /// What the bootstrap list says of this broker must be able to be true. Another host's name may be another name of this one;
    /// another port of the same host is another process.
    fn check_own_address(&self, bootstrap: &[Endpoint]) -> Result<(), Error> {
        let own = if self.advertise.is_empty() {
            &self.listen
        } else {
            &self.advertise
        };
        let id = self.broker_id;
        let wrong = bootstrap.iter().find_map(|endpoint| {
            let address = &endpoint.address;
            if endpoint.broker.0 != id {
                return (address == own).then(|| {
                    format!("{endpoint} has the address of this broker, which is broker {id}; correct one of them")
                });
            }
            let ((own_host, own_port), (host, port)) = (host_and_port(own)?, host_and_port(address)?);
            if own_host != host || own_port == port {
                return None;
            }
            let told = if own_port == 0 {
                format!("broker {id} is to be found at {address}, but listens on any free port; listen on {address}")
            } else {
                format!("broker {id} is to be found at {address}, but says it is at {own}; correct one of them")
            };
            Some(told)
        });
        wrong.map_or(Ok(()), |reason| {
            Err(Error::InvalidConfig {
                key: "bootstrap".to_owned(),
                reason,
            })
        })
    }

    fn check_addresses(&self) -> Result<(), Error> {
        let bad = |key: &str, reason: String| {
            Err(Error::InvalidConfig {
                key: key.to_owned(),
                reason,
            })
        };
        let form =
            |address: &str| format!("{address:?} is not of the form host:port, as 127.0.0.1:9092");
        let Some((host, _)) = host_and_port(&self.listen) else {
            return bad("listen", form(&self.listen));
        };
        if self.advertise.is_empty() {
            let any = host.trim_matches(['[', ']']).parse::<IpAddr>();
            if any.is_ok_and(|address| address.is_unspecified()) {
                let reason = format!("listening on {host}, say which host:port others use");
                return bad("advertise", reason);
            }
        } else if host_and_port(&self.advertise).is_none_or(|(_, port)| port == 0) {
            return bad("advertise", form(&self.advertise));
        }
        Ok(())
    }

    /// The bootstrap list, parsed.
    pub fn bootstrap_endpoints(&self) -> Result<Vec<Endpoint>, Error> {
        let mut endpoints: Vec<Endpoint> = Vec::new();
        for text in &self.bootstrap {
            let parsed = text.split_once('@').and_then(|(id, address)| {
                let broker = BrokerId(id.parse().ok()?);
                let (_, port) = host_and_port(address)?;
                let usable = port != 0 && broker.0 <= i32::MAX.unsigned_abs();
                usable.then(|| Endpoint {
                    broker,
                    address: address.to_owned(),
                })
            });
            let Some(endpoint) = parsed else {
                let reason =
                    format!("{text:?} is not of the form id@host:port, as 1@127.0.0.1:9092");
                return Err(Error::InvalidConfig {
                    key: "bootstrap".to_owned(),
                    reason,
                });
            };
            let twice = endpoints.iter().find_map(|known| {
                if known.broker == endpoint.broker {
                    return Some(format!("broker {} is named twice", endpoint.broker));
                }
                (known.address == endpoint.address).then(|| {
                    format!("{known} and {endpoint} have the same address; each broker has its own")
                })
            });
            if let Some(reason) = twice {
                return Err(Error::InvalidConfig {
                    key: "bootstrap".to_owned(),
                    reason,
                });
            }
            endpoints.push(endpoint);
        }
        endpoints.sort_by_key(|endpoint| endpoint.broker);
        Ok(endpoints)
    }

    /// Between two heartbeats of a leader.
    pub fn heartbeat_interval(&self) -> Duration {
        Duration::from_millis(self.heartbeat_interval_ms)
    }

    /// Longest election timeout.
    pub fn election_timeout_max(&self) -> Duration {
        Duration::from_millis(self.election_timeout_max_ms)
    }
}

fn host_and_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok()?;
    (!host.is_empty()).then_some((host, port))
}

/// A topic's configuration, with Kafka's names for the keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicConfig {
    /// `min.insync.replicas`: fewer in-sync replicas refuse acks=all.
    pub min_insync_replicas: u32,
    /// `max.message.bytes`: the largest record batch, in bytes.
    pub max_message_bytes: u32,
}

impl Default for TopicConfig {
    fn default() -> Self {
        Self {
            min_insync_replicas: 1,
            max_message_bytes: 1_048_588,
        }
    }
}

impl TopicConfig {
    /// Reads `key=value` pairs, checked against the topic's replication factor. The largest `max.message.bytes` fits into the
    /// smallest [`BrokerConfig::frame_bytes_max`].
    pub fn parse(pairs: &BTreeMap<String, String>, replication_factor: u32) -> Result<Self, Error> {
        let mut config = Self::default();
        for (key, value) in pairs {
            let bad = |reason: String| Error::InvalidConfig {
                key: key.clone(),
                reason,
            };
            let number: Result<u32, _> = value.parse();
            match (key.as_str(), number) {
                ("min.insync.replicas", Ok(n)) if (1..=replication_factor).contains(&n) => {
                    config.min_insync_replicas = n;
                }
                ("min.insync.replicas", _) => {
                    let reason = format!(
                        "{value:?} is not 1 to the replication factor, {replication_factor}"
                    );
                    return Err(bad(reason));
                }
                ("max.message.bytes", Ok(n)) if (1_024..=16 << 20).contains(&n) => {
                    config.max_message_bytes = n;
                }
                ("max.message.bytes", _) => {
                    return Err(bad(format!("{value:?} is not 1024 to 16777216")));
                }
                _ => {
                    let known = "known are min.insync.replicas and max.message.bytes";
                    return Err(bad(format!("unknown key, {known}")));
                }
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = fn(&mut BrokerConfig);

    /// Goal: a wrong value is named with its key. Method: one table of bad changes to a good configuration.
    #[test]
    fn bad_values_are_named() {
        assert_eq!(BrokerConfig::default().validate(), Ok(()));
        let cases: [(&str, Change); 27] = [
            ("rack", |c| c.rack = Some(String::new())),
            ("rack", |c| c.rack = Some("r".repeat(513))),
            ("bootstrap", |c| {
                c.bootstrap = vec!["2@a:1".to_owned(), "3@a:1".to_owned()];
            }),
            ("bootstrap", |c| {
                c.bootstrap = vec!["1@127.0.0.1:9093".to_owned()];
            }),
            ("bootstrap", |c| {
                c.bootstrap = vec!["2@127.0.0.1:9092".to_owned()];
            }),
            ("bootstrap", |c| {
                c.listen = "127.0.0.1:0".to_owned();
                c.bootstrap = vec!["1@127.0.0.1:9092".to_owned(), "2@b:1".to_owned()];
            }),
            ("bootstrap", |c| {
                c.advertise = "a:1".to_owned();
                c.bootstrap = vec!["1@a:2".to_owned()];
            }),
            ("election_timeout_min_ms", |c| {
                c.heartbeat_interval_ms = u64::MAX;
            }),
            ("election_timeout_max_ms", |c| {
                c.election_timeout_min_ms = u64::MAX;
            }),
            ("election_timeout_max_ms", |c| {
                c.election_timeout_max_ms = u64::MAX;
            }),
            ("request_timeout_max_ms", |c| c.request_timeout_max_ms = 0),
            ("preferred_leader_delay_ms", |c| {
                c.preferred_leader_delay_ms = u64::MAX;
            }),
            ("connections_max", |c| c.connections_max = 0),
            ("receive_bytes", |c| c.receive_bytes = 0),
            ("listen", |c| c.listen = "9092".to_owned()),
            ("advertise", |c| c.advertise = "a:0".to_owned()),
            ("advertise", |c| c.listen = "[::]:9092".to_owned()),
            ("broker_id", |c| c.broker_id = u32::MAX),
            ("election_timeout_min_ms", |c| c.election_timeout_min_ms = 1),
            ("election_timeout_max_ms", |c| {
                c.election_timeout_max_ms = 700;
            }),
            ("bootstrap", |c| {
                c.bootstrap = vec!["127.0.0.1:1".to_owned()];
            }),
            ("bootstrap", |c| {
                c.bootstrap = vec!["1@a:1".to_owned(), "1@b:1".to_owned()];
            }),
            ("frame_bytes_max", |c| c.frame_bytes_max = 16 << 20),
            ("connections_max", |c| c.connections_max = 1),
            ("request_timeout_max_ms", |c| c.request_timeout_max_ms = 0),
            ("advertise", |c| c.listen = "0.0.0.0:9092".to_owned()),
            ("advertise", |c| c.listen = "[::]:9092".to_owned()),
        ];
        for (name, change) in cases {
            let mut config = BrokerConfig::default();
            change(&mut config);
            assert!(
                matches!(config.validate(), Err(Error::InvalidConfig { key, .. }) if key == name),
                "{name}"
            );
        }
    }

    /// Goal: what may be right is accepted. Method: a broker that is behind another name, behind what passes on to it, and not in the
    /// list, on any port.
    #[test]
    fn addresses_that_may_be_right_are_accepted() {
        let cases: [Change; 4] = [
            |c| c.bootstrap = vec!["1@broker-1.example:9093".to_owned()],
            |c| {
                c.listen = "127.0.0.1:0".to_owned();
                c.advertise = "127.0.0.1:9".to_owned();
                c.bootstrap = vec!["1@127.0.0.1:9".to_owned(), "2@127.0.0.1:8".to_owned()];
            },
            |c| {
                c.listen = "127.0.0.1:0".to_owned();
                c.bootstrap = vec!["2@127.0.0.1:8".to_owned(), "3@127.0.0.1:7".to_owned()];
            },
            |c| c.rack = Some("r".repeat(512)),
        ];
        for (number, change) in cases.into_iter().enumerate() {
            let mut config = BrokerConfig::default();
            change(&mut config);
            assert_eq!(config.validate(), Ok(()), "{number}");
        }
    }

    /// Goal: topic keys are checked against the replication factor. Method: a table.
    #[test]
    fn topic_keys_are_checked() {
        let parse = |key: &str, value: &str| {
            TopicConfig::parse(&BTreeMap::from([(key.to_owned(), value.to_owned())]), 3)
        };
        assert_eq!(
            parse("min.insync.replicas", "2").map(|c| c.min_insync_replicas),
            Ok(2)
        );
        for (key, value) in [
            ("min.insync.replicas", "0"),
            ("min.insync.replicas", "4"),
            ("max.message.bytes", "x"),
            ("retention", "1"),
        ] {
            assert!(parse(key, value).is_err(), "{key}={value}");
        }
    }
}
