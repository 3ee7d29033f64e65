//! Folding an adapter into its base: `W ← W + s·B·A`, with DoRA `W ← m/n ∘ (W + s·B·A)`; biases, whole modules and rows
//! replaced.

use super::error::AdapterError;
use super::file::{Adapter, LowRankModule, RowsModule};
use super::initial::{failed, recomputed};
use super::placement::SharedWeight;
use super::rewrite::{Rewrite, RewriteOptions, TensorChange, rewrite_into};
use super::saved::{Folding, SavedAdapter};
use crate::checkpoint::{Checkpoint, StagedDir};
use crate::linalg::Matrix;
use crate::model::{BaseShapes, EMBEDDING, HEAD, ties_embeddings};
use burn::tensor::{Device, Tensor, TensorData};
use std::collections::BTreeSet;
use std::path::Path;

/// What a fold did.
#[derive(Debug, Clone)]
pub struct FoldReport {
    /// Weights that a low-rank change was added to.
    pub folded: usize,
    /// Tensors replaced whole.
    pub replaced: usize,
    /// Whether a weight that embedding and head shared became two.
    pub parted: bool,
    /// Names of all tensors that are not the base's own, sorted.
    pub changed: Vec<String>,
    /// Names of the weight files written.
    pub files: Vec<String>,
}

/// Writes `base` with `adapter` folded in to the folder `output`, which appears complete or not at all.
///
/// # Errors
/// An output folder that is not empty, or those of [`fold_into`].
pub fn fold(
    base: &Checkpoint,
    adapter: &dyn SavedAdapter,
    output: &Path,
    options: &RewriteOptions,
) -> Result<FoldReport, AdapterError> {
    let staged = StagedDir::new(output)?;
    let report = fold_into(base, adapter, staged.path(), options)?;
    staged.commit()?;
    Ok(report)
}

/// As [`fold`], into an existing folder.
///
/// # Errors
/// An adapter that does not fit the base or cannot be folded into it, or those of [`rewrite_into`].
pub fn fold_into(
    base: &Checkpoint,
    adapter: &dyn SavedAdapter,
    dir: &Path,
    options: &RewriteOptions,
) -> Result<FoldReport, AdapterError> {
    adapter.require_base(base)?;
    let Folding { rewrite, folded, replaced, parted } = adapter.folding(base)?;
    let files = rewrite_into(base, dir, options, &rewrite)?;
    let changed: BTreeSet<String> = rewrite.changes.into_keys().chain(rewrite.copies.into_keys()).collect();
    Ok(FoldReport { folded, replaced, parted, changed: changed.into_iter().collect(), files })
}

/// How a LoRA is folded into `base`.
pub(super) fn lora_folding<'a>(
    adapter: &'a Adapter,
    base: &'a Checkpoint,
) -> Result<Folding<'a>, AdapterError> {
    let shapes = base_shapes(base)?;
    let resolved = adapter.resolve(&shapes)?;
    let parted = resolved.shared == SharedWeight::Parted;
    let folded = resolved.linear.len() + usize::from(resolved.embedding.is_some());
    let replaced = resolved.whole.len();

    let mut rewrite = Rewrite::default();
    let mut whole = resolved.whole;
    let head_is_saved = base.contains(&format!("{HEAD}.weight"));
    if parted {
        if !head_is_saved {
            rewrite.copies.insert(format!("{HEAD}.weight"), format!("{EMBEDDING}.weight"));
        }
        rewrite.config.insert("tie_word_embeddings".to_string(), false.into());
    }
    for (path, module) in resolved.linear {
        if let Some(change) = &module.bias {
            let name = format!("{path}.bias");
            if !shapes.biases.contains(&path) {
                let reason = "has no bias that lora_bias could be folded into".to_string();
                return Err(AdapterError::Target { module: path, reason });
            }
            let (own, change, scale) = (whole.remove(&name), change.clone(), module.scale as f32);
            let add = move |bias: Vec<f32>| {
                let bias = own.clone().unwrap_or(bias);
                Ok(bias.iter().zip(&change).map(|(b, c)| b + scale * c).collect())
            };
            rewrite.changes.insert(name, Box::new(add));
        }
        let name = format!("{path}.weight");
        let own = whole.remove(&name);
        let change = move |weight| {
            let mut weight = match &own {
                Some(own) => own.clone(),
                None => reduced(weight, &path, adapter, &module)?,
            };
            add(&mut weight, &module.a, &module.b, module.rank, module.dims, module.scale);
            if let Some(lengths) = &module.magnitude {
                scale_rows(&mut weight, module.dims[1], lengths);
            }
            Ok(weight)
        };
        rewrite.changes.insert(name, Box::new(change));
    }
    if let Some(module) = resolved.embedding {
        let own = whole.remove(&format!("{EMBEDDING}.weight"));
        change_embedding(&mut rewrite, head_is_saved && shapes.tied && !parted, move || {
            let (own, module) = (own.clone(), module.clone());
            Box::new(move |weight| Ok(fold_embedding(own.clone().unwrap_or(weight), &module)))
        });
    }
    for (path, RowsModule { indices, values }) in resolved.rows {
        let replace = move || -> TensorChange {
            let (indices, values) = (indices.clone(), values.clone());
            Box::new(move |mut weight: Vec<f32>| {
                let width = values.len() / indices.len();
                for (token, row) in indices.iter().zip(values.chunks_exact(width)) {
                    let start = *token as usize * width;
                    weight[start..start + width].copy_from_slice(row);
                }
                Ok(weight)
            })
        };
        match path.as_str() {
            EMBEDDING => change_embedding(&mut rewrite, head_is_saved && shapes.tied, replace),
            _ => drop(rewrite.changes.insert(format!("{path}.weight"), replace())),
        }
    }
    for (name, values) in whole {
        let both = head_is_saved && shapes.tied && !parted && name == format!("{EMBEDDING}.weight");
        let replace = move || -> TensorChange {
            let values = values.clone();
            Box::new(move |_| Ok(values.clone()))
        };
        match both {
            true => change_embedding(&mut rewrite, true, replace),
            false => drop(rewrite.changes.insert(name, replace())),
        }
    }
    Ok(Folding { rewrite, folded, replaced, parted })
}

