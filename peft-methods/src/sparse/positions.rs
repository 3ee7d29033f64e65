//! Sorted positions among `N` places as a stream of bytes.
//!
//! What is coded is the gap from each position to the next, as its number of binary digits and the digits: the number
//! and the three digits after the first with learnt probabilities, the rest as they are. There are `log₂ C(N, K)` bits in
//! `K` of `N` places drawn evenly; for 1000 or more of them the stream has at most 3 % and 64 bytes above that, and less
//! than that number where positions crowd together, for the probabilities follow. Four bytes of a checksum follow, for
//! digits that are stored as they are would hide damage.

use super::range_coder::{Bit, Decoder, Encoder};

/// Digits after the first whose probabilities are learnt.
const LEARNT: u32 = 3;
/// Places that positions can count.
const MOST_PLACES: u64 = i32::MAX as u64;
/// Gaps have at most 31 binary digits; their number less one takes five.
const DIGITS: u32 = 5;

/// Why bytes are no positions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PositionsError {
    /// More positions than places.
    #[error("{count} positions among {places} places")]
    TooMany {
        /// Positions.
        count: usize,
        /// Places.
        places: u64,
    },
    /// More places than a position can count.
    #[error("{0} places are more than 2³¹")]
    TooManyPlaces(u64),
    /// The stream ends early.
    #[error("the stream of {bytes} bytes ends at position {index} of {count}")]
    Truncated {
        /// Its length.
        bytes: usize,
        /// Positions read.
        index: usize,
        /// Positions expected.
        count: usize,
    },
    /// A position beyond the last place.
    #[error("position {index} is {position}, beyond the {places} places")]
    Outside {
        /// Which.
        index: usize,
        /// Its value.
        position: u64,
        /// Places.
        places: u64,
    },
    /// The stream does not end after the last position, or has another checksum.
    #[error("the stream of {bytes} bytes is not that of {count} positions: it is damaged")]
    Damaged {
        /// Its length.
        bytes: usize,
        /// Positions expected.
        count: usize,
    },
}

/// The learnt probabilities.
struct Model {
    /// Of the number of digits, a tree.
    digits: [Bit; 1 << DIGITS],
    /// Of the digits after the first, a tree for each number of digits.
    leading: [[Bit; 1 << LEARNT]; 1 << DIGITS],
}

impl Model {
    fn new() -> Self {
        Self { digits: [Bit::default(); 1 << DIGITS], leading: [[Bit::default(); 1 << LEARNT]; 1 << DIGITS] }
    }
}

/// The bytes of ascending `positions`.
pub fn encode(positions: &[u32]) -> Vec<u8> {
    let (mut encoder, mut model, mut next) = (Encoder::new(), Model::new(), 0);
    for position in positions {
        // Never 0, so that it has a first digit.
        let gap = position - next + 1;
        next = position + 1;
        let digits = gap.ilog2();
        write_tree(&mut encoder, &mut model.digits, digits, DIGITS);
        let learnt = digits.min(LEARNT);
        let rest = digits - learnt;
        write_tree(&mut encoder, &mut model.leading[digits as usize], gap >> rest, learnt);
        encoder.raw(gap, rest);
    }
    let mut bytes = encoder.finish();
    bytes.extend(checksum(positions).to_le_bytes());
    bytes
}

