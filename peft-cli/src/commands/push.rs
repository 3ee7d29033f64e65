//! `peft push`: upload an adapter or a checkpoint. Everything is checked before anything is sent.

use crate::args::PushArgs;
use crate::error::CliError;
use crate::{open, render};
use peft_core::adapter::{AdapterError, AdapterFolder};
use peft_core::checkpoint::{
    ADAPTER_CONFIG_FILE, CONFIG_FILE, Checkpoint, PushFile, PushRequest, PushSource, Selection, TensorRef,
    check_target, push, select_files,
};
use peft_core::model::ModelConfig;
use peft_methods::open_adapter;
use serde_json::{Value, json};
use std::path::Path;

const BASE_KEY: &str = "base_model_name_or_path";

/// Runs the command.
pub fn run(args: PushArgs) -> Result<(), CliError> {
    let options = open::hub(args.revision.as_deref(), args.offline);
    let revision = options.revision.as_deref().unwrap_or("main");
    check_target(&args.repo, revision).map_err(peft_core::checkpoint::CheckpointError::from)?;
    let (kind, mut warnings) = check(&args.dir)?;
    let mut selection = select_files(&args.dir)?;
    if kind == "adapter" {
        warnings.extend(name_base(&args, &mut selection)?);
    } else if args.base_model.is_some() {
        return Err(CliError::flag("--base-model", "only an adapter names its base; this is a checkpoint"));
    }
    for warning in &warnings {
        render::warning(warning);
    }
    let total: u64 = selection.files.iter().map(|file| file.size).sum();
    if !args.json {
        println!("{kind} {} → {} ({revision})\n", args.dir.display(), args.repo);
        let row = |file: &PushFile| vec![file.path.clone(), render::bytes(file.size)];
        print!("{}", render::table(&selection.files.iter().map(row).collect::<Vec<_>>()));
        println!("  {} files, {}", render::count(selection.files.len() as u64), render::bytes(total));
        for (path, reason) in &selection.left_out {
            println!("  left out: {path} ({reason})");
        }
    }
    let mut result = json!({
        "repo": args.repo,
        "revision": revision,
        "kind": kind,
        "files": selection.files.iter().map(|file| json!({"path": file.path, "size": file.size})).collect::<Vec<_>>(),
        "left_out": selection.left_out.iter().map(|(path, reason)| json!({"path": path, "reason": reason})).collect::<Vec<_>>(),
        "warnings": warnings,
        "dry_run": args.dry_run,
    });
    if args.dry_run {
        match args.json {
            true => println!("{result}"),
            false => println!("\nnothing was sent (--dry-run)"),
        }
        return Ok(());
    }
    let message = args.message.clone().unwrap_or_else(|| format!("Upload {kind}"));
    let request = PushRequest {
        repo: &args.repo,
        files: &selection.files,
        message: &message,
        create: args.create,
        private: args.private,
    };
    let mut uploads = render::Transfers::uploading();
    let report = push(&request, &options, &mut |progress| uploads.show(&progress))?;
    if args.json {
        result["commit"] = json!(report.commit);
        result["url"] = json!(report.url);
        result["created"] = json!(report.created);
        result["small_files"] = json!(report.small);
        result["large_files"] = json!(report.large);
        result["present"] = json!(report.present);
        result["ignored"] = json!(report.ignored);
        println!("{result}");
        return Ok(());
    }
    for path in &report.ignored {
        render::warning(&format!("{path} was not uploaded: the repository's .gitignore keeps it out"));
    }
    println!("\ncommit {} at {}", report.commit, report.url);
    if report.created {
        println!("the repository was made{}", if args.private { ", private" } else { "" });
    }
    if report.present > 0 {
        println!("{} of {} large files were there already", report.present, report.large);
    }
    let flag = if kind == "adapter" { "--base-model … --adapter" } else { "--base-model" };
    println!("\nnext:\n  {} generate {flag} {} --prompt '…'", render::program(), args.repo);
    Ok(())
}

/// Opens what is to be uploaded as strictly as it is used, and looks at every value. Returns what it is.
fn check(dir: &Path) -> Result<(&'static str, Vec<String>), CliError> {
    if dir.join(ADAPTER_CONFIG_FILE).is_file() {
        let adapter = open_adapter(dir)?;
        let AdapterFolder { file, warnings, .. } = adapter.folder();
        for name in file.names() {
            require_finite(file.path(), file.tensor(name)?)?;
        }
        return Ok(("adapter", warnings.clone()));
    }
    // What holds an adapter or a model of a run is not one itself.
    if !dir.join(CONFIG_FILE).is_file() {
        let inside = ["adapter", "model"].iter().map(|name| dir.join(name)).find(|inside| inside.is_dir());
        if let Some(inside) = inside {
            let message =
                format!("is neither an adapter nor a checkpoint; did you mean {}?", inside.display());
            return Err(CliError::Inspect { path: dir.display().to_string(), message });
        }
    }
    let checkpoint = Checkpoint::open(dir)?;
    ModelConfig::from_json(checkpoint.dir(), checkpoint.config())?;
    for name in checkpoint.names() {
        require_finite(dir, checkpoint.tensor(name)?)?;
    }
    Ok(("model", Vec::new()))
}

fn require_finite(path: &Path, tensor: TensorRef<'_>) -> Result<(), CliError> {
    if tensor.dtype.is_float() && !tensor.to_f32()?.iter().all(|value| value.is_finite()) {
        return Err(AdapterError::NonFinite { path: path.to_path_buf(), key: tensor.name.to_string() }.into());
    }
    Ok(())
}

/// Sets the base's name in the uploaded configuration where one is given; otherwise warns of a base that only this
/// machine has.
fn name_base(args: &PushArgs, selection: &mut Selection) -> Result<Option<String>, CliError> {
    let path = args.dir.join(ADAPTER_CONFIG_FILE);
    let bytes = std::fs::read(&path).map_err(|source| CliError::Io { path: path.clone(), source })?;
    let mut config: Value = serde_json::from_slice(&bytes)
        .map_err(|error| AdapterError::Config { path, message: error.to_string() })?;
    if let Some(base) = &args.base_model {
        check_target(base, "main").map_err(|error| CliError::flag("--base-model", error))?;
        config[BASE_KEY] = json!(base);
        let bytes = format!("{config:#}\n").into_bytes();
        for file in selection.files.iter_mut().filter(|file| file.path == ADAPTER_CONFIG_FILE) {
            *file = PushFile {
                size: bytes.len() as u64,
                source: PushSource::Bytes(bytes.clone()),
                path: file.path.clone(),
            };
        }
        return Ok(None);
    }
    let base = config[BASE_KEY].as_str().unwrap_or_default();
    if base.is_empty() {
        return Ok(Some(format!("the adapter names no base ({BASE_KEY}); --base-model org/name sets it")));
    }
    let local = check_target(base, "main").is_err() || Path::new(base).is_dir();
    Ok(local.then(|| {
        format!(
            "{BASE_KEY} is `{base}`, a folder of this machine that nobody else has; --base-model org/name names \
             another in the uploaded file"
        )
    }))
}
