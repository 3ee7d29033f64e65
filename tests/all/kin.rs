//! Thirty steps of the small methods beside LoRA against PEFT and PyTorch, from the methods' own first values on the same
//! batches (`tests/golden/make_kin.py`).

use crate::adapters::sorted;
use crate::families::{integers, open, relative_difference};
use crate::variants::{batches, steps};
use peft_core::adapter::{RewriteOptions, fold};
use peft_core::checkpoint::{Checkpoint, SafetensorsFile};
use peft_core::kernels::AdamW;
use peft_core::train::{GradientCheckpointing, Preparation, RunLength, StepSettings, Warmup};
use peft_methods::{MethodBlock, RunContext, open_adapter};
use peft_tests::golden;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn thirty_steps_equal_pefts() {
    let out = tempfile::tempdir().unwrap();
    let entries = std::fs::read_dir(golden("kin")).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() >= 8, "golden kin are missing");
    let batches = batches(&golden("kin/batches.safetensors"));
    for dir in folders {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let case = json(&dir.join("method.json"));
        let base = golden(case["base"].as_str().unwrap());
        let checkpoint = Checkpoint::open(&base).unwrap();
        let block = MethodBlock::parse(case["method"].as_object().unwrap().clone()).unwrap();
        let base_name = case["base"].as_str().unwrap();
        let run = RunContext { base: &checkpoint, base_name, revision: None, start: None };
        let mut method = block.block.method(&run).unwrap();
        let mut model = open(&base);
        let step = StepSettings { gradient_checkpointing: GradientCheckpointing::Off, loss_chunk_rows: None };
        let length = RunLength { learning_rate: 1e-3, warmup: Warmup::Steps(0), total_steps: 1, epochs: 1.0 };
        let preparation =
            Preparation { seed: 0, examples: &[], micro_batch_size: 2, step, length, resume: None };
        method.prepare(&mut model, &preparation).unwrap();
        let adamw = AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        let losses = steps(&mut model, method.as_mut(), adamw, &batches);

        let expected = SafetensorsFile::open(dir.join("expected.safetensors")).unwrap();
        let (ids, _) = integers(&expected, "input_ids");
        let logits = expected.tensor("logits").unwrap().to_f32().unwrap();
        let reference = expected.tensor("losses").unwrap().to_f32().unwrap();
        let relative = |(found, expected): (&f64, &f32)| (found / f64::from(*expected) - 1.0).abs();
        let loss = losses.iter().zip(&reference).map(relative).fold(0f64, f64::max);
        let logits_of = |model: &peft_core::model::Decoder| -> Vec<f32> {
            model.logits(&ids, 1).try_into_vec_as().unwrap()
        };
        let trained = logits_of(&model);
        let after = relative_difference(&trained, &logits);
        println!("{name:<16} loss {loss:.1e}  logits after {} steps {after:.1e}", losses.len());
        assert_eq!(losses.len(), 30);
        assert!(loss < 1e-4 && after < 1e-3, "{name}: loss {loss:.1e}, logits {after:.1e}");

        let own = out.path().join(&name);
        std::fs::create_dir_all(&own).unwrap();
        method.export(&model, &own).unwrap();
        let theirs = dir.join("trained");
        if !theirs.exists() {
            continue;
        }
        // The file has PEFT's keys, shapes and configuration, and what PEFT wrote means the same here.
        let (ours, peft) = (own.join("adapter_model.safetensors"), theirs.join("adapter_model.safetensors"));
        let (ours, peft) = (SafetensorsFile::open(ours).unwrap(), SafetensorsFile::open(peft).unwrap());
        assert_eq!(ours.names().collect::<Vec<_>>(), peft.names().collect::<Vec<_>>(), "{name}");
        for key in peft.names() {
            let (ours, peft) = (ours.tensor(key).unwrap(), peft.tensor(key).unwrap());
            assert_eq!((ours.shape, ours.dtype), (peft.shape, peft.dtype), "{name} {key}");
            let difference = relative_difference(&ours.to_f32().unwrap(), &peft.to_f32().unwrap());
            assert!(difference < 1e-3, "{name} {key}: {difference:.1e}");
        }
        if case["method"]["target_modules"] != "all-linear" {
            let config = |dir: &Path| sorted(&std::fs::read(dir.join("adapter_config.json")).unwrap());
            assert_eq!(config(&own), config(&theirs), "{name}");
        }
        let adapter = open_adapter(&theirs).unwrap();
        assert!(adapter.folder().warnings.is_empty(), "{name}: {:?}", adapter.folder().warnings);
        let mut attached = open(&base);
        adapter.attach(&mut attached).unwrap();
        let merged = out.path().join(format!("{name}-merged"));
        let options = RewriteOptions { dtype: None, max_shard_size: RewriteOptions::DEFAULT_SHARD };
        fold(&checkpoint, adapter.as_ref(), &merged, &options).unwrap();
        for model in [attached, open(&merged)] {
            let difference = relative_difference(&logits_of(&model), &logits);
            assert!(difference < 1e-5, "{name}: {difference:.1e}");
        }
    }
}
