//! What one decoder layer holds in a forward and a backward.
//!
//! Where the toolkit's [`kernels`](crate::kernels) serve, a group of projections with the norm or gate in front of it is
//! one operation, and so is attention: each keeps its raw input, `h` unless that is computed again, and the small
//! `h·Aᵀ`. Elsewhere, and for changes that are more than `s·B·A`, it is counted from the compositions by what burn's
//! autodiff keeps: a product keeps an operand only where the other one is tracked, sums and views keep nothing, `exp`,
//! `sqrt` and `sigmoid` keep their input. Buffers that several operations keep are one buffer.

use super::super::method::{ParameterRole, PlannedParameter};
use super::super::step::GradientCheckpointing;
use super::BatchShape;
use crate::kernels::{MOST_JOINT, RANK_STEP};
use crate::model::{ComputeType, ModelConfig};

/// Bytes of f32, in which scores and statistics are taken whatever the activations' type.
const F32: u64 = 4;
/// The CPU's attention lays heads out in whole panels of so many columns.
const PANEL: u64 = 16;
/// Bytes of weights that the CPU's kernels lay out at a time, at most.
const PACKED: u64 = 8 << 20;

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Machine {
    /// The CPU, with the process's own memory.
    pub host: bool,
    /// Type of weights and activations.
    pub compute: ComputeType,
}

impl Machine {
    /// Bytes of an activation.
    pub(super) fn element(self) -> u64 {
        match self.compute {
            ComputeType::F32 => 4,
            ComputeType::Bf16 => 2,
        }
    }

    /// Whether there are kernels for linear maps, norms, gates and losses.
    pub(super) fn has_kernels(self) -> bool {
        !self.host || self.compute == ComputeType::F32
    }

    /// Whether there are kernels for attention of frozen head norms.
    pub(super) fn attends(self, head_dim: usize) -> bool {
        match self.host {
            true => self.compute == ComputeType::F32,
            false => {
                self.compute == ComputeType::Bf16
                    && head_dim.is_multiple_of(16)
                    && (16..=256).contains(&head_dim)
            }
        }
    }

    /// Whether what the kernels free stays with them until the step is over, for the next buffer of that size: then not
    /// the fullest moment counts but every size at its own.
    pub(super) fn pools(self) -> bool {
        self.host && self.has_kernels()
    }
}

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
    /// The change has a further part, a bias.
    part: bool,
    /// A factor on the input trains.
    input_gain: bool,
    /// Entries of a sparse change.
    entries: u64,
    /// Entries of the gradient that a selection phase watches.
    candidates: u64,
}

impl Module {
    /// Whether its input is kept for the gradient of a weight or of a factor.
    fn keeps_input(self) -> bool {
        self.own || (self.rank > 0 && !self.dropout && !self.frozen_factor)
    }

    /// Whether its change is more than the kernels have, and is composed on top of them.
    fn is_composed(self) -> bool {
        let is_low_rank = self.rank > 0 && self.part;
        is_low_rank || self.gain || self.input_gain || self.entries > 0
    }

