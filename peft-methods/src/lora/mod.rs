//! LoRA: low-rank adaptation (Hu et al., arXiv 2106.09685), with the rank-stabilised scale of arXiv 2312.03732 and
//! DoRA's magnitudes (arXiv 2402.09353).
//!
//! `ΔW = s·B·A` on chosen modules, `A` random and `B` zero, so that training starts at the base. The file is the one
//! Hugging Face PEFT writes.

mod config;
mod fa;
pub mod init;

pub use config::LoraBlock;

use fa::{Preconditioners, preconditioners};

use crate::registry::{Block, Kind, RunContext, Scaffold, ScaffoldKey, TARGETS};
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::adapter::{
    Adapter, AdapterConfig, AdapterError, InitLoraWeights, LORA_FORMAT, LoraConfig, Placement, SavedAdapter,
    SharedWeight, adapter_bytes, save, spelled_out,
};
use peft_core::checkpoint::Headers;
use peft_core::model::{BaseShapes, Decoder, EMBEDDING, HEAD, ModelConfig, ParameterShape, ProjectionShape};
use peft_core::projection::{Delta, LowRank, Magnitude, Parameter};
use peft_core::random::Stream;
use peft_core::strict;
use peft_core::train::{
    Method, MethodPlan, ParameterRole, PlannedParameter, Preparation, Progress, TrainError,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Samples of data-driven first values where the recipe does not say: what CorDA's authors use.
const DEFAULT_SAMPLES: usize = 256;

/// A LoRA to begin with.
const fn scaffold(name: &'static str, about: &'static str, keys: &'static [ScaffoldKey]) -> Scaffold {
    Scaffold { name, about, keys, learning_rates: ("2e-4", "5e-3") }
}

const R: ScaffoldKey = ("r", "16", "rank of the update of each weight");
const ALPHA: ScaffoldKey = ("lora_alpha", "32", "scale of the update: alpha / r");
const DROPOUT: ScaffoldKey = ("lora_dropout", "0.0", "dropout before the update; 0.05 for little data");

/// LoRA as recipes name it.
pub static LORA: Kind = Kind {
    name: "lora",
    title: "LoRA",
    about: "low-rank adaptation",
    parse: |keys| Ok(Box::new(strict::parse::<LoraBlock>(keys)?)),
    file: Some(&LORA_FORMAT),
    in_peft: true,
    scaffolds: &[
        scaffold("lora", "low-rank adaptation", &[R, ALPHA, DROPOUT, TARGETS]),
        scaffold(
            "rslora",
            "LoRA whose scale suits high ranks",
            &[R, ALPHA, DROPOUT, TARGETS, ("use_rslora", "true", "scale alpha / √r in place of alpha / r")],
        ),
        scaffold(
            "dora",
            "LoRA that trains the rows' lengths apart",
            &[
                R,
                ALPHA,
                DROPOUT,
                TARGETS,
                ("use_dora", "true", "lengths of the rows apart from their directions"),
            ],
        ),
        scaffold(
            "lora+",
            "LoRA whose B learns faster",
            &[R, ALPHA, DROPOUT, TARGETS, ("loraplus_lr_ratio", "16", "how much faster B learns than A")],
        ),
        scaffold(
            "lora-fa",
            "LoRA that trains B alone",
            &[R, ALPHA, DROPOUT, TARGETS, ("lora_fa", "true", "A stays as it was drawn")],
        ),
    ],
};

impl Block for LoraBlock {
    fn check(&self, starts_from_adapter: bool) -> Result<(), String> {
        self.check_start(starts_from_adapter)
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        let lora = Lora::new(self.clone(), "", None, None).map_err(TrainError::Preparation)?;
        Ok(lora.plan(model)?)
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        let (revision, start) = (run.revision.map(str::to_string), run.start.map(Path::to_path_buf));
        let lora = Lora::new(self.clone(), run.base_name, revision, start);
        Ok(Box::new(lora.map_err(TrainError::Preparation)?))
    }
}

/// LoRA on a model.
pub struct Lora {
    block: LoraBlock,
    base: String,
    revision: Option<String>,
    start: Option<PathBuf>,
    /// With LoRA-FA, what the gradients of `B` are multiplied by.
    preconditioners: Preconditioners,
}

impl Lora {
    /// Checks the configuration. `base` is the base as the recipe names it; with `start`, values come from that adapter
    /// folder instead of being drawn.
    ///
    /// # Errors
    /// A message about the first key that is out of range.
    pub fn new(
        block: LoraBlock,
        base: &str,
        revision: Option<String>,
        start: Option<PathBuf>,
    ) -> Result<Self, String> {
        block.check_start(start.is_some())?;
        Ok(Self { block, base: base.to_string(), revision, start, preconditioners: Preconditioners::new() })
    }

    fn config(&self) -> &LoraConfig {
        &self.block.lora
    }

    /// The configuration as written beside the weights: `all-linear` spelled out for programs that do not know it.
    fn written_config(&self, model: &Decoder) -> Result<AdapterConfig, AdapterError> {
        let mut lora = self.config().clone();
        if lora.init_lora_weights == InitLoraWeights::Eva {
            init::write_eva(&mut lora, model)?;
        }
        let targets = spelled_out(&lora.selection(true), &model.base_shapes())?;
        lora.target_modules = Some(targets);
        Ok(AdapterConfig {
            lora,
            base_model_name_or_path: Some(self.base.clone()),
            revision: self.revision.clone(),
        })
    }

    /// What [`prepare`](Method::prepare) would add and make trainable.
    ///
    /// # Errors
    /// As `prepare`: targets that match nothing, a shared weight of which nothing is said.
    pub fn plan(&self, model: &ModelConfig) -> Result<MethodPlan, AdapterError> {
        let config = self.config();
        let base = model.base_shapes();
        let placement = config.place(&base, true)?;
        let patterns = config.patterns()?;
        let mut model = model.clone();
        model.tie_word_embeddings &= placement.shared != SharedWeight::Parted;
        let dropout = config.lora_dropout > 0.0;
        let mut parameters: Vec<PlannedParameter> = Vec::new();
        let mut add = |module: &str, part: &str, shape: &[usize], role| {
            let shape = ParameterShape::new(format!("{module}.{part}"), shape);
            // LoRA-FA leaves the A of projections as drawn.
            let trainable = !(self.block.lora_fa && part == "lora_A.weight");
            parameters.push(PlannedParameter { shape, module: module.to_string(), role, trainable });
        };
        for ProjectionShape { path, dims: [rows, columns], .. } in &model.projections() {
            if !placement.linear.contains(path) {
                continue;
            }
            let rank = patterns.rank(path);
            let role = ParameterRole::Factor { rank, dropout };
            add(path, "lora_A.weight", &[rank, *columns], role);
            add(path, "lora_B.weight", &[*rows, rank], role);
            if config.lora_bias {
                add(path, "lora_B.bias", &[*rows], ParameterRole::Part);
            }
            if config.use_dora {
                add(path, "lora_magnitude_vector", &[*rows], ParameterRole::Gain);
            }
        }
        if placement.embedding {
            let (rank, [vocab, hidden]) = (patterns.rank(EMBEDDING), [model.vocab_size, model.hidden_size]);
            let role = ParameterRole::Factor { rank, dropout };
            add(EMBEDDING, "lora_embedding_A", &[rank, vocab], role);
            add(EMBEDDING, "lora_embedding_B", &[hidden, rank], role);
            if config.use_dora {
                add(EMBEDDING, "lora_magnitude_vector", &[hidden], ParameterRole::Gain);
            }
        }
        for (path, indices) in &placement.rows {
            add(
                path,
                "token_adapter.trainable_tokens_delta",
                &[indices.len(), model.hidden_size],
                ParameterRole::Part,
            );
        }
        let trains = |p: &ParameterShape| is_trained_whole(&placement, &p.name);
        parameters.extend(model.parameters().into_iter().filter(trains).map(PlannedParameter::own));
        let artifact_bytes = adapter_bytes(parameters.iter().map(|p| &p.shape), &placement, &base)?;
        Ok(MethodPlan { model, parameters, artifact_bytes })
    }

    /// Puts fresh changes onto the model.
    fn draw(
        &self,
        model: &mut Decoder,
        placement: &Placement,
        preparation: &Preparation,
    ) -> Result<(), TrainError> {
        let config = self.config();
        let patterns = config.patterns()?;
        let device = model.device.clone();
        let (seed, init) = (preparation.seed, config.init_lora_weights);
        let sample_count = self.block.init_num_samples.unwrap_or(DEFAULT_SAMPLES);
        if init.changes_base() {
            if placement.embedding {
                let reason = "has no initialisation that changes the base".to_string();
                return Err(AdapterError::Target { module: EMBEDDING.to_string(), reason }.into());
            }
            init::take_out_of_weights(model, config, &placement.linear, sample_count, preparation)?;
        }
        let eva = match init {
            InitLoraWeights::Eva => init::eva(model, config, &placement.linear, sample_count, preparation)?,
            _ => BTreeMap::new(),
        };
        for projection in model.projections_mut() {
            let path = projection.path.clone();
            if !placement.linear.contains(&path) || projection.delta.is_some() {
                continue;
            }
            let [rows, columns] = projection.dims();
            let (mut rank, mut scale) = (patterns.rank(&path), patterns.scale(&path));
            let (a, b) = match init {
                InitLoraWeights::Eva => {
                    let Some((directions, a)) = eva.get(&path).filter(|(rank, _)| *rank > 0) else {
                        continue;
                    };
                    rank = *directions;
                    scale = config.scale(init::eva_alpha(config, &patterns, &path, rank), rank);
                    (matrix(a.clone(), [rank, columns], &device), zeros([rows, rank], &device))
                }
                InitLoraWeights::Orthogonal => {
                    let mut stream = Stream::new(seed, "lora init", &path, &[]);
                    let factors = init::orthogonal(&path, [rows, columns], rank, &mut stream)?;
                    (matrix(factors.a, [rank, columns], &device), matrix(factors.b, [rows, rank], &device))
                }
                _ => (initial_a(init, &path, [rank, columns], seed, &device), zeros([rows, rank], &device)),
            };
            let magnitude =
                config.use_dora.then(|| magnitude(&path, &projection.weight.value, &a, &b, scale));
            let bias = config.lora_bias.then(|| Parameter {
                name: format!("{path}.lora_B.bias"),
                value: zeros([1, rows], &device),
                shape: vec![rows],
                trainable: false,
            });
            projection.delta = Some(Delta::LowRank(LowRank {
                a: Parameter::matrix(format!("{path}.lora_A.weight"), a),
                b: Parameter::matrix(format!("{path}.lora_B.weight"), b),
                bias,
                magnitude,
                scale,
                dropout: config.lora_dropout,
                removed: None,
            }));
        }
        if placement.embedding {
            let (rank, scale) = (patterns.rank(EMBEDDING), patterns.scale(EMBEDDING));
            let embedding = &mut model.embed_tokens;
            let [vocab, hidden] = embedding.weight.value.dims();
            // The roles are turned round: a zero A keeps the step small for tokens that are not met.
            let a = zeros([rank, vocab], &device);
            let b = normal(EMBEDDING, [hidden, rank], 1.0, seed, &device);
            let weight = embedding.weight.value.clone().transpose();
            let magnitude = config.use_dora.then(|| magnitude(EMBEDDING, &weight, &a, &b, scale));
            embedding.delta = Some(LowRank {
                a: Parameter::matrix(format!("{EMBEDDING}.lora_embedding_A"), a),
                b: Parameter::matrix(format!("{EMBEDDING}.lora_embedding_B"), b),
                bias: None,
                magnitude,
                scale,
                dropout: config.lora_dropout,
                removed: None,
            });
        }
        for (path, indices) in &placement.rows {
            let weight = match path.as_str() {
                HEAD => {
                    model.projections().find(|projection| projection.path == HEAD).map(|head| &head.weight)
                }
                _ => Some(&model.embed_tokens.weight),
            };
            let Some(weight) = weight else { continue };
            let ids: Vec<i64> = indices.iter().map(|token| i64::from(*token)).collect();
            let values = weight.value.clone().select(0, model.ids(&ids)).cast(DType::F32);
            model.replace_rows(path, indices.clone(), values);
        }
        Ok(())
    }

    /// Takes the changes of the adapter in `dir`, which must have the recipe's modules, ranks and scales.
    fn take_values(
        &self,
        dir: &Path,
        model: &mut Decoder,
        shapes: &BaseShapes,
        placement: &Placement,
    ) -> Result<(), AdapterError> {
        let start = Adapter::open(dir)?;
        let differs = |message: String| AdapterError::Config {
            path: dir.join("adapter_config.json"),
            message: format!("adapter_name_or_path: {message}"),
        };
        let (given, wanted) = (&start.config.lora, self.config());
        for (key, given, wanted) in
            [("use_dora", given.use_dora, wanted.use_dora), ("lora_bias", given.lora_bias, wanted.lora_bias)]
        {
            if given != wanted {
                return Err(differs(format!("that adapter has {key}: {given}, the recipe {wanted}")));
            }
        }
        let there = given.place(shapes, false)?;
        let pairs = [
            ("targets", &there.linear, &placement.linear),
            ("modules_to_save", &set(&there.saved), &set(&placement.saved)),
            ("biases", &set(&there.biases), &set(&placement.biases)),
            ("trainable_token_indices", &set(there.rows.keys()), &set(placement.rows.keys())),
        ];
        for (what, given, wanted) in pairs {
            if let Some(path) = given.symmetric_difference(wanted).next() {
                return Err(differs(format!(
                    "that adapter and the recipe disagree on whether `{path}` is one of its {what}"
                )));
            }
        }
        if there.rows != placement.rows
            || there.embedding != placement.embedding
            || there.shared != placement.shared
        {
            return Err(differs(
                "that adapter and the recipe disagree on the embedding or the head".to_string(),
            ));
        }
        start.attach(model)?;
        let patterns = wanted.patterns()?;
        let changes = model.projections_mut().filter_map(|projection| {
            let Some(Delta::LowRank(form)) = &mut projection.delta else { return None };
            Some((projection.path.clone(), form))
        });
        for (path, form) in changes {
            let (given, wanted) = ((form.rank(), form.scale), (patterns.rank(&path), patterns.scale(&path)));
            if given != wanted {
                let message =
                    format!("`{path}` has (rank, scale) {given:?} there, the recipe asks for {wanted:?}");
                return Err(differs(message));
            }
            form.dropout = self.config().lora_dropout;
        }
        Ok(())
    }
}

fn set<'a>(items: impl IntoIterator<Item = &'a String>) -> BTreeSet<String> {
    items.into_iter().cloned().collect()
}

