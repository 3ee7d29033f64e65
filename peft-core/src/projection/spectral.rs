//! A trained core between the main singular directions of a weight, whose left ones train for a while (LaMDA, Azizi et al.,
//! arXiv 2406.12832):
//!
//! ```text
//! ΔW = s·(B·S − B₀·S₀)·A
//! ```
//!
//! `B₀·S₀` is what the base is lessened by, so that training starts at it, or nothing. Everything lies in the row space of
//! the frozen `A`: the change has rank `r` on the weight as it is in its file, which itself is left alone.
//!
//! Columns of `B` stop training one after another. Those that have are no part of the parameter any more, so that neither
//! gradient, momentum nor decay reaches them, and nobody keeps anything for them.

use super::{Form, Parameter, Tape};
use crate::kernels::{LowRankTerm, Term, Up};
use burn::tensor::Tensor;

/// Singular directions, a core, and what of them is taken off.
#[derive(Debug, Clone)]
pub struct Spectral {
    /// `A`, `[r, in]`, f32, which never trains.
    pub a: Parameter,
    /// The columns of `B` that train, `[out, r − f]`, f32; all of them, not trainable, once none does.
    pub b: Parameter,
    /// `S`, `[r, r]`, f32.
    pub core: Parameter,
    /// The first `f` columns of `B`, where some are frozen and some are not.
    pub frozen: Option<Tensor<2>>,
    /// `B₀·S₀`, `[out, r]`, f32.
    pub offset: Option<Parameter>,
    /// `s`.
    pub scale: f64,
    /// Probability of dropping an input feature of the path in training.
    pub dropout: f64,
}

impl Spectral {
    /// `r`.
    pub fn rank(&self) -> usize {
        self.core.value.dims()[0]
    }

    /// All of `B`, `[out, r]`.
    pub fn whole_b(&self) -> Tensor<2> {
        let own = self.b.value.clone();
        match &self.frozen {
            Some(frozen) => Tensor::cat(vec![frozen.clone(), own], 1),
            None => own,
        }
    }

    /// How many columns of `B` are frozen.
    pub fn frozen_columns(&self) -> usize {
        match &self.frozen {
            Some(frozen) => frozen.dims()[1],
            None if self.b.trainable => 0,
            None => self.rank(),
        }
    }

    /// Lets all but the first `columns` columns of `B` train.
    pub fn set_frozen(&mut self, columns: usize) {
        let whole = self.whole_b();
        let [rows, rank] = whole.dims();
        let columns = columns.min(rank);
        self.b.trainable = columns < rank;
        let split = columns > 0 && columns < rank;
        self.frozen = split.then(|| whole.clone().slice([0..rows, 0..columns]));
        self.b.value = if split { whole.slice([0..rows, columns..rank]) } else { whole };
        self.b.shape = self.b.value.dims().to_vec();
    }

    /// `s·(B·S − B₀·S₀)`, `[out, r]`.
    fn factor(&self) -> Tensor<2> {
        let factor = Up::Core {
            b: self.b.value.clone(),
            core: self.core.value.clone(),
            frozen: self.frozen.clone(),
            offset: self.offset.as_ref().map(|offset| offset.value.clone()),
        };
        factor.factor().mul_scalar(self.scale)
    }
}

impl Form for Spectral {
    fn parameters(&self) -> Vec<&Parameter> {
        [&self.a, &self.b, &self.core].into_iter().chain(&self.offset).collect()
    }

    fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        [&mut self.a, &mut self.b, &mut self.core].into_iter().chain(&mut self.offset).collect()
    }

    fn term(&self, tape: &Tape, path: &str, _weight: &Tensor<2>) -> Term {
        let a = self.a.value.clone();
        let term =
            |b, dropout| LowRankTerm { a: a.clone(), b, bias: None, gain: None, scale: self.scale, dropout };
        let product = |offset: Option<&Parameter>| Up::Core {
            b: tape.read(&self.b),
            core: tape.read(&self.core),
            frozen: self.frozen.clone(),
            offset: offset.map(|offset| offset.value.clone()),
        };
        match (&self.offset, tape.dropout(path, self.dropout)) {
            // What the base is lessened by meets the input as the base does.
            (Some(offset), Some(dropout)) => Term::Sum(vec![
                term(product(None), Some(dropout)),
                term(Up::Matrix(offset.value.clone().neg()), None),
            ]),
            (offset, dropout) => Term::LowRank(term(product(offset.as_ref()), dropout)),
        }
    }

    fn dense(&self, _weight: &Tensor<2>) -> Tensor<2> {
        self.factor().matmul(self.a.value.clone())
    }

    fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        Some((self.factor(), self.a.value.clone()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::kernels::{LinearInput, dropout};
    use crate::projection::{Delta, DropoutKey, Projection, project};
    use crate::random::Stream;
    use burn::tensor::{Device, TensorData};

    const SCALE: f64 = 0.5;
    const KEY: DropoutKey = DropoutKey { seed: 0, step: 0, micro_batch: 0 };

    fn random(dims: [usize; 2], seed: u64) -> Tensor<2> {
        let mut stream = Stream::new(seed, "spectral", "", &[]);
        let values: Vec<f32> = (0..dims[0] * dims[1]).map(|_| stream.normal() as f32).collect();
        Tensor::from_data(TensorData::new(values, dims), &Device::flex())
    }

    fn parameter(name: &str, value: Tensor<2>, trainable: bool) -> Parameter {
        Parameter { trainable, ..Parameter::matrix(name, value) }
    }

    fn form(offset: bool, dropout: f64) -> Spectral {
        Spectral {
            a: parameter("a", random([3, 5], 1), false),
            b: parameter("b", random([7, 3], 2), true),
            core: parameter("s", random([3, 3], 3), true),
            frozen: None,
            offset: offset.then(|| parameter("o", random([7, 3], 4), false)),
            scale: SCALE,
            dropout,
        }
    }

    fn projection(form: Spectral) -> Projection {
        Projection {
            path: "p".to_string(),
            weight: Parameter::matrix("w", random([7, 5], 6)),
            bias: None,
            delta: Some(Delta::Spectral(form)),
        }
    }

    fn assert_close(found: Tensor<2>, expected: Tensor<2>) {
        assert_eq!(found.dims(), expected.dims());
        let largest = (found - expected).abs().max().into_scalar::<f32>();
        assert!(largest < 1e-5, "{largest}");
    }

    /// `∂/∂S = s·(ḡ·B)ᵀ·z`, `∂/∂B = s·ḡᵀ·u` of the columns that train, with `z = x·Aᵀ` and `u = z·Sᵀ`; `A` has none.
    #[test]
    fn gradients_are_the_papers() {
        for (offset, frozen) in [(false, 0), (true, 0), (true, 2), (false, 3)] {
            let mut form = form(offset, 0.0);
            form.set_frozen(frozen);
            assert_eq!(form.frozen_columns(), frozen);
            let (a, b, s) = (form.a.value.clone(), form.whole_b(), form.core.value.clone());
            assert_close(b.clone(), random([7, 3], 2));
            let here = projection(form);
            let (x, dy) = (random([4, 5], 7), random([4, 7], 8));
            let tape = Tape::recording(KEY);
            let leaf = x.clone().autodiff().require_grad();
            let y = project(&tape, &[&here], LinearInput::Plain(leaf.clone()), None);
            let weight = here.weight.value.clone();
            let folded = weight.clone() + here.delta.as_ref().unwrap().dense(&weight);
            assert_close(y.clone().inner(), x.clone().matmul(folded.clone().transpose()));

            let mut grads = (y * dy.clone().autodiff()).sum().backward();
            assert_close(leaf.grad_remove(&mut grads).unwrap(), dy.clone().matmul(folded));
            let mut gradients = tape.gradients(&mut grads);
            let z = x.matmul(a.transpose());
            let u = z.clone().matmul(s.transpose());
            let of_core = dy.clone().matmul(b).transpose().matmul(z).mul_scalar(SCALE);
            assert_close(gradients.remove("s").unwrap(), of_core);
            if frozen < 3 {
                let of_b = dy.transpose().matmul(u).mul_scalar(SCALE).slice([0..7, frozen..3]);
                assert_close(gradients.remove("b").unwrap(), of_b);
            }
            assert!(gradients.is_empty(), "{:?}", gradients.keys());
        }
    }

    /// With dropout the path sees the dropped input, and what is taken off the base the whole one.
    #[test]
    fn dropout_spares_what_is_taken_off() {
        let form = form(true, 0.5);
        let x = random([4, 5], 7);
        let here = projection(form.clone());
        let y = project(&Tape::untracked(KEY), &[&here], LinearInput::Plain(x.clone()), None);
        let dropped = dropout(x.clone(), Tape::untracked(KEY).dropout("p", 0.5).unwrap());
        let path = form
            .b
            .value
            .clone()
            .matmul(form.core.value.clone())
            .mul_scalar(SCALE)
            .matmul(form.a.value.clone());
        let taken = form.offset.unwrap().value.matmul(form.a.value).mul_scalar(SCALE);
        let base = here.weight.value - taken;
        assert_close(y, x.clone().matmul(base.transpose()) + dropped.matmul(path.transpose()));
    }

    #[test]
    fn columns_freeze_and_thaw() {
        let mut form = form(true, 0.0);
        let before: Vec<f32> = form.dense(&random([7, 5], 6)).try_into_vec_as().unwrap();
        for columns in [1, 3, 2, 0, 9] {
            form.set_frozen(columns);
            let columns = columns.min(3);
            assert_eq!((form.frozen_columns(), form.b.trainable), (columns, columns < 3));
            let trained = if columns == 3 { 3 } else { 3 - columns };
            assert_eq!(form.b.shape, [7, trained]);
            let now: Vec<f32> = form.dense(&random([7, 5], 6)).try_into_vec_as().unwrap();
            assert!(now.iter().zip(&before).all(|(n, b)| (n - b).abs() < 1e-5));
        }
    }
}