    /// What the low-rank path keeps for itself, by token: the product with `A`; under dropout, where it is composed, what
    /// is left of the input, and without kernels the mask too; under a gain the two products that it scales. A gain alone
    /// keeps what it scales and, in front of the weight, what it makes of that.
    fn keeps(self, rows: u64, columns: u64, has_kernels: bool) -> u64 {
        let masked = if self.dropout {
            let reads_left = !self.frozen_factor || self.gain;
            let left = u64::from(reads_left && (self.is_composed() || !has_kernels));
            (left + u64::from(!has_kernels)) * columns
        } else {
            0
        };
        let gained = match (self.gain, self.rank) {
            (false, _) => 0,
            (true, 0) => rows,
            (true, _) => 2 * rows,
        };
        self.rank + masked + gained + if self.input_gain { columns } else { 0 }
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
    head_dim: u64,
    qk_norm: bool,
    machine: Machine,
    /// Attention is one operation.
    joint: bool,
    /// In the order q, k, v, o, gate, up, down.
    modules: [Module; 7],
    /// Norm weights that train.
    norms: u64,
    /// Bytes of trained weights in the type of the activations, where that is another one.
    casts: u64,
}

impl LayerShape {
    /// The layer `index` when `parameters` train.
    pub(super) fn new(
        config: &ModelConfig,
        index: usize,
        parameters: &[PlannedParameter],
        machine: Machine,
    ) -> Self {
        let projections = config.layer_projections(index);
        let mut modules = [Module::default(); 7];
        let (mut norms, mut head_norms, mut own) = (0, false, 0);
        let prefix = format!("model.layers.{index}.");
        for parameter in parameters.iter().filter(|parameter| parameter.module.starts_with(&prefix)) {
            match projections.iter().position(|projection| projection.path == parameter.module) {
                Some(at) => match parameter.role {
                    ParameterRole::Own if parameter.shape.shape.len() == 2 => {
                        modules[at].own = true;
                        own += parameter.shape.numel();
                    }
                    ParameterRole::Own => {}
                    ParameterRole::Factor { rank, dropout } => {
                        // Two factors of a pair name the same rank.
                        modules[at].rank = modules[at].rank.max(rank as u64);
                        modules[at].dropout |= dropout;
                        modules[at].frozen_factor |= !parameter.trainable;
                    }
                    ParameterRole::Sparse { candidates } => {
                        modules[at].entries = parameter.shape.numel();
                        modules[at].candidates = candidates as u64;
                    }
                    ParameterRole::Computed { rank, dropout } => {
                        modules[at].rank = modules[at].rank.max(rank as u64);
                        modules[at].dropout |= dropout;
                    }
                    ParameterRole::Gain => modules[at].gain = true,
                    ParameterRole::InputGain => modules[at].input_gain = true,
                    ParameterRole::Scaling { rank, dropout } => {
                        modules[at].rank = rank as u64;
                        modules[at].dropout |= dropout;
                        modules[at].frozen_factor = true;
                    }
                    ParameterRole::Part => modules[at].part = true,
                },
                None if parameter.module.ends_with("layernorm") => norms += 1,
                None => head_norms = true,
            }
        }
        let element = machine.element();
        Self {
            hidden: config.hidden_size as u64,
            query: (config.num_attention_heads * config.head_dim) as u64,
            key_value: (config.num_key_value_heads * config.head_dim) as u64,
            wide: config.intermediate_size as u64,
            heads: config.num_attention_heads as u64,
            head_dim: config.head_dim as u64,
            qk_norm: config.qk_norm,
            machine,
            joint: machine.attends(config.head_dim) && !head_norms,
            modules,
            norms,
            casts: if element < F32 { own * element } else { 0 },
        }
    }

    fn scores(&self, batch: &BatchShape) -> u64 {
        batch.pairs * self.heads
    }

    /// Columns of queries, keys and values.
    fn qkv(&self) -> u64 {
        self.query + 2 * self.key_value
    }

    /// Outputs and inputs of the modules.
    fn dims(&self) -> [(u64, u64); 7] {
        let (hidden, query, key_value, wide) = (self.hidden, self.query, self.key_value, self.wide);
        [
            (query, hidden),
            (key_value, hidden),
            (key_value, hidden),
            (hidden, query),
            (wide, hidden),
            (wide, hidden),
            (hidden, wide),
        ]
    }

    /// The most bytes that a sparse change has at a time beside what everything else has: input and gradient laid out by
    /// blocks of tokens, on the CPU in f32.
    fn sparse(&self, batch: &BatchShape) -> u64 {
        let element = if self.machine.host { F32 } else { self.machine.element() };
        let changed = self.modules.iter().zip(self.dims()).filter(|(module, _)| module.entries > 0);
        let features = changed.map(|(_, (rows, columns))| rows + columns).max();
        batch.tokens() * features.unwrap_or(0) * element
    }

    /// The most bytes that watching a gradient takes at a time: a dense one in f32 on its device and on the host.
    pub(super) fn selection(&self) -> u64 {
        let watched = self.modules.iter().zip(self.dims()).filter(|(module, _)| module.candidates > 0);
        watched.map(|(_, (rows, columns))| 2 * rows * columns * F32).max().unwrap_or(0)
    }

    /// What the changes of the modules from `first` to `last` keep by token.
    fn terms(&self, first: usize, last: usize) -> u64 {
        let (modules, has_kernels) = (self.modules.iter().zip(self.dims()), self.machine.has_kernels());
        let modules = modules.take(last + 1).skip(first);
        modules.map(|(module, (rows, columns))| module.keeps(rows, columns, has_kernels)).sum()
    }

