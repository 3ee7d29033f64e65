//! Every operation against the plain composition of burn's operations: values and gradients, on odd shapes.

#![allow(clippy::unwrap_used)]

use super::attention::{
    AttentionShape, KeyValues, Rotation, Visibility, attention, cached_attention, causal_mask,
    joint_attention, keep_keys,
};
use super::linear::{self, AdaptedLinear, LinearInput, LowRankTerm, Term, Up, adapted_linears};
use super::sparse::largest_of_all;
use super::*;
use crate::linalg::NotFinite;
use crate::random::Stream;
use burn::tensor::{Int, TensorData};
use std::sync::Arc;

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

#[derive(Clone, Copy, Debug, PartialEq)]
enum Front {
    Plain,
    Normed,
    Gated,
}

/// Outs, ranks and whether there is a bias, of maps that share an input of that width.
type Maps<'a> = &'a [(usize, usize, bool)];

/// Inputs in the order raw, norm weight, residual, then weight, bias, A, B of each map, what is absent left out.
fn inputs_of(
    front: Front,
    width: usize,
    maps: Maps,
    rows: usize,
    place: &(Device, DType, f32),
) -> Vec<Tensor<2>> {
    let raw = if front == Front::Gated { 2 * width } else { width };
    let mut inputs = vec![random("raw", [rows, raw], place)];
    if front == Front::Normed {
        inputs.push(random("norm", [1, width], place));
    }
    inputs.push(random("residual", [rows, maps.iter().map(|map| map.0).sum()], place));
    let factors = (place.0.clone(), DType::F32, place.2);
    for (index, (out, rank, bias)) in maps.iter().enumerate() {
        inputs.push(random(&format!("w{index}"), [*out, width], place));
        if *bias {
            inputs.push(random(&format!("bias{index}"), [1, *out], place));
        }
        if *rank > 0 {
            inputs.push(random(&format!("a{index}"), [*rank, width], &factors));
            inputs.push(random(&format!("b{index}"), [*out, *rank], &factors));
        }
    }
    inputs
}

fn assembled(
    front: Front,
    maps: Maps,
    p: f64,
    inputs: Vec<Tensor<2>>,
) -> (LinearInput, Vec<AdaptedLinear>, Option<Residual>) {
    let mut inputs = inputs.into_iter();
    let mut next = || inputs.next().unwrap();
    let raw = next();
    let input = match front {
        Front::Plain => LinearInput::Plain(raw),
        Front::Normed => LinearInput::Normed { x: raw, weight: next(), epsilon: 1e-5, skip: None },
        Front::Gated => LinearInput::Gated(raw),
    };
    let residual = next();
    let maps = maps.iter().enumerate().map(|(index, (_, rank, bias))| AdaptedLinear {
        weight: next(),
        bias: bias.then(&mut next),
        term: (*rank > 0).then(|| {
            let (a, b) = (next(), next());
            // The first map keeps everything where there are more.
            let drops = p > 0.0 && index + 1 == maps.len();
            let dropout = drops.then_some(Dropout { p, key: 1 + index as u64 });
            Term::LowRank(LowRankTerm { a, b: Up::Matrix(b), bias: None, gain: None, scale: 0.7, dropout })
        }),
    });
    let maps = maps.collect();
    (input, maps, Some(Residual { value: residual, skip: None }))
}

#[test]
fn joint_linear_maps() {
    let cases: [(Front, usize, Maps, usize); 5] = [
        (Front::Plain, 24, &[(17, 3, true)], 5),
        (Front::Normed, 40, &[(24, 4, false), (8, 0, true), (16, 5, true)], 13),
        (Front::Normed, 64, &[(48, 8, false), (16, 8, false), (16, 8, false)], 33),
        (Front::Gated, 33, &[(31, 2, false)], 7),
        (Front::Plain, 16, &[(12, 0, false), (20, 0, false)], 1),
    ];
    for place in &places() {
        for (front, width, maps, rows) in cases {
            for (recompute, p) in [(false, 0.0), (true, 0.0), (false, 0.3)] {
                let inputs = inputs_of(front, width, maps, rows, place);
                let what =
                    format!("{front:?} {width} → {maps:?}, {rows} rows, recompute {recompute}, dropout {p}");
                let fused = |inputs| {
                    let (input, maps, residual) = assembled(front, maps, p, inputs);
                    adapted_linears(input, maps, residual, recompute)
                };
                let plain = |inputs| {
                    let (input, maps, residual) = assembled(front, maps, p, inputs);
                    linear::plain(input, maps, residual)
                };
                compare(&what, place, &inputs, fused, plain);
            }
        }
    }
}

