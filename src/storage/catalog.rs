//! The catalog: an ordered map of small values that can be rebuilt from the journal at any time.
//!
//! Owns the only use of sled. Nothing durable depends on it, so it may lose its tail, its middle or everything:
//! `ledger.rs` keeps a digest over all pairs beside the journal position they stand for, and throws the catalog
//! away when the two do not match. Values stay within [`VALUE_MAX`], so that sled never writes a blob file.

use std::cell::Cell;
use std::fmt;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

/// Largest value, in bytes: sled keeps larger leaves in files that it never syncs.
pub(super) const VALUE_MAX: usize = 4096;

/// Why the catalog cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[error("catalog: {0}")]
pub(super) struct CatalogError(pub(super) String);

/// One change: a key, and its new value or none.
pub(super) type Change = (Vec<u8>, Option<Vec<u8>>);
/// A pair found.
pub(super) type Pair = (Vec<u8>, Bytes);

/// An ordered map. One writer, many readers.
pub(super) trait Catalog: fmt::Debug + Send + Sync {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, CatalogError>;
    /// The pair with the greatest key in `[low, high]`.
    fn floor(&self, low: &[u8], high: &[u8]) -> Result<Option<Pair>, CatalogError>;
    /// The pair with the smallest key in `[low, high]`.
    fn ceiling(&self, low: &[u8], high: &[u8]) -> Result<Option<Pair>, CatalogError>;
    /// The keys in `[low, high]`, ascending.
    fn keys(&self, low: &[u8], high: &[u8]) -> Result<Vec<Vec<u8>>, CatalogError>;
    /// Shows every pair, in order.
    fn scan(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), CatalogError>;
    /// Makes all changes, or none if the process dies meanwhile.
    fn apply(&self, changes: Vec<Change>) -> Result<(), CatalogError>;
    /// Writes everything out.
    fn flush(&self) -> Result<(), CatalogError>;
}

/// The catalog in sled.
pub(super) struct SledCatalog {
    db: sled::Db,
}

impl fmt::Debug for SledCatalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SledCatalog")
    }
}

#[allow(clippy::needless_pass_by_value)] // as `map_err` wants it
fn broken(error: sled::Error) -> CatalogError {
    CatalogError(error.to_string())
}

