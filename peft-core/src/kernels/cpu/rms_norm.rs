//! RMS norm of rows: `y = w ∘ x·ρ` with `ρ = 1/√(mean x² + ε)`;
//! `dx = ρ(g − x·ρ²·mean(g ∘ x))` with `g = dy ∘ w`, `dw = Σ dy ∘ x·ρ`.

use super::buffers;
use super::simd::{sum_by, vectorised};
use rayon::prelude::*;

/// Rows of a task.
const ROWS: usize = 32;

/// `y`, of `x` `[rows, width]` and `weight` `[width]`.
///
/// # Panics
/// When the lengths do not fit.
pub(crate) fn forward(y: &mut [f32], x: &[f32], weight: &[f32], epsilon: f32) {
    let width = weight.len();
    assert!(y.len() == x.len() && width > 0 && x.len().is_multiple_of(width));
    y.par_chunks_mut(ROWS * width)
        .zip(x.par_chunks(ROWS * width))
        .for_each(|(y, x)| forward_rows(y, x, weight, epsilon));
}

/// `dx`, plus `residual` where there is one, and `dweight` where asked for.
///
/// # Shapes
/// `dx`, `dy`, `x`, `residual` `[rows, width]`, `dweight` and `weight` `[width]`.
///
/// # Panics
/// When the lengths do not fit.
pub(crate) fn backward(
    dx: &mut [f32],
    dweight: Option<&mut [f32]>,
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    residual: Option<&[f32]>,
) {
    let width = weight.len();
    assert!(dx.len() == x.len() && dy.len() == x.len() && width > 0 && x.len().is_multiple_of(width));
    assert!(residual.is_none_or(|residual| residual.len() == x.len()));
    let size = ROWS * width;
    // One partial sum a task, added up in their order.
    let tasks = x.len().div_ceil(size);
    let mut partial = buffers::take(if dweight.is_some() { tasks * width } else { 0 });
    let mut parts: Vec<Option<&mut [f32]>> = match dweight {
        Some(_) => partial.chunks_exact_mut(width).map(Some).collect(),
        None => (0..tasks).map(|_| None).collect(),
    };
    dx.par_chunks_mut(size).zip(&mut parts).enumerate().for_each(|(task, (dx, dweight))| {
        let rows = task * size..task * size + dx.len();
        let residual = residual.map(|residual| &residual[rows.clone()]);
        backward_rows(dx, dweight.as_deref_mut(), &dy[rows.clone()], &x[rows], weight, epsilon, residual);
    });
    if let Some(dweight) = dweight {
        dweight.fill(0.0);
        for part in partial.chunks_exact(width) {
            dweight.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }
}

vectorised! {
    fn forward_rows(y: &mut [f32], x: &[f32], weight: &[f32], epsilon: f32) {
        let width = weight.len();
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let inverse = inverse_rms(x, epsilon);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = w * (x * inverse);
            }
        }
    }

    fn backward_rows(
        dx: &mut [f32],
        dweight: Option<&mut [f32]>,
        dy: &[f32],
        x: &[f32],
        weight: &[f32],
        epsilon: f32,
        residual: Option<&[f32]>,
    ) {
        let (width, mut dweight) = (weight.len(), dweight);
        if let Some(dweight) = &mut dweight {
            dweight.fill(0.0);
        }
        let rows = dx.chunks_exact_mut(width).zip(dy.chunks_exact(width)).zip(x.chunks_exact(width));
        for (row, ((dx, dy), x)) in rows.enumerate() {
            let inverse = inverse_rms(x, epsilon);
            for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(weight) {
                *dx = dy * w;
            }
            let mean = sum_by(dx, x, |g, x| g * x) / width as f32 * inverse * inverse;
            match residual {
                Some(residual) => {
                    let residual = &residual[row * width..][..width];
                    for ((dx, x), residual) in dx.iter_mut().zip(x).zip(residual) {
                        *dx = residual + inverse * (*dx - x * mean);
                    }
                }
                None => dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = inverse * (*dx - x * mean)),
            }
            if let Some(dweight) = &mut dweight {
                for ((dw, dy), x) in dweight.iter_mut().zip(dy).zip(x) {
                    *dw += dy * (x * inverse);
                }
            }
        }
    }
}

/// `1/√(mean x² + ε)`.
#[inline(always)]
pub(super) fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (sum_by(x, x, |a, b| a * b) / x.len() as f32 + epsilon).sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::{numbers, on_pools};
    use super::*;

    fn reference(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
        let width = weight.len();
        let row = |x: &[f64]| {
            let root = (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + epsilon).sqrt();
            x.iter().zip(weight).map(|(x, w)| x / root * w).collect::<Vec<_>>()
        };
        x.chunks_exact(width).flat_map(row).collect()
    }

    #[test]
    fn forward_and_gradients_against_differences() {
        for (rows, width) in [(1, 1), (3, 16), (70, 37), (33, 100)] {
            let (x, w) = (numbers(rows * width, 1), numbers(width, 2));
            let (dy, residual) = (numbers(rows * width, 3), numbers(rows * width, 4));
            let (y, dx, dw, plain) = on_pools(|| {
                let [mut y, mut dx, mut plain] = [(); 3].map(|()| vec![f32::NAN; rows * width]);
                let mut dw = vec![f32::NAN; width];
                forward(&mut y, &x, &w, 1e-2);
                backward(&mut dx, Some(&mut dw), &dy, &x, &w, 1e-2, Some(&residual));
                backward(&mut plain, None, &dy, &x, &w, 1e-2, None);
                (y, dx, dw, plain)
            });
            let exact = |v: &[f32]| v.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let (mut x, mut w, epsilon) = (exact(&x), exact(&w), f64::from(1e-2f32));
            for (y, expected) in y.iter().zip(reference(&x, &w, epsilon)) {
                assert!((f64::from(*y) - expected).abs() < 1e-6 * (1.0 + expected.abs()));
            }
            let loss = |x: &[f64], w: &[f64]| -> f64 {
                reference(x, w, epsilon).iter().zip(&dy).map(|(y, g)| y * f64::from(*g)).sum()
            };
            for e in (0..rows * width).step_by(1 + rows * width / 40) {
                let was = x[e];
                x[e] = was + 1e-6;
                let above = loss(&x, &w);
                x[e] = was - 1e-6;
                let expected = (above - loss(&x, &w)) / 2e-6;
                x[e] = was;
                assert!(
                    (f64::from(plain[e]) - expected).abs() < 1e-5 * (1.0 + expected.abs()),
                    "{rows}x{width} {e}"
                );
                let with = expected + f64::from(residual[e]);
                assert!((f64::from(dx[e]) - with).abs() < 1e-5 * (1.0 + with.abs()), "{rows}x{width} {e}");
            }
            for e in 0..width {
                let was = w[e];
                w[e] = was + 1e-3;
                let above = loss(&x, &w);
                w[e] = was - 1e-3;
                let expected = (above - loss(&x, &w)) / 2e-3;
                w[e] = was;
                assert!(
                    (f64::from(dw[e]) - expected).abs() < 1e-5 * (1.0 + expected.abs()),
                    "{rows}x{width} {e}"
                );
            }
        }
    }
}
