//! The state of a run on disk: everything a later process needs to go on.
//!
//! `checkpoints/step-NNNNNNNN/` holds the method's artifact for use elsewhere, `state.safetensors` (every trainable
//! parameter, the optimizer's memory and the gradients of a step in progress, f32; what the method remembers) and
//! `state.json`. A folder under its final name is complete.

use super::course::Course;
use super::error::TrainError;
use super::method::{Method, MethodState, ParameterRole, PlannedParameter};
use super::optimizer::ParameterOptimizer;
use crate::checkpoint::{
    Dtype, LazyTensor, SafetensorsFile, StagedDir, f32_bytes, read_bounded, remove_dir, safetensors_bytes,
    write_file, write_safetensors,
};
use crate::model::{Decoder, ParameterShape};
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Names and values, compared as they are.
pub type Fingerprint = BTreeMap<String, String>;

/// What a saved state is compared with before a run goes on from it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Identity {
    /// What decides the course of the run: any difference is an error.
    pub run: Fingerprint,
    /// What may change its last bits, such as the device: a difference is a warning.
    pub environment: Fingerprint,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    course: Course,
    identity: Identity,
    optimizer: BTreeMap<String, i64>,
    /// Trained parameters that the optimizer has no memory of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    unremembered: Vec<String>,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    method: Value,
}

const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";
/// Bytes of the largest `state.json` read.
const MAX_STATE_BYTES: u64 = 256 << 20;
const PARAMETER: &str = "parameter/";
const OPTIMIZER: &str = "optimizer/";
const GRADIENT: &str = "gradient/";
const METHOD: &str = "method/";

/// The folder of the checkpoint after `step`.
pub(super) fn folder(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join("checkpoints").join(format!("step-{step:08}"))
}

/// Complete checkpoints, oldest first.
pub(super) fn list(output_dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(output_dir.join("checkpoints")).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            is_complete(&entry.path()).then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// Whether the folder holds a state.
pub(super) fn is_complete(path: &Path) -> bool {
    path.join(STATE).is_file() && path.join(TENSORS).is_file()
}

/// What is saved.
pub(super) struct Snapshot<'a> {
    /// Where the run stands.
    pub course: &'a Course,
    /// The run.
    pub identity: &'a Identity,
    /// Its parameters.
    pub model: &'a Decoder,
    /// Its method.
    pub method: &'a dyn Method,
    /// Its optimizer.
    pub optimizer: &'a dyn ParameterOptimizer,
    /// Gradients summed so far, where the run was stopped within a step.
    pub gradients: &'a BTreeMap<String, Tensor<2>>,
}

