#![allow(clippy::unwrap_used)]

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::checkpoint::dtype::Dtype;
use crate::checkpoint::writer::{LazyTensor, write_safetensors};

/// Writes a file of u8 tensors, each of two bytes.
fn write(path: &Path, tensors: &[(&str, u8)]) {
    let tensors = tensors
        .iter()
        .map(|&(name, value)| {
            LazyTensor::<CheckpointError>::new(name, Dtype::U8, vec![2], move || Ok(vec![value; 2].into()))
        })
        .collect();
    write_safetensors(path, tensors, &BTreeMap::new()).unwrap();
}

fn write_index(dir: &Path, map: &[(&str, &str)]) {
    let map: BTreeMap<_, _> = map.iter().copied().collect();
    let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map});
    fs::write(dir.join(INDEX_FILE), index.to_string()).unwrap();
}

/// A folder with a configuration and nothing else.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(CONFIG_FILE), r#"{"model_type":"llama"}"#).unwrap();
    folder
}

/// A folder with two shards of which the index lists `a` and `b`, and the second shard holds `extra` too.
fn sharded() -> TempDir {
    let folder = folder();
    let dir = folder.path();
    write(&dir.join("model-00001-of-00002.safetensors"), &[("a", 1)]);
    write(&dir.join("model-00002-of-00002.safetensors"), &[("b", 2), ("extra", 3)]);
    write_index(dir, &[("a", "model-00001-of-00002.safetensors"), ("b", "model-00002-of-00002.safetensors")]);
    folder
}

#[test]
fn one_file_opens() {
    let folder = folder();
    write(&folder.path().join(WEIGHTS_FILE), &[("w", 7), ("v", 8)]);
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.config()["model_type"], "llama");
    assert_eq!(model.names().collect::<Vec<_>>(), ["v", "w"]);
    assert_eq!(model.tensor("w").unwrap().bytes, [7, 7]);
    assert_eq!(model.total_bytes(), 4);
    assert!(model.contains("v") && !model.contains("x"));
    let message = model.tensor("ww").unwrap_err().to_string();
    assert!(message.contains("no tensor `ww`"), "{message}");
}

#[test]
fn shards_open_with_what_the_index_leaves_out() {
    let folder = sharded();
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.names().collect::<Vec<_>>(), ["a", "b", "extra"]);
    assert_eq!(model.tensor("extra").unwrap().bytes, [3, 3]);
    assert_eq!(model.total_bytes(), 6);
}

#[test]
fn the_index_decides_between_two_shards_and_two_unlisted_are_refused() {
    let folder = sharded();
    write(&folder.path().join("model-00001-of-00002.safetensors"), &[("a", 1), ("b", 9)]);
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.tensor("b").unwrap().bytes, [2, 2]);

    write(&folder.path().join("model-00001-of-00002.safetensors"), &[("a", 1), ("extra", 9)]);
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert!(matches!(error, CheckpointError::AmbiguousTensor { tensor, .. } if tensor == "extra"));
}

#[test]
fn the_fingerprint_is_that_of_sha256sum() {
    let folder = sharded();
    let list: String =
        ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
            .iter()
            .map(|name| {
                format!("{}  {name}\n", hex(&Sha256::digest(fs::read(folder.path().join(name)).unwrap())))
            })
            .collect();
    let fingerprint = Checkpoint::open(folder.path()).unwrap().sha256();
    assert_eq!(fingerprint, hex(&Sha256::digest(list)));
    assert_eq!(hex(&Sha256::digest(b"abc"))[..8], *"ba7816bf");
}

#[test]
fn what_an_index_promises_must_be_there() {
    let folder = sharded();
    let dir = folder.path();
    write_index(dir, &[("aa.weight", "model-00001-of-00002.safetensors")]);
    assert!(matches!(
        Checkpoint::open(dir),
        Err(CheckpointError::TensorNotInShard { tensor, .. }) if tensor == "aa.weight"
    ));
    write_index(dir, &[("a", "model-00003-of-00002.safetensors")]);
    let message = Checkpoint::open(dir).unwrap_err().to_string();
    assert!(message.contains("did you mean `model-0000"), "{message}");
    write_index(dir, &[]);
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::InvalidJson { .. })));
    fs::write(dir.join(INDEX_FILE), r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#).unwrap();
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::DuplicateKey { key, .. }) if key == "a"));
    fs::write(dir.join(INDEX_FILE), r#"{"weight_map":{"a":1}}"#).unwrap();
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::InvalidJson { .. })));
}

#[test]
fn shard_names_that_lead_out_are_refused() {
    let folder = folder();
    let outside = [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/../../secret.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "./w.safetensors",
        "w.bin",
        "",
    ];
    for shard in outside {
        write_index(folder.path(), &[("a", shard)]);
        let error = Checkpoint::open(folder.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::UnsafeShardName { .. }), "{shard}: {error}");
    }
}

