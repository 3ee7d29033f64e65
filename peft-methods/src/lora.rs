//! LoRA: low-rank adaptation (Hu et al., arXiv 2106.09685), with the rank-stabilised scale of arXiv 2312.03732.
//!
//! `ΔW = s·B·A` on chosen projections, `A` random and `B` zero, so that training starts at the base. The file is the
//! one Hugging Face PEFT writes.

use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::adapter::{
    Adapter, AdapterConfig, AdapterError, InitLoraWeights, Pattern, TargetModules, alpha_pattern,
    rank_pattern, save, select, select_saved,
};
use peft_core::model::Decoder;
use peft_core::projection::{Delta, LowRank, Parameter};
use peft_core::random::Stream;
use peft_core::train::{Method, TrainError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The method block of a recipe, in PEFT's names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Dropout of the low-rank path's input.
    pub lora_dropout: f64,
    /// Scale alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// List of names, regular expression, or `all-linear`; none is q and v.
    pub target_modules: Option<TargetModules>,
    /// Left out.
    pub exclude_modules: Option<Pattern>,
    /// Rank by regular expression on the end of a module's path.
    pub rank_pattern: serde_json::Map<String, serde_json::Value>,
    /// Alpha likewise.
    pub alpha_pattern: serde_json::Map<String, serde_json::Value>,
    /// Trained and saved whole.
    pub modules_to_save: Option<Vec<String>>,
    /// `true` or `gaussian`.
    pub init_lora_weights: InitLoraWeights,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: None,
            exclude_modules: None,
            rank_pattern: serde_json::Map::new(),
            alpha_pattern: serde_json::Map::new(),
            modules_to_save: None,
            init_lora_weights: InitLoraWeights::KaimingUniform,
        }
    }
}

/// LoRA on a model.
pub struct Lora {
    config: AdapterConfig,
    start: Option<PathBuf>,
}

impl Lora {
    /// Checks the configuration. `base` is the base as the recipe names it; with `start`, values come from that adapter
    /// folder instead of being drawn.
    ///
    /// # Errors
    /// A message about the first key that is out of range.
    pub fn new(
        config: LoraConfig,
        base: &str,
        revision: Option<String>,
        start: Option<PathBuf>,
    ) -> Result<Self, String> {
        let config = AdapterConfig {
            r: config.r,
            lora_alpha: config.lora_alpha,
            lora_dropout: config.lora_dropout,
            use_rslora: config.use_rslora,
            target_modules: config.target_modules,
            exclude_modules: config.exclude_modules,
            rank_pattern: rank_pattern(config.rank_pattern)?,
            alpha_pattern: alpha_pattern(config.alpha_pattern)?,
            modules_to_save: config.modules_to_save.unwrap_or_default(),
            init_lora_weights: config.init_lora_weights,
            base_model_name_or_path: Some(base.to_string()),
            revision,
        };
        config.check()?;
        Ok(Self { config, start })
    }

    /// The configuration as written beside the weights: `all-linear` spelled out for programs that do not know it.
    fn written_config(&self, model: &Decoder) -> Result<AdapterConfig, AdapterError> {
        let mut config = self.config.clone();
        if !matches!(config.target_modules, Some(TargetModules::Matching(_))) {
            let linear = linear_paths(model);
            let chosen = select(&config.selection(true), &linear)?;
            let suffixes: BTreeSet<&str> = chosen.iter().filter_map(|path| path.rsplit('.').next()).collect();
            let suffixes = Pattern::Names(suffixes.into_iter().map(str::to_string).collect());
            config.target_modules = Some(TargetModules::Matching(suffixes));
            if select(&config.selection(true), &linear)? != chosen {
                let paths = chosen.iter().map(|path| path.to_string()).collect();
                config.target_modules = Some(TargetModules::Matching(Pattern::Names(paths)));
            }
        }
        Ok(config)
    }
}

