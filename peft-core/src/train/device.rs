//! What of a device that fails becomes an error.
//!
//! Work on a GPU is enqueued and fails later, in whatever reads from the device next; the tensor library panics there.

use super::error::TrainError;
use crate::contain::contained;
use crate::kernels::fault;
use burn::tensor::{DType, Device, Tensor};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// What is wrong with the device, if anything is. The CPU does not fail.
fn failure(device: &Device) -> Option<String> {
    let read = || Tensor::<1>::zeros([1], (device, DType::F32)).try_into_scalar::<f32>();
    fault().or_else(|| match contained(read) {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(panic) => Some(panic),
    })
}

/// Does `work` on `device` after `step` steps. Where it panics since the device has failed, that is the error; any other
/// panic goes on.
pub(super) fn on_device<T>(
    device: &Device,
    step: u64,
    work: impl FnOnce() -> crate::Result<T>,
) -> crate::Result<T> {
    unless_failed(step, work, || failure(device))
}

fn unless_failed<T>(
    step: u64,
    work: impl FnOnce() -> crate::Result<T>,
    failure: impl FnOnce() -> Option<String>,
) -> crate::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| match failure() {
        Some(message) => Err(TrainError::Device { step: step + 1, message }.into()),
        None => resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_panic_is_an_error_where_the_device_failed() {
        let failed = || Some("CUDA: 719".to_string());
        assert_eq!(unless_failed(4, || Ok(7), || panic!("not asked")).unwrap(), 7);
        let error = contained(|| unless_failed::<()>(4, || panic!("cannot be read"), failed)).unwrap();
        let said = error.unwrap_err().to_string();
        assert_eq!(said, "step 5: CUDA: 719; stopped, earlier checkpoints stand as they are");
        let panic = contained(|| unless_failed::<()>(4, || panic!("a mistake of ours"), || None));
        assert_eq!(panic.unwrap_err(), "a mistake of ours");
    }

    #[test]
    fn the_cpu_has_not_failed() {
        assert_eq!(failure(&Device::flex()), None);
    }
}
