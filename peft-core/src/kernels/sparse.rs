//! A sparse change of a linear map: `y ← y + x·Δᵀ`, where `Δ` has trained values at fixed positions.
//!
//! The sum is taken in f32, so that a small change is not lost beside a large weight, as it would be in `W + Δ` rounded
//! to bf16. The backward is `dx = dy·Δ` and `dvalues[j] = Σ_tokens dy[·, row_j]·x[·, column_j]`. The kernels run over the
//! entries alone, on a GPU up to half a percent of the places and beyond that over strips of `Δ` and of its gradient that
//! are dense for as long as a product takes; the composition makes `Δ` dense whole.

use super::as_dtype;
use super::backend::{Kernels, has_graph, lift, served, with_backend};
use crate::linalg::{NotFinite, top_k};
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use std::fmt::Debug;
use std::sync::{Arc, OnceLock};

/// Positions of a sparse matrix `[rows, columns]`, ascending by row and then by column.
#[derive(Debug)]
pub struct SparsePattern {
    dims: [usize; 2],
    positions: Vec<u32>,
    row_starts: Vec<u32>,
    rows: Vec<u32>,
    columns: Vec<u32>,
    by_column: OnceLock<ByColumn>,
    on_device: OnceLock<Tensor<1, Int>>,
    #[cfg(feature = "cuda")]
    order_on_device: OnceLock<Tensor<1, Int>>,
}

/// The entries in the order of their columns, for products with the transposed matrix.
#[derive(Debug)]
pub(super) struct ByColumn {
    /// Where each column starts, one more than there are columns.
    pub starts: Vec<u32>,
    /// Row of each entry.
    pub rows: Vec<u32>,
    /// Place of each entry in the order of the rows.
    pub entries: Vec<u32>,
}

/// Why positions are no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// The matrix has more places than positions can count.
    #[error("a matrix of {0}×{1} has more than 2³¹ places")]
    TooLarge(usize, usize),
    /// A position outside.
    #[error("position {position} lies outside a matrix of {places} places")]
    Outside {
        /// The position.
        position: u32,
        /// Places of the matrix.
        places: usize,
    },
    /// A position that is not above the one before it.
    #[error("position {position} follows {before}: positions must ascend, each once")]
    Order {
        /// The position.
        position: u32,
        /// The one before it.
        before: u32,
    },
}

impl SparsePattern {
    /// The entries `row·columns + column` of a matrix `[rows, columns]`.
    ///
    /// # Errors
    /// Positions that do not ascend or lie outside; a matrix of 2³¹ places or more.
    pub fn new(dims: [usize; 2], positions: Vec<u32>) -> Result<Self, PatternError> {
        let [rows, columns] = dims;
        let places = rows.checked_mul(columns).filter(|places| *places <= i32::MAX as usize);
        let Some(places) = places else { return Err(PatternError::TooLarge(rows, columns)) };
        if let Some(pair) = positions.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(PatternError::Order { position: pair[1], before: pair[0] });
        }
        if let Some(position) = positions.last().copied().filter(|last| *last as usize >= places) {
            return Err(PatternError::Outside { position, places });
        }
        let width = columns as u32;
        let (of_row, of_column): (Vec<u32>, Vec<u32>) =
            positions.iter().map(|position| (position / width, position % width)).unzip();
        let row_starts = starts(&of_row, rows);
        Ok(Self {
            dims,
            positions,
            row_starts,
            rows: of_row,
            columns: of_column,
            by_column: OnceLock::new(),
            on_device: OnceLock::new(),
            #[cfg(feature = "cuda")]
            order_on_device: OnceLock::new(),
        })
    }

    /// `[rows, columns]`.
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether it has no entry.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// `row·columns + column` of each entry, ascending.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Row of each entry.
    pub fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// Column of each entry.
    pub fn columns(&self) -> &[u32] {
        &self.columns
    }

    /// Where each row starts among the entries; one more than there are rows.
    pub(super) fn row_starts(&self) -> &[u32] {
        &self.row_starts
    }

    /// The entries in the order of their columns.
    pub(super) fn by_column(&self) -> &ByColumn {
        self.by_column.get_or_init(|| {
            let starts = starts(&self.columns, self.dims[1]);
            let mut next = starts.clone();
            let (mut rows, mut entries) = (vec![0; self.len()], vec![0; self.len()]);
            for (entry, (row, column)) in self.rows.iter().zip(&self.columns).enumerate() {
                let place = next[*column as usize] as usize;
                next[*column as usize] += 1;
                (rows[place], entries[place]) = (*row, entry as u32);
            }
            ByColumn { starts, rows, entries }
        })
    }

    /// The positions as a tensor, in 32 bits.
    pub(super) fn tensor(&self, device: &Device) -> Tensor<1, Int> {
        kept(&self.on_device, device, || vec![&self.positions])
    }

    /// What kernels of a GPU read beside the positions, one after another: where each row starts among the entries, where
    /// each column does, and the rows and the places of the entries in the order of the columns.
    #[cfg(feature = "cuda")]
    pub(super) fn order(&self, device: &Device) -> Tensor<1, Int> {
        let by_column = self.by_column();
        kept(&self.order_on_device, device, || {
            vec![&self.row_starts, &by_column.starts, &by_column.rows, &by_column.entries]
        })
    }

    /// The whole matrix with `values` `[1, entries]`, `[rows, columns]`.
    pub fn dense(&self, values: &Tensor<2>) -> Tensor<2> {
        let ([rows, columns], count, device) = (self.dims, self.len(), values.device());
        let zeros = Tensor::<1>::zeros([rows * columns], (&device, values.dtype()));
        if self.is_empty() {
            return zeros.reshape([rows, columns]);
        }
        let (places, values) = (self.tensor(&device).reshape([count, 1]), values.clone().reshape([count]));
        zeros.scatter_nd(places, values, IndexingUpdateOp::Add).reshape([rows, columns])
    }

    /// The values of a matrix `[rows, columns]` at the positions, `[1, entries]`.
    pub fn gather(&self, dense: Tensor<2>) -> Tensor<2> {
        let places = self.tensor(&dense.device());
        let [rows, columns] = self.dims;
        dense.reshape([rows * columns]).select(0, places).reshape([1, self.len()])
    }
}

