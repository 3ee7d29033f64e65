//! The toolkit's own kernels as a backend offers them: operations on its tensors without a graph, each with its backward.
//! The differentiable operations of this module's neighbours are made of them, and fall back to plain compositions where
//! no backend offers them.

use super::adamw::{AdamW, Update};
use super::attention::{AttentionInputs, AttentionShape, CachedInputs};
use super::cross_entropy::CrossEntropyParts;
use super::dropout::Dropout;
use super::linear::{FrontGradients, LowRankState, Part, PartGradients, Up, Wanted};
use super::sparse::{SparseGradients, SparsePattern};
use burn::backend::autodiff::ops::NodeGuard;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend};
use burn::tensor::{DType, Device, Int, Tensor};

/// A float tensor of the autodiff decorator over `B`.
pub(super) type Tracked<B> = FloatTensor<Autodiff<B>>;

/// Operations on tensors of one backend. Matrices are `[rows, columns]`; results are new tensors.
pub(super) trait Kernels: Backend {
    /// A tensor without a graph as the backend has it.
    fn primitive<const D: usize>(tensor: Tensor<D>) -> FloatTensor<Self>;

    /// Whole numbers as the backend has them.
    fn integers(tensor: Tensor<1, Int>) -> burn::backend::tensor::IntTensor<Self>;

    /// The other way.
    fn tensor<const D: usize>(primitive: FloatTensor<Self>) -> Tensor<D>;

    /// Whole numbers, the other way.
    fn integer_tensor(primitive: burn::backend::tensor::IntTensor<Self>) -> Tensor<1, Int>;

    /// A tensor of an autodiff device as the decorator has it.
    fn tracked<const D: usize>(tensor: Tensor<D>) -> Tracked<Self>;

    /// The other way.
    fn tracked_tensor<const D: usize>(primitive: Tracked<Self>) -> Tensor<D>;

