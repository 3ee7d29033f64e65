//! The top of the page: what ran, what came of it.

use super::html::escape;
use super::run::{Line, Run};
use crate::render;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

/// The run's name: the last part of its output folder.
pub fn title(run: &Run) -> String {
    let dir = run.get("/recipe/output_dir").as_str().unwrap_or_default();
    Path::new(dir).file_name().map_or_else(|| "Run".to_string(), |name| name.to_string_lossy().into_owned())
}

/// The top of the page.
pub fn html(run: &Run) -> String {
    let mut out = String::new();
    let (state, class) = state(run);
    let _ = write!(
        out,
        "<header>\n<p class=\"eyebrow\">Fine-tuning report <span class=\"state {class}\">{}</span></p>\n<h1>{}</h1>\n<p class=\"what\">{}</p>\n",
        escape(&state),
        escape(&title(run)),
        escape(&what(run))
    );
    let (verdict, class) = verdict(run);
    let _ = write!(
        out,
        "<p class=\"verdict {class}\">{}</p>\n{}{}</header>\n",
        escape(&verdict),
        tiles(run),
        facts(run)
    );
    out
}

/// Whether the run reached its end.
fn state(run: &Run) -> (String, &'static str) {
    let (done, total) = (run.last_step(), run.get("/total_steps").as_u64());
    match total {
        Some(total) if done >= total && !run.get("/result").is_null() => ("complete".into(), "good"),
        Some(total) => (format!("stopped after step {done} of {total}"), "open"),
        None => (format!("{done} steps"), "open"),
    }
}

fn what(run: &Run) -> String {
    let method = &run.get("/recipe/method");
    let name = method.get("type").and_then(Value::as_str).unwrap_or("lora");
    let rank = method.get("r").and_then(Value::as_u64).map_or_else(String::new, |r| format!(", rank {r}"));
    let base = run.get("/recipe/base_model").as_str().unwrap_or("an unknown base");
    format!("{name}{rank} on {base}")
}

/// One sentence: the held-out loss before and after, or what is known instead.
fn verdict(run: &Run) -> (String, &'static str) {
    let share = |line: &Line| line.eval_exact_match.map(|share| format!("{:.0}\u{a0}%", 100.0 * share));
    match (run.before(), run.after()) {
        (Some(before), Some(after)) => {
            let (Some(from), Some(to)) = (before.eval_loss, after.eval_loss) else {
                return ("The held-out loss is not finite.".to_string(), "bad");
            };
            let better = to < from;
            let verb = if better { "fell" } else { "did not fall" };
            let change = format!("{:+.0}\u{a0}%", 100.0 * (to - from) / from).replace('-', "−");
            let exact = match (share(before), share(after)) {
                (Some(a), Some(b)) => format!(", and exact answers went from {a} to {b}"),
                _ => String::new(),
            };
            let text = format!("Held-out loss {verb}: {from:.4} → {to:.4} ({change}){exact}.");
            (text, if better { "good" } else { "bad" })
        }
        (None, Some(after)) => {
            let loss = after.eval_loss.unwrap_or(f64::NAN);
            let text =
                format!("Held-out loss {loss:.4} at step {}; the base was not measured before.", after.step);
            (text, "open")
        }
        _ => match (run.steps.first().and_then(|l| l.loss), run.steps.last().and_then(|l| l.loss)) {
            (Some(from), Some(to)) => {
                let text = format!(
                    "Training loss {from:.4} → {to:.4}. Nothing was held out, so this says little about new data."
                );
                (text, "open")
            }
            _ => ("No step was finished.".to_string(), "bad"),
        },
    }
}

