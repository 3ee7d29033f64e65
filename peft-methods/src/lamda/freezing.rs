//! When the columns of `B` stop training.
//!
//! Over the first `η·T` of `T` steps they freeze one after another, the largest singular direction first:
//! `f(t) = min(r, ⌊r·t/(η·T)⌋)` columns are frozen in step `t`, and all of them from `η·T` on.

/// The share of the run over which columns freeze, and by which rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Freezing {
    /// η, from 0 (`B` never trains) to 1 (it trains in part to the end).
    pub eta: f64,
    /// The rule of the authors' program, `⌊t/(η·T)⌋`, which lacks the rank.
    pub as_released: bool,
}

/// What the quotient may lack to a whole number by rounding.
const ROUNDING: f64 = 1e-9;

impl Freezing {
    /// How many of `rank` columns do not train in step `step`, counted from 0, of `total`.
    pub fn columns(self, rank: usize, step: u64, total: u64) -> usize {
        let end = self.eta * total as f64;
        let quotient = step as f64 / end;
        match self.as_released {
            true => ((quotient + ROUNDING) as usize).min(rank),
            false if step as f64 >= end => rank,
            false => ((rank as f64 * quotient + ROUNDING) as usize).min(rank),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(eta: f64, as_released: bool, rank: usize, total: u64, steps: &[u64]) -> Vec<usize> {
        steps.iter().map(|step| Freezing { eta, as_released }.columns(rank, *step, total)).collect()
    }

    #[test]
    fn columns_freeze_evenly_until_all_are_frozen() {
        let steps = [0, 9, 10, 100, 150, 299, 300, 999];
        assert_eq!(columns(0.3, false, 32, 1000, &steps), [0, 0, 1, 10, 16, 31, 32, 32]);
        // Every tenth step of the first hundred, though 0.1·1000 and r·t divide by rounded numbers.
        let tens: Vec<u64> = (0..=10).map(|i| 10 * i).collect();
        assert_eq!(columns(0.1, false, 10, 1000, &tens), (0..=10).collect::<Vec<_>>());
        // To the last step, and not at all.
        assert_eq!(columns(1.0, false, 4, 8, &[0, 1, 2, 7]), [0, 0, 1, 3]);
        assert_eq!(columns(0.0, false, 4, 8, &[0, 7]), [4, 4]);
    }

    #[test]
    fn released_rule_hardly_freezes_anything() {
        assert_eq!(columns(0.3, true, 32, 1000, &[0, 100, 150, 299, 300, 600, 999]), [0, 0, 0, 0, 1, 2, 3]);
        assert_eq!(columns(0.1, true, 4, 1000, &[500]), [4]);
    }
}
