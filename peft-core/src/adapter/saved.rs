//! A saved adapter: what a folder holds, matched with a base, attached to a model or folded into a checkpoint.

use super::error::AdapterError;
use super::fold::base_shapes;
use super::folder::AdapterFolder;
use super::rewrite::{Rewrite, TensorChange};
use crate::checkpoint::Checkpoint;
use crate::model::{BaseShapes, Decoder, EMBEDDING, HEAD};
use crate::projection::Delta;
use burn::tensor::{DType, Device, Tensor, TensorData};
use std::collections::{BTreeMap, BTreeSet};

/// What an adapter changes of a base.
#[derive(Debug, Default)]
pub struct Parts {
    /// Changes of linear modules, by path.
    pub changes: BTreeMap<String, Delta>,
    /// Replacements of whole tensors, by parameter name, row-major.
    pub whole: BTreeMap<String, Vec<f32>>,
}

/// How an adapter is folded into a checkpoint.
#[derive(Default)]
pub struct Folding<'a> {
    /// What becomes of the tensors.
    pub rewrite: Rewrite<'a>,
    /// Weights that a change is added to.
    pub folded: usize,
    /// Tensors replaced whole.
    pub replaced: usize,
    /// Whether a weight that embedding and head share becomes two.
    pub parted: bool,
}

/// How a fold is undone without the original.
#[derive(Default)]
pub struct Unfolding<'a> {
    /// Changes back, by tensor name.
    pub undo: BTreeMap<String, TensorChange<'a>>,
    /// Tensors whose original cannot be computed.
    pub lost: BTreeSet<String>,
}

/// An adapter read from its folder.
///
/// A format gives its [`parts`](Self::parts); attaching and folding follow from them.
pub trait SavedAdapter: Send + Sync {
    /// The folder.
    fn folder(&self) -> &AdapterFolder;

    /// Reads every tensor against the base. The parameters of the changes are frozen.
    ///
    /// # Errors
    /// Keys that are missing, have no place, have the wrong shape or hold a non-finite value.
    fn parts(&self, base: &BaseShapes, device: &Device) -> Result<Parts, AdapterError>;

    /// Sees that `base` has the weights that the adapter was made for, as far as the file says.
    ///
    /// # Errors
    /// [`AdapterError::WrongBase`].
    fn require_base(&self, _base: &Checkpoint) -> Result<(), AdapterError> {
        Ok(())
    }

    /// Puts the adapter onto a decoder. Its parameters are frozen.
    ///
    /// # Errors
    /// As for [`parts`](Self::parts).
    fn attach(&self, model: &mut Decoder) -> Result<(), AdapterError> {
        let device = model.device.clone();
        let Parts { mut changes, whole } = self.parts(&model.base_shapes(), &device)?;
        for parameter in model.parameters_mut() {
            if let Some(values) = whole.get(&parameter.name) {
                let data = TensorData::new(values.clone(), parameter.value.dims());
                parameter.settle(Tensor::from_data(data, (&device, DType::F32)));
            }
        }
        for projection in model.projections_mut() {
            if let Some(mut delta) = changes.remove(&projection.path) {
                for parameter in delta.parameters_mut() {
                    parameter.settle(parameter.value.clone());
                }
                projection.delta = Some(delta);
            }
        }
        match changes.into_keys().next() {
            None => Ok(()),
            Some(module) => Err(no_projection(module)),
        }
    }

    /// How the adapter is folded into `base`.
    ///
    /// # Errors
    /// As for [`parts`](Self::parts); a change of a bias that is not there.
    fn folding<'a>(&'a self, base: &'a Checkpoint) -> Result<Folding<'a>, AdapterError> {
        let shapes = base_shapes(base)?;
        let Parts { changes, whole } = self.parts(&shapes, &Device::flex())?;
        let (folded, replaced) = (changes.len(), whole.len());
        let mut rewrite = Rewrite::default();
        for (path, delta) in changes {
            let Some(dims) =
                shapes.weights.get(&path).and_then(|shape| <[usize; 2]>::try_from(&**shape).ok())
            else {
                return Err(no_projection(path));
            };
            if shapes.biases.contains(&path) {
                let delta = delta.clone();
                let change = move |bias: Vec<f32>| {
                    let bias = matrix(bias.clone(), [1, bias.len()]);
                    let change = delta.bias_change(Some(&bias));
                    Ok(to_host(change.map_or_else(|| bias.clone(), |change| bias.clone() + change)))
                };
                rewrite.changes.insert(format!("{path}.bias"), Box::new(change));
            } else if delta.bias_change(None).is_some() {
                let reason = "has no bias that that of its change could be folded into".to_string();
                return Err(AdapterError::Target { module: path, reason });
            }
            let change = move |weight| {
                let weight = matrix(weight, dims);
                let dense = delta.dense(&weight);
                Ok(to_host(weight + dense))
            };
            rewrite.changes.insert(format!("{path}.weight"), Box::new(change));
        }
        let head = format!("{HEAD}.weight");
        // A copy of a shared weight that is saved as the head changes with it.
        let has_copy = shapes.tied && base.contains(&head);
        for (name, values) in whole {
            if has_copy && name == format!("{EMBEDDING}.weight") {
                let values = values.clone();
                rewrite.changes.insert(head.clone(), Box::new(move |_| Ok(values.clone())));
            }
            rewrite.changes.insert(name, Box::new(move |_| Ok(values.clone())));
        }
        Ok(Folding { rewrite, folded, replaced, parted: false })
    }

