//! Doors for fuzzing: what this module makes of committed commands and of a snapshot's state.
//!
//! Owns nothing. Called by the targets in `fuzz/` and by the replay of their corpus; each door panics when a property that it
//! checks does not hold.

use bytes::Bytes;

use super::state_machine::{PartitionMachine, records_command, trim_command};
use crate::raft::StateMachine;
use crate::record::{self, ProducerStamp, Record};
use crate::types::{EntryId, LeaderEpoch, LogIndex, Offset};

/// Where a batch's checksum stands, and where what it covers begins.
const CRC: (usize, usize) = (17, 21);

/// A snapshot's state: refused, or taken and given back as it was.
#[allow(clippy::panic)]
pub fn snapshot(data: &[u8]) {
    let mut machine = PartitionMachine::default();
    if machine.restore(Some(&Bytes::copy_from_slice(data))).is_ok() {
        let (state, _) = machine.checkpoint();
        let mut twin = PartitionMachine::default();
        if let Err(error) = twin.restore(Some(&state)) {
            panic!("a restored state cannot be restored again: {error}");
        }
        assert_eq!(twin.checkpoint().0, state, "a state changed");
        // And it can be gone on with.
        let mut index = 0;
        for command in [append(1, 0, 0, 2), append(2, 0, 0, 1)]
            .into_iter()
            .flatten()
        {
            index += 1;
            let id = EntryId {
                epoch: LeaderEpoch(u64::MAX / 2),
                index: LogIndex(u64::MAX / 2 + index),
            };
            assert_eq!(machine.apply(id, &command), twin.apply(id, &command));
        }
    }
}

/// Commands as a leader proposes them: each a byte that says which, and what it is made of. Two machines agree, of which one is
/// restored from a checkpoint on the way.
pub fn commands(data: &[u8]) {
    let mut machine = PartitionMachine::default();
    let mut twin = PartitionMachine::default();
    let mut rest = data;
    for index in 0..48_u64 {
        let Some(([which, a, b, c], more)) = rest.split_first_chunk::<4>() else {
            break;
        };
        rest = more;
        let command = match which % 4 {
            0 | 1 => append(
                (a % 4).into(),
                (a / 4 % 4).into(),
                i32::from(*b) * 8,
                c % 8 + 1,
            ),
            2 => Some(trim_command(Offset(if *a > 250 {
                u64::MAX
            } else {
                u64::from(*a) * u64::from(*b)
            }))),
            _ => {
                let (raw, behind) = rest.split_at(usize::from(*a).min(rest.len()));
                rest = behind;
                raw_append(raw)
            }
        };
        let Some(command) = command else { continue };
        let id = EntryId {
            epoch: LeaderEpoch(index / 8 + 1),
            index: LogIndex(index),
        };
        assert_eq!(
            machine.apply(id, &command),
            twin.apply(id, &command),
            "two replicas answer differently"
        );
        if c % 5 == 0 {
            let (state, _) = twin.checkpoint();
            twin = PartitionMachine::default();
            assert_eq!(
                twin.restore(Some(&state)),
                Ok(()),
                "a checkpoint is refused"
            );
        }
    }
    machine.checkpoint();
    assert_eq!(
        twin.checkpoint().0,
        machine.checkpoint().0,
        "two replicas differ"
    );
}

fn append(id: i64, epoch: i16, base_sequence: i32, count: u8) -> Option<Bytes> {
    let records: Vec<Record> = (0..count)
        .map(|number| Record {
            timestamp_ms: i64::from(number),
            key: None,
            value: Some(Bytes::copy_from_slice(&[number])),
            headers: Vec::new(),
        })
        .collect();
    let stamp = ProducerStamp {
        id,
        epoch,
        base_sequence,
    };
    let batch = record::encode_batch(&records, (id > 0).then_some(stamp)).ok()?;
    Some(records_command([batch].iter()))
}

/// Any bytes, with a right checksum, if the broker would take them.
fn raw_append(raw: &[u8]) -> Option<Bytes> {
    let mut bytes = raw.to_vec();
    let crc = crc32c::crc32c(bytes.get(CRC.1..)?);
    bytes
        .get_mut(CRC.0..CRC.1)?
        .copy_from_slice(&crc.to_be_bytes());
    let records = Bytes::from(bytes);
    record::validate(&records, 1 << 20).ok()?;
    Some(records_command([records].iter()))
}

/// Commands and states to begin with: the first is for [`snapshot`], the others for [`commands`].
pub fn seeds() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let mut machine = PartitionMachine::default();
    let mut states = vec![machine.checkpoint().0.to_vec()];
    let steps = [(1, 0, 2), (2, 0, 1), (1, 2, 3), (0, 0, 5), (3, 0, 8)];
    for (index, (producer, sequence, count)) in (0..).zip(steps) {
        let id = EntryId {
            epoch: LeaderEpoch(1),
            index: LogIndex(index),
        };
        if let Some(command) = append(producer, 0, sequence, count) {
            machine.apply(id, &command);
        }
        states.push(machine.checkpoint().0.to_vec());
    }
    let raw = append(1, 0, 0, 3).unwrap_or_default().slice(1..);
    let mut with_raw = vec![3, u8::try_from(raw.len()).unwrap_or(u8::MAX), 0, 1];
    with_raw.extend_from_slice(&raw);
    let commands = vec![
        vec![0, 1, 0, 7, 0, 1, 1, 7, 0, 1, 1, 5, 2, 3, 2, 1],
        vec![0, 5, 0, 7, 0, 1, 0, 7, 0, 5, 9, 0, 2, 255, 0, 0],
        vec![0, 0, 0, 7, 0, 0, 0, 5, 2, 2, 2, 5, 0, 0, 0, 5],
        with_raw,
        (0..40_u8).flat_map(|n| [0, n % 3, n / 3, 7]).collect(),
    ];
    (states, commands)
}
