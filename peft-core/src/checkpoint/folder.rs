//! A model's folder: its configuration, and its tensors from however many files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Component, Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::error::CheckpointError;
use super::file::{SafetensorsFile, TensorRef};
use super::json::{Entries, parse, read_bounded};
use crate::nearest::did_you_mean;

/// The configuration's file name.
pub const CONFIG_FILE: &str = "config.json";
/// The weights' file name where there is only one.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The file that marks a folder as an adapter.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";

/// The record that folding an adapter leaves: what the weights were before.
pub const MERGE_FILE: &str = "merge.json";
/// The tensors that folding changed, as they were. The name is none that a loader takes for weights.
pub const ORIGINAL_FILE: &str = "original_weights.peft";

const MAX_CONFIG_BYTES: u64 = 16 << 20;
pub(super) const MAX_INDEX_BYTES: u64 = 256 << 20;
const MAX_SHARDS: usize = 10_000;

/// A pretrained model on disk, in one file or in shards; tensors are read from the map when used.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    config_digest: String,
    /// Names relative to `dir`, with their open files, in name order.
    files: Vec<(String, SafetensorsFile)>,
    /// The position in `files` of each tensor's file.
    tensors: BTreeMap<String, usize>,
}

/// The part of the index that counts.
#[derive(Deserialize)]
struct Index {
    weight_map: Entries<String>,
}

impl Checkpoint {
    /// Opens the model in `dir`: `config.json` with `model.safetensors`, or with the shards that
    /// `model.safetensors.index.json` lists. All files are checked at once, values are not looked at.
    ///
    /// As in transformers, a tensor that stands in a shard but not in the index belongs to the model.
    /// Errors name the file and tensor; pickled weights and folders of adapters have their own.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(no_folder(dir));
        }
        let fence = Fence::around(dir)?;
        let (config, config_digest) = open_config(dir, &fence)?;
        let (files, tensors) = if is_there(&dir.join(WEIGHTS_FILE)) {
            let path = dir.join(WEIGHTS_FILE);
            fence.check(&path)?;
            let file = SafetensorsFile::open(path)?;
            let tensors = file.names().map(|name| (name.to_string(), 0)).collect();
            (vec![(WEIGHTS_FILE.to_string(), file)], tensors)
        } else if is_there(&dir.join(INDEX_FILE)) {
            open_shards(dir, &fence)?
        } else {
            return Err(no_weights(dir));
        };
        Ok(Self { dir: dir.to_path_buf(), config, config_digest, files, tensors })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The contents of `config.json`, an object with its keys in file order.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of that name. Errors where there is none, with the nearest name.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>, CheckpointError> {
        match self.tensors.get(name) {
            Some(&file) => self.files[file].1.tensor(name),
            None => Err(CheckpointError::TensorNotFound {
                path: self.dir.clone(),
                tensor: name.to_string(),
                hint: did_you_mean(name, self.names()),
            }),
        }
    }

    /// Lets the system take back the pages that hold a tensor's bytes; they are read again when needed.
    pub fn release(&self, name: &str) {
        if let Some(&file) = self.tensors.get(name) {
            self.files[file].1.release(name);
        }
    }

    /// Bytes of all tensors together, as they are stored.
    pub fn total_bytes(&self) -> u64 {
        self.tensors
            .iter()
            .filter_map(|(name, &file)| self.files[file].1.tensor(name).ok())
            .map(|tensor| tensor.bytes.len() as u64)
            .sum()
    }

    /// The files that belong to the model besides its weights: configuration, tokenizer, chat template,
    /// licence. Sorted; no subfolders, hidden files, weights of any format, or parts of an adapter.
    ///
    /// Errors where one is a link that leads out of the folder and its hub cache.
    pub fn side_files(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        let fence = Fence::around(&self.dir)?;
        let mut files = Vec::new();
        for name in file_names(&self.dir)? {
            let path = self.dir.join(&name);
            if is_side_file(&name) && path.is_file() {
                fence.check(&path)?;
                files.push(path);
            }
        }
        Ok(files)
    }

    /// The model's fingerprint in hex: SHA-256 of what `sha256sum` prints for `config.json` and the weights
    /// files, in name order. It depends on how the weights are split into files.
    pub fn sha256(&self) -> String {
        let mut digests: Vec<(&str, String)> =
            self.files.par_iter().map(|(name, file)| (name.as_str(), hex(file.sha256().as_ref()))).collect();
        digests.push((CONFIG_FILE, self.config_digest.clone()));
        digests.sort();
        let mut all = Sha256::new();
        for (name, digest) in digests {
            all.update(format!("{digest}  {name}\n"));
        }
        hex(&all.finalize())
    }
}

