//! The files of changes `s·B·R·A`: `lora_A`, `lora_B` and `lora_R` of every module. All three are kept, because neither the
//! factors of a gradient nor the signs of a decomposition can be had again elsewhere.

use super::config::CoreConfig;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::adapter::{
    AdapterConfig, AdapterError, AdapterFolder, BiasTraining, FileFormat, Layout, LoraConfig, Parts,
    SavedAdapter, common_config, key, parameter_tensor, write_adapter,
};
use peft_core::model::{BaseShapes, Decoder};
use peft_core::projection::{Core, Delta, Parameter};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Files of LoRA-XS.
pub static LORA_XS_FORMAT: FileFormat =
    FileFormat { peft_type: "LORA_XS", open: |dir| Ok(Box::new(CoreAdapter::open(dir)?)) };

/// Files of LoRA-SB.
pub static LORA_SB_FORMAT: FileFormat =
    FileFormat { peft_type: "LORA_SB", open: |dir| Ok(Box::new(CoreAdapter::open(dir)?)) };

const FACTOR_A: &str = ".lora_A.weight";
const FACTOR_B: &str = ".lora_B.weight";
const CORE: &str = ".lora_R.weight";

/// What the authors' programs call `R` in a file: PEFT takes the adapter's name out of `default_lora_latent_mapping`.
const RELEASED_CORE: &str = "_lora_latent_mapping.weight";

/// An adapter of changes `s·B·R·A`.
pub struct CoreAdapter {
    folder: AdapterFolder,
    /// What its configuration says.
    pub config: CoreConfig,
    /// The part of a module's keys that names `R`.
    core: &'static str,
}

impl CoreAdapter {
    /// Opens an adapter's folder.
    ///
    /// # Errors
    /// Either file missing or damaged, a configuration that is out of range.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let mut folder = AdapterFolder::open(dir)?;
        let config: Result<CoreConfig, _> = serde_json::from_value(Value::Object(folder.config.clone()));
        let config = config.map_err(|error| folder.wrong(error.to_string()))?;
        config.check().map_err(|message| folder.wrong(message))?;
        let known = written(&config, "", None, None, &Value::Null);
        let unknown = folder.config.keys().filter(|key| !known.contains_key(*key));
        let path = folder.config_path().display().to_string();
        let warnings = unknown.map(|key| format!("{path}: key `{key}` is unknown and was ignored"));
        folder.warnings = warnings.collect();
        Ok(Self { folder, config, core: CORE })
    }

    /// Whether the folder of a LoRA holds one that the authors' programs wrote, with an `R` beside `A` and `B`.
    pub fn is_released(folder: &AdapterFolder) -> bool {
        folder.file.names().any(|key| key.ends_with(RELEASED_CORE))
    }

    /// Opens a folder that the authors' programs wrote.
    ///
    /// # Errors
    /// Either file missing or damaged, a configuration that asks for more than their forward has.
    pub fn open_released(dir: &Path) -> Result<Self, AdapterError> {
        let (AdapterConfig { lora, .. }, warnings) = AdapterConfig::read(dir)?;
        let mut folder = AdapterFolder::open(dir)?;
        folder.warnings = warnings;
        let plain = LoraConfig {
            r: lora.r,
            lora_alpha: lora.lora_alpha,
            lora_dropout: lora.lora_dropout,
            use_rslora: lora.use_rslora,
            target_modules: lora.target_modules.clone(),
            exclude_modules: lora.exclude_modules.clone(),
            layers_to_transform: lora.layers_to_transform.clone(),
            layers_pattern: lora.layers_pattern.clone(),
            bias: BiasTraining::None,
            init_lora_weights: lora.init_lora_weights,
            ensure_weight_tying: lora.ensure_weight_tying,
            ..LoraConfig::default()
        };
        if plain != lora {
            let beyond = "it asks for more than `s·B·R·A` on linear modules (use_dora, bias, patterns, …)";
            return Err(folder.wrong(beyond));
        }
        let config = CoreConfig {
            r: lora.r,
            scale: lora.scale(lora.lora_alpha, lora.r),
            lora_dropout: lora.lora_dropout,
            targets: super::config::Targets {
                target_modules: lora.target_modules,
                exclude_modules: lora.exclude_modules,
                layers_to_transform: lora.layers_to_transform,
                layers_pattern: lora.layers_pattern,
            },
        };
        Ok(Self { folder, config, core: RELEASED_CORE })
    }
}

