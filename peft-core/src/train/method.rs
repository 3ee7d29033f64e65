//! What a fine-tuning method is to the training loop.

use super::error::TrainError;
use super::step::StepSettings;
use crate::data::Example;
use crate::model::Decoder;
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
