//! What the tests share: the program, the fixtures, the numbers.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// A file or folder under `tests/golden`.
pub fn golden(name: &str) -> PathBuf {
    root().join("tests/golden").join(name)
}

/// Builds something of `peft-cli` in the profile of the running tests; returns the folder that profile builds into.
fn build(what: &[&str]) -> PathBuf {
    // target/PROFILE/deps/all-HASH → target/PROFILE
    let exe = std::env::current_exe().expect("the test's own path");
    let dir = exe.ancestors().nth(2).expect("tests run from target/PROFILE/deps").to_path_buf();
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--workspace"]).args(what).current_dir(root());
    build.env("CARGO_TARGET_DIR", dir.parent().expect("a target folder"));
    if dir.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().expect("cargo runs").success(), "{what:?} does not build");
    dir
}

/// The program `peft`.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| build(&["--bin", "peft"]).join(format!("peft{}", std::env::consts::EXE_SUFFIX)))
}

/// The generator of the quickstart's data and untrained base.
pub fn quickstart_world() -> PathBuf {
    let name = format!("quickstart_world{}", std::env::consts::EXE_SUFFIX);
    build(&["--example", "quickstart_world"]).join("examples").join(name)
}

/// Runs `peft` in the repository's root and returns what came of it.
pub fn peft(args: &[&str]) -> Output {
    Command::new(program()).args(args).current_dir(root()).output().expect("peft starts")
}

/// Runs `peft`, which must succeed; returns its stdout.
pub fn peft_ok(args: &[&str]) -> String {
    let out = peft(args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "peft {args:?} failed with {:?}\n{stderr}", out.status.code());
    String::from_utf8(out.stdout).expect("stdout is text")
}

/// Runs `peft`, which must refuse its input with exit code 2; returns its stderr.
pub fn peft_refuses(args: &[&str]) -> String {
    let out = peft(args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "peft {args:?}\n{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}
