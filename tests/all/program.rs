//! The main job through the program: train, evaluate, generate, merge, inspect.

use peft_tests::{peft_ok, peft_refuses, quickstart_world, root};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

pub const BASE: &str = "recipes/quickstart/base";
pub const HELD_OUT: &str = "recipes/quickstart/held_out.jsonl";

/// Trains the quickstart with overrides into `dir`.
pub fn train(dir: &Path, overrides: &[&str], flags: &[&str]) -> String {
    let dir = dir.display().to_string();
    let mut args = vec!["train", "recipes/quickstart.yaml", "--output-dir", &dir];
    for entry in overrides {
        args.extend(["--override", entry]);
    }
    args.extend(flags);
    peft_ok(&args)
}

/// A run of a few steps without evaluation.
pub const SHORT: [&str; 4] =
    ["max_steps=6", "eval_on_start=false", "eval_generations=0", "lr_scheduler=constant"];

pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn losses(dir: &Path) -> Vec<f64> {
    metrics(dir).iter().filter_map(|line| line["loss"].as_f64()).collect()
}

fn evaluate(args: &[&str]) -> Value {
    let mut all = vec!["evaluate", "--data", HELD_OUT, "--type", "prompt_completion", "--json"];
    all.extend(args);
    serde_json::from_str(&peft_ok(&all)).unwrap()
}

#[test]
fn the_quickstart_teaches_the_task_and_its_results_agree() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let stdout = train(&run, &[], &[]);
    assert!(stdout.contains("exact match") && stdout.contains("peft merge"), "{stdout}");

    let info: Value = serde_json::from_slice(&std::fs::read(run.join("run.json")).unwrap()).unwrap();
    let (before, after) = (&info["result"]["before"], &info["result"]["after"]);
    assert!(before["eval_exact_match"].as_f64().unwrap() < 0.05, "{before}");
    assert!(after["eval_exact_match"].as_f64().unwrap() > 0.9, "{after}");
    assert!(after["eval_perplexity"].as_f64().unwrap() < 1.5, "{after}");
    assert_eq!(
        info["trainable_parameters"].as_u64(),
        Some(info["recipe"]["method"]["r"].as_u64().unwrap() * 6912)
    );
    let steps = metrics(&run).iter().filter(|line| line.get("loss").is_some()).count() as u64;
    assert_eq!(Some(steps), info["total_steps"].as_u64());

    // The adapter attached, and folded into a checkpoint, give what training measured at its end.
    let adapter = run.join("adapter").display().to_string();
    let merged = dir.path().join("merged").display().to_string();
    peft_ok(&[
        "merge",
        "--base-model",
        BASE,
        "--adapter",
        &adapter,
        "--output",
        &merged,
        "--max-shard-size",
        "1MB",
    ]);
    assert!(Path::new(&merged).join("model.safetensors.index.json").is_file());
    let attached = evaluate(&["--base-model", BASE, "--adapter", &adapter]);
    let folded = evaluate(&["--base-model", &merged]);
    let loss = |value: &Value| value["loss"].as_f64().unwrap();
    assert!((loss(&attached) - after["eval_loss"].as_f64().unwrap()).abs() < 1e-6);
    assert!((loss(&attached) - loss(&folded)).abs() < 1e-5, "{attached} {folded}");

    let prompt = "On Monday Mia bought seven red apples at the market.\n";
    let generate = |args: &[&str]| {
        let mut all = vec!["generate", "--prompt", prompt, "--max-new-tokens", "80"];
        all.extend(args);
        peft_ok(&all)
    };
    let answer = generate(&["--base-model", BASE, "--adapter", &adapter]);
    assert_eq!(answer.trim(), r#"{"who":"Mia","count":7,"color":"red","item":"apples","place":"market"}"#);
    assert_eq!(answer, generate(&["--base-model", &merged]));
    let drawn = |seed: &str| generate(&["--base-model", BASE, "--temperature", "1.5", "--seed", seed]);
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
}

