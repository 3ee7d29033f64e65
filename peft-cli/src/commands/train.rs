//! `peft train`: run a recipe.

use crate::args::TrainArgs;
use crate::error::CliError;
use crate::recipe::{self, MethodBlock, OptimizerBlock, Recipe};
use crate::{device, open, render};
use peft_core::checkpoint::{Checkpoint, write_file};
use peft_core::data::{Dataset, Example, LoadOptions, load, split_validation};
use peft_core::kernels::AdamW;
use peft_core::model::ModelConfig;
use peft_core::train::{
    Fingerprint, Method, NamedOptimizer, Preparation, RunSummary, StepSettings, TrainConfig, Trainer, Warmup,
    latest_checkpoint,
};
use peft_methods::{Full, Lora};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Runs the command.
pub fn run(args: TrainArgs) -> Result<(), CliError> {
    let mut overrides = args.overrides;
    if let Some(dir) = &args.output_dir {
        overrides.push(format!("output_dir={}", Value::from(dir.display().to_string())));
    }
    let recipe = recipe::read(&args.recipe, &overrides)?;
    let wrong = |message: String| CliError::Recipe { path: args.recipe.clone(), message };
    let device = device::device(&recipe.device)?;
    let compute = device::compute_type(&recipe.dtype, &device)?;
    let output_dir = PathBuf::from(&recipe.output_dir);
    let resume = resume_from(args.resume.as_deref(), &output_dir)?;

    let hub = open::hub(recipe.revision.as_deref(), args.offline);
    let base = open::base(&recipe.base_model, &hub)?;
    ModelConfig::from_json(base.checkpoint.dir(), base.checkpoint.config())?;
    let method = method(&recipe, &base.checkpoint, args.offline).map_err(|error| match error {
        MethodError::Key(message) => wrong(format!("`method`: {message}")),
        MethodError::Cli(error) => error,
    })?;

    // Templates that write the date write the one of the run's first start, also after a resume.
    let now = resume.as_ref().and_then(|_| started_at(&output_dir)).unwrap_or_else(unix_seconds);
    let options = LoadOptions {
        sequence_len: recipe.sequence_len,
        train_on_inputs: recipe.train_on_inputs,
        on_truncation: recipe.on_truncation,
        chat_template: None,
        now: Some(now),
    };
    let dataset = load(&recipe.datasets, &base.tokenizer, &options)?;
    let (train, validation) = validation(&recipe, &dataset, &base.tokenizer, &options)?;

    let mut model = peft_core::model::load(&base.checkpoint, &device, compute)?;
    let preparation = Preparation {
        seed: recipe.seed,
        examples: &train,
        micro_batch_size: recipe.micro_batch_size,
        step: step_settings(&recipe),
    };
    method.prepare(&mut model, &preparation)?;

    std::fs::create_dir_all(&output_dir)
        .map_err(|source| CliError::Io { path: output_dir.clone(), source })?;
    let kept = if resume.is_none() { set_aside(&output_dir)? } else { None };
    if let Some(kept) = kept {
        render::warning(&format!(
            "an earlier run in {} was moved to {}",
            output_dir.display(),
            kept.display()
        ));
    }
    let base_sha256 = base.checkpoint.sha256();
    let data_sha256 = dataset.files.iter().map(|file| file.sha256.as_str()).collect::<Vec<_>>().join(" ");
    let trainable: u64 = model.parameters().iter().filter(|p| p.trainable).map(|p| p.numel() as u64).sum();
    let total: u64 = model.parameters().iter().map(|p| p.numel() as u64).sum();
    let config = train_config(&recipe, &output_dir, &base_sha256, &data_sha256);
    let trainer = Trainer {
        model: &mut model,
        method: method.as_ref(),
        optimizer: Box::new(NamedOptimizer::new(adamw(&recipe.optimizer))),
        tokenizer: &base.tokenizer,
        train: &train,
        validation: &validation,
        config,
    };
    let mut run_info = json!({
        "recipe": recipe,
        "versions": { "peft": env!("CARGO_PKG_VERSION") },
        "base": { "name": recipe.base_model, "path": base.checkpoint.dir().display().to_string(), "sha256": base_sha256 },
        "data": { "files": dataset.files, "report": dataset.report, "train_examples": train.len(), "validation_examples": validation.len() },
        "seed": recipe.seed,
        "started_at": now,
        "device": device_name(&device),
        "dtype": format!("{:?}", compute),
        "parameters": total,
        "trainable_parameters": trainable,
        "total_steps": trainer.total_steps(),
    });
    write_json(&output_dir.join("run.json"), &run_info)?;
    render::run_plan(&recipe, method.name(), &train, &validation, (trainable, total), trainer.total_steps());

    let mut progress = render::Progress::new();
    let summary = trainer.run(resume.as_deref(), &mut progress)?;
    if let Value::Object(map) = &mut run_info {
        map.insert("result".to_string(), result_json(&summary));
    }
    write_json(&output_dir.join("run.json"), &run_info)?;
    render::run_summary(&recipe, &args.recipe, &summary);
    Ok(())
}

