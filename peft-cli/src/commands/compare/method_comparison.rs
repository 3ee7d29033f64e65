//! A run's results in the form of PEFT's own method comparison (`method_comparison/` of its repository), so that its
//! tools read ours beside theirs.
//!
//! What has no equal here is null: PEFT's prompt template, its measure of forgetting, the versions of Python packages.
//! Its accuracy is the share of exact answers. `train_time` is the time in steps, and memory is the process's on a CPU.

use super::plan::Wanted;
use super::results::{Outcome, file_bytes};
use crate::error::CliError;
use crate::report::{Line, Run};
use crate::utc;
use serde_json::{Value, json};

/// The results of a run that was started.
///
/// # Errors
/// Failures to read its files.
pub fn results(wanted: &Wanted, outcome: &Outcome) -> Result<Value, CliError> {
    let dir = wanted.dir();
    // The base's own configuration lies in the result of full fine-tuning; it is no adapter's.
    let adapter = std::fs::read(dir.join("adapter/adapter_config.json")).unwrap_or_default();
    let adapter: Value = serde_json::from_slice(&adapter).unwrap_or_default();
    Ok(of(wanted, outcome, &Run::read(&dir)?, adapter, file_bytes(&dir)))
}

fn of(wanted: &Wanted, outcome: &Outcome, run: &Run, peft_config: Value, file_size: u64) -> Value {
    let (status, error) = match outcome {
        Outcome::Measured(_) => ("success", ""),
        Outcome::Failed(reason) => ("failed", reason.as_str()),
        Outcome::Missing => ("canceled", "not run to its end"),
    };
    let held: Vec<f64> = run.steps.iter().filter_map(|line| line.peak_memory_bytes).collect();
    let peak = held.iter().copied().fold(0.0, f64::max) as u64;
    let seconds: f64 = run.steps.iter().filter_map(seconds).sum();
    let package = format!("{} (in Rust)", env!("CARGO_PKG_VERSION"));
    let files =
        ["/data/files", "/data/eval_files"].into_iter().filter_map(|list| run.get(list).as_array()).flatten();
    let data: serde_json::Map<String, Value> = files
        .map(|file| {
            let name = file["path"].as_str().unwrap_or_default().to_string();
            (name, json!({"sha": file["sha256"], "created_at": null}))
        })
        .collect();
    json!({
        "run_info": {
            "created_at": utc::iso(run.get("/started_at").as_u64().unwrap_or(0)),
            "total_time": run.get("/total_seconds"),
            "experiment_name": format!("{}/{}", wanted.recipe.method.kind.name, wanted.name),
            "peft_branch": null,
            "train_config": train_config(wanted, run),
            "peft_config": peft_config,
            "error_msg": error,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": mean(&held).map(|mean| mean as u64),
            "accelerator_memory_max": run.get("/result/peak_memory_bytes").as_u64().unwrap_or(0).max(peak),
            "accelerator_memory_reserved_99th": percentile(&held, 0.99).map(|bytes| bytes as u64),
            "train_time": seconds,
            "file_size": file_size,
            "num_trainable_params": run.get("/trainable_parameters"),
            "num_total_params": run.get("/parameters"),
            "status": status,
            "metrics": metrics(wanted, run),
        },
        "meta_info": {
            "model_info": {"sha": run.get("/base/sha256"), "created_at": null},
            "dataset_info": data,
            "package_info": {
                "peft-version": package, "peft-commit-hash": null,
                "transformers-version": null, "transformers-commit-hash": null,
                "datasets-version": null, "datasets-commit-hash": null,
                "bitsandbytes-version": null, "bitsandbytes-commit-hash": null,
                "torch-version": null, "torch-commit-hash": null,
            },
            "system_info": {
                "system": std::env::consts::OS, "release": null, "version": null,
                "machine": std::env::consts::ARCH, "processor": null, "accelerator": run.get("/device"),
            },
            "pytorch_info": "",
        },
    })
}

