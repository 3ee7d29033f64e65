//! What every method keeps to: one suite, and one [`Case`] a method.

use crate::families::{open, relative_difference};
use burn::tensor::{Tensor, TensorData};
use peft_core::adapter::{
    Adapter, AdapterError, Parts, RewriteOptions, SavedAdapter, fold, fold_into, keep_original, unfold_into,
    write_plain_lora,
};
use peft_core::checkpoint::{Checkpoint, Headers};
use peft_core::data::{Batch, Example, collate};
use peft_core::kernels::AdamW;
use peft_core::model::{Decoder, ModelConfig};
use peft_core::projection::{DropoutKey, Parameter};
use peft_core::random::Stream;
use peft_core::text::Tokenizer;
use peft_core::train::{
    EvalMetrics, Every, GradientCheckpointing, Identity, Method, Observer, Outcome, Preparation, RunLength,
    Schedule, StepGradients, StepMetrics, StepSettings, TrainConfig, Trainer, Warmup, accumulate,
};
use peft_methods::{METHODS, MethodBlock, RunContext, open_adapter};
use peft_tests::{golden, root};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// A method on one of the golden checkpoints, all of 2 layers with a vocabulary of 96 and 12 features within the
/// feed-forward. Hidden size, queries, keys: 24, 24, 24 in `llama`, 24, 24, 12 in `llama_bias`, 30, 36, 18 in
/// `llama_gqa_tied`.
struct Case {
    /// The recipe's block.
    block: &'static str,
    /// The folder in `tests/golden/families`.
    base: &'static str,
    /// Parameters that train, by the method's formula.
    trained: u64,
    /// Whether the prepared model is the base.
    starts_at_base: bool,
    /// Whether its files know which base they belong to.
    knows_base: bool,
    /// Whether its changes are products of two factors.
    is_low_rank: bool,
    /// Whether the size of its files depends on what is in them.
    compresses: bool,
    /// Blocks that are refused, with a part of what is said.
    refused: &'static [(&'static str, &'static str)],
}