fn unix_seconds() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// When the run in this folder was first started, by its `run.json`.
fn started_at(output_dir: &Path) -> Option<u64> {
    let bytes = std::fs::read(output_dir.join("run.json")).ok()?;
    serde_json::from_slice::<Value>(&bytes).ok()?.get("started_at")?.as_u64()
}

/// The checkpoint folder to continue from.
fn resume_from(resume: Option<&str>, output_dir: &Path) -> Result<Option<PathBuf>, CliError> {
    match resume {
        None => Ok(None),
        Some("auto") => Ok(latest_checkpoint(output_dir)),
        Some(path) if Path::new(path).is_dir() => Ok(Some(PathBuf::from(path))),
        Some(path) => {
            Err(CliError::flag("--resume", format!("`{path}` is neither auto nor a checkpoint folder")))
        }
    }
}

/// Moves the results of an earlier run out of the way of a fresh one: nothing that took time to make is deleted.
fn set_aside(output_dir: &Path) -> Result<Option<PathBuf>, CliError> {
    let results = ["checkpoints", "metrics.jsonl", "run.json", "adapter", "model"];
    let found: Vec<&str> = results.into_iter().filter(|name| output_dir.join(name).exists()).collect();
    if found.is_empty() {
        return Ok(None);
    }
    let free = (1..).map(|n| output_dir.join(format!("previous-{n}"))).find(|path| !path.exists());
    let Some(kept) = free else { return Ok(None) };
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| CliError::Io { path, source }
    };
    std::fs::create_dir(&kept).map_err(io(&kept))?;
    for name in found {
        std::fs::rename(output_dir.join(name), kept.join(name)).map_err(io(&output_dir.join(name)))?;
    }
    Ok(Some(kept))
}

enum MethodError {
    Key(String),
    Cli(CliError),
}

fn method(recipe: &Recipe, base: &Checkpoint, offline: bool) -> Result<Box<dyn Method>, MethodError> {
    match &recipe.method {
        MethodBlock::Lora(config) => {
            let start = match &recipe.adapter_name_or_path {
                Some(name) => Some(open::adapter(name, offline).map_err(MethodError::Cli)?.dir),
                None => None,
            };
            let lora = Lora::new(config.as_ref().clone(), &recipe.base_model, recipe.revision.clone(), start);
            Ok(Box::new(lora.map_err(MethodError::Key)?))
        }
        MethodBlock::Full if recipe.adapter_name_or_path.is_some() => Err(MethodError::Key(
            "full has no adapter to start from; remove adapter_name_or_path".to_string(),
        )),
        MethodBlock::Full => {
            let base = Checkpoint::open(base.dir()).map_err(|error| MethodError::Cli(error.into()))?;
            Ok(Box::new(Full { base }))
        }
    }
}

