//! Numbers in files that are too large, too many or too deep.

use super::{ends, refused, text};
use crate::faults::{base, join, split};
use crate::program::BASE;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;

fn inspect(path: &Path, expected: &[&str]) {
    refused(&["inspect", &text(path)], expected);
}

/// A header with data of so many bytes.
fn write(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    fs::write(path, bytes).unwrap();
}

#[test]
fn headers_are_bounded_and_exact() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let tensor = |name: &str, shape: &str, begin: usize, end: usize| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let header = |tensors: &[String]| format!("{{{}}}", tensors.join(","));
    let cases = [
        (header(&[tensor("a", "[1]", 0, 4), tensor("a", "[1]", 4, 8)]), 8, "appears twice"),
        (header(&[tensor("a", "[1]", 0, 4), tensor("b", "[1]", 0, 4)]), 4, "inside the tensor before it"),
        (header(&[tensor("a", "[1]", 0, 4), tensor("b", "[1]", 8, 12)]), 12, "leaving a hole"),
        (header(&[tensor("a", "[1]", 0, 4)]), 8, "belong to no tensor"),
        (header(&[tensor("a", "[2]", 0, 8)]), 4, "cut short"),
        (header(&[tensor("a", "[2]", 0, 4)]), 4, "needs 8 bytes"),
        (header(&[tensor("a", "[4294967296,4294967296]", 0, 4)]), 4, "overflows"),
        (header(&[tensor("a", "[9223372036854775807,2,0]", 0, 0)]), 0, "overflows"),
        (header(&[tensor("a", "[18446744073709551616]", 0, 4)]), 4, "invalid header"),
        (header(&[tensor("a", "[-1]", 0, 4)]), 4, "invalid header"),
        (header(&[tensor("a", "[1e0]", 0, 4)]), 4, "invalid header"),
        (header(&[tensor("a", &format!("[{}1]", "1,".repeat(16)), 0, 4)]), 4, "17 dimensions"),
        (header(&[tensor("a", "[1]", 4, 0)]), 4, "has offsets 4..0"),
        ("[".repeat(100_000), 0, "invalid header"),
        (format!("{{\"a\":{}", "[".repeat(100_000)), 0, "invalid header"),
    ];
    for (header, data, expected) in &cases {
        write(&path, header, *data);
        inspect(&path, &["x.safetensors", expected]);
    }
    fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
    inspect(&path, &["100000001", "100000000"]);
    let many: Vec<String> = (0..1_000_001).map(|i| tensor(&i.to_string(), "[0]", 0, 0)).collect();
    write(&path, &header(&many), 0);
    inspect(&path, &["1000001 tensors"]);
}

/// Files of a terabyte that take no room on the disk.
#[test]
fn files_of_zeros_are_not_read_to_the_end() {
    let sparse = |path: &Path| File::create(path).unwrap().set_len(1 << 40).unwrap();
    for name in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"] {
        let (_guard, dir) = base();
        sparse(&dir.join(name));
        refused(&["generate", "--base-model", &text(&dir), "--prompt", "x"], &[name]);
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["d.json", "d.jsonl", "d.csv", "d.tsv", "d.txt", "d.parquet"] {
        let path = dir.path().join(name);
        sparse(&path);
        refused(&["evaluate", "--base-model", BASE, "--data", &text(&path)], &[name]);
    }
    let recipe = dir.path().join("r.yaml");
    sparse(&recipe);
    refused(&["train", &text(&recipe)], &["r.yaml"]);
    // A tensor as large as its file says, but not as the model.
    let (_guard, dir) = base();
    let path = dir.join("model.safetensors");
    let (mut header, _) = split(&path);
    let end =
        header.as_object().unwrap().values().filter_map(|t| t["data_offsets"][1].as_u64()).max().unwrap();
    header["huge"] = json!({"dtype": "F32", "shape": [1u64 << 37], "data_offsets": [end, end + (1 << 39)]});
    join(&path, &header, &[]);
    let begin = fs::metadata(&path).unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(begin + end + (1 << 39)).unwrap();
    refused(&["generate", "--base-model", &text(&dir), "--prompt", "x"], &["huge"]);
}

