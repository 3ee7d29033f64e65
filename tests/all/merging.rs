//! `peft merge` with its evidence, and the way back.

use crate::program::BASE;
use peft_core::adapter::{
    Adapter, MergeRecord, RewriteOptions, Rounding, Source, check_fold, default_max_drift, fingerprints,
    fold_into, keep_original, unfold_into,
};
use peft_core::checkpoint::{Checkpoint, Dtype, LazyTensor, write_safetensors};
use peft_core::model::{ComputeType, load, ties_embeddings};
use peft_tests::{golden, peft, peft_ok, peft_refuses};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const SHARD: u64 = RewriteOptions::DEFAULT_SHARD;

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 5, 9, 2, 7, 3, 11, 4], vec![6, 6, 1, 8]]
}

/// The base of a golden adapter, and the adapter.
fn golden_pair(adapter: &str, base: &str) -> (Checkpoint, Adapter) {
    let base = Checkpoint::open(&golden("families").join(base)).unwrap();
    (base, Adapter::open(&golden("adapters").join(adapter)).unwrap())
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Rewrites the single weight file in `dir` with the values of tensors changed.
fn tamper(dir: &Path, change: impl Fn(&str, &mut Vec<f32>)) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let tensors = checkpoint.names().map(|name| {
        let tensor = checkpoint.tensor(name).unwrap();
        let mut values = tensor.to_f32().unwrap();
        change(name, &mut values);
        let bytes = peft_core::checkpoint::from_f32(&values, tensor.dtype).unwrap();
        LazyTensor::new(name, tensor.dtype, tensor.shape.to_vec(), move || Ok(Cow::Owned(bytes.clone())))
    });
    let tensors: Vec<LazyTensor<'_>> = tensors.collect();
    write_safetensors(&dir.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
}

#[test]
fn a_right_fold_drifts_by_rounding_alone_and_a_wrong_one_is_refused() {
    let (base, adapter) = golden_pair("qv", "llama_gqa_tied");
    let dir = tempfile::tempdir().unwrap();
    let options = RewriteOptions { dtype: None, max_shard_size: SHARD };
    let report = fold_into(&base, &adapter, dir.path(), &options).unwrap();
    let check = || check_fold(&base, &adapter, dir.path(), &prompts()).unwrap();
    let limit = default_max_drift(Dtype::F32);

    let right = check();
    right.require(limit).unwrap();
    assert!(right.drift.max_relative() < 1e-5 && right.effect.mean_relative() > 1e-2, "{right:?}");
    assert_eq!((right.drift.token_agreement, right.drift.positions, right.drift.continued), (1.0, 12, 32));

    // The scale applied twice in a single module: W + 2ΔW = 2(W + ΔW) − W.
    let whole = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    tamper(dir.path(), |name, values| {
        if name == report.changed[0] {
            let old = base.tensor(name).unwrap().to_f32().unwrap();
            values.iter_mut().zip(old).for_each(|(v, old)| *v = 2.0 * *v - old);
        }
    });
    assert!(check().require(limit).unwrap_err().to_string().contains("the limit is 0.0001"));

    // A fold that did nothing is as far from the adapter as the base is.
    std::fs::write(dir.path().join("model.safetensors"), whole).unwrap();
    tamper(dir.path(), |name, values| *values = base.tensor(name).unwrap().to_f32().unwrap());
    let nothing = check();
    assert_eq!(nothing.drift.mean_difference, nothing.effect.mean_difference);
    assert!(nothing.require(1e9).unwrap_err().to_string().contains("half of what the adapter does"));
}

/// Every adapter that PEFT wrote, whatever it changes: its fold does what it does, and both originals bring the base back.
#[test]
fn every_golden_adapter_folds_without_drift_and_unfolds_exactly() {
    let mut count = 0;
    for (name, dir, base) in crate::adapters::adapters() {
        let (base, adapter) = (Checkpoint::open(&base).unwrap(), Adapter::open(&dir).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let merged = dir.path().join("merged");
        std::fs::create_dir(&merged).unwrap();
        let options = RewriteOptions { dtype: Some(Dtype::F32), max_shard_size: SHARD };
        let report = fold_into(&base, &adapter, &merged, &options).unwrap();
        check_fold(&base, &adapter, &merged, &prompts()).unwrap().require(1e-5).unwrap();
        let folded = Checkpoint::open(&merged).unwrap();
        MergeRecord::new(&base, &adapter, report.changed, Value::Null).unwrap().write(&merged).unwrap();
        let unfold = |original: Option<&Checkpoint>, source| {
            let out = tempfile::tempdir().unwrap();
            let report = unfold_into(&folded, &adapter, original, out.path(), SHARD).unwrap();
            assert!(report.is_exact() && report.source == source, "{name} {report:?}");
            assert_restored(out.path(), &base);
        };
        unfold(Some(&base), Source::Base);
        keep_original(&base, &folded).unwrap();
        unfold(None, Source::Kept);
        count += 1;
    }
    assert!(count >= 10);
}

#[test]
fn weights_that_rounding_leaves_alone_are_counted() {
    let (base, adapter) = golden_pair("qv", "llama_gqa_tied");
    let share = |dtype| {
        let dir = tempfile::tempdir().unwrap();
        let options = RewriteOptions { dtype, max_shard_size: SHARD };
        let report = fold_into(&base, &adapter, dir.path(), &options).unwrap();
        Rounding::measure(&base, &Checkpoint::open(dir.path()).unwrap(), &report.changed).unwrap()
    };
    let (full, half) = (share(None), share(Some(Dtype::BF16)));
    assert_eq!(full.elements, half.elements);
    assert!(full.share() < half.share() && half.unchanged > 0, "{full:?} {half:?}");
}

/// The tensors of `dir` are those of `base`, byte for byte.
fn assert_restored(dir: &Path, base: &Checkpoint) {
    let restored = Checkpoint::open(dir).unwrap();
    assert_eq!(fingerprints(&restored).unwrap(), fingerprints(base).unwrap());
    assert_eq!(ties_embeddings(&restored).unwrap(), ties_embeddings(base).unwrap());
    let dtype = |checkpoint: &Checkpoint| {
        let config = checkpoint.config();
        config.get("dtype").or(config.get("torch_dtype")).cloned()
    };
    assert_eq!(dtype(&restored), dtype(base));
}

#[test]
fn unfolding_restores_every_byte_or_says_which_tensors_it_does_not() {
    // Also whole modules, and a type that changes on the way.
    for (name, base, dtype) in [
        ("all_linear_rslora", "llama_gqa_tied", None),
        ("modules_to_save_head", "llama", Some(Dtype::BF16)),
        ("qv_untied", "llama", None),
    ] {
        let (base, adapter) = golden_pair(name, base);
        let dir = tempfile::tempdir().unwrap();
        let (merged, out) = (dir.path().join("merged"), |n: &str| {
            let path = dir.path().join(n);
            std::fs::create_dir(&path).unwrap();
            path
        });
        std::fs::create_dir(&merged).unwrap();
        let options = RewriteOptions { dtype, max_shard_size: SHARD };
        let report = fold_into(&base, &adapter, &merged, &options).unwrap();
        let folded = Checkpoint::open(&merged).unwrap();

        // Without a record and without the base nobody can know.
        if name != "modules_to_save_head" {
            let unknown = unfold_into(&folded, &adapter, None, &out("blind"), SHARD).unwrap();
            assert!(!unknown.is_exact() && unknown.source == Source::Subtraction);
            assert_eq!(unknown.unknown, base.names().count());
        }
        let record = MergeRecord::new(&base, &adapter, report.changed.clone(), Value::Null).unwrap();
        record.write(&merged).unwrap();
        match unfold_into(&folded, &adapter, None, &out("subtracted"), SHARD) {
            Ok(subtracted) => {
                assert_eq!(subtracted.unknown, 0);
                assert!(subtracted.different.iter().all(|name| report.changed.contains(name)), "{name}");
                let back = Checkpoint::open(&dir.path().join("subtracted")).unwrap();
                for tensor in back.names() {
                    let (new, old) = (back.tensor(tensor).unwrap(), base.tensor(tensor).unwrap());
                    let same = new.bytes == old.bytes;
                    assert_eq!(same, !subtracted.different.contains(&tensor.to_string()), "{tensor}");
                    let pairs = new.to_f32().unwrap().into_iter().zip(old.to_f32().unwrap());
                    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6), "{name} {tensor}");
                }
            }
            Err(error) => {
                assert!(
                    name == "modules_to_save_head" && error.to_string().contains("replaced or rescaled"),
                    "{error}"
                );
            }
        }
        let exact = unfold_into(&folded, &adapter, Some(&base), &out("from_base"), SHARD).unwrap();
        assert_eq!((exact.source, exact.is_exact()), (Source::Base, true), "{name} {exact:?}");
        keep_original(&base, &folded).unwrap();
        let exact = unfold_into(&folded, &adapter, None, &out("from_kept"), SHARD).unwrap();
        assert_eq!((exact.source, exact.is_exact()), (Source::Kept, true), "{name} {exact:?}");
        assert_restored(&dir.path().join("from_base"), &base);
        assert_restored(&dir.path().join("from_kept"), &base);
    }
}

