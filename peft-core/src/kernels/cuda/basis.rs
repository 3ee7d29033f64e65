//! Combinations of random matrices, many in a launch.

use super::backend::{elementwise, empties};
use super::commands::{Arguments, Launch};
use super::engine::{Buffers, submit};
use crate::kernels::backend::Kernels;
use crate::kernels::basis::Span;
use burn::backend::Cube;
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;

/// Matrices of a launch, as in the kernels: what makes them travels among its arguments.
const AT_ONCE: usize = 64;
/// Values that a thread draws at a time, as in the kernels.
const VALUES: usize = 8;
/// Elements of a basis that a block of the backward takes, as in the kernels.
const ELEMENTS: usize = 4;
const THREADS: usize = 256;

/// Two 32-bit numbers as a word.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// What a launch reads and writes for one matrix, and the numbers that follow the two addresses among its arguments.
struct Item<const N: usize> {
    from: usize,
    to: usize,
    numbers: [u64; N],
}

impl<const N: usize> Item<N> {
    /// All items as an argument.
    fn structure(items: &[Self], buffers: &[u64]) -> Arguments {
        let mut words = Vec::with_capacity(AT_ONCE * (2 + N));
        for Self { from, to, numbers } in items {
            words.extend([buffers[*from], buffers[*to]]);
            words.extend(numbers);
        }
        words.resize(AT_ONCE * (2 + N), 0);
        Arguments::default().structure(&words)
    }
}

/// The matrix of each span with its coefficients, `[1, len]`.
pub fn combinations(wanted: &[(Span, Tensor<2>)]) -> Vec<Tensor<2>> {
    let mut results = Vec::with_capacity(wanted.len());
    for chunk in wanted.chunks(AT_ONCE) {
        let (mut buffers, mut items, mut longest) = (Buffers::default(), Vec::new(), 0);
        let forms = chunk.iter().map(|(span, _)| Some((vec![1, span.basis.len], DType::F32))).collect();
        let matrices = empties(&Cube::primitive(chunk[0].1.clone()), forms);
        for ((Span { basis, scale, offset }, coefficients), matrix) in
            chunk.iter().zip(matrices.into_iter().flatten())
        {
            let coefficients = Cube::primitive(coefficients.clone());
            let (offset_key, offset) = offset.map_or(([0; 2], 0.0), |(basis, scale)| (basis.key, scale));
            items.push(Item {
                from: buffers.add_rows(&coefficients),
                to: buffers.add(&matrix),
                numbers: [
                    pair(basis.key[0], basis.key[1]),
                    pair(offset_key[0], offset_key[1]),
                    pair(basis.len as u32, coefficients.meta.shape()[1] as u32),
                    pair(scale.to_bits(), offset.to_bits()),
                ],
            });
            longest = longest.max(basis.len);
            results.push(matrix);
        }
        // The generator's blocks come by 16, which have 128 values.
        let blocks = (longest.next_multiple_of(16 * VALUES) / VALUES).div_ceil(THREADS);
        let launch = Launch { grid: (blocks, items.len(), 1), block: (THREADS, 1), shared: 0 };
        let client = results[results.len() - 1].client.clone();
        submit("combine", &client, buffers, move |queue, buffers| {
            queue.launch(elementwise(DType::F32), "combine", launch, Item::structure(&items, buffers))
        });
    }
    results.into_iter().map(Cube::tensor).collect()
}

/// The gradients of the coefficients of each span from that of its matrix, `[1, k]`.
pub fn combinations_backward(gradients: &[(Span, Tensor<2>, usize)]) -> Vec<Tensor<2>> {
    let mut results: Vec<CubeTensor> = Vec::with_capacity(gradients.len());
    for chunk in gradients.chunks(AT_ONCE) {
        let (mut buffers, mut items, mut most) = (Buffers::default(), Vec::new(), 0);
        let forms = chunk.iter().map(|(_, _, count)| Some((vec![1, *count], DType::F32))).collect();
        let of_coefficients = empties(&Cube::primitive(chunk[0].1.clone()), forms);
        for ((Span { basis, scale, .. }, gradient, count), products) in
            chunk.iter().zip(of_coefficients.into_iter().flatten())
        {
            let gradient = Cube::primitive(gradient.clone());
            items.push(Item {
                from: buffers.add_rows(&gradient),
                to: buffers.add(&products),
                numbers: [
                    pair(basis.key[0], basis.key[1]),
                    pair(basis.len as u32, *count as u32),
                    pair(scale.to_bits(), 0),
                ],
            });
            most = most.max(*count);
            results.push(products);
        }
        let launch =
            Launch { grid: (most.div_ceil(ELEMENTS), items.len(), 1), block: (THREADS, 1), shared: 0 };
        let client = results[results.len() - 1].client.clone();
        submit("combine_backward", &client, buffers, move |queue, buffers| {
            let arguments = Item::structure(&items, buffers);
            queue.launch(elementwise(DType::F32), "combine_backward", launch, arguments)
        });
    }
    results.into_iter().map(Cube::tensor).collect()
}
