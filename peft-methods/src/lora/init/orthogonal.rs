//! Orthogonal initialisation (datta0.github.io/posts/rethink-lora-init): random factors that cancel.

use super::error::InitError;
use peft_core::adapter::InitialFactors;
use peft_core::linalg::{Matrix, qr};
use peft_core::random::Stream;

/// With `Q` a random orthogonal `[r, r]` matrix: `A` combines its even rows and `B` its odd ones, each with normal
/// numbers of deviation 1/10, so that both are full and `B·A = 0`.
///
/// # Errors
/// [`InitError::OddRank`].
pub fn orthogonal(
    path: &str,
    [rows, columns]: [usize; 2],
    rank: usize,
    stream: &mut Stream,
) -> Result<InitialFactors, InitError> {
    if !rank.is_multiple_of(2) {
        return Err(InitError::OddRank { module: path.to_string(), rank });
    }
    let wrong = InitError::decomposition(path, "orthogonal");
    let mut normal =
        |dims: [usize; 2], deviation: f64| Matrix::from_fn(dims, |_, _| deviation * stream.normal());
    // The columns of an orthogonal matrix serve as well as its rows.
    let q = qr(&normal([rank, rank], 1.0), rank).map_err(&wrong)?.q;
    let half = |first: usize| q.select_columns(&(first..rank).step_by(2).collect::<Vec<_>>());
    let a = half(0).times(&normal([rank / 2, columns], 0.1)).map_err(&wrong)?;
    let b = normal([rows, rank / 2], 0.1).times_transpose(&half(1)).map_err(&wrong)?;
    Ok(InitialFactors::beside(&a, &b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_product_is_zero_and_the_factors_are_not() {
        let mut stream = Stream::new(1, "init", "q", &[]);
        let factors = orthogonal("q", [30, 50], 8, &mut stream).unwrap();
        let a = Matrix::from_rows(&factors.a, [8, 50]).unwrap();
        let b = Matrix::from_rows(&factors.b, [30, 8]).unwrap();
        assert!(b.times(&a).unwrap().to_rows().iter().all(|value| value.abs() < 1e-8));
        // As PEFT's: each entry is a sum of r/2 products of deviation 1/10 with parts of unit vectors, 1/10 · √(1/2).
        let deviation =
            |values: &[f32]| (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        assert!((deviation(&factors.a) / 0.0707 - 1.0).abs() < 0.15, "{}", deviation(&factors.a));
        assert!((deviation(&factors.b) / 0.0707 - 1.0).abs() < 0.15, "{}", deviation(&factors.b));
        assert!(factors.base.is_none());
        let odd = orthogonal("q", [30, 50], 7, &mut stream).unwrap_err();
        assert_eq!(odd, InitError::OddRank { module: "q".to_string(), rank: 7 });
    }
}
