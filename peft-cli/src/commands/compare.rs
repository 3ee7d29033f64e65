//! `peft compare`: run a recipe with several methods, rates and seeds, and set the results beside each other.
//!
//! Every run is what `peft train` makes of its recipe, in a process and folder of its own. So a comparison has no state
//! but the runs' own: those that are finished are recognised, and the rest is done.

mod child;
mod method_comparison;
mod plan;
mod results;
mod standing;
mod table;

use super::train::signals::StopSignal;
use crate::args::CompareArgs;
use crate::error::CliError;
use crate::render::ComparisonProgress;
use crate::report::comparison as page;
use child::Ended;
use peft_core::checkpoint::write_file;
use plan::{Plan, Wanted};
use results::{Measured, Outcome, Row};
use serde_json::{Value, json};
use standing::{Material, Standing};
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
    let is_stopping = || stop.requested().load(Ordering::SeqCst);

    let mut progress = ComparisonProgress::new(plan.runs.len());
    let mut outcomes = Vec::with_capacity(plan.runs.len());
    for wanted in &plan.runs {
        let standing = material.standing(wanted)?;
        let outcome = match standing {
            Standing::Finished => measured(wanted)?,
            _ if args.summary => {
                child::reason(&wanted.beside("log")).map_or(Outcome::Missing, Outcome::Failed)
            }
            _ if is_stopping() => Outcome::Missing,
            _ => train(wanted, standing == Standing::Open, args.offline, &stop, &mut progress)?,
        };
        progress.ended(&wanted.name, &said(&outcome, standing == Standing::Finished));
        outcomes.push(outcome);
    }
    progress.clear();

    let rows = results::rows(&plan, &outcomes);
    let files = write(&plan, &outcomes, &rows)?;
    if args.json {
        println!("{}", json!({"seeds": plan.seeds, "methods": rows, "files": files}));
    } else {
        println!("\n{}", table::terminal(&plan, &rows));
        files.iter().for_each(|file| println!("{}", file.display()));
    }
    if is_stopping() {
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

/// Trains the run, from where it was left if it is `open`, and reads its figures.
fn train(
    wanted: &Wanted,
    open: bool,
    offline: bool,
    stop: &StopSignal,
    progress: &mut ComparisonProgress,
) -> Result<Outcome, CliError> {
    let metrics = wanted.dir().join("metrics.jsonl");
    progress.began(&wanted.name);
    match child::train(wanted, open, offline, stop, &mut || progress.look(&wanted.name, &metrics))? {
        Ended::Finished => measured(wanted),
        Ended::Failed(reason) => Ok(Outcome::Failed(reason)),
        Ended::Stopped => Ok(Outcome::Missing),
    }
}

fn measured(wanted: &Wanted) -> Result<Outcome, CliError> {
    Ok(Measured::read(&wanted.dir())?.map_or_else(Outcome::Failed, Outcome::Measured))
}

/// A run's outcome in a few words.
fn said(outcome: &Outcome, before: bool) -> String {
    match outcome {
        Outcome::Measured(measured) => {
            let earlier = if before { " · finished earlier" } else { "" };
            format!("validation loss {:.4}{earlier}", measured.loss)
        }
        Outcome::Failed(reason) => format!("failed: {reason}"),
        Outcome::Missing => "not run to its end".to_string(),
    }
}

/// Writes table, page and the runs' results; returns where the first two are.
fn write(plan: &Plan, outcomes: &[Outcome], rows: &[Row]) -> Result<Vec<PathBuf>, CliError> {
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
    write_file(&files[0], table::markdown(plan, rows).as_bytes())?;
    write_file(&files[1], html(plan, outcomes, rows).as_bytes())?;
    Ok(files.to_vec())
}

/// The page.
fn html(plan: &Plan, outcomes: &[Outcome], rows: &[Row]) -> String {
    let recipe = plan.runs.first().map(|wanted| &wanted.recipe);
    let runs = plan.runs.iter().zip(outcomes).map(|(wanted, outcome)| page::RunLine {
        name: &wanted.name,
        said: said(outcome, false),
        has_report: wanted.dir().join("report.html").is_file(),
    });
    page::html(&page::Comparison {
        title: &name(&plan.output_dir),
        base: recipe.map_or("", |recipe| recipe.base_model.as_str()),
        note: &table::note(plan),
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