#[test]
fn a_recipe_gives_the_same_bytes_every_time() {
    let dir = tempfile::tempdir().unwrap();
    let file =
        |run: &str| std::fs::read(dir.path().join(run).join("adapter/adapter_model.safetensors")).unwrap();
    train(&dir.path().join("a"), &SHORT, &[]);
    train(&dir.path().join("b"), &SHORT, &[]);
    assert_eq!(file("a"), file("b"));
    let mut other = SHORT.to_vec();
    other.push("seed=43");
    train(&dir.path().join("c"), &other, &[]);
    assert_ne!(file("a"), file("c"));
}

#[test]
fn a_resumed_run_ends_as_the_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let with =
        |extra: &[&'static str]| [SHORT.to_vec(), vec!["method.lora_dropout=0.1"], extra.to_vec()].concat();
    train(&whole, &with(&[]), &[]);
    train(&parts, &with(&["max_steps=4"]), &["--resume", "auto"]);
    train(&parts, &with(&[]), &["--resume", "auto"]);
    let adapter = |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(&whole), adapter(&parts));
    assert_eq!(losses(&whole), losses(&parts));
}

#[test]
fn accumulation_checkpointing_and_chunks_change_nothing_but_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, extra: &[&'static str]| {
        let overrides =
            [SHORT.to_vec(), vec!["shuffle_data=false", "method.lora_dropout=0"], extra.to_vec()].concat();
        let path = dir.path().join(name);
        train(&path, &overrides, &[]);
        losses(&path)
    };
    let reference = run("1x4", &["micro_batch_size=4"]);
    assert!(reference[5] < reference[0]);
    let variants = [
        run("4x1", &["micro_batch_size=1", "gradient_accumulation_steps=4"]),
        run("layers", &["micro_batch_size=4", "gradient_checkpointing=true"]),
        run("chunks", &["micro_batch_size=4", "loss_chunk_rows=7"]),
    ];
    for losses in variants {
        for (found, expected) in losses.iter().zip(&reference) {
            assert!((found - expected).abs() < 2e-4 * expected, "{losses:?} {reference:?}");
        }
    }
}

#[test]
fn a_chosen_way_of_computing_again_is_told_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path(), dir.path().display().to_string());
    let with = |checkpointing: &'static str, steps: &'static str| {
        [SHORT.to_vec(), vec!["save_steps=2", checkpointing, steps]].concat()
    };
    let recorded = || {
        let run: Value = serde_json::from_slice(&std::fs::read(path.join("run.json")).unwrap()).unwrap();
        run["recipe"]["gradient_checkpointing"].clone()
    };
    // The model is tiny: everything fits.
    let auto = "gradient_checkpointing=auto";
    let planned = peft_ok(&["plan", "recipes/quickstart.yaml", "--override", auto, "--json"]);
    let planned: Value = serde_json::from_str(&planned).unwrap();
    assert_eq!(planned["recipe"]["gradient_checkpointing"], false);
    train(path, &with(auto, "max_steps=2"), &[]);
    assert_eq!(recorded(), false);
    // What would be chosen now is not asked: the run goes on as it began.
    train(path, &with("gradient_checkpointing=selective", "max_steps=2"), &[]);
    assert_eq!(recorded(), "selective");
    train(path, &with(auto, "max_steps=4"), &["--resume", "auto"]);
    assert_eq!(recorded(), "selective");
    let mut other = vec!["train", "recipes/quickstart.yaml", "--output-dir", &out, "--resume", "auto"];
    let overrides = with("gradient_checkpointing=true", "max_steps=6");
    overrides.iter().for_each(|entry| other.extend(["--override", entry]));
    let error = peft_refuses(&other);
    assert!(error.contains("gradient_checkpointing") && error.contains("another run"), "{error}");
    let unknown = ["plan", "recipes/quickstart.yaml", "--override", "gradient_checkpointing=some"];
    let error = peft_refuses(&unknown);
    assert!(error.contains("`gradient_checkpointing`") && error.contains("selective"), "{error}");
}

