//! The processor, and how fast it multiplies.

use burn::tensor::{Device, Tensor};
use std::time::{Duration, Instant};

/// Rows and columns of the matrices multiplied.
pub const SIZE: usize = 1024;

/// The processor.
pub struct Processor {
    /// As it calls itself.
    pub model: Option<String>,
    /// Threads that this process may use at once.
    pub cores: usize,
    /// Vector instructions that matter for matrices.
    pub simd: Vec<&'static str>,
}

impl Processor {
    /// What is known of this one.
    pub fn read() -> Self {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { model: model(&text), cores, simd: simd() }
    }
}

/// The first `model name` of `/proc/cpuinfo`.
fn model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    let name = line.split_once(':')?.1.split_whitespace().collect::<Vec<_>>().join(" ");
    (!name.is_empty()).then_some(name)
}

#[cfg(target_arch = "x86_64")]
fn simd() -> Vec<&'static str> {
    let known = [
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    known.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

#[cfg(target_arch = "aarch64")]
fn simd() -> Vec<&'static str> {
    vec!["neon"]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn simd() -> Vec<&'static str> {
    Vec::new()
}

/// Products of square f32 matrices on all cores for about a second, in 1e9 operations a second.
pub fn gflops() -> f64 {
    let device = Device::flex();
    let matrix = Tensor::<2>::ones([SIZE, SIZE], &device);
    let start = Instant::now();
    let mut products = 0;
    while products == 0 || start.elapsed() < Duration::from_secs(1) {
        std::hint::black_box(matrix.clone().matmul(matrix.clone()).into_data());
        products += 1;
    }
    let operations = 2.0 * (SIZE as f64).powi(3) * f64::from(products);
    operations / start.elapsed().as_secs_f64() / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_the_first_of_its_kind() {
        let text = "processor\t: 0\nmodel\t\t: 85\nmodel name\t: A  CPU @ 2GHz\nmodel name\t: B\n";
        assert_eq!(model(text).as_deref(), Some("A CPU @ 2GHz"));
        assert_eq!(model("model name\t: \n"), None);
    }
}
