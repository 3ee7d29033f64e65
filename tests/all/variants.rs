//! Twenty steps of every kind of LoRA against PEFT from the same factors on the same batches
//! (`tests/golden/make_variants.py`).

use crate::families::{integers, open, relative_difference};
use peft_core::adapter::{Adapter, RewriteOptions, SavedAdapter, fold};
use peft_core::checkpoint::{Checkpoint, SafetensorsFile};
use peft_core::data::{Example, collate};
use peft_core::kernels::AdamW;
use peft_core::model::Decoder;
use peft_core::projection::DropoutKey;
use peft_core::train::{
    GradientCheckpointing, ManyOptimizer, Method, NamedOptimizer, Preparation, Progress, RunLength,
    StepGradients, StepSettings, Warmup, accumulate, update_parameters,
};
use peft_methods::Lora;
use peft_tests::golden;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const RATE: f64 = 1e-2;
const STEP: StepSettings =
    StepSettings { gradient_checkpointing: GradientCheckpointing::Off, loss_chunk_rows: None };

/// The batches in the file, one a step.
pub fn batches(path: &Path) -> Vec<Vec<Example>> {
    let file = SafetensorsFile::open(path).unwrap();
    let (ids, shape) = integers(&file, "input_ids");
    let example = |ids: &[i64]| Example {
        ids: ids.iter().map(|id| *id as u32).collect(),
        supervised: (0..ids.len()).map(|i| i > 0).collect(),
    };
    let rows: Vec<Example> = ids.chunks(shape[2]).map(example).collect();
    rows.chunks(shape[1]).map(<[Example]>::to_vec).collect()
}

/// Trains the variant in `dir`; returns its base, the method, the model and the losses.
fn train(dir: &Path) -> (PathBuf, Lora, Decoder, Vec<f64>) {
    let text = std::fs::read_to_string(dir.join("method.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let base = golden(json["base"].as_str().unwrap());
    let block: peft_methods::LoraBlock = serde_json::from_value(json["method"].clone()).unwrap();
    let epsilon = if json["method"]["lora_fa"].is_boolean() { 1e-12 } else { 1e-8 };
    let mut method = Lora::new(block, "base", None, Some(dir.join("initial"))).unwrap();
    let mut model = open(&base);
    let length = RunLength { learning_rate: 1e-3, warmup: Warmup::Steps(0), total_steps: 1, epochs: 1.0 };
    let preparation =
        Preparation { seed: 0, examples: &[], micro_batch_size: 2, step: STEP, length, resume: None };
    method.prepare(&mut model, &preparation).unwrap();
    let adamw = AdamW { beta_1: 0.9, beta_2: 0.999, epsilon, weight_decay: 0.0 };
    let losses = steps(&mut model, &mut method, adamw, &batches(&golden("variants/batches.safetensors")));
    (base, method, model, losses)
}

/// A step a batch; returns the losses before each.
pub fn steps(
    model: &mut Decoder,
    method: &mut dyn Method,
    optimizer: impl ManyOptimizer + 'static,
    batches: &[Vec<Example>],
) -> Vec<f64> {
    let mut optimizer = NamedOptimizer::new(optimizer);
    let mut losses = Vec::new();
    for (step, examples) in batches.iter().enumerate() {
        let batch = collate(&examples.iter().collect::<Vec<_>>(), 0);
        let scale = 1.0 / batch.targets.len() as f64;
        let key = DropoutKey { seed: 0, step: step as u64, micro_batch: 0 };
        let mut sums = StepGradients::default();
        accumulate(model, &batch, scale, key, STEP, &mut sums);
        losses.push(sums.losses().0 * scale);
        let mut gradients: BTreeMap<_, _> = sums.gradients;
        let progress = Progress { step: step as u64, total_steps: batches.len() as u64 };
        if method.acts_on_gradients() {
            method.before_update(model, &mut gradients, progress);
        }
        update_parameters(model, &mut optimizer, gradients, None, |name| method.peak_rate(name, RATE));
    }
    losses
}

#[test]
fn twenty_steps_of_every_kind_equal_pefts() {
    let out = tempfile::tempdir().unwrap();
    let mut folders: Vec<PathBuf> = std::fs::read_dir(golden("variants"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    assert!(folders.len() >= 20, "golden variants are missing");
    for dir in folders {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let expected = SafetensorsFile::open(dir.join("expected.safetensors")).unwrap();
        let (ids, _) = integers(&expected, "input_ids");
        let logits = expected.tensor("logits").unwrap().to_f32().unwrap();
        let (base, method, model, losses) = train(&dir);

        let reference = expected.tensor("losses").unwrap().to_f32().unwrap();
        let loss = losses.iter().zip(&reference).fold(0f64, |max, (a, b)| max.max((a - f64::from(*b)).abs()));
        let trained: Vec<f32> = model.logits(&ids, 1).try_into_vec_as().unwrap();
        let after = relative_difference(&trained, &logits);

        // What is exported attaches to the original base and folds into it with the same logits.
        let adapter_dir = out.path().join(&name);
        std::fs::create_dir_all(&adapter_dir).unwrap();
        method.export(&model, &adapter_dir).unwrap();
        let adapter = Adapter::open(&adapter_dir).unwrap();
        let mut attached = open(&base);
        adapter.attach(&mut attached).unwrap();
        let attached: Vec<f32> = attached.logits(&ids, 1).try_into_vec_as().unwrap();
        let attached = relative_difference(&attached, &trained);
        let merged = out.path().join(format!("{name}-merged"));
        let options = RewriteOptions { dtype: None, max_shard_size: RewriteOptions::DEFAULT_SHARD };
        fold(&Checkpoint::open(&base).unwrap(), &adapter, &merged, &options).unwrap();
        let folded: Vec<f32> = open(&merged).logits(&ids, 1).try_into_vec_as().unwrap();
        let folded = relative_difference(&folded, &trained);

        println!(
            "{name:<22} loss {loss:.1e}  logits after 20 steps {after:.1e}  attached {attached:.1e}  folded {folded:.1e}"
        );
        assert!(loss < 1e-4 && after < 1e-3, "{name}: loss {loss:.1e}, logits {after:.1e}");
        assert!(attached < 1e-6 && folded < 1e-5, "{name}: attached {attached:.1e}, folded {folded:.1e}");
    }
}
