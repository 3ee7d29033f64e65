//! Sparse fine-tuning through the program: against PyTorch, stopped and resumed, folded and undone, in its file.

use crate::families::{integers, open, relative_difference};
use crate::program::{BASE, HELD_OUT, metrics};
use peft_core::adapter::SavedAdapter;
use peft_core::checkpoint::{Checkpoint, SafetensorsFile};
use peft_methods::{SparseAdapter, SparseModule, export_shira, open_adapter};
use peft_tests::{golden, peft_ok, peft_refuses, root};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Trains the recipe into `dir`.
fn train(recipe: &str, dir: &Path, overrides: &[&str], flags: &[&str]) -> String {
    let dir = dir.display().to_string();
    let mut args = vec!["train", recipe, "--output-dir", &dir];
    for entry in overrides {
        args.extend(["--override", entry]);
    }
    args.extend(flags);
    peft_ok(&args)
}

fn modules(run: &Path) -> BTreeMap<String, SparseModule> {
    SparseAdapter::open(&run.join("adapter")).unwrap().modules().unwrap()
}

/// Thirty steps with two choices of positions, from the same positions, against PyTorch
/// (`tests/golden/make_sparse_trajectory.py`).
#[test]
fn thirty_steps_equal_pytorchs() {
    for criterion in ["ag", "ma"] {
        let reference = golden("sparse").join(criterion);
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        train(&format!("tests/golden/sparse_{criterion}.yaml"), &run, &[], &[]);

        let text = std::fs::read_to_string(reference.join("trajectory.jsonl")).unwrap();
        let expected: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let found = metrics(&run);
        assert_eq!((found.len(), expected.len()), (30, 30));
        let mut worst = (0f64, 0f64);
        for (found, expected) in found.iter().zip(&expected) {
            let ratio = |key: &str| found[key].as_f64().unwrap() / expected[key].as_f64().unwrap();
            worst.0 = worst.0.max((ratio("loss") - 1.0).abs());
            worst.1 = worst.1.max((ratio("grad_norm") - 1.0).abs());
            let rates = [&found["learning_rate"], &expected["lr"]].map(|rate| rate.as_f64().unwrap());
            assert!((rates[0] - rates[1]).abs() < 1e-12);
        }

        let expected = SafetensorsFile::open(reference.join("final.safetensors")).unwrap();
        let (mut equal, mut all, mut furthest) = (0, 0, 0f32);
        for (path, SparseModule { pattern, values }) in modules(&run) {
            let (positions, _) = integers(&expected, &format!("{path}.positions"));
            let reference = expected.tensor(&format!("{path}.values")).unwrap().to_f32().unwrap();
            let reference: BTreeMap<i64, f32> = positions.into_iter().zip(reference).collect();
            assert_eq!(pattern.len(), reference.len(), "{path}");
            all += pattern.len();
            for (position, value) in pattern.positions().iter().zip(values) {
                if let Some(reference) = reference.get(&i64::from(*position)) {
                    equal += 1;
                    furthest = furthest.max((value - reference).abs());
                }
            }
        }
        let (ids, _) = integers(&expected, "input_ids");
        let logits = expected.tensor("logits").unwrap().to_f32().unwrap();
        let mut model = open(&root().join(BASE));
        open_adapter(&run.join("adapter")).unwrap().attach(&mut model).unwrap();
        let found: Vec<f32> = model.logits(&ids, 1).try_into_vec_as().unwrap();
        let difference = relative_difference(&found, &logits);
        println!(
            "{criterion}: loss {:.1e}, gradient norm {:.1e}; {equal} of {all} positions the same, values {furthest:.1e} \
             apart; logits {difference:.1e}",
            worst.0, worst.1
        );
        assert!(worst.0 < 1e-4 && worst.1 < 1e-3, "{criterion}: {worst:?}");
        assert!(equal as f64 > 0.999 * all as f64, "{criterion}: {equal} of {all}");
        assert!(difference < 1e-3, "{criterion}: {difference:.1e}");
    }
}

/// A run that goes on from any of its checkpoints, some of them within a selection phase, ends the same to the byte.
#[test]
fn a_resumed_run_ends_the_same() {
    for criterion in ["ag", "ma"] {
        let recipe = format!("tests/golden/sparse_{criterion}.yaml");
        let dir = tempfile::tempdir().unwrap();
        let whole = dir.path().join("whole");
        train(&recipe, &whole, &["save_steps=1", "save_total_limit=null"], &[]);
        let adapter = |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
        // Before the first choice, between the two, within the second phase, and after it.
        for step in [3, 12, 22, 27] {
            let again = dir.path().join(format!("from-{step}"));
            let from = whole.join(format!("checkpoints/step-{step:08}")).display().to_string();
            train(&recipe, &again, &["save_steps=1", "save_total_limit=null"], &["--resume", &from]);
            assert_eq!(adapter(&whole), adapter(&again), "{criterion} from step {step}");
        }
    }
}

