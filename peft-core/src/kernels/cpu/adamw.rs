//! AdamW over many tensors in one call, as PyTorch computes it (Loshchilov and Hutter, arXiv 1711.05101):
//!
//! ```text
//! m ← β₁m + (1−β₁)g        v ← β₂v + (1−β₂)g²
//! θ ← (1 − ηλ)θ − η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
//! ```

use super::simd::vectorised;
use rayon::prelude::*;

/// Numbers of a task.
const CHUNK: usize = 1 << 14;

/// AdamW's constants and the time.
#[derive(Clone, Copy)]
pub(crate) struct AdamW {
    /// β₁.
    pub(crate) beta_1: f64,
    /// β₂.
    pub(crate) beta_2: f64,
    /// ε.
    pub(crate) epsilon: f64,
    /// λ.
    pub(crate) weight_decay: f64,
    /// t, this update included.
    pub(crate) time: i32,
}

/// A parameter and what belongs to it, all of one length.
pub(crate) struct Parameter<'a> {
    /// θ.
    pub(crate) value: &'a mut [f32],
    /// g.
    pub(crate) gradient: &'a [f32],
    /// m.
    pub(crate) moment_1: &'a mut [f32],
    /// v.
    pub(crate) moment_2: &'a mut [f32],
    /// η.
    pub(crate) learning_rate: f64,
}

/// Factors of one update, from f64.
#[derive(Clone, Copy)]
struct Factors {
    beta_1: f32,
    rest_1: f32,
    beta_2: f32,
    rest_2: f32,
    epsilon: f32,
    /// 1/√(1−β₂ᵗ).
    correction_2: f32,
    /// η/(1−β₁ᵗ).
    step: f32,
    /// 1 − ηλ.
    decay: f32,
}

/// Updates every parameter; gradients are multiplied by `gradient_scale` (clipping) as they are read.
///
/// # Panics
/// When a parameter's slices differ in length.
pub(crate) fn adamw(constants: AdamW, gradient_scale: f32, parameters: &mut [Parameter]) {
    let AdamW { beta_1, beta_2, epsilon, weight_decay, time } = constants;
    let mut chunks = Vec::new();
    for p in parameters {
        let len = p.value.len();
        assert!(p.gradient.len() == len && p.moment_1.len() == len && p.moment_2.len() == len);
        let factors = Factors {
            beta_1: beta_1 as f32,
            rest_1: (1.0 - beta_1) as f32,
            beta_2: beta_2 as f32,
            rest_2: (1.0 - beta_2) as f32,
            epsilon: epsilon as f32,
            correction_2: (1.0 / (1.0 - beta_2.powi(time)).sqrt()) as f32,
            step: (p.learning_rate / (1.0 - beta_1.powi(time))) as f32,
            decay: (1.0 - p.learning_rate * weight_decay) as f32,
        };
        let values = p.value.chunks_mut(CHUNK).zip(p.gradient.chunks(CHUNK));
        let moments = p.moment_1.chunks_mut(CHUNK).zip(p.moment_2.chunks_mut(CHUNK));
        chunks.extend(values.zip(moments).map(|parts| (factors, parts)));
    }
    chunks.into_par_iter().for_each(|(factors, ((value, gradient), (moment_1, moment_2)))| {
        update(value, gradient, moment_1, moment_2, factors, gradient_scale);
    });
}

/// Σ x² over all slices, in f64.
pub(crate) fn sum_of_squares(slices: &[&[f32]]) -> f64 {
    let chunks: Vec<&[f32]> = slices.iter().flat_map(|slice| slice.chunks(CHUNK)).collect();
    let sums: Vec<f64> = chunks.into_par_iter().map(squares).collect();
    sums.iter().sum()
}

