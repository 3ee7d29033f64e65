//! The first values of LoRA's factors against PEFT's on the same weights (`tests/golden/make_inits.py`), and whole runs
//! from them.

use crate::families::{integers, open, relative_difference};
use crate::program::{BASE, losses};
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::adapter::{
    Adapter, AdapterConfig, CordaMethod, GradientDirection, GradientScale, InitialFactors, LoraGaConfig,
    RewriteOptions, SavedAdapter, fold, olora, pissa, save,
};
use peft_core::checkpoint::{Checkpoint, SafetensorsFile};
use peft_core::data::{DatasetConfig, DatasetType, Example, LoadOptions};
use peft_core::linalg::Matrix;
use peft_core::model::{ComputeType, Decoder, load};
use peft_core::random::Stream;
use peft_core::text::Tokenizer;
use peft_core::train::{GradientCheckpointing, Method, Preparation, RunLength, StepSettings, Warmup};
use peft_methods::{Lora, LoraBlock, init};
use peft_tests::{golden, peft_ok, root};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const RANK: usize = 4;
const SCALE: f64 = 2.5;

struct Golden(SafetensorsFile);

impl Golden {
    fn open() -> Self {
        Self(SafetensorsFile::open(golden("inits.safetensors")).unwrap())
    }

    fn matrix(&self, name: &str) -> Matrix {
        let tensor = self.0.tensor(name).unwrap();
        let dims = match *tensor.shape {
            [rows, columns] => [rows, columns],
            [columns] => [1, columns],
            _ => panic!("{name}: {:?}", tensor.shape),
        };
        Matrix::from_rows(&tensor.to_f32().unwrap(), dims).unwrap()
    }

    /// The covariance of the samples' inputs, as CorDA takes it.
    fn covariance(&self, shape: &str) -> Matrix {
        let mut sum: Option<Matrix> = None;
        for number in 0..3 {
            let x = self.matrix(&format!("{shape}.sample.{number}"));
            let largest = x.to_rows().iter().fold(f32::MIN, |max, v| max.max(*v));
            let columns = x.dims()[1];
            let x = x.scale_columns(&vec![1.0 / f64::from(largest.abs()); columns]);
            let part = x.transpose_times(&x).unwrap();
            sum = Some(match sum {
                Some(sum) => sum.minus(-1.0, &part).unwrap(),
                None => part,
            });
        }
        let sum = sum.unwrap();
        let size = sum.dims()[1];
        sum.scale_columns(&vec![1.0 / 3.0; size])
    }
}

fn largest(matrix: &Matrix) -> f32 {
    matrix.to_rows().iter().fold(0f32, |max, v| max.max(v.abs()))
}

/// The largest difference of two matrices, of the largest entry of the second.
fn difference(found: &Matrix, expected: &Matrix) -> f32 {
    largest(&found.clone().minus(1.0, expected).unwrap()) / largest(expected)
}

/// As [`difference`], with the sign of each row chosen to fit.
fn difference_of_rows(found: &Matrix, expected: &Matrix) -> f32 {
    let [rows, _] = expected.dims();
    let of_row = |i: usize| {
        let (found, expected_row) = (found.rows(i..i + 1), expected.rows(i..i + 1));
        let minus = largest(&found.clone().minus(1.0, &expected_row).unwrap());
        minus.min(largest(&found.minus(-1.0, &expected_row).unwrap())) / largest(expected)
    };
    (0..rows).map(of_row).fold(0.0, f32::max)
}

/// Compares factors with those under `name`; `signs_cancel` says whether the sign of the product is determined.
fn compare(golden: &Golden, name: &str, found: &InitialFactors, signs_cancel: bool, tolerance: f32) {
    let weight = golden.matrix(&format!("{}.weight", name.split('.').next().unwrap()));
    let [rows, columns] = weight.dims();
    let a = Matrix::from_rows(&found.a, [RANK, columns]).unwrap();
    let b = Matrix::from_rows(&found.b, [rows, RANK]).unwrap();
    let base = Matrix::from_rows(found.base.as_ref().unwrap(), [rows, columns]).unwrap();
    let expected = |part: &str| golden.matrix(&format!("{name}.{part}"));
    let mut differences = vec![
        difference_of_rows(&a, &expected("a")),
        difference_of_rows(&b.transpose(), &expected("b").transpose()),
    ];
    if signs_cancel {
        let product = b.times(&a).unwrap();
        differences.push(difference(&product, &expected("b").times(&expected("a")).unwrap()));
        differences.push(difference(&base, &expected("base")));
    }
    // What is taken out and what is left make the weight.
    differences.push(difference(&base.minus(-SCALE, &b.times(&a).unwrap()).unwrap(), &weight));
    println!("{name:<32} {differences:?}");
    assert!(differences.iter().all(|difference| *difference < tolerance), "{name}: {differences:?}");
}

