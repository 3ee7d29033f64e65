//! One compiled body for each instruction set, and the few vector idioms the kernels share.

/// Lanes of the accumulators in reductions: two AVX2 registers.
pub(super) const LANES: usize = 16;

/// Whether the CPU has AVX2 and FMA.
#[inline]
pub(super) fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether the CPU has AVX-512's foundation, and what [`has_avx2`] asks for.
#[inline]
pub(super) fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        has_avx2() && is_x86_feature_detected!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Defines functions whose body is compiled three times: for AVX-512, for AVX2 with FMA and for the target's baseline; each
/// call picks what the CPU has. The body must be sequential code, for closures handed to other threads leave the fast copy.
macro_rules! vectorised {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,avx512f")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                if $crate::kernels::cpu::simd::has_avx512() {
                    // SAFETY: the features were found just now.
                    return unsafe { avx512($($arg),*) };
                }
                if $crate::kernels::cpu::simd::has_avx2() {
                    // SAFETY: the features were found just now.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    )*};
}
pub(super) use vectorised;

/// Sum of the lanes by halves.
#[inline(always)]
pub(super) fn lane_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ f(aᵢ, bᵢ)` over slices of one length, in lanes.
#[inline(always)]
pub(super) fn sum_by(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += f(*a, *b);
    }
    lane_sum(lanes)
}

/// The largest of `x`, −∞ of none.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// `eˣ` for `x ≤ 88`, within two units in the last place; 0 below −87.3, where results would be subnormal.
///
/// `x = n ln 2 + r` with `|r| ≤ ln 2 / 2`; `eʳ` by a polynomial of degree seven, `2ⁿ` by its exponent bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LOW: f32 = -87.336_54;
    let clamped = if x <= LOW { LOW } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, so that r keeps its digits.
    let r = clamped - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    // Taylor to r⁷, whose rest is below a unit in the last place.
    let p = 1.388_888_9e-3 + r * 1.984_127e-4;
    let p = 8.333_334e-3 + r * p;
    let p = 4.166_666_8e-2 + r * p;
    let p = 0.166_666_67 + r * p;
    let p = 0.5 + r * p;
    let p = 1.0 + (r + r * r * p);
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1f32.to_bits()));
    // Written so that a NaN stays one.
    if x <= LOW { 0.0 } else { p * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    vectorised! {
        fn exp_all(x: &mut [f32]) {
            x.iter_mut().for_each(|x| *x = exp(*x));
        }
    }

    /// Over the whole range and densely around 0, in units of the last place of the exact value.
    #[test]
    fn exponential_is_accurate() {
        let mut worst = 0f64;
        let wide = (0..400_000).map(|i| -87.3 + 175.3 * i as f32 / 400_000.0);
        let narrow = (0..100_000).map(|i| -1.0 + 2.0 * i as f32 / 100_000.0);
        let x: Vec<f32> = wide.chain(narrow).collect();
        let mut y = x.clone();
        exp_all(&mut y);
        for (x, y) in x.iter().zip(&y) {
            let exact = f64::from(*x).exp();
            let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(*y) - exact).abs() / unit);
        }
        assert!(worst < 2.0, "{worst} units in the last place");
        let mut ends = [f32::NEG_INFINITY, -1000.0, -0.0, 0.0, 1.0];
        exp_all(&mut ends);
        assert_eq!(ends[..4], [0.0, 0.0, 1.0, 1.0]);
        assert!((ends[4] - std::f32::consts::E).abs() < 3e-7);
        let mut nan = [f32::NAN; 20];
        exp_all(&mut nan);
        assert!(nan.iter().all(|v| v.is_nan()), "a NaN must not become a probability");
    }

    #[test]
    fn reductions_of_any_length() {
        for len in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32).collect();
            assert_eq!(sum_by(&x, &x, |a, _| a), x.iter().sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
