//! Attention within the segments of packed rows without a mask over whole rows: segments of similar length are laid
//! side by side, padded to the longest of them, and attended to as any padded batch. The cost is that of the segments'
//! squares instead of the rows'.

use std::cmp::Reverse;
use std::ops::Range;

/// Segments of similar length, side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentGroup {
    /// Tokens of each segment.
    pub lengths: Vec<usize>,
    /// Tokens of the longest.
    pub time: usize,
    /// For each place of `[segments, time]`, its token. Places after a segment's end repeat its last token: a causal
    /// mask hides them from the segment's own.
    pub tokens: Vec<i64>,
}

/// Sorts segments (of at least one token each, disjoint) into groups.
///
/// Returns the groups, and for each of `tokens` tokens its place in their concatenation. Tokens in no segment, which
/// are padding, get the first place: what they are given does not matter, as nothing sees them.
pub fn group_segments(segments: &[Range<usize>], tokens: usize) -> (Vec<SegmentGroup>, Vec<i64>) {
    let mut sorted: Vec<&Range<usize>> = segments.iter().collect();
    sorted.sort_by_key(|segment| Reverse(segment.len()));
    let mut groups = Vec::new();
    let mut places = vec![0; tokens];
    let mut first = 0;
    while let Some(longest) = sorted.first() {
        let time = longest.len();
        let (group, rest) = sorted.split_at(sorted.partition_point(|segment| 3 * segment.len() >= 2 * time));
        let mut slots = Vec::with_capacity(group.len() * time);
        for segment in group {
            for (token, place) in (*segment).clone().zip(first + slots.len()..) {
                places[token] = place as i64;
            }
            slots.extend((0..time).map(|at| (segment.start + at).min(segment.end - 1) as i64));
        }
        first += slots.len();
        let lengths = group.iter().map(|segment| segment.len()).collect();
        groups.push(SegmentGroup { lengths, time, tokens: slots });
        sorted = rest.to_vec();
    }
    (groups, places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_by_hand() {
        // Two rows of eight: lengths 3, 4 and padding; 1 and 6.
        let (groups, places) = group_segments(&[0..3, 3..7, 8..9, 9..15], 16);
        let group = |lengths: &[usize], tokens: &[i64]| SegmentGroup {
            lengths: lengths.to_vec(),
            time: lengths[0],
            tokens: tokens.to_vec(),
        };
        assert_eq!(
            groups,
            [
                group(&[6, 4], &[9, 10, 11, 12, 13, 14, 3, 4, 5, 6, 6, 6]),
                group(&[3], &[0, 1, 2]),
                group(&[1], &[8]),
            ]
        );
        assert_eq!(places, [12, 13, 14, 6, 7, 8, 9, 0, 15, 0, 1, 2, 3, 4, 5, 0]);
    }
}
