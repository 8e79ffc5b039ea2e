//! Opening a data directory: judge first, change afterwards.
//!
//! Owns the order of things at start: content, lock, identity, watermark, survey of the journal, catalog, scan, checks; only
//! when all of that has succeeded are torn bytes cut, leftovers removed, the catalog brought up to date and the boot
//! counted. A directory that is refused is left as it was (but for the catalog, which is a cache).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, RwLock};

use bytes::Bytes;
use tokio::sync::watch;

use super::catalog::Catalog;
use super::cataloger::{CatalogQueue, Cataloger, remove_segments};
use super::claim::Claim;
use super::cleaner::Cleaner;
use super::committer::{Committer, Queue};
use super::core::{Core, JOURNAL_DIR, segment_path};
use super::disk::{Disk, DiskFile, Lock};
use super::frame::{
    FRAME_HEADER, SEGMENT_HEADER, SegmentHead, get_checkpoint, get_head, seed, verify,
};
use super::group::{Group, Kept, Log};
use super::identity::{self, Identity, Mark, Watermark};
use super::ledger::{Ledger, Meta};
use super::scan::{Scan, ScanError, Survey, survey};
use super::{Checkpoint, DirectoryIdentity, StorageError, StoreConfig};
use crate::runtime;
use crate::types::{BrokerId, GroupId, Incarnation, ReplicaId};

/// A store ready to run.
pub(super) struct Opened {
    pub(super) core: Arc<Core>,
    pub(super) committer: Committer,
    pub(super) cataloger: Cataloger,
}

struct Opener<'a> {
    disk: Arc<dyn Disk>,
    config: &'a StoreConfig,
    broker: BrokerId,
}