#[test]
fn factors_and_what_they_leave_are_pefts() {
    let golden = Golden::open();
    for shape in ["wide", "tall"] {
        let weight = golden.matrix(&format!("{shape}.weight"));
        compare(&golden, &format!("{shape}.pissa"), &pissa(&weight, RANK, SCALE).unwrap(), true, 1e-5);
        compare(&golden, &format!("{shape}.olora"), &olora(&weight, RANK, SCALE).unwrap(), true, 1e-5);
        let mut stream = Stream::new(1, "init", shape, &[]);
        let randomised = init::pissa_niter("lin", &weight, RANK, SCALE, 16, &mut stream).unwrap();
        // PEFT's own randomised values are this far from the exact ones.
        compare(&golden, &format!("{shape}.pissa_niter_16"), &randomised, true, 2e-3);
        let covariance = golden.covariance(shape);
        for (name, method) in [("ipm", CordaMethod::Ipm), ("kpm", CordaMethod::Kpm)] {
            let found = init::corda("lin", &weight, &covariance, method, RANK, SCALE).unwrap();
            compare(&golden, &format!("{shape}.corda.{name}"), &found, true, 1e-3);
        }
    }
}

#[test]
fn gradients_singular_vectors_go_where_peft_puts_them() {
    let golden = Golden::open();
    for shape in ["wide", "tall"] {
        let weight = golden.matrix(&format!("{shape}.weight"));
        let gradient = golden.matrix(&format!("{shape}.gradient"));
        let directions = [
            ("ArBr", GradientDirection::ArBr),
            ("A2rBr", GradientDirection::A2rBr),
            ("ArB2r", GradientDirection::ArB2r),
        ];
        let scales = [
            ("stable", GradientScale::Stable),
            ("weight_svd", GradientScale::WeightSvd),
            ("gd_scale", GradientScale::GdScale),
            ("unit", GradientScale::Unit),
        ];
        for (direction_name, direction) in directions {
            for (scale_name, scale) in scales {
                let config = LoraGaConfig { direction, scale, stable_gamma: 9.0 };
                let mut stream = Stream::new(1, "init", shape, &[]);
                let found =
                    init::lora_ga("lin", &weight, &gradient, config, RANK, SCALE, &mut stream).unwrap();
                compare(
                    &golden,
                    &format!("{shape}.lora_ga.{direction_name}.{scale_name}"),
                    &found,
                    false,
                    1e-5,
                );
            }
        }
        let config = LoraGaConfig { direction: GradientDirection::Random, ..LoraGaConfig::default() };
        let mut stream = Stream::new(1, "init", shape, &[]);
        let random = init::lora_ga("lin", &weight, &gradient, config, RANK, SCALE, &mut stream).unwrap();
        let a = Matrix::from_rows(&random.a, [RANK, weight.dims()[1]]).unwrap();
        let gram = a.times_transpose(&a).unwrap();
        assert!((gram.get(0, 0) - 1.0).abs() < 1e-6 && gram.get(0, 1).abs() < 1e-6);
        let zero = Matrix::from_fn(weight.dims(), |_, _| 0.0);
        let refused = init::lora_ga("lin", &weight, &zero, config, RANK, SCALE, &mut stream).unwrap_err();
        assert!(refused.to_string().contains("the gradient of the weight is zero"), "{refused}");
        assert!(init::lora_ga("lin", &weight, &gradient, config, 9, SCALE, &mut stream).is_err());
        let refused =
            init::corda("lin", &weight, &Matrix::from_fn([24, 24], |_, _| 0.0), CordaMethod::Ipm, 4, 1.0);
        assert!(refused.unwrap_err().to_string().contains("every input of the module is zero"));
    }
}

