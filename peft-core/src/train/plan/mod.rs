//! What a run will need, told before it runs: from the model's shapes, the data's lengths and the method's parameters.
//!
//! [`predict`] adds up, for each phase of a run, what the code keeps alive then. A phase's peak is a sum of components,
//! and the run's peak is the largest of them.

mod advice;
mod batches;
mod calibrate;
mod layer;

pub use advice::{Advice, Batching, advise, fastest_that_fits};
pub use batches::{BatchShape, RunBatches, evaluation_batches};
pub use calibrate::{Calibration, calibrate};

use super::loss::chunk_rows;
use super::method::{ParameterRole, PlannedParameter};
use super::step::{GradientCheckpointing, StepSettings};
use crate::model::{ComputeType, EMBEDDING, ModelConfig};
use layer::{LayerShape, Machine};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;

/// Bytes of f32: trained parameters, gradients, the optimizer's memory, losses.
const F32: u64 = 4;
/// Bytes of a place in a batch.
const I32: u64 = 4;
/// Words whose logits the CPU's loss of a frozen head has at a time.
const HEAD_TILE: u64 = 512;
/// Rows that one of its threads has at a time.
const HEAD_ROWS: u64 = 66;

/// A run, as far as its memory depends on it.
#[derive(Debug, Clone)]
pub struct Workload<'a> {
    /// The decoder.
    pub model: &'a ModelConfig,
    /// Type of weights and activations.
    pub compute: ComputeType,
    /// What the method adds, and what of the checkpoint trains.
    pub parameters: &'a [PlannedParameter],
    /// How a step runs.
    pub step: StepSettings,
    /// Micro-batches a step.
    pub accumulation: usize,
    /// Shapes of the training batches.
    pub batches: BTreeSet<BatchShape>,
    /// Shapes of the validation batches.
    pub evaluation: BTreeSet<BatchShape>,
    /// Prompt and answer of the longest generation; 0 where nothing is generated.
    pub generated_tokens: usize,
    /// Generations at a time.
    pub generated_rows: usize,
    /// Values that the optimizer keeps for each trained one.
    pub moments: u64,
    /// Bytes that the process has before the model is loaded: program, tokenizer, data.
    pub runtime: u64,
    /// Whether memory is the process's own, or a GPU's pool.
    pub host: bool,
}

/// Bytes by what holds them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Components {
    /// Program, tokenizer, data.
    pub runtime: u64,
    /// The checkpoint's weights.
    pub base_weights: u64,
    /// Parameters that the method adds.
    pub added_parameters: u64,
    /// The optimizer's memory of every trained parameter.
    pub optimizer_state: u64,
    /// Gradients of the trained parameters.
    pub gradients: u64,
    /// Activations of the layers: kept for the backward, and passing.
    pub activations: u64,
    /// Logits and hidden states of a chunk of supervised positions.
    pub logits: u64,
    /// Keys and values of a generation.
    pub key_value_cache: u64,
    /// Copies made for an update or for a file.
    pub copies: u64,
    /// What the allocator holds beyond what was asked of it.
    pub allocator: u64,
}

impl Components {
    /// Name and bytes of each.
    pub fn entries(&self) -> [(&'static str, u64); 10] {
        [
            ("runtime", self.runtime),
            ("base weights", self.base_weights),
            ("added parameters", self.added_parameters),
            ("optimizer state", self.optimizer_state),
            ("gradients", self.gradients),
            ("activations", self.activations),
            ("logits", self.logits),
            ("key/value cache", self.key_value_cache),
            ("copies", self.copies),
            ("allocator", self.allocator),
        ]
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.entries().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// A part of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Weights come from their files.
    Loading,
    /// Validation.
    Evaluation,
    /// Answers for the exact match.
    Generation,
    /// Forward and backward.
    Step,
    /// The same where the method watches dense gradients to choose positions.
    Selection,
    /// The optimizer's step.
    Update,
    /// A checkpoint is written.
    Saving,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Loading => "loading",
            Phase::Evaluation => "evaluation",
            Phase::Generation => "generation",
            Phase::Step => "forward and backward",
            Phase::Selection => "selection of positions",
            Phase::Update => "update",
            Phase::Saving => "saving",
        })
    }
}

