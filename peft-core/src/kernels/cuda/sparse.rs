//! Products with sparse matrices, entry by entry as `sparse.cu` says, or in dense strips by cuBLASLt; and the largest
//! entries of a weight's gradient.

use super::backend::{at, contiguous, dense, dims, elementwise, empty};
use super::commands::{Arguments, Launch, Source};
use super::cublaslt::{Element, Product};
use super::engine::{Buffers, submit};
use super::error::Fault;
use super::pooled::is_alone;
use super::queue::Queue;
use crate::kernels::backend::Kernels;
use crate::kernels::sparse::{SparseGradients, SparsePattern};
use burn::backend::Cube;
use burn::tensor::{DType, Device};
use burn_cubecl::tensor::CubeTensor;

const CODE: &str = concat!(include_str!("scalar.cu"), include_str!("sparse.cu"));

/// The kernels for activations of a type.
fn source(dtype: DType) -> Source {
    Source { name: "sparse", code: CODE, ..elementwise(dtype) }
}

/// From this share of places on a change is multiplied in strips of it that are made dense, for a place that costs a
/// product of matrices is cheaper than an entry that costs its reads.
const DENSE_FROM: f64 = 0.005;

/// Whether products with a matrix of this pattern go in dense strips.
fn in_strips(pattern: &SparsePattern) -> bool {
    let [rows, columns] = pattern.dims();
    pattern.len() as f64 >= DENSE_FROM * (rows * columns) as f64
}

/// Bytes of a dense strip: a large weight is never dense whole.
const STRIP: usize = 16 << 20;

/// The strips of a dense matrix of `rows` rows of `width` elements: the first row of each and how many there are.
fn strips(rows: usize, width: usize, dtype: DType) -> impl Iterator<Item = (usize, usize)> {
    // Whole tiles of a product, where there is more than one strip.
    let most = (STRIP / (width * dtype.size()).max(1) / 128 * 128).max(128);
    (0..rows).step_by(most).map(move |first| (first, most.min(rows - first)))
}

/// The elements of the longest strip.
fn strip_elements(rows: usize, width: usize, dtype: DType) -> usize {
    strips(rows, width, dtype).map(|(_, count)| count * width).max().unwrap_or(0)
}

/// Activations `[tokens, features]` as the products read them: as they are for dense strips, else turned.
struct Activations {
    /// Where they stand among the buffers, and what they become.
    from: usize,
    turned: Option<usize>,
    tokens: usize,
    features: usize,
    dtype: DType,
}

impl Activations {
    fn new(tensor: &CubeTensor, turned: bool, buffers: &mut Buffers) -> Self {
        let ((tokens, features), dtype) = (dims(tensor), tensor.dtype);
        let from = buffers.add_rows(tensor);
        let bytes = features * stride(tokens, dtype) * dtype.size();
        let turned = turned.then(|| buffers.add_scratch(&tensor.client, bytes));
        Self { from, turned, tokens, features, dtype }
    }

    /// Turns them, where they are to be; returns their address.
    fn ready(&self, queue: &mut Queue, buffers: &[u64]) -> Result<u64, Fault> {
        let Some(turned) = self.turned.map(|turned| buffers[turned]) else { return Ok(buffers[self.from]) };
        let stride = stride(self.tokens, self.dtype);
        let arguments = Arguments::default().address(buffers[self.from]).address(turned);
        let arguments = arguments.int(self.tokens).int(self.features).int(stride);
        let grid = (stride.div_ceil(32), self.features.div_ceil(32), 1);
        queue.launch(source(self.dtype), "turn", Launch { grid, block: (32, 8), shared: 0 }, arguments)?;
        Ok(turned)
    }
}

/// Elements that the kernels read at a time.
fn vector(dtype: DType) -> usize {
    16 / dtype.size()
}

/// From the tokens of one feature to those of the next.
fn stride(tokens: usize, dtype: DType) -> usize {
    tokens.next_multiple_of(vector(dtype))
}

