//! The predicted memory of a step against the bytes that it really asks for, counted by the allocator; and what a token of
//! a generation asks for.
#![allow(clippy::unwrap_used)]

use burn::tensor::Device;
use peft_core::checkpoint::Checkpoint;
use peft_core::data::{Example, collate};
use peft_core::kernels::trim_memory;
use peft_core::model::{ComputeType, Decoder, load};
use peft_core::projection::{DropoutKey, Parameter};
use peft_core::train::plan::{BatchShape, Phase, Workload, predict};
use peft_core::train::{
    GradientCheckpointing, Method, MethodPlan, Preparation, RunLength, StepGradients, StepSettings, Warmup,
    accumulate, evaluate, layer_gradients,
};
use peft_methods::{Full, Lora};
use peft_tests::root;
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// The system's allocator, with an account of what is alive.
struct Counting;

static ALIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    PEAK.fetch_max(ALIVE.fetch_add(bytes, SeqCst) + bytes, SeqCst);
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALIVE.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes alive at a time while `work` runs, beyond those alive before. What the kernels hold ready is let go of
/// first.
fn peak_of(work: impl FnOnce()) -> f64 {
    (0..2).for_each(|_| trim_memory(&Device::flex()));
    let before = ALIVE.load(SeqCst);
    PEAK.store(before, SeqCst);
    work();
    (PEAK.load(SeqCst) - before) as f64
}

fn compare(model: &Decoder, plan: &MethodPlan, cases: &[(usize, usize, usize, GradientCheckpointing)]) {
    for &(rows, time, supervised, gradient_checkpointing) in cases {
        let supervised = (0..time).map(|token| token + supervised >= time).collect();
        let example = Example { ids: vec![5; time], supervised };
        let examples = vec![example; rows];
        let shape = BatchShape::of(examples.iter());
        let step = StepSettings { gradient_checkpointing, loss_chunk_rows: None };
        let work = Workload {
            model: &model.config,
            compute: ComputeType::F32,
            parameters: &plan.parameters,
            step,
            accumulation: 1,
            batches: [shape].into(),
            evaluation: [shape].into(),
            generated_tokens: 0,
            generated_rows: 0,
            moments: 0,
            runtime: 0,
            host: true,
        };
        let predicted = predict(&work);
        let of = |phase| {
            let held = predicted.phases.iter().find(|held| held.phase == phase).unwrap().components;
            (held.gradients + held.activations + held.logits) as f64
        };
        let batch = collate(&examples.iter().collect::<Vec<_>>(), 0);
        let key = DropoutKey { seed: 1, step: 1, micro_batch: 0 };
        let stepped = peak_of(|| accumulate(model, &batch, 1.0, key, step, &mut StepGradients::default()));
        let evaluated = peak_of(|| {
            evaluate(model, &examples, rows, None, || true);
        });
        let what = (rows, time, gradient_checkpointing, shape.supervised);
        let ratio = of(Phase::Step) / stepped;
        println!("{what:?}: step {ratio:.3}, evaluation {:.3}", of(Phase::Evaluation) / evaluated);
        assert!((0.95..1.13).contains(&ratio), "step {what:?}: {} of {stepped}", of(Phase::Step));
        let ratio = of(Phase::Evaluation) / evaluated;
        assert!((0.9..1.4).contains(&ratio), "evaluation {what:?}: {} of {evaluated}", of(Phase::Evaluation));
    }
}

/// A token of a generation is written into the cache in place: no copy of any layer's keys is made. What a product lays
/// out for itself differs between processors, so what counts is how a token's bytes grow with the cache.
fn no_token_copies_the_cache(model: &Decoder) {
    let c = &model.config;
    for rows in [1, 4] {
        // Left padding in all rows but the first.
        let mut cache = model.cache((0..rows).map(|row| row * 8).collect());
        let mut bytes_after = |tokens: usize| {
            model.extend(&vec![5; rows * tokens], &mut cache);
            // The first product of a kind makes room that the others use again.
            model.extend(&vec![6; rows], &mut cache);
            let token = |_| peak_of(|| drop(model.extend(&vec![7; rows], &mut cache)));
            (0..3).map(token).fold(0.0, f64::max)
        };
        let (before, after) = (bytes_after(1000), bytes_after(1000));
        let keys = (4 * rows * c.num_key_value_heads * 1000 * c.head_dim) as f64;
        let growth = after - before;
        assert!(growth < 0.3 * keys, "{rows} rows: {growth} bytes more for a token, {keys} of keys");
    }
}

const PREPARATION: Preparation = Preparation {
    seed: 1,
    examples: &[],
    micro_batch_size: 1,
    step: StepSettings { gradient_checkpointing: GradientCheckpointing::Off, loss_chunk_rows: None },
    length: RunLength { learning_rate: 1e-3, warmup: Warmup::Steps(0), total_steps: 1, epochs: 1.0 },
    resume: None,
};

