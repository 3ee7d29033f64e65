//! What a fine-tuning method is to the training loop.

use super::error::TrainError;
use super::optimizer::{NamedOptimizer, ParameterOptimizer};
use super::schedule::Warmup;
use super::step::StepSettings;
use crate::data::Example;
use crate::kernels::AdamW;
use crate::model::{Decoder, ModelConfig, ParameterShape};
use burn::tensor::{Tensor, TensorData};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// What a method may look at while it prepares a model.
#[derive(Debug, Clone, Copy)]
pub struct Preparation<'a> {
    /// Seed of the run: initial values derive from it.
    pub seed: u64,
    /// The training examples, in file order.
    pub examples: &'a [Example],
    /// Examples that fit into one micro-batch.
    pub micro_batch_size: usize,
    /// How a step runs.
    pub step: StepSettings,
    /// How long and how fast the run goes.
    pub length: RunLength,
    /// The checkpoint folder that the run goes on from; the trained values in it are read after the preparation.
    pub resume: Option<&'a Path>,
}

/// How long and how fast a run goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunLength {
    /// Peak rate.
    pub learning_rate: f64,
    /// Its rise.
    pub warmup: Warmup,
    /// Optimizer steps in all.
    pub total_steps: u64,
    /// Passes over the data.
    pub epochs: f64,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Steps whose update is done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
}

/// What a method must remember, beyond the trained values and the optimizer's memory, to go on from a checkpoint.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MethodState {
    /// Tensors of f32 or i64 by name.
    pub tensors: BTreeMap<String, TensorData>,
    /// Everything else; null where there is nothing.
    pub json: Value,
}

/// A way to adapt a model: it chooses what trains, acts between steps, and writes the result.
pub trait Method {
    /// The method's name in recipes.
    fn name(&self) -> &'static str;

    /// The subfolder of the run's output that holds the result, `adapter` or `model`.
    fn artifact(&self) -> &'static str;

    /// Attaches the method's parameters to the model and marks what trains.
    ///
    /// # Errors
    /// What stands in the way of it.
    fn prepare(&mut self, model: &mut Decoder, preparation: &Preparation) -> crate::Result<()>;

    /// The optimizer of the method's parameters; `recipe` is the one that the recipe describes.
    fn optimizer(&mut self, recipe: &AdamW) -> Box<dyn ParameterOptimizer> {
        Box::new(NamedOptimizer::new(recipe.clone()))
    }

    /// Names of frozen weights whose dense gradients the step after `progress` is to show, micro-batch by micro-batch, to
    /// [`weight_gradient`](Self::weight_gradient).
    fn watched_weights(&self, _progress: Progress) -> Vec<String> {
        Vec::new()
    }

    /// Is shown the gradient `[out, in]` of a watched weight for one micro-batch, of the step's mean loss: the sum over
    /// the micro-batches is the gradient of the step.
    fn weight_gradient(&mut self, _name: &str, _gradient: Tensor<2>) {}

    /// Acts on the summed gradients of the step after `progress`, by parameter name, before their norm is taken.
    fn after_backward(
        &mut self,
        _model: &Decoder,
        _gradients: &mut BTreeMap<String, Tensor<2>>,
        _progress: Progress,
    ) {
    }

    /// Whether [`before_update`](Self::before_update) does anything. If not, the step need not wait for the size of its
    /// gradients: they are clipped where they are.
    fn acts_on_gradients(&self) -> bool {
        false
    }

    /// Acts on the gradients of the step after `progress`, by parameter name, after clipping and before the update, where
    /// [`acts_on_gradients`](Self::acts_on_gradients) says so.
    fn before_update(
        &mut self,
        _model: &Decoder,
        _gradients: &mut BTreeMap<String, Tensor<2>>,
        _progress: Progress,
    ) {
    }

    /// Acts on model and optimizer after a step, which `progress` counts.
    ///
    /// # Errors
    /// What keeps the run from going on.
    fn after_update(
        &mut self,
        _model: &mut Decoder,
        _optimizer: &mut dyn ParameterOptimizer,
        _progress: Progress,
    ) -> Result<(), TrainError> {
        Ok(())
    }

    /// Peak learning rate of the parameter `name` in a run whose own is `learning_rate`.
    fn peak_rate(&self, _name: &str, learning_rate: f64) -> f64 {
        learning_rate
    }

    /// What the user should know about the preparation.
    fn warnings(&self) -> &[String] {
        &[]
    }

    /// What the method must remember at this moment.
    fn state(&self) -> MethodState {
        MethodState::default()
    }

    /// Takes up what [`state`](Self::state) gave, on a model that [`prepare`](Self::prepare) has seen: afterwards
    /// parameters have the shapes and train or not as they did then. Their trained values are read next.
    ///
    /// # Errors
    /// A message about what is missing from the state or does not fit the model.
    fn restore(&mut self, _model: &mut Decoder, _state: MethodState) -> Result<(), String> {
        Ok(())
    }

    /// Writes the trained result as files into the existing folder `dir`.
    ///
    /// # Errors
    /// A failure to write.
    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError>;
}

/// What a method would train and write, told from the model's shapes before any weight is read.
#[derive(Debug, Clone)]
pub struct MethodPlan {
    /// The decoder as the method leaves it: with a head of its own where it parts a shared weight.
    pub model: ModelConfig,
    /// What trains, and what the method adds without training it.
    pub parameters: Vec<PlannedParameter>,
    /// Bytes of the weights' files that the method writes.
    pub artifact_bytes: u64,
}

/// A parameter that would train or be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedParameter {
    /// Name and shape in files.
    pub shape: ParameterShape,
    /// Path of the module whose result it changes.
    pub module: String,
    /// What it is there.
    pub role: ParameterRole,
    /// Whether it trains.
    pub trainable: bool,
}

/// What a planned parameter is in its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterRole {
    /// A parameter of the checkpoint itself, trained whole.
    Own,
    /// A factor of a low-rank change beside the frozen weight.
    Factor {
        /// `r`.
        rank: usize,
        /// Whether features of the low-rank path's input are dropped in training.
        dropout: bool,
    },
    /// Values at positions of the weight.
    Sparse {
        /// Positions that a selection phase watches the gradient at, none where it watches none.
        candidates: usize,
    },
    /// A factor of a low-rank change that is computed from parameters and not trained itself: it has a gradient, which
    /// becomes theirs, and the optimizer no memory of it.
    Computed {
        /// `r`.
        rank: usize,
        /// Whether features of the low-rank path's input are dropped in training.
        dropout: bool,
    },
    /// A factor on the module's whole result.
    Gain,
    /// A factor on what goes into the module.
    InputGain,
    /// A vector around a frozen low-rank pair that stands beside the frozen weight.
    Scaling {
        /// `r`.
        rank: usize,
        /// Whether features of the pair's input are dropped in training.
        dropout: bool,
    },
    /// Another part that the method adds: a bias, rows of an embedding.
    Part,
}

impl ParameterRole {
    /// Values that the optimizer keeps for each of the parameter's; `usual` of the recipe's optimizer.
    pub fn moments(self, usual: u64) -> u64 {
        match self {
            // Two moments and an age, or sums by row and column alone.
            ParameterRole::Sparse { candidates } => {
                if candidates > 0 {
                    3
                } else {
                    0
                }
            }
            _ => usual,
        }
    }
}

impl PlannedParameter {
    /// A parameter of the checkpoint, trained whole.
    pub fn own(shape: ParameterShape) -> Self {
        Self { module: shape.module().to_string(), shape, role: ParameterRole::Own, trainable: true }
    }
}
