//! LaMDA: a small trained square between singular directions of the weight, of which the left ones train for a while
//! (Azizi, Kundu and Pedram, arXiv 2406.12832); LaMDA++: the same with ranks by the spectra of the weights.
//!
//! `ΔW = s·(B·S − B₀·S₀)·A`. `A` never trains, `S` always does, and the columns of `B` stop one after another over the
//! first `η·T` steps. The change is one of rank `r` on the weight as it is in its file: the base is not rewritten, and a
//! plain LoRA of rank `r` says the same exactly.

mod config;
mod file;
mod freezing;
mod init;
mod ranks;

pub use config::{LamdaBlock, LamdaInit};
pub use ranks::{MoreRankFor, RankAllocation};

use crate::registry::{Block, Kind, RunContext, Scaffold, TARGETS};
use burn::tensor::Tensor;
use file::{A, B, CORE, FORMAT, LamdaAdapter, OFFSET, parameter, save, shapes, weights};
use init::first_values;
use peft_core::adapter::{AdapterError, key, tensors_sha256, weights_bytes};
use peft_core::checkpoint::{ADAPTER_CONFIG_FILE, Checkpoint, Headers};
use peft_core::kernels::Up;
use peft_core::model::{Decoder, ModelConfig, ParameterShape};
use peft_core::projection::{Delta, Spectral};
use peft_core::strict;
use peft_core::train::{
    Method, MethodPlan, MethodState, ParameterOptimizer, ParameterRole, PlannedParameter, Preparation,
    Progress, TrainError,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// LaMDA as recipes name it.
pub static LAMDA: Kind = Kind {
    name: "lamda",
    title: "LaMDA",
    about: "a trained square between singular directions that freeze one by one",
    parse: |keys| Ok(Box::new(strict::parse::<LamdaBlock>(keys)?)),
    file: Some(&FORMAT),
    in_peft: false,
    scaffolds: &[
        Scaffold {
            name: "lamda",
            about: "a trained square between singular directions that freeze one by one",
            keys: &[
                ("r", "32", "rank of the update of each weight"),
                ("lora_alpha", "32", "scale of the update: alpha / r"),
                (
                    "eta",
                    "0.3",
                    "share of the run over which the columns of B stop training; 0 trains the square alone",
                ),
                TARGETS,
            ],
            learning_rates: ("3e-4", "3e-3"),
        },
        Scaffold {
            name: "lamda++",
            about: "LaMDA with ranks by the spectra of the weights",
            keys: &[
                ("r", "32", "mean rank"),
                ("lora_alpha", "32", "scale of the update: alpha / r"),
                ("eta", "0.3", "share of the run over which the columns of B stop training"),
                (
                    "rank_allocation",
                    "{more_rank_for: flat}",
                    "which weights get more than the mean; or peaked",
                ),
                TARGETS,
            ],
            learning_rates: ("3e-4", "3e-3"),
        },
    ],
};

impl Block for LamdaBlock {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        LamdaBlock::check(self)
    }

    /// With a `rank_allocation` the ranks are not known before the weights are: all modules count with the mean.
    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        let (mut parameters, mut tensors) = (Vec::new(), Vec::new());
        for (path, (dims, rank)) in self.modules(&model.base_shapes(), true)? {
            for (part, shape) in shapes(self, dims, rank) {
                let trainable = part == CORE || (part == B && self.eta > 0.0);
                let role = match part {
                    OFFSET => ParameterRole::Part,
                    _ => ParameterRole::Factor { rank, dropout: self.lora_dropout > 0.0 },
                };
                tensors.push((key(&path, &format!(".{part}")), shape.to_vec()));
                let shape = ParameterShape::new(format!("{path}.{part}"), shape);
                parameters.push(PlannedParameter { shape, module: path.clone(), role, trainable });
            }
        }
        Ok(MethodPlan { model: model.clone(), parameters, artifact_bytes: weights_bytes(tensors)? })
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        LamdaBlock::check(self).map_err(TrainError::Preparation)?;
        Ok(Box::new(Lamda {
            block: self.clone(),
            base: run.base_name.to_string(),
            revision: run.revision.map(str::to_string),
            start: run.start.map(Path::to_path_buf),
            checkpoint: Checkpoint::open(run.base.dir())?,
            base_sha256: String::new(),
            progress: None,
        }))
    }
}

