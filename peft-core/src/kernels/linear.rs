//! Adapted linear maps of one input, side by side:
//!
//! ```text
//! h = input, √-normed or gated
//! y = [h·W₁ᵀ + b₁ + s₁·(h·A₁ᵀ)·B₁ᵀ, …] + residual
//! ```
//!
//! One operation holds the projections that share an input (q, k and v; gate and up) and the cheap function in front of
//! them (the norm, the gate), so that the input is read once and one gradient comes back. The low-rank path never builds
//! a weight-shaped temporary, and a frozen `W` gets no gradient. The backward needs the raw input, the `h·Aᵀ` and the
//! weights; `h` is kept or computed again, as asked.

use super::as_dtype;
use super::backend::{Kernels, Tracked, constant, has_graph, lift, served, with_backend};
use super::dropout::{self, Dropout};
use super::gated::{silu_gate, split_gate};
use super::rms_norm::rms_norm;
use super::skip::{Residual, Skip};
use super::sparse::{SparseTerm, add_sparse};
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Tensor};

/// What stands for the `B` of a low-rank term, `[out, rank]`.
#[derive(Clone, Debug)]
pub enum Up<T> {
    /// `B` itself.
    Matrix(T),
    /// `[F B]·R − O`, of which `F` and `O` have no gradients.
    Core {
        /// `B`, `[out, rank − f]`.
        b: T,
        /// `R`, `[rank, rank]`.
        core: T,
        /// `F`, `[out, f]`.
        frozen: Option<T>,
        /// `O`, `[out, rank]`.
        offset: Option<T>,
    },
    /// `diag(outer)·B·diag(inner)`, of which the vectors alone have gradients.
    Scaled {
        /// `B`, `[out, rank]`.
        b: T,
        /// `[1, out]`.
        outer: T,
        /// `[1, rank]`.
        inner: T,
    },
}

impl<T> Up<T> {
    /// `B`, whose rows are those of the factor.
    pub(super) fn b(&self) -> &T {
        match self {
            Up::Matrix(b) | Up::Core { b, .. } | Up::Scaled { b, .. } => b,
        }
    }

    /// What its columns are those of.
    pub(super) fn columns_like(&self) -> &T {
        match self {
            Up::Matrix(b) => b,
            Up::Core { core, .. } => core,
            Up::Scaled { inner, .. } => inner,
        }
    }

    /// What has gradients.
    pub(super) fn trained(&self) -> [Option<&T>; 2] {
        match self {
            Up::Matrix(b) => [Some(b), None],
            Up::Core { b, core, .. } => [Some(b), Some(core)],
            Up::Scaled { outer, inner, .. } => [Some(outer), Some(inner)],
        }
    }

    /// The same of what `f` makes of each tensor.
    pub(super) fn each<'a, U>(&'a self, f: impl Fn(&'a T) -> U) -> Up<U> {
        match self {
            Up::Matrix(b) => Up::Matrix(f(b)),
            Up::Core { b, core, frozen, offset } => {
                let (frozen, offset) = (frozen.as_ref().map(&f), offset.as_ref().map(&f));
                Up::Core { b: f(b), core: f(core), frozen, offset }
            }
            Up::Scaled { b, outer, inner } => Up::Scaled { b: f(b), outer: f(outer), inner: f(inner) },
        }
    }

    /// The same of other tensors: `trained` takes the place of what has gradients, `constant` makes that of the rest.
    fn rebuilt<U>(self, trained: [Option<U>; 2], constant: impl Fn(T) -> U) -> Option<Up<U>> {
        let [first, second] = trained;
        Some(match self {
            Up::Matrix(_) => Up::Matrix(first?),
            Up::Core { frozen, offset, .. } => {
                let (frozen, offset) = (frozen.map(&constant), offset.map(&constant));
                Up::Core { b: first?, core: second?, frozen, offset }
            }
            Up::Scaled { b, .. } => Up::Scaled { b: constant(b), outer: first?, inner: second? },
        })
    }
}

