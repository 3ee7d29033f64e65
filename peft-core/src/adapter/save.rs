//! A decoder's adapter written as PEFT does.

use super::config::AdapterConfig;
use super::error::AdapterError;
use super::file::{BASE_BIAS, BASE_WEIGHT};
use super::folder::{PREFIX, finite_tensor, weights_bytes, write_adapter};
use super::placement::{Placement, SharedWeight};
use crate::model::{BaseShapes, Decoder, EMBEDDING, HEAD, ParameterShape};
use crate::projection::{Delta, Parameter, Projection};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Writes `adapter_config.json` and `adapter_model.safetensors` into the folder `dir`: every change and every other
/// trainable parameter of the decoder, in f32.
///
/// Where a part of the base was taken out for the factors, they are written as ones of twice the rank that belong to
/// the base as it is in its file ([`LowRank::whole_factors`], [`LoraConfig::converted`]).
///
/// # Errors
/// A non-finite value, or a failure to write.
pub fn save(model: &Decoder, config: &AdapterConfig, dir: &Path) -> Result<(), AdapterError> {
    let whole = whole_factors(model);
    let mut tensors = Vec::new();
    for (key, parameter, transposed) in adapter_tensors(model) {
        let parameter = whole.get(parameter.name.as_str()).unwrap_or(parameter);
        let mut shape = parameter.shape.clone();
        if transposed {
            shape.reverse();
        }
        tensors.push(finite_tensor(key, shape, dir, move || match transposed {
            true => parameter.value.clone().transpose().into_data().iter::<f32>().collect(),
            false => parameter.to_host(),
        }));
    }
    let config = match whole.is_empty() {
        true => config.to_json(),
        false => AdapterConfig { lora: config.lora.converted(), ..config.clone() }.to_json(),
    };
    write_adapter(dir, config, tensors)
}

/// By name, the factors to write in place of those whose beginning was taken out of the base.
fn whole_factors(model: &Decoder) -> BTreeMap<&str, Parameter> {
    let mut factors = BTreeMap::new();
    for projection in model.projections() {
        if let Some(Delta::LowRank(form)) = projection.delta.as_ref().filter(|delta| delta.reduces_base()) {
            let (a, b) = form.whole_factors();
            factors.insert(form.a.name.as_str(), Parameter::matrix(form.a.name.clone(), a));
            factors.insert(form.b.name.as_str(), Parameter::matrix(form.b.name.clone(), b));
        }
    }
    factors
}

/// Bytes of the `adapter_model.safetensors` that [`save`] writes of a model on which `parameters` were put by
/// `placement`; `base` is what the placement was made for.
///
/// # Errors
/// A name that comes twice, or sizes beyond all bounds.
pub fn adapter_bytes<'a>(
    parameters: impl Iterator<Item = &'a ParameterShape>,
    placement: &Placement,
    base: &BaseShapes,
) -> Result<u64, AdapterError> {
    let tied = base.tied && placement.shared != SharedWeight::Parted;
    let weight = |path: &str| base.weights.get(path).cloned().unwrap_or_default();
    let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
    for parameter in parameters {
        let below = parameter.name.strip_suffix(".bias").filter(|path| placement.linear.contains(*path));
        let key = below.map_or_else(|| parameter.name.clone(), |path| format!("{path}{BASE_BIAS}"));
        let (module, part) = key.rsplit_once('.').unwrap_or_default();
        // A head that shares the embedding shares its change, whose roles are turned round.
        let twin = match part {
            "lora_embedding_A" if tied => Some((format!("{HEAD}.lora_B.weight"), true)),
            "lora_embedding_B" if tied => Some((format!("{HEAD}.lora_A.weight"), true)),
            "weight" if tied && module == EMBEDDING => Some((format!("{HEAD}.weight"), false)),
            _ => None,
        };
        tensors.extend(twin.map(|(key, turned)| {
            let mut shape = parameter.shape.clone();
            if turned {
                shape.reverse();
            }
            (key, shape)
        }));
        tensors.push((key, parameter.shape.clone()));
    }
    let mut frozen = Vec::new();
    if placement.rows.is_empty() {
        frozen.extend(placement.linear.contains(HEAD).then_some(HEAD));
        frozen.extend(placement.embedding.then_some(EMBEDDING));
        frozen.extend((placement.embedding && tied).then_some(HEAD));
    }
    tensors.extend(frozen.into_iter().map(|path| (format!("{path}{BASE_WEIGHT}"), weight(path))));
    weights_bytes(tensors.into_iter().map(|(key, shape)| (format!("{PREFIX}{key}"), shape)))
}

/// The tensors of the file: key, parameter, and whether it is written transposed.
fn adapter_tensors(model: &Decoder) -> Vec<(String, &Parameter, bool)> {
    let changed: Vec<_> = model.projections().filter(|projection| projection.delta.is_some()).collect();
    let embedding = &model.embed_tokens;
    let mut parts: BTreeSet<&str> =
        changed.iter().flat_map(|p| &p.delta).flat_map(|d| d.parameters()).map(|p| p.name.as_str()).collect();
    parts.extend(embedding.parameters().skip(1).map(|parameter| parameter.name.as_str()));
    parts.extend(model.head_rows.iter().map(|rows| rows.values.name.as_str()));

    let mut tensors = Vec::new();
    for parameter in model.parameters() {
        let name = parameter.name.as_str();
        if !parameter.trainable && !parts.contains(name) {
            continue;
        }
        // Below a change, the base's bias has another name.
        let below = name.strip_suffix(".bias").filter(|path| changed.iter().any(|p| p.path == *path));
        let key = below.map_or_else(|| name.to_string(), |path| format!("{path}{BASE_BIAS}"));
        tensors.push((key, parameter, false));
    }
    // PEFT saves the frozen weight of a targeted head or embedding along with its factors, unless rows are trained too.
    let with_rows = embedding.rows.is_some() || model.head_rows.is_some();
    // Converted factors belong to the weight in the base's file, which is not the one held here.
    let is_head =
        |p: &&&Projection| p.path == HEAD && !p.delta.as_ref().is_some_and(|delta| delta.reduces_base());
    if let Some(head) = changed.iter().find(|p| is_head(p) && !with_rows) {
        tensors.push((format!("{HEAD}{BASE_WEIGHT}"), &head.weight, false));
    }
    if let Some(form) = &embedding.delta {
        // A head that shares the weight shares the change.
        let ends = if model.config.tie_word_embeddings { vec![EMBEDDING, HEAD] } else { vec![EMBEDDING] };
        let weights = ends.iter().filter(|_| !with_rows);
        tensors.extend(weights.map(|end| (format!("{end}{BASE_WEIGHT}"), &embedding.weight, false)));
        if ends.contains(&HEAD) {
            tensors.push((format!("{HEAD}.lora_A.weight"), &form.b, true));
            tensors.push((format!("{HEAD}.lora_B.weight"), &form.a, true));
        }
    }
    if embedding.weight.trainable && model.config.tie_word_embeddings {
        tensors.push((format!("{HEAD}.weight"), &embedding.weight, false));
    }
    for (key, ..) in &mut tensors {
        key.insert_str(0, PREFIX);
    }
    tensors
}
