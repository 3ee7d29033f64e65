//! What a recipe's run will be, before it runs: what trains, how many steps, how much memory.

use crate::error::CliError;
use crate::recipe::{Checkpointing, Recipe};
use burn::tensor::Device;
use peft_core::checkpoint::Headers;
use peft_core::data::{Epochs, Example};
use peft_core::model::ModelConfig;
use peft_core::train::plan::{
    Advice, Batching, MemoryPlan, RunBatches, Workload, advise, evaluation_batches, fastest_that_fits,
    predict,
};
use peft_core::train::{
    DeviceMemory, GradientCheckpointing, MethodPlan, TrainConfig, device_memory, resident_bytes,
};
use std::path::Path;

/// Values that AdamW keeps of each trained one.
pub const MOMENTS: u64 = 2;
/// Tokens after which an answer that is longer than its reference is given up.
const ANSWER_SLACK: usize = 8;

/// A run, foretold.
pub struct Forecast {
    /// Steps in all.
    pub steps: u64,
    /// The order of the training examples.
    pub epochs: Epochs,
    /// What the backward computes again: as the recipe says, or as chosen.
    pub checkpointing: GradientCheckpointing,
    /// The training batches.
    pub batches: RunBatches,
    /// Memory by phase and component.
    pub memory: MemoryPlan,
    /// What the device has.
    pub device: DeviceMemory,
    /// Whether the peak fits into what is available; `None` where that is not known.
    pub fits: Option<bool>,
    /// Changes with which it would.
    pub advice: Vec<Advice>,
}

/// What the method of the recipe at `path` would train.
pub fn method_plan(
    recipe: &Recipe,
    path: &Path,
    model: &ModelConfig,
    base: &Headers,
) -> Result<MethodPlan, CliError> {
    let block = &recipe.method.block;
    let starts_from_adapter = recipe.adapter_name_or_path.is_some();
    block.check(starts_from_adapter).map_err(|message| CliError::method(path, &message))?;
    Ok(block.plan(model, base)?)
}

impl Forecast {
    /// The run of the recipe at `path` over these examples. The memory that the process has at this moment counts as what the
    /// run has before its model is loaded.
    pub fn new(
        recipe: &Recipe,
        path: &Path,
        config: &TrainConfig,
        method: &MethodPlan,
        (train, validation): (&[Example], &[Example]),
    ) -> Result<Self, CliError> {
        let device = crate::device::device(&recipe.device)?;
        let compute = crate::device::compute_type(&recipe.dtype, &device)?;
        // What reading left behind must not count as what the run starts with.
        crate::allocator::collect();
        let epochs = config.epochs(train);
        let steps = config.total_steps(&epochs);
        let check = recipe.method.block.check_length(steps);
        check.map_err(|message| CliError::method(path, &message))?;
        let batches = RunBatches::of_run(config, &epochs, train, steps);
        let answered = &validation[..config.eval_generations.min(validation.len())];
        let mut work = Workload {
            model: &method.model,
            compute,
            parameters: &method.parameters,
            step: config.step,
            accumulation: config.gradient_accumulation_steps,
            batches: batches.shapes.clone(),
            evaluation: evaluation_batches(validation, config.eval_batch_size),
            generated_tokens: answered
                .iter()
                .map(|example| example.ids.len() + ANSWER_SLACK)
                .max()
                .unwrap_or(0),
            generated_rows: config.eval_batch_size.min(answered.len()),
            moments: MOMENTS,
            runtime: resident_bytes().unwrap_or(0),
            host: device == Device::flex(),
        };
        let device = device_memory(&device);
        // What the process has already is no longer available to others.
        let limit = device.available_bytes.map(|available| available + work.runtime);
        if recipe.gradient_checkpointing == Checkpointing::Auto {
            work.step.gradient_checkpointing = fastest_that_fits(&work, limit);
        }
        let checkpointing = work.step.gradient_checkpointing;
        let memory = predict(&work);
        let fits = limit.map(|limit| memory.peak_bytes <= limit);
        let batching = Batching {
            micro_batch_size: recipe.micro_batch_size,
            gradient_accumulation_steps: recipe.gradient_accumulation_steps,
            eval_batch_size: recipe.eval_batch_size,
            sequence_len: recipe.sequence_len,
        };
        let advice = match (fits, limit) {
            (Some(false), Some(limit)) => advise(&work, batching, limit),
            _ => Vec::new(),
        };
        Ok(Self { steps, epochs, checkpointing, batches, memory, device, fits, advice })
    }

    /// A line that says what will not fit and what would help; `None` where all is well.
    pub fn warning(&self) -> Option<String> {
        let available = self.device.available_bytes.filter(|_| self.fits == Some(false))?;
        let advice: Vec<String> = self.advice.iter().map(render_changes).collect();
        let help = if advice.is_empty() {
            "; no change of batch, length or checkpointing brings it down enough".to_string()
        } else {
            format!("; it would with {}", advice.join(", or "))
        };
        Some(format!(
            "the run will probably not fit into memory: predicted peak {}, available {}{help}",
            crate::render::bytes(self.memory.peak_bytes),
            crate::render::bytes(available)
        ))
    }
}

/// `key: value, key: value`.
pub fn render_changes(advice: &Advice) -> String {
    let changes: Vec<String> = advice.changes.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    changes.join(", ")
}