impl Up<Tensor<2>> {
    /// The factor of tensors in f32 without a graph, to the last bit as it enters [`adapted_linears`].
    pub fn factor(self) -> Tensor<2> {
        match served(&self.b().device(), DType::F32) {
            Some(served) => with_backend!(served, factor(self)),
            None => self.value(),
        }
    }

    /// Its composition.
    fn value(self) -> Tensor<2> {
        match self {
            Up::Matrix(b) => b,
            Up::Core { b, core, frozen, offset } => {
                let product = match frozen {
                    Some(frozen) => {
                        let ([_, columns], rank) = (frozen.dims(), core.dims()[0]);
                        let rows = |range| core.clone().slice([range, 0..rank]);
                        b.matmul(rows(columns..rank)) + frozen.matmul(rows(0..columns))
                    }
                    None => b.matmul(core),
                };
                match offset {
                    Some(offset) => product - offset,
                    None => product,
                }
            }
            Up::Scaled { b, outer, inner } => b * inner * outer.transpose(),
        }
    }
}

fn factor<B: Kernels>(up: Up<Tensor<2>>) -> Tensor<2> {
    B::tensor(B::up_factor(&up.each(|tensor| B::primitive(tensor.clone()))))
}

/// The low-rank term `s·((x ∘ mask)·Aᵀ)·Bᵀ` of an adapted linear map.
pub struct LowRankTerm {
    /// `A`, `[rank, in]`.
    pub a: Tensor<2>,
    /// `B`, `[out, rank]`, or what stands for it.
    pub b: Up<Tensor<2>>,
    /// A bias `[1, out]` beside `B`, scaled like the product.
    pub bias: Option<Tensor<2>>,
    /// A factor `[1, out]` on base and term together, the base's bias left out (DoRA's m/n).
    pub gain: Option<Tensor<2>>,
    /// `s`.
    pub scale: f64,
    /// What is dropped of the term's input.
    pub dropout: Option<Dropout>,
}

impl LowRankTerm {
    /// Whether it is `s·B·A` and nothing more.
    fn is_plain(&self) -> bool {
        self.bias.is_none() && self.gain.is_none()
    }
}

/// What a change makes of a linear map `y = h·Wᵀ + b`.
#[allow(clippy::large_enum_variant)] // It lives for one call.
pub enum Term {
    /// A low-rank product on top.
    LowRank(LowRankTerm),
    /// Several of them, without gains.
    Sum(Vec<LowRankTerm>),
    /// Factors: `y = ((h ∘ l_in)·Wᵀ + b) ∘ l_out`.
    Gains {
        /// `l_in`, `[1, in]`.
        input: Option<Tensor<2>>,
        /// `l_out`, `[1, out]`.
        output: Option<Tensor<2>>,
    },
    /// A sparse product on top.
    Sparse(SparseTerm),
}

impl Term {
    /// Whether the kernels have it.
    fn is_plain(&self) -> bool {
        match self {
            Term::LowRank(term) => term.is_plain(),
            Term::Sum(_) | Term::Gains { .. } | Term::Sparse(_) => false,
        }
    }

    fn into_low_rank(self) -> Option<LowRankTerm> {
        match self {
            Term::LowRank(term) => Some(term),
            Term::Sum(_) | Term::Gains { .. } | Term::Sparse(_) => None,
        }
    }

