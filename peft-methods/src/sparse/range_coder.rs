//! An adaptive binary range coder (Martin, "Range encoding", 1979, with the carry handling of LZMA's).
//!
//! A bit of which the model says that it is 0 with probability `p` costs `−log₂ p` or `−log₂(1 − p)` bits, up to the
//! rounding of `p` to 16 bits and of the interval to 32, which together cost less than a thousandth of a bit. A stream has
//! four bytes of its own.

/// Where intervals are widened.
const LOW: u32 = 1 << 24;
/// Bits of a probability.
const PRECISION: u32 = 16;
/// After so many bits a model forgets as fast as it learns.
const MEMORY: u16 = 96;

/// The probability that a bit is 0, learnt from the bits before it: their share at first, then a mean that forgets.
#[derive(Debug, Clone, Copy)]
pub struct Bit {
    zero: u16,
    seen: u16,
}

impl Default for Bit {
    fn default() -> Self {
        Self { zero: 1 << (PRECISION - 1), seen: 0 }
    }
}

impl Bit {
    /// The part of `range` that stands for 0: neither nothing nor all of it.
    fn bound(self, range: u32) -> u32 {
        (range >> PRECISION) * u32::from(self.zero)
    }

    fn learn(&mut self, bit: bool) {
        // Far enough from 0 and 1 that either bit keeps a part of the interval.
        const LEAST: i32 = 32;
        const MOST: i32 = (1 << PRECISION) - 32;
        let target = if bit { 0 } else { 1 << PRECISION };
        let zero = i32::from(self.zero);
        let moved = zero + (target - zero) / (i32::from(self.seen) + 2);
        self.zero = moved.clamp(LEAST, MOST) as u16;
        self.seen = (self.seen + 1).min(MEMORY);
    }
}

/// Writes bits.
pub struct Encoder {
    low: u64,
    range: u32,
    /// The last byte that a carry may still change, and how many 255s follow it. There is none before the first.
    cache: Option<u8>,
    pending: usize,
    bytes: Vec<u8>,
}

impl Encoder {
    /// Of an empty stream.
    pub fn new() -> Self {
        Self { low: 0, range: u32::MAX, cache: None, pending: 0, bytes: Vec::new() }
    }

    /// A bit whose probability is learnt.
    pub fn bit(&mut self, model: &mut Bit, bit: bool) {
        let bound = model.bound(self.range);
        if bit {
            self.low += u64::from(bound);
            self.range -= bound;
        } else {
            self.range = bound;
        }
        model.learn(bit);
        self.widen();
    }

    /// The `count` low bits of `value`, each as likely as not.
    pub fn raw(&mut self, value: u32, count: u32) {
        for place in (0..count).rev() {
            self.range >>= 1;
            if value >> place & 1 == 1 {
                self.low += u64::from(self.range);
            }
            self.widen();
        }
    }

    /// The stream.
    pub fn finish(mut self) -> Vec<u8> {
        (0..5).for_each(|_| self.shift());
        self.bytes
    }

    fn widen(&mut self) {
        while self.range < LOW {
            self.range <<= 8;
            self.shift();
        }
    }

    /// Moves the upper byte out.
    fn shift(&mut self) {
        let carry = (self.low >> 32) as u8;
        let byte = (self.low >> 24) as u8;
        if carry == 1 || byte != 255 {
            if let Some(cache) = self.cache {
                self.bytes.push(cache.wrapping_add(carry));
            }
            let filled = 255u8.wrapping_add(carry);
            self.bytes.extend(std::iter::repeat_n(filled, self.pending));
            self.pending = 0;
            self.cache = Some(byte);
        } else {
            self.pending += 1;
        }
        self.low = (self.low & 0x00ff_ffff) << 8;
    }
}

/// Reads the bits that an [`Encoder`] wrote, given the same models in the same order.
pub struct Decoder<'a> {
    code: u32,
    range: u32,
    bytes: std::slice::Iter<'a, u8>,
    ran_out: bool,
}

impl<'a> Decoder<'a> {
    /// Of a whole stream.
    pub fn new(bytes: &'a [u8]) -> Self {
        let mut decoder = Self { code: 0, range: u32::MAX, bytes: bytes.iter(), ran_out: false };
        (0..4).for_each(|_| decoder.take());
        decoder
    }

    /// A bit whose probability is learnt.
    pub fn bit(&mut self, model: &mut Bit) -> bool {
        let bound = model.bound(self.range);
        let bit = self.code >= bound;
        if bit {
            self.code -= bound;
            self.range -= bound;
        } else {
            self.range = bound;
        }
        model.learn(bit);
        self.widen();
        bit
    }

