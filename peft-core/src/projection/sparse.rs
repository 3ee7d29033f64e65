//! The sparse change: trained values at some positions of the weight, nothing elsewhere.

use super::{Form, Parameter, Tape};
use crate::kernels::{BackwardObserver, SparsePattern, SparseTerm, Term};
use burn::tensor::Tensor;
use std::sync::Arc;

/// `ΔW` with few entries. What it adds, `x·ΔWᵀ`, is summed in f32 beside the weight's own product, so that no change is too
/// small for the type of the weight.
#[derive(Debug, Clone)]
pub struct Sparse {
    /// The entries' values, `[entries]`, held as one row; f32.
    pub values: Parameter,
    /// Their positions.
    pub pattern: Arc<SparsePattern>,
    /// Sees each backward while it is there.
    pub observer: Option<Arc<dyn BackwardObserver>>,
}

impl Sparse {
    /// Entries of the module at `path` with `values` `[1, entries]`, frozen.
    pub fn new(path: &str, pattern: Arc<SparsePattern>, values: Tensor<2>) -> Self {
        let values = Parameter {
            name: format!("{path}.sparse_values"),
            shape: vec![pattern.len()],
            value: values,
            trainable: false,
        };
        Self { values, pattern, observer: None }
    }
}

impl Form for Sparse {
    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.values]
    }

    fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.values]
    }

    fn term(&self, tape: &Tape, _path: &str, _weight: &Tensor<2>) -> Term {
        Term::Sparse(SparseTerm {
            values: tape.read(&self.values),
            pattern: self.pattern.clone(),
            observer: self.observer.clone(),
        })
    }

    fn dense(&self, _weight: &Tensor<2>) -> Tensor<2> {
        self.pattern.dense(&self.values.value)
    }
}
