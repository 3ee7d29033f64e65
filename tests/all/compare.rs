//! `peft compare`: every run is an ordinary one, the table is what the runs' files say, and what is done is not done again.

use crate::program::{BASE, HELD_OUT, metrics};
use crate::report::{assert_well_formed, in_chromium};
use peft_tests::{peft, peft_ok, peft_refuses, program, root};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A comparison of a few steps over these methods, rates and seeds; its file and its output folder.
fn comparison(dir: &Path, compare: Value, keys: Value) -> (String, PathBuf) {
    let out = dir.join("out");
    let mut recipe = json!({
        "base_model": BASE,
        "datasets": [{"path": "recipes/quickstart/train.jsonl", "type": "prompt_completion", "limit": 40}],
        "eval_datasets": [{"path": HELD_OUT, "type": "prompt_completion", "limit": 6}],
        "max_steps": 3,
        "micro_batch_size": 4,
        "eval_generations": 2,
        "output_dir": out,
        "compare": compare,
    });
    let (Value::Object(all), Value::Object(keys)) = (&mut recipe, keys) else { unreachable!() };
    all.extend(keys);
    // JSON is YAML.
    let path = dir.join("compare.yaml");
    std::fs::write(&path, recipe.to_string()).unwrap();
    (path.display().to_string(), out)
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Mean and sample standard deviation.
fn spread(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (values.len() - 1) as f64;
    (mean, variance.sqrt())
}

/// The cells of a method's row in the Markdown.
fn row(markdown: &str, label: &str) -> Vec<String> {
    let line = markdown.lines().find(|line| line.starts_with(&format!("| {label} |"))).expect("a row");
    line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_string()).collect()
}