thread_local! {
    /// This thread is in [`guarded`] work.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread would be taken for damage of the catalog, and told as such: a process's panic hook need not print
/// it.
pub fn is_panic_guarded() -> bool {
    GUARDED.get()
}

/// sled panics on some of the damage it finds; here that is an error like any other.
pub(super) fn guarded<T>(
    work: impl FnOnce() -> Result<T, CatalogError>,
) -> Result<T, CatalogError> {
    let outer = GUARDED.replace(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    GUARDED.set(outer);
    match result {
        Ok(result) => result,
        Err(panic) => Err(CatalogError(format!(
            "panic: {}",
            super::panic_text(&*panic)
        ))),
    }
}

impl SledCatalog {
    /// How often an open is tried again while a reader of a store just closed still holds the database.
    const ATTEMPTS: u32 = 100;

    pub(super) fn open(path: &Path, cache_bytes: u64) -> Result<Self, CatalogError> {
        let mut attempt = 0;
        loop {
            let opened = guarded(|| {
                sled::Config::new()
                    .path(path)
                    .cache_capacity(cache_bytes)
                    // Its background flusher is also the only caller of its garbage collection.
                    .flush_every_ms(Some(500))
                    .open()
                    .map_err(broken)
            });
            match opened {
                Ok(db) => return Ok(Self { db }),
                Err(error) if error.0.contains("lock") && attempt < Self::ATTEMPTS => {
                    attempt += 1;
                    pause(Duration::from_millis(50));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Waits on a condition nobody signals: opening is blocking work outside any runtime.
fn pause(time: Duration) {
    let never = Mutex::new(());
    let guard = never.lock().unwrap_or_else(PoisonError::into_inner);
    drop(Condvar::new().wait_timeout(guard, time));
}

fn pair((key, value): (sled::IVec, sled::IVec)) -> Pair {
    (key.to_vec(), Bytes::copy_from_slice(&value))
}

impl Catalog for SledCatalog {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, CatalogError> {
        guarded(|| {
            let found = self.db.get(key).map_err(broken)?;
            Ok(found.map(|value| Bytes::copy_from_slice(&value)))
        })
    }

    fn floor(&self, low: &[u8], high: &[u8]) -> Result<Option<Pair>, CatalogError> {
        guarded(|| {
            let found = self.db.range(low.to_vec()..=high.to_vec()).next_back();
            Ok(found.transpose().map_err(broken)?.map(pair))
        })
    }

    fn ceiling(&self, low: &[u8], high: &[u8]) -> Result<Option<Pair>, CatalogError> {
        guarded(|| {
            let found = self.db.range(low.to_vec()..=high.to_vec()).next();
            Ok(found.transpose().map_err(broken)?.map(pair))
        })
    }

    fn keys(&self, low: &[u8], high: &[u8]) -> Result<Vec<Vec<u8>>, CatalogError> {
        guarded(|| {
            let range = self.db.range(low.to_vec()..=high.to_vec()).keys();
            range
                .map(|key| key.map(|key| key.to_vec()).map_err(broken))
                .collect()
        })
    }

    fn scan(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), CatalogError> {
        guarded(|| {
            for pair in self.db.iter() {
                let (key, value) = pair.map_err(broken)?;
                see(&key, &value);
            }
            Ok(())
        })
    }

    fn apply(&self, changes: Vec<Change>) -> Result<(), CatalogError> {
        guarded(|| {
            let mut batch = sled::Batch::default();
            for (key, value) in changes {
                match value {
                    Some(value) => {
                        assert!(
                            value.len() <= VALUE_MAX,
                            "catalog value of {} bytes",
                            value.len()
                        );
                        batch.insert(key, value);
                    }
                    None => batch.remove(key),
                }
            }
            self.db.apply_batch(batch).map_err(broken)
        })
    }

    fn flush(&self) -> Result<(), CatalogError> {
        guarded(|| self.db.flush().map(drop).map_err(broken))
    }
}

/// The catalog in memory, kept by the disk in memory across a crash.
#[cfg(any(test, feature = "testkit"))]
pub(super) mod memory {
    use std::collections::BTreeMap;

    use std::sync::Arc;

    use super::{Bytes, Catalog, CatalogError, Change, Mutex, Pair, PoisonError, VALUE_MAX};

    type Map = BTreeMap<Vec<u8>, Bytes>;

    #[derive(Debug, Default)]
    struct Images {
        applied: Map,
        flushed: Map,
    }

    /// Two images of one map: what has been applied, and what has been flushed.
    #[derive(Debug, Clone, Default)]
    pub(in crate::storage) struct MemCatalog(Arc<Mutex<Images>>);

    impl MemCatalog {
        fn with<T>(&self, work: impl FnOnce(&mut Images) -> T) -> T {
            work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
        }

        /// The catalog after a crash: as last flushed, or as last applied.
        pub(in crate::storage) fn crashed(&self, applied: bool) -> Self {
            let map = self.with(|i| {
                if applied {
                    i.applied.clone()
                } else {
                    i.flushed.clone()
                }
            });
            Self(Arc::new(Mutex::new(Images {
                applied: map.clone(),
                flushed: map,
            })))
        }

        /// Changes one bit of the `n`-th value (round and round).
        pub(in crate::storage) fn flip(&self, n: usize, bit: usize) {
            self.with(|images| {
                let count = images.applied.len().max(1);
                if let Some(value) = images.applied.values_mut().nth(n % count) {
                    let mut bytes = value.to_vec();
                    let at = (bit / 8) % bytes.len().max(1);
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << (bit % 8);
                    }
                    *value = bytes.into();
                }
                images.flushed = images.applied.clone();
            });
        }
    }

    impl Catalog for MemCatalog {
        fn get(&self, key: &[u8]) -> Result<Option<Bytes>, CatalogError> {
            Ok(self.with(|images| images.applied.get(key).cloned()))
        }

        fn floor(&self, low: &[u8], high: &[u8]) -> Result<Option<Pair>, CatalogError> {
            Ok(self.with(|images| {
                let found = images
                    .applied
                    .range(low.to_vec()..=high.to_vec())
                    .next_back();
                found.map(|(key, value)| (key.clone(), value.clone()))
            }))
        }

        fn ceiling(&self, low: &[u8], high: &[u8]) -> Result<Option<Pair>, CatalogError> {
            Ok(self.with(|images| {
                let found = images.applied.range(low.to_vec()..=high.to_vec()).next();
                found.map(|(key, value)| (key.clone(), value.clone()))
            }))
        }

        fn keys(&self, low: &[u8], high: &[u8]) -> Result<Vec<Vec<u8>>, CatalogError> {
            Ok(self.with(|images| {
                let range = images.applied.range(low.to_vec()..=high.to_vec());
                range.map(|(key, _)| key.clone()).collect()
            }))
        }

        fn scan(&self, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), CatalogError> {
            let map = self.with(|images| images.applied.clone());
            for (key, value) in &map {
                see(key, value);
            }
            Ok(())
        }

        fn apply(&self, changes: Vec<Change>) -> Result<(), CatalogError> {
            self.with(|images| {
                for (key, value) in changes {
                    match value {
                        Some(value) => {
                            assert!(value.len() <= VALUE_MAX, "value of {} bytes", value.len());
                            images.applied.insert(key, value.into());
                        }
                        None => drop(images.applied.remove(&key)),
                    }
                }
            });
            Ok(())
        }

        fn flush(&self) -> Result<(), CatalogError> {
            self.with(|images| images.flushed = images.applied.clone());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a panic within sled is an error, and known as such to a panic hook, on its own thread and only while it lasts. Method: a
    /// panic in guarded work within guarded work.
    #[test]
    fn a_guarded_panic_is_an_error_and_known_as_one() {
        assert!(!is_panic_guarded());
        let found = guarded(|| {
            let inner: Result<(), CatalogError> = guarded(|| panic!("no page {}", 3));
            let elsewhere = std::thread::scope(|scope| scope.spawn(is_panic_guarded).join());
            assert!(is_panic_guarded() && !elsewhere.unwrap());
            inner
        });
        assert!(found.unwrap_err().0.contains("no page 3"));
        assert!(!is_panic_guarded());
    }
}
