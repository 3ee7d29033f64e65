//! LoRA-XS (Bałazy et al., arXiv 2405.17604) and LoRA-SB (Ponkshe et al., arXiv 2411.19557): `ΔW = s·B·R·A` where the factors
//! `A` and `B` are frozen and only the `r × r` matrix `R` trains.
//!
//! LoRA-XS takes the factors from the weight's singular vectors and starts at the base. LoRA-SB takes them from the first
//! step that full fine-tuning would make, and starts behind the part of that step that rank `r` can hold. Then the subspace
//! fits the task, and with orthonormal factors and `s = 1` the gradient of `R` moves the weight as close to its own gradient
//! as the subspace allows: there is no scale to tune.

mod config;
mod error;
mod estimate;
mod factors;
mod file;

pub use config::{CoreBlock, CoreConfig, LoraSbBlock, LoraXsBlock, Targets};
pub use error::CoreInitError;
pub use estimate::{Estimate, estimate};
pub use factors::{CoreFactors, first_step, lora_sb, lora_xs};
pub use file::{CoreAdapter, LORA_SB_FORMAT, LORA_XS_FORMAT};

use crate::registry::{Block, Kind, RunContext, Scaffold, ScaffoldKey, TARGETS};
use burn::tensor::{DType, Tensor, TensorData};
use peft_core::adapter::{AdapterError, FileFormat, SavedAdapter, key, take_values, weights_bytes};
use peft_core::checkpoint::Headers;
use peft_core::data::samples;
use peft_core::linalg::{Matrix, Sketch};
use peft_core::model::{Decoder, ModelConfig, ParameterShape};
use peft_core::projection::Delta;
use peft_core::random::Stream;
use peft_core::strict;
use peft_core::train::{
    Method, MethodPlan, ParameterRole, PlannedParameter, Preparation, RunLength, TrainError,
};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Examples that LoRA-SB's gradient is taken on where the recipe does not say: a thousandth of the authors' 50 thousand.
const DEFAULT_SAMPLES: usize = 50;

const R: ScaffoldKey = ("r", "32", "r × r numbers train in each weight");

/// LoRA-XS as recipes name it.
pub static LORA_XS: Kind = Kind {
    name: "lora_xs",
    title: "LoRA-XS",
    about: "an r × r matrix between the weight's own singular vectors",
    parse: |keys| Ok(Box::new(strict::parse::<LoraXsBlock>(keys)?)),
    file: Some(&LORA_XS_FORMAT),
    in_peft: false,
    scaffolds: &[Scaffold {
        name: "lora_xs",
        about: "an r × r matrix between the weight's own singular vectors",
        keys: &[R, ("lora_alpha", "32", "scale of the update: alpha / r"), TARGETS],
        learning_rates: ("2e-3", "2e-2"),
    }],
};

/// LoRA-SB as recipes name it.
pub static LORA_SB: Kind = Kind {
    name: "lora_sb",
    title: "LoRA-SB",
    about: "an r × r matrix between the directions of full fine-tuning's first step",
    parse: |keys| Ok(Box::new(strict::parse::<LoraSbBlock>(keys)?)),
    file: Some(&LORA_SB_FORMAT),
    in_peft: false,
    scaffolds: &[Scaffold {
        name: "lora_sb",
        about: "an r × r matrix between the directions of full fine-tuning's first step",
        keys: &[R, ("init_num_samples", "50", "examples that the first step is estimated on"), TARGETS],
        learning_rates: ("1e-3", "5e-3"),
    }],
};

impl Block for LoraXsBlock {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        self.config().map(drop)
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        plan(&self.config().map_err(TrainError::Preparation)?, model)
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        let config = self.config().map_err(TrainError::Preparation)?;
        Ok(Box::new(CoreMethod::new(config, Beginning::Weight(self.sketch()), run)))
    }
}

impl Block for LoraSbBlock {
    fn check(&self, starts_from_adapter: bool) -> Result<(), String> {
        self.config()?;
        let keys = [
            ("init_num_samples", self.init_num_samples.is_some()),
            ("eta", self.eta.is_some()),
            ("paper_compat", self.paper_compat),
        ];
        match keys.iter().find(|(_, given)| *given && starts_from_adapter) {
            Some((key, _)) => {
                Err(format!("{key} and adapter_name_or_path both give first values; remove one"))
            }
            None => Ok(()),
        }
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        plan(&self.config().map_err(TrainError::Preparation)?, model)
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        let config = self.config().map_err(TrainError::Preparation)?;
        Ok(Box::new(CoreMethod::new(config, Beginning::Gradient(Box::new(self.clone())), run)))
    }
}

