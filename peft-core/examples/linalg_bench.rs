//! Seconds that decompositions of one matrix take, on one core: `linalg_bench [ROWS COLUMNS RANK]`.

use peft_core::linalg::{Matrix, Sketch, qr, randomized_svd, spd_inverse, svd, top_svd};
use peft_core::random::Stream;
use std::time::Instant;

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let [rows, columns, rank] = numbers.try_into().unwrap_or([2048, 8192, 64]);
    let mut stream = Stream::new(1, "bench", "", &[]);
    let matrix = Matrix::from_fn([rows, columns], |_, _| stream.normal());
    let timed = |what: &str, work: &dyn Fn() -> bool| {
        let start = Instant::now();
        let done = work();
        println!("{what:<28} {:8.2} s{}", start.elapsed().as_secs_f64(), if done { "" } else { " (failed)" });
    };
    println!("{rows} x {columns}, rank {rank}");
    timed("top_svd", &|| top_svd(&matrix, rank).is_ok());
    let sketch = Sketch { rank, oversampling: 0, power_iterations: 4 };
    timed("randomized_svd, 4 iterations", &|| randomized_svd(&matrix, sketch, &mut stream.clone()).is_ok());
    timed("qr, rank columns", &|| qr(&matrix, rank).is_ok());
    let gram = matrix.times_transpose(&matrix);
    timed("spd_inverse, rows x rows", &|| gram.as_ref().is_ok_and(|gram| spd_inverse(gram).is_ok()));
    timed("svd", &|| svd(&matrix).is_ok());
}