    /// How folding into `merged` is undone without its original.
    ///
    /// # Errors
    /// As for [`parts`](Self::parts).
    fn unfolding<'a>(&'a self, merged: &'a Checkpoint) -> Result<Unfolding<'a>, AdapterError> {
        let shapes = base_shapes(merged)?;
        let Parts { changes, whole } = self.parts(&shapes, &Device::flex())?;
        let mut unfolding = Unfolding::default();
        unfolding.lost.extend(whole.into_keys());
        for (path, delta) in changes {
            let (weight, bias) = (format!("{path}.weight"), format!("{path}.bias"));
            if !delta.is_additive() {
                unfolding.lost.extend([weight, bias]);
                continue;
            }
            if let Some(change) = delta.bias_change(None) {
                let change = to_host(change);
                let undo = move |bias: Vec<f32>| Ok(bias.iter().zip(&change).map(|(b, c)| b - c).collect());
                unfolding.undo.insert(bias, Box::new(undo));
            }
            let dims = shapes.weights.get(&path).and_then(|shape| <[usize; 2]>::try_from(&**shape).ok());
            let Some(dims) = dims else { return Err(no_projection(path)) };
            let undo = move |values| {
                let values = matrix(values, dims);
                let dense = delta.dense(&values);
                Ok(to_host(values - dense))
            };
            unfolding.undo.insert(weight, Box::new(undo));
        }
        unfolding.lost.retain(|name| merged.contains(name));
        Ok(unfolding)
    }
}

/// Gives the changes and trained parameters of `model` the values that `start` has for them; both must have the same.
///
/// # Errors
/// Those of reading `start`, or something that one has and the other has not, or in another shape.
pub fn take_values(start: &dyn SavedAdapter, model: &mut Decoder) -> Result<(), AdapterError> {
    let folder = start.folder();
    let differs = |what: String| folder.wrong(format!("adapter_name_or_path: {what}"));
    let device = model.device.clone();
    let Parts { mut changes, mut whole } = start.parts(&model.base_shapes(), &device)?;
    let own = model.parameters().into_iter().filter(|p| p.trainable).map(|p| p.name.clone());
    let own: BTreeSet<String> = own.collect();
    for parameter in model.parameters_mut().into_iter().filter(|p| own.contains(&p.name)) {
        let name = &parameter.name;
        let values = whole.remove(name).ok_or_else(|| differs(format!("that adapter has no `{name}`")))?;
        let data = TensorData::new(values, parameter.value.dims());
        parameter.settle(Tensor::from_data(data, (&device, DType::F32)));
    }
    if let Some(name) = whole.into_keys().next() {
        return Err(differs(format!("`{name}` of that adapter does not train in this recipe")));
    }
    for projection in model.projections_mut() {
        let path = &projection.path;
        let Some(delta) = &mut projection.delta else { continue };
        let missing = || differs(format!("that adapter does not change `{path}`"));
        let given = changes.remove(path).ok_or_else(missing)?;
        for parameter in delta.parameters_mut() {
            let (name, shape) = (&parameter.name, &parameter.shape);
            let same = given.parameters().into_iter().find(|p| p.name == *name && p.shape == *shape);
            let same =
                same.ok_or_else(|| differs(format!("that adapter has no `{name}` of shape {shape:?}")))?;
            parameter.settle(same.value.clone());
        }
    }
    match changes.into_keys().next() {
        None => Ok(()),
        Some(path) => {
            Err(differs(format!("`{path}`, which that adapter changes, is no target of this recipe")))
        }
    }
}

fn no_projection(module: String) -> AdapterError {
    AdapterError::Target { module, reason: "is no linear module with a weight of its own".to_string() }
}

fn matrix(values: Vec<f32>, dims: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, dims), (&Device::flex(), DType::F32))
}

fn to_host(values: Tensor<2>) -> Vec<f32> {
    values.into_data().iter::<f32>().collect()
}
