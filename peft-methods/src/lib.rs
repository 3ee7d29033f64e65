//! Parameter-efficient fine-tuning methods, one a file or folder. No method reaches into another; what they share stands
//! in [`peft_core`].

mod full;
mod lora;

pub use full::Full;
pub use lora::{Lora, LoraBlock, init};
