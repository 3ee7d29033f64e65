//! The places `(r, c)` of a matrix in the order of the products `row[r]·column[c]`, one after another, without the matrix.
//!
//! With both lists sorted, the largest product that was not yet given lies next to one that was: a heap holds at most one
//! place a row.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// A place whose turn may be next.
struct Next {
    /// In f64, where the product of two f32 is exact.
    product: f64,
    /// `row·columns + column`.
    position: u32,
    /// Where row and column stand in their sorted lists.
    at: (usize, usize),
}

impl Ord for Next {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |next: &Self| Reverse(next.position);
        self.product.total_cmp(&other.product).then_with(|| key(self).cmp(&key(other)))
    }
}

impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Next {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Next {}

/// Positions `r·columns + c` by falling `row[r]·column[c]`, as long as that is more than nothing; among equal products the
/// lower position comes first. Both lists hold finite numbers, none below 0.
pub fn largest_products(row: &[f32], column: &[f32]) -> impl Iterator<Item = u32> {
    let (rows, columns) = (falling(row), falling(column));
    let width = column.len() as u32;
    let next = move |rows: &[(f32, u32)], columns: &[(f32, u32)], (r, c): (usize, usize)| {
        let ((row, at_row), (column, at_column)) = (rows.get(r)?, columns.get(c)?);
        let product = f64::from(*row) * f64::from(*column);
        (product > 0.0).then_some(Next { product, position: at_row * width + at_column, at: (r, c) })
    };
    let mut heap: BinaryHeap<Next> = next(&rows, &columns, (0, 0)).into_iter().collect();
    std::iter::from_fn(move || {
        let Next { position, at: (r, c), .. } = heap.pop()?;
        heap.extend(next(&rows, &columns, (r, c + 1)));
        if c == 0 {
            heap.extend(next(&rows, &columns, (r + 1, 0)));
        }
        Some(position)
    })
}

/// Values with their places, the largest first; among equal ones the lower place.
fn falling(values: &[f32]) -> Vec<(f32, u32)> {
    let mut sorted: Vec<(f32, u32)> = values.iter().copied().zip(0..).collect();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::random::Stream;

    #[test]
    fn agrees_with_sorting_all_products() {
        let mut stream = Stream::new(5, "test", "growth", &[]);
        for levels in [3.0, 1000.0] {
            let mut draw = |n: usize| -> Vec<f32> {
                (0..n).map(|_| (stream.uniform() * levels).floor() as f32 / 8.0).collect()
            };
            let (row, column) = (draw(37), draw(23));
            let product = |position: u32| {
                f64::from(row[position as usize / 23]) * f64::from(column[position as usize % 23])
            };
            let mut expected: Vec<u32> = (0..37 * 23).filter(|position| product(*position) > 0.0).collect();
            expected.sort_by(|a, b| product(*b).total_cmp(&product(*a)).then(a.cmp(b)));
            let found: Vec<u32> = largest_products(&row, &column).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn nothing_comes_of_nothing() {
        assert_eq!(largest_products(&[0.0, 0.0], &[1.0]).count(), 0);
        assert_eq!(largest_products(&[], &[1.0]).count(), 0);
    }
}
