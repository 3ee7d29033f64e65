//! A named tensor of the model.

use crate::kernels::{as_dtype, settled};
use burn::tensor::{DType, Tensor};

/// A tensor with its name in files. Vectors are held as one row `[1, n]`, so that every parameter has one rank.
///
/// The value never belongs to an autodiff graph: a forward that needs gradients reads it through a
/// [`Tape`](super::Tape), which makes a fresh leaf. So the same weights serve passes with and without a graph, and the
/// identity of a parameter in optimizers, files and random streams is its name.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Full name, `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[rows, columns]`, without autodiff.
    pub value: Tensor<2>,
    /// Shape in files, `[n]` or `[rows, columns]`.
    pub shape: Vec<usize>,
    /// Whether training changes it.
    pub trainable: bool,
}

impl Parameter {
    /// A frozen parameter of file shape `[rows, columns]`.
    pub fn matrix(name: impl Into<String>, value: Tensor<2>) -> Self {
        let shape = value.dims().to_vec();
        Self { name: name.into(), value, shape, trainable: false }
    }

    /// Lets training change the parameter, which is held in f32 from then on.
    pub fn set_trainable(&mut self) {
        self.trainable = true;
        self.settle(as_dtype(self.value.clone(), DType::F32));
    }

    /// Gives it a value for the run.
    pub(crate) fn settle(&mut self, value: Tensor<2>) {
        self.value = settled(value);
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.value.shape().num_elements()
    }

    /// The values on the host, row-major, in f32.
    pub fn to_host(&self) -> Vec<f32> {
        let values = self.value.try_to_vec_as::<f32>();
        // burn reports a lost device nowhere else than here; no file or flag of a user's leads to it.
        values.expect("a parameter can be read back from its device")
    }
}
