//! An adapter of another kind written as a plain LoRA, where its changes have exact low-rank factors.

use super::config::{AdapterConfig, LoraConfig};
use super::error::AdapterError;
use super::folder::{finite_tensor, key, write_adapter};
use super::saved::{Parts, SavedAdapter};
use super::targets::{Pattern, Selection, TargetModules, select};
use crate::linalg::{self, Matrix};
use crate::model::BaseShapes;
use crate::projection::Parameter;
use burn::tensor::{DType, Device, Tensor, TensorData};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainLora {
    /// Modules by rank.
    pub ranks: BTreeMap<usize, usize>,
    /// Values in the file.
    pub values: u64,
}

/// Writes `adapter` as a plain LoRA for the same base, whose modules are `base`, into the existing folder `dir`: `ΔW = B·A`
/// with the scale 1. With `balanced`, `B` and `A` share the singular values of `ΔW` evenly, which suits further training;
/// otherwise they are the changes' own factors. `base_name` and `revision` are what its configuration says of the base.
///
/// # Errors
/// Those of [`SavedAdapter::parts`]; a change without exact factors, or tensors that are replaced whole; a failure to
/// write.
pub fn write_plain_lora(
    adapter: &dyn SavedAdapter,
    base: &BaseShapes,
    (base_name, revision): (Option<&str>, Option<&str>),
    balanced: bool,
    dir: &Path,
) -> Result<PlainLora, AdapterError> {
    let Parts { changes, whole } = adapter.parts(base, &Device::flex())?;
    if let Some(module) = whole.into_keys().next() {
        let reason = "is replaced whole, which a plain LoRA has no factors for".to_string();
        return Err(AdapterError::Target { module, reason });
    }
    let mut factors = BTreeMap::new();
    for (path, delta) in &changes {
        let Some((b, a)) = delta.factors() else {
            let reason = "has a change that is no product of two factors".to_string();
            return Err(AdapterError::Target { module: path.clone(), reason });
        };
        let (b, a) = if balanced { balance(path, &b, &a)? } else { (b, a) };
        let parameters = [("lora_A", a), ("lora_B", b)]
            .map(|(part, value)| Parameter::matrix(format!("{path}.{part}.weight"), value));
        factors.insert(path.clone(), parameters);
    }
    let rank = |[a, _]: &[Parameter; 2]| a.shape[0];
    let mut ranks = BTreeMap::new();
    for module in factors.values() {
        *ranks.entry(rank(module)).or_insert(0) += 1;
    }
    // The rank of most modules, of equal ones the larger.
    let usual = ranks.iter().max_by_key(|(rank, count)| (**count, **rank)).map_or(1, |(rank, _)| *rank);
    let others = || factors.iter().filter(|(_, module)| rank(module) != usual);
    // A pattern is an expression: the dots of a path match themselves, too.
    let lora = LoraConfig {
        r: usual,
        lora_alpha: usual as f64,
        target_modules: Some(targets(&factors, base)?),
        rank_pattern: others().map(|(path, module)| (path.clone(), rank(module))).collect(),
        alpha_pattern: others().map(|(path, module)| (path.clone(), rank(module) as f64)).collect(),
        ensure_weight_tying: Some(false),
        ..LoraConfig::default()
    };
    let [base_model_name_or_path, revision] = [base_name, revision].map(|name| name.map(str::to_string));
    let config = AdapterConfig { lora, base_model_name_or_path, revision };
    let parameters = || factors.values().flatten();
    let tensors = parameters()
        .map(|factor| finite_tensor(key(&factor.name, ""), factor.shape.clone(), dir, || factor.to_host()));
    write_adapter(dir, config.to_json(), tensors.collect())?;
    Ok(PlainLora { ranks, values: parameters().map(|factor| factor.numel() as u64).sum() })
}

/// The factors with the singular values of their product shared evenly.
fn balance(path: &str, b: &Tensor<2>, a: &Tensor<2>) -> Result<(Tensor<2>, Tensor<2>), AdapterError> {
    let host = |factor: &Tensor<2>| {
        let values: Vec<f32> = factor.clone().into_data().iter::<f32>().collect();
        Matrix::from_rows(&values, factor.dims())
    };
    let tensor = |factor: &Matrix| {
        Tensor::from_data(TensorData::new(factor.to_rows(), factor.dims()), (&Device::flex(), DType::F32))
    };
    let found = host(b).and_then(|b| linalg::balanced(&b, &host(a)?));
    let (b, a) = found.map_err(|source| AdapterError::Decomposition { module: path.to_string(), source })?;
    Ok((tensor(&b), tensor(&a)))
}

/// The last parts of the paths where those select the same modules, otherwise the paths.
fn targets<T>(modules: &BTreeMap<String, T>, base: &BaseShapes) -> Result<TargetModules, AdapterError> {
    let names = |names: BTreeSet<&str>| {
        TargetModules::Matching(Pattern::Names(names.into_iter().map(str::to_string).collect()))
    };
    let paths: BTreeSet<&str> = modules.keys().map(String::as_str).collect();
    let short = names(paths.iter().filter_map(|path| path.rsplit('.').next()).collect());
    let selection = Selection {
        targets: Some(&short),
        exclude: None,
        saved: &[],
        layers: None,
        layers_pattern: &[],
        strict: false,
    };
    let selected: BTreeSet<&str> = select(&selection, &super::linear::matrices(base))?.into_iter().collect();
    Ok(if selected == paths { short } else { names(paths) })
}
