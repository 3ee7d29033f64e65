//! Randomly initialised Llamas of known shapes.
#![allow(dead_code)] // Each bench takes what it needs.

use burn::tensor::Device;
use peft_core::checkpoint::{Checkpoint, CheckpointError, Dtype, LazyTensor, from_f32, write_safetensors};
use peft_core::model::{ComputeType, Decoder, ModelConfig, load};
use peft_core::random::Stream;
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

#[path = "../../src/allocator.rs"]
mod allocator;

pub type Failure = Box<dyn Error + Send + Sync>;

/// Hidden and intermediate features, layers, heads, key/value heads, head features, vocabulary, whether the head is tied.
type Shape = (usize, usize, usize, usize, usize, usize, usize, bool);

/// The shapes of `bench/shapes.py`.
const SHAPES: [(&str, Shape); 5] = [
    ("tiny", (128, 352, 2, 4, 2, 32, 1000, true)),
    ("25m", (512, 1408, 8, 8, 4, 64, 32_000, true)),
    ("smollm2-135m", (576, 1536, 30, 9, 3, 64, 49_152, true)),
    ("1b", (2048, 8192, 16, 32, 8, 64, 128_256, true)),
    ("8b", (4096, 14_336, 32, 32, 8, 128, 128_256, false)),
];

/// Different random numbers of a tensor; they repeat, so that billions of weights are made in seconds.
const PERIOD: usize = 1 << 20;

/// The device and type of activations of that name.
pub fn device(name: &str, dtype: Option<&str>) -> Result<(Device, ComputeType), Failure> {
    let (device, usual) = match name {
        "cpu" => (Device::flex(), ComputeType::F32),
        #[cfg(feature = "cuda")]
        "cuda" => (Device::cuda(0), ComputeType::Bf16),
        other => return Err(format!("this benchmark has no device `{other}`").into()),
    };
    let compute = match dtype {
        None => usual,
        Some("f32") => ComputeType::F32,
        Some("bf16") => ComputeType::Bf16,
        Some(other) => return Err(format!("no such type: {other}").into()),
    };
    Ok((device, compute))
}

/// What the operations of a layer and the head are sized by.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
}

/// The sizes of the shape of that name.
pub fn sizes(shape: &str) -> Result<Sizes, Failure> {
    let (hidden, intermediate, _, heads, kv_heads, head_dim, vocab, _) = named(shape)?;
    Ok(Sizes { hidden, intermediate, heads, kv_heads, head_dim, vocab })
}

fn named(shape: &str) -> Result<Shape, Failure> {
    let found = SHAPES.iter().find(|(name, _)| *name == shape);
    found.map(|(_, shape)| *shape).ok_or_else(|| format!("no such shape: {shape}").into())
}

/// A Llama of the shape with uniform weights of deviation 0.02.
pub fn random_model(shape: &str, device: &Device, compute: ComputeType) -> Result<Decoder, Failure> {
    let (hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied) = named(shape)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu",
    });
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("config.json"), config.to_string())?;
    let tensors =
        ModelConfig::from_json(Path::new(shape), &config)?.parameters().into_iter().map(|parameter| {
            let (name, norm) = (parameter.name.clone(), parameter.shape.len() == 1);
            let length = parameter.shape.iter().product::<usize>();
            LazyTensor::new(parameter.name, Dtype::BF16, parameter.shape, move || {
                let mut draws = Stream::new(0, "weights", &name, &[]);
                let mut value = || if norm { 1.0 } else { 0.0693 * (draws.uniform_f32() - 0.5) };
                let values: Vec<f32> = (0..length.min(PERIOD)).map(|_| value()).collect();
                let bytes = from_f32(&values, Dtype::BF16)?;
                Ok(Cow::Owned(bytes.iter().copied().cycle().take(2 * length).collect()))
            })
        });
    let path = dir.path().join("model.safetensors");
    write_safetensors::<CheckpointError>(&path, tensors.collect(), &BTreeMap::new())?;
    Ok(load(&Checkpoint::open(dir.path())?, device, compute)?)
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
