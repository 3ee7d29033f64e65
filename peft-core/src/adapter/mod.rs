//! Adapters: where changes attach, the PEFT file format, folding into a checkpoint.

mod attach;
mod base_hash;
mod config;
mod config_file;
mod drift;
mod error;
mod file;
mod fold;
mod folder;
mod init;
mod initial;
mod linear;
mod placement;
mod plain_lora;
mod record;
mod rewrite;
mod save;
mod saved;
mod targets;
mod unfold;

pub use base_hash::{require_base, tensors_sha256};
pub use config::{AdapterConfig, BiasTraining, Layers, LoraConfig, Names, Patterns, TokenIndices};
pub use config_file::is_empty;
pub use drift::{
    CONTINUED, Drift, FoldCheck, Rounding, available_memory, check_bytes, check_fold, default_max_drift,
};
pub use error::AdapterError;
pub use file::{Adapter, LORA_FORMAT, LowRankModule, Resolved, RowsModule};
pub use fold::{FoldReport, base_shapes, fold, fold_into};
pub use folder::{
    AdapterFolder, FileFormat, Layout, PREFIX, WEIGHTS_FILE, common_config, finite_tensor, key, open_adapter,
    parameter_tensor, weights_bytes, write_adapter,
};
pub use init::{
    CordaConfig, CordaMethod, EvaConfig, GradientDirection, GradientScale, InitLoraWeights, LoraGaConfig,
};
pub use initial::{InitialFactors, Place, attach_factors, olora, pissa};
pub use linear::{matrices, select_linear, spelled_out};
pub use placement::{Placement, SharedWeight};
pub use plain_lora::{PlainLora, write_plain_lora};
pub use record::{MergeRecord, Original, fingerprints, keep_original};
pub use rewrite::{Rewrite, RewriteOptions, TensorChange, rewrite_into};
pub use save::{adapter_bytes, save};
pub use saved::{Folding, Parts, SavedAdapter, Unfolding, take_values};
pub use targets::{Pattern, Selection, TargetModules, matching, select, select_saved};
pub use unfold::{Source, UnfoldReport, unfold_into};
