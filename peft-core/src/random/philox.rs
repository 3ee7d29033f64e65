//! Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
//! 1, 2, 3" (SC 2011): any block of the sequence is found from its number alone.

/// Multipliers of the two halves of a round.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What the key grows by between rounds: the golden ratio and √3 − 1, in 32 bits.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// `LANES` blocks of one key side by side: the four words of every counter become four random words.
///
/// Words stand in 64 bits, of which the upper half means nothing on the way: that is what vector units multiply.
#[inline(always)]
pub fn philox_blocks<const LANES: usize>(key: [u32; 2], mut words: [[u64; LANES]; 4]) -> [[u64; LANES]; 4] {
    const LOW: u64 = 0xFFFF_FFFF;
    let [first, second] = MULTIPLIERS.map(u64::from);
    let mut key = key;
    for _ in 0..ROUNDS {
        let [key_0, key_1] = key.map(u64::from);
        #[allow(clippy::needless_range_loop)] // Four arrays in step: this is what becomes vectors.
        for lane in 0..LANES {
            // 32 by 32 bits: the product cannot overflow.
            let product_0 = first.wrapping_mul(words[0][lane] & LOW);
            let product_1 = second.wrapping_mul(words[2][lane] & LOW);
            words[0][lane] = (product_1 >> 32) ^ words[1][lane] ^ key_0;
            words[1][lane] = product_1;
            words[2][lane] = (product_0 >> 32) ^ words[3][lane] ^ key_1;
            words[3][lane] = product_0;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
        philox_blocks(key, counter.map(|word| [u64::from(word)])).map(|[word]| word as u32)
    }

    /// The vectors that the authors publish with Random123 (`kat_vectors`).
    #[test]
    fn blocks_are_the_published_ones() {
        let ones = u32::MAX;
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (key, counter, expected) in [
            ([0; 2], [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 2], [ones; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            ([0xa409_3822, 0x299f_31d0], pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(block(key, counter), expected);
        }
    }

    #[test]
    fn lanes_do_not_touch_each_other() {
        let key = [7, 8];
        let counters: [[u64; 16]; 4] =
            std::array::from_fn(|word| std::array::from_fn(|lane| (word * 100 + lane) as u64));
        let together = philox_blocks(key, counters);
        for lane in 0..16 {
            let alone = block(key, std::array::from_fn(|word| counters[word][lane] as u32));
            assert_eq!(alone, std::array::from_fn(|word| together[word][lane] as u32));
        }
    }
}
