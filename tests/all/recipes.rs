//! Every recipe runs, and everything that the program does with its result works.

use crate::program::{BASE, HELD_OUT};
use peft_core::checkpoint::{Checkpoint, Dtype, LazyTensor, write_safetensors};
use peft_core::model::ModelConfig;
use peft_tests::{peft_ok, peft_refuses, root};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The recipes for `peft train`; those for `peft compare` have their own tests.
fn recipes() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("recipes")).unwrap().map(|entry| entry.unwrap().path());
    let mut recipes: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|e| e == "yaml")).collect();
    recipes
        .retain(|path| !path.file_stem().is_some_and(|name| name.to_string_lossy().starts_with("compare")));
    recipes.sort();
    recipes
}

/// The quickstart's base with biases of 0 on every projection, in `dir`.
fn base_with_biases(dir: &Path) -> PathBuf {
    let out = dir.join("biased");
    std::fs::create_dir(&out).unwrap();
    let base = Checkpoint::open(&root().join(BASE)).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(base.dir().join(name), out.join(name)).unwrap();
    }
    let mut config = base.config().clone();
    (config["attention_bias"], config["mlp_bias"]) = (true.into(), true.into());
    std::fs::write(out.join("config.json"), config.to_string()).unwrap();
    let names: Vec<&str> = base.names().collect();
    let mut tensors: Vec<LazyTensor> =
        names.iter().map(|name| LazyTensor::borrowed(base.tensor(name).unwrap())).collect();
    let model = ModelConfig::from_json(base.dir(), base.config()).unwrap();
    for projection in model.projections() {
        let rows = projection.dims[0];
        let zeros = move || Ok(Cow::Owned(vec![0u8; 4 * rows]));
        tensors.push(LazyTensor::new(format!("{}.bias", projection.path), Dtype::F32, vec![rows], zeros));
    }
    write_safetensors(&out.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
    out
}

#[test]
fn every_recipe_is_planned_trained_inspected_evaluated_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let biased = base_with_biases(dir.path()).display().to_string();
    assert!(recipes().len() >= 7, "recipes are missing");
    for recipe in recipes() {
        let name = recipe.file_stem().unwrap().to_string_lossy().into_owned();
        let recipe = recipe.display().to_string();
        let text = std::fs::read_to_string(&recipe).unwrap();
        // A base of the hub is not at hand.
        let base = if text.contains("base_model: recipes/") { BASE } else { biased.as_str() };
        let named = format!("base_model={base}");
        let short = ["max_steps=2", "datasets.0.limit=40", "eval_datasets.0.limit=8", "eval_generations=0"];
        let of_method: &[&str] = match name.as_str() {
            "lora_ga" => &["method.init_num_samples=8"],
            // Positions are chosen after the first step.
            "sparse" => &["method.reselection_steps=2", "method.selection_accumulation_steps=1"],
            _ => &[],
        };
        let overrides = &[&short[..], &[&named], of_method].concat();

        let mut plan = vec!["plan", &recipe, "--json", "--override"];
        plan.extend(overrides);
        let plan: Value = serde_json::from_str(&peft_ok(&plan)).unwrap();
        let run = dir.path().join(&name);
        let run_dir = run.display().to_string();
        let mut train = vec!["train", &recipe, "--output-dir", &run_dir, "--override"];
        train.extend(overrides);
        let said = peft_ok(&train);
        let info: Value = serde_json::from_slice(&std::fs::read(run.join("run.json")).unwrap()).unwrap();
        assert_eq!(plan["trainable_parameters"], info["trainable_parameters"], "{name}");
        let adapter = run.join("adapter");
        let file = adapter.join("adapter_model.safetensors").metadata().unwrap().len();
        let planned = plan["artifact_bytes"].as_u64().unwrap();
        match name.as_str() {
            // What LoRA-GA took out of the base doubles the rank of what is saved.
            "lora_ga" => {}
            // Positions take less where they crowd together.
            "sparse" => assert!(file < planned + planned / 50 && file > planned / 2, "{file} of {planned}"),
            _ => assert_eq!(planned, file, "{name}"),
        }
        assert!(said.contains("peft merge") || said.contains("merge "), "{name}: {said}");

        let adapter = adapter.display().to_string();
        let inspected: Value = serde_json::from_str(&peft_ok(&["inspect", &adapter, "--json"])).unwrap();
        assert_eq!(inspected["kind"], "adapter");
        assert!(inspected["config"]["peft_type"].is_string(), "{inspected}");
        let merged = dir.path().join(format!("{name}-merged")).display().to_string();
        let merge = ["merge", "--base-model", base, "--adapter", &adapter, "--output", &merged, "--json"];
        let merge: Value = serde_json::from_str(&peft_ok(&merge)).unwrap();
        assert!(merge["verification"]["drift"]["mean_relative"].as_f64().unwrap() < 1e-4, "{name}: {merge}");
        let loss = |model: &[&str]| -> f64 {
            let data = ["evaluate", "--data", HELD_OUT, "--type", "prompt_completion", "--json", "--dataset"];
            let args = [&data[..], &["limit=8"], model].concat();
            let value: Value = serde_json::from_str(&peft_ok(&args)).unwrap();
            value["loss"].as_f64().unwrap()
        };
        let attached = loss(&["--base-model", base, "--adapter", &adapter]);
        let folded = loss(&["--base-model", &merged]);
        assert!((attached - folded).abs() < 1e-4, "{name}: {attached} attached, {folded} folded");

        // A second run from the first one's adapter goes on from its values; LoRA-GA's are of another rank.
        if name != "lora_ga" {
            let again = dir.path().join(format!("{name}-again")).display().to_string();
            let start = format!("adapter_name_or_path={adapter}");
            let mut train = vec!["train", &recipe, "--output-dir", &again, "--override", &start];
            train.extend(["eval_on_start=true"].iter().chain(overrides.iter()));
            peft_ok(&train);
            let info: Value =
                serde_json::from_slice(&std::fs::read(Path::new(&again).join("run.json")).unwrap()).unwrap();
            let before = info["result"]["before"]["eval_loss"].as_f64().unwrap();
            assert!((before - attached).abs() < 1e-4, "{name}: starts at {before}, not at {attached}");
        }
    }
}

