//! LaMDA++: ranks from the spectra of the weights. The abstract of arXiv 2406.12832 names "a normalised spectrum analysis" and
//! no formula; this is a reading of it.
//!
//! A module's score is the share of its weight's energy that the mean rank captures, `E(r̄) = Σ_{i≤r̄} σᵢ² / Σᵢ σᵢ²`, which
//! no scaling of the weight changes. The modules, in the order of their scores, fall into five groups of like size, and
//! the groups get ½, ¾, 1, 1¼ and 1½ times the mean rank.

use serde::{Deserialize, Serialize};

/// Ranks by group, in quarters of the mean rank.
const QUARTERS: [usize; 5] = [6, 5, 4, 3, 2];
/// From this mean rank on, ranks are even.
const EVEN_FROM: usize = 8;

/// Which modules get more than the mean rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MoreRankFor {
    /// Those whose energy is spread over many directions.
    #[default]
    Flat,
    /// Those whose energy lies in few.
    Peaked,
}

/// `rank_allocation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RankAllocation {
    /// `flat` or `peaked`.
    pub more_rank_for: MoreRankFor,
    /// The most values that train at the start, `Σ r² + out·r`; none but that of the mean rank without it.
    pub max_parameters: Option<u64>,
}

/// A module that asks for a rank.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Module {
    /// `[out, in]`.
    pub dims: [usize; 2],
    /// `E(r̄)`.
    pub score: f64,
}

impl Module {
    /// Values that train at the start.
    fn parameters(&self, rank: usize) -> u64 {
        (rank * (rank + self.dims[0])) as u64
    }
}

impl RankAllocation {
    /// The ranks of the modules, in their order; 0 leaves a module alone. Their mean is at most `mean`.
    pub(super) fn ranks(&self, modules: &[Module], mean: usize) -> Vec<usize> {
        let step = if mean >= EVEN_FROM { 2 } else { 1 };
        let rank_of = |quarters: usize| (quarters * mean + 2 * step) / (4 * step) * step;
        let mut order: Vec<usize> = (0..modules.len()).collect();
        order.sort_by(|a, b| modules[*a].score.total_cmp(&modules[*b].score));
        if self.more_rank_for == MoreRankFor::Peaked {
            order.reverse();
        }
        let mut ranks = vec![0; modules.len()];
        for (place, module) in order.iter().enumerate() {
            let group = place * QUARTERS.len() / modules.len();
            let [rows, columns] = modules[*module].dims;
            ranks[*module] = rank_of(QUARTERS[group]).min(rows).min(columns);
        }

        // Too much together: a step down for one module after another, beginning where a rank is needed least.
        let fits = |ranks: &[usize]| {
            let parameters = modules.iter().zip(ranks).map(|(module, rank)| module.parameters(*rank));
            ranks.iter().sum::<usize>() <= mean * modules.len()
                && self.max_parameters.is_none_or(|most| parameters.sum::<u64>() <= most)
        };
        for module in order.iter().rev().cycle() {
            if fits(&ranks) {
                break;
            }
            ranks[*module] = ranks[*module].saturating_sub(step);
        }
        ranks
    }
}

/// `E(rank)` of singular values, descending, and the sum of the squares of all there are.
pub(super) fn captured_energy(values: &[f64], rank: usize, total: f64) -> f64 {
    values[..rank.min(values.len())].iter().map(|s| s * s).sum::<f64>() / total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(dims: [usize; 2], score: f64) -> Module {
        Module { dims, score }
    }

    fn allocation(more_rank_for: MoreRankFor) -> RankAllocation {
        RankAllocation { more_rank_for, max_parameters: None }
    }

    /// diag(1, 1, 1, 1) beside diag(1, 0.1, 0.1, 0.1), with a mean rank of 1.
    #[test]
    fn flat_spectrum_gets_the_rank() {
        let energy = |values: &[f64]| captured_energy(values, 1, values.iter().map(|s| s * s).sum());
        let (flat, peaked) = (energy(&[1.0; 4]), energy(&[1.0, 0.1, 0.1, 0.1]));
        assert_eq!(flat, 0.25);
        assert!((peaked - 1.0 / 1.03).abs() < 1e-12);
        // Multiplying the weight changes nothing.
        assert!((energy(&[7.0, 0.7, 0.7, 0.7]) - peaked).abs() < 1e-12);
        let modules = [module([4, 4], flat), module([4, 4], peaked)];
        assert_eq!(allocation(MoreRankFor::Flat).ranks(&modules, 1), [2, 0]);
        assert_eq!(allocation(MoreRankFor::Peaked).ranks(&modules, 1), [0, 2]);
    }

    #[test]
    fn groups_of_five_get_half_to_one_and_a_half() {
        let scores = [0.5, 0.1, 0.9, 0.3, 0.7];
        let modules = scores.map(|score| module([64, 64], score));
        assert_eq!(allocation(MoreRankFor::Flat).ranks(&modules, 16), [16, 24, 8, 20, 12]);
        assert_eq!(allocation(MoreRankFor::Peaked).ranks(&modules, 16), [16, 8, 24, 12, 20]);
        // No more than a weight has.
        let small = scores.map(|score| module([64, 20], score));
        assert_eq!(allocation(MoreRankFor::Flat).ranks(&small, 16), [16, 20, 8, 20, 12]);
    }

    #[test]
    fn budgets_hold() {
        for count in [1, 2, 3, 6, 7, 12, 21] {
            let modules: Vec<Module> =
                (0..count).map(|i| module([48 + i, 64], (i * 7 % 11) as f64 / 11.0)).collect();
            for mean in [1, 2, 3, 5, 8, 16] {
                for more_rank_for in [MoreRankFor::Flat, MoreRankFor::Peaked] {
                    let ranks = allocation(more_rank_for).ranks(&modules, mean);
                    assert!(ranks.iter().sum::<usize>() <= mean * count, "{count} {mean} {ranks:?}");
                    let most = modules.iter().map(|module| module.parameters(mean)).sum::<u64>() / 2;
                    let bounded = RankAllocation { more_rank_for, max_parameters: Some(most) };
                    let ranks = bounded.ranks(&modules, mean);
                    let parameters: u64 = modules.iter().zip(&ranks).map(|(m, r)| m.parameters(*r)).sum();
                    assert!(parameters <= most, "{count} {mean} {ranks:?}");
                }
            }
        }
        assert!(allocation(MoreRankFor::Flat).ranks(&[], 8).is_empty());
        let none = RankAllocation { max_parameters: Some(0), ..RankAllocation::default() };
        assert_eq!(none.ranks(&[module([8, 8], 0.5)], 4), [0]);
    }
}
