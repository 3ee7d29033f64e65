//! The optimizer's update and the gradients' norm over many tensors in few launches.

use super::backend::{contiguous, elementwise, empty};
use super::engine::{Arguments, Buffers, Launch, submit};
use crate::kernels::adamw::{AdamW, Update};
use crate::kernels::norm::CLIP_EPSILON;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

/// Tensors of a launch, as in the kernels: their addresses and numbers travel among its arguments.
const AT_ONCE: usize = 64;
/// Elements that a block takes at a time, as in the kernels.
const PIECE: usize = 4096;

/// Blocks for each of the tensors; they take pieces in turn.
fn blocks(longest: usize) -> usize {
    longest.div_ceil(PIECE).clamp(1, 1024)
}

fn length(tensor: &CubeTensor) -> usize {
    tensor.meta.shape().num_elements()
}

/// `AT_ONCE` 32-bit numbers as words.
fn numbers(values: impl Iterator<Item = u32>) -> [u64; AT_ONCE / 2] {
    let mut words = [0; AT_ONCE / 2];
    for (i, value) in values.enumerate() {
        words[i / 2] |= u64::from(value) << (32 * (i % 2));
    }
    words
}

/// Updates parameters and moments, in place where nobody else has them. The factor of clipping is worked out on the device.
pub fn adamw(
    optimizer: &AdamW,
    updates: Vec<Update<CubeTensor>>,
    clip: Option<(CubeTensor, f64)>,
) -> Vec<[CubeTensor; 3]> {
    let own = |tensor: CubeTensor| if tensor.can_mut() { contiguous(&tensor) } else { tensor.copy() };
    let mut results = Vec::with_capacity(updates.len());
    let mut updates = updates.into_iter().peekable();
    while let Some(first) = updates.peek() {
        let client = first.gradient.client.clone();
        let chunk: Vec<Update<CubeTensor>> = updates.by_ref().take(AT_ONCE).collect();
        let mut buffers = Buffers::default();
        let squares_at = clip.as_ref().map(|(squares, _)| buffers.add_rows(squares));
        let max_norm = clip.as_ref().map_or(f64::INFINITY, |(_, max_norm)| *max_norm);
        let mut kept = Vec::new();
        let (mut lengths, mut rates, mut steps, mut roots) = (vec![], vec![], vec![], vec![]);
        for update in chunk {
            let (step, root) = optimizer.corrections(update.time);
            let gradient = contiguous(&update.gradient);
            let tensors = [own(update.parameter), own(update.moment_1), own(update.moment_2)];
            let [parameter, moment_1, moment_2] = &tensors;
            for tensor in [parameter, &gradient, moment_1, moment_2] {
                buffers.add(tensor);
            }
            lengths.push(length(parameter));
            rates.push(update.rate as f32);
            steps.push((update.rate / step) as f32);
            roots.push(root as f32);
            kept.push(gradient);
            results.push(tensors);
        }
        let constants = [optimizer.beta_1, optimizer.beta_2, optimizer.epsilon, optimizer.weight_decay];
        submit("adamw", &client, buffers, move |queue, buffers| {
            let mut words = vec![0; 4 * AT_ONCE];
            let tensors = &buffers[squares_at.map_or(0, |at| at + 1)..];
            for (i, of_one) in tensors.chunks_exact(4).enumerate() {
                for (kind, address) in of_one.iter().enumerate() {
                    words[kind * AT_ONCE + i] = *address;
                }
            }
            words.extend(numbers(lengths.iter().map(|length| *length as u32)));
            for values in [&rates, &steps, &roots] {
                words.extend(numbers(values.iter().map(|value| value.to_bits())));
            }
            let mut arguments = Arguments::default().structure(&words);
            for constant in constants {
                arguments = arguments.float(constant as f32);
            }
            let arguments = arguments.address(squares_at.map_or(0, |at| buffers[at])).float(max_norm as f32);
            let arguments = arguments.float(CLIP_EPSILON as f32);
            let longest = lengths.iter().copied().max().unwrap_or(0);
            let launch = Launch { grid: (blocks(longest), lengths.len(), 1), block: (256, 1), shared: 0 };
            queue.launch(elementwise(DType::F32), "adamw", launch, arguments)
        });
    }
    results
}

/// Σ x² over all elements of all tensors, `[1]`; the order of the sum is fixed. There is at least one tensor.
pub fn sum_of_squares(tensors: Vec<CubeTensor>) -> CubeTensor {
    let tensors: Vec<CubeTensor> = tensors.iter().map(contiguous).collect();
    let longest = tensors.iter().map(length).max().unwrap_or(0);
    let blocks = blocks(longest);
    let total = empty(&tensors[0], &[1], DType::F32);
    let mut buffers = Buffers::default();
    buffers.add_scratch(&total.client, 4 * tensors.len() * blocks);
    buffers.add(&total);
    for tensor in &tensors {
        buffers.add(tensor);
    }
    let lengths: Vec<usize> = tensors.iter().map(length).collect();
    submit("sum_of_squares", &total.client, buffers, move |queue, buffers| {
        let source = elementwise(DType::F32);
        let (partial, total, tensors) = (buffers[0], buffers[1], &buffers[2..]);
        for (chunk, (tensors, lengths)) in tensors.chunks(AT_ONCE).zip(lengths.chunks(AT_ONCE)).enumerate() {
            let mut words = vec![0; AT_ONCE];
            words[..tensors.len()].copy_from_slice(tensors);
            words.extend(numbers(lengths.iter().map(|length| *length as u32)));
            let to = partial + (chunk * AT_ONCE * blocks * 4) as u64;
            let launch = Launch { grid: (blocks, tensors.len(), 1), block: (256, 1), shared: 0 };
            let arguments = Arguments::default().structure(&words).address(to);
            queue.launch(source, "squares", launch, arguments)?;
        }
        let arguments = Arguments::default().address(partial).int(lengths.len() * blocks).address(total);
        queue.launch(source, "total_of", Launch::new(1, 1024), arguments)
    });
    total
}
