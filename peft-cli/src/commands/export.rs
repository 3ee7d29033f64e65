//! `peft export`: an adapter in another form.

use crate::args::{ExportArgs, ExportFormat};
use crate::error::CliError;
use crate::{open, render, yaml};
use peft_core::adapter::{SavedAdapter, write_plain_lora};
use peft_core::checkpoint::{StagedDir, resolve_headers};
use peft_core::model::ModelConfig;
use peft_methods::{ShiraReport, SparseAdapter, export_shira};
use serde_json::{Value, json};
use std::path::Path;

/// Runs the command.
pub fn run(args: ExportArgs) -> Result<(), CliError> {
    let adapter = open::adapter(args.source(), args.offline)?;
    match args.format {
        ExportFormat::PeftLora => peft_lora(&args, adapter.as_ref()),
        ExportFormat::PeftShira => peft_shira(&args, &adapter.folder().dir),
    }
}

/// A sparse adapter as a SHiRA.
fn peft_shira(args: &ExportArgs, dir: &Path) -> Result<(), CliError> {
    let adapter = SparseAdapter::open(dir)?;
    let staged = StagedDir::new(&args.output)?;
    let ShiraReport { r, values, padding } = export_shira(&adapter, staged.path())?;
    staged.commit()?;
    if args.json {
        let output = args.output.display().to_string();
        let report =
            json!({"output": output, "format": "peft-shira", "r": r, "values": values, "padding": padding});
        println!("{report}");
        return Ok(());
    }
    let rows = vec![
        vec!["format".to_string(), "SHiRA, exact".to_string()],
        vec!["r".to_string(), r.to_string()],
        vec!["values".to_string(), render::count(values as u64)],
        vec!["zeros added to fill r·(out + in) a module".to_string(), render::count(padding as u64)],
    ];
    print!("{}", render::table(&rows));
    Ok(())
}

/// An adapter of low rank as a plain LoRA.
fn peft_lora(args: &ExportArgs, adapter: &dyn SavedAdapter) -> Result<(), CliError> {
    let folder = adapter.folder();
    let named = |key: &str| folder.config.get(key).and_then(Value::as_str);
    // The revision in the adapter belongs to the base that it names.
    let (base, revision) = match &args.base_model {
        Some(base) => (base.as_str(), args.revision.as_deref()),
        None => {
            let base = named("base_model_name_or_path").ok_or_else(|| {
                CliError::flag("--base-model", "the adapter names no base: say which one it was made for")
            })?;
            (base, args.revision.as_deref().or(named("revision")))
        }
    };
    let headers = resolve_headers(base, &open::hub(revision, args.offline))?;
    let model = ModelConfig::from_json(headers.dir(), headers.config())?;
    model.require_in(&headers)?;

    let staged = StagedDir::new(&args.output)?;
    let written = write_plain_lora(
        adapter,
        &model.base_shapes(),
        (Some(base), revision),
        args.balanced,
        staged.path(),
    )?;
    staged.commit()?;
    let output = args.output.display().to_string();
    if args.json {
        let ranks = written.ranks.iter().map(|(rank, modules)| (rank.to_string(), *modules));
        let ranks: std::collections::BTreeMap<String, usize> = ranks.collect();
        println!(
            "{}",
            json!({"output": output, "format": "peft-lora", "modules_by_rank": ranks, "values": written.values})
        );
        return Ok(());
    }
    let ranks: Vec<String> =
        written.ranks.iter().map(|(rank, modules)| format!("{rank} ({modules} modules)")).collect();
    let rows = vec![
        vec!["format".to_string(), "plain LoRA, exact".to_string()],
        vec!["rank".to_string(), ranks.join(", ")],
        vec!["values".to_string(), render::count(written.values)],
    ];
    print!("{}", render::table(&rows));
    println!(
        "\nnext:\n  {} generate --base-model {} --adapter {} --prompt '…'",
        render::program(),
        yaml::shell(base),
        yaml::shell(&output)
    );
    Ok(())
}
