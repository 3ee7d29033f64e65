//! Which positions leave and which come: where the value is smallest, and where the gradient is largest.

use super::growth::largest_products;
use peft_core::linalg::{NotFinite, magnitude};

/// What a selection phase has collected of a module's dense gradient, at the positions where it was largest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidates {
    /// Ascending.
    pub positions: Vec<u32>,
    /// Σg of each, over the micro-batches.
    pub sums: Vec<f32>,
    /// Σg² of each.
    pub squares: Vec<f32>,
    /// Micro-batches.
    pub samples: u64,
}

/// An exchange of positions, as many leaving as coming.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exchange {
    /// The module's entries that leave, by their place, ascending.
    pub leaving: Vec<usize>,
    /// What comes: with accumulated gradients the candidates' places, ascending by position; with moments the
    /// positions themselves, ascending.
    pub coming: Vec<usize>,
}

/// Places of the `k` values of smallest magnitude, the smallest first; among equal ones the lower place.
pub fn smallest(values: &[f32], k: usize) -> Vec<usize> {
    let mut keys: Vec<u64> =
        values.iter().enumerate().map(|(place, v)| u64::from(magnitude(*v)) << 32 | place as u64).collect();
    let k = k.min(keys.len());
    if k > 0 && k < keys.len() {
        keys.select_nth_unstable(k - 1);
    }
    keys.truncate(k);
    keys.sort_unstable();
    keys.into_iter().map(|key| (key & u64::from(u32::MAX)) as usize).collect()
}

/// By accumulated gradients: the `k` entries of smallest value for the candidates of largest |Σg|.
///
/// A position that leaves and comes at once stays as it is. A candidate whose gradients sum to nothing does not come, and
/// where fewer come than would leave, the rest stay.
///
/// # Errors
/// A sum that is not finite.
pub fn by_gradients(
    values: &[f32],
    positions: &[u32],
    candidates: &Candidates,
    k: usize,
) -> Result<Exchange, NotFinite> {
    if let Some(index) = candidates.sums.iter().position(|sum| !sum.is_finite()) {
        return Err(NotFinite { index });
    }
    let leaving = smallest(values, k);
    let mut leaves = vec![false; positions.len()];
    leaving.iter().for_each(|entry| leaves[*entry] = true);
    // Where each candidate is among the entries, if it is one: both ascend.
    let mut entries = positions.iter().enumerate().peekable();
    let entry_of: Vec<Option<usize>> = candidates
        .positions
        .iter()
        .map(|position| {
            while entries.next_if(|(_, entry)| *entry < position).is_some() {}
            entries.peek().filter(|(_, entry)| *entry == position).map(|(at, _)| *at)
        })
        .collect();
    // Candidates ascend by position, so that the lower place is the lower position.
    let order = |a: &(u32, usize), b: &(u32, usize)| b.0.cmp(&a.0).then(a.1.cmp(&b.1));
    let mut best: Vec<(u32, usize)> = candidates
        .sums
        .iter()
        .enumerate()
        .filter(|(place, sum)| **sum != 0.0 && entry_of[*place].is_none_or(|entry| leaves[entry]))
        .map(|(place, sum)| (magnitude(*sum), place))
        .collect();
    if !leaving.is_empty() && leaving.len() < best.len() {
        best.select_nth_unstable_by(leaving.len() - 1, order);
    }
    best.truncate(leaving.len());
    best.sort_unstable_by(order);
    // What leaves and comes at once stays.
    let (staying, coming): (Vec<usize>, Vec<usize>) =
        best.into_iter().map(|(_, place)| place).partition(|place| entry_of[*place].is_some());
    staying.iter().filter_map(|place| entry_of[*place]).for_each(|entry| leaves[entry] = false);
    let leaving = leaving.into_iter().filter(|entry| leaves[*entry]);
    Ok(paired(leaving, coming.into_iter()))
}

/// By moments: the `k` entries of smallest value for the positions `(r, c)` without an entry of largest
/// `row[r]·column[c]`, where that is more than nothing.
///
/// # Errors
/// A moment that is not finite, by its place among rows and then columns.
pub fn by_moments(
    values: &[f32],
    positions: &[u32],
    row: &[f32],
    column: &[f32],
    k: usize,
) -> Result<Exchange, NotFinite> {
    if let Some(index) = row.iter().chain(column).position(|moment| !moment.is_finite()) {
        return Err(NotFinite { index });
    }
    let leaving = smallest(values, k);
    let inactive = |position: &u32| positions.binary_search(position).is_err();
    let coming = largest_products(row, column).filter(inactive).take(leaving.len());
    Ok(paired(leaving.into_iter(), coming.map(|position| position as usize)))
}

