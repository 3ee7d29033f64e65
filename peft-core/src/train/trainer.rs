//! The training loop.

use super::error::TrainError;
use super::evaluate::{evaluate, exact_match};
use super::memory::peak_memory_bytes;
use super::method::Method;
use super::metrics::{EvalMetrics, MetricsLog, StepMetrics};
use super::optimizer::ParameterOptimizer;
use super::schedule::{Schedule, Warmup};
use super::state::{self, Fingerprint};
use super::step::{StepGradients, StepSettings, accumulate, global_norm};
use crate::checkpoint::StagedDir;
use crate::data::{Example, collate, epoch_order};
use crate::model::Decoder;
use crate::projection::DropoutKey;
use crate::text::Tokenizer;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How long, how fast and how often.
#[derive(Debug, Clone)]
pub struct TrainConfig {
    /// Where everything goes.
    pub output_dir: PathBuf,
    /// Seed of all random streams.
    pub seed: u64,
    /// Examples a micro-batch.
    pub micro_batch_size: usize,
    /// Micro-batches a step.
    pub gradient_accumulation_steps: usize,
    /// Passes over the data, unless `max_steps` is given.
    pub num_epochs: f64,
    /// Steps in all.
    pub max_steps: Option<u64>,
    /// Peak rate.
    pub learning_rate: f64,
    /// Its course.
    pub schedule: Schedule,
    /// Its rise.
    pub warmup: Warmup,
    /// Largest gradient norm; larger ones are scaled down to it.
    pub max_grad_norm: Option<f64>,
    /// How a step runs.
    pub step: StepSettings,
    /// Shuffled, length-bucketed order; otherwise file order in every epoch.
    pub shuffle_data: bool,
    /// Steps between evaluations; the end is always evaluated where there is validation data.
    pub eval_steps: Option<u64>,
    /// Whether to evaluate before the first step.
    pub eval_on_start: bool,
    /// Examples a batch in evaluation.
    pub eval_batch_size: usize,
    /// Validation examples answered for the exact match, before the first step and at the end.
    pub eval_generations: usize,
    /// Steps between checkpoints; the end is always saved.
    pub save_steps: Option<u64>,
    /// Checkpoints kept.
    pub save_total_limit: Option<usize>,
    /// Steps between lines of metrics.
    pub logging_steps: u64,
    /// What a saved state must agree with to be continued.
    pub fingerprint: Fingerprint,
}

/// Watches a run.
pub trait Observer {
    /// Training starts after `done` of `total` steps.
    fn started(&mut self, done: u64, total: u64);
    /// A step ended.
    fn step(&mut self, metrics: &StepMetrics);
    /// An evaluation ended.
    fn evaluated(&mut self, metrics: &EvalMetrics);
    /// A checkpoint was saved.
    fn saved(&mut self, path: &Path);
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct RunSummary {
    /// Steps finished in all.
    pub steps: u64,
    /// Evaluation before the first step.
    pub before: Option<EvalMetrics>,
    /// Evaluation at the end.
    pub after: Option<EvalMetrics>,
    /// Seconds in steps, this process alone.
    pub seconds: f64,
    /// Tokens trained on, this process alone.
    pub tokens: u64,
    /// Peak memory.
    pub peak_memory_bytes: Option<u64>,
    /// The adapter's or model's folder.
    pub artifact: PathBuf,
}

/// A run over prepared parts.
pub struct Trainer<'a> {
    /// The model, prepared by the method.
    pub model: &'a mut Decoder,
    /// The method.
    pub method: &'a dyn Method,
    /// The optimizer.
    pub optimizer: Box<dyn ParameterOptimizer>,
    /// The tokenizer, for generations.
    pub tokenizer: &'a Tokenizer,
    /// Training examples.
    pub train: &'a [Example],
    /// Validation examples, maybe none.
    pub validation: &'a [Example],
    /// Everything else.
    pub config: TrainConfig,
}

/// The newest complete checkpoint of a run, if it has one.
pub fn latest_checkpoint(output_dir: &Path) -> Option<PathBuf> {
    state::list(output_dir).pop().map(|(_, path)| path)
}