/// The held-out measures, each before and after.
fn tiles(run: &Run) -> String {
    struct Measure {
        name: &'static str,
        value: fn(&Line) -> Option<f64>,
        show: fn(f64) -> String,
        higher_is_better: bool,
    }
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let measures = [
        Measure {
            name: "Loss",
            value: |l| l.eval_loss,
            show: |v| format!("{v:.4}"),
            higher_is_better: false,
        },
        Measure {
            name: "Perplexity",
            value: |l| l.eval_perplexity,
            show: perplexity,
            higher_is_better: false,
        },
        Measure {
            name: "Token accuracy",
            value: |l| l.eval_token_accuracy,
            show: percent,
            higher_is_better: true,
        },
        Measure { name: "Exact match", value: |l| l.eval_exact_match, show: percent, higher_is_better: true },
    ];
    let Some(after) = run.after() else { return String::new() };
    let mut out = String::from("<ul class=\"tiles\">\n");
    for measure in measures {
        let Some(value) = (measure.value)(after) else { continue };
        let before = run.before().and_then(measure.value);
        let class = match before {
            Some(before) if value == before => "same",
            Some(before) if (value > before) == measure.higher_is_better => "better",
            Some(_) => "worse",
            None => "same",
        };
        let from =
            before.map_or_else(String::new, |before| format!("<s>{}</s> ", escape(&(measure.show)(before))));
        let _ = writeln!(
            out,
            "<li class=\"{class}\"><span>{}</span><b>{}</b><small>{from}</small></li>",
            measure.name,
            escape(&(measure.show)(value))
        );
    }
    out.push_str("</ul>\n");
    out
}

/// A perplexity with as many digits as say something.
fn perplexity(value: f64) -> String {
    match value {
        v if v < 100.0 => format!("{v:.3}"),
        v if v < 1e7 => render::count(v.round() as u64),
        v => format!("{v:.2e}"),
    }
}

/// The run's size in a line of facts.
fn facts(run: &Run) -> String {
    let tokens: f64 = run.steps.iter().filter_map(|line| line.tokens).sum();
    let seconds: f64 = run.steps.iter().filter_map(|line| Some(line.tokens? / line.tokens_per_second?)).sum();
    let peak = run.steps.iter().filter_map(|line| line.peak_memory_bytes).fold(0.0, f64::max);
    let mut facts = vec![("steps", render::count(run.last_step()))];
    if let Some(trainable) = run.get("/trainable_parameters").as_u64() {
        let total = run.get("/parameters").as_u64().unwrap_or(0).max(1);
        let share = 100.0 * trainable as f64 / total as f64;
        facts.push(("trained parameters", format!("{} ({share:.2} %)", render::count(trainable))));
    }
    if tokens > 0.0 && seconds > 0.0 {
        facts.push(("tokens", render::count(tokens as u64)));
        facts.push(("time in steps", duration(seconds)));
        facts.push(("tokens a second", render::count((tokens / seconds) as u64)));
    }
    if peak > 0.0 {
        facts.push(("peak memory", render::bytes(peak as u64)));
    }
    let items: String = facts
        .iter()
        .map(|(name, value)| format!("<div><dt>{name}</dt><dd>{}</dd></div>\n", escape(value)))
        .collect();
    format!("<dl class=\"facts\">\n{items}</dl>\n")
}

/// Seconds in hours, minutes and seconds, the leading zeros left out.
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds:02} s"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(evaluations: Vec<Line>, steps: Vec<Line>) -> Run {
        Run { info: Value::Null, steps, evaluations, samples: Vec::new() }
    }

    fn evaluation(step: u64, loss: f64) -> Line {
        Line { step, eval_loss: Some(loss), ..Line::default() }
    }

    #[test]
    fn the_verdict_says_which_way_it_went() {
        let better = verdict(&run(vec![evaluation(0, 2.0), evaluation(9, 1.0)], Vec::new()));
        assert_eq!(better, ("Held-out loss fell: 2.0000 → 1.0000 (−50\u{a0}%).".to_string(), "good"));
        let worse = verdict(&run(vec![evaluation(0, 2.0), evaluation(9, 3.0)], Vec::new()));
        assert_eq!(worse, ("Held-out loss did not fall: 2.0000 → 3.0000 (+50\u{a0}%).".to_string(), "bad"));
        let unknown = verdict(&run(vec![evaluation(9, 3.0)], Vec::new())).0;
        assert!(unknown.contains("not measured before"), "{unknown}");
        assert_eq!(verdict(&run(Vec::new(), Vec::new())).0, "No step was finished.");
    }

    #[test]
    fn durations() {
        assert_eq!(duration(4.26), "4.3 s");
        assert_eq!(duration(61.0), "1 min 01 s");
        assert_eq!(duration(7260.0), "2 h 01 min");
    }
}
