//! Hostile and mistaken input: one clear error that names what is wrong, and nothing half written.

use crate::program::{BASE, HELD_OUT, SHORT, train};
use peft_tests::{golden, peft, peft_refuses, program, root};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A copy of the quickstart's base to be damaged.
pub fn base() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    copy(&root().join(BASE), dir.path());
    let path = dir.path().to_path_buf();
    (dir, path)
}

pub fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Refused with an error that contains all of `expected`.
pub fn refuses(args: &[&str], expected: &[&str]) {
    let stderr = peft_refuses(args);
    for part in expected {
        assert!(stderr.contains(part), "no `{part}` in: {stderr}");
    }
    assert_eq!(stderr.lines().filter(|line| line.starts_with("error")).count(), 1, "{stderr}");
}

pub fn refuses_base(dir: &Path, expected: &[&str]) {
    let dir = dir.display().to_string();
    refuses(&["generate", "--base-model", &dir, "--prompt", "x"], expected);
}

/// The header and the data of a safetensors file.
pub fn split(path: &Path) -> (Value, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

pub fn join(path: &Path, header: &Value, data: &[u8]) {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn damaged_weights() {
    let (_guard, dir) = base();
    let file = dir.join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();

    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    refuses_base(&dir, &["model.safetensors", "cut short"]);

    std::fs::write(&file, &whole).unwrap();
    let (header, data) = split(&file);
    let mut overlapping = header.clone();
    overlapping["model.norm.weight"]["data_offsets"] = json!([0, 384]);
    join(&file, &overlapping, &data);
    refuses_base(&dir, &["model.safetensors", "inside the tensor before it"]);

    let mut huge = (100_000_001u64).to_le_bytes().to_vec();
    huge.resize(100_000_100, b' ');
    std::fs::write(&file, huge).unwrap();
    refuses_base(&dir, &["model.safetensors", "header", "100000000"]);

    let mut nan = data.clone();
    let begin = header["model.layers.2.mlp.up_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    nan[begin + 40..begin + 44].copy_from_slice(&f32::NAN.to_le_bytes());
    join(&file, &header, &nan);
    refuses_base(&dir, &["model.layers.2.mlp.up_proj.weight", "NaN", "element 10"]);

    let mut renamed = header.clone();
    let entry = renamed.as_object_mut().unwrap().remove("model.norm.weight").unwrap();
    renamed["model.nrom.weight"] = entry;
    join(&file, &renamed, &data);
    refuses_base(&dir, &["`model.norm.weight`", "`model.nrom.weight`"]);
}

#[test]
fn an_index_that_leads_out_of_its_folder() {
    let (_guard, dir) = base();
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    let index = json!({"weight_map": {"model.norm.weight": "../../../etc/passwd.safetensors"}});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    refuses_base(&dir, &["model.safetensors.index.json", "../../../etc/passwd.safetensors"]);
}

#[test]
fn absurd_and_foreign_configurations() {
    let (_guard, dir) = base();
    let path = dir.join("config.json");
    let original: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let with = |key: &str, value: Value, expected: &[&str]| {
        let mut config = original.clone();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        refuses_base(&dir, expected);
    };
    with("hidden_size", json!(1u64 << 60), &["config.json", "`hidden_size`", "1048576"]);
    with("num_hidden_layers", json!(-3), &["`num_hidden_layers`", "-3"]);
    with("num_hidden_layers", json!(4000), &["model.layers.4."]);
    with("num_key_value_heads", json!(3), &["`num_key_value_heads`", "divisor"]);
    with("intermediate_size", json!(512), &["mlp.gate_proj.weight", "[256, 96]", "[512, 96]"]);
    with(
        "architectures",
        json!(["GPT2LMHeadModel"]),
        &["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"],
    );
    with(
        "rope_scaling",
        json!({"rope_type": "longrope", "factor": 2.0}),
        &["rope_scaling.rope_type", "longrope"],
    );
    with("vocab_size", json!("many"), &["`vocab_size`", "many"]);
}

#[test]
fn data_without_anything_to_learn() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.jsonl");
    let recipe = |extra: &[&str]| {
        let path = format!("datasets.0.path={}", file.display());
        let out = dir.path().join("out").display().to_string();
        let mut args = vec!["train", "recipes/quickstart.yaml", "--output-dir", &out, "--override", &path];
        args.extend(extra);
        let stderr = peft_refuses(&args);
        assert!(!dir.path().join("out/adapter").exists());
        stderr
    };
    std::fs::write(&file, "").unwrap();
    assert!(recipe(&[]).contains("data.jsonl"));
    let record =
        json!({"prompt": "a rather long prompt with many words in it ".repeat(3), "completion": "x"});
    std::fs::write(&file, format!("{record}\n")).unwrap();
    let stderr = recipe(&["--override", "sequence_len=8", "on_truncation=right"]);
    assert!(stderr.contains("supervised"), "{stderr}");
    let stderr = recipe(&["--override", "sequence_len=8"]);
    assert!(stderr.contains("data.jsonl") && stderr.contains("8"), "{stderr}");
    std::fs::write(&file, "{\"prompt\": \"a\", \"completon\": \"b\"}\n").unwrap();
    let stderr = recipe(&[]);
    assert!(stderr.contains("`completion`") && stderr.contains("`completon`"), "{stderr}");
    std::fs::write(&file, "{\"prompt\": \"a\", \n").unwrap();
    assert!(recipe(&[]).contains("1"));
}

#[test]
fn mistaken_recipes() {
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("out").display().to_string();
    let with = |entry: &str, expected: &[&str]| {
        refuses(&["train", "recipes/quickstart.yaml", "--output-dir", &out, "--override", entry], expected);
        assert!(!Path::new(&out).exists(), "{entry} left something behind");
    };
    with("learning_rat=1", &["`learning_rat`", "`learning_rate`"]);
    with("method.lora_alhpa=1", &["lora_alhpa", "`lora_alpha`"]);
    with("datasets.0.tpye=alpaca", &["datasets[0].tpye", "`type`"]);
    with("method.target_modules=[q_porj]", &["q_porj", "`q_proj`"]);
    with("method.target_modules=q_proj", &["q_proj", "regular expression"]);
    with("method.target_modules='(q_proj'", &["target_modules", "regular expression"]);
    with("method.r=0", &["`method`", "r is 0"]);
    with("method.modules_to_save=[lm_head]", &["lm_head", "tie_word_embeddings"]);
    with("method.type=lorra", &["lorra", "known"]);
    with("learning_rate=-1", &["`learning_rate`", "-1"]);
    with("lr_scheduler=cosin", &["lr_scheduler", "cosin"]);
    with("datasets.0.type=alpacca", &["alpacca"]);
    with("optimizer.type=sgd", &["sgd", "adamw"]);
    with("device=cuda:x", &["cuda:x"]);
    with("base_model=recipes/quickstart/bsae", &["recipes/quickstart/bsae"]);
    with("adapter_name_or_path=recipes/nothing/here", &["recipes/nothing/here"]);
}

#[test]
fn a_template_that_loops_for_ever() {
    let (_guard, dir) = base();
    let template = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}";
    std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
    let dir = dir.display().to_string();
    refuses(&["generate", "--base-model", &dir, "--chat", "--prompt", "x"], &["template"]);
}

#[test]
fn adapters_that_do_not_fit() {
    let adapter = golden("adapters/qv").display().to_string();
    refuses(
        &["generate", "--base-model", BASE, "--adapter", &adapter, "--prompt", "x"],
        &["adapter_model.safetensors"],
    );

    let dir = tempfile::tempdir().unwrap();
    copy(&golden("adapters/qv"), dir.path());
    let file = dir.path().join("adapter_model.safetensors");
    let (header, data) = split(&file);
    let key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let base = golden("families/llama_gqa_tied").display().to_string();
    let (path, out) = (dir.path().display().to_string(), dir.path().join("merged"));
    let output = out.display().to_string();
    let merge = ["merge", "--base-model", &base, "--adapter", &path, "--output", &output];

    let mut renamed = header.clone();
    let entry = renamed.as_object_mut().unwrap().remove(key).unwrap();
    renamed["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = entry;
    join(&file, &renamed, &data);
    refuses(&merge, &[key, "lora_A.default.weight"]);
    assert!(!out.exists());

    let mut poisoned = data.clone();
    poisoned[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    join(&file, &header, &poisoned);
    refuses(&merge, &["non-finite"]);

    let config = dir.path().join("adapter_config.json");
    join(&file, &header, &data);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["use_dora"] = json!(true);
    std::fs::write(&config, json.to_string()).unwrap();
    refuses(&merge, &["lora_magnitude_vector", "missing"]);
    json["use_dora"] = json!(false);
    json["use_qalora"] = json!(true);
    std::fs::write(&config, json.to_string()).unwrap();
    refuses(&merge, &["`use_qalora`"]);
    json["use_qalora"] = json!(false);
    json["r"] = json!(5);
    std::fs::write(&config, json.to_string()).unwrap();
    refuses(&merge, &["lora_A.weight", "expected [5, "]);
    assert!(!out.exists());
}

#[test]
fn merge_never_touches_a_folder_that_holds_something() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("precious"), "x").unwrap();
    let adapter = golden("adapters/qv").display().to_string();
    let base = golden("families/llama_gqa_tied").display().to_string();
    let output = dir.path().display().to_string();
    refuses(&["merge", "--base-model", &base, "--adapter", &adapter, "--output", &output], &["not empty"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// A file-size limit stands in for a full disk: writes fail half way.
#[test]
fn a_disk_that_fills_up_leaves_the_previous_state_usable() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &SHORT, &[]);
    let adapter = std::fs::read(dir.path().join("adapter/adapter_model.safetensors")).unwrap();
    let script = format!(
        "trap '' XFSZ; ulimit -f 64; exec {} train recipes/quickstart.yaml --output-dir {} --resume auto {} --override max_steps=8",
        program().display(),
        dir.path().display(),
        SHORT.map(|entry| format!("--override {entry}")).join(" "),
    );
    let out = Command::new("sh").args(["-c", &script]).current_dir(root()).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write") && !stderr.contains("panicked"), "{stderr}");
    assert_eq!(std::fs::read(dir.path().join("adapter/adapter_model.safetensors")).unwrap(), adapter);
    let left: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    train(dir.path(), &[&SHORT[..], &["max_steps=8"]].concat(), &["--resume", "auto"]);
}

#[test]
fn a_state_of_another_run_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &SHORT, &[]);
    let out = dir.path().display().to_string();
    let mut args = vec!["train", "recipes/quickstart.yaml", "--output-dir", &out, "--resume", "auto"];
    args.extend(["--override", "seed=1", "--override", "max_steps=9"]);
    refuses(&args, &["seed was 42, is 1"]);
}

#[test]
fn offline_without_a_cache_names_what_is_missing() {
    let home = tempfile::tempdir().unwrap();
    let out = Command::new(program())
        .args(["generate", "--base-model", "some-org/some-model", "--prompt", "x", "--offline"])
        .env("HF_HOME", home.path())
        .env_remove("HF_HUB_CACHE")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(stderr.contains("some-org/some-model"), "{stderr}");
    assert_eq!(out.status.code(), Some(2), "{stderr}");
}

#[test]
fn the_held_out_file_of_another_kind_is_refused_by_name() {
    let out = peft(&["evaluate", "--base-model", BASE, "--data", HELD_OUT, "--type", "alpaca"]);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("held_out.jsonl") && stderr.contains("instruction"), "{stderr}");
}
