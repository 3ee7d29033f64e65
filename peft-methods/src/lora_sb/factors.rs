//! First values of the three factors of `s·B·R·A`.

use super::error::CoreInitError;
use peft_core::linalg::{Matrix, Sketch, Svd, randomized_svd};
use peft_core::random::Stream;

/// Deviation of LoRA-XS's first `R`: small enough to start at the base, not so small that gradients vanish.
const XS_DEVIATION: f64 = 1e-5;

/// A singular value below this part of the largest one is zero to f32's rounding.
const NUMERICAL_ZERO: f64 = 1e-6;

/// `B`, `R` and `A` of a change `s·B·R·A`.
#[derive(Debug, Clone)]
pub struct CoreFactors {
    /// `A`, `[r, in]`.
    pub a: Matrix,
    /// `B`, `[out, r]`.
    pub b: Matrix,
    /// `R`, `[r, r]`.
    pub core: Matrix,
    /// Singular values above zero among the `r`: where there are fewer, the rest of the factors is arbitrary.
    pub numerical_rank: usize,
}

/// LoRA-XS (section 3 of arXiv 2405.17604): `A = Σ_r·V_rᵀ` and `B = U_r` of the weight `[out, in]`, `R` normal with deviation
/// 10⁻⁵.
///
/// The factors are drawn from `sketch_stream`, `R` from `core_stream`.
///
/// # Errors
/// [`CoreInitError::Decomposition`] if the rank is above the weight's dimensions.
pub fn lora_xs(
    path: &str,
    weight: &Matrix,
    sketch: Sketch,
    sketch_stream: &mut Stream,
    core_stream: &mut Stream,
) -> Result<CoreFactors, CoreInitError> {
    let svd = decomposed(path, weight, sketch, sketch_stream)?;
    let numerical_rank = numerical_rank(&svd);
    let a = svd.v.scale_columns(&svd.s).transpose();
    let core = Matrix::from_fn([sketch.rank; 2], |_, _| XS_DEVIATION * core_stream.normal());
    Ok(CoreFactors { a, b: svd.u, core, numerical_rank })
}

/// LoRA-SB (algorithm 1 of arXiv 2411.19557): `U_r·S_r·V_rᵀ` is the best approximation of rank `r` of the first step of full
/// fine-tuning, `ΔW = −η·sign(G)` with `G` `[out, in]` the gradient; `B = U_r`, `R = S_r/s`, `A = V_rᵀ`.
///
/// # Errors
/// [`CoreInitError::Decomposition`] if the rank is above the weight's dimensions.
pub fn lora_sb(
    path: &str,
    gradient: &Matrix,
    eta: f64,
    scale: f64,
    sketch: Sketch,
    stream: &mut Stream,
) -> Result<CoreFactors, CoreInitError> {
    let step = first_step(gradient, eta);
    let svd = decomposed(path, &step, sketch, stream)?;
    let numerical_rank = numerical_rank(&svd);
    let core = Matrix::from_fn([sketch.rank; 2], |i, j| if i == j { svd.s[i] / scale } else { 0.0 });
    Ok(CoreFactors { a: svd.v.transpose(), b: svd.u, core, numerical_rank })
}

/// `−η·sign(G)`, AdamW's first step without weight decay; the sign of 0 is 0.
pub fn first_step(gradient: &Matrix, eta: f64) -> Matrix {
    Matrix::from_fn(gradient.dims(), |i, j| match gradient.get(i, j) {
        0.0 => 0.0,
        value => -eta * value.signum(),
    })
}

fn decomposed(
    path: &str,
    matrix: &Matrix,
    sketch: Sketch,
    stream: &mut Stream,
) -> Result<Svd, CoreInitError> {
    randomized_svd(matrix, sketch, stream)
        .map_err(|source| CoreInitError::Decomposition { module: path.to_string(), source })
}

