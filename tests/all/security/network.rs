//! No connection without a hub id, none offline, and no secret in a file.

use super::{ends_with, text};
use crate::program::{BASE, HELD_OUT, SHORT};
use peft_tests::program;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;

/// A place on this machine to which everything that could call home is told to call.
struct Listener(TcpListener);

impl Listener {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    fn command(&self, home: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        let here = format!("http://{}", self.0.local_addr().unwrap());
        for name in [
            "HF_ENDPOINT",
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        ] {
            command.env(name, &here);
        }
        for name in ["no_proxy", "NO_PROXY", "HF_HUB_CACHE", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", home).env("HOME", home).args(args);
        command
    }

    fn heard_nothing(&self) {
        assert_eq!(self.0.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "somebody called");
    }
}

/// Lets the kernel kill the process when it asks for an internet socket.
fn without_sockets(command: &mut Command) {
    let bpf = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let give = libc::BPF_RET | libc::BPF_K;
    // `struct seccomp_data`: the call's number, the architecture, an address, then the arguments.
    let filter = [
        bpf(load, 0, 0, 0),
        bpf(equal, libc::SYS_socket as u32, 0, 3),
        bpf(load, 16, 0, 0),
        bpf(equal, libc::AF_INET as u32, 2, 0),
        bpf(equal, libc::AF_INET6 as u32, 1, 0),
        bpf(give, libc::SECCOMP_RET_ALLOW, 0, 0),
        bpf(give, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
    ];
    let install = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: two calls that change this process alone; `program` and `filter` outlive them.
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes system calls and nothing else.
    unsafe { command.pre_exec(install) };
}

#[test]
fn a_run_on_local_files_opens_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::new();
    let sealed = |args: &[&str]| {
        let mut command = listener.command(dir.path(), args);
        without_sockets(&mut command);
        ends_with(&mut command)
    };
    // The seal holds: a hub id needs a socket.
    let out = sealed(&["generate", "--base-model", "some-org/some-model", "--prompt", "x"]);
    assert_eq!(out.status.signal(), Some(libc::SIGSYS), "{}", String::from_utf8_lossy(&out.stderr));

    let path = |name: &str| text(&dir.path().join(name));
    let (run, adapter, merged) = (path("run"), path("run/adapter"), path("merged"));
    let mut train = vec!["train", "recipes/quickstart.yaml", "--output-dir", &run];
    train.extend(SHORT.iter().flat_map(|entry| ["--override", entry]));
    let evaluate =
        ["evaluate", "--base-model", BASE, "--data", HELD_OUT, "--type", "prompt_completion", "--limit", "2"];
    let commands: [&[&str]; 5] = [
        &train,
        &evaluate,
        &["generate", "--base-model", BASE, "--adapter", &adapter, "--prompt", "x", "--max-new-tokens", "2"],
        &["merge", "--base-model", BASE, "--adapter", &adapter, "--output", &merged],
        &["inspect", &merged],
    ];
    for args in commands {
        let out = sealed(args);
        assert!(out.status.success(), "{args:?} {:?} {}", out.status, String::from_utf8_lossy(&out.stderr));
    }
    listener.heard_nothing();
}

#[test]
fn offline_calls_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::new();
    let args = ["generate", "--base-model", "some-org/some-model", "--prompt", "x"];
    let by_variable = ends_with(listener.command(dir.path(), &args).env("HF_HUB_OFFLINE", "1"));
    let by_flag = ends_with(&mut listener.command(dir.path(), &[&args[..], &["--offline"]].concat()));
    for out in [by_variable, by_flag] {
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(2) && stderr.contains("some-org/some-model"), "{stderr}");
    }
    listener.heard_nothing();
}

#[test]
fn the_token_is_written_nowhere() {
    const TOKEN: &str = "hf_NeverWriteThisDown";
    let dir = tempfile::tempdir().unwrap();
    let run = text(&dir.path().join("run"));
    let mut args = vec!["train", "recipes/quickstart.yaml", "--output-dir", &run];
    args.extend(SHORT.iter().flat_map(|entry| ["--override", entry]));
    let listener = Listener::new();
    let train = ends_with(listener.command(dir.path(), &args).env("HF_TOKEN", TOKEN));
    assert!(train.status.success());
    // Closed, so that the hub cannot be reached and the error says so.
    let hub = ["generate", "--base-model", "some-org/some-model", "--prompt", "x"];
    let mut command = listener.command(dir.path(), &hub);
    drop(listener);
    let failed = ends_with(command.env("HF_TOKEN", TOKEN));
    assert_eq!(failed.status.code(), Some(1));
    for output in [&train.stdout, &train.stderr, &failed.stdout, &failed.stderr] {
        assert!(!contains(output, TOKEN));
    }
    let mut files = 0;
    for path in tree(dir.path()) {
        assert!(!contains(&fs::read(&path).unwrap(), TOKEN), "{}", path.display());
        files += 1;
    }
    assert!(files > 5);
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// All files below a folder.
fn tree(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { tree(&path) } else { vec![path] }).collect()
}
