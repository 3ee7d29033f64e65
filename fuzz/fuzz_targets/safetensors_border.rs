//! One safetensors file: header, cover, conversion.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peft_core::checkpoint::SafetensorsFile;

fuzz_target!(|bytes: &[u8]| {
    let path = peft_fuzz::file("x.safetensors", bytes);
    match SafetensorsFile::open(&path) {
        Ok(file) => peft_fuzz::agrees_with_reference(&file, bytes),
        Err(error) => assert!(error.is_bad_input(), "{error}"),
    }
});
