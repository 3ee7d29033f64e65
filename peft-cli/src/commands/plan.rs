//! `peft plan`: what a recipe's run will be, from headers, tokenizer and data alone.

use super::{data, train};
use crate::args::PlanArgs;
use crate::error::CliError;
use crate::forecast::{Forecast, MOMENTS, method_plan};
use crate::recipe::{self, Recipe};
use crate::{device, open, render};
use burn::tensor::Device;
use peft_core::checkpoint::{Headers, resolve_headers};
use peft_core::data::{DataError, Dataset, Example, OnTruncation, PackingReport, Tokenised, tokenise_files};
use peft_core::model::{ComputeType, ModelConfig, ProjectionShape};
use peft_core::text::Tokenizer;
use peft_core::train::plan::{BatchShape, Calibration, calibrate, evaluation_batches};
use peft_core::train::{
    Every, MethodPlan, ParameterRole, PlannedParameter, TrainConfig, require_vocabulary, state_bytes,
};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Everything that is known of a run before it.
#[derive(Serialize)]
pub struct Report {
    /// The base.
    pub base: BaseReport,
    /// The method's name.
    pub method: &'static str,
    /// Linear modules with a change or trained, by kind; then norms that train.
    pub modules: Vec<ModuleReport>,
    /// Kinds of linear modules that stay as they are.
    pub excluded: Vec<String>,
    /// Parameters that train.
    pub trainable_parameters: u64,
    /// Parameters in all, those of the method among them.
    pub parameters: u64,
    /// Bytes of the weights' file of the result.
    pub artifact_bytes: u64,
    /// Bytes of a checkpoint: result, trained parameters, the optimizer's memory.
    pub checkpoint_bytes: u64,
    /// The data.
    pub data: DataReport,
    /// The course of the run.
    pub course: CourseReport,
    /// Memory.
    pub memory: peft_core::train::plan::MemoryPlan,
    /// What the device has.
    pub device: peft_core::train::DeviceMemory,
    /// Whether the peak fits.
    pub fits: Option<bool>,
    /// Changes with which it would.
    pub advice: Vec<peft_core::train::plan::Advice>,
    /// What was measured, if it was.
    pub calibration: Option<Calibration>,
    /// Seconds of the run, where measured.
    pub seconds: Option<f64>,
    /// Every key of the recipe, defaults resolved.
    pub recipe: Recipe,
}

/// The base.
#[derive(Serialize)]
pub struct BaseReport {
    /// As the recipe names it.
    pub name: String,
    /// Its class.
    pub architecture: &'static str,
    /// Its parameters.
    pub parameters: u64,
    /// Parameters by type on disk.
    pub types: BTreeMap<String, u64>,
    /// Type of weights and activations in the run.
    pub compute: &'static str,
    /// Bytes that must be downloaded first.
    pub download_bytes: u64,
}

/// Modules of one kind.
#[derive(Serialize)]
pub struct ModuleReport {
    /// The last part of their paths.
    pub kind: String,
    /// How many there are.
    pub count: usize,
    /// Their different shapes, `[out, in]`; `[features, 1]` of norms.
    pub shapes: BTreeSet<[usize; 2]>,
    /// Their different ranks; 0 where the module trains whole.
    pub ranks: BTreeSet<usize>,
    /// Parameters that train there.
    pub trainable: u64,
}

/// The data.
#[derive(Serialize)]
pub struct DataReport {
    /// Records read.
    pub records: usize,
    /// Training examples.
    pub train_examples: usize,
    /// Validation examples.
    pub validation_examples: usize,
    /// Tokens of the training examples.
    pub tokens: u64,
    /// Those that are learnt.
    pub supervised_tokens: u64,
    /// Training examples without an end-of-sequence token among their supervised tokens.
    pub without_eos: usize,
    /// Tokens of a record before anything is cut: percentiles.
    pub percentiles: BTreeMap<&'static str, usize>,
    /// Histogram of the same: first token count, last, records.
    pub histogram: Vec<(usize, usize, usize)>,
    /// Records longer than `sequence_len`.
    pub too_long: usize,
    /// What happens to them, by data file.
    pub on_truncation: Vec<OnTruncation>,
    /// The error with which the run would stop.
    pub error: Option<String>,
    /// Records cut, dropped, split, without anything to learn.
    pub truncated: usize,
    /// Left out as too long.
    pub dropped: usize,
    /// Made into several.
    pub split: usize,
    /// Left out as nothing is supervised.
    pub without_supervised: usize,
}

