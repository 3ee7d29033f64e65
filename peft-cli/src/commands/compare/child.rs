//! One run in a process of its own: what it does to memory, and how it may end, touches no other run.

use super::plan::Wanted;
use crate::commands::train::signals::StopSignal;
use crate::error::{CliError, DEVICE_FAILED};
use crate::yaml;
use peft_core::checkpoint::{read_bounded, write_file};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;

/// The most that is read of a log.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// How the process ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// With a result.
    Finished,
    /// Without; why.
    Failed(String),
    /// Without, since the device failed; how.
    DeviceFailed(String),
    /// Its state saved, since this process was asked to stop.
    Stopped,
}

/// A process under way.
pub struct Running {
    child: Child,
    program: PathBuf,
    log: PathBuf,
    /// Whether it knows that it is to stop.
    told: bool,
}

impl Running {
    /// Starts `peft train` on the recipe, which is written beside the run's folder as the log is.
    ///
    /// # Errors
    /// The program cannot be started, or the files not be written.
    pub fn start(wanted: &Wanted, resume: bool, offline: bool) -> Result<Self, CliError> {
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
        let child = command.spawn().map_err(io(&program))?;
        Ok(Self { child, program, log, told: false })
    }

    /// How it ended, if it has; otherwise passes on that it is to stop.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn look(&mut self, stop: &StopSignal) -> Result<Option<Ended>, CliError> {
        let stopping = stop.requested().load(Ordering::SeqCst);
        let Some(status) = self.child.try_wait().map_err(io(&self.program))? else {
            if stopping && !self.told {
                // SAFETY: the child has not been waited for, so the number is still its own.
                unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
                self.told = true;
            }
            return Ok(None);
        };
        Ok(Some(ended(status, stopping, || reason(&self.log))))
    }
}

/// How a process ended that may have been asked to stop; `reason` is its own word on it.
fn ended(status: ExitStatus, stopping: bool, reason: impl FnOnce() -> Option<String>) -> Ended {
    let reason = || reason().unwrap_or_else(|| format!("peft train ended with {status}"));
    match status.code() {
        Some(0) => Ended::Finished,
        _ if stopping => Ended::Stopped,
        Some(code) if code == i32::from(DEVICE_FAILED) => Ended::DeviceFailed(reason()),
        _ => Ended::Failed(reason()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn how_a_process_ended() {
        let ended = |raw, stopping, reason: Option<&str>| {
            ended(ExitStatus::from_raw(raw), stopping, || reason.map(str::to_string))
        };
        let code = |code: i32| code << 8;
        assert_eq!(ended(code(0), false, None), Ended::Finished);
        // It was done when the signal came.
        assert_eq!(ended(code(0), true, None), Ended::Finished);
        assert_eq!(ended(code(143), true, None), Ended::Stopped);
        assert_eq!(ended(code(2), false, Some("r: too large")), Ended::Failed("r: too large".to_string()));
        let gone = Ended::DeviceFailed("step 9: CUDA".to_string());
        assert_eq!(ended(code(3), false, Some("step 9: CUDA")), gone);
        let killed = Ended::Failed("peft train ended with signal: 9 (SIGKILL)".to_string());
        assert_eq!(ended(9, false, None), killed);
    }
}
