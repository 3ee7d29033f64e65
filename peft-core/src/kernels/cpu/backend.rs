//! The kernels over flex tensors.

use super::attention::{Attention, HeadNorms};
use super::buffers::Buffer;
use super::bytes::bytes;
use super::cached::CachedAttention;
use super::cross_entropy::Score;
use super::linear::{Gradients, LowRank, Projection, Sources};
use super::sparse::{CompressedRows, TokenBlocks};
use super::{adamw, buffers, cross_entropy, dropout, gated, largest, linear, rms_norm, sparse, up};
use crate::kernels::adamw::{AdamW, Update};
use crate::kernels::attention::{AttentionInputs, AttentionShape, CachedInputs};
use crate::kernels::backend::{Kernels, conversions};
use crate::kernels::cross_entropy::CrossEntropyParts;
use crate::kernels::dropout::Dropout;
use crate::kernels::linear::{Factors, FrontGradients, LowRankState, Part, PartGradients, Up, Wanted};
use crate::kernels::norm::clip_factor;
use crate::kernels::sparse::{SparseGradients, SparsePattern};
use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{Bytes, DType, Shape};

/// Rows and columns.
fn dims(tensor: &FlexTensor) -> (usize, usize) {
    let shape = tensor.shape();
    (shape[0], shape[1])
}

/// A new tensor, not filled.
fn empty(shape: &[usize]) -> FlexTensor {
    let values = bytes(buffers::take(shape.iter().product()));
    FlexTensor::new(values, Layout::contiguous(Shape::from(shape.to_vec())), DType::F32)
}

/// A new tensor whose values `fill` writes, all of them.
fn filled(shape: &[usize], fill: impl FnOnce(&mut [f32])) -> FlexTensor {
    let mut tensor = empty(shape);
    fill(tensor.storage_mut());
    tensor
}

/// A whole number on its own.
fn count(value: usize) -> FlexTensor {
    let (value, shape) = (Bytes::from_elems(vec![value as i32]), Shape::from(vec![1usize]));
    FlexTensor::new(value, Layout::contiguous(shape), DType::I32)
}

/// The tensor with its values row after row. Given away whole, it may be written over in place if nobody else holds it; a
/// handle kept beside it would make that a copy.
fn rows_of(tensor: FlexTensor) -> FlexTensor {
    tensor.to_contiguous()
}

/// A tensor whose values lie row after row.
struct Values(FlexTensor);

impl Values {
    fn of(tensor: &FlexTensor) -> Self {
        match tensor.as_slice::<f32>() {
            Some(_) => Self(tensor.clone()),
            None => Self(tensor.to_contiguous()),
        }
    }

    fn get(&self) -> &[f32] {
        self.0.as_slice().unwrap_or_default()
    }
}

/// Whole numbers, whatever their width.
fn integers(tensor: &FlexTensor) -> Vec<i32> {
    let tensor = tensor.to_contiguous();
    match tensor.dtype() {
        DType::I64 => tensor.storage::<i64>().iter().map(|value| *value as i32).collect(),
        _ => tensor.storage::<i32>().to_vec(),
    }
}

/// A map with its values at hand.
struct Map {
    out: usize,
    weight: Values,
    bias: Option<Values>,
    factors: Option<FactorValues>,
}

/// A low-rank term with its values at hand.
struct FactorValues {
    a: Values,
    b: Up<Values>,
    /// What `b` stands for, where it is no matrix.
    value: Option<Buffer>,
    rank: usize,
    scale: f32,
    dropout: Option<Dropout>,
}

impl Map {
    fn of(part: &Part<FlexTensor>) -> Self {
        let factors = part.factors.as_ref();
        Self {
            out: dims(&part.weight).0,
            weight: Values::of(&part.weight),
            bias: part.bias.as_ref().map(Values::of),
            factors: factors.map(|Factors { a, b, scale, dropout }| {
                let (rank, b) = (dims(a).0, b.each(Values::of));
                let value = match &b {
                    Up::Matrix(_) => None,
                    b => Some(up::value(&b.each(Values::get), dims(&part.weight).0, rank)),
                };
                FactorValues { a: Values::of(a), b, value, rank, scale: *scale, dropout: *dropout }
            }),
        }
    }

