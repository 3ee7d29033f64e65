#![allow(clippy::unwrap_used)]
use super::*;
use crate::model::ParameterShape;
use serde_json::json;
use std::path::Path;

/// Hidden 8, wide 16, 2 query heads and 1 key head of 4 features, 2 layers, 32 tokens, tied.
fn model() -> ModelConfig {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 32,
        "tie_word_embeddings": true
    });
    ModelConfig::from_json(Path::new("m"), &config).unwrap()
}

/// Rank 2 on every projection.
fn low_rank(model: &ModelConfig, dropout: bool) -> Vec<PlannedParameter> {
    let pair = |path: String, [rows, columns]: [usize; 2]| {
        [("lora_A", [2, columns]), ("lora_B", [rows, 2])].map(|(factor, dims)| PlannedParameter {
            shape: ParameterShape::new(format!("{path}.{factor}.weight"), dims),
            module: path.clone(),
            role: ParameterRole::Factor { rank: 2, dropout },
            trainable: true,
        })
    };
    model.projections().into_iter().flat_map(|shape| pair(shape.path, shape.dims)).collect()
}

fn work<'a>(model: &'a ModelConfig, parameters: &'a [PlannedParameter], batch: BatchShape) -> Workload<'a> {
    Workload {
        model,
        compute: ComputeType::F32,
        parameters,
        step: StepSettings { gradient_checkpointing: GradientCheckpointing::Off, loss_chunk_rows: None },
        accumulation: 1,
        batches: [batch].into(),
        evaluation: BTreeSet::new(),
        generated_tokens: 0,
        generated_rows: 0,
        moments: 2,
        runtime: 1000,
        host: true,
    }
}

const BATCH: BatchShape = BatchShape { rows: 3, time: 5, supervised: 6, pairs: 3 * 5 * 5 };

fn of(plan: &MemoryPlan, phase: Phase) -> Components {
    plan.phases.iter().find(|held| held.phase == phase).unwrap().components
}

#[test]
fn weights_and_states_by_hand() {
    let model = model();
    let parameters = low_rank(&model, false);
    let plan = predict(&work(&model, &parameters, BATCH));
    let update = of(&plan, Phase::Update);
    // A layer: q and o 8·8, k and v 4·8, gate, up and down 16·8, two norms. Then embedding and last norm.
    let base = 2 * (2 * 64 + 2 * 32 + 3 * 128 + 2 * 8) + 32 * 8 + 8;
    assert_eq!(update.base_weights, 4 * base);
    // Rank times in + out.
    let added = 2 * 2 * (16 + 12 + 12 + 16 + 3 * 24);
    assert_eq!((update.added_parameters, update.optimizer_state), (4 * added, 8 * added));
    // The largest factor is 2·16 or 16·2.
    assert_eq!((update.gradients, update.copies), (4 * added, 4 * 3 * 32));
    assert_eq!(update.runtime, 1000);
    // In bfloat16 the base is half as large and the rest is not.
    let half = predict(&Workload { compute: ComputeType::Bf16, ..work(&model, &parameters, BATCH) });
    let half = of(&half, Phase::Update);
    assert_eq!((half.base_weights, half.optimizer_state), (2 * base, 8 * added));
}

#[test]
fn a_layer_keeps_what_its_operations_need() {
    let model = model();
    let keeps = |parameters: &[PlannedParameter]| LayerShape::new(&model, 1, parameters, 4).keeps(&BATCH) / 4;
    let (tokens, scores) = (15, 15 * 2 * 5);
    // Frozen: input, q, k, v; gate, sigmoid, product, up and the second norm's input; three times the scores.
    let frozen = tokens * (8 + 8 + 4 + 4 + 8 + 4 * 16) + 3 * scores;
    assert_eq!(keeps(&[]), frozen);
    // Low rank everywhere: also both normed inputs, the inputs of o and down, and seven products with A.
    assert_eq!(keeps(&low_rank(&model, false)), frozen + tokens * (2 * 8 + 8 + 16 + 7 * 2));
    // Under dropout each module has a mask and a masked input of its own instead.
    let inputs = 6 * 8 + 16;
    assert_eq!(keeps(&low_rank(&model, true)), frozen + tokens * (2 * inputs + 7 * 2));
    // All weights: the inputs as with low rank, and the normed inputs of the norms' weights.
    let all: Vec<_> = model.parameters().into_iter().map(PlannedParameter::own).collect();
    assert_eq!(keeps(&all), frozen + tokens * (2 * 8 + 8 + 16 + 2 * 8));
}

