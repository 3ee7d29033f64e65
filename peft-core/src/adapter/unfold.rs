//! Unfolding: from a folded checkpoint back to its base.
//!
//! The original bytes come from where they are kept: beside the folded weights, or in the base. Without either the change
//! is subtracted, `W ← W' − s·B·A`, which gives the base back up to rounding; the record of the fold then tells for every
//! tensor whether the result is the original.

use super::error::AdapterError;
use super::file::Adapter;
use super::fold::{add, base_shapes};
use super::record::{MergeRecord, Original, adapter_sha256, fingerprints};
use super::rewrite::{TensorChange, copy_side_files};
use super::saved::{SavedAdapter, Unfolding};
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, LazyTensor, ORIGINAL_FILE, SafetensorsFile};
use crate::checkpoint::{TensorRef, from_f32, require_free, write_sharded};
use crate::model::{EMBEDDING, HEAD};
use serde_json::Map;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Where the values of the changed tensors came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The original kept beside the folded weights.
    Kept,
    /// The base.
    Base,
    /// The folded weights less the change.
    Subtraction,
}

/// What unfolding did.
#[derive(Debug, Clone)]
pub struct UnfoldReport {
    /// Tensors that folding had changed.
    pub changed: usize,
    /// Where their values came from.
    pub source: Source,
    /// Tensors whose written bytes are known to be the original's.
    pub identical: usize,
    /// Names of those known not to be, sorted.
    pub different: Vec<String>,
    /// Tensors of which the original is not known: neither base nor record says what it was.
    pub unknown: usize,
    /// Names of the weight files written.
    pub files: Vec<String>,
}

impl UnfoldReport {
    /// Whether every tensor is, byte for byte, the original.
    pub fn is_exact(&self) -> bool {
        self.different.is_empty() && self.unknown == 0
    }
}

