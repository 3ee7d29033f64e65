//! (IA)³: infused adapter by inhibiting and amplifying inner activations (Liu et al., arXiv 2205.05638).
//!
//! Learned factors, one at first, on the results of the key and value projections and on what goes into the
//! feed-forward's last projection. The file is the one Hugging Face PEFT writes.

use crate::registry::{Block, Kind, RunContext, Scaffold, keys_of};
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::adapter::{
    AdapterError, AdapterFolder, FileFormat, Layout, Parts, Pattern, SavedAdapter, Selection, TargetModules,
    common_config, key, matching, parameter_tensor, select_linear, spelled_out, take_values, weights_bytes,
    write_adapter,
};
use peft_core::checkpoint::Headers;
use peft_core::model::{BaseShapes, Decoder, ModelConfig, ParameterShape};
use peft_core::projection::{Delta, Gains, Parameter};
use peft_core::strict;
use peft_core::train::{Method, MethodPlan, ParameterRole, PlannedParameter, Preparation, TrainError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// (IA)³ as recipes name it.
pub static IA3: Kind = Kind {
    name: "ia3",
    title: "(IA)³",
    about: "factors on keys, values and the feed-forward's inner features",
    parse: |keys| Ok(Box::new(strict::parse::<Ia3Config>(keys)?)),
    file: Some(&FORMAT),
    in_peft: true,
    scaffolds: &[Scaffold {
        name: "ia3",
        about: "factors on keys, values and the feed-forward's inner features",
        keys: &[
            ("target_modules", "[k_proj, v_proj, down_proj]", "modules whose features are scaled"),
            ("feedforward_modules", "[down_proj]", "those of them that are scaled on their input"),
        ],
        learning_rates: ("3e-3", "3e-2"),
    }],
};

/// The files of (IA)³.
static FORMAT: FileFormat = FileFormat { peft_type: "IA3", open: |dir| Ok(Box::new(Ia3Adapter::open(dir)?)) };

/// The name of the factors of a module, after its path.
const FACTORS: &str = ".ia3_l";

/// PEFT's keys of an (IA)³.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3Config {
    /// List of names, regular expression, or `all-linear`.
    pub target_modules: TargetModules,
    /// Left out.
    pub exclude_modules: Option<Pattern>,
    /// Those of the targets that are scaled on their input instead of their result.
    pub feedforward_modules: Pattern,
}

impl Default for Ia3Config {
    /// What the authors scale, in the names of these architectures.
    fn default() -> Self {
        let names = |names: &[&str]| Pattern::Names(names.iter().map(|name| name.to_string()).collect());
        Self {
            target_modules: TargetModules::Matching(names(&["k_proj", "v_proj", "down_proj"])),
            exclude_modules: None,
            feedforward_modules: names(&["down_proj"]),
        }
    }
}

/// Which side of a module is scaled, and by how many factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Input(usize),
    Output(usize),
}

impl Side {
    /// The factors' shape in files.
    fn shape(self) -> [usize; 2] {
        match self {
            Side::Input(features) => [1, features],
            Side::Output(features) => [features, 1],
        }
    }

    fn features(self) -> usize {
        match self {
            Side::Input(features) | Side::Output(features) => features,
        }
    }

    /// The change of the module at `path` with the factors `values`.
    fn gains(self, path: &str, values: Vec<f32>, device: &Device) -> Gains {
        let data = TensorData::new(values, [1, self.features()]);
        let factors = Parameter {
            name: format!("{path}{FACTORS}"),
            value: Tensor::from_data(data, (device, DType::F32)),
            shape: self.shape().to_vec(),
            trainable: false,
        };
        match self {
            Side::Input(_) => Gains { input: Some(factors), output: None },
            Side::Output(_) => Gains { input: None, output: Some(factors) },
        }
    }
}

impl Ia3Config {
    fn selection(&self, strict: bool) -> Selection<'_> {
        Selection {
            targets: Some(&self.target_modules),
            exclude: self.exclude_modules.as_ref(),
            saved: &[],
            layers: None,
            layers_pattern: &[],
            strict,
        }
    }

    /// The scaled side of every target.
    fn sides(&self, base: &BaseShapes, strict: bool) -> Result<BTreeMap<String, Side>, AdapterError> {
        let targets = select_linear(&self.selection(strict), base)?;
        let paths: Vec<&str> = targets.keys().map(String::as_str).collect();
        let inputs = matching(&self.feedforward_modules, "feedforward_modules", &paths)?;
        let side = |(path, [rows, columns]): (&String, &[usize; 2])| match inputs.contains(path) {
            true => (path.clone(), Side::Input(*columns)),
            false => (path.clone(), Side::Output(*rows)),
        };
        Ok(targets.iter().map(side).collect())
    }
}

