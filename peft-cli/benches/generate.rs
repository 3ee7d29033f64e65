//! Greedy generation on a randomly initialised Llama, the way `bench/hf_generate.py` does it with transformers.
//!
//! ```text
//! cargo bench -p peft-cli --bench generate -- --shape smollm2-135m --batch 1,8
//! cargo bench -p peft-cli --bench generate --features cuda -- --device cuda --shape 1b
//! ```
//!
//! Prints one JSON object for each batch size: the time that the prompt takes, that of a token after it, tokens a
//! second, and what share of the memory's bandwidth (`--bandwidth GB/s`; on the CPU measured by summing 1 GiB) the
//! reading of all weights once a token is. `--profile` adds how long a token's products alone take, without anything
//! between them.

mod shapes;

use burn::tensor::{Device, Tensor, TensorData};
use peft_core::model::{Decoder, Prompt, Sampling, generate_batches};
use peft_core::random::Stream;
use rayon::prelude::*;
use serde_json::{Value, json};
use shapes::{Failure, median, random_model};
use std::hint::black_box;
use std::time::Instant;

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
    let (device, compute) = shapes::device(&settings.device, None)?;
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