/// LaMDA on a model.
struct Lamda {
    block: LamdaBlock,
    base: String,
    revision: Option<String>,
    start: Option<PathBuf>,
    /// The base's files.
    checkpoint: Checkpoint,
    /// Hash of the weights that are changed, once the model is prepared.
    base_sha256: String,
    /// Where the run stands, after its first step.
    progress: Option<Progress>,
}

impl Lamda {
    /// The changes of the adapter that the run goes on or starts from.
    fn earlier(
        &self,
        model: &Decoder,
        resume: Option<&Path>,
    ) -> Result<Option<BTreeMap<String, Spectral>>, AdapterError> {
        let resumed = resume.map(|checkpoint| checkpoint.join(self.artifact()));
        let Some(dir) = resumed.as_ref().or(self.start.as_ref()) else { return Ok(None) };
        let adapter = LamdaAdapter::open(dir)?;
        let (given, wanted) = (&adapter.block, &self.block);
        let same =
            (given.r, given.scale(), given.subtracts()) == (wanted.r, wanted.scale(), wanted.subtracts());
        let forms = adapter.forms(&model.base_shapes(), &model.device)?;
        let targets = wanted.modules(&model.base_shapes(), true)?;
        let fits = |(path, form): (&String, &Spectral)| {
            targets
                .get(path)
                .is_some_and(|(_, rank)| wanted.rank_allocation.is_some() || *rank == form.rank())
        };
        let complete = wanted.rank_allocation.is_some() || forms.len() == targets.len();
        match same && complete && forms.iter().all(fits) {
            true => Ok(Some(forms)),
            false => Err(AdapterError::Config {
                path: dir.join(ADAPTER_CONFIG_FILE),
                message: "that adapter and the recipe disagree on modules, ranks, scale or subtract_init"
                    .to_string(),
            }),
        }
    }

    /// Freezes the columns of `B` that do not train after `progress`.
    fn freeze(&self, model: &mut Decoder, mut frozen: impl FnMut(&str, usize), progress: Progress) {
        if self.block.compat_released {
            return;
        }
        let Progress { step, total_steps } = progress;
        for form in forms_mut(model) {
            let columns = self.block.freezing().columns(form.rank(), step, total_steps);
            let before = form.frozen_columns();
            if columns != before {
                form.set_frozen(columns);
                frozen(&form.b.name, columns - before.min(columns));
            }
        }
    }
}

fn forms_mut(model: &mut Decoder) -> impl Iterator<Item = &mut Spectral> {
    model.projections_mut().filter_map(|projection| match &mut projection.delta {
        Some(Delta::Spectral(form)) => Some(form),
        _ => None,
    })
}

