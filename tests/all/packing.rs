//! Packed rows against the same examples one a row: loss, gradients, logits, and the program.

use crate::families::{open, relative_difference};
use crate::program::{HELD_OUT, SHORT, losses, metrics, train};
use peft_core::data::{Batch, Example, collate, collate_packs};
use peft_core::model::{Decoder, RopeScaling};
use peft_core::projection::{DropoutKey, Tape};
use peft_core::random::Stream;
use peft_core::train::{GradientCheckpointing, StepGradients, StepSettings, accumulate};
use peft_tests::{golden, peft_refuses};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

const MODES: [GradientCheckpointing; 3] =
    [GradientCheckpointing::Off, GradientCheckpointing::Selective, GradientCheckpointing::Layers];

fn example(length: usize, seed: u64) -> Example {
    let mut stream = Stream::new(seed, "test", "", &[]);
    let ids = (0..length).map(|_| stream.below(96) as u32).collect();
    // Also the first token after the border between two examples is supervised, and the first of all where it must not
    // count.
    Example { ids, supervised: (0..length).map(|at| at % 3 != 2).collect() }
}

/// Loss and gradients of all parameters, over batches that form one accumulation window.
fn step(
    model: &Decoder,
    batches: &[Batch],
    checkpointing: GradientCheckpointing,
) -> (f64, BTreeMap<String, Vec<f32>>) {
    let settings = StepSettings { gradient_checkpointing: checkpointing, loss_chunk_rows: Some(7) };
    let scale = 1.0 / batches.iter().map(|batch| batch.targets.len()).sum::<usize>() as f64;
    let mut sums = StepGradients::default();
    for batch in batches {
        let key = DropoutKey { seed: 0, step: 0, micro_batch: 0 };
        accumulate(model, batch, scale, key, settings, &mut sums);
    }
    let loss = sums.losses().0 * scale;
    let gradients = sums.gradients.into_iter().map(|(name, g)| (name, g.try_into_vec_as().unwrap()));
    (loss, gradients.collect())
}

/// Checkpoints with: nothing special, a bias, norms on the heads, a window shorter than the segments, layers without
/// rotation, and each rope scaling. The dynamic one, made for 32 positions, changes with the length of the longer examples.
const FAMILIES: [&str; 8] = [
    "llama_gqa_tied",
    "qwen2_window",
    "qwen3",
    "mistral_window",
    "smollm3",
    "llama_rope_dynamic",
    "llama_rope_yarn",
    "llama3",
];

#[test]
fn packed_loss_and_gradients_are_the_unpacked_ones() {
    let examples: Vec<Example> =
        [9, 40, 23, 2, 57, 12].into_iter().zip(1..).map(|(l, s)| example(l, s)).collect();
    let alone: Vec<Batch> = examples.iter().map(|example| collate(&[example], 0)).collect();
    let [a, b, c, d, e, f] = [0, 1, 2, 3, 4, 5].map(|i| &examples[i]);
    let packed = collate_packs(&[vec![b, a, d], vec![e], vec![c, f]], 0);
    for family in FAMILIES {
        let mut model = open(&golden("families").join(family));
        model.parameters_mut().into_iter().for_each(|parameter| parameter.set_trainable());
        if let RopeScaling::Dynamic { max_positions, .. } = model.config.rope_scaling {
            assert!(max_positions < 40, "the lengths should reach beyond {max_positions}");
        }
        let (loss, gradients) = step(&model, &alone, GradientCheckpointing::Off);
        for checkpointing in MODES {
            let (found, packed) = step(&model, std::slice::from_ref(&packed), checkpointing);
            let difference = (found / loss - 1.0).abs();
            assert!(difference < 1e-6, "{family}: loss {found} for {loss}");
            assert_eq!(packed.len(), gradients.len());
            let mut worst = 0f32;
            for (name, expected) in &gradients {
                let difference = relative_difference(&packed[name], expected);
                worst = worst.max(difference);
                assert!(difference < 5e-6, "{family} {name}: {difference:.1e}");
            }
            println!("{family:<20} loss {loss:.6}: difference {difference:.1e}, gradients {worst:.1e}");
        }
    }
}

/// Hidden states of a batch before the head, token by token.
fn hidden(model: &Decoder, batch: &Batch) -> Vec<f32> {
    let (tape, context) = (Tape::inference(), model.batch_context(batch));
    let embedded = model.embed(&tape, model.ids(&batch.ids));
    let layers = model.layers().iter();
    let x = layers.fold(embedded, |x, layer| layer.forward(&tape, x, &context, None));
    model.head(&tape, model.final_norm(&tape, x)).try_into_vec_as().unwrap()
}

#[test]
fn neighbours_are_not_seen() {
    let kept = example(30, 1);
    for family in FAMILIES {
        let model = open(&golden("families").join(family));
        let vocab = model.config.vocab_size;
        let logits = |before: usize, after: usize, other: usize, seed: u64| {
            let (before, after, other) =
                (example(before, seed), example(after, seed + 1), example(other, seed + 2));
            let batch = collate_packs(&[vec![&other], vec![&before, &kept, &after]], 0);
            let start = batch.seq_len + before.ids.len();
            hidden(&model, &batch)[start * vocab..(start + 30) * vocab].to_vec()
        };
        let reference = hidden(&model, &collate(&[&kept], 0));
        // Neighbours of the same lengths change no bit, others the order of summation at most.
        let first = logits(21, 5, 44, 10);
        assert_eq!(first, logits(21, 5, 44, 20), "{family}");
        for found in [first, logits(3, 17, 12, 10), logits(60, 2, 2, 30)] {
            let difference = relative_difference(&found, &reference);
            assert!(difference < 1e-6, "{family}: {difference:.1e}");
        }
    }
}

