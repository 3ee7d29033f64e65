//! The state of a run on disk: everything a later process needs to go on.
//!
//! `checkpoints/step-NNNNNNNN/` holds the method's artifact for use elsewhere, `state.safetensors` (every trainable
//! parameter and the optimizer's memory, f32) and `state.json`. Data order and random streams are functions of the
//! seed and the step, so the step is all of them. A folder under its final name is complete.

use super::error::TrainError;
use super::method::Method;
use super::optimizer::ParameterOptimizer;
use crate::checkpoint::{
    Dtype, LazyTensor, SafetensorsFile, StagedDir, f32_bytes, read_bounded, write_safetensors,
};
use crate::model::Decoder;
use burn::tensor::{DType, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What must be the same for a run to continue: names and values, compared as they are.
pub type Fingerprint = BTreeMap<String, String>;

#[derive(Serialize, Deserialize)]
struct StateFile {
    step: u64,
    fingerprint: Fingerprint,
    optimizer: BTreeMap<String, i64>,
}

const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";
/// Bytes of the largest `state.json` read.
const MAX_STATE_BYTES: u64 = 256 << 20;
const PARAMETER: &str = "parameter/";
const OPTIMIZER: &str = "optimizer/";

/// The folder of the checkpoint after `step`.
fn folder(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join("checkpoints").join(format!("step-{step:08}"))
}

/// Complete checkpoints, oldest first.
pub(super) fn list(output_dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(output_dir.join("checkpoints")).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            entry.path().join(STATE).is_file().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// Saves the state after `step` and removes the oldest checkpoints beyond `keep`.
pub(super) fn save(
    output_dir: &Path,
    step: u64,
    model: &Decoder,
    method: &dyn Method,
    optimizer: &dyn ParameterOptimizer,
    fingerprint: &Fingerprint,
    keep: Option<usize>,
) -> Result<PathBuf, TrainError> {
    let path = folder(output_dir, step);
    let staged = StagedDir::replacing(&path)?;
    let artifact = staged.path().join(method.artifact());
    std::fs::create_dir_all(&artifact).map_err(|source| TrainError::Io { path: artifact.clone(), source })?;
    method.export(model, &artifact)?;

    let (memory, scalars) = optimizer.save();
    let parameters = model.parameters().into_iter().filter(|parameter| parameter.trainable);
    let mut tensors: Vec<LazyTensor<TrainError>> = parameters
        .map(|parameter| {
            let dims = parameter.value.dims().to_vec();
            let bytes = || Ok::<_, TrainError>(Cow::Owned(f32_bytes(&parameter.to_host())));
            LazyTensor::new(format!("{PARAMETER}{}", parameter.name), Dtype::F32, dims, bytes)
        })
        .collect();
    for (name, data) in &memory {
        let bytes = || Ok(Cow::Owned(f32_bytes(&data.iter::<f32>().collect::<Vec<_>>())));
        tensors.push(LazyTensor::new(format!("{OPTIMIZER}{name}"), Dtype::F32, data.shape().to_vec(), bytes));
    }
    write_safetensors(&staged.path().join(TENSORS), tensors, &BTreeMap::new())?;
    let state = StateFile { step, fingerprint: fingerprint.clone(), optimizer: scalars };
    let json = serde_json::to_vec_pretty(&state)
        .map_err(|error| TrainError::Io { path: path.join(STATE), source: error.into() })?;
    crate::checkpoint::write_file(&staged.path().join(STATE), &json)?;
    staged.commit()?;

    if let Some(keep) = keep {
        let saved = list(output_dir);
        for (_, old) in saved.iter().take(saved.len().saturating_sub(keep.max(1))) {
            std::fs::remove_dir_all(old).map_err(|source| TrainError::Io { path: old.clone(), source })?;
        }
    }
    Ok(path)
}

/// Takes up the state in the checkpoint folder `path`; returns the steps it finished.
///
/// # Errors
/// A state of another run (the first fingerprint entry that differs is named), of another set of parameters, or a
/// damaged one.
pub(super) fn load(
    path: &Path,
    model: &mut Decoder,
    optimizer: &mut dyn ParameterOptimizer,
    fingerprint: &Fingerprint,
) -> Result<u64, TrainError> {
    let json_path = path.join(STATE);
    let wrong = |path: &Path, message: String| TrainError::State { path: path.to_path_buf(), message };
    let state: StateFile = serde_json::from_slice(&read_bounded(&json_path, MAX_STATE_BYTES)?)
        .map_err(|error| wrong(&json_path, format!("not a saved state: {error}")))?;
    for (key, value) in fingerprint {
        let saved = state.fingerprint.get(key).map_or("(nothing)", String::as_str);
        if saved != value {
            let message =
                format!("saved by another run: {key} was {saved}, is {value}; use a fresh output_dir");
            return Err(wrong(&json_path, message));
        }
    }

    let file = SafetensorsFile::open(path.join(TENSORS))?;
    let device = model.device.clone();
    let mut names = Vec::new();
    for parameter in model.parameters_mut().into_iter().filter(|parameter| parameter.trainable) {
        let tensor = file.tensor(&format!("{PARAMETER}{}", parameter.name))?;
        let dims = parameter.value.dims();
        if tensor.shape != dims {
            let message =
                format!("`{}` has shape {:?}, the model has {dims:?}", parameter.name, tensor.shape);
            return Err(wrong(file.path(), message));
        }
        parameter.value = Tensor::from_data(TensorData::new(tensor.to_f32()?, dims), (&device, DType::F32));
        names.push(parameter.name.clone());
    }
    let mut memory = BTreeMap::new();
    for key in file.names() {
        let Some(name) = key.strip_prefix(OPTIMIZER) else {
            continue;
        };
        let tensor = file.tensor(key)?;
        memory.insert(name.to_string(), TensorData::new(tensor.to_f32()?, tensor.shape.to_vec()));
    }
    optimizer
        .load(&names, memory, state.optimizer, &device)
        .map_err(|name| wrong(file.path(), format!("the optimizer's memory of `{name}` is missing")))?;
    Ok(state.step)
}