impl Opener<'_> {
    fn io(&self, error: &io::Error) -> StorageError {
        let directory = self.config.directory.display();
        StorageError::Failed {
            what: format!("cannot open {directory}: {error}"),
        }
    }

    fn claim(&self) -> Claim<'_> {
        Claim {
            disk: &*self.disk,
            directory: &self.config.directory,
            broker: self.broker,
        }
    }

    fn damaged(&self, what: String) -> StorageError {
        self.claim().damaged(what)
    }

    fn scan_error(&self, error: ScanError) -> StorageError {
        self.claim().scan_error(error)
    }

    /// Makes a new directory; its identity comes last, so that it either is there as a whole or begins again.
    fn create(&self) -> Result<(Identity, Mark), StorageError> {
        let make = || -> io::Result<(Identity, Mark)> {
            let incarnation = Incarnation(runtime::random_u128());
            self.disk.create_dir(JOURNAL_DIR)?;
            self.disk.sync_dir("")?;
            let file = self.disk.create(&segment_path(0))?;
            file.write_at(
                &SegmentHead {
                    incarnation,
                    base: 0,
                    first: 0,
                }
                .encode(),
                0,
            )?;
            file.sync()?;
            self.disk.sync_dir(JOURNAL_DIR)?;
            let mark = Mark {
                sequence: 0,
                position: SEGMENT_HEADER,
            };
            drop(Watermark::open(&*self.disk, incarnation, mark, true)?);
            self.disk.remove_catalog()?;
            self.disk.sync_dir("")?;
            let identity = Identity {
                broker: self.broker,
                incarnation,
                cluster: None,
                boot: 0,
            };
            identity::write(&*self.disk, &identity)?;
            Ok((
                identity,
                Mark {
                    sequence: 2,
                    ..mark
                },
            ))
        };
        make().map_err(|error| self.io(&error))
    }

    /// What the journal says, from the catalog and the frames after it, or from all frames.
    fn recover(
        &self,
        identity: &Identity,
        mark: Mark,
        survey: &Survey,
    ) -> Result<(Scan, Ledger, Arc<dyn Catalog>), StorageError> {
        let incarnation = identity.incarnation;
        let lowest = survey.bases.first().copied().unwrap_or(0);
        match self.load(incarnation, &survey.bases) {
            Ok(Some((catalog, mut ledger))) if ledger.position >= lowest => {
                let mut scan = Scan::new(incarnation, 0, mark.position);
                let run = scan.run(&*self.disk, survey, &mut ledger, true);
                match run.and_then(|()| Ok(ledger.complete()?)) {
                    Ok(()) => return Ok((scan, ledger, catalog)),
                    Err(ScanError::Ledger(error)) => {
                        tracing::warn!(?error, "the catalog does not fit the journal");
                    }
                    Err(error) => return Err(self.scan_error(error)),
                }
            }
            Ok(Some((_, ledger))) => {
                let position = ledger.position;
                tracing::warn!(position, lowest, "the catalog is older than the journal");
            }
            Ok(None) => tracing::info!("no catalog that can be trusted"),
            Err(error) => tracing::warn!(%error, "the catalog cannot be read"),
        }
        tracing::info!(
            bytes = survey.bytes,
            "rebuilding the catalog from the journal"
        );
        self.disk
            .remove_catalog()
            .map_err(|error| self.io(&error))?;
        let catalog = self.disk.open_catalog(self.config.catalog_cache_bytes);
        let catalog = catalog.map_err(|error| StorageError::Failed {
            what: error.to_string(),
        })?;
        let mut ledger = Ledger::empty(catalog.clone(), incarnation, &survey.bases);
        let mut scan = Scan::new(incarnation, 0, mark.position);
        let run = scan.run(&*self.disk, survey, &mut ledger, true);
        run.and_then(|()| Ok(ledger.complete()?))
            .map_err(|error| self.scan_error(error))?;
        Ok((scan, ledger, catalog))
    }

    #[allow(clippy::type_complexity)] // one caller
    fn load(
        &self,
        incarnation: Incarnation,
        bases: &[u64],
    ) -> Result<Option<(Arc<dyn Catalog>, Ledger)>, super::catalog::CatalogError> {
        let catalog = self.disk.open_catalog(self.config.catalog_cache_bytes)?;
        let ledger = Ledger::load(&catalog, incarnation, bases)?;
        Ok(ledger.map(|ledger| (catalog, ledger)))
    }

    /// The segment to go on writing, cut after its last frame, durable up to there whatever was `marked` so before.
    fn tidy(
        &self,
        survey: &mut Survey,
        scan: &Scan,
        incarnation: Incarnation,
        marked: u64,
    ) -> io::Result<(Arc<dyn DiskFile>, u64)> {
        if let Some(base) = survey.unborn {
            let file = self.disk.create(&segment_path(base))?;
            file.write_at(
                &SegmentHead {
                    incarnation,
                    base,
                    first: survey.first,
                }
                .encode(),
                0,
            )?;
            file.sync()?;
            self.disk.sync_dir(JOURNAL_DIR)?;
            survey.bases.push(base);
            return Ok((file, base + SEGMENT_HEADER));
        }
        let base = survey.bases.last().copied().unwrap_or(0);
        let file = self.disk.open(&segment_path(base))?;
        if survey.last_len != scan.end - base {
            tracing::info!(
                bytes = scan.torn,
                position = scan.end,
                "dropping a torn tail"
            );
            file.set_len(scan.end - base)?;
        }
        write_again(&*file, marked.max(base) - base, scan.end - base)?;
        file.sync()?;
        self.disk.sync_dir(JOURNAL_DIR)?;
        Ok((file, scan.end))
    }

    /// The base of a group, read back from the journal.
    fn base(
        &self,
        group: GroupId,
        meta: &Meta,
        bases: &BTreeSet<u64>,
        seed: u32,
    ) -> Result<Option<Checkpoint>, StorageError> {
        let Some((id, position, length)) = meta.base else {
            return Ok(None);
        };
        let wrong = || {
            self.damaged(format!(
                "the base of group {group}, at {position}, is wrong"
            ))
        };
        let segment = bases
            .range(..=position)
            .next_back()
            .copied()
            .ok_or_else(wrong)?;
        let mut bytes = vec![0; FRAME_HEADER + length as usize];
        let read = || -> io::Result<usize> {
            let file = self.disk.open(&segment_path(segment))?;
            file.read_at(&mut bytes, position - segment)
        };
        let got = { read }().map_err(|error| self.claim().unusable(&error))?;
        let frame = bytes
            .get(..got)
            .and_then(|bytes| bytes.split_at_checked(FRAME_HEADER));
        let checkpoint = frame.and_then(|(header, payload)| {
            let head = get_head(header)?;
            let same = head.group == group && head.id() == id;
            (same && verify(&head, header, payload, seed, position)).then_some(())?;
            get_checkpoint(id, payload.get(1..)?)
        });
        checkpoint.map(Some).ok_or_else(wrong)
    }

    fn groups(
        &self,
        ledger: &Ledger,
        catalog: &dyn Catalog,
        bases: &BTreeSet<u64>,
        seed: u32,
    ) -> Result<BTreeMap<GroupId, Arc<Group>>, StorageError> {
        let mut groups = BTreeMap::new();
        for (group, meta) in &ledger.groups {
            let mut log = Log::new(ReplicaId::from_u64(meta.replica.unwrap_or(0)));
            log.vote = meta.vote.as_ref().map(|vote| Bytes::copy_from_slice(vote));
            (log.purged, log.last) = (meta.purged, meta.last);
            (log.first, log.next, log.tail_start) = (meta.first, meta.next, meta.next);
            log.before_tail = meta.last;
            log.base = self.base(*group, meta, bases, seed)?;
            let known = ledger.checkpoints.get(group).into_iter().flatten();
            for (index, id) in known {
                let kept = Kept {
                    id: *id,
                    content: None,
                    stored: true,
                };
                log.checkpoints.insert(*index, kept);
            }
            if let Some(kept) = log.checkpoints.values_mut().next_back() {
                let found = super::ledger::checkpoint(catalog, *group, kept.id);
                kept.content = found.map_err(|error| StorageError::Failed {
                    what: error.to_string(),
                })?;
            }
            groups.insert(*group, Arc::new(Group::new(*group, log)));
        }
        Ok(groups)
    }
}

