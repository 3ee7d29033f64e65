//! A training run's settings and parts, and what it is made of: the trial save, the update, the export.

use super::course::Course;
use super::error::TrainError;
use super::method::{Method, Preparation, Progress, RunLength};
use super::metrics::{EvalMetrics, StepMetrics};
use super::optimizer::{ParameterOptimizer, update_parameters};
use super::run::Run;
use super::schedule::{Schedule, Warmup};
use super::selection::{Every, Selection};
use super::state::{self, Identity, Snapshot};
use super::step::StepSettings;
use crate::checkpoint::{StagedDir, require_free};
use crate::data::{Epochs, Example};
use crate::kernels::{Clip, clip_factor, clipped, trim_memory};
use crate::model::Decoder;
use crate::text::Tokenizer;
use burn::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// How long, how fast and how often.
#[derive(Debug, Clone)]
pub struct TrainConfig {
    /// Where everything goes.
    pub output_dir: PathBuf,
    /// Seed of all random streams.
    pub seed: u64,
    /// Rows a micro-batch: examples, or packs.
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
    /// The most tokens in a row that several examples share (packing); without it, each has a row of its own.
    pub pack_tokens: Option<usize>,
    /// When to evaluate; the end is always evaluated where there is validation data.
    pub eval_every: Option<Every>,
    /// Whether to evaluate before the first step.
    pub eval_on_start: bool,
    /// Examples a batch in evaluation.
    pub eval_batch_size: usize,
    /// Validation examples answered for the exact match, before the first step and at the end.
    pub eval_generations: usize,
    /// When to save a checkpoint; the end is always saved, and so is the best.
    pub save_every: Option<Every>,
    /// Checkpoints kept, the last and the best at least.
    pub save_total_limit: Option<usize>,
    /// What is done about the best evaluation.
    pub selection: Option<Selection>,
    /// Steps between lines of metrics.
    pub logging_steps: u64,
    /// What a saved state must agree with to be continued.
    pub identity: Identity,
}

impl TrainConfig {
    /// The order of these examples.
    pub fn epochs(&self, examples: &[Example]) -> Epochs {
        Epochs {
            lengths: examples.iter().map(|example| example.ids.len()).collect(),
            micro_batch_size: self.micro_batch_size,
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            shuffle: self.shuffle_data,
            pack_tokens: self.pack_tokens,
            seed: self.seed,
        }
    }

    /// Steps of a whole run.
    pub fn total_steps(&self, epochs: &Epochs) -> u64 {
        self.max_steps.unwrap_or_else(|| epochs.total_steps(self.num_epochs))
    }

    /// What a method is shown of a run over these examples, from the checkpoint folder `resume` if given.
    pub fn preparation<'a>(&self, examples: &'a [Example], resume: Option<&'a Path>) -> Preparation<'a> {
        let epochs = self.epochs(examples);
        let total_steps = self.total_steps(&epochs);
        let length = RunLength {
            learning_rate: self.learning_rate,
            warmup: self.warmup,
            total_steps,
            epochs: total_steps as f64 / epochs.steps(0).max(1) as f64,
        };
        let (seed, micro_batch_size, step) = (self.seed, self.micro_batch_size, self.step);
        Preparation { seed, examples, micro_batch_size, step, length, resume }
    }
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
    /// Something the user should know.
    fn warning(&mut self, message: &str);
}

/// How a run ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// At its end.
    Finished(RunSummary),
    /// Before it, as asked.
    Stopped(Stopped),
}

/// A run that was stopped and can go on.
#[derive(Debug, Clone)]
pub struct Stopped {
    /// Steps finished.
    pub step: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// Micro-batches done of the step in progress.
    pub micro_batches: usize,
    /// Micro-batches of that step.
    pub of: usize,
    /// The folder of the saved state.
    pub checkpoint: PathBuf,
}

/// A finished run.
#[derive(Debug, Clone)]
pub struct RunSummary {
    /// Steps finished in all; fewer than `total` where patience ended the run.
    pub steps: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// Evaluation before the first step.
    pub before: Option<EvalMetrics>,
    /// Evaluation of what was exported.
    pub after: Option<EvalMetrics>,
    /// The best evaluation, where that was asked for.
    pub best: Option<EvalMetrics>,
    /// The step whose state was exported.
    pub exported_step: u64,
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
    pub method: &'a mut dyn Method,
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
    /// Asks the run to save its state and end, once true. Looked at between micro-batches and within evaluations.
    pub stop: &'a AtomicBool,
}

