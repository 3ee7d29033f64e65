//! The adapter's files: `adapter_config.json` with the modules' shapes and numbers of values, and a weights' file with two
//! tensors a module, the values (`.sparse_values`, bf16 or f32, in the order of their positions) and the positions as a
//! stream of bytes (`.sparse_positions`, [`super::positions`]).

use super::block::{Target, ValuesDtype};
use super::positions;
use crate::registry::keys_of;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::adapter::{
    AdapterError, AdapterFolder, FileFormat, Folding, Layout, Parts, SavedAdapter, TensorChange, Unfolding,
    WEIGHTS_FILE, base_shapes, common_config, key, require_base, write_adapter,
};
use peft_core::checkpoint::{
    Checkpoint, CheckpointError, Dtype, LazyTensor, from_f32, safetensors_bytes, to_f32,
};
use peft_core::kernels::SparsePattern;
use peft_core::model::{BaseShapes, Decoder};
use peft_core::nearest::did_you_mean;
use peft_core::projection::{Delta, Sparse};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const VALUES: &str = ".sparse_values";
const POSITIONS: &str = ".sparse_positions";

/// The format.
pub static SPARSE_FORMAT: FileFormat =
    FileFormat { peft_type: "SPARSE", open: |dir| Ok(Box::new(SparseAdapter::open(dir)?)) };

/// What the configuration says beyond what every adapter's does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SparseConfig {
    /// Values of each module.
    pub num_deltas: BTreeMap<String, usize>,
    /// `[out, in]` of each module.
    pub shapes: BTreeMap<String, [usize; 2]>,
    /// Type of the values.
    pub values_dtype: ValuesDtype,
    /// Fingerprint of the modules' weights in the base.
    pub base_tensors_sha256: String,
}

impl SparseConfig {
    /// Names of the tensors of the base that are changed.
    pub fn weights(&self) -> Vec<String> {
        self.num_deltas.keys().map(|path| format!("{path}.weight")).collect()
    }
}

/// The entries of a module.
#[derive(Debug, Clone)]
pub struct SparseModule {
    /// Positions.
    pub pattern: Arc<SparsePattern>,
    /// Values, in their order.
    pub values: Vec<f32>,
}

/// A sparse adapter's folder, opened.
pub struct SparseAdapter {
    folder: AdapterFolder,
    config: SparseConfig,
}

impl SparseAdapter {
    /// Opens the folder.
    ///
    /// # Errors
    /// Files that are missing, damaged or do not agree with each other.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let folder = AdapterFolder::open(dir)?;
        let found = folder.config.get("peft_type");
        if found.and_then(Value::as_str) != Some(SPARSE_FORMAT.peft_type) {
            let found = found.unwrap_or(&Value::Null);
            return Err(folder.wrong(format!("peft_type is {found}, expected SPARSE: not a sparse adapter")));
        }
        let config: SparseConfig = serde_json::from_value(Value::Object(folder.config.clone()))
            .map_err(|error| folder.wrong(format!("not a sparse adapter: {error}")))?;
        if let Some(path) = config.num_deltas.keys().find(|path| !config.shapes.contains_key(*path)) {
            return Err(folder.wrong(format!("num_deltas names `{path}`, shapes does not")));
        }
        if let Some(path) = config.shapes.keys().find(|path| !config.num_deltas.contains_key(*path)) {
            return Err(folder.wrong(format!("shapes names `{path}`, num_deltas does not")));
        }
        let mut layout = Layout::default();
        for (path, count) in &config.num_deltas {
            layout.require(path, VALUES, &[*count]);
            layout.require(path, POSITIONS, &[]);
        }
        folder.require_keys(&layout)?;
        Ok(Self { folder, config })
    }

    /// What the configuration says.
    pub fn config(&self) -> &SparseConfig {
        &self.config
    }

    /// Reads the entries of every module.
    ///
    /// # Errors
    /// Values that are not finite or not as many as the configuration says; positions that are no such stream, outside
    /// the module or not in order.
    pub fn modules(&self) -> Result<BTreeMap<String, SparseModule>, AdapterError> {
        let mut modules = BTreeMap::new();
        for (path, count) in &self.config.num_deltas {
            let dims = self.config.shapes[path];
            let values = self.folder.read(&key(path, VALUES), &[*count])?;
            let damaged = |message: String| AdapterError::Config {
                path: self.folder.weights_path(),
                message: format!("tensor `{}`: {message}", key(path, POSITIONS)),
            };
            let stream = self.folder.file.tensor(&key(path, POSITIONS))?;
            let places = dims[0] as u64 * dims[1] as u64;
            let positions = positions::decode(stream.bytes, *count, places)
                .map_err(|error| damaged(error.to_string()))?;
            let pattern = SparsePattern::new(dims, positions).map_err(|error| damaged(error.to_string()))?;
            modules.insert(path.clone(), SparseModule { pattern: Arc::new(pattern), values });
        }
        Ok(modules)
    }

    /// As [`modules`](Self::modules), of a base with those shapes.
    fn modules_on(&self, base: &BaseShapes) -> Result<BTreeMap<String, SparseModule>, AdapterError> {
        for (path, dims) in &self.config.shapes {
            let file = self.folder.weights_path();
            match base.weights.get(path) {
                Some(shape) if shape[..] == dims[..] => {}
                Some(shape) => {
                    let (found, expected) = (dims.to_vec(), shape.clone());
                    return Err(AdapterError::Shape { path: file, key: path.clone(), found, expected });
                }
                None => {
                    return Err(AdapterError::UnexpectedKey {
                        path: file,
                        key: key(path, VALUES),
                        suggestion: did_you_mean(path, base.weights.keys().map(String::as_str)),
                        others: String::new(),
                    });
                }
            }
        }
        self.modules()
    }
}

