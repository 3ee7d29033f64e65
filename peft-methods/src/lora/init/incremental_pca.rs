//! Principal components of rows that come in batches (Ross et al., "Incremental Learning for Robust Visual Tracking",
//! 2008; scikit-learn's `IncrementalPCA` is the same).

use peft_core::linalg::{LinalgError, Matrix, Sketch, Svd, randomized_svd, top_svd};
use peft_core::random::Stream;

/// Up to this many rows or features a batch is decomposed exactly, above it by PEFT's randomised way: twice the
/// components, four power iterations.
const EXACT: usize = 1024;
const POWER_ITERATIONS: usize = 4;

/// The main directions of all rows so far, about their mean.
#[derive(Debug, Clone)]
pub struct IncrementalPca {
    count: usize,
    features: usize,
    rows: f64,
    mean: Vec<f64>,
    /// Sum of squared distances from the mean.
    scatter: f64,
    svd: Option<Svd>,
}

impl IncrementalPca {
    /// For `count` directions of rows with `features` entries.
    pub fn new(count: usize, features: usize) -> Self {
        Self { count, features, rows: 0.0, mean: vec![0.0; features], scatter: 0.0, svd: None }
    }

    /// Takes up the rows of `batch` `[rows, features]`: the components so far, scaled by their singular values, stand
    /// for the rows before, and one more row for the distance between the means.
    ///
    /// # Errors
    /// [`LinalgError::Rank`] if the first batch has fewer rows than there are components.
    pub fn update(&mut self, batch: &Matrix, stream: &mut Stream) -> Result<(), LinalgError> {
        let [rows, features] = batch.dims();
        if features != self.features {
            return Err(LinalgError::Shape { rows, columns: features, expected: "one of the same features" });
        }
        let new = rows as f64;
        let mean: Vec<f64> =
            (0..features).map(|j| (0..rows).map(|i| batch.get(i, j)).sum::<f64>() / new.max(1.0)).collect();
        let total = self.rows + new;
        let between = self.rows * new / total.max(1.0);
        let shift: Vec<f64> = self.mean.iter().zip(&mean).map(|(old, new)| old - new).collect();
        let within: f64 =
            (0..features).map(|j| (0..rows).map(|i| (batch.get(i, j) - mean[j]).powi(2)).sum::<f64>()).sum();
        self.scatter += within + between * shift.iter().map(|d| d * d).sum::<f64>();

        let before = self.svd.as_ref().map_or(0, |svd| svd.s.len());
        let extra = usize::from(self.svd.is_some());
        let stacked = Matrix::from_fn([before + rows + extra, features], |i, j| match &self.svd {
            Some(svd) if i < before => svd.s[i] * svd.v.get(j, i),
            Some(_) if i == before + rows => between.sqrt() * shift[j],
            _ => batch.get(i - before, j) - mean[j],
        });
        for (old, new_mean) in self.mean.iter_mut().zip(&mean) {
            *old = (self.rows * *old + new * new_mean) / total.max(1.0);
        }
        self.rows = total;
        let [height, _] = stacked.dims();
        self.svd = Some(if height.min(features) <= EXACT {
            top_svd(&stacked, self.count)?
        } else {
            let sketch =
                Sketch { rank: self.count, oversampling: self.count, power_iterations: POWER_ITERATIONS };
            randomized_svd(&stacked, sketch, stream)?
        });
        Ok(())
    }

    /// Directions in columns `[features, count]` and their singular values; none before the first batch.
    pub fn components(&self) -> Option<(&Matrix, &[f64])> {
        self.svd.as_ref().map(|svd| (&svd.v, svd.s.as_slice()))
    }

    /// The share of all variance that each direction explains.
    pub fn explained_variance_ratio(&self) -> Vec<f64> {
        let values = self.svd.as_ref().map_or(&[][..], |svd| &svd.s);
        values.iter().map(|s| if self.scatter > 0.0 { s * s / self.scatter } else { 0.0 }).collect()
    }
}
