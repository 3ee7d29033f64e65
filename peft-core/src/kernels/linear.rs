//! Adapted linear map: `y = x·Wᵀ + b + s·((x ∘ m)·Aᵀ)·Bᵀ + residual`.
//!
//! The low-rank path never builds a weight-shaped temporary, and a frozen `W` gets no gradient: burn's autodiff keeps
//! `x` only for the factors, which need it, and `W` by reference.

use super::as_dtype;
use burn::tensor::Tensor;

/// The low-rank term `s·((x ∘ mask)·Aᵀ)·Bᵀ` of an adapted linear map.
pub struct LowRankTerm {
    /// `A`, `[rank, in]`.
    pub a: Tensor<2>,
    /// `B`, `[out, rank]`.
    pub b: Tensor<2>,
    /// A bias `[1, out]` beside `B`, scaled like the product.
    pub bias: Option<Tensor<2>>,
    /// A factor `[1, out]` on base and term together, the base's bias left out (DoRA's m/n).
    pub gain: Option<Tensor<2>>,
    /// `s`.
    pub scale: f64,
    /// Dropout mask of the term's input, already divided by the keep probability, `[tokens, in]`.
    pub mask: Option<Tensor<2>>,
}

/// Applies a frozen or trained weight with an optional low-rank term: `y = x·Wᵀ + low + b`, with a gain `g`
/// `y = x·Wᵀ + (g − 1) ∘ x'·Wᵀ + g ∘ low + b` where `x'` is the input after dropout.
///
/// # Shapes
/// `x` `[tokens, in]`, `weight` `[out, in]`, `bias` `[1, out]`, `residual` and the result `[tokens, out]`.
/// Factors are cast to the type of `x`.
pub fn adapted_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<2>>,
    term: Option<LowRankTerm>,
    residual: Option<Tensor<2>>,
) -> Tensor<2> {
    let dtype = x.dtype();
    let transposed = as_dtype(weight, dtype).transpose();
    let mut y = x.clone().matmul(transposed.clone());
    if let Some(LowRankTerm { a, b, bias: term_bias, gain, scale, mask }) = term {
        let dropped = mask.is_some();
        let input = match mask {
            Some(mask) => x * as_dtype(mask, dtype),
            None => x,
        };
        // The scale goes onto the [tokens, rank] product, the smallest tensor on the way.
        let down = input.clone().matmul(as_dtype(a, dtype).transpose()).mul_scalar(scale);
        let low = down.matmul(as_dtype(b, dtype).transpose());
        let low = match term_bias {
            Some(bias) => low + as_dtype(bias, dtype).mul_scalar(scale),
            None => low,
        };
        y = match gain {
            None => y + low,
            Some(gain) => {
                let gain = as_dtype(gain, dtype);
                // What the gain adds to the base comes from the dropped input too, as in PEFT.
                let base = if dropped { input.matmul(transposed) } else { y.clone() };
                y + base * gain.clone().sub_scalar(1.0) + low * gain
            }
        };
    }
    if let Some(bias) = bias {
        y = y + as_dtype(bias, dtype);
    }
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn hand_computed_low_rank_term() {
        let device = Device::flex();
        let matrix = |v: Vec<f32>, r: usize, c: usize| {
            Tensor::<2>::from_data(burn::tensor::TensorData::new(v, [r, c]), &device)
        };
        // x = [1, 2, 3]; W = 0; A = [[3, 4, 5]], B = [[1], [2]], s = 2: x·Aᵀ = 26, so y = 2·26·[1, 2].
        let y = adapted_linear(
            matrix(vec![1., 2., 3.], 1, 3),
            matrix(vec![0.; 6], 2, 3),
            Some(matrix(vec![0.5, -0.5], 1, 2)),
            Some(LowRankTerm {
                a: matrix(vec![3., 4., 5.], 1, 3),
                b: matrix(vec![1., 2.], 2, 1),
                bias: None,
                gain: None,
                scale: 2.0,
                mask: None,
            }),
            Some(matrix(vec![10., 20.], 1, 2)),
        );
        let y: Vec<f32> = y.try_into_vec_as().unwrap();
        assert_eq!(y, vec![62.5, 123.5]);
    }

    #[test]
    fn hand_computed_gain_and_bias() {
        let device = Device::flex();
        let matrix = |v: Vec<f32>, r: usize, c: usize| {
            Tensor::<2>::from_data(burn::tensor::TensorData::new(v, [r, c]), &device)
        };
        let term = |gain, mask| LowRankTerm {
            a: matrix(vec![1., 1.], 1, 2),
            b: matrix(vec![1., 2.], 2, 1),
            bias: Some(matrix(vec![0.5, 0.25], 1, 2)),
            gain,
            scale: 2.0,
            mask,
        };
        let run = |term| {
            let weight = matrix(vec![1., 0., 0., 1.], 2, 2);
            let bias = Some(matrix(vec![10., 20.], 1, 2));
            let y = adapted_linear(matrix(vec![1., 2.], 1, 2), weight, bias, Some(term), None);
            y.try_into_vec_as::<f32>().unwrap()
        };
        // x·Wᵀ = [1, 2]; low = 2·(3·[1, 2] + [0.5, 0.25]) = [7, 12.5].
        assert_eq!(run(term(None, None)), [18., 34.5]);
        let gain = matrix(vec![2., 0.5], 1, 2);
        assert_eq!(run(term(Some(gain.clone()), None)), [26., 27.25]);
        // With the mask [2, 0] the input is [2, 0]: low = 2·(2·[1, 2] + [0.5, 0.25]) = [5, 8.5], base [2, 0].
        let mask = matrix(vec![2., 0.], 1, 2);
        assert_eq!(run(term(Some(gain), Some(mask))), [23., 26.25]);
    }
}
