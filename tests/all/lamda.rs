//! LaMDA: thirty steps against PyTorch (`tests/golden/make_lamda_trajectories.py`), its beginning and its frozen columns.

use crate::families::{integers, open, relative_difference};
use crate::program::{BASE, metrics};
use peft_core::checkpoint::{Checkpoint, SafetensorsFile};
use peft_core::kernels::AdamW;
use peft_core::linalg::{Matrix, svd, top_svd};
use peft_core::model::Decoder;
use peft_core::projection::{Delta, Spectral};
use peft_core::train::{
    GradientCheckpointing, Method, NamedOptimizer, Preparation, Progress, RunLength, StepSettings, Warmup,
    update_parameters,
};
use peft_methods::{MethodBlock, RunContext, open_adapter};
use peft_tests::{golden, peft_ok, root};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const ONE_MODULE: &str = "base_model.model.model.layers.1.mlp.up_proj";

#[test]
fn thirty_steps_equal_pytorchs() {
    for name in ["principal", "plus", "no_residual", "released"] {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let recipe = format!("tests/golden/lamda/{name}.yaml");
        peft_ok(&["train", &recipe, "--output-dir", &run.display().to_string()]);
        let text = std::fs::read_to_string(golden("lamda").join(format!("{name}.jsonl"))).unwrap();
        let expected: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let found = metrics(&run);
        assert_eq!((found.len(), expected.len()), (30, 30));
        let worst = |key: &str| {
            let of =
                |(f, e): (&Value, &Value)| (f[key].as_f64().unwrap() / e[key].as_f64().unwrap() - 1.0).abs();
            found.iter().zip(&expected).map(of).fold(0f64, f64::max)
        };
        let (loss, norm) = (worst("loss"), worst("grad_norm"));

        let golden = SafetensorsFile::open(golden("lamda").join(format!("{name}.safetensors"))).unwrap();
        let values = |key: &str| golden.tensor(key).unwrap().to_f32().unwrap();
        let adapter = open_adapter(&run.join("adapter")).unwrap();
        let own = |part: &str| {
            let file = &adapter.folder().file;
            file.tensor(&format!("{ONE_MODULE}.lora_{part}")).unwrap().to_f32().unwrap()
        };
        let parts = ["B", "S"].map(|part| relative_difference(&own(part), &values(part)));
        let mut model = open(&root().join(BASE));
        adapter.attach(&mut model).unwrap();
        let logits: Vec<f32> = model.logits(&integers(&golden, "input_ids").0, 1).try_into_vec_as().unwrap();
        let after = relative_difference(&logits, &values("logits"));
        println!("{name:<12} loss {loss:.1e}  norm {norm:.1e}  B, S {parts:.1?}  logits {after:.1e}");
        assert!(loss < 1e-4 && norm < 1e-3 && after < 1e-3 && parts.iter().all(|p| *p < 1e-3), "{name}");
        if name == "plus" {
            let path = golden_ranks();
            let config = &adapter.folder().config;
            for (module, rank) in path.as_object().unwrap() {
                let found = config["rank_pattern"].get(module).unwrap_or(&json!(4)).clone();
                assert_eq!(found, *rank, "{module}");
            }
        }
    }
}

fn golden_ranks() -> Value {
    serde_json::from_slice(&std::fs::read(golden("lamda/ranks.json")).unwrap()).unwrap()
}

/// A method on the quickstart's base, prepared.
fn prepared(block: Value) -> (Box<dyn Method>, Decoder) {
    let base = Checkpoint::open(&root().join(BASE)).unwrap();
    let run = RunContext { base: &base, base_name: BASE, revision: None, start: None };
    let block = MethodBlock::parse(block.as_object().unwrap().clone()).unwrap();
    let mut method = block.block.method(&run).unwrap();
    let mut model = open(&root().join(BASE));
    let step = StepSettings { gradient_checkpointing: GradientCheckpointing::Off, loss_chunk_rows: None };
    let length = RunLength { learning_rate: 1e-2, warmup: Warmup::Steps(0), total_steps: 50, epochs: 1.0 };
    let preparation = Preparation { seed: 7, examples: &[], micro_batch_size: 2, step, length, resume: None };
    method.prepare(&mut model, &preparation).unwrap();
    (method, model)
}

fn forms(model: &Decoder) -> impl Iterator<Item = (&str, Matrix, &Spectral)> {
    model.projections().filter_map(|projection| match &projection.delta {
        Some(Delta::Spectral(form)) => {
            let weight = Matrix::from_rows(&projection.weight.to_host(), projection.dims()).unwrap();
            Some((projection.path.as_str(), weight, form))
        }
        _ => None,
    })
}

fn identity_error(gram: &Matrix) -> f64 {
    let size = gram.dims()[0];
    let of = |i: usize, j: usize| (gram.get(i, j) - f64::from(u8::from(i == j))).abs();
    (0..size).flat_map(|i| (0..size).map(move |j| of(i, j))).fold(0.0, f64::max)
}

