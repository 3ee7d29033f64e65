//! What all layers of one forward share: which tokens form a sequence, rotary tables, masks.

use super::cache::Cache;
use super::config::ModelConfig;
use super::rope::{RopeTable, remembered_values};
use crate::kernels::{Rotation, Visibility, causal_mask, group_segments};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use std::cell::OnceCell;
use std::ops::Range;

/// The sequences of a forward.
pub struct Context {
    config: ModelConfig,
    device: Device,
    arrangement: Arrangement,
    /// For attention by kernels over joint queries, keys and values.
    joint: OnceCell<Joint>,
    /// For attention as a plain composition.
    layout: OnceCell<Layout>,
}

/// How the sequences lie among the tokens.
enum Arrangement {
    /// Rows of `time` places after `past` cached tokens, padded on the right to the same length.
    Padded { batch: usize, time: usize, past: usize, lengths: Option<Vec<usize>> },
    /// At any place of the tokens.
    Packed { segments: Vec<Range<usize>>, tokens: usize },
}

/// Which tokens see which, and how each is turned.
pub(super) struct Joint {
    pub visibility: Visibility,
    pub rotation: Rotation,
}

/// The sequences as the plain composition takes them.
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
    /// `batch` sequences of `time` tokens each, after `past` cached ones. `lengths` are those of the sequences without
    /// their padding, if they are known.
    pub(super) fn padded(
        config: &ModelConfig,
        batch: usize,
        time: usize,
        past: usize,
        lengths: Option<&[usize]>,
        device: &Device,
    ) -> Self {
        let lengths = lengths.map(<[usize]>::to_vec);
        Self::new(config, Arrangement::Padded { batch, time, past, lengths }, device)
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
        let batch = cache.rows();
        Self {
            layout: OnceCell::from(Layout::Padded(Box::new(sequences))),
            ..Self::new(config, Arrangement::Padded { batch, time, past, lengths: None }, device)
        }
    }

    /// The sequences at `segments` of `tokens` tokens.
    pub(super) fn packed(
        config: &ModelConfig,
        segments: &[Range<usize>],
        tokens: usize,
        device: &Device,
    ) -> Self {
        Self::new(config, Arrangement::Packed { segments: segments.to_vec(), tokens }, device)
    }

    fn new(config: &ModelConfig, arrangement: Arrangement, device: &Device) -> Self {
        Self {
            config: config.clone(),
            device: device.clone(),
            arrangement,
            joint: OnceCell::new(),
            layout: OnceCell::new(),
        }
    }

    /// The sequences for kernels over joint queries, keys and values; nothing may be cached.
    pub(super) fn joint(&self) -> &Joint {
        self.joint.get_or_init(|| {
            let (segments, spans, tokens) = match &self.arrangement {
                Arrangement::Padded { batch, time, lengths, .. } => {
                    let row = |index: usize| index * time..(index + 1) * time;
                    let segments = (0..*batch).map(|index| {
                        let row = row(index);
                        let length = lengths.as_ref().map_or(*time, |lengths| lengths[index]);
                        row.start..row.start + length
                    });
                    // Frequencies that go by the length go by that of the padded row.
                    (segments.collect(), (0..*batch).map(row).collect(), batch * time)
                }
                Arrangement::Packed { segments, tokens } => (segments.clone(), segments.clone(), *tokens),
            };
            let mut ordered: Vec<Range<usize>> = segments;
            ordered.retain(|segment| !segment.is_empty());
            Joint {
                visibility: Visibility::new(&ordered, tokens, &self.device),
                rotation: self.rotation(spans, tokens),
            }
        })
    }

    /// The angles of all tokens, whose positions count from the start of their span.
    fn rotation(&self, spans: Vec<Range<usize>>, tokens: usize) -> Rotation {
        let config = &self.config;
        let half = config.head_dim / 2;
        let (mut cos, mut sin) = (vec![1f32; tokens * half], vec![0f32; tokens * half]);
        let longest = spans.iter().map(Range::len).max().unwrap_or(0);
        for span in spans {
            let frequencies = config.rope_scaling.frequencies(config.rope_theta, config.head_dim, span.len());
            let values = remembered_values(&frequencies, longest);
            let (cosines, sines) = &*values;
            let (to, count) = (span.start * half, span.len() * half);
            cos[to..to + count].copy_from_slice(&cosines[..count]);
            sin[to..to + count].copy_from_slice(&sines[..count]);
        }
        let tensor =
            |values| Tensor::from_data(TensorData::new(values, [tokens, half]), (&self.device, DType::F32));
        Rotation { cos: tensor(cos), sin: tensor(sin) }
    }

    /// The sequences for the plain composition.
    pub(super) fn layout(&self) -> &Layout {
        let (config, device) = (&self.config, &self.device);
        self.layout.get_or_init(|| match &self.arrangement {
            Arrangement::Padded { batch, time, past, .. } => {
                let rope = RopeTable::new(
                    &config.rope_scaling,
                    config.rope_theta,
                    config.head_dim,
                    *past,
                    *time,
                    device,
                );
                Layout::Padded(Box::new(Sequences::new(config, *batch, *past, *time, rope, device)))
            }
            Arrangement::Packed { segments, tokens } => {
                let indices = |list: Vec<i64>| {
                    let length = list.len();
                    Tensor::from_data(TensorData::new(list, [length]), device)
                };
                let (groups, places) = group_segments(segments, *tokens);
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
                Layout::Packed(Box::new(Packed { groups: groups.collect(), places: indices(places) }))
            }
        })
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
