//! A broker's configuration from four places: flag before environment before file before default.
//!
//! Owns no key: they are those of [`BrokerConfig`], found by looking at its default. Here are only their names on the command line, their
//! texts, and errors that say where a wrong value stands.

use std::collections::BTreeMap;
use std::path::Path;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use logboom::config::BrokerConfig;
use logboom::types::Error;

use super::Usage;

/// The flag of each key, and what the key is, in the order in which help shows them.
const HELP: [(&str, &str); 22] = [
    ("broker-id", "The broker's number, its own in the cluster"),
    ("listen", "host:port to listen on"),
    (
        "advertise",
        "host:port that others use; the listening address when empty",
    ),
    ("data-dir", "The data directory"),
    (
        "bootstrap",
        "id@host:port of the brokers that form the cluster, separated by commas; the same list everywhere",
    ),
    ("rack", "The rack this broker stands in"),
    (
        "heartbeat-interval-ms",
        "Between two heartbeats of a leader",
    ),
    ("election-timeout-min-ms", "Shortest election timeout"),
    (
        "election-timeout-max-ms",
        "Longest election timeout; the same everywhere",
    ),
    (
        "replica-lag-time-max-ms",
        "A follower that is behind for this long leaves the ISR",
    ),
    (
        "preferred-leader-delay-ms",
        "How long a preferred leader must be caught up before it leads again",
    ),
    ("request-timeout-max-ms", "Longest time a request may take"),
    ("frame-bytes-max", "Largest frame on the wire"),
    (
        "partition-inflight-bytes-max",
        "Bytes of produce requests in flight in one partition",
    ),
    (
        "send-queue-bytes",
        "Bytes that may wait to be sent on one connection",
    ),
    (
        "receive-bytes",
        "Bytes of unanswered requests accepted from one connection",
    ),
    ("connections-max", "Connections accepted at once"),
    ("partitions-max", "Most partitions of one topic"),
    ("segment-bytes", "Journal segment size"),
    ("cache-bytes", "Memory for recent entries"),
    ("catalog-cache-bytes", "Memory for the catalog's cache"),
    (
        "disk-reserve-bytes",
        "Produce is refused below this much free disk space",
    ),
];

/// The flags that were given, by key.
#[derive(Debug, Clone, Default)]
pub(super) struct Flags(BTreeMap<String, String>);

fn flag(key: &str) -> String {
    key.replace('_', "-")
}

fn keys() -> impl Iterator<Item = String> {
    HELP.iter().map(|(flag, _)| flag.replace('-', "_"))
}

fn variable(key: &str) -> String {
    format!("LOGBOOM_{}", key.to_uppercase())
}

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        HELP.iter().fold(command, |command, (flag, help)| {
            let variable = variable(&flag.replace('-', "_"));
            let arg = Arg::new(*flag)
                .long(*flag)
                .value_name("VALUE")
                .allow_negative_numbers(true);
            command.arg(arg.help(format!("{help} [{variable}]")))
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = keys().filter_map(|key| {
            let value = matches.get_one::<String>(&flag(&key))?.clone();
            Some((key, value))
        });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.append(&mut Self::from_arg_matches(matches)?.0);
        Ok(())
    }
}

/// Where a value came from, as an error names it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Flag,
    Environment,
    File(String),
}

