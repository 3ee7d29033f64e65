//! A checkpoint onto a device, tensor by tensor: at most one tensor is held twice at any time.

use super::EMBEDDING;
use super::attention::Attention;
use super::config::ModelConfig;
use super::decoder::Decoder;
use super::error::ModelError;
use super::layer::Layer;
use super::shapes::ProjectionShape;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::kernels::settled;
use crate::projection::{Embedding, Parameter, Projection};
use burn::tensor::{DType, Device, Tensor, TensorData};
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Type of base weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComputeType {
    /// 32-bit floats: the CPU's type.
    F32,
    /// bfloat16: the GPU's type.
    Bf16,
}

impl ComputeType {
    /// burn's name of the type.
    pub fn dtype(self) -> DType {
        match self {
            ComputeType::F32 => DType::F32,
            ComputeType::Bf16 => DType::BF16,
        }
    }
}

/// Loads the checkpoint as a decoder with frozen weights in `compute`.
///
/// # Errors
/// An unsupported configuration; tensors that are missing, superfluous, wrongly shaped or not finite.
pub fn load(checkpoint: &Checkpoint, device: &Device, compute: ComputeType) -> Result<Decoder, ModelError> {
    let mut config = ModelConfig::from_json(checkpoint.dir(), checkpoint.config())?;
    config.tie_word_embeddings = ties_embeddings(checkpoint)?;
    let config = config;
    let loader = Loader { checkpoint, device, compute, taken: RefCell::default() };
    let c = &config;
    let weight = loader.matrix("model.embed_tokens.weight", [c.vocab_size, c.hidden_size])?;
    let path = EMBEDDING.to_string();
    let embed_tokens = Embedding { path, weight, delta: None, rows: None };
    let layers =
        (0..c.num_hidden_layers).map(|index| loader.layer(c, index)).collect::<Result<Vec<_>, _>>()?;
    let norm = loader.vector("model.norm.weight", c.hidden_size)?;
    let lm_head = c.head_projection().map(|head| loader.projection(head)).transpose()?;
    loader.refuse_rest(c)?;
    // What the weights went through goes back.
    device.memory_cleanup();
    let dtype = compute.dtype();
    Ok(Decoder {
        device: device.clone(),
        dtype,
        embed_tokens,
        layers,
        norm,
        lm_head,
        head_rows: None,
        config,
    })
}

/// Whether head and embedding share their weight: the configuration says so, and no head of other values is saved
/// beside the embedding, which would count.
///
/// # Errors
/// An unsupported configuration.
pub fn ties_embeddings(checkpoint: &Checkpoint) -> Result<bool, ModelError> {
    let config = ModelConfig::from_json(checkpoint.dir(), checkpoint.config())?;
    let (head, embedding) = ("lm_head.weight", "model.embed_tokens.weight");
    if !config.tie_word_embeddings || !checkpoint.contains(head) || !checkpoint.contains(embedding) {
        return Ok(config.tie_word_embeddings);
    }
    let same = checkpoint.tensor(head)?.bytes == checkpoint.tensor(embedding)?.bytes;
    checkpoint.release(head);
    checkpoint.release(embedding);
    Ok(same)
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a Device,
    compute: ComputeType,
    taken: RefCell<BTreeSet<String>>,
}

