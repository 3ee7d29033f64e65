//! Rotary frequencies at real sizes against transformers (`tests/golden/make_families.py`).

use peft_core::model::ModelConfig;
use peft_tests::golden;
use serde_json::{Value, json};
use std::path::Path;

#[test]
fn frequencies_and_factors_equal_transformers() {
    let cases: Value = serde_json::from_slice(&std::fs::read(golden("rope_init.json")).unwrap()).unwrap();
    let cases = cases.as_object().unwrap();
    assert!(cases.len() >= 10);
    for (name, case) in cases {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": case["head_dim"], "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8, "head_dim": case["head_dim"],
            "max_position_embeddings": case["max_position_embeddings"], "rope_parameters": case["rope_parameters"],
        });
        let config = ModelConfig::from_json(Path::new("."), &config).unwrap();
        let length = case["seq_len"].as_u64().unwrap_or(1) as usize;
        let (found, factor) = config.rope_scaling.frequencies(config.rope_theta, config.head_dim, length);
        let expected: Vec<f64> =
            case["inv_freq"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(found.len(), expected.len(), "{name}");
        for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
            assert!((f - e).abs() <= 2e-6 * e.abs(), "{name} frequency {i}: {f} for {e}");
        }
        let expected = case["attention_scaling"].as_f64().unwrap();
        assert!((factor - expected).abs() < 1e-6, "{name}: {factor} for {expected}");
    }
}
