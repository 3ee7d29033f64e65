//! What is said before and after a run.

use super::{bytes, command_with, count, program, table, warning};
use crate::forecast::Forecast;
use crate::recipe::Recipe;
use peft_core::data::{Example, PackingReport};
use peft_core::train::{EvalMetrics, RunSummary, Stopped};
use std::path::Path;

/// What is about to run, on stderr. `parameters` are those that train, and all.
pub fn run_plan(
    recipe: &Recipe,
    forecast: &Forecast,
    train: &[Example],
    validation: &[Example],
    (trainable, total): (u64, u64),
    packing: Option<PackingReport>,
) {
    let tokens: u64 = train.iter().map(|example| example.ids.len() as u64).sum();
    let supervised: u64 = train.iter().map(|example| example.supervised_tokens() as u64).sum();
    let mut rows = vec![
        vec!["base".to_string(), recipe.base_model.clone()],
        vec!["method".to_string(), recipe.method.kind.name.to_string()],
        vec![
            "trainable".to_string(),
            format!(
                "{} of {} parameters ({:.3} %)",
                count(trainable),
                count(total),
                100.0 * trainable as f64 / total as f64
            ),
        ],
        vec![
            "data".to_string(),
            format!(
                "{} examples, {} tokens, {:.1} % supervised",
                count(train.len() as u64),
                count(tokens),
                100.0 * supervised as f64 / tokens.max(1) as f64
            ),
        ],
        vec!["validation".to_string(), format!("{} examples", count(validation.len() as u64))],
        vec![
            "steps".to_string(),
            format!(
                "{} of {} × {} {}",
                count(forecast.steps),
                recipe.gradient_accumulation_steps,
                recipe.micro_batch_size,
                if packing.is_some() { "packs" } else { "examples" }
            ),
        ],
        vec![
            "memory".to_string(),
            format!(
                "predicted peak {} in {} · gradient_checkpointing {}",
                bytes(forecast.memory.peak_bytes),
                forecast.memory.peak_phase,
                recipe.gradient_checkpointing
            ),
        ],
        vec!["output".to_string(), recipe.output_dir.clone()],
    ];
    if let Some(packing) = packing {
        let shares = format!(
            "{} packs of {} tokens, {:.1} % full, {:.1} examples each",
            count(packing.packs as u64),
            count(recipe.sequence_len as u64),
            100.0 * packing.fill,
            train.len() as f64 / packing.packs.max(1) as f64
        );
        rows.insert(4, vec!["packing".to_string(), shares]);
    }
    for row in rows {
        eprintln!("  {:<11} {}", row[0], row[1]);
    }
    eprintln!();
    if let Some(message) = packing.and_then(|packing| poor_packing(packing, train.len(), recipe.sequence_len))
    {
        warning(&message);
    }
}

/// Why packing does little good, if so.
fn poor_packing(packing: PackingReport, examples: usize, sequence_len: usize) -> Option<String> {
    if packing.packs == examples {
        Some(format!(
            "sample_packing joins no examples at sequence_len {sequence_len}; raise it, or leave packing out, which lays examples of similar length side by side"
        ))
    } else if packing.fill < 0.5 {
        let percent = 100.0 * packing.fill;
        Some(format!(
            "packs are {percent:.0} % full: the data is too small for sequence_len {sequence_len}; a lower one gives more packs and steps"
        ))
    } else {
        None
    }
}

/// What a stopped run has saved and how it goes on, on stderr.
pub fn run_stopped(signal: &str, stopped: &Stopped) {
    let Stopped { step, total, micro_batches, of, checkpoint } = stopped;
    let within = match micro_batches {
        0 => String::new(),
        done => format!(", with {done} of {of} micro-batches of the next step"),
    };
    eprintln!("stopped by {signal} after step {step} of {total}{within}");
    eprintln!("saved {}; nothing is lost", checkpoint.display());
    eprintln!("to go on:\n  {}", command_with("--resume", "auto"));
}

/// How a run ended, on stdout: held-out numbers before and after, speed, and the commands to try next.
pub fn run_summary(recipe: &Recipe, recipe_path: &Path, summary: &RunSummary) {
    println!();
    if let Some(after) = &summary.after {
        let mut rows = vec![vec!["held-out".to_string(), "before".to_string(), "after".to_string()]];
        let mut row = |name: &str, show: &dyn Fn(&EvalMetrics) -> Option<String>| {
            if let Some(value) = show(after) {
                let before = summary.before.as_ref().and_then(show).unwrap_or_else(|| "–".to_string());
                rows.push(vec![name.to_string(), before, value]);
            }
        };
        row("loss", &|m| Some(format!("{:.4}", m.eval_loss)));
        row("perplexity", &|m| Some(format!("{:.3}", m.eval_perplexity)));
        row("token accuracy", &|m| Some(format!("{:.1} %", m.eval_token_accuracy * 100.0)));
        row("exact match", &|m| m.eval_exact_match.map(|share| format!("{:.1} %", share * 100.0)));
        println!("{}", table(&rows));
    }
    let rate = summary.tokens as f64 / summary.seconds.max(1e-9);
    let peak =
        summary.peak_memory_bytes.map_or_else(String::new, |peak| format!(", peak memory {}", bytes(peak)));
    println!("{} steps, {:.1} s in steps, {rate:.0} tokens/s{peak}", summary.steps, summary.seconds);
    if let Some((best, selection)) = summary.best.as_ref().zip(recipe.selection()) {
        let (metric, value) = (selection.metric.name(), selection.metric.value(best));
        println!("best {metric} {value:.4} at step {}; exported: step {}", best.step, summary.exported_step);
    }
    if summary.steps < summary.total {
        println!(
            "stopped early, after {} of {} steps: no gain for as long as asked",
            summary.steps, summary.total
        );
    }
    println!("{}", summary.artifact.display());
    println!("{}/report.html", recipe.output_dir);

    let artifact = summary.artifact.display();
    let peft = program();
    println!("\nnext:");
    match recipe.method.kind.file {
        Some(_) => {
            let base = &recipe.base_model;
            println!("  {peft} generate --base-model {base} --adapter {artifact} --prompt '…'");
            println!(
                "  {peft} merge    --base-model {base} --adapter {artifact} --output {}/merged",
                recipe.output_dir
            );
        }
        None => println!("  {peft} generate --base-model {artifact} --prompt '…'"),
    }
    println!("  {peft} train    {} --override learning_rate=… --output-dir …", recipe_path.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poor_packing_is_told() {
        let told = |packs, fill, examples| poor_packing(PackingReport { packs, fill }, examples, 64);
        assert_eq!(told(10, 0.9, 40), None);
        assert!(told(10, 0.9, 10).is_some_and(|message| message.contains("joins no examples")));
        assert!(told(1, 0.3, 5).is_some_and(|message| message.contains("30 % full")));
    }
}
