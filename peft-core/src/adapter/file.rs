//! `adapter_model.safetensors`: reading strictly, attaching to a decoder, writing as PEFT does.
//!
//! Keys are `base_model.model.` + module path + `.lora_A.weight` / `.lora_B.weight`, or the plain parameter name of a
//! module saved whole.

use super::config::AdapterConfig;
use super::error::AdapterError;
use super::targets::{select, select_saved};
use crate::checkpoint::{Dtype, LazyTensor, SafetensorsFile, f32_bytes, write_safetensors};
use crate::model::Decoder;
use crate::nearest::did_you_mean;
use crate::projection::{Delta, LowRank, Parameter};
use burn::tensor::{DType, Tensor, TensorData};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The name of the weights' file.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

/// What PEFT calls the frozen weight below a change.
const BASE_LAYER: &str = ".base_layer.weight";

/// A low-rank pair of an adapter file.
#[derive(Debug, Clone)]
pub struct LowRankModule {
    /// `A`, row-major `[rank, columns]`.
    pub a: Vec<f32>,
    /// `B`, row-major `[rows, rank]`.
    pub b: Vec<f32>,
    /// `r`.
    pub rank: usize,
    /// `[rows, columns]` of the weight it changes.
    pub dims: [usize; 2],
    /// `s`.
    pub scale: f64,
}

/// An adapter folder, opened and checked for consistency in itself.
pub struct Adapter {
    /// The folder.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: AdapterConfig,
    /// Things worth telling the user.
    pub warnings: Vec<String>,
    file: SafetensorsFile,
}

impl Adapter {
    /// Opens an adapter folder.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let (config, warnings) = AdapterConfig::read(dir)?;
        let file = SafetensorsFile::open(dir.join(WEIGHTS_FILE))?;
        Ok(Self { dir: dir.to_path_buf(), config, warnings, file })
    }

    /// The file's keys.
    pub fn file(&self) -> &SafetensorsFile {
        &self.file
    }

    /// Reads every tensor against the base: `weights` maps a module path to the shape of its weight, `tied` says
    /// whether head and embedding share theirs.
    ///
    /// # Errors
    /// Keys that are missing, have no place, have the wrong shape or hold a non-finite value.
    pub fn resolve(
        &self,
        weights: &BTreeMap<String, Vec<usize>>,
        tied: bool,
    ) -> Result<Resolved, AdapterError> {
        let paths: Vec<String> = weights.keys().cloned().collect();
        let linear: Vec<&str> =
            paths.iter().filter(|path| is_linear(path, &weights[*path])).map(String::as_str).collect();
        let targets = select(&self.config.selection(false), &linear)?;
        let saved = select_saved(&self.config.modules_to_save, &paths, tied)?;
        let patterns = self.config.patterns()?;

        let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for path in &targets {
            let [rows, columns] = dims(&weights[*path]);
            let rank = patterns.rank(path);
            expected.insert(format!("{PREFIX}{path}.lora_A.weight"), vec![rank, columns]);
            expected.insert(format!("{PREFIX}{path}.lora_B.weight"), vec![rows, rank]);
        }
        for path in &saved {
            expected.insert(format!("{PREFIX}{path}.weight"), weights[path].clone());
        }
        // The bias of a module saved whole, and the frozen weight that PEFT adds for a targeted head.
        let optional = |key: &str| {
            let name = key.strip_prefix(PREFIX).unwrap_or_default();
            let bias =
                name.strip_suffix(".bias").is_some_and(|module| saved.iter().any(|path| path == module));
            bias || name.strip_suffix(BASE_LAYER).is_some_and(|module| targets.contains(&module))
        };
        self.require_same_keys(&expected, optional)?;

        let mut low_rank = BTreeMap::new();
        let mut whole = BTreeMap::new();
        for path in targets {
            let dims = dims(&weights[path]);
            let base_key = format!("{PREFIX}{path}{BASE_LAYER}");
            if self.file.contains(&base_key) {
                whole.insert(format!("{path}.weight"), self.read(&base_key, &weights[path])?);
            }
            let a_key = format!("{PREFIX}{path}.lora_A.weight");
            let b_key = format!("{PREFIX}{path}.lora_B.weight");
            let (a, b) = (self.read(&a_key, &expected[&a_key])?, self.read(&b_key, &expected[&b_key])?);
            let module = LowRankModule { a, b, rank: patterns.rank(path), dims, scale: patterns.scale(path) };
            low_rank.insert(path.to_string(), module);
        }
        for path in saved {
            let key = format!("{PREFIX}{path}.weight");
            whole.insert(format!("{path}.weight"), self.read(&key, &expected[&key])?);
            let key = format!("{PREFIX}{path}.bias");
            if self.file.contains(&key) {
                whole.insert(format!("{path}.bias"), self.read(&key, &weights[&path][..1])?);
            }
        }
        Ok(Resolved { low_rank, whole })
    }

    fn require_same_keys(
        &self,
        expected: &BTreeMap<String, Vec<usize>>,
        optional: impl Fn(&str) -> bool,
    ) -> Result<(), AdapterError> {
        let others = |n: usize| {
            if n > 1 { format!(" (and {} more)", n - 1) } else { String::new() }
        };
        let missing: Vec<&String> = expected.keys().filter(|key| !self.file.contains(key)).collect();
        let unexpected: Vec<&str> =
            self.file.names().filter(|key| !expected.contains_key(*key) && !optional(key)).collect();
        if let Some(key) = missing.first() {
            return Err(AdapterError::MissingKey {
                path: self.dir.join(WEIGHTS_FILE),
                key: key.to_string(),
                suggestion: did_you_mean(key, unexpected.iter().copied()),
                others: others(missing.len()),
            });
        }
        if let Some(key) = unexpected.first() {
            return Err(AdapterError::UnexpectedKey {
                path: self.dir.join(WEIGHTS_FILE),
                key: key.to_string(),
                suggestion: did_you_mean(key, expected.keys().map(String::as_str)),
                others: others(unexpected.len()),
            });
        }
        Ok(())
    }

    fn read(&self, key: &str, expected: &[usize]) -> Result<Vec<f32>, AdapterError> {
        let path = self.dir.join(WEIGHTS_FILE);
        let tensor = self.file.tensor(key)?;
        if tensor.shape != expected {
            let (found, expected) = (tensor.shape.to_vec(), expected.to_vec());
            return Err(AdapterError::Shape { path, key: key.to_string(), found, expected });
        }
        let values = tensor.to_f32()?;
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(AdapterError::NonFinite { path, key: key.to_string() }),
        }
    }

    /// Puts the adapter onto a decoder. Its parameters are frozen.
    pub fn attach(&self, model: &mut Decoder) -> Result<(), AdapterError> {
        let weights = model_weights(model);
        let resolved = self.resolve(&weights, model.config.tie_word_embeddings)?;
        let device = model.device.clone();
        let tensor = |values: &[f32], dims: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), dims), (&device, DType::F32))
        };
        for projection in model.projections_mut() {
            let Some(module) = resolved.low_rank.get(&projection.path) else {
                continue;
            };
            let [rows, columns] = module.dims;
            let name = |factor: &str| format!("{}.{factor}.weight", projection.path);
            projection.delta = Some(Delta::LowRank(LowRank {
                a: Parameter::matrix(name("lora_A"), tensor(&module.a, [module.rank, columns])),
                b: Parameter::matrix(name("lora_B"), tensor(&module.b, [rows, module.rank])),
                scale: module.scale,
                dropout: self.config.lora_dropout,
            }));
        }
        for parameter in model.parameters_mut() {
            if let Some(values) = resolved.whole.get(&parameter.name) {
                parameter.value = tensor(values, parameter.value.dims());
            }
        }
        Ok(())
    }
}