/// The most that a phase holds at a time.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PhaseMemory {
    /// The phase.
    pub phase: Phase,
    /// Its peak.
    pub bytes: u64,
    /// What the peak is made of.
    pub components: Components,
    /// The batch with which it comes, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchShape>,
}

/// The memory of a run.
#[derive(Debug, Clone, Serialize)]
pub struct MemoryPlan {
    /// The run's peak.
    pub peak_bytes: u64,
    /// The phase that has it.
    pub peak_phase: Phase,
    /// What the peak is made of.
    pub components: Components,
    /// Every phase.
    pub phases: Vec<PhaseMemory>,
}

/// Predicts the memory of a run.
pub fn predict(work: &Workload) -> MemoryPlan {
    let sizes = Sizes::of(work);
    let mut phases = vec![phase(work, Phase::Loading, sizes.loading(work), None)];
    let largest = |phase_name, of: &dyn Fn(&BatchShape) -> Components, batches: &BTreeSet<BatchShape>| {
        let all = batches.iter().map(|batch| phase(work, phase_name, of(batch), Some(*batch)));
        all.max_by_key(|phase| phase.bytes)
    };
    phases.extend(largest(Phase::Evaluation, &|batch| sizes.evaluation(work, batch), &work.evaluation));
    if work.generated_tokens > 0 {
        phases.push(phase(work, Phase::Generation, sizes.generation(work), None));
    }
    phases.extend(largest(Phase::Step, &|batch| sizes.step(work, batch), &work.batches));
    if sizes.selection > 0 {
        phases.extend(largest(Phase::Selection, &|batch| sizes.selection(work, batch), &work.batches));
    }
    phases.push(phase(work, Phase::Update, sizes.update(), None));
    phases.push(phase(work, Phase::Saving, sizes.saving(), None));
    let peak = phases.iter().copied().reduce(|a, b| if b.bytes > a.bytes { b } else { a });
    // There is always the phase of loading.
    let peak = peak.unwrap_or(phases[0]);
    MemoryPlan { peak_bytes: peak.bytes, peak_phase: peak.phase, components: peak.components, phases }
}

fn phase(work: &Workload, phase: Phase, held: Components, batch: Option<BatchShape>) -> PhaseMemory {
    let mut components = Components { runtime: work.runtime, ..held };
    components.allocator = allocator(work.host, &components);
    PhaseMemory { phase, bytes: components.total(), components, batch }
}

/// What the allocator holds beyond what was asked of it.
///
/// Blocks that come and go are rounded up to size classes an eighth apart, and freed ones stay with the process for a
/// second and with the thread that had them. How much that is was measured, on two cores: it is no law of nature, nor
/// are the figures of a GPU's pool, which were not measured.
fn allocator(host: bool, held: &Components) -> u64 {
    let Components { added_parameters, optimizer_state, gradients, activations, logits, .. } = held;
    let moving = added_parameters + optimizer_state + gradients + activations + logits;
    let kept = if host { HOST_RETAINED } else { DEVICE_RETAINED };
    kept + moving / 10
}

/// Freed memory that the process keeps, whatever the model's size.
const HOST_RETAINED: u64 = 48 << 20;
/// Context and kernels of a GPU.
const DEVICE_RETAINED: u64 = 600 << 20;