impl SavedAdapter for CoreAdapter {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    fn parts(&self, base: &BaseShapes, device: &Device) -> Result<Parts, AdapterError> {
        let CoreConfig { r, scale, lora_dropout, .. } = self.config;
        let paths = self.config.place(base, false)?;
        let shapes = |path: &str| {
            let weight = &base.weights[path];
            [(FACTOR_A, [r, weight[1]]), (FACTOR_B, [weight[0], r]), (self.core, [r, r])]
        };
        let mut layout = Layout::default();
        for path in &paths {
            shapes(path).iter().for_each(|(part, shape)| layout.require(path, part, shape));
        }
        self.folder.require_keys(&layout)?;
        let mut parts = Parts::default();
        for path in paths {
            let read = |(part, shape): (&str, [usize; 2])| {
                let values = self.folder.read(&key(&path, part), &shape)?;
                Ok::<_, AdapterError>(Tensor::from_data(TensorData::new(values, shape), (device, DType::F32)))
            };
            let [a, b, core] = shapes(&path).map(read);
            let form = form(&path, a?, b?, core?, scale, lora_dropout);
            parts.changes.insert(path, Delta::Core(form));
        }
        Ok(parts)
    }
}

/// The change of the module at `path`, its parameters frozen.
pub(super) fn form(
    path: &str,
    a: Tensor<2>,
    b: Tensor<2>,
    core: Tensor<2>,
    scale: f64,
    dropout: f64,
) -> Core {
    let parameter = |part: &str, value| Parameter::matrix(format!("{path}{part}"), value);
    Core { a: parameter(FACTOR_A, a), b: parameter(FACTOR_B, b), core: parameter(CORE, core), scale, dropout }
}

/// Names in files and shapes of the parts of a change of a weight `[rows, columns]`, with whether they train.
pub(super) fn parts(path: &str, [rows, columns]: [usize; 2], r: usize) -> [(String, [usize; 2], bool); 3] {
    let part = |name: &str, shape, trains| (format!("{path}{name}"), shape, trains);
    [part(FACTOR_A, [r, columns], false), part(FACTOR_B, [rows, r], false), part(CORE, [r, r], true)]
}

/// The configuration of a file; `init` says where the first values came from.
fn written(
    config: &CoreConfig,
    peft_type: &str,
    base: Option<&str>,
    revision: Option<&str>,
    init: &Value,
) -> Map<String, Value> {
    let mut map = common_config(peft_type, base, revision);
    if let Value::Object(mut known) = json!(config) {
        map.append(&mut known);
    }
    map.insert("init".to_string(), init.clone());
    map
}

/// Writes the changes of a decoder into the existing folder `dir`.
///
/// # Errors
/// A non-finite value, or a failure to write.
pub(super) fn save(
    model: &Decoder,
    config: &CoreConfig,
    peft_type: &str,
    (base, revision): (&str, Option<&str>),
    init: &Value,
    dir: &Path,
) -> Result<(), AdapterError> {
    let forms = model.projections().filter_map(|projection| match &projection.delta {
        Some(Delta::Core(form)) => Some((&projection.path, form)),
        _ => None,
    });
    let tensors = forms.flat_map(|(path, form)| {
        [(FACTOR_A, &form.a), (FACTOR_B, &form.b), (CORE, &form.core)]
            .map(|(part, parameter)| parameter_tensor(key(path, part), parameter, dir))
    });
    write_adapter(dir, written(config, peft_type, Some(base), revision, init), tensors.collect())
}
