//! `peft train`: run a recipe.

mod folder;
pub(super) mod identity;
pub(super) mod signals;

use super::data;
use crate::args::TrainArgs;
use crate::error::CliError;
use crate::forecast::{Forecast, method_plan};
use crate::observers::Observers;
use crate::recipe::{self, Checkpointing, OptimizerBlock, Recipe};
use crate::{card, device, open, render, report, yaml};
use folder::{OutputFolder, resume_from, started_at};
use identity::Inputs;
use peft_core::checkpoint::{Checkpoint, Headers, write_file};
use peft_core::data::{DataFile, Dataset, Example, load, split_validation};
use peft_core::kernels::AdamW;
use peft_core::model::{ModelConfig, ties_embeddings};
use peft_core::text::Tokenizer;
use peft_core::train::{
    Identity, Method, Outcome, RunSummary, StepSettings, TrainConfig, Trainer, Warmup, saved_identity,
};
use peft_methods::RunContext;
use serde_json::{Value, json};
use signals::StopSignal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Runs the command. A run that a signal stopped is no error, but its exit code says so.
pub fn run(args: TrainArgs) -> Result<ExitCode, CliError> {
    let begun = Instant::now();
    let mut overrides = args.overrides;
    if let Some(dir) = &args.output_dir {
        overrides.push(format!("output_dir={}", Value::from(dir.display().to_string())));
    }
    let mut recipe = recipe::read(&args.recipe, &overrides)?;
    let device = device::device(&recipe.device)?;
    let compute = device::compute_type(&recipe.dtype, &device)?;
    let output_dir = PathBuf::from(&recipe.output_dir);
    if output_dir.exists() && !output_dir.is_dir() {
        let message = format!("`output_dir` {} is not a folder", output_dir.display());
        return Err(CliError::Recipe { path: args.recipe, message });
    }
    let resume = resume_from(args.resume.as_deref(), &output_dir)?;
    if let Some(checkpoint) =
        resume.as_deref().filter(|_| recipe.gradient_checkpointing == Checkpointing::Auto)
    {
        recipe.gradient_checkpointing = identity::checkpointing(&saved_identity(checkpoint)?);
    }

    let hub = open::hub(recipe.revision.as_deref(), args.offline);
    let base = open::base(&recipe.base_model, &hub)?;
    ModelConfig::from_json(base.checkpoint.dir(), base.checkpoint.config())?;
    let mut method = method(&recipe, &args.recipe, &base.checkpoint, args.offline)?;

    // Templates that write the date write the one of the run's first start, also after a resume.
    let now = args.resume.as_ref().and_then(|_| started_at(&output_dir)).unwrap_or_else(unix_seconds);
    let (dataset, held_out) = datasets(&recipe, &base.tokenizer, now)?;
    let Examples { train, validation, eval_files } = examples(&recipe, &dataset, held_out)?;

    let mut config = train_config(&recipe, &output_dir);
    let forecast = forecast(&recipe, &args.recipe, &config, &base.checkpoint, (&train, &validation))?;
    settle(&mut recipe, &mut config, &forecast);
    if let Some(warning) = forecast.warning() {
        if args.require_fit {
            return Err(CliError::DoesNotFit(warning));
        }
        render::warning(&warning);
    }

    let mut model = peft_core::model::load(&base.checkpoint, &device, compute)?;
    method.prepare(&mut model, &config.preparation(&train, resume.as_deref()))?;
    method.warnings().iter().for_each(|warning| render::warning(warning));

    let base_sha256 = base.checkpoint.sha256();
    let trainable: u64 = model.parameters().iter().filter(|p| p.trainable).map(|p| p.numel() as u64).sum();
    let total: u64 = model.parameters().iter().map(|p| p.numel() as u64).sum();
    let artifact = method.artifact();
    let optimizer = method.optimizer(&adamw(&recipe.optimizer));
    let stop = StopSignal::listen()?;
    let mut trainer = Trainer {
        model: &mut model,
        method: method.as_mut(),
        optimizer,
        tokenizer: &base.tokenizer,
        train: &train,
        validation: &validation,
        config,
        stop: stop.requested(),
    };
    trainer.config.identity = identity::identity(
        &recipe,
        trainer.config.warmup,
        &Inputs {
            base_sha256: &base_sha256,
            files: &dataset.files,
            eval_files: &eval_files,
            train: &train,
            validation: &validation,
            device: device_kind(&device),
            dtype: &format!("{compute:?}"),
            total_steps: trainer.total_steps(),
        },
    );
    if let Some(checkpoint) = &resume {
        trainer.require_own(checkpoint)?;
    }
    let folder = OutputFolder::open(&output_dir)?;
    let kept = match &resume {
        Some(checkpoint) => folder.prepare_for(checkpoint)?,
        None => folder.prepare_fresh(args.resume.is_some())?,
    };
    if let Some(kept) = kept {
        render::warning(&format!(
            "earlier results in {} were moved to {}",
            output_dir.display(),
            kept.display()
        ));
    }
    let total_steps = trainer.total_steps();
    let packing = trainer.epochs().packing_report();
    let mut run_info = json!({
        "recipe": recipe,
        "versions": { "peft": env!("CARGO_PKG_VERSION") },
        "base": { "name": recipe.base_model, "path": base.checkpoint.dir().display().to_string(), "sha256": base_sha256 },
        "data": { "files": dataset.files, "eval_files": eval_files, "report": dataset.report, "train_examples": train.len(), "validation_examples": validation.len() },
        "seed": recipe.seed,
        "started_at": now,
        "device": device_name(&device),
        "dtype": format!("{:?}", compute),
        "parameters": total,
        "trainable_parameters": trainable,
        "packing": packing,
        "total_steps": total_steps,
        "plan": { "memory": forecast.memory },
    });
    folder.write_json("run.json", &run_info)?;
    write_file(&output_dir.join("recipe.yaml"), yaml::recipe(&json!(recipe)).as_bytes())?;
    render::run_plan(&recipe, &forecast, &train, &validation, (trainable, total), packing);

    let users_card = card::users(&output_dir.join(artifact), base.checkpoint.dir());
    let every = recipe.report_to.tensorboard().then_some(recipe.logging_steps);
    let mut observers = Observers::new(&output_dir, every);
    let outcome = trainer.run(resume.as_deref(), &mut observers);
    if !matches!(outcome, Ok(Outcome::Finished(_))) {
        // What was measured up to there can be looked at; the failure itself is what is told.
        let _ = report::write(&output_dir);
    }
    let summary = match outcome? {
        Outcome::Finished(summary) => summary,
        Outcome::Stopped(stopped) => {
            observers.progress.clear();
            render::run_stopped(stop.name(), &stopped);
            return Ok(ExitCode::from(stop.exit_code()));
        }
    };
    if let Value::Object(map) = &mut run_info {
        map.insert("result".to_string(), result_json(&summary));
        map.insert("total_seconds".to_string(), begun.elapsed().as_secs_f64().into());
        map.insert("ended_at".to_string(), since_1970().as_secs_f64().into());
    }
    folder.write_json("run.json", &run_info)?;
    let card = users_card.unwrap_or_else(|| {
        let run = card::Trained {
            recipe: &recipe,
            files: &dataset.files,
            report: &dataset.report,
            examples: (train.len(), validation.len()),
            parameters: (trainable, total),
            dtype: &format!("{compute:?}"),
            summary: &summary,
        };
        card::trained(&run).into_bytes()
    });
    card::write(&summary.artifact, &card)?;
    report::write(&output_dir)?;
    render::run_summary(&recipe, &args.recipe, &summary);
    Ok(ExitCode::SUCCESS)
}

