//! Adapters: where changes attach, the PEFT file format, folding into a checkpoint.

mod config;
mod config_file;
mod error;
mod file;
mod fold;
mod rewrite;
mod targets;

pub use config::{AdapterConfig, InitLoraWeights, alpha_pattern, rank_pattern};
pub use config_file::is_empty;
pub use error::AdapterError;
pub use file::{Adapter, LowRankModule, save};
pub use fold::{FoldReport, fold};
pub use rewrite::{RewriteOptions, TensorChange, rewrite_checkpoint, rewrite_into};
pub use targets::{Pattern, Selection, TargetModules, select, select_saved};
