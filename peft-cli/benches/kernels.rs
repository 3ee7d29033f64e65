//! The operations that a training step spends its time in, at a model's shapes, forward and backward.
//!
//! ```text
//! cargo bench -p peft-cli --bench kernels -- --shape 25m --batch 4 --seq 256 --rank 8
//! cargo bench -p peft-cli --bench kernels --features cuda -- --device cuda --shape 1b --batch 4 --seq 1024 attention
//! ```
//!
//! Names choose among `attention`, `head_loss`, `adapted_linear` and `sparse`; without any, all run. A line has the time,
//! the bytes that must be read and written, the multiplications and additions that cannot be saved, and the share of the
//! limit: the larger of the two times that bytes and operations would take at the rates in the first line, which a large
//! product and a sum of two large tensors reach here. `bench/torch_ops.py` times the same operations in PyTorch.

mod shapes;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_core::kernels::{
    AdaptedLinear, AttentionShape, LinearInput, LowRankTerm, Rotation, SparsePattern, SparseTerm, Term, Up,
    Visibility, adapted_linears, add_sparse, backward_from, fault, head_loss, joint_attention,
};
use shapes::{Failure, Sizes, median};
use std::sync::Arc;
use std::time::Instant;

struct Bench {
    device: Device,
    dtype: DType,
    sizes: Sizes,
    batch: usize,
    seq: usize,
    rank: usize,
    /// Operations and bytes a second.
    limits: (f64, f64),
}

fn main() -> Result<(), Failure> {
    let (mut shape, mut name, mut dtype) = ("25m".to_string(), "cpu".to_string(), None);
    let (mut batch, mut seq, mut rank) = (4, 256, 8);
    let mut chosen = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--shape" => shape = value()?,
            "--device" => name = value()?,
            "--dtype" => dtype = Some(value()?),
            "--batch" => batch = value()?.parse()?,
            "--seq" => seq = value()?.parse()?,
            "--rank" => rank = value()?.parse()?,
            "attention" | "head_loss" | "adapted_linear" | "sparse" => chosen.push(word),
            // What cargo adds.
            "--bench" => {}
            other => return Err(format!("no such flag or operation: {other}").into()),
        }
    }
    let (device, compute) = shapes::device(&name, dtype.as_deref())?;
    let sizes = shapes::sizes(&shape)?;
    let mut bench =
        Bench { device, dtype: compute.dtype(), sizes, batch, seq, rank, limits: (f64::NAN, f64::NAN) };
    bench.limits = bench.measure_limits();
    println!(
        "{name}, {:?}, shape {shape}, {batch} × {seq} tokens, rank {rank}; limits {:.2} TFLOP/s, {:.0} GB/s",
        bench.dtype,
        bench.limits.0 / 1e12,
        bench.limits.1 / 1e9
    );
    let runs = |operation: &str| chosen.is_empty() || chosen.iter().any(|name| name == operation);
    if runs("adapted_linear") {
        bench.adapted_linear();
    }
    if runs("sparse") {
        bench.sparse();
    }
    if runs("attention") {
        bench.attention();
    }
    if runs("head_loss") {
        bench.head_loss();
    }
    fault().map_or(Ok(()), |fault| Err(fault.into()))
}

impl Bench {
    fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// Numbers that look random, in the type of the activations.
    fn numbers(&self, rows: usize, columns: usize) -> Tensor<2> {
        self.numbers_as(rows, columns, self.dtype)
    }

    fn numbers_as(&self, rows: usize, columns: usize, dtype: DType) -> Tensor<2> {
        let values: Vec<f32> =
            (0..rows * columns).map(|i| ((i * 7919) % 2003) as f32 / 20_030.0 - 0.05).collect();
        Tensor::from_data(TensorData::new(values, [rows, columns]), (&self.device, dtype))
    }

    fn finish(&self) {
        self.device.sync().expect("the device goes on");
    }

