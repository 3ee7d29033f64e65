//! Rotary frequencies and the ways checkpoints stretch them to longer contexts: `linear` (Chen et al., arXiv
//! 2306.15595), `dynamic` NTK, `yarn` (Peng et al., arXiv 2309.00071) and `llama3` (Llama 3.1).

use super::error::ModelError;
use crate::kernels::Rotation;
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde_json::Value;
use std::f64::consts::TAU;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies divided by the factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with the sequence once it is longer than the model was made for.
    Dynamic {
        /// The factor.
        factor: f64,
        /// Length up to which nothing changes.
        max_positions: usize,
    },
    /// Low frequencies divided by the factor, high ones kept, a ramp between; cos and sin scaled.
    Yarn {
        /// The factor.
        factor: f64,
        /// Length of pretraining.
        original_max_positions: usize,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole features.
        truncate: bool,
    },
    /// As yarn's idea, by wavelength, with Llama 3.1's constants.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Low-frequency wavelength: original length over this.
        low_freq_factor: f64,
        /// High-frequency wavelength: original length over this.
        high_freq_factor: f64,
        /// Length of pretraining.
        original_max_positions: usize,
    },
}

impl RopeScaling {
    /// Reads base and scaling from a `config.json`: `rope_scaling` beside `rope_theta` (transformers 4, where the type
    /// may be spelled `type`), else `rope_parameters` (transformers 5).
    pub(super) fn read(
        path: &Path,
        json: &Value,
        default_theta: f64,
        max_positions: usize,
        head_dim: usize,
    ) -> Result<(f64, Self), ModelError> {
        let present =
            |key: &'static str| json.get(key).filter(|value| !value.is_null()).map(|value| (key, value));
        let empty = Value::Object(serde_json::Map::new());
        let (block, parameters) = present("rope_scaling")
            .or_else(|| present("rope_parameters"))
            .unwrap_or(("rope_scaling", &empty));
        let invalid = |key: String, found: &Value, expected: &str| ModelError::InvalidKey {
            path: path.to_path_buf(),
            key,
            found: found.to_string(),
            expected: expected.to_string(),
        };
        if !parameters.is_object() {
            return Err(invalid(block.to_string(), parameters, "an object"));
        }
        let optional = |key: &str| -> Result<Option<f64>, ModelError> {
            match parameters.get(key).filter(|value| !value.is_null()) {
                None => Ok(None),
                Some(value) => match value.as_f64() {
                    Some(n) if n.is_finite() && n > 0.0 => Ok(Some(n)),
                    _ => Err(invalid(format!("{block}.{key}"), value, "a positive number")),
                },
            }
        };
        // Where transformers takes 0 for absent.
        let nonzero = |key: &str| match parameters.get(key).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => optional(key),
        };
        let required = |key: &str| {
            optional(key)?.ok_or_else(|| ModelError::MissingKey {
                path: path.to_path_buf(),
                key: format!("{block}.{key}"),
            })
        };
        let theta = match (optional("rope_theta")?, present("rope_theta")) {
            (Some(theta), _) => theta,
            (None, Some((_, value))) => value
                .as_f64()
                .filter(|n| n.is_finite() && *n > 0.0)
                .ok_or_else(|| invalid("rope_theta".to_string(), value, "a positive number"))?,
            (None, None) => default_theta,
        };
        if let Some(partial) = optional("partial_rotary_factor")?.filter(|partial| *partial != 1.0) {
            return Err(invalid(
                format!("{block}.partial_rotary_factor"),
                &partial.into(),
                "1 (whole heads rotated)",
            ));
        }

