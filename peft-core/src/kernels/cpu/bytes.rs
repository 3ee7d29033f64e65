//! Tensors in the pool's memory: what burn drops at the end of a step, the next step takes again.

use super::buffers::Buffer;
use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use std::mem::MaybeUninit;

/// A buffer behind burn's bytes; it goes back to the pool with them.
struct Pooled(Buffer);

impl AllocationController for Pooled {
    fn alloc_align(&self) -> usize {
        align_of::<f32>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let (start, len) = (self.0.as_mut_ptr(), size_of_val(&self.0[..]));
        // SAFETY: the buffer's bytes; the caller writes initialised ones.
        Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), len) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        // SAFETY: the buffer's bytes.
        Ok(unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), size_of_val(&self.0[..])) })
    }
}

/// The bytes of `buffer`, without a copy.
pub(crate) fn bytes(buffer: Buffer) -> Bytes {
    let len = size_of_val(&buffer[..]);
    // SAFETY: all bytes of a buffer are initialised.
    unsafe { Bytes::from_controller(Box::new(Pooled(buffer)), len) }
}

#[cfg(test)]
mod tests {
    use super::super::buffers;
    use super::*;
    use burn::tensor::{DType, Device, Tensor, TensorData};

    #[test]
    fn a_tensor_gives_its_memory_back() {
        let (_turn, len) = (buffers::tests::untrimmed(), 5_234_567);
        let mut buffer = buffers::take(len);
        buffer.iter_mut().enumerate().for_each(|(i, v)| *v = i as f32);
        let start = buffer.as_ptr();
        let data = TensorData::from_bytes(bytes(buffer), [len], DType::F32);
        let tensor = Tensor::<1>::from_data(data, &Device::flex());
        let doubled: Vec<f32> = (tensor.clone() + tensor.clone()).try_into_vec_as().expect("numbers");
        assert!(doubled.iter().enumerate().all(|(i, v)| *v == 2.0 * i as f32));
        let shared = tensor.clone().mul_scalar(0.0);
        assert_eq!(tensor.narrow(0, 7, 1).into_scalar::<f32>(), 7.0);
        drop(shared);
        assert_eq!(buffers::take(len).as_ptr(), start);
    }
}
