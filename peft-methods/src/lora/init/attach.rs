//! First values onto a model: statistics gathered where a way needs them, factors put into place.

use super::error::InitError;
use super::{
    EvaDirections, corda, eva_directions, input_covariances, lora_ga, pissa_niter, weight_gradients,
};
use peft_core::adapter::{
    Adapter, AdapterError, InitLoraWeights, InitialFactors, LoraConfig, LowRankModule, Pattern, Patterns,
    Place, TargetModules, attach_factors, olora, pissa,
};
use peft_core::data::samples;
use peft_core::linalg::Matrix;
use peft_core::model::Decoder;
use peft_core::projection::Delta;
use peft_core::random::Stream;
use peft_core::train::{GradientCheckpointing, Preparation, StepSettings, TrainError};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Batches after which EVA takes the directions as they are. PEFT goes on until all have converged.
const MAX_EVA_BATCHES: usize = 256;

impl From<InitError> for TrainError {
    fn from(error: InitError) -> Self {
        TrainError::Preparation(error.to_string())
    }
}

/// The wanted modules in the model's order, with their ranks.
fn ranks(model: &Decoder, linear: &BTreeSet<String>, patterns: &Patterns) -> Vec<(String, usize)> {
    let paths = model.projections().map(|projection| &projection.path).filter(|path| linear.contains(*path));
    paths.map(|path| (path.clone(), patterns.rank(path))).collect()
}

/// The changes of the adapter in the checkpoint that a run goes on from. What does not fit the recipe is reported where
/// the checkpoint's state is read.
fn earlier(checkpoint: Option<&Path>, model: &Decoder) -> BTreeMap<String, LowRankModule> {
    let adapter = checkpoint.and_then(|dir| Adapter::open(&dir.join("adapter")).ok());
    let resolved = adapter.and_then(|adapter| adapter.resolve(&model.base_shapes()).ok());
    resolved.map(|resolved| resolved.linear).unwrap_or_default()
}

/// Puts the changes of a way that takes its factors out of the weights onto the modules `linear`.
///
/// A run that goes on takes what was taken out then from its checkpoint, whose adapter holds it, so that statistics are
/// not gathered again and nothing depends on their last bits.
///
/// # Errors
/// Those of the way.
pub(in crate::lora) fn take_out_of_weights(
    model: &mut Decoder,
    config: &LoraConfig,
    linear: &BTreeSet<String>,
    sample_count: usize,
    preparation: &Preparation,
) -> Result<(), TrainError> {
    let patterns = config.patterns()?;
    let ranks = ranks(model, linear, &patterns);
    let paths: Vec<String> = ranks.iter().map(|(path, _)| path.clone()).collect();
    let mut earlier = earlier(preparation.resume, model);
    if ranks.iter().any(|(path, rank)| earlier.get(path).is_none_or(|module| module.rank != 2 * rank)) {
        earlier.clear();
    }

    let init = config.init_lora_weights;
    let chosen = samples(preparation.examples, sample_count);
    let (mut covariances, mut gradients) = (None, BTreeMap::new());
    match init {
        InitLoraWeights::Corda if earlier.is_empty() => {
            covariances = Some(input_covariances(model, &paths, &chosen)?);
        }
        InitLoraWeights::LoraGa if earlier.is_empty() => {
            let step =
                StepSettings { gradient_checkpointing: GradientCheckpointing::Layers, ..preparation.step };
            gradients = weight_gradients(model, &paths, &chosen, preparation.micro_batch_size, step);
        }
        _ => {}
    }

    let place = |path: &str| {
        let place =
            Place { rank: patterns.rank(path), scale: patterns.scale(path), dropout: config.lora_dropout };
        linear.contains(path).then_some(place)
    };
    let seed = preparation.seed;
    attach_factors(model, place, |path, weight, Place { rank, scale, .. }| {
        let wrong = |source| AdapterError::Decomposition { module: path.to_string(), source };
        if let Some(module) = earlier.get(path) {
            let (a, b) = beginning(module).map_err(wrong)?;
            return Ok(InitialFactors::taken_from(weight, &a, &b, scale).map_err(wrong)?);
        }
        let mut stream = Stream::new(seed, "lora init", path, &[]);
        Ok(match init {
            InitLoraWeights::Olora => olora(weight, rank, scale).map_err(wrong)?,
            InitLoraWeights::PissaNiter(iterations) => {
                pissa_niter(path, weight, rank, scale, iterations, &mut stream)?
            }
            InitLoraWeights::Corda => {
                let method = config.corda_config.unwrap_or_default().corda_method;
                let covariance = covariances.as_ref().and_then(|all| all.of(path));
                let missing = || InitError::ZeroInput { module: path.to_string(), init: "corda" };
                corda(path, weight, covariance.ok_or_else(missing)?, method, rank, scale)?
            }
            InitLoraWeights::LoraGa => {
                let missing = || InitError::ZeroGradient { module: path.to_string() };
                let gradient = gradients.get(path).ok_or_else(missing)?;
                let gradient = Matrix::from_rows(gradient, weight.dims()).map_err(wrong)?;
                let settings = config.lora_ga_config.unwrap_or_default();
                lora_ga(path, weight, &gradient, settings, rank, scale, &mut stream)?
            }
            _ => pissa(weight, rank, scale).map_err(wrong)?,
        })
    })
}

