//! Runs that survive being killed, stopped and resumed: they end as if nothing had happened, to the byte.

use crate::program::{BASE, HELD_OUT, metrics};
use peft_tests::{peft, peft_ok, program, root};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const RECIPE: &str = "tests/resume.yaml";

/// `peft train` on this file's recipe, ready to be started.
fn train_command(dir: &Path, overrides: &[&str], resume: bool) -> Command {
    let mut command = Command::new(program());
    command.current_dir(root()).args(["train", RECIPE, "--output-dir"]).arg(dir);
    for entry in overrides {
        command.args(["--override", entry]);
    }
    if resume {
        command.args(["--resume", "auto"]);
    }
    command
}

/// Trains to the end; returns stdout and stderr.
fn train(dir: &Path, overrides: &[&str], resume: bool) -> (String, String) {
    let out = train_command(dir, overrides, resume).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{:?}: {stderr}", out.status);
    (stdout.into_owned(), stderr.into_owned())
}

/// Starts training; its stderr goes to a file beside `dir`.
fn start(dir: &Path, overrides: &[&str], resume: bool) -> Child {
    let log = std::fs::File::create(dir.with_extension("stderr")).unwrap();
    train_command(dir, overrides, resume).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

fn said(dir: &Path) -> String {
    std::fs::read_to_string(dir.with_extension("stderr")).unwrap()
}

/// Waits until `reached`, or the process has ended.
fn wait_for(child: &mut Child, reached: &dyn Fn() -> bool) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if reached() {
            return None;
        }
        assert!(start.elapsed() < Duration::from_secs(300), "the run hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn checkpoints(dir: &Path) -> Vec<String> {
    names(&dir.join("checkpoints"))
}

fn lines(dir: &Path, file: &str) -> usize {
    let bytes = std::fs::read(dir.join(file)).unwrap_or_default();
    bytes.iter().filter(|byte| **byte == b'\n').count()
}

/// Everything about a finished run that does not depend on the clock.
#[derive(Debug, PartialEq)]
struct Results {
    adapter: BTreeMap<String, Vec<u8>>,
    metrics: Vec<Value>,
    generations: Vec<u8>,
    result: Value,
}

fn results(dir: &Path) -> Results {
    let adapter = dir.join("adapter");
    let files =
        names(&adapter).into_iter().map(|name| (name.clone(), std::fs::read(adapter.join(name)).unwrap()));
    let timeless = |mut value: Value, keys: &[&str]| {
        value.as_object_mut().unwrap().retain(|key, _| !keys.contains(&key.as_str()));
        value
    };
    let info: Value = serde_json::from_slice(&std::fs::read(dir.join("run.json")).unwrap()).unwrap();
    let of_process = ["seconds", "tokens", "peak_memory_bytes", "artifact"];
    Results {
        adapter: files.collect(),
        metrics: metrics(dir)
            .into_iter()
            .map(|line| timeless(line, &["tokens_per_second", "peak_memory_bytes"]))
            .collect(),
        generations: std::fs::read(dir.join("generations.jsonl")).unwrap_or_default(),
        result: timeless(info["result"].clone(), &of_process),
    }
}

/// When a run is killed.
#[derive(Debug, Clone, Copy)]
enum Kill {
    /// So many milliseconds after `metrics.jsonl` has so many lines.
    After(usize, u64),
    /// Once `metrics.jsonl` has so many lines.
    Lines(usize),
    /// While the checkpoint of this step is written.
    Saving(u64),
    /// Once the checkpoint of this step is there.
    Saved(u64),
    /// Once so many answers are written.
    Answers(usize),
    /// While the adapter is written.
    Exporting,
    /// Once the adapter is there.
    Exported,
}

impl Kill {
    fn is_reached(self, dir: &Path) -> bool {
        let step = |step: u64| format!("step-{step:08}");
        match self {
            Kill::After(count, _) | Kill::Lines(count) => lines(dir, "metrics.jsonl") >= count,
            Kill::Saving(at) => {
                let prefix = format!(".{}.partial-", step(at));
                checkpoints(dir).iter().any(|name| name.starts_with(&prefix))
            }
            Kill::Saved(at) => checkpoints(dir).contains(&step(at)),
            Kill::Answers(count) => lines(dir, "generations.jsonl") >= count,
            // The trial save before the first step is not meant.
            Kill::Exporting => {
                !checkpoints(dir).is_empty()
                    && lines(dir, "metrics.jsonl") > 12
                    && names(dir).iter().any(|name| name.starts_with(".adapter.partial-"))
            }
            Kill::Exported => dir.join("adapter").exists(),
        }
    }
}

/// Starts a run, kills it, resumes it to its end, and compares. Returns a row of the record: where the kill hit, and
/// whether all is the same.
fn kill_and_resume(dir: &Path, kill: Kill, expected: &Results) -> (String, bool) {
    let mut child = start(dir, &[], true);
    let ended = wait_for(&mut child, &|| kill.is_reached(dir));
    if let Kill::After(_, millis) = kill {
        std::thread::sleep(Duration::from_millis(millis));
    }
    let hit = if ended.is_some() { "ended before" } else { "killed" };
    child.kill().ok();
    child.wait().unwrap();
    let state = format!(
        "{hit}; {} lines, {} answers, checkpoints [{}], left [{}]",
        lines(dir, "metrics.jsonl"),
        lines(dir, "generations.jsonl"),
        checkpoints(dir).join(" "),
        names(dir)
            .into_iter()
            .filter(|name| name.starts_with('.') || name == "adapter")
            .collect::<Vec<_>>()
            .join(" ")
    );
    let started_at = |dir: &Path| -> Option<u64> {
        let bytes = std::fs::read(dir.join("run.json")).ok()?;
        serde_json::from_slice::<Value>(&bytes).ok()?["started_at"].as_u64()
    };
    let first = started_at(dir);
    train(dir, &[], true);
    if first.is_some() {
        assert_eq!(started_at(dir), first, "{kill:?}");
    }
    let hidden: Vec<String> =
        names(dir).into_iter().chain(checkpoints(dir)).filter(|name| name.starts_with('.')).collect();
    assert!(hidden.is_empty(), "{kill:?} leaves {hidden:?}");
    assert!(!dir.join("previous-1").exists(), "{kill:?} moves a run aside");
    (state, results(dir) == *expected)
}

fn kills(points: &[Kill]) {
    let dir = tempfile::tempdir().unwrap();
    let whole_dir = dir.path().join("whole");
    train(&whole_dir, &[], false);
    let expected = results(&whole_dir);
    assert_eq!((expected.metrics.len(), lines(&whole_dir, "generations.jsonl")), (17, 6));
    let best = expected.result["best"]["step"].as_u64().unwrap();
    assert!(best < 12 && expected.result["exported_step"].as_u64() == Some(best), "{}", expected.result);
    let mut same = 0;
    for (number, kill) in points.iter().enumerate() {
        let (state, identical) = kill_and_resume(&dir.path().join(format!("{number}")), *kill, &expected);
        println!(
            "{:>2} {:<14} {}: {state}",
            number + 1,
            format!("{kill:?}"),
            if identical { "same" } else { "DIFFERENT" }
        );
        same += usize::from(identical);
    }
    println!("{same} of {} the same", points.len());
    assert_eq!(same, points.len());
}

#[test]
fn a_killed_run_ends_as_the_whole_one() {
    kills(&[Kill::Lines(2), Kill::Saving(4), Kill::Lines(8), Kill::Answers(4)]);
}

/// The long version, for the record: `cargo test --release -p peft-tests thirty -- --ignored --nocapture`.
#[test]
#[ignore = "takes minutes"]
fn thirty_kills() {
    let after = [(0, 5), (1, 20), (3, 15), (6, 30), (8, 10), (11, 25), (14, 20), (16, 15)];
    let mut points: Vec<Kill> = after.map(|(lines, millis)| Kill::After(lines, millis)).to_vec();
    points.extend([1, 2, 4, 5, 9, 13, 16, 17].map(Kill::Lines));
    points.extend([0, 2, 4, 6, 8, 12].map(Kill::Saving));
    points.extend([2, 6, 10, 12].map(Kill::Saved));
    points.extend([Kill::Answers(2), Kill::Answers(4), Kill::Exporting, Kill::Exported]);
    kills(&points);
}

/// The exit code of a run that gets `signal` once `reached`, and what it said.
fn signalled(
    dir: &Path,
    overrides: &[&str],
    signal: &str,
    reached: &dyn Fn() -> bool,
) -> (Option<i32>, String) {
    let mut child = start(dir, overrides, true);
    assert_eq!(wait_for(&mut child, reached), None, "{}", said(dir));
    let sent = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    (child.wait().unwrap().code(), said(dir))
}

#[test]
fn a_run_stopped_within_a_step_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    // An epoch is one step of fifteen micro-batches.
    let overrides = ["gradient_accumulation_steps=15", "max_steps=3", "eval_on_start=false", "eval_steps=2"];
    train(&whole, &overrides, false);
    // A signal may come just between two steps: then the next attempt waits a little longer.
    let stop = |attempt: u32| {
        let _ = std::fs::remove_dir_all(&parts);
        let begun = std::cell::Cell::new(None);
        let within = || {
            let first = begun.get().or_else(|| (lines(&parts, "metrics.jsonl") >= 1).then(Instant::now));
            begun.set(first);
            first.is_some_and(|first| first.elapsed() >= Duration::from_millis(40) * attempt)
        };
        signalled(&parts, &overrides, "TERM", &within)
    };
    let within = |stderr: &str| stderr.contains("stopped by SIGTERM after step 1 of 3, with ");
    let (code, stderr) =
        (1..9).map(stop).find(|(_, stderr)| within(stderr)).expect("one of eight signals meets a step");
    assert_eq!(code, Some(143), "{stderr}");
    assert!(stderr.contains("of 15 micro-batches of the next step"), "{stderr}");
    assert!(!parts.join("adapter").exists());
    let state = parts.join("checkpoints/step-00000001/state.safetensors");
    let state = peft_core::checkpoint::SafetensorsFile::open(state).unwrap();
    assert!(state.names().any(|name| name.starts_with("gradient/")));
    // The command that was printed is the one that goes on.
    let command = stderr.lines().last().unwrap().trim();
    let resumed = Command::new("sh").args(["-c", command]).current_dir(root()).output().unwrap();
    let stderr = String::from_utf8_lossy(&resumed.stderr);
    assert!(resumed.status.success(), "{command}: {stderr}");
    assert!(stderr.contains("continuing after step 1 of 3"), "{stderr}");
    assert_eq!(results(&whole), results(&parts));
}