#[test]
fn unfolding_refuses_another_adapter_and_another_base() {
    let (base, adapter) = golden_pair("qv", "llama_gqa_tied");
    let dir = tempfile::tempdir().unwrap();
    let options = RewriteOptions { dtype: None, max_shard_size: SHARD };
    let report = fold_into(&base, &adapter, dir.path(), &options).unwrap();
    let folded = Checkpoint::open(dir.path()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let altered = tempfile::tempdir().unwrap();
    copy(base.dir(), altered.path());
    tamper(altered.path(), |name, values| {
        if name == "model.norm.weight" {
            values[0] += 1.0;
        }
    });
    let altered = Checkpoint::open(altered.path()).unwrap();
    let error = unfold_into(&folded, &adapter, Some(&altered), out.path(), SHARD).unwrap_err();
    assert!(error.is_bad_input() && error.to_string().contains("`model.norm.weight`"), "{error}");

    let mut record = MergeRecord::new(&base, &adapter, report.changed, Value::Null).unwrap();
    record.adapter_sha256 = "0".repeat(64);
    record.write(dir.path()).unwrap();
    let error = unfold_into(&folded, &adapter, None, out.path(), SHARD).unwrap_err();
    assert!(error.to_string().contains("not the adapter"), "{error}");
}

/// A checkpoint that says its head is tied and carries one of its own: loading, attaching and folding agree.
#[test]
fn a_head_of_its_own_counts_whatever_the_configuration_says() {
    let (untied, adapter) = golden_pair("modules_to_save_head", "llama");
    let dir = tempfile::tempdir().unwrap();
    copy(untied.dir(), dir.path());
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["tie_word_embeddings"] = json!(true);
    std::fs::write(&path, config.to_string()).unwrap();
    let base = Checkpoint::open(dir.path()).unwrap();
    assert!(!ties_embeddings(&base).unwrap());
    let model = load(&base, &burn::tensor::Device::flex(), ComputeType::F32).unwrap();
    assert!(!model.config.tie_word_embeddings);
    let out = tempfile::tempdir().unwrap();
    let options = RewriteOptions { dtype: None, max_shard_size: SHARD };
    let report = fold_into(&base, &adapter, out.path(), &options).unwrap();
    assert!(report.changed.contains(&"lm_head.weight".to_string()));
    let check = check_fold(&base, &adapter, out.path(), &prompts()).unwrap();
    check.require(default_max_drift(Dtype::F32)).unwrap();

    // SmolLM3 is tied where nothing is said.
    let smollm3 = tempfile::tempdir().unwrap();
    copy(&golden("families/smollm3"), smollm3.path());
    let path = smollm3.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("tie_word_embeddings");
    std::fs::write(&path, config.to_string()).unwrap();
    let smollm3 = Checkpoint::open(smollm3.path()).unwrap();
    assert_eq!(ties_embeddings(&smollm3).unwrap(), !smollm3.contains("lm_head.weight"));
}

fn merge(output: &Path, extra: &[&str]) -> Vec<String> {
    let (base, adapter) = (golden("families/llama"), golden("adapters/qv_untied"));
    let mut args: Vec<String> = ["merge", "--base-model"].map(String::from).to_vec();
    args.extend([base, PathBuf::from("--adapter"), adapter].map(|path| path.display().to_string()));
    args.extend(["--output".to_string(), output.display().to_string()]);
    args.extend(extra.iter().map(|arg| arg.to_string()));
    args
}

fn run(args: &[String]) -> std::process::Output {
    peft(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn ok(args: &[String]) -> String {
    peft_ok(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn the_program_measures_refuses_keeps_and_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let merged = dir.path().join("merged");

    // A limit that nothing meets: exit code 1, and nothing is left, hidden or not.
    let out = run(&merge(&merged, &["--max-drift", "0", "--dtype", "bf16"]));
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("the limit is 0") && stderr.contains("--force"), "{stderr}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    let out = run(&merge(&merged, &["--max-drift", "0", "--dtype", "bf16", "--force", "--json"]));
    assert!(out.status.success());
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(report["verification"]["drift"]["mean_relative"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["verification"]["effect"]["token_agreement"].is_number());
    assert_eq!(report["rounding"]["dtype"], "bf16");
    assert!(!merged.join("adapter_config.json").exists());

    let plain = dir.path().join("plain");
    let report: Value = serde_json::from_str(&ok(&merge(&plain, &["--no-verify", "--json"]))).unwrap();
    assert!(report["verification"].is_null());

    let kept = dir.path().join("kept");
    let shown = ok(&merge(&kept, &["--keep-original"]));
    assert!(shown.contains("same greedy continuation") && shown.contains("base → adapter"), "{shown}");

    let adapter = golden("adapters/qv_untied").display().to_string();
    let back = dir.path().join("back");
    let unmerge = |from: &Path, extra: &[&str]| {
        let _ = std::fs::remove_dir_all(&back);
        let (from, back) = (from.display().to_string(), back.display().to_string());
        let mut args = vec!["merge", "--unmerge", &from, "--adapter", &adapter, "--output", &back];
        args.extend(extra);
        peft_ok(&args)
    };
    let base = Checkpoint::open(&golden("families/llama")).unwrap();
    assert!(unmerge(&kept, &[]).contains("every tensor is restored byte for byte"));
    assert_restored(&back, &base);
    // What the fold left beside the weights does not travel on.
    assert!(!back.join("merge.json").exists() && !back.join("original_weights.peft").exists());
    let base_dir = golden("families/llama").display().to_string();
    let report: Value =
        serde_json::from_str(&unmerge(&plain, &["--base-model", &base_dir, "--json"])).unwrap();
    assert_eq!((&report["exact"], &report["source"]), (&json!(true), &json!("base")));
    assert_restored(&back, &base);
    let report: Value = serde_json::from_str(&unmerge(&plain, &["--json"])).unwrap();
    assert_eq!(report["source"], "subtraction");
    assert_eq!(report["exact"].as_bool().unwrap(), report["different"].as_array().unwrap().is_empty());
    std::fs::remove_file(plain.join("merge.json")).unwrap();
    let report: Value = serde_json::from_str(&unmerge(&plain, &["--json"])).unwrap();
    assert_eq!((&report["exact"], &report["identical"]), (&json!(false), &json!(0)));
}

#[test]
fn prompts_come_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    crate::program::train(&run_dir, &["max_steps=1", "eval_on_start=false", "eval_generations=0"], &[]);
    let adapter = run_dir.join("adapter").display().to_string();
    let file = dir.path().join("prompts.jsonl");
    std::fs::write(&file, "{\"text\": \"On Monday\"}\n{\"prompt\": \"Mia bought\"}\n").unwrap();
    let file = file.display().to_string();
    let output = dir.path().join("merged").display().to_string();
    let mut args = vec!["merge", "--base-model", BASE, "--adapter", &adapter, "--output", &output];
    args.extend(["--prompts", &file, "--json"]);
    let report: Value = serde_json::from_str(&peft_ok(&args)).unwrap();
    assert_eq!(report["verification"]["drift"]["continued"], 32);

    std::fs::write(&file, "{\"question\": \"?\"}\n").unwrap();
    std::fs::remove_dir_all(&output).unwrap();
    let stderr = peft_refuses(&args);
    assert!(stderr.contains("--prompts") && stderr.contains("record 1"), "{stderr}");
    assert!(!Path::new(&output).exists());
}