/// A sparse matrix in compressed rows: addresses of its parts, as the kernels take them.
struct Matrix {
    rows: usize,
    columns: usize,
    values: u64,
    starts: u64,
    at: u64,
    width: usize,
    places: u64,
    /// Where a dense strip of it has room, if it goes in those.
    strip: Option<u64>,
}

impl Matrix {
    /// `to ← y + x·Mᵀ` of the activations `x`, without `y` where its address is 0.
    fn multiply(&self, queue: &mut Queue, x: (&Activations, u64), y: u64, to: u64) -> Result<(), Fault> {
        let (&Activations { tokens, dtype, .. }, x) = x;
        let entries = |arguments: Arguments| {
            let arguments = arguments.address(self.values).address(self.starts).address(self.at);
            arguments.int(self.width).address(self.places)
        };
        let Some(strip) = self.strip else {
            let arguments = entries(Arguments::default().address(y).address(x)).address(to);
            let arguments = arguments.int(self.rows).int(tokens).int(stride(tokens, dtype));
            let grid = (self.rows.div_ceil(32), tokens.div_ceil(32 * vector(dtype)), 1);
            return queue.launch(
                source(dtype),
                "multiply",
                Launch { grid, block: (256, 1), shared: 0 },
                arguments,
            );
        };
        let columns = self.columns;
        for (first, count) in strips(self.rows, columns, dtype) {
            let arguments = entries(Arguments::default()).address(strip).int(first).int(columns);
            queue.launch(source(dtype), "dense_rows", Launch::new(count, 256), arguments)?;
            let product = dense(tokens, count, columns, dtype);
            let product = Product { b: (true, columns), c: self.rows, ..product };
            let to = at(to, first, dtype);
            let (beta, from) = if y == 0 { (0.0, to) } else { (1.0, at(y, first, dtype)) };
            queue.product(&product, 1.0, x, strip, beta, from, to)?;
        }
        Ok(())
    }
}

/// Where what [`SparsePattern::order`] puts one after another stands among the buffers.
struct Order {
    at: usize,
    dims: [usize; 2],
    count: usize,
    strip: Option<usize>,
}

impl Order {
    fn new(pattern: &SparsePattern, like: &CubeTensor, buffers: &mut Buffers) -> Self {
        let order = Cube::integers(pattern.order(&device(like)));
        let [rows, columns] = pattern.dims();
        let elements =
            strip_elements(rows, columns, like.dtype).max(strip_elements(columns, rows, like.dtype));
        let strip =
            in_strips(pattern).then(|| buffers.add_scratch(&like.client, elements * like.dtype.size()));
        Self { at: buffers.add(&order), dims: pattern.dims(), count: pattern.len(), strip }
    }

    /// The address of each part.
    fn parts(&self, buffers: &[u64]) -> [u64; 4] {
        let [rows, columns] = self.dims;
        let mut next = buffers[self.at];
        [rows + 1, columns + 1, self.count, self.count].map(|length| {
            let part = next;
            next += 4 * length as u64;
            part
        })
    }

    /// The matrix.
    fn by_row(&self, values: u64, positions: u64, buffers: &[u64]) -> Matrix {
        let ([rows, columns], [starts, ..]) = (self.dims, self.parts(buffers));
        let strip = self.strip.map(|strip| buffers[strip]);
        Matrix { rows, columns, values, starts, at: positions, width: columns, places: 0, strip }
    }

    /// The transposed matrix.
    fn by_column(&self, values: u64, buffers: &[u64]) -> Matrix {
        let ([columns, rows], [_, starts, at, places]) = (self.dims, self.parts(buffers));
        let strip = self.strip.map(|strip| buffers[strip]);
        Matrix { rows, columns, values, starts, at, width: 0, places, strip }
    }
}

fn device(of: &CubeTensor) -> Device {
    Cube::tensor::<2>(of.clone()).device()
}