    /// Seconds of a call: the median of rounds of several, so that waiting for the device counts little.
    fn seconds(&self, mut call: impl FnMut()) -> f64 {
        call();
        self.finish();
        let start = Instant::now();
        call();
        self.finish();
        let calls = (0.05 / start.elapsed().as_secs_f64()).clamp(1.0, 50.0) as usize;
        let round = |_| {
            let start = Instant::now();
            (0..calls).for_each(|_| call());
            self.finish();
            start.elapsed().as_secs_f64() / calls as f64
        };
        median((0..7).map(round).collect())
    }

    fn measure_limits(&self) -> (f64, f64) {
        let on_cpu = self.device == Device::flex();
        let (m, n, k) = if on_cpu { (1024, 1024, 2048) } else { (8192, 8192, 8192) };
        let (x, w) = (self.numbers(m, k), self.numbers(n, k));
        let product = self.seconds(|| {
            let map = AdaptedLinear { weight: w.clone(), bias: None, term: None };
            drop(adapted_linears(LinearInput::Plain(x.clone()), vec![map], None, false));
        });
        let length = if on_cpu { 1 << 26 } else { 1 << 29 };
        let (a, b) = (self.numbers(1024, length / 4096), self.numbers(1024, length / 4096));
        let sum = self.seconds(|| drop(a.clone() + b.clone()));
        let bytes = 3 * (length / 4) * self.dtype.size();
        ((2 * m * n * k) as f64 / product, bytes as f64 / sum)
    }

    fn report(&self, name: &str, operations: usize, elements: usize, seconds: f64) {
        let bytes = (elements * self.dtype.size()) as f64;
        let limit = (operations as f64 / self.limits.0).max(bytes / self.limits.1);
        println!(
            "{name:<34} {:9.3} ms {:9.2} GFLOP {:9.1} MB  {:4.0} % of the limit",
            seconds * 1e3,
            operations as f64 / 1e9,
            bytes / 1e6,
            100.0 * limit / seconds
        );
    }

    /// Times a function of one leaf, then its backward: graphs recorded first are used up one a call.
    fn both(&self, forward: impl Fn(Tensor<2>) -> Tensor<2>, input: &Tensor<2>) -> (f64, f64) {
        let plain = self.seconds(|| drop(forward(input.clone())));
        let y = forward(input.clone());
        let dy = if y.device().is_autodiff() { y.inner() } else { y }.mul_scalar(0.1);
        // The forward of a graph runs before its backward's time begins.
        let round = |_| {
            let leaf = input.clone().autodiff().require_grad();
            let y = forward(leaf);
            self.finish();
            let start = Instant::now();
            drop(backward_from(y, dy.clone()));
            self.finish();
            start.elapsed().as_secs_f64()
        };
        // The first rounds warm up.
        (plain, median((0..18).map(round).skip(3).collect()))
    }

    fn adapted_linear(&self) {
        let Sizes { hidden: h, intermediate: i, heads, kv_heads, head_dim, .. } = self.sizes;
        let (q, kv, t) = (heads * head_dim, kv_heads * head_dim, self.tokens());
        for (name, inputs, outs) in [
            ("q,k,v", h, &[q, kv, kv][..]),
            ("o", q, &[h][..]),
            ("gate,up", h, &[i, i][..]),
            ("down", i, &[h][..]),
        ] {
            let total: usize = outs.iter().sum();
            let factor = |rows, columns| self.numbers_as(rows, columns, DType::F32).autodiff().require_grad();
            let joint = self.numbers(total, inputs);
            let mut start = 0;
            let maps: Vec<(Tensor<2>, Tensor<2>, Tensor<2>)> = outs
                .iter()
                .map(|out| {
                    let weight = joint.clone().slice([start..start + out, 0..inputs]);
                    start += out;
                    (weight, factor(self.rank, inputs), factor(*out, self.rank))
                })
                .collect();
            let (forward, backward) = self.both(
                |x| {
                    let maps = maps.iter().map(|(weight, a, b)| AdaptedLinear {
                        weight: weight.clone(),
                        bias: None,
                        term: Some(Term::LowRank(LowRankTerm {
                            a: a.clone(),
                            b: Up::Matrix(b.clone()),
                            bias: None,
                            gain: None,
                            scale: 2.0,
                            dropout: None,
                        })),
                    });
                    adapted_linears(LinearInput::Plain(x), maps.collect(), None, false)
                },
                &self.numbers(t, inputs),
            );
            let (base, low) = (2 * t * inputs * total, 2 * t * self.rank * (inputs * outs.len() + total));
            let weights = total * inputs;
            self.report(
                &format!("adapted_linear {name} forward"),
                base + low,
                weights + t * (inputs + total),
                forward,
            );
            let elements = weights + t * (2 * inputs + total);
            self.report(&format!("adapted_linear {name} backward"), base + 2 * low, elements, backward);
        }
    }

