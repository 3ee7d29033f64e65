//! The kernels over cubecl's tensors.

use super::cublaslt::{Element, Product};
use super::engine::{Arguments, Buffers, Launch, Source, submit};
use super::{attention, optimizer};
use crate::kernels::adamw::{AdamW, Update};
use crate::kernels::attention::{AttentionInputs, AttentionShape};
use crate::kernels::backend::{Kernels, conversions};
use crate::kernels::cross_entropy::CrossEntropyParts;
use crate::kernels::linear::{LinearGradients, Part, PartGradients, Wanted};
use burn::backend::Cube;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::{into_contiguous, slice};
use burn_cubecl::tensor::CubeTensor;

const CODE: &str = include_str!("elementwise.cu");

/// The row-wise and elementwise kernels for activations of a type.
pub(super) fn elementwise(dtype: DType) -> Source {
    match dtype {
        DType::BF16 => Source { code: CODE, constant: Some(("BF16", 1)) },
        _ => Source { code: CODE, constant: None },
    }
}

/// A new tensor on the device of `like`, not filled.
pub(super) fn empty(like: &CubeTensor, shape: &[usize], dtype: DType) -> CubeTensor {
    let bytes = shape.iter().product::<usize>() * dtype.size();
    let (client, device) = (like.client.clone(), like.device.clone());
    let handle = client.empty(bytes);
    CubeTensor::new_contiguous(client, device, Shape::from(shape.to_vec()), handle, dtype)
}

/// Rows and columns.
fn dims(tensor: &CubeTensor) -> (usize, usize) {
    (tensor.meta.shape()[0], tensor.meta.shape()[1])
}

pub(super) fn contiguous(tensor: &CubeTensor) -> CubeTensor {
    into_contiguous(tensor.clone())
}

fn element(dtype: DType) -> Element {
    match dtype {
        DType::BF16 => Element::Bf16,
        _ => Element::F32,
    }
}

/// Elements that the kernels read at a time, in rows of `columns`.
fn vectors(dtype: DType, columns: usize) -> usize {
    usize::from(columns.is_multiple_of(16 / dtype.size()))
}

/// Threads for a row of `columns`: whole warps, one vector each while they last.
fn row_threads(dtype: DType, columns: usize, most: usize) -> usize {
    let pieces = if vectors(dtype, columns) == 1 { columns / (16 / dtype.size()) } else { columns };
    pieces.next_multiple_of(32).clamp(32, most)
}

/// Threads over all pieces of a matrix with rows of `columns`.
fn pieces(dtype: DType, rows: usize, columns: usize) -> usize {
    let lanes = if vectors(dtype, columns) == 1 { 16 / dtype.size() } else { 1 };
    rows * columns / lanes
}

/// A product of matrices without gaps between their rows.
fn dense(m: usize, n: usize, k: usize, dtype: DType) -> Product {
    let element = element(dtype);
    Product { m, n, k, a: (false, k), b: (false, n), c: n, input: element, output: element }
}

/// Where the maps' columns and ranks begin in what lies side by side.
struct Layout {
    outs: Vec<(usize, usize)>,
    ranks: Vec<(usize, usize)>,
    out: usize,
    rank: usize,
}

impl Layout {
    fn new(parts: &[Part<CubeTensor>]) -> Self {
        let side_by_side = |sizes: Vec<usize>| {
            let mut total = 0;
            let places = sizes.into_iter().map(|size| {
                total += size;
                (total - size, size)
            });
            (places.collect::<Vec<_>>(), total)
        };
        let (outs, out) = side_by_side(parts.iter().map(|part| dims(&part.weight).0).collect());
        let rank = |part: &Part<CubeTensor>| part.factors.as_ref().map_or(0, |(a, _, _)| dims(a).0);
        let (ranks, rank) = side_by_side(parts.iter().map(rank).collect());
        Self { outs, ranks, out, rank }
    }
}

/// The factors of all maps in the activations' type: `[A₁; A₂; …]` `[Σr, in]`, then each `s·B` `[out, r]` one after another.
struct Factors {
    tensor: CubeTensor,
    /// Per map: elements before its `A`, and before its `B`.
    places: Vec<(usize, usize)>,
}

