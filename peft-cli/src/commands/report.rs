//! `peft report`: show a run, also one that was stopped or killed.

use crate::args::ReportArgs;
use crate::error::CliError;
use crate::report;

/// Runs the command.
pub fn run(args: &ReportArgs) -> Result<(), CliError> {
    println!("{}", report::write(&args.dir)?.display());
    Ok(())
}
