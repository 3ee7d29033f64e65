//! LoRA training steps on a randomly initialised Llama, the way `bench/hf_peft_step.py` does them with PEFT.
//!
//! ```text
//! cargo bench -p peft-cli --bench train_step -- --shape 25m --batch 4 --seq 256 --rank 8
//! cargo bench -p peft-cli --bench train_step --features cuda -- --device cuda --shape 1b --batch 4 --seq 1024
//! ```
//!
//! Every position is supervised. Prints one JSON object: the median step, tokens a second, arithmetic of the products
//! that cannot be saved and the rate at which it was done, and the memory used. `--gradients` prints the norm of each
//! gradient of the first step instead.

mod shapes;

use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::data::{Example, collate};
use peft_core::kernels::{AdamW, Clip, fault, trim_memory};
use peft_core::model::Decoder;
use peft_core::projection::{Delta, DropoutKey, LowRank, Parameter};
use peft_core::random::Stream;
use peft_core::train::{
    GradientCheckpointing, NamedOptimizer, StepGradients, StepSettings, accumulate, device_memory,
    peak_memory_bytes, ready_memory, update_parameters,
};
use serde_json::json;
use shapes::{Failure, median, random_model};
use std::time::Instant;

fn main() -> Result<(), Failure> {
    let (mut shape, mut name, mut dtype) = ("25m".to_string(), "cpu".to_string(), None);
    let (mut batch, mut seq, mut rank, mut warmup, mut steps) = (4, 256, 8, 4, 10);
    let mut dropout = 0.0;
    let mut checkpointing = GradientCheckpointing::Off;
    let (mut gradients, mut losses) = (false, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--shape" => shape = value()?,
            "--device" => name = value()?,
            "--dtype" => dtype = Some(value()?),
            "--batch" => batch = value()?.parse()?,
            "--seq" => seq = value()?.parse()?,
            "--rank" => rank = value()?.parse()?,
            "--warmup" => warmup = value()?.parse()?,
            "--steps" => steps = value()?.parse()?,
            "--dropout" => dropout = value()?.parse()?,
            "--checkpointing" => {
                checkpointing = match value()?.as_str() {
                    "false" => GradientCheckpointing::Off,
                    "selective" => GradientCheckpointing::Selective,
                    "true" => GradientCheckpointing::Layers,
                    other => return Err(format!("no such checkpointing: {other}").into()),
                }
            }
            "--gradients" => gradients = true,
            "--losses" => losses = true,
            // What cargo adds.
            "--bench" => {}
            other => return Err(format!("no such flag: {other}").into()),
        }
    }
    let (device, compute) = shapes::device(&name, dtype.as_deref())?;
    let mut model = random_model(&shape, &device, compute)?;
    add_lora(&mut model, rank, dropout, &device);
    ready_memory(&model);
    let mut draws = Stream::new(0, "tokens", "", &[]);
    let vocab = model.config.vocab_size as u64;
    let examples: Vec<Example> = (0..batch)
        .map(|_| Example {
            ids: (0..seq).map(|_| draws.below(vocab) as u32).collect(),
            supervised: vec![true; seq],
        })
        .collect();
    let batch = collate(&examples.iter().collect::<Vec<_>>(), 0);
    let settings = StepSettings { gradient_checkpointing: checkpointing, loss_chunk_rows: None };
    let mut optimizer =
        NamedOptimizer::new(AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.0 });

    let (mut seconds, mut enqueued, mut first, mut last) = (Vec::new(), Vec::new(), 0.0, 0.0);
    for step in 0..warmup + steps {
        let start = Instant::now();
        let key = DropoutKey { seed: 0, step, micro_batch: 0 };
        let mut sums = StepGradients::default();
        accumulate(&model, &batch, 1.0 / batch.targets.len() as f64, key, settings, &mut sums);
        if gradients {
            for (name, gradient) in sums.gradients {
                let values: Vec<f32> = gradient.try_into_vec_as()?;
                let norm = values.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
                let along: f64 =
                    values.iter().enumerate().map(|(i, v)| f64::from(*v) * (i as f64).sin()).sum();
                println!("{name} {norm:e} {along:e}");
            }
            return fault().map_or(Ok(()), |fault| Err(fault.into()));
        }
        let sum_of_squares = sums.sum_of_squares().ok_or("nothing trains")?;
        let clip = Clip { sum_of_squares, max_norm: 1.0 };
        let of_step = std::mem::take(&mut sums.gradients);
        update_parameters(&mut model, &mut optimizer, of_step, Some(&clip), |_| 1e-4);
        trim_memory(&device);
        enqueued.push(start.elapsed().as_secs_f64());
        assert!(clip.factor().is_some(), "a gradient is not finite");
        last = sums.losses().0 / batch.targets.len() as f64;
        if losses {
            println!("{step} {last}");
        }
        device.sync()?;
        #[cfg(feature = "cuda")]
        if name == "cuda" {
            let profile = peft_core::kernels::profile(&device);
            if step + 1 == warmup + steps && !profile.is_empty() {
                println!("{:24} {:>5} {:>10} {:>10}", "", "runs", "device ms", "host ms");
                for (label, runs, device, host) in profile {
                    println!("{label:24} {runs:5} {device:10.3} {host:10.3}");
                }
            }
        }
        let took = start.elapsed().as_secs_f64();
        if step == 0 {
            first = took;
        }
        if step >= warmup {
            seconds.push(took);
        }
    }
    if let Some(fault) = fault() {
        return Err(fault.into());
    }
    let step = median(seconds);
    let tokens = batch.ids.len();
    let operations = operations(&model, tokens, seq, batch.targets.len());
    let memory = device_memory(&device);
    let used = memory.total_bytes.zip(memory.available_bytes).map(|(total, free)| total - free);
    println!(
        "{}",
        json!({
            "device": name, "shape": shape, "batch": examples.len(), "seq": seq, "rank": rank, "dropout": dropout,
            "checkpointing": format!("{checkpointing:?}"), "step_ms": step * 1e3, "first_step_ms": first * 1e3,
            "enqueue_ms": median(enqueued) * 1e3, "tokens_per_second": tokens as f64 / step,
            "tera_operations": operations / 1e12, "tera_operations_per_second": operations / step / 1e12,
            "used_gib": used.filter(|_| name != "cpu").map(|bytes| bytes as f64 / f64::from(1 << 30)),
            "peak_gib": peak_memory_bytes(&device).map(|bytes| bytes as f64 / f64::from(1 << 30)),
            "loss": last,
        })
    );
    Ok(())
}

