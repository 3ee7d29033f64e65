//! Times of the CPU kernels at the shapes of two models, and what share of the machine's limits they reach.
//!
//! `cargo bench -p peft-cli --bench kernels_cpu`; with `RAYON_NUM_THREADS=1` times are CPU times, which a busy machine
//! disturbs less. `bench/cpu_ops.py` times the same operations in PyTorch.
#![allow(dead_code, missing_docs, unused_imports)] // Whole modules are taken in, tests and all.

#[path = "../../peft-core/src/kernels"]
mod kernels {
    pub mod cpu {
        pub mod adamw;
        pub mod attention;
        pub mod buffers;
        pub mod cross_entropy;
        pub mod gated;
        pub mod linear;
        pub mod matmul;
        pub mod rms_norm;
        mod simd;
    }
}

use kernels::cpu::{adamw, attention, buffers, cross_entropy, gated, linear, matmul, rms_norm};
use matmul::{Matrix, MatrixMut, Update};
use std::hint::black_box;
use std::time::{Duration, Instant};

const TOKENS: usize = 1024;
const SEQUENCE: usize = 256;
const RANK: usize = 8;

struct Model {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
}

const MODELS: [Model; 2] = [
    Model {
        name: "25M",
        hidden: 512,
        intermediate: 1408,
        heads: 8,
        kv_heads: 4,
        head_dim: 64,
        vocab: 32_000,
    },
    Model {
        name: "135M",
        hidden: 576,
        intermediate: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49_152,
    },
];

/// Seconds on the clock, or of CPU time where there is one thread.
fn now() -> f64 {
    if rayon::current_num_threads() == 1 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the clock exists and the struct is ours.
        unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
        return time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9;
    }
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    START.elapsed().as_secs_f64()
}

/// The best time of many, for about a second.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let until = Instant::now() + Duration::from_millis(1000);
    let mut best = f64::MAX;
    for round in 0.. {
        let start = now();
        f();
        best = best.min(now() - start);
        if round >= 4 && Instant::now() > until {
            break;
        }
    }
    best
}

/// What the machine can do with all threads.
struct Limits {
    gflops: f64,
    gigabytes: f64,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_add(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_set1_ps(0.5); 12];
    let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, x, y);
        }
    }
    let total = sums[1..].iter().fold(sums[0], |a, b| _mm256_add_ps(a, *b));
    _mm256_cvtss_f32(total)
}

fn limits() -> Limits {
    let threads = rayon::current_num_threads();
    let mut gflops = f64::NAN;
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        const ROUNDS: usize = 1 << 20;
        // SAFETY: the features were found.
        let time = best(|| drop(rayon::broadcast(|_| black_box(unsafe { multiply_add(ROUNDS) }))));
        gflops = (threads * ROUNDS * 12 * 16) as f64 / time / 1e9;
    }
    let data = vec![1f32; 64 << 20];
    let part = data.len() / threads;
    let time = best(|| {
        rayon::broadcast(|context| {
            black_box(adamw::sum_of_squares(&[&data[context.index() * part..][..part]]))
        });
    });
    Limits { gflops, gigabytes: (4 * threads * part) as f64 / time / 1e9 }
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0).collect()
}

struct Report {
    limits: Limits,
}

impl Report {
    /// A kernel bound by arithmetic.
    fn flops(&self, name: &str, flops: usize, seconds: f64) {
        let rate = flops as f64 / seconds / 1e9;
        println!(
            "{name:<34} {:9.3} ms {rate:8.1} GFLOP/s {:4.0} %",
            seconds * 1e3,
            100.0 * rate / self.limits.gflops
        );
    }

    /// A kernel bound by memory: bytes read and written once.
    fn bytes(&self, name: &str, bytes: usize, seconds: f64) {
        let rate = bytes as f64 / seconds / 1e9;
        let share = 100.0 * rate / self.limits.gigabytes;
        println!("{name:<34} {:9.3} ms {rate:8.1} GB/s    {share:4.0} %", seconds * 1e3);
    }
}

