//! `peft compare`: run a recipe with several methods, rates and seeds, and set the results beside each other.
//!
//! Every run is what `peft train` makes of its recipe, in a process and folder of its own. So a comparison has no state
//! but the runs' own: those that are finished are recognised, and the rest is done.

mod child;
mod method_comparison;
mod plan;
mod queue;
mod results;
mod standing;
mod table;

use super::train::signals::StopSignal;
use crate::args::CompareArgs;
use crate::error::CliError;
use crate::report::comparison as page;
use peft_core::checkpoint::write_file;
use plan::Plan;
use queue::Settings;
use results::{Outcome, Row};
use serde_json::{Value, json};
use standing::Material;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Runs the command. A comparison that a signal stopped is no error, but its exit code says so.
pub fn run(args: CompareArgs) -> Result<ExitCode, CliError> {
    let mut overrides = args.overrides;
    if let Some(dir) = &args.output_dir {
        overrides.push(format!("output_dir={}", Value::from(dir.display().to_string())));
    }
    let plan = Plan::read(&args.recipe, &overrides)?;
    let Some(first) = plan.runs.first() else { return Ok(ExitCode::SUCCESS) };
    let mut material = Material::open(&first.recipe, args.offline)?;
    let stop = StopSignal::listen()?;
    let settings = Settings { jobs: args.jobs, summary: args.summary, offline: args.offline };
    let outcomes = queue::outcomes(&plan, &mut material, &stop, &settings)?;

    let rows = results::rows(&plan, &outcomes);
    let at_once = results::at_once(&outcomes);
    let note = table::note(&plan, at_once);
    let files = write(&plan, &outcomes, &rows, &note)?;
    if args.json {
        println!("{}", json!({"seeds": plan.seeds, "at_once": at_once, "methods": rows, "files": files}));
    } else {
        println!("\n{}", table::terminal(&rows, &note));
        files.iter().for_each(|file| println!("{}", file.display()));
    }
    if stop.requested().load(Ordering::SeqCst) {
        let left = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Missing)).count();
        eprintln!(
            "stopped by {} with {left} of {} runs left; the same command goes on",
            stop.name(),
            outcomes.len()
        );
        return Ok(ExitCode::from(stop.exit_code()));
    }
    let any = args.summary || rows.iter().any(|row| row.figures.is_some());
    Ok(if any { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Writes table, page and the runs' results; returns where the first two are.
fn write(plan: &Plan, outcomes: &[Outcome], rows: &[Row], note: &str) -> Result<Vec<PathBuf>, CliError> {
    let dir = &plan.output_dir;
    let results = dir.join("results");
    std::fs::create_dir_all(&results).map_err(|source| CliError::Io { path: results.clone(), source })?;
    for (wanted, outcome) in plan.runs.iter().zip(outcomes) {
        // A run that was refused has measured nothing.
        if wanted.dir().join("run.json").is_file() {
            let value = method_comparison::results(wanted, outcome)?;
            write_file(&results.join(format!("{}.json", wanted.name)), format!("{value:#}\n").as_bytes())?;
        }
    }
    let files = [dir.join("comparison.md"), dir.join("comparison.html")];
    write_file(&files[0], table::markdown(rows, note).as_bytes())?;
    write_file(&files[1], html(plan, outcomes, rows, note).as_bytes())?;
    Ok(files.to_vec())
}

/// The page.
fn html(plan: &Plan, outcomes: &[Outcome], rows: &[Row], note: &str) -> String {
    let recipe = plan.runs.first().map(|wanted| &wanted.recipe);
    let runs = plan.runs.iter().zip(outcomes).map(|(wanted, outcome)| page::RunLine {
        name: &wanted.name,
        said: outcome.to_string(),
        has_report: wanted.dir().join("report.html").is_file(),
    });
    page::html(&page::Comparison {
        title: &name(&plan.output_dir),
        base: recipe.map_or("", |recipe| recipe.base_model.as_str()),
        note,
        head: &table::HEAD,
        rows: &rows.iter().map(page_row).collect::<Vec<_>>(),
        runs: &runs.collect::<Vec<_>>(),
    })
}

fn page_row(row: &Row) -> page::Row<'_> {
    let figures = row.figures.as_ref().map(|figures| page::Figures {
        // Answers that are right to the letter say more than single tokens do.
        accuracy: figures.exact_match.unwrap_or(figures.token_accuracy).mean,
        answers: figures.exact_match.is_some(),
        trainable: figures.trainable as f64,
        peak_bytes: figures.peak_bytes.map(|bytes| bytes as f64),
        tokens_per_second: figures.tokens_per_second.mean,
    });
    page::Row {
        label: &row.label,
        cells: table::cells(row),
        figures,
        sweep: &row.sweep,
        remarks: &row.remarks,
    }
}

/// The last part of a folder's path.
fn name(dir: &Path) -> String {
    dir.file_name().map_or_else(|| "Comparison".to_string(), |name| name.to_string_lossy().into_owned())
}