/// The contents of `config.json` in `dir`.
pub(super) fn read_config(dir: &Path) -> Result<Value, CheckpointError> {
    Ok(open_config(dir, &Fence::around(dir)?)?.0)
}

fn open_config(dir: &Path, fence: &Fence) -> Result<(Value, String), CheckpointError> {
    let path = dir.join(CONFIG_FILE);
    if !is_there(&path) {
        let dir = dir.to_path_buf();
        return Err(if dir.join(ADAPTER_CONFIG_FILE).exists() {
            CheckpointError::IsAdapter { dir }
        } else {
            CheckpointError::NoConfig { dir }
        });
    }
    fence.check(&path)?;
    let bytes = read_bounded(&path, MAX_CONFIG_BYTES)?;
    let config: serde_json::Map<String, Value> = parse(&path, &bytes, "an object")?;
    Ok((Value::Object(config), hex(&Sha256::digest(&bytes))))
}

type Shards = (Vec<(String, SafetensorsFile)>, BTreeMap<String, usize>);

fn open_shards(dir: &Path, fence: &Fence) -> Result<Shards, CheckpointError> {
    let path = dir.join(INDEX_FILE);
    fence.check(&path)?;
    let weight_map = read_index(&path)?;
    let shards: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    let mut files = Vec::with_capacity(shards.len());
    for shard in shards {
        let file = dir.join(shard);
        if !is_there(&file) {
            let present = file_names(dir)?;
            return Err(CheckpointError::ShardMissing {
                index: path,
                shard: shard.to_string(),
                hint: did_you_mean(shard, present.iter().map(String::as_str)),
            });
        }
        fence.check(&file)?;
        files.push((shard.to_string(), SafetensorsFile::open(file)?));
    }

    let names: Vec<Vec<&str>> = files.iter().map(|(_, file)| file.names().collect()).collect();
    let shards: Vec<&str> = files.iter().map(|(shard, _)| shard.as_str()).collect();
    let tensors = place_tensors(&path, &weight_map, &shards, &names)?;
    Ok((files, tensors))
}

/// For each tensor the position of its shard in `shards`, whose tensors are `names`, sorted. As in transformers, a tensor that
/// stands in a shard but not in the index at `path` belongs to the model.
///
/// Errors where the index names a shard without the tensor, or two shards hold a tensor that it does not name.
pub(super) fn place_tensors(
    path: &Path,
    weight_map: &BTreeMap<String, String>,
    shards: &[&str],
    names: &[Vec<&str>],
) -> Result<BTreeMap<String, usize>, CheckpointError> {
    let positions: BTreeMap<&str, usize> =
        shards.iter().enumerate().map(|(position, shard)| (*shard, position)).collect();
    let mut tensors = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let position = positions[shard.as_str()];
        if names[position].binary_search(&tensor.as_str()).is_err() {
            return Err(CheckpointError::TensorNotInShard {
                index: path.to_path_buf(),
                tensor: tensor.clone(),
                shard: shard.clone(),
                hint: did_you_mean(tensor, names[position].iter().copied()),
            });
        }
        tensors.insert(tensor.clone(), position);
    }
    for (position, names) in names.iter().enumerate() {
        for tensor in names.iter().filter(|name| !weight_map.contains_key(**name)) {
            if let Some(first) = tensors.insert(tensor.to_string(), position) {
                return Err(CheckpointError::AmbiguousTensor {
                    tensor: tensor.to_string(),
                    first: path.with_file_name(shards[first]),
                    second: path.with_file_name(shards[position]),
                });
            }
        }
    }
    Ok(tensors)
}