#[test]
fn checkpoints_are_kept_up_to_the_limit_and_hold_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = [SHORT.to_vec(), vec!["save_steps=1", "save_total_limit=2", "eval_steps=3"]].concat();
    train(dir.path(), &overrides, &[]);
    let mut kept: Vec<String> = std::fs::read_dir(dir.path().join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    assert_eq!(kept, ["step-00000005", "step-00000006"]);
    let adapter = dir.path().join("checkpoints/step-00000005/adapter").display().to_string();
    assert!(evaluate(&["--base-model", BASE, "--adapter", &adapter])["loss"].as_f64().unwrap() > 0.0);
    let evaluations: Vec<u64> = metrics(dir.path())
        .iter()
        .filter(|line| line.get("eval_loss").is_some())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(evaluations, [3, 6]);
}

#[test]
fn full_training_writes_a_checkpoint_that_loads() {
    let dir = tempfile::tempdir().unwrap();
    let overrides = [SHORT.to_vec(), vec!["method={type: full}", "learning_rate=1e-3"]].concat();
    train(dir.path(), &overrides, &[]);
    let model = dir.path().join("model").display().to_string();
    let (base, trained) = (evaluate(&["--base-model", BASE]), evaluate(&["--base-model", &model]));
    assert!(trained["loss"].as_f64() < base["loss"].as_f64(), "{trained} {base}");
    assert_eq!(trained["supervised_tokens"], base["supervised_tokens"]);
}

#[test]
fn a_fresh_run_keeps_the_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &SHORT, &[]);
    let first = std::fs::read(dir.path().join("metrics.jsonl")).unwrap();
    train(dir.path(), &SHORT, &[]);
    assert_eq!(std::fs::read(dir.path().join("previous-1/metrics.jsonl")).unwrap(), first);
    assert!(dir.path().join("previous-1/checkpoints").is_dir());
}

#[test]
fn inspect_tells_what_things_are() {
    let json = |args: &[&str]| -> Value { serde_json::from_str(&peft_ok(args)).unwrap() };
    let checkpoint = json(&["inspect", BASE, "--json"]);
    assert_eq!(checkpoint["architecture"], "LlamaForCausalLM");
    assert_eq!(checkpoint["parameters"], 455_520);
    let data = json(&["inspect", HELD_OUT, "--type", "prompt_completion", "--base-model", BASE, "--json"]);
    assert_eq!(data["report"]["records"], 200);
    let shown = peft_ok(&["inspect", HELD_OUT, "--type", "prompt_completion", "--base-model", BASE]);
    // The answer and the end of the sequence are supervised, the sentence is not.
    let example = shown.lines().find(|line| line.contains("\"who\"")).unwrap();
    assert!(example.starts_with("⟦{") && example.ends_with("</s>⟧"), "{shown}");
    let adapter = root().join("tests/golden/adapters/qv").display().to_string();
    assert_eq!(json(&["inspect", &adapter, "--json"])["config"]["r"], 4);
}

#[test]
fn the_quickstart_world_is_made_again_and_can_be_pretrained_on() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Command::new(quickstart_world()).arg(dir.path()).output().unwrap().status.success());
    let same = |made: &str, kept: &str| {
        let read = |path: &Path| std::fs::read(path).unwrap();
        assert_eq!(
            read(&dir.path().join(made)),
            read(&root().join("recipes/quickstart").join(kept)),
            "{made}"
        );
    };
    same("train.jsonl", "train.jsonl");
    same("held_out.jsonl", "held_out.jsonl");
    same("base/tokenizer.json", "base/tokenizer.json");
    same("base/config.json", "base/config.json");
    let override_of = |key: &str, path: &str| format!("{key}={}", dir.path().join(path).display());
    let base = override_of("base_model", "base");
    let corpus = override_of("datasets.0.path", "corpus.jsonl");
    let out = dir.path().join("out").display().to_string();
    let recipe = "recipes/quickstart/pretrain.yaml";
    peft_ok(&[
        "train",
        recipe,
        "--output-dir",
        &out,
        "--override",
        &base,
        &corpus,
        "max_steps=2",
        "val_set_size=8",
    ]);
    assert!(dir.path().join("out/model/model.safetensors").is_file());
}