#[test]
fn recomputing_keeps_one_layer_and_the_inputs() {
    let model = model();
    let parameters = low_rank(&model, false);
    let batch = BatchShape::padded(8, 64, 1);
    let layer = LayerShape::new(&model, 1, &parameters, 4);
    let mut work = work(&model, &parameters, batch);
    let whole = of(&predict(&work), Phase::Step);
    work.step.gradient_checkpointing = GradientCheckpointing::Layers;
    let recomputed = of(&predict(&work), Phase::Step);
    // Mask 64·64 and rotary table 64·4.
    let shared = 4 * (64 * 64 + 64 * 4);
    assert_eq!(whole.activations, 2 * layer.keeps(&batch) + layer.backward(&batch) + shared);
    let top = layer.keeps(&batch) + layer.input(&batch) + layer.backward(&batch) + shared;
    assert_eq!(recomputed.activations, top);
}

#[test]
fn the_head_holds_a_chunk_of_logits_twice() {
    let model = model();
    let parameters = low_rank(&model, false);
    let sizes = |chunk| {
        let mut work = work(&model, &parameters, BATCH);
        work.step.loss_chunk_rows = chunk;
        Sizes::of(&work).head(&work, &BATCH, true)
    };
    // Six supervised rows of 32 logits; hidden states of 15 tokens and four times of the rows.
    assert_eq!(sizes(None), 4 * (6 * 32 * 2 + (15 + 4 * 6) * 8));
    assert_eq!(sizes(None) - sizes(Some(2)), 4 * 4 * 32 * 2);
}

#[test]
fn keys_and_values_come_in_powers_of_two() {
    let model = model();
    let mut work = work(&model, &[], BATCH);
    (work.generated_tokens, work.generated_rows) = (65, 2);
    // In f32, for two rows: two layers and one being enlarged, keys and values, 128 places of one head of 4.
    assert_eq!(of(&predict(&work), Phase::Generation).key_value_cache, 4 * 2 * 3 * 2 * 128 * 4);
}

#[test]
fn accumulation_holds_the_gradients_of_the_step() {
    let model = model();
    let parameters = low_rank(&model, false);
    let mut work = work(&model, &parameters, BATCH);
    let once = of(&predict(&work), Phase::Step).gradients;
    work.accumulation = 2;
    let trained: u64 = parameters.iter().map(|parameter| parameter.shape.numel() * 4).sum();
    assert_eq!(of(&predict(&work), Phase::Step).gradients - once, trained);
}

#[test]
fn advice_is_the_mildest_change_that_fits() {
    let model = model();
    let parameters = low_rank(&model, false);
    let batch = BatchShape::padded(1 << 16, 64, 1);
    let work = work(&model, &parameters, batch);
    let batching = Batching {
        micro_batch_size: 1 << 16,
        gradient_accumulation_steps: 1,
        eval_batch_size: 8,
        sequence_len: 64,
    };
    let peak = predict(&work).peak_bytes;
    let advice = advise(&work, batching, peak - 1);
    assert_eq!(advice[0].changes, [("gradient_checkpointing", "true".to_string())]);
    let halved = ["micro_batch_size", "gradient_accumulation_steps"].into_iter().zip(["32768", "2"]);
    assert_eq!(advice[1].changes, halved.map(|(key, value)| (key, value.to_string())).collect::<Vec<_>>());
    assert!(advice.iter().all(|advice| advice.peak_bytes < peak));
    // What the process and the allocator hold is there whatever is changed.
    assert!(advise(&work, batching, 1000).is_empty());
    // Only together: recomputing and small batches.
    let little = advise(&work, batching, HOST_RETAINED + (1 << 20));
    assert_eq!(little.len(), 1);
    assert!(little[0].changes.len() > 1, "{little:?}");
}