/// The weight that the adapter's factors belong to: without what its initialisation took out of the base.
fn reduced(
    weight: Vec<f32>,
    path: &str,
    adapter: &Adapter,
    module: &LowRankModule,
) -> Result<Vec<f32>, AdapterError> {
    let Some(initial) = recomputed(adapter.config.lora.init_lora_weights) else { return Ok(weight) };
    let first = Matrix::from_rows(&weight, module.dims).and_then(|w| initial(&w, module.rank, module.scale));
    Ok(first.map_err(|source| failed(path, source))?.base.unwrap_or(weight))
}

/// Adds a change of the embedding, and of a copy of it that is saved as the head.
fn change_embedding(rewrite: &mut Rewrite, and_head: bool, change: impl Fn() -> TensorChange<'static>) {
    rewrite.changes.insert(format!("{EMBEDDING}.weight"), change());
    if and_head {
        rewrite.changes.insert(format!("{HEAD}.weight"), change());
    }
}

/// The modules of a checkpoint, by its tensors' names.
///
/// # Errors
/// A configuration that cannot be understood.
pub fn base_shapes(base: &Checkpoint) -> Result<BaseShapes, AdapterError> {
    let mut shapes = BaseShapes { tied: ties_embeddings(base)?, ..BaseShapes::default() };
    for name in base.names() {
        if let Some(path) = name.strip_suffix(".weight") {
            shapes.weights.insert(path.to_string(), base.tensor(name)?.shape.to_vec());
        }
        shapes.biases.extend(name.strip_suffix(".bias").map(str::to_string));
    }
    if let Some(shape) = shapes.weights.get(EMBEDDING).cloned().filter(|_| shapes.tied) {
        shapes.weights.insert(HEAD.to_string(), shape);
    }
    Ok(shapes)
}

/// `W + s·(B·A)ᵀ` with DoRA's lengths of columns.
fn fold_embedding(mut weight: Vec<f32>, module: &LowRankModule) -> Vec<f32> {
    let [vocab, hidden] = module.dims;
    let rank = module.rank;
    let b = transpose(&module.a, rank, vocab);
    let a = transpose(&module.b, hidden, rank);
    add(&mut weight, &a, &b, rank, module.dims, module.scale);
    if let Some(lengths) = &module.magnitude {
        let mut squares = vec![0f64; hidden];
        for row in weight.chunks_exact(hidden) {
            squares.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v).powi(2));
        }
        for row in weight.chunks_exact_mut(hidden) {
            for (value, (length, square)) in row.iter_mut().zip(lengths.iter().zip(&squares)) {
                *value *= length / square.sqrt() as f32;
            }
        }
    }
    weight
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
}

/// Gives the rows of a weight the lengths `m`.
fn scale_rows(weight: &mut [f32], columns: usize, lengths: &[f32]) {
    for (row, length) in weight.chunks_exact_mut(columns).zip(lengths) {
        let own = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        let gain = length / own as f32;
        row.iter_mut().for_each(|value| *value *= gain);
    }
}

/// `W + s·B·A` in blocks of rows, so that the dense change is never whole in memory.
pub(super) fn add(
    weight: &mut [f32],
    a: &[f32],
    b: &[f32],
    rank: usize,
    [_, columns]: [usize; 2],
    scale: f64,
) {
    const BLOCK: usize = 1024;
    let device = Device::flex();
    let a = Tensor::<2>::from_data(TensorData::new(a.to_vec(), [rank, columns]), &device);
    for (rows, b) in weight.chunks_mut(BLOCK * columns).zip(b.chunks(BLOCK * rank)) {
        let b = Tensor::<2>::from_data(TensorData::new(b.to_vec(), [b.len() / rank, rank]), &device);
        let change = b.matmul(a.clone()).mul_scalar(scale).into_data();
        for (w, c) in rows.iter_mut().zip(change.iter::<f32>()) {
            *w += c;
        }
    }
}