/// The positions of a pattern, on the device of `like`.
fn positions(pattern: &SparsePattern, like: &CubeTensor) -> CubeTensor {
    Cube::integers(pattern.tensor(&device(like)))
}

/// `y + x·Δᵀ`, in place of `y` where nobody else has it.
pub fn add(y: CubeTensor, x: &CubeTensor, values: &CubeTensor, pattern: &SparsePattern) -> CubeTensor {
    let in_place = is_alone(&y);
    let y = contiguous(&y);
    let (tokens, rows) = dims(&y);
    let sum = if in_place { y.clone() } else { empty(&y, &[tokens, rows], y.dtype) };
    let mut buffers = Buffers::default();
    let order = Order::new(pattern, x, &mut buffers);
    let activations = Activations::new(x, !in_strips(pattern), &mut buffers);
    let [y_at, sum_at, positions_at] = [&y, &sum, &positions(pattern, x)].map(|tensor| buffers.add(tensor));
    let values_at = buffers.add_rows(values);
    submit("add_sparse", &sum.client, buffers, move |queue, buffers| {
        let x = activations.ready(queue, buffers)?;
        let matrix = order.by_row(buffers[values_at], buffers[positions_at], buffers);
        matrix.multiply(queue, (&activations, x), buffers[y_at], buffers[sum_at])
    });
    sum
}

/// Gradients of [`add`]: of the input where `values` are given, of the values where wanted.
pub fn gradients(
    dy: &CubeTensor,
    x: &CubeTensor,
    values: Option<&CubeTensor>,
    pattern: &SparsePattern,
    wants_values: bool,
) -> SparseGradients<CubeTensor> {
    let ((tokens, columns), count) = (dims(x), pattern.len());
    let mut buffers = Buffers::default();
    let in_strips = in_strips(pattern);
    let dy = Activations::new(dy, !in_strips, &mut buffers);
    // Products entry by entry need no order.
    let order = (values.is_some() || in_strips).then(|| Order::new(pattern, x, &mut buffers));
    let input = values.map(|_| empty(x, &[tokens, columns], x.dtype));
    let input_at = input.as_ref().zip(values).map(|(dx, values)| (buffers.add(dx), buffers.add_rows(values)));
    let products = wants_values.then(|| empty(x, &[1, count], DType::F32));
    let products_at = products.as_ref().map(|products| {
        let x = Activations::new(x, !in_strips, &mut buffers);
        let elements = strip_elements(dy.features, columns, DType::F32);
        let strip = in_strips.then(|| buffers.add_scratch(&products.client, elements * DType::F32.size()));
        (x, buffers.add(products), buffers.add(&positions(pattern, products)), strip)
    });
    submit("sparse_gradients", &x.client, buffers, move |queue, buffers| {
        let dy_ready = dy.ready(queue, buffers)?;
        if let Some((order, (dx, values))) = order.as_ref().zip(input_at) {
            let transposed = order.by_column(buffers[values], buffers);
            transposed.multiply(queue, (&dy, dy_ready), 0, buffers[dx])?;
        }
        let Some((x, products, positions, strip)) = products_at else { return Ok(()) };
        let x_ready = x.ready(queue, buffers)?;
        let (products, positions) = (buffers[products], buffers[positions]);
        let Some((order, strip)) = order.zip(strip.map(|strip| buffers[strip])) else {
            let arguments = Arguments::default().address(dy_ready).address(x_ready);
            let arguments = arguments.address(positions).int(columns).address(products);
            let arguments = arguments.int(count).int(stride(dy.tokens, dy.dtype));
            let launch = Launch::new(count.div_ceil(8), 256);
            return queue.launch(source(dy.dtype), "sampled_products", launch, arguments);
        };
        let [starts, ..] = order.parts(buffers);
        for (first, rows) in strips(dy.features, columns, DType::F32) {
            let dy_strip = at(dy_ready, first, dy.dtype);
            weight_gradient(queue, (&dy, dy_strip), (&x, x_ready), rows, strip)?;
            let arguments = Arguments::default().address(strip).address(starts).address(positions);
            let arguments = arguments.address(products).int(first).int(columns);
            queue.launch(source(dy.dtype), "gather_rows", Launch::new(rows, 128), arguments)?;
        }
        Ok(())
    });
    SparseGradients { input, values: products }
}