#[test]
fn the_table_is_what_the_runs_files_say() {
    let dir = tempfile::tempdir().unwrap();
    let compare = json!({
        "seeds": [1, 2],
        "learning_rates": [1e-3, 2e-2],
        "methods": [
            {"method": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}},
            {"method": "norm_only", "label": "norms"},
            {"method": {"type": "lora", "r": 4}, "label": "wild", "learning_rates": [1e39]},
            {"method": "bitfit", "learning_rates": [1e-2]},
        ],
    });
    let (recipe, out) = comparison(dir.path(), compare, json!({}));
    let said = peft_ok(&["compare", &recipe]);
    let markdown = std::fs::read_to_string(out.join("comparison.md")).unwrap();
    println!("{said}\n{markdown}");

    let mut first_speed = None;
    for label in ["lora", "norms"] {
        // The last evaluation of every run, by rate.
        let after = |rate: &str, key: &str| -> Vec<f64> {
            let last = |seed: &u64| {
                let lines = metrics(&out.join(format!("runs/{label}-{rate}-{seed}")));
                lines.iter().rev().find_map(|line| line[key].as_f64()).unwrap()
            };
            [1, 2].iter().map(last).collect()
        };
        let mean = |rate| spread(&after(rate, "eval_loss")).0;
        let best = if mean("1e-3") <= mean("2e-2") { "1e-3" } else { "2e-2" };
        let cells = row(&markdown, label);
        let (loss, deviation) = spread(&after(best, "eval_loss"));
        assert_eq!(cells[1..3], [best.to_string(), format!("{loss:.4} ± {deviation:.4}")]);
        for (cell, key) in [(3, "eval_token_accuracy"), (4, "eval_exact_match")] {
            let (share, deviation) = spread(&after(best, key));
            assert_eq!(cells[cell], format!("{:.1} ± {:.1} %", 100.0 * share, 100.0 * deviation), "{key}");
        }
        let run = out.join(format!("runs/{label}-{best}-1"));
        let info = json_of(&run.join("run.json"));
        let trained = info["trainable_parameters"].as_u64().unwrap().to_string();
        assert_eq!(cells[5].replace(',', ""), trained);
        // Speed from the steps after the first, of both seeds.
        let speeds: Vec<f64> = [1, 2]
            .iter()
            .map(|seed| {
                let lines = metrics(&out.join(format!("runs/{label}-{best}-{seed}")));
                let steps = lines.iter().filter(|line| line["step"].as_u64() > Some(1));
                let of = |line: &Value| Some((line["tokens"].as_f64()?, line["tokens_per_second"].as_f64()?));
                let steps: Vec<(f64, f64)> = steps.filter_map(of).collect();
                let seconds: f64 = steps.iter().map(|(tokens, speed)| tokens / speed).sum();
                steps.iter().map(|(tokens, _)| tokens).sum::<f64>() / seconds
            })
            .collect();
        let shown: u64 = cells[9].split(' ').next().unwrap().replace(',', "").parse().unwrap();
        assert!((shown as f64 - spread(&speeds).0).abs() <= 0.5 + 1e-6, "{shown} {speeds:?}");
        // Relative to the first method, whose speed another may chance to have.
        let relative = cells[9].split(['(', '×']).nth(1).unwrap();
        let expected = spread(&speeds).0 / *first_speed.get_or_insert(spread(&speeds).0);
        assert!((relative.parse::<f64>().unwrap() - expected).abs() <= 0.005 + 1e-6, "{relative} {expected}");
        assert!(label != "lora" || cells[9].ends_with("(1.00×)"), "{}", cells[9]);
    }
    // Failures are rows with their reasons.
    assert!(
        row(&markdown, "wild")[1].contains("no result") && row(&markdown, "bitfit")[1].contains("no result")
    );
    assert!(markdown.contains("wild: rate 1e39 failed: ") && markdown.contains("(2 seeds)"), "{markdown}");
    assert!(markdown.lines().any(|line| line.contains("bitfit: rate 1e-2 failed") && line.contains("bias")));
    assert!(said.contains("lowest mean validation loss") && said.contains("comparison.html"));

    // A run is what `peft train` makes of the recipe beside it, to the byte.
    let alone = dir.path().join("alone").display().to_string();
    let beside = out.join("runs/norms-2e-2-2.yaml").display().to_string();
    peft_ok(&["train", &beside, "--output-dir", &alone]);
    let adapter = |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(Path::new(&alone)), adapter(&out.join("runs/norms-2e-2-2")));

    // The form of PEFT's own comparison.
    let result = json_of(&out.join("results/lora-1e-3-2.json"));
    let (run, train) = (&result["run_info"], &result["train_info"]);
    assert_eq!(train["status"], "success");
    assert_eq!(run["peft_config"]["peft_type"], "LORA");
    assert_eq!((&run["train_config"]["seed"], &run["train_config"]["max_steps"]), (&json!(2), &json!(3)));
    assert_eq!(run["train_config"]["optimizer_kwargs"]["lr"], 1e-3);
    let file = out.join("runs/lora-1e-3-2/adapter/adapter_model.safetensors");
    assert_eq!(train["file_size"], file.metadata().unwrap().len());
    let last = train["metrics"].as_array().unwrap().last().unwrap();
    let lines = metrics(&out.join("runs/lora-1e-3-2"));
    let sum = |key: &str| lines.iter().filter_map(|line| line[key].as_f64()).sum::<f64>();
    assert_eq!(last["train total tokens"].as_f64(), Some(sum("tokens")));
    assert!((last["train loss"].as_f64().unwrap() - sum("loss") / 3.0).abs() < 1e-12);
    assert!(last["test accuracy"].is_number() && last["train samples"] == 12);
    assert_eq!(json_of(&out.join("results/wild-1e39-1.json"))["train_info"]["status"], "failed");

    // The page.
    let page = out.join("comparison.html");
    let html = std::fs::read_to_string(&page).unwrap();
    assert_well_formed(&html);
    for part in
        ["Trained parameters", "Peak memory", "Speed", "Rates tried", "<svg", "runs/norms-2e-2-2/report.html"]
    {
        assert!(html.contains(part), "no {part}");
    }
    assert!(!html.contains("http://") && !html.contains("https://"));
    if let Some((dom, complaints)) = in_chromium(&page, &dir.path().join("profile")) {
        assert_eq!(complaints, "");
        assert!(dom.contains("Comparison of methods") && dom.contains("class=\"script\""));
    }

    // The same from what is there, without a run; and the failed ones are tried again, the others not.
    let written = |name: &str| std::fs::read(out.join("runs").join(name).join("run.json")).unwrap();
    let before = written("lora-2e-2-1");
    peft_ok(&["compare", &recipe, "--summary"]);
    assert_eq!(std::fs::read_to_string(out.join("comparison.md")).unwrap(), markdown);
    assert_eq!(std::fs::read_to_string(&page).unwrap(), html);
    let again: Value = serde_json::from_str(&peft_ok(&["compare", &recipe, "--json"])).unwrap();
    assert_eq!(again["methods"][0]["label"], "lora");
    assert_eq!(again["methods"][2]["figures"], Value::Null);
    assert_eq!(written("lora-2e-2-1"), before);

    // Another recipe is another run: it is run afresh, and the earlier one is kept.
    let one = [
        "compare.methods=[{method: norm_only, label: norms}]",
        "compare.learning_rates=[2e-2]",
        "max_steps=2",
    ];
    peft_ok(&[&["compare", recipe.as_str(), "--override"][..], &one].concat());
    assert_eq!(json_of(&out.join("runs/norms-2e-2-1/run.json"))["total_steps"], 2);
    assert!(out.join("runs/norms-2e-2-1/previous-1/run.json").is_file());
}

