//! `peft doctor`: what this machine can run.

mod fit;
mod gpu;
mod memory;
mod processor;

use crate::args::DoctorArgs;
use crate::error::CliError;
use crate::{open, render};
use gpu::Gpus;
use memory::Memory;
use peft_core::checkpoint::free_bytes;
use processor::{Processor, SIZE};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Less disk than this is soon full.
const LITTLE_DISK: u64 = 5 << 30;

/// Less memory than this takes tiny models alone.
const LITTLE_MEMORY: u64 = 2 << 30;

/// The cache of the hub.
struct Hub {
    cache: PathBuf,
    writable: bool,
    free: Option<u64>,
    token: bool,
    offline: bool,
}

/// The machine.
struct Machine {
    processor: Processor,
    memory: Option<Memory>,
    gpus: Gpus,
    hub: Hub,
    disk: Option<u64>,
    gflops: f64,
}

/// Runs the command.
pub fn run(args: DoctorArgs) -> Result<(), CliError> {
    let options = open::hub(None, false);
    let machine = Machine {
        processor: Processor::read(),
        memory: Memory::read(),
        gpus: Gpus::read(),
        hub: Hub {
            writable: is_writable(&options.cache_dir),
            free: free_bytes(&options.cache_dir).ok(),
            token: options.token.is_some(),
            offline: options.offline,
            cache: options.cache_dir,
        },
        disk: free_bytes(Path::new(".")).ok(),
        gflops: processor::gflops(),
    };
    if args.json {
        println!("{}", machine.json());
        return Ok(());
    }
    for (name, value) in machine.lines() {
        println!("  {name:<11} {value}");
    }
    println!();
    for warning in machine.warnings() {
        render::warning(&warning);
    }
    Ok(())
}

/// Whether a file can be made in the folder, or in the nearest one above it that is there.
fn is_writable(dir: &Path) -> bool {
    let Ok(dir) = std::path::absolute(dir) else { return false };
    let Some(dir) = dir.ancestors().find(|dir| dir.exists()) else { return false };
    let probe = dir.join(format!(".peft-doctor-{}", std::process::id()));
    let made = std::fs::File::create_new(&probe).is_ok();
    if made {
        // It is empty; where it cannot be removed, nothing can be done about it.
        let _ = std::fs::remove_file(&probe);
    }
    made
}

impl Machine {
    fn fits_cpu(&self) -> Option<u64> {
        self.memory.map(|memory| fit::lora_parameters(memory.usable(), 4))
    }

    /// The largest model of any device that this build can use, weights in bf16.
    fn fits_gpu(&self) -> Option<u64> {
        let devices = self.gpus.devices.iter().filter(|_| self.gpus.usable > 0);
        devices.map(|gpu| fit::lora_parameters(gpu.free, 2)).max()
    }