    /// The map with the change. `product` is `h·Wᵀ` of an `h`.
    fn composed(
        self,
        h: Tensor<2>,
        bias: Option<Tensor<2>>,
        product: impl Fn(Tensor<2>) -> Tensor<2>,
        drop: fn(Tensor<2>, Dropout) -> Tensor<2>,
    ) -> Tensor<2> {
        let bias = bias.map(|bias| as_dtype(bias, h.dtype()));
        match self {
            Term::LowRank(term) => {
                let y = product(h.clone());
                add(with_term(h, y, term, product, drop), bias)
            }
            Term::Sum(terms) => {
                let y = product(h.clone());
                let sum = |y, term| with_term(h.clone(), y, term, &product, drop);
                add(terms.into_iter().fold(y, sum), bias)
            }
            Term::Gains { input, output } => {
                let dtype = h.dtype();
                let scaled = |x: Tensor<2>, gain: Option<Tensor<2>>| match gain {
                    Some(gain) => x * as_dtype(gain, dtype),
                    None => x,
                };
                scaled(add(product(scaled(h, input)), bias), output)
            }
            Term::Sparse(term) => add_sparse(add(product(h.clone()), bias), h, term),
        }
    }
}

/// A linear map `[out, in]` with an optional bias `[1, out]` and an optional change.
pub struct AdaptedLinear {
    /// `W`.
    pub weight: Tensor<2>,
    /// `b`.
    pub bias: Option<Tensor<2>>,
    /// The change.
    pub term: Option<Term>,
}

/// What the maps are applied to.
#[allow(clippy::large_enum_variant)] // It lives for one call.
pub enum LinearInput {
    /// `x`, `[tokens, in]`.
    Plain(Tensor<2>),
    /// The norm of `x` `[tokens, in]` with the weight `[1, in]`.
    Normed {
        /// `x`.
        x: Tensor<2>,
        /// The norm's weight.
        weight: Tensor<2>,
        /// The norm's ε.
        epsilon: f64,
        /// Where a gradient of `x` may be left that passes by the maps.
        skip: Option<Skip>,
    },
    /// `silu(g) ∘ u` of `[g u]`, `[tokens, 2·in]`.
    Gated(Tensor<2>),
}

impl LinearInput {
    /// What stands in front of everything: `x`, or `[g u]`.
    pub fn tensor(&self) -> &Tensor<2> {
        match self {
            LinearInput::Plain(x) | LinearInput::Normed { x, .. } | LinearInput::Gated(x) => x,
        }
    }

    /// `h`, `[tokens, in]`.
    pub fn value(self) -> Tensor<2> {
        match self {
            LinearInput::Plain(x) => x,
            LinearInput::Normed { x, weight, epsilon, .. } => rms_norm(x, weight, epsilon),
            LinearInput::Gated(gate_up) => silu_gate(gate_up),
        }
    }
}

/// At most so many maps share an input.
const MOST: usize = 3;

/// Applies up to three maps to one input.
///
/// # Shapes
/// The result is `[tokens, out₁ + out₂ + …]`, as is `residual`. Factors and weights are cast to the type of the input.
/// With `recompute`, `h` is computed again in the backward instead of being kept.
pub fn adapted_linears(
    input: LinearInput,
    maps: Vec<AdaptedLinear>,
    residual: Option<Residual>,
    recompute: bool,
) -> Tensor<2> {
    let dtype = input.tensor().dtype();
    let Some(served) = served(&input.tensor().device(), dtype).filter(|_| maps.len() <= MOST) else {
        return plain(input, maps, residual);
    };
    if maps.iter().all(|map| map.term.as_ref().is_none_or(Term::is_plain)) {
        return with_backend!(served, fused(input, maps, residual, recompute));
    }
    // What such a term adds is composed on top of the bare maps, whose products cost the most.
    let h = input.value();
    let mut outputs = Vec::with_capacity(maps.len());
    for AdaptedLinear { weight, bias, term } in maps {
        let bare = |h: Tensor<2>, term, bias| {
            let map = AdaptedLinear { weight: weight.clone(), bias, term };
            let (input, maps) = (LinearInput::Plain(h), vec![map]);
            with_backend!(served, fused(input, maps, None, recompute))
        };
        outputs.push(match term {
            Some(term) if !term.is_plain() => {
                term.composed(h.clone(), bias, |h| bare(h, None, None), dropout::dropout)
            }
            term => bare(h.clone(), term, bias),
        });
    }
    add(joined(outputs), residual.map(|residual| residual.value))
}

