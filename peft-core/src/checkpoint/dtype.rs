//! Element types of tensors on disk, and their conversion to and from f32.

use std::fmt;
use std::str::FromStr;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use thiserror::Error;

use crate::nearest::did_you_mean;

/// The element type of a tensor in a safetensors file. Every one takes whole bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // The variants are the format's own names.
pub enum Dtype {
    Bool,
    U8,
    I8,
    F8E5M2,
    F8E4M3,
    F8E8M0,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
}

/// What is wrong with a dtype that a user named or a tensor has.
#[derive(Debug, Error)]
pub enum DtypeError {
    /// No such dtype.
    #[error(
        "unknown dtype `{found}`; expected e.g. `float32`, `bfloat16`, `float16` or `f32`, `bf16`, `f16`{hint}"
    )]
    Unknown {
        /// What stood there.
        found: String,
        /// The nearest right name, as a suffix.
        hint: String,
    },
    /// The dtype exists but is not a floating-point type that converts to and from f32.
    #[error("dtype `{0}` does not convert to or from f32; expected f32, f16, bf16 or f64")]
    NotConvertible(Dtype),
    /// The bytes are no whole number of elements.
    #[error("{bytes} bytes are no whole number of `{dtype}` elements")]
    PartialElement {
        /// Number of bytes given.
        bytes: usize,
        /// Their element type.
        dtype: Dtype,
    },
}

impl DtypeError {
    /// Always true: the dtype comes from the user's file or flags.
    pub fn is_bad_input(&self) -> bool {
        true
    }
}

/// Every dtype with its names: in safetensors headers, in transformers' configs, as a flag.
const NAMES: [(Dtype, &str, &str, &str); 16] = [
    (Dtype::Bool, "BOOL", "bool", "bool"),
    (Dtype::U8, "U8", "uint8", "u8"),
    (Dtype::I8, "I8", "int8", "i8"),
    (Dtype::F8E5M2, "F8_E5M2", "float8_e5m2", "f8_e5m2"),
    (Dtype::F8E4M3, "F8_E4M3", "float8_e4m3fn", "f8_e4m3"),
    (Dtype::F8E8M0, "F8_E8M0", "float8_e8m0fnu", "f8_e8m0"),
    (Dtype::I16, "I16", "int16", "i16"),
    (Dtype::U16, "U16", "uint16", "u16"),
    (Dtype::F16, "F16", "float16", "f16"),
    (Dtype::BF16, "BF16", "bfloat16", "bf16"),
    (Dtype::I32, "I32", "int32", "i32"),
    (Dtype::U32, "U32", "uint32", "u32"),
    (Dtype::F32, "F32", "float32", "f32"),
    (Dtype::F64, "F64", "float64", "f64"),
    (Dtype::I64, "I64", "int64", "i64"),
    (Dtype::U64, "U64", "uint64", "u64"),
];

impl Dtype {
    /// Bytes an element takes.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E5M2 | Self::F8E4M3 | Self::F8E8M0 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// Whether [`to_f32`] and [`from_f32`] accept it: f32, f16, bf16 and f64.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16 | Self::F64)
    }

    /// The name in a safetensors header, such as `BF16`.
    pub fn header_name(self) -> &'static str {
        self.names().1
    }

    /// The name that transformers and PyTorch write, such as `bfloat16`.
    pub fn config_name(self) -> &'static str {
        self.names().2
    }

    /// The dtype of that name in a safetensors header; `None` for one this toolkit has no use for.
    pub fn from_header_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The same type in the safetensors crate.
    pub fn to_safetensors(self) -> safetensors::Dtype {
        match self {
            Self::Bool => safetensors::Dtype::BOOL,
            Self::U8 => safetensors::Dtype::U8,
            Self::I8 => safetensors::Dtype::I8,
            Self::F8E5M2 => safetensors::Dtype::F8_E5M2,
            Self::F8E4M3 => safetensors::Dtype::F8_E4M3,
            Self::F8E8M0 => safetensors::Dtype::F8_E8M0,
            Self::I16 => safetensors::Dtype::I16,
            Self::U16 => safetensors::Dtype::U16,
            Self::F16 => safetensors::Dtype::F16,
            Self::BF16 => safetensors::Dtype::BF16,
            Self::I32 => safetensors::Dtype::I32,
            Self::U32 => safetensors::Dtype::U32,
            Self::F32 => safetensors::Dtype::F32,
            Self::F64 => safetensors::Dtype::F64,
            Self::I64 => safetensors::Dtype::I64,
            Self::U64 => safetensors::Dtype::U64,
        }
    }

    fn names(self) -> &'static (Self, &'static str, &'static str, &'static str) {
        // The table is in the order of the enum, which a test pins.
        &NAMES[self as usize]
    }
}