/// Writes `merged` without `adapter` into the existing folder `dir`, best a staged one, with types as they were. `base` is
/// the model before folding, where it is at hand.
///
/// # Errors
/// An adapter other than the one that was folded; a base other than the one it was folded into; without original, a tensor
/// whose change subtraction does not undo; a failure to write.
pub fn unfold_into(
    merged: &Checkpoint,
    adapter: &dyn SavedAdapter,
    base: Option<&Checkpoint>,
    dir: &Path,
    max_shard_size: u64,
) -> Result<UnfoldReport, AdapterError> {
    let record = MergeRecord::read(merged.dir())?;
    if record.as_ref().is_some_and(|record| record.adapter_sha256 != adapter_sha256(adapter)) {
        return Err(AdapterError::OtherAdapter {
            adapter: adapter.folder().weights_path(),
            merged: merged.dir().to_path_buf(),
        });
    }
    let kept_path = merged.dir().join(ORIGINAL_FILE);
    let kept = if kept_path.exists() { Some(SafetensorsFile::open(&kept_path)?) } else { None };
    let source = match (&kept, base) {
        (Some(_), _) => Source::Kept,
        (None, Some(_)) => Source::Base,
        (None, None) => Source::Subtraction,
    };
    let changes = match (&record, source) {
        (Some(_), Source::Kept | Source::Base) => Unfolding::default(),
        _ => adapter.unfolding(merged)?,
    };
    let changed: BTreeSet<&str> = match &record {
        Some(record) => record.changed.iter().map(String::as_str).collect(),
        None => changes.undo.keys().chain(&changes.lost).map(String::as_str).collect(),
    };
    // What is known about the original: the record, else the base.
    let known = match (&record, base) {
        (Some(record), _) => record.original.clone(),
        (None, Some(base)) => fingerprints(base)?,
        (None, None) => BTreeMap::new(),
    };
    if let (Source::Base, Some(base)) = (source, base) {
        require_base(merged, base, &changed, record.as_ref())?;
    }

    // A head that folding parted from the embedding goes again.
    let is_original = |name: &&str| known.is_empty() || known.contains_key(*name);
    let names: Vec<&str> = merged.names().filter(is_original).collect();
    let mut tensors = Vec::new();
    let mut total = 0;
    let mut new_dtype = None;
    for name in names.iter().copied() {
        let tensor = merged.tensor(name)?;
        let original = known.get(name).and_then(|original| Dtype::from_header_name(&original.dtype));
        let dtype = original.unwrap_or(tensor.dtype);
        if dtype != tensor.dtype {
            new_dtype = Some(dtype);
        }
        total += (tensor.numel() * dtype.size()) as u64;
        let given = match source {
            Source::Kept => kept.as_ref().filter(|file| file.contains(name)).map(|file| file.tensor(name)),
            Source::Base => base.map(|base| base.tensor(name)),
            Source::Subtraction => None,
        };
        if let Some(given) = given.transpose()? {
            let bytes = move || Ok(Cow::Borrowed(given.bytes));
            tensors.push(LazyTensor::new(name, given.dtype, given.shape.to_vec(), bytes));
            continue;
        }
        // What is not among the kept tensors is as it was.
        let change = changes.undo.get(name).filter(|_| source == Source::Subtraction);
        if source == Source::Subtraction && change.is_none() && changed.contains(name) {
            return Err(AdapterError::Unrestorable { tensor: name.to_string() });
        }
        let bytes = move || undone(tensor, dtype, change);
        tensors.push(LazyTensor::new(name, dtype, tensor.shape.to_vec(), bytes));
    }
    require_free(dir, total + (1 << 20))?;
    match base.filter(|_| source == Source::Base) {
        Some(base) => copy_side_files(base, dir, None, &Map::new())?,
        None => {
            let parted = names.len() < merged.names().count() && !names.contains(&HEAD_WEIGHT);
            let tied = Map::from_iter(parted.then(|| ("tie_word_embeddings".to_string(), true.into())));
            copy_side_files(merged, dir, new_dtype, &tied)?;
        }
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let files = write_sharded::<AdapterError>(dir, tensors, max_shard_size, &metadata)?;

    // Compared as they lie on disk.
    let written = fingerprints(&Checkpoint::open(dir)?)?;
    let is_known = |(name, _): &(&String, &Original)| known.contains_key(*name);
    let (compared, rest): (Vec<_>, Vec<_>) = written.iter().partition(is_known);
    let differs = |(name, found): &(&String, &Original)| known.get(*name) != Some(*found);
    let different: Vec<String> =
        compared.iter().copied().filter(differs).map(|(name, _)| name.clone()).collect();
    Ok(UnfoldReport {
        changed: changed.len(),
        source,
        identical: compared.len() - different.len(),
        different,
        unknown: rest.len(),
        files,
    })
}

const HEAD_WEIGHT: &str = "lm_head.weight";

/// How the fold of a LoRA into `merged` is undone: `W' − s·B·A` and `b' − s·b_B`; what was replaced whole, by rows, or
/// brought to another length is lost.
pub(super) fn lora_unfolding<'a>(
    adapter: &Adapter,
    merged: &Checkpoint,
) -> Result<Unfolding<'a>, AdapterError> {
    let resolved = adapter.resolve(&base_shapes(merged)?)?;
    let weight = |path: &str| format!("{path}.weight");
    let Unfolding { mut undo, mut lost } = Unfolding::default();
    lost.extend(resolved.whole.into_keys());
    lost.extend(resolved.rows.keys().map(|path| weight(path)));
    if resolved.embedding.is_some() {
        lost.extend([weight(EMBEDDING), weight(HEAD)]);
    }
    for (path, module) in resolved.linear {
        if let Some(change) = module.bias.clone() {
            let scale = module.scale as f32;
            let back =
                move |bias: Vec<f32>| Ok(bias.iter().zip(&change).map(|(b, c)| b - scale * c).collect());
            undo.insert(format!("{path}.bias"), Box::new(back) as TensorChange);
        }
        match module.magnitude {
            Some(_) => drop(lost.insert(weight(&path))),
            // The adapter's own copy of the weight is the base's.
            None => {
                lost.remove(&weight(&path));
                let back = move |mut values: Vec<f32>| {
                    add(&mut values, &module.a, &module.b, module.rank, module.dims, -module.scale);
                    Ok(values)
                };
                undo.insert(weight(&path), Box::new(back) as TensorChange);
            }
        }
    }
    lost.retain(|name| merged.contains(name));
    undo.retain(|name, _| !lost.contains(name));
    Ok(Unfolding { undo, lost })
}

/// The tensor's bytes in `dtype`, with its change undone.
fn undone<'a>(
    tensor: TensorRef<'a>,
    dtype: Dtype,
    undo: Option<&TensorChange>,
) -> Result<Cow<'a, [u8]>, AdapterError> {
    if undo.is_none() && dtype == tensor.dtype {
        return Ok(Cow::Borrowed(tensor.bytes));
    }
    let values = match undo {
        Some(undo) => undo(tensor.to_f32()?)?,
        None => tensor.to_f32()?,
    };
    Ok(Cow::Owned(from_f32(&values, dtype).map_err(CheckpointError::from)?))
}

/// Errors where `base` is not what `merged` was made from, as far as that shows: by the record, or by the tensors that
/// folding leaves alone.
fn require_base(
    merged: &Checkpoint,
    base: &Checkpoint,
    changed: &BTreeSet<&str>,
    record: Option<&MergeRecord>,
) -> Result<(), AdapterError> {
    let found = fingerprints(base)?;
    let expected = match record {
        Some(record) => record.original.clone(),
        None => {
            let mut expected = fingerprints(merged)?;
            expected.retain(|name, _| !changed.contains(name.as_str()));
            expected
        }
    };
    match expected.iter().find(|(name, original)| found.get(*name) != Some(*original)) {
        None => Ok(()),
        Some((tensor, _)) => Err(AdapterError::OtherBase {
            base: base.dir().to_path_buf(),
            merged: merged.dir().to_path_buf(),
            tensor: tensor.clone(),
        }),
    }
}