fn joined(mut outputs: Vec<Tensor<2>>) -> Tensor<2> {
    if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(outputs, 1) }
}

fn add(y: Tensor<2>, other: Option<Tensor<2>>) -> Tensor<2> {
    match other {
        Some(other) => y + other,
        None => y,
    }
}

/// `y = h·Wᵀ` with the term added: `y + low`, with a gain `g` `y + (g − 1) ∘ x'·Wᵀ + g ∘ low` where `x'` is the input
/// after dropout.
fn with_term(
    h: Tensor<2>,
    y: Tensor<2>,
    term: LowRankTerm,
    product: impl Fn(Tensor<2>) -> Tensor<2>,
    drop: fn(Tensor<2>, Dropout) -> Tensor<2>,
) -> Tensor<2> {
    let dtype = h.dtype();
    let LowRankTerm { a, b, bias, gain, scale, dropout } = term;
    let dropped = dropout.is_some();
    let input = match dropout {
        Some(dropout) => drop(h, dropout),
        None => h,
    };
    // The scale goes onto the [tokens, rank] product, the smallest tensor on the way.
    let down = input.clone().matmul(as_dtype(a, dtype).transpose()).mul_scalar(scale);
    let low = down.matmul(as_dtype(b.value(), dtype).transpose());
    let low = match bias {
        Some(bias) => low + as_dtype(bias, dtype).mul_scalar(scale),
        None => low,
    };
    match gain {
        None => y + low,
        Some(gain) => {
            let gain = as_dtype(gain, dtype);
            // What the gain adds to the base comes from the dropped input too, as in PEFT.
            let base = if dropped { product(input) } else { y.clone() };
            y + base * gain.clone().sub_scalar(1.0) + low * gain
        }
    }
}

/// The composition of burn's operations.
pub(super) fn plain(input: LinearInput, maps: Vec<AdaptedLinear>, residual: Option<Residual>) -> Tensor<2> {
    let h = match input {
        LinearInput::Plain(x) => x,
        LinearInput::Normed { x, weight, epsilon, .. } => super::rms_norm::plain(x, weight, epsilon),
        LinearInput::Gated(gate_up) => {
            let (gate, up) = split_gate(gate_up);
            super::gated::plain(gate, up)
        }
    };
    let dtype = h.dtype();
    let outputs = maps.into_iter().map(|AdaptedLinear { weight, bias, term }| {
        let transposed = as_dtype(weight, dtype).transpose();
        let product = |h: Tensor<2>| h.matmul(transposed.clone());
        match term {
            Some(term) => term.composed(h.clone(), bias, product, dropout::plain),
            None => add(product(h.clone()), bias.map(|bias| as_dtype(bias, dtype))),
        }
    });
    add(joined(outputs.collect()), residual.map(|residual| residual.value))
}

/// A map as a backend has it.
#[derive(Clone, Debug)]
pub(super) struct Part<T> {
    /// `W`, `[out, in]`, in the type of the input.
    pub weight: T,
    /// `b`, `[1, out]`, likewise.
    pub bias: Option<T>,
    /// The low-rank term.
    pub factors: Option<Factors<T>>,
}

/// A low-rank term as a backend has it.
#[derive(Clone, Debug)]
pub(super) struct Factors<T> {
    /// `A`, `[rank, in]`, in a type of its own.
    pub a: T,
    /// `B`, `[out, rank]`, or what stands for it, likewise.
    pub b: Up<T>,
    /// `s`.
    pub scale: f32,
    /// What is dropped of its input.
    pub dropout: Option<Dropout>,
}

/// What [`Kernels::linears`] leaves of the low-rank terms for its backward.
#[derive(Clone, Debug)]
pub(super) struct LowRankState<T> {
    /// All `xᵢ·Aᵢᵀ` side by side, `[rows, Σr]`.
    pub down: T,
    /// The factors as the backend multiplies by them, where that is not as they are.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub factors: Option<T>,
}