/// Numbers below 2³¹ on a device, one part after another; kept in `place`, where that is for the same device.
fn kept<'a>(
    place: &OnceLock<Tensor<1, Int>>,
    device: &Device,
    parts: impl Fn() -> Vec<&'a Vec<u32>>,
) -> Tensor<1, Int> {
    let make = || {
        let numbers: Vec<i32> = parts().into_iter().flatten().map(|number| *number as i32).collect();
        let count = numbers.len();
        Tensor::from_data(TensorData::new(numbers, [count]), (device, DType::I32))
    };
    let tensor = place.get_or_init(make);
    if tensor.device() == *device { tensor.clone() } else { make() }
}

/// Where each of `count` ascending keys starts among `keys`, and their number.
fn starts(keys: &[u32], count: usize) -> Vec<u32> {
    let mut starts = vec![0u32; count + 1];
    keys.iter().for_each(|key| starts[*key as usize + 1] += 1);
    for i in 0..count {
        starts[i + 1] += starts[i];
    }
    starts
}

/// Is shown what the backward of a changed map has at hand, once a micro-batch: its input `[tokens, in]` and the gradient
/// of its result `[tokens, out]`. The weight's own gradient is their product `dyᵀ·x`.
pub trait BackwardObserver: Debug + Send + Sync {
    /// Looks.
    fn observe(&self, x: &Tensor<2>, dy: &Tensor<2>);
}

/// The sparse change of an adapted linear map.
pub struct SparseTerm {
    /// Values at the positions, `[1, entries]`, f32.
    pub values: Tensor<2>,
    /// The positions.
    pub pattern: Arc<SparsePattern>,
    /// Sees each backward.
    pub observer: Option<Arc<dyn BackwardObserver>>,
}

/// `y + x·Δᵀ`.
///
/// # Shapes
/// `x` `[tokens, in]`; `y` and the result `[tokens, out]`, in the type of `y`.
pub fn add_sparse(y: Tensor<2>, x: Tensor<2>, term: SparseTerm) -> Tensor<2> {
    match served(&x.device(), x.dtype()) {
        Some(served) => with_backend!(served, fused(y, x, term)),
        None => plain(y, x, term),
    }
}

/// The composition of burn's operations, in f32 where the kernels have that type.
pub(super) fn plain(y: Tensor<2>, x: Tensor<2>, term: SparseTerm) -> Tensor<2> {
    let dtype = y.dtype();
    let (y, x) = (as_dtype(y, DType::F32), as_dtype(x, DType::F32));
    let sum = match served(&x.device(), DType::F32).filter(|_| dtype != DType::F32) {
        Some(served) => with_backend!(served, fused(y, x, term)),
        None => y + x.matmul(term.pattern.dense(&term.values).transpose()),
    };
    as_dtype(sum, dtype)
}

/// The products `Σ_tokens dy[·, row]·x[·, column]` at the pattern's positions, `[1, entries]`, in f32: entries of the
/// gradient of a weight, without the others. `x` `[tokens, in]` and `dy` `[tokens, out]` have no graph.
pub fn sampled_products(x: Tensor<2>, dy: Tensor<2>, pattern: &SparsePattern) -> Tensor<2> {
    match served(&x.device(), x.dtype()) {
        Some(served) => with_backend!(served, sampled(x, dy, pattern)),
        None => {
            let dense = as_dtype(dy, DType::F32).transpose().matmul(as_dtype(x, DType::F32));
            pattern.gather(dense)
        }
    }
}