        let kind = parameters.get("rope_type").or_else(|| parameters.get("type"));
        let kind = kind.and_then(Value::as_str).unwrap_or("default");
        // A config's own key outranks the block's, and the model's length stands in for both.
        let original = || -> Result<usize, ModelError> {
            let own = json.get("original_max_position_embeddings").and_then(Value::as_u64).map(|n| n as f64);
            let length =
                own.or(optional("original_max_position_embeddings")?).unwrap_or(max_positions as f64);
            Ok(length as usize)
        };
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: required("factor")? },
            "dynamic" if head_dim > 2 => RopeScaling::Dynamic { factor: required("factor")?, max_positions },
            "yarn" => {
                let original_max_positions = original()?;
                let factor =
                    optional("factor")?.unwrap_or(max_positions as f64 / original_max_positions as f64);
                let magnitude = |scale: f64, m: f64| {
                    if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 }
                };
                let attention_factor =
                    match (optional("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                        (Some(given), ..) => given,
                        (None, Some(m), Some(all)) => magnitude(factor, m) / magnitude(factor, all),
                        _ => magnitude(factor, 1.0),
                    };
                RopeScaling::Yarn {
                    factor,
                    original_max_positions,
                    attention_factor,
                    beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                    beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                    truncate: parameters.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                }
            }
            "llama3" => RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_max_positions: original()?,
            },
            other => {
                let expected = "default, linear, dynamic, yarn or llama3";
                return Err(invalid(format!("{block}.rope_type"), &other.into(), expected));
            }
        };
        // The table is made in f32.
        let (frequencies, scale) = scaling.frequencies(theta, head_dim, max_positions);
        let finite = |frequency: &f64| (*frequency as f32 * max_positions as f32).is_finite();
        if !((scale as f32).is_finite() && frequencies.iter().all(finite)) {
            let found = serde_json::json!({ "rope_theta": theta, block: parameters });
            return Err(invalid(block.to_string(), &found, "values that give finite frequencies"));
        }
        Ok((theta, scaling))
    }

    /// Angle per position of each pair of features, and the factor on cos and sin, for sequences up to `length`.
    pub fn frequencies(&self, theta: f64, head_dim: usize, length: usize) -> (Vec<f64>, f64) {
        let dim = head_dim as f64;
        let plain = |theta: f64| -> Vec<f64> {
            (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim)).collect()
        };
        match *self {
            RopeScaling::Default => (plain(theta), 1.0),
            RopeScaling::Linear { factor } => (plain(theta).into_iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Dynamic { factor, max_positions } => {
                let max = max_positions as f64;
                let growth = factor * (length as f64).max(max) / max - (factor - 1.0);
                (plain(theta * growth.powf(dim / (dim - 2.0))), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                original_max_positions,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
            } => {
                // The feature whose wavelength makes `rotations` turns over the original length.
                let feature = |rotations: f64| {
                    dim * (original_max_positions as f64 / (rotations * TAU)).ln() / (2.0 * theta.ln())
                };
                let (low, high) = (feature(beta_fast), feature(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                let frequencies = plain(theta)
                    .into_iter()
                    .enumerate()
                    .map(|(i, f)| {
                        let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
                        f / factor * ramp + f * (1.0 - ramp)
                    })
                    .collect();
                (frequencies, attention_factor)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let original = original_max_positions as f64;
                let frequencies = plain(theta)
                    .into_iter()
                    .map(|f| {
                        let wavelength = TAU / f;
                        if wavelength < original / high_freq_factor {
                            f
                        } else if wavelength > original / low_freq_factor {
                            f / factor
                        } else {
                            let smooth = (original / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * f / factor + smooth * f
                        }
                    })
                    .collect();
                (frequencies, 1.0)
            }
        }
    }
}

/// cos and sin for a run of positions, `[1 or batch, 1, time, head_dim / 2]` each, f32.
#[derive(Clone)]
pub struct RopeTable {
    /// Cosines.
    pub cos: Tensor<4>,
    /// Sines.
    pub sin: Tensor<4>,
}

impl RopeTable {
    /// The table of the first `rows` of rows of `time` tokens.
    pub fn of_tokens(rotation: &Rotation, rows: usize, time: usize) -> Self {
        let table = |all: &Tensor<2>| {
            let half = all.dims()[1];
            all.clone().narrow(0, 0, rows * time).reshape([rows, 1, time, half])
        };
        Self { cos: table(&rotation.cos), sin: table(&rotation.sin) }
    }

    /// The table of positions `0 .. time` in sequences of the given lengths: with a scaling that goes by the length,
    /// one for each.
    pub fn of_lengths(
        scaling: &RopeScaling,
        theta: f64,
        head_dim: usize,
        lengths: &[usize],
        time: usize,
        device: &Device,
    ) -> Self {
        let frequencies = |length: &usize| scaling.frequencies(theta, head_dim, *length);
        let mut each: Vec<(Vec<f64>, f64)> = lengths.iter().map(frequencies).collect();
        if each.iter().all(|frequencies| *frequencies == each[0]) {
            each.truncate(1);
        }
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for frequencies in &each {
            let (cosines, sines) = Self::values(frequencies, 0..time);
            cos.extend(cosines);
            sin.extend(sines);
        }
        let shape = [each.len(), 1, time, head_dim / 2];
        let tensor = |values| Tensor::from_data(TensorData::new(values, shape), (device, DType::F32));
        Self { cos: tensor(cos), sin: tensor(sin) }
    }

    /// cos and sin at each of `positions`, `[positions, head_dim / 2]`, of frequencies and a factor.
    pub(super) fn values((frequencies, factor): &(Vec<f64>, f64), positions: Range<usize>) -> RopeValues {
        let angles = positions.flat_map(|position| {
            // transformers multiplies position and frequency in f32; at long contexts that rounding is part of what the
            // model was trained with.
            frequencies.iter().map(move |frequency| f64::from(position as f32 * *frequency as f32))
        });
        angles.map(|angle| ((angle.cos() * factor) as f32, (angle.sin() * factor) as f32)).unzip()
    }
}

/// [`RopeTable::values`] from position 0 to one of at least `positions`, remembered from call to call: trigonometry of a
/// whole batch takes as long as a GPU's step.
pub(super) fn remembered_values(frequencies: &(Vec<f64>, f64), positions: usize) -> Arc<RopeValues> {
    type Remembered = ((Vec<f64>, f64), usize, Arc<RopeValues>);
    static LAST: Mutex<Option<Remembered>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    match &*last {
        Some((of, held, values)) if of == frequencies && *held >= positions => values.clone(),
        _ => {
            let held = positions.next_power_of_two();
            let values = Arc::new(RopeTable::values(frequencies, 0..held));
            *last = Some((frequencies.clone(), held, values.clone()));
            values
        }
    }
}

/// Cosines and sines, row-major.
pub(super) type RopeValues = (Vec<f32>, Vec<f32>);