/// The training data, and validation data of its own where the recipe names any. `now` is what templates that write the
/// date are told, in seconds since 1970.
pub(super) fn datasets(
    recipe: &Recipe,
    tokenizer: &Tokenizer,
    now: u64,
) -> Result<(Dataset, Option<Dataset>), CliError> {
    let options = data::recipe_options(recipe, Some(now))?;
    let dataset = load(&recipe.datasets, tokenizer, &options)?;
    let held_out = match recipe.eval_datasets.as_slice() {
        [] => None,
        configs => Some(load(configs, tokenizer, &options)?),
    };
    Ok((dataset, held_out))
}

/// The time, in seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    since_1970().as_secs()
}

fn since_1970() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

/// The recipe's method, ready to prepare a model.
pub(super) fn method(
    recipe: &Recipe,
    path: &Path,
    base: &Checkpoint,
    offline: bool,
) -> Result<Box<dyn Method>, CliError> {
    let block = &recipe.method.block;
    let start = recipe.adapter_name_or_path.as_deref();
    block.check(start.is_some()).map_err(|message| CliError::method(path, &message))?;
    let start = start.map(|name| open::adapter(name, offline)).transpose()?;
    let run = RunContext {
        base,
        base_name: &recipe.base_model,
        revision: recipe.revision.as_deref(),
        start: start.as_ref().map(|adapter| adapter.folder().dir.as_path()),
    };
    Ok(block.method(&run)?)
}

