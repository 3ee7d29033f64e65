//! What all layers of one forward share: which tokens form a sequence, rotary tables, masks.

use super::cache::Cache;
use super::config::ModelConfig;
use super::rope::{RopeTable, RopeValues, remembered_values};
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
    visibility: OnceCell<Visibility>,
    /// As `visibility`.
    rotation: OnceCell<Rotation>,
    /// For attention as a plain composition.
    layout: OnceCell<Layout>,
}

/// How the sequences lie among the tokens.
enum Arrangement {
    /// Rows of `time` places, padded on the right to the same length.
    Padded { batch: usize, time: usize, lengths: Option<Vec<usize>> },
    /// The next `time` tokens of cached rows of `past` slots each, whose first tokens stand in the slots `first`.
    Continued { first: Vec<usize>, time: usize, past: usize },
    /// At any place of the tokens.
    Packed { segments: Vec<Range<usize>>, tokens: usize },
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
    /// `batch` sequences of `time` tokens each. `lengths` are those of the sequences without
    /// their padding, if they are known.
    pub(super) fn padded(
        config: &ModelConfig,
        batch: usize,
        time: usize,
        lengths: Option<&[usize]>,
        device: &Device,
    ) -> Self {
        let lengths = lengths.map(<[usize]>::to_vec);
        Self::new(config, Arrangement::Padded { batch, time, lengths }, device)
    }

    /// The next `time` tokens of each row of `cache`.
    pub(super) fn continued(config: &ModelConfig, cache: &Cache, time: usize, device: &Device) -> Self {
        let (first, past) = (cache.first().to_vec(), cache.len());
        Self::new(config, Arrangement::Continued { first, time, past }, device)
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
            visibility: OnceCell::new(),
            rotation: OnceCell::new(),
            layout: OnceCell::new(),
        }
    }

    /// Which tokens see which, for kernels over joint queries, keys and values; nothing may be cached.
    pub(super) fn visibility(&self) -> &Visibility {
        self.visibility.get_or_init(|| {
            let (mut segments, tokens): (Vec<Range<usize>>, usize) = match &self.arrangement {
                Arrangement::Padded { batch, time, lengths, .. } => {
                    let row = |index: usize| {
                        let length = lengths.as_ref().map_or(*time, |lengths| lengths[index]);
                        index * time..index * time + length
                    };
                    ((0..*batch).map(row).collect(), batch * time)
                }
                Arrangement::Continued { first, time, .. } => {
                    let row = |(index, first): (usize, &usize)| index * time + first..(index + 1) * time;
                    (first.iter().enumerate().map(row).collect(), first.len() * time)
                }
                Arrangement::Packed { segments, tokens } => (segments.clone(), *tokens),
            };
            segments.retain(|segment| !segment.is_empty());
            Visibility::new(&segments, tokens, &self.device)
        })
    }

    /// The angles of all tokens, for the same kernels.
    pub(super) fn rotation(&self) -> &Rotation {
        self.rotation.get_or_init(|| {
            let row = |index: usize, time: usize| index * time..(index + 1) * time;
            let (spans, tokens): (Vec<(Range<usize>, usize)>, usize) = match &self.arrangement {
                // Frequencies that go by the length go by that of the padded row.
                Arrangement::Padded { batch, time, .. } => {
                    ((0..*batch).map(|index| (row(index, *time), 0)).collect(), batch * time)
                }
                Arrangement::Continued { first, time, past } => {
                    // Padding is not turned.
                    let span = |(index, first): (usize, &usize)| {
                        let padding = first.saturating_sub(*past).min(*time);
                        (index * time + padding..(index + 1) * time, past.saturating_sub(*first))
                    };
                    (first.iter().enumerate().map(span).collect(), first.len() * time)
                }
                Arrangement::Packed { segments, tokens } => {
                    (segments.iter().map(|segment| (segment.clone(), 0)).collect(), *tokens)
                }
            };
            self.angles(spans, tokens)
        })
    }

    /// The angles of tokens in spans, each with the position of its first token.
    fn angles(&self, spans: Vec<(Range<usize>, usize)>, tokens: usize) -> Rotation {
        let config = &self.config;
        let half = config.head_dim / 2;
        let (mut cos, mut sin) = (vec![1f32; tokens * half], vec![0f32; tokens * half]);
        let longest = spans.iter().map(|(span, _)| span.len()).max().unwrap_or(0);
        for (span, position) in spans {
            let end = position + span.len();
            let frequencies = config.rope_scaling.frequencies(config.rope_theta, config.head_dim, end);
            let (to, count) = (span.start * half, span.len() * half);
            let mut write = |(cosines, sines): &RopeValues| {
                cos[to..to + count].copy_from_slice(&cosines[..count]);
                sin[to..to + count].copy_from_slice(&sines[..count]);
            };
            match position {
                0 => write(&remembered_values(&frequencies, longest)),
                _ => write(&RopeTable::values(&frequencies, position..end)),
            }
        }
        let tensor =
            |values| Tensor::from_data(TensorData::new(values, [tokens, half]), (&self.device, DType::F32));
        Rotation { cos: tensor(cos), sin: tensor(sin) }
    }

    /// The sequences for the plain composition.
    pub(super) fn layout(&self) -> &Layout {
        let (config, device) = (&self.config, &self.device);
        self.layout.get_or_init(|| match &self.arrangement {
            Arrangement::Padded { batch, time, .. } => {
                // All rows have the angles of the first.
                let rope = RopeTable::of_tokens(self.rotation(), 1, *time);
                Layout::Padded(Box::new(Sequences::new(config, *batch, *time, rope, device)))
            }
            Arrangement::Continued { first, time, past } => {
                let rope = RopeTable::of_tokens(self.rotation(), first.len(), *time);
                Layout::Padded(Box::new(Sequences::continued(config, first, *past, *time, rope, device)))
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
                    let sequences = Sequences::new(config, group.lengths.len(), group.time, rope, device);
                    (indices(group.tokens), sequences)
                });
                Layout::Packed(Box::new(Packed { groups: groups.collect(), places: indices(places) }))
            }
        })
    }
}