    fn rank(&self) -> usize {
        self.factors.as_ref().map_or(0, |factors| factors.rank)
    }

    fn projection(&self) -> Projection<'_> {
        let low_rank = self.factors.as_ref().map(|factors| LowRank {
            a: factors.a.get(),
            b: match (&factors.value, &factors.b) {
                (None, Up::Matrix(b)) => b.get(),
                (value, _) => value.as_deref().unwrap_or_default(),
            },
            rank: factors.rank,
            scale: factors.scale,
            dropout: factors.dropout,
        });
        let (weight, bias) = (self.weight.get(), self.bias.as_ref().map(Values::get));
        Projection { weight, out: self.out, bias, low_rank }
    }
}

/// Attention's inputs with their values at hand.
struct AttentionValues {
    rotation: Option<(Values, Values)>,
    norms: Option<(Values, Values)>,
    first: Vec<i32>,
}

impl AttentionValues {
    fn of(
        rotation: &Option<(FlexTensor, FlexTensor)>,
        norms: &Option<(FlexTensor, FlexTensor)>,
        first: &FlexTensor,
    ) -> Self {
        let pair = |pair: &Option<(FlexTensor, FlexTensor)>| {
            pair.as_ref().map(|(a, b)| (Values::of(a), Values::of(b)))
        };
        Self { rotation: pair(rotation), norms: pair(norms), first: integers(first) }
    }

    fn rotary(&self) -> Option<(&[f32], &[f32])> {
        self.rotation.as_ref().map(|(cos, sin)| (cos.get(), sin.get()))
    }

    fn norms(&self, shape: &AttentionShape) -> Option<HeadNorms<'_>> {
        let norms = self.norms.as_ref();
        norms.map(|(q, k)| HeadNorms { q: q.get(), k: k.get(), epsilon: shape.epsilon as f32 })
    }

    /// Of new tokens in rows of a cache with `slots` slots.
    fn cached(
        &self,
        shape: &AttentionShape,
        tokens: usize,
        length: usize,
        slots: usize,
    ) -> CachedAttention<'_> {
        let rows = self.first.len();
        CachedAttention {
            rows,
            time: tokens / rows,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            slots,
            length,
            rotary: self.rotary(),
            norms: self.norms(shape),
            first: &self.first,
            window: shape.window.unwrap_or(0),
        }
    }

    fn attention(&self, shape: &AttentionShape) -> Attention<'_> {
        Attention {
            tokens: self.first.len(),
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            rotary: self.rotary(),
            norms: self.norms(shape),
            first: &self.first,
            window: shape.window.unwrap_or(0),
        }
    }
}

impl Kernels for Flex {
    conversions!(Flex);

    fn rms_norm(x: &FlexTensor, weight: &FlexTensor, epsilon: f32) -> FlexTensor {
        let (x_values, weight) = (Values::of(x), Values::of(weight));
        let (rows, columns) = dims(x);
        filled(&[rows, columns], |y| rms_norm::forward(y, x_values.get(), weight.get(), epsilon))
    }

    fn rms_norm_backward(
        x: &FlexTensor,
        weight: &FlexTensor,
        epsilon: f32,
        dy: FlexTensor,
        added: Option<&FlexTensor>,
        wants_weight: bool,
        again: bool,
    ) -> FrontGradients<FlexTensor> {
        let (rows, columns) = dims(x);
        let (x, weight, added) = (Values::of(x), Values::of(weight), added.map(Values::of));
        let mut dw = wants_weight.then(|| empty(&[1, columns]));
        let dx = filled(&[rows, columns], |dx| {
            let dw = dw.as_mut().map(|dw| dw.storage_mut());
            let (dy, added) = (Values::of(&dy), added.as_ref().map(Values::get));
            rms_norm::backward(dx, dw, dy.get(), x.get(), weight.get(), epsilon, added);
        });
        let y = again.then(|| {
            let mut y = rows_of(dy);
            rms_norm::forward(y.storage_mut(), x.get(), weight.get(), epsilon);
            y
        });
        FrontGradients { x: dx, weight: dw, y }
    }