fn numerical_rank(svd: &Svd) -> usize {
    let zero = NUMERICAL_ZERO * svd.s.first().copied().unwrap_or(0.0);
    svd.s.iter().filter(|s| **s > zero).count()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::linalg::svd;

    fn sketch(rank: usize) -> Sketch {
        Sketch { rank, oversampling: 8, power_iterations: 10 }
    }

    fn stream(purpose: &str) -> Stream {
        Stream::new(7, purpose, "q", &[])
    }

    fn random(dims: [usize; 2], seed: u64) -> Matrix {
        let mut stream = Stream::new(seed, "test", "", &[]);
        Matrix::from_fn(dims, |_, _| stream.normal())
    }

    fn entries(matrix: &Matrix) -> impl Iterator<Item = f64> {
        let [rows, columns] = matrix.dims();
        (0..rows * columns).map(move |i| matrix.get(i / columns, i % columns))
    }

    fn largest(matrix: &Matrix) -> f64 {
        entries(matrix).fold(0.0, |max, value| max.max(value.abs()))
    }

    fn norm(matrix: &Matrix) -> f64 {
        entries(matrix).map(|value| value * value).sum::<f64>().sqrt()
    }

    /// `s·B·R·A` of factors rounded to f32, as they are kept.
    fn change(factors: &CoreFactors, scale: f64) -> Matrix {
        let kept = |m: &Matrix| Matrix::from_rows(&m.to_rows(), m.dims()).unwrap();
        let (a, b, core) = (kept(&factors.a), kept(&factors.b), kept(&factors.core));
        let change = b.times(&core).unwrap().times(&a).unwrap();
        let columns = change.dims()[1];
        change.scale_columns(&vec![scale; columns])
    }

    /// The largest entry of `QᵀQ − 1` once rounded to f32.
    fn orthonormality(q: &Matrix) -> f64 {
        let q = Matrix::from_rows(&q.to_rows(), q.dims()).unwrap();
        let gram = q.transpose_times(&q).unwrap();
        largest(&Matrix::from_fn(gram.dims(), |i, j| gram.get(i, j) - if i == j { 1.0 } else { 0.0 }))
    }

    #[test]
    fn a_gradient_of_ones_gives_one_direction() {
        // −η·1·1ᵀ of 4 × 9 has the singular value η·√36.
        let ones = Matrix::from_fn([4, 9], |_, _| 1.0);
        for scale in [1.0, 0.25] {
            let factors = lora_sb("q", &ones, 1e-3, scale, sketch(1), &mut stream("svd")).unwrap();
            assert!((factors.core.get(0, 0) * scale - 0.006).abs() < 1e-12);
            assert!(entries(&change(&factors, scale)).all(|value| (value + 1e-3).abs() < 1e-9));
        }
        // Where the gradient has fewer directions than the rank, the rest is orthonormal all the same.
        let factors = lora_sb("q", &ones, 1e-3, 1.0, sketch(3), &mut stream("svd")).unwrap();
        assert_eq!(factors.numerical_rank, 1);
        assert!(factors.core.get(1, 1).abs() < 1e-12 && orthonormality(&factors.b) < 1e-5);
    }

    #[test]
    fn two_by_two_by_hand() {
        // sign [[1, −2], [3, 4]] = [[1, −1], [1, 1]], whose columns are orthogonal and √2 long.
        let gradient = Matrix::from_rows(&[1., -2., 3., 4.], [2, 2]).unwrap();
        let factors = lora_sb("q", &gradient, 0.1, 1.0, sketch(2), &mut stream("svd")).unwrap();
        assert!((0..2).all(|i| (factors.core.get(i, i) - 0.1 * 2f64.sqrt()).abs() < 1e-12));
        let expected = Matrix::from_rows(&[-0.1, 0.1, -0.1, -0.1], [2, 2]).unwrap();
        assert!(largest(&change(&factors, 1.0).minus(1.0, &expected).unwrap()) < 1e-7);
    }

    #[test]
    fn the_sign_of_zero_is_zero() {
        let gradient = Matrix::from_rows(&[0., -0., 2., -3.], [2, 2]).unwrap();
        assert_eq!(first_step(&gradient, 0.5).to_rows(), [0., 0., -0.5, 0.5]);
    }

    #[test]
    fn factors_are_orthonormal_and_their_product_is_the_truncation() {
        // The second pair is larger than the sketch, whose truncation is then the best one up to little.
        for (dims, tolerance) in [([14, 40], 1e-5), ([40, 14], 1e-5), ([40, 64], 2e-2), ([64, 40], 2e-2)] {
            let gradient = random(dims, 1);
            let factors = lora_sb("q", &gradient, 2e-3, 0.5, sketch(6), &mut stream("svd")).unwrap();
            assert!(orthonormality(&factors.b) < 1e-5 && orthonormality(&factors.a.transpose()) < 1e-5);
            assert_eq!(factors.numerical_rank, 6);
            let full = svd(&first_step(&gradient, 2e-3)).unwrap();
            let top = full.u.columns(0..6).scale_columns(&full.s[..6]);
            let truncated = top.times_transpose(&full.v.columns(0..6)).unwrap();
            let difference = norm(&change(&factors, 0.5).minus(1.0, &truncated).unwrap());
            assert!(difference < tolerance * norm(&truncated), "{dims:?}: {difference}");
        }
    }

    #[test]
    fn lora_xs_holds_the_weights_own_directions() {
        let weight = random([30, 12], 2);
        let factors = lora_xs("q", &weight, sketch(4), &mut stream("svd"), &mut stream("core")).unwrap();
        let full = svd(&weight).unwrap();
        assert!(orthonormality(&factors.b) < 1e-5);
        // The rows of A are as long as the singular values, and B·A is the truncated weight.
        let gram = factors.a.times_transpose(&factors.a).unwrap();
        assert!((0..4).all(|i| (gram.get(i, i).sqrt() - full.s[i]).abs() < 1e-6 * full.s[i]));
        let truncated = full.u.columns(0..4).scale_columns(&full.s[..4]);
        let truncated = truncated.times_transpose(&full.v.columns(0..4)).unwrap();
        let product = factors.b.times(&factors.a).unwrap();
        assert!(largest(&product.minus(1.0, &truncated).unwrap()) < 1e-6);
        let deviation = norm(&factors.core) / 4.0;
        assert!((deviation / XS_DEVIATION - 1.0).abs() < 0.5, "{deviation}");
        let again = lora_xs("q", &weight, sketch(4), &mut stream("svd"), &mut stream("core")).unwrap();
        assert_eq!((again.a.to_rows(), again.core.to_rows()), (factors.a.to_rows(), factors.core.to_rows()));
    }

    #[test]
    fn the_cores_gradient_is_the_step_nearest_to_the_weights() {
        // For orthonormal factors and s = 1, ‖G − B·X·A‖ is least at X = BᵀGAᵀ.
        let gradient = random([24, 16], 3);
        let factors = lora_sb("q", &random([24, 16], 4), 1.0, 1.0, sketch(5), &mut stream("svd")).unwrap();
        let (a, b) = (&factors.a, &factors.b);
        let of_core = b.transpose_times(&gradient).unwrap().times_transpose(a).unwrap();
        let rest = |x: &Matrix| gradient.clone().minus(1.0, &b.times(x).unwrap().times(a).unwrap()).unwrap();
        let projected = b.transpose_times(&rest(&of_core)).unwrap().times_transpose(a).unwrap();
        assert!(largest(&projected) < 1e-12);
        let least = norm(&rest(&of_core));
        for seed in 0..10 {
            let other = of_core.clone().minus(1e-2, &random([5, 5], 10 + seed)).unwrap();
            assert!(norm(&rest(&other)) > least);
        }
    }

    #[test]
    fn too_high_a_rank_is_refused() {
        let refused = lora_sb("q", &random([4, 6], 1), 1e-3, 1.0, sketch(5), &mut stream("svd")).unwrap_err();
        assert!(refused.to_string().contains("rank 5 is above 4"), "{refused}");
    }
}