/// As many of both as there are of the fewer, the first of each.
fn paired(leaving: impl Iterator<Item = usize>, coming: impl Iterator<Item = usize>) -> Exchange {
    let (mut leaving, mut coming): (Vec<usize>, Vec<usize>) = leaving.zip(coming).unzip();
    leaving.sort_unstable();
    coming.sort_unstable();
    Exchange { leaving, coming }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn candidates(pairs: &[(u32, f32)]) -> Candidates {
        Candidates {
            positions: pairs.iter().map(|pair| pair.0).collect(),
            sums: pairs.iter().map(|pair| pair.1).collect(),
            squares: vec![1.0; pairs.len()],
            samples: 1,
        }
    }

    #[test]
    fn the_smallest_leave_for_the_largest() {
        let (values, positions) = ([0.5, -0.1, 0.0, 2.0, 0.1], [2, 4, 6, 8, 10]);
        // 8 remains active and 1 is the weakest: 5 and 3 come for the entries at 6 and 4.
        let found = candidates(&[(1, 0.5), (3, 2.0), (5, -3.0), (8, 9.0)]);
        let exchange = by_gradients(&values, &positions, &found, 2).unwrap();
        assert_eq!(exchange, Exchange { leaving: vec![1, 2], coming: vec![1, 2] });
    }

    #[test]
    fn what_leaves_and_comes_stays() {
        let (values, positions) = ([0.5, -0.1, 0.0, 2.0], [2, 4, 6, 8]);
        // 4 and 6 leave, 6 and 7 come: 6 stays as it is.
        let found = candidates(&[(1, 0.5), (6, 2.0), (7, -3.0)]);
        let exchange = by_gradients(&values, &positions, &found, 2).unwrap();
        assert_eq!(exchange, Exchange { leaving: vec![1], coming: vec![2] });
        // The whole set at once: 8, whose value is largest, has no candidate to go for.
        let exchange = by_gradients(&values, &positions, &found, 4).unwrap();
        assert_eq!(exchange, Exchange { leaving: vec![0, 1], coming: vec![0, 2] });
    }

    #[test]
    fn fewer_candidates_keep_the_larger_entries() {
        let (values, positions) = ([3.0, 1.0, 2.0], [0, 1, 2]);
        let exchange = by_gradients(&values, &positions, &candidates(&[(7, 1.0), (9, 0.0)]), 3).unwrap();
        assert_eq!(exchange, Exchange { leaving: vec![1], coming: vec![0] });
        // Nothing comes where all gradients are nothing.
        let exchange = by_gradients(&values, &positions, &candidates(&[(7, 0.0)]), 3).unwrap();
        assert_eq!(exchange, Exchange::default());
    }

    #[test]
    fn ties_go_to_the_lower_position() {
        let (values, positions) = ([0.0, -0.0, 0.0, 0.0], [10, 11, 12, 13]);
        let found = candidates(&[(1, -2.0), (3, 2.0), (5, 2.0)]);
        let exchange = by_gradients(&values, &positions, &found, 2).unwrap();
        assert_eq!(exchange, Exchange { leaving: vec![0, 1], coming: vec![0, 1] });
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let found = candidates(&[(1, f32::NAN)]);
        assert_eq!(by_gradients(&[1.0], &[0], &found, 1), Err(NotFinite { index: 0 }));
        assert_eq!(by_moments(&[1.0], &[0], &[1.0], &[f32::INFINITY], 1), Err(NotFinite { index: 1 }));
    }

    #[test]
    fn moments_by_hand() {
        // Scores [[36, 9], [16, 4]]; (0, 0), (0, 1) and (1, 0) are active.
        let (values, row, column) = ([1.0, 2.0, 3.0], [9.0, 4.0], [4.0, 1.0]);
        let exchange = by_moments(&values, &[0, 1, 2], &row, &column, 2).unwrap();
        assert_eq!(exchange, Exchange { leaving: vec![0], coming: vec![3] });
        let exchange = by_moments(&values, &[0, 1, 2], &[9.0, 0.0], &column, 2).unwrap();
        assert_eq!(exchange, Exchange::default(), "a score of nothing does not come");
    }
}