/// Positions stay distinct and as many as they were, and move when the schedule says so.
#[test]
fn positions_move_on_schedule() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train("tests/golden/sparse_ag.yaml", &run, &["save_steps=1", "save_total_limit=null"], &[]);
    let positions = |step: u64| -> BTreeMap<String, BTreeSet<i64>> {
        let path = run.join(format!("checkpoints/step-{step:08}/state.safetensors"));
        let file = SafetensorsFile::open(path).unwrap();
        let names: Vec<String> =
            file.names().filter(|name| name.ends_with(".positions")).map(str::to_string).collect();
        names.into_iter().map(|name| (name.clone(), integers(&file, &name).0.into_iter().collect())).collect()
    };
    let before = positions(1);
    let count: usize = before.values().map(BTreeSet::len).sum();
    let moved = |from: u64, to: u64| -> usize {
        let (from, to) = (positions(from), positions(to));
        assert_eq!(to.values().map(BTreeSet::len).sum::<usize>(), count);
        from.iter().map(|(name, old)| old.difference(&to[name]).count()).sum()
    };
    assert_eq!((moved(1, 4), moved(5, 24), moved(25, 30)), (0, 0, 0));
    // All leave the first time but those that are among the candidates; then 0.2·(1 − 25/30) of each module at most.
    assert!(moved(4, 5) > 9 * count / 10, "{} of {count}", moved(4, 5));
    let most: usize =
        before.values().map(|set| (set.len() as f64 * 0.2 * (1.0 - 25.0 / 30.0)) as usize).sum();
    assert!(moved(24, 25) > 0 && moved(24, 25) <= most, "{} of {most}", moved(24, 25));
}

#[test]
fn the_recipe_trains_and_its_results_agree() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train("recipes/sparse.yaml", &run, &["seed=3"], &[]);
    let info: Value = serde_json::from_slice(&std::fs::read(run.join("run.json")).unwrap()).unwrap();
    let eval = metrics(&run).into_iter().rev().find_map(|line| line["eval_loss"].as_f64()).unwrap();
    let adapter = run.join("adapter").display().to_string();
    let merged = dir.path().join("merged").display().to_string();
    let restored = dir.path().join("restored").display().to_string();
    let evaluate = |args: &[&str]| -> f64 {
        let mut all = vec!["evaluate", "--data", HELD_OUT, "--type", "prompt_completion", "--json"];
        all.extend(args);
        let report: Value = serde_json::from_str(&peft_ok(&all)).unwrap();
        report["loss"].as_f64().unwrap()
    };
    let base = evaluate(&["--base-model", BASE]);
    let adapted = evaluate(&["--base-model", BASE, "--adapter", &adapter]);
    assert!(adapted < 0.9 * base, "{adapted} from {base}");
    assert!(eval < 0.9 * base);

    // K = ⌊0.05 · all parameters⌋, of which each module gets its share, rounded down.
    let sparse = SparseAdapter::open(&run.join("adapter")).unwrap();
    let parameters = open(&root().join(BASE)).parameters().iter().map(|p| p.numel() as f64).sum::<f64>();
    let (total, places) = ((0.05 * parameters) as usize, |dims: &[usize; 2]| dims[0] * dims[1]);
    let all: usize = sparse.config().shapes.values().map(places).sum();
    for (path, count) in &sparse.config().num_deltas {
        assert_eq!(*count, total * places(&sparse.config().shapes[path]) / all, "{path}");
    }
    let trained: usize = sparse.config().num_deltas.values().sum();
    assert_eq!(info["trainable_parameters"].as_u64(), Some(trained as u64));

    // Folded, the change is the same, and undone the base is what it was.
    peft_ok(&["merge", "--base-model", BASE, "--adapter", &adapter, "--output", &merged]);
    let folded = evaluate(&["--base-model", &merged]);
    assert!((folded - adapted).abs() < 1e-5, "{folded} {adapted}");
    let back = ["--unmerge", &merged, "--adapter", &adapter, "--base-model", BASE, "--output", &restored];
    peft_ok(&[&["merge"], &back[..]].concat());
    let (before, after) = (root().join(BASE), Path::new(&restored));
    let (before, after) = (Checkpoint::open(&before).unwrap(), Checkpoint::open(after).unwrap());
    for name in before.names() {
        assert_eq!(before.tensor(name).unwrap().bytes, after.tensor(name).unwrap().bytes, "{name}");
    }
    // Of the folded weights, only those at the positions have other bits.
    let folded = Checkpoint::open(Path::new(&merged)).unwrap();
    for (path, SparseModule { pattern, .. }) in sparse.modules().unwrap() {
        let bits = |checkpoint: &Checkpoint| -> Vec<u32> {
            let weight = checkpoint.tensor(&format!("{path}.weight")).unwrap().to_f32().unwrap();
            weight.into_iter().map(f32::to_bits).collect()
        };
        let (before, after) = (bits(&before), bits(&folded));
        let changed = (0..before.len()).filter(|place| before[*place] != after[*place]);
        assert!(
            changed.map(|place| place as u32).all(|place| pattern.positions().binary_search(&place).is_ok())
        );
    }

    let report = peft_ok(&["inspect", &adapter]);
    assert!(report.contains("num_deltas") && report.contains("sparse_positions"), "{report}");
}