    fn dropout(x: &FlexTensor, dropout: &Dropout) -> FlexTensor {
        let ((rows, columns), x) = (dims(x), Values::of(x));
        filled(&[rows, columns], |y| dropout::apply(y, x.get(), columns, dropout, false))
    }

    fn silu_gate(gate_up: &FlexTensor) -> FlexTensor {
        let (rows, both) = dims(gate_up);
        let gate_up = Values::of(gate_up);
        filled(&[rows, both / 2], |y| gated::forward(y, gate_up.get(), both / 2))
    }

    fn silu_gate_backward(gate_up: &FlexTensor, dy: FlexTensor, again: bool) -> FrontGradients<FlexTensor> {
        let (rows, both) = dims(gate_up);
        let (gate_up, mut dy) = (Values::of(gate_up), rows_of(dy));
        let d = filled(&[rows, both], |d| {
            gated::backward(d, gate_up.get(), dy.storage_mut(), both / 2, again);
        });
        FrontGradients { x: d, weight: None, y: again.then_some(dy) }
    }

    fn up_factor(up: &Up<FlexTensor>) -> FlexTensor {
        let (out, rank) = (dims(up.b()).0, dims(up.columns_like()).1);
        let values = up.each(Values::of);
        filled(&[out, rank], |factor| {
            factor.copy_from_slice(&up::value(&values.each(Values::get), out, rank))
        })
    }

    fn linears(
        x: &FlexTensor,
        parts: &[Part<FlexTensor>],
        residual: Option<&FlexTensor>,
    ) -> (FlexTensor, Option<LowRankState<FlexTensor>>) {
        let (rows, inputs) = dims(x);
        let (x, residual) = (Values::of(x), residual.map(Values::of));
        let maps: Vec<Map> = parts.iter().map(Map::of).collect();
        let projections: Vec<Projection> = maps.iter().map(Map::projection).collect();
        let outs: usize = maps.iter().map(|map| map.out).sum();
        let ranks: usize = maps.iter().map(Map::rank).sum();
        let mut down = empty(&[rows, ranks]);
        let y = filled(&[rows, outs], |y| {
            let (down, residual) = (down.storage_mut(), residual.as_ref().map(Values::get));
            linear::forward(y, down, x.get(), residual, rows, inputs, &projections);
        });
        (y, (ranks > 0).then_some(LowRankState { down, factors: None }))
    }

