//! `peft merge`: fold one adapter into its base, and show that the result does what the adapter does.

use super::unmerge;
use crate::args::{MergeArgs, MergeCheckArgs};
use crate::error::CliError;
use crate::{card, open, prompts, render};
use peft_core::adapter::{
    Drift, FoldCheck, FoldReport, MergeRecord, RewriteOptions, Rounding, SavedAdapter, available_memory,
    check_bytes, check_fold, default_max_drift, fold_into, keep_original,
};
use peft_core::checkpoint::{Checkpoint, Dtype, StagedDir};
use peft_core::model::ModelConfig;
use serde_json::{Value, json};
use std::path::Path;

/// Share of weights that rounding left as they were, from which on the user hears of f32.
const MANY_UNCHANGED: f64 = 0.1;

/// Runs the command.
pub fn run(args: MergeArgs) -> Result<(), CliError> {
    let dtype = args
        .dtype
        .as_deref()
        .map(str::parse::<Dtype>)
        .transpose()
        .map_err(|error| CliError::flag("--dtype", error))?;
    if let Some(dtype) = dtype.filter(|dtype| !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)) {
        return Err(CliError::flag("--dtype", format!("{dtype} is none of f32, bf16, f16")));
    }
    let max_shard_size = size(&args.max_shard_size).ok_or_else(|| {
        CliError::flag("--max-shard-size", format!("`{}` is no size like 5GB", args.max_shard_size))
    })?;
    if args.check.max_drift.is_some_and(|limit| !(limit.is_finite() && limit >= 0.0)) {
        return Err(CliError::flag("--max-drift", "expected a number from 0 on"));
    }
    if let Some(merged) = &args.unmerge {
        return unmerge::run(&args, merged, max_shard_size);
    }
    // Required without --unmerge.
    let base_model = args.base_model.as_deref().unwrap_or_default();
    let dir = open::folder(base_model, &open::hub(args.revision.as_deref(), args.offline))?;
    let base = Checkpoint::open(&dir)?;
    ModelConfig::from_json(base.dir(), base.config())?;
    let adapter = open::adapter(&args.adapter, args.offline)?;
    let ids = match args.check.no_verify {
        true => None,
        false => Some(prompts::token_ids(&base, args.check.prompts.as_deref())?),
    };

    let staged = StagedDir::new(&args.output)?;
    let report =
        fold_into(&base, adapter.as_ref(), staged.path(), &RewriteOptions { dtype, max_shard_size })?;
    let folded = Checkpoint::open(staged.path())?;
    if args.keep_original {
        keep_original(&base, &folded)?;
    }
    let rounding = Rounding::measure(&base, &folded, &report.changed)?;
    let coarsest = coarsest(&folded, &report.changed)?;
    drop(folded);
    let check = match ids {
        Some(ids) => verify(&args.check, &base, adapter.as_ref(), staged.path(), &ids, coarsest)?,
        None => None,
    };
    let verification = check.as_ref().map_or(Value::Null, to_json);
    let record = MergeRecord::new(&base, adapter.as_ref(), report.changed.clone(), verification.clone())?;
    record.write(staged.path())?;
    // In place of the base's own card, which was carried over with its other files.
    let text = card::merged(
        (base_model, args.revision.as_deref()),
        (&args.adapter, &adapter.folder().config),
        dtype,
        &report,
    );
    card::write(staged.path(), text.as_bytes())?;
    staged.commit()?;

    if args.json {
        let files: Vec<String> =
            report.files.iter().map(|file| args.output.join(file).display().to_string()).collect();
        println!(
            "{}",
            json!({
                "output": args.output.display().to_string(),
                "folded": report.folded,
                "replaced": report.replaced,
                "files": files,
                "rounding": {
                    "dtype": coarsest.to_string(),
                    "elements": rounding.elements,
                    "unchanged": rounding.unchanged,
                    "unchanged_share": rounding.share(),
                },
                "verification": verification,
            })
        );
        return Ok(());
    }
    show(&args, &report, coarsest, rounding, check.as_ref());
    Ok(())
}

