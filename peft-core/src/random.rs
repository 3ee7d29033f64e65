//! Every random number of the toolkit, pinned down to the bit.
//!
//! A [`Stream`] is determined by four things: the run's seed, what the numbers are for, the name of the tensor (or
//! nothing), and counters such as an epoch. Two streams that differ in any of them are independent, so no value
//! depends on the order in which others were drawn, on threads, or on a device.
//!
//! The definition, which never changes within a major version (`scripts/random_reference.py` is the same in Python):
//!
//! * key = SHA-256 of `"peft random stream 1"`, the seed, then purpose and name as UTF-8 each preceded by its byte
//!   length, then the number of counters and the counters. Every number is a little-endian `u64`.
//! * words = the ChaCha8 key stream under that key, with a 64-bit block counter from 0 and a nonce of 0; a `u64` is
//!   two successive words, the low one first.
//! * floats, normals, bounded integers and shuffles come from those words as each method says, by additions,
//!   multiplications, divisions and square roots alone, which IEEE 754 rounds the same on every machine.

mod philox;

pub use philox::philox_blocks;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

/// One reproducible sequence of random numbers.
#[derive(Debug, Clone)]
pub struct Stream {
    words: ChaCha8Rng,
    /// The second value of the last normal pair.
    spare: Option<f64>,
}

impl Stream {
    /// The stream of `seed` for `purpose` (for example `"data order"`), `name` (a tensor's name or `""`) and
    /// `counters` (for example `&[epoch]`).
    pub fn new(seed: u64, purpose: &str, name: &str, counters: &[u64]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"peft random stream 1");
        hash.update(seed.to_le_bytes());
        for part in [purpose, name] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.update((counters.len() as u64).to_le_bytes());
        for counter in counters {
            hash.update(counter.to_le_bytes());
        }
        Self { words: ChaCha8Rng::from_seed(hash.finalize().into()), spare: None }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.words.next_u64()
    }

    /// Uniform in `[0, 1)`: the upper 53 bits of [`next_u64`](Self::next_u64) times 2⁻⁵³.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `[0, 1)`: the upper 24 bits of [`next_u64`](Self::next_u64) times 2⁻²⁴.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 * (1.0 / (1u64 << 24) as f32)
    }

    /// Standard normal, by Marsaglia's polar method on [`uniform`](Self::uniform); pairs are drawn together and the
    /// second of a pair is returned by the next call.
    pub fn normal(&mut self) -> f64 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        loop {
            let u = 2.0 * self.uniform() - 1.0;
            let v = 2.0 * self.uniform() - 1.0;
            let s = u * u + v * v;
            if s > 0.0 && s < 1.0 {
                let scale = (-2.0 * ln(s) / s).sqrt();
                self.spare = Some(v * scale);
                return u * scale;
            }
        }
    }

    /// Uniform in `0..n` without bias (Lemire's multiplication with rejection); 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// A uniformly random permutation of `items` (Fisher–Yates, from the last item down).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}