#[test]
fn a_run_stopped_within_an_evaluation_does_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let overrides = ["eval_batch_size=1", "max_steps=2", "eval_generations=24", "eval_datasets.0.limit=200"];
    train(&whole, &overrides, false);
    // Signals are listened to before this file appears, and the evaluation comes next.
    let (code, stderr) = signalled(&parts, &overrides, "INT", &|| parts.join("run.json").exists());
    assert_eq!(code, Some(130), "{stderr}");
    assert!(stderr.contains("stopped by SIGINT after step 0 of 2\n"), "{stderr}");
    assert_eq!((lines(&parts, "metrics.jsonl"), checkpoints(&parts)), (0, vec!["step-00000000".to_string()]));
    train(&parts, &overrides, true);
    assert_eq!(results(&whole), results(&parts));
}

#[test]
fn a_finished_run_finishes_again_and_can_go_back() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    train(&run, &["save_total_limit=null"], false);
    let whole = results(&run);
    train(&run, &["save_total_limit=null"], true);
    assert_eq!(results(&run), whole);
    // Even when the result and a part of the last line are gone.
    std::fs::remove_dir_all(run.join("adapter")).unwrap();
    let text = std::fs::read(run.join("metrics.jsonl")).unwrap();
    std::fs::write(run.join("metrics.jsonl"), [&text[..], b"{\"step\": 13, \"lo"].concat()).unwrap();
    train(&run, &["save_total_limit=null"], true);
    assert_eq!(results(&run), whole);

    let from = run.join("checkpoints/step-00000004").display().to_string();
    let out =
        train_command(&run, &["save_total_limit=null"], false).args(["--resume", &from]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(results(&run), whole);
    assert!(run.join("previous-1/checkpoints/step-00000012").is_dir());
}

