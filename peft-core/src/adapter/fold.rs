//! Folding an adapter into its base: `W ← W + s·B·A`, and whole modules replaced.

use super::error::AdapterError;
use super::file::{Adapter, LowRankModule};
use super::rewrite::{RewriteOptions, TensorChange, rewrite_checkpoint};
use crate::checkpoint::Checkpoint;
use burn::tensor::{Device, Tensor, TensorData};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a fold did.
#[derive(Debug, Clone)]
pub struct FoldReport {
    /// Weights that a low-rank change was added to.
    pub folded: usize,
    /// Tensors replaced whole.
    pub replaced: usize,
    /// Weight files written.
    pub files: Vec<PathBuf>,
}

/// Writes `base` with `adapter` folded in to the folder `output`.
///
/// # Errors
/// An adapter that does not fit the base, or those of [`rewrite_checkpoint`].
pub fn fold(
    base: &Checkpoint,
    adapter: &Adapter,
    output: &Path,
    options: &RewriteOptions,
) -> Result<FoldReport, AdapterError> {
    let mut weights = BTreeMap::new();
    for name in base.names() {
        if let Some(path) = name.strip_suffix(".weight") {
            weights.insert(path.to_string(), base.tensor(name)?.shape.to_vec());
        }
    }
    let tied = base.config().get("tie_word_embeddings").and_then(serde_json::Value::as_bool).unwrap_or(false);
    let resolved = adapter.resolve(&weights, tied || !base.contains("lm_head.weight"))?;
    let (folded, replaced) = (resolved.low_rank.len(), resolved.whole.len());
    let mut changes: BTreeMap<String, TensorChange> = BTreeMap::new();
    let mut whole = resolved.whole;
    for (path, module) in resolved.low_rank {
        let name = format!("{path}.weight");
        let replaced = whole.remove(&name);
        let change = move |weight| add(replaced.clone().unwrap_or(weight), &module);
        changes.insert(name, Box::new(change));
    }
    for (name, values) in whole {
        changes.insert(name, Box::new(move |_| values.clone()));
    }
    let files = rewrite_checkpoint(base, output, options, &changes)?;
    Ok(FoldReport { folded, replaced, files })
}

/// `W + s·B·A` in blocks of rows, so that the dense change is never whole in memory.
fn add(mut weight: Vec<f32>, module: &LowRankModule) -> Vec<f32> {
    const BLOCK: usize = 1024;
    let device = Device::flex();
    let [_, columns] = module.dims;
    let rank = module.rank;
    let a = Tensor::<2>::from_data(TensorData::new(module.a.clone(), [rank, columns]), &device);
    for (rows, b) in weight.chunks_mut(BLOCK * columns).zip(module.b.chunks(BLOCK * rank)) {
        let b = Tensor::<2>::from_data(TensorData::new(b.to_vec(), [b.len() / rank, rank]), &device);
        let change = b.matmul(a.clone()).mul_scalar(module.scale).into_data();
        for (w, c) in rows.iter_mut().zip(change.iter::<f32>()) {
            *w += c;
        }
    }
    weight
}