/// Sizes that hold through the run.
struct Sizes {
    /// By layer.
    layers: Vec<LayerShape>,
    /// The first layer through which a gradient must pass, or the number of layers.
    first_tracked: usize,
    base_weights: u64,
    added_parameters: u64,
    /// Bytes of all trained parameters, f32.
    trained: u64,
    /// Bytes of the factors that are computed from them, f32.
    computed: u64,
    /// Bytes of the largest trained parameter.
    largest_trained: u64,
    /// Bytes of the largest weight of the checkpoint, f32.
    largest_weight: u64,
    /// Bytes of the optimizer's memory.
    optimizer_state: u64,
    /// Bytes of the largest dense gradient that is watched, and of what is kept of all of them.
    selection: u64,
    /// Whether the head's weight, own or shared, gets a gradient.
    trains_head: bool,
    trains_embedding: bool,
    /// Bytes of embedding or head, f32.
    vocabulary: u64,
    /// Nothing changes the head, whose loss is then one operation.
    frozen_head: bool,
    element: u64,
    machine: Machine,
    heads: HeadShape,
}

struct HeadShape {
    hidden: u64,
    vocabulary: u64,
}

impl Sizes {
    fn of(work: &Workload) -> Self {
        let model = work.model;
        let machine = Machine { host: work.host, compute: work.compute };
        let element = machine.element();
        let own =
            |name: &str| work.parameters.iter().any(|p| p.role == ParameterRole::Own && p.shape.name == name);
        let bytes = |parameter: &PlannedParameter| parameter.shape.numel() * F32;
        let trains_embedding = own("model.embed_tokens.weight");
        let changes_embedding = work.parameters.iter().any(|parameter| parameter.module == EMBEDDING);
        let trains_head = own("lm_head.weight") || (model.tie_word_embeddings && trains_embedding);
        let head = if model.tie_word_embeddings { EMBEDDING } else { "lm_head" };
        let tracked = |layer: usize| {
            let prefix = format!("model.layers.{layer}.");
            work.parameters.iter().any(|parameter| parameter.module.starts_with(&prefix))
        };
        let layers = model.num_hidden_layers;
        let first_tracked =
            if changes_embedding { 0 } else { (0..layers).find(|layer| tracked(*layer)).unwrap_or(layers) };
        let shapes = model.parameters();
        let weight = |shape: &crate::model::ParameterShape| {
            // A weight that trains is held in f32.
            shape.numel() * if own(&shape.name) { F32 } else { element }
        };
        let layers: Vec<LayerShape> =
            (0..layers).map(|index| LayerShape::new(model, index, work.parameters, machine)).collect();
        let dense_gradient = layers.iter().map(LayerShape::selection).max().unwrap_or(0);
        let candidates = work.parameters.iter().filter_map(|parameter| match parameter.role {
            ParameterRole::Sparse { candidates } => Some(candidates as u64),
            _ => None,
        });
        Self {
            layers,
            first_tracked,
            base_weights: shapes.iter().map(weight).sum(),
            added_parameters: work
                .parameters
                .iter()
                .filter(|p| p.role != ParameterRole::Own)
                .map(|p| bytes(p) + positions(p.role, p.shape.numel()))
                .sum(),
            optimizer_state: work
                .parameters
                .iter()
                .filter(|p| p.trainable)
                .map(|p| bytes(p) * p.role.moments(work.moments))
                .sum(),
            selection: dense_gradient + candidates.map(|count| count * CANDIDATE).sum::<u64>(),
            trained: work.parameters.iter().filter(|p| p.trainable).map(bytes).sum(),
            computed: work
                .parameters
                .iter()
                .filter(|p| matches!(p.role, ParameterRole::Computed { .. }))
                .map(bytes)
                .sum(),
            largest_trained: work.parameters.iter().filter(|p| p.trainable).map(bytes).max().unwrap_or(0),
            largest_weight: shapes.iter().map(|shape| shape.numel() * F32).max().unwrap_or(0),
            trains_head,
            trains_embedding,
            frozen_head: !work.parameters.iter().any(|parameter| parameter.module == head),
            vocabulary: (model.vocab_size * model.hidden_size) as u64 * F32,
            element,
            machine,
            heads: HeadShape { hidden: model.hidden_size as u64, vocabulary: model.vocab_size as u64 },
        }
    }

