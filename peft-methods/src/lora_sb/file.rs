//! The files of changes `s·B·R·A`: `lora_A`, `lora_B` and `lora_R` of every module. All three are kept, because neither the
//! factors of a gradient nor the signs of a decomposition can be had again elsewhere.

use super::config::{CoreConfig, Targets};
use crate::registry::keys_of;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::adapter::{
    AdapterConfig, AdapterError, AdapterFolder, BiasTraining, FileFormat, Layout, LoraConfig, Parts,
    SavedAdapter, common_config, key, parameter_tensor, spelled_out, write_adapter,
};
use peft_core::kernels::settled;
use peft_core::model::{BaseShapes, Decoder};
use peft_core::projection::{Core, Delta, Parameter};
use serde_json::Value;
use std::path::Path;

/// Files of LoRA-XS.
pub static LORA_XS_FORMAT: FileFormat =
    FileFormat { peft_type: "LORA_XS", open: |dir| Ok(Box::new(CoreAdapter::open(dir, &LORA_XS_FORMAT)?)) };

/// Files of LoRA-SB.
pub static LORA_SB_FORMAT: FileFormat =
    FileFormat { peft_type: "LORA_SB", open: |dir| Ok(Box::new(CoreAdapter::open(dir, &LORA_SB_FORMAT)?)) };

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
    /// Opens a folder of one of the two formats.
    ///
    /// # Errors
    /// Either file missing or damaged, another format, a configuration that is out of range.
    pub fn open(dir: &Path, format: &FileFormat) -> Result<Self, AdapterError> {
        let mut folder = AdapterFolder::open(dir)?;
        let config: CoreConfig = folder.parse(format.peft_type, Value::Null)?;
        config.check().map_err(|message| folder.wrong(message))?;
        Ok(Self { folder, config, core: CORE })
    }

    /// Whether the folder is one that the authors' programs wrote: a LoRA's by its configuration, with an `R` beside `A` and
    /// `B`. What cannot be read is none.
    pub fn is_released(dir: &Path) -> bool {
        let is_core = |folder: AdapterFolder| folder.file.names().any(|key| key.ends_with(RELEASED_CORE));
        AdapterFolder::open(dir).is_ok_and(is_core)
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
            targets: Targets {
                target_modules: lora.target_modules,
                exclude_modules: lora.exclude_modules,
                layers_to_transform: lora.layers_to_transform,
                layers_pattern: lora.layers_pattern,
            },
            init: Value::Null,
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
        let modules = self.config.place(base, false)?;
        let shapes = |[rows, columns]: [usize; 2]| {
            [(FACTOR_A, [r, columns]), (FACTOR_B, [rows, r]), (self.core, [r, r])]
        };
        let mut layout = Layout::default();
        for (path, dims) in &modules {
            shapes(*dims).iter().for_each(|(part, shape)| layout.require(path, part, shape));
        }
        self.folder.require_keys(&layout)?;
        let mut parts = Parts::default();
        for (path, dims) in modules {
            let read = |(part, shape): (&str, [usize; 2])| {
                let values = self.folder.read(&key(&path, part), &shape)?;
                Ok::<_, AdapterError>(Tensor::from_data(TensorData::new(values, shape), (device, DType::F32)))
            };
            let [a, b, core] = shapes(dims).map(read);
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
    let parameter = |part: &str, value| Parameter::matrix(format!("{path}{part}"), settled(value));
    Core { a: parameter(FACTOR_A, a), b: parameter(FACTOR_B, b), core: parameter(CORE, core), scale, dropout }
}

/// Names in files and shapes of the parts of a change of a weight `[rows, columns]`, with whether they train.
pub(super) fn parts(path: &str, [rows, columns]: [usize; 2], r: usize) -> [(String, [usize; 2], bool); 3] {
    let part = |name: &str, shape, trains| (format!("{path}{name}"), shape, trains);
    [part(FACTOR_A, [r, columns], false), part(FACTOR_B, [rows, r], false), part(CORE, [r, r], true)]
}

/// Writes the changes of a decoder into the existing folder `dir`.
///
/// # Errors
/// A non-finite value, or a failure to write.
pub(super) fn save(
    model: &Decoder,
    config: &CoreConfig,
    format: &FileFormat,
    (base, revision): (&str, Option<&str>),
    dir: &Path,
) -> Result<(), AdapterError> {
    let mut config = config.clone();
    config.targets.target_modules = Some(spelled_out(&config.selection(true), &model.base_shapes())?);
    let mut file = common_config(format.peft_type, Some(base), revision);
    file.extend(keys_of(&config));
    let changes = model.projections().filter_map(|projection| projection.delta.as_ref());
    let parameters = changes.flat_map(|delta| delta.parameters());
    let tensors = parameters.map(|parameter| parameter_tensor(key(&parameter.name, ""), parameter, dir));
    write_adapter(dir, file, tensors.collect())
}
