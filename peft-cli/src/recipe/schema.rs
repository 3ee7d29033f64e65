//! Every key of a recipe, with its default.

use super::Checkpointing;
use peft_core::data::{DatasetConfig, OnTruncation};
use peft_core::train::{BestMetric, Schedule};
use peft_methods::MethodBlock;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A training run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct Recipe {
    /// A checkpoint folder or hub id.
    pub base_model: String,
    /// Branch, tag or commit of a hub base.
    pub revision: Option<String>,
    /// The method and its keys.
    pub method: MethodBlock,
    /// Start from this adapter instead of fresh values.
    pub adapter_name_or_path: Option<String>,
    /// Training data.
    pub datasets: Vec<DatasetConfig>,
    /// Validation data of its own.
    pub eval_datasets: Vec<DatasetConfig>,
    /// Validation examples taken from the training data: a count, or a share below 1.
    pub val_set_size: f64,
    /// Where everything goes.
    pub output_dir: String,
    /// Longest example in tokens, and the size of a pack.
    pub sequence_len: usize,
    /// Several examples to a row of up to `sequence_len` tokens; they do not see each other.
    pub sample_packing: bool,
    /// What happens to longer ones.
    pub on_truncation: Option<OnTruncation>,
    /// Supervise the prompt too.
    pub train_on_inputs: bool,
    /// A .jinja file, or the text of a template, in place of the tokenizer's chat template.
    pub chat_template: Option<String>,
    /// Further variables of the chat template.
    pub chat_template_kwargs: Map<String, Value>,
    /// Shuffled, length-bucketed order, or file order.
    pub shuffle_data: bool,
    /// Examples a micro-batch, or packs.
    pub micro_batch_size: usize,
    /// Micro-batches a step.
    pub gradient_accumulation_steps: usize,
    /// Passes over the data.
    pub num_epochs: f64,
    /// Steps in all, in place of epochs.
    pub max_steps: Option<u64>,
    /// Peak rate.
    pub learning_rate: f64,
    /// constant, linear or cosine.
    pub lr_scheduler: Schedule,
    /// Warm-up as a share of all steps.
    pub warmup_ratio: f64,
    /// Warm-up in steps, in place of the ratio.
    pub warmup_steps: Option<u64>,
    /// Largest gradient norm; null switches clipping off.
    pub max_grad_norm: Option<f64>,
    /// The optimizer and its keys.
    pub optimizer: OptimizerBlock,
    /// What the backward computes again: nothing (false), norms and gates (selective) or whole layers (true), each slower
    /// and with less memory; auto takes the first that fits.
    pub gradient_checkpointing: Checkpointing,
    /// Rows of logits held at a time; null chooses by the vocabulary's size.
    pub loss_chunk_rows: Option<usize>,
    /// Steps between evaluations.
    pub eval_steps: Option<u64>,
    /// Evaluations an epoch, in place of the steps.
    pub evals_per_epoch: Option<u64>,
    /// Evaluate before the first step too.
    pub eval_on_start: bool,
    /// Examples a batch in evaluation.
    pub eval_batch_size: usize,
    /// Validation examples to answer for the exact match.
    pub eval_generations: usize,
    /// Steps between checkpoints.
    pub save_steps: Option<u64>,
    /// Checkpoints an epoch, in place of the steps.
    pub saves_per_epoch: Option<u64>,
    /// Checkpoints kept, the last and the best at least; null keeps all.
    pub save_total_limit: Option<usize>,
    /// Export the best state instead of the last.
    pub load_best_model_at_end: bool,
    /// What is best: eval_loss, eval_perplexity, eval_token_accuracy or eval_exact_match.
    pub metric_for_best_model: Option<BestMetric>,
    /// Follows from the metric; here for recipes that spell it out.
    pub greater_is_better: Option<bool>,
    /// Evaluations in a row without a gain, after which the run stops.
    pub early_stopping_patience: Option<u64>,
    /// A gain must be larger than this to count.
    pub early_stopping_threshold: f64,
    /// Steps between lines of metrics.
    pub logging_steps: u64,
    /// Where else the metrics go: tensorboard, or nowhere.
    pub report_to: ReportTo,
    /// Seed of every random stream.
    pub seed: u64,
    /// auto, cpu, cuda or cuda:N.
    pub device: String,
    /// auto, f32 or bf16.
    pub dtype: String,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            base_model: String::new(),
            revision: None,
            method: MethodBlock::default(),
            adapter_name_or_path: None,
            datasets: Vec::new(),
            eval_datasets: Vec::new(),
            val_set_size: 0.0,
            output_dir: "out".to_string(),
            sequence_len: 2048,
            sample_packing: false,
            on_truncation: None,
            train_on_inputs: false,
            chat_template: None,
            chat_template_kwargs: Map::new(),
            shuffle_data: true,
            micro_batch_size: 4,
            gradient_accumulation_steps: 1,
            num_epochs: 1.0,
            max_steps: None,
            learning_rate: 2e-4,
            lr_scheduler: Schedule::Cosine,
            warmup_ratio: 0.0,
            warmup_steps: None,
            max_grad_norm: Some(1.0),
            optimizer: OptimizerBlock::default(),
            gradient_checkpointing: Checkpointing::Auto,
            loss_chunk_rows: None,
            eval_steps: None,
            evals_per_epoch: None,
            eval_on_start: false,
            eval_batch_size: 8,
            eval_generations: 0,
            save_steps: None,
            saves_per_epoch: None,
            save_total_limit: Some(3),
            load_best_model_at_end: false,
            metric_for_best_model: None,
            greater_is_better: None,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            logging_steps: 1,
            report_to: ReportTo::default(),
            seed: 42,
            device: "auto".to_string(),
            dtype: "auto".to_string(),
        }
    }
}

