//! The card beside what `train` and `merge` write.

use crate::program::{BASE, SHORT, train};
use peft_tests::{peft_ok, root};
use std::path::Path;

/// The lines of the front matter, and the rest.
fn card(dir: &Path) -> (Vec<String>, String) {
    let text = std::fs::read_to_string(dir.join("README.md")).unwrap();
    let (front, rest) = text.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
    (front.lines().map(str::to_string).collect(), rest.to_string())
}

#[test]
fn an_adapter_and_a_merged_checkpoint_have_cards() {
    let dir = tempfile::tempdir().unwrap();
    // A base with a card of its own, which must not be taken for that of the results.
    let base = dir.path().join("tiny base");
    std::fs::create_dir(&base).unwrap();
    for entry in std::fs::read_dir(root().join(BASE)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, base.join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(base.join("README.md"), "# The base's card").unwrap();
    let base = base.display().to_string();
    let run = dir.path().join("run");
    let named = format!("base_model={base}");
    let overrides = [&SHORT[1..], &["max_steps=2", "method.use_rslora=true", &named]].concat();
    train(&run, &overrides, &[]);

    let (front, text) = card(&run.join("adapter"));
    for line in ["base_model_relation: adapter", "library_name: peft", "- \"lora\"", "- \"rslora\""] {
        assert!(front.iter().any(|found| found == line), "{line}: {front:?}");
    }
    assert!(!front.iter().any(|line| line.starts_with("base_model:")), "{front:?}");
    for part in [
        "`train.jsonl`, 1,600 records",
        "| `r` | `16` |",
        "| token accuracy | – |",
        "peft merge",
        "PeftModel",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let here = dir.path().display().to_string();
    assert!(!text.contains(&here) && !text.contains("recipes/"), "{text}");

    let (adapter, merged) = (run.join("adapter").display().to_string(), dir.path().join("merged"));
    let output = merged.display().to_string();
    peft_ok(&["merge", "--base-model", &base, "--adapter", &adapter, "--output", &output]);
    let (front, text) = card(&merged);
    assert!(front.iter().any(|line| line == "base_model_relation: merge"), "{front:?}");
    assert!(text.contains("`tiny base`, a local folder") && !text.contains("The base's card"), "{text}");
    assert!(!text.contains(&here), "{text}");

    // A card that the user took over outlives the run being finished again.
    std::fs::write(run.join("adapter/README.md"), "# Mine").unwrap();
    train(&run, &overrides, &["--resume", "auto"]);
    assert_eq!(std::fs::read_to_string(run.join("adapter/README.md")).unwrap(), "# Mine");
}
