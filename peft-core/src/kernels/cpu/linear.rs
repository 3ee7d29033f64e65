//! Linear maps that share their input, each with an optional low-rank term, forward and backward:
//!
//! ```text
//! yᵢ = x·Wᵢᵀ + biasᵢ + sᵢ·(xᵢ·Aᵢᵀ)·Bᵢᵀ (+ residualᵢ), where xᵢ is x, or what dropout leaves of it
//! dx = Σ dyᵢ·Wᵢ + sᵢ(dyᵢ·Bᵢ)·Aᵢ     dAᵢ = sᵢ(dyᵢ·Bᵢ)ᵀ·x     dBᵢ = sᵢ·dyᵢᵀ·(x·Aᵢᵀ)     dWᵢ = dyᵢᵀ·x     dbiasᵢ = Σ dyᵢ
//! ```
//!
//! A low-rank product is a few more depths of the base product: a block of rows is packed once, multiplied by the small
//! factors, and the result packed behind it, so that every tile of `y` or `dx` is written in one pass.

use super::buffers::{self, Buffer};
use super::dropout;
use super::matmul::{
    Block, MR, Matrix, MatrixMut, NR, Shared, Stretch, Update, lhs_panel, matmul, pack_lhs, pack_rhs,
    pack_rhs_panel, panel_count, row_step,
};
use crate::kernels::dropout::Dropout;
use rayon::prelude::*;
use std::ops::Range;

/// Numbers of packed weights at a time (8 MiB), unless that is fewer than [`MIN_WIDTH`] columns.
const SLAB: usize = 2 << 20;
/// Columns of packed weights at a time, at least: packing a block of rows must pay.
const MIN_WIDTH: usize = 256;
/// Up to so many rows weights are read where they lie.
const FEW_ROWS: usize = 8;

/// The term `s·(x·Aᵀ)·Bᵀ`.
#[derive(Clone, Copy)]
pub(crate) struct LowRank<'a> {
    /// `A`, `[rank, in]`.
    pub(crate) a: &'a [f32],
    /// `B`, `[out, rank]`.
    pub(crate) b: &'a [f32],
    /// The rank.
    pub(crate) rank: usize,
    /// `s`.
    pub(crate) scale: f32,
    /// What is dropped of its input.
    pub(crate) dropout: Option<Dropout>,
}

/// One map of those that share an input.
#[derive(Clone, Copy)]
pub(crate) struct Projection<'a> {
    /// `W`, `[out, in]`.
    pub(crate) weight: &'a [f32],
    /// Its rows.
    pub(crate) out: usize,
    /// `[out]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// The low-rank term.
    pub(crate) low_rank: Option<LowRank<'a>>,
}

/// Gradients of one map that are asked for.
#[derive(Default)]
pub(crate) struct Gradients<'a> {
    /// `dA`, `[rank, in]`.
    pub(crate) a: Option<&'a mut [f32]>,
    /// `dB`, `[out, rank]`.
    pub(crate) b: Option<&'a mut [f32]>,
    /// `dW`, `[out, in]`.
    pub(crate) weight: Option<&'a mut [f32]>,
    /// `dbias`, `[out]`.
    pub(crate) bias: Option<&'a mut [f32]>,
}

/// Where a projection's outputs and its rank's columns lie among those of all.
struct Places {
    out: Range<usize>,
    rank: Range<usize>,
}

fn places(projections: &[Projection]) -> Vec<Places> {
    let (mut out, mut rank) = (0, 0);
    let place = |p: &Projection| {
        let (out_from, rank_from) = (out, rank);
        out += p.out;
        rank += p.low_rank.map_or(0, |term| term.rank);
        Places { out: out_from..out, rank: rank_from..rank }
    };
    projections.iter().map(place).collect()
}

/// Σ out and Σ rank.
fn widths(places: &[Places]) -> (usize, usize) {
    places.last().map_or((0, 0), |last| (last.out.end, last.rank.end))
}

