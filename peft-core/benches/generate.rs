//! Greedy generation on a randomly initialised Llama, the way `bench/hf_generate.py` does it with transformers.
//!
//! ```text
//! cargo bench -p peft-core --bench generate -- --shape smollm2-135m --batch 1,8
//! cargo bench -p peft-core --bench generate --features cuda -- --device cuda --shape 1b
//! ```
//!
//! Prints one JSON object for each batch size: the time that the prompt takes, that of a token after it, tokens a
//! second, and what share of the memory's bandwidth (`--bandwidth GB/s`; on the CPU measured by summing 1 GiB) the
//! reading of all weights once a token is. `--profile` adds how long a token's products alone take, without anything
//! between them.

use burn::tensor::{Device, Tensor, TensorData};
use peft_core::checkpoint::{Checkpoint, CheckpointError, Dtype, LazyTensor, from_f32, write_safetensors};
use peft_core::model::{ComputeType, Decoder, ModelConfig, Prompt, Sampling, generate_batches, load};
use peft_core::random::Stream;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

type Failure = Box<dyn Error + Send + Sync>;

/// Hidden and intermediate features, layers, heads, key/value heads, head features, vocabulary, a tied head.
type Shape = (usize, usize, usize, usize, usize, usize, usize, bool);

/// The shapes of `bench/shapes.py`.
const SHAPES: [(&str, Shape); 4] = [
    ("25m", (512, 1408, 8, 8, 4, 64, 32_000, true)),
    ("smollm2-135m", (576, 1536, 30, 9, 3, 64, 49_152, true)),
    ("1b", (2048, 8192, 16, 32, 8, 64, 128_256, true)),
    ("8b", (4096, 14_336, 32, 32, 8, 128, 128_256, false)),
];

struct Settings {
    shape: String,
    device: String,
    batches: Vec<usize>,
    prompt: usize,
    new: usize,
    repeats: usize,
    bandwidth: Option<f64>,
    profile: bool,
}

impl Settings {
    fn read() -> Result<Self, Failure> {
        let mut settings = Self {
            shape: "25m".to_string(),
            device: "cpu".to_string(),
            batches: vec![1, 8],
            prompt: 128,
            new: 128,
            repeats: 3,
            bandwidth: None,
            profile: false,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--shape" => settings.shape = value()?,
                "--device" => settings.device = value()?,
                "--batch" => {
                    settings.batches = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?;
                }
                "--prompt" => settings.prompt = value()?.parse()?,
                "--new" => settings.new = value()?.parse()?,
                "--repeats" => settings.repeats = value()?.parse()?,
                "--bandwidth" => settings.bandwidth = Some(value()?.parse()?),
                "--profile" => settings.profile = true,
                // What cargo adds.
                "--bench" => {}
                other => return Err(format!("no such flag: {other}").into()),
            }
        }
        if settings.new < 2 || settings.prompt == 0 || settings.repeats == 0 {
            return Err("--new must be 2 or more, --prompt and --repeats 1 or more".into());
        }
        Ok(settings)
    }
}

fn main() -> Result<(), Failure> {
    let settings = Settings::read()?;
    let (device, compute) = match settings.device.as_str() {
        "cpu" => (Device::flex(), ComputeType::F32),
        #[cfg(feature = "cuda")]
        "cuda" => (Device::cuda(0), ComputeType::Bf16),
        other => return Err(format!("this benchmark has no device `{other}`").into()),
    };
    let model = random_model(&settings.shape, &device, compute)?;
    let bytes = weights(&model).map(|weight| weight.dims().iter().product::<usize>()).sum::<usize>()
        * compute.dtype().size();
    let on_cpu = device == Device::flex();
    let bandwidth = settings.bandwidth.or_else(|| on_cpu.then(|| memory_bandwidth(1 << 30)));
    for batch in &settings.batches {
        let [prefill, whole] = [1, settings.new].map(|new| {
            let seconds = |_| timed(&model, *batch, settings.prompt, new);
            median((0..settings.repeats).map(seconds).collect())
        });
        let token = (whole - prefill) / (settings.new - 1) as f64;
        let rate = bytes as f64 / token / 1e9;
        let mut line = json!({
            "device": settings.device,
            "threads": if on_cpu { Some(rayon::current_num_threads()) } else { None },
            "shape": settings.shape,
            "batch": batch,
            "prompt": settings.prompt,
            "new": settings.new,
            "prefill_ms": prefill * 1e3,
            "token_ms": token * 1e3,
            "tokens_per_second": *batch as f64 / token,
            "tokens_per_second_with_prefill": (batch * settings.new) as f64 / whole,
            "weight_bytes_per_token": bytes,
            "weight_gb_per_second": rate,
            "memory_gb_per_second": bandwidth,
            "bandwidth_share": bandwidth.map(|bandwidth| rate / bandwidth),
        });
        if settings.profile {
            line["products_ms"] = Value::from(1e3 * products(&model, *batch, settings.repeats));
        }
        println!("{line}");
    }
    Ok(())
}