impl Method for Lamda {
    fn name(&self) -> &'static str {
        LAMDA.name
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&mut self, model: &mut Decoder, preparation: &Preparation) -> peft_core::Result<()> {
        let mut forms = match self.earlier(model, preparation.resume)? {
            Some(forms) => forms,
            None => {
                let modules = self.block.modules(&model.base_shapes(), true)?;
                let values = first_values(&self.block, preparation.seed, &modules, model)?;
                let device = model.device.clone();
                let form = |(path, values): (String, init::FirstValues)| {
                    let ([rows, columns], rank) = (modules[&path].0, values.rank);
                    let of = |part, values, dims| parameter(&path, part, values, dims, &device);
                    let a = of(A, values.a, [rank, columns]);
                    let (b, core) = (of(B, values.b, [rows, rank]), of(CORE, values.core, [rank, rank]));
                    // The very product of the forward, so that training starts at the base to the last bit.
                    let product = || {
                        let (b, core) = (b.value.clone(), core.value.clone());
                        let product = Up::Core { b, core, frozen: None, offset: None }.factor();
                        peft_core::projection::Parameter::matrix(format!("{path}.{OFFSET}"), product)
                    };
                    let offset = self.block.subtracts().then(product);
                    let scale = self.block.scale();
                    let form = Spectral { a, b, core, frozen: None, offset, scale, dropout: 0.0 };
                    (path.clone(), form)
                };
                values.into_iter().map(form).collect()
            }
        };
        self.base_sha256 = tensors_sha256(&self.checkpoint, &weights(forms.keys()))?;
        for projection in model.projections_mut() {
            if let Some(mut form) = forms.remove(&projection.path) {
                form.dropout = self.block.lora_dropout;
                form.core.set_trainable();
                form.set_frozen(if self.block.eta == 0.0 { form.rank() } else { 0 });
                projection.delta = Some(Delta::Spectral(form));
            }
        }
        Ok(())
    }

    /// The authors' program lets momentum and decay go on with columns whose gradient it takes away.
    fn after_backward(
        &mut self,
        model: &Decoder,
        gradients: &mut BTreeMap<String, Tensor<2>>,
        progress: Progress,
    ) {
        if !self.block.compat_released {
            return;
        }
        for projection in model.projections() {
            let Some(Delta::Spectral(form)) = &projection.delta else { continue };
            let rank = form.rank();
            let frozen = self.block.freezing().columns(rank, progress.step, progress.total_steps);
            if let Some(gradient) = gradients.get_mut(&form.b.name).filter(|_| frozen > 0) {
                let rows = gradient.dims()[0];
                let zeros = Tensor::zeros([rows, frozen], (&gradient.device(), gradient.dtype()));
                *gradient = match frozen < rank {
                    true => Tensor::cat(vec![zeros, gradient.clone().slice([0..rows, frozen..rank])], 1),
                    false => zeros,
                };
            }
        }
    }

    fn after_update(
        &mut self,
        model: &mut Decoder,
        optimizer: &mut dyn ParameterOptimizer,
        progress: Progress,
    ) -> Result<(), TrainError> {
        self.progress = Some(progress);
        let device = model.device.clone();
        let mut trained: Vec<(String, usize)> = Vec::new();
        self.freeze(model, |name, columns| trained.extend([(name.to_string(), columns)]), progress);
        let still_trains: BTreeMap<String, bool> =
            forms_mut(model).map(|form| (form.b.name.clone(), form.b.trainable)).collect();
        for (name, columns) in trained {
            match still_trains[&name] {
                false => optimizer.forget(&name),
                true => optimizer.edit(&name, &device, &mut |_, memory| {
                    let [rows, all] = memory.dims();
                    memory.slice([0..rows, columns..all])
                }),
            }
        }
        Ok(())
    }

    fn state(&self) -> MethodState {
        let json = match self.progress {
            Some(Progress { step, total_steps }) => json!({"step": step, "total_steps": total_steps}),
            None => Value::Null,
        };
        MethodState { tensors: BTreeMap::new(), json }
    }

    fn restore(&mut self, model: &mut Decoder, state: MethodState) -> Result<(), String> {
        if state.json.is_null() {
            return Ok(());
        }
        let number = |key: &str| {
            let value = state.json.get(key).and_then(Value::as_u64);
            value.ok_or_else(|| format!("`method.{key}` is missing, which says what of B is frozen"))
        };
        let progress = Progress { step: number("step")?, total_steps: number("total_steps")? };
        self.progress = Some(progress);
        self.freeze(model, |_, _| {}, progress);
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let base = (self.base.as_str(), self.revision.as_deref(), self.base_sha256.as_str());
        Ok(save(model, &self.block, base, dir)?)
    }
}
