//! What a model's files say about it without its weights: configuration, and names, types and shapes of the tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::dtype::Dtype;
use super::error::CheckpointError;
use super::file::{Entry, check};
use super::folder::{Checkpoint, INDEX_FILE, WEIGHTS_FILE, place_tensors, read_config, read_index};
use crate::nearest::did_you_mean;

/// The beginning of a safetensors file, to the end of its header.
#[derive(Debug)]
pub(super) struct HeaderBytes {
    /// Its name in the folder.
    pub file: String,
    /// Its first bytes.
    pub bytes: Vec<u8>,
    /// Bytes of the whole file.
    pub length: u64,
}

/// A tensor's type and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShape {
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
}

/// A model as far as its headers tell.
#[derive(Debug)]
pub struct Headers {
    dir: PathBuf,
    config: Value,
    tensors: BTreeMap<String, TensorShape>,
    missing_bytes: u64,
}

impl Headers {
    /// The headers of an open checkpoint; its weights are not touched.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let mut tensors = BTreeMap::new();
        for name in checkpoint.names() {
            let tensor = checkpoint.tensor(name)?;
            let shape = TensorShape { dtype: tensor.dtype, shape: tensor.shape.to_vec() };
            tensors.insert(name.to_string(), shape);
        }
        let (dir, config) = (checkpoint.dir().to_path_buf(), checkpoint.config().clone());
        Ok(Self { dir, config, tensors, missing_bytes: 0 })
    }

    /// The headers of weights that are not in `dir`, which holds the configuration and, where there are several files,
    /// the index. Everything is checked as in [`Checkpoint::open`].
    pub(super) fn of_parts(
        dir: &Path,
        parts: &[HeaderBytes],
        missing_bytes: u64,
    ) -> Result<Self, CheckpointError> {
        let mut shapes = Vec::with_capacity(parts.len());
        for part in parts {
            let path = dir.join(&part.file);
            let length = usize::try_from(part.length).unwrap_or(usize::MAX);
            let (_, entries) = check(&path, &part.bytes, length)?;
            let shape = |entry: Entry| TensorShape { dtype: entry.dtype, shape: entry.shape };
            shapes.push(
                entries.into_iter().map(|(name, entry)| (name, shape(entry))).collect::<BTreeMap<_, _>>(),
            );
        }
        if let [one] = parts
            && one.file == WEIGHTS_FILE
        {
            let tensors = shapes.pop().unwrap_or_default();
            return Ok(Self { dir: dir.to_path_buf(), config: read_config(dir)?, tensors, missing_bytes });
        }
        let index = dir.join(INDEX_FILE);
        let files: Vec<&str> = parts.iter().map(|part| part.file.as_str()).collect();
        let names: Vec<Vec<&str>> =
            shapes.iter().map(|shapes| shapes.keys().map(String::as_str).collect()).collect();
        let placed = place_tensors(&index, &read_index(&index)?, &files, &names)?;
        let tensors = placed
            .into_iter()
            .map(|(name, file)| {
                let shape = shapes[file][&name].clone();
                (name, shape)
            })
            .collect();
        Ok(Self { dir: dir.to_path_buf(), config: read_config(dir)?, tensors, missing_bytes })
    }

    /// The folder, which has configuration and tokenizer.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The contents of `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Name, type and shape of every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorShape> {
        &self.tensors
    }

    /// The tensor of that name. Errors where there is none, with the nearest name.
    pub fn tensor(&self, name: &str) -> Result<&TensorShape, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| CheckpointError::TensorNotFound {
            path: self.dir.clone(),
            tensor: name.to_string(),
            hint: did_you_mean(name, self.tensors.keys().map(String::as_str)),
        })
    }

    /// Bytes of weights that must be downloaded before the model can be used.
    pub fn missing_bytes(&self) -> u64 {
        self.missing_bytes
    }
}
