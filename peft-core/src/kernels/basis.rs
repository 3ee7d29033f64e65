//! Linear combinations of random matrices that are never kept:
//!
//! ```text
//! M = M₀ + c·Σᵢ aᵢ·Eᵢ        ∂ℓ/∂aᵢ = c·⟨∂ℓ/∂M, Eᵢ⟩
//! ```
//!
//! Both directions draw the elements `Eᵢ` anew. On CUDA each value is drawn where it is used. On the CPU a tile of a few
//! kilobytes is drawn at a time, and as that costs far more than what is done with the values, all combinations of one
//! basis are taken together. `M` is the same to the bit everywhere; the products of the backward may differ in the last.

use super::READ_BACK;
#[cfg(feature = "cuda")]
use super::backend::{Served, served};
use super::cpu::basis::{GROUP, add_scaled, dot, fill};
use crate::checkpoint::{f32_bytes, hex};
use crate::random::Stream;
use burn::tensor::{DType, Device, Tensor, TensorData};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::HashMap;

/// Values of an element drawn at a time: 4 KiB, which stay in the first cache.
const TILE: usize = 8 * GROUP;

/// Random elements `E₀, E₁, …` of `len` values each, independent and uniform in (−1, 1).
///
/// The definition, which never changes under one [`VERSION`](Self::VERSION) (`scripts/basis_reference.py` is the same in
/// Python):
///
/// * key = the two halves, low one first, of the first word of the [`Stream`] of (seed, purpose, name).
/// * value `e` of element `i`, counted row-major, comes from the Philox4x32-10 block of the counter
///   `(b mod 2³², b / 2³², i, 0)` with `b = 16·(e / 128) + e mod 16`; of its words the one numbered `e mod 128 / 32`, of
///   that the lower 16 bits if `e mod 32 < 16` and the upper ones if not.
/// * those bits, as a signed number `u`, make the value `(u + ½)·2⁻¹⁵`, in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RandomBasis {
    pub(super) key: [u32; 2],
    pub(super) len: usize,
}

impl RandomBasis {
    /// The generator's name in files.
    pub const NAME: &str = "philox4x32-10";
    /// The version of the definition.
    pub const VERSION: u32 = 1;

    /// The basis of `seed` for `purpose` and `name` (of a tensor, or of all that share it), of elements of `len` values.
    pub fn new(seed: u64, purpose: &str, name: &str, len: usize) -> Self {
        let word = Stream::new(seed, purpose, name, &[]).next_u64();
        Self { key: [word as u32, (word >> 32) as u32], len }
    }

    /// Values of an element.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the elements have no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `count` values of element `index`, or all there are.
    pub fn first_values(&self, index: u32, count: usize) -> Vec<f32> {
        let count = count.min(self.len);
        let mut values = vec![0.0; count.next_multiple_of(GROUP)];
        self.fill(index, 0, &mut values);
        values.truncate(count);
        values
    }

    /// The combinations `Σᵢ cᵢ·Eᵢ` for each of the coefficient vectors, which have one length.
    fn combine(&self, coefficients: &[Vec<f32>]) -> Vec<Vec<f32>> {
        combine(|index, first, out| self.fill(index, first, out), self.len, coefficients)
    }

    /// The products `⟨g, Eᵢ⟩` for `i` below `count` and each of the matrices `g`, of `len` values each.
    fn products(&self, matrices: &[Vec<f32>], count: usize) -> Vec<Vec<f32>> {
        products(|index, first, out| self.fill(index, first, out), matrices, count)
    }

    /// SHA-256 over the length of an element of each of the bases, as a little-endian `u64`, and the first ten values of
    /// its first one, in f32; as text. Who finds the same has drawn the same bases.
    pub fn fingerprint(bases: impl Iterator<Item = Self>) -> String {
        let mut hash = Sha256::new();
        for basis in bases {
            hash.update((basis.len as u64).to_le_bytes());
            hash.update(f32_bytes(&basis.first_values(0, 10)));
        }
        hex(hash.finalize().as_ref())
    }

    fn fill(&self, index: u32, first: u64, out: &mut [f32]) {
        fill(self.key, index, first, out);
    }
}

/// The matrices `M = M₀ + c·Σᵢ aᵢ·Eᵢ`, whatever the coefficients `a`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// `E₀, E₁, …`.
    pub basis: RandomBasis,
    /// `c`.
    pub scale: f32,
    /// `M₀` is the first element of that basis times that number; without it there is none.
    pub offset: Option<(RandomBasis, f32)>,
}