/// Writes a checkpoint beside its final place, ready to be committed.
///
/// # Errors
/// A parameter that is not finite, or a failure to write.
pub(super) fn stage(output_dir: &Path, snapshot: &Snapshot) -> Result<StagedDir, TrainError> {
    let Snapshot { course, model, .. } = *snapshot;
    for parameter in model.parameters().into_iter().filter(|parameter| parameter.trainable) {
        if !parameter.to_host().iter().all(|value| value.is_finite()) {
            return Err(TrainError::NonFiniteParameter { name: parameter.name.clone(), step: course.step });
        }
    }
    let path = folder(output_dir, course.step);
    let staged = StagedDir::replacing(&path)?;
    let artifact = staged.path().join(snapshot.method.artifact());
    std::fs::create_dir_all(&artifact).map_err(|source| TrainError::Io { path: artifact.clone(), source })?;
    snapshot.method.export(model, &artifact)?;

    let (memory, scalars) = snapshot.optimizer.save();
    let memory = memory.into_iter().map(|(name, data)| (format!("{OPTIMIZER}{name}"), data));
    let gradients = snapshot.gradients.iter();
    let gradients = gradients.map(|(name, sum)| (format!("{GRADIENT}{name}"), sum.to_data()));
    let MethodState { tensors: remembered, json } = snapshot.method.state();
    let remembered = remembered.into_iter().map(|(name, data)| (format!("{METHOD}{name}"), data));
    let host: Vec<(String, TensorData)> = memory.chain(gradients).chain(remembered).collect();
    let parameters = model.parameters().into_iter().filter(|parameter| parameter.trainable);
    let mut tensors: Vec<LazyTensor<TrainError>> = parameters
        .map(|parameter| {
            let dims = parameter.value.dims().to_vec();
            let bytes = || Ok::<_, TrainError>(Cow::Owned(f32_bytes(&parameter.to_host())));
            LazyTensor::new(format!("{PARAMETER}{}", parameter.name), Dtype::F32, dims, bytes)
        })
        .collect();
    for (name, data) in &host {
        let (dtype, bytes): (Dtype, fn(&TensorData) -> Vec<u8>) = match data.dtype() {
            DType::I64 => (Dtype::I64, |data| data.iter::<i64>().flat_map(i64::to_le_bytes).collect()),
            _ => (Dtype::F32, |data| f32_bytes(&data.iter::<f32>().collect::<Vec<_>>())),
        };
        let bytes = move || Ok(Cow::Owned(bytes(data)));
        tensors.push(LazyTensor::new(name, dtype, data.shape().to_vec(), bytes));
    }
    write_safetensors(&staged.path().join(TENSORS), tensors, &BTreeMap::new())?;
    let trained = model.parameters().into_iter().filter(|parameter| parameter.trainable);
    let unremembered = trained.filter(|parameter| !snapshot.optimizer.remembers(&parameter.name));
    let state = StateFile {
        course: course.clone(),
        identity: snapshot.identity.clone(),
        optimizer: scalars,
        unremembered: match course.step {
            0 => Vec::new(),
            _ => unremembered.map(|parameter| parameter.name.clone()).collect(),
        },
        method: json,
    };
    write_state(&staged.path().join(STATE), &state)?;
    Ok(staged)
}

/// Saves a checkpoint; returns its folder.
pub(super) fn save(output_dir: &Path, snapshot: &Snapshot) -> Result<PathBuf, TrainError> {
    stage(output_dir, snapshot)?.commit()?;
    Ok(folder(output_dir, snapshot.course.step))
}

/// Writes into the checkpoint after the course's step what has become known since: how it was evaluated.
pub(super) fn update_course(output_dir: &Path, course: &Course) -> Result<(), TrainError> {
    let path = folder(output_dir, course.step).join(STATE);
    let mut state = read_state(&path)?;
    state.course = course.clone();
    write_state(&path, &state)
}

/// Removes the oldest checkpoints beyond `limit`, but none of the steps in `keep`.
pub(super) fn prune(output_dir: &Path, limit: Option<usize>, keep: &[u64]) -> Result<(), TrainError> {
    let saved = list(output_dir);
    let excess = limit.map_or(0, |limit| saved.len().saturating_sub(limit));
    for (_, old) in saved.iter().filter(|(step, _)| !keep.contains(step)).take(excess) {
        remove_dir(old)?;
    }
    Ok(())
}

/// Bytes of the tensors' file of a checkpoint in which those parameters train and the optimizer keeps `moments` values
/// for each.
///
/// # Errors
/// A name that comes twice, or sizes beyond all bounds.
pub fn state_bytes(parameters: &[PlannedParameter], moments: u64) -> Result<u64, TrainError> {
    let mut tensors = Vec::new();
    for PlannedParameter { shape: ParameterShape { name, shape }, role, .. } in
        parameters.iter().filter(|p| p.trainable)
    {
        // Vectors are held as one row.
        let dims = if shape.len() == 1 { vec![1, shape[0]] } else { shape.clone() };
        let mut add = |name| tensors.push(LazyTensor::shape_only(name, Dtype::F32, dims.clone()));
        add(format!("{PARAMETER}{name}"));
        (1..=role.moments(moments)).for_each(|moment| add(format!("{OPTIMIZER}{name}.moment_{moment}")));
        if matches!(role, ParameterRole::Sparse { .. }) {
            let positions = format!("{METHOD}{name}.positions");
            tensors.push(LazyTensor::shape_only(positions, Dtype::I64, shape.clone()));
        }
    }
    Ok(safetensors_bytes(Path::new(TENSORS), tensors, &BTreeMap::new())?)
}

/// The identity of the run that saved the checkpoint folder `path`.
///
/// # Errors
/// No state, or a damaged one.
pub fn saved_identity(path: &Path) -> Result<Identity, TrainError> {
    Ok(read_state(&path.join(STATE))?.identity)
}

