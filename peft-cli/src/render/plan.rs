//! A plan on one screen.

use super::{bytes, count, table, warning};
use crate::commands::plan::{DataReport, ModuleReport, Report};
use crate::forecast::render_changes;

/// Prints the plan on stdout.
pub fn plan(report: &Report) {
    let line = |name: &str, text: String| println!("{name:<11} {text}");
    let base = &report.base;
    let types: Vec<&str> = base.types.keys().map(String::as_str).collect();
    let download = match base.download_bytes {
        0 => String::new(),
        missing => format!(" · {} to download", bytes(missing)),
    };
    line(
        "base",
        format!(
            "{} · {} · {} parameters · {} on disk, {} in memory{download}",
            base.name,
            base.architecture,
            count(base.parameters),
            types.join("+"),
            base.compute
        ),
    );
    let share = 100.0 * report.trainable_parameters as f64 / report.parameters.max(1) as f64;
    line(
        "method",
        format!(
            "{} · {} of {} parameters train ({share:.3} %)",
            report.method,
            count(report.trainable_parameters),
            count(report.parameters)
        ),
    );
    line(
        "files",
        format!(
            "result {} ({} bytes) · checkpoint {}, {} kept",
            bytes(report.artifact_bytes),
            count(report.artifact_bytes),
            bytes(report.checkpoint_bytes),
            report.course.kept
        ),
    );
    println!();
    print!("{}", table(&module_rows(&report.modules)));
    if !report.excluded.is_empty() {
        println!("  unchanged: {}", report.excluded.join(", "));
    }
    println!();
    data(&report.data, report.recipe.sequence_len);
    course(report);
    memory(report);
}

fn module_rows(modules: &[ModuleReport]) -> Vec<Vec<String>> {
    let join = |parts: Vec<String>| parts.join(", ");
    let row = |module: &ModuleReport| {
        let shapes = module.shapes.iter().map(|[rows, columns]| format!("{rows} × {columns}")).collect();
        let rank = |rank: &usize| if *rank == 0 { "whole".to_string() } else { rank.to_string() };
        vec![
            module.kind.clone(),
            module.count.to_string(),
            join(shapes),
            join(module.ranks.iter().map(rank).collect()),
            count(module.trainable),
        ]
    };
    let header = ["module", "count", "out × in", "rank", "trainable"].map(str::to_string).to_vec();
    std::iter::once(header).chain(modules.iter().map(row)).collect()
}

fn data(data: &DataReport, sequence_len: usize) {
    let share = 100.0 * data.supervised_tokens as f64 / data.tokens.max(1) as f64;
    println!(
        "data        {} records · {} examples to train on, {} to validate · {} tokens, {share:.1} % supervised",
        count(data.records as u64),
        count(data.train_examples as u64),
        count(data.validation_examples as u64),
        count(data.tokens)
    );
    let at = |name: &str| data.percentiles.get(name).copied().unwrap_or(0);
    println!(
        "            tokens a record: median {}, 90 % {}, 99 % {}, longest {}",
        at("p50"),
        at("p90"),
        at("p99"),
        at("p100")
    );
    let most = data.histogram.iter().map(|(_, _, records)| *records).max().unwrap_or(0).max(1);
    for (begin, end, records) in &data.histogram {
        let bar = "▇".repeat((records * 40).div_ceil(most));
        println!("  {begin:>7}–{end:<7} {bar} {}", count(*records as u64));
    }
    if let Some(error) = &data.error {
        warning(&format!("the run will stop: {error}"));
    } else if data.too_long > 0 {
        println!(
            "            longer than {sequence_len}: {} records ({} cut, {} dropped, {} split)",
            count(data.too_long as u64),
            count(data.truncated as u64),
            count(data.dropped as u64),
            count(data.split as u64)
        );
    }
    if data.without_supervised > 0 {
        println!("            without anything to learn: {} examples", count(data.without_supervised as u64));
    }
    if data.without_eos > 0 {
        println!(
            "            without an end-of-sequence token to learn: {} examples; the model may not learn to stop",
            count(data.without_eos as u64)
        );
    }
}

fn course(report: &Report) {
    let (course, recipe) = (&report.course, &report.recipe);
    println!(
        "run         {} steps of {} × {} {} · {:.2} epochs · {} tokens, {} with padding",
        count(course.steps),
        recipe.gradient_accumulation_steps,
        recipe.micro_batch_size,
        if course.packing.is_some() { "packs" } else { "examples" },
        course.epochs,
        count(course.tokens),
        count(course.padded_tokens)
    );
    println!("            evaluations: {} · checkpoints: {}", course.evaluations, course.saves);
    if let (Some(seconds), Some(measured)) = (report.seconds, &report.calibration) {
        let rate = 1.0 / measured.seconds_per_token.max(1e-12);
        let peak =
            measured.peak_memory_bytes.map_or_else(String::new, |peak| format!(", peak {}", bytes(peak)));
        println!("            about {} by measured steps: {rate:.0} tokens/s{peak}", duration(seconds));
    }
}

/// Seconds as people say them.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn memory(report: &Report) {
    let memory = &report.memory;
    println!(
        "memory      predicted peak {} in {} · gradient_checkpointing {}",
        bytes(memory.peak_bytes),
        memory.peak_phase,
        report.recipe.gradient_checkpointing
    );
    let rows: Vec<Vec<String>> = memory
        .components
        .entries()
        .into_iter()
        .filter(|(_, size)| *size > 0)
        .map(|(name, size)| vec![format!("          {name}"), bytes(size)])
        .collect();
    print!("{}", table(&rows));
    let phases: Vec<String> =
        memory.phases.iter().map(|phase| format!("{} {}", phase.phase, bytes(phase.bytes))).collect();
    println!("            by phase: {}", phases.join(" · "));
    let (Some(available), Some(fits)) = (report.device.available_bytes, report.fits) else {
        println!("            what the device has is not known here");
        return;
    };
    let total = report.device.total_bytes.map_or_else(String::new, |total| format!(" of {}", bytes(total)));
    println!(
        "            {}: {}{total} available",
        if fits { "fits" } else { "does not fit" },
        bytes(available)
    );
    for advice in &report.advice {
        println!(
            "            would fit with {} (peak {}; costs {})",
            render_changes(advice),
            bytes(advice.peak_bytes),
            advice.cost
        );
    }
    if !fits && report.advice.is_empty() {
        println!("            no change of batch, length or checkpointing brings it down enough");
    }
}
