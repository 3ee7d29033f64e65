//! The decoder: embedding, layers, final norm, head.
//!
//! The reference for every family is its modelling file in transformers (`models/llama/modeling_llama.py` and kin).

use super::HEAD;
use super::cache::Cache;
use super::config::ModelConfig;
use super::context::Context;
use super::layer::Layer;
use super::shapes::BaseShapes;
use crate::data::Batch;
use crate::kernels::{AdaptedLinear, LinearInput, adapted_linears, rms_norm};
use crate::projection::{
    Combination, Delta, Embedding, InputObserver, Parameter, Projection, Tape, TokenRows, project, pull_back,
    refresh,
};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use std::collections::BTreeMap;

/// A decoder-only transformer on a device.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// Its shape.
    pub config: ModelConfig,
    /// Where it lives, without autodiff.
    pub device: Device,
    /// Type of the activations.
    pub dtype: DType,
    /// The embedding.
    pub embed_tokens: Embedding,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Parameter,
    /// Absent where the head shares the embedding's weight.
    pub(super) lm_head: Option<Projection>,
    /// Rows in place of those of a head of its own.
    pub head_rows: Option<TokenRows>,
}

impl Decoder {
    /// The shared context of a forward over `batch` sequences of `time` tokens, padded on the right.
    pub fn context(&self, batch: usize, time: usize) -> Context {
        Context::padded(&self.config, batch, time, None, &self.device)
    }

    /// The shared context of a forward over a batch, padded or packed.
    pub fn batch_context(&self, batch: &Batch) -> Context {
        match &batch.segments {
            None => {
                let (rows, columns, lengths) = (batch.batch_size, batch.seq_len, Some(&*batch.lengths));
                Context::padded(&self.config, rows, columns, lengths, &self.device)
            }
            Some(segments) => Context::packed(&self.config, segments, batch.ids.len(), &self.device),
        }
    }