/// Settled weights keep their values, whatever the length of their rows; and maps whose weights adjoin in one piece of memory
/// give what the same maps give with weights apart.
#[test]
fn weights_that_adjoin() {
    let maps: Maps = &[(48, 8, false), (16, 8, false), (16, 0, false)];
    // Where `inputs_of` puts the weights.
    let weights = [2, 5, 8];
    for place in &places() {
        for width in [64, 72, 96] {
            let apart = inputs_of(Front::Plain, width, maps, 33, place);
            let all = Tensor::cat(weights.map(|at| apart[at].clone()).to_vec(), 0);
            let joint = settled(all.clone());
            assert_close("settled weights", joint.clone(), all, 0.0);
            let (mut adjoining, mut start) = (apart.clone(), 0);
            for at in weights {
                let rows = apart[at].dims()[0];
                adjoining[at] = joint.clone().narrow(0, start, rows);
                start += rows;
            }
            let [apart, adjoining] = [apart, adjoining].map(|inputs| {
                let (input, maps, residual) = assembled(Front::Plain, maps, 0.0, inputs);
                adapted_linears(input, maps, residual, false)
            });
            assert_close(&format!("{width} columns"), adjoining, apart, place.2);
        }
    }
}

/// `W₂·(W₁·norm(x)) + x`, whose gradient of `x` goes around the maps as well; once with a gain, for which the norm is
/// no part of the maps and does not wait for it.
#[test]
fn a_gradient_around_a_branch() {
    let (rows, width, middle) = (9, 24, 40);
    for place in &places() {
        let factors = (place.0.clone(), DType::F32, place.2);
        let inputs = [
            random("x", [rows, width], place),
            random("norm", [1, width], place),
            random("w1", [middle, width], place),
            random("w2", [width, middle], place),
            random("a", [2, width], &factors),
            random("b", [middle, 2], &factors),
        ];
        for gained in [false, true] {
            let block = |inputs: Vec<Tensor<2>>, fused: bool| {
                let skip = Some(Skip::default());
                let [x, norm, w1, w2, a, b] = inputs.try_into().unwrap();
                let input =
                    LinearInput::Normed { x: x.clone(), weight: norm, epsilon: 1e-5, skip: skip.clone() };
                let gain = gained.then(|| random("gain", [1, middle], &factors));
                let dropout = Some(Dropout { p: 0.25, key: 1 << 40 });
                let term =
                    Term::LowRank(LowRankTerm { a, b: Up::Matrix(b), bias: None, gain, scale: 0.7, dropout });
                let first = vec![AdaptedLinear { weight: w1, bias: None, term: Some(term) }];
                let second = vec![AdaptedLinear { weight: w2, bias: None, term: None }];
                let residual = Some(Residual { value: x, skip });
                if fused {
                    let y = adapted_linears(input, first, None, false);
                    adapted_linears(LinearInput::Plain(y), second, residual, false)
                } else {
                    linear::plain(LinearInput::Plain(linear::plain(input, first, None)), second, residual)
                }
            };
            let what = format!("gained {gained}");
            compare(&what, place, &inputs, |inputs| block(inputs, true), |inputs| block(inputs, false));
        }
    }
}

#[test]
fn terms_with_gain_dropout_and_bias() {
    let (rows, width, out, rank) = (6, 20, 14, 3);
    for place in &places() {
        let factors = (place.0.clone(), DType::F32, place.2);
        let inputs = [
            random("x", [rows, width], place),
            random("w", [out, width], place),
            random("a", [rank, width], &factors),
            random("b", [out, rank], &factors),
            random("bias", [1, out], &factors),
            random("gain", [1, out], &factors),
        ];
        for dropped in [false, true] {
            let maps = |inputs: &[Tensor<2>]| {
                let term = LowRankTerm {
                    a: inputs[2].clone(),
                    b: Up::Matrix(inputs[3].clone()),
                    bias: Some(inputs[4].clone()),
                    gain: Some(inputs[5].clone()),
                    scale: 1.5,
                    dropout: dropped.then_some(Dropout { p: 0.4, key: 3 }),
                };
                vec![AdaptedLinear { weight: inputs[1].clone(), bias: None, term: Some(Term::LowRank(term)) }]
            };
            let input = |inputs: &[Tensor<2>]| LinearInput::Plain(inputs[0].clone());
            compare(
                &format!("dropped {dropped}"),
                place,
                &inputs,
                |inputs| adapted_linears(input(&inputs), maps(&inputs), None, false),
                |inputs| linear::plain(input(&inputs), maps(&inputs), None),
            );
        }
    }
}