/// The course of the run.
#[derive(Serialize)]
pub struct CourseReport {
    /// Steps.
    pub steps: u64,
    /// Passes over the data.
    pub epochs: f64,
    /// Tokens over all steps.
    pub tokens: u64,
    /// The same with padding.
    pub padded_tokens: u64,
    /// Evaluations, those before the first and after the last step among them.
    pub evaluations: u64,
    /// Checkpoints saved, and kept.
    pub saves: u64,
    /// Checkpoints kept at the end.
    pub kept: u64,
    /// What packing makes of the first epoch, where the recipe packs.
    pub packing: Option<PackingReport>,
    /// The largest micro-batch.
    pub largest_batch: Option<BatchShape>,
}

/// Runs the command.
pub fn run(args: PlanArgs) -> Result<(), CliError> {
    let mut recipe = recipe::read(&args.recipe, &args.overrides)?;
    let device = device::device(&recipe.device)?;
    let compute = device::compute_type(&recipe.dtype, &device)?;
    let hub = open::hub(recipe.revision.as_deref(), args.offline);
    let base = resolve_headers(&recipe.base_model, &hub)?;
    let model = ModelConfig::from_json(base.dir(), base.config())?;
    model.require_in(&base)?;
    let method = method_plan(&recipe, &args.recipe, &model, &base)?;

    let tokenizer = Tokenizer::from_dir(base.dir())?;
    let data = Data::read(&recipe, &tokenizer)?;
    let mut config = train::train_config(&recipe, Path::new(&recipe.output_dir));
    let examples = (data.train.as_slice(), data.validation.as_slice());
    let forecast = Forecast::new(&recipe, &args.recipe, &config, &method, examples)?;
    train::settle(&mut recipe, &mut config, &forecast);

    let course = course(&config, &forecast, &data);
    let calibration = match args.calibrate {
        true => Some(measure(&args, &recipe, &config, &data, &hub, (&device, compute))?),
        false => None,
    };
    let evaluated: u64 =
        evaluation_batches(&data.validation, config.eval_batch_size).iter().map(BatchShape::tokens).sum();
    let seconds = calibration
        .map(|measured| measured.seconds(&forecast.batches, course.steps, course.evaluations, evaluated));
    let own: u64 = method.model.parameters().iter().map(|parameter| parameter.numel()).sum();
    // What is computed from parameters is none.
    let added = method
        .parameters
        .iter()
        .filter(|parameter| !matches!(parameter.role, ParameterRole::Own | ParameterRole::Computed { .. }));
    let (modules, excluded) = modules(&method);
    let report = Report {
        base: base_report(&recipe, &model, &base, compute),
        method: recipe.method.kind.name,
        modules,
        excluded,
        trainable_parameters: method.parameters.iter().filter(|p| p.trainable).map(|p| p.shape.numel()).sum(),
        parameters: own + added.map(|parameter| parameter.shape.numel()).sum::<u64>(),
        artifact_bytes: method.artifact_bytes,
        checkpoint_bytes: method.artifact_bytes + state_bytes(&method.parameters, MOMENTS)?,
        data: data.report,
        course,
        memory: forecast.memory,
        device: forecast.device,
        fits: forecast.fits,
        advice: forecast.advice,
        calibration,
        seconds,
        recipe,
    };
    if args.json {
        let json = serde_json::to_string(&report).map_err(|error| CliError::flag("--json", error))?;
        println!("{json}");
    } else {
        render::plan(&report);
    }
    Ok(())
}

fn base_report(recipe: &Recipe, model: &ModelConfig, base: &Headers, compute: ComputeType) -> BaseReport {
    let mut types = BTreeMap::new();
    for tensor in base.tensors().values() {
        *types.entry(tensor.dtype.to_string()).or_default() +=
            tensor.shape.iter().map(|length| *length as u64).product::<u64>();
    }
    BaseReport {
        name: recipe.base_model.clone(),
        architecture: model.family.architecture(),
        parameters: model.parameters().iter().map(|parameter| parameter.numel()).sum(),
        types,
        compute: match compute {
            ComputeType::F32 => "f32",
            ComputeType::Bf16 => "bf16",
        },
        download_bytes: base.missing_bytes(),
    }
}

