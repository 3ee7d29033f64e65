//! Linear maps that share their input, each with an optional low-rank term.
//!
//! What can be one product is one: weights that lie one after another, and the thin products of all terms. Thin products
//! come before the large ones, which are bound by arithmetic and read in passing what these wrote.

use super::backend::{at, column_launch, dense, dims, drop_elements, elementwise, empties, empty, rows_of};
use super::commands::{Arguments, Launch};
use super::cublaslt::{Element, Product};
use super::engine::{Buffers, submit};
use super::error::Fault;
use super::factors::{Block, Cast, Layout, Origin, Place, UpGradient};
use super::queue::Queue;
use crate::kernels::dropout::Dropout;
use crate::kernels::linear::{Factors as LowRank, LowRankState, Part, PartGradients, Up, Wanted};
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

/// Maps whose weights lie one after another.
struct JoinedMaps {
    /// Where their columns of the result begin.
    start: usize,
    /// How many columns there are.
    width: usize,
    /// The address of the first weight.
    weight: u64,
}

/// For each map, whether its weight begins where that of the one before it ends, in the same piece of memory. Pieces that
/// the pool happens to put side by side do not count: products would be joined in one run and not in another, and round
/// otherwise.
fn adjoining(parts: &[Part<CubeTensor>]) -> Vec<bool> {
    let begins_at = |tensor: &CubeTensor| tensor.handle.offset_start.unwrap_or(0);
    let follows = |before: &CubeTensor, weight: &CubeTensor| {
        let bytes = (before.meta.num_elements() * before.dtype.size()) as u64;
        before.handle.memory.descriptor() == weight.handle.memory.descriptor()
            && before.is_contiguous()
            && weight.is_contiguous()
            && begins_at(before) + bytes == begins_at(weight)
    };
    let pairs = parts.windows(2).map(|pair| follows(&pair[0].weight, &pair[1].weight));
    std::iter::once(false).chain(pairs).collect()
}

/// Joins the weights that adjoin.
fn joined(layout: &Layout, weights: &[u64], adjoining: &[bool]) -> Vec<JoinedMaps> {
    let mut runs: Vec<JoinedMaps> = Vec::with_capacity(weights.len());
    for ((place, &weight), adjoins) in layout.places.iter().zip(weights).zip(adjoining) {
        match runs.last_mut() {
            Some(run) if *adjoins => run.width += place.width,
            _ => runs.push(JoinedMaps { start: place.start, width: place.width, weight }),
        }
    }
    runs
}

