//! `silu(gate) ∘ up` of joint rows `[gate, up]`: with `σ = 1/(1 + e^−gate)`,
//! `out = gate·σ·up`, `dgate = dout·up·σ(1 + gate(1 − σ))`, `dup = dout·gate·σ`.

use super::simd::{exp, vectorised};
use rayon::prelude::*;

/// Rows of a task.
const ROWS: usize = 16;

/// `out` `[rows, width]` of `joint` `[rows, 2 width]`.
///
/// # Panics
/// When the lengths do not fit.
pub(crate) fn forward(out: &mut [f32], joint: &[f32], width: usize) {
    assert!(joint.len() == 2 * out.len() && width > 0 && out.len().is_multiple_of(width));
    out.par_chunks_mut(ROWS * width)
        .zip(joint.par_chunks(2 * ROWS * width))
        .for_each(|(out, joint)| forward_rows(out, joint, width));
}

/// The gradient of `joint` `[rows, 2 width]`, from `dout` `[rows, width]`. With `again`, what [`forward`] makes of `joint`
/// takes the place of `dout`, which else stays.
///
/// # Panics
/// When the lengths do not fit.
pub(crate) fn backward(djoint: &mut [f32], joint: &[f32], dout: &mut [f32], width: usize, again: bool) {
    assert!(djoint.len() == joint.len() && joint.len() == 2 * dout.len());
    assert!(width > 0 && dout.len().is_multiple_of(width));
    djoint
        .par_chunks_mut(2 * ROWS * width)
        .zip(joint.par_chunks(2 * ROWS * width).zip(dout.par_chunks_mut(ROWS * width)))
        .for_each(|(djoint, (joint, dout))| backward_rows(djoint, joint, dout, width, again));
}

vectorised! {
    fn forward_rows(out: &mut [f32], joint: &[f32], width: usize) {
        for (out, joint) in out.chunks_exact_mut(width).zip(joint.chunks_exact(2 * width)) {
            let (gate, up) = joint.split_at(width);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * sigmoid(*gate) * up;
            }
        }
    }

    fn backward_rows(djoint: &mut [f32], joint: &[f32], dout: &mut [f32], width: usize, again: bool) {
        match again {
            true => gradients::<true>(djoint, joint, dout, width),
            false => gradients::<false>(djoint, joint, dout, width),
        }
    }
}

#[inline(always)]
fn gradients<const AGAIN: bool>(djoint: &mut [f32], joint: &[f32], dout: &mut [f32], width: usize) {
    let rows = djoint.chunks_exact_mut(2 * width).zip(joint.chunks_exact(2 * width));
    for ((djoint, joint), dout) in rows.zip(dout.chunks_exact_mut(width)) {
        let ((gate, up), (dgate, dup)) = (joint.split_at(width), djoint.split_at_mut(width));
        for ((((dgate, dup), gate), up), dout) in dgate.iter_mut().zip(dup).zip(gate).zip(up).zip(dout) {
            let s = sigmoid(*gate);
            *dgate = *dout * up * (s * (1.0 + gate * (1.0 - s)));
            *dup = *dout * (gate * s);
            if AGAIN {
                *dout = gate * s * up;
            }
        }
    }
}

/// `1/(1 + e^−x)`; far below 0 a number too small to matter instead of 0.
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let negated = -x;
    1.0 / (1.0 + exp(if negated > 87.0 { 87.0 } else { negated }))
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::{numbers, on_pools};
    use super::*;

    #[test]
    fn forward_and_gradient_against_differences() {
        for (rows, width) in [(1, 1), (40, 19), (17, 64)] {
            let joint: Vec<f32> = numbers(2 * rows * width, 1).iter().map(|v| 6.0 * v).collect();
            let dout = numbers(rows * width, 2);
            let (out, djoint) = on_pools(|| {
                let (mut out, mut djoint) = (vec![f32::NAN; rows * width], vec![f32::NAN; 2 * rows * width]);
                forward(&mut out, &joint, width);
                let mut given = dout.clone();
                backward(&mut djoint, &joint, &mut given, width, false);
                assert_eq!(given, dout);
                let mut gradient = vec![f32::NAN; 2 * rows * width];
                backward(&mut gradient, &joint, &mut given, width, true);
                assert_eq!((&given, &gradient), (&out, &djoint));
                (out, djoint)
            });
            let value = |gate: f64, up: f64| gate / (1.0 + (-gate).exp()) * up;
            for e in 0..rows * width {
                let at = e / width * 2 * width + e % width;
                let (gate, up, g) = (f64::from(joint[at]), f64::from(joint[at + width]), f64::from(dout[e]));
                let close = |got: f32, expected: f64| {
                    assert!(
                        (f64::from(got) - expected).abs() < 2e-6 * (1.0 + expected.abs()),
                        "{got} {expected}"
                    );
                };
                close(out[e], value(gate, up));
                close(djoint[at], g * (value(gate + 1e-5, up) - value(gate - 1e-5, up)) / 2e-5);
                close(djoint[at + width], g * (value(gate, up + 1e-5) - value(gate, up - 1e-5)) / 2e-5);
            }
        }
    }

    #[test]
    fn far_gates_stay_finite() {
        let joint = [-1e4, 1e4, -90.0, 1.0, 1.0, 1.0];
        let (mut out, mut djoint) = ([0.0; 3], [0.0; 6]);
        forward(&mut out, &joint, 3);
        backward(&mut djoint, &joint, &mut [1.0; 3], 3, false);
        assert_eq!(out[1], 1e4);
        assert!(out[0].abs() < 1e-30 && out[2].abs() < 1e-30 && djoint[0].abs() < 1e-30);
        assert_eq!(djoint[1], 1.0);
    }
}
