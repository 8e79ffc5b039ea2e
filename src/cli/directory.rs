//! The directory of a command that brings its own brokers: named and kept, or temporary and gone afterwards.
//!
//! Owns the removal.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use logboom::runtime;

use super::Usage;

/// Where the brokers' data is; a temporary directory is removed unless it is kept.
pub(super) struct Directory {
    pub(super) path: PathBuf,
    temporary: Cell<bool>,
}

impl Directory {
    /// The one that was named, which must be new or empty, or a temporary one for `command`.
    pub(super) fn make(command: &str, named: Option<&Path>) -> anyhow::Result<Self> {
        let temporary = || {
            let number = runtime::random_seed();
            std::env::temp_dir().join(format!("logboom-{command}-{number:016x}"))
        };
        let path = named.map_or_else(temporary, Path::to_owned);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        if fs::read_dir(&path)?.next().is_some() {
            let path = path.display();
            return Err(Usage(format!(
                "{path} is not empty; name an empty or a new directory"
            ))
            .into());
        }
        Ok(Self {
            path,
            temporary: Cell::new(named.is_none()),
        })
    }

    /// Keeps the data for whoever wants to see what went wrong.
    pub(super) fn keep(&self) -> String {
        self.temporary.set(false);
        format!("data and logs are in {}", self.path.display())
    }

    /// Whether it will be gone.
    #[cfg(feature = "testkit")]
    pub(super) fn is_temporary(&self) -> bool {
        self.temporary.get()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.temporary.get() {
            // What cannot be removed from the temporary directory is the system's to clear.
            fs::remove_dir_all(&self.path).ok();
        }
    }
}