impl Lora {
    /// Replaces the fresh factors by those of the adapter in `dir`, which must have the recipe's targets, ranks and scales.
    fn take_values(
        &self,
        dir: &Path,
        model: &mut Decoder,
        targets: &BTreeSet<String>,
    ) -> Result<(), AdapterError> {
        let start = Adapter::open(dir)?;
        let differs = |message: String| AdapterError::Config {
            path: dir.join("adapter_config.json"),
            message: format!("adapter_name_or_path: {message}"),
        };
        for projection in model.projections_mut() {
            projection.delta = None;
        }
        start.attach(model)?;
        let patterns = self.config.patterns()?;
        for projection in model.projections_mut() {
            let path = &projection.path;
            if projection.delta.is_some() != targets.contains(path) {
                return Err(differs(format!(
                    "that adapter and the recipe disagree on whether `{path}` is a target"
                )));
            }
            let Some(Delta::LowRank(form)) = &mut projection.delta else { continue };
            let given = (form.rank(), form.scale);
            let wanted = (patterns.rank(path), patterns.scale(path));
            if given != wanted {
                let message =
                    format!("`{path}` has (rank, scale) {given:?} there, the recipe asks for {wanted:?}");
                return Err(differs(message));
            }
            form.dropout = self.config.lora_dropout;
        }
        Ok(())
    }
}

/// Paths of the modules that a low-rank change can attach to.
fn linear_paths(model: &Decoder) -> Vec<&str> {
    model.projections().map(|projection| projection.path.as_str()).collect()
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&self, model: &mut Decoder, seed: u64) -> peft_core::Result<()> {
        let config = &self.config;
        let tied = model.config.tie_word_embeddings;
        let saved = select_saved(&config.modules_to_save, &model.module_paths(), tied)?;
        let targets: BTreeSet<String> =
            select(&config.selection(true), &linear_paths(model))?.into_iter().map(str::to_string).collect();
        let patterns = config.patterns()?;
        let device = model.device.clone();
        for projection in model.projections_mut().filter(|projection| targets.contains(&projection.path)) {
            let (rank, scale) = (patterns.rank(&projection.path), patterns.scale(&projection.path));
            let [rows, columns] = projection.dims();
            let name = |factor: &str| format!("{}.{factor}.weight", projection.path);
            let a = initial_a(config.init_lora_weights, &projection.path, [rank, columns], seed, &device);
            let b = Tensor::zeros([rows, rank], (&device, DType::F32));
            projection.delta = Some(Delta::LowRank(LowRank {
                a: Parameter::matrix(name("lora_A"), a),
                b: Parameter::matrix(name("lora_B"), b),
                scale,
                dropout: config.lora_dropout,
            }));
        }
        if let Some(dir) = &self.start {
            self.take_values(dir, model, &targets)?;
        }
        for projection in model.projections_mut() {
            for parameter in projection.delta.iter_mut().flat_map(|delta| delta.parameters_mut()) {
                parameter.set_trainable();
            }
        }
        for parameter in model.parameters_mut() {
            let module = parameter.name.rsplit_once('.').map(|(module, _)| module);
            if saved.iter().any(|path| Some(path.as_str()) == module) {
                parameter.set_trainable();
            }
        }
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        save(model, &self.written_config(model)?, dir)?;
        Ok(())
    }
}

/// Initial `A` `[rank, in]`, drawn from the stream (seed, "lora init", path).
fn initial_a(init: InitLoraWeights, path: &str, dims: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
    let mut stream = Stream::new(seed, "lora init", path, &[]);
    let [rank, columns] = dims;
    let mut draw = || match init {
        // Kaiming-uniform with a = √5 has the bound √(6 / ((1 + 5)·in)).
        InitLoraWeights::KaimingUniform => (2.0 * stream.uniform() - 1.0) / (columns as f64).sqrt(),
        InitLoraWeights::Gaussian => stream.normal() / rank as f64,
    };
    let values: Vec<f32> = (0..rank * columns).map(|_| draw() as f32).collect();
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