/// What a method with this configuration would add and make trainable.
fn plan(config: &CoreConfig, model: &ModelConfig) -> peft_core::Result<MethodPlan> {
    let modules = config.place(&model.base_shapes(), true)?;
    let role = ParameterRole::Factor { rank: config.r, dropout: config.lora_dropout > 0.0 };
    let mut parameters = Vec::new();
    for (path, dims) in modules {
        for (name, shape, trainable) in file::parts(&path, dims, config.r) {
            let shape = ParameterShape::new(name, shape);
            parameters.push(PlannedParameter { shape, module: path.clone(), role, trainable });
        }
    }
    let tensors =
        parameters.iter().map(|parameter| (key(&parameter.shape.name, ""), parameter.shape.shape.clone()));
    let artifact_bytes = weights_bytes(tensors)?;
    Ok(MethodPlan { model: model.clone(), parameters, artifact_bytes })
}

/// Where the factors come from.
#[derive(Debug, Clone)]
enum Beginning {
    /// The weight.
    Weight(Sketch),
    /// The gradient of the weight.
    Gradient(Box<LoraSbBlock>),
}

/// Training of the cores between frozen factors.
pub struct CoreMethod {
    config: CoreConfig,
    beginning: Beginning,
    base: String,
    revision: Option<String>,
    start: Option<PathBuf>,
    warnings: Vec<String>,
}

impl CoreMethod {
    fn new(config: CoreConfig, beginning: Beginning, run: &RunContext) -> Self {
        Self {
            config,
            beginning,
            base: run.base_name.to_string(),
            revision: run.revision.map(str::to_string),
            start: run.start.map(Path::to_path_buf),
            warnings: Vec::new(),
        }
    }

    /// The format of its files.
    fn format(&self) -> &'static FileFormat {
        match self.beginning {
            Beginning::Weight(_) => &LORA_XS_FORMAT,
            Beginning::Gradient(_) => &LORA_SB_FORMAT,
        }
    }

    /// Takes the changes of the adapter in `dir`, which must be of the recipe's scale and modules.
    fn begin_at(
        &mut self,
        dir: &Path,
        model: &mut Decoder,
        modules: &BTreeMap<String, [usize; 2]>,
    ) -> Result<(), AdapterError> {
        let adapter = CoreAdapter::open(dir, self.format())?;
        let (given, wanted) = (adapter.config.scale, self.config.scale);
        if given != wanted {
            let differs =
                format!("adapter_name_or_path: that adapter has the scale {given}, the recipe {wanted}");
            return Err(adapter.folder().wrong(differs));
        }
        let (device, r) = (model.device.clone(), self.config.r);
        let zeros = |dims: [usize; 2]| Tensor::<2>::zeros(dims, (&device, DType::F32));
        for projection in model.projections_mut() {
            let Some([rows, columns]) = modules.get(&projection.path).copied() else { continue };
            let (a, b, core) = (zeros([r, columns]), zeros([rows, r]), zeros([r, r]));
            let form = file::form(&projection.path, a, b, core, wanted, self.config.lora_dropout);
            projection.delta = Some(Delta::Core(form));
        }
        take_values(&adapter, model)?;
        self.config.init = adapter.config.init;
        Ok(())
    }

    /// The factors of the modules, each in the place of its path.
    fn first_values(
        &mut self,
        model: &mut Decoder,
        paths: &[String],
        preparation: &Preparation,
    ) -> Result<Vec<CoreFactors>, TrainError> {
        let seed = preparation.seed;
        match self.beginning.clone() {
            Beginning::Weight(sketch) => {
                self.config.init = json!({ "seed": seed, "svd": svd_json(sketch) });
                Ok(of_weights(model, paths, sketch, seed)?)
            }
            Beginning::Gradient(block) => {
                let wanted = block.init_num_samples.unwrap_or(DEFAULT_SAMPLES);
                let chosen = samples(preparation.examples, wanted);
                if chosen.len() < wanted && block.init_num_samples.is_some() {
                    self.warnings.push(format!(
                        "lora_sb: init_num_samples is {wanted}, but there are {} examples; all of them are taken",
                        chosen.len()
                    ));
                }
                let batch_size = block.init_batch_size.unwrap_or(preparation.micro_batch_size);
                let eta = eta(&block, preparation.length, preparation.examples.len(), batch_size)
                    .map_err(TrainError::Preparation)?;
                let how =
                    Estimate { eta, scale: self.config.scale, sketch: block.sketch(), seed, batch_size };
                let mut found = estimate(model, paths, &chosen, how, preparation.step)?;
                self.config.init = json!({
                    "eta": eta, "n_samples": chosen.len(), "seed": seed, "svd": svd_json(how.sketch),
                });
                Ok(paths.iter().filter_map(|path| found.remove(path)).collect())
            }
        }
    }
}

fn svd_json(sketch: Sketch) -> Value {
    json!({ "oversampling": sketch.oversampling, "power_iterations": sketch.power_iterations })
}