/// Puts the configuration together. `file` is the path and the text of the TOML file; `environment` looks a variable up.
pub(super) fn merge(
    flags: &Flags,
    environment: impl Fn(&str) -> Option<String>,
    file: Option<(&Path, &str)>,
) -> Result<BrokerConfig, Usage> {
    let mut sources: BTreeMap<String, Source> = BTreeMap::new();
    let mut table = toml::Table::new();
    if let Some((path, text)) = file {
        table = read_file(path, text)?;
        for key in table.keys() {
            sources.insert(key.clone(), Source::File(place(path, line_of(text, key))));
        }
    }
    for key in keys() {
        if let Some(value) = environment(&variable(&key)).filter(|value| applies(&key, value)) {
            table.insert(key.clone(), typed(&key, &value, &variable(&key))?);
            sources.insert(key.clone(), Source::Environment);
        }
        if let Some(value) = flags.0.get(&key) {
            table.insert(
                key.clone(),
                typed(&key, value, &format!("--{}", flag(&key)))?,
            );
            sources.insert(key, Source::Flag);
        }
    }
    let config: BrokerConfig = table.try_into().map_err(|error| Usage(one_line(&error)))?;
    match config.validate() {
        Ok(()) => Ok(config),
        Err(Error::InvalidConfig { key, reason }) => {
            let named = match sources.get(&key) {
                Some(Source::Flag) => format!("--{}: ", flag(&key)),
                Some(Source::Environment) => format!("{}: ", variable(&key)),
                Some(Source::File(place)) => format!("{place}: {key}: "),
                None => format!("{key}: "),
            };
            Err(Usage(format!("{named}{reason}")))
        }
        Err(error) => Err(Usage(error.to_string())),
    }
}

/// `LOGBOOM_BOOTSTRAP` also tells client commands where the cluster is; such a list of addresses says nothing to a broker.
fn applies(key: &str, value: &str) -> bool {
    key != "bootstrap" || value.contains('@')
}

fn read_file(path: &Path, text: &str) -> Result<toml::Table, Usage> {
    // Read as what it will be, so that a wrong type and an unknown key are found with their place.
    if let Err(error) = toml::from_str::<BrokerConfig>(text) {
        let line = error
            .span()
            .and_then(|span| text.get(..span.start))
            .map(|before| before.matches('\n').count() + 1);
        let told = match error.span().and_then(|span| text.get(span)) {
            // The parser says where, not which.
            Some(key) if error.message() == "duplicate key" => format!("duplicate key {key}"),
            _ => one_line(&error),
        };
        return Err(Usage(format!("{}: {told}", place(path, line))));
    }
    text.parse::<toml::Table>()
        .map_err(|error| Usage(one_line(&error)))
}

fn one_line(error: &toml::de::Error) -> String {
    error.message().replace('\n', " ").replace('`', "'")
}

fn place(path: &Path, line: Option<usize>) -> String {
    let path = path.display();
    line.map_or_else(|| path.to_string(), |line| format!("{path}:{line}"))
}

/// The line on which a key is set, counted from 1.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let is_it = |line: &str| {
        let name = line
            .split('=')
            .next()
            .unwrap_or_default()
            .trim()
            .trim_matches(['"', '\'']);
        name == key
    };
    text.lines().position(is_it).map(|index| index + 1)
}

