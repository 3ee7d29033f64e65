//! Sparse changes of a weight: their products, what watches them, and the largest entries of a gradient.

use super::super::sparse::largest_of_all;
use super::*;
use crate::linalg::NotFinite;
use std::sync::Arc;

/// A pattern with an empty row and column, a row that is full but for that, and random entries.
fn pattern([rows, columns]: [usize; 2]) -> Arc<SparsePattern> {
    let mut stream = Stream::new(7, "test", "pattern", &[]);
    let width = columns as u32;
    let places = (0..(rows * columns) as u32).filter(|place| match (place / width, place % width) {
        (0, _) | (_, 0) => false,
        (1, _) => true,
        _ => stream.uniform() < 0.2,
    });
    Arc::new(SparsePattern::new([rows, columns], places.collect()).unwrap())
}

/// One place in 311.
fn few([rows, columns]: [usize; 2]) -> Arc<SparsePattern> {
    let places = (7..(rows * columns) as u32).step_by(311);
    Arc::new(SparsePattern::new([rows, columns], places.collect()).unwrap())
}

fn term(values: Tensor<2>, pattern: &Arc<SparsePattern>) -> SparseTerm {
    SparseTerm { values, pattern: pattern.clone(), observer: None }
}

#[test]
fn sparse_changes() {
    for place in &places() {
        let factors = (place.0.clone(), DType::F32, place.2);
        // Many entries, and few, for which there are other kernels on a GPU.
        let few = [few([90, 70]), few([31, 64])].map(|pattern| (37, pattern));
        let many = [(1, [3, 5]), (16, [12, 7]), (37, [18, 40]), (301, [70, 37])];
        for (tokens, pattern) in many.map(|(tokens, dims)| (tokens, pattern(dims))).into_iter().chain(few) {
            let dims = pattern.dims();
            let what = format!("{tokens} tokens, {} of {dims:?}", pattern.len());
            let inputs = [
                random("y", [tokens, dims[0]], place),
                random("x", [tokens, dims[1]], place),
                random("values", [1, pattern.len()], &factors),
            ];
            let parts = |inputs: Vec<Tensor<2>>| {
                (inputs[0].clone(), inputs[1].clone(), term(inputs[2].clone(), &pattern))
            };
            let found = |inputs: Vec<Tensor<2>>| {
                let (y, x, term) = parts(inputs);
                add_sparse(y, x, term)
            };
            // The dense weight: `y + x·Δᵀ` with Δ built by hand.
            let expected = |inputs: Vec<Tensor<2>>| {
                let [y, x, values] = inputs.try_into().unwrap();
                let place: Vec<f32> = (0..pattern.len() * dims[0] * dims[1])
                    .map(|i| {
                        let (entry, place) = (i / (dims[0] * dims[1]), i % (dims[0] * dims[1]));
                        f32::from(pattern.positions()[entry] as usize == place)
                    })
                    .collect();
                let shape = [pattern.len(), dims[0] * dims[1]];
                let place = Tensor::<2>::from_data(TensorData::new(place, shape), (&y.device(), DType::F32));
                let dense = values.matmul(place).reshape(dims);
                let dtype = y.dtype();
                as_dtype(as_dtype(y, DType::F32) + as_dtype(x, DType::F32).matmul(dense.transpose()), dtype)
            };
            // A `y` that nobody else has may be written over.
            let [y, x, values] = inputs.clone();
            let alone = add_sparse(y.mul_scalar(1.0), x, term(values, &pattern));
            assert_close(&what, alone, found(inputs.to_vec()), 0.0);
            compare(&what, place, &inputs, found, expected);
        }
    }
}

#[derive(Debug, Default)]
struct Seen(std::sync::Mutex<Vec<Tensor<2>>>);

impl BackwardObserver for Seen {
    fn observe(&self, x: &Tensor<2>, dy: &Tensor<2>) {
        self.0.lock().unwrap().push(dy.clone().transpose().matmul(x.clone()));
    }
}

/// The observer can tell the dense gradient of the weight, whose entries at the positions are the values' gradient.
#[test]
fn observers_of_sparse_changes() {
    for place in &places() {
        let (tokens, dims) = (9, [6, 11]);
        let pattern = pattern(dims);
        let x: Tensor<2> = random("x", [tokens, dims[1]], place);
        let values: Tensor<2> = random("values", [1, pattern.len()], &(place.0.clone(), DType::F32, place.2));
        let values = leaf(&values);
        let seen = Arc::new(Seen::default());
        let term = SparseTerm { observer: Some(seen.clone()), ..term(values.clone(), &pattern) };
        let y = add_sparse(random("y", [tokens, dims[0]], place), x.clone(), term);
        let dy: Tensor<2> = random("dy", [tokens, dims[0]], place);
        let mut gradients = backward_from(y, dy.clone());
        let dense = seen.0.lock().unwrap().pop().unwrap();
        let of_values = values.grad_remove(&mut gradients).unwrap();
        let limit = if place.0 == Device::flex() { 1e-5 } else { place.2 };
        assert_close("observed", pattern.gather(dense), of_values.clone(), limit);
        assert_close("products", sampled_products(x, dy, &pattern), of_values, 1e-6);
    }
}

/// The largest entries of a gradient, found on a device, are those that the host finds in the same gradient.
#[test]
fn largest_entries_of_a_gradient() {
    for place in &places() {
        for (tokens, dims) in [(3, [5, 7]), (16, [90, 70]), (5, [300, 41])] {
            // Small whole numbers: the products are exact everywhere, and many of them are equal, of either sign.
            let whole = |name: &str, columns: usize| -> Tensor<2> {
                random(name, [tokens, columns], place).mul_scalar(1.5).round()
            };
            let (x, dy) = (whole("x", dims[1]), whole("dy", dims[0]));
            let all = dims[0] * dims[1];
            for count in [0, 1, 2, all / 20, all / 3, all - 1, all] {
                let what = format!("{count} of {dims:?}");
                let (positions, expected) = largest_of_all(x.clone(), dy.clone(), count).unwrap();
                let (pattern, found) = largest_products(x.clone(), dy.clone(), count).unwrap();
                assert_eq!(pattern.positions(), positions, "{what}");
                assert_close(&what, found, expected, 0.0);
            }
            let spoilt = |value: f32| {
                let cell = Tensor::from_data([[value]], (&place.0, place.1));
                dy.clone().slice_assign([0..1, 2..3], cell)
            };
            for value in [f32::NAN, f32::INFINITY] {
                // Infinity times 0 has no order either, so all of the row has none.
                let error = largest_products(x.clone(), spoilt(value), 2).map(|_| ()).unwrap_err();
                assert_eq!(error, NotFinite { index: 2 * dims[1] });
            }
        }
    }
}

#[test]
fn patterns_are_checked() {
    let pattern = |positions: &[u32]| SparsePattern::new([2, 3], positions.to_vec()).map(|_| ());
    assert_eq!(pattern(&[0, 3, 5]), Ok(()));
    assert_eq!(pattern(&[]), Ok(()));
    assert_eq!(pattern(&[0, 6]), Err(PatternError::Outside { position: 6, places: 6 }));
    assert_eq!(pattern(&[1, 1]), Err(PatternError::Order { position: 1, before: 1 }));
    assert_eq!(pattern(&[4, 2]), Err(PatternError::Order { position: 2, before: 4 }));
    let large = SparsePattern::new([1 << 16, 1 << 15], Vec::new()).map(|_| ());
    assert_eq!(large, Err(PatternError::TooLarge(1 << 16, 1 << 15)));
}