/// Natural logarithm of a positive normal number, within an ulp or two. The platform's `ln` would do for quality, but
/// its last bit differs between C libraries.
fn ln(x: f64) -> f64 {
    const EXPONENT_BITS: u64 = 0x7ff << 52;
    let bits = x.to_bits();
    // x = mantissa · 2^exponent with the mantissa in [√½, √2), where the series converges fast.
    let mut exponent = ((bits & EXPONENT_BITS) >> 52) as i64 - 1022;
    let mut mantissa = f64::from_bits((bits & !EXPONENT_BITS) | (1022 << 52));
    if mantissa < std::f64::consts::FRAC_1_SQRT_2 {
        mantissa *= 2.0;
        exponent -= 1;
    }
    // ln m = 2 (z + z³/3 + z⁵/5 + …) with z = (m − 1)/(m + 1), |z| ≤ 0.172.
    let z = (mantissa - 1.0) / (mantissa + 1.0);
    let square = z * z;
    let series = (0..12).rev().fold(0.0, |sum, term| sum * square + 1.0 / f64::from(2 * term + 1));
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * z * series
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn words_are_those_of_the_reference() {
        let mut stream = Stream::new(42, "adapter", "layers.0.q", &[3, 7]);
        let words: Vec<u64> = (0..41).map(|_| stream.next_u64()).collect();
        assert_eq!(words[..3], [0x5a9ff81a9f1cab7, 0xfcfcf87c3dc7ada7, 0x749c7dc4d0028195]);
        // Past the generator's internal buffer of four blocks (32 values).
        assert_eq!(words[40], 0xa54b4d1554242ce1);
        assert_eq!(Stream::new(0, "", "", &[]).next_u64(), 0x706f78ab00faf775);
    }

    #[test]
    fn floats_are_those_of_the_reference() {
        let mut stream = Stream::new(1, "uniform", "", &[]);
        let uniform: Vec<f64> = (0..3).map(|_| stream.uniform()).collect();
        assert_eq!(uniform, [0.42073409377766857, 0.7162658422916885, 0.20811490735641736]);
        assert_eq!([stream.uniform_f32(), stream.uniform_f32()], [0.341_827_5, 0.659_821_5]);
    }

    #[test]
    fn normals_are_those_of_the_reference() {
        let mut stream = Stream::new(1, "normal", "", &[]);
        let normal: Vec<f64> = (0..5).map(|_| stream.normal()).collect();
        assert_eq!(
            normal,
            [
                -0.4043539350546163,
                -1.621310752720585,
                -0.36972551048644736,
                1.4130282270418033,
                -1.3925494528447604
            ]
        );
        let bits: Vec<u64> = (0..3).map(|_| stream.normal().to_bits()).collect();
        assert_eq!(bits, [0x3fe620a35bed05c2, 0xbfd3c6339c9df29e, 0xbfe3f8be168de414]);
    }

    #[test]
    fn normals_have_the_moments_of_a_standard_normal() {
        let mut stream = Stream::new(7, "moments", "", &[]);
        let n = 40_000;
        let values: Vec<f64> = (0..n).map(|_| stream.normal()).collect();
        let moment = |power: i32| values.iter().map(|x| x.powi(power)).sum::<f64>() / f64::from(n);
        assert!(moment(1).abs() < 0.02, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.03, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.25, "fourth moment {}", moment(4));
    }

    #[test]
    fn own_logarithm_agrees_with_the_platform() {
        for x in [1e-300, 1e-30, 0.3, 0.707, 0.708, 0.9999999, 1.0, 1.5, 7.5] {
            let (own, std) = (ln(x), f64::ln(x));
            assert!((own - std).abs() <= 4e-16 * std.abs().max(1e-6), "{x}: {own} {std}");
        }
    }

    #[test]
    fn bounded_integers_and_shuffles_are_those_of_the_reference() {
        let mut stream = Stream::new(1, "below", "", &[]);
        let drawn: Vec<u64> = (0..8).map(|_| stream.below(10)).collect();
        assert_eq!(drawn, [2, 2, 9, 8, 0, 8, 9, 9]);
        // A bound just over 2⁶³ rejects almost every other word.
        let bound = (1 << 63) + 1;
        assert_eq!([stream.below(bound), stream.below(bound)], [931783155108336307, 5775470635742363632]);
        assert_eq!(stream.below(0), 0);
        let mut items: Vec<u32> = (0..10).collect();
        Stream::new(1, "shuffle", "", &[]).shuffle(&mut items);
        assert_eq!(items, [2, 8, 5, 3, 7, 6, 0, 4, 1, 9]);
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let first = |purpose, name, counters: &[u64]| Stream::new(5, purpose, name, counters).next_u64();
        let base = first("ab", "c", &[1]);
        assert_ne!(base, first("a", "bc", &[1]));
        assert_ne!(base, first("ab", "c", &[]));
        assert_ne!(base, first("ab", "c", &[1, 0]));
        assert_ne!(base, Stream::new(6, "ab", "c", &[1]).next_u64());
    }
}
