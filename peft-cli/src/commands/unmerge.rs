//! `peft merge --unmerge`: from a merged checkpoint back to its base.

use crate::args::MergeArgs;
use crate::error::CliError;
use crate::{open, render};
use peft_core::adapter::{Source, unfold_into};
use peft_core::checkpoint::{Checkpoint, StagedDir};
use serde_json::json;
use std::path::Path;

/// Runs the command on the merged checkpoint in `merged`.
pub fn run(args: &MergeArgs, merged: &Path, max_shard_size: u64) -> Result<(), CliError> {
    let merged = Checkpoint::open(merged)?;
    let adapter = open::adapter(&args.adapter, args.offline)?;
    let hub = open::hub(args.revision.as_deref(), args.offline);
    let base = args.base_model.as_ref().map(|base| open::folder(base, &hub)).transpose()?;
    let base = base.map(|dir| Checkpoint::open(&dir)).transpose()?;
    let staged = StagedDir::new(&args.output)?;
    let report = unfold_into(&merged, adapter.as_ref(), base.as_ref(), staged.path(), max_shard_size)?;
    staged.commit()?;

    let source = match report.source {
        Source::Kept => "kept original",
        Source::Base => "base",
        Source::Subtraction => "subtraction",
    };
    if args.json {
        println!(
            "{}",
            json!({
                "output": args.output.display().to_string(),
                "changed": report.changed,
                "source": source,
                "exact": report.is_exact(),
                "identical": report.identical,
                "different": report.different,
                "unknown": report.unknown,
                "files": report.files,
            })
        );
        return Ok(());
    }
    let all = report.identical + report.different.len() + report.unknown;
    let rows = vec![
        vec!["tensors".to_string(), render::count(all as u64)],
        vec!["changed back".to_string(), format!("{} ({source})", render::count(report.changed as u64))],
        vec!["identical to the original (SHA-256)".to_string(), render::count(report.identical as u64)],
        vec!["different from the original".to_string(), render::count(report.different.len() as u64)],
        vec!["original not known".to_string(), render::count(report.unknown as u64)],
    ];
    print!("{}", render::table(&rows));
    if report.is_exact() {
        println!("\nevery tensor is restored byte for byte");
    } else if report.unknown == 0 {
        render::warning(
            "not restored byte for byte: the tensors that differ are off by rounding; give --base-model, or merge \
             with --keep-original",
        );
    } else {
        render::warning(
            "it cannot be known whether the bytes are the original's: this folder has no record of it (merge.json); \
             the change was subtracted, which is right up to rounding",
        );
    }
    Ok(())
}