#[test]
fn the_best_state_is_kept_and_exported_and_patience_ends() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let overrides = [
        "eval_steps=1",
        "save_steps=3",
        "save_total_limit=1",
        "early_stopping_patience=3",
        "metric_for_best_model=eval_loss",
        "learning_rate=4e-2",
        "lr_scheduler=constant",
        "max_steps=40",
        "eval_on_start=false",
    ];
    let (stdout, _) = train(run, &overrides, false);
    let losses: Vec<(u64, f64)> = metrics(run)
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line["eval_loss"].as_f64()?)))
        .collect();
    let best = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let last = losses.last().unwrap().0;
    // No gain three times in a row, and never before.
    assert_eq!(last, best.0 + 3, "{losses:?}");
    assert!(last < 40 && stdout.contains("stopped early"), "{stdout}");
    assert!(stdout.contains(&format!("at step {0}; exported: step {0}", best.0)), "{stdout}");
    let step = |step: u64| format!("step-{step:08}");
    assert_eq!(checkpoints(run), [step(best.0), step(last)]);
    let adapter = |dir: PathBuf| std::fs::read(dir.join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter(run.to_path_buf()), adapter(run.join("checkpoints").join(step(best.0))));
    let path = run.join("adapter").display().to_string();
    let evaluation: Value = serde_json::from_str(&peft_ok(&[
        "evaluate",
        "--base-model",
        BASE,
        "--adapter",
        &path,
        "--data",
        HELD_OUT,
        "--type",
        "prompt_completion",
        "--limit",
        "24",
        "--batch-size",
        "4",
        "--json",
    ]))
    .unwrap();
    assert_eq!(evaluation["loss"].as_f64(), Some(best.1));

    // Without it the last state is the result.
    let plain = tempfile::tempdir().unwrap();
    let overrides = [&overrides[..], &["load_best_model_at_end=false"]].concat();
    train(plain.path(), &overrides, false);
    assert_eq!(adapter(plain.path().to_path_buf()), adapter(run.join("checkpoints").join(step(last))));
}