/// Seconds to continue `batch` prompts of `prompt` tokens by `new` tokens.
fn timed(model: &Decoder, batch: usize, prompt: usize, new: usize) -> f64 {
    let mut draws = Stream::new(1, "prompts", "", &[]);
    let vocab = model.config.vocab_size as u64;
    let ids: Vec<Vec<u32>> =
        (0..batch).map(|_| (0..prompt).map(|_| draws.below(vocab) as u32).collect()).collect();
    let prompts: Vec<Prompt> = ids.iter().map(|ids| Prompt { ids, max_new_tokens: new, draws: 0 }).collect();
    let start = Instant::now();
    let made = generate_batches(model, &prompts, batch, &[], &Sampling::greedy(), |_, _| true);
    let seconds = start.elapsed().as_secs_f64();
    assert!(made.iter().all(|tokens| tokens.len() == new), "a row ended early");
    seconds
}

/// The matrices that a token is multiplied by.
fn weights(model: &Decoder) -> impl Iterator<Item = &Tensor<2>> {
    let tied = model.config.tie_word_embeddings.then_some(&model.embed_tokens.weight.value);
    model.projections().map(|projection| &projection.weight.value).chain(tied)
}

/// Seconds of a token's products with all matrices, one after another and nothing between.
fn products(model: &Decoder, rows: usize, repeats: usize) -> f64 {
    let inputs: Vec<(Tensor<2>, &Tensor<2>)> = weights(model)
        .map(|weight| {
            let shape = [rows, weight.dims()[1]];
            let ones = TensorData::new(vec![1f32; shape[0] * shape[1]], shape);
            (Tensor::from_data(ones, (&model.device, model.dtype)), weight)
        })
        .collect();
    let once = |_| {
        let start = Instant::now();
        for (input, weight) in &inputs {
            black_box(input.clone().matmul((*weight).clone().transpose()));
        }
        model.device.sync().expect("the device goes on");
        start.elapsed().as_secs_f64()
    };
    median((0..=10 * repeats).map(once).collect())
}

/// Bytes a second, in GB, at which all threads together read `bytes` of memory.
fn memory_bandwidth(bytes: usize) -> f64 {
    let values = vec![1f32; bytes / 4];
    let once = |_| {
        let start = Instant::now();
        let sum: f32 = values.par_chunks(1 << 20).map(lanes_sum).sum();
        black_box(sum);
        bytes as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..5).map(once).fold(0.0, f64::max)
}

/// A sum in as many lanes as keep up with the memory.
fn lanes_sum(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 64];
    for part in values.chunks_exact(lanes.len()) {
        lanes.iter_mut().zip(part).for_each(|(lane, value)| *lane += value);
    }
    lanes.iter().sum()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A Llama of the shape with uniform weights of deviation 0.02.
fn random_model(shape: &str, device: &Device, compute: ComputeType) -> Result<Decoder, Failure> {
    let found = SHAPES.iter().find(|(name, _)| *name == shape);
    let (_, (hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied)) =
        *found.ok_or_else(|| format!("no such shape: {shape}"))?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu",
    });
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("config.json"), config.to_string())?;
    let tensors =
        ModelConfig::from_json(Path::new(shape), &config)?.parameters().into_iter().map(|parameter| {
            let (name, length, norm) =
                (parameter.name.clone(), parameter.numel(), parameter.shape.len() == 1);
            LazyTensor::new(parameter.name, Dtype::BF16, parameter.shape, move || {
                let mut draws = Stream::new(0, "weights", &name, &[]);
                let mut value = || if norm { 1.0 } else { 0.0693 * (draws.uniform_f32() - 0.5) };
                let values: Vec<f32> = (0..length).map(|_| value()).collect();
                Ok(Cow::Owned(from_f32(&values, Dtype::BF16)?))
            })
        });
    let path = dir.path().join("model.safetensors");
    write_safetensors::<CheckpointError>(&path, tensors.collect(), &BTreeMap::new())?;
    Ok(load(&Checkpoint::open(dir.path())?, device, compute)?)
}
