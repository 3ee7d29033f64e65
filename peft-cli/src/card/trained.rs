//! The card of what a training run made.

use super::page::{Named, code, fence, front_matter, method_rows, method_tags, table};
use crate::recipe::Recipe;
use crate::render::count;
use peft_core::data::{DataFile, Report};
use peft_core::train::{EvalMetrics, RunSummary};
use serde_json::{Map, Value};
use std::path::Path;

/// A finished run.
pub struct Trained<'a> {
    /// Its recipe.
    pub recipe: &'a Recipe,
    /// The files trained on, and what was counted in them.
    pub files: &'a [DataFile],
    /// Counts of those files.
    pub report: &'a Report,
    /// Examples trained on, and those held out.
    pub examples: (usize, usize),
    /// Parameters trained, and all.
    pub parameters: (u64, u64),
    /// Type of weights and activations.
    pub dtype: &'a str,
    /// How it ended.
    pub summary: &'a RunSummary,
}

/// The card's text.
pub fn trained(run: &Trained<'_>) -> String {
    let recipe = run.recipe;
    let base = Named::new(&recipe.base_model, recipe.revision.as_deref());
    let block = match serde_json::to_value(&recipe.method) {
        Ok(Value::Object(block)) => block,
        _ => Map::new(),
    };
    let kind = recipe.method.kind;
    let (adapter, tags) = (kind.file.is_some(), method_tags(kind.name, &block));
    let (relation, library, what) = match adapter {
        true => ("adapter", "peft", format!("{} adapter for", kind.title)),
        false => ("finetune", "transformers", "Fine-tuned".to_string()),
    };
    let mut out = front_matter(&base, relation, library, &tags);
    out.push_str(&format!("# {what} {}\n\n", code(&base.shown)));
    out.push_str(&format!("Trained with peft {}.\n\n## Results\n\n", env!("CARGO_PKG_VERSION")));
    out.push_str(&results(run));
    out.push_str("\n## How it was made\n\n");
    out.push_str(&table(&["", ""], &facts(run, &base, &block)));
    out.push_str("\n## How to use it\n\n");
    out.push_str(&if adapter { adapter_use(&base, kind.in_peft) } else { checkpoint_use() });
    out.push_str("\n## Limits\n\n");
    if adapter {
        out.push_str("- It works on the base it was trained on, and on no other model.\n");
    }
    out.push_str("- What the base cannot do or gets wrong, and its licence, carry over.\n");
    out.push_str(
        "- It was measured on the held-out data above at most, not for safety, bias or other tasks.\n",
    );
    out
}

fn results(run: &Trained<'_>) -> String {
    let Some(after) = &run.summary.after else {
        return "No data was held out: nothing was measured.\n".to_string();
    };
    let mut rows = Vec::new();
    let mut row = |name: &str, show: &dyn Fn(&EvalMetrics) -> Option<String>| {
        if let Some(value) = show(after) {
            let before = run.summary.before.as_ref().and_then(show).unwrap_or_else(|| "–".to_string());
            rows.push(vec![name.to_string(), before, value]);
        }
    };
    row("loss", &|m| Some(format!("{:.4}", m.eval_loss)));
    row("perplexity", &|m| Some(format!("{:.3}", m.eval_perplexity)));
    row("token accuracy", &|m| Some(format!("{:.1} %", m.eval_token_accuracy * 100.0)));
    row("exact match", &|m| m.eval_exact_match.map(|share| format!("{:.1} %", share * 100.0)));
    let held_out = count(run.examples.1 as u64);
    format!(
        "On {held_out} held-out examples, the base before and the result after:\n\n{}",
        table(&["", "before", "after"], &rows)
    )
}

