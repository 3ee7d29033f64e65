//! VeRA: vector-based random matrix adaptation (Kopiczko et al., arXiv 2310.11454).
//!
//! One frozen random pair `A`, `B` serves all targets, each taking the part that fits it; a target trains two vectors,
//! `ΔW = Λ_b·B·Λ_d·A`, `b` zero at first. The file is the one Hugging Face PEFT writes, with the pair or without it.

mod projections;

use crate::registry::{Block, Kind, RunContext, Scaffold, TARGETS, keys_of};
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::adapter::{
    AdapterError, AdapterFolder, FileFormat, Layers, Layout, Names, Parts, SavedAdapter, Selection,
    TargetModules, common_config, finite_tensor, key, parameter_tensor, select_linear, spelled_out,
    take_values, weights_bytes, write_adapter,
};
use peft_core::checkpoint::Headers;
use peft_core::kernels::settled;
use peft_core::model::{BaseShapes, Decoder, ModelConfig, ParameterShape};
use peft_core::projection::{Delta, Parameter, RandomPair};
use peft_core::strict;
use peft_core::train::{Method, MethodPlan, ParameterRole, PlannedParameter, Preparation, TrainError};
use projections::{projections, upper_left};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// VeRA as recipes name it.
pub static VERA: Kind = Kind {
    name: "vera",
    title: "VeRA",
    about: "two vectors a weight around one random pair for all",
    parse: |keys| Ok(Box::new(strict::parse::<VeraConfig>(keys)?)),
    file: Some(&FORMAT),
    in_peft: true,
    scaffolds: &[Scaffold {
        name: "vera",
        about: "two vectors a weight around one random pair for all",
        keys: &[
            ("r", "256", "rank of the shared pair; far above a LoRA's"),
            ("d_initial", "0.1", "first value of the inner vectors"),
            TARGETS,
            (
                "save_projection",
                "true",
                "false: a tiny file, with the pair drawn again from projection_prng_key",
            ),
        ],
        learning_rates: ("4e-3", "2e-2"),
    }],
};

/// The files of VeRA.
static FORMAT: FileFormat =
    FileFormat { peft_type: "VERA", open: |dir| Ok(Box::new(VeraAdapter::open(dir)?)) };

const LAMBDA_B: &str = ".vera_lambda_b";
const LAMBDA_D: &str = ".vera_lambda_d";
const PAIR: [&str; 2] = ["base_model.vera_A", "base_model.vera_B"];

/// Ranks above this are no adapter.
const MAX_RANK: usize = 1 << 16;

/// PEFT's keys of a VeRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VeraConfig {
    /// Rank of the pair.
    pub r: usize,
    /// List of names, regular expression, or `all-linear`; none is q and v.
    pub target_modules: Option<TargetModules>,
    /// Only these layers, where targets are a list of names.
    pub layers_to_transform: Option<Layers>,
    /// Name of the list that layers are numbered in; any by default.
    pub layers_pattern: Option<Names>,
    /// What the pair is drawn from.
    pub projection_prng_key: u64,
    /// Whether the pair stands in the file; otherwise it is drawn again.
    pub save_projection: bool,
    /// Dropout of the path's input in training.
    pub vera_dropout: f64,
    /// First value of the inner vectors.
    pub d_initial: f64,
}

impl Default for VeraConfig {
    fn default() -> Self {
        Self {
            r: 256,
            target_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            projection_prng_key: 0,
            save_projection: true,
            vera_dropout: 0.0,
            d_initial: 0.1,
        }
    }
}

/// Keys of the file that would change the forward, with the only value that is known here.
fn neutral_keys() -> Value {
    json!({"bias": "none", "fan_in_fan_out": false, "init_weights": true, "modules_to_save": null})
}

impl VeraConfig {
    fn check_values(&self) -> Result<(), String> {
        if !(1..=MAX_RANK).contains(&self.r) {
            return Err(format!("r is {}, expected a rank from 1 to {MAX_RANK}", self.r));
        }
        if !(0.0..1.0).contains(&self.vera_dropout) {
            return Err(format!("vera_dropout is {}, expected a probability below 1", self.vera_dropout));
        }
        if !self.d_initial.is_finite() || self.d_initial == 0.0 {
            return Err(format!(
                "d_initial is {}, expected a number other than 0: with it, nothing would ever train",
                self.d_initial
            ));
        }
        Ok(())
    }

    fn selection(&self, strict: bool) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: None,
            saved: &[],
            layers: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref().map_or(&[], Names::as_slice),
            strict,
        }
    }

    fn targets(&self, base: &BaseShapes, strict: bool) -> Result<Targets, AdapterError> {
        let modules = select_linear(&self.selection(strict), base)?;
        let largest =
            modules.values().fold([0, 0], |[rows, columns], dims| [rows.max(dims[0]), columns.max(dims[1])]);
        Ok(Targets { modules, largest })
    }
}

