//! `peft init`: what it writes is trained as it is.

use crate::program::BASE;
use peft_tests::{peft, peft_ok, peft_refuses, root};

const DATA: &str = "recipes/quickstart/train.jsonl";

#[test]
fn what_init_writes_can_be_trained() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for method in ["lora", "rslora", "dora", "lora+", "lora-fa", "full"] {
        let (out, run) = (path(&format!("{method}.yaml")), path(&format!("run {method}")));
        peft_ok(&["init", "--method", method, "--base-model", BASE, "--data", DATA, &out]);
        let text = std::fs::read_to_string(&out).unwrap();
        assert!(text.contains("type: prompt_completion") && !text.contains("sequence_len: 2048"), "{text}");
        // Once as it is, but short; the others as far as a step.
        let steps = if method == "lora" { "max_steps=2" } else { "max_steps=1" };
        let mut args = vec!["train", &out, "--output-dir", &run, "--override", steps];
        if method != "lora" {
            args.extend(["datasets.0.limit=8", "val_set_size=0", "eval_on_start=false"]);
        }
        peft_ok(&args);
    }
    let before = std::fs::read(path("lora.yaml")).unwrap();
    assert!(peft_refuses(&["init", &path("lora.yaml")]).contains("is there already"));
    assert_eq!(std::fs::read(path("lora.yaml")).unwrap(), before);
}

#[test]
fn init_refuses_what_it_does_not_understand() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("r.yaml").display().to_string();
    assert!(peft_refuses(&["init", "--method", "dorra", &out]).contains("dora"));
    assert!(
        peft_refuses(&["init", "--data", "recipes/quickstart/base/config.json", &out])
            .contains("config.json")
    );
    assert!(peft_refuses(&["init", "--base-model", "./nowhere", &out]).contains("nowhere"));
    assert!(!dir.path().join("r.yaml").exists());
    // With nothing known it is a form to fill in, also for a base that is not here.
    assert!(peft(&["init", "--base-model", "org/never-downloaded", &out]).status.success());
    assert!(
        root().join(BASE).is_dir() && std::fs::read_to_string(&out).unwrap().contains("org/never-downloaded")
    );
}