#[test]
fn incremental_components_are_pefts() {
    let golden = Golden::open();
    let mut pca = init::IncrementalPca::new(6, 10);
    let mut stream = Stream::new(1, "pca", "", &[]);
    for number in 0..3 {
        pca.update(&golden.matrix(&format!("pca.batch.{number}")), &mut stream).unwrap();
    }
    let (directions, values) = pca.components().unwrap();
    let row = |values: &[f64]| Matrix::from_fn([1, values.len()], |_, j| values[j]);
    // The signs are PEFT's too.
    assert!(difference(&directions.transpose(), &golden.matrix("pca.components")) < 1e-4);
    assert!(difference(&row(values), &golden.matrix("pca.singular_values")) < 1e-5);
    let ratios = pca.explained_variance_ratio();
    assert!(difference(&row(&ratios), &golden.matrix("pca.explained_variance_ratio")) < 1e-5);
    assert!(
        init::IncrementalPca::new(6, 10)
            .update(&golden.matrix("pca.batch.1").rows(0..5), &mut stream)
            .is_err()
    );
}

/// The quickstart's base with first values of `method` (a recipe's keys) on every linear module.
fn initialised(method: Value, compute: ComputeType, resume: Option<&Path>) -> (Decoder, Lora) {
    let base = root().join(BASE);
    let checkpoint = Checkpoint::open(&base).unwrap();
    let mut model = load(&checkpoint, &Device::flex(), compute).unwrap();
    let mut keys = json!({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"});
    keys.as_object_mut().unwrap().extend(method.as_object().unwrap().clone());
    let mut lora = Lora::new(serde_json::from_value(keys).unwrap(), BASE, None, None).unwrap();
    let preparation = Preparation {
        seed: 3,
        examples: &examples(60),
        micro_batch_size: 4,
        step: StepSettings { gradient_checkpointing: GradientCheckpointing::Layers, loss_chunk_rows: None },
        length: RunLength { learning_rate: 1e-3, warmup: Warmup::Steps(0), total_steps: 1, epochs: 1.0 },
        resume,
    };
    lora.prepare(&mut model, &preparation).unwrap();
    (model, lora)
}

/// The first of the quickstart's training examples.
fn examples(count: usize) -> Vec<Example> {
    let mut config =
        DatasetConfig::new(root().join("recipes/quickstart/train.jsonl"), DatasetType::PromptCompletion);
    config.limit = Some(count);
    let options = LoadOptions {
        sequence_len: 512,
        on_truncation: None,
        train_on_inputs: false,
        chat_template: None,
        chat_template_kwargs: Default::default(),
        now: None,
    };
    let tokenizer = Tokenizer::from_dir(root().join(BASE)).unwrap();
    peft_core::data::load(&[config], &tokenizer, &options).unwrap().examples
}

fn logits(model: &Decoder) -> Vec<f32> {
    let ids: Vec<i64> = examples(1)[0].ids.iter().map(|id| i64::from(*id)).collect();
    model.logits(&ids, 1).try_into_vec_as().unwrap()
}

/// Moves every factor, as training would.
fn disturb(model: &mut Decoder) {
    let device = model.device.clone();
    for parameter in model.parameters_mut().into_iter().filter(|parameter| parameter.trainable) {
        let mut stream = Stream::new(5, "disturbance", &parameter.name, &[]);
        let values = parameter.to_host();
        let scale = values.iter().fold(0.02f32, |max, v| max.max(v.abs()));
        let moved: Vec<f32> = values.iter().map(|v| v + 0.1 * scale * stream.normal() as f32).collect();
        parameter.value = Tensor::from_data(TensorData::new(moved, parameter.value.dims()), &device);
    }
}

fn ways() -> Vec<(&'static str, Value)> {
    let way = |init: &str| json!({"init_lora_weights": init});
    vec![
        ("pissa", way("pissa")),
        ("pissa_niter", way("pissa_niter_4")),
        ("olora", way("olora")),
        ("orthogonal", way("orthogonal")),
        ("eva", way("eva")),
        ("corda", way("corda")),
        ("corda kpm", json!({"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}})),
        ("lora_ga", way("lora_ga")),
        (
            "pissa with patterns",
            json!({"init_lora_weights": "pissa", "use_rslora": true,
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 3}}),
        ),
    ]
}

#[test]
fn every_way_starts_at_the_base_and_is_saved_for_it() {
    let base = logits(&open(&root().join(BASE)));
    for (name, method) in ways() {
        let (mut model, lora) = initialised(method.clone(), ComputeType::F32, None);
        let start = relative_difference(&logits(&model), &base);
        assert!(start < 1e-5, "{name}: the first step is {start:.1e} away from the base");

        // What is saved means the same on the base as it lies in its file, and as a folded checkpoint.
        disturb(&mut model);
        let trained = logits(&model);
        assert!(relative_difference(&trained, &base) > 1e-2, "{name}: the disturbance should matter");
        let dir = tempfile::tempdir().unwrap();
        let (checkpoint_dir, folded) = (dir.path().join("step"), dir.path().join("folded"));
        std::fs::create_dir_all(checkpoint_dir.join("adapter")).unwrap();
        lora.export(&model, &checkpoint_dir.join("adapter")).unwrap();
        let adapter = Adapter::open(&checkpoint_dir.join("adapter")).unwrap();
        let mut fresh = open(&root().join(BASE));
        adapter.attach(&mut fresh).unwrap();
        let attached = relative_difference(&logits(&fresh), &trained);
        let options = RewriteOptions { dtype: None, max_shard_size: RewriteOptions::DEFAULT_SHARD };
        fold(&Checkpoint::open(&root().join(BASE)).unwrap(), &adapter, &folded, &options).unwrap();
        let folded = relative_difference(&logits(&open(&folded)), &trained);
        println!("{name:<20} start {start:.1e}, saved {attached:.1e}, folded {folded:.1e}");
        assert!(attached < 1e-5 && folded < 1e-5, "{name}: {attached:.1e} {folded:.1e}");

        // Going on from a checkpoint, the base is the same to the bit.
        let (again, _) = initialised(method, ComputeType::F32, Some(&checkpoint_dir));
        for (before, after) in model.parameters().iter().zip(again.parameters()) {
            assert_eq!(before.name, after.name, "{name}");
            assert_eq!(before.value.dims(), after.value.dims(), "{name}: {}", before.name);
            if !before.trainable {
                assert_eq!(before.to_host(), after.to_host(), "{name}: {}", before.name);
            }
        }
    }
}

#[test]
fn in_bf16_the_start_is_the_base_to_rounding() {
    let load =
        |compute| load(&Checkpoint::open(&root().join(BASE)).unwrap(), &Device::flex(), compute).unwrap();
    let plain = logits(&load(ComputeType::F32));
    let rounding = relative_difference(&logits(&load(ComputeType::Bf16)), &plain);
    for init in ["pissa", "olora", "lora_ga"] {
        let (model, _) = initialised(json!({"init_lora_weights": init}), ComputeType::Bf16, None);
        let difference = relative_difference(&logits(&model), &plain);
        println!("{init}: {difference:.1e}, bf16 itself {rounding:.1e}");
        assert!(difference < 4.0 * rounding, "{init}: {difference:.1e} of {rounding:.1e}");
    }
}

#[test]
fn evas_ranks_and_alphas_are_pefts() {
    let (model, lora) = initialised(json!({"init_lora_weights": "eva"}), ComputeType::F32, None);
    let dir = tempfile::tempdir().unwrap();
    lora.export(&model, dir.path()).unwrap();
    let read = |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let written = read(&dir.path().join("adapter_config.json"));
    let expected = read(&golden("init_trajectories/eva.json"));
    for key in ["rank_pattern", "alpha_pattern"] {
        let numbers =
            |value: &Value| -> BTreeMap<String, f64> { serde_json::from_value(value[key].clone()).unwrap() };
        assert_eq!(numbers(&written), numbers(&expected), "{key}");
    }
    assert_eq!(written["init_lora_weights"], "eva");
    assert_eq!(written["eva_config"]["rho"], 2.0);
}

#[test]
fn twenty_steps_from_every_way_equal_pefts() {
    let dir = tempfile::tempdir().unwrap();
    let runs = [
        ("pissa", json!({"init_lora_weights": "pissa"})),
        ("pissa_niter_16", json!({"init_lora_weights": "pissa_niter_16"})),
        ("olora", json!({"init_lora_weights": "olora"})),
        ("orthogonal", json!({})),
        ("eva", json!({"init_lora_weights": "eva"})),
        ("corda_ipm", json!({"init_lora_weights": "corda"})),
        ("corda_kpm", json!({"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}})),
        ("lora_ga", json!({"init_lora_weights": "lora_ga"})),
        ("pissa_rslora", json!({"init_lora_weights": "pissa", "use_rslora": true})),
    ];
    let keep = std::env::var_os("PEFT_KEEP_INIT_RUNS").map(PathBuf::from);
    let root_dir = keep.unwrap_or_else(|| dir.path().to_path_buf());
    for (name, keys) in runs {
        let reference = golden("init_trajectories");
        let mut method = json!({"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"});
        method.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let out = root_dir.join(name);
        let recipe = json!({
            "base_model": BASE, "method": method, "max_steps": 20, "micro_batch_size": 4, "shuffle_data": false,
            "learning_rate": 1e-3, "lr_scheduler": "constant", "device": "cpu",
            "datasets": [{"path": "recipes/quickstart/train.jsonl", "type": "prompt_completion", "limit": 60}],
        });
        let path = dir.path().join(format!("{name}.yaml"));
        std::fs::write(&path, recipe.to_string()).unwrap();
        let (path, out) = (path.display().to_string(), out.display().to_string());
        let mut arguments = vec!["train", &path, "--output-dir", &out];
        let start = format!("adapter_name_or_path={}", reference.join("orthogonal").display());
        if name == "orthogonal" {
            arguments.extend(["--override", &start]);
        }
        peft_ok(&arguments);

        let losses: Vec<f64> = losses(Path::new(&out));
        let text = std::fs::read_to_string(reference.join(format!("{name}.jsonl"))).unwrap();
        let expected: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let pairs = losses.iter().zip(&expected);
        let loss = pairs.fold(0f64, |max, (f, e)| max.max((f / e["loss"].as_f64().unwrap() - 1.0).abs()));
        let expected = SafetensorsFile::open(reference.join(format!("{name}.safetensors"))).unwrap();
        let (ids, _) = integers(&expected, "input_ids");
        let mut model = open(&root().join(BASE));
        Adapter::open(&Path::new(&out).join("adapter")).unwrap().attach(&mut model).unwrap();
        let found: Vec<f32> = model.logits(&ids, 1).try_into_vec_as().unwrap();
        let logits = relative_difference(&found, &expected.tensor("logits").unwrap().to_f32().unwrap());
        println!(
            "{name:<16} largest relative difference: loss {loss:.1e}, logits after 20 steps {logits:.1e}"
        );
        assert!(losses.len() == 20 && loss < 2e-3 && logits < 5e-3, "{name}: {loss:.1e} {logits:.1e}");
    }
}

#[test]
fn unconverted_adapters_of_pefts_find_their_base_again() {
    for name in ["pissa", "olora"] {
        let dir = golden("init_trajectories").join(format!("unconverted_{name}"));
        let expected =
            SafetensorsFile::open(golden("init_trajectories").join(format!("{name}.safetensors"))).unwrap();
        let (ids, _) = integers(&expected, "input_ids");
        let expected = expected.tensor("logits").unwrap().to_f32().unwrap();
        let adapter = Adapter::open(&dir).unwrap();
        let mut model = open(&root().join(BASE));
        adapter.attach(&mut model).unwrap();
        let found: Vec<f32> = model.logits(&ids, 1).try_into_vec_as().unwrap();
        let attached = relative_difference(&found, &expected);

        let out = tempfile::tempdir().unwrap();
        let options = RewriteOptions { dtype: None, max_shard_size: RewriteOptions::DEFAULT_SHARD };
        let folded = out.path().join("folded");
        fold(&Checkpoint::open(&root().join(BASE)).unwrap(), &adapter, &folded, &options).unwrap();
        let found: Vec<f32> = open(&folded).logits(&ids, 1).try_into_vec_as().unwrap();
        let folded = relative_difference(&found, &expected);
        assert!(attached < 1e-4 && folded < 1e-4, "{name}: {attached:.1e} {folded:.1e}");

        // Saved again, it is an ordinary adapter for the base.
        save(&model, &adapter.config, out.path()).unwrap();
        let again = Adapter::open(out.path()).unwrap();
        assert_eq!((again.config.lora.r, again.config.lora.lora_alpha), (8, 16.0));
        let mut model = open(&root().join(BASE));
        again.attach(&mut model).unwrap();
        let found: Vec<f32> = model.logits(&ids, 1).try_into_vec_as().unwrap();
        assert!(relative_difference(&found, &expected) < 1e-4, "{name}");
    }
}

#[test]
fn a_base_that_is_lost_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    for (init, reason) in
        [("pissa_niter_4", "random numbers"), ("corda", "training data"), ("lora_ga", "training data")]
    {
        let config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
            "init_lora_weights": init});
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        let error = AdapterConfig::read(dir.path()).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(reason), "{error}");
    }
    let refused = |keys: Value| {
        let block: LoraBlock = serde_json::from_value(keys).unwrap();
        Lora::new(block, BASE, None, None).err().unwrap()
    };
    let message = refused(json!({"init_lora_weights": "pissa", "use_dora": true}));
    assert!(message.contains("exclude each other"), "{message}");
    let message = refused(json!({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}));
    assert!(message.contains("eva_config.rho"), "{message}");
}
