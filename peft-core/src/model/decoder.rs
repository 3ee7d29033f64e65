//! The decoder: embedding, layers, final norm, head.
//!
//! The reference for every family is its modelling file in transformers (`models/llama/modeling_llama.py` and kin).

use super::cache::KeyValueCache;
use super::config::ModelConfig;
use super::layer::Layer;
use super::rope::RopeTable;
use crate::kernels::{as_dtype, causal_mask, rms_norm};
use crate::projection::{Parameter, Projection, Tape};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// A decoder-only transformer on a device.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// Its shape.
    pub config: ModelConfig,
    /// Where it lives, without autodiff.
    pub device: Device,
    /// Type of the activations.
    pub dtype: DType,
    pub(super) embed_tokens: Parameter,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Parameter,
    /// Absent where the head shares the embedding's weight.
    pub(super) lm_head: Option<Projection>,
}

/// What all layers of one forward share: geometry, rotary table, masks.
pub struct Context {
    /// Sequences.
    pub batch: usize,
    /// Tokens a sequence, padding included.
    pub time: usize,
    pub(super) rope: RopeTable,
    full: Option<Tensor<5>>,
    windowed: Option<(usize, Option<Tensor<5>>)>,
}

impl Context {
    /// The mask of a layer with this window.
    pub(super) fn mask(&self, window: Option<usize>) -> Option<Tensor<5>> {
        match (&self.windowed, window) {
            (Some((size, mask)), Some(window)) if *size == window => mask.clone(),
            _ => self.full.clone(),
        }
    }
}

impl Decoder {
    /// The shared context of a forward over `batch` sequences of `time` tokens after `past` cached ones.
    ///
    /// Sequences are padded on the right, so a causal mask also hides the padding from every real token.
    pub fn context(&self, batch: usize, time: usize, past: usize) -> Context {
        let config = &self.config;
        let keys = past + time;
        // A configuration has one window size at most.
        let window = config.windows.iter().flatten().next().copied();
        Context {
            batch,
            time,
            rope: RopeTable::new(
                &config.rope_scaling,
                config.rope_theta,
                config.head_dim,
                past,
                time,
                &self.device,
            ),
            full: causal_mask(time, keys, None, &self.device),
            windowed: window.map(|size| (size, causal_mask(time, keys, Some(size), &self.device))),
        }
    }

    /// Token ids, row-major `[batch · time]`, as a tensor on the model's device.
    pub fn ids(&self, ids: &[i64]) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(ids.to_vec(), [ids.len()]), &self.device)
    }

    /// Embeddings of the tokens, `[tokens, hidden]`.
    pub fn embed(&self, tape: &Tape, ids: Tensor<1, Int>) -> Tensor<2> {
        as_dtype(tape.read(&self.embed_tokens).select(0, ids), self.dtype)
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The final norm.
    pub fn final_norm(&self, tape: &Tape, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, tape.read(&self.norm), self.config.rms_norm_eps)
    }

    /// The head: `[tokens, hidden]` → logits `[tokens, vocab]`.
    pub fn head(&self, tape: &Tape, x: Tensor<2>) -> Tensor<2> {
        match &self.lm_head {
            Some(head) => head.forward(tape, x, None),
            None => {
                let weight = as_dtype(tape.read(&self.embed_tokens), x.dtype());
                x.matmul(weight.transpose())
            }
        }
    }

    /// The head's weight `[vocab, hidden]` if nothing about the head trains or is added to it.
    pub fn frozen_head(&self) -> Option<Tensor<2>> {
        match &self.lm_head {
            Some(head)
                if head.parameters().any(|p| p.trainable) || head.delta.is_some() || head.bias.is_some() =>
            {
                None
            }
            Some(head) => Some(head.weight.value.clone()),
            None if self.embed_tokens.trainable => None,
            None => Some(self.embed_tokens.value.clone()),
        }
    }

    /// Whether the embedding trains.
    pub fn trains_embedding(&self) -> bool {
        self.embed_tokens.trainable
    }

    /// Logits of all positions, `[batch · time, vocab]`, without autodiff.
    pub fn logits(&self, ids: &[i64], batch: usize) -> Tensor<2> {
        let hidden = self.hidden(ids, batch, None);
        self.head(&Tape::inference(), hidden)
    }

    /// Hidden states after the final norm, `[batch · time, hidden]`, without autodiff. With caches, the ids continue
    /// what the caches hold.
    pub fn hidden(&self, ids: &[i64], batch: usize, mut caches: Option<&mut [KeyValueCache]>) -> Tensor<2> {
        let tape = Tape::inference();
        let past = caches.as_ref().and_then(|caches| caches.first()).map_or(0, KeyValueCache::len);
        let context = self.context(batch, ids.len() / batch, past);
        let mut x = self.embed(&tape, self.ids(ids));
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = caches.as_mut().map(|caches| &mut caches[index]);
            x = layer.forward(&tape, x, &context, cache);
        }
        self.final_norm(&tape, x)
    }

    /// Empty caches, one a layer.
    pub fn caches(&self) -> Vec<KeyValueCache> {
        self.layers.iter().map(|_| KeyValueCache::default()).collect()
    }

    /// Every parameter, in a fixed order.
    pub fn parameters(&self) -> Vec<&Parameter> {
        let layers = self.layers.iter().flat_map(Layer::parameters);
        let head = self.lm_head.iter().flat_map(Projection::parameters);
        std::iter::once(&self.embed_tokens)
            .chain(layers)
            .chain(std::iter::once(&self.norm))
            .chain(head)
            .collect()
    }

    /// Every parameter, to be changed.
    pub fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        let layers = self.layers.iter_mut().flat_map(Layer::parameters_mut);
        let head = self.lm_head.iter_mut().flat_map(Projection::parameters_mut);
        std::iter::once(&mut self.embed_tokens)
            .chain(layers)
            .chain(std::iter::once(&mut self.norm))
            .chain(head)
            .collect()
    }

    /// Every projection: those of the layers, then an untied head.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        self.layers.iter().flat_map(Layer::projections).chain(&self.lm_head)
    }

    /// Every projection, to be changed.
    pub fn projections_mut(&mut self) -> impl Iterator<Item = &mut Projection> {
        self.layers.iter_mut().flat_map(Layer::projections_mut).chain(&mut self.lm_head)
    }

    /// Paths of all modules that hold a weight, as transformers spells them.
    pub fn module_paths(&self) -> Vec<String> {
        let weight = |p: &&Parameter| p.name.ends_with(".weight") && !p.name.contains(".lora_");
        let strip = |p: &Parameter| p.name.trim_end_matches(".weight").to_string();
        let mut paths: Vec<String> = self.parameters().into_iter().filter(weight).map(strip).collect();
        if self.lm_head.is_none() {
            paths.push("lm_head".to_string());
        }
        paths
    }
}
