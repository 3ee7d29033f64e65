//! What a stranger's files cannot do: run code, lead out of their folder, hang the program, fill the memory; and what
//! the program never does: call home, or write a secret.

mod files;
mod network;
mod sizes;

use peft_tests::{program, root};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// More than any refusal takes, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs `peft`, which must end by itself.
fn ends(args: &[&str]) -> Output {
    ends_with(Command::new(program()).args(args))
}

fn ends_with(command: &mut Command) -> Output {
    let piped = || Stdio::piped();
    let mut child = command.current_dir(root()).stdout(piped()).stderr(piped()).spawn().unwrap();
    let start = Instant::now();
    let mut hangs = false;
    while !hangs && child.try_wait().unwrap().is_none() {
        hangs = start.elapsed() > PATIENCE;
        std::thread::sleep(Duration::from_millis(20));
    }
    if hangs {
        child.kill().unwrap();
    }
    let out = child.wait_with_output().unwrap();
    assert!(!hangs, "{command:?} hangs\n{}", String::from_utf8_lossy(&out.stderr));
    out
}

/// Refused as bad input, in time, by one error that contains all of `expected`.
fn refused(args: &[&str], expected: &[&str]) {
    let out = ends(args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args:?}, signal {:?}: {stderr}", out.status.signal());
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(stderr.lines().filter(|line| line.starts_with("error")).count(), 1, "{stderr}");
    for part in expected {
        assert!(stderr.contains(part), "no `{part}` in: {stderr}");
    }
}

/// The path as an argument.
fn text(path: &Path) -> String {
    path.display().to_string()
}