impl Factors {
    fn cast(parts: &[Part<CubeTensor>], inputs: usize, dtype: DType) -> Option<Self> {
        let all_ranks: usize =
            parts.iter().filter_map(|part| part.factors.as_ref()).map(|f| dims(&f.0).0).sum();
        let like = &parts.iter().find_map(|part| part.factors.as_ref())?.0;
        let (mut a_place, mut b_place) = (0, all_ranks * inputs);
        let mut places = Vec::with_capacity(parts.len());
        let mut casts = Vec::new();
        for part in parts {
            // Matrices begin at multiples of 256 bytes where their size allows it.
            places.push((a_place, b_place));
            if let Some((a, b, scale)) = &part.factors {
                let (rank, out) = (dims(a).0, dims(b).0);
                casts.push((contiguous(a), a_place, rank * inputs, 1.0));
                casts.push((contiguous(b), b_place, out * rank, *scale));
                a_place += rank * inputs;
                b_place += (out * rank).next_multiple_of(128);
            }
        }
        let tensor = empty(like, &[b_place], dtype);
        let mut buffers = vec![&tensor.handle];
        buffers.extend(casts.iter().map(|cast| &cast.0.handle));
        let jobs: Vec<(usize, usize, f32)> = casts.iter().map(|(_, at, n, s)| (*at, *n, *s)).collect();
        let source = elementwise(dtype);
        submit(&tensor.client, &buffers, move |queue, addresses| {
            let most = jobs.iter().map(|job| job.1).max().unwrap_or(0);
            let mut arguments = Arguments::default();
            for slot in 0..6 {
                arguments = match jobs.get(slot) {
                    Some((at, count, scale)) => arguments.structure(&[
                        addresses[1 + slot],
                        addresses[0] + (at * dtype.size()) as u64,
                        *count as u64 | u64::from(scale.to_bits()) << 32,
                    ]),
                    None => arguments.structure(&[0; 3]),
                };
            }
            let grid = (most.div_ceil(1024).min(256), jobs.len(), 1);
            queue.launch(source, "cast_factors", Launch { grid, block: (256, 1), shared: 0 }, arguments)
        });
        Some(Self { tensor, places })
    }
}

/// The bytes before an element.
fn at(address: u64, elements: usize, dtype: DType) -> u64 {
    address + (elements * dtype.size()) as u64
}

impl Kernels for Cube {
    conversions!(Cube);

