//! What all layers of one forward share: which tokens form a sequence, rotary tables, masks.

use super::cache::Cache;
use super::config::ModelConfig;
use super::rope::RopeTable;
use crate::kernels::{causal_mask, group_segments};
use burn::tensor::{Device, Int, Tensor, TensorData};
use std::ops::Range;

/// The sequences of a forward.
pub struct Context {
    pub(super) layout: Layout,
}

/// How the sequences lie among the tokens.
pub(super) enum Layout {
    /// One after another, all padded to the same length.
    Padded(Box<Sequences>),
    /// Anywhere.
    Packed(Box<Packed>),
}

/// Sequences of equal length, padding included: on the right, or on the left of those that are continued.
pub(super) struct Sequences {
    pub batch: usize,
    pub time: usize,
    pub rope: RopeTable,
    full: Option<Tensor<5>>,
    windowed: Option<(usize, Option<Tensor<5>>)>,
}

/// Sequences at any place of the tokens, gathered into padded groups for attention.
pub(super) struct Packed {
    /// For each group: the token of each of its places, and its sequences.
    groups: Vec<(Tensor<1, Int>, Sequences)>,
    /// For each token, its place in the concatenation of the groups.
    places: Tensor<1, Int>,
}

impl Context {
    /// `batch` sequences of `time` tokens each, after `past` cached ones.
    pub(super) fn padded(
        config: &ModelConfig,
        batch: usize,
        time: usize,
        past: usize,
        device: &Device,
    ) -> Self {
        let rope =
            RopeTable::new(&config.rope_scaling, config.rope_theta, config.head_dim, past, time, device);
        let sequences = Sequences::new(config, batch, past, time, rope, device);
        Self { layout: Layout::Padded(Box::new(sequences)) }
    }

    /// The next `time` tokens of each row of `cache`.
    pub(super) fn continued(config: &ModelConfig, cache: &mut Cache, time: usize, device: &Device) -> Self {
        let past = cache.len();
        let padding = cache.advance(time, device);
        let rope = RopeTable::of_rows(
            &config.rope_scaling,
            config.rope_theta,
            config.head_dim,
            cache.first(),
            past..past + time,
            device,
        );
        let sequences = Sequences::continued(config, cache.rows(), past, time, rope, padding, device);
        Self { layout: Layout::Padded(Box::new(sequences)) }
    }

    /// The sequences at `segments` of `tokens` tokens.
    pub(super) fn packed(
        config: &ModelConfig,
        segments: &[Range<usize>],
        tokens: usize,
        device: &Device,
    ) -> Self {
        let indices = |list: Vec<i64>| {
            let length = list.len();
            Tensor::from_data(TensorData::new(list, [length]), device)
        };
        let (groups, places) = group_segments(segments, tokens);
        let groups = groups.into_iter().map(|group| {
            let rope = RopeTable::of_lengths(
                &config.rope_scaling,
                config.rope_theta,
                config.head_dim,
                &group.lengths,
                group.time,
                device,
            );
            let sequences = Sequences::new(config, group.lengths.len(), 0, group.time, rope, device);
            (indices(group.tokens), sequences)
        });
        let packed = Packed { groups: groups.collect(), places: indices(places) };
        Self { layout: Layout::Packed(Box::new(packed)) }
    }
}

impl Sequences {
    fn new(
        config: &ModelConfig,
        batch: usize,
        past: usize,
        time: usize,
        rope: RopeTable,
        device: &Device,
    ) -> Self {
        let keys = past + time;
        // A configuration has one window size at most.
        let window = config.windows.iter().flatten().next().copied();
        Self {
            batch,
            time,
            rope,
            // Padding stands on the right, so a causal mask also hides it from every real token.
            full: causal_mask(time, keys, None, device),
            windowed: window.map(|size| (size, causal_mask(time, keys, Some(size), device))),
        }
    }

    /// As [`new`](Self::new), with `padding` on the keys, `[batch, 1, 1, 1, past + time]`. The mask of a single token
    /// covers the keys within its window only.
    fn continued(
        config: &ModelConfig,
        batch: usize,
        past: usize,
        time: usize,
        rope: RopeTable,
        padding: Option<Tensor<5>>,
        device: &Device,
    ) -> Self {
        let keys = past + time;
        let mask = |window: Option<usize>| match time {
            1 => {
                let seen = window.map_or(keys, |window| window.min(keys));
                padding.clone().map(|padding| padding.narrow(4, keys - seen, seen))
            }
            _ => match (causal_mask(time, keys, window, device), padding.clone()) {
                (Some(causal), Some(padding)) => Some(causal + padding),
                (causal, padding) => causal.or(padding),
            },
        };
        let window = config.windows.iter().flatten().next().copied();
        let windowed = window.map(|size| (size, mask(Some(size))));
        Self { batch, time, rope, full: mask(None), windowed }
    }

    /// The mask of a layer with this window.
    pub(super) fn mask(&self, window: Option<usize>) -> Option<Tensor<5>> {
        match (&self.windowed, window) {
            (Some((size, mask)), Some(window)) if *size == window => mask.clone(),
            _ => self.full.clone(),
        }
    }
}

impl Packed {
    /// Applies `attend` to q, k and v `[tokens, features]` group by group and returns its results, `[tokens,
    /// features]`, in the tokens' order.
    pub(super) fn within_segments(
        &self,
        qkv: [Tensor<2>; 3],
        attend: impl Fn([Tensor<2>; 3], &Sequences) -> Tensor<2>,
    ) -> Tensor<2> {
        let groups = self.groups.iter().map(|(tokens, sequences)| {
            attend(qkv.clone().map(|tensor| tensor.select(0, tokens.clone())), sequences)
        });
        Tensor::cat(groups.collect(), 0).select(0, self.places.clone())
    }
}