/// Writes the bytes from `from` to `to` once more as they are. When a sync fails, the operating system may go on showing what was
/// written and yet never write it to the disk, not with any later sync either: only bytes written again are surely synced.
fn write_again(file: &dyn DiskFile, mut from: u64, to: u64) -> io::Result<()> {
    const PIECE: u64 = 1 << 20;
    #[cfg(feature = "sim")]
    if runtime::sim::makes(runtime::sim::Bug::TailTrusted) {
        return Ok(());
    }
    while from < to {
        let mut bytes = vec![0; usize::try_from((to - from).min(PIECE)).unwrap_or(0)];
        let got = file.read_at(&mut bytes, from)?;
        bytes.truncate(got);
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.write_at(&bytes, from)?;
        from += got as u64;
    }
    Ok(())
}

/// Opens the store on `disk`.
pub(super) fn open(
    disk: &Arc<dyn Disk>,
    config: &StoreConfig,
    broker: BrokerId,
) -> Result<Opened, StorageError> {
    let opener = Opener {
        disk: disk.clone(),
        config,
        broker,
    };
    let io = |error: io::Error| opener.io(&error);
    let claim = opener.claim();
    let unusable = |error: io::Error| claim.unusable(&error);
    disk.create_root().map_err(unusable)?;
    claim.check_content()?;
    let lock = disk.lock().map_err(unusable)?;
    let lock = lock.ok_or_else(|| claim.in_use())?;
    let (identity, mark) = match claim.identify()? {
        Some(known) => known,
        None => opener.create()?,
    };
    let incarnation = identity.incarnation;
    let mut survey =
        survey(&**disk, incarnation, mark.position).map_err(|error| opener.scan_error(error))?;
    // What a killed process had written but not synced is about to count as durable: make it so.
    if let Some(base) = survey.bases.last() {
        disk.open(&segment_path(*base))
            .and_then(|file| file.sync())
            .map_err(io)?;
    }
    let (scan, mut ledger, catalog) = opener.recover(&identity, mark, &survey)?;
    let lowest = survey.bases.first().copied().unwrap_or(0);
    let first = ledger.first_segment.max(survey.first);
    if lowest > first || (first != 0 && !survey.bases.contains(&first)) {
        let what = format!("the journal should begin at {first}, but begins at {lowest}");
        return Err(opener.damaged(what));
    }
    let bases: BTreeSet<u64> = survey.bases.iter().copied().collect();
    let groups = opener.groups(&ledger, &*catalog, &bases, seed(incarnation))?;

    // From here on the directory is changed.
    let (file, end) = opener
        .tidy(&mut survey, &scan, incarnation, mark.position)
        .map_err(io)?;
    let segment = survey.bases.last().copied().unwrap_or(0);
    ledger.segment(segment, end);
    ledger.first_segment = first;
    ledger
        .sync(Vec::new())
        .map_err(|error| StorageError::Failed {
            what: error.to_string(),
        })?;
    // A random step: two processes that start from the same state (the directory and a copy of it) differ in it.
    let step = u64::try_from(runtime::random_u128() & u128::from(u32::MAX)).unwrap_or(0);
    let identity = Identity {
        boot: identity.boot + 1 + step,
        ..identity
    };
    identity::write(&**disk, &identity).map_err(io)?;
    let mark = Mark {
        position: end,
        ..mark
    };
    let watermark = Watermark::open(&**disk, incarnation, mark, false).map_err(io)?;

    let core = Arc::new(core(&opener, identity, lock, end, segment, catalog, groups));
    *super::lock(&core.segments) = survey.bases.iter().copied().collect();
    core.first_segment
        .store(first, std::sync::atomic::Ordering::Release);
    remove_segments(&core, first).map_err(io)?;
    ledger.forget_segments(first);
    let mut chains: HashMap<GroupId, u32> = ledger
        .groups
        .iter()
        .map(|(group, meta)| (*group, meta.chain))
        .collect();
    chains.insert(super::frame::JOURNAL, ledger.journal_chain());
    let allocated = end - segment;
    let committer = Committer {
        core: core.clone(),
        file,
        segment,
        allocated,
        watermark,
        chains,
    };
    let cataloger = Cataloger {
        core: core.clone(),
        ledger,
        synced: end,
        leaving: None,
        cleaner: Cleaner::default(),
    };
    Ok(Opened {
        core,
        committer,
        cataloger,
    })
}

fn core(
    opener: &Opener<'_>,
    identity: Identity,
    lock: Lock,
    end: u64,
    segment: u64,
    catalog: Arc<dyn Catalog>,
    groups: BTreeMap<GroupId, Arc<Group>>,
) -> Core {
    let Identity {
        broker,
        incarnation,
        cluster,
        boot,
    } = identity;
    Core {
        disk: opener.disk.clone(),
        config: opener.config.clone(),
        incarnation,
        identity: Mutex::new(DirectoryIdentity {
            broker,
            incarnation,
            cluster,
            boot,
            position: end,
        }),
        queue: Queue::new(end, segment),
        catalog_queue: CatalogQueue::default(),
        durable: AtomicU64::new(end),
        flushes: AtomicU64::new(0),
        flushed_entries: AtomicU64::new(0),
        flushed_bytes: AtomicU64::new(0),
        cataloged: AtomicU64::new(end),
        first_segment: AtomicU64::new(0),
        groups: Mutex::new(groups),
        segments: Mutex::new(BTreeSet::new()),
        catalog: RwLock::new(Some(catalog)),
        lock: Mutex::new(Some(lock)),
        failure: watch::Sender::new(None),
        has_failed: AtomicBool::new(false),
        room: Mutex::new(None),
    }
}