fn products(report: &Report, model: &Model) {
    let (h, i, v) = (model.hidden, model.intermediate, model.vocab);
    for (name, m, n, k) in [
        ("product x·Wᵀ q", TOKENS, h, h),
        ("product x·Wᵀ gate+up", TOKENS, 2 * i, h),
        ("product x·Wᵀ down", TOKENS, h, i),
        ("product x·Wᵀ head", 256, v, h),
        ("product x·Wᵀ one row", 1, v, h),
        ("product x·Wᵀ eight rows", 8, v, h),
    ] {
        let (a, b, mut c) = (numbers(m * k), numbers(n * k), vec![0.0; m * n]);
        let time = best(|| {
            let c = MatrixMut::new(&mut c, m, n);
            matmul::matmul(c, Update::Replace, 1.0, Matrix::new(&a, m, k), Matrix::new(&b, n, k).t());
        });
        match m {
            1..=8 => report.bytes(name, 4 * (n * k + m * n), time),
            _ => report.flops(name, 2 * m * n * k, time),
        }
    }
}

fn linear_maps(report: &Report, model: &Model) {
    let (h, i) = (model.hidden, model.intermediate);
    let (q, kv) = (model.heads * model.head_dim, model.kv_heads * model.head_dim);
    for (name, inputs, outs) in [
        ("q,k,v", h, &[q, kv, kv][..]),
        ("o", q, &[h][..]),
        ("gate,up", h, &[i, i][..]),
        ("down", i, &[h][..]),
    ] {
        let total: usize = outs.iter().sum();
        let ranks = outs.len() * RANK;
        let weights: Vec<_> = outs.iter().map(|out| numbers(out * inputs)).collect();
        let a = numbers(RANK * inputs);
        let b: Vec<_> = outs.iter().map(|out| numbers(out * RANK)).collect();
        let projections: Vec<_> = (0..outs.len())
            .map(|p| linear::Projection {
                weight: &weights[p],
                out: outs[p],
                bias: None,
                low_rank: Some(linear::LowRank { a: &a, b: &b[p], rank: RANK, scale: 2.0 }),
            })
            .collect();
        let (x, dy) = (numbers(TOKENS * inputs), numbers(TOKENS * total));
        let (mut y, mut xa) = (vec![0.0; TOKENS * total], vec![0.0; TOKENS * ranks]);
        let time = best(|| linear::forward(&mut y, &mut xa, &x, None, TOKENS, inputs, &projections));
        let base = 2 * TOKENS * inputs * total;
        let low = 2 * TOKENS * (inputs * ranks + total * RANK);
        report.flops(&format!("linear {name} forward"), base + low, time);
        let mut dx = vec![0.0; TOKENS * inputs];
        let mut factors: Vec<_> =
            outs.iter().map(|out| (vec![0.0; RANK * inputs], vec![0.0; out * RANK])).collect();
        let time = best(|| {
            let mut gradients: Vec<_> = factors
                .iter_mut()
                .map(|(a, b)| linear::Gradients { low_rank: Some((a, b)), ..Default::default() })
                .collect();
            linear::backward(Some(&mut dx), &mut gradients, &dy, &x, &xa, TOKENS, inputs, &projections);
        });
        report.flops(&format!("linear {name} backward"), base + 2 * low, time);
    }
}

