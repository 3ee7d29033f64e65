//! Reading parameters with or without an autodiff graph.

use super::Parameter;
use crate::kernels::Dropout;
use crate::random::Stream;
use burn::tensor::{Gradients, Tensor};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Names the dropout streams of one micro-batch: the recomputed forward of a layer draws what the first one drew.
#[derive(Debug, Clone, Copy)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// Optimizer step.
    pub step: u64,
    /// Micro-batch within the step.
    pub micro_batch: u64,
}

/// Is shown a projection's path and its input `[tokens, in]`.
pub type InputObserver<'a> = &'a dyn Fn(&str, &Tensor<2>);

/// Hands parameters to a forward pass and remembers the leaves whose gradients are wanted.
pub struct Tape<'a> {
    leaves: Option<RefCell<BTreeMap<String, Tensor<2>>>>,
    dropout: Option<DropoutKey>,
    observer: Option<InputObserver<'a>>,
    recomputes: bool,
}

impl<'a> Tape<'a> {
    /// No graph and no dropout: inference.
    pub fn inference() -> Self {
        Self { leaves: None, dropout: None, observer: None, recomputes: false }
    }

    /// Inference that shows every projection's input to `observer` before it is used.
    pub fn observing(observer: InputObserver<'a>) -> Self {
        Self { leaves: None, dropout: None, observer: Some(observer), recomputes: false }
    }

    /// No graph, with the dropout of training: the first pass over layers that are computed again in the backward.
    pub fn untracked(dropout: DropoutKey) -> Self {
        Self { leaves: None, dropout: Some(dropout), observer: None, recomputes: false }
    }

    /// Trainable parameters become leaves of an autodiff graph.
    pub fn recording(dropout: DropoutKey) -> Self {
        Self { leaves: Some(RefCell::default()), dropout: Some(dropout), observer: None, recomputes: false }
    }

    /// The same with cheap operations computed again in the backward instead of kept, where `recompute` says so.
    pub fn recomputing(self, recompute: bool) -> Self {
        Self { recomputes: recompute, ..self }
    }

    /// Whether the backward is to compute cheap operations again.
    pub fn recomputes(&self) -> bool {
        self.recomputes
    }

    pub(super) fn observes(&self) -> bool {
        self.observer.is_some()
    }

    pub(super) fn observe(&self, path: &str, x: &Tensor<2>) {
        if let Some(observer) = self.observer {
            observer(path, x);
        }
    }

    /// The parameter's value; on a recording tape, the parameter's leaf if it trains.
    pub fn read(&self, parameter: &Parameter) -> Tensor<2> {
        match parameter.trainable {
            true => self.leaf(&parameter.name, &parameter.value),
            false => parameter.value.clone(),
        }
    }

    /// `value`; on a recording tape, the leaf of that name.
    pub(super) fn leaf(&self, name: &str, value: &Tensor<2>) -> Tensor<2> {
        match &self.leaves {
            Some(leaves) => leaves
                .borrow_mut()
                .entry(name.to_string())
                .or_insert_with(|| value.clone().autodiff().require_grad())
                .clone(),
            None => value.clone(),
        }
    }

    /// What the module at `path` drops of its input, each element with probability `p`. `None` outside training or for
    /// `p` = 0.
    pub fn dropout(&self, path: &str, p: f64) -> Option<Dropout> {
        let key = self.dropout.filter(|_| p > 0.0)?;
        let mut stream = Stream::new(key.seed, "dropout", path, &[key.step, key.micro_batch]);
        Some(Dropout { p, key: stream.next_u64() })
    }

    /// Takes the gradients of all leaves read so far, by parameter name. A leaf that the result did not depend on has
    /// none.
    pub fn gradients(self, gradients: &mut Gradients) -> BTreeMap<String, Tensor<2>> {
        let leaves = self.leaves.map(RefCell::into_inner).unwrap_or_default();
        leaves
            .into_iter()
            .filter_map(|(name, leaf)| leaf.grad_remove(gradients).map(|gradient| (name, gradient)))
            .collect()
    }
}
