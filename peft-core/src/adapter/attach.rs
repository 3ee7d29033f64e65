//! An adapter put onto a decoder.

use super::error::AdapterError;
use super::file::{Adapter, LowRankModule, Resolved, RowsModule};
use super::fold::lora_folding;
use super::folder::AdapterFolder;
use super::initial::{Place, attach_factors, failed, recomputed};
use super::placement::SharedWeight;
use super::saved::{Folding, Parts, SavedAdapter, Unfolding};
use super::unfold::lora_unfolding;
use crate::checkpoint::Checkpoint;
use crate::model::{BaseShapes, Decoder, EMBEDDING};
use crate::projection::{Delta, LowRank, Magnitude, Parameter, TokenRows};
use burn::tensor::{DType, Device, Tensor, TensorData};

impl SavedAdapter for Adapter {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    /// The changes of a plain LoRA. What embeddings, rows and magnitudes are is not told apart from the model.
    fn parts(&self, base: &BaseShapes, device: &Device) -> Result<Parts, AdapterError> {
        let Resolved { linear, embedding, whole, rows, shared } = self.resolve(base)?;
        let is_plain = embedding.is_none() && rows.is_empty() && shared == SharedWeight::Untouched;
        let changes_base = recomputed(self.config.lora.init_lora_weights).is_some();
        if !is_plain || changes_base || self.config.lora.use_dora {
            return Err(self.folder.wrong("is not a plain LoRA of linear modules".to_string()));
        }
        let dropout = self.config.lora.lora_dropout;
        let changes = linear.into_iter().map(|(path, module)| {
            let names = ["lora_A.weight", "lora_B.weight"].map(|part| format!("{path}.{part}"));
            let form = low_rank(&module, &path, names, linear_dims(&module), dropout, device);
            (path, Delta::LowRank(form))
        });
        Ok(Parts { changes: changes.collect(), whole })
    }

    fn folding<'a>(&'a self, base: &'a Checkpoint) -> Result<Folding<'a>, AdapterError> {
        lora_folding(self, base)
    }

    fn unfolding<'a>(&'a self, merged: &'a Checkpoint) -> Result<Unfolding<'a>, AdapterError> {
        lora_unfolding(self, merged)
    }

    /// The base that an unconverted PiSSA or OLoRA adapter belongs to is computed from the decoder's weights.
    fn attach(&self, model: &mut Decoder) -> Result<(), AdapterError> {
        let resolved = self.resolve(&model.base_shapes())?;
        let device = model.device.clone();
        let dropout = self.config.lora.lora_dropout;
        if resolved.shared == SharedWeight::Parted {
            model.part_head();
        }
        // Whole tensors first: the magnitudes of a change are taken on the weight below it.
        for parameter in model.parameters_mut() {
            if let Some(values) = resolved.whole.get(&parameter.name) {
                parameter.value = tensor(values, parameter.value.dims(), &device);
            }
        }
        let initial = recomputed(self.config.lora.init_lora_weights);
        if let Some(initial) = initial {
            // The base that the factors belong to is what their first values left of it, unless it is in the file.
            let place = |path: &str| {
                let module = resolved.linear.get(path)?;
                let own = resolved.whole.contains_key(&format!("{path}.weight"));
                (!own).then_some(Place { rank: module.rank, scale: module.scale, dropout })
            };
            attach_factors(model, place, |path, weight, place| {
                initial(weight, place.rank, place.scale).map_err(|source| failed(path, source))
            })?;
        }
        for projection in model.projections_mut() {
            if let Some(module) = resolved.linear.get(&projection.path) {
                let path = &projection.path;
                let names = ["lora_A.weight", "lora_B.weight"].map(|part| format!("{path}.{part}"));
                let mut form = low_rank(module, path, names, linear_dims(module), dropout, &device);
                form.magnitude = magnitude(module, path, &projection.weight.value, &form, &device);
                if let (Some(_), Some(Delta::LowRank(first))) = (initial, projection.delta.take()) {
                    form.removed = first.removed;
                }
                projection.delta = Some(Delta::LowRank(form));
            }
        }
        if let Some(module) = &resolved.embedding {
            let [vocab, hidden] = module.dims;
            let (a, b) = ([module.rank, vocab], [hidden, module.rank]);
            let names = ["lora_embedding_A", "lora_embedding_B"].map(|part| format!("{EMBEDDING}.{part}"));
            let weight = model.embed_tokens.weight.value.clone().transpose();
            let mut form = low_rank(module, EMBEDDING, names, (a, b), dropout, &device);
            form.magnitude = magnitude(module, EMBEDDING, &weight, &form, &device);
            model.embed_tokens.delta = Some(form);
        }
        for (path, RowsModule { indices, values }) in resolved.rows {
            let width = values.len() / indices.len();
            let values = tensor(&values, [indices.len(), width], &device);
            model.replace_rows(&path, indices, values);
        }
        Ok(())
    }
}

impl Decoder {
    /// Puts rows `values` `[indices, hidden]` in place of those of the embedding, or of the head where `path` is the head's.
    pub fn replace_rows(&mut self, path: &str, indices: Vec<u32>, values: Tensor<2>) {
        let name = format!("{path}.token_adapter.trainable_tokens_delta");
        let rows = TokenRows::new(name, indices, values, self.config.vocab_size, &self.device);
        match path {
            EMBEDDING => self.embed_tokens.rows = Some(rows),
            _ => self.head_rows = Some(rows),
        }
    }
}

fn tensor(values: &[f32], dims: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values.to_vec(), dims), (device, DType::F32))
}

/// The form of a module's change; `weight` is what it changes, `[out, in]`.
/// Shapes of `A` and `B` of a linear module.
fn linear_dims(module: &LowRankModule) -> ([usize; 2], [usize; 2]) {
    let [rows, columns] = module.dims;
    ([module.rank, columns], [rows, module.rank])
}

/// The change of a module, without magnitudes.
fn low_rank(
    module: &LowRankModule,
    path: &str,
    [a_name, b_name]: [String; 2],
    (a, b): ([usize; 2], [usize; 2]),
    dropout: f64,
    device: &Device,
) -> LowRank {
    let (a, b) = (tensor(&module.a, a, device), tensor(&module.b, b, device));
    let bias = module.bias.as_ref().map(|values| vector(format!("{path}.lora_B.bias"), values, device));
    LowRank {
        a: Parameter::matrix(a_name, a),
        b: Parameter::matrix(b_name, b),
        bias,
        magnitude: None,
        scale: module.scale,
        dropout,
        removed: None,
    }
}

/// The magnitudes of a module with the change `form` on top of `weight`.
fn magnitude(
    module: &LowRankModule,
    path: &str,
    weight: &Tensor<2>,
    form: &LowRank,
    device: &Device,
) -> Option<Magnitude> {
    module.magnitude.as_ref().map(|values| {
        let name = format!("{path}.lora_magnitude_vector");
        let mut magnitude = Magnitude::new(name.clone(), weight, &form.a.value, &form.b.value, module.scale);
        magnitude.lengths = vector(name, values, device);
        magnitude
    })
}

fn vector(name: String, values: &[f32], device: &Device) -> Parameter {
    let value = tensor(values, [1, values.len()], device);
    Parameter { name, value, shape: vec![values.len()], trainable: false }
}