    fn json(&self) -> Value {
        let gpu =
            |gpu: &gpu::Gpu| json!({"name": gpu.name, "total_bytes": gpu.total, "free_bytes": gpu.free});
        let limit = self.memory.and_then(|memory| memory.limit);
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": {
                "model": self.processor.model,
                "cores": self.processor.cores,
                "simd": self.processor.simd,
                "matmul_gflops": (self.gflops * 10.0).round() / 10.0,
            },
            "memory": {
                "total_bytes": self.memory.map(|memory| memory.total),
                "available_bytes": self.memory.map(|memory| memory.available),
                "cgroup_limit_bytes": limit.map(|limit| limit.bytes),
                "usable_bytes": self.memory.map(|memory| memory.usable()),
            },
            "disk": { "here_free_bytes": self.disk, "hub_cache_free_bytes": self.hub.free },
            "gpu": {
                "cuda_build": self.gpus.cuda_build,
                "driver_library": self.gpus.driver_library,
                "usable_devices": self.gpus.usable,
                "devices": self.gpus.devices.iter().map(gpu).collect::<Vec<_>>(),
            },
            "hub": {
                "cache_dir": self.hub.cache.display().to_string(),
                "cache_writable": self.hub.writable,
                "token": self.hub.token,
                "offline": self.hub.offline,
            },
            "fits": {
                "lora_parameters_cpu_f32": self.fits_cpu(),
                "lora_parameters_gpu_bf16": self.fits_gpu(),
                "assumes": { "fixed_bytes": fit::FIXED, "share_of_weights": fit::SHARE },
            },
            "warnings": self.warnings(),
        })
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let unknown = || "unknown".to_string();
        let size = |bytes: Option<u64>| bytes.map_or_else(unknown, render::bytes);
        let simd = match self.processor.simd.as_slice() {
            [] => "no vector instructions known".to_string(),
            simd => simd.join(" "),
        };
        let memory = self.memory.map_or_else(unknown, |memory| {
            let limit = memory.limit.map(|limit| format!(", limited to {}", render::bytes(limit.bytes)));
            let (usable, total) = (render::bytes(memory.usable()), render::bytes(memory.total));
            format!("{usable} usable of {total}{}", limit.unwrap_or_default())
        });
        let mut lines = vec![
            (
                "peft",
                format!(
                    "{} on {} {}",
                    env!("CARGO_PKG_VERSION"),
                    std::env::consts::OS,
                    std::env::consts::ARCH
                ),
            ),
            ("cpu", self.processor.model.clone().unwrap_or_else(unknown)),
            ("", format!("{} cores for this process, {simd}", self.processor.cores)),
            ("", format!("{:.0} GFLOP/s multiplying {SIZE}×{SIZE} f32 matrices", self.gflops)),
            ("memory", memory),
            ("gpu", self.gpu_line()),
        ];
        lines.extend(self.gpus.devices.iter().map(|gpu| {
            ("", format!("{}: {} free of {}", gpu.name, render::bytes(gpu.free), render::bytes(gpu.total)))
        }));
        let writable = if self.hub.writable { "writable" } else { "not writable" };
        let token = if self.hub.token { "a token is set" } else { "no token" };
        let offline = if self.hub.offline { ", offline" } else { "" };
        lines.extend([
            ("disk", format!("{} free here", size(self.disk))),
            ("hub cache", format!("{}, {writable}, {} free", self.hub.cache.display(), size(self.hub.free))),
            ("hub", format!("{token}{offline}")),
        ]);
        let assumed = format!(
            "{} and {:.0} % of the weights beside them",
            render::bytes(fit::FIXED),
            100.0 * fit::SHARE
        );
        if let Some(fits) = self.fits_cpu() {
            lines.push((
                "fits",
                format!("LoRA with recomputation on the CPU: up to {} parameters", fit::parameters(fits)),
            ));
            lines.push(("", format!("(f32: 4 bytes a weight, {assumed})")));
        }
        if let Some(fits) = self.fits_gpu() {
            lines.push((
                "",
                format!("LoRA with recomputation on a GPU: up to {} parameters", fit::parameters(fits)),
            ));
            lines.push(("", format!("(bf16: 2 bytes a weight, {assumed})")));
        }
        lines
    }

    fn gpu_line(&self) -> String {
        let library = if self.gpus.driver_library {
            "a CUDA driver is installed"
        } else {
            "no CUDA driver is installed"
        };
        match (self.gpus.cuda_build, self.gpus.usable) {
            (false, _) => format!("this program was built for the CPU; {library}"),
            (true, 0) => format!("none that can be used; {library}"),
            (true, usable) => format!("{usable} that can be used"),
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut warn = |when: bool, message: &str| {
            if when {
                warnings.push(message.to_string());
            }
        };
        let little = |bytes: Option<u64>, bound| bytes.is_some_and(|bytes| bytes < bound);
        let gpus = &self.gpus;
        warn(cfg!(debug_assertions), "this is a debug build, many times slower: build with --release");
        warn(
            cfg!(target_arch = "x86_64") && !self.processor.simd.contains(&"avx2"),
            "the processor has no AVX2: training will be slow",
        );
        warn(
            little(self.memory.map(|memory| memory.usable()), LITTLE_MEMORY),
            "less than 2 GiB of memory can be used: tiny models alone fit",
        );
        warn(
            little(self.disk, LITTLE_DISK),
            "less than 5 GiB of disk are free here: checkpoints may not fit",
        );
        warn(
            little(self.hub.free, LITTLE_DISK),
            "less than 5 GiB of disk are free for the hub's cache: downloads may not fit",
        );
        warn(
            !self.hub.writable,
            "the hub's cache cannot be written: nothing can be downloaded; HF_HOME moves it",
        );
        warn(self.hub.offline, "HF_HUB_OFFLINE is set: only what is in the cache can be used");
        warn(
            !gpus.cuda_build && gpus.driver_library && !gpus.devices.is_empty(),
            "there is a GPU that this program cannot use: build with --features cuda",
        );
        warn(
            gpus.cuda_build && !gpus.devices.is_empty() && gpus.usable == 0,
            "the driver tells of a GPU, but CUDA finds none: driver and CUDA libraries may not fit together",
        );
        warnings
    }
}