    /// Bytes of the low-rank factors in the activations' type, which a GPU's kernels keep for the backward where they are
    /// small: those of the modules that share an input lie as one pair, with zeros between the `B`s.
    fn factors(&self) -> u64 {
        if self.machine.host {
            return 0;
        }
        let dims = self.dims();
        let of_group = |modules: std::ops::Range<usize>| {
            let rank: u64 =
                self.modules[modules.clone()].iter().map(|m| m.rank.next_multiple_of(RANK_STEP as u64)).sum();
            let rows: u64 = dims[modules.clone()].iter().map(|(rows, _)| rows).sum();
            let kept = if rank <= MOST_JOINT as u64 { rank * (rows + dims[modules.start].1) } else { 0 };
            kept * self.machine.element()
        };
        [0..3, 3..4, 4..6, 6..7].map(of_group).iter().sum()
    }

    /// Features by token of the largest input that dropout makes a copy of for a moment.
    fn dropped(&self) -> u64 {
        let [.., down] = self.modules;
        match self.modules.iter().any(|module| module.dropout) {
            true if down.dropout => self.wide,
            true => self.hidden.max(self.query),
            false => 0,
        }
    }

    /// Whether the normed or gated input of the modules from `first` to `last` is kept: for what is composed on it, it
    /// always is.
    fn keeps_h(&self, first: usize, last: usize, checkpointing: GradientCheckpointing) -> bool {
        checkpointing != GradientCheckpointing::Selective
            || self.modules[first..=last].iter().any(|module| module.is_composed())
    }

    /// Bytes kept of the attention half.
    fn keeps_attention(&self, batch: &BatchShape, checkpointing: GradientCheckpointing) -> u64 {
        let element = self.machine.element();
        let terms = self.terms(0, 3);
        if !self.machine.has_kernels() {
            let [q, k, v, o, ..] = self.modules;
            let normed = [q, k, v].iter().any(|module| module.keeps_input());
            // The scaled queries, the rotated keys, the values; then what goes into o.
            let mut by_token = self.qkv() + terms + if normed { self.hidden } else { 0 };
            by_token += if o.keeps_input() { self.query } else { 0 };
            let normed_heads = if self.qk_norm { self.query + self.key_value } else { 0 };
            // The input and the heads before their norms are kept in f32.
            return batch.tokens() * (by_token * element + (self.hidden + normed_heads) * F32)
                + self.keeps_scores(batch);
        }
        // Input, norm, queries with keys and values, result.
        let normed = if self.keeps_h(0, 2, checkpointing) { self.hidden } else { 0 };
        let by_token = self.hidden + normed + self.qkv() + self.query + terms;
        if self.joint {
            // The logarithms of the denominators.
            return batch.tokens() * (by_token * element + self.heads * F32);
        }
        let normed_heads = if self.qk_norm { self.query + self.key_value } else { 0 };
        batch.tokens() * (by_token + normed_heads) * element + self.keeps_scores(batch)
    }

    /// Scores of a composed attention: shifted by their maximum, exponentiated, and as weights.
    fn keeps_scores(&self, batch: &BatchShape) -> u64 {
        self.scores(batch) * (2 * F32 + self.machine.element())
    }

    /// Bytes kept of the feed-forward half.
    fn keeps_feed_forward(&self, batch: &BatchShape, checkpointing: GradientCheckpointing) -> u64 {
        let element = self.machine.element();
        let terms = self.terms(4, 6);
        if !self.machine.has_kernels() {
            let [.., gate, up, down] = self.modules;
            let normed = gate.keeps_input() || up.keeps_input();
            // gate, its sigmoid, their product, up.
            let mut by_token = 4 * self.wide + terms + if normed { self.hidden } else { 0 };
            by_token += if down.keeps_input() { self.wide } else { 0 };
            return batch.tokens() * (by_token * element + self.hidden * F32);
        }
        // Input, norm, gate with up, gated.
        let normed = if self.keeps_h(4, 5, checkpointing) { self.hidden } else { 0 };
        let gated = if self.keeps_h(6, 6, checkpointing) { self.wide } else { 0 };
        batch.tokens() * (self.hidden + normed + 2 * self.wide + gated + terms) * element
    }

    /// Bytes that the layer's forward keeps for its backward.
    pub(super) fn keeps(&self, batch: &BatchShape, checkpointing: GradientCheckpointing) -> u64 {
        // A composed norm whose weight trains needs the normed input.
        let norms = if self.machine.has_kernels() { 0 } else { self.norms * self.hidden };
        self.keeps_attention(batch, checkpointing)
            + self.keeps_feed_forward(batch, checkpointing)
            + batch.tokens() * norms * self.machine.element()
            + self.factors()
            + self.casts
    }

