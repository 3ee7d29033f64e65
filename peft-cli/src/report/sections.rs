//! The parts of the page below the curves.

use super::html::{escape, shorten};
use super::run::{Generation, Run};
use super::section;
use crate::render;
use crate::utc;
use serde_json::Value;
use std::fmt::Write;

/// The most samples that are shown.
const MAX_SAMPLES: usize = 20;
/// Samples that are open from the start.
const OPEN_SAMPLES: usize = 5;
/// The most characters of each text that are shown.
const MAX_TEXT: usize = 2000;

/// Answers before and after, side by side.
pub fn samples(run: &Run) -> String {
    let all = &run.samples;
    if all.is_empty() {
        return String::new();
    }
    // What still goes wrong is worth more than what goes well: up to half of the room is for it.
    let wrong: Vec<usize> = (0..all.len()).filter(|i| !all[*i].after.matched).take(MAX_SAMPLES / 2).collect();
    let others = (0..all.len()).filter(|i| !wrong.contains(i)).take(MAX_SAMPLES - wrong.len());
    let mut shown: Vec<usize> = wrong.iter().copied().chain(others).collect();
    shown.sort_unstable();

    let right = all.iter().filter(|sample| sample.after.matched).count();
    let mut out = format!(
        "<p class=\"note\">{right} of {} answers equal the reference; {} shown, at step {}.</p>\n",
        all.len(),
        shown.len(),
        all[0].after.step
    );
    for (place, sample) in shown.iter().map(|i| &all[*i]).enumerate() {
        if place == OPEN_SAMPLES {
            let _ = writeln!(out, "<details>\n<summary>{} more</summary>", shown.len() - OPEN_SAMPLES);
        }
        let _ = write!(out, "<article class=\"sample\">\n{}", text("Prompt", "prompt", &sample.after.prompt));
        out.push_str("<div class=\"answers\">\n");
        if let Some(before) = &sample.before {
            out.push_str(&answer("Before", before));
        }
        out.push_str(&answer("After", &sample.after));
        out.push_str("</div>\n");
        if !sample.after.matched {
            out.push_str(&text("Reference", "reference", &sample.after.reference));
        }
        out.push_str("</article>\n");
    }
    if shown.len() > OPEN_SAMPLES {
        out.push_str("</details>\n");
    }
    section("Answers to held-out prompts", &out)
}

fn answer(name: &str, generation: &Generation) -> String {
    let (class, mark) = if generation.matched { ("right", "✓ exact") } else { ("wrong", "✗ differs") };
    text(&format!("{name} <em class=\"{class}\">{mark}</em>"), class, &generation.generated)
}

/// A labelled text, kept as it is with its line breaks. `label` is HTML.
fn text(label: &str, class: &str, content: &str) -> String {
    let content = shorten(content.trim_end(), MAX_TEXT);
    let content = match content.as_str() {
        "" => "<span class=\"empty\">(nothing)</span>".to_string(),
        content => escape(content),
    };
    format!("<div class=\"text {class}\"><h4>{label}</h4><pre dir=\"auto\">{content}</pre></div>\n")
}

/// The plan's memory by component beside the measured peak; nothing without a plan.
pub fn memory(run: &Run) -> String {
    let Some(plan) = run.get("/plan/memory/components").as_object() else { return String::new() };
    let mut parts: Vec<(&String, f64)> = plan
        .iter()
        .filter_map(|(name, bytes)| Some((name, bytes.as_f64()?)))
        .filter(|(_, bytes)| *bytes > 0.0)
        .collect();
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let planned: f64 = parts.iter().map(|part| part.1).sum();
    if planned <= 0.0 {
        return String::new();
    }
    let measured = run.steps.iter().filter_map(|line| line.peak_memory_bytes).reduce(f64::max);
    let full = planned.max(measured.unwrap_or(0.0));
    let percent = |bytes: f64| 100.0 * bytes / full;
    let mut bars = String::from("<div class=\"bars\">\n<span>planned</span><div class=\"bar\">");
    let mut legend = String::from("<table class=\"parts\">\n");
    for (i, (name, bytes)) in parts.iter().enumerate() {
        // The small ones at the end share the last colour, a gray.
        let colour = (i + 1).min(7);
        let _ = write!(bars, "<i class=\"fill c{colour}\" style=\"width:{:.3}%\"></i>", percent(*bytes));
        let _ = writeln!(
            legend,
            "<tr><td><i class=\"swatch c{colour}\"></i>{}</td><td>{}</td><td>{:.0} %</td></tr>",
            escape(&name.replace('_', " ")),
            render::bytes(*bytes as u64),
            100.0 * bytes / planned
        );
    }
    let _ = writeln!(bars, "</div><b>{}</b>", render::bytes(planned as u64));
    if let Some(measured) = measured {
        let _ = writeln!(
            bars,
            "<span>measured</span><div class=\"bar\"><i class=\"fill measured\" style=\"width:{:.3}%\"></i></div><b>{}</b>",
            percent(measured),
            render::bytes(measured as u64)
        );
    }
    let phase = run.get("/plan/memory/peak_phase").as_str().map_or_else(String::new, |phase| {
        let phase = escape(&phase.replace('_', " "));
        format!("<p class=\"note\">What was predicted to be held at the peak, in the phase “{phase}”.</p>\n")
    });
    section("Memory by component", &format!("{phase}{bars}</div>\n{legend}</table>\n"))
}