/// `A₀` and `B₀` of factors `[A; A₀]` and `[B, −B₀]`.
fn beginning(module: &LowRankModule) -> Result<(Matrix, Matrix), peft_core::linalg::LinalgError> {
    let ([rows, columns], rank) = (module.dims, module.rank);
    let a = Matrix::from_rows(&module.a, [rank, columns])?.rows(rank / 2..rank);
    let b = Matrix::from_rows(&module.b, [rows, rank])?.columns(rank / 2..rank);
    Ok((a, b.scale_columns(&vec![-1.0; rank / 2])))
}

/// EVA's directions for the modules `linear`; those of the checkpoint that a run goes on from, if there is one.
///
/// # Errors
/// Those of [`eva_directions`].
pub(in crate::lora) fn eva(
    model: &Decoder,
    config: &LoraConfig,
    linear: &BTreeSet<String>,
    sample_count: usize,
    preparation: &Preparation,
) -> Result<EvaDirections, TrainError> {
    let earlier = earlier(preparation.resume, model);
    if !earlier.is_empty() && earlier.keys().all(|path| linear.contains(path)) {
        let mut directions: EvaDirections =
            linear.iter().map(|path| (path.clone(), (0, Vec::new()))).collect();
        directions.extend(earlier.into_iter().map(|(path, module)| (path, (module.rank, module.a))));
        return Ok(directions);
    }
    let ranks = ranks(model, linear, &config.patterns()?);
    let settings = config.eva_config.unwrap_or_default();
    let chosen = samples(preparation.examples, sample_count);
    let (batch_size, seed) = (preparation.micro_batch_size, preparation.seed);
    Ok(eva_directions(model, &ranks, &chosen, batch_size, settings, seed, MAX_EVA_BATCHES)?)
}

/// Alpha of the module at `path` once EVA has given it `rank` directions.
pub(in crate::lora) fn eva_alpha(config: &LoraConfig, patterns: &Patterns, path: &str, rank: usize) -> f64 {
    let (alpha, before) = (patterns.alpha(path), patterns.rank(path));
    match config.eva_config.unwrap_or_default().adjust_scaling_factors && rank != before {
        true => alpha * rank as f64 / before as f64,
        false => alpha,
    }
}

/// Writes the ranks that EVA gave the modules of `model` into the recipe's configuration, and with them alphas and
/// targets, as PEFT does.
///
/// # Errors
/// Those of the recipe's targets and patterns.
pub(in crate::lora) fn write_eva(lora: &mut LoraConfig, model: &Decoder) -> Result<(), AdapterError> {
    let recipe = lora.clone();
    let patterns = recipe.patterns()?;
    let wanted = recipe.place(&model.base_shapes(), false)?.linear.len();
    let mut kept = Vec::new();
    lora.eva_config = Some(recipe.eva_config.unwrap_or_default());
    (lora.rank_pattern, lora.alpha_pattern) = (Vec::new(), Vec::new());
    for projection in model.projections() {
        let Some(Delta::LowRank(form)) = &projection.delta else { continue };
        let (path, rank) = (projection.path.clone(), form.rank());
        let alpha = eva_alpha(&recipe, &patterns, &path, rank);
        if rank != recipe.r {
            lora.rank_pattern.push((path.clone(), rank));
        }
        if alpha != recipe.lora_alpha {
            lora.alpha_pattern.push((path.clone(), alpha));
        }
        kept.push(path);
    }
    if kept.len() < wanted {
        lora.target_modules = Some(TargetModules::Matching(Pattern::Names(kept)));
    }
    Ok(())
}