/// The newest complete checkpoint of a run, if it has one.
pub fn latest_checkpoint(output_dir: &Path) -> Option<PathBuf> {
    state::list(output_dir).pop().map(|(_, path)| path)
}

impl Trainer<'_> {
    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.config.total_steps(&self.epochs())
    }

    /// The order of the training examples.
    pub fn epochs(&self) -> Epochs {
        self.config.epochs(self.train)
    }

    /// Checks that the run can go on from the checkpoint folder `path`, before anything is written.
    ///
    /// # Errors
    /// A state of another run (every difference is named), or none at all.
    pub fn require_own(&self, path: &Path) -> Result<(), TrainError> {
        state::require_own(path, &self.config.identity)
    }

    /// Trains, from the checkpoint folder `resume` if given, and exports the result.
    pub fn run(mut self, resume: Option<&Path>, observer: &mut dyn Observer) -> crate::Result<Outcome> {
        if !self.model.parameters().iter().any(|parameter| parameter.trainable) {
            return Err(TrainError::NothingToTrain.into());
        }
        require_vocabulary(self.model, "training data", self.train)?;
        require_vocabulary(self.model, "validation data", self.validation)?;
        let (mut course, mut gradients) = (Course::default(), BTreeMap::new());
        if let Some(path) = resume {
            let (optimizer, identity) = (self.optimizer.as_mut(), &self.config.identity);
            let loaded = state::load(path, self.model, self.method, optimizer, identity)?;
            loaded.warnings.iter().for_each(|warning| observer.warning(warning));
            (course, gradients) = (loaded.course, loaded.gradients);
            self.require_best(&course, path)?;
        }
        self.try_saving(&course, &gradients)?;
        Run::new(self, course, gradients, resume, observer)?.run()
    }

    /// The best state so far must still be there if it may be what is exported.
    fn require_best(&self, course: &Course, resumed: &Path) -> Result<(), TrainError> {
        let output_dir = &self.config.output_dir;
        let exports_best = self.config.selection.is_some_and(|selection| selection.load_best_model_at_end);
        match course.best.as_ref().filter(|_| exports_best).map(|best| state::folder(output_dir, best.step)) {
            Some(best) if !state::is_complete(&best) => Err(TrainError::State {
                path: resumed.to_path_buf(),
                message: format!("its best state so far, {}, is not there any more", best.display()),
            }),
            _ => Ok(()),
        }
    }

    /// A save that must fail should fail now and not after hours: writes everything that a save writes, takes it back,
    /// and asks for the room that the run will need.
    fn try_saving(&self, course: &Course, gradients: &BTreeMap<String, Tensor<2>>) -> Result<(), TrainError> {
        let config = &self.config;
        let artifact = StagedDir::replacing(&config.output_dir.join(self.method.artifact()))?;
        let checkpoint = state::stage(&config.output_dir, &self.snapshot(course, gradients))?;
        let exported = checkpoint.path().join(self.method.artifact());
        let artifact_bytes =
            folder_bytes(&exported).map_err(|source| TrainError::Io { path: exported, source })?;
        drop((artifact, checkpoint));

        let trained = self.model.parameters().into_iter().filter(|parameter| parameter.trainable);
        // Values and two moments in f32, which is what most optimizers remember at most.
        let state_bytes = trained.map(|parameter| 12 * parameter.numel() as u64).sum();
        let every = config.save_every.map(|every| every.steps(self.epochs().steps(0)));
        let saves = 1 + every.map_or(0, |every| self.total_steps().saturating_sub(course.step) / every);
        let there = state::list(&config.output_dir).len();
        let bytes = room(artifact_bytes, state_bytes, config.save_total_limit, there, saves);
        Ok(require_free(&config.output_dir, bytes)?)
    }

    /// What a checkpoint holds.
    pub(super) fn snapshot<'s>(
        &'s self,
        course: &'s Course,
        gradients: &'s BTreeMap<String, Tensor<2>>,
    ) -> Snapshot<'s> {
        Snapshot {
            course,
            identity: &self.config.identity,
            model: self.model,
            method: self.method,
            optimizer: self.optimizer.as_ref(),
            gradients,
        }
    }

    /// Updates the parameters at `progress`; returns the rate. `sum_of_squares` is that of all gradients, by which they are
    /// clipped; where it is not finite, nothing changes but the optimizer's count of updates.
    pub(super) fn update(
        &mut self,
        progress: Progress,
        gradients: BTreeMap<String, Tensor<2>>,
        sum_of_squares: Option<Tensor<1>>,
    ) -> f64 {
        let max_norm = self.config.max_grad_norm.unwrap_or(f64::INFINITY);
        let clip = sum_of_squares.map(|sum_of_squares| Clip { sum_of_squares, max_norm });
        self.apply(progress, gradients, clip)
    }

    /// The same with the gradients, whose norm is known, clipped and given to the method first.
    pub(super) fn update_edited(
        &mut self,
        progress: Progress,
        mut gradients: BTreeMap<String, Tensor<2>>,
        grad_norm: f64,
    ) -> f64 {
        if let Some(factor) = self.config.max_grad_norm.and_then(|max| clip_factor(grad_norm, max)) {
            gradients = gradients.into_iter().map(|(name, g)| (name, clipped(g, factor))).collect();
        }
        self.method.before_update(self.model, &mut gradients, progress);
        self.apply(progress, gradients, None)
    }

    fn apply(
        &mut self,
        progress: Progress,
        gradients: BTreeMap<String, Tensor<2>>,
        clip: Option<Clip>,
    ) -> f64 {
        let Progress { step, total_steps: total } = progress;
        let config = &self.config;
        let factor = config.schedule.factor(step, config.warmup.steps(total), total);
        let (method, peak) = (&*self.method, config.learning_rate);
        update_parameters(self.model, self.optimizer.as_mut(), gradients, clip.as_ref(), |name| {
            method.peak_rate(name, peak) * factor
        });
        peak * factor
    }

    /// What follows the update at `progress`.
    ///
    /// # Errors
    /// What the method says.
    pub(super) fn after_update(&mut self, progress: Progress) -> Result<(), TrainError> {
        let done = Progress { step: progress.step + 1, ..progress };
        self.method.after_update(self.model, self.optimizer.as_mut(), done)?;
        trim_memory(&self.model.device);
        Ok(())
    }

    /// Puts the method's result in its place; returns its folder.
    pub(super) fn export(&self) -> Result<PathBuf, TrainError> {
        let artifact = self.config.output_dir.join(self.method.artifact());
        let staged = StagedDir::replacing(&artifact)?;
        self.method.export(self.model, staged.path())?;
        staged.commit()?;
        Ok(artifact)
    }
}