    fn linears_backward(
        dy: &FlexTensor,
        low: Option<&LowRankState<FlexTensor>>,
        parts: &[Part<FlexTensor>],
        wanted: &Wanted,
        front: impl FnOnce(Option<FlexTensor>) -> Option<FlexTensor>,
    ) -> Vec<PartGradients<FlexTensor>> {
        let (rows, inputs) = (dims(dy).0, dims(&parts[0].weight).1);
        let (dy, down) = (Values::of(dy), low.map(|low| Values::of(&low.down)));
        let maps: Vec<Map> = parts.iter().map(Map::of).collect();
        let projections: Vec<Projection> = maps.iter().map(Map::projection).collect();
        let mut dyb = buffers::take(rows * maps.iter().map(Map::rank).sum::<usize>());
        let mut dx = wanted.input.then(|| empty(&[rows, inputs]));
        if wanted.input || wanted.parts.iter().any(|part| part.a) {
            let to = dx.as_mut().map(|dx| dx.storage_mut());
            linear::input_gradient(to, &mut dyb, dy.get(), rows, inputs, &projections);
        }
        let x = front(dx);
        let x = x.as_ref().map(Values::of);
        let mut gradients: Vec<PartGradients<FlexTensor>> = maps
            .iter()
            .zip(parts)
            .zip(&wanted.parts)
            .map(|((map, part), wanted)| {
                let (out, rank) = (map.out, map.rank());
                let trained = part.factors.as_ref().map_or([None; 2], |factors| factors.b.trained());
                let of = |slot: usize| trained[slot].filter(|_| wanted.up[slot]).map(|t| empty(&t.shape()));
                PartGradients {
                    weight: wanted.weight.then(|| empty(&[out, inputs])),
                    bias: wanted.bias.then(|| empty(&[1, out])),
                    a: (wanted.a && rank > 0).then(|| empty(&[rank, inputs])),
                    up: [of(0), of(1)],
                }
            })
            .collect();
        // Of what stands for a B, where that is no matrix.
        let mut wholes: Vec<Option<Buffer>> = maps
            .iter()
            .zip(&gradients)
            .map(|(map, gradients)| {
                let wanted = gradients.up.iter().any(Option::is_some);
                let factors = map.factors.as_ref().filter(|factors| wanted && factors.value.is_some());
                factors.map(|factors| buffers::take(map.out * factors.rank))
            })
            .collect();
        let mut into: Vec<Gradients> = gradients
            .iter_mut()
            .zip(&mut wholes)
            .map(|(part, whole)| Gradients {
                a: part.a.as_mut().map(|a| a.storage_mut()),
                b: match whole {
                    Some(whole) => Some(whole),
                    None => part.up[0].as_mut().map(|b| b.storage_mut()),
                },
                weight: part.weight.as_mut().map(|weight| weight.storage_mut()),
                bias: part.bias.as_mut().map(|bias| bias.storage_mut()),
            })
            .collect();
        let [x, xa] = [&x, &down].map(|values| values.as_ref().map_or(&[][..], Values::get));
        let sources = Sources { dy: dy.get(), x, xa, dyb: &dyb };
        linear::parameter_gradients(&mut into, &sources, rows, inputs, &projections);
        for ((map, gradients), whole) in maps.iter().zip(&mut gradients).zip(&wholes) {
            let Some((factors, whole)) = map.factors.as_ref().zip(whole.as_deref()) else { continue };
            let to = gradients.up.each_mut().map(|to| to.as_mut().map(|to| to.storage_mut()));
            up::backward(&factors.b.each(Values::get), whole, map.out, factors.rank, to);
        }
        gradients
    }

    fn add_sparse(y: FlexTensor, x: &FlexTensor, values: &FlexTensor, pattern: &SparsePattern) -> FlexTensor {
        let (x_values, values) = (Values::of(x), Values::of(values));
        let x = TokenBlocks::new(x_values.get(), dims(x).1);
        let matrix = CompressedRows { starts: pattern.row_starts(), columns: pattern.columns() };
        let mut y = rows_of(y);
        sparse::multiply(y.storage_mut(), &x, matrix, values.get());
        y
    }

    fn sparse_gradients(
        dy: &FlexTensor,
        x: &FlexTensor,
        values: Option<&FlexTensor>,
        pattern: &SparsePattern,
        wants_values: bool,
    ) -> SparseGradients<FlexTensor> {
        let (rows, inputs) = dims(x);
        let dy_blocks = TokenBlocks::new(Values::of(dy).get(), dims(dy).1);
        let input = values.map(Values::of).map(|values| {
            let by_column = pattern.by_column();
            let matrix = CompressedRows { starts: &by_column.starts, columns: &by_column.rows };
            let mut ordered = buffers::take(pattern.len());
            for (value, entry) in ordered.iter_mut().zip(&by_column.entries) {
                *value = values.get()[*entry as usize];
            }
            filled(&[rows, inputs], |dx| {
                dx.fill(0.0);
                sparse::multiply(dx, &dy_blocks, matrix, &ordered);
            })
        });
        let values = wants_values.then(|| {
            let x_blocks = TokenBlocks::new(Values::of(x).get(), inputs);
            let (rows, columns) = (pattern.rows(), pattern.columns());
            filled(&[1, pattern.len()], |products| {
                sparse::sampled_products(products, &dy_blocks, &x_blocks, rows, columns);
            })
        });
        SparseGradients { input, values }
    }