#[test]
fn links_out_of_the_folder_are_refused() {
    let secret = tempfile::tempdir().unwrap();
    write(&secret.path().join("s.safetensors"), &[("a", 1)]);
    let folder = folder();
    let dir = folder.path();
    symlink(secret.path().join("s.safetensors"), dir.join("shard.safetensors")).unwrap();
    write_index(dir, &[("a", "shard.safetensors")]);
    let error = Checkpoint::open(dir).unwrap_err();
    assert!(matches!(error, CheckpointError::LeadsOut { .. }) && error.is_bad_input());

    // A linked subfolder leads out as well.
    symlink(secret.path(), dir.join("sub")).unwrap();
    write_index(dir, &[("a", "sub/s.safetensors")]);
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::LeadsOut { .. })));
}

#[test]
fn links_inside_a_hub_cache_are_followed_but_not_into_another_repository() {
    let cache = tempfile::tempdir().unwrap();
    let repo = cache.path().join("models--org--name");
    let snapshot = repo.join("snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("blobs")).unwrap();
    fs::write(repo.join("blobs/c0"), "{}").unwrap();
    write(&repo.join("blobs/w0"), &[("a", 1)]);
    symlink("../../blobs/c0", snapshot.join(CONFIG_FILE)).unwrap();
    symlink("../../blobs/w0", snapshot.join(WEIGHTS_FILE)).unwrap();
    // Also when the snapshot is reached through a link.
    symlink(&snapshot, cache.path().join("here")).unwrap();
    for dir in [&snapshot, &cache.path().join("here")] {
        let model = Checkpoint::open(dir).unwrap();
        assert_eq!(model.tensor("a").unwrap().bytes, [1, 1]);
        assert_eq!(model.side_files().unwrap(), [dir.join(CONFIG_FILE)]);
    }

    fs::create_dir_all(cache.path().join("models--org--other/blobs")).unwrap();
    write(&cache.path().join("models--org--other/blobs/w1"), &[("a", 1)]);
    fs::remove_file(snapshot.join(WEIGHTS_FILE)).unwrap();
    symlink("../../../models--org--other/blobs/w1", snapshot.join(WEIGHTS_FILE)).unwrap();
    assert!(matches!(Checkpoint::open(&snapshot), Err(CheckpointError::LeadsOut { .. })));
    fs::remove_file(snapshot.join(WEIGHTS_FILE)).unwrap();
    symlink("../../blobs/gone", snapshot.join(WEIGHTS_FILE)).unwrap();
    assert!(matches!(Checkpoint::open(&snapshot), Err(CheckpointError::ReadFailed { .. })));
}

#[test]
fn folders_that_are_no_model_say_what_they_are() {
    let empty = tempfile::tempdir().unwrap();
    let dir = empty.path();
    assert!(matches!(Checkpoint::open(&dir.join("none")), Err(CheckpointError::NoFolder { .. })));
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::NoConfig { .. })));
    fs::write(dir.join(ADAPTER_CONFIG_FILE), "{}").unwrap();
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::IsAdapter { .. })));
    fs::remove_file(dir.join(ADAPTER_CONFIG_FILE)).unwrap();
    fs::write(dir.join(CONFIG_FILE), "[]").unwrap();
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::InvalidJson { .. })));
    fs::write(dir.join(CONFIG_FILE), "{}").unwrap();
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::NoWeights { .. })));
    fs::write(dir.join("training_args.bin"), "").unwrap();
    assert!(matches!(Checkpoint::open(dir), Err(CheckpointError::NoWeights { .. })));
    fs::write(dir.join("pytorch_model.bin"), "").unwrap();
    let message = Checkpoint::open(dir).unwrap_err().to_string();
    assert!(message.contains("pickle is never read"), "{message}");
}

#[test]
fn side_files_are_all_but_weights_and_adapters() {
    let folder = sharded();
    let dir = folder.path();
    let kept =
        ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer.model"];
    let left = [
        ".gitattributes",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "model.GGUF",
        "pytorch_model.bin.index.json",
    ];
    for name in kept.iter().chain(&left) {
        fs::write(dir.join(name), "").unwrap();
    }
    fs::create_dir(dir.join("original")).unwrap();
    let model = Checkpoint::open(dir).unwrap();
    let names: Vec<_> = model
        .side_files()
        .unwrap()
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_string())
        .collect();
    assert_eq!(names, [kept[0], kept[1], "config.json", kept[2], kept[3], kept[4]]);

    symlink("/etc/passwd", dir.join("notes.txt")).unwrap();
    assert!(matches!(model.side_files(), Err(CheckpointError::LeadsOut { .. })));
}
