//! EVA: explained variance adaptation (Paischer et al., arXiv 2410.07170).

use super::error::InitError;
use super::incremental_pca::IncrementalPca;
use super::statistics::{host_rows, representatives};
use peft_core::adapter::EvaConfig;
use peft_core::data::{Batch, Example, collate};
use peft_core::linalg::{LinalgError, Matrix};
use peft_core::model::Decoder;
use peft_core::random::Stream;
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The main directions of each module's inputs, row-major `[rank, in]` by path; the rank may be 0.
pub type EvaDirections = BTreeMap<String, (usize, Vec<f32>)>;

/// One module whose inputs are decomposed, for itself and those that share them.
struct Watched {
    pca: IncrementalPca,
    components: usize,
    converged: Vec<bool>,
    active: bool,
}

/// Decomposes the inputs of the modules `ranks` (path and rank, in the model's order) over batches of the samples, again
/// from the first when they end, until the directions that the rank distribution needs have converged, or `max_batches`.
///
/// The sum of the ranks is the budget; it goes to the directions that explain most of their module's variance, no module
/// getting more than round(rank · rho). Padding is not counted.
///
/// # Errors
/// [`InitError::TooManyComponents`], [`InitError::TooFewTokens`], [`InitError::Decomposition`].
pub fn eva_directions(
    model: &Decoder,
    ranks: &[(String, usize)],
    samples: &[&Example],
    batch_size: usize,
    config: EvaConfig,
    seed: u64,
    max_batches: usize,
) -> Result<EvaDirections, InitError> {
    let paths: Vec<String> = ranks.iter().map(|(path, _)| path.clone()).collect();
    let representative = representatives(&paths);
    let limit = |rank: usize| (rank as f64 * config.rho).round_ties_even() as usize;
    let budget: usize = ranks.iter().map(|(_, rank)| rank).sum();
    let mut components: BTreeMap<&str, usize> = BTreeMap::new();
    for (path, rank) in ranks {
        let entry = components.entry(representative[path].as_str()).or_default();
        *entry = (*entry).max(limit(*rank));
    }
    let features: BTreeMap<&str, usize> =
        model.projections().map(|p| (p.path.as_str(), p.dims()[1])).collect();
    let mut watched: BTreeMap<&str, Watched> = BTreeMap::new();
    for (path, components) in &components {
        let features = features.get(path).copied().unwrap_or(0);
        if *components > features {
            let module = path.to_string();
            return Err(InitError::TooManyComponents { module, components: *components, features });
        }
        let pca = IncrementalPca::new(*components, features);
        let converged = vec![false; *components];
        watched.insert(path, Watched { pca, components: *components, converged, active: true });
    }
    // Those that stand for others come first, as in PEFT: of equal shares the first get the budget.
    let mut order: Vec<&str> =
        paths.iter().map(String::as_str).filter(|p| components.contains_key(p)).collect();
    order.extend(paths.iter().map(String::as_str).filter(|p| !components.contains_key(p)));

    let batches: Vec<(Batch, Vec<i64>)> = samples
        .chunks(batch_size.max(1))
        .map(|chunk| (collate(chunk, 0), kept_rows(chunk, config)))
        .collect();
    let mut distribution: BTreeMap<&str, usize> =
        order.iter().map(|path| (*path, components[representative[*path].as_str()])).collect();
    for (number, (batch, rows)) in batches.iter().cycle().take(max_batches).enumerate() {
        for (path, watched) in &mut watched {
            watched.active = !watched.converged[..distribution[path]].iter().all(|converged| *converged);
        }
        if watched.values().all(|watched| !watched.active) {
            break;
        }
        let inputs: RefCell<Vec<(String, Result<Matrix, LinalgError>)>> = RefCell::default();
        model.observe_inputs(batch, &|path, x| {
            if watched.get(path).is_some_and(|watched| watched.active && rows.len() >= watched.components) {
                inputs.borrow_mut().push((path.to_string(), host_rows(x, rows, model)));
            }
        });
        update(&mut watched, inputs.into_inner(), config.tau, seed, number as u64)?;
        if watched.values().all(|watched| watched.pca.components().is_some()) {
            distribution = distribute(&watched, &order, &representative, budget);
        }
    }
    directions(&watched, &distribution, &representative, config).ok_or_else(|| {
        let largest = batches.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0);
        let unseen = watched.iter().find(|(_, watched)| watched.pca.components().is_none());
        let (module, components) = unseen.map_or((String::new(), 0), |(p, w)| (p.to_string(), w.components));
        InitError::TooFewTokens { module, batch_size, components, tokens: largest }
    })
}