/// The keys of PEFT's training configuration.
fn train_config(wanted: &Wanted, run: &Run) -> Value {
    let recipe = &wanted.recipe;
    let dtype = match run.get("/dtype").as_str() {
        Some("Bf16") => "bfloat16",
        _ => "float32",
    };
    let chosen = run.get("/recipe/gradient_checkpointing");
    let recomputes = *chosen != json!(false) && *chosen != Value::Null;
    let optimizer = &recipe.optimizer;
    json!({
        "model_id": recipe.base_model,
        "dtype": dtype,
        "max_seq_length": recipe.sequence_len,
        "batch_size": recipe.micro_batch_size * recipe.gradient_accumulation_steps,
        "batch_size_eval": recipe.eval_batch_size,
        "max_steps": run.get("/total_steps"),
        "eval_steps": recipe.eval_steps,
        "compile": false,
        "use_gc": recomputes,
        "query_template": null,
        "seed": recipe.seed,
        "grad_norm_clip": recipe.max_grad_norm.unwrap_or(0.0),
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {
            "lr": recipe.learning_rate, "weight_decay": optimizer.weight_decay,
            "betas": [optimizer.betas.0, optimizer.betas.1], "eps": optimizer.eps,
        },
        "lr_scheduler": recipe.lr_scheduler,
        "use_amp": false,
        "autocast_adapter_dtype": true,
        "generation_kwargs": {"do_sample": false},
        "attn_implementation": null,
        "init_kv_cache_prefix": null,
    })
}

/// One entry for the steps before each evaluation, and one for the test at the end.
fn metrics(wanted: &Wanted, run: &Run) -> Vec<Value> {
    let batch = (wanted.recipe.micro_batch_size * wanted.recipe.gradient_accumulation_steps) as u64;
    let (mut entries, mut begun, mut elapsed) = (Vec::new(), 0, 0.0);
    let mut last_loss = None;
    for evaluation in run.evaluations.iter().filter(|line| line.step > 0) {
        let lines: Vec<&Line> =
            run.steps.iter().filter(|line| line.step > begun && line.step <= evaluation.step).collect();
        let took: f64 = lines.iter().filter_map(|line| seconds(line)).sum();
        let tokens: f64 = lines.iter().filter_map(|line| line.tokens).sum();
        let of = |value: fn(&Line) -> Option<f64>| {
            mean(&lines.iter().filter_map(|line| value(line)).collect::<Vec<_>>())
        };
        elapsed += took;
        last_loss = of(|line| line.loss).or(last_loss);
        entries.push(json!({
            "step": evaluation.step,
            "valid accuracy": evaluation.eval_exact_match,
            "valid loss": evaluation.eval_loss,
            "valid token accuracy": evaluation.eval_token_accuracy,
            "train loss": last_loss,
            "train samples": evaluation.step * batch,
            "train time": took,
            "tokens / sec": tokens / took,
            "mem reserved avg": of(|line| line.peak_memory_bytes),
            "elapsed time": elapsed,
        }));
        begun = evaluation.step;
    }
    if !run.get("/result").is_null() {
        let after = |key: &str| run.get(&format!("/result/after/{key}"));
        let tokens: f64 = run.steps.iter().filter_map(|line| line.tokens).sum();
        entries.push(json!({
            "step": run.last_step(),
            "test accuracy": after("eval_exact_match"),
            "test loss": after("eval_loss"),
            "test token accuracy": after("eval_token_accuracy"),
            "train loss": last_loss,
            "train samples": run.last_step() * batch,
            "train total tokens": tokens as u64,
            "forgetting": null,
        }));
    }
    entries
}

/// What a logged step took.
fn seconds(line: &Line) -> Option<f64> {
    Some(line.tokens? / line.tokens_per_second?)
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The value below which the share `q` of all lies, between neighbours by their distance, as numpy has it.
fn percentile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = q * sorted.len().checked_sub(1)? as f64;
    let low = sorted[place.floor() as usize];
    let high = sorted[place.ceil() as usize];
    Some(low + (high - low) * place.fract())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn percentiles_are_numpys() {
        let values: Vec<f64> = (0..11).rev().map(f64::from).collect();
        // numpy.percentile(range(11), 99) is 9.9.
        assert!((percentile(&values, 0.99).unwrap() - 9.9).abs() < 1e-12);
        assert_eq!(percentile(&[3.0], 0.99), Some(3.0));
        assert_eq!((percentile(&[], 0.99), mean(&[])), (None, None));
    }
}