const CASES: &[Case] = &[
    Case {
        block: r#"{"type": "lora", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}"#,
        base: "llama_bias",
        // r·(out + in) a module.
        trained: 2 * 3 * ((24 + 24) + (24 + 12)),
        starts_at_base: true,
        knows_base: false,
        is_low_rank: true,
        compresses: false,
        refused: &[
            (r#"{"type": "lora", "r": 0}"#, "r is 0"),
            (r#"{"type": "lora", "target_modules": ["q_porj"]}"#, "q_proj"),
            (r#"{"type": "lorra"}"#, "lora"),
            (r#"{"type": "lora", "rnk": 3}"#, "rnk"),
        ],
    },
    Case {
        block: r#"{"type": "lora", "r": 2, "use_dora": true, "target_modules": ["v_proj"]}"#,
        base: "llama",
        trained: 2 * (2 * (24 + 24) + 24),
        starts_at_base: true,
        knows_base: false,
        is_low_rank: false,
        compresses: false,
        refused: &[(r#"{"type": "lora", "use_dora": true, "lora_bias": true}"#, "exclude each other")],
    },
    Case {
        block: r#"{"type": "lora_xs", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}"#,
        base: "llama_bias",
        // r² a module.
        trained: 2 * 2 * 3 * 3,
        // All but: the first R is normal with deviation 1e-5.
        starts_at_base: false,
        knows_base: false,
        is_low_rank: true,
        compresses: false,
        refused: &[
            (r#"{"type": "lora_xs", "r": 0}"#, "r is 0"),
            (r#"{"type": "lora_xs", "r": 13, "target_modules": "all-linear"}"#, "too small for r: 13"),
            (r#"{"type": "lora_xs", "r": 4, "scale": 0}"#, "scale is 0"),
            (r#"{"type": "lora_xs", "r": 4, "scale": 1, "lora_alpha": 8}"#, "keep one"),
            (r#"{"type": "lora_xs", "r": 2, "target_modules": ["embed_tokens"]}"#, "embed_tokens"),
        ],
    },
    Case {
        block: r#"{"type": "lora_sb", "r": 3, "target_modules": "all-linear", "init_num_samples": 4}"#,
        base: "llama_gqa_tied",
        trained: 2 * 7 * 3 * 3,
        starts_at_base: false,
        knows_base: false,
        is_low_rank: true,
        compresses: false,
        refused: &[
            (r#"{"type": "lora_sb", "r": 8, "lora_alpha": 16}"#, "no scale to tune"),
            (r#"{"type": "lora_sb", "r": 19, "target_modules": ["k_proj"]}"#, "too small for r: 19"),
            (r#"{"type": "lora_sb", "eta": 0.0}"#, "eta is 0"),
            (r#"{"type": "lora_sb", "eta": 1e-4, "paper_compat": true}"#, "keep one"),
            (r#"{"type": "lora_sb", "init_num_samples": 0}"#, "init_num_samples is 0"),
            (r#"{"type": "lora_sb", "init_samples": 5}"#, "unknown key `init_samples`"),
        ],
    },
    Case {
        block: r#"{"type": "full"}"#,
        base: "llama_gqa_tied",
        // Embedding; a layer's norms, q, k and v, o, gate and up and down; the last norm.
        trained: 96 * 30 + 2 * (2 * 30 + 36 * 30 + 2 * 18 * 30 + 30 * 36 + 3 * 12 * 30) + 30,
        starts_at_base: true,
        knows_base: false,
        is_low_rank: false,
        compresses: false,
        refused: &[(r#"{"type": "full", "r": 3}"#, "no key `r`")],
    },
    Case {
        block: r#"{"type": "ia3"}"#,
        base: "llama_bias",
        // Features of k, of v and of what goes into down.
        trained: 2 * (12 + 12 + 12),
        starts_at_base: true,
        knows_base: false,
        is_low_rank: false,
        compresses: false,
        refused: &[
            (r#"{"type": "ia3", "target_modules": ["k_prj"]}"#, "k_proj"),
            (r#"{"type": "ia3", "target_modules": ["embed_tokens"]}"#, "embed_tokens"),
        ],
    },
    Case {
        block: r#"{"type": "vera", "r": 5, "target_modules": "all-linear"}"#,
        base: "llama_gqa_tied",
        // out + r a module: q, k and v, o, gate and up, down.
        trained: 2 * ((36 + 5) + 2 * (18 + 5) + (30 + 5) + 2 * (12 + 5) + (30 + 5)),
        starts_at_base: true,
        knows_base: false,
        is_low_rank: true,
        compresses: false,
        refused: &[
            (r#"{"type": "vera", "r": 0}"#, "r is 0"),
            (r#"{"type": "vera", "d_initial": 0.0}"#, "d_initial"),
            (r#"{"type": "vera", "vera_dropout": 1.0}"#, "vera_dropout"),
        ],
    },
    Case {
        block: r#"{"type": "sparse", "num_tunable_weights": 300, "target_modules": ["q_proj", "down_proj"],
                   "values_dtype": "float32"}"#,
        base: "llama_bias",
        // ⌊300·N/ΣN⌋ a module.
        trained: 2 * (300 * 24 * 24 / (2 * (24 * 24 + 24 * 12)) + 300 * 24 * 12 / (2 * (24 * 24 + 24 * 12))),
        starts_at_base: true,
        knows_base: true,
        is_low_rank: false,
        compresses: true,
        refused: &[
            (r#"{"type": "sparse", "density": 0.0}"#, "density is 0"),
            (r#"{"type": "sparse", "density": 1.0, "target_modules": ["q_proj"]}"#, "lower density"),
            (r#"{"type": "sparse", "num_tunable_weights": 3}"#, "no value"),
            (r#"{"type": "sparse", "selection_accumulation_steps": 20}"#, "reselection_steps"),
            (r#"{"type": "sparse", "target_modules": ["embed_tokens"]}"#, "embedding"),
        ],
    },
    Case {
        block: r#"{"type": "sparse", "criterion": "moment_approximation", "momentum": 0.5, "num_tunable_weights": 97,
                   "target_modules": ["v_proj"], "values_dtype": "float32"}"#,
        base: "llama_gqa_tied",
        trained: 2 * 48,
        starts_at_base: true,
        knows_base: true,
        is_low_rank: false,
        compresses: true,
        refused: &[(r#"{"type": "sparse", "target_modules": ["lm_head"]}"#, "tie_word_embeddings")],
    },
    Case {
        block: r#"{"type": "nola", "r": 4, "num_basis_a": 40, "num_basis_b": 24, "target_modules": ["q_proj", "down_proj"]}"#,
        base: "llama_bias",
        // k + l a module.
        trained: 2 * 2 * (40 + 24),
        starts_at_base: true,
        knows_base: false,
        is_low_rank: true,
        compresses: false,
        refused: &[
            (r#"{"type": "nola", "num_basis_a": 0}"#, "num_basis_a is 0"),
            (r#"{"type": "nola", "offset_a": "none"}"#, "no gradient"),
            (r#"{"type": "nola", "target_modules": ["embed_tokens"]}"#, "embed_tokens"),
            (r#"{"type": "nola", "seed_policy": "per_layer"}"#, "per_module"),
        ],
    },
    Case {
        block: r#"{"type": "nola", "r": 3, "num_basis_a": 30, "num_basis_b": 30, "seed_policy": "shared", "basis_scale": "none", "offset_a": "none", "alpha_init": "random", "target_modules": "all-linear"}"#,
        base: "llama_gqa_tied",
        trained: 2 * 7 * (30 + 30),
        starts_at_base: true,
        knows_base: false,
        is_low_rank: true,
        compresses: false,
        refused: &[(r#"{"type": "nola", "coefficient_bits": 16}"#, "none of 32, 8 and 4")],
    },
    Case {
        block: r#"{"type": "lamda", "r": 4, "lora_alpha": 6, "eta": 0.8, "target_modules": ["q_proj", "down_proj"]}"#,
        base: "llama_bias",
        // r² + out·r a module, before columns freeze.
        trained: 2 * 2 * (4 * 4 + 24 * 4),
        starts_at_base: true,
        knows_base: true,
        is_low_rank: true,
        compresses: false,
        refused: &[
            (r#"{"type": "lamda", "r": 13, "target_modules": ["down_proj"]}"#, "no rank of 13"),
            (r#"{"type": "lamda", "r": 4, "eta": 1.2}"#, "eta is 1.2"),
            (r#"{"type": "lamda", "r": 4, "rank_pattern": {"q": 2}}"#, "no target"),
            (r#"{"type": "lamda", "r": 0}"#, "r is 0"),
        ],
    },
    Case {
        block: r#"{"type": "lamda", "r": 3, "lora_alpha": 3, "eta": 0.0, "init": "svd_no_residual", "target_modules": "all-linear"}"#,
        base: "llama_gqa_tied",
        // r² a module.
        trained: 2 * 7 * 3 * 3,
        starts_at_base: true,
        knows_base: true,
        is_low_rank: true,
        compresses: false,
        refused: &[(r#"{"type": "lamda", "r": 3, "eta": 0.0, "compat_released": true}"#, "divides by eta")],
    },
    Case {
        block: r#"{"type": "norm_only"}"#,
        base: "llama",
        trained: (2 * 2 + 1) * 24,
        starts_at_base: true,
        knows_base: false,
        is_low_rank: false,
        compresses: false,
        refused: &[(r#"{"type": "norm_only", "target_modules": ["q_norm"]}"#, "input_layernorm")],
    },
    Case {
        block: r#"{"type": "bitfit"}"#,
        base: "llama_bias",
        // One for each result of q, k, v, o, gate, up, down.
        trained: 2 * (24 + 12 + 12 + 24 + 12 + 12 + 24),
        starts_at_base: true,
        knows_base: true,
        is_low_rank: false,
        compresses: false,
        refused: &[(r#"{"type": "bitfit", "r": 1}"#, "unknown key")],
    },
    Case {
        block: r#"{"type": "train_only", "parameters": ".*\\.0\\..*(v_proj|o_proj)\\.weight"}"#,
        base: "llama",
        trained: 24 * 24 + 24 * 24,
        starts_at_base: true,
        knows_base: true,
        is_low_rank: false,
        compresses: false,
        refused: &[
            (r#"{"type": "train_only"}"#, "parameters is missing"),
            (r#"{"type": "train_only", "parameters": "v_proj"}"#, "no whole name"),
            (r#"{"type": "train_only", "parameters": "("}"#, "regular expression"),
        ],
    },
];

const STEP: StepSettings =
    StepSettings { gradient_checkpointing: GradientCheckpointing::Off, loss_chunk_rows: None };

const LENGTH: RunLength =
    RunLength { learning_rate: 1e-3, warmup: Warmup::Steps(0), total_steps: 8, epochs: 1.0 };

impl Case {
    fn base_dir(&self) -> PathBuf {
        golden("families").join(self.base)
    }

    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(&self.base_dir()).unwrap()
    }

    fn parsed(&self) -> MethodBlock {
        parse(self.block).unwrap()
    }

    fn method(&self) -> Box<dyn Method> {
        let base = self.checkpoint();
        let run = RunContext { base: &base, base_name: self.base, revision: None, start: None };
        self.parsed().block.method(&run).unwrap()
    }

    /// The method with the model that it has prepared.
    fn prepared(&self) -> (Box<dyn Method>, Decoder) {
        let (mut method, mut model, examples) = (self.method(), open(&self.base_dir()), examples());
        let preparation = Preparation {
            seed: 7,
            examples: &examples,
            micro_batch_size: 2,
            step: STEP,
            length: LENGTH,
            resume: None,
        };
        method.prepare(&mut model, &preparation).unwrap();
        (method, model)
    }

    /// The same, with everything that trains moved by a tenth of a standard normal.
    fn moved(&self) -> (Box<dyn Method>, Decoder) {
        let (method, mut model) = self.prepared();
        for parameter in model.parameters_mut().into_iter().filter(|p| p.trainable) {
            let mut stream = Stream::new(5, "contract", &parameter.name, &[]);
            let moved = parameter.to_host().iter().map(|v| v + 0.1 * stream.normal() as f32).collect();
            set(parameter, moved);
        }
        model.refresh();
        (method, model)
    }

    /// The folder of the moved model's result, below `dir`.
    fn exported(&self, dir: &Path) -> (Decoder, PathBuf) {
        let (method, model) = self.moved();
        let out = dir.join("adapter");
        std::fs::create_dir_all(&out).unwrap();
        method.export(&model, &out).unwrap();
        (model, out)
    }

    fn has_adapter(&self) -> bool {
        self.parsed().kind.file.is_some()
    }
}

fn parse(block: &str) -> Result<MethodBlock, String> {
    MethodBlock::parse(serde_json::from_str(block).unwrap())
}

fn set(parameter: &mut Parameter, values: Vec<f32>) {
    let data = TensorData::new(values, parameter.value.dims());
    parameter.value = Tensor::from_data(data, &parameter.value.device());
}

fn examples() -> Vec<Example> {
    let example = |seed: u64, length: usize| {
        let mut stream = Stream::new(seed, "test", "", &[]);
        let ids = (0..length).map(|_| stream.below(96) as u32).collect();
        Example { ids, supervised: (0..length).map(|i| i > length / 3).collect() }
    };
    (0..6).map(|seed| example(seed, 9 + seed as usize)).collect()
}

fn batch() -> Batch {
    collate(&examples().iter().take(3).collect::<Vec<_>>(), 0)
}

fn gradients(model: &Decoder, batch: &Batch) -> BTreeMap<String, Vec<f32>> {
    let key = DropoutKey { seed: 0, step: 0, micro_batch: 0 };
    let mut step = StepGradients::default();
    accumulate(model, batch, 1.0 / batch.targets.len() as f64, key, STEP, &mut step);
    model.pull_back(&mut step.gradients);
    step.gradients.into_iter().map(|(name, gradient)| (name, gradient.try_into_vec_as().unwrap())).collect()
}

fn logits(model: &Decoder) -> Vec<f32> {
    let ids: Vec<i64> = examples()[5].ids.iter().map(|id| i64::from(*id)).collect();
    model.logits(&ids, 1).try_into_vec_as().unwrap()
}

fn options() -> RewriteOptions {
    RewriteOptions { dtype: None, max_shard_size: RewriteOptions::DEFAULT_SHARD }
}

#[test]
fn every_method_has_a_case() {
    let cases: BTreeSet<&str> = CASES.iter().map(|case| case.parsed().kind.name).collect();
    let methods: BTreeSet<&str> = METHODS.iter().map(|kind| kind.name).collect();
    assert_eq!(cases, methods);
}

#[test]
fn blocks_come_back_as_they_went() {
    for case in CASES {
        let block = case.parsed();
        block.block.check(false).unwrap();
        let kept = serde_json::to_value(&block).unwrap();
        let again = MethodBlock::parse(kept.as_object().unwrap().clone()).unwrap();
        assert_eq!(serde_json::to_value(&again).unwrap(), kept, "{}", case.block);
        assert_eq!(kept["type"], block.kind.name);
        assert_eq!(case.method().name(), block.kind.name);
    }
}

#[test]
fn what_is_degenerate_is_refused() {
    for case in CASES {
        for (block, says) in case.refused {
            let base = Headers::of(&case.checkpoint()).unwrap();
            let model = ModelConfig::from_json(base.dir(), base.config()).unwrap();
            let error = parse(block)
                .and_then(|parsed| parsed.block.check(false).map(|()| parsed))
                .and_then(|parsed| parsed.block.plan(&model, &base).map_err(|error| error.to_string()))
                .err()
                .unwrap_or_else(|| panic!("{block} is taken"));
            assert!(error.contains(says), "{block}: {error}");
        }
    }
}

#[test]
fn training_starts_at_the_base() {
    for case in CASES.iter().filter(|case| case.starts_at_base) {
        let difference = relative_difference(&logits(&case.prepared().1), &logits(&open(&case.base_dir())));
        assert!(difference < 1e-5, "{}: {difference:.1e}", case.block);
    }
}

#[test]
fn plans_are_what_happens() {
    let dir = tempfile::tempdir().unwrap();
    for case in CASES {
        let base = Headers::of(&case.checkpoint()).unwrap();
        let config = ModelConfig::from_json(base.dir(), base.config()).unwrap();
        let plan = case.parsed().block.plan(&config, &base).unwrap();
        let (method, model) = case.prepared();
        let trains = |p: &&Parameter| p.trainable;
        let found: BTreeMap<String, u64> = model
            .parameters()
            .into_iter()
            .filter(trains)
            .map(|p| (p.name.clone(), p.numel() as u64))
            .collect();
        let planned = plan.parameters.iter().filter(|p| p.trainable);
        let planned: BTreeMap<String, u64> =
            planned.map(|p| (p.shape.name.clone(), p.shape.numel())).collect();
        assert_eq!(found, planned, "{}", case.block);
        assert_eq!(found.values().sum::<u64>(), case.trained, "{}", case.block);

        let out = dir.path().join(case.parsed().kind.name);
        std::fs::create_dir_all(&out).unwrap();
        method.export(&model, &out).unwrap();
        let files = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path());
        let weights = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
        let bytes: u64 = weights.map(|path| path.metadata().unwrap().len()).sum();
        match case.compresses {
            true => assert!(bytes.abs_diff(plan.artifact_bytes) < bytes / 20, "{}: {bytes}", case.block),
            false => assert_eq!(bytes, plan.artifact_bytes, "{}", case.block),
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
}

/// The derivative of the loss along a direction of the trained values, by the forward of the change, and by its dense
/// value: `⟨∂ℓ/∂W, ∂(W + ΔW)⟩ + ⟨∂ℓ/∂b, ∂b⟩` with gradients of the folded model's weights.
#[test]
fn gradients_are_those_of_the_dense_change() {
    // DoRA counts its lengths as constants in the backward, which the dense value does not.
    let is_exact = |case: &&Case| case.has_adapter() && !case.block.contains("use_dora");
    for case in CASES.iter().filter(is_exact) {
        let (_, model) = case.moved();
        if model.projections().all(|projection| projection.delta.is_none()) {
            continue;
        }
        let batch = batch();
        let own = gradients(&model, &batch);
        let direction: BTreeMap<String, Vec<f32>> = own
            .iter()
            .map(|(name, gradient)| {
                let mut stream = Stream::new(9, "direction", name, &[]);
                (name.clone(), gradient.iter().map(|_| stream.normal() as f32).collect())
            })
            .collect();
        let pairs = own.iter().flat_map(|(name, gradient)| gradient.iter().zip(&direction[name]));
        let found: f64 = pairs.map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();

        // The folded model, whose weights train.
        let mut dense = model.clone();
        for projection in dense.projections_mut() {
            if let Some(delta) = projection.delta.take() {
                let change = delta.dense(&projection.weight.value);
                projection.weight.value = projection.weight.value.clone() + change;
                projection.weight.set_trainable();
                if let Some(bias) = &mut projection.bias {
                    if let Some(change) = delta.bias_change(Some(&bias.value)) {
                        bias.value = bias.value.clone() + change;
                    }
                    bias.set_trainable();
                }
            }
        }
        let of_weights = gradients(&dense, &batch);
        let at = |by: f32| -> f64 {
            let mut shifted = model.clone();
            for parameter in shifted.parameters_mut().into_iter().filter(|p| p.trainable) {
                let pairs = parameter.to_host().into_iter().zip(&direction[&parameter.name]);
                let values = pairs.map(|(value, d)| value + by * d).collect();
                set(parameter, values);
            }
            shifted.refresh();
            let mut sum = 0.0;
            let mut add = |name: String, change: Tensor<2>| {
                let change: Vec<f32> = change.try_into_vec_as().unwrap();
                let pairs = change.iter().zip(&of_weights[&name]);
                sum += pairs.map(|(c, g)| f64::from(*c) * f64::from(*g)).sum::<f64>();
            };
            for projection in shifted.projections() {
                let Some(delta) = &projection.delta else { continue };
                add(format!("{}.weight", projection.path), delta.dense(&projection.weight.value));
                let bias = projection.bias.as_ref();
                if let Some(change) = bias.and_then(|bias| delta.bias_change(Some(&bias.value))) {
                    add(format!("{}.bias", projection.path), change);
                }
            }
            sum
        };
        let step = 1e-2;
        let expected = (at(step) - at(-step)) / (2.0 * f64::from(step));
        let tolerance = 2e-3 * expected.abs().max(found.abs()) + 1e-5;
        assert!((found - expected).abs() < tolerance, "{}: {found} for {expected}", case.block);
    }
}

#[test]
fn what_is_saved_attaches_folds_and_unfolds() {
    for case in CASES.iter().filter(|case| case.has_adapter()) {
        let dir = tempfile::tempdir().unwrap();
        let (model, saved) = case.exported(dir.path());
        let (base, trained) = (case.checkpoint(), logits(&model));
        let moved = relative_difference(&trained, &logits(&open(&case.base_dir())));
        assert!(moved > 1e-3, "{}: the change does nothing", case.block);
        let adapter = open_adapter(&saved).unwrap();
        assert!(adapter.folder().warnings.is_empty(), "{:?}", adapter.folder().warnings);
        adapter.require_base(&base).unwrap();
        let mut attached = open(&case.base_dir());
        adapter.attach(&mut attached).unwrap();
        assert!(attached.parameters().iter().all(|p| !p.trainable), "{}", case.block);
        assert_eq!(logits(&attached), trained, "{}: attached", case.block);

        let merged = dir.path().join("merged");
        fold(&base, adapter.as_ref(), &merged, &options()).unwrap();
        let difference = relative_difference(&logits(&open(&merged)), &trained);
        assert!(difference < 1e-5, "{}: folded {difference:.1e}", case.block);

        // The change as parts gives the dense value that was folded.
        if let Ok(Parts { changes, .. }) = adapter.parts(&open(&case.base_dir()).base_shapes(), &model.device)
        {
            for (path, delta) in changes {
                let Some((b, a)) = delta.factors() else { continue };
                let weight = open(&case.base_dir());
                let weight = weight.projections().find(|p| p.path == path).unwrap().weight.value.clone();
                let (product, dense) = (b.matmul(a), delta.dense(&weight));
                let [product, dense]: [Vec<f32>; 2] = [product, dense].map(|t| t.try_into_vec_as().unwrap());
                assert!(relative_difference(&product, &dense) < 1e-5, "{}: {path}", case.block);
            }
        }

        let folded = Checkpoint::open(&merged).unwrap();
        for (name, given) in [("with base", Some(&base)), ("alone", None)] {
            let back = dir.path().join(name);
            std::fs::create_dir_all(&back).unwrap();
            let result = unfold_into(&folded, adapter.as_ref(), given, &back, RewriteOptions::DEFAULT_SHARD);
            match (result, given) {
                (Ok(report), _) => {
                    assert!(report.changed > 0 && (given.is_none() || report.is_exact()), "{}", case.block);
                    let difference =
                        relative_difference(&logits(&open(&back)), &logits(&open(&case.base_dir())));
                    assert!(difference < 1e-4, "{}: {name} {difference:.1e}", case.block);
                }
                // What was replaced or rescaled is nowhere but in the base.
                (Err(AdapterError::Unrestorable { .. }), None) => {}
                (Err(error), _) => panic!("{}: {name}: {error}", case.block),
            }
        }
        let kept = dir.path().join("kept");
        std::fs::create_dir_all(&kept).unwrap();
        fold_into(&base, adapter.as_ref(), &kept, &options()).unwrap();
        keep_original(&base, &Checkpoint::open(&kept).unwrap()).unwrap();
        let (kept, back) = (Checkpoint::open(&kept).unwrap(), dir.path().join("from kept"));
        std::fs::create_dir_all(&back).unwrap();
        unfold_into(&kept, adapter.as_ref(), None, &back, RewriteOptions::DEFAULT_SHARD).unwrap();
        assert_eq!(logits(&open(&back)), logits(&open(&case.base_dir())), "{}: from kept", case.block);
    }
}

#[test]
fn a_product_of_factors_is_a_plain_lora() {
    for case in CASES.iter().filter(|case| case.has_adapter()) {
        let dir = tempfile::tempdir().unwrap();
        let (model, saved) = case.exported(dir.path());
        let (adapter, shapes) = (open_adapter(&saved).unwrap(), open(&case.base_dir()).base_shapes());
        for balanced in [false, true] {
            let out = dir.path().join(format!("lora-{balanced}"));
            std::fs::create_dir(&out).unwrap();
            let written =
                write_plain_lora(adapter.as_ref(), &shapes, (Some(case.base), None), balanced, &out);
            assert_eq!(written.is_ok(), case.is_low_rank, "{}: {written:?}", case.block);
            let Ok(written) = written else { continue };
            let lora = Adapter::open(&out).unwrap();
            let modules: usize = written.ranks.values().sum();
            let changes = adapter.parts(&shapes, &model.device).unwrap().changes;
            assert_eq!(modules, changes.len(), "{}", case.block);
            let mut attached = open(&case.base_dir());
            lora.attach(&mut attached).unwrap();
            // Balanced factors are others, and round otherwise.
            let difference = relative_difference(&logits(&attached), &logits(&model));
            assert!(difference < 3e-5, "{}: {difference:.1e}", case.block);
        }
    }
}

#[test]
fn a_damaged_file_is_refused_by_name() {
    for case in CASES.iter().filter(|case| case.has_adapter()) {
        let dir = tempfile::tempdir().unwrap();
        let (_, saved) = case.exported(dir.path());
        let fits = |adapter: &dyn SavedAdapter, model: &Decoder| adapter.attach(&mut model.clone());
        let base = open(&case.base_dir());
        fits(open_adapter(&saved).unwrap().as_ref(), &base).unwrap();
        // Another model has other modules or shapes.
        let other = root().join(crate::program::BASE);
        let error = fits(open_adapter(&saved).unwrap().as_ref(), &open(&other)).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains("adapter_model"), "{error}");

        let file = saved.join("adapter_model.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        let mut broken = bytes.clone();
        let end = broken.len();
        broken[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&file, &broken).unwrap();
        let error = fits(open_adapter(&saved).unwrap().as_ref(), &base).unwrap_err();
        let is_told = match case.compresses {
            true => error.is_bad_input() && error.to_string().contains("adapter_model"),
            false => matches!(error, AdapterError::NonFinite { .. }),
        };
        assert!(is_told, "{}: {error}", case.block);
        std::fs::write(&file, &bytes[..end - 4]).unwrap();
        assert!(open_adapter(&saved).is_err(), "{}: a cut file is taken", case.block);
        std::fs::remove_file(&file).unwrap();
        assert!(open_adapter(&saved).is_err(), "{}: no weights are taken", case.block);
    }
}

/// Whatever a stranger's configuration says, it is understood or refused as bad input.
#[test]
fn a_configuration_may_say_anything() {
    let strange = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(65_536),
        json!(1_u64 << 62),
        json!(1e300),
        json!(""),
        json!("(("),
        json!("q_proj"),
        json!([]),
        json!(["q_proj", "nothing"]),
        json!({"a": 1}),
    ];
    for case in CASES.iter().filter(|case| case.has_adapter()) {
        let dir = tempfile::tempdir().unwrap();
        let (_, saved) = case.exported(dir.path());
        let path = saved.join("adapter_config.json");
        let written: Map<String, Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let (base, checkpoint) = (open(&case.base_dir()), case.checkpoint());
        let mut refused = 0;
        for (key, value) in written.keys().flat_map(|key| strange.iter().map(move |value| (key, value))) {
            let mut config = written.clone();
            config.insert(key.clone(), value.clone());
            std::fs::write(&path, Value::Object(config).to_string()).unwrap();
            let used = open_adapter(&saved).and_then(|adapter| {
                adapter.require_base(&checkpoint)?;
                adapter.attach(&mut base.clone())
            });
            if let Err(error) = used {
                refused += 1;
                assert!(error.is_bad_input(), "{}: {key}: {value}: {error}", case.block);
            }
        }
        assert!(refused > 0, "{}", case.block);
    }
}

#[test]
fn a_value_that_is_not_finite_is_not_written() {
    for case in CASES {
        let dir = tempfile::tempdir().unwrap();
        let (method, mut model) = case.prepared();
        let mut trained = model.parameters_mut().into_iter().filter(|p| p.trainable);
        let parameter = trained.next().unwrap();
        let mut values = parameter.to_host();
        values[0] = f32::INFINITY;
        set(parameter, values);
        assert!(method.export(&model, dir.path()).is_err(), "{}", case.block);
        let written: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        let is_weights = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors");
        assert!(!written.iter().any(is_weights), "{}: {written:?}", case.block);
    }
}

#[test]
fn another_base_is_refused_where_the_file_knows_its_own() {
    for case in CASES.iter().filter(|case| case.has_adapter()) {
        let dir = tempfile::tempdir().unwrap();
        let (_, saved) = case.exported(dir.path());
        // The same base but for the first byte of every tensor.
        let other = dir.path().join("other");
        std::fs::create_dir(&other).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(case.base_dir().join(name), other.join(name)).unwrap();
        }
        let path = other.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        bytes[header..].chunks_exact_mut(4).for_each(|value| value[0] ^= 1);
        std::fs::write(&path, bytes).unwrap();
        let other = Checkpoint::open(&other).unwrap();
        let adapter = open_adapter(&saved).unwrap();
        match (adapter.require_base(&other), case.knows_base) {
            (Err(AdapterError::WrongBase { .. }), true) | (Ok(()), false) => {}
            (result, _) => panic!("{}: {result:?}", case.block),
        }
        let folded = fold(&other, adapter.as_ref(), &dir.path().join("folded"), &options());
        assert_eq!(folded.is_err(), case.knows_base, "{}", case.block);
        assert_eq!(dir.path().join("folded").exists(), !case.knows_base, "{}", case.block);
    }
}

/// Watches nothing.
struct Silent;

impl Observer for Silent {
    fn started(&mut self, _done: u64, _total: u64) {}
    fn step(&mut self, _metrics: &StepMetrics) {}
    fn evaluated(&mut self, _metrics: &EvalMetrics) {}
    fn saved(&mut self, _path: &Path) {}
    fn warning(&mut self, message: &str) {
        panic!("{message}");
    }
}

/// Trains for eight steps with a checkpoint after every second, from `resume` if given; returns the result's files.
pub fn train(
    method: &mut dyn Method,
    mut model: Decoder,
    output_dir: &Path,
    resume: Option<&Path>,
) -> BTreeMap<String, Vec<u8>> {
    let examples = examples();
    let preparation =
        Preparation { seed: 7, examples: &examples, micro_batch_size: 2, step: STEP, length: LENGTH, resume };
    method.prepare(&mut model, &preparation).unwrap();
    let artifact = output_dir.join(method.artifact());
    let adamw = AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
    let optimizer = method.optimizer(&adamw);
    let tokenizer = Tokenizer::from_dir(root().join(crate::program::BASE)).unwrap();
    std::fs::create_dir_all(output_dir).unwrap();
    let trainer = Trainer {
        model: &mut model,
        method,
        optimizer,
        tokenizer: &tokenizer,
        train: &examples,
        validation: &[],
        config: TrainConfig {
            output_dir: output_dir.to_path_buf(),
            seed: 7,
            micro_batch_size: 2,
            gradient_accumulation_steps: 2,
            num_epochs: 1.0,
            max_steps: Some(8),
            learning_rate: 2e-2,
            schedule: Schedule::Linear,
            warmup: Warmup::Steps(2),
            max_grad_norm: Some(1.0),
            step: STEP,
            shuffle_data: true,
            pack_tokens: None,
            eval_every: None,
            eval_on_start: false,
            eval_batch_size: 2,
            eval_generations: 0,
            save_every: Some(Every::Steps(2)),
            save_total_limit: None,
            selection: None,
            logging_steps: 1,
            identity: Identity::default(),
        },
        stop: &AtomicBool::new(false),
    };
    assert!(matches!(trainer.run(resume, &mut Silent).unwrap(), Outcome::Finished(_)));
    let files = std::fs::read_dir(&artifact).unwrap().map(|entry| entry.unwrap().path());
    let file = |path: PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, std::fs::read(&path).unwrap())
    };
    files.map(file).collect()
}

#[test]
fn a_run_goes_on_from_any_checkpoint_to_the_same_bytes() {
    for case in CASES {
        let dir = tempfile::tempdir().unwrap();
        let run = |name: String, resume: Option<&Path>| {
            train(case.method().as_mut(), open(&case.base_dir()), &dir.path().join(name), resume)
        };
        let expected = run("whole".to_string(), None);
        for step in [2, 4, 6] {
            let checkpoint = dir.path().join(format!("whole/checkpoints/step-{step:08}"));
            let again = run(format!("from {step}"), Some(&checkpoint));
            assert!(again == expected, "{}: from step {step}", case.block);
        }
    }
}