/// An adapter's tensors, matched with its base.
pub struct Resolved {
    /// By module path.
    pub low_rank: BTreeMap<String, LowRankModule>,
    /// By parameter name: replacements of whole tensors.
    pub whole: BTreeMap<String, Vec<f32>>,
}

/// Shapes of all weights of the decoder, by module path.
fn model_weights(model: &Decoder) -> BTreeMap<String, Vec<usize>> {
    let weight = |p: &&Parameter| !p.name.contains(".lora_") && p.name.ends_with(".weight");
    let entry = |p: &Parameter| (p.name.trim_end_matches(".weight").to_string(), p.shape.clone());
    model.parameters().into_iter().filter(weight).map(entry).collect()
}

/// Whether a weight belongs to a linear module.
pub(super) fn is_linear(path: &str, shape: &[usize]) -> bool {
    shape.len() == 2 && !path.ends_with("embed_tokens")
}

fn dims(shape: &[usize]) -> [usize; 2] {
    [shape[0], shape[1]]
}

/// Writes the decoder's adapter, `adapter_config.json` and `adapter_model.safetensors`, into the folder `dir`: the
/// factors of every change and every other trainable parameter, in f32.
///
/// # Errors
/// A non-finite value, or a failure to write.
pub fn save(model: &Decoder, config: &AdapterConfig, dir: &Path) -> Result<(), AdapterError> {
    let factors: BTreeSet<&str> = model
        .projections()
        .filter_map(|projection| projection.delta.as_ref())
        .flat_map(|delta| delta.parameters().into_iter().map(|parameter| parameter.name.as_str()))
        .collect();
    let mut tensors = Vec::new();
    for parameter in model.parameters() {
        if !parameter.trainable && !factors.contains(parameter.name.as_str()) {
            continue;
        }
        let key = format!("{PREFIX}{}", parameter.name);
        let bytes = {
            let key = key.clone();
            move || {
                let values = parameter.to_host();
                match values.iter().all(|value| value.is_finite()) {
                    true => Ok(Cow::Owned(f32_bytes(&values))),
                    false => Err(AdapterError::NonFinite { path: dir.join(WEIGHTS_FILE), key: key.clone() }),
                }
            }
        };
        tensors.push(LazyTensor::new(key, Dtype::F32, parameter.shape.clone(), bytes));
    }
    // PEFT saves the frozen weight of a targeted head along with its factors.
    for head in model.projections().filter(|p| p.path == "lm_head" && p.delta.is_some()) {
        let bytes = || Ok(Cow::Owned(f32_bytes(&head.weight.to_host())));
        let key = format!("{PREFIX}{}{BASE_LAYER}", head.path);
        tensors.push(LazyTensor::new(key, Dtype::F32, head.weight.shape.clone(), bytes));
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&dir.join(WEIGHTS_FILE), tensors, &metadata)?;
    config.write(dir)
}