#[test]
fn gains() {
    let (rows, width, out) = (6, 20, 14);
    for place in &places() {
        let own = (place.0.clone(), DType::F32, place.2);
        let inputs = [
            random("x", [rows, width], place),
            random("w", [out, width], place),
            random("bias", [1, out], place),
            random("outer", [1, out], &own),
            random("inner", [1, width], &own),
        ];
        let parts = |inputs: Vec<Tensor<2>>| {
            let [x, weight, bias, output, input] = inputs.try_into().unwrap();
            let term = Term::Gains { input: Some(input), output: Some(output) };
            (LinearInput::Plain(x), vec![AdaptedLinear { weight, bias: Some(bias), term: Some(term) }])
        };
        let fused = |inputs: Vec<Tensor<2>>| {
            let (input, maps) = parts(inputs);
            adapted_linears(input, maps, None, false)
        };
        let plain = |inputs: Vec<Tensor<2>>| {
            let (input, maps) = parts(inputs);
            linear::plain(input, maps, None)
        };
        compare("gains", place, &inputs, fused, plain);
    }
}

/// Joint maps whose `B`s are a core, a core behind frozen columns and in front of an offset, and a matrix between vectors;
/// with more ranks than go in joint products as well.
#[test]
fn what_stands_for_b() {
    let (rows, width, outs) = (11, 24, [14, 9, 17]);
    for place in &places() {
        let own = (place.0.clone(), DType::F32, place.2);
        for (rank, frozen, dropped) in [(3, 2, false), (8, 3, true), (5, 1, true), (136, 64, false)] {
            let constant = |name: &str, dims| random(name, dims, &own);
            let mut inputs = vec![random("x", [rows, width], place)];
            for (index, out) in outs.into_iter().enumerate() {
                inputs.push(random(&format!("w{index}"), [out, width], place));
                inputs.push(random(&format!("a{index}"), [rank, width], &own));
            }
            let trained = [
                [[outs[0], rank], [rank, rank]],
                [[outs[1], rank - frozen], [rank, rank]],
                [[1, outs[2]], [1, rank]],
            ];
            for (index, [first, second]) in trained.into_iter().enumerate() {
                inputs.push(random(&format!("first{index}"), first, &own));
                inputs.push(random(&format!("second{index}"), second, &own));
            }
            let maps = |inputs: &[Tensor<2>]| {
                let of = |place: usize| inputs[place].clone();
                let ups = [
                    Up::Core { b: of(7), core: of(8), frozen: None, offset: None },
                    Up::Core {
                        b: of(9),
                        core: of(10),
                        frozen: Some(constant("frozen", [outs[1], frozen])),
                        offset: Some(constant("offset", [outs[1], rank])),
                    },
                    Up::Scaled { b: constant("b", [outs[2], rank]), outer: of(11), inner: of(12) },
                ];
                let maps = ups.into_iter().enumerate().map(|(index, b)| {
                    let dropout = dropped.then_some(Dropout { p: 0.2, key: index as u64 });
                    let (a, scale) = (of(2 + 2 * index), 0.3);
                    let term = LowRankTerm { a, b, bias: None, gain: None, scale, dropout };
                    AdaptedLinear { weight: of(1 + 2 * index), bias: None, term: Some(Term::LowRank(term)) }
                });
                (LinearInput::Plain(of(0)), maps.collect::<Vec<_>>())
            };
            let fused = |inputs: Vec<Tensor<2>>| {
                let (input, maps) = maps(&inputs);
                adapted_linears(input, maps, None, false)
            };
            let plain = |inputs: Vec<Tensor<2>>| {
                let (input, maps) = maps(&inputs);
                linear::plain(input, maps, None)
            };
            let what = format!("rank {rank}, {frozen} of them frozen, dropped {dropped}");
            compare(&what, place, &inputs, fused, plain);
        }
    }
}