impl SavedAdapter for SparseAdapter {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    fn parts(&self, base: &BaseShapes, device: &Device) -> Result<Parts, AdapterError> {
        let changes = self.modules_on(base)?.into_iter().map(|(path, SparseModule { pattern, values })| {
            let data = TensorData::new(values, [1, pattern.len()]);
            let values = Tensor::from_data(data, (device, DType::F32));
            let form = Sparse::new(&path, pattern, values);
            (path, Delta::Sparse(form))
        });
        Ok(Parts { changes: changes.collect(), ..Parts::default() })
    }

    fn require_base(&self, base: &Checkpoint) -> Result<(), AdapterError> {
        let SparseConfig { base_tensors_sha256, .. } = &self.config;
        require_base(&self.folder.dir, base, &self.config.weights(), base_tensors_sha256)
    }

    /// Weights without an entry keep their bits.
    fn folding<'a>(&'a self, base: &'a Checkpoint) -> Result<Folding<'a>, AdapterError> {
        let modules = self.modules_on(&base_shapes(base)?)?;
        let mut folding = Folding { folded: modules.len(), ..Folding::default() };
        folding.rewrite.changes = changes(modules, 1.0);
        Ok(folding)
    }

    fn unfolding<'a>(&'a self, merged: &'a Checkpoint) -> Result<Unfolding<'a>, AdapterError> {
        let modules = self.modules_on(&base_shapes(merged)?)?;
        Ok(Unfolding { undo: changes(modules, -1.0), ..Unfolding::default() })
    }
}

/// `W + sign·Δ` for the weight of each module.
fn changes<'a>(modules: BTreeMap<String, SparseModule>, sign: f32) -> BTreeMap<String, TensorChange<'a>> {
    let change = |(path, SparseModule { pattern, values }): (String, SparseModule)| {
        let add = move |mut weight: Vec<f32>| {
            for (position, value) in pattern.positions().iter().zip(&values) {
                weight[*position as usize] += sign * value;
            }
            Ok(weight)
        };
        (format!("{path}.weight"), Box::new(add) as TensorChange)
    };
    modules.into_iter().map(change).collect()
}

/// Writes the adapter of a decoder with sparse changes into the existing folder `dir`.
///
/// # Errors
/// A value that is not finite in the type it is written in, or a failure to write.
pub fn save(
    model: &Decoder,
    base: Option<&str>,
    revision: Option<&str>,
    values_dtype: ValuesDtype,
    base_tensors_sha256: &str,
    dir: &Path,
) -> Result<(), AdapterError> {
    let forms = sparse_forms(model);
    let config = SparseConfig {
        num_deltas: forms.iter().map(|(path, form)| (path.to_string(), form.pattern.len())).collect(),
        shapes: forms.iter().map(|(path, form)| (path.to_string(), form.pattern.dims())).collect(),
        values_dtype,
        base_tensors_sha256: base_tensors_sha256.to_string(),
    };
    let mut json = common_config(SPARSE_FORMAT.peft_type, base, revision);
    json.insert("target_modules".to_string(), json!(config.num_deltas.keys().collect::<Vec<_>>()));
    json.extend(keys_of(&config));
    let mut tensors = Vec::new();
    for (path, form) in forms {
        let stream = positions::encode(form.pattern.positions());
        let shape = vec![stream.len()];
        let bytes = move || Ok(Cow::Owned(stream.clone()));
        tensors.push(LazyTensor::new(key(path, POSITIONS), Dtype::U8, shape, bytes));
        let (dtype, name) = (values_dtype.dtype(), key(path, VALUES));
        let bytes = {
            let name = name.clone();
            move || {
                let bytes = from_f32(&form.values.to_host(), dtype).map_err(CheckpointError::from)?;
                let written = to_f32(dtype, &bytes).map_err(CheckpointError::from)?;
                match written.iter().all(|value| value.is_finite()) {
                    true => Ok(Cow::Owned(bytes)),
                    false => Err(AdapterError::NonFinite { path: dir.join(WEIGHTS_FILE), key: name.clone() }),
                }
            }
        };
        tensors.push(LazyTensor::new(name, dtype, vec![form.pattern.len()], bytes));
    }
    write_adapter(dir, json, tensors)
}

/// Bytes of the weights' file of modules with so many values where positions lie evenly, which take `log₂ C(N, K)` bits
/// then; that is at most `K·log₂(e·N/K)`, and more than where they crowd together.
///
/// # Errors
/// A path that comes twice.
pub fn expected_bytes<'t>(
    targets: impl Iterator<Item = &'t Target>,
    values_dtype: ValuesDtype,
) -> Result<u64, AdapterError> {
    let mut tensors = Vec::new();
    for Target { path, dims, values } in targets {
        let (count, places) = (*values as f64, (dims[0] * dims[1]) as f64);
        let bits = count * (std::f64::consts::E * places / count).log2();
        let mut add = |part, dtype, length| {
            tensors.push(LazyTensor::shape_only(key(path, part), dtype, vec![length]));
        };
        add(POSITIONS, Dtype::U8, (bits / 8.0).ceil() as usize);
        add(VALUES, values_dtype.dtype(), *values);
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    Ok(safetensors_bytes(Path::new(WEIGHTS_FILE), tensors, &metadata)?)
}

/// The sparse changes of a decoder, by path.
fn sparse_forms(model: &Decoder) -> BTreeMap<&str, &Sparse> {
    let forms = model.projections().filter_map(|projection| match &projection.delta {
        Some(Delta::Sparse(form)) => Some((projection.path.as_str(), form)),
        _ => None,
    });
    forms.collect()
}
