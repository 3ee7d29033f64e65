//! `auto`, `cpu`, `cuda`, `cuda:N`; `auto`, `f32`, `bf16`.

use crate::error::CliError;
use burn::tensor::Device;
use peft_core::kernels::unless_failed;
use peft_core::model::ComputeType;

/// The device of that name. `auto` is the first GPU of a program built with CUDA where there is one, else the CPU.
pub fn device(name: &str) -> Result<Device, CliError> {
    let wrong = |message: &str| CliError::Device { device: name.to_string(), message: message.to_string() };
    match name {
        "cpu" => Ok(Device::flex()),
        "auto" => Ok(cuda(0).unwrap_or_else(Device::flex)),
        _ => {
            let index = match name.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|index| index.parse().ok()),
                None => None,
            };
            let index = index.ok_or_else(|| wrong("expected auto, cpu, cuda or cuda:N"))?;
            if !cfg!(feature = "cuda") {
                return Err(wrong("this program was built without CUDA (cargo build --features cuda)"));
            }
            cuda(index).ok_or_else(|| wrong("no such CUDA device on this machine"))
        }
    }
}

/// Does `work` on `device`.
///
/// # Errors
/// Those of the work, and a device that failed in it.
pub fn watched<T>(device: &Device, work: impl FnOnce() -> Result<T, CliError>) -> Result<T, CliError> {
    unless_failed(device, work).unwrap_or_else(|message| Err(CliError::DeviceFailed(message)))
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Option<Device> {
    (index < cuda_devices()).then(|| Device::cuda(index))
}

/// How many CUDA devices this program can use.
#[cfg(feature = "cuda")]
pub fn cuda_devices() -> usize {
    Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec().len()
}

/// How many CUDA devices this program can use: none, in a build without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn cuda_devices() -> usize {
    0
}

#[cfg(not(feature = "cuda"))]
fn cuda(_index: usize) -> Option<Device> {
    None
}

/// The type of weights and activations. `auto` is bf16 on a GPU and f32 on the CPU.
pub fn compute_type(name: &str, device: &Device) -> Result<ComputeType, CliError> {
    let cpu = *device == Device::flex();
    match name {
        "auto" if cpu => Ok(ComputeType::F32),
        "auto" | "bf16" | "bfloat16" => Ok(ComputeType::Bf16),
        "f32" | "float32" => Ok(ComputeType::F32),
        other => Err(CliError::flag("dtype", format!("`{other}` is none of auto, f32, bf16"))),
    }
}
