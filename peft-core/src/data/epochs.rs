//! The course of a run through its examples: which step trains on what.

use super::batches::epoch_order;
use super::packing::{PackingReport, pack};

/// The rows of a batch, each with the examples in it.
pub type Rows = Vec<Vec<usize>>;

/// How a run goes through its examples. Everything about an epoch is a function of these values and its number, so a
/// run that continues in the middle of one finds the same batches again.
#[derive(Debug, Clone)]
pub struct Epochs {
    /// The tokens of each example.
    pub lengths: Vec<usize>,
    /// Rows a micro-batch.
    pub micro_batch_size: usize,
    /// Micro-batches a step.
    pub gradient_accumulation_steps: usize,
    /// A random order; otherwise that of the file in every epoch.
    pub shuffle: bool,
    /// The most tokens in a row that several examples share; without it, each has a row of its own.
    pub pack_tokens: Option<usize>,
    /// The seed of the order.
    pub seed: u64,
}

/// One epoch.
#[derive(Debug, Clone)]
pub struct Epoch {
    /// Counted from 0.
    pub number: u64,
    /// Steps of the epochs before.
    pub first_step: u64,
    /// The micro-batches of each step.
    pub steps: Vec<Vec<Rows>>,
}

impl Epoch {
    /// Epochs finished after `step` steps, the last of which belongs to this one.
    pub fn progress(&self, step: u64) -> f64 {
        let steps = self.steps.len() as u64;
        (self.number * steps + (step - self.first_step)) as f64 / steps as f64
    }
}

impl Epochs {
    /// What packing makes of the first epoch, where examples share rows.
    pub fn packing_report(&self) -> Option<PackingReport> {
        let packs = self.packs(0)?;
        Some(PackingReport::new(&packs, &self.lengths, self.pack_tokens?))
    }

    fn packs(&self, epoch: u64) -> Option<Vec<Vec<usize>>> {
        self.pack_tokens.map(|capacity| pack(&self.lengths, capacity, self.shuffle, self.seed, epoch))
    }

    fn micro_batches(&self, epoch: u64) -> Vec<Rows> {
        let size = self.micro_batch_size.max(1);
        match self.packs(epoch) {
            Some(packs) => packs.chunks(size).map(<[Vec<usize>]>::to_vec).collect(),
            None => epoch_order(&self.lengths, size, self.shuffle, self.seed, epoch)
                .into_iter()
                .map(|examples| examples.into_iter().map(|example| vec![example]).collect())
                .collect(),
        }
    }

    /// The steps of an epoch, at least 1. With packing and shuffling, epochs may differ by a few.
    pub fn steps(&self, epoch: u64) -> u64 {
        let rows = self.packs(epoch).map_or(self.lengths.len(), |packs| packs.len());
        let micro_batches = rows.div_ceil(self.micro_batch_size.max(1));
        micro_batches.div_ceil(self.gradient_accumulation_steps.max(1)).max(1) as u64
    }

    /// Whether every epoch has as many steps as the first.
    fn uniform(&self) -> bool {
        self.pack_tokens.is_none() || !self.shuffle
    }

    /// The steps of the first `epochs` epochs, a part of one rounded up.
    pub fn total_steps(&self, epochs: f64) -> u64 {
        let whole = epochs.floor();
        let finished = match self.uniform() {
            true => (whole as u64).saturating_mul(self.steps(0)),
            false => (0..whole as u64).map(|epoch| self.steps(epoch)).sum(),
        };
        if epochs == whole {
            return finished;
        }
        let steps = self.steps(whole as u64) as f64;
        finished.saturating_add((epochs * steps - whole * steps).ceil() as u64)
    }

    /// The epoch that the step after `step` finished ones belongs to.
    pub fn at(&self, step: u64) -> Epoch {
        let (mut number, mut first_step) = (0, 0);
        if self.uniform() {
            number = step / self.steps(0);
            first_step = number * self.steps(0);
        } else {
            loop {
                let next = first_step + self.steps(number);
                if step < next {
                    break;
                }
                (number, first_step) = (number + 1, next);
            }
        }
        self.epoch(number, first_step)
    }

    /// The epoch after `epoch`.
    pub fn next(&self, epoch: &Epoch) -> Epoch {
        self.epoch(epoch.number + 1, epoch.first_step + epoch.steps.len() as u64)
    }

    fn epoch(&self, number: u64, first_step: u64) -> Epoch {
        let micro_batches = self.micro_batches(number);
        let steps = micro_batches.chunks(self.gradient_accumulation_steps.max(1)).map(<[Rows]>::to_vec);
        let mut steps: Vec<Vec<Rows>> = steps.collect();
        // Without examples, an epoch is a step over nothing.
        steps.resize(steps.len().max(1), Vec::new());
        Epoch { number, first_step, steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epochs(pack_tokens: Option<usize>, shuffle: bool) -> Epochs {
        Epochs {
            lengths: (0..1201).map(|i| (i * 37) % 61 + 2).collect(),
            micro_batch_size: 2,
            gradient_accumulation_steps: 3,
            shuffle,
            pack_tokens,
            seed: 7,
        }
    }

    #[test]
    fn steps_are_counted_without_rounding_errors() {
        let plain = epochs(None, true);
        // 1201 examples: 601 micro-batches, 201 steps.
        assert_eq!(plain.steps(0), 201);
        assert_eq!([1.0, 2.0, 0.5, 1.5].map(|n| plain.total_steps(n)), [201, 402, 101, 302]);
        let packed = epochs(Some(64), true);
        let counts: Vec<u64> = (0..40).map(|epoch| packed.steps(epoch)).collect();
        assert!(counts.iter().any(|count| *count != counts[0]), "a case in which epochs differ: {counts:?}");
        assert_eq!(packed.total_steps(40.0), counts.iter().sum::<u64>());
        let half = counts[0] + counts[1].div_ceil(2);
        assert_eq!(packed.total_steps(1.5), half);
    }

    #[test]
    fn a_walk_over_all_steps_meets_every_example_once_an_epoch() {
        for (pack_tokens, shuffle) in [(Some(64), true), (Some(64), false), (None, true), (None, false)] {
            let epochs = epochs(pack_tokens, shuffle);
            let mut epoch = epochs.at(0);
            let mut seen: Vec<usize> = Vec::new();
            for step in 0..epochs.total_steps(9.0) {
                if step - epoch.first_step == epoch.steps.len() as u64 {
                    seen.sort_unstable();
                    assert_eq!(seen, (0..1201).collect::<Vec<_>>(), "epoch {}", epoch.number);
                    seen.clear();
                    epoch = epochs.next(&epoch);
                    assert_eq!(epoch.first_step, step);
                    assert_eq!(epoch.progress(step), epoch.number as f64);
                }
                let micro_batches = &epoch.steps[(step - epoch.first_step) as usize];
                assert!(micro_batches.len() <= 3 && micro_batches.iter().all(|rows| rows.len() <= 2));
                seen.extend(micro_batches.iter().flatten().flatten());
                // A run that continues here finds the same.
                if step % 17 == 0 {
                    let again = epochs.at(step);
                    assert_eq!((again.number, again.first_step), (epoch.number, epoch.first_step));
                    assert_eq!(again.steps, epoch.steps);
                }
            }
            assert_eq!(epoch.number, 8);
            assert_eq!(epoch.progress(epochs.total_steps(9.0)), 9.0);
        }
    }
}