/// The file is at most a third of SHiRA's for the same values, and what PEFT would read has the same change.
#[test]
fn the_file_is_small_and_shira_has_the_same_change() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train("tests/golden/sparse_ag.yaml", &run, &["method.values_dtype=bfloat16"], &[]);
    let adapter = SparseAdapter::open(&run.join("adapter")).unwrap();
    let shira = dir.path().join("shira");
    std::fs::create_dir(&shira).unwrap();
    let report = export_shira(&adapter, &shira).unwrap();
    let (from, to) =
        (run.join("adapter").display().to_string(), dir.path().join("again").display().to_string());
    peft_ok(&["export", &from, "--format", "peft-shira", "-o", &to]);
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let read = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
        assert_eq!(read(&shira), read(Path::new(&to)));
    }
    let file = SafetensorsFile::open(shira.join("adapter_model.safetensors")).unwrap();
    let config: Value =
        serde_json::from_slice(&std::fs::read(shira.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((config["peft_type"].as_str(), config["r"].as_u64()), (Some("SHIRA"), Some(report.r as u64)));
    let (mut ours, mut values) = (0, 0);
    for (path, SparseModule { pattern, values: expected }) in adapter.modules().unwrap() {
        let [rows, columns] = pattern.dims();
        let key = |part: &str| format!("base_model.model.{path}.{part}");
        let weights = file.tensor(&key("shira_weight")).unwrap().to_f32().unwrap();
        assert_eq!(weights.len(), report.r * (rows + columns));
        let indices = file.tensor(&key("shira_indices")).unwrap();
        assert_eq!(indices.shape, [2, weights.len()]);
        let indices: Vec<usize> = indices
            .bytes
            .chunks_exact(4)
            .map(|bytes| i32::from_le_bytes(bytes.try_into().unwrap()) as usize)
            .collect();
        let (at_row, at_column) = indices.split_at(weights.len());
        let (mut found, mut dense) = (vec![0f32; rows * columns], vec![0f32; rows * columns]);
        for ((row, column), weight) in at_row.iter().zip(at_column).zip(weights) {
            found[row * columns + column] += weight;
        }
        for (position, value) in pattern.positions().iter().zip(&expected) {
            dense[*position as usize] = *value;
        }
        assert_eq!(found, dense, "{path}");
        let own = adapter.folder();
        for part in ["sparse_values", "sparse_positions"] {
            ours += own.file.tensor(&key(part)).unwrap().bytes.len();
        }
        values += expected.len();
    }
    // A value takes four bytes there, and its two indices eight.
    assert!(3 * ours < 12 * values, "{ours} bytes for {values} values");
    println!("{ours} bytes for {values} values, SHiRA's {}", 12 * values);
}

/// What is damaged is told, with the file and what is wrong with it.
#[test]
fn damaged_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train("tests/golden/sparse_ag.yaml", &run, &["max_steps=6"], &[]);
    let adapter = run.join("adapter");
    let (config, weights) = (adapter.join("adapter_config.json"), adapter.join("adapter_model.safetensors"));
    let (good_config, good_weights) = (std::fs::read(&config).unwrap(), std::fs::read(&weights).unwrap());
    let refuses = |expected: &[&str]| {
        let (adapter, out) = (adapter.display().to_string(), dir.path().join("merged"));
        let said = peft_refuses(&[
            "merge",
            "--base-model",
            BASE,
            "--adapter",
            &adapter,
            "--output",
            &out.display().to_string(),
        ]);
        for expected in expected {
            assert!(said.contains(expected), "{expected}: {said}");
        }
        assert!(!out.exists());
    };
    let with_config = |change: &dyn Fn(&mut Value), expected: &[&str]| {
        let mut json: Value = serde_json::from_slice(&good_config).unwrap();
        change(&mut json);
        std::fs::write(&config, serde_json::to_vec(&json).unwrap()).unwrap();
        refuses(expected);
        std::fs::write(&config, &good_config).unwrap();
    };
    const MODULE: &str = "model.layers.1.mlp.up_proj";
    with_config(&|json| json["num_deltas"][MODULE] = 7.into(), &["sparse_values", "shape"]);
    with_config(&|json| json["shapes"][MODULE] = serde_json::json!([256, 95]), &[MODULE, "95"]);
    with_config(&|json| json["shapes"][MODULE] = serde_json::json!([1, 2]), &[MODULE]);
    with_config(&|json| drop(json["shapes"].as_object_mut().unwrap().remove(MODULE)), &[MODULE, "shapes"]);
    with_config(&|json| drop(json.as_object_mut().unwrap().remove("num_deltas")), &["num_deltas"]);
    with_config(&|json| json["base_tensors_sha256"] = "0".repeat(64).into(), &["base"]);

    // A byte of a module's positions, which its stream cannot hide.
    let file = SafetensorsFile::open(&weights).unwrap();
    let stream = file.tensor(&format!("base_model.model.{MODULE}.sparse_positions")).unwrap().bytes.to_vec();
    drop(file);
    let at = good_weights.windows(stream.len()).position(|window| window == stream).unwrap();
    let mut damaged = good_weights.clone();
    damaged[at + stream.len() / 2] ^= 0x10;
    std::fs::write(&weights, &damaged).unwrap();
    refuses(&[MODULE, "sparse_positions", "adapter_model.safetensors"]);
    std::fs::write(&weights, &good_weights).unwrap();
    let (adapter, out) = (adapter.display().to_string(), dir.path().join("merged").display().to_string());
    peft_ok(&["merge", "--base-model", BASE, "--adapter", &adapter, "--output", &out]);
}