/// Compares the fold in `dir` with the adapter, where memory allows, and refuses one that went wrong.
fn verify(
    args: &MergeCheckArgs,
    base: &Checkpoint,
    adapter: &dyn SavedAdapter,
    dir: &Path,
    ids: &[Vec<u32>],
    coarsest: Dtype,
) -> Result<Option<FoldCheck>, CliError> {
    let needed = check_bytes(base, ids)?;
    if let Some(available) = available_memory().filter(|available| needed > *available) {
        render::warning(&format!(
            "not verified: running the model takes {} of memory, {} are available",
            render::bytes(needed),
            render::bytes(available)
        ));
        return Ok(None);
    }
    let check = check_fold(base, adapter, dir, ids)?;
    if check.effect.max_difference == 0.0 {
        render::warning("the adapter changes nothing on these prompts");
    }
    let limit = args.max_drift.unwrap_or(default_max_drift(coarsest));
    match check.require(limit) {
        Err(error) if args.force => render::warning(&format!("{error}; kept by --force")),
        result => result?,
    }
    Ok(Some(check))
}

/// The type with the fewest digits that a changed tensor is stored in; f32 where nothing changed.
fn coarsest(folded: &Checkpoint, changed: &[String]) -> Result<Dtype, CliError> {
    let mut coarsest = Dtype::F32;
    for name in changed {
        let dtype = folded.tensor(name)?.dtype;
        if default_max_drift(dtype) > default_max_drift(coarsest) {
            coarsest = dtype;
        }
    }
    Ok(coarsest)
}

fn to_json(check: &FoldCheck) -> Value {
    let one = |drift: &Drift| {
        json!({
            "positions": drift.positions,
            "max_difference": drift.max_difference,
            "mean_difference": drift.mean_difference,
            "spread": drift.spread,
            "max_relative": drift.max_relative(),
            "mean_relative": drift.mean_relative(),
            "token_agreement": drift.token_agreement,
            "continued": drift.continued,
            "continuation_agreement": drift.continuation_agreement,
        })
    };
    json!({"drift": one(&check.drift), "effect": one(&check.effect)})
}

fn show(args: &MergeArgs, report: &FoldReport, dtype: Dtype, rounding: Rounding, check: Option<&FoldCheck>) {
    let share = 100.0 * rounding.share();
    let rows = vec![
        vec!["weights folded".to_string(), render::count(report.folded as u64)],
        vec!["tensors replaced whole".to_string(), render::count(report.replaced as u64)],
        vec!["weight files".to_string(), render::count(report.files.len() as u64)],
        vec![format!("changed weights that {dtype} left as they were"), format!("{share:.1} %")],
    ];
    print!("{}", render::table(&rows));
    if let Some(FoldCheck { drift, effect }) = check {
        let both = |name: &str, cell: fn(&Drift) -> String| vec![name.to_string(), cell(drift), cell(effect)];
        let cells = |name: &str| [name, "adapter → merged", "base → adapter"].map(str::to_string).to_vec();
        println!();
        print!(
            "{}",
            render::table(&[
                cells(&format!("on {} positions", drift.positions)),
                both("spread of the logits", |d| format!("{:.2}", d.spread)),
                both("largest logit difference / spread", |d| format!("{:.1e}", d.max_relative())),
                both("mean logit difference / spread", |d| format!("{:.1e}", d.mean_relative())),
                both("same most likely token", |d| format!("{:.1} %", 100.0 * d.token_agreement)),
                both("same greedy continuation", |d| {
                    format!("{:.1} % of {}", 100.0 * d.continuation_agreement, d.continued)
                }),
            ])
        );
    }
    if dtype != Dtype::F32 && rounding.share() > MANY_UNCHANGED {
        render::warning(&format!(
            "{share:.1} % of the changed weights are the base's again after rounding to {dtype}; --dtype f32 keeps \
             every change"
        ));
    }
    println!("\nnext:\n  {} generate --base-model {} --prompt '…'", render::program(), args.output.display());
}

/// Bytes in a size like `5GB` (decimal, as transformers reads it) or `5GiB`.
fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KIB" => 1024.0,
        "MIB" => 1024.0 * 1024.0,
        "GIB" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let bytes = number * unit;
    (bytes.is_finite() && bytes >= 1.0).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("5GB"), Some(5_000_000_000));
        assert_eq!(size("1.5 MiB"), Some(1_572_864));
        assert_eq!(size("5 elephants"), None);
        assert_eq!(size("0"), None);
    }
}