/// Kinds of linear modules that train, and names of the kinds that do not.
fn modules(method: &MethodPlan) -> (Vec<ModuleReport>, Vec<String>) {
    let kind = |path: &str| path.rsplit('.').next().unwrap_or_default().to_string();
    let mut found: Vec<ModuleReport> = Vec::new();
    let mut excluded: Vec<String> = Vec::new();
    for ProjectionShape { path, dims, .. } in method.model.projections() {
        let here = || method.parameters.iter().filter(|parameter| parameter.module == path);
        let kind = kind(&path);
        if here().next().is_none() {
            if !excluded.contains(&kind) {
                excluded.push(kind);
            }
            continue;
        }
        let at = found.iter().position(|module| module.kind == kind).unwrap_or_else(|| {
            let (shapes, ranks) = Default::default();
            found.push(ModuleReport { kind, count: 0, shapes, ranks, trainable: 0 });
            found.len() - 1
        });
        let module = &mut found[at];
        module.count += 1;
        module.shapes.insert(dims);
        module.trainable += here().filter(|p| p.trainable).map(|p| p.shape.numel()).sum::<u64>();
        module.ranks.extend(here().filter_map(|parameter| match parameter.role {
            ParameterRole::Factor { rank, .. } | ParameterRole::Computed { rank, .. } => Some(rank),
            ParameterRole::Own => (parameter.shape.shape.len() == 2).then_some(0),
            ParameterRole::Scaling { rank, .. } => Some(rank),
            ParameterRole::Sparse { .. }
            | ParameterRole::Gain
            | ParameterRole::InputGain
            | ParameterRole::Part => None,
        }));
    }
    found.extend(norms(method));
    (found, excluded)
}

/// Norms that train, by kind.
fn norms(method: &MethodPlan) -> Vec<ModuleReport> {
    let mut found: Vec<ModuleReport> = Vec::new();
    let is_norm = |parameter: &&PlannedParameter| {
        parameter.role == ParameterRole::Own && parameter.shape.name.ends_with("norm.weight")
    };
    for parameter in method.parameters.iter().filter(is_norm) {
        let kind = parameter.module.rsplit('.').next().unwrap_or_default();
        let at = found.iter().position(|module| module.kind == kind).unwrap_or_else(|| {
            let (shapes, ranks) = Default::default();
            found.push(ModuleReport { kind: kind.to_string(), count: 0, shapes, ranks, trainable: 0 });
            found.len() - 1
        });
        let (module, features) = (&mut found[at], parameter.shape.numel());
        module.count += 1;
        module.shapes.insert([features as usize, 1]);
        module.trainable += features;
    }
    found
}

/// Examples, and what is to be said about them.
struct Data {
    train: Vec<Example>,
    validation: Vec<Example>,
    report: DataReport,
}

impl Data {
    /// Reads the recipe's data as `train` does. That records are too long stops nothing here: it is reported, and the
    /// plan goes on without them.
    fn read(recipe: &Recipe, tokenizer: &Tokenizer) -> Result<Self, CliError> {
        let options = data::recipe_options(recipe, None)?;
        let tokenised = tokenise_files(&recipe.datasets, tokenizer, &options)?;
        let mut lengths = tokenised.lengths();
        let on_truncation = tokenised.on_truncation();
        let (dataset, mut error) = collect(tokenised, recipe.sequence_len)?;
        let held_out = match recipe.eval_datasets.as_slice() {
            [] => None,
            configs => {
                let (held_out, problem) =
                    collect(tokenise_files(configs, tokenizer, &options)?, recipe.sequence_len)?;
                error = error.or(problem);
                Some(held_out)
            }
        };
        let train::Examples { train, validation, .. } = train::examples(recipe, &dataset, held_out)?;
        lengths.sort_unstable();
        let ends = |example: &&Example| {
            let mut tokens = example.ids.iter().zip(&example.supervised);
            !tokens.any(|(id, supervised)| *supervised && tokenizer.stop_ids().contains(id))
        };
        let report = DataReport {
            records: dataset.report.records,
            train_examples: train.len(),
            validation_examples: validation.len(),
            tokens: train.iter().map(|example| example.ids.len() as u64).sum(),
            supervised_tokens: train.iter().map(|example| example.supervised_tokens() as u64).sum(),
            without_eos: train.iter().filter(ends).count(),
            percentiles: percentiles(&lengths),
            histogram: histogram(&lengths),
            too_long: lengths.iter().filter(|length| **length > recipe.sequence_len).count(),
            on_truncation,
            error,
            truncated: dataset.report.truncated,
            dropped: dataset.report.dropped,
            split: dataset.report.split,
            without_supervised: dataset.report.without_supervised,
        };
        Ok(Self { train, validation, report })
    }
}

