//! The table, for the terminal and as Markdown.

use super::plan::Plan;
use super::results::{Figures, Row, Spread};
use crate::render::{bytes, count, table};
use crate::report::scientific;

/// The columns' names.
pub const HEAD: [&str; 10] = [
    "method",
    "learning rate",
    "validation loss",
    "token accuracy",
    "exact match",
    "trained",
    "file",
    "peak memory",
    "time a step",
    "tokens/s",
];

/// How the table is to be read, where up to `at_once` runs went on together.
pub fn note(plan: &Plan, at_once: usize) -> String {
    let seeds: Vec<String> = plan.seeds.iter().map(u64::to_string).collect();
    let (over, spread) = match seeds.as_slice() {
        [seed] => (format!("seed {seed}"), ""),
        _ => (format!("seeds {}", seeds.join(", ")), ", ± their standard deviation"),
    };
    let shared = match at_once {
        ..=1 => String::new(),
        _ => format!(" Up to {at_once} runs went on at once: times and speeds are not those of a run alone."),
    };
    format!(
        "Means over {over}{spread}. Each method's learning rate is the one of those tried with the lowest mean \
         validation loss, and the row is measured on the same validation data. Peak memory is the whole process's, or the \
         device's; times leave out the first step; × is memory or speed relative to the first method with figures.{shared}"
    )
}

/// A method's cells; one that has no figures has its reason in place of them.
pub fn cells(row: &Row) -> Vec<String> {
    let none = || "–".to_string();
    let Some(figures) = &row.figures else {
        return vec![row.label.clone(), "no result".to_string()];
    };
    vec![
        row.label.clone(),
        scientific(figures.learning_rate),
        spread(figures.loss, |v| format!("{v:.4}")),
        percent(figures.token_accuracy),
        figures.exact_match.map_or_else(none, percent),
        count(figures.trainable),
        bytes(figures.file_bytes),
        memory(figures).unwrap_or_else(none),
        spread(figures.step_seconds, |v| format!("{:.1}", 1e3 * v)) + " ms",
        speed(figures),
    ]
}

fn memory(figures: &Figures) -> Option<String> {
    Some(format!("{} ({:.2}×)", bytes(figures.peak_bytes?), figures.memory?))
}

fn speed(figures: &Figures) -> String {
    format!("{} ({:.2}×)", count(figures.tokens_per_second.mean.round() as u64), figures.speed)
}

fn percent(share: Spread) -> String {
    spread(share, |v| format!("{:.1}", 100.0 * v)) + " %"
}

fn spread(spread: Spread, show: impl Fn(f64) -> String) -> String {
    match spread.deviation {
        Some(deviation) => format!("{} ± {}", show(spread.mean), show(deviation)),
        None => show(spread.mean),
    }
}

/// What there is to know beside the figures, a line each.
fn remarks(rows: &[Row]) -> impl Iterator<Item = String> {
    rows.iter().flat_map(|row| row.remarks.iter().map(|remark| format!("{}: {remark}", row.label)))
}

/// The table for a terminal.
pub fn terminal(rows: &[Row], note: &str) -> String {
    let mut lines = vec![HEAD.map(str::to_string).to_vec()];
    lines.extend(rows.iter().map(cells));
    let mut out = table(&lines);
    out.push('\n');
    remarks(rows).for_each(|remark| out.push_str(&format!("  {remark}\n")));
    out.push_str(&format!("\n{note}\n"));
    out
}

/// The table as Markdown.
pub fn markdown(rows: &[Row], note: &str) -> String {
    let line = |cells: &[String]| {
        let padded = (0..HEAD.len()).map(|i| cells.get(i).map_or_else(String::new, |cell| plain(cell)));
        format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
    };
    let mut out = line(&HEAD.map(str::to_string));
    out.push_str(&format!("|---|{}\n", "--:|".repeat(HEAD.len() - 1)));
    rows.iter().for_each(|row| out.push_str(&line(&cells(row))));
    out.push('\n');
    remarks(rows).for_each(|remark| out.push_str(&format!("- {}\n", plain(&remark))));
    if rows.iter().any(|row| !row.remarks.is_empty()) {
        out.push('\n');
    }
    out.push_str(note);
    out.push('\n');
    out
}

/// Text that stays within its cell: reasons of failures are not ours.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '|' | '<' | '*' | '[' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}
