//! The largest entries of a vector by magnitude, exactly and the same way every time.
//!
//! Magnitudes of finite floats order as the whole numbers that their bits spell. So the k-th largest is found digit by
//! digit: a count of the upper halves of all words, then one of the lower halves that share the threshold's upper half.
//! Three passes, and no copy of the vector.

use rayon::prelude::*;

/// Entries of a task.
const CHUNK: usize = 1 << 16;

/// An entry that is no finite number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("entry {index} is not a finite number")]
pub struct NotFinite {
    /// Its place.
    pub index: usize,
}

/// Places of the `k` entries of largest magnitude (all of them where there are fewer), ascending. Among equal magnitudes
/// the lower place wins.
///
/// # Errors
/// An entry that is not finite: it has no place in the order.
pub fn top_k(values: &[f32], k: usize) -> Result<Vec<usize>, NotFinite> {
    if let Some(index) = values.par_iter().position_first(|value| !value.is_finite()) {
        return Err(NotFinite { index });
    }
    if k >= values.len() {
        return Ok((0..values.len()).collect());
    }
    if k == 0 {
        return Ok(Vec::new());
    }
    let (upper, above) = threshold(&histogram(values, |bits| Some(bits >> 16)), k);
    let (lower, above_lower) =
        threshold(&histogram(values, |bits| (bits >> 16 == upper).then_some(bits & 0xffff)), k - above);
    let threshold = upper << 16 | lower;
    // Of those equal to the threshold, only the first.
    let mut equal = k - above - above_lower;
    let mut places = Vec::with_capacity(k);
    for (place, value) in values.iter().enumerate() {
        let bits = magnitude(*value);
        if bits > threshold {
            places.push(place);
        } else if bits == threshold && equal > 0 {
            equal -= 1;
            places.push(place);
        }
    }
    Ok(places)
}

/// The bits of `|value|`: ordered as the magnitudes are.
pub fn magnitude(value: f32) -> u32 {
    value.abs().to_bits()
}

/// How many magnitudes have each 16-bit digit.
fn histogram(values: &[f32], digit: impl Fn(u32) -> Option<u32> + Sync) -> Vec<usize> {
    let empty = || vec![0usize; 1 << 16];
    let counts = values.par_chunks(CHUNK).fold(empty, |mut counts, values| {
        for digit in values.iter().filter_map(|value| digit(magnitude(*value))) {
            counts[digit as usize] += 1;
        }
        counts
    });
    counts.reduce(empty, |mut a, b| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    })
}

/// The digit of the `k`-th largest, and how many have a larger one.
fn threshold(counts: &[usize], k: usize) -> (u32, usize) {
    let mut above = 0;
    for (digit, count) in counts.iter().enumerate().rev() {
        if above + count >= k {
            return (digit as u32, above);
        }
        above += count;
    }
    (0, above)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::random::Stream;

    #[test]
    fn agrees_with_sorting() {
        let mut stream = Stream::new(1, "test", "top_k", &[]);
        for (len, levels) in [(1usize, 1.0), (50, 3.0), (1000, 7.0), (70_000, 1e9), (70_000, 2.0)] {
            // Rounded to few levels, there are many ties.
            let values: Vec<f32> =
                (0..len).map(|_| ((2.0 * stream.uniform() - 1.0) * levels).round() as f32).collect();
            for k in [0, 1, len / 3, len.saturating_sub(1), len, len + 5] {
                let mut order: Vec<usize> = (0..len).collect();
                order.sort_by(|a, b| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b)));
                order.truncate(k);
                order.sort_unstable();
                assert_eq!(top_k(&values, k).unwrap(), order, "{len} {k}");
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_place() {
        assert_eq!(top_k(&[1., -2., 2., 2., 0.], 2).unwrap(), [1, 2]);
        assert_eq!(top_k(&[0., -0., 0.], 2).unwrap(), [0, 1]);
    }

    #[test]
    fn what_is_not_finite_has_no_order() {
        assert_eq!(top_k(&[1., f32::NAN, f32::INFINITY], 1), Err(NotFinite { index: 1 }));
        assert_eq!(top_k(&[1., 2., f32::NEG_INFINITY], 9), Err(NotFinite { index: 2 }));
    }
}
