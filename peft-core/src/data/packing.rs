//! Several examples in one row: which ones share it.

use std::collections::BTreeSet;

use crate::random::Stream;

/// Best fit takes the longest example first, but only within windows of this many, so that a pack is a random choice
/// of examples: over the whole data, the shortest would always end up among themselves.
const WINDOW: usize = 512;

/// The packs of an epoch, as indices into the examples whose `lengths` are given: each index appears once, and the
/// lengths of a pack add up to `capacity` tokens at most. An example that is longer has a pack of its own.
///
/// With `shuffle` the packs are determined by `seed` and `epoch`: the examples are shuffled and put, window by window
/// and the longest first, each into the fullest pack with room for it (best-fit decreasing; a pack stays open until the
/// end), and the packs are shuffled. Without it, examples follow each other in file order, and one that does not fit
/// opens the next pack.
pub fn pack(lengths: &[usize], capacity: usize, shuffle: bool, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
    if !shuffle {
        return in_order(lengths, capacity);
    }
    let mut stream = Stream::new(seed, "packs", "", &[epoch]);
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    stream.shuffle(&mut order);
    for window in order.chunks_mut(WINDOW) {
        window.sort_by_key(|&example| std::cmp::Reverse(lengths[example]));
    }
    let mut packs = best_fit(&order, lengths, capacity);
    stream.shuffle(&mut packs);
    packs
}

fn in_order(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut packs: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for (example, &length) in lengths.iter().enumerate() {
        match packs.last_mut() {
            Some(pack) if length <= room => pack.push(example),
            _ => {
                packs.push(vec![example]);
                room = capacity;
            }
        }
        room = room.saturating_sub(length);
    }
    packs
}

fn best_fit(order: &[usize], lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut packs: Vec<Vec<usize>> = Vec::new();
    // The room of each pack that has any, with its number.
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for &example in order {
        let length = lengths[example];
        let (room, number) = match open.range((length, 0)..).next().copied() {
            Some(pack) => {
                open.remove(&pack);
                pack
            }
            None => {
                packs.push(Vec::new());
                (capacity, packs.len() - 1)
            }
        };
        packs[number].push(example);
        if room > length {
            open.insert((room - length, number));
        }
    }
    packs
}

/// What packing makes of the data.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct PackingReport {
    /// How many packs there are.
    pub packs: usize,
    /// How full they are: the tokens in them over the tokens that they could hold.
    pub fill: f64,
}

impl PackingReport {
    /// Of packs of examples with these `lengths`.
    pub fn new(packs: &[Vec<usize>], lengths: &[usize], capacity: usize) -> Self {
        let tokens: usize = packs.iter().flatten().map(|&example| lengths[example]).sum();
        Self { packs: packs.len(), fill: tokens as f64 / packs.len().saturating_mul(capacity).max(1) as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths as instruction data has them: log-normal around `median` tokens, cut at `capacity`.
    fn realistic(count: usize, median: f64, capacity: usize, seed: u64) -> Vec<usize> {
        let mut stream = Stream::new(seed, "lengths", "", &[]);
        let length = |normal: f64| (median * (0.7 * normal).exp()) as usize;
        (0..count).map(|_| length(stream.normal()).clamp(2, capacity)).collect()
    }

    #[test]
    fn every_example_is_in_one_pack_and_no_pack_overflows() {
        for seed in 0..40 {
            let mut stream = Stream::new(seed, "case", "", &[]);
            let capacity = 2 + stream.below(600) as usize;
            let count = stream.below(1500) as usize;
            let lengths: Vec<usize> =
                (0..count).map(|_| 1 + stream.below(capacity as u64) as usize).collect();
            for shuffle in [true, false] {
                let packs = pack(&lengths, capacity, shuffle, seed, 3);
                let mut seen = packs.concat();
                if shuffle {
                    seen.sort_unstable();
                }
                assert_eq!(seen, (0..count).collect::<Vec<_>>(), "without shuffling in file order");
                let tokens = |pack: &Vec<usize>| pack.iter().map(|&i| lengths[i]).sum::<usize>();
                assert!(packs.iter().all(|pack| !pack.is_empty() && tokens(pack) <= capacity));
            }
        }
    }

    #[test]
    fn packs_of_realistic_lengths_are_full() {
        for (count, median, capacity) in [(2000, 90.0, 256), (2000, 90.0, 2048), (20_000, 300.0, 1024)] {
            let lengths = realistic(count, median, capacity, 5);
            let packs = pack(&lengths, capacity, true, 1, 0);
            let full = PackingReport::new(&packs, &lengths, capacity).fill;
            assert!(full > 0.97, "{count} examples in {capacity} tokens: {full}");
            // No packing needs fewer packs than this.
            assert!(packs.len() >= lengths.iter().sum::<usize>().div_ceil(capacity));
        }
    }

    #[test]
    fn packs_are_a_function_of_seed_and_epoch() {
        let lengths = realistic(900, 60.0, 256, 5);
        let packs = |seed, epoch| pack(&lengths, 256, true, seed, epoch);
        assert_eq!(packs(1, 2), packs(1, 2));
        assert_ne!(packs(1, 2), packs(1, 3));
        assert_ne!(packs(1, 2), packs(2, 2));
    }

    #[test]
    fn file_order_by_hand() {
        assert_eq!(pack(&[5, 4, 3, 10, 2, 2], 10, false, 0, 0), [vec![0, 1], vec![2], vec![3], vec![4, 5]]);
        assert!(pack(&[], 10, false, 0, 0).is_empty() && pack(&[], 10, true, 0, 0).is_empty());
        // Best fit, longest first: 7, then 5 and 4, then 3 where it fills a pack and not where it first fits.
        let lengths = [7, 5, 4, 3];
        assert_eq!(best_fit(&[0, 1, 2, 3], &lengths, 10), [vec![0, 3], vec![1, 2]]);
        let report = PackingReport::new(&[vec![0, 3], vec![1, 2]], &lengths, 10);
        assert_eq!(report, PackingReport { packs: 2, fill: 0.95 });
    }

    #[test]
    fn too_long_an_example_is_neither_dropped_nor_split() {
        for shuffle in [true, false] {
            let mut packs = pack(&[3, 12, 3], 10, shuffle, 0, 0);
            packs.sort();
            assert!(packs.contains(&vec![1]) && packs.concat().len() == 3, "{packs:?}");
        }
    }
}