    /// Runs `work`, which calls these kernels and no operation of burn's on what they make: what it enqueues may be
    /// handed to the device at once.
    fn together<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    /// `w ∘ x/√(mean(x²) + ε)` by rows; `w` has one row.
    fn rms_norm(x: &FloatTensor<Self>, weight: &FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self>;

    /// Gradients of [`rms_norm`](Self::rms_norm) for `x`, with `added` added to it, and, if wanted, for `w`. With `again`,
    /// `y` takes the place of `dy`, which nobody else may have then.
    fn rms_norm_backward(
        x: &FloatTensor<Self>,
        weight: &FloatTensor<Self>,
        epsilon: f32,
        dy: FloatTensor<Self>,
        added: Option<&FloatTensor<Self>>,
        wants_weight: bool,
        again: bool,
    ) -> FrontGradients<FloatTensor<Self>>;

    /// `x` with some elements dropped, the others made larger.
    fn dropout(x: &FloatTensor<Self>, dropout: &Dropout) -> FloatTensor<Self>;

    /// `silu(g) ∘ u` of `[g u]`.
    fn silu_gate(gate_up: &FloatTensor<Self>) -> FloatTensor<Self>;

    /// Gradient of [`silu_gate`](Self::silu_gate) for `[g u]`. With `again`, what it is the gradient of takes the place of
    /// `dy`, which nobody else may have then.
    fn silu_gate_backward(
        gate_up: &FloatTensor<Self>,
        dy: FloatTensor<Self>,
        again: bool,
    ) -> FrontGradients<FloatTensor<Self>>;

    /// The factor that `up` stands for, in f32, as [`linears`](Self::linears) has it.
    fn up_factor(up: &Up<FloatTensor<Self>>) -> FloatTensor<Self>;

    /// `[x·W₁ᵀ + b₁ + s₁·(x₁·A₁ᵀ)·B₁ᵀ, …] + residual`, where `xᵢ` is `x` with what the term drops dropped, and what the
    /// backward reads of the low-rank terms if there are any.
    fn linears(
        x: &FloatTensor<Self>,
        parts: &[Part<FloatTensor<Self>>],
        residual: Option<&FloatTensor<Self>>,
    ) -> (FloatTensor<Self>, Option<LowRankState<FloatTensor<Self>>>);

    /// Gradients of [`linears`](Self::linears) for each map. `front` is given the gradient of the input, where it is wanted,
    /// and returns the input just where [`Wanted::reads_input`] says so: thus it can be computed again beside its own gradient.
    fn linears_backward(
        dy: &FloatTensor<Self>,
        low: Option<&LowRankState<FloatTensor<Self>>>,
        parts: &[Part<FloatTensor<Self>>],
        wanted: &Wanted,
        front: impl FnOnce(Option<FloatTensor<Self>>) -> Option<FloatTensor<Self>>,
    ) -> Vec<PartGradients<FloatTensor<Self>>>;

    /// `y + x·Δᵀ` with the values `[1, entries]` of `Δ` at the pattern's positions; `y` is used up.
    fn add_sparse(
        y: FloatTensor<Self>,
        x: &FloatTensor<Self>,
        values: &FloatTensor<Self>,
        pattern: &SparsePattern,
    ) -> FloatTensor<Self>;

    /// Gradients of [`add_sparse`](Self::add_sparse): of the input where `values` are given, of the values where wanted.
    fn sparse_gradients(
        dy: &FloatTensor<Self>,
        x: &FloatTensor<Self>,
        values: Option<&FloatTensor<Self>>,
        pattern: &SparsePattern,
        wants_values: bool,
    ) -> SparseGradients<FloatTensor<Self>>;

    /// Whether [`attend`](Self::attend) takes these heads.
    fn attends(shape: &AttentionShape, dtype: DType) -> bool;

    /// Attention and the logarithms of its denominators `[heads, tokens]`.
    fn attend(
        shape: &AttentionShape,
        inputs: &AttentionInputs<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradient of [`attend`](Self::attend) for the joint queries, keys and values.
    fn attend_backward(
        shape: &AttentionShape,
        inputs: &AttentionInputs<Self>,
        output: &FloatTensor<Self>,
        log_denominators: &FloatTensor<Self>,
        dy: &FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// Writes the keys and values of new tokens into those of a cache, `[rows, kv_heads, slots, head_dim]`.
    fn keep_keys(
        shape: &AttentionShape,
        inputs: &CachedInputs<Self>,
        cache: [FloatTensor<Self>; 2],
    ) -> [FloatTensor<Self>; 2];

    /// [`keep_keys`](Self::keep_keys), and attention from the new tokens to all that is then in the cache.
    fn attend_cached(
        shape: &AttentionShape,
        inputs: &CachedInputs<Self>,
        cache: [FloatTensor<Self>; 2],
    ) -> (FloatTensor<Self>, [FloatTensor<Self>; 2]);

    /// The first place of the largest value of each row, `[rows]`, 32 bits.
    fn largest(rows: &FloatTensor<Self>) -> burn::backend::tensor::IntTensor<Self>;

    /// Asks for whole numbers of 32 bits and returns what waits for them.
    fn read_later(numbers: burn::backend::tensor::IntTensor<Self>) -> Box<dyn FnOnce() -> Vec<u32>>;

    /// AdamW's update of f32 tensors: parameter, first and second moment of each. `clip` is the sum of the gradients'
    /// squares and the largest norm, as in [`Clip`](super::norm::Clip).
    fn adamw(
        optimizer: &AdamW,
        updates: Vec<Update<FloatTensor<Self>>>,
        clip: Option<(FloatTensor<Self>, f64)>,
    ) -> Vec<[FloatTensor<Self>; 3]>;

    /// Σ x² of f32 tensors, one at least.
    fn sum_of_squares(tensors: Vec<FloatTensor<Self>>) -> FloatTensor<Self>;

    /// Cross-entropy of the logits `rows·Wᵀ`, at most `chunk` rows of which are held at a time; the gradient is that of
    /// the rows.
    fn head_loss(
        rows: &FloatTensor<Self>,
        weight: &FloatTensor<Self>,
        targets: &burn::backend::tensor::IntTensor<Self>,
        chunk: usize,
        gradient_scale: Option<f32>,
    ) -> CrossEntropyParts<Self>;

    /// Cross-entropy of logits, which are used up: with a scale, the gradient takes their place.
    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: &burn::backend::tensor::IntTensor<Self>,
        gradient_scale: Option<f32>,
    ) -> CrossEntropyParts<Self>;
}

/// Which backend's kernels serve a computation in `dtype` on `device`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Served {
    /// burn's flex, in f32.
    Cpu,
    /// burn's cubecl on CUDA.
    #[cfg(feature = "cuda")]
    Cuda,
}

/// The kernels that serve a computation in `dtype` on `device`, if any do.
///
/// `PEFT_KERNELS=plain` in the environment turns them off, to tell a fault of theirs from one elsewhere.
pub(super) fn served(device: &Device, dtype: DType) -> Option<Served> {
    static PLAIN: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    if *PLAIN.get_or_init(|| std::env::var_os("PEFT_KERNELS").is_some_and(|value| value == "plain")) {
        return None;
    }
    if *device == Device::flex() {
        return (dtype == DType::F32).then_some(Served::Cpu);
    }
    #[cfg(feature = "cuda")]
    if matches!(dtype, DType::F32 | DType::BF16) && super::cuda::is_available() {
        return Some(Served::Cuda);
    }
    None
}

/// Calls a function that is generic over [`Kernels`] with the backend that [`served`] named.
macro_rules! with_backend {
    ($served:expr, $function:ident($($argument:expr),*)) => {
        match $served {
            crate::kernels::backend::Served::Cpu => $function::<burn::backend::Flex>($($argument),*),
            #[cfg(feature = "cuda")]
            crate::kernels::backend::Served::Cuda => $function::<burn::backend::Cube>($($argument),*),
        }
    };
}
pub(super) use with_backend;

/// The conversions of [`Kernels`], the same for every backend.
macro_rules! conversions {
    ($backend:ty) => {
        fn primitive<const D: usize>(tensor: burn::tensor::Tensor<D>) -> FloatTensor<Self> {
            tensor.try_into_primitive::<$backend>().expect("a tensor of this backend without a graph")
        }

        fn integers(tensor: burn::tensor::Tensor<1, burn::tensor::Int>) -> IntTensor<Self> {
            tensor.try_into_primitive::<$backend>().expect("a tensor of this backend without a graph")
        }

        fn tensor<const D: usize>(primitive: FloatTensor<Self>) -> burn::tensor::Tensor<D> {
            burn::tensor::Tensor::from_primitive::<$backend>(primitive)
        }

        fn integer_tensor(primitive: IntTensor<Self>) -> burn::tensor::Tensor<1, burn::tensor::Int> {
            burn::tensor::Tensor::from_primitive::<$backend>(primitive)
        }

        fn tracked<const D: usize>(
            tensor: burn::tensor::Tensor<D>,
        ) -> crate::kernels::backend::Tracked<Self> {
            let tensor = tensor.try_into_primitive::<burn::backend::Autodiff<$backend>>();
            tensor.expect("a tensor of this backend with a graph")
        }

        fn tracked_tensor<const D: usize>(
            primitive: crate::kernels::backend::Tracked<Self>,
        ) -> burn::tensor::Tensor<D> {
            burn::tensor::Tensor::from_primitive::<burn::backend::Autodiff<$backend>>(primitive)
        }
    };
}
pub(super) use conversions;

/// Whether a tensor may have a graph.
pub(super) fn has_graph<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.device().is_autodiff()
}

/// A tensor as the autodiff decorator has it; one without a graph becomes a constant.
pub(super) fn lift<B: Kernels, const D: usize>(tensor: Tensor<D>) -> Tracked<B> {
    B::tracked(if has_graph(&tensor) { tensor } else { tensor.autodiff() })
}

/// Stands where an operation has no input: its graph needs a fixed number of them.
pub(super) fn constant<B: Kernels>(like: &FloatTensor<B>) -> NodeGuard {
    <Autodiff<B> as AutodiffBackend>::from_inner(like.clone()).node()
}
