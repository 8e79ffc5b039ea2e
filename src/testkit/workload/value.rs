//! What a record of a run carries: its number, and bytes that follow from the number, so that damage shows.
//!
//! Owns the format: value (8 bytes), partition (4), length (4), then filler derived from all three; big endian.

use bytes::{BufMut, Bytes, BytesMut};

use crate::testkit::history::STRANGE_VALUE;

/// Fewest bytes of a value: the head and eight bytes of filler.
pub const VALUE_BYTES_MIN: usize = HEAD_BYTES + 8;
const HEAD_BYTES: usize = 16;

/// The bytes of a record that carries `value` and is sent to `partition`: `bytes` of them, at least [`VALUE_BYTES_MIN`].
pub fn encode_value(value: u64, partition: u32, bytes: usize) -> Bytes {
    let bytes = bytes.max(VALUE_BYTES_MIN);
    let length = u32::try_from(bytes).unwrap_or(u32::MAX);
    let mut encoded = BytesMut::with_capacity(bytes + 8);
    encoded.put_u64(value);
    encoded.put_u32(partition);
    encoded.put_u32(length);
    let mut state = value ^ (u64::from(partition) << 32 | u64::from(length)).rotate_left(17);
    while encoded.len() < bytes {
        encoded.put_u64(next(&mut state));
    }
    encoded.truncate(bytes);
    encoded.freeze()
}

/// The value that `bytes` carry; [`STRANGE_VALUE`] when a single bit is not as [`encode_value`] made it. That it was sent to another
/// partition is no damage: the checker sees that from the value.
pub fn decode_value(bytes: &[u8]) -> u64 {
    let number = |from: usize, to: usize| {
        bytes.get(from..to).map(|bytes| {
            bytes
                .iter()
                .fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        })
    };
    let (Some(value), Some(partition)) = (number(0, 8), number(8, 12)) else {
        return STRANGE_VALUE;
    };
    let Ok(partition) = u32::try_from(partition) else {
        return STRANGE_VALUE;
    };
    if encode_value(value, partition, bytes.len()) == bytes {
        value
    } else {
        STRANGE_VALUE
    }
}

/// `SplitMix64`: every state leads to another word.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: damage of any kind shows. Method: every single bit flipped, every prefix, some bytes added.
    #[test]
    fn any_damage_makes_a_value_strange() {
        for bytes in [0, VALUE_BYTES_MIN, 50] {
            let good = encode_value(17, 3, bytes);
            assert_eq!(decode_value(&good), 17);
            for bit in 0..good.len() * 8 {
                let mut bad = good.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(decode_value(&bad), STRANGE_VALUE, "bit {bit}");
            }
            for length in 0..good.len() {
                assert_eq!(decode_value(&good[..length]), STRANGE_VALUE, "{length}");
            }
            let longer = [&good[..], &[0]].concat();
            assert_eq!(decode_value(&longer), STRANGE_VALUE);
        }
        assert_eq!(decode_value(&[0; 64]), STRANGE_VALUE);
    }
}
