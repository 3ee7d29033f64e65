//! Gradients of the whole step against central differences, every parameter training.

use crate::families::open;
use crate::program::BASE;
use burn::tensor::{Tensor, TensorData};
use peft_core::data::{Batch, Example, collate};
use peft_core::model::Decoder;
use peft_core::projection::DropoutKey;
use peft_core::random::Stream;
use peft_core::train::{
    GradientCheckpointing, StepGradients, StepSettings, accumulate, evaluate, layer_gradients,
};
use peft_tests::{golden, root};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

fn examples() -> Vec<Example> {
    let example = |length: usize, seed: u64| {
        let mut stream = Stream::new(seed, "test", "", &[]);
        let ids = (0..length).map(|_| stream.below(96) as u32).collect();
        Example { ids, supervised: (0..length).map(|i| i > length / 2).collect() }
    };
    vec![example(9, 1), example(14, 2)]
}

fn gradients(
    model: &Decoder,
    batch: &Batch,
    checkpointing: GradientCheckpointing,
    chunk: Option<usize>,
) -> BTreeMap<String, Vec<f32>> {
    let settings = StepSettings { gradient_checkpointing: checkpointing, loss_chunk_rows: chunk };
    let key = DropoutKey { seed: 0, step: 0, micro_batch: 0 };
    let mut step = StepGradients::default();
    accumulate(model, batch, 1.0 / batch.targets.len() as f64, key, settings, &mut step);
    step.gradients.into_iter().map(|(name, gradient)| (name, gradient.try_into_vec_as().unwrap())).collect()
}

fn shift(model: &Decoder, direction: &BTreeMap<String, Vec<f32>>, by: f32) -> Decoder {
    let mut model = model.clone();
    let device = model.device.clone();
    for parameter in model.parameters_mut() {
        let moved: Vec<f32> =
            parameter.to_host().iter().zip(&direction[&parameter.name]).map(|(v, d)| v + by * d).collect();
        parameter.value = Tensor::from_data(TensorData::new(moved, parameter.value.dims()), &device);
    }
    model
}

#[test]
fn directional_derivatives_agree_with_differences() {
    let examples = examples();
    let batch = collate(&examples.iter().collect::<Vec<_>>(), 0);
    for family in ["llama", "llama_gqa_tied", "llama_bias", "qwen2", "qwen3", "smollm3", "mistral_window"] {
        let mut model = open(&golden("families").join(family));
        model.parameters_mut().into_iter().for_each(|parameter| parameter.set_trainable());
        let names: Vec<String> = model.parameters().iter().map(|p| p.name.clone()).collect();
        let whole = gradients(&model, &batch, GradientCheckpointing::Off, None);
        assert_eq!(whole.keys().count(), names.len(), "{family}: every parameter has a gradient");
        let layered = gradients(&model, &batch, GradientCheckpointing::Layers, Some(3));
        for name in &names {
            let scale = whole[name].iter().fold(1e-6f32, |max, v| max.max(v.abs()));
            let difference =
                whole[name].iter().zip(&layered[name]).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
            assert!(difference < 1e-4 * scale, "{family} {name}: {difference} of {scale}");
        }

        // One parameter at a time, along its own gradient and a random part: the derivative is ⟨gradient, direction⟩.
        for name in &names {
            let mut stream = Stream::new(3, "direction", name, &[]);
            let norm = whole[name].iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-6);
            let mut direction: BTreeMap<String, Vec<f32>> =
                whole.iter().map(|(n, g)| (n.clone(), vec![0.0; g.len()])).collect();
            let along: Vec<f32> =
                whole[name].iter().map(|g| g / norm + 0.02 * stream.normal() as f32).collect();
            let expected: f64 =
                whole[name].iter().zip(&along).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
            direction.insert(name.clone(), along);
            let step = 2e-3;
            let loss = |by: f32| evaluate(&shift(&model, &direction, by), &examples, 2, None, || true).loss;
            let found = (loss(step) - loss(-step)) / (2.0 * f64::from(step));
            let tolerance = 2e-2 * expected.abs() + 1e-3;
            assert!((found - expected).abs() < tolerance, "{family} {name}: {found} for {expected}");
        }
    }
}

/// Summed layer by layer over batches, gradients are those of whole backwards added up, and each call brings no more than
/// one layer's.
#[test]
fn gradients_by_layer_are_the_sum_over_batches() {
    let examples = examples();
    let factors = [0.25, 0.03];
    let batches: Vec<(Batch, f64)> =
        examples.iter().zip(factors).map(|(example, factor)| (collate(&[example], 0), factor)).collect();
    for (family, folder, names) in [
        (
            "llama",
            golden("families/llama"),
            vec!["self_attn.q_proj.weight", "mlp.down_proj.weight", "lm_head.weight"],
        ),
        ("qwen3", golden("families/qwen3_tied"), vec!["self_attn.k_proj.weight", "mlp.gate_proj.weight"]),
        ("quickstart", root().join(BASE), vec!["o_proj.weight"]),
    ] {
        let mut model = open(&folder);
        let wanted: BTreeSet<String> = model
            .parameters()
            .iter()
            .filter(|parameter| names.iter().any(|name| parameter.name.ends_with(name)))
            .map(|parameter| parameter.name.clone())
            .collect();
        let step =
            StepSettings { gradient_checkpointing: GradientCheckpointing::Off, loss_chunk_rows: Some(3) };
        let mut calls: Vec<BTreeMap<String, Vec<f32>>> = Vec::new();
        let done: Result<(), Infallible> =
            layer_gradients(&mut model, &wanted, &batches, step, |gradients| {
                let host =
                    |(name, gradient): (String, Tensor<2>)| (name, gradient.try_into_vec_as().unwrap());
                calls.push(gradients.into_iter().map(host).collect());
                Ok(())
            });
        done.unwrap();
        assert!(!model.parameters().iter().any(|parameter| parameter.trainable));

        let layer = |name: &String| name.split('.').nth(2).and_then(|part| part.parse::<usize>().ok());
        let order: Vec<BTreeSet<Option<usize>>> =
            calls.iter().map(|call| call.keys().map(layer).collect()).collect();
        let layers = (0..model.layers().len()).rev().map(|layer| BTreeSet::from([Some(layer)]));
        let head = (family == "llama").then(|| BTreeSet::from([None]));
        assert_eq!(order, head.into_iter().chain(layers).collect::<Vec<_>>(), "{family}");
        let found: BTreeMap<String, Vec<f32>> = calls.into_iter().flatten().collect();
        assert_eq!(found.keys().cloned().collect::<BTreeSet<_>>(), wanted, "{family}");

        for parameter in model.parameters_mut() {
            parameter.trainable = wanted.contains(&parameter.name);
        }
        let mut whole = StepGradients::default();
        let key = DropoutKey { seed: 0, step: 0, micro_batch: 0 };
        for (batch, factor) in &batches {
            accumulate(&model, batch, *factor, key, step, &mut whole);
        }
        for (name, gradient) in whole.gradients {
            let expected: Vec<f32> = gradient.try_into_vec_as().unwrap();
            let scale = expected.iter().fold(1e-6f32, |max, v| max.max(v.abs()));
            let difference =
                found[&name].iter().zip(&expected).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
            assert!(difference < 1e-5 * scale, "{family} {name}: {difference} of {scale}");
        }
    }
}