#[test]
fn a_vera_is_exported_as_the_lora_that_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (run, lora) = (path("run"), path("lora"));
    let mut train = vec!["train", "recipes/vera.yaml", "--output-dir", &run, "--override", "max_steps=3"];
    // A pattern of ranks that differ is not to be had here; that the pair is drawn again is.
    train.extend(["method.save_projection=false", "method.r=8", "eval_on_start=false"]);
    peft_ok(&train);
    let adapter = format!("{run}/adapter");
    // The base is the one that the adapter names.
    let said = peft_ok(&["export", &adapter, "--format", "peft-lora", "-o", &lora, "--json"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["modules_by_rank"]["8"], 28, "{said}");
    let loss = |adapter: &str| -> f64 {
        let data = ["evaluate", "--data", HELD_OUT, "--type", "prompt_completion", "--json", "--dataset"];
        let args = [&data[..], &["limit=8", "--base-model", BASE, "--adapter", adapter]].concat();
        serde_json::from_str::<Value>(&peft_ok(&args)).unwrap()["loss"].as_f64().unwrap()
    };
    assert!((loss(&adapter) - loss(&lora)).abs() < 1e-5);
    let config: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&lora).join("adapter_config.json")).unwrap())
            .unwrap();
    assert_eq!(
        (&config["peft_type"], &config["r"], &config["lora_alpha"]),
        (&"LORA".into(), &8.into(), &8.into())
    );

    // A change that is no product is refused, and nothing is left.
    let (run, out) = (path("ia3"), path("none"));
    peft_ok(&["train", "recipes/ia3.yaml", "--output-dir", &run, "--override", "max_steps=1"]);
    let said = peft_refuses(&["export", &format!("{run}/adapter"), "--format", "peft-lora", "-o", &out]);
    assert!(said.contains("no product of two factors") && !Path::new(&out).exists(), "{said}");
    assert!(peft_refuses(&["export", &adapter, "--format", "peft-lora", "-o", &lora]).contains("lora"));
}

#[test]
fn methods_are_listed() {
    let listed: Value = serde_json::from_str(&peft_ok(&["methods", "--json"])).unwrap();
    let types: Vec<&str> = listed.as_array().unwrap().iter().map(|m| m["type"].as_str().unwrap()).collect();
    assert!(["lora", "vera", "ia3", "full"].iter().all(|name| types.contains(name)), "{types:?}");
    let shown = peft_ok(&["methods"]);
    assert!(types.iter().all(|name| shown.contains(name)), "{shown}");
}

#[test]
fn a_base_without_biases_has_nothing_for_bitfit() {
    let base = format!("base_model={BASE}");
    let said = peft_refuses(&["plan", "recipes/bitfit.yaml", "--override", &base]);
    assert!(said.contains("biases") && said.contains("none"), "{said}");
}
