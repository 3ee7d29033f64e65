//! `peft methods`: what a recipe's method can be.

use crate::args::MethodsArgs;
use crate::error::CliError;
use crate::render;
use peft_methods::{Kind, METHODS};
use serde_json::{Value, json};

/// Runs the command.
pub fn run(args: MethodsArgs) -> Result<(), CliError> {
    if args.json {
        let methods: Vec<Value> = METHODS.iter().map(|kind| to_json(kind)).collect();
        println!("{}", Value::from(methods));
        return Ok(());
    }
    let longest = |text: fn(&Kind) -> &str| METHODS.iter().map(|kind| text(kind).chars().count()).max();
    let (name, about) = (longest(|kind| kind.name).unwrap_or(0), longest(|kind| kind.about).unwrap_or(0));
    println!("  {:<name$}  {:<about$}  result", "type", "what it trains");
    for kind in METHODS {
        println!("  {:<name$}  {:<about$}  {}", kind.name, kind.about, result(kind));
    }
    println!("\nnext:\n  {} init --method {} my.yaml", render::program(), METHODS[0].name);
    Ok(())
}

/// What a run writes.
fn result(kind: &Kind) -> &'static str {
    match (kind.file, kind.in_peft) {
        (None, _) => "a checkpoint",
        (Some(_), true) => "an adapter, for Hugging Face PEFT too",
        (Some(_), false) => "an adapter",
    }
}

fn to_json(kind: &Kind) -> Value {
    let scaffolds: Vec<Value> =
        kind.scaffolds.iter().map(|begin| json!({"name": begin.name, "about": begin.about})).collect();
    json!({
        "type": kind.name,
        "title": kind.title,
        "about": kind.about,
        "peft_type": kind.file.map(|file| file.peft_type),
        "loads_in_peft": kind.in_peft,
        "init": scaffolds,
    })
}
