//! `peft init`: a commented recipe to begin with.

mod guess;
mod methods;
mod recipe;

use crate::args::InitArgs;
use crate::error::CliError;
use crate::{open, render, yaml};
use peft_core::checkpoint::{Checkpoint, write_file};
use peft_core::data::{DatasetConfig, DatasetType, LoadOptions, load};
use peft_core::model::ModelConfig;
use peft_core::text::Tokenizer;
use recipe::{Draft, Length};
use std::path::Path;

/// A base to put one's own in the place of.
const BASE: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// Weights below this make a model that takes larger rates than usual.
const TINY_PARAMETERS: u64 = 10_000_000;

/// Runs the command.
pub fn run(args: InitArgs) -> Result<(), CliError> {
    let out = args.output.display().to_string();
    if args.output.symlink_metadata().is_ok() {
        return Err(CliError::flag(&out, "is there already and is not overwritten; choose another name"));
    }
    let (kind, method) = methods::method(&args.method)?;
    let dataset = match &args.data {
        Some(path) => guess::dataset(path)?,
        None => DatasetConfig::new("my-data.jsonl", DatasetType::Alpaca),
    };
    let base = match &args.base_model {
        Some(name) => local(name)?,
        None => None,
    };
    let read = base.as_ref().filter(|_| args.data.is_some());
    let draft = Draft {
        kind,
        method,
        base: args.base_model.as_deref().unwrap_or(BASE),
        tiny: base.as_ref().is_some_and(|base| base.parameters < TINY_PARAMETERS),
        records: args.data.as_ref().map(|_| load_all(&dataset)).transpose()?,
        length: read.map(|base| length(&dataset, base)).transpose()?,
        dataset: &dataset,
        name: args.output.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
    };
    write_file(&args.output, recipe::text(&draft).as_bytes())?;
    println!("{out}: {} ({})", method.name, method.about);
    println!("\nnext:\n  {} train {}", render::program(), yaml::shell(&out));
    Ok(())
}

/// A base on this machine.
struct Local {
    tokenizer: Tokenizer,
    positions: usize,
    parameters: u64,
}

/// The base, where it need not be downloaded.
fn local(name: &str) -> Result<Option<Local>, CliError> {
    let found = open::folder(name, &open::hub(None, true));
    let dir = match found {
        Ok(dir) => dir,
        // A hub id that was never downloaded is as good as any.
        Err(_) if is_hub_id(name) => return Ok(None),
        Err(error) => return Err(error),
    };
    let checkpoint = Checkpoint::open(&dir)?;
    let config = ModelConfig::from_json(checkpoint.dir(), checkpoint.config())?;
    let tensors = checkpoint.names().filter_map(|name| checkpoint.tensor(name).ok());
    let parameters = tensors.map(|tensor| tensor.numel() as u64).sum();
    let tokenizer = Tokenizer::from_dir(&dir)?;
    Ok(Some(Local { tokenizer, positions: config.max_position_embeddings, parameters }))
}

/// Whether the name could be a repository's.
fn is_hub_id(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    name.chars().all(plain)
        && !name.starts_with(['.', '/'])
        && name.matches('/').count() <= 1
        && !Path::new(name).exists()
}

/// How many records the file has.
fn load_all(dataset: &DatasetConfig) -> Result<usize, CliError> {
    Ok(peft_core::data::records::read(dataset)?.len())
}

/// The longest example in tokens, and what the base can take.
fn length(dataset: &DatasetConfig, base: &Local) -> Result<Length, CliError> {
    let options = LoadOptions {
        // Nothing is cut, so that the longest is known.
        sequence_len: usize::MAX >> 8,
        train_on_inputs: false,
        on_truncation: None,
        chat_template: None,
        chat_template_kwargs: Default::default(),
        now: None,
    };
    let loaded = load(std::slice::from_ref(dataset), &base.tokenizer, &options)?;
    Ok(Length { longest: loaded.report.longest, positions: base.positions })
}
