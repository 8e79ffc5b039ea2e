//! Which partition a record goes to: Kafka's rule, so that keys land where Kafka's own clients put them.
//!
//! Owns the sticky choice for records without a key. Knows the number of partitions only.

/// Kafka's hash of a key: murmur2 with Kafka's seed, as a signed number.
pub fn murmur2(key: &[u8]) -> i32 {
    const M: u32 = 0x5bd1_e995;
    let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let mut hash = 0x9747_b28c_u32 ^ length;
    let mut words = key.chunks_exact(4);
    for word in &mut words {
        let mut k = little_endian(word).wrapping_mul(M);
        k ^= k >> 24;
        hash = hash.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        hash = (hash ^ little_endian(rest)).wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^= hash >> 15;
    hash.cast_signed()
}

fn little_endian(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u32::from(*byte))
}

/// The partition of a key among `partitions`, as Kafka's default partitioner has it.
pub(crate) fn partition_of(key: &[u8], partitions: u32) -> u32 {
    let positive = murmur2(key).cast_unsigned() & 0x7fff_ffff;
    positive % partitions.max(1)
}

/// Records without a key stay on one partition until a batch's worth of bytes went there, then go to another one: full
/// batches instead of one small batch per partition.
#[derive(Debug)]
pub(crate) struct Sticky {
    current: Option<u32>,
    bytes: usize,
    turn: u32,
}

impl Sticky {
    /// `start`: where the first choice begins to look; drawn, so that producers do not all begin at the same partition.
    pub(crate) fn new(start: u32) -> Self {
        Self {
            current: None,
            bytes: 0,
            turn: start,
        }
    }

    /// The partition of the next record of `size` bytes. A partition without a leader is passed over while another one has one.
    pub(crate) fn choose(
        &mut self,
        size: usize,
        batch_bytes: usize,
        partitions: u32,
        has_leader: impl Fn(u32) -> bool,
    ) -> u32 {
        let partitions = partitions.max(1);
        let chosen = match self.current {
            Some(current) if current < partitions && self.bytes < batch_bytes => current,
            _ => {
                self.bytes = 0;
                let first = self.turn % partitions;
                let round = (0..partitions).map(|step| (first + step) % partitions);
                let chosen = round.into_iter().find(|partition| has_leader(*partition));
                let chosen = chosen.unwrap_or(first);
                self.turn = chosen.wrapping_add(1);
                chosen
            }
        };
        self.current = Some(chosen);
        self.bytes = self.bytes.saturating_add(size);
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: keys hash as in Kafka. Method: the vectors of Kafka's own test of its hash.
    #[test]
    fn murmur2_is_kafkas() {
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            (
                "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58_897_971,
            ),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()), hash, "{key}");
        }
    }

    /// Goal: a negative hash still gives a partition, Kafka's one. Method: mask and modulo by hand.
    #[test]
    fn negative_hashes_are_masked() {
        // 2³¹ − 973932308 = 1173551340
        assert_eq!(partition_of(b"21", 1_000), 340);
        assert_eq!(partition_of(b"abc", 10), 7);
    }

    /// Goal: keyless records fill a batch, then move on, and pass by leaderless partitions. Method: count choices.
    #[test]
    fn sticky_moves_after_a_batch() {
        let mut sticky = Sticky::new(1);
        let mut choose = |has: fn(u32) -> bool| sticky.choose(50, 100, 3, has);
        assert_eq!([choose(|_| true), choose(|_| true)], [1, 1]);
        assert_eq!([choose(|p| p != 2), choose(|p| p != 2)], [0, 0]);
        assert_eq!(choose(|_| false), 1);
    }
}