/// FNV-1a over the bytes of the positions.
fn checksum(positions: &[u32]) -> u32 {
    let bytes = positions.iter().flat_map(|position| position.to_le_bytes());
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The `count` positions among `places` that `bytes` stand for.
///
/// # Errors
/// Bytes that are no such stream, down to the last one.
pub fn decode(bytes: &[u8], count: usize, places: u64) -> Result<Vec<u32>, PositionsError> {
    if places > MOST_PLACES {
        return Err(PositionsError::TooManyPlaces(places));
    }
    if count as u64 > places {
        return Err(PositionsError::TooMany { count, places });
    }
    let truncated = |index| PositionsError::Truncated { bytes: bytes.len(), index, count };
    let (stream, sum) = bytes.split_last_chunk::<4>().ok_or_else(|| truncated(0))?;
    let (mut decoder, mut model, mut next) = (Decoder::new(stream), Model::new(), 0u64);
    let mut positions = Vec::new();
    for index in 0..count {
        let digits = read_tree(&mut decoder, &mut model.digits, DIGITS);
        let learnt = digits.min(LEARNT);
        let rest = digits - learnt;
        let leading = read_tree(&mut decoder, &mut model.leading[digits as usize], learnt);
        let leading = u64::from(1 << learnt | leading);
        let gap = leading << rest | u64::from(decoder.raw(rest));
        if decoder.ran_out() {
            return Err(truncated(index));
        }
        let position = next + gap - 1;
        if position >= places {
            return Err(PositionsError::Outside { index, position, places });
        }
        positions.push(position as u32);
        next = position + 1;
    }
    match decoder.is_at_end() && u32::from_le_bytes(*sum) == checksum(&positions) {
        true => Ok(positions),
        false => Err(PositionsError::Damaged { bytes: bytes.len(), count }),
    }
}

/// The `depth` low bits of `value` from the highest, each with the probability learnt after those before it.
fn write_tree(encoder: &mut Encoder, tree: &mut [Bit], value: u32, depth: u32) {
    let mut node = 1;
    for place in (0..depth).rev() {
        let bit = value >> place & 1 == 1;
        encoder.bit(&mut tree[node], bit);
        node = 2 * node + usize::from(bit);
    }
}

fn read_tree(decoder: &mut Decoder, tree: &mut [Bit], depth: u32) -> u32 {
    let mut node = 1;
    for _ in 0..depth {
        node = 2 * node + usize::from(decoder.bit(&mut tree[node]));
    }
    node as u32 - (1 << depth)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::random::Stream;
    use std::collections::BTreeSet;

    /// `count` of `places`, evenly.
    fn drawn(seed: u64, count: usize, places: u64) -> Vec<u32> {
        let mut stream = Stream::new(seed, "test", "positions", &[]);
        let mut chosen = BTreeSet::new();
        while chosen.len() < count {
            chosen.insert(stream.below(places) as u32);
        }
        chosen.into_iter().collect()
    }

    /// log₂ C(n, k).
    fn entropy(n: u64, k: usize) -> f64 {
        (0..k as u64).map(|i| ((n - i) as f64).log2() - ((i + 1) as f64).log2()).sum()
    }

    #[test]
    fn positions_come_back() {
        let last = MOST_PLACES - 1;
        let mut cases = vec![
            (vec![], 0),
            (vec![], 5),
            (vec![0], 1),
            (vec![last as u32], MOST_PLACES),
            (vec![0, 1, last as u32], MOST_PLACES),
            ((0..1000).collect(), 1000),
        ];
        for (seed, (count, places)) in
            [(1, 10), (9, 10), (100, 1 << 30), (5000, 6000), (5000, 1 << 20)].into_iter().enumerate()
        {
            cases.push((drawn(seed as u64, count, places), places));
        }
        for (positions, places) in cases {
            let bytes = encode(&positions);
            assert_eq!(decode(&bytes, positions.len(), places).unwrap(), positions);
        }
    }

    #[test]
    fn even_positions_take_their_entropy() {
        for (count, places) in
            [(1000, 20_000u64), (1000, 1 << 24), (10_000, 1 << 20), (60_000, 1 << 26), (100_000, 200_000)]
        {
            let bits = 8.0 * encode(&drawn(7, count, places)).len() as f64;
            let least = entropy(places, count);
            assert!(bits <= 1.03 * least + 512.0, "{count} of {places}: {bits} bits, at least {least}");
            assert!(bits >= 0.99 * least, "{count} of {places}: {bits} bits, at least {least}");
        }
    }

    #[test]
    fn crowded_positions_take_less() {
        // Eight rows of 1024 hold all of 4000 positions among 1024 rows.
        let mut stream = Stream::new(9, "test", "positions", &[]);
        let mut chosen = BTreeSet::new();
        while chosen.len() < 4000 {
            chosen.insert((stream.below(8) * 128 * 1024 + stream.below(1024)) as u32);
        }
        let positions: Vec<u32> = chosen.into_iter().collect();
        let bits = 8.0 * encode(&positions).len() as f64;
        assert!(bits < 0.25 * entropy(1 << 20, positions.len()), "{bits}");
    }

    #[test]
    fn damaged_streams_are_refused() {
        let (count, places) = (300, 40_000);
        let positions = drawn(11, count, places);
        let bytes = encode(&positions);
        let errs = |bytes: &[u8]| decode(bytes, count, places).unwrap_err();
        assert!(matches!(errs(&bytes[..bytes.len() / 2]), PositionsError::Truncated { .. }));
        assert!(matches!(errs(&[]), PositionsError::Truncated { .. }));
        assert!(matches!(errs(&[255; 400]), PositionsError::Outside { .. }));
        let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
        assert!(matches!(errs(&longer), PositionsError::Damaged { .. }));
        assert_eq!(decode(&bytes, count, 299), Err(PositionsError::TooMany { count, places: 299 }));
        assert_eq!(decode(&bytes, count, 1 << 40), Err(PositionsError::TooManyPlaces(1 << 40)));
        // A flipped bit anywhere is noticed.
        for place in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[place / 8] ^= 1 << (place % 8);
            assert!(decode(&damaged, count, places).is_err(), "bit {place}");
        }
    }

    #[test]
    fn any_bytes_are_read_without_panic() {
        let mut stream = Stream::new(12, "test", "positions", &[]);
        for _ in 0..2000 {
            let bytes: Vec<u8> = (0..stream.below(60)).map(|_| stream.next_u64() as u8).collect();
            let count = stream.below(2000) as usize;
            if let Ok(found) = decode(&bytes, count, 1 + stream.below(1 << 31) % MOST_PLACES) {
                assert_eq!(found.len(), count);
            }
        }
    }
}
