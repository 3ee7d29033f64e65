//! Pickles, links, pipes and what stands in the way of an output.

use super::{ends, refused, text};
use crate::faults::{base, copy};
use crate::program::{BASE, HELD_OUT, SHORT};
use burn::tensor::Device;
use peft_core::adapter::{Adapter, AdapterError, SavedAdapter, save};
use peft_core::checkpoint::Checkpoint;
use peft_core::model::{ComputeType, load};
use peft_tests::golden;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// A pickle that would run a command, by `pickle.dumps` of a class whose `__reduce__` is `(os.system, ("touch …",))`.
const PICKLE: &[u8] = b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x07touch x\x94\x85\x94R\x94.";
/// The begin of a zip archive as `torch.save` writes it.
const ARCHIVE: &[u8] =
    b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0\x12\0archive/data.pklFB\x0e\0";

fn generate<'a>(base: &'a str, adapter: Option<&'a str>) -> Vec<&'a str> {
    let mut args = vec!["generate", "--base-model", base, "--prompt", "x", "--max-new-tokens", "1"];
    args.extend(adapter.into_iter().flat_map(|adapter| ["--adapter", adapter]));
    args
}

#[test]
fn pickle_is_refused_by_name_and_by_content() {
    let (_guard, dir) = base();
    let weights = dir.join("model.safetensors");
    for content in [PICKLE, ARCHIVE, &PICKLE[..2]] {
        fs::write(&weights, content).unwrap();
        refused(&generate(&text(&dir), None), &["model.safetensors"]);
    }
    fs::write(&weights, PICKLE).unwrap();
    refused(&generate(&text(&dir), None), &["Python pickle", "never read", "convert it to safetensors"]);
    fs::write(&weights, ARCHIVE).unwrap();
    refused(&generate(&text(&dir), None), &["zip archive", "never read", "convert it to safetensors"]);
    fs::remove_file(&weights).unwrap();
    for name in ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "consolidated.00.pth"] {
        fs::write(dir.join(name), ARCHIVE).unwrap();
        refused(&generate(&text(&dir), None), &[name, "never read", "convert it to safetensors"]);
        fs::remove_file(dir.join(name)).unwrap();
    }

    let adapter = tempfile::tempdir().unwrap();
    copy(&golden("adapters/qv"), adapter.path());
    let weights = adapter.path().join("adapter_model.safetensors");
    let base = text(&golden("families/llama_gqa_tied"));
    let output = adapter.path().join("out");
    let (path, out) = (text(adapter.path()), text(&output));
    let merge = ["merge", "--base-model", &base, "--adapter", &path, "--output", &out];
    fs::write(&weights, PICKLE).unwrap();
    refused(&merge, &["adapter_model.safetensors", "Python pickle"]);
    fs::rename(&weights, adapter.path().join("adapter_model.bin")).unwrap();
    refused(&merge, &["adapter_model.bin", "never read", "convert it to safetensors"]);
    assert!(!output.exists());

    let data = adapter.path().join("data.pkl");
    fs::write(&data, PICKLE).unwrap();
    refused(
        &["evaluate", "--base-model", BASE, "--data", &text(&data)],
        &["data.pkl", "pickle is never read"],
    );
}

