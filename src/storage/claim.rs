//! Whether a broker may use a data directory: judged before anything in it is changed.
//!
//! Owns the order of the questions: is it a directory, does it hold nothing that is not ours, whose is it. The lock is taken in
//! between by whoever opens the directory.

use std::io;
use std::path::Path;

use super::StorageError;
use super::core::segment_path;
use super::disk::{Disk, RealDisk};
use super::frame::{FORMAT, SEGMENT_HEADER};
use super::identity::{self, Found, Identity, Mark};
use super::ledger::LedgerError;
use super::scan::ScanError;
use crate::types::BrokerId;

/// All that a store puts into its directory, and what the root of a file system has besides.
const OURS: [&str; 7] = [
    "LOCK",
    "catalog",
    "identity",
    "identity.new",
    "journal",
    "watermark",
    "lost+found",
];

/// A broker's claim to a data directory.
#[derive(Clone, Copy)]
pub(super) struct Claim<'a> {
    pub(super) disk: &'a dyn Disk,
    pub(super) directory: &'a Path,
    pub(super) broker: BrokerId,
}

impl Claim<'_> {
    /// What the operating system says of the directory.
    pub(super) fn unusable(&self, error: &io::Error) -> StorageError {
        StorageError::Unusable {
            directory: self.directory.to_owned(),
            reason: error.to_string(),
        }
    }

    pub(super) fn damaged(&self, what: String) -> StorageError {
        StorageError::Damaged {
            directory: self.directory.to_owned(),
            what,
        }
    }

    /// What is wrong with the journal.
    pub(super) fn scan_error(&self, error: ScanError) -> StorageError {
        match error {
            ScanError::Io(error) => self.unusable(&error),
            ScanError::Damaged(what) | ScanError::Ledger(LedgerError::Damaged(what)) => {
                self.damaged(what)
            }
            ScanError::Ledger(LedgerError::Catalog(error)) => StorageError::Failed {
                what: error.to_string(),
            },
        }
    }

    pub(super) fn in_use(&self) -> StorageError {
        StorageError::InUse {
            directory: self.directory.to_owned(),
        }
    }

    /// Without an identity a directory is new, or was begun by a creation that never finished: then nothing else is in it.
    pub(super) fn check_content(&self) -> Result<(), StorageError> {
        let io = |error: io::Error| self.unusable(&error);
        let names = self.disk.list("").map_err(io)?.unwrap_or_default();
        let foreign = names.iter().find(|name| !OURS.contains(&name.as_str()));
        match foreign {
            Some(name) if !names.iter().any(|name| name == "identity") => {
                // A broker's after all, whose identity is lost.
                self.check_new()?;
                Err(StorageError::Occupied {
                    directory: self.directory.to_owned(),
                    name: name.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    /// The identity, and the mark; `None` when the directory is new.
    pub(super) fn identify(&self) -> Result<Option<(Identity, Mark)>, StorageError> {
        let io = |error: io::Error| self.unusable(&error);
        let identity = match identity::read(self.disk).map_err(io)? {
            Found::Identity(identity) => identity,
            Found::Damaged(what) => return Err(self.damaged(what)),
            Found::Newer(found) => {
                return Err(StorageError::UnknownFormat {
                    directory: self.directory.to_owned(),
                    found,
                    known: FORMAT,
                });
            }
            Found::None => {
                self.check_new()?;
                return Ok(None);
            }
        };
        if identity.broker != self.broker {
            // No replica is started before the cluster has admitted the broker.
            let empty = match identity.cluster {
                Some(_) => "",
                None => " (but holds nothing of any cluster yet: it may be deleted)",
            };
            return Err(StorageError::Foreign {
                directory: self.directory.to_owned(),
                owner: format!("broker {}{empty}", identity.broker),
                asked: format!("broker {}", self.broker),
            });
        }
        let mark = identity::read_watermark(self.disk, identity.incarnation).map_err(io)?;
        Ok(Some((identity, mark.map_err(|what| self.damaged(what))?)))
    }

    /// Without an identity there may be nothing, or what a creation that never finished has left.
    fn check_new(&self) -> Result<(), StorageError> {
        let io = |error: io::Error| self.unusable(&error);
        let bases = super::scan::list(self.disk).map_err(|error| self.scan_error(error))?;
        for base in bases.unwrap_or_default() {
            let file = self.disk.open(&segment_path(base)).map_err(io)?;
            let len = file.len().map_err(io)?;
            if base != 0 || len > SEGMENT_HEADER {
                return Err(self.damaged("there is a journal, but no identity".to_owned()));
            }
        }
        Ok(())
    }
}

/// Whether `broker` could be started on the data directory `directory`: no process uses it, and it is that broker's, or new.
/// Changes nothing. Blocking.
pub fn check_directory(directory: &Path, broker: BrokerId) -> Result<(), StorageError> {
    let disk = RealDisk::new(directory);
    let claim = Claim {
        disk: &disk,
        directory,
        broker,
    };
    let io = |error: io::Error| claim.unusable(&error);
    let Some(names) = disk.list("").map_err(io)? else {
        return Ok(());
    };
    // Without the file nobody holds the lock, and taking it would make the file.
    if names.iter().any(|name| name == "LOCK") && disk.lock().map_err(io)?.is_none() {
        return Err(claim.in_use());
    }
    claim.check_content()?;
    claim.identify().map(drop)
}