fn adamw(block: &OptimizerBlock) -> AdamW {
    AdamW {
        beta_1: block.betas.0,
        beta_2: block.betas.1,
        epsilon: block.eps,
        weight_decay: block.weight_decay,
    }
}

/// Training and validation examples.
fn validation(
    recipe: &Recipe,
    dataset: &Dataset,
    tokenizer: &peft_core::text::Tokenizer,
    options: &LoadOptions,
) -> Result<(Vec<Example>, Vec<Example>), CliError> {
    if !recipe.eval_datasets.is_empty() {
        let held_out = load(&recipe.eval_datasets, tokenizer, options)?;
        return Ok((dataset.examples.clone(), held_out.examples));
    }
    let (train, validation) = split_validation(&dataset.record_of, recipe.val_set_size, recipe.seed)?;
    let pick = |indices: Vec<usize>| indices.into_iter().map(|i| dataset.examples[i].clone()).collect();
    Ok((pick(train), pick(validation)))
}

fn step_settings(recipe: &Recipe) -> StepSettings {
    StepSettings {
        gradient_checkpointing: recipe.gradient_checkpointing,
        loss_chunk_rows: recipe.loss_chunk_rows,
    }
}

fn train_config(recipe: &Recipe, output_dir: &Path, base_sha256: &str, data_sha256: &str) -> TrainConfig {
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
        step: step_settings(recipe),
        shuffle_data: recipe.shuffle_data,
        eval_steps: recipe.eval_steps,
        eval_on_start: recipe.eval_on_start,
        eval_batch_size: recipe.eval_batch_size,
        eval_generations: recipe.eval_generations,
        save_steps: recipe.save_steps,
        save_total_limit: recipe.save_total_limit,
        logging_steps: recipe.logging_steps,
        fingerprint: fingerprint(recipe, base_sha256, data_sha256),
    }
}

/// What decides the course of a run, beside its length: a state saved under other values is another run's.
fn fingerprint(recipe: &Recipe, base_sha256: &str, data_sha256: &str) -> Fingerprint {
    let entries = [
        ("base", base_sha256.to_string()),
        ("data", data_sha256.to_string()),
        ("seed", recipe.seed.to_string()),
        ("method", json!(recipe.method).to_string()),
        ("optimizer", json!(recipe.optimizer).to_string()),
        ("learning_rate", recipe.learning_rate.to_string()),
        ("micro_batch_size", recipe.micro_batch_size.to_string()),
        ("gradient_accumulation_steps", recipe.gradient_accumulation_steps.to_string()),
        ("sequence_len", recipe.sequence_len.to_string()),
        ("train_on_inputs", recipe.train_on_inputs.to_string()),
        ("shuffle_data", recipe.shuffle_data.to_string()),
        ("val_set_size", recipe.val_set_size.to_string()),
    ];
    entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

fn device_name(device: &burn::tensor::Device) -> String {
    format!("{device:?}")
}

fn write_json(path: &Path, value: &Value) -> Result<(), CliError> {
    Ok(write_file(path, format!("{value:#}\n").as_bytes())?)
}

fn result_json(summary: &RunSummary) -> Value {
    json!({
        "steps": summary.steps,
        "before": summary.before,
        "after": summary.after,
        "seconds": summary.seconds,
        "tokens": summary.tokens,
        "peak_memory_bytes": summary.peak_memory_bytes,
        "artifact": summary.artifact.display().to_string(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_earlier_run_is_kept() {
        let dir = std::env::temp_dir().join(format!("peft-set-aside-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("checkpoints")).unwrap();
        std::fs::write(dir.join("metrics.jsonl"), "{}").unwrap();
        let kept = set_aside(&dir).unwrap().unwrap();
        assert!(kept.join("checkpoints").is_dir() && kept.join("metrics.jsonl").is_file());
        assert!(set_aside(&dir).unwrap().is_none());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
