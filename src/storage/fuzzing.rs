//! Doors for fuzzing: what this module makes of a data directory.
//!
//! Owns nothing. Called by the targets in `fuzz/` and by the replay of their corpus; each door panics when a property that it
//! checks does not hold.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::core::segment_path;
use super::disk::Disk;
use super::frame::{
    Frame, Kind, PAYLOAD_MAX, SegmentHead, get_checkpoint, get_head, put_checkpoint, put_frame,
    seed, verify,
};
use super::identity::{self, Found, Identity, Mark};
use super::memdisk::Powered;
use super::open::open;
use super::{Checkpoint, EntryKind, LogEntry, MemDisk, Store, StoreConfig, Verdict};
use crate::types::{
    BrokerId, EntryId, GroupId, Incarnation, LeaderEpoch, LogIndex, ReplicaId, ReplicaKind,
};

const BROKER: BrokerId = BrokerId(1);
const INCARNATION: Incarnation = Incarnation(0x5eed);
/// Most frames of a journal that the input is turned into.
const FRAMES_MAX: usize = 64;

fn config() -> StoreConfig {
    StoreConfig {
        directory: PathBuf::from("memory"),
        segment_bytes: 64 << 10,
        cache_bytes: 64 << 10,
        catalog_cache_bytes: 64 << 10,
        catalog_sync_bytes: 16 << 10,
        commit_bytes_max: 16 << 10,
        reserve_bytes: 0,
    }
}

fn put(disk: &dyn Disk, path: &str, bytes: &[u8]) {
    let file = disk.create(path).and_then(|file| {
        file.write_at(bytes, 0)?;
        file.sync()
    });
    assert!(file.is_ok(), "the disk in memory fails: {file:?}");
}

fn empty() -> Arc<dyn Disk> {
    let disk: Arc<dyn Disk> = Arc::new(Powered::new(&MemDisk::new()));
    disk.create_root().ok();
    disk.create_dir(super::core::JOURNAL_DIR).ok();
    put(&*disk, "LOCK", b"");
    disk
}

/// Opens what is on `disk`: it works or is refused, and what has worked once works again and is sound.
fn opens(disk: &Arc<dyn Disk>) {
    let before = super::fsck::check(&**disk).verdict;
    let Ok(opened) = open(disk, &config(), BROKER) else {
        return;
    };
    drop(opened);
    let after = super::fsck::check(&**disk);
    assert!(
        after.verdict == Verdict::Ok,
        "checked before: {before:?}; what was opened is not sound: {after:?}"
    );
    let again = open(disk, &config(), BROKER);
    assert!(
        again.is_ok(),
        "it opened once and not again: {:?}",
        again.err()
    );
}

/// A data directory: files one behind the other, each a byte that says which, two bytes of length, and the content.
pub fn directory(data: &[u8]) {
    let disk = empty();
    let mut rest = data;
    while let Some(([which, high, low], content)) = rest.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(content.len());
        let (content, behind) = content.split_at(length);
        rest = behind;
        let path = match which % 8 {
            0 => "identity".to_owned(),
            1 => "watermark".to_owned(),
            2 => "identity.new".to_owned(),
            // The content's own header says where a segment begins.
            3..=6 => match SegmentHead::decode(content) {
                Some(head) => segment_path(head.base),
                None => segment_path(u64::from(*which) - 3),
            },
            _ => format!("{}/{}", super::core::JOURNAL_DIR, which),
        };
        put(&*disk, &path, content);
    }
    opens(&disk);
}