fn check(projections: &[Projection], inputs: usize) {
    for p in projections {
        assert_eq!(p.weight.len(), p.out * inputs, "a weight of another shape");
        assert!(p.bias.is_none_or(|bias| bias.len() == p.out), "a bias of another length");
        if let Some(term) = &p.low_rank {
            assert_eq!(term.a.len(), term.rank * inputs, "A of another shape");
            assert_eq!(term.b.len(), p.out * term.rank, "B of another shape");
        }
    }
}

/// Whether a term drops some of its input.
fn drops(projections: &[Projection]) -> bool {
    projections.iter().any(|p| p.low_rank.is_some_and(|term| term.dropout.is_some()))
}

/// What the term leaves of `x`.
fn dropped(x: &[f32], inputs: usize, dropout: &Dropout) -> Buffer {
    let mut left = buffers::take(x.len());
    dropout::apply(&mut left, x, inputs, dropout, false);
    left
}

/// `xᵢ·Aᵢᵀ` of every term apart.
fn down_apart(
    xa: &mut [f32],
    x: &[f32],
    rows: usize,
    inputs: usize,
    projections: &[Projection],
    places: &[Places],
) {
    let ranks = widths(places).1;
    for (p, place) in projections.iter().zip(places) {
        let Some(term) = p.low_rank.filter(|term| term.rank > 0) else { continue };
        let left = term.dropout.map(|dropout| dropped(x, inputs, &dropout));
        let x = Matrix::new(left.as_deref().unwrap_or(x), rows, inputs);
        let down = MatrixMut::strided(&mut xa[place.rank.start..], rows, term.rank, ranks);
        matmul(down, Update::Replace, 1.0, x, Matrix::new(term.a, term.rank, inputs).t());
    }
}

/// All `A` under one another, `[Σ rank, in]`, with zeros for terms that drop some of their input.
fn stacked_a(projections: &[Projection], inputs: usize, ranks: usize) -> Buffer {
    let mut stacked = buffers::take(ranks * inputs);
    let mut rest = &mut stacked[..];
    for term in projections.iter().filter_map(|p| p.low_rank.as_ref()) {
        let (head, tail) = rest.split_at_mut(term.a.len());
        match term.dropout {
            None => head.copy_from_slice(term.a),
            Some(_) => head.fill(0.0),
        }
        rest = tail;
    }
    stacked
}