    /// What is there from the first step on.
    fn resident(&self) -> Components {
        Components {
            base_weights: self.base_weights,
            added_parameters: self.added_parameters,
            optimizer_state: self.optimizer_state,
            ..Components::default()
        }
    }

    fn loading(&self, _work: &Workload) -> Components {
        Components { base_weights: self.base_weights, copies: self.largest_weight, ..Components::default() }
    }

    /// Head and loss over a chunk of the batch's supervised positions.
    fn head(&self, work: &Workload, batch: &BatchShape, backward: bool) -> u64 {
        let HeadShape { hidden, vocabulary } = self.heads;
        let rows = batch.supervised as u64;
        let chunk =
            chunk_rows(work.step.loss_chunk_rows, work.model.vocab_size, batch.supervised, work.host) as u64;
        let element = self.element;
        if self.frozen_head && self.machine.has_kernels() {
            // On the CPU scores and weights of a tile of words for the rows in work, and the words packed in two ways,
            // two tiles of them; else the logits of a chunk, which turn into their gradient.
            let words = vocabulary.min(HEAD_TILE);
            let in_work = (rows / 2).min(HEAD_ROWS * rayon::current_num_threads() as u64);
            let logits = match self.machine.host {
                true => (2 * in_work + 4 * hidden) * words * F32,
                false => chunk * vocabulary * element,
            };
            // The hidden states that the last layer left, and those of the supervised rows: gathered, normed, laid out
            // for the product, and the gradients of the last two of these.
            let states = batch.tokens() + rows * if backward { 5 } else { 3 };
            return logits + states * hidden * element;
        }
        let logits = match self.machine.has_kernels() {
            // The logits, and their gradient.
            true => element * if backward { 2 } else { 1 },
            // These, or the logits and their exponentials; in f32 beside activations of half that.
            false => 2 * F32 + if element < F32 { element } else { 0 },
        };
        // The hidden states that the last layer left, and those of the supervised rows: gathered, normed, and the
        // gradients of both.
        let states = batch.tokens() + rows * if backward { 4 } else { 2 };
        chunk * vocabulary * logits + states * hidden * element
    }

    /// What all layers share.
    fn context(&self, work: &Workload, batch: &BatchShape) -> u64 {
        match self.layers.iter().all(LayerShape::attends_jointly) {
            // First and last token of each one's sequence, and its angles.
            true => batch.tokens() * (2 * I32 + work.model.head_dim as u64 * F32),
            false => context(work.model, batch),
        }
    }

    fn evaluation(&self, work: &Workload, batch: &BatchShape) -> Components {
        let layer = self.layers.iter().map(|layer| layer.forward(batch)).max().unwrap_or(0)
            + self.context(work, batch);
        let head = self.head(work, batch, false);
        let (activations, logits) = match self.machine.pools() {
            true => (layer, head),
            false if layer > head => (layer, 0),
            false => (0, head),
        };
        Components { activations, logits, ..self.resident() }
    }

    fn generation(&self, work: &Workload) -> Components {
        let model = work.model;
        let tokens = work.generated_tokens;
        let rows = work.generated_rows;
        let batch = BatchShape::padded(rows, tokens, 1);
        let slot = (rows * model.num_key_value_heads * model.head_dim) as u64 * self.element;
        // Buffers double when full; the old ones live until the copy is made, one layer at a time.
        let capacity = tokens.next_power_of_two().max(64) as u64;
        Components {
            activations: self.layers.iter().map(|layer| layer.forward(&batch)).max().unwrap_or(0)
                + context(model, &batch),
            key_value_cache: (model.num_hidden_layers as u64 + 1) * 2 * capacity * slot,
            ..self.resident()
        }
    }

