//! Peak memory of the process, or of the device's allocator.

use burn::tensor::Device;

/// The most memory used so far, in bytes: on a device with an allocator of its own what that holds now, on the CPU
/// the peak resident size of the process. `None` where neither is known.
pub fn peak_memory_bytes(device: &Device) -> Option<u64> {
    match device.memory_pool_usage() {
        Some(usage) => Some(usage.bytes_reserved),
        None => peak_resident_bytes(),
    }
}

/// `VmHWM` of the process.
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}