/// The outputs of all projections.
///
/// # Shapes
/// `y` `[rows, Σ out]`, `xa` (the `x·Aᵢᵀ`, for the backward pass) `[rows, Σ rank]`, `x` `[rows, in]`, `residual`
/// `[rows, Σ out]`.
///
/// # Panics
/// When a slice has another length than its shape says.
pub(crate) fn forward(
    y: &mut [f32],
    xa: &mut [f32],
    x: &[f32],
    residual: Option<&[f32]>,
    rows: usize,
    inputs: usize,
    projections: &[Projection],
) {
    check(projections, inputs);
    let places = places(projections);
    let (outs, ranks) = widths(&places);
    assert!(y.len() == rows * outs && xa.len() == rows * ranks && x.len() == rows * inputs);
    assert!(residual.is_none_or(|residual| residual.len() == y.len()));
    if rows == 0 || outs == 0 {
        return;
    }
    if rows <= FEW_ROWS {
        return forward_few(y, xa, x, residual, rows, inputs, projections, &places);
    }
    let drops = drops(projections);
    if drops {
        down_apart(xa, x, rows, inputs, projections, &places);
    }
    let x = Matrix::new(x, rows, inputs);
    let stacked = stacked_a(projections, inputs, ranks);
    let packed_a = pack_rhs(Matrix::new(&stacked, ranks, inputs).t(), 0..inputs, 0..ranks);
    let width = (SLAB / inputs.max(1)).max(MIN_WIDTH).next_multiple_of(NR);
    let panel = lhs_panel(inputs + ranks);
    let (y, xa) = (Shared(y.as_mut_ptr()), Shared(xa.as_mut_ptr()));
    // Columns of one projection after another, packed up to `width` at a time.
    let mut pieces: Vec<(usize, Range<usize>)> = Vec::new();
    for (i, p) in projections.iter().enumerate() {
        pieces.extend((0..p.out).step_by(width).map(|from| (i, from..p.out.min(from + width))));
    }
    let mut rest = &pieces[..];
    let mut first = !drops;
    while !rest.is_empty() {
        let mut columns = 0;
        let fitting = rest.iter().take_while(|(_, part)| {
            columns += part.len();
            columns <= width
        });
        let (group, later) = rest.split_at(fitting.count().max(1));
        rest = later;
        let packed: Vec<(Buffer, Buffer)> = group
            .iter()
            .map(|(i, part)| {
                let p = &projections[*i];
                let weight = pack_rhs(Matrix::new(p.weight, p.out, inputs).t(), 0..inputs, part.clone());
                let rank = places[*i].rank.len();
                let b = p.low_rank.map_or(&[][..], |term| term.b);
                let mut b = pack_rhs(
                    Matrix::new(b, if rank > 0 { p.out } else { 0 }, rank).t(),
                    0..rank,
                    match rank {
                        0 => 0..0,
                        _ => part.clone(),
                    },
                );
                let scale = p.low_rank.map_or(1.0, |term| term.scale);
                b.iter_mut().for_each(|v| *v *= scale);
                (weight, b)
            })
            .collect();
        let step = row_step(rows);
        (0..rows.div_ceil(step)).into_par_iter().for_each(|task| {
            let part = task * step..rows.min((task + 1) * step);
            let mut a = buffers::take(panel_count(part.len(), MR) * panel);
            pack_lhs(&mut a, panel, 0, x, part.clone(), 0..inputs);
            if ranks > 0 {
                // SAFETY: the rows of `xa` are this task's.
                let xa = unsafe { xa.slice(part.start * ranks, part.len() * ranks) };
                if first {
                    // SAFETY: as above; operands are packed to their sizes.
                    unsafe {
                        Block {
                            rows: part.len(),
                            cols: ranks,
                            first: Stretch::packed(inputs, &a, panel, &packed_a),
                            c: xa.as_mut_ptr(),
                            c_stride: ranks,
                            ..Block::EMPTY
                        }
                        .run()
                    };
                }
                pack_lhs(
                    &mut a,
                    panel,
                    inputs * MR,
                    Matrix::new(xa, part.len(), ranks),
                    0..part.len(),
                    0..ranks,
                );
            }
            for ((i, columns), (weight, b)) in group.iter().zip(&packed) {
                let place = &places[*i];
                let at = part.start * outs + place.out.start + columns.start;
                let bias =
                    projections[*i].bias.map_or(std::ptr::null(), |bias| bias[columns.start..].as_ptr());
                // SAFETY: the rows of `y` are this task's; operands are packed to their sizes.
                unsafe {
                    Block {
                        rows: part.len(),
                        cols: columns.len(),
                        first: Stretch::packed(inputs, &a, panel, weight),
                        second: Stretch::packed(
                            place.rank.len(),
                            &a[(inputs + place.rank.start) * MR..],
                            panel,
                            b,
                        ),
                        c: y.get().add(at),
                        c_stride: outs,
                        source: residual.map_or(std::ptr::null(), |residual| residual[at..].as_ptr()),
                        source_stride: outs,
                        bias,
                        alpha: 1.0,
                    }
                    .run()
                }
            }
        });
        first = false;
    }
}