/// Programs that the metrics are written for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "OneOrMany")]
pub struct ReportTo(pub Vec<String>);

impl ReportTo {
    /// Whether event files are wanted.
    pub fn tensorboard(&self) -> bool {
        self.0.iter().any(|name| name == "tensorboard")
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl From<OneOrMany> for ReportTo {
    fn from(names: OneOrMany) -> Self {
        let names = match names {
            OneOrMany::One(name) => vec![name],
            OneOrMany::Many(names) => names,
        };
        Self(names.into_iter().filter(|name| name != "none").collect())
    }
}

/// The optimizer block.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerBlock {
    /// adamw.
    #[serde(rename = "type")]
    pub kind: String,
    /// Decays of the moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for OptimizerBlock {
    fn default() -> Self {
        Self { kind: "adamw".to_string(), betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 }
    }
}

impl Recipe {
    /// Checks what types alone do not.
    ///
    /// # Errors
    /// A message that names the key.
    pub fn check(&self) -> Result<(), String> {
        let positive = |key: &str, ok: bool, value: String| match ok {
            true => Ok(()),
            false => Err(format!("`{key}` is {value}, expected a number above 0")),
        };
        if self.base_model.is_empty() {
            return Err("`base_model` is missing: a checkpoint folder or a hub id".to_string());
        }
        if self.datasets.is_empty() {
            return Err("`datasets` is missing: a list of {path, type}".to_string());
        }
        positive("sequence_len", self.sequence_len > 0, self.sequence_len.to_string())?;
        positive("micro_batch_size", self.micro_batch_size > 0, self.micro_batch_size.to_string())?;
        positive("eval_batch_size", self.eval_batch_size > 0, self.eval_batch_size.to_string())?;
        let accumulation = self.gradient_accumulation_steps;
        positive("gradient_accumulation_steps", accumulation > 0, accumulation.to_string())?;
        positive("logging_steps", self.logging_steps > 0, self.logging_steps.to_string())?;
        self.check_evaluation()?;
        positive("max_steps", self.max_steps != Some(0), "0".to_string())?;
        positive("loss_chunk_rows", self.loss_chunk_rows != Some(0), "0".to_string())?;
        let finite = |x: f64| x.is_finite() && x > 0.0;
        positive("num_epochs", finite(self.num_epochs), self.num_epochs.to_string())?;
        positive("learning_rate", finite(self.learning_rate), self.learning_rate.to_string())?;
        if let Some(norm) = self.max_grad_norm {
            positive("max_grad_norm", finite(norm), norm.to_string())?;
        }
        if !(0.0..1.0).contains(&self.warmup_ratio) {
            return Err(format!("`warmup_ratio` is {}, expected a share below 1", self.warmup_ratio));
        }
        if !self.val_set_size.is_finite() || self.val_set_size < 0.0 {
            return Err(format!("`val_set_size` is {}, expected a count or a share", self.val_set_size));
        }
        if self.val_set_size > 0.0 && !self.eval_datasets.is_empty() {
            return Err("`val_set_size` and `eval_datasets` both name validation data; keep one".to_string());
        }
        if let Some(name) = self.report_to.0.iter().find(|name| *name != "tensorboard") {
            return Err(format!("`report_to` names `{name}`, known: tensorboard, none"));
        }
        let optimizer = &self.optimizer;
        if optimizer.kind != "adamw" {
            return Err(format!("`optimizer.type` is {}, known: adamw", optimizer.kind));
        }
        let decay = |beta: f64| (0.0..1.0).contains(&beta);
        if !(decay(optimizer.betas.0) && decay(optimizer.betas.1)) {
            return Err(format!("`optimizer.betas` is {:?}, expected two numbers below 1", optimizer.betas));
        }
        let usable = |x: f64| x.is_finite() && x >= 0.0;
        if !(usable(optimizer.eps) && usable(optimizer.weight_decay)) {
            return Err(
                "`optimizer.eps` and `optimizer.weight_decay` must be finite and not negative".to_string()
            );
        }
        Ok(())
    }
}