vectorised! {
    fn update(value: &mut [f32], gradient: &[f32], moment_1: &mut [f32], moment_2: &mut [f32], f: Factors, scale: f32) {
        let moments = moment_1.iter_mut().zip(moment_2);
        for ((value, g), (m, v)) in value.iter_mut().zip(gradient).zip(moments) {
            let g = g * scale;
            *m = f.beta_1 * *m + f.rest_1 * g;
            *v = f.beta_2 * *v + f.rest_2 * (g * g);
            *value = *value * f.decay - f.step * *m / (v.sqrt() * f.correction_2 + f.epsilon);
        }
    }

    fn squares(x: &[f32]) -> f64 {
        let mut lanes = [0f64; 8];
        let (chunks, rest) = x.as_chunks::<8>();
        for chunk in chunks {
            for i in 0..8 {
                lanes[i] += f64::from(chunk[i]) * f64::from(chunk[i]);
            }
        }
        lanes.iter().sum::<f64>() + rest.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::{numbers, on_pools};
    use super::*;

    /// Two steps worked out by hand with β₁ = 0.5, β₂ = 0.75, ε = 0, λ = 0.1, η = 0.1 on θ = 1, g = 2 then −1.
    #[test]
    fn two_steps_by_hand() {
        let (mut value, mut m, mut v) = ([1.0], [0.0], [0.0]);
        let mut step = |time, gradient: f32| {
            let constants = AdamW { beta_1: 0.5, beta_2: 0.75, epsilon: 0.0, weight_decay: 0.1, time };
            let parameter = Parameter {
                value: &mut value,
                gradient: &[gradient],
                moment_1: &mut m,
                moment_2: &mut v,
                learning_rate: 0.1,
            };
            adamw(constants, 0.5, &mut [parameter]);
            value[0]
        };
        // m = 1, m̂ = 2; v = 1, v̂ = 4: the update is η·2/2, and the decay takes 0.01.
        assert!((step(1, 4.0) - 0.89).abs() < 1e-6);
        // m = 0, so only the decay acts: 0.89·0.99.
        assert!((step(2, -2.0) - 0.8811).abs() < 1e-6);
    }

    #[test]
    fn many_tensors_over_many_steps() {
        let lengths = [1, 17, 40_000];
        let constants = AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.01, time: 0 };
        let rate = |i: usize| 1e-2 * (i + 1) as f64;
        let gradient = |i: usize, time: i32| numbers(lengths[i], 10 * time as u64 + i as u64);
        let values = on_pools(|| {
            let mut state: Vec<[Vec<f32>; 3]> =
                lengths.iter().map(|len| [numbers(*len, 3), vec![0.0; *len], vec![0.0; *len]]).collect();
            for time in 1..=3 {
                let gradients: Vec<_> = (0..3).map(|i| gradient(i, time)).collect();
                let mut parameters: Vec<_> = state
                    .iter_mut()
                    .zip(&gradients)
                    .enumerate()
                    .map(|(i, ([value, m, v], gradient))| Parameter {
                        value,
                        gradient,
                        moment_1: m,
                        moment_2: v,
                        learning_rate: rate(i),
                    })
                    .collect();
                adamw(AdamW { time, ..constants }, 1.0, &mut parameters);
            }
            state.into_iter().map(|[value, ..]| value).collect::<Vec<_>>()
        });
        for (i, value) in values.iter().enumerate() {
            let start = numbers(lengths[i], 3);
            let gradients: Vec<_> = (1..=3).map(|time| gradient(i, time)).collect();
            for e in (0..lengths[i]).step_by(1 + lengths[i] / 50) {
                let (mut theta, mut m, mut v) = (f64::from(start[e]), 0.0, 0.0);
                for (t, gradient) in gradients.iter().enumerate() {
                    let (g, t) = (f64::from(gradient[e]), t as i32 + 1);
                    m = 0.9 * m + 0.1 * g;
                    v = 0.999 * v + 0.001 * g * g;
                    let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
                    theta = theta * (1.0 - rate(i) * 0.01) - rate(i) * m_hat / (v_hat.sqrt() + 1e-8);
                }
                assert!((f64::from(value[e]) - theta).abs() < 1e-5, "{i} {e}: {} {theta}", value[e]);
            }
        }
    }

    #[test]
    fn squares_of_all() {
        let (a, b) = (numbers(50_001, 1), numbers(3, 2));
        let got = on_pools(|| sum_of_squares(&[&a, &[], &b]));
        let expected: f64 = a.iter().chain(&b).map(|v| f64::from(*v).powi(2)).sum();
        assert!((got - expected).abs() < 1e-9 * expected);
    }
}
