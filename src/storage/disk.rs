//! The seam to the disk: the only place of the store that names a file of the operating system.
//!
//! Owns [`Disk`] and [`DiskFile`], the handful of operations the store is built on, and [`RealDisk`], which does
//! them on a directory. Every path is relative to the data directory. Nothing here retries: an error is final,
//! and the caller stops. The twin in memory, which can lose power, is in `memdisk.rs`.

use std::any::Any;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::catalog::{Catalog, CatalogError, SledCatalog};

/// What holds the directory's lock until it is dropped.
pub(super) type Lock = Box<dyn Any + Send + Sync>;

/// A directory the store can keep its files in.
pub(super) trait Disk: fmt::Debug + Send + Sync {
    /// Creates the directory itself when it is not there, durably.
    fn create_root(&self) -> io::Result<()>;
    /// Takes the directory's lock; `None` when another holder has it.
    fn lock(&self) -> io::Result<Option<Lock>>;
    /// Creates a directory inside the root; no error when it is there.
    fn create_dir(&self, path: &str) -> io::Result<()>;
    /// Names in a directory, sorted; `None` when the directory does not exist.
    fn list(&self, path: &str) -> io::Result<Option<Vec<String>>>;
    /// Opens a file for reading and writing.
    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Creates an empty file, or empties the one that is there, and opens it.
    fn create(&self, path: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Renames a file, replacing what has the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &str) -> io::Result<()>;
    /// Makes creations, renames and removals in a directory durable; the root is `""`.
    fn sync_dir(&self, path: &str) -> io::Result<()>;
    /// Free bytes.
    fn free(&self) -> io::Result<u64>;
    /// Opens the catalog, creating it when it is not there.
    fn open_catalog(&self, cache_bytes: u64) -> Result<Arc<dyn Catalog>, CatalogError>;
    /// Throws the catalog away.
    fn remove_catalog(&self) -> io::Result<()>;
    /// How long the next operation takes in simulated time.
    #[cfg(feature = "sim")]
    fn pace(&self) -> std::time::Duration {
        std::time::Duration::ZERO
    }
}

/// An open file. Positions are absolute, so that it can be shared.
pub(super) trait DiskFile: fmt::Debug + Send + Sync {
    /// Reads at most `buffer.len()` bytes; fewer only at the file's end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Cuts or extends (with zeroes) the file.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// The file's length.
    fn len(&self) -> io::Result<u64>;
    /// Makes content and length durable.
    fn sync(&self) -> io::Result<()>;
}

/// The whole content of a small file; `None` when it does not exist.
pub(super) fn read_small(disk: &dyn Disk, path: &str, max: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let len = usize::try_from(file.len()?.min(max)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len];
    let got = file.read_at(&mut bytes, 0)?;
    bytes.truncate(got);
    Ok(Some(bytes))
}

/// Replaces a small file as a whole: after a crash it has either the old or the new content, and the new one once
/// this has returned.
pub(super) fn replace_small(disk: &dyn Disk, path: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = format!("{path}.new");
    let file = disk.create(&temporary)?;
    file.write_at(bytes, 0)?;
    file.sync()?;
    disk.rename(&temporary, path)?;
    disk.sync_dir("")
}

/// A directory of the operating system.
#[derive(Debug)]
pub(super) struct RealDisk {
    root: PathBuf,
}

impl RealDisk {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }
}

fn sync_path(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Disk for RealDisk {
    fn create_root(&self) -> io::Result<()> {
        match fs::metadata(&self.root) {
            Ok(found) if found.is_dir() => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
            Err(_) => {}
        }
        let missing: Vec<&Path> = self
            .root
            .ancestors()
            .take_while(|path| !path.is_dir())
            .collect();
        fs::create_dir_all(&self.root)?;
        // Each new directory is an entry in its parent, and lost with it when the parent is not synced.
        for path in missing {
            match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => sync_path(parent)?,
                _ => sync_path(Path::new("."))?,
            }
        }
        Ok(())
    }

    fn lock(&self) -> io::Result<Option<Lock>> {
        let path = self.root.join("LOCK");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        match fs::create_dir(self.root.join(path)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn list(&self, path: &str) -> io::Result<Option<Vec<String>>> {
        let entries = match fs::read_dir(self.root.join(path)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(Some(names))
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.root.join(path);
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => Ok(Arc::new(RealFile(file))),
            // An offline check may run on a copy it cannot write to; a write then fails by itself.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Ok(Arc::new(RealFile(File::open(path)?)))
            }
            Err(error) => Err(error),
        }
    }

    fn create(&self, path: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        Ok(Arc::new(RealFile(options.open(self.root.join(path))?)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.root.join(from), self.root.join(to))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.root.join(path))
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        sync_path(&self.root.join(path))
    }

    fn free(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn open_catalog(&self, cache_bytes: u64) -> Result<Arc<dyn Catalog>, CatalogError> {
        Ok(Arc::new(SledCatalog::open(
            &self.root.join("catalog"),
            cache_bytes,
        )?))
    }

    fn remove_catalog(&self) -> io::Result<()> {
        match fs::remove_dir_all(self.root.join("catalog")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn read_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<usize> {
        let mut total = 0;
        while !buffer.is_empty() {
            let got = match self.0.read_at(buffer, offset) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            total += got;
            offset += got as u64;
            buffer = buffer.get_mut(got..).unwrap_or_default();
        }
        Ok(total)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
