//! The largest entries of a vector by magnitude, exactly and the same way every time.
//!
//! Magnitudes of floats order as the whole numbers that their bits spell. A count of their upper digits says which of them
//! the k-th largest has; what has a higher one is in, and only those that share it are compared. Two passes, and no copy
//! of the vector.

use rayon::prelude::*;

/// Entries of a task.
const CHUNK: usize = 1 << 16;

/// Bits below the upper digits: a count of these fits a core's cache.
const LOWER_BITS: u32 = 19;
/// Values of the upper digits of a magnitude, whose sign bit is 0.
const DIGITS: usize = 1 << (31 - LOWER_BITS);
/// The first of the values that no finite number has.
const NOT_FINITE: usize = (0x7f80_0000u32 >> LOWER_BITS) as usize;

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
    let counts = counts(values);
    if counts[NOT_FINITE..].iter().any(|count| *count > 0) {
        let index = values.iter().position(|value| !value.is_finite());
        return Err(NotFinite { index: index.unwrap_or_default() });
    }
    if k >= values.len() {
        return Ok((0..values.len()).collect());
    }
    if k == 0 {
        return Ok(Vec::new());
    }
    let (digit, above) = threshold(&counts, k);
    let parts = values.par_chunks(CHUNK).enumerate().map(|(chunk, values)| {
        let entries = values.iter().enumerate().map(|(at, value)| (magnitude(*value), chunk * CHUNK + at));
        entries.filter(|(bits, _)| upper(*bits) >= digit).collect::<Vec<_>>()
    });
    let entries: Vec<(u32, usize)> = parts.collect::<Vec<_>>().concat();
    // The larger magnitude comes first, of equal ones the lower place.
    let key = |(bits, place): &(u32, usize)| (!bits, *place);
    let mut sharing: Vec<(u32, usize)> =
        entries.iter().filter(|(bits, _)| upper(*bits) == digit).map(key).collect();
    let (_, last, _) = sharing.select_nth_unstable(k - above - 1);
    let last = *last;
    Ok(entries.iter().filter(|entry| key(entry) <= last).map(|(_, place)| *place).collect())
}

/// The bits of `|value|`: ordered as the magnitudes are.
pub fn magnitude(value: f32) -> u32 {
    value.abs().to_bits()
}

/// The upper digits of a magnitude.
fn upper(bits: u32) -> usize {
    (bits >> LOWER_BITS) as usize
}

/// How many magnitudes have each value of the upper digits.
fn counts(values: &[f32]) -> Vec<usize> {
    let of_chunk = |values: &[f32]| {
        let mut counts = vec![0usize; DIGITS];
        values.iter().for_each(|value| counts[upper(magnitude(*value))] += 1);
        counts
    };
    let sum = |mut a: Vec<usize>, b: Vec<usize>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    values.par_chunks(CHUNK).map(of_chunk).reduce(|| vec![0; DIGITS], sum)
}

/// The digit of the `k`-th largest, and how many have a larger one.
fn threshold(counts: &[usize], k: usize) -> (usize, usize) {
    let mut above = 0;
    for (digit, count) in counts.iter().enumerate().rev() {
        if above + count >= k {
            return (digit, above);
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
