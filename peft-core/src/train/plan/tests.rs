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

/// A layer's shape and what it keeps of the batch, in bytes.
fn keeps(parameters: &[PlannedParameter], machine: Machine, checkpointing: GradientCheckpointing) -> u64 {
    LayerShape::new(&model(), 1, parameters, machine).keeps(&BATCH, checkpointing)
}

const CPU: Machine = Machine { host: true, compute: ComputeType::F32 };

#[test]
fn a_layer_keeps_what_its_operations_need() {
    use GradientCheckpointing::{Layers, Off, Selective};
    let model = model();
    let keeps = |parameters: &[PlannedParameter], mode| keeps(parameters, CPU, mode) / 4;
    let tokens = 15;
    // Frozen: input, norm, q with k and v, attention, two denominators; input, norm, gate with up, gated.
    let frozen = tokens * ((8 + 8 + 16 + 8 + 2) + (8 + 8 + 32 + 16));
    assert_eq!((keeps(&[], Off), keeps(&[], Layers)), (frozen, frozen));
    // Low rank everywhere: also seven products with A.
    let products = tokens * 7 * 2;
    assert_eq!(keeps(&low_rank(&model, false), Off), frozen + products);
    // Norms and gated are what can be computed again.
    let again = tokens * (8 + 8 + 16);
    assert_eq!(keeps(&low_rank(&model, false), Selective), frozen + products - again);
    // What is dropped is found again.
    for mode in [Off, Selective] {
        assert_eq!(keeps(&low_rank(&model, true), mode), keeps(&low_rank(&model, false), mode));
    }
    // All weights: nothing more than frozen ones.
    let all: Vec<_> = model.parameters().into_iter().map(PlannedParameter::own).collect();
    assert_eq!(keeps(&all, Off), frozen);
}

#[test]
fn where_no_kernels_serve_compositions_keep_more() {
    use GradientCheckpointing::{Off, Selective};
    let (tokens, scores) = (15, 15 * 2 * 5);
    // No kernels of bfloat16 on the CPU. Inputs in f32; q, k, v; gate, sigmoid, product, up; scores thrice, two in f32.
    let cpu = Machine { compute: ComputeType::Bf16, ..CPU };
    let frozen = tokens * (2 * 8 * 4 + (16 + 4 * 16) * 2) + scores * (4 + 4 + 2);
    assert_eq!((keeps(&[], cpu, Off), keeps(&[], cpu, Selective)), (frozen, frozen));
    // Low rank: norms, the inputs of o and down, seven products with A.
    let inputs = 2 * 8 + 8 + 16 + 7 * 2;
    assert_eq!(keeps(&low_rank(&model(), false), cpu, Off), frozen + tokens * inputs * 2);
    // Under dropout each module has a mask and a masked input of its own instead.
    let masked = 7 * 2 + 2 * (6 * 8 + 16);
    assert_eq!(keeps(&low_rank(&model(), true), cpu, Off), frozen + tokens * masked * 2);
    // Weights that train are f32 and cast: 2·64 + 2·32 + 3·128. Their norms' weights need the normed inputs once more.
    let all: Vec<_> = model().parameters().into_iter().map(PlannedParameter::own).collect();
    let trained = frozen + tokens * (2 * 8 + 8 + 16 + 2 * 8) * 2 + 576 * 2;
    assert_eq!(keeps(&all, cpu, Off), trained);
    // On a GPU heads of 4 features have no kernels for attention: the scores are there, all else is as on the CPU.
    let gpu = Machine { host: false, ..cpu };
    let composed = tokens * 2 * (8 + 8 + 16 + 8 + 8 + 8 + 32 + 16) + scores * (4 + 4 + 2);
    assert_eq!(keeps(&[], gpu, Off), composed);
}

#[test]
fn recomputing_keeps_less() {
    use GradientCheckpointing::{Layers, Off, Selective};
    let model = model();
    let parameters = low_rank(&model, false);
    let batch = BatchShape::padded(8, 64, 1);
    let tokens = 8 * 64;
    let activations = |mode| {
        let mut work = work(&model, &parameters, batch);
        work.step.gradient_checkpointing = mode;
        of(&predict(&work), Phase::Step).activations / 4
    };
    // Gate and up, laid out for a product forward and backward.
    let weights = 2 * 2 * 16 * 8;
    // Where a token's sequence begins and ends, and two angles.
    let shared = 1 + 1 + 4;
    // A layer with its products, as above.
    let layer = 42 + 64 + 14;
    // Gradients: four of the hidden state; of gated, gate and up; of q, k and v. Attention's heads of 4 in panels of 16:
    // two of queries, four times; one of keys and one of values, once each, and both packed.
    let backward = 4 * 8 + 3 * 16 + 16 + 4 * 2 * 16 + 2 * 16 + 2 * 4;
    assert_eq!(activations(Off), tokens * (2 * layer + backward + shared) + weights);
    // One layer and the other's input.
    assert_eq!(activations(Layers), tokens * (layer + 8 + backward + shared) + weights);
    // Both without norms and gated, of which one of each is made again.
    let selective = 2 * (layer - 32) + 8 + 16 + backward + shared;
    assert_eq!(activations(Selective), tokens * selective + weights);
}

#[test]
fn the_head_holds_a_tile_or_a_chunk_of_logits() {
    let model = model();
    let parameters = low_rank(&model, false);
    let head = |parameters: &[PlannedParameter], host, chunk| {
        let mut work = Workload { host, ..work(&model, parameters, BATCH) };
        work.step.loss_chunk_rows = chunk;
        Sizes::of(&work).head(&work, &BATCH, true) / 4
    };
    // Six supervised rows of 32 logits; hidden states of 15 tokens and five times of the rows.
    let states = (15 + 5 * 6) * 8;
    // On the CPU scores and weights of half the rows, and words packed in two ways, twice.
    assert_eq!(head(&parameters, true, None), 2 * 3 * 32 + 4 * 32 * 8 + states);
    assert_eq!(head(&parameters, true, Some(2)), head(&parameters, true, None));
    // On a GPU one buffer.
    assert_eq!(head(&parameters, false, None), 6 * 32 + states);
    assert_eq!(head(&parameters, false, Some(2)), 2 * 32 + states);
    // A head that trains has the logits and their gradient, and four times the rows.
    let all: Vec<_> = model.parameters().into_iter().map(PlannedParameter::own).collect();
    assert_eq!(head(&all, true, Some(2)), 2 * 32 * 2 + (15 + 4 * 6) * 8);
}

#[test]
fn the_fastest_that_leaves_a_tenth_is_taken() {
    use GradientCheckpointing::{Layers, Off, Selective};
    let model = model();
    let parameters = low_rank(&model, false);
    let work = work(&model, &parameters, BatchShape::padded(1 << 16, 64, 1));
    let peak = |mode| {
        let mut work = work.clone();
        work.step.gradient_checkpointing = mode;
        predict(&work).peak_bytes
    };
    assert!(peak(Off) > peak(Selective) && peak(Selective) > peak(Layers));
    // Limits of which nine tenths are just a peak.
    for mode in [Off, Selective, Layers] {
        assert_eq!(fastest_that_fits(&work, Some(peak(mode) * 10 / 9 + 10)), mode);
    }
    assert_ne!(fastest_that_fits(&work, Some(peak(Off))), Off);
    assert_eq!(fastest_that_fits(&work, Some(1)), Layers);
    assert_eq!(fastest_that_fits(&work, None), Layers);
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
    assert_eq!(advice[0].changes, [("gradient_checkpointing", "selective".to_string())]);
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
