//! An adapter's folder: `adapter_config.json` and `adapter_model.safetensors`, whatever the method.

use super::config_file::is_empty;
use super::error::AdapterError;
use super::saved::SavedAdapter;
use crate::checkpoint::{
    ADAPTER_CONFIG_FILE, CheckpointError, Dtype, Fence, LazyTensor, SafetensorsFile, f32_bytes, read_bounded,
    safetensors_bytes, write_file, write_safetensors,
};
use crate::nearest::did_you_mean;
use crate::projection::Parameter;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The name of the weights' file.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What older programs wrote in its place.
const PICKLED_WEIGHTS: &str = "adapter_model.bin";

/// What every key of a module's tensor begins with.
pub const PREFIX: &str = "base_model.model.";

/// The version of the format written, as PEFT numbers it.
pub(super) const PEFT_VERSION: &str = "0.21.2";

/// Bytes of the largest configuration read.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A kind of adapter file, known by the `peft_type` of its configuration.
#[derive(Debug)]
pub struct FileFormat {
    /// `LORA`.
    pub peft_type: &'static str,
    /// Opens a folder of that type.
    pub open: fn(&Path) -> Result<Box<dyn SavedAdapter>, AdapterError>,
}

/// Opens the adapter in the folder `dir`, which must be of one of the formats.
///
/// # Errors
/// A `peft_type` that is none of theirs, or those of the format.
pub fn open_adapter(
    dir: &Path,
    formats: impl Iterator<Item = &'static FileFormat>,
) -> Result<Box<dyn SavedAdapter>, AdapterError> {
    let config = AdapterFolder::read_config(dir)?;
    let formats: Vec<&FileFormat> = formats.collect();
    let known: Vec<&str> = formats.iter().map(|format| format.peft_type).collect();
    let found = config.get("peft_type").and_then(Value::as_str);
    match formats.iter().find(|format| Some(format.peft_type) == found) {
        Some(format) => (format.open)(dir),
        None => Err(AdapterError::Config {
            path: dir.join(ADAPTER_CONFIG_FILE),
            message: match found {
                Some(found) => format!(
                    "peft_type \"{found}\" is none of those known here{}: {}",
                    did_you_mean(found, known.iter().copied()),
                    known.join(", ")
                ),
                None => format!("peft_type is missing, expected one of {}", known.join(", ")),
            },
        }),
    }
}

/// An adapter's folder, opened.
pub struct AdapterFolder {
    /// The folder.
    pub dir: PathBuf,
    /// Its configuration.
    pub config: Map<String, Value>,
    /// Things worth telling the user.
    pub warnings: Vec<String>,
    /// Its weights.
    pub file: SafetensorsFile,
}