/// W = [[1, 2], [3, 4]], b = [1, 1], x = [1, 1].
/// With l_in = [2, 1] and l_out = [1, −1]: ((2 + 2, 6 + 4) + 1) ∘ [1, −1].
/// With A = [1 1], B = [1; 2]: x·Aᵀ = 2. Between d = 3 and b = [1, 2], y = [3, 7] + 1 + 2·3·[1, 2] ∘ [1, 2]; with the core 3
/// and the offset [1, 0], y = [3, 7] + 1 + 2·(3·[1, 2] − [1, 0]).
#[test]
fn gains_and_what_stands_for_b_by_hand() {
    let device = Device::flex();
    let matrix = |v: Vec<f32>, dims: [usize; 2]| Tensor::<2>::from_data(TensorData::new(v, dims), &device);
    let run = |term| {
        let weight = matrix(vec![1., 2., 3., 4.], [2, 2]);
        let map = AdaptedLinear { weight, bias: Some(matrix(vec![1., 1.], [1, 2])), term: Some(term) };
        let x = LinearInput::Plain(matrix(vec![1., 1.], [1, 2]));
        adapted_linears(x, vec![map], None, false).try_into_vec_as::<f32>().unwrap()
    };
    let gain = |v: Vec<f32>| Some(matrix(v, [1, 2]));
    assert_eq!(run(Term::Gains { input: gain(vec![2., 1.]), output: gain(vec![1., -1.]) }), [5., -11.]);
    assert_eq!(run(Term::Gains { input: None, output: gain(vec![2., 1.]) }), [8., 8.]);
    let (b, three) = (matrix(vec![1., 2.], [2, 1]), matrix(vec![3.], [1, 1]));
    let low_rank = |b, dropout| {
        let a = matrix(vec![1., 1.], [1, 2]);
        Term::LowRank(LowRankTerm { a, b, bias: None, gain: None, scale: 1.0, dropout })
    };
    let scaled = Up::Scaled { b: b.clone(), outer: matrix(vec![1., 2.], [1, 2]), inner: three.clone() };
    assert_eq!(run(low_rank(scaled.clone(), None)), [10., 32.]);
    // Under the mask [2, 0] the pair alone sees [2, 0].
    assert_eq!(run(low_rank(scaled, Some(dropping([2., 0.])))), [10., 32.]);
    let offset = Some(matrix(vec![1., 0.], [2, 1]));
    assert_eq!(run(low_rank(Up::Core { b, core: three, frozen: None, offset }, None)), [8., 20.]);
}

/// A dropout whose factors of two elements are these.
fn dropping(factors: [f32; 2]) -> Dropout {
    let has = |dropout: &Dropout| {
        let ones = Tensor::<2>::ones([1, 2], &Device::flex());
        super::dropout::plain(ones, *dropout).try_into_vec_as::<f32>().unwrap() == factors
    };
    (0..).map(|key| Dropout { p: 0.5, key }).find(has).unwrap()
}

/// x = [1, 2, 3]; W = 0; A = [[3, 4, 5]], B = [[1], [2]], s = 2: x·Aᵀ = 26, so y = 2·26·[1, 2] + b + residual.
#[test]
fn a_low_rank_term_by_hand() {
    let device = Device::flex();
    let matrix = |v: Vec<f32>, dims: [usize; 2]| Tensor::<2>::from_data(TensorData::new(v, dims), &device);
    let map = AdaptedLinear {
        weight: matrix(vec![0.; 6], [2, 3]),
        bias: Some(matrix(vec![0.5, -0.5], [1, 2])),
        term: Some(Term::LowRank(LowRankTerm {
            a: matrix(vec![3., 4., 5.], [1, 3]),
            b: Up::Matrix(matrix(vec![1., 2.], [2, 1])),
            bias: None,
            gain: None,
            scale: 2.0,
            dropout: None,
        })),
    };
    let residual = Some(Residual { value: matrix(vec![10., 20.], [1, 2]), skip: None });
    let x = LinearInput::Plain(matrix(vec![1., 2., 3.], [1, 3]));
    let y: Vec<f32> = adapted_linears(x, vec![map], residual, false).try_into_vec_as().unwrap();
    assert_eq!(y, [62.5, 123.5]);
}

