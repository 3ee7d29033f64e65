//! Every operation against the plain composition of burn's operations: values and gradients, on odd shapes.

#![allow(clippy::unwrap_used)]

mod attending;
mod maps;
mod sparse_changes;
mod updates;

use super::*;
use crate::random::Stream;
use burn::tensor::{Int, TensorData};

/// Where kernels are tried, in which type, and how far they may be from the composition relative to the largest value. On
/// CUDA the composition's own products in f32 may be rounded to the ten bits of TF32.
fn places() -> Vec<(Device, DType, f32)> {
    let cpu = (Device::flex(), DType::F32, 2e-5);
    #[cfg(feature = "cuda")]
    return vec![cpu, (Device::cuda(0), DType::F32, 1e-3), (Device::cuda(0), DType::BF16, 3e-2)];
    #[cfg(not(feature = "cuda"))]
    vec![cpu]
}

fn random<const D: usize>(name: &str, shape: [usize; D], place: &(Device, DType, f32)) -> Tensor<D> {
    let mut stream = Stream::new(7, "test", name, &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| stream.normal() as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), (&place.0, place.1))
}

fn leaf<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    tensor.clone().autodiff().require_grad()
}

#[track_caller]
fn assert_close<const D: usize>(what: &str, found: Tensor<D>, expected: Tensor<D>, limit: f32) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let found: Vec<f32> = as_dtype(found, DType::F32).try_into_vec_as().unwrap();
    let expected: Vec<f32> = as_dtype(expected, DType::F32).try_into_vec_as().unwrap();
    let largest = expected.iter().fold(1e-3f32, |largest, value| largest.max(value.abs()));
    let apart = found.iter().zip(&expected).fold(0f32, |apart, (f, e)| {
        let difference = (f - e).abs();
        if difference.is_nan() { f32::INFINITY } else { apart.max(difference) }
    });
    assert!(apart <= limit * largest, "{what}: {apart} of {largest}");
}

/// Compares a function with its composition: result, and gradients for all inputs.
fn compare(
    what: &str,
    place: &(Device, DType, f32),
    inputs: &[Tensor<2>],
    found: impl Fn(Vec<Tensor<2>>) -> Tensor<2>,
    expected: impl Fn(Vec<Tensor<2>>) -> Tensor<2>,
) {
    assert_close(what, found(inputs.to_vec()), expected(inputs.to_vec()), place.2);
    let run = |function: &dyn Fn(Vec<Tensor<2>>) -> Tensor<2>, fused: bool| {
        let leaves: Vec<Tensor<2>> = inputs.iter().map(leaf).collect();
        let y = function(leaves.clone());
        let dy = random("dy", y.dims(), place);
        let mut gradients = match fused {
            true => backward_from(y, dy),
            false => (y * dy).sum().backward(),
        };
        let of_leaf = |leaf: &Tensor<2>| leaf.grad_remove(&mut gradients).unwrap();
        leaves.iter().map(of_leaf).collect::<Vec<_>>()
    };
    for (index, (f, e)) in run(&found, true).into_iter().zip(run(&expected, false)).enumerate() {
        assert_close(&format!("{what}, gradient of input {index}"), f, e, 4.0 * place.2);
    }
}

/// Which elements stay is the same everywhere, at any width, and about as many as asked for.
#[test]
fn dropped_elements() {
    let cpu = (Device::flex(), DType::F32, 0.0);
    for (rows, columns, p) in [(3, 5, 0.5), (70, 333, 0.1), (64, 256, 0.9)] {
        let dropout = Dropout { p, key: 0x1234_5678_9abc_def0 };
        let ones = |place: &(Device, DType, f32)| Tensor::<2>::ones([rows, columns], (&place.0, place.1));
        let expected: Vec<f32> = super::dropout::plain(ones(&cpu), dropout).try_into_vec_as().unwrap();
        let kept = expected.iter().filter(|value| **value != 0.0).count() as f64;
        let count = (rows * columns) as f64;
        assert!((kept - count * (1.0 - p)).abs() < 4.0 * (count * p * (1.0 - p)).sqrt(), "{kept} of {count}");
        for place in &places() {
            let what = format!("{rows} × {columns}");
            let x = [random("x", [rows, columns], place)];
            let found = |inputs: Vec<Tensor<2>>| super::dropout(inputs[0].clone(), dropout);
            compare(&what, place, &x, found, |inputs| super::dropout::plain(inputs[0].clone(), dropout));
        }
    }
}

#[test]
fn norms_and_gates() {
    for place in &places() {
        for (rows, columns) in [(1, 8), (7, 33), (5, 64)] {
            let inputs = [random("x", [rows, columns], place), random("w", [1, columns], place)];
            let what = format!("{rows} × {columns}");
            compare(
                &what,
                place,
                &inputs,
                |inputs| rms_norm(inputs[0].clone(), inputs[1].clone(), 1e-5),
                |inputs| super::rms_norm::plain(inputs[0].clone(), inputs[1].clone(), 1e-5),
            );
            let inputs = [random("gate up", [rows, 2 * columns], place)];
            compare(
                &what,
                place,
                &inputs,
                |inputs| silu_gate(inputs[0].clone()),
                |inputs| {
                    let (gate, up) = super::gated::split_gate(inputs[0].clone());
                    super::gated::plain(gate, up)
                },
            );
        }
    }
}

