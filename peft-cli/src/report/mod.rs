//! `report.html`: one self-contained file that shows what a run did, made from the files in the run's folder alone.
//!
//! The page loads nothing and works without its script, which only shows values under the pointer. Its content security
//! policy forbids every request and every script but that one, so text from data stays text.

mod chart;
pub mod comparison;
mod header;
mod html;
mod run;
mod scale;
mod scatter;
mod sections;
mod series;

use crate::error::CliError;
use chart::{Chart, Curve, Look};
use html::escape;
use peft_core::checkpoint::write_file;
pub use run::{Line, Run};
use scale::Unit;
pub use scale::scientific;
use series::{Point, smooth};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("hover.js");

/// Writes `report.html` into the run's folder, from what lies there; returns its path.
///
/// # Errors
/// A folder that holds no run, and failures to read or write.
pub fn write(output_dir: &Path) -> Result<PathBuf, CliError> {
    let path = output_dir.join("report.html");
    write_file(&path, page(&Run::read(output_dir)?).as_bytes())?;
    Ok(path)
}

fn page(run: &Run) -> String {
    let mut body = header::html(run);
    body.push_str(&curves(run));
    for section in [
        sections::samples(run),
        sections::memory(run),
        sections::data(run),
        sections::environment(run),
        sections::recipe(run),
        sections::reproduce(run),
    ] {
        body.push_str(&section);
    }
    document(&format!("{} · fine-tuning report", escape(&header::title(run))), &body)
}

/// A page with that title and content, both HTML.
fn document(title: &str, body: &str) -> String {
    let policy = format!(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'",
        base64(&Sha256::digest(SCRIPT.as_bytes()))
    );
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <link rel=\"icon\" href=\"data:,\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n\
         <script>{SCRIPT}</script>\n</body>\n</html>\n",
        escape(&policy)
    )
}

/// A section with a heading; nothing where there is no content.
fn section(heading: &str, content: &str) -> String {
    match content {
        "" => String::new(),
        _ => format!("<section>\n<h2>{}</h2>\n{content}</section>\n", escape(heading)),
    }
}

/// Loss, rate, gradient, speed and memory over the steps.
fn curves(run: &Run) -> String {
    let of = |lines: &[Line], value: &dyn Fn(&Line) -> Option<f64>| -> Vec<Point> {
        lines.iter().filter_map(|line| Some((line.step as f64, value(line)?))).collect()
    };
    let steps = |value: &dyn Fn(&Line) -> Option<f64>| of(&run.steps, value);
    // A noisy curve stands behind its average, a short one for itself.
    let averaged = |points: Vec<Point>, names: [&'static str; 2]| match smooth(&points) {
        Some(average) => vec![
            Curve { name: names[0], colour: 1, look: Look::Faint, points },
            Curve { name: names[1], colour: 1, look: Look::Line, points: average },
        ],
        None => vec![Curve { name: names[0], colour: 1, look: Look::Line, points }],
    };
    let mut loss = averaged(steps(&|line| line.loss), ["training, each step", "training, smoothed"]);
    let held_out = of(&run.evaluations, &|line| line.eval_loss);
    loss.push(Curve { name: "held-out", colour: 2, look: Look::Dots, points: held_out });
    let one = |name, points| vec![Curve { name, colour: 1, look: Look::Line, points }];
    let accuracy = of(&run.evaluations, &|line| Some(100.0 * line.eval_token_accuracy?));
    let exact = of(&run.evaluations, &|line| Some(100.0 * line.eval_exact_match?));
    let shares = vec![
        Curve { name: "token accuracy", colour: 2, look: Look::Dots, points: accuracy },
        Curve { name: "exact match", colour: 3, look: Look::Dots, points: exact },
    ];
    let chart = |title, caption, unit, from_zero, log, curves| Chart {
        title,
        caption,
        unit,
        from_zero,
        log,
        curves,
        wide: false,
    };
    let rate = one("learning rate", steps(&|line| line.learning_rate));
    let norm = averaged(steps(&|line| line.grad_norm), ["each step", "smoothed"]);
    let speed = averaged(steps(&|line| line.tokens_per_second), ["each step", "smoothed"]);
    let peak = one("peak", steps(&|line| line.peak_memory_bytes));
    // The loss shares its row with the held-out answers, or has it alone.
    let wide = shares.iter().all(|curve| curve.points.is_empty());
    let charts = [
        Chart { wide, ..chart("Loss", "nats a token", Unit::Number, false, true, loss) },
        chart("Held-out answers", "% right", Unit::Number, true, false, shares),
        chart("Learning rate", "of each step", Unit::Scientific, true, false, rate),
        chart("Gradient norm", "before clipping", Unit::Number, true, true, norm),
        chart("Throughput", "tokens a second", Unit::Number, true, false, speed),
        chart("Memory", "peak so far", Unit::Bytes, true, false, peak),
    ];
    let last = run.last_step() as f64;
    let drawn: String = charts.iter().filter_map(|chart| chart.html(last)).collect();
    match drawn.as_str() {
        "" => String::new(),
        _ => section("Course of the run", &format!("<div class=\"charts\">\n{drawn}</div>\n")),
    }
}

/// Base64 with padding (RFC 4648), as a content security policy names a script's hash.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_rfc() {
        for (plain, coded) in [("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
