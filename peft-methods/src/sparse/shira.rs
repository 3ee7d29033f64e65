//! A sparse adapter as one of Hugging Face PEFT's SHiRA (Bhardwaj et al., arXiv 2406.13175).
//!
//! A SHiRA has `r·(out + in)` values in every module, with one `r` for all. A module with fewer gets zeros at further
//! positions, which change nothing. It cannot be written where a module has less than `r·(out + in)` places.
//!
//! Tensors of a module: `.shira_weight`, f32 `[values]`, and `.shira_indices`, i32 `[2, values]`, rows above columns.

use super::file::{SparseAdapter, SparseModule};
use peft_core::adapter::{AdapterError, SavedAdapter, common_config, key, write_adapter};
use peft_core::checkpoint::{Dtype, LazyTensor, f32_bytes};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::path::Path;

/// What an export wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShiraReport {
    /// `r`.
    pub r: usize,
    /// Values of the adapter.
    pub values: usize,
    /// Zeros added.
    pub padding: usize,
}

/// Writes `adapter` in SHiRA's format into the existing folder `dir`.
///
/// # Errors
/// A module with too few places, an adapter that is damaged, or a failure to write.
pub fn export_shira(adapter: &SparseAdapter, dir: &Path) -> Result<ShiraReport, AdapterError> {
    let modules = adapter.modules()?;
    let sides = |module: &SparseModule| module.pattern.dims().iter().sum::<usize>();
    let r = modules.values().map(|module| module.pattern.len().div_ceil(sides(module))).max().unwrap_or(0);
    let mut report = ShiraReport { r, values: 0, padding: 0 };
    for (path, module) in &modules {
        let [rows, columns] = module.pattern.dims();
        let wanted = r * (rows + columns);
        if wanted > rows * columns {
            let reason = format!(
                "cannot be written as a SHiRA: another module's values need r = {r}, that is {wanted} values of this \
                 one, which has {rows}×{columns} weights"
            );
            return Err(AdapterError::Target { module: path.clone(), reason });
        }
        report.values += module.pattern.len();
        report.padding += wanted - module.pattern.len();
    }
    let folder = adapter.folder();
    let text = |key: &str| folder.config.get(key).and_then(Value::as_str);
    let mut config = common_config("SHIRA", text("base_model_name_or_path"), text("revision"));
    let keys = json!({
        "r": r, "mask_type": "random", "random_seed": null, "fan_in_fan_out": false, "init_weights": true,
        "modules_to_save": null, "target_modules": modules.keys().collect::<Vec<_>>(),
    });
    config.extend(keys.as_object().cloned().unwrap_or_default());
    let mut tensors = Vec::new();
    for (path, module) in &modules {
        let count = r * sides(module);
        let (weight, indices) = (key(path, ".shira_weight"), key(path, ".shira_indices"));
        tensors.push(LazyTensor::new(weight, Dtype::F32, vec![count], move || {
            let mut values = module.values.clone();
            values.resize(count, 0.0);
            Ok(Cow::Owned(f32_bytes(&values)))
        }));
        tensors.push(LazyTensor::new(indices, Dtype::I32, vec![2, count], move || {
            let positions = padded(module.pattern.positions(), count);
            let width = module.pattern.dims()[1] as u32;
            let rows = positions.iter().map(|position| position / width);
            let columns = positions.iter().map(|position| position % width);
            Ok(Cow::Owned(rows.chain(columns).flat_map(|index| (index as i32).to_le_bytes()).collect()))
        }));
    }
    write_adapter(dir, config, tensors)?;
    Ok(report)
}

/// The ascending `positions`, followed by the lowest others until there are `count`.
fn padded(positions: &[u32], count: usize) -> Vec<u32> {
    let mut taken = positions.iter().copied().peekable();
    let free = (0..).filter(|position| taken.next_if_eq(position).is_none());
    positions.iter().copied().chain(free).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_takes_free_places() {
        assert_eq!(padded(&[1, 2, 5], 7), [1, 2, 5, 0, 3, 4, 6]);
        assert_eq!(padded(&[0, 4], 2), [0, 4]);
        assert_eq!(padded(&[], 3), [0, 1, 2]);
    }
}