/// Which gradients [`Kernels::linears_backward`] is to compute.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// That of the input.
    pub input: bool,
    /// Of each map.
    pub parts: Vec<WantedPart>,
}

impl Wanted {
    /// Whether one of them is made of the input.
    pub fn reads_input(&self) -> bool {
        self.parts.iter().any(|part| part.weight || part.a)
    }
}

/// Which gradients of one map are wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct WantedPart {
    /// That of `W`.
    pub weight: bool,
    /// That of `b`.
    pub bias: bool,
    /// That of `A`.
    pub a: bool,
    /// Those of what [`Up::trained`] names.
    pub up: [bool; 2],
}

/// Gradients of one map.
pub(super) struct PartGradients<T> {
    /// Of `W`, in its type.
    pub weight: Option<T>,
    /// Of `b`, in its type.
    pub bias: Option<T>,
    /// Of `A`, in its type.
    pub a: Option<T>,
    /// Of what [`Up::trained`] names, in its type.
    pub up: [Option<T>; 2],
}

/// The function in front of the maps, with what its backward needs.
#[derive(Clone, Debug)]
enum Saved<T> {
    Plain(T),
    Normed { x: T, weight: T, epsilon: f32, h: Option<T> },
    Gated { gate_up: T, h: Option<T> },
}

/// Gradients of a function that may stand in front of maps.
pub(super) struct FrontGradients<T> {
    /// Of its input.
    pub x: T,
    /// Of a norm's weight, where wanted.
    pub weight: Option<T>,
    /// What it makes of its input, where it was asked for again.
    pub y: Option<T>,
}

impl<T: Clone> Saved<T> {
    fn h<B: Kernels<FloatTensorPrimitive = T>>(&self) -> T {
        match self {
            Saved::Plain(x) => x.clone(),
            Saved::Normed { h: Some(h), .. } | Saved::Gated { h: Some(h), .. } => h.clone(),
            Saved::Normed { x, weight, epsilon, h: None } => B::rms_norm(x, weight, *epsilon),
            Saved::Gated { gate_up, h: None } => B::silu_gate(gate_up),
        }
    }

    /// Passes the gradient of `h` on, which nobody else has; with `again`, `h` comes with it, computed on the way if it was
    /// not kept.
    fn backward<B: Kernels<FloatTensorPrimitive = T>>(
        &self,
        dh: T,
        passing: Option<&T>,
        wants_norm: bool,
        again: bool,
    ) -> FrontGradients<T> {
        let kept = match self {
            Saved::Plain(x) => Some(x),
            Saved::Normed { h, .. } | Saved::Gated { h, .. } => h.as_ref(),
        };
        let kept = kept.filter(|_| again).cloned();
        let again = again && kept.is_none();
        let gradients = match self {
            Saved::Plain(_) => FrontGradients { x: dh, weight: None, y: None },
            Saved::Normed { x, weight, epsilon, .. } => {
                B::rms_norm_backward(x, weight, *epsilon, dh, passing, wants_norm, again)
            }
            Saved::Gated { gate_up, .. } => B::silu_gate_backward(gate_up, dh, again),
        };
        FrontGradients { y: kept.or(gradients.y), ..gradients }
    }

    fn keep(&mut self, value: &T) {
        if let Saved::Normed { h, .. } | Saved::Gated { h, .. } = self {
            *h = Some(value.clone());
        }
    }
}

/// A GPU's kernels fill ranks up to multiples of this with zeros, so that rows lie as the fast products read them.
pub(crate) const RANK_STEP: usize = 8;

/// Up to so many ranks that share an input they multiply all terms in joint products, and keep the factors for the
/// backward: what is multiplied by zero costs less than more products.
pub(crate) const MOST_JOINT: usize = 384;

