//! Attention, within segments and to a cache.

use super::super::attention::{
    AttentionShape, KeyValues, Rotation, Visibility, attention, cached_attention, causal_mask,
    joint_attention, keep_keys,
};
use super::*;

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