/// LoRA on every projection but the head, `B` not zero so that every gradient is there.
fn add_lora(model: &mut Decoder, rank: usize, dropout: f64, device: &Device) {
    let layers = model.config.num_hidden_layers * 7;
    for projection in model.projections_mut().take(layers) {
        let [out, inputs] = projection.dims();
        let factor = |side: &str, rows: usize, columns: usize| {
            let name = format!("{}.lora_{side}.weight", projection.path);
            let mut draws = Stream::new(1, "factors", &name, &[]);
            let values: Vec<f32> =
                (0..rows * columns).map(|_| 0.0693 * (draws.uniform_f32() - 0.5)).collect();
            let value = Tensor::from_data(TensorData::new(values, [rows, columns]), (device, DType::F32));
            let mut parameter = Parameter::matrix(name, value);
            parameter.set_trainable();
            parameter
        };
        let (a, b) = (factor("A", rank, inputs), factor("B", out, rank));
        projection.delta = Some(Delta::LowRank(LowRank {
            a,
            b,
            bias: None,
            magnitude: None,
            scale: 2.0,
            dropout,
            removed: None,
        }));
    }
}

/// Multiplications and additions of a step's products: forward and the gradient of the inputs through every frozen
/// matrix, head included, and causal attention with its backward. The low-rank terms are not counted.
fn operations(model: &Decoder, tokens: usize, seq: usize, supervised: usize) -> f64 {
    let config = &model.config;
    let layers = config.num_hidden_layers * 7;
    let matrices: usize = model.projections().take(layers).map(|p| p.dims().iter().product::<usize>()).sum();
    let head = config.vocab_size * config.hidden_size;
    let products = 4.0 * (matrices as f64 * tokens as f64 + head as f64 * supervised as f64);
    let width = config.num_attention_heads * config.head_dim * config.num_hidden_layers;
    // Two products forward and five backward, of which causality halves each.
    products + 7.0 * (tokens * seq * width) as f64
}
