//! The place of the largest value of each row: the next token of greedy generation.

use super::backend::{Kernels, served, with_backend};
use burn::tensor::{DType, Int, Tensor};

/// The first place of the largest value of each row of `[rows, columns]`, `[rows]`; a row of NaNs gives any of its places.
/// No graph is made.
pub fn largest(rows: Tensor<2>) -> Tensor<1, Int> {
    fn fused<B: Kernels>(rows: Tensor<2>) -> Tensor<1, Int> {
        B::integer_tensor(B::largest(&B::primitive(rows)))
    }
    match served(&rows.device(), rows.dtype()) {
        Some(served) => with_backend!(served, fused(rows)),
        None => {
            let count = rows.dims()[0];
            rows.argmax(1).reshape([count])
        }
    }
}

/// Asks for token ids now, `[rows]`, and returns what waits for them: what the device is given to do in between does not
/// delay them.
pub fn read_later(ids: Tensor<1, Int>) -> Box<dyn FnOnce() -> Vec<u32>> {
    fn asked<B: Kernels>(ids: Tensor<1, Int>) -> Box<dyn FnOnce() -> Vec<u32>> {
        B::read_later(B::integers(ids))
    }
    match served(&ids.device(), DType::F32) {
        Some(served) if ids.dtype() == DType::I32 => with_backend!(served, asked(ids)),
        _ => {
            let ids = ids.try_into_vec_as::<i64>().expect(READ_BACK);
            Box::new(move || ids.into_iter().map(|id| id as u32).collect())
        }
    }
}

/// What holds wherever a result is read: burn reports a lost device nowhere else, and no file or flag of a user's leads to
/// it.
pub(crate) const READ_BACK: &str = "a model's results can be read back from their device";
