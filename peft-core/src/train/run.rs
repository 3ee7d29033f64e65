//! The training loop: steps, and what happens between them.
//!
//! After a step the state is saved where that is due, then evaluated, and the outcome noted in what was saved. So a run
//! killed at any moment goes on from its newest checkpoint and does again exactly what is not in it.

use super::course::{Course, Window};
use super::error::TrainError;
use super::evaluate::{Generation, evaluate, exact_match};
use super::memory::{peak_memory_bytes, ready_memory};
use super::method::Progress;
use super::metrics::{EvalMetrics, JsonLines, StepMetrics};
use super::selection::{BestMetric, Every};
use super::state;
use super::step::{StepGradients, accumulate, add_gradients, backward};
use super::trainer::{Observer, Outcome, RunSummary, Stopped, Trainer};
use crate::data::{Batch, Epoch, Epochs, Example, Rows, collate, collate_packs};
use crate::kernels::{fault, trim_memory, unless_failed};
use crate::model::Decoder;
use crate::projection::DropoutKey;
use burn::tensor::Device;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A run under way.
pub(super) struct Run<'r, 'a> {
    trainer: Trainer<'a>,
    observer: &'r mut dyn Observer,
    total: u64,
    course: Course,
    /// What the micro-batches of the step in progress have summed.
    sums: StepGradients,
    /// The step whose checkpoint is on disk, where it is that of this run.
    saved: Option<u64>,
    epochs: Epochs,
    /// The epoch of the step asked for last.
    epoch: Epoch,
    metrics: JsonLines,
    generations: JsonLines,
    seconds: f64,
    tokens: u64,
    peak_memory_bytes: Option<u64>,
}

/// A line of `generations.jsonl`.
#[derive(Serialize)]
struct GenerationLine<'g> {
    step: u64,
    #[serde(flatten)]
    generation: &'g Generation,
}

/// Does `work` on `device` after `step` steps; a device that fails in it is its error.
fn on_device<T>(device: &Device, step: u64, work: impl FnOnce() -> crate::Result<T>) -> crate::Result<T> {
    let failed = |message| Err(TrainError::Device { step: step + 1, message }.into());
    unless_failed(device, work).unwrap_or_else(failed)
}

impl<'r, 'a> Run<'r, 'a> {
    /// At its start, or where `course` says. `gradients` are those of a step in progress, and `resumed` is the folder
    /// of the checkpoint that all of it comes from.
    pub fn new(
        trainer: Trainer<'a>,
        course: Course,
        gradients: BTreeMap<String, burn::tensor::Tensor<2>>,
        resumed: Option<&Path>,
        observer: &'r mut dyn Observer,
    ) -> Result<Self, TrainError> {
        let output_dir = &trainer.config.output_dir;
        let file = |name: &str| output_dir.join(name);
        let metrics = JsonLines::open(&file("metrics.jsonl"), |line| course.keeps_metrics(line))?;
        let generations = JsonLines::open(&file("generations.jsonl"), |line| course.keeps_generation(line))?;
        let own = state::folder(output_dir, course.step).canonicalize().ok();
        let is_own = own.is_some() && own == resumed.and_then(|path| path.canonicalize().ok());
        let window = course.window.clone().unwrap_or_default();
        let epochs = trainer.epochs();
        Ok(Self {
            observer,
            total: trainer.total_steps(),
            sums: StepGradients::resumed(gradients, window.loss_sum, window.correct),
            saved: is_own.then_some(course.step),
            epoch: epochs.at(course.step),
            epochs,
            course,
            metrics,
            generations,
            seconds: 0.0,
            tokens: 0,
            peak_memory_bytes: None,
            trainer,
        })
    }

    /// Trains to the end, or until asked to stop.
    pub fn run(mut self) -> crate::Result<Outcome> {
        self.observer.started(self.course.step, self.total);
        ready_memory(self.trainer.model);
        let selection = self.trainer.config.selection;
        let end: fn(Self) -> crate::Result<Outcome> = loop {
            let step = self.course.step;
            let save = step > 0 && (step >= self.total || self.is_due(self.trainer.config.save_every));
            if save && self.course.window.is_none() && self.saved != Some(step) {
                self.on_device(Self::save)?;
            }
            if self.is_evaluation_due() && !self.on_device(Self::evaluate)? {
                break Self::stop;
            }
            if step >= self.total || self.course.is_out_of_patience(selection.as_ref()) {
                break Self::finish;
            }
            if !self.on_device(Self::step)? {
                break Self::stop;
            }
        };
        let (device, step) = (self.trainer.model.device.clone(), self.course.step);
        on_device(&device, step, move || end(self))
    }