fn magnitude(path: &str, weight: &Tensor<2>, a: &Tensor<2>, b: &Tensor<2>, scale: f64) -> Magnitude {
    Magnitude::new(format!("{path}.lora_magnitude_vector"), weight, a, b, scale)
}

fn matrix(values: Vec<f32>, dims: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, dims), (device, DType::F32))
}

fn zeros(dims: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::zeros(dims, (device, DType::F32))
}

/// Lets the parts of the adapter train.
fn set_trainable(model: &mut Decoder, placement: &Placement) {
    for projection in model.projections_mut() {
        projection
            .delta
            .iter_mut()
            .flat_map(|delta| delta.parameters_mut())
            .for_each(Parameter::set_trainable);
    }
    model.embed_tokens.parameters_mut().skip(1).for_each(Parameter::set_trainable);
    if let Some(rows) = &mut model.head_rows {
        rows.values.set_trainable();
    }
    for parameter in model.parameters_mut() {
        if is_trained_whole(placement, &parameter.name) {
            parameter.set_trainable();
        }
    }
}

/// Whether a parameter of the checkpoint trains: of a module saved whole, or a bias.
fn is_trained_whole(placement: &Placement, name: &str) -> bool {
    let Some((module, part)) = name.rsplit_once('.') else { return false };
    let is = |paths: &[String]| paths.iter().any(|path| path == module);
    is(&placement.saved) || (part == "bias" && is(&placement.biases))
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&mut self, model: &mut Decoder, preparation: &Preparation) -> peft_core::Result<()> {
        let shapes = model.base_shapes();
        let placement = self.config().place(&shapes, true)?;
        if placement.shared == SharedWeight::Parted {
            model.part_head();
        }
        match &self.start {
            Some(dir) => self.take_values(dir, model, &shapes, &placement)?,
            None => self.draw(model, &placement, preparation)?,
        }
        set_trainable(model, &placement);
        if self.block.lora_fa {
            for projection in model.projections_mut() {
                if let Some(Delta::LowRank(form)) = &mut projection.delta {
                    form.a.trainable = false;
                }
            }
            self.preconditioners = preconditioners(model)?;
        }
        Ok(())
    }

    fn peak_rate(&self, name: &str, learning_rate: f64) -> f64 {
        let Some(ratio) = self.block.loraplus_lr_ratio else { return learning_rate };
        let is_vector = name.ends_with(".bias") || name.ends_with(".lora_magnitude_vector");
        if name.contains(".lora_embedding_") {
            self.block.loraplus_lr_embedding.unwrap_or(1e-6)
        } else if name.contains(".lora_B") || is_vector || name.ends_with("norm.weight") {
            learning_rate * ratio
        } else {
            learning_rate
        }
    }

    fn acts_on_gradients(&self) -> bool {
        !self.preconditioners.is_empty()
    }

    fn before_update(
        &mut self,
        _model: &Decoder,
        gradients: &mut BTreeMap<String, Tensor<2>>,
        _progress: Progress,
    ) {
        for (name, inverse) in &self.preconditioners {
            if let Some(gradient) = gradients.get_mut(name) {
                *gradient = gradient.clone().matmul(inverse.clone());
            }
        }
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        save(model, &self.written_config(model)?, dir)?;
        Ok(())
    }
}

