//! The card of a checkpoint that an adapter was folded into.

use super::page::{Named, front_matter, method_rows, method_tags, table};
use super::trained::checkpoint_use;
use crate::card::page::code;
use peft_core::adapter::FoldReport;
use peft_core::checkpoint::Dtype;
use peft_methods::METHODS;
use serde_json::{Map, Value};

/// Keys of an adapter's configuration that say nothing of the method.
const OF_THE_FILE: [&str; 8] = [
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
];

/// The card's text. `base` and `adapter` are as the command line names them.
pub fn merged(
    (base, revision): (&str, Option<&str>),
    (adapter, config): (&str, &Map<String, Value>),
    dtype: Option<Dtype>,
    report: &FoldReport,
) -> String {
    let (base, adapter) = (Named::new(base, revision), Named::new(adapter, None));
    let mut block = config.clone();
    block.retain(|key, _| !OF_THE_FILE.contains(&key.as_str()));
    let peft_type = config.get("peft_type").and_then(Value::as_str);
    let kind = METHODS.iter().find(|kind| kind.file.is_some_and(|file| Some(file.peft_type) == peft_type));
    let (name, title) = kind.map_or(("adapter", "an adapter"), |kind| (kind.name, kind.title));
    let mut tags = method_tags(name, &block);
    tags.push("merge");
    let mut out = front_matter(&base, "merge", "transformers", &tags);
    out.push_str(&format!("# {} with {title} folded in\n\n", code(&base.shown)));
    out.push_str(&format!("An ordinary checkpoint, made with `peft merge` {}.\n", env!("CARGO_PKG_VERSION")));
    out.push_str("\n## How it was made\n\n");
    let row = |name: &str, value: String| vec![name.to_string(), value];
    let mut rows = vec![row("base", base.described()), row("adapter", adapter.described())];
    rows.extend(method_rows(&block));
    rows.push(row("weights folded", report.folded.to_string()));
    rows.push(row("tensors replaced whole", report.replaced.to_string()));
    let dtype = dtype.map_or_else(|| "each as in the base".to_string(), |dtype| dtype.to_string());
    rows.push(row("type of the weights", dtype));
    out.push_str(&table(&["", ""], &rows));
    out.push_str("\n## How to use it\n\n");
    out.push_str(&checkpoint_use());
    out.push_str("\n## Limits\n\n");
    out.push_str(
        "- The sum of base and change is computed in f32 and rounded once to the type of the weights.\n",
    );
    out.push_str("- What base and adapter cannot do or get wrong, and their licences, carry over.\n");
    out.push_str("- The fold measured nothing: results, where there are any, are on the adapter's card.\n");
    out
}
