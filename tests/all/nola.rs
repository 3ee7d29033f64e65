//! NOLA through the program: thirty steps against PyTorch with bases drawn by an independent program
//! (`tests/golden/make_nola_trajectories.py`), its files, and what it learns with how few numbers.

use crate::families::{integers, open, relative_difference};
use crate::program::{BASE, HELD_OUT, losses, metrics};
use peft_core::checkpoint::SafetensorsFile;
use peft_methods::open_adapter;
use peft_tests::{golden, peft_ok, peft_refuses, root};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const ONE_MODULE: &str = "base_model.model.model.layers.1.self_attn.v_proj";

fn train(recipe: &str, out: &Path, more: &[&str]) -> PathBuf {
    let out = out.display().to_string();
    peft_ok(&[&["train", recipe, "--output-dir", &out], more].concat());
    PathBuf::from(out)
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn thirty_steps_equal_pytorchs() {
    for name in ["per_module", "shared"] {
        let dir = tempfile::tempdir().unwrap();
        let run = train(&format!("tests/golden/nola/{name}.yaml"), &dir.path().join("run"), &[]);
        let text = std::fs::read_to_string(golden("nola").join(format!("{name}.jsonl"))).unwrap();
        let expected: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let found = metrics(&run);
        assert_eq!((found.len(), expected.len()), (30, 30));
        let worst = |key: &str| {
            let pairs = found.iter().zip(&expected);
            let of =
                |(f, e): (&Value, &Value)| (f[key].as_f64().unwrap() / e[key].as_f64().unwrap() - 1.0).abs();
            pairs.map(of).fold(0f64, f64::max)
        };
        let (loss, norm) = (worst("loss"), worst("grad_norm"));

        let golden = SafetensorsFile::open(golden("nola").join(format!("{name}.safetensors"))).unwrap();
        let values = |key: &str| golden.tensor(key).unwrap().to_f32().unwrap();
        let adapter = open_adapter(&run.join("adapter")).unwrap();
        let coefficients = |part: &str| {
            let file = &adapter.folder().file;
            file.tensor(&format!("{ONE_MODULE}.nola_{part}")).unwrap().to_f32().unwrap()
        };
        let alpha = relative_difference(&coefficients("alpha"), &values("alpha"));
        let beta = relative_difference(&coefficients("beta"), &values("beta"));
        let mut model = open(&root().join(BASE));
        adapter.attach(&mut model).unwrap();
        let ids = integers(&golden, "input_ids").0;
        let logits: Vec<f32> = model.logits(&ids, 1).try_into_vec_as().unwrap();
        let after = relative_difference(&logits, &values("logits"));
        println!(
            "{name:<12} loss {loss:.1e}  norm {norm:.1e}  alpha {alpha:.1e}  beta {beta:.1e}  logits {after:.1e}"
        );
        assert!(loss < 1e-4 && norm < 1e-3 && alpha < 1e-3 && beta < 1e-3 && after < 1e-3, "{name}");
    }
}

/// Fewer numbers than a LoRA of rank 1 on the same weights, which already is the least that LoRA can have.
#[test]
fn learns_with_fewer_numbers_than_rank_one() {
    let dir = tempfile::tempdir().unwrap();
    let steps = ["--override", "max_steps=60", "--override", "learning_rate=1e-2"];
    let nola = train("tests/golden/nola/shared.yaml", &dir.path().join("nola"), &steps);
    let lora = train("tests/golden/nola/rank_one.yaml", &dir.path().join("lora"), &steps);
    let trained = |run: &Path| json_file(&run.join("run.json"))["trainable_parameters"].as_u64().unwrap();
    assert!(2 * trained(&nola) < trained(&lora), "{} {}", trained(&nola), trained(&lora));
    let bytes = nola.join("adapter/adapter_model.safetensors").metadata().unwrap().len();
    assert!(bytes < 20_000, "{bytes} bytes");
    let losses = losses(&nola);
    assert!(losses[59] < 0.3 * losses[0], "{} to {}", losses[0], losses[59]);
}

#[test]
fn coefficients_of_few_bits_mean_nearly_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let run = |bits: u32| {
        let bits = format!("method.coefficient_bits={bits}");
        let run = train(
            "tests/golden/nola/shared.yaml",
            &dir.path().join(&bits),
            &["--override", &bits, "max_steps=20"],
        );
        let bytes = run.join("adapter/adapter_model.safetensors").metadata().unwrap().len();
        let adapter = run.join("adapter").display().to_string();
        let data = ["--data", HELD_OUT, "--type", "prompt_completion", "--json"];
        let evaluate = ["evaluate", "--base-model", BASE, "--adapter", &adapter];
        let said: Value = serde_json::from_str(&peft_ok(&[&evaluate[..], &data].concat())).unwrap();
        (said["loss"].as_f64().unwrap(), bytes)
    };
    let ((exact, most), (eight, fewer), (four, least)) = (run(32), run(8), run(4));
    println!("32 bits {exact:.4} in {most} bytes, 8 {eight:.4} in {fewer}, 4 {four:.4} in {least}");
    assert!(most > fewer && fewer > least, "{most} {fewer} {least}");
    assert!(eight != exact && (eight - exact).abs() < 5e-3, "{eight} {exact}");
    assert!((four - exact).abs() < 5e-2, "{four} {exact}");
}

#[test]
fn bases_that_are_not_those_of_the_training_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let run =
        train("tests/golden/nola/per_module.yaml", &dir.path().join("run"), &["--override", "max_steps=1"]);
    let path = run.join("adapter/adapter_config.json");
    let (config, adapter) = (json_file(&path), run.join("adapter").display().to_string());
    for (key, value, says) in [
        ("basis_seed", json!(43), "basis_sha256"),
        ("seed_policy", json!("shared"), "basis_sha256"),
        ("r", json!(5), "basis_sha256"),
        ("rng", json!({"name": "philox4x32-10", "version": 2, "dtype": "f32"}), "rng is"),
        ("rng", json!({"name": "philox4x32-10", "version": 1, "dtype": "bf16"}), "rng is"),
        ("basis_seed", json!(null), "basis_seed is missing"),
        ("num_basis_a", json!(49), "expected [49]"),
    ] {
        let mut changed = config.clone();
        changed[key] = value;
        std::fs::write(&path, changed.to_string()).unwrap();
        let error = peft_refuses(&["generate", "--base-model", BASE, "--adapter", &adapter, "--prompt", "a"]);
        assert!(error.contains(says), "{key}: {error}");
    }
}
