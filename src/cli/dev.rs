//! `logboom dev`: a cluster on this machine that stays up until it is told to stop.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use logboom::storage::check_directory;
use logboom::types::BrokerId;

use super::children::{Brokers, Ports};
use super::{Usage, asked_to_stop, output};

/// Most brokers on one machine.
const BROKERS_MAX: u32 = 32;

#[derive(Debug, Args)]
pub(super) struct DevArgs {
    /// How many brokers
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=i64::from(BROKERS_MAX)))]
    brokers: u32,
    /// Where their data is kept; run again with the same directory and the same number of brokers to go on
    #[arg(long, value_name = "DIR", default_value = "logboom-data")]
    data: PathBuf,
    /// Port of the first broker; the others follow. 0: any free ports
    #[arg(
        long,
        value_name = "PORT",
        default_value_t = 9092,
        allow_negative_numbers = true
    )]
    port: u16,
}

pub(super) async fn run(args: DevArgs) -> anyhow::Result<ExitCode> {
    check(&args.data, args.brokers)?;
    let ports = if args.port == 0 {
        Ports::Free
    } else {
        Ports::From(args.port)
    };
    let mut brokers = Brokers::prepare(args.brokers, &args.data, ports)?;
    // The last one first: however far this comes, the directory then tells how many brokers it is for.
    for broker in brokers.brokers.iter().rev() {
        let directory = &broker.directory;
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    brokers.start()?;
    for broker in &brokers.brokers {
        let (id, address, directory) = (broker.id, &broker.address, broker.directory.display());
        output::line(&format!("broker {id} at {address}, data in {directory}"))?;
    }
    let result = tokio::select! {
        biased;
        stop = asked_to_stop() => stop,
        result = stay_up(&mut brokers) => result,
    };
    // Said even when nobody reads it any more: the brokers are stopped in any case.
    output::line("stopping").ok();
    brokers.stop().await;
    result?;
    Ok(ExitCode::SUCCESS)
}

async fn stay_up(brokers: &mut Brokers) -> anyhow::Result<()> {
    // The client is dropped: it was only needed to see the cluster complete.
    drop(brokers.client().await?);
    output::line(&format!(
        "ready: export LOGBOOM_BOOTSTRAP={} (Ctrl-C stops the cluster, its data is kept)",
        brokers.addresses().join(",")
    ))?;
    while !brokers.all_ended() {
        let error = brokers.one_ended().await;
        // The others go on: this is a cluster.
        tracing::error!("{error:#}");
    }
    anyhow::bail!("all brokers have ended")
}

/// Refuses a directory that `brokers` brokers cannot go on with, before anything in it is changed.
fn check(directory: &Path, brokers: u32) -> anyhow::Result<()> {
    let shown = directory.display();
    let names = match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
    };
    let mut names = names.map_err(|error| {
        Usage(format!(
            "--data {shown} cannot be used: {error}; name a new or an empty directory"
        ))
    })?;
    names.sort();
    let Some(known) = names.iter().filter_map(|name| broker_of(name)).max() else {
        return match names.iter().find(|name| *name != "lost+found") {
            None => Ok(()),
            Some(name) => Err(Usage(format!(
                "{shown} is not empty and was not made by `logboom dev`: {name} is in it; name a new or an empty directory with --data"
            ))
            .into()),
        };
    };
    for id in 1..=known {
        check_directory(&directory.join(format!("broker-{id}")), BrokerId(id))?;
    }
    if known != brokers {
        let many = if known == 1 { "broker" } else { "brokers" };
        return Err(Usage(format!(
            "{shown} holds a cluster of {known} {many}: go on with --brokers {known}, or name another directory with --data"
        ))
        .into());
    }
    Ok(())
}

/// The broker that an entry of the directory is of. A log counts as well: a broker's data may have been deleted to see it come back.
fn broker_of(name: &str) -> Option<u32> {
    let number = name.strip_prefix("broker-")?;
    let number = number.strip_suffix(".log").unwrap_or(number);
    number
        .parse()
        .ok()
        .filter(|id| (1..=BROKERS_MAX).contains(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a directory is gone on with by as many brokers as it was made for, and nothing else is written into. Method: a table of
    /// entries, with the numbers of brokers that are accepted.
    #[test]
    fn directories_are_for_as_many_brokers_as_they_were_made_for() {
        let cases: [(&[&str], &[u32], &str); 7] = [
            (&[], &[1, 2, 3], ""),
            (&["lost+found"], &[1, 2, 3], ""),
            (
                &["broker-1", "broker-1.log", "broker-2", "notes.txt"],
                &[2],
                "go on with --brokers 2",
            ),
            (&["broker-3"], &[3], "a cluster of 3 brokers"),
            (
                &["broker-1", "broker-3.log"],
                &[3],
                "go on with --brokers 3",
            ),
            (
                &["notes.txt", "lost+found"],
                &[],
                "not made by `logboom dev`: notes.txt is in it",
            ),
            (&["broker-0", "broker-x"], &[], "broker-0 is in it"),
        ];
        for (entries, accepted, reason) in cases {
            let home = tempfile::tempdir().unwrap();
            for entry in entries {
                fs::create_dir(home.path().join(entry)).unwrap();
            }
            for brokers in 1..=3 {
                match check(home.path(), brokers) {
                    Ok(()) => assert!(accepted.contains(&brokers), "{entries:?} {brokers}"),
                    Err(error) => {
                        assert!(!accepted.contains(&brokers), "{entries:?} {brokers}");
                        let error = error.downcast::<Usage>().unwrap().0;
                        assert!(error.contains(reason), "{error}");
                    }
                }
            }
        }
        let home = tempfile::tempdir().unwrap();
        check(&home.path().join("new"), 3).unwrap();
    }
}
