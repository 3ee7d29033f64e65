//! The bases of a module, and its change from coefficients.
//!
//! A basis is that of the run's seed for `nola A` or `nola B` and the module's path; where modules share theirs, the name
//! is the shape of the weight, `OUTxIN`. The offset of `A` is the first element of the basis for `nola A0` of that name.

use super::config::{AlphaInit, BasisScale, NolaBlock, OffsetA, SeedPolicy};
use burn::tensor::{DType, Device, Tensor, TensorData};
use peft_core::kernels::RandomBasis;
use peft_core::projection::{Combination, CombinedFactor, Parameter};
use peft_core::random::Stream;

/// The parts of a module's names in files.
pub(super) const ALPHA: &str = "nola_alpha";
pub(super) const BETA: &str = "nola_beta";
/// What gradients of the factors go by.
const FACTORS: [&str; 2] = ["nola_A", "nola_B"];

/// The bases of one module.
pub(super) struct Bases {
    path: String,
    dims: [usize; 2],
    seed: u64,
    a: RandomBasis,
    b: RandomBasis,
    offset: RandomBasis,
}

impl Bases {
    /// Those of the module at `path` with a weight `[out, in]`, under `seed`.
    pub fn new(block: &NolaBlock, seed: u64, path: &str, dims: [usize; 2]) -> Self {
        let [rows, columns] = dims;
        let name = match block.seed_policy {
            SeedPolicy::PerModule => path.to_string(),
            SeedPolicy::Shared => format!("{rows}x{columns}"),
        };
        let basis = |purpose, len| RandomBasis::new(seed, purpose, &name, len);
        Self {
            path: path.to_string(),
            dims,
            seed,
            a: basis("nola A", block.r * columns),
            b: basis("nola B", rows * block.r),
            offset: basis("nola A0", block.r * columns),
        }
    }

    /// All of them.
    pub fn all(&self) -> [RandomBasis; 3] {
        [self.a, self.b, self.offset]
    }

    /// First coefficients of `A`, drawn where they are random from the stream (seed, "nola alpha", path).
    pub fn initial_alpha(&self, block: &NolaBlock) -> Vec<f32> {
        let count = block.num_basis_a;
        match block.alpha_init {
            AlphaInit::Zero => vec![0.0; count],
            AlphaInit::Random => {
                let columns = self.dims[1] as f64;
                let deviation = 1.0 / ((columns * count as f64).sqrt() * law(block.basis_scale, count));
                let mut stream = Stream::new(self.seed, "nola alpha", &self.path, &[]);
                (0..count).map(|_| (stream.normal() * deviation) as f32).collect()
            }
        }
    }

    /// The change with these coefficients, not yet computed and not trained.
    pub fn combination(
        &self,
        block: &NolaBlock,
        alpha: Vec<f32>,
        beta: Vec<f32>,
        dropout: f64,
        device: &Device,
    ) -> Combination {
        let [rows, columns] = self.dims;
        let factor = |number: usize, part, dims, values: Vec<f32>, basis, offset| {
            let (count, name) = (values.len(), format!("{}.{part}", self.path));
            let value = Tensor::from_data(TensorData::new(values, [1, count]), (device, DType::F32));
            let coefficients = Parameter { name, value, shape: vec![count], trainable: false };
            let scale = law(block.basis_scale, count) as f32;
            let name = format!("{}.{}", self.path, FACTORS[number]);
            CombinedFactor::new(name, dims, coefficients, basis, scale, offset)
        };
        let offset = match block.offset_a {
            OffsetA::Kaiming => Some((self.offset, (1.0 / (columns as f64).sqrt()) as f32)),
            OffsetA::None => None,
        };
        Combination {
            a: factor(0, ALPHA, [block.r, columns], alpha, self.a, offset),
            b: factor(1, BETA, [rows, block.r], beta, self.b, None),
            scale: block.scale(),
            dropout,
        }
    }
}

/// What the values of a basis of `count` elements are multiplied by.
fn law(scale: BasisScale, count: usize) -> f64 {
    match scale {
        BasisScale::InvSqrtK => 1.0 / (count as f64).sqrt(),
        BasisScale::None => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::projection::refresh;

    fn variance(values: Vec<f32>) -> f64 {
        values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / values.len() as f64
    }

    fn a(block: &NolaBlock, alpha: Vec<f32>) -> Vec<f32> {
        let bases = Bases::new(block, 3, "model.layers.0.q", [16, 400]);
        let beta = vec![0.0; block.num_basis_b];
        let mut form = bases.combination(block, alpha, beta, 0.0, &Device::flex());
        refresh(std::iter::once(&mut form));
        form.a.value().clone().into_data().iter::<f32>().collect()
    }

    /// A third for coefficients of 1, whatever their number; with coefficients that are drawn, that of LoRA's `A`.
    #[test]
    fn entries_have_the_variance_of_the_law() {
        for k in [1, 64, 1000] {
            let block = NolaBlock { num_basis_a: k, offset_a: OffsetA::None, ..NolaBlock::default() };
            let found = variance(a(&block, vec![1.0; k]));
            assert!((found * 3.0 - 1.0).abs() < 0.05, "{k}: {found}");
        }
        for basis_scale in [BasisScale::InvSqrtK, BasisScale::None] {
            let block = NolaBlock {
                num_basis_a: 500,
                offset_a: OffsetA::None,
                alpha_init: AlphaInit::Random,
                basis_scale,
                ..NolaBlock::default()
            };
            let alpha = Bases::new(&block, 3, "model.layers.0.q", [16, 400]).initial_alpha(&block);
            let found = variance(a(&block, alpha));
            assert!((found * 3.0 * 400.0 - 1.0).abs() < 0.15, "{found}");
        }
        let offset = variance(a(&NolaBlock::default(), vec![0.0; 512]));
        assert!((offset * 3.0 * 400.0 - 1.0).abs() < 0.05, "{offset}");
    }

    #[test]
    fn modules_share_bases_only_where_asked() {
        let first = |block: &NolaBlock, path, dims| Bases::new(block, 3, path, dims).all();
        let own = NolaBlock::default();
        assert_ne!(first(&own, "q", [8, 8]), first(&own, "k", [8, 8]));
        let shared = NolaBlock { seed_policy: SeedPolicy::Shared, ..NolaBlock::default() };
        assert_eq!(first(&shared, "q", [8, 8]), first(&shared, "k", [8, 8]));
        assert_ne!(first(&shared, "q", [8, 8]), first(&shared, "k", [4, 8]));
    }
}