/// The matrix of each span with its coefficients.
///
/// # Shapes
/// Coefficients are `[1, k]` and results `[1, len]`, in f32 and all on one device.
pub fn combinations(wanted: Vec<(Span, Tensor<2>)>) -> Vec<Tensor<2>> {
    let Some((_, first)) = wanted.first() else { return Vec::new() };
    let device = first.device();
    #[cfg(feature = "cuda")]
    if served(&device, DType::F32) == Some(Served::Cuda) {
        return super::cuda::combinations(&wanted);
    }
    let key = |(span, coefficients): &(Span, Tensor<2>)| (span.basis, coefficients.dims()[1]);
    by_basis(wanted, key, |(basis, _), wanted| {
        let (spans, coefficients): (Vec<Span>, Vec<Tensor<2>>) = wanted.into_iter().unzip();
        let scaled = |(coefficients, span): (Tensor<2>, &Span)| -> Vec<f32> {
            to_host(coefficients).into_iter().map(|a| a * span.scale).collect()
        };
        let coefficients: Vec<Vec<f32>> = coefficients.into_iter().zip(&spans).map(scaled).collect();
        let mut sums = basis.combine(&coefficients);
        for (sum, span) in sums.iter_mut().zip(spans) {
            if let Some((basis, scale)) = span.offset {
                let offset = basis.first_values(0, sum.len());
                sum.iter_mut().zip(offset).for_each(|(sum, offset)| *sum += offset * scale);
            }
        }
        sums.into_iter().map(|sum| from_host(sum, &device)).collect()
    })
}

/// The gradients of the `k` coefficients of each span from that of its matrix.
///
/// # Shapes
/// What comes in has `len` values row by row, results are `[1, k]`, in f32 and all on one device.
pub fn combinations_backward(gradients: Vec<(Span, Tensor<2>, usize)>) -> Vec<Tensor<2>> {
    let Some((_, first, _)) = gradients.first() else { return Vec::new() };
    let device = first.device();
    #[cfg(feature = "cuda")]
    if served(&device, DType::F32) == Some(Served::Cuda) {
        return super::cuda::combinations_backward(&gradients);
    }
    let key = |(span, _, count): &(Span, Tensor<2>, usize)| (span.basis, *count);
    by_basis(gradients, key, |(basis, count), gradients| {
        let (scales, matrices): (Vec<f32>, Vec<Vec<f32>>) =
            gradients.into_iter().map(|(span, gradient, _)| (span.scale, to_host(gradient))).unzip();
        let scaled = |(products, scale): (Vec<f32>, f32)| {
            from_host(products.into_iter().map(|product| product * scale).collect(), &device)
        };
        basis.products(&matrices, count).into_iter().zip(scales).map(scaled).collect()
    })
}

