//! One run in a process of its own: what it does to memory, and how it may end, touches no other run.

use super::plan::Wanted;
use crate::commands::train::signals::StopSignal;
use crate::error::CliError;
use crate::yaml;
use peft_core::checkpoint::{read_bounded, write_file};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often the process is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// The most that is read of a log.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// How the process ended.
pub enum Ended {
    /// With a result.
    Finished,
    /// Without; why.
    Failed(String),
    /// Its state saved, since this process was asked to stop.
    Stopped,
}

/// Runs `peft train` on the recipe, which is written beside the run's folder as the log is. `look` is called now and
/// then while it runs.
///
/// # Errors
/// The program cannot be started, or the files not be written.
pub fn train(
    wanted: &Wanted,
    resume: bool,
    offline: bool,
    stop: &StopSignal,
    look: &mut dyn FnMut(),
) -> Result<Ended, CliError> {
    let (recipe, log) = (wanted.beside("yaml"), wanted.beside("log"));
    let parent = log.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(io(parent))?;
    write_file(&recipe, yaml::recipe(&wanted.keys).as_bytes())?;
    let out = File::create(&log).map_err(io(&log))?;
    let program = std::env::current_exe().map_err(io(Path::new("peft")))?;
    let mut command = Command::new(&program);
    command.arg("train").arg(&recipe);
    command.args(resume.then_some(["--resume", "auto"]).into_iter().flatten());
    command.args(offline.then_some("--offline"));
    command.stdin(Stdio::null()).stdout(out.try_clone().map_err(io(&log))?).stderr(out);
    // A group of its own: a signal from the terminal reaches it once, through this process.
    command.process_group(0);
    end_with_this_process(&mut command);
    let mut child = command.spawn().map_err(io(&program))?;
    let status = wait(&mut child, stop, look).map_err(io(&program))?;
    Ok(match status {
        status if status.success() => Ended::Finished,
        _ if stop.requested().load(Ordering::SeqCst) => Ended::Stopped,
        status => Ended::Failed(reason(&log).unwrap_or_else(|| format!("peft train ended with {status}"))),
    })
}

/// Waits for the end, and passes on that it is to stop.
fn wait(child: &mut Child, stop: &StopSignal, look: &mut dyn FnMut()) -> std::io::Result<ExitStatus> {
    let mut told = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if !told && stop.requested().load(Ordering::SeqCst) {
            // SAFETY: the child has not been waited for, so the number is still its own.
            unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
            told = true;
        }
        look();
        std::thread::sleep(PAUSE);
    }
}

/// Asks the system to stop the process gently should this one be killed.
#[cfg(target_os = "linux")]
fn end_with_this_process(command: &mut Command) {
    // SAFETY: between fork and exec only a system call is made.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn end_with_this_process(_command: &mut Command) {}

/// The error that a log ends with.
pub fn reason(log: &Path) -> Option<String> {
    let text = String::from_utf8_lossy(&read_bounded(log, MAX_LOG_BYTES).ok()?).into_owned();
    text.lines().rev().find_map(|line| line.strip_prefix("error: ")).map(str::to_string)
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CliError {
    move |source| CliError::Io { path: path.to_path_buf(), source }
}