    /// The most bytes that its backward has at a time beyond what the forward kept.
    pub(super) fn backward(&self, batch: &BatchShape, checkpointing: GradientCheckpointing) -> u64 {
        self.backward_of_maps(batch, checkpointing) + self.sparse(batch)
    }

    fn backward_of_maps(&self, batch: &BatchShape, checkpointing: GradientCheckpointing) -> u64 {
        let (tokens, element) = (batch.tokens(), self.machine.element());
        if !self.machine.has_kernels() {
            // Two gradients of the wide activation meet; output, its gradient and the gradient of the sum are there.
            let feed_forward = tokens * element * (2 * self.wide + 3 * self.hidden);
            // Two more of the scores' size, once the feed-forward half is gone.
            let attention = tokens * element * 3 * self.hidden + self.scores(batch) * 2 * F32;
            return feed_forward.max(attention.saturating_sub(self.keeps_feed_forward(batch, checkpointing)));
        }
        // Output, its gradient and the gradient of the sum; gradients of the gated and of gate with up.
        let feed_forward = tokens * element * (3 * self.hidden + 3 * self.wide + self.dropped());
        let scratch = match (self.joint, self.machine.host) {
            // Prepared queries, keys and values with the gradients of each query head's, in whole panels; keys and
            // values once more.
            (true, true) => {
                let panels = self.head_dim.next_multiple_of(PANEL) * self.heads;
                let of_keys = panels * self.key_value / self.query;
                tokens * F32 * (4 * panels + 2 * of_keys + 2 * self.key_value)
            }
            // Rotated queries and keys, and a sum for each head.
            (true, false) => tokens * ((self.query + self.key_value) * element + self.heads * F32),
            (false, _) => self.scores(batch) * 2 * F32,
        };
        let of_qkv = tokens * element * self.qkv();
        if self.machine.pools() {
            // What is computed again has a buffer beside what is kept.
            let normed = if self.keeps_h(4, 5, checkpointing) { 0 } else { self.hidden };
            let gated = if self.keeps_h(6, 6, checkpointing) { 0 } else { self.wide };
            let by_token = self.hidden + normed + gated;
            return feed_forward + tokens * element * by_token + of_qkv + scratch + 2 * self.packed();
        }
        let attention = tokens * element * (3 * self.hidden + self.query) + of_qkv + scratch;
        feed_forward.max(attention.saturating_sub(self.keeps_feed_forward(batch, checkpointing)))
    }

    /// The most bytes that its forward has at a time where nothing is kept.
    pub(super) fn forward(&self, batch: &BatchShape) -> u64 {
        let (tokens, element) = (batch.tokens(), self.machine.element());
        let scratch = match (self.joint, self.machine.host) {
            (true, true) => {
                let panels = self.head_dim.next_multiple_of(PANEL) * self.heads;
                let of_keys = panels * self.key_value / self.query;
                tokens * F32 * (panels + 2 * of_keys + self.key_value + self.heads)
            }
            (true, false) => tokens * ((self.query + self.key_value) * element + self.heads * F32),
            (false, _) => self.scores(batch) * 2 * F32,
        };
        if !self.machine.has_kernels() {
            let attention = tokens * (self.hidden + self.query + self.qkv()) * element + scratch;
            let feed_forward = tokens * (3 * self.wide + 4 * self.hidden) * element;
            return attention.max(feed_forward);
        }
        let attention = tokens * (self.query + self.qkv()) * element + scratch;
        let feed_forward = tokens * (3 * self.wide + self.hidden) * element;
        let input = tokens * self.hidden * element;
        match self.machine.pools() {
            true => input + attention + feed_forward + self.packed(),
            false => input + attention.max(feed_forward),
        }
    }

    /// Weights laid out for a product.
    fn packed(&self) -> u64 {
        (2 * self.wide * self.hidden * F32).min(PACKED)
    }

    /// Bytes of the layer's input.
    pub(super) fn input(&self, batch: &BatchShape) -> u64 {
        batch.tokens() * self.hidden * self.machine.element()
    }

    /// Whether attention is one operation, which needs no masks.
    pub(super) fn attends_jointly(&self) -> bool {
        self.joint
    }
}
