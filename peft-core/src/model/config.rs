//! `config.json` of the supported families, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`,
//! `torch_dtype`) and 5 (`rope_parameters`, `dtype`).

use super::error::ModelError;
use super::rope::RopeScaling;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Families of decoders, by the name transformers gives their causal language model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`: Llama 1–3.x, TinyLlama, SmolLM2.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM`: Qwen2 and Qwen2.5, bias on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: norms on the heads of q and k.
    Qwen3,
    /// `SmolLM3ForCausalLM`: some layers without rotary embedding.
    SmolLm3,
}

impl Family {
    const ALL: [(Family, &'static str, &'static str); 5] = [
        (Family::Llama, "LlamaForCausalLM", "llama"),
        (Family::Mistral, "MistralForCausalLM", "mistral"),
        (Family::Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (Family::Qwen3, "Qwen3ForCausalLM", "qwen3"),
        (Family::SmolLm3, "SmolLM3ForCausalLM", "smollm3"),
    ];

    /// The class name in `architectures`.
    pub fn architecture(self) -> &'static str {
        Self::ALL.iter().find(|(family, ..)| *family == self).map_or("", |(_, architecture, _)| architecture)
    }
}

/// The shape of a decoder. Counts are positive and bounded; `num_attention_heads` is a multiple of
/// `num_key_value_heads`, `head_dim` is even.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// The family.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the head shares the embedding's weight.
    pub tie_word_embeddings: bool,
    /// Bias on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output.
    pub output_bias: bool,
    /// Bias in the feed-forward block.
    pub mlp_bias: bool,
    /// Norms on the heads of q and k.
    pub qk_norm: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// By layer: the attention window, `None` for full attention.
    pub windows: Vec<Option<usize>>,
    /// By layer: whether q and k are rotated.
    pub rotary: Vec<bool>,
}

/// Sizes beyond these are no model but a mistake or an attack.
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 30;

/// A `config.json` with its path, for errors.
struct Reader<'a> {
    path: PathBuf,
    json: &'a Value,
}

impl Reader<'_> {
    fn invalid(&self, key: &str, found: impl ToString, expected: impl ToString) -> ModelError {
        ModelError::InvalidKey {
            path: self.path.clone(),
            key: key.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// The value of a key; null counts as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.invalid(key, value, format!("a whole number from 1 to {max}"))),
        }
    }

    fn required(&self, key: &str, max: usize) -> Result<usize, ModelError> {
        self.size(key, max)?
            .ok_or_else(|| ModelError::MissingKey { path: self.path.clone(), key: key.to_string() })
    }

    fn number(&self, key: &str, default: f64) -> Result<f64, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        match value.as_f64() {
            Some(n) if n.is_finite() && n > 0.0 => Ok(n),
            _ => Err(self.invalid(key, value, "a positive number")),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value.as_bool().ok_or_else(|| self.invalid(key, value, "true or false"))
    }

    fn family(&self) -> Result<Family, ModelError> {
        let named = self.get("architectures").and_then(Value::as_array).and_then(|list| list.first());
        let name = named.or_else(|| self.get("model_type")).and_then(Value::as_str).unwrap_or("(none named)");
        Family::ALL
            .iter()
            .find(|(_, architecture, model_type)| name == *architecture || name == *model_type)
            .map(|(family, ..)| *family)
            .ok_or_else(|| ModelError::UnsupportedArchitecture {
                path: self.path.clone(),
                found: name.to_string(),
                supported: Family::ALL.map(|(_, architecture, _)| architecture).join(", "),
            })
    }

    /// By layer, whether attention is windowed.
    fn windowed(&self, layers: usize, default: impl Fn(usize) -> bool) -> Result<Vec<bool>, ModelError> {
        let Some(value) = self.get("layer_types") else {
            return Ok((0..layers).map(default).collect());
        };
        let types: Option<Vec<bool>> = value.as_array().and_then(|list| {
            let parse = |kind: &Value| match kind.as_str() {
                Some("full_attention") => Some(false),
                Some("sliding_attention") => Some(true),
                _ => None,
            };
            list.iter().map(parse).collect()
        });
        types.filter(|types| types.len() == layers).ok_or_else(|| {
            self.invalid(
                "layer_types",
                value,
                format!("{layers} entries full_attention or sliding_attention"),
            )
        })
    }
}