/// Keys out of range or at odds with each other or with the base are refused before anything is loaded or written.
#[test]
fn bad_recipes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run").display().to_string();
    let refuses = |overrides: &[&str], expected: &[&str]| {
        let mut args = vec!["train", "recipes/sparse.yaml", "--output-dir", &out];
        for entry in overrides {
            args.extend(["--override", entry]);
        }
        let said = peft_refuses(&args);
        for expected in expected {
            assert!(said.contains(expected), "{overrides:?}, {expected}: {said}");
        }
    };
    for (entry, expected) in [
        ("method.density=0", "density is 0"),
        ("method.density=1.5", "density is 1.5"),
        ("method.density=1", "lower density"),
        ("method.selection_accumulation_steps=20", "reselection_steps, which is 20"),
        ("method.selection_accumulation_steps=0", "selection_accumulation_steps is 0"),
        ("method.initial_reselection_rate=1.1", "initial_reselection_rate is 1.1"),
        ("method.momentum=0.5", "moment_approximation"),
        ("method.eps=0", "eps is 0"),
        ("method.num_tunable_weights=5", "keep one"),
        ("method.criterion=rigl", "criterion"),
        ("method.densty=0.1", "density"),
        ("method.target_modules=[lm_head]", "tie_word_embeddings"),
        ("method.target_modules=[embed_tokens]", "embedding"),
        ("method.target_modules=[q_prj]", "q_proj"),
        ("adapter_name_or_path=tests/golden/adapters/qv", "not a sparse adapter"),
    ] {
        refuses(&[entry], &[expected]);
    }
    refuses(&["method.density=1e-9"], &["no value"]);
    // A module whose share is less than a value gets none, and the plan says so.
    let overrides = ["--override", "method.density=null", "--override", "method.num_tunable_weights=80"];
    let plan = peft_ok(&[&["plan", "recipes/sparse.yaml"], &overrides[..]].concat());
    assert!(plan.contains("unchanged: k_proj, v_proj"), "{plan}");
}

/// A run that ends with its first choice of positions is refused before a step is run, whether its length is given in steps
/// or follows from the data; one step more is enough (`damaged_files_are_refused` trains six).
#[test]
fn a_run_too_short_to_choose_positions_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let out_dir = out.display().to_string();
    let train = ["train", "recipes/sparse.yaml", "--output-dir", &out_dir];
    for (overrides, numbers) in [
        (&["max_steps=5"][..], ["has 5 steps", "after step 5"]),
        (&["max_steps=19", "method.selection_accumulation_steps=19"][..], ["has 19 steps", "after step 19"]),
        // Three batches of eight.
        (&["datasets.0.limit=24", "num_epochs=1"][..], ["has 3 steps", "after step 5"]),
    ] {
        let overrides: Vec<&str> = overrides.iter().flat_map(|entry| ["--override", *entry]).collect();
        for command in [&train[..], &["plan", "recipes/sparse.yaml"]] {
            let said = peft_refuses(&[command, &overrides[..]].concat());
            let place = ["recipes/sparse.yaml", "selection_accumulation_steps"];
            for expected in numbers.into_iter().chain(place) {
                assert!(said.contains(expected), "{expected}: {said}");
            }
        }
        assert!(!out.exists());
    }
}