fn sampled<B: Kernels>(x: Tensor<2>, dy: Tensor<2>, pattern: &SparsePattern) -> Tensor<2> {
    let gradients = B::sparse_gradients(&B::primitive(dy), &B::primitive(x), None, pattern, true);
    B::tensor(gradients.values.expect("asked for"))
}

/// The `count` entries of largest magnitude of the gradient `dyᵀ·x` of a weight, of equal ones those at the lower positions,
/// and the entries there, `[1, count]`, in f32. `x` `[tokens, in]` and `dy` `[tokens, out]` have no graph. The gradient is
/// dense for as long as this takes.
///
/// # Errors
/// An entry that is not finite, and so has no place in the order.
///
/// # Panics
/// Where the weight has fewer entries, or 2³¹ of them.
pub fn largest_products(
    x: Tensor<2>,
    dy: Tensor<2>,
    count: usize,
) -> Result<(SparsePattern, Tensor<2>), NotFinite> {
    let dims = [dy.dims()[1], x.dims()[1]];
    assert!(count <= dims[0] * dims[1], "{count} entries of a weight {dims:?}");
    let (positions, values) = match served(&x.device(), x.dtype()) {
        #[cfg(feature = "cuda")]
        Some(super::backend::Served::Cuda) if count > 0 => super::cuda::largest_products(x, dy, count)?,
        _ => largest_of_all(x, dy, count)?,
    };
    Ok((SparsePattern::new(dims, positions).expect("places of the matrix, ascending"), values))
}

/// The same on the host.
pub(super) fn largest_of_all(
    x: Tensor<2>,
    dy: Tensor<2>,
    count: usize,
) -> Result<(Vec<u32>, Tensor<2>), NotFinite> {
    let dense = as_dtype(dy, DType::F32).transpose().matmul(as_dtype(x, DType::F32));
    let device = dense.device();
    let dense: Vec<f32> = dense.into_data().iter::<f32>().collect();
    let places = top_k(&dense, count)?;
    let values: Vec<f32> = places.iter().map(|place| dense[*place]).collect();
    let data = TensorData::new(values, [1, count]);
    Ok((
        places.into_iter().map(|place| place as u32).collect(),
        Tensor::from_data(data, (&device, DType::F32)),
    ))
}

fn fused<B: Kernels>(y: Tensor<2>, x: Tensor<2>, term: SparseTerm) -> Tensor<2> {
    let SparseTerm { values, pattern, observer } = term;
    if ![&y, &x, &values].into_iter().any(has_graph) {
        return B::tensor(B::add_sparse(B::primitive(y), &B::primitive(x), &B::primitive(values), &pattern));
    }
    let (y, x, values) = (lift::<B, 2>(y), lift::<B, 2>(x), lift::<B, 2>(values));
    let nodes = [y.node(), x.node(), values.node()];
    let prepared = SparseBackward.prepare::<NoCheckpointing>(nodes).compute_bound().stateful();
    let (y, x, values) = (y.into_primitive(), x.into_primitive(), values.into_primitive());
    let sum = B::add_sparse(y, &x, &values, &pattern);
    B::tracked_tensor(match prepared {
        OpsKind::Tracked(prepared) => prepared.finish(State { x, values, pattern, observer }, sum),
        OpsKind::UnTracked(prepared) => prepared.finish(sum),
    })
}

/// Gradients of [`Kernels::add_sparse`].
pub(super) struct SparseGradients<T> {
    /// Of the input, in its type.
    pub input: Option<T>,
    /// Of the values, `[1, entries]`, in f32.
    pub values: Option<T>,
}

/// What the backward reads.
#[derive(Clone, Debug)]
struct State<T> {
    x: T,
    values: T,
    pattern: Arc<SparsePattern>,
    observer: Option<Arc<dyn BackwardObserver>>,
}

#[derive(Debug)]
struct SparseBackward;

impl<B: Kernels> Backward<B, 3> for SparseBackward {
    type State = State<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [of_y, of_x, of_values] = ops.parents;
        let State { x, values, pattern, observer } = ops.state;
        if let Some(observer) = observer {
            observer.observe(&B::tensor(x.clone()), &B::tensor(dy.clone()));
        }
        let factor = of_x.is_some().then_some(&values);
        let SparseGradients { input, values } =
            B::sparse_gradients(&dy, &x, factor, &pattern, of_values.is_some());
        for (node, gradient) in [(of_x, input), (of_values, values)] {
            if let Some((node, gradient)) = node.zip(gradient) {
                grads.register::<B>(node.id, gradient);
            }
        }
        if let Some(node) = of_y {
            grads.register::<B>(node.id, dy);
        }
    }
}
