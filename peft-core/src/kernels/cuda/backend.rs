//! The kernels over cubecl's tensors.

use super::commands::{Arguments, Launch, Source};
use super::cublaslt::{Element, Product};
use super::engine::{Buffers, flush, read_later, submit, together};
use super::error::Fault;
use super::pooled::{block, is_alone};
use super::queue::Queue;
use super::{attention, factors, linear, optimizer, sparse};
use crate::kernels::READ_BACK;
use crate::kernels::adamw::{AdamW, Update};
use crate::kernels::attention::{AttentionInputs, AttentionShape, CachedInputs};
use crate::kernels::backend::{Kernels, conversions};
use crate::kernels::cross_entropy::CrossEntropyParts;
use crate::kernels::dropout::Dropout;
use crate::kernels::linear::{FrontGradients, LowRankState, Part, PartGradients, Up, Wanted};
use crate::kernels::sparse::{SparseGradients, SparsePattern};
use burn::backend::Cube;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::{into_contiguous, slice};
use burn_cubecl::tensor::CubeTensor;
use std::ops::Range;

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
    let handle = block(&client, bytes);
    CubeTensor::new_contiguous(client, device, Shape::from(shape.to_vec()), handle, dtype)
}

/// A shape and a type of elements.
pub(super) type Form = (Vec<usize>, DType);

/// New tensors on the device of `like`, not filled, in one allocation: for what lives about as long.
pub(super) fn empties(like: &CubeTensor, wanted: Vec<Option<Form>>) -> Vec<Option<CubeTensor>> {
    let (client, device) = (&like.client, &like.device);
    let alignment = client.properties().memory.alignment;
    let bytes = |(shape, dtype): &Form| (shape.iter().product::<usize>() * dtype.size()) as u64;
    let total: u64 = wanted.iter().flatten().map(|wanted| bytes(wanted).next_multiple_of(alignment)).sum();
    if total == 0 {
        return wanted
            .into_iter()
            .map(|wanted| wanted.map(|(shape, dtype)| empty(like, &shape, dtype)))
            .collect();
    }
    let memory = block(client, total as usize);
    let mut start = 0;
    let mut tensor = |wanted: Form| {
        let bytes = bytes(&wanted);
        let handle = memory.clone().offset_start(start).offset_end(total - start - bytes);
        start += bytes.next_multiple_of(alignment);
        let (shape, dtype) = wanted;
        CubeTensor::new_contiguous(client.clone(), device.clone(), Shape::from(shape), handle, dtype)
    };
    wanted.into_iter().map(|wanted| wanted.map(&mut tensor)).collect()
}

/// Rows and columns.
pub(super) fn dims(tensor: &CubeTensor) -> (usize, usize) {
    (tensor.meta.shape()[0], tensor.meta.shape()[1])
}

