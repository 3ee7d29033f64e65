//! The runs of a comparison, one after another or several at once.

use super::child::{self, Ended, Running};
use super::plan::{Plan, Wanted};
use super::results::{Measured, Outcome};
use super::standing::{Material, Standing};
use crate::commands::train::signals::StopSignal;
use crate::error::CliError;
use crate::render::ComparisonProgress;
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often the runs are looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// How often a run is begun again, from its newest state, after the device failed. A GPU that several processes share
/// fails one of them now and then in products that come out right alone.
const AGAIN: usize = 2;

/// How runs are made.
pub struct Settings {
    /// So many at once.
    pub jobs: NonZeroUsize,
    /// None is started.
    pub summary: bool,
    /// Without network connections.
    pub offline: bool,
}

/// Brings the plan's runs to their ends, until asked to stop; what came of each, in the plan's order.
///
/// # Errors
/// Data that can no longer be read, a program that cannot be started.
pub fn outcomes(
    plan: &Plan,
    material: &mut Material,
    stop: &StopSignal,
    settings: &Settings,
) -> Result<Vec<Outcome>, CliError> {
    let mut progress = ComparisonProgress::new(plan.runs.len());
    let mut outcomes = vec![Outcome::Missing; plan.runs.len()];
    let mut waiting = plan.runs.iter().enumerate();
    let mut running: Vec<(usize, Running)> = Vec::new();
    let mut begun_again = vec![0; plan.runs.len()];
    loop {
        while running.len() < settings.jobs.get() {
            let Some((place, wanted)) = waiting.next() else { break };
            let standing = material.standing(wanted)?;
            outcomes[place] = match standing {
                Standing::Finished => measured(wanted)?,
                _ if settings.summary => {
                    child::reason(&wanted.beside("log")).map_or(Outcome::Missing, Outcome::Failed)
                }
                _ if stop.requested().load(Ordering::SeqCst) => continue,
                _ => {
                    let open = standing == Standing::Open;
                    running.push((place, Running::start(wanted, open, settings.offline)?));
                    continue;
                }
            };
            tell(&mut progress, wanted, &outcomes[place], standing == Standing::Finished);
        }
        if running.is_empty() {
            progress.clear();
            return Ok(outcomes);
        }
        std::thread::sleep(PAUSE);
        let mut still = Vec::with_capacity(running.len());
        for (place, mut run) in running {
            let wanted = &plan.runs[place];
            outcomes[place] = match run.look(stop)? {
                None => {
                    still.push((place, run));
                    continue;
                }
                Some(Ended::Finished) => measured(wanted)?,
                Some(Ended::DeviceFailed(reason)) if begun_again[place] < AGAIN => {
                    begun_again[place] += 1;
                    progress.note(&wanted.name, &format!("{reason}; begun again"));
                    still.push((place, Running::start(wanted, true, settings.offline)?));
                    continue;
                }
                Some(Ended::DeviceFailed(reason) | Ended::Failed(reason)) => Outcome::Failed(reason),
                Some(Ended::Stopped) => Outcome::Missing,
            };
            tell(&mut progress, wanted, &outcomes[place], false);
        }
        running = still;
        progress.look(running.iter().map(|(place, _)| {
            let wanted = &plan.runs[*place];
            (wanted.name.as_str(), wanted.dir().join("metrics.jsonl"))
        }));
    }
}

fn measured(wanted: &Wanted) -> Result<Outcome, CliError> {
    Ok(Measured::read(&wanted.dir())?.map_or_else(Outcome::Failed, Outcome::Measured))
}

fn tell(progress: &mut ComparisonProgress, wanted: &Wanted, outcome: &Outcome, before: bool) {
    if !matches!(outcome, Outcome::Missing) {
        let earlier = if before { " · finished earlier" } else { "" };
        progress.ended(&wanted.name, &format!("{outcome}{earlier}"));
    }
}
