//! `peft`: adapts pretrained transformers from recipes, measures them, talks to them, and folds what was trained into
//! ordinary checkpoints.

mod allocator;
mod args;
mod card;
mod commands;
mod device;
mod error;
mod forecast;
mod observers;
mod open;
mod prompts;
mod recipe;
mod render;
mod report;
mod tensorboard;
mod utc;
mod yaml;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let done = |()| ExitCode::SUCCESS;
    let result = match cli.command {
        args::Command::Plan(args) => commands::plan::run(args).map(done),
        args::Command::Init(args) => commands::init::run(args).map(done),
        args::Command::Methods(args) => commands::methods::run(args).map(done),
        args::Command::Train(args) => commands::train::run(args),
        args::Command::Compare(args) => commands::compare::run(args),
        args::Command::Evaluate(args) => commands::evaluate::run(args).map(done),
        args::Command::Generate(args) => commands::generate::run(args).map(done),
        args::Command::Merge(args) => commands::merge::run(args).map(done),
        args::Command::Export(args) => commands::export::run(args).map(done),
        args::Command::Push(args) => commands::push::run(args).map(done),
        args::Command::Inspect(args) => commands::inspect::run(args).map(done),
        args::Command::Report(args) => commands::report::run(&args).map(done),
        args::Command::Doctor(args) => commands::doctor::run(args).map(done),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            render::error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