/// The data set, and the error that it would have been if records are too long.
fn collect(tokenised: Tokenised, sequence_len: usize) -> Result<(Dataset, Option<String>), CliError> {
    match tokenised.clone().collect(sequence_len, None) {
        Err(error @ DataError::TooLong { .. }) => {
            let text = error.to_string();
            // Where nothing is short enough, there is nothing to plan with.
            let rest = tokenised.collect(sequence_len, Some(OnTruncation::Drop)).map_err(|_| error)?;
            Ok((rest, Some(text)))
        }
        result => Ok((result?, None)),
    }
}

/// Of sorted `lengths`.
fn percentiles(lengths: &[usize]) -> BTreeMap<&'static str, usize> {
    let last = lengths.len().saturating_sub(1) as f64;
    let at = |share: f64| lengths.get((last * share).round() as usize).copied().unwrap_or(0);
    [("p0", 0.0), ("p25", 0.25), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p100", 1.0)]
        .map(|(name, share)| (name, at(share)))
        .into()
}

/// Up to eight bins of equal width over sorted `lengths`.
fn histogram(lengths: &[usize]) -> Vec<(usize, usize, usize)> {
    const BINS: usize = 8;
    let (Some(first), Some(last)) = (lengths.first(), lengths.last()) else {
        return Vec::new();
    };
    let width = (last - first + 1).div_ceil(BINS);
    let bin = |begin: usize| {
        let end = (begin + width - 1).min(*last);
        (begin, end, lengths.iter().filter(|length| (begin..=end).contains(*length)).count())
    };
    (*first..=*last).step_by(width).map(bin).collect()
}

fn course(config: &TrainConfig, forecast: &Forecast, data: &Data) -> CourseReport {
    let steps = forecast.steps;
    let per_epoch = forecast.epochs.steps(0);
    let before_the_end =
        |every: Option<Every>| every.map_or(0, |every| steps.saturating_sub(1) / every.steps(per_epoch));
    let validates = u64::from(!data.validation.is_empty());
    let saves = before_the_end(config.save_every) + 1;
    CourseReport {
        steps,
        epochs: forecast.epochs.at(steps.saturating_sub(1)).progress(steps),
        tokens: forecast.batches.tokens,
        padded_tokens: forecast.batches.padded_tokens,
        evaluations: validates * (u64::from(config.eval_on_start) + before_the_end(config.eval_every) + 1),
        saves,
        packing: forecast.epochs.packing_report(),
        kept: config.save_total_limit.map_or(saves, |limit| saves.min(limit.max(1) as u64)),
        largest_batch: forecast.batches.shapes.iter().copied().max_by_key(BatchShape::tokens),
    }
}

/// A few real steps, with the weights.
fn measure(
    args: &PlanArgs,
    recipe: &Recipe,
    config: &TrainConfig,
    data: &Data,
    hub: &peft_core::checkpoint::HubOptions,
    (device, compute): (&Device, ComputeType),
) -> Result<Calibration, CliError> {
    eprintln!("calibrating: loading the weights of {} for a few real steps", recipe.base_model);
    let base = open::base(&recipe.base_model, hub)?;
    let mut method = train::method(recipe, &args.recipe, &base.checkpoint, args.offline)?;
    let mut model = peft_core::model::load(&base.checkpoint, device, compute)?;
    method.prepare(&mut model, &config.preparation(&data.train, None))?;
    require_vocabulary(&model, "training data", &data.train)?;
    require_vocabulary(&model, "validation data", &data.validation)?;
    let mut optimizer = method.optimizer(&train::adamw(&recipe.optimizer));
    Ok(calibrate(&mut model, optimizer.as_mut(), config, &data.train, &data.validation))
}