/// The modules with their `[out, in]`, and the largest of both.
struct Targets {
    modules: BTreeMap<String, [usize; 2]>,
    largest: [usize; 2],
}

/// The shared pair, whole.
#[derive(Debug, Clone)]
struct Pair {
    /// `[r, largest in]`.
    a: Vec<f32>,
    /// `[largest out, r]`.
    b: Vec<f32>,
    rank: usize,
    largest: [usize; 2],
}

impl Pair {
    fn drawn(config: &VeraConfig, largest: [usize; 2]) -> Self {
        let (a, b) = projections(config.projection_prng_key, config.r, largest);
        Self { a, b, rank: config.r, largest }
    }

    /// The parts for modules of every shape, each once on the device.
    fn on_device(&self, targets: &Targets, device: &Device) -> BTreeMap<[usize; 2], (Tensor<2>, Tensor<2>)> {
        let (rank, [_, width]) = (self.rank, self.largest);
        let mut a_by_width = BTreeMap::new();
        let mut b_by_height = BTreeMap::new();
        let mut parts = BTreeMap::new();
        for [rows, columns] in targets.modules.values().copied() {
            let a = a_by_width.entry(columns).or_insert_with(|| {
                matrix(upper_left(&self.a, width, [rank, columns]), [rank, columns], device)
            });
            let b = b_by_height
                .entry(rows)
                .or_insert_with(|| matrix(upper_left(&self.b, rank, [rows, rank]), [rows, rank], device));
            parts.insert([rows, columns], (a.clone(), b.clone()));
        }
        parts
    }
}

fn matrix(values: Vec<f32>, dims: [usize; 2], device: &Device) -> Tensor<2> {
    settled(Tensor::from_data(TensorData::new(values, dims), (device, DType::F32)))
}

fn vector(name: String, values: Vec<f32>, device: &Device) -> Parameter {
    let shape = vec![values.len()];
    let dims = [1, values.len()];
    Parameter { name, value: matrix(values, dims, device), shape, trainable: false }
}

impl Block for VeraConfig {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        self.check_values()
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        let Targets { modules, largest: [rows, columns] } = self.targets(&model.base_shapes(), true)?;
        let role = ParameterRole::Scaling { rank: self.r, dropout: self.vera_dropout > 0.0 };
        let (mut parameters, mut tensors) = (Vec::new(), Vec::new());
        for (path, [out, _]) in &modules {
            for (part, length) in [(LAMBDA_B, *out), (LAMBDA_D, self.r)] {
                let shape = ParameterShape::new(format!("{path}{part}"), [length]);
                parameters.push(PlannedParameter { shape, module: path.clone(), role, trainable: true });
                tensors.push((key(path, part), vec![length]));
            }
        }
        for (name, shape) in PAIR.into_iter().zip([[self.r, columns], [rows, self.r]]) {
            parameters.push(PlannedParameter {
                shape: ParameterShape::new(name, shape),
                module: String::new(),
                role: ParameterRole::Part,
                trainable: false,
            });
            if self.save_projection {
                tensors.push((name.to_string(), shape.to_vec()));
            }
        }
        Ok(MethodPlan { model: model.clone(), parameters, artifact_bytes: weights_bytes(tensors)? })
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        Ok(Box::new(Vera {
            config: self.clone(),
            base: run.base_name.to_string(),
            revision: run.revision.map(str::to_string),
            start: run.start.map(Path::to_path_buf),
            pair: None,
        }))
    }
}

/// VeRA on a model.
struct Vera {
    config: VeraConfig,
    base: String,
    revision: Option<String>,
    start: Option<PathBuf>,
    /// The shared pair, once the model is prepared, where the file is to hold it.
    pair: Option<Pair>,
}

