//! Model checkpoints: safetensors files and the folders and hub repositories they come in.
//!
//! Reading maps files into memory and checks them whole at the border, so that everything behind it can trust
//! sizes and names. Writing computes tensors when their turn comes. What appears under its final name is
//! complete. Nothing is ever executed: pickled weights are refused.
//!
//! - [`Checkpoint`]: a model's folder, in one file or shards; [`SafetensorsFile`]: one file of it.
//! - [`LazyTensor`], [`write_safetensors`], [`write_sharded`]: the way back.
//! - [`write_file`], [`StagedDir`]: files and folders that appear complete or not at all.
//! - [`resolve`]: from what a user calls a model, a path or a hub id, to a folder; [`resolve_headers`] to its
//!   [`Headers`] alone; [`push`]: from a folder to the hub.

mod atomic;
mod disk;
mod dtype;
mod error;
mod file;
mod folder;
mod headers;
mod hub;
mod json;
mod writer;

pub use atomic::{StagedDir, remove_dir, remove_leftovers, write_file};
pub use disk::{free_bytes, require_free};
pub use dtype::{Dtype, DtypeError, f32_bytes, from_f32, to_f32};
pub use error::CheckpointError;
pub use file::{SafetensorsFile, TensorRef};
pub use folder::{
    ADAPTER_CONFIG_FILE, CONFIG_FILE, Checkpoint, INDEX_FILE, MERGE_FILE, ORIGINAL_FILE, WEIGHTS_FILE,
};
pub(crate) use folder::{Fence, hex};
pub use headers::{Headers, TensorShape};
pub use hub::{
    HubError, HubOptions, Progress, PushFile, PushReport, PushRequest, PushSource, Selection, check_target,
    push, resolve, resolve_headers, resolve_with_progress, select_files,
};
pub use json::read_bounded;
pub use writer::{Compute, LazyTensor, safetensors_bytes, write_safetensors, write_sharded};