    /// Forward and backward of a batch: the largest of the moments at which it may be fullest.
    fn step(&self, work: &Workload, batch: &BatchShape) -> Components {
        let checkpointing = work.step.gradient_checkpointing;
        let kept: Vec<u64> = self.layers.iter().map(|layer| layer.keeps(batch, checkpointing)).collect();
        let last = self.layers.len() - 1;
        let input = self.layers[last].input(batch);
        let shared = self.context(work, batch);
        // Of the layers below the first that trains nothing is kept but their result.
        let tracked = self.first_tracked.min(last)..=last;
        let (at_top, largest) = match checkpointing {
            GradientCheckpointing::Layers => {
                (last as u64 * input + kept[last], kept[tracked].iter().copied().max().unwrap_or(0))
            }
            _ => (kept[tracked].iter().sum(), kept[last]),
        };
        let any_tracked = self.first_tracked <= last;
        let (at_top, largest) =
            if any_tracked { (at_top, largest) } else { (self.layers[last].forward(batch), 0) };
        let gradients = self.trained + self.computed;
        let before = if work.accumulation > 1 { gradients } else { 0 };
        let head_gradient = if self.trains_head { self.vocabulary } else { 0 };
        let logits = self.head(work, batch, true);
        let backward = if any_tracked { self.layers[last].backward(batch, checkpointing) } else { 0 };
        let embedding = if self.trains_embedding { 2 * self.vocabulary } else { 0 };
        if self.machine.pools() {
            // Nothing goes back before the step is over.
            return Components {
                gradients: before + gradients,
                activations: at_top + largest.saturating_sub(kept[last]) + shared + backward + embedding,
                logits,
                ..self.resident()
            };
        }
        let head = Components {
            gradients: before + head_gradient,
            activations: at_top + shared,
            logits: logits + head_gradient,
            ..self.resident()
        };
        let top = Components {
            gradients: before + head_gradient,
            activations: at_top + shared + backward,
            ..self.resident()
        };
        // At the lower end all gradients are there and one layer is left; the embedding's gradient comes last.
        let bottom = Components {
            gradients: before + gradients,
            activations: shared + (largest + backward).max(embedding + input),
            ..self.resident()
        };
        [head, top, bottom].into_iter().max_by_key(Components::total).unwrap_or(top)
    }

    /// Forward and backward while dense gradients are watched, one at a time.
    fn selection(&self, work: &Workload, batch: &BatchShape) -> Components {
        let step = self.step(work, batch);
        Components { gradients: step.gradients + self.selection, ..step }
    }

    fn update(&self) -> Components {
        // Gradients of computed factors become those of the parameters while both are there; later new factors stand
        // beside the old ones.
        let gradients = self.trained + self.computed;
        Components { gradients, copies: 3 * self.largest_trained, ..self.resident() }
    }

    fn saving(&self) -> Components {
        Components {
            base_weights: self.base_weights,
            added_parameters: self.added_parameters,
            optimizer_state: 2 * self.trained,
            // The optimizer's memory is copied to the host, and tensors are written from copies.
            copies: 2 * self.trained + 3 * self.largest_trained,
            ..Components::default()
        }
    }
}

/// Bytes of a watched entry of a gradient: two sums in f32, its position, row and column.
const CANDIDATE: u64 = 5 * 4;

/// Bytes of the positions of `count` entries: each one's position, row and column, and row and place once more in the
/// order of the columns.
fn positions(role: ParameterRole, count: u64) -> u64 {
    match role {
        ParameterRole::Sparse { .. } => 5 * I32 * count,
        _ => 0,
    }
}

/// Masks and rotary tables of a forward with a composed attention.
fn context(model: &ModelConfig, batch: &BatchShape) -> u64 {
    let time = batch.time as u64;
    let masks = 1 + u64::from(model.windows.iter().any(Option::is_some));
    // Packed rows are attended to in groups, whose masks are smaller.
    masks * (time * time).min(batch.pairs) * F32 + time * model.head_dim as u64 * F32
}

#[cfg(test)]
mod tests;
