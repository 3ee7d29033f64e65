//! What a fine-tuning method is to the training loop.

use super::error::TrainError;
use super::step::StepSettings;
use crate::data::Example;
use crate::model::{Decoder, ModelConfig, ParameterShape};
use burn::tensor::Tensor;
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
    /// The checkpoint folder that the run goes on from; the trained values in it are read after the preparation.
    pub resume: Option<&'a Path>,
}

/// A way to adapt a model: it chooses what trains, and writes the result.
pub trait Method {
    /// The method's name in recipes.
    fn name(&self) -> &'static str;

    /// The subfolder of the run's output that holds the result, `adapter` or `model`.
    fn artifact(&self) -> &'static str;

    /// Attaches the method's parameters to the model and marks what trains.
    fn prepare(&self, model: &mut Decoder, preparation: &Preparation) -> crate::Result<()>;

    /// Acts on the step's gradients, by parameter name, after clipping and before the update.
    fn before_update(&self, _model: &Decoder, _gradients: &mut BTreeMap<String, Tensor<2>>) {}

    /// Peak learning rate of the parameter `name` in a run whose own is `learning_rate`.
    fn peak_rate(&self, _name: &str, learning_rate: f64) -> f64 {
        learning_rate
    }

    /// Writes the trained result as files into the existing folder `dir`.
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
    /// A factor on the module's whole result.
    Gain,
    /// Another part that the method adds: a bias, rows of an embedding.
    Part,
}

impl PlannedParameter {
    /// A parameter of the checkpoint, trained whole.
    pub fn own(shape: ParameterShape) -> Self {
        Self { module: shape.module().to_string(), shape, role: ParameterRole::Own, trainable: true }
    }
}