impl Sequences {
    fn new(config: &ModelConfig, batch: usize, time: usize, rope: RopeTable, device: &Device) -> Self {
        // A configuration has one window size at most.
        let window = config.windows.iter().flatten().next().copied();
        Self {
            batch,
            time,
            rope,
            // Padding stands on the right, so a causal mask also hides it from every real token.
            full: causal_mask(time, time, None, device),
            windowed: window.map(|size| (size, causal_mask(time, time, Some(size), device))),
        }
    }

    /// As [`new`](Self::new), for rows whose first tokens stand in the slots `first`. The mask of a single token covers
    /// the keys within its window only.
    fn continued(
        config: &ModelConfig,
        first: &[usize],
        past: usize,
        time: usize,
        rope: RopeTable,
        device: &Device,
    ) -> Self {
        let (batch, keys) = (first.len(), past + time);
        let padding = padding_mask(first, keys, device);
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

/// Added to the scores of keys that are padding: so low that their weights are 0 beside any real key, and finite, so
/// that a query of padding, which sees nothing else, stays a number.
const HIDDEN: f32 = -1e30;

/// 0 for slots of tokens, [`HIDDEN`] for those of padding, `[rows, 1, 1, 1, keys]`; `None` where there is no padding.
fn padding_mask(first: &[usize], keys: usize, device: &Device) -> Option<Tensor<5>> {
    if first.iter().all(|first| *first == 0) {
        return None;
    }
    let mut mask = vec![0f32; first.len() * keys];
    for (row, first) in mask.chunks_exact_mut(keys).zip(first) {
        row[..*first].fill(HIDDEN);
    }
    Some(Tensor::from_data(TensorData::new(mask, [first.len(), 1, 1, 1, keys]), (device, DType::F32)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_hidden_in_its_own_row() {
        let mask = padding_mask(&[0, 2], 4, &Device::flex()).unwrap();
        assert_eq!(mask.dims(), [2, 1, 1, 1, 4]);
        let hidden: Vec<bool> = mask.try_into_vec_as::<f32>().unwrap().iter().map(|v| *v != 0.0).collect();
        assert_eq!(hidden, [false, false, false, false, true, true, false, false]);
        let mask = padding_mask(&[0, 2], 75, &Device::flex()).unwrap();
        let hidden = mask.try_into_vec_as::<f32>().unwrap().iter().filter(|v| **v != 0.0).count();
        assert_eq!(hidden, 2);
        assert!(padding_mask(&[0, 0], 4, &Device::flex()).is_none());
    }
}
