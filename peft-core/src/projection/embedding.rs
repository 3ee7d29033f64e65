//! The embedding: rows of a weight by token id, with an optional low-rank change and rows trained alone.
//!
//! The change is `ΔW = s·(B·A)ᵀ` with `A` `[r, vocab]` and `B` `[hidden, r]`, the layout of PEFT's files. With DoRA the
//! columns of `W + ΔW` have trained lengths.

use super::{Form, LowRank, Parameter, Tape};
use crate::kernels::{LowRankTerm, Term, Up, as_dtype};
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};

/// An embedding with at most one change of all rows, or some rows replaced.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// The module's path in the checkpoint, `model.embed_tokens`.
    pub path: String,
    /// `W`, `[vocab, hidden]`.
    pub weight: Parameter,
    /// A change of all rows.
    pub delta: Option<LowRank>,
    /// Rows in place of the weight's.
    pub rows: Option<TokenRows>,
}

impl Embedding {
    /// Embeddings of the tokens, `[tokens, hidden]`.
    pub fn forward(&self, tape: &Tape, ids: Tensor<1, Int>, dtype: DType) -> Tensor<2> {
        let mut x = as_dtype(tape.read(&self.weight).select(0, ids.clone()), dtype);
        if let Some(form) = &self.delta {
            let down = tape.read(&form.a).select(1, ids.clone()).transpose().mul_scalar(form.scale);
            let up = tape.read(&form.b).transpose();
            x = x + as_dtype(down.matmul(up), dtype);
            if let Some(magnitude) = &form.magnitude {
                let (weight, a, b) = (self.weight.value.clone().transpose(), &form.a.value, &form.b.value);
                x = x * as_dtype(magnitude.gain(tape, &weight, a, b, form.scale), dtype);
            }
        }
        match &self.rows {
            Some(rows) => rows.replace(tape, x, ids),
            None => x,
        }
    }

    /// What the change adds to a head that shares the weight: there it is `s·Aᵀ·Bᵀ`, `[vocab, hidden]`.
    pub fn head_term(&self, tape: &Tape) -> Option<Term> {
        let term = |form: &LowRank| LowRankTerm {
            a: tape.read(&form.b).transpose(),
            b: Up::Matrix(tape.read(&form.a).transpose()),
            bias: None,
            gain: None,
            scale: form.scale,
            dropout: tape.dropout("lm_head", form.dropout),
        };
        self.delta.as_ref().map(|form| Term::LowRank(term(form)))
    }

    /// Every parameter: weight, change, rows.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let delta = self.delta.iter().flat_map(LowRank::parameters);
        let rows = self.rows.as_ref().map(|rows| &rows.values);
        std::iter::once(&self.weight).chain(delta).chain(rows)
    }

    /// Every parameter, to be changed.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        let delta = self.delta.iter_mut().flat_map(LowRank::parameters_mut);
        let rows = self.rows.as_mut().map(|rows| &mut rows.values);
        std::iter::once(&mut self.weight).chain(delta).chain(rows)
    }
}

/// Some rows of an embedding or head that stand in place of the weight's own (PEFT's trainable tokens).
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// The token of each row, distinct.
    pub indices: Vec<u32>,
    /// `[tokens, hidden]`.
    pub values: Parameter,
    /// By token: its row, 0 where it has none.
    slots: Tensor<1, Int>,
    /// By token: 1 where it has a row, `[vocab, 1]`.
    has_row: Tensor<2>,
    indices_on_device: Tensor<1, Int>,
}

impl TokenRows {
    /// Rows named `name` for the distinct tokens `indices` below `vocab`; `values` is `[indices, hidden]`.
    pub fn new(name: String, indices: Vec<u32>, values: Tensor<2>, vocab: usize, device: &Device) -> Self {
        let mut slots = vec![0i64; vocab];
        let mut has_row = vec![0f32; vocab];
        for (slot, token) in indices.iter().enumerate() {
            slots[*token as usize] = slot as i64;
            has_row[*token as usize] = 1.0;
        }
        let on_device: Vec<i64> = indices.iter().map(|token| i64::from(*token)).collect();
        let integers = |v: Vec<i64>| {
            let length = v.len();
            Tensor::<1, Int>::from_data(TensorData::new(v, [length]), device)
        };
        Self {
            values: Parameter::matrix(name, values),
            slots: integers(slots),
            has_row: Tensor::from_data(TensorData::new(has_row, [vocab, 1]), (device, DType::F32)),
            indices_on_device: integers(on_device),
            indices,
        }
    }

    /// Embeddings `x` `[tokens, hidden]` of `ids` with those of the replaced rows put in.
    fn replace(&self, tape: &Tape, x: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
        let dtype = x.dtype();
        let rows = tape.read(&self.values).select(0, self.slots.clone().select(0, ids.clone()));
        let chosen = as_dtype(self.has_row.clone().select(0, ids), dtype);
        let others = chosen.clone().neg().add_scalar(1.0);
        x * others + as_dtype(rows, dtype) * chosen
    }

    /// Logits `[tokens, vocab]` of the head `weight` on `x` `[tokens, hidden]`, with those of the replaced rows put in:
    /// their columns change by `x·(rows − own rows)ᵀ`.
    pub fn replace_logits(
        &self,
        tape: &Tape,
        logits: Tensor<2>,
        x: Tensor<2>,
        weight: &Tensor<2>,
    ) -> Tensor<2> {
        let own = as_dtype(weight.clone().select(0, self.indices_on_device.clone()), DType::F32);
        let difference = tape.read(&self.values) - own;
        let change = x.clone().matmul(as_dtype(difference, x.dtype()).transpose());
        logits.select_assign(1, self.indices_on_device.clone(), change, IndexingUpdateOp::Add)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn replaced_rows_stand_at_both_ends() {
        let device = Device::flex();
        let matrix =
            |v: Vec<f32>, dims: [usize; 2]| Tensor::<2>::from_data(TensorData::new(v, dims), &device);
        let weight = Parameter::matrix("w", matrix(vec![1., 2., 3., 4., 5., 6.], [3, 2]));
        let rows =
            TokenRows::new("r".to_string(), vec![2, 0], matrix(vec![9., 8., 7., 6.], [2, 2]), 3, &device);
        let embedding =
            Embedding { path: "e".to_string(), weight: weight.clone(), delta: None, rows: Some(rows) };
        let ids = Tensor::<1, Int>::from_data(TensorData::new(vec![0i64, 1, 2], [3]), &device);
        let tape = Tape::inference();
        let x: Vec<f32> = embedding.forward(&tape, ids, DType::F32).try_into_vec_as().unwrap();
        assert_eq!(x, [7., 6., 3., 4., 9., 8.]);

        let hidden = matrix(vec![1., -1.], [1, 2]);
        let logits = hidden.clone().matmul(weight.value.clone().transpose());
        let rows = embedding.rows.as_ref().unwrap();
        let logits: Vec<f32> =
            rows.replace_logits(&tape, logits, hidden, &weight.value).try_into_vec_as().unwrap();
        assert_eq!(logits, [1., -1., 1.]);
    }
}
