//! `peft doctor`.

use peft_tests::{program, root};
use serde_json::Value;
use std::process::{Command, Output};

fn doctor(cache: &std::path::Path, args: &[&str]) -> Output {
    let mut command = Command::new(program());
    command.arg("doctor").args(args).current_dir(root());
    command.env("HF_HOME", cache).env("HF_TOKEN", "hf_never_shown").env_remove("HF_HUB_CACHE");
    let out = command.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    out
}

#[test]
fn doctor_tells_of_the_machine_and_keeps_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("not/yet");
    let json = doctor(&cache, &["--json"]);
    let found: Value = serde_json::from_slice(&json.stdout).unwrap();
    for key in ["version", "cpu", "memory", "disk", "gpu", "hub", "fits", "warnings"] {
        assert!(found.get(key).is_some(), "{key}: {found}");
    }
    let cores = std::thread::available_parallelism().unwrap().get() as u64;
    assert_eq!(found["cpu"]["cores"].as_u64(), Some(cores));
    assert!(found["cpu"]["matmul_gflops"].as_f64().unwrap() > 0.0, "{found}");
    assert_eq!(found["hub"]["cache_dir"], cache.join("hub").display().to_string());
    assert_eq!(
        (&found["hub"]["token"], &found["hub"]["cache_writable"]),
        (&Value::Bool(true), &Value::Bool(true))
    );
    assert!(found["memory"]["usable_bytes"].as_u64() <= found["memory"]["total_bytes"].as_u64(), "{found}");
    let text = doctor(&cache, &[]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("a token is set"));
    for out in [&json.stdout, &json.stderr, &text.stdout, &text.stderr] {
        assert!(!String::from_utf8_lossy(out).contains("never_shown"));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}