/// Bytes that a run still needs on its disk: the result, and as many checkpoints as come to stand beside those that
/// are `there`, one more than are kept while the oldest has not gone yet. Without a limit somebody else makes room, and
/// two are asked for.
fn room(artifact: u64, state: u64, limit: Option<usize>, there: usize, saves: u64) -> u64 {
    let at_once = (limit.unwrap_or(1) + 1).saturating_sub(there).max(1) as u64;
    let checkpoints = at_once.min(saves).saturating_mul(artifact.saturating_add(state));
    artifact.saturating_add(checkpoints)
}

/// Bytes of all files below `dir`.
fn folder_bytes(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { folder_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_what_a_run_comes_to_hold() {
        // Three are kept and a fourth is written before one goes; or fewer, where the run saves fewer.
        assert_eq!(room(10, 120, Some(3), 0, 100), 10 + 4 * 130);
        assert_eq!(room(10, 120, Some(3), 0, 2), 10 + 2 * 130);
        assert_eq!(room(10, 120, None, 0, 100), 10 + 2 * 130);
        // After a resume those that are kept are there already.
        assert_eq!(room(10, 120, Some(3), 3, 100), 10 + 130);
        assert_eq!(room(10, 120, Some(3), 9, 100), 10 + 130);
        assert_eq!(room(u64::MAX, 1, None, 0, 1), u64::MAX);
    }
}
