//! Names and shapes of a decoder's parameters, from its configuration alone.

use super::config::ModelConfig;
use super::error::ModelError;
use super::{EMBEDDING, HEAD};
use crate::checkpoint::Headers;
use std::collections::{BTreeMap, BTreeSet};

/// A linear module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectionShape {
    /// The module's path in the checkpoint, `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// `[out, in]`.
    pub dims: [usize; 2],
    /// Whether it has a bias.
    pub bias: bool,
}

/// A parameter as it stands in files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterShape {
    /// Full name, `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[n]` or `[rows, columns]`.
    pub shape: Vec<usize>,
}

impl ParameterShape {
    /// A parameter of that name and shape.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), shape: shape.into() }
    }

    /// Number of elements.
    pub fn numel(&self) -> u64 {
        self.shape.iter().map(|length| *length as u64).product()
    }

    /// Path of the module that it belongs to.
    pub fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or("", |(module, _)| module)
    }
}

impl ProjectionShape {
    fn parameters(&self) -> impl Iterator<Item = ParameterShape> {
        let weight = ParameterShape::new(format!("{}.weight", self.path), self.dims);
        let bias = self.bias.then(|| ParameterShape::new(format!("{}.bias", self.path), [self.dims[0]]));
        std::iter::once(weight).chain(bias)
    }
}

impl ModelConfig {
    /// The seven projections of a layer, in the order q, k, v, o, gate, up, down.
    pub fn layer_projections(&self, layer: usize) -> [ProjectionShape; 7] {
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let (hidden, wide) = (self.hidden_size, self.intermediate_size);
        let at = |module: &str, dims, bias| ProjectionShape {
            path: format!("model.layers.{layer}.{module}"),
            dims,
            bias,
        };
        [
            at("self_attn.q_proj", [q, hidden], self.qkv_bias),
            at("self_attn.k_proj", [kv, hidden], self.qkv_bias),
            at("self_attn.v_proj", [kv, hidden], self.qkv_bias),
            at("self_attn.o_proj", [hidden, q], self.output_bias),
            at("mlp.gate_proj", [wide, hidden], self.mlp_bias),
            at("mlp.up_proj", [wide, hidden], self.mlp_bias),
            at("mlp.down_proj", [hidden, wide], self.mlp_bias),
        ]
    }

    /// The head, where it has a weight of its own.
    pub fn head_projection(&self) -> Option<ProjectionShape> {
        let dims = [self.vocab_size, self.hidden_size];
        (!self.tie_word_embeddings).then(|| ProjectionShape {
            path: "lm_head".to_string(),
            dims,
            bias: false,
        })
    }

    /// Every projection: those of the layers, then an untied head.
    pub fn projections(&self) -> Vec<ProjectionShape> {
        let layers = (0..self.num_hidden_layers).flat_map(|layer| self.layer_projections(layer));
        layers.chain(self.head_projection()).collect()
    }

    /// Every parameter of the decoder, in the order of [`Decoder::parameters`](super::Decoder::parameters).
    pub fn parameters(&self) -> Vec<ParameterShape> {
        let norm = |name: String| ParameterShape::new(name, [self.hidden_size]);
        let mut all =
            vec![ParameterShape::new(format!("{EMBEDDING}.weight"), [self.vocab_size, self.hidden_size])];
        for layer in 0..self.num_hidden_layers {
            let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
            all.extend([norm(at("input_layernorm")), norm(at("post_attention_layernorm"))]);
            if self.qk_norm {
                let names = [at("self_attn.q_norm"), at("self_attn.k_norm")];
                all.extend(names.map(|name| ParameterShape::new(name, [self.head_dim])));
            }
            all.extend(self.layer_projections(layer).iter().flat_map(ProjectionShape::parameters));
        }
        all.push(norm("model.norm.weight".to_string()));
        all.extend(self.head_projection().iter().flat_map(ProjectionShape::parameters));
        all
    }

    /// Sees that a model's headers have every parameter in its shape.
    ///
    /// # Errors
    /// The first that is missing or has another shape.
    pub fn require_in(&self, headers: &Headers) -> Result<(), ModelError> {
        for ParameterShape { name, shape } in self.parameters() {
            let found = headers.tensor(&name)?;
            if found.shape != shape {
                return Err(ModelError::Shape {
                    path: headers.dir().to_path_buf(),
                    tensor: name,
                    found: found.shape.clone(),
                    expected: shape,
                });
            }
        }
        Ok(())
    }

    /// Modules that hold a weight, by path as transformers spells it, with the weight's shape. A head that shares the
    /// embedding's weight is one of them.
    pub fn base_shapes(&self) -> BaseShapes {
        let parameters = self.parameters();
        let weight =
            |p: &ParameterShape| Some((p.name.strip_suffix(".weight")?.to_string(), p.shape.clone()));
        let mut weights: BTreeMap<String, Vec<usize>> = parameters.iter().filter_map(weight).collect();
        if self.tie_word_embeddings {
            weights.insert(HEAD.to_string(), vec![self.vocab_size, self.hidden_size]);
        }
        let biases = self.projections().into_iter().filter(|p| p.bias).map(|p| p.path).collect();
        BaseShapes { weights, biases, tied: self.tie_word_embeddings }
    }
}

/// The modules of a base: what adapters are matched with, before any weight is read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BaseShapes {
    /// Shape of each module's weight, by path.
    pub weights: BTreeMap<String, Vec<usize>>,
    /// Paths of the linear modules with a bias.
    pub biases: BTreeSet<String>,
    /// Whether the head shares the embedding's weight.
    pub tied: bool,
}
