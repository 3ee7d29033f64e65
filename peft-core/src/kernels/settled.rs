//! Memory for what lives as long as the run: weights, trained values, what an optimizer remembers.

use burn::tensor::Tensor;

/// `tensor` where it can stay. On a GPU that is memory of its own with its rows one after another.
///
/// cubecl puts rows of most lengths at multiples of 512 bytes, and what reads them otherwise copies them whenever it does.
/// And it looks through all that its pool holds whenever it is asked for memory, so the pool is left to a step's
/// temporaries.
pub fn settled<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "cuda")]
    if tensor.device() != burn::tensor::Device::flex() {
        return super::cuda::settled(tensor);
    }
    tensor
}