/// What the run will need, once the base is known to have the shapes that its configuration says.
fn forecast(
    recipe: &Recipe,
    path: &Path,
    config: &TrainConfig,
    base: &Checkpoint,
    examples: (&[Example], &[Example]),
) -> Result<Forecast, CliError> {
    let mut model = ModelConfig::from_json(base.dir(), base.config())?;
    model.tie_word_embeddings = ties_embeddings(base)?;
    let headers = Headers::of(base)?;
    model.require_in(&headers)?;
    Forecast::new(recipe, path, config, &method_plan(recipe, path, &model, &headers)?, examples)
}

pub(super) fn adamw(block: &OptimizerBlock) -> AdamW {
    AdamW {
        beta_1: block.betas.0,
        beta_2: block.betas.1,
        epsilon: block.eps,
        weight_decay: block.weight_decay,
    }
}

/// What is trained on and what is measured on.
pub(super) struct Examples {
    pub(super) train: Vec<Example>,
    pub(super) validation: Vec<Example>,
    /// Files of the validation examples, where those do not come from the training files.
    pub(super) eval_files: Vec<DataFile>,
}

/// The validation examples are `held_out` if there is such data, else a part of the data set.
pub(super) fn examples(
    recipe: &Recipe,
    dataset: &Dataset,
    held_out: Option<Dataset>,
) -> Result<Examples, CliError> {
    if let Some(held_out) = held_out {
        return Ok(Examples {
            train: dataset.examples.clone(),
            validation: held_out.examples,
            eval_files: held_out.files,
        });
    }
    let (train, validation) = split_validation(&dataset.record_of, recipe.val_set_size, recipe.seed)?;
    let pick = |indices: Vec<usize>| indices.into_iter().map(|i| dataset.examples[i].clone()).collect();
    Ok(Examples { train: pick(train), validation: pick(validation), eval_files: Vec::new() })
}

/// Writes into recipe and configuration what the forecast chose, so that all that is told, compared and kept of the run
/// names it.
pub(super) fn settle(recipe: &mut Recipe, config: &mut TrainConfig, forecast: &Forecast) {
    recipe.gradient_checkpointing = Checkpointing::Mode(forecast.checkpointing);
    config.step.gradient_checkpointing = forecast.checkpointing;
}

pub(super) fn train_config(recipe: &Recipe, output_dir: &Path) -> TrainConfig {
    TrainConfig {
        output_dir: output_dir.to_path_buf(),
        seed: recipe.seed,
        micro_batch_size: recipe.micro_batch_size,
        gradient_accumulation_steps: recipe.gradient_accumulation_steps,
        num_epochs: recipe.num_epochs,
        max_steps: recipe.max_steps,
        learning_rate: recipe.learning_rate,
        schedule: recipe.lr_scheduler,
        warmup: recipe.warmup_steps.map_or(Warmup::Ratio(recipe.warmup_ratio), Warmup::Steps),
        max_grad_norm: recipe.max_grad_norm,
        step: StepSettings {
            gradient_checkpointing: recipe.gradient_checkpointing.mode(),
            loss_chunk_rows: recipe.loss_chunk_rows,
        },
        shuffle_data: recipe.shuffle_data,
        pack_tokens: recipe.sample_packing.then_some(recipe.sequence_len),
        eval_every: recipe.eval_every(),
        eval_on_start: recipe.eval_on_start,
        eval_batch_size: recipe.eval_batch_size,
        eval_generations: recipe.eval_generations,
        save_every: recipe.save_every(),
        save_total_limit: recipe.save_total_limit,
        selection: recipe.selection(),
        logging_steps: recipe.logging_steps,
        identity: Identity::default(),
    }
}

fn device_name(device: &burn::tensor::Device) -> String {
    format!("{device:?}")
}

/// The kind of device, whatever its number.
pub(super) fn device_kind(device: &burn::tensor::Device) -> &'static str {
    if *device == burn::tensor::Device::flex() { "cpu" } else { "cuda" }
}

fn result_json(summary: &RunSummary) -> Value {
    json!({
        "steps": summary.steps,
        "stopped_early": summary.steps < summary.total,
        "exported_step": summary.exported_step,
        "best": summary.best,
        "before": summary.before,
        "after": summary.after,
        "seconds": summary.seconds,
        "tokens": summary.tokens,
        "peak_memory_bytes": summary.peak_memory_bytes,
        "artifact": summary.artifact.display().to_string(),
    })
}