/// A journal of one segment with right checksums whose frames say anything: what no bit flip makes, and a bug could.
pub fn journal(data: &[u8]) {
    let Some((end_gap, mut rest)) = data.split_first() else {
        return;
    };
    let seed = seed(INCARNATION);
    let head = SegmentHead {
        incarnation: INCARNATION,
        base: 0,
        first: 0,
    };
    let mut segment = head.encode();
    let mut chains = std::collections::HashMap::new();
    for _ in 0..FRAMES_MAX {
        let Some(([kind, entry, group, index, term, flags, length], more)) =
            rest.split_first_chunk::<7>()
        else {
            break;
        };
        let (payload, behind) = more.split_at(usize::from(*length).min(more.len()));
        rest = behind;
        let (Some(kind), group) = (Kind::from_code(kind % 11), GroupId(u64::from(group % 4)))
        else {
            continue;
        };
        // A number far away now and then, where sums go over.
        let number = |byte: u8| {
            if byte > 250 {
                u64::MAX - u64::from(255 - byte)
            } else {
                byte.into()
            }
        };
        let (index, term) = (number(*index), number(*term));
        let at = EntryId {
            epoch: LeaderEpoch(term),
            index: LogIndex(index),
        };
        let checkpoint = Checkpoint {
            id: at,
            membership: Bytes::copy_from_slice(payload),
            state: Bytes::new(),
        };
        let mut frame = match kind {
            Kind::Base if flags & 1 == 0 => Frame::base(group, &checkpoint, flags & 2 != 0),
            Kind::Created | Kind::CarriedGroup if flags & 1 == 0 => {
                Frame::replica(kind, group, ReplicaId::new(BROKER, ReplicaKind::Data, 1))
            }
            _ => Frame::plain(kind, group, at, Bytes::copy_from_slice(payload)),
        };
        if kind.is_entry() {
            frame.entry = entry % 3 + 1;
        }
        let position = segment.len() as u64;
        let chain = match flags & 0x30 {
            0x10 => 0,
            0x20 => u32::from(*entry),
            _ if kind == Kind::Created => 0,
            _ => chains.get(&group).copied().unwrap_or(0),
        };
        let durable = if flags & 0x40 == 0 {
            position
        } else {
            u64::from(*entry)
        };
        let head = put_frame(&mut segment, &frame, seed, position, durable, chain);
        chains.insert(group, head.crc);
    }
    let disk = empty();
    let identity = Identity {
        broker: BROKER,
        incarnation: INCARNATION,
        cluster: None,
        boot: 1,
    };
    assert!(
        identity::write(&*disk, &identity).is_ok(),
        "the disk in memory fails"
    );
    let mark = Mark {
        sequence: 2,
        position: (segment.len() as u64).saturating_sub(u64::from(*end_gap)),
    };
    put(&*disk, &segment_path(0), &segment);
    let written = identity::Watermark::open(&*disk, INCARNATION, mark, true);
    assert!(written.is_ok(), "the disk in memory fails: {written:?}");
    opens(&disk);
}

/// Small pieces: the header of a frame and of a segment, a checkpoint, an identity, a watermark. What is read and written
/// again is what it was.
pub fn pieces(data: &[u8]) {
    if let Some(head) = get_head(data) {
        assert!(head.length as usize <= PAYLOAD_MAX, "a frame of any size");
        let payload = data.get(super::frame::FRAME_HEADER..).unwrap_or_default();
        let payload = payload.get(..head.length as usize).unwrap_or(payload);
        verify(&head, data, payload, seed(INCARNATION), head.position);
    }
    if let Some(head) = SegmentHead::decode(data) {
        assert_eq!(
            SegmentHead::decode(&head.encode()),
            Some(head),
            "a segment's head changed"
        );
    }
    if let Some(checkpoint) = get_checkpoint(EntryId::default(), data) {
        let mut again = bytes::BytesMut::new();
        put_checkpoint(&mut again, &checkpoint);
        assert_eq!(again, data, "a checkpoint changed");
    }
    let disk = empty();
    put(&*disk, "identity", data);
    put(&*disk, "watermark", data);
    if let Ok(Found::Identity(found)) = identity::read(&*disk) {
        assert_eq!(
            identity::encode_identity(&found, super::frame::FORMAT),
            data,
            "an identity changed"
        );
    }
    assert!(
        identity::read_watermark(&*disk, INCARNATION).is_ok(),
        "the disk in memory fails"
    );
}

/// Directories and pieces of them to begin with: one that has been used, whole and without single files.
#[allow(clippy::panic)]
pub async fn directory_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for crowded in [false, true] {
        let disk = MemDisk::new();
        let Ok(store) = Store::open_in_memory(&disk, &config(), BROKER) else {
            panic!("the disk in memory fails");
        };
        for group in 1..=if crowded { 3 } else { 1 } {
            fill(&store, GroupId(group)).await;
        }
        store.close().await.ok();
        let files: Vec<(u8, Vec<u8>)> = disk
            .files()
            .into_iter()
            .filter_map(|(name, length)| {
                let which = match name.as_str() {
                    "identity" => 0,
                    "watermark" => 1,
                    _ if name.starts_with(super::core::JOURNAL_DIR) => 3,
                    _ => return None,
                };
                let powered = Powered::new(&disk);
                let mut bytes = vec![0; length];
                let file = powered.open(&name).ok()?;
                let got = file.read_at(&mut bytes, 0).ok()?;
                bytes.truncate(got);
                // Room that was made in advance and holds nothing yet.
                let used = bytes
                    .iter()
                    .rposition(|byte| *byte != 0)
                    .map_or(0, |last| last + 1);
                bytes.truncate(used.next_multiple_of(if which == 1 { 512 } else { 1 }));
                Some((which, bytes))
            })
            .collect();
        let packed = |files: &[&(u8, Vec<u8>)]| {
            let mut seed = Vec::new();
            for (which, bytes) in files {
                seed.push(*which);
                seed.extend(u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes());
                seed.extend(bytes);
            }
            seed
        };
        seeds.push(packed(&files.iter().collect::<Vec<_>>()));
        for (left_out, _) in &files {
            let some: Vec<_> = files
                .iter()
                .filter(|(which, _)| which != left_out)
                .collect();
            seeds.push(packed(&some));
        }
        seeds.extend(files.into_iter().map(|(_, bytes)| bytes));
    }
    seeds
}