/// Asks the program to stop once `ready` says so; what it wrote to stderr.
fn stopped(args: &[&str], ready: impl Fn() -> bool) -> String {
    let mut command = Command::new(program());
    command.current_dir(root()).args(args).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < Duration::from_secs(300), "the comparison hangs");
        std::thread::sleep(Duration::from_millis(2));
    }
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let ended = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(143), "{stderr}");
    stderr
}

#[test]
fn a_stopped_comparison_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let compare = json!({
        "seeds": [1, 2],
        "learning_rates": [1e-3, 1e-2],
        "methods": [{"method": "lora"}, {"method": "ia3"}],
    });
    let (recipe, out) = comparison(dir.path(), compare, json!({"max_steps": 8, "eval_generations": 0}));
    // In the middle of the second run, or of whichever runs by then.
    let stderr = stopped(&["compare", &recipe], || out.join("runs/lora-1e-3-2/metrics.jsonl").exists());
    assert!(stderr.contains("stopped by SIGTERM") && stderr.contains("the same command goes on"), "{stderr}");
    let markdown = std::fs::read_to_string(out.join("comparison.md")).unwrap();
    assert!(markdown.contains("is not run to its end"), "{markdown}");

    // What was finished stays as it was, to the byte with its times; what was stopped has saved and goes on.
    let first = out.join("runs/lora-1e-3-1");
    let finished = |run: &Path| {
        let info = json_of(&run.join("run.json"));
        info["result"].is_object()
    };
    assert!(finished(&first));
    let files = ["run.json", "metrics.jsonl", "adapter/adapter_model.safetensors"];
    let read = |run: &Path| files.map(|name| std::fs::read(run.join(name)).unwrap());
    let modified = |run: &Path| files.map(|name| run.join(name).metadata().unwrap().modified().unwrap());
    let (bytes, times) = (read(&first), modified(&first));
    let out_2 = peft(&["compare", &recipe]);
    let stderr = String::from_utf8_lossy(&out_2.stderr).into_owned();
    assert!(out_2.status.success(), "{stderr}");
    assert!(
        stderr.contains("lora-1e-3-1 · validation loss") && stderr.contains("finished earlier"),
        "{stderr}"
    );
    assert!(!stderr.contains("warning"), "nothing had to make room: {stderr}");
    assert!(read(&first) == bytes && modified(&first) == times, "a finished run was run again");
    for rate in ["1e-3", "1e-2"] {
        for (label, seed) in [("lora", 1), ("lora", 2), ("ia3", 1), ("ia3", 2)] {
            let run = out.join(format!("runs/{label}-{rate}-{seed}"));
            assert!(finished(&run), "{label} {rate} {seed}");
            let steps: Vec<u64> = metrics(&run)
                .iter()
                .filter(|line| line["loss"].is_number())
                .map(|line| line["step"].as_u64().unwrap())
                .collect();
            assert_eq!(steps, (1..=8).collect::<Vec<u64>>(), "{label} {rate} {seed}");
        }
    }
    let log = std::fs::read_to_string(out.join("runs/lora-1e-3-2.log")).unwrap();
    assert!(!out.join("runs/lora-1e-3-2/previous-1").exists(), "{log}");
}