    fn attends(_: &AttentionShape, dtype: DType) -> bool {
        dtype == DType::F32
    }

    fn attend(shape: &AttentionShape, inputs: &AttentionInputs<Self>) -> (FlexTensor, FlexTensor) {
        let AttentionInputs { qkv, rotation, norms, first, .. } = inputs;
        let (qkv, values) = (Values::of(qkv), AttentionValues::of(rotation, norms, first));
        let attention = values.attention(shape);
        let mut log_denominators = empty(&[shape.heads, attention.tokens]);
        let output = filled(&[attention.tokens, shape.heads * shape.head_dim], |output| {
            attention.forward(output, log_denominators.storage_mut(), qkv.get());
        });
        (output, log_denominators)
    }

    fn attend_backward(
        shape: &AttentionShape,
        inputs: &AttentionInputs<Self>,
        output: &FlexTensor,
        log_denominators: &FlexTensor,
        dy: &FlexTensor,
    ) -> FlexTensor {
        let AttentionInputs { qkv, rotation, norms, first, .. } = inputs;
        let (qkv, values) = (Values::of(qkv), AttentionValues::of(rotation, norms, first));
        let (output, lse, dy) = (Values::of(output), Values::of(log_denominators), Values::of(dy));
        let attention = values.attention(shape);
        filled(&[attention.tokens, shape.columns()], |dqkv| {
            attention.backward(dqkv, qkv.get(), output.get(), lse.get(), dy.get());
        })
    }

    fn keep_keys(
        shape: &AttentionShape,
        inputs: &CachedInputs<Self>,
        cache: [FlexTensor; 2],
    ) -> [FlexTensor; 2] {
        let CachedInputs { qkv, rotation, norms, first, length } = inputs;
        let (tokens, values) = (dims(qkv).0, AttentionValues::of(rotation, norms, first));
        let qkv = Values::of(qkv);
        let [mut k, mut v] = cache.map(rows_of);
        let attention = values.cached(shape, tokens, *length, k.shape()[2]);
        attention.keep(k.storage_mut(), v.storage_mut(), qkv.get());
        [k, v]
    }

    fn attend_cached(
        shape: &AttentionShape,
        inputs: &CachedInputs<Self>,
        cache: [FlexTensor; 2],
    ) -> (FlexTensor, [FlexTensor; 2]) {
        let CachedInputs { qkv, rotation, norms, first, length } = inputs;
        let (tokens, values) = (dims(qkv).0, AttentionValues::of(rotation, norms, first));
        let (qkv, slots) = (Values::of(qkv), cache[0].shape()[2]);
        let attention = values.cached(shape, tokens, *length, slots);
        let [k, v] = Self::keep_keys(shape, inputs, cache);
        let output = filled(&[tokens, shape.heads * shape.head_dim], |output| {
            attention.attend(output, Values::of(&k).get(), Values::of(&v).get(), qkv.get());
        });
        (output, [k, v])
    }

    fn largest(rows: &FlexTensor) -> FlexTensor {
        let ((count, columns), rows) = (dims(rows), Values::of(rows));
        let places = Bytes::from_elems(largest::largest(rows.get(), columns));
        FlexTensor::new(places, Layout::contiguous(Shape::from(vec![count])), DType::I32)
    }

    fn read_later(numbers: FlexTensor) -> Box<dyn FnOnce() -> Vec<u32>> {
        Box::new(move || integers(&numbers).into_iter().map(|number| number as u32).collect())
    }

