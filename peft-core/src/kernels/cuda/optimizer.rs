//! The optimizer's update and the gradients' norm over many tensors in few launches.

use super::backend::{contiguous, elementwise, empty};
use super::commands::{Arguments, Launch};
use super::engine::{Buffers, submit};
use super::pooled::is_alone;
use crate::kernels::adamw::{AdamW, Update};
use crate::kernels::aged_adamw::{AgedAdamW, AgedUpdate};
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

/// A parameter and what is remembered of it, all of one length.
struct Step<const TENSORS: usize, const NUMBERS: usize> {
    /// What changes, the parameter first.
    tensors: [CubeTensor; TENSORS],
    gradient: CubeTensor,
    /// What the kernel is told of this parameter.
    numbers: [f32; NUMBERS],
}

/// Clipping as the kernels work it out on the device: Σg² and the largest norm.
type Clipping = Option<(CubeTensor, f64)>;

/// Runs the kernel `name`, in place where nobody else has the tensors. Its arguments are a structure of arrays (parameters,
/// gradients, the other tensors, lengths, each of the numbers), `constants` and what clipping needs.
fn update<const TENSORS: usize, const NUMBERS: usize>(
    name: &'static str,
    steps: Vec<Step<TENSORS, NUMBERS>>,
    constants: Vec<f64>,
    clip: Clipping,
) -> Vec<[CubeTensor; TENSORS]> {
    let own = |tensor: CubeTensor| if is_alone(&tensor) { contiguous(&tensor) } else { tensor.copy() };
    let mut results = Vec::with_capacity(steps.len());
    let mut steps = steps.into_iter().peekable();
    while let Some(first) = steps.peek() {
        let client = first.gradient.client.clone();
        let mut buffers = Buffers::default();
        let squares_at = clip.as_ref().map(|(squares, _)| buffers.add_rows(squares));
        let max_norm = clip.as_ref().map_or(f64::INFINITY, |(_, max_norm)| *max_norm);
        let (mut lengths, mut numbers_of) = (Vec::new(), Vec::new());
        for Step { tensors, gradient, numbers } in steps.by_ref().take(AT_ONCE) {
            let tensors = tensors.map(own);
            buffers.add(&tensors[0]);
            buffers.add_rows(&gradient);
            for tensor in &tensors[1..] {
                buffers.add(tensor);
            }
            lengths.push(length(&tensors[0]));
            numbers_of.push(numbers);
            results.push(tensors);
        }
        let constants = constants.clone();
        submit(name, &client, buffers, move |queue, buffers| {
            let mut words = vec![0; (TENSORS + 1) * AT_ONCE];
            let tensors = &buffers[squares_at.map_or(0, |at| at + 1)..];
            for (i, of_one) in tensors.chunks_exact(TENSORS + 1).enumerate() {
                for (kind, address) in of_one.iter().enumerate() {
                    words[kind * AT_ONCE + i] = *address;
                }
            }
            words.extend(numbers(lengths.iter().map(|length| *length as u32)));
            for number in 0..NUMBERS {
                words.extend(numbers(numbers_of.iter().map(|numbers| numbers[number].to_bits())));
            }
            let mut arguments = Arguments::default().structure(&words);
            for constant in constants {
                arguments = arguments.float(constant as f32);
            }
            let arguments = arguments.address(squares_at.map_or(0, |at| buffers[at])).float(max_norm as f32);
            let arguments = arguments.float(CLIP_EPSILON as f32);
            let longest = lengths.iter().copied().max().unwrap_or(0);
            let launch = Launch { grid: (blocks(longest), lengths.len(), 1), block: (256, 1), shared: 0 };
            queue.launch(elementwise(DType::F32), name, launch, arguments)
        });
    }
    results
}

/// Updates parameters and moments. The factor of clipping is worked out on the device.
pub fn adamw(optimizer: &AdamW, updates: Vec<Update<CubeTensor>>, clip: Clipping) -> Vec<[CubeTensor; 3]> {
    let step = |update: Update<CubeTensor>| {
        let (correction, root) = optimizer.corrections(update.time);
        Step {
            tensors: [update.parameter, update.moment_1, update.moment_2],
            gradient: update.gradient,
            numbers: [update.rate, update.rate / correction, root].map(|number| number as f32),
        }
    };
    let AdamW { beta_1, beta_2, epsilon, weight_decay } = *optimizer;
    let steps = updates.into_iter().map(step).collect();
    update("adamw", steps, vec![beta_1, beta_2, epsilon, weight_decay], clip)
}

/// Updates parameters, moments and ages, likewise.
pub fn aged_adamw(
    optimizer: &AgedAdamW,
    updates: Vec<AgedUpdate<CubeTensor>>,
    clip: Clipping,
) -> Vec<[CubeTensor; 4]> {
    let step = |update: AgedUpdate<CubeTensor>| Step {
        tensors: [update.parameter, update.moment_1, update.moment_2, update.age],
        gradient: update.gradient,
        numbers: [update.rate as f32],
    };
    let AgedAdamW { beta_1, beta_2, epsilon, weight_decay } = *optimizer;
    let steps = updates.into_iter().map(step).collect();
    update("aged_adamw", steps, vec![beta_1, beta_2, beta_1.ln(), beta_2.ln(), epsilon, weight_decay], clip)
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