impl ModelConfig {
    /// Reads the `config.json` of the checkpoint folder `dir`, already parsed as `json`.
    pub fn from_json(dir: &Path, json: &Value) -> Result<Self, ModelError> {
        let reader = Reader { path: dir.join("config.json"), json };
        let family = reader.family()?;

        if let Some(act) = reader.get("hidden_act").filter(|act| act.as_str() != Some("silu")) {
            return Err(reader.invalid("hidden_act", act, "\"silu\""));
        }
        if let Some(quantization) = reader.get("quantization_config") {
            let method = quantization.get("quant_method").unwrap_or(&Value::Null);
            return Err(reader.invalid(
                "quantization_config",
                method,
                "no quantisation (a dense checkpoint)",
            ));
        }

        let hidden_size = reader.required("hidden_size", MAX_WIDTH)?;
        let layers = reader.required("num_hidden_layers", MAX_LAYERS)?;
        let heads = reader.required("num_attention_heads", MAX_WIDTH)?;
        let default_kv_heads = match family {
            _ if json.get("num_key_value_heads").is_some() => heads,
            Family::Llama => heads,
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
            Family::SmolLm3 => 4,
        };
        let kv_heads = reader.size("num_key_value_heads", MAX_WIDTH)?.unwrap_or(default_kv_heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads {heads}");
            return Err(reader.invalid("num_key_value_heads", kv_heads, expected));
        }
        let head_dim = match reader.size("head_dim", MAX_WIDTH)? {
            Some(head_dim) => head_dim,
            None if family == Family::Qwen3 => 128,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let expected = format!("a multiple of num_attention_heads {heads}, or a head_dim");
                return Err(reader.invalid("hidden_size", hidden_size, expected));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(reader.invalid("head_dim", head_dim, "an even number"));
        }
        if heads.saturating_mul(head_dim) > MAX_WIDTH {
            return Err(reader.invalid(
                "num_attention_heads",
                heads,
                format!("heads·head_dim up to {MAX_WIDTH}"),
            ));
        }

        let max_position_embeddings = reader.size("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(2048);
        let default_theta = if family == Family::SmolLm3 { 2e6 } else { 1e4 };
        let (rope_theta, rope_scaling) =
            RopeScaling::read(&reader.path, json, default_theta, max_position_embeddings, head_dim)?;
        let rotary = reader.rotary_layers(family, layers)?;
        let windows = reader.windows(family, layers, &rotary)?;
        let attention_bias = match family {
            Family::Llama | Family::Qwen3 | Family::SmolLm3 => reader.flag("attention_bias", false)?,
            Family::Mistral | Family::Qwen2 => false,
        };

        Ok(Self {
            family,
            vocab_size: reader.required("vocab_size", MAX_VOCAB)?,
            hidden_size,
            intermediate_size: reader.required("intermediate_size", MAX_WIDTH)?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: reader.number("rms_norm_eps", 1e-6)?,
            max_position_embeddings,
            tie_word_embeddings: reader.flag("tie_word_embeddings", family == Family::SmolLm3)?,
            qkv_bias: family == Family::Qwen2 || attention_bias,
            output_bias: attention_bias,
            mlp_bias: matches!(family, Family::Llama | Family::SmolLm3) && reader.flag("mlp_bias", false)?,
            qk_norm: family == Family::Qwen3,
            rope_theta,
            rope_scaling,
            windows,
            rotary,
        })
    }
}

impl Reader<'_> {
    /// SmolLM3 leaves the rotary embedding out of every fourth layer unless the configuration lists the layers.
    fn rotary_layers(&self, family: Family, layers: usize) -> Result<Vec<bool>, ModelError> {
        if family != Family::SmolLm3 {
            return Ok(vec![true; layers]);
        }
        let Some(value) = self.get("no_rope_layers") else {
            let interval = self.size("no_rope_layer_interval", MAX_LAYERS)?.unwrap_or(4);
            return Ok((1..=layers).map(|layer| !layer.is_multiple_of(interval)).collect());
        };
        // Despite its name, 1 marks a layer with rotary embedding.
        let flags: Option<Vec<bool>> = value
            .as_array()
            .and_then(|list| list.iter().map(|flag| flag.as_u64().map(|flag| flag != 0)).collect());
        match flags {
            Some(mut flags) if flags.len() >= layers => {
                flags.truncate(layers);
                Ok(flags)
            }
            _ => Err(self.invalid("no_rope_layers", value, format!("{layers} entries 0 or 1"))),
        }
    }

    /// The window by layer.
    fn windows(
        &self,
        family: Family,
        layers: usize,
        rotary: &[bool],
    ) -> Result<Vec<Option<usize>>, ModelError> {
        let window = self.size("sliding_window", MAX_POSITIONS)?;
        let none = vec![None; layers];
        let windowed = match family {
            Family::Llama => return Ok(none),
            Family::Mistral => {
                // Absent means the default of the first Mistral; null means none.
                let window = if self.json.get("sliding_window").is_none() { Some(4096) } else { window };
                return Ok(vec![window; layers]);
            }
            _ if !self.flag("use_sliding_window", false)? => return Ok(none),
            Family::Qwen2 | Family::Qwen3 => {
                let first = match self.get("max_window_layers") {
                    None => 28,
                    Some(value) => value
                        .as_u64()
                        .and_then(|n| usize::try_from(n).ok())
                        .ok_or_else(|| self.invalid("max_window_layers", value, "a whole number"))?,
                };
                self.windowed(layers, |layer| layer >= first)?
            }
            Family::SmolLm3 => self.windowed(layers, |layer| !rotary[layer])?,
        };
        let default = if family == Family::SmolLm3 { None } else { Some(4096) };
        let window = if self.json.get("sliding_window").is_none() { default } else { window };
        Ok(windowed.into_iter().map(|windowed| window.filter(|_| windowed)).collect())
    }
}
