//! Opening what a command line or recipe names: base, tokenizer, adapter, model.

use crate::error::CliError;
use crate::render;
use burn::tensor::Device;
use peft_core::adapter::SavedAdapter;
use peft_core::checkpoint::{Checkpoint, HubOptions, resolve_with_progress};
use peft_core::model::{ComputeType, Decoder, load};
use peft_core::text::Tokenizer;
use peft_methods::open_adapter;
use std::path::PathBuf;

/// A base as it lies on disk.
pub struct Base {
    /// Its weights.
    pub checkpoint: Checkpoint,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

/// Options for the hub.
pub fn hub(revision: Option<&str>, offline: bool) -> HubOptions {
    let mut options = HubOptions::from_env();
    options.revision = revision.map(str::to_string);
    options.offline |= offline;
    options
}

/// The folder that a name means, downloaded first if it must be.
pub fn folder(name: &str, hub: &HubOptions) -> Result<PathBuf, CliError> {
    let mut downloads = render::Transfers::downloading();
    Ok(resolve_with_progress(name, hub, &mut |progress| downloads.show(&progress))?)
}

/// Opens a base by folder or hub id.
pub fn base(name: &str, hub: &HubOptions) -> Result<Base, CliError> {
    let dir = folder(name, hub)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    Ok(Base { checkpoint, tokenizer })
}

/// Opens an adapter by folder or hub id. The revision of the base is not the adapter's.
pub fn adapter(name: &str, offline: bool) -> Result<Box<dyn SavedAdapter>, CliError> {
    let adapter = open_adapter(&folder(name, &hub(None, offline))?)?;
    for warning in &adapter.folder().warnings {
        render::warning(warning);
    }
    Ok(adapter)
}

/// Loads the model, with the adapter on it if one is named.
pub fn model(
    base: &Base,
    adapter_name: Option<&str>,
    offline: bool,
    device: &Device,
    compute: ComputeType,
) -> Result<Decoder, CliError> {
    let adapter = adapter_name.map(|name| adapter(name, offline)).transpose()?;
    let mut model = load(&base.checkpoint, device, compute)?;
    if let Some(adapter) = adapter {
        adapter.require_base(&base.checkpoint)?;
        adapter.attach(&mut model)?;
    }
    Ok(model)
}