/// What the term of each map drops, and where so many elements that are left have room, if one drops any.
fn dropouts(
    parts: &[Part<CubeTensor>],
    elements: usize,
    like: &CubeTensor,
    buffers: &mut Buffers,
) -> (Vec<Option<Dropout>>, Option<usize>) {
    let of = |part: &Part<CubeTensor>| part.factors.as_ref().and_then(|factors| factors.dropout);
    let dropouts: Vec<_> = parts.iter().map(of).collect();
    let drops = dropouts.iter().any(Option::is_some);
    let left = drops.then(|| buffers.add_scratch(&like.client, elements * like.dtype.size()));
    (dropouts, left)
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

/// `y += x` of so many elements.
fn add_onto(queue: &mut Queue, dtype: DType, count: usize, x: u64, y: u64) -> Result<(), Fault> {
    let lanes = 16 / dtype.size();
    let vectors = count.is_multiple_of(lanes) && (x | y).is_multiple_of(16);
    let arguments = Arguments::default().address(x).address(y).long(count).int(usize::from(vectors));
    let launch = Launch::new(count.div_ceil(256 * if vectors { lanes } else { 1 }), 256);
    queue.launch(elementwise(dtype), "add_onto", launch, arguments)
}

/// The maps' results, and what the backward reads of the terms.
pub fn forward(
    x: &CubeTensor,
    parts: &[Part<CubeTensor>],
    residual: Option<&CubeTensor>,
) -> (CubeTensor, Option<LowRankState<CubeTensor>>) {
    let ((rows, inputs), dtype) = (dims(x), x.dtype);
    let layout = Layout::new(parts, inputs);
    let mut buffers = Buffers::default();
    let y = empty(x, &[rows, layout.out], dtype);
    let (x_at, y_at) = (buffers.add_rows(x), buffers.add(&y));
    let weight_at: Vec<usize> = parts.iter().map(|part| buffers.add_rows(&part.weight)).collect();
    let adjoining = adjoining(parts);
    let bias_at: Vec<Option<usize>> =
        parts.iter().map(|part| part.bias.as_ref().map(|bias| buffers.add_rows(bias))).collect();
    let residual_at = residual.map(|residual| buffers.add_rows(residual));
    let low = (layout.rank > 0).then(|| {
        let down = (vec![rows, layout.rank], dtype);
        // Small factors are kept for the backward, large ones are worked out again there.
        let kept = layout.is_joint().then(|| (vec![1, layout.len], dtype));
        let mut kept = empties(x, vec![Some(down), kept]).into_iter().flatten();
        let down = kept.next().expect("the first was asked for");
        let factors = kept.next();
        let cast_at = match &factors {
            Some(factors) => buffers.add(factors),
            None => buffers.add_scratch(&x.client, layout.len * dtype.size()),
        };
        let at = (buffers.add(&down), cast_at);
        (LowRankState { down, factors }, (Cast::all(parts, &layout, &mut buffers), at))
    });
    let (low, low_work) = low.unzip();
    let (dropouts, left_at) = dropouts(parts, rows * inputs, x, &mut buffers);
    submit("linears", &y.client, buffers, move |queue, buffers| {
        let (x, y) = (buffers[x_at], buffers[y_at]);
        let weights: Vec<u64> = weight_at.iter().map(|weight| buffers[*weight]).collect();
        // Without terms the results start from the residual. With terms it comes last: what is small beside it would be
        // rounded away when it is added alone, time and again the same, and adapters begin small.
        let residual = residual_at.map(|residual| buffers[residual]);
        let (mut beta, from) = residual.filter(|_| low_work.is_none()).map_or((0.0, y), |from| (1.0, from));
        let thin = |queue: &mut Queue, beta: f32, down: u64, factors: u64| {
            layout.groups().into_iter().try_for_each(|place| {
                let product = Product {
                    a: (false, layout.rank),
                    b: (true, place.filled()),
                    c: layout.out,
                    ..dense(rows, place.width, place.filled(), dtype)
                };
                let (down, b) = (at(down, place.first, dtype), at(factors, place.b, dtype));
                let to = at(y, place.start, dtype);
                queue.product(&product, 1.0, down, b, beta, to, to)
            })
        };
        let low = low_work.as_ref().map(|(_, (down, factors))| (buffers[*down], buffers[*factors]));
        if let Some(((casts, _), (down, a))) = low_work.as_ref().zip(low) {
            Cast::enqueue(casts, queue, dtype, buffers, a)?;
            match left_at.map(|left| buffers[left]) {
                None => {
                    let product = Product { b: (true, inputs), ..dense(rows, layout.rank, inputs, dtype) };
                    queue.product(&product, 1.0, x, a, 0.0, down, down)?;
                }
                // Each term has an input of its own.
                Some(left) => {
                    for (place, dropout) in layout.places.iter().zip(&dropouts) {
                        let input = left_of(queue, dtype, (rows, inputs), dropout, x, left)?;
                        let product = dense(rows, place.filled(), inputs, dtype);
                        let product = Product { b: (true, inputs), c: layout.rank, ..product };
                        let (a, to) = (at(a, place.first * inputs, dtype), at(down, place.first, dtype));
                        queue.product(&product, 1.0, input, a, 0.0, to, to)?;
                    }
                }
            }
            if layout.is_joint() {
                thin(queue, 0.0, down, a)?;
                beta = 1.0;
            }
        }
        for JoinedMaps { start, width, weight } in joined(&layout, &weights, &adjoining) {
            let product = Product { b: (true, inputs), c: layout.out, ..dense(rows, width, inputs, dtype) };
            let (from, to) = (at(from, start, dtype), at(y, start, dtype));
            queue.product(&product, 1.0, x, weight, beta, from, to)?;
        }
        // Products apart leave the columns of maps without a term alone.
        if let Some((down, a)) = low.filter(|_| !layout.is_joint()) {
            thin(queue, 1.0, down, a)?;
        }
        for (place, bias) in layout.places.iter().zip(bias_at) {
            if let Some(bias) = bias {
                let arguments = Arguments::default().address(at(y, place.start, dtype)).int(layout.out);
                let arguments = arguments.address(buffers[bias]).int(rows).int(place.width);
                let launch = Launch::new((rows * place.width).div_ceil(256), 256);
                queue.launch(elementwise(dtype), "add_bias", launch, arguments)?;
            }
        }
        match residual.filter(|_| low_work.is_some()) {
            Some(residual) => add_onto(queue, dtype, rows * layout.out, residual, y),
            None => Ok(()),
        }
    });
    (y, low)
}

/// Up to so many ranks that share an input the gradients of all `B`s are blocks of one product.
const MOST_IN_ONE: usize = 128;

/// How the gradients of `B`s are computed.
enum UpGradients {
    /// As blocks of one product, which goes to scratch.
    InOne(usize, Vec<Block>),
    /// Each by itself, times its scale.
    Apart(Vec<(UpGradient, Place, f32)>),
}

impl UpGradients {
    /// Those that are wanted, `to` what of each map.
    fn new(
        parts: &[Part<CubeTensor>],
        layout: &Layout,
        to: &[[Option<usize>; 2]],
        like: &CubeTensor,
        buffers: &mut Buffers,
    ) -> Self {
        let wanted = parts.iter().zip(&layout.places).zip(to);
        let wanted = wanted.filter(|(_, to)| to.iter().any(Option::is_some));
        let wanted = wanted.filter_map(|((part, place), to)| Some((part.factors.as_ref()?, *place, *to)));
        let wanted: Vec<(&LowRank<_>, Place, _)> = wanted.collect();
        let blocks = wanted.iter().map(|(LowRank { b, scale, .. }, place, to)| match (b, to[0]) {
            (Up::Matrix(_), Some(to)) => Some(Block {
                from: place.start * layout.rank + place.first,
                rows: place.width,
                columns: place.rank,
                scale: *scale,
                to,
            }),
            _ => None,
        });
        let blocks = blocks.collect::<Option<Vec<Block>>>();
        if let Some(blocks) = blocks.filter(|blocks| blocks.len() > 1 && layout.rank <= MOST_IN_ONE) {
            let whole = buffers.add_scratch(&like.client, 4 * layout.out * layout.rank);
            return Self::InOne(whole, blocks);
        }
        let apart = wanted.into_iter().map(|(LowRank { b, scale, .. }, place, to)| {
            let (origin, filled) = (Origin::of(b, buffers), place.filled());
            let whole = match (origin, to[0]) {
                (Origin::Matrix(_), Some(to)) if filled == place.rank => to,
                _ => buffers.add_scratch(&like.client, 4 * place.width * filled),
            };
            (UpGradient { whole: (whole, filled), origin, to }, place, *scale)
        });
        Self::Apart(apart.collect())
    }

    /// Enqueues them, of `dy` and the down projections.
    fn enqueue(
        &self,
        queue: &mut Queue,
        layout: &Layout,
        rows: usize,
        dtype: DType,
        buffers: &[u64],
        [dy, down]: [u64; 2],
    ) -> Result<(), Fault> {
        let product = |width: usize, ranks: usize| {
            let product = dense(width, ranks, rows, dtype);
            Product { a: (true, layout.out), b: (false, layout.rank), output: Element::F32, ..product }
        };
        match self {
            Self::InOne(whole, blocks) => {
                let whole = buffers[*whole];
                queue.product(&product(layout.out, layout.rank), 1.0, dy, down, 0.0, whole, whole)?;
                Block::take(blocks, queue, buffers, whole, layout.rank)
            }
            Self::Apart(apart) => apart.iter().try_for_each(|(up, place, scale)| {
                let (whole, stride) = (buffers[up.whole.0], up.whole.1);
                let (dy, down) = (at(dy, place.start, dtype), at(down, place.first, dtype));
                queue.product(&product(place.width, stride), *scale, dy, down, 0.0, whole, whole)?;
                up.enqueue(queue, place, buffers)
            }),
        }
    }
}

/// The gradients of the maps' parameters; `front` is told the gradient of the input, and says what the input was.
pub fn backward(
    dy: &CubeTensor,
    low: Option<&LowRankState<CubeTensor>>,
    parts: &[Part<CubeTensor>],
    wanted: &Wanted,
    front: impl FnOnce(Option<CubeTensor>) -> Option<CubeTensor>,
) -> Vec<PartGradients<CubeTensor>> {
    let (rows, inputs, dtype) = (dims(dy).0, dims(&parts[0].weight).1, dy.dtype);
    let layout = Layout::new(parts, inputs);
    let dx = wanted.input.then(|| empty(dy, &[rows, inputs], dtype));
    let ddown = low.map(|_| empty(dy, &[rows, layout.rank], dtype));
    // The gradients of all As lie under one another, so that one product makes them.
    let wants_a = low.is_some() && wanted.parts.iter().any(|wanted| wanted.a);
    let mut forms = vec![wants_a.then(|| (vec![layout.rank, inputs], DType::F32))];
    for ((part, place), wanted) in parts.iter().zip(&layout.places).zip(&wanted.parts) {
        forms.push(wanted.weight.then(|| (vec![place.width, inputs], dtype)));
        forms.push(wanted.bias.then(|| (vec![1, place.width], dtype)));
        let trained = part.factors.as_ref().map_or([None; 2], |factors| factors.b.trained());
        for (tensor, wanted) in trained.into_iter().zip(wanted.up) {
            let form = |tensor: &CubeTensor| (vec![dims(tensor).0, dims(tensor).1], DType::F32);
            forms.push(tensor.filter(|_| wanted).map(form));
        }
    }
    let mut tensors = empties(dy, forms).into_iter();
    let da = tensors.next().flatten();
    let gradients = tensors.collect::<Vec<_>>();

    through_weights(dy, [dx.as_ref(), ddown.as_ref()], low, parts, &layout, &gradients);
    if let Some(x) = front(dx) {
        let of_weights: Vec<_> = gradients.chunks_exact(4).map(|gradients| gradients[0].as_ref()).collect();
        through_input([dy, &x], &of_weights, da.as_ref().zip(ddown.as_ref()), parts, &layout);
    }

    let of_a = |place: &Place| {
        let rows = place.first..place.first + place.rank;
        da.as_ref().filter(|_| place.rank > 0).map(|da| rows_of(da, rows))
    };
    let parts = layout.places.iter().zip(gradients.chunks_exact(4)).map(|(place, gradients)| {
        let [weight, bias, first, second] = [0, 1, 2, 3].map(|slot| gradients[slot].clone());
        PartGradients { weight, bias, a: of_a(place), up: [first, second] }
    });
    parts.collect()
}

/// The gradients of input and down projections, and those of biases and `B`s, which read no input.
fn through_weights(
    dy: &CubeTensor,
    [dx, ddown]: [Option<&CubeTensor>; 2],
    low: Option<&LowRankState<CubeTensor>>,
    parts: &[Part<CubeTensor>],
    layout: &Layout,
    gradients: &[Option<CubeTensor>],
) {
    let (rows, dtype) = (dims(dy).0, dy.dtype);
    let Layout { inputs, out, rank, .. } = *layout;
    let mut buffers = Buffers::default();
    let dy_at = buffers.add_rows(dy);
    let weight_at: Vec<usize> = parts.iter().map(|part| buffers.add_rows(&part.weight)).collect();
    let adjoining = adjoining(parts);
    let dx_at = dx.map(|dx| buffers.add(dx));
    let low_work = low.zip(ddown).map(|(low, ddown)| {
        let (factors, casts) = match &low.factors {
            Some(factors) => (buffers.add(factors), None),
            None => {
                let casts = Cast::all(parts, layout, &mut buffers);
                (buffers.add_scratch(&dy.client, layout.len * dtype.size()), Some(casts))
            }
        };
        ([buffers.add_rows(&low.down), buffers.add(ddown), factors], casts)
    });
    let to = gradients.chunks_exact(4).map(|gradients| {
        [1, 2, 3].map(|slot| gradients[slot].as_ref().map(|tensor: &CubeTensor| buffers.add(tensor)))
    });
    let (biases, ups): (Vec<_>, Vec<_>) = to.map(|[bias, first, second]| (bias, [first, second])).unzip();
    let ups = UpGradients::new(parts, layout, &ups, dy, &mut buffers);
    let (dropouts, left_at) = dropouts(parts, rows * inputs, dy, &mut buffers);
    let layout = layout.clone();
    submit("linears_backward", &dy.client, buffers, move |queue, buffers| {
        let places = &layout.places;
        let dy = buffers[dy_at];
        let dx = dx_at.map(|dx| buffers[dx]);
        for (place, bias) in places.iter().zip(biases) {
            if let Some(bias) = bias.map(|bias| buffers[bias]) {
                let dy = at(dy, place.start, dtype);
                let arguments = Arguments::default().address(dy).int(out).address(0).address(0);
                let arguments = arguments.address(bias).int(rows).int(place.width);
                queue.launch(elementwise(dtype), "column_sums", column_launch(place.width), arguments)?;
            }
        }
        let mut beta = 0.0;
        if let Some((at_low, casts)) = low_work {
            let [down, ddown, a] = at_low.map(|at| buffers[at]);
            if let Some(casts) = casts {
                Cast::enqueue(&casts, queue, dtype, buffers, a)?;
            }
            for place in layout.groups() {
                let product = dense(rows, place.filled(), place.width, dtype);
                let product = Product { a: (false, out), c: rank, ..product };
                let (dy, to) = (at(dy, place.start, dtype), at(ddown, place.first, dtype));
                queue.product(&product, 1.0, dy, at(a, place.b, dtype), 0.0, to, to)?;
            }
            ups.enqueue(queue, &layout, rows, dtype, buffers, [dy, down])?;
            match (dx, left_at.map(|left| buffers[left])) {
                (None, _) => {}
                // As forward, the thin product into dx comes before the large ones.
                (Some(dx), None) => {
                    queue.product(&dense(rows, inputs, rank, dtype), 1.0, ddown, a, 0.0, dx, dx)?;
                    beta = 1.0;
                }
                // Each term drops of its gradient what it dropped of its input.
                (Some(dx), Some(left)) => {
                    for (place, dropout) in places.iter().zip(&dropouts).filter(|(place, _)| place.rank > 0) {
                        let product = dense(rows, inputs, place.filled(), dtype);
                        let product = Product { a: (false, rank), ..product };
                        let (ddown, a) = (at(ddown, place.first, dtype), at(a, place.first * inputs, dtype));
                        match dropout {
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
        for JoinedMaps { start, width, weight } in joined(&layout, &weights, &adjoining) {
            let product = Product { a: (false, out), ..dense(rows, inputs, width, dtype) };
            queue.product(&product, 1.0, at(dy, start, dtype), weight, beta, dx, dx)?;
            beta = 1.0;
        }
        Ok(())
    });
}

/// The gradients of the weights, and of all `A`s with that of the down projections.
fn through_input(
    [dy, x]: [&CubeTensor; 2],
    of_weights: &[Option<&CubeTensor>],
    of_a: Option<(&CubeTensor, &CubeTensor)>,
    parts: &[Part<CubeTensor>],
    layout: &Layout,
) {
    let (rows, dtype) = (dims(dy).0, dy.dtype);
    let Layout { inputs, out, rank, .. } = *layout;
    let mut buffers = Buffers::default();
    let (dy_at, x_at) = (buffers.add_rows(dy), buffers.add_rows(x));
    let weight_at: Vec<_> = of_weights.iter().map(|dw| dw.map(|dw| buffers.add(dw))).collect();
    let of_a_at = of_a.map(|(da, ddown)| (buffers.add(da), buffers.add(ddown)));
    let (dropouts, left_at) = dropouts(parts, rows * inputs, x, &mut buffers);
    let places = layout.places.clone();
    submit("linears_parameters", &x.client, buffers, move |queue, buffers| {
        let (dy, x) = (buffers[dy_at], buffers[x_at]);
        for (place, dw) in places.iter().zip(weight_at) {
            let Some(dw) = dw.map(|dw| buffers[dw]) else { continue };
            let product = Product { a: (true, out), ..dense(place.width, inputs, rows, dtype) };
            queue.product(&product, 1.0, at(dy, place.start, dtype), x, 0.0, dw, dw)?;
        }
        let Some((da, ddown)) = of_a_at.map(|(da, ddown)| (buffers[da], buffers[ddown])) else {
            return Ok(());
        };
        let product = |ranks: usize| {
            let product = Product { a: (true, rank), ..dense(ranks, inputs, rows, dtype) };
            Product { output: Element::F32, ..product }
        };
        let Some(left) = left_at.map(|left| buffers[left]) else {
            return queue.product(&product(rank), 1.0, ddown, x, 0.0, da, da);
        };
        // Each term has an input of its own.
        for (place, dropout) in places.iter().zip(&dropouts).filter(|(place, _)| place.rank > 0) {
            let input = left_of(queue, dtype, (rows, inputs), dropout, x, left)?;
            let (ddown, da) = (at(ddown, place.first, dtype), at(da, place.first * inputs, DType::F32));
            queue.product(&product(place.filled()), 1.0, ddown, input, 0.0, da, da)?;
        }
        Ok(())
    });
}