    /// Token ids, row-major `[batch · time]`, as a tensor on the model's device.
    pub fn ids(&self, ids: &[i64]) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(ids.to_vec(), [ids.len()]), &self.device)
    }

    /// Embeddings of the tokens, `[tokens, hidden]`.
    pub fn embed(&self, tape: &Tape, ids: Tensor<1, Int>) -> Tensor<2> {
        self.embed_tokens.forward(tape, ids, self.dtype)
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
            Some(head) => {
                let logits = project(tape, &[head], LinearInput::Plain(x.clone()), None);
                match &self.head_rows {
                    Some(rows) => rows.replace_logits(tape, logits, x, &head.weight.value),
                    None => logits,
                }
            }
            None => {
                let embedding = &self.embed_tokens;
                let term = embedding.head_term(tape);
                let map = AdaptedLinear { weight: tape.read(&embedding.weight), bias: None, term };
                let input = LinearInput::Plain(x.clone());
                let logits = adapted_linears(input, vec![map], None, tape.recomputes());
                match &embedding.rows {
                    Some(rows) => rows.replace_logits(tape, logits, x, &embedding.weight.value),
                    None => logits,
                }
            }
        }
    }

    /// Gives a head that shares the embedding's weight one of its own, with the same values and, until one of them
    /// changes, the same memory.
    pub fn part_head(&mut self) {
        if self.lm_head.is_none() {
            let weight = &self.embed_tokens.weight;
            self.lm_head = Some(Projection {
                path: HEAD.to_string(),
                weight: Parameter::matrix("lm_head.weight", weight.value.clone()),
                bias: None,
                delta: None,
            });
            self.config.tie_word_embeddings = false;
        }
    }

    /// The head's weight `[vocab, hidden]` if nothing about the head trains or is added to it.
    pub fn frozen_head(&self) -> Option<Tensor<2>> {
        let embedding = &self.embed_tokens;
        match &self.lm_head {
            Some(head) => {
                let changes = head.delta.is_some() || head.bias.is_some() || self.head_rows.is_some();
                (!changes && !head.weight.trainable).then(|| head.weight.value.clone())
            }
            None => {
                let changes = embedding.delta.is_some() || embedding.rows.is_some();
                (!changes && !embedding.weight.trainable).then(|| embedding.weight.value.clone())
            }
        }
    }

    /// Whether anything about the embedding trains.
    pub fn trains_embedding(&self) -> bool {
        self.embed_tokens.parameters().any(|parameter| parameter.trainable)
    }

    /// Logits of all positions, `[batch · time, vocab]`, without autodiff.
    pub fn logits(&self, ids: &[i64], batch: usize) -> Tensor<2> {
        let tape = Tape::inference();
        let context = self.context(batch, ids.len() / batch);
        let x = self.embed(&tape, self.ids(ids));
        let x = self.layers.iter().fold(x, |x, layer| layer.forward(&tape, x, &context, None));
        self.head(&tape, self.final_norm(&tape, x))
    }

    /// Appends `ids`, row-major `[rows · time]`, to the rows of `cache` and returns the logits of each row's next token,
    /// `[rows, vocab]`, without autodiff.
    pub fn extend(&self, ids: &[i64], cache: &mut Cache) -> Tensor<2> {
        self.extend_by(self.ids(ids), cache)
    }

    /// As [`extend`](Self::extend), by ids that are on the device.
    pub fn extend_by(&self, ids: Tensor<1, Int>, cache: &mut Cache) -> Tensor<2> {
        let tape = Tape::inference();
        let (rows, time) = (cache.rows(), ids.dims()[0] / cache.rows());
        let context = Context::continued(&self.config, cache, time, &self.device);
        let mut x = self.embed(&tape, ids);
        cache.length += time;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            x = layer.forward(&tape, x, &context, Some(cache));
        }
        if time > 1 {
            let features = x.dims()[1];
            x = x.reshape([rows, time, features]).narrow(1, time - 1, 1).reshape([rows, features]);
        }
        self.head(&tape, self.final_norm(&tape, x))
    }

    /// Shows the input of every projection to `observer`, in the order of the forward over the batch: those of the
    /// layers, then that of a head with a weight of its own, whose logits are not computed. Rows of padding are among
    /// the inputs.
    pub fn observe_inputs(&self, batch: &Batch, observer: InputObserver) {
        let tape = Tape::observing(observer);
        let context = self.batch_context(batch);
        let x = self.embed(&tape, self.ids(&batch.ids));
        let x = self.layers.iter().fold(x, |x, layer| layer.forward(&tape, x, &context, None));
        if let Some(head) = &self.lm_head {
            observer(&head.path, &self.final_norm(&tape, x));
        }
    }

    /// An empty cache for rows that begin with so many tokens of padding each.
    pub fn cache(&self, padding: Vec<usize>) -> Cache {
        Cache::new(self.layers.len(), padding, &self.device)
    }

    /// Every parameter, in a fixed order.
    pub fn parameters(&self) -> Vec<&Parameter> {
        let layers = self.layers.iter().flat_map(Layer::parameters);
        let head = self.lm_head.iter().flat_map(Projection::parameters);
        let head_rows = self.head_rows.as_ref().map(|rows| &rows.values);
        self.embed_tokens
            .parameters()
            .chain(layers)
            .chain(std::iter::once(&self.norm))
            .chain(head)
            .chain(head_rows)
            .collect()
    }

    /// Every parameter, to be changed.
    pub fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        let layers = self.layers.iter_mut().flat_map(Layer::parameters_mut);
        let head = self.lm_head.iter_mut().flat_map(Projection::parameters_mut);
        let head_rows = self.head_rows.as_mut().map(|rows| &mut rows.values);
        self.embed_tokens
            .parameters_mut()
            .chain(layers)
            .chain(std::iter::once(&mut self.norm))
            .chain(head)
            .chain(head_rows)
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

    /// Brings up to date what forwards read instead of the parameters that it is computed from: to be called whenever
    /// parameters have changed.
    pub fn refresh(&mut self) {
        refresh(self.projections_mut().filter_map(|projection| match &mut projection.delta {
            Some(Delta::Combination(form)) => Some(form),
            _ => None,
        }));
    }

    /// Makes gradients of the parameters, by name, of those of what forwards read instead of them.
    pub fn pull_back(&self, gradients: &mut BTreeMap<String, Tensor<2>>) {
        pull_back(self.combinations(), gradients);
    }

    /// Name and shape of everything that a step gives a gradient for: the parameters that train, and what is read
    /// instead of them.
    pub fn differentiated(&self) -> Vec<(&str, [usize; 2])> {
        let trained = self.parameters().into_iter().filter(|parameter| parameter.trainable);
        let trained = trained.map(|parameter| (parameter.name.as_str(), parameter.value.dims()));
        let factors = self.combinations().flat_map(|form| [&form.a, &form.b]);
        let factors = factors.filter(|factor| factor.coefficients.trainable);
        trained.chain(factors.map(|factor| (factor.name(), factor.value().dims()))).collect()
    }

    fn combinations(&self) -> impl Iterator<Item = &Combination> {
        self.projections().filter_map(|projection| match &projection.delta {
            Some(Delta::Combination(form)) => Some(form),
            _ => None,
        })
    }

    /// Modules of the base that hold a weight, by path as transformers spells it, with the weight's shape. A head that
    /// shares the embedding's weight is one of them.
    pub fn base_shapes(&self) -> BaseShapes {
        self.config.base_shapes()
    }
}