/// The index at `path`: tensor to shard, every shard the name of a safetensors file below the folder.
pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let bytes = read_bounded(path, MAX_INDEX_BYTES)?;
    let index: Index = parse(path, &bytes, "an object whose `weight_map` maps tensors to files")?;
    let weight_map = index.weight_map.unique(path)?;
    let shards: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    if let Some(shard) = shards.iter().find(|shard| !is_safe_shard(shard)) {
        return Err(CheckpointError::UnsafeShardName { index: path.to_path_buf(), shard: shard.to_string() });
    }
    if shards.is_empty() {
        return Err(CheckpointError::InvalidJson {
            path: path.to_path_buf(),
            reason: "`weight_map` is empty".to_string(),
        });
    }
    if shards.len() > MAX_SHARDS {
        return Err(CheckpointError::TooManyShards {
            index: path.to_path_buf(),
            found: shards.len(),
            limit: MAX_SHARDS,
        });
    }
    Ok(weight_map)
}

/// Whether a shard's name is a plain relative path to a safetensors file, on every system.
fn is_safe_shard(shard: &str) -> bool {
    shard.ends_with(".safetensors")
        && !shard.contains(['\\', ':'])
        && !shard.contains(char::is_control)
        && Path::new(shard).components().all(|component| matches!(component, Component::Normal(_)))
}

/// Why there are no weights to read in `dir`.
fn no_weights(dir: &Path) -> CheckpointError {
    let names = file_names(dir).unwrap_or_default();
    let is_pickle = |name: &&String| {
        matches!(extension(name).as_str(), "bin" | "pt" | "pth" | "ckpt" | "pkl")
            && (name.contains("model") || name.starts_with("consolidated"))
    };
    let dir = dir.to_path_buf();
    if let Some(file) = names.iter().find(is_pickle) {
        return CheckpointError::PickleOnly { dir, file: file.clone() };
    }
    if dir.join(ADAPTER_CONFIG_FILE).exists() {
        return CheckpointError::IsAdapter { dir };
    }
    CheckpointError::NoWeights { dir }
}

fn is_side_file(name: &str) -> bool {
    const WEIGHTS: [&str; 12] =
        ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "npz", "pkl"];
    !name.starts_with('.')
        && !name.starts_with("adapter_")
        && !["task_vector.json", MERGE_FILE, ORIGINAL_FILE].contains(&name)
        && !name.ends_with(".index.json")
        && !WEIGHTS.contains(&extension(name).as_str())
}

/// Whether the folder has such an entry; a link whose target is missing counts, so that its error names it.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

pub(super) fn extension(name: &str) -> String {
    Path::new(name)
        .extension()
        .map(|extension| extension.to_string_lossy().to_lowercase())
        .unwrap_or_default()
}

/// Names of what lies in `dir`, sorted; names that are not UTF-8 cannot be a model's and are left out.
pub(super) fn file_names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(CheckpointError::read(dir))? {
        let entry = entry.map_err(CheckpointError::read(dir))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The error for a path that is no folder, with the nearest name beside it.
pub(super) fn no_folder(path: &Path) -> CheckpointError {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let hint = if path.exists() {
        "; it is a file".to_string()
    } else {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let names = file_names(parent).unwrap_or_default();
        did_you_mean(&name, names.iter().map(String::as_str))
    };
    CheckpointError::NoFolder { path: path.to_path_buf(), hint }
}

/// The places to which links in a model's folder may lead.
pub(crate) struct Fence {
    roots: Vec<PathBuf>,
}

impl Fence {
    /// The folder itself, and where it is a snapshot in a hub cache, its repository's folder there
    /// (`models--org--name`, whose snapshots link to its `blobs`).
    pub(crate) fn around(dir: &Path) -> Result<Self, CheckpointError> {
        let real = fs::canonicalize(dir).map_err(CheckpointError::read(dir))?;
        let repository =
            real.ancestors().skip(1).zip(real.ancestors().skip(2)).find(|(snapshots, repository)| {
                snapshots.ends_with("snapshots")
                    && repository.file_name().is_some_and(|name| name.to_string_lossy().contains("--"))
            });
        let mut roots: Vec<PathBuf> = repository.iter().map(|(_, repo)| repo.to_path_buf()).collect();
        roots.push(real);
        Ok(Self { roots })
    }

    /// Errors where the real place of `path` is outside.
    pub(crate) fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        let target = fs::canonicalize(path).map_err(CheckpointError::read(path))?;
        if self.roots.iter().any(|root| target.starts_with(root)) {
            return Ok(());
        }
        Err(CheckpointError::LeadsOut { path: path.to_path_buf(), target })
    }
}

/// Lower-case hexadecimal digits of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