#[test]
fn runs_made_at_once_are_those_made_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let compare = json!({"seeds": [1, 2], "learning_rates": [1e-3], "methods": [{"method": "lora"}, {"method": "ia3"}]});
    let (recipe, out) = comparison(dir.path(), compare, json!({"max_steps": 8, "eval_generations": 0}));
    let runs =
        ["lora-1e-3-1", "lora-1e-3-2", "ia3-1e-3-1", "ia3-1e-3-2"].map(|name| out.join("runs").join(name));
    // Once two are under way, all of them save and end.
    let under_way = || runs.iter().filter(|run| run.join("metrics.jsonl").exists()).count();
    let stderr = stopped(&["compare", &recipe, "--jobs", "2"], || under_way() >= 2);
    assert!(runs[..2].iter().all(|run| run.join("checkpoints").exists()), "{stderr}");

    let said = peft_ok(&["compare", &recipe, "--jobs", "4"]);
    let markdown = std::fs::read_to_string(out.join("comparison.md")).unwrap();
    assert!(said.contains("runs went on at once") && markdown.contains("runs went on at once"), "{said}");
    let alone = dir.path().join("alone");
    let said = peft_ok(&["compare", &recipe, "--output-dir", &alone.display().to_string()]);
    assert!(!said.contains("at once"), "{said}");
    for run in &runs {
        let other = alone.join("runs").join(run.file_name().unwrap());
        let adapter = |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
        assert!(adapter(run) == adapter(&other), "{}", run.display());
        let steps = metrics(run).iter().filter(|line| line["loss"].is_number()).count();
        assert_eq!(steps, 8, "{}", run.display());
    }
    let labels = |text: &str| -> Vec<String> {
        let rows = text.lines().filter(|line| line.starts_with("| ")).skip(1);
        rows.map(|line| line.split(' ').nth(1).unwrap().to_string()).collect()
    };
    assert_eq!(labels(&markdown), ["lora", "ia3"]);
}

#[test]
fn mistakes_in_the_recipe_name_file_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let methods = json!([{"method": "lora"}]);
    let refused = [
        (
            json!({"methods": methods, "seed": [1]}),
            json!({}),
            "unknown key `compare.seed` (did you mean `seeds`?)",
        ),
        (json!({"methods": [{"method": {"type": "loar"}}]}), json!({}), "did you mean `lora`?"),
        (json!({"methods": methods}), json!({"eval_datasets": []}), "`val_set_size`"),
        (json!({"methods": methods}), json!({"base_model": "no/where/base"}), "no/where/base"),
    ];
    for (compare, keys, expected) in refused {
        let (recipe, out) = comparison(dir.path(), compare, keys);
        let said = peft_refuses(&["compare", &recipe, "--offline"]);
        assert!(said.contains(expected), "{said}");
        assert!(!out.exists(), "{expected}: something was written");
    }
    let said = peft_refuses(&["train", "recipes/compare.yaml"]);
    assert!(said.contains("recipes/compare.yaml") && said.contains("peft compare"), "{said}");
    let said = peft_refuses(&["compare", "recipes/vera.yaml"]);
    assert!(said.contains("recipes/vera.yaml") && said.contains("`compare` is missing"), "{said}");
}

#[test]
fn the_recipes_compare_every_kind_of_method() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let kinds = ["lora", "lora_xs", "lora_sb", "vera", "nola", "lamda", "sparse", "ia3", "norm_only", "full"];
    // Bases and data that a clone does not have are exchanged.
    let base = format!("base_model={BASE}");
    let data = "[{path: recipes/quickstart/held_out.jsonl, type: prompt_completion}]";
    let (train, held_out) = (format!("datasets={data}"), format!("eval_datasets={data}"));
    let present = ["--override", &base, &train, &held_out];
    let (low_rank, bitfit) = (&["lora", "lora_r1", "lora_xs", "lora_sb"][..], &["bitfit"][..]);
    for (recipe, overrides, kinds, without_biases, missing) in [
        ("recipes/compare.yaml", &present[..0], &kinds[..], bitfit, "(3 seeds)"),
        ("recipes/compare_smollm2.yaml", &present[..], &kinds[..], bitfit, "(2 seeds)"),
        ("recipes/compare_gsm8k.yaml", &present[..], low_rank, &[], "(2 seeds)"),
        ("recipes/compare_cost.yaml", &present[..], &kinds[..], &[], "is not run to its end"),
    ] {
        let args = ["compare", recipe, "--output-dir", &out, "--summary", "--json"];
        let said: Value = serde_json::from_str(&peft_ok(&[&args[..], overrides].concat())).unwrap();
        let labels: Vec<&str> =
            said["methods"].as_array().unwrap().iter().map(|row| row["label"].as_str().unwrap()).collect();
        for label in kinds.iter().chain(without_biases) {
            assert!(labels.contains(label), "{recipe}: no {label} in {labels:?}");
        }
        assert!(said["methods"][0]["remarks"][0].as_str().unwrap().contains(missing), "{recipe}: {said}");
    }
}
