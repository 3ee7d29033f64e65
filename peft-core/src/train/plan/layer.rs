//! What one decoder layer holds in a forward and a backward.
//!
//! Counted from the operations in [`kernels`](crate::kernels) by what burn's autodiff keeps of each: a product keeps an
//! operand only where the other one is tracked, sums and views keep nothing, `exp`, `sqrt` and `sigmoid` keep their
//! input. Buffers that several operations keep are one buffer.

use super::super::method::{ParameterRole, PlannedParameter};
use super::BatchShape;
use crate::model::ModelConfig;

/// Bytes of f32, in which norms and scores are taken whatever the activations' type.
const F32: u64 = 4;

/// How a layer's modules train.
#[derive(Debug, Clone, Copy, Default)]
struct Module {
    /// Its own weight trains.
    own: bool,
    /// Sum of the ranks of its changes.
    rank: u64,
    /// A change drops input features.
    dropout: bool,
    /// The factor that the input meets stays as it is.
    frozen_factor: bool,
    /// A factor on the result trains.
    gain: bool,
}

impl Module {
    /// Whether its input is kept for the gradient of a weight or of a factor.
    fn keeps_input(self) -> bool {
        self.own || (self.rank > 0 && !self.dropout && !self.frozen_factor)
    }

    /// What the low-rank path keeps for itself, by token: the product with `A`; under dropout mask and masked input;
    /// under a gain the two products that it scales.
    fn keeps(self, rows: u64, columns: u64) -> u64 {
        let masked = match (self.dropout, self.frozen_factor) {
            (false, _) => 0,
            (true, false) => 2 * columns,
            (true, true) => columns,
        };
        self.rank + masked + if self.gain { 2 * rows } else { 0 }
    }
}

/// Widths of a layer and how it trains.
#[derive(Debug, Clone)]
pub(super) struct LayerShape {
    hidden: u64,
    query: u64,
    key_value: u64,
    wide: u64,
    heads: u64,
    qk_norm: bool,
    /// Bytes of an activation.
    element: u64,
    /// In the order q, k, v, o, gate, up, down.
    modules: [Module; 7],
    /// Norm weights that train.
    norms: u64,
}

impl LayerShape {
    /// The layer `index` when `parameters` train and activations have `element` bytes.
    pub(super) fn new(
        config: &ModelConfig,
        index: usize,
        parameters: &[PlannedParameter],
        element: u64,
    ) -> Self {
        let projections = config.layer_projections(index);
        let mut modules = [Module::default(); 7];
        let mut norms = 0;
        let prefix = format!("model.layers.{index}.");
        for parameter in parameters.iter().filter(|parameter| parameter.module.starts_with(&prefix)) {
            match projections.iter().position(|projection| projection.path == parameter.module) {
                Some(at) => match parameter.role {
                    ParameterRole::Own => modules[at].own |= parameter.shape.shape.len() == 2,
                    ParameterRole::Factor { rank, dropout } => {
                        // Two factors of a pair name the same rank.
                        modules[at].rank = modules[at].rank.max(rank as u64);
                        modules[at].dropout |= dropout;
                        modules[at].frozen_factor |= !parameter.trainable;
                    }
                    ParameterRole::Gain => modules[at].gain = true,
                    ParameterRole::Part => {}
                },
                None => norms += u64::from(parameter.module.ends_with("layernorm")),
            }
        }
        Self {
            hidden: config.hidden_size as u64,
            query: (config.num_attention_heads * config.head_dim) as u64,
            key_value: (config.num_key_value_heads * config.head_dim) as u64,
            wide: config.intermediate_size as u64,
            heads: config.num_attention_heads as u64,
            qk_norm: config.qk_norm,
            element,
            modules,
            norms,
        }
    }

    fn scores(&self, batch: &BatchShape) -> u64 {
        batch.pairs * self.heads
    }

    /// Bytes kept of the attention half.
    fn keeps_attention(&self, batch: &BatchShape) -> u64 {
        let [q, k, v, o, ..] = self.modules;
        let normed = [q, k, v].iter().any(|module| module.keeps_input());
        // The scaled queries, the rotated keys, the values; then what goes into o.
        let mut by_token = self.query + 2 * self.key_value + if normed { self.hidden } else { 0 };
        by_token += q.keeps(self.query, self.hidden);
        by_token += [k, v].iter().map(|module| module.keeps(self.key_value, self.hidden)).sum::<u64>();
        by_token += o.keeps(self.hidden, self.query) + if o.keeps_input() { self.query } else { 0 };
        let normed_heads = if self.qk_norm { self.query + self.key_value } else { 0 };
        // The input and the heads before their norms are kept in f32. Of the scores: shifted by their maximum,
        // exponentiated, and as weights.
        batch.tokens() * (by_token * self.element + (self.hidden + normed_heads) * F32)
            + self.scores(batch) * (2 * F32 + self.element)
    }

    /// Bytes kept of the feed-forward half.
    fn keeps_feed_forward(&self, batch: &BatchShape) -> u64 {
        let [.., gate, up, down] = self.modules;
        let normed = gate.keeps_input() || up.keeps_input();
        // gate, its sigmoid, their product, up.
        let mut by_token = 4 * self.wide + if normed { self.hidden } else { 0 };
        by_token += gate.keeps(self.wide, self.hidden) + up.keeps(self.wide, self.hidden);
        by_token += down.keeps(self.hidden, self.wide) + if down.keeps_input() { self.wide } else { 0 };
        batch.tokens() * (by_token * self.element + self.hidden * F32)
    }

    /// Bytes that the layer's forward keeps for its backward.
    pub(super) fn keeps(&self, batch: &BatchShape) -> u64 {
        // A norm's weight that trains needs the normed input.
        self.keeps_attention(batch)
            + self.keeps_feed_forward(batch)
            + batch.tokens() * self.norms * self.hidden * self.element
    }

    /// The most bytes that its backward has at a time beyond what the forward kept.
    pub(super) fn backward(&self, batch: &BatchShape) -> u64 {
        // Two gradients of the wide activation meet; output, its gradient and the gradient of the sum are there.
        let feed_forward = batch.tokens() * self.element * (2 * self.wide + 3 * self.hidden);
        // Two more of the scores' size, once the feed-forward half is gone.
        let attention = batch.tokens() * self.element * 3 * self.hidden + self.scores(batch) * 2 * F32;
        feed_forward.max(attention.saturating_sub(self.keeps_feed_forward(batch)))
    }

    /// The most bytes that its forward has at a time where nothing is kept.
    pub(super) fn forward(&self, batch: &BatchShape) -> u64 {
        let by_token = self.hidden + 2 * self.query + 2 * self.key_value;
        let attention = batch.tokens() * by_token * self.element + self.scores(batch) * 2 * F32;
        let feed_forward = batch.tokens() * (3 * self.wide + 4 * self.hidden) * self.element;
        attention.max(feed_forward)
    }

    /// Bytes of the layer's input.
    pub(super) fn input(&self, batch: &BatchShape) -> u64 {
        batch.tokens() * self.hidden * self.element
    }
}
