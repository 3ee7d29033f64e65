//! Graphics processors, as far as this build can use them.

use crate::device::cuda_devices;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where a driver's library lies when the loader's own list does not name it.
const LIBRARIES: [&str; 4] =
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/cuda/compat"];

/// What there is.
pub struct Gpus {
    /// Whether this program can use CUDA at all.
    pub cuda_build: bool,
    /// Whether the driver's library is on this machine.
    pub driver_library: bool,
    /// Devices that this program can train on.
    pub usable: usize,
    /// Devices that the driver's own tool tells of.
    pub devices: Vec<Gpu>,
}

/// One device.
#[derive(Debug, PartialEq, Eq)]
pub struct Gpu {
    /// As it calls itself.
    pub name: String,
    /// Memory in bytes.
    pub total: u64,
    /// What of it nobody uses.
    pub free: u64,
}

impl Gpus {
    /// Asks the machine.
    pub fn read() -> Self {
        let driver_library = driver_library();
        Self {
            cuda_build: cfg!(feature = "cuda"),
            driver_library,
            usable: if driver_library { cuda_devices() } else { 0 },
            devices: parse(&ask()),
        }
    }
}

fn driver_library() -> bool {
    let path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let listed = std::fs::read("/etc/ld.so.cache")
        .is_ok_and(|cache| cache.windows(12).any(|part| part == b"libcuda.so.1"));
    let named = std::env::split_paths(&path).any(|dir| dir.join("libcuda.so.1").exists());
    listed || named || LIBRARIES.iter().any(|dir| Path::new(dir).join("libcuda.so.1").exists())
}

/// What the driver's tool prints; nothing where it is missing.
fn ask() -> String {
    let mut command = Command::new("nvidia-smi");
    command.args(["--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]);
    match command.stdin(Stdio::null()).stderr(Stdio::null()).output() {
        Ok(out) if out.status.success() => String::from_utf8_lossy(&out.stdout).into_owned(),
        _ => String::new(),
    }
}

/// Lines of name, total and free memory in MiB; what is not such a line says nothing.
fn parse(text: &str) -> Vec<Gpu> {
    let line = |line: &str| {
        let mut fields = line.rsplitn(3, ',').map(str::trim);
        let mut mebibytes = || fields.next()?.parse::<u64>().ok()?.checked_mul(1 << 20);
        let (free, total) = (mebibytes()?, mebibytes()?);
        Some(Gpu { name: fields.next()?.to_string(), total, free })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_from_lines() {
        let text = "NVIDIA H100, 80GB, 81559, 81000\nNVIDIA X, [N/A], [N/A]\n\n";
        let expected = Gpu { name: "NVIDIA H100, 80GB".to_string(), total: 81559 << 20, free: 81000 << 20 };
        assert_eq!(parse(text), [expected]);
        assert_eq!(parse("No devices were found\n"), []);
    }
}
