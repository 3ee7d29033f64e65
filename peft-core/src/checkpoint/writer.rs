//! Writing safetensors files, with tensors computed while they are written.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use super::atomic::{write_file, write_with};
use super::dtype::Dtype;
use super::error::CheckpointError;
use super::file::{LENGTH_BYTES, MAX_HEADER, METADATA_KEY, TensorRef, byte_len};
use super::folder::{INDEX_FILE, WEIGHTS_FILE};

/// Bytes that are computed ahead, at most; a larger tensor is computed alone.
const WINDOW_BYTES: usize = 256 << 20;

/// What computes a tensor's bytes: its elements, little-endian and row-major.
pub type Compute<'a, E> = Box<dyn Fn() -> Result<Cow<'a, [u8]>, E> + Send + Sync + 'a>;

/// A tensor to write, whose bytes are computed when its turn comes.
///
/// `E` is the caller's own error, which comes back from the writer as it is.
pub struct LazyTensor<'a, E = CheckpointError> {
    /// Its name in the file.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Computes its bytes: size of the dtype times the product of the dimensions.
    pub bytes: Compute<'a, E>,
}

impl<'a, E> LazyTensor<'a, E> {
    /// A tensor whose bytes `compute` gives.
    pub fn new(
        name: impl Into<String>,
        dtype: Dtype,
        shape: Vec<usize>,
        compute: impl Fn() -> Result<Cow<'a, [u8]>, E> + Send + Sync + 'a,
    ) -> Self {
        Self { name: name.into(), dtype, shape, bytes: Box::new(compute) }
    }

    /// A tensor without bytes, to ask [`safetensors_bytes`] about.
    pub fn shape_only(name: impl Into<String>, dtype: Dtype, shape: Vec<usize>) -> Self {
        Self::new(name, dtype, shape, || Ok(Cow::Borrowed(&[])))
    }

    /// A tensor copied as it is from an open file.
    pub fn borrowed(tensor: TensorRef<'a>) -> Self {
        Self::new(tensor.name, tensor.dtype, tensor.shape.to_vec(), move || Ok(Cow::Borrowed(tensor.bytes)))
    }
}

/// Writes `tensors` as the safetensors file `path`, which appears complete or not at all.
///
/// The bytes depend on nothing but the contents: tensors lie in the order of the safetensors library (larger
/// elements first, then by name) and `metadata` in the order of its keys; where it is empty, no
/// `__metadata__` is written. Tensors are computed in parallel, a few ahead of the one being written, so that
/// memory holds at most twice the larger of 256 MiB and one tensor.
///
/// Errors where the disk fails, a name comes twice, or a tensor has not its announced size, and with whatever
/// error a tensor's computation gives; nothing is left behind then.
pub fn write_safetensors<E: From<CheckpointError> + Send>(
    path: &Path,
    mut tensors: Vec<LazyTensor<'_, E>>,
    metadata: &BTreeMap<String, String>,
) -> Result<(), E> {
    check_names(path, &tensors)?;
    sort(&mut tensors);
    write_with(path, |out| stream(path, out, &tensors, metadata))
}

/// Bytes of the file that [`write_safetensors`] would write; nothing is computed.
///
/// Errors where a name comes twice or the sizes overflow; `path` is for messages.
pub fn safetensors_bytes(
    path: &Path,
    mut tensors: Vec<LazyTensor<'_>>,
    metadata: &BTreeMap<String, String>,
) -> Result<u64, CheckpointError> {
    check_names(path, &tensors)?;
    sort(&mut tensors);
    let mut total = header(path, &tensors, metadata)?.len() as u64;
    for tensor in &tensors {
        total += length(path, tensor)? as u64;
    }
    Ok(total)
}