/// Inputs of the graph's node for each map: weight, bias, A, and what trains of B or what stands for it.
const OF_MAP: usize = 5;

/// Inputs of the graph's node: raw input, norm weight, residual, then those of each map.
const INPUTS: usize = 3 + OF_MAP * MOST;

/// What is known of a term besides the tensors that have gradients.
struct TermForm {
    b: Up<Tensor<2>>,
    scale: f32,
    dropout: Option<Dropout>,
}

fn fused<B: Kernels>(
    input: LinearInput,
    maps: Vec<AdaptedLinear>,
    residual: Option<Residual>,
    recompute: bool,
) -> Tensor<2> {
    let dtype = input.tensor().dtype();
    let mut tensors: [Option<Tensor<2>>; INPUTS] = std::array::from_fn(|_| None);
    let (kind, raw, norm, arriving) = match input {
        LinearInput::Plain(x) => (Kind::Plain, x, None, None),
        LinearInput::Normed { x, weight, epsilon, skip } => {
            (Kind::Normed(epsilon as f32), x, Some(as_dtype(weight, dtype)), skip)
        }
        LinearInput::Gated(gate_up) => (Kind::Gated, gate_up, None, None),
    };
    let (residual, leaving) = residual.map(|residual| (residual.value, residual.skip)).unzip();
    (tensors[0], tensors[1], tensors[2]) = (Some(raw), norm, residual);
    let mut terms = Vec::with_capacity(maps.len());
    for (map, slots) in maps.into_iter().zip(tensors[3..].chunks_exact_mut(OF_MAP)) {
        slots[0] = Some(as_dtype(map.weight, dtype));
        slots[1] = map.bias.map(|bias| as_dtype(bias, dtype));
        terms.push(map.term.and_then(Term::into_low_rank).map(
            |LowRankTerm { a, b, scale, dropout, .. }| {
                let [first, second] = b.trained().map(Option::<&Tensor<2>>::cloned);
                (slots[2], slots[3], slots[4]) = (Some(a), first, second);
                TermForm { b, scale: scale as f32, dropout }
            },
        ));
    }

    if !tensors.iter().flatten().any(has_graph) {
        let primitives = tensors.map(|tensor| tensor.map(B::primitive));
        let (saved, parts, residual) = assemble::<B>(kind, primitives, terms);
        let (y, _) = B::together(|| B::linears(&saved.h::<B>(), &parts, residual.as_ref()));
        return B::tensor(y);
    }
    let tracked = tensors.map(|tensor| tensor.map(lift::<B, 2>));
    let like = tracked[0].as_ref().map(|raw| raw.primitive().clone());
    let filler = || constant::<B>(like.as_ref().expect("every map has an input"));
    let nodes: [NodeGuard; INPUTS] =
        tracked.each_ref().map(|tensor| tensor.as_ref().map_or_else(filler, Tracked::<B>::node));
    let primitives = tracked.map(|tensor| tensor.map(Tracked::<B>::into_primitive));
    let (mut saved, parts, residual) = assemble::<B>(kind, primitives, terms);
    let prepared = LinearBackward.prepare::<NoCheckpointing>(nodes).compute_bound().stateful();
    let (h, (y, low)) = B::together(|| {
        let h = saved.h::<B>();
        let results = B::linears(&h, &parts, residual.as_ref());
        (h, results)
    });
    B::tracked_tensor(match prepared {
        OpsKind::Tracked(prepared) => {
            if !recompute {
                saved.keep(&h);
            }
            arriving.iter().for_each(Skip::expect);
            prepared.finish(State { saved, low, parts, arriving, leaving: leaving.flatten() }, y)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    })
}

#[derive(Clone, Copy)]
enum Kind {
    Plain,
    Normed(f32),
    Gated,
}

type Assembled<T> = (Saved<T>, Vec<Part<T>>, Option<T>);

/// Sorts the tensors, in the order of the node's inputs.
fn assemble<B: Kernels>(
    kind: Kind,
    tensors: [Option<FloatTensor<B>>; INPUTS],
    terms: Vec<Option<TermForm>>,
) -> Assembled<FloatTensor<B>> {
    let mut tensors = tensors.into_iter();
    let mut next = || tensors.next().flatten();
    let (raw, norm, residual) = (next(), next(), next());
    let saved = match (kind, raw, norm) {
        (Kind::Normed(epsilon), Some(x), Some(weight)) => Saved::Normed { x, weight, epsilon, h: None },
        (Kind::Gated, Some(gate_up), _) => Saved::Gated { gate_up, h: None },
        (_, raw, _) => Saved::Plain(raw.expect("every map has an input")),
    };
    let constant = |tensor: Tensor<2>| B::primitive(if has_graph(&tensor) { tensor.inner() } else { tensor });
    let parts = terms.into_iter().map(|term| {
        let (weight, bias, a, trained) = (next(), next(), next(), [next(), next()]);
        let factors = a.zip(term).and_then(|(a, TermForm { b, scale, dropout })| {
            Some(Factors { a, b: b.rebuilt(trained, constant)?, scale, dropout })
        });
        Part { weight: weight.expect("every map has a weight"), bias, factors }
    });
    let parts = parts.collect();
    (saved, parts, residual)
}

/// What the backward reads.
#[derive(Clone, Debug)]
struct State<T> {
    saved: Saved<T>,
    low: Option<LowRankState<T>>,
    parts: Vec<Part<T>>,
    /// Where a gradient of the normed input may have been left.
    arriving: Option<Skip>,
    /// Where the gradient of the residual may be left.
    leaving: Option<Skip>,
}

#[derive(Debug)]
struct LinearBackward;

impl<B: Kernels> Backward<B, INPUTS> for LinearBackward {
    type State = State<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, INPUTS>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let State { saved, low, parts, arriving, leaving } = ops.state;
        let passing: Option<FloatTensor<B>> = arriving.and_then(|skip| skip.take());
        let [raw, norm, residual, of_maps @ ..] = ops.parents.map(|node| node.map(|node| node.id));
        let wanted = Wanted {
            input: raw.is_some() || norm.is_some(),
            parts: of_maps
                .chunks_exact(OF_MAP)
                .take(parts.len())
                .map(|nodes| {
                    let [weight, bias, a, first, second] = [0, 1, 2, 3, 4].map(|slot| nodes[slot].is_some());
                    WantedPart { weight, bias, a, up: [first, second] }
                })
                .collect(),
        };
        let mut of_front = None;
        let of_parts = B::together(|| {
            B::linears_backward(&dy, low.as_ref(), &parts, &wanted, |dh| {
                let again = wanted.reads_input();
                let Some(dh) = dh else { return again.then(|| saved.h::<B>()) };
                let FrontGradients { x, weight, y } =
                    saved.backward::<B>(dh, passing.as_ref(), norm.is_some(), again);
                of_front = Some((x, weight));
                y
            })
        });
        let mut register = |node: Option<NodeId>, gradient: Option<FloatTensor<B>>| {
            if let Some((node, gradient)) = node.zip(gradient) {
                grads.register::<B>(node, gradient);
            }
        };
        if residual.is_some() {
            let dy = leaving.map_or(Some(dy.clone()), |skip| skip.leave(dy));
            register(residual, dy);
        }
        for (part, nodes) in of_parts.into_iter().zip(of_maps.chunks_exact(OF_MAP)) {
            register(nodes[0], part.weight);
            register(nodes[1], part.bias);
            register(nodes[2], part.a);
            for (node, gradient) in nodes[3..].iter().zip(part.up) {
                register(*node, gradient);
            }
        }
        if let Some((dx, dw)) = of_front {
            register(raw, Some(dx));
            register(norm, dw);
        }
    }
}