    /// Does a part of the run.
    fn on_device<T, E: Into<crate::Error>>(
        &mut self,
        part: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> crate::Result<T> {
        let device = self.trainer.model.device.clone();
        on_device(&device, self.course.step, || part(self).map_err(Into::into))
    }

    fn is_due(&self, every: Option<Every>) -> bool {
        let per_epoch = self.epochs.steps(0);
        every.is_some_and(|every| every.is_due(self.course.step, per_epoch))
    }

    fn is_evaluation_due(&self) -> bool {
        let config = &self.trainer.config;
        let due = match self.course.step {
            0 => config.eval_on_start,
            step => step >= self.total || self.is_due(config.eval_every),
        };
        due && !self.trainer.validation.is_empty() && !self.course.is_evaluated()
    }

    fn is_stopping(&self) -> bool {
        self.trainer.stop.load(Ordering::Relaxed)
    }

    /// The micro-batches of the step after `step`, which the course has come to.
    fn window(&mut self, step: u64) -> Vec<Batch> {
        if step - self.epoch.first_step >= self.epoch.steps.len() as u64 {
            self.epoch = self.epochs.next(&self.epoch);
        }
        self.epoch.steps[(step - self.epoch.first_step) as usize]
            .iter()
            .map(|rows| self.batch(rows))
            .collect()
    }

    /// The batch of a micro-batch's rows.
    fn batch(&self, rows: &Rows) -> Batch {
        let trainer = &self.trainer;
        let rows: Vec<Vec<&Example>> =
            rows.iter().map(|row| row.iter().map(|example| &trainer.train[*example]).collect()).collect();
        match trainer.config.pack_tokens {
            Some(_) => collate_packs(&rows, 0),
            None => collate(&rows.concat(), 0),
        }
    }

    /// One step, or what is left of it; false when stopped before its update.
    fn step(&mut self) -> crate::Result<bool> {
        let start = Instant::now();
        let step = self.course.step;
        let batches = self.window(step);
        let supervised: usize = batches.iter().map(|batch| batch.targets.len()).sum();
        let tokens: usize = batches.iter().flat_map(|batch| &batch.lengths).sum();
        let scale = 1.0 / supervised.max(1) as f64;

        let done = self.course.window.as_ref().map_or(0, |window| window.micro_batches);
        for (micro_batch, batch) in batches.iter().enumerate().skip(done) {
            if self.is_stopping() {
                self.course.window = (micro_batch > 0).then(|| {
                    let (loss_sum, correct) = self.sums.losses();
                    Window { micro_batches: micro_batch, loss_sum, correct }
                });
                return Ok(false);
            }
            self.accumulate(batch, scale, step, micro_batch as u64);
        }
        self.course.window = None;
        let mut sums = std::mem::take(&mut self.sums);
        let progress = Progress { step, total_steps: self.total };
        let Trainer { model, method, .. } = &mut self.trainer;
        model.pull_back(&mut sums.gradients);
        method.after_backward(model, &mut sums.gradients, progress);
        let sum_of_squares = sums.sum_of_squares();
        let gradients = std::mem::take(&mut sums.gradients);
        // The first wait for the device in a step, which hears of what went wrong there.
        let read = |sums: &mut StepGradients| {
            let squares = sum_of_squares.clone().map_or(Ok(0.0), |squares| squares.try_into_scalar::<f32>());
            let squares = squares.map_err(|error| TrainError::Device {
                step: step + 1,
                message: fault().unwrap_or_else(|| error.to_string()),
            })?;
            Ok::<_, TrainError>((sums.losses().0 * scale, f64::from(squares).sqrt()))
        };
        let (rate, loss, grad_norm);
        if self.trainer.method.acts_on_gradients() {
            (loss, grad_norm) = read(&mut sums)?;
            self.require_usable(loss, grad_norm, false)?;
            rate = self.trainer.update_edited(progress, gradients, grad_norm);
        } else {
            // The one wait of the step comes when everything is on its way.
            rate = self.trainer.update(progress, gradients, sum_of_squares.clone());
            (loss, grad_norm) = read(&mut sums)?;
            self.require_usable(loss, grad_norm, true)?;
        }
        self.trainer.after_update(progress)?;
        self.course.step = step + 1;

        let elapsed = start.elapsed().as_secs_f64();
        self.seconds += elapsed;
        self.tokens += tokens as u64;
        self.peak_memory_bytes = peak_memory_bytes(&self.trainer.model.device).max(self.peak_memory_bytes);
        let metrics = StepMetrics {
            step: step + 1,
            epoch: self.epoch.progress(step + 1),
            loss,
            learning_rate: rate,
            grad_norm,
            supervised_tokens: supervised as u64,
            tokens: tokens as u64,
            tokens_per_second: tokens as f64 / elapsed,
            peak_memory_bytes: self.peak_memory_bytes,
        };
        if metrics.step.is_multiple_of(self.trainer.config.logging_steps) || metrics.step == self.total {
            self.metrics.write(&metrics)?;
        }
        self.observer.step(&metrics);
        Ok(true)
    }

    /// Adds loss and gradients of a micro-batch to the sums, and shows the method those of the weights that it watches.
    fn accumulate(&mut self, batch: &Batch, scale: f64, step: u64, micro_batch: u64) {
        let Trainer { model, method, config, .. } = &mut self.trainer;
        let key = DropoutKey { seed: config.seed, step, micro_batch };
        let watched = method.watched_weights(Progress { step, total_steps: self.total });
        if watched.is_empty() {
            return accumulate(model, batch, scale, key, config.step, &mut self.sums);
        }
        let watched: BTreeSet<String> = watched.into_iter().collect();
        let set_trainable = |model: &mut Decoder, trainable| {
            let weights = model.parameters_mut().into_iter().filter(|p| watched.contains(&p.name));
            weights.for_each(|weight| weight.trainable = trainable);
        };
        set_trainable(model, true);
        let gradients = &mut self.sums.gradients;
        let loss = backward(model, batch, scale, key, config.step, &mut |mut new| {
            for name in &watched {
                if let Some(gradient) = new.remove(name) {
                    method.weight_gradient(name, gradient);
                }
            }
            add_gradients(gradients, new);
        });
        self.sums.add_loss(loss);
        set_trainable(model, false);
    }

    /// Refuses a step on which the device failed or whose loss or gradients are not finite. `updated` says that the update
    /// was made already, which has changed no value then.
    fn require_usable(&mut self, loss: f64, grad_norm: f64, updated: bool) -> Result<(), TrainError> {
        // Reading has waited for the device: what went wrong in this step is known now.
        if let Some(message) = fault() {
            return Err(TrainError::Device { step: self.course.step + 1, message });
        }
        let Some((what, value)) =
            [("loss", loss), ("gradient norm", grad_norm)].into_iter().find(|(_, value)| !value.is_finite())
        else {
            return Ok(());
        };
        if updated {
            self.trainer.optimizer.take_back();
        }
        Err(self.not_finite(what, value))
    }

    /// The error of a step without a usable gradient, which has not been applied: the weights are still those of the
    /// last good step, and are saved.
    fn not_finite(&mut self, what: &'static str, value: f64) -> TrainError {
        let step = self.course.step;
        let saved = match self.checkpoint() {
            Ok(path) => format!("the state before this step is in {}", path.display()),
            Err(error) => format!("and the state before this step could not be saved: {error}"),
        };
        TrainError::NonFinite { step: step + 1, what, value, saved }
    }

    /// Evaluates after the present step; false when stopped meanwhile, as if nothing had been done.
    fn evaluate(&mut self) -> crate::Result<bool> {
        let step = self.course.step;
        let (trainer, config) = (&self.trainer, &self.trainer.config);
        let (model, batch_size, chunk) =
            (&*trainer.model, config.eval_batch_size, config.step.loss_chunk_rows);
        // Steps and evaluations have buffers of different sizes: neither should lie idle beside the other.
        let let_go = || (0..2).for_each(|_| trim_memory(&model.device));
        let_go();
        let evaluation = evaluate(model, trainer.validation, batch_size, chunk, || !self.is_stopping());
        let_go();
        let mut metrics = EvalMetrics {
            step,
            eval_loss: evaluation.loss,
            eval_perplexity: evaluation.perplexity,
            eval_token_accuracy: evaluation.token_accuracy,
            eval_exact_match: None,
        };
        let selection = config.selection.as_ref();
        let asks_answers = selection.is_some_and(|s| s.metric == BestMetric::EvalExactMatch);
        let ends = |metrics: &EvalMetrics| {
            let mut course = self.course.clone();
            course.record(metrics.clone(), selection);
            let last = step >= self.total || course.is_out_of_patience(selection);
            step == 0 || last && course.exported_step(selection) == step
        };
        let mut answers = Vec::new();
        if config.eval_generations > 0 && (asks_answers || ends(&metrics)) {
            answers = self.answers()?;
            metrics.eval_exact_match = Some(share_matched(&answers));
        }
        if self.is_stopping() {
            return Ok(false);
        }
        if ends(&metrics) {
            self.write_answers(step, &answers)?;
        }
        self.metrics.write(&metrics)?;
        let selection = self.trainer.config.selection;
        self.course.record(metrics.clone(), selection.as_ref());
        let is_best = self.course.best.as_ref().is_some_and(|best| best.step == step);
        if self.saved == Some(step) {
            self.sync()?;
            state::update_course(&self.trainer.config.output_dir, &self.course)?;
        } else if is_best {
            self.save()?;
        }
        self.observer.evaluated(&metrics);
        Ok(true)
    }

    /// Answers to the first validation examples; not all of them when stopped meanwhile.
    fn answers(&self) -> crate::Result<Vec<Generation>> {
        let trainer = &self.trainer;
        let count = trainer.config.eval_generations.min(trainer.validation.len());
        let examples = &trainer.validation[..count];
        let batch_size = trainer.config.eval_batch_size;
        exact_match(trainer.model, trainer.tokenizer, examples, batch_size, || !self.is_stopping())
    }

    fn write_answers(&mut self, step: u64, answers: &[Generation]) -> Result<(), TrainError> {
        answers.iter().try_for_each(|generation| self.generations.write(&GenerationLine { step, generation }))
    }

    fn sync(&self) -> Result<(), TrainError> {
        self.metrics.sync()?;
        self.generations.sync()
    }

    /// The checkpoint of the present state, saved if it is not yet.
    fn checkpoint(&mut self) -> Result<PathBuf, TrainError> {
        let step = self.course.step;
        if self.saved == Some(step) && self.course.window.is_none() {
            return Ok(state::folder(&self.trainer.config.output_dir, step));
        }
        self.save()
    }

    fn save(&mut self) -> Result<PathBuf, TrainError> {
        self.sync()?;
        let config = &self.trainer.config;
        let snapshot = self.trainer.snapshot(&self.course, &self.sums.gradients);
        let path = state::save(&config.output_dir, &snapshot)?;
        let mut keep = vec![self.course.step];
        keep.extend(self.course.best.as_ref().map(|best| best.step));
        state::prune(&config.output_dir, config.save_total_limit, &keep)?;
        self.saved = Some(self.course.step);
        self.observer.saved(&path);
        Ok(path)
    }

    /// Ends before the end.
    fn stop(mut self) -> crate::Result<Outcome> {
        let checkpoint = self.checkpoint()?;
        let step = self.course.step;
        let micro_batches = self.course.window.as_ref().map_or(0, |window| window.micro_batches);
        let of = self.window(step).len();
        Ok(Outcome::Stopped(Stopped { step, total: self.total, micro_batches, of, checkpoint }))
    }

    /// Exports the last state or the best, with the answers that belong to it.
    fn finish(mut self) -> crate::Result<Outcome> {
        self.checkpoint()?;
        let selection = self.trainer.config.selection;
        let output_dir = self.trainer.config.output_dir.clone();
        let exported_step = self.course.exported_step(selection.as_ref());
        let mut after = self.course.latest.clone();
        if exported_step != self.course.step {
            let Trainer { model, method, .. } = &mut self.trainer;
            state::load_values(&state::folder(&output_dir, exported_step), model, *method)?;
            after = self.course.best.clone();
        }
        let unanswered = |metrics: &&mut EvalMetrics| metrics.eval_exact_match.is_none();
        let answers_missing = after.as_mut().filter(unanswered).is_some();
        if answers_missing && self.trainer.config.eval_generations > 0 {
            let answers = self.answers()?;
            if self.is_stopping() {
                return self.stop();
            }
            self.write_answers(exported_step, &answers)?;
            if let Some(after) = &mut after {
                after.eval_exact_match = Some(share_matched(&answers));
            }
        }
        self.sync()?;
        let artifact = self.trainer.export()?;
        Ok(Outcome::Finished(RunSummary {
            steps: self.course.step,
            total: self.total,
            before: self.course.before,
            after,
            best: self.course.best,
            exported_step,
            seconds: self.seconds,
            tokens: self.tokens,
            // Saving and evaluating may have taken more than any step.
            peak_memory_bytes: peak_memory_bytes(&self.trainer.model.device).max(self.peak_memory_bytes),
            artifact,
        }))
    }
}

fn share_matched(answers: &[Generation]) -> f64 {
    let matched = answers.iter().filter(|answer| answer.matched).count();
    matched as f64 / answers.len().max(1) as f64
}