#[test]
fn a_resume_under_another_recipe_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &["max_steps=2"], false);
    let before = results(dir.path());
    let refuses = |overrides: &[&str], expected: &[&str]| {
        let out = train_command(dir.path(), overrides, true).output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{stderr}");
        println!("{}", stderr.lines().last().unwrap_or_default());
        for part in expected {
            assert!(stderr.contains(part), "no `{part}` in: {stderr}");
        }
    };
    refuses(&["max_steps=9"], &["lr_scheduler cosine depend, was 2, is 9", "state.json"]);
    let max = "max_steps=2";
    refuses(&[max, "gradient_accumulation_steps=2"], &["gradient_accumulation_steps was 3, is 2"]);
    refuses(
        &[max, "method.r=8", "learning_rate=1e-3"],
        &["method.r was 4, is 8", "learning_rate was 0.06, is 0.001", "; "],
    );
    refuses(
        &[max, "datasets.0.limit=59"],
        &["datasets.0.limit was 60, is 59", "tokenised training data was "],
    );
    refuses(&[max, "eval_datasets.0.limit=8"], &["eval_datasets.0.limit was 24, is 8"]);
    refuses(&[max, "on_truncation=left"], &["on_truncation was not set, is left"]);
    refuses(&[max, "max_grad_norm=null"], &["max_grad_norm was 1.0, is not set"]);
    assert_eq!(results(dir.path()), before, "a refusal changes nothing");

    let state = dir.path().join("checkpoints/step-00000002/state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, text.replace("\"version of peft\": \"", "\"version of peft\": \"0.0.")).unwrap();
    let (_, stderr) = train(dir.path(), &[max], true);
    assert!(stderr.contains("warning: ") && stderr.contains("version of peft was 0.0."), "{stderr}");
    std::fs::write(&state, &text[..text.len() / 2]).unwrap();
    refuses(&[max], &["state.json", "not a saved state"]);
}

#[test]
fn a_save_that_must_fail_fails_before_the_first_step() {
    let fails = |dir: &TempDir, out: &Path, limit: &str, code: i32| {
        let script = format!(
            "trap '' XFSZ; ulimit -f {limit}; exec {} train {RECIPE} --output-dir {} --resume auto",
            program().display(),
            out.display()
        );
        let out = Command::new("sh").args(["-c", &script]).current_dir(root()).output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{stderr}");
        assert!(!stderr.contains("step     0") && !stderr.contains("panicked"), "{stderr}");
        println!("{}", stderr.lines().last().unwrap_or_default());
        assert!(!dir.path().join("out/metrics.jsonl").exists());
        stderr
    };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // Files of 32 KiB at most, in 512-byte blocks, stand in for a full disk.
    assert!(fails(&dir, &out, "64", 1).contains("cannot write"));
    // No place for checkpoints.
    std::fs::remove_dir_all(out.join("checkpoints")).unwrap();
    std::fs::write(out.join("checkpoints"), "").unwrap();
    assert!(fails(&dir, &out, "unlimited", 2).contains("checkpoints"));
    // A place that cannot be is a mistake of the recipe's.
    let nowhere = out.join("checkpoints/below-a-file");
    assert!(fails(&dir, &nowhere, "unlimited", 2).contains("below-a-file"));
}

#[test]
fn a_folder_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _lock = std::fs::File::open(dir.path()).map(|lock| lock.lock().map(|()| lock)).unwrap().unwrap();
    let out = peft(&["train", RECIPE, "--output-dir", &dir.path().display().to_string()]);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("another process trains into this folder"), "{stderr}");
}

#[test]
fn what_is_not_finite_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    // The gradient is finite; the step that follows from it is not.
    let overrides = ["learning_rate=1e39", "lr_scheduler=constant", "warmup_steps=0", "save_steps=1"];
    let out = train_command(dir.path(), &overrides, false).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("holds a value that is not finite after step 1"), "{stderr}");
    assert_eq!(checkpoints(dir.path()), [""; 0]);
    assert!(!dir.path().join("adapter").exists());
}
