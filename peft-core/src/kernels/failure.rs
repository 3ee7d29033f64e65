//! Devices that fail.
//!
//! Work on a GPU is enqueued and fails later: in whatever reads from the device next, where the tensor library panics, or
//! without another word than [`fault`]'s, where a kernel could not be enqueued.

use super::fault;
use crate::contain::contained;
use burn::tensor::{DType, Device, Tensor};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Does `work` on `device`.
///
/// # Errors
/// What the device said, where it failed in that or before; the work's result is then not to be used.
///
/// # Panics
/// Where the work does while the device is well.
pub fn unless_failed<T>(device: &Device, work: impl FnOnce() -> T) -> Result<T, String> {
    unless(work, fault, || unreadable(device))
}

/// Why nothing can be read from the device, if nothing can.
fn unreadable(device: &Device) -> Option<String> {
    let read = || Tensor::<1>::zeros([1], (device, DType::F32)).try_into_scalar::<f32>();
    match contained(read) {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(panic) => Some(panic),
    }
}

fn unless<T>(
    work: impl FnOnce() -> T,
    fault: impl Fn() -> Option<String>,
    unreadable: impl FnOnce() -> Option<String>,
) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => fault().map_or(Ok(result), Err),
        Err(panic) => match fault().or_else(unreadable) {
            Some(message) => Err(message),
            None => resume_unwind(panic),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_panic_is_an_error_where_the_device_failed() {
        let (said, well) = (|| Some("CUDA: 719".to_string()), || None);
        let unasked = || panic!("not asked");
        assert_eq!(unless(|| 7, well, unasked), Ok(7));
        // A kernel that was not enqueued leaves results of nothing.
        assert_eq!(unless(|| 7, said, unasked), Err("CUDA: 719".to_string()));
        let read = || -> i32 { panic!("cannot be read") };
        assert_eq!(contained(|| unless(read, said, unasked)).unwrap(), Err("CUDA: 719".to_string()));
        let poisoned = || Some("poisoned".to_string());
        assert_eq!(contained(|| unless(read, well, poisoned)).unwrap(), Err("poisoned".to_string()));
        assert_eq!(contained(|| unless(read, well, well)).unwrap_err(), "cannot be read");
    }

    #[test]
    fn the_cpu_has_not_failed() {
        assert_eq!(unreadable(&Device::flex()), None);
    }
}