/// Some rows of a contiguous matrix, which may be a copy.
pub(super) fn rows_of(matrix: &CubeTensor, rows: Range<usize>) -> CubeTensor {
    let (all, columns) = dims(matrix);
    let bytes = |rows: usize| (rows * columns * matrix.dtype.size()) as u64;
    if bytes(rows.start).is_multiple_of(matrix.client.properties().memory.alignment) {
        let handle = matrix.handle.clone().offset_start(bytes(rows.start)).offset_end(bytes(all - rows.end));
        let (client, device) = (matrix.client.clone(), matrix.device.clone());
        let shape = Shape::from(vec![rows.len(), columns]);
        return CubeTensor::new_contiguous(client, device, shape, handle, matrix.dtype);
    }
    // cubecl's copy must come after what makes the matrix.
    flush();
    slice(matrix.clone(), &[rows, 0..columns])
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

/// A product of matrices without gaps between their rows.
pub(super) fn dense(m: usize, n: usize, k: usize, dtype: DType) -> Product {
    let element = element(dtype);
    Product { m, n, k, a: (false, k), b: (false, n), c: n, input: element, output: element }
}

/// The bytes before an element.
pub(super) fn at(address: u64, elements: usize, dtype: DType) -> u64 {
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
        submit("rms_norm", &y.client, [&x, &weight, &y], move |queue, buffers| {
            rms_norm(queue, dtype, (rows, columns), [buffers[0], buffers[1], buffers[2]], epsilon)
        });
        y
    }

    fn rms_norm_backward(
        x: &CubeTensor,
        weight: &CubeTensor,
        epsilon: f32,
        dy: CubeTensor,
        added: Option<&CubeTensor>,
        wants_weight: bool,
        again: bool,
    ) -> FrontGradients<CubeTensor> {
        let ((rows, columns), dtype) = (dims(x), x.dtype);
        let dy = contiguous(&dy);
        let dx = empty(x, &[rows, columns], dtype);
        let dw = wants_weight.then(|| empty(x, &[1, columns], dtype));
        let mut buffers = Buffers::default();
        let [x_at, weight_at, dy_at] = [x, weight, &dy].map(|tensor| buffers.add_rows(tensor));
        let dx_at = buffers.add(&dx);
        let inverse_at = dw.as_ref().map(|_| buffers.add_scratch(&x.client, 4 * rows));
        let added_at = added.map(|added| buffers.add_rows(added));
        let dw_at = dw.as_ref().map(|dw| buffers.add(dw));
        submit("rms_norm_backward", &x.client, buffers, move |queue, buffers| {
            let source = elementwise(dtype);
            let [x, weight, dy, dx] = [x_at, weight_at, dy_at, dx_at].map(|at| buffers[at]);
            let inverse = inverse_at.map_or(0, |at| buffers[at]);
            let arguments = Arguments::default().address(x).address(weight).address(dy);
            let arguments = arguments.address(added_at.map_or(0, |added| buffers[added]));
            // The weight's gradient still reads dy.
            let y = if again && dw_at.is_none() { dy } else { 0 };
            let arguments = arguments.address(dx).address(y).address(inverse);
            let arguments = arguments.int(columns).int(vectors(dtype, columns)).float(epsilon);
            let launch = Launch::new(rows, row_threads(dtype, columns, 256));
            queue.launch(source, "rms_norm_backward", launch, arguments)?;
            let Some(dw) = dw_at.map(|dw| buffers[dw]) else { return Ok(()) };
            let arguments = Arguments::default().address(dy).int(columns).address(x);
            let arguments = arguments.address(inverse).address(dw).int(rows).int(columns);
            queue.launch(source, "column_sums", column_launch(columns), arguments)?;
            if !again {
                return Ok(());
            }
            rms_norm(queue, dtype, (rows, columns), [x, weight, dy], epsilon)
        });
        FrontGradients { x: dx, weight: dw, y: again.then_some(dy) }
    }

    fn dropout(x: &CubeTensor, dropout: &Dropout) -> CubeTensor {
        let x = contiguous(x);
        let ((rows, columns), dtype, dropout) = (dims(&x), x.dtype, *dropout);
        let y = empty(&x, &[rows, columns], dtype);
        submit("dropout", &y.client, [&x, &y], move |queue, buffers| {
            drop_elements(queue, dtype, (rows, columns), &dropout, buffers[0], buffers[1], false)
        });
        y
    }

    fn silu_gate(gate_up: &CubeTensor) -> CubeTensor {
        let gate_up = contiguous(gate_up);
        let ((rows, both), dtype) = (dims(&gate_up), gate_up.dtype);
        let columns = both / 2;
        let y = empty(&gate_up, &[rows, columns], dtype);
        submit("silu_gate", &y.client, [&gate_up, &y], move |queue, buffers| {
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]);
            let arguments = arguments.int(columns).int(vectors(dtype, columns));
            queue.launch(elementwise(dtype), "silu_gate", gate_launch(dtype, rows, columns), arguments)
        });
        y
    }

    fn silu_gate_backward(gate_up: &CubeTensor, dy: CubeTensor, again: bool) -> FrontGradients<CubeTensor> {
        let (gate_up, dy) = (contiguous(gate_up), contiguous(&dy));
        let ((rows, columns), dtype) = (dims(&dy), dy.dtype);
        let d = empty(&gate_up, &[rows, 2 * columns], dtype);
        submit("silu_gate_backward", &d.client, [&gate_up, &dy, &d], move |queue, buffers| {
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]).address(buffers[2]);
            let arguments = arguments.int(columns).int(vectors(dtype, columns)).int(usize::from(again));
            let launch = gate_launch(dtype, rows, columns);
            queue.launch(elementwise(dtype), "silu_gate_backward", launch, arguments)
        });
        FrontGradients { x: d, weight: None, y: again.then_some(dy) }
    }

    fn up_factor(up: &Up<CubeTensor>) -> CubeTensor {
        factors::up_factor(up)
    }

    fn linears(
        x: &CubeTensor,
        parts: &[Part<CubeTensor>],
        residual: Option<&CubeTensor>,
    ) -> (CubeTensor, Option<LowRankState<CubeTensor>>) {
        linear::forward(x, parts, residual)
    }

    fn linears_backward(
        dy: &CubeTensor,
        low: Option<&LowRankState<CubeTensor>>,
        parts: &[Part<CubeTensor>],
        wanted: &Wanted,
        front: impl FnOnce(Option<CubeTensor>) -> Option<CubeTensor>,
    ) -> Vec<PartGradients<CubeTensor>> {
        linear::backward(dy, low, parts, wanted, front)
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
        submit("largest", &rows.client, [&rows, &places], move |queue, buffers| {
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
            Some(_) if !is_alone(&logits) => logits.copy(),
            _ => contiguous(&logits),
        };
        let targets = contiguous(targets);
        let (rows, columns) = dims(&logits);
        let (loss_sum, correct) = (empty(&logits, &[1], DType::F32), empty(&logits, &[1], DType::I32));
        let wide = targets.dtype == DType::I64;
        let mut buffers = Buffers::from([&logits, &targets, &loss_sum, &correct]);
        let of_rows = [(); 2].map(|()| buffers.add_scratch(&logits.client, 4 * rows));
        submit("cross_entropy", &logits.client, buffers, move |queue, buffers| {
            let source = elementwise(dtype);
            let [losses, hits] = of_rows.map(|at| buffers[at]);
            let arguments = Arguments::default().address(buffers[0]).address(buffers[1]);
            let arguments = arguments.int(usize::from(wide)).address(losses).address(hits);
            let arguments = arguments.int(columns).int(vectors(dtype, columns));
            let arguments = arguments.int(usize::from(gradient_scale.is_some()));
            let arguments = arguments.float(gradient_scale.unwrap_or_default());
            let launch = Launch::new(rows, row_threads(dtype, columns, 1024));
            queue.launch(source, "cross_entropy", launch, arguments)?;
            let arguments = Arguments::default().address(losses).address(hits).int(rows);
            let arguments = arguments.address(buffers[2]).address(buffers[3]);
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
        let (loss_sum, correct) = (empty(&rows, &[1], DType::F32), empty(&rows, &[1], DType::I32));
        let wide = targets.dtype == DType::I64;
        let mut buffers = Buffers::from([&rows, &weight, &targets, &logits, &loss_sum, &correct]);
        let of_rows = [(); 2].map(|()| buffers.add_scratch(&rows.client, 4 * count));
        let dx_at = dx.as_ref().map(|dx| buffers.add(dx));
        submit("head_loss", &rows.client, buffers, move |queue, buffers| {
            let source = elementwise(dtype);
            let [x, w, targets, logits, loss_sum, correct] = std::array::from_fn(|i| buffers[i]);
            let [losses, hits] = of_rows.map(|at| buffers[at]);
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

/// The norm of `x` with a weight, to `y`.
fn rms_norm(
    queue: &mut Queue,
    dtype: DType,
    (rows, columns): (usize, usize),
    [x, weight, y]: [u64; 3],
    epsilon: f32,
) -> Result<(), Fault> {
    let arguments = Arguments::default().address(x).address(weight).address(y);
    let arguments = arguments.int(columns).int(vectors(dtype, columns)).float(epsilon);
    let launch = Launch::new(rows, row_threads(dtype, columns, 256));
    queue.launch(elementwise(dtype), "rms_norm", launch, arguments)
}

/// `to = from ∘ mask`, or with `onto` added to what is there.
pub(super) fn drop_elements(
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

/// The launch of `column_sums`.
pub(super) fn column_launch(columns: usize) -> Launch {
    Launch { grid: (columns.div_ceil(32), 1, 1), block: (32, 8), shared: 0 }
}