/// What the checkpoint folder `path` says of itself, if it is of the same run.
///
/// # Errors
/// A state of another run (every difference is named), or none at all.
fn read_own(path: &Path, identity: &Identity) -> Result<StateFile, TrainError> {
    let path = path.join(STATE);
    let state = read_state(&path)?;
    let differences = differences(&state.identity.run, &identity.run);
    if !differences.is_empty() {
        let message = format!(
            "saved by another run: {}; use a fresh output_dir, or the recipe as it was",
            differences.join("; ")
        );
        return Err(TrainError::State { path, message });
    }
    Ok(state)
}

/// Checks that the checkpoint folder `path` is of the same run.
///
/// # Errors
/// A state of another run (every difference is named), or none at all.
pub(super) fn require_own(path: &Path, identity: &Identity) -> Result<(), TrainError> {
    read_own(path, identity).map(|_| ())
}

/// A state taken up.
pub(super) struct Loaded {
    /// Where the run stands.
    pub course: Course,
    /// Gradients of the step in progress.
    pub gradients: BTreeMap<String, Tensor<2>>,
    /// What differs without forbidding to go on.
    pub warnings: Vec<String>,
}

/// Takes up the state in the checkpoint folder `path`.
///
/// # Errors
/// A state of another run, of another set of parameters, or a damaged one.
pub(super) fn load(
    path: &Path,
    model: &mut Decoder,
    method: &mut dyn Method,
    optimizer: &mut dyn ParameterOptimizer,
    identity: &Identity,
) -> Result<Loaded, TrainError> {
    let state = read_own(path, identity)?;
    let mut names = load_values(path, model, method)?;
    names.retain(|name| !state.unremembered.contains(name));
    let file = SafetensorsFile::open(path.join(TENSORS))?;
    let wrong = |message: String| TrainError::State { path: file.path().to_path_buf(), message };
    let device = model.device.clone();
    let (mut memory, mut gradients) = (BTreeMap::new(), BTreeMap::new());
    for key in file.names() {
        if let Some(name) = key.strip_prefix(OPTIMIZER) {
            let tensor = file.tensor(key)?;
            memory.insert(name.to_string(), TensorData::new(tensor.to_f32()?, tensor.shape.to_vec()));
        }
    }
    if state.course.window.is_some() {
        for (name, dims) in model.differentiated() {
            let key = format!("{GRADIENT}{name}");
            // What the loss did not depend on has no gradient.
            if file.contains(&key) {
                gradients.insert(name.to_string(), matrix(&file, &key, dims, &device)?);
            }
        }
    }
    // Before the first update there is no memory.
    if state.course.step > 0 {
        optimizer
            .load(&names, memory, state.optimizer, &device)
            .map_err(|name| wrong(format!("the optimizer's memory of `{name}` is missing")))?;
    }
    let changed = differences(&state.identity.environment, &identity.environment);
    let warnings = changed
        .into_iter()
        .map(|change| format!("the run goes on elsewhere, and may differ in its last digits: {change}"));
    Ok(Loaded { course: state.course, gradients, warnings: warnings.collect() })
}

/// Gives method and model what they had at the checkpoint in the folder `path`; returns the names of the parameters that
/// train.
///
/// # Errors
/// A file that is damaged or of another set of parameters.
pub(super) fn load_values(
    path: &Path,
    model: &mut Decoder,
    method: &mut dyn Method,
) -> Result<Vec<String>, TrainError> {
    let file = SafetensorsFile::open(path.join(TENSORS))?;
    let json = read_state(&path.join(STATE))?.method;
    let mut tensors = BTreeMap::new();
    for key in file.names() {
        if let Some(name) = key.strip_prefix(METHOD) {
            let tensor = file.tensor(key)?;
            let data = match tensor.dtype {
                Dtype::I64 => TensorData::new(tensor.to_i64()?, tensor.shape.to_vec()),
                _ => TensorData::new(tensor.to_f32()?, tensor.shape.to_vec()),
            };
            tensors.insert(name.to_string(), data);
        }
    }
    let wrong = |message| TrainError::State { path: path.join(STATE), message };
    method.restore(model, MethodState { tensors, json }).map_err(wrong)?;

    let device = model.device.clone();
    let mut names = Vec::new();
    for parameter in model.parameters_mut().into_iter().filter(|parameter| parameter.trainable) {
        let key = format!("{PARAMETER}{}", parameter.name);
        parameter.settle(matrix(&file, &key, parameter.value.dims(), &device)?);
        names.push(parameter.name.clone());
    }
    model.refresh();
    Ok(names)
}