/// `η`: as given; else the rate of the warm-up's first step, `learning_rate / max(1, warmup steps)`. The released scripts
/// divide by `warmup_ratio` times the batches of the gradient's estimate in all epochs, over `examples` examples.
///
/// # Errors
/// The released scripts' rate without a warm-up.
pub fn eta(
    block: &LoraSbBlock,
    length: RunLength,
    examples: usize,
    batch_size: usize,
) -> Result<f64, String> {
    let RunLength { learning_rate, warmup, total_steps, epochs } = length;
    if let Some(eta) = block.eta {
        return Ok(eta);
    }
    if !block.paper_compat {
        return Ok(learning_rate / warmup.steps(total_steps).max(1) as f64);
    }
    let share = warmup.share(total_steps);
    if share == 0.0 {
        return Err(
            "paper_compat divides the learning rate by the warm-up; set warmup_ratio, or eta".to_string()
        );
    }
    let batches = examples.div_ceil(batch_size) as f64 * epochs;
    Ok(learning_rate / (share * batches))
}

/// LoRA-XS's factors of the weights of the modules `paths`; as many weights are on the host at a time as there are threads.
fn of_weights(
    model: &Decoder,
    paths: &[String],
    sketch: Sketch,
    seed: u64,
) -> Result<Vec<CoreFactors>, CoreInitError> {
    let weights: Vec<_> = model.projections().filter(|projection| paths.contains(&projection.path)).collect();
    let mut factors = Vec::with_capacity(weights.len());
    for group in weights.chunks(rayon::current_num_threads().max(1)) {
        let host: Vec<_> = group.iter().map(|p| (p.path.clone(), p.weight.to_host(), p.dims())).collect();
        let of_group: Result<Vec<CoreFactors>, CoreInitError> = host
            .into_par_iter()
            .map(|(path, values, dims)| {
                let weight = Matrix::from_rows(&values, dims)
                    .map_err(|source| CoreInitError::Decomposition { module: path.clone(), source })?;
                let stream = |purpose| Stream::new(seed, purpose, &path, &[]);
                lora_xs(&path, &weight, sketch, &mut stream("lora_xs sketch"), &mut stream("lora_xs core"))
            })
            .collect();
        factors.extend(of_group?);
    }
    Ok(factors)
}

impl Method for CoreMethod {
    fn name(&self) -> &'static str {
        match self.beginning {
            Beginning::Weight(_) => LORA_XS.name,
            Beginning::Gradient(_) => LORA_SB.name,
        }
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&mut self, model: &mut Decoder, preparation: &Preparation) -> peft_core::Result<()> {
        let modules = self.config.place(&model.base_shapes(), true)?;
        // A run that goes on finds its frozen factors in its checkpoint's adapter.
        let earlier = preparation.resume.map(|checkpoint| checkpoint.join(self.artifact()));
        if let Some(dir) = earlier.or_else(|| self.start.clone()) {
            self.begin_at(&dir, model, &modules)?;
        } else {
            let paths = model.projections().map(|projection| projection.path.clone());
            let paths: Vec<String> = paths.filter(|path| modules.contains_key(path)).collect();
            let factors = self.first_values(model, &paths, preparation)?;
            self.warnings.extend(rank_warning(self.name(), &factors, self.config.r));
            let device = model.device.clone();
            let tensor = |matrix: &Matrix| {
                let data = TensorData::new(matrix.to_rows(), matrix.dims());
                Tensor::<2>::from_data(data, (&device, DType::F32))
            };
            let CoreConfig { scale, lora_dropout, .. } = self.config;
            let projections =
                model.projections_mut().filter(|projection| modules.contains_key(&projection.path));
            for (projection, CoreFactors { a, b, core, .. }) in projections.zip(&factors) {
                let (a, b, core) = (tensor(a), tensor(b), tensor(core));
                let form = file::form(&projection.path, a, b, core, scale, lora_dropout);
                projection.delta = Some(Delta::Core(form));
            }
        }
        for projection in model.projections_mut() {
            if let Some(Delta::Core(form)) = &mut projection.delta {
                form.core.set_trainable();
            }
        }
        Ok(())
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let base = (self.base.as_str(), self.revision.as_deref());
        Ok(file::save(model, &self.config, self.format(), base, dir)?)
    }
}

/// Says where there are fewer directions than the rank.
fn rank_warning(method: &str, factors: &[CoreFactors], rank: usize) -> Option<String> {
    let short: Vec<usize> = factors.iter().map(|f| f.numerical_rank).filter(|found| *found < rank).collect();
    let least = short.iter().min()?;
    Some(format!(
        "{method}: {} of {} modules have fewer than r = {rank} directions (as few as {least}); the other ones there are \
         arbitrary, and r: {least} would do",
        short.len(),
        factors.len()
    ))
}