fn run_info(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("run.json")).unwrap()).unwrap()
}

const PACKED: [&str; 6] = [
    "sample_packing=true",
    "sequence_len=256",
    "micro_batch_size=4",
    "learning_rate=1e-3",
    "datasets.0.limit=45",
    "method.lora_dropout=0.1",
];

#[test]
fn a_packed_run_continues_as_if_never_stopped() {
    let dir = tempfile::tempdir().unwrap();
    // Two epochs of three steps; the stop is inside the second.
    let with = |extra: &[&'static str]| [&SHORT[..], &PACKED, extra].concat();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    train(&whole, &with(&[]), &[]);
    train(&parts, &with(&["max_steps=4"]), &["--resume", "auto"]);
    train(&parts, &with(&[]), &["--resume", "auto"]);
    let adapter = |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(&whole), adapter(&parts));
    assert_eq!(losses(&whole), losses(&parts));
    assert!(losses(&whole)[5] < losses(&whole)[0]);

    let info = run_info(&whole);
    let (packs, fill) = (&info["packing"]["packs"], info["packing"]["fill"].as_f64().unwrap());
    let tokens = info["data"]["report"]["tokens"].as_f64().unwrap();
    assert!((packs.as_f64().unwrap() * 256.0 * fill - tokens).abs() < 1e-6 && fill > 0.8, "{info}");
    let epochs: Vec<f64> = metrics(&whole).iter().filter_map(|line| line["epoch"].as_f64()).collect();
    assert!((epochs[2] - 1.0).abs() < 1e-12 && (epochs[5] - 2.0).abs() < 1e-12, "{epochs:?}");

    // A state of packed training is not one of unpacked training.
    let parts = parts.display().to_string();
    let resume =
        ["train", "recipes/quickstart.yaml", "--output-dir", &parts, "--resume", "auto", "--override"];
    let stderr = peft_refuses(&[&resume[..], &with(&["sample_packing=false"])].concat());
    assert!(stderr.contains("sample_packing was true, is false"), "{stderr}");
}

#[test]
fn epochs_of_packs_end_where_announced() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, extra: &[&str]| {
        let path = dir.path().join(name);
        let data = format!("datasets=[{{path: {HELD_OUT}, type: prompt_completion, limit: 60}}]");
        let fixed =
            ["eval_datasets=[]", "eval_on_start=false", "eval_generations=0", "num_epochs=3", data.as_str()];
        train(&path, &[&fixed, extra].concat(), &[]);
        path
    };
    // The alias, and several steps an epoch.
    let path = run("shuffled", &["packing=true", "sequence_len=128", "micro_batch_size=4"]);
    let lines = metrics(&path);
    let info = run_info(&path);
    assert_eq!(info["total_steps"], lines.len());
    assert_eq!(lines.last().unwrap()["epoch"], 3.0);
    let tokens = |lines: &[Value]| lines.iter().map(|line| line["tokens"].as_u64().unwrap()).sum::<u64>();
    assert_eq!(tokens(&lines), 3 * info["data"]["report"]["tokens"].as_u64().unwrap());

    // In file order, packed and not: the same examples in the first window, so the same loss before the first update.
    let packed =
        run("packs", &["sample_packing=true", "sequence_len=4096", "shuffle_data=false", "max_steps=1"]);
    let plain = run("rows", &["micro_batch_size=60", "shuffle_data=false", "max_steps=1"]);
    let (packed, plain) = (&metrics(&packed)[0], &metrics(&plain)[0]);
    assert_eq!(packed["tokens"], plain["tokens"]);
    for key in ["loss", "grad_norm"] {
        let (packed, plain) = (packed[key].as_f64().unwrap(), plain[key].as_f64().unwrap());
        println!("{key}: packed {packed}, unpacked {plain}");
        assert!((packed / plain - 1.0).abs() < 2e-6, "{key}: {packed} for {plain}");
    }
}

#[test]
fn packing_keeps_what_truncation_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let data = format!("datasets=[{{path: {HELD_OUT}, type: prompt_completion, limit: 40}}]");
    let fixed = ["eval_datasets=[]", "eval_on_start=false", "eval_generations=0", "num_epochs=1"];
    // Some of the examples are longer.
    let packed = ["sample_packing=true", "sequence_len=56", "micro_batch_size=64", data.as_str()];
    for policy in ["drop", "left", "right", "split"] {
        let policy = format!("on_truncation={policy}");
        let path = dir.path().join(&policy);
        train(&path, &[&fixed[..], &packed, &[policy.as_str()]].concat(), &[]);
        let (info, lines) = (run_info(&path), metrics(&path));
        let report = &info["data"]["report"];
        let changed = ["dropped", "truncated", "split"].map(|key| report[key].as_u64().unwrap());
        assert!(changed.iter().sum::<u64>() > 3, "{policy}: {report}");
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["tokens"], report["tokens"], "{policy}");
        assert_eq!(lines[0]["supervised_tokens"], report["supervised_tokens"], "{policy}");
    }
}