impl AdapterFolder {
    /// Opens an adapter folder.
    ///
    /// # Errors
    /// Either file missing, damaged, or a link that leads out of the folder and its hub cache; weights that are there
    /// only as pickle.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let config = Self::read_config(dir)?;
        Self::with_config(dir, config, Vec::new())
    }

    /// The folder with a configuration that was read and understood.
    pub(super) fn with_config(
        dir: &Path,
        config: Map<String, Value>,
        warnings: Vec<String>,
    ) -> Result<Self, AdapterError> {
        if dir.join(WEIGHTS_FILE).exists() {
            Fence::around(dir)?.check(&dir.join(WEIGHTS_FILE))?;
        } else if dir.join(PICKLED_WEIGHTS).exists() {
            let file = PICKLED_WEIGHTS.to_string();
            return Err(CheckpointError::PickleOnly { dir: dir.to_path_buf(), file }.into());
        }
        let file = SafetensorsFile::open(dir.join(WEIGHTS_FILE))?;
        Ok(Self { dir: dir.to_path_buf(), config, warnings, file })
    }

    /// The JSON object in `adapter_config.json`.
    ///
    /// # Errors
    /// No such file, a link that leads astray, or something else in it.
    pub fn read_config(dir: &Path) -> Result<Map<String, Value>, AdapterError> {
        let path = dir.join(ADAPTER_CONFIG_FILE);
        if path.exists() {
            Fence::around(dir)?.check(&path)?;
        }
        let bytes = read_bounded(&path, MAX_CONFIG_BYTES)?;
        serde_json::from_slice(&bytes)
            .map_err(|error| AdapterError::Config { path, message: format!("not a JSON object: {error}") })
    }

    /// The keys of the configuration that a format of type `peft_type` has beside the common ones and the `neutral` ones.
    /// Keys that nobody knows become warnings.
    ///
    /// # Errors
    /// Another type, a value that does not parse, a neutral key with another value than the only one that is known.
    pub fn parse<T: Serialize + DeserializeOwned>(
        &mut self,
        peft_type: &str,
        neutral: Value,
    ) -> Result<T, AdapterError> {
        let found = self.config.get("peft_type").and_then(Value::as_str);
        if found != Some(peft_type) {
            return Err(self.wrong(format!("peft_type is {found:?}, expected \"{peft_type}\"")));
        }
        let neutral: Map<String, Value> = serde_json::from_value(neutral).unwrap_or_default();
        for (key, only) in &neutral {
            let value = self.config.get(key).unwrap_or(only);
            if value != only && !(is_empty(value) && is_empty(only)) {
                let (path, value) = (self.config_path(), value.to_string());
                return Err(AdapterError::Unsupported { path, key: key.clone(), value });
            }
        }
        let mut own = self.config.clone();
        let common = common_config(peft_type, None, None);
        own.retain(|key, _| !common.contains_key(key) && !neutral.contains_key(key));
        let parsed: T = serde_json::from_value(Value::Object(own.clone()))
            .map_err(|error| self.wrong(error.to_string()))?;
        let known = serde_json::to_value(&parsed).map_err(|error| self.wrong(error.to_string()))?;
        for key in own.keys().filter(|key| known.get(key.as_str()).is_none()) {
            let path = self.config_path();
            self.warnings.push(format!("{}: key `{key}` is unknown and was ignored", path.display()));
        }
        Ok(parsed)
    }

    /// An error about the configuration.
    pub fn wrong(&self, message: impl Into<String>) -> AdapterError {
        AdapterError::Config { path: self.config_path(), message: message.into() }
    }

    /// Where the configuration is.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join(ADAPTER_CONFIG_FILE)
    }

    /// Where the weights are.
    pub fn weights_path(&self) -> PathBuf {
        self.dir.join(WEIGHTS_FILE)
    }

    /// The tensor `key` in f32, of the shape `expected` and finite.
    ///
    /// # Errors
    /// Anything else.
    pub fn read(&self, key: &str, expected: &[usize]) -> Result<Vec<f32>, AdapterError> {
        let path = self.weights_path();
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

    /// Sees that the file has the keys of `layout` and no others.
    ///
    /// # Errors
    /// The first that is missing or has no place, with the nearest of the other sort.
    pub fn require_keys(&self, layout: &Layout) -> Result<(), AdapterError> {
        let others = |n: usize| {
            if n > 1 { format!(" (and {} more)", n - 1) } else { String::new() }
        };
        let Layout { required, optional } = layout;
        let missing: Vec<&String> = required.keys().filter(|key| !self.file.contains(key)).collect();
        let known = |key: &str| required.contains_key(key) || optional.contains_key(key);
        let unexpected: Vec<&str> = self.file.names().filter(|key| !known(key)).collect();
        if let Some(key) = missing.first() {
            return Err(AdapterError::MissingKey {
                path: self.weights_path(),
                key: key.to_string(),
                suggestion: did_you_mean(key, unexpected.iter().copied()),
                others: others(missing.len()),
            });
        }
        if let Some(key) = unexpected.first() {
            return Err(AdapterError::UnexpectedKey {
                path: self.weights_path(),
                key: key.to_string(),
                suggestion: did_you_mean(key, required.keys().map(String::as_str)),
                others: others(unexpected.len()),
            });
        }
        Ok(())
    }
}