/// The order of the safetensors library: larger elements first, then by name.
fn sort<E>(tensors: &mut [LazyTensor<'_, E>]) {
    tensors.sort_by(|a, b| {
        let (larger, smaller) = (b.dtype.to_safetensors(), a.dtype.to_safetensors());
        larger.cmp(&smaller).then_with(|| a.name.cmp(&b.name))
    });
}

/// Writes a model's `tensors` into the folder `dir` in files of at most `max_shard_bytes` bytes of tensors:
/// `model.safetensors` where all fit, otherwise `model-00001-of-000NN.safetensors` and so on with
/// `model.safetensors.index.json`. A larger tensor has a file of its own. Tensors are dealt out by name.
///
/// Returns the names of the files. Errors as [`write_safetensors`]; complete shards stay then, so `dir` should be
/// a [`StagedDir`](super::StagedDir).
pub fn write_sharded<E: From<CheckpointError> + Send>(
    dir: &Path,
    mut tensors: Vec<LazyTensor<'_, E>>,
    max_shard_bytes: u64,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<String>, E> {
    check_names(dir, &tensors)?;
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let mut total_size = 0u64;
    let mut lengths = Vec::with_capacity(tensors.len());
    for tensor in &tensors {
        let length = length(dir, tensor)? as u64;
        total_size = total_size.saturating_add(length);
        lengths.push(length);
    }
    let counts = shard_counts(&lengths, max_shard_bytes);
    if counts.len() <= 1 {
        write_safetensors(&dir.join(WEIGHTS_FILE), tensors, metadata)?;
        return Ok(vec![WEIGHTS_FILE.to_string()]);
    }

    let mut files = Vec::with_capacity(counts.len() + 1);
    let mut weight_map = BTreeMap::new();
    let mut tensors = tensors.into_iter();
    for (position, &count) in counts.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", position + 1, counts.len());
        let shard: Vec<_> = tensors.by_ref().take(count).collect();
        for tensor in &shard {
            weight_map.insert(tensor.name.clone(), file.clone());
        }
        write_safetensors(&dir.join(&file), shard, metadata)?;
        files.push(file);
    }
    let index = Index { metadata: IndexMetadata { total_size }, weight_map };
    let path = dir.join(INDEX_FILE);
    let mut text = to_json(&path, serde_json::to_vec_pretty(&index))?;
    text.push(b'\n');
    write_file(&path, &text)?;
    files.push(INDEX_FILE.to_string());
    Ok(files)
}

#[derive(Serialize)]
struct Index {
    metadata: IndexMetadata,
    weight_map: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct IndexMetadata {
    total_size: u64,
}

/// How many of the tensors with those lengths go into each file, in turn.
fn shard_counts(lengths: &[u64], max_shard_bytes: u64) -> Vec<usize> {
    let mut counts = Vec::new();
    let (mut count, mut bytes) = (0, 0u64);
    for &length in lengths {
        if count > 0 && bytes.saturating_add(length) > max_shard_bytes {
            counts.push(count);
            (count, bytes) = (0, 0);
        }
        count += 1;
        bytes = bytes.saturating_add(length);
    }
    counts.extend((count > 0).then_some(count));
    counts
}

fn check_names<E>(path: &Path, tensors: &[LazyTensor<'_, E>]) -> Result<(), CheckpointError> {
    let mut seen = HashSet::with_capacity(tensors.len());
    for tensor in tensors {
        let (path, name) = (path.to_path_buf(), tensor.name.clone());
        if name == METADATA_KEY {
            return Err(CheckpointError::ReservedName { path, tensor: name });
        }
        if !seen.insert(&tensor.name) {
            return Err(CheckpointError::DuplicateTensor { path, tensor: name });
        }
    }
    Ok(())
}

/// The announced number of bytes of a tensor.
fn length<E>(path: &Path, tensor: &LazyTensor<'_, E>) -> Result<usize, CheckpointError> {
    byte_len(tensor.dtype, &tensor.shape).ok_or_else(|| CheckpointError::SizeOverflow {
        path: path.to_path_buf(),
        tensor: tensor.name.clone(),
        shape: tensor.shape.clone(),
    })
}

#[derive(Serialize)]
struct Info<'a> {
    dtype: &'static str,
    shape: &'a [usize],
    data_offsets: (usize, usize),
}

/// The header of `tensors`, in their order, with its length before it and padded to whole words.
fn header<E>(
    path: &Path,
    tensors: &[LazyTensor<'_, E>],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, CheckpointError> {
    let mut entries = vec![0; LENGTH_BYTES];
    entries.push(b'{');
    let mut add = |key: &str, value: serde_json::Result<Vec<u8>>| {
        if entries.len() > LENGTH_BYTES + 1 {
            entries.push(b',');
        }
        entries.extend(to_json(path, serde_json::to_vec(key))?);
        entries.push(b':');
        entries.extend(to_json(path, value)?);
        Ok::<_, CheckpointError>(())
    };
    if !metadata.is_empty() {
        add(METADATA_KEY, serde_json::to_vec(metadata))?;
    }
    let mut offset = 0usize;
    for tensor in tensors {
        let end = offset.checked_add(length(path, tensor)?).ok_or_else(|| CheckpointError::SizeOverflow {
            path: path.to_path_buf(),
            tensor: tensor.name.clone(),
            shape: tensor.shape.clone(),
        })?;
        let info =
            Info { dtype: tensor.dtype.header_name(), shape: &tensor.shape, data_offsets: (offset, end) };
        add(&tensor.name, serde_json::to_vec(&info))?;
        offset = end;
    }
    entries.push(b'}');
    entries.resize(entries.len().next_multiple_of(LENGTH_BYTES), b' ');
    let claimed = (entries.len() - LENGTH_BYTES) as u64;
    if claimed > MAX_HEADER {
        return Err(CheckpointError::HeaderTooLong { path: path.to_path_buf(), claimed, limit: MAX_HEADER });
    }
    entries[..LENGTH_BYTES].copy_from_slice(&claimed.to_le_bytes());
    Ok(entries)
}

/// JSON of strings and numbers; that it cannot be made is no more than a failed write.
fn to_json(path: &Path, json: serde_json::Result<Vec<u8>>) -> Result<Vec<u8>, CheckpointError> {
    json.map_err(|error| CheckpointError::write(path)(error.into()))
}

/// Writes header and tensors to `out`; `path` is for messages.
fn stream<E: From<CheckpointError> + Send>(
    path: &Path,
    out: &mut (impl Write + Send),
    tensors: &[LazyTensor<'_, E>],
    metadata: &BTreeMap<String, String>,
) -> Result<(), E> {
    let header = header(path, tensors, metadata)?;
    out.write_all(&header).map_err(CheckpointError::write(path))?;
    let mut ready = Vec::new();
    let mut rest = tensors;
    loop {
        let (window, later) = rest.split_at(window_len(path, rest)?);
        // One window is computed while the one before is written.
        let (written, computed) = rayon::join(
            || {
                ready
                    .iter()
                    .try_for_each(|bytes: &Cow<'_, [u8]>| out.write_all(bytes))
                    .map_err(CheckpointError::write(path))
            },
            || window.par_iter().map(|tensor| compute(path, tensor)).collect(),
        );
        written?;
        // Of several errors that of the first tensor, so that the same input gives the same message.
        ready = Vec::<Result<_, E>>::into_iter(computed).collect::<Result<Vec<_>, E>>()?;
        if ready.is_empty() {
            return Ok(());
        }
        rest = later;
    }
}

/// How many tensors are computed together next: one a thread and [`WINDOW_BYTES`] in all, but at least one.
fn window_len<E>(path: &Path, tensors: &[LazyTensor<'_, E>]) -> Result<usize, CheckpointError> {
    let mut bytes = 0usize;
    for (count, tensor) in tensors.iter().enumerate() {
        bytes = bytes.saturating_add(length(path, tensor)?);
        if count > 0 && (bytes > WINDOW_BYTES || count >= rayon::current_num_threads()) {
            return Ok(count);
        }
    }
    Ok(tensors.len())
}

fn compute<'a, E: From<CheckpointError>>(
    path: &Path,
    tensor: &LazyTensor<'a, E>,
) -> Result<Cow<'a, [u8]>, E> {
    let bytes = (tensor.bytes)()?;
    let expected = length(path, tensor)?;
    if bytes.len() != expected {
        return Err(E::from(CheckpointError::WrongLength {
            path: path.to_path_buf(),
            tensor: tensor.name.clone(),
            expected,
            found: bytes.len(),
        }));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