/// The results of `work` on those with one basis and number of elements together, in the order of `items`.
fn by_basis<T: Send>(
    items: Vec<T>,
    key: impl Fn(&T) -> (RandomBasis, usize),
    work: impl Fn((RandomBasis, usize), Vec<T>) -> Vec<Tensor<2>> + Sync,
) -> Vec<Tensor<2>> {
    type Group<T> = ((RandomBasis, usize), (Vec<usize>, Vec<T>));
    let mut groups: Vec<Group<T>> = Vec::new();
    let mut numbers = HashMap::new();
    for (place, item) in items.into_iter().enumerate() {
        let key = key(&item);
        let number = *numbers.entry(key).or_insert(groups.len());
        if number == groups.len() {
            groups.push((key, Default::default()));
        }
        let (places, items) = &mut groups[number].1;
        places.push(place);
        items.push(item);
    }
    let results = groups
        .into_par_iter()
        .flat_map_iter(|(key, (places, items))| places.into_iter().zip(work(key, items)));
    let mut results: Vec<(usize, Tensor<2>)> = results.collect();
    results.sort_by_key(|(place, _)| *place);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Row-major values.
fn to_host(tensor: Tensor<2>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().expect(READ_BACK)
}

fn from_host(values: Vec<f32>, device: &Device) -> Tensor<2> {
    let shape = [1, values.len()];
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// Draws values of the element `index` from a group on, in whole groups.
trait Fill: Fn(u32, u64, &mut [f32]) + Sync {}
impl<F: Fn(u32, u64, &mut [f32]) + Sync> Fill for F {}

/// The first group of a tile.
fn group(tile: usize) -> u64 {
    (tile * (TILE / GROUP)) as u64
}

/// The terms of a sum are added in the order of the elements, in f32, wherever a tile is computed.
fn combine(fill: impl Fill, len: usize, coefficients: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let count = coefficients.first().map_or(0, Vec::len);
    let mut sums: Vec<Vec<f32>> = coefficients.iter().map(|_| vec![0.0; len]).collect();
    let mut tiles: Vec<Vec<&mut [f32]>> = (0..len.div_ceil(TILE)).map(|_| Vec::new()).collect();
    for sum in &mut sums {
        tiles.iter_mut().zip(sum.chunks_mut(TILE)).for_each(|(tile, part)| tile.push(part));
    }
    tiles.into_par_iter().enumerate().for_each(|(tile, mut parts)| {
        let mut values = [0.0; TILE];
        let needed = parts.first().map_or(0, |part| part.len().next_multiple_of(GROUP));
        for index in 0..count {
            fill(index as u32, group(tile), &mut values[..needed]);
            for (part, coefficients) in parts.iter_mut().zip(coefficients) {
                let len = part.len();
                add_scaled(part, coefficients[index], &values[..len]);
            }
        }
    });
    sums
}

/// Products are summed within a tile in f32 and over tiles in f64.
fn products(fill: impl Fill, matrices: &[Vec<f32>], count: usize) -> Vec<Vec<f32>> {
    // Elements that a task takes: the tiles of all matrices are read once for each group of them.
    const ELEMENTS: usize = 8;
    let len = matrices.first().map_or(0, Vec::len);
    let starts: Vec<usize> = (0..count).step_by(ELEMENTS).collect();
    let tasks: Vec<Vec<[f64; ELEMENTS]>> = starts
        .into_par_iter()
        .map(|start| {
            let mut values = [0.0; TILE];
            let mut sums = vec![[0.0; ELEMENTS]; matrices.len()];
            for tile in 0..len.div_ceil(TILE) {
                let range = tile * TILE..len.min((tile + 1) * TILE);
                let needed = range.len().next_multiple_of(GROUP);
                for element in 0..ELEMENTS.min(count - start) {
                    fill((start + element) as u32, group(tile), &mut values[..needed]);
                    for (sums, matrix) in sums.iter_mut().zip(matrices) {
                        sums[element] += f64::from(dot(&matrix[range.clone()], &values[..range.len()]));
                    }
                }
            }
            sums
        })
        .collect();
    let of_matrix = |matrix: usize| {
        let sums = tasks.iter().flat_map(|task| task[matrix]);
        sums.take(count).map(|sum| sum as f32).collect()
    };
    (0..matrices.len()).map(of_matrix).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basis(len: usize) -> RandomBasis {
        RandomBasis::new(11, "basis", "layers.0.q", len)
    }

    /// Numbers from `scripts/basis_reference.py`.
    #[test]
    fn values_are_those_of_the_reference() {
        let basis = basis(3000);
        let values = [0, 3].map(|index| basis.first_values(index, 3000));
        for (element, position, expected) in [
            (0, 0, 0.330_062_87),
            (0, 15, -0.563_919_07),
            (0, 16, -0.298_812_87),
            (0, 127, -0.234_512_33),
            (0, 128, 0.555_526_73),
            (1, 0, 0.334_457_4),
            (1, 2999, 0.205_276_49f32),
        ] {
            assert_eq!(values[element][position], expected);
        }
    }

    #[test]
    fn an_element_can_be_drawn_alone() {
        // The unit vectors pick the elements.
        let basis = basis(3000);
        let unit = |index: usize| (0..5).map(|i| if i == index { 1.0 } else { 0.0 }).collect::<Vec<f32>>();
        let elements = basis.combine(&(0..5).map(unit).collect::<Vec<_>>());
        for (index, element) in elements.iter().enumerate() {
            assert_eq!(*element, basis.first_values(index as u32, 3000));
        }
    }

    /// With elements of ones, as a hand computes it: `2·1` and `⟨3, 1⟩ = 3·len`.
    #[test]
    fn sums_by_hand() {
        let ones = |_: u32, _: u64, out: &mut [f32]| out.fill(1.0);
        assert_eq!(combine(ones, 5, &[vec![2.0], vec![-1.0]]), [vec![2.0; 5], vec![-1.0; 5]]);
        assert_eq!(products(ones, &[vec![3.0; 5], vec![1.0; 5]], 2), [vec![15.0; 2], vec![5.0; 2]]);
        let numbered = |index: u32, _: u64, out: &mut [f32]| out.fill(index as f32);
        assert_eq!(combine(numbered, 2, &[vec![5.0, 1.0, 10.0]]), [vec![21.0; 2]]);
        assert!(combine(numbered, 2, &[]).is_empty() && products(numbered, &[], 4).is_empty());
        assert_eq!(combine(numbered, 0, &[vec![1.0]]), [Vec::<f32>::new()]);
    }

    /// Sizes beside the borders of groups, tiles and tasks.
    #[test]
    fn both_directions_agree_with_dense_sums() {
        for (len, count) in [(1, 1), (127, 7), (128, 8), (129, 9), (1024, 17), (2500, 33)] {
            let basis = basis(len);
            let dense: Vec<Vec<f32>> = (0..count).map(|i| basis.first_values(i as u32, len)).collect();
            let numbers = |n: usize, seed: usize| -> Vec<f32> {
                (0..n).map(|i| (((i + seed) * 7919 % 997) as f32 - 498.0) / 498.0).collect()
            };
            let coefficients = [numbers(count, 1), numbers(count, 2)];
            for (sum, coefficients) in basis.combine(&coefficients).iter().zip(&coefficients) {
                for (e, value) in sum.iter().enumerate() {
                    // The order of the additions is that of the elements: the same bits.
                    let expected = dense.iter().zip(coefficients).fold(0f32, |sum, (v, c)| sum + c * v[e]);
                    assert_eq!(*value, expected, "{len} {count} {e}");
                }
            }
            let matrices = [numbers(len, 3), numbers(len, 4), numbers(len, 5)];
            for (products, matrix) in basis.products(&matrices, count).iter().zip(&matrices) {
                assert_eq!(products.len(), count);
                for (product, values) in products.iter().zip(&dense) {
                    let pairs = values.iter().zip(matrix);
                    let expected: f64 = pairs.map(|(v, g)| f64::from(*v) * f64::from(*g)).sum();
                    assert!(
                        (f64::from(*product) - expected).abs() < 1e-5 * (len as f64).sqrt(),
                        "{len} {count}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let basis = basis(5000);
        let coefficients: Vec<Vec<f32>> =
            (1..4).map(|m| (0..20).map(|i| (i * m) as f32 / 7.0).collect()).collect();
        let run = || {
            let sums = basis.combine(&coefficients);
            let products = basis.products(&sums, 20);
            (sums, products)
        };
        let in_pool = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.map(|pool| pool.install(run)).ok()
        };
        let one = in_pool(1);
        assert!(one.is_some() && one == in_pool(3));
    }

    #[test]
    fn values_have_the_moments_of_a_uniform_law_and_do_not_depend_on_each_other() {
        let basis = basis(1 << 16);
        let (x, y) = (basis.first_values(0, 1 << 16), basis.first_values(1, 1 << 16));
        let mean = |f: &dyn Fn(usize) -> f64| (0..x.len()).map(f).sum::<f64>() / x.len() as f64;
        assert!(mean(&|i| f64::from(x[i])).abs() < 0.01);
        assert!((mean(&|i| f64::from(x[i]).powi(2)) - 1.0 / 3.0).abs() < 0.01);
        assert!((mean(&|i| f64::from(x[i]).powi(4)) - 1.0 / 5.0).abs() < 0.01);
        for shift in [0, 1, 16, 128] {
            let correlation = mean(&|i| f64::from(x[i]) * f64::from(y[(i + shift) % x.len()]));
            let own = mean(&|i| f64::from(x[i]) * f64::from(x[(i + shift.max(1)) % x.len()]));
            assert!(correlation.abs() < 0.01 && own.abs() < 0.01, "{shift}: {correlation} {own}");
        }
        assert!(x.iter().all(|x| x.abs() < 1.0));
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let first = |seed, purpose, name| RandomBasis::new(seed, purpose, name, 1).first_values(0, 1);
        let all = [first(1, "a", "q"), first(2, "a", "q"), first(1, "b", "q"), first(1, "a", "k")];
        for (i, one) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|other| other != one));
        }
    }

    #[test]
    fn fingerprints_tell_bases_apart() {
        let of = |names: &[&str]| {
            RandomBasis::fingerprint(names.iter().map(|name| RandomBasis::new(1, "basis", name, 30)))
        };
        assert_eq!(of(&["q", "k"]), of(&["q", "k"]));
        assert_ne!(of(&["q", "k"]), of(&["k", "q"]));
        assert_ne!(of(&["q"]), of(&["v"]));
        assert_eq!(of(&["q"]).len(), 64);
    }
}
