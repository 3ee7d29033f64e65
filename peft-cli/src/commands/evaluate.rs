//! `peft evaluate`: what a model makes of a data file.

use super::data;
use crate::args::EvaluateArgs;
use crate::error::CliError;
use crate::{device, open, render};
use peft_core::data::load;
use peft_core::train::{evaluate, exact_match, require_vocabulary};
use serde_json::{Map, Value, json};

/// Runs the command.
pub fn run(args: EvaluateArgs) -> Result<(), CliError> {
    let device = device::device(&args.model.device)?;
    let compute = device::compute_type(&args.model.dtype, &device)?;
    let hub = open::hub(args.model.revision.as_deref(), args.model.offline);
    let base = open::base(&args.model.base_model, &hub)?;
    let dataset =
        load(&[data::config(&args.data, &args.format)?], &base.tokenizer, &data::options(&args.format)?)?;
    let model = open::model(&base, args.model.adapter.as_deref(), args.model.offline, &device, compute)?;
    require_vocabulary(&model, "the data", &dataset.examples)?;

    let evaluation =
        device::watched(&device, || Ok(evaluate(&model, &dataset.examples, args.batch_size, None, || true)))?;
    let mut result: Map<String, Value> = [
        ("loss", json!(evaluation.loss)),
        ("perplexity", json!(evaluation.perplexity)),
        ("token_accuracy", json!(evaluation.token_accuracy)),
        ("supervised_tokens", json!(evaluation.supervised_tokens)),
        ("examples", json!(dataset.examples.len())),
    ]
    .map(|(key, value)| (key.to_string(), value))
    .into_iter()
    .collect();
    let mut shown = Vec::new();
    if args.exact_match > 0 {
        let count = args.exact_match.min(dataset.examples.len());
        let examples = &dataset.examples[..count];
        shown = device::watched(&device, || {
            Ok(exact_match(&model, &base.tokenizer, examples, args.batch_size, || true)?)
        })?;
        let matched = shown.iter().filter(|generation| generation.matched).count();
        result.insert("exact_match".to_string(), json!(matched as f64 / shown.len().max(1) as f64));
        result.insert("generations".to_string(), json!(shown.len()));
    }
    if args.json {
        println!("{}", Value::Object(result));
        return Ok(());
    }
    let mut rows = vec![
        vec!["loss".to_string(), format!("{:.4} nats a token", evaluation.loss)],
        vec!["perplexity".to_string(), format!("{:.4}", evaluation.perplexity)],
        vec!["token accuracy".to_string(), format!("{:.2} %", evaluation.token_accuracy * 100.0)],
        vec!["supervised tokens".to_string(), render::count(evaluation.supervised_tokens)],
        vec!["examples".to_string(), render::count(dataset.examples.len() as u64)],
    ];
    if let Some(share) = result.get("exact_match").and_then(Value::as_f64) {
        rows.push(vec!["exact match".to_string(), format!("{:.1} % of {}", share * 100.0, shown.len())]);
    }
    print!("{}", render::table(&rows));
    for generation in shown.iter().take(3) {
        println!(
            "\n  expected   {}\n  generated  {}",
            generation.reference.trim(),
            generation.generated.trim()
        );
    }
    Ok(())
}