impl Method for Vera {
    fn name(&self) -> &'static str {
        VERA.name
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&mut self, model: &mut Decoder, _preparation: &Preparation) -> peft_core::Result<()> {
        let (shapes, device) = (model.base_shapes(), model.device.clone());
        let targets = self.config.targets(&shapes, true)?;
        let start = self.start.as_deref().map(VeraAdapter::open).transpose()?;
        let pair = match &start {
            Some(start) => start.pair(&self.config, &targets)?,
            None => Pair::drawn(&self.config, targets.largest),
        };
        let parts = pair.on_device(&targets, &device);
        for projection in model.projections_mut() {
            let Some(dims) = targets.modules.get(&projection.path) else { continue };
            let (a, b) = parts[dims].clone();
            let path = &projection.path;
            let inner = vec![self.config.d_initial as f32; self.config.r];
            projection.delta = Some(Delta::RandomPair(RandomPair {
                a,
                b,
                lambda_d: vector(format!("{path}{LAMBDA_D}"), inner, &device),
                lambda_b: vector(format!("{path}{LAMBDA_B}"), vec![0.0; dims[0]], &device),
                dropout: self.config.vera_dropout,
            }));
        }
        if let Some(start) = &start {
            take_values(start, model)?;
        }
        let changes = model.projections_mut().filter_map(|projection| projection.delta.as_mut());
        changes.flat_map(|delta| delta.parameters_mut()).for_each(Parameter::set_trainable);
        self.pair = self.config.save_projection.then_some(pair);
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let mut config = self.config.clone();
        config.target_modules = Some(spelled_out(&self.config.selection(true), &model.base_shapes())?);
        let mut file = common_config("VERA", Some(&self.base), self.revision.as_deref());
        file.extend(keys_of(&config));
        file.extend(keys_of(&neutral_keys()));
        let changes = model.projections().filter_map(|projection| projection.delta.as_ref());
        let parameters = changes.flat_map(|delta| delta.parameters());
        let mut tensors: Vec<_> =
            parameters.map(|vector| parameter_tensor(key(&vector.name, ""), vector, dir)).collect();
        if let Some(pair) = &self.pair {
            let (rank, [rows, columns]) = (pair.rank, pair.largest);
            let [a, b] = PAIR.map(str::to_string);
            tensors.push(finite_tensor(a, vec![rank, columns], dir, || pair.a.clone()));
            tensors.push(finite_tensor(b, vec![rows, rank], dir, || pair.b.clone()));
        }
        Ok(write_adapter(dir, file, tensors)?)
    }
}

/// A saved VeRA.
struct VeraAdapter {
    folder: AdapterFolder,
    config: VeraConfig,
}

impl VeraAdapter {
    fn open(dir: &Path) -> Result<Self, AdapterError> {
        let mut folder = AdapterFolder::open(dir)?;
        let config: VeraConfig = folder.parse("VERA", neutral_keys())?;
        config.check_values().map_err(|message| folder.wrong(message))?;
        Ok(Self { folder, config })
    }

    /// The pair in the file, or drawn from its key, for a run of `config`.
    fn pair(&self, config: &VeraConfig, targets: &Targets) -> Result<Pair, AdapterError> {
        let (own, wanted) = (&self.config, config);
        if (own.r, own.projection_prng_key) != (wanted.r, wanted.projection_prng_key) {
            return Err(self.folder.wrong(format!(
                "has r {} and projection_prng_key {}, the recipe {} and {}",
                own.r, own.projection_prng_key, wanted.r, wanted.projection_prng_key
            )));
        }
        self.own_pair(targets)
    }

    fn own_pair(&self, targets: &Targets) -> Result<Pair, AdapterError> {
        if !self.config.save_projection {
            return Ok(Pair::drawn(&self.config, targets.largest));
        }
        let (rank, largest) = (self.config.r, targets.largest);
        let [rows, columns] = largest;
        let a = self.folder.read(PAIR[0], &[rank, columns])?;
        let b = self.folder.read(PAIR[1], &[rows, rank])?;
        Ok(Pair { a, b, rank, largest })
    }
}

impl SavedAdapter for VeraAdapter {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    fn parts(&self, base: &BaseShapes, device: &Device) -> Result<Parts, AdapterError> {
        let targets = self.config.targets(base, false)?;
        let mut layout = Layout::default();
        let rank = self.config.r;
        for (path, [rows, _]) in &targets.modules {
            layout.require(path, LAMBDA_B, &[*rows]);
            layout.require(path, LAMBDA_D, &[rank]);
        }
        if self.config.save_projection {
            let [rows, columns] = targets.largest;
            layout.required.insert(PAIR[0].to_string(), vec![rank, columns]);
            layout.required.insert(PAIR[1].to_string(), vec![rows, rank]);
        }
        self.folder.require_keys(&layout)?;
        let mut vectors = BTreeMap::new();
        for (path, dims) in &targets.modules {
            let read = |part: &str, length: usize| {
                let values = self.folder.read(&key(path, part), &[length])?;
                Ok::<_, AdapterError>(vector(format!("{path}{part}"), values, device))
            };
            vectors.insert(path, (read(LAMBDA_D, rank)?, read(LAMBDA_B, dims[0])?));
        }
        // Drawn once the file has shown that it is of this rank.
        let pairs = self.own_pair(&targets)?.on_device(&targets, device);
        let changes = vectors.into_iter().map(|(path, (lambda_d, lambda_b))| {
            let (a, b) = pairs[&targets.modules[path]].clone();
            (path.clone(), Delta::RandomPair(RandomPair { a, b, lambda_d, lambda_b, dropout: 0.0 }))
        });
        Ok(Parts { changes: changes.collect(), ..Parts::default() })
    }
}