/// The flag's name, such as `bf16`.
impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names().3)
    }
}

/// Reads any of a dtype's names (`bfloat16`, `bf16`, `BF16`), also with PyTorch's `torch.` before it.
impl FromStr for Dtype {
    type Err = DtypeError;

    fn from_str(text: &str) -> Result<Self, DtypeError> {
        let name = text.strip_prefix("torch.").unwrap_or(text);
        NAMES
            .iter()
            .find(|(_, header, config, flag)| [*header, *config, *flag].contains(&name))
            .map(|row| row.0)
            .ok_or_else(|| DtypeError::Unknown {
                found: text.to_string(),
                hint: did_you_mean(name, NAMES.iter().flat_map(|row| [row.2, row.3])),
            })
    }
}

/// Elements converted by one task; also the length below which nothing is split.
const CHUNK: usize = 1 << 16;

/// The little-endian `bytes` of a tensor as f32; exact from f32, f16 and bf16, rounded once from f64.
///
/// `bytes` need no alignment. Errors where the dtype is not a float or the last element is cut.
pub fn to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, DtypeError> {
    let convert: fn(&[u8], &mut [f32]) = match dtype {
        Dtype::F32 => |bytes, out| widen(bytes, out, f32::from_le_bytes),
        Dtype::F64 => |bytes, out| widen(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::BF16 => |bytes, out| {
            widen(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16));
        },
        Dtype::F16 => f16_to_f32,
        _ => return Err(DtypeError::NotConvertible(dtype)),
    };
    let size = dtype.size();
    if !bytes.len().is_multiple_of(size) {
        return Err(DtypeError::PartialElement { bytes: bytes.len(), dtype });
    }
    let mut out = vec![0.0; bytes.len() / size];
    if out.len() <= CHUNK {
        convert(bytes, &mut out);
    } else {
        out.par_chunks_mut(CHUNK)
            .zip(bytes.par_chunks(CHUNK * size))
            .for_each(|(out, bytes)| convert(bytes, out));
    }
    Ok(out)
}

/// `values` as little-endian bytes of `dtype`, each rounded once, to nearest with ties to even.
///
/// Values beyond the range of f16 become infinite, as in PyTorch. Errors where the dtype is not a float.
pub fn from_f32(values: &[f32], dtype: Dtype) -> Result<Vec<u8>, DtypeError> {
    let convert: fn(&[f32], &mut [u8]) = match dtype {
        Dtype::F32 => |values, out| narrow(values, out, f32::to_le_bytes),
        Dtype::F64 => |values, out| narrow(values, out, |v| f64::from(v).to_le_bytes()),
        Dtype::BF16 => |values, out| narrow(values, out, |v| bf16::from_f32(v).to_le_bytes()),
        Dtype::F16 => f32_to_f16,
        _ => return Err(DtypeError::NotConvertible(dtype)),
    };
    let size = dtype.size();
    let mut out = vec![0; values.len() * size];
    if values.len() <= CHUNK {
        convert(values, &mut out);
    } else {
        out.par_chunks_mut(CHUNK * size)
            .zip(values.par_chunks(CHUNK))
            .for_each(|(out, values)| convert(values, out));
    }
    Ok(out)
}

/// `values` as little-endian bytes of f32.
pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn widen<const N: usize>(bytes: &[u8], out: &mut [f32], element: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = element(*bytes);
    }
}