    fn adamw(
        optimizer: &AdamW,
        updates: Vec<Update<FlexTensor>>,
        clip: Option<(FlexTensor, f64)>,
    ) -> Vec<[FlexTensor; 3]> {
        let factor = clip.map_or(Some(1.0), |(squares, max)| {
            clip_factor(f64::from(Values::of(&squares).get()[0]).sqrt(), max)
        });
        let Some(factor) = factor else {
            let same = |update: Update<FlexTensor>| [update.parameter, update.moment_1, update.moment_2];
            return updates.into_iter().map(same).collect();
        };
        let mut results = Vec::with_capacity(updates.len());
        let mut steps = Vec::with_capacity(updates.len());
        for update in updates {
            results.push([update.parameter, update.moment_1, update.moment_2].map(rows_of));
            steps.push((Values::of(&update.gradient), update.rate, update.time));
        }
        let mut parameters: Vec<(i64, adamw::Parameter)> = results
            .iter_mut()
            .zip(&steps)
            .map(|([parameter, moment_1, moment_2], (gradient, learning_rate, time))| {
                let parameter = adamw::Parameter {
                    value: parameter.storage_mut(),
                    gradient: gradient.get(),
                    moment_1: moment_1.storage_mut(),
                    moment_2: moment_2.storage_mut(),
                    learning_rate: *learning_rate,
                };
                (*time, parameter)
            })
            .collect();
        while let Some(time) = parameters.first().map(|(time, _)| *time) {
            let (now, later): (Vec<_>, Vec<_>) = parameters.into_iter().partition(|(at, _)| *at == time);
            parameters = later;
            let mut now: Vec<adamw::Parameter> = now.into_iter().map(|(_, parameter)| parameter).collect();
            let constants = adamw::AdamW {
                beta_1: optimizer.beta_1,
                beta_2: optimizer.beta_2,
                epsilon: optimizer.epsilon,
                weight_decay: optimizer.weight_decay,
                time: time as i32,
            };
            adamw::adamw(constants, factor as f32, &mut now);
        }
        results
    }

    fn sum_of_squares(tensors: Vec<FlexTensor>) -> FlexTensor {
        let tensors: Vec<Values> = tensors.iter().map(Values::of).collect();
        let slices: Vec<&[f32]> = tensors.iter().map(Values::get).collect();
        filled(&[1], |total| total[0] = adamw::sum_of_squares(&slices) as f32)
    }

    fn cross_entropy(
        logits: FlexTensor,
        targets: &IntTensor<Self>,
        gradient_scale: Option<f32>,
    ) -> CrossEntropyParts<Self> {
        let columns = dims(&logits).1;
        let mut logits = rows_of(logits);
        let scale = gradient_scale.unwrap_or(0.0);
        let score = cross_entropy::cross_entropy(logits.storage_mut(), &integers(targets), columns, scale);
        scored(score, gradient_scale.map(|_| logits))
    }

    fn head_loss(
        rows: &FlexTensor,
        weight: &FlexTensor,
        targets: &IntTensor<Self>,
        _: usize,
        gradient_scale: Option<f32>,
    ) -> CrossEntropyParts<Self> {
        let (count, hidden) = dims(rows);
        let (rows, weight, targets) = (Values::of(rows), Values::of(weight), integers(targets));
        let mut dx = gradient_scale.map(|_| empty(&[count, hidden]));
        let into = dx.as_mut().map(|dx| dx.storage_mut());
        let scale = gradient_scale.unwrap_or(0.0);
        let score = cross_entropy::head_loss(into, rows.get(), weight.get(), &targets, hidden, scale);
        scored(score, dx)
    }
}

fn scored(score: Score, gradient: Option<FlexTensor>) -> CrossEntropyParts<Flex> {
    let loss_sum = filled(&[1], |loss| loss[0] = score.loss as f32);
    CrossEntropyParts { loss_sum, correct: count(score.correct), gradient }
}
