//! The folder of a NOLA: coefficients and a configuration that says how the bases are drawn.
//!
//! `adapter_config.json` holds the method's keys, the seed, `rng` (name, version and type of the generator) and
//! `basis_sha256`, a hash over lengths and first values of all bases in the order of the modules' paths, which shows that
//! the same are drawn again. `adapter_model.safetensors` holds `PATH.nola_alpha` `[k]` and `PATH.nola_beta` `[l]`,
//! f32; in 8 or 4 bits these are bytes, and `nola_steps` `[modules, 2]` holds what alpha and beta of each module are
//! multiples of, in the order of the modules' paths.

use super::bases::{ALPHA, BETA, Bases};
use super::config::NolaBlock;
use super::quantise::CoefficientBits;
use crate::registry::keys_of;
use burn::tensor::Device;
use peft_core::adapter::{
    AdapterError, AdapterFolder, FileFormat, Layout, Parts, SavedAdapter, WEIGHTS_FILE, common_config, key,
    select_linear, spelled_out, write_adapter,
};
use peft_core::checkpoint::{Dtype, LazyTensor, f32_bytes, safetensors_bytes};
use peft_core::kernels::RandomBasis;
use peft_core::model::{BaseShapes, Decoder};
use peft_core::projection::{Delta, Form, Parameter, refresh};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// The files of NOLA.
pub(super) static FORMAT: FileFormat =
    FileFormat { peft_type: "NOLA", open: |dir| Ok(Box::new(NolaAdapter::open(dir)?)) };

/// The generator of the bases, as the configuration names it.
fn rng() -> Value {
    json!({"name": RandomBasis::NAME, "version": RandomBasis::VERSION, "dtype": "f32"})
}

/// What shows that the same bases were drawn.
fn fingerprint<'a>(modules: impl Iterator<Item = &'a Bases>) -> String {
    RandomBasis::fingerprint(modules.flat_map(Bases::all))
}

/// The modules that `block` names on a base, with their bases, by path.
pub(super) fn modules(
    block: &NolaBlock,
    seed: u64,
    base: &BaseShapes,
    strict: bool,
) -> Result<BTreeMap<String, Bases>, AdapterError> {
    let chosen = select_linear(&block.selection(strict), base)?;
    let bases = |(path, dims): (String, [usize; 2])| {
        let bases = Bases::new(block, seed, &path, dims);
        (path, bases)
    };
    Ok(chosen.into_iter().map(bases).collect())
}

/// The key of what quantised coefficients are multiples of.
const STEPS: &str = "base_model.nola_steps";

/// Keys, types and shapes of the tensors of modules.
fn layout<'a>(
    block: &NolaBlock,
    paths: impl Iterator<Item = &'a String>,
) -> Vec<(String, Dtype, Vec<usize>)> {
    let (mut tensors, mut modules, bits) = (Vec::new(), 0, block.coefficient_bits);
    for path in paths {
        modules += 1;
        for (part, count) in [(ALPHA, block.num_basis_a), (BETA, block.num_basis_b)] {
            tensors.push(match bits {
                CoefficientBits::B32 => (key(path, &format!(".{part}")), Dtype::F32, vec![count]),
                _ => (key(path, &format!(".{part}")), Dtype::U8, vec![bits.bytes(count)]),
            });
        }
    }
    if bits != CoefficientBits::B32 {
        tensors.push((STEPS.to_string(), Dtype::F32, vec![modules, 2]));
    }
    tensors
}

/// Bytes of the weights' file.
///
/// # Errors
/// Sizes beyond all bounds.
pub(super) fn file_bytes<'a>(
    block: &NolaBlock,
    paths: impl Iterator<Item = &'a String>,
) -> Result<u64, AdapterError> {
    let tensors = layout(block, paths).into_iter();
    let tensors = tensors.map(|(key, dtype, shape)| LazyTensor::shape_only(key, dtype, shape)).collect();
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    Ok(safetensors_bytes(Path::new(WEIGHTS_FILE), tensors, &metadata)?)
}

