//! What a run leaves to look at: report.html, opened in Chromium where there is one, and TensorBoard's event file.

use crate::program::{HELD_OUT, metrics, train};
use peft_tests::{golden, peft, peft_ok, root};
use std::path::{Path, PathBuf};
use std::process::Command;

const HOSTILE: &str =
    r#"<script>document.title = "owned"</script><img src=x onerror="document.title = 'owned'">"#;

/// A run of a few steps on data with a hostile prompt.
fn run_in(dir: &Path) -> PathBuf {
    let data = dir.join("held_out.jsonl");
    let hostile = serde_json::json!({"prompt": HOSTILE, "completion": "</pre><script>1</script>"});
    let records = std::fs::read_to_string(root().join(HELD_OUT)).unwrap();
    let first: Vec<&str> = records.lines().take(5).collect();
    std::fs::write(&data, format!("{hostile}\n{}\n", first.join("\n"))).unwrap();
    let run = dir.join("run");
    let data = format!("eval_datasets.0.path={}", data.display());
    let overrides =
        [&data, "max_steps=6", "eval_steps=2", "eval_generations=3", "report_to=tensorboard", "save_steps=4"];
    let stdout = train(&run, &overrides, &[]);
    assert!(stdout.contains("report.html"), "{stdout}");
    run
}

/// Every tag that opens is closed, in order.
pub fn assert_well_formed(html: &str) {
    const VOID: [&str; 5] = ["meta", "link", "br", "img", "!DOCTYPE"];
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html;
    while let Some(start) = rest.find('<') {
        rest = &rest[start + 1..];
        let end = rest.find('>').expect("a tag ends");
        let (tag, closes) = (rest[..end].trim_end_matches('/'), rest[..end].ends_with('/'));
        let name = tag.split_whitespace().next().unwrap_or_default();
        rest = &rest[end + 1..];
        match name.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "closed where another is open"),
            None if closes || VOID.contains(&name) => {}
            None => open.push(name),
        }
        // Between these is no markup.
        if ["style", "script"].contains(&name) {
            let close = format!("</{name}>");
            rest = &rest[rest.find(&close).expect("style and script end")..];
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
}

/// The page as Chromium has it once it has settled, with what it had to complain of; `None` without a Chromium.
pub fn in_chromium(page: &Path, profile: &Path) -> Option<(String, String)> {
    let out = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("file://{}", page.display()))
        .output();
    match out {
        Err(_) => None,
        Ok(out) => {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let complaints: Vec<String> =
                text(&out.stderr).lines().filter(|l| l.contains("CONSOLE")).map(str::to_string).collect();
            Some((text(&out.stdout), complaints.join("\n")))
        }
    }
}

#[test]
fn a_run_can_be_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let run = run_in(dir.path());
    let page = run.join("report.html");
    let html = std::fs::read_to_string(&page).unwrap();
    assert_well_formed(&html);
    assert_eq!(html.matches("<script").count(), 1, "the page's own script alone");
    assert!(html.contains("&lt;script&gt;document.title"), "the prompt is shown as text");
    assert!(!html.contains("http://") && !html.contains("https://"), "nothing leads out of the file");
    for part in [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Memory",
        "lora_alpha",
        "<svg",
        "base weights",
    ] {
        assert!(html.contains(part), "no {part}");
    }

    match in_chromium(&page, &dir.path().join("profile")) {
        None => println!("no Chromium here: the page was not opened"),
        Some((dom, complaints)) => {
            // The page's policy blocks every request, and a request or script that is tried is complained of.
            assert_eq!(complaints, "");
            let meddled = dir.path().join("meddled.html");
            let image =
                "<img src=\"http://127.0.0.1:9/x.png\"></main><script>document.title = 'owned'</script>";
            std::fs::write(&meddled, html.replace("</main>", image)).unwrap();
            let (meddled, complaints) = in_chromium(&meddled, &dir.path().join("profile")).unwrap();
            assert_eq!(complaints.matches("Content Security Policy").count(), 2, "{complaints}");
            assert!(!meddled.contains("<title>owned"));
            assert!(
                dom.contains("class=\"script\"") && dom.contains("class=\"cursor\""),
                "the script did not run"
            );
            assert!(
                dom.contains("<svg") && dom.contains("fine-tuning report"),
                "{}",
                &dom[..dom.len().min(500)]
            );
            assert!(!dom.contains("<title>owned"), "a script of the data ran");
        }
    }

    // Written again from the files alone it is the same; a folder without a run is refused.
    peft_ok(&["report", &run.display().to_string()]);
    assert_eq!(std::fs::read_to_string(&page).unwrap(), html);
    assert_eq!(peft(&["report", &golden("families").display().to_string()]).status.code(), Some(2));

    // One event for the version, one for each line of metrics; a resume writes the same again.
    let count = || {
        let entry = std::fs::read_dir(run.join("tensorboard")).unwrap().next().unwrap().unwrap();
        let bytes = std::fs::read(entry.path()).unwrap();
        let (mut at, mut records) = (0, 0);
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            (at, records) = (at + 16 + length, records + 1);
        }
        assert_eq!(at, bytes.len());
        records
    };
    let lines = metrics(&run).len();
    assert_eq!(count(), 1 + lines);
    std::fs::remove_dir_all(run.join("checkpoints/step-00000006")).unwrap();
    let data = format!("eval_datasets.0.path={}", dir.path().join("held_out.jsonl").display());
    let overrides =
        [&data, "max_steps=6", "eval_steps=2", "eval_generations=3", "report_to=tensorboard", "save_steps=4"];
    train(&run, &overrides, &["--resume", "auto"]);
    assert_eq!((metrics(&run).len(), count()), (lines, 1 + lines));
}
