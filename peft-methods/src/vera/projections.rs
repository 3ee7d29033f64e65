//! The frozen pair that all modules share, drawn as Hugging Face PEFT draws it, so that files without it mean the same.
//!
//! PEFT fills `A`, then `B`, by `tensor.uniform_(−β, β)` with a generator of PyTorch for the CPU seeded by
//! `projection_prng_key`; `β = √3·√2/√fan_in` (Kaiming-uniform for a rectifier). That generator is the Mersenne twister
//! MT19937 (Matsumoto and Nishimura, ACM TOMACS 8, 1998), of whose words the lower 24 bits become a float.

/// State words of the generator.
const N: usize = 624;
/// Distance of the words that are combined.
const M: usize = 397;

/// MT19937.
struct MersenneTwister {
    words: [u32; N],
    next: usize,
}

impl MersenneTwister {
    fn new(seed: u32) -> Self {
        let mut words = [seed; N];
        for i in 1..N {
            let before = words[i - 1];
            words[i] = 1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Self { words, next: N }
    }

    fn twist(&mut self) {
        for i in 0..N {
            let mixed = (self.words[i] & 0x8000_0000) | (self.words[(i + 1) % N] & 0x7fff_ffff);
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.words[i] = self.words[(i + M) % N] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }

    fn word(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut word = self.words[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// Uniform in `[−bound, bound)`, as PyTorch computes it: in f32 with one rounding at the end.
    fn uniform(&mut self, bound: f64) -> f32 {
        let (from, to) = (-bound as f32, bound as f32);
        let share = (self.word() & 0x00ff_ffff) as f32 / 16_777_216.0;
        share.mul_add(to - from, from)
    }
}

/// `A` `[r, in]` and `B` `[out, r]` of the key, row-major, for the largest `[out, in]` of the modules.
pub fn projections(key: u64, rank: usize, [rows, columns]: [usize; 2]) -> (Vec<f32>, Vec<f32>) {
    // A seed has 32 bits there.
    let mut generator = MersenneTwister::new(key as u32);
    let mut kaiming = |count: usize, fan_in: usize| -> Vec<f32> {
        let bound = 3f64.sqrt() * (2f64.sqrt() / (fan_in as f64).sqrt());
        (0..count).map(|_| generator.uniform(bound)).collect()
    };
    let a = kaiming(rank * columns, columns);
    (a, kaiming(rows * rank, rank))
}

/// The part `[rows, columns]` at the upper left of `values`, whose rows have the length `width`.
pub fn upper_left(values: &[f32], width: usize, [rows, columns]: [usize; 2]) -> Vec<f32> {
    values.chunks_exact(width).take(rows).flat_map(|row| &row[..columns]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_reference() {
        // The first words of the authors' `init_genrand(5489)`, and the ten-thousandth, which the C++ standard names.
        let mut generator = MersenneTwister::new(5489);
        assert_eq!([generator.word(), generator.word()], [3_499_211_612, 581_869_302]);
        let last = (2..10_000).fold(0, |_, _| generator.word());
        assert_eq!(last, 4_123_659_995);
    }

    #[test]
    fn values_are_pytorchs() {
        // torch.empty(3, 24).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(5))
        let (a, b) = projections(5, 3, [7, 24]);
        assert_eq!(a[..4], [0.330_251_87, -0.373_889_1, 0.407_469_7, 0.319_927_04]);
        assert_eq!((a.len(), b.len()), (72, 21));
        assert!(b.iter().all(|value| value.abs() <= 2f32.sqrt()));
    }

    #[test]
    fn the_upper_left() {
        assert_eq!(upper_left(&[1., 2., 3., 4., 5., 6.], 3, [1, 2]), [1., 2.]);
        assert_eq!(upper_left(&[1., 2., 3., 4., 5., 6.], 3, [2, 1]), [1., 4.]);
    }
}
