//! `merge.json`: what a folded checkpoint was before, so that unfolding can say whether it gave that back.

use super::error::AdapterError;
use super::saved::SavedAdapter;
use crate::checkpoint::{Checkpoint, LazyTensor, MERGE_FILE, ORIGINAL_FILE, TensorRef};
use crate::checkpoint::{hex, read_bounded, require_free, write_file, write_safetensors};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

const MAX_RECORD_BYTES: u64 = 256 << 20;

/// What the base of a fold was. It holds no path and no time.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeRecord {
    /// SHA-256 of the adapter's weight file.
    pub adapter_sha256: String,
    /// Names of the tensors that folding changed.
    pub changed: Vec<String>,
    /// Every tensor of the base.
    pub original: BTreeMap<String, Original>,
    /// What verification measured; null where it was left out.
    pub verification: Value,
}

/// A tensor as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Original {
    /// Its type, by the safetensors name.
    pub dtype: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
}

impl Original {
    /// The fingerprint of a tensor.
    pub fn of(tensor: TensorRef<'_>) -> Self {
        Self { dtype: tensor.dtype.header_name().to_string(), sha256: hex(&Sha256::digest(tensor.bytes)) }
    }
}

impl MergeRecord {
    /// The record of folding `adapter` into `base`; reads all of the base's bytes.
    ///
    /// # Errors
    /// A failure to read.
    pub fn new(
        base: &Checkpoint,
        adapter: &dyn SavedAdapter,
        changed: Vec<String>,
        verification: Value,
    ) -> Result<Self, AdapterError> {
        let adapter_sha256 = adapter_sha256(adapter);
        Ok(Self { adapter_sha256, changed, original: fingerprints(base)?, verification })
    }

    /// The record in a folded checkpoint's folder; `None` where there is none.
    ///
    /// # Errors
    /// A file that is no such record.
    pub fn read(dir: &Path) -> Result<Option<Self>, AdapterError> {
        let path = dir.join(MERGE_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read_bounded(&path, MAX_RECORD_BYTES)?;
        let record = serde_json::from_slice(&bytes);
        Ok(Some(record.map_err(|error| AdapterError::Record { path, message: error.to_string() })?))
    }

    /// Writes the record into `dir`.
    ///
    /// # Errors
    /// A failure to write.
    pub fn write(&self, dir: &Path) -> Result<(), AdapterError> {
        let path = dir.join(MERGE_FILE);
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| AdapterError::Record { path: path.clone(), message: error.to_string() })?;
        Ok(write_file(&path, format!("{text}\n").as_bytes())?)
    }
}

/// Fingerprints of all tensors of a checkpoint.
///
/// # Errors
/// A failure to read.
pub fn fingerprints(checkpoint: &Checkpoint) -> Result<BTreeMap<String, Original>, AdapterError> {
    let names: Vec<&str> = checkpoint.names().collect();
    let entry = |name: &&str| Ok((name.to_string(), Original::of(checkpoint.tensor(name)?)));
    names.par_iter().map(entry).collect()
}

/// SHA-256 of the adapter's weight file.
pub(super) fn adapter_sha256(adapter: &dyn SavedAdapter) -> String {
    hex(adapter.folder().file.sha256().as_ref())
}

/// Writes the tensors of `base` that are others in `folded`, as they are, into its folder, under a name that no loader
/// takes for weights.
///
/// # Errors
/// Too little free disk, or a failure to write.
pub fn keep_original(base: &Checkpoint, folded: &Checkpoint) -> Result<(), AdapterError> {
    let dir = folded.dir();
    let mut tensors = Vec::new();
    for name in base.names() {
        let (before, after) = (base.tensor(name)?, folded.tensor(name)?);
        if before.dtype != after.dtype || before.bytes != after.bytes {
            tensors.push(before);
        }
    }
    let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
    require_free(dir, bytes + (1 << 20))?;
    let tensors: Vec<LazyTensor<'_>> = tensors.into_iter().map(LazyTensor::borrowed).collect();
    Ok(write_safetensors(&dir.join(ORIGINAL_FILE), tensors, &BTreeMap::new())?)
}
