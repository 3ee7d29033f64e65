//! Parameter-efficient fine-tuning methods, one a file or folder. No method reaches into another; what they share stands
//! in [`peft_core`].

mod full;
mod ia3;
mod lamda;
mod lora;
pub mod lora_sb;
mod nola;
mod registry;
mod selected;
mod sparse;
mod vera;

pub use full::Full;
pub use ia3::Ia3Config;
pub use lamda::{LamdaBlock, LamdaInit, MoreRankFor, RankAllocation};
pub use lora::{Lora, LoraBlock, init};
pub use lora_sb::{LoraSbBlock, LoraXsBlock};
pub use nola::{AlphaInit, BasisScale, CoefficientBits, NolaBlock, OffsetA, SeedPolicy};
pub use registry::{
    Block, BlockData, Kind, METHODS, MethodBlock, RunContext, Scaffold, ScaffoldKey, file_formats,
    open_adapter,
};
pub use sparse::{
    Criterion, ReselectionPolicy, ShiraReport, SparseAdapter, SparseBlock, SparseConfig, SparseModule,
    ValuesDtype, export_shira,
};
pub use vera::VeraConfig;
