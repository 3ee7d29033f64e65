//! `peft push` through the program, against a hub on a loopback port.

#[path = "../../peft-core/src/checkpoint/hub/test_server.rs"]
mod test_server;

use crate::program::BASE;
use peft_tests::{golden, program, root};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};
use test_server::TestHub;

const TOKEN: &str = "hf_secret";

/// Runs `peft` as a user of that hub, with a cache of its own.
fn peft(hub: &str, home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(program());
    for name in ["HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"] {
        command.env_remove(name);
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", hub).env("HF_TOKEN", TOKEN);
    let out = command.args(args).current_dir(root()).output().unwrap();
    for text in [&out.stdout, &out.stderr] {
        let text = String::from_utf8_lossy(text);
        assert!(!text.contains(TOKEN) && !text.contains("Signature"), "{text}");
    }
    out
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn an_adapter_goes_up_and_is_used_from_there() {
    let hub = TestHub::start(&[]);
    {
        let mut state = hub.state.lock().unwrap();
        (state.token, state.missing, state.chunk_size) = (Some(TOKEN.to_string()), true, 1000);
    }
    let home = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let settings = ["max_steps=2", "eval_on_start=false", "eval_generations=0"];
    crate::program::train(&run, &settings, &[]);
    let adapter = run.join("adapter");
    std::fs::write(adapter.join(".env"), "HF_TOKEN=hf_secret").unwrap();
    let (folder, all) = (adapter.display().to_string(), run.display().to_string());

    let out = peft(&hub.endpoint, home.path(), &["push", &folder, "org/name", "--dry-run"]);
    let shown = text(&out);
    assert!(out.status.success() && hub.take_seen().is_empty(), "{shown}");
    for part in
        ["adapter_model.safetensors", "KiB", "left out: .env (hidden)", "nothing was sent", "--base-model"]
    {
        assert!(shown.contains(part), "no {part} in {shown}");
    }
    // The run's folder is no adapter, but holds one.
    let out = peft(&hub.endpoint, home.path(), &["push", &all, "org/name"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out).contains(&folder), "{}", text(&out));

    let out = peft(&hub.endpoint, home.path(), &["push", &folder, "org/name"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out).contains("--create"), "{}", text(&out));

    let flags = ["--create", "--private", "--base-model", "org/base", "--json"];
    let out = peft(&hub.endpoint, home.path(), &[&["push", &folder, "org/name"][..], &flags[..]].concat());
    assert!(out.status.success(), "{}", text(&out));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&report["created"], &report["kind"]), (&json!(true), &json!("adapter")));
    assert_eq!(report["left_out"], json!([{"path": ".env", "reason": "hidden"}]));
    {
        let state = hub.state.lock().unwrap();
        assert!(state.leaked.is_empty() && state.private && !state.files.contains_key(".env"));
        assert_eq!(
            state.files["adapter_model.safetensors"],
            std::fs::read(adapter.join("adapter_model.safetensors")).unwrap()
        );
        // The base is named as asked for in the uploaded file, and everything else in it is as it was.
        let mut sent: Value = serde_json::from_slice(&state.files["adapter_config.json"]).unwrap();
        let kept: Value =
            serde_json::from_slice(&std::fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!(sent["base_model_name_or_path"], "org/base");
        sent["base_model_name_or_path"] = kept["base_model_name_or_path"].clone();
        assert_eq!(sent, kept);
    }

    let generate = |adapter: &str| {
        let args = ["generate", "--base-model", BASE, "--prompt", "On Monday", "--max-new-tokens", "8"];
        let out = peft(&hub.endpoint, home.path(), &[&args[..], &["--adapter", adapter]].concat());
        assert!(out.status.success(), "{}", text(&out));
        out.stdout
    };
    assert_eq!(generate("org/name"), generate(&folder));
}

#[test]
fn a_checkpoint_goes_up_and_what_is_broken_does_not() {
    let hub = TestHub::start(&[]);
    hub.state.lock().unwrap().token = Some(TOKEN.to_string());
    let home = tempfile::tempdir().unwrap();
    let out = peft(&hub.endpoint, home.path(), &["push", BASE, "org/name", "--message", "first"]);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(hub.state.lock().unwrap().commits[0]["summary"], "first");
    let args = ["generate", "--prompt", "On Monday", "--max-new-tokens", "8", "--base-model"];
    let here = peft(&hub.endpoint, home.path(), &[&args[..], &[BASE]].concat());
    let there = peft(&hub.endpoint, home.path(), &[&args[..], &["org/name"]].concat());
    assert!(there.status.success() && here.stdout == there.stdout, "{}", text(&there));

    hub.take_seen();
    let refuses = |args: &[&str], expected: &str| {
        let out = peft(&hub.endpoint, home.path(), args);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out));
        assert!(text(&out).contains(expected), "no {expected} in {}", text(&out));
    };
    refuses(&["push", BASE, "org/name", "--offline"], "offline");
    refuses(&["push", BASE, "name"], "org/name");
    refuses(&["push", "recipes", "org/name"], "config.json");
    let broken = tempfile::tempdir().unwrap();
    copy(&golden("adapters/qv"), broken.path());
    let path = broken.path().join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let broken_dir = broken.path().display().to_string();
    refuses(&["push", &broken_dir, "org/name"], "non-finite");
    std::os::unix::fs::symlink("/etc/hostname", broken.path().join("notes.txt")).unwrap();
    copy(&golden("adapters/qv"), broken.path());
    refuses(&["push", &broken_dir, "org/name"], "notes.txt");
    assert!(hub.take_seen().is_empty(), "nothing was sent");
}
