//! NOLA: LoRA's factors as linear combinations of random matrices (Koohpayegani et al., arXiv 2310.02556).
//!
//! `ΔW = s·B·A` with `A = A₀ + c·Σ αᵢ·Aᵢ` and `B = c·Σ βⱼ·Bⱼ`: a module trains `k + l` coefficients, whatever its shape
//! and rank, and its file is these and a seed. The random matrices come from a generator of the toolkit's own
//! ([`RandomBasis`](peft_core::kernels::RandomBasis)), so that a file means the same on every machine and device.
//!
//! Bases are drawn where the model is, on a CPU or an NVIDIA GPU, and `A` and `B` are the same to the bit on both. For
//! other devices the host draws them: from there come `A` and `B` after an update, and there go their gradients before
//! one, each as large as those of a LoRA of that rank.

mod bases;
mod config;
mod file;
mod quantise;

pub use config::{AlphaInit, BasisScale, NolaBlock, OffsetA, SeedPolicy};
pub use quantise::CoefficientBits;

use crate::registry::{Block, Kind, RunContext, Scaffold, TARGETS, keys_of};
use bases::{ALPHA, BETA};
use file::{FORMAT, NolaAdapter, file_bytes, modules, save};
use peft_core::adapter::{AdapterError, take_values};
use peft_core::checkpoint::{ADAPTER_CONFIG_FILE, Headers};
use peft_core::model::{Decoder, ModelConfig, ParameterShape};
use peft_core::projection::{Delta, Parameter};
use peft_core::strict;
use peft_core::train::{Method, MethodPlan, ParameterRole, PlannedParameter, Preparation, TrainError};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// NOLA as recipes name it.
pub static NOLA: Kind = Kind {
    name: "nola",
    title: "NOLA",
    about: "low-rank factors that are combinations of random matrices",
    parse: |keys| Ok(Box::new(strict::parse::<NolaBlock>(keys)?)),
    file: Some(&FORMAT),
    in_peft: false,
    scaffolds: &[Scaffold {
        name: "nola",
        about: "LoRA in a few kilobytes, whatever rank and width",
        keys: &[
            ("r", "8", "rank of the update of each weight; it costs time, not parameters"),
            ("lora_alpha", "8", "scale of the update: alpha / r"),
            (
                "num_basis_a",
                "256",
                "random matrices that A is a combination of: as many trained numbers a weight",
            ),
            ("num_basis_b", "256", "the same for B"),
            (
                "seed_policy",
                "shared",
                "weights of one shape share random matrices, which is faster; or per_module",
            ),
            TARGETS,
        ],
        learning_rates: ("5e-3", "2e-2"),
    }],
};

impl Block for NolaBlock {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        NolaBlock::check(self)
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        let base = model.base_shapes();
        let modules = modules(self, 0, &base, true)?;
        let (r, dropout) = (self.r, self.lora_dropout > 0.0);
        let mut parameters = Vec::new();
        for path in modules.keys() {
            let [rows, columns] = [base.weights[path][0], base.weights[path][1]];
            let computed = ParameterRole::Computed { rank: r, dropout };
            for (part, shape, role) in [
                (ALPHA, vec![self.num_basis_a], ParameterRole::Part),
                (BETA, vec![self.num_basis_b], ParameterRole::Part),
                ("nola_A", vec![r, columns], computed),
                ("nola_B", vec![rows, r], computed),
            ] {
                let shape = ParameterShape::new(format!("{path}.{part}"), shape);
                let trainable = role != computed;
                parameters.push(PlannedParameter { shape, module: path.clone(), role, trainable });
            }
        }
        let artifact_bytes = file_bytes(self, modules.keys())?;
        Ok(MethodPlan { model: model.clone(), parameters, artifact_bytes })
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        NolaBlock::check(self).map_err(TrainError::Preparation)?;
        Ok(Box::new(Nola {
            block: self.clone(),
            seed: 0,
            base: run.base_name.to_string(),
            revision: run.revision.map(str::to_string),
            start: run.start.map(Path::to_path_buf),
            warnings: Vec::new(),
        }))
    }
}

/// NOLA on a model.
struct Nola {
    block: NolaBlock,
    /// Of the bases, once the model is prepared.
    seed: u64,
    base: String,
    revision: Option<String>,
    start: Option<PathBuf>,
    warnings: Vec<String>,
}