    /// Changes at one place in 250 and at one in 50, which a GPU multiplies entry by entry and in dense strips.
    fn sparse(&self) {
        let Sizes { hidden: h, intermediate: i, heads, head_dim, .. } = self.sizes;
        let t = self.tokens();
        let maps = [("q", h, heads * head_dim), ("up", h, i), ("down", i, h)];
        for ((name, inputs, out), every) in maps.into_iter().flat_map(|map| [(map, 250), (map, 50)]) {
            let count = inputs * out / every;
            let positions = (0..count).map(|entry| (every * entry + entry * 7919 % every) as u32).collect();
            let pattern = SparsePattern::new([out, inputs], positions).expect("positions ascend");
            let pattern = Arc::new(pattern);
            let values = self.numbers_as(1, count, DType::F32).autodiff().require_grad();
            let y = self.numbers(t, out);
            let (forward, backward) = self.both(
                |x| {
                    let (values, pattern) = (values.clone(), pattern.clone());
                    add_sparse(y.clone(), x, SparseTerm { values, pattern, observer: None })
                },
                &self.numbers(t, inputs),
            );
            let operations = 2 * t * count;
            let name = format!("sparse {name}, 1 in {every}");
            self.report(&format!("{name} forward"), operations, t * (inputs + 2 * out), forward);
            self.report(&format!("{name} backward"), 2 * operations, t * (2 * inputs + out), backward);
        }
    }

    fn attention(&self) {
        let Sizes { heads, kv_heads, head_dim, .. } = self.sizes;
        let shape = AttentionShape { heads, kv_heads, head_dim, window: None, epsilon: 1e-5 };
        let t = self.tokens();
        let segments: Vec<_> = (0..self.batch).map(|row| row * self.seq..(row + 1) * self.seq).collect();
        let visibility = Visibility::new(&segments, t, &self.device);
        let angles = self.numbers_as(t, head_dim / 2, DType::F32);
        let rotation = Rotation { cos: angles.clone().cos(), sin: angles.sin() };
        let qkv = self.numbers(t, shape.columns());
        let (forward, backward) =
            self.both(|qkv| joint_attention(&shape, qkv, Some(&rotation), None, &visibility), &qkv);
        // Of each product only the half in sight counts: two forward, five backward.
        let product = t * self.seq * heads * head_dim;
        let (joint, out) = (t * shape.columns(), t * heads * head_dim);
        self.report("attention forward", 2 * product, joint + out, forward);
        self.report("attention backward", 5 * product, 2 * joint + 2 * out, backward);
    }

    fn head_loss(&self) {
        let Sizes { hidden, vocab, .. } = self.sizes;
        let t = self.tokens();
        let (x, weight) = (self.numbers(t, hidden), self.numbers(vocab, hidden));
        let targets: Vec<i64> = (0..t).map(|row| (row * 7919 % vocab) as i64).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [t]), &self.device);
        let elements = if self.device == Device::flex() { 1 << 22 } else { 1 << 27 };
        let chunk = (elements / vocab).clamp(1, t);
        let seconds = self.seconds(|| {
            drop(head_loss(x.clone(), weight.clone(), targets.clone(), chunk, Some(1.0)));
        });
        self.report("head_loss, both ways", 4 * t * hidden * vocab, 2 * t * hidden + vocab * hidden, seconds);
    }
}