/// `to ← dyᵀ·x` in f32 of activations as they are, for `rows` of the features of `dy`.
fn weight_gradient(
    queue: &mut Queue,
    (dy, dy_at): (&Activations, u64),
    (x, x_at): (&Activations, u64),
    rows: usize,
    to: u64,
) -> Result<(), Fault> {
    let product = dense(rows, x.features, dy.tokens, dy.dtype);
    let product = Product { a: (true, dy.features), output: Element::F32, ..product };
    queue.product(&product, 1.0, dy_at, x_at, 0.0, to, to)
}

/// Bits of a magnitude that a pass of the selection looks at, from the highest on: 31 in all.
const DIGITS: [usize; 3] = [11, 11, 9];

/// Elements that a block of the selection takes, as in the kernels.
const SELECTION: usize = 4096;

/// The `count` entries of largest magnitude of `dyᵀ·x`, in f32: `[1 + count]` whole numbers, the first place that is not
/// finite or −1 and then the places in order, and the entries there, `[1, count]`. Where one is not finite, only that is
/// said.
pub fn largest_products(dy: &CubeTensor, x: &CubeTensor, count: usize) -> (CubeTensor, CubeTensor) {
    let (dtype, rows, client) = (x.dtype, dims(dy).1, &x.client);
    let places = rows * dims(x).1;
    let found = empty(x, &[1 + count], DType::I32);
    let values = empty(x, &[1, count], DType::F32);
    let blocks = places.div_ceil(SELECTION);
    let mut buffers = Buffers::default();
    let [dy, x] = [dy, x].map(|tensor| Activations::new(tensor, false, &mut buffers));
    let bins = 1 << DIGITS[0];
    let [gradient_at, state_at, bins_at, counts_at] =
        [places, 4, bins, 2 * blocks].map(|words| buffers.add_scratch(client, 4 * words));
    let (found_at, values_at) = (buffers.add(&found), buffers.add(&values));
    submit("largest_products", client, buffers, move |queue, buffers| {
        let [gradient, state, histogram, counts] =
            [gradient_at, state_at, bins_at, counts_at].map(|at| buffers[at]);
        weight_gradient(queue, (&dy, buffers[dy.from]), (&x, buffers[x.from]), rows, gradient)?;
        let source = source(dtype);
        let begin = Arguments::default().address(state).address(histogram).int(count);
        queue.launch(source, "select_begin", Launch::new(1, 1024), begin)?;
        let mut shift = DIGITS.iter().sum::<usize>();
        for bits in DIGITS {
            shift -= bits;
            let all = || Arguments::default().address(gradient).int(places).address(state);
            let digits = all().address(histogram).int(shift).int(bits);
            queue.launch(source, "select_count", Launch::new(blocks.min(1024), 256), digits)?;
            let pick = Arguments::default().address(state).address(histogram).int(bits);
            queue.launch(source, "select_digit", Launch::new(1, 1024), pick)?;
        }
        let all = || Arguments::default().address(gradient).int(places).address(state).address(counts);
        queue.launch(source, "select_in_blocks", Launch::new(blocks, 256), all())?;
        let starts = Arguments::default().address(counts).int(blocks);
        queue.launch(source, "select_starts", Launch::new(1, 1024), starts)?;
        let write = all().address(buffers[found_at]).address(buffers[values_at]);
        queue.launch(source, "select_write", Launch::new(blocks, 256), write)
    });
    (found, values)
}