    /// `count` bits, each as likely as not.
    pub fn raw(&mut self, count: u32) -> u32 {
        (0..count).fold(0, |value, _| {
            self.range >>= 1;
            let bit = self.code >= self.range;
            if bit {
                self.code -= self.range;
            }
            self.widen();
            value << 1 | u32::from(bit)
        })
    }

    /// Whether more was read than there is.
    pub fn ran_out(&self) -> bool {
        self.ran_out
    }

    /// Whether the stream ends here, as only a whole one does that holds what was read.
    pub fn is_at_end(&self) -> bool {
        self.code == 0 && !self.ran_out && self.bytes.len() == 0
    }

    fn widen(&mut self) {
        while self.range < LOW {
            self.range <<= 8;
            self.take();
        }
    }

    fn take(&mut self) {
        let byte = self.bytes.next().copied();
        self.ran_out |= byte.is_none();
        self.code = self.code << 8 | u32::from(byte.unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::random::Stream;

    fn model_bits(stream: &mut Stream, count: usize, p: f64) -> Vec<bool> {
        (0..count).map(|_| stream.uniform() < p).collect()
    }

    #[test]
    fn what_goes_in_comes_out() {
        let mut stream = Stream::new(3, "test", "range coder", &[]);
        let word = |i: usize| (i as u32).wrapping_mul(2_654_435_761);
        for (case, p) in [0.0, 1.0, 0.5, 0.001, 0.999, 0.2].into_iter().enumerate() {
            let bits = model_bits(&mut stream, 5000 + case, p);
            let (mut encoder, mut models) = (Encoder::new(), [Bit::default(); 3]);
            for (i, bit) in bits.iter().enumerate() {
                encoder.bit(&mut models[i % 3], *bit);
                encoder.raw(word(i), i as u32 % 32);
            }
            let bytes = encoder.finish();
            let (mut decoder, mut models) = (Decoder::new(&bytes), [Bit::default(); 3]);
            for (i, bit) in bits.iter().enumerate() {
                assert_eq!(decoder.bit(&mut models[i % 3]), *bit, "{p} {i}");
                let count = i as u32 % 32;
                assert_eq!(decoder.raw(count), word(i) & ((1 << count) - 1), "{p} {i}");
            }
            assert!(decoder.is_at_end());
        }
    }

    /// All carries: a value just below a byte's border, pushed over it late.
    #[test]
    fn carries_run_through_full_bytes() {
        for tail in 0..2u32 {
            let mut encoder = Encoder::new();
            encoder.raw(0x7fff_ffff, 32);
            encoder.raw(u32::MAX, 32);
            encoder.raw(u32::MAX - 1 + tail, 32);
            let mut model = Bit::default();
            encoder.bit(&mut model, true);
            let bytes = encoder.finish();
            let mut decoder = Decoder::new(&bytes);
            let words = [decoder.raw(32), decoder.raw(32), decoder.raw(32)];
            assert_eq!(words, [0x7fff_ffff, u32::MAX, u32::MAX - 1 + tail]);
            assert!(decoder.bit(&mut Bit::default()) && decoder.is_at_end());
        }
    }

    #[test]
    fn bits_cost_their_entropy() {
        let mut stream = Stream::new(4, "test", "range coder", &[]);
        for p in [0.5, 0.1, 0.01f64] {
            let bits = model_bits(&mut stream, 100_000, p);
            let (mut encoder, mut model) = (Encoder::new(), Bit::default());
            bits.iter().for_each(|bit| encoder.bit(&mut model, *bit));
            let share = bits.iter().filter(|bit| **bit).count() as f64 / bits.len() as f64;
            let entropy = -share * share.log2() - (1.0 - share) * (1.0 - share).log2();
            let bits_each = encoder.finish().len() as f64 * 8.0 / bits.len() as f64;
            assert!(bits_each < entropy + 0.015, "{p}: {bits_each} for {entropy}");
        }
    }

    #[test]
    fn an_end_too_early_is_noticed() {
        let mut encoder = Encoder::new();
        encoder.raw(0xdead_beef, 32);
        let bytes = encoder.finish();
        let mut decoder = Decoder::new(&bytes[..bytes.len() - 1]);
        decoder.raw(32);
        assert!(!decoder.is_at_end());
        let mut decoder = Decoder::new(&[]);
        decoder.raw(8);
        assert!(decoder.ran_out());
    }
}
