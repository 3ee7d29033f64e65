//! `config.json`: the shape of a model and its rotary frequencies.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peft_core::model::ModelConfig;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let Ok(json) = serde_json::from_slice(bytes) else { return };
    let config = match ModelConfig::from_json(Path::new("model"), &json) {
        Ok(config) => config,
        Err(error) => return assert!(error.is_bad_input(), "{error}"),
    };
    assert_eq!(config.windows.len(), config.num_hidden_layers);
    assert_eq!(config.rotary.len(), config.num_hidden_layers);
    assert!(config.num_attention_heads.is_multiple_of(config.num_key_value_heads));
    for length in [1, 4096, config.max_position_embeddings] {
        let (frequencies, scale) =
            config.rope_scaling.frequencies(config.rope_theta, config.head_dim, length);
        assert_eq!(frequencies.len(), config.head_dim / 2);
        assert!((scale as f32).is_finite(), "{:?}", config.rope_scaling);
        assert!(frequencies.iter().all(|f| (*f as f32).is_finite()), "{:?}", config.rope_scaling);
    }
});
