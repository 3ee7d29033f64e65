//! An adapter's folder, matched with a small model's shapes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peft_core::adapter::{Adapter, AdapterConfig};
use peft_core::model::BaseShapes;
use std::collections::BTreeSet;
use std::sync::OnceLock;

fuzz_target!(|input: &[u8]| {
    let [config, weights] = peft_fuzz::parts(input);
    peft_fuzz::file("adapter_config.json", config);
    peft_fuzz::file("adapter_model.safetensors", weights);
    let dir = peft_fuzz::scratch();
    let read = match AdapterConfig::read(dir) {
        Ok((config, _)) => config,
        Err(error) => return assert!(error.is_bad_input(), "{error}"),
    };

    // What is written again means the same.
    let copy = dir.join("copy");
    std::fs::create_dir_all(&copy).expect("a folder");
    read.write(&copy).expect("room for a file");
    let (again, _) = AdapterConfig::read(&copy).expect("what was written is read");
    assert_eq!(read.to_json(), again.to_json());

    let adapter = match Adapter::open(dir) {
        Ok(adapter) => adapter,
        Err(error) => return assert!(error.is_bad_input(), "{error}"),
    };
    for base in bases() {
        match adapter.resolve(base) {
            Ok(resolved) => {
                for module in resolved.linear.values().chain(&resolved.embedding) {
                    assert!(module.scale.is_finite());
                    assert_eq!(
                        module.a.len() + module.b.len(),
                        module.rank * (module.dims[0] + module.dims[1])
                    );
                    let parts =
                        [Some(&module.a), Some(&module.b), module.bias.as_ref(), module.magnitude.as_ref()];
                    assert!(parts.into_iter().flatten().flatten().all(|value| value.is_finite()));
                }
                let rows = resolved.rows.values().map(|rows| &rows.values);
                assert!(rows.chain(resolved.whole.values()).flatten().all(|value| value.is_finite()));
            }
            Err(error) => assert!(error.is_bad_input(), "{error}"),
        }
    }
});

/// The shapes of the bases of `tests/golden/adapters`: one with a head, one that ties it to the embedding.
fn bases() -> &'static [BaseShapes; 2] {
    static BASES: OnceLock<[BaseShapes; 2]> = OnceLock::new();
    BASES.get_or_init(|| {
        let untied: &[u8] = include_bytes!("../../tests/golden/families/llama/model.safetensors");
        let tied: &[u8] = include_bytes!("../../tests/golden/families/llama_gqa_tied/model.safetensors");
        [(untied, false), (tied, true)].map(|(bytes, tied)| {
            let base = safetensors::SafeTensors::deserialize(bytes).expect("a golden base");
            let shape = |(name, view): (String, safetensors::tensor::TensorView)| {
                Some((name.strip_suffix(".weight")?.to_string(), view.shape().to_vec()))
            };
            let weights = base.tensors().into_iter().filter_map(shape).collect();
            BaseShapes { weights, biases: BTreeSet::new(), tied }
        })
    })
}