fn facts(run: &Trained<'_>, base: &Named, block: &Map<String, Value>) -> Vec<Vec<String>> {
    let (recipe, report, summary) = (run.recipe, run.report, run.summary);
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_string(), value]);
    row("base", base.described());
    row("method", code(block.get("type").and_then(Value::as_str).unwrap_or_default()));
    for cells in method_rows(block) {
        row(&cells[0], cells[1].clone());
    }
    if let Some(start) = &recipe.adapter_name_or_path {
        row("started from", Named::new(start, None).described());
    }
    let (trained, all) = run.parameters;
    let share = 100.0 * trained as f64 / all.max(1) as f64;
    row("trained parameters", format!("{} of {} ({share:.3} %)", count(trained), count(all)));
    for file in run.files {
        let name = file.path.file_name().unwrap_or(file.path.as_os_str());
        let name = code(&Path::new(name).display().to_string());
        row("data", format!("{name}, {} records", count(file.records as u64)));
    }
    let (tokens, supervised) = (report.tokens as u64, report.supervised_tokens as u64);
    row("tokens in the data", format!("{}, of which {} supervised", count(tokens), count(supervised)));
    row(
        "examples",
        format!("{} trained on, {} held out", count(run.examples.0 as u64), count(run.examples.1 as u64)),
    );
    let steps = match summary.steps < summary.total {
        true => format!("{} of {}, stopped early", count(summary.steps), count(summary.total)),
        false => count(summary.steps),
    };
    row("steps", steps);
    if summary.exported_step != summary.steps {
        row("exported", format!("the best state, of step {}", count(summary.exported_step)));
    }
    let unit = if recipe.sample_packing { "packs" } else { "examples" };
    row(
        "batch",
        format!("{} × {} {unit} a step", recipe.gradient_accumulation_steps, recipe.micro_batch_size),
    );
    row("sequence length", count(recipe.sequence_len as u64));
    row("learning rate", format!("{:e}, {}", recipe.learning_rate, plain(&recipe.lr_scheduler)));
    row(
        "warm-up",
        match recipe.warmup_steps {
            Some(steps) => format!("{steps} steps"),
            None => format!("{} % of the steps", 100.0 * recipe.warmup_ratio),
        },
    );
    let optimizer = &recipe.optimizer;
    row(
        "optimizer",
        format!(
            "{}, betas {} and {}, eps {:e}, weight decay {}",
            code(&optimizer.kind),
            optimizer.betas.0,
            optimizer.betas.1,
            optimizer.eps,
            optimizer.weight_decay
        ),
    );
    row(
        "gradient clipping",
        recipe.max_grad_norm.map_or_else(|| "none".to_string(), |norm| norm.to_string()),
    );
    row("arithmetic", run.dtype.to_lowercase());
    row("seed", recipe.seed.to_string());
    rows
}

/// The name that the recipe has for a value.
fn plain(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(name)) => name,
        _ => String::new(),
    }
}

fn adapter_use(base: &Named, in_peft: bool) -> String {
    let python = format!(
        r#"from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {name}
tokenizer = AutoTokenizer.from_pretrained({arguments})
model = AutoModelForCausalLM.from_pretrained({arguments})
model = PeftModel.from_pretrained(model, "path/to/this/folder")"#,
        name = Value::from(base.shown.as_str()),
        arguments = base.python().replacen(&Value::from(base.shown.as_str()).to_string(), "base", 1),
    );
    let flags = base.flags();
    let shell = format!(
        "peft generate {flags} --adapter path/to/this/folder --prompt '…'\n\
         peft merge {flags} --adapter path/to/this/folder --output merged"
    );
    match in_peft {
        true => {
            format!("In Python:\n\n{}\nWith peft alone:\n\n{}", fence("python", &python), fence("sh", &shell))
        }
        false => fence("sh", &shell),
    }
}

/// How a whole checkpoint is used.
pub(super) fn checkpoint_use() -> String {
    let python = r#"from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")"#;
    let shell = "peft generate --base-model path/to/this/folder --prompt '…'";
    format!("In Python:\n\n{}\nWith peft alone:\n\n{}", fence("python", python), fence("sh", shell))
}