    fn rms_norm(x: &CubeTensor, weight: &CubeTensor, epsilon: f32) -> CubeTensor {
        let (x, weight) = (contiguous(x), contiguous(weight));
        let ((rows, columns), dtype) = (dims(&x), x.dtype);
        let y = empty(&x, &[rows, columns], dtype);
        submit(&y.client, &[&x.handle, &weight.handle, &y.handle], move |queue, buffers| {
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]).address(buffers[2]);
            let arguments = arguments.int(columns).int(vectors(dtype, columns)).float(epsilon);
            let launch = Launch::new(rows, row_threads(dtype, columns, 256));
            queue.launch(elementwise(dtype), "rms_norm", launch, arguments)
        });
        y
    }

    fn rms_norm_backward(
        x: &CubeTensor,
        weight: &CubeTensor,
        epsilon: f32,
        dy: &CubeTensor,
        wants_weight: bool,
    ) -> (CubeTensor, Option<CubeTensor>) {
        let (x, weight, dy) = (contiguous(x), contiguous(weight), contiguous(dy));
        let ((rows, columns), dtype) = (dims(&x), x.dtype);
        let dx = empty(&x, &[rows, columns], dtype);
        let inverse = empty(&x, &[rows], DType::F32);
        let dw = wants_weight.then(|| empty(&x, &[1, columns], dtype));
        let mut buffers = vec![&x.handle, &weight.handle, &dy.handle, &dx.handle, &inverse.handle];
        buffers.extend(dw.as_ref().map(|dw| &dw.handle));
        submit(&x.client, &buffers, move |queue, buffers| {
            let source = elementwise(dtype);
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]).address(buffers[2]);
            let arguments = arguments.address(buffers[3]).address(buffers[4]);
            let arguments = arguments.int(columns).int(vectors(dtype, columns)).float(epsilon);
            let launch = Launch::new(rows, row_threads(dtype, columns, 256));
            queue.launch(source, "rms_norm_backward", launch, arguments)?;
            let Some(dw) = buffers.get(5) else { return Ok(()) };
            let arguments = Arguments::default().address(buffers[2]).int(columns).address(buffers[0]);
            let arguments = arguments.address(buffers[4]).address(*dw).int(rows).int(columns);
            queue.launch(source, "column_sums", column_launch(columns), arguments)
        });
        (dx, dw)
    }

    fn silu_gate(gate_up: &CubeTensor) -> CubeTensor {
        let gate_up = contiguous(gate_up);
        let ((rows, both), dtype) = (dims(&gate_up), gate_up.dtype);
        let columns = both / 2;
        let y = empty(&gate_up, &[rows, columns], dtype);
        submit(&y.client, &[&gate_up.handle, &y.handle], move |queue, buffers| {
            let pieces = pieces(dtype, rows, columns);
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]);
            let arguments = arguments.long(pieces).int(columns).int(vectors(dtype, columns));
            let launch = Launch::new(pieces.div_ceil(256), 256);
            queue.launch(elementwise(dtype), "silu_gate", launch, arguments)
        });
        y
    }

    fn silu_gate_backward(gate_up: &CubeTensor, dy: &CubeTensor) -> CubeTensor {
        let (gate_up, dy) = (contiguous(gate_up), contiguous(dy));
        let ((rows, columns), dtype) = (dims(&dy), dy.dtype);
        let d = empty(&gate_up, &[rows, 2 * columns], dtype);
        submit(&d.client, &[&gate_up.handle, &dy.handle, &d.handle], move |queue, buffers| {
            let pieces = pieces(dtype, rows, columns);
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]).address(buffers[2]);
            let arguments = arguments.long(pieces).int(columns).int(vectors(dtype, columns));
            let launch = Launch::new(pieces.div_ceil(256), 256);
            queue.launch(elementwise(dtype), "silu_gate_backward", launch, arguments)
        });
        d
    }

    fn linears(
        x: &CubeTensor,
        parts: &[Part<CubeTensor>],
        residual: Option<&CubeTensor>,
    ) -> (CubeTensor, Option<CubeTensor>) {
        let x = contiguous(x);
        let ((rows, inputs), dtype) = (dims(&x), x.dtype);
        let layout = Layout::new(parts);
        let y = empty(&x, &[rows, layout.out], dtype);
        let factors = Factors::cast(parts, inputs, dtype);
        let down = factors.as_ref().map(|_| empty(&x, &[rows, layout.rank], dtype));
        let weights: Vec<CubeTensor> = parts.iter().map(|part| contiguous(&part.weight)).collect();
        let biases: Vec<CubeTensor> =
            parts.iter().filter_map(|part| part.bias.as_ref()).map(contiguous).collect();
        let has_bias: Vec<bool> = parts.iter().map(|part| part.bias.is_some()).collect();
        let residual = residual.map(contiguous);

        let mut buffers = vec![&x.handle, &y.handle];
        buffers.extend(weights.iter().map(|weight| &weight.handle));
        let first_bias = buffers.len();
        buffers.extend(biases.iter().map(|bias| &bias.handle));
        let first_factor = buffers.len();
        buffers.extend(factors.iter().map(|factors| &factors.tensor.handle));
        buffers.extend(down.iter().map(|down| &down.handle));
        let first_residual = buffers.len();
        buffers.extend(residual.iter().map(|residual| &residual.handle));
        let places = factors.as_ref().map(|factors| factors.places.clone());
        submit(&y.client, &buffers, move |queue, buffers| {
            let (x, y) = (buffers[0], buffers[1]);
            let Layout { outs, ranks, out, rank } = &layout;
            let base = buffers.get(first_residual).copied();
            for ((start, width), weight) in outs.iter().zip(&buffers[2..]) {
                let product = Product { b: (true, inputs), c: *out, ..dense(rows, *width, inputs, dtype) };
                let to = at(y, *start, dtype);
                let (beta, from) = base.map_or((0.0, to), |base| (1.0, at(base, *start, dtype)));
                queue.product(&product, 1.0, x, *weight, beta, from, to)?;
            }
            if let Some(places) = &places {
                let (factors, down) = (buffers[first_factor], buffers[first_factor + 1]);
                let product = Product { b: (true, inputs), ..dense(rows, *rank, inputs, dtype) };
                queue.product(&product, 1.0, x, factors, 0.0, down, down)?;
                for (((start, width), (first, r)), (_, b)) in outs.iter().zip(ranks).zip(places) {
                    if *r == 0 {
                        continue;
                    }
                    let product = Product {
                        a: (false, *rank),
                        b: (true, *r),
                        c: *out,
                        ..dense(rows, *width, *r, dtype)
                    };
                    let to = at(y, *start, dtype);
                    let (down, b) = (at(down, *first, dtype), at(factors, *b, dtype));
                    queue.product(&product, 1.0, down, b, 1.0, to, to)?;
                }
            }
            let mut bias = first_bias;
            for ((start, width), has_bias) in outs.iter().zip(&has_bias) {
                if *has_bias {
                    let arguments = Arguments::default().address(at(y, *start, dtype)).int(*out);
                    let arguments = arguments.address(buffers[bias]).int(rows).int(*width);
                    let launch = Launch::new((rows * width).div_ceil(256), 256);
                    queue.launch(elementwise(dtype), "add_bias", launch, arguments)?;
                    bias += 1;
                }
            }
            Ok(())
        });
        (y, down)
    }

    fn linears_backward(
        dy: &CubeTensor,
        x: &CubeTensor,
        down: Option<&CubeTensor>,
        parts: &[Part<CubeTensor>],
        wanted: &Wanted,
    ) -> LinearGradients<CubeTensor> {
        let (dy, x) = (contiguous(dy), contiguous(x));
        let ((rows, inputs), dtype) = (dims(&x), x.dtype);
        let layout = Layout::new(parts);
        let dx = wanted.input.then(|| empty(&x, &[rows, inputs], dtype));
        let factors = Factors::cast(parts, inputs, dtype);
        let with_factors = down.zip(factors.as_ref());
        let ddown = with_factors.map(|_| empty(&x, &[rows, layout.rank], dtype));
        // The gradients of all As lie under one another, so that one product makes them.
        let da = with_factors.map(|_| empty(&x, &[layout.rank, inputs], DType::F32));
        let of_b: Vec<Option<CubeTensor>> = parts
            .iter()
            .zip(&layout.ranks)
            .map(|(part, (_, rank))| {
                (*rank > 0).then(|| empty(&x, &[dims(&part.weight).0, *rank], DType::F32))
            })
            .collect();
        let of_weight: Vec<Option<CubeTensor>> = parts
            .iter()
            .zip(&wanted.parts)
            .map(|(part, wanted)| wanted.0.then(|| empty(&x, &[dims(&part.weight).0, inputs], dtype)))
            .collect();
        let of_bias: Vec<Option<CubeTensor>> = parts
            .iter()
            .zip(&wanted.parts)
            .map(|(part, wanted)| wanted.1.then(|| empty(&x, &[1, dims(&part.weight).0], dtype)))
            .collect();

        let mut buffers = Buffers::default();
        let (dy_at, x_at) = (buffers.add(&dy), buffers.add(&x));
        let weight_at: Vec<usize> = parts.iter().map(|part| buffers.add(&contiguous(&part.weight))).collect();
        let dx_at = dx.as_ref().map(|dx| buffers.add(dx));
        let low_rank_at = factors.as_ref().zip(down).zip(ddown.as_ref()).zip(da.as_ref()).map(
            |(((factors, down), ddown), da)| {
                [&factors.tensor, &contiguous(down), ddown, da].map(|tensor| buffers.add(tensor))
            },
        );
        let mut each = |tensors: &[Option<CubeTensor>]| -> Vec<Option<usize>> {
            tensors.iter().map(|tensor| tensor.as_ref().map(|tensor| buffers.add(tensor))).collect()
        };
        let (b_at, dw_at, bias_at) = (each(&of_b), each(&of_weight), each(&of_bias));
        let places = factors.as_ref().map(|factors| factors.places.clone()).unwrap_or_default();
        let scales: Vec<f32> =
            parts.iter().map(|part| part.factors.as_ref().map_or(0.0, |factors| factors.2)).collect();
        let ranks = layout.ranks.clone();
        submit(&x.client, &buffers.handles(), move |queue, buffers| {
            let Layout { outs, ranks, out, rank } = &layout;
            let (dy, x) = (buffers[dy_at], buffers[x_at]);
            for (i, (start, width)) in outs.iter().enumerate() {
                let dy = at(dy, *start, dtype);
                if let Some(dx) = dx_at.map(|dx| buffers[dx]) {
                    let product = Product { a: (false, *out), ..dense(rows, inputs, *width, dtype) };
                    let beta = if i == 0 { 0.0 } else { 1.0 };
                    queue.product(&product, 1.0, dy, buffers[weight_at[i]], beta, dx, dx)?;
                }
                if let Some(dw) = dw_at[i].map(|dw| buffers[dw]) {
                    let product = Product { a: (true, *out), ..dense(*width, inputs, rows, dtype) };
                    queue.product(&product, 1.0, dy, x, 0.0, dw, dw)?;
                }
                if let Some(bias) = bias_at[i].map(|bias| buffers[bias]) {
                    let arguments = Arguments::default().address(dy).int(*out).address(0).address(0);
                    let arguments = arguments.address(bias).int(rows).int(*width);
                    queue.launch(elementwise(dtype), "column_sums", column_launch(*width), arguments)?;
                }
            }
            let Some([factors, down, ddown, da]) = low_rank_at.map(|at| at.map(|at| buffers[at])) else {
                return Ok(());
            };
            for (i, ((start, width), (first, r))) in outs.iter().zip(ranks).enumerate() {
                let Some(db) = b_at[i].map(|b| buffers[b]) else { continue };
                let dy = at(dy, *start, dtype);
                let product = Product { a: (false, *out), c: *rank, ..dense(rows, *r, *width, dtype) };
                let to = at(ddown, *first, dtype);
                queue.product(&product, 1.0, dy, at(factors, places[i].1, dtype), 0.0, to, to)?;
                let product = Product {
                    a: (true, *out),
                    b: (false, *rank),
                    output: Element::F32,
                    ..dense(*width, *r, rows, dtype)
                };
                queue.product(&product, scales[i], dy, at(down, *first, dtype), 0.0, db, db)?;
            }
            if let Some(dx) = dx_at.map(|dx| buffers[dx]) {
                let product = dense(rows, inputs, *rank, dtype);
                queue.product(&product, 1.0, ddown, factors, 1.0, dx, dx)?;
            }
            let product =
                Product { a: (true, *rank), output: Element::F32, ..dense(*rank, inputs, rows, dtype) };
            queue.product(&product, 1.0, ddown, x, 0.0, da, da)
        });

        let of_a =
            |(first, rank): (usize, usize)| da.clone().map(|da| slice(da, &[first..first + rank, 0..inputs]));
        let gradients =
            of_weight.into_iter().zip(of_bias).zip(of_b).zip(ranks).map(|(((weight, bias), b), place)| {
                PartGradients { weight, bias, factors: b.and_then(|b| of_a(place).map(|a| (a, b))) }
            });
        LinearGradients { input: dx, parts: gradients.collect() }
    }

    fn attends(shape: &AttentionShape, dtype: DType) -> bool {
        attention::attends(shape, dtype)
    }

    fn attend(shape: &AttentionShape, inputs: &AttentionInputs<Self>) -> (CubeTensor, CubeTensor) {
        attention::forward(shape, inputs)
    }

    fn attend_backward(
        shape: &AttentionShape,
        inputs: &AttentionInputs<Self>,
        output: &CubeTensor,
        log_denominators: &CubeTensor,
        dy: &CubeTensor,
    ) -> CubeTensor {
        attention::backward(shape, inputs, output, log_denominators, dy)
    }

    fn adamw(optimizer: &AdamW, updates: Vec<Update<CubeTensor>>) -> Vec<[CubeTensor; 3]> {
        optimizer::adamw(optimizer, updates)
    }

    fn sum_of_squares(tensors: Vec<CubeTensor>) -> CubeTensor {
        optimizer::sum_of_squares(tensors)
    }

    fn cross_entropy(
        logits: CubeTensor,
        targets: &IntTensor<Self>,
        gradient_scale: Option<f32>,
    ) -> CrossEntropyParts<Self> {
        let dtype = logits.dtype;
        // The gradient takes the place of the logits, which must be nobody else's then.
        let logits = match gradient_scale {
            Some(_) if !logits.can_mut() => logits.copy(),
            _ => contiguous(&logits),
        };
        let targets = contiguous(targets);
        let (rows, columns) = dims(&logits);
        let losses = empty(&logits, &[rows], DType::F32);
        let hits = empty(&logits, &[rows], DType::I32);
        let (loss_sum, correct) = (empty(&logits, &[1], DType::F32), empty(&logits, &[1], DType::I32));
        let wide = targets.dtype == DType::I64;
        let handles = [&logits, &targets, &losses, &hits, &loss_sum, &correct].map(|tensor| &tensor.handle);
        submit(&logits.client, &handles, move |queue, buffers| {
            let source = elementwise(dtype);
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]);
            let arguments = arguments.int(usize::from(wide)).address(buffers[2]).address(buffers[3]);
            let arguments = arguments.int(columns).int(vectors(dtype, columns));
            let arguments = arguments.int(usize::from(gradient_scale.is_some()));
            let arguments = arguments.float(gradient_scale.unwrap_or_default());
            let launch = Launch::new(rows, row_threads(dtype, columns, 1024));
            queue.launch(source, "cross_entropy", launch, arguments)?;
            let arguments = Arguments::default().address(buffers[2]).address(buffers[3]).int(rows);
            let arguments = arguments.address(buffers[4]).address(buffers[5]);
            queue.launch(source, "loss_totals", Launch::new(1, 1024), arguments)
        });
        let gradient = gradient_scale.map(|_| logits);
        CrossEntropyParts { loss_sum, correct, gradient }
    }

    fn head_loss(
        rows: &CubeTensor,
        weight: &CubeTensor,
        targets: &IntTensor<Self>,
        chunk: usize,
        gradient_scale: Option<f32>,
    ) -> CrossEntropyParts<Self> {
        let (rows, weight, targets) = (contiguous(rows), contiguous(weight), contiguous(targets));
        let ((count, hidden), dtype) = (dims(&rows), rows.dtype);
        let vocab = dims(&weight).0;
        // One buffer for the logits of all chunks: their gradient takes their place and is used up at once.
        let logits = empty(&rows, &[chunk, vocab], dtype);
        let dx = gradient_scale.map(|_| empty(&rows, &[count, hidden], dtype));
        let (losses, hits) = (empty(&rows, &[count], DType::F32), empty(&rows, &[count], DType::I32));
        let (loss_sum, correct) = (empty(&rows, &[1], DType::F32), empty(&rows, &[1], DType::I32));
        let wide = targets.dtype == DType::I64;
        let mut buffers = Buffers::default();
        for tensor in [&rows, &weight, &targets, &logits, &losses, &hits, &loss_sum, &correct] {
            buffers.add(tensor);
        }
        let dx_at = dx.as_ref().map(|dx| buffers.add(dx));
        submit(&rows.client, &buffers.handles(), move |queue, buffers| {
            let source = elementwise(dtype);
            let [x, w, targets, logits, losses, hits, loss_sum, correct] =
                std::array::from_fn(|i| buffers[i]);
            for start in (0..count).step_by(chunk) {
                let rows = chunk.min(count - start);
                let x = at(x, start * hidden, dtype);
                let product = Product { b: (true, hidden), ..dense(rows, vocab, hidden, dtype) };
                queue.product(&product, 1.0, x, w, 0.0, logits, logits)?;
                let bytes = start as u64 * 4;
                let arguments = Arguments::default().address(logits);
                let arguments = arguments.address(targets + if wide { 2 * bytes } else { bytes });
                let arguments =
                    arguments.int(usize::from(wide)).address(losses + bytes).address(hits + bytes);
                let arguments = arguments.int(vocab).int(vectors(dtype, vocab));
                let arguments = arguments.int(usize::from(gradient_scale.is_some()));
                let arguments = arguments.float(gradient_scale.unwrap_or_default());
                let launch = Launch::new(rows, row_threads(dtype, vocab, 1024));
                queue.launch(source, "cross_entropy", launch, arguments)?;
                if let Some(dx) = dx_at.map(|dx| at(buffers[dx], start * hidden, dtype)) {
                    queue.product(&dense(rows, hidden, vocab, dtype), 1.0, logits, w, 0.0, dx, dx)?;
                }
            }
            let arguments = Arguments::default().address(losses).address(hits).int(count);
            let arguments = arguments.address(loss_sum).address(correct);
            queue.launch(source, "loss_totals", Launch::new(1, 1024), arguments)
        });
        CrossEntropyParts { loss_sum, correct, gradient: dx }
    }
}

/// The launch of `column_sums`.
fn column_launch(columns: usize) -> Launch {
    Launch { grid: (columns.div_ceil(32), 1, 1), block: (32, 8), shared: 0 }
}