/// Keys of the file that would change the forward, with the only value that is known here.
fn neutral_keys() -> Value {
    json!({"fan_in_fan_out": false, "init_ia3_weights": true, "modules_to_save": null})
}

impl Block for Ia3Config {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        Ok(())
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        let sides = self.sides(&model.base_shapes(), true)?;
        let parameter = |(path, side): (&String, &Side)| PlannedParameter {
            shape: ParameterShape::new(format!("{path}{FACTORS}"), side.shape()),
            module: path.clone(),
            role: if matches!(side, Side::Input(_)) { ParameterRole::InputGain } else { ParameterRole::Gain },
            trainable: true,
        };
        let tensors = sides.iter().map(|(path, side)| (key(path, FACTORS), side.shape().to_vec()));
        Ok(MethodPlan {
            model: model.clone(),
            parameters: sides.iter().map(parameter).collect(),
            artifact_bytes: weights_bytes(tensors)?,
        })
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        Ok(Box::new(Ia3 {
            config: self.clone(),
            base: run.base_name.to_string(),
            revision: run.revision.map(str::to_string),
            start: run.start.map(Path::to_path_buf),
        }))
    }
}

/// (IA)³ on a model.
struct Ia3 {
    config: Ia3Config,
    base: String,
    revision: Option<String>,
    start: Option<PathBuf>,
}

impl Method for Ia3 {
    fn name(&self) -> &'static str {
        IA3.name
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&mut self, model: &mut Decoder, _preparation: &Preparation) -> peft_core::Result<()> {
        let shapes = model.base_shapes();
        let (sides, device) = (self.config.sides(&shapes, true)?, model.device.clone());
        for projection in model.projections_mut() {
            if let Some(side) = sides.get(&projection.path) {
                let ones = vec![1.0; side.features()];
                let gains = side.gains(&projection.path, ones, &device);
                projection.delta = Some(Delta::Gains(gains));
            }
        }
        if let Some(dir) = &self.start {
            let start = Ia3Adapter::open(dir)?;
            take_values(&start, model)?;
        }
        let changes = model.projections_mut().filter_map(|projection| projection.delta.as_mut());
        changes.flat_map(|delta| delta.parameters_mut()).for_each(Parameter::set_trainable);
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let mut config = self.config.clone();
        config.target_modules = spelled_out(&self.config.selection(true), &model.base_shapes())?;
        let mut file = common_config("IA3", Some(&self.base), self.revision.as_deref());
        file.extend(keys_of(&config));
        file.extend(keys_of(&neutral_keys()));
        let changes = model.projections().filter_map(|projection| projection.delta.as_ref());
        let parameters = changes.flat_map(|delta| delta.parameters());
        let tensors = parameters.map(|factors| parameter_tensor(key(&factors.name, ""), factors, dir));
        Ok(write_adapter(dir, file, tensors.collect())?)
    }
}

/// A saved (IA)³.
struct Ia3Adapter {
    folder: AdapterFolder,
    config: Ia3Config,
}

impl Ia3Adapter {
    fn open(dir: &Path) -> Result<Self, AdapterError> {
        let mut folder = AdapterFolder::open(dir)?;
        let config = folder.parse("IA3", neutral_keys())?;
        Ok(Self { folder, config })
    }
}

impl SavedAdapter for Ia3Adapter {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    fn parts(&self, base: &BaseShapes, device: &Device) -> Result<Parts, AdapterError> {
        let sides = self.config.sides(base, false)?;
        let mut layout = Layout::default();
        sides.iter().for_each(|(path, side)| layout.require(path, FACTORS, &side.shape()));
        self.folder.require_keys(&layout)?;
        let mut parts = Parts::default();
        for (path, side) in sides {
            let values = self.folder.read(&key(&path, FACTORS), &side.shape())?;
            let gains = side.gains(&path, values, device);
            parts.changes.insert(path, Delta::Gains(gains));
        }
        Ok(parts)
    }
}
