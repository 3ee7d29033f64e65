//! Products with sparse matrices; `sparse.cu` says how.

use super::backend::{contiguous, dims, elementwise, empty};
use super::engine::{Arguments, Buffers, Launch, Queue, Source, submit};
use super::error::Fault;
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

/// Activations `[tokens, features]` that are to be turned.
struct Turned {
    /// Where they stand among the buffers, and what they become.
    from: usize,
    to: usize,
    tokens: usize,
    features: usize,
    dtype: DType,
}

impl Turned {
    fn new(tensor: &CubeTensor, buffers: &mut Buffers) -> Self {
        let ((tokens, features), dtype) = (dims(tensor), tensor.dtype);
        let from = buffers.add_rows(tensor);
        let to = buffers.add_scratch(&tensor.client, features * stride(tokens, dtype) * dtype.size());
        Self { from, to, tokens, features, dtype }
    }

    /// Turns them; returns their address.
    fn turn(&self, queue: &mut Queue, buffers: &[u64]) -> Result<u64, Fault> {
        let stride = stride(self.tokens, self.dtype);
        let arguments = Arguments::default().address(buffers[self.from]).address(buffers[self.to]);
        let arguments = arguments.int(self.tokens).int(self.features).int(stride);
        let grid = (stride.div_ceil(32), self.features.div_ceil(32), 1);
        queue.launch(source(self.dtype), "turn", Launch { grid, block: (32, 8), shared: 0 }, arguments)?;
        Ok(buffers[self.to])
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

/// A sparse matrix in compressed rows: addresses of its parts, as `multiply` in the kernels takes them.
struct Matrix {
    rows: usize,
    values: u64,
    starts: u64,
    at: u64,
    width: usize,
    places: u64,
}

impl Matrix {
    /// `to ← y + x·Mᵀ` of `x` turned, without `y` where its address is 0.
    fn multiply(&self, queue: &mut Queue, turned: &Turned, x: u64, y: u64, to: u64) -> Result<(), Fault> {
        let Turned { tokens, dtype, .. } = *turned;
        let arguments = Arguments::default().address(y).address(x).address(self.values);
        let arguments = arguments.address(self.starts).address(self.at).int(self.width);
        let arguments = arguments.address(self.places).address(to);
        let arguments = arguments.int(self.rows).int(tokens).int(stride(tokens, dtype));
        let grid = (self.rows.div_ceil(32), tokens.div_ceil(32 * vector(dtype)), 1);
        queue.launch(source(dtype), "multiply", Launch { grid, block: (256, 1), shared: 0 }, arguments)
    }
}

/// Where what [`SparsePattern::order`] puts one after another stands among the buffers.
struct Order {
    at: usize,
    dims: [usize; 2],
    count: usize,
}

impl Order {
    fn new(pattern: &SparsePattern, like: &CubeTensor, buffers: &mut Buffers) -> Self {
        let order = Cube::integers(pattern.order(&device(like)));
        Self { at: buffers.add(&order), dims: pattern.dims(), count: pattern.len() }
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
        let ([rows, width], [starts, ..]) = (self.dims, self.parts(buffers));
        Matrix { rows, values, starts, at: positions, width, places: 0 }
    }

    /// The transposed matrix.
    fn by_column(&self, values: u64, buffers: &[u64]) -> Matrix {
        let ([_, rows], [_, starts, at, places]) = (self.dims, self.parts(buffers));
        Matrix { rows, values, starts, at, width: 0, places }
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
    let in_place = y.can_mut();
    let y = contiguous(&y);
    let (tokens, rows) = dims(&y);
    let sum = if in_place { y.clone() } else { empty(&y, &[tokens, rows], y.dtype) };
    let mut buffers = Buffers::default();
    let order = Order::new(pattern, x, &mut buffers);
    let turned = Turned::new(x, &mut buffers);
    let [y_at, sum_at, positions_at] = [&y, &sum, &positions(pattern, x)].map(|tensor| buffers.add(tensor));
    let values_at = buffers.add_rows(values);
    submit("add_sparse", &sum.client, buffers, move |queue, buffers| {
        let x = turned.turn(queue, buffers)?;
        let matrix = order.by_row(buffers[values_at], buffers[positions_at], buffers);
        matrix.multiply(queue, &turned, x, buffers[y_at], buffers[sum_at])
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
    let dy = Turned::new(dy, &mut buffers);
    let input = values.map(|_| empty(x, &[tokens, columns], x.dtype));
    let input_at = input.as_ref().zip(values).map(|(dx, values)| {
        let order = Order::new(pattern, x, &mut buffers);
        (order, buffers.add(dx), buffers.add_rows(values))
    });
    let products = wants_values.then(|| empty(x, &[1, count], DType::F32));
    let products_at = products.as_ref().map(|products| {
        let turned = Turned::new(x, &mut buffers);
        (turned, buffers.add(products), buffers.add(&positions(pattern, x)))
    });
    submit("sparse_gradients", &x.client, buffers, move |queue, buffers| {
        let turned = dy.turn(queue, buffers)?;
        if let Some((order, dx, values)) = input_at {
            order.by_column(buffers[values], buffers).multiply(queue, &dy, turned, 0, buffers[dx])?;
        }
        let Some((x, products, positions)) = products_at else { return Ok(()) };
        let arguments = Arguments::default().address(turned).address(x.turn(queue, buffers)?);
        let arguments = arguments.address(buffers[positions]).int(columns).address(buffers[products]);
        let arguments = arguments.int(count).int(stride(dy.tokens, dy.dtype));
        queue.launch(source(dy.dtype), "sampled_products", Launch::new(count.div_ceil(8), 256), arguments)
    });
    SparseGradients { input, values: products }
}
