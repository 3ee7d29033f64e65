//! A model's folder: `config.json`, an index and two shards, or without an index one file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peft_core::checkpoint::{CONFIG_FILE, Checkpoint, INDEX_FILE, WEIGHTS_FILE};

fuzz_target!(|input: &[u8]| {
    let [config, index, first, second] = peft_fuzz::parts(input);
    peft_fuzz::file(CONFIG_FILE, config);
    let (unused, shards) = if index.is_empty() {
        ([INDEX_FILE, "b.safetensors", "a.safetensors"], [WEIGHTS_FILE, "b.safetensors"])
    } else {
        peft_fuzz::file(INDEX_FILE, index);
        ([WEIGHTS_FILE, "", ""], ["a.safetensors", "b.safetensors"])
    };
    for name in unused.into_iter().filter(|name| !name.is_empty()) {
        let _ = std::fs::remove_file(peft_fuzz::scratch().join(name));
    }
    peft_fuzz::file(shards[0], first);
    peft_fuzz::file(shards[1], second);

    let checkpoint = match Checkpoint::open(peft_fuzz::scratch()) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return assert!(error.is_bad_input(), "{error}"),
    };
    let mut bytes = 0;
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name).expect("a listed tensor");
        assert_eq!(tensor.shape.iter().product::<usize>(), tensor.numel());
        bytes += tensor.bytes.len() as u64;
        let _ = tensor.to_f32();
    }
    assert_eq!(bytes, checkpoint.total_bytes());
    assert!(bytes <= (first.len() + second.len()) as u64);
    assert_eq!(checkpoint.sha256().len(), 64);
    assert!(checkpoint.side_files().is_ok());
});
