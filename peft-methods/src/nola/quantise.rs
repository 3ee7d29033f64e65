//! Coefficients in 8 or 4 bits: symmetric, by the largest magnitude of a vector,
//! `qᵢ = round(aᵢ / (max|a| / m))` with `m` = 127 or 7, and back `aᵢ ≈ qᵢ · max|a| / m`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// How coefficients are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CoefficientBits {
    /// f32, exact.
    #[default]
    B32,
    /// One byte each.
    B8,
    /// Half a byte each.
    B4,
}

use CoefficientBits::{B4, B8, B32};

impl CoefficientBits {
    fn number(self) -> u64 {
        match self {
            B32 => 32,
            B8 => 8,
            B4 => 4,
        }
    }

    /// `m`.
    fn largest(self) -> f32 {
        if self == B8 { 127.0 } else { 7.0 }
    }

    /// Bytes of `count` quantised coefficients.
    pub fn bytes(self, count: usize) -> usize {
        if self == B8 { count } else { count.div_ceil(2) }
    }

    /// The bytes of quantised coefficients, in 4 bits the first of two in the lower half, and the step between two of
    /// their values.
    pub fn quantise(self, values: &[f32]) -> (Vec<u8>, f32) {
        let largest = values.iter().fold(0f32, |max, value| max.max(value.abs()));
        let step = largest / self.largest();
        let of = |value: &f32| if step > 0.0 { (value / step).round() as i8 as u8 } else { 0 };
        let quantised: Vec<u8> = values.iter().map(of).collect();
        let bytes = match self {
            B4 => quantised
                .chunks(2)
                .map(|pair| (pair[0] & 15) | pair.get(1).map_or(0, |high| high << 4))
                .collect(),
            _ => quantised,
        };
        (bytes, step)
    }

    /// The first `count` coefficients of the bytes that [`quantise`](Self::quantise) gave.
    pub fn restore(self, bytes: &[u8], step: f32, count: usize) -> Vec<f32> {
        let value = |i: usize| match self {
            B4 if i.is_multiple_of(2) => (bytes[i / 2] << 4) as i8 >> 4,
            B4 => bytes[i / 2] as i8 >> 4,
            _ => bytes[i] as i8,
        };
        (0..count).map(|i| f32::from(value(i)) * step).collect()
    }
}

impl Serialize for CoefficientBits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.number())
    }
}

impl<'de> Deserialize<'de> for CoefficientBits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let known = [B32, B8, B4].into_iter().find(|bits| value.as_u64() == Some(bits.number()));
        known.ok_or_else(|| serde::de::Error::custom(format!("{value} is none of 32, 8 and 4")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of 1 and of 2, worked out by hand.
    #[test]
    fn bytes_by_hand() {
        assert_eq!(B8.quantise(&[127.0, -127.0, 0.4, 2.6, -1.0]), (vec![127, 129, 0, 3, 255], 1.0));
        // 7, −7, 1, and −2 at the end of an odd number.
        assert_eq!(B4.quantise(&[14.0, -14.0, 1.5, 0.9, -4.0]), (vec![0x97, 0x01, 0x0e], 2.0));
        assert_eq!(B4.restore(&[0x97, 0x01, 0x0e], 2.0, 5), [14.0, -14.0, 2.0, 0.0, -4.0]);
        assert_eq!(B8.restore(&[127, 129, 0, 3, 255], 1.0, 5), [127.0, -127.0, 0.0, 3.0, -1.0]);
    }

    #[test]
    fn no_value_moves_by_more_than_half_a_step() {
        let values: Vec<f32> = (0..101).map(|i| ((i * 37 % 101) as f32 - 50.0) / 13.0).collect();
        for bits in [B8, B4] {
            let (bytes, step) = bits.quantise(&values);
            assert_eq!(bytes.len(), bits.bytes(values.len()));
            for (value, restored) in values.iter().zip(bits.restore(&bytes, step, values.len())) {
                assert!((value - restored).abs() <= step * 0.5001, "{value} {restored} {step}");
            }
            let (bytes, step) = bits.quantise(&[0.0; 3]);
            assert_eq!(bits.restore(&bytes, step, 3), [0.0; 3]);
            assert_eq!(bits.restore(&[], 0.0, 0), [0f32; 0]);
        }
    }
}
