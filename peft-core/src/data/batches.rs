//! The order of an epoch without packing, and padded batches.

use std::ops::Range;

use super::Example;
use crate::random::Stream;

/// Examples are sorted by length within windows of this many micro-batches: wide enough that little is padded,
/// narrow enough that the order stays random.
const WINDOW: usize = 64;

/// The micro-batches of an epoch, as indices into the examples whose `lengths` are given; each index appears once,
/// and one micro-batch may be smaller than the others.
///
/// With `shuffle` the order is random but determined by `seed` and `epoch`, and a micro-batch holds examples of
/// similar length: the examples are shuffled, sorted by length within windows, cut into micro-batches, and these are
/// shuffled. Without it, the order is that of the file in every epoch. A `micro_batch_size` of 0 counts as 1.
pub fn epoch_order(
    lengths: &[usize],
    micro_batch_size: usize,
    shuffle: bool,
    seed: u64,
    epoch: u64,
) -> Vec<Vec<usize>> {
    let micro_batch_size = micro_batch_size.max(1);
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    let cut = |order: &[usize]| order.chunks(micro_batch_size).map(<[usize]>::to_vec).collect();
    if !shuffle {
        return cut(&order);
    }
    let mut stream = Stream::new(seed, "data order", "", &[epoch]);
    stream.shuffle(&mut order);
    for window in order.chunks_mut(WINDOW.saturating_mul(micro_batch_size)) {
        window.sort_by_key(|&example| lengths[example]);
    }
    let mut micro_batches: Vec<Vec<usize>> = cut(&order);
    stream.shuffle(&mut micro_batches);
    micro_batches
}

/// Rows of examples side by side, padded on the right to the longest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, row-major `[batch_size, seq_len]`.
    pub ids: Vec<i64>,
    /// The number of tokens of each row that are not padding.
    pub lengths: Vec<usize>,
    /// The number of rows.
    pub batch_size: usize,
    /// The number of columns.
    pub seq_len: usize,
    /// Where the loss falls: indices `row · seq_len + column` of positions whose hidden state predicts a supervised
    /// token, ascending.
    pub positions: Vec<i64>,
    /// For each of `positions`, the token to predict, which is the next one of that row.
    pub targets: Vec<i64>,
    /// Where rows are packs: the place of each example as indices `row · seq_len + column`, ascending. Examples do not
    /// see each other, and the position of a token counts from the start of its own.
    pub segments: Option<Vec<Range<usize>>>,
}

/// Puts examples into one batch, one a row. Column `t` of a row predicts its token `t + 1`, and counts exactly when
/// that token is supervised.
pub fn collate(examples: &[&Example], pad_id: u32) -> Batch {
    let rows: Vec<&[&Example]> = examples.iter().map(std::slice::from_ref).collect();
    Batch { segments: None, ..collate_packs(&rows, pad_id) }
}

/// Puts packs into one batch, one a row. Loss falls as in [`collate`]; the first token of an example is not supervised,
/// so none is predicted from its neighbour.
pub fn collate_packs<'a>(packs: &[impl AsRef<[&'a Example]>], pad_id: u32) -> Batch {
    let length = |pack: &[&Example]| pack.iter().map(|example| example.ids.len()).sum();
    let lengths: Vec<usize> = packs.iter().map(|pack| length(pack.as_ref())).collect();
    let seq_len = lengths.iter().copied().max().unwrap_or(0);
    let mut ids = Vec::with_capacity(packs.len() * seq_len);
    let (mut positions, mut targets, mut segments) = (Vec::new(), Vec::new(), Vec::new());
    for (row, pack) in packs.iter().enumerate() {
        for example in pack.as_ref() {
            let start = ids.len();
            ids.extend(example.ids.iter().map(|&id| i64::from(id)));
            segments.push(start..ids.len());
            for at in 1..example.ids.len() {
                if example.supervised[at] {
                    positions.push((start + at - 1) as i64);
                    targets.push(i64::from(example.ids[at]));
                }
            }
        }
        ids.resize((row + 1) * seq_len, i64::from(pad_id));
    }
    Batch { ids, lengths, batch_size: packs.len(), seq_len, positions, targets, segments: Some(segments) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_holds_every_example_once_and_buckets_them() {
        let lengths: Vec<usize> = (0..1003).map(|i| (i * 37) % 101 + 1).collect();
        let order = epoch_order(&lengths, 4, true, 9, 0);
        let mut seen = order.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..1003).collect::<Vec<_>>());
        assert_eq!(order.iter().filter(|batch| batch.len() != 4).count(), 1);
        let padded = |order: &[Vec<usize>]| -> usize {
            let longest = |batch: &Vec<usize>| batch.iter().map(|&i| lengths[i]).max().unwrap_or(0);
            order.iter().map(|batch| longest(batch) * batch.len()).sum()
        };
        let tokens: usize = lengths.iter().sum();
        assert!(padded(&order) * 100 < tokens * 105, "{} of {tokens}", padded(&order));
        assert_eq!(order, epoch_order(&lengths, 4, true, 9, 0));
        assert_ne!(order, epoch_order(&lengths, 4, true, 9, 1));
        assert_ne!(order, epoch_order(&lengths, 4, true, 10, 0));
    }

    #[test]
    fn without_shuffling_the_order_is_the_files() {
        let order = epoch_order(&[5, 1, 4, 2, 3], 2, false, 9, 7);
        assert_eq!(order, [vec![0, 1], vec![2, 3], vec![4]]);
        assert!(epoch_order(&[], 2, true, 0, 0).is_empty());
    }

    #[test]
    fn a_position_predicts_the_next_token_of_its_row() {
        let example = |ids: &[u32], supervised: &[u8]| Example {
            ids: ids.to_vec(),
            supervised: supervised.iter().map(|&flag| flag == 1).collect(),
        };
        // The padding id is also a token of the first row, where it counts.
        let (a, b) = (example(&[1, 7, 8, 2], &[0, 0, 1, 1]), example(&[1, 2], &[1, 1]));
        let batch = collate(&[&a, &b], 2);
        assert_eq!(batch.ids, [1, 7, 8, 2, 1, 2, 2, 2]);
        assert_eq!((batch.batch_size, batch.seq_len), (2, 4));
        assert_eq!(batch.lengths, [4, 2]);
        assert_eq!(batch.positions, [1, 2, 4]);
        assert_eq!(batch.targets, [8, 2, 2]);
        assert_eq!(batch.segments, None);

        // Packed: the last token of one example does not predict the first of the next.
        let batch = collate_packs(&[vec![&b, &a], vec![&b]], 0);
        assert_eq!(batch.ids, [1, 2, 1, 7, 8, 2, 1, 2, 0, 0, 0, 0]);
        assert_eq!((batch.batch_size, batch.seq_len), (2, 6));
        assert_eq!(batch.lengths, [6, 2]);
        assert_eq!(batch.positions, [0, 3, 4, 6]);
        assert_eq!(batch.targets, [2, 8, 2, 2]);
        assert_eq!(batch.segments, Some(vec![0..2, 2..6, 6..8]));
    }
}
