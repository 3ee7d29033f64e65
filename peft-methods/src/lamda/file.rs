//! The folder of a LaMDA: `PATH.lora_A` `[r, in]`, `.lora_B` `[out, r]`, `.lora_S` `[r, r]` and, where training started from
//! singular directions that were taken off the base, `.lora_B0S0` `[out, r]`; all f32.
//!
//! The change is `(lora_alpha / r)·(B·S − B₀·S₀)·A` on the weights whose hash is `base_sha256`, with one scale for all
//! modules; `rank_pattern` holds the ranks that are not `r`.

use super::config::LamdaBlock;
use crate::registry::keys_of;
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::adapter::{
    AdapterError, AdapterFolder, FileFormat, Layout, Parts, SavedAdapter, common_config, finite_tensor, key,
    parameter_tensor, require_base, spelled_out, write_adapter,
};
use peft_core::checkpoint::Checkpoint;
use peft_core::kernels::settled;
use peft_core::model::{BaseShapes, Decoder};
use peft_core::projection::{Delta, Parameter, Spectral};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The files of LaMDA.
pub(super) static FORMAT: FileFormat =
    FileFormat { peft_type: "LAMDA", open: |dir| Ok(Box::new(LamdaAdapter::open(dir)?)) };

pub(super) const A: &str = "lora_A";
pub(super) const B: &str = "lora_B";
pub(super) const CORE: &str = "lora_S";
pub(super) const OFFSET: &str = "lora_B0S0";

/// Parts and shapes of a module's tensors.
pub(super) fn shapes(
    block: &LamdaBlock,
    [rows, columns]: [usize; 2],
    rank: usize,
) -> Vec<(&'static str, [usize; 2])> {
    let mut shapes = vec![(A, [rank, columns]), (B, [rows, rank]), (CORE, [rank, rank])];
    if block.subtracts() {
        shapes.push((OFFSET, [rows, rank]));
    }
    shapes
}

/// A frozen parameter of the module at `path`.
pub(super) fn parameter(
    path: &str,
    part: &str,
    values: Vec<f32>,
    dims: [usize; 2],
    device: &Device,
) -> Parameter {
    let value = settled(Tensor::from_data(TensorData::new(values, dims), (device, DType::F32)));
    Parameter::matrix(format!("{path}.{part}"), value)
}

/// Names of the weights that an adapter with these modules changes.
pub(super) fn weights<'a>(paths: impl Iterator<Item = &'a String>) -> Vec<String> {
    paths.map(|path| format!("{path}.weight")).collect()
}

/// Writes the changes of a model, which `block` describes, into the folder `dir`.
///
/// # Errors
/// A value that is not finite, or a failure to write.
pub(super) fn save(
    model: &Decoder,
    block: &LamdaBlock,
    (base, revision, base_sha256): (&str, Option<&str>, &str),
    dir: &Path,
) -> Result<(), AdapterError> {
    let forms: Vec<(&String, &Spectral)> = model
        .projections()
        .filter_map(|projection| match &projection.delta {
            Some(Delta::Spectral(form)) => Some((&projection.path, form)),
            _ => None,
        })
        .collect();
    let mut written = LamdaBlock {
        target_modules: Some(spelled_out(&block.selection(true), &model.base_shapes())?),
        rank_allocation: None,
        ..block.clone()
    };
    // What an allocation has decided.
    let ranks: BTreeMap<&String, usize> = forms.iter().map(|(path, form)| (*path, form.rank())).collect();
    for path in block.modules(&model.base_shapes(), true)?.into_keys() {
        let rank = ranks.get(&path).copied().unwrap_or(0);
        if rank != block.r {
            written.rank_pattern.insert(path, rank);
        }
    }
    let mut config = common_config(FORMAT.peft_type, Some(base), revision);
    config.extend(keys_of(&written));
    config.insert("base_sha256".to_string(), base_sha256.into());

    let mut tensors = Vec::new();
    for (path, form) in forms {
        let of_file = |part: &str| key(path, &format!(".{part}"));
        let whole_b = form.whole_b();
        let dims = whole_b.dims().to_vec();
        let values = move || whole_b.clone().into_data().iter::<f32>().collect();
        tensors.push(finite_tensor(of_file(B), dims, dir, values));
        for parameter in [&form.a, &form.core].into_iter().chain(&form.offset) {
            tensors.push(parameter_tensor(key(&parameter.name, ""), parameter, dir));
        }
    }
    write_adapter(dir, config, tensors)
}

/// A saved LaMDA.
pub(super) struct LamdaAdapter {
    folder: AdapterFolder,
    /// Its keys.
    pub block: LamdaBlock,
    base_sha256: String,
}

impl LamdaAdapter {
    /// Opens an adapter folder.
    ///
    /// # Errors
    /// Files that are missing or damaged, or keys out of range.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let mut folder = AdapterFolder::open(dir)?;
        let Some(Value::String(base_sha256)) = folder.config.remove("base_sha256") else {
            return Err(folder.wrong("base_sha256 is missing, the hash of the weights that are changed"));
        };
        let block: LamdaBlock = folder.parse(FORMAT.peft_type, json!({}))?;
        block.check().map_err(|message| folder.wrong(message))?;
        Ok(Self { folder, block, base_sha256 })
    }

    /// The changes, by path.
    ///
    /// # Errors
    /// Keys that are missing, have no place, have the wrong shape or hold a non-finite value.
    pub fn forms(
        &self,
        base: &BaseShapes,
        device: &Device,
    ) -> Result<BTreeMap<String, Spectral>, AdapterError> {
        let modules = self.block.modules(base, false)?;
        let mut layout = Layout::default();
        for (path, (dims, rank)) in &modules {
            for (part, shape) in shapes(&self.block, *dims, *rank) {
                layout.require(path, &format!(".{part}"), &shape);
            }
        }
        self.folder.require_keys(&layout)?;
        let mut forms = BTreeMap::new();
        for (path, (dims, rank)) in modules {
            let mut read = BTreeMap::new();
            for (part, shape) in shapes(&self.block, dims, rank) {
                let values = self.folder.read(&key(&path, &format!(".{part}")), &shape)?;
                read.insert(part, parameter(&path, part, values, shape, device));
            }
            let offset = read.remove(OFFSET);
            if let (Some(core), Some(b), Some(a)) = (read.remove(CORE), read.remove(B), read.remove(A)) {
                let scale = self.block.scale();
                forms.insert(path, Spectral { a, b, core, frozen: None, offset, scale, dropout: 0.0 });
            }
        }
        Ok(forms)
    }
}

impl SavedAdapter for LamdaAdapter {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    fn parts(&self, base: &BaseShapes, device: &Device) -> Result<Parts, AdapterError> {
        let forms = self.forms(base, device)?.into_iter();
        let changes = forms.map(|(path, form)| (path, Delta::Spectral(form))).collect();
        Ok(Parts { changes, ..Parts::default() })
    }

    fn require_base(&self, base: &Checkpoint) -> Result<(), AdapterError> {
        let file = &self.folder.file;
        let paths = file.names().filter_map(|name| name.strip_suffix(&format!(".{CORE}")));
        let paths: Vec<String> = paths
            .filter_map(|path| path.strip_prefix(peft_core::adapter::PREFIX))
            .map(str::to_string)
            .collect();
        require_base(&self.folder.dir, base, &weights(paths.iter()), &self.base_sha256)
    }
}