/// The tensor `key`, which must have the shape `dims`.
fn matrix(
    file: &SafetensorsFile,
    key: &str,
    dims: [usize; 2],
    device: &Device,
) -> Result<Tensor<2>, TrainError> {
    let tensor = file.tensor(key)?;
    if tensor.shape != dims {
        let message = format!("`{key}` has shape {:?}, the model has {dims:?}", tensor.shape);
        return Err(TrainError::State { path: file.path().to_path_buf(), message });
    }
    Ok(Tensor::from_data(TensorData::new(tensor.to_f32()?, dims), (device, DType::F32)))
}

/// Every entry that is not the same in both, with its two values.
fn differences(saved: &Fingerprint, present: &Fingerprint) -> Vec<String> {
    let keys: BTreeSet<&String> = saved.keys().chain(present.keys()).collect();
    let value = |of: &Fingerprint, key: &String| of.get(key).map_or("not set".to_string(), String::clone);
    keys.into_iter()
        .filter(|key| saved.get(*key) != present.get(*key))
        .map(|key| format!("{key} was {}, is {}", value(saved, key), value(present, key)))
        .collect()
}

fn read_state(path: &Path) -> Result<StateFile, TrainError> {
    let bytes = read_bounded(path, MAX_STATE_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|error| TrainError::State {
        path: path.to_path_buf(),
        message: format!("not a saved state: {error}"),
    })
}

fn write_state(path: &Path, state: &StateFile) -> Result<(), TrainError> {
    let json = serde_json::to_vec_pretty(state)
        .map_err(|error| TrainError::Io { path: path.to_path_buf(), source: error.into() })?;
    Ok(write_file(path, &json)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn checkpoints(dir: &Path, steps: &[u64]) {
        for step in steps {
            std::fs::create_dir_all(folder(dir, *step)).unwrap();
            std::fs::write(folder(dir, *step).join(STATE), "").unwrap();
            std::fs::write(folder(dir, *step).join(TENSORS), "").unwrap();
        }
    }

    fn steps(dir: &Path) -> Vec<u64> {
        list(dir).into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn only_complete_checkpoints_count() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(dir.path()).is_empty());
        checkpoints(dir.path(), &[2, 12]);
        for half in ["step-00000014", ".step-00000016.partial-deadbeef", "step-x"] {
            let half = dir.path().join("checkpoints").join(half);
            std::fs::create_dir(&half).unwrap();
            std::fs::write(half.join(STATE), "").unwrap();
        }
        assert_eq!(steps(dir.path()), [2, 12]);
    }

    #[test]
    fn the_oldest_go_but_never_the_best_or_the_last() {
        let dir = tempfile::tempdir().unwrap();
        checkpoints(dir.path(), &[2, 4, 6, 8]);
        prune(dir.path(), None, &[8]).unwrap();
        assert_eq!(steps(dir.path()), [2, 4, 6, 8]);
        prune(dir.path(), Some(2), &[8, 2]).unwrap();
        assert_eq!(steps(dir.path()), [2, 8]);
        prune(dir.path(), Some(1), &[8, 2]).unwrap();
        assert_eq!(steps(dir.path()), [2, 8]);
        prune(dir.path(), Some(1), &[8]).unwrap();
        assert_eq!(steps(dir.path()), [8]);
    }

    #[test]
    fn every_difference_is_named() {
        let entries = |pairs: &[(&str, &str)]| -> Fingerprint {
            pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
        };
        let saved = entries(&[("method.r", "16"), ("seed", "1"), ("on_truncation", "left")]);
        let present = entries(&[("method.r", "8"), ("seed", "1"), ("packing", "true")]);
        assert_eq!(
            differences(&saved, &present),
            ["method.r was 16, is 8", "on_truncation was left, is not set", "packing was not set, is true"]
        );
    }
}