/// Files of a folder that came from somewhere stay inside it; a file that the user names may be a link.
#[test]
fn links_lead_out_of_no_folder() {
    let outside = tempfile::tempdir().unwrap();
    copy(&peft_tests::root().join(BASE), outside.path());
    for name in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"] {
        let (_guard, dir) = base();
        fs::remove_file(dir.join(name)).unwrap();
        symlink(outside.path().join(name), dir.join(name)).unwrap();
        refused(&generate(&text(&dir), None), &[name, "leads out of its folder"]);
    }
    let (_guard, dir) = base();
    symlink("/etc/passwd", dir.join("chat_template.jinja")).unwrap();
    refused(&generate(&text(&dir), None), &["chat_template.jinja", "leads out of its folder"]);
    fs::remove_file(dir.join("chat_template.jinja")).unwrap();

    let adapter = tempfile::tempdir().unwrap();
    let base = text(&golden("families/llama_gqa_tied"));
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        copy(&golden("adapters/qv"), adapter.path());
        fs::remove_file(adapter.path().join(name)).unwrap();
        symlink(golden("adapters/qv").join(name), adapter.path().join(name)).unwrap();
        let (path, out) = (text(adapter.path()), text(&adapter.path().join("out")));
        let merge = ["merge", "--base-model", &base, "--adapter", &path, "--output", &out];
        refused(&merge, &[name, "leads out of its folder"]);
        fs::remove_file(adapter.path().join(name)).unwrap();
    }

    let link = outside.path().join("data.jsonl");
    symlink(peft_tests::root().join(HELD_OUT), &link).unwrap();
    let out = ends(&["inspect", &text(&link), "--type", "prompt_completion", "--base-model", &text(&dir)]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn shards_have_plain_names() {
    let (_guard, dir) = base();
    fs::rename(dir.join("model.safetensors"), dir.join("a.safetensors")).unwrap();
    for shard in
        ["/etc/a.safetensors", "../a.safetensors", "x/../../a.safetensors", "a\\u0000.safetensors", "a.bin"]
    {
        let index = format!(r#"{{"weight_map": {{"model.norm.weight": "{shard}"}}}}"#);
        fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
        refused(&generate(&text(&dir), None), &["model.safetensors.index.json", "inside the folder"]);
    }
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn pipes_and_devices_are_not_waited_for() {
    for name in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"] {
        let (_guard, dir) = base();
        fs::remove_file(dir.join(name)).unwrap();
        pipe(&dir.join(name));
        refused(&generate(&text(&dir), None), &[name, "not a regular file"]);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name));
    for name in ["data.jsonl", "data.parquet", "recipe.yaml", "data.pkl"] {
        pipe(&dir.path().join(name));
    }
    symlink("/dev/zero", dir.path().join("zero.txt")).unwrap();
    symlink("/dev/zero", dir.path().join("zero.yaml")).unwrap();
    for name in ["data.jsonl", "data.parquet", "data.pkl", "zero.txt"] {
        refused(&["evaluate", "--base-model", BASE, "--data", &path(name)], &[name, "not a regular file"]);
    }
    for name in ["recipe.yaml", "zero.yaml"] {
        refused(&["train", &path(name)], &[name, "not a regular file"]);
    }
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let adapter = tempfile::tempdir().unwrap();
        copy(&golden("adapters/qv"), adapter.path());
        fs::remove_file(adapter.path().join(name)).unwrap();
        pipe(&adapter.path().join(name));
        let base = text(&golden("families/llama_gqa_tied"));
        let out = path("out");
        let adapter = text(adapter.path());
        let merge = ["merge", "--base-model", &base, "--adapter", &adapter, "--output", &out];
        refused(&merge, &[name, "not a regular file"]);
    }
}

#[test]
fn outputs_do_not_land_where_they_should_not() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    fs::create_dir(dir.path().join("full")).unwrap();
    fs::write(dir.path().join("full/file"), "precious").unwrap();
    symlink("full", dir.path().join("link")).unwrap();
    let adapter = text(&golden("adapters/qv"));
    let base = text(&golden("families/llama_gqa_tied"));
    for (name, reason) in
        [("file", "not a folder"), ("link", "full: the output folder exists"), ("file/below", "file: ")]
    {
        let output = text(&dir.path().join(name));
        refused(&["merge", "--base-model", &base, "--adapter", &adapter, "--output", &output], &[reason]);
    }
    let train = |output: &str| {
        let mut args = vec!["train", "recipes/quickstart.yaml", "--output-dir", output];
        args.extend(SHORT.iter().flat_map(|entry| ["--override", entry]));
        refused(&args, &[output]);
    };
    train(&text(&file));
    train("/proc/version/below");
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_eq!(fs::read_dir(dir.path().join("full")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
}

#[test]
fn a_non_finite_adapter_is_not_saved() {
    let device = Device::default();
    let base = Checkpoint::open(&golden("families/llama_gqa_tied")).unwrap();
    let mut model = load(&base, &device, ComputeType::F32).unwrap();
    let adapter = Adapter::open(&golden("adapters/qv")).unwrap();
    adapter.attach(&mut model).unwrap();
    let name = "model.layers.1.self_attn.v_proj.lora_B.weight";
    for parameter in model.parameters_mut() {
        if parameter.name == name {
            parameter.value = parameter.value.clone() * f32::INFINITY;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let error = save(&model, &adapter.config, dir.path()).unwrap_err();
    assert!(matches!(&error, AdapterError::NonFinite { key, .. } if key.ends_with(name)), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn names_from_files_do_not_steer_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let header = r#"{"\u001b[2J\u009b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    fs::write(&path, &bytes).unwrap();
    let refused = ends(&["inspect", &text(&path)]);
    bytes.extend([0; 4]);
    fs::write(&path, &bytes).unwrap();
    let shown = ends(&["inspect", &text(&path)]);
    assert!(!refused.status.success() && shown.status.success());
    for text in [refused.stderr, shown.stdout] {
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("\\u{1b}[2J\\u{9b}") && !text.contains(['\u{1b}', '\u{9b}']), "{text}");
    }
}