/// Writes the coefficients of a model whose bases are those of `block` under `seed`.
///
/// # Errors
/// A coefficient that is not finite, or a failure to write.
pub(super) fn save(
    model: &Decoder,
    block: &NolaBlock,
    seed: u64,
    (base, revision): (&str, Option<&str>),
    dir: &Path,
) -> Result<(), AdapterError> {
    let shapes = model.base_shapes();
    let written = NolaBlock {
        target_modules: Some(spelled_out(&block.selection(true), &shapes)?),
        basis_seed: Some(seed),
        ..block.clone()
    };
    let mut config = common_config(FORMAT.peft_type, Some(base), revision);
    config.extend(keys_of(&written));
    config.insert("rng".to_string(), rng());
    let modules = modules(block, seed, &shapes, true)?;
    config.insert("basis_sha256".to_string(), fingerprint(modules.values()).into());

    let (mut tensors, mut steps) = (Vec::new(), BTreeMap::new());
    let mut add = |key: String, dtype, shape: Vec<usize>, bytes: Vec<u8>| {
        tensors.push(LazyTensor::new(key, dtype, shape, move || Ok(Cow::Owned(bytes.clone()))));
    };
    for projection in model.projections() {
        let Some(Delta::Combination(form)) = &projection.delta else { continue };
        let mut of_module = Vec::new();
        for Parameter { name, value, .. } in form.parameters() {
            let (key, values): (_, Vec<f32>) =
                (key(name, ""), value.clone().into_data().iter::<f32>().collect());
            if !values.iter().all(|value| value.is_finite()) {
                return Err(AdapterError::NonFinite { path: dir.join(WEIGHTS_FILE), key });
            }
            match block.coefficient_bits {
                CoefficientBits::B32 => add(key, Dtype::F32, vec![values.len()], f32_bytes(&values)),
                bits => {
                    let (bytes, step) = bits.quantise(&values);
                    of_module.push(step);
                    add(key, Dtype::U8, vec![bytes.len()], bytes);
                }
            }
        }
        steps.insert(&projection.path, of_module);
    }
    if block.coefficient_bits != CoefficientBits::B32 {
        let shape = vec![steps.len(), 2];
        let steps: Vec<f32> = steps.into_values().flatten().collect();
        add(STEPS.to_string(), Dtype::F32, shape, f32_bytes(&steps));
    }
    write_adapter(dir, config, tensors)
}

/// A saved NOLA.
pub(super) struct NolaAdapter {
    folder: AdapterFolder,
    /// Its keys.
    pub block: NolaBlock,
    /// The seed of its bases.
    pub seed: u64,
    basis_sha256: String,
}

impl NolaAdapter {
    /// Opens an adapter folder.
    ///
    /// # Errors
    /// Files that are missing or damaged, keys out of range, another generator.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let mut folder = AdapterFolder::open(dir)?;
        let (found, expected) = (folder.config.remove("rng").unwrap_or_default(), rng());
        if found != expected {
            let message =
                format!("rng is {found}, but the bases that can be drawn here are those of {expected}");
            return Err(folder.wrong(message));
        }
        let Some(Value::String(basis_sha256)) = folder.config.remove("basis_sha256") else {
            return Err(folder.wrong("basis_sha256 is missing, a hash over the first values of the bases"));
        };
        let block: NolaBlock = folder.parse(FORMAT.peft_type, json!({}))?;
        block.check().map_err(|message| folder.wrong(message))?;
        let Some(seed) = block.basis_seed else {
            return Err(folder.wrong("basis_seed is missing, without which the bases are lost"));
        };
        Ok(Self { folder, block, seed, basis_sha256 })
    }

    /// The coefficients of a part of the module at `path`; quantised ones are multiples of `step`.
    fn coefficients(
        &self,
        path: &str,
        part: &str,
        count: usize,
        step: f32,
    ) -> Result<Vec<f32>, AdapterError> {
        let key = key(path, &format!(".{part}"));
        let bits = self.block.coefficient_bits;
        if bits == CoefficientBits::B32 {
            return self.folder.read(&key, &[count]);
        }
        let tensor = self.folder.file.tensor(&key)?;
        let expected = vec![bits.bytes(count)];
        if tensor.shape != expected || tensor.dtype != Dtype::U8 {
            let (path, found) = (self.folder.weights_path(), tensor.shape.to_vec());
            return Err(AdapterError::Shape { path, key, found, expected });
        }
        Ok(bits.restore(tensor.bytes, step, count))
    }
}

impl SavedAdapter for NolaAdapter {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    fn parts(&self, base: &BaseShapes, device: &Device) -> Result<Parts, AdapterError> {
        let modules = modules(&self.block, self.seed, base, false)?;
        let mut expected = Layout::default();
        let tensors = layout(&self.block, modules.keys()).into_iter();
        expected.required.extend(tensors.map(|(key, _, shape)| (key, shape)));
        self.folder.require_keys(&expected)?;
        let found = fingerprint(modules.values());
        if found != self.basis_sha256 {
            return Err(self.folder.wrong(format!(
                "basis_sha256 is {}, but the bases drawn from basis_seed {} for these modules have {found}: the seed, \
                 the modules or the policy are not those of the training, and the coefficients mean nothing",
                self.basis_sha256, self.seed
            )));
        }
        let steps = match self.block.coefficient_bits {
            CoefficientBits::B32 => vec![1.0; 2 * modules.len()],
            _ => self.folder.read(STEPS, &[modules.len(), 2])?,
        };
        let mut forms = Vec::new();
        for ((path, bases), steps) in modules.iter().zip(steps.chunks_exact(2)) {
            let alpha = self.coefficients(path, ALPHA, self.block.num_basis_a, steps[0])?;
            let beta = self.coefficients(path, BETA, self.block.num_basis_b, steps[1])?;
            forms.push(bases.combination(&self.block, alpha, beta, 0.0, device));
        }
        refresh(forms.iter_mut());
        let changes = modules.into_keys().zip(forms.into_iter().map(Delta::Combination)).collect();
        Ok(Parts { changes, ..Parts::default() })
    }
}
