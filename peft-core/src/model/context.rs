//! What all layers of one forward share: which tokens form a sequence, rotary tables, masks.

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

/// Sequences of equal length, padding included, on the right.
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
