//! A recipe and its overrides. The schema lives in a program, so its files are compiled in here.
#![no_main]
#![allow(dead_code)]

#[path = "../../peft-cli/src/error.rs"]
mod error;
#[path = "../../peft-cli/src/recipe/mod.rs"]
mod recipe;

use libfuzzer_sys::fuzz_target;
use peft_core::strict;
use recipe::Recipe;

fuzz_target!(|input: &[u8]| {
    let [yaml, overrides] = peft_fuzz::parts(input);
    let overrides: Vec<String> =
        String::from_utf8_lossy(overrides).lines().take(8).map(str::to_string).collect();
    let path = peft_fuzz::file("recipe.yaml", yaml);
    match recipe::read(&path, &overrides) {
        Ok(recipe) => {
            if recipe.method.block.check(false).is_err() {
                return;
            }
            // What a run keeps of its recipe is a recipe again, the same one.
            let kept = serde_json::to_value(&recipe).expect("a recipe is JSON");
            let again: Recipe = strict::parse(&kept).expect("a kept recipe is read");
            again.check().expect("a kept recipe is valid");
            assert_eq!(kept, serde_json::to_value(&again).expect("a recipe is JSON"));
        }
        Err(error) => assert_eq!(error.exit_code(), 2, "{error}"),
    }
});