/// Initial `A` `[rank, in]`, drawn from the stream (seed, "lora init", path).
fn initial_a(init: InitLoraWeights, path: &str, dims: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
    let [rank, columns] = dims;
    match init {
        InitLoraWeights::Gaussian => normal(path, dims, 1.0 / rank as f64, seed, device),
        _ => {
            // Kaiming-uniform with a = √5 has the bound √(6 / ((1 + 5)·in)).
            let bound = 1.0 / (columns as f64).sqrt();
            draw(path, dims, seed, device, |stream| (2.0 * stream.uniform() - 1.0) * bound)
        }
    }
}

fn normal(path: &str, dims: [usize; 2], deviation: f64, seed: u64, device: &Device) -> Tensor<2> {
    draw(path, dims, seed, device, |stream| stream.normal() * deviation)
}

fn draw(
    path: &str,
    dims: [usize; 2],
    seed: u64,
    device: &Device,
    value: impl Fn(&mut Stream) -> f64,
) -> Tensor<2> {
    let mut stream = Stream::new(seed, "lora init", path, &[]);
    let values: Vec<f32> = (0..dims[0] * dims[1]).map(|_| value(&mut stream) as f32).collect();
    Tensor::from_data(TensorData::new(values, dims), (device, DType::F32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_values_have_the_distribution_peft_draws_from() {
        let device = Device::flex();
        let moments = |init, dims: [usize; 2]| {
            let values: Vec<f32> = initial_a(init, "q", dims, 1, &device).into_data().iter::<f32>().collect();
            let n = values.len() as f64;
            let variance = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
            (variance, values.iter().fold(0f32, |max, v| max.max(v.abs())))
        };
        let (variance, max) = moments(InitLoraWeights::KaimingUniform, [64, 256]);
        assert!(max <= 1.0 / 16.0 && (variance * 3.0 * 256.0 - 1.0).abs() < 0.05, "{variance} {max}");
        let (variance, _) = moments(InitLoraWeights::Gaussian, [64, 256]);
        assert!((variance * 64.0 * 64.0 - 1.0).abs() < 0.05, "{variance}");
    }
}