fn attend(report: &Report, model: &Model) {
    let Model { heads, kv_heads, head_dim, .. } = *model;
    let angles: Vec<f32> = (0..TOKENS * head_dim / 2).map(|i| i as f32 * 0.01).collect();
    let (cos, sin): (Vec<_>, Vec<_>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    let first: Vec<i32> = (0..TOKENS).map(|i| (i / SEQUENCE * SEQUENCE) as i32).collect();
    let attention = attention::Attention {
        tokens: TOKENS,
        heads,
        kv_heads,
        head_dim,
        rotary: Some((&cos, &sin)),
        norms: None,
        first: &first,
        window: 0,
    };
    let qkv = numbers(TOKENS * (heads + 2 * kv_heads) * head_dim);
    let dout = numbers(TOKENS * heads * head_dim);
    let (mut out, mut lse) = (vec![0.0; dout.len()], vec![0.0; heads * TOKENS]);
    let mut dqkv = vec![0.0; qkv.len()];
    // Of each product only the half in sight counts.
    let flops = TOKENS * SEQUENCE * heads * head_dim;
    let time = best(|| attention.forward(&mut out, &mut lse, &qkv));
    report.flops("attention forward", 2 * flops, time);
    let time = best(|| attention.backward(&mut dqkv, &qkv, &out, &lse, &dout));
    report.flops("attention backward", 5 * flops, time);
}

fn rows(report: &Report, model: &Model) {
    let (h, i, v) = (model.hidden, model.intermediate, model.vocab);
    let (x, dy, weight) = (numbers(TOKENS * h), numbers(TOKENS * h), numbers(h));
    let mut y = vec![0.0; TOKENS * h];
    let time = best(|| rms_norm::forward(&mut y, &x, &weight, 1e-5));
    report.bytes("rms norm forward", 8 * y.len(), time);
    let time = best(|| rms_norm::backward(&mut y, None, &dy, &x, &weight, 1e-5, Some(&dy)));
    report.bytes("rms norm backward + residual", 16 * y.len(), time);

    let (joint, dout) = (numbers(TOKENS * 2 * i), numbers(TOKENS * i));
    let (mut out, mut djoint) = (vec![0.0; TOKENS * i], vec![0.0; TOKENS * 2 * i]);
    let time = best(|| gated::forward(&mut out, &joint, i));
    report.bytes("gate forward", 12 * out.len(), time);
    let time = best(|| gated::backward(&mut djoint, &joint, &dout, i));
    report.bytes("gate backward", 20 * out.len(), time);

    let mut logits = numbers(64 * v);
    let targets: Vec<i32> = (0..TOKENS).map(|r| (r * 7919 % v) as i32).collect();
    let time = best(|| {
        black_box(cross_entropy::cross_entropy(&mut logits, &targets[..64], v, 1.0));
    });
    report.bytes("cross-entropy of 64 rows", 8 * logits.len(), time);
    let words = numbers(v * h);
    let mut dx = vec![0.0; TOKENS * h];
    let time = best(|| {
        black_box(cross_entropy::head_loss(Some(&mut dx), &x, &words, &targets, h, 1.0));
    });
    report.flops("head and loss, both ways", 4 * TOKENS * h * v, time);
}

fn optimizer(report: &Report, model: &Model) {
    let len = 56 * RANK * (model.hidden + model.intermediate);
    let [mut value, gradient, mut m, mut v] = [(); 4].map(|()| numbers(len));
    v.fill(0.1);
    let constants = adamw::AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.0, time: 10 };
    let time = best(|| {
        let parameter = adamw::Parameter {
            value: &mut value,
            gradient: &gradient,
            moment_1: &mut m,
            moment_2: &mut v,
            learning_rate: 1e-9,
        };
        adamw::adamw(constants, 1.0, &mut [parameter]);
    });
    report.bytes(&format!("adamw of {len}"), 28 * len, time);
    let time = best(|| {
        black_box(adamw::sum_of_squares(&[&gradient]));
    });
    report.bytes("sum of squares", 4 * len, time);
}

fn main() {
    let report = Report { limits: limits() };
    println!(
        "{} threads: {:.0} GFLOP/s, reads {:.1} GB/s",
        rayon::current_num_threads(),
        report.limits.gflops,
        report.limits.gigabytes
    );
    for model in &MODELS {
        println!("\n{}", model.name);
        for part in [products, linear_maps, attend, rows, optimizer] {
            part(&report, model);
        }
        // What was not used since the last time goes: twice, everything.
        buffers::trim();
        buffers::trim();
    }
}
