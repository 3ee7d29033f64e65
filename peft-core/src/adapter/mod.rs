//! Adapters: where changes attach, the PEFT file format, folding into a checkpoint.

mod attach;
mod config;
mod config_file;
mod error;
mod file;
mod fold;
mod placement;
mod rewrite;
mod save;
mod targets;

pub use config::{AdapterConfig, BiasTraining, InitLoraWeights, Layers, LoraConfig, Names, TokenIndices};
pub use config_file::is_empty;
pub use error::AdapterError;
pub use file::{Adapter, LowRankModule, Resolved, RowsModule};
pub use fold::{FoldReport, fold};
pub use placement::{Placement, SharedWeight};
pub use rewrite::{Rewrite, RewriteOptions, TensorChange, rewrite_checkpoint, rewrite_into};
pub use save::save;
pub use targets::{Pattern, Selection, TargetModules, select, select_saved};