/// The outputs for a few rows: every weight streams by once.
#[allow(clippy::too_many_arguments)]
fn forward_few(
    y: &mut [f32],
    xa: &mut [f32],
    x: &[f32],
    residual: Option<&[f32]>,
    rows: usize,
    inputs: usize,
    projections: &[Projection],
    places: &[Places],
) {
    let (outs, ranks) = widths(places);
    match residual {
        Some(residual) => y.copy_from_slice(residual),
        None => y.fill(0.0),
    }
    down_apart(xa, x, rows, inputs, projections, places);
    let x = Matrix::new(x, rows, inputs);
    for (p, place) in projections.iter().zip(places) {
        let product = |y: &mut [f32], alpha, lhs, rhs| {
            let y = MatrixMut::strided(&mut y[place.out.start..], rows, p.out, outs);
            matmul(y, Update::Accumulate, alpha, lhs, rhs);
        };
        if let Some(bias) = p.bias {
            for y in y.chunks_exact_mut(outs) {
                y[place.out.clone()].iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        product(y, 1.0, x, Matrix::new(p.weight, p.out, inputs).t());
        if let Some(term) = p.low_rank.filter(|term| term.rank > 0) {
            let down = Matrix::strided(&xa[place.rank.start..], rows, term.rank, ranks);
            product(y, term.scale, down, Matrix::new(term.b, p.out, term.rank).t());
        }
    }
}

/// `dyb = s·dy·B` and `dx = dy·W + dyb·A` of all projections.
///
/// # Shapes
/// `dx` `[rows, in]`, `dyb` `[rows, Σ rank]`, `dy` `[rows, Σ out]`.
///
/// # Panics
/// When a slice has another length than its shape says.
pub(crate) fn input_gradient(
    dx: Option<&mut [f32]>,
    dyb: &mut [f32],
    dy: &[f32],
    rows: usize,
    inputs: usize,
    projections: &[Projection],
) {
    check(projections, inputs);
    let places = places(projections);
    let (outs, ranks) = widths(&places);
    assert!(dy.len() == rows * outs && dyb.len() == rows * ranks);
    assert!(dx.as_ref().is_none_or(|dx| dx.len() == rows * inputs));
    let mut dx = dx;
    through_weights(dx.as_deref_mut(), dyb, dy, rows, inputs, projections, &places);
    let Some(dx) = dx else { return };
    for (p, place) in projections.iter().zip(&places) {
        let Some((term, dropout)) = p.low_rank.and_then(|term| Some((term, term.dropout?))) else { continue };
        let mut through_a = buffers::take(rows * inputs);
        let into = MatrixMut::new(&mut through_a, rows, inputs);
        let dyb = Matrix::strided(&dyb[place.rank.start.min(dyb.len())..], rows, term.rank, ranks);
        matmul(into, Update::Replace, 1.0, dyb, Matrix::new(term.a, term.rank, inputs));
        dropout::apply(dx, &through_a, inputs, &dropout, true);
    }
}

/// What the gradients of parameters are made of.
pub(crate) struct Sources<'a> {
    /// `[rows, Σ out]`.
    pub(crate) dy: &'a [f32],
    /// `[rows, in]`; may be empty where neither an `A` nor a weight has a gradient.
    pub(crate) x: &'a [f32],
    /// `x·Aᵢᵀ`, `[rows, Σ rank]`, as [`forward`] left it.
    pub(crate) xa: &'a [f32],
    /// `[rows, Σ rank]`, as [`input_gradient`] left it; read for the gradient of an `A`.
    pub(crate) dyb: &'a [f32],
}

/// The gradients of all projections' parameters, one of `gradients` each.
///
/// # Panics
/// When a slice has another length than its shape says, or a factor's gradient is asked for where there is none.
pub(crate) fn parameter_gradients(
    gradients: &mut [Gradients],
    &Sources { dy, x, xa, dyb }: &Sources,
    rows: usize,
    inputs: usize,
    projections: &[Projection],
) {
    check(projections, inputs);
    let places = places(projections);
    let (outs, ranks) = widths(&places);
    assert!(dy.len() == rows * outs && xa.len() == rows * ranks && dyb.len() == rows * ranks);
    let reads_x = gradients.iter().any(|g| g.a.is_some() || g.weight.is_some());
    assert!(gradients.len() == projections.len() && (!reads_x || x.len() == rows * inputs));
    for ((g, p), place) in gradients.iter_mut().zip(projections).zip(&places) {
        let Some((term, dropout)) = p.low_rank.and_then(|term| Some((term, term.dropout?))) else { continue };
        if let Some(da) = g.a.take() {
            let dyb = Matrix::strided(&dyb[place.rank.start.min(dyb.len())..], rows, term.rank, ranks);
            let left = dropped(x, inputs, &dropout);
            let into = MatrixMut::new(da, term.rank, inputs);
            matmul(into, Update::Replace, 1.0, dyb.t(), Matrix::new(&left, rows, inputs));
        }
    }
    let x = Matrix::new(x, if reads_x { rows } else { 0 }, inputs);
    if gradients.iter().any(|g| g.a.is_some()) {
        let mut da = buffers::take(ranks * inputs);
        let stacked = MatrixMut::new(&mut da, ranks, inputs);
        matmul(stacked, Update::Replace, 1.0, Matrix::new(dyb, rows, ranks).t(), x);
        for (g, place) in gradients.iter_mut().zip(&places) {
            if let Some(into) = &mut g.a {
                into.copy_from_slice(&da[place.rank.start * inputs..place.rank.end * inputs]);
            }
        }
    }
    for ((g, p), place) in gradients.iter_mut().zip(projections).zip(&places) {
        let dy = Matrix::strided(&dy[place.out.start.min(dy.len())..], rows, p.out, outs);
        if let Some(db) = &mut g.b {
            let rank = place.rank.len();
            assert!(db.len() == p.out * rank, "a gradient of B of another shape");
            let xa = Matrix::strided(&xa[place.rank.start.min(xa.len())..], rows, rank, ranks);
            // Its transpose, for few rows by a wide matrix in place is the cheap form.
            let mut transposed = buffers::take(db.len());
            let scale = p.low_rank.map_or(1.0, |term| term.scale);
            matmul(MatrixMut::new(&mut transposed, rank, p.out), Update::Replace, scale, xa.t(), dy);
            for (o, db) in db.chunks_exact_mut(rank.max(1)).enumerate() {
                db.iter_mut().enumerate().for_each(|(r, db)| *db = transposed[r * p.out + o]);
            }
        }
        if let Some(dw) = &mut g.weight {
            matmul(MatrixMut::new(dw, p.out, inputs), Update::Replace, 1.0, dy.t(), x);
        }
        if let Some(db) = &mut g.bias {
            // Sums of columns: a row of ones times dy.
            let ones = vec![1.0; rows];
            matmul(MatrixMut::new(db, 1, p.out), Update::Replace, 1.0, Matrix::new(&ones, 1, rows), dy);
        }
    }
}

/// [`input_gradient`] but for what dropout leaves of it.
fn through_weights(
    dx: Option<&mut [f32]>,
    dyb: &mut [f32],
    dy: &[f32],
    rows: usize,
    inputs: usize,
    projections: &[Projection],
    places: &[Places],
) {
    let (outs, ranks) = widths(places);
    let dy = Matrix::new(dy, rows, outs);
    let packed_b: Vec<Buffer> = projections
        .iter()
        .zip(places)
        .map(|(p, place)| match &p.low_rank {
            Some(term) => pack_rhs(Matrix::new(term.b, p.out, term.rank), 0..p.out, 0..place.rank.len()),
            None => buffers::take(0),
        })
        .collect();
    let stacked = stacked_a(projections, inputs, ranks);
    let panel = lhs_panel(outs + ranks);
    let depth = outs + ranks;
    let width = (SLAB / depth.max(1)).max(MIN_WIDTH).next_multiple_of(NR);
    let dyb = Shared(dyb.as_mut_ptr());
    let wanted = if dx.is_some() { inputs } else { 0 };
    let dx = dx.map(|dx| Shared(dx.as_mut_ptr()));
    let step = row_step(rows);
    for left in (0..wanted.max(1)).step_by(width) {
        let columns = left..wanted.min(left + width);
        // The weights under one another, then the factors: `[panel][Σ out + Σ rank][NR]`.
        let mut packed = buffers::take(panel_count(columns.len(), NR) * depth * NR);
        packed.par_chunks_mut((depth * NR).max(1)).enumerate().for_each(|(j, packed)| {
            let columns = columns.start + j * NR..columns.end;
            for (p, place) in projections.iter().zip(places) {
                let into = &mut packed[place.out.start * NR..place.out.end * NR];
                pack_rhs_panel(into, Matrix::new(p.weight, p.out, inputs), 0..p.out, columns.clone());
            }
            pack_rhs_panel(&mut packed[outs * NR..], Matrix::new(&stacked, ranks, inputs), 0..ranks, columns);
        });
        (0..rows.div_ceil(step)).into_par_iter().for_each(|task| {
            let part = task * step..rows.min((task + 1) * step);
            let mut a = buffers::take(panel_count(part.len(), MR) * panel);
            pack_lhs(&mut a, panel, 0, dy, part.clone(), 0..outs);
            if ranks > 0 {
                // SAFETY: the rows of `dyb` are this task's.
                let dyb = unsafe { dyb.slice(part.start * ranks, part.len() * ranks) };
                for ((p, place), b) in projections.iter().zip(places).zip(&packed_b) {
                    let Some(term) = p.low_rank.filter(|term| term.rank > 0 && left == 0) else { continue };
                    // SAFETY: as above; operands are packed to their sizes.
                    unsafe {
                        Block {
                            rows: part.len(),
                            cols: term.rank,
                            first: Stretch::packed(p.out, &a[place.out.start * MR..], panel, b),
                            c: dyb[place.rank.start..].as_mut_ptr(),
                            c_stride: ranks,
                            alpha: term.scale,
                            ..Block::EMPTY
                        }
                        .run()
                    }
                }
                pack_lhs(
                    &mut a,
                    panel,
                    outs * MR,
                    Matrix::new(dyb, part.len(), ranks),
                    0..part.len(),
                    0..ranks,
                );
            }
            if let Some(dx) = dx {
                // SAFETY: the rows of `dx` are this task's; operands are packed to their sizes.
                unsafe {
                    Block {
                        rows: part.len(),
                        cols: columns.len(),
                        first: Stretch::packed(depth, &a, panel, &packed),
                        c: dx.get().add(part.start * inputs + left),
                        c_stride: inputs,
                        ..Block::EMPTY
                    }
                    .run()
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::{numbers, on_pools};
    use super::*;

    /// `a[m,k]·b[k,n]` in f64 through closures.
    fn product(
        m: usize,
        n: usize,
        k: usize,
        a: impl Fn(usize, usize) -> f64,
        b: impl Fn(usize, usize) -> f64,
    ) -> Vec<f64> {
        (0..m * n).map(|i| (0..k).map(|l| a(i / n, l) * b(l, i % n)).sum()).collect()
    }

    fn close(got: &[f32], expected: &[f64], what: &str) {
        assert_eq!(got.len(), expected.len(), "{what}");
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            assert!(
                (f64::from(*got) - expected).abs() < 2e-4 * (1.0 + expected.abs()),
                "{what} {i}: {got} {expected}"
            );
        }
    }

    #[test]
    fn forward_and_backward_of_joint_projections() {
        // (rows, in, [(out, rank, bias)], residual): every path and edge.
        type Shapes = &'static [(usize, usize, bool)];
        let cases: [(usize, usize, Shapes, bool); 9] = [
            (1, 20, &[(33, 4, true), (16, 0, false)], false),
            (5, 32, &[(7, 3, true)], true),
            (8, 64, &[(48, 8, false), (24, 8, false), (24, 8, false)], false),
            (70, 64, &[(48, 8, false), (24, 4, true), (24, 0, false)], true),
            (133, 37, &[(61, 5, true), (19, 17, false)], false),
            (67, 600, &[(40, 64, true)], true),
            (20, 19, &[(9, 0, true)], true),
            (12, 16, &[(700, 2, false), (3, 1, true)], false),
            (40, 9000, &[(300, 2, true), (20, 1, false)], true),
        ];
        for (rows, inputs, shapes, with_residual) in cases {
            let x = numbers(rows * inputs, 1);
            let weights: Vec<_> = shapes.iter().map(|s| numbers(s.0 * inputs, 2 + s.0 as u64)).collect();
            let biases: Vec<_> = shapes.iter().map(|s| numbers(s.0, 3)).collect();
            let a: Vec<_> = shapes.iter().map(|s| numbers(s.1 * inputs, 4 + s.0 as u64)).collect();
            let b: Vec<_> = shapes.iter().map(|s| numbers(s.1 * s.0, 5 + s.0 as u64)).collect();
            let projections: Vec<_> = (0..shapes.len())
                .map(|i| Projection {
                    weight: &weights[i],
                    out: shapes[i].0,
                    bias: shapes[i].2.then_some(&biases[i][..]),
                    low_rank: (shapes[i].1 > 0).then_some(LowRank {
                        a: &a[i],
                        b: &b[i],
                        rank: shapes[i].1,
                        scale: 0.5 + i as f32,
                        dropout: None,
                    }),
                })
                .collect();
            let outs: usize = shapes.iter().map(|s| s.0).sum();
            let ranks: usize = shapes.iter().map(|s| s.1).sum();
            let residual = numbers(rows * outs, 6);
            let residual = with_residual.then_some(&residual[..]);
            let dy = numbers(rows * outs, 7);

            let (y, xa) = on_pools(|| {
                let (mut y, mut xa) = (vec![f32::NAN; rows * outs], vec![f32::NAN; rows * ranks]);
                forward(&mut y, &mut xa, &x, residual, rows, inputs, &projections);
                (y, xa)
            });
            let (dx, factors, dw, dbias) = on_pools(|| {
                let mut dx = vec![f32::NAN; rows * inputs];
                let mut factors: Vec<_> = shapes
                    .iter()
                    .map(|s| (vec![f32::NAN; s.1 * inputs], vec![f32::NAN; s.1 * s.0]))
                    .collect();
                let mut dw: Vec<_> = shapes.iter().map(|s| vec![f32::NAN; s.0 * inputs]).collect();
                let mut dbias: Vec<_> = shapes.iter().map(|s| vec![f32::NAN; s.0]).collect();
                let mut gradients: Vec<_> = factors
                    .iter_mut()
                    .zip(&mut dw)
                    .zip(&mut dbias)
                    .map(|((factors, dw), dbias)| Gradients {
                        a: (!factors.0.is_empty()).then_some(&mut factors.0),
                        b: (!factors.1.is_empty()).then_some(&mut factors.1),
                        weight: Some(dw),
                        bias: Some(dbias),
                    })
                    .collect();
                let mut dyb = vec![f32::NAN; rows * ranks];
                input_gradient(Some(&mut dx), &mut dyb, &dy, rows, inputs, &projections);
                let sources = Sources { dy: &dy, x: &x, xa: &xa, dyb: &dyb };
                parameter_gradients(&mut gradients, &sources, rows, inputs, &projections);
                (dx, factors, dw, dbias)
            });

            let mut expected_dx = vec![0f64; rows * inputs];
            let (mut out_at, mut rank_at) = (0, 0);
            for (i, &(out, rank, bias)) in shapes.iter().enumerate() {
                let s = f64::from(0.5 + i as f32);
                let xs = |t: usize, k: usize| f64::from(x[t * inputs + k]);
                let w = |o: usize, k: usize| f64::from(weights[i][o * inputs + k]);
                let a = |r: usize, k: usize| f64::from(a[i][r * inputs + k]);
                let b = |o: usize, r: usize| f64::from(b[i][o * rank + r]);
                let dy = |t: usize, o: usize| f64::from(dy[t * outs + out_at + o]);
                let down = product(rows, rank, inputs, xs, |k, r| a(r, k));
                let base = product(rows, out, inputs, xs, |k, o| w(o, k));
                let low = product(rows, out, rank, |t, r| down[t * rank + r], |r, o| b(o, r));
                let expected: Vec<f64> = (0..rows * out)
                    .map(|e| {
                        let at = e / out * outs + out_at + e % out;
                        base[e]
                            + s * low[e]
                            + if bias { f64::from(biases[i][e % out]) } else { 0.0 }
                            + residual.map_or(0.0, |residual| f64::from(residual[at]))
                    })
                    .collect();
                let got: Vec<f32> = (0..rows * out).map(|e| y[e / out * outs + out_at + e % out]).collect();
                close(&got, &expected, "y");
                let got: Vec<f32> =
                    (0..rows * rank).map(|e| xa[e / rank * ranks + rank_at + e % rank]).collect();
                close(&got, &down, "xa");

                let up = product(rows, rank, out, dy, b);
                let through_w = product(rows, inputs, out, dy, w);
                let through_a = product(rows, inputs, rank, |t, r| up[t * rank + r], a);
                for (e, sum) in expected_dx.iter_mut().enumerate() {
                    *sum += through_w[e] + s * through_a[e];
                }
                let scaled = |v: Vec<f64>| v.into_iter().map(|v| s * v).collect::<Vec<_>>();
                close(&factors[i].0, &scaled(product(rank, inputs, rows, |r, t| up[t * rank + r], xs)), "dA");
                let db = product(out, rank, rows, |o, t| dy(t, o), |t, r| down[t * rank + r]);
                close(&factors[i].1, &scaled(db), "dB");
                close(&dw[i], &product(out, inputs, rows, |o, t| dy(t, o), xs), "dW");
                close(&dbias[i], &product(1, out, rows, |_, _| 1.0, dy), "dbias");
                (out_at, rank_at) = (out_at + out, rank_at + rank);
            }
            close(&dx, &expected_dx, "dx");
        }
    }

    #[test]
    fn only_what_is_asked_for() {
        let (x, w, a, b, dy) = (numbers(60, 1), numbers(24, 2), numbers(6, 3), numbers(8, 4), numbers(80, 5));
        let projection = Projection {
            weight: &w,
            out: 4,
            bias: None,
            low_rank: Some(LowRank { a: &a, b: &b, rank: 1, scale: 1.0, dropout: None }),
        };
        let projection =
            Projection { low_rank: projection.low_rank.map(|t| LowRank { b: &b[..4], ..t }), ..projection };
        let (x, dy) = (&x[..], &dy[..40]);
        let (mut y, mut xa) = (vec![0.0; 40], vec![0.0; 10]);
        forward(&mut y, &mut xa, x, None, 10, 6, &[projection]);
        let run = |dx: Option<&mut [f32]>| {
            let (mut da, mut db) = (vec![0.0; 6], vec![0.0; 4]);
            let mut gradients = [Gradients { a: Some(&mut da), b: Some(&mut db), ..Gradients::default() }];
            let mut dyb = vec![f32::NAN; 10];
            input_gradient(dx, &mut dyb, dy, 10, 6, &[projection]);
            let sources = Sources { dy, x, xa: &xa, dyb: &dyb };
            parameter_gradients(&mut gradients, &sources, 10, 6, &[projection]);
            (da, db)
        };
        let mut dx = vec![0.0; 60];
        assert_eq!(run(None), run(Some(&mut dx)));
        assert!(dx.iter().all(|v| *v != 0.0));
    }
}