/// The files and what became of their records.
pub fn data(run: &Run) -> String {
    let mut out = String::new();
    let listed = |pointer: &str| run.get(pointer).as_array().map_or(&[][..], Vec::as_slice);
    let files: Vec<(&Value, &str)> = (listed("/data/files").iter().map(|file| (file, "training")))
        .chain(listed("/data/eval_files").iter().map(|file| (file, "held-out")))
        .collect();
    if !files.is_empty() {
        out.push_str("<div class=\"scroll\"><table>\n<tr><th>file</th><th>for</th><th class=\"n\">records</th><th>SHA-256</th></tr>\n");
        for (file, purpose) in files {
            let field = |name: &str| file.get(name).and_then(Value::as_str).unwrap_or_default();
            let records = file.get("records").and_then(Value::as_u64).unwrap_or(0);
            let _ = writeln!(
                out,
                "<tr><td>{}</td><td>{purpose}</td><td class=\"n\">{}</td><td><code>{}</code></td></tr>",
                escape(field("path")),
                render::count(records),
                escape(field("sha256"))
            );
        }
        out.push_str("</table></div>\n");
    }
    let number = |pointer: &str| run.get(pointer).as_u64();
    let report = |key: &str| number(&format!("/data/report/{key}"));
    let mut facts: Vec<(&str, String)> = Vec::new();
    let mut fact = |name, value: Option<u64>| facts.extend(value.map(|value| (name, render::count(value))));
    fact("records", report("records"));
    fact("training examples", number("/data/train_examples"));
    fact("held-out examples", number("/data/validation_examples"));
    fact("tokens", report("tokens"));
    fact("longest record, tokens", report("longest"));
    for (name, key) in [
        ("cut", "truncated"),
        ("dropped as too long", "dropped"),
        ("split", "split"),
        ("without anything to learn", "without_supervised"),
    ] {
        fact(name, report(key));
    }
    if let (Some(supervised), Some(tokens)) =
        (report("supervised_tokens"), report("tokens").filter(|n| *n > 0))
    {
        let share = 100.0 * supervised as f64 / tokens as f64;
        facts.push(("supervised tokens", format!("{} ({share:.1} %)", render::count(supervised))));
    }
    out.push_str(&list(&facts));
    section("Data", &out)
}

/// What the run ran on.
pub fn environment(run: &Run) -> String {
    let text = |pointer: &str| match run.get(pointer) {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    let facts: Vec<(&str, String)> = [
        ("peft", text("/versions/peft")),
        ("device", text("/device").map(|name| name.replace("Device<", "").replace('>', ""))),
        ("type of weights", text("/dtype").map(|dtype| dtype.to_lowercase())),
        ("seed", text("/seed")),
        ("started", run.get("/started_at").as_u64().map(utc::minute)),
        ("base", text("/base/name")),
        ("base, SHA-256", text("/base/sha256")),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
    .collect();
    section("Environment", &list(&facts))
}

/// The recipe with every default.
pub fn recipe(run: &Run) -> String {
    match run.get("/recipe") {
        Value::Null => String::new(),
        recipe => {
            let yaml = escape(&crate::yaml::recipe(recipe));
            section("Recipe, with every default", &format!("<pre class=\"code\">{yaml}</pre>\n"))
        }
    }
}

/// The commands that make the run again.
pub fn reproduce(run: &Run) -> String {
    let Some(dir) = run.get("/recipe/output_dir").as_str() else { return String::new() };
    let quoted = |text: &str| crate::yaml::shell(text);
    let recipe = quoted(&format!("{dir}/recipe.yaml"));
    let mut commands = format!("peft train {recipe} --output-dir {}\n", quoted(&format!("{dir}-again")));
    if let Some(artifact) = run.get("/result/artifact").as_str() {
        let base = run.get("/recipe/base_model").as_str().unwrap_or_default();
        let model = match artifact.ends_with("adapter") {
            true => format!("--base-model {} --adapter {}", quoted(base), quoted(artifact)),
            false => format!("--base-model {}", quoted(artifact)),
        };
        let _ = writeln!(commands, "peft generate {model} --prompt '…'");
    }
    let note = "<p class=\"note\">recipe.yaml beside this report is the recipe above. With the same version, base and data the \
                same bytes come out on a CPU.</p>\n";
    section("Do it again", &format!("{note}<pre class=\"code\">{}</pre>\n", escape(&commands)))
}

fn list(facts: &[(&str, String)]) -> String {
    if facts.is_empty() {
        return String::new();
    }
    let items: String = facts
        .iter()
        .map(|(name, value)| format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escape(name), escape(value)))
        .collect();
    format!("<dl class=\"list\">\n{items}</dl>\n")
}

#[cfg(test)]
mod tests {
    use super::super::run::Line;
    use super::*;
    use serde_json::json;

    #[test]
    fn the_plans_peak_is_shown_by_component_beside_the_measured_one() {
        let components = json!({"base_weights": 3 << 20, "activations": 1 << 20, "logits": 0});
        let plan =
            json!({"peak_bytes": 4 << 20, "peak_phase": "step", "components": components, "phases": []});
        let step = Line { step: 1, peak_memory_bytes: Some(f64::from(8 << 20)), ..Line::default() };
        let info = json!({"plan": {"memory": plan}});
        let run = Run { info, steps: vec![step], evaluations: Vec::new(), samples: Vec::new() };
        let html = memory(&run);
        assert!(html.contains("base weights</td><td>3.0 MiB</td><td>75 %"), "{html}");
        assert!(html.contains("<i class=\"fill c1\" style=\"width:37.500%\"></i>"), "{html}");
        assert!(html.contains("<b>4.0 MiB</b>") && html.contains("<b>8.0 MiB</b>"), "{html}");
        assert!(html.contains("“step”") && !html.contains("logits"), "{html}");
        assert_eq!(memory(&Run { info: Value::Null, ..run }), "");
    }
}
