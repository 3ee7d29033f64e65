//! What a selection phase sees of a module's dense gradient.
//!
//! The whole gradient is computed once, in the first micro-batch of the phase, for one module at a time and no longer than
//! it takes to find its largest entries. From then on only those are.

use super::host;
use super::selection::Candidates;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::kernels::{BackwardObserver, SparsePattern, largest_products, sampled_products};
use peft_core::linalg::NotFinite;
use std::sync::{Mutex, PoisonError};

/// Collects the gradient of one module's weight.
#[derive(Debug)]
pub struct Collector {
    /// How many candidates there are to be.
    count: usize,
    seen: Mutex<Seen>,
}

/// What was seen so far.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // There is one a module.
enum Seen {
    /// Nothing.
    Nothing,
    /// Something that has no order.
    NotFinite(NotFinite),
    /// Σg and Σg² at the candidates, `[1, candidates]`, over so many micro-batches.
    Gradients { pattern: SparsePattern, sums: Tensor<2>, squares: Tensor<2>, samples: u64 },
}

/// Why a phase has no candidates.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectorError {
    /// The gradient of the first micro-batch cannot be ordered.
    #[error("its gradient is not finite: {0}")]
    NotFinite(NotFinite),
    /// No backward passed.
    #[error("no gradient of it was seen")]
    Nothing,
}

impl Collector {
    /// For the `count` largest entries of the gradient of a weight.
    pub fn new(count: usize) -> Self {
        Self { count, seen: Mutex::new(Seen::Nothing) }
    }

    /// One that has seen `candidates` already.
    ///
    /// # Errors
    /// A message where they are none of a matrix of that shape.
    pub fn resumed(dims: [usize; 2], candidates: Candidates, device: &Device) -> Result<Self, String> {
        let Candidates { positions, sums, squares, samples } = candidates;
        let count = positions.len();
        let pattern = SparsePattern::new(dims, positions).map_err(|error| error.to_string())?;
        if sums.len() != count || squares.len() != count {
            return Err(format!("{} and {} sums for {count} candidates", sums.len(), squares.len()));
        }
        let tensor = |values| Tensor::from_data(TensorData::new(values, [1, count]), (device, DType::F32));
        let seen = Seen::Gradients { pattern, sums: tensor(sums), squares: tensor(squares), samples };
        Ok(Self { count, seen: Mutex::new(seen) })
    }

    /// What was collected.
    ///
    /// # Errors
    /// Nothing, or what has no order.
    pub fn candidates(&self) -> Result<Candidates, CollectorError> {
        match &*self.seen.lock().unwrap_or_else(PoisonError::into_inner) {
            Seen::Nothing => Err(CollectorError::Nothing),
            Seen::NotFinite(error) => Err(CollectorError::NotFinite(*error)),
            Seen::Gradients { pattern, sums, squares, samples } => Ok(Candidates {
                positions: pattern.positions().to_vec(),
                sums: host(sums),
                squares: host(squares),
                samples: *samples,
            }),
        }
    }

    /// The first micro-batch: candidates are where its gradient is largest.
    fn first(&self, x: &Tensor<2>, dy: &Tensor<2>) -> Seen {
        match largest_products(x.clone(), dy.clone(), self.count) {
            Ok((pattern, sums)) => {
                Seen::Gradients { pattern, squares: sums.clone().square(), sums, samples: 1 }
            }
            Err(error) => Seen::NotFinite(error),
        }
    }
}

impl BackwardObserver for Collector {
    fn observe(&self, x: &Tensor<2>, dy: &Tensor<2>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *seen {
            Seen::Nothing => *seen = self.first(x, dy),
            Seen::NotFinite(_) => {}
            Seen::Gradients { pattern, sums, squares, samples } => {
                let gradient = sampled_products(x.clone(), dy.clone(), pattern);
                *sums = sums.clone() + gradient.clone();
                *squares = squares.clone() + gradient.square();
                *samples += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn matrix(values: Vec<f32>, dims: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values, dims), &Device::flex())
    }

    /// Two tokens; dyᵀ·x of the first micro-batch is [[1, 2, −3], [4, 0, 1]].
    fn first() -> (Tensor<2>, Tensor<2>) {
        (matrix(vec![1., 2., -3., 4., 0., 1.], [2, 3]), matrix(vec![1., 0., 0., 1.], [2, 2]))
    }

    #[test]
    fn the_largest_of_the_first_are_followed() {
        let collector = Collector::new(2);
        assert_eq!(collector.candidates(), Err(CollectorError::Nothing));
        let (x, dy) = first();
        collector.observe(&x, &dy);
        let expected =
            Candidates { positions: vec![2, 3], sums: vec![-3., 4.], squares: vec![9., 16.], samples: 1 };
        assert_eq!(collector.candidates(), Ok(expected));
        // [[0, 0, 2], [−1, 0, 9]]: the 9 is at no candidate.
        collector.observe(&matrix(vec![0., 0., 2., -1., 0., 9.], [2, 3]), &dy);
        let expected =
            Candidates { positions: vec![2, 3], sums: vec![-1., 3.], squares: vec![13., 17.], samples: 2 };
        assert_eq!(collector.candidates(), Ok(expected.clone()));

        let resumed = Collector::resumed([2, 3], expected, &Device::flex()).unwrap();
        resumed.observe(&x, &dy);
        let found = resumed.candidates().unwrap();
        assert_eq!((found.sums, found.samples), (vec![-4., 7.], 3));
    }

    #[test]
    fn what_has_no_order_is_told() {
        let collector = Collector::new(2);
        collector.observe(&matrix(vec![f32::NAN; 3], [1, 3]), &matrix(vec![1., 1.], [1, 2]));
        assert_eq!(collector.candidates(), Err(CollectorError::NotFinite(NotFinite { index: 0 })));
        let wrong = Candidates { positions: vec![9], sums: vec![1.], squares: vec![1.], samples: 1 };
        assert!(Collector::resumed([2, 3], wrong, &Device::flex()).is_err());
    }
}