/// The keys that a configuration and a base imply, with their shapes.
#[derive(Debug, Default)]
pub struct Layout {
    /// Must be there.
    pub required: BTreeMap<String, Vec<usize>>,
    /// May be there.
    pub optional: BTreeMap<String, Vec<usize>>,
}

impl Layout {
    /// The `part` of the module at `path` must be there.
    pub fn require(&mut self, path: &str, part: &str, shape: &[usize]) {
        self.required.insert(key(path, part), shape.to_vec());
    }

    /// The `part` of the module at `path` may be there.
    pub fn allow(&mut self, path: &str, part: &str, shape: &[usize]) {
        self.optional.insert(key(path, part), shape.to_vec());
    }
}

/// The key of a `part` (`.lora_A.weight`) of the module at `path`.
pub fn key(path: &str, part: &str) -> String {
    format!("{PREFIX}{path}{part}")
}

/// A parameter as a tensor of the weights' file, in f32 and its own shape.
pub fn parameter_tensor<'a>(
    key: String,
    parameter: &'a Parameter,
    dir: &'a Path,
) -> LazyTensor<'a, AdapterError> {
    let values = move || parameter.to_host();
    finite_tensor(key, parameter.shape.clone(), dir, values)
}

/// A tensor of the weights' file whose `values` must be finite when they are written.
pub fn finite_tensor<'a>(
    key: String,
    shape: Vec<usize>,
    dir: &'a Path,
    values: impl Fn() -> Vec<f32> + Send + Sync + 'a,
) -> LazyTensor<'a, AdapterError> {
    let name = key.clone();
    LazyTensor::new(key, Dtype::F32, shape, move || {
        let values = values();
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(Cow::Owned(f32_bytes(&values))),
            false => Err(AdapterError::NonFinite { path: dir.join(WEIGHTS_FILE), key: name.clone() }),
        }
    })
}

/// Writes both files of an adapter into the existing folder `dir`, the configuration with sorted keys.
///
/// # Errors
/// Those of the tensors, or a failure to write.
pub fn write_adapter(
    dir: &Path,
    mut config: Map<String, Value>,
    tensors: Vec<LazyTensor<'_, AdapterError>>,
) -> Result<(), AdapterError> {
    write_safetensors(&dir.join(WEIGHTS_FILE), tensors, &metadata())?;
    config.sort_keys();
    let text = format!("{:#}", Value::Object(config));
    Ok(write_file(&dir.join(ADAPTER_CONFIG_FILE), text.as_bytes())?)
}

/// Bytes of the weights' file with f32 tensors of these keys and shapes.
///
/// # Errors
/// A name that comes twice, or sizes beyond all bounds.
pub fn weights_bytes(tensors: impl IntoIterator<Item = (String, Vec<usize>)>) -> Result<u64, AdapterError> {
    let tensors = tensors.into_iter();
    let tensors = tensors.map(|(key, shape)| LazyTensor::shape_only(key, Dtype::F32, shape)).collect();
    Ok(safetensors_bytes(Path::new(WEIGHTS_FILE), tensors, &metadata())?)
}

/// The header's metadata, as PEFT writes it.
fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}

/// The keys that PEFT has in the configuration of every type.
pub fn common_config(peft_type: &str, base: Option<&str>, revision: Option<&str>) -> Map<String, Value> {
    let Value::Object(map) = json!({
        "auto_mapping": null, "base_model_name_or_path": base, "inference_mode": true, "peft_type": peft_type,
        "peft_version": PEFT_VERSION, "revision": revision, "task_type": "CAUSAL_LM",
    }) else {
        return Map::new();
    };
    map
}
