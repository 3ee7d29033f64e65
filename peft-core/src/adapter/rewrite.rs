//! A checkpoint written again with some of its tensors changed: one tensor at a time, f32 arithmetic, one rounding.

use super::error::AdapterError;
use crate::checkpoint::{
    Checkpoint, CheckpointError, Dtype, LazyTensor, TensorRef, from_f32, require_free, write_sharded,
};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Computes a tensor's new values from its old ones, row-major f32.
pub type TensorChange<'a> = Box<dyn Fn(Vec<f32>) -> Result<Vec<f32>, AdapterError> + Send + Sync + 'a>;

/// What is different in the new checkpoint.
#[derive(Default)]
pub struct Rewrite<'a> {
    /// Changes by tensor name.
    pub changes: BTreeMap<String, TensorChange<'a>>,
    /// Tensors that the old checkpoint lacks, by new name the old one whose values they start from.
    pub copies: BTreeMap<String, String>,
    /// New values of keys of config.json.
    pub config: Map<String, Value>,
}

/// How the result is stored.
#[derive(Debug, Clone)]
pub struct RewriteOptions {
    /// Type of all floating-point tensors; `None` keeps each tensor's own.
    pub dtype: Option<Dtype>,
    /// Largest shard in bytes.
    pub max_shard_size: u64,
}

impl RewriteOptions {
    /// Shards of 5 GB, as transformers has them.
    pub const DEFAULT_SHARD: u64 = 5_000_000_000;
}

/// Writes the checkpoint `base` into the existing folder `dir`, best a staged one, changed as `rewrite` says. Every other
/// tensor is copied byte for byte unless the type changes, and the files beside the weights are carried over. Returns the
/// names of the weight files.
///
/// # Errors
/// Too little free disk, a result that is not finite, a failure to write.
pub fn rewrite_into(
    base: &Checkpoint,
    dir: &Path,
    options: &RewriteOptions,
    rewrite: &Rewrite,
) -> Result<Vec<String>, AdapterError> {
    let own = base.names().map(|name| (name, name));
    let copies = rewrite.copies.iter().map(|(new, old)| (new.as_str(), old.as_str()));
    let names: Vec<(&str, &str)> = own.chain(copies).collect();
    let mut tensors = Vec::with_capacity(names.len());
    let mut total = 0u64;
    for (name, source) in names {
        let tensor = base.tensor(source)?;
        let dtype = options.dtype.filter(|_| tensor.dtype.is_float()).unwrap_or(tensor.dtype);
        total += (tensor.numel() * dtype.size()) as u64;
        let change = rewrite.changes.get(name);
        let bytes = move || {
            let bytes = new_bytes(tensor, dtype, change)?;
            if matches!(bytes, Cow::Owned(_)) {
                // The base's pages have been read and are not needed again.
                base.release(tensor.name);
            }
            Ok(bytes)
        };
        tensors.push(LazyTensor::new(name.to_string(), dtype, tensor.shape.to_vec(), bytes));
    }
    require_free(dir, total + (1 << 20))?;

    copy_side_files(base, dir, options.dtype, &rewrite.config)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_sharded(dir, tensors, options.max_shard_size, &metadata)
}

/// Carries the files beside the weights over to `dir`, config.json with `dtype` and with the new `values` where any are
/// given.
pub(super) fn copy_side_files(
    base: &Checkpoint,
    dir: &Path,
    dtype: Option<Dtype>,
    values: &Map<String, Value>,
) -> Result<(), AdapterError> {
    for file in base.side_files()? {
        let Some(name) = file.file_name() else { continue };
        if name == "config.json" && (dtype.is_some() || !values.is_empty()) {
            let text = format!("{:#}\n", new_config(base.config(), dtype, values));
            crate::checkpoint::write_file(&dir.join(name), text.as_bytes())?;
        } else {
            let bytes = std::fs::read(&file).map_err(CheckpointError::read(&file))?;
            crate::checkpoint::write_file(&dir.join(name), &bytes)?;
        }
    }
    Ok(())
}

fn new_bytes<'a>(
    tensor: TensorRef<'a>,
    dtype: Dtype,
    change: Option<&TensorChange>,
) -> Result<Cow<'a, [u8]>, AdapterError> {
    let values = match change {
        None if dtype == tensor.dtype => return Ok(Cow::Borrowed(tensor.bytes)),
        None => tensor.to_f32()?,
        Some(change) => change(tensor.to_f32()?)?,
    };
    let overflows =
        dtype == Dtype::F16 && values.iter().any(|v| v.is_finite() && half::f16::from_f32(*v).is_infinite());
    if overflows || values.iter().any(|value| !value.is_finite()) {
        return Err(AdapterError::NonFiniteResult { key: tensor.name.to_string(), dtype });
    }
    Ok(Cow::Owned(from_f32(&values, dtype).map_err(CheckpointError::from)?))
}

/// config.json with the type of the new weights, under the key that it already uses, and with new values.
fn new_config(config: &Value, dtype: Option<Dtype>, values: &Map<String, Value>) -> Value {
    let mut config = config.clone();
    if let Some(map) = config.as_object_mut() {
        if let Some(dtype) = dtype {
            let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            map.insert(key.to_string(), Value::String(dtype.config_name().to_string()));
        }
        map.extend(values.clone());
    }
    config
}