#[test]
fn configurations_cannot_be_deep_or_absurd() {
    let deep = "[".repeat(100_000);
    let (_guard, dir) = base();
    let generate = |dir: &Path, expected: &[&str]| {
        refused(&["generate", "--base-model", &text(dir), "--prompt", "x"], expected);
    };
    let original = fs::read_to_string(dir.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&original).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        let kept = fs::read(dir.join(name)).unwrap();
        for content in [deep.clone(), format!("{{\"a\": {deep}"), "{\"a\": \0}".to_string(), "[]".to_string()]
        {
            fs::write(dir.join(name), content).unwrap();
            generate(&dir, &[name]);
        }
        fs::write(dir.join(name), kept).unwrap();
    }
    for (key, value) in [
        ("hidden_size", json!(1e300)),
        ("vocab_size", json!(u64::MAX)),
        ("num_hidden_layers", json!(1u64 << 40)),
        ("num_attention_heads", json!(1u64 << 20)),
        ("max_position_embeddings", json!(u64::MAX)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rope_theta", json!(1e-300)),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 1e-300})),
        ("rope_scaling", json!({"rope_type": "yarn", "original_max_position_embeddings": 1e-300})),
    ] {
        let kept = config[key].clone();
        config[key] = value;
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        generate(&dir, &["config.json", key]);
        config[key] = kept;
    }
    let infinite = original.replacen('{', "{\"rope_theta\": 1e999,", 1);
    fs::write(dir.join("config.json"), infinite).unwrap();
    generate(&dir, &["config.json"]);
}

#[test]
fn data_cannot_be_deep() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    for content in
        ["[".repeat(100_000), format!("{{\"text\": {}", "{\"a\":".repeat(100_000)), "\0".to_string()]
    {
        fs::write(&path, content).unwrap();
        let args = ["evaluate", "--base-model", BASE, "--data", &text(&path), "--type", "completion"];
        refused(&args, &["d.jsonl", "line 1"]);
    }
}

#[test]
fn recipes_cannot_explode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.yaml");
    let sound = "base_model: recipes/quickstart/base\ndatasets: [{path: recipes/quickstart/train.jsonl, type: prompt_completion}]\n";
    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_string();
    for level in 1..12 {
        let before = format!("*a{}, ", level - 1).repeat(10);
        laughs.push_str(&format!("a{level}: &a{level} [{before}]\n"));
    }
    let cases = [
        laughs,
        format!("{sound}a: {}", "[".repeat(100_000)),
        format!("{sound}a: {}", "{a: ".repeat(100_000)),
        format!(
            "{sound}a:\n{}",
            (1..2000).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect::<String>()
        ),
        format!("{sound}a: &a [*a]\n"),
        format!("{sound}seed: 1\nseed: 2\n"),
        format!("{sound}sequence_len: 99999999999999999999999\n"),
        format!("{sound}learning_rate: 1e999\n"),
        format!("{sound}learning_rate: .nan\n"),
        format!("{sound}optimizer: {{eps: .inf}}\n"),
        format!("{sound}method: {{r: 18446744073709551615}}\n"),
        format!("{sound}output_dir: !!python/object/apply:os.system ['touch x']\n"),
        format!("{sound}---\n{sound}"),
        format!("{sound}# \0\n"),
        format!("{sound}{}", "#\n".repeat(1 << 20)),
        "base_model: \"a\\0b\"\ndatasets: [{path: d.jsonl, type: alpaca}]\n".to_string(),
        "base_model: recipes/quickstart/base\ndatasets: [{path: \"a\\0.jsonl\", type: alpaca}]\n".to_string(),
        format!("{sound}output_dir: \"a\\0b\"\n"),
        format!("{sound}output_dir: {}\n", "a".repeat(5000)),
    ];
    for case in cases {
        fs::write(&path, &case).unwrap();
        let out = ends(&["train", &text(&path)]);
        let stderr = String::from_utf8_lossy(&out.stderr);
        let begin: String = case.chars().take(300).collect();
        assert_eq!(out.status.code(), Some(2), "{:?} {stderr}\n{begin}", out.status);
    }
    fs::write(&path, b"base_model: \xff\n").unwrap();
    refused(&["train", &text(&path)], &["r.yaml", "UTF-8"]);
    let deep = format!("{}=1", "a.".repeat(60_000));
    refused(&["train", "recipes/quickstart.yaml", "--override", &deep], &["--override"]);
}