/// Whatever the scale, the start is the base to the last bit; what is left of a weight is as large as its next singular
/// value; rows of `A` and columns of `B` are orthonormal.
#[test]
fn training_starts_at_the_base_between_singular_directions() {
    let ids = [1, 5, 9, 2, 7];
    let base: Vec<f32> = open(&root().join(BASE)).logits(&ids, 1).try_into_vec_as().unwrap();
    for alpha in [3.0, 8.0] {
        let (_, model) =
            prepared(json!({"type": "lamda", "r": 4, "lora_alpha": alpha, "target_modules": "all-linear"}));
        let logits: Vec<f32> = model.logits(&ids, 1).try_into_vec_as().unwrap();
        assert_eq!(logits, base);
        for (path, weight, form) in forms(&model) {
            let [rows, columns] = weight.dims();
            let a = Matrix::from_rows(&form.a.to_host(), [4, columns]).unwrap();
            let b = Matrix::from_rows(&form.b.to_host(), [rows, 4]).unwrap();
            let offset = Matrix::from_rows(&form.offset.as_ref().unwrap().to_host(), [rows, 4]).unwrap();
            assert!(identity_error(&a.times_transpose(&a).unwrap()) < 1e-5, "{path}");
            assert!(identity_error(&b.transpose_times(&b).unwrap()) < 1e-5, "{path}");
            let next = svd(&weight).unwrap().s[4];
            let rest = weight.minus(form.scale, &offset.times(&a).unwrap()).unwrap();
            let largest = top_svd(&rest, 1).unwrap().s[0];
            assert!((largest - next).abs() < 1e-4 * next, "{path}: {largest} {next}");
        }
    }
}

/// Fifty steps of AdamW with a weight decay of 0.1, which reach no column that is frozen, and leave nothing of it in the
/// optimizer.
#[test]
fn frozen_columns_do_not_move() {
    let block = json!({"type": "lamda", "r": 4, "lora_alpha": 8, "eta": 0.5, "target_modules": ["v_proj"]});
    let (mut method, mut model) = prepared(block);
    let adamw = AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = NamedOptimizer::new(adamw);
    let whole = |model: &Decoder| -> Vec<(Vec<f32>, usize)> {
        forms(model)
            .map(|(_, _, form)| (form.whole_b().try_into_vec_as().unwrap(), form.frozen_columns()))
            .collect()
    };
    let mut before = whole(&model);
    for step in 0..50u64 {
        let mut gradients = BTreeMap::new();
        for parameter in model.parameters().into_iter().filter(|parameter| parameter.trainable) {
            gradients.insert(parameter.name.clone(), parameter.value.clone().add_scalar(0.1));
        }
        update_parameters(&mut model, &mut optimizer, gradients, None, |_| 1e-2);
        let now = whole(&model);
        for ((before, frozen), (now, _)) in before.iter().zip(&now) {
            for (row_before, row_now) in before.chunks(4).zip(now.chunks(4)) {
                assert_eq!(row_before[..*frozen], row_now[..*frozen], "step {step}");
                let moves = row_before[*frozen..].iter().zip(&row_now[*frozen..]).all(|(b, n)| b != n);
                assert!(moves, "step {step}: a column that trains stands still");
            }
        }
        let progress = Progress { step: step + 1, total_steps: 50 };
        method.after_update(&mut model, &mut optimizer, progress).unwrap();
        // What freezes keeps its last value.
        let after = whole(&model);
        assert!(after.iter().zip(&now).all(|(after, now)| after.0 == now.0));
        // r·t/(η·T) columns, rounded down.
        let expected = (4 * (step as usize + 1) / 25).min(4);
        assert!(after.iter().all(|(_, frozen)| *frozen == expected), "step {step}");
        before = after;
    }
    let trained: Vec<&str> =
        model.parameters().into_iter().filter(|p| p.trainable).map(|p| p.name.as_str()).collect();
    assert!(trained.iter().all(|name| name.ends_with("lora_S")) && !trained.is_empty(), "{trained:?}");
    use peft_core::train::ParameterOptimizer;
    let (memory, _) = optimizer.save();
    assert!(memory.iter().all(|(name, _)| name.contains("lora_S")));
}

/// A run of LaMDA++ lists ranks whose mean is at most the one asked for.
#[test]
fn allocated_ranks_keep_the_budget() {
    for direction in ["flat", "peaked"] {
        let block = json!({
            "type": "lamda", "r": 6, "lora_alpha": 12, "target_modules": "all-linear",
            "rank_allocation": {"more_rank_for": direction}
        });
        let (_, model) = prepared(block);
        let ranks: Vec<usize> = forms(&model).map(|(_, _, form)| form.rank()).collect();
        let distinct: std::collections::BTreeSet<&usize> = ranks.iter().collect();
        assert!(ranks.iter().sum::<usize>() <= 6 * ranks.len() && distinct.len() >= 4, "{ranks:?}");
        assert!(forms(&model).all(|(_, _, form)| form.scale == 2.0));
    }
}