fn narrow<const N: usize>(values: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
    for (out, value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *out = bytes(*value);
    }
}

/// Elements of the aligned copy through which halves pass: whole slices use the hardware's conversion.
const LANES: usize = 256;

fn f16_to_f32(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; LANES];
    for (out, bytes) in out.chunks_mut(LANES).zip(bytes.chunks(LANES * 2)) {
        let halves = &mut halves[..out.len()];
        for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
            *half = f16::from_le_bytes(*bytes);
        }
        halves.convert_to_f32_slice(out);
    }
}

fn f32_to_f16(values: &[f32], out: &mut [u8]) {
    let mut halves = [f16::ZERO; LANES];
    for (values, out) in values.chunks(LANES).zip(out.chunks_mut(LANES * 2)) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        for (out, half) in out.as_chunks_mut().0.iter_mut().zip(halves) {
            *out = half.to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_table_agrees_with_the_enum_and_the_format() {
        for (dtype, header, config, flag) in NAMES {
            assert_eq!(dtype.names().0, dtype);
            assert_eq!(dtype.to_safetensors().to_string(), header);
            assert_eq!(dtype.to_safetensors().bitsize(), dtype.size() * 8);
            for name in [header, config, flag, &format!("torch.{config}")] {
                assert_eq!(name.parse::<Dtype>().unwrap(), dtype);
            }
        }
    }

    #[test]
    fn an_unknown_name_points_to_the_nearest() {
        let message = "bfloat61".parse::<Dtype>().unwrap_err().to_string();
        assert!(message.contains("did you mean `bfloat16`"), "{message}");
    }

    #[test]
    fn known_bit_patterns_widen() {
        assert_eq!(to_f32(Dtype::F16, &[0x00, 0x3c, 0x01, 0x00]).unwrap(), [1.0, 2f32.powi(-24)]);
        assert_eq!(to_f32(Dtype::BF16, &[0x80, 0x3f, 0x00, 0xc0]).unwrap(), [1.0, -2.0]);
        assert_eq!(to_f32(Dtype::F64, &1.5f64.to_le_bytes()).unwrap(), [1.5]);
    }

    #[test]
    fn ties_round_to_even() {
        // bf16 keeps 8 significant bits: 1 + 2^-8 lies halfway between 1 and 1 + 2^-7, 1 + 3·2^-8 between
        // 1 + 2^-7 (odd) and 1 + 2^-6 (even).
        let ties = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)];
        assert_eq!(from_f32(&ties, Dtype::BF16).unwrap(), [0x80, 0x3f, 0x82, 0x3f]);
        // f16 keeps 11 bits, and 65520 is halfway between its largest value and infinity.
        let ties = [1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11), 65520.0];
        assert_eq!(from_f32(&ties, Dtype::F16).unwrap(), [0x00, 0x3c, 0x02, 0x3c, 0x00, 0x7c]);
    }

    #[test]
    fn every_half_survives_the_round_trip_from_an_odd_address() {
        // More than one chunk, so that the parallel path runs, and unaligned.
        let bits = || (0..3u32 * 65536).map(|i| (i % 65536) as u16);
        for dtype in [Dtype::F16, Dtype::BF16] {
            let bytes: Vec<u8> = std::iter::once(0).chain(bits().flat_map(u16::to_le_bytes)).collect();
            let values = to_f32(dtype, &bytes[1..]).unwrap();
            let back = from_f32(&values, dtype).unwrap();
            for ((value, pair), bits) in values.iter().zip(back.as_chunks().0).zip(bits()) {
                assert!(value.is_nan() || u16::from_le_bytes(*pair) == bits, "{dtype} {bits:04x}");
            }
        }
    }

    #[test]
    fn integers_and_cut_elements_are_refused() {
        assert!(matches!(to_f32(Dtype::I64, &[0; 8]), Err(DtypeError::NotConvertible(Dtype::I64))));
        assert!(matches!(to_f32(Dtype::F32, &[0; 7]), Err(DtypeError::PartialElement { bytes: 7, .. })));
        assert!(from_f32(&[1.0], Dtype::U8).is_err());
    }
}
