//! Joint linear maps, with all that may go with them.

use super::super::linear::{self, AdaptedLinear, LinearInput, LowRankTerm, Term, Up, adapted_linears};
use super::*;

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

/// What an adapter adds is not lost where the residual is so large that the sum of the two alone rounds to the residual: on
/// average over many sums it arrives.
#[test]
fn a_small_term_beside_a_large_residual() {
    for place in &places() {
        let (rows, width, out) = (64, 64, 256);
        let ones = Tensor::<2>::ones([rows, 1], (&place.0, place.1));
        let x = Tensor::cat(vec![ones, random("x", [rows, width - 1], place)], 1);
        let weight = random("w", [out, width], place).mul_scalar(0.1);
        let first = |rows: usize, columns: usize, value: f32| {
            let mut values = vec![0.0; rows * columns];
            values.iter_mut().step_by(columns).for_each(|first| *first = value);
            Tensor::<2>::from_data(TensorData::new(values, [rows, columns]), (&place.0, DType::F32))
        };
        let mean = |term: f32| -> f32 {
            let (a, b) = (first(1, width, 1.0), Up::Matrix(first(out, 1, term)));
            let term = LowRankTerm { a, b, bias: None, gain: None, scale: 1.0, dropout: None };
            let map = AdaptedLinear { weight: weight.clone(), bias: None, term: Some(Term::LowRank(term)) };
            let value = Tensor::<2>::full([rows, out], 64.0, (&place.0, place.1));
            let residual = Some(Residual { value, skip: None });
            let y = adapted_linears(LinearInput::Plain(x.clone()), vec![map], residual, false);
            as_dtype(y, DType::F32).sub_scalar(64.0).mean().into_scalar()
        };
        let arrived = mean(0.02) - mean(0.0);
        assert!((arrived - 0.02).abs() < 5e-3, "{place:?}: {arrived}");
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