impl Loader<'_> {
    fn layer(&self, c: &ModelConfig, index: usize) -> Result<Layer, ModelError> {
        let prefix = format!("model.layers.{index}");
        let attention = format!("{prefix}.self_attn");
        let qk_norm = match c.qk_norm {
            true => Some((
                self.vector(&format!("{attention}.q_norm.weight"), c.head_dim)?,
                self.vector(&format!("{attention}.k_norm.weight"), c.head_dim)?,
            )),
            false => None,
        };
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = c.layer_projections(index);
        let [q_proj, k_proj, v_proj] = self.adjoining([q_proj, k_proj, v_proj])?;
        let [gate_proj, up_proj] = self.adjoining([gate_proj, up_proj])?;
        Ok(Layer {
            input_norm: self.vector(&format!("{prefix}.input_layernorm.weight"), c.hidden_size)?,
            attention: Attention {
                q_proj,
                k_proj,
                v_proj,
                o_proj: self.projection(o_proj)?,
                qk_norm,
                head_dim: c.head_dim,
                epsilon: c.rms_norm_eps,
                rotary: c.rotary[index],
                window: c.windows[index],
            },
            post_attention_norm: self
                .vector(&format!("{prefix}.post_attention_layernorm.weight"), c.hidden_size)?,
            gate_proj,
            up_proj,
            down_proj: self.projection(down_proj)?,
            epsilon: c.rms_norm_eps,
        })
    }

    /// Projections of one input, whose weights lie one after another in the memory of a GPU: one product can then do for
    /// all of them.
    fn adjoining<const N: usize>(&self, shapes: [ProjectionShape; N]) -> Result<[Projection; N], ModelError> {
        let mut projections = Vec::with_capacity(N);
        for shape in shapes {
            projections.push(self.projection(shape)?);
        }
        if *self.device != Device::flex() {
            let weights = projections.iter().map(|projection| projection.weight.value.clone());
            let joint = settled(Tensor::cat(weights.collect(), 0));
            let mut start = 0;
            for projection in &mut projections {
                let rows = projection.dims()[0];
                projection.weight.value = joint.clone().narrow(0, start, rows);
                start += rows;
            }
        }
        Ok(projections.try_into().expect("as many as there were shapes"))
    }

    fn projection(&self, shape: ProjectionShape) -> Result<Projection, ModelError> {
        let ProjectionShape { path, dims, bias } = shape;
        let weight = self.matrix(&format!("{path}.weight"), dims)?;
        let bias = match bias {
            true => Some(self.vector(&format!("{path}.bias"), dims[0])?),
            false => None,
        };
        Ok(Projection { path, weight, bias, delta: None })
    }

    fn matrix(&self, name: &str, dims: [usize; 2]) -> Result<Parameter, ModelError> {
        self.parameter(name, dims.to_vec(), dims)
    }

    fn vector(&self, name: &str, length: usize) -> Result<Parameter, ModelError> {
        self.parameter(name, vec![length], [1, length])
    }

    fn parameter(&self, name: &str, shape: Vec<usize>, dims: [usize; 2]) -> Result<Parameter, ModelError> {
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.shape != shape {
            return Err(ModelError::Shape {
                path: self.checkpoint.dir().to_path_buf(),
                tensor: name.to_string(),
                found: tensor.shape.to_vec(),
                expected: shape,
            });
        }
        let data = match (self.compute, tensor.dtype) {
            (ComputeType::Bf16, Dtype::BF16) => {
                self.require_finite(
                    name,
                    tensor.bytes.par_chunks_exact(2).enumerate().find_map_first(|(i, b)| {
                        let value = half::bf16::from_le_bytes([b[0], b[1]]);
                        (!value.is_finite()).then(|| (i, value.to_f32()))
                    }),
                )?;
                TensorData::from_bytes_vec(tensor.bytes.to_vec(), dims, DType::BF16)
            }
            _ => {
                let values = tensor.to_f32()?;
                let bad = values
                    .par_iter()
                    .enumerate()
                    .find_map_first(|(i, v)| (!v.is_finite()).then_some((i, *v)));
                self.require_finite(name, bad)?;
                TensorData::new(values, dims)
            }
        };
        // The device has its copy now; without this, the whole file would count as memory for the rest of the run.
        self.checkpoint.release(name);
        self.taken.borrow_mut().insert(name.to_string());
        let value = settled(Tensor::from_data(data, (self.device, self.compute.dtype())));
        Ok(Parameter { name: name.to_string(), value, shape, trainable: false })
    }

    fn require_finite(&self, name: &str, bad: Option<(usize, f32)>) -> Result<(), ModelError> {
        match bad {
            None => Ok(()),
            Some((index, value)) => Err(ModelError::NonFinite {
                path: self.checkpoint.dir().to_path_buf(),
                tensor: name.to_string(),
                value,
                index,
            }),
        }
    }

    /// A tensor without a place means that the configuration is not the one the weights were made with. Buffers that
    /// old exports saved, and a head saved beside the embedding it shares, are no weights.
    fn refuse_rest(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let taken = self.taken.borrow();
        let rest: Vec<&str> = self
            .checkpoint
            .names()
            .filter(|name| !taken.contains(*name))
            .filter(|name| !name.ends_with("rotary_emb.inv_freq"))
            .filter(|name| !(config.tie_word_embeddings && *name == "lm_head.weight"))
            .collect();
        match rest.first() {
            None => Ok(()),
            Some(first) => Err(ModelError::UnexpectedTensor {
                path: self.checkpoint.dir().to_path_buf(),
                tensor: first.to_string(),
                others: rest.len() - 1,
                architecture: config.family.architecture(),
            }),
        }
    }
}