/// W = 1, A = [1 1], B = [1; 2], a bias beside B [0.5, 0.25], s = 2, x = [1, 2]: low = 2·(3·[1, 2] + [0.5, 0.25]).
#[test]
fn a_gain_and_a_bias_by_hand() {
    let device = Device::flex();
    let matrix = |v: Vec<f32>, dims: [usize; 2]| Tensor::<2>::from_data(TensorData::new(v, dims), &device);
    let run = |gain: Option<Vec<f32>>, dropout: Option<Dropout>| {
        let map = AdaptedLinear {
            weight: matrix(vec![1., 0., 0., 1.], [2, 2]),
            bias: Some(matrix(vec![10., 20.], [1, 2])),
            term: Some(Term::LowRank(LowRankTerm {
                a: matrix(vec![1., 1.], [1, 2]),
                b: Up::Matrix(matrix(vec![1., 2.], [2, 1])),
                bias: Some(matrix(vec![0.5, 0.25], [1, 2])),
                gain: gain.map(|gain| matrix(gain, [1, 2])),
                scale: 2.0,
                dropout,
            })),
        };
        let x = LinearInput::Plain(matrix(vec![1., 2.], [1, 2]));
        adapted_linears(x, vec![map], None, false).try_into_vec_as::<f32>().unwrap()
    };
    assert_eq!(run(None, None), [18., 34.5]);
    assert_eq!(run(Some(vec![2., 0.5]), None), [26., 27.25]);
    // With the mask [2, 0] the input is [2, 0]: low = 2·(2·[1, 2] + [0.5, 0.25]) = [5, 8.5], base [2, 0].
    assert_eq!(run(Some(vec![2., 0.5]), Some(dropping([2., 0.]))), [23., 26.25]);
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

/// Attention within each segment, one after another, as a composition.
fn plain_attention(
    shape: &AttentionShape,
    qkv: Tensor<2>,
    rotation: Option<&Rotation>,
    norms: Option<&(Tensor<2>, Tensor<2>)>,
    segments: &[std::ops::Range<usize>],
) -> Tensor<2> {
    let AttentionShape { heads, kv_heads, head_dim, window, epsilon } = *shape;
    let attend = |segment: &std::ops::Range<usize>| {
        let time = segment.len();
        let part = |first: usize, count: usize, norm: Option<&Tensor<2>>, turns: bool| {
            let part =
                qkv.clone().narrow(0, segment.start, time).narrow(1, first * head_dim, count * head_dim);
            let part = match norm {
                Some(weight) => {
                    let rows = part.reshape([time * count, head_dim]);
                    super::rms_norm::plain(rows, weight.clone(), epsilon)
                }
                None => part,
            };
            let part = part.reshape([1, time, count, head_dim]).swap_dims(1, 2);
            let table = |table: &Tensor<2>| {
                table.clone().narrow(0, segment.start, time).reshape([1, 1, time, head_dim / 2])
            };
            match rotation.filter(|_| turns) {
                Some(rotation) => rotate(part, table(&rotation.cos), table(&rotation.sin)),
                None => part,
            }
        };
        let (q_norm, k_norm) = norms.map(|(q, k)| (q, k)).unzip();
        let q = part(0, heads, q_norm, true);
        let k = part(heads, kv_heads, k_norm, true);
        let v = part(heads + kv_heads, kv_heads, None, false);
        let mask = causal_mask(time, time, window, &qkv.device().without_autodiff());
        attention(q, k, v, mask).swap_dims(1, 2).reshape([time, heads * head_dim])
    };
    Tensor::cat(segments.iter().map(attend).collect(), 0)
}

#[test]
fn attention_within_segments() {
    let shape = |heads, kv_heads, head_dim, window| AttentionShape {
        heads,
        kv_heads,
        head_dim,
        window,
        epsilon: 1e-6,
    };
    let cases: [(AttentionShape, &[usize]); 5] = [
        (shape(2, 2, 16, None), &[9]),
        (shape(4, 2, 32, None), &[1, 17, 40, 3]),
        (shape(6, 2, 16, Some(4)), &[33, 12]),
        (shape(3, 1, 48, Some(1)), &[20]),
        (shape(4, 1, 64, None), &[70, 130]),
    ];
    for place in &places() {
        for (shape, lengths) in &cases {
            if !attends_jointly(shape, &place.0, place.1) {
                continue;
            }
            let mut start = 0;
            let segments: Vec<_> = lengths
                .iter()
                .map(|length| {
                    start += length;
                    start - length..start
                })
                .collect();
            let tables = (place.0.clone(), DType::F32, place.2);
            let angles = random("angles", [start, shape.head_dim / 2], &tables);
            let rotation = Rotation { cos: angles.clone().cos(), sin: angles.sin() };
            let visibility = Visibility::new(&segments, start, &place.0);
            let norms =
                (random("q norm", [1, shape.head_dim], place), random("k norm", [1, shape.head_dim], place));
            let qkv = [random("qkv", [start, shape.columns()], place)];
            for (turns, normed) in [(true, false), (false, false), (true, true)] {
                let (rotation, norms) = (turns.then_some(&rotation), normed.then_some(&norms));
                compare(
                    &format!("{shape:?}, {lengths:?}, turns {turns}, normed {normed}"),
                    place,
                    &qkv,
                    |qkv| joint_attention(shape, qkv[0].clone(), rotation, norms.cloned(), &visibility),
                    |qkv| plain_attention(shape, qkv[0].clone(), rotation, norms, &segments),
                );
            }
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

#[test]
fn updates_by_age() {
    for (device, _, limit) in places() {
        let place = (device, DType::F32, limit);
        let optimizer = AgedAdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-6, weight_decay: 0.1 };
        let updates = || -> Vec<AgedUpdate<Tensor<2>>> {
            (0..70)
                .map(|index| {
                    let shape = [1, 1 + 1931 * (index % 5)];
                    let tensor = |what: &str| random(&format!("{what}{index}"), shape, &place);
                    // Elements of all ages, from the first update to the 40,000th.
                    let age = tensor("a").square().mul_scalar(10_000.0).floor().add_scalar(1.0);
                    AgedUpdate {
                        parameter: tensor("p"),
                        gradient: tensor("g"),
                        moment_1: tensor("m"),
                        moment_2: tensor("v").square(),
                        age,
                        rate: 0.01 * (1 + index % 3) as f64,
                    }
                })
                .collect()
        };
        // A norm of 5 clipped to 2; one of 1, which stays; one that is not finite, which changes nothing.
        for (norm, factor) in [(5f32, Some(0.4)), (1.0, Some(1.0)), (f32::INFINITY, None)] {
            let sum_of_squares = Tensor::from_data([norm * norm], (&place.0, DType::F32));
            let clip = Clip { sum_of_squares, max_norm: 2.0 };
            let expected = updates().into_iter().map(|mut update| match factor {
                Some(factor) => {
                    update.gradient = update.gradient.mul_scalar(factor);
                    optimizer.update(update)
                }
                None => [update.parameter, update.moment_1, update.moment_2, update.age],
            });
            for (found, expected) in optimizer.update_all(updates(), Some(&clip)).into_iter().zip(expected) {
                for (found, expected) in found.into_iter().zip(expected) {
                    assert_close(&format!("update, norm {norm}"), found, expected, 1e-5);
                }
            }
        }
    }
}

#[test]
fn updates_of_many_parameters() {
    for (device, _, limit) in places() {
        let place = (device, DType::F32, limit);
        let optimizer = AdamW { beta_1: 0.9, beta_2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
        let updates = || -> Vec<Update<Tensor<2>>> {
            (0..70)
                .map(|index| {
                    let shape = [1 + index % 7, 3 + 131 * (index % 5)];
                    let tensor = |what: &str| random(&format!("{what}{index}"), shape, &place);
                    Update {
                        parameter: tensor("p"),
                        gradient: tensor("g"),
                        moment_1: tensor("m"),
                        moment_2: tensor("v").square(),
                        rate: 0.01 * (1 + index % 3) as f64,
                        time: 1 + (index % 2) as i64,
                    }
                })
                .collect()
        };
        let squares = sum_of_squares(updates().into_iter().map(|update| update.gradient).collect());
        let one_by_one = updates().into_iter().map(|update| update.gradient.square().sum());
        let expected = one_by_one.reduce(|sum, square| sum + square).unwrap();
        assert_close("squares", squares.unwrap(), expected, 1e-5);
        let expected = updates().into_iter().map(|update| optimizer.update(update));
        for (found, expected) in optimizer.update_all(updates(), None).into_iter().zip(expected) {
            for (found, expected) in found.into_iter().zip(expected) {
                assert_close("update", found, expected, 1e-5);
            }
        }
        // A norm of 5 clipped to 2; one of 1, which stays; one that is not finite, which changes nothing.
        for (norm, max_norm, factor) in [(5f32, 2.0, 0.4), (1.0, 2.0, 1.0), (f32::NAN, 2.0, 0.0)] {
            let sum_of_squares = Tensor::from_data([norm * norm], (&place.0, DType::F32));
            let clip = Clip { sum_of_squares, max_norm };
            let expected = updates().into_iter().map(|mut update| {
                update.gradient = update.gradient.mul_scalar(factor);
                match norm.is_finite() {
                    true => optimizer.update(update),
                    false => [update.parameter, update.moment_1, update.moment_2],
                }
            });
            for (found, expected) in optimizer.update_all(updates(), Some(&clip)).into_iter().zip(expected) {
                for (found, expected) in found.into_iter().zip(expected) {
                    assert_close(&format!("norm {norm}"), found, expected, 1e-5);
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

/// Rows that are continued in pieces, through a cache, as against all of their tokens at once.
#[test]
fn attention_to_a_cache() {
    let shape = |heads, kv_heads, head_dim, window| AttentionShape {
        heads,
        kv_heads,
        head_dim,
        window,
        epsilon: 1e-5,
    };
    let cases = [
        // The first piece is read at once; more keys than one split takes follow.
        (shape(4, 2, 16, None), &[1, 1, 3, 300, 1, 1][..]),
        (shape(6, 2, 64, Some(40)), &[70, 1, 1, 20, 1]),
        (shape(3, 3, 128, None), &[530, 1, 1]),
        (shape(4, 1, 80, None), &[5, 1, 1]),
    ];
    let (rows, padding) = (2, [0usize, 2]);
    for place in &places() {
        for (shape, pieces) in &cases {
            if !attends_jointly(shape, &place.0, place.1) {
                continue;
            }
            let total: usize = pieces.iter().sum();
            let tables = (place.0.clone(), DType::F32, place.2);
            let angles = random("angles", [rows * total, shape.head_dim / 2], &tables);
            let (cos, sin) = (angles.clone().cos(), angles.sin());
            let norms =
                (random("q norm", [1, shape.head_dim], place), random("k norm", [1, shape.head_dim], place));
            let qkv = random("qkv", [rows * total, shape.columns()], place);
            let sequence = |row: usize| row * total + padding[row]..(row + 1) * total;
            let visibility = Visibility::new(&[sequence(0), sequence(1)], rows * total, &place.0);
            let rotation = Rotation { cos: cos.clone(), sin: sin.clone() };
            let whole =
                joint_attention(shape, qkv.clone(), Some(&rotation), Some(norms.clone()), &visibility);

            let slots = total + 3;
            let empty = || Tensor::zeros([rows, shape.kv_heads, slots, shape.head_dim], (&place.0, place.1));
            let first = TensorData::new(padding.map(|first| first as i32).to_vec(), [rows]);
            let first: Tensor<1, Int> = Tensor::from_data(first, (&place.0, DType::I32));
            let mut kept = KeyValues { keys: empty(), values: empty(), length: 0, first };
            for (index, time) in pieces.iter().enumerate() {
                let start = kept.length;
                let part = |all: &Tensor<2>, row: usize| all.clone().narrow(0, row * total + start, *time);
                let both = |all: &Tensor<2>| Tensor::cat(vec![part(all, 0), part(all, 1)], 0);
                let rotation = Rotation { cos: both(&cos), sin: both(&sin) };
                if index == 0 && *time > 1 {
                    kept = keep_keys(shape, both(&qkv), Some(&rotation), Some(norms.clone()), kept);
                    continue;
                }
                let y;
                (y, kept) = cached_attention(shape, both(&qkv), Some(&rotation), Some(norms.clone()), kept);
                for (row, padding) in padding.iter().enumerate() {
                    // Of padding only that it is a number.
                    let hidden = padding.saturating_sub(start).min(*time);
                    let sum = as_dtype(y.clone(), DType::F32).sum().try_into_vec_as::<f32>().unwrap()[0];
                    assert!(sum.is_finite());
                    let real = |y: Tensor<2>, at: usize| y.narrow(0, at + hidden, time - hidden);
                    if hidden < *time {
                        let found = real(y.clone(), row * time);
                        let expected = real(whole.clone(), row * total + start);
                        assert_close(
                            &format!("{shape:?}, row {row}, from {start}"),
                            found,
                            expected,
                            place.2,
                        );
                    }
                }
            }
            assert_eq!(kept.length, total);
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