/// A text as a value of the key's type.
fn typed(key: &str, text: &str, from: &str) -> Result<toml::Value, Usage> {
    use serde_json::Value;
    let default = serde_json::to_value(BrokerConfig::default()).unwrap_or_default();
    let value: toml::Value = match default.get(key) {
        Some(Value::Number(_)) => {
            let number: Option<i64> = text.trim().parse().ok().filter(|number| *number >= 0);
            let wrong = || {
                Usage(format!(
                    "{from}: {text:?} is not a whole number of at least 0"
                ))
            };
            number.ok_or_else(wrong)?.into()
        }
        Some(Value::Bool(_)) => {
            let wrong = || Usage(format!("{from}: {text:?} is neither true nor false"));
            text.trim().parse::<bool>().map_err(|_| wrong())?.into()
        }
        Some(Value::Array(_)) => {
            let items = text
                .split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty());
            items.map(toml::Value::from).collect::<Vec<_>>().into()
        }
        _ => text.into(),
    };
    // What the key's type does not take, as a number that is too large, is named here with its place.
    let alone = toml::Table::from_iter([(key.to_owned(), value.clone())]);
    match alone.try_into::<BrokerConfig>() {
        Ok(_) => Ok(value),
        Err(error) => Err(Usage(format!("{from}: {}", one_line(&error)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(pairs: &[(&str, &str)]) -> Flags {
        Flags(
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        )
    }

    fn environment<'a>(pairs: &'a [(&str, &str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| {
            pairs
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| (*value).to_owned())
        }
    }

    fn file(text: &str) -> (&Path, &str) {
        (Path::new("b.toml"), text)
    }

    type Pairs<'a> = &'a [(&'a str, &'a str)];
    /// Flags, environment, file, and parts of the error.
    type Mistake<'a> = (Pairs<'a>, Pairs<'a>, &'a str, &'a [&'a str]);

    /// Goal: no key lacks its flag, its variable and its text. Method: the default configuration's keys against the table.
    #[test]
    fn every_key_has_a_flag() {
        let default = serde_json::to_value(BrokerConfig::default()).unwrap();
        let wanted: std::collections::BTreeSet<String> =
            default.as_object().unwrap().keys().cloned().collect();
        assert_eq!(wanted, keys().collect());
    }

    /// Goal: flag beats environment beats file beats default. Method: one key set in more and more places.
    #[test]
    fn precedence() {
        let text = "cache_bytes = 3\nlisten = \"f:1\"\nbroker_id = 3";
        let env = [("LOGBOOM_CACHE_BYTES", "2"), ("LOGBOOM_LISTEN", "e:1")];
        let merged = merge(
            &flags(&[("cache_bytes", "1")]),
            environment(&env),
            Some(file(text)),
        )
        .unwrap();
        assert_eq!(
            (merged.cache_bytes, merged.listen.as_str(), merged.broker_id),
            (1, "e:1", 3)
        );
        assert_eq!(merged.segment_bytes, BrokerConfig::default().segment_bytes);
        let nothing = merge(&Flags::default(), environment(&[]), None).unwrap();
        assert_eq!(nothing, BrokerConfig::default());
    }

    /// Goal: lists and missing values come through flags too. Method: bootstrap and rack.
    #[test]
    fn lists_and_options_are_read() {
        let given = flags(&[
            ("bootstrap", "1@a:1, 2@b:2"),
            ("rack", "r1"),
            ("data_dir", "/d"),
        ]);
        let client = [("LOGBOOM_BOOTSTRAP", "a:1,b:2")];
        let merged = merge(&given, environment(&client), None).unwrap();
        assert_eq!(merged.bootstrap, ["1@a:1", "2@b:2"]);
        assert_eq!(merged.rack.as_deref(), Some("r1"));
        assert_eq!(merged.data_dir, Path::new("/d"));
        let alone = merge(&Flags::default(), environment(&client), None).unwrap();
        assert!(alone.bootstrap.is_empty());
    }

    /// Goal: a mistake is named with its place and what to write. Method: a table of mistakes.
    #[test]
    fn mistakes_are_named() {
        let none: Pairs<'_> = &[];
        let cases: [Mistake<'_>; 9] = [
            (
                none,
                &[("LOGBOOM_BROKER_ID", "4294967296")],
                "",
                &["LOGBOOM_BROKER_ID: invalid value"],
            ),
            (
                none,
                none,
                "\nbroker = 1",
                &["b.toml:2: ", "unknown field 'broker'", "broker_id"],
            ),
            (
                none,
                none,
                "listen = \"a:1\"\nbroker_id = \"x\"",
                &["b.toml:2: ", "invalid type"],
            ),
            (none, none, "broker_id = ", &["b.toml:1: "]),
            (
                none,
                none,
                "rack = \"a\"\nrack = \"b\"",
                &["b.toml:2: duplicate key rack"],
            ),
            (
                none,
                none,
                "broker_id = 1\nsegment_bytes = 5",
                &["b.toml:2: segment_bytes: use at least"],
            ),
            (
                &[("broker_id", "x")],
                none,
                "",
                &["--broker-id: \"x\" is not a whole number"],
            ),
            (
                none,
                &[("LOGBOOM_BROKER_ID", "-1")],
                "",
                &["LOGBOOM_BROKER_ID: \"-1\" is not"],
            ),
            (
                &[("bootstrap", "a:1")],
                none,
                "",
                &["--bootstrap: \"a:1\" is not of the form id@host:port"],
            ),
        ];
        for (given, env, text, expected) in cases {
            let error = merge(&flags(given), environment(env), Some(file(text)))
                .unwrap_err()
                .0;
            for part in expected {
                assert!(error.contains(part), "{error:?} lacks {part:?}");
            }
            assert!(!error.contains('\n'), "{error:?}");
        }
    }
}
