//! An adapter put onto a decoder.

use super::error::AdapterError;
use super::file::{Adapter, LowRankModule, RowsModule};
use super::initial::{Place, attach_factors, failed, recomputed};
use super::placement::SharedWeight;
use crate::model::{Decoder, EMBEDDING};
use crate::projection::{Delta, LowRank, Magnitude, Parameter, TokenRows};
use burn::tensor::{DType, Device, Tensor, TensorData};

impl Adapter {
    /// Puts the adapter onto a decoder. Its parameters are frozen. The base that an unconverted PiSSA or OLoRA adapter
    /// belongs to is computed from the decoder's weights.
    ///
    /// # Errors
    /// As for [`Adapter::resolve`], and [`AdapterError::Decomposition`].
    pub fn attach(&self, model: &mut Decoder) -> Result<(), AdapterError> {
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
                let [rows, columns] = module.dims;
                let (a, b) = ([module.rank, columns], [rows, module.rank]);
                let names =
                    ["lora_A.weight", "lora_B.weight"].map(|part| format!("{}.{part}", projection.path));
                let weight = projection.weight.value.clone();
                let mut form = low_rank(module, &projection.path, names, (a, b), &weight, dropout, &device);
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
            model.embed_tokens.delta =
                Some(low_rank(module, EMBEDDING, names, (a, b), &weight, dropout, &device));
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
fn low_rank(
    module: &LowRankModule,
    path: &str,
    [a_name, b_name]: [String; 2],
    (a, b): ([usize; 2], [usize; 2]),
    weight: &Tensor<2>,
    dropout: f64,
    device: &Device,
) -> LowRank {
    let vector = |name: String, values: &[f32]| Parameter {
        name,
        value: tensor(values, [1, values.len()], device),
        shape: vec![values.len()],
        trainable: false,
    };
    let (a, b) = (tensor(&module.a, a, device), tensor(&module.b, b, device));
    let magnitude = module.magnitude.as_ref().map(|values| {
        let name = format!("{path}.lora_magnitude_vector");
        let mut magnitude = Magnitude::new(name.clone(), weight, &a, &b, module.scale);
        magnitude.lengths = vector(name, values);
        magnitude
    });
    LowRank {
        a: Parameter::matrix(a_name, a),
        b: Parameter::matrix(b_name, b),
        bias: module.bias.as_ref().map(|values| vector(format!("{path}.lora_B.bias"), values)),
        magnitude,
        scale: module.scale,
        dropout,
        removed: None,
    }
}
