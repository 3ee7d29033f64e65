//! LoRA-FA (Zhang et al., arXiv 2308.03303) as PEFT trains it: `A` stays as drawn, and the gradient of `B` becomes the one
//! whose change of `ΔW` is nearest to that of a free `ΔW`: `g ← g·(A·Aᵀ)⁻¹/s²`.

use burn::tensor::{DType, Tensor, TensorData};
use peft_core::adapter::AdapterError;
use peft_core::linalg::{Matrix, spd_inverse};
use peft_core::model::Decoder;
use peft_core::projection::Delta;
use std::collections::BTreeMap;

/// Added to the diagonal of `A·Aᵀ`, as PEFT does.
const DAMPING: f64 = 1e-8;

/// By name of a `B`: `(A·Aᵀ)⁻¹/s²`, `[r, r]`.
pub(super) type Preconditioners = BTreeMap<String, Tensor<2>>;

/// The preconditioners of a model whose changes stand.
///
/// # Errors
/// Rows of an `A` that depend on one another.
pub(super) fn preconditioners(model: &Decoder) -> Result<Preconditioners, AdapterError> {
    let mut found = Preconditioners::new();
    for projection in model.projections() {
        let Some(Delta::LowRank(form)) = &projection.delta else { continue };
        let dependent = |error: peft_core::linalg::LinalgError| AdapterError::Target {
            module: projection.path.clone(),
            reason: format!("has an A whose rows depend on one another, which lora_fa cannot use: {error}"),
        };
        let rank = form.rank();
        let a = Matrix::from_rows(&form.a.to_host(), form.a.value.dims()).map_err(dependent)?;
        let gram = a.times_transpose(&a).map_err(dependent)?;
        let damped =
            Matrix::from_fn([rank, rank], |i, j| gram.get(i, j) + if i == j { DAMPING } else { 0.0 });
        let inverse = spd_inverse(&damped).map_err(dependent)?;
        let scale = 1.0 / form.scale.powi(2);
        let values = Matrix::from_fn([rank, rank], |i, j| scale * inverse.get(i, j)).to_rows();
        let values = Tensor::from_data(TensorData::new(values, [rank, rank]), (&model.device, DType::F32));
        found.insert(form.b.name.clone(), values);
    }
    Ok(found)
}