impl Trainer<'_> {
    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        let config = &self.config;
        let fractional = (config.num_epochs * self.steps_per_epoch() as f64).ceil() as u64;
        config.max_steps.unwrap_or(fractional)
    }

    fn steps_per_epoch(&self) -> u64 {
        let micro_batches = self.train.len().div_ceil(self.config.micro_batch_size);
        micro_batches.div_ceil(self.config.gradient_accumulation_steps).max(1) as u64
    }

    /// Trains, from the checkpoint folder `resume` if given, and exports the result.
    pub fn run(mut self, resume: Option<&Path>, observer: &mut dyn Observer) -> crate::Result<RunSummary> {
        if !self.model.parameters().iter().any(|parameter| parameter.trainable) {
            return Err(TrainError::NothingToTrain.into());
        }
        require_vocabulary(self.model, "training data", self.train)?;
        require_vocabulary(self.model, "validation data", self.validation)?;
        let done = match resume {
            Some(path) => state::load(path, self.model, self.optimizer.as_mut(), &self.config.fingerprint)?,
            None => 0,
        };
        // A save that must fail should fail now and not after hours.
        drop(self.export_staged()?);

        let total = self.total_steps();
        let mut log = MetricsLog::open(&self.config.output_dir.join("metrics.jsonl"), done)?;
        observer.started(done, total);
        let mut summary = RunSummary {
            steps: done,
            before: None,
            after: None,
            seconds: 0.0,
            tokens: 0,
            peak_memory_bytes: None,
            artifact: self.config.output_dir.join(self.method.artifact()),
        };
        if done == 0 && self.config.eval_on_start && !self.validation.is_empty() {
            let metrics = self.validate(0, true)?;
            log.write(&metrics)?;
            observer.evaluated(&metrics);
            summary.before = Some(metrics);
        }

        let per_epoch = self.steps_per_epoch();
        let mut order = None;
        for step in done..total {
            let epoch = step / per_epoch;
            let micro_batches = match &order {
                Some((of, micro_batches)) if *of == epoch => micro_batches,
                _ => &order.insert((epoch, self.epoch(epoch))).1,
            };
            let first = (step % per_epoch) as usize * self.config.gradient_accumulation_steps;
            let last = (first + self.config.gradient_accumulation_steps).min(micro_batches.len());
            let window = micro_batches[first..last].to_vec();

            let metrics = self.step(step, total, &window, summary.peak_memory_bytes)?;
            summary.steps = step + 1;
            summary.seconds += metrics.tokens as f64 / metrics.tokens_per_second;
            summary.tokens += metrics.tokens;
            summary.peak_memory_bytes = metrics.peak_memory_bytes;
            let finished = step + 1;
            let due = |every: Option<u64>| every.is_some_and(|every| finished.is_multiple_of(every));
            if finished.is_multiple_of(self.config.logging_steps) || finished == total {
                log.write(&metrics)?;
            }
            observer.step(&metrics);
            if !self.validation.is_empty() && due(self.config.eval_steps) && finished < total {
                let metrics = self.validate(finished, false)?;
                log.write(&metrics)?;
                observer.evaluated(&metrics);
            }
            if due(self.config.save_steps) || finished == total {
                observer.saved(&self.save(finished)?);
            }
        }
        if !self.validation.is_empty() {
            let metrics = self.validate(summary.steps, true)?;
            if done < total {
                log.write(&metrics)?;
            }
            observer.evaluated(&metrics);
            summary.after = Some(metrics);
        }
        self.export_staged()?.commit()?;
        Ok(summary)
    }

    /// Micro-batches of an epoch, as indices of examples.
    fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let lengths: Vec<usize> = self.train.iter().map(|example| example.ids.len()).collect();
        let config = &self.config;
        epoch_order(&lengths, config.micro_batch_size, config.shuffle_data, config.seed, epoch)
    }

    fn step(
        &mut self,
        step: u64,
        total: u64,
        window: &[Vec<usize>],
        peak: Option<u64>,
    ) -> Result<StepMetrics, TrainError> {
        let start = Instant::now();
        let batches: Vec<_> = window
            .iter()
            .map(|indices| collate(&indices.iter().map(|i| &self.train[*i]).collect::<Vec<_>>(), 0))
            .collect();
        let supervised: usize = batches.iter().map(|batch| batch.targets.len()).sum();
        let tokens: usize = batches.iter().flat_map(|batch| &batch.lengths).sum();
        let scale = 1.0 / supervised.max(1) as f64;

        let mut sums = StepGradients::default();
        for (micro_batch, batch) in batches.iter().enumerate() {
            let key = DropoutKey { seed: self.config.seed, step, micro_batch: micro_batch as u64 };
            accumulate(self.model, batch, scale, key, self.config.step, &mut sums);
        }
        let loss = sums.loss_sum * scale;
        let grad_norm = global_norm(&sums.gradients);
        for (what, value) in [("loss", loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                // The update has not been applied: the weights are still those of the last good step.
                let saved = match self.save(step) {
                    Ok(path) => format!("the state before this step is in {}", path.display()),
                    Err(error) => format!("and the state before this step could not be saved: {error}"),
                };
                return Err(TrainError::NonFinite { step: step + 1, what, value, saved });
            }
        }

        let config = &self.config;
        let factor = config.schedule.factor(step, config.warmup.steps(total), total);
        let clip = config.max_grad_norm.map_or(1.0, |max| (max / (grad_norm + 1e-6)).min(1.0));
        if clip < 1.0 {
            for gradient in sums.gradients.values_mut() {
                *gradient = gradient.clone().mul_scalar(clip);
            }
        }
        self.method.before_update(self.model, &mut sums.gradients);
        for parameter in self.model.parameters_mut() {
            if let Some(gradient) = sums.gradients.remove(&parameter.name) {
                let rate = self.method.peak_rate(&parameter.name, config.learning_rate) * factor;
                parameter.value =
                    self.optimizer.step(&parameter.name, rate, parameter.value.clone(), gradient);
            }
        }
        let peak_memory_bytes = peak_memory_bytes(&self.model.device).max(peak);
        Ok(StepMetrics {
            step: step + 1,
            epoch: (step + 1) as f64 / self.steps_per_epoch() as f64,
            loss,
            learning_rate: config.learning_rate * factor,
            grad_norm,
            supervised_tokens: supervised as u64,
            tokens: tokens as u64,
            tokens_per_second: tokens as f64 / start.elapsed().as_secs_f64(),
            peak_memory_bytes,
        })
    }

    fn validate(&self, step: u64, generations: bool) -> crate::Result<EvalMetrics> {
        let config = &self.config;
        let evaluation =
            evaluate(self.model, self.validation, config.eval_batch_size, config.step.loss_chunk_rows);
        let eval_exact_match = match config.eval_generations.min(self.validation.len()) {
            count if count > 0 && generations => {
                let answers = exact_match(self.model, self.tokenizer, &self.validation[..count])?;
                let matched = answers.iter().filter(|answer| answer.matched).count();
                Some(matched as f64 / answers.len().max(1) as f64)
            }
            _ => None,
        };
        Ok(EvalMetrics {
            step,
            eval_loss: evaluation.loss,
            eval_perplexity: evaluation.perplexity,
            eval_token_accuracy: evaluation.token_accuracy,
            eval_exact_match,
        })
    }

    fn save(&self, step: u64) -> Result<PathBuf, TrainError> {
        let config = &self.config;
        let (optimizer, limit) = (self.optimizer.as_ref(), config.save_total_limit);
        state::save(&config.output_dir, step, self.model, self.method, optimizer, &config.fingerprint, limit)
    }

    /// The method's result beside its final place.
    fn export_staged(&self) -> Result<StagedDir, TrainError> {
        let staged = StagedDir::replacing(&self.config.output_dir.join(self.method.artifact()))?;
        self.method.export(self.model, staged.path())?;
        Ok(staged)
    }
}

/// Refuses examples with a token outside the model's embedding.
///
/// # Errors
/// The first such token.
pub fn require_vocabulary(
    model: &Decoder,
    source_name: &'static str,
    examples: &[Example],
) -> Result<(), TrainError> {
    let vocab_size = model.config.vocab_size;
    let outside = examples.iter().flat_map(|example| &example.ids).find(|id| **id as usize >= vocab_size);
    match outside {
        None => Ok(()),
        Some(id) => Err(TrainError::Vocabulary { source_name, id: i64::from(*id), vocab_size }),
    }
}
