//! Memory of the process, or of the device's allocator: its peak, and what a device has.

use crate::kernels::gpu_memory;
use crate::model::Decoder;
use burn::tensor::{DType, Device, Tensor};
use serde::Serialize;

/// The most memory used so far, in bytes: on a device with an allocator of its own what that holds now, on the CPU
/// the peak resident size of the process. `None` where neither is known.
pub fn peak_memory_bytes(device: &Device) -> Option<u64> {
    match device.memory_pool_usage() {
        Some(usage) => Some(usage.bytes_reserved),
        None => peak_resident_bytes(),
    }
}

/// Readies a device's pool for steps of `model`. What loading left unused goes back; and as the pool's pages are as large as
/// the largest allocation so far, and it begins anew with larger ones while the old ones are still in use, it is asked for
/// as much as the largest weight, which the activations of a step seldom exceed.
pub fn ready_memory(model: &Decoder) {
    if model.device == Device::flex() {
        return;
    }
    model.device.memory_cleanup();
    let bytes = |value: &Tensor<2>| value.shape().num_elements() * value.dtype().size();
    let largest = model.parameters().into_iter().map(|parameter| bytes(&parameter.value)).max().unwrap_or(0);
    drop(Tensor::<1>::empty([largest / size_of::<f32>()], (&model.device, DType::F32)));
}

/// The memory that the process has now, in bytes. `None` where it is not known.
pub fn resident_bytes() -> Option<u64> {
    kib("/proc/self/status", "VmRSS:")
}

/// `VmHWM` of the process.
fn peak_resident_bytes() -> Option<u64> {
    kib("/proc/self/status", "VmHWM:")
}

/// What a device has.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct DeviceMemory {
    /// Bytes in all.
    pub total_bytes: Option<u64>,
    /// Bytes that nobody uses.
    pub available_bytes: Option<u64>,
}

/// The memory of a GPU; or of the machine, or of the container that the process runs in.
pub fn device_memory(device: &Device) -> DeviceMemory {
    if *device != Device::flex() {
        let (free, total) = gpu_memory(device).unzip();
        return DeviceMemory { total_bytes: total, available_bytes: free };
    }
    let (total, available) = (kib("/proc/meminfo", "MemTotal:"), kib("/proc/meminfo", "MemAvailable:"));
    match container_memory() {
        Some((limit, used)) if total.is_none_or(|total| limit < total) => DeviceMemory {
            total_bytes: Some(limit),
            available_bytes: Some(available.unwrap_or(limit).min(limit.saturating_sub(used))),
        },
        _ => DeviceMemory { total_bytes: total, available_bytes: available },
    }
}

/// Limit and use of the control group, of its second version or first.
fn container_memory() -> Option<(u64, u64)> {
    const FILES: [(&str, &str); 2] = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ];
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    FILES.iter().find_map(|(limit, used)| Some((number(limit)?, number(used)?)))
}

/// The entry of that name, in KiB there, as bytes.
fn kib(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}