/// Gradients of whole weights over several batches: those of one layer are there at a time, summed and just made.
fn gradients_come_layer_by_layer(mut model: Decoder) {
    let layers = model.layers().len();
    let is_wanted = |p: &&Parameter| p.name.ends_with("_proj.weight");
    let wanted: Vec<&Parameter> = model.parameters().into_iter().filter(is_wanted).collect();
    let layer_bytes = 4 * wanted.iter().map(|p| p.numel()).sum::<usize>() / layers;
    let wanted: BTreeSet<String> = wanted.into_iter().map(|p| p.name.clone()).collect();
    let example = Example { ids: vec![5, 6, 7, 8], supervised: vec![true; 4] };
    let batches: Vec<_> = (0..3).map(|_| (collate(&[&example], 0), 0.1)).collect();
    let mut calls = 0;
    let peak = peak_of(|| {
        let Ok(()) = layer_gradients(&mut model, &wanted, &batches, PREPARATION.step, |gradients| {
            calls += 1;
            drop(gradients);
            Ok::<(), Infallible>(())
        });
    });
    assert_eq!(calls, layers);
    // Beside them stand the buffers of the products, as they do where the gradients of all layers are held.
    model.parameters_mut().into_iter().for_each(|p| p.trainable = wanted.contains(&p.name));
    let mut sums = StepGradients::default();
    let of_all = peak_of(|| {
        for (batch, factor) in &batches {
            let key = DropoutKey { seed: 0, step: 0, micro_batch: 0 };
            accumulate(&model, batch, *factor, key, PREPARATION.step, &mut sums);
        }
    });
    let saved = (of_all - peak) / layer_bytes as f64;
    println!("gradients by layer: {saved:.2} layers' weights of {layers} saved");
    assert!(saved > 0.6 * (layers - 1) as f64, "{saved:.2} layers' weights are saved");
}

/// Short and long, few and many supervised tokens, the whole graph, without norms and gates, and layer by layer.
const CASES: [(usize, usize, usize, GradientCheckpointing); 8] = [
    (16, 64, 32, GradientCheckpointing::Off),
    (16, 64, 32, GradientCheckpointing::Selective),
    (16, 64, 60, GradientCheckpointing::Off),
    (16, 64, 32, GradientCheckpointing::Layers),
    (4, 256, 128, GradientCheckpointing::Off),
    (4, 256, 128, GradientCheckpointing::Selective),
    (4, 256, 128, GradientCheckpointing::Layers),
    (1, 512, 20, GradientCheckpointing::Off),
];

// One test: what others would allocate at the same time must not be counted.
#[test]
fn a_tokens_bytes_are_few_and_a_steps_bytes_are_predicted() {
    let checkpoint = Checkpoint::open(&root().join("recipes/quickstart/base")).unwrap();
    no_token_copies_the_cache(&load(&checkpoint, &Device::flex(), ComputeType::F32).unwrap());
    gradients_come_layer_by_layer(load(&checkpoint, &Device::flex(), ComputeType::F32).unwrap());
    for method in [
        r#"{"r": 16, "target_modules": "all-linear"}"#,
        r#"{"r": 16, "target_modules": "all-linear", "lora_dropout": 0.1}"#,
        r#"{"r": 8}"#,
        r#"{"r": 8, "use_dora": true, "target_modules": "all-linear"}"#,
    ] {
        let mut model = load(&checkpoint, &Device::flex(), ComputeType::F32).unwrap();
        let mut lora = Lora::new(serde_json::from_str(method).unwrap(), "base", None, None).unwrap();
        lora.prepare(&mut model, &PREPARATION).unwrap();
        let plan = lora.plan(&model.config).unwrap();
        let trained: Vec<String> =
            model.parameters().iter().filter(|p| p.trainable).map(|p| p.name.clone()).collect();
        let mut planned: Vec<&str> = plan.parameters.iter().map(|p| p.shape.name.as_str()).collect();
        planned.sort_unstable();
        let mut sorted: Vec<&str> = trained.iter().map(String::as_str).collect();
        sorted.sort_unstable();
        assert_eq!(planned, sorted);
        compare(&model, &plan, &CASES);
    }
    let mut model = load(&checkpoint, &Device::flex(), ComputeType::F32).unwrap();
    let headers = peft_core::checkpoint::Headers::of(&checkpoint).unwrap();
    let plan = Full::plan(&model.config, &headers).unwrap();
    Full { base: checkpoint }.prepare(&mut model, &PREPARATION).unwrap();
    compare(&model, &plan, &CASES);
}
