//! `peft merge`: fold one adapter into its base.

use crate::args::MergeArgs;
use crate::error::CliError;
use crate::{open, render};
use peft_core::adapter::{RewriteOptions, fold};
use peft_core::checkpoint::{Checkpoint, Dtype};
use peft_core::model::ModelConfig;
use serde_json::json;

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
    let dir = open::folder(&args.base_model, &open::hub(args.revision.as_deref(), args.offline))?;
    let base = Checkpoint::open(&dir)?;
    ModelConfig::from_json(base.dir(), base.config())?;
    let adapter = open::adapter(&args.adapter, args.offline)?;
    let report = fold(&base, &adapter, &args.output, &RewriteOptions { dtype, max_shard_size })?;
    if args.json {
        let files: Vec<String> = report.files.iter().map(|file| file.display().to_string()).collect();
        println!(
            "{}",
            json!({
                "output": args.output.display().to_string(),
                "folded": report.folded,
                "replaced": report.replaced,
                "files": files,
            })
        );
        return Ok(());
    }
    let rows = vec![
        vec!["weights folded".to_string(), render::count(report.folded as u64)],
        vec!["tensors replaced whole".to_string(), render::count(report.replaced as u64)],
        vec!["weight files".to_string(), render::count(report.files.len() as u64)],
    ];
    print!("{}", render::table(&rows));
    println!("\nnext:\n  {} generate --base-model {} --prompt '…'", render::program(), args.output.display());
    Ok(())
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
