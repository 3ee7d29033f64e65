//! Targets that are linear modules of the layers or a head of its own, for formats that know nothing else.

use super::error::AdapterError;
use super::targets::{Pattern, Selection, TargetModules, select};
use crate::model::{BaseShapes, EMBEDDING, HEAD};
use std::collections::{BTreeMap, BTreeSet};

/// The linear modules that the selection takes, with `[out, in]`.
///
/// # Errors
/// Those of [`select`]; an embedding, or a head that shares its weight.
pub fn select_linear(
    selection: &Selection,
    base: &BaseShapes,
) -> Result<BTreeMap<String, [usize; 2]>, AdapterError> {
    let mut chosen = BTreeMap::new();
    for path in select(selection, &matrices(base))? {
        if path == EMBEDDING || (path == HEAD && base.tied) {
            let reason = "is no linear module with a weight of its own, which this method needs".to_string();
            return Err(AdapterError::Target { module: path.to_string(), reason });
        }
        if let [rows, columns] = base.weights[path][..] {
            chosen.insert(path.to_string(), [rows, columns]);
        }
    }
    Ok(chosen)
}

/// Paths of the modules with a matrix for a weight, the embedding and the head among them.
pub fn matrices(base: &BaseShapes) -> Vec<&str> {
    base.weights.iter().filter(|(_, shape)| shape.len() == 2).map(|(path, _)| path.as_str()).collect()
}

/// The targets as a list of names that every program understands: the last parts of the chosen paths where those select
/// the same modules, otherwise the paths. Targets that are a list or an expression stay.
///
/// # Errors
/// Those of [`select`].
pub fn spelled_out(selection: &Selection, base: &BaseShapes) -> Result<TargetModules, AdapterError> {
    if let Some(targets @ TargetModules::Matching(_)) = selection.targets {
        return Ok(targets.clone());
    }
    let matrices = matrices(base);
    let chosen = select(selection, &matrices)?;
    let suffixes: BTreeSet<&str> = chosen.iter().filter_map(|path| path.rsplit('.').next()).collect();
    let names = |names: Vec<&str>| {
        TargetModules::Matching(Pattern::Names(names.into_iter().map(str::to_string).collect()))
    };
    let targets = names(suffixes.into_iter().collect());
    let same = select(&Selection { targets: Some(&targets), ..*selection }, &matrices)? == chosen;
    Ok(if same { targets } else { names(chosen) })
}
