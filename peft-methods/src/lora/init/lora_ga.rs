//! LoRA-GA: gradient approximation (Wang et al., arXiv 2407.05000).

use super::error::InitError;
use peft_core::adapter::{GradientDirection, GradientScale, InitialFactors, LoraGaConfig};
use peft_core::linalg::{Matrix, top_svd};
use peft_core::random::Stream;
/// With `U`, `S`, `V` the largest `2·r` singular vectors and values of the gradient `[out, in]` of the weight: `A` is
/// `r` of the right vectors, `B` is `r` of the left vectors times their values, both scaled, and `s·B·A` is taken out
/// of the weight.
///
/// The sign of `B·A` depends on those of singular vectors, which mathematics leaves open: here the largest entry of each
/// right vector is positive. `random` draws from `stream`.
///
/// # Errors
/// [`InitError::ZeroGradient`], and [`InitError::Decomposition`] if `2·r` is above the weight's dimensions or the
/// gradient's shape is not the weight's.
pub fn lora_ga(
    path: &str,
    weight: &Matrix,
    gradient: &Matrix,
    config: LoraGaConfig,
    rank: usize,
    scale: f64,
    stream: &mut Stream,
) -> Result<InitialFactors, InitError> {
    let wrong = InitError::decomposition(path, "lora_ga");
    let svd = top_svd(gradient, 2 * rank).map_err(&wrong)?;
    if svd.s.first().is_none_or(|largest| *largest == 0.0) {
        return Err(InitError::ZeroGradient { module: path.to_string() });
    }
    let (of_a, of_b): (Vec<usize>, Vec<usize>) = match config.direction {
        GradientDirection::ArBr => {
            ((0..rank).map(|i| 2 * i + 1).collect(), (0..rank).map(|i| 2 * i).collect())
        }
        GradientDirection::A2rBr => ((rank..2 * rank).collect(), (0..rank).collect()),
        GradientDirection::ArB2r => ((0..rank).collect(), (rank..2 * rank).collect()),
        GradientDirection::Random => {
            let mut numbers: Vec<usize> = (0..2 * rank).collect();
            stream.shuffle(&mut numbers);
            numbers.truncate(rank);
            (numbers.clone(), numbers)
        }
    };
    let values: Vec<f64> = of_b.iter().map(|i| svd.s[*i]).collect();
    let [rows, _] = weight.dims();
    let (factor_a, factor_b) = match config.scale {
        GradientScale::Stable => (1.0, (rows as f64).powf(0.25) / config.stable_gamma.sqrt()),
        GradientScale::WeightSvd if values[0] > 0.0 => {
            (1.0, top_svd(weight, 1).map_err(&wrong)?.s[0] / values[0])
        }
        GradientScale::WeightSvd | GradientScale::Unit => (1.0, 1.0),
        GradientScale::GdScale => (1.0 / scale, 1.0 / scale),
    };
    let a = svd.v.select_columns(&of_a).scale_columns(&vec![factor_a; rank]).transpose();
    let b_values: Vec<f64> = values.iter().map(|s| s * factor_b).collect();
    let b = svd.u.select_columns(&of_b).scale_columns(&b_values);
    InitialFactors::taken_from(weight, &a, &b, scale).map_err(wrong)
}
