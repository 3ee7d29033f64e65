//! The kernels over cubecl's tensors.

use super::cublaslt::{Element, Product};
use super::engine::{Arguments, Buffers, Launch, Queue, Source, flush, read_later, submit, together};
use super::error::Fault;
use super::{attention, optimizer, sparse};
use crate::kernels::READ_BACK;
use crate::kernels::adamw::{AdamW, Update};
use crate::kernels::attention::{AttentionInputs, AttentionShape, CachedInputs};
use crate::kernels::backend::{Kernels, conversions};
use crate::kernels::cross_entropy::CrossEntropyParts;
use crate::kernels::dropout::Dropout;
use crate::kernels::linear::{
    Factors as LowRank, LinearGradients, LowRankState, Part, PartGradients, Wanted,
};
use crate::kernels::sparse::{SparseGradients, SparsePattern};
use burn::backend::Cube;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::{into_contiguous, slice};
use burn_cubecl::tensor::CubeTensor;

const CODE: &str = concat!(include_str!("scalar.cu"), include_str!("elementwise.cu"));

/// The row-wise and elementwise kernels for activations of a type.
pub(super) fn elementwise(dtype: DType) -> Source {
    match dtype {
        DType::BF16 => Source { name: "elementwise", code: CODE, constant: Some(("BF16", 1)) },
        _ => Source { name: "elementwise", code: CODE, constant: None },
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
pub(super) fn dims(tensor: &CubeTensor) -> (usize, usize) {
    (tensor.meta.shape()[0], tensor.meta.shape()[1])
}

/// The tensor with its rows one after another, which may be a copy.
pub(super) fn contiguous(tensor: &CubeTensor) -> CubeTensor {
    if !tensor.is_contiguous() {
        // cubecl's copy must come after what makes the tensor.
        flush();
    }
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

/// The launch of the gate's kernels.
fn gate_launch(dtype: DType, rows: usize, columns: usize) -> Launch {
    let lanes = if vectors(dtype, columns) == 1 { 16 / dtype.size() } else { 1 };
    let threads = (columns / lanes).next_multiple_of(32).min(256);
    Launch { grid: (rows, (columns / lanes).div_ceil(threads), 1), block: (threads, 1), shared: 0 }
}

/// Maps whose weights lie one after another.
struct JoinedMaps {
    /// Where their columns of the result begin.
    start: usize,
    /// How many columns there are.
    width: usize,
    /// The address of the first weight.
    weight: u64,
}

/// Joins weights that lie one after another.
fn joined(layout: &Layout, weights: &[u64], inputs: usize, dtype: DType) -> Vec<JoinedMaps> {
    let mut runs: Vec<JoinedMaps> = Vec::with_capacity(weights.len());
    for (&(start, width), &weight) in layout.outs.iter().zip(weights) {
        match runs.last_mut() {
            Some(run) if at(run.weight, run.width * inputs, dtype) == weight => run.width += width,
            _ => runs.push(JoinedMaps { start, width, weight }),
        }
    }
    runs
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
        let rank = |part: &Part<CubeTensor>| part.factors.as_ref().map_or(0, |factors| dims(&factors.a).0);
        let (ranks, rank) = side_by_side(parts.iter().map(rank).collect());
        Self { outs, ranks, out, rank }
    }
}

/// The factors of all maps in the activations' type: `[A₁; A₂; …]` `[Σr, in]`, then each `s·B` in the rows of its map and
/// the columns of its rank, `[out, Σr]`, with zeros elsewhere: one thin product takes all maps at once, and what it
/// multiplies by zero costs less than more products.
struct Factors {
    /// Elements before the `B`s.
    b: usize,
    /// Elements in all.
    len: usize,
}

impl Factors {
    fn new(layout: &Layout, inputs: usize) -> Option<Self> {
        // The Bs begin at a multiple of 256 bytes.
        let b = (layout.rank * inputs).next_multiple_of(128);
        (layout.rank > 0).then_some(Self { b, len: b + layout.out * layout.rank })
    }
}

/// A factor that is cast.
struct Cast {
    /// Where its buffer stands; `None` where a map has no term.
    from: Option<usize>,
    /// Elements before the first row that it is written to.
    to: usize,
    /// Rows, and its columns.
    dims: (usize, usize),
    /// The first of these columns there, and how many there are.
    columns: (usize, usize),
    scale: f32,
}

impl Cast {
    /// Those of all maps.
    fn all(
        parts: &[Part<CubeTensor>],
        layout: &Layout,
        factors: &Factors,
        inputs: usize,
        buffers: &mut Buffers,
    ) -> Vec<Self> {
        let mut casts = Vec::with_capacity(2 * parts.len());
        for ((part, (start, out)), (first, rank)) in parts.iter().zip(&layout.outs).zip(&layout.ranks) {
            let low = part.factors.as_ref();
            if let Some(LowRank { a, .. }) = low {
                let (from, to) = (Some(buffers.add_rows(a)), first * inputs);
                casts.push(Self { from, to, dims: (*rank, inputs), columns: (0, inputs), scale: 1.0 });
            }
            casts.push(Self {
                from: low.map(|LowRank { b, .. }| buffers.add_rows(b)),
                to: factors.b + start * layout.rank,
                dims: (*out, *rank),
                columns: (*first, layout.rank),
                scale: low.map_or(0.0, |low| low.scale),
            });
        }
        casts
    }

    /// Enqueues them.
    fn enqueue(
        casts: &[Self],
        queue: &mut Queue,
        dtype: DType,
        buffers: &[u64],
        to: u64,
    ) -> Result<(), Fault> {
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        let mut arguments = Arguments::default();
        for slot in 0..6 {
            arguments = match casts.get(slot) {
                Some(cast) => arguments.structure(&[
                    cast.from.map_or(0, |from| buffers[from]),
                    at(to, cast.to, dtype),
                    pair(cast.dims.0, cast.dims.1),
                    pair(cast.columns.0, cast.columns.1),
                    u64::from(cast.scale.to_bits()),
                ]),
                None => arguments.structure(&[0; 5]),
            };
        }
        let most = casts.iter().map(|cast| cast.dims.0 * cast.columns.1).max().unwrap_or(0);
        let grid = (most.div_ceil(1024).min(256), casts.len(), 1);
        let launch = Launch { grid, block: (256, 1), shared: 0 };
        queue.launch(elementwise(dtype), "cast_factors", launch, arguments)
    }
}

/// The bytes before an element.
fn at(address: u64, elements: usize, dtype: DType) -> u64 {
    address + (elements * dtype.size()) as u64
}

impl Kernels for Cube {
    conversions!(Cube);

    fn together<R>(work: impl FnOnce() -> R) -> R {
        together(work)
    }

    fn rms_norm(x: &CubeTensor, weight: &CubeTensor, epsilon: f32) -> CubeTensor {
        let (x, weight) = (contiguous(x), contiguous(weight));
        let ((rows, columns), dtype) = (dims(&x), x.dtype);
        let y = empty(&x, &[rows, columns], dtype);
        submit("rms_norm", &y.client, &[&x.handle, &weight.handle, &y.handle], move |queue, buffers| {
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
        added: Option<&CubeTensor>,
        wants_weight: bool,
    ) -> (CubeTensor, Option<CubeTensor>) {
        let ((rows, columns), dtype) = (dims(x), x.dtype);
        let dx = empty(x, &[rows, columns], dtype);
        let inverse = empty(x, &[rows], DType::F32);
        let dw = wants_weight.then(|| empty(x, &[1, columns], dtype));
        let mut buffers = Buffers::default();
        let [x_at, weight_at, dy_at] = [x, weight, dy].map(|tensor| buffers.add_rows(tensor));
        let [dx_at, inverse_at] = [&dx, &inverse].map(|tensor| buffers.add(tensor));
        let added_at = added.map(|added| buffers.add_rows(added));
        let dw_at = dw.as_ref().map(|dw| buffers.add(dw));
        submit("rms_norm_backward", &x.client, &buffers.handles(), move |queue, buffers| {
            let source = elementwise(dtype);
            let [x, weight, dy, dx, inverse] =
                [x_at, weight_at, dy_at, dx_at, inverse_at].map(|at| buffers[at]);
            let arguments = Arguments::default().address(x).address(weight).address(dy);
            let arguments = arguments.address(added_at.map_or(0, |added| buffers[added]));
            let arguments = arguments.address(dx).address(inverse);
            let arguments = arguments.int(columns).int(vectors(dtype, columns)).float(epsilon);
            let launch = Launch::new(rows, row_threads(dtype, columns, 256));
            queue.launch(source, "rms_norm_backward", launch, arguments)?;
            let Some(dw) = dw_at.map(|dw| buffers[dw]) else { return Ok(()) };
            let arguments = Arguments::default().address(dy).int(columns).address(x);
            let arguments = arguments.address(inverse).address(dw).int(rows).int(columns);
            queue.launch(source, "column_sums", column_launch(columns), arguments)
        });
        (dx, dw)
    }

    fn dropout(x: &CubeTensor, dropout: &Dropout) -> CubeTensor {
        let x = contiguous(x);
        let ((rows, columns), dtype, dropout) = (dims(&x), x.dtype, *dropout);
        let y = empty(&x, &[rows, columns], dtype);
        submit("dropout", &y.client, &[&x.handle, &y.handle], move |queue, buffers| {
            drop_elements(queue, dtype, (rows, columns), &dropout, buffers[0], buffers[1], false)
        });
        y
    }

    fn silu_gate(gate_up: &CubeTensor) -> CubeTensor {
        let gate_up = contiguous(gate_up);
        let ((rows, both), dtype) = (dims(&gate_up), gate_up.dtype);
        let columns = both / 2;
        let y = empty(&gate_up, &[rows, columns], dtype);
        submit("silu_gate", &y.client, &[&gate_up.handle, &y.handle], move |queue, buffers| {
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]);
            let arguments = arguments.int(columns).int(vectors(dtype, columns));
            queue.launch(elementwise(dtype), "silu_gate", gate_launch(dtype, rows, columns), arguments)
        });
        y
    }

    fn silu_gate_backward(gate_up: &CubeTensor, dy: &CubeTensor) -> CubeTensor {
        let (gate_up, dy) = (contiguous(gate_up), contiguous(dy));
        let ((rows, columns), dtype) = (dims(&dy), dy.dtype);
        let d = empty(&gate_up, &[rows, 2 * columns], dtype);
        submit(
            "silu_gate_backward",
            &d.client,
            &[&gate_up.handle, &dy.handle, &d.handle],
            move |queue, buffers| {
                let arguments =
                    Arguments::default().address(buffers[0]).address(buffers[1]).address(buffers[2]);
                let arguments = arguments.int(columns).int(vectors(dtype, columns));
                let launch = gate_launch(dtype, rows, columns);
                queue.launch(elementwise(dtype), "silu_gate_backward", launch, arguments)
            },
        );
        d
    }

    fn linears(
        x: &CubeTensor,
        parts: &[Part<CubeTensor>],
        residual: Option<&CubeTensor>,
    ) -> (CubeTensor, Option<LowRankState<CubeTensor>>) {
        let ((rows, inputs), dtype) = (dims(x), x.dtype);
        let layout = Layout::new(parts);
        let mut buffers = Buffers::default();
        let y = empty(x, &[rows, layout.out], dtype);
        let (x_at, y_at) = (buffers.add_rows(x), buffers.add(&y));
        let weight_at: Vec<usize> = parts.iter().map(|part| buffers.add_rows(&part.weight)).collect();
        let bias_at: Vec<Option<usize>> =
            parts.iter().map(|part| part.bias.as_ref().map(|bias| buffers.add_rows(bias))).collect();
        let residual_at = residual.map(|residual| buffers.add_rows(residual));
        let low = Factors::new(&layout, inputs).map(|factors| {
            let down = empty(x, &[rows, layout.rank], dtype);
            let cast = empty(x, &[1, factors.len], dtype);
            let at = (buffers.add(&down), buffers.add(&cast));
            let casts = Cast::all(parts, &layout, &factors, inputs, &mut buffers);
            (LowRankState { down, factors: Some(cast) }, (factors, casts, at))
        });
        let (low, low_work) = low.unzip();
        let dropouts = dropouts(parts);
        let left = dropouts.iter().any(Option::is_some).then(|| empty(x, &[rows, inputs], dtype));
        let left_at = left.as_ref().map(|left| buffers.add(left));
        submit("linears", &y.client, &buffers.handles(), move |queue, buffers| {
            let (x, y) = (buffers[x_at], buffers[y_at]);
            let weights: Vec<u64> = weight_at.iter().map(|weight| buffers[*weight]).collect();
            // What the results start from: the residual, if there is one.
            let (mut beta, mut from) = residual_at.map_or((0.0, y), |residual| (1.0, buffers[residual]));
            // The thin products come first: the large ones, bound by arithmetic, read what these wrote in passing.
            if let Some((factors, casts, (down, cast))) = low_work {
                let (down, a, rank) = (buffers[down], buffers[cast], layout.rank);
                Cast::enqueue(&casts, queue, dtype, buffers, a)?;
                match left_at.map(|left| buffers[left]) {
                    None => {
                        let product = Product { b: (true, inputs), ..dense(rows, rank, inputs, dtype) };
                        queue.product(&product, 1.0, x, a, 0.0, down, down)?;
                    }
                    // Each term has an input of its own.
                    Some(left) => {
                        for (&(first, r), dropout) in
                            layout.ranks.iter().zip(&dropouts).filter(|((_, r), _)| *r > 0)
                        {
                            let input = left_of(queue, dtype, (rows, inputs), dropout, x, left)?;
                            let product =
                                Product { b: (true, inputs), c: rank, ..dense(rows, r, inputs, dtype) };
                            let (a, to) = (at(a, first * inputs, dtype), at(down, first, dtype));
                            queue.product(&product, 1.0, input, a, 0.0, to, to)?;
                        }
                    }
                }
                let product = Product { b: (true, rank), ..dense(rows, layout.out, rank, dtype) };
                queue.product(&product, 1.0, down, at(a, factors.b, dtype), beta, from, y)?;
                (beta, from) = (1.0, y);
            }
            for JoinedMaps { start, width, weight } in joined(&layout, &weights, inputs, dtype) {
                let product =
                    Product { b: (true, inputs), c: layout.out, ..dense(rows, width, inputs, dtype) };
                let (from, to) = (at(from, start, dtype), at(y, start, dtype));
                queue.product(&product, 1.0, x, weight, beta, from, to)?;
            }
            for ((start, width), bias) in layout.outs.iter().zip(bias_at) {
                if let Some(bias) = bias {
                    let arguments = Arguments::default().address(at(y, *start, dtype)).int(layout.out);
                    let arguments = arguments.address(buffers[bias]).int(rows).int(*width);
                    let launch = Launch::new((rows * width).div_ceil(256), 256);
                    queue.launch(elementwise(dtype), "add_bias", launch, arguments)?;
                }
            }
            Ok(())
        });
        (y, low)
    }

    fn linears_backward(
        dy: &CubeTensor,
        x: &CubeTensor,
        low: Option<&LowRankState<CubeTensor>>,
        parts: &[Part<CubeTensor>],
        wanted: &Wanted,
    ) -> LinearGradients<CubeTensor> {
        let ((rows, inputs), dtype) = (dims(x), x.dtype);
        let layout = Layout::new(parts);
        let dx = wanted.input.then(|| empty(x, &[rows, inputs], dtype));
        let mut buffers = Buffers::default();
        let low = low.and_then(|low| Some((&low.down, low.factors.as_ref()?)));
        let ddown = low.map(|_| empty(x, &[rows, layout.rank], dtype));
        // The gradients of all As lie under one another, so that one product makes them.
        let wants_a = wanted.parts.iter().any(|wanted| wanted.a);
        let da = low.filter(|_| wants_a).map(|_| empty(x, &[layout.rank, inputs], DType::F32));
        let of_b: Vec<Option<CubeTensor>> = parts
            .iter()
            .zip(&layout.ranks)
            .zip(&wanted.parts)
            .map(|((part, (_, rank)), wanted)| {
                (*rank > 0 && wanted.b).then(|| empty(x, &[dims(&part.weight).0, *rank], DType::F32))
            })
            .collect();
        let of_weight: Vec<Option<CubeTensor>> = parts
            .iter()
            .zip(&wanted.parts)
            .map(|(part, wanted)| wanted.weight.then(|| empty(x, &[dims(&part.weight).0, inputs], dtype)))
            .collect();
        let of_bias: Vec<Option<CubeTensor>> = parts
            .iter()
            .zip(&wanted.parts)
            .map(|(part, wanted)| wanted.bias.then(|| empty(x, &[1, dims(&part.weight).0], dtype)))
            .collect();
        let dropouts = dropouts(parts);
        let left = dropouts.iter().any(Option::is_some).then(|| empty(x, &[rows, inputs], dtype));

        let (dy_at, x_at) = (buffers.add_rows(dy), buffers.add_rows(x));
        let weight_at: Vec<usize> = parts.iter().map(|part| buffers.add_rows(&part.weight)).collect();
        let dx_at = dx.as_ref().map(|dx| buffers.add(dx));
        let low_rank_at = low.zip(ddown.as_ref()).map(|((down, factors), ddown)| {
            [buffers.add_rows(down), buffers.add(ddown), buffers.add(factors)]
        });
        let da_at = da.as_ref().map(|da| buffers.add(da));
        let left_at = left.as_ref().map(|left| buffers.add(left));
        let mut each = |tensors: &[Option<CubeTensor>]| -> Vec<Option<usize>> {
            tensors.iter().map(|tensor| tensor.as_ref().map(|tensor| buffers.add(tensor))).collect()
        };
        let (b_at, dw_at, bias_at) = (each(&of_b), each(&of_weight), each(&of_bias));
        let scales: Vec<f32> =
            parts.iter().map(|part| part.factors.as_ref().map_or(0.0, |factors| factors.scale)).collect();
        let ranks = layout.ranks.clone();
        submit("linears_backward", &x.client, &buffers.handles(), move |queue, buffers| {
            let Layout { outs, ranks, out, rank } = &layout;
            let (dy, x) = (buffers[dy_at], buffers[x_at]);
            let dx = dx_at.map(|dx| buffers[dx]);
            for (i, (start, width)) in outs.iter().enumerate() {
                let dy = at(dy, *start, dtype);
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
            // As forward, the thin product into dx comes before the large ones.
            let mut beta = 0.0;
            let low_rank = low_rank_at.map(|at| at.map(|at| buffers[at]));
            if let Some((factors, [down, ddown, a])) = Factors::new(&layout, inputs).zip(low_rank) {
                let da = da_at.map(|da| buffers[da]);
                let product = dense(rows, *rank, *out, dtype);
                queue.product(&product, 1.0, dy, at(a, factors.b, dtype), 0.0, ddown, ddown)?;
                for (i, ((start, width), (first, r))) in outs.iter().zip(ranks).enumerate() {
                    let Some(db) = b_at[i].map(|b| buffers[b]) else { continue };
                    let product = Product {
                        a: (true, *out),
                        b: (false, *rank),
                        output: Element::F32,
                        ..dense(*width, *r, rows, dtype)
                    };
                    let (dy, down) = (at(dy, *start, dtype), at(down, *first, dtype));
                    queue.product(&product, scales[i], dy, down, 0.0, db, db)?;
                }
                match left_at.map(|left| buffers[left]) {
                    None => {
                        if let Some(da) = da {
                            let product = Product { a: (true, *rank), ..dense(*rank, inputs, rows, dtype) };
                            let product = Product { output: Element::F32, ..product };
                            queue.product(&product, 1.0, ddown, x, 0.0, da, da)?;
                        }
                        if let Some(dx) = dx {
                            let product = dense(rows, inputs, *rank, dtype);
                            queue.product(&product, 1.0, ddown, a, 0.0, dx, dx)?;
                            beta = 1.0;
                        }
                    }
                    // Each term has an input of its own, and drops the same of its gradient.
                    Some(left) => {
                        for (i, (first, r)) in ranks.iter().enumerate().filter(|(_, (_, r))| *r > 0) {
                            let ddown = at(ddown, *first, dtype);
                            if let Some(da) = da.map(|da| at(da, first * inputs, DType::F32)) {
                                let input = left_of(queue, dtype, (rows, inputs), &dropouts[i], x, left)?;
                                let product = Product { a: (true, *rank), ..dense(*r, inputs, rows, dtype) };
                                let product = Product { output: Element::F32, ..product };
                                queue.product(&product, 1.0, ddown, input, 0.0, da, da)?;
                            }
                            let Some(dx) = dx else { continue };
                            let product = Product { a: (false, *rank), ..dense(rows, inputs, *r, dtype) };
                            let a = at(a, first * inputs, dtype);
                            match &dropouts[i] {
                                Some(dropout) => {
                                    queue.product(&product, 1.0, ddown, a, 0.0, left, left)?;
                                    let onto = beta != 0.0;
                                    drop_elements(queue, dtype, (rows, inputs), dropout, left, dx, onto)?;
                                }
                                None => queue.product(&product, 1.0, ddown, a, beta, dx, dx)?,
                            }
                            beta = 1.0;
                        }
                    }
                }
            }
            let Some(dx) = dx else { return Ok(()) };
            let weights: Vec<u64> = weight_at.iter().map(|weight| buffers[*weight]).collect();
            for JoinedMaps { start, width, weight } in joined(&layout, &weights, inputs, dtype) {
                let product = Product { a: (false, *out), ..dense(rows, inputs, width, dtype) };
                queue.product(&product, 1.0, at(dy, start, dtype), weight, beta, dx, dx)?;
                beta = 1.0;
            }
            Ok(())
        });

        let alignment = x.client.properties().memory.alignment as usize;
        if ranks.iter().any(|(first, rank)| [*first, *rank].iter().any(|r| 4 * r * inputs % alignment != 0)) {
            // Such rows are no view: cubecl copies them, which must come after what makes them.
            flush();
        }
        let of_a =
            |(first, rank): (usize, usize)| da.clone().map(|da| slice(da, &[first..first + rank, 0..inputs]));
        let gradients =
            of_weight.into_iter().zip(of_bias).zip(of_b).zip(ranks).map(|(((weight, bias), b), place)| {
                PartGradients { weight, bias, a: if place.1 > 0 { of_a(place) } else { None }, b }
            });
        LinearGradients { input: dx, parts: gradients.collect() }
    }

    fn add_sparse(y: CubeTensor, x: &CubeTensor, values: &CubeTensor, pattern: &SparsePattern) -> CubeTensor {
        sparse::add(y, x, values, pattern)
    }

    fn sparse_gradients(
        dy: &CubeTensor,
        x: &CubeTensor,
        values: Option<&CubeTensor>,
        pattern: &SparsePattern,
        wants_values: bool,
    ) -> SparseGradients<CubeTensor> {
        sparse::gradients(dy, x, values, pattern, wants_values)
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

    fn keep_keys(
        shape: &AttentionShape,
        inputs: &CachedInputs<Self>,
        cache: [CubeTensor; 2],
    ) -> [CubeTensor; 2] {
        attention::keep_keys(shape, inputs, cache)
    }

    fn attend_cached(
        shape: &AttentionShape,
        inputs: &CachedInputs<Self>,
        cache: [CubeTensor; 2],
    ) -> (CubeTensor, [CubeTensor; 2]) {
        attention::attend_cached(shape, inputs, cache)
    }

    fn largest(rows: &CubeTensor) -> CubeTensor {
        let rows = contiguous(rows);
        let ((count, columns), dtype) = (dims(&rows), rows.dtype);
        let places = empty(&rows, &[count], DType::I32);
        submit("largest", &rows.client, &[&rows.handle, &places.handle], move |queue, buffers| {
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]);
            let arguments = arguments.int(columns).int(vectors(dtype, columns));
            let launch = Launch::new(count, row_threads(dtype, columns, 1024));
            queue.launch(elementwise(dtype), "largest", launch, arguments)
        });
        places
    }

    fn read_later(numbers: CubeTensor) -> Box<dyn FnOnce() -> Vec<u32>> {
        let numbers = contiguous(&numbers);
        let count = numbers.meta.shape().num_elements();
        let asked = read_later(&numbers.client, &numbers.handle, count, numbers.dtype.size());
        Box::new(move || {
            let bytes = asked().expect(READ_BACK);
            bytes.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect()
        })
    }

    fn adamw(
        optimizer: &AdamW,
        updates: Vec<Update<CubeTensor>>,
        clip: Option<(CubeTensor, f64)>,
    ) -> Vec<[CubeTensor; 3]> {
        optimizer::adamw(optimizer, updates, clip)
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
        submit("cross_entropy", &logits.client, &handles, move |queue, buffers| {
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
        submit("head_loss", &rows.client, &buffers.handles(), move |queue, buffers| {
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

/// What the term of each map drops.
fn dropouts(parts: &[Part<CubeTensor>]) -> Vec<Option<Dropout>> {
    parts.iter().map(|part| part.factors.as_ref().and_then(|factors| factors.dropout)).collect()
}

/// `to = from ∘ mask`, or with `onto` added to what is there.
fn drop_elements(
    queue: &mut Queue,
    dtype: DType,
    (rows, columns): (usize, usize),
    dropout: &Dropout,
    from: u64,
    to: u64,
    onto: bool,
) -> Result<(), Fault> {
    let [low, high] = dropout.words().map(|word| word as usize);
    let arguments = Arguments::default().address(from).address(to).int(columns).int(vectors(dtype, columns));
    let arguments = arguments.int(low).int(high).int(dropout.threshold() as usize).float(dropout.kept());
    let arguments = arguments.int(usize::from(onto));
    queue.launch(elementwise(dtype), "dropout", gate_launch(dtype, rows, columns), arguments)
}

/// The input of a term: what its dropout leaves of `x`, written to `left`, or `x` itself.
fn left_of(
    queue: &mut Queue,
    dtype: DType,
    dims: (usize, usize),
    dropout: &Option<Dropout>,
    x: u64,
    left: u64,
) -> Result<u64, Fault> {
    let Some(dropout) = dropout else { return Ok(x) };
    drop_elements(queue, dtype, dims, dropout, x, left, false)?;
    Ok(left)
}

/// The launch of `column_sums`.
fn column_launch(columns: usize) -> Launch {
    Launch { grid: (columns.div_ceil(32), 1, 1), block: (32, 8), shared: 0 }
}