/// Rows of the batch of `examples` that count: tokens, or supervised ones.
fn kept_rows(examples: &[&Example], config: EvaConfig) -> Vec<i64> {
    let width = examples.iter().map(|example| example.ids.len()).max().unwrap_or(0);
    let kept = |example: &Example, t: usize| !config.use_label_mask || example.supervised[t];
    let rows = examples.iter().enumerate().flat_map(|(row, example)| {
        (0..example.ids.len()).filter(move |t| kept(example, *t)).map(move |t| (row * width + t) as i64)
    });
    rows.collect()
}

/// Takes up one batch's inputs, the modules side by side.
fn update(
    watched: &mut BTreeMap<&str, Watched>,
    inputs: Vec<(String, Result<Matrix, LinalgError>)>,
    tau: f64,
    seed: u64,
    batch: u64,
) -> Result<(), InitError> {
    let mut inputs: BTreeMap<String, Result<Matrix, LinalgError>> = inputs.into_iter().collect();
    let work: Vec<_> = watched
        .iter_mut()
        .filter_map(|(path, watched)| Some((*path, watched, inputs.remove(*path)?)))
        .collect();
    let results: Vec<Result<(), InitError>> = work
        .into_par_iter()
        .map(|(path, watched, input)| {
            let wrong = InitError::decomposition(path, "eva");
            let mut stream = Stream::new(seed, "eva", path, &[batch]);
            let before = watched.pca.components().map(|(directions, _)| directions.clone());
            watched.pca.update(&input.map_err(&wrong)?, &mut stream).map_err(&wrong)?;
            if let (Some(before), Some((now, _))) = (before, watched.pca.components()) {
                let [features, _] = now.dims();
                for (j, converged) in watched.converged.iter_mut().enumerate() {
                    let cosine: f64 = (0..features).map(|i| before.get(i, j) * now.get(i, j)).sum();
                    *converged = cosine >= tau;
                }
            }
            Ok(())
        })
        .collect();
    results.into_iter().collect()
}

/// Ranks by path: the budget goes to the directions with the largest share of their module's variance.
fn distribute<'p>(
    watched: &BTreeMap<&'p str, Watched>,
    order: &[&'p str],
    representative: &'p BTreeMap<String, String>,
    budget: usize,
) -> BTreeMap<&'p str, usize> {
    let mut shares: Vec<(f64, &str)> = Vec::new();
    for path in order {
        let ratios = watched[representative[*path].as_str()].pca.explained_variance_ratio();
        shares.extend(ratios.into_iter().map(|ratio| (ratio, *path)));
    }
    // The sort is stable: equal shares stay in the order of the modules.
    shares.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut ranks: BTreeMap<&str, usize> = order.iter().map(|path| (*path, 0)).collect();
    for (_, path) in shares.into_iter().take(budget) {
        *ranks.entry(path).or_default() += 1;
    }
    ranks
}

fn directions(
    watched: &BTreeMap<&str, Watched>,
    ranks: &BTreeMap<&str, usize>,
    representative: &BTreeMap<String, String>,
    config: EvaConfig,
) -> Option<EvaDirections> {
    let mut result = EvaDirections::new();
    for (path, rank) in ranks {
        let (vectors, values) = watched[representative[*path].as_str()].pca.components()?;
        let whitened: Vec<f64> = values[..*rank]
            .iter()
            .map(|s| if config.whiten && *s > 0.0 { 1.0 / s.sqrt() } else { 1.0 })
            .collect();
        let a = vectors.columns(0..*rank).scale_columns(&whitened).transpose();
        result.insert(path.to_string(), (*rank, a.to_rows()));
    }
    Some(result)
}