/// Some of everything that a group can have in the journal.
async fn fill(store: &Store, group: GroupId) {
    let replica = ReplicaId::new(BROKER, ReplicaKind::Data, 1);
    let Ok(log) = store.group(group, replica) else {
        return;
    };
    let entry = |index: u64, kind, payload: &'static [u8]| LogEntry {
        id: EntryId {
            epoch: LeaderEpoch(1 + index / 4),
            index: LogIndex(index),
        },
        kind,
        payload: Bytes::from_static(payload),
    };
    log.save_vote(Bytes::from_static(b"vote")).await.ok();
    let (done, waits) = tokio::sync::oneshot::channel();
    let entries = vec![
        entry(0, EntryKind::Membership, b"members"),
        entry(1, EntryKind::Blank, b""),
        entry(2, EntryKind::Command, b"a command"),
        entry(3, EntryKind::Command, b"another"),
        entry(4, EntryKind::Command, b"to be cut off"),
    ];
    log.append(
        entries,
        Box::new(move || {
            done.send(()).ok();
        }),
    )
    .ok();
    waits.await.ok();
    log.truncate_after(Some(LogIndex(3))).ok();
    let checkpoint = Checkpoint {
        id: EntryId {
            epoch: LeaderEpoch(1),
            index: LogIndex(2),
        },
        membership: Bytes::from_static(b"members"),
        state: Bytes::from_static(b"state"),
    };
    log.save_checkpoint(checkpoint, Vec::new()).ok();
    log.purge(EntryId {
        epoch: LeaderEpoch(1),
        index: LogIndex(1),
    })
    .ok();
    log.save_vote(Bytes::from_static(b"another vote"))
        .await
        .ok();
}

/// Journals to begin with, as [`journal`] reads them.
pub fn journal_seeds() -> Vec<Vec<u8>> {
    // kind, entry, group, index, term, flags, payload.
    type Line = (u8, u8, u8, u8, u8, u8, &'static [u8]);
    let usual: [Line; 9] = [
        (6, 0, 1, 0, 0, 0, b""),
        (2, 0, 1, 0, 0, 0, b"vote"),
        (1, 2, 1, 0, 1, 0, b"members"),
        (1, 0, 1, 1, 1, 0, b""),
        (1, 1, 1, 2, 1, 0, b"command"),
        (1, 1, 1, 3, 2, 0, b"command"),
        (3, 0, 1, 3, 0, 0, b""),
        (5, 0, 1, 2, 1, 0, b"state"),
        (4, 0, 1, 1, 1, 0, b""),
    ];
    let packed = |gap: u8, lines: &[Line]| {
        let mut seed = vec![gap];
        for (kind, entry, group, index, term, flags, payload) in lines {
            let length = u8::try_from(payload.len()).unwrap_or(u8::MAX);
            seed.extend([*kind, *entry, *group, *index, *term, *flags, length]);
            seed.extend(*payload);
        }
        seed
    };
    let mut seeds = vec![packed(0, &usual), packed(20, &usual)];
    for leave_out in 0..usual.len() {
        let mut lines = usual.to_vec();
        lines.remove(leave_out);
        seeds.push(packed(0, &lines));
    }
    let ends: [Line; 4] = [
        (7, 0, 1, 0, 0, 0, b""),
        (8, 0, 0, 64, 0, 0, b""),
        (9, 1, 1, 2, 1, 0, b"command"),
        (10, 0, 1, 0, 0, 0, b""),
    ];
    for line in ends {
        let mut lines = usual.to_vec();
        lines.push(line);
        seeds.push(packed(0, &lines));
    }
    seeds
}