#[test]
fn losses_of_logits_and_of_hidden_states() {
    for place in &places() {
        for (rows, hidden, vocab) in [(1, 8, 11), (9, 16, 50), (37, 24, 700)] {
            let device = &place.0;
            let (x, weight) = (random("x", [rows, hidden], place), random("w", [vocab, hidden], place));
            let mut stream = Stream::new(1, "targets", "", &[]);
            let targets: Vec<i64> = (0..rows).map(|_| stream.below(vocab as u64) as i64).collect();
            let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), device);
            let logits = || x.clone().matmul(weight.clone().transpose());
            let what = format!("{rows} × {hidden} × {vocab}");
            let check = |found: CrossEntropy, expected: CrossEntropy| {
                assert_close(&what, found.loss_sum, expected.loss_sum, place.2);
                assert_eq!(
                    found.correct.into_scalar::<i64>(),
                    expected.correct.into_scalar::<i64>(),
                    "{what}"
                );
                match (found.gradient, expected.gradient) {
                    (Some(found), Some(expected)) => assert_close(&what, found, expected, 4.0 * place.2),
                    (found, expected) => assert!(found.is_none() && expected.is_none()),
                }
            };
            for scale in [None, Some(0.3)] {
                let plain = || super::cross_entropy::plain(logits(), targets.clone(), scale);
                check(cross_entropy(logits(), targets.clone(), scale), plain());
                for chunk in [4, rows] {
                    let mut expected = plain();
                    expected.gradient = expected.gradient.map(|gradient| gradient.matmul(weight.clone()));
                    check(head_loss(x.clone(), weight.clone(), targets.clone(), chunk, scale), expected);
                }
            }
        }
    }
}

/// Combinations of random matrices are the same to the bit everywhere, and their gradients are the products with the
/// dense elements; more of them than a launch takes, beside the borders of groups and blocks.
#[test]
fn combinations_of_random_matrices() {
    let cpu = (Device::flex(), DType::F32, 0.0);
    let span = |i: usize| {
        let len = [1, 127, 128, 129, 2500][i % 5];
        let basis = |purpose: &str| RandomBasis::new(7, purpose, ["q", "k", "v"][i % 3], len);
        let offset = i.is_multiple_of(2).then(|| (basis("offset"), 0.25));
        (Span { basis: basis("basis"), scale: 0.3 + i as f32, offset }, [1, 4, 33, 5][i % 4])
    };
    let spans: Vec<(Span, usize)> = (0..70).map(span).collect();
    let host = |tensor: &Tensor<2>| tensor.to_data().iter::<f32>().collect::<Vec<f32>>();
    for (to, ..) in &places() {
        let (mut combinations, mut gradients) = (Vec::new(), Vec::new());
        for (i, (span, count)) in spans.iter().enumerate() {
            let numbers = |name: &str, len| random(&format!("{name}{i}"), [1, len], &cpu).to_device(to);
            combinations.push((*span, numbers("a", *count)));
            gradients.push((*span, numbers("g", span.basis.len()), *count));
        }
        let (found, found_gradients) =
            (super::combinations(combinations.clone()), combinations_backward(gradients.clone()));
        assert_eq!((found.len(), found_gradients.len()), (spans.len(), spans.len()));
        for (i, (span, count)) in spans.iter().enumerate() {
            let len = span.basis.len();
            let elements: Vec<Vec<f32>> =
                (0..*count).map(|element| span.basis.first_values(element as u32, len)).collect();
            let coefficients = host(&combinations[i].1);
            let offset = span.offset.map(|(basis, scale)| (scale, basis.first_values(0, len)));
            let scaled = coefficients.iter().map(|a| a * span.scale);
            let terms: Vec<(f32, Vec<f32>)> = scaled.zip(elements.clone()).chain(offset).collect();
            let expected: Vec<f32> =
                (0..len).map(|e| terms.iter().fold(0.0, |sum, (a, values)| sum + a * values[e])).collect();
            assert_eq!(host(&found[i]), expected, "matrix {i}");

            let gradient = host(&gradients[i].1);
            let of_element = |values: &Vec<f32>| {
                let products = values.iter().zip(&gradient).map(|(v, g)| f64::from(*v) * f64::from(*g));
                (f64::from(span.scale) * products.sum::<f64>()) as f32
            };
            let expected: Vec<f32> = elements.iter().map(of_element).collect();
            let expected = Tensor::from_data(TensorData::new(expected, [1, *count]), (&cpu.0, DType::F32));
            let found = found_gradients[i].clone().to_device(&cpu.0);
            assert_close(&format!("gradient {i}"), found, expected, 1e-4);
        }
    }
}

#[test]
fn the_largest_of_each_row() {
    for place in &places() {
        for columns in [1, 5, 64, 5000] {
            let rows = random("rows", [3, columns], place);
            let expected: Vec<i64> = rows.clone().argmax(1).try_into_vec_as().unwrap();
            let found: Vec<i64> = largest(rows).try_into_vec_as().unwrap();
            // In bf16 there are equals, of which the composition may take a later one.
            match place.1 {
                DType::F32 => assert_eq!(found, expected),
                _ => assert_eq!(found.len(), expected.len()),
            }
        }
        let equals = TensorData::from([[0f32, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]]);
        let equals = Tensor::from_data(equals, (&place.0, place.1));
        assert_eq!(largest(equals).try_into_vec_as::<i64>().unwrap(), [1, 0]);
        let others = TensorData::from([[1.0f32, 3.0, 3.0], [5.0, 5.0, -1.0]]);
        let others = Tensor::from_data(others, (&place.0, place.1));
        assert_eq!(largest(others).try_into_vec_as::<i64>().unwrap(), [1, 0]);
    }
}
