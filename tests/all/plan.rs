//! `peft plan` against what `peft train` then does.

use crate::program::{BASE, HELD_OUT, SHORT, train};
use peft_core::checkpoint::Dtype;
use peft_core::model::ModelConfig;
use peft_tests::{peft, peft_ok, peft_refuses, root};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

fn plan(overrides: &[&str]) -> Value {
    let mut args = vec!["plan", "recipes/quickstart.yaml", "--json"];
    for entry in overrides {
        args.extend(["--override", entry]);
    }
    serde_json::from_str(&peft_ok(&args)).unwrap()
}

fn size(path: &Path) -> Option<u64> {
    path.metadata().ok().map(|metadata| metadata.len())
}

#[test]
fn the_predicted_peak_and_sizes_are_the_runs() {
    let dir = tempfile::tempdir().unwrap();
    // Batches large enough that activations are most of it.
    let overrides =
        [SHORT.to_vec(), vec!["micro_batch_size=128", "eval_datasets=[]", "max_steps=3"]].concat();
    let planned = plan(&overrides);
    train(dir.path(), &overrides, &[]);
    let run: Value = serde_json::from_slice(&std::fs::read(dir.path().join("run.json")).unwrap()).unwrap();

    let measured = run["result"]["peak_memory_bytes"].as_f64().unwrap();
    for memory in [&planned["memory"], &run["plan"]["memory"]] {
        let predicted = memory["peak_bytes"].as_f64().unwrap();
        assert!((predicted / measured - 1.0).abs() < 0.15, "{predicted} for {measured}: {memory}");
        let components = memory["components"].as_object().unwrap();
        let sum: f64 = components.values().map(|bytes| bytes.as_f64().unwrap()).sum();
        assert_eq!(sum, predicted);
        assert!(components["activations"].as_f64().unwrap() > predicted / 2.0, "{memory}");
    }
    let adapter = size(&dir.path().join("adapter/adapter_model.safetensors"));
    assert_eq!(planned["artifact_bytes"].as_u64(), adapter);
    let state = size(&dir.path().join("checkpoints/step-00000003/state.safetensors")).unwrap();
    assert_eq!(planned["checkpoint_bytes"].as_u64(), Some(adapter.unwrap() + state));
    assert_eq!(planned["trainable_parameters"], run["trainable_parameters"]);
    assert_eq!(planned["parameters"], run["parameters"]);
    assert_eq!(planned["course"]["steps"], run["total_steps"]);
    assert_eq!(planned["data"]["train_examples"], run["data"]["train_examples"]);
    assert_eq!(planned["recipe"]["learning_rate"], run["recipe"]["learning_rate"]);
    assert_eq!(planned["fits"], true);

    let screen = peft_ok(&["plan", "recipes/quickstart.yaml"]);
    for word in ["q_proj", "96 × 96", "449,480 bytes", "predicted peak", "activations", "400 steps"] {
        assert!(screen.contains(word), "{word}:\n{screen}");
    }
    assert!(screen.lines().count() < 60, "{screen}");
}

/// A model of five thousand million values, none of which is on the disk.
#[test]
fn a_plan_reads_headers_alone() {
    let dir = tempfile::tempdir().unwrap();
    let base = root().join(BASE);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(base.join(file), dir.path().join(file)).unwrap();
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 26, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 512,
        "tie_word_embeddings": true
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let model = ModelConfig::from_json(dir.path(), &config).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for parameter in model.parameters() {
        let begin = end;
        end += parameter.numel() * Dtype::BF16.size() as u64;
        let entry = json!({"dtype": "BF16", "shape": parameter.shape, "data_offsets": [begin, end]});
        header.insert(parameter.name, entry);
    }
    let header = Value::Object(header).to_string();
    let path = dir.path().join("model.safetensors");
    let mut file = File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();

    let override_base = format!("base_model={}", dir.path().display());
    let planned = plan(&[&override_base, "gradient_checkpointing=true", "dtype=f32"]);
    let parameters = planned["base"]["parameters"].as_u64().unwrap();
    assert_eq!(2 * parameters, end);
    assert!(end > 10_000_000_000, "{end}");
    assert_eq!(planned["base"]["types"]["bf16"].as_u64(), Some(parameters));
    assert_eq!(planned["memory"]["components"]["base_weights"].as_u64(), Some(4 * parameters));
    // Nothing was written there either: 512-byte blocks.
    assert!(path.metadata().unwrap().blocks() < 1000);

    // A tensor of another shape than the configuration says is found in the header.
    std::fs::write(dir.path().join("config.json"), config.to_string().replace("11008", "11000")).unwrap();
    for command in ["plan", "train"] {
        let error = peft_refuses(&[command, "recipes/quickstart.yaml", "--override", &override_base]);
        assert!(error.contains("gate_proj") && error.contains("11008"), "{error}");
    }
}

#[test]
fn records_that_are_too_long_are_told_and_stop_only_the_run() {
    let overrides = ["sequence_len=57"];
    let planned = plan(&overrides);
    let data = &planned["data"];
    assert!(data["too_long"].as_u64().unwrap() > 0);
    assert!(data["error"].as_str().unwrap().contains("more than sequence_len 57"), "{data}");
    let (records, examples) = (data["records"].as_u64().unwrap(), data["train_examples"].as_u64().unwrap());
    assert_eq!(records - examples, data["too_long"].as_u64().unwrap());
    let binned: u64 = data["histogram"].as_array().unwrap().iter().map(|bin| bin[2].as_u64().unwrap()).sum();
    assert_eq!(binned, records);
    let cut = plan(&["sequence_len=57", "on_truncation=right"]);
    assert_eq!((&cut["data"]["error"], &cut["data"]["truncated"]), (&Value::Null, &data["too_long"]));
    // Cut on the right, an example loses its end-of-sequence token.
    assert_eq!(cut["data"]["without_eos"], data["too_long"]);
    let out = peft(&["plan", "recipes/quickstart.yaml", "--override", "sequence_len=57"]);
    assert!(out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("the run will stop"));
}

#[test]
fn calibration_measures_a_few_steps() {
    let data = format!("datasets=[{{path: {HELD_OUT}, type: prompt_completion}}]");
    let args =
        ["plan", "recipes/quickstart.yaml", "--json", "--calibrate", "--override", &data, "num_epochs=2"];
    let planned: Value = serde_json::from_str(&peft_ok(&args)).unwrap();
    let measured = &planned["calibration"];
    let of = |key: &str| measured[key].as_f64().unwrap();
    assert!(of("seconds_per_token") > 0.0 && of("seconds_per_update") > 0.0);
    let steps = of("seconds_per_token") * planned["course"]["padded_tokens"].as_f64().unwrap();
    assert!(planned["seconds"].as_f64().unwrap() > steps, "{planned}");
    assert!(plan(&[])["seconds"].is_null());
}