/// What the block asks for beyond what weights `[out, in]` can use: more rank than a weight has, or more random matrices
/// than a factor has values, so that the factor itself would be fewer numbers.
fn excesses(block: &NolaBlock, weights: &[(&str, [usize; 2])]) -> Vec<String> {
    let r = block.r;
    let bound = |key: &str, asked: usize, what: &str, most: &dyn Fn([usize; 2]) -> usize| {
        let over: Vec<(usize, &str)> = weights
            .iter()
            .map(|(path, dims)| (most(*dims), *path))
            .filter(|(most, _)| *most < asked)
            .collect();
        let (least, path) = over.iter().min()?;
        Some(format!(
            "nola: {key} is {asked}, more than {what} of {} of {} weights (as few as {least}, {path}); {key}: {least} would do",
            over.len(),
            weights.len()
        ))
    };
    [
        bound("r", r, "the smaller side", &|[rows, columns]| rows.min(columns)),
        bound("num_basis_a", block.num_basis_a, "the values of A", &|[_, columns]| r * columns),
        bound("num_basis_b", block.num_basis_b, "the values of B", &|[rows, _]| rows * r),
    ]
    .into_iter()
    .flatten()
    .collect()
}

impl Nola {
    /// The adapter to start from, which must have the recipe's bases.
    fn start(&self) -> Result<Option<NolaAdapter>, AdapterError> {
        let Some(dir) = &self.start else { return Ok(None) };
        let start = NolaAdapter::open(dir)?;
        let of_bases = |block: &NolaBlock| {
            let mut keys = keys_of(block);
            let others = ["lora_dropout", "alpha_init", "coefficient_bits", "basis_seed", "target_modules"];
            keys.retain(|key, _| !others.contains(&key.as_str()));
            keys
        };
        let (given, mut wanted) = (of_bases(&start.block), of_bases(&self.block).into_iter());
        match wanted.find(|(key, value)| given.get(key) != Some(value)) {
            None => Ok(Some(start)),
            Some((key, value)) => Err(AdapterError::Config {
                path: dir.join(ADAPTER_CONFIG_FILE),
                message: format!(
                    "adapter_name_or_path: that adapter has {key}: {}, the recipe {value}",
                    given.get(&key).unwrap_or(&Value::Null)
                ),
            }),
        }
    }
}

impl Method for Nola {
    fn name(&self) -> &'static str {
        NOLA.name
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&mut self, model: &mut Decoder, preparation: &Preparation) -> peft_core::Result<()> {
        let start = self.start()?;
        let own = self.block.basis_seed.unwrap_or(preparation.seed);
        self.seed = start.as_ref().map_or(own, |start| start.seed);
        let (shapes, device) = (model.base_shapes(), model.device.clone());
        let modules = modules(&self.block, self.seed, &shapes, true)?;
        let dims =
            modules.keys().map(|path| (path.as_str(), [shapes.weights[path][0], shapes.weights[path][1]]));
        self.warnings = excesses(&self.block, &dims.collect::<Vec<_>>());
        for projection in model.projections_mut() {
            let Some(bases) = modules.get(&projection.path) else { continue };
            let (alpha, beta) = (bases.initial_alpha(&self.block), vec![0.0; self.block.num_basis_b]);
            let form = bases.combination(&self.block, alpha, beta, self.block.lora_dropout, &device);
            projection.delta = Some(Delta::Combination(form));
        }
        if let Some(start) = &start {
            take_values(start, model)?;
        }
        let changes = model.projections_mut().filter_map(|projection| projection.delta.as_mut());
        changes.flat_map(|delta| delta.parameters_mut()).for_each(Parameter::set_trainable);
        model.refresh();
        Ok(())
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let base = (self.base.as_str(), self.revision.as_deref());
        Ok(save(model, &self.block, self.seed, base, dir)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_a_weight_can_use_is_told() {
        let block = NolaBlock { r: 4, num_basis_a: 40, num_basis_b: 20, ..NolaBlock::default() };
        let fits = [("q_proj", [8, 10]), ("k_proj", [5, 10])];
        assert!(excesses(&block, &fits).is_empty());
        let found = excesses(&block, &[("q_proj", [8, 10]), ("k_proj", [3, 9]), ("v_proj", [2, 9])]);
        assert_eq!(
            found,
            [
                "nola: r is 4, more than the smaller side of 2 of 3 weights (as few as 2, v_proj); r: 2 would do",
                "nola: num_basis_a is 40, more than the values of A of 2 of 3 weights (as few as 36, k_proj); \
                 num_basis_a: 36 would do",
                "nola: num_basis_b is 20, more than the values of B of 2 of 3 weights (as few as 8, v_proj); \
                 num_basis_b: 8 would do",
            ]
        );
    }
}
